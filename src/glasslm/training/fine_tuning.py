"""Fine-tuning: the base run of a new run, and the default config.

A fine-tuned run starts from the weights of a base run, with its architecture and tokenizer. With
adapters (lora_rank) all other weights are frozen. Loop, checkpoints and flags are those of all
runs.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

from numpy.typing import NDArray

from glasslm.config.conversion import with_flags
from glasslm.config.schema import DataConfig, ModelConfig, RunConfig
from glasslm.data.dataset import Split
from glasslm.data.tokenizers import Tokenizer
from glasslm.errors import DamagedError, InputError
from glasslm.inference.evaluation import split_windows
from glasslm.model.adapters import merge_adapters
from glasslm.model.parameters import initial_weights, parameter_table
from glasslm.model.vocabulary_growth import add_token_rows
from glasslm.runs import checkpoint
from glasslm.runs.checkpoint import Checkpoint
from glasslm.runs.protection import open_run
from glasslm.runs.record import SourceRun
from glasslm.runs.run_folder import Run
from glasslm.text import Notify

Weights = Iterator[tuple[str, NDArray[Any]]]

DEFAULT_RANK = 8
LORA_LR, FULL_LR = 1e-2, 3e-3  # peak learning rates; the experiments are in docs/log.md
# The same of preference tuning: after a step that is too large, no answer has a reward.
PREFERENCE_LORA_LR, PREFERENCE_FULL_LR = 3e-3, 5e-4
# Fields of ModelConfig that may differ from those of the base. block_size may not where positions
# are learned.
OVERRIDABLE_FIELDS = {
    "block_size", "dropout", "attention_dropout", "attention", "window", "rope_scaling",
    "rope_factor", "lora_rank", "lora_alpha", "lora_targets", "document_attention",
    "document_end_id",
}  # fmt: skip


class BaseRun:
    """The run that fine-tuning starts from, at its best checkpoint, with adapters merged."""

    def __init__(self, run: str) -> None:
        """`run` is a path or a name under ./runs; DamagedError where its checkpoint is damaged."""
        self.run = open_run(run)
        self.checkpoint = load_best_checkpoint(self.run)

    @property
    def source(self) -> SourceRun:
        """The base as run.json of the new run names it."""
        return {
            "run": str(self.run.path.resolve()),
            "step": self.checkpoint.step,
            "data_sha256": self.run.record["data"]["sha256"],
        }

    @property
    def chat_template(self) -> str:
        """The Jinja template of a model that answers; empty where it has none."""
        settings: dict[str, Any] = self.run.record["tokenizer"].get("transformers", {})
        return str(settings.get("chat_template") or "")

    def weights(self) -> dict[str, NDArray[Any]]:
        """The weights by name, in the shapes of the parameter table, with adapters merged."""
        return merge_adapters(self.checkpoint.weights(), self.run.config.model)

    def weights_for(self, tokenizer: Tokenizer, seed: int) -> dict[str, NDArray[Any]]:
        """`weights` with rows for the tokens that `tokenizer` has beyond those of the base."""
        return add_token_rows(self.weights(), new_tokens(tokenizer, self.run.tokenizer), seed)

    def first_weights(self, config: RunConfig, tokenizer: Tokenizer) -> Weights:
        """The first weights of a run of this config: those of the base, and initial adapters."""
        base_weights = self.weights_for(tokenizer, config.train.seed)
        table = parameter_table(config.model, tokenizer.vocab_size)
        yield from base_weights.items()
        new_rows = {name: row for name, row in table.items() if name not in base_weights}
        yield from initial_weights(new_rows, config.train.seed)

    def require_fit(self, config: RunConfig) -> None:
        """Raise InputError where `config` has another architecture or tokenizer than the base.

        Equal shapes are not enough: other heads or another activation leave all shapes as they are.
        """
        model, base_model = config.model.resolve(), self.run.config.model.resolve()
        for name in (field.name for field in dataclasses.fields(ModelConfig)):
            value, base_value = getattr(model, name), getattr(base_model, name)
            is_overridable = name in OVERRIDABLE_FIELDS and not (
                name == "block_size" and base_model.position == "learned"
            )
            if value != base_value and not is_overridable:
                raise InputError(
                    f"{name} is {value}, but {self.run.path} was trained with {base_value}: leave "
                    f"out --{name.replace('_', '-')}, or train a new model without --init-from"
                )
        sha256 = config.operations.ops_sha256
        if sha256 != (base_sha256 := self.run.config.operations.ops_sha256):
            raise InputError(
                f"--ops has the sha256 {sha256[:12] or 'of no file'}, but {self.run.path} was "
                f"trained with {base_sha256[:12] or 'no --ops'}: give the same file"
            )
        tokenizer, base_tokenizer = config.data.tokenizer, self.run.config.data.tokenizer
        if tokenizer != base_tokenizer:
            raise InputError(
                f"tokenizer is {tokenizer}, but {self.run.path} was trained with {base_tokenizer}: "
                "leave out --tokenizer, or train a new model"
            )
        tokens = config.data.used_special_tokens
        base_tokens = self.run.config.data.used_special_tokens
        if tokens != base_tokens and config.data.chat is None:  # a chat adds those of its template
            raise InputError(
                f"the special tokens are {' '.join(tokens) or 'none'}, but {self.run.path} was "
                f"trained with {' '.join(base_tokens) or 'none'}: leave out --special-tokens and "
                "--document-separator, or train a new model"
            )

    def old_text(self, block_size: int, notify: Notify) -> Split | None:
        """The base run's validation split.

        None, with a note, where its text is missing, or `block_size` tokens hold no example of a
        task, or no answer of conversations.
        """
        not_measured = f"note: forgetting of the text of {self.run.path} is not measured, because"
        try:
            split = self.run.dataset(notify).val
        except (DamagedError, InputError) as error:
            notify(f"{not_measured} the text is missing: {error}")
            return None
        if split.answers is not None and split.answers.line_length > block_size:
            notify(
                f"{not_measured} its examples have {split.answers.line_length} tokens: "
                f"give --block-size {split.answers.line_length} or more"
            )
            return None
        windows = split_windows(
            split, dataclasses.replace(self.run.config.model, block_size=block_size)
        )
        if not len(windows):
            notify(
                f"{not_measured} {block_size} tokens hold no answer of its conversations: "
                "give a larger --block-size"
            )
            return None
        return split


def fine_tuning_settings(with_adapters: bool) -> dict[str, Any]:
    """The settings of fine-tuning by flat name: adapters are trained, or all weights.

    Other settings of model, optimizer and training are those of the base.
    """
    return {
        "lora_rank": DEFAULT_RANK if with_adapters else 0,
        "optimizer": "adamw", "lr": LORA_LR if with_adapters else FULL_LR, "min_lr": 0.0,
        "warmup_steps": 20,
        "max_steps": 300, "epochs": None, "max_time": None, "stop_at_loss": None, "patience": None,
        "eval_interval": 50, "checkpoint_interval": 100, "sample_interval": 100,
    }  # fmt: skip


def fine_tuning_config(base: BaseRun, with_adapters: bool) -> RunConfig:
    """The default config of fine-tuning: adapters are trained, or all weights.

    It has the architecture and the tokenizer of the base, few steps and a low learning rate.
    """
    config = base.run.config
    data = DataConfig(
        tokenizer=config.data.tokenizer, vocab_size=config.data.vocab_size,
        special_tokens=config.data.used_special_tokens,
    )  # fmt: skip
    unchanged = RunConfig(config.model, data, config.optimizer, config.train)
    settings = fine_tuning_settings(with_adapters) | {"init_from": str(base.run.path)}
    return with_flags(unchanged, settings)


def new_tokens(tokenizer: Tokenizer, base_tokenizer: Tokenizer) -> dict[int, str]:
    """The special tokens by id that a tokenizer has beyond those of the base."""
    special = {i: token for token, i in tokenizer.special_tokens.items()}
    return {i: special[i] for i in range(base_tokenizer.vocab_size, tokenizer.vocab_size)}


def preference_tuning_settings(with_adapters: bool, has_experts: bool) -> dict[str, Any]:
    """The settings of preference tuning by flat name: dropout and the auxiliary terms are off."""
    of_experts = {"balance_loss": 0.0, "router_z_loss": 0.0} if has_experts else {}
    return fine_tuning_settings(with_adapters) | of_experts | {
        "dropout": 0.0, "attention_dropout": 0.0,
        "lr": PREFERENCE_LORA_LR if with_adapters else PREFERENCE_FULL_LR, "warmup_steps": 10,
        "weight_decay": 0.0, "ema": 0.0, "label_smoothing": 0.0, "z_loss": 0.0,
        "batch_size": 128, "micro_batch_size": 0, "max_steps": 200,
        "eval_interval": 25, "log_interval": 1, "checkpoint_interval": 50,
    }  # fmt: skip


def preference_tuning_config(base: BaseRun, with_adapters: bool) -> RunConfig:
    """The default config of preference tuning. Dropout and the auxiliary terms are off.

    It names no text, which stands for that of the base (run_inputs.with_base_source).
    """
    config = fine_tuning_config(base, with_adapters)
    settings = preference_tuning_settings(with_adapters, config.model.n_experts > 0)
    data = base.run.config.data.without_source()
    return with_flags(dataclasses.replace(config, data=data), settings)


def load_best_checkpoint(run: Run, warn: Notify | None = None) -> Checkpoint:
    """The best checkpoint of a run. Raises DamagedError where it belongs to another run."""
    best_checkpoint = checkpoint.load(run.path, "best", warn)
    checkpoint.require_identity(best_checkpoint, run.identity)
    return best_checkpoint
