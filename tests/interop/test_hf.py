"""Models written for transformers compute the same there, and come back; its own models compute the
same here.
"""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy

pytest.importorskip("torch")
pytest.importorskip("transformers")

import torch
import transformers

from glasslm.config.schema import ModelConfig
from glasslm.data.tokenizers import CharTokenizer
from glasslm.errors import DamagedError, InputError
from glasslm.interop import families, hf, hf_tokenizer
from glasslm.interop.model_export import ModelExport, largest_difference
from glasslm.model.parameters import initial_weights, parameter_table
from glasslm.runs.run_folder import Run

ALPHABET = "".join(map(chr, range(48, 48 + 37)))
SMALL = ModelConfig(d_model=32, n_layers=2, n_heads=4, block_size=24)


def make_export(config: ModelConfig, seed: int = 3) -> ModelExport:
    """A model with random weights, norms and biases too: exchanged names change its logits."""
    tokenizer = CharTokenizer(ALPHABET)
    rng = np.random.default_rng(seed)
    weights = {
        name: (array + 0.1 * rng.standard_normal(array.shape)).astype(np.float32)
        for name, array in initial_weights(parameter_table(config, tokenizer.vocab_size), seed)
    }
    return ModelExport(Run("nowhere"), 0, config.resolve(), tokenizer, weights)


def small_config(**changes: Any) -> ModelConfig:
    return dataclasses.replace(SMALL, **changes)


VARIANT_FIELDS = ("norm", "norm_position", "feedforward", "position")
GPT2: dict[str, Any] = {"norm": "layernorm", "feedforward": "gelu", "position": "learned"}
GEMMA: dict[str, Any] = {"norm": "rmsnorm1p", "feedforward": "geglu", "scale_embeddings": True}
NEOX: dict[str, Any] = {"norm": "layernorm", "feedforward": "gelu"}
MODELS = {
    "llama": small_config(),
    "llama, untied": small_config(tie_embeddings=False),
    "llama, shared keys": small_config(n_kv_heads=2),
    "llama, one key": small_config(n_kv_heads=1, d_ff=50),
    "llama, biases": small_config(bias=True),
    "llama, geglu": small_config(feedforward="geglu"),
    "llama, scaled embeddings": small_config(scale_embeddings=True),
    "llama, scaled embeddings, untied": small_config(scale_embeddings=True, tie_embeddings=False),
    "llama, longer by linear": small_config(rope_scaling="linear", rope_factor=4.0),
    "llama, longer by ntk": small_config(rope_scaling="ntk", rope_factor=4.0),
    "llama, other numbers": small_config(rope_base=500.0, norm_eps=1e-2),
    "mistral": small_config(window=5, n_kv_heads=2),
    "mixtral": small_config(n_experts=4, experts_per_token=2, n_kv_heads=2),
    "mixtral, window": small_config(
        n_experts=3, experts_per_token=3, window=7, feedforward="geglu"
    ),
    "qwen3": small_config(qk_norm=True, n_kv_heads=2),
    "qwen3, window": small_config(qk_norm=True, window=6, tie_embeddings=False, norm_eps=1e-2),
    "qwen3_moe": small_config(qk_norm=True, n_experts=4, experts_per_token=2),
    "qwen3_moe, one expert": small_config(qk_norm=True, n_experts=4, experts_per_token=1),
    "gpt2": small_config(**GPT2),
    "gpt2, biases": small_config(**GPT2, bias=True),
    "gpt2, untied": small_config(**GPT2, tie_embeddings=False, bias=True),
    "gpt2, relu": small_config(**GPT2 | {"feedforward": "relu"}, norm_eps=1e-2),
    "gpt2, relu2": small_config(**GPT2 | {"feedforward": "relu2"}, d_ff=70),
    "gpt2, sinusoids": small_config(**GPT2 | {"position": "sinusoidal"}),
    "gpt2, no positions": small_config(**GPT2 | {"position": "none"}, bias=True),
    "gpt2, scaled embeddings": small_config(**GPT2, scale_embeddings=True),
    "gpt2, exact gelu": small_config(**GPT2 | {"feedforward": "gelu_exact"}),
    "llama, wide heads": small_config(head_dim=12, feedforward="geglu_exact"),
    "llama, llama3": small_config(rope_scaling="llama3", rope_factor=2.0, rope_base=50.0),
    "llama, yarn": small_config(rope_scaling="yarn", rope_factor=2.0, rope_base=50.0),
    "llama, longer by dynamic": small_config(rope_scaling="dynamic", rope_factor=2.0),
    "llama, biases of q, k, v": small_config(bias_targets="q,k,v"),
    "qwen3, windows": small_config(qk_norm=True, window=6, attention_pattern="wf", head_dim=10),
    "smollm3": small_config(attention_pattern="nf"),
    "phi3": small_config(partial_rotary_factor=0.5, n_kv_heads=2),
    "gemma": small_config(**GEMMA),
    "gemma, wide heads": small_config(**GEMMA, head_dim=12, bias_targets="q,k"),
    "gemma2": small_config(
        **GEMMA, norm_position="sandwich", window=6, attention_pattern="wf", logit_softcap=3.0,
        attention_softcap=2.0, attention_scale=0.25,
    ),
    "gemma3_text": small_config(
        **GEMMA, norm_position="sandwich", window=6, attention_pattern="wf", qk_norm=True,
        window_rope_base=50.0, rope_scaling="linear", rope_factor=2.0,
    ),
    "stablelm": small_config(norm="layernorm", partial_rotary_factor=0.5, bias_targets="k"),
    "gpt_neox": small_config(**NEOX, residual="parallel", partial_rotary_factor=0.25),
    "starcoder2": small_config(**NEOX, window=6, n_kv_heads=2, bias=True),
    "phi": small_config(**NEOX, residual="parallel_one_norm", tie_embeddings=False),
    "gpt_neo": small_config(**GPT2, window=6, attention_pattern="fw", attention_scale=1.0),
    "opt": small_config(**GPT2, norm_position="post", bias=True),
}  # fmt: skip


