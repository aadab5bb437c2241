"""Train a small model with the operations of a file beside one with the engine's own."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from glasslm import files
from glasslm.config.conversion import from_dict, to_dict, with_flags
from glasslm.config.presets import preset_config
from glasslm.config.schema import ComputeConfig, ModelConfig, RunConfig
from glasslm.config.units import parse_duration
from glasslm.engines.operations import OperationsFile, admit, read_operations, unused_operations
from glasslm.errors import InputError
from glasslm.lab.checks.file_cases import MODEL_SETTINGS, OPTIMIZERS
from glasslm.lab.studies.study_plan import measure_speed, prepare_recipe, resolve_compute
from glasslm.lab.verification.reproduction import FIRST_LOSS_TOLERANCE, LOSS_TOLERANCE
from glasslm.runs import run_folder
from glasslm.runs.metrics import step_lines
from glasslm.runs.run_folder import Run
from glasslm.text import Notify, align_columns, as_float, format_number, notify
from glasslm.training import launch
from glasslm.training.outcome import Outcome

if TYPE_CHECKING:
    from matplotlib.figure import Figure

BUDGET_SHARE = 0.85  # of the budget that the steps take; evaluations and files take the rest
MIN_STEPS, MAX_STEPS = 10, 1000
EVAL_WINDOWS = 64  # of the validation text, the same for both
SHOWN_STEPS = 10  # rows of the printed curves
SGD_RATE = 0.1  # of the tiny model; its other optimizers take that of the preset
# Rounding is amplified from step to step. In the first five, losses with right operations differ by
# 1e-8 of their value, with a wrong sign in rope's gradient by 7e-7; after ten, right ones by 2e-6.
EARLY_STEPS, EARLY_TOLERANCE = 5, 2e-7
FIRST_STEPS = 10  # with the tolerance of a reproduced run's first loss


@dataclass(frozen=True)
class TrainingComparison:
    """Two runs with the same seed and batches: the engine's operations, and those of a file."""

    operations: OperationsFile
    reference: Outcome
    own: Outcome | None  # None: the first run was interrupted

    @property
    def exit_code(self) -> int:
        """That of `glasslm train`, for the run with the file's operations if there is one."""
        return (self.own or self.reference).exit_code

    @cached_property
    def curves(self) -> tuple[list[int], np.ndarray[Any, Any]]:
        """The steps, and the training losses (2, steps) of both runs; nan where one has none."""
        logs = [
            {line["step"]: as_float(line["loss"]) for line in step_lines(Run(path).metrics())}
            for path in (self.reference.run_dir, self.own_dir)
        ]
        steps = sorted(set().union(*logs))
        return steps, np.array([[log.get(step, np.nan) for step in steps] for log in logs])

    @property
    def own_dir(self) -> Path:
        """The folder of the run with the file's operations."""
        assert self.own is not None, "the first run was interrupted"
        return self.own.run_dir

    @cached_property
    def differences(self) -> np.ndarray[Any, Any]:
        """(steps,) the difference of the losses of each step, as a share of the reference's."""
        reference, own = self.curves[1]
        return np.abs(own - reference) / np.abs(reference)

    @property
    def first_difference(self) -> int | None:
        """The first step whose losses differ by more than rounding; None if none does."""
        steps, _ = self.curves
        step = np.array(steps)
        limits = np.where(step <= FIRST_STEPS, FIRST_LOSS_TOLERANCE, LOSS_TOLERANCE)
        limits[step <= EARLY_STEPS] = EARLY_TOLERANCE
        beyond = np.flatnonzero(~(self.differences <= limits))
        return steps[beyond[0]] if len(beyond) else None

    def __str__(self) -> str:
        steps, (reference, own) = self.curves
        rows = [("step", "reference", "yours", "difference")]
        shown = np.unique(np.linspace(0, len(steps) - 1, SHOWN_STEPS).round().astype(int))
        rows += [
            (
                f"{steps[i]:,}",
                format_number(reference[i], ".4f"),
                format_number(own[i], ".4f"),
                format_number(own[i] - reference[i], "+.1e"),
            )
            for i in shown
        ]
        return "\n".join([*align_columns(rows), "", self.verdict])

    @property
    def verdict(self) -> str:
        """How far the curves part, in two sentences."""
        names = ", ".join(self.operations.functions)
        losses = [
            as_float(outcome.best["loss"]) if outcome and outcome.best else np.nan
            for outcome in (self.reference, self.own)
        ]
        whose = f"your {names} trains to {format_number(losses[1], '.4f')}"
        instead = f"the reference to {format_number(losses[0], '.4f')} (best validation loss, nats)"
        apart = np.abs(np.diff(self.curves[1], axis=0))
        size = (
            f"the training losses differ by at most {np.nanmax(apart):.2g}, "
            f"at the end by {format_number(apart[0, -1], '.2g')}"
        )
        if self.own is not None and self.own.status == "diverged":
            return f"your {names} diverged, {instead}: glasslm learn check {self.file_name}"
        if self.first_difference is None:
            early = f"the same to {EARLY_TOLERANCE:g} in the first {EARLY_STEPS} steps"
            return f"{whose}, {instead}: {early}, not told apart later; {size}"
        return (
            f"{whose}, {instead}: not the same, from step {self.first_difference} on; {size}. "
            f"What is wrong: glasslm learn check {self.file_name}"
        )

    @property
    def file_name(self) -> str:
        """The path of the file, as it was given."""
        return self.operations.file.name

    def draw(self, path: Path) -> None:
        """Draw both curves into a PNG file."""
        from glasslm.report import figures

        files.write_atomic(path, figures.png(self._figure()))

    def _figure(self) -> Figure:
        from matplotlib.figure import Figure

        from glasslm.report.figures import PRINT_PALETTE, add_legend, style_axes

        steps, (reference, own) = self.curves
        figure = Figure(figsize=(8, 4.5), layout="constrained")
        axes = figure.subplots()
        names = ", ".join(self.operations.functions)
        style_axes(axes, f"Training with your {names}", "loss, nats per token", PRINT_PALETTE)
        axes.plot(
            steps, reference, color=PRINT_PALETTE.validation, alpha=0.5, linewidth=5,
            label="the engine's own",
        )  # fmt: skip
        axes.plot(steps, own, "--", color=PRINT_PALETTE.train, linewidth=1.5, label="yours")
        axes.set_xlabel("step")
        add_legend(axes, PRINT_PALETTE)
        return figure


