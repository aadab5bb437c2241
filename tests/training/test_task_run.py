"""A run on a synthetic task: exact answers in the log, the terminal, evaluate and the report."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path

import numpy as np
import pytest

from glasslm import cli
from glasslm.config.conversion import with_flags
from glasslm.config.presets import PRESETS
from glasslm.data.tasks.catalogue import draw_examples, read_examples
from glasslm.errors import InputError
from glasslm.inference.exact_answers import judge_examples
from glasslm.inference.trained_model import load_model
from glasslm.interop import model_card, model_export
from glasslm.report import task_answers
from glasslm.runs import checkpoint
from glasslm.runs.metrics import comparable_lines, eval_lines, sample_lines
from glasslm.runs.run_folder import Run
from glasslm.text import Notify, ignore_message
from glasslm.training import launch
from glasslm.training.fine_tuning import BaseRun
from small_runs import COMPUTE, SMALL, without_report
from tuned_runs import finetune

TASK = {
    "corpus": "task:sort", "task_size": 4, "task_line": 10, "block_size": 10,
    "task_examples": 3000, "batch_size": 64, "micro_batch_size": 64, "max_steps": 250,
    "eval_interval": 125, "checkpoint_interval": 250, "log_interval": 50, "sample_interval": 125,
}  # fmt: skip


def train(folder: Path, notify: Notify = ignore_message, **flags) -> Run:
    config = with_flags(PRESETS["tiny"](), SMALL | TASK | flags)
    with without_report():
        return Run(launch.train(config, COMPUTE, folder, notify=notify).run_dir)


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Run:
    return train(tmp_path_factory.mktemp("task") / "sort")


def test_a_small_model_learns_what_ngrams_cannot(run, capsys):
    last = eval_lines(run.metrics())[-1]
    assert last["whole"]
    assert last["accuracy"]["of"] == 300
    assert last["accuracy"]["share"] > 0.7
    assert last["accuracy"]["ci_low"] < last["accuracy"]["share"] < last["accuracy"]["ci_high"]
    assert cli.main(["evaluate", str(run.path), "--checkpoint", "latest", "--json"]) == 0
    printed = capsys.readouterr()
    facts = json.loads(printed.out)
    assert "evaluating the answers in 3,000 tokens" in printed.err
    assert "gzip_bpb" not in facts  # its loss is that of a text
    assert facts["accuracy"] == last["accuracy"]
    held_out = facts["domain"]["groups"][0]
    assert held_out["examples"] == "held out"
    assert held_out["model"]["count"] == last["accuracy"]["count"]
    assert held_out["ngrams"]["ci_high"] < held_out["model"]["ci_low"]


def test_an_answer_is_right_exactly_if_greedy_decoding_writes_it(run):
    model = load_model(run.path, "latest")
    dataset = run.dataset(ignore_message)
    examples = read_examples(model.tokenizer.decode(dataset.val.tokens[:600]))
    judged = judge_examples(model, examples)
    assert judged.sum() > 0
    for example, is_right in zip(examples, judged):
        text = model.generate(f"{example.question}=", 8, temperature=0, stop="\n")
        assert (text == example.answer) == is_right, example


def test_longer_examples_need_a_longer_context(run):
    model = load_model(run.path)
    with pytest.raises(InputError, match="the context is 10"):
        judge_examples(model, draw_examples("sort", [8], 2, "test"))


def test_the_sample_continues_a_held_out_question(run):
    first = sample_lines(run.metrics())[0]
    question = first["prompt"].removesuffix("=")
    text = run.tokenizer.decode(run.dataset(ignore_message).val.tokens[:10])
    assert text.startswith(first["prompt"])
    assert "=" not in question
    assert "\n" not in first["text"]


def test_the_same_run_has_the_same_bits(tmp_path):
    runs = [train(tmp_path / name, max_steps=20, eval_interval=20) for name in ("a", "b")]
    weights = [dict(checkpoint.load(run.path, "latest").weights()) for run in runs]
    for name, array in weights[0].items():
        np.testing.assert_array_equal(array, weights[1][name])
    first, second = (comparable_lines(run.metrics()) for run in runs)
    assert first == second


def test_answers_alone_are_counted(run):
    """Each answer with the line end that closes it, of the whole validation part."""
    text = run.tokenizer.decode(run.dataset(ignore_message).val.tokens[:])
    expected = sum(len(example.answer) + 1 for example in read_examples(text))
    assert eval_lines(run.metrics())[-1]["tokens"] == expected


def test_a_context_that_cuts_examples_is_refused(tmp_path):
    with pytest.raises(InputError, match="give --block-size 10, or a multiple of it"):
        train(tmp_path / "run", block_size=16)


@pytest.mark.usefixtures("no_figures")
def test_the_report_shows_the_answers_by_size(run):
    assert cli.main(["report", str(run.path)]) == 0
    page = (run.path / "report.md").read_text(encoding="utf-8")
    assert "Does the model solve the task?" in page
    assert "4 letters" in page
    assert "tokens of the answers in the validation text" in page
    assert "the share of exact answers" in page
    assert "Is the model better than n-grams, gzip and xz?" not in page


def test_a_text_that_is_cut_within_an_example_is_read_to_the_line_before(run, monkeypatch):
    monkeypatch.setattr(task_answers, "MAX_TRAIN_BYTES", 52)  # 5 examples and 2 characters
    monkeypatch.setattr(task_answers, "judge_examples", lambda _, e: np.zeros(len(e)))
    dataset, model = run.dataset(ignore_message), load_model(run.path)
    groups = task_answers.measure_answers(dataset, model, time.monotonic() + 60)
    assert [group.label for group in groups][:2] == ["held out", "of the training text"]


def test_the_model_card_compares_no_answers_with_a_text(run):
    card = model_card.render_card(model_export.load_export(str(run.path)), None)
    assert "| the answers in the validation examples |" in card
    assert "gzip" not in card


def test_forgetting_of_a_task_is_that_of_its_answers(tmp_path):
    """Two lengths of context that hold one example each; the first is that of the base."""
    base = train(tmp_path / "base", task_examples=320, max_steps=20, eval_interval=20)
    characters = sorted(set(base.tokenizer.decode(range(base.tokenizer.vocab_size))) - set("\n="))
    text = tmp_path / "new.txt"
    text.write_text("".join(characters + characters[::-1]) * 100, encoding="utf-8")
    best = min(eval_lines(base.metrics()), key=lambda line: line["loss"])
    for block_size in (10, 19):
        tuned = finetune(
            base.path, text, tmp_path / str(block_size), block_size=block_size, max_steps=1
        )
        old = eval_lines(Run(tuned).metrics(), "old")[0]
        assert old["loss"] == pytest.approx(best["loss"], rel=1e-5)
        assert old["accuracy"] == best["accuracy"]
        assert "train_accuracy" not in old


def test_forgetting_needs_a_context_that_holds_an_example(run):
    notes: list[str] = []
    assert BaseRun(str(run.path)).old_text(9, notes.append) is None
    assert "give --block-size 10 or more" in notes[0]


def test_a_note_says_how_much_the_terms_of_experts_weigh_beside_answers(tmp_path):
    """By the targets of a batch of 64 examples; the expected factor is that of the whole text."""
    notes: list[str] = []
    experts = {"n_experts": 2, "experts_per_token": 1}
    small = train(tmp_path / "run", notes.append, **experts, max_steps=1, eval_interval=1)
    factor = float(
        re.findall(r"the terms of the experts weigh (\d+\.\d) times", " ".join(notes))[0]
    )
    text = small.tokenizer.decode(small.dataset(ignore_message).train.tokens[:])
    answers = sum(len(example.answer) + 1 for example in read_examples(text))
    assert factor == pytest.approx(len(text) / answers, rel=0.1)
