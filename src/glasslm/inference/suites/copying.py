"""The suite "copying": how long a sequence does the model repeat?"""

from __future__ import annotations

from typing import Any

from glasslm.data.dataset import Dataset
from glasslm.errors import InputError
from glasslm.inference.exact_answers import exact_answers, likeliest_tokens
from glasslm.inference.proportions import Proportion, TokenProportion
from glasslm.inference.suites.random_texts import known_tokens, repeated_tokens
from glasslm.inference.suites.suite_result import SuiteResult
from glasslm.inference.trained_model import Model

LENGTHS = (4, 8, 16, 32, 64, 128)
ROWS = 50
SEED = 43


def measure_copying(model: Model, dataset: Dataset) -> SuiteResult:
    """The share of tokens, and of whole sequences, that are repeated right, by length.

    Raises InputError for a context or a vocabulary that is too small.
    """
    block_size = model.config.model.block_size
    lengths = [length for length in LENGTHS if 2 * length <= block_size]
    if not lengths:
        raise InputError(
            f"--suite copying needs a context of {2 * LENGTHS[0]} tokens or more, and this run has "
            f"{block_size}: give --context, or use another run"
        )
    known = known_tokens(dataset)
    rows, facts = [], dict[str, Any]()
    for length in lengths:
        tokens = repeated_tokens(known, length, ROWS, SEED)
        predictions = likeliest_tokens(model.engine, tokens[:, :-1])[:, length:]
        copies = tokens[:, length + 1 :]
        each = TokenProportion(tuple((predictions == copies).sum(1).tolist()), copies.shape[1])
        whole = Proportion(int(exact_answers(predictions, copies).sum()), ROWS)
        rows.append((str(length), str(each), str(whole)))
        facts[str(length)] = {"tokens": each.facts, "sequences": whole.facts}
    chance = 1 / len(known)
    return SuiteResult(
        "copying",
        "How long a sequence does the model copy?",
        f"{ROWS} sequences of random tokens of each length, written twice. A token of the second "
        "copy, from its second token on, is right if it is the likeliest; a sequence, if all its "
        f"tokens are. Chance is {chance:.1%} for a token. 95% intervals are in parentheses, both "
        "over sequences: tokens of one sequence are not independent.",
        ("length", "tokens right", "sequences right"),
        tuple(rows),
        model.step,
        facts=facts | {"chance": chance},
    )
