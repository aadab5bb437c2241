"""Byte-pair encoding: a text in the tokens of given merges."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise

from glasslm.course.learn.exercise import (
    Case,
    CaseRandom,
    Exercise,
    Mistake,
    Sizes,
    VerdictName,
)
from glasslm.course.learn.exercises.train_bpe import (
    FIRST_ID,
    Pair,
    merge_first,
    merge_overlapping,
    merge_pair,
    train_bpe,
)

Encode = Callable[[Sequence[int], Sequence[Pair]], list[int]]


def encode_bpe(ids: Sequence[int], merges: Sequence[Pair]) -> list[int]:
    """The tokens of ids: the merges one after the other, in the order of their training."""
    tokens = list(ids)
    for new, pair in enumerate(merges, FIRST_ID):
        tokens = merge_pair(tokens, pair, new)
    return tokens


def encode_with(
    ids: Sequence[int],
    merges: Sequence[Pair],
    *,
    merge: Callable[[Sequence[int], Pair, int], list[int]] = merge_pair,
    first_id: int = FIRST_ID,
    order: int = 1,
    used: slice = slice(None),
) -> list[int]:
    """`encode_bpe` with a usual mistake."""
    tokens = list(ids)
    for new, pair in list(enumerate(merges, first_id))[used][::order]:
        if (pair[0], pair[1]) in pairwise(tokens):
            tokens = merge(tokens, pair, new)
    return tokens


def merge_from_right(ids: Sequence[int], pair: Pair, new: int) -> list[int]:
    """ids with every occurrence of the pair replaced, from the right."""
    return merge_pair(ids[::-1], pair[::-1], new)[::-1]


def merge_one_by_one(
    ids: Sequence[int], merges: Sequence[Pair], choose: Callable[[list[tuple[int, int]]], int]
) -> list[int]:
    """One replacement at a time: choose([(rank, place), ...]) -> the place of the next one."""
    tokens = list(ids)
    ranks = {tuple(pair): rank for rank, pair in enumerate(merges)}
    while True:
        places = [(ranks[pair], i) for i, pair in enumerate(pairwise(tokens)) if pair in ranks]
        if not places:
            return tokens
        i = choose(places)
        tokens[i : i + 2] = [FIRST_ID + ranks[tokens[i], tokens[i + 1]]]


def keep_second(ids: Sequence[int], pair: Pair, new: int) -> list[int]:
    """ids with the new id before the second token of each pair."""
    merged: list[int] = []
    for token in merge_pair(ids, pair, new):
        merged += [new, pair[1]] if token == new else [token]
    return merged


def lose_last(ids: Sequence[int], merges: Sequence[Pair]) -> list[int]:
    """`encode_bpe` with a loop that ends before the last token, unless a pair ends there."""
    tokens = list(ids)
    for new, pair in enumerate(merges, FIRST_ID):
        tokens = merge_pair(tokens, pair, new)
        tokens = tokens if tokens[-1:] == [new] else tokens[:-1]
    return tokens


def take_longest(ids: Sequence[int], merges: Sequence[Pair]) -> list[int]:
    """The longest token of the vocabulary at each place, from the left."""
    texts: dict[int, tuple[int, ...]] = {i: (i,) for i in range(FIRST_ID)}
    for new, (left, right) in enumerate(merges, FIRST_ID):
        texts[new] = texts[left] + texts[right]
    tokens: list[int] = []
    i = 0
    while i < len(ids):
        at_this_place = [t for t, text in texts.items() if tuple(ids[i : i + len(text)]) == text]
        tokens.append(max(at_this_place, key=lambda t: len(texts[t])))
        i += len(texts[tokens[-1]])
    return tokens


def merge_in_one_pass(ids: Sequence[int], merges: Sequence[Pair]) -> list[int]:
    """The pairs of the text itself alone, from the left."""
    new = {tuple(pair): token for token, pair in enumerate(merges, FIRST_ID)}
    tokens, i = [], 0
    while i < len(ids):
        pair = tuple(ids[i : i + 2])
        tokens.append(new.get(pair, ids[i]))
        i += 2 if pair in new else 1
    return tokens


def reference(
    ids: Sequence[int],
    merges: Sequence[Pair],
    *,
    encode: Encode = encode_bpe,
) -> list[int]:
    """ids (N,), merges -> tokens. `encode` is the algorithm, or a wrong one."""
    return encode(ids, merges)


def draw(random: CaseRandom, sizes: dict[str, int], number: int, is_large: bool) -> Case:
    N, letters, n_merges = sizes.values()
    for _ in range(20):  # most texts have other tokens by the longest match
        ids = random.integers(0, letters, N) + ord("a")
        if number == 1:
            ids[3:8] = ids[3]  # a run, in which it matters on which side one begins
        text = ids.tolist()
        merges = train_bpe(text, n_merges)  # of the text itself: each of them occurs in it
        if N < 10 or encode_bpe(text, merges) != take_longest(text, merges):
            break
    return Case(dict(sizes), {"ids": text, "merges": merges})


WRONG_ENCODINGS: tuple[tuple[VerdictName, str, Encode], ...] = (
    (
        "other",
        "the leftmost pair that can be merged is merged first: the earliest merge of the "
        "list is applied first, in the whole text",
        partial(merge_one_by_one, choose=lambda places: min(i for _, i in places)),
    ),
    (
        "other",
        "the latest merge of the list is applied first: the earliest is",
        partial(merge_one_by_one, choose=lambda p: min((-rank, i) for rank, i in p)[1]),
    ),
    (
        "other",
        "equal pairs are merged from the right: from the left",
        partial(encode_with, merge=merge_from_right),
    ),
    (
        "other",
        "the longest token is taken at each place: the merges are applied in order, which "
        "may give other tokens",
        take_longest,
    ),
    (
        "other",
        "the merges are applied in the reverse order",
        partial(encode_with, order=-1),
    ),
    (
        "other",
        "only the first occurrence of a pair is replaced: replace all of them",
        partial(encode_with, merge=merge_first),
    ),
    (
        "other",
        "after a merge the second token of the pair stays: go on after it",
        partial(encode_with, merge=merge_overlapping),
    ),
    (
        "other",
        "the second token of a merged pair stays: the new id stands for both",
        partial(encode_with, merge=keep_second),
    ),
    (
        "other",
        "the new ids start at 257: merge number 0 makes the id 256",
        partial(encode_with, first_id=257),
    ),
    (
        "other",
        "the new ids start at 255: merge number 0 makes the id 256",
        partial(encode_with, first_id=255),
    ),
    (
        "other",
        "the new ids start at 0: merge number 0 makes the id 256",
        partial(encode_with, first_id=0),
    ),
    (
        "other",
        "the last merge is left out",
        partial(encode_with, used=slice(None, -1)),
    ),
    (
        "other",
        "the first merge is left out",
        partial(encode_with, used=slice(1, None)),
    ),
    (
        "other",
        "the text is read once, so that a merged token is never merged again: apply each "
        "merge to the result of the one before",
        merge_in_one_pass,
    ),
    (
        "not_implemented",
        "nothing is merged: these are the ids of the text",
        lambda ids, merges: list(ids),
    ),
    (
        "other",
        "the last token of the text is lost in each merge: the loop must reach the end of the list",
        lose_last,
    ),
    (
        "other",
        "the pairs are read as (right, left): they are (left, right)",
        lambda ids, merges: encode_with(ids, [pair[::-1] for pair in merges]),
    ),
)

EXERCISE = Exercise(
    name="encode_bpe",
    title="BPE, encoding",
    task="Encode a text by byte-pair encoding: apply the merges in the order in which they were "
    "found. Merge number i replaces each occurrence of its pair, from the left, by the id 256 + i.",
    signature="encode_bpe(ids, merges)",
    shapes="""ids     a list of N byte values, from 0 to 255
