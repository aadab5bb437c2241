"""The diagnosis: planted faults raise their own signal, clean runs none, and no bit changes."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import planted
import pytest
from planted import SHAPES, Planted, config_of, planted_input

from glasslm.cli import main
from glasslm.config.schema import ComputeConfig, RunConfig
from glasslm.data.batch_sampler import BatchSampler
from glasslm.data.cache import cache_dir
from glasslm.engines.protocol import Batch
from glasslm.errors import DamagedError
from glasslm.lab.diagnosis import diagnose
from glasslm.lab.diagnosis.diagnose import Diagnosis
from glasslm.lab.diagnosis.diagnosis_input import input_from_run
from glasslm.report.findings import Finding
from glasslm.runs import checkpoint
from glasslm.training import launch
from small_runs import (
    comparable_results,
    ignore_message,
    interrupt_at,
    resume,
    without_report,
    write_text,
)

ENGINES = ["numpy", "torch"]
SEEDS = [pytest.param(seed, marks=[pytest.mark.slow] if seed > 1 else []) for seed in range(1, 6)]
QUICK = {("numpy", "tiny"), ("numpy", "nanogpt"), ("torch", "capstone")}  # the others are slow
# The engines agree to rounding, so runs of seeds 2 to 5 by PyTorch would repeat those by NumPy.
CLEAN = [
    pytest.param(
        engine,
        shape,
        seed,
        marks=[pytest.mark.slow] if seed > 1 or (engine, shape) not in QUICK else [],
    )
    for engine in ENGINES
    for shape in SHAPES
    for seed in (range(1, 6) if engine == "numpy" else (1,))
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("text")


def require(engine: str) -> None:
    if engine == "torch":
        pytest.importorskip("torch")


def raised_signals(diagnosis: Diagnosis) -> dict[str, str]:
    """The signals that are not ok, and their verdicts."""
    return {finding.signal: finding.verdict for finding in diagnosis.problems}


def train(config: RunConfig, run_dir: Path, engine: str = "numpy") -> Path:
    with without_report():
        launch.train(config, planted.compute(engine), run_dir, notify=ignore_message)
    return run_dir


def text_in(folder: Path) -> Path:
    """Long enough for short runs not to know it by heart."""
    path = folder / "long.txt"
    return path if path.exists() else write_text(path, 8000)


def times(factor: float, *parts: str) -> Callable[[str, Any], Any]:
    """First weights of which those whose names have one of the parts are scaled."""
    return lambda name, array: (
        array * np.float32(factor) if any(part in name for part in parts) else array
    )


def shifted(batch: Batch) -> Batch:
    return batch._replace(targets=batch.tokens.copy())


def closed(name: str, array: Any) -> Any:
    return array - np.float32(10) if name.endswith("up.bias") else array


def planted_by(
    shape: str = "tiny", weights: Any = None, faults: dict[str, Any] | None = None, **flags: Any
) -> Any:
    """What plants a fault: (folder, seed) -> input."""
    return lambda folder, seed: planted_input(
        folder, config_of(shape, seed=seed, **flags), weights or times(1), **(faults or {})
    )


# For each fault the signal that is its own, and how it is planted.
RATES: dict[str, Callable[[Path, int], Planted]] = {
    "x30": planted_by(lr=0.3),
    "x100": planted_by(lr=1.0),
    "x30 by adamw": planted_by(optimizer="adamw", lr=0.3),
    "x100 of nanogpt": planted_by("nanogpt", lr=0.1),
}
FAULTS: dict[str, tuple[str, Callable[[Path, int], Planted]]] = {
    "no warmup": ("update to weight", planted_by(optimizer="adamw", lr=0.01, warmup_steps=0)),
    "init x10": ("initial loss", planted_by(weights=times(10, "embedding", "blocks"))),
    "gains x1000": ("signal through depth", planted_by(weights=times(1e3, "norm"))),
    "gains 0": ("signal through depth", planted_by(weights=times(0, "norm"))),
    "forgotten by the optimizer": (
        "update to weight",
        planted_by(faults={"engines": planted.Frozen}),
    ),
    "detached": ("gradients by layer", planted_by(faults={"engines": planted.Detached})),
    "dead relu": ("dead units", planted_by(weights=closed, feedforward="relu", bias=True)),
    "post-norm at depth": ("norm position", planted_by(norm_position="post", n_layers=12)),
    "q and k x30": (
        "attention logits",
        planted_by(weights=times(30, "attention.q.", "attention.k.")),
    ),
    "shifted targets": ("targets", planted_by(faults={"batches": shifted})),
    "no mask": ("causality", planted_by(faults={"engines": planted.Leaky})),
}


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_in_the_model_raises_its_own_signal(fault: str, seed: int, folder: Path) -> None:
    signal, plant = FAULTS[fault]
    diagnosis = Diagnosis(fault)
    diagnose.inspect_checkpoints(plant(folder, seed), diagnosis, ignore_message)
    assert signal in raised_signals(diagnosis)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("fault", RATES)
def test_too_high_a_rate_raises_its_own_signal_and_a_sound_model_no_other(
    fault: str, seed: int, folder: Path
) -> None:
    diagnosis = Diagnosis(fault)
    diagnose.run_trials(RATES[fault](folder, seed), diagnosis, ignore_message)
    assert list(raised_signals(diagnosis)) == ["learning rate"]


def test_a_model_that_cannot_learn_is_told_from_a_rate_that_is_too_high(folder: Path) -> None:
    diagnosis = Diagnosis("numb")
    diagnose.run_trials(
        planted_by(faults={"engines": planted.Untrainable})(folder, 1), diagnosis, ignore_message
    )
    assert raised_signals(diagnosis) == {"overfit one batch": "bad", "learning rate": "bad"}
    rate = next(finding for finding in diagnosis.findings if finding.signal == "learning rate")
    assert "no rate" in rate.evidence
    assert "--lr" not in rate.advice


@pytest.mark.parametrize(("engine", "shape", "seed"), CLEAN)
def test_a_clean_run_raises_no_signal(
    engine: str, shape: str, seed: int, folder: Path, tmp_path: Path
) -> None:
    require(engine)
    config = config_of(
        shape,
        seed=seed,
        text_file=(str(text_in(folder)),),
        eval_interval=15,
        log_interval=2,
        sample_interval=0,
        checkpoint_interval=30,
        max_steps=60,
    )
    run_dir = train(config, tmp_path / "run", engine)
    diagnosis = diagnose.diagnose(
        input_from_run(run_dir, planted.compute(engine), ignore_message), ignore_message
    )
    assert raised_signals(diagnosis) == {}
    assert {"initial loss", "learning rate", "overfit one batch", "warnings", "divergence"} <= {
        finding.signal for finding in diagnosis.findings
    }


@pytest.mark.parametrize("seed", SEEDS)
def test_one_bad_batch_is_a_spike_in_the_history(
    seed: int, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = BatchSampler.batch

    def batch(self: BatchSampler, tokens: Any, step: int, rows: Any) -> Any:
        inputs, targets = honest(self, tokens, step, rows)
        return (inputs, targets) if step != 70 else (inputs * 0 + 3, targets * 0 + 5)

    monkeypatch.setattr(BatchSampler, "batch", batch)
    config = config_of(
        seed=seed, text_file=(str(text_in(folder)),), log_interval=1, sample_interval=0
    )
    run_dir = train(config, tmp_path / "run")
    monkeypatch.undo()
    diagnosis = Diagnosis("history")
    diagnose.judge_history(input_from_run(run_dir, planted.compute(), ignore_message), diagnosis)
    assert {"spikes", "warning: spike"} <= set(raised_signals(diagnosis))
    assert "71" in next(
        finding.evidence for finding in diagnosis.findings if finding.signal == "spikes"
    )


def test_the_two_engines_see_the_same(folder: Path) -> None:
    pytest.importorskip("torch")
    ours, theirs = Diagnosis("numpy"), Diagnosis("torch")
    for diagnosis, engine in ((ours, "numpy"), (theirs, "torch")):
        diagnose.inspect_checkpoints(
            planted_input(folder, config_of(), times(10, "embedding", "blocks"), engine),
            diagnosis,
            ignore_message,
        )
    assert [(finding.signal, finding.verdict) for finding in ours.findings] == [
        (finding.signal, finding.verdict) for finding in theirs.findings
    ]
    for signal in (
        "initial loss",
        "initialization",
        "signal through depth",
    ):  # rounded to three digits and more
        assert [finding.evidence for finding in ours.findings if finding.signal == signal] == [
            finding.evidence for finding in theirs.findings if finding.signal == signal
        ]


def hashes(run_dir: Path) -> dict[str, str]:
    files = [
        path for path in run_dir.rglob("*") if path.is_file() and "diagnosis" not in path.parts
    ]
    return {
        str(path.relative_to(run_dir)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(files)
    }


@pytest.mark.usefixtures("no_figures")
def test_looking_changes_no_bit_of_a_run(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that is stopped, diagnosed and resumed ends like one that nobody looked at."""
    flags: dict[str, Any] = {
        "text_file": (str(text_in(folder)),),
        "n_layers": 1,
        "max_steps": 20,
        "checkpoint_interval": 5,
        "sample_interval": 10,
        "eval_interval": 5,
        "log_interval": 1,
        "dropout": 0.1,
    }
    whole = train(config_of(**flags), tmp_path / "whole")
    interrupt_at(10, monkeypatch)
    halved = train(config_of(**flags), tmp_path / "halved")
    monkeypatch.undo()
    before = hashes(halved)
    assert main(["diagnose", str(halved), "--engine", "numpy", "--threads", "1"]) in (0, 1)
    assert (halved / "diagnosis" / "diagnosis.html").stat().st_size > 10_000
    assert hashes(halved) == before
    resume(halved)
    assert comparable_results(halved, 20) == comparable_results(whole, 20)


