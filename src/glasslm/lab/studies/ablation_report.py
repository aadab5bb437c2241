"""What an ablation says: sentences that follow from its numbers, bars with their intervals, curves, a table."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from glasslm import files
from glasslm.lab.studies.ablation import BASELINE, Plan, Result, as_csv
from glasslm.lab.studies.axes import AXES, left_out
from glasslm.report import figures, page
from glasslm.report.figures import Palette, dress, finish
from glasslm.report.page import Picture, Section
from glasslm.runs.record import text_name
from glasslm.text import duration, number, one_line, size

if TYPE_CHECKING:
    from matplotlib.figure import Figure

EQUAL = {
    "tokens": "equal tokens",
    "flops": "equal FLOPs",
    "time": "equal time",
    "parameters": "equal parameters",
}
MARKS = {
    "better": "o",
    "worse": "s",
    "same": "D",
    "not distinguishable": "D",
    "diverged": "X",
    "not tested": "D",
}
HEADER = (
    "variant", "parameters", "FLOPs", "loss", "spread", "difference", "95% interval", "p (Holm)", "verdict", "time",
    "ms a step", "memory",
)  # fmt: skip
SAMPLE = 160  # characters of a sample


def write(study: Path, made: Plan, results: Sequence[Result]) -> Path:
    """The table, the figures and the report of a study; returns the path of its page."""
    files.write_atomic(study / "ablation_table.csv", as_csv(results).encode())
    for name, draw in (("ablation_bars", bars), ("training_curves", curves)):
        files.write_atomic(
            study / f"{name}.png", figures.png(draw(made, results, figures.ON_WHITE))
        )
    title = f"Ablation of {', '.join(_axes(made))}"
    written = page.write(study, "ablation_report", title, lead(made), sections(made, results))
    for suffix in (".html", ".md"):  # under the name that every study has, too
        files.write_atomic(study / f"report{suffix}", written.with_suffix(suffix).read_bytes())
    return written


def text(made: Plan, results: Sequence[Result]) -> str:
    """For the terminal."""
    wide = max(len(result.name) for result in results)
    lines = [f"{'variant':<{wide}}  parameters  loss    difference  verdict"]
    for result in results:
        of, verdict = result.comparison, result.verdict
        delta = f"{of.delta:+.4f}" if of and of.delta is not None else ""
        words = verdict.words if verdict else "the baseline"
        lines.append(
            f"{result.name:<{wide}}  {result.parameters:>10,}  {_loss(result):<6}  {delta:>10}  {words}"
        )
    return "\n".join(
        [lead(made), "", *lines, "", *(f"- {sentence}" for sentence in findings(made, results))]
    )


def _axes(made: Plan) -> list[str]:
    return list(dict.fromkeys(one.axis for one in made.variants))


def lead(made: Plan) -> str:
    """How the study was made, in a paragraph."""
    train, n = made.base.train, made.asked.seeds
    tokens = train.max_steps * train.batch_size * made.base.model.block_size
    margin = f", the same means within {made.asked.margin:g} nats" if made.asked.margin else ""
    rate = (
        "each at its own best rate"
        if made.asked.rates
        else f"all at the rate {made.base.optimizer.lr:g}"
    )
    model, equal = made.base.model, EQUAL[made.asked.match]
    return (
        f"{len(made.variants)} variants and the baseline, {n} seed{'s' * (n > 1)} each (paired), {equal}: "
        f"{train.max_steps:,} steps of {tokens // train.max_steps:,} tokens for the baseline, {rate}. Losses are of "
        f"the last weights, nats a token, on the validation text; a family of {made.family} comparisons{margin}. The "
        f"baseline has {model.n_layers} layers of width {model.d_model}, {model.n_heads} heads, context "
        f"{model.block_size}, {model.norm} ({model.norm_position}), {model.feedforward}, {model.position} positions, "
        f"trained by {made.base.optimizer.optimizer} on {text_name(made.base.data)} ({made.compute.engine}, "
        f"{made.compute.precision})."
    )


def findings(made: Plan, results: Sequence[Result]) -> list[str]:
    """The key findings, each from numbers of this study."""
    base, others = results[0], results[1:]
    n, said = made.asked.seeds, []
    by_kind = {
        kind: [one for one in others if one.verdict and one.verdict.kind == kind] for kind in MARKS
    }
    for kind in ("better", "worse"):
        found = sorted(by_kind[kind], key=lambda one: -abs(_delta(one)))
        if found:
            listed = "; ".join(
                f"{one.name} ({_delta(one):+.4f} nats, {_interval(one)})" for one in found[:4]
            )
            more = f", and {len(found) - 4} more" if len(found) > 4 else ""
            said.append(f"{kind.capitalize()} than the baseline: {listed}{more}.")
    if by_kind["same"]:
        said.append(f"The same: {', '.join(one.name for one in by_kind['same'])}.")
    if unclear := by_kind["not distinguishable"]:
        least = statistics.median(
            one.comparison.detectable
            for one in unclear
            if one.comparison and one.comparison.detectable
        )
        said.append(
            f"Not distinguishable from the baseline with {n} seeds: {', '.join(one.name for one in unclear)}. A "
            f"difference of {least:.3g} nats (the median over these) would be seen in 4 of 5 such studies."
        )
    if lost := [one for one in results if any(row.status == "diverged" for row in one.rows)]:
        listed = ", ".join(
            f"{one.name} ({sum(r.status == 'diverged' for r in one.rows)} of {n})" for one in lost
        )
        said.append(f"Diverged, which is a result and not a gap: {listed}.")
    if failed := [row for one in results for row in one.rows if row.status == "failed"]:
        said.append(f"{len(failed)} runs failed and are missing: see logs/.")
    if edges := [one.name for one in results if one.at_edge]:
        said.append(
            f"The best rate is the last one tried for {', '.join(edges)}: the grid is too narrow there."
        )
    if n == 1:
        said.append(
            "One seed is no proof of anything: these are directions at best. Give --seeds 3 or more."
        )
    return [*said, *_returns(others, base), *_activations(others, base), *_surprises(others, base)]


def _returns(others: Sequence[Result], base: Result) -> list[str]:
    """What each step along an axis of sizes bought, and where a doubling bought less than half of the one before."""
    said = []
    for axis in ("depth", "width"):
        own = str(base.config.model.n_layers if axis == "depth" else base.config.model.d_model)
        points = [
            (int(one.value), one) for one in others if one.axis == axis and _mean(one) is not None
        ]
        points = sorted([*points, (int(own), base)], key=lambda point: point[0])
        known = [(value, loss) for value, one in points if (loss := _mean(one)) is not None]
        if len(known) < 3:
            continue
        steps = [f"{a} to {b}: {lb - la:+.3f}" for (a, la), (b, lb) in itertools.pairwise(known)]
        gains = [(la - lb) / math.log2(b / a) for (a, la), (b, lb) in itertools.pairwise(known)]
        bends = (
            known[i][0]
            for i in range(1, len(gains))
            if gains[i - 1] > 0 and gains[i] < gains[i - 1] / 2
        )
        where = next(bends, None)
        tail = (
            f" From {where} on, a doubling buys less than half of what the one before did."
            if where
            else ""
        )
        said.append(f"Returns of {axis}, nats a step: {', '.join(steps)}.{tail}")
    return said


def _activations(others: Sequence[Result], base: Result) -> list[str]:
    """GELU against SwiGLU, where the study has both: through the baseline's pairs."""
    of = {base.config.model.feedforward: base}
    of |= {one.config.model.feedforward: one for one in others if one.axis == "activation"}
    if not {"gelu", "swiglu"} <= set(of):
        return []
    pair = next((one for one in (of["gelu"], of["swiglu"]) if one.comparison), None)
    if pair is None or pair.verdict is None or base not in (of["gelu"], of["swiglu"]):
        return []
    other = of["swiglu"] if pair is of["gelu"] else of["gelu"]
    kind = pair.verdict.kind
    settled = kind in ("better", "worse", "same")
    return [
        f"GELU against SwiGLU at this scale: {pair.name} is {pair.verdict.words} than "
        f"{'the baseline, which has' if other is base else ''} {other.config.model.feedforward}."
        if kind in ("better", "worse")
        else f"GELU against SwiGLU at this scale: {'' if settled else 'this study cannot say: '}{pair.verdict.words}."
    ]


