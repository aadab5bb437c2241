"""The answers of a capstone about one run: the function for each question."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from glasslm.course.capstone import (
    attention_answers,
    position_answers,
    run_context,
    size_answers,
    text_answers,
)
from glasslm.course.capstone.questions import Answer, Question, list_questions
from glasslm.course.capstone.run_context import RunContext

ANSWERS: dict[str, Callable[[Question, RunContext], Answer]] = {
    "attention": attention_answers.explain_equation,
    "sqrt-dk": attention_answers.explain_division,
    "causal-mask": attention_answers.explain_mask,
    "kv-cache": size_answers.explain_kv_cache,
    "chinchilla": size_answers.explain_chinchilla,
    "bpe": text_answers.explain_bpe,
    "families": text_answers.explain_families,
    "heads": attention_answers.explain_heads,
    "tying": size_answers.explain_tying,
    "positions": position_answers.explain_positions,
    "sampling": text_answers.explain_sampling,
    "compression": text_answers.explain_compression,
    "forward-pass": size_answers.explain_forward_pass,
}


def answer_questions(run_dir: Path) -> list[Answer]:
    """The answers about the model of a run, in order, with its own numbers. The run is only read.

    An answer says what cannot be measured because a checkpoint or the cached text is missing.
    Raises DamagedError if run.json, tokenizer.json or metrics.jsonl cannot be read.
    """
    context = run_context.read_run(run_dir)
    questions = list_questions(context.run.config, context.vocab_size)
    return [ANSWERS[question.name](question, context) for question in questions]
