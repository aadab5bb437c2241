"""adapter_config.json of PEFT: what it asks for, and that nothing in it asks for what glasslm has no adapters for.

Whatever is set there and not known here is refused: an option that is passed over is another model. Nothing in the
file is run, its patterns neither.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from glasslm.errors import DamagedError, InputError
from glasslm.interop.untrusted_json import read_json, refuse_others

SETTINGS = "adapter_config.json"
LARGEST = 256 << 10  # bytes; it has about a thousand
MOST_RANK = 4096

# What decides, and what says nothing about adapters that are trained. The rest must be off.
DECIDING = {"peft_type", "task_type", "bias", "init_lora_weights", "target_modules", "r", "lora_alpha", "use_rslora",
            "rank_pattern", "alpha_pattern"}  # fmt: skip
SILENT = {"base_model_name_or_path", "revision", "auto_mapping", "peft_version", "inference_mode", "lora_dropout",
          "fan_in_fan_out", "loftq_config", "eva_config", "corda_config", "lora_ga_config",
          "megatron_core", "qalora_group_size"}  # fmt: skip
REFUSED = {
    "use_dora": "DoRA scales the adapted matrices, too",
    "lora_bias": "adapters have no bias here",
    "modules_to_save": "it brings whole matrices of its own",
    "trainable_token_indices": "it brings embeddings of its own",
    "target_parameters": "experts there are one array, adapted in another form",
    "layers_to_transform": "every layer has adapters here, or none",
    "exclude_modules": "every layer has adapters here, or none",
    "layer_replication": "it repeats layers of the model",
}
STARTS = (
    True,
    False,
    "gaussian",
    "orthogonal",
    "eva",
)  # those that leave the matrices beside the adapters alone


@dataclass(frozen=True)
class Settings:
    """What an adapter_config.json asks for; `ranks` and `alphas` are the exceptions, by name."""

    targets: frozenset[str]
    rank: int
    alpha: float
    rooted: bool  # alpha / sqrt(r) instead of alpha / r: rsLoRA, arXiv:2312.03732
    ranks: dict[str, int]
    alphas: dict[str, float]

    def rank_of(self, path: str) -> int:
        own = names_of(path)
        return next((rank for name, rank in self.ranks.items() if name in own), self.rank)

    def scale_of(self, path: str) -> float:
        """What the product of the adapter at `path` is multiplied by."""
        own = names_of(path)
        alpha = next((alpha for name, alpha in self.alphas.items() if name in own), self.alpha)
        return self._scale(alpha, self.rank_of(path))

    def alpha_at(self, rank: int) -> float:
        """The alpha that scales adapters of this rank alike; where nothing is to change it is the same to the bit."""
        if self.rooted:
            return self._scale(self.alpha, self.rank) * rank
        return self.alpha * (rank / self.rank)

    def require_one_scale(self, paths: Iterable[str]) -> None:
        """Raises InputError unless what is said of single matrices leaves the scale as it is."""
        usual = self._scale(self.alpha, self.rank)
        for path in paths:
            if not math.isclose(self.scale_of(path), usual, rel_tol=1e-9):
                raise InputError(
                    f"the adapter of {path} is scaled by {self.scale_of(path):g} and others by {usual:g}: expected no "
                    "alpha_pattern or rank_pattern that changes it, because one lora_alpha is for all here"
                )

    def _scale(self, alpha: float, rank: int) -> float:
        return alpha / (math.sqrt(rank) if self.rooted else rank)


def names_of(path: str) -> set[str]:
    """What PEFT takes for the name of a matrix: its path, or the last words of it."""
    words = path.split(".")
    return {".".join(words[i:]) for i in range(len(words))}


def read(folder: Path) -> Settings:
    """Raises InputError where there is none or it asks for what glasslm has not, DamagedError where it is none."""
    path = folder / SETTINGS
    if not path.is_file():
        raise InputError(
            f"{folder} holds no {SETTINGS}: expected a folder as save_pretrained of PEFT writes it"
        )
    if path.stat().st_size > LARGEST:
        raise DamagedError(f"{path} has {path.stat().st_size:,} bytes: expected about a thousand")
    values = read_json(path)
    for name, value in values.values.items():
        if value and name not in DECIDING | SILENT:
            why = REFUSED.get(name, "glasslm does not know what that changes")
            raise InputError(
                f"{path} has {name[:100]!r} set: {why}. Expected plain LoRA, without it"
            )
    for name, expected in (("peft_type", "LORA"), ("task_type", "CAUSAL_LM"), ("bias", "none")):
        refuse_others((word := values.word(name, expected)) == expected, name, word[:100], expected)
    start = values.values.get("init_lora_weights")
    refuse_others(
        start is None or start in STARTS, "init_lora_weights", str(start)[:100],
        "a start that leaves the matrices as they are (in PEFT, path_initial_model_for_weight_conversion makes it so)",
    )  # fmt: skip
    targets = values.values.get("target_modules")
    listed = isinstance(targets, list) and all(isinstance(name, str) for name in targets)
    refuse_others(
        listed,
        "target_modules",
        repr(targets)[:100],
        "a list of names, because patterns are not run",
    )
    assert isinstance(targets, list)
    ranks, alphas = values.part("rank_pattern"), values.part("alpha_pattern")
    return Settings(
        targets=frozenset(targets),
        rank=_possible(values.whole("r", 8)),
        alpha=values.number("lora_alpha", 8),
        rooted=values.flag("use_rslora", False),
        ranks={_name(name): _possible(ranks.whole(name)) for name in ranks.values},
        alphas={_name(name): alphas.number(name) for name in alphas.values},
    )


def _possible(rank: int) -> int:
    refuse_others(1 <= rank <= MOST_RANK, "r", rank, f"1 to {MOST_RANK:,}")
    return rank


def _name(name: str) -> str:
    plain = re.fullmatch(r"[\w.]+", name) is not None
    refuse_others(
        plain,
        "rank_pattern or alpha_pattern",
        repr(name)[:100],
        "names, because patterns are not run",
    )
    return name
