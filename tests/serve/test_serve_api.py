"""The API as clients use it: the real openai client, and the shapes of its reference."""

import concurrent.futures
import json
import math
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

pytest.importorskip("starlette")
pytest.importorskip("openai")
pytest.importorskip("httpx")

import openai
from server_process import ServerProcess, make_byte_run, make_run, read_events, serving

from glasslm.inference.sampling import Sampling
from glasslm.inference.trained_model import Model, load_model

PROMPT = "the cat"


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("runs")
    return {"char": make_run(folder / "char"), "byte": make_byte_run(folder / "byte")}


@pytest.fixture(scope="module")
def server(folders: dict[str, Any]) -> Iterator[ServerProcess]:
    with serving(*folders.values()) as process:
        yield process


@pytest.fixture(scope="module")
def client(server: ServerProcess) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture(scope="module")
def char_model(folders: dict[str, Any]) -> Model:
    return load_model(folders["char"], engine="numpy", threads=1)


@pytest.fixture(scope="module")
def byte_model(folders: dict[str, Any]) -> Model:
    return load_model(folders["byte"], engine="numpy", threads=1)


# -- models and tokens ---------------------------------------------------------------------------


def test_the_models_are_listed(client: openai.OpenAI) -> None:
    assert sorted(model.id for model in client.models.list()) == ["byte", "char"]
    assert client.models.retrieve("char").id == "char"
    with pytest.raises(openai.NotFoundError, match="expected one of"):
        client.models.retrieve("nothing")


def test_tokenize_and_detokenize_are_inverse(server: ServerProcess) -> None:
    text = "é is two bytes"
    answer = server.post("/tokenize", model="byte", text=text).json()
    assert answer["ids"] == list(text.encode())
    assert b"".join(bytes(piece["bytes"]) for piece in answer["pieces"]) == text.encode()
    assert answer["pieces"][0] == {"text": "\\xc3", "bytes": [0xC3]}
    assert server.post("/detokenize", model="byte", ids=answer["ids"]).json() == {"text": text}


# -- completions ---------------------------------------------------------------------------------


def test_a_completion_is_the_text_of_generate(client: openai.OpenAI, char_model: Model) -> None:
    answer = client.completions.create(
        model="char", prompt=PROMPT, max_tokens=30, temperature=0.7, top_p=0.9, seed=5
    )
    expected = char_model.generate(PROMPT, 30, temperature=0.7, top_p=0.9, seed=5)
    assert answer.choices[0].text == expected
    assert answer.choices[0].finish_reason == "length"
    assert answer.object == "text_completion"
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (7, 30)
    assert answer.usage.total_tokens == 37


def test_the_defaults_are_those_of_openai(client: openai.OpenAI, char_model: Model) -> None:
    answer = client.completions.create(model="char", prompt=PROMPT, seed=3)
    assert answer.choices[0].text == char_model.generate(PROMPT, 16, temperature=1.0, seed=3)


def test_a_stream_joins_to_the_same_text(client: openai.OpenAI) -> None:
    settings: dict[str, Any] = {"model": "char", "prompt": PROMPT, "max_tokens": 40, "seed": 1}
    whole = client.completions.create(**settings)
    chunks = list(
        client.completions.create(**settings, stream=True, stream_options={"include_usage": True})
    )
    assert len(chunks) >= 3
    assert "".join(c.choices[0].text for c in chunks if c.choices) == whole.choices[0].text
    finishes = [c.choices[0].finish_reason for c in chunks if c.choices]
    assert finishes[-1] == "length"
    assert set(finishes[:-1]) <= {None}
    assert chunks[-1].choices == []
    assert chunks[-1].usage == whole.usage
    assert len({c.id for c in chunks}) == 1


def test_several_prompts_and_choices_have_the_index_of_openai(
    client: openai.OpenAI, char_model: Model
) -> None:
    prompts = ["the cat", "a dog"]
    answer = client.completions.create(model="char", prompt=prompts, n=2, max_tokens=8, seed=9)
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    pieces = char_model.pieces(prompts, 8, sampling=Sampling(1.0, seed=9), samples=2)
    texts = [""] * 4
    for piece in pieces:
        texts[2 * piece.prompt + piece.sample] += piece.text
    assert [choice.text for choice in answer.choices] == texts


