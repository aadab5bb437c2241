"""Out of memory: both engines report it in one line with what to lower, and leave no files.

This file is also the program of the children: `python test_memory.py MEGABYTES COMMAND...`.
"""

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from glasslm import cli
from glasslm.config.schema import ComputeConfig
from glasslm.engines.memory_estimate import training_bytes
from glasslm.errors import ExhaustedError
from glasslm.runs.run_folder import Run
from glasslm.training import launch, memory
from small_runs import (
    ignore_message,
    shorten_runs,
    small_config,
    train_command,
    without_report,
    write_text,
)

LINE = (
    r"glasslm (train|resume): out of memory with micro-batches of (\d+) x (\d+) tokens: lower (.*)"
)
linux = pytest.mark.skipif(
    sys.platform != "linux", reason="needs resource limits that bind, as Linux has them"
)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text(tmp_path_factory.mktemp("text") / "text.txt", sentences=600)


@linux
@pytest.mark.parametrize("engine", ["numpy", "torch"])
@pytest.mark.parametrize(
    ("flags", "lower"),
    [
        (
            {"batch_size": 512, "micro_batch_size": 512, "block_size": 64},
            "--micro-batch-size to at most 256",
        ),
        ({"d_model": 2048}, "--block-size"),
    ],
    ids=["activations", "weights"],
)
def test_what_has_no_room_ends_in_one_line(
    engine: Any, flags: dict[str, Any], lower: str, text: Path, tmp_path: Path
) -> None:
    if engine == "torch":
        pytest.importorskip("torch")
    run_dir = tmp_path / "run"
    done = run_child(150, train_command(text, run_dir, engine=engine, **flags))
    assert done.returncode == ExhaustedError.exit_code, done.stderr
    *_, last = done.stderr.splitlines()
    assert re.fullmatch(LINE, last), done.stderr
    assert lower in last
    assert "choose a smaller model" in last
    assert "Traceback" not in done.stderr
    assert not run_dir.exists()
    with without_report():
        again = launch.train(
            small_config(text, max_steps=1),
            ComputeConfig(engine=engine, threads=1),
            run_dir,
            notify=ignore_message,
        )
    assert again.status == "finished"


@pytest.mark.parametrize("engine", ["numpy", "torch"])
def test_too_little_memory_is_told_before_the_start(
    engine: Any, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the flag that would do, and the run goes on; where there is enough, nothing is said."""
    if engine == "torch":
        pytest.importorskip("torch")
    compute = ComputeConfig(engine=engine, device="cpu", precision="fp32", threads=1)
    config, vocab = small_config(text, max_steps=1).resolve(), 21

    def warnings_with(room: int) -> list[str]:
        said: list[str] = []
        monkeypatch.setattr(memory, "free_memory_bytes", lambda: room)
        with without_report():
            launch.train(config, compute, tmp_path / str(room), notify=said.append)
        return [line for line in said if line.startswith(("warning", "glasslm"))]

    enough, less = (training_bytes(config, vocab, compute, rows) for rows in (4, 2))
    (plan,) = warnings_with(enough)
    assert plan.startswith("glasslm")
    warning, plan = warnings_with(less)
    assert plan.startswith("glasslm")
    assert re.fullmatch(
        r"warning: training is expected to take [\d.]+ [kM]B of memory, and [\d.]+ [kM]B are free: "
        r"--micro-batch-size 2 would take [\d.]+ [kM]B",
        warning,
    )
    assert Run(tmp_path / str(less)).history.status == "finished"


def test_free_memory_is_that_of_the_device_or_a_part_of_the_machines(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(memory, "free_memory_bytes", lambda: 1000)
    cpu = ComputeConfig(engine="numpy", device="cpu")
    assert memory.available_bytes(cpu) == 1000
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert memory.available_bytes(cpu) == 250
    monkeypatch.setattr(memory, "free_memory_bytes", lambda: None)
    assert memory.available_bytes(cpu) is None
    pytest.importorskip("torch")
    monkeypatch.setattr("torch.cuda.mem_get_info", lambda: (77, 99))
    assert memory.available_bytes(ComputeConfig(engine="torch", device="cuda")) == 77


@linux
def test_memory_of_deleted_arrays_goes_back_to_the_system() -> None:
    """Also where the C library keeps it, between arrays that are still in use."""

    def resident_bytes() -> int:
        words = Path("/proc/self/statm").read_text().split()
        return int(words[1]) * os.sysconf("SC_PAGE_SIZE")

    size = 64 * 1024  # smaller arrays than those that the C library maps one by one
    arrays = [np.ones(size, np.uint8) for _ in range(2000)]
    full = resident_bytes()
    arrays = arrays[::100]
    memory.release_freed_memory()
    assert len(arrays) == 20
    assert full - resident_bytes() > 0.8 * 2000 * size


# -- children --------------------------------------------------------------------------------------


def run_child(megabytes: int, command: list[str]) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": path,
    }  # a thread more is 100 MB more
    program = [sys.executable, __file__, str(megabytes), *map(str, command)]
    return subprocess.run(
        program, capture_output=True, encoding="utf-8", env=environment, timeout=120
    )


def main(megabytes: int, command: list[str]) -> int:
    """Run a command with so much memory besides that of a small run with its text and engine."""
    import resource
    import tempfile

    text, engine = (command[command.index(flag) + 1] for flag in ("--text-file", "--engine"))
    small = {"engine": engine, "max_steps": 5, "sample_interval": 0}
    with without_report(), tempfile.TemporaryDirectory() as folder:
        assert (
            cli.main(list(map(str, train_command(Path(text), Path(folder, "run"), **small)))) == 0
        )
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
        limit = pages * resource.getpagesize() + megabytes * 10**6
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        return cli.main(command)


if __name__ == "__main__":
    shorten_runs(pytest.MonkeyPatch())
    sys.exit(main(int(sys.argv[1]), sys.argv[2:]))


def test_the_peak_of_a_process_is_its_own_and_stays_when_memory_is_freed() -> None:
    """A parent that has touched 500 MB starts a child, which touches and frees 100 MB."""
    parent = """
import subprocess, sys
block = b"1" * 500_000_000
sys.exit(subprocess.run([sys.executable, "-c", sys.argv[1]]).returncode)
"""
    child = """
from glasslm.training.memory import peak_memory_bytes
print(peak_memory_bytes())
block = b"1" * 100_000_000
del block
print(peak_memory_bytes())
"""
    output = subprocess.run(
        [sys.executable, "-c", parent, child], capture_output=True, check=True, encoding="utf-8"
    ).stdout.split()
    if output == ["None", "None"]:
        assert sys.platform == "win32"
        return
    before, after = map(int, output)
    assert 5e6 < before < 350e6
    assert before + 70e6 < after < 450e6
