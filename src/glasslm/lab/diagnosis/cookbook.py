"""Trains the small models of the stability cookbook, and writes a page and a text."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from glasslm.config.schema import ComputeConfig, DataConfig
from glasslm.data.dataset import prepare_dataset, require_enough_tokens
from glasslm.data.sources import corpora
from glasslm.engines.resources import is_torch_installed
from glasslm.lab.diagnosis import cookbook_figures, experiments
from glasslm.lab.diagnosis.checklist import build_checklist
from glasslm.lab.diagnosis.experiments import (
    DEPTH_FAMILY,
    DEPTHS,
    FLOAT16,
    FLOAT16_BLOCKS,
    FLOAT16_RECIPE,
    FLOAT16_STEP_SHARE,
    INIT_SCHEMES,
    MIN_UNIGRAM_GAIN,
    NO_WARMUP,
    RATE_FAMILY,
    RATES,
    TRICK_FAMILY,
    TRICKS,
    WARMUP_FAMILY,
    CookbookResults,
    describe_outcome,
)
from glasslm.lab.diagnosis.gradient_trials import (
    BLOCK,
    LARGE_BATCH,
    ROWS,
    STEPS,
    Recipe,
    run_trial,
    unigram_loss,
)
from glasslm.lab.statistics import Verdict
from glasslm.report import page
from glasslm.report.page import Picture, Section
from glasslm.text import Notify, align_columns, format_duration, plural

RECIPE_HEADER = ("", "validation loss", "against all tricks", "")


def run_cookbook(
    data: DataConfig,
    compute: ComputeConfig,
    out: Path,
    notify: Notify,
    steps: int = STEPS,
    seeds: int = 3,
) -> CookbookResults:
    """Try all recipes on a text, and write a page of the results.

    The folder `out` gets cookbook.html, cookbook.md and their figures. Raises InputError for a text
    that is too short for a batch.
    """
    began, cpu_began = time.perf_counter(), time.process_time()
    source = corpora.find_source(data, notify)
    dataset = prepare_dataset(data, source, notify)
    require_enough_tokens(dataset, BLOCK, ROWS)
    resolved_compute = dataclasses.replace(
        compute, precision="fp32" if compute.precision == "auto" else compute.precision
    )
    results = CookbookResults(
        source.name, dataset.tokenizer.vocab_size, unigram_loss(dataset), steps, seeds
    )
    recipes = experiments.all_recipes()
    float16 = FLOAT16 if is_torch_installed() else {}
    # Blocks of models to train for all steps
    done, total = 0, sum(r.n_layers for r in recipes.values()) + len(float16) * FLOAT16_BLOCKS
    notify(
        f"{plural(len(recipes), 'recipe')} on {source.name}, {plural(seeds, 'seed')} each, "
        f"{steps} steps of {ROWS} x {BLOCK} tokens"
    )

    def time_left() -> str:
        return (
            f"about {format_duration((time.perf_counter() - began) * (total - done) / done)} left"
        )

    for number, (name, recipe) in enumerate(recipes.items(), 1):
        trials = [
            run_trial(dataset, resolved_compute, recipe, steps, seed) for seed in range(seeds)
        ]
        results.trials[recipe], done = trials, done + recipe.n_layers
        notify(f"{number} of {len(recipes)}: {name}: {describe_outcome(trials)}; {time_left()}")
    float16_steps = max(1, round(FLOAT16_STEP_SHARE * steps))
    for name, (precision, scale) in float16.items():
        torch_compute = dataclasses.replace(compute, engine="torch", precision=precision)
        trials = [
            run_trial(
                dataset, torch_compute, FLOAT16_RECIPE, float16_steps, seed, LARGE_BATCH, scale
            )
            for seed in range(seeds)
        ]
        results.float16_trials[name], done = trials, done + FLOAT16_BLOCKS
        notify(f"{name}: {describe_outcome(trials)}; {time_left()}")
    results.cpu_s = time.process_time() - cpu_began
    results.page = page.write(
        out, "cookbook", "Stability cookbook", lead_text(results), build_sections(results)
    )
    return results


def lead_text(results: CookbookResults) -> str:
    """The first paragraph of the page: the setting, the unit of the numbers, and the tests."""
    return (
        f"{len(results.trials)} recipes on {results.text}, {results.seeds} seed(s) each: AdamW, "
        f"{results.steps} steps of {ROWS * BLOCK} tokens. Losses are nats per token of the same "
        "validation text at the end, mean and range over seeds. Token frequencies alone give "
        f"{results.unigram:.3f}; a trial that ends no further than {MIN_UNIGRAM_GAIN:g} below that "
        "counts as failed. Differences are of runs with the same seed, tested by paired t, with "
        "Holm's correction for the number of comparisons of an experiment."
    )


def build_sections(results: CookbookResults) -> list[Section]:
    """The experiments with tables and figures, and the checklist."""
    return [
        _tricks_section(results),
        _inits_section(results),
        *_rate_sections(results),
        _depth_section(results),
        Section(
            "Gradients by layer",
            experiments.describe_gradients(results),
            pictures=_pictures("gradients", results),
        ),
        Section(
            "float16",
            experiments.describe_float16(results),
            ("", "validation loss"),
            [[name, describe_outcome(trials)] for name, trials in results.float16_trials.items()],
            _pictures("float16", results),
        ),
        Section(
            "Checklist",
            ("Check the items in this order: a fault in one makes the later ones meaningless.",),
            ("", "check", "how", "here"),
            build_checklist(results),
        ),
    ]


def _tricks_section(results: CookbookResults) -> Section:
    verdicts = results.judge_recipes(TRICK_FAMILY)
    return Section(
        "All tricks against none",
        experiments.describe_tricks(results),
        RECIPE_HEADER,
        [_row(results, name, recipe, verdicts.get(name)) for name, recipe in TRICKS.items()],
        _pictures("tricks", results),
    )


def _inits_section(results: CookbookResults) -> Section:
    return Section(
        "Initialization",
        experiments.describe_inits(results),
        ("start", "all other tricks", "no other trick"),
        [_pair_row(results, init, pair) for init, pair in INIT_SCHEMES.items()],
        _pictures("starts", results),
    )


def _rate_sections(results: CookbookResults) -> list[Section]:
    """The learning rate with warmup, and without."""
    rate_verdicts = results.judge_recipes(RATE_FAMILY)
    warmup_verdicts = results.judge_recipes(WARMUP_FAMILY)
    return [
        Section(
            "The learning rate",
            experiments.describe_rates(results),
            RECIPE_HEADER,
            [
                _row(results, f"x{rate:g}", recipe, rate_verdicts.get(rate))
                for rate, recipe in RATES.items()
            ],
            _pictures("rates", results),
        ),
        Section(
            "Warmup",
            experiments.describe_warmup(results),
            ("rate", "without warmup", "against the same with it", ""),
            [
                _row(results, f"x{rate:g}", recipe, warmup_verdicts[rate])
                for rate, recipe in NO_WARMUP.items()
            ],
        ),
    ]


def _depth_section(results: CookbookResults) -> Section:
    verdicts = results.judge_recipes(DEPTH_FAMILY)
    return Section(
        "Norm before or after, by depth",
        experiments.describe_depth(results),
        ("blocks", "pre", "post", "post against pre"),
        [
            [*_pair_row(results, str(depth), pair), verdicts[depth].words]
            for depth, pair in DEPTHS.items()
        ],
        _pictures("depth", results),
    )


def _row(results: CookbookResults, name: str, recipe: Recipe, verdict: Verdict | None) -> list[str]:
    """The cells of a recipe: outcome, verdict against its baseline, and whether it fails."""
    outcome = describe_outcome(results.trials[recipe])
    failed = "failed" if results.mostly_fails(recipe) else ""
    return [name, outcome, verdict.words if verdict else "", failed]


def _pair_row(results: CookbookResults, name: str, pair: tuple[Recipe, Recipe]) -> list[str]:
    """The cells of two recipes: the outcome of each."""
    return [name, *(describe_outcome(results.trials[recipe]) for recipe in pair)]


def _pictures(name: str, results: CookbookResults) -> list[Picture]:
    """The figure of an experiment, as the only picture of its section."""
    label, draw = cookbook_figures.PANELS[name]
    return [
        Picture(
            f"cookbook-{name}",
            label,
            lambda colours: cookbook_figures.draw_single(draw, results, colours),
        )
    ]


def format_text(results: CookbookResults) -> str:
    """The page as text for a terminal."""
    lines = ["Stability cookbook", "", lead_text(results)]
    for section in build_sections(results):
        lines += ["", section.title, *(f"  {sentence}" for sentence in section.text)]
        table: list[Sequence[str]] = [section.header, *section.rows] if section.rows else []
        lines += align_columns(table, indent="    ")
    return "\n".join(lines)


def json_facts(results: CookbookResults) -> Mapping[str, object]:
    """The numbers for JSON: the losses of each recipe, None where training diverged."""
    return {
        "text": results.text,
        "unigram": results.unigram,
        "recipes": {
            name: [None if trial.diverged else trial.val_loss for trial in results.trials[recipe]]
            for name, recipe in experiments.all_recipes().items()
        },
        "checklist": [row[1:] for row in build_checklist(results)],
        "page": str(results.page),
    }
