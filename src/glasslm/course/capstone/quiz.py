"""The checkpoint questions asked on the terminal before anything is trained, kept in quiz.json, and marked afterwards.

Numbers are marked; words are set beside the answer, and whoever wrote them judges. quiz.json holds each question as it
was asked and what was said to it, "" for one that was skipped.
"""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from glasslm import files
from glasslm.course.capstone.questions import Answer, Question, plural
from glasslm.errors import DamagedError, InputError
from glasslm.report.page import Section
from glasslm.text import Say, tell

KEPT, FORMAT = "quiz.json", 1
TOLERANCE = 0.01  # of the right number

# A number, perhaps to a power or with a suffix; or an operator.
_PART = re.compile(
    r"(?P<number>(?:\d+\.?\d*|\.\d+)(?:e[+-]?\d+)?)(?:\s*(?:\^|\*\*)\s*(?P<power>\d+))?"
    r"(?:\s*(?P<suffix>thousand|million|billion|[kmgt]i?(?:b|bytes?)?|b)(?![a-z]))?"
    r"|(?P<operator>(?<![a-z])x(?![a-z])|[*×·/])"
)
_POWERS = {"thousand": 1, "million": 2, "billion": 3, "k": 1, "m": 2, "g": 3, "t": 4}


@dataclass(frozen=True)
class Mark:
    """A question with what was said before and what is right; `remark` says how far off a number was."""

    question: Question
    given: str
    answer: str
    verdict: Literal["right", "off", "words", "skipped"]
    remark: str = ""


def line() -> str:
    """A line of standard input, whether somebody types it or not; EOFError at its end, InputError for no UTF-8."""
    with contextlib.suppress(ImportError):  # not on Windows, where the console edits lines itself
        import readline  # noqa: F401 - gives input() arrow keys
    try:
        return input()
    except UnicodeDecodeError:
        raise InputError("an answer on standard input is not UTF-8: convert it first") from None


def hold(
    questions: Sequence[Question], folder: Path, read: Callable[[], str] = line, say: Say = tell
) -> None:
    """Ask what has not been asked yet, a line each, and keep every answer in the folder's quiz.json as it comes.

    An empty line skips a question; the end of the input (Ctrl-D) skips all that are left. A KeyboardInterrupt leaves
    what was said before it. Raises DamagedError where quiz.json is not as it was written.
    """
    kept = _kept(folder)
    left = [question for question in questions if question.name not in kept]
    if not left:
        return
    say(
        f"{plural(len(left), 'question')} before anything is trained: a line for each; empty skips one, Ctrl-D the rest"
    )
    over = False
    for number, question in enumerate(questions, 1):
        if question.name in kept:
            continue
        given = ""
        if not over:
            say(f"\n{number} of {len(questions)}: {question.title}\n{question.asked}")
            try:
                given = read().strip()
            except EOFError:
                over = True
        kept[question.name] = {"asked": question.asked, "given": given}
        files.write_json(folder / KEPT, {"format": FORMAT, "answers": kept})


def given(folder: Path) -> dict[str, str]:
    """What was said to each question, by its name; nothing where there was no quiz. Raises DamagedError."""
    return {name: said["given"] for name, said in _kept(folder).items()}


def _kept(folder: Path) -> dict[str, dict[str, str]]:
    path = folder / KEPT
    if not path.exists():
        return {}
    match files.read_json(path):
        case {"format": 1, "answers": dict(kept)} if all(
            isinstance(said, dict)
            and {"asked", "given"} <= said.keys()
            and isinstance(said["given"], str)
            for said in kept.values()
        ):
            return dict(kept)
    raise DamagedError(
        f"{path} is not as the quiz wrote it: restore it, or delete it to be asked again"
    )


# -- afterwards -------------------------------------------------------------------------------------------------------


def marked(given: Mapping[str, str], answers: Sequence[Answer]) -> list[Mark]:
    """Each question of the answers that was asked, with what was said to it."""
    return [
        _mark(given[answer.question.name], answer)
        for answer in answers
        if answer.question.name in given
    ]


