"""glasslm import: a model folder of transformers as a run, to look into, score, go on from or let write."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

DESCRIPTION = """Bring in a model of the Llama or GPT-2 kind: config.json, safetensors and tokenizer.json in one folder.

Example:
  glasslm import downloads/SmolLM-135M --run-dir runs/smollm
  glasslm generate smollm --prompt "Once upon a time" """


@dataclass(frozen=True)
class Flags:
    path: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="PATH")]
    """The model's folder, as transformers' save_pretrained or `glasslm export` wrote it; or a folder of PEFT's."""
    run_dir: Path | None = None
    """The new run's folder (default: one under ./runs, named after PATH)."""
    base: Annotated[str | None, tyro.conf.arg(metavar="RUN")] = None
    """The run that adapters (a folder of PEFT's) stand beside."""


def main(argv: list[str]) -> int:
    from glasslm.cli.parsing import parse
    from glasslm.interop import model_import
    from glasslm.runs import run_folder

    flags = parse(Flags, argv, "glasslm import", DESCRIPTION)
    run_dir = flags.run_dir or run_folder.RUNS / run_folder.default_name(
        flags.path.resolve().name, "imported"
    )
    command = shlex.join(["glasslm", "import", *argv])
    print(f"run: {model_import.bring_in(flags.path, flags.base, run_dir, command)}")
    return 0