def test_prompts_may_be_ids(server: ServerProcess, char_model: Model) -> None:
    ids = char_model.tokenizer.encode(PROMPT).tolist()
    settings = {"model": "char", "max_tokens": 5, "seed": 0}
    text = server.complete(**settings, prompt=PROMPT)["choices"][0]["text"]
    for prompt, n in ((ids, 1), ([ids, ids], 2)):
        choices = server.complete(**settings, prompt=prompt)["choices"]
        assert [choice["text"] for choice in choices] == [text] * n


def test_a_stream_of_several_choices(server: ServerProcess) -> None:
    body = {"model": "char", "prompt": ["the", "a"], "n": 2, "max_tokens": 12, "seed": 2}
    whole = server.complete(**body)
    texts, finished = [""] * 4, set()
    for event in read_events(server.post("/v1/completions", **body, stream=True)):
        for choice in event["choices"]:
            assert choice["index"] not in finished
            texts[choice["index"]] += choice["text"]
            if choice["finish_reason"]:
                finished.add(choice["index"])
    assert texts == [choice["text"] for choice in whole["choices"]]
    assert finished == {0, 1, 2, 3}


def test_explicit_zeros_are_obeyed(server: ServerProcess, char_model: Model) -> None:
    answer = server.complete(
        model="char", prompt=PROMPT, temperature=0, max_tokens=20, min_p=0, top_k=0, logprobs=0,
        seed=0, repetition_penalty=1,
    )  # fmt: skip
    (choice,) = answer["choices"]
    assert choice["text"] == char_model.generate(PROMPT, 20, temperature=0)
    assert all(len(top) == 1 for top in choice["logprobs"]["top_logprobs"])
    (empty,) = server.complete(model="char", prompt=PROMPT, max_tokens=0)["choices"]
    assert (empty["text"], empty["finish_reason"]) == ("", "length")


def test_null_means_the_default(server: ServerProcess) -> None:
    names = [
        "max_tokens",
        "temperature",
        "top_p",
        "top_k",
        "min_p",
        "repetition_penalty",
        "stop",
        "n",
        "stream",
        "stream_options",
        "logprobs",
        "echo",
        "logit_bias",
        "response_format",
        "user",
        "suffix",
        "best_of",
        "frequency_penalty",
        "model",
    ]
    nulls = dict.fromkeys(names) | {"model": "char"}
    assert (
        server.complete(prompt=PROMPT, seed=1, **nulls)["choices"]
        == (server.complete(model="char", prompt=PROMPT, seed=1)["choices"])
    )


@pytest.mark.parametrize("stream", [False, True])
def test_a_stop_string_ends_the_text_and_is_no_part_of_it(
    server: ServerProcess, stream: bool
) -> None:
    body = {"model": "char", "prompt": PROMPT, "max_tokens": 60, "seed": 4}
    text = server.complete(**body)["choices"][0]["text"]
    stop = text[10:13]
    response = server.post(
        "/v1/completions", **body, stop=["never", stop], stream=stream, logprobs=1
    )
    if stream:
        choices = [event["choices"][0] for event in read_events(response)]
    else:
        choices = response.json()["choices"]
    assert "".join(choice["text"] for choice in choices) == text[: text.index(stop)]
    assert choices[-1]["finish_reason"] == "stop"
    tokens = [token for choice in choices for token in choice["logprobs"]["tokens"]]
    assert "".join(tokens) == text[: text.index(stop)]


def test_a_bias_forbids_and_forces_tokens(server: ServerProcess, char_model: Model) -> None:
    (token,) = char_model.tokenizer.encode("z").tolist()
    body = {"model": "char", "prompt": PROMPT, "max_tokens": 12, "seed": 1}
    forced = server.complete(**body, logit_bias={str(token): 100})["choices"][0]["text"]
    assert forced == "z" * 12
    others = set(range(char_model.tokenizer.vocab_size)) - {token}
    forbidden = server.complete(**body, logit_bias={str(i): -100 for i in others})
    assert set(forbidden["choices"][0]["text"]) == {"z"}


# -- log-probabilities ---------------------------------------------------------------------------


