"""Two processes under torchrun train the model of one process; a killed one ends the group."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from glasslm.config.conversion import with_flags
from glasslm.config.presets import PRESETS
from glasslm.config.schema import ComputeConfig
from glasslm.training import launch

pytest.importorskip("torch")
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="torchrun and signals as on Linux")

STEPS, LONGER = 6, {"max_steps": 90, "sample_interval": 0}
FLAGS = {
    "d_model": 32, "n_layers": 2, "n_heads": 2, "block_size": 16, "dropout": 0.1, "batch_size": 8,
    "micro_batch_size": 2, "max_steps": STEPS, "eval_interval": 3, "log_interval": 1,
    "sample_interval": 6, "checkpoint_interval": 3, "keep": 9,
}  # fmt: skip
COMPUTE = ComputeConfig(engine="torch", precision="fp64", threads=1)
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "lines.txt"
    path.write_text(
        "".join(f"Line {i} of a text, {i * i} in all.\n" for i in range(400)), encoding="utf-8"
    )
    return path


@pytest.fixture(scope="module")
def single_run(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of one process."""
    path = tmp_path_factory.mktemp("alone") / "run"
    config = with_flags(PRESETS["tiny"](), FLAGS | {"text_file": str(text)})
    launch.train(
        config,
        COMPUTE,
        path,
        notify=lambda line: None,
    )
    return path


def torchrun(*words: object, processes: int = 2, timeout_s: int = 60) -> subprocess.Popen[str]:
    start = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        f"--nproc-per-node={processes}",
    ]
    environment = os.environ | ENVIRONMENT | {"GLASSLM_GROUP_TIMEOUT": str(timeout_s)}
    return subprocess.Popen(
        [*start, "-m", "glasslm", *map(str, words)],
        env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


def wait_for(process: subprocess.Popen[str]) -> tuple[int, str]:
    output, _ = process.communicate(timeout=240)
    return process.returncode, output


def make_flags(text: Path, run_dir: Path, **changes: object) -> list[str]:
    settings = (
        FLAGS
        | {"preset": "tiny", "text_file": text, "run_dir": run_dir}
        | {"engine": "torch", "precision": "fp64"}
        | changes
    )
    return [
        word
        for name, value in settings.items()
        for word in (f"--{name.replace('_', '-')}", str(value))
    ]


def load_state(run: Path, step: int = STEPS) -> dict[str, np.ndarray]:
    folder = run / "checkpoints" / f"{step:06d}"
    return load_file(folder / "model.safetensors") | load_file(folder / "optimizer.safetensors")


def read_lines(run: Path) -> list[dict]:
    """The lines of the metrics without their timing."""
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text("utf-8").splitlines()]
    return [
        {k: v for k, v in line.items() if k != "timing"}
        for line in records
        if line["kind"] in ("step", "eval")
    ]


