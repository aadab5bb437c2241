"""run.json, metrics.jsonl and state.json are read by their types: any other value is damage.

Each key of each file, at each depth, takes each wrong value.
"""

import copy
import json
import math
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from glasslm import cli, files, strict_json
from glasslm.config.schema import ComputeConfig
from glasslm.engines.choice import compute_from_record
from glasslm.errors import GlasslmError
from glasslm.lab.verification import integrity
from glasslm.lab.verification.compared_run import ComparedRun
from glasslm.report import report_tables
from glasslm.runs import checkpoint
from glasslm.runs.history import best_eval
from glasslm.runs.metrics import LINE_TYPES, elapsed_s
from glasslm.runs.run_folder import Run
from glasslm.runs.typed_json import describe_mismatch
from glasslm.training.loop_state import LoopState
from small_runs import drop_hashes, read_json, train, write_text

MISSING, RENAMED, HUGE = object(), object(), "1e400"
WRONG: tuple[Any, ...] = (None, [], {}, "x", -1, HUGE, True, 10**30, [[{}]], MISSING, RENAMED)
FLAGS: dict[str, Any] = {"max_steps": 4, "sample_interval": 2, "checkpoint_interval": 4}


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("typed")
    run = train(write_text(folder / "text.txt", sentences=40), folder / "run", **FLAGS)
    return drop_hashes(run.run_dir)  # so that only the types are compared


@pytest.fixture
def run_dir(original: Path, tmp_path: Path) -> Path:
    return shutil.copytree(original, tmp_path / "run")


def changes(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[str, Any]]:
    """Each key of `value` at each depth with each wrong value: its name, and the whole value."""
    items = value.items() if isinstance(value, dict) else enumerate(value[:1])
    for key, item in list(items):
        for wrong in WRONG:
            changed = copy.deepcopy(value)
            if wrong in (MISSING, RENAMED) and isinstance(value, list):
                continue
            if wrong is MISSING:
                del changed[key]
            elif wrong is RENAMED:
                changed[f"{key}s"] = changed.pop(key)
            else:
                changed[key] = wrong
            yield f"{'.'.join(map(str, (*path, key)))}: {wrong!r}", changed
        if isinstance(item, (dict, list)) and item:
            for name, inner in changes(item, (*path, key)):
                changed = copy.deepcopy(value)
                changed[key] = inner
                yield name, changed


def to_bytes(value: Any, indent: int | None = 2) -> bytes:
    """Strict JSON, in which HUGE is a number that no float holds."""
    return strict_json.json_bytes(value, indent).replace(f'"{HUGE}"'.encode(), HUGE.encode())


def read_record(run: Run) -> None:
    """What commands take from run.json."""
    _ = run.config, run.tokenizer, run.identity
    compute_from_record(ComputeConfig(), run.record)
    report_tables.data_rows(run.record)
    report_tables.origin_rows(run.record)
    json.dumps(ComparedRun("A", run).settings)


def read_log(run: Run) -> None:
    """What commands take from metrics.jsonl."""
    lines = list(run.metrics())
    best_eval(lines, run.history)
    elapsed_s(lines)
    _ = run.length, ComparedRun("A", run).results
    list(integrity.examine_run(run.path))


def assert_read_or_damaged(read: Callable[[], Any], name: str) -> bool:
    """Whether it was read. Any exception other than glasslm's fails the test."""
    try:
        read()
    except GlasslmError as error:
        if error.exit_code == 4 and "\n" not in str(error):
            return False
        raise
    except Exception as error:
        raise AssertionError(f"{name} ended in {error!r}") from error
    return True


def test_any_wrong_field_of_a_record_is_named(run_dir: Path) -> None:
    record = read_json(run_dir / "run.json")
    n_read = n_tried = 0
    for name, changed in changes(record):
        (run_dir / "run.json").write_bytes(to_bytes(changed))
        n_tried += 1
        n_read += assert_read_or_damaged(lambda: read_record(Run(run_dir)), name)
        if n_tried % 10 == 0:
            list(integrity.examine_run(run_dir))
    assert n_tried > 500
    assert n_read < n_tried / 2  # most texts may be "x", and newer fields may be missing


def test_any_wrong_field_of_a_line_is_named(run_dir: Path) -> None:
    path = run_dir / "metrics.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    indices = {json.loads(line)["kind"]: index for index, line in enumerate(lines)}
    assert set(indices) == set(LINE_TYPES) - {"warning", "resume"}
    for kind, index in indices.items():
        for name, changed in changes(json.loads(lines[index])):
            changed_lines = [*lines[:index], to_bytes(changed, None), *lines[index + 1 :]]
            path.write_bytes(b"".join(changed_lines))
            assert_read_or_damaged(lambda: read_log(Run(run_dir)), f"{kind}: {name}")


def test_any_wrong_field_of_a_state_is_named(run_dir: Path) -> None:
    folder = run_dir / "checkpoints" / "000004"
    state = read_json(folder / "state.json")
    contents = {
        path.name: [path.read_bytes()] for path in folder.iterdir() if path.name != files.MANIFEST
    }
    del state["loop"]["guard"]["losses"][1:], state["loop"]["guard"]["norms"][1:]

    def read() -> None:
        latest = checkpoint.load(run_dir, 4)
        LoopState.from_json(latest.position.loop)
        _ = latest.position.best and f"{latest.position.best.loss:.4f}"

    for name, changed in changes(state):
        files.write_folder(folder, contents | {"state.json": [to_bytes(changed)]})
        assert_read_or_damaged(read, name)


@pytest.mark.parametrize(
    "field", ["config", "versions", "tokenizer", "data", "engine", "parameters", "machine"]
)
@pytest.mark.parametrize("command", ["generate", "resume", "report", "evaluate", "reproduce"])
def test_a_crafted_record_ends_each_command_with_4(
    field: str, command: str, run_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    record = read_json(run_dir / "run.json") | {field: []}
    (run_dir / "run.json").write_bytes(to_bytes(record))
    assert cli.main([command, str(run_dir)]) == 4
    message = capsys.readouterr().err
    assert f"'{field}' is []" in message
    assert "Traceback" not in message


@pytest.mark.parametrize(
    ("value", "kind", "error"),
    [
        (math.inf, float, "it is inf, expected a finite number"),
        (True, int, "it is True, expected a whole number"),
        ([1, "x"], list[int], "'[]' is 'x', expected a whole number"),
        ({"a": {"b": 1}}, dict[str, dict[str, str]], "'.a.b' is 1, expected a text"),
        (None, int | None, ""),
        (2, float, ""),
    ],
)
def test_a_mismatch_names_field_value_and_expectation(value: Any, kind: Any, error: str) -> None:
    assert describe_mismatch(value, kind) == error
