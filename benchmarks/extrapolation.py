"""How each kind of position reads on past the length it was trained at: loss against the position in the text, drawn.

    python benchmarks/extrapolation.py [--text-file PATH --steps 300 --threads 1 --out docs/extrapolation.png]

One small model for each kind (none, sinusoidal, learned, rope, alibi; rope with a sliding window) is trained at 64
tokens and then read in contexts of 256, on validation text; rope also stretched to 256, by linear scaling and by NTK.
Windows of text begin so near each other that every part of the curves is of (almost) the same text. The models are alike
but for the position, with the same seed and batches.
"""

from __future__ import annotations

import argparse
import itertools
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import ScalarFormatter

import glasslm
from glasslm import tokens
from glasslm.wording import tell
from paired import heading

BLOCK, LONG, BIN = 64, 256, 16  # tokens: in training, read at most, and taken together in the figure
WINDOWS = 1000  # of text, one every BIN tokens
TRAINED: dict[str, dict[str, Any]] = {
    "none": {"position": "none"},
    "sinusoidal": {"position": "sinusoidal"},
    "learned": {"position": "learned"},
    "rope": {"position": "rope"},
    "alibi": {"position": "alibi"},
    "rope, window 32": {"position": "rope", "window": 32},
}


class Line(NamedTuple):
    """One line of the figure: a trained model and the way it is read."""

    trained: str
    reading: dict[str, Any]
    colour: str  # of Okabe and Ito's palette, told apart by colour-blind readers
    style: str


STRETCHED = {"context": LONG}
LINES = {
    "no positions": Line("none", STRETCHED, "#000000", "-"),
    "sinusoidal": Line("sinusoidal", STRETCHED, "#e69f00", "-"),
    "learned": Line("learned", {}, "#cc79a7", "-"),
    "rope": Line("rope", STRETCHED, "#0072b2", "-"),
    "rope, linear x4": Line("rope", {"context": LONG, "rope_scaling": "linear"}, "#0072b2", "--"),
    "rope, NTK x4": Line("rope", {"context": LONG, "rope_scaling": "ntk"}, "#0072b2", ":"),
    "rope, window 32": Line("rope, window 32", STRETCHED, "#009e73", "-"),
    "alibi": Line("alibi", STRETCHED, "#d55e00", "-"),
}


def train(folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    runs = {}
    for name, switches in TRAINED.items():
        began = time.perf_counter()
        runs[name] = glasslm.train(
            run_dir=folder / name.replace(", ", "-").replace(" ", "-"), block_size=BLOCK, batch_size=32, val_fraction=0.02,
            max_steps=args.steps, warmup_steps=args.steps // 10, eval_interval=args.steps, sample_interval=0,
            checkpoint_interval=args.steps, log_interval=args.steps, engine="numpy", threads=args.threads,
            **({"text_file": args.text_file} if args.text_file else {"corpus": "shakespeare"}), **switches,
        )  # fmt: skip
        seconds = time.perf_counter() - began
        print(f"{name:16} validation loss {runs[name].history.best_val_loss:.4f}, {seconds:.0f} s", flush=True)
    return runs


def losses_by_position(run: Any, reading: dict[str, Any], threads: int) -> np.ndarray:
    """(bins,) mean nats a token, in bins of positions, over all windows of the validation text."""
    model = glasslm.load(run.path, engine="numpy", threads=threads, **reading)
    text = tokens.of_run(run.config.data, run.record["data"], run.tokenizer, tell).val.tokens
    width = model.config.model.block_size
    starts = BIN * np.arange(min(WINDOWS, (len(text) - width - 1) // BIN))
    sums = np.zeros(width)
    for first in range(0, len(starts), 32):
        rows = starts[first : first + 32, None] + np.arange(width)
        sums += model.engine.losses(text[rows].astype(np.int64), text[rows + 1].astype(np.int64)).sum(0)
    return (sums / len(starts)).reshape(-1, BIN).mean(1)


def draw(curves: dict[str, np.ndarray], path: Path) -> None:
    figure = Figure(figsize=(8.5, 5), layout="constrained")
    axes = figure.subplots()
    axes.axvspan(0, BLOCK, color="#9a9a9a", alpha=0.15, linewidth=0)
    axes.text(
        BLOCK / 2, 0.98, "as trained", ha="center", va="top", color="#444444", transform=axes.get_xaxis_transform()
    )
    ends = []
    for name, curve in curves.items():
        line = LINES[name]
        middle = BIN * np.arange(len(curve)) + BIN / 2
        axes.plot(middle, curve, line.style, color=line.colour, linewidth=1.9)
        ends.append((np.log(curve[-1]), middle[-1], name))
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(ScalarFormatter())
    axes.yaxis.set_minor_formatter(ScalarFormatter())
    low, high = np.log(axes.get_ylim())
    for (_, x, name), y in zip(ends, spread([end for end, _, _ in ends], (high - low) / 22)):
        axes.annotate(
            name, (x, curves[name][-1]), (LONG + 4 if x > BLOCK else BLOCK + 4, np.exp(y)), va="center", fontsize=9,
            color=LINES[name].colour, arrowprops={"arrowstyle": "-", "color": LINES[name].colour, "linewidth": 0.5},
        )  # fmt: skip
    axes.set(xlim=(0, LONG + 62), xticks=range(0, LONG + 1, BLOCK), xlabel="position in the text, tokens (characters)")
    axes.set_ylabel("loss at that position, nats per token")
    axes.set_title("Reading on past the training length", loc="left", fontsize=11, fontweight="bold")
    axes.grid(color="#9a9a9a", alpha=0.3, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)


def spread(values: list[float], apart: float) -> list[float]:
    """The values, moved so that neighbours in size are `apart` at least, and about as far up as down."""
    order = np.argsort(values)
    moved = np.array(values, float)
    for _ in range(200):
        for below, above in itertools.pairwise(order):
            missing = apart - (moved[above] - moved[below])
            if missing > 0:
                moved[below] -= missing / 2
                moved[above] += missing / 2
    return moved.tolist()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text-file", help="instead of the corpus shakespeare")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path(__file__).parents[1] / "docs" / "extrapolation.png")
    args = parser.parse_args()
    print(heading("numpy", threads=args.threads))
    with tempfile.TemporaryDirectory() as folder:
        runs = train(Path(folder), args)
        curves = {
            name: losses_by_position(runs[line.trained], line.reading, args.threads) for name, line in LINES.items()
        }
    shown = range(0, LONG, 2 * BIN)
    print("mean loss at tokens  ", *(f"{start:4}-{start + BIN:<3}" for start in shown))
    for name, curve in curves.items():
        print(f"{name:20}  ", *(f"{curve[s // BIN]:8.3f}" if s // BIN < len(curve) else f"{'-':>8}" for s in shown))
    draw(curves, args.out)
    print(f"figure: {args.out}")


if __name__ == "__main__":
    main()
