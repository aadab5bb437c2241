"""glasslm import: a model folder of transformers as a run, to inspect, score, tune or generate."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from glasslm.config.config_fields import optional_flag
from glasslm.text import print_result

DESCRIPTION = """Import a model folder of transformers (18 model types: docs/interop.md) or of
PEFT as a run, from its config.json, safetensors and tokenizer.json. If
transformers is installed, the logits are compared with those of transformers.

Examples:
  glasslm import downloads/SmolLM-135M --run-dir runs/smollm
  glasslm generate smollm --prompt "Once upon a time\""""


@dataclass(frozen=True)
class Flags:
    """The model to import, and the new run."""

    path: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="PATH")]
    """Folder of the model, written by save_pretrained or `glasslm export`, or a PEFT folder."""
    run_dir: Annotated[Path | None, optional_flag("PATH", "one under ./runs, named after PATH")] = (
        None
    )
    """Folder of the new run."""
    base: Annotated[str | None, optional_flag("RUN", "none")] = None
    """Run that the adapters of a PEFT folder belong to."""


def main(argv: list[str]) -> int:
    from glasslm.cli.parsing import parse
    from glasslm.interop import model_import
    from glasslm.runs import run_folder

    flags = parse(Flags, argv, "glasslm import", DESCRIPTION)
    run_dir = flags.run_dir or run_folder.RUNS / run_folder.default_name(
        flags.path.resolve().name, "imported"
    )
    command = shlex.join(["glasslm", "import", *argv])
    print_result(f"run: {model_import.import_model(flags.path, flags.base, run_dir, command)}")
    return 0
