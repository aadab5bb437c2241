"""Text from the hub of Hugging Face, or from one that lies; and a reader that hangs, dies or is interrupted."""

from __future__ import annotations

import io
import json
import os
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
from glasslm.data.download import DownloadError
from glasslm.data.sources import corpora, hub, wikipedia
from glasslm.errors import InputError

needs_hub = pytest.mark.skipif(
    find_spec("datasets") is None or find_spec("pyarrow") is None,
    reason="could not import 'datasets' or 'pyarrow'",
)


# --- The side that joins, cuts and keeps, with a reader that says what a test wants -----------------------------------


@pytest.fixture
def reader(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Sets what the process does in place of reading; gives the file where each start leaves its request."""
    monkeypatch.setenv("GLASSLM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(hub, "READER", "pretended_reader")
    log = tmp_path / "started"

    def does(*lines: Any, then: str = "") -> Path:
        code = f"import sys\nopen({str(log)!r}, 'a').write(sys.argv[1] + '\\n')\n"
        code += "".join(f"print({json.dumps(line)!r}, flush=True)\n" for line in lines)
        (tmp_path / "pretended_reader.py").write_text(code + then)
        return log

    return does


ABOUT = {
    "about": {
        "dataset": "a/b",
        "revision": "0" * 40,
        "licence": "licence mit",
        "size": "2 MB in all",
    }
}
END = {"end": True}


def texts(*values: str) -> list[dict[str, str]]:
    return [{"text": value} for value in values]


def fetch(max_bytes: str = "50MB", say: corpora.Say = lambda message: None, **fields: Any) -> str:
    data = DataConfig(**({"hf_dataset": "a/b"} | fields), max_bytes=max_bytes)
    return "".join(corpora.find(data, say).text())


def test_texts_are_joined_and_licence_and_size_are_told_first(reader: Any) -> None:
    said: list[str] = []
    reader(ABOUT, *texts("one", "", "two\n", "drei: \u00fc\U0001f600"), END)
    assert fetch(say=said.append) == "one\n\ntwo\n\ndrei: \u00fc\U0001f600"
    assert (
        said[0]
        == "Hugging Face a/b (train) at 000000000000: licence mit; 2 MB in all, taking at most 50 MB of text"
    )
    assert said[1].startswith("note: that is all of a/b")


def test_the_commit_is_kept_with_the_text(reader: Any, tmp_path: Path) -> None:
    reader(ABOUT, *texts("one"), END)
    data = DataConfig(hf_dataset="a/b")
    for _ in ("fetched", "from the cache"):
        (file,) = corpora.find(data, lambda message: None).files
        assert file.origin == f"https://huggingface.co/datasets/a/b/tree/{'0' * 40}"
    (recipe,) = (tmp_path / "cache" / "corpora" / "hub").glob("*.json")
    recipe.write_text(
        json.dumps({"text": json.loads(recipe.read_text())["text"]})
    )  # as older versions wrote it
    assert corpora.find(data, lambda message: None).files[0].origin == ""


@pytest.mark.parametrize(
    ("most", "expected"),
    [
        ("3B", "one"),
        ("8B", "one\n\ntwo"),
        ("7B", "one"),
        ("14B", "one\n\ntwo"),
        ("15B", "one\n\ntwo\n\nthree"),
    ],
)
def test_whole_texts_are_taken_as_many_as_fit(most: str, expected: str, reader: Any) -> None:
    reader(ABOUT, *texts("one", "two", "three", "four"), then="import time; time.sleep(60)")
    assert fetch(most) == expected


@pytest.mark.parametrize(
    ("most", "expected"),
    [("5B", "\u00fc\u00fc"), ("4B", "\u00fc\u00fc"), ("6B", "\u00fc\u00fc\u00fc")],
)
def test_a_first_text_that_is_too_long_ends_with_a_whole_character(
    most: str, expected: str, reader: Any
) -> None:
    reader(ABOUT, *texts("\u00fc" * 9), END)
    assert fetch(most) == expected


def test_what_is_kept_is_not_fetched_again_and_what_is_damaged_is(
    reader: Any, tmp_path: Path
) -> None:
    log = reader(ABOUT, *texts("one", "two"), END)

    def started() -> int:
        return len(log.read_text().splitlines())

    assert fetch() == fetch() == "one\n\ntwo"
    assert started() == 1
    assert fetch(hf_split="test") == "one\n\ntwo"  # another request
    assert started() == 2
    for path in (tmp_path / "cache" / "corpora" / "hub").glob("*.txt"):
        path.write_text("one\n\ntwO")
    assert fetch() == "one\n\ntwo"
    assert started() == 3


@pytest.mark.parametrize(
    ("lines", "then", "says"),
    [
        ([ABOUT, *texts("one")], "", "its process ended; to supply it by hand"),
        ([ABOUT], "sys.exit('out of luck')", r"its process ended \(out of luck\)"),
        (
            [ABOUT],
            "print('Retrying', file=sys.stderr, flush=True); import time; time.sleep(60)",
            r"nothing came for 2s \(Retrying\)",
        ),
        ([{"failed": "\x1b[2Jfailed"}], "", "read: \u241b\\[2Jfailed"),
        (
            [{"failed": "the server answers 503"}],
            "",
            r"a/b could not be read: the server answers 503; .*parquet.*--text-file",
        ),
    ],
)
def test_a_reader_that_fails_leaves_nothing(
    lines: list[Any],
    then: str,
    says: str,
    reader: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(hub, "WAIT_S", 1.25)
    monkeypatch.setattr(hub, "WAITS", 2)
    reader(*lines, then=then)
    with pytest.raises(DownloadError, match=says):
        fetch()
    assert [path for path in (tmp_path / "cache").rglob("*") if path.is_file()] == []


def test_an_interruption_leaves_nothing_and_no_process(
    reader: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    endless = json.dumps({"text": "y" * 1000})
    then = f"import os\nopen({str(tmp_path / 'pid')!r}, 'w').write(str(os.getpid()))\nwhile True: print({endless!r})"

    def say(message: str) -> None:
        if "left" in message:
            raise KeyboardInterrupt

    reader(ABOUT, then=then)
    monkeypatch.setattr("glasslm.data.sources.texts.WAIT", 0.1)
    with pytest.raises(KeyboardInterrupt):
        fetch("5GB", say)
    assert [path for path in (tmp_path / "cache").rglob("*") if path.is_file()] == []
    if os.name == "posix":
        with pytest.raises(ProcessLookupError):
            os.kill(int((tmp_path / "pid").read_text()), 0)
    reader(ABOUT, *texts("fine"), END)
    assert fetch("5GB") == "fine"


def test_wikipedia_is_such_a_data_set_with_fixed_values(reader: Any) -> None:
    log = reader(ABOUT, *texts("Anarchism\n\nAnarchism is"), END)
    source = corpora.find(DataConfig(corpus="wikipedia", max_bytes="2MB"), lambda message: None)
    assert (source.name, "".join(source.text())) == ("wikipedia", "Anarchism\n\nAnarchism is")
    asked = json.loads(log.read_text())
    assert (asked["dataset"], asked["config"], asked["most"]) == (
        "wikimedia/wikipedia",
        "20231101.en",
        2_000_000,
    )
    assert (asked["title"], asked["column"], asked["revision"]) == (
        "title",
        "text",
        wikipedia.REVISION,
    )
    reader({"failed": "no network"})
    with pytest.raises(DownloadError, match=r"no network; .*dumps\.wikimedia\.org"):
        wikipedia.find(3, lambda message: None)


# --- The flags --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"hf_dataset": "a/b", "corpus": "python"}, "both --corpus and --hf-dataset .* choose one"),
        ({"hf_dataset": "a/b", "text_file": ("x",)}, "both --text-file and --hf-dataset"),
        ({"hf_config": "en"}, "--hf-config .* --hf-dataset, which was not given"),
        ({"hf_split": "test", "corpus": "wikipedia"}, "--hf-split"),
        ({"hf_dataset": "../etc/passwd"}, "OWNER/NAME"),
        ({"hf_dataset": "a/b", "hf_column": ""}, "hf_column"),
        ({"max_bytes": "much"}, "200kB, 50MB or 2GB"),
        ({"max_bytes": "0"}, "200kB, 50MB or 2GB"),
        ({"max_bytes": "-1MB"}, "200kB, 50MB or 2GB"),
    ],
)
def test_flags_that_do_not_go_together_are_refused(fields: dict[str, Any], says: str) -> None:
    with pytest.raises(InputError, match=says):
        DataConfig(**fields)


def test_max_bytes_is_refused_where_it_would_do_nothing(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("text")
    for data in (
        DataConfig(text_file=(str(tmp_path / "a.txt"),), max_bytes="1kB"),
        DataConfig("python", max_bytes="1kB"),
    ):
        with pytest.raises(InputError, match="taken whole"):
            corpora.find(data, lambda message: None)


@pytest.mark.parametrize(
    ("size", "expected"),
    [("200kB", 200_000), ("1.5 MB", 1_500_000), ("2gb", 2 * 10**9), ("123", 123), ("0.3kb", 300)],
)
def test_sizes_are_in_powers_of_1000(size: str, expected: int) -> None:
    assert DataConfig(max_bytes=size).most_bytes == expected


# --- The reader, with the real libraries ------------------------------------------------------------------------------


def parquet(columns: dict[str, Any], rows: int = 1000) -> bytes:
    import pyarrow
    import pyarrow.parquet

    out = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table(columns), out, row_group_size=rows)
    return out.getvalue()


def configs(**files: str) -> dict[str, Any]:
    return {"configs": [{"config_name": name, "data_files": path} for name, path in files.items()]}


def card(values: dict[str, Any]) -> bytes:
    return f"---\n{json.dumps(values)}\n---\nA data set.\n".encode()  # JSON is YAML


def repository(
    files: dict[str, bytes], values: dict[str, Any] | None = None, gated: int = 0
) -> Repository:
    values = values or {}
    return Repository(files | {"README.md": card(values)}, values, gated)


def cut_once(handler: BaseHTTPRequestHandler, seen: list[str], word: str) -> bool:
    """The first answer with `word` in its path promises more than comes."""
    if word not in handler.path or handler.command != "GET" or seen:
        return False
    seen.append(handler.path)
    handler.send_response(206)
    handler.send_header("Content-Length", "100000")
    handler.end_headers()
    handler.wfile.write(b"PAR1")
    handler.close_connection = True
    return True


def broken_once(handler: BaseHTTPRequestHandler, seen: list[str], word: str) -> bool:
    """The first answer with `word` in its path is 500."""
    if word not in handler.path or handler.command != "GET" or seen:
        return False
    seen.append(handler.path)
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


def ask(name: str, **fields: Any) -> dict[str, Any]:
    return {
        "dataset": name,
        "config": None,
        "split": "train",
        "column": None,
        "most": 10**6,
        "title": None,
    } | {
        "revision": None,
        **fields,
    }


# What is asked for, and what is answered: the texts, or what is refused, or what failed.
CASES: dict[str, tuple[dict[str, Any], str, Any]] = {
    "fine": (ask("own/stories"), "texts", STORIES),
    "title first": (ask("own/titled", title="title"), "texts", ["T1\n\none", "T2\n\ntwo"]),
    "a column by name": (ask("own/two", column="answer", split="test"), "texts", ["so"]),
    "a configuration by name": (ask("own/many", config="de"), "texts", ["Hallo"]),
    "the only column with text": (ask("own/lines"), "texts", ["first"]),
    "wrong id": (ask("own/storys"), "refused", "no data set own/storys on Hugging Face"),
    "wrong owner": (ask("owen/stories"), "refused", "is it one of own/stories?"),
    "no configuration": (ask("own/many"), "refused", "--hf-config: en, de|--hf-config: de, en"),
    "wrong configuration": (
        ask("own/many", config="dee"),
        "refused",
        "no configuration 'dee': there are de, en",
    ),
    "wrong split": (
        ask("own/two", split="tset"),
        "refused",
        "no split 'tset': choose with --hf-split from test, train",
    ),
    "wrong column": (
        ask("own/two", column="anser"),
        "refused",
        "no column 'anser': there are answer, question, n",
    ),
    "not a text column": (
        ask("own/two", column="n"),
        "refused",
        "column 'n' of own/two holds no text",
    ),
    "which column": (ask("own/two"), "refused", "several that hold text: question, answer"),
    "no text": (ask("own/number"), "refused", "no column of own/number holds text: there are n"),
    "script": (ask("own/script"), "refused", r"is a program \(script.py\) .* never run here"),
    "gated": (ask("own/gated"), "refused", "accept its conditions .* log in"),
    "gated, no token": (ask("own/secret"), "refused", "accept its conditions .* log in"),
    "empty": (ask("own/empty"), "failed", "doesn't contain any data files|no .*data"),
    "damaged": (ask("own/damaged"), "failed", "."),
    "no parquet": (ask("own/no-parquet"), "failed", "[Pp]arquet"),
    "cut": (ask("own/cut"), "texts", STORIES),
    "broken": (ask("own/broken"), "texts", STORIES),
}

DRIVER = """
import concurrent.futures, json, os, sys
from glasslm.data.sources import hub_reader
out = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)
os.chdir(sys.argv[1])
first, *others = json.load(sys.stdin)  # the first imports what the others need
with concurrent.futures.ThreadPoolExecutor(8) as pool:
    answers = [list(hub_reader.answer(first)), *pool.map(lambda request: list(hub_reader.answer(request)), others)]
