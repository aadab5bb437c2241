"""A study is read from its folder again: `glasslm report` and a notebook train nothing."""

from pathlib import Path

import pytest

from glasslm import cli
from glasslm.errors import InputError
from glasslm.lab.studies import sweep
from glasslm.lab.studies.stored_study import open_study
from html_pages import Page
from small_runs import train_trial, write_text

SIZES = "--d-model 16 --n-heads 2 --n-layers 1 --block-size 16 --batch-size 4"
WORDS = f"{SIZES} --max-steps 4 --seeds 1 --axes depth=2".split()


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("study")
    text = write_text(folder / "text.txt")
    words = ["ablate", "--text-file", str(text), "--out", str(folder / "study"), *WORDS]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sweep, "run_in_subprocess", train_trial)
        assert cli.main(words) == 0
    return folder / "study"


def test_the_report_is_written_again_without_training(
    study: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sweep, "run_in_subprocess", lambda *arguments: pytest.fail("it trains"))
    written = {name: (study / name).read_bytes() for name in ("report.md", "ablation_table.csv")}
    for name in written:
        (study / name).unlink()
    assert cli.main(["report", str(study)]) == 0
    assert capsys.readouterr().out.strip() == str(study / "ablation_report.html")
    assert {name: (study / name).read_bytes() for name in written} == written


@pytest.mark.usefixtures("no_figures")
def test_a_notebook_shows_the_study(study: Path) -> None:
    stored = open_study(study)
    parsed = Page(stored._repr_html_())
    assert parsed.tags[0] == ("div", {"class": "glasslm"})
    assert "Ablation of depth" in parsed.text
    assert "depth 2" in parsed.text
    assert stored.lead in parsed.text


def test_operations_are_refused_for_the_report_of_a_study(
    study: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["report", str(study), "--ops", "own.py"]) == 2
    assert "leave it out with a study" in capsys.readouterr().err


def test_what_is_no_study_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"there is no plan\.json"):
        open_study(tmp_path)
