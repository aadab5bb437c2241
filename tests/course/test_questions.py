"""The checkpoint questions.

Each is answered for every kind of model, and its numbers are those of this run.
"""

from __future__ import annotations

import dataclasses
import math
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from trained_runs import KINDS, QUICK, TrainedRuns, column, number

from glasslm.config.schema import ComputeConfig, ModelConfig, RunConfig
from glasslm.course.capstone import answers, text_answers
from glasslm.course.capstone.questions import ORDER, list_questions
from glasslm.data.cache import cache_dir
from glasslm.inference import trained_model
from glasslm.model.parameters import parameter_table
from glasslm.runs import metrics
from glasslm.runs.run_folder import Run
from glasslm.training import launch
from small_runs import ignore_message, small_config, train, without_report, write_text


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> TrainedRuns:
    return TrainedRuns(tmp_path_factory.mktemp("runs"))


# -- every question, every kind of model -----------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_all_questions_are_answered_from_files_that_are_there(kind: str, runs: TrainedRuns) -> None:
    before = {path: path.stat().st_mtime_ns for path in runs.run(kind).rglob("*")}
    found = answers.answer_questions(runs.run(kind))
    assert {
        path: path.stat().st_mtime_ns for path in runs.run(kind).rglob("*")
    } == before  # the run is only read
    before_training = small_config(runs.text, **QUICK | KINDS[kind])
    questions = list_questions(before_training, Run(runs.run(kind)).tokenizer.vocab_size)
    assert [answer.question for answer in found] == questions
    assert [question.name for question in questions] == list(ORDER)
    for answer in found:
        assert not any("Nothing more can be measured" in paragraph for paragraph in answer.text)
        assert answer.sources
        assert all((runs.run(kind) / path).is_file() for _, path in answer.sources)
        assert all(len(row) == len(answer.header) for row in answer.rows) or not answer.header
        if answer.number is not None:
            exact = (
                f"{answer.number:,.0f}"
                if answer.number == int(answer.number)
                else f"{answer.number:.4f}"
            )
            assert re.search(rf"(?<![\d,]){exact}(?![\d,])", answer.text[0]), (
                answer.question.name,
                exact,
            )
    weights = ["checkpoints/000008/model.safetensors"] + ["base/model.safetensors"] * (
        kind == "adapted"
    )
    assert [path for _, path in runs.answers(kind)["attention"].sources] == ["run.json", *weights]


def test_another_run_has_other_numbers(runs: TrainedRuns, tmp_path: Path) -> None:
    backwards = tmp_path / "text.txt"
    backwards.write_text(
        write_text(tmp_path / "t").read_text(encoding="utf-8")[::-1], encoding="utf-8", newline="\n"
    )
    flags = {"tokenizer": "bpe", "vocab_size": 270, "block_size": 20, "d_model": 48, "n_layers": 3}
    found = answers.answer_questions(train(backwards, tmp_path / "run", **QUICK | flags).run_dir)
    one, other = runs.answers("one layer"), {answer.question.name: answer for answer in found}
    for name in ORDER:
        assert one[name].text != other[name].text, name
        assert one[name].rows != other[name].rows or not one[name].rows, name
        if one[name].number is not None:
            assert one[name].number != other[name].number, name


def test_the_right_numbers_of_a_known_model() -> None:
    """By hand.

    4 layers, 4 heads of which 2 keep keys and values, width 128, 128 tokens, 65 characters.
    """
    config = RunConfig(
        model=ModelConfig(n_kv_heads=2, position="none", norm="none", feedforward="gelu")
    )
    right = {question.name: question.number for question in list_questions(config, 65)}
    parameters = 65 * 128 + 4 * (2 * 128 * 128 + 2 * 64 * 128 + 2 * 512 * 128)
    assert right == {
        "attention": 4 * 4 * 128 * 128,
        "sqrt-dk": 32,
        "causal-mask": 128 * 127 / 2,
        "heads": 128 * (128 + 128 + 64 + 64),
        "kv-cache": 2 * 4 * 2 * 32 * 128 * 4,
        "chinchilla": 20 * parameters,
        "bpe": 256,
        "families": None,
        "tying": 65 * 128,
        "positions": None,
        "sampling": None,
        "compression": math.log2(65),
        "forward-pass": 16 * 128 * 65,
    }


# -- sizes -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_the_cache_takes_the_bytes_that_it_takes(kind: str, runs: TrainedRuns) -> None:
    """Measured on a real one, without the rest of its last block of keys.

    With a window of 8 it keeps 8 tokens.
    """
    engine, answer = (
        trained_model.load_model(runs.run(kind), engine="numpy").engine,
        runs.answers(kind)["kv-cache"],
    )
    c = Run(runs.run(kind)).config.model
    for n, row in zip((1, c.block_size, 1000), answer.rows):
        cache: Any = engine.new_cache(1, n)
        assert row[0].startswith(f"{n:,}")
        keys, values = (array[:, :, :, : cache.size] for array in (cache.keys, cache.values))
        assert number(row[1]) == keys.size + values.size
        assert number(row[2]) == keys.nbytes + values.nbytes == 2 * number(row[3])
    assert answer.number == number(answer.rows[1][2])


