"""A run folder when processes are killed, disks are full, or two processes compete for it.

This file is also the program of those processes: `python test_damaged_runs.py ROLE FOLDER ...`.
"""

import itertools
import json
import os
import random
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from glasslm import files
from glasslm.errors import DamagedError, ExhaustedError, GlasslmError, InUseError
from glasslm.runs import checkpoint, metrics, run_folder
from glasslm.runs.checkpoint import Best, RunIdentity, TrainingPosition
from glasslm.runs.run_lock import lock_run

posix = pytest.mark.skipif(os.name != "posix", reason="needs fork, SIGKILL or resource limits")
IDENTITY = RunIdentity("c" * 64, "t" * 64, "d" * 64)
DEATHS, CUTS, FLIPS, RACES = 168, 20, 200, 20  # docs/faults.md has them
OPERATIONS = (
    "_make_folder",
    "_open",
    "_open_to_append",
    "_write",
    "_truncate",
    "_sync",
    "_sync_folder",
    "_rename",
    "_remove",
)


def save(run_dir: Path, step: int, size: int = 50) -> None:
    """Write a checkpoint in which every number is the step."""
    array = np.full((2, size), step, np.float32)
    state = {"weight": array, "adamw.m/weight": array}.items()
    checkpoint.save(
        run_dir, state, TrainingPosition(step, step, step, 0, Best(step, 1.0)), IDENTITY, keep=1
    )


def assert_whole(run_dir: Path, *expected: int) -> None:
    latest = checkpoint.load(run_dir)
    assert latest.step in expected
    for _, array in latest.state():
        assert (array == latest.step).all()


# -- death at every operation ----------------------------------------------------------------------