for answer in answers:
    print(json.dumps(answer), file=out, flush=True)
os._exit(0)
"""


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Any]]]:
    """What the reader says in each case; one process for all of them, because the libraries take seconds to import."""
    pytest.importorskip("pyarrow")
    folder = tmp_path_factory.mktemp("reader")
    cut: list[str] = []
    broken: list[str] = []
    server = small_hub()
    server.trouble = lambda handler: (
        cut_once(handler, cut, f"own/cut/resolve/{SHA}/train")
        or broken_once(handler, broken, f"own/broken/resolve/{SHA}/train")
    )
    with pytest.MonkeyPatch.context() as patch, serving(server):
        patch.setenv("GLASSLM_MIRROR", server.address)
        done = subprocess.run(
            [sys.executable, "-c", DRIVER, str(folder)],
            input=json.dumps([request for request, _, _ in CASES.values()]),
            env=hub._environment(str(folder)), capture_output=True, text=True, encoding="utf-8", timeout=120,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
    assert (len(cut), len(broken)) == (1, 1)
    return dict(zip(CASES, map(json.loads, done.stdout.splitlines()), strict=True))


@needs_hub
@pytest.mark.parametrize("name", CASES)
def test_the_reader_says_what_is_there_and_what_is_not(
    name: str, answers: dict[str, list[dict[str, Any]]]
) -> None:
    _, kind, expected = CASES[name]
    lines = answers[name]
    if kind == "texts":
        assert list(lines[0]) == ["about"]
        assert lines[-1] == {"end": True}
        assert [line["text"] for line in lines[1:-1]] == expected
    else:
        assert list(lines[-1]) == [kind], lines[-1]
        assert re.search(expected, lines[-1][kind]), lines[-1]
        assert "\n" not in lines[-1][kind]


@needs_hub
def test_the_reader_states_licence_and_size_as_the_card_does(
    answers: dict[str, list[dict[str, Any]]],
) -> None:
    named = ("fine", "a column by name", "title first", "a configuration by name")
    stated = {name: answers[name][0]["about"] for name in named}
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
    said: list[str] = []
    tokens: list[str | None] = []
    server = small_hub()
    server.trouble = lambda handler: bool(tokens.append(handler.headers.get("Authorization")))
    with serving(server):
        monkeypatch.setenv("GLASSLM_MIRROR", server.address)
        text = fetch("100B", said.append, hf_dataset="own/stories")
        assert text == "\n\n".join(STORIES[:7])
        asked = len(server.asked)
        assert fetch("100B", hf_dataset="own/stories") == text
        assert len(server.asked) == asked
    assert "cdla-sharing-1.0; 20.2 GB in all, taking at most 100 B" in said[0]
    assert tokens
    assert set(tokens) == {None}  # a mirror is not told the token of the hub
    assert sha256(text.encode()).hexdigest() in {
        path.stem for path in (tmp_path / "cache").rglob("*.txt")
    }
