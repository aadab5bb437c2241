"""What a run is expected to take.

The time of a whole step from one turn of it, and steps that fit into a time.
"""

import dataclasses
import math
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from glasslm.config.conversion import with_flags
from glasslm.config.schema import ComputeConfig, RunConfig
from glasslm.data.dataset import Dataset, Split
from glasslm.data.tokenizers import ByteTokenizer
from glasslm.engines.factory import make_engine
from glasslm.engines.protocol import Batch, Update
from glasslm.model.parameters import initial_weights, parameter_table
from glasslm.training import step_timer
from glasslm.training.evaluation_windows import evaluation_windows
from glasslm.training.step_timer import (
    MIN_COMPILED_RUN_S,
    StepTimer,
    run_seconds,
    should_compile,
    with_steps,
)


def dataset(train_tokens: int = 10_000, val_tokens: int = 2000) -> Dataset:
    splits = [Split(np.zeros(count, np.uint16), count) for count in (train_tokens, val_tokens)]
    return Dataset(ByteTokenizer(), *splits, None, {}, "0" * 64)


def config(**flags: Any) -> RunConfig:
    return with_flags(RunConfig(), {"block_size": 8, "sample_interval": 0} | flags).resolve()


class SlowEngine:
    """Takes a second of a fake clock for the micro-batches that its threads compute at once."""

    name = "slow"
    updates = 0

    def __init__(self, micro: int, threads: int) -> None:
        self.micro, self.threads, self.now = micro, threads, 0.0
        self.rows_at_once = micro * threads

    def turns(self, rows: int) -> int:
        return math.ceil(math.ceil(rows / self.micro) / self.threads)

    def accumulate(self, batch: Batch, weight: float) -> float:
        assert weight == 1 / batch.targets.size
        self.now += self.turns(len(batch.rows))
        return 1.0

    def update(self, lr: float, skip_above: float = math.inf) -> Update:
        self.now += 0.25
        return Update(1.0, True, True)

    def losses(self, tokens: Any, targets: Any) -> Any:
        self.now += len(tokens) / 4
        return np.zeros(targets.shape)

    def state(self) -> Iterator[tuple[str, Any]]:
        yield "weight", np.zeros(1000, np.float32)


@given(batch=st.integers(1, 70), micro=st.integers(1, 20), threads=st.integers(1, 9))
def test_a_step_takes_as_many_turns_as_its_micro_batches_need(
    batch: int, micro: int, threads: int
) -> None:
    engine: Any = SlowEngine(min(micro, batch), threads)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(time, "perf_counter", lambda: engine.now)
        measured = step_timer.time_steps(
            config(batch_size=batch, micro_batch_size=micro), engine, dataset()
        )
    assert measured.step == engine.turns(batch) + 0.25
    assert measured.window == 0.25
    assert measured.sample == 0
    assert engine.now < 3.75 + 2 * min(
        batch, threads * micro
    )  # no more than one turn was computed at a time


def test_a_run_takes_what_its_parts_take() -> None:
    """20 steps; evaluations at 0, 8, 16 and 20; samples at 0, 10, 20.

    At most 4 best ones and 2 more checkpoints.
    """
    run = config(
        max_steps=20, eval_interval=8, sample_interval=10, checkpoint_interval=10, batch_size=512
    )
    whole = dataset(val_tokens=801)  # 100 windows
    assert evaluation_windows(run, 801) is None
    parts = {"step": 20, "window": 4 * 100, "sample": 3, "checkpoint": 6}
    for part, count in parts.items():
        assert (
            run_seconds(run, whole, StepTimer(**{**dict.fromkeys(parts, 0.0), part: 1.0})) == count
        )
    sampled = dataset(
        val_tokens=80_001
    )  # 10,000 windows, the last and the best weights on all of them
    n_windows = evaluation_windows(run, 80_001)
    assert n_windows is not None
    assert run_seconds(run, sampled, StepTimer(0, 1, 0, 0)) == 4 * n_windows + 20_000


