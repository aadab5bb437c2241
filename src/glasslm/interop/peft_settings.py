"""PEFT's adapter_config.json: read the settings that glasslm has, and refuse all others.

An option that glasslm does not know is refused when it is set, because ignoring it would give
another model. Patterns in the file are not executed.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from glasslm.errors import DamagedError, InputError
from glasslm.interop.untrusted_json import read_values, require_supported

SETTINGS_FILE = "adapter_config.json"
MAX_SETTINGS_BYTES = 256 << 10  # a file has about a thousand
MAX_RANK = 4096

# Options that glasslm reads, and options without an effect on trained adapters. All others must be
# off.
READ_OPTIONS = {
    "peft_type", "task_type", "bias", "init_lora_weights", "target_modules", "r", "lora_alpha",
    "use_rslora", "rank_pattern", "alpha_pattern",
}  # fmt: skip
IGNORED_OPTIONS = {
    "base_model_name_or_path", "revision", "auto_mapping", "peft_version", "inference_mode",
    "lora_dropout", "fan_in_fan_out", "loftq_config", "eva_config", "corda_config",
    "lora_ga_config", "megatron_core", "qalora_group_size",
}  # fmt: skip
REFUSED_OPTIONS = {
    "use_dora": "DoRA scales the adapted matrices, too",
    "lora_bias": "glasslm's adapters have no bias",
    "modules_to_save": "it holds whole matrices beside the adapters",
    "trainable_token_indices": "it holds embeddings beside the adapters",
    "target_parameters": "it adapts experts as one array, which glasslm does not",
    "layers_to_transform": "glasslm adapts every layer, or none",
    "exclude_modules": "glasslm adapts every layer, or none",
    "layer_replication": "it repeats layers of the model",
}
# Values of init_lora_weights that leave the frozen matrices unchanged.
SUPPORTED_INITS = (True, False, "gaussian", "orthogonal", "eva")


@dataclass(frozen=True)
class LoraSettings:
    """The settings of an adapter_config.json.

    `ranks` and `alphas` are the exceptions, by name of a module.
    """

    targets: frozenset[str]
    default_rank: int
    alpha: float
    uses_rslora: bool  # scale by alpha / sqrt(r) instead of alpha / r: arXiv:2312.03732
    ranks: dict[str, int]
    alphas: dict[str, float]

    def rank(self, path: str) -> int:
        """The rank of the adapter at `path`."""
        names = module_names(path)
        return next((rank for name, rank in self.ranks.items() if name in names), self.default_rank)

    def scale(self, path: str) -> float:
        """The factor of the product of the adapter's matrices at `path`."""
        names = module_names(path)
        alpha = next((alpha for name, alpha in self.alphas.items() if name in names), self.alpha)
        return self._scale(alpha, self.rank(path))

    def alpha_for_rank(self, rank: int) -> float:
        """The alpha that gives adapters of this rank the default scale.

        It equals `alpha` to the bit where the rank is the default.
        """
        if self.uses_rslora:
            return self._scale(self.alpha, self.default_rank) * rank
        return self.alpha * (rank / self.default_rank)

    def require_one_scale(self, paths: Iterable[str]) -> None:
        """Raise InputError unless the adapters at all `paths` have the default scale."""
        default_scale = self._scale(self.alpha, self.default_rank)
        for path in paths:
            if not math.isclose(self.scale(path), default_scale, rel_tol=1e-9):
                raise InputError(
                    f"the adapter of {path} is scaled by {self.scale(path):g} and others by "
                    f"{default_scale:g}: expected no alpha_pattern or rank_pattern that changes "
                    "the scale, because glasslm has one lora_alpha"
                )

    def _scale(self, alpha: float, rank: int) -> float:
        return alpha / (math.sqrt(rank) if self.uses_rslora else rank)


def module_names(path: str) -> set[str]:
    """The names by which PEFT finds the module at `path`: the path and its tails after a dot."""
    words = path.split(".")
    return {".".join(words[i:]) for i in range(len(words))}


def read(folder: Path) -> LoraSettings:
    """The settings in a folder of PEFT.

    Raises InputError if there is no file or it asks for what glasslm does not have, DamagedError
    for a damaged file.
    """
    path = folder / SETTINGS_FILE
    if not path.is_file():
        raise InputError(
            f"{folder} holds no {SETTINGS_FILE}: expected a folder as save_pretrained of PEFT "
            "writes it"
        )
    if path.stat().st_size > MAX_SETTINGS_BYTES:
        raise DamagedError(f"{path} has {path.stat().st_size:,} bytes: expected about a thousand")
    values = read_values(path)
    for name, value in values.values.items():
        if value and name not in READ_OPTIONS | IGNORED_OPTIONS:
            reason = REFUSED_OPTIONS.get(name, "glasslm does not know this option")
            raise InputError(
                f"{path} has {name[:100]!r} set: {reason}. Expected plain LoRA without this option"
            )
    for name, expected in (("peft_type", "LORA"), ("task_type", "CAUSAL_LM"), ("bias", "none")):
        value = values.string(name, expected)
        require_supported(value == expected, name, value[:100], expected)
    init = values.values.get("init_lora_weights")
    require_supported(
        init is None or init in SUPPORTED_INITS,
        "init_lora_weights",
        str(init)[:100],
        "a start that leaves the matrices unchanged "
        "(PEFT converts others with path_initial_model_for_weight_conversion)",
    )
    targets = values.values.get("target_modules")
    require_supported(
        isinstance(targets, list) and all(isinstance(name, str) for name in targets),
        "target_modules",
        repr(targets)[:100],
        "a list of names, because patterns are not run",
    )
    assert isinstance(targets, list)
    ranks, alphas = values.object("rank_pattern"), values.object("alpha_pattern")
    return LoraSettings(
        targets=frozenset(targets),
        default_rank=_require_rank(values.integer("r", 8)),
        alpha=values.number("lora_alpha", 8),
        uses_rslora=values.boolean("use_rslora", False),
        ranks={_require_name(name): _require_rank(ranks.integer(name)) for name in ranks.values},
        alphas={_require_name(name): alphas.number(name) for name in alphas.values},
    )


def _require_rank(rank: int) -> int:
    require_supported(1 <= rank <= MAX_RANK, "r", rank, f"1 to {MAX_RANK:,}")
    return rank


def _require_name(name: str) -> str:
    require_supported(
        re.fullmatch(r"[\w.]+", name) is not None,
        "rank_pattern or alpha_pattern",
        repr(name)[:100],
        "names, because patterns are not run",
    )
    return name