@pytest.mark.parametrize("name", MODELS)
def test_logits_are_equal_there_and_after_the_return(name: str, tmp_path: Path) -> None:
    model = make_export(MODELS[name])
    hf.write(model, tmp_path / "out")
    kind = json.loads((tmp_path / "out" / "config.json").read_text())["model_type"]
    assert kind == name.split(",")[0]
    tokens = model.probe_tokens()
    ours, theirs = model.logits(tokens), hf.logits(tmp_path / "out", tokens)
    assert largest_difference(ours, theirs) < hf.TOLERANCE

    back = hf.read(tmp_path / "out")
    returned = ModelExport(model.run, 0, back.config, back.tokenizer, back.weights)
    assert largest_difference(ours, returned.logits(tokens)) < 1e-6
    assert back.tokenizer.sha256 == model.tokenizer.sha256
    if not MODELS[name].scale_embeddings and MODELS[name].position in ("rope", "learned"):
        for ours_name, array in model.weights.items():
            np.testing.assert_array_equal(back.weights[ours_name], array)


def test_every_family_member_is_tried() -> None:
    tried = {name.split(",")[0] for name in MODELS} | {"qwen2"}  # the last in test_families.py
    assert tried == {family.model_type for family in families.FAMILIES}


def random_config(rng: np.random.Generator) -> ModelConfig:
    """Any architecture at all."""
    from glasslm.lab.checks.gradient_check import SWITCHES

    while True:
        choice = {field: values[rng.integers(len(values))] for field, values in SWITCHES.items()}
        changes = choice | {
            "lora_rank": 0,
            "attention_dropout": 0.0,
            "document_end_id": 1,
            "rope_factor": 1.0 + (choice["rope_scaling"] != "none"),
        }
        try:
            return dataclasses.replace(SMALL, **changes)
        except InputError:
            continue