def _mark(given: str, answer: Answer) -> Mark:
    question = answer.question
    if question.number is None:
        return Mark(question, given, answer.text[0], "words" if given else "skipped")
    right = _written(question.number, question.unit)
    if not given:
        return Mark(question, given, right, "skipped")
    read = readings(given, question.unit)
    if not read:
        return Mark(question, given, right, "off", "there is no number in it")
    number = question.number
    nearest = min(read, key=lambda value: abs(value - number))
    if abs(nearest - number) <= TOLERANCE * abs(number):
        return Mark(question, given, right, "right")
    return Mark(question, given, right, "off", off_by(nearest, number, question.unit))


def readings(text: str, unit: str) -> list[float]:
    """The numbers that `text` may mean: a number, or a product or quotient of some, with k, M, KB, MiB and the like.

    After an equals sign what follows it counts. k, M and G are powers of 1,000; of bytes, they may be powers of 1,024.

    >>> readings("20 x 800k = 16M tokens", "tokens"), readings("1 MB", "bytes")
    ([16000000.0], [1000000.0, 1048576.0])
    """
    text = re.sub(r"(?<=\d)[ ,_'](?=\d{3}(?!\d))", "", text.rpartition("=")[2].lower())
    text = re.sub(r"(?<=\d),(?=\d)", ".", text)  # a comma that parts no thousands
    values = [_value(text, unit, base) for base in ((1000, 1024) if unit == "bytes" else (1000,))]
    return list(dict.fromkeys(value for value in values if math.isfinite(value)))


def _value(text: str, unit: str, base: int) -> float:
    """The first number in `text`, times or over those that follow an operator; NaN where there is none."""
    value, operator = math.nan, ""
    for part in _PART.finditer(text):
        if part["operator"]:
            operator = part["operator"]
            continue
        try:
            number = float(part["number"]) ** int(part["power"] or 1) * _scale(
                part["suffix"] or "", unit, base
            )
        except OverflowError:
            return math.inf
        if math.isnan(value):
            value = number
        elif operator == "/":
            value = value / number if number else math.inf
        elif operator:
            value *= number
        else:
            break
        operator = ""
    return value


def _scale(suffix: str, unit: str, base: int) -> float:
    """What a suffix multiplies by. Of bytes, b is a byte; of anything else it is a billion."""
    if not suffix:
        return 1.0
    if suffix == "b":
        return 1.0 if unit == "bytes" else 1e9
    power = _POWERS[suffix] if suffix in _POWERS else _POWERS[suffix[0]]
    return float((1024 if suffix[1:2] == "i" and suffix not in _POWERS else base) ** power)


def off_by(value: float, right: float, unit: str) -> str:
    """
    >>> off_by(64_000, 65_536_000, "bytes"), off_by(36, 32, "")
    ('read as 64,000 bytes: 1,024 times too small', 'read as 36: 12% too large')
    """
    read = f"read as {_written(value, unit)}"
    if not value or not right:
        return read
    times = value / right
    direction, factor = ("large", times) if times > 1 else ("small", 1 / times)
    if factor >= 2:
        return f"{read}: {format(factor, ',.0f' if factor >= 100 else '.3g')} times too {direction}"
    return f"{read}: {abs(times - 1):.0%} too {direction}"


def _written(number: float, unit: str) -> str:
    whole = float(number).is_integer() or abs(number) >= 1000
    return (
        f"{number:,.0f} {unit}".strip()
        if whole and abs(number) < 1e15
        else f"{number:.5g} {unit}".strip()
    )


def section(marks: Sequence[Mark]) -> Section:
    """A part of a page: what was said before, what is right, and how many numbers were."""
    numbers = [mark for mark in marks if mark.question.number is not None and mark.given]
    right = sum(mark.verdict == "right" for mark in numbers)
    skipped = sum(mark.verdict == "skipped" for mark in marks)
    told = ["This was asked before anything was trained."]
    if numbers:
        were = "was" if right == 1 else "were"
        told += [
            f"{right} of {plural(len(numbers), 'number')} {were} right to within {TOLERANCE:.0%}."
        ]
    if skipped:
        told += [f"{plural(skipped, 'question')} {'was' if skipped == 1 else 'were'} skipped."]
    told += ["Words stand beside the answer: only you can tell whether they say the same."]
    signs = {"right": "ok", "off": "off", "words": "compare", "skipped": "skipped"}
    rows = [(signs[mark.verdict], mark.question.title, mark.given, mark.answer, mark.remark)
            for mark in marks]  # fmt: skip
    return Section(
        "What you knew before",
        (" ".join(told),),
        ("", "question", "you said", "the answer", ""),
        rows,
    )