def test_a_run_without_its_text_cannot_be_diagnosed(tmp_path: Path) -> None:
    text = write_text(tmp_path / "mine.txt", 300)
    run_dir = train(
        config_of(text_file=(str(text),), max_steps=2, sample_interval=0), tmp_path / "run"
    )
    text.write_text("something else", encoding="utf-8")
    record = json.loads((run_dir / "run.json").read_text(encoding="utf-8"))
    (cache_dir("tokens") / record["data"]["sha256"] / "train.bin").unlink()
    with pytest.raises(DamagedError, match=r"mine\.txt"):
        input_from_run(run_dir, ComputeConfig(), ignore_message)


def test_a_damaged_checkpoint_is_left_out_with_a_word(folder: Path, tmp_path: Path) -> None:
    config = config_of(
        text_file=(str(text_in(folder)),), max_steps=4, checkpoint_interval=2, sample_interval=0
    )
    run_dir = train(config, tmp_path / "run")
    file = run_dir / "checkpoints" / "000002" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    messages: list[str] = []
    diagnosis = Diagnosis("damaged")
    diagnose.inspect_checkpoints(
        input_from_run(run_dir, planted.compute(), ignore_message), diagnosis, messages.append
    )
    assert [line for line in messages if "step 2 is left out" in line]
    logits = next(finding for finding in diagnosis.findings if finding.signal == "attention logits")
    assert [step in logits.evidence for step in ("step 0", "step 2", "step 4")] == [
        True,
        False,
        True,
    ]


