"""The answer about positions: what this model makes of a text turned round, with its positions and without them."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from glasslm.config.schema import ComputeConfig, ModelConfig
from glasslm.course.capstone.questions import Answer, Question, plural
from glasslm.course.capstone.run_context import CONFIGURATION, Look, Specimen
from glasslm.engines.factory import make_engine
from glasslm.engines.protocol import Engine
from glasslm.inference.sampling import Sampling, probabilities
from glasslm.runs import checkpoint

Array = NDArray[Any]
Ids = NDArray[np.int64]

TEXTS, LONGEST = 16, 32  # contexts that are turned round, and their tokens

TELLS = {
    "none": "Nothing does here: it was trained without positions.",
    "sinusoidal": "Here sinusoids are added to the embeddings (arXiv:1706.03762, section 3.5).",
    "learned": "Here a learned vector for each place is added to the embedding.",
    "rope": "Here queries and keys are turned by their places, so that their product knows the distance "
    "(arXiv:2104.09864).",
    "alibi": "Here each score is lowered by the distance, with a slope for each head (arXiv:2108.12409).",
}


class Turned(NamedTuple):
    """What becomes of the logits after the last token when those before it stand in reverse order."""

    moved: float  # root mean square of the change, as a share of the logits' deviation
    guesses: int  # contexts whose likeliest next token is another one
    variation: float  # total variation distance of the two distributions, mean


def positions(question: Question, of: Specimen) -> Answer:
    """What the mask alone tells, and how much of this model's knowledge is in its positions."""
    c = of.config
    text = (
        "Nothing within one layer: a sum over keys and values is the same in any order, so that the last token would "
        "see which tokens came before it, and not where. The causal mask tells after all, from the second layer on: "
        "each earlier token has itself seen only those before it, so what it offers depends on its place "
        "(arXiv:2203.16634).",
        TELLS[c.position],
    )
    answer = Answer(question, text, sources=(CONFIGURATION,))
    if of.look is None or of.dataset is None:
        return answer.without(of.missing)
    n = min(LONGEST, c.block_size, c.window or LONGEST)
    held = np.asarray(of.dataset.val.tokens[: TEXTS * n], np.int64)
    contexts = held[: len(held) // n * n].reshape(-1, n)
    if n < 3 or not len(contexts):
        return answer.without("Its context is too short for earlier tokens to change places.")
    return _measured(answer, of, of.look, contexts)


def _measured(answer: Answer, of: Specimen, look: Look, contexts: Ids) -> Answer:
    c, (count, n) = of.config, contexts.shape
    as_is = turned(look.model.engine, contexts)
    of_many = f"of {count}"
    rows = [
        ("turned round, the logits move by, as a share of their deviation", f"{as_is.moved:.2g}"),
        ("turned round, another likeliest next token", f"{as_is.guesses} {of_many}"),
        ("turned round, distance of the probabilities (total variation)", f"{as_is.variation:.2g}"),
        ("loss on the text as it is, nats a token", f"{loss(look.model.engine, contexts):.4f}"),
    ]
    told = (
        f"Measured on {plural(count, 'piece')} of {n} tokens of the validation text: with the first {n - 1} in reverse "
        f"order and the last one in its place, the logits after it move by {as_is.moved:.2g} of their deviation"
    )
    if c.position == "none":
        told += (
            ", which is rounding: its one layer cannot see order." if c.n_layers == 1
            else f", all of it by way of the mask, through {c.n_layers} layers."
        )  # fmt: skip
        return _with(answer, of, told, ("measured", "this model"), rows)
    engine = without_positions(of, look)
    bare, worse = turned(engine, contexts), loss(engine, contexts)
    told += (
        f". With the same weights and its positions switched off, that is {bare.moved:.2g}"
        + (
            ", which is rounding: one layer cannot see order without them"
            if c.n_layers == 1
            else ", by the mask alone"
        )
        + f", and the loss on the text as it is goes from {rows[3][1]} to {worse:.4f}. A model that is trained without "
        "positions would do better than that: `glasslm ablate --axes position` says by how much."
    )
    others = (
        f"{bare.moved:.2g}",
        f"{bare.guesses} {of_many}",
        f"{bare.variation:.2g}",
        f"{worse:.4f}",
    )
    both = [(*row, other) for row, other in zip(rows, others)]
    return _with(answer, of, told, ("measured", "as it is", "positions switched off"), both)


def _with(
    answer: Answer,
    of: Specimen,
    told: str,
    header: tuple[str, ...],
    rows: Sequence[tuple[str, ...]],
) -> Answer:
    sources = (*answer.sources, *of.model_files)
    return dataclasses.replace(
        answer, text=(*answer.text, told), header=header, rows=tuple(rows), sources=sources
    )


def turned(engine: Engine, contexts: Ids) -> Turned:
    """contexts (B, n), 3 tokens or more: all but the last of each in reverse order."""
    backwards = np.concatenate([contexts[:, -2::-1], contexts[:, -1:]], 1)
    before, after = (_last_logits(engine, text) for text in (contexts, backwards))
    deviation = float(before.std()) or 1.0
    plain = Sampling(temperature=1.0)
    p, q = probabilities(before, plain), probabilities(after, plain)
    return Turned(
        moved=float(np.sqrt(np.square(after - before).mean())) / deviation,
        guesses=int((before.argmax(-1) != after.argmax(-1)).sum()),
        variation=float(np.abs(p - q).sum(-1).mean() / 2),
    )


def _last_logits(engine: Engine, tokens: Ids) -> Array:
    """(B, V) after the last of the tokens (B, n)."""
    B, n = tokens.shape
    return np.asarray(engine.logits(tokens, engine.new_cache(B, n), np.full(B, n)), np.float64)


def loss(engine: Engine, contexts: Ids) -> float:
    """Mean nats of every token of the contexts (B, n) but the first."""
    return float(engine.losses(contexts[:, :-1], contexts[:, 1:]).mean(dtype=np.float64))


def without_positions(of: Specimen, look: Look) -> Engine:
    """The same weights in a model that is told no positions."""
    config = of.run.config.resolved()
    model: ModelConfig = dataclasses.replace(
        config.model, position="none", rope_scaling="none", rope_factor=1.0
    )
    engine = make_engine(
        dataclasses.replace(config, model=model), of.vocab_size, ComputeConfig(engine="numpy")
    )
    weights = checkpoint.load(of.run.path, look.model.step).weights()
    engine.load((name, array) for name, array in weights.items() if name != "position.weight")
    return engine
