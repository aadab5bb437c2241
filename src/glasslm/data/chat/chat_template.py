"""Chat templates: messages to text and tokens, in Jinja's sandbox.

A template is foreign code. The sandbox gives it no attribute of Python's objects and changes none
of its arguments; the length of its output and the time for it are bounded. The time is checked
between the lines of Python that Jinja runs, so a single operation, such as a product of huge
numbers, is not interrupted. What people write in a message never becomes a special token. Letters:
N tokens.
"""

from __future__ import annotations

import itertools
import json
import re
import sys
import time
from collections.abc import Callable
from functools import cached_property
from typing import Any, NamedTuple, NoReturn

import numpy as np
from numpy.typing import NDArray

from glasslm.data.chat.conversations import Conversation
from glasslm.data.special_tokens import TokenPattern
from glasslm.data.tokenizers import SubwordTokenizer, TokenIds, Tokenizer
from glasslm.errors import InputError, raise_if_exhausted
from glasslm.text import to_one_line

MAX_OUTPUT_CHARS = 1 << 20
MAX_RENDER_S = 5.0
# Code points that Unicode keeps for uses inside a program. One that no message has breaks up the
# spellings of special tokens while the template is rendered.
BREAKS = [chr(code) for code in range(0xFDD0, 0xFDF0)]
PROBE: Conversation = [
    {"role": "user", "content": "Hello"},
    {"role": "assistant", "content": "Hi"},
    {"role": "user", "content": "Hello"},
    {"role": "assistant", "content": "Hi"},
]


class TemplateRefusal(Exception):
    """A template called raise_exception: it cannot write these messages."""


class EncodedConversation(NamedTuple):
    """A conversation as tokens (N,), and which of them are an answer: its text and its end."""

    ids: TokenIds
    is_answer: NDArray[np.bool_]


