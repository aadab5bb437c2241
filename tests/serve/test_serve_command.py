"""The command: who may use the server, its names, what it refuses to start, newer checkpoints."""

import asyncio
import io
import json
import socket
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("starlette")
pytest.importorskip("httpx")

import httpx
from server_process import ServerProcess, make_run, save_step, serving, serving_with_limits

from glasslm.cli import main
from glasslm.serve import addresses
from glasslm.serve.server import bind

KEY = "key-with.signs_+/="


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("runs")
    return [make_run(folder / "a" / "final"), make_run(folder / "b" / "final", n_layers=2)]


@pytest.fixture(scope="module")
def server(runs: list[Path]) -> Iterator[ServerProcess]:
    """With a key, an allowed origin, newer checkpoints taken up, and two runs of one name."""
    flags = ("--api-key", KEY, "--allow-origin", "https://example.org", "--follow")
    with serving(*runs, *flags) as process:
        process.client.headers["Authorization"] = f"Bearer {KEY}"
        yield process


# -- who may use it ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "given", [None, b"", b"Bearer", b"Bearer wrong", b"Basic abc", b"\xff\xfe"]
)
def test_a_request_without_the_key_is_refused(server: ServerProcess, given: bytes | None) -> None:
    headers = {} if given is None else {"Authorization": given}
    response = httpx.get(f"{server.url}/v1/models", headers=headers, trust_env=False)
    assert response.status_code == 401
    assert response.json()["error"]["code"] == "invalid_api_key"
    assert response.headers["www-authenticate"] == "Bearer"
    assert httpx.get(f"{server.url}/health", trust_env=False).status_code == 200
    assert server.client.get("/v1/models").status_code == 200


def test_pages_of_one_origin_are_let_in(server: ServerProcess) -> None:
    for origin, status in (("https://example.org", 200), ("https://evil.org", 403), ("null", 403)):
        response = server.client.get("/v1/models", headers={"Origin": origin})
        assert response.status_code == status
        is_allowed = response.headers.get("access-control-allow-origin") == origin
        assert is_allowed == (status == 200)
    asked = "authorization,content-type,x-stainless-lang,x-stainless-os"  # by OpenAI's JavaScript
    for origin, status in (("https://example.org", 200), ("https://evil.org", 400)):
        preflight = httpx.options(
            f"{server.url}/v1/completions",
            headers={
                "Origin": origin,
                "Access-Control-Request-Method": "POST",
                "Access-Control-Request-Headers": asked,
            },
            trust_env=False,
        )
        assert preflight.status_code == status
        assert preflight.headers["access-control-allow-headers"] == asked


@pytest.fixture(scope="module")
def open_server(runs: list[Path]) -> Iterator[ServerProcess]:
    with serving(runs[0]) as process:
        yield process


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("localhost", 200), ("127.0.0.1:8000", 200), ("[::1]:80", 200), ("LOCALHOST:1", 200),
        ("evil.org", 403), ("127.0.0.1.evil.org", 403), ("localhost.evil.org:8000", 403), ("", 403),
    ],
)  # fmt: skip
def test_a_foreign_host_name_is_refused_on_loopback(
    open_server: ServerProcess, host: str, status: int
) -> None:
    response = open_server.client.get("/v1/models", headers={"Host": host})
    assert response.status_code == status


