"""index.html of a capstone: what there is to hand in, on one page, with the files behind each number."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from glasslm.course.capstone import quiz
from glasslm.course.capstone.capstone import SEEDS, Ablation, Capstone
from glasslm.course.capstone.questions import Answer
from glasslm.lab.scaling import fit_report
from glasslm.lab.scaling.fit_report import ranged
from glasslm.lab.scaling.plan import plan
from glasslm.lab.studies import ablation_report
from glasslm.lab.studies.ladder import compute_of
from glasslm.lab.studies.scaling_study import Study
from glasslm.report import figures, page
from glasslm.report.facts import commands
from glasslm.report.page import Picture, Section
from glasslm.runs.history import best_eval
from glasslm.runs.metrics import Line
from glasslm.runs.record import text_name
from glasslm.runs.run_folder import Run
from glasslm.text import duration, one_line

SAMPLE = 600  # characters of the last sample


def write(of: Capstone, answers: Sequence[Answer]) -> Path:
    """index.html and index.md, with what a quiz kept, if there was one. Returns the path of the page."""
    lines = list(of.run.metrics())
    marks = quiz.marked(quiz.given(of.folder), answers)
    sections = [
        _deliverables(of), _checkpoint(of, lines), _curves(of), _ablation(of), _scaling(of),
        *([quiz.section(marks)] if marks else []), *(_answer(of, i, answer) for i, answer in enumerate(answers, 1)),
    ]  # fmt: skip
    title = f"Capstone: a language model of {text_name(of.run.config.data)}"
    return page.write(of.folder, "index", title, _lead(of, lines), sections)


def _lead(of: Capstone, lines: list[Line]) -> str:
    record = of.run.record
    best = best_eval(lines, of.run.history) or {}
    loss = (
        f"{best['loss']:.4f} nats a token, {best['bpb']:.3f} bits a byte"
        if best
        else "not measured"
    )
    ended = ", though training diverged" if of.run.history.status == "diverged" else ""
    return (
        f"{record['parameters']['total']:,} parameters trained from nothing; validation loss {loss}{ended}. Made in "
        f"{duration(of.spent_s)} of the {duration(of.budget_s)} that it was given, by `{of.command}` (glasslm "
        f"{record['glasslm']}, {record['engine']}, {record['created'][:10]})."
    )


def _deliverables(of: Capstone) -> Section:
    ablated, scaled = (
        f"missing: {part}" if isinstance(part, str) else "" for part in (of.ablation, of.scaling)
    )
    links = [("the run's report", "run/report.html")]
    if isinstance(of.ablation, Ablation):
        ablated = (
            f"{len(of.ablation.plan.variants)} variants, {SEEDS} seeds each: ablation/report.html"
        )
        links += [
            ("the ablation", "ablation/report.html"),
            ("its table", "ablation/ablation_table.csv"),
        ]
    if isinstance(of.scaling, Study):
        scaled = f"{len(of.scaling.cells)} runs and a prediction: scaling/report.html"
        links += [("the scaling study", "scaling/report.html"), ("its runs", "scaling/runs.csv")]
        links += [("its fit", "scaling/fit.json")]
    rows = [
        ("1. a trained checkpoint", f"{_name(of, 'best')}, by `glasslm generate {of.run.path}`"),
        (
            "2. training curves",
            "loss, learning rate and gradient norm over all steps; run/report.html has more",
        ),
        ("3. an ablation report", ablated),
        ("4. a scaling analysis", scaled),
        ("5. the checkpoint questions", "answered below, with this run's own numbers"),
    ]
    return Section("What is handed in", (), ("", ""), rows, (), links)


def _name(of: Capstone, which: str) -> str:
    step = of.run.history.best_step
    return f"checkpoints/{step:06d} ({which})" if step is not None else "checkpoints/"


def _checkpoint(of: Capstone, lines: list[Line]) -> Section:
    best = best_eval(lines, of.run.history) or {}
    model, record = of.run.config.model, of.run.record
    samples = [line for line in lines if line["kind"] == "sample"]
    rows = [
        ("model", f"{model.n_layers} layers, width {model.d_model}, {model.n_heads} heads, context {model.block_size}"),
        ("parameters", f"{record['parameters']['total']:,}"),
        ("training text", f"{record['data']['train_tokens']:,} tokens"),
        ("validation text", f"{record['data']['val_tokens']:,} tokens"),
        ("steps", f"{of.run.config.train.max_steps:,}"),
    ]  # fmt: skip
    if best:
        rows += [
            ("validation loss", f"{best['loss']:.4f} nats a token at step {best['step']:,}, perplexity "
             f"{best['perplexity']:.3f}, {best['bpb']:.3f} bits a byte, over the whole split"),
        ]  # fmt: skip
    rows += commands(str(of.run.path), of.run.history.status)[:3]
    text = [f"It writes: {one_line(samples[-1]['text'])[:SAMPLE]}"] if samples else []
    links = [
        ("run.json", "run/run.json"),
        ("metrics.jsonl", "run/metrics.jsonl"),
        ("report", "run/report.html"),
    ]
    return Section("1. The checkpoint", text, ("", ""), rows, (), links)


def _curves(of: Capstone) -> Section:
    history, clip = of.run.history, of.run.config.optimizer.grad_clip
    label = (
        "Training loss, validation loss with its best, learning rate, gradient norm before clipping"
    )
    picture = Picture("training", label, lambda colours: figures.training(history, clip, colours))
    return Section(
        "2. Training curves", pictures=(picture,), links=[("every number", "run/metrics.jsonl")]
    )


def _ablation(of: Capstone) -> Section:
    title = "3. What each choice is worth"
    if isinstance(of.ablation, str):
        return Section(title, [f"It is missing: {of.ablation}"])
    plan, results = of.ablation
    label = "Difference of each variant's final loss from the baseline's, equal tokens, with 95% intervals"
    picture = Picture("bars", label, lambda colours: ablation_report.bars(plan, results, colours))
    links = [("report, with a sample of each", "ablation/report.html"), ("table", "ablation/ablation_table.csv"),
             ("training curves", "ablation/training_curves.png")]  # fmt: skip
    said = [ablation_report.lead(plan), *ablation_report.findings(plan, results)]
    return Section(title, said, (), (), (picture,), links)


def _scaling(of: Capstone) -> Section:
    title = "4. How loss depends on size and data"
    if isinstance(of.scaling, str):
        return Section(title, [f"It is missing: {of.scaling}"])
    found = of.scaling.found
    label = "Losses against compute, the fitted law for each size, its frontier, and the run that was predicted"
    picture = Picture("scaling", label, lambda colours: fit_report.curve(found, colours))
    links = [("report", "scaling/report.html"), ("runs", "scaling/runs.csv"), ("fit", "scaling/fit.json"),
             ("the prediction, as it was written before", "scaling/prediction.json")]  # fmt: skip
    return Section(title, fit_report.sentences(found), (), (), (picture,), links)


def _answer(of: Capstone, number: int, answer: Answer) -> Section:
    section = answer.section
    links = [(label, f"run/{path}") for label, path in answer.sources]
    text = list(section.text)
    if answer.question.name == "chinchilla" and isinstance(of.scaling, Study):
        text.append(_by_law(of.run, of.scaling))
        links.append(("this text's own law", "scaling/report.html"))
    return Section(
        f"5.{number} {section.title}", text, section.header, section.rows, section.pictures, links
    )


def _by_law(run: Run, study: Study) -> str:
    """What the capstone's own scaling study says to the compute of its run."""
    boot = study.found.boot
    C = compute_of(run.config, study.ladder.vocab_size)
    made = plan(C, boot)
    assert made.fitted is not None
    return (
        f"By the law that section 4 fitted to this text, {C:.3g} FLOPs (6 N D, N without what multiplies nothing) are "
        f"best spent on N = {ranged(boot.interval(lambda law: law.N_opt(C), log=True))} parameters and D = "
        f"{made.fitted.D:.3g} tokens, {made.fitted.tokens_per_parameter:.3g} a parameter. {made.banner or ''}"
    )
