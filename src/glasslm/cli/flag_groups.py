"""Flags that several commands share. Every command shows them flat: a group adds no prefix."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, ClassVar

import tyro

from glasslm.config.schema import (
    ComputeConfig,
    DataConfig,
    DeviceConfig,
    ModelConfig,
    OperationsConfig,
    OptimizerConfig,
    PreferenceConfig,
    RunConfig,
    TrainConfig,
)

# Fields of a run that a study refuses: its runs start from initial weights, and the number of their
# steps is known before the first one.
REFUSED_IN_STUDIES = frozenset(["epochs", "max_time", "patience", "stop_at_loss", "init_from"])

RUN_HELP = "Folder of a run, or its name under ./runs."

RunArgument = Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="RUN", help=RUN_HELP)]
CheckpointFlag = Annotated[
    str,
    tyro.conf.arg(metavar="best|latest|STEP", help="Checkpoint of the run."),
]
JsonFlag = Annotated[bool, tyro.conf.arg(help="Print one JSON object at the end.")]
RunOpsFlag = Annotated[
    str,
    tyro.conf.arg(
        metavar="FILE.py|recorded",
        help="Compute with operations of a Python file; recorded: run the code in run.json.",
        help_behavior_hint="(default: none)",
    ),
]
TrackFlag = Annotated[
    str,
    tyro.conf.arg(
        metavar="wandb|tensorboard",
        help="Also log the run to a tracker, or to both with a comma between.",
        help_behavior_hint="(default: none)",
    ),
]


@dataclass(frozen=True, kw_only=True)
class ConfigFlags:
    """The flags of a RunConfig."""

    hidden_fields: ClassVar[frozenset[str]] = frozenset()
    """Fields whose flags a command refuses: its help and its completion leave them out."""
    varies_settings: ClassVar[bool] = False
    """Whether other runs than that of the flags are trained, which may read other flags."""

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    operations: OperationsConfig = field(default_factory=OperationsConfig)
    # `glasslm finetune` alone has these flags.
    preference: tyro.conf.Fixed[tyro.conf.Suppress[PreferenceConfig]] = field(
        default_factory=PreferenceConfig
    )

    @property
    def config(self) -> RunConfig:
        """The run that the flags describe."""
        return RunConfig(
            self.model, self.data, self.optimizer, self.train, self.operations, self.preference
        )


@dataclass(frozen=True, kw_only=True)
class RecipeFlags(ConfigFlags):
    """A preset and the flags that override it."""

    preset: Annotated[str, tyro.conf.arg(metavar="NAME")] = "tiny"
    """Named model and recipe: quick, tiny, small, medium, nanogpt, capstone or capstone-10m."""


def compute_config(device: DeviceConfig) -> ComputeConfig:
    """The settings of a run that is trained on `device`."""
    return ComputeConfig(**vars(device))
