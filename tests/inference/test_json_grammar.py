"""The JSON automaton against Python's json.

What it lets through parses, and what parses it lets through.
"""

import json
import random
from functools import cache

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from glasslm.data.tokenizers import train_bpe
from glasslm.errors import InputError
from glasslm.inference.json_grammar import (
    IMPOSSIBLE_COST,
    MAX_DEPTH,
    MAX_NUMBER_BYTES,
    MAX_WHITESPACE,
    JsonGrammar,
    State,
    advance_state,
)

SHAKESPEARE = "\n !$&',-.3:;?ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
BYTES = [bytes([i]) for i in range(256)]
# merges that cross the borders of the grammar's tokens, as those of a trained BPE do, and a special
# token
BPE = [
    *BYTES,
    b'{"',
    b'":',
    b'",',
    b'": "',
    b"},",
    b"]}",
    b"}}\n",
    b"true",
    b"false}",
    b" null",
    b"10",
    b"0.",
    b"e5",
    b'\\"',
    b"\\u00",
    b"caf\xc3",
    b"\xa9 ",
    b"hello",
    b', "',
    b" [",
    b"[[",
    b"",
]
VALUE = State("value", "", 0)


def walk_states(text: bytes, state: State | None = VALUE) -> list[State | None]:
    states = []
    for byte in text:
        state = state and advance_state(state, byte)
        states.append(state)
    return states


def write_random_text(grammar, budget, rng, spread=3.0):
    """A text by random logits; returns its bytes and whether the grammar ended it."""
    text, out = grammar.start_text(budget), b""
    for remaining in range(budget, 0, -1):
        mask = text.allowed(remaining)
        assert mask.any()
        token = int(np.where(mask, rng.normal(size=len(mask)) * spread, -np.inf).argmax())
        text.advance(token)
        out += grammar.token_bytes[token]
        if text.finished:
            break
    return out, text.finished


@pytest.mark.parametrize(
    "vocabulary", [BYTES, BPE, [c.encode() for c in SHAKESPEARE + '{}[]"é☃\U0001f600']]
)
def test_random_texts_of_every_length_parse(vocabulary):
    grammar = JsonGrammar(vocabulary)
    rng = np.random.default_rng(0)
    kinds = set()
    for budget in [*range(2, 62), *range(2, 62), *[200] * 100]:
        text, finished = write_random_text(grammar, budget, rng)
        value = json.loads(text.decode("utf-8"))
        assert finished
        assert isinstance(value, (dict, list))
        kinds |= {type(item) for item in (value.values() if isinstance(value, dict) else value)}
        json.dumps(value, ensure_ascii=False).encode("utf-8")  # no lone surrogates
    assert kinds >= {dict, list, str, float if vocabulary is BYTES else int, bool, type(None)}


def test_a_model_that_never_wants_to_stop_is_closed_in_time():
    """Opening brackets, keys, digits and white space for ever.

    Bounds and budget end each of them.
    """
    for favourite in b'{["1 \\':
        grammar = JsonGrammar(BYTES)
        for budget in (2, 3, 7, 30, 31, 32, 33, 100, 500):
            text, out = grammar.start_text(budget), b""
            for remaining in range(budget, 0, -1):
                mask = text.allowed(remaining)
                token = (
                    favourite
                    if mask[favourite]
                    else int(np.random.default_rng(remaining).choice(np.flatnonzero(mask)))
                )
                text.advance(token)
                out += bytes([token])
                if text.finished:
                    break
            json.loads(out)


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(10**15), 10**15)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4)
    ),
    max_leaves=12,
)


def nesting_depth(value):
    inner = (
        value.values() if isinstance(value, dict) else value if isinstance(value, list) else None
    )
    return 0 if inner is None else 1 + max(map(nesting_depth, inner), default=0)


@given(JSON, st.booleans(), st.sampled_from([None, 1]))
def test_what_json_writes_is_accepted_and_every_beginning_can_be_completed(value, escaped, indent):
    text = json.dumps(value, ensure_ascii=escaped, indent=indent).encode("utf-8")
    # longer numbers than DIGITS are left out by design; floats' repr has up to 24 characters
    if nesting_depth(value) > MAX_DEPTH or any(
        len(str(n)) > MAX_NUMBER_BYTES for n in find_numbers(value)
    ):
        return
    states = walk_states(text)
    assert None not in states
    assert states[-1].mode == "done" or COMPLETE_BYTES.completion_cost(states[-1]) == 0
    assert all(COMPLETE_BYTES.completion_cost(state) < IMPOSSIBLE_COST for state in states)


COMPLETE_BYTES = JsonGrammar(BYTES)


def find_numbers(value):
    if isinstance(value, dict):
        return [n for item in value.values() for n in find_numbers(item)]
    if isinstance(value, list):
        return [n for item in value for n in find_numbers(item)]
    return [value] if isinstance(value, (int, float)) and not isinstance(value, bool) else []


@given(JSON, st.randoms(use_true_random=False))
def test_what_is_accepted_parses_also_after_a_change(value, rng: random.Random):
    """Bytes replaced, dropped or doubled in valid JSON.

    The automaton never takes what json.loads refuses.
    """
    text = bytearray(json.dumps(value, ensure_ascii=False).encode("utf-8"))
    for _ in range(rng.randint(1, 3)):
        at = rng.randrange(len(text))
        text[at : at + 1] = rng.choice(
            [b"", bytes(text[at : at + 1]) * 2, bytes([rng.choice(b'{}[]",:0e-.\\u\xe2 \n')])]
        )
        if not text:
            return
    states = walk_states(bytes(text))
    if states[-1] is not None and COMPLETE_BYTES.completion_cost(states[-1]) == 0:
        json.loads(bytes(text).decode("utf-8"))


