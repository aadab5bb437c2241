"""Generated tokens/s of one text: glasslm against llama.cpp with the same weights.

    pip install 'glasslm[interop]' llama-cpp-python
    python benchmarks/llama_cpp_speed.py [--preset nanogpt --tokens 250 --threads 1 2
        --quantize f32 q8_0 --rounds 5]

An untrained run of the preset is exported by `glasslm export --to gguf`. Both start from a newline
and take the likeliest token each time, so no sampling is counted; in float32 they must write the
same tokens. llama.cpp decodes one token a call, by `Llama.eval`; glasslm by `generation.generate`,
with the decoding of tokens to text. On a CPU with bfloat16 products, the PyTorch
engine reads its weights in bfloat16, too: a row of its own. Programs take turns.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # as glasslm's command line does
import llama_cpp
import numpy as np
import torch

import glasslm
from glasslm.config.presets import PRESETS
from glasslm.config.schema import ComputeConfig
from glasslm.engines.factory import make_engine
from glasslm.engines.protocol import Engine
from glasslm.engines.torch.hardware import has_bf16
from glasslm.inference.generation import generate
from glasslm.inference.sampling import Sampling
from glasslm.inference.trained_model import Model
from glasslm.interop import gguf_file
from glasslm.interop.model_export import load_export
from glasslm.runs import checkpoint
from paired import heading, print_speeds, take_turns
from serve_speed import make_run


def write_with_llama_cpp(model: Any, start: int, vocab_size: int, tokens: int) -> list[int]:
    """The likeliest tokens, by llama.cpp."""
    model.reset()
    written = [start]
    for _ in range(tokens):
        model.eval(written[-1:])
        logits = np.ctypeslib.as_array(llama_cpp.llama_get_logits(model.ctx), (vocab_size,))
        written.append(int(logits.argmax()))
    return written[1:]


def write_with_glasslm(model: Model, engine: Engine, tokens: int) -> list[int]:
    """The likeliest tokens, by glasslm."""
    pieces = generate(
        engine,
        model.tokenizer,
        ["\n"],
        model_config=model.config.model,
        max_new_tokens=tokens,
        sampling=Sampling(temperature=0.0),
    )
    return [piece.token for piece in pieces]


def write_in_bf16(model: Model, engine: Engine, tokens: int, threads: int) -> list[int]:
    """The likeliest tokens, by the PyTorch engine with bfloat16 weights."""
    torch.set_num_threads(threads)
    return write_with_glasslm(model, engine, tokens)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--preset", default="nanogpt", choices=list(PRESETS))
    parser.add_argument("--tokens", type=int, default=250)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--quantize", nargs="+", default=["f32", "q8_0"])
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        run = make_run(Path(folder) / "run", args.preset)
        model = glasslm.load(run)
        weights = checkpoint.load(run, model.step).weights()
        (start,) = model.tokenizer.encode("\n").tolist()
        programs: dict[str, Callable[[], list[int]]] = {}
        for threads in args.threads:
            compute = ComputeConfig("numpy", "cpu", "fp32", threads=threads)
            engine = make_engine(model.config, model.tokenizer.vocab_size, compute)
            engine.load(weights.items())
            programs[f"glasslm, {threads} threads"] = partial(
                write_with_glasslm, model, engine, args.tokens
            )
            if has_bf16("cpu"):
                compute = ComputeConfig("torch", "cpu", "bf16", threads=threads)
                engine = make_engine(model.config, model.tokenizer.vocab_size, compute)
                engine.load(weights.items())
                programs[f"glasslm bf16, {threads} threads"] = partial(
                    write_in_bf16, model, engine, args.tokens, threads
                )
            for quantization in args.quantize:
                path = Path(folder) / f"{quantization}.gguf"
                if not path.exists():
                    gguf_file.write(load_export(str(run), "latest"), path, quantization)
                reader = llama_cpp.Llama(
                    str(path), n_ctx=model.config.model.block_size, n_threads=threads, verbose=False
                )
                programs[f"llama.cpp {quantization}, {threads} threads"] = partial(
                    write_with_llama_cpp, reader, start, model.tokenizer.vocab_size, args.tokens
                )
        texts = {name: program() for name, program in programs.items()}
        first = next(iter(texts.values()))
        for name, text in texts.items():
            is_exact = "q8_0" not in name and "bf16" not in name
            assert not is_exact or text == first, f"{name} writes another text"
        times = take_turns(programs, 0, rounds=args.rounds)
    print(heading("numpy", "llama-cpp-python", threads=max(args.threads)))
    print(f"preset {args.preset}, one text of {args.tokens} tokens, greedy")
    peers = tuple(name for name in programs if name.startswith("llama.cpp"))
    print_speeds(times, args.tokens, peers)


if __name__ == "__main__":
    main()
