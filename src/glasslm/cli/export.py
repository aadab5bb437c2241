"""glasslm export: a trained model in the files of another program, with its logits compared."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from glasslm.cli.flag_groups import CheckpointFlag, RunArgument
from glasslm.config.config_fields import optional_flag
from glasslm.errors import GlasslmError, InputError
from glasslm.text import notify, print_result, show_elapsed

if TYPE_CHECKING:
    from glasslm.interop.model_export import ModelExport

DESCRIPTION = """Export a trained model to Hugging Face transformers or llama.cpp (GGUF), or its
adapters to PEFT.

The export is read again with the library that it is for, where that is
installed, and the logits are compared. An export whose logits differ from the
model's is deleted.

Examples:
  glasslm export shakespeare-quick --to hf --out shakespeare-hf
  glasslm export shakespeare-quick --to gguf --quantize q8_0 --out model.gguf
  glasslm export names-lora-8 --to peft --out names-peft"""


@dataclass(frozen=True)
class Flags:
    """The model to export, and the format."""

    run: RunArgument
    to: Literal["hf", "gguf", "peft"]
    """Format: hf (a model folder), gguf (one file), or peft (adapters only).
    In hf and gguf, adapters are merged into the weights."""
    out: Path
    """Folder to write, which must be empty or new (for gguf also a file that ends in .gguf)."""
    checkpoint: CheckpointFlag = "best"
    quantize: Annotated[
        Literal["f32", "f16", "q8_0"] | None, optional_flag("f32|f16|q8_0", "f32")
    ] = None
    """Format of the matrices in gguf: 32, 16 or 8 bits."""
    base: Annotated[str | None, optional_flag("PATH", "OUT/base, which is written too")] = None
    """Path of the model that the adapters of peft belong to."""


def main(argv: list[str]) -> int:
    from glasslm.cli.parsing import parse

    flags = parse(Flags, argv, "glasslm export", DESCRIPTION)
    for name, to in (("quantize", "gguf"), ("base", "peft")):
        if getattr(flags, name) and flags.to != to:
            raise InputError(f"--{name} is for --to {to}, not for --to {flags.to}: leave it out")
    return {"hf": _to_hf, "gguf": _to_gguf, "peft": _to_peft}[flags.to](flags)


def _to_hf(flags: Flags) -> int:
    from glasslm import files
    from glasslm.interop import hf, model_card

    hf.require_empty(flags.out)
    model = _load_export(flags)
    _note_document_attention(model)
    with files.atomic_path(flags.out) as folder:
        with show_elapsed("writing the model", notify):
            hf.write(model, folder)
        with show_elapsed("comparing its logits in transformers", notify):
            difference = _compare_logits(model, lambda tokens: hf.logits(folder, tokens))
        card = model_card.render_card(model, difference)
        files.write_atomic(folder / "README.md", card.encode())
        result = _judge("transformers", difference, hf.TOLERANCE, flags.out)
    print_result(result)
    return 0


def _to_gguf(flags: Flags) -> int:
    from glasslm import files
    from glasslm.interop import gguf_comparison, gguf_file

    model, kind = _load_export(flags), flags.quantize or "f32"
    path = flags.out
    if path.suffix != ".gguf":
        path = path / f"{model.run.path.resolve().name}-{kind}.gguf"
    if path.exists():
        raise InputError(f"{path} exists: choose another --out")
    gguf_file.llama_cpp_form(model, kind)  # refuses before anything is said or written
    _note_document_attention(model)
    lines = []
    with files.atomic_path(path) as file:
        with show_elapsed("writing the model", notify):
            gguf_file.write(model, file, kind)
        if misreading := gguf_comparison.transformers_misreading(model.config):
            notify(
                f"note: transformers reads this file as {misreading}: use --to hf for transformers"
            )
        notify("comparing its logits in the installed programs that read the file")
        for comparison in gguf_comparison.compare_readers(model, file, kind):
            difference = (
                f"relative difference {comparison.largest_difference:.1e}, "
                f"KL divergence {comparison.kl_divergence:.1e} nats per token"
            )
            if not comparison.is_close(model.config, kind):
                raise GlasslmError(
                    f"logits differ in {comparison.reader} ({difference}): {path} was deleted"
                )
            tokens = "" if comparison.same_tokens is None else ", tokens equal"
            lines.append(
                f"{path}: logits equal in {comparison.reader} as {kind} allows{tokens} "
                f"({difference})"
            )
    if not lines:
        notify("note: logits not compared: install llama-cpp-python, which reads the file")
    print_result("\n".join(lines or [f"{path}: written, not compared"]))
    return 0


def _to_peft(flags: Flags) -> int:
    from glasslm import files
    from glasslm.interop import hf, peft_files
    from glasslm.runs import checkpoint as checkpoints
    from glasslm.runs.checkpoint_selector import parse_checkpoint

    hf.require_empty(flags.out)
    model = _load_export(flags)
    _note_document_attention(model)
    checkpoint = checkpoints.load(model.run.path, parse_checkpoint(flags.checkpoint))
    with files.atomic_path(flags.out) as folder:
        peft_files.write(model.run, checkpoint, folder, flags.base)
        base = Path(flags.base) if flags.base else folder / "base"
        if flags.base is None:
            hf.write(peft_files.base_export(model.run, checkpoint), base)
        difference = None
        if base.is_dir():
            with show_elapsed("comparing its logits in PEFT", notify):
                difference = _compare_logits(
                    model, lambda tokens: peft_files.logits(base, folder, tokens)
                )
        result = _judge("PEFT", difference, hf.TOLERANCE, flags.out)
    print_result(result)
    return 0


def _load_export(flags: Flags) -> ModelExport:
    from glasslm.interop import model_export
    from glasslm.runs.checkpoint_selector import parse_checkpoint

    with show_elapsed("reading the checkpoint", notify):
        return model_export.load_export(flags.run, parse_checkpoint(flags.checkpoint))


def _note_document_attention(model: ModelExport) -> None:
    from glasslm.interop.model_export import DOCUMENT_ATTENTION_NOTE

    if model.config.document_attention:
        notify(f"note: {DOCUMENT_ATTENTION_NOTE}")


def _compare_logits(model: ModelExport, compute_logits: Callable[[Any], Any]) -> float | None:
    """Largest difference from the logits of another program, relative to the largest logit.

    None, with a note, if that program is not installed.
    """
    from glasslm.interop.model_export import largest_difference

    tokens = model.probe_tokens()
    try:
        logits = compute_logits(tokens)
    except InputError as error:
        notify(f"note: logits not compared: {error}")
        return None
    return largest_difference(model.logits(tokens), logits)


def _judge(reader: str, difference: float | None, tolerance: float, path: Path) -> str:
    """The result in one line. Raises GlasslmError if the logits differ too much."""
    if difference is None:
        return f"{path}: written, not compared with {reader}"
    numbers = f"relative difference {difference:.1e}, allowed {tolerance:.0e}"
    if not difference <= tolerance:
        raise GlasslmError(f"logits differ in {reader} ({numbers}): {path} was deleted")
    return f"{path}: logits equal in {reader} ({numbers})"
