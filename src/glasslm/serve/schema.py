"""The requests of the API, checked by hand: a wrong value is an ApiError that says what fits.

Names, ranges and defaults are those of OpenAI's reference; top_k, min_p and repetition_penalty are
those of glasslm. What depends on the model (vocabulary, context) is checked in prompts.py.
"""

from __future__ import annotations

import json
import secrets
from dataclasses import dataclass
from typing import Any

from glasslm.data.unknown_characters import find_surrogate
from glasslm.errors import InputError
from glasslm.inference.sampling import (
    MAX_REPETITION_PENALTY,
    MIN_REPETITION_PENALTY,
    Sampling,
)
from glasslm.serve.api_error import ApiError, describe_value, wrong_value
from glasslm.serve.fields import Fields, as_integer, as_number
from glasslm.serve.limits import Limits

DEFAULT_COMPLETION_TOKENS = 16  # OpenAI's default of /v1/completions
MAX_COMPLETION_LOGPROBS, MAX_CHAT_LOGPROBS = 5, 20  # OpenAI's
MAX_BIAS = 100.0
MESSAGE_ROLES = ("system", "developer", "user", "assistant", "tool")  # OpenAI's
MAX_SEED = 2**64 - 1

# Fields of OpenAI's API that would change the text and are not offered, with their neutral values.
UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "best_of": (1,),
    "suffix": ("",),
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "tools": ([],),
    "functions": ([],),
    "tool_choice": ("none", "auto"),
    "function_call": ("none", "auto"),
    "modalities": (["text"],),
    "audio": (),
    "prediction": (),
}

PromptField = str | list[int]


@dataclass(frozen=True)
class ResponseFormat:
    """The grammar that a text must follow; `schema` is that of json_schema."""

    kind: str  # json_object or json_schema
    schema: Any = None


@dataclass(frozen=True)
class TextSettings:
    """How the texts of a request are generated and returned."""

    model: str | None  # None: the only one that is served
    max_tokens: int | None  # None: to the end of the context
    sampling: Sampling
    n: int
    stop: tuple[str, ...]
    logit_bias: dict[int, float]  # token -> what is added to its logit
    response_format: ResponseFormat | None
    top_logprobs: int | None  # None: no log-probabilities at all
    stream: bool
    include_usage: bool
    unknown: tuple[str, ...]  # fields that are ignored


@dataclass(frozen=True)
class CompletionRequest:
    """POST /v1/completions."""

    settings: TextSettings
    prompts: list[PromptField]
    echo: bool


@dataclass(frozen=True)
class ChatRequest:
    """POST /v1/chat/completions: `messages` have a role and a text each."""

    settings: TextSettings
    messages: list[dict[str, str]]


@dataclass(frozen=True)
class TokenizeRequest:
    """POST /tokenize."""

    model: str | None
    text: str
    unknown: tuple[str, ...]


@dataclass(frozen=True)
class DetokenizeRequest:
    """POST /detokenize."""

    model: str | None
    ids: list[int]
    unknown: tuple[str, ...]


def parse_completion(content: object, limits: Limits) -> CompletionRequest:
    """The request of /v1/completions."""
    fields = Fields(content)
    prompts = _read_prompts(fields.get("prompt"), limits)
    echo = fields.boolean("echo", False)
    top_logprobs = None
    if fields.get("logprobs") is not None:
        top_logprobs = fields.integer("logprobs", 0, 0, MAX_COMPLETION_LOGPROBS)
    max_tokens = fields.integer("max_tokens", DEFAULT_COMPLETION_TOKENS, 0, limits.max_tokens)
    settings = _read_settings(fields, limits, max_tokens, top_logprobs)
    if len(prompts) * settings.n > limits.texts:
        raise wrong_value(
            "n", settings.n, f"at most {limits.texts} texts (prompts x n) in a request"
        )
    return CompletionRequest(settings, prompts, echo)


def parse_chat(content: object, limits: Limits) -> ChatRequest:
    """The request of /v1/chat/completions."""
    fields = Fields(content)
    messages = _read_messages(fields)
    top_logprobs = None
    if fields.boolean("logprobs", False):
        top_logprobs = fields.integer("top_logprobs", 0, 0, MAX_CHAT_LOGPROBS)
    elif fields.get("top_logprobs") is not None:
        raise ApiError(
            400,
            "top_logprobs is given without logprobs: expected logprobs true",
            param="top_logprobs",
            code="invalid_value",
        )
    limits_given = {
        fields.integer(name, 0, 0, limits.max_tokens)
        for name in ("max_tokens", "max_completion_tokens")
        if fields.get(name) is not None
    }
    if len(limits_given) == 2:
        raise ApiError(
            400,
            "max_tokens and max_completion_tokens differ: expected one of them",
            param="max_tokens",
            code="invalid_value",
        )
    max_tokens = limits_given.pop() if limits_given else None
    return ChatRequest(_read_settings(fields, limits, max_tokens, top_logprobs), messages)


