"""The objective of preference tuning, as the training loop uses it.

The loop asks for the batch of a step and trains on it like on any other. The batch has weights of
targets that make the gradient of the weighted nats the gradient of the objective. They come from
the nats of the answers under the current weights and under the first ones, which a second engine
holds. So both engines share everything here. Letters: P pairs, B rows, T positions.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from glasslm.config.schema import RunConfig
from glasslm.data.permutation import items_at
from glasslm.data.preference_pairs import PreferencePair
from glasslm.data.tokenizers import Tokenizer
from glasslm.engines.protocol import Batch, Engine
from glasslm.errors import InputError
from glasslm.inference.evaluation import Score
from glasslm.inference.generation import encode_from_start
from glasslm.inference.sampling import Sampling
from glasslm.training.preference.answer_rows import Answer, AnswerRows, answer_rows, token_nats
from glasslm.training.preference.dpo import PairLosses, pair_losses
from glasslm.training.preference.grpo import group_advantages, kl_estimates, nats_slopes
from glasslm.training.preference.rewards import Reward
from glasslm.training.preference.rollouts import RolloutSampler

Floats = NDArray[np.float64]
CheckInterrupt = Callable[[], None]
FirstEngine = Callable[[], Engine]  # makes an engine with the first weights

HELD_OUT_SAMPLE = 1 << 63  # the first number of the answers of evaluations: no step reaches it
HELD_OUT_ROWS = 64  # rows of pairs that an evaluation computes at once


class ObjectiveStep(NamedTuple):
    """The batch of a step, and what its rows measure before the update."""

    batch: Batch
    loss: float  # what training minimizes: nats per pair, or 1 - reward
    measures: dict[str, float]


class HeldOutScore(NamedTuple):
    """A measurement on held-out pairs or prompts. The score has no perplexity and no bytes."""

    score: Score
    measures: dict[str, float]


class Objective(Protocol):
    """DPO or GRPO."""

    def prepare_step(self, step: int, check_interrupt: CheckInterrupt) -> ObjectiveStep:
        """The batch of a step, counted from 0: a function of the seed, the step and the weights."""
        ...

    def evaluate(self, check_interrupt: CheckInterrupt) -> HeldOutScore:
        """Measure the current weights on what is held out."""
        ...

    def epoch(self, step: int) -> float:
        """Passes over the pairs or prompts after `step` steps."""
        ...


class PairObjective:
    """DPO: the batch of a step has B / 2 pairs, the chosen answers before the rejected ones."""

    def __init__(
        self,
        config: RunConfig,
        engine: Engine,
        first: FirstEngine,
        tokenizer: Tokenizer,
        train: Sequence[PreferencePair],
        held_out: Sequence[PreferencePair],
    ) -> None:
        """`first()` returns an engine with the first weights."""
        self.config, self.engine, self._first = config, engine, first
        self.train = [encode_pair(pair, tokenizer, config) for pair in train]
        self.held_out = [encode_pair(pair, tokenizer, config) for pair in held_out]

    @cached_property
    def first_engine(self) -> Engine:
        """The engine with the first weights."""
        return self._first()

    def prepare_step(self, step: int, check_interrupt: CheckInterrupt) -> ObjectiveStep:
        """Objective.prepare_step."""
        train = self.config.train
        pairs = train.batch_size // 2
        places = step * pairs + np.arange(pairs)
        items = items_at(train.seed, places, len(self.train))
        rows, losses, margins_of_answers = self._compare([self.train[item] for item in items])
        slopes = np.concatenate([losses.slopes, -losses.slopes]) / len(losses.losses)
        batch = weighted_batch(rows, slopes[:, None] * rows.is_answer, step)
        return ObjectiveStep(
            batch, float(losses.losses.mean()), pair_measures(losses) | margins_of_answers
        )

    def evaluate(self, check_interrupt: CheckInterrupt) -> HeldOutScore:
        """Objective.evaluate: the mean loss of the held-out pairs, in nats per pair."""
        parts, tokens = [], 0
        for start in range(0, len(self.held_out), HELD_OUT_ROWS // 2):
            check_interrupt()
            pairs = self.held_out[start : start + HELD_OUT_ROWS // 2]
            rows, losses, _ = self._compare(pairs)
            parts.append(losses)
            tokens += int(rows.lengths.sum())
        losses = PairLosses(*map(np.concatenate, zip(*parts)))
        loss = float(losses.losses.mean())
        return HeldOutScore(
            Score(loss, math.nan, math.nan, tokens, 0, whole=True), pair_measures(losses)
        )

    def epoch(self, step: int) -> float:
        """Objective.epoch."""
        return step * (self.config.train.batch_size // 2) / len(self.train)

    def _compare(
        self, pairs: Sequence[tuple[Answer, Answer]]
    ) -> tuple[AnswerRows, PairLosses, dict[str, float]]:
        """The rows of P pairs, their losses, and the mean nats of their answers."""
        rows = answer_rows([pair[side] for side in (0, 1) for pair in pairs])
        nats = token_nats(self.engine, rows).sum(1)
        first_nats = token_nats(self.first_engine, rows).sum(1)
        chosen, rejected = np.split(nats, 2)
        first_chosen, first_rejected = np.split(first_nats, 2)
        beta = self.config.preference.beta
        losses = pair_losses(chosen, rejected, first_chosen, first_rejected, beta)
        means = {"chosen_nats": float(chosen.mean()), "rejected_nats": float(rejected.mean())}
        return rows, losses, means


def pair_measures(losses: PairLosses) -> dict[str, float]:
    """The share of pairs with a positive margin, and the mean margin."""
    return {
        "accuracy": float((losses.margins > 0).mean()),
        "margin": float(losses.margins.mean()),
    }


def encode_pair(
    pair: PreferencePair, tokenizer: Tokenizer, config: RunConfig
) -> tuple[Answer, Answer]:
    """The chosen and the rejected answer as tokens; both end with the token that ends documents.

    Raises InputError for characters that the tokenizer does not know, and for a pair that is longer
    than the context.
    """
    prompt = tuple(encode_from_start(tokenizer, pair.prompt))
    end = () if tokenizer.end_id is None else (tokenizer.end_id,)
    answers = [
        Answer(prompt, (*map(int, tokenizer.encode(text)), *end))
        for text in (pair.chosen, pair.rejected)
    ]
    longest = max(len(answer.tokens) for answer in answers) + len(prompt) - 1
    if longest > config.model.block_size:
        raise InputError(
            f"a pair has {longest + 1} tokens, its prompt begins with {pair.prompt[:40]!r}: "
            f"expected at most {config.model.block_size + 1}, the context of the model"
        )
    return answers[0], answers[1]


class RewardObjective:
    """GRPO: the batch of a step has B / G prompts, each with a group of G sampled answers."""

    def __init__(
        self,
        config: RunConfig,
        engine: Engine,
        first: FirstEngine,
        tokenizer: Tokenizer,
        reward: Reward,
    ) -> None:
        """`first()` returns an engine with the first weights."""
        self.config, self.engine, self._first, self.reward = config, engine, first, reward
        self.sampler = RolloutSampler(
            engine, tokenizer, config.model, config.preference.answer_tokens
        )
        prompts = (*reward.prompts[-1:], *reward.held_out_prompts[-1:])  # the longest ones
        longest = max(len(encode_from_start(tokenizer, prompt)) for prompt in prompts)
        if longest + config.preference.answer_tokens > config.model.block_size:
            raise InputError(
                f"prompts of {longest} tokens and --answer-tokens "
                f"{config.preference.answer_tokens} do not fit into the context of "
                f"{config.model.block_size} tokens: give fewer --answer-tokens"
            )

    @cached_property
    def first_engine(self) -> Engine:
        """The engine with the first weights."""
        return self._first()

    def prepare_step(self, step: int, check_interrupt: CheckInterrupt) -> ObjectiveStep:
        """Objective.prepare_step: sample answers, and weigh each by its advantage in its group."""
        train, settings = self.config.train, self.config.preference
        B, G = train.batch_size, settings.group_size
        places = step * (B // G) + np.arange(B // G)
        items = items_at(train.seed, places, len(self.reward.prompts))
        prompts = [self.reward.prompts[item] for item in np.repeat(items, G).tolist()]
        sampling = Sampling(temperature=1.0, seed=train.seed)  # the distribution that is trained
        rollouts = self.sampler.sample(prompts, sampling, step * B, check_interrupt)
        texts = [rollout.text for rollout in rollouts]
        rewards = np.array(list(map(self.reward.score, prompts, texts)))
        rows = answer_rows([rollout.answer for rollout in rollouts])
        nats, first_nats = token_nats(self.engine, rows), token_nats(self.first_engine, rows)
        advantages = group_advantages(rewards.reshape(-1, G)).reshape(-1)
        slopes = nats_slopes(advantages, nats, first_nats, rows.is_answer, settings.kl)
        measures = {
            "reward": float(rewards.mean()),
            "kl": float(kl_estimates(nats, first_nats)[rows.is_answer].mean()),
            # The mean of -log p over tokens sampled from p estimates the entropy of p.
            "entropy": float(nats[rows.is_answer].mean()),
            "distinct": self.reward.distinct_share(prompts, texts),
            "length": float(rows.lengths.mean()),
        }
        return ObjectiveStep(weighted_batch(rows, slopes, step), 1 - measures["reward"], measures)

    def evaluate(self, check_interrupt: CheckInterrupt) -> HeldOutScore:
        """Objective.evaluate: 1 - the held-out score, which training does not see."""
        prompts = self.reward.held_out_prompts
        seed, temperature = self.config.train.seed, self.reward.held_out_temperature
        rollouts = self.sampler.sample(
            prompts, Sampling(temperature=temperature, seed=seed), HELD_OUT_SAMPLE, check_interrupt
        )
        texts = [rollout.text for rollout in rollouts]
        held_out = self.reward.held_out_score(prompts, texts)
        tokens = sum(len(rollout.answer.tokens) for rollout in rollouts)
        return HeldOutScore(
            Score(1 - held_out, math.nan, math.nan, tokens, 0, whole=True),
            {"reward": held_out, "distinct": self.reward.distinct_share(prompts, texts)},
        )

    def epoch(self, step: int) -> float:
        """Objective.epoch."""
        prompts = self.config.train.batch_size // self.config.preference.group_size
        return step * prompts / len(self.reward.prompts)


def weighted_batch(rows: AnswerRows, slopes: Floats, step: int) -> Batch:
    """The batch whose weighted nats have the gradient sum of slopes (B, T) x gradient of nats.

    The engine's own weight is 1 / (number of targets), as for every batch.
    """
    weights: NDArray[Any] = slopes * np.count_nonzero(rows.is_answer)
    return Batch(rows.tokens, rows.targets, step, np.arange(len(rows.tokens)), weights)
