"""Skipping the tests that run in bfloat16 where the CPU has no arithmetic for it."""

from __future__ import annotations

import pytest


def skip_without_bf16(precision: str) -> None:
    """Skip the test if `precision` is bf16 and --precision bf16 is refused on this machine."""
    if precision != "bf16":
        return
    pytest.importorskip("torch")
    from glasslm.engines.torch import hardware

    if not hardware.has_bf16("cpu"):
        pytest.skip("needs bfloat16 arithmetic")
