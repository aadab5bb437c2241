"""The loop.

It learns, evaluates and stops when it should, and goes on from any checkpoint as if it had not
stopped.
"""

import json
import math
import shutil
import signal
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from glasslm.data.batch_sampler import make_sampler
from glasslm.data.dataset import reopen_dataset
from glasslm.engines.numpy.engine import NumpyEngine
from glasslm.engines.protocol import Update
from glasslm.errors import InputError
from glasslm.inference.evaluation import Score
from glasslm.lab.verification import reproduction
from glasslm.runs import checkpoint, metrics, run_folder
from glasslm.training import display, guard, launch
from glasslm.training.evaluation_windows import evaluation_windows
from glasslm.training.learning_rate import lr_at
from glasslm.training.loop import Loop, is_due
from small_runs import (
    COMPUTE,
    comparable_results,
    ignore_message,
    interrupt_at,
    logged_lines,
    read_json,
    resume,
    small_config,
    train,
    without_report,
    write_text,
)

SAMPLED: dict[str, Any] = {
    "block_size": 4,
    "val_fraction": 0.5,
}  # validation on the way takes 32 windows of many


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text(tmp_path_factory.mktemp("text") / "text.txt")


def test_it_learns_more_than_how_often_each_character_occurs(text: Path, tmp_path: Path) -> None:
    run = train(
        text,
        tmp_path / "run",
        max_steps=100,
        eval_interval=50,
        sample_interval=50,
        checkpoint_interval=100,
    )
    characters = Counter(text.read_text(encoding="utf-8"))
    total = characters.total()
    entropy = -sum(n / total * math.log(n / total) for n in characters.values())
    evals = logged_lines(run.run_dir, "eval")
    assert evals[0]["loss"] == pytest.approx(
        math.log(len(characters)), abs=0.15
    )  # knows nothing yet
    assert run.best is not None
    assert run.best["loss"] < 0.4 * entropy
    assert evals[-1]["loss"] == run.best["loss"]
    samples = [line["text"] for line in logged_lines(run.run_dir, "sample")]
    known_words = set(text.read_text(encoding="utf-8").split())
    shares = [
        float(np.mean([word in known_words for word in sample.split()])) for sample in samples
    ]
    assert shares[-1] > shares[0] + 0.15


# -- what is written when --------------------------------------------------------------------------


def test_evaluations_steps_samples_and_checkpoints_come_at_their_intervals(
    text: Path, tmp_path: Path
) -> None:
    run = train(
        text,
        tmp_path / "run",
        max_steps=13,
        eval_interval=4,
        log_interval=3,
        sample_interval=5,
        checkpoint_interval=6,
    ).run_dir
    assert [line["step"] for line in logged_lines(run, "eval")] == [0, 4, 8, 12, 13]
    assert [line["step"] for line in logged_lines(run, "step")] == [3, 6, 9, 12, 13]
    assert [line["step"] for line in logged_lines(run, "sample")] == [0, 5, 10, 13]
    best = {line["step"] for line in logged_lines(run, "eval") if line["best"]}
    steps = [line["step"] for line in logged_lines(run, "checkpoint")]
    assert steps == sorted({0, 6, 12, 13} | best)
    assert sorted(int(path.name) for path in (run / "checkpoints").iterdir()) == steps


def test_the_logged_rate_is_that_of_the_update(text: Path, tmp_path: Path) -> None:
    """Warmup from the first update on: (i + 1) / W; the last has min_lr."""
    config = small_config(text, max_steps=12, warmup_steps=4, lr=0.01, min_lr=0.001)
    run = launch.train(config, COMPUTE, tmp_path / "run", notify=ignore_message).run_dir
    lines = logged_lines(run, "step")
    assert [line["lr"] for line in lines[:4]] == pytest.approx([0.0025, 0.005, 0.0075, 0.01])
    assert [line["lr"] for line in lines] == [
        lr_at(step, config.optimizer, 12) for step in range(12)
    ]
    assert lines[-1]["lr"] == 0.001
    assert [line["tokens"] for line in lines] == [256 * (i + 1) for i in range(12)]


