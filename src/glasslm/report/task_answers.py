"""Exact answers of a synthetic task in groups: held out, by carries, by size, and longer ones."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from glasslm.data.dataset import Dataset
from glasslm.data.ngram_model import MAX_TRAIN_BYTES, answer_by_frequency, answer_by_ngrams
from glasslm.data.tasks.arithmetic import count_carries
from glasslm.data.tasks.catalogue import TASKS, draw_examples, read_examples, task_size
from glasslm.data.tasks.task import Example, Task
from glasslm.inference.exact_answers import judge_examples
from glasslm.inference.proportions import Proportion
from glasslm.inference.trained_model import Model

MAX_EXAMPLES = 1000  # of a part of the text
SIZE_EXAMPLES = 100  # of each size
MAX_SIZES = 8  # of those up to the largest of training, and of the longer ones
TOO_SLOW = (
    "The model answers too slowly for a report. `glasslm evaluate` on this run has no time limit."
)


class AnswerGroup(NamedTuple):
    """Examples of one kind, and how many of them are answered."""

    label: str
    model: Proportion
    ngrams: Proportion


def task_of(model: Model) -> Task:
    """The task that the model was trained on."""
    name = model.config.data.task
    assert name is not None
    return TASKS[name]


def measure_answers(dataset: Dataset, model: Model, deadline: float) -> list[AnswerGroup]:
    """The groups that are measured before the deadline (time.monotonic)."""
    text = _read_lines(dataset, "train", MAX_TRAIN_BYTES)
    groups = []
    for label, examples in _list_groups(dataset, model, text):
        if time.monotonic() > deadline:
            break
        right = int(judge_examples(model, examples).sum())
        ngrams = answer_by_ngrams(text.encode(), examples).right
        n = len(examples)
        groups.append(AnswerGroup(label, Proportion(right, n), Proportion(ngrams, n)))
    return groups


def measure_most_frequent(dataset: Dataset) -> Proportion:
    """The held-out examples that the most frequent answer of the training part answers."""
    train, held_out = _read_part(dataset, "train"), _read_part(dataset, "val")
    return Proportion(answer_by_frequency(train, held_out), len(held_out))


def _read_part(dataset: Dataset, name: str) -> list[Example]:
    """Up to MAX_EXAMPLES examples from the start of a part of the text."""
    return read_examples(_read_lines(dataset, name, MAX_TRAIN_BYTES // 4))[:MAX_EXAMPLES]


def _read_lines(dataset: Dataset, name: str, max_tokens: int) -> str:
    """The whole lines in the first tokens of a part of the text."""
    tokens = (dataset.train if name == "train" else dataset.val).tokens
    text = dataset.tokenizer.decode(tokens[:max_tokens])
    return text[: text.rfind("\n") + 1]


def _list_groups(
    dataset: Dataset, model: Model, train_text: str
) -> Iterator[tuple[str, Sequence[Example]]]:
    held_out = _read_part(dataset, "val")
    yield "held out", held_out
    yield "of the training text", _read_part(dataset, "train")
    data, task = model.config.data, task_of(model)
    name, size = data.task or "", task_size(data)
    if name.startswith("addition"):
        by_carries = [count_carries(example.question) for example in held_out]
        for carries in sorted(set(by_carries)):
            group = [e for e, count in zip(held_out, by_carries) if count == carries]
            yield f"held out, {carries} carries", group
    if task.longest(1) == task.longest(2):  # the size is a modulus, not a length
        return
    known = {example.question for example in read_examples(train_text)}
    for length in _choose_sizes(task, size, model.config.model.block_size):
        examples = draw_examples(name, [length], SIZE_EXAMPLES, "sizes", known)
        if len(examples) == SIZE_EXAMPLES:  # small sizes have no other examples
            longer = ", longer than in training" if length > size else ""
            yield f"{length} {task.size_unit}{longer}", examples


def _choose_sizes(task: Task, size: int, block_size: int) -> list[int]:
    """Sizes up to the largest of training, and up to twice that, as far as the context allows."""
    shorter = list(task.sizes(size))
    longer = [
        length
        for length in range(size + 1, min(2 * size, task.max_size) + 1)
        if task.longest(length) - 1 <= block_size
    ]
    return [
        part[round(i * (len(part) - 1) / max(1, min(MAX_SIZES, len(part)) - 1))]
        for part in (shorter, longer)
        for i in range(min(MAX_SIZES, len(part)))
    ]
