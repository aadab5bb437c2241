"""Another version of glasslm in a study: its checkout, its commit, and the command of its runs."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from glasslm.config.presets import preset_config
from glasslm.config.schema import ComputeConfig, RunConfig
from glasslm.errors import InputError
from glasslm.runs import provenance

PRESET = "tiny"  # the flags of a run are those that differ from it
AXIS = "version"
IMPORT_TIMEOUT_S = 60


def require_checkout(checkout: Path) -> None:
    """Raise InputError unless Python imports glasslm from CHECKOUT/src."""
    source = checkout / "src" / "glasslm"
    if not (source / "__main__.py").is_file():
        raise InputError(
            f"--against is {checkout}: expected a checkout of glasslm, with src/glasslm"
        )
    command = [sys.executable, "-P", "-c", "import glasslm; print(glasslm.__file__)"]
    result = subprocess.run(
        command,
        env=checkout_environment(checkout),
        capture_output=True,
        encoding="utf-8",
        errors="replace",
        timeout=IMPORT_TIMEOUT_S,
    )
    if result.returncode or Path(result.stdout.strip()).resolve().parent != source.resolve():
        reason = (result.stderr or result.stdout).strip().rpartition("\n")[2]
        raise InputError(f"--against is {checkout}, whose glasslm cannot be imported: {reason}")


def checkout_environment(checkout: Path) -> dict[str, str]:
    """The environment in which `python -m glasslm` is that of the checkout."""
    return os.environ | {"PYTHONPATH": str((checkout / "src").absolute())}


def version_name(source: Path | None = None) -> str:
    """The commit of a source tree (None: of this one), with "+" if it has changes.

    Outside of git it is "unknown".
    """
    git = provenance.git(source)
    return "unknown" if git is None else f"{git['commit'][:12]}{'+' if git['dirty'] else ''}"


def train_command(run_dir: Path, config: RunConfig, compute: ComputeConfig) -> list[str]:
    """The command that trains `config` in `run_dir`, or resumes the run there."""
    start = [sys.executable, "-P", "-m", "glasslm"]
    device = [f"--engine={compute.engine}", f"--precision={compute.precision}"]
    device += [f"--device={compute.device}", f"--threads={compute.threads}"]
    if (run_dir / "run.json").exists():
        return [*start, "resume", str(run_dir), *device]
    flags = [word for flag in _config_flags(config) for word in flag]
    return [*start, "train", "--preset", PRESET, *flags, *device, "--run-dir", str(run_dir)]


def _config_flags(config: RunConfig) -> Iterator[list[str]]:
    """The flags of the settings that differ from the preset's."""
    preset = preset_config(PRESET).resolve()
    for part in dataclasses.fields(config):
        values, defaults = getattr(config, part.name), getattr(preset, part.name)
        for field in dataclasses.fields(values):
            value: Any = getattr(values, field.name)
            if value == getattr(defaults, field.name) or value is None or "sha256" in field.name:
                continue
            flag = field.name.replace("_", "-")
            if isinstance(value, bool):
                yield [f"--{flag}" if value else f"--no-{flag}"]
            elif isinstance(value, tuple):
                yield [f"--{flag}", *map(str, value)]
            else:
                yield [f"--{flag}", str(value)]
