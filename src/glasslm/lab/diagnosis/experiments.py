"""The experiments of the stability cookbook, and what their numbers say, in words.

Each is a handful of recipes, tried with the same seeds, so that what is compared is pairs. All sentences are made from
one run's numbers: another text, or another machine, may well say something else.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import get_args

from glasslm.config import Precision
from glasslm.lab.diagnosis.recipes import LARGE_BATCH, RATE, UNSCALED, Recipe, Start, Trial, ratio

ALL, UNIT = Recipe(), Recipe(start="unit")
NOTHING = Recipe(norm="none", start="unit", warmup=False, cosine=False, clip=False)
TRICKS = {
    "all tricks": ALL,
    "no normalisation": Recipe(norm="none"),
    "start with deviation 1": UNIT,
    "no warmup": Recipe(warmup=False),
    "constant rate": Recipe(cosine=False),
    "no clipping": Recipe(clip=False),
    "no trick": NOTHING,
}
STARTS = {start: (Recipe(start=start), dataclasses.replace(NOTHING, start=start)) for start in get_args(Start)}
RATES = {rate: Recipe(rate=rate) for rate in (0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0)}
COLD = {rate: Recipe(rate=rate, warmup=False) for rate in (1.0, 3.0, 10.0, 30.0, 100.0)}
DEPTHS = {depth: (Recipe(n_layers=depth), Recipe(n_layers=depth, norm_position="post")) for depth in (2, 4, 8, 16)}
HALF = Recipe(n_layers=2)
HALVES: dict[str, tuple[Precision, float]] = {
    "float32": ("fp32", 1.0),
    "float16, loss scaled": ("fp16", 1.0),
    "float16, loss not scaled": ("fp16", UNSCALED),
}
HALF_SHARE = 0.4  # of the steps: float16 on a CPU takes its time
HALF_WORK = 12  # of each, in blocks of the NumPy engine trained for all steps: as measured, to foretell the time

NO_CONTEXT = 0.1  # nats: what is no further below a guess by frequencies has failed to learn
USABLE = 0.1  # nats above the best rate
DETECTABLE = {3: 3.26, 5: 1.68, 8: 1.16}  # sd of paired differences that a t test finds in 4 of 5 cases, by seeds


@dataclass
class Cooked:
    """What came of all recipes: a trial for each of the seeds."""

    text: str  # name of the text
    vocab_size: int
    unigram: float  # nats per token of the validation text by the frequencies of single tokens
    steps: int
    seeds: int
    trials: dict[Recipe, list[Trial]] = field(default_factory=dict)
    halves: dict[str, list[Trial]] = field(default_factory=dict)  # empty without PyTorch
    cpu_s: float = 0.0
    page: Path | None = None

    def failed(self, trial: Trial) -> bool:
        """Whether a trial diverged, or learnt nothing but frequencies."""
        return not trial.val_loss < self.unigram - NO_CONTEXT

    def fails(self, recipe: Recipe) -> bool:
        """Whether most of its trials failed."""
        return sum(map(self.failed, self.trials[recipe])) * 2 > len(self.trials[recipe])

    @property
    def sick(self) -> tuple[str, Recipe]:
        """The worst of the tricks left out that came to its end, or the worst of all."""
        alone = {name: one for name, one in TRICKS.items() if one not in (ALL, NOTHING)}
        whole = {name: one for name, one in alone.items() if not any(trial.diverged for trial in self.trials[one])}
        return max((whole or alone).items(), key=lambda item: mean(self.trials[item[1]]))


def every_recipe() -> dict[str, Recipe]:
    """Each once, by a name."""
    named: list[tuple[str, Recipe]] = list(TRICKS.items())
    for start, (good, bare) in STARTS.items():
        named += [(f"start {start}", good), (f"start {start}, no other trick", bare)]
    named += [(f"rate x{rate:g}", recipe) for rate, recipe in RATES.items()]
    named += [(f"rate x{rate:g}, no warmup", recipe) for rate, recipe in COLD.items()]
    for depth, both in DEPTHS.items():
        named += [(f"{recipe.norm_position}-norm, {depth} blocks", recipe) for recipe in both]
    names: dict[Recipe, str] = {}
    for name, recipe in named:
        names.setdefault(recipe, name)
    return {name: recipe for recipe, name in names.items()}


# -- numbers in words -------------------------------------------------------------------------------------------------


def mean(trials: Iterable[Trial]) -> float:
    """The mean validation loss; infinite if one diverged."""
    return statistics.fmean(trial.val_loss for trial in trials)


def nats(value: float) -> str:
    return f"{value:.3f}" if abs(value) < 100 else f"{value:.3g}"


def outcome(trials: Sequence[Trial]) -> str:
    """Mean and range of the validation losses, and how many diverged."""
    finite = [trial.val_loss for trial in trials if not trial.diverged]
    gone = [trial for trial in trials if trial.diverged]
    steps = sorted({len(trial.losses) for trial in gone})
    words = []
    if finite:
        spread = f" ({nats(min(finite))} to {nats(max(finite))})" if len(finite) > 1 else ""
        words.append(nats(statistics.fmean(finite)) + spread)
    if gone:
        words.append(f"diverged in {len(gone)} of {len(trials)}, at step {listed(list(map(str, steps)))}")
    return "; ".join(words)


def compare(trials: Sequence[Trial], base: Sequence[Trial]) -> str:
    """The trials against others with the same seeds: better or worse where every seed says so, and by how much."""
    gone = sum(one.diverged and not other.diverged for one, other in zip(trials, base))
    pairs = [one.val_loss - other.val_loss for one, other in zip(trials, base) if not (one.diverged or other.diverged)]
    words = [f"diverged in {gone} of {len(base)} seeds"] if gone else []
    if pairs:
        sign = direction(pairs)
        if sign:
            many = (
                f" ({nats(min(map(abs, pairs)))} to {nats(max(map(abs, pairs)))})" if len(pairs) > 1 else ", one seed"
            )
            words.append(f"{nats(abs(statistics.fmean(pairs)))} nats {'worse' if sign > 0 else 'better'}{many}")
        else:
            found = f"; {nats(least)} would be found" if (least := detectable(pairs)) else ""
            words.append(f"no clear difference ({min(pairs):+.3f} to {max(pairs):+.3f} nats{found})")
    return "; ".join(words) or "both diverged"


def direction(pairs: Sequence[float]) -> int:
    """1 where every difference is above 0, -1 where every one is below, else 0."""
    return (min(pairs) > 0) - (max(pairs) < 0)


def detectable(pairs: Sequence[float]) -> float:
    """The mean difference that a paired t test at 5% would find in 4 of 5 cases; 0 where no rule is known."""
    return DETECTABLE[len(pairs)] * statistics.stdev(pairs) if len(pairs) in DETECTABLE else 0.0


def harm(cooked: Cooked, recipe: Recipe) -> float:
    """By how much a recipe is worse than all tricks, in every seed; 0 where not every seed says so."""
    pairs = [one.val_loss - good.val_loss for one, good in zip(cooked.trials[recipe], cooked.trials[ALL])]
    return mean(cooked.trials[recipe]) - mean(cooked.trials[ALL]) if min(pairs) > 0 else 0.0


def listed(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


# -- what each experiment says ----------------------------------------------------------------------------------------


def tricks_said(cooked: Cooked) -> list[str]:
    """All tricks against none, and what each one alone is worth."""
    found = cooked.trials
    said = [f"With all tricks: {outcome(found[ALL])} nats per token. With none: {outcome(found[NOTHING])}."]
    alone = {name: harm(cooked, one) for name, one in TRICKS.items() if one not in (ALL, NOTHING)}
    worst = sorted((name for name in alone if alone[name] > 0), key=lambda name: -alone[name])
    if worst:
        ranked = [f"{name} ({compare(found[TRICKS[name]], found[ALL])})" for name in worst]
        said.append(f"What hurts in every seed, the worst first: {', '.join(ranked)}.")
    if harmless := [f"{name} ({compare(found[TRICKS[name]], found[ALL])})" for name in alone if not alone[name]]:
        said.append(
            f"Not worse in every seed: {', '.join(harmless)}. One small model, {cooked.steps} steps, one rate: what "
            "they are worth elsewhere this does not say."
        )
    return said


def starts_said(cooked: Cooked) -> list[str]:
    def fails(which: int) -> list[str]:
        return [start for start, pair in STARTS.items() if cooked.fails(pair[which])]

    good = {start: mean(cooked.trials[pair[0]]) for start, pair in STARTS.items()}
    best, worst = min(good, key=good.__getitem__), max(good, key=good.__getitem__)
    said = [
        f"With all other tricks the starts end between {nats(good[best])} ({best}) and {nats(good[worst])} ({worst})."
    ]
    for which, where in ((0, "with all other tricks"), (1, "with no other trick")):
        names = fails(which)
        said.append(f"Of {len(STARTS)} starts {len(names)} fail {where}{': ' + listed(names) if names else ''}.")
    return said


def rates_said(cooked: Cooked) -> list[str]:
    losses = {rate: mean(cooked.trials[recipe]) for rate, recipe in RATES.items()}
    best = min(losses, key=losses.__getitem__)
    usable = [rate for rate in losses if losses[rate] <= losses[best] + USABLE]
    at = "the edge of what was tried" if best in (min(RATES), max(RATES)) else f"{best * RATE:g}"
    said = [
        f"The best rate is x{best:g} ({at}); within {USABLE:g} nats of it: {listed([f'x{rate:g}' for rate in usable])}."
    ]
    for rate in (10.0, 100.0):
        trials = cooked.trials[RATES[rate]]
        failed = sum(map(cooked.failed, trials))
        end = f", and fails in {failed} of {len(trials)}" if failed else ""
        said.append(f"x{rate:g} against x1: {compare(trials, cooked.trials[ALL])}{end}.")
    return said


def warmup_said(cooked: Cooked) -> list[str]:
    def highest(trials: Sequence[Trial]) -> float:
        return max(max((x if math.isfinite(x) else math.inf) for x in trial.losses) for trial in trials)

    said = []
    for rate, recipe in COLD.items():
        cold, warm = cooked.trials[recipe], cooked.trials[RATES[rate]]
        peaks = f"highest training loss {nats(highest(cold))} against {nats(highest(warm))}"
        said.append(f"Without warmup at x{rate:g}: {compare(cold, warm)}; {peaks}.")
    return said


def depth_said(cooked: Cooked) -> list[str]:
    said = []
    for name, which in (("Post", 1), ("Pre", 0)):
        trials = {depth: cooked.trials[pair[which]] for depth, pair in DEPTHS.items()}
        failed = {depth: sum(map(cooked.failed, found)) for depth, found in trials.items()}
        where = [f"at {depth} blocks in {n} of {len(trials[depth])} seeds" for depth, n in failed.items() if n]
        none = f"{name}-norm did not fail here, up to {max(DEPTHS)} blocks."
        said.append(f"{name}-norm fails here {listed(where)}." if where else none)
    deepest = max(DEPTHS)
    ratios = [f"{name} {ratio(cooked.trials[one], 0):.2g}" for name, one in zip(("pre", "post"), DEPTHS[deepest])]
    said.append(
        f"Gradient norm of the first of {deepest} blocks over that of the last, at the start: {', '.join(ratios)}."
    )
    return said


def gradients_said(cooked: Cooked) -> list[str]:
    name, sick = cooked.sick
    said = []
    for label, recipe in (("all tricks", ALL), (name, sick)):
        trials = cooked.trials[recipe]
        came = min(len(trial.looks) for trial in trials)
        steps = [trials[0].looks[i].step for i in range(came)]
        ratios = [f"{ratio(trials, i):.2g} at step {step}" for i, step in enumerate(steps)]
        said.append(f"{label}: the first block's gradient over the last's is {', '.join(ratios)}.")
    return said


def half_said(cooked: Cooked) -> list[str]:
    first, last = cooked.trials[ALL][0].looks[0], cooked.trials[ALL][0].looks[-1]
    said = [
        f"Of the residual stream's gradients {look.lost:.2%} are lost in float16 unscaled, and {look.lost_scaled:.2%} "
        f"at a loss scale of 65,536, {when}; in a batch of {int(LARGE_BATCH):,} tokens, where the mean makes each "
        f"smaller, {look.lost_large:.1%} and {look.lost_large_scaled:.2%}."
        for look, when in ((first, "at the start"), (last, f"at step {last.step}"))
    ]
    if not cooked.halves:
        return [*said, "Training in float16 was not tried: it needs PyTorch."]
    exact = cooked.halves["float32"]
    return said + [
        f"Trained with gradients of that size, {name}: {outcome(trials)}; against float32 {compare(trials, exact)}."
        for name, trials in cooked.halves.items() if trials is not exact
    ]  # fmt: skip


def checklist(cooked: Cooked) -> list[tuple[str, str, str, str]]:
    """What to look at, in this order, how, and what it was worth here."""
    found, uniform = cooked.trials, math.log(cooked.vocab_size)

    def without(recipe: Recipe) -> str:
        return f"without: {compare(found[recipe], found[ALL])}"

    first = [nats(statistics.fmean(trial.losses[0] for trial in found[one])) for one in (ALL, UNIT)]
    losses = {rate: mean(found[recipe]) for rate, recipe in RATES.items()}
    best, deepest = min(losses, key=losses.__getitem__), max(DEPTHS)
    pre, post = DEPTHS[deepest]
    items = [
        ("The first loss is ln V", "glasslm diagnose",
         f"{first[0]}, and ln V is {uniform:.3f}; from deviation 1 it is {first[1]}"),
        ("A norm in each sublayer", "--norm rmsnorm", without(TRICKS["no normalisation"])),
        ("Before the sublayer, not after it", "--norm-position pre",
         f"after, {deepest} blocks: {compare(found[post], found[pre])}"),
        ("A small start, smaller into the stream", "0.02, 0.02 / sqrt(2 layers)",
         f"deviation 1: {compare(found[UNIT], found[ALL])}"),
        ("Gradients of a like size in every block", "glasslm diagnose",
         f"first over last: {ratio(found[ALL], 0):.2g} at the start, {ratio(found[ALL], -1):.2g} at the end"),
        ("A rate from a range test", "--lr", f"best x{best:g}; x100: {compare(found[RATES[100.0]], found[ALL])}"),
        ("Clipping of the global norm", "--grad-clip 1", without(TRICKS["no clipping"])),
        ("Warmup", "--warmup-steps", f"without, at x10: {compare(found[COLD[10.0]], found[RATES[10.0]])}"),
        ("A rate that falls", "--schedule cosine", f"constant: {compare(found[TRICKS['constant rate']], found[ALL])}"),
        ("bfloat16, or a scaled loss", "--precision bf16",
         f"lost unscaled in a large batch: {found[ALL][0].looks[-1].lost_large:.1%} of the gradients"),
    ]  # fmt: skip
    return [(str(number), *item) for number, item in enumerate(items, 1)]
