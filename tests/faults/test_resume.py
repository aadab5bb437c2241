"""After a kill or signal at any step or save, a resumed run ends with the same bits.

This file is also the program of the children, in which processes are forked, and so die cheaply:
`python test_resume.py ENGINE FOLDER`.
"""

import functools
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from glasslm import files
from glasslm.config.schema import ComputeConfig
from glasslm.data import batch_sampler
from glasslm.errors import DamagedError
from glasslm.runs import checkpoint, run_folder
from glasslm.runs.metrics import comparable_lines
from glasslm.training import launch
from glasslm.training.loop import Loop
from small_runs import (
    comparable_results,
    ignore_message,
    logged_lines,
    shorten_runs,
    small_config,
    without_report,
    write_text,
)

posix = pytest.mark.skipif(os.name != "posix", reason="needs fork, SIGKILL or resource limits")
ENGINES = ["numpy", "torch"]
STEPS = 20
KILLED_STEPS = {"numpy": range(1, STEPS + 1), "torch": range(1, STEPS + 1, 3)}
RESUMES = 16  # from each step of a run, by each engine
MOMENTS = (0, 4, 11)  # operations of a save at which the first signal comes
DEATHS = 4  # at a second one
TINY: dict[str, Any] = {
    "d_model": 16,
    "n_layers": 1,
    "block_size": 16,
    "batch_size": 4,
    "micro_batch_size": 2,
    "max_steps": STEPS,
    "dropout": 0.2,
    "sample_interval": 0,
    "eval_interval": 5,
    "checkpoint_interval": 3,
    "keep": 2,
}


def compute(engine: Any) -> ComputeConfig:
    if engine == "torch":
        pytest.importorskip("torch")
    return ComputeConfig(engine=engine, device="cpu", precision="fp32", threads=1)


def train(text: Path, run_dir: Path, engine: str, **flags: Any) -> str:
    with without_report():
        return launch.train(
            small_config(text, **TINY | flags), compute(engine), run_dir, notify=ignore_message
        ).status


def resume(run_dir: Path, engine: str, notify: Any = ignore_message) -> str:
    with without_report():
        return launch.resume(run_dir, compute(engine), notify=notify).status


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text(tmp_path_factory.mktemp("text") / "text.txt")


# -- kill -9 at every step -------------------------------------------------------------------------


@pytest.fixture(scope="module", params=ENGINES)
def deaths(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, list[dict[str, Any]]]:
    """What became of the killed runs of each kind, with one engine."""
    return run_child(request.param, tmp_path_factory.mktemp("deaths"))


@posix
def test_kill_9_in_the_middle_of_each_of_twenty_steps(deaths: dict[str, Any]) -> None:
    """The steps of the torch engine are sampled: its loop is the same."""
    ends = deaths["killed in a step"]
    assert [end["step"] for end in ends] == list(KILLED_STEPS[deaths["engine"]])
    for end in ends:
        assert end["died"] == -signal.SIGKILL, end
        assert end["resumed"] == 0, end
        assert end["same"], end
    # Checkpoints that a run went on from:
    assert len({end["from"] for end in ends}) >= (7 if deaths["engine"] == "numpy" else 5)


def kill_in_each_step(engine: str, folder: Path) -> list[dict[str, Any]]:
    """Die between the gradients of a step and its update; resume.

    Compare with a run that nobody killed.
    """
    folder.mkdir()
    text = write_text(folder / "text.txt")
    whole, ends = folder / "whole", []
    assert run_in_fork(lambda: train(text, whole, engine)) == 0
    for step in KILLED_STEPS[engine]:
        run = folder / str(step)

        def die(run: Path = run, step: int = step) -> None:
            original = Loop.advance

            def advance(self: Loop) -> Any:
                if self.step + 1 == step:
                    self.engine.update = lambda *_: os.kill(os.getpid(), signal.SIGKILL)  # type: ignore
                return original(self)

            Loop.advance = advance  # type: ignore[method-assign]
            train(text, run, engine)

        died = run_in_fork(die)
        start = checkpoint.load(run, warn=ignore_message).step
        resumed = run_in_fork(lambda run=run: resume(run, engine))
        same = resumed == 0 and comparable_results(run, STEPS) == comparable_results(whole, STEPS)
        ends.append({"step": step, "died": died, "from": start, "resumed": resumed, "same": same})
    return ends


# -- signals during a save -------------------------------------------------------------------------


