"""The template of a chat run, and the special tokens that it adds to the vocabulary."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from glasslm.config.data_config import END_OF_TEXT
from glasslm.data.chat.chat_template import PROBE, ChatTemplate
from glasslm.data.chat.named_templates import DEFAULT_TEMPLATE, NAMED_TEMPLATES, NamedTemplate
from glasslm.data.special_tokens import SPECIAL_SPELLING
from glasslm.data.tokenizers import Tokenizer
from glasslm.errors import InputError, explain_system_errors

MAX_TEMPLATE_BYTES = 1 << 20  # the longest known ones have 20 kB


class ChatVocabulary(NamedTuple):
    """A tokenizer with the special tokens of a template, and run.json's tokenizer.transformers."""

    tokenizer: Tokenizer
    settings: dict[str, Any]  # roles of special tokens, the template, the ids that end an answer

    @property
    def template(self) -> ChatTemplate:
        """The template for a text to learn from."""
        return ChatTemplate(self.settings, self.tokenizer, has_clock=False)


def make_chat_vocabulary(
    template: str | None,
    special_tokens: Iterable[str],
    tokenizer: Tokenizer,
    settings: dict[str, Any] | None,
) -> ChatVocabulary:
    """The vocabulary of a chat run.

    `template` is a name, the path of a Jinja file, or None for the model's own or else the default.
    `tokenizer` and `settings` are those of the model that it starts from; `special_tokens` are
    further ones. Raises InputError for a template that cannot be read, or not be learned.
    """
    settings = dict(settings or {})
    known = [*tokenizer.special_tokens] or [*tokenizer.unused_special_tokens]
    if template is None and not settings.get("chat_template"):
        template = DEFAULT_TEMPLATE
    if template in NAMED_TEMPLATES:
        named = NAMED_TEMPLATES[template]
        settings = _named_settings(named, settings, known)
        written = [settings["bos_token"], settings["eos_token"], *named.tokens]
    else:
        if template is not None:
            settings["chat_template"] = _read_template(template)
        _default_roles(settings, known)
        written = [settings[role] for role in ("bos_token", "eos_token") if settings.get(role)]
        written += _find_spellings(ChatTemplate(settings, tokenizer, has_clock=False))
    tokens = list(dict.fromkeys([*known, *written, *special_tokens]))
    tokenizer = tokenizer.with_special_tokens(tokens)
    vocabulary = ChatVocabulary(tokenizer, settings)
    turn_end = tokenizer.special_tokens[vocabulary.template.turn_end()]
    ends = vocabulary.template.end_ids | {turn_end}
    settings["generation_eos_ids"] = [turn_end, *sorted(ends - {turn_end})]
    return vocabulary


def _named_settings(
    named: NamedTemplate, settings: dict[str, Any], known: list[str]
) -> dict[str, Any]:
    """The settings of a named template over those of the model."""
    others = {name: value for name, value in settings.items() if name != "generation_eos_ids"}
    document_end = known[0] if known else END_OF_TEXT
    begin = named.text_begin or settings.get("bos_token") or document_end
    end = named.turn_end or settings.get("eos_token") or document_end
    roles = {"bos_token": begin, "eos_token": end}
    return {"pad_token": begin} | others | roles | {"chat_template": named.source}


def _default_roles(settings: dict[str, Any], known: list[str]) -> None:
    """Give a template of the user the roles that it may write."""
    end = settings.get("eos_token") or (known[0] if known else END_OF_TEXT)
    for role in ("bos_token", "eos_token", "pad_token"):
        settings.setdefault(role, end)


def _read_template(path: str) -> str:
    names = ", ".join(NAMED_TEMPLATES)
    with explain_system_errors(
        path,
        lambda why: InputError(
            f"--chat-template {path} cannot be read ({why}): expected {names} or a Jinja file"
        ),
        UnicodeDecodeError,
    ):
        if Path(path).stat().st_size > MAX_TEMPLATE_BYTES:
            raise InputError(f"--chat-template {path} has more than {MAX_TEMPLATE_BYTES:,} bytes")
        return Path(path).read_text(encoding="utf-8-sig")


def _find_spellings(template: ChatTemplate) -> list[str]:
    """What the template writes like a special token, such as <|im_end|>."""
    text = template.render(PROBE) + template.render(PROBE, asks=False)
    return list(dict.fromkeys(re.findall(SPECIAL_SPELLING, text)))
