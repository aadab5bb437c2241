"""Make the engine that a config asks for."""

from __future__ import annotations

import dataclasses

import numpy as np

from glasslm.config.schema import ComputeConfig, RunConfig
from glasslm.engines.choice import choose, ranks, thread_count
from glasslm.engines.protocol import Engine
from glasslm.model.parameters import parameter_table


def make_engine(
    config: RunConfig, vocab_size: int, compute: ComputeConfig, training: bool = False
) -> Engine:
    """The engine that `compute` asks for (choice.py says what auto means), with weights that are yet to be loaded."""
    config = config.resolved()
    parameters = parameter_table(config.model, vocab_size).total
    compute, _ = choose(compute, parameters, training)
    threads = thread_count(compute.threads)
    if compute.engine == "numpy":
        from glasslm.engines.numpy.engine import NumpyEngine

        return NumpyEngine(
            config, vocab_size, threads, np.float64 if compute.precision == "fp64" else np.float32
        )
    if training and ranks() > 1:
        from glasslm.engines.torch import distributed

        return distributed.lead(config, vocab_size, dataclasses.replace(compute, threads=threads))
    from glasslm.engines.torch.engine import make

    return make(config, vocab_size, dataclasses.replace(compute, threads=threads))
