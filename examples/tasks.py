"""Four published phenomena on a CPU: `python examples/tasks.py grokking`, or another of them.

Each trains its models with the NumPy engine on one thread, prints the processor seconds and the
hash of the last weights (a second run prints the same one), and draws a figure into --out.
docs/howto/tasks.md shows the figures.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

import glasslm
from glasslm.data.tasks.arithmetic import count_carries
from glasslm.data.tasks.catalogue import draw_examples, read_examples
from glasslm.inference.exact_answers import judge_examples
from glasslm.inference.suites.induction import measure_heads
from glasslm.inference.suites.random_texts import known_tokens, repeated_tokens
from glasslm.report.figures import PRINT_PALETTE, add_legend, style_axes
from glasslm.runs.run_folder import Run

FEW_FILES = {
    "preset": "tiny",
    "sample_interval": 0,
    "threads": 1,
    "engine": "numpy",
    "checkpoint_interval": 10**6,
}


def train(folder: Path, name: str, **flags: Any) -> Run:
    """Train a run unless it is there; prints its processor seconds and its last weights' hash."""
    start = time.process_time()
    if (folder / name).exists():
        return Run(folder / name)
    run = glasslm.train(run_dir=folder / name, **FEW_FILES | flags)
    seconds = time.process_time() - start
    last = sorted((folder / name / "checkpoints").iterdir())[-1]
    manifest = json.loads((last / "manifest.json").read_text(encoding="utf-8"))
    digest = manifest["files"]["model.safetensors"]["sha256"]
    print(f"{name}: {seconds:.0f} CPU s, weights of step {int(last.name)}: sha256 {digest[:16]}")
    return run


def evaluations(run: Run) -> list[dict[str, Any]]:
    """The evaluation lines of a run."""
    return [dict(line) for line in run.metrics() if line["kind"] == "eval"]


# -- induction heads -------------------------------------------------------------------------------


def induction(folder: Path) -> Any:
    """The loss on repeated random letters drops when induction heads form; one layer has none."""
    folder.mkdir(parents=True, exist_ok=True)
    text = folder / "repeated.txt"
    draw = random.Random(1)
    words = (draw.choices("abcdefghijklmnopqrstuvwxyz", k=draw.randint(8, 16)) for _ in range(9000))
    text.write_text("".join("".join(word * 2) + "\n" for word in words), encoding="utf-8")
    flags = {
        "text_file": [str(text)], "block_size": 64, "d_model": 64, "n_heads": 4, "batch_size": 32,
        "optimizer": "adamw", "lr": 1e-3, "max_steps": 1200, "eval_interval": 50,
        "checkpoint_interval": 50, "keep": 100,
    }  # fmt: skip
    figure, (losses, scores) = new_figure(2)
    style_axes(losses, "Validation loss", "nats per token", PRINT_PALETTE)
    style_axes(scores, "Largest score of a head, two layers", "attention weight", PRINT_PALETTE)
    colours = (PRINT_PALETTE.train, PRINT_PALETTE.validation)
    for layers, colour in zip((2, 1), colours):
        run = train(folder, f"induction-{layers}-layers", **flags, n_layers=layers)
        lines = evaluations(run)
        label = f"{layers} layer{'s' * (layers > 1)}"
        steps = [line["step"] for line in lines]
        losses.plot(steps, [line["loss"] for line in lines], color=colour, label=label)
        if layers == 2:
            draw_head_scores(scores, run, colours)
    for axes in (losses, scores):
        axes.set_xlabel("step")
        add_legend(axes, PRINT_PALETTE)
    return figure


def draw_head_scores(axes: Any, run: Run, colours: tuple[str, ...]) -> None:
    """The largest score of any head at each checkpoint, on letters that are written twice."""
    steps = sorted(int(path.name) for path in (run.path / "checkpoints").iterdir())
    tokens = repeated_tokens(known_tokens(run.dataset(lambda message: None)), 32, 16, seed=1)
    measured = [measure_heads(glasslm.load(run.path, step), tokens) for step in steps]
    for name, colour in zip(("induction", "previous_token"), colours):
        best = [float(scores[name].max()) for scores in measured]
        axes.plot(steps, best, color=colour, label=name.replace("_", " "))
        print(f"{name}: " + " ".join(f"{step}:{score:.2f}" for step, score in zip(steps, best)))


# -- grokking --------------------------------------------------------------------------------------


def grokking(folder: Path) -> Any:
    """Held-out sums modulo a prime are learned long after the training sums, with weight decay."""
    flags = {
        "corpus": "task:modular-addition", "task_size": 31, "task_line": 6, "block_size": 6,
        "val_fraction": 0.53, "d_model": 64, "n_layers": 1, "n_heads": 4, "position": "learned",
        "feedforward": "gelu", "tie_embeddings": False, "optimizer": "adamw", "lr": 3e-3,
        "schedule": "constant", "warmup_steps": 10, "betas": [0.9, 0.98], "grad_clip": 0.0,
        "batch_size": 128, "max_steps": 4000, "eval_interval": 100,
    }  # fmt: skip
    figure, panels = new_figure(2)
    for axes, decay in zip(panels, (1.0, 0.0)):
        lines = evaluations(train(folder, f"grokking-{decay:g}", **flags, weight_decay=decay))
        style_axes(axes, f"Weight decay {decay:g}", "answers right", PRINT_PALETTE)
        steps = [max(1, line["step"]) for line in lines]
        for name, label, colour in (
            ("train_accuracy", "training sums", PRINT_PALETTE.train),
            ("accuracy", "held-out sums", PRINT_PALETTE.validation),
        ):
            shares = [line[name]["share"] for line in lines]
            axes.plot(steps, shares, color=colour, label=label)
            late = next((s for s, share in zip(steps, shares) if share >= 0.95), None)
            print(f"decay {decay:g}, {label}: 95% right at step {late}, last {shares[-1]:.3f}")
        axes.set(xscale="log", xlim=(40, None), ylim=(-0.03, 1.03), xlabel="step")
        add_legend(axes, PRINT_PALETTE)
    return figure


