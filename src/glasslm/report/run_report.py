"""A run's report: report.html, report.md and figures/*.png.

report.html is one file that fetches nothing and runs no script but templates/curves.js. Everything
comes from run.json, metrics.jsonl and the checkpoints, so the report can be written again at any
time. Prompts, samples and names are foreign text: `finalize` replaces control characters, and the
templates escape markup.
"""

from __future__ import annotations

import base64
import hashlib
import re
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from glasslm.data.dataset import Dataset, reopen_dataset
from glasslm.errors import DamagedError, DivergedError, GlasslmError, InputError
from glasslm.inference import trained_model
from glasslm.inference.suites.suite_result import read_results
from glasslm.report import (
    curves,
    data_checks,
    figures,
    page,
    report_tables,
    samples,
    text_kinds,
    token_losses,
)
from glasslm.report.curves import Panel
from glasslm.runs.history import best_eval
from glasslm.runs.metrics import Line, sample_lines, warning_lines
from glasslm.runs.protection import require_unaltered
from glasslm.runs.record import text_name
from glasslm.runs.run_folder import Run
from glasslm.text import Notify, escape_control_chars, quote_path, to_one_line
from glasslm.training.outcome import Outcome

if TYPE_CHECKING:
    from jinja2 import Environment

MODEL_BUDGET_S = 5.0  # for samples and surprise
DOMAIN_BUDGET_S = 4.0  # for the measures of Python or of names
SHORT_SHARE = 0.15  # of the time for samples; most models need less
EXCERPT_TOKENS = 600  # of validation text, for the surprise
CHECKPOINT_TEMPERATURE = 0.7
CAPTIONS = {  # of the figures, by the name of their file
    "training.png": "Losses are cross-entropy. The validation plot leaves out the steep start.",
    "forgetting.png": "Bits per byte of the new text and of the old text.",
    "preference.png": "Preference tuning: each step before its update, and what is held out.",
    "experts.png": "Share of the tokens that each expert computes; dashed: an even share.",
}


def write(run_dir: Path, time_share: float = 1.0) -> Path:
    """Write the report into the folder of a run in any state; returns the path of report.html.

    `time_share`, from 0 to 1, shortens what the model generates for it.

    Raises DamagedError when run.json or metrics.jsonl cannot be read or was altered, InputError
    when the folder cannot be written and ExhaustedError when the disk is full.
    """
    run = Run(run_dir)
    require_unaltered(run)
    context = _context(run, time_share)
    lines = list(run.metrics())
    panels = {
        "training.png": curves.training_panels(
            run.history,
            run.config.optimizer.grad_clip,
            report_tables.loss_unit(run.config.preference),
        ),
        "forgetting.png": curves.forgetting_panels(lines),
        "experts.png": curves.expert_panels(lines),
        "preference.png": curves.preference_panels(lines),
    }
    panels = {name: drawn for name, drawn in panels.items() if drawn}
    images = {
        name: figures.png(curves.draw_panels(drawn, figures.PRINT_PALETTE))
        for name, drawn in panels.items()
    }
    context["curve_figures"] = [
        {"name": name, "caption": CAPTIONS[name], **_page_figure(drawn, CAPTIONS[name])}
        for name, drawn in panels.items()
    ]
    markdown = _environment(escape=False).get_template("report.md.j2").render(context)
    html = _environment(escape=True).get_template("report.html.j2").render(context, **_script())
    cure = "copy the run, then report on the copy"
    return page.write_files(run.path, "report", images, markdown, html, cure)


def _page_figure(panels: Sequence[Panel], label: str) -> dict[str, str]:
    """A figure for report.html: the numbers for its script, and the drawing without a script."""
    drawing = curves.draw_panels(panels, figures.CSS_PALETTE)
    return {"json": curves.panels_json(panels), "svg": figures.inline_svg(drawing, label)}


def _script() -> dict[str, Any]:
    """The script of the page, and its hash for the policy that allows no other script."""
    from markupsafe import Markup

    script = (page.TEMPLATES / "curves.js").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return {"script": Markup(script), "script_hash": f"sha256-{digest}"}


def write_after_training(outcome: Outcome, notify: Notify) -> Path | None:
    """Write the report of a run that has just ended; None if there is no report.

    An interrupted run gets none. A report for which --max-time leaves little time is shorter. A
    failure becomes a warning through `notify`: the run itself is complete without its report.
    """
    if outcome.status == "interrupted":
        return None
    command = f"`glasslm report {quote_path(outcome.run_dir)}`"
    model_s = MODEL_BUDGET_S + DOMAIN_BUDGET_S
    time_share = min(1.0, max(0.0, outcome.samples_s / model_s))
    shortened = f", with fewer samples: --max-time is almost over, and {command} makes all of it"
    notify(f"writing the report{shortened if time_share < SHORT_SHARE else ''}")
    try:
        return write(outcome.run_dir, time_share)
    except Exception as error:  # of any kind: a complete run never fails because of its report
        reason = _describe_failure(error)
        notify(f"warning: the report was not written ({reason}); {command} makes it again")
        return None


