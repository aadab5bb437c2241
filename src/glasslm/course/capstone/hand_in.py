"""The files of a capstone that are handed in, as one zip without paths of the machine."""

from __future__ import annotations

import html
import io
import json
import shlex
import zipfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from glasslm import files
from glasslm.runs import checkpoint

TEXT_SUFFIXES = {".html", ".md", ".json", ".jsonl", ".csv", ".txt", ".css", ".js", ".svg"}
# Runs of studies, output of processes, and checkpoints with the state of optimizers are left out.
OMITTED_FOLDERS = {"runs", "logs", "checkpoints", "base"}
FIXED_TIME = (1980, 1, 1, 0, 0, 0)  # of each entry, so that equal folders give equal zips


def write_zip(folder: Path) -> Path:
    """Write the zip beside the folder of a capstone; returns its path.

    It has the pages, figures, tables and records, and the best weights. Paths inside the folder
    become relative to it, other absolute paths the names of their files.
    """
    names = _machine_paths(folder)
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for path in _list_files(folder):
            data = path.read_bytes()
            if path.suffix in TEXT_SUFFIXES:
                data = _replace_paths(data.decode("utf-8"), names).encode("utf-8")
            entry = zipfile.ZipInfo(path.relative_to(folder).as_posix(), FIXED_TIME)
            entry.compress_type = zipfile.ZIP_DEFLATED
            archive.writestr(entry, data)
    target = folder.with_name(f"{folder.resolve().name}.zip")
    files.write_atomic(target, buffer.getvalue())
    return target


def _list_files(folder: Path) -> list[Path]:
    """The files of the zip in a fixed order."""
    paths = [
        path
        for path in folder.rglob("*")
        if path.is_file()
        and not OMITTED_FOLDERS & set(path.relative_to(folder).parts[:-1])
        and not path.name.startswith(".")
        and path.suffix in TEXT_SUFFIXES | {".png"}
    ]
    run = folder / "run"
    if (run / "run.json").exists() and checkpoint.list_steps(run):
        paths.append(checkpoint.load(run, "best").path / "model.safetensors")
    return sorted(paths)


def _machine_paths(folder: Path) -> dict[str, str]:
    """Absolute paths of this machine that may occur in the files, and what replaces each."""
    names = {str(folder.resolve()): ".", str(folder.absolute()): "."}
    for record in (folder / "run" / "run.json", folder / "capstone.json"):
        if record.exists():
            for text in _list_strings(files.read_json(record)):
                for word in {text, *_split_words(text)}:
                    # A run may come from another system than the one that writes the zip.
                    for kind in (PurePosixPath, PureWindowsPath):
                        if kind(word).is_absolute() and kind(word).name:
                            names.setdefault(word, kind(word).name)
    names |= {str(Path.cwd()): ".", str(Path.home()): "~"}
    return {path: name for path, name in names.items() if len(path) > 1}


def _list_strings(value: Any) -> Iterator[str]:
    """All strings in a JSON value."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, (list, dict)):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _list_strings(item)


def _split_words(text: str) -> list[str]:
    """The words of a command; none where it is no command."""
    try:
        return [part for word in shlex.split(text) for part in (word, word.partition("=")[2])]
    except ValueError:
        return []


def _replace_paths(text: str, names: dict[str, str]) -> str:
    """`text` with each path replaced, also as JSON and HTML write it, the longest first."""
    for path in sorted(names, key=len, reverse=True):
        name = names[path]
        for written in dict.fromkeys((path, json.dumps(path)[1:-1], html.escape(path))):
            text = text.replace(written, name)
    return text
