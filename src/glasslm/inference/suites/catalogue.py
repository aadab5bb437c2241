"""The suites by name."""

from __future__ import annotations

from collections.abc import Callable

from glasslm.data.dataset import Dataset
from glasslm.inference.suites.copying import measure_copying
from glasslm.inference.suites.dialogues import measure_dialogues
from glasslm.inference.suites.grammar import measure_grammar
from glasslm.inference.suites.induction import measure_induction
from glasslm.inference.suites.suite_result import SuiteName, SuiteResult
from glasslm.inference.trained_model import Model

SUITES: dict[SuiteName, Callable[[Model, Dataset], SuiteResult]] = {
    "grammar": measure_grammar,
    "induction": measure_induction,
    "copying": measure_copying,
    "dialogues": measure_dialogues,
}
