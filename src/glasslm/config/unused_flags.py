"""Flags that have no effect beside the others: a new run refuses or names them.

The configs themselves accept them, because run.json of older runs may have them.
"""

from __future__ import annotations

from collections.abc import Collection

from glasslm.config.data_config import DataConfig
from glasslm.config.preference_config import PreferenceConfig
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
            flag = f"--{name.replace('_', '-')}"
            raise InputError(f"{flag} needs {needed}: give both, or leave out {flag}")
    if "vocab_size" in given and data.tokenizer != "bpe":  # as in a script for several tokenizers
        notify(
            f"note: --vocab-size has no effect: the tokenizer {data.tokenizer} sets its own size"
        )
