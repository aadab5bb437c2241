"""The start of every study: its text, its plan, its engine, and how much its runs log."""

from __future__ import annotations

import dataclasses
import math
import subprocess
import sys
import time
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from glasslm import files
from glasslm.config.conversion import with_flags
from glasslm.config.schema import ComputeConfig, RunConfig, TrainConfig
from glasslm.data.answer_targets import require_whole_examples
from glasslm.data.dataset import Dataset, prepare_dataset, require_enough_tokens
from glasslm.data.sources import corpora
from glasslm.engines.choice import choose_engine
from glasslm.engines.factory import make_engine
from glasslm.engines.operations import admit_operations
from glasslm.errors import DamagedError, InputError
from glasslm.model.parameters import initial_weights, parameter_table
from glasslm.text import Notify
from glasslm.training import step_timer
from glasslm.training.evaluation_windows import FINAL_SHARE, final_windows
from glasslm.training.preparation import Preparation
from glasslm.training.run_inputs import with_document_end
from glasslm.training.step_timer import StepTimer

PLAN_FILE, PLAN_FORMAT = "plan.json", 1
MIN_RUN_START_S = 0.5  # to open the text and to write the first and the last checkpoint
TUNING_SEED_OFFSET = (
    1_000_003  # added to the first seed: rates are chosen on runs that are not compared
)


def prepare_recipe(base: RunConfig, notify: Notify) -> tuple[RunConfig, Dataset]:
    """The recipe with its text resolved, and the tokens of that text.

    The recipe names the corpus that was found; text from a pipe is replaced by its copy in the
    cache, because a pipe can be read only once. Raises InputError for a recipe that does not fix
    the number of steps, that starts from another run, or whose text is too short.
    """
    base, train = admit_operations(base), base.train
    if train.epochs is not None:
        raise InputError(
            "--epochs does not work in a study: set the length of its runs by --max-steps, or by "
            "--budget"
        )
    require_equal_length(train)
    if train.init_from is not None:
        raise InputError(
            "--init-from does not work in a study, whose runs start from initial weights: leave "
            "it out"
        )
    require_whole_examples(base.data, base.model.block_size)
    source = corpora.find_source(base.data, notify)
    if not base.data.has_source:
        base = with_flags(base, {"corpus": source.name})
    if "-" in base.data.text_file:
        base = with_flags(base, {"text_file": tuple(str(file.path) for file in source.files)})
    dataset = prepare_dataset(base.data, source, notify)
    require_enough_tokens(dataset, base.model.block_size, train.batch_size)
    return with_document_end(base.resolve(), dataset), dataset


def require_equal_length(train: TrainConfig) -> None:
    """Raise InputError for a setting that ends each run of a study at another step."""
    if train.max_time is not None:
        raise InputError(
            "--max-time does not work in a study, where it gives each run another number of steps: "
            "leave it out"
        )
    if train.patience is not None or train.stop_at_loss is not None:
        raise InputError(
            "--patience and --stop-at-loss end each run at another step: leave them out of a study"
        )


def resolve_compute(
    compute: ComputeConfig, largest: RunConfig, vocab_size: int, threads: int = 1
) -> ComputeConfig:
    """`compute` with engine, device and precision chosen for the largest model.

    All sizes use the same, so that only the size differs.
    """
    size = parameter_table(largest.model.resolve(), vocab_size).total
    return choose_engine(
        dataclasses.replace(compute, threads=compute.threads or threads), size, training=True
    )[0]


def require_recorded_compute(
    compute: ComputeConfig, recorded: Mapping[str, Any], source: Path
) -> None:
    """Raise InputError where engine, device or precision is neither "auto" nor as recorded.

    `recorded` is the record of a run, or the compute of a plan, which `source` names.
    """
    for name in ("engine", "device", "precision"):
        if getattr(compute, name) not in ("auto", recorded[name]):
            raise InputError(
                f"{source} has the {name} {recorded[name]}, but this study would go on with "
                f"{getattr(compute, name)}: give --{name} {recorded[name]}, or choose another "
                "folder for this study"
            )


