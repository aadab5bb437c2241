"""A new variant takes four places: the word, a row of the table, one NumPy op, one torch op.

Each test copies the source, makes these edits and no others, and runs the commands with the copy.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

import glasslm
from small_runs import write_text

SOURCE = Path(glasslm.__file__).parent
CONFIG, TABLE = "config/model_config.py", "model/parameters.py"
NUMPY_OPS, TORCH_LAYERS = "engines/numpy/ops.py", "engines/torch/layers.py"
NUMPY_POSITIONS, TORCH_POSITIONS = "engines/numpy/positions.py", "engines/torch/positions.py"


class Edit(NamedTuple):
    """One of the places: `added` goes before or after the text `anchor` of a file."""

    path: str
    anchor: str
    added: str
    before: bool = False


WORD = {
    "feedforward": 'FeedForward = Literal["swiglu", ',
    "norm": 'Norm = Literal["rmsnorm", ',
    "position": 'Position = Literal["none", ',
}
NUMPY_SINE = '''
def sine(x: Array, new: New) -> tuple[Array, Callable[[Array], Array]]:
    """x + sin(x)² (Snake with a = 1), any shape. arXiv:2006.08195."""
    y = x + np.sin(x) ** 2

    def backward(dy: Array) -> Array:
        return dy * (1 + np.sin(2 * x))

    return y, backward


'''
NUMPY_NORM = '''
def mean_norm(
    x: Array, gain: Array, new: New, eps: float
) -> tuple[Array, Callable[[Array], tuple[Array, Array]]]:
    """x (N, D) divided by 1 + its mean square, times gain (D,)."""
    D = x.shape[-1]
    scale = 1 / (1 + np.mean(x * x, -1, keepdims=True))
    unit = x * scale

    def backward(dy: Array) -> tuple[Array, Array]:
        dunit = dy * gain
        dscale = np.sum(dunit * x, -1, keepdims=True)
        return dunit * scale - dscale * scale * scale * 2 / D * x, np.sum(dy * unit, 0)

    return unit * gain, backward


'''
TORCH_NORM = '''
class MeanNorm(nn.Module):
    """x (..., D) divided by 1 + its mean square, times a gain (D,)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width))

    def forward(self, x: Tensor) -> Tensor:
        return x / (1 + x.square().mean(-1, keepdim=True)) * self.weight.to(x.dtype)


'''
NUMPY_RAMP = """
def _ramp(c: ModelConfig, dtype: DTypeLike) -> Array:
    ramp = np.linspace(0, 1, c.block_size * c.d_model)
    return ramp.reshape(c.block_size, c.d_model).astype(dtype)


"""
TORCH_RAMP = '''
class RampPositions(PositionEncoding):
    """A fixed ramp, added to the embeddings."""

    table: Tensor

    def __init__(self, c: ModelConfig, dtype: DTypeLike) -> None:
        super().__init__(c, dtype)
        ramp = np.linspace(0, 1, c.block_size * c.d_model).reshape(c.block_size, c.d_model)
        self.register_buffer("table", torch.from_numpy(ramp.astype(dtype)), persistent=False)

    def add_to(self, x: Tensor, positions: Index) -> Tensor:
        return x + self.table[positions]