def _surprises(others: Sequence[Result], base: Result) -> list[str]:
    """What one would not have bet on."""
    said = []
    smaller = [
        one
        for one in others
        if one.verdict and one.verdict.kind == "better" and one.parameters < 0.95 * base.parameters
    ]
    if smaller:
        said.append(f"A surprise: smaller and better, {', '.join(one.name for one in smaller)}.")
    larger = [
        one
        for one in others
        if one.verdict and one.verdict.kind == "worse" and one.parameters > 1.05 * base.parameters
    ]
    if larger:
        said.append(
            f"A surprise: larger and worse at this budget, {', '.join(one.name for one in larger)}."
        )
    spreads = {one.name: _spread(one) for one in [base, *others] if _spread(one) is not None}
    usual = (
        statistics.median(spread for spread in spreads.values() if spread is not None)
        if spreads
        else 0.0
    )
    unsteady = [
        name for name, spread in spreads.items() if spread is not None and spread > 4 * usual > 0
    ]
    if unsteady:
        said.append(
            f"Unsteady, with four times the usual spread over seeds ({usual:.3g} nats): {', '.join(unsteady)}."
        )
    return said


def sections(made: Plan, results: Sequence[Result]) -> list[Section]:
    """For the page."""
    budget = EQUAL[made.asked.match]
    found = [
        Section("Key findings", findings(made, results)),
        Section("Differences from the baseline", (
            "Below zero is better. Bars are 95% intervals of the paired differences, each by itself; the verdicts hold "
            "together (Holm). A filled mark is distinguishable from the baseline, a cross diverged.",
        ), pictures=(Picture("bars", f"Difference of each variant's final loss from the baseline's, {budget}",
                             lambda colours: bars(made, results, colours)),)),
        Section("Training curves", pictures=(
            Picture("curves", f"Validation loss against training tokens, means over the seeds, {budget}",
                    lambda colours: curves(made, results, colours)),)),
    ]  # fmt: skip
    for axis in _axes(made):
        shown = [results[0], *(one for one in results if one.axis == axis)]
        notes = [*left_out([axis], made.base), *([AXES[axis].note] if AXES[axis].note else [])]
        if made.asked.match == "parameters":
            notes = [
                "the width follows, so that the number of parameters stays (or the depth, where the width varies)"
            ]
        found.append(
            Section(
                axis.capitalize(), [f"{note[0].upper()}{note[1:]}." for note in notes],
                HEADER,
                [_cells(one) for one in shown],
            )
        )  # fmt: skip
    samples = [
        (one.name, one_line(one.rows[0].sample)[:SAMPLE]) for one in results if one.rows[0].sample
    ]
    found.append(
        Section(
            "A sample of each",
            ("Of the first seed, after the last step.",),
            ("variant", "text"),
            samples,
        )
    )
    runs = [
        (one.name, str(row.seed), ": ".join(filter(None, (row.status, row.why))), number(row.final_loss, ".4f"),
         f"runs/{row.run.path.name}")
        for one in results for row in one.rows
    ]  # fmt: skip
    found.append(Section("All runs", (), ("variant", "seed", "status", "loss", "folder"), runs))
    return found


