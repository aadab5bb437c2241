"""Where a number comes from: the lines that computed it, their derivation, and a line of Python."""

from __future__ import annotations

import ast
import functools
from pathlib import Path
from typing import Any

from glasslm.engines.inspection import GRADIENT_PREFIX
from glasslm.inference.microscope.recorded_pass import RecordedPass
from glasslm.serve.api_error import ApiError
from glasslm.serve.inside.checkpoints import CheckpointName
from glasslm.serve.inside.source_places import Place, find_kind

ENGINES = Path(__file__).parents[2] / "engines"


def describe_source(
    recorded: RecordedPass, name: str, at: CheckpointName, t: int | None = None
) -> dict[str, Any]:
    """The JSON of a name's source. Raises ApiError for a name that is not known.

    Gradients are of the loss of the token after position t; without t, of the mean over the text.

    places: functions with their lines, and the indices of those that computed the value; of a model
    that PyTorch computes, its place is first, and the hand-written one after it.
    """
    kind = find_kind(name, recorded.config)
    if kind is None:
        raise ApiError(404, f"there is no source of '{name[:80]}'", param="name", code="not_found")
    is_torch = recorded.model.engine.name == "torch"
    places = [*(kind.torch if is_torch else ()), *kind.numpy]
    return {
        "name": name,
        "places": [describe_place(place) for place in places],
        "derivation": f"docs/backward.md, {kind.derivation}",
        "python": python_code(recorded, name, at, t),
    }


def describe_place(place: Place) -> dict[str, Any]:
    """The lines of a function, and the indices of those that begin with the place's markers."""
    first, lines = function_lines(place.file, place.function)
    computed = [i for i, line in enumerate(lines) if line.strip().startswith(place.markers)]
    return {
        "file": f"engines/{place.file}",
        "function": place.function,
        "first_line": first,
        "lines": lines,
        "computed": computed,
    }


@functools.cache
def function_lines(file: str, function: str) -> tuple[int, list[str]]:
    """The number of the first line of a function (from 1), and its lines without indentation."""
    text = (ENGINES / file).read_text(encoding="utf-8")
    scope: Any = ast.parse(text)
    for word in function.split("."):
        scope = next(node for node in scope.body if getattr(node, "name", None) == word)
    lines = text.splitlines()[scope.lineno - 1 : scope.end_lineno]
    return scope.lineno, [line[scope.col_offset :] for line in lines]


def python_code(recorded: RecordedPass, name: str, at: CheckpointName, t: int | None) -> str:
    """Python whose last value is the array of `name`; empty where no text gives these tokens."""
    tokenizer = recorded.model.tokenizer
    text = tokenizer.decode(recorded.ids)
    if tokenizer.encode(text).tolist() != recorded.ids.tolist():
        return ""
    load = f"glasslm.load({str(at.source.path)!r}, {at.step})"
    if name == "nats":
        return f"{load}.losses({text!r})"
    if not name.startswith(GRADIENT_PREFIX) or t is None:
        return f"{load}.inspect({text!r}, [{name!r}])[{name!r}]"
    row = "" if name.removeprefix(GRADIENT_PREFIX) in recorded.model.parameters else "[0]"
    return (
        "import glasslm, numpy as np\n"
        "from glasslm.engines.protocol import Batch\n"
        f"model = {load}\n"
        f"ids = model.tokenizer.encode({text!r})\n"
        f"targets = np.where(np.arange(len(ids)) == {t}, np.append(ids[1:], -1), -1)\n"
        "batch = Batch(ids[None], targets[None], 0, np.zeros(1, int))\n"
        f"model.engine.inspect(batch, [{name!r}])[{name!r}]{row}"
    )
