"""Byte-pair encoding: the merges of a text."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from itertools import combinations, pairwise
from typing import Any

from glasslm.course.learn.exercise import Case, CaseRandom, Exercise, Mistake, Sizes

Pair = tuple[int, int]
FIRST_ID = 256  # of the merged tokens: the bytes come before


def train_bpe(ids: Sequence[int], n_merges: int) -> list[Pair]:
    """The pairs that are merged, in order. arXiv:1508.07909."""
    merges: list[Pair] = []
    for new in range(FIRST_ID, FIRST_ID + n_merges):
        counts = Counter(pairwise(ids))
        best = min(counts, key=lambda pair: (-counts[pair], pair), default=(0, 0))
        if counts[best] < 2:
            break
        merges.append(best)
        ids = merge_pair(ids, best, new)
    return merges


def merge_pair(ids: Sequence[int], pair: Pair, new: int) -> list[int]:
    """ids with every occurrence of the pair replaced, from the left."""
    merged: list[int] = []
    i = 0
    while i < len(ids):
        is_pair = tuple(ids[i : i + 2]) == tuple(pair)
        merged.append(new if is_pair else ids[i])
        i += 2 if is_pair else 1
    return merged


def train_with(
    ids: Sequence[int],
    n_merges: int,
    *,
    pairs: Callable[[Sequence[int]], Iterable[Pair]] = pairwise,
    rank: Callable[[Pair, int], Any] = lambda pair, count: (-count, pair),
    merge: Callable[[Sequence[int], Pair, int], Sequence[int]] = merge_pair,
    first_id: int = FIRST_ID,
    min_count: int = 2,
    more: int = 0,
    is_reversed: bool = False,
) -> list[Pair]:
    """`train_bpe` with a usual mistake; the pair of lowest rank is merged."""
    merges: list[Pair] = []
    for new in range(first_id, first_id + n_merges + more):
        counts = Counter(pairs(ids))
        frequent = [pair for pair in counts if counts[pair] >= min_count]
        if not frequent:
            break
        pair = min(frequent, key=lambda pair: rank(pair, counts[pair]))
        merges.append((pair[1], pair[0]) if is_reversed else pair)
        ids = merge(ids, pair, new)
    return merges


def merge_first(ids: Sequence[int], pair: Pair, new: int) -> list[int]:
    """ids with the first occurrence of the pair replaced alone."""
    merged = merge_pair(ids, pair, new)
    i = merged.index(new)
    return [*merged[: i + 1], *ids[i + 2 :]]


def merge_overlapping(ids: Sequence[int], pair: Pair, new: int) -> list[int]:
    """ids with the second token of a pair left in place, where it may begin the next pair."""
    return [new if tuple(ids[i : i + 2]) == tuple(pair) else ids[i] for i in range(len(ids))]


def pairs_without_overlap(ids: Sequence[int]) -> list[Pair]:
    """The pairs of neighbours, where a token of a run such as aaa counts in one pair only."""
    found: list[Pair] = []
    last: dict[Pair, int] = {}
    for i, pair in enumerate(pairwise(ids)):
        if last.get(pair) != i - 1:
            last[pair] = i
            found.append(pair)
    return found


def count_once(ids: Sequence[int], n_merges: int) -> list[Pair]:
    """The most frequent pairs of the text before any merge."""
    counts = Counter(pairwise(ids))
    ranked = sorted(counts, key=lambda pair: (-counts[pair], pair))
    return [pair for pair in ranked if counts[pair] > 1][:n_merges]


def reference(
    ids: Sequence[int], n_merges: int, *, train: Callable[..., list[Pair]] = train_bpe
) -> list[Pair]:
    """ids (N,) -> at most n_merges pairs. `train` is the algorithm, or a wrong one."""
    return train(ids, n_merges)


def draw(random: CaseRandom, sizes: dict[str, int], number: int, is_large: bool) -> Case:
    N, letters, n_merges = sizes.values()
    ids = random.integers(0, letters, N) + ord("a")
    ids[-3:] = ids[:3]  # a pair occurs twice at least
    if number == 1:
        ids[3:6] = ids[3]  # a run, in which pairs overlap
    inputs = {"ids": ids.tolist(), "n_merges": n_merges}
    return Case(dict(sizes), inputs)


EXERCISE = Exercise(
    name="train_bpe",
    title="BPE, training",
    task="Find the merges of byte-pair encoding. n_merges times: count all pairs of neighbours, "
    "take the most frequent one (of equal ones the pair with the lowest first id, then second id), "
    "and replace each occurrence, from the left, by a new id: 256, 257 and so on. Stop when no "
    "pair occurs twice.",
    signature="train_bpe(ids, n_merges)",
    shapes="""ids       a list of N byte values, from 0 to 255
