"""Small runs of many kinds with their answers, for the tests of the checkpoint questions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from glasslm.course.capstone import answers
from glasslm.course.capstone.questions import Answer
from small_runs import train, write_text

QUICK: dict[str, Any] = {
    "max_steps": 8,
    "warmup_steps": 1,
    "eval_interval": 4,
    "checkpoint_interval": 4,
    "sample_interval": 0,
}
KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "one layer": {
        "n_layers": 1,
        "position": "none",
        "n_heads": 4,
        "n_kv_heads": 2,
        "feedforward": "gelu",
    },
    "bpe": {
        "tokenizer": "bpe",
        "vocab_size": 280,
        "n_kv_heads": 1,
        "position": "alibi",
        "tie_embeddings": False,
    },
    "experts": {
        "tokenizer": "byte",
        "n_experts": 3,
        "shared_expert": True,
        "window": 8,
        "qk_norm": True,
        "bias": True,
    },
    "post": {
        "norm_position": "post",
        "norm": "layernorm",
        "position": "learned",
        "feedforward": "relu",
        "bias": True,
        "scale_embeddings": True,
        "block_size": 24,
    },
    "bare": {"norm": "none", "position": "sinusoidal", "n_layers": 3, "ema": 0.9},
    "unplaced": {"position": "none"},
    "adapted": {"lora_rank": 2, "lora_targets": "q,o,down"},  # beside the weights of the plain one
}


class TrainedRuns:
    """Runs of each kind, trained on first use, and their answers by name."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.text = folder, write_text(folder / "text.txt")
        self._runs: dict[str, Path] = {}
        self._answers: dict[str, dict[str, Answer]] = {}

    def run(self, kind: str) -> Path:
        if kind not in self._runs:
            base = {"init_from": str(self.run("plain"))} if kind == "adapted" else {}
            self._runs[kind] = train(
                self.text, self.folder / kind, **QUICK | KINDS[kind] | base
            ).run_dir
        return self._runs[kind]

    def answers(self, kind: str) -> dict[str, Answer]:
        if kind not in self._answers:
            self._answers[kind] = {
                answer.question.name: answer for answer in answers.answer_questions(self.run(kind))
            }
        return self._answers[kind]


def column(answer: Answer, place: int) -> list[str]:
    return [row[place] for row in answer.rows]


def number(word: str) -> float:
    return float(word.replace(",", ""))
