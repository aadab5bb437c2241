"""How each kind of position reads on past the length it was trained at: loss against the position in the text, drawn.

    python benchmarks/extrapolation.py [--text-file PATH --steps 250 --threads 1 --out docs/extrapolation.png]

One small model for each kind (none, sinusoidal, learned, rope, alibi; rope with a sliding window) is trained at 64
tokens and then read in contexts of 256, on validation text. Rope is also stretched to 256, by linear scaling and by
NTK, as it is and after some more steps at 256 tokens. Windows of text begin so near each other that every part of a
curve is of (almost) the same text. The models are alike but for the position, with the same seed and batches.
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

import glasslm
from glasslm.data import shards
from glasslm.runs.run_folder import Run
from glasslm.text import tell
from paired import heading

BLOCK, LONG, BIN = (
    64,
    256,
    16,
)  # tokens: in training, read at most, and taken together in the figure
WINDOWS = 600  # of text, one every BIN tokens
FURTHER = 40  # steps at LONG tokens
TRAINED: dict[str, dict[str, Any]] = {
    "none": {"position": "none"},
    "sinusoidal": {"position": "sinusoidal"},
    "learned": {"position": "learned"},
    "rope": {"position": "rope"},
    "alibi": {"position": "alibi"},
    "rope-window": {"position": "rope", "window": 32},
}
STRETCHED: dict[str, dict[str, Any]] = {  # from "rope", at LONG tokens
    "unscaled-further": {},
    "linear-further": {"rope_scaling": "linear", "rope_factor": LONG / BLOCK},
    "ntk-further": {"rope_scaling": "ntk", "rope_factor": LONG / BLOCK},
}


class Line(NamedTuple):
    """One line of the figure: a trained model and the way it is read."""

    run: str
    reading: dict[str, Any]
    colour: str  # of Okabe and Ito's palette, told apart by colour-blind readers
    style: str


AT_LENGTH = {"context": LONG}
LINES = {
    "no positions": Line("none", AT_LENGTH, "#000000", "-"),
    "sinusoidal": Line("sinusoidal", AT_LENGTH, "#e69f00", "-"),
    "learned": Line("learned", {}, "#cc79a7", "-"),
    "rope": Line("rope", AT_LENGTH, "#0072b2", "-"),
    "rope, linear x4": Line("rope", AT_LENGTH | {"rope_scaling": "linear"}, "#0072b2", "--"),
    "rope, NTK x4": Line("rope", AT_LENGTH | {"rope_scaling": "ntk"}, "#0072b2", ":"),
    "rope, 40 steps more": Line("unscaled-further", {}, "#56b4e9", "-"),
    "linear x4, 40 steps more": Line("linear-further", {}, "#56b4e9", "--"),
    "NTK x4, 40 steps more": Line("ntk-further", {}, "#56b4e9", ":"),
    "rope, window 32": Line("rope-window", AT_LENGTH, "#009e73", "-"),
    "alibi": Line("alibi", AT_LENGTH, "#d55e00", "-."),
}


def train(folder: Path, args: argparse.Namespace) -> dict[str, Run]:
    text = {"text_file": args.text_file} if args.text_file else {"corpus": "shakespeare"}
    common = text | {
        "val_fraction": 0.02,
        "sample_interval": 0,
        "engine": "numpy",
        "threads": args.threads,
    }
    runs: dict[str, Run] = {}

    def run(name: str, steps: int, **settings: Any) -> None:
        began = time.perf_counter()
        at_the_end = dict.fromkeys(("eval_interval", "checkpoint_interval", "log_interval"), steps)
        settings = (
            common | {"max_steps": steps, "warmup_steps": steps // 10} | at_the_end | settings
        )
        runs[name] = glasslm.train(run_dir=folder / name, **settings)
        seconds = time.perf_counter() - began
        print(
            f"{name:16} validation loss {runs[name].history.best_val_loss:.4f}, {seconds:.0f} s",
            flush=True,
        )

    for name, switches in TRAINED.items():
        run(name, args.steps, block_size=BLOCK, batch_size=32, **switches)
    for name, switches in STRETCHED.items():
        run(name, FURTHER, init_from=runs["rope"].path, block_size=LONG, batch_size=8, **switches)
    return runs


def losses_by_position(run: Run, reading: dict[str, Any], threads: int) -> np.ndarray:
    """(bins,) mean nats a token, in bins of positions, over windows at the beginning of the validation text."""
    model = glasslm.load(run.path, "latest", engine="numpy", threads=threads, **reading)
    text = shards.of_run(run.config.data, run.record["data"], run.tokenizer, tell).val.tokens
    width = model.config.model.block_size
    starts = BIN * np.arange(min(WINDOWS, (len(text) - LONG - 1) // BIN))
    sums = np.zeros(width)
    for first in range(0, len(starts), 32):
        rows = starts[first : first + 32, None] + np.arange(width)
        sums += model.engine.losses(
            text[rows].astype(np.int64), text[rows + 1].astype(np.int64)
        ).sum(0)
    return (sums / len(starts)).reshape(-1, BIN).mean(1)


def draw(curves: dict[str, np.ndarray], path: Path) -> None:
    figure = Figure(figsize=(9, 5.4), layout="constrained")
    axes = figure.subplots()
    axes.axvspan(0, BLOCK, color="#9a9a9a", alpha=0.15, linewidth=0)
    axes.text(
        BLOCK / 2,
        0.98,
        "as trained",
        ha="center",
        va="top",
        color="#444444",
        transform=axes.get_xaxis_transform(),
    )
    for name, curve in curves.items():
        middles = BIN * np.arange(len(curve)) + BIN / 2
        axes.plot(middles, curve, LINES[name].style, color=LINES[name].colour, linewidth=1.9)
    line_height = float(np.ptp(axes.get_ylim())) / 20
    ends = {name: float(curve[-1]) for name, curve in curves.items() if len(curve) == LONG // BIN}
    heights = dict(zip(ends, spread(list(ends.values()), line_height)))
    for name, curve in curves.items():
        end, colour = BIN * len(curve), LINES[name].colour
        leader = {"arrowstyle": "-", "color": colour, "linewidth": 0.5, "relpos": (0, 0.5)}
        axes.annotate(
            name, (end - BIN / 2, curve[-1]), (end + 6, heights.get(name, curve[-1] + line_height)), va="center",
            fontsize=9, color=colour, arrowprops=leader,
        )  # fmt: skip
    axes.set(
        xlim=(0, LONG + 80),
        xticks=range(0, LONG + 1, BLOCK),
        xlabel="position in the text, tokens (characters)",
    )
    axes.set_ylim(bottom=min(heights.values()) - line_height)
    axes.set_ylabel("loss at that position, nats per token")
    axes.set_title(
        "Reading on past the training length", loc="left", fontsize=11, fontweight="bold"
    )
    axes.grid(color="#9a9a9a", alpha=0.3, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)


def spread(values: list[float], apart: float) -> list[float]:
    """The values, moved so that neighbours in size are `apart` at least, and about as far up as down."""
    order, moved = np.argsort(values), np.array(values)
    for _ in range(200):
        for below, above in itertools.pairwise(order):
            missing = max(0.0, apart - (moved[above] - moved[below]))
            moved[below] -= missing / 2
            moved[above] += missing / 2
    return moved.tolist()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--text-file", help="instead of the corpus shakespeare")
    parser.add_argument("--steps", type=int, default=250)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument(
        "--out", type=Path, default=Path(__file__).parents[1] / "docs" / "extrapolation.png"
    )
    args = parser.parse_args()
    print(heading("numpy", threads=args.threads))
    with tempfile.TemporaryDirectory() as folder:
        runs = train(Path(folder), args)
        curves = {
            name: losses_by_position(runs[line.run], line.reading, args.threads)
            for name, line in LINES.items()
        }
    shown = range(0, LONG, 2 * BIN)
    print("mean loss at tokens      ", *(f"{start:4}-{start + BIN:<3}" for start in shown))
    for name, curve in curves.items():
        print(
            f"{name:24}  ",
            *(f"{curve[s // BIN]:8.3f}" if s // BIN < len(curve) else f"{'-':>8}" for s in shown),
        )
    draw(curves, args.out)
    print(f"figure: {args.out.name}")


if __name__ == "__main__":
    main()
