"""Import models of the sizes that people download: memory, and speed of text beside transformers.

Two models with random weights are made, which nobody has to download:
- the shape of SmolLM2-135M: the peak memory of `glasslm import` (with and without transformers to
  compare with) and of `glasslm generate`, in processes of their own;
- the shape of Qwen2.5-0.5B in bfloat16, or in float32 where the processor has no products of
  bfloat16: tokens per second of greedy text by `glasslm.load` with the PyTorch engine and by
  transformers' generate, in turns in one process, on --threads cores.

Memory is the growth of the peak resident memory over that of a process that has only imported the
same libraries, as a share of the weights' size in float32 (read from /proc: Linux).

    python benchmarks/import_speed.py            # 8 GB of memory, 10 minutes on two cores
    python benchmarks/import_speed.py --scale 16 # widths and vocabularies 16 times smaller
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import transformers

import glasslm
from glasslm.config.schema import Precision
from glasslm.data.tokenizers import ByteTokenizer
from glasslm.engines.torch.hardware import has_bf16
from glasslm.interop import hf_tokenizer

PRECISION: Precision = "bf16" if has_bf16("cpu") else "fp32"
NO_IDS: dict[str, Any] = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
LIBRARIES = "torch,transformers,transformers.models.llama.modeling_llama"
# Imports the libraries, then runs a command, and prints the growth of the peak memory in bytes.
MEASURE = """
import importlib, sys
from glasslm import cli

def peak():  # VmHWM, because ru_maxrss of a child begins with the memory of its parent
    with open("/proc/self/status") as file:
        line = next(line for line in file if line.startswith("VmHWM"))
    return 1024 * int(line.split()[1])

for name in filter(None, sys.argv[1].split(",")):
    importlib.import_module(name)
