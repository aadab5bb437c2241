"""What a report says its numbers are worth: natural text is above suspicion, whatever was planted is found."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest

from glasslm.data.baselines import after_reading
from glasslm.data.shards import Dataset, Split
from glasslm.data.tokenizers import ByteTokenizer, CharTokenizer, Tokenizer, train_bpe
from glasslm.report import data_checks
from glasslm.report.findings import Finding


def prose(words: int, seed: int) -> str:
    """Sentences of invented words, a few of them frequent and most of them rare, as in any language."""
    letters, draw = np.random.default_rng(0), np.random.default_rng(seed)
    known = [
        "".join(letters.choice(list("abcdefghijklmnoprstuvwy"), 2 + i % 7)) for i in range(2_000)
    ]
    shares = 1 / np.arange(1, len(known) + 1)
    chosen = [known[i] for i in draw.choice(len(known), words, p=shares / shares.sum())]
    return "".join(" ".join(chosen[i : i + 9]).capitalize() + ".\n" for i in range(0, words, 9))


def dataset_of(train: str, val: str, tokenizer: Tokenizer | None = None) -> Dataset:
    coder = tokenizer or CharTokenizer(train + val)
    parts = [
        Split(coder.encode(text).astype(np.uint16), len(text.encode())) for text in (train, val)
    ]
    return Dataset(coder, parts[0], parts[1], None, {}, "")


def measured(bpb: float | None) -> dict[str, Any]:
    """A validation line."""
    return {"kind": "eval", "step": 7, "split": "val", "bpb": bpb, "whole": True}


def judged(dataset: Dataset, written: list[str], bpb: float | None = None) -> dict[str, Finding]:
    found = data_checks.examine(dataset, written, None if bpb is None else measured(bpb)).judged
    return {one.signal.split()[-1]: one for one in found}


def test_natural_text_is_above_suspicion() -> None:
    """Samples as original as the validation text, no leak, and a model that is better than its rivals."""
    found = judged(
        dataset_of(prose(9_000, 1), prose(1_000, 2)),
        [prose(18, seed) for seed in range(3, 9)],
        bpb=0.5,
    )
    assert [one.verdict for one in found.values()] == ["ok", "ok", "ok"]
    assert "(0.0%)" in found["it?"].seen
    assert "0.50 bits a byte" in found["counting?"].seen


def test_a_recited_passage_is_shown_in_its_place() -> None:
    train, val = prose(9_000, 1), prose(1_000, 2)
    place = train.index(".", 20_000) + 2
    written = [prose(18, 3), "Zzz " + train[place : place + 100] + "Q", prose(18, 4)]
    found = data_checks.examine(dataset_of(train, val), written, None)
    copying = found.judged[0]
    assert copying.verdict == "bad"
    assert "has 100 bytes" in copying.seen
    assert "it recites" in copying.means
    assert found.copied is not None
    assert found.copied.place == place
    assert found.copied.passage == train[place : place + 100]
    assert found.copied.before == train[place - 60 : place]
    assert found.copied.after == train[place + 100 : place + 160]
    usual = re.search(r"as many pieces, (\d+) bytes", copying.seen)
    assert usual is not None
    assert 10 <= int(usual[1]) < 50


def test_duplicates_between_the_parts_are_a_leak() -> None:
    train, val = prose(9_000, 1), prose(1_000, 2)
    copied = len(val) // 20
    found = judged(dataset_of(train, val[:-copied] + train[777 : 777 + copied]), [prose(18, 3)])
    assert found["it?"].verdict == "watch"
    assert found["copy?"].verdict == "ok"
    assert (
        f"{copied} bytes, from byte {len(val) - copied:,} of the validation text and byte 777 of"
        in found["it?"].seen
    )
    found = judged(dataset_of(train, train[5_000:9_000] + val[4_000:]), [train[:120]])
    assert found["it?"].verdict == "bad"
    assert found["copy?"].verdict == "watch"  # where the yardstick is copied, it measures nothing


def test_a_model_worse_than_counting_is_told_so() -> None:
    dataset = dataset_of(prose(9_000, 1), prose(1_000, 2))
    found = data_checks.examine(dataset, [], measured(5.5))
    assert [one.signal for one in found.judged] == [
        "Is its validation text new to it?",
        "Is it better than counting?",
    ]
    assert found.copied is None
    rows = {name: float(bpb) for name, bpb, _ in found.baselines}
    assert rows.pop("the model") == 5.5
    best = min(rows.values())
    assert judged(dataset, [], bpb=best + 0.01)["counting?"].verdict == "bad"
    assert judged(dataset, [], bpb=best - 0.01)["counting?"].verdict == "ok"
    assert judged(dataset, [])["counting?"].verdict == "watch"
    assert (
        data_checks.examine(dataset, [], measured(None)).judged[1].verdict == "watch"
    )  # its loss was not finite


@pytest.mark.parametrize("kind", ["char", "byte", "bpe"])
def test_the_bytes_of_tokens(kind: str) -> None:
    text = prose(300, 1) + "\u00fcber \u65e5\u672c\u8a9e " + prose(300, 2)
    kinds: dict[str, Tokenizer] = {
        "char": CharTokenizer(text), "byte": ByteTokenizer(), "bpe": train_bpe([text], 300),
    }  # fmt: skip
    ids = kinds[kind].encode(text)
    assert data_checks.text_of(ids, kinds[kind], 1 << 20) == text.encode()
    assert data_checks.text_of(ids, kinds[kind], 1_000) == text.encode()[:1_000]
    assert data_checks.text_of(ids[:0], kinds[kind], 1_000) == b""
    assert data_checks.end_of(ids, kinds[kind], 1_000) == text.encode()[-1_000:]
    assert data_checks.end_of(ids[:0], kinds[kind], 1_000) == b""


def test_the_bytes_of_many_tokens() -> None:
    ids = np.random.default_rng(0).integers(0, 256, 2_300_000, dtype=np.uint16)
    for most in (10, 1 << 20, 1_500_000, 2_300_000, 9_000_000):
        assert (
            data_checks.text_of(ids, ByteTokenizer(), most) == ids[:most].astype(np.uint8).tobytes()
        )
        assert (
            data_checks.end_of(ids, ByteTokenizer(), most) == ids[-most:].astype(np.uint8).tobytes()
        )


def test_a_large_text_is_searched_in_part_and_that_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    """Copies from its beginning on; counting and packing have read its end, as the table says."""
    for name, size in (("SEARCHED", 20_000), ("COUNTED", 10_000), ("UNSEEN", 3_000)):
        monkeypatch.setattr(data_checks, name, size)
    train, val = prose(9_000, 1), prose(1_000, 2)
    train = (
        train[:-5_000] + val[:3_000] + train[-2_000:]
    )  # gzip and xz look back on the very text that they pack
    found = data_checks.examine(
        dataset_of(train, val), [train[30_000:30_200], train[15_000:15_100]], None
    )
    assert "has 100 bytes" in found.judged[0].seen
    reached = after_reading(train[-10_000:].encode(), val[:3_000].encode())
    rows = {name: bpb for name, bpb, _ in found.baselines}
    assert rows["single bytes"] == f"{reached.ngrams[0]:.3f}"
    assert float(rows["xz, after reading"]) < 0.5 < float(rows["xz"])
    assert float(rows["gzip, after reading"]) < 0.5 < float(rows["gzip"])
    for words in (
        "first 20 kB of the training text",
        "in the last 10 kB of the training",
        "first 3 kB were taken",
    ):
        assert words in found.extent