def parse_flops(budget: str) -> float | None:
    """The budget in FLOPs, if it is a number of at least a million; a smaller one is a time."""
    try:
        number = float(budget)
    except ValueError:
        return None
    return number if 1e6 <= number < math.inf else None


def read_plan(study: Path) -> dict[str, Any] | None:
    """The content of plan.json; None if the study is new."""
    path = study / PLAN_FILE
    if not path.exists():
        return None
    plan = files.read_json(path)
    if not isinstance(plan, dict) or plan.get("format") != PLAN_FORMAT:
        raise DamagedError(
            f"{path} is not a plan of format {PLAN_FORMAT}: restore it, or choose another folder"
        )
    return plan


def load_plan(
    study: Path, flags: Any, compute: ComputeConfig, why: str = ""
) -> dict[str, Any] | None:
    """The content of plan.json; None if the study is new.

    Raises InputError, which ends with `why`, if it was made with other flags, and InputError for
    another engine, device or precision in `compute`.
    """
    plan = read_plan(study)
    if plan is not None and plan["asked"] != flags:
        raise InputError(
            f"{study / PLAN_FILE} belongs to a study with other settings: give the same flags, or "
            f"choose another --out{why}"
        )
    if plan is not None:
        require_recorded_compute(compute, plan["compute"], study / PLAN_FILE)
    return plan


def save_plan(study: Path, flags: Any, plan: dict[str, Any]) -> None:
    """Write plan.json: it contains measured times, which would differ when the study is resumed."""
    files.make_folder(study)
    files.write_json(study / PLAN_FILE, {"format": PLAN_FORMAT, "asked": flags, **plan})


def with_sparse_logging(config: RunConfig) -> RunConfig:
    """`config` with few evaluations and checkpoints, and one sample; the training is the same."""
    steps = config.train.max_steps
    train = dataclasses.replace(
        config.train,
        eval_interval=max(1, math.ceil(steps / 5)),
        log_interval=max(1, steps // 100),
        sample_interval=steps,
        checkpoint_interval=max(1, math.ceil(steps / 4)),
        keep=1,
    )
    return dataclasses.replace(config, train=train)


def final_tokens(config: RunConfig, dataset: Dataset) -> int | None:
    """The validation tokens of each run's final measurement; None for the whole split.

    All runs of a study with one block size are measured on the same tokens, so that losses can be
    compared in pairs; those of another block size on other ones, and about as many. They are a
    sample where two passes over the split would take more than a tenth of the training of a run of
    this config.
    """
    val_tokens, V = len(dataset.val.tokens), dataset.tokenizer.vocab_size
    windows = final_windows(config, val_tokens, V, max_share=FINAL_SHARE)
    return None if windows is None else windows * config.model.block_size


@cache
def run_start_seconds() -> float:
    """The seconds that a run needs to start on this machine now: a process and its imports."""
    command = [sys.executable, "-P", "-c", "import glasslm.lab.studies.worker"]
    return MIN_RUN_START_S + step_timer.time_call(lambda: subprocess.run(command, check=False))


def measure_speed(config: RunConfig, compute: ComputeConfig, dataset: Dataset) -> StepTimer:
    """The measured times of a step and of an evaluation on this machine, without samples."""
    V = dataset.tokenizer.vocab_size
    engine = make_engine(config, V, compute, training=True)
    engine.load(initial_weights(parameter_table(config.model, V), config.train.seed))
    train = dataclasses.replace(config.train, sample_interval=0, max_time=None)
    config = dataclasses.replace(config, train=train)
    preparation = Preparation(time.perf_counter(), train)
    return step_timer.time_steps(config, engine, dataset, preparation)


def with_rate_and_seed(config: RunConfig, rate: float, seed: int) -> RunConfig:
    """`config` with another peak learning rate, a proportional final rate, and another seed."""
    changed = with_flags(
        config, {"lr": rate, "min_lr": config.optimizer.min_lr * rate / config.optimizer.lr}
    )
    return dataclasses.replace(
        changed, train=dataclasses.replace(changed.train, seed=seed)
    ).resolve()
