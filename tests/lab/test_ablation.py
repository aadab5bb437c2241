"""An ablation: verdicts, findings and tables follow from its runs, and a study is resumed."""

from __future__ import annotations

import csv
import io
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

import glasslm
from glasslm import cli
from glasslm.cli import train
from glasslm.config.conversion import with_flags
from glasslm.config.schema import ComputeConfig, RunConfig
from glasslm.config.units import parse_duration
from glasslm.errors import InputError
from glasslm.lab.studies import ablation, ablation_budget, ablation_figures, ablation_report
from glasslm.lab.studies.ablation import (
    BASELINE,
    AblationSpec,
    Plan,
    VariantResult,
    judge_variants,
)
from glasslm.lab.studies.ablation_axes import variants
from glasslm.lab.studies.ablation_budget import describe_length
from glasslm.lab.studies.ablation_table import COLUMNS, to_csv
from glasslm.lab.studies.checkout import train_command
from glasslm.lab.studies.sweep import Runner
from glasslm.lab.studies.trial_results import TrialResult
from glasslm.report import figures
from glasslm.runs.run_folder import Run
from glasslm.text import ignore_message
from glasslm.training.step_timer import StepTimer
from small_runs import read_json, small_config, write_text

V = 20


def base(**flags: Any) -> RunConfig:
    return small_config(Path("text.txt"), d_model=64, n_heads=4, n_layers=4, **flags).resolve()


# -- verdicts and sentences from doctored runs -----------------------------------------------------


COMPUTE = ComputeConfig(engine="numpy", precision="fp32", threads=1)


def plan_of(axes: list[str], seeds: int = 3, **more: Any) -> Plan:
    planned_variants = variants(axes, base())
    spec = AblationSpec(tuple(axes), seeds, **more)
    return Plan(base(seed=0), planned_variants, spec, V, COMPUTE)


def row(seed: int, loss: float | None, status: str = "finished") -> TrialResult:
    return TrialResult(
        seed,
        status,
        loss,
        loss,
        loss,
        10.0 + seed,
        5.0,
        1 << 20,
        "Once upon",
        Run(Path(f"runs/r{seed}")),
    )


def judge_losses(plan: Plan, losses: dict[str, list[float | None]]) -> list[VariantResult]:
    rows = {
        name: [
            row(seed, loss, "finished" if loss is not None else "diverged")
            for seed, loss in enumerate(values)
        ]
        for name, values in losses.items()
    }
    return judge_variants(plan, rows, dict.fromkeys(losses, (0.01, False)))


NOISE = (0.000, 0.002, -0.001)


def test_verdicts_and_sentences_follow_from_the_numbers() -> None:
    plan = plan_of(["depth=2/8/12", "activation=gelu"])
    start = [2.0 + noise for noise in (0.01, -0.02, 0.015)]

    def shifted(delta: float) -> list[float | None]:
        return [loss + delta + noise for loss, noise in zip(start, NOISE)]

    results = judge_losses(
        plan,
        {
            BASELINE: list(start),
            "depth-2": shifted(0.3),
            "depth-8": shifted(-0.2),
            "depth-12": [1.9, None, 1.9],
            "activation-gelu": [loss + d for loss, d in zip(start, (0.3, -0.31, 0.02))],
        },
    )
    kinds = {result.name: result.verdict.kind for result in results if result.verdict}
    assert kinds == {
        "depth 2": "worse",
        "depth 8": "better",
        "depth 12": "diverged",
        "activation gelu": "not distinguishable",
    }
    text = " ".join(ablation_report.findings(plan, results))
    assert "Better than the baseline: depth 8 (-0.19" in text
    assert "Worse than the baseline: depth 2 (+0.30" in text
    assert "Diverged (a result, not a missing value): depth 12 (1 of 3)" in text
    assert "this study cannot decide" in text  # GELU against SwiGLU
    assert "Change of the loss by depth, in nats: 2 to 4: -0.30" in text
    swapped = judge_losses(
        plan,
        {
            BASELINE: list(start),
            "depth-2": shifted(-0.2),
            "depth-8": shifted(0.3),
            "depth-12": shifted(0.31),
            "activation-gelu": shifted(-0.1),
        },
    )
    text = " ".join(ablation_report.findings(plan, swapped))
    assert "Smaller than the baseline and better: depth 2" in text
    assert "Larger than the baseline and worse" in text
    assert "GELU against SwiGLU at this scale: activation gelu is better by 0.0997 nats" in text
    assert "Diverged" not in text


