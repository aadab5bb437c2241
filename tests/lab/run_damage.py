"""Kinds of damage to a run folder, each with the part that is damaged and words of its message."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save_file

from glasslm import files, strict_json
from small_runs import read_json

LAST, FIVE = "checkpoints/000010", "checkpoints/000005"
MODEL, OPTIMIZER = "model.safetensors", "optimizer.safetensors"
Damage = Callable[[Path], Any]


def edit(path: Path, **changes: Any) -> None:
    path.write_bytes(strict_json.json_bytes(read_json(path) | changes))


def flip_bit(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1] + bytes([path.read_bytes()[-1] ^ 1]))


def edit_record(**changes: Any) -> Damage:
    return lambda run: edit(run / "run.json", **changes)


def edit_config(part: str, **changes: Any) -> Damage:
    """Change or add settings in a part of the recorded configuration."""

    def damage(run: Path) -> None:
        config = read_json(run / "run.json")["config"]
        edit(run / "run.json", config=config | {part: config.get(part, {}) | changes})

    return damage


def drop_field(name: str) -> Damage:
    def damage(run: Path) -> None:
        path = run / "run.json"
        remaining = {key: value for key, value in read_json(path).items() if key != name}
        path.write_bytes(strict_json.json_bytes(remaining))

    return damage


def write(name: str, text: str) -> Damage:
    return lambda run: (run / name).write_text(text)


def edit_tokenizer(change: Callable[[str], str]) -> Damage:
    """Change the text of tokenizer.json, from which the same tokenizer is parsed."""

    def damage(run: Path) -> None:
        path = run / "tokenizer.json"
        text = path.read_text(encoding="utf-8")
        assert change(text) != text
        path.write_text(change(text), encoding="utf-8")

    return damage


def remove(name: str) -> Damage:
    return lambda run: (run / name).unlink()


def edit_arrays(change: Callable[[dict[str, Any]], Any], name: str = MODEL) -> Damage:
    """Change arrays of the checkpoint of step 5, and write a manifest that agrees with them."""

    def damage(run: Path) -> None:
        folder = run / FIVE
        arrays: dict[str, Any] = load_file(folder / name)
        change(arrays)
        save_file(arrays, folder / name)
        contents = {
            path.name: [path.read_bytes()]
            for path in folder.iterdir()
            if path.name != files.MANIFEST
        }
        files.write_folder(folder, contents)

    return damage


def transpose_embedding(arrays: dict[str, Any]) -> None:
    arrays["embedding.weight"] = arrays["embedding.weight"].T.copy()


def poison_norm(arrays: dict[str, Any]) -> None:
    arrays["norm.weight"][3] = np.nan


def edit_log(change: Callable[[list[bytes]], Any]) -> Damage:
    """Change the lines of metrics.jsonl."""

    def damage(run: Path) -> None:
        path = run / "metrics.jsonl"
        lines = path.read_bytes().splitlines(keepends=True)
        change(lines)
        path.write_bytes(b"".join(lines))

    return damage


def insert_line(index: int, line: bytes) -> Damage:
    return edit_log(lambda lines: lines.insert(index, line + b"\n"))


def swap_steps(lines: list[bytes]) -> None:
    first, second = (
        index for index, line in enumerate(lines) if b'"step": 6' in line or b'"step": 7' in line
    )
    lines[first], lines[second] = lines[second], lines[first]


def rename_last(run: Path) -> None:
    (run / LAST).rename(run / "checkpoints" / "000011")


NO_END = "none of its lines ends at byte"
DAMAGE: dict[str, tuple[Damage, str, str]] = {
    "record cut": (write("run.json", "{"), "run.json", "not JSON"),
    "record of the future": (edit_record(format=2), "run.json", "format 1"),
    "record without a field": (drop_field("machine"), "run.json", "lacks 'machine'"),
    "record of another seed": (edit_record(seed=3), "run.json", "seed 3"),
    "record of other data": (edit_record(data={}), "run.json", "lacks 'data.files'"),
    "record of another size": (edit_record(parameters={"total": 5}), "run.json", "5 parameters"),
    "unknown setting": (edit_config("modle"), "run.json", "modle"),
    "another configuration": (edit_config("optimizer", lr=0.5), LAST, "another config"),
    "another tokenizer": (
        write("tokenizer.json", '{"kind": "byte"}'),
        "tokenizer.json",
        "was altered: its sha256 is",
    ),
    "a tokenizer with a blank at its end": (
        edit_tokenizer(lambda text: text + " "),
        "tokenizer.json",
        "was altered: its sha256 is",
    ),
    "a tokenizer with another key": (
        edit_tokenizer(lambda text: text.replace("{", '{"note": 1, ', 1)),
        "tokenizer.json",
        "was altered: its sha256 is",
    ),
    "a tokenizer with two letters exchanged": (
        edit_tokenizer(lambda text: text.replace("cd", "dc")),
        "tokenizer.json",
        "was altered: its sha256 is",
    ),
    "no tokenizer": (remove("tokenizer.json"), "tokenizer.json", "missing"),
    "a flipped bit": (lambda run: flip_bit(run / LAST / OPTIMIZER), LAST, "altered"),
    "a missing file": (remove(f"{LAST}/state.json"), LAST, "missing"),
    "a file too many": (write(f"{LAST}/notes.txt", "mine"), LAST, "does not belong there"),
    "no manifest": (remove(f"{LAST}/manifest.json"), LAST, "missing"),
    "a renamed folder": (rename_last, "checkpoints/000011", "renamed"),
    "a reshaped entry": (
        edit_arrays(transpose_embedding),
        FIVE,
        "'embedding.weight' has shape",
    ),
    "a renamed entry": (
        edit_arrays(lambda arrays: arrays.update(norms=arrays.pop("norm.weight"))),
        FIVE,
        "'norms' belongs to no weight",
    ),
    "a lost moment": (
        edit_arrays(lambda arrays: arrays.pop("adamw.v/norm.weight"), OPTIMIZER),
        FIVE,
        "'adamw.v/norm.weight' is missing",
    ),
    "a lost average": (
        edit_arrays(lambda arrays: arrays.pop("ema/norm.weight"), OPTIMIZER),
        FIVE,
        "'ema/norm.weight' is missing",
    ),
    "a number that is none": (edit_arrays(poison_norm), FIVE, "'norm.weight' is not finite"),
    "a line of rubbish": (insert_line(4, b"rubbish"), "metrics.jsonl", "line 5"),
    "a line that is not strict": (
        insert_line(4, b'{"kind": "step", "step": 1, "loss": NaN}'),
        "metrics.jsonl",
        "line 5",
    ),
    "a line without its kind": (insert_line(4, b'{"step": 1}'), "metrics.jsonl", "line 5"),
    "steps in another order": (edit_log(swap_steps), "metrics.jsonl", "step 6 after step 7"),
    "a log too short": (
        edit_log(lambda lines: lines.__delitem__(slice(12, None))),
        "metrics.jsonl",
        NO_END,
    ),
    "a log moved by a letter": (
        insert_line(1, b'{"kind":"warning","step":0,"code":"","message":""}'),
        "metrics.jsonl",
        NO_END,
    ),
    "no log": (remove("metrics.jsonl"), "metrics.jsonl", "cannot be read"),
}
