"""What preference tuning learns from: pairs of answers, or a reward that a program computes."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, Literal

import tyro

from glasslm.config.config_fields import optional_flag, require_fields
from glasslm.errors import InputError

RewardName = Literal["addition", "names"]


@dataclass(frozen=True)
class PreferenceConfig:
    """Preference tuning with pairs (DPO) or with a reward (GRPO); by default neither."""

    preferences: Annotated[str, optional_flag("FILE.jsonl", "none")] = ""
    """Pairs of answers to learn from, by DPO (arXiv:2305.18290).
    Each line is an object with the texts "prompt", "chosen" and "rejected"."""
    preferences_sha256: tyro.conf.Suppress[str] = ""
    reward: Annotated[RewardName | None, optional_flag("addition|names", "none")] = None
    """Checkable reward of sampled answers to learn from, by GRPO (arXiv:2402.03300).
    addition: exact sums; names: names that are new and made of the text's trigrams."""
    beta: float = 0.1
    """DPO: strength of the tie to the first weights."""
    group_size: int = 16
    """GRPO: answers to each prompt, which are compared with each other."""
    kl: float = 0.04
    """GRPO: coefficient of the divergence from the first weights (0: none)."""
    answer_tokens: int = 16
    """GRPO: most tokens of an answer."""

    def __post_init__(self) -> None:
        require_fields(self, ["beta"], lambda x: 0 < x < math.inf, "above 0 and finite")
        require_fields(self, ["kl"], lambda x: 0 <= x < math.inf, "0 (off) or more, and finite")
        require_fields(self, ["group_size"], lambda x: x >= 2, "at least 2")
        require_fields(self, ["answer_tokens"], lambda x: x >= 1, "at least 1")
        if self.preferences and self.reward:
            raise InputError(
                "both --preferences and --reward were given: learn from pairs, or from a reward"
            )

    @property
    def is_active(self) -> bool:
        """Whether a run is tuned to preferences."""
        return bool(self.preferences or self.reward)
