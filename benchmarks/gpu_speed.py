"""GPU training against nanoGPT: tokens/s, FLOPs utilization, time to a validation loss.

    python benchmarks/gpu_speed.py --nanogpt PATH/TO/nanoGPT [--model nanogpt gpt2-124M]
        [--seconds 30 --peak TFLOPS]
    python benchmarks/gpu_speed.py --nanogpt PATH/TO/nanoGPT --text PATH/TO/tinyshakespeare.txt
        --time-to-loss 3

The first command trains both on random tokens, in turns in this process. nanoGPT trains as its
train.py does (compiled, bfloat16 autocast, TF32, fused AdamW), glasslm through its engine's methods
with --compile on --precision bf16. Steps clip gradients and return the loss as a Python number.
Before timing, both must give the same loss in float32, and in bfloat16 a loss close to it.
Utilization counts 6 FLOPs for each weight in a matrix product and 12 L H Q T for attention
(arXiv:2204.02311, appendix B). It is given relative to the card's published dense bfloat16 peak,
and to the measured speed of the matrix products of the model alone.

The second command runs whole training commands in turns and measures from the start of the process.
glasslm trains until it reaches 1.47 on the whole validation split, and is measured to the end of
the process. nanoGPT trains the Shakespeare run of its README, which publishes 1.4697, until it
prints an estimated loss of 1.47 or ends. Compiling counts: the compile caches start empty.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import statistics
import tempfile
from pathlib import Path

import torch

import nanogpt
from glasslm.config.schema import ComputeConfig, ModelConfig
from glasslm.engines.factory import make_engine
from glasslm.engines.protocol import Batch
from glasslm.engines.resources import thread_count
from glasslm.model.flops import flops_per_token
from glasslm.model.parameters import initial_weights, parameter_table
from matmul import products
from paired import heading, print_speeds, ratio, take_turns
from time_to_loss import copy_nanogpt, time_glasslm, time_nanogpt
from torch_speed import (
    check_agreement,
    enlarge_matrices,
    nanogpt_config,
    random_batch,
    training_step,
)

NANOGPT = nanogpt_config("nanogpt", 64)
GPT2 = ModelConfig(
    d_model=768,
    n_layers=12,
    n_heads=12,
    block_size=1024,
    norm="layernorm",
    feedforward="gelu",
    position="learned",
)
# Model, vocabulary size and rows, as in nanoGPT's own runs. nanoGPT pads GPT-2's vocabulary to a
# multiple of 64.
MODELS = {
    "nanogpt": (NANOGPT.model, 65, 64),
    "gpt2-124M": (GPT2, 50304, 12),
    "tiny": (
        dataclasses.replace(GPT2, d_model=64, n_layers=2, n_heads=2, block_size=32),
        65,
        4,
    ),  # for a quick test of this script
}
PEAK_TFLOPS = {
    "A100": 312,
    "H100 PCIe": 756,
    "H100": 989,
    "H200": 989,
    "L40S": 362,
    "RTX 4090": 165,
}  # dense bfloat16, from the data sheets
GOAL_LOSS = 1.47
RECIPE = (
    "--preset nanogpt --qk-norm --optimizer muon --lr 3e-3 --max-steps 1500 --eval-interval 100 "
    "--sample-interval 0 --checkpoint-interval 5000"
)


def compare(name: str, args: argparse.Namespace, peak: float) -> None:
    """Print speed and utilization of one of MODELS; `peak` is the card's FLOP/s, 0 if unknown."""
    checkout, device = args.nanogpt, args.device
    model, V, rows = MODELS[name]
    train = dataclasses.replace(NANOGPT.train, batch_size=args.batch_size or rows)
    config = dataclasses.replace(NANOGPT, model=model, train=train).resolve()
    batch = random_batch(config, V)
    weights = enlarge_matrices(dict(initial_weights(parameter_table(config.model, V), 0)))
    small_batch = Batch(batch.tokens[:2], batch.targets[:2], 0, batch.rows[:2])
    expected = check_agreement(checkout, config, V, small_batch, weights)
    model = dataclasses.replace(config.model, dropout=args.dropout, attention_dropout=args.dropout)
    config = dataclasses.replace(config, model=model)
    torch.compiler.reset()  # otherwise shapes of another model make this one's dynamic
    peer = nanogpt.load_model(checkout, config.model, V, weights).to(device)
    tokens, targets = (
        torch.from_numpy(array).to(device) for array in (batch.tokens, batch.targets)
    )
    steps = {"nanoGPT": nanogpt.make_training_step(peer, tokens, targets, bf16=True, compiled=True)}
    engine = make_engine(
        config,
        V,
        ComputeConfig(engine="torch", device=device, precision="bf16", compile="on"),
        training=True,
    )
    engine.load(weights.items())
    steps["glasslm"] = training_step(engine, batch)
    for trainer, step in steps.items():
        loss = step()
        # Rows and dropout differ from those of `expected`, so this check is coarse; the precise one
        # is check_agreement.
        assert abs(loss - expected) < 0.05 * expected, (trainer, loss, expected)
        for _ in range(10):
            step()
    B, T = batch.tokens.shape
    product_flops, multiply = products(config.model, B * T, torch.bfloat16, device)
    times = take_turns(steps | {"products": multiply}, args.seconds, turn=1.0)
    flops, parameters = (
        flops_per_token(config.model, V) * B * T,
        parameter_table(config.model, V).total,
    )
    print(f"{name}: {parameters / 1e6:.1f}M parameters, {B} x {T} tokens, dropout {args.dropout:g}")
    print_speeds({trainer: times[trainer] for trainer in steps}, B * T, ("nanoGPT",))
    for trainer in steps:
        speed = flops / statistics.median(times[trainer])
        utilization = f"{speed / peak:.1%} of the card's peak, " if peak else ""
        share = ratio(times, trainer, "products") * flops / product_flops
        print(
            f"{trainer}: {speed / 1e12:,.1f} TFLOP/s, {utilization}"
            f"{share:.1%} of the speed of its matrix products alone",
            flush=True,
        )


