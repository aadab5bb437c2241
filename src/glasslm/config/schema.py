"""The configuration of a run, as frozen dataclasses: RunConfig has a part for each module.

A RunConfig and a seed determine a run; ComputeConfig says only where and how it is computed. The
docstring under a field is its help text on the command line: one line, or one sentence a line.
Field names are unique over all classes, because the flags are flat.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Annotated, Literal

import tyro

from glasslm.config.config_fields import optional_flag, require_fields
from glasslm.config.data_config import Corpus, DataConfig, TextCorpus
from glasslm.config.model_config import (
    ADAPTABLE_MATRICES,
    GATED,
    MAX_BLOCKS,
    MAX_WIDTH,
    RELATIVE_POSITIONS,
    AttentionName,
    FeedForward,
    LayerKind,
    ModelConfig,
    Norm,
    NormPosition,
    Position,
    RopeScaling,
)
from glasslm.config.preference_config import PreferenceConfig, RewardName
from glasslm.config.training_config import OptimizerConfig, OptimizerName, ScheduleName, TrainConfig

__all__ = [
    "ADAPTABLE_MATRICES", "ALIASES", "GATED", "MAX_BLOCKS", "MAX_WIDTH", "RELATIVE_POSITIONS",
    "AttentionName", "ComputeConfig", "Corpus", "DataConfig", "DeviceConfig", "DeviceName",
    "EngineName", "FeedForward", "LayerKind", "ModelConfig", "Norm", "NormPosition",
    "OperationsConfig", "OptimizerConfig", "OptimizerName", "Position", "Precision",
    "PreferenceConfig", "RewardName", "RopeScaling", "RunConfig", "ScheduleName", "TextCorpus",
    "TrainConfig",
]  # fmt: skip

EngineName = Literal["auto", "numpy", "torch"]
DeviceName = Literal["auto", "cpu", "cuda", "mps"]
Precision = Literal["auto", "fp32", "bf16", "fp16", "fp64"]

ALIASES = {"seq_len": "block_size"}  # second names of fields: those of the course


@dataclass(frozen=True)
class OperationsConfig:
    """The Python file whose functions replace operations of the engine; "" for none."""

    ops: Annotated[str, optional_flag("FILE.py", "none")] = ""
    """Python file whose functions replace the engine's operations of the same names.
    Such a function (silu, rms_norm, attention, adamw, ...) returns `output, backward`."""
    ops_sha256: tyro.conf.Suppress[str] = ""

    @property
    def is_resolved(self) -> bool:
        """Whether the file has been read: its hash is known, or there is no file."""
        return bool(self.ops_sha256) or not self.ops


@dataclass(frozen=True)
class RunConfig:
    """Everything that determines the result of a run."""

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    operations: OperationsConfig = field(default_factory=OperationsConfig)
    preference: PreferenceConfig = field(default_factory=PreferenceConfig)

    @property
    def tokens_per_step(self) -> int:
        """The tokens of a step's batch."""
        return self.train.batch_size * self.model.block_size

    @property
    def total_tokens(self) -> int:
        """The tokens of all steps."""
        return self.train.max_steps * self.tokens_per_step

    def resolve(self) -> RunConfig:
        """The same run with the derived sizes of its model as numbers, as in run.json."""
        return dataclasses.replace(self, model=self.model.resolve())


@dataclass(frozen=True)
class DeviceConfig:
    """The engine, device and precision. These settings change speed and rounding only."""

    engine: EngineName = "auto"
    """Engine: numpy (hand-written) or torch (auto: torch on a GPU and for large models).
    With a long --max-time, auto takes the faster of the two on a CPU with bfloat16."""
    device: DeviceName = "auto"
    """Device that computes (auto: a GPU, if PyTorch is installed and finds one)."""
    precision: Precision = "auto"
    """Precision of activations; weights stay in fp32 (auto: bf16 if faster; fp64 is for checks)."""
    threads: int = 0
    """CPU threads (0: GLASSLM_THREADS, or one per core)."""

    def __post_init__(self) -> None:
        require_fields(self, ["threads"], lambda x: x >= 0, "0 (automatic) or more")


@dataclass(frozen=True)
class ComputeConfig(DeviceConfig):
    """The engine, device and precision of training. These change speed and rounding only."""

    compile: Literal["auto", "on", "off"] = "auto"
    """Compile the model with torch.compile (auto: if the run is long enough to repay it)."""
    parallel: Literal["auto", "ddp", "fsdp"] = "auto"
    """Under torchrun: copy the model to every process (ddp, auto), or shard it (fsdp)."""
    deterministic: bool = False
    """Compute the same bits again on a GPU, at some cost in speed (a CPU always does)."""
