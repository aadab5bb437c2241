"""Flags that the studies share: the machine or cluster that computes their runs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from glasslm.cli.flag_groups import compute_config
from glasslm.config.config_fields import optional_flag, require_fields
from glasslm.config.schema import DeviceConfig
from glasslm.lab.studies.sweep import Runner, RunnerName


@dataclass(frozen=True)
class RunnerFlags:
    """The machine or cluster that computes the runs of the study."""

    runner: RunnerName = "local"
    """Use this machine, one core a run (local), or a cluster (ray: pip install 'glasslm[ray]')."""
    address: Annotated[str | None, optional_flag("ADDRESS", "a cluster on this machine")] = None
    """Address of the Ray cluster."""
    workers: int = 0
    """Runs at once (0: one for each core)."""

    def __post_init__(self) -> None:
        require_fields(self, ["workers"], lambda x: x >= 0, "0 (one for each core) or more")

    def make_runner(self, device: DeviceConfig) -> Runner:
        """The runner that computes on `device`."""
        return Runner(compute_config(device), self.runner, self.address, self.workers)