@contextmanager
def at_operation(k: int, step: int, act: Callable[[], Any]) -> Iterator[list[str]]:
    """`act` at the k-th operation on the disk of the save of a step.

    The names of all its operations.
    """
    names = ["_make_folder", "_open", "_write", "_sync", "_sync_folder", "_rename", "_remove"]
    done: list[str] = []
    saving = False
    with pytest.MonkeyPatch.context() as patch:
        save = checkpoint.save

        def tracked_save(
            run_dir: Path, engine: Any, position: Any, identity: Any, **options: Any
        ) -> Path:
            nonlocal saving
            saving = position.step == step
            try:
                return save(run_dir, engine, position, identity, **options)
            finally:
                saving = False

        def counted_operation(name: str, operation: Callable[..., Any]) -> Callable[..., Any]:
            def run(*arguments: Any, **options: Any) -> Any:
                if saving:
                    done.append(name)
                    if len(done) == k + 1:
                        act()
                return operation(*arguments, **options)

            return run

        patch.setattr(checkpoint, "save", tracked_save)
        for name in names:
            patch.setattr(files, name, counted_operation(name, getattr(files, name)))
        yield done


@posix
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_during_a_save_waits_for_its_end(
    number: signal.Signals, engine: str, text: Path, tmp_path: Path
) -> None:
    """The first signal of a run: at an early, a middle and a late operation of one save."""
    assert train(text, tmp_path / "whole", engine) == "finished"
    for k in MOMENTS:
        run = tmp_path / str(k)
        with at_operation(k, 6, lambda: signal.raise_signal(number)) as operations:
            assert train(text, run, engine) == "interrupted"
        assert len(operations) > 11
        assert checkpoint.list_steps(run)[-1] == 6
        assert logged_lines(run, "end")[0]["step"] == 6
        assert resume(run, engine) == "finished"
        assert comparable_results(run, STEPS) == comparable_results(tmp_path / "whole", STEPS)


@posix
def test_a_second_signal_during_a_save_leaves_at_once_and_nothing_is_lost(
    deaths: dict[str, Any],
) -> None:
    ends = deaths["two signals in a save"]
    assert len(ends) == DEATHS
    assert ends[-1]["k"] > 12  # operations of a save
    for end in ends:
        assert end["died"] == -signal.SIGTERM, end
        assert end["from"] in (5, 6), end
        assert (end["resumed"], end["same"]) == (0, True), end
    assert {end["from"] for end in ends} == {5, 6}


