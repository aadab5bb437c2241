"""Every key of a config.json: used, without an effect on logits, or refused by name.

A key that glasslm ignores could change what the model computes. So the tables below list all keys
that a family reads, all keys that change no logits, and the values with which other keys change
none. Any other key is refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from glasslm.errors import InputError
from glasslm.interop.untrusted_json import Values


def _keys(text: str) -> frozenset[str]:
    return frozenset(text.split())


# Keys of every model that change no logits, whatever their value.
HARMLESS_KEYS = _keys("""
    transformers_version dtype torch_dtype name_or_path _name_or_path _commit_hash
    return_dict output_hidden_states output_attentions use_cache id2label label2id
    num_labels problem_type finetuning_task task_specific_params tokenizer_class prefix
    initializer_range is_decoder attn_implementation _attn_implementation
    _attn_implementation_autoset _flash_attn_2_enabled
    gradient_checkpointing use_bfloat16 torchscript tf_legacy_loss bos_token_id eos_token_id
    pad_token_id sep_token_id unk_token_id decoder_start_token_id neftune_noise_alpha
    unsloth_version unsloth_fixed transformers.js_config max_length min_length do_sample
    early_stopping num_beams num_beam_groups diversity_penalty temperature top_k top_p
    typical_p repetition_penalty length_penalty no_repeat_ngram_size
    encoder_no_repeat_ngram_size bad_words_ids num_return_sequences output_scores
    return_dict_in_generate forced_bos_token_id forced_eos_token_id remove_invalid_values
    exponential_decay_length_penalty suppress_tokens begin_suppress_tokens
""")
# Keys of every model that change no logits with these values; null always counts as absent.
COMMON_FIXED: dict[str, tuple[object, ...]] = {
    "is_encoder_decoder": (False,),
    "tie_encoder_decoder": (False,),
    "add_cross_attention": (False,),
    "chunk_size_feed_forward": (0,),
    "pruned_heads": ({},),
}
REASONS = {
    "quantization_config": "glasslm reads no quantized weights. Import the folder with the weights "
    "in 16 or 32 bits",
    "auto_map": "the model needs code of its own, which glasslm never runs. Import a model of "
    "transformers' own classes",
}


@dataclass(frozen=True)
class KeyTable:
    """The keys of one model type: those that are read, and those that are only allowed."""

    architectures: tuple[str, ...]
    used: frozenset[str]
    harmless: frozenset[str] = frozenset()
    fixed: Mapping[str, tuple[object, ...]] = field(default_factory=dict)
    aliases: Mapping[str, str] = field(default_factory=dict)  # another name -> the name in `used`
    equal: Mapping[str, str] = field(default_factory=dict)  # a copy of another key's value


_LLAMA_USED = _keys("""
    model_type vocab_size hidden_size intermediate_size num_hidden_layers
    num_attention_heads num_key_value_heads head_dim hidden_act max_position_embeddings
    rms_norm_eps rope_theta rope_scaling rope_parameters partial_rotary_factor
    attention_dropout tie_word_embeddings layer_types
""")
_NO_BIAS: dict[str, tuple[object, ...]] = {"attention_bias": (False,), "mlp_bias": (False,)}
_ROUTER_LOSS = frozenset({"output_router_logits", "router_aux_loss_coef", "router_jitter_noise"})
_EXPERTS = {"num_experts": "num_local_experts"}

KEY_TABLES: dict[str, KeyTable] = {
    "llama": KeyTable(
        ("LlamaForCausalLM", "LlamaModel"),
        _LLAMA_USED | {"attention_bias", "mlp_bias"},
        # The files of SmolLM have the last two.
        fixed={"pretraining_tp": (1,), "is_llama_config": (True,), "rope_interleaved": (False,)},
        equal={"max_sequence_length": "max_position_embeddings"},
    ),
    "mistral": KeyTable(
        ("MistralForCausalLM", "MistralModel"), _LLAMA_USED | {"sliding_window"}, fixed=_NO_BIAS
    ),
    "mixtral": KeyTable(
        ("MixtralForCausalLM", "MixtralModel"),
        _LLAMA_USED | {"sliding_window", "num_local_experts", "num_experts_per_tok"},
        _ROUTER_LOSS,
        _NO_BIAS,
        _EXPERTS,
    ),
    "qwen3": KeyTable(
        ("Qwen3ForCausalLM", "Qwen3Model"),
        _LLAMA_USED | {"use_sliding_window", "sliding_window", "max_window_layers"},
        fixed=_NO_BIAS,
    ),
    "qwen3_moe": KeyTable(
        ("Qwen3MoeForCausalLM", "Qwen3MoeModel"),
        (_LLAMA_USED - {"intermediate_size"})
        | {"use_sliding_window", "sliding_window", "num_local_experts", "num_experts_per_tok"}
        | {"moe_intermediate_size", "norm_topk_prob", "decoder_sparse_step", "mlp_only_layers"},
        # The first is the width of layers without experts, of which there are none. The second
        # has an effect in Qwen3 only.
        _ROUTER_LOSS | {"intermediate_size", "max_window_layers"},
        _NO_BIAS,
        _EXPERTS,
    ),
    "gpt2": KeyTable(
        ("GPT2LMHeadModel", "GPT2Model"),
        _keys("""
    model_type vocab_size n_embd n_layer n_head n_inner n_positions activation_function
    layer_norm_epsilon resid_pdrop attn_pdrop tie_word_embeddings scale_attn_weights
    scale_attn_by_inverse_layer_idx