def _cells(one: Result) -> tuple[str, ...]:
    of, verdict = one.comparison, one.verdict
    spread, times = _spread(one), [row.wall_s for row in one.rows]
    steps = [row.step_ms for row in one.rows if row.step_ms is not None]
    memory = [row.peak_bytes for row in one.rows if row.peak_bytes]
    return (
        one.name, f"{one.parameters:,}", f"{one.flops:.3g}", _loss(one),
        number(spread, ".4f") if spread is not None else "",
        f"{of.delta:+.4f}" if of and of.delta is not None else "", _interval(one),
        number(verdict.p_holm, ".3g") if verdict and verdict.p_holm is not None else "",
        verdict.words if verdict else "the baseline", duration(statistics.mean(times)),
        f"{statistics.median(steps):.1f}" if steps else "", size(max(memory)) if memory else "",
    )  # fmt: skip


def _loss(one: Result) -> str:
    mean = _mean(one)
    lost = "failed" if any(row.status == "failed" for row in one.rows) else "diverged"
    return lost if mean is None else f"{mean:.4f}"


def _mean(one: Result) -> float | None:
    """Over all seeds; None where one has no loss: it would flatter the others."""
    losses = [loss for loss in one.losses if loss is not None]
    return statistics.mean(losses) if len(losses) == len(one.losses) else None


