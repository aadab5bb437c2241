"""nanoGPT as a peer: its model.py imported from a checkout on this machine, holding the weights of a glasslm table.

    git clone https://github.com/karpathy/nanoGPT

Nothing of it is copied here. Its model differs from the `nanogpt` preset's in one thing: the exact form of GELU, where
ours is the tanh form. `tanh_gelu` lends it ours, for the time of a check.
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


def load(checkout: Path, config: ModelConfig, vocab_size: int, weights: Weights) -> Any:
    """nanoGPT's GPT of this shape with these weights, which are copied."""
    module = _module(checkout)
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
        {name: torch.from_numpy(array) for name, array in gpt2_names(config, weights).items()}
    )
    return model


def gpt2_names(config: ModelConfig, weights: Weights) -> Weights:
    """The weights of a layernorm + learned + gelu model without biases as GPT-2 names them; matrices stay (out, in)."""
    named = {
        "transformer.wte.weight": weights["embedding.weight"],
        "transformer.wpe.weight": weights["position.weight"],
        "transformer.ln_f.weight": weights["norm.weight"],
        "lm_head.weight": weights["embedding.weight"],
    }
    for i in range(config.n_layers):
        ours, theirs = f"blocks.{i}", f"transformer.h.{i}"
        named |= {
            f"{theirs}.ln_1.weight": weights[f"{ours}.attention_norm.weight"],
            f"{theirs}.attn.c_attn.weight": np.concatenate(
                [weights[f"{ours}.attention.{x}.weight"] for x in "qkv"]
            ),
            f"{theirs}.attn.c_proj.weight": weights[f"{ours}.attention.o.weight"],
            f"{theirs}.ln_2.weight": weights[f"{ours}.feedforward_norm.weight"],
            f"{theirs}.mlp.c_fc.weight": weights[f"{ours}.feedforward.up.weight"],
            f"{theirs}.mlp.c_proj.weight": weights[f"{ours}.feedforward.down.weight"],
        }
    return named


def trainer(
    model: Any,
    tokens: torch.Tensor,
    targets: torch.Tensor,
    *,
    bf16: bool = False,
    fused: bool = False,
    compiled: bool = False,
) -> Callable[[], float]:
    """One step of nanoGPT's training loop on this batch: forward, backward, clipping, its AdamW. Returns the loss.

    `fused` takes PyTorch's fused AdamW also on a CPU, where nanoGPT's own does not.
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
    """The model with our form of GELU."""
    own = [block.mlp.gelu for block in model.transformer.h]
    for block in model.transformer.h:
        block.mlp.gelu = torch.nn.GELU(approximate="tanh")
    try:
        yield
    finally:
        for block, gelu in zip(model.transformer.h, own):
            block.mlp.gelu = gelu


def _module(checkout: Path) -> Any:
    spec = importlib.util.spec_from_file_location("nanogpt_model", checkout / "model.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses and the compiler look for it
    spec.loader.exec_module(module)
    return module