def _describe_failure(error: Exception) -> str:
    """An error in one line, with its type where it is a bug."""
    text = to_one_line(str(error))
    if isinstance(error, GlasslmError | OSError):
        return text
    return "out of memory" if isinstance(error, MemoryError) else f"{type(error).__name__}: {text}"


def _context(run: Run, time_share: float) -> dict[str, Any]:
    """The variables of the templates."""
    record, lines, history = run.record, list(run.metrics()), run.history
    vocab_size = record["tokenizer"]["vocab_size"]
    best = best_eval(lines, history)
    preset = str(record.get("preset", "tiny"))
    dataset = cached_dataset(run)
    progress = report_tables.select_evenly(sample_lines(lines))
    model_sections = _model_sections(run, lines, dataset, time_share)
    generated = [
        sample.text
        for row in (*model_sections["by_temperature"], model_sections["by_checkpoint"])
        for sample in row
    ]
    return {
        "name": run.path.resolve().name,
        "subject": "imported model"
        if "imported" in record
        else f"{preset} on {text_name(run.config.data)}",
        "created": record.get("created", ""),
        "status": history.status or "not ended",
        "ending": "The model was imported, not trained."
        if "imported" in record
        else report_tables.ENDINGS.get(history.status, ""),
        "tiles": report_tables.headline_tiles(best, lines, vocab_size),
        "best_eval": report_tables.describe_best_eval(best, run.config.data.predicts_answers),
        "evaluations": report_tables.evaluation_rows(lines, best),
        "progress": progress,
        "warnings": warning_lines(lines),
        "reference": report_tables.reference_preset(preset),
        "configuration": report_tables.configuration_parts(run.config, preset),
        "parameters": report_tables.parameter_rows(run.config.model, vocab_size),
        "files": record.get("data", {}).get("files", []),
        "data": report_tables.data_rows(record),
        "origin": report_tables.origin_rows(record),
        "char_level": record["tokenizer"].get("kind") == "char",
        "commands": report_tables.next_commands(str(run.path), history.status),
        "checks": data_checks.check_data(
            dataset, [line["text"] for line in progress] + generated, best
        ),
        "marks": page.MARKS,
        **model_sections,
    }


def cached_dataset(run: Run) -> Dataset | None:
    """The tokens of the run's text if they are in the cache; a report does not prepare them."""
    try:
        return reopen_dataset(run.config.data, run.record.get("data", {}).get("sha256", ""))
    except (DamagedError, InputError):  # the cache folder cannot be made
        return None


def _model_sections(
    run: Run, lines: list[Line], dataset: Dataset | None, time_share: float
) -> dict[str, Any]:
    """The sections that need the weights, or the reason why they are missing."""
    deadline = time.monotonic() + time_share * MODEL_BUDGET_S
    sections: dict[str, Any] = {
        "by_temperature": [],
        "by_checkpoint": [],
        "pieces": [],
        "domain": None,
        "suites": read_results(run.path),
    }
    if run.config.data.chat is not None:  # samples would lack the special tokens of its template
        sections["no_model"] = f"talk to the model with `glasslm chat {quote_path(run.path)}`."
        return sections
    try:
        model = trained_model.load_model(run.path)
        excerpt: NDArray[Any] = (
            dataset.val.tokens[:EXCERPT_TOKENS] if dataset else np.zeros(0, np.int64)
        )
        pieces = token_losses.measure_surprise(model, excerpt, deadline) if len(excerpt) else []
        half_share = token_losses.half_surprise_share(pieces)
        sections |= {"step": model.step, "pieces": pieces, "half_share": half_share}
        text = model.tokenizer.decode(excerpt) if len(excerpt) else ""
        prompts = samples.choose_prompts(lines, text)
        sections["by_temperature"] = samples.sample_temperatures(model, prompts, deadline)
        sections["by_checkpoint"] = samples.sample_checkpoints(
            run.path, prompts[0], CHECKPOINT_TEMPERATURE, deadline
        )
        sections["domain"] = text_kinds.measure_domain(
            run, dataset, model, time_share * DOMAIN_BUDGET_S
        )
    except (DamagedError, DivergedError, InputError) as error:
        sections["no_model"] = str(error)
    return sections


def _environment(escape: bool) -> Environment:
    from markupsafe import Markup

    environment = page.environment(escape)
    environment.filters |= {
        "fence": fence_text,
        "heat": heat_level,
        "visible": quote_visible,
        "svg": Markup,
    }
    return environment


def heat_level(nats: float) -> int:
    """Surprise in eight steps of 0.75 nats, from 0 (expected) to 7 (probability below 0.5%)."""
    return min(7, int(nats / 0.75))


def quote_visible(text: str) -> str:
    """A short text in quotes, with visible signs for spaces and line breaks."""
    return (
        "\u201c"
        + escape_control_chars(text).replace("\n", "\u21b5").replace(" ", "\u2423")
        + "\u201d"
    )


def fence_text(text: Any) -> str:
    """Foreign text as a code block of Markdown.

    The fence is longer than any run of backticks in the text.
    """
    clean = escape_control_chars(str(text))
    fence = "`" * max(3, 1 + max((len(run) for run in re.findall("`+", clean)), default=0))
    return f"{fence}text\n{clean}\n{fence}"