def die_at(k: int, torn: bool) -> None:
    """Kill this process at the k-th operation on the disk; `torn`: in the middle of a write."""
    remaining = k

    def count_down(name: str, operation: Callable[..., Any]) -> Callable[..., Any]:
        def run(*arguments: Any, **options: Any) -> Any:
            nonlocal remaining
            remaining -= 1
            if remaining < 0:
                if torn and name == "_write":
                    file, data = arguments
                    operation(file, memoryview(data)[: len(data) // 2])
                os._exit(137)
            return operation(*arguments, **options)

        return run

    for name in OPERATIONS:
        setattr(files, name, count_down(name, getattr(files, name)))


def kill_everywhere(folder: Path) -> None:
    """For each k, kill a process at operation k of a run, and resume the run with the next one.

    The process starts a run and saves steps 0, 1 and 2.
    """
    os.fsync = lambda descriptor: None  # type: ignore # as in conftest.py: the processes die, the machine does not
    k = 0
    while True:
        codes = []
        for torn in (False, True):
            run_dir = folder / f"{k}-{torn}"
            pid = os.fork()
            if pid == 0:
                die_at(k, torn)
                start_and_save(run_dir)
                os._exit(0)
            codes.append(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
            print(json.dumps({"k": k, "torn": torn, "code": codes[-1], **recover(run_dir)}))
        if codes == [0, 0]:
            return
        assert codes == [137, 137]
        k += 1


def start_and_save(run_dir: Path) -> None:
    with lock_run(run_dir):
        run_folder.create_run(run_dir, {}, "{}")
        with metrics.MetricsLog(run_dir / "metrics.jsonl") as log:
            for step in (0, 1, 2):
                save(run_dir, step)
                log.write({"kind": "checkpoint", "step": step, "path": "", "best": False})


def recover(run_dir: Path) -> dict[str, Any]:
    """Start or resume a run with what is left; returns the logged and the saved steps."""
    logged = [line["step"] for line in metrics.read_lines(run_dir / "metrics.jsonl")]
    steps = checkpoint.list_steps(run_dir)
    if steps:
        assert_whole(run_dir, steps[-1])
    if (run_dir / "run.json").exists():
        assert files.read_json(run_dir / "run.json") == {"format": 1}
        with lock_run(run_dir):
            save(run_dir, 9)
    else:
        run_folder.require_new(run_dir)
        start_and_save(run_dir)
    assert_whole(run_dir, 9, 2)
    assert not list(run_dir.rglob("*.tmp-*"))
    return {"logged": logged, "steps": steps}


@posix
def test_death_at_any_operation_leaves_a_whole_checkpoint(tmp_path: Path) -> None:
    done = child("kill_everywhere", tmp_path)
    assert done.returncode == 0, done.stderr
    ends = [json.loads(line) for line in done.stdout.splitlines()]
    deaths = [end for end in ends if end["code"] == 137]
    assert len(deaths) >= DEATHS  # two for each operation
    for end in ends:
        last = end["logged"][-1] if end["logged"] else None
        newest = end["steps"][-1] if end["steps"] else None
        # every logged checkpoint exists, and at most one more
        assert newest in ((None, 0) if last is None else (last, last + 1)), end
    assert {tuple(end["steps"]) for end in ends} == {(), (0,), (0, 1), (0, 1, 2), (0, 2)}


def test_nothing_of_a_run_is_written_elsewhere(tmp_path: Path) -> None:
    done = child("print_writers", tmp_path / "run")
    assert done.returncode == 0, done.stderr
    writers = {tuple(line.split()) for line in done.stdout.splitlines()}
    assert {file for _, file in writers} <= {"files.py", "filelock"}
    assert {event for event, _ in writers} >= {"open", "os.mkdir", "os.rename"}


def print_writers(run_dir: Path) -> None:
    """Print each change to the disk and its origin: files.py, filelock, or another file."""

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        changes = event in ("os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.truncate")
        if event == "open":
            flags = arguments[2]
            changes = isinstance(flags, int) and flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT) != 0
        if not changes:
            return
        frame = sys._getframe(1)
        names = []
        while frame.f_back is not None:
            path = Path(frame.f_code.co_filename)
            names.append("filelock" if path.parent.name == "filelock" else path.name)
            frame = frame.f_back
        print(event, next((name for name in names if name in ("files.py", "filelock")), names[0]))

    import filelock  # noqa: F401  (so that writing its bytecode is not counted)

    sys.addaudithook(hook)
    start_and_save(run_dir)


# -- damage ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["cut", "flip"])
def test_any_cut_or_flipped_bit_is_found_and_the_one_before_is_used(
    tmp_path: Path, kind: str
) -> None:
    rng = random.Random(f"{kind} 1")
    save(tmp_path, 0)
    save(tmp_path, 1)
    intact = {
        path: path.read_bytes() for path in sorted((tmp_path / "checkpoints" / "000001").iterdir())
    }
    assert len(intact) == 4
    for number in range(CUTS if kind == "cut" else FLIPS):
        path = list(intact)[number % 4]
        data = bytearray(intact[path])
        place = rng.randrange(len(data))
        if kind == "cut":
            del data[place:]
        else:
            data[place] ^= 1 << rng.randrange(8)
        path.write_bytes(data)
        warnings: list[str] = []
        assert checkpoint.load(tmp_path, warn=warnings.append).step == 0
        assert str(path) in warnings[0] or path.name == "manifest.json"
        with pytest.raises(DamagedError):
            checkpoint.load(tmp_path, 1)
        path.write_bytes(intact[path])
    assert checkpoint.load(tmp_path).step == 1


def test_any_missing_extra_or_edited_file_is_found(tmp_path: Path) -> None:
    save(tmp_path, 0)
    save(tmp_path, 1)
    folder = tmp_path / "checkpoints" / "000001"
    for path in sorted(folder.iterdir()):
        intact = path.read_bytes()
        path.unlink()
        assert checkpoint.load(tmp_path, warn=lambda _: None).step == 0
        path.write_bytes(intact + b" ")
        assert checkpoint.load(tmp_path, warn=lambda _: None).step == 0
        path.write_bytes(intact)
        (folder / f"{path.name}.bak").write_bytes(intact)
        assert checkpoint.load(tmp_path, warn=lambda _: None).step == 0
        (folder / f"{path.name}.bak").unlink()
    assert checkpoint.load(tmp_path).step == 1


# -- a full disk -----------------------------------------------------------------------------------


@posix
def test_a_full_disk_leaves_the_old_checkpoint_and_no_half_file(tmp_path: Path) -> None:
    save(tmp_path, 0)
    done = child("fill_disk", tmp_path)
    assert done.returncode == ExhaustedError.exit_code, done.stderr
    assert "000001" in done.stderr
    needed, free = (
        int(number.replace(",", ""))
        for number in re.findall(r"([\d,]+) (?:bytes are needed|are free)", done.stderr)
    )
    assert (
        1_600_000 < needed < 1_602_000
    )  # 2 x 100,000 weights and as many moments of 4 bytes, and some JSON
    assert free > 0
    assert_whole(tmp_path, 0)
    assert not list(tmp_path.rglob("*.tmp-*"))
    lines = list(metrics.read_lines(tmp_path / "metrics.jsonl"))
    assert [line["step"] for line in lines] == list(range(len(lines)))
    assert (tmp_path / "metrics.jsonl").read_bytes().endswith(b"\n")


def fill_disk(run_dir: Path) -> None:
    """Write lines to the log until it is full, then save more than there is room for."""
    import resource

    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))
    with metrics.MetricsLog(run_dir / "metrics.jsonl") as log:
        with pytest.raises(ExhaustedError, match=r"metrics\.jsonl"):
            write_without_end(log)
        assert log.bytes == (run_dir / "metrics.jsonl").stat().st_size
    save(run_dir, 1, size=100_000)


