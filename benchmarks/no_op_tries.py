"""False accepts of `glasslm try`: real tries of a change that is worth nothing.

    python benchmarks/no_op_tries.py [--text-file PATH | --corpus shakespeare]
        [--tries 60 --seeds 20 --first-seed 1 --max-steps 20 --alpha 0.05 --detect 0.001]

Base and change of each try are the same small recipe, and the "change" is another seed. No two
tries share a run, so their verdicts are independent. The loop of pairs, the test and the rules that
end a try are those of the command. `--alpha` is what a single try may spend on a false accept; in
a ledger the first try may spend half of it, and later ones less. A small `--detect` lets a try
go on, so that it is looked at as often as possible.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # as glasslm's command line does
import numpy as np

from glasslm.config.conversion import with_flags
from glasslm.config.presets import PRESETS
from glasslm.config.schema import ComputeConfig, RunConfig
from glasslm.data.dataset import Dataset
from glasslm.lab.studies.study_plan import prepare_recipe
from glasslm.lab.studies.sweep import TrialOutcome
from glasslm.lab.studies.trial_results import TrialResult, read_trial
from glasslm.lab.tries.attempt import Change, TryPlan, TryResult, TrySpec, collect_pairs
from glasslm.runs.run_folder import Run
from glasslm.text import ignore_message
from glasslm.training import launch
from paired import heading

MODEL = {
    "d_model": 16, "n_layers": 1, "n_heads": 2, "block_size": 16, "batch_size": 4,
    "log_interval": 10**6, "sample_interval": 0, "eval_interval": 10**6,
    "checkpoint_interval": 10**6,
}  # fmt: skip
COMPUTE = ComputeConfig(engine="numpy", threads=1)


def train(config: RunConfig, dataset: Dataset, folder: Path) -> TrialResult:
    """Train one run and read its result."""
    outcome = launch.train(config, COMPUTE, folder, dataset=dataset, notify=ignore_message)
    return read_trial(config.train.seed, TrialOutcome(outcome.status, Run(folder)))


def run_no_op(base: RunConfig, dataset: Dataset, spec: TrySpec, first_seed: int) -> TryResult:
    """One try of another seed; its runs have the seeds from `first_seed` on."""
    with tempfile.TemporaryDirectory() as folder:

        def train_pairs(seeds: Sequence[int]) -> tuple[list[TrialResult], list[TrialResult]]:
            sides: tuple[list[TrialResult], list[TrialResult]] = ([], [])
            for seed in seeds:
                for side, trials in enumerate(sides):
                    config = with_flags(base, {"seed": first_seed + 2 * seed + side})
                    trials.append(train(config, dataset, Path(folder, f"{seed}-{side}")))
            return sides

        plan = TryPlan(base, Change("--seed", base), spec, 0, COMPUTE, None)
        return collect_pairs(plan, train_pairs, lambda: 0.0, 1, ignore_message)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    text = parser.add_mutually_exclusive_group()
    text.add_argument("--text-file")
    text.add_argument("--corpus", default="shakespeare")
    parser.add_argument("--tries", type=int, default=60)
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--first-seed", type=int, default=1)
    parser.add_argument("--max-steps", type=int, default=20)
    parser.add_argument("--alpha", type=float, default=0.05)
    parser.add_argument("--detect", type=float, default=0.001)
    args = parser.parse_args()

    source = {"text_file": (args.text_file,)} if args.text_file else {"corpus": args.corpus}
    base, dataset = prepare_recipe(
        with_flags(PRESETS["tiny"](), MODEL | source | {"max_steps": args.max_steps}),
        ignore_message,
    )
    base = with_flags(base, {"seed": 0})
    spec = TrySpec(args.alpha, args.detect, args.seeds, None)
    print(heading("numpy", threads=1))
    verdicts: dict[str, int] = {}
    spreads, pairs = [], []
    for number in range(args.tries):
        first_seed = args.first_seed + number * 2 * (args.seeds + 1)
        result = run_no_op(base, dataset, spec, first_seed)
        verdicts[result.verdict] = verdicts.get(result.verdict, 0) + 1
        spreads.append(result.look.sd)
        pairs.append(result.look.n)
        print(f"{number + 1} {result.verdict} {result.look.delta:+.4f} {result.reason}", flush=True)
    print(
        f"{args.tries} tries at alpha {args.alpha:g}: "
        + ", ".join(f"{name} {count}" for name, count in sorted(verdicts.items()))
    )
    print(
        f"false accepts: {verdicts.get('better', 0) / args.tries:.1%}; {np.mean(pairs):.1f} pairs "
        f"a try; sd of a difference: {np.median(spreads):.4f} nats (median)"
    )


if __name__ == "__main__":
    main()
