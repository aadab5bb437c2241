"""The suite "grammar": does the model prefer the right text of minimal pairs?"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from glasslm.data.dataset import Dataset
from glasslm.data.next_token_rows import next_token_rows
from glasslm.data.ngram_model import text_nats
from glasslm.errors import InputError
from glasslm.inference.generation import encode_prompt
from glasslm.inference.proportions import Proportion
from glasslm.inference.suites.minimal_pairs import CATEGORIES, MIN_PAIRS, make_pairs
from glasslm.inference.suites.suite_result import SuiteResult
from glasslm.inference.suites.vocabulary import MAX_TEXT_CHARACTERS, Vocabulary
from glasslm.inference.trained_model import Model

ROWS = 64  # texts in one call of Engine.losses

Right = dict[str, NDArray[np.bool_]]  # by category: whether each pair is judged right


def measure_grammar(model: Model, dataset: Dataset) -> SuiteResult:
    """The share of minimal pairs whose right text has the lower nats, by category.

    The words are those of the run's training text. Raises InputError where no category has enough.
    """
    text = model.tokenizer.decode(dataset.train.tokens[:MAX_TEXT_CHARACTERS])
    vocabulary = Vocabulary(text)
    pairs = {c.name: made for c in CATEGORIES if (made := make_pairs(vocabulary, c))}
    missing = [c for c in CATEGORIES if c.name not in pairs]
    if not pairs:
        raise InputError(
            f"no category of --suite grammar has {MIN_PAIRS} pairs: the training text lacks "
            f"{', '.join(dict.fromkeys(c.needs for c in missing))}.\nUse a run that was trained on "
            "prose or code, or --suite induction"
        )
    texts = [text for made in pairs.values() for pair in made for text in pair]
    sizes = {name: len(made) for name, made in pairs.items()}
    by_model = _judge(sum_nats(model, texts), sizes)
    by_order = [
        _judge(nats, sizes)
        for nats in text_nats(text.encode(), [text.encode() for text in texts], start=b"\n")
    ]
    totals = [sum(int(right.sum()) for right in judged.values()) for judged in by_order]
    order = int(np.argmax(totals))
    rows, facts = [], dict[str, Any]()
    for category in CATEGORIES:
        if category.name not in pairs:
            continue
        shares = [
            Proportion(int(right[category.name].sum()), sizes[category.name])
            for right in (by_model, by_order[order])
        ]
        rows.append((category.name, category.example, str(sizes[category.name]), *map(str, shares)))
        facts[category.name] = dict(zip(("model", "ngrams"), (share.facts for share in shares)))
    left_out = "; ".join(f"{c.name} (needs {c.needs})" for c in missing)
    return SuiteResult(
        "grammar",
        "Does the model know the rules of its language?",
        "Each pair has two texts that differ in one place, made from words of the training text. "
        "The model is right if the right text has fewer nats after a line end. Chance is 50%; "
        f"n-grams of order {order + 1}, the best of 8, read the same training text. 95% intervals "
        "are in parentheses.",
        ("rule", "right / wrong", "pairs", "model", "n-grams"),
        tuple(rows),
        model.step,
        f"Left out, because the training text has too few words for it: {left_out}."
        if left_out
        else "",
        facts | {"ngram_order": order + 1, "left_out": [c.name for c in missing]},
    )


def _judge(nats: NDArray[np.float64], sizes: dict[str, int]) -> Right:
    """Whether each pair is right, from the nats of right and wrong texts in turn; a tie is not."""
    is_right = nats[0::2] < nats[1::2]
    ends = np.cumsum(list(sizes.values()))
    return dict(zip(sizes, np.split(is_right, ends[:-1])))


def sum_nats(model: Model, texts: Sequence[str]) -> NDArray[np.float64]:
    """(N,) the summed nats of each text at the start of a document, or after a line end.

    Raises InputError for characters that the tokenizer does not know, and for a text that is longer
    than the context.
    """
    start = encode_prompt(model.tokenizer, "")
    rows = [np.array([*start, *model.tokenizer.encode(text)], np.int64) for text in texts]
    longest, block_size = max(map(len, rows)) - 1, model.config.model.block_size
    if longest > block_size:
        raise InputError(
            f"a text of the suite has {longest} tokens, but the context of this run is "
            f"{block_size}: give --context {longest} or more, or use another run"
        )
    tokens, targets = next_token_rows(rows, longest)
    parts = [slice(first, first + ROWS) for first in range(0, len(rows), ROWS)]
    sums = [
        np.sum(model.engine.losses(tokens[part], targets[part]), axis=1, dtype=np.float64)
        for part in parts
    ]
    return np.concatenate(sums)
