"""Tokenizer, special tokens and chat template of each model family survive an import and an export.

transformers makes the models and the tokenizers, which are small and of the kind of each family.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

import transformers
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

import glasslm
from glasslm.data.chat.chat_template import ChatTemplate
from glasslm.data.tokenizers import SubwordTokenizer
from glasslm.interop import families, hf
from glasslm.interop.model_export import load_export
from glasslm.interop.model_import import import_model
from small_runs import read_json

TEXT = "The cat's hat sat there.\n\nIt cost 1234,  naïve 語🎭 the cat \t.\n"
TEMPLATE = (
    "{{ bos_token or '' }}{% for message in messages %}{{ message['role'] }}: "
    "{{ message['content'] }}{{ eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
MESSAGES = [{"role": "user", "content": "the cat"}, {"role": "assistant", "content": "sat"}]
END = "<|endoftext|>"
ROLES = ("bos_token", "eos_token", "pad_token", "unk_token")


def train_byte_level() -> tuple[dict[str, int], list[tuple[str, str]]]:
    """The vocabulary and the merges of a byte-level BPE of 280 tokens."""
    library = Tokenizer(models.BPE())
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=280, initial_alphabet=alphabet, show_progress=False)
    library.train_from_iterator([TEXT] * 4, trainer)
    model = json.loads(library.to_str())["model"]
    return model["vocab"], [tuple(pair) for pair in model["merges"]]


VOCABULARY, MERGES = train_byte_level()
WITH_END = VOCABULARY | {END: len(VOCABULARY)}


def sentencepiece(special: list[str]) -> dict[str, Any]:
    """The vocabulary and the merges of a BPE with byte fallback, as SentencePiece's."""
    letters = sorted({character for character in TEXT if character.isascii()} - set(" \n\t"))
    merges = [("▁", "t"), ("h", "e"), ("▁t", "he"), ("a", "t"), ("▁", "s"), ("▁s", "at")]
    pieces = ["▁", *letters, *map("".join, merges)]
    tokens = dict.fromkeys([*special, *(f"<0x{byte:02X}>" for byte in range(256)), *pieces])
    return {"vocab": {token: i for i, token in enumerate(tokens)}, "merges": merges}


def gpt2() -> Any:
    return transformers.GPT2Tokenizer(vocab=WITH_END, merges=MERGES)


def opt() -> Any:
    special = {"<s>": 0, "<pad>": 1, "</s>": 2, "<unk>": 3}
    vocabulary = special | {token: i + 4 for token, i in VOCABULARY.items()}
    return transformers.GPT2Tokenizer(
        vocab=vocabulary, merges=MERGES, bos_token="</s>", eos_token="</s>", unk_token="</s>",
        pad_token="<pad>", add_bos_token=True,
    )  # fmt: skip


def gpt_neox() -> Any:
    return transformers.GPTNeoXTokenizer(vocab=WITH_END, merges=MERGES)


def qwen() -> Any:
    tokenizer = transformers.Qwen2Tokenizer(vocab=WITH_END, merges=MERGES)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    return tokenizer


def llama2() -> Any:
    return transformers.LlamaTokenizer(
        **sentencepiece(["<unk>", "<s>", "</s>"]), add_bos_token=True, padding_side="left"
    )


def gemma() -> Any:
    special = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "<start_of_turn>", "<end_of_turn>"]
    tokenizer = transformers.GemmaTokenizer(**sentencepiece(special), add_bos_token=True)
    tokenizer.add_special_tokens({"additional_special_tokens": special[5:]})
    return tokenizer


def llama3() -> Any:
    """Byte-level BPE with a pattern of its own, and a post-processor that adds the beginning."""
    library = Tokenizer(models.BPE(VOCABULARY, MERGES, ignore_merges=True))
    pattern = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s+(?!\S)|\s+"
    library.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(pattern), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ])  # fmt: skip
    library.decoder = decoders.ByteLevel()
    begin, end = "<|begin_of_text|>", "<|eot_id|>"
    library.add_special_tokens([begin, "<|end_of_text|>", end])
    library.post_processor = processors.Sequence([
        processors.ByteLevel(trim_offsets=False),
        processors.TemplateProcessing(
            single=f"{begin} $A", pair=f"{begin} $A {begin} $B",
            special_tokens=[(begin, library.token_to_id(begin))],
        ),
    ])  # fmt: skip
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=library, bos_token=begin, eos_token=end
    )


