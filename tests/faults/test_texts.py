"""Texts that are too short or too large, and prompts that a model cannot read.

This file is also the program of a child process: `python test_texts.py TEXT`.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import glasslm
from glasslm import cli
from glasslm.config.schema import ComputeConfig, DataConfig
from glasslm.data.dataset import Dataset, prepare_dataset
from glasslm.data.sources import corpora
from glasslm.inference.stream import visible_length
from glasslm.training import launch, run_inputs
from small_runs import ignore_message, small_config, train_command, without_report, write_text

linux = pytest.mark.skipif(
    sys.platform != "linux", reason="needs resource limits that bind, as Linux has them"
)
ENGINES = ["numpy", "torch"]
BLOCK = 16

# -- too short -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "says"),
    [
        ("", "every file is empty"),
        ("\ufeff", "is empty"),
        ("a", "training part has 0 tokens (0 bytes), but a window of --block-size 16 takes 17"),
        ("é", "training part has 0 tokens (0 bytes), but a window of --block-size 16 takes 17"),
        (
            "ab" * 5,
            "training part has 9 tokens (9 bytes), but a window of --block-size 16 takes 17",
        ),
        (
            "ab" * 9,
            "training part has 16 tokens (16 bytes), but a window of --block-size 16 takes 17",
        ),
        (
            "ab" * 50,
            "validation part has 10 tokens (10 bytes), but a window of --block-size 16 takes 17",
        ),
    ],
    ids=[
        "nothing",
        "a mark alone",
        "one character",
        "one of two bytes",
        "ten",
        "one too few",
        "no validation",
    ],
)
def test_a_text_that_is_too_short_is_refused_with_both_sizes(
    body: str, says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "text.txt").write_text(body, encoding="utf-8", newline="\n")
    command = train_command(tmp_path / "text.txt", tmp_path / "run", block_size=BLOCK)
    assert cli.main(list(map(str, command))) == 2
    (message,) = capsys.readouterr().err.splitlines()
    assert says in message
    assert not (tmp_path / "run").exists()


def test_a_text_of_one_character_is_refused_and_older_runs_of_one_are_not_diagnosed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """ln V is 0, and ratios to it have no value."""
    (tmp_path / "text.txt").write_text("a" * 2000)
    command = train_command(tmp_path / "text.txt", tmp_path / "run", max_steps=2, block_size=BLOCK)
    assert cli.main(list(map(str, command))) == 2
    assert "the single token 'a', so there is nothing to predict" in capsys.readouterr().err
    with monkeypatch.context() as patch, without_report():
        patch.setattr(run_inputs, "require_enough_tokens", lambda *sizes: None)  # as in 0.1
        assert cli.main(list(map(str, command))) == 0
    for words in (["evaluate"], ["verify"], ["generate", "--prompt", "a"]):
        assert cli.main([*words[:1], str(tmp_path / "run"), *words[1:]]) == 0
    capsys.readouterr()
    assert cli.main(["diagnose", str(tmp_path / "run")]) == 2
    assert "nothing to predict" in capsys.readouterr().err
    log = tmp_path / "run" / "metrics.jsonl"
    assert cli.main(["diagnose", "--curve", str(log), "--out", str(tmp_path / "page")]) in (0, 1)


# -- too large -------------------------------------------------------------------------------------

LINE = b"a line of a text that is much larger than the memory that there is to read it\n"


def tokenize_with_little_memory(path: Path) -> None:
    """Tokenize a text with 64 MB more memory than a small text takes, less than the text needs."""
    import resource

    (path.parent / "small.txt").write_bytes(LINE * 1000)

    def prepare_text(name: str) -> Dataset:
        data = DataConfig(text_file=(str(path.parent / name),))
        return prepare_dataset(data, corpora.find_source(data, ignore_message), ignore_message)

    prepare_text("small.txt")
    status = Path("/proc/self/status").read_text(encoding="ascii")
    used_bytes = int(status.partition("VmData:")[2].split()[0]) * 1024
    # Memory that is mapped from a file does not count.
    resource.setrlimit(resource.RLIMIT_DATA, (used_bytes + (64 << 20),) * 2)
    try:
        path.read_bytes()
        raise AssertionError("the limit does not bind")
    except MemoryError:
        pass
    facts = prepare_text(path.name).facts
    print(json.dumps({"bytes": facts["train_bytes"] + facts["val_bytes"]}))


@linux
@pytest.mark.parametrize("megabytes", [100, pytest.param(1000, marks=pytest.mark.slow)])
def test_a_text_larger_than_the_memory_is_tokenized(megabytes: int, tmp_path: Path) -> None:
    path = tmp_path / "large.txt"
    block = LINE * (10**6 // len(LINE))
    with open(path, "wb") as file:
        for _ in range(megabytes):
            file.write(block)
    folders = [str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    environment = {
        "OPENBLAS_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join(folders),
        "GLASSLM_CACHE": str(tmp_path / "c"),
    }
    command = [sys.executable, __file__, str(path)]
    done = subprocess.run(
        command, capture_output=True, text=True, env=os.environ | environment, timeout=500
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["bytes"] == megabytes * len(block)


# -- prompts ---------------------------------------------------------------------------------------


def train_run(engine: Any, folder: Path) -> Path:
    if engine == "torch":
        pytest.importorskip("torch")
    flags = {"max_steps": 12, "block_size": BLOCK, "sample_interval": 0, "d_model": 16}
    compute = ComputeConfig(engine=engine, device="cpu", precision="fp64", threads=1)
    with without_report():
        return launch.train(
            small_config(write_text(folder / "text.txt"), **flags),
            compute,
            folder / "run",
            notify=ignore_message,
        ).run_dir


@pytest.mark.parametrize("engine", ENGINES)
def test_a_prompt_that_a_model_cannot_read_is_refused_with_what_it_knows(
    engine: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = train_run(engine, tmp_path)
    capsys.readouterr()
    for prompt, says in {
        "the cät": "'ä' (U+00E4 LATIN SMALL LETTER A WITH DIAERESIS)",
        "a 走": "U+8D70",
        "the \udcff": "lone surrogate U+DCFF at character 4",
        "x\x1b[31m": "U+001B",
    }.items():
        assert cli.main(["generate", str(run), "--engine", engine, "--prompt", prompt]) == 2
        output = capsys.readouterr()
        assert says in output.err
        assert output.out == ""
        assert "\x1b" not in output.err
        if "surrogate" not in says:
            assert "acdefghiklmnorstwy" in output.err


@pytest.mark.parametrize("engine", ENGINES)
def test_a_prompt_longer_than_the_context_is_read_as_documented(
    engine: Any, tmp_path: Path
) -> None:
    """The model reads the newest tokens, as many as visible_length returns, and no others."""
    model = glasslm.load(train_run(engine, tmp_path), engine=engine, device="cpu", precision="fp64")
    text = "the old king follows my sister. a dog likes the cat. " * 3
    for length in (1, BLOCK - 1, BLOCK, BLOCK + 1, BLOCK + 9, 3 * BLOCK, len(text)):
        prompt = text[:length]
        n_visible = visible_length(length, BLOCK)
        assert n_visible <= BLOCK
        newest = prompt[-n_visible:]
        np.testing.assert_allclose(model.logits(prompt), model.logits(newest), rtol=1e-6)
        assert model.generate(prompt, 1, temperature=0) == model.generate(newest, 1, temperature=0)
    other = model.logits("my sister calls " + text[BLOCK:])  # text outside the window has no effect
    np.testing.assert_array_equal(other, model.logits(text))
    assert (model.logits(text[:-3] + "aaa") != model.logits(text)).any()


if __name__ == "__main__":
    tokenize_with_little_memory(Path(sys.argv[1]))
