"""Where a number comes from: the lines that computed it, their derivation, and a line of Python."""

from __future__ import annotations

import ast
import functools
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from glasslm.engines.inspection import GRADIENT_PREFIX
from glasslm.inference.microscope.recorded_pass import RecordedPass
from glasslm.serve.api_error import ApiError
from glasslm.serve.inside.checkpoints import CheckpointName
from glasslm.serve.inside.measures import find_measure
from glasslm.serve.inside.source_places import Place, find_kind

PACKAGE = Path(__file__).parents[2]


def describe_source(
    recorded: RecordedPass, name: str, at: CheckpointName, t: int | None = None
) -> dict[str, Any]:
    """The JSON of a name's source. Raises ApiError for a name that is not known.

    Gradients are of the loss of the token after position t; without t, of the mean over the text.

    places: functions with their lines, and the indices of those that computed the value; of a model
    that PyTorch computes, its place is first, and the hand-written one after it.
    """
    measure = find_measure(name, t)
    if measure:
        python = python_code(recorded, measure.value, at, measure.imports)
        places = [describe_place(place) for place in measure.places]
        return {"name": name, "places": places, "python": python}
    kind = find_kind(name, recorded.config)
    if kind is None:
        raise ApiError(404, f"there is no source of '{name[:80]}'", param="name", code="not_found")
    is_torch = recorded.model.engine.name == "torch"
    kind_places = [*(kind.torch if is_torch else ()), *kind.numpy]
    return {
        "name": name,
        "places": [describe_place(place) for place in kind_places],
        "derivation": f"docs/backward.md, {kind.derivation}",
        "python": python_of_array(recorded, name, at, t),
    }


def describe_place(place: Place) -> dict[str, Any]:
    """The lines of a function, and the indices of those that begin with the place's markers."""
    is_engine = not place.file.startswith("inference/")
    file = f"engines/{place.file}" if is_engine else place.file
    first, lines = function_lines(file, place.function)
    computed = [i for i, line in enumerate(lines) if line.strip().startswith(place.markers)]
    return {
        "file": file,
        "function": place.function,
        "first_line": first,
        "lines": lines,
        "computed": computed,
    }


@functools.cache
def function_lines(file: str, function: str) -> tuple[int, list[str]]:
    """The number of the first line of a function (from 1), and its lines without indentation."""
    text = (PACKAGE / file).read_text(encoding="utf-8")
    scope: Any = ast.parse(text)
    for word in function.split("."):
        scope = next(node for node in scope.body if getattr(node, "name", None) == word)
    lines = text.splitlines()[scope.lineno - 1 : scope.end_lineno]
    return scope.lineno, [line[scope.col_offset :] for line in lines]


def python_of_array(recorded: RecordedPass, name: str, at: CheckpointName, t: int | None) -> str:
    """Python whose last line is the array of `name`; empty where no text gives these tokens."""
    if name == "nats":
        return python_code(recorded, "model.losses(text)", at)
    if not name.startswith(GRADIENT_PREFIX) or t is None:
        return python_code(recorded, f"model.inspect(text, [{name!r}])[{name!r}]", at)
    row = "" if name.removeprefix(GRADIENT_PREFIX) in recorded.model.parameters else "[0]"
    value = (
        f"targets = np.where(np.arange(len(ids)) == {t}, np.append(ids[1:], -1), -1)\n"
        "batch = Batch(ids[None], targets[None], 0, np.zeros(1, int))\n"
        f"model.engine.inspect(batch, [{name!r}])[{name!r}]{row}"
    )
    return python_code(recorded, value, at, ["from glasslm.engines.protocol import Batch"])


def python_code(
    recorded: RecordedPass, value: str, at: CheckpointName, imports: Sequence[str] = ()
) -> str:
    """Lines of Python that end with `value`, of `model`, `text` and `ids`, its tokens.

    Empty where no text gives these tokens.
    """
    tokenizer = recorded.model.tokenizer
    text = tokenizer.decode(recorded.ids)
    if tokenizer.encode(text).tolist() != recorded.ids.tolist():
        return ""
    lines = [
        "import glasslm, numpy as np",
        *imports,
        f"model = glasslm.load({str(at.source.path)!r}, {at.step})",
    ]
    if re.search(r"\b(text|ids)\b", value):
        lines.append(f"text = {text!r}")
    if re.search(r"\bids\b", value):
        lines.append("ids = model.tokenizer.encode(text)")
    return "\n".join([*lines, value])