n_merges  the largest number of merges
returns   a list of pairs (left id, right id), in the order of the merges""",
    reference=reference,
    sizes=Sizes.of(
        "N letters n_merges",
        small="6 1 1, 6 2 2, 7 3 2, 7 4 2, 8 3 2, 8 4 2, 9 4 2, 10 4 3, 12 4 3, 10 2 3",
        distinct="40 3 6, 30 2 9, 60 4 8, 18 3 20, 50 3 10, 64 2 3",
        equal="24 2 4, 30 3 5, 40 3 8, 50 2 6, 36 4 9",
    ),
    draw=draw,
    hints=(
        "zip(ids, ids[1:]) are the pairs of neighbours. Count them again after each merge.",
        "min(counts, key=lambda pair: (-counts[pair], pair)) is the most frequent pair, and of "
        "equal ones the lowest.",
        "Replace from the left, and go on after the pair: in a a a the first two are merged.",
        "The new id of merge number i is 256 + i, and it takes part in later pairs.",
    ),
    derivation="Byte-pair encoding",
    solution="course/learn/exercises/train_bpe.py:train_bpe",
    outputs=("merges",),
    mistakes=tuple(
        Mistake(
            "other",
            "merges",
            sentence,
            {"train": partial(train_with, **wrong) if isinstance(wrong, dict) else wrong},
        )
        for sentence, wrong in (
            (
                "of equally frequent pairs the highest is taken: it is the lowest",
                {"rank": lambda pair, count: (-count, -pair[0], -pair[1])},
            ),
            (
                "of equally frequent pairs the one that occurs first is taken: it is the lowest",
                {"rank": lambda pair, count: -count},
            ),
            (
                "of equally frequent pairs the one with the lowest second id is taken: the first "
                "id decides",
                {"rank": lambda pair, count: (-count, pair[1], pair[0])},
            ),
            (
                "the rarest pair is merged: it is the most frequent",
                {"rank": lambda pair, count: (count, pair), "min_count": 1},
            ),
            (
                "the rarest pair is merged: it is the most frequent",
                {"rank": lambda pair, count: (count, pair)},
            ),
            (
                "the pairs are counted once, before the first merge: a merge makes new pairs, so "
                "count again after each",
                count_once,
            ),
            ("the new ids start at 0: they start at 256", {"first_id": 0}),
            ("the new ids start at 257: they start at 256", {"first_id": 257}),
            ("the new ids start at 255: they start at 256", {"first_id": 255}),
            ("the new ids start at 1: they start at 256", {"first_id": 1}),
            (
                "pairs that occur once are merged, too: stop when no pair occurs twice",
                {"min_count": 1},
            ),
            (
                "the merging stops when no pair occurs three times: it goes on while one occurs "
                "twice",
                {"min_count": 3},
            ),
            ("there is one merge too many", {"more": 1}),
            ("the last merge is missing", {"more": -1}),
            (
                "n_merges is taken as the size of the vocabulary: 256 is subtracted from it",
                {"more": -256},
            ),
            *(
                (
                    "the pair is never replaced in the text, so it is found again and again",
                    {"merge": lambda ids, pair, new: ids, "rank": rank},
                )
                for rank in (
                    lambda pair, count: (-count, pair),
                    lambda pair, count: -count,
                )
            ),
            (
                "only the first occurrence of a pair is replaced: replace all of them",
                {"merge": merge_first},
            ),
            (
                "after a merge the second token of the pair stays: go on after it",
                {"merge": merge_overlapping},
            ),
            (
                "every second pair is counted only: each token but the last begins a pair",
                {"pairs": lambda ids: zip(ids[::2], ids[1::2])},
            ),
            (
                "pairs that are no neighbours are counted, too",
                {"pairs": lambda ids: combinations(ids, 2)},
            ),
            (
                "in a run such as a a a the pair is counted once: all pairs of neighbours count",
                {"pairs": pairs_without_overlap},
            ),
            ("each pair is in the reverse order: it is (left, right)", {"is_reversed": True}),
        )
    ),
    keeps_dtype=False,
)