def test_one_seed_is_no_proof() -> None:
    plan = plan_of(["depth=2"], seeds=1)
    results = judge_losses(plan, {BASELINE: [2.0], "depth-2": [1.0]})
    assert [result.verdict.kind for result in results if result.verdict] == ["not tested"]
    assert "no proof" in " ".join(ablation_report.findings(plan, results))


def test_the_same_needs_a_margin() -> None:
    plan = plan_of(["depth=2"], margin=0.05)
    results = judge_losses(plan, {BASELINE: [2.0, 2.1, 1.9], "depth-2": [2.001, 2.1005, 1.9]})
    assert [result.verdict.kind for result in results if result.verdict] == ["same"]


def test_the_table_has_the_columns_of_the_contract_and_a_row_for_each_run() -> None:
    plan = plan_of(["depth=2"])
    results = judge_losses(plan, {BASELINE: [2.0, 2.1, 1.9], "depth-2": [2.5, None, 2.4]})
    rows = list(csv.DictReader(io.StringIO(to_csv(results))))
    assert tuple(rows[0]) == COLUMNS
    assert [(row_cells["variant"], row_cells["seed"]) for row_cells in rows] == [
        (name, str(seed)) for name in (BASELINE, "depth 2") for seed in range(3)
    ]
    assert rows[4]["final_val_loss"] == ""
    assert rows[3]["verdict"] == "diverged in 1 of 3"
    assert rows[3]["delta"] == ""
    for draw in (ablation_figures.draw_bars,):
        assert draw(plan, results, figures.PRINT_PALETTE).axes


# -- whole studies ---------------------------------------------------------------------------------

SIZES = "--d-model 16 --n-heads 2 --n-layers 1 --block-size 16 --batch-size 4"
TINY = f"{SIZES} --max-steps 30 --warmup-steps 3".split()


@pytest.mark.usefixtures("trials_in_this_process")
def test_a_study_by_the_command_and_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text, out = write_text(tmp_path / "text.txt"), tmp_path / "study"
    words = [
        "ablate",
        "--text-file",
        str(text),
        "--axes",
        "depth=2,tying,n_kv_heads=1",
        "--seeds",
        "2",
        "--out",
        str(out),
        *TINY,
    ]
    assert cli.main(words) == 0
    captured = capsys.readouterr()
    assert f"study: {out}" in captured.out
    assert "depth 2" in captured.out
    for name in (
        "ablation_table.csv",
        "ablation_bars.png",
        "training_curves.png",
        "ablation_report.html",
        "report.md",
    ):
        assert (out / name).stat().st_size > 100
    assert len(list((out / "runs").iterdir())) == 8

    def without_clock(path: Path) -> list[dict[str, str]]:
        rows = list(csv.DictReader(io.StringIO(path.read_text(encoding="utf-8"))))
        return [
            {k: v for k, v in row_cells.items() if k not in ("wall_s", "step_ms", "peak_bytes")}
            for row_cells in rows
        ]

    before = without_clock(out / "ablation_table.csv")
    assert len(before) == 8
    assert before[2]["axis"] == "depth"
    assert cli.main([*words, "--json"]) == 0
    output = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert [entry["variant"] for entry in output["variants"]] == [
        BASELINE,
        "depth 2",
        "tying untied",
        "n_kv_heads 1",
    ]
    assert without_clock(out / "ablation_table.csv") == before
    page = (out / "ablation_report.html").read_text(encoding="utf-8")
    assert "Key findings" in page
    assert "runs/depth-2-s42" in page
    other = [word if word != "30" else "31" for word in words]
    assert cli.main(other) == 2
    assert "other settings" in capsys.readouterr().err
    for seeds in ("2", "3"):  # to continue it, and to extend it
        words[words.index("--seeds") + 1] = seeds
        assert cli.main([*words, "--precision", "fp64"]) == 2
        assert "give --precision fp32, or choose another folder" in capsys.readouterr().err


