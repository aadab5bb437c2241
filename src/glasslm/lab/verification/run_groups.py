"""Groups of runs that differ in the seed alone, and verdicts on the groups of a comparison."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from statistics import fmean

from glasslm.config.schema import RunConfig
from glasslm.lab.statistics import Verdict, compare_losses, interval_of_mean, judge_family
from glasslm.lab.verification.compared_run import ComparedRun

MAX_VERDICTS = 10  # pairs of groups that are listed


@dataclass(frozen=True)
class RunGroup:
    """Runs of one configuration with different seeds."""

    runs: tuple[ComparedRun, ...]
    losses: dict[int, float | None]  # by seed; None if the run diverged or has no loss
    copies: tuple[ComparedRun, ...]  # runs that are left out: their seed is that of another run

    @property
    def name(self) -> str:
        """The labels of the runs: "A, C"."""
        return ", ".join(run.letter for run in self.runs)

    @property
    def mean(self) -> float | None:
        """The mean over all seeds; None if one has no loss: the mean of the others is biased."""
        losses = [loss for loss in self.losses.values() if loss is not None]
        return fmean(losses) if len(losses) == len(self.losses) else None

    @property
    def interval(self) -> tuple[float, float] | None:
        """The 95% t interval of the mean; None without a mean or with one seed."""
        losses = [loss for loss in self.losses.values() if loss is not None]
        return None if self.mean is None else interval_of_mean(losses)

    @property
    def rank(self) -> float:
        """The mean as a key of order: a group without a mean comes last."""
        return math.inf if self.mean is None else self.mean


@dataclass(frozen=True)
class GroupVerdict:
    """The comparison of two groups: `variant` minus `baseline`."""

    variant: RunGroup
    baseline: RunGroup
    paired: bool
    verdict: Verdict

    @property
    def words(self) -> str:
        how = f"paired by {len(self.variant.losses)} seeds" if self.paired else "seeds differ"
        return f"{self.variant.name} against {self.baseline.name}: {self.verdict.words}; {how}."


def group_runs(compared: Sequence[ComparedRun], result: str) -> list[RunGroup]:
    """The groups in the order of their first runs, with the losses that `result` names.

    A second run of the same seed is a copy, which is no further evidence: it is left out.
    """
    groups: dict[Hashable, list[ComparedRun]] = {}
    for run in compared:
        groups.setdefault(_group_key(run), []).append(run)
    return [_make_group(runs, result) for runs in groups.values()]


def _make_group(runs: Sequence[ComparedRun], result: str) -> RunGroup:
    seeds: dict[int, ComparedRun] = {}
    copies = tuple(
        run for run in runs if seeds.setdefault(run.run.config.train.seed, run) is not run
    )
    losses = {seed: _loss(run, result) for seed, run in seeds.items()}
    return RunGroup(tuple(seeds.values()), losses, copies)


def _group_key(run: ComparedRun) -> Hashable:
    """The settings without the seed, the text, the tokenizer, the arithmetic and the code.

    They are equal in all runs of a group.
    """
    config: RunConfig = run.run.config
    without_seed = dataclasses.replace(config, train=dataclasses.replace(config.train, seed=0))
    record = run.run.record
    arithmetic = [record.get(name) for name in ("engine", "device", "precision", "compiled")]
    code = record.get("glasslm"), *sorted((record.get("git") or {}).items())
    return without_seed, run.validation_text, run.tokenizer_sha256, *arithmetic, code


def _loss(run: ComparedRun, result: str) -> float | None:
    loss = run.results[result]
    if run.run.history.status == "diverged" or loss is None or not math.isfinite(loss):
        return None
    return float(loss)


def judge_groups(groups: Sequence[RunGroup], unit: str) -> list[GroupVerdict]:
    """The verdicts on all pairs of groups, corrected for their number (Holm).

    Groups with the same seeds are paired by seed. The group with the lower mean is the variant.
    """
    pairs = [(a, b) if a.rank <= b.rank else (b, a) for a, b in itertools.combinations(groups, 2)]
    pairings = [a.losses.keys() == b.losses.keys() for a, b in pairs]
    comparisons = [
        compare_losses(
            [losses for _, losses in sorted(a.losses.items())],
            [losses for _, losses in sorted(b.losses.items())],
            family=len(pairs), paired=paired, unit=unit,
        )
        for (a, b), paired in zip(pairs, pairings)
    ]  # fmt: skip
    return [
        GroupVerdict(a, b, paired, verdict)
        for (a, b), paired, verdict in zip(pairs, pairings, judge_family(comparisons))
    ]


def group_rows(groups: Sequence[RunGroup]) -> list[tuple[str, ...]]:
    """The runs, number of seeds, mean and 95% interval of each group, as text."""
    rows: list[tuple[str, ...]] = []
    for group in groups:
        interval = group.interval
        rows.append(
            (
                group.name,
                str(len(group.losses)),
                "-" if group.mean is None else f"{group.mean:.4f}",
                "-" if interval is None else f"{interval[0]:.4f} to {interval[1]:.4f}",
            )
        )
    return rows


def verdict_sentences(verdicts: Sequence[GroupVerdict]) -> list[str]:
    """A sentence for each pair of groups; of many pairs, those of the lowest mean first."""
    ranked = sorted(verdicts, key=lambda pair: (pair.variant.rank, pair.baseline.rank))
    sentences = [pair.words for pair in ranked[:MAX_VERDICTS]]
    if len(ranked) > MAX_VERDICTS:
        sentences.append(f"{len(ranked) - MAX_VERDICTS} more pairs of groups are not listed.")
    return sentences
