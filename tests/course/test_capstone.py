"""A capstone.

One folder with all that is to be handed in, made within its budget, gone on with where it stopped.
"""

from __future__ import annotations

import json
import math
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from glasslm import cli
from glasslm.config.schema import ComputeConfig, ModelConfig, RunConfig
from glasslm.course.capstone import build, hand_in, handout, study_sizes, time_plan
from glasslm.course.capstone.build import CapstoneRecord
from glasslm.course.capstone.study_sizes import StudySize
from glasslm.errors import DamagedError, InputError
from glasslm.lab.studies import (
    ablation,
    ablation_budget,
    ladder,
    ladder_budget,
    scaling_study,
    study_plan,
)
from glasslm.lab.studies.ladder import LadderShape
from glasslm.lab.studies.sweep import Runner
from glasslm.runs.run_folder import Run
from html_pages import Page
from small_runs import ignore_message, without_report, write_text

WORDS = "--d-model 16 --n-heads 2 --n-layers 1 --block-size 16 --batch-size 4".split()  # noqa: SIM905 - as typed


def run_small_study(
    base: RunConfig, budget: str, *others: Any, of: Any = scaling_study.run_study, **named: Any
) -> Any:
    """A scaling study of so much compute, instead of so much time."""
    assert budget.endswith("s")
    return of(base, "1e9", *others, **named)


@pytest.fixture
def quick(trials_in_this_process: None) -> Iterator[None]:
    """Studies of few and short runs, so that a capstone of seconds has time for them."""
    with pytest.MonkeyPatch.context() as patch, without_report():
        patch.setattr("glasslm.cli.capstone.MIN_BUDGET_S", 1.0)
        patch.setattr(ablation_budget, "run_start_seconds", lambda: 0.05)
        patch.setattr(study_plan, "run_start_seconds", lambda: 0.05)
        patch.setattr(study_sizes, "SEEDS", 2)
        patch.setattr(study_sizes, "BASELINES", ((3, 24, 2),))
        patch.setattr(study_sizes, "LEVELS", (("depth=1", "activation=gelu"),))
        patch.setattr(build, "LADDER_SHAPES", (LadderShape(3, 4),))
        patch.setattr(study_sizes, "LADDER_SHAPES", (LadderShape(3, 4),))
        patch.setattr(ladder, "TARGET_MIN_STEPS", 5)
        patch.setattr(ladder_budget, "MIN_STEPS", 5)
        patch.setattr(scaling_study, "run_study", run_small_study)
        # Seconds are too few for the times that real studies need.
        patch.setattr(build, "plan_times", lambda *arguments: None)
        yield