merges  a list of pairs (left id, right id), in the order of the training
returns a list of token ids""",
    reference=reference,
    sizes=Sizes.of(
        "N letters n_merges",
        small="4 2 1, 6 2 2, 6 1 2, 7 2 2, 8 2 3, 10 2 4, 12 2 4, 14 2 5, 16 2 6, 20 3 6, 8 2 3",
        distinct="40 2 8, 30 2 6, 60 3 14, 50 2 12, 45 3 20",
        equal="24 2 4, 30 3 5, 40 3 8, 50 2 6, 36 4 9",
    ),
    draw=draw,
    hints=(
        "The order of the merges decides, not the order of the text and not the length of a token.",
        "The first merge is applied to the whole text, then the second to the result, and so on.",
        "enumerate(merges, 256) gives each pair with its new id.",
        "A loop with an index: if ids[i] and ids[i + 1] are the pair, append the new id and go on "
        "at i + 2, else append ids[i] and go on at i + 1.",
    ),
    derivation="Byte-pair encoding",
    solution="course/learn/exercises/encode_bpe.py:encode_bpe",
    needs=("train_bpe",),
    outputs=("tokens",),
    mistakes=tuple(
        Mistake(verdict, "tokens", sentence, {"encode": encode})
        for verdict, sentence, encode in WRONG_ENCODINGS
    ),
    keeps_dtype=False,
)
