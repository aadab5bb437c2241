"""Exact answers: an answer is right if all its tokens are, wherever it stands in its row."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from glasslm.data.token_file import NO_TARGET
from glasslm.inference.exact_answers import exact_answers

TOKENS = st.lists(st.integers(NO_TARGET, 2), min_size=6, max_size=6)


def test_an_example_is_right_if_all_its_tokens_are() -> None:
    targets = np.array([[NO_TARGET, 5, 0, NO_TARGET] * 2, [NO_TARGET, 5, 6, 0] + [NO_TARGET] * 4])
    predictions = np.array([[7, 5, 0, 7, 7, 5, 1, 7], [7, 5, 6, 0, 7, 7, 7, 7]])
    assert exact_answers(predictions, targets).tolist() == [True, False, True]


@given(targets=st.lists(TOKENS, max_size=3), predictions=st.lists(TOKENS, min_size=3, max_size=3))
def test_answers_are_counted_as_by_a_reader(
    targets: list[list[int]], predictions: list[list[int]]
) -> None:
    expected = []
    for row, guesses in zip(targets, predictions):
        inside = False
        for target, guess in zip(row, guesses):
            if target == NO_TARGET:
                inside = False
            elif inside:
                expected[-1] &= target == guess
            else:
                inside = True
                expected.append(target == guess)
    shape = (len(targets), 6)
    arrays = [
        np.array(rows, np.int64).reshape(shape) for rows in (predictions[: shape[0]], targets)
    ]
    assert exact_answers(*arrays).tolist() == expected
