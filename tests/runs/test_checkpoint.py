"""A checkpoint gives back what was saved, or says which file is wrong and falls back.

Rotation keeps what matters.
"""

import dataclasses
import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy

from glasslm import files
from glasslm.config.schema import ComputeConfig, ModelConfig, RunConfig
from glasslm.engines.factory import make_engine
from glasslm.engines.state import state_without_moments
from glasslm.errors import DamagedError, DivergedError, InputError
from glasslm.model.parameters import initial_weights, parameter_table
from glasslm.runs import checkpoint
from glasslm.runs.checkpoint import Best, RunIdentity, TrainingPosition

IDENTITY = RunIdentity("c" * 64, "t" * 64, "d" * 64, "r" * 64)


def make_state(step: int, dtype: type = np.float32) -> dict[str, np.ndarray[Any, Any]]:
    """The state of an engine: named weights, then moments, that depend on the step."""
    draw = np.random.default_rng(step)
    weights: dict[str, np.ndarray[Any, Any]] = {
        "embedding.weight": draw.standard_normal((5, 3)).astype(dtype).T,  # not contiguous
        "blocks.0.attention.q.weight": draw.standard_normal((3, 3)).astype(dtype),
        "norm.weight": np.full(3, float(step), dtype),
    }
    moments = {f"adamw.m/{name}": array * 0.5 for name, array in weights.items()}
    return weights | moments | {"adamw.v/norm.weight": np.ones(3, dtype)}


def save(run_dir: Path, step: int, best: Best | None = None, keep: int = 2, **changes: Any) -> Path:
    position = TrainingPosition(step, step, 64 * step, 0, best)
    return checkpoint.save(
        run_dir,
        make_state(step).items(),
        dataclasses.replace(position, **changes),
        IDENTITY,
        keep=keep,
    )


def test_everything_comes_back_to_the_bit(tmp_path: Path) -> None:
    loop = {"window": [0.1, 1e-300, 1 / 3], "patience": 2, "why": "naïve"}
    path = save(
        tmp_path, 500, updates=498, metrics_bytes=12345, best=Best(400, 0.1 + 0.2), loop=loop
    )
    assert path == tmp_path / "checkpoints" / "000500"
    loaded = checkpoint.load(tmp_path)
    assert loaded.position == TrainingPosition(500, 498, 32000, 12345, Best(400, 0.1 + 0.2), loop)
    assert loaded.step == 500
    expected = make_state(500)
    state = dict(loaded.state())
    assert state.keys() == expected.keys()
    assert loaded.weights().keys() == {name for name in expected if "/" not in name}
    for name, array in expected.items():
        assert state[name].dtype == array.dtype
        np.testing.assert_array_equal(state[name], array)
    checkpoint.require_identity(loaded, IDENTITY)


def test_a_float64_engine_keeps_its_precision(tmp_path: Path) -> None:
    checkpoint.save(
        tmp_path, make_state(1, np.float64).items(), TrainingPosition(1, 1, 1, 0), IDENTITY
    )
    array = checkpoint.load(tmp_path).weights()["embedding.weight"]
    assert array.dtype == np.float64
    np.testing.assert_array_equal(array, make_state(1, np.float64)["embedding.weight"])


def test_the_files_are_those_of_the_safetensors_library(tmp_path: Path) -> None:
    path = save(tmp_path, 3)
    arrays = {name: np.ascontiguousarray(array) for name, array in make_state(3).items()}
    model = {name: array for name, array in arrays.items() if "/" not in name}
    moments = {name: array for name, array in arrays.items() if "/" in name}
    assert (path / "model.safetensors").read_bytes() == safetensors.numpy.save(model)
    assert (path / "optimizer.safetensors").read_bytes() == safetensors.numpy.save(moments)


def test_the_same_state_gives_the_same_bytes_whatever_its_order(tmp_path: Path) -> None:
    save(tmp_path / "a", 3)
    backwards = reversed(make_state(3).items())
    checkpoint.save(tmp_path / "b", backwards, TrainingPosition(3, 3, 192, 0), IDENTITY)
    for name in ("model.safetensors", "optimizer.safetensors", "state.json", "manifest.json"):
        a, b = (tmp_path / run / "checkpoints" / "000003" / name for run in "ab")
        assert files.file_sha256(a) == files.file_sha256(b)


def test_a_state_without_moments_is_fine(tmp_path: Path) -> None:
    state = [("norm.weight", make_state(1)["norm.weight"])]
    checkpoint.save(tmp_path, state, TrainingPosition(1, 1, 1, 0), IDENTITY)
    assert list(dict(checkpoint.load(tmp_path).state())) == ["norm.weight"]


