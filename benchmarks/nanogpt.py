"""nanoGPT as a peer: its model.py from a local checkout, with the weights of a glasslm model.

    git clone https://github.com/karpathy/nanoGPT

This file copies no code of nanoGPT. nanoGPT's model differs from the `nanogpt` preset in one point:
it computes the exact form of GELU, glasslm the tanh form. `tanh_gelu` sets the tanh form for a
check.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from glasslm.config.schema import ModelConfig

Weights = dict[str, np.ndarray]


def load_model(checkout: Path, config: ModelConfig, vocab_size: int, weights: Weights) -> Any:
    """nanoGPT's GPT of this configuration with a copy of the weights."""
    module = _import_model(checkout)
    with contextlib.redirect_stdout(io.StringIO()):
        model = module.GPT(
            module.GPTConfig(
                block_size=config.block_size,
                vocab_size=vocab_size,
                n_layer=config.n_layers,
                n_head=config.n_heads,
                n_embd=config.d_model,
                dropout=config.dropout,
                bias=False,
            )
        )
    model.load_state_dict(
        {name: torch.from_numpy(array) for name, array in gpt2_weights(config, weights).items()}
    )
    return model


def gpt2_weights(config: ModelConfig, weights: Weights) -> Weights:
    """The weights under GPT-2's names, matrices (out, in).

    The model must have layernorm, learned positions and gelu, and no biases.
    """
    renamed = {
        "transformer.wte.weight": weights["embedding.weight"],
        "transformer.wpe.weight": weights["position.weight"],
        "transformer.ln_f.weight": weights["norm.weight"],
        "lm_head.weight": weights["embedding.weight"],
    }
    for i in range(config.n_layers):
        ours, theirs = f"blocks.{i}", f"transformer.h.{i}"
        renamed |= {
            f"{theirs}.ln_1.weight": weights[f"{ours}.attention_norm.weight"],
            f"{theirs}.attn.c_attn.weight": np.concatenate(
                [weights[f"{ours}.attention.{x}.weight"] for x in "qkv"]
            ),
            f"{theirs}.attn.c_proj.weight": weights[f"{ours}.attention.o.weight"],
            f"{theirs}.ln_2.weight": weights[f"{ours}.feedforward_norm.weight"],
            f"{theirs}.mlp.c_fc.weight": weights[f"{ours}.feedforward.up.weight"],
            f"{theirs}.mlp.c_proj.weight": weights[f"{ours}.feedforward.down.weight"],
        }
    return renamed


def make_training_step(
    model: Any,
    tokens: torch.Tensor,
    targets: torch.Tensor,
    *,
    bf16: bool = False,
    fused: bool = False,
    compiled: bool = False,
) -> Callable[[], float]:
    """A step of nanoGPT's training loop on tokens and targets (B, T); the step returns the loss.

    The step computes forward, backward, gradient clipping and nanoGPT's AdamW. `fused` selects
    PyTorch's fused AdamW on a CPU as well; nanoGPT uses it on a GPU only.
    """
    device = tokens.device.type
    with contextlib.redirect_stdout(io.StringIO()):
        optimizer = model.configure_optimizers(1e-1, 1e-3, (0.9, 0.99), device)
    if fused:
        groups = [
            {key: group[key] for key in ("params", "weight_decay")}
            for group in optimizer.param_groups
        ]
        optimizer = torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.99), fused=True)
    forward = torch.compile(model) if compiled else model

    def step() -> float:
        with torch.autocast(device, torch.bfloat16, enabled=bf16):
            _, loss = forward(tokens, targets)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item()

    return step


@contextlib.contextmanager
def tanh_gelu(model: Any) -> Iterator[None]:
    """Replace the model's exact GELU by the tanh form; restores it at the end of the context."""
    exact_gelus = [block.mlp.gelu for block in model.transformer.h]
    for block in model.transformer.h:
        block.mlp.gelu = torch.nn.GELU(approximate="tanh")
    try:
        yield
    finally:
        for block, gelu in zip(model.transformer.h, exact_gelus):
            block.mlp.gelu = gelu


def _import_model(checkout: Path) -> Any:
    """Import model.py of a checkout of nanoGPT."""
    spec = importlib.util.spec_from_file_location("nanogpt_model", checkout / "model.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses and torch.compile look it up there
    spec.loader.exec_module(module)
    return module
