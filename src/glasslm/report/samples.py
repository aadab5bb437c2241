"""Samples from a run's checkpoints: several temperatures, and one prompt at every checkpoint.

Each function stops at a deadline (time.monotonic) and returns the samples so far, so that a large
model does not delay the report.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from glasslm.errors import DamagedError, InputError
from glasslm.inference import trained_model
from glasslm.inference.sampling import Sampling
from glasslm.runs import checkpoint as checkpoints
from glasslm.runs.metrics import Line, sample_lines

TEMPERATURES = (0.3, 0.7, 1.0, 1.5)
MAX_TOKENS = 120
SEED = 42
MIN_LINE_CHARACTERS = 20  # of a line of text that gives a prompt


@dataclass(frozen=True)
class Sample:
    """A generated text and its settings."""

    prompt: str
    text: str  # the continuation, without the prompt
    temperature: float
    step: int  # of the checkpoint


def choose_prompts(lines: Iterable[Line], excerpt: str, count: int = 3) -> list[str]:
    """Up to `count` prompts: those used during training, then beginnings of validation lines."""
    used = [str(line.get("prompt", "")) for line in sample_lines(lines)]
    text_lines = excerpt.split("\n")[:-1]  # without the last line, which may be cut off
    long_lines = [line for line in text_lines if len(line) >= MIN_LINE_CHARACTERS]
    openings = list(
        dict.fromkeys(line[:MIN_LINE_CHARACTERS].rsplit(" ", 1)[0] for line in long_lines)
    )
    spaced = openings[:: max(1, len(openings) // count)]
    prompts = list(dict.fromkeys([prompt for prompt in used if prompt.strip()] + spaced))
    return prompts[:count] or [""]


def sample_temperatures(
    model: trained_model.Model, prompts: Sequence[str], deadline: float
) -> list[list[Sample]]:
    """A list for each prompt, with a sample for each of TEMPERATURES before the deadline."""
    rows: list[list[Sample]] = [[] for _ in prompts]
    for temperature in TEMPERATURES:
        if time.monotonic() < deadline:
            samples = generate_samples(model, prompts, temperature, deadline)
            for row, sample in zip(rows, samples):
                row.append(sample)
    return rows


def sample_checkpoints(
    run_dir: Path, prompt: str, temperature: float, deadline: float
) -> list[Sample]:
    """A sample with the same prompt and seed for each undamaged checkpoint of the run, in order."""
    samples = []
    for step in checkpoints.list_steps(run_dir):
        if time.monotonic() < deadline:
            try:
                model = trained_model.load_model(run_dir, checkpoint=step)
            except (DamagedError, InputError):  # `glasslm verify` reports damaged checkpoints
                continue
            samples += generate_samples(model, [prompt], temperature, deadline)
    return samples


def generate_samples(
    model: trained_model.Model, prompts: Sequence[str], temperature: float, deadline: float
) -> list[Sample]:
    """One sample for each prompt, each cut off at the deadline."""
    texts = [""] * len(prompts)
    for piece in model.pieces(
        prompts, MAX_TOKENS, sampling=Sampling(temperature=temperature, seed=SEED)
    ):
        texts[piece.prompt] += piece.text
        if time.monotonic() > deadline:
            break
    return [Sample(prompt, text, temperature, model.step) for prompt, text in zip(prompts, texts)]