def test_a_run_under_way_may_remove_what_is_being_read(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_of(
        text_file=(str(text_in(folder)),), max_steps=4, checkpoint_interval=2, sample_interval=0
    )
    target = input_from_run(train(config, tmp_path / "run"), planted.compute(), ignore_message)
    load = checkpoint.load

    def and_lose(run_dir: Path, step: Any) -> Any:
        saved = load(run_dir, step)
        if step == 2:
            shutil.rmtree(saved.path)
        return saved

    monkeypatch.setattr(checkpoint, "load", and_lose)
    messages: list[str] = []
    diagnose.inspect_checkpoints(target, Diagnosis("lost"), messages.append)
    assert [line for line in messages if "step 2 is left out" in line]
    for saved, state in target.load_checkpoints(ignore_message):
        shutil.rmtree(saved.path)
        assert "embedding.weight" in dict(state)


def test_first_weights_are_those_of_the_seed_whatever_became_of_their_checkpoint(
    folder: Path, tmp_path: Path
) -> None:
    config = config_of(text_file=(str(text_in(folder)),), max_steps=2, sample_interval=0)
    run_dir = train(config, tmp_path / "run")
    saved = {name: array for name, array in checkpoint.load(run_dir, 0).state() if "/" not in name}
    (run_dir / "checkpoints" / "000000" / "model.safetensors").write_bytes(b"")
    first = dict(input_from_run(run_dir, planted.compute(), ignore_message).first_weights())
    assert first.keys() == saved.keys()
    assert all(np.array_equal(first[name], saved[name]) for name in saved)


def test_a_run_is_looked_at_as_it_was_computed(folder: Path, tmp_path: Path) -> None:
    config = config_of(text_file=(str(text_in(folder)),), max_steps=2, sample_interval=0)
    with without_report():
        launch.train(
            config,
            ComputeConfig(engine="numpy", precision="fp64"),
            tmp_path / "run",
            notify=ignore_message,
        )
    compute = input_from_run(tmp_path / "run", ComputeConfig(), ignore_message).compute
    assert (compute.engine, compute.precision) == ("numpy", "fp64")
    assert (
        input_from_run(
            tmp_path / "run", ComputeConfig(precision="fp32"), ignore_message
        ).compute.precision
        == "fp32"
    )


def test_a_model_tuned_where_nothing_is_left_to_learn_is_not_ill(
    folder: Path, tmp_path: Path
) -> None:
    text = {"text_file": (str(text_in(folder)),), "sample_interval": 0, "log_interval": 1}
    base = train(config_of(max_steps=250, **text), tmp_path / "base")
    again: dict[str, Any] = {"optimizer": "adamw", "lr": 1e-4, "warmup_steps": 10, "max_steps": 40}
    run_dir = train(config_of(init_from=str(base), **text | again), tmp_path / "run")
    diagnosis = diagnose.diagnose(
        input_from_run(run_dir, planted.compute(), ignore_message), ignore_message
    )
    assert raised_signals(diagnosis) == {"plateau": "watch"}


def test_the_worst_of_all_checkpoints_counts(folder: Path, tmp_path: Path) -> None:
    """Units that were dead at first, and are not any more."""
    config = config_of(
        text_file=(str(text_in(folder)),),
        max_steps=2,
        sample_interval=0,
        feedforward="relu",
        bias=True,
    )
    target = input_from_run(train(config, tmp_path / "run"), planted.compute(), ignore_message)
    first = [(name, closed(name, array)) for name, array in target.first_weights()]
    diagnosis = Diagnosis("dead at first")
    diagnose.inspect_checkpoints(
        dataclasses.replace(target, first_weights=lambda: first), diagnosis, ignore_message
    )
    assert raised_signals(diagnosis)["dead units"] == "bad"
    assert "step 0" in next(
        finding.evidence for finding in diagnosis.findings if finding.signal == "dead units"
    )


def test_the_table_puts_first_what_is_worst() -> None:
    diagnosis = Diagnosis(
        "title",
        [
            Finding("a", "ok", "1", "fine"),
            Finding("b", "watch", "2", "odd", "look"),
            Finding("c", "bad", "3", "wrong", "mend it"),
        ],
    )
    text = diagnosis.text()
    assert [finding.signal for finding in diagnosis.problems] == ["c", "b"]
    assert text.index("mend it") < text.index("look")
    assert "1 bad, 1 to watch, 1 ok" in text
    assert diagnosis.verdict == "bad"
