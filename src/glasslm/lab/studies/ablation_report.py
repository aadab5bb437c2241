"""The report of an ablation: findings that follow from its numbers, figures, and tables."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Sequence
from pathlib import Path

from glasslm import files
from glasslm.lab.studies.ablation import Plan, VariantResult
from glasslm.lab.studies.ablation_axes import (
    MATCH_LABELS,
    MAX_MATCHED_ERROR,
    find_axis,
    skipped_values,
)
from glasslm.lab.studies.ablation_figures import MARKERS, draw_bars, draw_curves
from glasslm.lab.studies.ablation_table import to_csv
from glasslm.lab.studies.checkout import AXIS as VERSION_AXIS
from glasslm.lab.studies.checkout import version_name
from glasslm.lab.studies.measures import MEASURES, measured_value
from glasslm.lab.studies.trial_results import describe_sample
from glasslm.lab.studies.variant_numbers import (
    delta,
    format_interval,
    format_loss,
    loss_spread,
    mean_loss,
)
from glasslm.report import figures, page
from glasslm.report.page import Picture, Section
from glasslm.runs.record import text_name
from glasslm.text import format_bytes, format_duration, format_number, plural, to_one_line

HEADER = (
    "variant",
    "parameters",
    "FLOPs",
    "loss",
    "spread",
    "difference",
    "95% interval",
    "p (Holm)",
    "verdict",
    "time",
    "ms a step",
    "memory",
)
MAX_SAMPLE_LENGTH = 160  # characters
MAX_LISTED = 4  # variants in one finding
LARGE_SPREAD = 4.0  # times the median spread over seeds
MIN_SIZE_CHANGE = 0.05  # of the baseline's parameters, for a variant to count as smaller or larger


def write(study: Path, plan: Plan, results: Sequence[VariantResult]) -> Path:
    """Write the table, the figures and the report; returns the path of ablation_report.html."""
    files.write_atomic(study / "ablation_table.csv", to_csv(results).encode())
    for name, draw in (("ablation_bars", draw_bars), ("training_curves", draw_curves)):
        figure = draw(plan, results, figures.PRINT_PALETTE)
        files.write_atomic(study / f"{name}.png", figures.png(figure))
    path = page.write(
        study, "ablation_report", title(plan), lead_paragraph(plan), sections(plan, results)
    )
    for suffix in (".html", ".md"):  # every study has a report of this name
        files.write_atomic(study / f"report{suffix}", path.with_suffix(suffix).read_bytes())
    return path


def title(plan: Plan) -> str:
    """The title of the report."""
    return f"Ablation of {', '.join(plan.axes)}"


def summary(plan: Plan, results: Sequence[VariantResult]) -> str:
    """The results as text for the terminal."""
    column = f"{MEASURES[plan.spec.measure].column:<6}"
    width = max(len(result.name) for result in results)
    lines = [f"{'variant':<{width}}  parameters  {column}  difference  verdict"]
    for result in results:
        comparison = result.comparison
        delta = f"{comparison.delta:+.4f}" if comparison and comparison.delta is not None else ""
        words = result.verdict.words if result.verdict else "the baseline"
        lines.append(
            f"{result.name:<{width}}  {result.parameters:>10,}  "
            f"{format_loss(result):<{len(column)}}  {delta:>10}  {words}"
        )
    listed = (f"- {finding}" for finding in findings(plan, results))
    return "\n".join([lead_paragraph(plan), "", *lines, "", *listed])


def lead_paragraph(plan: Plan) -> str:
    """The design of the study."""
    spec, base, train = plan.spec, plan.base, plan.base.train
    measure = MEASURES[spec.measure]
    model, n = base.model, spec.seeds
    margin = f', "the same" means within {spec.margin:g} {measure.unit}' if spec.margin else ""
    rate = (
        "each at its own best learning rate"
        if spec.rates
        else f"all at the learning rate {base.optimizer.lr:g}"
    )
    return (
        f"{len(plan.variants)} variants and the baseline, {n} seed{'s' * (n > 1)} each (paired), "
        f"{MATCH_LABELS[spec.match]}: {plural(train.max_steps, 'step')} of "
        f"{base.tokens_per_step:,} tokens for the baseline, {rate}. "
        f"{measure.sentence} Verdicts are corrected for a family of {plan.family_size} "
        f"comparisons{margin}. The baseline has "
        f"{plural(model.n_layers, 'layer')} of width {model.d_model}, "
        f"{plural(model.n_heads, 'head')}, "
        f"context {model.block_size}, {model.norm} ({model.norm_position}), {model.feedforward}, "
        f"{model.position} positions, trained by {base.optimizer.optimizer} on "
        f"{text_name(base.data)} ({plan.compute.engine}, {plan.compute.precision})."
    )


def findings(plan: Plan, results: Sequence[VariantResult]) -> list[str]:
    """The key findings, one sentence or two each, from the numbers of this study."""
    base, others = results[0], results[1:]
    return [
        *_verdict_findings(plan, others),
        *_run_findings(plan, results),
        *describe_sample(trial for result in results for trial in result.trials),
        *_size_findings(others, base),
        *_activation_findings(others, base),
        *_surprise_findings(others, base),
    ]


def _verdict_findings(plan: Plan, others: Sequence[VariantResult]) -> list[str]:
    """The variants by their verdicts."""
    sentences, unit = list[str](), MEASURES[plan.spec.measure].unit
    by_kind = {
        kind: [result for result in others if result.verdict and result.verdict.kind == kind]
        for kind in MARKERS
    }
    for kind in ("better", "worse"):
        if ranked := sorted(by_kind[kind], key=lambda result: -abs(delta(result))):
            listed = "; ".join(
                f"{result.name} ({delta(result):+.4f} {unit}, {format_interval(result)})"
                for result in ranked[:MAX_LISTED]
            )
            remainder = f", and {len(ranked) - MAX_LISTED} more" if len(ranked) > MAX_LISTED else ""
            sentences.append(f"{kind.capitalize()} than the baseline: {listed}{remainder}.")
    if by_kind["same"]:
        names = ", ".join(result.name for result in by_kind["same"])
        sentences.append(f"The same as the baseline, within the margin: {names}.")
    if unclear := by_kind["not distinguishable"]:
        detectable = statistics.median(
            result.comparison.detectable
            for result in unclear
            if result.comparison and result.comparison.detectable
        )
        sentences.append(
            f"Not distinguishable from the baseline with {plural(plan.spec.seeds, 'seed')}: "
            f"{', '.join(result.name for result in unclear)}. 4 of 5 such studies would detect a "
            f"difference of {detectable:.3g} {unit} (the median over these variants)."
        )
    return sentences


def _run_findings(plan: Plan, results: Sequence[VariantResult]) -> list[str]:
    """Diverged and failed runs, and what limits the study."""
    sentences, n = [], plan.spec.seeds
    if plan.seen_seeds is not None:
        sentences.append(
            f"Seeds were added when the results of {plural(plan.seen_seeds, 'seed')} were known. "
            "If those results led to this, p-values and intervals are too small: a new study with "
            "the number of seeds fixed before decides."
        )
    diverged = {
        result.name: sum(trial.status == "diverged" for trial in result.trials)
        for result in results
    }
    if any(diverged.values()):
        listed = ", ".join(f"{name} ({count} of {n})" for name, count in diverged.items() if count)
        sentences.append(f"Diverged (a result, not a missing value): {listed}.")
    failed = sum(trial.status == "failed" for result in results for trial in result.trials)
    if failed:
        sentences.append(f"{failed} runs failed and are missing: see logs/.")
    if edges := [result.name for result in results if result.at_edge]:
        sentences.append(
            f"The best learning rate is at the edge of those tried for {', '.join(edges)}: the "
            "grid is too narrow there."
        )
    if n == 1:
        sentences.append(
            "One seed is no proof: the differences may be due to chance. Give --seeds 3 or more."
        )
    return sentences


def _size_findings(others: Sequence[VariantResult], base: VariantResult) -> list[str]:
    """The change of the loss by each step in depth and width, and where the gains drop."""
    sentences, measure = list[str](), MEASURES[base.measure]
    for axis in ("depth", "width"):
        baseline_value = (
            base.config.model.n_layers if axis == "depth" else base.config.model.d_model
        )
        results = [(int(result.value), result) for result in others if result.axis == axis]
        results = sorted([*results, (baseline_value, base)], key=lambda pair: pair[0])
        points = [
            (value, loss) for value, result in results if (loss := mean_loss(result)) is not None
        ]
        if len(points) < 3:
            continue
        steps = [f"{a} to {b}: {lb - la:+.3f}" for (a, la), (b, lb) in itertools.pairwise(points)]
        gains = [(la - lb) / math.log2(b / a) for (a, la), (b, lb) in itertools.pairwise(points)]
        bends = (
            points[i][0]
            for i in range(1, len(gains))
            if gains[i - 1] > 0 and gains[i] < gains[i - 1] / 2
        )
        bend = next(bends, None)
        tail = (
            f" From {bend} on, a doubling gains less than half of the one before." if bend else ""
        )
        sentences.append(
            f"Change of the {measure.column} by {axis}, in {measure.unit}: "
            f"{', '.join(steps)}.{tail}"
        )
    return sentences


def _activation_findings(others: Sequence[VariantResult], base: VariantResult) -> list[str]:
    """The comparison of GELU and SwiGLU, if one of them is the baseline and the other a variant."""
    by_activation = {base.config.model.feedforward: base}
    by_activation |= {
        result.config.model.feedforward: result for result in others if result.axis == "activation"
    }
    if not {"gelu", "swiglu"} <= set(by_activation):
        return []
    gelu, swiglu = by_activation["gelu"], by_activation["swiglu"]
    variant = next((result for result in (gelu, swiglu) if result.comparison), None)
    if variant is None or variant.verdict is None or base not in (gelu, swiglu):
        return []
    other = swiglu if variant is gelu else gelu
    kind, words = variant.verdict.kind, variant.verdict.words
    start = "GELU against SwiGLU at this scale"
    if kind in ("better", "worse"):
        whose = "the baseline, which has" if other is base else ""
        return [
            f"{start}: {variant.name} is {words} than {whose} {other.config.model.feedforward}."
        ]
    return [f"{start}: {'' if kind == 'same' else 'this study cannot decide: '}{words}."]


def _surprise_findings(others: Sequence[VariantResult], base: VariantResult) -> list[str]:
    """Smaller variants that are better, larger ones that are worse, and large spreads."""
    sentences = []
    smaller_better = [
        result.name
        for result in others
        if result.verdict
        and result.verdict.kind == "better"
        and result.parameters < (1 - MIN_SIZE_CHANGE) * base.parameters
    ]
    if smaller_better:
        sentences.append(f"Smaller than the baseline and better: {', '.join(smaller_better)}.")
    larger_worse = [
        result.name
        for result in others
        if result.verdict
        and result.verdict.kind == "worse"
        and result.parameters > (1 + MIN_SIZE_CHANGE) * base.parameters
    ]
    if larger_worse:
        sentences.append(
            f"Larger than the baseline and worse at this budget: {', '.join(larger_worse)}."
        )
    spreads = {
        result.name: spread
        for result in [base, *others]
        if (spread := loss_spread(result)) is not None
    }
    median = statistics.median(spreads.values()) if spreads else 0.0
    unsteady = [name for name, spread in spreads.items() if spread > LARGE_SPREAD * median > 0]
    if unsteady:
        sentences.append(
            f"More than four times the median spread over seeds ({median:.3g} "
            f"{MEASURES[base.measure].unit}): "
            f"{', '.join(unsteady)}."
        )
    return sentences


def sections(plan: Plan, results: Sequence[VariantResult]) -> list[Section]:
    """The sections of the report."""
    budget = MATCH_LABELS[plan.spec.match]
    samples = [
        (result.name, to_one_line(result.trials[0].sample)[:MAX_SAMPLE_LENGTH])
        for result in results
        if result.trials[0].sample
    ]
    runs = [
        (
            result.name,
            str(trial.seed),
            ": ".join(filter(None, (trial.status, trial.error))),
            format_number(measured_value(trial, plan.spec.measure), ".4f"),
            f"runs/{trial.run.path.name}",
        )
        for result in results
        for trial in result.trials
    ]
    return [
        Section("Key findings", findings(plan, results)),
        Section(
            "Differences from the baseline",
            (
                "Below zero is better. Bars are 95% intervals of the paired differences, without "
                "correction; the verdicts are corrected for the whole family (Holm). A filled mark "
                "is distinguishable from the baseline.",
            ),
            pictures=(
                Picture(
                    "bars",
                    f"Difference of each variant from the baseline, {budget}",
                    lambda colours: draw_bars(plan, results, colours),
                ),
            ),
        ),
        Section(
            "Training curves",
            pictures=(
                Picture(
                    "curves",
                    f"Validation loss against training tokens, means over the seeds, {budget}",
                    lambda colours: draw_curves(plan, results, colours),
                ),
            ),
        ),
        *(_axis_section(axis, plan, results) for axis in plan.axes),
        Section(
            "A sample of each",
            ("Of the first seed, after the last step.",),
            ("variant", "text"),
            samples,
        ),
        Section(
            "All runs",
            (),
            ("variant", "seed", "status", MEASURES[plan.spec.measure].column, "folder"),
            runs,
        ),
    ]


def _axis_section(axis: str, plan: Plan, results: Sequence[VariantResult]) -> Section:
    """The table of one axis, the baseline first."""
    rows = [results[0], *(result for result in results if result.axis == axis)]
    if axis == VERSION_AXIS:
        notes = [
            f"the baseline is trained by commit {version_name()} of glasslm, {row.name} by that "
            f"commit, of {plan.spec.against}"
            for row in rows[1:]
        ]
    else:
        note = find_axis(axis)[1].note
        notes = [*skipped_values([axis], plan.base), *([note] if note else [])]
    if plan.spec.match == "parameters" and axis != VERSION_AXIS:
        notes = [
            "the width is changed to keep the number of parameters (or the depth, on the axis of "
            f"the width); values that stay more than {MAX_MATCHED_ERROR:.0%} apart are left out"
        ]
    text = [f"{note[0].upper()}{note[1:]}." for note in notes]
    header = [MEASURES[plan.spec.measure].column if name == "loss" else name for name in HEADER]
    return Section(axis.capitalize(), text, header, [_format_row(result) for result in rows])


def _format_row(result: VariantResult) -> tuple[str, ...]:
    comparison, verdict = result.comparison, result.verdict
    spread, times = loss_spread(result), [trial.wall_s for trial in result.trials]
    steps = [trial.step_ms for trial in result.trials if trial.step_ms is not None]
    memory = [trial.peak_bytes for trial in result.trials if trial.peak_bytes]
    return (
        result.name,
        f"{result.parameters:,}",
        f"{result.flops:.3g}",
        format_loss(result),
        format_number(spread, ".4f") if spread is not None else "",
        f"{comparison.delta:+.4f}" if comparison and comparison.delta is not None else "",
        format_interval(result),
        format_number(verdict.p_holm, ".3g") if verdict and verdict.p_holm is not None else "",
        verdict.words if verdict else "the baseline",
        format_duration(statistics.mean(times)),
        f"{statistics.median(steps):.1f}" if steps else "",
        format_bytes(max(memory)) if memory else "",
    )
