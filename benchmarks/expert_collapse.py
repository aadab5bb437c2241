"""Use of the experts with and without the balance loss, in a small mixture of experts.

    python benchmarks/expert_collapse.py [--text-file PATH | --corpus shakespeare]
        [--experts-per-token 1 2 --seeds 0 1 2 --max-steps 600 --lr .01]
        [--figure docs/expert_use.png]

For each number of experts per token and each seed, two runs differ in --balance-loss alone: the
default, and 0. Both start from the same weights and read the same batches. metrics.jsonl has each
expert's share of the router's choices in one step's batch. The table prints the largest share; the
entropy of the shares divided by log E (1: all experts are used alike, 0: one expert is used); and
the number of experts with a share below 1%. Each is a mean over the layers and the last tenth of
the steps. Loss is the final validation loss, also that of a dense model with the same feed-forward
computation per token. The figure shows the shares of the first seed.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # as glasslm's command line does
import numpy as np
from matplotlib.figure import Figure

from glasslm.config.conversion import with_flags
from glasslm.config.presets import PRESETS
from glasslm.config.schema import ComputeConfig, OptimizerConfig, RunConfig
from glasslm.training import launch
from paired import heading

MODEL = {
    "d_model": 64, "n_layers": 4, "n_heads": 4, "d_ff": 96, "n_experts": 8, "block_size": 64,
    "batch_size": 16, "log_interval": 10, "sample_interval": 0, "eval_interval": 10**6,
    "checkpoint_interval": 10**6,
}  # fmt: skip
MIN_USED_SHARE = 0.01  # an expert with a smaller share counts as unused
BALANCES = (OptimizerConfig().balance_loss, 0.0)


class ExpertUse(NamedTuple):
    """The shares of the experts over one run."""

    steps: np.ndarray[Any, Any]  # (lines,)
    shares: np.ndarray[Any, Any]  # (lines, layers, E)
    loss: float  # on the validation split, at the end

    @property
    def end(self) -> np.ndarray[Any, Any]:
        """The shares (lines, layers, E) of the last tenth of the steps."""
        return self.shares[self.steps > 0.9 * self.steps[-1]]

    @property
    def largest(self) -> float:
        """The largest share of an expert at the end, a mean over the layers."""
        return float(self.end.max(-1).mean())

    @property
    def entropy(self) -> float:
        """The entropy of the shares at the end divided by log E, a mean over the layers."""
        return float(entropy(self.end).mean())

    @property
    def unused(self) -> float:
        """The number of unused experts at the end, a mean over the layers."""
        return float((self.end < MIN_USED_SHARE).sum(-1).mean())


def entropy(shares: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Entropy of shares (..., E) -> (...), divided by its largest value, log E."""
    logs = np.log(shares, out=np.zeros_like(shares), where=shares > 0)
    return -(shares * logs).sum(-1) / np.log(shares.shape[-1])