def test_chinchilla_counts_what_the_run_saw(runs: TrainedRuns, tmp_path: Path) -> None:
    answer, record = runs.answers("plain")["chinchilla"], Run(runs.run("plain")).record
    N, D = record["parameters"]["total"], 8 * 8 * 32
    found = dict(answer.rows)
    assert found["tokens that this run trained on"].startswith(
        f"{D:,}, {D / record['data']['train_tokens']:.3g} times"
    )
    assert found["C = 6 N D"] == f"{6 * N * D:.3g} FLOPs"
    assert found["counted exactly"].startswith(f"{record['flops_per_token'] * D:.3g} ")
    best_N, best_D = map(number, re.findall(r"[\d,]+", found["the same C by the rule"]))
    assert 6 * best_N * best_D == pytest.approx(6 * N * D, rel=0.01)
    assert best_D / best_N == pytest.approx(20, rel=0.01)
    for tokens, said in (
        (19 * N, "follow the rule"),
        (60 * N, "3 times that"),
        (0, "not logged a step"),
    ):
        path = tmp_path / str(tokens)
        shutil.copytree(runs.run("plain"), path)
        (path / "metrics.jsonl").unlink()
        if tokens:
            with metrics.MetricsLog(path / "metrics.jsonl") as log:
                log.write(
                    {
                        "kind": "step",
                        "step": 8,
                        "loss": 1.0,
                        "lr": 1.0,
                        "grad_norm": 1.0,
                        "clipped": False,
                        "tokens": tokens,
                        "epoch": 1.0,
                    }
                )
        again = next(
            answer
            for answer in answers.answer_questions(path)
            if answer.question.name == "chinchilla"
        )
        assert any(said in paragraph for paragraph in again.text)


@pytest.mark.parametrize("kind", KINDS)
def test_the_stages_of_the_forward_pass_have_all_parameters(kind: str, runs: TrainedRuns) -> None:
    rows = runs.answers(kind)["forward-pass"].rows
    parts = [number(row[3]) for row in rows[:-1] if row[3]]
    assert sum(parts) == number(rows[-1][3]) == Run(runs.run(kind)).record["parameters"]["total"]
    c = Run(runs.run(kind)).config.model
    assert any(row[3] == "" for row in rows if row[0] == "head") == c.tie_embeddings


@pytest.mark.parametrize("kind", ["plain", "bpe"])
def test_tying_saves_the_difference_of_two_tables(kind: str, runs: TrainedRuns) -> None:
    answer, c = runs.answers(kind)["tying"], small_config(Path("x"), **KINDS[kind]).model
    for row in answer.rows:
        tied, untied = (
            parameter_table(dataclasses.replace(c, tie_embeddings=which), int(number(row[0]))).total
            for which in (True, False)
        )
        assert list(map(number, row[1:4])) == [tied, untied, untied - tied]
    assert answer.number == number(answer.rows[0][3])
    assert ("does not tie" in answer.text[0]) == (not c.tie_embeddings)


# -- what trained it, and what is not there --------------------------------------------------------


def test_what_torch_trained_is_answered_as_well(runs: TrainedRuns, tmp_path: Path) -> None:
    pytest.importorskip("torch")
    compute = ComputeConfig(engine="torch", threads=1, compile="off")
    with without_report():
        path = launch.train(
            small_config(runs.text, **QUICK | {"dropout": 0.1}),
            compute,
            tmp_path / "run",
            notify=ignore_message,
        ).run_dir
    found = {answer.question.name: answer for answer in answers.answer_questions(path)}
    assert Run(path).record["engine"] == "torch"
    assert "before it move by 0.0 at most" in found["causal-mask"].text[-1]
    assert len(found["positions"].rows) == 4


def test_without_a_checkpoint_the_rest_is_answered(runs: TrainedRuns, tmp_path: Path) -> None:
    shutil.copytree(runs.run("plain"), tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    found = {answer.question.name: answer for answer in answers.answer_questions(tmp_path / "run")}
    lacking = {
        name for name, answer in found.items() if "Nothing more can be measured" in answer.text[-1]
    }
    assert lacking == {"attention", "sqrt-dk", "causal-mask", "positions", "sampling"}
    assert "checkpoint" in found["attention"].text[-1]
    assert len(found["bpe"].rows) == text_answers.SHOWN_MERGES
    assert not any(
        "checkpoints/" in path for answer in found.values() for _, path in answer.sources
    )


@pytest.mark.parametrize("kind", ["plain", "bpe"])
def test_without_the_text_the_rest_is_answered(
    kind: str, runs: TrainedRuns, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    runs.run(kind)
    monkeypatch.setenv("GLASSLM_CACHE", str(tmp_path))
    assert cache_dir() == tmp_path
    found = {answer.question.name: answer for answer in answers.answer_questions(runs.run(kind))}
    assert "no longer in the cache" in found["attention"].text[-1]
    assert "the cache no longer has" in found["bpe"].text[-1].lower()
    assert [row[:1] for row in found["bpe"].rows] == (
        [] if kind == "plain" else [(str(i),) for i in range(1, 9)]
    )
    assert found["kv-cache"].rows
    assert "gzip" not in column(found["compression"], 0)
