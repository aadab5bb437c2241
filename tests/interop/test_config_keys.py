"""Every key of a config.json is used, known to be harmless, or refused by its name."""

import json
from pathlib import Path
from typing import Any

import pytest

from glasslm.errors import InputError
from glasslm.interop import families
from glasslm.interop.config_keys import HARMLESS_KEYS, KEY_TABLES, known_values
from glasslm.interop.untrusted_json import Values

transformers = pytest.importorskip("transformers")

CONFIGS = {
    "llama": transformers.LlamaConfig,
    "mistral": transformers.MistralConfig,
    "mixtral": transformers.MixtralConfig,
    "qwen3": transformers.Qwen3Config,
    "qwen3_moe": transformers.Qwen3MoeConfig,
    "gpt2": transformers.GPT2Config,
    "qwen2": transformers.Qwen2Config,
    "smollm3": transformers.SmolLM3Config,
    "gemma": transformers.GemmaConfig,
    "gemma2": transformers.Gemma2Config,
    "gemma3_text": transformers.Gemma3TextConfig,
    "phi": transformers.PhiConfig,
    "phi3": transformers.Phi3Config,
    "gpt_neox": transformers.GPTNeoXConfig,
    "gpt_neo": transformers.GPTNeoConfig,
    "opt": transformers.OPTConfig,
    "starcoder2": transformers.Starcoder2Config,
    "stablelm": transformers.StableLmConfig,
}
LLAMAS = ["llama", "mistral", "mixtral", "qwen2", "qwen3", "qwen3_moe", "smollm3"]


def defaults(kind: str, **changes: Any) -> Values:
    """The config.json of the class's defaults, as save_pretrained writes it."""
    config = json.loads(CONFIGS[kind]().to_json_string(use_diff=False))
    return Values(Path("config.json"), config | changes)


def test_there_is_a_table_for_every_model_type() -> None:
    types = [family.model_type for family in families.FAMILIES]
    assert sorted(KEY_TABLES) == sorted(types) == sorted(CONFIGS)


@pytest.mark.parametrize("kind", CONFIGS)
def test_the_defaults_of_transformers_have_only_known_keys(kind: str) -> None:
    known = known_values(defaults(kind))
    assert known.values.keys() <= KEY_TABLES[kind].used | {"rope_parameters", "rope_scaling"}
    if kind != "qwen3_moe":  # whose gates are not normalized by default
        families.find_family(known).from_hf_config(defaults(kind))


@pytest.mark.parametrize("kind", CONFIGS)
def test_unknown_keys_are_refused_by_name(kind: str) -> None:
    for key, value in (
        ("a_key_of_tomorrow", 1),
        ("logit_scale", 2.0),
        ("sliding_windows", False),
        ("quantization_config", {"quant_method": "gptq", "bits": 4}),
        ("auto_map", {"AutoModelForCausalLM": "modeling.Mine"}),
        ("per_layer_config", {"0": {"num_attention_heads": 2}}),
        ("kv_lora_rank", 8),
        ("experts_implementation", "another/kernel"),
    ):
        with pytest.raises(InputError, match=key):
            known_values(defaults(kind, **{key: value}))
        assert known_values(defaults(kind, **{key: None})) == known_values(defaults(kind))


@pytest.mark.parametrize("kind", CONFIGS)
def test_no_key_of_another_family_is_taken_without_a_word(kind: str) -> None:
    """Each key of any table passes as used or harmless, and is refused by name in all others."""
    own = KEY_TABLES[kind]
    for table in KEY_TABLES.values():
        for key in table.used | table.harmless | table.fixed.keys() | table.aliases.keys():
            if key in {*own.used, *own.harmless, *own.aliases, *own.equal, *HARMLESS_KEYS}:
                continue
            with pytest.raises(InputError, match=key):
                known_values(defaults(kind, **{key: "strange"}))


@pytest.mark.parametrize(
    ("kind", "key", "value"),
    [
        ("llama", "pretraining_tp", 2),
        ("llama", "pretraining_tp", True),
        ("llama", "rope_interleaved", True),
        ("mistral", "attention_bias", True),
        ("qwen3", "attention_bias", True),
        ("qwen3_moe", "mlp_bias", True),
        ("gpt2", "add_cross_attention", True),
        ("gpt2", "is_encoder_decoder", True),
        ("mixtral", "chunk_size_feed_forward", 8),
        ("llama", "architectures", ["LlamaForSequenceClassification"]),
        ("llama", "sliding_window", 5),
        ("mistral", "use_sliding_window", True),
        ("gpt2", "num_key_value_heads", 2),
    ],
)
def test_keys_with_an_effect_are_refused(kind: str, key: str, value: object) -> None:
    with pytest.raises(InputError, match=key):
        known_values(defaults(kind, **{key: value}))


LINEAR = {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}
YARN = LINEAR | {"rope_type": "yarn"}