@pytest.mark.parametrize(
    "text",
    [
        b"{", b"[1,", b"[1,]", b"{,}", b'{"a"}', b'{"a":}', b'{"a":1,}', b"{1:2}", b"[}",
        b"01", b"1.",
        b".5", b"-",
        b"+1", b"1e", b"1e+", b"--1", b"NaN", b"tru", b"True", b"nulll", b"[1 2]", b'"\n"',
        b'"\\x"',
        b'"\\u12g4"',
        b"'a'", b'"a', b'"\\ud800"', b'"\\udc00"', b'"\\ud800\\u0041"', b'"\\ud800\\ud799"',
        b'"\xff"', b'"\xc0\x80"', b'"\xed\xa0\x80"', b'"\xe2\x28\xa1"',
        b'"\xf4\x90\x80\x80"', b"[] []", b'{"a":1 "b":2}', b"\xef\xbb\xbf[]", b"//\n1",
    ],
)  # fmt: skip
def test_what_is_not_json_is_refused(text):
    final = walk_states(text)[-1]
    assert final is None or COMPLETE_BYTES.completion_cost(final) > 0


def test_the_bounds_hold():
    assert walk_states(b"[" * MAX_DEPTH)[-1] is not None
    assert walk_states(b"[" * (MAX_DEPTH + 1))[-1] is None
    assert walk_states(b"1" * MAX_NUMBER_BYTES)[-1] is not None
    assert walk_states(b"1" * (MAX_NUMBER_BYTES + 1))[-1] is None
    assert walk_states(b"1." + b"1" * MAX_NUMBER_BYTES + b"e")[-1] is None
    assert walk_states(b"[" + b" " * MAX_WHITESPACE)[-1] is not None
    assert walk_states(b"[" + b" " * (MAX_WHITESPACE + 1))[-1] is None
    assert walk_states(b" ")[-1] is None


@pytest.mark.parametrize(
    "symbols", ['{}[]":,0a', '{}":,', "[],-1", "[]{", "{}truefals", "[],truefals\\"]
)
def test_the_cost_of_completing_is_the_shortest_way_by_brute_force(symbols):
    grammar = JsonGrammar([symbol.encode() for symbol in symbols])

    @cache
    def reachable(state: State, within: int) -> bool:
        if state.mode == "done" or (
            not state.stack and state.mode in ("zero", "int", "fraction", "exponent")
        ):
            return True
        following = (advance_state(state, ord(symbol)) for symbol in symbols)
        return within > 0 and any(reachable(after, within - 1) for after in following if after)

    def ways(state):
        return [n for n in range(9) if reachable(state, n)]

    rng = random.Random(3)
    states = [state for state in walk_states(b'[{"a":0,"":[]},"') if state]
    for _ in range(40):
        states.append(VALUE)
        for _ in range(rng.randrange(14)):
            following = [
                after for symbol in symbols if (after := advance_state(states[-1], ord(symbol)))
            ]
            states.append(rng.choice(following or [VALUE]))
    for state in states:
        assert (
            grammar.completion_cost(state) == ways(state)[0]
            if ways(state)
            else grammar.completion_cost(state) > 8
        )


def test_at_full_depth_the_shortest_value_is_no_container():
    grammar = JsonGrammar([symbol.encode() for symbol in "[],true"])
    assert (
        grammar.completion_cost(State("value", "[" * (MAX_DEPTH - 1), 0))
        == len("[]") + MAX_DEPTH - 1
    )
    assert grammar.completion_cost(State("value", "[" * MAX_DEPTH, 0)) == len("true") + MAX_DEPTH


def test_shakespeare_writes_what_its_65_symbols_allow():
    """No brackets, no quotes and no digit but 3: true, false, null and numbers of threes."""
    grammar = JsonGrammar([c.encode() for c in SHAKESPEARE])
    assert '{ } [ ] "' in grammar.note
    rng = np.random.default_rng(5)
    values = set()
    for budget in list(range(1, 40)) * 4:
        values.add(json.loads(write_random_text(grammar, budget, rng)[0]))
    assert {True, False, None} <= values
    assert any(isinstance(value, int) and abs(value) > 30 for value in values)
    with pytest.raises(InputError, match="lacks"):
        JsonGrammar([c.encode() for c in "abc xyz"])


def test_digits_alone_end_by_themselves():
    text, finished = write_random_text(JsonGrammar([b"7", b"8"]), 100, np.random.default_rng(0))
    assert finished
    assert len(text) == MAX_NUMBER_BYTES
    assert write_random_text(JsonGrammar([b"0"]), 100, np.random.default_rng(0)) == (b"0", True)


def test_a_trained_bpe_vocabulary_is_judged_by_its_bytes():
    """Its merges run across brackets, quotes and colons, as learned from JSON itself."""
    lines = "\n".join(
        json.dumps({"name": f"n{i % 7}", "list": [i % 3, None, {}], "é": "ü"}) for i in range(300)
    )
    tokenizer = train_bpe([lines], 320)
    assert any(b'":' in token for token in tokenizer.token_bytes)
    grammar = JsonGrammar(tokenizer.token_bytes)
    rng = np.random.default_rng(2)
    for budget in [*range(2, 30), *[80] * 30]:
        json.loads(write_random_text(grammar, budget, rng)[0].decode("utf-8"))


def test_too_few_tokens_are_refused():
    with pytest.raises(InputError, match="takes 2 tokens"):
        COMPLETE_BYTES.start_text(1)


def test_special_tokens_never_come():
    """A token without bytes would cost nothing and say nothing."""
    assert not JsonGrammar(BPE).start_text(50).allowed(50)[BPE.index(b"")]
