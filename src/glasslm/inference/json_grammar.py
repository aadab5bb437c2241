"""Constrained generation of JSON: a pushdown automaton over bytes that masks the next tokens.

It follows RFC 8259, keeps strings valid UTF-8 without lone surrogates, and bounds depth, numbers
and white space. It counts the tokens needed to close all that is open, so that a text always parses
within its limit of tokens. A token is judged by its bytes, so any tokenizer works.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from glasslm.errors import InputError

MAX_DEPTH = 16  # open brackets; Python's json stops near 1,000
MAX_WHITESPACE = 16  # bytes in a row; small models tend to go on with white space
MAX_NUMBER_BYTES = 20  # Python's int() refuses 4,300
IMPOSSIBLE_COST = 32767  # of a text that the vocabulary cannot write; fits into int16

Transitions = dict[int, str]  # byte -> mode


class State(NamedTuple):
    """The state of the automaton after a text."""

    mode: str
    stack: str  # the open brackets, and ":" while in a string that is a key
    run: int  # length so far of a number or of white space, in bytes


def _on_bytes(mode: str, *ranges: int | tuple[int, int]) -> Transitions:
    pairs = [r if isinstance(r, tuple) else (r, r) for r in ranges]
    return {byte: mode for first, last in pairs for byte in range(first, last + 1)}


def _on_characters(mode: str, characters: str) -> Transitions:
    return {ord(character): mode for character in characters}


def _string_modes() -> dict[str, Transitions]:
    """The modes inside a string: bytes, UTF-8 (Unicode, table 3-7), escapes, surrogate pairs."""
    tail = (0x80, 0xBF)
    hexadecimal = "0123456789abcdefABCDEF"
    return {
        "string": _on_bytes("string", (0x20, 0x7F))
        | _on_characters("end", '"')
        | _on_characters("escape", "\\")
        | _on_bytes("tail1", (0xC2, 0xDF))
        | _on_bytes("tail2", (0xE1, 0xEC), (0xEE, 0xEF))
        | _on_bytes("tail3", (0xF1, 0xF3))
        | {0xE0: "after E0", 0xED: "after ED", 0xF0: "after F0", 0xF4: "after F4"},
        "tail1": _on_bytes("string", tail),
        "tail2": _on_bytes("tail1", tail),
        "tail3": _on_bytes("tail2", tail),
        "after E0": _on_bytes("tail1", (0xA0, 0xBF)),
        "after ED": _on_bytes("tail1", (0x80, 0x9F)),
        "after F0": _on_bytes("tail2", (0x90, 0xBF)),
        "after F4": _on_bytes("tail2", (0x80, 0x8F)),
        "escape": _on_characters("string", '"\\/bfnrt') | _on_characters("hex4", "u"),
        "hex4": _on_characters("hex3", hexadecimal) | _on_characters("hex after d", "dD"),
        "hex3": _on_characters("hex2", hexadecimal),
        "hex2": _on_characters("hex1", hexadecimal),
        "hex1": _on_characters("string", hexadecimal),
        "hex after d": _on_characters("hex2", "01234567") | _on_characters("high2", "89abAB"),
        "high2": _on_characters("high1", hexadecimal),
        "high1": _on_characters("low", hexadecimal),
        "low": _on_characters("low escape", "\\"),
        "low escape": _on_characters("low4", "u"),
        "low4": _on_characters("low3", "dD"),
        "low3": _on_characters("hex2", "cdefCDEF"),
    }


def _number_modes() -> dict[str, Transitions]:
    digits = "0123456789"
    exponent = _on_characters("power", "eE")
    whole = _on_characters("zero", "0") | _on_characters("int", digits[1:])
    return {
        "minus": whole,
        "zero": _on_characters("point", ".") | exponent,
        "int": _on_characters("int", digits) | _on_characters("point", ".") | exponent,
        "point": _on_characters("fraction", digits),
        "fraction": _on_characters("fraction", digits) | exponent,
        "power": _on_characters("exponent", digits) | _on_characters("sign", "+-"),
        "sign": _on_characters("exponent", digits),
        "exponent": _on_characters("exponent", digits),
    }


def _word_modes() -> dict[str, Transitions]:
    """The modes inside `true`, `false` and `null`: a mode is the rest of the word."""
    rests = {word[i:] for word in ("true", "false", "null") for i in range(1, 5) if word[i:]}
    return {rest: _on_characters(rest[1:] or "end", rest[0]) for rest in rests}


NUMBER_MODES = _number_modes()
NUMBER_END_MODES = frozenset({"zero", "int", "fraction", "exponent"})  # a number may end here
LEXICAL_MODES: dict[str, Transitions] = _string_modes() | NUMBER_MODES | _word_modes()
VALUE_STARTS: Transitions = (
    _on_characters("string", '"')
    | _on_characters("minus", "-")
    | NUMBER_MODES["minus"]
    | {ord(word[0]): word[1:] for word in ("true", "false", "null")}
)
WHITESPACE = frozenset(b" \t\n\r")


def advance_state(state: State, byte: int) -> State | None:
    """The state after one more byte; None where that byte makes JSON impossible.

    The modes between tokens of JSON say what comes next: `root` (an object or array), `value`,
    `array` and `object` (just opened), `key`, `colon`, `comma` (or a closing bracket) and `done`.
    """
    mode, stack, run = state
    if mode in LEXICAL_MODES:
        following = LEXICAL_MODES[mode].get(byte)
        if following is not None and not (mode in NUMBER_END_MODES and run >= MAX_NUMBER_BYTES):
            if following == "end":
                return _after_value(stack)
            return State(following, stack, run + 1 if following in NUMBER_MODES else 0)
        if mode not in NUMBER_END_MODES:
            return None
        mode, _, run = _after_value(stack)  # the byte after a number belongs to its container
    if byte in WHITESPACE:
        if not stack and mode != "done":  # no white space before the text begins
            return None
        return State(mode, stack, run + 1) if run < MAX_WHITESPACE or mode == "done" else None
    return _advance_structure(mode, stack, chr(byte))


def _advance_structure(mode: str, stack: str, character: str) -> State | None:
    if mode in ("root", "value", "array"):
        if character in "{[" and len(stack) < MAX_DEPTH:
            return State("object" if character == "{" else "array", stack + character, 0)
        if mode != "root" and ord(character) in VALUE_STARTS:
            return State(VALUE_STARTS[ord(character)], stack, 1)
    if mode in ("object", "key") and character == '"':
        return State("string", stack + ":", 0)
    if mode == "colon" and character == ":":
        return State("value", stack, 0)
    if mode == "comma" and character == ",":
        return State("key" if stack[-1] == "{" else "value", stack, 0)
    if mode in ("object", "array", "comma") and character == CLOSING_BRACKETS[stack[-1]]:
        return _after_value(stack[:-1])
    return None


CLOSING_BRACKETS = {"{": "}", "[": "]"}


def _after_value(stack: str) -> State:
    """The state after a complete string, word, number or container."""
    if stack.endswith(":"):
        return State("colon", stack[:-1], 0)
    return State("comma" if stack else "done", stack, 0)


@dataclass
class _TrieNode:
    """A node of the trie of all tokens' bytes; tokens with the same prefix are judged together."""

    children: dict[int, _TrieNode] = field(default_factory=dict)
    tokens: list[int] = field(default_factory=list)


