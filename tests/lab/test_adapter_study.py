"""`glasslm finetune --study`: its runs, its report, and that it is resumed where it stopped."""

import csv
import dataclasses
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest

from chat_runs import make_byte_base, write_chat
from glasslm.cli import main
from glasslm.config.conversion import with_flags
from glasslm.config.schema import ComputeConfig, RunConfig
from glasslm.errors import InputError
from glasslm.lab.studies import adapter_study, study_plan, sweep
from glasslm.lab.studies.adapter_study import Point, pareto_front
from glasslm.model.parameters import parameter_table
from glasslm.runs import checkpoint, run_folder
from glasslm.training import launch
from glasslm.training.fine_tuning import BaseRun, fine_tuning_config
from glasslm.training.outcome import Outcome
from small_runs import interrupt_at, logged_lines, without_report
from tuned_runs import QUICK, flag_arguments, make_base, write_new_text

NAMES = ["targets-qv", "targets-qkvo", "targets-qkvogateupdown"]
FLAGS: dict[str, Any] = QUICK | {"max_steps": 8, "lora_rank": 2, "engine": "numpy"}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def new(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_new_text(tmp_path_factory.mktemp("new"))


def study(base: Path, new: Path, folder: Path, kind: str = "targets", **flags: Any) -> int:
    with without_report():
        return main(
            [
                "finetune",
                str(base),
                *flag_arguments(study=kind, text_file=new, run_dir=folder, **FLAGS | flags),
            ]
        )


@pytest.fixture(scope="module")
def done(base: Path, new: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("study") / "study"
    assert study(base, new, folder) == 0
    return folder


def rows(folder: Path) -> list[dict[str, str]]:
    with open(folder / "adapters.csv", encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def test_it_trains_a_run_for_each_choice_of_matrices(done: Path) -> None:
    assert {path.name for path in done.iterdir()} == {
        "runs",
        "adapters.csv",
        "adapters.png",
        "report.md",
    }
    assert {path.name for path in (done / "runs").iterdir()} == set(NAMES)
    assert (done / "adapters.png").read_bytes().startswith(b"\x89PNG")
    targets = [run_folder.Run(done / "runs" / name).config.model.lora_targets for name in NAMES]
    assert targets == ["q,v", "q,k,v,o", "q,k,v,o,gate,up,down"]
    assert [row["variant"] for row in rows(done)] == NAMES


def test_the_table_has_what_the_runs_say(done: Path) -> None:
    """Losses of the new and the old text at the best step, and the size of adapters alone."""
    for row in rows(done):
        run = run_folder.Run(done / "runs" / row["variant"])
        evals = logged_lines(run.path, "eval")
        best = min(
            (line for line in evals if line["split"] == "val"), key=lambda line: line["loss"]
        )
        old = {line["step"]: line["bpb"] for line in evals if line["split"] == "old"}
        assert float(row["val_loss"]) == best["loss"] == run.history.best_val_loss
        assert float(row["bpb"]) == best["bpb"]
        assert float(row["old_bpb_before"]) == old[0]
        assert float(row["old_bpb_after"]) == old[best["step"]] != old[0]
        assert (row["rank"], row["targets"]) == ("2", run.config.model.lora_targets)
        assert row["status"] == "finished"
        model = checkpoint.load(run.path).path / "model.safetensors"
        assert int(row["checkpoint_bytes"]) == model.stat().st_size
        assert int(row["trained"]) == run.record["parameters"]["trained"]
        assert 0 < model.stat().st_size - 4 * int(row["trained"]) < 8192  # the names
    trained = [int(row["trained"]) for row in rows(done)]
    assert trained == sorted(trained)


def test_the_report_has_a_row_for_each_and_says_what_they_are_worth(done: Path) -> None:
    text = (done / "report.md").read_text(encoding="utf-8")
    assert text.startswith("# Adapters by targets\n")
    table = {
        line.split(" | ")[0].removeprefix("| "): line
        for line in text.splitlines()
        if line.startswith("| targ")
    }
    assert list(table) == NAMES
    for row in rows(done):
        line = table[row["variant"]]
        assert f"| {int(row['trained']):,} |" in line
        assert f"{float(row['bpb']):.3f}" in line
        assert f"{float(row['old_bpb_before']):.3f} -> {float(row['old_bpb_after']):.3f}" in line


def record_calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The runs that are trained or resumed from now on, and how."""
    calls: list[str] = []
    train, resume = launch.train, launch.resume

    def noted_train(
        config: RunConfig, compute: ComputeConfig, run_dir: Path, **rest: Any
    ) -> Outcome:
        calls.append(f"train {run_dir.name}")
        return train(config, compute, run_dir, **rest)

    def noted_resume(run_dir: Path, compute: ComputeConfig, **rest: Any) -> Outcome:
        calls.append(f"resume {run_dir.name}")
        return resume(run_dir, compute, **rest)

    monkeypatch.setattr(launch, "train", noted_train)
    monkeypatch.setattr(launch, "resume", noted_resume)
    return calls


def test_it_goes_on_where_it_stopped(
    base: Path, new: Path, done: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Finished runs are not trained again, and the table is the same in the end."""
    calls = record_calls(monkeypatch)
    folder = tmp_path / "study"
    with pytest.MonkeyPatch.context() as patch:
        interrupt_at(3, patch)
        assert study(base, new, folder) == 130
    assert not (folder / "adapters.csv").exists()
    assert study(base, new, folder) == 0
    assert calls == [
        f"train {NAMES[0]}",
        f"resume {NAMES[0]}",
        f"train {NAMES[1]}",
        f"train {NAMES[2]}",
    ]
    before = [(folder / file).read_bytes() for file in ("adapters.csv", "report.md")]
    del calls[:]
    assert study(base, new, folder) == 0
    assert calls == []
    assert [(folder / file).read_bytes() for file in ("adapters.csv", "report.md")] == before
    assert rows(folder) == rows(done)


def test_a_study_of_conversations_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its runs record absolute paths, the tokens of the template, and where attention ends."""
    base = make_byte_base(tmp_path, max_steps=1)
    write_chat(tmp_path / "chat.jsonl")
    monkeypatch.chdir(tmp_path)
    flags = FLAGS | {"max_steps": 1, "study": "targets", "chat": "chat.jsonl", "run_dir": "study"}
    argv = ["finetune", str(base), *flag_arguments(**flags)]
    with without_report():
        assert main(argv) == 0
        calls = record_calls(monkeypatch)
        assert main(argv) == 0
    assert calls == []
    assert "3 of 3 runs are finished already" in capsys.readouterr().err


def test_sigterm_ends_the_program_when_all_is_saved(
    base: Path, new: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupt_at(3, monkeypatch, signal.SIGTERM)
    assert study(base, new, tmp_path / "study") == 143
    assert checkpoint.list_steps(tmp_path / "study" / "runs" / NAMES[0])[-1] == 3


def test_runs_of_other_settings_are_not_mixed_in(
    base: Path, new: Path, done: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = (done / "adapters.csv").read_bytes()
    capsys.readouterr()
    for other in ({"max_steps": 9}, {"lora_rank": 4}, {"lr": 0.5}):
        assert study(base, new, done, **other) == 2
        err = capsys.readouterr().err
        assert "trained with other settings" in err
        assert str(done / "runs" / NAMES[0]) in err
    assert study(base, new, done, precision="fp64") == 2
    assert "give --precision fp32, or choose another folder" in capsys.readouterr().err
    assert (done / "adapters.csv").read_bytes() == before


def test_steps_that_were_fixed_when_a_run_began_are_the_same_flags(
    base: Path, new: Path, tmp_path: Path
) -> None:
    flags = {name: value for name, value in FLAGS.items() if name != "max_steps"} | {"epochs": 0.3}
    argv = [
        "finetune",
        str(base),
        *flag_arguments(study="targets", text_file=new, run_dir=tmp_path / "study", **flags),
    ]
    with without_report():
        assert main(argv) == 0
        assert main(argv) == 0


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ({"max_time": "10s"}, "--max-time does not work in a study"),
        ({"patience": 1}, "end each run at another step"),
        ({"stop_at_loss": 1.0}, "end each run at another step"),
    ],
)
def test_runs_of_unequal_length_are_refused(
    flag: dict[str, Any], message: str, base: Path, tmp_path: Path
) -> None:
    config = with_flags(fine_tuning_config(BaseRun(str(base)), with_adapters=True), flag)
    with pytest.raises(InputError, match=message):
        adapter_study.run_study("rank", config, ComputeConfig(), tmp_path / "study", "")
    assert not (tmp_path / "study").exists()


def test_all_variants_get_the_engine_of_the_largest(
    base: Path, new: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[int] = []

    def choose_by_size(compute: ComputeConfig, parameters: int, **_: Any) -> Any:
        sizes.append(parameters)
        return dataclasses.replace(compute, engine="torch", precision="bf16"), ""

    def note_compute(folder: Path, trials: Any, compute: ComputeConfig, *_: Any) -> Any:
        table = parameter_table(trials[-1].config.model, 256)
        assert table.total == max(
            parameter_table(trial.config.model, 256).total for trial in trials
        )
        raise InputError(f"{compute.engine} {compute.precision}")

    monkeypatch.setattr(study_plan, "choose_engine", choose_by_size)
    monkeypatch.setattr(sweep, "run_in_turn", note_compute)
    config = with_flags(
        fine_tuning_config(BaseRun(str(base)), with_adapters=True), {"text_file": (str(new),)}
    )
    with pytest.raises(InputError, match="torch bf16"):
        adapter_study.run_study("rank", config, ComputeConfig(), tmp_path / "study", "")
    assert len(sizes) == 1


def test_ranks_are_the_powers_of_two_to_64(base: Path) -> None:
    config = fine_tuning_config(BaseRun(str(base)), with_adapters=True)
    variants = adapter_study._list_variants("rank", config)
    assert {name: variant.model.lora_rank for name, variant in variants.items()} == {
        f"rank-{rank}": rank for rank in (2, 4, 8, 16, 32, 64)
    }
    for variant in variants.values():
        assert dataclasses.replace(variant, model=config.model) == config
    gelu = dataclasses.replace(config, model=dataclasses.replace(config.model, feedforward="gelu"))
    names = [
        variant.model.lora_targets
        for variant in adapter_study._list_variants("targets", gelu).values()
    ]
    assert names == ["q,v", "q,k,v,o", "q,k,v,o,up,down"]  # without a gate


def test_a_study_needs_adapters_to_compare(base: Path) -> None:
    with pytest.raises(InputError, match="leave out --full"):
        adapter_study._list_variants(
            "rank", fine_tuning_config(BaseRun(str(base)), with_adapters=False)
        )


def make_point(trained: int, loss: float, status: str = "finished") -> Point:
    return Point(f"{trained}/{loss}", 1, "q", trained, loss, 0.0, None, None, 0, status)


def test_the_front_has_those_that_nothing_smaller_equals() -> None:
    points = [
        make_point(400, 1.0),
        make_point(100, 3.0),
        make_point(200, 3.0),
        make_point(300, 2.0),
        make_point(300, 2.5),
        make_point(800, 1.5),
        make_point(900, 0.5),
    ]
    assert pareto_front(points) == [points[1], points[3], points[0], points[6]]
    assert adapter_study.format_report("rank", points).count("on the Pareto front") == 4
    assert adapter_study.format_report("rank", points).count("not measured") == 7


def test_a_run_that_did_not_come_to_its_end_is_on_no_front() -> None:
    """Its loss is that of its beginning; the report says what became of it."""
    points = [
        make_point(100, 3.0),
        make_point(200, 1.0, "diverged"),
        make_point(300, 2.0, "stopped"),
    ]
    assert pareto_front(points) == [points[0], points[2]]
    line = next(
        line
        for line in adapter_study.format_report("rank", points).splitlines()
        if line.startswith("| 200/1.0")
    )
    assert line.endswith("| diverged |")


def test_the_folder_of_a_run_is_not_that_of_a_study(
    base: Path, new: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = sorted(base.iterdir())
    assert study(base, new, base) == 2
    assert "holds a run, not a study" in capsys.readouterr().err
    assert sorted(base.iterdir()) == before


def test_a_run_that_diverged_has_a_row_all_the_same(done: Path, tmp_path: Path) -> None:
    """It has no checkpoint of its last evaluation; all others have adapters of the same size."""
    run = run_folder.Run(shutil.copytree(done / "runs" / NAMES[0], tmp_path / "run"))
    shutil.rmtree(run.path / "checkpoints" / "000008")
    assert adapter_study.read_point(NAMES[0], run) == adapter_study.read_point(
        NAMES[0], run_folder.Run(done / "runs" / NAMES[0])
    )