@pytest.mark.parametrize("schedule", ["constant", "wsd"])
def test_other_schedules_reach_the_engine(schedule: str, text: Path, tmp_path: Path) -> None:
    lines = logged_lines(train(text, tmp_path / "run", schedule=schedule).run_dir, "step")
    rates = [line["lr"] for line in lines]
    assert len(set(rates[4:14])) == 1
    assert (rates[-1] == 0) == (schedule == "wsd")


def test_the_loss_on_the_line_is_that_of_the_batch(text: Path, tmp_path: Path) -> None:
    """Computed here from the batch of step 0 and the initial weights."""
    run = train(text, tmp_path / "run", max_steps=1).run_dir
    config = run_folder.Run(run).config
    dataset = reopen_dataset(config.data, run_folder.Run(run).record["data"]["sha256"])
    assert dataset is not None
    engine = NumpyEngine(config, dataset.tokenizer.vocab_size, threads=1)
    engine.load(checkpoint.load(run, 0).weights().items())
    batch = make_sampler(config, dataset).batch(dataset.train.tokens, 0, np.arange(8))
    (line,) = logged_lines(run, "step")
    assert line["loss"] == pytest.approx(float(engine.losses(*batch).mean()), rel=1e-5)
    assert line["clipped"] == (line["grad_norm"] > config.optimizer.grad_clip)


def test_validation_takes_the_whole_split_or_a_labelled_sample(text: Path) -> None:
    config = small_config(text, max_steps=1000, batch_size=8)
    assert evaluation_windows(config, val_tokens=480 * 32) is None  # 2% of 1000 x 8 x 3 windows
    assert evaluation_windows(config, val_tokens=482 * 32) == 480
    assert evaluation_windows(small_config(text, max_steps=1), val_tokens=32 * 32 + 1) is None
    assert evaluation_windows(small_config(text, max_steps=1), val_tokens=10**6) == 32


def test_last_and_best_are_measured_on_the_whole_split(text: Path, tmp_path: Path) -> None:
    """Where evaluations on the way took a sample of the validation part."""
    run = train(text, tmp_path / "run", max_steps=10, **SAMPLED).run_dir
    lines = logged_lines(run, "eval")
    on_the_way, whole = lines[:3], lines[3:]
    assert [line["whole"] for line in on_the_way] == [False] * 3
    assert {line["tokens"] for line in on_the_way} == {32 * 4}
    assert all(line["whole"] for line in whole)
    assert whole[-1]["best"]
    assert whole[-1]["tokens"] == run_folder.Run(run).record["data"]["val_tokens"] - 1
    (end,) = logged_lines(run, "end")
    assert (end["best_step"], end["best_loss"]) == (whole[-1]["step"], whole[-1]["loss"])
    assert run_folder.Run(run).history.best_val_loss == whole[-1]["loss"]


def test_a_sampled_final_measurement_is_said_to_be_one_and_is_made_again(
    text: Path, tmp_path: Path
) -> None:
    """A repetition of the run takes the same windows."""
    config = small_config(text, **SAMPLED | {"max_steps": 10})
    with without_report():
        run = launch.train(
            config, COMPUTE, tmp_path / "run", final_windows=40, notify=ignore_message
        )
        repetition = reproduction.reproduce(
            run_folder.Run(run.run_dir), tmp_path / "again", None, "", ignore_message
        )
    assert repetition.is_identical
    assert read_json(run.run_dir / "run.json")["final_windows"] == 40
    finals = [line for line in logged_lines(run.run_dir, "eval") if line["tokens"] == 40 * 4]
    assert {line["step"] for line in finals} == {10}
    assert not any(line["whole"] for line in finals)
    best = min(finals, key=lambda line: line["loss"])
    assert run.best == best == finals[-1]
    summary = display.summary_text(run.run_dir, run.status, run.best)
    assert f"on 160 tokens (sampled, standard error {best['stderr']:.4f})" in summary
    few = launch.train(
        config, COMPUTE, tmp_path / "few", final_windows=32, notify=ignore_message
    )  # the windows of every evaluation: none is repeated
    assert [line["tokens"] for line in logged_lines(few.run_dir, "eval")] == [32 * 4] * 3


