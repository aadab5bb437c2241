"""Make the engine that a config asks for."""

from __future__ import annotations

import dataclasses

import numpy as np

from glasslm.config.schema import ComputeConfig, RunConfig
from glasslm.engines.choice import choose_engine
from glasslm.engines.protocol import Engine
from glasslm.engines.resources import count_ranks, thread_count
from glasslm.errors import InputError
from glasslm.model.parameters import parameter_table


def make_engine(
    config: RunConfig, vocab_size: int, compute: ComputeConfig, training: bool = False
) -> Engine:
    """The engine that `compute` asks for. Its weights are zero or undefined until `load`.

    choose_engine decides what `auto` means, and changes nothing in a `compute` that it has decided
    before; a caller that wants its reason calls it first. Raises InputError where the choice is
    impossible here.
    """
    config = config.resolve()
    parameters = parameter_table(config.model, vocab_size).total
    compute, _ = choose_engine(compute, parameters, training)
    if config.operations.ops and compute.compile == "on":
        raise InputError(
            "--compile on does not go with --ops, whose functions torch.compile does not see "
            "through: leave one of them out"
        )
    threads = thread_count(compute.threads)
    if compute.engine == "numpy":
        from glasslm.engines.numpy.engine import NumpyEngine

        dtype = np.float64 if compute.precision == "fp64" else np.float32
        return NumpyEngine(config, vocab_size, threads, dtype)
    if training and count_ranks() > 1:
        from glasslm.engines.torch import distributed

        compute = dataclasses.replace(compute, threads=threads)
        return distributed.lead_group(config, vocab_size, compute)
    from glasslm.engines.torch.creation import make_torch_engine

    compute = dataclasses.replace(compute, threads=threads)
    return make_torch_engine(config, vocab_size, compute, training=training)
