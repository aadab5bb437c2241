"""What a notebook shows of a run and of a diagnosis."""

from pathlib import Path

import pytest

from glasslm.lab.diagnosis.diagnose import Diagnosis
from glasslm.report.findings import Finding
from glasslm.report.notebook import DisplayedRun
from html_pages import Page

HOSTILE = "</style><script>alert(1)</script>\x1b[31m"


def check_fragment(html: str) -> Page:
    """A fragment is well nested, has no script, and styles nothing outside of itself."""
    parsed = Page(html)
    assert parsed.tags[0] == ("div", {"class": "glasslm"})
    assert not {"script", "html", "body", "link", "img"} & {tag for tag, _ in parsed.tags}
    assert html.count("<style>") == html.count("<style>@scope (.glasslm) {") >= 1
    assert ":root" not in html
    return parsed


def test_a_run_shows_its_numbers_curves_and_sample() -> None:
    run = DisplayedRun(Path(__file__).parents[1] / "fixtures" / "old_run")
    parsed = check_fragment(run._repr_html_())
    assert "svg" in {tag for tag, _ in parsed.tags}
    assert f"{run.history.best_val_loss:.4f}" in parsed.text
    assert "Sample of step" in parsed.text


@pytest.mark.usefixtures("no_figures")
def test_a_diagnosis_shows_its_findings_as_text() -> None:
    finding = Finding(HOSTILE, "bad", "3.2 of 3.3", "run `glasslm diagnose RUN`")
    diagnosis = Diagnosis(HOSTILE, [finding])
    html = diagnosis._repr_html_()
    parsed = check_fragment(html)
    assert "script" not in {tag for tag, _ in parsed.tags}
    assert "alert(1)" in parsed.text
    assert "1 bad, 0 to watch, 0 ok" in parsed.text
