"""Decode generated ids one at a time into whole characters."""

from __future__ import annotations

import codecs
from collections.abc import Sequence

from glasslm.data.tokenizers import Tokenizer

CONTEXT_TOKENS = 8  # of the prompt, on which the space before the first generated word depends


class StreamDecoder:
    """Decode ids one at a time; the pieces join to the continuation of the text of `context`.

    >>> from glasslm.data.tokenizers import ByteTokenizer
    >>> stream = StreamDecoder(ByteTokenizer())
    >>> [stream.push(byte) for byte in "é".encode()], stream.flush()
    (['', 'é'], '')
    """

    def __init__(self, tokenizer: Tokenizer, context: Sequence[int] = ()) -> None:
        """`context`: the ids before the first one."""
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        # With joined words: the ids that were shown last, on which the next text depends, and
        # those that are not shown yet.
        self._shown, self._waiting = self._last_tokens(context), list[int]()

    def push(self, token_id: int) -> str:
        """The characters that this token completes."""
        if not self._tokenizer.joins_words:
            return self._decoder.decode(self._tokenizer.token_bytes[token_id])
        self._waiting.append(token_id)
        text = self._waiting_text()
        return "" if text.endswith("\ufffd") else self._show(text)

    def count_replaced(self, token_id: int) -> int:
        """The U+FFFD that `push` of this token returns before the token's own first character.

        They stand for bytes before it that no longer become a character.
        """
        first = self._tokenizer.token_bytes[token_id][:1]
        if not first or (self._tokenizer.joins_words and _is_inside_character(first)):
            return 0
        if self._tokenizer.joins_words:
            return len(self._waiting_text()) if self._waiting else 0
        state = self._decoder.getstate()
        text = self._decoder.decode(first)
        is_whole = not self._decoder.getstate()[0]  # the last character of `text` has this byte
        self._decoder.setstate(state)
        return max(0, len(text) - is_whole)

    def flush(self) -> str:
        """U+FFFD if the last character was never completed."""
        if not self._tokenizer.joins_words:
            return self._decoder.decode(b"", final=True)
        return self._show(self._waiting_text())

    def _last_tokens(self, context: Sequence[int]) -> list[int]:
        """The last ids of `context`, from the first byte of a character on.

        A decoder replaces all bytes of a row that begins inside a character, also the whole
        characters after it.
        """
        start = max(0, len(context) - CONTEXT_TOKENS)
        token_bytes = self._tokenizer.token_bytes
        while start and _is_inside_character(token_bytes[context[start]]):
            start -= 1
        return list(context[start:])

    def _waiting_text(self) -> str:
        """The text that the waiting ids add to that of the shown ones."""
        shown = self._tokenizer.decode(self._shown)
        return self._tokenizer.decode(self._shown + self._waiting)[len(shown) :]

    def _show(self, text: str) -> str:
        if text:
            self._shown = self._waiting
        else:  # a special token: the next text still depends on the ids before it
            self._shown = self._shown + self._waiting
        self._waiting = []
        return text


def _is_inside_character(token: bytes) -> bool:
    """Whether a token is one byte of UTF-8 that is not the first one of its character."""
    return len(token) == 1 and 0x80 <= token[0] < 0xC0
