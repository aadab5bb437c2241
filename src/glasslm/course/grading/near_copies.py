"""Submissions that are nearly the same, by their syntax trees.

Names, docstrings, comments, spaces, type annotations, the order of statements and that of the
operands of + and * do not count. Each statement becomes a sequence of words for its nodes;
compared are the multisets of runs of RUN_WORDS words (winnowing of a syntax tree; Schleimer,
Wilkerson and Aiken, 2003, for texts).
"""

from __future__ import annotations

import ast
import zlib
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

RUN_WORDS = 4
MIN_RUNS = 40  # there are few ways to write a shorter solution
LONG_RUNS = 100
MIN_SIMILARITY = 0.8  # of long solutions; 45 honest ones reach 0.28: docs/log.md, 2026-11-29
MIN_SHORT_SIMILARITY = 0.95
MAX_SHORT_PARTNERS = 2  # what more students write in the same way is the usual way

_SKIPPED = (ast.Load, ast.Store, ast.Del, ast.Import, ast.ImportFrom)


@dataclass(frozen=True)
class NearCopy:
    """Two students whose submissions for an exercise are nearly the same."""

    exercise: str
    student: str
    other: str
    similarity: float
    runs: int


def fingerprint(source: str, start_file: str = "") -> dict[str, int]:
    """How often each run of words occurs in a source, less those of the file to start with.

    The keys are checksums as text, because the fingerprint is kept as JSON. Empty where the source
    is no Python.
    """
    counts = _count_runs(source)
    counts.subtract(_count_runs(start_file))
    return {str(run): count for run, count in sorted(counts.items()) if count > 0}


def find_near_copies(
    exercise: str, fingerprints: Mapping[str, Mapping[str, int]]
) -> list[NearCopy]:
    """The pairs of students with nearly the same submission, the most similar first.

    Submissions below MIN_RUNS are left out: there are few ways to write a ReLU. Those below
    LONG_RUNS must be the same but for a run or two, and must be so for few students.
    """
    sizes = {student: sum(counts.values()) for student, counts in fingerprints.items()}
    students = sorted(student for student, size in sizes.items() if size >= MIN_RUNS)
    pairs = []
    for index, student in enumerate(students):
        for other in students[index + 1 :]:
            runs = min(sizes[student], sizes[other])
            least = MIN_SIMILARITY if runs >= LONG_RUNS else MIN_SHORT_SIMILARITY
            if runs < least * max(sizes[student], sizes[other]):
                continue
            similarity = measure_similarity(fingerprints[student], fingerprints[other])
            if similarity >= least:
                pairs.append(NearCopy(exercise, student, other, similarity, runs))
    partners = Counter(name for pair in pairs for name in (pair.student, pair.other))
    kept = [
        pair
        for pair in pairs
        if pair.runs >= LONG_RUNS
        or max(partners[pair.student], partners[pair.other]) <= MAX_SHORT_PARTNERS
    ]
    return sorted(kept, key=lambda pair: (-pair.similarity, pair.student, pair.other))


def measure_similarity(a: Mapping[str, int], b: Mapping[str, int]) -> float:
    """The share of runs that two submissions have in common, of all that any of them has."""
    common = sum(min(count, b.get(run, 0)) for run, count in a.items())
    total = sum(a.values()) + sum(b.values()) - common
    return common / total if total else 0.0


def _count_runs(source: str) -> Counter[int]:
    try:
        tree = ast.parse(source)
        statements = [_words(part) for part in _list_statements(tree)]
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return Counter()
    runs: Counter[int] = Counter()
    for words in statements:
        for start in range(max(1, len(words) - RUN_WORDS + 1)):
            # A checksum that is the same in every process, as `hash` is not.
            runs[zlib.crc32(" ".join(words[start : start + RUN_WORDS]).encode())] += 1
    return runs


def _list_statements(tree: ast.AST) -> Iterator[ast.AST]:
    """The statements without their bodies, docstrings and imports left out."""
    for node in ast.walk(tree):
        is_text = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        if isinstance(node, ast.stmt) and not is_text and not isinstance(node, _SKIPPED):
            yield node


def _words(node: ast.AST) -> list[str]:
    """One word for each node of a statement, from its root on, without its body."""
    word = type(node).__name__
    children = [
        child
        for name, value in ast.iter_fields(node)
        if name not in ("body", "orelse", "finalbody", "handlers", "annotation", "returns")
        for child in (value if isinstance(value, list) else [value])
        if isinstance(child, ast.AST) and not isinstance(child, _SKIPPED)
    ]
    if isinstance(node, ast.Attribute):
        word = node.attr
    elif isinstance(node, ast.keyword):
        word = f"{node.arg}="
    elif isinstance(node, ast.Constant):
        word = str(node.value) if type(node.value) in (int, bool) else type(node.value).__name__
    parts = [_words(child) for child in children]
    if isinstance(node, ast.BinOp) and isinstance(node.op, (ast.Add, ast.Mult)):
        parts.sort()
    return [word, *(item for part in parts for item in part)]
