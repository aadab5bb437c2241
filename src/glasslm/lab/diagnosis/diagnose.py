"""Diagnoses a run or a configuration by its weights, trials and history, and writes the page.

The run is only read. Its checkpoints are loaded into other engines and it is not locked, so it may
be in progress.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from glasslm.config.schema import RunConfig
from glasslm.engines.protocol import Batch, Engine
from glasslm.lab.diagnosis import (
    coordinate_check,
    curve_figure,
    curve_files,
    curves,
    diagnosis_figures,
    measurements,
    signals,
    trials,
)
from glasslm.lab.diagnosis.diagnosis_input import DiagnosisInput
from glasslm.lab.diagnosis.measurements import Measurement
from glasslm.lab.diagnosis.trials import UpdateRatio
from glasslm.model import flops
from glasslm.model.parameters import parameter_table
from glasslm.report import notebook, page
from glasslm.report.findings import HEADER, SEVERITY, Finding, Verdict, worst_verdict
from glasslm.report.page import Picture, Section
from glasslm.runs.metrics import Line, WarningLine, step_lines, warning_lines
from glasslm.text import Notify
from glasslm.training.learning_rate import lr_at

INSPECT_TOKENS = 1024  # of an inspected batch
TRIAL_TOKENS = 512  # of a batch of a trial
MAX_PROBE_TOKENS, MAX_PROBE_FLOPS = 50_000, 4e10  # of the search for dead units; the smaller holds
SERIOUS_WARNINGS = {"nonfinite", "diverged"}  # codes of warnings that are bad


@dataclass
class Diagnosis:
    """The findings and figures of a diagnosis, in the order of the page."""

    title: str
    findings: list[Finding] = field(default_factory=list)
    pictures: list[Picture] = field(default_factory=list)

    @property
    def verdict(self) -> Verdict:
        """The worst verdict."""
        return worst_verdict(self.findings)

    @property
    def problems(self) -> list[Finding]:
        """The findings that are not ok, the worst first."""
        problems = [finding for finding in self.findings if finding.verdict != "ok"]
        return sorted(problems, key=lambda finding: -SEVERITY[finding.verdict])

    @property
    def summary(self) -> str:
        """The number of findings by verdict, as text."""
        verdicts = [finding.verdict for finding in self.findings]
        return (
            f"{verdicts.count('bad')} bad, {verdicts.count('watch')} to watch, "
            f"{verdicts.count('ok')} ok"
        )

    def text(self) -> str:
        """A table of all findings, then the meaning of each problem and the advice."""
        marks = {verdict: f"{mark} {verdict}" for verdict, mark in page.MARKS.items()}
        width = max(len(finding.signal) for finding in self.findings)
        lines = [self.title, ""]
        lines += [
            f"  {marks[finding.verdict]:<8} {finding.signal:<{width}}  {finding.evidence}"
            for finding in self.findings
        ]
        for finding in self.problems:
            lines += ["", f"{marks[finding.verdict]}: {finding.signal}", f"  {finding.meaning}"]
            lines += [f"  {finding.advice}"] if finding.advice else []
        return "\n".join([*lines, "", self.summary])

    def write(self, folder: Path) -> Path:
        """Write diagnosis.html, diagnosis.md and the figures; return the path of diagnosis.html."""
        return page.write(folder, "diagnosis", self.title, self.summary, self._sections())

    def _repr_html_(self) -> str:
        return notebook.format_sections(self.title, self.summary, self._sections())

    def _sections(self) -> list[Section]:
        return [
            Section(
                "Problems",
                () if self.problems else ("None.",),
                HEADER,
                [finding.row for finding in self.problems],
            ),
            Section("Every signal", (), HEADER, [finding.row for finding in self.findings]),
            Section("Figures", pictures=self.pictures),
        ]


def diagnose(target: DiagnosisInput, notify: Notify) -> Diagnosis:
    """The diagnosis of a run or configuration.

    It judges the weights at several checkpoints, then trials, then the history.
    """
    diagnosis = Diagnosis(
        f"Diagnosis of {target.run.path.name}" if target.run else "Diagnosis before training"
    )
    inspect_checkpoints(target, diagnosis, notify)
    run_trials(target, diagnosis, notify)
    judge_history(target, diagnosis)
    return diagnosis


# -- inspection of the weights ---------------------------------------------------------------------


def inspect_checkpoints(target: DiagnosisInput, diagnosis: Diagnosis, notify: Notify) -> None:
    """Inspect the first weights and the run's checkpoints, and one update of each."""
    config, c, V = target.config, target.config.model, target.vocab_size
    rows = target.rows_for(INSPECT_TOKENS)
    engine = target.trial_setup.make_engine(trials.trial_config(config, rows, {}, {}))
    measured: list[Measurement] = []
    updates: list[tuple[int, list[UpdateRatio]]] = []
    findings = diagnosis.findings
    for saved, state in itertools.chain([(None, None)], target.load_checkpoints(notify)):
        step = saved.step if saved else 0
        notify(f"inspecting the weights of step {step:,}")
        engine.load(
            state if state else target.first_weights(), saved.position.updates if saved else 0
        )
        measurement, ratios, judged = _inspect_weights(target, engine, step)
        measured.append(measurement)
        updates.append((step, ratios))
        _keep_worst(findings, judged)
    if not target.fine_tuned:
        table = parameter_table(c, V)
        head_std = table.get("head.weight", table["embedding.weight"]).std
        assert head_std is not None
        findings[:0] = [
            signals.judge_initial_loss(measured[0], V, c, head_std),
            signals.judge_initialization(measured[0]),
        ]
    findings += [
        signals.judge_norm_position(c, measured[0]),
        signals.judge_attention_logits(measured),
        signals.judge_output_logits(measured),
    ]
    diagnosis.pictures += [
        Picture(
            "depth",
            "Signal and gradient through depth, for each checkpoint",
            lambda p: diagnosis_figures.draw_depth(measured, c, p),
        ),
        Picture(
            "attention",
            "Every attention head, for each checkpoint",
            lambda p: diagnosis_figures.draw_attention(measured, c, p),
        ),
        Picture(
            "updates",
            "One update of each weight, for each checkpoint",
            lambda p: diagnosis_figures.draw_updates(updates, p),
        ),
    ]


