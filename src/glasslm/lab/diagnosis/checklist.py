"""The checklist of the stability cookbook: checks in their order, each with its measured effect."""

from __future__ import annotations

import math
from statistics import fmean

from glasslm.lab.diagnosis.experiments import (
    ALL_TRICKS,
    DEPTH_FAMILY,
    DEPTHS,
    RATE_FAMILY,
    RATES,
    TRICK_FAMILY,
    TRICKS,
    UNIT_INIT,
    WARMUP_FAMILY,
    CookbookResults,
    format_nats,
    mean_loss,
)
from glasslm.lab.diagnosis.gradient_trials import first_to_last_ratio


def build_checklist(results: CookbookResults) -> list[tuple[str, str, str, str]]:
    """Rows of number, item, command or setting, and effect, in the order in which to check them."""
    trials, describe = results.trials, results.describe_verdict
    without = {
        name: describe(TRICKS[name], verdict)
        for name, verdict in results.judge_recipes(TRICK_FAMILY).items()
    }
    first_loss, unit_first_loss = (
        format_nats(fmean(trial.losses[0] for trial in trials[recipe]))
        for recipe in (ALL_TRICKS, UNIT_INIT)
    )
    losses = {rate: mean_loss(trials[recipe]) for rate, recipe in RATES.items()}
    best, deepest = min(losses, key=losses.__getitem__), max(DEPTHS)
    post_norm = describe(DEPTHS[deepest][1], results.judge_recipes(DEPTH_FAMILY)[deepest])
    high_rate = describe(RATES[100.0], results.judge_recipes(RATE_FAMILY)[100.0])
    no_warmup = results.judge_recipes(WARMUP_FAMILY)[10.0].words
    ratios = [first_to_last_ratio(trials[ALL_TRICKS], snapshot) for snapshot in (0, -1)]
    underflow = trials[ALL_TRICKS][0].snapshots[-1].underflow_large
    items = [
        (
            "The first loss is ln V",
            "glasslm diagnose",
            f"{first_loss}, and ln V is {math.log(results.vocab_size):.3f}; from deviation 1 it "
            f"is {unit_first_loss}",
        ),
        ("A norm in each sublayer", "--norm rmsnorm", f"without: {without['no normalization']}"),
        (
            "Before the sublayer, not after it",
            "--norm-position pre",
            f"after, {deepest} blocks: {post_norm}",
        ),
        (
            "Small first weights, smaller into the stream",
            "0.02, 0.02 / sqrt(2 layers)",
            f"deviation 1: {without['start with deviation 1']}",
        ),
        (
            "Gradients of similar size in every block",
            "glasslm diagnose",
            f"first over last: {ratios[0]:.2g} at the start, {ratios[1]:.2g} at the end",
        ),
        ("A rate from a range test", "--lr", f"best x{best:g}; x100: {high_rate}"),
        ("Clipping of the global norm", "--grad-clip 1", f"without: {without['no clipping']}"),
        ("Warmup", "--warmup-steps", f"without, at x10: {no_warmup}"),
        ("A rate that falls", "--schedule cosine", f"constant: {without['constant rate']}"),
        (
            "bfloat16, or a scaled loss",
            "--precision bf16",
            f"lost unscaled in a large batch: {underflow:.1%} of the gradients",
        ),
    ]
    return [(str(number), *item) for number, item in enumerate(items, 1)]
