"""Checks of a function whose ordinary results are right: large values, types, zeros."""

from __future__ import annotations

import numpy as np

from glasslm.course.learn.comparison import TOLERANCES, wrong_results
from glasslm.course.learn.exercise import Case, CaseRandom
from glasslm.course.learn.observation import Observation
from glasslm.course.learn.trial import Trial
from glasslm.course.learn.verdict import Verdict

MAX_LARGE_ERROR = 2e-2  # relative to the terms, for large values: only a useless result is wrong
DTYPE_SLACK = 10.0


def judge_large_values(trial: Trial) -> Verdict | None:
    """Values at which an unstable formula overflows or cancels, in both types."""
    exercise, sizes = trial.exercise, trial.exercise.sizes
    if exercise.call is not None or not _has_float_inputs(trial):
        return None
    names = exercise.outputs + exercise.gradients
    for dtype in ("float32", "float64"):
        *small, case = (
            exercise.draw(CaseRandom((trial.seed, 4)), dict(size), 0, True).cast(dtype)
            for size in (*sizes.small, sizes.distinct[0])
        )
        observation = trial.observe(case)
        wrong = wrong_results(exercise, case, observation, names, MAX_LARGE_ERROR)
        if wrong:
            sentence = f"{wrong[0]} is wrong or not finite for large values in {dtype}"
            example = trial.example(wrong[0], [*small, case], MAX_LARGE_ERROR)
            stage = trial.stage_of(wrong[0])
            return trial.verdict("unstable", sentence, stage, wrong[0], example=example)
        if trouble := observation.trouble:
            sentence = f"{trouble.sentence}, for large values in {dtype}"
            return trial.verdict("unstable", sentence, trouble.stage)
    return None


def judge_dtypes(trial: Trial) -> Verdict | None:
    """Results in the type of the inputs, and right in it."""
    exercise = trial.exercise
    if not _has_float_inputs(trial):
        return None
    for dtype in ("float32", "float64") if exercise.keeps_dtype else ("float64",):
        for case in (case.cast(dtype) for case in trial.distinct):
            observation = trial.observe(case)
            if exercise.call is None and (verdict := _other_dtype(trial, observation, dtype)):
                return verdict
            names = exercise.outputs + exercise.gradients
            wrong = wrong_results(
                exercise, case, observation, names, DTYPE_SLACK * TOLERANCES[dtype]
            )
            if wrong:
                sentence = f"{wrong[0]} is wrong in {dtype}"
                return trial.verdict("dtype", sentence, trial.stage_of(wrong[0]), wrong[0])
            if trouble := observation.trouble:
                return trial.verdict("dtype", f"{trouble.sentence}, in {dtype}", trouble.stage)
    return None


def _other_dtype(trial: Trial, observation: Observation, dtype: str) -> Verdict | None:
    """The verdict on a result whose type is not that of the inputs."""
    for name, result in observation.results.items():
        is_float_array = isinstance(result, np.ndarray) and result.dtype.kind == "f"
        if is_float_array and result.ndim and result.dtype != dtype:  # a number may be a float
            sentence = f"{dtype} goes in, and {name} comes out as {result.dtype}"
            return trial.verdict("dtype", sentence, trial.stage_of(name), name)
    return None


def judge_zeros(trial: Trial) -> Verdict | None:
    """Inputs of zeros must not give NaN."""
    if not trial.exercise.zero_inputs:
        return None
    case = trial.distinct[0]
    zeros = {name: case.inputs[name] * 0 for name in trial.exercise.zero_inputs}
    zero_case = Case(case.sizes, case.inputs | zeros, case.options, case.dy)
    observation = trial.observe(zero_case)
    trouble = observation.trouble
    if trouble and trouble.verdict != "not_implemented":  # zeros may leave a weight as it is
        sentence = f"{trouble.sentence}, where {', '.join(zeros)} is zero"
        return trial.verdict("unstable", sentence, trouble.stage)
    for name, result in observation.results.items():
        if isinstance(result, np.ndarray) and not np.isfinite(result).all():
            sentence = f"{name} is not finite where {', '.join(zeros)} is zero"
            return trial.verdict("unstable", sentence, trial.stage_of(name), name)
    return None


def _has_float_inputs(trial: Trial) -> bool:
    values = trial.distinct[0].inputs.values()
    return any(isinstance(value, np.ndarray) and value.dtype.kind == "f" for value in values)
