"""Where numbers come from that are computed from activations: head scores, and one SGD step.

Names: "head_scores/text/KIND" and "head_scores/repeated/KIND" (K, L, H), of which KIND chooses the
lines that are marked; "step/LR" (T,): the surprise after a step.
"""

from __future__ import annotations

import re
from typing import NamedTuple

from glasslm.inference.head_scores import SCORE_NAMES
from glasslm.serve.inside.source_places import Place

SCORES, STEP = "inference/head_scores.py", "inference/microscope/sgd_step.py"
RECORD = "from glasslm.inference.microscope.recorded_pass import RecordedPass"
ATTENTION = "from glasslm.inference.microscope.attention import induction_probe, score_heads"
STEPS = "from glasslm.inference.microscope.sgd_step import make_step_engine, take_step"


class Measure(NamedTuple):
    """The functions that compute a number, and the lines of Python that repeat it."""

    places: list[Place]
    imports: list[str]
    value: str  # of `model` and `ids`, the tokens of the text


def find_measure(name: str, t: int | None) -> Measure | None:
    """The measure of this name, a step on the token after t; None for an activation."""
    kinds = "|".join(SCORE_NAMES)
    if match := re.fullmatch(rf"head_scores/(text|repeated)/({kinds})", name):
        tokens = "ids" if match[1] == "text" else "induction_probe(model)"
        places = [
            Place(SCORES, "_key_masks", (f'"{match[2]}":',)),
            Place(SCORES, "_mean_weight", ("on_keys = ", "total: ", "return total /")),
        ]
        return Measure(places, [ATTENTION, RECORD], f"score_heads(RecordedPass(model, {tokens}))")
    if t is None or not (match := re.fullmatch(r"step/(\d[\d.e-]{0,20})", name)):
        return None
    places = [Place(STEP, "take_step", ("engine.accumulate(", "update = engine.update("))]
    weights = "{n: w for n, w in model.engine.state() if n in model.parameters}"
    value = (
        f"take_step(RecordedPass(model, ids), {t}, {match[1]}, make_step_engine(model), "
        f"{weights}).after"
    )
    return Measure(places, [RECORD, STEPS], value)
