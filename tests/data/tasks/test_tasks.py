"""The synthetic tasks: right answers, no example twice, the same text on every machine."""

from __future__ import annotations

import hashlib
import itertools
from random import Random
from typing import get_args

import numpy as np
import pytest

from glasslm.config.data_config import TASK_PREFIX, TaskCorpus
from glasslm.config.schema import DataConfig
from glasslm.data.answer_targets import AnswerFormat, answer_format
from glasslm.data.dataset import Dataset, prepare_dataset
from glasslm.data.tasks import arithmetic, formal, in_context
from glasslm.data.tasks.catalogue import (
    TASKS,
    draw_examples,
    find_source,
    line_length,
    read_examples,
)
from glasslm.errors import InputError
from glasslm.text import ignore_message


def closing_brackets(question: str) -> str:
    """By deleting pairs until only open brackets are left."""
    previous = ""
    while question != previous:
        previous = question
        for pair in ("()", "[]", "{}"):
            question = question.replace(pair, "")
    return question[::-1].translate(str.maketrans("([{", ")]}"))


def add_by_hand(question: str) -> str:
    a, b = question.split("+")
    total = 0
    for _ in range(int(a)):
        total += 1
    for _ in range(int(b)):
        total += 1
    return str(total).rjust(len(a) + 1, "0")


def fit_function(question: str) -> str:
    """Tries every function of one bit on all pairs."""
    *pairs, asked = question.split(" ")
    answers = set()
    for bit, invert in itertools.product(range(in_context.N_BITS), (False, True)):
        values = [(pair[bit] == "1") != invert for pair in pairs]
        if values == [pair[-1] == "1" for pair in pairs]:
            answers.add(str(int((asked[bit] == "1") != invert)))
    assert len(answers) == 1, question
    return answers.pop()


def recall(question: str) -> str:
    pairs, asked = question.split("?")
    (digit,) = [pairs[i + 1] for i in range(0, len(pairs), 2) if pairs[i] == asked]
    return digit


def after_last(question: str) -> str:
    (place,) = [i for i, letter in enumerate(question[:-1]) if letter == question[-1]]
    return question[place + 1]


def residue_sum(question: str) -> str:
    a, b = (arithmetic.RESIDUES.index(symbol) for symbol in question.split("+"))
    return arithmetic.RESIDUES[(a + b) % 59]


# For each task an independent and slow way to the answer.
SLOW_ANSWERS = {
    "copy": lambda q: "".join(list(q)),
    "reverse": lambda q: "".join(reversed(q)),
    "sort": lambda q: "".join(letter * q.count(letter) for letter in sorted(set(q))),
    "addition": add_by_hand,
    "addition-reversed": lambda q: add_by_hand(q)[::-1],
    "modular-addition": residue_sum,
    "associative-recall": recall,
    "induction": after_last,
    "dyck": closing_brackets,
    "parity": lambda q: str(sum(map(int, q)) % 2),
    "counting": lambda q: f"{len([x for x in q[:-2] if x == q[-1]]):02d}",
    "grammar": lambda q: (
        "are"
        if next(word for word in q.split() if word.rstrip("s") in formal.NOUNS).endswith("s")
        else "is"
    ),
    "regression": fit_function,
}


def prepare(name: str, n_examples: int = 300, **settings) -> tuple[DataConfig, Dataset]:
    data = DataConfig(corpus=f"{TASK_PREFIX}{name}", task_examples=n_examples, **settings)
    source = find_source(data, ignore_message)
    return data, prepare_dataset(data, source, ignore_message)


def test_the_words_of_corpus_are_the_tasks():
    assert [word.removeprefix(TASK_PREFIX) for word in get_args(TaskCorpus)] == list(TASKS)
    assert set(SLOW_ANSWERS) == set(TASKS)


@pytest.mark.parametrize("name", TASKS)
def test_answers_are_right(name):
    task = TASKS[name]
    examples = draw_examples(name, task.sizes(task.size), 300, "test")
    assert len(examples) == 300
    for question, answer in examples:
        assert answer == SLOW_ANSWERS[name](question), question
        assert not set(question + answer) & set("=\n")


@pytest.mark.parametrize("name", TASKS)
def test_no_held_out_example_is_in_the_training_part(name):
    data, dataset = prepare(name, val_fraction=0.3, test_fraction=0.1)
    parts = [
        read_examples(dataset.tokenizer.decode(split.tokens[:]))
        for split in (dataset.train, dataset.val, dataset.test)
    ]
    questions = [example.question for part in parts for example in part]
    assert len(set(questions)) == len(questions) == 300  # all whole, no two alike
    assert len(parts[1]) == 90
    for part in (dataset.train, dataset.val, dataset.test):
        assert len(part.tokens) % line_length(data) == 0


@pytest.mark.parametrize("name", TASKS)
def test_the_longest_example_fits_its_line(name):
    task = TASKS[name]
    for size in {max(1, task.min_size), task.size, min(task.max_size, 2 * task.size)}:
        random = Random(0)
        drawn = max(len(task.draw(random, size).text) for _ in range(500))
        assert drawn <= task.longest(size)


def test_the_texts_are_the_same_on_every_machine():
    """The text depends on no library and no clock: this hash is that of all tasks."""
    digest = hashlib.sha256()
    for name, task in TASKS.items():
        for example in draw_examples(name, task.sizes(task.size), 50, "text"):
            digest.update(example.text.encode())
    assert digest.hexdigest() == "2e195eebbef7c251de76344ebafa8f3e9992dda29b596ca180d2a37184d7a7a0"


def test_a_small_task_has_all_its_examples():
    _, dataset = prepare("modular-addition", n_examples=10_000, task_size=7)
    n_tokens = len(dataset.train.tokens) + len(dataset.val.tokens)
    assert n_tokens == 7 * 7 * 8


def test_sizes_are_equally_frequent_and_mixed():
    lengths = [len(example.question) for example in draw_examples("sort", range(3, 7), 400, 1)]
    assert [lengths.count(size) for size in range(3, 7)] == [100] * 4
    assert 4.0 < np.mean(lengths[:100]) < 5.0


def test_excluded_questions_are_not_drawn():
    first = draw_examples("parity", [6], 40, 1)
    others = draw_examples("parity", [6], 100, 1, {example.question for example in first})
    assert len(others) == 24
    assert not {example.question for example in first} & {example.question for example in others}


def test_answers_alone_are_targets():
    tokenizer = prepare("copy")[1].tokenizer
    text = "ab=ab\n\n\ncd=cd\n\n\n"
    tokens = tokenizer.encode(text).astype(np.int64)
    answers = AnswerFormat(*map(int, tokenizer.encode("=\n")), line_length=8)
    targets = answers.mask(tokens[None, :-1], tokens[None, 1:])[0]
    predicted = [tokenizer.decode([token]) if token >= 0 else "." for token in targets]
    assert "".join(predicted) == "..ab\n.....cd\n.."


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"corpus": "task:copy", "task_size": 101}, "1 to 100 letters"),
        ({"corpus": "task:copy", "task_line": 12}, "22 or more"),
        ({"corpus": "shakespeare", "task_size": 3}, "--task-size needs a task"),
        ({"corpus": "task:copy", "tokenizer": "bpe"}, "leave it out"),
        ({"corpus": "task:copy", "special_tokens": ("<e>",)}, "leave out --special-tokens"),
    ],
)
def test_bad_settings_are_refused(settings, message):
    with pytest.raises(InputError, match=message):
        find_source(DataConfig(**settings), ignore_message)


def test_other_texts_have_no_answers():
    assert answer_format(DataConfig(), prepare("copy")[1].tokenizer) is None
