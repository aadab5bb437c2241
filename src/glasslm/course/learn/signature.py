"""Whether a function can be called as its exercise does, and if not, why."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from glasslm.course.learn.exercise import Exercise
from glasslm.course.learn.observation import ALLOCATOR
from glasslm.course.learn.verdict import Verdict, failed_verdict

Parameter = inspect.Parameter


def judge_signature(exercise: Exercise, function: Callable[..., Any]) -> Verdict | None:
    """The verdict on a function that cannot be called as the exercise does; None if it can."""
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # a built-in without a signature
        return None
    if exercise.call is not None and inspect.isclass(function):
        return None
    line = getattr(getattr(function, "__code__", None), "co_firstlineno", None)
    where = f"line {line}: " if line else ""
    if inspect.isgeneratorfunction(function) or inspect.iscoroutinefunction(function):
        sentence = f"{where}{exercise.name} has `yield` or `async`: expected a plain function"
        return failed_verdict(exercise, sentence)
    case = exercise.draw_cases(exercise.sizes.small[:1], 0)[0]
    required = [name for name in case.options if name not in exercise.optional_names()]
    wanted = list(case.inputs)
    given = f"{where}the signature is {exercise.name}{signature}; expected {exercise.signature}"
    names = list(signature.parameters)[: len(wanted)]
    if names != wanted and sorted(names) == sorted(wanted):
        sentence = f"{given}: the arguments are in another order"
        return replace(failed_verdict(exercise, sentence), verdict="other")
    names = [*case.options, ALLOCATOR]
    options = {n: None for n in names if n in required or n in signature.parameters}
    try:
        signature.bind(*wanted, **options)
    except TypeError as error:
        reason = _explain_mismatch(signature.parameters, wanted, required) or str(error)
        return failed_verdict(exercise, f"{given}: {reason}")
    return None


def _explain_mismatch(
    parameters: Mapping[str, Parameter], wanted: list[str], required: list[str]
) -> str:
    """Why the arguments do not fit, in words; "" if no simple reason is found."""
    missing = [name for name in wanted + required if name not in parameters]
    keyword_only = [
        name for name in wanted if name in parameters and _is_keyword_only(parameters[name])
    ]
    extra = [
        parameter.name
        for parameter in parameters.values()
        if parameter.default is Parameter.empty
        and parameter.kind not in (Parameter.VAR_POSITIONAL, Parameter.VAR_KEYWORD)
        and parameter.name not in [*wanted, *required, ALLOCATOR]
    ]
    if keyword_only:
        return f"{', '.join(keyword_only)} must not be keyword-only: move the *"
    verb = "is" if len(missing) == 1 else "are"
    reasons = [f"{', '.join(missing)} {verb} missing"] if missing else []
    reasons += [f"{', '.join(extra)} has no default and is not given"] if extra else []
    return " and ".join(reasons)


def _is_keyword_only(parameter: Parameter) -> bool:
    return parameter.kind is Parameter.KEYWORD_ONLY