@pytest.mark.parametrize(
    ("target", "status"),
    [
        ("http://127.0.0.1/health", 200), ("HTTP://localhost:80/v1/models", 200),
        ("http://localhost", 200), ("http://evil.org/health", 403), ("ftp://localhost/health", 404),
        ("http://localhost@evil.org/health", 403), ("http:///health", 403),
    ],
)  # fmt: skip
def test_an_absolute_target_is_its_path_and_its_host(
    open_server: ServerProcess, target: str, status: int
) -> None:
    with socket.create_connection(("127.0.0.1", open_server.port), timeout=10) as client:
        client.sendall(f"GET {target} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
        assert int(client.recv(4096).split()[1]) == status


def test_without_a_flag_no_page_is_let_in(open_server: ServerProcess) -> None:
    body = b'{"prompt": "a"}'
    for origin, status in (("https://evil.org", 403), (open_server.url, 200)):
        response = open_server.client.post(
            "/v1/completions",
            content=body,
            headers={"Origin": origin, "Content-Type": "text/plain"},
        )
        assert response.status_code == status
        assert "access-control-allow-origin" not in response.headers


def test_loopback_is_told_from_other_addresses() -> None:
    assert all(map(addresses.is_loopback, ("127.0.0.1", "127.9.9.9", "::1", "localhost.")))
    assert not any(map(addresses.is_loopback, ("0.0.0.0", "::", "10.0.0.1", "", "example.org")))


# -- names and newer checkpoints -----------------------------------------------------------------


def test_runs_of_the_same_name_get_their_parents_name(server: ServerProcess) -> None:
    names = [model["id"] for model in server.client.get("/v1/models").json()["data"]]
    assert names == ["a/final", "b/final"]
    assert server.client.get("/v1/models/b/final").json()["id"] == "b/final"
    assert server.complete(model="a/final", prompt="a")["model"] == "a/final"
    response = server.post("/v1/completions", prompt="a")
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "model"


def test_a_newer_checkpoint_is_taken_up_and_requests_under_way_keep_the_old(
    server: ServerProcess, runs: list[Path]
) -> None:
    body: dict[str, Any] = {"model": "a/final", "prompt": "a", "temperature": 0}
    old = server.complete(**body, max_tokens=20)
    assert "-step0-" in old["system_fingerprint"]
    long: dict[str, Any] = {}
    thread = threading.Thread(target=lambda: long.update(server.complete(**body, max_tokens=4000)))
    thread.start()
    time.sleep(0.1)
    save_step(runs[0], 5)
    reloaded = server.client.post("/v1/models/a/final/reload").json()
    assert reloaded["step"] == 5
    new = server.complete(**body, max_tokens=20)
    assert "-step5-" in new["system_fingerprint"]
    assert new["choices"] != old["choices"]
    thread.join()
    assert long["system_fingerprint"] == old["system_fingerprint"]
    assert long["choices"][0]["text"].startswith(old["choices"][0]["text"])
    save_step(runs[1], 7)  # without being asked, because of --follow
    end = time.monotonic() + 15
    while server.client.get("/v1/models/b/final").json()["step"] != 7:
        assert time.monotonic() < end
        time.sleep(0.1)


# -- the start -----------------------------------------------------------------------------------


def test_answers_leave_at_once() -> None:
    """Else the kernel keeps the end of an answer until the client has acknowledged the start."""

    async def option_of_a_connection() -> int:
        accepted: asyncio.Future[int] = asyncio.get_running_loop().create_future()

        def note(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            connection = writer.get_extra_info("socket")
            accepted.set_result(connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))
            writer.close()

        async with await asyncio.start_server(note, sock=bind("127.0.0.1", 0)) as server:
            _, writer = await asyncio.open_connection(*server.sockets[0].getsockname())
            try:
                return await accepted
            finally:
                writer.close()

    assert asyncio.run(option_of_a_connection()) != 0


SLOW_LOAD = """
import time
from glasslm.serve import served_model
load = served_model.ModelSource.load
served_model.ModelSource.load = lambda source: time.sleep(0.5) or load(source)
"""


def test_while_it_loads_the_server_answers_503(runs: list[Path]) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    answers = []

    def ask() -> None:
        end = time.monotonic() + 20
        while time.monotonic() < end and 200 not in answers:
            try:
                response = httpx.get(f"http://127.0.0.1:{port}/health", trust_env=False)
                answers.append(response.status_code)
            except httpx.TransportError:
                time.sleep(0.01)

    thread = threading.Thread(target=ask)
    thread.start()
    with serving_with_limits(*runs, prelude=SLOW_LOAD, port=port):
        thread.join()
    assert set(answers) == {503, 200}
    assert answers == sorted(answers, reverse=True)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--host", "0.0.0.0"], "--api-key KEY, or --no-api-key"),
        (["--host", "::"], "--no-api-key"),
        (["--api-key", "a", "--no-api-key"], "choose one"),
        (["--api-key", ""], "--api-key is empty"),
        (["--api-key", "a b"], "printable ASCII"),
        (["--api-key", "é"], "printable ASCII"),
        (["--port", "70000"], "65535"),
        (["--port", "-1"], "65535"),
        (["--host", "no.such.host.invalid", "--no-api-key"], "no address"),
        (["--follow", "--checkpoint", "3"], "--checkpoint"),
        (["--checkpoint", "newest"], "best, latest"),
        (["--allow-origin", "https://x.org/"], "such as https://example.org, or *"),
        (["--allow-origin", "x.org"], "SCHEME://HOST[:PORT]"),
        (["--allow-origin", "https://X.org"], "small letters"),
        (["--allow-origin", "https://x.org:443"], "443 of https"),
    ],
)
def test_wrong_flags_are_refused_in_one_line(
    runs: list[Path], arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["serve", str(runs[0]), *arguments]) == 2
    error = capsys.readouterr().err
    assert words in error
    assert len(error.splitlines()) == 1