"""),
        _keys("""
    embd_pdrop reorder_and_upcast_attn summary_type summary_use_proj summary_activation
    summary_proj_to_labels summary_first_dropout
"""),
        aliases={
            "hidden_size": "n_embd",
            "num_hidden_layers": "n_layer",
            "num_attention_heads": "n_head",
            "max_position_embeddings": "n_positions",
        },
        equal={"n_ctx": "n_positions"},
    ),
}

_ROPE_KEYS = frozenset({"rope_type", "type", "rope_theta", "factor", "partial_rotary_factor"})
_KEYS_OUTSIDE_ROPE = ("rope_theta", "partial_rotary_factor")  # in older files
ROPE_TYPES = ("default", "linear")


def known_values(values: Values) -> Values:
    """The values of a config.json that a family reads, each under one name (rope_parameters).

    Raises InputError, which names the key, for a key that is not in the tables, for one with a
    value that changes the logits, and for two keys that contradict each other.
    """
    kind = values.string("model_type")
    table = KEY_TABLES[kind]
    known: dict[str, Any] = {}
    for key, value in values.values.items():
        if value is None and key in table.used:
            known.setdefault(key, None)  # null has a meaning of its own: no window, for example
        if value is None or key in HARMLESS_KEYS or key in table.harmless or key in table.equal:
            continue
        if key == "architectures":
            _require_architecture(values, table)
        elif key in table.fixed or key in COMMON_FIXED:
            allowed = {**COMMON_FIXED, **table.fixed}[key]
            if not any(_is_same(value, other) for other in allowed):
                raise _unsupported(values, key, " or ".join(map(_as_json, allowed)))
        else:
            name = table.aliases.get(key, key)
            if name not in table.used:
                raise _unknown(values, key, kind)
            if known.get(name) is not None and not _is_same(known[name], value):
                raise _contradiction(values, key, name, known[name])
            known[name] = value
    for key, name in table.equal.items():
        value = values.values.get(key)
        if value is not None and not _is_same(value, known.get(name, value)):
            raise _contradiction(values, key, name, known[name])
    if rope := _known_rope(values).values:
        known |= {"rope_parameters": rope, "rope_scaling": None}
    return Values(values.path, known)


def _known_rope(values: Values) -> Values:
    """The object rope_parameters, or rope_scaling in older files; empty without both.

    Raises InputError for keys in it that glasslm does not know, and where the two objects, or a
    key inside and outside of them, contradict each other.
    """
    names = [name for name in ("rope_parameters", "rope_scaling") if values.object(name)]
    if not names:
        return Values(values.path, {})
    rope = values.object(names[0])
    if len(names) == 2 and values.object(names[1]).values != rope.values:
        raise _contradiction(values, names[1], names[0], rope.values)
    kinds = {rope.string(key) for key in ("rope_type", "type") if rope.values.get(key) is not None}
    if len(kinds) > 1 or not kinds <= set(ROPE_TYPES):
        value = " and ".join(sorted(kind[:100] for kind in kinds))
        raise InputError(
            f"{values.path} has the rope_type {value} in {names[0]}, which glasslm cannot compute: "
            f"expected {' or '.join(ROPE_TYPES)}"
        )
    for key, value in rope.values.items():
        if value is None:
            continue
        if key not in _ROPE_KEYS:
            raise _unknown(rope, key, f"{names[0]} with a rope_type {' or '.join(ROPE_TYPES)}")
        outside = values.values.get(key)
        if key in _KEYS_OUTSIDE_ROPE and outside is not None and not _is_same(outside, value):
            raise _contradiction(values, key, f"{key} in {names[0]}", value)
    if "linear" not in kinds and rope.number("factor", 1.0) != 1:
        raise InputError(
            f"{values.path} has the factor {rope.number('factor'):g} in {names[0]} without the "
            "rope_type linear: expected linear, or no factor"
        )
    return rope


def _require_architecture(values: Values, table: KeyTable) -> None:
    names = values.array("architectures")
    if not all(name in table.architectures for name in names):
        raise _unsupported(values, "architectures", f"[{_as_json(table.architectures[0])}]")


def _is_same(a: object, b: object) -> bool:
    """Whether two JSON values are equal; true is not 1."""
    return a == b and isinstance(a, bool) == isinstance(b, bool)


def _as_json(value: object) -> str:
    text = str(value).lower() if isinstance(value, bool) else repr(value)
    return text if len(text) <= 100 else f"{text[:97]}..."


def _unsupported(values: Values, key: str, expected: str) -> InputError:
    value = _as_json(values.values[key])
    return InputError(
        f"{values.path} has {key} {value}, which glasslm cannot compute: expected {expected}"
    )


def _unknown(values: Values, key: str, owner: str) -> InputError:
    reason = REASONS.get(
        key,
        f"glasslm does not know this key of a {owner}. Remove it from the file if the model does "
        "not use it",
    )
    return InputError(
        f"{values.path} has {key[:100]!r} set to {_as_json(values.values[key])}: {reason}"
    )


def _contradiction(values: Values, key: str, name: str, other: object) -> InputError:
    return InputError(
        f"{values.path} has {key} {_as_json(values.values[key])} and {name} {_as_json(other)}, "
        "which contradict each other: remove the wrong one from the file"
    )
