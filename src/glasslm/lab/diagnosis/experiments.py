"""The experiments of the stability cookbook, and what their numbers say, in words.

Each is a handful of recipes, tried with the same seeds, so that what is compared is pairs. All sentences are made from
one run's numbers: another text, or another machine, may well say something else.
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
    LARGE_BATCH,
    RATE,
    UNSCALED,
    Recipe,
    Start,
    Trial,
    ratio,
)
from glasslm.lab.statistics import Verdict, compare, verdicts

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
STARTS = {
    start: (Recipe(start=start), dataclasses.replace(NOTHING, start=start))
    for start in get_args(Start)
}
RATES = {rate: Recipe(rate=rate) for rate in (0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0)}
COLD = {rate: Recipe(rate=rate, warmup=False) for rate in (1.0, 3.0, 10.0, 30.0, 100.0)}
DEPTHS = {
    depth: (Recipe(n_layers=depth), Recipe(n_layers=depth, norm_position="post"))
    for depth in (2, 4, 8, 16)
}
# What is compared with what: each of these is one family, in which many comparisons ask for clearer differences.
WITHOUT = {name: (one, ALL) for name, one in TRICKS.items() if one != ALL}
OTHER_RATES = {rate: (one, ALL) for rate, one in RATES.items() if one != ALL}
WITHOUT_WARMUP = {rate: (one, RATES[rate]) for rate, one in COLD.items()}
POST = {depth: (post, pre) for depth, (pre, post) in DEPTHS.items()}
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

Name = TypeVar("Name", str, float, int)
Tried = Sequence[Trial]


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

    def judged(self, family: Mapping[Name, tuple[Recipe, Recipe]]) -> dict[Name, Verdict]:
        """Each recipe of a family against its other one."""
        return judged(
            {name: (self.trials[one], self.trials[base]) for name, (one, base) in family.items()}
        )

    def said(self, recipe: Recipe, verdict: Verdict) -> str:
        """The verdict on a recipe, and in how many seeds it failed: of losses that far apart a test may see nothing."""
        trials = self.trials[recipe]
        failed = sum(map(self.failed, trials))
        more = (
            f"; fails in {failed} of {len(trials)}" if failed and verdict.kind != "diverged" else ""
        )
        return verdict.words + more

    @property
    def sick(self) -> tuple[str, Recipe]:
        """The worst of the tricks left out that came to its end, or the worst of all."""
        alone = {name: one for name, one in TRICKS.items() if one not in (ALL, NOTHING)}
        whole = {
            name: one
            for name, one in alone.items()
            if not any(trial.diverged for trial in self.trials[one])
        }
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
    return fmean(trial.val_loss for trial in trials)


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
        words.append(nats(fmean(finite)) + spread)
    if gone:
        words.append(
            f"diverged in {len(gone)} of {len(trials)}, at step {listed(list(map(str, steps)))}"
        )
    return "; ".join(words)


def judged(family: Mapping[Name, tuple[Tried, Tried]]) -> dict[Name, Verdict]:
    """Trials, each against others with the same seeds, where the experiment makes all these comparisons."""
    losses = [
        tuple([trial.val_loss for trial in trials] for trials in both) for both in family.values()
    ]
    return dict(
        zip(family, verdicts([compare(one, base, family=len(family)) for one, base in losses]))
    )


def halves_judged(cooked: Cooked) -> dict[str, Verdict]:
    exact = cooked.halves["float32"]
    return judged(
        {name: (trials, exact) for name, trials in cooked.halves.items() if trials is not exact}
    )


def listed(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


# -- what each experiment says ----------------------------------------------------------------------------------------


def tricks_said(cooked: Cooked) -> list[str]:
    """All tricks against none, and what each one alone is worth."""
    found = cooked.trials
    said = [
        f"With all tricks: {outcome(found[ALL])} nats per token. With none: {outcome(found[NOTHING])}."
    ]
    versus, base = cooked.judged(WITHOUT), sum(map(cooked.failed, found[ALL]))
    alone = sorted(
        (name for name in versus if TRICKS[name] != NOTHING),
        key=lambda name: -mean(found[TRICKS[name]]),
    )
    words = {name: f"{name} ({cooked.said(TRICKS[name], versus[name])})" for name in alone}
    fails = {name for name in alone if sum(map(cooked.failed, found[TRICKS[name]])) > base}
    if worse := [name for name in alone if versus[name].kind == "worse" or name in fails]:
        said.append(f"What hurts, the worst first: {', '.join(words[name] for name in worse)}.")
    if rest := [words[name] for name in alone if name not in worse]:
        said.append(
            f"Not shown to hurt: {', '.join(rest)}. One small model, {cooked.steps} steps, one rate: what they are "
            "worth elsewhere this does not say."
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
        said.append(
            f"Of {len(STARTS)} starts {len(names)} fail {where}{': ' + listed(names) if names else ''}."
        )
    return said


def rates_said(cooked: Cooked) -> list[str]:
    losses = {rate: mean(cooked.trials[recipe]) for rate, recipe in RATES.items()}
    best = min(losses, key=losses.__getitem__)
    usable = [rate for rate in losses if losses[rate] <= losses[best] + USABLE]
    at = "the edge of what was tried" if best in (min(RATES), max(RATES)) else f"{best * RATE:g}"
    said = [
        f"The best rate is x{best:g} ({at}); within {USABLE:g} nats of it: {listed([f'x{rate:g}' for rate in usable])}."
    ]
    versus = cooked.judged(OTHER_RATES)
    for rate in (10.0, 100.0):
        said.append(f"x{rate:g} against x1: {cooked.said(RATES[rate], versus[rate])}.")
    return said


def warmup_said(cooked: Cooked) -> list[str]:
    def highest(trials: Sequence[Trial]) -> float:
        return max(
            max((x if math.isfinite(x) else math.inf) for x in trial.losses) for trial in trials
        )

    said, versus = [], cooked.judged(WITHOUT_WARMUP)
    for rate, recipe in COLD.items():
        cold, warm = cooked.trials[recipe], cooked.trials[RATES[rate]]
        peaks = f"highest training loss {nats(highest(cold))} against {nats(highest(warm))}"
        said.append(f"Without warmup at x{rate:g}: {versus[rate].words}; {peaks}.")
    return said


def depth_said(cooked: Cooked) -> list[str]:
    said = []
    for name, which in (("Post", 1), ("Pre", 0)):
        trials = {depth: cooked.trials[pair[which]] for depth, pair in DEPTHS.items()}
        failed = {depth: sum(map(cooked.failed, found)) for depth, found in trials.items()}
        where = [
            f"at {depth} blocks in {n} of {len(trials[depth])} seeds"
            for depth, n in failed.items()
            if n
        ]
        none = f"{name}-norm did not fail here, up to {max(DEPTHS)} blocks."
        said.append(f"{name}-norm fails here {listed(where)}." if where else none)
    deepest = max(DEPTHS)
    ratios = [
        f"{name} {ratio(cooked.trials[one], 0):.2g}"
        for name, one in zip(("pre", "post"), DEPTHS[deepest])
    ]
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
    return said + [
        f"Trained with gradients of that size, {name}: {outcome(cooked.halves[name])}; against float32 {verdict.words}."
        for name, verdict in halves_judged(cooked).items()
    ]


def checklist(cooked: Cooked) -> list[tuple[str, str, str, str]]:
    """What to look at, in this order, how, and what it was worth here."""
    found, uniform = cooked.trials, math.log(cooked.vocab_size)
    without = {
        name: cooked.said(TRICKS[name], verdict) for name, verdict in cooked.judged(WITHOUT).items()
    }
    rates = cooked.judged(OTHER_RATES)
    first = [nats(fmean(trial.losses[0] for trial in found[one])) for one in (ALL, UNIT)]
    losses = {rate: mean(found[recipe]) for rate, recipe in RATES.items()}
    best, deepest = min(losses, key=losses.__getitem__), max(DEPTHS)
    items = [
        ("The first loss is ln V", "glasslm diagnose",
         f"{first[0]}, and ln V is {uniform:.3f}; from deviation 1 it is {first[1]}"),
        ("A norm in each sublayer", "--norm rmsnorm", f"without: {without['no normalisation']}"),
        ("Before the sublayer, not after it", "--norm-position pre",
         f"after, {deepest} blocks: {cooked.said(DEPTHS[deepest][1], cooked.judged(POST)[deepest])}"),
        ("A small start, smaller into the stream", "0.02, 0.02 / sqrt(2 layers)",
         f"deviation 1: {without['start with deviation 1']}"),
        ("Gradients of a like size in every block", "glasslm diagnose",
         f"first over last: {ratio(found[ALL], 0):.2g} at the start, {ratio(found[ALL], -1):.2g} at the end"),
        ("A rate from a range test", "--lr", f"best x{best:g}; x100: {cooked.said(RATES[100.0], rates[100.0])}"),
        ("Clipping of the global norm", "--grad-clip 1", f"without: {without['no clipping']}"),
        ("Warmup", "--warmup-steps", f"without, at x10: {cooked.judged(WITHOUT_WARMUP)[10.0].words}"),
        ("A rate that falls", "--schedule cosine", f"constant: {without['constant rate']}"),
        ("bfloat16, or a scaled loss", "--precision bf16",
         f"lost unscaled in a large batch: {found[ALL][0].looks[-1].lost_large:.1%} of the gradients"),
    ]  # fmt: skip
    return [(str(number), *item) for number, item in enumerate(items, 1)]
