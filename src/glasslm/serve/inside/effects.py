"""Views that change something and compute again: ablation, patches, gradients, a step, learning.

The model that is served, and the files of its run, do not change. Letters as in views.py.
"""

from __future__ import annotations

import numpy as np

from glasslm.errors import InputError
from glasslm.inference.head_scores import SCORE_NAMES
from glasslm.inference.microscope import ablation, gradients, learning, patching
from glasslm.inference.microscope.sgd_step import take_step
from glasslm.serve.api_error import ApiError
from glasslm.serve.inside.subject import Arrays, Facts, Subject, View, f4, i4

MAX_LR = 1e3


def ablate(subject: Subject) -> tuple[Arrays, Facts]:
    """The candidates after t without each head and each sublayer."""
    t = subject.position()
    candidates = subject.candidates(t)
    result = ablation.ablate_each(subject.recorded, t, candidates, subject.check)
    arrays = {
        "ids": i4(candidates),
        "before": f4(result.before),
        "logprobs": f4(result.logprobs),
    }
    return arrays, {"parts": result.parts}


def switch_off_parts(subject: Subject) -> tuple[Arrays, Facts]:
    """The surprise of every token with some parts off together, and the candidates after t."""
    t = subject.position()
    parts = subject.query.words("parts")
    candidates = subject.candidates(t)
    after, logprobs = ablation.nats_without(subject.recorded, parts)
    before, before_logprobs = ablation.nats_without(subject.recorded, [])
    arrays = {
        "nats_before": f4(before),
        "nats_after": f4(after),
        "ids": i4(candidates),
        "before": f4(before_logprobs[t, candidates]),
        "after": f4(logprobs[t, candidates]),
    }
    return arrays, {"parts": parts}


def neurons(subject: Subject) -> tuple[Arrays, Facts]:
    """The neurons of a layer that push `candidate` above `rival` most, after t."""
    pair = np.array([subject.token("candidate"), subject.token("rival")])
    result = ablation.strongest_neurons(
        subject.recorded, subject.loaded.weights, subject.position(), subject.layer(), pair
    )
    arrays = {
        "neurons": i4(result.ids),
        "activations": f4(result.activations),
        "shares": f4(result.shares),
    }
    return arrays, {}


def patch(subject: Subject) -> tuple[Arrays, Facts]:
    """The candidates after t where a position's stream at a place is that of another text.

    Positions `first` to `last`, so that long texts come in portions; a position that the other text
    does not have is left out.
    """
    t, query = subject.position(), subject.query
    places = patching.patch_places(subject.recorded.config)
    place = places[query.integer("place", 0, len(places) - 1)]
    first = query.integer("first", 0, t, default=0)
    last = query.integer("last", first, t, default=t)
    other = subject.find_other(query.text("other"))
    positions = range(first, min(last + 1, other.length))
    candidates = subject.candidates(t)
    result = patching.patch_stream(
        subject.recorded, other, t, place, positions, candidates, subject.check
    )
    arrays = {
        "positions": i4(result.positions),
        "ids": i4(candidates),
        "before": f4(result.before),
        "logprobs": f4(result.logprobs),
    }
    return arrays, {"place": place, "places": places}


def backward(subject: Subject) -> tuple[Arrays, Facts]:
    """The norms of the gradient of the loss of the token after t."""
    result = gradients.gradient_norms(subject.recorded, subject.position())
    arrays = {"stream": f4(result.stream), "weights": f4(result.weights)}
    facts: Facts = {"places": result.places, "names": result.names, "total": result.total}
    if subject.recorded.config.n_experts:
        joined = gradients.join_experts(result.names, result.weights)
        arrays["joined"], facts["joined"] = f4(list(joined.values())), list(joined)
    return arrays, facts


def step(subject: Subject) -> tuple[Arrays, Facts]:
    """The surprise of every token before and after one step of SGD on the token after t."""
    t, loaded = subject.position(), subject.loaded
    lr = subject.query.number("lr", 0, MAX_LR, 0.1)
    if lr == 0:
        raise ApiError(400, "lr is 0: expected a rate above 0", param="lr", code="invalid_value")
    if t + 1 >= subject.recorded.length:
        raise InputError("the text ends here: there is no token to take a step on")
    effect = take_step(subject.recorded, t, lr, loaded.step_engine, loaded.weights)
    arrays = {"nats_before": f4(effect.before), "nats_after": f4(effect.after)}
    return arrays, {"lr": lr, "norm": effect.norm}


def learning_progress(subject: Subject) -> tuple[Arrays, Facts]:
    """The best head of each kind, and the loss by position of windows of the validation text."""
    best = learning.best_heads(subject.loaded.repeated_scores[1])
    arrays = {
        "scores": f4(best.scores),
        "layers": i4(best.layers),
        "heads": i4(best.heads),
    }
    facts: Facts = {"kinds": list(SCORE_NAMES)}
    try:
        tokens = learning.probe_tokens(subject.run.dataset().val)
    except (InputError, OSError) as error:
        facts["probe_reason"] = str(error)
    else:
        losses = learning.loss_by_position(subject.loaded.model, tokens)
        arrays |= {"probe_nats": f4(losses), "probe_smooth": f4(learning.smooth(losses))}
    return arrays, facts


EFFECTS: dict[str, View] = {
    "ablate": ablate,
    "off": switch_off_parts,
    "neurons": neurons,
    "patch": patch,
    "backward": backward,
    "step": step,
    "learning": learning_progress,
}
