"""Rewards that a program computes: exact sums, and well-formed new names.

A reward is 1 or 0, and an answer without an end gets 0. What a rule does not measure, training may
give up: `distinct_share` and the held-out score measure what the reward does not.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from typing import Protocol

from glasslm.config.preference_config import RewardName
from glasslm.data.name_list import is_name_list, list_lines, trigrams
from glasslm.errors import InputError

LARGEST_ADDEND = 49
HELD_OUT_PARTS = 10  # one of them is held out
HELD_OUT_PROMPTS = 200
END = "\n"  # ends each answer

Text = str | None  # an answer; None: it has no end


class Reward(Protocol):
    """A checkable reward: its prompts, its rule, and what measures it from outside."""

    @property
    def prompts(self) -> Sequence[str]:
        """The prompts of training, the longest last."""
        ...

    @property
    def held_out_prompts(self) -> Sequence[str]:
        """Prompts that are never trained on; evaluations take all of them."""
        ...

    @property
    def held_out_temperature(self) -> float:
        """The temperature of the answers to them; 0: the likeliest answer."""
        ...

    def score(self, prompt: str, answer: Text) -> float:
        """The reward of an answer, 0 or 1."""
        ...

    def held_out_score(self, prompts: Sequence[str], answers: Sequence[Text]) -> float:
        """The score of the answers to the held-out prompts, 0 to 1."""
        ...

    def distinct_share(self, prompts: Sequence[str], answers: Sequence[Text]) -> float:
        """How different the answers are, 0 to 1, beside answers that are as they should be."""
        ...


class AdditionReward:
    """The exact sum of two numbers from 0 to LARGEST_ADDEND, "12+34=" -> "46"."""

    held_out_temperature = 0.0

    def __init__(self) -> None:
        addends = range(LARGEST_ADDEND + 1)
        pairs = [(a, b) for a in addends for b in addends]
        self.prompts = [f"{a}+{b}=" for a, b in pairs if not is_held_out(a, b)]
        held_out = [f"{a}+{b}=" for a, b in pairs if is_held_out(a, b)]
        self.held_out_prompts = held_out[:: max(1, len(held_out) // HELD_OUT_PROMPTS)]

    def score(self, prompt: str, answer: Text) -> float:
        """1 for the decimal digits of the sum and nothing else: no space, sign or leading zero."""
        return float(answer == self.right_answer(prompt))

    def held_out_score(self, prompts: Sequence[str], answers: Sequence[Text]) -> float:
        """The share of exact sums among the likeliest answers."""
        return sum(map(self.score, prompts, answers)) / len(prompts)

    def distinct_share(self, prompts: Sequence[str], answers: Sequence[Text]) -> float:
        """Different answers, as a share of the different sums; at most 1."""
        return min(1.0, len(set(answers)) / len(set(map(self.right_answer, prompts))))

    @staticmethod
    def right_answer(prompt: str) -> str:
        """The sum that "A+B=" asks for."""
        return str(sum(map(int, prompt.rstrip("=").split("+"))))


def is_held_out(a: int, b: int) -> bool:
    """Whether the sum of a and b, in either order, is kept out of training."""
    return zlib.crc32(f"{min(a, b)}+{max(a, b)}".encode()) % HELD_OUT_PARTS == 0


class NamesReward:
    """A name that is new and well formed: all its trigrams are those of names in the text."""

    held_out_temperature = 1.0
    prompts = ("",)
    held_out_prompts = ("",) * HELD_OUT_PROMPTS

    def __init__(self, text: str) -> None:
        """`text` is the training text, a list of names; InputError for another one."""
        if not is_name_list(text):
            raise InputError(
                "--reward names needs a model of names: expected a training text of 100 lines or "
                "more, each a short name"
            )
        self.names = frozenset(list_lines(text))
        self.trigrams = frozenset(gram for name in self.names for gram in trigrams(name))
        self.longest = max(map(len, self.names))

    def score(self, prompt: str, answer: Text) -> float:
        """1 for a new name without space around it whose trigrams, ends included, are all known.

        It is at most as long as the longest name: trigrams may repeat without end.
        """
        if not answer or answer != answer.strip() or answer in self.names:
            return 0.0
        return float(len(answer) <= self.longest and self.trigrams.issuperset(trigrams(answer)))

    def held_out_score(self, prompts: Sequence[str], answers: Sequence[Text]) -> float:
        """The share of different rewarded names among all answers: a name counts once."""
        rewarded = {answer for answer in answers if self.score("", answer)}
        return len(rewarded) / len(answers)

    def distinct_share(self, prompts: Sequence[str], answers: Sequence[Text]) -> float:
        """Different answers, as a share of the answers."""
        return len(set(answers)) / len(answers)


def make_reward(name: RewardName, text: str) -> Reward:
    """The reward of this name for a model of the training text `text`."""
    return AdditionReward() if name == "addition" else NamesReward(text)
