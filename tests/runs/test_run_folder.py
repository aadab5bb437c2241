"""A run folder is found by name, made once, and read back."""

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

from doubles import make_record
from glasslm import files, strict_json
from glasslm.config.conversion import to_dict
from glasslm.config.presets import PRESETS
from glasslm.config.schema import RunConfig
from glasslm.data.tokenizers import ByteTokenizer
from glasslm.errors import DamagedError, InputError, InUseError
from glasslm.runs import metrics, provenance, run_folder
from glasslm.runs.run_lock import lock_run

RECORD: dict[str, Any] = {**make_record(RunConfig(), ByteTokenizer())}


def make_run(run_dir: Path, **changes: Any) -> Path:
    with lock_run(run_dir):
        run_folder.create_run(run_dir, RECORD | changes, '{"kind": "byte"}')
    return run_dir


def test_a_new_run_holds_its_record_and_tokenizer(tmp_path: Path) -> None:
    path = make_run(tmp_path / "deep" / "a run, größer")
    assert json.loads((path / "run.json").read_bytes()) == json.loads(
        json.dumps({"format": 1, **RECORD})
    )
    assert (path / "tokenizer.json").read_text() == '{"kind": "byte"}'
    assert (path / "checkpoints").is_dir()


@pytest.mark.parametrize("preset", PRESETS)
def test_the_config_comes_back_as_it_was(tmp_path: Path, preset: str) -> None:
    config = PRESETS[preset]().resolve()
    run = run_folder.Run(make_run(tmp_path / preset, config=to_dict(config)))
    assert run.config == config
    assert run.config_sha256 == run_folder.config_sha256(json.loads(json.dumps(to_dict(config))))


def test_a_configs_identity_sees_every_value_and_no_order() -> None:
    config = to_dict(RunConfig())
    turned = {name: dict(reversed(part.items())) for name, part in reversed(config.items())}
    assert run_folder.config_sha256(turned) == run_folder.config_sha256(config)
    for part in config:
        for name in config[part]:
            changed = {**config, part: {**config[part], name: "something else"}}
            assert run_folder.config_sha256(changed) != run_folder.config_sha256(config)


def test_an_existing_run_is_refused_and_left_alone(tmp_path: Path) -> None:
    path = make_run(tmp_path / "run")
    (path / "checkpoints" / "000000").mkdir()
    content = (path / "run.json").read_bytes()
    for refuse in (lambda: run_folder.require_new(path), lambda: make_run(path, seed=7)):
        with pytest.raises(InputError, match="glasslm resume"):
            refuse()
    with lock_run(path), pytest.raises(InUseError, match=str(os.getpid())):
        run_folder.require_new(path)
    assert (path / "run.json").read_bytes() == content


def test_a_folder_of_other_things_is_refused_and_left_alone(tmp_path: Path) -> None:
    for name in ("thesis.tex", "tokenizer.json"):
        folder = tmp_path / f"holds {name}"
        folder.mkdir()
        (folder / name).write_text("mine")
        with pytest.raises(InputError, match=name):
            run_folder.require_new(folder)
        assert [entry.name for entry in folder.iterdir()] == [name]
    with pytest.raises(InputError, match="--run-dir"):
        run_folder.require_new(tmp_path / "holds thesis.tex" / "thesis.tex" / "run")


def test_require_new_creates_nothing(tmp_path: Path) -> None:
    run_folder.require_new(tmp_path / "deep" / "run")
    (tmp_path / "empty").mkdir()
    run_folder.require_new(tmp_path / "empty")
    assert [entry.name for entry in tmp_path.iterdir()] == ["empty"]


