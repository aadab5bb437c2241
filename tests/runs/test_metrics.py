"""Whatever is written to metrics.jsonl comes back, as strict JSON, whole lines only."""

import hashlib
import json
import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from glasslm.errors import DamagedError
from glasslm.runs import metrics

LINES = [
    {"kind": "plan", "step": 0, "max_steps": 4},
    {
        "kind": "step",
        "step": 1,
        "loss": 4.25,
        "lr": 0.1,
        "grad_norm": 2.0,
        "clipped": True,
        "tokens": 8,
        "epoch": 0.5,
        "timing": {"elapsed_s": 0.5},
    },
    {
        "kind": "eval",
        "step": 1,
        "split": "val",
        "loss": 4.5,
        "perplexity": 90.0,
        "bpb": 6.5,
        "tokens": 7,
        "bytes": 7,
        "whole": True,
        "best": True,
        "timing": {"elapsed_s": 0.6},
    },
    {"kind": "checkpoint", "step": 1, "path": "checkpoints/000001", "best": True},
    {
        "kind": "sample",
        "step": 1,
        "prompt": "\n",
        "text": "To be,\nor\u2028not \x1b[31m",
        "temperature": 0.8,
        "seed": 1,
    },
]


def write_lines(path: Path, lines: list[metrics.Line], start_bytes: int = 0) -> int:
    with metrics.MetricsLog(path, start_bytes) as log:
        for line in lines:
            log.write(line)
        assert path.stat().st_size == log.bytes  # nothing waits in a buffer
        return log.bytes


def test_lines_come_back_in_order_and_are_readable_while_the_log_is_open(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    with metrics.MetricsLog(path) as log:
        for number, line in enumerate(LINES, 1):
            log.write(line)
            assert list(metrics.read_lines(path)) == LINES[:number]


def test_numpy_numbers_are_numbers_and_what_is_not_finite_is_null(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    line = {
        "kind": "step",
        "step": np.int64(3),
        "loss": math.nan,
        "lr": np.float32(0.5),
        "finite": np.bool_(True),
        "timing": {"elapsed_s": math.inf, "parts": (np.float64(-math.inf), 1)},
        "norms": np.array([1.0, math.nan]),
    }
    write_lines(path, [line])

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    assert json.loads(path.read_text(), parse_constant=refuse) == {
        "kind": "step",
        "step": 3,
        "loss": None,
        "lr": 0.5,
        "finite": True,
        "timing": {"elapsed_s": None, "parts": [None, 1]},
        "norms": [1.0, None],
    }


@given(st.floats(allow_nan=False, allow_infinity=False))
def test_a_loss_keeps_every_bit(loss: float) -> None:
    line = metrics.to_json_types({"loss": np.float64(loss)})
    assert json.loads(json.dumps(line))["loss"].hex() == loss.hex()


def test_a_resumed_log_goes_on_where_the_checkpoint_was(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    until = write_lines(path, LINES[:2])
    write_lines(path, LINES[2:], start_bytes=until)
    whole = path.read_bytes()
    write_lines(
        path, LINES[2:], start_bytes=until
    )  # what came after the checkpoint is written again
    assert path.read_bytes() == whole


def test_a_missing_log_is_not_called_altered(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    with pytest.raises(DamagedError, match="is missing: restore it"):
        metrics.hash_prefix(path, 10, "0" * 64)
    assert metrics.hash_prefix(path, 0).hexdigest() == hashlib.sha256().hexdigest()


@pytest.mark.parametrize("cut", range(1, 40, 3))
def test_a_line_torn_by_a_kill_is_left_out(tmp_path: Path, cut: int) -> None:
    path = tmp_path / "metrics.jsonl"
    write_lines(path, LINES)
    last = len(path.read_bytes().splitlines(keepends=True)[-1])
    path.write_bytes(path.read_bytes()[: -min(cut + 1, last)])
    assert list(metrics.read_lines(path)) == LINES[:-1]


@pytest.mark.parametrize(
    "wrong", [b'{"kind": "st\n', b"17\n", b'{"loss": NaN}\n', b"\n", b"\xff\n"]
)
def test_a_damaged_line_is_named_by_its_number(tmp_path: Path, wrong: bytes) -> None:
    path = tmp_path / "metrics.jsonl"
    write_lines(path, LINES[:2])
    path.write_bytes(path.read_bytes() + wrong + b'{"kind": "end", "step": 4}\n')
    with pytest.raises(DamagedError, match="line 3 of"):
        list(metrics.read_lines(path))


def test_no_file_has_no_lines(tmp_path: Path) -> None:
    assert list(metrics.read_lines(tmp_path / "metrics.jsonl")) == []


def test_equal_runs_differ_in_timing_and_in_lines_about_the_run_only() -> None:
    other = [
        {**line, "timing": {"elapsed_s": 99.0}} for line in LINES if line["kind"] != "checkpoint"
    ]
    other.insert(2, {"kind": "resume", "step": 1, "from": "checkpoints/000001"})
    assert metrics.comparable_lines(other) == metrics.comparable_lines(LINES)
    assert [line["kind"] for line in metrics.comparable_lines(LINES)] == ["step", "eval", "sample"]
    changed = [
        {**line, "loss": 4.250000000000001} if line["kind"] == "step" else line for line in LINES
    ]
    assert metrics.comparable_lines(changed) != metrics.comparable_lines(LINES)
