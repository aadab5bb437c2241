"""Loss by position in the text, past the training length, for each kind of position; with a figure.

    python benchmarks/extrapolation.py [--text-file PATH --steps 250 --threads 1]
        [--out docs/extrapolation.png]

One small model for each kind (none, sinusoidal, learned, rope, alibi; rope with a sliding window)
trains at 64 tokens and is then evaluated in contexts of 256, on validation text. Rope is also
extended to 256, by linear scaling and by NTK, without and with more training steps at 256 tokens.
The windows of text overlap, so that every part of a curve covers almost the same text. The models
differ only in their positions; seed and batches are the same.
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
from glasslm.data.token_file import read_windows
from glasslm.runs.run_folder import Run
from glasslm.text import notify
from paired import heading

TRAIN_TOKENS, EVAL_TOKENS = 64, 256  # context lengths
BIN_TOKENS = 16  # positions per point of a curve
MAX_WINDOWS = 600  # windows of text, one every BIN_TOKENS tokens
EXTENSION_STEPS = 40  # training steps at EVAL_TOKENS tokens
BASE_RUNS: dict[str, dict[str, Any]] = {
    "none": {"position": "none"},
    "sinusoidal": {"position": "sinusoidal"},
    "learned": {"position": "learned"},
    "rope": {"position": "rope"},
    "alibi": {"position": "alibi"},
    "rope-window": {"position": "rope", "window": 32},
}
# These start from the weights of "rope" and train at EVAL_TOKENS tokens.
EXTENDED_RUNS: dict[str, dict[str, Any]] = {
    "unscaled-further": {},
    "linear-further": {"rope_scaling": "linear", "rope_factor": EVAL_TOKENS / TRAIN_TOKENS},
    "ntk-further": {"rope_scaling": "ntk", "rope_factor": EVAL_TOKENS / TRAIN_TOKENS},
}


class Curve(NamedTuple):
    """One curve of the figure: a trained run, and the settings it is evaluated with."""

    run: str
    settings: dict[str, Any]
    colour: str  # from Okabe and Ito's palette, which colour-blind readers can distinguish
    style: str


AT_EVAL_LENGTH = {"context": EVAL_TOKENS}
CURVES = {
    "no positions": Curve("none", AT_EVAL_LENGTH, "#000000", "-"),
    "sinusoidal": Curve("sinusoidal", AT_EVAL_LENGTH, "#e69f00", "-"),
    "learned": Curve("learned", {}, "#cc79a7", "-"),
    "rope": Curve("rope", AT_EVAL_LENGTH, "#0072b2", "-"),
    "rope, linear x4": Curve("rope", AT_EVAL_LENGTH | {"rope_scaling": "linear"}, "#0072b2", "--"),
    "rope, NTK x4": Curve("rope", AT_EVAL_LENGTH | {"rope_scaling": "ntk"}, "#0072b2", ":"),
    "rope, 40 steps more": Curve("unscaled-further", {}, "#56b4e9", "-"),
    "linear x4, 40 steps more": Curve("linear-further", {}, "#56b4e9", "--"),
    "NTK x4, 40 steps more": Curve("ntk-further", {}, "#56b4e9", ":"),
    "rope, window 32": Curve("rope-window", AT_EVAL_LENGTH, "#009e73", "-"),
    "alibi": Curve("alibi", AT_EVAL_LENGTH, "#d55e00", "-."),
}


def train(folder: Path, args: argparse.Namespace) -> dict[str, Run]:
    """Train all runs; returns them by name."""
    text = {"text_file": args.text_file} if args.text_file else {"corpus": "shakespeare"}
    common = text | {
        "preset": "tiny",
        "val_fraction": 0.02,
        "sample_interval": 0,
        "engine": "numpy",
        "threads": args.threads,
    }
    runs: dict[str, Run] = {}

    def run(name: str, steps: int, **settings: Any) -> None:
        start = time.perf_counter()
        intervals = dict.fromkeys(("eval_interval", "checkpoint_interval", "log_interval"), steps)
        settings = common | {"max_steps": steps, "warmup_steps": steps // 10} | intervals | settings
        runs[name] = glasslm.train(run_dir=folder / name, **settings)
        seconds = time.perf_counter() - start
        print(
            f"{name:16} validation loss {runs[name].history.best_val_loss:.4f}, {seconds:.0f} s",
            flush=True,
        )

    for name, flags in BASE_RUNS.items():
        run(name, args.steps, block_size=TRAIN_TOKENS, batch_size=32, **flags)
    for name, flags in EXTENDED_RUNS.items():
        run(
            name,
            EXTENSION_STEPS,
            init_from=runs["rope"].path,
            block_size=EVAL_TOKENS,
            batch_size=8,
            **flags,
        )
    return runs


def losses_by_position(run: Run, settings: dict[str, Any], threads: int) -> np.ndarray:
    """Mean loss by bin of positions (bins,), in nats per token.

    The windows are from the beginning of the validation text.
    """
    model = glasslm.load(run.path, "latest", engine="numpy", threads=threads, **settings)
    text = run.dataset(notify).val.tokens
    width = model.config.model.block_size
    starts = BIN_TOKENS * np.arange(min(MAX_WINDOWS, (len(text) - EVAL_TOKENS - 1) // BIN_TOKENS))
    sums = np.zeros(width)
    for first in range(0, len(starts), 32):
        rows = read_windows(text, starts[first : first + 32], width + 1)
        sums += model.engine.losses(rows[:, :-1], rows[:, 1:]).sum(0)
    return (sums / len(starts)).reshape(-1, BIN_TOKENS).mean(1)


def draw(curves: dict[str, np.ndarray], path: Path) -> None:
    """Save a figure of the curves, each of shape (bins,)."""
    figure = Figure(figsize=(9, 5.4), layout="constrained")
    axes = figure.subplots()
    axes.axvspan(0, TRAIN_TOKENS, color="#9a9a9a", alpha=0.15, linewidth=0)
    axes.text(
        TRAIN_TOKENS / 2,
        0.98,
        "training length",
        ha="center",
        va="top",
        color="#444444",
        transform=axes.get_xaxis_transform(),
    )
    for name, curve in curves.items():
        middles = BIN_TOKENS * np.arange(len(curve)) + BIN_TOKENS / 2
        axes.plot(middles, curve, CURVES[name].style, color=CURVES[name].colour, linewidth=1.9)
    line_height = float(np.ptp(axes.get_ylim())) / 20
    ends = {
        name: float(curve[-1])
        for name, curve in curves.items()
        if len(curve) == EVAL_TOKENS // BIN_TOKENS
    }
    heights = dict(zip(ends, spread_labels(list(ends.values()), line_height)))
    for name, curve in curves.items():
        end, colour = BIN_TOKENS * len(curve), CURVES[name].colour
        leader = {"arrowstyle": "-", "color": colour, "linewidth": 0.5, "relpos": (0, 0.5)}
        axes.annotate(
            name, (end - BIN_TOKENS / 2, curve[-1]),
            (end + 6, heights.get(name, curve[-1] + line_height)), va="center",
            fontsize=9, color=colour, arrowprops=leader,
        )  # fmt: skip
    axes.set(
        xlim=(0, EVAL_TOKENS + 80),
        xticks=range(0, EVAL_TOKENS + 1, TRAIN_TOKENS),
        xlabel="position in the text, tokens (characters)",
    )
    axes.set_ylim(bottom=min(heights.values()) - line_height)
    axes.set_ylabel("loss at that position, nats per token")
    axes.set_title("Loss past the training length", loc="left", fontsize=11, fontweight="bold")
    axes.grid(color="#9a9a9a", alpha=0.3, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)


def spread_labels(values: list[float], min_gap: float) -> list[float]:
    """Label heights near `values` that are at least `min_gap` apart.

    Two values that are too close move by the same distance, one up and one down.
    """
    order, moved = np.argsort(values), np.array(values)
    for _ in range(200):
        for below, above in itertools.pairwise(order):
            missing = max(0.0, min_gap - (moved[above] - moved[below]))
            moved[below] -= missing / 2
            moved[above] += missing / 2
    return moved.tolist()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--text-file", help="text to train on instead of the corpus shakespeare")
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
            name: losses_by_position(runs[line.run], line.settings, args.threads)
            for name, line in CURVES.items()
        }
    starts = range(0, EVAL_TOKENS, 2 * BIN_TOKENS)
    print("mean loss at tokens      ", *(f"{start:4}-{start + BIN_TOKENS:<3}" for start in starts))
    for name, curve in curves.items():
        print(
            f"{name:24}  ",
            *(
                f"{curve[s // BIN_TOKENS]:8.3f}" if s // BIN_TOKENS < len(curve) else f"{'-':>8}"
                for s in starts
            ),
        )
    draw(curves, args.out)
    print(f"figure: {args.out.name}")


if __name__ == "__main__":
    main()
