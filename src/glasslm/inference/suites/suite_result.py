"""The result of a suite: a table with its method, kept in the folder of the run for its report."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, TypedDict, cast

from glasslm import files
from glasslm.errors import InputError, explain_system_errors
from glasslm.runs.metrics import to_json_types
from glasslm.runs.typed_json import Count, require_type

SuiteName = Literal["grammar", "induction", "copying", "dialogues"]
SUITES_FOLDER = "suites"  # in a run folder


@dataclass(frozen=True)
class SuiteResult:
    """What a suite measured."""

    suite: str
    question: str  # the title of its section
    method: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    step: int  # of the checkpoint
    remark: str = ""
    facts: dict[str, Any] = field(default_factory=dict)  # the numbers for JSON


class SuiteFile(TypedDict):
    """The content of suites/NAME.json: the fields of SuiteResult."""

    format: Count
    suite: str
    question: str
    method: str
    header: list[str]
    rows: list[list[str]]
    step: Count
    remark: str
    facts: dict[str, Any]


def save_result(result: SuiteResult, run_dir: Path) -> Path:
    """Write suites/NAME.json into the folder of a run; returns its path.

    Raises InputError where the folder cannot be written.
    """
    path = run_dir / SUITES_FOLDER / f"{result.suite}.json"
    cure = "copy the run, then evaluate the copy"
    with explain_system_errors(
        run_dir, lambda why: InputError(f"{run_dir} cannot be written ({why}): {cure}")
    ):
        files.make_folder(path.parent)
        files.write_json(path, to_json_types({"format": 1, **asdict(result)}))
    return path


def read_results(run_dir: Path) -> list[SuiteResult]:
    """The results that were saved in the folder of a run, by the names of the suites.

    Raises DamagedError for a file that is not one of them.
    """
    results = []
    for path in sorted((run_dir / SUITES_FOLDER).glob("*.json")):
        content = files.read_json(path)
        require_type(content, SuiteFile, path)
        saved = cast(SuiteFile, content)
        results.append(
            SuiteResult(
                saved["suite"],
                saved["question"],
                saved["method"],
                tuple(saved["header"]),
                tuple(map(tuple, saved["rows"])),
                saved["step"],
                saved["remark"],
                saved["facts"],
            )
        )
    return results
