"""The diagnosis of a run, or of a configuration before it: which signals, at which weights, in which order; the page.

A run is only read: its checkpoints are loaded into engines of the diagnosis' own, and no lock is taken, so that it may
go on meanwhile.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from glasslm.data.dataset import Dataset, prepare_dataset, require_enough_tokens
from glasslm.runs.metrics import Line, WarningLine, step_lines
from glasslm.config.schema import ComputeConfig, RunConfig
from glasslm.data.sources import corpora
from glasslm.engines.choice import compute_from_record
from glasslm.engines.protocol import Batch, State
from glasslm.errors import DamagedError, InputError
from glasslm.lab.diagnosis import curve_figure, curve_files, curves, diagnosis_figures, signals, trials
from glasslm.lab.diagnosis.trials import Bench
from glasslm.model import flops
from glasslm.model.parameters import initial_weights, parameter_table
from glasslm.report import page
from glasslm.report.findings import HEADER, SEVERITY, Finding, Verdict, worst_verdict
from glasslm.report.page import Picture, Section
from glasslm.runs import checkpoint
from glasslm.runs.run_folder import Run
from glasslm.text import Notify
from glasslm.training.fine_tuning import Base
from glasslm.training.learning_rate import lr_at
from glasslm.training.loop import make_sampler

if TYPE_CHECKING:
    from glasslm.runs.checkpoint import Checkpoint

LOOK_TOKENS, RANGE_TOKENS = (
    1024,
    512,
)  # of a batch that is looked at or learnt by heart, and of one of the range test
LONGEST = 512  # positions looked at: attention's scores are written out
PROBE_TOKENS, PROBE_FLOPS = (
    50_000,
    4e10,
)  # over which dead units are looked for, as many as are cheap
MOST_CHECKPOINTS = 4


@dataclass(frozen=True)
class Subject:
    """What is diagnosed: a configuration with its text and its first weights, and a run that it has become."""

    config: RunConfig  # resolved
    dataset: Dataset
    compute: ComputeConfig
    first: Callable[[], State]
    tuned: bool  # it did not start from nothing
    run: Run | None = None

    @property
    def vocab_size(self) -> int:
        return self.dataset.tokenizer.vocab_size

    @property
    def bench(self) -> Bench:
        return Bench(
            self.config,
            self.vocab_size,
            trials.maker(self.vocab_size, self.compute),
            self.batch,
            self.first,
        )

    def batch(self, step: int, rows: int) -> Batch:
        """So many rows like those of that step, cut where attention written out would take too much memory."""
        train = dataclasses.replace(self.config.train, batch_size=rows)
        order = make_sampler(
            dataclasses.replace(self.config, train=train), len(self.dataset.train.tokens)
        )
        which = np.arange(rows)
        inputs, targets = order.batch(self.dataset.train.tokens, step, which)
        return Batch(inputs[:, :LONGEST], targets[:, :LONGEST], step, which)

    def rows(self, tokens: int) -> int:
        """Rows of about so many tokens, and two at least."""
        return max(2, tokens // min(self.config.model.block_size, LONGEST))


@dataclass
class Diagnosis:
    """Findings in the order of the page, worst of each group first, and the figures that go with them."""

    title: str
    findings: list[Finding] = field(default_factory=list)
    pictures: list[Picture] = field(default_factory=list)

    @property
    def verdict(self) -> Verdict:
        return worst_verdict(self.findings)

    def text(self) -> str:
        """A table, and what to do about each finding that is not ok."""
        marks = {verdict: f"{mark} {verdict}" for verdict, mark in page.MARKS.items()}
        wide = max(len(finding.signal) for finding in self.findings)
        lines = [self.title, ""]
        lines += [
            f"  {marks[one.verdict]:<8} {one.signal:<{wide}}  {one.seen}" for one in self.findings
        ]
        for one in self.serious:
            lines += ["", f"{marks[one.verdict]}: {one.signal}", f"  {one.means}"]
            lines += [f"  {one.advice}"] if one.advice else []
        return "\n".join([*lines, "", self.summary])

    @property
    def serious(self) -> list[Finding]:
        """Those that are not ok, the worst first."""
        found = [finding for finding in self.findings if finding.verdict != "ok"]
        return sorted(found, key=lambda finding: -SEVERITY[finding.verdict])

    @property
    def summary(self) -> str:
        counts = {v: sum(one.verdict == v for one in self.findings) for v in ("bad", "watch", "ok")}
        return f"{counts['bad']} bad, {counts['watch']} to watch, {counts['ok']} ok"

    def write(self, folder: Path) -> Path:
        """diagnosis.html, diagnosis.md and their figures; the path of the first."""
        sections = [
            Section(
                "What is wrong",
                () if self.serious else ("Nothing.",),
                HEADER,
                [one.row for one in self.serious],
            ),
            Section("Every signal", (), HEADER, [one.row for one in self.findings]),
            Section("Figures", pictures=self.pictures),
        ]
        return page.write(folder, "diagnosis", self.title, self.summary, sections)


def of_config(config: RunConfig, compute: ComputeConfig, notify: Notify) -> Subject:
    """A configuration before training. Raises InputError where a run of it could not start."""
    config = config.resolve()
    base = Base(config.train.init_from) if config.train.init_from else None
    if base:
        base.require_fit(config)
    elif config.model.lora_rank:
        raise InputError("adapters stand beside trained weights: give --init-from RUN")
    dataset = prepare_dataset(
        config.data, corpora.find_source(config.data, notify), notify, base.run.tokenizer if base else None
    )
    require_enough_tokens(dataset, config.model.block_size, config.train.batch_size)
    rows = parameter_table(config.model, dataset.tokenizer.vocab_size)

    def first() -> State:
        return base.first_weights(config) if base else initial_weights(rows, config.train.seed)

    return Subject(config, dataset, compute, first, tuned=base is not None)


def of_run(run_dir: Path, compute: ComputeConfig, notify: Notify) -> Subject:
    """A run, finished, interrupted or under way, computed as it was where that is possible.

    Raises DamagedError where its text is gone.
    """
    run = Run(run_dir)
    compute, notes = compute_from_record(compute, run.record)
    for note in notes:
        notify(f"note: {note}")
    dataset = run.dataset(notify)
    rows = parameter_table(run.config.model, run.tokenizer.vocab_size)
    steps = checkpoint.list_steps(run_dir)
    from_nothing = run.config.train.init_from is None and "merged_from" not in run.record

    def first() -> State:
        if from_nothing:  # a function of the seed, whatever has become of the checkpoint of step 0
            return initial_weights(rows, run.config.train.seed)
        held = checkpoint.load(run_dir, steps[0] if steps else "latest")
        return ((name, array) for name, array in held.state() if "/" not in name)

    return Subject(run.config.resolve(), dataset, compute, first, not from_nothing, run)


def diagnose(subject: Subject, notify: Notify) -> Diagnosis:
    """Everything that can be said, in the order of a doctor: first the model at rest, then under load, then history."""
    made = Diagnosis(
        f"Diagnosis of {subject.run.path.name}" if subject.run else "Diagnosis before training"
    )
    at_rest(subject, made, notify)
    under_load(subject, made, notify)
    history(subject, made)
    return made


# -- the model at rest ------------------------------------------------------------------------------------------------


def at_rest(subject: Subject, made: Diagnosis, notify: Notify) -> None:
    """What inspection shows of the first weights and of the run's checkpoints, and one update of each."""
    config, c, V = subject.config, subject.config.model, subject.vocab_size
    rows, bench, many = parameter_table(c, V), subject.bench, subject.rows(LOOK_TOKENS)
    batch = subject.batch(0, many)
    engine = bench.make(trials.with_rows(config, many, {}, {}))
    readings, updates, found = [], [], made.findings
    for held, state in itertools.chain([(None, None)], _checkpoints(subject, notify)):
        step = held.step if held else 0
        notify(f"looking at the weights of step {step:,}")
        engine.load(state if state else subject.first(), held.progress.updates if held else 0)
        readings.append(signals.read(engine, batch, c, rows, step))
        if step == 0:
            found += [signals.causality(engine, batch, V), signals.targets(batch)]
        dead = signals.dead_units(*signals.units(engine, _probe(subject), c), c, step)
        lr = _rate(config, step)
        updates.append((step, trials.ratios(engine, subject.batch(step, many), lr, config, V)))
        judged = [
            dead,
            signals.depth(readings[-1], c),
            signals.gradients(readings[-1], c, rows),
            signals.attention_entropy(readings[-1], V),
            trials.judge_updates(updates[-1][1], lr, step, subject.tuned),
        ]
        before = {one.signal: index for index, one in enumerate(found)}
        for one in judged:  # the worst of all checkpoints
            if one.signal in before:
                found[before[one.signal]] = signals.worse(found[before[one.signal]], one)
            else:
                found.append(one)
    if not subject.tuned:
        head = rows.get("head.weight", rows["embedding.weight"]).std
        assert head is not None
        found[:0] = [
            signals.initial_loss(readings[0], V, c, head),
            signals.initialisation(readings[0]),
        ]
    found += [
        signals.norm_position(c, readings[0]),
        signals.attention_logits(readings),
        signals.output_logits(readings),
    ]
    made.pictures += [
        Picture(
            "depth",
            "Signal and gradient through depth, for each checkpoint",
            lambda p: diagnosis_figures.depth(readings, c, p),
        ),
        Picture(
            "attention",
            "Every attention head, for each checkpoint",
            lambda p: diagnosis_figures.attention(readings, c, p),
        ),
        Picture(
            "updates",
            "One update of each weight, for each checkpoint",
            lambda p: diagnosis_figures.updates(updates, p),
        ),
    ]


