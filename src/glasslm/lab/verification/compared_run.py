"""One run of a comparison: its settings, results and loss curves."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from glasslm.config.conversion import to_dict
from glasslm.errors import DamagedError, InputError
from glasslm.report import figures
from glasslm.report.report_tables import objective_unit
from glasslm.runs.history import best_eval
from glasslm.runs.metrics import (
    EvalLine,
    Line,
    StepLine,
    elapsed_s,
    eval_lines,
    step_lines,
    timing_of,
)
from glasslm.runs.run_folder import Run
from glasslm.text import format_duration, format_number

if TYPE_CHECKING:
    from glasslm.report.figures import Array

HASH_LENGTH = 12  # shown characters of a sha256
RESULTS: dict[str, Callable[[Any], str]] = {  # the name of a result -> its format
    "status": str,
    "losses in": str,
    "best validation loss": "{:.4f}".format,
    "at step": "{:,}".format,
    "best bits per byte": "{:.4f}".format,
    "last validation loss": "{:.4f}".format,
    "last bits per byte": "{:.4f}".format,
    "last training loss": "{:.4f}".format,
    "steps": "{:,}".format,
    "tokens": "{:,}".format,
    "epochs": "{:.3g}".format,
    "FLOPs": "{:.3g}".format,
    "time": format_duration,
    "tokens per second": "{:,.0f}".format,
}


class ComparedRun:
    """A run of a comparison, with the letter that names it in tables and figures."""

    def __init__(self, letter: str, run: Run) -> None:
        self.letter, self.run = letter, run
        self.name = run.path.resolve().name
        lines = list(run.metrics())
        self.elapsed_s = elapsed_s(lines)
        self.lines = with_total_time(lines)
        self.steps = step_lines(self.lines)
        evals = eval_lines(self.lines)
        self.evals = sorted(
            {line["step"]: line for line in evals}.values(), key=lambda line: line["step"]
        )

    @cached_property
    def results(self) -> dict[str, Any]:
        """The results by the names of RESULTS; None for an unknown one."""
        best: Mapping[str, Any] = best_eval(self.lines, self.run.history) or {}
        last: Mapping[str, Any] = self.evals[-1] if self.evals else {}
        step: Mapping[str, Any] = self.steps[-1] if self.steps else {}
        speeds = [
            speed
            for line in self.steps
            if (speed := (line.get("timing") or {}).get("tokens_per_s"))
        ]
        tokens, flops = step.get("tokens"), self.run.record.get("flops_per_token")
        values = (
            self.run.history.status or "not ended",
            self.loss_unit,
            best.get("loss"),
            best.get("step"),
            None if self.lossy_reason else best.get("bpb"),
            last.get("loss"),
            None if self.lossy_reason else last.get("bpb"),
            step.get("loss"),
            step.get("step"),
            tokens,
            step.get("epoch"),
            tokens * flops if tokens and flops else None,
            self.elapsed_s if self.lines else None,
            statistics.median(speeds) if speeds else None,
        )
        return dict(zip(RESULTS, values, strict=True))

    @cached_property
    def settings(self) -> dict[str, str]:
        """Everything that may affect the results, by name."""
        record = self.run.record
        config = to_dict(self.run.config)
        settings = {
            f"{part}.{key}": _format_setting(value)
            for part, fields in config.items()
            for key, value in fields.items()
        }
        data, tokenizer = record.get("data") or {}, record.get("tokenizer") or {}
        texts = [str(file.get("sha256"))[:HASH_LENGTH] for file in data.get("files", [])]
        settings["text"] = ", ".join(texts[:2]) + (
            f" and {len(texts) - 2} more" if len(texts) > 2 else ""
        )
        settings["training bytes"] = f"{data.get('train_bytes', 0):,}"
        settings["tokenizer"] = (
            f"{tokenizer.get('kind')}, {tokenizer.get('vocab_size')}, "
            f"{self.tokenizer_sha256[:HASH_LENGTH]}"
        )
        settings |= {
            f"parameters: {name}": f"{count:,}"
            for name, count in (record.get("parameters") or {}).items()
        }
        settings["FLOPs per token"] = _format_setting(record.get("flops_per_token"))
        return settings | recorded_environment(record)

    @property
    def tokenizer_sha256(self) -> str:
        return str((self.run.record.get("tokenizer") or {}).get("sha256", ""))

    @cached_property
    def lossy_reason(self) -> str:
        """The reason why the run's tokenizer loses text, in old runs too; empty if it does not."""
        try:
            return self.run.tokenizer.lossy_reason
        except (DamagedError, InputError):  # damaged: `glasslm verify` reports it
            return ""

    @property
    def loss_unit(self) -> str:
        """The unit of the run's losses."""
        return objective_unit(self.run.config)

    @property
    def objective(self) -> tuple[Any, ...]:
        """What the losses measure: runs that differ in it cannot be ranked by them."""
        settings = self.run.config.preference
        if settings.preferences:
            return self.loss_unit, settings.preferences_sha256, settings.beta
        return self.loss_unit, settings.reward

    @property
    def validation_text(self) -> tuple[Any, ...]:
        """The identity of the validation text, which is split off before tokenization."""
        data = self.run.config.data
        texts = tuple(
            str(file.get("sha256")) for file in (self.run.record.get("data") or {}).get("files", [])
        )
        return texts, data.val_fraction, data.test_fraction, data.encoding_errors, data.json_field

    def curve(
        self, lines: Sequence[StepLine] | Sequence[EvalLine], x: str, in_bits_per_byte: bool
    ) -> tuple[Array, Array]:
        """x (n,) and losses (n,) of step or eval lines; `x` is "step", "tokens" or "elapsed_s"."""
        positions = figures.as_array([line["step"] for line in lines])
        if x == "tokens":
            tokens = [(line["step"], line.get("tokens") or 0) for line in self.steps]
            positions = np.interp(
                positions, [0, *(step for step, _ in tokens)], [0, *(count for _, count in tokens)]
            )
        elif x == "elapsed_s":
            positions = figures.as_array([line["timing"]["elapsed_s"] for line in lines])
        losses = figures.as_array([line["loss"] for line in lines])
        if in_bits_per_byte and self.lossy_reason:
            return positions, np.full(len(lines), math.nan)
        if in_bits_per_byte and lines and "bpb" in lines[0]:
            losses = figures.as_array([cast("float | None", line.get("bpb")) for line in lines])
        elif in_bits_per_byte:  # from the bytes of an average token
            data = self.run.record.get("data") or {}
            losses = (
                losses
                / math.log(2)
                * data.get("train_tokens", math.nan)
                / max(1, data.get("train_bytes", 1))
            )
        return positions, losses