def _inspect_weights(
    target: DiagnosisInput, engine: Engine, step: int
) -> tuple[Measurement, list[UpdateRatio], list[Finding]]:
    """Measure and judge the engine's weights, which are those of `step`.

    The last measurement trains one step.
    """
    config, c, V = target.config, target.config.model, target.vocab_size
    table, rows = parameter_table(c, V), target.rows_for(INSPECT_TOKENS)
    batch = target.batch(0, rows)
    measurement = measurements.measure_model(engine, batch, c, table, step)
    findings = []
    if step == 0:
        findings += [signals.judge_causality(engine, batch, V), signals.judge_targets(batch)]
    units, tokens = measurements.measure_units(engine, _probe_batches(target), c)
    lr = _inspected_rate(config, step)
    ratios = trials.measure_update_ratios(engine, target.batch(step, rows), lr, config, V)
    findings += [
        signals.judge_dead_units(units, tokens, c, step),
        signals.judge_depth(measurement, c),
        signals.judge_gradients(measurement, c, table),
        signals.judge_attention_entropy(measurement, V),
        trials.judge_updates(ratios, lr, step, target.fine_tuned),
    ]
    return measurement, ratios, findings


def _keep_worst(findings: list[Finding], further: Sequence[Finding]) -> None:
    """Add the further findings, and keep the worst finding of each signal.

    It takes the place of the first one.
    """
    indices = {finding.signal: index for index, finding in enumerate(findings)}
    for finding in further:
        if finding.signal in indices:
            index = indices[finding.signal]
            findings[index] = signals.worse_finding(findings[index], finding)
        else:
            findings.append(finding)


