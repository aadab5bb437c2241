"""Flags that have no effect beside the others: a new run refuses them.

The configs themselves accept them, because run.json of older runs may have them.
"""

from __future__ import annotations

from collections.abc import Collection

from glasslm.config.data_config import DataConfig
from glasslm.config.preference_config import PreferenceConfig
from glasslm.errors import InputError


def refuse_unused_flags(
    given: Collection[str],
    data: DataConfig,
    preference: PreferenceConfig | None = None,
    init_from: str | None = None,
) -> None:
    """Raise InputError for a field of `given`, those of the flags, that has no effect.

    `data`, `preference` and `init_from` have the values of all flags.
    """
    preference = preference or PreferenceConfig()
    is_arxiv, has_reward = data.corpus == "arxiv", preference.reward is not None
    needs = {
        "category": (is_arxiv, "--corpus arxiv"),
        "max_results": (is_arxiv, "--corpus arxiv"),
        "vocab_size": (data.tokenizer == "bpe", "--tokenizer bpe"),
        "beta": (bool(preference.preferences), "--preferences"),
        "group_size": (has_reward, "--reward"),
        "kl": (has_reward, "--reward"),
        "answer_tokens": (has_reward, "--reward"),
    }
    for name, (has_effect, needed) in needs.items():
        if name in given and not has_effect:
            flag = f"--{name.replace('_', '-')}"
            raise InputError(f"{flag} needs {needed}: give both, or leave out {flag}")
    if init_from and "vocab_size" in given:
        raise InputError(
            f"--vocab-size has no effect on the tokenizer of {init_from}: leave it out"
        )