def time_to_loss(checkout: Path, text: Path, recipe: str, pairs: int) -> None:
    """Print the seconds of both training commands until the loss is reached, pair by pair."""
    ratios = []
    flags = [*recipe.split(), "--device", "cuda", "--stop-at-loss", str(GOAL_LOSS)]
    print(f"glasslm train {' '.join(flags)}")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        os.environ["GLASSLM_CACHE"] = str(folder / "cache")
        copy = copy_nanogpt(checkout, folder / "nanoGPT", text)
        nanogpt_flags = ["config/train_shakespeare_char.py"]
        for pair in range(pairs):
            os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(folder / f"compiled-{pair}")
            os.environ["TRITON_CACHE_DIR"] = str(folder / f"triton-{pair}")
            ours, loss, step = time_glasslm(text, folder / "run", flags, GOAL_LOSS)
            theirs, their_loss = time_nanogpt(copy, folder / "out", nanogpt_flags, GOAL_LOSS)
            ratios.append(theirs / ours)
            print(f"glasslm {loss:.4f} at step {step} after {ours:.1f} s", end="; ")
            print(f"nanoGPT {their_loss:.4f} after {theirs:.1f} s: {ratios[-1]:.2f}x", flush=True)
    print(f"{statistics.median(ratios):.2f} times as fast (median of {len(ratios)} pairs)")


def peak_flops(card: str) -> float:
    """FLOP/s from the card's data sheet; 0 for a card that is not in PEAK_TFLOPS."""
    return next((tera * 1e12 for name, tera in PEAK_TFLOPS.items() if name in card), 0.0)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--nanogpt", type=Path, required=True, help="a checkout of nanoGPT")
    parser.add_argument("--model", nargs="+", default=["nanogpt", "gpt2-124M"], choices=MODELS)
    parser.add_argument(
        "--batch-size", type=int, default=0, help="rows of a batch (0: as in nanoGPT's own runs)"
    )
    parser.add_argument("--dropout", type=float, default=0.0)
    parser.add_argument(
        "--seconds", type=float, default=30, help="seconds for each model, after compiling"
    )
    parser.add_argument(
        "--peak", type=float, default=0.0, help="the card's dense bf16 TFLOP/s (0: from a table)"
    )
    parser.add_argument(
        "--time-to-loss",
        type=int,
        default=0,
        metavar="PAIRS",
        help="measure the time to a loss in so many pairs of runs",
    )
    parser.add_argument(
        "--text", type=Path, help="a file with tiny Shakespeare, for --time-to-loss"
    )
    parser.add_argument(
        "--recipe", default=RECIPE, help="flags of `glasslm train`, for --time-to-loss"
    )
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"], help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("PyTorch finds no CUDA device; this benchmark needs one")
    card = torch.cuda.get_device_name() if args.device == "cuda" else "no card"
    print(heading("torch", threads=thread_count(0)), f"; {card}", sep="", flush=True)
    if args.time_to_loss:
        if not args.text:
            parser.error("--time-to-loss needs --text")
        time_to_loss(args.nanogpt, args.text, args.recipe, args.time_to_loss)
        return
    # nanoGPT's train.py allows TF32, too.
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    for name in args.model:
        compare(name, args, args.peak * 1e12 or peak_flops(card))


if __name__ == "__main__":
    main()
