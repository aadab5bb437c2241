"""The peak memory of each variant of docs/ablation, each in a process of its own.

    python benchmarks/ablation_memory.py [--text-file shakespeare.txt] [--write]

Memory depends on the sizes of a run and not on its length or text, so each variant is trained for
four steps with one seed, and evaluated on 1% of the text, which is more than one batch. Without
--text-file, the text is random: as many characters as Shakespeare has, of an alphabet as large.
--write replaces the memory columns of docs/ablation.
"""

from __future__ import annotations

import argparse
import csv
import io
import re
import tempfile
from pathlib import Path

import numpy as np

from glasslm.config.conversion import with_flags
from glasslm.config.presets import tiny
from glasslm.config.schema import ComputeConfig
from glasslm.lab.studies.ablation_axes import Variant, variants
from glasslm.lab.studies.study_plan import with_sparse_logging
from glasslm.lab.studies.sweep import Runner, Trial, run_all
from glasslm.lab.studies.trial_results import read_trial
from glasslm.model.parameters import parameter_table
from glasslm.text import format_bytes, notify

STUDY = Path(__file__).parents[1] / "docs" / "ablation"
CHARACTERS, ALPHABET = 1_115_394, 65  # of Shakespeare's text
STEPS, SEED = 4, 42
FLAGS = {
    "n_layers": 6, "d_model": 96, "n_heads": 6, "block_size": 128, "batch_size": 16, "lr": 0.01,
    "max_steps": STEPS, "warmup_steps": 1, "seed": SEED, "tokenizer": "char", "val_fraction": 0.01,
}  # fmt: skip
AXES = ("depth=2/4/8/12", "width=16/32/64/128", "heads=1/2/4/8", "activation", "norm")


def write_random_text(path: Path) -> Path:
    """A text of the size and the alphabet of Shakespeare's."""
    codes = np.random.default_rng(0).integers(0, ALPHABET, CHARACTERS) + ord("!")
    codes[:ALPHABET] = np.arange(ALPHABET) + ord("!")
    path.write_bytes(codes.astype(np.uint8).tobytes())
    return path


def measure(text: Path, folder: Path) -> dict[str, int]:
    """The peak bytes of each variant by its name in the table; checks its number of parameters."""
    base = with_flags(tiny(), {"text_file": (str(text),), **FLAGS}).resolve()
    planned = [Variant("baseline", "", base), *variants(AXES, base)]
    rows = read_table()
    parameters = {row["variant"]: int(row["parameters"]) for row in rows}
    names = {f"{variant.axis} {variant.value}".strip(): variant for variant in planned}
    assert names.keys() == parameters.keys(), names.keys() ^ parameters.keys()
    for name, variant in names.items():
        assert parameter_table(variant.config.model, ALPHABET).total == parameters[name], name
    trials = [
        Trial(name.replace("/", "-").replace(" ", "-"), with_sparse_logging(variant.config))
        for name, variant in names.items()
    ]
    runner = Runner(ComputeConfig(engine="numpy", precision="fp32", threads=1), workers=1)
    outcomes = run_all(folder, trials, runner, ALPHABET, notify)
    peaks = {}
    for name, trial in zip(names, trials):
        peak = read_trial(SEED, outcomes[trial.name]).peak_bytes
        assert peak is not None, f"{name} has no result: see logs/"
        peaks[name] = peak
    return peaks


def read_table() -> list[dict[str, str]]:
    text = (STUDY / "ablation_table.csv").read_text(encoding="utf-8")
    return list(csv.DictReader(io.StringIO(text)))


def write_peaks(peaks: dict[str, int]) -> None:
    """Replace the column peak_bytes of the table, and the column memory of the report."""
    rows = read_table()
    out = io.StringIO()
    writer = csv.DictWriter(out, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(row | {"peak_bytes": str(peaks[row["variant"]])} for row in rows)
    (STUDY / "ablation_table.csv").write_text(out.getvalue(), encoding="utf-8")
    lines = (STUDY / "report.md").read_text(encoding="utf-8").splitlines(keepends=True)
    for index, line in enumerate(lines):
        name = line.split("|")[1].strip() if line.startswith("|") else ""
        if name in peaks and re.search(r"\d [kMG]B \| *$", line):
            lines[index] = re.sub(
                r"\| [\d.]+ [kMG]B \| *$", f"| {format_bytes(peaks[name])} | ", line.rstrip("\n")
            )
            lines[index] += "\n"
    (STUDY / "report.md").write_text("".join(lines), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--text-file", type=Path)
    parser.add_argument("--write", action="store_true")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        text = arguments.text_file or write_random_text(Path(folder, "text.txt"))
        peaks = measure(text, Path(folder, "study"))
    for name, peak in peaks.items():
        print(f"{name:20} {peak / 1e6:8.1f} MB")
    if arguments.write:
        write_peaks(peaks)


if __name__ == "__main__":
    main()
