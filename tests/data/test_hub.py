"""Text of Hugging Face datasets, with readers that work, fail, hang, die or are interrupted."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import pytest

from glasslm.config.schema import DataConfig
from glasslm.data.download import DownloadError
from glasslm.data.sources import corpora, hub, wikipedia
from glasslm.errors import InputError
from glasslm.text import Notify


@pytest.fixture
def reader(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Replaces the reader by a script with given output; returns the log of its requests."""
    monkeypatch.setenv("GLASSLM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(hub, "READER_MODULE", "pretended_reader")
    log = tmp_path / "started"

    def write_script(*lines: Any, then: str = "") -> Path:
        code = f"import sys\nopen({str(log)!r}, 'a').write(sys.argv[1] + '\\n')\n"
        code += "".join(f"print({json.dumps(line)!r}, flush=True)\n" for line in lines)
        (tmp_path / "pretended_reader.py").write_text(code + then)
        return log

    return write_script


ABOUT = {
    "dataset_info": {
        "dataset": "a/b",
        "revision": "0" * 40,
        "licence": "licence mit",
        "size": "2 MB in all",
    }
}
END = {"end": True}


def texts(*values: str) -> list[dict[str, str]]:
    return [{"text": value} for value in values]


def fetch(max_bytes: str = "50MB", notify: Notify = lambda message: None, **fields: Any) -> str:
    data = DataConfig(**({"hf_dataset": "a/b"} | fields), max_bytes=max_bytes)
    return "".join(corpora.find_source(data, notify).text())


def test_texts_are_joined_after_a_message_with_licence_and_size(reader: Any) -> None:
    messages: list[str] = []
    reader(ABOUT, *texts("one", "", "two\n", "drei: \u00fc\U0001f600"), END)
    assert fetch(notify=messages.append) == "one\n\ntwo\n\ndrei: \u00fc\U0001f600"
    assert messages[0] == (
        "Hugging Face a/b (train) at 000000000000: licence mit; 2 MB in all, "
        "taking at most 50 MB of text"
    )
    assert messages[1].startswith("note: that is all of a/b")


def test_the_commit_is_kept_with_the_text(reader: Any, tmp_path: Path) -> None:
    reader(ABOUT, *texts("one"), END)
    data = DataConfig(hf_dataset="a/b")
    for _ in ("fetched", "from the cache"):
        (file,) = corpora.find_source(data, lambda message: None).files
        assert file.origin == f"https://huggingface.co/datasets/a/b/tree/{'0' * 40}"
    (recipe,) = (tmp_path / "cache" / "corpora" / "hub").glob("*.json")
    recipe.write_text(
        json.dumps({"text": json.loads(recipe.read_text())["text"]})
    )  # as older versions wrote it
    assert corpora.find_source(data, lambda message: None).files[0].origin == ""


@pytest.mark.parametrize(
    ("max_bytes", "expected"),
    [
        ("3B", "one"),
        ("8B", "one\n\ntwo"),
        ("7B", "one"),
        ("14B", "one\n\ntwo"),
        ("15B", "one\n\ntwo\n\nthree"),
    ],
)
def test_whole_texts_are_taken_as_many_as_fit(max_bytes: str, expected: str, reader: Any) -> None:
    reader(ABOUT, *texts("one", "two", "three", "four"), then="import time; time.sleep(60)")
    assert fetch(max_bytes) == expected


@pytest.mark.parametrize(
    ("max_bytes", "expected"),
    [("5B", "\u00fc\u00fc"), ("4B", "\u00fc\u00fc"), ("6B", "\u00fc\u00fc\u00fc")],
)
def test_a_first_text_that_is_too_long_ends_with_a_whole_character(
    max_bytes: str, expected: str, reader: Any
) -> None:
    reader(ABOUT, *texts("\u00fc" * 9), END)
    assert fetch(max_bytes) == expected


def test_the_key_of_a_cached_text_is_that_of_older_versions() -> None:
    key = json.dumps(hub.HubRequest("a/b", None, "train", None, 100).cache_key(), sort_keys=True)
    assert hashlib.sha256(key.encode()).hexdigest().startswith("6eb24dcebcba776d")


def test_a_cached_text_is_fetched_again_only_if_damaged(reader: Any, tmp_path: Path) -> None:
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
    monkeypatch.setattr(hub, "MAX_WAITS", 2)
    reader(*lines, then=then)
    with pytest.raises(DownloadError, match=says):
        fetch()
    assert [path for path in (tmp_path / "cache").rglob("*") if path.is_file()] == []


def test_an_interruption_leaves_nothing_and_no_process(
    reader: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    endless = json.dumps({"text": "y" * 1000})
    then = (
        f"import os\nopen({str(tmp_path / 'pid')!r}, 'w').write(str(os.getpid()))\n"
        f"while True: print({endless!r})"
    )

    def notify(message: str) -> None:
        if "left" in message:
            raise KeyboardInterrupt

    reader(ABOUT, then=then)
    monkeypatch.setattr("glasslm.text.NOTIFY_INTERVAL_S", 0.1)
    with pytest.raises(KeyboardInterrupt):
        fetch("5GB", notify)
    assert [path for path in (tmp_path / "cache").rglob("*") if path.is_file()] == []
    if os.name == "posix":
        with pytest.raises(ProcessLookupError):
            os.kill(int((tmp_path / "pid").read_text()), 0)
    reader(ABOUT, *texts("fine"), END)
    assert fetch("5GB") == "fine"


def test_wikipedia_is_a_dataset_with_fixed_values(reader: Any) -> None:
    log = reader(ABOUT, *texts("Anarchism\n\nAnarchism is"), END)
    data = DataConfig(corpus="wikipedia", max_bytes="2MB")
    source = corpora.find_source(data, lambda message: None)
    assert (source.name, "".join(source.text())) == ("wikipedia", "Anarchism\n\nAnarchism is")
    request = json.loads(log.read_text())
    assert (request["dataset"], request["config"], request["max_bytes"]) == (
        "wikimedia/wikipedia",
        "20231101.en",
        2_000_000,
    )
    assert (request["title"], request["column"], request["revision"]) == (
        "title",
        "text",
        wikipedia.REVISION,
    )
    reader({"failed": "no network"})
    with pytest.raises(DownloadError, match=r"no network; .*wikipedia/tree/main/20231101\.en"):
        wikipedia.find_source(3, lambda message: None)


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        (
            {"hf_dataset": "a/b", "corpus": "python"},
            "both the corpus python and --hf-dataset .* choose one",
        ),
        ({"hf_dataset": "a/b", "text_file": ("x",)}, "both --text-file and --hf-dataset"),
        ({"hf_config": "en"}, "--hf-config needs --hf-dataset: give both"),
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
            corpora.find_source(data, lambda message: None)


@pytest.mark.parametrize(
    ("size", "expected"),
    [("200kB", 200_000), ("1.5 MB", 1_500_000), ("2gb", 2 * 10**9), ("123", 123), ("0.3kb", 300)],
)
def test_sizes_are_in_powers_of_1000(size: str, expected: int) -> None:
    assert DataConfig(max_bytes=size).max_byte_count == expected
