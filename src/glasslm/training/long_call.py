"""Calls of an engine that take seconds, which a signal abandons.

Python obeys a signal between two of its instructions, and a backward pass of PyTorch is one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from glasslm.config.schema import RunConfig
from glasslm.data.library_call import run_interruptibly
from glasslm.engines.protocol import Engine
from glasslm.engines.resources import count_ranks
from glasslm.model.flops import flops_per_token

Result = TypeVar("Result")

# A second on a slow CPU. The rule counts work and not seconds, so that a run and its resumption
# make the same calls.
MIN_LONG_FLOPS = 2e10


class EngineCalls:
    """Calls of an engine that do not change its weights: those that take long can be abandoned.

    They run in a thread, on a CPU. Calls of several ranks are not abandoned, because all ranks
    compute them together.
    """

    def __init__(self, engine: Engine, config: RunConfig, vocab_size: int) -> None:
        self._flops_per_token = flops_per_token(config.model, vocab_size)
        self._can_abandon = engine.device == "cpu" and count_ranks() == 1

    def run(
        self,
        work: Callable[[], Result],
        n_tokens: float,
        check_interrupt: Callable[[], None] = lambda: None,
    ) -> Result:
        """The result of `work`, a forward and backward pass over `n_tokens` tokens, or as much.

        If it takes long, `check_interrupt` is called meanwhile. Where that raises, the call is
        abandoned and its gradients are lost.
        """
        if not self._can_abandon or n_tokens * self._flops_per_token < MIN_LONG_FLOPS:
            return work()
        return run_interruptibly(work, check_interrupt=check_interrupt)
