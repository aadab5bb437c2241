"""Run folders written by an earlier version stay usable: loaded, verified, evaluated, resumed.

tests/fixtures/old_run and old_lora_run were trained by commit 564c98e with the command in their
run.json, and interrupted at step 10 of 20 (report and run.lock are left out). Their run.json says
that the text was /example/*.txt, where no machine has it: the tests put its tokens into the cache,
from which a resume reads them. The expected losses are those of the same commit's own resume.
"""

import json
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import pytest

import glasslm
from glasslm.cli import main

FIXTURES = Path(__file__).parents[1] / "fixtures"
INTERRUPTED_STEP, LAST_STEP = 10, 20


class OldRun(NamedTuple):
    """A fixture, and the losses at step 20 (nats per token) when the earlier version resumed it."""

    name: str
    text: str
    train_loss: float
    val_loss: float


OLD_RUNS = (
    OldRun("old_run", "old_text.txt", 2.512142326682806, 2.5821871294229517),
    OldRun("old_lora_run", "old_tuned_text.txt", 2.7058850284665823, 2.747993712741617),
)


@pytest.fixture(params=OLD_RUNS, ids=lambda old: old.name)
def old(request: pytest.FixtureRequest) -> OldRun:
    return request.param


@pytest.fixture
def run(old: OldRun, tmp_path: Path) -> Path:
    """A copy of the run folder alone, with the tokens of its text in the cache."""
    shutil.copytree(FIXTURES / old.name, tmp_path / old.name)
    assert main(["corpus", "inspect", "--text-file", str(FIXTURES / old.text)]) == 0
    return tmp_path / old.name


def read_metrics(run: Path, kind: str) -> dict[int, dict[str, Any]]:
    """Lines of one kind by step; of evaluations, those on the validation text."""
    lines = map(json.loads, (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
    selected = (line for line in lines if line["kind"] == kind)
    return {line["step"]: line for line in selected if line.get("split", "val") == "val"}


def evaluate(run: Path, capsys: pytest.CaptureFixture[str], *flags: str) -> dict[str, Any]:
    capsys.readouterr()
    assert main(["evaluate", str(run), "--json", *flags]) == 0
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def test_load_generates_the_recorded_sample(run: Path) -> None:
    sample = read_metrics(run, "sample")[INTERRUPTED_STEP]
    model = glasslm.load(run, engine="numpy", threads=1)
    assert model.step == INTERRUPTED_STEP
    text = model.generate(
        sample["prompt"], 200, temperature=sample["temperature"], seed=sample["seed"]
    )
    assert text == sample["text"]
    assert len(text) == 200


def test_verify_finds_no_damage(run: Path) -> None:
    assert main(["verify", str(run)]) == 0
    weights = run / "checkpoints" / "000010" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x01")
    assert main(["verify", str(run)]) == 1


@pytest.mark.parametrize("step", [0, INTERRUPTED_STEP])
def test_evaluate_measures_the_recorded_loss(
    run: Path, step: int, capsys: pytest.CaptureFixture[str]
) -> None:
    recorded = read_metrics(run, "eval")[step]
    measured = evaluate(run, capsys, "--checkpoint", str(step))
    assert (measured["step"], measured["tokens"]) == (step, recorded["tokens"])
    assert measured["loss"] == pytest.approx(recorded["loss"], rel=1e-4)


def test_resume_reaches_the_losses_of_the_earlier_version(
    old: OldRun, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    old_steps = read_metrics(run, "step")
    assert main(["resume", str(run)]) == 0
    steps, evals = read_metrics(run, "step"), read_metrics(run, "eval")
    assert list(steps) == list(range(1, LAST_STEP + 1))
    assert all(steps[step] == line for step, line in old_steps.items())  # the lines up to step 10
    assert read_metrics(run, "end")[LAST_STEP]["status"] == "finished"
    assert steps[LAST_STEP]["loss"] == pytest.approx(old.train_loss, rel=1e-4)
    assert evals[LAST_STEP]["loss"] == pytest.approx(old.val_loss, rel=1e-4)
    assert evaluate(run, capsys)["loss"] == pytest.approx(old.val_loss, rel=1e-4)
    assert main(["verify", str(run)]) == 0
