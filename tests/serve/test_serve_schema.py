"""Each field of a request: what is accepted, and what a wrong value is told."""

import json
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("starlette")

from glasslm.serve import schema
from glasslm.serve.api_error import ApiError
from glasslm.serve.limits import Limits
from glasslm.serve.request_body import parse_json

LIMITS = Limits()
COMPLETION = {"prompt": "a"}
CHAT = {"messages": [{"role": "user", "content": "a"}]}
HUGE = 10**400
LARGE_SCHEMA = {"enum": ["a" * 70_000]}

WRONG: dict[str, list[Any]] = {
    "prompt": [None, 1, True, [], {}, [None], [1, "a"], ["a", 1], [[1], "a"], [1.5], [True], [-1],
               [[1, -2]], [HUGE], ["a"] * 300],
    "max_tokens": [-1, 1.5, "1", True, HUGE, [], 65537, 1e300],
    "temperature": [-0.1, 101, "1", False, HUGE, -HUGE, [], {}],
    "top_p": [-1, 1.1, "1", True],
    "top_k": [-1, 1.5, "1", True, 2**40],
    "min_p": [-0.1, 1.1, "0"],
    "repetition_penalty": [0, -1, "1", 1e-320, 1e300, HUGE],
    "seed": [-1, 2**64, 1.5, "1", True, HUGE],
    "n": [0, -1, 129, 1.5, "1", True, HUGE],
    "stop": [1, True, {}, "", [""], ["a"] * 17, ["a", 1], "a" * 1001, "\ud800", ["a", "\udfff"]],
    "stream": [0, 1, "true", []],
    "stream_options": [1, "a", [], True],
    "logprobs": [-1, 6, 1.5, "1", True, HUGE],
    "echo": [0, 1, "true"],
    "logit_bias": [1, [], {"a": 1}, {"-1": 1}, {"1": 101}, {"1": "a"}, {"1": None}, {"1": True},
                   {"1": HUGE}, {"²": 1}, {"97": 1, "097": -1}, {"00": 1},
                   {str(i): 0 for i in range(1025)}],
    "response_format": [1, "json", {}, {"type": "xml"}, {"type": "json_schema"},
                        {"type": "json_schema", "json_schema": {"schema": 1}},
                        {"type": "json_schema", "json_schema": {"schema": LARGE_SCHEMA}}],
    "model": [1, True, [], {}],
    "best_of": [2, 0, True],
    "suffix": ["a", 1],
    "frequency_penalty": [0.5, True, "0"],
    "presence_penalty": [-1],
    "tools": [[{}], {}],
}  # fmt: skip

WRONG_CHAT: dict[str, list[Any]] = {
    "messages": [None, [], {}, "a", [1], [{}], [{"role": "user"}], [{"role": 1, "content": "a"}],
                 [{"role": "bad", "content": "a"}],
                 [{"role": "user", "content": 1}], 
                 [{"role": "user", "content": [{"type": "image_url"}]}],
                 [{"role": "user", "content": [{"type": "text", "text": 1}]}]],
    "logprobs": [1, "true", 0],
    "top_logprobs": [1],
    "max_completion_tokens": [-1, "1", True],
    "max_tokens": [-1, "1"],
}  # fmt: skip


def cases(table: dict[str, list[Any]]) -> list[Any]:
    return [
        pytest.param(name, value, id=f"{name}-{index}")
        for name, values in table.items()
        for index, value in enumerate(values)
    ]


@pytest.mark.parametrize(("name", "value"), cases(WRONG))
def test_a_wrong_value_of_a_completion(name: str, value: Any) -> None:
    with pytest.raises(ApiError) as caught:
        schema.parse_completion(COMPLETION | {name: value}, LIMITS)
    check_error(caught.value, name)


@pytest.mark.parametrize(("name", "value"), cases(WRONG_CHAT))
def test_a_wrong_value_of_a_chat(name: str, value: Any) -> None:
    with pytest.raises(ApiError) as caught:
        schema.parse_chat(CHAT | {name: value}, LIMITS)
    check_error(caught.value, name)


def check_error(error: ApiError, name: str) -> None:
    assert error.status == 400
    assert error.param is not None
    assert error.param.startswith(name)
    assert "expected" in str(error) or "Leave it out" in str(error)
    assert len(error.body) < 2000
    error.body.decode("ascii")


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4)
    ),
    max_leaves=8,
)  # fmt: skip
FIELDS = sorted({*WRONG, *WRONG_CHAT, "user", "other"})


