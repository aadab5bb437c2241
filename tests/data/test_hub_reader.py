"""The reader of datasets with the real libraries, on a server that imitates the hub."""

from __future__ import annotations

import io
import json
import re
import subprocess
import sys
from hashlib import sha256
from http.server import BaseHTTPRequestHandler
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from small_hub import SHA, Hub, Repository, serving

from glasslm.config.schema import DataConfig
from glasslm.data.sources import corpora, hub

needs_hub = pytest.mark.skipif(
    find_spec("datasets") is None or find_spec("pyarrow") is None,
    reason="could not import 'datasets' or 'pyarrow'",
)


def parquet(columns: dict[str, Any], rows: int = 1000) -> bytes:
    import pyarrow
    import pyarrow.parquet

    out = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table(columns), out, row_group_size=rows)
    return out.getvalue()


def configs(**files: str) -> dict[str, Any]:
    return {"configs": [{"config_name": name, "data_files": path} for name, path in files.items()]}


def card(values: dict[str, Any]) -> bytes:
    return f"---\n{json.dumps(values)}\n---\nA dataset.\n".encode()  # JSON is YAML


def repository(
    files: dict[str, bytes], values: dict[str, Any] | None = None, gated: int = 0
) -> Repository:
    values = values or {}
    return Repository(files | {"README.md": card(values)}, values, gated)


def cut_once(handler: BaseHTTPRequestHandler, paths: list[str], word: str) -> bool:
    """The first answer with `word` in its path promises more than comes."""
    if word not in handler.path or handler.command != "GET" or paths:
        return False
    paths.append(handler.path)
    handler.send_response(206)
    handler.send_header("Content-Length", "100000")
    handler.end_headers()
    handler.wfile.write(b"PAR1")
    handler.close_connection = True
    return True


def fail_once(handler: BaseHTTPRequestHandler, paths: list[str], word: str) -> bool:
    """The first answer with `word` in its path is 500."""
    if word not in handler.path or handler.command != "GET" or paths:
        return False
    paths.append(handler.path)
    handler.send_response(500)
    handler.send_header("Content-Length", "0")
    handler.end_headers()
    return True


STORIES = [f"Story {i}: \u00fc." for i in range(40)]


def small_hub() -> Hub:
    text = parquet({"text": STORIES, "n": list(range(40))}, rows=10)
    two = parquet({"question": ["why?"], "answer": ["so"], "n": [1]})
    info = {
        "dataset_info": {
            "splits": [{"name": "train", "num_bytes": 20_200_000_000, "num_examples": 40}]
        }
    }
    parts = [
        {"config_name": name, "splits": [{"name": "train", "num_bytes": size, "num_examples": 40}]}
        for name, size in (("en", 70_000), ("de", 5_000))
    ]
    many = {
        "en/train-00000-of-00001.parquet": text,
        "de/train-00000-of-00001.parquet": parquet({"text": ["Hallo"]}),
    }
    return Hub(
        {
            "own/stories": repository(
                {"data/train-00000-of-00001.parquet": text}, {"license": "cdla-sharing-1.0"} | info
            ),
            "own/titled": repository(
                {"train.parquet": parquet({"title": ["T1", "T2"], "text": ["one", "two"]})}
            ),
            "own/two": repository(
                {"train.parquet": two, "test.parquet": two}, {"license": ["mit", "gfdl"]}
            ),
            "own/many": repository(
                many, configs(en="en/*.parquet", de="de/*.parquet") | {"dataset_info": parts}
            ),
            "own/lines": repository(
                {"train.jsonl": b'{"id": 1, "body": "first"}\n{"id": 2, "body": null}\n'}
            ),
            "own/number": repository({"train.parquet": parquet({"n": [1, 2]})}),
            "own/script": repository(
                {"script.py": b"raise SystemExit('I ran')", "train.parquet": text}
            ),
            "own/gated": repository({"train.parquet": text}, gated=403),
            "own/secret": repository({"train.parquet": text}, gated=401),
            "own/empty": repository({}),
            "own/damaged": repository({"train.parquet": text[:100] + b"?" * 200 + text[300:]}),
            "own/no-parquet": repository({"train.parquet": b"<html>Welcome to this hotel</html>"}),
            "own/cut": repository({"train.parquet": text}),
            "own/broken": repository({"train.parquet": text}),
        }
    )


