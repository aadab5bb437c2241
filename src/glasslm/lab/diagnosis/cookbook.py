"""The stability cookbook: small models trained with every trick and without, as a page and as text."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from glasslm.config.schema import ComputeConfig, DataConfig
from glasslm.data import shards
from glasslm.data.sources import corpora
from glasslm.engines.choice import torch_installed
from glasslm.lab.diagnosis import cookbook_figures, experiments
from glasslm.lab.diagnosis.experiments import (
    COLD,
    DEPTHS,
    HALF,
    HALF_SHARE,
    HALF_WORK,
    HALVES,
    NO_CONTEXT,
    OTHER_RATES,
    POST,
    RATES,
    STARTS,
    TRICKS,
    WITHOUT,
    WITHOUT_WARMUP,
    Cooked,
    outcome,
)
from glasslm.lab.diagnosis.gradient_trials import (
    BLOCK,
    LARGE_BATCH,
    ROWS,
    STEPS,
    Recipe,
    attempt,
    unigram_loss,
)
from glasslm.lab.statistics import Verdict
from glasslm.report import page
from glasslm.report.page import Picture, Section
from glasslm.text import Say, duration


def cook(
    data: DataConfig,
    compute: ComputeConfig,
    out: Path,
    say: Say,
    steps: int = STEPS,
    seeds: int = 3,
) -> Cooked:
    """Try all recipes on a text, in either engine, and write cookbook.html, cookbook.md and their figures to `out`.

    Raises InputError for a text too short for a batch.
    """
    began, spent = time.perf_counter(), time.process_time()
    source = corpora.find(data, say)
    dataset = shards.prepare(data, source, say)
    shards.require_room(dataset, BLOCK, ROWS)
    exactly = dataclasses.replace(
        compute, precision="fp32" if compute.precision == "auto" else compute.precision
    )
    cooked = Cooked(source.name, dataset.tokenizer.vocab_size, unigram_loss(dataset), steps, seeds)
    recipes = experiments.every_recipe()
    halves = HALVES if torch_installed() else {}
    total, done = sum(recipe.n_layers for recipe in recipes.values()) + len(halves) * HALF_WORK, 0
    say(
        f"{len(recipes)} recipes on {source.name}, {seeds} seed(s) each, {steps} steps of {ROWS} x {BLOCK} tokens"
    )

    def time_left() -> str:
        return f"about {duration((time.perf_counter() - began) * (total - done) / done)} left"

    for number, (name, recipe) in enumerate(recipes.items(), 1):
        found = [attempt(dataset, exactly, recipe, steps, seed) for seed in range(seeds)]
        cooked.trials[recipe], done = found, done + recipe.n_layers
        say(f"{number} of {len(recipes)}: {name}: {outcome(found)}; {time_left()}")
    for name, (precision, scale) in halves.items():
        half = dataclasses.replace(compute, engine="torch", precision=precision)
        cooked.halves[name] = [
            attempt(
                dataset, half, HALF, max(1, round(HALF_SHARE * steps)), seed, LARGE_BATCH, scale
            )
            for seed in range(seeds)
        ]
        done += HALF_WORK
        say(f"{name}: {outcome(cooked.halves[name])}; {time_left()}")
    cooked.cpu_s = time.process_time() - spent
    cooked.page = page.write(out, "cookbook", "Stability cookbook", lead(cooked), sections(cooked))
    return cooked


def lead(cooked: Cooked) -> str:
    return (
        f"{len(cooked.trials)} recipes on {cooked.text}, {cooked.seeds} seed(s) each: AdamW, {cooked.steps} steps of "
        f"{ROWS * BLOCK} tokens. Losses are nats per token of the same validation text at the end, mean and range over "
        f"seeds; a guess by frequencies has {cooked.unigram:.3f}, and what is no further than {NO_CONTEXT:g} below it "
        "counts as failed. Differences are of runs with the same seed, tested by paired t, and by "
        "Holm's rule for as many comparisons as an experiment makes."
    )


def sections(cooked: Cooked) -> list[Section]:
    """The experiments with tables and figures, and the checklist."""
    found = cooked.trials

    def row(name: str, recipe: Recipe, versus: Verdict | None) -> list[str]:
        words = versus.words if versus else ""
        return [name, outcome(found[recipe]), words, "failed" if cooked.fails(recipe) else ""]

    def picture(name: str, label: str, draw: cookbook_figures.Draw) -> list[Picture]:
        return [
            Picture(
                f"cookbook-{name}",
                label,
                lambda colours: cookbook_figures.alone(draw, cooked, colours),
            )
        ]

    without, other = cooked.judged(WITHOUT), cooked.judged(OTHER_RATES)
    no_warmup, after = cooked.judged(WITHOUT_WARMUP), cooked.judged(POST)
    tricks = [row(name, recipe, without.get(name)) for name, recipe in TRICKS.items()]
    starts = [
        [start, outcome(found[good]), outcome(found[bare])]
        for start, (good, bare) in STARTS.items()
    ]
    rates = [row(f"x{rate:g}", recipe, other.get(rate)) for rate, recipe in RATES.items()]
    cold = [row(f"x{rate:g}", recipe, no_warmup[rate]) for rate, recipe in COLD.items()]
    depths = [
        [str(depth), outcome(found[pre]), outcome(found[post]), after[depth].words]
        for depth, (pre, post) in DEPTHS.items()
    ]
    halves = [[name, outcome(trials)] for name, trials in cooked.halves.items()]
    seen = {
        "tricks": picture(
            "tricks",
            "Training loss with each trick left out, mean over seeds",
            cookbook_figures.tricks,
        ),
        "starts": picture(
            "starts", "Loss by start, with and without the other tricks", cookbook_figures.starts
        ),
        "rates": picture(
            "rates", "Loss by learning rate, with and without warmup", cookbook_figures.rates
        ),
        "depth": picture("depth", "Loss by depth, pre-norm and post-norm", cookbook_figures.depth),
        "gradients": picture(
            "gradients", "Gradient norm of each block, healthy and sick", cookbook_figures.gradients
        ),
        "float16": picture(
            "float16", "Magnitudes of gradients, and the range of float16", cookbook_figures.float16
        ),
    }
    header = ("", "validation loss", "against all tricks", "")
    return [
        Section(
            "All tricks against none",
            experiments.tricks_said(cooked),
            header,
            tricks,
            seen["tricks"],
        ),
        Section(
            "Where weights start",
            experiments.starts_said(cooked),
            ("start", "all other tricks", "no other trick"),
            starts,
            seen["starts"],
        ),
        Section("The learning rate", experiments.rates_said(cooked), header, rates, seen["rates"]),
        Section(
            "Warmup",
            experiments.warmup_said(cooked),
            ("rate", "without warmup", "against the same with it", ""),
            cold,
        ),
        Section(
            "Norm before or after, by depth",
            experiments.depth_said(cooked),
            ("blocks", "pre", "post", "post against pre"),
            depths,
            seen["depth"],
        ),
        Section(
            "Gradients by layer", experiments.gradients_said(cooked), pictures=seen["gradients"]
        ),
        Section(
            "float16",
            experiments.half_said(cooked),
            ("", "validation loss"),
            halves,
            seen["float16"],
        ),
        Section(
            "Checklist",
            (
                "In the order in which to look: what stands above makes what stands below meaningless.",
            ),
            ("", "look for", "how", "here"),
            experiments.checklist(cooked),
        ),
    ]


def text(cooked: Cooked) -> str:
    """The same for a terminal."""
    lines = ["Stability cookbook", "", lead(cooked)]
    for section in sections(cooked):
        lines += ["", section.title, *(f"  {sentence}" for sentence in section.text)]
        table: list[Sequence[str]] = [section.header, *section.rows] if section.rows else []
        wide = [max(map(len, column)) for column in zip(*table)]
        lines += [
            ("    " + "  ".join(cell.ljust(w) for cell, w in zip(row, wide))).rstrip()
            for row in table
        ]
    return "\n".join(lines)


def facts(cooked: Cooked) -> Mapping[str, object]:
    """The numbers for a program: the losses of each recipe, None where it diverged."""
    return {
        "text": cooked.text,
        "unigram": cooked.unigram,
        "recipes": {
            name: [None if trial.diverged else trial.val_loss for trial in cooked.trials[recipe]]
            for name, recipe in experiments.every_recipe().items()
        },
        "checklist": [row[1:] for row in experiments.checklist(cooked)],
        "page": str(cooked.page),
    }
