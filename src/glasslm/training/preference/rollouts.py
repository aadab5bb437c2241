"""Rollouts: answers that the current weights sample, all at once, through the scheduler.

An answer is a pure function of the weights, the prompt, the seed and its number, so that a resumed
run samples the same ones.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

from glasslm.config.schema import ModelConfig
from glasslm.data.tokenizers import Tokenizer
from glasslm.engines.protocol import Engine
from glasslm.inference.generation import encode_from_start
from glasslm.inference.request import Finished, Request, Token
from glasslm.inference.sampling import Sampling
from glasslm.inference.scheduler import Scheduler
from glasslm.training.preference.answer_rows import Answer
from glasslm.training.preference.rewards import END, Text

MAX_ROLLOUT_ROWS = 256  # of the KV cache


class Rollout(NamedTuple):
    """A sampled answer: its tokens, the end included, and its text without the end."""

    answer: Answer
    text: Text  # None: the answer has no end


class RolloutSampler:
    """Samples answers from the weights of an engine."""

    def __init__(
        self, engine: Engine, tokenizer: Tokenizer, config: ModelConfig, answer_tokens: int
    ) -> None:
        self.engine, self.tokenizer, self.config = engine, tokenizer, config
        self.answer_tokens = answer_tokens

    def sample(
        self,
        prompts: Sequence[str],
        sampling: Sampling,
        first_sample: int,
        check_interrupt: Callable[[], None],
    ) -> list[Rollout]:
        """An answer to each of the prompts; answer i has the number `first_sample` + i.

        `check_interrupt` is called before each token; its exception ends the sampling.
        """
        tile = self.engine.row_tile
        slots = min(math.ceil(len(prompts) / tile) * tile, MAX_ROLLOUT_ROWS)
        requests = [
            Request(
                tuple(encode_from_start(self.tokenizer, prompt)), self.answer_tokens, sampling,
                number, stop=(END,),
            )
            for number, prompt in enumerate(prompts, first_sample)
        ]  # fmt: skip
        longest = max(len(request.ids) for request in requests)
        scheduler = Scheduler(
            self.engine, self.tokenizer, self.config,
            slots=slots, capacity=longest + self.answer_tokens,
        )  # fmt: skip
        streams = [scheduler.submit(request) for request in requests]
        texts = dict.fromkeys(streams, "")
        ended = dict.fromkeys(streams, False)
        while scheduler.has_work:
            check_interrupt()
            for stream, event in scheduler.step():
                if isinstance(event, Token):
                    texts[stream] += event.text
                elif isinstance(event, Finished):
                    if event.error:
                        raise event.error
                    texts[stream] += event.text
                    ended[stream] = event.reason == "stop"
        return [
            Rollout(
                Answer(tuple(stream.request.ids), tuple(stream.ids[len(stream.request.ids) :])),
                texts[stream] if ended[stream] else None,
            )
            for stream in streams
        ]
