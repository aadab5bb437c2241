"""What a view looks at: a checkpoint, a text, and the parameters of its address."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from glasslm.inference.microscope.recorded_pass import RecordedPass, choose_candidates
from glasslm.serve.inside.checkpoints import InsideModel
from glasslm.serve.inside.query import Query
from glasslm.serve.inside.runs import InsideRun

Arrays = dict[str, NDArray[Any]]
Facts = dict[str, Any]

MAX_CANDIDATES = 8  # of contributions, beside the token of the text


@dataclass(frozen=True)
class Subject:
    """What a view looks at."""

    loaded: InsideModel
    recorded: RecordedPass
    query: Query
    run: InsideRun
    find_other: Callable[[str], RecordedPass]  # the pass of the same model over another text
    check: Callable[[], None]  # raises an exception once nobody waits for the answer

    def position(self) -> int:
        """The parameter t: the caret stands after this token."""
        return self.query.integer("t", 0, self.recorded.length - 1)

    def layer(self) -> int:
        return self.query.integer("layer", 0, self.recorded.config.n_layers - 1)

    def head(self) -> int:
        return self.query.integer("head", 0, self.recorded.config.n_heads - 1)

    def token(self, name: str) -> int:
        return self.query.integer(name, 0, self.loaded.model.tokenizer.vocab_size - 1)

    def candidates(self, t: int) -> NDArray[np.int64]:
        """(C,): the likeliest tokens after t and the one of the text, for comparisons."""
        recorded = self.recorded
        target = int(recorded.targets[t])
        return choose_candidates(recorded.log_probabilities_at(t), MAX_CANDIDATES, target)


View = Callable[[Subject], tuple[Arrays, Facts]]


def f4(array: Any) -> NDArray[np.float32]:
    """An array (any shape) in float32."""
    return np.asarray(array, np.float32)


def i4(array: Any) -> NDArray[np.int32]:
    """An array (any shape) of integers in 32 bits."""
    return np.asarray(array, np.int32)