@pytest.mark.parametrize("name", ["norm.weight", "adamw.v/norm.weight"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_is_never_written(tmp_path: Path, name: str, value: float) -> None:
    save(tmp_path, 1)
    state = make_state(2)
    state[name][1] = value
    with pytest.raises(DivergedError, match=name):
        checkpoint.save(tmp_path, state.items(), TrainingPosition(2, 2, 2, 0), IDENTITY)
    assert checkpoint.list_steps(tmp_path) == [1]


@pytest.mark.parametrize("lora_rank", [0, 2])
def test_a_state_without_moments_has_the_trained_weights_of_an_engine(lora_rank: int) -> None:
    model = ModelConfig(d_model=8, n_layers=1, n_heads=2, block_size=4, lora_rank=lora_rank)
    config = RunConfig(model=model.resolve())
    weights = dict(initial_weights(parameter_table(config.model, 5), seed=1))
    engine = make_engine(config, 5, ComputeConfig(engine="numpy", threads=1), training=True)
    engine.load(weights.items())
    expected = {name: array for name, array in engine.state() if "/" not in name}
    state = state_without_moments(weights, config, 5, np.float32)
    assert state.keys() == expected.keys()
    for name, array in expected.items():
        np.testing.assert_array_equal(state[name], array, err_msg=name)
    weights.popitem()
    with pytest.raises(DamagedError, match="missing"):
        state_without_moments(weights, config, 5, np.float32)


def test_rotation_keeps_the_newest_the_best_and_the_first(tmp_path: Path) -> None:
    steps_by_keep = {}
    for step in range(0, 700, 100):
        save(tmp_path, step, best=Best(min(step, 200), 1.5))
        steps_by_keep[step] = checkpoint.list_steps(tmp_path)
    assert steps_by_keep[100] == [0, 100]
    assert steps_by_keep[300] == [0, 200, 300]  # the best is one of the two newest
    assert steps_by_keep[600] == [0, 200, 500, 600]
    save(tmp_path, 700, best=Best(700, 1.4), keep=1)
    assert checkpoint.list_steps(tmp_path) == [0, 700]


def test_rotation_counts_only_checkpoints_that_are_whole(tmp_path: Path) -> None:
    for step in (0, 100, 200):
        save(tmp_path, step)
    (tmp_path / "checkpoints" / "000200" / "state.json").write_bytes(b"{}")
    save(tmp_path, 300)
    assert checkpoint.list_steps(tmp_path) == [0, 100, 300]  # 200 is useless, 100 is not


def test_rotation_reads_an_older_checkpoint_once_and_never_what_it_wrote_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[str] = []
    file_sha256 = files.file_sha256

    def count_call(path: Path) -> str:
        read.append(path.parent.name)
        return file_sha256(path)

    monkeypatch.setattr(files, "file_sha256", count_call)
    for step in (100, 200, 300):
        save(tmp_path, step, keep=9)
    assert read == []
    monkeypatch.setattr(checkpoint, "_verified_folders", set())  # another process goes on
    for step in (400, 500):
        save(tmp_path, step, keep=9)
    assert read == ["000300"] * 3 + ["000200"] * 3 + ["000100"] * 3


def test_rotation_finds_a_flipped_bit_in_what_another_process_wrote(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for step in (100, 200):
        save(tmp_path, step)
    path = tmp_path / "checkpoints" / "000200" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + bytes([path.read_bytes()[-1] ^ 1]))
    monkeypatch.setattr(checkpoint, "_verified_folders", set())
    save(tmp_path, 300)
    assert checkpoint.list_steps(tmp_path) == [100, 300]


def test_a_run_that_went_back_forgets_what_came_later(tmp_path: Path) -> None:
    for step in (0, 100, 200):
        save(tmp_path, step)
    save(tmp_path, 150)
    assert checkpoint.list_steps(tmp_path) == [0, 100, 150]
    save(tmp_path, 150, tokens=7)  # the same step again replaces it
    assert checkpoint.load(tmp_path).position.tokens == 7


def test_steps_are_ordered_as_numbers_and_other_names_are_no_checkpoints(tmp_path: Path) -> None:
    save(tmp_path, 999_999)
    save(tmp_path, 1_000_000)
    (tmp_path / "checkpoints" / "000007.tmp-12").mkdir()
    (tmp_path / "checkpoints" / "notes.txt").write_text("mine")
    (tmp_path / "checkpoints" / "000008").write_text("no folder")
    assert checkpoint.list_steps(tmp_path) == [999_999, 1_000_000]
    assert checkpoint.load(tmp_path).step == 1_000_000
    assert checkpoint.list_steps(tmp_path / "nowhere") == []


def test_best_is_what_the_latest_says(tmp_path: Path) -> None:
    save(tmp_path, 0)
    assert checkpoint.load(tmp_path, "best").step == 0  # nothing was better yet
    save(tmp_path, 100, best=Best(100, 1.5))
    save(tmp_path, 200, best=Best(100, 1.5))
    assert checkpoint.load(tmp_path, "best").step == 100
    assert checkpoint.load(tmp_path, "latest").step == 200
    assert checkpoint.load(tmp_path, 0).step == 0
    with pytest.raises(InputError, match="no checkpoint of step 150: there are 0, 100, 200"):
        checkpoint.load(tmp_path, 150)


def test_a_damaged_best_falls_back_with_a_warning(tmp_path: Path) -> None:
    save(tmp_path, 100, best=Best(100, 1.5))
    save(tmp_path, 200, best=Best(100, 1.5))
    (tmp_path / "checkpoints" / "000100" / "model.safetensors").unlink()
    heard: list[str] = []
    assert checkpoint.load(tmp_path, "best", heard.append).step == 200
    assert "model.safetensors" in heard[0]
    with pytest.raises(DamagedError, match=r"model\.safetensors"):
        checkpoint.load(tmp_path, 100)


def test_without_a_whole_checkpoint_there_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DamagedError, match="ended before its first checkpoint"):
        checkpoint.load(tmp_path)
    path = save(tmp_path, 0)
    (path / "state.json").unlink()
    with pytest.raises(DamagedError, match=r"every checkpoint is damaged .*state\.json"):
        checkpoint.load(tmp_path)


@pytest.mark.parametrize("other", RunIdentity._fields)
def test_a_checkpoint_of_another_run_is_refused_with_both_hashes(
    tmp_path: Path, other: str
) -> None:
    save(tmp_path, 1)
    with pytest.raises(DamagedError) as caught:
        checkpoint.require_identity(
            checkpoint.load(tmp_path), IDENTITY._replace(**{other: "0" * 64})
        )
    assert getattr(IDENTITY, other) in str(caught.value)
    assert "0" * 64 in str(caught.value)
    name = {"record_sha256": "run.json"}.get(other, other.removesuffix("_sha256"))
    assert name in str(caught.value)


def test_a_renamed_folder_is_not_another_step(tmp_path: Path) -> None:
    save(tmp_path, 100)
    save(tmp_path, 200).rename(tmp_path / "checkpoints" / "000900")
    heard: list[str] = []
    assert checkpoint.load(tmp_path, warn=heard.append).step == 100
    assert "000900 holds step 200" in heard[0]


def write_crafted_file(run_dir: Path, name: str, data: bytes) -> None:
    """Put `data` into the newest checkpoint, with a manifest that agrees."""
    path = run_dir / "checkpoints" / "000001"
    contents = {
        file.name: [file.read_bytes()] for file in path.iterdir() if file.name != "manifest.json"
    }
    files.write_folder(path, contents | {name: [data]})
    files.verify_folder(path)


def tensors(header: dict[str, Any], body: bytes = b"\0" * 8) -> bytes:
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + body


@pytest.mark.parametrize(
    "data",
    [
        b"",
        struct.pack("<Q", 1 << 60) + b"{}",  # a header of an exabyte
        struct.pack("<Q", 90_000_000) + b"{",
        tensors({"a": {"dtype": "F32", "shape": [1 << 40, 1 << 40], "data_offsets": [0, 8]}}),
        tensors({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 1 << 62]}}),
        tensors(
            {name: {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]} for name in "ab"}
        ),  # overlap
        tensors({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}),  # a hole at the end
        tensors({"a": {"dtype": "I64", "shape": [1], "data_offsets": [0, 8]}}),
        tensors({"a": {"dtype": "BF16", "shape": [4], "data_offsets": [0, 8]}}),
        tensors({"a": {"dtype": "O", "shape": [1], "data_offsets": [0, 8]}}),
        b"\x80\x04cos\nsystem\n(S'exit 1'\ntR.",  # a pickle
    ],
    ids=lambda data: repr(data[:60]),
)
def test_crafted_arrays_are_an_error_and_nothing_else(tmp_path: Path, data: bytes) -> None:
    save(tmp_path, 1)
    write_crafted_file(tmp_path, "model.safetensors", data)
    with pytest.raises(DamagedError, match=r"model\.safetensors"):
        checkpoint.load(tmp_path).weights()


@pytest.mark.parametrize(
    "change",
    [
        {"step": -1}, {"step": True}, {"step": "1"}, {"step": 2}, {"format": 2}, {"best": 3},
        {"best": {"step": 1}},
        {"best": {"step": 1, "loss": 10**400}}, {"loop": None}, {"loop": 1},
    ],
    ids=repr,
)  # fmt: skip
def test_a_crafted_state_is_an_error_and_nothing_else(
    tmp_path: Path, change: dict[str, Any]
) -> None:
    state = json.loads((save(tmp_path, 1) / "state.json").read_text())
    write_crafted_file(tmp_path, "state.json", json.dumps(state | change).encode())
    with pytest.raises(DamagedError, match=r"000001"):
        checkpoint.load(tmp_path)


def test_a_state_that_is_no_object_is_an_error(tmp_path: Path) -> None:
    save(tmp_path, 1)
    write_crafted_file(tmp_path, "state.json", b"[]")
    with pytest.raises(DamagedError, match=r"state\.json"):
        checkpoint.load(tmp_path)
