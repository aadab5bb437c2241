"""All answers of a capstone, of one run: which function answers which question."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from glasslm.course.capstone import (
    about_attention,
    about_order,
    about_size,
    about_text,
    run_context,
)
from glasslm.course.capstone.questions import Answer, Question, ask
from glasslm.course.capstone.run_context import Specimen

ANSWERS: dict[str, Callable[[Question, Specimen], Answer]] = {
    "attention": about_attention.equation,
    "sqrt-dk": about_attention.division,
    "causal-mask": about_attention.mask,
    "kv-cache": about_size.kv_cache,
    "chinchilla": about_size.chinchilla,
    "bpe": about_text.bpe,
    "families": about_text.families,
    "heads": about_attention.heads,
    "tying": about_size.tying,
    "positions": about_order.positions,
    "sampling": about_text.sampling,
    "compression": about_text.compression,
    "forward-pass": about_size.forward_pass,
}


def answer(run_dir: Path) -> list[Answer]:
    """The questions about the model of a run, in their order, answered with its own numbers; the run is only read.

    What cannot be measured, because a checkpoint cannot be read or the cache has lost the text, is said in the answer.
    Raises DamagedError where run.json, tokenizer.json or metrics.jsonl cannot be read.
    """
    of = run_context.read(run_dir)
    return [ANSWERS[question.name](question, of) for question in ask(of.run.config, of.vocab_size)]