def request_for(name: str, **fields: Any) -> dict[str, Any]:
    return {
        "dataset": name,
        "config": None,
        "split": "train",
        "column": None,
        "max_bytes": 10**6,
        "title": None,
    } | {
        "revision": None,
        **fields,
    }


# The request, the kind of answer, and the texts or a pattern of the message.
CASES: dict[str, tuple[dict[str, Any], str, Any]] = {
    "fine": (request_for("own/stories"), "texts", STORIES),
    "title first": (request_for("own/titled", title="title"), "texts", ["T1\n\none", "T2\n\ntwo"]),
    "a column by name": (request_for("own/two", column="answer", split="test"), "texts", ["so"]),
    "a configuration by name": (request_for("own/many", config="de"), "texts", ["Hallo"]),
    "the only column with text": (request_for("own/lines"), "texts", ["first"]),
    "wrong id": (request_for("own/storys"), "refused", "no dataset own/storys on Hugging Face"),
    "wrong owner": (request_for("owen/stories"), "refused", "is it one of own/stories?"),
    "no configuration": (
        request_for("own/many"),
        "refused",
        "--hf-config: en, de|--hf-config: de, en",
    ),
    "wrong configuration": (
        request_for("own/many", config="dee"),
        "refused",
        "no configuration 'dee': there are de, en",
    ),
    "wrong split": (
        request_for("own/two", split="tset"),
        "refused",
        "no split 'tset': choose with --hf-split from test, train",
    ),
    "wrong column": (
        request_for("own/two", column="anser"),
        "refused",
        "no column 'anser': there are answer, question, n",
    ),
    "not a text column": (
        request_for("own/two", column="n"),
        "refused",
        "column 'n' of own/two holds no text",
    ),
    "which column": (
        request_for("own/two"),
        "refused",
        "several that hold text, question, answer: choose one",
    ),
    "no text": (
        request_for("own/number"),
        "refused",
        "no column of own/number holds text: there are n",
    ),
    "script": (
        request_for("own/script"),
        "refused",
        r"is a program \(script.py\) .* never run here",
    ),
    "gated": (request_for("own/gated"), "refused", "accept its conditions .* log in"),
    "gated, no token": (request_for("own/secret"), "refused", "accept its conditions .* log in"),
    "empty": (request_for("own/empty"), "failed", "doesn't contain any data files|no .*data"),
    "damaged": (request_for("own/damaged"), "failed", "."),
    "no parquet": (request_for("own/no-parquet"), "failed", "[Pp]arquet"),
    "cut": (request_for("own/cut"), "texts", STORIES),
    "broken": (request_for("own/broken"), "texts", STORIES),
}

DRIVER = """
import concurrent.futures, json, os, sys
from glasslm.data.sources import hub_reader
out = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)
os.chdir(sys.argv[1])
first, *others = json.load(sys.stdin)  # the first imports what the others need
with concurrent.futures.ThreadPoolExecutor(8) as pool:
    answers = [list(hub_reader.answer_request(first))]
    answers += pool.map(lambda request: list(hub_reader.answer_request(request)), others)
for answer in answers:
    print(json.dumps(answer), file=out, flush=True)
os._exit(0)
"""


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Any]]]:
    """The lines of the reader in each case, all from one process: imports take seconds."""
    pytest.importorskip("pyarrow")
    folder = tmp_path_factory.mktemp("reader")
    cut: list[str] = []
    broken: list[str] = []
    server = small_hub()
    server.interfere = lambda handler: (
        cut_once(handler, cut, f"own/cut/resolve/{SHA}/train")
        or fail_once(handler, broken, f"own/broken/resolve/{SHA}/train")
    )
    with pytest.MonkeyPatch.context() as patch, serving(server):
        patch.setenv("GLASSLM_MIRROR", server.address)
        done = subprocess.run(
            [sys.executable, "-c", DRIVER, str(folder)],
            input=json.dumps([request for request, _, _ in CASES.values()]),
            env=hub._environment(str(folder)),
            capture_output=True,
            text=True,
            encoding="utf-8",
            timeout=120,
        )
        assert done.returncode == 0, done.stderr
    assert (len(cut), len(broken)) == (1, 1)
    return dict(zip(CASES, map(json.loads, done.stdout.splitlines()), strict=True))


