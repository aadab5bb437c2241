"""A run from text to its last line.

What the folder holds, what is refused, and what happens when it goes wrong.
"""

import dataclasses
import json
import os
import platform
import re
import shutil
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from glasslm import files
from glasslm.cli.outcome import report_outcome
from glasslm.config.conversion import from_dict
from glasslm.config.schema import ComputeConfig, RunConfig
from glasslm.data.sources import corpora
from glasslm.engines import factory
from glasslm.engines.choice import resolve_micro_batch_size
from glasslm.engines.memory_estimate import numpy_memory_bytes
from glasslm.engines.numpy.engine import NumpyEngine
from glasslm.errors import CompilerError, DamagedError, ExhaustedError, InputError, InUseError
from glasslm.model.parameters import parameter_table
from glasslm.report import run_report
from glasslm.runs import metrics, run_folder
from glasslm.runs.protection import open_run
from glasslm.runs.run_lock import lock_run
from glasslm.text import format_bytes
from glasslm.training import engine_preparation, launch, step_timer
from glasslm.training.loop import Loop
from glasslm.training.time_limit import TimeLimit
from small_runs import (
    COMPUTE,
    comparable_results,
    ignore_message,
    logged_lines,
    read_json,
    resume,
    small_config,
    train,
    without_report,
    write_text,
)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text(tmp_path_factory.mktemp("text") / "text.txt")