def parse_tokenize(content: object, limits: Limits) -> TokenizeRequest:
    """The request of /tokenize."""
    fields = Fields(content)
    model, text = fields.text("model"), fields.text("text")
    if text is None:
        raise _missing("text", "a string")
    return TokenizeRequest(model, text, tuple(fields.unknown))


def parse_detokenize(content: object, limits: Limits) -> DetokenizeRequest:
    """The request of /detokenize."""
    fields = Fields(content)
    model, ids = fields.text("model"), fields.get("ids")
    if ids is None:
        raise _missing("ids", "a list of token ids")
    if not isinstance(ids, list):
        raise wrong_value("ids", ids, "a list of token ids")
    return DetokenizeRequest(model, _read_ids(ids, "ids"), tuple(fields.unknown))


def _read_settings(
    fields: Fields, limits: Limits, max_tokens: int | None, top_logprobs: int | None
) -> TextSettings:
    model = fields.text("model")
    n = fields.integer("n", 1, 1, limits.choices)
    stream = fields.boolean("stream", False)
    include_usage = _read_stream_options(fields, stream)
    sampling = _read_sampling(fields)
    stop = _read_stop(fields.get("stop"), limits)
    bias = _read_logit_bias(fields.get("logit_bias"), limits)
    response_format = _read_response_format(fields.get("response_format"), limits)
    if stop and response_format:
        raise ApiError(
            400,
            "stop could end a text before its JSON is complete: leave out stop or response_format",
            param="stop",
            code="invalid_value",
        )
    fields.get("user")  # names the user of a client: it changes nothing here
    _refuse_unsupported(fields)
    return TextSettings(
        model, max_tokens, sampling, n, stop, bias, response_format, top_logprobs, stream,
        include_usage, tuple(fields.unknown),
    )  # fmt: skip


def _read_sampling(fields: Fields) -> Sampling:
    seed = fields.get("seed")
    try:
        return Sampling(
            temperature=fields.number("temperature", 1.0, 0, 100),
            top_k=fields.integer("top_k", 0, 0, 2**31),
            top_p=fields.number("top_p", 1.0, 0, 1),
            min_p=fields.number("min_p", 0.0, 0, 1),
            repetition_penalty=fields.number(
                "repetition_penalty", 1.0, MIN_REPETITION_PENALTY, MAX_REPETITION_PENALTY
            ),
            seed=secrets.randbits(63) if seed is None else fields.integer("seed", 0, 0, MAX_SEED),
        )
    except InputError as error:
        raise ApiError(400, str(error), code="invalid_value") from None


def _read_stream_options(fields: Fields, stream: bool) -> bool:
    """include_usage of stream_options."""
    options = fields.get("stream_options")
    if options is None:
        return False
    if not isinstance(options, dict):
        raise wrong_value("stream_options", options, 'an object such as {"include_usage": true}')
    if not stream:
        raise ApiError(
            400,
            "stream_options is given without stream: expected stream true",
            param="stream_options",
            code="invalid_value",
        )
    inner = Fields(options)
    try:
        include_usage = inner.boolean("include_usage", False)
    except ApiError:
        value = options["include_usage"]
        raise wrong_value("stream_options.include_usage", value, "true or false") from None
    fields.note_unknown("stream_options", inner.unknown)
    return include_usage


def _read_stop(value: object, limits: Limits) -> tuple[str, ...]:
    if value is None:
        return ()
    stops = [value] if isinstance(value, str) else value
    expected = (
        f"a string, or a list of at most {limits.stops} strings, each of 1 to "
        f"{limits.stop_chars:,} characters"
    )
    if not isinstance(stops, list) or len(stops) > limits.stops:
        raise wrong_value("stop", value, expected)
    for stop in stops:
        if not isinstance(stop, str) or not 1 <= len(stop) <= limits.stop_chars:
            raise wrong_value("stop", stop, expected)
        if find_surrogate(stop):
            raise wrong_value("stop", stop, "text without half of a surrogate pair")
    return tuple(stops)


