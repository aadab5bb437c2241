"""JSON, and nothing else: a pushdown automaton over bytes that says which tokens may come next.

It follows RFC 8259, keeps strings valid UTF-8 without lone surrogates, and bounds depth, numbers and white space. It
counts what it still takes to close everything, so that a text of any allowed length parses. A token is judged by its
bytes, whatever the tokenizer.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from glasslm.errors import InputError

DEPTH = 16  # brackets open at once; Python's json stops near 1,000
SPACES = 16  # white space in a row; small models love to write nothing else
DIGITS = 20  # bytes of a number before it has to end; Python's int() refuses 4,300
NEVER = 32767  # the cost of what cannot be written; fits into int16

Step = dict[int, str]  # byte -> mode


class State(NamedTuple):
    """Where the text stands in the grammar."""

    mode: str
    stack: str  # the open brackets, and ":" while in a string that is a key
    run: int  # length so far of a number, or of white space


def _bytes(mode: str, *ranges: int | tuple[int, int]) -> Step:
    pairs = [r if isinstance(r, tuple) else (r, r) for r in ranges]
    return {byte: mode for first, last in pairs for byte in range(first, last + 1)}


def _characters(mode: str, characters: str) -> Step:
    return {ord(character): mode for character in characters}


def _strings() -> dict[str, Step]:
    """Inside a string: plain bytes, UTF-8 sequences (Unicode, table 3-7), escapes; surrogates only in pairs."""
    tail = (0x80, 0xBF)
    hexadecimal = "0123456789abcdefABCDEF"
    return {
        "string": _bytes("string", (0x20, 0x7F))
        | _characters("end", '"')
        | _characters("escape", "\\")
        | _bytes("tail1", (0xC2, 0xDF))
        | _bytes("tail2", (0xE1, 0xEC), (0xEE, 0xEF))
        | _bytes("tail3", (0xF1, 0xF3))
        | {0xE0: "after E0", 0xED: "after ED", 0xF0: "after F0", 0xF4: "after F4"},
        "tail1": _bytes("string", tail),
        "tail2": _bytes("tail1", tail),
        "tail3": _bytes("tail2", tail),
        "after E0": _bytes("tail1", (0xA0, 0xBF)),
        "after ED": _bytes("tail1", (0x80, 0x9F)),
        "after F0": _bytes("tail2", (0x90, 0xBF)),
        "after F4": _bytes("tail2", (0x80, 0x8F)),
        "escape": _characters("string", '"\\/bfnrt') | _characters("hex4", "u"),
        "hex4": _characters("hex3", hexadecimal) | _characters("hex after d", "dD"),
        "hex3": _characters("hex2", hexadecimal),
        "hex2": _characters("hex1", hexadecimal),
        "hex1": _characters("string", hexadecimal),
        "hex after d": _characters("hex2", "01234567") | _characters("high2", "89abAB"),
        "high2": _characters("high1", hexadecimal),
        "high1": _characters("low", hexadecimal),
        "low": _characters("low escape", "\\"),
        "low escape": _characters("low4", "u"),
        "low4": _characters("low3", "dD"),
        "low3": _characters("hex2", "cdefCDEF"),
    }


def _numbers() -> dict[str, Step]:
    digits = "0123456789"
    exponent = _characters("power", "eE")
    whole = _characters("zero", "0") | _characters("int", digits[1:])
    return {
        "minus": whole,
        "zero": _characters("point", ".") | exponent,
        "int": _characters("int", digits) | _characters("point", ".") | exponent,
        "point": _characters("fraction", digits),
        "fraction": _characters("fraction", digits) | exponent,
        "power": _characters("exponent", digits) | _characters("sign", "+-"),
        "sign": _characters("exponent", digits),
        "exponent": _characters("exponent", digits),
    }


def _words() -> dict[str, Step]:
    """`true`, `false` and `null`: a mode is what is left of the word."""
    rests = {word[i:] for word in ("true", "false", "null") for i in range(1, 5) if word[i:]}
    return {rest: _characters(rest[1:] or "end", rest[0]) for rest in rests}


NUMBERS = _numbers()
COMPLETE = frozenset({"zero", "int", "fraction", "exponent"})  # a number may end here
LEXICAL: dict[str, Step] = _strings() | NUMBERS | _words()
STARTS: Step = (
    _characters("string", '"')
    | _characters("minus", "-")
    | NUMBERS["minus"]
    | {ord(word[0]): word[1:] for word in ("true", "false", "null")}
)
WHITE = frozenset(b" \t\n\r")


def step(state: State, byte: int) -> State | None:
    """The state after one more byte; None where that byte makes JSON impossible.

    Modes between the tokens of JSON: `root` (an object or array comes), `value`, `array` and `object` (just opened),
    `key`, `colon`, `comma` (or a closing bracket) and `done`.
    """
    mode, stack, run = state
    if mode in LEXICAL:
        following = LEXICAL[mode].get(byte)
        if following is not None and not (mode in COMPLETE and run >= DIGITS):
            if following == "end":
                return _ended(stack)
            return State(following, stack, run + 1 if following in NUMBERS else 0)
        if mode not in COMPLETE:
            return None
        mode, _, run = _ended(stack)  # the byte after a number belongs to what is around it
    if byte in WHITE:
        if (
            not stack and mode != "done"
        ):  # before the text begins, small models would write nothing else
            return None
        return State(mode, stack, run + 1) if run < SPACES or mode == "done" else None
    return _structure(mode, stack, chr(byte))


def _structure(mode: str, stack: str, character: str) -> State | None:
    if mode in ("root", "value", "array"):
        if character in "{[" and len(stack) < DEPTH:
            return State("object" if character == "{" else "array", stack + character, 0)
        if mode != "root" and ord(character) in STARTS:
            return State(STARTS[ord(character)], stack, 1)
    if mode in ("object", "key") and character == '"':
        return State("string", stack + ":", 0)
    if mode == "colon" and character == ":":
        return State("value", stack, 0)
    if mode == "comma" and character == ",":
        return State("key" if stack[-1] == "{" else "value", stack, 0)
    if mode in ("object", "array", "comma") and character == CLOSING[stack[-1]]:
        return _ended(stack[:-1])
    return None


CLOSING = {"{": "}", "[": "]"}


def _ended(stack: str) -> State:
    """A string, word, number or container is complete: what comes next?"""
    if stack.endswith(":"):
        return State("colon", stack[:-1], 0)
    return State("comma" if stack else "done", stack, 0)


@dataclass
class _Node:
    """A trie of the vocabulary's bytes: each token is judged once with all that share its beginning."""

    children: dict[int, _Node] = field(default_factory=dict)
    tokens: list[int] = field(default_factory=list)


