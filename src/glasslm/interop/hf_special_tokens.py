"""Roles of special tokens (bos, eos, pad) and the chat template, in files of transformers.

run.json of an imported run keeps them under tokenizer.transformers, and an export writes them back.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from glasslm import files, strict_json
from glasslm.data.tokenizers import Tokenizer
from glasslm.errors import DamagedError

TOKENIZER_CONFIG_FILE, SPECIAL_TOKENS_FILE = "tokenizer_config.json", "special_tokens_map.json"
GENERATION_FILE, CHAT_TEMPLATE_FILE = "generation_config.json", "chat_template.jinja"
END_OF_TEXT_TOKENS = ("<|endoftext|>", "</s>")  # GPT-2's and Llama's
ROLES = ("bos_token", "eos_token", "pad_token", "unk_token", "sep_token", "cls_token", "mask_token")
ID_ROLES = ("bos_token", "eos_token", "pad_token")  # those with an id in config.json
MAX_CHAT_TEMPLATE_BYTES = 1 << 20  # the longest known ones have 20 kB

# {role: token}, and where known "chat_template", "generation_eos_ids", "split_special_tokens",
# "padding_side", and the tokens that transformers puts around each text: "added_before" and
# "added_after". glasslm itself adds none.
TokenSettings = dict[str, Any]


def default_settings(tokenizer: Tokenizer) -> TokenSettings:
    """The roles of the special tokens of a model that glasslm trained.

    The token that ends a document also stands before the next one, and pads. A model that was
    trained without special tokens reads those of its vocabulary as ordinary text.
    """
    if tokenizer.special_tokens:
        return dict.fromkeys(ID_ROLES, next(iter(tokenizer.special_tokens)))
    known = [token for token in END_OF_TEXT_TOKENS if token in tokenizer.unused_special_tokens]
    roles: TokenSettings = dict.fromkeys(("bos_token", "eos_token"), known[0]) if known else {}
    return roles | ({"split_special_tokens": True} if tokenizer.unused_special_tokens else {})


def role_ids(settings: TokenSettings, ids: dict[str, int]) -> dict[str, int | None]:
    """bos_token_id, eos_token_id and pad_token_id, null where no token has the role.

    `ids`: token -> id of the vocabulary.
    """
    return {f"{role}_id": ids.get(settings.get(role, "")) for role in ID_ROLES}


def settings_files(
    settings: TokenSettings, special_tokens: list[str], others: dict[str, Any]
) -> dict[str, bytes]:
    """Name -> content of the files that transformers reads.

    `special_tokens`: all of the vocabulary. `others`: further settings of tokenizer_config.json.
    """
    roles = {role: settings[role] for role in ROLES if settings.get(role)}
    additional = [token for token in special_tokens if token not in roles.values()]
    token_map = roles | ({"additional_special_tokens": additional} if additional else {})
    config = others | token_map
    if settings.get("split_special_tokens"):
        config["split_special_tokens"] = True
    if settings.get("padding_side"):
        config["padding_side"] = settings["padding_side"]
    contents = {TOKENIZER_CONFIG_FILE: strict_json.json_bytes(config)}
    if token_map:
        contents[SPECIAL_TOKENS_FILE] = strict_json.json_bytes(token_map)
    if template := settings.get("chat_template"):
        contents[CHAT_TEMPLATE_FILE] = template.encode()
    return contents


def read_settings(
    folder: Path, config: dict[str, Any], ids: dict[str, int], post_processor: Any = None
) -> TokenSettings:
    """The roles, chat template and generation ids in a model folder of transformers.

    `config` is the content of config.json, `ids` token -> id, `post_processor` that of
    tokenizer.json. Values of another type are ignored, as is a token that the vocabulary does not
    have. Raises DamagedError for a damaged file, also for a post-processor that gives no text once.
    """
    tokenizer_config = _read_object(folder / TOKENIZER_CONFIG_FILE)
    token_map = _read_object(folder / SPECIAL_TOKENS_FILE)
    generation = _read_object(folder / GENERATION_FILE)
    tokens = {i: token for token, i in ids.items()}
    settings: TokenSettings = {}
    for role in ROLES:
        named = [_content(source.get(role)) for source in (tokenizer_config, token_map)]
        numbered = [source.get(f"{role}_id") for source in (generation, config)]
        candidates = [*named, *(tokens.get(i, "") for i in numbered if type(i) is int)]
        token = next((token for token in candidates if token in ids), "")
        if token:
            settings[role] = token
    if tokenizer_config.get("split_special_tokens") is True:
        settings["split_special_tokens"] = True
    if (side := tokenizer_config.get("padding_side")) in ("left", "right"):
        settings["padding_side"] = side
    around = _template_tokens(post_processor or {}, folder / "tokenizer.json")
    settings |= _added_tokens(settings, tokenizer_config, around, ids)
    if template := _chat_template(folder, tokenizer_config):
        settings["chat_template"] = template
    ends = _ids(generation, "eos_token_id") or _ids(config, "eos_token_id")
    ends = [i for i in ends if i in tokens]
    if ends and [tokens[i] for i in ends] != [settings.get("eos_token")]:
        settings["generation_eos_ids"] = ends
    return settings


def add_listed_tokens(content: dict[str, Any], folder: Path) -> dict[str, int]:
    """Add to a tokenizer.json the tokens that tokenizer_config.json lists; returns the new ids.

    transformers does the same. Of a token that both files have, the options of
    tokenizer_config.json count. `content`, of tokenizer.json, is changed. Entries of another form
    are ignored.
    """
    decoder = _read_object(folder / TOKENIZER_CONFIG_FILE).get("added_tokens_decoder")
    tokens = {token["content"]: token for token in content.get("added_tokens") or []}
    new = {}
    for key, entry in decoder.items() if isinstance(decoder, dict) else ():
        if not (isinstance(entry, dict) and _content(entry) and re.fullmatch(r"[0-9]{1,9}", key)):
            continue
        text, special = _content(entry), entry.get("special") is True
        options = {name: entry.get(name) is True for name in ("single_word", "lstrip", "rstrip")}
        options |= {"normalized": entry.get("normalized", not special) is True, "special": special}
        if text not in tokens:
            new[text] = int(key)
        tokens[text] = {"id": tokens.get(text, {}).get("id", int(key)), "content": text, **options}
    if decoder:
        content["added_tokens"] = sorted(tokens.values(), key=lambda token: token["id"])
    return new


def _added_tokens(
    settings: TokenSettings,
    tokenizer_config: dict[str, Any],
    around: tuple[list[str], list[str]],
    ids: dict[str, int],
) -> TokenSettings:
    """The tokens before and after each text of AutoTokenizer, where there are any.

    add_bos_token and add_eos_token of tokenizer_config.json win over those of the post-processor,
    which are `around`.
    """
    before, after = around
    flags = [tokenizer_config.get(name) for name in ("add_bos_token", "add_eos_token")]
    if any(type(flag) is bool for flag in flags):
        before, after = (
            [settings[role]] if flag is True and role in settings else []
            for flag, role in zip(flags, ("bos_token", "eos_token"))
        )
    named = {"added_before": before, "added_after": after}
    return {name: tokens for name, tokens in named.items() if tokens and ids.keys() >= set(tokens)}


def _template_tokens(step: dict[str, Any], file: Path) -> tuple[list[str], list[str]]:
    """The tokens that a post-processor of the tokenizers library puts before and after a text.

    The library has checked its types. It accepts templates with which it then panics.
    """
    match step.get("type"):
        case "Sequence":
            before: list[str] = []
            after: list[str] = []
            for part in step["processors"]:
                first, last = _template_tokens(part, file)
                before, after = [*first, *before], [*after, *last]
            return before, after
        case "TemplateProcessing":
            single, known = step["single"], step["special_tokens"]
            texts = [i for i, piece in enumerate(single) if "Sequence" in piece]
            if len(texts) != 1 or single[texts[0]]["Sequence"]["id"] != "A":
                raise DamagedError(
                    f"{file} is damaged: 'single' of its post_processor has {len(texts)} texts, "
                    "expected the text A once"
                )
            names = [piece["SpecialToken"]["id"] for piece in single if "SpecialToken" in piece]
            if unknown := [name for name in names if name not in known]:
                raise DamagedError(
                    f"{file} is damaged: 'special_tokens' of its post_processor has no "
                    f"{unknown[0]!r}, which 'single' adds"
                )
            sides = names[: texts[0]], names[texts[0] :]
            first, last = (
                [token for name in side for token in known[name]["tokens"]] for side in sides
            )
            return first, last
        case "BertProcessing" | "RobertaProcessing":
            return [step["cls"][0]], [step["sep"][0]]
    return [], []


def _ids(source: dict[str, Any], name: str) -> list[int]:
    """One id or several, as a list; empty for anything else."""
    value = source.get(name)
    ids: list[Any] = value if isinstance(value, list) else [value]
    return ids if all(type(i) is int for i in ids) else []


def _read_object(path: Path) -> dict[str, Any]:
    """A JSON object; empty where the file is missing or holds something else."""
    content = files.read_json(path) if path.is_file() else {}
    return content if isinstance(content, dict) else {}


def _content(token: Any) -> str:
    """The text of a special token, which is a string or an object; "" for anything else."""
    text = token.get("content") if isinstance(token, dict) else token
    return text if isinstance(text, str) else ""


def _chat_template(folder: Path, tokenizer_config: dict[str, Any]) -> str:
    path = folder / CHAT_TEMPLATE_FILE
    if path.is_file():
        if path.stat().st_size > MAX_CHAT_TEMPLATE_BYTES:
            raise DamagedError(
                f"{path} has {path.stat().st_size:,} bytes: expected at most "
                f"{MAX_CHAT_TEMPLATE_BYTES:,}"
            )
        try:
            return path.read_text(encoding="utf-8-sig")
        except UnicodeDecodeError as error:
            raise DamagedError(f"{path} is damaged: it is not UTF-8 ({error})") from None
    template = tokenizer_config.get("chat_template")
    if isinstance(template, list):  # several, by name
        named = {t.get("name"): t.get("template") for t in template if isinstance(t, dict)}
        template = named.get("default")
    return template if isinstance(template, str) else ""