@pytest.mark.slow
def test_any_model_is_equal_there_or_refused_with_the_switch(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    written = 0
    for case in range(1500):
        config = random_config(rng)
        # transformers gives a qwen2 its own tokenizer, and these models have another.
        usable = [family for family in families.FAMILIES if family.model_type != "qwen2"]
        if min(len(family.refusals(config)) for family in usable):
            with pytest.raises(InputError, match="--"):
                families.choose_family(config, other_tokenizers=["qwen2"])
            continue
        model = make_export(config, seed=case)
        hf.write(model, tmp_path / str(case))
        tokens = model.probe_tokens()
        assert (
            largest_difference(model.logits(tokens), hf.logits(tmp_path / str(case), tokens))
            < hf.TOLERANCE
        ), config
        written += 1
    assert written > 8


@pytest.mark.parametrize(
    ("changes", "switch"),
    [
        ({"norm": "layernorm", "qk_norm": True}, "--n"),
        ({"norm": "none"}, "--norm rmsnorm"),
        ({"norm_position": "post"}, "--norm-position pre"),
        ({"feedforward": "relu"}, "--feedforward swiglu"),
        ({"position": "alibi"}, "--position rope"),
        ({"bias": True, "qk_norm": True}, "--no-bias"),
        ({"n_experts": 4, "shared_expert": True}, "--no-shared-expert"),
        ({"n_experts": 4, "experts_per_token": 1}, "--experts-per-token 2"),
        (GPT2 | {"n_kv_heads": 2}, "--n-kv-heads 4"),
        (GPT2 | {"qk_norm": True}, "--no-qk-norm"),
        (GPT2 | {"window": 5}, "--window 0"),
        (GPT2 | {"n_experts": 4}, "--n-experts 0"),
    ],
)
def test_what_has_no_equivalent_is_refused_with_the_switch(
    changes: dict[str, Any], switch: str, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=switch):
        hf.write(make_export(small_config(**changes)), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("base", "field"),
    [(base, field) for base in ({}, GPT2) for field in VARIANT_FIELDS]
    + [({"rope_scaling": "linear", "rope_factor": 2.0}, "rope_scaling")],
)
def test_a_variant_that_transformers_does_not_have_is_refused_with_a_switch(
    base: dict[str, Any], field: str
) -> None:
    """A new word in the config's Literal needs no edit in interop: the export refuses it."""
    config = small_config(**base)
    object.__setattr__(config, field, "newvariant")
    with pytest.raises(InputError, match=rf"newvariant.* \(--{field.replace('_', '-')} "):
        families.choose_family(config)


def save_hf_model(config: Any, folder: Path) -> Any:
    """A random model that transformers saves in `folder`, with a tokenizer of glasslm."""
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    (folder / "tokenizer.json").write_bytes(
        hf_tokenizer.tokenizer_files(CharTokenizer(ALPHABET), 24)["tokenizer.json"]
    )
    return model


WIDTHS: dict[str, Any] = {
    "vocab_size": 37,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 24,
    "head_dim": 8,
}
OTHERS = {
    "llama": transformers.LlamaConfig(**WIDTHS),
    "llama tied, another base": transformers.LlamaConfig(
        **WIDTHS,
        tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": 500.0},
    ),
    "llama, linear": transformers.LlamaConfig(
        **WIDTHS, rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}
    ),
    "mistral": transformers.MistralConfig(**WIDTHS, sliding_window=6),
    "mistral without a window": transformers.MistralConfig(**WIDTHS, sliding_window=None),
    "mixtral": transformers.MixtralConfig(**WIDTHS, num_local_experts=4, num_experts_per_tok=2),
    "qwen3": transformers.Qwen3Config(**WIDTHS),
    "qwen3 with a window": transformers.Qwen3Config(
        **WIDTHS, use_sliding_window=True, sliding_window=6, max_window_layers=0
    ),
    "qwen3_moe": transformers.Qwen3MoeConfig(
        **WIDTHS,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=40,
        norm_topk_prob=True,
    ),
    "gpt2": transformers.GPT2Config(vocab_size=37, n_embd=32, n_layer=2, n_head=4, n_positions=24),
}


@pytest.mark.parametrize("name", OTHERS)
def test_models_that_others_made_compute_the_same_here(name: str, tmp_path: Path) -> None:
    model = save_hf_model(OTHERS[name], tmp_path / "theirs")
    model_import = hf.read(tmp_path / "theirs")
    imported = ModelExport(
        Run("nowhere"), 0, model_import.config, model_import.tokenizer, model_import.weights
    )
    tokens = imported.probe_tokens()
    with torch.no_grad():
        expected = model(torch.from_numpy(tokens)).logits.numpy()
    assert largest_difference(expected, imported.logits(tokens)) < hf.TOLERANCE