def expected_logprobs(model: Model, text: str) -> np.ndarray:
    """(T, V): log-probabilities after each token of `text`, computed in one pass."""
    ids = model.tokenizer.encode(text).astype(np.int64)
    cache = model.engine.new_cache(1, len(ids))
    logits = model.engine.logits(ids[None], cache, np.array([len(ids)]), every=True)[0]
    scores = logits.astype(np.float64)
    return scores - np.log(np.exp(scores).sum(-1, keepdims=True))


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("max_tokens", [0, 6])
def test_logprobs_of_a_completion_with_echo(
    server: ServerProcess, char_model: Model, stream: bool, max_tokens: int
) -> None:
    body = {
        "model": "char", "prompt": PROMPT, "max_tokens": max_tokens, "logprobs": 2, "echo": True,
        "temperature": 0.5, "seed": 1, "stream": stream,
    }  # fmt: skip
    response = server.post("/v1/completions", **body)
    if stream:
        choices = [event["choices"][0] for event in read_events(response)]
    else:
        choices = response.json()["choices"]
    text = "".join(choice["text"] for choice in choices)
    assert text.startswith(PROMPT)
    assert len(text) == len(PROMPT) + max_tokens
    names = ("tokens", "token_logprobs", "top_logprobs", "text_offset")
    joined = {name: [x for c in choices for x in c["logprobs"][name]] for name in names}
    assert joined["tokens"] == list(text)
    assert joined["text_offset"] == list(range(len(text)))
    assert joined["token_logprobs"][0] is joined["top_logprobs"][0] is None
    expected = expected_logprobs(char_model, text)
    ids = char_model.tokenizer.encode(text)
    for place in range(1, len(text)):
        row, top = expected[place - 1], joined["top_logprobs"][place]
        assert joined["token_logprobs"][place] == pytest.approx(row[ids[place]], abs=1e-5)
        best = np.sort(row)[::-1][:2]
        np.testing.assert_allclose(sorted(top.values(), reverse=True)[:2], best, atol=1e-5)
        assert text[place] in top
        assert len(top) <= 3


def test_logprobs_without_echo_begin_with_the_new_text(server: ServerProcess) -> None:
    body = {"model": "char", "prompt": PROMPT, "max_tokens": 5, "seed": 1, "logprobs": 1}
    (choice,) = server.complete(**body)["choices"]
    (echoed,) = server.complete(**body, echo=True)["choices"]
    assert choice["logprobs"]["text_offset"] == [0, 1, 2, 3, 4]
    np.testing.assert_allclose(
        choice["logprobs"]["token_logprobs"], echoed["logprobs"]["token_logprobs"][7:], atol=1e-5
    )


@pytest.mark.parametrize("stream", [False, True])
def test_bytes_that_are_no_character(
    server: ServerProcess, byte_model: Model, stream: bool
) -> None:
    """A random model over bytes writes many halves of characters."""
    body = {
        "model": "byte",
        "prompt": "é",
        "max_tokens": 50,
        "seed": 3,
        "logprobs": 0,
        "echo": True,
    }
    response = server.post("/v1/completions", **body, stream=stream)
    choices = (
        [event["choices"][0] for event in read_events(response)]
        if stream
        else response.json()["choices"]
    )
    text = "".join(choice["text"] for choice in choices)
    tokens = [token for choice in choices for token in choice["logprobs"]["tokens"]]
    spelled = b"".join(
        bytes.fromhex(token.removeprefix("bytes:").replace("\\x", ""))
        if token.startswith("bytes:\\x")
        else token.encode()
        for token in tokens
    )
    assert len(tokens) == 52
    assert tokens[:2] == ["bytes:\\xc3", "bytes:\\xa9"]
    assert spelled.decode("utf-8", "replace") == text
    assert text == "é" + byte_model.generate("é", 50, temperature=1.0, seed=3)


