"""The path given to `glasslm import`: the error for each kind of content names its cure."""

import gzip
import io
import json
import pickle
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
from test_hf import SMALL, make_export, small_config

from glasslm.errors import InputError
from glasslm.interop import hf, import_source, model_import
from small_runs import train, write_text


def make_file(name: str, data: bytes = b"x") -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
        return path

    return make


def make_parent(name: str, data: bytes = b"{}") -> Callable[[Path], Path]:
    return lambda folder: make_file(name, data)(folder).parent


def torch_archive() -> bytes:
    body = io.BytesIO()
    with zipfile.ZipFile(body, "w") as archive:
        archive.writestr("weights/data.pkl", pickle.dumps([1]))
    return body.getvalue()


ZIP, GGUF, TORCH_ARCHIVE = b"PK\x03\x04....", b"GGUF\3\0\0\0", torch_archive()
GIVEN: dict[str, tuple[Callable[[Path], Path], str]] = {
    "nothing": (lambda folder: folder / "no" / "such", "nothing at"),
    "a name on the hub": (lambda _: Path("meta-llama/Llama-3.2-1B"), "hf download meta-llama/Ll"),
    "a name without an owner": (lambda _: Path("gpt2-nowhere"), "hf download gpt2-nowhere"),
    "ckpt.pt": (make_file("ckpt.pt"), "save_pretrained"),
    "a missing ckpt.pt": (lambda _: Path("ckpt.pt"), "nothing at"),
    "a .bin": (make_file("pytorch_model.bin", ZIP), "save_pretrained"),
    "a .pth": (make_file("consolidated.00.pth", ZIP), "save_pretrained"),
    "an archive of PyTorch without a suffix": (make_file("weights", TORCH_ARCHIVE), "runs code"),
    "another archive": (make_file("model.zip", ZIP), "is a zip archive: expected a model folder"),
    "a gzip file": (make_file("model.tar.gz", gzip.compress(b"a")), "is a gzip file: expected"),
    "a pickle without a suffix": (make_file("weights", pickle.dumps([1])), "runs code"),
    "one safetensors file": (make_file("a.safetensors"), "config.json and tokenizer.json"),
    "a GGUF file": (make_file("a.gguf", GGUF), "safetensors folder"),
    "a GGUF file of another name": (make_file("a.bin", GGUF), "safetensors folder"),
    "a text": (make_file("notes.txt"), "is a file"),
    "an empty folder": (lambda folder: folder, "as transformers writes it"),
    "a folder of GGUF": (make_parent("a.gguf", GGUF), "a GGUF file"),
    "a folder of pickles": (make_parent("ckpt.pt"), "ckpt.pt.*save_pretrained"),
    "a folder without a config": (make_parent("model.safetensors"), "no config.json: put"),
    "a folder of folders": (lambda f: make_file("c-5/config.json")(f).parent.parent, "c-5 does"),
    "the hub's cache": (
        lambda f: make_file("snapshots/ab12/config.json")(f).parents[2],
        "ab12 does",
    ),
}


@pytest.mark.parametrize("what", GIVEN)
def test_what_is_given_is_named_with_its_cure(what: str, tmp_path: Path) -> None:
    make, words = GIVEN[what]
    path, run_dir = make(tmp_path), tmp_path / "run"
    with pytest.raises(InputError, match=words) as error:
        model_import.import_model(path, None, run_dir, "")
    assert str(error.value).count("\n") < 2
    assert str(path) in str(error.value)
    assert not run_dir.exists()


def test_a_file_in_a_model_folder_leads_to_the_folder(tmp_path: Path) -> None:
    make_file("config.json")(tmp_path)
    for name in ("config.json", "model.safetensors"):
        with pytest.raises(InputError, match=f"glasslm import {tmp_path}"):
            import_source.require_model_folder(make_file(name)(tmp_path))


def test_a_run_is_no_model_folder(tmp_path: Path) -> None:
    run = train(write_text(tmp_path / "text.txt"), tmp_path / "run", max_steps=1).run_dir
    with pytest.raises(InputError, match="is a run of glasslm"):
        model_import.import_model(run, None, tmp_path / "new", "")


