"""The table of an ablation: ablation_table.csv, a row for each run."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence

from glasslm.lab.studies.ablation import VariantResult

COLUMNS = (
    "variant", "axis", "value", "seed", "parameters", "final_val_loss", "best_val_loss", "bpb",
    "delta", "ci_low", "ci_high", "p", "p_holm", "verdict", "wall_s", "step_ms", "peak_bytes",
)  # fmt: skip


def to_csv(results: Sequence[VariantResult]) -> str:
    """The content of ablation_table.csv: a row for each run.

    The columns delta to verdict describe the whole variant. Runs of a task have a last column more.
    """
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    has_accuracy = any(trial.accuracy for result in results for trial in result.trials)
    writer.writerow([*COLUMNS, "accuracy"] if has_accuracy else COLUMNS)
    for result in results:
        comparison, verdict = result.comparison, result.verdict
        shared: list[object] = [None] * 4
        if comparison:
            shared = [comparison.delta, comparison.ci_low, comparison.ci_high, comparison.p]
        shared += [verdict.p_holm, verdict.words] if verdict else [None, "the baseline"]
        for trial in result.trials:
            writer.writerow(
                _format_cell(value)
                for value in (
                    result.name,
                    result.axis,
                    result.value,
                    trial.seed,
                    result.parameters,
                    trial.final_loss,
                    trial.best_loss,
                    trial.bpb,
                    *shared,
                    trial.wall_s,
                    trial.step_ms,
                    trial.peak_bytes,
                    *([trial.accuracy["share"]] if trial.accuracy else []),
                )
            )
    return out.getvalue()


def _format_cell(value: object) -> object:
    if value is None:
        return ""
    return f"{value:.6g}" if isinstance(value, float) else value
