"""Generated tokens/s: glasslm against nanoGPT and transformers on the same weights.

    python benchmarks/generate_against.py [--nanogpt PATH/TO/nanoGPT] [--engine auto torch]
        [--preset nanogpt --batch-size 1 --tokens 256 --threads 2 --seconds 60 --rounds 3]

All start from one newline and sample at temperature 0.8 from the whole vocabulary. nanoGPT and
transformers compute in float32, glasslm in its default precision or, with the engine torch, in that
of --precision. Each is used as its documentation describes: nanoGPT has no KV cache, transformers
uses its own (`GPT2LMHeadModel`, biases zero). glasslm is measured through generation.generate,
including the decoding of tokens to text. Before timing, all must generate the same text greedily
(nanoGPT with the tanh form of GELU during this check). An engine in bfloat16 must give logits close
to the others instead.
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
from torch_speed import enlarge_matrices, nanogpt_config

TOKENIZER = CharTokenizer("\n" + "".join(map(chr, range(32, 96))))  # 65 characters
NANOGPT, TRANSFORMERS = "nanoGPT", "transformers"
TEMPERATURE = 0.8

TextGenerator = Callable[[int, bool], np.ndarray]  # (tokens, greedy) -> (rows, tokens)


def glasslm_generator(engine: Engine, config: ModelConfig, rows: int) -> TextGenerator:
    """A generator that uses a glasslm engine."""

    def generate_tokens(tokens: int, greedy: bool) -> np.ndarray:
        pieces = generate(
            engine,
            TOKENIZER,
            ["\n"],
            model_config=config,
            max_new_tokens=tokens,
            sampling=Sampling(temperature=0.0 if greedy else TEMPERATURE),
            samples=rows,
        )
        sampled: list[list[int]] = [[] for _ in range(rows)]
        for piece in pieces:
            sampled[piece.sample].append(piece.token)
        return np.array(sampled)

    return generate_tokens


def nanogpt_generator(model: Any, rows: int) -> TextGenerator:
    """A generator that uses nanoGPT's model."""
    start = torch.tensor([TOKENIZER.encode("\n").tolist()] * rows)

    def generate_tokens(tokens: int, greedy: bool) -> np.ndarray:
        if not greedy:
            return model.generate(start, tokens, temperature=TEMPERATURE)[:, 1:].numpy()
        with nanogpt.tanh_gelu(model):
            return model.generate(start, tokens, top_k=1)[:, 1:].numpy()

    return generate_tokens


def transformers_generator(model: GPT2LMHeadModel, rows: int) -> TextGenerator:
    """A generator that uses transformers' GPT-2."""
    start = torch.tensor([TOKENIZER.encode("\n").tolist()] * rows)

    def generate_tokens(tokens: int, greedy: bool) -> np.ndarray:
        options: dict[str, Any] = {
            "attention_mask": torch.ones_like(start),
            "max_new_tokens": tokens,
            "use_cache": True,
        }
        options |= (
            {"do_sample": False}
            if greedy
            else {"do_sample": True, "temperature": TEMPERATURE, "top_k": 0}
        )
        output: Any = model.generate(start, **options)  # type: ignore[misc]
        return output[:, 1:].numpy()

    return generate_tokens


def transformers_model(config: ModelConfig, weights: nanogpt.Weights) -> GPT2LMHeadModel:
    """A GPT-2 with these weights and zero biases; its matrices are (in, out)."""
    gpt2_config = GPT2Config(
        vocab_size=TOKENIZER.vocab_size,
        n_positions=config.block_size,
        n_embd=config.d_model,
        n_layer=config.n_layers,
        n_head=config.n_heads,
        activation_function="gelu_new",
        bos_token_id=None,
        eos_token_id=None,
    )
    model = GPT2LMHeadModel(gpt2_config).eval()
    state = {}
    for name, array in nanogpt.gpt2_weights(config, weights).items():
        state[name] = torch.from_numpy(array.T if ".c_" in name else array)
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert not unexpected, unexpected
    for name in missing:
        assert name.endswith(".bias"), name
        model.get_parameter(name).data.zero_()
    return model


def check_agreement(
    variants: dict[str, TextGenerator], engines: dict[str, Engine], tokens: int
) -> None:
    """Assert that all variants agree.

    Variants in float32 must generate the same text greedily; the logits of every engine must be
    within 5% of the first engine's.
    """
    texts = {name: variant(tokens, True) for name, variant in variants.items()}
    exact = {
        name: text
        for name, text in texts.items()
        if name not in engines or engines[name].precision == "fp32"
    }
    first = next(iter(exact))
    for name, text in exact.items():
        assert np.array_equal(text, exact[first]), f"{name} and {first} generate different texts"
    prompt = np.random.default_rng(0).integers(0, TOKENIZER.vocab_size, (1, tokens))
    logits = [
        engine.logits(prompt, engine.new_cache(1, tokens), np.array([tokens]))
        for engine in engines.values()
    ]
    for other in logits[1:]:
        assert np.abs(other - logits[0]).max() < 0.05 * np.abs(logits[0]).max()


def parse_flags() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--nanogpt", type=Path, help="a checkout of nanoGPT (default: without nanoGPT)"
    )
    parser.add_argument(
        "--engine", nargs="+", default=["auto", "torch"], choices=["auto", "numpy", "torch"]
    )
    parser.add_argument(
        "--precision",
        default="auto",
        choices=get_args(Precision),
        help="precision of the engine torch",
    )
    parser.add_argument("--preset", default="nanogpt", choices=PRESETS)
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument(
        "--rounds", type=int, default=3, help="minimum number of rounds, also beyond --seconds"
    )
    return parser.parse_args()


def main() -> None:
    args = parse_flags()
    torch.set_num_threads(args.threads)
    config, V, rows = (
        nanogpt_config(args.preset, args.batch_size),
        TOKENIZER.vocab_size,
        args.batch_size,
    )
    assert args.tokens <= config.model.block_size, (
        "--tokens is longer than the context, which transformers does not allow"
    )
    table = parameter_table(config.model, V)
    weights = enlarge_matrices(dict(initial_weights(table, 0)))
    engines = {}
    for engine_name in args.engine:
        precision: Precision = args.precision if engine_name == "torch" else "auto"
        engine = make_engine(
            config,
            V,
            ComputeConfig(
                engine=engine_name, device="cpu", precision=precision, threads=args.threads
            ),
        )
        engine.load(weights.items())
        engines[f"glasslm {engine.name} {engine.precision}"] = engine
    variants = {
        name: glasslm_generator(engine, config.model, rows) for name, engine in engines.items()
    }
    variants[TRANSFORMERS] = transformers_generator(transformers_model(config.model, weights), rows)
    if args.nanogpt:
        variants[NANOGPT] = nanogpt_generator(
            nanogpt.load_model(args.nanogpt, config.model, V, weights).eval(), rows
        )
    check_agreement(variants, engines, min(64, args.tokens))
    calls = {
        name: lambda variant=variant: variant(args.tokens, False)
        for name, variant in variants.items()
    }
    times = take_turns(calls, args.seconds, rounds=args.rounds)

    print(heading("numpy", "torch", "transformers", threads=args.threads))
    parameters = table.total
    print(
        f"preset {args.preset}, {parameters / 1e6:.1f}M parameters, "
        f"{rows} texts of {args.tokens} tokens"
    )
    print_speeds(
        times, rows * args.tokens, (TRANSFORMERS, NANOGPT) if args.nanogpt else (TRANSFORMERS,)
    )


if __name__ == "__main__":
    main()