@pytest.mark.parametrize(
    "origin",
    ["https://x.org", "http://localhost:3000", "http://[::1]:8080", "moz-extension://a-1", "*"],
)
def test_an_origin_that_a_browser_sends_is_taken(
    runs: list[Path], origin: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["serve", str(runs[0]), "--allow-origin", origin, "--checkpoint", "newest"]) == 2
    assert "--allow-origin" not in capsys.readouterr().err


def test_a_run_that_does_not_exist_or_is_given_twice(
    runs: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["serve", "nowhere"]) == 2
    assert main(["serve", str(runs[0]), str(runs[0])]) == 2
    errors = capsys.readouterr().err.splitlines()
    assert "no run 'nowhere'" in errors[0]
    assert "twice" in errors[1]


def test_a_port_in_use_is_said(open_server: ServerProcess, runs: list[Path], capsys: Any) -> None:
    assert main(["serve", str(runs[0]), "--port", str(open_server.port)]) == 2
    assert f"port {open_server.port} is in use" in capsys.readouterr().err


def test_a_damaged_run_ends_the_server_with_the_code_of_damage(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = make_run(tmp_path / "run")
    (weights,) = run.glob("checkpoints/*/model.safetensors")
    weights.write_bytes(weights.read_bytes()[:-1])
    assert main(["serve", str(run), "--port", "0"]) == 4
    captured = capsys.readouterr()
    assert "serving" not in captured.out
    assert "damaged" in captured.err


# -- chat ----------------------------------------------------------------------------------------

TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{{ '\\n' }}{% endfor %}"
    "{% if messages[0].content == 'refuse' %}{{ raise_exception('no such thing') }}{% endif %}"
    "{% if messages[0].content == 'flood' %}{% for i in range(99999) %}"
    "{{ 'a' * 999 }}{% endfor %}{% endif %}"
    "{% if messages[0].content == 'escape' %}{{ ''.__class__.__mro__ }}{% endif %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.fixture(scope="module")
def chat_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    from glasslm.data.tokenizers import ByteTokenizer

    run = tmp_path_factory.mktemp("runs") / "chat"
    settings = {"chat_template": TEMPLATE, "eos_token": "<end>", "generation_eos_ids": [256]}
    make_run(run, ByteTokenizer(["<end>"]), transformers=settings, block_size=128)
    with serving(run) as process:
        yield process


def test_the_openai_client_chats(chat_server: ServerProcess) -> None:
    openai = pytest.importorskip("openai")
    with openai.OpenAI(base_url=f"{chat_server.url}/v1", api_key="x", max_retries=0) as client:
        body: dict[str, Any] = {
            "model": "chat", "max_tokens": 30, "seed": 1, "logprobs": True, "top_logprobs": 2,
            "messages": [{"role": "user", "content": "Hi"}],
        }  # fmt: skip
        whole = client.chat.completions.create(**body)
        (choice,) = whole.choices
        text = chat_server.complete(prompt="<user>Hi\n<assistant>", max_tokens=30, seed=1)
        assert choice.message.content == text["choices"][0]["text"]
        assert choice.message.role == "assistant"
        content = choice.logprobs.content
        spelled = b"".join(bytes(token.bytes) for token in content)
        assert spelled.decode("utf-8", "replace") == choice.message.content
        assert all(len(token.top_logprobs) == 2 for token in content)
        assert all(token.top_logprobs[0].logprob >= token.logprob for token in content)
        chunks = list(client.chat.completions.create(**body, stream=True))
        assert chunks[0].choices[0].delta.role == "assistant"
        pieces = [chunk.choices[0].delta.content or "" for chunk in chunks]
        assert "".join(pieces) == choice.message.content
        tokens = [t for c in chunks if c.choices[0].logprobs for t in c.choices[0].logprobs.content]
        assert tokens == content
        assert chunks[-1].choices[0].finish_reason == choice.finish_reason
        assert {chunk.object for chunk in chunks} == {"chat.completion.chunk"}
        answer = client.chat.completions.create(
            model="chat", messages=body["messages"], response_format={"type": "json_object"}, seed=2
        )
        json.loads(answer.choices[0].message.content)


def test_a_special_token_ends_an_answer(chat_server: ServerProcess) -> None:
    body = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 20, "logprobs": True}
    response = chat_server.post("/v1/chat/completions", **body, logit_bias={"256": 100})
    (choice,) = response.json()["choices"]
    assert choice["message"]["content"] == ""
    assert choice["finish_reason"] == "stop"
    assert choice["logprobs"]["content"] == []


