"""Flags that have no effect beside the others: a new run refuses or names them.

The configs themselves accept them, because run.json of older runs may have them, and because the
runs of a study may vary what a flag needs.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

from glasslm.config.data_config import DataConfig
from glasslm.config.model_config import HIGH_ROTATIONS, ModelConfig
from glasslm.config.preference_config import PreferenceConfig
from glasslm.config.schema import RunConfig
from glasslm.config.training_config import OptimizerConfig
from glasslm.errors import InputError
from glasslm.text import notify


def refuse_unused_flags(
    given: Collection[str],
    data: DataConfig,
    preference: PreferenceConfig | None = None,
    init_from: str | None = None,
) -> None:
    """Raise InputError for a field of `given`, those of the flags, that has no effect.

    A vocabulary size beside another tokenizer than bpe is a note.

    `data`, `preference` and `init_from` have the values of all flags.
    """
    if init_from and "vocab_size" in given:
        raise InputError(
            f"--vocab-size has no effect on the tokenizer of {init_from}: leave it out"
        )
    preference = preference or PreferenceConfig()
    is_arxiv, has_reward = data.corpus == "arxiv", preference.reward is not None
    needs = {
        "category": (is_arxiv, "--corpus arxiv"),
        "max_results": (is_arxiv, "--corpus arxiv"),
        "beta": (bool(preference.preferences), "--preferences"),
        "group_size": (has_reward, "--reward"),
        "kl": (has_reward, "--reward"),
        "answer_tokens": (has_reward, "--reward"),
    }
    for name, (has_effect, needed) in needs.items():
        if name in given and not has_effect:
            raise _missing_need(name, needed)
    if "vocab_size" in given and data.tokenizer != "bpe":  # as in a script for several tokenizers
        notify(
            f"note: --vocab-size has no effect: the tokenizer {data.tokenizer} sets its own size"
        )


def refuse_unread_settings(given: Collection[str], configs: Sequence[RunConfig]) -> None:
    """Raise InputError for a field of `given` that none of `configs`, the runs of a command, reads.

    Its default, as in a script that gives all flags, is accepted.
    """
    defaults = vars(ModelConfig()) | vars(OptimizerConfig())
    unread = [_unread_settings(config.model) for config in configs]
    for name in sorted(set.intersection(*map(set, unread)) & set(given)):
        values = {(vars(config.model) | vars(config.optimizer))[name] for config in configs}
        if values != {defaults[name]}:
            raise _missing_need(name, unread[0][name])


def _unread_settings(model: ModelConfig) -> dict[str, str]:
    """The fields that training this model does not read, with the flag that each of them needs."""
    has_experts, has_adapters = model.n_experts > 0, model.lora_rank > 0
    scaling = model.rope_scaling
    needs = {
        "experts_per_token": (has_experts, "--n-experts"),
        "balance_loss": (has_experts, "--n-experts"),
        "router_z_loss": (has_experts, "--n-experts"),
        "lora_alpha": (has_adapters, "--lora-rank"),
        "lora_targets": (has_adapters, "--lora-rank"),
        "rope_base": (model.position == "rope", "--position rope"),
        "rope_original_context": (
            scaling == "dynamic" or scaling in HIGH_ROTATIONS,
            "--rope-scaling dynamic, yarn or llama3",
        ),
        "rope_low_rotations": (scaling in HIGH_ROTATIONS, "--rope-scaling yarn or llama3"),
        "rope_high_rotations": (scaling in HIGH_ROTATIONS, "--rope-scaling yarn or llama3"),
        "rope_attention_factor": (scaling == "yarn", "--rope-scaling yarn"),
    }
    return {name: needed for name, (is_read, needed) in needs.items() if not is_read}


def _missing_need(name: str, needed: str) -> InputError:
    flag = f"--{name.replace('_', '-')}"
    return InputError(f"{flag} needs {needed}: give both, or leave out {flag}")