def assert_same_run(run: Path, other: Path) -> None:
    """The tokens are the same; weights and moments agree up to the rounding of reordered sums."""
    for name, expected in load_state(other).items():
        np.testing.assert_allclose(
            load_state(run)[name],
            expected,
            rtol=0,
            atol=1e-10 * np.abs(expected).max(),
            err_msg=name,
        )
    for line, expected in zip(read_lines(run), read_lines(other), strict=True):
        assert line.get("tokens") == expected.get("tokens")
        assert line["loss"] == pytest.approx(expected["loss"], rel=1e-10)
        if line["kind"] == "step":
            assert line["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-9)


@pytest.mark.parametrize("parallel", ["ddp", pytest.param("fsdp", marks=pytest.mark.slow)])
def test_two_ranks_are_one_rank_with_twice_the_micro_batches(
    parallel: str, text: Path, single_run: Path, tmp_path: Path
) -> None:
    code, output = wait_for(
        torchrun("train", *make_flags(text, tmp_path / "run", parallel=parallel))
    )
    assert code == 0, output
    assert_same_run(tmp_path / "run", single_run)
    assert json.loads((tmp_path / "run" / "run.json").read_text("utf-8"))["processes"] == 2


@pytest.mark.slow
def test_ranks_that_do_not_divide_the_batch_are_refused_in_one_line(
    text: Path, tmp_path: Path
) -> None:
    """tests/engines/test_choice.py has the quick test of the message."""
    code, output = wait_for(torchrun("train", *make_flags(text, tmp_path / "run", batch_size=3)))
    assert code != 0
    assert "2 processes cannot share a batch of 3 sequences" in output
    assert not (tmp_path / "run").exists()


@pytest.fixture(scope="module")
def run_of_two(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of two processes."""
    return train_on_two(text, tmp_path_factory.mktemp("two") / "run")


@pytest.fixture(scope="module")
def undisturbed(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A longer run of two processes, to its end."""
    return train_on_two(text, tmp_path_factory.mktemp("undisturbed") / "run", **LONGER)


def train_on_two(text: Path, run: Path, **changes: object) -> Path:
    code, output = wait_for(torchrun("train", *make_flags(text, run, **changes)))
    assert code == 0, output
    return run


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_rank_ends_the_group_and_a_restart_goes_on_exactly(
    victim: int, text: Path, undisturbed: Path, tmp_path: Path
) -> None:
    """The end has the same bits as that of an undisturbed run."""
    killed = tmp_path / "killed"
    group = torchrun("train", *make_flags(text, killed, **LONGER))
    signal_rank(victim, signal.SIGKILL, group, after=killed / "checkpoints" / "000006")
    code, output = wait_for(group)
    assert code != 0, output
    assert not (killed / "checkpoints" / "000090").exists(), "it was over before the kill"
    code, output = wait_for(torchrun("resume", killed))
    assert code == 0, output
    assert all(
        (array == load_state(undisturbed, 90)[name]).all()
        for name, array in load_state(killed, 90).items()
    )
    assert read_lines(killed) == read_lines(undisturbed)


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_a_rank_that_hangs_ends_the_group(victim: int, text: Path, tmp_path: Path) -> None:
    """Stopped as by a debugger or a broken network: the other ends after GLASSLM_GROUP_TIMEOUT.

    A restart begins with the files that a killed rank leaves too.
    """
    stopped_run = tmp_path / "hung"
    group = torchrun("train", *make_flags(text, stopped_run, **LONGER), timeout_s=8)
    stopped = signal_rank(victim, signal.SIGSTOP, group, after=stopped_run / "checkpoints/000006")
    other = find_ranks(group)[1 - victim]
    try:
        wait_for_end(other)
    finally:  # torchrun itself would kill it half a minute later
        with suppress(ProcessLookupError):
            os.kill(stopped, signal.SIGKILL)
    code, output = wait_for(group)
    assert code != 0, output
    assert f"rank {1 - victim} has lost the others" in output
    assert not (stopped_run / "checkpoints" / "000090").exists(), "it was over before the stop"


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 4])  # two go on in the tests of killed ranks
def test_a_run_of_two_ranks_goes_on_with_any_number(
    processes: int, run_of_two: Path, single_run: Path, tmp_path: Path
) -> None:
    """The last checkpoint is removed, as if the group had been killed before it."""
    run = shutil.copytree(run_of_two, tmp_path / "run")
    shutil.rmtree(run / "checkpoints" / f"{STEPS:06d}")
    if processes == 1:
        outcome = launch.resume(run, COMPUTE, notify=lambda line: None)
        assert outcome.status == "finished"
    else:
        code, output = wait_for(torchrun("resume", run, processes=processes))
        assert code == 0, output
    assert_same_run(run, single_run)


def signal_rank(
    rank: int, number: signal.Signals, group: subprocess.Popen[str], after: Path
) -> int:
    """Signal one process of the group, once a checkpoint is there, and return its number."""
    end = time.monotonic() + 120
    while not after.exists():
        assert group.poll() is None, group.communicate()[0]
        assert time.monotonic() < end, "no checkpoint came"
        time.sleep(0.05)
    process = find_ranks(group)[rank]
    os.kill(process, number)
    return process


def find_ranks(group: subprocess.Popen[str]) -> dict[int, int]:
    """The number of the process of each rank."""
    children = Path(f"/proc/{group.pid}/task/{group.pid}/children").read_text().split()
    ranks = {}
    for child in map(int, children):
        for setting in Path(f"/proc/{child}/environ").read_bytes().split(b"\0"):
            if setting.startswith(b"RANK="):
                ranks[int(setting.removeprefix(b"RANK="))] = child
    return ranks


def wait_for_end(process: int) -> None:
    """Return when a process has ended, or fail."""
    end = time.monotonic() + 120
    stat = Path(f"/proc/{process}/stat")
    with suppress(FileNotFoundError, ProcessLookupError):  # it is gone
        while stat.read_text().rpartition(")")[2].split()[0] != "Z":
            assert time.monotonic() < end, "the other rank waits for ever"
            time.sleep(0.05)
