"""Tokens/s of generated text: glasslm against nanoGPT's generate and transformers' generate on the same weights.

    python benchmarks/generate_against.py [--nanogpt PATH/TO/nanoGPT] \\
        [--engine auto torch --preset nanogpt --batch-size 1 --tokens 256 --threads 2 --seconds 60 --rounds 3]

Everybody starts from one newline, in float32 unless an engine is asked for another precision, samples at temperature
0.8 from the whole vocabulary, and is used as its documentation says: nanoGPT has no cache of keys and values,
transformers uses its own (`GPT2LMHeadModel`, biases zero). glasslm is measured through generation.generate, with its
tokens made into text. Before timing, all must write the same text greedily (nanoGPT with the tanh form of GELU for that
moment), or, an engine in bfloat16, give logits close to the others'.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # as glasslm's command line does
import numpy as np
import torch
from transformers import GPT2Config, GPT2LMHeadModel

import nanogpt
from glasslm.config.presets import PRESETS
from glasslm.config.schema import ComputeConfig, ModelConfig, Precision
from glasslm.data.tokenizers import CharTokenizer
from glasslm.engines.factory import make_engine
from glasslm.engines.protocol import Engine
from glasslm.inference.generation import generate
from glasslm.inference.sampling import Sampling
from glasslm.model.parameters import initial_weights, parameter_table
from paired import heading, print_speeds, take_turns
from torch_speed import as_nanogpt, larger

TOKENIZER = CharTokenizer("\n" + "".join(map(chr, range(32, 96))))  # 65 characters
NANOGPT, TRANSFORMERS = "nanoGPT", "transformers"
TEMPERATURE = 0.8

Text = Callable[[int, bool], np.ndarray]  # (tokens, greedily) -> (rows, tokens)


def by_glasslm(engine: Engine, config: ModelConfig, rows: int) -> Text:
    def text(tokens: int, greedily: bool) -> np.ndarray:
        pieces = generate(
            engine,
            TOKENIZER,
            ["\n"],
            block_size=config.block_size,
            max_new_tokens=tokens,
            sampling=Sampling(temperature=0.0 if greedily else TEMPERATURE),
            samples=rows,
        )
        found: list[list[int]] = [[] for _ in range(rows)]
        for piece in pieces:
            found[piece.sample].append(piece.token)
        return np.array(found)

    return text


def by_nanogpt(model: Any, rows: int) -> Text:
    start = torch.tensor([TOKENIZER.encode("\n").tolist()] * rows)

    def text(tokens: int, greedily: bool) -> np.ndarray:
        if not greedily:
            return model.generate(start, tokens, temperature=TEMPERATURE)[:, 1:].numpy()
        with nanogpt.tanh_gelu(model):
            return model.generate(start, tokens, top_k=1)[:, 1:].numpy()

    return text


def by_transformers(model: GPT2LMHeadModel, rows: int) -> Text:
    start = torch.tensor([TOKENIZER.encode("\n").tolist()] * rows)

    def text(tokens: int, greedily: bool) -> np.ndarray:
        how: dict[str, Any] = {
            "attention_mask": torch.ones_like(start),
            "max_new_tokens": tokens,
            "use_cache": True,
        }
        how |= (
            {"do_sample": False}
            if greedily
            else {"do_sample": True, "temperature": TEMPERATURE, "top_k": 0}
        )
        written: Any = model.generate(start, **how)  # type: ignore[misc]
        return written[:, 1:].numpy()

    return text


def transformers_model(config: ModelConfig, weights: nanogpt.Weights) -> GPT2LMHeadModel:
    """GPT-2 of this shape with these weights; its matrices are (in, out), and its biases zero."""
    of_gpt2 = GPT2Config(
        vocab_size=TOKENIZER.vocab_size,
        n_positions=config.block_size,
        n_embd=config.d_model,
        n_layer=config.n_layers,
        n_head=config.n_heads,
        activation_function="gelu_new",
        bos_token_id=None,
        eos_token_id=None,
    )
    model = GPT2LMHeadModel(of_gpt2).eval()
    state = {}
    for name, array in nanogpt.gpt2_names(config, weights).items():
        state[name] = torch.from_numpy(array.T if ".c_" in name else array)
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert not unexpected, unexpected
    for name in missing:
        assert name.endswith(".bias"), name
        model.get_parameter(name).data.zero_()
    return model


def check(ways: dict[str, Text], engines: dict[str, Engine], tokens: int) -> None:
    """The same text greedily from everybody in float32, and logits like the first engine's from the others."""
    texts = {name: way(tokens, True) for name, way in ways.items()}
    exact = {
        name: text
        for name, text in texts.items()
        if name not in engines or engines[name].precision == "fp32"
    }
    first = next(iter(exact))
    for name, text in exact.items():
        assert np.array_equal(text, exact[first]), f"{name} and {first} write different texts"
    read = np.random.default_rng(0).integers(0, TOKENIZER.vocab_size, (1, tokens))
    logits = [
        engine.logits(read, engine.new_cache(1, tokens), np.array([tokens]))
        for engine in engines.values()
    ]
    for other in logits[1:]:
        assert np.abs(other - logits[0]).max() < 0.05 * np.abs(logits[0]).max()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--nanogpt", type=Path, help="a checkout of nanoGPT; left out where there is none"
    )
    parser.add_argument(
        "--engine", nargs="+", default=["auto", "torch"], choices=["auto", "numpy", "torch"]
    )
    parser.add_argument(
        "--precision", default="auto", choices=get_args(Precision), help="of the engine torch"
    )
    parser.add_argument("--preset", default="nanogpt", choices=PRESETS)
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--rounds", type=int, default=3, help="at least, however long they take")
    args = parser.parse_args()

    torch.set_num_threads(args.threads)
    config, V, rows = (
        as_nanogpt(args.preset, args.batch_size),
        TOKENIZER.vocab_size,
        args.batch_size,
    )
    assert args.tokens <= config.model.block_size, "transformers cannot go beyond the context"
    names = parameter_table(config.model, V)
    weights = larger(dict(initial_weights(names, 0)))
    engines = {}
    for asked in args.engine:
        precision: Precision = args.precision if asked == "torch" else "auto"
        engine = make_engine(
            config,
            V,
            ComputeConfig(engine=asked, device="cpu", precision=precision, threads=args.threads),
        )
        engine.load(weights.items())
        engines[f"glasslm {engine.name} {engine.precision}"] = engine
    ways = {name: by_glasslm(engine, config.model, rows) for name, engine in engines.items()}
    ways[TRANSFORMERS] = by_transformers(transformers_model(config.model, weights), rows)
    if args.nanogpt:
        ways[NANOGPT] = by_nanogpt(
            nanogpt.load(args.nanogpt, config.model, V, weights).eval(), rows
        )
    check(ways, engines, min(64, args.tokens))
    calls = {name: lambda way=way: way(args.tokens, False) for name, way in ways.items()}
    times = take_turns(calls, args.seconds, rounds=args.rounds)

    print(heading("numpy", "torch", "transformers", threads=args.threads))
    parameters = names.total
    print(
        f"preset {args.preset}, {parameters / 1e6:.1f}M parameters, {rows} texts of {args.tokens} tokens"
    )
    print_speeds(
        times, rows * args.tokens, (TRANSFORMERS, NANOGPT) if args.nanogpt else (TRANSFORMERS,)
    )


if __name__ == "__main__":
    main()