def _inspected_rate(config: RunConfig, step: int) -> float:
    """The learning rate of a step; after the warmup at least a tenth of the peak."""
    optimizer, last = config.optimizer, config.train.max_steps
    rate = lr_at(min(step, last - 1), optimizer, last)
    return rate if step < min(optimizer.warmup_steps, last // 2) else max(rate, 0.1 * optimizer.lr)


def _probe_batches(target: DiagnosisInput) -> Iterator[Batch]:
    """Batches of training text for the search of dead units, up to the limits."""
    forward_flops = flops.flops_per_token(target.config.model, target.vocab_size) / 3
    rows = target.rows_for(INSPECT_TOKENS)
    max_tokens, tokens, step = min(MAX_PROBE_TOKENS, MAX_PROBE_FLOPS / forward_flops), 0, 0
    while tokens < max_tokens:
        batch = target.batch(step, rows)
        yield batch
        tokens, step = tokens + batch.tokens.size, step + 1


# -- trials ----------------------------------------------------------------------------------------


def run_trials(target: DiagnosisInput, diagnosis: Diagnosis, notify: Notify) -> None:
    """Overfit one batch, test learning rates and try other widths.

    Each trial trains a copy of the first weights on the text, which tuning to preferences does not.
    """
    if target.config.preference.is_active:
        reason = "the run learned preferences, and a trial learns the next tokens of a text"
        diagnosis.findings.append(Finding("trials", "ok", "not tried", reason))
        return
    setup, rows = target.trial_setup, target.rows_for(TRIAL_TOKENS)
    if not target.config.model.lora_rank:  # adapters have too few parameters to overfit a batch
        notify("overfitting one batch")
        uniform = math.log(target.vocab_size)
        losses = trials.overfit_one_batch(setup, rows)
        diagnosis.findings.append(trials.judge_overfit(losses, target.vocab_size))
        diagnosis.pictures.append(
            Picture(
                "overfit",
                "The first weights overfit one batch",
                lambda p: diagnosis_figures.draw_overfit(losses, uniform, p),
            )
        )
    notify("testing learning rates")
    test, optimizer = trials.run_range_test(setup, rows), target.config.optimizer
    diagnosis.findings.append(trials.judge_range(test, optimizer, target.fine_tuned))
    diagnosis.pictures.append(
        Picture(
            "range",
            "The loss while the rate grows from step to step",
            lambda p: diagnosis_figures.draw_range_test(test, optimizer.lr, p),
        )
    )
    if target.fine_tuned:  # there are no trained weights of other widths
        return
    notify("training a few steps at other widths")
    check = coordinate_check.check_coordinates(setup, rows)
    diagnosis.findings.append(coordinate_check.judge_coordinates(check))
    diagnosis.pictures.append(
        Picture(
            "widths",
            "The change after a few steps, by width of the model",
            lambda p: diagnosis_figures.draw_widths(check, p),
        )
    )


# -- history ---------------------------------------------------------------------------------------


def judge_history(target: DiagnosisInput, diagnosis: Diagnosis) -> None:
    """Judge metrics.jsonl: the warnings of the run, and its loss curve."""
    if target.run is None:
        return
    run, lines = target.run, list(target.run.metrics())
    diagnosis.findings += _judge_warnings(lines)
    if not step_lines(lines):
        return
    curve = curve_files.read_curve(run.path)
    judged = {finding.signal for finding in diagnosis.findings}
    diagnosis.findings += [
        finding
        for finding in curves.judge_curve(curve, target.fine_tuned)
        if finding.signal not in judged
    ]
    diagnosis.pictures.append(
        Picture(
            "history", "The logged history of the run", lambda p: curve_figure.draw_curve(curve, p)
        )
    )


def _judge_warnings(lines: Sequence[Line]) -> list[Finding]:
    """A finding for each kind of warning that the run wrote."""
    warnings: dict[str, list[WarningLine]] = {}
    for line in warning_lines(lines):
        if line.get("code") != "fallback":
            warnings.setdefault(str(line.get("code")), []).append(line)
    if not warnings:
        return [Finding("warnings", "ok", "none", "the run wrote no warnings")]
    findings = []
    for code, same_code in warnings.items():
        steps = ", ".join(str(line["step"]) for line in same_code[:5])
        more = " ..." if len(same_code) > 5 else ""
        evidence = f"{len(same_code)} of the kind {code}, at step {steps}{more}"
        advice = (
            ""
            if code == "overfit"
            else "Look at such a step: `glasslm diagnose RUN --replay STEP`."
        )
        verdict: Verdict = "bad" if code in SERIOUS_WARNINGS else "watch"
        message = str(same_code[0]["message"])
        findings.append(Finding(f"warning: {code}", verdict, evidence, message, advice))
    return findings
