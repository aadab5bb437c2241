"""Open the objective of a run: its pairs or its reward, and the engine with the first weights."""

from __future__ import annotations

import dataclasses

from glasslm.config.schema import ComputeConfig, DataConfig, PreferenceConfig, RunConfig
from glasslm.data.dataset import Dataset
from glasslm.data.preference_pairs import PreferencePairs, read_preference_pairs
from glasslm.engines.factory import make_engine
from glasslm.engines.protocol import Engine
from glasslm.engines.resources import count_ranks
from glasslm.errors import DamagedError, InputError, require
from glasslm.runs import checkpoint
from glasslm.runs.run_folder import Run
from glasslm.training.preference.objective import (
    FirstEngine,
    Objective,
    PairObjective,
    RewardObjective,
)
from glasslm.training.preference.rewards import make_reward

ROUTER_LOSSES = ("balance_loss", "router_z_loss")  # of a mixture of experts


def require_tunable(config: RunConfig, base: DataConfig | None = None) -> None:
    """Raise InputError for settings that preference tuning cannot use; others pass.

    `base`: the text of the run that is tuned.
    """
    settings, train = config.preference, config.train
    if not settings.is_active:
        return
    flag = "--reward" if settings.reward else "--preferences"
    if not train.init_from:
        raise InputError(f"{flag} tunes a trained model: use `glasslm finetune RUN {flag} ...`")
    if count_ranks() > 1:
        raise InputError(f"{flag} runs in one process: start it without torchrun")
    if any(data is not None and data.chat is not None for data in (config.data, base)):
        raise InputError(
            f"{flag} writes a prompt without the template of a chat, and the base learned "
            "conversations: tune a base of plain text, which `glasslm finetune --chat` can follow"
        )
    if train.epochs is not None:
        raise InputError(f"--epochs counts a text, and {flag} has none: give --max-steps")
    # The nats of the current and of the first weights are compared, so both are of one function.
    for part, name in (
        (config.model, "dropout"),
        (config.model, "attention_dropout"),
        (config.optimizer, "ema"),
        (config.optimizer, "label_smoothing"),
        (config.optimizer, "z_loss"),
        *[(config.optimizer, name) for name in ROUTER_LOSSES if config.model.n_experts],
    ):
        require(not getattr(part, name), name, getattr(part, name), f"0 with {flag}")
    B, G = train.batch_size, settings.group_size
    if settings.reward and B % G:
        raise InputError(
            f"batch_size is {B} and group_size {G}: expected a multiple, because a batch has whole "
            f"groups. Give --batch-size {max(1, round(B / G)) * G}"
        )
    if settings.preferences and B % 2:
        raise InputError(f"batch_size is {B}: expected an even number, two rows for each pair")


def with_pairs_hash(config: RunConfig) -> RunConfig:
    """`config` with the hash of its file of pairs, where it has one; InputError for a bad file."""
    settings = config.preference
    if not settings.preferences:
        return config
    sha256 = _read_pairs(config).sha256
    preference = dataclasses.replace(settings, preferences_sha256=sha256)
    return dataclasses.replace(config, preference=preference)


def open_objective(run: Run, engine: Engine, dataset: Dataset) -> Objective | None:
    """The objective of a run that `engine` trains; None where it learns a text.

    The engine with the first weights is made when it is needed.
    """
    if not run.config.preference.is_active:
        return None

    def make_first_engine() -> Engine:
        return make_reference_engine(run, engine, dataset.tokenizer.vocab_size)

    return make_objective(run.config, engine, make_first_engine, dataset)


def make_objective(
    config: RunConfig, engine: Engine, first: FirstEngine, dataset: Dataset
) -> Objective:
    """The objective of a config; `first()` returns an engine with the first weights.

    Raises InputError for pairs or a text that cannot be used, DamagedError where the pairs have
    changed since the run began.
    """
    settings, tokenizer = config.preference, dataset.tokenizer
    if settings.reward is None:
        try:
            pairs = _read_pairs(config)
        except InputError as error:
            if not settings.preferences_sha256:
                raise
            raise DamagedError(
                f"the pairs of this run are missing or have changed: {error}"
            ) from None
        if settings.preferences_sha256 not in ("", pairs.sha256):
            raise DamagedError(
                f"{settings.preferences} has changed since the run began: its sha256 was "
                f"{settings.preferences_sha256}, it is {pairs.sha256} now. Restore it from a copy"
            )
        return PairObjective(config, engine, first, tokenizer, pairs.train, pairs.held_out)
    text = tokenizer.decode(dataset.train.tokens[:]) if settings.reward == "names" else ""
    return RewardObjective(config, engine, first, tokenizer, make_reward(settings.reward, text))


def make_reference_engine(run: Run, engine: Engine, vocab_size: int) -> Engine:
    """An engine like `engine`, with the first weights of the run, which are in its folder."""
    model = dataclasses.replace(run.config.model, lora_rank=0)  # adapters begin without effect
    config = dataclasses.replace(run.config, model=model, preference=PreferenceConfig())
    compute = ComputeConfig(
        engine=engine.name, device=engine.device, precision=engine.precision, compile="off",
        threads=run.record.get("threads", 0),
    )  # fmt: skip
    reference = make_engine(config, vocab_size, compute)
    reference.load(checkpoint.read_base(run.path).items())
    return reference


def _read_pairs(config: RunConfig) -> PreferencePairs:
    return read_preference_pairs(config.preference.preferences, config.data.val_fraction)