def _checkpoints(
    subject: Subject, notify: Notify
) -> Iterator[tuple[Checkpoint, list[tuple[str, NDArray[Any]]]]]:
    """Of the run's checkpoints after the first weights the best, the latest and one or two between, as far as whole.

    A run under way may remove one before it is read: each comes with its arrays, read at once.
    """
    if subject.run is None:
        return
    path = subject.run.path
    steps = [step for step in checkpoint.list_steps(path) if step > 0]
    best = subject.run.history.best_step
    chosen = (
        {steps[i] for i in np.linspace(0, len(steps) - 1, MOST_CHECKPOINTS - 1).round().astype(int)}
        if steps
        else set()
    )
    if best in steps and best not in chosen:
        chosen = (
            {best, *sorted(chosen)[1:]} if len(chosen) == MOST_CHECKPOINTS - 1 else {best, *chosen}
        )
    for step in sorted(chosen):
        try:
            held = checkpoint.load(path, step)
            state = list(held.state())
        except (DamagedError, InputError) as error:
            notify(f"note: the checkpoint of step {step:,} is left out: {error}")
            continue
        yield held, state


def _rate(config: RunConfig, step: int) -> float:
    """The rate of the schedule at a step, and a tenth of the peak at least once it has been reached."""
    optimizer, last = config.optimizer, config.train.max_steps
    rate = lr_at(min(step, last - 1), optimizer, last)
    return rate if step < min(optimizer.warmup_steps, last // 2) else max(rate, 0.1 * optimizer.lr)


def _probe(subject: Subject) -> Iterator[Batch]:
    per_token = flops.flops_per_token(subject.config.model, subject.vocab_size) / 3
    rows = subject.rows(LOOK_TOKENS)
    most, tokens_seen, step = min(PROBE_TOKENS, PROBE_FLOPS / per_token), 0, 0
    while tokens_seen < most:
        batch = subject.batch(step, rows)
        yield batch
        tokens_seen, step = tokens_seen + batch.tokens.size, step + 1


# -- under load -------------------------------------------------------------------------------------------------------


def under_load(subject: Subject, made: Diagnosis, notify: Notify) -> None:
    """Copies of the first weights learn a batch by heart, try all rates, and other widths."""
    bench, uniform = subject.bench, math.log(subject.vocab_size)
    if not subject.config.model.lora_rank:  # adapters are too few for that, by intention
        notify("learning one batch by heart")
        losses = trials.overfit(bench, subject.rows(RANGE_TOKENS))
        made.findings.append(trials.judge_overfit(losses, subject.vocab_size))
        made.pictures.append(
            Picture(
                "overfit",
                "The first weights learn one batch",
                lambda p: diagnosis_figures.overfit(losses, uniform, p),
            )
        )
    notify("trying all learning rates")
    found, lr = trials.range_test(bench, subject.rows(RANGE_TOKENS)), subject.config.optimizer.lr
    made.findings.append(trials.judge_range(found, subject.config.optimizer, subject.tuned))
    made.pictures.append(
        Picture(
            "range",
            "The loss while the rate grows from step to step",
            lambda p: diagnosis_figures.range_test(found, lr, p),
        )
    )
    if subject.tuned:  # other widths have no weights to start from
        return
    notify("taking a few steps at other widths")
    coordinates = trials.coordinates(bench, subject.rows(RANGE_TOKENS))
    made.findings.append(trials.judge_coordinates(coordinates))
    made.pictures.append(
        Picture(
            "widths",
            "What a few steps change, by width of the model",
            lambda p: diagnosis_figures.widths(coordinates, p),
        )
    )


# -- history ----------------------------------------------------------------------------------------------------------


def history(subject: Subject, made: Diagnosis) -> None:
    """What metrics.jsonl tells: the run's own warnings, and what its curve says."""
    if subject.run is None:
        return
    run, lines = subject.run, list(subject.run.metrics())
    made.findings += _warnings(lines)
    if not step_lines(lines):
        return
    curve = curve_files.read_curve(run.path)
    known = {finding.signal for finding in made.findings}
    made.findings += [
        finding for finding in curves.judge_curve(curve, subject.tuned) if finding.signal not in known
    ]
    made.pictures.append(
        Picture("history", "What the run has logged", lambda p: curve_figure.draw_curve(curve, p))
    )


GRAVE = {"nonfinite", "diverged"}


def _warnings(lines: Sequence[Line]) -> list[Finding]:
    """The run's own warnings, by kind."""
    warned: dict[str, list[WarningLine]] = {}
    for line in lines:
        if line["kind"] == "warning" and line.get("code") != "fallback":
            warned.setdefault(str(line.get("code")), []).append(line)
    if not warned:
        return [Finding("warnings", "ok", "none", "the run had nothing to say about itself")]
    found = []
    for code, of_code in warned.items():
        where = ", ".join(str(line["step"]) for line in of_code[:5]) + (
            " ..." if len(of_code) > 5 else ""
        )
        seen = f"{len(of_code)} of the kind {code}, at step {where}"
        advice = (
            ""
            if code == "overfit"
            else "`glasslm diagnose RUN --replay STEP` looks into such a step."
        )
        verdict: Verdict = "bad" if code in GRAVE else "watch"
        found.append(Finding(f"warning: {code}", verdict, seen, str(of_code[0]["message"]), advice))
    return found
