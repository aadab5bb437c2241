"""glasslm chat: through a pipe, in a terminal, with a server; exports stop where it stops."""

import io
import json
import os
import re
import select
import signal
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from chat_runs import NOUNS, learn_chat, make_byte_base, make_random_chat, write_chat
from glasslm.cli import main
from glasslm.cli.chat import save
from glasslm.data.chat.conversations import Conversation, read_conversations
from glasslm.errors import InputError
from glasslm.inference.chat_session import ChatSession
from glasslm.runs.run_folder import Run
from small_runs import run_program, start_program

TALK = """cat?

/retry
/nothing
dog?
/save {file}
/reset
/retry
/system Be loud.
/save {file}
/quit
cow?
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that answers the questions of chat_runs.NOUNS."""
    folder = tmp_path_factory.mktemp("runs")
    base = make_byte_base(folder)
    chat = write_chat(folder / "chat.jsonl")
    return learn_chat(base, chat, folder / "chat", max_steps=150, eval_interval=50, threads=2)


def chat(
    run: Path, text: str, *flags: str, temperature: str = "0", exit_code: int = 0
) -> tuple[str, str]:
    """Standard output and error of `glasslm chat` with these lines."""
    folder, name = run.parent, "talk.txt"
    (folder / name).write_text(text, encoding="utf-8")
    with (folder / name).open() as lines:
        result = run_program("chat", run, "--temperature", temperature, *flags, stdin=lines)
    assert result.returncode == exit_code, result.stderr
    return result.stdout, result.stderr


def test_each_line_of_a_pipe_is_a_turn(run: Path, tmp_path: Path) -> None:
    saved = tmp_path / "talk.jsonl"
    out, err = chat(run, TALK.format(file=saved), exit_code=2)  # some of its lines fail
    assert out.splitlines() == ["meow", "meow", "woof"]
    assert "there is no /nothing" in err
    assert "there is no question yet" in err
    assert "there is nothing to save yet" in err
    assert json.loads(saved.read_text()) == {
        "messages": [
            {"role": "user", "content": "cat?"},
            {"role": "assistant", "content": "meow"},
            {"role": "user", "content": "dog?"},
            {"role": "assistant", "content": "woof"},
        ]
    }


def test_a_full_context_drops_the_oldest_turns(run: Path) -> None:
    text = "cat?\ndog?\ncow?\nduck?\n" + "x" * 60 + "\ncat?\n"
    out, err = chat(run, text, "--json", exit_code=2)
    answers = [json.loads(line) for line in out.splitlines()]
    assert [answer["answer"] for answer in answers] == ["meow", "woof", "moo", "quack", "", "meow"]
    assert ["error" in answer for answer in answers] == [False] * 4 + [True, False]
    assert "leaves no room for an answer" in answers[4]["error"]
    assert "the model no longer reads the oldest 1 turn" in err
    assert "leaves no room for an answer" in err


