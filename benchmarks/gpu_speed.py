"""On a GPU: tokens/s and model FLOPs utilisation against nanoGPT, and the time to a validation loss of 1.47.

    python benchmarks/gpu_speed.py --nanogpt PATH/TO/nanoGPT [--model nanogpt gpt2-124M --seconds 30 --peak TFLOPS]
    python benchmarks/gpu_speed.py --nanogpt PATH/TO/nanoGPT --text PATH/TO/tinyshakespeare.txt --time-to-loss 3

The first command trains on random tokens, both in this process and taking turns: nanoGPT as its train.py does
(compiled, bfloat16 autocast, TF32, fused AdamW), glasslm through its verbs with --compile on --precision bf16. Steps
clip gradients and end with the loss as a number. Before timing, both must give the same loss in float32, and in
bfloat16 one that is close to it. Utilisation is 6 FLOPs for each weight that multiplies and 12 L H Q T for attention
(arXiv:2204.02311, appendix B) over the card's published dense bfloat16 peak, and over what products of the model's own
shapes reach here.

The second command runs whole commands in turns, from the start of the process: glasslm until it has reached 1.47 on
the whole validation split, to the end of the process; nanoGPT the run on Shakespeare of its README, which publishes
1.4697, until it prints a loss of 1.47 (an estimate), or to its end. Compiling counts: caches start empty.
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
from glasslm.engines.choice import thread_count
from glasslm.engines.factory import make_engine
from glasslm.engines.protocol import Batch
from glasslm.model.flops import flops_per_token
from glasslm.model.parameters import initial_weights, parameter_table
from matmul import products
from paired import heading, print_speeds, ratio, take_turns
from time_to_loss import glasslm_seconds, nanogpt_seconds, own_copy
from torch_speed import as_nanogpt, check, larger, random_batch, training

NANOGPT = as_nanogpt("nanogpt", 64)
GPT2 = ModelConfig(
    d_model=768,
    n_layers=12,
    n_heads=12,
    block_size=1024,
    norm="layernorm",
    feedforward="gelu",
    position="learned",
)
MODELS = {  # with the vocabulary and rows of nanoGPT's own runs; it pads GPT-2's vocabulary to a multiple of 64
    "nanogpt": (NANOGPT.model, 65, 64),
    "gpt2-124M": (GPT2, 50304, 12),
    "tiny": (
        dataclasses.replace(GPT2, d_model=64, n_layers=2, n_heads=2, block_size=32),
        65,
        4,
    ),  # to try this file
}
PEAKS = {
    "A100": 312,
    "H100 PCIe": 756,
    "H100": 989,
    "H200": 989,
    "L40S": 362,
    "RTX 4090": 165,
}  # TFLOP/s, data sheets
GOAL = 1.47
RECIPE = (
    "--preset nanogpt --qk-norm --optimizer muon --lr 3e-3 --max-steps 1500 --eval-interval 100 --sample-interval 0 "
    "--checkpoint-interval 5000"
)


def compare(name: str, args: argparse.Namespace, peak: float) -> None:
    checkout, device = args.nanogpt, args.device
    model, V, rows = MODELS[name]
    train = dataclasses.replace(NANOGPT.train, batch_size=args.batch_size or rows)
    config = dataclasses.replace(NANOGPT, model=model, train=train).resolved()
    batch = random_batch(config, V)
    weights = larger(dict(initial_weights(parameter_table(config.model, V), 0)))
    few = Batch(batch.tokens[:2], batch.targets[:2], 0, batch.rows[:2])
    expected = check(checkout, config, V, few, weights)
    model = dataclasses.replace(config.model, dropout=args.dropout, attention_dropout=args.dropout)
    config = dataclasses.replace(config, model=model)
    torch.compiler.reset()  # or the shapes of another model make those of this one dynamic
    peer = nanogpt.load(checkout, config.model, V, weights).to(device)
    tokens, targets = (
        torch.from_numpy(array).to(device) for array in (batch.tokens, batch.targets)
    )
    ways = {"nanoGPT": nanogpt.trainer(peer, tokens, targets, bf16=True, compiled=True)}
    engine = make_engine(
        config,
        V,
        ComputeConfig(engine="torch", device=device, precision="bf16", compile="on"),
        training=True,
    )
    engine.load(weights.items())
    ways["glasslm"] = training(engine, batch)
    for way, step in ways.items():
        loss = step()
        # Other rows and dropout: a coarse check that both learn the same thing, the fine one came before.
        assert abs(loss - expected) < 0.05 * expected, (way, loss, expected)
        for _ in range(10):
            step()
    B, T = batch.tokens.shape
    alone, work = products(config.model, B * T, torch.bfloat16, device)
    times = take_turns(ways | {"products": work}, args.seconds, turn=1.0)
    flops, parameters = (
        flops_per_token(config.model, V) * B * T,
        parameter_table(config.model, V).total,
    )
    print(f"{name}: {parameters / 1e6:.1f}M parameters, {B} x {T} tokens, dropout {args.dropout:g}")
    print_speeds({way: times[way] for way in ways}, B * T, ("nanoGPT",))
    for way in ways:
        speed = flops / statistics.median(times[way])
        utilisation = f"{speed / peak:.1%} of the card's peak, " if peak else ""
        share = ratio(times, way, "products") * flops / alone
        print(
            f"{way}: {speed / 1e12:,.1f} TFLOP/s, {utilisation}{share:.1%} of what its products reach alone",
            flush=True,
        )


def time_to_loss(checkout: Path, text: Path, recipe: str, pairs: int) -> None:
    ratios = []
    flags = [*recipe.split(), "--device", "cuda", "--stop-at-loss", str(GOAL)]
    print(f"glasslm train {' '.join(flags)}")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        os.environ["GLASSLM_CACHE"] = str(folder / "cache")
        copy = own_copy(checkout, folder / "nanoGPT", text)
        theirs_flags = ["config/train_shakespeare_char.py"]
        for pair in range(pairs):
            os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(folder / f"compiled-{pair}")
            os.environ["TRITON_CACHE_DIR"] = str(folder / f"triton-{pair}")
            ours, loss, step = glasslm_seconds(text, folder / "run", flags, GOAL)
            theirs, their_loss = nanogpt_seconds(copy, folder / "out", theirs_flags, GOAL)
            ratios.append(theirs / ours)
            print(f"glasslm {loss:.4f} at step {step} after {ours:.1f} s", end="; ")
            print(f"nanoGPT {their_loss:.4f} after {theirs:.1f} s: {ratios[-1]:.2f}x", flush=True)
    print(f"{statistics.median(ratios):.2f} times as fast (median of {len(ratios)} pairs)")


def peak_of(card: str) -> float:
    """FLOP/s on the card's data sheet, 0 where this file does not know it."""
    return next((tera * 1e12 for name, tera in PEAKS.items() if name in card), 0.0)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--nanogpt", type=Path, required=True, help="a checkout of nanoGPT")
    parser.add_argument("--model", nargs="+", default=["nanogpt", "gpt2-124M"], choices=MODELS)
    parser.add_argument(
        "--batch-size", type=int, default=0, help="rows (0: as in nanoGPT's own runs)"
    )
    parser.add_argument("--dropout", type=float, default=0.0)
    parser.add_argument("--seconds", type=float, default=30, help="for each model, after compiling")
    parser.add_argument(
        "--peak", type=float, default=0.0, help="the card's dense bf16 TFLOP/s, where not known"
    )
    parser.add_argument("--time-to-loss", type=int, default=0, metavar="PAIRS")
    parser.add_argument("--text", type=Path, help="tiny Shakespeare, for --time-to-loss")
    parser.add_argument("--recipe", default=RECIPE, help="glasslm's flags, for --time-to-loss")
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"], help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("this benchmark needs a CUDA device, and PyTorch sees none here")
    card = torch.cuda.get_device_name() if args.device == "cuda" else "no card"
    print(heading("torch", threads=thread_count(0)), f"; {card}", sep="", flush=True)
    if args.time_to_loss:
        if not args.text:
            parser.error("--time-to-loss needs --text")
        time_to_loss(args.nanogpt, args.text, args.recipe, args.time_to_loss)
        return
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = (
        True  # as nanoGPT's train.py does
    )
    for name in args.model:
        compare(name, args, args.peak * 1e12 or peak_of(card))


if __name__ == "__main__":
    main()
