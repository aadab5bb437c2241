"""index.html of a capstone: the page to hand in, with the files behind each number."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from glasslm.config.schema import ModelConfig
from glasslm.course.capstone import quiz
from glasslm.course.capstone.build import Ablation, Capstone
from glasslm.course.capstone.questions import Answer
from glasslm.course.capstone.study_sizes import BASELINES, MIN_STEPS, SEEDS, AblationDesign
from glasslm.lab.scaling import fit_figures, fit_report
from glasslm.lab.scaling.fit_report import format_interval
from glasslm.lab.scaling.plan import plan_compute
from glasslm.lab.studies import ablation_figures, ablation_report
from glasslm.lab.studies.ablation import Plan
from glasslm.lab.studies.ladder import LADDER_SHAPES, Ladder, training_flops
from glasslm.lab.studies.scaling_study import ScalingStudy
from glasslm.report import curves, page
from glasslm.report.page import Picture, Section
from glasslm.report.report_tables import next_commands
from glasslm.runs.history import best_eval, sample_note
from glasslm.runs.metrics import Line, sample_lines
from glasslm.runs.record import text_name
from glasslm.runs.run_folder import Run
from glasslm.text import format_duration, format_number, plural, to_one_line

MAX_SAMPLE_CHARS = 600


def write(capstone: Capstone, answers: Sequence[Answer]) -> Path:
    """Write index.html and index.md, with the results of a quiz if there was one.

    Returns the path of index.html.
    """
    lines = list(capstone.run.metrics())
    marks = quiz.mark_answers(quiz.read_answers(capstone.folder), answers)
    sections = [
        _deliverables_section(capstone),
        _checkpoint_section(capstone, lines),
        _curves_section(capstone),
        _ablation_section(capstone),
        _scaling_section(capstone),
        *([quiz.build_section(marks)] if marks else []),
        *(_answer_section(capstone, i, answer) for i, answer in enumerate(answers, 1)),
    ]
    title = f"Capstone: a language model of {text_name(capstone.run.config.data)}"
    return page.write(capstone.folder, "index", title, _lead(capstone, lines), sections)


def _lead(capstone: Capstone, lines: list[Line]) -> str:
    """The result, the time and the command in one paragraph."""
    record = capstone.run.record
    best: Mapping[str, Any] = best_eval(lines, capstone.run.history) or {}
    loss = (
        f"{best['loss']:.4f} nats per token, {format_number(best['bpb'], '.3f')} bits per byte"
        if best
        else "not measured"
    )
    ending = ", although training diverged" if capstone.run.history.status == "diverged" else ""
    return (
        f"{record['parameters']['total']:,} parameters trained from random weights; validation "
        f"loss {loss}{ending}. It took {format_duration(capstone.spent_s)} of a budget of "
        f"{format_duration(capstone.budget_s)}. Command: `{capstone.command}` (glasslm "
        f"{record['glasslm']}, {record['engine']}, {record['created'][:10]})."
    )


def _deliverables_section(capstone: Capstone) -> Section:
    ablation_row, scaling_row = (
        f"missing: {part}" if isinstance(part, str) else ""
        for part in (capstone.ablation, capstone.scaling)
    )
    links = [("the run's report", "run/report.html")]
    if isinstance(capstone.ablation, Ablation):
        n_variants = len(capstone.ablation.plan.variants)
        ablation_row = f"{n_variants} variants, {SEEDS} seeds each: ablation/report.html"
        links += [
            ("the ablation", "ablation/report.html"),
            ("its table", "ablation/ablation_table.csv"),
        ]
    if isinstance(capstone.scaling, ScalingStudy):
        scaling_row = f"{len(capstone.scaling.runs)} runs and a prediction: scaling/report.html"
        links += [("the scaling study", "scaling/report.html"), ("its runs", "scaling/runs.csv")]
        links += [("its fit", "scaling/fit.json")]
    step = capstone.run.history.best_step
    checkpoint = f"checkpoints/{step:06d} (best)" if step is not None else "checkpoints/"
    rows = [
        ("1. a trained checkpoint", f"{checkpoint}, for `glasslm generate {capstone.run.path}`"),
        (
            "2. training curves",
            "loss, learning rate and gradient norm over all steps; more in run/report.html",
        ),
        ("3. an ablation report", ablation_row),
        ("4. a scaling analysis", scaling_row),
        ("5. the checkpoint questions", "answered below, with the numbers of this run"),
    ]
    return Section("Deliverables", (), ("", ""), rows, (), links)


def _checkpoint_section(capstone: Capstone, lines: list[Line]) -> Section:
    run = capstone.run
    best: Mapping[str, Any] = best_eval(lines, run.history) or {}
    model, record = run.config.model, run.record
    samples = sample_lines(lines)
    rows = [
        (
            "model",
            f"{model.n_layers} layers, width {model.d_model}, {model.n_heads} heads, context "
            f"{model.block_size}",
        ),
        ("parameters", f"{record['parameters']['total']:,}"),
        ("training text", f"{record['data']['train_tokens']:,} tokens"),
        ("validation text", f"{record['data']['val_tokens']:,} tokens"),
        ("steps", f"{run.config.train.max_steps:,}"),
    ]
    if best:
        note = sample_note(best)
        extent = f"on {best['tokens']:,} tokens ({note})" if note else "over the whole split"
        rows += [
            (
                "validation loss",
                f"{best['loss']:.4f} nats per token at step {best['step']:,}, perplexity "
                f"{best['perplexity']:.3f}, {format_number(best['bpb'], '.3f')} bits per byte, "
                f"{extent}",
            ),
        ]
    rows += next_commands(str(run.path), run.history.status)[:3]
    sample = to_one_line(samples[-1]["text"])[:MAX_SAMPLE_CHARS] if samples else ""
    text = [f"A sample of its text: {sample}"] if samples else []
    links = [
        ("run.json", "run/run.json"),
        ("metrics.jsonl", "run/metrics.jsonl"),
        ("report", "run/report.html"),
    ]
    return Section("1. The checkpoint", text, ("", ""), rows, (), links)


def _curves_section(capstone: Capstone) -> Section:
    history, clip = capstone.run.history, capstone.run.config.optimizer.grad_clip
    label = (
        "Training loss, validation loss with its best, learning rate, gradient norm before clipping"
    )
    panels = curves.training_panels(history, clip)
    picture = Picture("training", label, lambda colours: curves.draw_panels(panels, colours))
    return Section(
        "2. Training curves", pictures=(picture,), links=[("every number", "run/metrics.jsonl")]
    )


def _ablation_section(capstone: Capstone) -> Section:
    title = "3. The effect of each choice"
    if isinstance(capstone.ablation, str):
        return Section(title, [f"Missing: {capstone.ablation}"])
    plan, results = capstone.ablation
    label = (
        "Difference of each variant's final loss from the baseline's at equal tokens, with 95% "
        "intervals"
    )
    picture = Picture(
        "bars", label, lambda colours: ablation_figures.draw_bars(plan, results, colours)
    )
    links = [
        ("report, with a sample of each variant", "ablation/report.html"),
        ("table", "ablation/ablation_table.csv"),
        ("training curves", "ablation/training_curves.png"),
    ]
    paragraphs = [
        ablation_report.lead_paragraph(plan),
        explain_baseline(plan.base.model, capstone.run.config.model, len(plan.variants)),
        *_explain_fewer_variants(plan),
        *ablation_report.findings(plan, results),
    ]
    return Section(title, paragraphs, (), (), (picture,), links)


def _explain_fewer_variants(plan: Plan) -> list[str]:
    """A sentence about an ablation that had no time for all variants, or none."""
    model = plan.base.model
    axes = AblationDesign((model.n_layers, model.d_model, model.n_heads)).axes
    if len(plan.spec.axes) == len(axes):
        return []
    return [
        f"The budget left time for {plural(len(plan.variants), 'variant')} only. With more time, "
        f"the study has more values of {', '.join(axis.partition('=')[0] for axis in axes)}."
    ]


def _explain_smaller_ladder(ladder: Ladder) -> list[str]:
    """A sentence about a scaling study that had no time for the full ladder, or none."""
    full, shape = LADDER_SHAPES[0], ladder.shape
    if shape == full:
        return []
    return [
        f"The budget left time for {shape.n_sizes} sizes at each of {shape.n_levels} budgets of "
        f"compute only, instead of {full.n_sizes} at {full.n_levels}: the intervals are wider."
    ]


def explain_baseline(baseline: ModelConfig, model: ModelConfig, n_variants: int) -> str:
    """Whether the ablation's baseline is the model of section 1, and why not."""
    baseline, model = baseline.resolve(), model.resolve()
    names = [field.name for field in dataclasses.fields(ModelConfig)]
    differing = [name for name in names if getattr(baseline, name) != getattr(model, name)]
    if not differing:
        return "The baseline has the same architecture as the model of section 1."
    listed = ", ".join(
        f"{name} {_format(getattr(baseline, name))} instead of {_format(getattr(model, name))}"
        for name in differing
    )
    return (
        f"The baseline is not the model of section 1: {listed}. The study trains "
        f"{(n_variants + 1) * SEEDS} runs in its share of the budget, so its baseline is the "
        f"largest of {len(BASELINES)} sizes that leaves each run {MIN_STEPS} steps at the measured "
        "speed, or the smallest. A difference may be another one at the size of section 1."
    )


