"""Texts for a report, written by a run's checkpoints: prompt by temperature, and one prompt through the checkpoints.

Each function stops at a deadline (time.monotonic) with what it has, so that a report never waits for a large model.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from glasslm.errors import GlasslmError
from glasslm.inference import trained_model
from glasslm.inference.sampling import Sampling
from glasslm.runs import checkpoint as checkpoints

TEMPERATURES = (0.3, 0.7, 1.0, 1.5)
TOKENS = 120
SEED = 42


@dataclass(frozen=True)
class Sample:
    prompt: str
    text: str  # the continuation, without the prompt
    temperature: float
    step: int  # of the checkpoint that wrote it


def choose_prompts(lines: Iterable[dict[str, Any]], excerpt: str, count: int = 3) -> list[str]:
    """Openings for the model to go on from: those used while training, then beginnings of lines of unseen text."""
    used = [str(line.get("prompt", "")) for line in lines if line["kind"] == "sample"]
    unseen = [
        line for line in excerpt.split("\n")[:-1] if len(line) >= 20
    ]  # the last line may be cut off
    openings = list(dict.fromkeys(line[:20].rsplit(" ", 1)[0] for line in unseen))
    spaced = openings[:: max(1, len(openings) // count)]
    return list(dict.fromkeys([prompt for prompt in used if prompt.strip()] + spaced))[:count] or [
        ""
    ]


def by_temperature(
    model: trained_model.Model, prompts: Sequence[str], deadline: float
) -> list[list[Sample]]:
    """One list for each prompt, with a sample for each of TEMPERATURES that there was time for."""
    rows: list[list[Sample]] = [[] for _ in prompts]
    for temperature in TEMPERATURES:
        if time.monotonic() < deadline:
            for row, sample in zip(rows, write(model, prompts, temperature, deadline)):
                row.append(sample)
    return rows


def by_checkpoint(run_dir: Path, prompt: str, temperature: float, deadline: float) -> list[Sample]:
    """The same prompt and seed for each checkpoint that is still there and whole, in order."""
    found = []
    for step in checkpoints.list_steps(run_dir):
        if time.monotonic() < deadline:
            try:
                model = trained_model.load(run_dir, checkpoint=step)
            except GlasslmError:  # a damaged one is not what a report is about; `verify` is
                continue
            found += write(model, [prompt], temperature, deadline)
    return found


def write(
    model: trained_model.Model, prompts: Sequence[str], temperature: float, deadline: float
) -> list[Sample]:
    texts = [""] * len(prompts)
    for piece in model.pieces(
        prompts, TOKENS, sampling=Sampling(temperature=temperature, seed=SEED)
    ):
        texts[piece.prompt] += piece.text
        if time.monotonic() > deadline:
            break
    return [Sample(prompt, text, temperature, model.step) for prompt, text in zip(prompts, texts)]