@given(st.dictionaries(st.sampled_from(FIELDS), JSON_VALUES, max_size=6) | JSON_VALUES)
def test_any_json_is_read_or_refused_in_words(content: Any) -> None:
    parsers = (
        lambda: schema.parse_completion(content, LIMITS),
        lambda: schema.parse_chat(content, LIMITS),
        lambda: schema.parse_tokenize(content, LIMITS),
        lambda: schema.parse_detokenize(content, LIMITS),
    )
    for parse in parsers:
        try:
            parse()
        except ApiError as error:
            answer = error.status, json.loads(error.body)["error"]["type"]
            assert answer == (400, "invalid_request_error")


@pytest.mark.parametrize("number", [1, 1.0])
def test_an_integer_may_be_written_with_a_point(number: float) -> None:
    assert schema.parse_completion(COMPLETION | {"n": number}, LIMITS).settings.n == 1


def test_neutral_values_of_what_is_not_offered_are_accepted() -> None:
    neutral = {
        "best_of": 1, "suffix": "", "frequency_penalty": 0, "presence_penalty": 0.0, "tools": [],
        "tool_choice": "auto", "modalities": ["text"],
    }  # fmt: skip
    assert schema.parse_completion(COMPLETION | neutral, LIMITS).settings.unknown == ()


def test_unknown_fields_are_named_wherever_they_are() -> None:
    body = {"stream": True, "stream_options": {"include_usage": True, "colour": 1}, "size": 2}
    assert schema.parse_completion(COMPLETION | body, LIMITS).settings.unknown == (
        "size", "stream_options.colour",
    )  # fmt: skip
    messages = [{"role": "user", "content": "a", "name": "Ann"}] * 2
    settings = schema.parse_chat({"messages": messages}, LIMITS).settings
    assert settings.unknown == ("messages.name",)


def test_a_wrong_limit_is_named_also_beside_another_one() -> None:
    for wrong in (-1, "4", True):
        body = CHAT | {"max_tokens": 4, "max_completion_tokens": wrong}
        with pytest.raises(ApiError, match="max_completion_tokens is"):
            schema.parse_chat(body, LIMITS)
    body = CHAT | {"max_tokens": 4, "max_completion_tokens": 4.0}
    assert schema.parse_chat(body, LIMITS).settings.max_tokens == 4


def test_a_seed_that_is_not_given_is_another_one_each_time() -> None:
    seeds = {schema.parse_completion(COMPLETION, LIMITS).settings.sampling.seed for _ in range(5)}
    assert len(seeds) == 5


def test_the_number_of_texts_is_bounded_together() -> None:
    with pytest.raises(ApiError, match="prompts x n"):
        schema.parse_completion({"prompt": ["a"] * 100, "n": 100}, LIMITS)


BODIES = {
    "no JSON": b"{",
    "nothing": b"",
    "not UTF-8": b'{"prompt": "\xff"}',
    "UTF-16": '{"prompt": "a"}'.encode("utf-16"),
    "NaN": b'{"temperature": NaN}',
    "Infinity": b'{"temperature": -Infinity}',
    "deep lists": b"[" * 100 + b"]" * 100,
    "very deep lists": b"[" * 100_000 + b"]" * 100_000,
    "very deep objects": b'{"a":' * 50_000 + b"1" + b"}" * 50_000,
    "many digits": b'{"n": ' + b"9" * 5000 + b"}",
    "the same key twice": b'{"n": 1, "n": 2}',
    "the same key twice inside": b'{"a": [{"b": {"c": 1, "c": 1}}]}',
}


@pytest.mark.parametrize("body", BODIES.values(), ids=BODIES)
def test_a_body_that_is_no_plain_json_is_refused(body: bytes) -> None:
    with pytest.raises(ApiError) as caught:
        parse_json(body, LIMITS.json_depth)
    assert caught.value.status == 400
    assert len(str(caught.value)) < 300


def test_json_of_the_allowed_depth_is_read() -> None:
    for depth, fits in ((LIMITS.json_depth, True), (LIMITS.json_depth + 1, False)):
        body = b"[" * depth + b"]" * depth
        if fits:
            parse_json(body, LIMITS.json_depth)
        else:
            with pytest.raises(ApiError, match="nested"):
                parse_json(body, LIMITS.json_depth)


def test_an_infinite_float_is_no_number() -> None:
    assert math.isinf(parse_json(b"[1e999]", 3)[0])
    with pytest.raises(ApiError, match="temperature"):
        schema.parse_completion(COMPLETION | {"temperature": 1e999}, LIMITS)