@pytest.mark.slow
def test_everything_is_in_one_folder_and_made_once(
    quick: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text, out = write_text(tmp_path / "text.txt"), tmp_path / "capstone"
    words = ["capstone", "--text-file", str(text), "--budget", "45s", "--out", str(out), *WORDS]
    assert cli.main(words) == 0
    page = out / "index.html"
    assert f"hand in: {page}" in capsys.readouterr().out
    for name in (
        "run/run.json", "run/metrics.jsonl", "run/checkpoints", "ablation/ablation_table.csv",
        "ablation/ablation_bars.png", "ablation/report.html", "scaling/fit.json",
        "scaling/prediction.json",
        "scaling/scaling_curve.png", "scaling/isoflop.png", "scaling/report.html", "index.md",
        "figures/training.png",
    ):  # fmt: skip
        assert (out / name).exists(), name
    shown = Page(page.read_text(encoding="utf-8"))
    titles = (
        "1. The checkpoint",
        "2. Training curves",
        "3. The effect of each choice",
        "4. How loss depends",
    )
    for title in (*titles, "5.1 ", "5.8 ", "The KV cache", "Chinchilla", "The baseline "):
        assert title in shown.text, title
    links = [attributes["href"] for tag, attributes in shown.tags if tag == "a"]
    assert len(links) > 20
    for (
        link
    ) in links:  # each number's file is there; the report of a run is left out of these tests
        assert (out / link).exists() or link == "run/report.html", link
    best = Run(out / "run").history.best_val_loss
    assert f"{best:.4f}" in shown.text
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*.safetensors")}
    assert cli.main(words) == 0
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*.safetensors")} == before
    assert cli.main([*words, "--lr", "0.5"]) == 2
    assert "other settings" in capsys.readouterr().err


def test_questions_come_first_and_answers_are_set_beside(
    quick: None, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    text, out = write_text(tmp_path / "text.txt"), tmp_path / "capstone"
    given = iter(["it compares queries with keys", "8"])

    def read() -> str:
        assert not (out / "run").exists()
        try:
            return next(given)
        except StopIteration:
            raise EOFError from None

    def stop(*arguments: object) -> None:
        raise InputError("far enough")

    monkeypatch.setattr("builtins.input", read)
    monkeypatch.setattr(build, "train_model", stop)
    words = [
        "capstone",
        "--text-file",
        str(text),
        "--budget",
        "8s",
        "--quiz",
        "--out",
        str(out),
        *WORDS,
    ]
    assert cli.main(words) == 2
    kept = json.loads((out / "quiz.json").read_text(encoding="utf-8"))["answers"]
    assert [answer["given"] for answer in kept.values()][:2] == [
        "it compares queries with keys",
        "8",
    ]


# -- time ------------------------------------------------------------------------------------------


def test_parts_that_take_their_share_end_in_time_and_a_long_one_costs_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 1000.0
    monkeypatch.setattr("glasslm.course.capstone.build.time.monotonic", lambda: now)
    for late in (1.0, 1.3):
        record, began = CapstoneRecord(tmp_path / str(late), ["flags"], 1800.0), now
        for part in build.TIME_SHARES:
            with record.count_time():
                now += late * record.allot_seconds(part)
        assert 1500 < now - began <= (1800 if late == 1 else 2100)
    now += 5000  # another day, in another process, which knows what was spent and what was decided
    again = CapstoneRecord(tmp_path / "1.0", ["flags"], 1800.0)
    assert again.allot_seconds("ablation") == CapstoneRecord(
        tmp_path / "1.0", ["flags"], 1800.0
    ).allot_seconds("ablation")
    assert again.spent_s == pytest.approx(1800 * (1 - 0.68 * 0.55 * 0.1), rel=0.05)
    interrupted = CapstoneRecord(tmp_path / "interrupted", ["flags"], 1800.0)
    now += 700
    with pytest.raises(KeyboardInterrupt), interrupted.count_time():
        raise KeyboardInterrupt
    assert CapstoneRecord(tmp_path / "interrupted", ["flags"], 1800.0).allot_seconds(
        "run"
    ) == pytest.approx(1100 * 0.32)


def test_what_could_not_be_made_is_told_and_the_rest_handed_in(
    quick: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*arguments: object) -> None:
        raise InputError("no time for it")

    monkeypatch.setattr(scaling_study, "run_study", never)
    monkeypatch.setattr(ablation, "plan", never)
    text, out = write_text(tmp_path / "text.txt"), tmp_path / "capstone"
    assert (
        cli.main(
            ["capstone", "--text-file", str(text), "--budget", "6s", "--out", str(out), *WORDS]
        )
        == 1
    )
    shown = Page((out / "index.html").read_text(encoding="utf-8"))
    assert shown.text.count("no time for it") == 4
    assert "5.8 " in shown.text


def test_a_record_of_other_flags_or_of_nobody_is_refused(tmp_path: Path) -> None:
    CapstoneRecord(tmp_path, ["flags"], 10.0).save()
    with pytest.raises(InputError, match="other settings"):
        CapstoneRecord(tmp_path, ["others"], 10.0)
    (tmp_path / "capstone.json").write_text("[]", encoding="utf-8")
    with pytest.raises(DamagedError, match="restore it"):
        CapstoneRecord(tmp_path, ["flags"], 10.0)


def test_budgets_and_what_goes_with_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from glasslm.cli.capstone import parse

    assert [parse(["--budget", budget]).preset for budget in ("30m", "3h", "overnight")] == [
        "tiny",
        "small",
        "medium",
    ]
    assert parse(["--budget", "overnight", "--preset", "tiny"]).preset == "tiny"
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.json").write_text("{}", encoding="utf-8")
    for words, says in (
        (["--budget", "10s"], "at least 5m"),
        (["--budget", "soon"], "is not a duration"),
        (["--epochs", "2"], "--budget is the time of a capstone"),
        (["--out", str(tmp_path / "run")], "holds a run"),
    ):
        assert cli.main(["capstone", *words]) == 2
        assert says in capsys.readouterr().err


def test_the_study_of_courses_is_taken_where_there_is_time_and_smaller_ones_where_there_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from glasslm.model.flops import flops_per_token
    from glasslm.training.step_timer import StepTimer
    from small_runs import small_config

    def pace(config: RunConfig, compute: ComputeConfig, dataset: Any) -> StepTimer:
        tokens = config.train.batch_size * config.model.block_size
        return StepTimer(
            tokens * flops_per_token(config.model, dataset.tokenizer.vocab_size) / 30e9,
            0.0,
            0.0,
            0.0,
        )

    monkeypatch.setattr(study_sizes, "measure_speed", pace)
    monkeypatch.setattr(ablation_budget, "run_start_seconds", lambda: 1.0)
    recipe = small_config(write_text(tmp_path / "text.txt"), block_size=256)
    runner = Runner(ComputeConfig(engine="numpy"), workers=2)
    designs = [
        study_sizes.choose_design(recipe, hours * 3600, runner, ignore_message)
        for hours in (0.001, 0.02, 0.15, 1, 100)
    ]
    assert [design.level for design in designs] == [2, 1, 0, 0, 0]
    shapes = [design.shape for design in designs]
    assert shapes[0] == shapes[1] == study_sizes.BASELINES[-1]
    assert shapes[2] != shapes[3] != shapes[4] == (6, 384, 6)
    axes = designs[-1].axes
    assert axes[:2] == ["depth=2/4/6/8/12", "width=64/128/256/384/512"]  # as the course has them
    assert len(ablation.variants(axes, designs[-1].baseline(recipe).resolve())) >= 15
    runs = [
        len(study_sizes.AblationDesign((3, 48, 6), level).configs(recipe)) for level in range(3)
    ]
    assert runs == sorted(runs, reverse=True)
    assert runs[-1] >= 3
    assert build.ablation_spec([3, 48, 6], 60.0)[0].level == 0  # as capstones of 0.1 stored it


def test_the_page_says_why_the_ablation_is_of_another_model() -> None:
    model = ModelConfig(d_model=128, n_layers=4, n_heads=4, dropout=0.1)
    baseline = ModelConfig(d_model=96, n_layers=6, n_heads=6)
    text = handout.explain_baseline(baseline, model, 17)
    assert "n_layers 6 instead of 4" in text
    assert "d_model 96 instead of 128" in text
    assert "dropout 0 instead of 0.1" in text
    assert "54 runs" in text
    assert f"{study_sizes.MIN_STEPS} steps" in text
    assert "the same architecture" in handout.explain_baseline(model, model, 17)


# -- the plan of the time, a larger budget, one part again, and the zip ----------------------------


MINUTES = [
    # the budget and the smallest ablation and scaling study; then the parts that have time
    (5, 4, 14, {"run", "ablation"}),
    (5, 10, 14, {"run"}),
    (12, 4, 5, {"run", "ablation", "scaling"}),
    (12, 1, 10.2, {"run", "ablation", "scaling"}),
    (12, 4, 9, {"run", "ablation"}),
    (180, 4, 9, {"run", "ablation", "scaling"}),
    (30, 4, math.inf, {"run", "ablation"}),
]


@pytest.mark.parametrize(("budget", "ablation_min", "scaling_min", "made"), MINUTES)
def test_each_part_gets_at_least_its_smallest_time_or_none(
    budget: float, ablation_min: float, scaling_min: float, made: set[str]
) -> None:
    smallest = {"run": 0.5, "ablation": ablation_min, "scaling": scaling_min}
    if made >= {"scaling"} and scaling_min > 10:
        smallest["run"] = 0.2
    sizes = {part: [StudySize(seconds)] for part, seconds in smallest.items()}
    times, _ = time_plan.divide_time(budget, sizes)
    assert {part for part, time in times.items() if time} == made
    assert sum(times.values()) <= 0.97 * budget
    assert all(times[part] >= smallest[part] - 0.05 for part in made)
    if len(made) < 3 and math.isfinite(scaling_min):  # with the budget that is named, all fit
        needed = time_plan.required_budget(smallest)
        assert all(time_plan.divide_time(1.001 * needed, sizes)[0].values())


def test_parts_shrink_before_one_is_left_out() -> None:
    """The part that needs most shrinks first; each part gets the time of the size that it has."""
    sizes = {
        "run": [StudySize(30.0)],
        "ablation": [StudySize(170.0, "all"), StudySize(100.0, "fewer"), StudySize(20.0, "least")],
        "scaling": [StudySize(math.inf), StudySize(240.0, "4 x 5"), StudySize(60.0, "3 x 4")],
    }
    expected = [
        (1000, {"ablation": "all", "scaling": "4 x 5"}),
        (400, {"ablation": "all", "scaling": "3 x 4"}),
        (300, {"ablation": "all", "scaling": "3 x 4"}),
        (200, {"ablation": "fewer", "scaling": "3 x 4"}),
        (120, {"ablation": "least", "scaling": "3 x 4"}),
        (90, {"ablation": "least"}),
        (40, {}),
    ]
    for left_s, names in expected:
        times, chosen = time_plan.divide_time(left_s, sizes)
        assert {part: size.description for part, size in chosen.items() if part != "run"} == names
        assert {part for part, seconds in times.items() if seconds} == {"run", *names}
        assert sum(times.values()) <= left_s
        assert all(times[part] >= chosen[part].seconds - 0.05 for part in names)
        described = time_plan.describe_times(times, chosen)
        assert all(f"({name} or more)" in described for name in names.values())


def test_what_fits_is_told_before_training_and_a_larger_budget_makes_the_rest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    smallest = {"run": 30.0, "ablation": 200.0, "scaling": 900.0}
    sizes = {part: [StudySize(seconds)] for part, seconds in smallest.items()}
    monkeypatch.setattr(build, "list_sizes", lambda *arguments: sizes)
    messages: list[str] = []
    recipe, compute = RunConfig(), ComputeConfig()
    record = build.open_record(tmp_path, recipe, "tiny", 720.0)
    build.plan_times(record, recipe, compute, messages.append)
    assert "the model" in messages[1]
    assert "the ablation" in messages[1]
    assert messages[2].startswith("warning: a budget of 12m 00s has no time for the scaling study")
    assert "--budget 20m" in messages[2]
    assert record.allot_seconds("scaling") == 0
    with pytest.raises(InputError, match="no time for the scaling study"):
        build._require_time(record, "scaling", 0)
    run_s, ablation_s = record.allot_seconds("run"), record.allot_seconds("ablation")
    assert run_s >= 30
    assert ablation_s >= 200
    for part, name in (("run", "run.json"), ("ablation", "plan.json")):  # both are made
        (tmp_path / part).mkdir()
        (tmp_path / part / name).write_text("{}", encoding="utf-8")
    with pytest.raises(InputError, match="raised, not lowered"):
        build.open_record(tmp_path, recipe, "tiny", 600.0)
    raised = build.open_record(tmp_path, recipe, "tiny", 1800.0)
    build.plan_times(raised, recipe, compute, messages.append)
    assert raised.allot_seconds("run") == run_s  # what is made stays
    assert raised.allot_seconds("ablation") == ablation_s
    assert raised.allot_seconds("scaling") > 900
    again = build.open_record(tmp_path, recipe, "tiny", 1800.0)
    assert again.allot_seconds("scaling") == raised.allot_seconds("scaling")


def test_one_part_is_deleted_and_made_again_in_its_time(tmp_path: Path) -> None:
    record = CapstoneRecord(tmp_path, ["flags"], 1000.0)
    time_s = record.allot_seconds("ablation")
    for part in ("run", "ablation"):
        (tmp_path / part).mkdir()
        (tmp_path / part / "plan.json").write_text("{}", encoding="utf-8")
    record.redo("ablation")
    assert not (tmp_path / "ablation").exists()
    assert (tmp_path / "run").exists()
    assert record.allot_seconds("ablation") == time_s


def test_the_preset_of_a_folder_stays_with_a_larger_budget(tmp_path: Path) -> None:
    from glasslm.cli.capstone import parse

    build.open_record(tmp_path, RunConfig(), "tiny", 1800.0).save()
    assert parse(["--budget", "3h", "--out", str(tmp_path)]).preset == "tiny"
    assert parse(["--budget", "3h", "--out", str(tmp_path / "other")]).preset == "small"


def test_the_zip_has_the_hand_in_and_no_path_of_the_machine(tmp_path: Path) -> None:
    folder, text = tmp_path / "my capstone", tmp_path / "texts" / "a book.txt"
    record = {
        "config": {"data": {"text_file": [str(text)]}},
        "command": f"glasslm capstone --text-file '{text}' --out={tmp_path / 'other'}",
        "data": {"files": [{"path": str(text)}, {"path": "C:\\texts\\book.txt"}]},
    }
    contents = {
        "run/run.json": json.dumps(record),
        "index.html": f"<p>{text} in {folder}/run, {Path.home()} &quot;{tmp_path / 'other'}&quot;",
        "run/report.md": f"see {folder.resolve()}/run/report.html, C:\\texts\\book.txt",
        "ablation/report.html": "fine",
        "ablation/runs/one/run.json": str(text),
        "ablation/logs/one.log": str(text),
        "figures/training.png": "not text",
        "run/.run.lock": "1",
    }
    for name, content in contents.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(content, encoding="utf-8")
    path = hand_in.write_zip(folder)
    assert path == tmp_path / "my capstone.zip"
    with zipfile.ZipFile(path) as archive:
        assert archive.namelist() == [
            "ablation/report.html", "figures/training.png", "index.html", "run/report.md",
            "run/run.json",
        ]  # fmt: skip
        for name in archive.namelist():
            body = archive.read(name).decode()
            for machine in (str(tmp_path), str(Path.home()), "C:"):
                assert machine not in body, (name, body)
        assert "a book.txt" in archive.read("run/run.json").decode()
    assert hand_in.write_zip(folder).read_bytes() == path.read_bytes()