def with_total_time(lines: Iterable[Line]) -> list[Line]:
    """The lines, with `elapsed_s` of steps and evaluations counted across all resumes.

    The clock of metrics.jsonl restarts with each resume. Changes the lines.
    """
    earlier_parts = total = 0.0
    timed_lines: list[Line] = []
    for line in lines:
        if line["kind"] == "resume":
            earlier_parts = total
        timing = timing_of(line)
        total = max(total, earlier_parts + (timing.get("elapsed_s") or 0.0))
        if line["kind"] == "step" or line["kind"] == "eval":
            line["timing"] = {**timing, "elapsed_s": total}
        timed_lines.append(line)
    return timed_lines


def recorded_environment(record: Mapping[str, Any]) -> dict[str, str]:
    """The engine, device, precision, versions and machine of a run, by name."""
    names = (
        "engine",
        "device",
        "precision",
        "compiled",
        "threads",
        "processes",
        "parallel",
        "deterministic",
    )
    values = {name: record[name] for name in names if name in record}
    for part in ("versions", "machine", "git", "blas"):
        values |= {f"{part}: {name}": value for name, value in (record.get(part) or {}).items()}
    return {name: _format_setting(value) for name, value in values.items()}


def _format_setting(value: Any) -> str:
    if isinstance(value, (tuple, list)):
        return ", ".join(map(_format_setting, value)) or "-"
    if value is None or isinstance(value, bool):
        return "-" if value is None else "yes" if value else "no"
    return format_number(value, ".6g") if isinstance(value, float) else str(value)