def _read_logit_bias(value: object, limits: Limits) -> dict[int, float]:
    if value is None:
        return {}
    expected = (
        f'an object of at most {limits.biases:,} token ids such as "97", each with a number from '
        f"{-MAX_BIAS:g} to {MAX_BIAS:g}"
    )
    if not isinstance(value, dict) or len(value) > limits.biases:
        raise wrong_value("logit_bias", value, expected)
    biases = {}
    for key, bias in value.items():
        number = as_number(bias)
        # One spelling for each id: of 97 and 097, one bias would be lost.
        if not (key.isascii() and key.isdigit() and len(key) <= 10 and str(int(key)) == key):
            raise wrong_value("logit_bias", key, expected)
        if number is None or abs(number) > MAX_BIAS:
            raise wrong_value("logit_bias", bias, expected)
        biases[int(key)] = number
    return biases


def _read_response_format(value: object, limits: Limits) -> ResponseFormat | None:
    if value is None:
        return None
    kind = value.get("type") if isinstance(value, dict) else None
    if not isinstance(value, dict) or kind not in ("text", "json_object", "json_schema"):
        shown = kind if isinstance(value, dict) else value
        raise wrong_value(
            "response_format", shown, '{"type": "text"}, "json_object" or "json_schema"'
        )
    if kind == "text":
        return None
    if kind == "json_object":
        return ResponseFormat(kind)
    description = value.get("json_schema")
    schema = description.get("schema") if isinstance(description, dict) else None
    if not isinstance(schema, dict):
        raise wrong_value(
            "response_format.json_schema", description, '{"name": NAME, "schema": a JSON schema}'
        )
    if len(json.dumps(schema)) > limits.schema_bytes:
        expected = f"at most {limits.schema_bytes:,} bytes"
        raise wrong_value("response_format.json_schema", schema, expected)
    return ResponseFormat(kind, schema)


def _read_prompts(value: object, limits: Limits) -> list[PromptField]:
    expected = "a string, a list of strings, a list of token ids, or a list of such lists"
    if value is None:
        raise _missing("prompt", expected)
    if isinstance(value, str):
        return [value]
    if not isinstance(value, list) or not value:
        raise wrong_value("prompt", value, expected)
    if as_integer(value[0]) is not None:
        return [_read_ids(value, "prompt")]
    if len(value) > limits.prompts:
        raise wrong_value("prompt", value, f"at most {limits.prompts} prompts in a request")
    if all(isinstance(prompt, str) for prompt in value):
        return list(value)
    if all(isinstance(prompt, list) for prompt in value):
        return [_read_ids(prompt, "prompt") for prompt in value]
    raise wrong_value("prompt", value, expected)


def _read_ids(values: list[Any], param: str) -> list[int]:
    for value in values:
        if type(value) is not int or not 0 <= value < 2**31:
            raise wrong_value(param, value, "token ids, integers from 0")
    return values


def _read_messages(fields: Fields) -> list[dict[str, str]]:
    value = fields.get("messages")
    expected = 'a list of messages such as {"role": "user", "content": "Hello"}'
    if value is None:
        raise _missing("messages", expected)
    if not isinstance(value, list) or not value:
        raise wrong_value("messages", value, expected)
    messages = []
    for index, message in enumerate(value):
        where = f"messages[{index}]"
        if not isinstance(message, dict):
            raise wrong_value(where, message, expected)
        role = message.get("role")
        if role not in MESSAGE_ROLES:
            expected = "one of " + ", ".join(f'"{name}"' for name in MESSAGE_ROLES)
            raise wrong_value(f"{where}.role", role, expected)
        content = message.get("content")
        messages.append({"role": role, "content": _read_content(content, f"{where}.content")})
        fields.note_unknown("messages", message.keys() - {"role", "content"})
    return messages


def _read_content(value: object, param: str) -> str:
    """The text of a message: a string, or parts of type text."""
    if isinstance(value, str):
        return value
    expected = 'a string, or a list of {"type": "text", "text": TEXT}: the models read only text'
    if not isinstance(value, list):
        raise wrong_value(param, value, expected)
    texts = []
    for part in value:
        text = part.get("text") if isinstance(part, dict) and part.get("type") == "text" else None
        if not isinstance(text, str):
            raise wrong_value(param, part, expected)
        texts.append(text)
    return "".join(texts)


def _refuse_unsupported(fields: Fields) -> None:
    for name, neutral in UNSUPPORTED.items():
        value = fields.get(name)
        if value is None or any(value == each and type(value) is not bool for each in neutral):
            continue
        shown = describe_value(value)
        raise ApiError(
            400,
            f"{name} is {shown}: glasslm does not offer it. Leave it out",
            param=name,
            code="unsupported_parameter",
        )


def _missing(param: str, expected: str) -> ApiError:
    return ApiError(
        400, f"{param} is missing: expected {expected}", param=param, code="missing_parameter"
    )
