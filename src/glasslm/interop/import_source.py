"""Check the path given to `glasslm import`: it is a model folder, or the error names the cure.

A file that runs code when it is read (PyTorch's .pt, .bin and .pth) is never opened as such.
"""

from __future__ import annotations

import re
from pathlib import Path

from glasslm.data.sources.content_kinds import (
    GGUF,
    HEAD_BYTES,
    PICKLE,
    PYTORCH_ARCHIVE,
    identify_content,
)
from glasslm.errors import InputError
from glasslm.interop.peft_settings import SETTINGS_FILE
from glasslm.interop.untrusted_json import CONFIG_FILE

PICKLE_SUFFIXES = (".pt", ".pth", ".bin", ".ckpt", ".pkl", ".pickle")
HUB_NAME = re.compile(r"(?:[A-Za-z0-9][\w.-]*/)?[A-Za-z0-9][\w.-]*")
PICKLE_CURE = (
    "it runs code when it is read. Save the model again where it was made, with "
    "model.save_pretrained(FOLDER) of transformers, and import FOLDER"
)
GGUF_CURE = "give the safetensors folder that it was made from"


def require_model_folder(path: Path) -> None:
    """Raise InputError, with the cure, unless `path` is a folder of a model or of adapters."""
    if path.suffix == ".gguf":
        raise InputError(f"{path} is a GGUF file: {GGUF_CURE}")
    if not path.exists():
        raise InputError(_explain_missing(path))
    if not path.is_dir():
        raise InputError(_explain_file(path))
    if (path / SETTINGS_FILE).is_file() or (path / CONFIG_FILE).is_file():
        return
    raise InputError(_explain_folder(path))


def is_hub_name(text: str) -> bool:
    """Whether `text` may be the name of a model on the Hugging Face hub: NAME or OWNER/NAME.

    A path that exists on this machine is not a name.
    """
    return HUB_NAME.fullmatch(text) is not None and ".." not in text and not Path(text).exists()


def _explain_missing(path: Path) -> str:
    if path.suffix in PICKLE_SUFFIXES or not is_hub_name(path.as_posix()):
        return (
            f"there is nothing at {path}: expected a model folder with {CONFIG_FILE}, as "
            "transformers writes it"
        )
    return (
        f"there is no folder {path}: expected a model folder with {CONFIG_FILE}. glasslm fetches "
        f"no models; if this is a name on the hub:\n`hf download {path.as_posix()} --local-dir "
        f"{path.name}`, then `glasslm import {path.name}`"
    )


def _explain_file(path: Path) -> str:
    with open(path, "rb") as file:
        content = identify_content(file.read(HEAD_BYTES), str(path))
    kind = content.name if content else "a file"
    if kind == GGUF:
        return f"{path} is a GGUF file: {GGUF_CURE}"
    if path.suffix in PICKLE_SUFFIXES or kind in (PICKLE, PYTORCH_ARCHIVE):
        return f"{path} is a checkpoint of PyTorch: {PICKLE_CURE}"
    if (path.parent / CONFIG_FILE).is_file() or (path.parent / SETTINGS_FILE).is_file():
        return f"{path} is one file of a model: give its folder, `glasslm import {path.parent}`"
    if path.suffix == ".safetensors":
        return (
            f"{path} holds weights alone: put the model's {CONFIG_FILE} and tokenizer.json beside "
            "it, and give the folder"
        )
    return f"{path} is {kind}: expected a model folder with {CONFIG_FILE}"


def _explain_folder(path: Path) -> str:
    if (path / "run.json").is_file():
        return (
            f"{path} is a run of glasslm, not a folder of transformers with {CONFIG_FILE}: use it "
            f"as it is, `glasslm generate {path}`"
        )
    inner = sorted([*path.glob(f"*/{CONFIG_FILE}"), *path.glob(f"snapshots/*/{CONFIG_FILE}")])
    if inner:
        return (
            f"{path} holds no {CONFIG_FILE}, but {inner[0].parent} does: give a folder with one "
            "model"
        )
    names = sorted(entry.name for entry in path.iterdir())
    for suffixes, cure in (
        ((".safetensors",), f"but no {CONFIG_FILE}: put the model's own beside it"),
        ((".gguf",), f"a GGUF file: {GGUF_CURE}"),
        (PICKLE_SUFFIXES, f"a checkpoint of PyTorch: {PICKLE_CURE}"),
    ):
        if matching := [name for name in names if name.endswith(suffixes)]:
            return f"{path} holds {matching[0]}, {cure}"
    return f"{path} holds no {CONFIG_FILE}: expected a model folder as transformers writes it"
