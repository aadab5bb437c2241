"""Texts as padded rows: each target is the next token of its text, and nothing else is one."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from glasslm.data.next_token_rows import next_token_rows
from glasslm.data.token_file import NO_TARGET

TEXTS = st.lists(st.lists(st.integers(1, 60_000), min_size=1, max_size=9), min_size=1, max_size=4)


@pytest.mark.parametrize("dtype", [np.uint16, np.uint32, np.int64])
@given(texts=TEXTS, T=st.integers(1, 8), keep=st.integers(1, 3))
def test_rows_are_those_of_a_loop_over_tokens(
    dtype: type, texts: list[list[int]], T: int, keep: int
) -> None:
    inputs = [[0] * T for _ in texts]
    targets = [[NO_TARGET] * T for _ in texts]
    for row, text in enumerate(texts):
        for i in range(1, min(len(text), T + 1)):
            inputs[row][i - 1] = text[i - 1]
            if text[i] % keep == 0:
                targets[row][i - 1] = text[i]
    arrays = [np.array(text, dtype) for text in texts]
    marks = [array % keep == 0 for array in arrays]
    rows = next_token_rows(arrays, T, None if keep == 1 else marks)
    assert [part.tolist() for part in rows] == [inputs, targets]
    assert all(part.dtype == np.int64 for part in rows)