def patch_scores(
    sampled: dict[int, float], whole: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Losses of the evaluations by step, and those of the whole split in their order."""
    scores_left = iter(whole)

    def score(self: Loop, tokens: Any, max_windows: int | None, *require_time: Any) -> Score:
        is_whole = max_windows != self.max_windows
        loss = next(scores_left) if is_whole else sampled[self.step]
        return Score(loss, math.exp(loss), loss, 100, 100, is_whole)

    monkeypatch.setattr(Loop, "score", score)


@pytest.mark.parametrize(
    ("whole", "best"),
    [([1.2, 1.4], (10, 1.2)), ([1.4, 1.2], (5, 1.2)), ([math.nan, 9.0], (5, 9.0))],
)
def test_the_best_is_the_better_one_on_the_whole_split(
    whole: list[float], best: tuple[int, float], text: Path, tmp_path: Path
) -> None:
    """Of the last weights and those that were best on the sample; every file says the same."""
    plain = train(text, tmp_path / "plain", max_steps=10, sample_interval=0, **SAMPLED).run_dir
    with pytest.MonkeyPatch.context() as patch:
        patch_scores({0: 3.0, 5: 1.0, 10: 1.5}, whole, patch)
        run = train(text, tmp_path / "run", max_steps=10, sample_interval=0, **SAMPLED)
    (end,) = logged_lines(run.run_dir, "end")
    assert (end["best_step"], end["best_loss"]) == best
    assert run.best is not None
    assert (run.best["step"], run.best["loss"], run.best["best"]) == (*best, True)
    assert [line["step"] for line in logged_lines(run.run_dir, "eval")[3:] if line["best"]] == [
        best[0]
    ]
    last = checkpoint.load(run.run_dir, "latest")
    assert last.position.best == best
    assert checkpoint.load(run.run_dir, "best").step == best[0]
    assert (last.step, last.position.updates) == (10, 10)
    assert (
        comparable_results(run.run_dir, 10)[0] == comparable_results(plain, 10)[0]
    )  # whatever was measured, weights and moments stay


def test_a_damaged_best_checkpoint_is_told_and_the_last_one_counts(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    patch_scores({0: 3.0, 5: 1.0, 10: 1.5}, [2.0], monkeypatch)
    original = Loop.sample

    def sample(self: Loop) -> None:
        if self.step == 10:
            (self.run_dir / "checkpoints" / "000005" / "model.safetensors").unlink()
        original(self)

    monkeypatch.setattr(Loop, "sample", sample)
    run = train(text, tmp_path / "run", max_steps=10, **SAMPLED).run_dir
    (warning,) = logged_lines(run, "warning")
    assert warning["code"] == "damaged"
    assert "000005" in warning["message"]
    assert logged_lines(run, "end")[0]["best_step"] == 10


def test_the_last_checkpoint_knows_the_last_evaluation(text: Path, tmp_path: Path) -> None:
    """Also where a checkpoint was due and an evaluation was not."""
    run = train(
        text, tmp_path / "run", max_steps=12, eval_interval=5, checkpoint_interval=4
    ).run_dir
    (end,) = logged_lines(run, "end")
    assert end["best_step"] == 12
    assert checkpoint.load(run, "best").position.best == (12, end["best_loss"])


def test_an_evaluation_that_was_whole_is_not_repeated(text: Path, tmp_path: Path) -> None:
    lines = logged_lines(train(text, tmp_path / "run", max_steps=5).run_dir, "eval")
    assert [line["step"] for line in lines] == [0, 5]
    assert all(line["whole"] for line in lines)


def test_due() -> None:
    assert [step for step in range(1, 10) if is_due(step, 3)] == [3, 6, 9]
    assert not is_due(5, 0)


# -- when it ends ----------------------------------------------------------------------------------


def test_stop_at_loss_stops_at_the_first_evaluation_that_reaches_it(
    text: Path, tmp_path: Path
) -> None:
    run = train(text, tmp_path / "run", max_steps=500, stop_at_loss=2.5)
    assert run.status == "stopped"
    losses = [line["loss"] for line in logged_lines(run.run_dir, "eval")]
    assert losses[-1] <= 2.5 < losses[-2]
    assert logged_lines(run.run_dir, "end")[0]["step"] < 30
    with pytest.raises(InputError, match="nothing left to do"):
        resume(run.run_dir)


def test_patience_counts_evaluations_without_a_better_loss(text: Path, tmp_path: Path) -> None:
    """With a rate at which nothing gets better after a while."""
    run = train(
        text,
        tmp_path / "run",
        max_steps=500,
        patience=2,
        eval_interval=2,
        lr=0.5,
        schedule="constant",
    )
    assert run.status == "stopped"
    best = [line["best"] for line in logged_lines(run.run_dir, "eval")]
    assert best[-3:] == [True, False, False]
    assert "".join("x" if is_best else "." for is_best in best).count("..") == 1


def test_epochs_are_turned_into_steps_that_visit_every_window(text: Path, tmp_path: Path) -> None:
    run = train(text, tmp_path / "run", epochs=1.5, max_steps=1)
    record = run_folder.Run(run.run_dir).record
    windows = (record["data"]["train_tokens"] - 1) // 32
    assert record["config"]["train"]["max_steps"] == math.ceil(1.5 * windows / 8)
    assert record["config"]["train"]["epochs"] == 1.5
    assert logged_lines(run.run_dir, "plan") == [
        {"kind": "plan", "step": 0, "max_steps": math.ceil(1.5 * windows / 8)}
    ]
    last = logged_lines(run.run_dir, "step")[-1]
    assert 1.5 <= last["epoch"] < 1.5 + 8 / windows
    assert run.status == "finished"


# -- interruption and resume -----------------------------------------------------------------------

VARIANTS: dict[str, dict[str, Any]] = {
    "muon, dropout": {"dropout": 0.2, "attention_dropout": 0.1},
    "adamw, epochs": {"optimizer": "adamw", "epochs": 1.4, "dropout": 0.1, "micro_batch_size": 3},
    "sgd, one micro-batch": {"optimizer": "sgd", "micro_batch_size": 8, "schedule": "wsd"},
    "sampled validation, rare logging": {
        "block_size": 4,
        "val_fraction": 0.5,
        "log_interval": 7,
        "eval_interval": 3,
    },
    "everything at odd steps": {
        "eval_interval": 7,
        "sample_interval": 3,
        "checkpoint_interval": 4,
        "keep": 1,
    },
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_an_interrupted_run_ends_like_an_uninterrupted_one(
    variant: str, text: Path, tmp_path: Path
) -> None:
    """Bit for bit, though it was interrupted twice."""
    whole = train(text, tmp_path / "whole", **VARIANTS[variant])
    steps = logged_lines(whole.run_dir, "end")[0]["step"]
    with pytest.MonkeyPatch.context() as patch:
        interrupt_at(8, patch)
        first = train(text, tmp_path / "cut", **VARIANTS[variant])
    assert (first.status, first.signal) == ("interrupted", signal.SIGINT)
    assert (tmp_path / "cut" / "checkpoints" / "000008").is_dir()
    with pytest.MonkeyPatch.context() as patch:
        interrupt_at(15, patch, signal.SIGTERM)
        second = resume(tmp_path / "cut")
    assert (second.status, second.signal) == ("interrupted", signal.SIGTERM)
    last = resume(tmp_path / "cut")
    assert last.status == "finished"
    assert last.sample == whole.sample
    assert last.best is not None
    assert whole.best is not None
    assert last.best["loss"] == whole.best["loss"]
    assert comparable_results(tmp_path / "cut", steps) == comparable_results(whole.run_dir, steps)
    assert [line["from"] for line in logged_lines(tmp_path / "cut", "resume")] == [
        "checkpoints/000008",
        "checkpoints/000015",
    ]


LAST_NOT_BEST = SAMPLED | {"lr": 1.0, "schedule": "constant"}  # the last weights are not the best


@pytest.mark.parametrize(
    ("moment", "flags", "complete"),
    [
        ("evaluate", SAMPLED, False),
        ("sample", SAMPLED, False),
        ("save", SAMPLED, False),
        (
            "score",
            LAST_NOT_BEST,
            False,
        ),  # while the last weights are measured: the best ones are not
        ("score", SAMPLED, False),  # the last are the best
        ("sample", {}, False),
        ("save", {}, True),  # nothing follows
    ],
)
def test_a_signal_after_the_last_step_leaves_a_whole_checkpoint(
    moment: str,
    flags: dict[str, Any],
    complete: bool,
    text: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What is missing then is measured by a resumed run; where nothing is, the run is finished."""
    monkeypatch.setattr(guard, "DIVERGENCE_RISE", math.inf)  # however bad the last weights are
    flags = flags | {"eval_interval": 7}
    whole = train(text, tmp_path / "whole", **flags)
    original = getattr(Loop, moment)
    with pytest.MonkeyPatch.context() as patch:

        def call_with_signal(self: Loop, *arguments: Any, **more: Any) -> Any:
            is_moment = self.step == 20 and (moment != "score" or arguments[1] != self.max_windows)
            if is_moment and not self.interrupt.is_set():
                signal.raise_signal(signal.SIGTERM)
            return original(self, *arguments, **more)

        patch.setattr(Loop, moment, call_with_signal)
        cut = train(text, tmp_path / "cut", **flags)
    assert cut.status == ("finished" if complete else "interrupted")
    assert (tmp_path / "cut" / "checkpoints" / "000020" / "manifest.json").is_file()
    assert logged_lines(tmp_path / "cut", "end")[-1]["status"] == cut.status
    if not complete:
        assert cut.signal == signal.SIGTERM
        last = resume(tmp_path / "cut")
        assert last.status == "finished"
        assert last.best is not None
        assert whole.best is not None
        assert last.best["loss"] == whole.best["loss"]
    assert comparable_results(tmp_path / "cut", 20) == comparable_results(tmp_path / "whole", 20)


@pytest.mark.parametrize("step", [0, 7, 10, 14])
@pytest.mark.parametrize("moment", ["score", "sample"])
def test_a_signal_during_a_measurement_ends_it_and_a_resumed_run_makes_it(
    moment: str, step: int, text: Path, tmp_path: Path
) -> None:
    """It may take minutes. Each checkpoint is planned as in an uninterrupted run."""
    flags = SAMPLED | {"eval_interval": 7, "sample_interval": 5, "checkpoint_interval": 7}
    whole = train(text, tmp_path / "whole", **flags)
    original = getattr(Loop, moment)
    with pytest.MonkeyPatch.context() as patch:

        def call_with_signal(self: Loop, *arguments: Any) -> Any:
            if self.step >= step:
                signal.raise_signal(signal.SIGTERM)
            return original(self, *arguments)

        patch.setattr(Loop, moment, call_with_signal)
        cut = train(text, tmp_path / "cut", **flags)
    assert cut.status == "interrupted"
    kind = {"score": "eval", "sample": "sample"}[moment]
    assert all(line["step"] < step for line in logged_lines(cut.run_dir, kind))
    assert resume(cut.run_dir).status == "finished"
    assert comparable_results(cut.run_dir, 20) == comparable_results(whole.run_dir, 20)
    states = [read_json(r.run_dir / "checkpoints/000020/state.json")["loop"] for r in (cut, whole)]
    assert states[0] == states[1]


def cut_back(run: Path, copy: Path, step: int) -> Path:
    """The run as a kill after the checkpoint of `step` may leave it.

    Later checkpoints gone, metrics as they are.
    """
    shutil.copytree(run, copy)
    for path in (copy / "checkpoints").iterdir():
        if int(path.name) > step:
            shutil.rmtree(path)
    return copy


def test_every_checkpoint_leads_to_the_same_end(text: Path, tmp_path: Path) -> None:
    whole = train(
        text, tmp_path / "whole", dropout=0.2, checkpoint_interval=3, max_steps=16
    ).run_dir
    expected = comparable_results(whole, 16)
    steps = sorted(int(path.name) for path in (whole / "checkpoints").iterdir())
    assert {0, 3, 5, 6, 9, 12, 15} <= set(steps)
    for step in steps[:-1]:
        copy = cut_back(whole, tmp_path / f"from-{step}", step)
        assert resume(copy).status == "finished"
        assert comparable_results(copy, 16) == expected


def test_a_run_that_had_reached_its_goal_when_it_was_killed_goes_no_step_further(
    text: Path, tmp_path: Path
) -> None:
    """The checkpoint of the goal is there, the last line is not."""
    goals: dict[str, dict[str, Any]] = {
        "goal": {"stop_at_loss": 2.5},
        "patience": {"patience": 2, "eval_interval": 2, "lr": 0.5, "schedule": "constant"},
        "goal on a sample": {"stop_at_loss": 2.6, "max_steps": 50, **SAMPLED},
    }
    for name, flags in goals.items():
        whole = train(text, tmp_path / name, **{"max_steps": 500} | flags).run_dir
        (end,) = logged_lines(whole, "end")
        path = whole / "metrics.jsonl"
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
        copy = shutil.copytree(whole, tmp_path / f"{name}-copy")
        (copy / "metrics.jsonl").write_text("".join(lines[:-1]), encoding="utf-8", newline="\n")
        assert resume(copy).status == "stopped"
        assert logged_lines(copy, "end")[0]["step"] == end["step"]
        assert comparable_results(copy, end["step"]) == comparable_results(whole, end["step"])


# -- numbers that are not finite -------------------------------------------------------------------


def break_steps(steps: Callable[[int], bool], monkeypatch: pytest.MonkeyPatch) -> None:
    """The gradients of these steps (from 1) become NaN."""
    original = Loop.advance

    def advance(self: Loop) -> tuple[float, Update]:
        if not steps(self.step + 1):
            return original(self)
        accumulate = self.engine.accumulate
        self.engine.accumulate = lambda batch, weight: accumulate(batch, math.nan)  # type: ignore[method-assign]
        try:
            return original(self)
        finally:
            del self.engine.accumulate

    monkeypatch.setattr(Loop, "advance", advance)


def test_a_bad_step_is_skipped_told_and_survived(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        break_steps(lambda step: step == 7, patch)
        run = train(text, tmp_path / "run").run_dir
    (warning,) = logged_lines(run, "warning")
    assert (warning["step"], warning["code"]) == (7, "nonfinite")
    bad = next(line for line in logged_lines(run, "step") if line["step"] == 7)
    assert bad["loss"] is None
    assert bad["grad_norm"] is None
    state = json.loads((run / "checkpoints" / "000020" / "state.json").read_text(encoding="utf-8"))
    assert (state["step"], state["updates"]) == (20, 19)
    assert logged_lines(run, "eval")[-1]["loss"] < 2.5
    assert logged_lines(run, "end")[0]["status"] == "finished"


def test_several_in_a_row_end_the_run_and_the_last_checkpoint_is_whole(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    break_steps(lambda step: step > 7, monkeypatch)
    run = train(text, tmp_path / "run", max_steps=100)
    assert run.status == "diverged"
    assert len(logged_lines(run.run_dir, "warning")) == 2
    assert "--lr" in logged_lines(run.run_dir, "warning")[-1]["message"]
    assert logged_lines(run.run_dir, "end")[0]["step"] == 17
    assert all(line["loss"] is not None for line in logged_lines(run.run_dir, "eval"))
    monkeypatch.undo()
    assert resume(run.run_dir).status == "finished"  # the fault is mended, and the run may go on


def test_every_line_is_strict_json(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    break_steps(lambda step: step == 2, monkeypatch)
    run = train(text, tmp_path / "run", max_steps=3).run_dir

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines():
        json.loads(line, parse_constant=refuse)
    assert len(list(metrics.read_lines(run / "metrics.jsonl"))) >= 8
