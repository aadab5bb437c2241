"""Each model family of transformers: models that transformers made compute the same here, in both
engines, and are the same there after they were written again.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

import torch
import transformers

from glasslm.config.schema import RunConfig
from glasslm.data.tokenizers import CharTokenizer
from glasslm.engines.torch.engine import TorchEngine
from glasslm.errors import InputError
from glasslm.interop import families, hf, hf_tokenizer
from glasslm.interop.model_export import ModelExport, compute_logits, largest_difference
from glasslm.interop.untrusted_json import Values
from glasslm.runs.run_folder import Run

ALPHABET = "".join(map(chr, range(48, 48 + 37)))
V, T = 37, 24
TOLERANCE = 1e-5  # of logits in float32, as a share of the largest
IDS: dict[str, Any] = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
SIZES: dict[str, Any] = {
    "vocab_size": V, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3,
    "num_attention_heads": 4, "max_position_embeddings": T, **IDS,
}  # fmt: skip
SHARED: dict[str, Any] = SIZES | {"num_key_value_heads": 2}
GPT_NEO: dict[str, Any] = IDS | {
    "vocab_size": V, "hidden_size": 32, "num_layers": 4, "num_heads": 4,
    "max_position_embeddings": T, "attention_types": [[["global", "local"], 2]], "window_size": 5,
}  # fmt: skip
OPT: dict[str, Any] = {
    name: SIZES[name] for name in SIZES if name not in ("intermediate_size",)
} | {"ffn_dim": 48}
LLAMA3: dict[str, Any] = {
    "rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 12, "rope_theta": 50.0,
}  # fmt: skip
YARN: dict[str, Any] = {
    "rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 12,
    "rope_theta": 100.0,
}  # fmt: skip
GEMMA3_ROPE: dict[str, Any] = {
    "full_attention": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4},
    "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
}
MODELS: dict[str, Any] = {
    "llama, as 3.2": transformers.LlamaConfig(
        **SHARED, head_dim=12, rope_parameters=LLAMA3, tie_word_embeddings=True
    ),
    "llama, biases": transformers.LlamaConfig(**SHARED, attention_bias=True, hidden_act="gelu"),
    "llama, yarn": transformers.LlamaConfig(**SHARED, rope_parameters=YARN),
    "llama, yarn of other numbers": transformers.LlamaConfig(
        **SHARED,
        rope_parameters=YARN
        | {"mscale": 0.7, "mscale_all_dim": 1.1, "beta_fast": 4, "beta_slow": 0.2},
    ),
    "llama, dynamic": transformers.LlamaConfig(
        **SHARED, rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 100.0}
    ),
    "smollm3": transformers.SmolLM3Config(**SHARED, no_rope_layer_interval=2),
    "qwen2": transformers.Qwen2Config(**SHARED),
    "qwen2, windows": transformers.Qwen2Config(
        **SHARED, use_sliding_window=True, sliding_window=5, max_window_layers=1
    ),
    "qwen3, wide heads": transformers.Qwen3Config(**SHARED, head_dim=12, tie_word_embeddings=True),
    "qwen3, windows": transformers.Qwen3Config(
        **SHARED, head_dim=6, use_sliding_window=True, sliding_window=5, max_window_layers=1
    ),
    "gpt_neox": transformers.GPTNeoXConfig(**SIZES),
    "gpt_neox, serial": transformers.GPTNeoXConfig(
        **SIZES, use_parallel_residual=False, attention_bias=False, tie_word_embeddings=True
    ),
    "gpt_neo": transformers.GPTNeoConfig(**GPT_NEO),
    "gemma": transformers.GemmaConfig(**SHARED, head_dim=16),
    "gemma2": transformers.Gemma2Config(
        **SHARED, head_dim=16, sliding_window=5, query_pre_attn_scalar=20,
        attn_logit_softcapping=2.0, final_logit_softcapping=3.0,
    ),
    "gemma3_text": transformers.Gemma3TextConfig(
        **SHARED, head_dim=16, sliding_window=5, rope_parameters=GEMMA3_ROPE,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
    ),
    "phi": transformers.PhiConfig(**SIZES),
    "phi3": transformers.Phi3Config(**SHARED, sliding_window=6),
    "opt": transformers.OPTConfig(**OPT),
    "opt, norms after": transformers.OPTConfig(**OPT, do_layer_norm_before=False),
    "starcoder2": transformers.Starcoder2Config(**SHARED, sliding_window=6),
    "stablelm": transformers.StableLmConfig(**SHARED),
    "stablelm, parallel": transformers.StableLmConfig(
        **SHARED, use_qkv_bias=True, use_parallel_residual=True
    ),
}  # fmt: skip


def save_model(
    config: Any, folder: Path, dtype: torch.dtype = torch.float32, shard_size: str = "1GB"
) -> None:
    """A random model that transformers saves in `folder`, norms and biases drawn as well."""
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    model.to(dtype).save_pretrained(folder, max_shard_size=shard_size)
    files = hf_tokenizer.tokenizer_files(CharTokenizer(ALPHABET), T)
    (folder / "tokenizer.json").write_bytes(files["tokenizer.json"])


def check_family(config: Any, tmp_path: Path, **saved: Any) -> None:
    """Import, logits of both engines, export, and transformers' logits of the export."""
    save_model(config, tmp_path / "theirs", **saved)
    tokens = np.random.default_rng(0).integers(0, V, (2, T))
    expected = hf.model_logits(
        hf.load_model(tmp_path / "theirs", attn_implementation="eager"), tokens
    )
    imported = hf.read(tmp_path / "theirs")
    by_numpy = compute_logits(imported.config, V, imported.weights, tokens)
    assert largest_difference(expected, by_numpy) < TOLERANCE
    run = RunConfig(model=imported.config).resolve()
    engine = TorchEngine(run, V, device="cpu", precision="fp32", threads=1)
    engine.load(imported.weights)
    cache = engine.new_cache(2, T)
    by_torch = engine.logits(tokens, cache, np.full(2, T), every=True)
    assert largest_difference(expected, by_torch) < TOLERANCE

    weights = dict(imported.weights)
    export = ModelExport(
        Run("nowhere"), 0, imported.config, imported.tokenizer, weights, imported.token_settings,
        imported.model_type,
    )  # fmt: skip
    family = families.choose_family(imported.config, imported.model_type)
    assert family.model_type == imported.model_type
    if imported.model_type == "qwen2":  # hf.write takes another type for this tokenizer
        object.__setattr__(export, "tokenizer", QWEN_LIKE)
    hf.write(export, tmp_path / "back")
    written = json.loads((tmp_path / "back" / "config.json").read_text())
    assert written["model_type"] == imported.model_type
    assert largest_difference(expected, hf.logits(tmp_path / "back", tokens)) < TOLERANCE
    again = hf.read(tmp_path / "back")
    assert again.config == imported.config
    for name, array in weights.items():
        np.testing.assert_array_equal(again.weights[name], array)