@pytest.mark.parametrize("kind", LLAMAS)
@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"rope_scaling": {"rope_type": "linear", "factor": 2.0}}, "rope_scaling.*rope_parameters"),
        ({"rope_theta": 5e5}, "rope_theta"),
        ({"rope_parameters": LINEAR | {"type": "default"}}, "rope_type"),
        ({"rope_parameters": LINEAR | {"rope_type": "longrope"}}, "rope_type longrope"),
        ({"rope_parameters": LINEAR | {"rope_type": "llama3"}}, "low_freq_factor"),
        ({"rope_parameters": YARN | {"truncate": False}}, "truncate"),
        ({"rope_parameters": YARN | {"attention_factor": 0.0}}, "attention_factor 0"),
        (
            {"rope_parameters": YARN | {"factor": 1, "attention_factor": 1.5}},
            "factor 1.5, .* 1 where",
        ),
        ({"rope_parameters": LINEAR | {"factor": 0.5}}, "factor"),
        ({"rope_parameters": LINEAR | {"attention_factor": 1.3}}, "attention_factor"),
        ({"rope_parameters": LINEAR | {"a_key_of_tomorrow": {}}}, "a_key_of_tomorrow"),
        ({"rope_parameters": LINEAR | {"partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"rope_parameters": {"rope_type": "default", "factor": 2.0}}, "factor"),
        ({"rope_parameters": {"rope_type": "linear"}}, "factor"),
        ({"rope_parameters": {"full_attention": LINEAR}}, "full_attention"),
    ],
)
def test_rope_settings_are_understood_or_refused(
    kind: str, changes: dict[str, Any], words: str
) -> None:
    values = defaults(kind, **changes)
    with pytest.raises(InputError, match=words):
        families.find_family(values).from_hf_config(values)


@pytest.mark.parametrize("kind", ["llama", "mistral", "mixtral"])
def test_both_spellings_of_rope_may_be_there_if_they_agree(kind: str) -> None:
    for changes in (
        {"rope_parameters": LINEAR, "rope_scaling": LINEAR},
        {"rope_parameters": None, "rope_scaling": {"type": "linear", "factor": 2.0}},
        {"rope_parameters": LINEAR, "rope_scaling": None, "rope_theta": 1e4},
        {"rope_parameters": {}, "rope_scaling": LINEAR},
    ):
        values = defaults(kind, **changes)
        config = families.find_family(values).from_hf_config(values)
        assert (config.rope_scaling, config.rope_factor) == ("linear", 2.0)


@pytest.mark.parametrize(
    "changes", [{"attention_factor": 1.0}, {"mscale": 0.7, "mscale_all_dim": 1.1}]
)
def test_yarn_of_factor_1_scales_nothing(changes: dict[str, float]) -> None:
    values = defaults("llama", rope_parameters=YARN | {"factor": 1.0} | changes)
    config = families.find_family(values).from_hf_config(values)
    assert (config.rope_scaling, config.rope_attention_factor) == ("none", 0.0)


@pytest.mark.parametrize(
    ("kind", "first", "second"),
    [
        ("gpt2", "n_embd", "hidden_size"),
        ("gpt2", "n_layer", "num_hidden_layers"),
        ("gpt2", "n_positions", "n_ctx"),
        ("mixtral", "num_local_experts", "num_experts"),
        ("qwen3_moe", "num_local_experts", "num_experts"),
        ("llama", "max_position_embeddings", "max_sequence_length"),
    ],
)
def test_two_spellings_of_a_key_may_not_contradict(kind: str, first: str, second: str) -> None:
    value = defaults(kind).values[first]
    assert known_values(defaults(kind, **{second: value})) == known_values(defaults(kind))
    with pytest.raises(InputError, match=second):
        known_values(defaults(kind, **{second: value + 1}))


FULL, SLIDING = ["full_attention"], ["sliding_attention"]


@pytest.mark.parametrize(
    ("kind", "changes", "window"),
    [
        ("llama", {"layer_types": FULL * 32}, 0),
        ("llama", {"layer_types": SLIDING * 32}, None),
        ("mistral", {"layer_types": SLIDING * 32}, 4096),
        ("mistral", {"layer_types": FULL * 32}, None),  # transformers has the window all the same
        ("mistral", {"layer_types": FULL * 32, "sliding_window": None}, 0),
        ("mixtral", {"layer_types": SLIDING * 32}, None),
        ("qwen3", {"use_sliding_window": True, "sliding_window": 8}, 0),  # as layer_types says
        ("qwen3", {"layer_types": SLIDING * 32}, None),
        (
            "qwen3",
            {"layer_types": SLIDING * 32, "use_sliding_window": True, "sliding_window": 8},
            8,
        ),
        ("qwen3", {"layer_types": FULL * 31}, None),
        ("qwen3", {"layer_types": ["linear_attention"] * 32}, None),
    ],
)
def test_layer_types_count_only_where_transformers_reads_them(
    kind: str, changes: dict[str, Any], window: int | None
) -> None:
    values = defaults(kind, **changes)
    family = families.find_family(values)
    if window is None:
        with pytest.raises(InputError, match="layer_types"):
            family.from_hf_config(values)
    else:
        assert family.from_hf_config(values).window == window
