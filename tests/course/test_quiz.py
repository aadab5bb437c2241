"""The quiz: asked once, kept as it goes, marked with mercy for units and none for numbers."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from glasslm.config.schema import RunConfig
from glasslm.course.capstone import quiz
from glasslm.course.capstone.questions import ORDER, Answer, Question, list_questions
from glasslm.errors import DamagedError, InputError

QUESTIONS = list_questions(RunConfig(), 65)
CACHE = Question("kv-cache", "The KV cache", "How many bytes?", 1_048_576, "bytes")
WORDS = Question("families", "GPT, BERT and T5", "How do they differ?")
BITS = Question("compression", "Compression", "How many bits?", 6.0223678, "bits")


def type_lines(*lines: str | type[BaseException]) -> Callable[[], str]:
    """Somebody who types these lines; a class is raised, and after the last line the input ends."""
    waiting = iter(lines)

    def read() -> str:
        for line in waiting:
            if isinstance(line, str):
                return line
            raise line
        raise EOFError

    return read


class Messages(list[str]):
    def __call__(self, message: str) -> None:
        self.append(message)


# -- asking ----------------------------------------------------------------------------------------


def test_every_question_is_asked_in_order_and_each_answer_kept_at_once(tmp_path: Path) -> None:
    messages, kept = Messages(), []

    def read() -> str:
        kept.append(quiz.read_answers(tmp_path))
        return f"  answer {len(kept)} \n"

    quiz.ask_questions(QUESTIONS, tmp_path, read, messages)
    asked = [message for message in messages if " of 13: " in message]
    assert [message.splitlines()[-1] for message in asked] == [
        question.prompt for question in QUESTIONS
    ]
    assert asked[0].startswith("\n1 of 13: ")
    assert [len(before) for before in kept] == list(range(13))
    assert quiz.read_answers(tmp_path) == {name: f"answer {i}" for i, name in enumerate(ORDER, 1)}
    written = json.loads((tmp_path / quiz.RECORD_NAME).read_text(encoding="utf-8"))
    assert written["answers"]["kv-cache"]["asked"] == next(
        q.prompt for q in QUESTIONS if q.name == "kv-cache"
    )


def test_nothing_is_asked_twice(tmp_path: Path) -> None:
    """Who leaves by Ctrl-C goes on with the next question.

    Who has answered all is not asked at all.
    """
    with pytest.raises(KeyboardInterrupt):
        quiz.ask_questions(
            QUESTIONS, tmp_path, type_lines("one", "", KeyboardInterrupt), Messages()
        )
    assert quiz.read_answers(tmp_path) == {ORDER[0]: "one", ORDER[1]: ""}
    messages = Messages()
    quiz.ask_questions(QUESTIONS, tmp_path, type_lines(*"abcdefghijk"), messages)
    assert messages[1].startswith("\n3 of 13: ")
    assert quiz.read_answers(tmp_path)[ORDER[0]] == "one"
    assert "".join(quiz.read_answers(tmp_path).values()) == "oneabcdefghijk"
    messages.clear()
    quiz.ask_questions(QUESTIONS, tmp_path, type_lines(RuntimeError), messages)
    assert messages == []


def test_the_end_of_the_input_ends_the_quiz(tmp_path: Path) -> None:
    messages = Messages()
    quiz.ask_questions(QUESTIONS, tmp_path, type_lines("one"), messages)
    assert quiz.read_answers(tmp_path) == dict.fromkeys(ORDER, "") | {ORDER[0]: "one"}
    assert len(messages) == 3  # an introduction, a question that was answered, and one that was not
    quiz.ask_questions(QUESTIONS, tmp_path, type_lines(RuntimeError), messages)


def test_lines_are_read_from_a_pipe_and_questions_go_to_stderr(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(
        sys, "stdin", io.TextIOWrapper(io.BytesIO("d_k = 32, größer\n\n64k".encode()), "utf-8")
    )
    quiz.ask_questions(QUESTIONS, tmp_path)
    assert list(quiz.read_answers(tmp_path).values())[:4] == ["d_k = 32, größer", "", "64k", ""]
    out, err = capsys.readouterr()
    assert out == ""
    assert QUESTIONS[3].prompt in err
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"\xff\n"), "utf-8"))
    with pytest.raises(InputError, match="not UTF-8"):
        quiz.ask_questions(QUESTIONS, tmp_path / "new")


@pytest.mark.parametrize(
    "text",
    [
        "{", "[]", '{"format": 2, "answers": {}}', '{"format": 1, "answers": {"bpe": "th"}}',
        '{"format": 1, "answers": {"bpe": {"asked": "?", "given": 3}}}',
    ],
)  # fmt: skip
def test_a_damaged_file_is_said_to_be_one(tmp_path: Path, text: str) -> None:
    (tmp_path / quiz.RECORD_NAME).write_text(text, encoding="utf-8")
    with pytest.raises(DamagedError, match=r"quiz\.json"):
        quiz.ask_questions(QUESTIONS, tmp_path, type_lines(RuntimeError), Messages())
    with pytest.raises(DamagedError):
        quiz.read_answers(tmp_path)


def test_without_a_quiz_nothing_was_said(tmp_path: Path) -> None:
    assert quiz.read_answers(tmp_path) == {}


# -- numbers as people write them ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "unit", "values"),
    [
        ("128", "scores", [128]),
        ("128k", "tokens", [128e3]),
        ("about 1.5e9 tokens", "tokens", [1.5e9]),
        ("16,245,760", "tokens", [16245760]),
        ("16 245 760 tokens", "tokens", [16245760]),
        ("16M", "tokens", [16e6]),
        ("16 million", "tokens", [16e6]),
        ("1.4B tokens", "tokens", [1.4e9]),
        ("20 x 800k", "tokens", [16e6]),
        ("20*0.8M = 17M", "tokens", [17e6]),
        ("16 tokens x 4", "tokens", [64]),
        ("128 * 127 / 2", "scores", [8128]),
        ("8 / 0", "scores", []),
        ("4 x 2^10", "scores", [4096]),
        ("2**18 weights", "weights", [262144]),
        ("9^9999", "weights", []),
        ("1 MB", "bytes", [1e6, 1048576]),
        ("64KiB", "bytes", [65536]),
        ("64 kB", "bytes", [64e3, 65536]),
        ("512k", "bytes", [512e3, 524288]),
        ("512 kbytes", "bytes", [512e3, 524288]),
        ("65536 B", "bytes", [65536]),
        ("64 bytes", "bytes", [64]),
        ("2 x 4 layers x 128 x 4 bytes", "bytes", [4096]),
        ("6,02", "bits", [6.02]),
        (".5", "bits", [0.5]),
        ("d_k = 32", "", [32]),
        ("12 texts", "", [12]),
        ("12texts, exactly 3", "", [12]),
        ("12, not 3 x 4", "", [12]),
        ("no idea", "bytes", []),
        ("", "bytes", []),
        ("1e999", "tokens", []),
    ],
)
def test_numbers_are_read_as_people_write_them(text: str, unit: str, values: list[float]) -> None:
    assert quiz.parse_numbers(text, unit) == pytest.approx(values)


@given(st.integers(0, 10**13), st.sampled_from(["{}", "{:,}", "about {:,} of them", "x = {}"]))
def test_any_whole_number_is_read_back(number: int, form: str) -> None:
    assert quiz.parse_numbers(form.format(number), "tokens") == [number]


@given(st.text(max_size=40))
def test_any_text_can_be_typed(text: str) -> None:
    mark, *_ = quiz.mark_answers({"kv-cache": text}, [Answer(CACHE, ("It is.",))])
    assert mark.user_answer == text
    assert mark.verdict in ("right", "off", "skipped")


# -- marks -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("question", "text", "verdict", "remark"),
    [
        (CACHE, "1 MB", "right", ""),  # as powers of 1,024
        (CACHE, "1048 kB", "right", ""),
        (CACHE, "1.06 MiB", "off", "read as 1,111,491 bytes: 6% too large"),
        (CACHE, "262,144 bytes", "off", "read as 262,144 bytes: 4 times too small"),
        (CACHE, "1 GiB", "off", "read as 1,073,741,824 bytes: 1,024 times too large"),
        (CACHE, "2", "off", "read as 2 bytes: 524,288 times too small"),
        (CACHE, "0", "off", "read as 0 bytes"),
        (CACHE, "much", "off", "there is no number in it"),
        (CACHE, "", "skipped", ""),
        (BITS, "6.0", "right", ""),
        (BITS, "5.9", "off", "read as 5.9 bits: 2% too small"),
        (BITS, "6.07", "right", ""),
        (BITS, "6.09", "off", "read as 6.09 bits: 1% too large"),
    ],
)
def test_a_number_is_right_within_one_percent(
    question: Question, text: str, verdict: str, remark: str
) -> None:
    (mark,) = quiz.mark_answers({question.name: text}, [Answer(question, ("Words.",))])
    assert (mark.verdict, mark.user_answer) == (verdict, text)
    assert mark.remark == remark
    assert mark.answer == ("1,048,576 bytes" if question is CACHE else "6.0224 bits")


def test_words_stand_beside_the_answer_and_are_not_judged() -> None:
    answers = [Answer(WORDS, ("GPT writes, BERT reads.", "More."))]
    (mark,) = quiz.mark_answers({"families": "gpt is causal"}, answers)
    assert (mark.verdict, mark.user_answer, mark.answer) == (
        "words",
        "gpt is causal",
        "GPT writes, BERT reads.",
    )
    assert quiz.mark_answers({"families": ""}, answers)[0].verdict == "skipped"
    assert quiz.mark_answers({}, answers) == []


def test_the_page_counts_and_marks() -> None:
    answers = [Answer(CACHE, ("One.",)), Answer(BITS, ("Two.",)), Answer(WORDS, ("Three.",))]
    section = quiz.build_section(
        quiz.mark_answers({"kv-cache": "1 MiB", "compression": "8", "families": "causal"}, answers)
    )
    assert "1 of 2 numbers was right" in section.text[0]
    assert "skipped" not in section.text[0]
    assert [row[0] for row in section.rows] == ["ok", "off", "compare"]
    assert section.rows[1][2:] == ("8", "6.0224 bits", "read as 8 bits: 33% too large")
    section = quiz.build_section(
        quiz.mark_answers({"kv-cache": "1 MB", "compression": "6.02", "families": ""}, answers)
    )
    assert "2 of 2 numbers were right" in section.text[0]
    assert "1 question was skipped" in section.text[0]
    assert section.rows[2][:3] == ("skipped", "GPT, BERT and T5", "")
    section = quiz.build_section(quiz.mark_answers({"families": "causal"}, answers))
    assert "right to within" not in section.text[0]
