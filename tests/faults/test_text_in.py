"""Bad files, and an interrupted or damaged cache: clear errors, and no bad file in place."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest

from glasslm.config.schema import DataConfig
from glasslm.data import dataset as dataset_module
from glasslm.data.dataset import prepare_dataset, reopen_dataset
from glasslm.data.sources import corpora
from glasslm.data.sources.text_files import Source
from glasslm.errors import ExhaustedError, InputError


def quiet(message: str) -> None:
    pass


# -- Bad files -------------------------------------------------------------------------------------


def find_files(*names: Path | str) -> Source:
    return corpora.find_source(DataConfig(text_file=tuple(map(str, names))), quiet)


@pytest.mark.parametrize("body", [b"", b"\xef\xbb\xbf"])
def test_an_empty_text_is_refused(tmp_path: Path, body: bytes) -> None:
    (tmp_path / "empty.txt").write_bytes(body)
    with pytest.raises(InputError, match="empty"):
        prepare_dataset(DataConfig(), find_files(tmp_path / "empty.txt"), quiet)


def test_a_missing_path_is_named(tmp_path: Path) -> None:
    (tmp_path / "shakespeare.txt").write_text("x")
    (tmp_path / "nothing").mkdir()
    for name, says in {
        "shakespear.txt": r"no file or folder .*shakespear\.txt: did you mean .*shakespeare\.txt\?",
        "*.md": r"no file matches .*\*\.md",
        "nothing": "no text files in the folder",
        "no/such/folder/text": "no file or folder",
        "long" * 100: "no file or folder",
    }.items():
        with pytest.raises(InputError, match=says):
            find_files(tmp_path / name)


@pytest.mark.skipif(
    not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may read everything"
)
def test_an_unreadable_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "secret.txt"
    path.write_text("x")
    path.chmod(0)
    with pytest.raises(InputError, match=r"secret\.txt cannot be read"):
        find_files(path)


def test_utf16_is_recognized(tmp_path: Path) -> None:
    (tmp_path / "w.txt").write_bytes("text".encode("utf-16"))
    with pytest.raises(InputError, match="UTF-16"):
        prepare_dataset(DataConfig(), find_files(tmp_path / "w.txt"), quiet)


def test_a_file_that_changes_while_it_is_read_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "log.txt"
    path.write_text("x" * 1000)
    source = find_files(path)
    path.write_text("y" * 1000)
    with pytest.raises(InputError, match="changed while"):
        prepare_dataset(DataConfig(), source, quiet)


def test_nuls_are_kept_and_noted(tmp_path: Path) -> None:
    (tmp_path / "n.txt").write_bytes(b"ab\0b\0" * 50)
    messages: list[str] = []
    dataset = prepare_dataset(DataConfig(), find_files(tmp_path / "n.txt"), messages.append)
    assert dataset.tokenizer.token_bytes == [b"\0", b"a", b"b"]
    assert any("100 NUL" in message for message in messages)


def test_replaced_bytes_are_counted(tmp_path: Path) -> None:
    path = tmp_path / "r.txt"
    path.write_bytes("\ufffd".encode() + (b"a\xffb\xfe" + b"c" * 400) * 50)
    messages: list[str] = []
    data = DataConfig(text_file=(str(path),), tokenizer="byte", encoding_errors="replace")
    dataset = prepare_dataset(data, corpora.find_source(data, quiet), messages.append)
    n_bytes = 3 + 50 * (400 + len("a\ufffdb\ufffd".encode()))
    assert dataset.train.bytes + dataset.val.bytes == n_bytes
    assert any("holds 100 U+FFFD" in message for message in messages)


# -- The cache -------------------------------------------------------------------------------------

KILLED = textwrap.dedent("""
    import os, sys
    from glasslm.data.sources import corpora
    from glasslm import files
    from glasslm.data import dataset
    from glasslm.config.schema import DataConfig

    where, count = sys.argv[2], int(sys.argv[3])
    owner, name = {
        "encode": (dataset.tokenizers.CharTokenizer, "encode"),
        "write": (files, "_write"),
        "rename": (files, "_rename"),
    }[where]
    real, calls = getattr(owner, name), 0

    def killing(*args, **kwargs):
        global calls
        calls += 1
        if calls == count:
            os._exit(137)
        return real(*args, **kwargs)

    setattr(owner, name, killing)
    dataset.PIECE_CHARACTERS = 1000
    data = DataConfig(text_file=(sys.argv[1],))
    dataset.prepare_dataset(data, corpora.find_source(data, print), print)