def _format(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _scaling_section(capstone: Capstone) -> Section:
    title = "4. How loss depends on size and data"
    if isinstance(capstone.scaling, str):
        return Section(title, [f"Missing: {capstone.scaling}"])
    analysis = capstone.scaling.analysis
    label = (
        "Losses against compute, the fitted law for each size, its frontier, and the predicted run"
    )
    picture = Picture(
        "scaling", label, lambda colours: fit_figures.draw_scaling_curve(analysis, colours)
    )
    links = [
        ("report", "scaling/report.html"),
        ("runs", "scaling/runs.csv"),
        ("fit", "scaling/fit.json"),
        ("the prediction, written before the run", "scaling/prediction.json"),
    ]
    paragraphs = [
        *_explain_smaller_ladder(capstone.scaling.ladder),
        *fit_report.sentences(analysis),
    ]
    return Section(title, paragraphs, (), (), (picture,), links)


def _answer_section(capstone: Capstone, number: int, answer: Answer) -> Section:
    section = answer.section
    links = [(label, f"run/{path}") for label, path in answer.sources]
    text = list(section.text)
    if answer.question.name == "chinchilla" and isinstance(capstone.scaling, ScalingStudy):
        text.append(_apply_law(capstone.run, capstone.scaling))
        links.append(("the law of this text", "scaling/report.html"))
    return Section(
        f"5.{number} {section.title}", text, section.header, section.rows, section.pictures, links
    )


def _apply_law(run: Run, study: ScalingStudy) -> str:
    """The best size and tokens for the run's compute, by the law of the capstone's own study."""
    bootstrap = study.analysis.bootstrap
    C = training_flops(run.config, study.ladder.vocab_size)
    plan = plan_compute(C, bootstrap)
    assert plan.fitted is not None
    N_interval = format_interval(bootstrap.interval(lambda law: law.N_opt(C), log=True))
    return (
        f"By the law that section 4 fits to this text, the best use of {C:.3g} FLOPs (6 N D, where "
        f"N counts the weights of matrix products) is N = {N_interval} parameters and D = "
        f"{plan.fitted.D:.3g} tokens, {plan.fitted.tokens_per_parameter:.3g} a parameter. "
        f"{plan.warning or ''}"
    )