def two_signals_in_a_save(engine: str, folder: Path) -> list[dict[str, Any]]:
    """SIGTERM twice at some operations of the save of step 6, from the first to the last one."""
    folder.mkdir()
    text = write_text(folder / "text.txt")
    whole, ends = folder / "whole", []

    def count() -> None:
        with at_operation(-1, 6, lambda: None) as operations:
            train(text, whole, engine)
        (folder / "count").write_text(str(len(operations)), encoding="ascii")

    assert run_in_fork(count) == 0
    last = int((folder / "count").read_text(encoding="ascii")) - 1
    for k in (0, last // 3, last // 2, last):
        run = folder / str(k)

        def die(run: Path = run, k: int = k) -> None:
            def signals() -> None:
                signal.raise_signal(signal.SIGTERM)
                signal.raise_signal(signal.SIGTERM)

            with at_operation(k, 6, signals):
                train(text, run, engine)

        died = run_in_fork(die)
        start = checkpoint.load(run, warn=ignore_message).step
        resumed = run_in_fork(lambda run=run: resume(run, engine))
        same = (
            resumed == 0
            and comparable_results(run, STEPS) == comparable_results(whole, STEPS)
            and not list(run.rglob("*.tmp-*"))
        )
        ends.append({"k": k, "died": died, "from": start, "resumed": resumed, "same": same})
    return ends


# -- from each step --------------------------------------------------------------------------------


@pytest.mark.parametrize("engine", ENGINES)
def test_a_run_resumes_from_each_of_its_steps(engine: str, text: Path, tmp_path: Path) -> None:
    """With dropout, accumulation, warmup and decay; inside an epoch, at its end and after it.

    Muon's moments are there, and AdamW's for what is no hidden matrix, and an average of the
    weights.

    The losses are equal as hex floats, and the windows of text that a resumed run reads are those
    that are left.
    """
    flags = {
        "optimizer": "muon",
        "schedule": "wsd",
        "block_size": 128,
        "epochs": 1.7,
        "checkpoint_interval": 1,
        "keep": 100,
        "batch_size": 3,
        "ema": 0.9,
    }
    read: list[tuple[int, list[int]]] = []
    with pytest.MonkeyPatch.context() as patch:
        starts = batch_sampler.BatchSampler.window_starts

        def recorded_starts(self: batch_sampler.BatchSampler, step: int, rows: Any) -> Any:
            window_starts = starts(self, step, rows)
            read.append((step, window_starts.tolist()))
            return window_starts

        assert train(text, tmp_path / "whole", engine, **flags) == "finished"
        run = run_folder.Run(tmp_path / "whole")
        steps = run.config.train.max_steps
        expected = comparable_results(run.path, steps)
        order = batch_sampler.BatchSampler(
            run.record["data"]["train_tokens"], 128, 3, 42, epochs=True
        )
        assert 1 in [order.epoch(step) for step in range(steps)], (
            "it stops and goes on at the end of an epoch, too"
        )
        due = [(step, order.window_starts(step, np.arange(3)).tolist()) for step in range(steps)]
        patch.setattr(batch_sampler.BatchSampler, "window_starts", recorded_starts)
        for step in range(steps):
            copy = cut_back(run.path, tmp_path / f"from {step}", step)
            read.clear()
            assert resume(copy, engine) == "finished"
            assert read == due[step:]
            assert comparable_results(copy, steps) == expected
            assert hex_losses(copy) == hex_losses(run.path)
    assert steps == RESUMES


def cut_back(run: Path, copy: Path, step: int) -> Path:
    """The run as a kill after the checkpoint of `step` leaves it.

    Later checkpoints gone, metrics as they are.
    """
    later = [f"{other:06d}" for other in checkpoint.list_steps(run) if other > step]
    return Path(
        shutil.copytree(
            run, copy, ignore=lambda folder, names: [name for name in names if name in later]
        )
    )


def hex_losses(run: Path) -> list[tuple[str, int, str]]:
    lines = comparable_lines(run_folder.Run(run).metrics())
    return [(line["kind"], line["step"], float(line["loss"]).hex()) for line in lines]


# -- entries ---------------------------------------------------------------------------------------


def rename_entry(arrays: dict[str, Any]) -> None:
    arrays["blocks.0.attention.query.weight"] = arrays.pop("blocks.0.attention.q.weight")


def swap_entries(arrays: dict[str, Any]) -> None:
    one, other = "blocks.0.attention.q.weight", "blocks.0.feedforward.down.weight"
    arrays[one], arrays[other] = arrays[other], arrays[one]


def reshape_entry(arrays: dict[str, Any]) -> None:
    arrays["embedding.weight"] = arrays["embedding.weight"].reshape(-1)


def transpose_entry(arrays: dict[str, Any]) -> None:
    arrays["embedding.weight"] = np.ascontiguousarray(arrays["embedding.weight"].T)


def remove_entry(arrays: dict[str, Any]) -> None:
    del arrays["norm.weight"]


def add_entry(arrays: dict[str, Any]) -> None:
    arrays["blocks.1.attention.q.weight"] = arrays["blocks.0.attention.q.weight"]


def transpose_moment(arrays: dict[str, Any]) -> None:
    arrays["adamw.m/embedding.weight"] = np.ascontiguousarray(arrays["adamw.m/embedding.weight"].T)


def add_foreign_moment(arrays: dict[str, Any]) -> None:
    arrays["sgd.m/norm.weight"] = arrays.pop("adamw.m/norm.weight")


ENTRIES: dict[Callable[[dict[str, Any]], None], str] = {
    rename_entry: "'blocks.0.attention.query.weight' belongs to no weight",
    swap_entries: "'blocks.0.(attention.q|feedforward.down).weight' has shape",
    reshape_entry: "'embedding.weight' has shape",
    transpose_entry: "'embedding.weight' has shape",
    remove_entry: "'norm.weight' is missing",
    add_entry: "'blocks.1.attention.q.weight' belongs to no weight",
    transpose_moment: "'adamw.m/embedding.weight' has shape",
    add_foreign_moment: "'sgd.m/norm.weight' belongs to no weight",
}


@pytest.fixture(scope="module")
def finished_run(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A run of three steps by an engine."""

    @functools.cache
    def train_once(engine: str) -> Path:
        run = tmp_path_factory.mktemp("finished") / engine
        assert train(text, run, engine, max_steps=3, eval_interval=3) == "finished"
        return run

    return train_once


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("change", ENTRIES, ids=lambda change: change.__name__)
def test_a_changed_entry_is_named_and_never_a_part_is_loaded(
    change: Callable[[dict[str, Any]], None],
    engine: str,
    finished_run: Callable[[str], Path],
    tmp_path: Path,
) -> None:
    """Though the manifest agrees with the file, as that of somebody who meant well would."""
    from glasslm.engines.factory import make_engine

    run = shutil.copytree(finished_run(engine), tmp_path / "run")
    good = checkpoint.load(run)
    resumed_run = run_folder.Run(run)
    machine = make_engine(
        resumed_run.config, resumed_run.tokenizer.vocab_size, compute(engine), training=True
    )
    machine.load(checkpoint.load(run, 0).state())
    arrays_before = {name: array.copy() for name, array in machine.state()}
    rewrite_weights(good.path, change)
    with pytest.raises(DamagedError, match=ENTRIES[change]):
        machine.load(checkpoint.load(run).state(), 3)
    arrays_after = dict(machine.state())
    assert machine.updates == 0
    assert all((array == arrays_after[name]).all() for name, array in arrays_before.items()), (
        "a part was loaded"
    )
    (run / "metrics.jsonl").write_bytes(
        (run / "metrics.jsonl").read_bytes().rpartition(b'{"kind": "end"')[0]
    )
    with pytest.raises(DamagedError, match=ENTRIES[change]):
        resume(run, engine)
    assert checkpoint.list_steps(run) == [0, 3]


@pytest.mark.parametrize("engine", ENGINES)
def test_another_order_of_entries_changes_nothing(engine: str, text: Path, tmp_path: Path) -> None:
    """They are found by their names."""
    assert train(text, tmp_path / "whole", engine, keep=100) == "finished"
    run = cut_back(tmp_path / "whole", tmp_path / "run", 15)
    path = run / "checkpoints" / "000015" / "model.safetensors"
    header_bytes = int.from_bytes(path.read_bytes()[:8], "little")
    header = json.loads(path.read_bytes()[8 : 8 + header_bytes])
    text_of_header = json.dumps(dict(reversed(header.items()))).encode()
    body = path.read_bytes()[8 + header_bytes :]
    path.write_bytes(len(text_of_header).to_bytes(8, "little") + text_of_header + body)
    rewrite_weights(path.parent)
    assert resume(run, engine) == "finished"
    assert comparable_results(run, STEPS) == comparable_results(tmp_path / "whole", STEPS)


def rewrite_weights(folder: Path, change: Callable[[dict[str, Any]], None] | None = None) -> None:
    """Other arrays in a checkpoint, and a manifest that agrees with its files."""
    if change is not None:
        name = "optimizer.safetensors" if "moment" in change.__name__ else "model.safetensors"
        arrays = load_file(folder / name)
        change(arrays)
        save_file(arrays, folder / name)
    remaining = {
        path.name: [path.read_bytes()] for path in folder.iterdir() if path.name != files.MANIFEST
    }
    files.write_folder(folder, remaining)


# -- children --------------------------------------------------------------------------------------


def run_child(engine: str, folder: Path) -> dict[str, Any]:
    """What the program prints."""
    compute(engine)
    path = os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    alone = {
        "OPENBLAS_NUM_THREADS": "1",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": path,
    }  # no threads: the child forks
    command = [sys.executable, __file__, engine, str(folder)]
    done = subprocess.run(
        command, capture_output=True, text=True, env=os.environ | alone, timeout=240
    )
    assert done.returncode == 0, done.stderr
    results: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return results


def run_in_fork(act: Callable[[], Any]) -> int:
    """The exit code of a process that does this, or minus the signal that ended it."""
    sys.stdout.flush()
    pid = os.fork()
    if pid == 0:
        try:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            act()
            os._exit(0)
        except BaseException as error:
            print(repr(error), file=sys.stderr)
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


if __name__ == "__main__":
    os.fsync = lambda descriptor: None  # type: ignore # as in conftest.py: the processes die, the machine does not
    shorten_runs(pytest.MonkeyPatch())
    name, folder = sys.argv[1], Path(sys.argv[2])
    if name == "torch":
        from glasslm.engines.torch import engine  # noqa: F401 - once, and not in each of the forked processes
    results = {
        "engine": name,
        "killed in a step": kill_in_each_step(name, folder / "steps"),
        "two signals in a save": two_signals_in_a_save(name, folder / "save"),
    }
    print(json.dumps(results))
