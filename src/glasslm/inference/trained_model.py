"""A trained model, ready to use: `load(run)` gives a Model that writes, scores and shows its logits.

model = glasslm.load("runs/shakespeare-tiny")
print(model.generate("ROMEO:", temperature=0.8))
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Annotated, Any, Literal

import numpy as np
import tyro
from numpy.typing import NDArray

from glasslm.config.conversion import from_dict, to_dict
from glasslm.config.schema import (
    ComputeConfig,
    DeviceName,
    EngineName,
    ModelConfig,
    Precision,
    RunConfig,
)
from glasslm.data.tokenizers import Tokenizer
from glasslm.engines.factory import make_engine
from glasslm.engines.protocol import Engine
from glasslm.errors import InputError
from glasslm.inference import evaluation, generation
from glasslm.inference.json_grammar import JsonGrammar
from glasslm.inference.sampling import Sampling
from glasslm.runs import checkpoint as checkpoints
from glasslm.runs import run_folder

GrammarName = Literal["json"]
Stretch = Literal["linear", "ntk"]
ROWS = 32  # windows handed to the engine at once when text is scored; it cuts them further


@dataclass(frozen=True)
class ContextConfig:
    """How much text a trained model reads at once."""

    context: Annotated[int | None, tyro.conf.arg(metavar="N")] = None
    """Context in tokens, instead of that of training; learned positions have no other."""
    rope_scaling: Annotated[Stretch | None, tyro.conf.arg(metavar="linear|ntk")] = None
    """Stretch rope to the longer --context: linear (arXiv:2306.15595), or ntk, which spares the high frequencies."""

    def of(self, model: ModelConfig) -> ModelConfig:
        """`model` with this context; InputError where its positions do not allow it."""
        if self.rope_scaling is not None and (self.context or 0) <= model.block_size:
            raise InputError(
                f"--rope-scaling stretches rope to longer texts: give a --context above {model.block_size}"
            )
        if self.context is None:
            return model
        if model.position == "learned" and self.context != model.block_size:
            raise InputError(
                f"context is {self.context}, but this model learned a vector for each of {model.block_size} positions "
                "and has no other: leave out --context, or train with --position rope, alibi, sinusoidal or none"
            )
        changes: dict[str, Any] = {"block_size": self.context}
        if self.rope_scaling is not None:
            factor = model.rope_factor * self.context / model.block_size
            changes |= {"rope_scaling": self.rope_scaling, "rope_factor": factor}
        return from_dict(ModelConfig, to_dict(model) | changes)


def load(
    run: str | os.PathLike[str],
    checkpoint: checkpoints.Which = "best",
    *,
    context: int | None = None,
    rope_scaling: Stretch | None = None,
    engine: EngineName = "auto",
    device: DeviceName = "auto",
    precision: Precision = "auto",
    threads: int = 0,
) -> Model:
    """The model of a run (a path, or a name under ./runs) at its best or latest checkpoint, or at that of a step.

    It reads `context` tokens at once, if that is given, instead of as many as in training. Rope can be stretched to
    them by `rope_scaling` ("linear" or "ntk"). Raises InputError where there is no such run or step, or no such context
    for its positions, and DamagedError where its files are not as they were written or do not belong together.
    """
    found = run_folder.Run(run_folder.find(run))
    held = checkpoints.load(found.path, checkpoint)
    checkpoints.check(
        held,
        config_sha256=found.config_sha256,
        tokenizer_sha256=found.tokenizer.sha256,
        data_sha256=found.record["data"]["sha256"],
    )
    compute = ComputeConfig(engine=engine, device=device, precision=precision, threads=threads)
    config = dataclasses.replace(
        found.config, model=ContextConfig(context, rope_scaling).of(found.config.model)
    )
    machine = make_engine(config, found.tokenizer.vocab_size, compute)
    machine.load(held.weights().items())
    return Model(config, found.tokenizer, machine, held.step)


class Model:
    """Weights, the engine that computes with them, and the tokenizer. Texts longer than the context are fine."""

    def __init__(self, config: RunConfig, tokenizer: Tokenizer, engine: Engine, step: int) -> None:
        self.config = config
        self.tokenizer = tokenizer
        self.engine = engine
        self.step = step  # training steps that the weights have seen

    def generate(
        self,
        prompt: str = "",
        max_new_tokens: int = 200,
        *,
        temperature: float = 0.8,
        top_k: int = 0,
        top_p: float = 1.0,
        min_p: float = 0.0,
        repetition_penalty: float = 1.0,
        seed: int = 42,
        stop: str | Sequence[str] = (),
        grammar: GrammarName | None = None,
    ) -> str:
        """The continuation of `prompt`: sampling.Sampling says what the numbers do, generation.generate the rest."""
        sampling = Sampling(temperature, top_k, top_p, min_p, repetition_penalty, seed)
        return "".join(
            self.stream(prompt, max_new_tokens, sampling=sampling, stop=stop, grammar=grammar)
        )

    def stream(
        self,
        prompt: str = "",
        max_new_tokens: int = 200,
        *,
        sampling: Sampling = Sampling(),  # noqa: B008 - frozen
        stop: str | Sequence[str] = (),
        grammar: GrammarName | None = None,
    ) -> Iterator[str]:
        """What `generate` returns, piece by piece as it is written; joined, the pieces are the same text."""
        pieces = self.pieces(
            [prompt], max_new_tokens, sampling=sampling, stop=stop, grammar=grammar
        )
        return (piece.text for piece in pieces if piece.text)

    def pieces(
        self,
        prompts: Sequence[str],
        max_new_tokens: int = 200,
        *,
        sampling: Sampling = Sampling(),  # noqa: B008 - frozen
        samples: int = 1,
        stop: str | Sequence[str] = (),
        grammar: GrammarName | None = None,
    ) -> Iterator[generation.Piece]:
        """Several texts at once, token by token, with log-probabilities."""
        return generation.generate(
            self.engine,
            self.tokenizer,
            prompts,
            block_size=self.config.model.block_size,
            rolling=self.config.model.rolling,
            max_new_tokens=max_new_tokens,
            sampling=sampling,
            samples=samples,
            stop=(stop,) if isinstance(stop, str) else stop,
            grammar=self.json_grammar.text if grammar else None,
        )

    @cached_property
    def json_grammar(self) -> JsonGrammar:
        """JSON in this model's vocabulary; InputError where that lacks the symbols."""
        return JsonGrammar(self.tokenizer.token_bytes)

    def logits(self, text: str) -> NDArray[np.float32]:
        """(V,) the logits of what comes after `text`, of which the newest tokens are read (generation.visible).

        A model that rolls reads all of them.
        """
        c, ids = self.config.model, generation.encode_prompt(self.tokenizer, text)
        if not c.rolling:
            ids = ids[len(ids) - generation.visible(len(ids), c.block_size) :]
        cache = self.engine.new_cache(1, len(ids))
        for start in range(0, len(ids), c.block_size):
            portion = np.array([ids[start : start + c.block_size]])
            last = self.engine.logits(portion, cache, np.array([portion.size]))
        return np.array(last[0], np.float32)

    def losses(self, text: str) -> NDArray[np.float64]:
        """(tokens - 1,) nats of each token of `text` but the first, in windows that do not overlap, as in training.

        Raises InputError for characters that the tokenizer does not know.
        """
        tokens = self.tokenizer.encode(text)
        if len(tokens) < 2:
            return np.zeros(0)
        block_size = self.config.model.block_size
        every = np.arange(-(-(len(tokens) - 1) // block_size))
        parts = [
            np.asarray(self.engine.losses(inputs, targets), np.float64)[targets >= 0]
            for inputs, targets in evaluation.windows(tokens, block_size, every, ROWS)
        ]
        return np.concatenate(parts)

    def evaluate(self, text: str) -> evaluation.Score:
        """Loss, perplexity and bits per byte of `text`; InputError for fewer than two tokens or unknown characters."""
        return self.score(self.tokenizer.encode(text))

    def score(self, tokens: NDArray[Any]) -> evaluation.Score:
        """The same of tokens (N,), which may be a memory map."""
        lengths, block_size = self.tokenizer.byte_lengths, self.config.model.block_size
        return evaluation.evaluate(self.engine, tokens, lengths, block_size, rows=ROWS)


def parse_checkpoint(text: str) -> checkpoints.Which:
    """What --checkpoint says: best, latest or the number of a step. InputError for anything else."""
    if text == "best":
        return "best"
    if text == "latest":
        return "latest"
    if text.isascii() and text.isdigit():
        return int(text)
    raise InputError(f"checkpoint is '{text}': expected best, latest or the number of a step")
