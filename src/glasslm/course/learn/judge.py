"""The decision procedure: from what a function does with the cases to one verdict.

Forward comes before backward, and a changed input before a wrong gradient, which it may cause.
Cases whose sizes all differ come first; only where they cannot run, cases of equal sizes. When all
results are right, large values, types and zeros are tried (robustness.py).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from glasslm.course.learn.comparison import is_numeric
from glasslm.course.learn.exercise import Exercise, VerdictName
from glasslm.course.learn.explanation import ROUNDED, explain, explain_combined
from glasslm.course.learn.hypotheses import Results
from glasslm.course.learn.influence import find_wrong_influence
from glasslm.course.learn.observation import Stage, are_same
from glasslm.course.learn.robustness import judge_dtypes, judge_large_values, judge_zeros
from glasslm.course.learn.trial import Names, Trial
from glasslm.course.learn.verdict import Verdict


def judge(function: Callable[..., Any], exercise: Exercise, seed: int) -> Verdict:
    """The verdict on a function that can be called as the exercise does."""
    with np.errstate(all="ignore"):  # wrong results may be infinite
        trial = Trial(function, exercise, seed)
        if verdict := _judge_repetition(trial):
            return verdict
        for stage, names in trial.stages:
            if names and (verdict := _judge_stage(trial, stage, names)):
                # A small error of ordinary values may be a large one of large values.
                is_rounding = verdict.sentence.endswith(ROUNDED)
                return (is_rounding and judge_large_values(trial)) or verdict
        return (
            _judge_repetition(trial)
            or _judge_more_axes(trial)
            or judge_large_values(trial)
            or judge_dtypes(trial)
            or judge_zeros(trial)
            or trial.right_verdict()
        )


def _judge_repetition(trial: Trial) -> Verdict | None:
    """The verdict on a function that returns other results when it is called again."""
    first, again = trial.observations[0], trial.observe(trial.distinct[0])
    for name, result in first.results.items():
        if name in again.results and not are_same(result, again.results[name]):
            sentence = f"{name} differs when the function is called again with the same inputs"
            return trial.verdict("other", sentence, trial.stage_of(name), name)
    return None


def _judge_stage(trial: Trial, stage: Stage, names: Names) -> Verdict | None:
    """The verdict on the outputs, or on the gradients; None if they are right."""
    trouble = next((o.trouble for o in trial.observations if o.trouble), None)
    if trouble and trouble.stage != stage:
        trouble = None
    changed = next((o.changed for o in trial.observations if o.changed), "")
    wrong = trial.wrong_names(trial.distinct, trial.observations, names)
    is_last = names == trial.stages[-1][1] or not trial.exercise.has_backward
    if trouble and trouble.verdict == "not_implemented" and not wrong:
        return trial.verdict("not_implemented", trouble.sentence, stage)
    if is_last and changed and (stage == "backward" or not wrong):
        return trial.changed_verdict(changed)
    if not trouble and not wrong:
        return None
    if verdict := _explained_verdict(trial, stage, names):
        return verdict
    if changed:
        return trial.changed_verdict(changed)
    if trouble:
        also: list[VerdictName] = ["exception"] if trouble.verdict == "shape" else []
        return trial.verdict(trouble.verdict, trouble.sentence, stage, also=also)
    return _unexplained_verdict(trial, stage, wrong[0])


def _explained_verdict(trial: Trial, stage: Stage, names: Names) -> Verdict | None:
    """The mistake that predicts the results, of different sizes or, where these fail, equal."""
    if verdict := _coarse_type_verdict(trial, stage, names):
        return verdict
    for cases in (trial.distinct, trial.equal):
        observations = [trial.observe(case) for case in cases]
        if not all(set(names) & set(o.results) for o in observations):
            continue
        wrong = trial.wrong_names(cases, observations, names)
        findings = explain(trial.exercise, wrong, cases, observations)
        if findings:
            return trial.found_verdict(findings, trial.small + cases)
    return None


def _coarse_type_verdict(trial: Trial, stage: Stage, names: Names) -> Verdict | None:
    """The verdict on whole numbers, or on float16, where float64 is wanted."""
    if any(observation.trouble for observation in trial.observations):
        return None
    for case, observation in zip(trial.distinct, trial.observations):
        reference = trial.exercise.compute(case)
        for name in names:
            right, actual = np.asarray(reference.total(name)), observation.results.get(name)
            is_whole = isinstance(actual, np.ndarray) and actual.dtype.kind in "iub"
            if right.dtype.kind == "f" and is_whole:
                return trial.verdict("dtype", f"{name} is an array of whole numbers", stage, name)
            if isinstance(actual, np.ndarray) and actual.dtype == np.float16:
                sentence = f"float64 goes in, and {name} comes out as float16"
                return trial.verdict("dtype", sentence, stage, name)
    return None


def _unexplained_verdict(trial: Trial, stage: Stage, name: str) -> Verdict:
    """The verdict on a wrong result that no mistake predicts."""
    example = trial.example(name, trial.small + trial.distinct)
    references = [trial.exercise.compute(case) for case in trial.distinct]
    actual: list[Any] = [observation.results.get(name) for observation in trial.observations]
    for reference, result in zip(references, actual):
        right = reference.total(name)
        if isinstance(right, np.ndarray) and _shape(result) != right.shape:
            sentence = f"{name} has the shape {_shape(result)}; expected {right.shape}"
            return trial.verdict("shape", sentence, stage, name, example=example)
    influence = find_wrong_influence(trial.function, trial.exercise, name, trial.distinct[0])
    if influence:
        verb = "moves" if influence.moves else "does not move"
        sentence = f"{name} of token {influence.token} {verb} with token {influence.other} of "
        sentence += influence.source
        kind: VerdictName = "mask" if trial.exercise.mixes_tokens else "axis"
        return trial.verdict(kind, sentence, stage, name, example=example)
    results = Results(name, references, actual, name in trial.exercise.outputs)
    findings = list(explain_combined(trial.exercise, results, trial.distinct))
    if findings:
        return trial.found_verdict(findings, trial.small + trial.distinct)
    sentence = f"{name} is wrong, and no known mistake predicts its numbers"
    return trial.verdict("other", sentence, stage, name, example=example)


def _shape(value: Any) -> tuple[int, ...] | str:
    """The shape of an array of numbers; for anything else what it is."""
    if isinstance(value, np.ndarray):
        return value.shape if is_numeric(value) else f"of an array of {value.dtype}"
    return f"of {type(value).__name__}"


def _judge_more_axes(trial: Trial) -> Verdict | None:
    """Cases with other numbers of axes; only a mistake with a name counts."""
    exercise = trial.exercise
    if not exercise.more_axes:
        return None
    cases = exercise.draw_cases(exercise.more_axes, trial.seed, start=3)
    observations = [trial.observe(case) for case in cases]
    all_cases, all_observations = trial.distinct + cases, trial.observations + observations
    for _, names in trial.stages:
        if trial.wrong_names(cases, observations, names):
            findings = explain(exercise, names, all_cases, all_observations, with_general=False)
            if findings:
                return trial.found_verdict(findings, cases)
    return None
