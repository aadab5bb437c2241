"""The synthetic tasks by name, and the text of a task.

A text is a pure function of the task, its size, its number of examples and the length of its lines.
All its questions differ, so no example of the validation part occurs in the training part. Each
line is filled with line ends to the same length: the text consists of examples, and a context holds
a whole number of them.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from random import Random

from glasslm.config.schema import DataConfig
from glasslm.data.cache import cache_dir
from glasslm.data.sources.text_files import Source, source_file
from glasslm.data.sources.texts import cached_text
from glasslm.data.tasks import arithmetic, formal, in_context, recall, sequences
from glasslm.data.tasks.task import Example, Task
from glasslm.errors import InputError, require
from glasslm.text import Notify

TASKS: dict[str, Task] = {
    "copy": sequences.COPY,
    "reverse": sequences.REVERSE,
    "sort": sequences.SORT,
    "addition": arithmetic.ADDITION,
    "addition-reversed": arithmetic.ADDITION_REVERSED,
    "modular-addition": arithmetic.MODULAR_ADDITION,
    "associative-recall": recall.ASSOCIATIVE_RECALL,
    "induction": recall.INDUCTION,
    "dyck": formal.DYCK,
    "parity": formal.PARITY,
    "counting": formal.COUNTING,
    "grammar": formal.GRAMMAR,
    "regression": in_context.REGRESSION,
}
MAX_MISSES = 1000  # examples drawn in a row that exist already: there are no more of this size
TEXT_FORMAT = 1  # part of the cache's key: raise it where a generator draws other examples


def draw_examples(
    name: str, sizes: Collection[int], count: int, seed: int | str, exclude: Collection[str] = ()
) -> list[Example]:
    """`count` examples with different questions, their sizes in turn; fewer where there are fewer.

    None has a question of `exclude`. The same arguments give the same examples.
    """
    task, random = TASKS[name], Random(f"{name} {seed}")
    known, examples = set(exclude), list[Example]()
    open_sizes, turn = list(sizes), 0
    misses = dict.fromkeys(open_sizes, 0)
    while open_sizes and len(examples) < count:
        size = open_sizes[turn % len(open_sizes)]
        example = task.draw(random, size)
        if example.question not in known:
            known.add(example.question)
            examples.append(example)
            misses[size] = 0
            turn += 1
            continue
        misses[size] += 1
        if misses[size] >= MAX_MISSES:
            open_sizes.remove(size)
    # Examples of a small size run out early: without this they would all be at the start.
    order = sorted(range(len(examples)), key=lambda _: random.random())
    return [examples[index] for index in order]


def task_size(data: DataConfig) -> int:
    """The largest size of the examples of a task. Raises InputError where it is out of range."""
    assert data.task is not None
    task = TASKS[data.task]
    smallest = max(1, task.min_size)
    size = data.task_size or task.size
    expected = f"{smallest} to {task.max_size} {task.size_unit} for {data.corpus}, or 0"
    require(smallest <= size <= task.max_size, "task_size", size, expected)
    return size


def line_length(data: DataConfig) -> int:
    """The tokens of an example of a task, filled with line ends.

    It is the smallest power of two that holds all examples, or --task-line. Raises InputError where
    that is too short.
    """
    assert data.task is not None
    size = task_size(data)
    needed = TASKS[data.task].longest(size)
    if data.task_line:
        require(
            data.task_line >= needed,
            "task_line",
            data.task_line,
            f"{needed} or more, the longest example of {data.corpus} of size {size}",
        )
        return data.task_line
    return 1 << (needed - 1).bit_length()


def find_source(data: DataConfig, notify: Notify) -> Source:
    """The text of the task that --corpus names, from the cache or drawn now."""
    assert data.task is not None
    size, length = task_size(data), line_length(data)
    sizes = TASKS[data.task].sizes(size)

    def write_text() -> Iterator[bytes]:
        examples = draw_examples(data.task or "", sizes, data.task_examples, "text")
        for example in examples:
            yield example.text.ljust(length, "\n").encode()

    request = [TEXT_FORMAT, data.task, size, data.task_examples, length]
    path, _ = cached_text(cache_dir("tasks"), request, write_text)
    n_examples = path.stat().st_size // length
    if n_examples < data.task_examples:
        smallest, largest = min(sizes), max(sizes)
        words = f"size {size}" if smallest == largest else f"sizes {smallest} to {largest}"
        notify(f"corpus {data.corpus}: all {n_examples:,} examples of {words}")
    return Source(str(data.corpus), (source_file(path),))


def read_examples(text: str) -> list[Example]:
    """The examples in a text of a task. Raises InputError for a line without "="."""
    lines = [line for line in text.split("\n") if line]
    if bad := [line for line in lines if "=" not in line]:
        raise InputError(f"a line of the task has no '=': {bad[0]!r}")
    return [Example(*line.split("=", 1)) for line in lines]
