"""The suite "induction": does the model use what it has read a moment ago?

Random tokens are written twice. The first time they cannot be predicted; the second time a model
with induction heads predicts them from the first (Olsson et al., arXiv:2209.11895).
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from glasslm.data.dataset import Dataset
from glasslm.engines.protocol import Batch
from glasslm.errors import InputError
from glasslm.inference.head_scores import SCORE_NAMES, ScoreName, head_scores
from glasslm.inference.suites.random_texts import known_tokens, repeated_tokens
from glasslm.inference.suites.suite_result import SuiteResult
from glasslm.inference.trained_model import Model

MAX_LENGTH = 64  # random tokens before they repeat
MIN_LENGTH = 4
LOSS_ROWS, ATTENTION_ROWS = 64, 8
SEED = 42


def measure_induction(model: Model, dataset: Dataset) -> SuiteResult:
    """Losses of random tokens at both occurrences, and the heads with the largest scores.

    Raises InputError for a context or a vocabulary that is too small.
    """
    length = min(MAX_LENGTH, model.config.model.block_size // 2)
    if length < MIN_LENGTH:
        raise InputError(
            f"--suite induction needs a context of {2 * MIN_LENGTH} tokens or more, and this run "
            f"has {model.config.model.block_size}: give --context, or use another run"
        )
    known = known_tokens(dataset)
    tokens = repeated_tokens(known, length, LOSS_ROWS, SEED)
    losses = np.asarray(model.engine.losses(tokens[:, :-1], tokens[:, 1:]), np.float64)
    # The first token of the repetition cannot be known: nothing says that it begins.
    first, second = losses[:, : length - 1], losses[:, length:]
    gain, error = _mean_and_error(first.mean(1) - second.mean(1))
    scores = measure_heads(model, tokens[:ATTENTION_ROWS])
    rows = [
        ("loss, first time", f"{first.mean():.4f} nats per token", f"ln {len(known)} = "
         f"{math.log(len(known)):.4f} by chance"),
        ("loss, second time", f"{second.mean():.4f} nats per token", "0 if copied"),
        ("gain", f"{gain:.4f} nats (standard error {error:.4f})", "0 without induction"),
    ]  # fmt: skip
    best = {name: _best_head(scores[name]) for name in SCORE_NAMES}
    rows += [
        (
            f"best head, {name.replace('_', ' ')}",
            f"layer {layer}, head {head}: {score:.3f}",
            "0 to 1",
        )
        for name, (layer, head, score) in best.items()
    ]
    facts: dict[str, Any] = {
        "length": length,
        "rows": LOSS_ROWS,
        "first_loss": first.mean(),
        "second_loss": second.mean(),
        "gain": gain,
        "gain_stderr": error,
        "scores": {name: scores[name].round(6) for name in SCORE_NAMES},
        "best_heads": {
            name: {"layer": layer, "head": head, "score": score}
            for name, (layer, head, score) in best.items()
        },
    }
    return SuiteResult(
        "induction",
        "Does the model use what it has just read?",
        f"{LOSS_ROWS} texts of {length} random tokens, each written twice. Without induction both "
        "losses are equal. Scores are mean attention weights on the previous token, the first "
        "token, earlier copies of the token, and the token after an earlier copy (induction).",
        ("measure", "model", "reference"),
        tuple(rows),
        model.step,
        facts=facts,
    )


def measure_heads(model: Model, tokens: NDArray[np.int64]) -> dict[ScoreName, NDArray[np.float64]]:
    """The scores (layers, H) of all heads that read tokens (B, T)."""
    names = [f"blocks.{i}.attention.weights" for i in range(model.config.model.n_layers)]
    batch = Batch(tokens, np.roll(tokens, -1, axis=1), 0, np.arange(len(tokens)))
    weights = model.engine.inspect(batch, names)
    by_layer = [head_scores(weights[name], tokens) for name in names]
    return {name: np.stack([scores[name] for scores in by_layer]) for name in SCORE_NAMES}


def _best_head(scores: NDArray[np.float64]) -> tuple[int, int, float]:
    """Layer, head and score of the largest of (layers, H)."""
    layer, head = np.unravel_index(int(np.nanargmax(scores)), scores.shape)
    return int(layer), int(head), float(scores[layer, head])


def _mean_and_error(values: NDArray[np.float64]) -> tuple[float, float]:
    """The mean of (n,) and its standard error."""
    return float(values.mean()), float(values.std(ddof=1) / math.sqrt(len(values)))