@pytest.fixture(scope="module")
def finished(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nobody changes."""
    return train(text, tmp_path_factory.mktemp("runs") / "finished", test_fraction=0.1).run_dir


# -- the folder ------------------------------------------------------------------------------------


def test_run_json_has_the_fields_that_are_promised(finished: Path, text: Path) -> None:
    record = read_json(finished / "run.json")
    assert set(record) == {
        "format",
        "preset",
        "glasslm",
        "created",
        "command",
        "seed",
        "config",
        "engine",
        "device",
        "precision",
        "compiled",
        "threads",
        "processes",
        "parallel",
        "deterministic",
        "parameters",
        "flops_per_token",
        "data",
        "tokenizer",
        "versions",
        "machine",
        "git",
        "blas",
    }
    assert (record["format"], record["seed"], record["engine"]) == (1, 42, "numpy")
    assert (record["device"], record["precision"]) == ("cpu", "fp32")
    assert (record["compiled"], record["threads"], record["processes"]) == (False, 1, 1)
    assert datetime.fromisoformat(record["created"]).tzinfo is not None
    assert set(record["config"]) == {"model", "data", "optimizer", "train"}
    config = from_dict(RunConfig, record["config"])
    assert config == config.resolve() == small_config(text, test_fraction=0.1).resolve()
    assert (
        record["parameters"]
        == parameter_table(config.model, record["tokenizer"]["vocab_size"]).counts()
    )
    assert set(record["parameters"]) == {"total", "non_embedding", "active", "matmul", "trained"}
    assert set(record["tokenizer"]) == {"kind", "vocab_size", "sha256", "lossless"}
    data = record["data"]
    assert set(data) == {
        "files",
        "sha256",
        "train_tokens",
        "val_tokens",
        "test_tokens",
        "train_bytes",
        "val_bytes",
        "test_bytes",
    }
    (file,) = data["files"]
    assert file == {
        "path": str(text),
        "bytes": text.stat().st_size,
        "sha256": files.file_sha256(text),
        "origin": "",
    }
    assert data["train_bytes"] + data["val_bytes"] + data["test_bytes"] == text.stat().st_size
    assert record["versions"]["python"] == platform.python_version()
    assert record["versions"]["numpy"] == np.__version__


FIELDS = {
    "plan": {"max_steps"},
    "step": {"loss", "lr", "grad_norm", "clipped", "tokens", "epoch", "timing"},
    "eval": {"split", "loss", "perplexity", "bpb", "tokens", "bytes", "whole", "best", "timing"},
    "sample": {"prompt", "text", "temperature", "seed"},
    "checkpoint": {"path", "best", "timing"},
    "end": {"status", "best_step", "best_loss", "sha256"},
}


def test_metrics_have_the_fields_that_are_promised(finished: Path) -> None:
    lines = list(metrics.read_lines(finished / "metrics.jsonl"))
    assert {line["kind"] for line in lines} == set(FIELDS)
    for line in lines:
        assert set(line) == {"kind", "step"} | FIELDS[line["kind"]]
        if line["kind"] == "step":
            assert {"elapsed_s", "tokens_per_s", "memory_bytes"} <= set(line["timing"])
    assert lines[0]["kind"] == "plan"
    assert lines[-1]["kind"] == "end"
    elapsed = [line["timing"]["elapsed_s"] for line in lines if "timing" in line]
    assert elapsed == sorted(elapsed)


def test_evaluations_say_the_same_thing_three_ways(finished: Path) -> None:
    for line in logged_lines(finished, "eval"):
        assert line["perplexity"] == pytest.approx(np.exp(line["loss"]))
        assert line["bpb"] == pytest.approx(
            line["loss"] / np.log(2) * line["tokens"] / line["bytes"]
        )


def test_a_checkpoint_has_the_files_and_fields_that_are_promised(finished: Path) -> None:
    record = read_json(finished / "run.json")
    for folder in (finished / "checkpoints").iterdir():
        assert re.fullmatch(r"\d{6}", folder.name)
        names = {path.name for path in folder.iterdir()}
        assert names == {
            "model.safetensors",
            "optimizer.safetensors",
            "state.json",
            "manifest.json",
        }
        manifest = read_json(folder / "manifest.json")["files"]
        assert set(manifest) == names - {"manifest.json"}
        for name, entry in manifest.items():
            assert entry == {
                "bytes": (folder / name).stat().st_size,
                "sha256": files.file_sha256(folder / name),
            }
        state = read_json(folder / "state.json")
        assert set(state) == {
            "format", "step", "updates", "tokens", "metrics_bytes", "best", "loop", "loss_scale",
            "config_sha256", "tokenizer_sha256", "data_sha256", "record_sha256", "metrics_sha256",
        }  # fmt: skip
        assert state["step"] == state["updates"] == int(folder.name)
        assert state["tokens"] == state["step"] * 256
        assert set(state["best"]) == {"step", "loss"}
        assert state["data_sha256"] == record["data"]["sha256"]
        assert state["tokenizer_sha256"] == record["tokenizer"]["sha256"]
        weights = load_file(folder / "model.safetensors")
        assert {name: array.shape for name, array in weights.items()} == {
            name: row.shape
            for name, row in parameter_table(run_folder.Run(finished).config.model, 21).items()
        }
        assert {array.dtype for array in weights.values()} == {np.dtype(np.float32)}
        moments = load_file(folder / "optimizer.safetensors")
        assert {name.partition("/")[0] for name in moments} == {"adamw.m", "adamw.v", "muon.m"}
        assert {name.partition("/")[2] for name in moments} == set(weights)


def test_metrics_bytes_ends_at_a_line(finished: Path) -> None:
    written = (finished / "metrics.jsonl").read_bytes()
    for folder in (finished / "checkpoints").iterdir():
        size = read_json(folder / "state.json")["metrics_bytes"]
        assert written[:size].endswith(b"}\n")


def test_the_same_seed_gives_the_same_run_and_another_does_not(
    text: Path, tmp_path: Path, finished: Path
) -> None:
    again = train(text, tmp_path / "again", test_fraction=0.1).run_dir
    assert comparable_results(again, 20) == comparable_results(finished, 20)
    other = train(text, tmp_path / "other", test_fraction=0.1, seed=43).run_dir
    assert comparable_results(other, 20)[0] != comparable_results(finished, 20)[0]


def test_the_number_of_threads_changes_no_bit(text: Path, tmp_path: Path) -> None:
    ends = []
    for threads in (1, 2, 3):
        config = small_config(text, dropout=0.2, micro_batch_size=3)
        with without_report():
            run = launch.train(
                config,
                ComputeConfig(threads=threads),
                tmp_path / str(threads),
                notify=ignore_message,
            ).run_dir
        ends.append(comparable_results(run, 20))
    assert ends[0] == ends[1] == ends[2]


def test_the_name_of_a_run_says_what_it_is(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    run = launch.train(
        small_config(text, max_steps=1), COMPUTE, preset="tiny", notify=ignore_message
    ).run_dir
    assert re.fullmatch(r"text-tiny-\d{8}-\d{6}", run.name)
    assert run.parent == Path("runs")
    assert run_folder.find_run(run.name) == run


def test_what_is_said_before_it_starts(text: Path, tmp_path: Path) -> None:
    plans = {}
    for precision in ("fp32", "fp64"):
        said: list[str] = []
        with without_report():
            compute = dataclasses.replace(COMPUTE, precision=precision)
            launch.train(
                small_config(text, max_steps=2), compute, tmp_path / precision, notify=said.append
            )
        plans[precision] = "\n".join(said)
    config = small_config(text).resolve()
    total = parameter_table(config.model, 21).total
    for expected in (
        f"{total:,} parameters",
        "2 steps",
        "512",
        "FLOPs",
        "expected",
        "numpy engine",
    ):
        assert expected in plans["fp32"]
    for precision, size_of_a_number in (("fp32", 4), ("fp64", 8)):
        memory = format_bytes(
            numpy_memory_bytes(
                config, 21, resolve_micro_batch_size(config, "numpy"), 1, size_of_a_number
            )
        )
        assert f"{memory} of memory" in plans[precision]


def test_a_fallback_is_recorded_where_the_report_finds_it(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = corpora.find_source
    monkeypatch.setattr(
        corpora,
        "find_source",
        lambda data, notify: dataclasses.replace(original(data, notify), fallback=True),
    )
    run = train(text, tmp_path / "run", max_steps=1).run_dir
    assert [line["kind"] for line in metrics.read_lines(run / "metrics.jsonl")][:3] == [
        "plan",
        "warning",
        "eval",
    ]
    (warning,) = logged_lines(run, "warning")
    assert (warning["step"], warning["code"]) == (0, "fallback")
    assert "text" in warning["message"]


def test_a_compilation_that_fails_is_a_note_unless_it_was_asked_for(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    computes: list[ComputeConfig] = []

    def fail(*_: Any) -> Any:
        raise CompilerError("no C++ compiler works")

    def make(config: RunConfig, vocab_size: int, compute: ComputeConfig, **settings: Any) -> Any:
        computes.append(compute)
        plain = dataclasses.replace(compute, compile="off")
        engine: Any = factory.make_engine(config, vocab_size, plain, **settings)
        if compute.compile == "on":
            engine.accumulate = fail
        return engine

    monkeypatch.setattr(engine_preparation, "make_engine", make)
    monkeypatch.setattr(step_timer, "should_compile", lambda compute, s: True)
    messages: list[str] = []
    config, run = small_config(text, max_steps=2), tmp_path / "run"
    launch.train(config, COMPUTE, run, notify=messages.append)
    assert [compute.compile for compute in computes] == ["auto", "on", "off"]
    assert read_json(run / "run.json")["compiled"] is False
    note = "not compiled: torch.compile does not work here (no C++ compiler works)"
    assert note in "\n".join(messages)
    assert "compiled: the run is long" not in "\n".join(messages)
    monkeypatch.setattr(
        engine_preparation, "choose_compute", lambda config, size, compute: (compute, [])
    )
    asked = ComputeConfig(engine="numpy", device="cpu", precision="fp32", compile="on", threads=1)
    with pytest.raises(InputError, match=r"compile does not work here .*use --compile off"):
        launch.train(config, asked, tmp_path / "other", notify=ignore_message)


@pytest.mark.parametrize("obstacle", ["", "does not work", "memory", "time", "steps"])
def test_numpy_gives_way_to_compiled_pytorch_that_has_time_for_more_steps(
    obstacle: str, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only where the time fixes the steps. Nothing is compiled here."""
    pytest.importorskip("torch")
    computes: list[ComputeConfig] = []

    def make(config: RunConfig, vocab_size: int, compute: ComputeConfig, **settings: Any) -> Any:
        computes.append(compute)
        if compute.compile == "on" and obstacle == "does not work":
            raise CompilerError("no C++ compiler works")
        if compute.compile == "on" and obstacle == "memory":
            raise MemoryError
        plain = dataclasses.replace(compute, precision="fp32", compile="off")
        return factory.make_engine(config, vocab_size, plain, **settings)

    def choose(compute: ComputeConfig, parameters: int, training: bool, compiled: bool) -> Any:
        if not compiled:
            return ComputeConfig(engine="numpy", device="cpu", precision="fp32"), "few parameters"
        return ComputeConfig(engine="torch", device="cpu", precision="bf16"), "compiled"

    monkeypatch.setattr(engine_preparation, "make_engine", make)
    monkeypatch.setattr(engine_preparation, "choose_engine", choose)
    monkeypatch.setattr(step_timer, "should_compile", lambda compute, s: compute.engine == "torch")
    seconds = iter([100.0, 150.0 if obstacle == "time" else 50.0])
    monkeypatch.setattr(
        step_timer, "time_steps", lambda *_: step_timer.StepTimer(next(seconds), 1e-3, 0.0, 1e-3)
    )
    messages: list[str] = []
    length = {"max_steps": 5} if obstacle == "steps" else {"max_time": "10m"}
    config, run = small_config(text, **length), tmp_path / "run"
    launch.train(config, ComputeConfig(), run, notify=messages.append, stop_at=1)
    engines = [(compute.engine, compute.compile) for compute in computes]
    assert engines == [("numpy", "auto"), ("torch", "on")][: 1 if obstacle == "steps" else 2]
    record, plan = read_json(run / "run.json"), "\n".join(messages)
    assert record["engine"] == ("numpy" if obstacle else "torch")
    assert ("engine: torch (compiled)" in plan) is not bool(obstacle)
    assert ("engine: numpy (few parameters)" in plan) is bool(obstacle)
    assert record["config"]["train"]["max_steps"] == (5 if obstacle else 10)
    assert ("not compiled" in plan) is (obstacle in ("does not work", "memory", "time"))


# -- time ------------------------------------------------------------------------------------------


def test_max_time_fixes_the_steps_once_and_writes_them_down(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A machine that becomes slower while it trains would end the run before its last step.
    monkeypatch.setattr(TimeLimit, "has_time_for_step", lambda self: True)
    rarely = {"eval_interval": 50, "checkpoint_interval": 1000, "sample_interval": 0}
    run = train(text, tmp_path / "run", max_time="2s", max_steps=1, **rarely)
    record = read_json(run.run_dir / "run.json")["config"]["train"]
    (end,) = logged_lines(run.run_dir, "end")
    assert record["max_time"] == "2s"
    assert record["max_steps"] == end["step"] == logged_lines(run.run_dir, "plan")[0]["max_steps"]
    assert end["step"] > 10
    assert run.elapsed_s < 20  # a busy machine may be slower than it was when it was measured
    copy = shutil.copytree(run.run_dir, tmp_path / "copy")
    shutil.rmtree(copy / "checkpoints" / f"{end['step']:06d}")
    assert (
        resume(copy).status == "finished"
    )  # with the steps that were fixed, not with a new measurement
    assert comparable_results(copy, end["step"]) == comparable_results(run.run_dir, end["step"])


def test_a_time_limit_ends_in_a_whole_or_a_sampled_measurement_that_is_announced(
    tmp_path: Path,
) -> None:
    """The plan, run.json and the last evaluations say the same about the final measurement."""
    messages: list[str] = []
    config = small_config(write_text(tmp_path / "text.txt", 20_000), max_time="3s", block_size=16)
    with without_report():
        run = launch.train(config, COMPUTE, tmp_path / "run", notify=messages.append)
    record = read_json(run.run_dir / "run.json")
    is_sampled = "final_windows" in record
    announced = [message for message in messages if "validation windows" in message]
    assert bool(announced) == is_sampled
    assert run.best is not None
    assert run.best["whole"] != is_sampled
    assert ("stderr" in run.best) == is_sampled
    assert any("measuring its speed" in message for message in messages)


# -- what is refused -------------------------------------------------------------------------------


def test_an_existing_run_is_refused_and_resume_is_named(finished: Path, text: Path) -> None:
    content = (finished / "run.json").read_bytes()
    with pytest.raises(InputError, match="glasslm resume"):
        train(text, finished)
    assert (finished / "run.json").read_bytes() == content


def test_a_run_in_use_is_refused_with_who_holds_it(finished: Path, text: Path) -> None:
    with lock_run(finished):
        with pytest.raises(InUseError, match=str(os.getpid())):
            train(text, finished)
        with pytest.raises(InUseError, match=str(os.getpid())):
            resume(finished)


def test_a_finished_run_has_nothing_left_to_do(finished: Path) -> None:
    content = (finished / "metrics.jsonl").read_bytes()
    with pytest.raises(InputError, match="nothing left to do"):
        resume(finished)
    assert (finished / "metrics.jsonl").read_bytes() == content


def test_nothing_is_created_for_a_run_that_cannot_start(text: Path, tmp_path: Path) -> None:
    for flags in (
        {"block_size": 5000},
        {"batch_size": 100_000, "micro_batch_size": 1},
        {"tokenizer": "nothing.json"},
    ):
        with pytest.raises(InputError):
            train(text, tmp_path / "run", **flags)
        assert not (tmp_path / "run").exists()
    with pytest.raises(InputError):
        train(tmp_path / "no such text", tmp_path / "run")
    assert not (tmp_path / "run").exists()


def unfinished(finished: Path, copy: Path) -> Path:
    """The same run without its end."""
    shutil.copytree(finished, copy)
    shutil.rmtree(copy / "checkpoints" / "000020")
    return copy


def test_another_tokenizer_is_refused_with_both_hashes(finished: Path, tmp_path: Path) -> None:
    run = unfinished(finished, tmp_path / "run")
    path = run / "tokenizer.json"
    tokenizer = read_json(path)
    path.write_text(
        json.dumps(tokenizer | {"alphabet": tokenizer["alphabet"].replace("k", "j")}),
        encoding="utf-8",
    )
    with pytest.raises(
        DamagedError, match=f"[0-9a-f]{{64}}.*{run_folder.Run(finished).tokenizer.sha256}"
    ):
        resume(run)
    for damage in (b"{", b"\xff", b"[]", b'{"kind": "word"}'):
        path.write_bytes(damage)
        with pytest.raises(DamagedError, match=r"tokenizer\.json"):
            resume(run)


def test_another_text_is_refused_with_both_hashes(
    text: Path, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the cache has lost the tokens and the file has changed since."""
    mine = write_text(tmp_path / "mine.txt")
    with monkeypatch.context() as patch:
        patch.setenv("GLASSLM_CACHE", str(tmp_path / "first"))
        run = unfinished(train(mine, tmp_path / "whole").run_dir, tmp_path / "run")
    sha256 = run_folder.Run(run).record["data"]["files"][0]["sha256"]
    monkeypatch.setenv("GLASSLM_CACHE", str(tmp_path / "second"))
    mine.write_text(mine.read_text(encoding="utf-8").replace("king", "sing"), encoding="utf-8")
    content = (run / "metrics.jsonl").read_bytes()
    with pytest.raises(DamagedError, match=sha256) as caught:
        resume(run)
    assert len(re.findall("[0-9a-f]{64}", str(caught.value))) == 2
    assert caught.value.exit_code == 4
    assert (run / "metrics.jsonl").read_bytes() == content
    write_text(mine)  # put back, it goes on
    assert resume(run).status == "finished"
    assert comparable_results(run, 20) == comparable_results(tmp_path / "whole", 20)


def test_an_edited_configuration_is_refused(finished: Path, tmp_path: Path) -> None:
    run = unfinished(finished, tmp_path / "run")
    record = read_json(run / "run.json")
    record["config"]["optimizer"]["lr"] = 0.02
    (run / "run.json").write_text(json.dumps(record), encoding="utf-8")
    with pytest.raises(DamagedError, match="config"):
        resume(run)


def test_a_damaged_last_checkpoint_is_made_again_though_the_run_had_finished(
    finished: Path, tmp_path: Path
) -> None:
    run = shutil.copytree(finished, tmp_path / "run")
    with open(run / "checkpoints" / "000020" / "model.safetensors", "r+b") as file:
        file.seek(500)
        file.write(b"\xff")
    said: list[str] = []
    assert launch.resume(run, COMPUTE, notify=said.append).status == "finished"
    assert "model.safetensors" in said[1]
    assert comparable_results(run, 20) == comparable_results(finished, 20)


def test_a_run_that_goes_back_has_no_later_checkpoint_and_is_never_called_altered(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = shutil.copytree(finished, tmp_path / "run")
    weights = run / "checkpoints" / "000020" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    read: list[Path] = []

    def log_and_read(self: Loop, line: dict[str, Any]) -> None:
        log(self, line)
        read.append(open_run(run, with_log=True).path)

    log = Loop.log
    monkeypatch.setattr(Loop, "log", log_and_read)
    assert launch.resume(run, COMPUTE).status == "finished"
    assert len(read) > 5


def test_float64_is_resumed_in_float64(text: Path, tmp_path: Path) -> None:
    compute = dataclasses.replace(COMPUTE, precision="fp64")
    whole = launch.train(
        small_config(text), compute, tmp_path / "whole", notify=ignore_message
    ).run_dir
    assert (
        load_file(whole / "checkpoints" / "000020" / "model.safetensors")["norm.weight"].dtype
        == np.float64
    )
    run = unfinished(whole, tmp_path / "run")
    assert resume(run).status == "finished"
    assert comparable_results(run, 20) == comparable_results(whole, 20)


# -- when it goes wrong ----------------------------------------------------------------------------


def test_a_diverged_run_says_so_and_has_a_report(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    original = factory.make_engine

    def make_broken(*arguments: Any, **named: Any) -> Any:
        engine: Any = original(*arguments, **named)
        accumulate = engine.accumulate
        engine.accumulate = lambda batch, weight: accumulate(
            batch, np.nan if batch.step >= 5 else weight
        )
        return engine

    monkeypatch.setattr(engine_preparation, "make_engine", make_broken)
    outcome = launch.train(small_config(text), COMPUTE, tmp_path / "run", notify=ignore_message)
    assert outcome.status == "diverged"
    assert report_outcome(outcome, as_json=True) == 3
    assert json.loads(capsys.readouterr().out)["status"] == "diverged"
    assert (tmp_path / "run" / "report.html").stat().st_size > 1000
    (end,) = logged_lines(tmp_path / "run", "end")
    assert (end["status"], end["step"]) == ("diverged", 15)


def test_out_of_memory_names_the_flags_that_need_less(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def raise_memory_error(self: Loop) -> Any:
        raise MemoryError

    monkeypatch.setattr(Loop, "advance", raise_memory_error)
    with pytest.raises(ExhaustedError, match="--micro-batch-size") as caught:
        train(text, tmp_path / "run")
    assert caught.value.exit_code == 6
    assert logged_lines(tmp_path / "run", "end")[0]["status"] == "failed"
    monkeypatch.undo()
    assert resume(tmp_path / "run").status == "finished"


def test_too_large_a_model_names_them_too(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before there is a run, and when one is resumed elsewhere."""

    def raise_memory_error(*arguments: Any, **more: Any) -> Any:
        raise MemoryError

    for name in ("__init__", "accumulate"):
        with monkeypatch.context() as patch:
            patch.setattr(NumpyEngine, name, raise_memory_error)
            with pytest.raises(ExhaustedError, match="--block-size"):
                train(text, tmp_path / "run")
        assert not (tmp_path / "run").exists()
    with monkeypatch.context() as patch:
        patch.setattr(Loop, "advance", raise_memory_error)
        with pytest.raises(ExhaustedError):
            train(text, tmp_path / "run")
        patch.setattr(NumpyEngine, "__init__", raise_memory_error)
        with pytest.raises(ExhaustedError):
            resume(tmp_path / "run")


@pytest.mark.parametrize(
    "problem", [PermissionError(13, "read-only"), ExhaustedError("the disk is full")]
)
def test_a_report_that_cannot_be_written_loses_nothing_else(
    problem: Exception,
    text: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fail(run_dir: Path, time_share: float) -> Path:
        raise problem

    monkeypatch.setattr(run_report, "write", fail)
    said: list[str] = []
    outcome = launch.train(
        small_config(text, max_steps=2), COMPUTE, tmp_path / "run", notify=said.append
    )
    assert (outcome.status, run_report.write_after_training(outcome, said.append)) == (
        "finished",
        None,
    )
    assert "glasslm report" in said[-1]
    assert report_outcome(outcome, as_json=False) == 0
    assert capsys.readouterr().out.splitlines()[-1] == f"run: {tmp_path / 'run'}"


def test_a_bug_leaves_a_last_line_and_a_free_folder(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def bug(self: Loop) -> Any:
        raise KeyError("bug")

    monkeypatch.setattr(Loop, "sample", bug)
    with pytest.raises(KeyError):
        train(text, tmp_path / "run")
    assert logged_lines(tmp_path / "run", "end")[0]["status"] == "failed"
    with lock_run(tmp_path / "run"):
        pass
