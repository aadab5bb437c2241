"""A study that is read from its folder: its report is written again, and a notebook shows it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from glasslm.errors import InputError
from glasslm.lab.scaling import fit_report
from glasslm.lab.studies import ablation, ablation_report, scaling_report, scaling_study
from glasslm.lab.studies.study_plan import PLAN_FILE, read_plan
from glasslm.report import notebook
from glasslm.report.page import Section


@dataclass(frozen=True)
class StoredStudy:
    """An ablation or a study of scaling with its results. A notebook shows it as its report."""

    folder: Path
    title: str
    lead: str
    sections: Sequence[Section]
    write: Callable[[], Path]  # the report, into the folder; returns the path of the page

    def _repr_html_(self) -> str:
        return notebook.format_sections(self.title, self.lead, self.sections)


def is_study(folder: Path) -> bool:
    """Whether the folder holds an ablation or a study of scaling."""
    return (folder / PLAN_FILE).is_file()


def open_study(folder: str | Path) -> StoredStudy:
    """The study in `folder`, which must have ended; nothing is trained.

    Raises InputError where there is none, DamagedError where its plan cannot be read.
    """
    folder = Path(folder)
    saved = read_plan(folder)
    if saved is None:
        raise InputError(f"{folder} holds no study: there is no {PLAN_FILE} in it")
    if "variants" in saved:
        plan, results = ablation.read(folder)
        return StoredStudy(
            folder,
            ablation_report.title(plan),
            ablation_report.lead_paragraph(plan),
            ablation_report.sections(plan, results),
            lambda: ablation_report.write(folder, plan, results),
        )
    study = scaling_study.read_study(folder)
    return StoredStudy(
        folder,
        scaling_report.title(study),
        "",
        [*fit_report.sections(study.analysis), *scaling_report.further_sections(study)],
        lambda: scaling_report.write(folder, study),
    )
