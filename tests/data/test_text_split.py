"""The split of a text into parts, at any boundary and in any pieces."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from glasslm.config.schema import DataConfig
from glasslm.data.sources.text_files import Source, source_file
from glasslm.data.text_split import split_text


@given(
    text=st.text(min_size=1),
    val=st.sampled_from([0.1, 0.25, 0.5, 0.9]),
    test=st.sampled_from([0.0, 0.05, 0.09]),
    piece=st.integers(1, 5),
)
def test_parts_are_the_text_cut_at_the_characters_of_the_boundaries(
    tmp_path_factory: pytest.TempPathFactory, text: str, val: float, test: float, piece: int
) -> None:
    path = tmp_path_factory.mktemp("parts") / "text.txt"
    path.write_text(text, encoding="utf-8", newline="")
    source = Source("text", (source_file(path),))
    body = text.removeprefix("\ufeff").encode()  # a mark at the beginning of a file is not text
    data = DataConfig(val_fraction=val, test_fraction=test)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("glasslm.data.sources.text_files.CHUNK_BYTES", piece + 2)
        pieces = list(split_text(source, data, len(body)))
    parts = {
        name: "".join(t for n, t in pieces if n == name).encode()
        for name in ("train", "val", "test")
    }
    assert parts["train"] + parts["val"] + parts["test"] == body
    nominal = round(len(body) * (100 - 100 * val - 100 * test)) // 100
    assert nominal - 4 < len(parts["train"]) <= nominal
    if not test:
        assert not parts["test"]