def test_a_run_without_a_template_is_refused(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = run.parent / "base"
    assert main(["chat", str(base)]) == 2
    assert f"glasslm finetune {base} --full --chat FILE.jsonl" in capsys.readouterr().err


def test_control_characters_of_the_model_are_escaped(tmp_path: Path) -> None:
    made = make_random_chat(tmp_path / "run", 256)
    out, _ = chat(made, "a\n" * 30, temperature="1.5")
    assert "␛" in out
    assert not re.search(r"[\x00-\x09\x0b-\x1f]", out)


def read_until(terminal: int, words: str, seconds: float = 60) -> str:
    """What a program writes to a terminal until it has these words."""
    output, end = b"", time.monotonic() + seconds
    while words.encode() not in output:
        assert time.monotonic() < end, output
        if select.select([terminal], [], [], 0.05)[0]:
            output += os.read(terminal, 1 << 16)
    return output.decode(errors="replace")


@pytest.mark.skipif(sys.platform == "win32", reason="needs POSIX signals")
def test_in_a_terminal_ctrl_c_stops_the_answer_and_not_the_program(tmp_path: Path) -> None:
    import fcntl
    import pty
    import termios

    made = make_random_chat(tmp_path / "run", 100_000)
    master, terminal = pty.openpty()

    def take_terminal() -> None:
        os.setsid()
        fcntl.ioctl(terminal, termios.TIOCSCTTY, 0)

    process = start_program(
        "chat", made, "--max-new-tokens", "90000", "--threads", "1",
        stdin=terminal, preexec_fn=take_terminal,
    )  # fmt: skip
    # start_program has pipes for the output, which the person reads here.
    os.close(terminal)
    try:
        os.write(master, b"hello there\n")
        assert process.stdout is not None
        first = process.stdout.read(40)
        assert len(first) == 40
        os.write(master, b"\x03")  # Ctrl-C, which the terminal turns into SIGINT
        time.sleep(0.2)
        assert process.poll() is None
        os.write(master, b"/quit\n")
        _, err = process.communicate(timeout=60)
    finally:
        process.kill()
        os.close(master)
    assert process.returncode == 0, err
    assert "(stopped)" in err
    assert "Traceback" not in err


# What servers answer that are no `glasslm serve`, by the model that is asked for.
OTHER_ANSWERS = {
    "no-space": b'data:{"choices":[{"delta":{"content":"meow"}}]}\n\ndata:[DONE]\n\n',
    "plain": b'{\n"choices": [{"message": {"role": "assistant", "content": "meow"}}]\n}\n',
    "page": b"<html>\nlog in</html>",
    "nothing": b": ping\n\n",
    "other-json": b'{"status": "ok"}',
    "half": b'data: {"choices": [{"delta": {"content": "me"}}]}\n\ndata: {"cho',
    "broken": b'data: {"choices": [{"delta": {"content": "me"}}]}\n\ndata: {"error": "full"}\n\n',
}


@pytest.fixture
def server() -> Iterator[tuple[str, list[Any]]]:
    """A server with OpenAI's API that answers in two pieces; its address, and what it is asked."""
    requests: list[Any] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            requests.append((self.path, self.headers["Authorization"], body))
            if len(body["messages"]) > 3:
                error = {"message": "too long", "code": "context_length_exceeded"}
                self.answer(400, json.dumps({"error": error}).encode())
            elif body["model"] in OTHER_ANSWERS:
                self.answer(200, OTHER_ANSWERS[body["model"]])
            elif body["model"] != "m":
                error = {"message": "there is no model 'x'", "code": "model_not_found"}
                self.answer(404, json.dumps({"error": error}).encode())
            else:
                chunks = [
                    {"role": "assistant", "content": ""},
                    {"content": "me"},
                    {"content": "ow"},
                ]
                events = [json.dumps({"choices": [{"delta": delta}]}) for delta in chunks]
                lines = [f"data: {event}\n\n" for event in [*events, "[DONE]"]]
                self.answer(200, "".join([": ping\n\n", *lines]).encode())

        def answer(self, status: int, content: bytes) -> None:
            self.send_response(status)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *arguments: Any) -> None:
            pass

    httpd = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=httpd.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{httpd.server_port}", requests
    httpd.shutdown()
    httpd.server_close()


def test_a_server_answers_and_drops_turns_by_its_own_context(
    server: tuple[str, list[Any]], monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    url, requests = server
    monkeypatch.setattr(sys, "stdin", io.StringIO("\ufeffcat?\ncat?\ncat?\n"))
    flags = ["--server", url, "--api-key", "k", "--top-k", "3", "--system", "Be brief."]
    assert main(["chat", "m", *flags, "--temperature", "0"]) == 0
    out, err = capsys.readouterr()
    assert out.splitlines() == ["meow"] * 3
    path, key, body = requests[0]
    assert (path, key) == ("/v1/chat/completions", "Bearer k")
    assert body["messages"][0] == {"role": "system", "content": "Be brief."}
    assert body["messages"][1] == {"role": "user", "content": "cat?"}
    assert (body["temperature"], body["top_k"], body["stream"]) == (0.0, 3, True)
    assert err.count("no longer reads the oldest 1 turn") == 2
    assert main(["chat", "x", "--server", url]) == 0


def test_a_retry_that_fails_keeps_the_turn() -> None:
    class Source:
        is_down = False

        def stream(self, messages: Conversation, seed: int) -> Iterator[str]:
            if self.is_down:
                raise InputError("the server is down")
            return iter([f"answer {seed}"])

    source = Source()
    session = ChatSession(source, 0, print)
    for question in ("one?", "two?"):
        assert list(session.ask(question))
    turns = list(session.turns)
    source.is_down = True
    with pytest.raises(InputError, match="down"):
        session.ask_again()
    assert session.turns == turns
    source.is_down = False
    answer = "".join(session.ask_again())
    assert answer != turns[-1]["content"]
    assert session.turns == [*turns[:-1], {"role": "assistant", "content": answer}]


def test_a_server_that_is_not_there_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("cat?\n"))
    assert main(["chat", "m", "--server", "http://127.0.0.1:9"]) == 2
    assert "does not answer" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("model", "answer", "error"),
    [
        ("no-space", "meow", None),
        ("plain", "meow", None),
        ("page", "", "without an event of a stream (<html>log in</html>)"),
        ("nothing", "", "without an event of a stream (an empty answer)"),
        ("other-json", "", "has no choices"),
        ("broken", "me", "the server ended the answer: full"),
        ("half", "me", "broke off"),
    ],
)
def test_answers_of_other_servers_are_read_or_named(
    server: tuple[str, list[Any]], model: str, answer: str, error: str | None,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setattr(sys, "stdin", io.StringIO("cat?\n"))
    assert main(["chat", model, "--server", server[0], "--json"]) == (2 if error else 0)
    line = json.loads(capsys.readouterr().out)
    assert (line["question"], line["answer"]) == ("cat?", answer)
    assert error in line["error"] if error else "error" not in line
    assert ("broke off" in line.get("error", "")) == (model == "half")


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--server", "http://127.0.0.1:9", "--checkpoint", "999"], "--checkpoint would"),
        (["--server", "http://127.0.0.1:9", "--context", "77", "--ops", "no.py"], "--ops, --con"),
        (["--server", "http://127.0.0.1:9", "--engine", "torch"], "--engine would"),
        (["--api-key", "k"], "give --server URL"),
    ],
)
def test_a_flag_that_would_change_nothing_is_refused(
    flags: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["chat", "m", *flags]) == 2
    assert words in capsys.readouterr().err


