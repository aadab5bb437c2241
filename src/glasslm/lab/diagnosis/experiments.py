"""The experiments of the stability cookbook, and their results in sentences.

An experiment is a set of recipes that are tried with the same seeds, so that they are compared in
pairs. The sentences follow from the numbers of one cookbook; another text or machine may give
others.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import TypeVar, get_args

from glasslm.config.schema import Precision
from glasslm.lab.diagnosis.gradient_trials import (
    BASE_LR,
    LARGE_BATCH,
    NO_LOSS_SCALE,
    InitScheme,
    Recipe,
    Trial,
    first_to_last_ratio,
)
from glasslm.lab.statistics import Verdict, compare_losses, judge_family

ALL_TRICKS, UNIT_INIT = Recipe(), Recipe(init="unit")
NO_TRICKS = Recipe(norm="none", init="unit", warmup=False, cosine=False, clip=False)
TRICKS = {
    "all tricks": ALL_TRICKS,
    "no normalization": Recipe(norm="none"),
    "start with deviation 1": UNIT_INIT,
    "no warmup": Recipe(warmup=False),
    "constant rate": Recipe(cosine=False),
    "no clipping": Recipe(clip=False),
    "no trick": NO_TRICKS,
}
# By scheme: with all other tricks, and without any
INIT_SCHEMES = {
    init: (Recipe(init=init), dataclasses.replace(NO_TRICKS, init=init))
    for init in get_args(InitScheme)
}
RATES = {rate: Recipe(rate=rate) for rate in (0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0)}
NO_WARMUP = {rate: Recipe(rate=rate, warmup=False) for rate in (1.0, 3.0, 10.0, 30.0, 100.0)}
# By depth: pre-norm and post-norm
DEPTHS = {
    depth: (Recipe(n_layers=depth), Recipe(n_layers=depth, norm_position="post"))
    for depth in (2, 4, 8, 16)
}
# The families of comparisons: (recipe, baseline) by name. A larger family requires clearer
# differences.
TRICK_FAMILY = {
    name: (recipe, ALL_TRICKS) for name, recipe in TRICKS.items() if recipe != ALL_TRICKS
}
RATE_FAMILY = {rate: (recipe, ALL_TRICKS) for rate, recipe in RATES.items() if recipe != ALL_TRICKS}
WARMUP_FAMILY = {rate: (recipe, RATES[rate]) for rate, recipe in NO_WARMUP.items()}
DEPTH_FAMILY = {depth: (post, pre) for depth, (pre, post) in DEPTHS.items()}
FLOAT16_RECIPE = Recipe(n_layers=2)
FLOAT16: dict[str, tuple[Precision, float]] = {  # precision and first loss scale
    "float32": ("fp32", 1.0),
    "float16, loss scaled": ("fp16", 1.0),
    "float16, loss not scaled": ("fp16", NO_LOSS_SCALE),
}
FLOAT16_STEP_SHARE = 0.4  # of the steps, because float16 on a CPU is slow
# Measured time of one float16 experiment, in the time of a block of the NumPy engine for all steps
FLOAT16_BLOCKS = 12

MIN_UNIGRAM_GAIN = 0.1  # nats: a trial that ends less below the unigram loss has failed
USABLE_RATE_NATS = 0.1  # above the loss of the best rate

Name = TypeVar("Name", str, float, int)


@dataclass
class CookbookResults:
    """The trials of all recipes, one for each seed."""

    text: str  # name of the text
    vocab_size: int
    unigram: float  # nats per token of the validation text by the frequencies of single tokens
    steps: int
    seeds: int
    trials: dict[Recipe, list[Trial]] = field(default_factory=dict)
    float16_trials: dict[str, list[Trial]] = field(default_factory=dict)  # empty without PyTorch
    cpu_s: float = 0.0
    page: Path | None = None

    def has_failed(self, trial: Trial) -> bool:
        """Whether a trial diverged, or learned hardly more than token frequencies."""
        return not trial.val_loss < self.unigram - MIN_UNIGRAM_GAIN

    def count_failed(self, recipe: Recipe) -> int:
        """The number of failed trials of a recipe."""
        return sum(map(self.has_failed, self.trials[recipe]))

    def mostly_fails(self, recipe: Recipe) -> bool:
        """Whether more than half of the trials of a recipe failed."""
        return self.count_failed(recipe) * 2 > len(self.trials[recipe])

    def judge_recipes(self, family: Mapping[Name, tuple[Recipe, Recipe]]) -> dict[Name, Verdict]:
        """The verdict on each recipe of a family against its baseline."""
        return judge_trials(
            {
                name: (self.trials[recipe], self.trials[baseline])
                for name, (recipe, baseline) in family.items()
            }
        )

    def describe_verdict(self, recipe: Recipe, verdict: Verdict) -> str:
        """The verdict on a recipe, and the number of failed seeds.

        When losses differ very much between seeds, the test alone may find no difference.
        """
        failed, seeds = self.count_failed(recipe), len(self.trials[recipe])
        show_failed = failed and verdict.kind != "diverged"
        return verdict.words + (f"; fails in {failed} of {seeds}" if show_failed else "")

    @property
    def worst_recipe(self) -> tuple[str, Recipe]:
        """The name and recipe of the omitted trick with the highest loss.

        A recipe with a diverged trial counts only if all recipes have one.
        """
        single = {
            name: recipe for name, recipe in TRICKS.items() if recipe not in (ALL_TRICKS, NO_TRICKS)
        }
        complete = {
            name: recipe
            for name, recipe in single.items()
            if not any(trial.diverged for trial in self.trials[recipe])
        }
        return max((complete or single).items(), key=lambda item: mean_loss(self.trials[item[1]]))


def all_recipes() -> dict[str, Recipe]:
    """Every recipe once, by name."""
    named: list[tuple[str, Recipe]] = list(TRICKS.items())
    for init, (with_tricks, without) in INIT_SCHEMES.items():
        named += [(f"start {init}", with_tricks), (f"start {init}, no other trick", without)]
    named += [(f"rate x{rate:g}", recipe) for rate, recipe in RATES.items()]
    named += [(f"rate x{rate:g}, no warmup", recipe) for rate, recipe in NO_WARMUP.items()]
    for depth, both in DEPTHS.items():
        named += [(f"{recipe.norm_position}-norm, {depth} blocks", recipe) for recipe in both]
    names: dict[Recipe, str] = {}
    for name, recipe in named:
        names.setdefault(recipe, name)
    return {name: recipe for recipe, name in names.items()}


# -- results as text -------------------------------------------------------------------------------


def mean_loss(trials: Iterable[Trial]) -> float:
    """The mean validation loss; infinite if a trial diverged."""
    return fmean(trial.val_loss for trial in trials)


def format_nats(value: float) -> str:
    """A loss with three decimals, or three digits from 100 on."""
    return f"{value:.3f}" if abs(value) < 100 else f"{value:.3g}"


def describe_outcome(trials: Sequence[Trial]) -> str:
    """The mean and range of the validation losses, and the number of diverged trials."""
    finite = [trial.val_loss for trial in trials if not trial.diverged]
    diverged = [trial for trial in trials if trial.diverged]
    parts = []
    if finite:
        low, high = format_nats(min(finite)), format_nats(max(finite))
        parts.append(
            format_nats(fmean(finite)) + (f" ({low} to {high})" if len(finite) > 1 else "")
        )
    if diverged:
        steps = sorted({len(trial.losses) for trial in diverged})
        where = join_names(list(map(str, steps)))
        parts.append(f"diverged in {len(diverged)} of {len(trials)}, at step {where}")
    return "; ".join(parts)


def judge_trials(
    family: Mapping[Name, tuple[Sequence[Trial], Sequence[Trial]]],
) -> dict[Name, Verdict]:
    """The verdicts on a family of trials against baseline trials with the same seeds."""
    losses = [
        tuple([trial.val_loss for trial in trials] for trials in both) for both in family.values()
    ]
    comparisons = [
        compare_losses(variant, baseline, family=len(family)) for variant, baseline in losses
    ]
    return dict(zip(family, judge_family(comparisons)))


def judge_float16(results: CookbookResults) -> dict[str, Verdict]:
    """The verdicts on the float16 trials against float32."""
    float32_trials = results.float16_trials["float32"]
    return judge_trials(
        {
            name: (trials, float32_trials)
            for name, trials in results.float16_trials.items()
            if trials is not float32_trials
        }
    )


def join_names(names: Sequence[str]) -> str:
    """The names as "a, b and c"."""
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


# -- sentences of each experiment ------------------------------------------------------------------


def describe_tricks(results: CookbookResults) -> list[str]:
    """All tricks against none, and the effect of leaving out each one."""
    trials = results.trials
    with_all, with_none = (describe_outcome(trials[key]) for key in (ALL_TRICKS, NO_TRICKS))
    sentences = [f"With all tricks: {with_all} nats per token. With none: {with_none}."]
    verdicts, baseline_failed = (
        results.judge_recipes(TRICK_FAMILY),
        results.count_failed(ALL_TRICKS),
    )
    single = sorted(
        (name for name in verdicts if TRICKS[name] != NO_TRICKS),
        key=lambda name: -mean_loss(trials[TRICKS[name]]),
    )
    texts = {
        name: f"{name} ({results.describe_verdict(TRICKS[name], verdicts[name])})"
        for name in single
    }
    harmful = [
        name
        for name in single
        if verdicts[name].kind == "worse" or results.count_failed(TRICKS[name]) > baseline_failed
    ]
    if harmful:
        worst_first = ", ".join(texts[name] for name in harmful)
        sentences.append(f"What hurts, the worst first: {worst_first}.")
    if rest := [texts[name] for name in single if name not in harmful]:
        sentences.append(
            f"Not shown to hurt: {', '.join(rest)}. This is one small model, {results.steps} steps "
            "and one rate; elsewhere these tricks may matter."
        )
    return sentences


def describe_inits(results: CookbookResults) -> list[str]:
    """The best and the worst initialization, and those that fail."""
    losses = {
        init: mean_loss(results.trials[with_tricks])
        for init, (with_tricks, _) in INIT_SCHEMES.items()
    }
    best, worst = min(losses, key=losses.__getitem__), max(losses, key=losses.__getitem__)
    sentences = [
        f"With all other tricks the initializations end between {format_nats(losses[best])} "
        f"({best}) and {format_nats(losses[worst])} ({worst})."
    ]
    for which, condition in ((0, "with all other tricks"), (1, "with no other trick")):
        failing = [init for init, pair in INIT_SCHEMES.items() if results.mostly_fails(pair[which])]
        names = f": {join_names(failing)}" if failing else ""
        sentences.append(
            f"{len(failing)} of {len(INIT_SCHEMES)} initializations fail {condition}{names}."
        )
    return sentences


def describe_rates(results: CookbookResults) -> list[str]:
    """The best rate, those close to it, and the effect of much higher rates."""
    losses = {rate: mean_loss(results.trials[recipe]) for rate, recipe in RATES.items()}
    best = min(losses, key=losses.__getitem__)
    usable = [rate for rate in losses if losses[rate] <= losses[best] + USABLE_RATE_NATS]
    names = join_names([f"x{rate:g}" for rate in usable])
    is_edge = best in (min(RATES), max(RATES))
    value = "the edge of the tested range" if is_edge else f"{best * BASE_LR:g}"
    sentences = [
        f"The best rate is x{best:g} ({value}); within {USABLE_RATE_NATS:g} nats of it: {names}."
    ]
    verdicts = results.judge_recipes(RATE_FAMILY)
    for rate in (10.0, 100.0):
        verdict = results.describe_verdict(RATES[rate], verdicts[rate])
        sentences.append(f"x{rate:g} against x1: {verdict}.")
    return sentences


def describe_warmup(results: CookbookResults) -> list[str]:
    """The effect of leaving out the warmup, at each rate."""

    def highest(trials: Sequence[Trial]) -> str:
        losses = [loss for trial in trials for loss in trial.losses]
        return format_nats(max(loss if math.isfinite(loss) else math.inf for loss in losses))

    sentences, verdicts = [], results.judge_recipes(WARMUP_FAMILY)
    for rate, recipe in NO_WARMUP.items():
        without, with_warmup = results.trials[recipe], results.trials[RATES[rate]]
        peaks = f"highest training loss {highest(without)} against {highest(with_warmup)}"
        sentences.append(f"Without warmup at x{rate:g}: {verdicts[rate].words}; {peaks}.")
    return sentences


def describe_depth(results: CookbookResults) -> list[str]:
    """The depths at which post-norm and pre-norm fail, and the gradients of the deepest model."""
    sentences = []
    for name, which in (("Post", 1), ("Pre", 0)):
        failed = {depth: results.count_failed(pair[which]) for depth, pair in DEPTHS.items()}
        where = [
            f"at {depth} blocks in {count} of {len(results.trials[DEPTHS[depth][which]])} seeds"
            for depth, count in failed.items()
            if count
        ]
        sentences.append(
            f"{name}-norm fails here {join_names(where)}."
            if where
            else f"{name}-norm did not fail here, up to {max(DEPTHS)} blocks."
        )
    deepest = max(DEPTHS)
    ratios = ", ".join(
        f"{name} {first_to_last_ratio(results.trials[recipe], 0):.2g}"
        for name, recipe in zip(("pre", "post"), DEPTHS[deepest])
    )
    sentences.append(
        f"Gradient norm of the first of {deepest} blocks over that of the last, at the start: "
        f"{ratios}."
    )
    return sentences


def describe_gradients(results: CookbookResults) -> list[str]:
    """The ratio of the first to the last block's gradient, for all tricks and the worst recipe."""
    sentences = []
    for name, recipe in (("all tricks", ALL_TRICKS), results.worst_recipe):
        trials = results.trials[recipe]
        count = min(len(trial.snapshots) for trial in trials)
        ratios = [
            f"{first_to_last_ratio(trials, i):.2g} at step {trials[0].snapshots[i].step}"
            for i in range(count)
        ]
        sentences.append(
            f"{name}: the first block's gradient over the last's is {', '.join(ratios)}."
        )
    return sentences


def describe_float16(results: CookbookResults) -> list[str]:
    """The share of gradients that underflow in float16, and the loss of training in float16."""
    snapshots = results.trials[ALL_TRICKS][0].snapshots
    first, last = snapshots[0], snapshots[-1]
    sentences = [
        f"{item.underflow:.2%} of the residual stream's gradients underflow in unscaled float16, "
        f"and {item.underflow_scaled:.2%} at a loss scale of 65,536, {when}; in a batch of "
        f"{int(LARGE_BATCH):,} tokens, where the mean makes each gradient smaller, "
        f"{item.underflow_large:.1%} and {item.underflow_large_scaled:.2%}."
        for item, when in ((first, "at the start"), (last, f"at step {last.step}"))
    ]
    if not results.float16_trials:
        return [*sentences, "Training in float16 was not tried: it needs PyTorch."]
    for name, verdict in judge_float16(results).items():
        outcome = describe_outcome(results.float16_trials[name])
        sentences.append(
            f"Trained with gradients of that size, {name}: {outcome}; against float32 "
            f"{verdict.words}."
        )
    return sentences
