"""Make the PyTorch engine of a process: of a single one, or of one rank of a group."""

from __future__ import annotations

import os

import torch

from glasslm.config.schema import ComputeConfig, RunConfig
from glasslm.engines.torch import hardware
from glasslm.engines.torch.engine import TorchEngine
from glasslm.engines.torch.ranks import RankGroup
from glasslm.errors import InputError


def make_torch_engine(
    config: RunConfig,
    vocab_size: int,
    compute: ComputeConfig,
    ranks: RankGroup | None = None,
    training: bool = True,
) -> TorchEngine:
    """The engine for a `compute` without "auto". Raises InputError if a compiler is missing."""
    if compute.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when CUDA starts
        torch.use_deterministic_algorithms(True)
    if compute.compile == "on" and (missing := hardware.missing_compiler(compute.device)):
        raise InputError(f"--compile on: {missing}: install it, or use --compile off")
    return TorchEngine(
        config, vocab_size, device=compute.device, precision=compute.precision,
        threads=compute.threads, compiled=compute.compile == "on", ranks=ranks, training=training,
    )  # fmt: skip
