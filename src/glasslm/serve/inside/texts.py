"""The texts that the page looks at: their tokens, kept under a name that follows from them."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from dataclasses import dataclass
from threading import Lock
from typing import Any

from glasslm.inference.trained_model import Model
from glasslm.serve.api_error import ApiError
from glasslm.serve.logprobs import TokenNames

MAX_TEXT_TOKENS = 1024  # of a text that is looked at, also of a model with a longer context
MAX_TEXTS = 512


@dataclass(frozen=True)
class InsideText:
    """A text as tokens: the newest ones, as many as the model reads at once."""

    id: str
    tokenizer_sha256: str
    ids: tuple[int, ...]
    cut: int  # tokens before them that are left out

    def require_tokenizer(self, sha256: str) -> None:
        """Raise ApiError where the tokens are those of another tokenizer than this one."""
        if sha256 != self.tokenizer_sha256:
            raise ApiError(
                400,
                "this text was cut by another tokenizer: post it to /inside/texts for this run",
                code="other_tokenizer",
            )

    def content(self, names: TokenNames, special: frozenset[int]) -> dict[str, Any]:
        """The JSON of the answer to POST /inside/texts."""
        pieces = [
            {"text": names.name(i), "bytes": len(names.bytes[i]), "special": i in special}
            for i in self.ids
        ]
        content = {"text": self.id, "ids": list(self.ids), "pieces": pieces, "cut": self.cut}
        # The names of tokens that are parts of a character do not join to it, but their bytes do.
        parts = [names.name(i).encode() if i in special else names.bytes[i] for i in self.ids]
        return content | {"whole": b"".join(parts).decode("utf-8", "replace")}


def text_limit(block_size: int) -> int:
    """The most tokens of a text that is looked at, for a model with this context."""
    return min(block_size, MAX_TEXT_TOKENS)


def make_text(model: Model, ids: list[int]) -> InsideText:
    """The text of `ids`. Raises ApiError where there are none, or no tokens of this vocabulary."""
    tokenizer = model.tokenizer
    if not ids:
        raise ApiError(400, "the text is empty: write something to look at", param="text")
    if not all(0 <= i < tokenizer.vocab_size for i in ids):
        raise ApiError(
            400,
            f"ids holds a token outside the vocabulary of {tokenizer.vocab_size:,}",
            param="ids",
        )
    newest = tuple(ids[-text_limit(model.config.model.block_size) :])
    identity = tokenizer.sha256
    digest = hashlib.sha256(f"{identity} {newest}".encode()).hexdigest()
    return InsideText(digest[:32], identity, newest, len(ids) - len(newest))


class TextStore:
    """The texts that were posted last, for all threads."""

    def __init__(self) -> None:
        self._texts: OrderedDict[str, InsideText] = OrderedDict()
        self._lock = Lock()

    def add(self, text: InsideText) -> None:
        """Keep a text, and forget the one that was not used for longest."""
        with self._lock:
            self._texts[text.id] = text
            self._texts.move_to_end(text.id)
            while len(self._texts) > MAX_TEXTS:
                self._texts.popitem(last=False)

    def find(self, text_id: str) -> InsideText:
        """The text of this name. Raises ApiError 404, upon which the page posts it again."""
        with self._lock:
            if text_id not in self._texts:
                raise ApiError(
                    404, "this text is not known: post it to /inside/texts", code="unknown_text"
                )
            self._texts.move_to_end(text_id)
            return self._texts[text_id]
