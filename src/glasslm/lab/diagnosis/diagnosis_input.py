"""The input of a diagnosis: a configuration, its text, its first weights and its run."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from glasslm.config.schema import ComputeConfig, RunConfig
from glasslm.data.batch_sampler import make_sampler
from glasslm.data.dataset import Dataset, require_enough_tokens
from glasslm.engines.choice import compute_from_record
from glasslm.engines.operations import admit_operations
from glasslm.engines.protocol import Batch, State
from glasslm.errors import DamagedError, InputError
from glasslm.lab.diagnosis import trials
from glasslm.lab.diagnosis.trials import TrialSetup
from glasslm.model.parameters import initial_weights, parameter_table
from glasslm.runs import checkpoint
from glasslm.runs.run_folder import Run
from glasslm.text import Notify
from glasslm.training.run_inputs import open_run_inputs
from glasslm.training.training_batch import training_batch

if TYPE_CHECKING:
    from glasslm.runs.checkpoint import Checkpoint

MAX_POSITIONS = 512  # of a row: inspection holds the attention scores of all pairs of positions
MAX_CHECKPOINTS = 4  # inspected after the first weights


@dataclass(frozen=True)
class DiagnosisInput:
    """A configuration with its text and its first weights, and the run trained from it, if any."""

    config: RunConfig  # resolved
    dataset: Dataset
    compute: ComputeConfig
    first_weights: Callable[[], State]
    fine_tuned: bool  # whether training started from trained weights
    run: Run | None = None

    @property
    def vocab_size(self) -> int:
        """The size of the tokenizer's vocabulary."""
        return self.dataset.tokenizer.vocab_size

    @property
    def trial_setup(self) -> TrialSetup:
        """The setup of trials with copies of the first weights."""
        return TrialSetup(
            self.config,
            self.vocab_size,
            trials.engine_maker(self.vocab_size, self.compute),
            self.batch,
            self.first_weights,
        )

    def batch(self, step: int, rows: int) -> Batch:
        """`rows` rows of training text for a step, cut to MAX_POSITIONS."""
        train = dataclasses.replace(self.config.train, batch_size=rows)
        sampler = make_sampler(dataclasses.replace(self.config, train=train), self.dataset)
        batch = training_batch(sampler, self.dataset.train.tokens, step, rows)
        return batch._replace(
            tokens=batch.tokens[:, :MAX_POSITIONS], targets=batch.targets[:, :MAX_POSITIONS]
        )

    def rows_for(self, tokens: int) -> int:
        """The number of rows with about `tokens` tokens, at least two."""
        return max(2, tokens // min(self.config.model.block_size, MAX_POSITIONS))

    def load_checkpoints(
        self, notify: Notify
    ) -> Iterator[tuple[Checkpoint, list[tuple[str, NDArray[Any]]]]]:
        """Up to MAX_CHECKPOINTS checkpoints after the first weights, with their arrays.

        The best and the latest are among them. A run in progress may remove a checkpoint at any
        time, so the arrays are read at once. Damaged checkpoints are skipped with a message.
        """
        if self.run is None:
            return
        steps = [step for step in checkpoint.list_steps(self.run.path) if step > 0]
        for step in sorted(_choose_steps(steps, self.run.history.best_step)):
            try:
                saved = checkpoint.load(self.run.path, step)
                state = list(saved.state())
            except (DamagedError, InputError) as error:
                notify(f"note: the checkpoint of step {step:,} is left out: {error}")
                continue
            yield saved, state


def _choose_steps(steps: list[int], best: int | None) -> set[int]:
    """At most MAX_CHECKPOINTS of the steps: the best, and others evenly spaced up to the latest."""
    if not steps:
        return set()
    indices = np.linspace(0, len(steps) - 1, MAX_CHECKPOINTS - 1).round().astype(int)
    chosen = {steps[i] for i in indices}
    if best not in steps or best in chosen:
        return chosen
    return {best, *sorted(chosen)[1:]} if len(chosen) == MAX_CHECKPOINTS - 1 else {best, *chosen}


def input_from_config(config: RunConfig, compute: ComputeConfig, notify: Notify) -> DiagnosisInput:
    """The input of a diagnosis before training.

    Raises InputError if training could not start: a base that does not fit, adapters without a
    base, too little text.
    """
    config = admit_operations(config.resolve())
    inputs = open_run_inputs(config, notify)
    config = inputs.complete(config)

    def first_weights() -> State:
        return inputs.first_weights(config)

    fine_tuned = inputs.base is not None
    return DiagnosisInput(config, inputs.dataset, compute, first_weights, fine_tuned)


def input_from_run(run_dir: Path, compute: ComputeConfig, notify: Notify) -> DiagnosisInput:
    """The input of the diagnosis of a run that is finished, interrupted or in progress.

    It is computed with the recorded engine and precision where `compute` leaves them open and this
    machine has them. Raises DamagedError when the run's text is missing.
    """
    run = Run(run_dir)
    compute, notes = compute_from_record(compute, run.record)
    for note in notes:
        notify(f"note: {note}")
    dataset = run.dataset(notify)
    require_enough_tokens(dataset, run.config.model.block_size)  # 0.1 trained vocabularies of 1
    table = parameter_table(run.config.model, run.tokenizer.vocab_size)
    steps = checkpoint.list_steps(run_dir)
    from_scratch = run.config.train.init_from is None and "merged_from" not in run.record

    def first_weights() -> State:
        if from_scratch:  # the seed determines them, so no checkpoint of step 0 is needed
            return initial_weights(table, run.config.train.seed)
        saved = checkpoint.load(run_dir, steps[0] if steps else "latest")
        return ((name, array) for name, array in saved.state() if "/" not in name)

    return DiagnosisInput(
        run.config.resolve(), dataset, compute, first_weights, not from_scratch, run
    )
