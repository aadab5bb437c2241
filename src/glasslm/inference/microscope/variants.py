"""Several versions of one forward pass at once, each with its own edits: rows of a batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from numpy.typing import NDArray

from glasslm.engines.inspection import Edit
from glasslm.inference.microscope.recorded_pass import RecordedPass, make_batch

MAX_ROW_TOKENS = 4096  # computed in one call
MAX_LOGITS_BYTES = 64 << 20  # of one call

Variant = Sequence[Edit]  # whose indices begin with the axis T


def check_nothing() -> None:
    """The default `check`: never raises."""


def variant_logits(
    recorded: RecordedPass,
    variants: Sequence[Variant],
    t: int,
    check: Callable[[], None] = check_nothing,
) -> NDArray[np.float64]:
    """(variants, V): the logits after position t, by each variant of the pass.

    The text is read up to t only: what comes later does not change them. `check` is called now and
    then; its exception ends the work.
    """
    length = t + 1
    ids, targets = recorded.ids[:length], recorded.targets[:length]
    width = recorded.model.tokenizer.vocab_size
    rows = max(1, min(MAX_ROW_TOKENS // length, MAX_LOGITS_BYTES // (4 * length * width)))
    engine = recorded.model.engine

    def compute(start: int) -> NDArray[Any]:
        check()
        part = variants[start : start + rows]
        edits = [edit_of_row(row, edit) for row, variant in enumerate(part) for edit in variant]
        batch = make_batch(ids, targets, len(part))
        return engine.inspect(batch, ["logits"], edits)["logits"][:, -1]

    starts = range(0, len(variants), rows)
    threads = max(1, engine.rows_at_once // engine.micro_batch_size)  # those of the NumPy engine
    with ThreadPoolExecutor(threads) as pool:
        return np.concatenate(list(pool.map(compute, starts))).astype(np.float64)


def edit_of_row(row: int, edit: Edit) -> Edit:
    """The edit, whose index begins with the axis T, in one row of a batch."""
    index = edit.index if isinstance(edit.index, tuple) else (edit.index,)
    return Edit(edit.name, (row, *index), edit.value)