# -- positions and length --------------------------------------------------------------------------


def positions(folder: Path) -> Any:
    """Copying words of 1 to 10 letters: which positions carry over to longer words?"""
    flags = {
        "corpus": "task:copy", "task_line": 44, "block_size": 44, "d_model": 64, "n_layers": 2,
        "n_heads": 4, "batch_size": 32, "max_steps": 1000, "eval_interval": 500,
    }  # fmt: skip
    figure, (axes,) = new_figure(1)
    style_axes(axes, "Copying, trained on 1 to 10 letters", "words copied exactly", PRINT_PALETTE)
    sizes = list(range(2, 22, 2))
    kinds = ("none", "sinusoidal", "learned", "rope", "alibi")
    colours = (*PRINT_PALETTE, "#cc79a7")
    for kind, marker, colour in zip(kinds, "osD^v", colours[1:]):
        run = train(folder, f"copy-{kind}", **flags, position=kind)
        model, dataset = glasslm.load(run.path, "latest"), run.dataset(lambda message: None)
        train_text = run.tokenizer.decode(dataset.train.tokens[:])
        known = {example.question for example in read_examples(train_text)}
        shares = [
            float(judge_examples(model, draw_examples("copy", [size], 100, "sizes", known)).mean())
            for size in sizes
        ]
        axes.plot(sizes, shares, color=colour, marker=marker, markersize=4, label=kind)
        print(f"{kind}: " + " ".join(f"{size}:{share:.2f}" for size, share in zip(sizes, shares)))
    axes.axvline(10.5, color=PRINT_PALETTE.ink, linewidth=0.8, linestyle=":")
    axes.set(xlabel="letters (dotted: the longest of training)", ylim=(-0.03, 1.03))
    add_legend(axes, PRINT_PALETTE)
    return figure


# -- carries ---------------------------------------------------------------------------------------


def carries(folder: Path) -> Any:
    """Sums of five digits in both orders of digits, by steps and by the number of carries."""
    flags = {
        "task_size": 5, "task_line": 20, "block_size": 20, "d_model": 64, "n_layers": 2,
        "n_heads": 4, "batch_size": 64, "max_steps": 700, "eval_interval": 50,
        "checkpoint_interval": 50, "keep": 100,
        "position": "learned",  # with relative ones, reversed digits are harder to align
    }  # fmt: skip
    figure, (curves, bars) = new_figure(2)
    style_axes(curves, "Sums of 5 digits", "held-out sums right", PRINT_PALETTE)
    style_axes(bars, "Nearest to half right, by carries", "", PRINT_PALETTE)
    orders = (("addition", "highest digit first"), ("addition-reversed", "lowest digit first"))
    for (task, label), colour in zip(orders, (PRINT_PALETTE.validation, PRINT_PALETTE.train)):
        run = train(folder, task, corpus=f"task:{task}", **flags)
        lines = evaluations(run)
        shares = [line["accuracy"]["share"] for line in lines]
        curves.plot([line["step"] for line in lines], shares, color=colour, label=label)
        examples = draw_examples(task, [5], 3000, "carries")
        half = min(lines, key=lambda line: abs(line["accuracy"]["share"] - 0.5))
        right = judge_examples(glasslm.load(run.path, half["step"]), examples)
        counts = np.array([count_carries(example.question) for example in examples])
        by_carries = [float(right[counts == number].mean()) for number in range(6)]
        offset = -0.2 if task == "addition" else 0.2
        bars.bar(np.arange(6) + offset, by_carries, 0.38, color=colour, label=label)
        print(
            f"{label}: {shares[-1]:.3f}; at step {half['step']} {half['accuracy']['share']:.2f}, "
            f"by carries {np.round(by_carries, 2).tolist()}"
        )
    curves.set(xlabel="step", ylim=(-0.03, 1.03))
    bars.set(xlabel="carries", ylim=(-0.03, 1.03))
    add_legend(curves, PRINT_PALETTE)
    return figure


def new_figure(panels: int) -> tuple[Any, Any]:
    """A figure with some panels beside each other."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.2 * panels if panels > 1 else 5.5, 3.0), layout="constrained")
    return figure, np.atleast_1d(figure.subplots(1, panels))


PHENOMENA = {function.__name__: function for function in (induction, grokking, positions, carries)}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("phenomenon", choices=list(PHENOMENA))
    parser.add_argument("--out", type=Path, default=Path("."), help="folder of the figure")
    parser.add_argument("--runs", type=Path, help="keep the runs here, and use them again")
    flags = parser.parse_args()
    start = time.process_time()
    with TemporaryDirectory() as temporary:
        figure = PHENOMENA[flags.phenomenon](flags.runs or Path(temporary))
    flags.out.mkdir(parents=True, exist_ok=True)
    path = flags.out / f"{flags.phenomenon}.png"
    figure.savefig(path, dpi=90)
    print(f"{path}, {time.process_time() - start:.0f} CPU s in all")


if __name__ == "__main__":
    main()