class ChatTemplate:
    """The chat template of a model, and what ends its turn.

    `settings`: run.json, tokenizer.transformers (interop/hf_special_tokens.py). `has_clock`:
    whether the template may write the date, as some do where a person asks; a text to learn from
    must not depend on the day.
    """

    def __init__(
        self, settings: dict[str, Any], tokenizer: Tokenizer, *, has_clock: bool = True
    ) -> None:
        self._settings, self._tokenizer, self._has_clock = settings, tokenizer, has_clock

    @property
    def source(self) -> str:
        """The template; empty where the model has none."""
        return str(self._settings.get("chat_template") or "")

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """Reads the special tokens that a template writes, also where a prompt's are plain text."""
        unused = self._tokenizer.unused_special_tokens
        return self._tokenizer.with_special_tokens(unused) if unused else self._tokenizer

    @cached_property
    def end_ids(self) -> frozenset[int]:
        """The tokens that end an answer: those of the settings and of the tokenizer."""
        special = self.tokenizer.special_tokens
        roles = [special.get(self._settings.get("eos_token", ""))]
        ends = [*roles, *self._settings.get("generation_eos_ids", []), self._tokenizer.end_id]
        return frozenset(token for token in ends if token is not None)

    def encode_prompt(self, messages: Conversation) -> list[int]:
        """The tokens of `messages` and of the start of the assistant's answer, as in training.

        Raises InputError where the template or the tokenizer cannot express them.
        """
        messages, sign = self._break_special_tokens(messages)
        text = self.render(messages)
        # A template that cannot be learned rewrites earlier answers; its text is encoded whole.
        spans = self._answer_spans(messages, text) or []
        return [int(token) for token in self._encode(text, spans, sign).ids]

    def encode_conversation(self, messages: Conversation) -> EncodedConversation:
        """The tokens of a whole conversation. Raises InputError as `encode_prompt` does.

        An answer begins where the template asks for it and ends with the special token after it. So
        the tokens of its beginning are those after the prompt that the model gets later, unless the
        tokenizer joins words and its first token began in the prompt.
        """
        messages, sign = self._break_special_tokens(messages)
        text = self.render(messages, asks=False)
        return self._encode(text, self._require_answer_spans(messages, text), sign)

    def turn_end(self) -> str:
        """The special token that the template writes after an answer. Raises InputError."""
        text = self.render(PROBE, asks=False)
        begin, end = self._require_answer_spans(PROBE, text)[0]
        return str(self._pattern.findall(text[begin:end])[-1])

    def render(self, messages: Conversation, asks: bool = True) -> str:
        """The text of `messages`; with `asks` also the start of the assistant's answer.

        Raises InputError where the template refuses them, fails, writes too much or takes too long.
        """
        try:
            return self._render_in_time(messages, asks)
        except InputError:
            raise
        except Exception as error:  # a foreign template may raise anything
            raise_if_exhausted(error, "the chat template")
            reason = to_one_line(f"{error}")
            raise InputError(
                f"the model's chat template cannot write these messages: {reason}"
            ) from None

    def _render_in_time(self, messages: Conversation, asks: bool) -> str:
        # Where there are no tools and documents, transformers passes None.
        variables: dict[str, Any] = {"messages": messages, "tools": None, "documents": None}
        variables |= {"add_generation_prompt": asks, **self._role_tokens()}
        # Not template.generate, which makes the context inside: traced, that takes longer than
        # the text of a short conversation.
        rendering = self._template.root_render_func(self._template.new_context(variables))
        pieces, n_chars, previous_trace = list[str](), 0, sys.gettrace()
        # Python calls a trace function at each line, so also in a loop that writes nothing.
        sys.settrace(_make_time_check(MAX_RENDER_S))
        try:
            for piece in rendering:
                pieces.append(piece)
                n_chars += len(piece)
                if n_chars > MAX_OUTPUT_CHARS:
                    raise InputError("the chat template writes too much text: send fewer messages")
        finally:
            sys.settrace(previous_trace)
        return "".join(pieces)

    def _require_answer_spans(self, messages: Conversation, text: str) -> list[tuple[int, int]]:
        """`_answer_spans`; raises InputError where the template's answers cannot be learned."""
        spans = self._answer_spans(messages, text)
        if spans is None:
            raise InputError(
                "the chat template writes an answer differently when it is asked for, or when "
                "another turn follows, so it cannot be learned: give --chat-template chatml"
            )
        if not all(self._pattern.search(text, *span) for span in spans):
            raise InputError(
                "the chat template writes no special token after an answer, so the model would "
                "not stop: name it with --special-tokens, or give --chat-template chatml"
            )
        return spans

    def _answer_spans(self, messages: Conversation, text: str) -> list[tuple[int, int]] | None:
        """Begin and end of each answer in `text`, the rendered `messages`.

        An answer ends with the last special token that the template writes after it. None where the
        template rewrites an earlier turn when it is asked for the next one.
        """
        spans = []
        for i, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            prompt = self.render(messages[:i])
            answered = self.render(messages[: i + 1], asks=False)
            if not (answered.startswith(prompt) and text.startswith(answered)):
                return None
            ends = [match.end() for match in self._pattern.finditer(answered, len(prompt))]
            spans.append((len(prompt), ends[-1] if ends else len(answered)))
        return spans

    def _encode(self, text: str, spans: list[tuple[int, int]], sign: str) -> EncodedConversation:
        """The tokens of a rendered text whose answers are at `spans`."""
        if self.tokenizer.joins_words:
            return self._encode_whole(text, spans, sign)
        cuts = [0, *(edge for span in spans for edge in span), len(text)]
        pieces = [self._encode_piece(text[i:j], sign) for i, j in itertools.pairwise(cuts)]
        is_answer = [np.full(len(piece), i % 2 == 1) for i, piece in enumerate(pieces)]
        return EncodedConversation(np.concatenate(pieces), np.concatenate(is_answer))

    def _encode_whole(
        self, text: str, spans: list[tuple[int, int]], sign: str
    ) -> EncodedConversation:
        """`_encode` for a tokenizer that may write a space before each text, as SentencePiece does.

        Cut at the answers, the text would get a space at each cut. A token belongs to an answer
        if one of its characters does.
        """
        in_answer = np.zeros(len(text), np.bool_)
        for begin, end in spans:
            in_answer[begin:end] = True
        ids, is_answer, start = [], [], 0
        for piece, tokenizer in self._pieces(text, sign):
            assert isinstance(tokenizer, SubwordTokenizer)
            piece_ids, edges = tokenizer.encode_with_spans(piece.replace(sign, ""))
            is_text = np.array([character != sign for character in piece], np.bool_)
            counts = np.cumsum([0, *in_answer[start : start + len(piece)][is_text]])
            ids.append(piece_ids)
            is_answer.append(counts[edges[:, 1]] > counts[edges[:, 0]])
            start += len(piece)
        return EncodedConversation(np.concatenate(ids), np.concatenate(is_answer))

    def _encode_piece(self, text: str, sign: str) -> TokenIds:
        """(N,) ids of a text in which `sign` breaks the spellings that are no special tokens."""
        parts = [
            tokenizer.encode(piece.replace(sign, ""))
            for piece, tokenizer in self._pieces(text, sign)
        ]
        return np.concatenate(parts)

    def _pieces(self, text: str, sign: str) -> list[tuple[str, Tokenizer]]:
        """The pieces of `text` and their tokenizers: one that reads special tokens, or none."""
        if sign not in text:
            return [(text, self.tokenizer)]
        special = self.tokenizer.special_tokens
        pieces = filter(None, re.split(f"({self._pattern.pattern})", text))
        return [
            (piece, self.tokenizer if piece in special else self._plain_tokenizer)
            for piece in pieces
        ]

    def _break_special_tokens(self, messages: Conversation) -> tuple[Conversation, str]:
        """`messages` with a character inside each spelling of a special token, and the character.

        Raises InputError where that is impossible.
        """
        contents = [message["content"] for message in messages]
        used = set("".join([*contents, *self.tokenizer.special_tokens]))
        sign = next((sign for sign in BREAKS if sign not in used), "")
        is_breakable = not any(len(token) == 1 for token in self.tokenizer.special_tokens)
        if sign and is_breakable:
            contents = [self._break_spellings(content, sign) for content in contents]
        if any(self._pattern.search(content) for content in contents):
            raise InputError(
                "a message spells a special token in a way that cannot be told from the token: "
                "leave it out"
            )
        broken = [message | {"content": text} for message, text in zip(messages, contents)]
        return broken, sign or BREAKS[0]

    def _break_spellings(self, text: str, sign: str) -> str:
        while self._pattern.search(text):
            text = self._pattern.sub(lambda match: match[0][0] + sign + match[0][1:], text)
        return text

    @cached_property
    def _pattern(self) -> re.Pattern[str]:
        """Finds the special tokens; nothing where there are none."""
        tokens = tuple(self.tokenizer.special_tokens)
        return TokenPattern(tokens).compile() if tokens else re.compile(r"(?!)")

    @cached_property
    def _plain_tokenizer(self) -> Tokenizer:
        return self.tokenizer.with_special_tokens([])

    def _role_tokens(self) -> dict[str, str]:
        return {
            name: token
            for name, token in self._settings.items()
            if name.endswith("_token") and isinstance(token, str)
        }

    @cached_property
    def _template(self) -> Any:
        from jinja2 import TemplateSyntaxError
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        from glasslm.data.chat.generation_tag import GenerationTag

        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=["jinja2.ext.loopcontrols", GenerationTag],
        )
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _raise_exception
        if self._has_clock:
            environment.globals["strftime_now"] = time.strftime
        try:
            return environment.from_string(self.source)
        except TemplateSyntaxError as error:
            raise InputError(
                f"the chat template is not Jinja: line {error.lineno}, {to_one_line(str(error))}: "
                "correct it, or give --chat-template chatml"
            ) from None


def _make_time_check(limit_s: float) -> Callable[..., Any]:
    """A trace function that raises TimeoutError after `limit_s` seconds from now."""
    deadline_s = time.monotonic() + limit_s

    def check_time(*_: object) -> Callable[..., Any]:
        if time.monotonic() > deadline_s:
            raise TimeoutError(f"it takes more than {limit_s:g} s. Send fewer messages")
        return check_time

    return check_time


def _raise_exception(message: str) -> NoReturn:
    raise TemplateRefusal(message)


def _to_json(value: Any, indent: int | None = None) -> str:
    """transformers' tojson, which escapes nothing for HTML."""
    return json.dumps(value, ensure_ascii=False, indent=indent)