def make_qwen_like() -> Any:
    """A BPE tokenizer of V tokens that splits texts as Qwen's does."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    from glasslm.data.tokenizers import SubwordTokenizer

    library = Tokenizer(models.BPE({character: i for i, character in enumerate(ALPHABET)}, []))
    library.normalizer = normalizers.NFC()
    library.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"\p{L}+|\p{N}|\s+"), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    library.decoder = decoders.ByteLevel()
    return SubwordTokenizer(library.to_str())


QWEN_LIKE = make_qwen_like()


@pytest.mark.parametrize("name", MODELS)
def test_a_family_computes_the_same_here_and_comes_back(name: str, tmp_path: Path) -> None:
    check_family(MODELS[name], tmp_path)


def test_every_family_is_tried() -> None:
    tried = {name.split(",")[0] for name in MODELS}
    others = {"mistral", "mixtral", "qwen3_moe", "gpt2"}  # in test_hf.py
    assert tried | others == {family.model_type for family in families.FAMILIES}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "f16"])
def test_shards_of_half_precision_are_read(dtype: torch.dtype, tmp_path: Path) -> None:
    for name in ("gpt_neox", "phi3"):  # with fused matrices
        check_family(MODELS[name], tmp_path / name, dtype=dtype, shard_size="10KB")
        assert len(list((tmp_path / name / "theirs").glob("*.safetensors"))) > 1


def random_config(rng: np.random.Generator) -> Any:
    """A tiny model of any family with random settings."""
    name = list(MODELS)[rng.integers(len(MODELS))]
    values = MODELS[name].to_dict()
    heads = int(rng.choice([2, 4, 8]))
    kv_heads = int(rng.choice([k for k in (1, 2, 4, 8) if heads % k == 0]))
    changes: dict[str, Any] = {
        "num_attention_heads": heads, "num_heads": heads, "num_key_value_heads": kv_heads,
        "hidden_size": 8 * heads * int(rng.integers(1, 3)),
        "sliding_window": int(rng.integers(2, 9)),
        "window_size": int(rng.integers(2, 9)), "head_dim": int(rng.choice([4, 8, 16])),
        "intermediate_size": int(rng.integers(8, 60)), "ffn_dim": int(rng.integers(8, 60)),
        "tie_word_embeddings": bool(rng.integers(2)), "word_embed_proj_dim": None,
    }  # fmt: skip
    if name in ("gpt_neox", "gpt_neox, serial", "gpt_neo", "opt", "opt, norms after", "phi"):
        changes.pop("num_key_value_heads")
        changes["num_key_value_heads"] = heads
    if name == "phi":
        changes["tie_word_embeddings"] = False
    drop = {"architectures", "dtype", "transformers_version", "model_type", "layer_types"}
    known = {key: changes.get(key, value) for key, value in values.items() if key not in drop}
    if not known.get("use_sliding_window", True):
        known.pop("sliding_window", None)
    return type(MODELS[name])(**known)


@pytest.mark.slow
def test_random_models_of_all_families_compute_the_same_and_come_back(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for case in range(60):
        config = random_config(rng)
        dtype = [torch.float32, torch.bfloat16, torch.float16][rng.integers(3)]
        check_family(config, tmp_path / str(case), dtype=dtype, shard_size="30KB")


def test_a_qwen2_with_another_tokenizer_is_written_as_a_model_that_keeps_it(tmp_path: Path) -> None:
    """AutoTokenizer splits the text of every qwen2 as Qwen does."""
    save_model(MODELS["qwen2"], tmp_path / "theirs")
    imported = hf.read(tmp_path / "theirs")
    export = ModelExport(
        Run("nowhere"), 0, imported.config, imported.tokenizer, dict(imported.weights), None,
        imported.model_type,
    )  # fmt: skip
    assert export.family.model_type == "llama"
    hf.write(export, tmp_path / "back")
    tokens = np.random.default_rng(0).integers(0, V, (2, T))
    theirs, back = (hf.logits(tmp_path / name, tokens) for name in ("theirs", "back"))
    assert largest_difference(theirs, back) < TOLERANCE
    auto = transformers.AutoTokenizer.from_pretrained(tmp_path / "back")
    assert auto("A2B")["input_ids"] == imported.tokenizer.encode("A2B").tolist()


@pytest.mark.parametrize("kind", sorted(families.UNSUPPORTED))
def test_a_family_that_glasslm_cannot_compute_is_refused_by_name(kind: str) -> None:
    with pytest.raises(InputError, match=f"{kind}.*{families.UNSUPPORTED[kind][:10]}"):
        families.find_family(Values(Path("config.json"), {"model_type": kind}))


@pytest.mark.parametrize(
    ("name", "changes", "word"),
    [
        ("phi", {"qk_layernorm": True}, "qk_layernorm"),
        ("stablelm", {"qk_layernorm": True}, "qk_layernorm"),
        ("opt", {"word_embed_proj_dim": 16}, "word_embed_proj_dim"),
        ("opt", {"layer_norm_elementwise_affine": False}, "layer_norm_elementwise_affine"),
        ("gemma2", {"use_bidirectional_attention": True}, "use_bidirectional_attention"),
        ("gemma2", {"layer_types": ["chunked_attention"] * 3}, "layer_types"),
        ("gemma3_text", {"final_logit_softcapping": 30.0}, "final_logit_softcapping"),
        ("smollm3", {"no_rope_layers": [1, 2, 1]}, "no_rope_layers"),
        ("gpt_neo", {"attention_types": [[["global"], 10**9]]}, "attention_types"),
        ("gpt_neo", {"attention_types": "global"}, "attention_types"),
        ("phi3", {"rope_parameters": {"rope_type": "longrope"}}, "longrope"),
        ("starcoder2", {"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
    ],
)
def test_a_setting_that_glasslm_does_not_have_is_refused_by_name(
    name: str, changes: dict[str, Any], word: str
) -> None:
    values = Values(Path("config.json"), json.loads(MODELS[name].to_json_string()) | changes)
    with pytest.raises(InputError, match=word):
        families.find_family(values).from_hf_config(values)
