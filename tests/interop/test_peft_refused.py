"""Unsupported and malicious adapters are refused in one line, and nothing in them is executed."""

import dataclasses
import json
import pickle
import shutil
import time
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from adapted_runs import change_settings, make_config, make_run, random_weights
from safetensors.numpy import load_file, save_file

from glasslm.errors import DamagedError, InputError
from glasslm.interop import peft_files, peft_settings
from glasslm.model.adapters import without_adapters

LLAMA = without_adapters(make_config("llama"))


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Adapters of q and v of a llama."""
    config, path = make_config("llama"), tmp_path_factory.mktemp("good")
    peft_files.write(
        *make_run(path / "run", config, random_weights(config)), path / "adapters", "base"
    )
    return path / "adapters"


@pytest.fixture
def folder(good: Path, tmp_path: Path) -> Path:
    """A copy of them that a test may damage."""
    return shutil.copytree(good, tmp_path / "adapters")


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"peft_type": "IA3"}, "IA3"),
        ({"task_type": "SEQ_CLS"}, "SEQ_CLS"),
        ({"bias": "lora_only"}, "bias"),
        ({"use_dora": True}, "DoRA"),
        ({"lora_bias": True}, "no bias"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"layers_to_transform": [0]}, "layers_to_transform"),
        ({"trainable_token_indices": [1]}, "embeddings"),
        ({"target_parameters": ["experts.down_proj"]}, "target_parameters"),
        ({"an_option_of_tomorrow": {"x": 1}}, "an_option_of_tomorrow"),
        ({"init_lora_weights": "loftq"}, "loftq"),
        ({"init_lora_weights": "pissa_niter_4"}, "pissa_niter_4"),
        ({"init_lora_weights": [1, 2]}, "init_lora_weights"),
        ({"target_modules": ".*_proj"}, "patterns are not run"),
        ({"target_modules": ["q_proj", 3]}, "list of names"),
        ({"target_modules": None}, "target_modules"),
        ({"target_modules": []}, "expected some of"),
        ({"target_modules": ["lm_head"]}, "expected some of"),
        ({"target_modules": ["q_proj"]}, "v_proj"),
        ({"target_modules": ["q_proj", "v_proj", "k_proj"]}, "k_proj"),
        (
            {"target_modules": ["model.layers.0.self_attn.q_proj", "v_proj"]},
            r"layers\.1\.self_attn\.q_proj",
        ),
        ({"r": 0}, "1 to 4,096"),
        ({"r": -3}, "r -3"),
        ({"r": 4}, "shape"),
        ({"r": 10**9}, "1 to 4,096"),
        ({"r": 3.0}, "whole number"),
        ({"r": "3"}, "whole number"),
        ({"lora_alpha": 0}, "lora_alpha"),
        ({"lora_alpha": "much"}, "lora_alpha"),
        ({"use_rslora": "yes"}, "use_rslora"),
        ({"rank_pattern": {"q_proj": 2}}, "scaled"),
        ({"alpha_pattern": {"v_proj": 2.0}}, "scaled"),
        ({"rank_pattern": {"q_proj": 6}, "alpha_pattern": {"q_proj": 15}}, "shape"),
        ({"rank_pattern": {"(a+)+b": 3}}, "patterns are not run"),
        ({"rank_pattern": {"self_attn": 3}}, "expected some of"),
        ({"rank_pattern": [1]}, "rank_pattern"),
    ],
)
def test_settings_without_an_equivalent_are_refused_in_one_line(
    changes: dict[str, Any], word: str, folder: Path
) -> None:
    change_settings(folder, **changes)
    with pytest.raises((InputError, DamagedError), match=word) as caught:
        peft_files.read(folder, LLAMA)
    assert "\n" not in str(caught.value)


def test_every_option_of_peft_is_decided(folder: Path) -> None:
    """Every option is read, ignored because it does not affect trained adapters, or refused when
    set.
    """
    pytest.importorskip("torch")  # which peft imports
    peft = pytest.importorskip("peft")
    whole = (folder / peft_settings.SETTINGS_FILE).read_bytes()
    options = {field.name for field in dataclasses.fields(peft.LoraConfig)}
    other_options = options - peft_settings.READ_OPTIONS - peft_settings.IGNORED_OPTIONS
    assert len(other_options) > 15
    for option in other_options:
        change_settings(folder, **{option: {"on": True}})
        with pytest.raises(InputError, match=option):
            peft_files.read(folder, LLAMA)
        (folder / peft_settings.SETTINGS_FILE).write_bytes(whole)


Q = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"base_model.model.lm_head.lora_A.weight": np.zeros((3, 32), np.float32)}, "lm_head"),
        (
            {"base_model.model.model.embed_tokens.weight": np.zeros((37, 32), np.float32)},
            "embed_tokens",
        ),
        ({"../../sentinel": np.zeros(2, np.float32)}, "sentinel"),
        ({Q: np.zeros((32, 3), np.float32)}, "shape"),
        ({Q: np.zeros((3, 32, 1), np.float32)}, "shape"),
        ({Q: np.zeros((0, 32), np.float32)}, "shape"),
        ({Q: np.zeros((3, 32), np.int32)}, "floating-point"),
        ({Q: np.full((3, 32), np.nan, np.float32)}, "finite"),
        ({Q: None}, "lacks"),
    ],
)
def test_arrays_that_do_not_belong_there_are_named(
    changes: dict[str, Any], word: str, folder: Path
) -> None:
    arrays = load_file(folder / peft_files.WEIGHTS_FILE) | changes
    save_file(
        {name: array for name, array in arrays.items() if array is not None},
        folder / peft_files.WEIGHTS_FILE,
    )
    with pytest.raises((InputError, DamagedError), match=word):
        peft_files.read(folder, LLAMA)


def test_an_adapter_of_another_model_is_refused(folder: Path) -> None:
    for kind in ("gpt2", "llama scaled"):  # other names; other shapes
        with pytest.raises((InputError, DamagedError), match=r"expected"):
            peft_files.read(folder, make_config(kind))


# -- malicious files -------------------------------------------------------------------------------


class Payload:
    """Writes a file when it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return open, ("sentinel", "w")