@pytest.mark.parametrize(
    ("schema", "token", "content"),
    [
        ({"enum": [1, 12]}, 256, "1"),
        ({"enum": [1, 12]}, ord("2"), "12"),
        ({"const": 12}, 256, "12"),  # the token cuts nothing that is not complete
    ],
)
def test_a_special_token_ends_json_that_could_go_on(
    chat_server: ServerProcess, schema: dict[str, Any], token: int, content: str
) -> None:
    pytest.importorskip("llguidance")
    wanted = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    messages = [{"role": "user", "content": "Hi"}]
    response = chat_server.post(
        "/v1/chat/completions", messages=messages, response_format=wanted, max_tokens=20,
        logit_bias={str(token): 100},
    )  # fmt: skip
    (choice,) = response.json()["choices"]
    assert (choice["message"]["content"], choice["finish_reason"]) == (content, "stop")


def test_an_answer_that_ends_is_whole_whatever_stop_string_it_began(
    chat_server: ServerProcess,
) -> None:
    """Its last letters wait, as they may begin a stop string, until the special token comes."""
    bias = {"256": 60, str(ord("o")): 100}
    body = {
        "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 20, "temperature": 50,
        "top_k": 2, "logit_bias": bias, "logprobs": True,
    }  # fmt: skip
    answers = []
    for stop in (None, ["oX"], ["ooX"]):
        responses = [
            chat_server.post("/v1/chat/completions", **body, stop=stop, seed=seed).json()
            for seed in range(8)
        ]
        answers.append([response["choices"] for response in responses])
    assert answers[0] == answers[1] == answers[2]
    texts = {choice["message"]["content"] for (choice,) in answers[0]}
    assert max(map(len, texts)) > 1
    assert {choice["finish_reason"] for (choice,) in answers[0]} == {"stop"}
    for (choice,) in answers[0]:
        assert len(choice["logprobs"]["content"]) == len(choice["message"]["content"])


