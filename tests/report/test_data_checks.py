"""The data checks of a report: natural text passes, and planted copies and leaks are found."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from glasslm.data.answer_targets import AnswerFormat
from glasslm.data.baselines import trained_baselines
from glasslm.data.dataset import Dataset, Split
from glasslm.data.tokenizers import ByteTokenizer, CharTokenizer, Tokenizer, train_bpe
from glasslm.report import data_checks
from glasslm.report.findings import Finding


def prose(words: int, seed: int) -> str:
    """Sentences of invented words, a few frequent and most rare, as in any language."""
    letters, draw = np.random.default_rng(0), np.random.default_rng(seed)
    known = [
        "".join(letters.choice(list("abcdefghijklmnoprstuvwy"), 2 + i % 7)) for i in range(2_000)
    ]
    shares = 1 / np.arange(1, len(known) + 1)
    chosen = [known[i] for i in draw.choice(len(known), words, p=shares / shares.sum())]
    return "".join(" ".join(chosen[i : i + 9]).capitalize() + ".\n" for i in range(0, words, 9))


def dataset_of(train: str, val: str, tokenizer: Tokenizer | None = None) -> Dataset:
    tokenizer = tokenizer or CharTokenizer(train + val)
    parts = [
        Split(tokenizer.encode(text).astype(np.uint16), len(text.encode())) for text in (train, val)
    ]
    return Dataset(tokenizer, parts[0], parts[1], None, {}, "")


def eval_line(bpb: float | None) -> dict[str, Any]:
    """A validation line."""
    return {"kind": "eval", "step": 7, "split": "val", "bpb": bpb, "whole": True}


def findings_by_signal(
    dataset: Dataset, generated: list[str], bpb: float | None = None
) -> dict[str, Finding]:
    best = None if bpb is None else eval_line(bpb)
    checks = data_checks.check_data(dataset, generated, best)
    return {finding.signal: finding for finding in checks.findings}


def test_natural_text_passes_every_check() -> None:
    """Samples as original as the validation text, no leak, a model better than the baselines."""
    found = findings_by_signal(
        dataset_of(prose(9_000, 1), prose(1_000, 2)),
        [prose(18, seed) for seed in range(3, 9)],
        bpb=0.5,
    )
    assert [finding.verdict for finding in found.values()] == ["ok", "ok", "ok"]
    assert "(0.0%)" in found[data_checks.LEAKAGE].evidence
    assert "the model 0.50" in found[data_checks.BASELINES].evidence


def test_the_loss_of_answers_is_not_compared_with_that_of_a_text() -> None:
    dataset = dataset_of("ab=ab\n" * 300, "ba=ba\n" * 30)
    answers = AnswerFormat(mark=1, line_end=0, line_length=6)
    dataset = replace(dataset, train=replace(dataset.train, answers=answers))
    found = data_checks.check_data(dataset, ["ab=ab\n"], eval_line(5.5))
    assert not found.findings
    assert not found.baselines
    assert "the loss is that of the answers alone" in found.missing.lower()


def test_a_recited_passage_is_shown_in_its_context() -> None:
    train, val = prose(9_000, 1), prose(1_000, 2)
    place = train.index(".", 20_000) + 2
    written = [prose(18, 3), "Zzz " + train[place : place + 100] + "Q", prose(18, 4)]
    found = data_checks.check_data(dataset_of(train, val), written, None)
    copying = found.findings[0]
    assert copying.verdict == "bad"
    assert "has 100 bytes" in copying.evidence
    assert "recites" in copying.meaning
    assert found.copied is not None
    assert found.copied.offset == place
    assert found.copied.passage == train[place : place + 100]
    assert found.copied.before == train[place - 60 : place]
    assert found.copied.after == train[place + 100 : place + 160]
    usual = re.search(r"as many pieces, it has (\d+) bytes", copying.evidence)
    assert usual is not None
    assert 10 <= int(usual[1]) < 50


def test_duplicates_between_the_splits_are_a_leak() -> None:
    train, val = prose(9_000, 1), prose(1_000, 2)
    copied = len(val) // 20
    found = findings_by_signal(
        dataset_of(train, val[:-copied] + train[777 : 777 + copied]), [prose(18, 3)]
    )
    assert found[data_checks.LEAKAGE].verdict == "watch"
    assert found[data_checks.COPYING].verdict == "ok"
    assert (
        f"{copied} bytes, from byte {len(val) - copied:,} of the validation text and byte 777 of"
        in found[data_checks.LEAKAGE].evidence
    )
    found = findings_by_signal(dataset_of(train, train[5_000:9_000] + val[4_000:]), [train[:120]])
    assert found[data_checks.LEAKAGE].verdict == "bad"
    assert (
        found[data_checks.COPYING].verdict == "watch"
    )  # without a natural text there is no comparison


def test_lines_in_another_order_are_a_leak() -> None:
    """No window of 50 bytes is in both parts, and every line is."""
    lines = [line[:30].replace(" ", "_") for line in prose(9_000, 1).splitlines() if line[30:]]
    train, val = "\n".join(lines), "\n".join(lines[::-7])
    finding = findings_by_signal(dataset_of(train, val), [])[data_checks.LEAKAGE]
    assert finding.verdict == "bad"
    assert finding.evidence.startswith("0 of ")
    assert f"have {30 * len(lines[::-7]):,} bytes (96.8%)" in finding.evidence


def test_a_model_worse_than_the_baselines_gets_the_verdict_bad() -> None:
    dataset = dataset_of(prose(9_000, 1), prose(1_000, 2))
    found = data_checks.check_data(dataset, [], eval_line(5.5))
    assert [finding.signal for finding in found.findings] == [
        data_checks.LEAKAGE,
        data_checks.BASELINES,
    ]
    assert found.copied is None
    rows = {name: float(bpb) for name, bpb, _ in found.baselines}
    assert rows.pop("the model") == 5.5
    best = min(rows.values())
    assert findings_by_signal(dataset, [], bpb=best + 0.01)[data_checks.BASELINES].verdict == "bad"
    assert findings_by_signal(dataset, [], bpb=best - 0.01)[data_checks.BASELINES].verdict == "ok"
    assert findings_by_signal(dataset, [])[data_checks.BASELINES].verdict == "watch"
    assert (
        data_checks.check_data(dataset, [], eval_line(None)).findings[1].verdict == "watch"
    )  # its loss was not finite


def test_a_comparison_of_texts_with_and_without_special_tokens_is_named() -> None:
    """The model predicts the ends of documents, and the baselines read no such end."""
    train, val = prose(9_000, 1), prose(1_000, 2)
    plain = data_checks.check_data(dataset_of(train, val), [], eval_line(0.5))
    tokenizer = CharTokenizer(train + val, ["<e>"])
    dataset = dataset_of(train.replace(".\n", ".<e>"), val.replace(".\n", ".<e>"), tokenizer)
    marked = data_checks.check_data(dataset, [], eval_line(0.5))
    finding = {f.signal: f for f in marked.findings}[data_checks.BASELINES]
    assert "without special tokens; the model predicts them" in finding.evidence
    assert "special tokens included" in marked.baselines[0][2]
    said = [str(part) for part in (plain.findings, plain.baselines, plain.extent)]
    assert not any("special tokens" in part for part in said)


@pytest.mark.parametrize("kind", ["char", "byte", "bpe"])
def test_the_bytes_of_tokens(kind: str) -> None:
    text = prose(300, 1) + "\u00fcber \u65e5\u672c\u8a9e " + prose(300, 2)
    kinds: dict[str, Tokenizer] = {
        "char": CharTokenizer(text), "byte": ByteTokenizer(), "bpe": train_bpe([text], 300),
    }  # fmt: skip
    ids = kinds[kind].encode(text)
    assert data_checks.decode_bytes(ids, kinds[kind], 1 << 20) == text.encode()
    assert data_checks.decode_bytes(ids, kinds[kind], 1_000) == text.encode()[:1_000]
    assert data_checks.decode_bytes(ids[:0], kinds[kind], 1_000) == b""
    assert data_checks.decode_last_bytes(ids, kinds[kind], 1_000) == text.encode()[-1_000:]
    assert data_checks.decode_last_bytes(ids[:0], kinds[kind], 1_000) == b""


def test_the_bytes_of_many_tokens() -> None:
    ids = np.random.default_rng(0).integers(0, 256, 2_300_000, dtype=np.uint16)
    for max_bytes in (10, 1 << 20, 1_500_000, 2_300_000, 9_000_000):
        assert (
            data_checks.decode_bytes(ids, ByteTokenizer(), max_bytes)
            == ids[:max_bytes].astype(np.uint8).tobytes()
        )
        assert (
            data_checks.decode_last_bytes(ids, ByteTokenizer(), max_bytes)
            == ids[-max_bytes:].astype(np.uint8).tobytes()
        )


def test_a_large_text_is_searched_in_part_and_the_extent_is_reported(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Copies are searched from the start; the baselines read the end, as the table says."""
    for name, size in (
        ("MAX_SEARCHED_BYTES", 20_000),
        ("MAX_BASELINE_BYTES", 10_000),
        ("MAX_VALIDATION_BYTES", 3_000),
    ):
        monkeypatch.setattr(data_checks, name, size)
    train, val = prose(9_000, 1), prose(1_000, 2)
    train = (
        train[:-5_000] + val[:3_000] + train[-2_000:]
    )  # gzip and xz look back on the text that they compress
    found = data_checks.check_data(
        dataset_of(train, val), [train[30_000:30_200], train[15_000:15_100]], None
    )
    assert "has 100 bytes" in found.findings[0].evidence
    baselines = trained_baselines(train[-10_000:].encode(), val[:3_000].encode())
    rows = {name: bpb for name, bpb, _ in found.baselines}
    assert rows["single bytes"] == f"{baselines.ngrams[0]:.3f}"
    assert float(rows["xz after training text"]) < 0.5 < float(rows["xz"])
    assert float(rows["gzip after training text"]) < 0.5 < float(rows["gzip"])
    for words in (
        "first 20 kB of the training text",
        "in the last 10 kB of the training",
        "first 3 kB of the validation text were used",
    ):
        assert words in found.extent
