"""glasslm export: a trained model in the files of another program, and whether that computes the same."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from glasslm.errors import GlasslmError, InputError
from glasslm.text import tell

if TYPE_CHECKING:
    from glasslm.interop.model_export import Leaving

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

    hf.require_empty(flags.out)
    model = _leaving(flags)
    with files.in_the_making(flags.out) as aside:
        hf.write(model, aside)
        difference = _difference(model, lambda tokens: hf.logits(aside, tokens))
        files.write_atomic(aside / "README.md", card.text(model, difference).encode())
        told = _judged("transformers", difference, hf.TOLERANCE, flags.out)
    print(told)
    return 0


def _to_gguf(flags: Flags) -> int:
    from glasslm import files
    from glasslm.interop import gguf_file

    model, kind = _leaving(flags), flags.quantize or "f32"
    path = (
        flags.out
        if flags.out.suffix == ".gguf"
        else flags.out / f"{model.run.path.resolve().name}-{kind}.gguf"
    )
    if path.exists():
        raise InputError(f"{path} is there already: choose another --out")
    with files.in_the_making(path) as aside:
        gguf_file.write(model, aside, kind)
        if other := gguf_file.misread(model.config):
            tell(
                f"note: transformers' own reader of GGUF would make {other} of it; --to hf is the way there"
            )
        lines = []
        for reading in gguf_file.readings(model, aside, kind):
            seen = f"apart by {reading.largest:.1e} of the largest, {reading.divergence:.1e} nats a token"
            if not reading.close(model.config, kind):
                raise GlasslmError(
                    f"{reading.reader} computes something else from it ({seen}): {path} was not kept"
                )
            tokens = "" if reading.same_tokens is None else ", tokens equal"
            lines.append(
                f"{path}: logits equal in {reading.reader} as {kind} allows{tokens} ({seen})"
            )
    if not lines:
        tell(
            "note: the logits were not compared: no program that reads the file is installed (llama-cpp-python)"
        )
    print("\n".join(lines or [f"{path}: written, not compared"]))
    return 0


def _to_peft(flags: Flags) -> int:
    from glasslm import files
    from glasslm.inference.trained_model import parse_checkpoint
    from glasslm.interop import hf, peft_files
    from glasslm.runs import checkpoint as checkpoints

    hf.require_empty(flags.out)
    model = _leaving(flags)
    held = checkpoints.load(model.run.path, parse_checkpoint(flags.checkpoint))
    with files.in_the_making(flags.out) as aside:
        # No folder of this machine in what may be published: it holds where the folder of adapters lies.
        peft_files.write(model.run, held, aside, flags.base or f"{flags.out.resolve().name}/base")
        base = Path(flags.base) if flags.base else aside / "base"
        if flags.base is None:
            hf.write(peft_files.base_of(model.run, held), base)
        found = None
        if base.is_dir():
            found = _difference(model, lambda tokens: peft_files.logits(base, aside, tokens))
        told = _judged("PEFT", found, hf.TOLERANCE, flags.out)
    print(told)
    return 0


def _leaving(flags: Flags) -> Leaving:
    from glasslm.inference.trained_model import parse_checkpoint
    from glasslm.interop import model_export

    return model_export.of(flags.run, parse_checkpoint(flags.checkpoint))


def _difference(model: Leaving, theirs: Callable[[Any], Any]) -> float | None:
    """Of our logits and theirs; None, and a word why, where their program is not installed."""
    from glasslm.interop.model_export import largest_difference

    tokens = model.probe()
    try:
        found = theirs(tokens)
    except InputError as error:
        tell(f"note: the logits were not compared: {error}")
        return None
    return largest_difference(model.logits(tokens), found)


def _judged(reader: str, difference: float | None, allowed: float, path: Path) -> str:
    """The result for people. Raises GlasslmError where the two compute something else."""
    if difference is None:
        return f"{path}: written, not compared with {reader}"
    seen = f"apart by {difference:.1e} of the largest, {allowed:.0e} allowed"
    if not difference <= allowed:
        raise GlasslmError(
            f"{reader} computes something else from it ({seen}): {path} was not kept"
        )
    return f"{path}: logits equal in {reader} ({seen})"
