"""How a model is trained: OptimizerConfig and TrainConfig."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, Literal

from glasslm.config.config_fields import optional_flag, require_fields
from glasslm.config.units import parse_duration
from glasslm.errors import InputError, require

OptimizerName = Literal["adamw", "muon", "sgd"]
ScheduleName = Literal["cosine", "wsd", "constant"]


@dataclass(frozen=True)
class OptimizerConfig:
    """The optimizer, the learning rate per update, and auxiliary loss terms with coefficients."""

    optimizer: OptimizerName = "muon"
    """Optimizer: adamw (arXiv:1711.05101), muon (hidden matrices; adamw for the rest), or sgd."""
    lr: float = 1e-2
    """Peak learning rate, one for adamw and muon: Muon's updates are scaled (arXiv:2502.16982)."""
    min_lr: float = 0.0
    """Learning rate of the last step (except for constant).
    A preset's min_lr falls in proportion if --lr is below it."""
    warmup_steps: int = 50
    """Steps of linear warmup (at most half of the run)."""
    schedule: ScheduleName = "cosine"
    """Learning rate after warmup: cosine, wsd or constant.
    Both cosine and wsd end at min_lr; wsd is flat and falls linearly over the last fifth."""
    betas: tuple[float, float] = (0.9, 0.95)
    """AdamW's decay rates of the first and the second moment."""
    momentum: float = 0.95
    """Momentum of muon and sgd."""
    weight_decay: float = 0.1
    """Decoupled weight decay of matrices. Norms, biases and embeddings are never decayed."""
    grad_clip: float = 1.0
    """Clip the global gradient norm to this value (0: off)."""
    label_smoothing: float = 0.0
    """Fraction of each training target spread over the vocabulary (arXiv:1512.00567, section 7)."""
    z_loss: float = 0.0
    """Coefficient of the squared log of softmax's denominator (arXiv:2204.02311, section 5)."""
    balance_loss: float = 0.01
    """Coefficient of the load-balancing loss of experts (arXiv:2101.03961, equation 4)."""
    router_z_loss: float = 0.001
    """Coefficient of the z-loss of routers (arXiv:2202.08906, equation 5)."""
    ema: float = 0.0
    """Decay of a moving average of the weights. Evaluation uses the average (0: off; try 0.99)."""

    def __post_init__(self) -> None:
        require_fields(self, ["lr"], lambda x: 0 < x < math.inf, "above 0 and finite")
        expected = f"between 0 and lr ({self.lr:g})"
        require_fields(self, ["min_lr"], lambda x: 0 <= x <= self.lr, expected)
        require_fields(self, ["warmup_steps"], lambda x: x >= 0, "0 or more")
        for beta in self.betas:
            require(0 <= beta < 1, "betas", beta, "at least 0 and below 1")
        require_fields(self, ["momentum"], lambda x: 0 <= x < 1, "at least 0 and below 1")
        require_fields(self, ["weight_decay"], lambda x: 0 <= x < math.inf, "0 or more, and finite")
        coefficients = ("grad_clip", "z_loss", "balance_loss", "router_z_loss")
        require_fields(
            self, coefficients, lambda x: 0 <= x < math.inf, "0 (off) or more, and finite"
        )
        fractions = ("label_smoothing", "ema")
        require_fields(self, fractions, lambda x: 0 <= x < 1, "0 (off) or more, and below 1")


@dataclass(frozen=True)
class TrainConfig:
    """The length of training, the batch, and the intervals of evaluations, logs and checkpoints."""

    batch_size: int = 16
    """Sequences per step."""
    micro_batch_size: int = 0
    """Sequences computed at once; their gradients are summed (0: the engine's choice)."""
    max_steps: int = 1000
    """Number of steps (ignored with --epochs or --max-time)."""
    epochs: Annotated[float | None, optional_flag("FLOAT", "off")] = None
    """Passes over the training tokens, each visiting every window once, instead of --max-steps."""
    max_time: Annotated[str | None, optional_flag("TIME", "off")] = None
    """Training time, such as 90s, 10m or 1h30m, instead of --max-steps.
    A measurement of speed fixes the number of steps at the start.
    Preparing the text counts; a long final measurement becomes a sample."""
    stop_at_loss: Annotated[float | None, optional_flag("FLOAT", "off")] = None
    """Stop when the validation loss is at or below this value."""
    patience: Annotated[int | None, optional_flag("INT", "off")] = None
    """Stop after this many evaluations without a better validation loss."""
    on_spike: Literal["log", "skip", "rollback"] = "log"
    """Log a spike, skip its step, or roll back to the last checkpoint and take the next batch.
    A spike is a loss or gradient norm 6 deviations above the last 128."""
    eval_interval: int = 100
    """Steps between evaluations."""
    log_interval: int = 10
    """Steps between logged steps."""
    sample_interval: int = 250
    """Steps between text samples (0: none)."""
    checkpoint_interval: int = 250
    """Steps between checkpoints."""
    keep: int = 2
    """Checkpoints to keep besides the first and the best."""
    seed: int = 42
    """Seed of the weights, the order of the data and dropout."""
    init_from: Annotated[str | None, optional_flag("RUN", "random weights")] = None
    """Start from a run's best weights, architecture and tokenizer, as `glasslm finetune` does."""

    def __post_init__(self) -> None:
        counts = ["batch_size", "max_steps", "eval_interval", "log_interval"]
        counts += ["checkpoint_interval", "keep"]
        require_fields(self, counts, lambda x: x >= 1, "at least 1")
        require_fields(self, ("micro_batch_size", "sample_interval"), lambda x: x >= 0, "0 or more")
        require_fields(self, ["seed"], lambda x: 0 <= x < 2**64, "0 or more and below 2**64")
        for name in ("epochs", "stop_at_loss"):
            if getattr(self, name) is not None:
                require_fields(self, [name], lambda x: 0 < x < math.inf, "above 0 and finite")
        if self.patience is not None:
            require_fields(self, ["patience"], lambda x: x >= 1, "at least 1")
        if self.max_time is not None:
            parse_duration(self.max_time)
        if self.epochs is not None and self.max_time is not None:
            raise InputError("both --epochs and --max-time were given: choose one of them")