@pytest.mark.usefixtures("trials_in_this_process")
def test_each_variant_may_have_its_own_best_rate(tmp_path: Path) -> None:
    config = small_config(
        write_text(tmp_path / "text.txt"), d_model=16, n_layers=1, max_steps=30, lr=0.003
    )
    runner, study = Runner(COMPUTE, workers=2), tmp_path / "study"
    plan = ablation.plan(
        config,
        AblationSpec(("depth=2",), 1, rates=(0.1, 1, 4)),
        runner,
        study,
        lambda message: None,
    )
    results = ablation.run(plan, study, runner, "", lambda message: None)
    names = sorted(path.name for path in (tmp_path / "study" / "runs").iterdir())
    assert [name for name in names if name.startswith("tune-")] == sorted(
        f"tune-{stem}-x{times}" for stem in (BASELINE, "depth-2") for times in ("0.1", "1", "4")
    )
    for result in results:  # with so few steps, the highest rate learns the most
        assert result.rate == pytest.approx(0.012)
        assert result.at_edge
        assert result.trials[0].run.config.optimizer.lr == pytest.approx(0.012)
        assert result.trials[0].run.config.train.seed == config.train.seed
    assert "the grid is too narrow" in " ".join(ablation_report.findings(plan, results))


def test_a_budget_fixes_the_steps_and_one_that_is_too_small_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        ablation, "measure_speed", lambda *arguments: StepTimer(0.01, 0.0, 0.0, 0.0)
    )
    monkeypatch.setattr(ablation_budget, "run_start_seconds", lambda: 1.0)
    config = small_config(write_text(tmp_path / "text.txt"), d_model=16, n_layers=1)
    runner = Runner(COMPUTE, workers=2)

    def steps(budget: str, seeds: int, rates: tuple[float, ...] = ()) -> int:
        messages: list[str] = []
        study = tmp_path / f"{budget}-{seeds}-{len(rates)}"
        spec = AblationSpec(("depth=2",), seeds, rates=rates, budget=budget)
        plan = ablation.plan(config, spec, runner, study, messages.append)
        assert messages[-1].startswith(
            f"{2 * (seeds + len(rates))} runs"
        )  # the rates are tried on a seed of their own
        assert {variant.config.train.max_steps for variant in plan.variants} == {
            plan.base.train.max_steps
        }
        return plan.base.train.max_steps

    without_rates, with_rates = steps("60s", 1), steps("60s", 1, (0.1, 1, 3))
    assert without_rates > 4 * with_rates > 100  # a run takes a second to start, too
    assert steps("60s", 4) == with_rates
    for too_small, seeds, rates in (("0.01s", 3, ()), ("5s", 9, (0.1, 1, 3)), ("9s", 5, ())):
        with pytest.raises(InputError, match="give --budget") as refused:
            steps(too_small, seeds, rates)
        named = str(refused.value).partition("give --budget ")[2].partition(" ")[0]
        assert steps(named, seeds, rates) >= ablation.MIN_STEPS
        with pytest.raises(InputError, match="give --budget"):
            steps(f"{0.8 * parse_duration(named)}s", seeds, rates)


@pytest.mark.parametrize("margin", [0.0, -1.0, float("nan"), float("inf")])
def test_a_margin_that_no_difference_lies_within_is_refused_before_the_plan(
    tmp_path: Path, margin: float
) -> None:
    config = small_config(write_text(tmp_path / "text.txt"), d_model=16, n_layers=1)
    spec = AblationSpec(("depth=2",), margin=margin)
    with pytest.raises(InputError, match=r"margin is .*: expected more than 0 nats"):
        ablation.plan(config, spec, Runner(COMPUTE), tmp_path / "study", ignore_message)
    assert not (tmp_path / "study").exists()


@pytest.mark.usefixtures("trials_in_this_process", "no_figures")
def test_a_study_with_a_budget_goes_on_with_the_steps_that_were_fixed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text, out = write_text(tmp_path / "text.txt"), tmp_path / "study"
    words = [
        "ablate",
        "--text-file",
        str(text),
        "--axes",
        "depth=2",
        "--seeds",
        "1",
        "--out",
        str(out),
        *SIZES.split(),
    ]
    words += ["--max-steps", "9", "--budget", "4s", "--match", "time"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ablation, "measure_speed", lambda *_: StepTimer(0.02, 0.0, 0.0, 0.0))
        assert cli.main(words) == 0
    assert "note: --max-steps has no effect" in capsys.readouterr().err
    planned = (out / "plan.json").read_bytes()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            ablation, "measure_speed", lambda *arguments: StepTimer(100.0, 1.0, 0.0, 0.0)
        )  # the machine is another one by now
        assert cli.main(words) == 0
    assert "2 of 2 runs are finished already" in capsys.readouterr().err
    assert (out / "plan.json").read_bytes() == planned
    assert cli.main([*words[:-1], "flops"]) == 2
    assert "other settings" in capsys.readouterr().err
    assert (
        cli.main(
            ["ablate", "--text-file", str(text), "--out", str(tmp_path / "other"), "--epochs", "1"]
        )
        == 2
    )
    assert "--max-steps, or by --budget" in capsys.readouterr().err


