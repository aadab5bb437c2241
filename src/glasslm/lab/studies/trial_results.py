"""The result of one run of a study, read from its folder."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from glasslm.lab.studies.sweep import TrialOutcome
from glasslm.runs.metrics import ProportionFacts, elapsed_s, eval_lines, sample_lines, step_lines
from glasslm.runs.run_folder import Run


@dataclass(frozen=True)
class TrialResult:
    """Losses, speed and memory of one run."""

    seed: int
    status: str
    final_loss: float | None  # validation loss, nats per token; None if the run diverged or failed
    best_loss: float | None
    bpb: float | None
    wall_s: float
    step_ms: float | None  # median
    peak_bytes: int | None
    sample: str
    run: Run
    error: str = ""  # why the run failed
    tokens: int = 0  # of the validation text, on which the final loss was measured
    stderr: float | None = None  # nats per token, if those are a sample
    is_sampled: bool = False
    accuracy: ProportionFacts | None = None  # of a task: held-out examples answered exactly


def describe_sample(trials: Iterable[TrialResult]) -> list[str]:
    """A sentence about losses of a sample of the validation text; none if all are of the whole."""
    sampled = [trial for trial in trials if trial.is_sampled]
    if not sampled:
        return []
    errors = [trial.stderr for trial in sampled if trial.stderr is not None]
    size = f", standard error up to {max(errors):.4f} nats" if errors else ""
    tokens = {trial.run.config.model.block_size: trial.tokens for trial in sampled}
    if len(tokens) == 1:
        return [
            f"Losses are sampled: every run was measured on the same {sampled[0].tokens:,} tokens "
            f"of the validation text{size}. The error is nearly the same in all runs, so "
            "differences are more exact."
        ]
    listed = ", ".join(f"{count:,} (block size {block})" for block, count in tokens.items())
    return [
        "Losses are sampled: runs of one block size were measured on the same tokens of the "
        f"validation text, runs of another one on others: {listed}{size}. Differences between runs "
        "of one block size are more exact."
    ]


def read_trial(seed: int, outcome: TrialOutcome) -> TrialResult:
    """The result of a run.

    A diverged run has no loss, even if some of its evaluations were finite.
    """
    lines = [] if outcome.status == "failed" else list(outcome.run.metrics())
    evals = eval_lines(lines)
    has_loss = outcome.status != "diverged" and bool(evals)
    last_step = max((line["step"] for line in evals), default=0)
    # The last step may be evaluated twice: the second time on the whole split.
    last = [line for line in evals if line["step"] == last_step][-1] if has_loss else None
    best = outcome.run.history.best_val_loss if has_loss else None
    steps = step_lines(lines)
    speeds = sorted(line["timing"]["tokens_per_s"] for line in steps)
    config = outcome.run.config if steps else None
    step_tokens = config.tokens_per_step if config else 0
    memory = [line["timing"]["memory_bytes"] for line in steps if line["timing"]["memory_bytes"]]
    samples = [line["text"] for line in sample_lines(lines)]
    return TrialResult(
        seed=seed,
        status=outcome.status,
        final_loss=last.get("loss") if last else None,
        best_loss=best,
        bpb=last.get("bpb") if last else None,
        wall_s=elapsed_s(lines),
        step_ms=1e3 * step_tokens / speeds[len(speeds) // 2] if speeds else None,
        peak_bytes=max(memory, default=None),
        sample=samples[-1] if samples else "",
        run=outcome.run,
        error=outcome.error,
        tokens=last.get("tokens", 0) if last else 0,
        stderr=last.get("stderr") if last else None,
        is_sampled=last is not None and not last.get("whole", True),
        accuracy=last.get("accuracy") if last else None,
    )
