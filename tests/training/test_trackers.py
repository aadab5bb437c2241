"""Trackers get each line of a run once, also after a resume, and never change the run.

A stand-in for wandb writes down what it is told, and makes trouble on demand. What the real
libraries make of it is read back with their own readers.
"""

import html
import importlib
import json
import math
import os
import shutil
import signal
import struct
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import glasslm
from glasslm import cli
from glasslm.errors import InputError
from glasslm.lab.verification.integrity import examine_run
from glasslm.runs import metrics
from glasslm.runs.run_folder import Run
from glasslm.training import launch, tracker_process, trackers
from glasslm.training.outcome import Outcome
from small_runs import (
    COMPUTE,
    comparable_results,
    logged_lines,
    read_json,
    small_config,
    start_program,
    train_command,
    wait_for,
    without_report,
    write_text,
)

posix = pytest.mark.skipif(os.name != "posix", reason="needs POSIX signals")
FAKE_WANDB = """
import atexit, json, os, time

trouble = os.environ.get("FAKE_TROUBLE", "")
run_ids = []  # in use, as its service sees it

class Error(Exception):
    pass

class Settings:
    def __init__(self, **options):
        self.options = options

class Html(str):
    pass

def record_call(verb, **facts):
    print("a library says something")
    os.system("echo and so does a program")
    with open(os.environ["FAKE_NOTEBOOK"], "a", encoding="utf-8") as file:
        file.write(json.dumps({"verb": verb, **facts}) + chr(10))
    if trouble == verb + " raises":
        raise ValueError("no room\\non the disk")
    if trouble == verb + " hangs":
        time.sleep(600)
    if trouble == verb + " ends the process":
        os._exit(7)

class Run:
    disabled = False
    url = "https://wandb.example/run"

    def __init__(self, folder, url):
        self.dir, self.url, self.summary = os.path.join(folder, "files"), url, {}

    def log(self, values, step):
        record_call("log", step=step, values=values)

    def finish(self, exit_code):
        record_call("finish", exit_code=exit_code, summary=self.summary)
        if trouble == "finish is late":
            raise TimeoutError
        if trouble == "Python's exit hangs":
            atexit.register(time.sleep, 600)

def teardown():
    run_ids.clear()

def init(settings, **options):
    online = options.get("mode") != "offline"
    if options["id"] in run_ids:
        raise Error("the name of the run is in use")
    run_ids.append(options["id"])
    if trouble == "no key" and online:
        raise Error("there is no key,\\nlog in first")
    os.makedirs(os.path.join(options["dir"], "wandb"), exist_ok=True)
    names = {name: os.environ[name] for name in ("WANDB_NAME", "WANDB_PROJECT")}
    record_call("init", **options, **names, timeout=settings.options["init_timeout"])
    folder = os.path.join(options["dir"], "wandb", "offline-run")
    return Run(folder, "https://wandb.example/run" if online else None)
"""


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Long enough for evaluations in parts, and so for one of the whole split at the end."""
    return write_text(tmp_path_factory.mktemp("text") / "text.txt", sentences=600)


@pytest.fixture(scope="module")
def untracked(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(text, tmp_path_factory.mktemp("runs") / "run").run_dir


@pytest.fixture
def notebook(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file to which a stand-in for wandb writes its calls."""
    library = tmp_path / "library"
    library.mkdir()
    (library / "wandb.py").write_text(FAKE_WANDB, encoding="utf-8")
    monkeypatch.syspath_prepend(library)
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    monkeypatch.setenv("PYTHONPATH", str(library))
    monkeypatch.setenv("FAKE_NOTEBOOK", str(tmp_path / "notebook.jsonl"))
    for name in ("WANDB_NAME", "WANDB_PROJECT"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path / "notebook.jsonl"


def read_notebook(notebook: Path, verb: str) -> list[dict[str, Any]]:
    if not notebook.exists():
        return []
    lines = [
        line
        for line in notebook.read_text(encoding="utf-8").splitlines(keepends=True)
        if line.endswith("\n")
    ]
    return [line for line in map(json.loads, lines) if line["verb"] == verb]


def train(
    text: Path, run_dir: Path, messages: list[str] | None = None, track: str = "", **flags: Any
) -> Outcome:
    stop_at = flags.pop("stop_at", None)
    notify = (messages if messages is not None else []).append
    with without_report():
        return launch.train(
            small_config(text, **flags),
            COMPUTE,
            run_dir,
            stop_at=stop_at,
            track=track,
            notify=notify,
        )


def resume(run_dir: Path, track: str) -> Outcome:
    with without_report():
        return launch.resume(run_dir, COMPUTE, track=track, notify=lambda line: None)


def tracked_lines(run_dir: Path) -> list[tuple[int, dict[str, Any]]]:
    """The values that a tracker must get: steps, evaluations and samples, without whole splits."""
    names = {
        "step": ("train", ("loss", "lr", "grad_norm")),
        "eval": ("val", ("loss", "bpb", "perplexity")),
    }
    lines = list(metrics.read_lines(run_dir / "metrics.jsonl"))
    in_parts = any(line.get("whole") is False for line in lines)
    result = []
    for line in lines:
        if line["kind"] == "sample":
            result.append((line["step"], {"sample": f"<pre>{line['text']}</pre>"}))
        elif line["kind"] in names and not (in_parts and line.get("whole")):
            group, fields = names[line["kind"]]
            values = {f"{group}/{name}": line[name] for name in fields}
            if group == "train":
                values["train/tokens_per_s"] = line["timing"]["tokens_per_s"]
            result.append((line["step"], values))
    return result


# -- what is asked for -----------------------------------------------------------------------------


def test_names_are_words_with_commas() -> None:
    assert trackers.parse_trackers("") == ()
    with pytest.raises(InputError, match="no tracker 'mlflow': choose from wandb, tensorboard"):
        trackers.parse_trackers("mlflow")


@pytest.mark.parametrize("name", ["wandb", "tensorboard"])
def test_a_library_that_is_missing_is_told_before_any_work(
    name: str, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A mere folder of its name, such as each of them leaves behind, is no library."""
    (tmp_path / name).mkdir()
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    monkeypatch.delitem(sys.modules, name, raising=False)
    importlib.invalidate_caches()
    with pytest.raises(
        InputError, match=rf"--track {name} needs .* `pip install 'glasslm\[track\]'`"
    ) as error:
        launch.train(small_config(text), COMPUTE, tmp_path / "run", track=name)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "run").exists()


def test_every_command_that_trains_takes_it(
    text: Path, untracked: Path, notebook: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    del text
    for argv in (
        ["train", "--track", "mlflow"],
        ["resume", str(untracked), "--track", "mlflow"],
        ["finetune", str(untracked), "--corpus", "python", "--track", "mlflow"],
    ):
        assert cli.main(argv) == 2
        assert "no tracker 'mlflow'" in capsys.readouterr().err
    study = [
        "finetune",
        str(untracked),
        "--corpus",
        "python",
        "--study",
        "rank",
        "--track",
        "wandb",
    ]
    assert cli.main(study) == 2
    assert "--study trains several" in capsys.readouterr().err
    with pytest.raises(InputError, match="no tracker 'mlflow'"):
        glasslm.train(track="mlflow")


# -- what is told ----------------------------------------------------------------------------------


def test_each_line_is_told_once_and_the_run_is_the_same(
    text: Path, untracked: Path, notebook: Path, tmp_path: Path
) -> None:
    messages: list[str] = []
    outcome = train(text, tmp_path / "run", messages, track="wandb")
    assert outcome.status == "finished"
    assert comparable_results(outcome.run_dir, 20) == comparable_results(untracked, 20)
    record = read_json(outcome.run_dir / "run.json")
    assert record["config"] == read_json(untracked / "run.json")["config"]
    (init,) = read_notebook(notebook, "init")
    assert init["config"] == record["config"]
    assert (init["WANDB_NAME"], init["WANDB_PROJECT"], init["resume"]) == (
        "tiny-2L-32d",
        "glasslm",
        "allow",
    )
    assert init["dir"] == str(outcome.run_dir.resolve())
    assert [
        (line["step"], line["values"]) for line in read_notebook(notebook, "log")
    ] == tracked_lines(outcome.run_dir)
    whole = [line for line in logged_lines(outcome.run_dir, "eval") if line["whole"]]
    assert whole
    (finish,) = read_notebook(notebook, "finish")
    expected = {f"whole/{name}": whole[-1][name] for name in ("loss", "bpb", "perplexity", "step")}
    assert finish["summary"] == expected | {"status": "finished"}
    assert finish["exit_code"] == 0
    assert [line for line in messages if line.startswith("wandb:")] == [
        "wandb: https://wandb.example/run"
    ]
    assert not [line for line in messages if "warning" in line]


def test_what_is_not_finite_is_drawn_as_such() -> None:
    line = {"kind": "eval", "split": "old", "loss": None, "bpb": 1.5, "perplexity": None}
    numbers = tracker_process.metric_values(line)
    assert numbers["old/bpb"] == 1.5
    assert math.isnan(numbers["old/loss"])


@pytest.mark.parametrize("is_tuned", [True, False])
def test_preference_tuning_has_a_curve_of_all_that_is_held_out(
    text: Path, tmp_path: Path, is_tuned: bool
) -> None:
    """A whole evaluation is no final one there, though those of a text are sampled."""
    pairs = "pairs.jsonl" if is_tuned else ""
    config = small_config(text, max_steps=1, batch_size=2, block_size=2, preferences=pairs)
    run = Run(tmp_path)
    record = {"data": {"val_tokens": 10_000}}
    vars(run).update(config=config, record=record)  # as read from run.json
    measures = {"accuracy": 0.5, "margin": 0.1}
    line = {"kind": "eval", "split": "val", "step": 1, "loss": 0.6, "bpb": None, "whole": True}
    line |= {"perplexity": None, "tokens": 9, **({"preference": measures} if is_tuned else {})}
    (tmp_path / "metrics.jsonl").write_text(json.dumps(line) + "\n", encoding="utf-8")
    run_ended = threading.Event()
    run_ended.set()
    (followed,) = tracker_process.follow_lines(run, 0, run_ended)
    values = tracker_process.metric_values(followed)
    if is_tuned:
        assert values == {"val/loss": 0.6, "val/accuracy": 0.5, "val/margin": 0.1}
    else:
        assert values.keys() == {"whole/loss", "whole/bpb", "whole/perplexity"}


def test_the_measures_of_a_step_of_preference_tuning_are_drawn() -> None:
    line = {"kind": "step", "loss": 0.4, "lr": 1e-3, "grad_norm": 1.0, "preference": {"kl": 0.2}}
    line["timing"] = {"tokens_per_s": 9.0}
    assert tracker_process.metric_values(line)["train/kl"] == 0.2


def test_a_resumed_run_goes_on_in_the_same_one(text: Path, notebook: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert train(text, run, track="wandb", stop_at=12).status == "interrupted"
    assert read_notebook(notebook, "finish")[0]["summary"]["status"] == "interrupted"
    assert resume(run, "wandb").status == "finished"
    first, second = read_notebook(notebook, "init")
    assert first["id"] == second["id"]
    assert [
        (line["step"], line["values"]) for line in read_notebook(notebook, "log")
    ] == tracked_lines(run)
    assert first["id"] == tracker_process.wandb_run_id(Run(run))
    run.rename(tmp_path / "copy")
    assert first["id"] != tracker_process.wandb_run_id(Run(tmp_path / "copy"))


def test_a_run_that_nobody_tracked_is_told_from_its_beginning(
    text: Path, notebook: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    train(text, run, stop_at=12)
    resume(run, "wandb")
    assert [
        (line["step"], line["values"]) for line in read_notebook(notebook, "log")
    ] == tracked_lines(run)
    assert read_notebook(notebook, "finish")[0]["summary"]["status"] == "finished"


def test_without_key_or_network_wandb_is_offline(
    text: Path, notebook: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_TROUBLE", "no key")
    monkeypatch.setenv("WANDB_NAME", "a name of my own")
    messages: list[str] = []
    run = train(text, tmp_path / "run", messages, track="wandb", max_steps=2).run_dir
    folder = run.resolve() / "wandb" / "offline-run"
    where = f"wandb: offline (there is no key, / log in first); `wandb sync {folder}` uploads it"
    assert [line for line in messages if line.startswith("wandb")] == [where]
    assert read_notebook(notebook, "init")[0]["WANDB_NAME"] == "a name of my own"
    assert len(read_notebook(notebook, "log")) == len(tracked_lines(run))


# -- what goes wrong -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("trouble", "why"),
    [
        ("log raises", "ValueError: no room / on the disk"),
        ("log hangs", "it did not end within 1 seconds"),
        *(
            pytest.param(trouble, why, marks=pytest.mark.slow)
            for trouble, why in [
                ("init raises", "ValueError: no room / on the disk"),
                ("init hangs", "it did not end within 1 seconds"),
                ("log ends the process", "its process ended without a message"),
                ("finish raises", "ValueError: no room / on the disk"),
                (
                    "finish is late",
                    "TimeoutError: not all of it is uploaded: `wandb sync FOLDER` does the rest",
                ),
                ("finish hangs", "it did not end within 1 seconds"),
                ("Python's exit hangs", None),
            ]
        ),
    ],
)
def test_what_fails_costs_a_warning_and_a_little_time(
    trouble: str,
    why: str | None,
    text: Path,
    untracked: Path,
    notebook: Path,
    tmp_path: Path,
    monkeypatch: Any,
) -> None:
    monkeypatch.setenv("FAKE_TROUBLE", trouble)
    monkeypatch.setattr(trackers, "MAX_START_S", 3.0)
    monkeypatch.setattr(trackers, "MAX_CLOSE_S", 1.0)
    monkeypatch.setattr(trackers, "SILENT_WAIT_S", 0.3)
    messages: list[str] = []
    started_at = time.monotonic()
    outcome = train(text, tmp_path / "run", messages, track="wandb")
    assert time.monotonic() - started_at < 120  # a library that hangs does so for 600 s
    assert (outcome.status, outcome.exit_code) == ("finished", 0)
    assert comparable_results(outcome.run_dir, 20) == comparable_results(untracked, 20)
    assert logged_lines(outcome.run_dir, "warning") == []
    warning = [] if why is None else [f"warning: wandb no longer tracks this run: {why}"]
    warned = [line for line in messages if line.startswith("warning")]
    assert [
        line.replace(str(outcome.run_dir.resolve() / "wandb" / "offline-run"), "FOLDER")
        for line in warned
    ] == warning
    assert ("note: wandb is not ready yet: the run starts without waiting for it" in messages) == (
        trouble == "init hangs"
    )


@posix
@pytest.mark.parametrize(
    ("number", "code"),
    [(signal.SIGINT, 130), pytest.param(signal.SIGKILL, -9, marks=pytest.mark.slow)],
)
def test_a_signal_to_all_of_them_ends_the_run_and_the_tracker_sees_the_end(
    number: signal.Signals, code: int, text: Path, notebook: Path, tmp_path: Path
) -> None:
    """As Ctrl-C in a terminal does it.

    And a run that is killed takes its tracker with it, orderly.
    """
    run = tmp_path / "run"
    process = start_program(
        *train_command(text, run, track="wandb", max_steps=1000), start_new_session=True
    )
    wait_for(lambda: len(read_notebook(notebook, "log")) > 3, process)
    os.killpg(process.pid, number)
    _, err = process.communicate(timeout=120)
    assert process.returncode == code, err
    end = time.monotonic() + 20
    while not read_notebook(notebook, "finish"):
        assert time.monotonic() < end
        time.sleep(0.05)
    (finish,) = read_notebook(notebook, "finish")
    assert finish["summary"]["status"] == ("interrupted" if number == signal.SIGINT else None)
    assert [
        (line["step"], line["values"]) for line in read_notebook(notebook, "log")
    ] == tracked_lines(run)
    if number == signal.SIGINT:
        assert "Traceback" not in err
        assert [line["status"] for line in logged_lines(run, "end")] == ["interrupted"]


@posix
@pytest.mark.slow
def test_ctrl_c_ends_the_waiting_for_a_tracker(
    text: Path, notebook: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_TROUBLE", "finish hangs")
    process = start_program(
        *train_command(text, tmp_path / "run", track="wandb"), start_new_session=True
    )
    wait_for(lambda: bool(read_notebook(notebook, "finish")), process)
    time.sleep(3)
    os.killpg(process.pid, signal.SIGINT)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert "waiting for wandb, at most 20 seconds; Ctrl-C ends it" in err
    assert "warning: wandb no longer tracks this run: Ctrl-C ended it" in err
    assert out.splitlines()[-1] == f"run: {tmp_path / 'run'}"


@posix
@pytest.mark.slow
def test_a_signal_while_the_run_waits_for_a_tracker_saves_it(
    text: Path, notebook: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_TROUBLE", "init hangs")
    run = tmp_path / "run"
    process = start_program(*train_command(text, run, track="wandb"))
    wait_for(lambda: (run / "run.json").exists() and bool(read_notebook(notebook, "init")), process)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 143, err
    assert [line["status"] for line in logged_lines(run, "end")] == ["interrupted"]
    weights, _ = comparable_results(resume(run, "").run_dir, 20)
    assert weights == comparable_results(train(text, tmp_path / "whole").run_dir, 20)[0]


# -- the real libraries ----------------------------------------------------------------------------


@pytest.fixture
def read_events() -> Callable[[Path], tuple[dict[str, Any], dict[str, Any]]]:
    """The scalars and texts of a run, (step, value) by tag, as TensorBoard reads them."""
    pytest.importorskip("tensorboard")
    accumulators = importlib.import_module("tensorboard.backend.event_processing.event_accumulator")

    def read(run_dir: Path) -> tuple[dict[str, Any], dict[str, Any]]:
        accumulator = accumulators.EventAccumulator(
            str(run_dir / "tensorboard"), {"scalars": 0, "tensors": 0}
        ).Reload()
        tags = accumulator.Tags()
        scalars = {
            tag: [(event.step, event.value) for event in accumulator.Scalars(tag)]
            for tag in tags["scalars"]
        }
        texts = {
            tag: [
                (event.step, event.tensor_proto.string_val[0].decode())
                for event in accumulator.Tensors(tag)
            ]
            for tag in tags["tensors"]
        }
        return scalars, texts

    return read


def test_tensorboard_reads_what_was_logged(
    text: Path,
    untracked: Path,
    tmp_path: Path,
    read_events: Callable[[Path], tuple[dict[str, Any], dict[str, Any]]],
) -> None:
    messages: list[str] = []
    run = train(text, tmp_path / "run", messages, track="tensorboard").run_dir
    assert comparable_results(run, 20) == comparable_results(untracked, 20)
    scalars, texts = read_events(run)
    expected: dict[str, list[tuple[int, float]]] = {}
    for step, values in tracked_lines(run):
        for tag, value in values.items():
            if tag != "sample":
                expected.setdefault(tag, []).append((step, float(np.float32(value))))
    for line in logged_lines(run, "eval"):
        if line["whole"]:
            for name in ("loss", "bpb", "perplexity"):
                expected.setdefault(f"whole/{name}", []).append(
                    (line["step"], float(np.float32(line[name])))
                )
    assert scalars == expected
    samples = [(line["step"], line["text"]) for line in logged_lines(run, "sample")]
    assert [(step, strip_code_block(block)) for step, block in texts["sample"]] == samples
    ((step, block),) = texts["config"]
    assert (step, json.loads(strip_code_block(block))) == (0, read_json(run / "run.json")["config"])
    assert f"tensorboard: `tensorboard --logdir {run}` shows it" in messages
    assert {part.verdict for part in examine_run(run)} == {"ok"}


def strip_code_block(block: str) -> str:
    """A block of code in Markdown as the text that it shows."""
    rows = block.split("\n")
    assert all(row.startswith("    ") for row in rows)
    return "\n".join(row[4:] for row in rows)


def test_tensorboard_reads_no_step_twice_after_a_crash(
    text: Path,
    untracked: Path,
    tmp_path: Path,
    read_events: Callable[[Path], tuple[dict[str, Any], dict[str, Any]]],
) -> None:
    """The steps between the last checkpoint and the crash were told already."""
    run = tmp_path / "run"
    train(text, run, track="tensorboard", stop_at=13)
    shutil.rmtree(run / "checkpoints" / "000013")
    resume(run, "tensorboard")
    assert comparable_results(run, 20) == comparable_results(untracked, 20)
    scalars, texts = read_events(run)
    assert [step for step, _ in scalars["train/loss"]] == list(range(1, 21))
    assert [step for step, _ in scalars["val/loss"]] == [0, 5, 10, 15, 20]
    assert [step for step, _ in texts["sample"]] == [0, 10, 20]
    values = [float(np.float32(line["loss"])) for line in logged_lines(untracked, "step")]
    assert [value for _, value in scalars["train/loss"]] == values


@pytest.mark.slow
def test_wandb_keeps_a_run_and_how_it_went_on(
    text: Path, untracked: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("wandb")
    protos: Any = importlib.import_module("wandb.proto.wandb_internal_pb2")
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    run = tmp_path / "run"
    train(text, run, track="wandb", stop_at=12)
    time.sleep(1)  # wandb orders its files by the second
    resume(run, "wandb")
    assert comparable_results(run, 20) == comparable_results(untracked, 20)
    history: list[tuple[int, dict[str, Any]]] = []
    names, statuses = set(), []
    for path in sorted((run / "wandb").glob("offline-run-*/*.wandb")):
        for body in event_bodies(path.read_bytes()):
            record = protos.Record.FromString(body)
            if record.WhichOneof("record_type") == "run":
                config = {
                    update.key: json.loads(update.value_json) for update in record.run.config.update
                }
                config.pop("_wandb")
                assert config == read_json(run / "run.json")["config"]
                names.add((record.run.project, record.run.display_name, record.run.run_id))
            values = {
                "/".join(item.nested_key): json.loads(item.value_json)
                for item in record.history.item
            }
            if values:
                history.append((values["_step"], values))
            statuses += [
                json.loads(item.value_json)
                for item in record.summary.update
                if item.key == "status"
            ]
    assert names == {("glasslm", "tiny-2L-32d", tracker_process.wandb_run_id(Run(run)))}
    assert statuses == ["interrupted", "finished"]
    steps: dict[int, dict[str, Any]] = {}
    for step, values in tracked_lines(run):
        steps.setdefault(step, {}).update(values)
    assert [step for step, _ in history] == list(steps)
    for (step, values), expected in zip(history, steps.values()):
        for name, value in expected.items():
            assert name == "sample" or values[name] == pytest.approx(value, rel=1e-12), step
    shown = {path.read_text(encoding="utf-8") for path in (run / "wandb").rglob("*.html")}
    assert len(shown) == 3
    for line in logged_lines(run, "sample"):
        assert any(html.escape(line["text"]) in page for page in shown)
    assert {part.verdict for part in examine_run(run)} == {"ok"}
    assert not (tmp_path / "wandb").exists()


def event_bodies(data: bytes) -> Iterator[bytes]:
    """The records of a .wandb file: 7 bytes of a head, then LevelDB's log, in blocks of 32 KiB."""
    at, whole = 7, b""
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7:
            at += 32768 - at % 32768
            continue
        size, kind = struct.unpack_from("<4xHB", data, at)
        whole += data[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):  # all of a record, or its last part
            yield whole
            whole = b""
