"""HTML for notebooks: a run with its curves, and sections of a page, inside a cell's output."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from glasslm.report import curves, page, report_tables
from glasslm.report.page import Picture, Section
from glasslm.runs.history import best_eval
from glasslm.runs.metrics import sample_lines
from glasslm.runs.run_folder import Run
from glasslm.text import escape_control_chars

MAX_SAMPLE_CHARS = 600


class DisplayedRun(Run):
    """A run that a notebook shows as its numbers, curves and latest sample."""

    def _repr_html_(self) -> str:
        return format_run(self)


def format_run(run: Run) -> str:
    """The headline numbers, the curves and the latest sample of a run, as HTML for a notebook."""
    lines, history = list(run.metrics()), run.history
    vocab_size = run.record["tokenizer"]["vocab_size"]
    tiles = report_tables.headline_tiles(best_eval(lines, history), lines, vocab_size)
    panels = curves.training_panels(history, run.config.optimizer.grad_clip)
    label = "Training loss, validation loss, learning rate and gradient norm"
    picture = Picture("training", label, lambda colours: curves.draw_panels(panels, colours))
    samples = sample_lines(lines)
    latest = samples[-1]["prompt"] + samples[-1]["text"] if samples else ""
    sections = [Section("Curves", pictures=[picture])]
    if latest:
        sample = escape_control_chars(latest[:MAX_SAMPLE_CHARS])
        sections.append(Section(f"Sample of step {samples[-1]['step']:,}", [sample]))
    rows = [(str(label), str(value), str(note)) for label, value, note in tiles]
    lead = f"{run.path}: {history.status or 'not ended'}"
    return format_sections("Run", lead, [Section("Result", rows=rows), *sections])


def format_sections(title: str, lead: str, sections: Sequence[Section]) -> str:
    """The sections as HTML that changes nothing else in the notebook: its style has a scope."""
    context: dict[str, Any] = {"title": title, "lead": lead, "sections": sections}
    css = (page.TEMPLATES / "style.css").read_text(encoding="utf-8").replace(":root", ":scope")
    html = page.render_sections(context)
    return f'<div class="glasslm"><style>@scope (.glasslm) {{\n{css}\n}}</style>\n{html}</div>'
