"""Signs that a reward is gained at the cost of what it does not measure, from a run's log.

A reward is a proxy: training finds answers that score well, also where they are not what was meant
(Gao et al. 2022, arXiv:2210.10760). So what the reward does not see is measured beside it: entropy,
divergence from the first weights, how different the answers are, held-out prompts and the old text.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np

from glasslm.runs.metrics import EvalLine, Line, StepLine
from glasslm.text import as_float

START_STEPS, RECENT_STEPS = 5, 10  # logged steps whose means are compared
MIN_ENTROPY_SHARE = 0.1  # of the entropy at the start
SOLVED_REWARD = 0.9  # where one answer is right, a model that knows it has no entropy
MAX_KL = 1.0  # nats per token of the answers
MIN_DISTINCT_SHARE = 0.5  # of the share of different answers at the start
MIN_RISE, MIN_FALL = 0.1, 0.1  # of the reward in training, and of the held-out one
MAX_OLD_RISE = 0.2  # of the loss of the old text, as a share of its first value
MAX_NATS_RISE = 0.1  # of the chosen answers' nats, as a share of their first value


class PreferenceMonitor:
    """The log of a run so far, and the signs in it that were not warned of yet.

    The state follows from the log alone, so that a resumed run warns as an uninterrupted one. A run
    without preference tuning has no signs.
    """

    def __init__(self, lines: Iterable[Line] = ()) -> None:
        self._steps: list[StepLine] = []
        self._held_out: list[EvalLine] = []
        self._old: list[EvalLine] = []
        self._warned: set[str] = set()
        for line in lines:
            self.add(line)

    def add(self, line: Line) -> None:
        """Note a line of the log."""
        if line["kind"] == "step" and "preference" in line:
            self._steps.append(line)
        elif line["kind"] == "eval" and "preference" in line:
            self._held_out.append(line)
        elif line["kind"] == "eval" and line.get("split") == "old":
            self._old.append(line)
        elif line["kind"] == "warning":
            self._warned.add(line["code"])

    def new_signs(self) -> list[tuple[str, str]]:
        """Codes and messages of the signs that have no warning in the log."""
        if len(self._steps) <= START_STEPS:
            return []
        return [sign for sign in self._signs() if sign[0] not in self._warned]

    def _signs(self) -> Iterator[tuple[str, str]]:
        kl = self._means("kl")[1]
        if kl > MAX_KL:
            yield (
                "kl",
                (
                    f"the answers are {kl:.2f} nats per token from those of the first weights, "
                    f"above {MAX_KL:g}: read some, and use a larger --kl or fewer --max-steps"
                ),
            )
        if "chosen_nats" in self._steps[0]["preference"]:
            yield from self._signs_of_pairs()
            return
        reward = self._means("reward")
        entropy, distinct = self._means("entropy"), self._means("distinct")
        if entropy[1] < MIN_ENTROPY_SHARE * entropy[0] and reward[1] < SOLVED_REWARD:
            yield (
                "entropy",
                (
                    f"entropy collapse: {entropy[1]:.3f} nats per token, {entropy[0]:.3f} at the "
                    f"start, at a reward of {reward[1]:.2f}: no other answers are tried any more. "
                    "Use a larger --kl or a lower --lr"
                ),
            )
        if distinct[1] < MIN_DISTINCT_SHARE * distinct[0]:
            yield (
                "distinct",
                (
                    f"the answers are getting alike: the share of different ones fell from "
                    f"{distinct[0]:.2f} to {distinct[1]:.2f} while the reward went from "
                    f"{reward[0]:.2f} to {reward[1]:.2f}. Use a larger --kl or fewer --max-steps"
                ),
            )
        if reward[1] - reward[0] >= MIN_RISE:
            yield from self._signs_beside_reward(*reward)

    def _signs_beside_reward(self, start: float, recent: float) -> Iterator[tuple[str, str]]:
        """Measures that became worse while the reward rose from `start` to `recent`."""
        rise = f"while the reward in training rose from {start:.2f} to {recent:.2f}"
        scores = [1 - as_float(line["loss"]) for line in self._held_out]
        if scores and max(scores) - scores[-1] >= MIN_FALL:
            yield (
                "held_out",
                (
                    f"reward hacking: the held-out score fell from {max(scores):.2f} to "
                    f"{scores[-1]:.2f} {rise}. The best checkpoint is from before the fall"
                ),
            )
        losses = [as_float(line["loss"]) for line in self._old]
        if losses and losses[-1] > (1 + MAX_OLD_RISE) * losses[0]:
            yield (
                "old_text",
                (
                    f"the loss of the old text rose from {losses[0]:.3f} to {losses[-1]:.3f} nats "
                    f"per token {rise}: what it taught is being forgotten"
                ),
            )

    def _signs_of_pairs(self) -> Iterator[tuple[str, str]]:
        start, recent = self._means("chosen_nats")
        if recent > (1 + MAX_NATS_RISE) * start:
            yield (
                "displacement",
                (
                    f"the chosen answers are less likely than at the start: {recent:.2f} nats "
                    f"each, {start:.2f} before. Only the margin to the rejected ones grew: use a "
                    "larger --beta, a lower --lr or fewer --max-steps"
                ),
            )

    def _means(self, name: str) -> tuple[float, float]:
        """The mean of a measure over the first logged steps, and over the last ones."""
        values = [as_float(line["preference"].get(name)) for line in self._steps]
        return float(np.mean(values[:START_STEPS])), float(np.mean(values[-RECENT_STEPS:]))