before = peak()
code = cli.main(sys.argv[2:])
print("grew", peak() - before)
sys.exit(code)
"""
WITHOUT_TRANSFORMERS = "import sys; sys.modules['transformers'] = None\n"


def smollm2_config(scale: int) -> Any:
    """The shape of SmolLM2-135M, its width and vocabulary divided."""
    return transformers.LlamaConfig(
        vocab_size=49152 // scale, hidden_size=576 // scale // 18 * 18,
        intermediate_size=1536 // scale, num_hidden_layers=30, num_attention_heads=9,
        num_key_value_heads=3,
        max_position_embeddings=8192, tie_word_embeddings=True, rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 1e5}, **NO_IDS,
    )  # fmt: skip


def qwen_config(scale: int) -> Any:
    """The shape of Qwen2.5-0.5B, its width and vocabulary divided."""
    return transformers.Qwen2Config(
        vocab_size=151936 // scale, hidden_size=896 // scale // 28 * 28,
        intermediate_size=4864 // scale, num_hidden_layers=24, num_attention_heads=14,
        num_key_value_heads=2, max_position_embeddings=32768, tie_word_embeddings=True,
        rms_norm_eps=1e-6, rope_parameters={"rope_type": "default", "rope_theta": 1e6}, **NO_IDS,
    )  # fmt: skip


def save_random_model(config: Any, folder: Path) -> int:
    """Write a random model in bfloat16, with a byte tokenizer; returns its number of weights."""
    torch.manual_seed(0)
    make: Any = transformers.AutoModelForCausalLM.from_config
    model = make(config, dtype=torch.bfloat16)
    model.save_pretrained(folder)
    files = hf_tokenizer.tokenizer_files(ByteTokenizer(), 64)
    (folder / "tokenizer.json").write_bytes(files["tokenizer.json"])
    return sum(parameter.numel() for parameter in model.parameters())


def measure(code: str, libraries: str, *command: str) -> tuple[int, float]:
    """The growth of the peak memory of a command of glasslm in bytes, and its seconds."""
    start = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-c", code, libraries, *command], capture_output=True, encoding="utf-8"
    )
    if done.returncode:
        sys.exit(done.stderr)
    return int(done.stdout.split()[-1]), time.perf_counter() - start


def measure_memory(folder: Path, weights: int, threads: int) -> None:
    """Print the peak memory of importing a model and of generating text with it."""
    compared, alone = str(folder / "compared"), str(folder / "alone")
    generate = ("generate", alone, "--prompt", "a", "--max-new-tokens", "16", "--threads",
                str(threads))  # fmt: skip
    rows = {
        "import, compared with transformers": (
            MEASURE, LIBRARIES, "import", str(folder / "model"), "--run-dir", compared,
        ),
        "import, without transformers": (
            WITHOUT_TRANSFORMERS + MEASURE, "", "import", str(folder / "model"), "--run-dir", alone,
        ),
        "generate, NumPy": (MEASURE, "", *generate, "--engine", "numpy"),
        "generate, PyTorch fp32": (
            MEASURE, "torch", *generate, "--engine", "torch", "--precision", "fp32",
        ),
    }  # fmt: skip
    size = 4 * weights
    print(f"{weights:,} weights, {size / 1e6:,.0f} MB in float32; growth of the peak memory:")
    for name, row in rows.items():
        grown, seconds = measure(*row)
        print(f"  {name:36} {grown / 1e6:7,.0f} MB, {grown / size:.2f} of it, {seconds:.0f} s")


def compare_speed(folder: Path, tokens: int, rounds: int, threads: int) -> None:
    """Print tokens per second of both programs, in turns, and the median ratio."""
    torch.set_num_threads(threads)
    run = folder / "run"
    measure(
        WITHOUT_TRANSFORMERS + MEASURE, "", "import", str(folder / "model"), "--run-dir", str(run)
    )
    ours = glasslm.load(run, engine="torch", precision=PRECISION, threads=threads)
    theirs: Any = transformers.AutoModelForCausalLM.from_pretrained(
        folder / "model", dtype={"bf16": torch.bfloat16, "fp32": torch.float32}[PRECISION]
    )
    prompt = "Once upon a time"
    ids = torch.tensor([ours.tokenizer.encode(prompt).tolist()])

    def generate_ours() -> None:
        ours.generate(prompt, max_new_tokens=tokens, temperature=0)

    def generate_theirs() -> None:
        with torch.inference_mode():
            theirs.generate(ids, do_sample=False, min_new_tokens=tokens, max_new_tokens=tokens)

    generate_ours()  # warms both up
    generate_theirs()
    speeds: dict[str, list[float]] = {"glasslm": [], "transformers": []}
    for _ in range(rounds):
        for name, generate in (("glasslm", generate_ours), ("transformers", generate_theirs)):
            start = time.perf_counter()
            generate()
            speeds[name].append(tokens / (time.perf_counter() - start))
    ratio = statistics.median(a / b for a, b in zip(*speeds.values()))
    for name, values in speeds.items():
        print(f"  {name:13} {statistics.median(values):6.2f} tokens/s (median of {rounds})")
    print(f"  glasslm / transformers: {ratio:.2f} (median of the paired ratios)")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--scale", type=int, default=1, help="divides widths and vocabularies")
    parser.add_argument("--part", choices=("memory", "speed", "both"), default="both")
    flags = parser.parse_args()
    logging: Any = transformers.utils.logging
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as name:
        if flags.part != "speed":
            folder = Path(name, "small")
            weights = save_random_model(smollm2_config(flags.scale), folder / "model")
            measure_memory(folder, weights, flags.threads)
        if flags.part != "memory":
            folder = Path(name, "large")
            weights = save_random_model(qwen_config(flags.scale), folder / "model")
            print(f"{weights:,} weights in {PRECISION}, {flags.threads} threads:")
            compare_speed(folder, flags.tokens, flags.rounds, flags.threads)


if __name__ == "__main__":
    main()
