"""Notes on a text while its dataset is prepared."""

from __future__ import annotations

import itertools
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

from glasslm.config.schema import DataConfig
from glasslm.data.sources.text_files import Source, count_bad_bytes
from glasslm.data.sources.texts import SEPARATOR
from glasslm.data.special_tokens import explain_spellings
from glasslm.data.text_split import TextSurvey
from glasslm.text import Notify, show_elapsed

NOTIFY_MIN_BYTES = 20_000_000  # of a text whose preparation takes noticeable time
BPE_BYTES_PER_S = 1e6  # of training, on two cores


def notify_reading(source: Source, notify: Notify) -> None:
    """Tell that a long text is read, before it is."""
    total = sum(file.bytes for file in source.files)
    if total >= NOTIFY_MIN_BYTES:
        notify(f"reading {total / 1e6:,.0f} MB of text")


def show_bpe_training(n_bytes: int, notify: Notify) -> AbstractContextManager[None]:
    """A context that shows the elapsed time while BPE is trained on a long text."""
    if n_bytes < NOTIFY_MIN_BYTES / 10:
        return nullcontext()
    return show_elapsed(
        f"training BPE on up to {n_bytes / 1e6:,.0f} MB of text", notify, n_bytes / BPE_BYTES_PER_S
    )


def notify_survey(
    survey: TextSurvey, source: Source, data: DataConfig, folder: Path, notify: Notify
) -> None:
    """Send notes on unusual characters, and on a text whose tokenization takes time."""
    if survey.nuls:
        notify(f"note: the text holds {survey.nuls} NUL characters; they are kept")
    if survey.replaced and data.encoding_errors != "strict":
        if source.json_field is not None:  # a field may have half of a surrogate pair, too
            notify(f"note: the text holds {survey.replaced} U+FFFD, its own or for bad characters")
        elif n_bad := sum(map(count_bad_bytes, source.files)):
            notify(f"note: the text holds {n_bad} U+FFFD in place of what was not UTF-8")
    if survey.bytes >= NOTIFY_MIN_BYTES:
        notify(
            f"tokenizing {survey.bytes / 1e6:,.0f} MB of text, once; "
            f"the tokens are kept in {folder}"
        )


def notify_validation_files(source: Source, facts: dict[str, Any], notify: Notify) -> None:
    """Send a note with the files of the validation part, if the text has several files.

    There is none where the text has not the bytes of its files: JSON and separators of documents
    are no text, bytes that are not UTF-8 are replaced, and it is not known in which files.
    """
    gap = 0 if source.documents else len(SEPARATOR)  # special tokens are no bytes of the text
    ends = list(itertools.accumulate(file.bytes + gap for file in source.files))
    begin = facts["train_bytes"]
    end = begin + facts["val_bytes"]
    if len(ends) < 2 or end + facts.get("test_bytes", 0) != ends[-1] - gap:
        return
    paths = [
        file.path
        for file, file_end in zip(source.files, ends, strict=True)
        if begin < file_end and file_end - file.bytes - gap < end
    ]
    if paths:
        last = f" to {paths[-1]}" if len(paths) > 1 else ""
        notify(
            f"validation part: {facts['val_bytes']:,} bytes of {len(paths):,} of "
            f"{len(source.files):,} files, {paths[0]}{last}"
        )


def notify_small_vocabulary(vocab_size: int, requested: int, notify: Notify) -> None:
    """Send a note where BPE has found fewer tokens than --vocab-size."""
    if vocab_size < requested:
        notify(
            f"note: the vocabulary has {vocab_size:,} tokens instead of the {requested:,} of "
            "--vocab-size: no further pair occurs twice in the training text"
        )


def notify_special_tokens(facts: dict[str, Any], data: DataConfig, notify: Notify) -> None:
    """Name the special tokens that the text has, and those that it only spells."""
    if counts := facts.get("special_tokens"):
        end = data.used_special_tokens[0] if data.used_special_tokens else ""
        listed = [
            f"{token} {count:,}{' (ends of documents)' if token == end else ''}"
            for token, count in counts.items()
        ]
        notify(f"special tokens in the text, one token each: {', '.join(listed)}")
    if counts := facts.get("spelled_special_tokens"):
        notify(explain_spellings(counts, "the text"))