def _spread(one: Result) -> float | None:
    losses = [loss for loss in one.losses if loss is not None]
    return statistics.stdev(losses) if len(losses) > 1 else None


def _delta(one: Result) -> float:
    return one.comparison.delta if one.comparison and one.comparison.delta is not None else 0.0


def _interval(one: Result) -> str:
    of = one.comparison
    return (
        f"{of.ci_low:+.4f} to {of.ci_high:+.4f}"
        if of and of.ci_low is not None and of.ci_high is not None
        else ""
    )


def bars(made: Plan, results: Sequence[Result], colours: Palette) -> Figure:
    """The differences from the baseline, the intervals, and whether they count."""
    from matplotlib.figure import Figure

    shown = list(reversed(results[1:]))
    figure = Figure(figsize=(9, 1.4 + 0.32 * len(shown)), layout="constrained")
    axes = figure.add_subplot()
    n = made.asked.seeds
    dress(
        axes,
        f"Final validation loss against the baseline's, {EQUAL[made.asked.match]}, {n} seeds",
        "",
        colours,
    )
    axes.axvline(0, color=colours.ink, linewidth=1)
    hues = {axis: _line(i, colours)[0] for i, axis in enumerate(_axes(made))}
    for place, one in enumerate(shown):
        of, hue = one.comparison, hues[one.axis]
        if of is None or of.delta is None:
            axes.text(
                0,
                place,
                "  diverged" if of and of.diverged else "  no difference to show",
                color=hue,
                va="center",
            )
            continue
        if of.ci_low is not None and of.ci_high is not None:
            axes.plot([of.ci_low, of.ci_high], [place, place], color=hue, linewidth=2)
        kind = one.verdict.kind if one.verdict else "not tested"
        fill = hue if kind in ("better", "worse") else "none"
        axes.plot([of.delta], [place], MARKS[kind], color=hue, markerfacecolor=fill, markersize=7)
    axes.set_yticks(range(len(shown)), [one.name for one in shown])
    axes.set_xlabel("nats a token, below zero is better (95% intervals)", color=colours.ink)
    axes.set_ylim(-0.7, len(shown) - 0.3)
    return figure


def curves(made: Plan, results: Sequence[Result], colours: Palette) -> Figure:
    """Validation loss over training tokens: a panel for each axis, the baseline in all of them."""
    from matplotlib.figure import Figure

    panels = _axes(made)
    columns = min(3, len(panels))
    figure = Figure(figsize=(4.4 * columns, 3.2 * -(-len(panels) // columns)), layout="constrained")
    for place, axis in enumerate(panels, 1):
        axes = figure.add_subplot(-(-len(panels) // columns), columns, place)
        dress(
            axes,
            axis.capitalize(),
            "nats a token" if place % columns == 1 or columns == 1 else "",
            colours,
        )
        shown = [results[0], *(one for one in results if one.axis == axis)]
        for i, one in enumerate(shown):
            hue, style = (colours.ink, "-") if one.axis == BASELINE else _line(i - 1, colours)
            label = "baseline" if one.axis == BASELINE else one.value
            axes.plot(*_curve(one), color=hue, linestyle=style, linewidth=1.6, label=label)
        axes.set_xlabel(f"million training tokens, {EQUAL[made.asked.match]}", color=colours.ink)
        finish(axes, colours)
    return figure


def _line(i: int, colours: Palette) -> tuple[str, str]:
    """Hue and dashes of the i-th line: three hues, and other dashes where they come again."""
    return (colours.train, colours.validation, colours.third)[i % 3], ("-", "--", ":", "-.")[
        i // 3 % 4
    ]


def _curve(one: Result) -> tuple[list[float], list[float]]:
    """Validation losses by millions of tokens, the means over the seeds; where a seed has none there is no mean.

    Without the untrained model, beside which all others look alike. Inner points are of a sample of the validation
    text, the last one is of all of it.
    """
    per_step = one.config.train.batch_size * one.config.model.block_size
    seeds = []
    for row in one.rows:
        history = row.run.history
        points = zip(history.eval_steps, history.val_losses)
        seeds.append(
            {step * per_step / 1e6: loss for step, loss in points if step and loss is not None}
        )
    xs = sorted(set.intersection(*(set(points) for points in seeds)))
    return xs, [statistics.mean(points[x] for points in seeds) for x in xs]