def test_the_bits_of_an_answer_do_not_depend_on_the_neighbours(server: ServerProcess) -> None:
    body = {"model": "char", "prompt": PROMPT, "max_tokens": 25, "seed": 8, "logprobs": 5}
    alone = server.complete(**body, echo=True)["choices"]
    for n in (7, 40):
        with concurrent.futures.ThreadPoolExecutor(2) as pool:
            others = {"prompt": ["a dog sees", "z"], "n": n // 2, "max_tokens": 60, "model": "char"}
            noise = pool.submit(server.complete, **others)
            assert server.complete(**body, echo=True)["choices"] == alone
            noise.result()


# -- JSON ----------------------------------------------------------------------------------------


def test_json_object(client: openai.OpenAI) -> None:
    for seed in range(3):
        answer = client.completions.create(
            model="byte", prompt="x", max_tokens=60, seed=seed,
            extra_body={"response_format": {"type": "json_object"}},
        )  # fmt: skip
        assert isinstance(json.loads(answer.choices[0].text), dict | list)
        assert answer.choices[0].finish_reason == "stop"


def test_json_schema(server: ServerProcess) -> None:
    pytest.importorskip("llguidance")
    schema = {
        "type": "object",
        "properties": {"age": {"type": "integer", "minimum": 0, "maximum": 99}},
        "required": ["age"],
        "additionalProperties": False,
    }
    wanted = {"type": "json_schema", "json_schema": {"name": "person", "schema": schema}}
    (choice,) = server.complete(
        model="byte", prompt="x", max_tokens=60, seed=1, response_format=wanted
    )["choices"]
    assert 0 <= json.loads(choice["text"])["age"] <= 99
    assert choice["finish_reason"] == "stop"
    wanted["json_schema"]["schema"] = {"type": "nonsense"}
    response = server.post("/v1/completions", model="byte", prompt="x", response_format=wanted)
    assert response.status_code == 400
    assert "nonsense" in response.json()["error"]["message"]
    wanted["json_schema"]["schema"] = {"enum": [1, 12]}  # the model has no token that ends a 1
    response = server.post("/v1/completions", model="byte", prompt="x", response_format=wanted)
    assert response.status_code == 400
    assert "ask for an object or array" in response.json()["error"]["message"]


def test_a_vocabulary_without_brackets_cannot_write_json(server: ServerProcess) -> None:
    response = server.post(
        "/v1/completions", model="char", prompt="x", response_format={"type": "json_object"}
    )
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "response_format"


# -- errors --------------------------------------------------------------------------------------


def test_errors_are_those_of_openai(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="temperature is -1") as caught:
        client.completions.create(model="char", prompt=PROMPT, temperature=-1)
    assert caught.value.param == "temperature"
    assert caught.value.type == "invalid_request_error"
    with pytest.raises(openai.NotFoundError) as missing:
        client.completions.create(model="chair", prompt=PROMPT)
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError, match="/v1/completions"):
        client.chat.completions.create(model="char", messages=[{"role": "user", "content": "a"}])


@pytest.mark.parametrize(
    ("body", "param", "words"),
    [
        ({}, "prompt", "missing"),
        ({"prompt": "a", "max_tokens": True}, "max_tokens", "integer"),
        ({"prompt": "Ü"}, "prompt", "does not know"),
        ({"prompt": [1, 999]}, "prompt", "vocabulary"),
        ({"prompt": "a" * 65, "max_tokens": 1}, "prompt", "reads at most 64"),
        ({"prompt": "a", "logit_bias": {"30": 1}}, "logit_bias", "below 30"),
    ],
)
def test_a_wrong_value_is_named(
    server: ServerProcess, body: dict[str, Any], param: str, words: str
) -> None:
    response = server.post("/v1/completions", model="char", **body)
    error = response.json()["error"]
    assert response.status_code == 400
    assert set(error) == {"message", "type", "param", "code"}
    assert error["param"] == param
    assert words in error["message"]


def test_unknown_fields_are_named_in_a_header(server: ServerProcess) -> None:
    body = {"model": "char", "prompt": "a", "max_tokens": 1, "colour": 1, "x\r\nSet-Cookie: é": 2}
    for stream in (False, True):
        response = server.post("/v1/completions", **body, stream=stream)
        assert response.status_code == 200
        assert "colour" in response.headers["warning"]
        assert "set-cookie" not in response.headers
    assert "warning" not in server.post("/v1/completions", model="char", prompt="a").headers


def test_paths_and_methods(server: ServerProcess) -> None:
    for path in (
        "/nothing",
        "/v1/completions/",
        "/v1/../../etc/passwd",
        "/v1/models/%2e%2e%2fetc%2fpasswd",
    ):
        response = server.client.get(path)
        assert response.status_code == 404
        assert "error" in response.json()
    response = server.client.get("/v1/completions")
    assert response.status_code == 405
    assert response.headers["allow"] == "POST"
    assert server.client.get("/health").json() == {"status": "ok"}


def test_metrics_count_the_tokens(server: ServerProcess) -> None:
    before = server.metric("glasslm_tokens_total")
    server.complete(model="char", prompt=PROMPT, max_tokens=9)
    assert server.metric("glasslm_tokens_total") - before == 7 + 9
    assert server.metric("glasslm_running") == 0
    assert math.isfinite(server.metric("glasslm_queue_age_seconds"))


def test_the_log_has_a_line_a_request_and_none_of_its_text(server: ServerProcess) -> None:
    server.complete(model="char", prompt="secret words", max_tokens=3)
    server.client.get("/%1b[31m%0a")
    time.sleep(0.2)  # the log is written in the background
    assert not any("secret" in line or "\x1b" in line for line in server.log)
    assert any("/v1/completions 200" in line and "generated=3" in line for line in server.log)