@pytest.mark.skipif(
    not hasattr(os, "geteuid") or os.geteuid() == 0, reason="needs permissions that bind"
)
def test_a_read_only_folder_is_said_before_training(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(InputError, match="--run-dir"):
        run_folder.require_new(tmp_path / "run")


def test_what_a_death_during_creation_left_does_not_block_the_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def die(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(files, "write_json", die)
        with pytest.raises(KeyboardInterrupt):
            make_run(tmp_path / "run")
    assert (tmp_path / "run" / "tokenizer.json").exists()
    run_folder.require_new(tmp_path / "run")
    make_run(tmp_path / "run")


def test_runs_are_found_by_path_and_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    make_run(tmp_path / "runs" / "faust-tiny-1")
    make_run(tmp_path / "elsewhere")
    (tmp_path / "faust-tiny-1").mkdir()  # a folder of that name which is no run hides nothing
    assert run_folder.find_run("faust-tiny-1") == Path("runs/faust-tiny-1")
    assert run_folder.find_run("runs/faust-tiny-1") == Path("runs/faust-tiny-1")
    assert run_folder.find_run(tmp_path / "elsewhere") == tmp_path / "elsewhere"
    with pytest.raises(InputError, match="did you mean faust-tiny-1"):
        run_folder.find_run("fast-tiny-1")
    with pytest.raises(InputError, match="glasslm train"):
        run_folder.find_run("qqqq")
    with pytest.raises(InputError, match="not a run"):
        run_folder.find_run("runs")


@pytest.mark.parametrize(
    "stem", ["shakespeare", 'a/b\\c:d*?"<>|', "..", "", "CON.txt", "Фауст", "x" * 300, "\n\0"]
)
def test_a_default_name_is_a_good_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stem: str
) -> None:
    monkeypatch.chdir(tmp_path)
    names = []
    for _ in range(3):  # within one second
        name = run_folder.default_name(stem, "tiny")
        make_run(Path("runs") / name)
        names.append(name)
        assert run_folder.find_run(name) == Path("runs") / name
        assert "-tiny-" in name
        assert set(name).isdisjoint('/\\:*?"<>|.\n\0 ')
        assert len(name.encode()) < 200
    assert len(set(names)) == 3


STEP = {"clipped": False, "tokens": 8, "epoch": 0.1}
EVAL = {"perplexity": 9.0, "tokens": 8, "bytes": 8, "whole": True, "best": False}


def test_history_is_metrics_in_columns(tmp_path: Path) -> None:
    path = make_run(tmp_path / "run")
    run = run_folder.Run(path)
    assert run.history == run_folder.History()
    with metrics.MetricsLog(path / "metrics.jsonl") as log:
        log.write({"kind": "plan", "step": 0, "max_steps": 3})
        log.write({"kind": "eval", "step": 0, "split": "val", "loss": 4.2, "bpb": 6.0, **EVAL})
        log.write({"kind": "step", "step": 1, "loss": 4.1, "lr": 0.1, "grad_norm": 2.0, **STEP})
        log.write(
            {
                "kind": "step",
                "step": 2,
                "loss": float("nan"),
                "lr": 0.2,
                "grad_norm": float("inf"),
                **STEP,
            }
        )
        log.write({"kind": "eval", "step": 2, "split": "val", "loss": 3.0, "bpb": 4.5, **EVAL})
        log.write({"kind": "eval", "step": 2, "split": "test", "loss": 1.0, "bpb": 1.5, **EVAL})
        log.write(
            {
                "kind": "eval",
                "step": 3,
                "split": "val",
                "loss": float("nan"),
                "bpb": float("nan"),
                **EVAL,
            }
        )
        assert run.history == run_folder.History(
            steps=[1, 2],
            train_losses=[4.1, None],
            grad_norms=[2.0, None],
            lrs=[0.1, 0.2],
            eval_steps=[0, 2, 3],
            val_losses=[4.2, 3.0, None],
            val_bpb=[6.0, 4.5, None],
            best_val_loss=3.0,
            best_step=2,
        )
        log.write(
            {"kind": "eval", "step": 2, "split": "val", "loss": 3.25, "bpb": 4.75, **EVAL}
        )  # on the whole split
        assert run.history.eval_steps == [0, 2, 3]
        assert run.history.val_losses == [4.2, 3.25, None]
        assert run.best_val_loss == 3.25
        log.write(
            {"kind": "end", "step": 3, "status": "interrupted", "best_step": 0, "best_loss": 3.0625}
        )
        assert run.history.status == "interrupted"
        assert (run.history.best_step, run.best_val_loss) == (0, 3.0625)
        log.write({"kind": "resume", "step": 3, "from": "checkpoints/000003"})
        history = run.history
        assert history.status is None
        assert (history.best_step, history.best_val_loss) == (2, 3.25)


def test_a_damaged_record_is_named(tmp_path: Path) -> None:
    path = make_run(tmp_path / "run", format=2)
    with pytest.raises(DamagedError, match="newer glasslm"):
        _ = run_folder.Run(path).record
    (path / "run.json").write_text(json.dumps({**RECORD, "config": None}))
    with pytest.raises(DamagedError, match="'config' is None, expected an object"):
        _ = run_folder.Run(path).config
    record = {name: value for name, value in RECORD.items() if name != "config"}
    (path / "run.json").write_text(json.dumps(record))
    with pytest.raises(DamagedError, match="lacks 'config'"):
        _ = run_folder.Run(path).config
    (path / "run.json").write_text('{"format')
    with pytest.raises(DamagedError, match=r"run\.json"):
        _ = run_folder.Run(path).record


def test_another_tokenizer_is_refused(tmp_path: Path) -> None:
    tokenizers = pytest.importorskip("glasslm.data.tokenizers")
    path = make_run(tmp_path / "run", tokenizer=RECORD["tokenizer"] | {"sha256": "0" * 64})
    with pytest.raises(DamagedError, match="0" * 64):
        _ = run_folder.Run(path).tokenizer
    tokenizer = tokenizers.parse_tokenizer((path / "tokenizer.json").read_text())
    record = json.loads((path / "run.json").read_text()) | {
        "tokenizer": RECORD["tokenizer"] | {"sha256": tokenizer.sha256}
    }
    (path / "run.json").write_text(json.dumps(record))
    assert run_folder.Run(path).tokenizer.sha256 == tokenizer.sha256


def test_provenance_is_json_and_says_what_is_installed() -> None:
    import numpy

    versions = provenance.versions()
    assert versions["numpy"] == numpy.__version__
    machine = provenance.machine()
    assert machine["cores"] >= 1
    assert machine["cpu"]
    strict_json.json_bytes([versions, machine, provenance.git()])


def test_the_commit_is_that_of_the_source_and_none_elsewhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def git(*arguments: str) -> str:
        who = ["-c", "user.name=x", "-c", "user.email=x@example.org"]
        done = subprocess.run(
            ["git", *who, *arguments], cwd=tmp_path, capture_output=True, text=True, check=True
        )
        return done.stdout.strip()

    try:
        git("init", "-q")
    except FileNotFoundError:
        pytest.skip("no git here")
    source = tmp_path / "glasslm" / "__init__.py"
    source.parent.mkdir()
    source.write_text("one\n")
    monkeypatch.setattr(provenance, "__file__", str(source.parent / "runs" / "provenance.py"))
    assert provenance.git() is None  # in a repository, and none of it
    git("add", ".")
    git("commit", "-q", "-m", "one")
    assert provenance.git() == {"commit": git("rev-parse", "HEAD"), "dirty": False}
    source.write_text("two\n")
    commit = provenance.git()
    assert commit is not None
    assert commit["dirty"] is True
    monkeypatch.setenv("PATH", str(tmp_path))
    assert provenance.git() is None  # no git at all


def test_a_run_without_a_checkpoint_is_not_sent_to_resume(tmp_path: Path) -> None:
    run_dir = tmp_path / "died early"
    with lock_run(run_dir):
        run_folder.create_run(run_dir, {}, "{}")
    run_folder.require_new(run_dir)  # a new run may replace it