class JsonGrammar:
    """JSON over one vocabulary; `text(max_new_tokens)` starts a text.

    A text is an object or an array; where the vocabulary lacks the symbols for these, any value that it can write.
    `note` says what is missing, if anything. Raises InputError when no JSON at all can be written.
    """

    def __init__(self, token_bytes: list[bytes]) -> None:
        self.token_bytes = token_bytes
        self._trie = _Node()
        for token, spelled in enumerate(token_bytes):
            node = self._trie
            for byte in spelled:
                node = node.children.setdefault(byte, _Node())
            node.tokens.append(
                token
            )  # special tokens have no bytes: they stay at the root and never come
        self._alphabet = {spelled[0] for spelled in token_bytes if len(spelled) == 1}
        self._to_end = self._distances()
        self._scalar = min(
            (1 + self._to_end[STARTS[byte]] for byte in self._alphabet & STARTS.keys()),
            default=NEVER,
        )
        self._container = min(self._spell("{}"), self._spell("[]"))
        self.costs = lru_cache(maxsize=256)(self._costs)

        missing = " ".join(
            c for c in '{}[]":,\\-.0123456789eE+truefalsn' if ord(c) not in self._alphabet
        )
        roots = (State("root", "", 0), State("value", "", 0))
        start = next((root for root in roots if self.completion(root) < NEVER), None)
        if start is None:
            raise InputError(
                f"this model's vocabulary cannot write JSON, because it lacks {missing}: use a model trained with "
                "--tokenizer byte or bpe, or on text that has these characters"
            )
        self._start = start
        self.note = (
            f"the vocabulary lacks {missing}: only JSON without these can be written"
            if missing
            else ""
        )

    def text(self, max_new_tokens: int) -> JsonText:
        """A text of at most `max_new_tokens`, which parses however short that is. InputError when it is too short."""
        least = self.completion(self._start)
        if max_new_tokens < least:
            raise InputError(
                f"max_new_tokens is {max_new_tokens}: the shortest JSON takes {least} tokens here"
            )
        return JsonText(self, self._start)

    def completion(self, state: State) -> int:
        """Tokens, of one byte each, on the shortest way from `state` to a complete text; NEVER where there is none."""
        mode, stack, _ = state
        cost = 0
        if mode in LEXICAL:
            cost = self._to_end[mode]
            mode, stack, _ = _ended(stack)
        if mode == "key":
            cost += self._spell('""')
        if mode in ("key", "colon"):
            cost += self._spell(":")
        if mode in ("key", "colon", "value"):
            cost += min(self._scalar, self._container if len(stack) < DEPTH else NEVER)
        if mode == "root":
            cost += self._container
        return min(NEVER, cost + sum(self._spell(CLOSING[bracket]) for bracket in stack))

    def _spell(self, symbols: str) -> int:
        return len(symbols) if self._alphabet.issuperset(symbols.encode()) else NEVER

    def _distances(self) -> dict[str, int]:
        """Bytes from each mode inside a string, number or word to its end."""
        distances = dict.fromkeys(LEXICAL, NEVER) | dict.fromkeys(COMPLETE, 0) | {"end": 0}
        for _ in LEXICAL:  # Bellman and Ford: no way is longer than there are modes
            for mode, following in LEXICAL.items():
                ways = (
                    1 + distances[following[byte]] for byte in self._alphabet & following.keys()
                )
                distances[mode] = min(distances[mode], min(ways, default=NEVER))
        return distances

    def _costs(self, state: State) -> NDArray[np.int16]:
        """(V,) what completing the text takes after each token; NEVER for tokens that cannot come."""
        costs = np.full(len(self.token_bytes), NEVER, np.int16)
        pending = [(self._trie, state)]
        while pending:
            node, here = pending.pop()
            for byte, child in node.children.items():
                following = step(here, byte)
                if following is None:
                    continue
                if child.tokens:
                    costs[child.tokens] = self.completion(following)
                if child.children:
                    pending.append((child, following))
        return costs


class JsonText:
    """One text being written; a generation.Grammar."""

    def __init__(self, grammar: JsonGrammar, state: State) -> None:
        self._grammar, self._state = grammar, state
        self.finished = False

    def allowed(self, remaining: int) -> NDArray[np.bool_]:
        """(V,) the tokens after which `remaining` - 1 further ones suffice to close everything; never none."""
        mask: NDArray[np.bool_] = self._grammar.costs(self._state) < min(remaining, NEVER)
        return mask

    def advance(self, token: int) -> None:
        for byte in self._grammar.token_bytes[token]:
            following = step(self._state, byte)
            assert following is not None, "a token that the grammar does not allow"
            self._state = following
        # outside brackets a number ends where nothing can follow, as there is no bracket to end it
        self.finished = self._state.mode == "done" or bool(
            self._grammar.costs(self._state).min() == NEVER
        )