WIDTH: dict[str, Any] = {
    "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
    "max_position_embeddings": 64,
}  # fmt: skip
GATED: dict[str, Any] = WIDTH | {"intermediate_size": 16, "num_key_value_heads": 2}
ONE_LAYER: dict[str, Any] = {"num_layers": 1, "attention_types": [[["global"], 1]], "num_heads": 2}
EXPERTS: dict[str, Any] = {"num_experts": 2, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
# The tokenizer of the family's models, and the sizes of a tiny one.
FAMILIES: dict[str, tuple[Callable[[], Any], dict[str, Any]]] = {
    "llama": (llama3, GATED),
    "llama, 2": (llama2, GATED),
    "mistral": (llama2, GATED | {"sliding_window": None}),
    "mixtral": (llama2, GATED | {"sliding_window": None, "num_local_experts": 2}),
    "qwen2": (qwen, GATED),
    "qwen3": (qwen, GATED | {"head_dim": 8}),
    "qwen3_moe": (qwen, GATED | EXPERTS | {"head_dim": 8, "norm_topk_prob": True}),
    "smollm3": (llama3, GATED),
    "gpt2": (gpt2, {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 64}),
    "gemma": (gemma, GATED | {"head_dim": 8}),
    "gemma2": (gemma, GATED | {"head_dim": 8, "sliding_window": 64}),
    "gemma3_text": (gemma, GATED | {"head_dim": 8, "sliding_window": 64}),
    "phi3": (llama2, GATED | {"sliding_window": None}),
    "gpt_neox": (gpt_neox, WIDTH | {"intermediate_size": 16}),
    "starcoder2": (gpt2, GATED | {"sliding_window": None}),
    "phi": (gpt2, GATED),
    "stablelm": (gpt_neox, GATED),
    "gpt_neo": (gpt2, {"hidden_size": 16, "max_position_embeddings": 64} | ONE_LAYER),
    "opt": (opt, WIDTH | {"ffn_dim": 16, "word_embed_proj_dim": 16}),
}


def save_model(model_type: str, folder: Path, tokenizer: Any, sizes: dict[str, Any]) -> list[int]:
    """A random model with its tokenizer and chat template; returns the ids that end its texts."""
    ids = {f"{role}_id": getattr(tokenizer, f"{role}_id") for role in ROLES[:3]}
    config: Any = transformers.AutoConfig.for_model(
        model_type, vocab_size=len(tokenizer), **ids, **sizes
    )
    model: Any = transformers.AutoModelForCausalLM.from_config(config)
    ends = [ids["eos_token_id"], 5]
    model.generation_config.eos_token_id = ends
    model.save_pretrained(folder)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    return ends


def test_every_family_is_tried() -> None:
    types = {name.split(",")[0] for name in FAMILIES}
    assert types == {family.model_type for family in families.FAMILIES}


@pytest.mark.parametrize("name", FAMILIES)
def test_tokenizer_special_tokens_and_template_come_back(name: str, tmp_path: Path) -> None:
    make, sizes = FAMILIES[name]
    model_type = name.split(",")[0]
    ends = save_model(model_type, tmp_path / "theirs", make(), sizes)
    notes: list[str] = []
    import_model(tmp_path / "theirs", None, tmp_path / "run", "", notes.append)
    hf.write(load_export(str(tmp_path / "run")), tmp_path / "back")

    auto = transformers.AutoTokenizer
    before, after = (auto.from_pretrained(tmp_path / name) for name in ("theirs", "back"))
    texts = [TEXT, "", f"{before.bos_token or ''}the cat{before.eos_token}{TEXT}", " sat"]
    for text in texts:
        ids = before(text)["input_ids"]
        assert after(text)["input_ids"] == ids
        assert after(text, "cat")["input_ids"] == before(text, "cat")["input_ids"]
        assert after.decode(ids) == before.decode(ids)
        assert after.decode(ids, skip_special_tokens=True) == before.decode(
            ids, skip_special_tokens=True
        )
        plain = before(text, add_special_tokens=False)["input_ids"]
        assert glasslm.load(tmp_path / "run").tokenizer.encode(text).tolist() == plain
    for role in ROLES:
        assert getattr(after, role) == getattr(before, role)
        assert getattr(after, f"{role}_id") == getattr(before, f"{role}_id")
    note = f"begins each text of this model with {before.bos_token}"
    assert bool(before("")["input_ids"]) == any(note in message for message in notes)

    assert after.chat_template == before.chat_template == TEMPLATE
    for asks in (False, True):
        rendered = before.apply_chat_template(MESSAGES, tokenize=False, add_generation_prompt=asks)
        assert rendered == after.apply_chat_template(
            MESSAGES, tokenize=False, add_generation_prompt=asks
        )
    for file, expected in (("config.json", ends), ("generation_config.json", ends)):
        written = read_json(tmp_path / "back" / file)
        assert written["eos_token_id"] == expected
        assert written["bos_token_id"] == before.bos_token_id
        assert written["pad_token_id"] == before.pad_token_id
    assert read_json(tmp_path / "back" / "config.json")["model_type"] == model_type


@pytest.mark.parametrize("make", [llama2, gemma], ids=("Prepend", "no prefix"))
def test_a_chat_has_the_ids_of_transformers(make: Callable[[], Any]) -> None:
    """Also where the tokenizer writes a space before a text: an answer is no text of its own."""
    theirs = make()
    theirs.chat_template = TEMPLATE
    settings = {"chat_template": TEMPLATE} | {role: getattr(theirs, role) for role in ROLES}
    tokenizer = SubwordTokenizer(theirs.backend_tokenizer.to_str())
    chat = ChatTemplate(settings, tokenizer)
    talk = [*MESSAGES, {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "a hat"}]
    for messages in (talk[:1], talk[:3]):
        ids = theirs.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        assert chat.encode_prompt(messages) == ids
    ids, is_answer = chat.encode_conversation(talk)
    assert ids.tolist() == theirs.apply_chat_template(talk, return_dict=False)
    answers = theirs.decode(ids[is_answer]).replace(" ", "")
    assert answers == f"sat{theirs.eos_token}ahat{theirs.eos_token}"

    talk[2]["content"] = f"the {theirs.eos_token} cat"
    spelled, is_spelled_answer = chat.encode_conversation(talk)
    assert (spelled == theirs.eos_token_id).sum() == (ids == theirs.eos_token_id).sum()
    assert spelled[is_spelled_answer].tolist() == ids[is_answer].tolist()
    text = theirs.apply_chat_template(talk, tokenize=False)
    assert theirs.decode(spelled).replace(" ", "") == text.replace(" ", "")
