"""The versions, the machine and the git commit that run.json records."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import numpy as np

_LIBRARIES = ("numpy", "safetensors", "tokenizers")  # their versions can change a result


def versions() -> dict[str, str]:
    """The versions of Python, glasslm, NumPy's BLAS, and libraries that can change a result."""
    versions = {
        "python": platform.python_version(),
        "glasslm": importlib.metadata.version("glasslm"),
    }
    versions |= {name: importlib.metadata.version(name) for name in _LIBRARIES}
    build: Any = np.show_config(mode="dicts")
    blas = build["Build Dependencies"]["blas"]
    versions["blas"] = f"{blas['name']} {blas['version']}"
    return versions


def machine() -> dict[str, Any]:
    """The operating system, the processor's name and its number of cores."""
    return {"platform": platform.platform(), "cpu": _cpu(), "cores": os.cpu_count()}


def git(source: Path | None = None) -> dict[str, Any] | None:
    """The commit of glasslm's source, and whether it was changed; None outside of a checkout.

    `source` is the folder of the package; None: of this one.
    """
    folder = source or Path(__file__).parents[1]
    try:
        # This fails for an installed copy inside another repository.
        _git(folder, "ls-files", "--error-unmatch", "__init__.py")
        return {
            "commit": _git(folder, "rev-parse", "HEAD"),
            "dirty": bool(_git(folder, "status", "--porcelain", "--untracked-files=no", "--", ".")),
        }
    except (OSError, subprocess.SubprocessError):
        return None


def _git(folder: Path, *arguments: str) -> str:
    command = ["git", "--no-optional-locks", *arguments]
    process = subprocess.run(
        command,
        cwd=folder,
        capture_output=True,
        text=True,
        check=True,
        timeout=3,
    )
    return process.stdout.strip()


def _cpu() -> str:
    info = Path("/proc/cpuinfo")  # Linux, where platform.processor() is empty
    if info.exists():
        for line in info.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
