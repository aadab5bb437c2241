"""The keys of config.json by model type: those that are read, and those without an effect."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


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
    rope_types: tuple[str, ...] = ("default", "linear", "dynamic", "yarn", "llama3")
    rope_by_layer_type: bool = False  # whether rope_parameters may have an object for each type
    partial_rotary: bool = False  # whether partial_rotary_factor has an effect


_LLAMA_USED = _keys("""
    model_type vocab_size hidden_size intermediate_size num_hidden_layers
    num_attention_heads num_key_value_heads head_dim hidden_act max_position_embeddings
    rms_norm_eps rope_theta rope_scaling rope_parameters partial_rotary_factor
    attention_dropout tie_word_embeddings layer_types
""")
_NO_BIAS: dict[str, tuple[object, ...]] = {"attention_bias": (False,), "mlp_bias": (False,)}
_ROUTER_LOSS = frozenset({"output_router_logits", "router_aux_loss_coef", "router_jitter_noise"})
_EXPERTS = {"num_experts": "num_local_experts"}

_GEMMA_HARMLESS = _keys("cache_implementation")
_GEMMA2_USED = _LLAMA_USED - {"hidden_act"} | {
    "hidden_activation", "attention_bias", "query_pre_attn_scalar", "sliding_window",
    "attn_logit_softcapping", "final_logit_softcapping",
}  # fmt: skip
_LAYERNORM_USED = _LLAMA_USED - {"head_dim", "rms_norm_eps", "layer_types"}

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
    "qwen2": KeyTable(
        ("Qwen2ForCausalLM", "Qwen2Model"),
        _LLAMA_USED | {"use_sliding_window", "sliding_window", "max_window_layers"},
        fixed={"mlp_bias": (False,)},
    ),
    "smollm3": KeyTable(
        ("SmolLM3ForCausalLM", "SmolLM3Model"),
        _LLAMA_USED
        | {"attention_bias", "mlp_bias", "use_sliding_window"}
        | {"sliding_window", "no_rope_layers", "no_rope_layer_interval"},
        _keys("max_window_layers pretraining_tp"),
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
    "gemma": KeyTable(
        ("GemmaForCausalLM", "GemmaModel"),
        _LLAMA_USED - {"layer_types"} | {"attention_bias"},
        _GEMMA_HARMLESS,
        {"use_bidirectional_attention": (False,), "hidden_activation": ("gelu_pytorch_tanh",)},
    ),
    "gemma2": KeyTable(
        ("Gemma2ForCausalLM", "Gemma2Model"),
        _GEMMA2_USED,
        _GEMMA_HARMLESS | {"hidden_act"},  # the class reads hidden_activation
        {"use_bidirectional_attention": (False,)},
        equal={"sliding_window_size": "sliding_window"},
    ),
    "gemma3_text": KeyTable(
        ("Gemma3ForCausalLM", "Gemma3TextModel"),
        _GEMMA2_USED - {"attn_logit_softcapping", "final_logit_softcapping"}
        | {"sliding_window_pattern", "rope_local_base_freq"},
        _GEMMA_HARMLESS | {"hidden_act"},
        {
            "use_bidirectional_attention": (False,),
            "attn_logit_softcapping": (),
            "final_logit_softcapping": (),
        },
        {"_sliding_window_pattern": "sliding_window_pattern"},
        rope_by_layer_type=True,
    ),
    "phi3": KeyTable(
        ("Phi3ForCausalLM", "Phi3Model"),
        _LLAMA_USED - {"head_dim", "layer_types"} | {"sliding_window", "resid_pdrop"},
        _keys("embd_pdrop original_max_position_embeddings"),
        _NO_BIAS,
        rope_types=("default",),
        partial_rotary=True,
    ),
    "gpt_neox": KeyTable(
        ("GPTNeoXForCausalLM", "GPTNeoXModel"),
        _LAYERNORM_USED - {"num_key_value_heads"}
        | {"layer_norm_eps", "hidden_dropout", "use_parallel_residual", "attention_bias"},
        _keys("classifier_dropout"),
        aliases={"rotary_pct": "partial_rotary_factor", "rotary_emb_base": "rope_theta"},
        partial_rotary=True,
    ),
    "phi": KeyTable(
        ("PhiForCausalLM", "PhiModel"),
        _LAYERNORM_USED | {"layer_norm_eps", "resid_pdrop"},
        _keys("embd_pdrop"),
        {"qk_layernorm": (False,)},
        partial_rotary=True,
    ),
    "stablelm": KeyTable(
        ("StableLmForCausalLM", "StableLmModel"),
        _LAYERNORM_USED
        | {"layer_norm_eps", "hidden_dropout", "use_parallel_residual", "use_qkv_bias"},
        fixed={"qk_layernorm": (False,)},
        partial_rotary=True,
    ),
    "starcoder2": KeyTable(
        ("Starcoder2ForCausalLM", "Starcoder2Model"),
        _LAYERNORM_USED | {"norm_epsilon", "residual_dropout", "use_bias", "sliding_window"},
        _keys("embedding_dropout attention_softmax_in_fp32 scale_attention_softmax_in_fp32"),
        {"norm_type": ("layer_norm",), "mlp_type": ("default",), "scale_attn_weights": (True,)},
    ),
    "gpt_neo": KeyTable(
        ("GPTNeoForCausalLM", "GPTNeoModel"),
        _keys("""
    model_type vocab_size hidden_size num_layers num_heads intermediate_size
    max_position_embeddings window_size activation_function layer_norm_epsilon resid_dropout
    attention_dropout attention_types attention_layers tie_word_embeddings
"""),
        _keys("""
    embed_dropout classifier_dropout summary_type summary_use_proj summary_activation
    summary_proj_to_labels summary_first_dropout
"""),
        aliases={"num_hidden_layers": "num_layers", "num_attention_heads": "num_heads"},
    ),
    "opt": KeyTable(
        ("OPTForCausalLM", "OPTModel"),
        _keys("""
    model_type vocab_size hidden_size word_embed_proj_dim num_hidden_layers
    num_attention_heads ffn_dim max_position_embeddings activation_function
    do_layer_norm_before dropout attention_dropout enable_bias tie_word_embeddings
"""),
        _keys("init_std layerdrop activation_dropout"),
        {"_remove_final_layer_norm": (False,), "layer_norm_elementwise_affine": (True,)},
    ),
}
