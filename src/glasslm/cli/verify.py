"""glasslm verify: check the files of a run, and that it resumes to the bit."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, TextIO

from glasslm.cli.flag_groups import RunArgument, RunOpsFlag
from glasslm.errors import InputError
from glasslm.text import print_escaped

if TYPE_CHECKING:
    from pathlib import Path

    from glasslm.lab.verification.integrity import Part
    from glasslm.lab.verification.resumption import Resumption

UNVERIFIED = "not verified: report, figures, spikes, diagnosis and lock"

DESCRIPTION = """Check a run: its record, tokenizer, metrics and text, and each checkpoint
against its manifest and the parameter table. Prints one line for
each part: ok, note, or damaged with the reason and what to do. The run is only
read, and may still be training. The exit code is 0, or 1 if a part is damaged.

With --resume it also trains a copy of the run twice, in a temporary folder: 12
steps from the latest checkpoint, once without interruption, and once killed
after 7 or 8 steps and resumed from the checkpoint before. The copy has the
run's weights, moments, text, dropout, engine, precision and threads. Its
learning rate is constant, at the run's peak, because a finished schedule ends
at its minimum. The largest difference of any weight or moment must be 0.0, and
the metrics must be equal.

Example:
  glasslm verify runs/shakespeare-quick-20260314-153000 --resume"""


@dataclass(frozen=True)
class Flags:
    """The run to check, and how."""

    run: RunArgument
    ops: RunOpsFlag = ""
    resume: bool = False
    """Also train a short copy twice, once interrupted, and compare every bit."""
    json: bool = False
    """Print one JSON object at the end: passed, parts, resume."""


def main(argv: list[str]) -> int:
    from glasslm.cli.parsing import parse
    from glasslm.lab.verification import integrity
    from glasslm.runs import run_folder

    flags = parse(Flags, argv, "glasslm verify", DESCRIPTION)
    if flags.ops and not flags.resume:
        raise InputError("--ops is for --resume, which trains the run: give both, or leave it out")
    run_dir = run_folder.find_run(flags.run)
    out = sys.stderr if flags.json else sys.stdout
    parts = []
    for part in integrity.examine_run(run_dir):
        parts.append(part)
        _print_part(part, out)
    can_resume = flags.resume and parts[0].verdict == "ok"
    resumption = _test_resume(run_dir, parts, out, flags.ops) if can_resume else None
    n_damaged = sum(part.verdict == "damaged" for part in parts)
    n_notes = sum(part.verdict == "note" for part in parts)
    verdict = (
        f"{n_damaged} of {len(parts)} parts damaged" if n_damaged else f"whole: {len(parts)} parts"
    )
    notes = f", {n_notes} notes" if n_notes else ""
    print_escaped(f"\n{verdict}{notes}{_summarize_resumption(resumption)} ({UNVERIFIED})", out)
    passed = not n_damaged and (resumption is None or resumption.passed)
    if flags.json:
        facts = {
            "passed": passed,
            "parts": [vars(part) for part in parts],
            "resume": resumption and resumption.facts,
        }
        print(json.dumps(facts))
    return 0 if passed else 1


def _print_part(part: Part, out: TextIO) -> None:
    print_escaped(f"{part.verdict:7}  {part.name:18}  {part.message}", out)


def _test_resume(run_dir: Path, parts: list[Part], out: TextIO, ops: str) -> Resumption | None:
    """Interrupt and resume a copy of the run, and print the comparison.

    If there is no result, appends a part to `parts` and returns None. The part is damaged, or a
    note if training diverges.
    """
    from glasslm.errors import DamagedError, DivergedError
    from glasslm.lab.verification.integrity import Part
    from glasslm.lab.verification.resumption import try_resume
    from glasslm.text import notify

    try:
        resumption = try_resume(run_dir, notify, ops)
    except DamagedError as error:
        parts.append(Part("resume", "damaged", str(error)))
    except DivergedError as error:
        message = f"not known: a copy diverges when it continues ({error})"
        parts.append(Part("resume", "note", message))
    if parts[-1].name == "resume":
        _print_part(parts[-1], out)
        return None
    print_escaped(_format_resumption(resumption), out)
    return resumption


def _format_resumption(resumption: Resumption) -> str:
    """The comparison of the two copies as lines of text."""
    where = f"  ({resumption.where})" if resumption.difference else ""
    engine = f"{resumption.engine} engine in {resumption.precision}"
    lines = "the same" if resumption.same_lines else "NOT the same"
    progress = "the same" if resumption.same_progress else "NOT the same"
    return "\n".join(
        [
            f"\ntwo copies trained by the {engine}, from step {resumption.start_step} to "
            f"{resumption.end}: one without interruption,",
            f"one killed after step {resumption.killed_at_step} and resumed from step "
            f"{resumption.resumed_from_step}",
            f"largest difference over {resumption.entries} weights and moments: "
            f"{resumption.difference}{where}",
            f"metrics without timing, {resumption.lines} lines: {lines}",
            f"counters and state of the loop: {progress}",
        ]
    )


def _summarize_resumption(resumption: Resumption | None) -> str:
    if resumption is None:
        return ""
    return "; it resumes to the bit" if resumption.passed else "; it does NOT resume to the bit"
