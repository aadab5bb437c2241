"""A model in bfloat16 beside transformers' own: logits, memory of the weights, greedy text."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

import torch
import transformers

from glasslm.config.schema import RunConfig
from glasslm.data.tokenizers import ByteTokenizer
from glasslm.engines.torch.engine import TorchEngine
from glasslm.inference.generation import generate
from glasslm.inference.sampling import Sampling
from glasslm.interop import hf, hf_tokenizer
from glasslm.interop.model_export import largest_difference

T, NEW_TOKENS = 48, 24
PROMPTS = ("Once upon a time", "The cat", "12 + 30 =", "x")
ROUNDING = 2.0**-8  # of one number in bfloat16
SIZES: dict[str, Any] = {
    "vocab_size": 256, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128,
    "bos_token_id": None, "eos_token_id": None, "pad_token_id": None,
}  # fmt: skip
CONFIGS: dict[str, Any] = {
    "qwen2, tied": transformers.Qwen2Config(**SIZES, tie_word_embeddings=True),
    "llama, untied": transformers.LlamaConfig(**SIZES, tie_word_embeddings=False),
}


@pytest.fixture(params=CONFIGS)
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A random model that transformers wrote in bfloat16, with wide logits."""
    torch.manual_seed(0)
    config = copy.deepcopy(CONFIGS[request.param])  # saving writes the type of the weights into it
    model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    model.to(torch.bfloat16).save_pretrained(tmp_path)
    files = hf_tokenizer.tokenizer_files(ByteTokenizer(), T)
    (tmp_path / "tokenizer.json").write_bytes(files["tokenizer.json"])
    return tmp_path


def load_engine(imported: hf.ModelImport) -> TorchEngine:
    """The engine of a model that answers, as glasslm.load makes it with --precision bf16."""
    config = RunConfig(model=imported.config).resolve()
    engine = TorchEngine(
        config, SIZES["vocab_size"], device="cpu", precision="bf16", threads=1, training=False
    )
    engine.load(imported.weights)
    return engine


def load_theirs(folder: Path, dtype: torch.dtype) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, attn_implementation="eager"
    ).eval()


@torch.no_grad()
def their_logits(folder: Path, dtype: torch.dtype, tokens: Any) -> Any:
    return load_theirs(folder, dtype)(torch.from_numpy(tokens)).logits.float().numpy()


def test_logits_are_as_near_to_float32_as_those_of_transformers(folder: Path) -> None:
    tokens = np.random.default_rng(0).integers(0, SIZES["vocab_size"], (4, T))
    exact = their_logits(folder, torch.float32, tokens)
    theirs = their_logits(folder, torch.bfloat16, tokens)
    engine = load_engine(hf.read(folder))
    ours = engine.logits(tokens, engine.new_cache(4, T), np.full(4, T), every=True)
    assert ours.dtype == np.float32
    assert largest_difference(theirs, ours) < 6 * ROUNDING
    assert np.std(ours - exact) < 1.5 * np.std(theirs - exact)


def test_weights_are_held_once_and_matrices_in_two_bytes(folder: Path) -> None:
    engine = load_engine(hf.read(folder))
    storages = [parameter.untyped_storage() for parameter in engine.model.parameters()]
    sizes = {storage.data_ptr(): storage.nbytes() for storage in storages}
    matrices = sum(p.numel() for p in engine.parameters.values() if p.dim() == 2)
    vectors = sum(p.numel() for p in engine.parameters.values() if p.dim() == 1)
    assert sum(sizes.values()) == 2 * matrices + 4 * vectors
    theirs = load_theirs(folder, torch.bfloat16)
    assert matrices + vectors == sum(p.numel() for p in theirs.parameters())


def test_greedy_text_is_that_of_transformers_up_to_a_tie(folder: Path) -> None:
    """Rounding may swap two tokens; until then the texts are equal, and then they were near."""
    imported = hf.read(folder)
    engine, theirs = load_engine(imported), load_theirs(folder, torch.bfloat16)
    exact = load_theirs(folder, torch.float32)
    n_equal = 0
    for prompt in PROMPTS:
        ids = torch.tensor([list(prompt.encode())])
        options = {"do_sample": False, "max_new_tokens": NEW_TOKENS}
        expected = theirs.generate(ids, **options)[0, ids.shape[1] :].tolist()
        pieces = generate(
            engine, imported.tokenizer, [prompt], model_config=imported.config,
            max_new_tokens=NEW_TOKENS, sampling=Sampling(temperature=0.0),
        )  # fmt: skip
        ours = [piece.token for piece in pieces]
        first = next((i for i in range(NEW_TOKENS) if ours[i] != expected[i]), NEW_TOKENS)
        n_equal += first
        if first == NEW_TOKENS:
            continue
        with torch.no_grad():
            text = torch.tensor([[*ids[0].tolist(), *expected[:first]]])
            logits = exact(text).logits[0, -1]
        gap = logits[ours[first]] - logits[expected[first]]
        assert abs(gap) < 6 * ROUNDING * logits.abs().max()
    assert n_equal > len(PROMPTS)
