"""Presets: named models with the settings that train them.

Flags override a preset. Parameter counts are for Shakespeare by character (65 symbols).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from glasslm.config.schema import ModelConfig, OptimizerConfig, RunConfig, TrainConfig
from glasslm.errors import InputError


def tiny() -> RunConfig:
    """0.8M parameters, a plain Llama: about 2 minutes on two cores."""
    return RunConfig()


def quick() -> RunConfig:
    """The default: 0.5M parameters, 0.081 nats below tiny in 1.45 times its time (docs/log.md)."""
    base = tiny()
    return replace(
        base,
        model=replace(base.model, d_model=96, qk_norm=True, tie_embeddings=False),
        optimizer=replace(base.optimizer, lr=5e-3, weight_decay=0.4),
        train=replace(base.train, max_steps=2400, eval_interval=200),
    )


def small() -> RunConfig:
    """3.2M parameters, about 15 minutes on two cores."""
    base = tiny()
    return replace(
        base,
        model=replace(base.model, d_model=256, n_heads=8, block_size=256),
        train=replace(base.train, max_steps=2000),
    )


def medium() -> RunConfig:
    """12.4M parameters: hours on two cores; use a GPU."""
    base = tiny()
    return replace(
        base,
        model=replace(base.model, d_model=384, n_heads=6, n_layers=7, block_size=256, dropout=0.1),
        optimizer=replace(base.optimizer, lr=3e-3),
        train=replace(base.train, batch_size=32, max_steps=3000),
    )


def nanogpt() -> RunConfig:
    """nanoGPT's Shakespeare model: 6 layers, 6 heads, width 384, context 256, 10.7M parameters."""
    return RunConfig(
        model=ModelConfig(
            d_model=384, n_layers=6, n_heads=6, block_size=256, dropout=0.2, attention_dropout=0.2,
            norm="layernorm", feedforward="gelu", position="learned",
        ),
        optimizer=OptimizerConfig(
            optimizer="adamw", lr=1e-3, min_lr=1e-4, warmup_steps=100, betas=(0.9, 0.99),
            weight_decay=0.1,
        ),
        train=TrainConfig(batch_size=64, max_steps=5000, eval_interval=250, seed=1337),
    )  # fmt: skip


def capstone() -> RunConfig:
    """The course's capstone with its printed settings: 25.3M parameters, called 10M there.

    It trains for days on two cores; use a GPU.
    """
    return RunConfig(
        model=ModelConfig(
            d_model=512, n_layers=8, n_heads=8, d_ff=2048, block_size=256, dropout=0.1,
            norm="rmsnorm", feedforward="gelu", position="learned",
        ),
        optimizer=OptimizerConfig(
            optimizer="adamw", lr=3e-4, min_lr=3e-5, warmup_steps=200, betas=(0.9, 0.95),
            weight_decay=0.1,
        ),
        train=TrainConfig(
            batch_size=64, max_steps=10000, eval_interval=250, log_interval=50, sample_interval=500,
        ),
    )  # fmt: skip


def capstone_10m() -> RunConfig:
    """The capstone at the 10M parameters of its title: 8 layers of width 320, 9.9M parameters."""
    base = capstone()
    return replace(base, model=replace(base.model, d_model=320, d_ff=1280))


PRESETS: dict[str, Callable[[], RunConfig]] = {
    "quick": quick,
    "tiny": tiny,
    "small": small,
    "medium": medium,
    "nanogpt": nanogpt,
    "capstone": capstone,
    "capstone-10m": capstone_10m,
}


def preset_config(name: str) -> RunConfig:
    """The config of the preset `name`. Raises InputError if there is none."""
    if name not in PRESETS:
        raise InputError(f"there is no preset '{name}': choose from {', '.join(PRESETS)}")
    return PRESETS[name]()