def train(config: RunConfig, threads: int) -> list[dict[str, Any]]:
    """Train a run in a temporary folder; returns the lines of its metrics.jsonl."""
    compute = ComputeConfig(engine="numpy", threads=threads)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "run")
        launch.train(config, compute, path, notify=lambda line: None)
        return [
            json.loads(line)
            for line in (path / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        ]


def final_loss(lines: list[dict[str, Any]]) -> float:
    """The last loss on the whole validation split."""
    return [line["loss"] for line in lines if line["kind"] == "eval" and line["whole"]][-1]


def read_expert_use(lines: list[dict[str, Any]]) -> ExpertUse:
    """The shares of the experts from the lines of metrics.jsonl."""
    steps = [line for line in lines if line["kind"] == "step"]
    return ExpertUse(
        np.array([line["step"] for line in steps]),
        np.array([line["experts"] for line in steps]),
        final_loss(lines),
    )


def draw(uses: dict[str, ExpertUse]) -> Figure:
    """A stacked plot of the shares over the steps: a row for each run, a column for each layer.

    The experts with the largest shares at the end are at the bottom.
    """
    layers = next(iter(uses.values())).shares.shape[1]
    figure = Figure(figsize=(10, 1.9 * len(uses)), layout="constrained")
    for row, (name, use) in zip(
        figure.subplots(len(uses), layers, sharex=True, sharey=True), uses.items()
    ):
        for layer, axes in enumerate(row):
            shares = use.shares[:, layer]
            shares = shares[:, np.argsort(-shares[-len(use.end) :].mean(0))]
            shades = [
                (0.13 + 0.1 * e, 0.35 + 0.075 * e, 0.6 + 0.045 * e) for e in range(shares.shape[-1])
            ]
            axes.stackplot(use.steps, shares.T, colors=shades, edgecolor="white", linewidth=0.3)
            axes.set(xlim=(use.steps[0], use.steps[-1]), ylim=(0, 1), yticks=[0, 0.5, 1])
            end = entropy(use.end[:, layer]).mean()
            axes.set_title(
                f"layer {layer + 1}: entropy {end:.2f} at the end", fontsize=9, loc="left"
            )
            axes.tick_params(labelsize=8)
            axes.spines[["top", "right"]].set_visible(False)
        row[0].set_ylabel(name, fontsize=9)
    figure.supxlabel("step", fontsize=9)
    figure.suptitle(
        "Share of the router's choices, by expert",
        fontsize=11,
        fontweight="bold",
    )
    return figure


def print_row(name: str, measures: list[float], losses: list[float]) -> None:
    """Print one line: largest share, entropy and unused experts, then the loss of each seed."""
    largest, mean_entropy, unused = (
        f"{value:.2f}" if math.isfinite(value) else "" for value in measures
    )
    by_seed = " ".join(f"{loss:.4f}" for loss in losses)
    print(
        f"{name:24}  {largest:>13}  {mean_entropy:>7}  {unused:>11}  "
        f"{statistics.mean(losses):.4f}  {by_seed}",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    text = parser.add_mutually_exclusive_group()
    text.add_argument("--text-file")
    text.add_argument("--corpus", default="shakespeare")
    parser.add_argument("--experts-per-token", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--max-steps", type=int, default=600)
    parser.add_argument("--lr", type=float, default=0.01)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--figure", type=Path)
    args = parser.parse_args()

    source = {"text_file": args.text_file} if args.text_file else {"corpus": args.corpus}
    base = with_flags(
        PRESETS["tiny"](), MODEL | source | {"max_steps": args.max_steps, "lr": args.lr}
    )
    plotted: dict[str, ExpertUse] = {}
    print(heading("numpy", threads=args.threads))
    print(
        f"{'':24}  largest share  entropy  unused of {MODEL['n_experts']}    loss  losses by seed"
    )
    for k in args.experts_per_token:
        dense = with_flags(base, {"n_experts": 0, "d_ff": k * base.model.d_ff})
        losses = [
            final_loss(train(with_flags(dense, {"seed": seed}), args.threads))
            for seed in args.seeds
        ]
        print_row(f"dense, width {dense.model.d_ff}", [math.nan] * 3, losses)
        for balance in BALANCES:
            mixture = with_flags(base, {"experts_per_token": k, "balance_loss": balance})
            uses = [
                read_expert_use(train(with_flags(mixture, {"seed": seed}), args.threads))
                for seed in args.seeds
            ]
            plotted[f"top {k},\nbalance loss {balance:g}"] = uses[0]
            measures = [(use.largest, use.entropy, use.unused) for use in uses]
            means = [statistics.mean(values) for values in zip(*measures)]
            print_row(f"top {k}, balance {balance:g}", means, [use.loss for use in uses])
    if args.figure:
        draw(plotted).savefig(args.figure, dpi=150, facecolor="white")


if __name__ == "__main__":
    main()
