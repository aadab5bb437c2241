"""The reader and the writer of safetensors files agree with the safetensors library."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
from safetensors import SafetensorError

from glasslm.errors import DamagedError
from glasslm.runs.tensor_file import read_arrays, read_entries, read_tensor, safetensors_chunks

DTYPES = ["?", "u1", "i1", "u2", "i2", "u4", "i4", "u8", "i8", "f2", "f4", "f8", "c8"]


def read_all(path: Path) -> dict[str, np.ndarray[Any, Any]]:
    return {name: read_tensor(path, entry) for name, entry in read_entries(path).items()}


def random_arrays(seed: int) -> dict[str, np.ndarray[Any, Any]]:
    draw = np.random.default_rng(seed)
    arrays = {}
    for dtype in draw.permutation(DTYPES)[:6]:
        shape = tuple(draw.integers(0, 4, draw.integers(0, 4)))
        arrays[f"naïve.{dtype}"] = draw.integers(0, 2, shape).astype(dtype)
    return arrays


def test_files_of_the_library_are_read(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    for seed in range(20):
        arrays = random_arrays(seed)
        safetensors.numpy.save_file(arrays, path, {"format": "pt"})
        read = read_all(path)
        assert read.keys() == arrays.keys()
        for name, array in arrays.items():
            assert read[name].dtype == array.dtype
            np.testing.assert_array_equal(read[name], array)


def test_bfloat16_is_widened_as_torch_widens_it(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    from safetensors.torch import save_file

    tensor = torch.randn(3, 5).to(torch.bfloat16)
    save_file({"a": tensor}, tmp_path / "a.safetensors")
    np.testing.assert_array_equal(read_all(tmp_path / "a.safetensors")["a"], tensor.float().numpy())


def test_the_library_reads_what_is_written(tmp_path: Path) -> None:
    arrays = {"b": np.arange(6.0).reshape(2, 3), "a": np.ones(3)}
    path = tmp_path / "a.safetensors"
    path.write_bytes(b"".join(map(bytes, safetensors_chunks(arrays, {"format": "pt"}))))
    with safetensors.safe_open(path, framework="numpy") as file:
        assert file.metadata() == {"format": "pt"}
    assert path.read_bytes() == safetensors.numpy.save(arrays, {"format": "pt"})


def mutated(data: bytes, draw: np.random.Generator) -> bytes:
    """A file with one change: bytes of the header, its length, numbers in it, or its end."""
    length = int.from_bytes(data[:8], "little")
    header, body = data[8 : 8 + length], data[8 + length :]
    kind = draw.integers(5)
    if kind == 0:  # a byte anywhere
        place = int(draw.integers(len(data)))
        return data[:place] + draw.bytes(1) + data[place + 1 :]
    if kind == 1:  # cut or longer
        return data[: int(draw.integers(len(data)))] if draw.integers(2) else data + draw.bytes(3)
    values = json.loads(header)
    entry = values[str(draw.choice([name for name in values if name != "__metadata__"]))]
    numbers = entry[str(draw.choice(["shape", "data_offsets"]))]
    changes = [-1, 0, 1, 2, 2**31, 2**63, 2**64, 1.0, "2", None, True]
    if kind == 2 and numbers:
        numbers[int(draw.integers(len(numbers)))] = changes[int(draw.integers(len(changes)))]
    elif kind == 3:
        numbers.append(changes[int(draw.integers(3))])
    else:
        entry["dtype"] = ["F32", "I64", "BOOL", "O", 3, "F8_E4M3", "f32", "U16"][draw.integers(8)]
    text = json.dumps(values).encode()
    return len(text).to_bytes(8, "little") + text + body


def test_a_changed_file_is_read_as_the_library_reads_it_or_refused(tmp_path: Path) -> None:
    path, counts = tmp_path / "a.safetensors", {"read": 0, "refused": 0}
    for seed in range(400):
        draw = np.random.default_rng(seed)
        data = mutated(safetensors.numpy.save(random_arrays(seed % 7), {"a": "b"}), draw)
        path.write_bytes(data)
        try:
            expected = safetensors.numpy.load(data)
        except (SafetensorError, KeyError, TypeError, AttributeError, ValueError):
            expected = None
        try:
            arrays = read_all(path)
        except DamagedError:
            counts["refused"] += 1
            continue
        counts["read"] += 1
        assert expected is not None, data
        assert arrays.keys() == expected.keys(), data
        for name, array in expected.items():
            np.testing.assert_array_equal(arrays[name], array)
    assert counts["read"] > 20
    assert counts["refused"] > 200


def test_a_file_that_is_cut_while_it_is_read_is_damaged(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    safetensors.numpy.save_file({"a": np.ones(9, np.float32)}, path)
    entry = read_entries(path)["a"]
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(DamagedError, match="cut"):
        read_tensor(path, entry)
    with pytest.raises(DamagedError, match="not a whole safetensors file"):
        read_arrays(path)