def write_without_end(log: metrics.MetricsLog) -> None:
    for step in itertools.count():
        line = {"step": step, "prompt": "", "text": "x" * 300, "temperature": 0.8, "seed": 1}
        log.write({"kind": "sample", **line})


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
def test_a_log_on_a_full_device_says_so(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").symlink_to("/dev/full")

    class Full(files.Appender):  # a device has no length to cut
        def _cut(self, length: int) -> None:
            self.bytes = 0

    log = Full(tmp_path / "metrics.jsonl")
    with pytest.raises(ExhaustedError, match="20 bytes are needed"):
        log.append(b"x" * 20)
    log.close()


# -- rivals ----------------------------------------------------------------------------------------


def test_of_two_runs_in_one_directory_exactly_one_wins(tmp_path: Path) -> None:
    """Twenty times; the message of the loser names the winner."""
    rivals = [start("race_for_folders", tmp_path) for _ in range(2)]
    for number in range(RACES):
        for rival in rivals:
            assert read_line(rival) == "ready"
        for rival in rivals:
            send_line(rival, f"run {number}")
        ends = [read_line(rival) for rival in rivals]
        (winner,) = [rival for rival, end in zip(rivals, ends) if end == "won"]
        (refused,) = [end for end in ends if end != "won"]
        assert f"process {winner.pid} on" in refused
        assert f"run {number} is in use" in refused
        send_line(winner, "let go")
        assert files.read_json(tmp_path / f"run {number}" / "run.json") == {"format": 1}
    for rival in rivals:
        rival.communicate("\n", timeout=20)
        assert rival.returncode == 0


def race_for_folders(folder: Path) -> None:
    """Race for each named folder until the input ends; hold a won folder until the next line."""
    while True:
        print("ready", flush=True)
        name = sys.stdin.readline().strip()
        if not name:
            return
        try:
            with lock_run(folder / name):
                run_folder.create_run(folder / name, {}, "{}")
                print("won", flush=True)
                sys.stdin.readline()
        except InUseError as error:
            print(error, flush=True)


def hold_folder(run_dir: Path) -> None:
    print("ready", flush=True)
    sys.stdin.readline()
    with lock_run(run_dir):
        run_folder.create_run(run_dir, {}, "{}")
        print("won", flush=True)
        sys.stdin.readline()


def test_the_lock_of_a_killed_process_is_taken_over(tmp_path: Path) -> None:
    holder = start("hold_folder", tmp_path / "run")
    send_line(holder, "go")
    assert [read_line(holder), read_line(holder)] == ["ready", "won"]
    with pytest.raises(InUseError, match=f"process {holder.pid} on .*, which started 20"):
        run_folder.require_new(tmp_path / "run")
    holder.kill()
    holder.communicate()
    assert json.loads((tmp_path / "run" / "run.lock").read_text())["pid"] == holder.pid
    with lock_run(tmp_path / "run"):
        save(tmp_path / "run", 0)


# -- children --------------------------------------------------------------------------------------


def child(role: str, folder: Path) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"OPENBLAS_NUM_THREADS": "1"}  # no threads: the child forks
    command = [sys.executable, __file__, role, str(folder)]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)


def start(role: str, folder: Path) -> subprocess.Popen[str]:
    pipe = subprocess.PIPE
    command = [sys.executable, __file__, role, str(folder)]
    return subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True)


def send_line(process: subprocess.Popen[str], word: str) -> None:
    assert process.stdin is not None
    process.stdin.write(f"{word}\n")
    process.stdin.flush()


def read_line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


if __name__ == "__main__":
    roles = {
        role.__name__: role
        for role in (kill_everywhere, print_writers, fill_disk, hold_folder, race_for_folders)
    }
    try:
        roles[sys.argv[1]](Path(sys.argv[2]))
    except GlasslmError as error:
        print(error, file=sys.stderr)
        sys.exit(error.exit_code)