class JsonGrammar:
    """The grammar of JSON over one vocabulary; `start_text(max_new_tokens)` starts a text.

    A text is an object or an array; where the vocabulary lacks their symbols, any value that it can
    write. `note` names the missing symbols; it is empty where there are none. Raises InputError
    when the vocabulary cannot write any JSON.
    """

    def __init__(self, token_bytes: list[bytes]) -> None:
        self.token_bytes = token_bytes
        self._trie = _TrieNode()
        for token, spelling in enumerate(token_bytes):
            node = self._trie
            for byte in spelling:
                node = node.children.setdefault(byte, _TrieNode())
            node.tokens.append(token)  # special tokens have no bytes: at the root, never allowed
        self._alphabet = {spelling[0] for spelling in token_bytes if len(spelling) == 1}
        self._bytes_to_end = self._find_distances()
        self._scalar_cost = min(
            (
                1 + self._bytes_to_end[VALUE_STARTS[byte]]
                for byte in self._alphabet & VALUE_STARTS.keys()
            ),
            default=IMPOSSIBLE_COST,
        )
        self._container_cost = min(self._spelling_cost("{}"), self._spelling_cost("[]"))
        self.costs = lru_cache(maxsize=256)(self._costs)

        missing = " ".join(
            c for c in '{}[]":,\\-.0123456789eE+truefalsn' if ord(c) not in self._alphabet
        )
        roots = (State("root", "", 0), State("value", "", 0))
        start = next((root for root in roots if self.completion_cost(root) < IMPOSSIBLE_COST), None)
        if start is None:
            raise InputError(
                f"this model's vocabulary cannot write JSON, because it lacks {missing}: use a "
                "model trained with --tokenizer byte or bpe, or on text that has these characters"
            )
        self._start = start
        self.note = (
            f"the vocabulary lacks {missing}: only JSON without these can be written"
            if missing
            else ""
        )

    def start_text(self, max_new_tokens: int) -> JsonText:
        """The state of a new text; InputError when `max_new_tokens` is too short for any JSON."""
        shortest = self.completion_cost(self._start)
        if max_new_tokens < shortest:
            raise InputError(
                f"max_new_tokens is {max_new_tokens}: the shortest JSON takes {shortest} tokens"
            )
        return JsonText(self, self._start)

    def completion_cost(self, state: State) -> int:
        """The fewest one-byte tokens from `state` to a complete text, or IMPOSSIBLE_COST."""
        mode, stack, _ = state
        cost = 0
        if mode in LEXICAL_MODES:
            cost = self._bytes_to_end[mode]
            mode, stack, _ = _after_value(stack)
        if mode == "key":
            cost += self._spelling_cost('""')
        if mode in ("key", "colon"):
            cost += self._spelling_cost(":")
        if mode in ("key", "colon", "value"):
            cost += min(
                self._scalar_cost,
                self._container_cost if len(stack) < MAX_DEPTH else IMPOSSIBLE_COST,
            )
        if mode == "root":
            cost += self._container_cost
        return min(
            IMPOSSIBLE_COST,
            cost + sum(self._spelling_cost(CLOSING_BRACKETS[bracket]) for bracket in stack),
        )

    def _spelling_cost(self, symbols: str) -> int:
        return len(symbols) if self._alphabet.issuperset(symbols.encode()) else IMPOSSIBLE_COST

    def _find_distances(self) -> dict[str, int]:
        """The bytes from each mode inside a string, number or word to its end."""
        distances = (
            dict.fromkeys(LEXICAL_MODES, IMPOSSIBLE_COST)
            | dict.fromkeys(NUMBER_END_MODES, 0)
            | {"end": 0}
        )
        for _ in LEXICAL_MODES:  # Bellman and Ford: no path is longer than the number of modes
            for mode, following in LEXICAL_MODES.items():
                paths = (
                    1 + distances[following[byte]] for byte in self._alphabet & following.keys()
                )
                distances[mode] = min(distances[mode], min(paths, default=IMPOSSIBLE_COST))
        return distances

    def _costs(self, state: State) -> NDArray[np.int16]:
        """(V,): the completion cost after each token; IMPOSSIBLE_COST for a token not allowed."""
        costs = np.full(len(self.token_bytes), IMPOSSIBLE_COST, np.int16)
        pending = [(self._trie, state)]
        while pending:
            node, node_state = pending.pop()
            for byte, child in node.children.items():
                following = advance_state(node_state, byte)
                if following is None:
                    continue
                if child.tokens:
                    costs[child.tokens] = self.completion_cost(following)
                if child.children:
                    pending.append((child, following))
        return costs


class JsonText:
    """The state of one text in the grammar; a request.Grammar."""

    can_end = False  # a number outside of brackets ends where no token can follow

    def __init__(self, grammar: JsonGrammar, state: State) -> None:
        self._grammar, self._state = grammar, state
        self.finished = False

    def allowed(self, remaining: int) -> NDArray[np.bool_]:
        """(V,): marks the tokens after which `remaining` - 1 more can complete the text."""
        mask: NDArray[np.bool_] = self._grammar.costs(self._state) < min(remaining, IMPOSSIBLE_COST)
        return mask

    def advance(self, token: int) -> None:
        """Append a token to the text."""
        for byte in self._grammar.token_bytes[token]:
            following = advance_state(self._state, byte)
            assert following is not None, "a token that the grammar does not allow"
            self._state = following
        self.finished = self._state.mode == "done" or bool(
            self._grammar.costs(self._state).min() == IMPOSSIBLE_COST
        )
