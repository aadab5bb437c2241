"""A step brought back is that very step, and the text that spoilt it is result."""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from glasslm.config.schema import ComputeConfig
from glasslm.engines.factory import make_engine
from glasslm.engines.protocol import NO_TARGET, Batch
from glasslm.errors import DamagedError, InputError
from glasslm.lab.diagnosis.replay import (
    _judge_replayed_loss,
    _layer_gradient_norms,
    build_sections,
    format_replay,
    replay_step,
)
from glasslm.model.parameters import initial_weights, parameter_table
from glasslm.report import page
from glasslm.runs import checkpoint
from glasslm.training import launch
from small_runs import (
    ignore_message,
    interrupt_at,
    logged_lines,
    noisy_batches,
    small_config,
    without_report,
    write_text,
)

BAD_STEP, BAD_ROW = 80, 5
AUTO = ComputeConfig()
FLAGS: dict[str, Any] = {
    "max_steps": 90,
    "eval_interval": 45,
    "checkpoint_interval": 30,
    "sample_interval": 0,
    "dropout": 0.1,
    "keep": 2,
}


def train(folder: Path, engine: str, **flags: Any) -> Path:
    if engine == "torch":
        pytest.importorskip("torch")
    config = small_config(write_text(folder / "text.txt"), **FLAGS | flags)
    with without_report():
        launch.train(
            config, ComputeConfig(engine=engine, threads=1), folder / "run", notify=ignore_message
        )  # type: ignore[arg-type]
    return folder / "run"


def contents(folder: Path) -> dict[str, str]:
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}


@pytest.mark.usefixtures("no_figures")
@pytest.mark.parametrize("engine", ["numpy", "torch"])
@pytest.mark.parametrize("action", ["log", "rollback"])
def test_a_step_is_brought_back_to_the_bit_and_its_bad_row_is_found(
    action: str, engine: str, tmp_path: Path
) -> None:
    with noisy_batches(BAD_STEP, rows=slice(BAD_ROW, BAD_ROW + 1)):
        run = train(tmp_path, engine, on_spike=action)
        before = contents(run)
        for step in (
            BAD_STEP,
            BAD_STEP + 5,
        ):  # what comes after a rolled back step is another run's but for it
            result = replay_step(run, step, AUTO, ignore_message)
            (line,) = [line for line in logged_lines(run, "step") if line["step"] == step]
            assert (result.loss, result.grad_norm) == (line["loss"], line["grad_norm"])
            assert result.resumed_from == 60
            same, rows, layers = result.findings
            assert same.verdict == "ok"
            assert rows.verdict == ("bad" if step == BAD_STEP else "ok")
            assert layers.signal == "gradients"
            if step == BAD_STEP:
                assert result.rows[0].index == BAD_ROW
                assert result.rows[0].loss > 2 * result.rows[1].loss
                assert f"{BAD_ROW} (" in rows.evidence
        assert contents(run) == before
        result = replay_step(run, BAD_STEP, AUTO, ignore_message)
    assert f"{BAD_ROW}  " in format_replay(result)
    assert "to the bit" in format_replay(result)
    assert page.write(tmp_path / "page", "replay", "Step 80", "", build_sections(result)).is_file()


def test_the_gradient_of_a_replayed_batch_is_that_of_the_step(tmp_path: Path) -> None:
    """Without dropout the layers' norms add up to the logged one."""
    run = train(tmp_path, "numpy", dropout=0.0)
    result = replay_step(run, 33, AUTO, ignore_message)
    total = sum(norm**2 for norm, _ in result.layers.values()) ** 0.5
    assert total == pytest.approx(result.grad_norm, rel=1e-5)
    assert list(result.layers) == ["embedding", "blocks.0", "blocks.1", "norm"]


def test_parts_of_a_batch_count_by_their_targets(tmp_path: Path) -> None:
    """As in a run of conversations, whose rows have different numbers of answer tokens."""
    tokens = np.random.default_rng(2).integers(20, size=(4, 33))
    targets = np.where(np.arange(32) < [[1], [30], [3], [9]], tokens[:, 1:], NO_TARGET)
    batch = Batch(tokens[:, :-1], targets, 0, np.arange(4))
    norms = []
    for rows in (4, 1):
        config = small_config(tmp_path, micro_batch_size=rows, batch_size=4)
        engine = make_engine(config, 20, ComputeConfig(engine="numpy", threads=1), training=True)
        engine.load(initial_weights(parameter_table(config.model, 20), 3))
        run: Any = SimpleNamespace(config=config, tokenizer=SimpleNamespace(vocab_size=20))
        norms.append(_layer_gradient_norms(engine, batch, run))
    assert norms[1] == pytest.approx(norms[0], rel=1e-4)


def test_another_engine_comes_close_and_says_so(tmp_path: Path) -> None:
    run = train(tmp_path, "numpy")
    pytest.importorskip("torch")
    result = replay_step(run, 33, ComputeConfig(engine="torch", threads=1), ignore_message)
    (line,) = [line for line in logged_lines(run, "step") if line["step"] == 33]
    assert result.loss == pytest.approx(line["loss"], rel=1e-3)
    same = result.findings[0]
    assert same.verdict == ("ok" if result.loss == line["loss"] else "watch")
    assert ("another machine, engine" in same.meaning) == (result.loss != line["loss"])


def test_a_step_that_the_run_has_not_made_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupt_at(40, monkeypatch)
    run = train(tmp_path, "numpy")
    monkeypatch.undo()
    for step in (0, -3, 41, 90, 91):
        with pytest.raises(InputError, match="steps 1 to 40"):
            replay_step(run, step, AUTO, ignore_message)
    assert replay_step(run, 40, AUTO, ignore_message).findings[0].verdict == "ok"


@pytest.mark.parametrize("action", ["log", "rollback"])
def test_a_run_under_way_may_remove_the_checkpoint_that_is_replayed(
    action: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only the files of a rollback are copied, and an error names a missing one.

    The arrays of the checkpoint were read before.
    """
    run = train(tmp_path, "numpy", on_spike=action, keep=100)
    copied: set[str] = set()
    copy = shutil.copy

    def noted(source: Path, *arguments: Any, **options: Any) -> Any:
        copied.add(Path(source).parent.name)
        return copy(source, *arguments, **options)

    monkeypatch.setattr(shutil, "copy", noted)
    assert replay_step(run, 63, AUTO, ignore_message).findings[0].verdict == "ok"
    assert copied == {run.name} | (set() if action == "log" else {"000060"})
    monkeypatch.setattr(
        checkpoint, "require_identity", lambda saved, identity: shutil.rmtree(saved.path)
    )
    if action == "log":
        assert "to the bit" in replay_step(run, 63, AUTO, ignore_message).findings[0].evidence
    else:
        with pytest.raises(DamagedError, match="000060, to which a spike would go back"):
            replay_step(run, 63, AUTO, ignore_message)


@pytest.mark.parametrize(
    ("loss", "logged", "same"),
    [
        (2.5, 2.5, True),
        (2.5, 2.6, False),
        (2.5, None, False),
        (np.nan, None, True),
        (np.inf, None, True),
    ],
)
def test_only_the_logged_loss_is_the_very_step(
    loss: float, logged: float | None, same: bool
) -> None:
    """What was not finite is logged as none."""
    finding = _judge_replayed_loss(loss, {"loss": logged})
    assert (finding.verdict, "to the bit" in finding.evidence) == ("ok" if same else "watch", same)
