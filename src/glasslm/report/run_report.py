"""A run's report: report.html (one file, no scripts, nothing fetched), report.md and figures/*.png.

Everything in it comes from run.json, metrics.jsonl and the checkpoints; it can be made again at any time. Prompts,
samples and names are foreign text: made harmless by `finalize`, escaped by the templates.
"""

from __future__ import annotations

import re
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from glasslm import files
from glasslm.data import shards
from glasslm.errors import GlasslmError, InputError
from glasslm.inference import trained_model
from glasslm.report import data_checks, domains, facts, figures, page, samples, surprise
from glasslm.runs.history import best_eval
from glasslm.runs.record import text_name
from glasslm.runs.run_folder import Run
from glasslm.text import Say, harmless, quoted
from glasslm.training.launch import Outcome

if TYPE_CHECKING:
    from jinja2 import Environment

MODEL_S = 5.0  # seconds that the model may take for samples and surprise
DOMAIN_S = 4.0  # and for what is measured of its Python, or of its names
FURTHER = (  # figures of runs that have what they show
    (
        "forgetting.png",
        "What was learnt of the new text and forgotten of the old one",
        figures.forgetting,
    ),
    (
        "experts.png",
        "The share of the tokens that each expert got; dashed: an even share",
        figures.experts,
    ),
)
EXCERPT = 600  # tokens of unseen text


def write(run_dir: Path) -> Path:
    """Write the report of a run, whatever state it is in, into its folder; returns the path of report.html.

    Raises DamagedError when run.json or metrics.jsonl cannot be read, InputError when nothing can be written there and
    ExhaustedError when the disk is full.
    """
    run = Run(run_dir)
    context = _context(run)
    history, clip = run.history, run.config.optimizer.grad_clip
    images = {"training.png": figures.png(figures.training(history, clip, figures.ON_WHITE))}
    svg = figures.inline_svg(
        figures.training(history, clip, figures.VARIABLES), "Loss, learning rate, gradient norm"
    )
    further = []
    lines = list(run.metrics())
    for name, label, draw in FURTHER:
        if on_white := draw(lines, figures.ON_WHITE):
            images[name] = figures.png(on_white)
            in_variables = draw(lines, figures.VARIABLES)
            assert in_variables is not None
            further.append(
                {"name": name, "label": label, "svg": figures.inline_svg(in_variables, label)}
            )
    context["further"] = further
    markdown = _environment(escape=False).get_template("report.md.j2").render(context)
    html = (
        _environment(escape=True).get_template("report.html.j2").render(context, training_svg=svg)
    )
    try:
        files.make_folder(run.path / "figures")
        for name, image in images.items():
            files.write_atomic(run.path / "figures" / name, image)
        files.write_atomic(run.path / "report.md", markdown.encode())
        files.write_atomic(run.path / "report.html", html.encode())
    except GlasslmError:  # a full disk: some of ours are OSErrors as well
        raise
    except OSError as error:
        raise InputError(
            f"{run.path} cannot be written ({error.strerror}): copy the run and report on that"
        ) from error
    return run.path / "report.html"


def write_after_training(outcome: Outcome, say: Say) -> Path | None:
    """Write the report of a run that has just ended; None for an interrupted run, or where it cannot be written.

    A failure becomes a warning through `say`: the run itself is complete without its report.
    """
    if outcome.status == "interrupted":
        return None
    try:
        return write(outcome.run_dir)
    except (OSError, GlasslmError, MemoryError) as error:
        reason = error or "out of memory"
        say(
            f"warning: the report was not written ({reason}); `glasslm report {quoted(outcome.run_dir)}` makes it again"
        )
        return None