def test_turns_without_an_answer_are_not_saved(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """`finetune --chat` refuses them."""

    class Source:
        def stream(self, messages: Conversation, seed: int) -> Iterator[str]:
            return iter([" " if messages[-1]["content"] == "silence?" else "moo"])

    session = ChatSession(Source(), 0, print)
    assert list(session.ask("silence?"))
    with pytest.raises(InputError, match="no question has an answer"):
        save(session, str(tmp_path / "none.jsonl"))
    assert list(session.ask("cow?"))
    save(session, str(tmp_path / "talk.jsonl"))
    assert "1 turn without an answer left out" in capsys.readouterr().err
    ((_, messages),) = read_conversations(tmp_path / "talk.jsonl")
    assert [message["content"] for message in messages] == ["cow?", "moo"]


@pytest.mark.usefixtures("no_figures")
def test_an_export_stops_where_the_model_stops(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    transformers = pytest.importorskip("transformers")
    torch = pytest.importorskip("torch")
    assert main(["export", str(run), "--to", "hf", "--out", str(tmp_path / "hf")]) == 0
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    for noun, sound in NOUNS.items():
        ids = tokenizer.apply_chat_template(
            [{"role": "user", "content": f"{noun}?"}],
            add_generation_prompt=True, return_tensors="pt", return_dict=False,
        )  # fmt: skip
        with torch.no_grad():
            answer = model.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=20, do_sample=False
            )
        text = tokenizer.decode(answer[0, ids.shape[1] :])
        assert text == f"{sound}<|im_end|>"
    assert main(["import", str(tmp_path / "hf"), "--run-dir", str(tmp_path / "back")]) == 0
    again = Run(tmp_path / "back").record["tokenizer"]["transformers"]
    assert again["chat_template"] == Run(run).record["tokenizer"]["transformers"]["chat_template"]
    assert chat(tmp_path / "back", "duck?\n")[0] == "quack\n"


@pytest.mark.parametrize("template", ["chatml", "plain"])
def test_a_gguf_file_has_the_template_and_the_end_of_a_turn(
    template: str, run: Path, tmp_path: Path
) -> None:
    gguf = pytest.importorskip("gguf")
    if template == "plain":
        chat_file = write_chat(tmp_path / "chat.jsonl")
        run = learn_chat(
            run.parent / "base", chat_file, tmp_path / "run", chat_template=template, max_steps=1
        )
    from glasslm.interop import gguf_file
    from glasslm.interop.model_export import load_export

    export = load_export(str(run))
    gguf_file.write(export, tmp_path / "model.gguf", "f32")
    fields = gguf.GGUFReader(tmp_path / "model.gguf").fields
    assert fields["tokenizer.chat_template"].contents() == export.token_settings["chat_template"]
    end = {"chatml": "<|im_end|>", "plain": "<|endoftext|>"}[template]
    special = export.tokenizer.special_tokens
    assert fields["tokenizer.ggml.eos_token_id"].contents() == special[end]
    tokens = fields["tokenizer.ggml.tokens"].contents()
    assert tokens[special[end]] == end
    types = np.array(fields["tokenizer.ggml.token_type"].contents())
    assert types[special[end]] == 3  # a control token


@pytest.mark.skipif(sys.platform == "win32", reason="needs POSIX signals")
def test_a_pipe_that_is_interrupted_between_turns_ends(tmp_path: Path) -> None:
    made = make_random_chat(tmp_path / "run", 64)
    reading, writing = os.pipe()
    process = start_program("chat", made, "--json", "--threads", "1", stdin=reading)
    os.close(reading)
    os.write(writing, b"a\n")
    assert process.stdout is not None
    process.stdout.readline()  # the whole answer, whose text may hold line breaks
    time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    os.close(writing)
    assert process.returncode == 130
    assert "Traceback" not in err
