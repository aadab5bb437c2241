"""Errors of PyTorch translated into those of Python and glasslm."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from glasslm.errors import CompilerError
from glasslm.text import to_one_line


@contextmanager
def memory_errors() -> Iterator[None]:
    """A context that raises MemoryError where PyTorch reports full memory, on any device."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise MemoryError from None
    except RuntimeError as error:  # the CPU allocator's message differs between systems
        if "DefaultCPUAllocator" in str(error) or "out of memory" in str(error):
            raise MemoryError from None
        raise


@contextmanager
def compiler_errors() -> Iterator[None]:
    """A context that raises CompilerError, in one line, where torch.compile fails."""
    try:
        yield
    except RuntimeError as error:
        if not type(error).__module__.startswith(("torch._inductor", "torch._dynamo")):
            raise
        lines = [
            line
            for line in str(error).splitlines()
            if line.strip() and not line.endswith("raised:")
        ]
        reason = to_one_line(lines[0]) if lines else type(error).__name__
        raise CompilerError(reason) from error