def test_a_failed_run_is_missing_and_did_not_diverge() -> None:
    plan = plan_of(["depth=2/8"])
    rows = {
        name: [row(seed, 2.0 + 0.01 * seed) for seed in range(3)]
        for name in (BASELINE, "depth-2", "depth-8")
    }
    rows["depth-2"][1] = row(1, None, "failed")
    results = judge_variants(plan, rows, dict.fromkeys(rows, (0.01, False)))
    assert [result.verdict.words for result in results if result.verdict] == [
        "not tested: 1 run failed: see logs/",
        "identical in all 3 pairs",
    ]
    text = " ".join(ablation_report.findings(plan, results))
    assert "1 runs failed" in text
    assert "Diverged" not in text
    assert "failed" in ablation_report.summary(plan, results)


def test_unknown_words_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = write_text(tmp_path / "text.txt")
    for words, message in (
        (["--axes", "colour"], "choose from depth"),
        (["--rates", "1/x/3"], "multiples of the learning rate"),
        (["--rates", "1/3"], "three multiples"),
        (["--seeds", "0"], "at least 1"),
        (["--axes", "depth=2", "--lora-alpha", "2"], "--lora-alpha needs --lora-rank"),
        (["--runner", "ray"], "glasslm[ray]"),
    ):
        code = cli.main(
            ["ablate", "--text-file", str(text), "--out", str(tmp_path / "study"), *TINY, *words]
        )
        errors = capsys.readouterr().err
        if words[1] == "ray" and code == 0:
            continue  # Ray is installed here
        assert code == 2, errors
        assert message in errors


