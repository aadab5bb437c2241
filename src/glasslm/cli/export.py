"""glasslm export: a trained model in the files of another program, and whether that computes the same."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from glasslm.errors import InputError
from glasslm.wording import tell

if TYPE_CHECKING:
    from glasslm.interop.leaving import Leaving

DESCRIPTION = """Take a trained model to Hugging Face transformers, to llama.cpp (GGUF), or its adapters to PEFT.

What is written is read again with the library that it is for, where that is installed, and its logits are compared.

Examples:
  glasslm export shakespeare-tiny --to hf --out shakespeare-hf
  glasslm export shakespeare-tiny --to gguf --quantize q8_0 --out shakespeare.gguf
  glasslm export names-lora-8 --to peft --out names-peft"""


@dataclass(frozen=True)
class Flags:
    run: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="RUN")]
    """A run's folder, or its name under ./runs."""
    to: Literal["hf", "gguf", "peft"]
    """hf: a model folder; gguf: one file; peft: adapters alone. In hf and gguf adapters are merged into the weights."""
    out: Path
    """The folder to write, which must not hold anything yet; for gguf also the file itself, if it ends in .gguf."""
    checkpoint: Annotated[str, tyro.conf.arg(metavar="best|latest|STEP")] = "best"
    """Which of the run's checkpoints."""
    quantize: Literal["f32", "f16", "q8_0"] | None = None
    """How gguf keeps matrices: as they are (f32, unless it is given), in 16 bits, or in 8."""
    base: Annotated[str | None, tyro.conf.arg(metavar="PATH")] = None
    """Where the model is that peft's adapters stand beside (default: OUT/base, which is written too)."""


def main(argv: list[str]) -> int:
    from glasslm.cli.parsing import parse

    flags = parse(Flags, argv, "glasslm export", DESCRIPTION)
    for name, to in (("quantize", "gguf"), ("base", "peft")):
        if getattr(flags, name) and flags.to != to:
            raise InputError(f"--{name} is for --to {to}, not for --to {flags.to}: leave it out")
    return {"hf": _to_hf, "gguf": _to_gguf, "peft": _to_peft}[flags.to](flags)


def _to_hf(flags: Flags) -> int:
    from glasslm import files
    from glasslm.interop import card, hf

    model = _leaving(flags)
    hf.write(model, flags.out)
    difference = _difference(model, lambda tokens: hf.logits(flags.out, tokens))
    files.write_atomic(flags.out / "README.md", card.text(model, difference).encode())
    return _told("transformers", difference, hf.TOLERANCE, flags.out)


def _to_gguf(flags: Flags) -> int:
    from glasslm.interop import gguf_file

    model, kind = _leaving(flags), flags.quantize or "f32"
    path = flags.out if flags.out.suffix == ".gguf" else flags.out / f"{model.run.path.resolve().name}-{kind}.gguf"
    if path.exists():
        raise InputError(f"{path} is there already: choose another --out")
    gguf_file.write(model, path, kind)
    if other := gguf_file.misread(model.config):
        tell(f"note: transformers' own reader of GGUF would make {other} of it; --to hf is the way there")
    found = list(gguf_file.readings(model, path, kind))
    if not found:
        tell("note: the logits were not compared: no program that reads the file is installed (llama-cpp-python)")
        print(f"{path}: written, not compared")
    for reading in found:
        seen = f"apart by {reading.largest:.1e} of the largest, {reading.divergence:.1e} nats a token"
        tokens = "" if reading.same_tokens is None else f", tokens {'equal' if reading.same_tokens else 'NOT EQUAL'}"
        verdict = "equal" if reading.close(model.config, kind) else "NOT EQUAL"
        print(f"{path}: logits {verdict} in {reading.reader} as {kind} allows{tokens} ({seen})")
    return 0 if all(reading.close(model.config, kind) for reading in found) else 1


def _to_peft(flags: Flags) -> int:
    from glasslm import checkpoint as checkpoints
    from glasslm.interop import hf, peft_files
    from glasslm.trained import parse_checkpoint

    model = _leaving(flags)
    held = checkpoints.load(model.run.path, parse_checkpoint(flags.checkpoint))
    base = flags.base or str(flags.out / "base")
    peft_files.write(model.run, held, flags.out, base)
    if flags.base is None:
        hf.write(peft_files.base_of(model.run, held), flags.out / "base")
    found = None
    if Path(base).is_dir():
        found = _difference(model, lambda tokens: peft_files.logits(Path(base), flags.out, tokens))
    return _told("PEFT", found, hf.TOLERANCE, flags.out)


def _leaving(flags: Flags) -> Leaving:
    from glasslm.interop import hf, leaving
    from glasslm.trained import parse_checkpoint

    if flags.out.suffix != ".gguf" and flags.to != "gguf":
        hf.require_empty(flags.out)
    return leaving.of(flags.run, parse_checkpoint(flags.checkpoint))


def _difference(model: Leaving, theirs: Callable[[Any], Any]) -> float | None:
    """Of our logits and theirs; None, and a word why, where their program is not installed."""
    from glasslm.interop.leaving import largest_difference

    tokens = model.probe()
    try:
        found = theirs(tokens)
    except InputError as error:
        tell(f"note: the logits were not compared: {error}")
        return None
    return largest_difference(model.logits(tokens), found)


def _told(reader: str, difference: float | None, allowed: float, path: Path) -> int:
    """The result for people, and the exit code."""
    if difference is None:
        print(f"{path}: written, not compared with {reader}")
        return 0
    verdict = "equal" if difference <= allowed else "NOT EQUAL"
    seen = f"apart by {difference:.1e} of the largest, {allowed:.0e} allowed"
    print(f"{path}: logits {verdict} in {reader} ({seen})")
    return 0 if difference <= allowed else 1