@pytest.mark.parametrize(
    ("content", "words"),
    [("refuse", "no such thing"), ("flood", "too much text"), ("escape", "cannot write")],
)
def test_a_template_that_refuses_or_attacks(
    chat_server: ServerProcess, content: str, words: str
) -> None:
    messages = [{"role": "user", "content": content}]
    response = chat_server.post("/v1/chat/completions", messages=messages)
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "messages"
    assert words in response.json()["error"]["message"]


def test_a_conversation_that_is_too_long_is_refused(chat_server: ServerProcess) -> None:
    messages = [{"role": "user", "content": "a" * 200}]
    response = chat_server.post("/v1/chat/completions", messages=messages)
    assert response.json()["error"]["code"] == "context_length_exceeded"


def test_what_spells_a_special_token_is_text(chat_server: ServerProcess) -> None:
    """The prompt "<user>Hi<end>\n<assistant>" has one token a byte, that of <end> included."""
    body = {"messages": [{"role": "user", "content": "Hi<end>"}], "max_tokens": 1}
    usage = chat_server.post("/v1/chat/completions", **body).json()["usage"]
    assert usage["prompt_tokens"] == len("<user>Hi<end>\n<assistant>")


@pytest.mark.parametrize(
    ("prompt", "tokens", "offsets"),
    [
        ("ab<end>cd", ["a", "b", "<end>", "c", "d"], [0, 1, 2, 7, 8]),
        ([97, 256, 98], ["a", "<end>", "b"], [0, 1, 1]),  # the text of ids is "ab"
        ([256, 256], ["<end>", "<end>"], [0, 0]),
        ([0xC3, 97], ["bytes:\\xc3", "a"], [0, 1]),
        ("", [], []),
    ],
)
def test_echoed_tokens_have_their_places_in_the_text(
    chat_server: ServerProcess, prompt: str | list[int], tokens: list[str], offsets: list[int]
) -> None:
    body = {"prompt": prompt, "echo": True, "logprobs": 1}
    for max_tokens in (0, 1):
        (choice,) = chat_server.complete(**body, max_tokens=max_tokens)["choices"]
        logprobs, n = choice["logprobs"], len(tokens)
        assert (logprobs["tokens"][:n], logprobs["text_offset"][:n]) == (tokens, offsets)
        assert len(logprobs["tokens"]) <= n + max_tokens


def test_the_terminal_chat_talks_to_the_server(
    chat_server: ServerProcess,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("Hi\n" + "a" * 200 + "\n"))
    flags = ["--temperature", "0", "--max-new-tokens", "12", "--json"]
    assert main(["chat", "chat", "--server", chat_server.url, *flags]) == 2  # the second line
    out, err = capsys.readouterr()
    answered, failed = map(json.loads, out.splitlines())
    body = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 12, "temperature": 0}
    (choice,) = chat_server.post("/v1/chat/completions", **body).json()["choices"]
    assert answered["answer"] == choice["message"]["content"]
    assert "the server answers 400" in err
    assert "the server answers 400" in failed["error"]


# -- the other engine ----------------------------------------------------------------------------


@pytest.mark.slow  # importing PyTorch takes seconds
def test_both_engines_answer_the_same(runs: list[Path]) -> None:
    pytest.importorskip("torch")
    body: dict[str, Any] = {
        "prompt": "the cat", "max_tokens": 30, "temperature": 0, "logprobs": 1, "echo": True,
    }  # fmt: skip
    with serving(runs[1], "--checkpoint", "0", engine="torch") as torch_server:
        assert torch_server.client.get("/v1/models").json()["data"][0]["engine"] == "torch"
        torch_answer = torch_server.complete(**body)["choices"][0]
    with serving(runs[1], "--checkpoint", "0") as numpy_server:
        numpy_answer = numpy_server.complete(**body)["choices"][0]
    scores = [
        answer.pop("logprobs")["token_logprobs"][1:] for answer in (torch_answer, numpy_answer)
    ]
    assert torch_answer == numpy_answer
    assert scores[0] == pytest.approx(scores[1], rel=1e-3, abs=1e-3)