def test_shards_and_half_precision_are_read(tmp_path: Path) -> None:
    model = save_hf_model(OTHERS["llama"], tmp_path / "one")
    model.to(torch.bfloat16).save_pretrained(tmp_path / "many", max_shard_size="20KB")
    (tmp_path / "many" / "tokenizer.json").write_bytes(
        (tmp_path / "one" / "tokenizer.json").read_bytes()
    )
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 1
    one, many = hf.read(tmp_path / "one").weights, hf.read(tmp_path / "many").weights
    for name, array in one.items():
        assert many[name].dtype == np.float32
        np.testing.assert_array_equal(
            many[name], torch.from_numpy(array).to(torch.bfloat16).float().numpy()
        )


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"model_type": "mamba"}, "mamba"),
        ({"hidden_act": "gelu_fast"}, "hidden_act"),
        (
            {"rope_parameters": {"rope_type": "longrope", "rope_theta": 1e4, "factor": 8.0}},
            "rope_type",
        ),
        (
            {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}},
            "partial_rotary_factor",
        ),
        ({"head_dim": 16}, "attention.q.weight"),
        ({"hidden_size": "wide"}, "hidden_size"),
        ({"hidden_size": 10**12}, "hidden_size"),
        ({"hidden_size": 0, "head_dim": None}, "d_model"),
        ({"num_hidden_layers": 10**8}, "n_layers"),
        ({"num_hidden_layers": None}, "num_hidden_layers"),
        ({"vocab_size": 38}, "38"),
        ({"num_hidden_layers": 3}, "model.layers.2"),
        ({"num_hidden_layers": 1}, "model.layers.1"),
    ],
)
def test_a_config_of_another_model_is_refused(
    changes: dict[str, Any], word: str, tmp_path: Path
) -> None:
    save_hf_model(OTHERS["llama"], tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises((InputError, DamagedError), match=word):
        hf.read(tmp_path)


@pytest.mark.parametrize(
    ("config", "word"),
    [
        (
            transformers.MixtralConfig(**WIDTHS, num_local_experts=4, num_experts_per_tok=1),
            "num_experts_per_tok",
        ),
        (
            transformers.Qwen3MoeConfig(**WIDTHS, num_experts=4, num_experts_per_tok=2),
            "norm_topk_prob",
        ),
    ],
    ids=[
        "mixtral of one expert",
        "gates that are not divided",
    ],
)
def test_what_would_compute_something_else_is_refused(
    config: Any, word: str, tmp_path: Path
) -> None:
    save_hf_model(config, tmp_path)
    with pytest.raises(InputError, match=word):
        hf.read(tmp_path)


@pytest.mark.parametrize("name", ["llama tied, another base", "gpt2"])
def test_a_tied_head_may_be_in_the_file_if_it_is_the_embedding(name: str, tmp_path: Path) -> None:
    save_hf_model(OTHERS[name], tmp_path)
    path = tmp_path / "model.safetensors"
    arrays = safetensors.numpy.load_file(path)
    embedding = next(
        name for name in arrays if name.endswith(("embed_tokens.weight", "wte.weight"))
    )
    safetensors.numpy.save_file(arrays | {"lm_head.weight": arrays[embedding]}, path)
    assert "head.weight" not in hf.read(tmp_path).weights
    safetensors.numpy.save_file(arrays | {"lm_head.weight": 2 * arrays[embedding]}, path)
    with pytest.raises(InputError, match="tie_word_embeddings"):
        hf.read(tmp_path)


def test_masks_that_old_versions_saved_are_passed_over(tmp_path: Path) -> None:
    """They are booleans."""
    save_hf_model(OTHERS["gpt2"], tmp_path)
    path = tmp_path / "model.safetensors"
    arrays = safetensors.numpy.load_file(path)
    masks = {f"transformer.h.{i}.attn.bias": np.ones((1, 1, 24, 24), np.bool_) for i in range(2)}
    safetensors.numpy.save_file(arrays | masks, path)
    assert hf.read(tmp_path).config.n_layers == 2


def test_a_bias_of_the_keys_is_kept_where_it_matters(tmp_path: Path) -> None:
    """RoPE rotates it, so that scores depend on it; without positions softmax cancels it."""
    biased = transformers.LlamaConfig(**WIDTHS, attention_bias=True, mlp_bias=True)
    save_hf_model(biased, tmp_path / "llama")
    assert "blocks.0.attention.k.bias" in hf.read(tmp_path / "llama").weights
    save_hf_model(OTHERS["gpt2"], tmp_path / "gpt2")
    assert "blocks.0.attention.k.bias" not in hf.read(tmp_path / "gpt2").weights


def test_transformers_generates_the_same_text(tmp_path: Path) -> None:
    """Its own greedy loop and cache, from the folder alone."""
    from glasslm.config.schema import ComputeConfig, RunConfig
    from glasslm.engines.factory import make_engine
    from glasslm.inference.sampling import Sampling
    from glasslm.inference.trained_model import Model

    model = make_export(MODELS["qwen3"])
    hf.write(model, tmp_path / "out")
    hf_model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    auto_tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    prompt = auto_tokenizer("0123ABC", return_tensors="pt")
    generated = hf_model.generate(**prompt, max_new_tokens=15, do_sample=False)
    engine = make_engine(RunConfig(model=model.config), 37, ComputeConfig(engine="numpy"))
    engine.load(model.weights.items())
    trained_model = Model(RunConfig(model=model.config), model.tokenizer, engine, 0)
    expected = "".join(trained_model.stream("0123ABC", 15, sampling=Sampling(temperature=0.0)))
    assert auto_tokenizer.decode(generated[0]) == "0123ABC" + expected
