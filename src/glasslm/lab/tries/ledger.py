"""The ledger of tries: a JSON line for each event, appended only, each with the hash of the last.

Every try is in it, also one that failed or was interrupted, because each try is a chance to accept
a change that is worth nothing. The hashes show lines that were changed, or removed before others.
Lines removed from the end leave no trace in the file; the next try is then refused only because the
folder of the removed try's runs exists (cli/try.py).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import filelock

from glasslm import files, strict_json
from glasslm.errors import DamagedError, InUseError, explain_system_errors
from glasslm.runs.metrics import to_json_types

FORMAT = 1
FIRST_HASH = "0" * 64


class Ledger:
    """The events of tries.jsonl: `begin` of a try, its `end`, and `final`, the hidden text."""

    def __init__(self, path: Path) -> None:
        """Read `path`, if it exists. Raises DamagedError for a line that was changed or is missing.

        Lines that are missing at the end are not noticed.
        """
        self.path = path
        self.events: list[dict[str, Any]] = []
        if path.exists():
            self.events = list(_read_events(path))

    @property
    def tries(self) -> int:
        """The tries that have begun."""
        return sum(event["kind"] == "begin" for event in self.events)

    @property
    def results(self) -> list[dict[str, Any]]:
        """The ends of tries, in order."""
        return [event for event in self.events if event["kind"] == "end"]

    def append(self, kind: str, facts: Mapping[str, Any]) -> dict[str, Any]:
        """Append an event with the next hash of the chain."""
        before = self.events[-1]["hash"] if self.events else FIRST_HASH
        event = to_json_types({"format": FORMAT, "kind": kind, **facts, "before": before})
        event["hash"] = _hash(event)
        files.make_folder(self.path.absolute().parent)
        size = self.path.stat().st_size if self.path.exists() else 0
        with closing(files.Appender(self.path, size)) as file:
            file.append(json.dumps(event, sort_keys=True).encode() + b"\n")
        self.events.append(event)
        return event


@contextmanager
def open_ledger(path: Path) -> Iterator[Ledger]:
    """The ledger, held by this process alone: two tries at once would count as one.

    Raises InUseError where another process holds it.
    """
    files.make_folder(path.absolute().parent)
    lock = filelock.FileLock(path.with_name(f".{path.name}.lock"))
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout:
        raise InUseError(
            f"{path} is used by another try: wait for its end, or name another --ledger"
        ) from None
    try:
        yield Ledger(path)
    finally:
        lock.release()


def _read_events(path: Path) -> Iterator[dict[str, Any]]:
    before = FIRST_HASH
    with explain_system_errors(path, lambda why: DamagedError(f"{path} cannot be read ({why})")):
        lines = path.read_bytes().splitlines()
    for number, line in enumerate(lines, 1):
        try:
            event = strict_json.parse_json(line)
            is_whole = event["hash"] == _hash(event) and event["before"] == before
        except (ValueError, KeyError, TypeError, AttributeError):
            is_whole = False
        if not is_whole:
            raise DamagedError(
                f"line {number} of {path} was changed, cut or removed: the count of tries cannot "
                "be trusted. Restore the file, or begin another one with --ledger"
            )
        before = event["hash"]
        yield event


def _hash(event: Mapping[str, Any]) -> str:
    content = {name: value for name, value in event.items() if name != "hash"}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