def _context(run: Run) -> dict[str, Any]:
    """What the templates show."""
    record, lines, history = run.record, list(run.metrics()), run.history
    vocab_size = record["tokenizer"]["vocab_size"]
    best = best_eval(lines, history)
    preset = str(record.get("preset", "tiny"))
    dataset = dataset_of(run)
    progress = facts.spaced([line for line in lines if line["kind"] == "sample"])
    of_model = _from_model(run, lines, dataset)
    written = [
        sample.text
        for row in (*of_model["by_temperature"], of_model["by_checkpoint"])
        for sample in row
    ]
    return {
        "name": run.path.resolve().name,
        "preset": preset,
        "corpus": "no text of its own" if "imported" in run.record else text_name(run.config.data),
        "created": record.get("created", ""),
        "status": history.status or "not ended",
        "ending": facts.ENDINGS.get(history.status, ""),
        "tiles": facts.headline(best, lines, vocab_size),
        "measured_on": facts.measured_on(best),
        "evaluations": facts.evaluations(lines, best),
        "progress": progress,
        "warnings": [line for line in lines if line["kind"] == "warning"],
        "compared": facts.compared_with(preset),
        "configuration": facts.configuration(run.config, preset),
        "parameters": facts.parameter_parts(run.config.model, vocab_size),
        "files": record.get("data", {}).get("files", []),
        "data": facts.data(record),
        "origin": facts.origin(record),
        "char_level": record["tokenizer"].get("kind") == "char",
        "commands": facts.commands(str(run.path), history.status),
        "honesty": data_checks.examine(
            dataset, [line["text"] for line in progress] + written, best
        ),
        "marks": page.MARKS,
        **of_model,
    }


def dataset_of(run: Run) -> shards.Dataset | None:
    """The tokens of the run's text, if the cache has them; nothing is made again for a report."""
    try:
        return shards.reopen(run.record.get("data", {}).get("sha256", ""))
    except GlasslmError:  # there cannot even be a cache
        return None


def _from_model(
    run: Run, lines: list[dict[str, Any]], dataset: shards.Dataset | None
) -> dict[str, Any]:
    """What only the weights can tell; without a usable checkpoint the reason why it is missing."""
    deadline = time.monotonic() + MODEL_S
    shown: dict[str, Any] = {
        "by_temperature": [],
        "by_checkpoint": [],
        "pieces": [],
        "domain": None,
    }
    try:
        model = trained_model.load(run.path)
        unseen: NDArray[Any] = dataset.val.tokens[:EXCERPT] if dataset else np.zeros(0, np.int64)
        pieces = surprise.read(model, unseen, deadline) if len(unseen) else []
        shown |= {"step": model.step, "pieces": pieces, "half_share": surprise.half_share(pieces)}
        prompts = samples.choose_prompts(
            lines, model.tokenizer.decode(unseen) if len(unseen) else ""
        )
        shown["by_temperature"] = samples.by_temperature(model, prompts, deadline)
        shown["by_checkpoint"] = samples.by_checkpoint(run.path, prompts[0], 0.7, deadline)
        shown["domain"] = domains.examine(run, dataset, model, DOMAIN_S)
    except GlasslmError as error:
        shown["no_model"] = str(error)
    return shown


def _environment(escape: bool) -> Environment:
    from markupsafe import Markup

    made = page.environment(escape)
    made.filters |= {"fence": fenced, "heat": heat, "shown": shown, "svg": Markup}
    return made


def heat(nats: float) -> int:
    """Surprise in eight steps of 0.75 nats, from 0 (expected) to 7 (probability below 0.5%)."""
    return min(7, int(nats / 0.75))


def shown(text: str) -> str:
    """A short text in quotes, with its spaces and line breaks to be seen."""
    return "\u201c" + harmless(text).replace("\n", "\u21b5").replace(" ", "\u2423") + "\u201d"


def fenced(text: Any) -> str:
    """Foreign text as a code block, with a fence longer than any run of backticks in it."""
    clean = harmless(str(text))
    fence = "`" * max(3, 1 + max((len(run) for run in re.findall("`+", clean)), default=0))
    return f"{fence}text\n{clean}\n{fence}"