@needs_hub
@pytest.mark.parametrize("name", CASES)
def test_the_reader_answers_each_request(
    name: str, answers: dict[str, list[dict[str, Any]]]
) -> None:
    _, kind, expected = CASES[name]
    lines = answers[name]
    if kind == "texts":
        assert list(lines[0]) == ["dataset_info"]
        assert lines[-1] == {"end": True}
        assert [line["text"] for line in lines[1:-1]] == expected
    else:
        assert list(lines[-1]) == [kind], lines[-1]
        assert re.search(expected, lines[-1][kind]), lines[-1]
        assert "\n" not in lines[-1][kind]


@needs_hub
def test_the_reader_states_licence_and_size_of_the_card(
    answers: dict[str, list[dict[str, Any]]],
) -> None:
    named = ("fine", "a column by name", "title first", "a configuration by name")
    stated = {name: answers[name][0]["dataset_info"] for name in named}
    assert stated["fine"]["licence"] == "licence cdla-sharing-1.0"
    assert stated["fine"]["size"] == "20.2 GB in all"
    assert stated["a column by name"]["licence"] == "licence mit and gfdl"
    assert stated["title first"]["licence"] == "licence not stated"
    assert stated["a configuration by name"]["size"] == "5 kB in all"
    assert stated["title first"]["size"].startswith("files of ")


@needs_hub
@pytest.mark.slow  # the libraries take seconds to import
def test_from_the_hub_to_text_and_from_the_cache_the_second_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GLASSLM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    messages: list[str] = []
    tokens: list[str | None] = []
    server = small_hub()
    server.interfere = lambda handler: bool(tokens.append(handler.headers.get("Authorization")))
    with serving(server):
        monkeypatch.setenv("GLASSLM_MIRROR", server.address)
        data = DataConfig(hf_dataset="own/stories", max_bytes="100B")
        text = "".join(corpora.find_source(data, messages.append).text())
        assert text == "\n\n".join(STORIES[:7])
        n_requests = len(server.requests)
        assert "".join(corpora.find_source(data, messages.append).text()) == text
        assert len(server.requests) == n_requests
    assert "cdla-sharing-1.0; 20.2 GB in all, taking at most 100 B" in messages[0]
    assert tokens
    assert set(tokens) == {None}  # a mirror does not receive the token of the hub
    assert sha256(text.encode()).hexdigest() in {
        path.stem for path in (tmp_path / "cache").rglob("*.txt")
    }


@needs_hub
@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="needs resource limits that bind, as on Linux")
def test_a_file_that_unpacks_to_gigabytes_ends_in_words(tmp_path: Path) -> None:
    """The reader has a limit, which is lower here."""
    import pyarrow

    indices = pyarrow.array([0] * 1000, pyarrow.int32())
    bomb = parquet({"text": pyarrow.DictionaryArray.from_arrays(indices, ["a" * (8 << 20)])})
    assert len(bomb) < 1 << 20
    program = (
        "from glasslm.data.sources import hub_reader as reader; "
        "reader.MAX_READER_BYTES = 3 << 30; reader.main()"
    )
    fields = {"config": None, "split": "train", "column": None, "title": None, "revision": None}
    request = json.dumps(fields | {"dataset": "small/bomb", "max_bytes": 1 << 30})
    with serving(Hub({"small/bomb": repository({"train.parquet": bomb})})) as server:
        environment = hub._environment(str(tmp_path)) | {"HF_ENDPOINT": server.address}
        command = [sys.executable, "-c", program, request, str(tmp_path)]
        done = subprocess.run(command, env=environment, capture_output=True, timeout=120)
    last = json.loads(done.stdout.splitlines()[-1])
    assert "out of memory while small/bomb was read" in last["exhausted"], done.stderr[-2000:]
