"""An ablation changes one thing at a time, holds equal what it says, and its sentences follow from its numbers."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import Any

import pytest

from glasslm import cli
from glasslm.config.conversion import to_dict
from glasslm.config.schema import ComputeConfig, RunConfig
from glasslm.errors import InputError
from glasslm.lab.studies import ablation, ablation_report
from glasslm.lab.studies.ablation import BASELINE, COLUMNS, Asked, Plan, Result, as_csv, judge
from glasslm.lab.studies.axes import AXES, Variant, matched, variants
from glasslm.lab.studies.sweep import Runner
from glasslm.lab.studies.trial_results import Row
from glasslm.model.flops import flops_per_token
from glasslm.model.parameters import parameter_table
from glasslm.runs.run_folder import Run
from glasslm.training.step_timer import Pace
from small_runs import small, write_text

V = 20


def base(**flags: Any) -> RunConfig:
    return small(Path("text.txt"), d_model=64, n_heads=4, n_layers=4, **flags).resolved()


def differing(one: RunConfig, other: RunConfig) -> set[str]:
    parts = [
        (to_dict(one)[part], to_dict(other)[part])
        for part in ("model", "data", "optimizer", "train")
    ]
    return {name for a, b in parts for name in a if a[name] != b[name]}


CHANGED = {
    "depth": {"n_layers"}, "width": {"d_model", "n_heads", "n_kv_heads", "d_ff"}, "heads": {"n_heads", "n_kv_heads"},
    "activation": {"feedforward", "d_ff"}, "norm": {"norm", "norm_position"}, "position": {"position"},
    "tying": {"tie_embeddings"}, "optimizer": {"optimizer"}, "qk_norm": {"qk_norm"}, "dropout": {"dropout"},
}  # fmt: skip


@pytest.mark.parametrize("axis", AXES)
def test_an_axis_changes_one_thing_and_leaves_the_baselines_own_value_out(axis: str) -> None:
    found = variants([axis], base())
    assert len(found) >= 1
    for one in found:
        assert one.axis == axis
        assert differing(one.config, base()) <= CHANGED[axis]
        assert one.config != base()
    if axis == "width":
        assert {one.config.model.head_size for one in found} == {base().model.head_size}
    if axis == "activation":  # a gated one is 8/3 wide, another one 4 times
        assert {one.config.model.d_ff for one in found} == {256}
    assert len({one.name for one in found}) == len(found)


def test_values_of_ones_own_and_what_cannot_be() -> None:
    assert [one.config.model.n_layers for one in variants(["depth=1/3/4"], base())] == [1, 3]
    assert [one.value for one in variants(["norm=none/pre|rmsnorm/post"], base())] == [
        "none/pre",
        "rmsnorm/post",
    ]
    assert "6" not in [
        one.value for one in variants(["heads"], base())
    ]  # which does not divide the width
    for wrong, says in (
        ("deep", "choose from depth"),
        ("heads=7", "heads=7"),
        ("depth=x", "depth=x"),
        ("tying=so", "tied"),
    ):
        with pytest.raises(InputError, match=says):
            variants([wrong], base())


def test_what_is_said_to_be_equal_is() -> None:
    start = base(max_steps=1000)
    (deep,) = variants(["depth=8"], start)
    assert matched(deep.config, start, "tokens", V, lambda config: 1.0) == deep.config
    by_flops = matched(deep.config, start, "flops", V, lambda config: 1.0)
    spent = [
        flops_per_token(config.model, V) * config.train.max_steps for config in (by_flops, start)
    ]
    assert spent[0] == pytest.approx(spent[1], rel=0.01)
    by_time = matched(deep.config, start, "time", V, lambda config: 0.1 * config.model.n_layers)
    assert by_time.train.max_steps == 500
    by_size = matched(deep.config, start, "parameters", V, lambda config: 1.0)
    sizes = [
        parameter_table(config.model.resolved(), V).total
        for config in (by_size, start, deep.config)
    ]
    assert sizes[0] == pytest.approx(sizes[1], rel=0.1)
    assert sizes[2] > 1.8 * sizes[1]
    assert by_size.model.n_layers == 8
    (wide,) = variants(["width=128"], start)
    by_depth = matched(wide.config, start, "parameters", V, lambda config: 1.0)
    assert (by_depth.model.d_model, by_depth.model.n_layers) == (128, 1)


# -- verdicts and sentences from doctored runs ------------------------------------------------------------------------


COMPUTE = ComputeConfig(engine="numpy", precision="fp32", threads=1)


def plan_of(axes: list[str], seeds: int = 3, **more: Any) -> Plan:
    found = variants(axes, base())
    asked = Asked(tuple(axes), seeds, **more)
    return Plan(base(seed=0), found, asked, V, COMPUTE)


def row(seed: int, loss: float | None, status: str = "finished") -> Row:
    return Row(
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


def judged(made: Plan, losses: dict[str, list[float | None]]) -> list[Result]:
    rows = {
        name: [
            row(seed, loss, "finished" if loss is not None else "diverged")
            for seed, loss in enumerate(of)
        ]
        for name, of in losses.items()
    }
    return judge(made, rows, dict.fromkeys(losses, (0.01, False)))


NOISE = (0.000, 0.002, -0.001)


def test_verdicts_and_sentences_follow_from_the_numbers() -> None:
    made = plan_of(["depth=2/8/12", "activation=gelu"])
    start = [2.0 + noise for noise in (0.01, -0.02, 0.015)]

    def off(delta: float) -> list[float | None]:
        return [loss + delta + noise for loss, noise in zip(start, NOISE)]

    results = judged(made, {
        BASELINE: list(start), "depth-2": off(0.3), "depth-8": off(-0.2), "depth-12": [1.9, None, 1.9],
        "activation-gelu": [loss + d for loss, d in zip(start, (0.3, -0.31, 0.02))],
    })  # fmt: skip
    kinds = {one.name: one.verdict.kind for one in results if one.verdict}
    assert kinds == {
        "depth 2": "worse", "depth 8": "better", "depth 12": "diverged", "activation gelu": "not distinguishable"
    }  # fmt: skip
    said = " ".join(ablation_report.findings(made, results))
    assert "Better than the baseline: depth 8 (-0.19" in said
    assert "Worse than the baseline: depth 2 (+0.30" in said
    assert "Diverged, which is a result and not a gap: depth 12 (1 of 3)" in said
    assert "this study cannot say" in said  # GELU against SwiGLU
    assert "Returns of depth, nats a step: 2 to 4: -0.30" in said
    swapped = judged(made, {
        BASELINE: list(start), "depth-2": off(-0.2), "depth-8": off(0.3), "depth-12": off(0.31),
        "activation-gelu": off(-0.1),
    })  # fmt: skip
    said = " ".join(ablation_report.findings(made, swapped))
    assert "A surprise: smaller and better, depth 2" in said
    assert "A surprise: larger and worse" in said
    assert "GELU against SwiGLU at this scale: activation gelu is better by 0.0997 nats" in said
    assert "Diverged" not in said


def test_one_seed_is_no_proof() -> None:
    made = plan_of(["depth=2"], seeds=1)
    results = judged(made, {BASELINE: [2.0], "depth-2": [1.0]})
    assert [one.verdict.kind for one in results if one.verdict] == ["not tested"]
    assert "no proof" in " ".join(ablation_report.findings(made, results))


def test_the_same_needs_a_margin() -> None:
    made = plan_of(["depth=2"], margin=0.05)
    results = judged(made, {BASELINE: [2.0, 2.1, 1.9], "depth-2": [2.001, 2.1005, 1.9]})
    assert [one.verdict.kind for one in results if one.verdict] == ["same"]


def test_the_table_has_the_columns_of_the_contract_and_a_row_for_each_run() -> None:
    made = plan_of(["depth=2"])
    results = judged(made, {BASELINE: [2.0, 2.1, 1.9], "depth-2": [2.5, None, 2.4]})
    rows = list(csv.DictReader(io.StringIO(as_csv(results))))
    assert tuple(rows[0]) == COLUMNS
    assert [(one["variant"], one["seed"]) for one in rows] == [
        (name, str(seed)) for name in (BASELINE, "depth 2") for seed in range(3)
    ]
    assert rows[4]["final_val_loss"] == ""
    assert rows[3]["verdict"] == "diverged in 1 of 3"
    assert rows[3]["delta"] == ""
    for draw in (ablation_report.bars,):
        assert draw(made, results, ablation_report.figures.ON_WHITE).axes


# -- whole studies ----------------------------------------------------------------------------------------------------

TINY = "--d-model 16 --n-heads 2 --n-layers 1 --block-size 16 --batch-size 4 --max-steps 30 --warmup-steps 3".split()  # noqa: SIM905 - as one types it


def test_a_study_by_the_command_and_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text, out = write_text(tmp_path / "text.txt"), tmp_path / "study"
    words = [
        "ablate",
        "--text-file",
        str(text),
        "--axes",
        "depth=2,tying",
        "--seeds",
        "2",
        "--out",
        str(out),
        *TINY,
    ]
    assert cli.main(words) == 0
    shown = capsys.readouterr()
    assert f"study: {out}" in shown.out
    assert "depth 2" in shown.out
    for name in (
        "ablation_table.csv",
        "ablation_bars.png",
        "training_curves.png",
        "ablation_report.html",
        "report.md",
    ):
        assert (out / name).stat().st_size > 100
    assert len(list((out / "runs").iterdir())) == 6

    def without_clock(path: Path) -> list[dict[str, str]]:
        rows = list(csv.DictReader(io.StringIO(path.read_text(encoding="utf-8"))))
        return [
            {k: v for k, v in one.items() if k not in ("wall_s", "step_ms", "peak_bytes")}
            for one in rows
        ]

    before = without_clock(out / "ablation_table.csv")
    assert len(before) == 6
    assert before[2]["axis"] == "depth"
    assert cli.main([*words, "--json"]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert [one["variant"] for one in found["variants"]] == [BASELINE, "depth 2", "tying untied"]
    assert without_clock(out / "ablation_table.csv") == before
    page = (out / "ablation_report.html").read_text(encoding="utf-8")
    assert "Key findings" in page
    assert "runs/depth-2-s42" in page
    other = [word if word != "30" else "31" for word in words]
    assert cli.main(other) == 2
    assert "other settings" in capsys.readouterr().err


def test_each_variant_may_have_its_own_best_rate(tmp_path: Path) -> None:
    config = small(
        write_text(tmp_path / "text.txt"), d_model=16, n_layers=1, max_steps=30, lr=0.003
    )
    runner, study = Runner(COMPUTE, workers=2), tmp_path / "study"
    made = ablation.plan(
        config, Asked(("depth=2",), 1, rates=(0.1, 1, 4)), runner, study, lambda message: None
    )
    results = ablation.run(made, study, runner, "", lambda message: None)
    names = sorted(path.name for path in (tmp_path / "study" / "runs").iterdir())
    assert [name for name in names if name.startswith("tune-")] == sorted(
        f"tune-{of}-x{times}" for of in (BASELINE, "depth-2") for times in ("0.1", "1", "4")
    )
    for result in results:  # with so few steps, the highest rate learns the most
        assert result.rate == pytest.approx(0.012)
        assert result.at_edge
        assert result.rows[0].run.config.optimizer.lr == pytest.approx(0.012)
        assert result.rows[0].run.config.train.seed == config.train.seed
    assert "the grid is too narrow" in " ".join(ablation_report.findings(made, results))


def test_a_budget_fixes_the_steps_and_one_that_is_too_small_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ablation, "measured", lambda *arguments: Pace(0.01, 0.0, 0.0, 0.0))
    config = small(write_text(tmp_path / "text.txt"), d_model=16, n_layers=1)
    runner = Runner(COMPUTE, workers=2)

    def steps(budget: str, seeds: int, rates: tuple[float, ...] = ()) -> int:
        said: list[str] = []
        study = tmp_path / f"{budget}-{seeds}-{len(rates)}"
        asked = Asked(("depth=2",), seeds, rates=rates, budget=budget)
        made = ablation.plan(config, asked, runner, study, said.append)
        assert said[-1].startswith(
            f"{2 * (seeds + len(rates))} runs"
        )  # the rates are tried on a seed of their own
        assert {one.config.train.max_steps for one in made.variants} == {made.base.train.max_steps}
        return made.base.train.max_steps

    one, with_rates = steps("60s", 1), steps("60s", 1, (0.1, 1, 3))
    assert one > 4 * with_rates > 100  # a run takes a second to start, too
    assert steps("60s", 4) == with_rates
    with pytest.raises(InputError, match="longer budget"):
        steps("0.01s", 3)


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
        *TINY,
    ]
    words += ["--budget", "4s", "--match", "time"]
    assert cli.main(words) == 0
    planned = (out / "plan.json").read_bytes()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            ablation, "measured", lambda *arguments: Pace(100.0, 1.0, 0.0, 0.0)
        )  # the machine is another one by now
        assert cli.main(words) == 0
    assert "2 of 2 runs are there already" in capsys.readouterr().err
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
    made = plan_of(["depth=2/8"])
    rows = {
        name: [row(seed, 2.0 + 0.01 * seed) for seed in range(3)]
        for name in (BASELINE, "depth-2", "depth-8")
    }
    rows["depth-2"][1] = row(1, None, "failed")
    results = judge(made, rows, dict.fromkeys(rows, (0.01, False)))
    assert [one.verdict.words for one in results if one.verdict] == [
        "not tested: 1 runs failed: see logs/", "identical in all 3 pairs"
    ]  # fmt: skip
    said = " ".join(ablation_report.findings(made, results))
    assert "1 runs failed" in said
    assert "Diverged" not in said
    assert "failed" in ablation_report.text(made, results)


def test_unknown_words_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = write_text(tmp_path / "text.txt")
    for words, says in (
        (["--axes", "colour"], "choose from depth"),
        (["--rates", "1/x/3"], "multiples of the rate"),
        (["--rates", "1/3"], "three multiples"),
        (["--seeds", "0"], "at least 1"),
        (["--runner", "ray"], "glasslm[ray]"),
    ):
        code = cli.main(
            ["ablate", "--text-file", str(text), "--out", str(tmp_path / "study"), *TINY, *words]
        )
        said = capsys.readouterr().err
        if words[1] == "ray" and code == 0:
            continue  # Ray is installed here
        assert code == 2, said
        assert says in said


def test_a_variant_is_named_for_a_folder() -> None:
    assert Variant("norm", "rmsnorm/post", base()).name == "norm-rmsnorm-post"
