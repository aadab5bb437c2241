"""Greedy text beyond the context: the same with a cache, without one, and by both engines."""

import dataclasses
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from both_engines import SINGLE, V, make_pair  # noqa: E402 - need PyTorch

from glasslm.config.schema import ModelConfig  # noqa: E402
from glasslm.data.tokenizers import CharTokenizer  # noqa: E402
from glasslm.inference.generation import generate  # noqa: E402
from glasslm.inference.sampling import Sampling  # noqa: E402
from glasslm.inference.stream import visible_length  # noqa: E402
from glasslm.lab.checks.gradient_check import small_model  # noqa: E402

BLOCK = small_model().block_size
LETTERS = CharTokenizer("abcdefg")
PROMPTS = ["b", "cage", "fadedbeefcafe"]  # shorter than the context, and longer
LENGTH = 2 * BLOCK + 3
LEARNED_WINDOW = [  # positions that end at the context: the cache does not roll
    (f"{position}, window 3", dataclasses.replace(small_model(), position=position, window=3))
    for position in ("learned", "sinusoidal")
]


def generate_uncached(engine: Any, prompt: str, model: ModelConfig) -> str:
    """Greedy text without a cache: each token from a pass over the visible tokens before it."""
    ids = LETTERS.encode(prompt).tolist()
    for _ in range(LENGTH):
        length = len(ids) if model.has_rolling_cache else visible_length(len(ids), model.block_size)
        visible_ids = ids[len(ids) - length :]
        candidates = np.full((V, len(visible_ids)), -1)
        candidates[:, -1] = np.arange(V)
        ids.append(int(engine.losses(np.tile(visible_ids, (V, 1)), candidates)[:, -1].argmin()))
    return LETTERS.decode(ids[len(prompt) :])


@pytest.mark.parametrize(("name", "model"), [*SINGLE, *LEARNED_WINDOW])
def test_greedy_text_is_the_same_token_for_token(name: str, model: ModelConfig) -> None:
    """With and without a cache, in both engines, of one prompt and several, past the context."""
    engines = make_pair(model, "fp64")
    expected = [generate_uncached(engines[0], prompt, model) for prompt in PROMPTS]
    settings: Any = {"model_config": model, "max_new_tokens": LENGTH}
    for engine in engines:
        for prompts in (PROMPTS, *([prompt] for prompt in PROMPTS)):
            texts = dict.fromkeys(range(len(prompts)), "")
            for piece in generate(
                engine, LETTERS, prompts, sampling=Sampling(temperature=0.0), **settings
            ):
                texts[piece.prompt] += piece.text
            assert list(texts.values()) == [expected[PROMPTS.index(prompt)] for prompt in prompts]
