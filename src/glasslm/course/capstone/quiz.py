"""The quiz: the checkpoint questions asked on the terminal before training, and marked afterwards.

Numbers are marked. Words are shown beside the answer, for the reader to compare. quiz.json stores
each question and the answer that was given, "" for a skipped one.
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
from glasslm.course.capstone.questions import Answer, Question
from glasslm.errors import DamagedError, InputError
from glasslm.report.page import Section
from glasslm.text import Notify, notify, plural

RECORD_NAME, FORMAT = "quiz.json", 1
TOLERANCE = 0.01  # relative

# A number, perhaps to a power or with a suffix; or an operator.
_PART = re.compile(
    r"(?P<number>(?:\d+\.?\d*|\.\d+)(?:e[+-]?\d+)?)(?:\s*(?:\^|\*\*)\s*(?P<power>\d+))?"
    r"(?:\s*(?P<suffix>thousand|million|billion|[kmgt]i?(?:b|bytes?)?|b)(?![a-z]))?"
    r"|(?P<operator>(?<![a-z])x(?![a-z])|[*×·/])"
)
_POWERS = {"thousand": 1, "million": 2, "billion": 3, "k": 1, "m": 2, "g": 3, "t": 4}


@dataclass(frozen=True)
class Mark:
    """A question with the given answer and the right one.

    `remark` describes the error of a number.
    """

    question: Question
    user_answer: str
    answer: str
    verdict: Literal["right", "off", "words", "skipped"]
    remark: str = ""


def read_line() -> str:
    """A line of standard input, from a terminal or a pipe.

    Raises EOFError at the end of the input, and InputError for bytes that are not UTF-8.
    """
    # Windows has no readline; its console edits lines itself.
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401 - gives input() arrow keys
    try:
        return input()
    except UnicodeDecodeError:
        raise InputError("an answer on standard input is not UTF-8: convert it first") from None


def ask_questions(
    questions: Sequence[Question],
    folder: Path,
    read: Callable[[], str] = read_line,
    notify: Notify = notify,
) -> None:
    """Ask the questions without an answer in quiz.json, one line each, and store each answer.

    An empty line skips a question; the end of the input (Ctrl-D) skips all others. A
    KeyboardInterrupt keeps the answers so far. Raises DamagedError if quiz.json is damaged.
    """
    stored = _read_record(folder)
    open_questions = [question for question in questions if question.name not in stored]
    if not open_questions:
        return
    notify(
        f"{plural(len(open_questions), 'question')} before training, with one line for each "
        "answer. An empty line skips a question, Ctrl-D skips all others."
    )
    at_end = False
    for number, question in enumerate(questions, 1):
        if question.name in stored:
            continue
        answer = ""
        if not at_end:
            notify(f"\n{number} of {len(questions)}: {question.title}\n{question.prompt}")
            try:
                answer = read().strip()
            except EOFError:
                at_end = True
        stored[question.name] = {"asked": question.prompt, "given": answer}
        files.write_json(folder / RECORD_NAME, {"format": FORMAT, "answers": stored})


def read_answers(folder: Path) -> dict[str, str]:
    """The given answers by the name of the question; empty without a quiz. Raises DamagedError."""
    return {name: answer["given"] for name, answer in _read_record(folder).items()}


def _read_record(folder: Path) -> dict[str, dict[str, str]]:
    """The answers of quiz.json: name of the question -> {"asked": ..., "given": ...}."""
    path = folder / RECORD_NAME
    if not path.exists():
        return {}
    match files.read_json(path):
        case {"format": 1, "answers": dict(answers)} if all(
            isinstance(answer, dict)
            and {"asked", "given"} <= answer.keys()
            and isinstance(answer["given"], str)
            for answer in answers.values()
        ):
            return dict(answers)
    raise DamagedError(
        f"{path} is not as the quiz wrote it: restore it, or delete it to be asked again"
    )


# -- marks -----------------------------------------------------------------------------------------


def mark_answers(user_answers: Mapping[str, str], answers: Sequence[Answer]) -> list[Mark]:
    """A mark for each question that has a given answer, "" included."""
    return [
        _mark(user_answers[answer.question.name], answer)
        for answer in answers
        if answer.question.name in user_answers
    ]


def _mark(user_answer: str, answer: Answer) -> Mark:
    question = answer.question
    if question.number is None:
        return Mark(question, user_answer, answer.text[0], "words" if user_answer else "skipped")
    right = _format_number(question.number, question.unit)
    if not user_answer:
        return Mark(question, user_answer, right, "skipped")
    values = parse_numbers(user_answer, question.unit)
    if not values:
        return Mark(question, user_answer, right, "off", "there is no number in it")
    number = question.number
    nearest = min(values, key=lambda value: abs(value - number))
    if abs(nearest - number) <= TOLERANCE * abs(number):
        return Mark(question, user_answer, right, "right")
    return Mark(question, user_answer, right, "off", describe_error(nearest, number, question.unit))


def parse_numbers(text: str, unit: str) -> list[float]:
    """The numbers that `text` may mean: one number, or a product or quotient, with suffixes.

    Suffixes are k, M, KB, MiB and the like. Only the text after an equals sign counts. k, M and G
    are powers of 1,000; for bytes they may also be powers of 1,024.

    >>> parse_numbers("20 x 800k = 16M tokens", "tokens"), parse_numbers("1 MB", "bytes")
    ([16000000.0], [1000000.0, 1048576.0])
    """
    text = re.sub(r"(?<=\d)[ ,_'](?=\d{3}(?!\d))", "", text.rpartition("=")[2].lower())
    text = re.sub(r"(?<=\d),(?=\d)", ".", text)  # a comma that does not separate thousands
    values = [
        _evaluate(text, unit, base) for base in ((1000, 1024) if unit == "bytes" else (1000,))
    ]
    return list(dict.fromkeys(value for value in values if math.isfinite(value)))


def _evaluate(text: str, unit: str, base: int) -> float:
    """The product or quotient at the first number in `text`; NaN if there is no number."""
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
    """The factor of a suffix. The suffix b is one byte for bytes, and a billion otherwise."""
    if not suffix:
        return 1.0
    if suffix == "b":
        return 1.0 if unit == "bytes" else 1e9
    power = _POWERS[suffix] if suffix in _POWERS else _POWERS[suffix[0]]
    return float((1024 if suffix[1:2] == "i" and suffix not in _POWERS else base) ** power)


def describe_error(value: float, right: float, unit: str) -> str:
    """How far a value is from the right one.

    >>> describe_error(64_000, 65_536_000, "bytes"), describe_error(36, 32, "")
    ('read as 64,000 bytes: 1,024 times too small', 'read as 36: 12% too large')
    """
    text = f"read as {_format_number(value, unit)}"
    if not value or not right:
        return text
    times = value / right
    direction, factor = ("large", times) if times > 1 else ("small", 1 / times)
    if factor >= 2:
        return f"{text}: {format(factor, ',.0f' if factor >= 100 else '.3g')} times too {direction}"
    return f"{text}: {abs(times - 1):.0%} too {direction}"


def _format_number(number: float, unit: str) -> str:
    is_whole = float(number).is_integer() or abs(number) >= 1000
    return (
        f"{number:,.0f} {unit}".strip()
        if is_whole and abs(number) < 1e15
        else f"{number:.5g} {unit}".strip()
    )


def build_section(marks: Sequence[Mark]) -> Section:
    """The part of a page with all marks and the number of right ones."""
    numbers = [mark for mark in marks if mark.question.number is not None and mark.user_answer]
    n_right = sum(mark.verdict == "right" for mark in numbers)
    n_skipped = sum(mark.verdict == "skipped" for mark in marks)
    sentences = ["You answered these questions before training."]
    if numbers:
        verb = "was" if n_right == 1 else "were"
        sentences += [
            f"{n_right} of {plural(len(numbers), 'number')} {verb} right to within {TOLERANCE:.0%}."
        ]
    if n_skipped:
        verb = "was" if n_skipped == 1 else "were"
        sentences += [f"{plural(n_skipped, 'question')} {verb} skipped."]
    sentences += ["Words are not marked: compare them with the answer."]
    signs = {"right": "ok", "off": "off", "words": "compare", "skipped": "skipped"}
    rows = [
        (signs[mark.verdict], mark.question.title, mark.user_answer, mark.answer, mark.remark)
        for mark in marks
    ]
    return Section(
        "Your answers before training",
        (" ".join(sentences),),
        ("", "question", "your answer", "the answer", ""),
        rows,
    )
