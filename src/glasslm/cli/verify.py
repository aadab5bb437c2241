"""glasslm verify: whether a run folder is whole, and whether it resumes to the bit."""

from __future__ import annotations

import dataclasses
import json
import sys
from dataclasses import dataclass
from signal import SIGINT
from typing import TYPE_CHECKING, Annotated, TextIO

import tyro

if TYPE_CHECKING:
    from pathlib import Path

    from glasslm.lab.verification.integrity import Part
    from glasslm.lab.verification.resumption import Resumption

DESCRIPTION = """Look at every file of a run: its record, its tokenizer, its metrics, each checkpoint against its
manifest and against the table of its weights, and the text that it was trained on. One line for each part: ok, note, or
damaged with the reason and the cure. Nothing is written into the run, which may go on meanwhile. The exit code is 0, or
1 where anything is damaged.

With --resume it also trains a copy of the run twice, in a temporary folder: 12 steps on from the latest checkpoint,
once to the end, and once with a sudden death after 7 or 8 of them, resumed from the checkpoint before that. A copy has
the run's weights, moments, text, dropout, engine, precision and threads, but a constant learning rate at the peak of
the run's own, because the schedule of a finished run is over. Then the largest difference of any weight or moment is
printed, which must be 0.0, and whether the metrics are the same.

Example:
  glasslm verify runs/shakespeare-tiny-20260314-153000 --resume"""


@dataclass(frozen=True)
class Flags:
    run: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="RUN")]
    """The run's folder, or its name under ./runs."""
    resume: bool = False
    """Also train a short copy of it twice, once interrupted, and compare every bit."""
    json: bool = False
    """Print one JSON object at the end: passed, parts, resume."""


def main(argv: list[str]) -> int:
    from glasslm.cli.parsing import parse
    from glasslm.lab.verification import integrity
    from glasslm.runs import run_folder
    from glasslm.text import tell

    flags = parse(Flags, argv, "glasslm verify", DESCRIPTION)
    run_dir = run_folder.find(flags.run)
    out = sys.stderr if flags.json else sys.stdout
    parts = []
    for part in integrity.examine(run_dir):
        parts.append(part)
        _tell(part, out)
    try:
        resumption = (
            _resumed(run_dir, parts, out) if flags.resume and parts[0].verdict == "ok" else None
        )
    except KeyboardInterrupt as error:
        tell("\nglasslm verify: interrupted")
        return 128 + (error.args[0] if error.args else SIGINT)
    damaged, notes = (sum(part.verdict == which for part in parts) for which in ("damaged", "note"))
    verdict = (
        f"{damaged} of {len(parts)} parts damaged" if damaged else f"whole: {len(parts)} parts"
    )
    print(f"\n{verdict}{f', {notes} notes' if notes else ''}{_in_short(resumption)}", file=out)
    passed = not damaged and (resumption is None or resumption.passed)
    if flags.json:
        resumed = resumption and dataclasses.asdict(resumption) | {"passed": resumption.passed}
        print(
            json.dumps(
                {"passed": passed, "parts": [vars(part) for part in parts], "resume": resumed}
            )
        )
    return 0 if passed else 1


def _tell(part: Part, out: TextIO) -> None:
    print(f"{part.verdict:7}  {part.name:18}  {part.message}", file=out, flush=True)


def _resumed(run_dir: Path, parts: list[Part], out: TextIO) -> Resumption | None:
    """Print what the trial says; where it comes to no end, that is a part: damaged, or a note where it diverges."""
    from glasslm.errors import DamagedError, DivergedError
    from glasslm.lab.verification.integrity import Part
    from glasslm.lab.verification.resumption import try_resume
    from glasslm.text import tell

    try:
        found = try_resume(run_dir, tell)
    except DamagedError as error:
        parts.append(Part("resume", "damaged", str(error)))
    except DivergedError as error:
        parts.append(
            Part(
                "resume",
                "note",
                f"not known: a copy that goes on diverges before its end ({error})",
            )
        )
    if parts[-1].name == "resume":
        _tell(parts[-1], out)
        return None
    print(
        f"\ntwo copies by the {found.engine} engine in {found.precision}, from step {found.begin} to {found.end}: one "
        f"without a stop, one that died after step {found.died} and was resumed at step {found.resumed}",
        file=out,
    )
    where = f"  ({found.where})" if found.difference else ""
    print(
        f"largest difference over {found.entries} weights and moments: {found.difference}{where}",
        file=out,
    )
    same = "the same" if found.same_lines else "NOT the same"
    print(f"metrics without timing, {found.lines} lines: {same}", file=out)
    print(
        f"counters and the loop's memory: {'the same' if found.same_progress else 'NOT the same'}",
        file=out,
    )
    return found


def _in_short(resumption: Resumption | None) -> str:
    if resumption is None:
        return ""
    return "; it resumes to the bit" if resumption.passed else "; it does NOT resume to the bit"
