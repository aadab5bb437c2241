"""The text that a stream shows: whole characters, nothing of a stop string, all of the rest."""

import functools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from glasslm.data.tokenizers import ByteTokenizer, CharTokenizer, train_bpe
from glasslm.inference.request import Request, Token
from glasslm.inference.stream import Stream, top_alternatives

TEXT = "ab né日本 🙂" * 20


@functools.cache
def tokenizer(kind):
    return {
        "char": lambda: CharTokenizer(TEXT, ["<end>"]),
        "byte": lambda: ByteTokenizer(["<end>"]),
        "bpe": lambda: train_bpe([TEXT], 300).with_special_tokens(["<end>"]),
    }[kind]()


def cut_at_stop(text, stops):
    """The text before the stop string that is complete first, and whether there is one."""
    ends = [(at + len(stop), at) for stop in stops if (at := text.find(stop)) >= 0]
    return (text[: min(ends)[1]], True) if ends else (text, False)


@pytest.mark.parametrize("kind", ["char", "byte", "bpe"])
@given(st.data())
@settings(deadline=None, max_examples=150)
def test_what_is_shown_joins_to_the_text_before_the_first_stop_string(kind, data):
    """Compared with all tokens decoded at once, whatever tokens end or begin in a character."""
    tokens = tokenizer(kind)
    texts = st.text("ab né日🙂", max_size=12).map(lambda text: tokens.encode(text).tolist())
    any_ids = st.lists(st.integers(0, tokens.vocab_size - 1), max_size=6)
    parts = data.draw(st.lists(st.one_of(texts, any_ids), min_size=1, max_size=4))
    ids = [i for part in parts for i in part if i != tokens.end_id] or [0]
    stops = data.draw(st.lists(st.text("ab né日🙂", min_size=1, max_size=3), max_size=3))
    expected, is_stopped = cut_at_stop(tokens.decode(ids), stops)

    stream = Stream(Request([0], len(ids), stop=tuple(stops)), tokens)
    shown_text, shown = "", 0
    for n, token in enumerate(ids, start=1):
        event, *last = stream.append(token, -1.0, [])
        assert isinstance(event, Token)
        shown_text += event.text
        assert expected.startswith(shown_text)
        assert shown <= event.shown <= n
        shown = event.shown
        whole_bytes = b"".join(tokens.token_bytes[i] for i in ids[:shown])
        assert len(whole_bytes.decode("utf-8", "ignore")) <= len(shown_text)
        if last:
            break
    (finished,) = last
    assert shown_text + finished.text == expected
    assert finished.usage == (1, 0, n)
    assert finished.reason == ("stop" if is_stopped else "length")
    if not is_stopped:
        assert finished.shown == n == len(ids)
    elif finished.shown:
        before_last = b"".join(tokens.token_bytes[i] for i in ids[: finished.shown - 1])
        assert len(before_last.decode("utf-8", "replace")) <= len(expected)


@pytest.mark.parametrize(
    ("ids", "stop", "shown"),
    [
        ("abn", "n", 2),  # the stop string is a token of its own
        ("ab", "ab", 0),
        ("éa", "a", 2),  # é has two tokens
        ("ab", "", 2),
    ],
)
def test_tokens_of_a_stop_string_are_not_shown(ids, stop, shown):
    tokens = tokenizer("byte")
    stream = Stream(Request([0], 10, stop=(stop,) if stop else ()), tokens)
    events = [event for i in tokens.encode(ids).tolist() for event in stream.append(i, 0.0, [])]
    last = events[-1] if stop else stream.finish("cancelled")
    assert last.shown == shown


def test_a_stop_string_may_begin_inside_a_token():
    tokens = train_bpe(["ab cd " * 50], 262)
    token = max(range(tokens.vocab_size), key=lambda i: len(tokens.token_bytes[i]))
    start, stop = tokens.decode([token])[:-1], tokens.decode([token])[-1]
    stream = Stream(Request([0], 10, stop=(stop,)), tokens)
    event, last = stream.append(token, 0.0, [])
    assert start
    assert (event.text + last.text, last.reason, last.shown) == (start, "stop", 1)


@pytest.mark.parametrize("end_id", [tokenizer("byte").end_id, 0])
def test_the_end_of_a_document_ends_a_text_and_is_not_shown(end_id):
    """Also one of the request, such as the end of a turn."""
    tokens = tokenizer("byte")
    stream = Stream(Request([0], 10, stop=("abc",), end_ids=frozenset({0})), tokens)
    for i in tokens.encode("ab").tolist():
        (event,) = stream.append(i, 0.0, [])
        assert (event.text, event.shown) == ("", 0)
    event, last = stream.append(end_id, 0.0, [])
    assert (event.text + last.text, last.reason, last.shown) == ("ab", "stop", 2)
    assert last.usage.completion_tokens == 3


@given(st.lists(st.integers(-3, 0), min_size=1, max_size=12), st.integers(0, 14))
def test_alternatives_are_the_likeliest_and_of_equal_ones_the_first(values, count):
    logprobs = np.array(values, float)
    expected = sorted(range(len(values)), key=lambda i: (-values[i], i))[:count]
    assert top_alternatives(logprobs, count) == [(i, values[i]) for i in expected]