@pytest.mark.parametrize("prefix", ["_orig_mod.", "module.", "module._orig_mod."])
def test_a_wrapper_s_prefix_is_left_out_with_a_notice(prefix: str, tmp_path: Path) -> None:
    model, notes = make_export(SMALL), list[str]()
    hf.write(model, tmp_path / "out")
    path = tmp_path / "out" / "model.safetensors"
    arrays = safetensors.numpy.load_file(path)
    wrapped = {prefix + name: array for name, array in arrays.items()}
    safetensors.numpy.save_file(wrapped, path, {"format": "pt"})
    imported = hf.read(tmp_path / "out", notes.append)
    assert len(notes) == 1
    assert repr(prefix) in notes[0]
    for name, array in model.weights.items():
        np.testing.assert_array_equal(imported.weights[name], array)
    hf.compare_import(imported, tmp_path / "out", notes.append)
    assert len(notes) == 1

    first = min(arrays)  # of which one only: nothing is guessed
    some = wrapped | {first: arrays[first]}
    safetensors.numpy.save_file(some, path, {"format": "pt"})
    with pytest.raises(InputError, match="lacks the weight"):
        hf.read(tmp_path / "out", notes.append)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_head_without_its_tied_embedding_is_the_embedding(family: str, tmp_path: Path) -> None:
    changes = {"norm": "layernorm", "feedforward": "gelu", "position": "learned"}
    model = make_export(SMALL if family == "llama" else small_config(**changes))
    hf.write(model, tmp_path / "out")
    path, notes = tmp_path / "out" / "model.safetensors", list[str]()
    arrays = safetensors.numpy.load_file(path)
    embedding = next(
        name for name in arrays if name.endswith(("embed_tokens.weight", "wte.weight"))
    )
    arrays["lm_head.weight"] = arrays.pop(embedding)
    safetensors.numpy.save_file(arrays, path, {"format": "pt"})
    imported = hf.read(tmp_path / "out", notes.append)
    assert "lm_head.weight" in notes[0]
    np.testing.assert_array_equal(
        imported.weights["embedding.weight"], model.weights["embedding.weight"]
    )
    hf.compare_import(imported, tmp_path / "out", notes.append)
    assert len(notes) == 1


def edit_config(folder: Path, **changes: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_an_import_is_compared_with_transformers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A config that glasslm reads otherwise than transformers leaves nothing behind."""
    from glasslm.interop import llama

    hf.write(make_export(SMALL), tmp_path / "out")
    model_import.import_model(tmp_path / "out", None, tmp_path / "good", "")
    misread = {"position": "rope", "rope_base": 500.0}
    monkeypatch.setattr(llama, "read_rope", lambda values, rope: misread)
    with pytest.raises(InputError, match="logits differ"):
        model_import.import_model(tmp_path / "out", None, tmp_path / "run", "")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["good", "out"]


def test_an_import_that_is_not_compared_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, notes = make_export(SMALL), list[str]()
    hf.write(model, tmp_path / "out")
    imported = hf.read(tmp_path / "out")
    with monkeypatch.context() as patch:
        patch.setattr(hf, "free_memory_bytes", lambda: 1000)
        hf.compare_import(imported, tmp_path / "out", notes.append)
    with monkeypatch.context() as patch:
        patch.setitem(__import__("sys").modules, "transformers", None)
        hf.compare_import(imported, tmp_path / "out", notes.append)
    assert ["not compared" in note for note in notes] == [True, True]
    assert "1 kB are free" in notes[0]
    assert "not installed" in notes[1]


def test_a_folder_that_transformers_cannot_load_is_refused(tmp_path: Path) -> None:
    hf.write(make_export(SMALL), tmp_path / "out")
    imported = hf.read(tmp_path / "out")
    edit_config(tmp_path / "out", num_key_value_heads=3)
    with pytest.raises(InputError, match="cannot load"):
        hf.compare_import(imported, tmp_path / "out")
    shutil.rmtree(tmp_path / "out")


def test_weights_are_read_when_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Names and shapes are checked from the headers alone, and one tensor is read at a time."""
    from glasslm.interop import hf_weights

    hf.write(make_export(SMALL), tmp_path / "out")
    reads: list[Path] = []

    def count_reads(path: Path, entry: Any) -> Any:
        reads.append(path)
        return read_tensor(path, entry)

    read_tensor = hf_weights.read_tensor
    monkeypatch.setattr(hf_weights, "read_tensor", count_reads)
    imported = hf.read(tmp_path / "out")
    assert not reads
    assert imported.weights["norm.weight"].shape == (32,)
    assert len(reads) == 1
