"""Every phase that can take seconds is announced before it starts."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from doubles import HistoryEngine
from glasslm import text as messages_module
from glasslm.cli import check as check_command
from glasslm.cli import outcome as command_outcome
from glasslm.data import dataset, dataset_notes, tokenizers
from glasslm.engines.numpy.engine import NumpyEngine
from glasslm.inference import evaluation
from glasslm.lab.checks import attention_paths, gradient_check, loss_parity, parity
from glasslm.report import run_report
from glasslm.training import engine_preparation, launch, run_inputs, step_timer
from small_runs import COMPUTE, ignore_message, small_config, write_text


def record_calls(
    events: list[str], monkeypatch: pytest.MonkeyPatch, *places: tuple[Any, str]
) -> None:
    """Append the name of each of these functions to `events` when it starts."""

    def wrap(name: str, function: Any) -> Any:
        def call(*arguments: Any, **named: Any) -> Any:
            events.append(f"<{name}>")
            return function(*arguments, **named)

        return call

    for module, name in places:
        monkeypatch.setattr(module, name, wrap(name, getattr(module, name)))


def assert_in_order(events: list[str], *expected: str) -> None:
    """Each expected text begins an event after that of the text before it."""
    left = iter(events)
    for text in expected:
        assert any(event.startswith(text) for event in left), (text, events)


def test_training_announces_each_phase_before_it_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[str] = []
    monkeypatch.setattr(dataset_notes, "NOTIFY_MIN_BYTES", 1)
    monkeypatch.setattr(run_report, "write", lambda run_dir, time_share: events.append("<write>"))
    monkeypatch.setattr(command_outcome, "notify", events.append)
    record_calls(
        events,
        monkeypatch,
        (launch, "open_run_inputs"),
        (dataset, "survey_text"),
        (tokenizers, "train_bpe"),
        (engine_preparation, "choose_compute"),
        (engine_preparation, "make_engine"),
        (step_timer, "time_steps"),
        (launch, "_run_loop"),
    )
    assert run_inputs.prepare_dataset is dataset.prepare_dataset
    text = write_text(tmp_path / "text.txt", 300)
    config = small_config(text, max_steps=2, sample_interval=0, tokenizer="bpe", vocab_size=270)
    ended = launch.train(config, COMPUTE, tmp_path / "run", notify=events.append)
    command_outcome.report_outcome(ended, as_json=False)
    assert_in_order(
        events,
        "<open_run_inputs>",
        "reading",
        "<survey_text>",
        "tokenizing",
        "training BPE",
        "<train_bpe>",
        "choosing the engine",
        "<choose_compute>",
        "starting the numpy engine and measuring its speed",
        "<make_engine>",
        "<time_steps>",
        "glasslm  ",  # the plan
        "<_run_loop>",
        "writing the report",
        "<write>",
    )


def test_a_resume_announces_what_it_reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = write_text(tmp_path / "text.txt")
    with monkeypatch.context() as patch:
        patch.setattr(NumpyEngine, "name", "numpy")
        config = small_config(text, max_steps=4, sample_interval=0)
        launch.train(config, COMPUTE, tmp_path / "run", stop_at=2, notify=ignore_message)
    events: list[str] = []
    record_calls(events, monkeypatch, (launch, "make_engine"), (launch, "_run_loop"))
    launch.resume(tmp_path / "run", COMPUTE, events.append)
    assert_in_order(
        events,
        "reading the checkpoint and the text",
        "starting the numpy engine",
        "<make_engine>",
        "resuming",
        "<_run_loop>",
    )


def test_a_compilation_is_announced() -> None:
    from glasslm.config.schema import ComputeConfig
    from glasslm.training.plan import describe_preparation

    assert describe_preparation(ComputeConfig(compile="on")).startswith("compiling the model")


def test_a_long_evaluation_shows_its_progress_and_the_time_left(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    messages: list[str] = []
    now = 0.0

    class SlowEngine(HistoryEngine):  # type: ignore[no-untyped-call,misc]
        def losses(self, tokens: Any, targets: Any) -> Any:
            nonlocal now
            now += 2.0
            return super().losses(tokens, targets)  # type: ignore[no-untyped-call]

    monkeypatch.setattr(messages_module.time, "monotonic", lambda: now)
    text = np.arange(401) % 5
    engine: Any = SlowEngine(5)  # type: ignore[no-untyped-call]
    evaluation.evaluate(engine, text, np.ones(5, np.int64), 4, rows=10, notify=messages.append)
    assert messages == [
        "evaluating: 120 of 400 tokens, 20 per second, about 14s left",
        "evaluating: 240 of 400 tokens, 20 per second, about 8s left",
        "evaluating: 360 of 400 tokens, 20 per second, about 2s left",
    ]


def test_check_announces_each_phase_before_it_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("torch")
    events: list[str] = []
    monkeypatch.setattr(check_command, "notify", events.append)
    phases = [
        (gradient_check, "check_ops"),
        (gradient_check, "check_models"),
        (attention_paths, "check_attention_paths"),
        (parity, "check_models"),
        (loss_parity, "train_both"),
    ]

    def phase(name: str) -> Any:
        def compute(*arguments: Any, **named: Any) -> Iterator[Any]:
            events.append(f"<{name}>")
            yield from ()

        return compute

    for module, name in phases:  # nothing is computed
        monkeypatch.setattr(module, name, phase(name))
    monkeypatch.setattr(loss_parity, "load_text", lambda notify: (None, "a text"))
    monkeypatch.setattr(check_command.np, "max", lambda values: 0.0)
    check_command.main([])
    assert_in_order(
        events,
        "checking hand-written gradients",
        "checking operations",
        "<check_ops>",
        "checking the whole model",
        "<check_models>",
        "checking attention",
        "<check_attention_paths>",
        "starting PyTorch",
        "<check_models>",
        "training both engines",
        "<train_both>",
    )
