"""The answer about positions: the effect of reversed contexts, with positions and without.

B contexts, n tokens of a context, V vocabulary.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from glasslm.config.schema import ComputeConfig, ModelConfig
from glasslm.course.capstone.questions import Answer, Question
from glasslm.course.capstone.run_context import CONFIGURATION, ExcerptActivations, RunContext
from glasslm.engines.factory import make_engine
from glasslm.engines.protocol import Engine
from glasslm.inference.sampling import Sampling, probabilities
from glasslm.runs import checkpoint
from glasslm.text import plural

Array = NDArray[Any]
Ids = NDArray[np.int64]

MAX_CONTEXTS, MAX_CONTEXT_TOKENS = 16, 32

ENCODINGS = {
    "none": "This model was trained without an encoding of positions.",
    "sinusoidal": "This model adds sinusoids to the embeddings (arXiv:1706.03762, section 3.5).",
    "learned": "This model adds a learned vector for each position to the embedding.",
    "rope": "This model rotates queries and keys by their positions, so that their product depends "
    "on the distance (arXiv:2104.09864).",
    "alibi": "This model lowers each score in proportion to the distance, with a slope for each "
    "head (arXiv:2108.12409).",
}


class ReversalEffect(NamedTuple):
    """The change of the next token's prediction if the tokens before the last one are reversed."""

    logit_change: float  # root mean square, relative to the standard deviation of the logits
    changed_guesses: int  # contexts with another likeliest next token
    total_variation: float  # mean distance of the two distributions


def explain_positions(question: Question, context: RunContext) -> Answer:
    """The information in the mask alone, and the part that positions have in this model."""
    c = context.config
    text = (
        "Nothing within one layer: a sum over keys and values does not depend on their order, so "
        "the last token would know which tokens came before it, but not where. The causal mask "
        "gives information about order from the second layer on: each earlier token has attended "
        "only to those before it, so its values depend on its position (arXiv:2203.16634).",
        ENCODINGS[c.position],
    )
    answer = Answer(question, text, sources=(CONFIGURATION,))
    if context.activations is None or context.dataset is None:
        return answer.with_reason(context.missing)
    n = min(MAX_CONTEXT_TOKENS, c.block_size, c.window or MAX_CONTEXT_TOKENS)
    tokens = np.asarray(context.dataset.val.tokens[: MAX_CONTEXTS * n], np.int64)
    contexts = tokens[: len(tokens) // n * n].reshape(-1, n)
    if n < 3 or not len(contexts):
        return answer.with_reason("Its context is too short to reorder earlier tokens.")
    return _add_measurements(answer, context, context.activations, contexts)


def _add_measurements(
    answer: Answer, context: RunContext, activations: ExcerptActivations, contexts: Ids
) -> Answer:
    c, (B, n) = context.config, contexts.shape
    effect = measure_reversal(activations.model.engine, contexts)
    rows = [
        (
            "reversed: change of the logits, relative to their deviation",
            f"{effect.logit_change:.2g}",
        ),
        ("reversed: contexts with another likeliest token", f"{effect.changed_guesses} of {B}"),
        ("reversed: total variation of the probabilities", f"{effect.total_variation:.2g}"),
        (
            "loss on the original text, nats per token",
            f"{mean_loss(activations.model.engine, contexts):.4f}",
        ),
    ]
    paragraph = (
        f"Measured on {plural(B, 'piece')} of {n} tokens of the validation text: if the first "
        f"{n - 1} tokens are reversed and the last one stays, the logits after it change by "
        f"{effect.logit_change:.2g} of their deviation"
    )
    if c.position == "none":
        paragraph += (
            ", which is rounding: its one layer cannot see order."
            if c.n_layers == 1
            else f", by way of the mask alone, through {c.n_layers} layers."
        )
        return answer.with_measurement(
            paragraph, context.model_files, ("measured", "this model"), rows
        )
    engine = engine_without_positions(context, activations)
    bare, bare_loss = measure_reversal(engine, contexts), mean_loss(engine, contexts)
    reason = (
        "rounding: one layer cannot see order without positions"
        if c.n_layers == 1
        else "the effect of the mask alone"
    )
    paragraph += (
        f". With the same weights and positions switched off, they change by "
        f"{bare.logit_change:.2g} ({reason}), and the loss on the original text changes from "
        f"{rows[3][1]} to {bare_loss:.4f}. A model that is trained without positions has a lower "
        "loss than that: `glasslm ablate --axes position` measures it."
    )
    bare_cells = (
        f"{bare.logit_change:.2g}",
        f"{bare.changed_guesses} of {B}",
        f"{bare.total_variation:.2g}",
        f"{bare_loss:.4f}",
    )
    both = [(*row, cell) for row, cell in zip(rows, bare_cells)]
    header = ("measured", "with positions", "positions switched off")
    return answer.with_measurement(paragraph, context.model_files, header, both)


def measure_reversal(engine: Engine, contexts: Ids) -> ReversalEffect:
    """The effect of reversing all tokens but the last in contexts (B, n), with n of 3 or more."""
    reversed_contexts = np.concatenate([contexts[:, -2::-1], contexts[:, -1:]], 1)
    before, after = (_last_logits(engine, tokens) for tokens in (contexts, reversed_contexts))
    deviation = float(before.std()) or 1.0
    unmodified = Sampling(temperature=1.0)
    p, q = probabilities(before, unmodified), probabilities(after, unmodified)
    return ReversalEffect(
        logit_change=float(np.sqrt(np.square(after - before).mean())) / deviation,
        changed_guesses=int((before.argmax(-1) != after.argmax(-1)).sum()),
        total_variation=float(np.abs(p - q).sum(-1).mean() / 2),
    )


def _last_logits(engine: Engine, tokens: Ids) -> Array:
    """The logits (B, V) after the last of the tokens (B, n)."""
    B, n = tokens.shape
    return np.asarray(engine.logits(tokens, engine.new_cache(B, n), np.full(B, n)), np.float64)


def mean_loss(engine: Engine, contexts: Ids) -> float:
    """Mean loss in nats of all tokens of the contexts (B, n) except the first."""
    return float(engine.losses(contexts[:, :-1], contexts[:, 1:]).mean(dtype=np.float64))


def engine_without_positions(context: RunContext, activations: ExcerptActivations) -> Engine:
    """The same weights in a model without an encoding of positions."""
    config = context.run.config.resolve()
    model: ModelConfig = dataclasses.replace(
        config.model, position="none", rope_scaling="none", rope_factor=1.0
    )
    engine = make_engine(
        dataclasses.replace(config, model=model), context.vocab_size, ComputeConfig(engine="numpy")
    )
    weights = checkpoint.load(context.run.path, activations.model.step).weights()
    engine.load((name, array) for name, array in weights.items() if name != "position.weight")
    return engine
