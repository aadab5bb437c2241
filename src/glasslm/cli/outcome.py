"""The end of `train`, `finetune` and `resume`: the report, the summary and the exit code."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from glasslm.cli.streams import discard_output
from glasslm.runs.metrics import to_json_types
from glasslm.text import notify, print_result

if TYPE_CHECKING:
    from glasslm.training.outcome import Outcome


def report_outcome(outcome: Outcome, as_json: bool) -> int:
    """Write the report and print the summary of a run. Returns the exit code."""
    from glasslm.report import run_report
    from glasslm.runs.run_folder import Run
    from glasslm.training import display

    path = run_report.write_after_training(outcome, notify)
    config = Run(outcome.run_dir).config
    text = display.summary_text(
        outcome.run_dir, outcome.status, outcome.best, outcome.sample, path, outcome.elapsed_s,
        config.operations.ops, config.data.chat is not None,
    )  # fmt: skip
    if as_json:
        notify(text)
        best: Mapping[str, Any] = outcome.best or {}
        report = str(path) if path else None
        facts: dict[str, Any] = {
            "run": str(outcome.run_dir),
            "status": outcome.status,
            "report": report,
        }
        facts |= {f"best_{key}": best.get(key) for key in ("step", "loss", "perplexity", "bpb")}
        text = json.dumps(to_json_types(facts | {"elapsed_s": round(outcome.elapsed_s, 1)}))
    else:
        text = f"{text}\nrun: {outcome.run_dir}"
    try:
        print_result(text)
    except OSError:  # a closed or full standard output does not change the run's exit code
        discard_output()
    return outcome.exit_code
