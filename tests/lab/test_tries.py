"""Tries of changes: the loop of pairs, the ledger, and the command."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from glasslm import cli
from glasslm.errors import DamagedError, InputError, InUseError
from glasslm.lab.studies import sweep
from glasslm.lab.tries import attempt, tries_page
from glasslm.lab.tries.attempt import Change, TryPlan, TryResult, TrySpec
from glasslm.lab.tries.ledger import Ledger, open_ledger
from glasslm.runs.run_folder import Run
from glasslm.text import ignore_message
from small_runs import small_config, train, write_text

SPEC = TrySpec(alpha=0.025, detect=0.01, max_pairs=12, budget_s=None)


def trial(loss: float | None) -> Any:
    bpb = None if loss is None else loss / math.log(2)
    return SimpleNamespace(final_loss=loss, bpb=bpb, wall_s=1.0, peak_bytes=10**6, is_sampled=False)


def attempt_with(
    base: Sequence[float], change: Sequence[float | None], tmp_path: Path, **settings: Any
) -> TryResult:
    """A try whose runs have these losses; each pair takes a second."""
    config = small_config(write_text(tmp_path / "text.txt")).resolve()
    spec = TrySpec(**vars(SPEC) | settings)
    plan = TryPlan(config, Change("--x", config), spec, 20, None, None)  # type: ignore[arg-type]
    seen: list[int] = []

    def train_pairs(seeds: Sequence[int]) -> tuple[list[Any], list[Any]]:
        indices = [seed - config.train.seed for seed in seeds]
        seen.extend(indices)
        return [trial(base[i]) for i in indices], [trial(change[i]) for i in indices]

    result = attempt.collect_pairs(plan, train_pairs, lambda: float(len(seen)), 2, ignore_message)
    assert seen == list(range(len(result.base)))  # each seed once, in order
    return result


def noise(seed: int, sd: float = 0.002) -> list[float]:
    return list(2 + sd * np.random.default_rng(seed).standard_normal(12))


def test_a_clear_change_ends_early(tmp_path: Path) -> None:
    for shift, verdict in ((-0.02, "better"), (0.02, "worse")):
        result = attempt_with(noise(0), [x + shift for x in noise(1)], tmp_path)
        assert result.verdict == verdict
        assert 3 <= result.look.n < 12
        assert result.facts["bpb_delta"] == pytest.approx(result.look.delta / math.log(2))
        assert result.sentences()[0].startswith(f"--x: {verdict}. ")


def test_a_try_says_that_its_losses_are_sampled(tmp_path: Path) -> None:
    result = attempt_with(noise(0), noise(1), tmp_path)
    assert "sampled" not in " ".join(result.sentences())
    run = SimpleNamespace(config=result.plan.base)
    for trial in (*result.base, *result.change):
        vars(trial).update(is_sampled=True, tokens=160, stderr=0.01, run=run)
    assert "every run was measured on the same 160 tokens" in " ".join(result.sentences())


def test_a_try_ends_when_the_improvement_that_matters_is_excluded(tmp_path: Path) -> None:
    result = attempt_with(noise(0), noise(1), tmp_path, detect=0.02)
    assert result.verdict == "not_distinguishable"
    assert "an improvement of 0.02 nats or more is excluded" in result.reason
    assert result.look.n < 12


def test_a_try_ends_with_its_seeds_or_its_time(tmp_path: Path) -> None:
    loud = [noise(0, 0.05), noise(1, 0.05)]
    result = attempt_with(*loud, tmp_path)
    assert (result.look.n, result.reason) == (12, "all seeds are used")
    assert result.seeds_needed is None or result.seeds_needed > 12
    assert "would take" in result.sentences()[-1]
    result = attempt_with(*loud, tmp_path, budget_s=5.0)
    assert (result.look.n, result.reason) == (5, "the time is used up")


def test_what_diverges_or_does_nothing_is_said(tmp_path: Path) -> None:
    result = attempt_with(noise(0), [2.0, None, 2.0, *noise(1)], tmp_path)
    assert (result.verdict, result.reason) == ("diverged", "the change diverged in 1 of 3 runs")
    result = attempt_with(noise(0), noise(0), tmp_path)
    assert (result.verdict, result.look.n) == ("not_distinguishable", 3)
    assert result.reason == "the losses of all pairs are the same"
    with pytest.raises(InputError, match="the base diverged in 1 of 3 runs"):
        attempt_with([2.0, None, 2.0], noise(0), tmp_path)  # type: ignore[list-item]


def test_the_ledger_counts_every_try_and_notices_edits_before_its_end(tmp_path: Path) -> None:
    path = tmp_path / "tries.jsonl"
    with open_ledger(path) as ledger:
        ledger.append("begin", {"number": 1})
        ledger.append("failed", {"number": 1, "reason": "x"})
        ledger.append("begin", {"number": 2})
        ledger.append("end", {"number": 2, "verdict": "worse", "delta": math.nan})
        with pytest.raises(InUseError, match="used by another try"), open_ledger(path):
            pass
    again = Ledger(path)
    assert (again.tries, len(again.results)) == (2, 1)
    content = path.read_bytes()
    lines = content.splitlines(keepends=True)
    damaged = [
        content.replace(b"worse", b"bette"),
        b"".join(lines[1:]),
        b"".join([lines[0], *lines[2:]]),
        b"".join([*lines[:2], *lines[:2]]),
        content[:-20],
    ]
    for changed in damaged:
        path.write_bytes(changed)
        with pytest.raises(DamagedError, match="was changed, cut or removed"):
            Ledger(path)
    path.write_bytes(b"".join(lines[:2]))
    assert Ledger(path).tries == 1  # the end itself is not noticed


def test_a_try_that_was_removed_from_the_end_is_noticed_by_its_runs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text, ledger = write_text(tmp_path / "text.txt"), tmp_path / "tries.jsonl"
    (tmp_path / "tries-runs" / "0001").mkdir(parents=True)
    argv = ["try", "--text-file", str(text), "--ledger", str(ledger), "--change", "--bias"]
    assert cli.main(argv) == 2
    assert "has no such try: lines of it were removed" in capsys.readouterr().err
    assert not ledger.exists()


def test_the_page_has_every_try_and_the_path_of_the_best(tmp_path: Path) -> None:
    end = {
        "ci_low": -0.1,
        "ci_high": 0.0,
        "seeds": 3,
        "seeds_needed": 4,
        "seconds": 9.0,
        "steps": 20,
    }
    tried = [  # two alternatives to one base, then a change of the better one
        ("better", [3.0, 3.2], [2.9, 3.1]),
        ("better", [3.0, 3.2], [2.8, 3.0]),
        ("worse", [2.8, 3.0], [2.9, 3.1]),
        ("better", [2.8, 3.0], [2.7, 2.9]),
        ("diverged", [2.8, 3.0], [None, None]),
    ]
    with open_ledger(tmp_path / "tries.jsonl") as ledger:
        for number, (verdict, base, change) in enumerate(tried, 1):
            ledger.append("begin", {"number": number})
            losses = {"base_losses": base, "change_losses": change, "delta": None}
            ledger.append(
                "end", end | losses | {"number": number, "verdict": verdict, "change": "--x"}
            )
        ledger.append("begin", {"number": 6})
        ledger.append("failed", {"number": 6, "change": "--y", "reason": "no disk"})
        path = tries_page.best_path(ledger.results)
        tries_page.write(tmp_path / "page", ledger)
    assert [x for x, _ in path] == [0, 1, 2, 3, 4, 5]
    assert [y for _, y in path] == pytest.approx([0, -0.1, -0.2, -0.2, -0.3, -0.3])
    text = (tmp_path / "page" / "tries.md").read_text(encoding="utf-8")
    assert "| 6 | --y | failed: no disk |" in text
    assert "nan" not in text


FLAGS = {"d-model": 16, "n-layers": 1, "n-heads": 2, "block-size": 16, "batch-size": 4,
         "max-steps": 20, "detect": 0.05, "seeds": 8}  # fmt: skip


@pytest.mark.slow
def test_the_command_from_the_first_try_to_the_hidden_text(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text, ledger = write_text(tmp_path / "text.txt"), tmp_path / "tries.jsonl"
    argv = ["try", "--text-file", str(text), "--ledger", str(ledger), "--json"]
    argv += [word for name, value in FLAGS.items() for word in (f"--{name}", str(value))]
    assert cli.main([*argv, "--change", "--lr 3e-2"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["verdict"] == "better"
    assert facts["ci_high"] < 0
    assert (facts["tries"], facts["alpha"]) == (1, 0.025)
    assert cli.main([*argv, "--change", "--lr 1e-7"]) == 1
    assert json.loads(capsys.readouterr().out)["verdict"] == "worse"
    assert cli.main([*argv, "--change", "--lr 1e4 --grad-clip 0"]) == 3
    capsys.readouterr()
    assert cli.main(["try", "--final", "--ledger", str(ledger), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert (facts["number"], facts["verdict"], facts["tries"]) == (1, "better", 3)
    assert cli.main(["try", "--final", "--ledger", str(ledger)]) == 2
    assert "was measured already" in capsys.readouterr().err
    page = (tmp_path / "tries-page" / "tries.html").read_text(encoding="utf-8")
    assert "3 tries, 1 accepted" in page
    kinds = [event["kind"] for event in Ledger(ledger).events]
    assert kinds == ["begin", "end"] * 3 + ["final"]
    assert cli.main([*argv, "--change", "--lr 3e-2"]) == 0
    capsys.readouterr()
    assert cli.main(["try", "--final", "--ledger", str(ledger)]) == 0
    assert "was measured for try 1 before" in capsys.readouterr().err


def test_a_try_that_is_interrupted_stays_in_the_ledger(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(attempt, "run_try", interrupt)
    text, ledger = write_text(tmp_path / "text.txt"), tmp_path / "tries.jsonl"
    argv = ["try", "--text-file", str(text), "--ledger", str(ledger), "--change", "--bias"]
    assert cli.main(argv) == 130
    events = Ledger(ledger).events
    assert [event["kind"] for event in events] == ["begin", "interrupted"]
    assert Ledger(ledger).tries == 1


@pytest.mark.slow
def test_an_operation_of_a_file_and_a_copy_of_the_source_are_tried(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text, ledger = write_text(tmp_path / "text.txt"), tmp_path / "tries.jsonl"
    argv = ["try", "--text-file", str(text), "--ledger", str(ledger), "--json", "--engine", "numpy"]
    argv += [word for name, value in FLAGS.items() for word in (f"--{name}", str(value))]
    ops = tmp_path / "mine.py"
    ops.write_text("def silu(x):\n    return 0 * x, lambda dy: 0 * dy\n", encoding="utf-8")
    assert cli.main([*argv, "--ops", str(ops)]) in (0, 1)
    facts = json.loads(capsys.readouterr().out)
    assert facts["change"] == f"--ops {ops}"
    assert facts["change_config"]["operations"]["ops"] == str(ops)
    assert "operations" not in facts["config"]
    assert facts["base_losses"] != facts["change_losses"]
    source = Path(__file__).parents[2]
    assert cli.main([*argv, "--source", str(source)]) == 1
    facts = json.loads(capsys.readouterr().out)
    assert facts["delta"] == 0  # the same code
    assert cli.main([*argv, "--source", "no-such-commit"]) == 2
    assert "neither a folder nor a commit" in capsys.readouterr().err


@pytest.mark.parametrize("flag", ["--budget=9m", "--seeds=5", "--lr=1", "--change=--bias"])
def test_final_refuses_flags_that_it_would_ignore(
    tmp_path: Path, flag: str, capsys: pytest.CaptureFixture[str]
) -> None:
    ledger = str(tmp_path / "tries.jsonl")
    assert cli.main(["try", "--final", "--ledger", ledger, flag]) == 2
    assert f"so {flag.partition('=')[0]} has no effect: leave it out" in capsys.readouterr().err
    assert cli.main(["try", "--final", "--ledger", ledger, "--engine", "numpy"]) == 2
    assert "was accepted: --final measures the last one" in capsys.readouterr().err


def test_a_failed_try_counts_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(study: Path, trials: Sequence[Any], *_: object) -> dict[str, Any]:
        return {trial.name: sweep.TrialOutcome("failed", Run(study), "no disk") for trial in trials}

    monkeypatch.setattr(sweep, "run_all", fail)
    text, ledger = write_text(tmp_path / "text.txt"), tmp_path / "tries.jsonl"
    argv = ["try", "--text-file", str(text), "--ledger", str(ledger), "--change", "--bias"]
    assert cli.main([*argv, "--max-steps", "20"]) == 2
    error = " ".join(capsys.readouterr().err.split())
    assert "runs failed, and all of them are needed (base-s" in error
    assert "no disk). This try has ended and counts" in error
    assert [event["kind"] for event in Ledger(ledger).events] == ["begin", "failed"]


def test_changes_that_cannot_be_compared_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = write_text(tmp_path / "text.txt")
    argv = ["try", "--text-file", str(text), "--ledger", str(tmp_path / "tries.jsonl")]
    for words, message in (
        ("--seed 4", "changes the seed"),
        ("--val-fraction 0.2", "changes the text"),
        ("--nonsense 1", "unknown flag --nonsense"),
        ("--log-interval 7", "changes nothing"),
        ("--max-steps 18", "--max-steps belongs to the base"),
        ("--epochs 1", "--epochs does not work in a try"),
        ("--max-time 5s", "--max-time does not work in a try"),
        ("--patience 2", "--patience does not work in a try"),
        ("--stop-at-loss 3", "--stop-at-loss does not work in a try"),
        ("--init-from runs/x", "--init-from does not work in a try"),
        ("--lora-alpha 2", "--lora-alpha needs --lora-rank"),
    ):
        assert cli.main([*argv, "--change", words]) == 2
        assert message in capsys.readouterr().err
    assert cli.main([*argv, "--experts-per-token", "1", "--change", "--bias"]) == 2
    assert "--experts-per-token needs --n-experts" in capsys.readouterr().err
    assert cli.main(argv) == 2
    assert "nothing to try" in capsys.readouterr().err
    assert not (tmp_path / "tries.jsonl").exists()  # no try has begun


@pytest.mark.slow
def test_a_change_of_the_seed_is_seldom_accepted(tmp_path: Path) -> None:
    """60 real tries at small scale: both sides are the same recipe with other seeds."""
    text = write_text(tmp_path / "text.txt")
    losses = [
        train(text, tmp_path / str(seed), seed=seed, max_steps=12, sample_interval=0)
        .run_dir.joinpath("metrics.jsonl")
        .read_text(encoding="utf-8")
        for seed in range(120)
    ]
    finals = [
        [json.loads(line)["loss"] for line in log.splitlines() if '"kind": "eval"' in line][-1]
        for log in losses
    ]
    rng, accepted = np.random.default_rng(0), 0
    spec = TrySpec(alpha=0.05, detect=0.001, max_pairs=20, budget_s=None)
    for _ in range(60):
        order = rng.permutation(len(finals))[:40]
        pairs = [(trial(finals[i]), trial(finals[j])) for i, j in order.reshape(-1, 2)]
        for n in range(3, len(pairs) + 1):
            decision = attempt.judge([a for a, _ in pairs[:n]], [b for _, b in pairs[:n]], spec)
            if decision.verdict:
                accepted += decision.verdict == "better"
                break
    assert accepted <= 4  # 7% of 60