@given(
    budget=st.floats(1, 1e4),
    step=st.floats(1e-3, 10),
    window=st.floats(0, 0.1),
    val_tokens=st.integers(100, 10**5),
    spent=st.floats(0, 10),
)
def test_as_many_steps_as_fit(
    budget: float, step: float, window: float, val_tokens: int, spent: float
) -> None:
    """With evaluations as large as that number of steps makes them."""
    data, costs = dataset(val_tokens=val_tokens), StepTimer(step, window, 0.1, 0.01)
    asked = config(max_time=f"{budget:.6f}", max_steps=1)
    left_s = float(f"{budget:.6f}") - spent
    fitting = with_steps(asked, data, costs, spent)
    assert fitting.train.max_time == asked.train.max_time
    steps = fitting.train.max_steps
    assert steps == 1 or run_seconds(fitting, data, costs) <= left_s
    more = dataclasses.replace(
        fitting, train=dataclasses.replace(fitting.train, max_steps=steps + 1)
    )
    assert run_seconds(more, data, costs) > left_s


def test_epochs_beat_the_steps_and_steps_stay_without_them() -> None:
    costs = StepTimer(1, 1, 1, 1)
    assert with_steps(config(max_steps=7), dataset(), costs, 0).train.max_steps == 7
    asked = config(epochs=2, batch_size=10)
    assert (
        with_steps(asked, dataset(train_tokens=801), costs, 0).train.max_steps == 20
    )  # 100 windows


@pytest.mark.parametrize("engine", ["numpy", "torch"])
def test_either_engine_is_timed(engine: Any) -> None:
    """Each part takes some time, and none, by far, more than was spent.

    The updates are those of three steps.
    """
    if engine == "torch":
        pytest.importorskip("torch")
    compute = ComputeConfig(engine=engine, device="cpu", precision="fp32", threads=1)
    small = config(
        d_model=32, n_layers=2, n_heads=2, batch_size=8, micro_batch_size=2, sample_interval=5
    )
    engine = make_engine(small, 256, compute, training=True)
    engine.load(initial_weights(parameter_table(small.model, 256), 0))
    data = dataset()
    started_at = time.perf_counter()
    measured = step_timer.time_steps(small, engine, data)
    assert engine.updates == 3
    assert all(0 < part < 100 * (time.perf_counter() - started_at) for part in measured)
    assert 0 < run_seconds(small, data, measured) < math.inf


@pytest.fixture
def _can_compile(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step_timer, "can_compile", lambda compute: True)


@pytest.mark.usefixtures("_can_compile")
@pytest.mark.parametrize("device", MIN_COMPILED_RUN_S)
def test_compiling_pays_in_long_runs(device: Any) -> None:
    compute = ComputeConfig(engine="torch", device=device, precision="fp32")
    repaid = MIN_COMPILED_RUN_S[device]
    assert not should_compile(compute, repaid)
    assert should_compile(compute, 1.01 * repaid)


@pytest.mark.usefixtures("_can_compile")
def test_compiling_never_pays_where_it_was_decided_or_is_not_ready() -> None:
    for decided in ("on", "off"):
        compute = ComputeConfig(engine="torch", device="cpu", compile=decided)  # type: ignore[arg-type]
        assert not should_compile(compute, math.inf)
    assert not should_compile(ComputeConfig(engine="torch", device="mps"), 1e9)


def test_compiling_needs_pytorch_and_a_compiler_and_a_whole_model(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert not should_compile(ComputeConfig(engine="numpy", device="cpu"), math.inf)
    pytest.importorskip("torch")
    from glasslm.engines.torch import hardware

    compute = ComputeConfig(engine="torch", device="cpu")
    monkeypatch.setattr(hardware, "missing_compiler", lambda device: "")
    assert should_compile(compute, math.inf)
    assert not should_compile(dataclasses.replace(compute, parallel="fsdp"), math.inf)
    monkeypatch.setattr(hardware, "missing_compiler", lambda device: "there is no C++ compiler")
    assert not should_compile(compute, math.inf)
