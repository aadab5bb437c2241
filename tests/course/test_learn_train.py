"""A file's operation is trained beside the engine's own, and told from it or not."""

import dataclasses
from pathlib import Path

import pytest

from glasslm.cli import main
from glasslm.config.schema import ModelConfig
from glasslm.course.learn import training
from glasslm.text import ignore_message

NORM = """
import numpy as np

def rms_norm(x, gain, eps=1e-5):
    r = 1 / np.sqrt((x * x).mean(-1, keepdims=True) + eps)
    unit = x * r

    def backward(dy):
        du = dy * gain
        dx = r * (du - unit * (du * unit).mean(-1, keepdims=True))
        return dx, (dy * unit).sum(0)

    return unit * gain, backward
"""
SHORT_NORM = NORM.replace(" - unit * (du * unit).mean(-1, keepdims=True)", "")
ROPE = """
import numpy as np

def rope(x, cos, sin):
    c, s = cos[:, None], sin[:, None]

    def turn(x, s):
        a, b = np.split(x, 2, -1)
        return np.concatenate([a * c - b * s, b * c + a * s], -1)

    return turn(x, s), lambda dy: turn(dy, -s)
"""
ADAMW = """
import numpy as np

def adamw(p, g, m, v, *, t, lr, decay, betas, eps):
    m[...] = betas[0] * m + (1 - betas[0]) * g
    v[...] = betas[1] * v + (1 - betas[1]) * g * g
    p *= 1 - lr * decay
    p -= lr * (m / (1 - betas[0]**t)) / (np.sqrt(v / (1 - betas[1]**t)) + eps)
"""


@pytest.fixture
def small_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model and a number of steps that train in a second."""
    tiny = training.preset_config("tiny")
    model = ModelConfig(d_model=16, n_layers=1, n_heads=2, block_size=16)
    train = dataclasses.replace(tiny.train, batch_size=4)
    small = dataclasses.replace(tiny, model=model, train=train)
    monkeypatch.setattr(training, "preset_config", lambda name: small)
    monkeypatch.setattr(training, "MAX_STEPS", 30)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder, with a text."""
    monkeypatch.chdir(tmp_path)
    text = " ".join(f"the {n % 7} cats sat on {n % 5} mats" for n in range(2000))
    (tmp_path / "text.txt").write_text(text)
    return tmp_path


@pytest.mark.usefixtures("small_model")
@pytest.mark.parametrize(
    ("text", "is_same"),
    [
        (NORM, True),
        (SHORT_NORM, False),
        (ROPE, True),
        (ROPE.replace("turn(x, s),", "turn(x, -s),").replace("turn(dy, -s)", "turn(dy, s)"), False),
        (ROPE.replace("turn(dy, -s)", "turn(dy, s)"), False),
        (ADAMW, True),
        (ADAMW.replace("    p *= 1 - lr * decay\n", ""), False),
    ],
    ids=[
        "norm",
        "norm without a term",
        "rope",
        "rope the other way",
        "rope with a wrong backward",
        "adamw",
        "adamw without decay",
    ],
)
def test_the_curves_are_the_same_or_part(text: str, is_same: bool, folder: Path) -> None:
    (folder / "own.py").write_text(text)
    comparison = training.train_with_file(
        "own.py", "10m", text_file=("text.txt",), out=folder / "out", notify=ignore_message
    )
    assert comparison.exit_code == 0
    assert (comparison.first_difference is None) == is_same
    assert ("the same to 2e-07 in the first 5 steps" in str(comparison)) == is_same
    assert len(comparison.curves[0]) == 30
    assert comparison.curves[1][0, 0] == pytest.approx(comparison.curves[1][1, 0], rel=1e-5)
    comparison.draw(folder / "curves.png")
    assert (folder / "curves.png").read_bytes()[:4] == b"\x89PNG"


@pytest.mark.usefixtures("small_model")
def test_a_fault_stops_before_any_run(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "own.py").write_text("def rms_norm(x, gain, eps):\n    return x / None\n")
    arguments = ["own.py", "--text-file", "text.txt", "--out", "out"]
    assert main(["learn", "train", *arguments]) == 2
    assert "own.py, line 2: rms_norm" in capsys.readouterr().err
    assert not (folder / "out").exists()


@pytest.mark.usefixtures("small_model")
def test_a_budget_for_no_curve_is_refused(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "own.py").write_text(NORM)
    arguments = ["own.py", "--text-file", "text.txt", "--budget", "0.001s"]
    assert main(["learn", "train", *arguments]) == 2
    assert "--budget is 0.001s" in capsys.readouterr().err
