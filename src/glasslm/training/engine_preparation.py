"""The engine of a new run: chosen, made and timed, and compiled where that pays."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Literal, NamedTuple

from glasslm.config.schema import ComputeConfig, RunConfig
from glasslm.data.lossy_tokenizers import explain_lossy_tokenizer
from glasslm.engines.choice import can_compile, choose_engine
from glasslm.engines.factory import make_engine
from glasslm.engines.operations import find_operations, unused_operations
from glasslm.engines.protocol import Engine
from glasslm.engines.resources import count_ranks, thread_count
from glasslm.errors import CompilerError, ExhaustedError
from glasslm.model.parameters import parameter_table
from glasslm.runs.blas import warn_of_slow_kernel
from glasslm.text import Notify
from glasslm.training import step_timer
from glasslm.training.chat_run import require_rows
from glasslm.training.memory import explain_out_of_memory, find_shortage, warn_of_shortage
from glasslm.training.plan import describe_preparation, length_notes
from glasslm.training.preparation import Preparation
from glasslm.training.run_inputs import RunInputs
from glasslm.training.step_timer import MIN_COMPILED_RUN_S, RunLength, StepTimer, fix_length
from glasslm.training.training_batch import weigh_expert_terms

ENGINE_STAGE = "starting the {} engine"


class PreparedEngine(NamedTuple):
    """An engine with its first weights, and what was decided for the run."""

    engine: Engine
    compute: ComputeConfig  # with nothing left to choose
    length: RunLength
    reasons: list[str]  # for the plan


def choose_compute(
    config: RunConfig, vocab_size: int, compute: ComputeConfig, *, compiled: bool = False
) -> tuple[ComputeConfig, list[str]]:
    """`compute` with engine, device, precision and threads chosen, and the reasons to show.

    `compiled`: the run is long enough to repay compiling.
    """
    parameters = parameter_table(config.model, vocab_size).total
    is_automatic = compute.engine == "auto"
    compute, reason = choose_engine(compute, parameters, training=True, compiled=compiled)
    compute = dataclasses.replace(compute, threads=thread_count(compute.threads))
    reasons = [f"engine: {compute.engine} ({reason})"] if is_automatic and reason else []
    if operations := find_operations(config):
        reasons += unused_operations(operations, config)
        if compute.compile == "auto":
            compute = dataclasses.replace(compute, compile="off")
            if can_compile(compute):
                reasons.append("not compiled: torch.compile does not see through --ops")
    if config.preference.is_active and compute.compile == "auto":
        compute = dataclasses.replace(compute, compile="off")
        if can_compile(compute):
            reasons.append("not compiled: the answers of each step have another length")
    return compute, reasons


def prepare_engine(
    config: RunConfig,
    requested: ComputeConfig,
    inputs: RunInputs,
    preparation: Preparation,
    final_windows: int | Literal["auto"] | None,
    notify: Notify,
) -> PreparedEngine:
    """The engine of a new run, with its first weights, and the length of the run."""
    dataset = inputs.dataset
    vocab_size = dataset.tokenizer.vocab_size

    def make_and_time(compute: ComputeConfig) -> tuple[Engine, RunLength]:
        notify(describe_preparation(compute))
        with explain_out_of_memory(config, compute.engine):
            engine = make_engine(config, vocab_size, compute, training=True)
            engine.load(inputs.first_weights(config))
            preparation.end_stage(ENGINE_STAGE.format(compute.engine))
            timer = step_timer.time_steps(config, engine, dataset, preparation, inputs.old_text)
            engine.load(inputs.first_weights(config))  # timing has made updates
        return engine, fit(timer)

    def fit(timer: StepTimer) -> RunLength:
        spent_s, stages = preparation.spent_s, preparation.stages
        return fix_length(config, dataset, timer, spent_s, final_windows, stages)

    notify("choosing the engine and the device")
    compute, reasons = choose_compute(config, vocab_size, requested)
    notes = _text_notes(config, inputs)
    warn_of_shortage(config, vocab_size, compute, notify)
    warn_of_slow_kernel(compute, notify)
    preparation.end_stage(ENGINE_STAGE.format(compute.engine))
    engine, length = make_and_time(compute)
    compiled, why_not = None, ""
    if step_timer.should_compile(compute, length.seconds):
        del engine  # memory may not hold two
        compiled, why_not = _try_compiled(make_and_time, compute)
        engine, length = compiled or make_and_time(dataclasses.replace(compute, compile="off"))
    elif _may_change_engine(config, requested, compute, length):
        pytorch, its_reasons = choose_compute(config, vocab_size, requested, compiled=True)
        if step_timer.should_compile(pytorch, length.seconds) and not find_shortage(
            config, vocab_size, pytorch
        ):
            compiled, why_not = _try_compiled(make_and_time, pytorch)
        length = fit(length.timer)  # PyTorch has taken some of the time, if only to be imported
        if compiled and compiled[1].config.train.max_steps <= length.config.train.max_steps:
            compiled, why_not = None, "PyTorch has no time for more steps than NumPy"
        if compiled:
            (engine, length), compute, reasons = compiled, pytorch, its_reasons
    if compiled:
        notes.append("compiled: the run is long enough to repay the compilation")
    elif why_not:
        notes.append(f"not compiled: {why_not}")
    notes += length_notes(length, len(dataset.val.tokens))
    return PreparedEngine(engine, compute, length, reasons + notes)


def _try_compiled(
    make_and_time: Callable[[ComputeConfig], tuple[Engine, RunLength]], compute: ComputeConfig
) -> tuple[tuple[Engine, RunLength] | None, str]:
    """The compiled engine and the length of its run; or None, and why there is none.

    The error ends here, because it keeps the memory of the engine.
    """
    try:
        return make_and_time(dataclasses.replace(compute, compile="on")), ""
    except (CompilerError, ExhaustedError) as error:
        if count_ranks() > 1:  # the other ranks have ended
            raise
        if isinstance(error, CompilerError):
            return None, f"torch.compile does not work here ({error.reason})"
        return None, "it needs more memory than is free"


def _may_change_engine(
    config: RunConfig, requested: ComputeConfig, compute: ComputeConfig, length: RunLength
) -> bool:
    """Whether PyTorch, compiled and in bfloat16, may take over from NumPy.

    Only where a time limit fixes the steps, which depend on the speed anyway: other runs have the
    same bits on a fast and on a slow machine.
    """
    is_open = requested.engine == requested.precision == compute.compile == "auto"
    is_timed = config.train.max_time is not None and config.train.epochs is None
    is_long = length.seconds > MIN_COMPILED_RUN_S["cpu"]
    return compute.engine == "numpy" and is_open and is_timed and is_long


def _text_notes(config: RunConfig, inputs: RunInputs) -> list[str]:
    """What the plan says about the text and its tokens."""
    notes = require_rows(config, inputs.dataset) if inputs.chat else []
    if config.model.n_experts and config.data.predicts_answers:
        notes.append(weigh_expert_terms(config, inputs.dataset))
    if why := inputs.dataset.tokenizer.lossy_reason:
        notes.append(explain_lossy_tokenizer(why))
    return notes
