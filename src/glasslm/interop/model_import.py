"""A model from elsewhere becomes a run: a folder like any other, with one checkpoint and without a text of its own."""

from __future__ import annotations

import datetime
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from glasslm import files
from glasslm.config.conversion import to_dict
from glasslm.config.schema import ComputeConfig, DataConfig, ModelConfig, RunConfig, TrainConfig
from glasslm.data.tokenizers import KINDS, Tokenizer
from glasslm.engines.factory import make_engine
from glasslm.errors import InputError
from glasslm.interop import hf, peft_files
from glasslm.interop.peft_settings import SETTINGS
from glasslm.interop.untrusted_json import CONFIG, weight_files
from glasslm.model import flops
from glasslm.model.parameters import parameter_table
from glasslm.runs import checkpoint, provenance, run_folder
from glasslm.runs.checkpoint import Progress
from glasslm.runs.metrics import Log
from glasslm.runs.run_folder import Run
from glasslm.training.fine_tuning import Base
from glasslm.training.memory import enough_memory

Array = NDArray[Any]


def bring_in(folder: Path, base: str | None, run_dir: Path, command: str) -> Path:
    """Make a run in `run_dir` of the model, or the adapters of PEFT, in `folder`. Adapters stand beside the run `base`.

    Raises InputError where there is no such folder, or glasslm cannot compute its model; DamagedError for bad files.
    """
    run_folder.require_new(run_dir)
    if folder.suffix == ".gguf":
        raise InputError(
            f"{folder} is a GGUF file: give the safetensors folder that it was made from"
        )
    if (folder / SETTINGS).is_file():
        if base is None:
            raise InputError(
                f"{folder} holds adapters, which stand beside a model: give its run with --base RUN"
            )
        return _adapters(folder, Base(base), run_dir, command)
    if not (folder / CONFIG).is_file():
        raise InputError(
            f"{folder} holds no {CONFIG}: expected a model folder as transformers writes it"
        )
    if base is not None:
        raise InputError(f"{folder} holds a whole model, which stands alone: leave out --base")
    arrived = hf.read(folder)
    origin = _origin(folder, arrived.model_type, [folder / CONFIG, *weight_files(folder)])
    named = (
        arrived.tokenizer.kind
        if arrived.tokenizer.kind in KINDS
        else str((folder / "tokenizer.json").resolve())
    )
    data = DataConfig(tokenizer=named)
    return _create(
        run_dir,
        arrived.config,
        data,
        arrived.tokenizer,
        arrived.weights,
        origin | {"command": command},
    )


def _adapters(folder: Path, base: Base, run_dir: Path, command: str) -> Path:
    tokenizer, frozen = base.run.tokenizer, base.weights()
    model, adapters = peft_files.read(folder, base.run.config.model)
    beside = {"run": str(base.run.path.resolve()), "step": base.held.step,
              "data_sha256": base.run.record["data"]["sha256"]}  # fmt: skip
    origin = _origin(folder, "peft", [folder / SETTINGS, folder / peft_files.WEIGHTS])
    data = DataConfig(tokenizer=base.run.config.data.tokenizer)
    origin |= {"command": command, "base": beside}
    return _create(run_dir, model, data, tokenizer, frozen | adapters, origin, frozen)


def _origin(folder: Path, kind: str, of: list[Path]) -> dict[str, Any]:
    hashes = {path.name: files.sha256_of(path) for path in of}
    return {"imported": {"from": str(folder.resolve()), "model_type": kind, "sha256": hashes}}


def _create(
    run_dir: Path,
    model: ModelConfig,
    data: DataConfig,
    tokenizer: Tokenizer,
    weights: Mapping[str, Array],
    origin: dict[str, Any],
    frozen: dict[str, Array] | None = None,
) -> Path:
    config = RunConfig(
        model=model, data=data, train=TrainConfig(max_steps=1)
    ).resolved()  # none were made here
    with enough_memory(config, "numpy"):
        engine = make_engine(
            config, tokenizer.vocab_size, ComputeConfig(engine="numpy"), training=True
        )
        engine.load(weights.items())
    with files.lock(run_dir):
        run_folder.create(run_dir, _record(config, tokenizer) | origin, tokenizer.to_json())
        if frozen is not None:
            checkpoint.save_base(run_dir, frozen)
        run = Run(run_dir)
        with Log(run_dir / "metrics.jsonl") as log:
            log.write({"kind": "plan", "step": 0, "max_steps": 0})
            log.write(
                {
                    "kind": "end",
                    "step": 0,
                    "status": "finished",
                    "best_step": None,
                    "best_loss": None,
                }
            )
            checkpoint.save(
                run_dir,
                engine,
                Progress(step=0, updates=0, tokens=0, metrics_bytes=log.bytes),
                config_sha256=run.config_sha256,
                tokenizer_sha256=tokenizer.sha256,
                data_sha256=run.record["data"]["sha256"],
            )
    return run_dir


def _record(config: RunConfig, tokenizer: Tokenizer) -> dict[str, Any]:
    """run.json but for its format and where it comes from."""
    versions = provenance.versions()
    no_text = {"files": [], "train_tokens": 0, "val_tokens": 0, "train_bytes": 0, "val_bytes": 0}
    return {
        "preset": "imported",
        "glasslm": versions["glasslm"],
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "seed": config.train.seed,
        "config": to_dict(config),
        "engine": "numpy",
        "device": "cpu",
        "precision": "fp32",
        "parameters": parameter_table(config.model, tokenizer.vocab_size).counts(),
        "flops_per_token": flops.flops_per_token(config.model, tokenizer.vocab_size),
        "data": no_text | {"sha256": "imported"},
        "tokenizer": {
            "kind": tokenizer.kind,
            "vocab_size": tokenizer.vocab_size,
            "sha256": tokenizer.sha256,
        },
        "versions": versions,
        "machine": provenance.machine(),
        "git": provenance.git(),
    }
