"""The operations of a run: code in its run.json, which is run only if the user says so."""

from __future__ import annotations

import dataclasses
import hashlib

from glasslm.config.schema import OperationsConfig, RunConfig
from glasslm.engines.operations import (
    OperationsFile,
    admit,
    describe_operations,
    operations_from_text,
    read_operations,
    unused_operations,
)
from glasslm.errors import DamagedError, InputError
from glasslm.runs.record import OperationsRecord
from glasslm.runs.run_folder import Run
from glasslm.text import Notify, notify

RECORDED = "recorded"  # the word of --ops for the text in run.json
HASH_LENGTH = 12  # shown characters of a sha256


def admit_run_operations(run: Run, ops: str, notify: Notify = notify) -> RunConfig:
    """The config of a run, whose operations the engines of this process may then compute with.

    `ops` is a file, "recorded" for the text in run.json, or "". A run without operations takes
    those of any file. Raises InputError where a run has operations and `ops` is "" or another file,
    and DamagedError where run.json contradicts itself.
    """
    recorded, config = run.record.get("operations"), run.config
    named = config.operations
    if (named.ops_sha256 or named.ops) and (not recorded or recorded["sha256"] != named.ops_sha256):
        raise DamagedError(f"{run.path}: run.json lacks the operations that its config names")
    if recorded is None:
        return _admit_new(run, ops, notify)
    if not ops:
        raise InputError(
            f"{run.path} computes with {', '.join(recorded['names'])} of {recorded['file']}, and "
            "code of a run is not executed unasked: give --ops FILE with this file, or --ops "
            f"{RECORDED} to run its text from run.json"
        )
    operations = _read_recorded(run, recorded) if ops == RECORDED else read_operations(ops)
    if operations.file.sha256 != recorded["sha256"]:
        raise InputError(
            f"{ops} is another file than the one that {run.path} was trained with: its sha256 is "
            f"{operations.file.sha256[:HASH_LENGTH]}, run.json says "
            f"{recorded['sha256'][:HASH_LENGTH]}: give that file, or --ops {RECORDED}"
        )
    admit(operations)
    source = " recorded in run.json" if ops == RECORDED else ""
    notify(f"ops: {describe_operations(operations)}{source}")
    return config


def _admit_new(run: Run, ops: str, notify: Notify) -> RunConfig:
    """The config of a run without operations, with those of a file."""
    if not ops:
        return run.config
    if ops == RECORDED:
        raise InputError(f"{run.path} records no operations: leave out --ops, or give a file")
    operations = read_operations(ops)
    config = dataclasses.replace(run.config, operations=admit(operations))
    for sentence in unused_operations(operations, config):
        notify(f"note: {sentence}")
    notify(f"ops: {describe_operations(operations)}; {run.path} was trained without them")
    return config


def _read_recorded(run: Run, recorded: OperationsRecord) -> OperationsFile:
    text, name, sha256 = recorded["text"], recorded["file"], recorded["sha256"]
    contents = [text.encode(), b"\xef\xbb\xbf" + text.encode()]  # a byte order mark is not stored
    if sha256 not in [hashlib.sha256(content).hexdigest() for content in contents]:
        raise DamagedError(f"{run.path}: the text of {name} in run.json does not have its sha256")
    return operations_from_text(text, name, sha256)


def require_without_operations(run: Run, action: str) -> None:
    """Raise InputError where a run computes with operations of a file, which `action` cannot."""
    if run.config.operations != OperationsConfig():
        raise InputError(
            f"{run.path} computes with operations of {run.config.operations.ops}, which cannot be "
            f"{action}"
        )