def header(text: bytes, length: int | None = None) -> bytes:
    return (len(text) if length is None else length).to_bytes(8, "little") + text


def entry(shape: list[int], start: int, end: int) -> dict[str, Any]:
    return {"dtype": "F32", "shape": shape, "data_offsets": [start, end]}


DEEP = b"[" * 200_000
MANY = json.dumps({f"{Q}{i}": entry([0], 0, 0) for i in range(30_000)}).encode()
CRAFTED: dict[str, tuple[str, bytes]] = {
    "settings without an end": ("adapter_config.json", DEEP),
    "settings inside each other": ("adapter_config.json", b'{"r":' * 50_000 + b"1" + b"}" * 50_000),
    "settings that are a list": ("adapter_config.json", b"[]"),
    "settings that are a pickle": ("adapter_config.json", pickle.dumps(Payload())),
    "settings without a number": (
        "adapter_config.json",
        b'{"r": NaN, "target_modules": ["q_proj"]}',
    ),
    "a megabyte of settings": ("adapter_config.json", b"{" + b" " * (1 << 20) + b"}"),
    "as many names as fit": (
        "adapter_config.json",
        json.dumps({"target_modules": ["q_proj", *map(str, range(30_000))]}).encode(),
    ),
    "as many patterns as fit": (
        "adapter_config.json",
        json.dumps(
            {
                "target_modules": ["q_proj", "v_proj"],
                "rank_pattern": {f"x{i}": 3 for i in range(15_000)},
            }
        ).encode(),
    ),
    "arrays: nothing": ("adapter_model.safetensors", b""),
    "arrays: a pickle": ("adapter_model.safetensors", pickle.dumps({"a": Payload()})),
    "arrays: a header of an exabyte": ("adapter_model.safetensors", header(b"{}", 1 << 60)),
    "arrays: a header longer than the file": (
        "adapter_model.safetensors",
        header(b"{", 15_000_000),
    ),
    "arrays: a header without an end": ("adapter_model.safetensors", header(DEEP)),
    "arrays: thirty thousand names": ("adapter_model.safetensors", header(MANY)),
    "arrays: a yottabyte": (
        "adapter_model.safetensors",
        header(json.dumps({Q: entry([1 << 40, 1 << 40], 0, 8)}).encode()) + b"\0" * 8,
    ),
    "arrays: an end beyond the file": (
        "adapter_model.safetensors",
        header(json.dumps({Q: entry([3, 32], 0, 384)}).encode()),
    ),
    "arrays: one over the other": (
        "adapter_model.safetensors",
        header(json.dumps({Q: entry([2], 0, 8), f"{Q}2": entry([2], 0, 8)}).encode()) + b"\0" * 8,
    ),
}


SAYS = {
    "a megabyte of settings": "about a thousand",
    "arrays: a header of an exabyte": "at most",
    "adapter_model.bin": "runs code",
}


@pytest.mark.parametrize(
    "crafted", [*CRAFTED, "a gigabyte of settings", "a gigabyte of an array", "adapter_model.bin"]
)
def test_a_crafted_adapter_is_an_error_in_a_second_and_nothing_else(
    crafted: str, folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    if crafted in CRAFTED:
        name, content = CRAFTED[crafted]
        (folder / name).write_bytes(content)
    elif crafted == "adapter_model.bin":
        (folder / peft_files.WEIGHTS_FILE).unlink()
        (folder / crafted).write_bytes(pickle.dumps(Payload()))
    else:
        if crafted.endswith("array"):
            text = json.dumps({Q: entry([1 << 23, 32], 0, 1 << 30)}).encode()
            (folder / peft_files.WEIGHTS_FILE).write_bytes(header(text))
        with open(
            folder
            / (peft_settings.SETTINGS_FILE if "settings" in crafted else peft_files.WEIGHTS_FILE),
            "r+b",
        ) as file:
            file.truncate(file.seek(0, 2) + (1 << 30))  # sparse
    start = time.process_time()
    with pytest.raises((InputError, DamagedError)) as caught:
        peft_files.read(folder, LLAMA)
    assert time.process_time() - start < 1
    tracemalloc.start()  # it slows what it traces
    try:
        with pytest.raises((InputError, DamagedError)):
            peft_files.read(folder, LLAMA)
        assert tracemalloc.get_traced_memory()[1] < 100 << 20
    finally:
        tracemalloc.stop()
    assert len(str(caught.value)) < 1000
    assert SAYS.get(crafted, "") in str(caught.value)
    assert not list(tmp_path.rglob("sentinel"))


@pytest.mark.parametrize("missing", ["adapter_config.json", "adapter_model.safetensors"])
def test_a_folder_without_adapters_is_refused(missing: str, folder: Path) -> None:
    (folder / missing).unlink()
    with pytest.raises(InputError, match="save_pretrained"):
        peft_files.read(folder, LLAMA)
