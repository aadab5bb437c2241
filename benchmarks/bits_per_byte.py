"""Bits per byte of a trained model on its validation text, beside n-grams, gzip and xz.

    python benchmarks/bits_per_byte.py --run RUN
    python benchmarks/bits_per_byte.py --corpus python --max-time 10m

With --run, a finished run is read. Otherwise all flags go to `glasslm train`, and the CPU seconds
of that command are printed, with imports, compiling, evaluations and the report. The n-grams
(Witten-Bell) and `xz -9e` have read the whole training text first: the size of xz is that of both
texts minus that of the training text. The best order of the n-grams is chosen on the validation
text, in their favour.
"""

from __future__ import annotations

import argparse
import lzma
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

from glasslm.data.baselines import ngram_bpb, simple_baselines
from glasslm.data.dataset import Split
from glasslm.data.tokenizers import Tokenizer
from glasslm.report.data_checks import decode_bytes
from glasslm.runs.history import best_eval, read_history
from glasslm.runs.metrics import read_lines
from glasslm.runs.run_folder import Run, find_run
from glasslm.text import align_columns, notify

XZ_PRESET = 9 | lzma.PRESET_EXTREME  # its dictionary has 64 MiB


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--run", help="a finished run (default: train one with all other flags)")
    arguments, train_flags = parser.parse_known_args()
    if arguments.run is not None:
        print_table(Run(find_run(arguments.run)))
        return
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "run")
        train(path, train_flags)
        print_table(Run(path))


def train(path: Path, flags: list[str]) -> None:
    """Train a run in the new folder `path`, and print the CPU seconds of the command."""
    command = [sys.executable, "-m", "glasslm", "train", "--run-dir", str(path), *flags]
    if subprocess.run(command).returncode:
        raise SystemExit("training failed")
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    print(f"glasslm train {' '.join(flags)}")
    print(f"CPU seconds: user {usage.ru_utime:.0f}, system {usage.ru_stime:.0f}")


def print_table(run: Run) -> None:
    """Print the bits per byte of a run's best evaluation and of the baselines."""
    dataset = run.dataset(notify)
    lines = list(read_lines(run.path / "metrics.jsonl"))
    best = best_eval(lines, read_history(lines))
    if best is None:
        raise SystemExit(f"{run.path} has no evaluation with a finite loss")
    train_text, text = (
        decode_split(split, dataset.tokenizer) for split in (dataset.train, dataset.val)
    )
    print(f"{len(train_text):,} bytes of training text, {len(text):,} of validation text")
    extent = "" if best["whole"] else f", on {best['tokens']:,} tokens of it"
    rows = [("glasslm", best["bpb"], f"loss {best['loss']:.4f} at step {best['step']}{extent}")]
    by_order = ngram_bpb(train_text, text)
    best_order = 1 + by_order.index(min(by_order))
    rows += [
        (f"{order}-gram", by_order[order - 1], "Witten-Bell" + ", the best order" * is_best)
        for order, is_best in sorted({5: best_order == 5, best_order: True}.items())
    ]
    rows += [
        ("xz -9e after the training text", xz_bpb_after(train_text, text), ""),
        ("xz -9e", 8 * xz_size(text) / len(text), "the validation text alone"),
        ("gzip -9", simple_baselines(text)["gzip_bpb"], "the validation text alone"),
    ]
    print("\n".join(align_columns([(name, f"{bpb:.3f}", note) for name, bpb, note in rows])))


def decode_split(split: Split, tokenizer: Tokenizer) -> bytes:
    """The whole text of a split."""
    return decode_bytes(split.tokens, tokenizer, sys.maxsize)


def xz_bpb_after(train_text: bytes, text: bytes) -> float:
    """Bits per byte that xz needs for `text` after `train_text`."""
    return 8 * (xz_size(train_text + text) - xz_size(train_text)) / len(text)


def xz_size(text: bytes) -> int:
    """The size of a text by `xz -9e`, in bytes."""
    return len(lzma.compress(text, preset=XZ_PRESET))


if __name__ == "__main__":
    main()
