"""Import a model of another program as a run folder with one checkpoint and no text."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from glasslm import files
from glasslm.config.schema import DataConfig, ModelConfig, RunConfig, TrainConfig
from glasslm.data.lossy_tokenizers import explain_lossy_tokenizer
from glasslm.data.tokenizers import TOKENIZER_KINDS, Tokenizer
from glasslm.engines.lazy_arrays import LazyArrays
from glasslm.engines.state import state_without_moments
from glasslm.errors import InputError
from glasslm.interop import hf, peft_comparison, peft_files
from glasslm.interop.hf_special_tokens import TokenSettings
from glasslm.interop.hf_weights import weight_files
from glasslm.interop.import_source import require_model_folder
from glasslm.interop.model_export import ModelExport, imported_model_type
from glasslm.interop.peft_settings import SETTINGS_FILE
from glasslm.interop.untrusted_json import CONFIG_FILE
from glasslm.model.adapters import without_adapters
from glasslm.runs import checkpoint, run_folder
from glasslm.runs.checkpoint import TrainingPosition
from glasslm.runs.metrics import MetricsLog
from glasslm.runs.record import ComputeRecord, build_record
from glasslm.runs.run_folder import Run
from glasslm.text import Notify, notify
from glasslm.training.fine_tuning import BaseRun

Array = NDArray[Any]


NO_TEXT: dict[str, Any] = {
    "files": [],
    "train_tokens": 0,
    "val_tokens": 0,
    "train_bytes": 0,
    "val_bytes": 0,
    "sha256": "imported",
}
COMPUTED_BY: ComputeRecord = {"engine": "numpy", "device": "cpu", "precision": "fp32"}


def import_model(
    folder: Path, base: str | None, run_dir: Path, command: str, notify: Notify = notify
) -> Path:
    """Make the run `run_dir` from the model, or from the PEFT adapters, in `folder`.

    Adapters need the run `base` that they belong to. `notify` receives notes of what was changed
    or not compared. Raises InputError if there is no such folder, glasslm cannot compute its
    model, or its logits differ from those of transformers; DamagedError for bad files.
    """
    run_folder.require_new(run_dir)
    require_model_folder(folder)
    if (folder / SETTINGS_FILE).is_file():
        if base is None:
            raise InputError(
                f"{folder} holds adapters without their model: give the model's run with --base RUN"
            )
        return _import_adapters(folder, BaseRun(base), run_dir, command, notify)
    if base is not None:
        raise InputError(f"{folder} holds a whole model, which needs no base: leave out --base")
    imported = hf.read(folder, notify)
    if why := imported.tokenizer.lossy_reason:
        notify(f"note: {explain_lossy_tokenizer(why)}")
    if added := "".join(imported.token_settings.get("added_before", [])):
        notify(
            f"note: transformers begins each text of this model with {added}, and glasslm adds no "
            "token: begin prompts and texts with it (a chat template writes it by itself)"
        )
    if added := "".join(imported.token_settings.get("added_after", [])):
        notify(
            f"note: transformers ends each text of this model with {added}, and glasslm adds no "
            "token: end whole texts with it, not prompts"
        )
    hf.compare_import(imported, folder, notify)
    origin = _import_record(
        folder, imported.model_type, [folder / CONFIG_FILE, *weight_files(folder)]
    )
    kind = imported.tokenizer.kind
    tokenizer = kind if kind in TOKENIZER_KINDS else str((folder / "tokenizer.json").resolve())
    data = DataConfig(
        tokenizer=tokenizer, special_tokens=tuple(imported.tokenizer.special_tokens)[:1]
    )
    return _create_run(
        run_dir,
        _run_config(imported.config, data),
        imported.tokenizer,
        imported.weights,
        origin,
        command,
        token_settings=imported.token_settings,
    )


def _import_adapters(
    folder: Path, base: BaseRun, run_dir: Path, command: str, notify: Notify
) -> Path:
    tokenizer, frozen = base.run.tokenizer, base.weights()
    model_type = imported_model_type(base.run)
    model, adapters = peft_files.read(folder, base.run.config.model, model_type)
    peft_comparison.note_another_base(folder, base.run, notify)
    settings = base.run.record["tokenizer"].get("transformers")
    base_config = without_adapters(base.run.config.model).resolve()
    base_model = ModelExport(
        base.run, base.checkpoint.step, base_config, tokenizer, dict(frozen), settings, model_type
    )
    peft_comparison.compare_import(folder, base_model, model, adapters, notify)
    origin = _import_record(
        folder, "peft", [folder / SETTINGS_FILE, folder / peft_files.WEIGHTS_FILE]
    )
    base_data = base.run.config.data
    data = DataConfig(tokenizer=base_data.tokenizer, special_tokens=base_data.used_special_tokens)
    origin |= {"base": base.source}
    config, weights = _run_config(model, data), frozen | adapters
    state = state_without_moments(weights, config, tokenizer.vocab_size, np.float32)
    return _create_run(
        run_dir, config, tokenizer, state, origin, command, frozen, settings,
    )  # fmt: skip


def _import_record(folder: Path, model_type: str, sources: list[Path]) -> dict[str, Any]:
    hashes = {path.name: files.file_sha256(path) for path in sources}
    return {"imported": {"from": str(folder.resolve()), "model_type": model_type, "sha256": hashes}}


def _run_config(model: ModelConfig, data: DataConfig) -> RunConfig:
    """The config of a run that has done no steps."""
    return RunConfig(model=model, data=data, train=TrainConfig(max_steps=1)).resolve()


def _create_run(
    run_dir: Path,
    config: RunConfig,
    tokenizer: Tokenizer,
    state: Mapping[str, Array],
    origin: dict[str, Any],
    command: str,
    frozen: dict[str, Array] | None = None,
    token_settings: TokenSettings | None = None,
) -> Path:
    with files.atomic_path(run_dir) as folder:
        record = build_record(
            config, tokenizer, NO_TEXT, COMPUTED_BY, preset="imported", command=command
        )
        if token_settings is not None:
            record["tokenizer"]["transformers"] = token_settings
        run_folder.create_run(folder, {**record, **origin}, tokenizer.to_json())
        if frozen is not None:
            checkpoint.save_base(folder, frozen)
        run = Run(folder)
        with MetricsLog(folder / "metrics.jsonl") as log:
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
                folder,
                state if isinstance(state, LazyArrays) else state.items(),
                TrainingPosition(0, 0, 0, log.bytes, metrics_sha256=log.sha256),
                run.identity,
            )
    return run_dir