""")


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("".join(f"line {i} of many\n" for i in range(2000)), encoding="utf-8")
    return path


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("GLASSLM_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "tokens"


def shard_bytes(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


# Of the renames the first is that of the tokens, the second that of the recipe.
@pytest.mark.parametrize(
    ("where", "count"),
    [("encode", 1), ("encode", 20), ("write", 1), ("rename", 1), ("write", 30), ("rename", 2)],
)
def test_a_killed_tokenization_is_redone(text: Path, cache: Path, where: str, count: int) -> None:
    died = subprocess.run(
        [sys.executable, "-c", KILLED, str(text), where, str(count)], capture_output=True
    )
    assert died.returncode == 137, died.stderr.decode()
    data = DataConfig(text_file=(str(text),))
    dataset = prepare_dataset(data, corpora.find_source(data, quiet), quiet)
    both = dataset.tokenizer.decode(
        np.concatenate([dataset.train.tokens[:], dataset.val.tokens[:]])
    )
    assert both == text.read_text(encoding="utf-8")
    recipe = dataset_module._recipe_name(data, corpora.find_source(data, quiet))
    assert {path.name for path in cache.iterdir()} == {
        dataset.sha256,
        f"{recipe}.json",
        ".lock",
    }  # nothing half done


def test_any_damage_is_found_and_repaired(text: Path, cache: Path) -> None:
    data = DataConfig(text_file=(str(text),), tokenizer="bpe", vocab_size=300)
    source = corpora.find_source(data, quiet)
    folder = cache / prepare_dataset(data, source, quiet).sha256
    whole = shard_bytes(folder)
    assert set(whole) == {"train.bin", "val.bin", "tokenizer.json", "facts.json", "manifest.json"}
    for name, body in whole.items():
        for damage in (body[:-1], body[:20] + bytes([body[20] ^ 1]) + body[21:], b"", None):
            if damage is None:
                (folder / name).unlink()
            else:
                (folder / name).write_bytes(damage)
            assert reopen_dataset(data, folder.name) is None
            prepare_dataset(data, source, quiet)
            assert shard_bytes(folder) == whole


def test_two_processes_at_once_both_get_the_tokens(text: Path, cache: Path) -> None:
    command = [sys.executable, "-c", KILLED, str(text), "encode", "-1"]
    both = [subprocess.Popen(command, stdout=subprocess.PIPE) for _ in range(2)]
    assert [process.wait(30) for process in both] == [0, 0]
    for process in both:
        assert process.stdout is not None
        process.stdout.close()
    assert len([path for path in cache.iterdir() if path.is_dir()]) == 1


def test_a_cache_that_cannot_be_written_is_named(
    text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GLASSLM_CACHE", str(text))  # a file
    data = DataConfig(text_file=(str(text),))
    with pytest.raises(InputError, match=r"cache folder .* set GLASSLM_CACHE"):
        prepare_dataset(data, corpora.find_source(data, quiet), quiet)


LIMITED = textwrap.dedent("""
    import resource, signal, sys
    from glasslm.data.sources import corpora
    from glasslm.data.dataset import prepare_dataset
    from glasslm.config.schema import DataConfig
    from glasslm.errors import ExhaustedError

    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
    data = DataConfig(text_file=(sys.argv[1],))
    try:
        prepare_dataset(data, corpora.find_source(data, print), print)
    except ExhaustedError as error:
        print(error)
        sys.exit(error.exit_code)
""")


@pytest.mark.skipif(sys.platform == "win32", reason="needs resource limits")
def test_a_full_disk_is_an_error_with_the_cure(text: Path, cache: Path) -> None:
    ended = subprocess.run(
        [sys.executable, "-c", LIMITED, str(text)], capture_output=True, text=True
    )
    assert ended.returncode == ExhaustedError.exit_code, ended.stderr
    assert "is full" in ended.stdout
    assert "GLASSLM_CACHE" in ended.stdout