# -- another version of the code -------------------------------------------------------------------


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A copy of this source in which AdamW takes smaller steps."""
    copy = tmp_path / "other" / "src" / "glasslm"
    shutil.copytree(
        Path(glasslm.__file__).parent, copy, ignore=shutil.ignore_patterns("__pycache__")
    )
    path = copy / "training" / "learning_rate.py"
    text = path.read_text(encoding="utf-8")
    assert text.count("lr, low = config.lr, config.min_lr") == 1
    path.write_text(text.replace("= config.lr, config", "= config.lr / 8, config"), "utf-8")
    return tmp_path / "other"


@pytest.mark.slow
def test_two_versions_of_the_code_are_compared(
    checkout: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text, out = write_text(tmp_path / "text.txt"), tmp_path / "study"
    words = ["ablate", "--against", str(checkout), "--text-file", str(text), "--seeds", "2"]
    words += ["--out", str(out), "--min-lr", "0", "--no-bias", "--tokenizer", "char", *TINY]
    assert cli.main([*words, "--json"]) == 0
    captured = capsys.readouterr()
    facts = json.loads(captured.out.splitlines()[-1])
    assert [entry["variant"] for entry in facts["variants"]] == [BASELINE, "version unknown"]
    ours, theirs = (entry["losses"] for entry in facts["variants"])
    assert all(there > here for here, there in zip(ours, theirs))  # it has learned less
    assert "the baseline: commit " in captured.err
    assert f"{checkout}: commit unknown" in captured.err
    runs = {path.name: Run(path) for path in (out / "runs").iterdir()}
    assert len(runs) == 4
    for seed in (42, 43):
        here, there = (runs[f"{stem}-s{seed}"] for stem in (BASELINE, "version-unknown"))
        assert here.config == there.config
        assert "glasslm train" in there.record["command"]
    report = (out / "report.md").read_text(encoding="utf-8")
    assert "The baseline is trained by commit" in report
    assert cli.main(words) == 0
    assert "4 of 4 runs are finished already" in capsys.readouterr().err


def test_a_version_that_reads_the_flags_otherwise_is_no_counterpart(
    checkout: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = checkout / "src" / "glasslm" / "config" / "conversion.py"
    text = path.read_text(encoding="utf-8")
    end = "    values = dataclasses.asdict(config)\n"
    assert text.count(end) == 1
    other = f"{end}    values.get('optimizer', {{}})['ema'] = 0.5\n"
    path.write_text(text.replace(end, other), "utf-8")
    text_file = write_text(tmp_path / "text.txt")
    words = ["ablate", "--against", str(checkout), "--text-file", str(text_file), "--seeds", "1"]
    assert cli.main([*words, "--out", str(tmp_path / "study"), *TINY]) == 1
    report = (tmp_path / "study" / "report.md").read_text(encoding="utf-8")
    assert "trains with another ema" in report


@pytest.mark.parametrize("kind", ["missing", "empty", "broken"])
def test_a_checkout_that_is_none_is_refused_before_anything_runs(
    kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "other"
    if kind == "empty":
        other.mkdir()
    if kind == "broken":
        source = other / "src" / "glasslm"
        source.mkdir(parents=True)
        (source / "__main__.py").touch()
        (source / "__init__.py").write_text("import nothing_of_this_name", "utf-8")
    words = ["--text-file", str(tmp_path / "missing.txt"), "--out", str(tmp_path / "study")]
    assert cli.main(["ablate", "--against", str(other), *words]) == 2
    error = capsys.readouterr().err
    assert f"--against is {other}" in error
    assert ("nothing_of_this_name" if kind == "broken" else "src/glasslm") in error
    assert not (tmp_path / "study").exists()


def test_the_flags_of_a_command_make_the_same_config(tmp_path: Path) -> None:
    config = with_flags(
        base(seed=3),
        {
            "text_file": ("a.txt", "b.txt"), "betas": (0.8, 0.9), "lr": 1 / 3, "min_lr": 0.0,
            "bias": True, "tie_embeddings": False, "position": "alibi", "max_steps": 7,
        },
    ).resolve()  # fmt: skip
    command = train_command(tmp_path / "run", config, COMPUTE)
    assert command[2:5] == ["-m", "glasslm", "train"]
    assert train.parse(command[5:]).config.resolve() == config


@pytest.mark.slow
def test_a_larger_budget_or_more_seeds_keep_all_runs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The steps stay, so that runs count; the report says that results were known."""
    text, out = write_text(tmp_path / "text.txt"), tmp_path / "study"
    words = ["ablate", "--text-file", str(text), "--axes", "depth=2", "--out", str(out), *TINY]
    assert cli.main([*words, "--seeds", "1", "--budget", "8s"]) == 0
    trained = {path: path.stat().st_mtime_ns for path in out.glob("runs/*/metrics.jsonl")}
    assert len(trained) == 2
    assert cli.main([*words, "--seeds", "1", "--budget", "4s"]) == 2  # a smaller one
    assert cli.main([*words, "--seeds", "2", "--budget", "8s", "--match", "flops"]) == 2
    assert "other settings" in capsys.readouterr().err
    assert cli.main([*words, "--seeds", "1", "--budget", "17s"]) == 0
    shown = capsys.readouterr()
    assert "the study is extended: 1 seed and their runs are kept" in shown.err
    assert "Seeds were added when the results of 1 seed were known" in shown.out
    assert {path: path.stat().st_mtime_ns for path in trained} == trained
    runs = [read_json(path) for path in out.glob("runs/*/run.json")]
    assert sorted(run["seed"] for run in runs) == [42, 42, 43, 43]
    assert len({run["config"]["train"]["max_steps"] for run in runs}) == 1
    assert cli.main([*words, "--seeds", "1", "--budget", "17s"]) == 0
    assert "4 of 4 runs are finished already" in capsys.readouterr().err
    assert cli.main([*words, "--seeds", "3", "--budget", "17s"]) == 0
    assert len(list(out.glob("runs/*"))) == 6


def test_a_long_study_comes_with_the_flag_that_makes_it_fit() -> None:
    described = [describe_length(1000, [1.0, 2.0], 3, 2, step_s) for step_s in (0.1, 10.0)]
    assert described[0].startswith("6 runs, 1,000 steps of the baseline each, 2 at once, about 7m")
    assert "--budget" not in described[0]
    assert described[1].endswith("--budget 1h makes it fit into an hour")