def train_with_file(
    path: Path | str,
    budget: str = "60s",
    *,
    text_file: tuple[str, ...] = (),
    out: Path | None = None,
    compute: ComputeConfig | None = None,
    command: str = "",
    notify: Notify = notify,
) -> TrainingComparison:
    """Train the tiny model twice within a time: with the engine's operations, then with a file's.

    Args:
        path: A Python file of operations (docs/howto/own-operation.md).
        budget: Time for both runs together, such as "60s".
        text_file: The text; by default the default corpus.
        out: Folder of the two runs, `reference` and `own`; by default a new one under ./runs.
        compute: Engine and device; `auto` by default.
        command: What the user wrote, for run.json.
        notify: Receives the messages.

    Raises:
        InputError: The file cannot be used, or the budget is too short.
    """
    budget_s = parse_duration(budget)
    operations = read_operations(path)
    out = run_folder.study_folder(out, "learn", Path(path).stem)
    base, dataset = prepare_recipe(choose_config(operations, text_file), notify)
    vocab_size = dataset.tokenizer.vocab_size
    compute = resolve_compute(compute or ComputeConfig(), base, vocab_size, threads=0)
    with_file = dataclasses.replace(base, operations=admit(operations))
    for sentence in unused_operations(operations, with_file):
        notify(f"note: {sentence}")
    notify("measuring the time of a step, with the engine's operations and with yours")
    step_s = sum(measure_speed(config, compute, dataset).step for config in (base, with_file))
    steps = min(MAX_STEPS, int(BUDGET_SHARE * budget_s / step_s))
    if steps < MIN_STEPS:
        raise InputError(
            f"--budget is {budget}: {steps} steps of both runs fit into it, and a curve needs "
            f"{MIN_STEPS}: give {MIN_STEPS * step_s / BUDGET_SHARE:.0f}s or more"
        )
    outcomes: list[Outcome] = []
    for name, config in (("reference", base), ("own", with_file)):
        notify(f"\n{'your operations' if name == 'own' else 'the engine'}: {steps:,} steps")
        outcomes.append(
            launch.train(
                _with_length(config, steps), compute, out / name, preset="tiny", command=command,
                dataset=dataset, final_windows=EVAL_WINDOWS, notify=notify,
            )
        )  # fmt: skip
        if outcomes[0].status == "interrupted":
            return TrainingComparison(operations, outcomes[0], None)
    return TrainingComparison(operations, *outcomes)


def choose_config(operations: OperationsFile, text_file: tuple[str, ...] = ()) -> RunConfig:
    """The tiny model with the settings by which it uses the operations of a file.

    Of operations that exclude each other, such as two activations, the first one is used.
    """
    config = preset_config("tiny")
    settings: dict[str, Any] = {}
    for name in operations.functions:
        settings = MODEL_SETTINGS.get(name, {}) | settings
    model = from_dict(ModelConfig, to_dict(config.model) | settings)
    flags: dict[str, Any] = {"text_file": text_file} if text_file else {}
    optimizers = [OPTIMIZERS[name] for name in operations.functions if name in OPTIMIZERS]
    if optimizers:
        flags["optimizer"] = optimizers[0]
    if flags.get("optimizer") == "sgd":
        flags["lr"] = SGD_RATE
    return with_flags(dataclasses.replace(config, model=model), flags)


def _with_length(config: RunConfig, steps: int) -> RunConfig:
    """`config` with this number of steps, each of them logged, and with no sample."""
    flags = {
        "max_steps": steps,
        "log_interval": 1,
        "eval_interval": steps,
        "sample_interval": 0,
        "checkpoint_interval": steps,
    }
    return with_flags(config, flags)