'''
NUMPY_ACTIVATIONS = "ACTIVATIONS: dict[FeedForward, Unary] = {"
TORCH_ACTIVATIONS = "ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"
NUMPY_NORMS = "NORMS: dict[Norm, NormOp] = {"
TORCH_NORMS = "NORMS: dict[str, Callable[[ModelConfig], nn.Module]] = {"
NUMPY_KINDS = "POSITIONS: dict[Position, PositionTables] = {"
TORCH_KINDS = "POSITIONS: dict[str, type[PositionEncoding]] = {"
SINE_OPS = [
    Edit(NUMPY_OPS, "class NormOp(NamedTuple):", NUMPY_SINE, before=True),
]
VARIANTS: dict[str, list[Edit]] = {
    "feedforward snake": [
        Edit(CONFIG, WORD["feedforward"], '"snake", '),
        *SINE_OPS,
        Edit(NUMPY_OPS, NUMPY_ACTIVATIONS, '"snake": sine, '),
        Edit(TORCH_LAYERS, TORCH_ACTIVATIONS, '"snake": lambda x: x + torch.sin(x) ** 2, '),
    ],
    "feedforward snakeglu": [
        Edit(CONFIG, WORD["feedforward"], '"snakeglu", '),
        Edit(
            CONFIG, 'frozenset({"swiglu", ', '"snakeglu", '
        ),  # beside the word: its gate's weights
        *SINE_OPS,
        Edit(NUMPY_OPS, NUMPY_ACTIVATIONS, '"snakeglu": sine, '),
        Edit(TORCH_LAYERS, TORCH_ACTIVATIONS, '"snakeglu": lambda x: x + torch.sin(x) ** 2, '),
    ],
    "norm meannorm": [
        Edit(CONFIG, WORD["norm"], '"meannorm", '),
        Edit(NUMPY_OPS, "class NormOp(NamedTuple):", NUMPY_NORM, before=True),
        Edit(NUMPY_OPS, NUMPY_NORMS, '"meannorm": NormOp(mean_norm, ("weight",)), '),
        Edit(TORCH_LAYERS, "NORMS: dict[str", TORCH_NORM, before=True),
        Edit(TORCH_LAYERS, TORCH_NORMS, '"meannorm": lambda c: MeanNorm(c.d_model), '),
    ],
    "position ramp": [
        Edit(CONFIG, WORD["position"], '"ramp", '),
        Edit(NUMPY_POSITIONS, "# A model whose parameter table", NUMPY_RAMP, before=True),
        Edit(NUMPY_POSITIONS, NUMPY_KINDS, '"ramp": PositionTables(vectors=_ramp), '),
        Edit(TORCH_POSITIONS, "POSITIONS: dict[str", TORCH_RAMP, before=True),
        Edit(TORCH_POSITIONS, TORCH_KINDS, '"ramp": RampPositions, '),
    ],
}
SMALL = (
    "--preset tiny --d-model 32 --n-layers 2 --n-heads 2 --block-size 32 --batch-size 8"
    " --max-steps 12 --eval-interval 6 --sample-interval 0 --threads 1 --tokenizer char"
)


def copy_with_edits(edits: list[Edit], folder: Path) -> Path:
    """A copy of the source with these edits; returns the folder for PYTHONPATH."""
    copy = folder / "src" / "glasslm"
    shutil.copytree(SOURCE, copy, ignore=shutil.ignore_patterns("__pycache__"))
    for edit in edits:
        path = copy / edit.path
        text = path.read_text(encoding="utf-8")
        assert text.count(edit.anchor) == 1, (edit.path, edit.anchor)
        parts = (edit.added, edit.anchor) if edit.before else (edit.anchor, edit.added)
        path.write_text(text.replace(edit.anchor, "".join(parts)), encoding="utf-8")
    return folder / "src"


# Runs commands in one process, because each start takes seconds; prints their codes and outputs.
RUN_COMMANDS = """
import contextlib, io, json, sys
from glasslm import cli
results = []
for arguments in json.loads(sys.argv[1]):
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = cli.main(arguments)
    results.append((code, out.getvalue(), err.getvalue()))
print(json.dumps(results))
"""


class Result(NamedTuple):
    """The end of a command."""

    code: int
    out: str
    err: str


def run_commands(source: Path, folder: Path, *commands: list[str]) -> list[Result]:
    done = subprocess.run(
        [sys.executable, "-c", RUN_COMMANDS, json.dumps(commands)],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(source)},
        capture_output=True,
        encoding="utf-8",
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    return [Result(*result) for result in json.loads(done.stdout.splitlines()[-1])]


@pytest.mark.slow
@pytest.mark.parametrize("name", VARIANTS)
def test_a_new_variant_takes_four_places(name: str, tmp_path: Path) -> None:
    pytest.importorskip("torch")
    switch, word = name.split()
    source = copy_with_edits(VARIANTS[name], tmp_path)
    assert len({edit.path for edit in VARIANTS[name]}) <= 4
    write_text(tmp_path / "text.txt")
    train = ["train", *SMALL.split(), f"--{switch}", word, "--json", "--text-file", "text.txt"]
    by_numpy, by_torch, checked, diagnosed, generated, evaluated, *exports = run_commands(
        source,
        tmp_path,
        [*train, *"--run-dir numpy --engine numpy --precision fp64".split()],  # noqa: SIM905
        [*train, *"--run-dir torch --engine torch --precision fp64".split()],  # noqa: SIM905
        ["check", "numpy"],
        ["diagnose", "numpy"],
        ["generate", "numpy", "--prompt", "the", "--max-new-tokens", "40"],
        ["evaluate", "torch"],
        ["export", "numpy", "--to", "hf", "--out", "out-hf"],
        ["export", "numpy", "--to", "gguf", "--out", "out-gguf"],
    )
    losses = {}
    for engine, trained in (("numpy", by_numpy), ("torch", by_torch)):
        assert trained.code == 0, trained.err
        assert "of memory" in trained.err  # the estimate
        losses[engine] = json.loads(trained.out.splitlines()[-1])["best_loss"]
        config = json.loads((tmp_path / engine / "run.json").read_text(encoding="utf-8"))["config"]
        assert config["model"][switch] == word
    assert losses["numpy"] == pytest.approx(losses["torch"], rel=1e-9)
    for done in (checked, diagnosed, generated, evaluated):
        assert done.code in ((0, 1) if done is diagnosed else (0,)), done.out + done.err
        assert "Traceback" not in done.err
    for done in exports:
        assert done.code == 2, done.out + done.err
        assert word in done.err
        assert "Traceback" not in done.err
        errors = [line for line in done.err.splitlines() if line.startswith("glasslm")]
        assert len(errors) == 1
