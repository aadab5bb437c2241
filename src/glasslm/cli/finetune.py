"""glasslm finetune: continue a trained model on other text, or tune it to preferences."""

from __future__ import annotations

import shlex
from dataclasses import dataclass, field, fields
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Any

from glasslm.cli.flag_groups import ConfigFlags, JsonFlag, RunArgument, TrackFlag
from glasslm.cli.outcome import report_outcome
from glasslm.config.config_fields import optional_flag
from glasslm.config.schema import ComputeConfig, ModelConfig, PreferenceConfig, RunConfig
from glasslm.errors import InputError
from glasslm.text import print_result
from glasslm.training.fine_tuning import OVERRIDABLE_FIELDS

DESCRIPTION = """Continue a trained model on other text: train adapters beside its frozen
weights (LoRA), or train all weights.

Examples:
  glasslm finetune shakespeare-quick --text-file names.txt
  glasslm finetune shakespeare-quick --text-file names.txt --lora-rank 4
  glasslm finetune shakespeare-quick --text-file names.txt --full
  glasslm finetune shakespeare-quick --text-file names.txt --study rank
  glasslm finetune additions --reward addition --full
  glasslm finetune shakespeare-quick --preferences pairs.jsonl

With --preferences or --reward no text is learned, but which answers are
better than others.

The flags of `glasslm train` work here, with other defaults, except those of the
architecture and the tokenizer, which are those of RUN. The loss on the old text
is measured as well as the loss on the new one. `glasslm merge` makes one model
of weights and adapters."""

OF_RUN = "that of RUN"  # the default of a setting that is taken over from the trained model
# Fields that must be those of RUN. `block_size` may differ, unless positions are learned.
FIXED_FIELDS = frozenset(
    [
        *({field.name for field in fields(ModelConfig)} - OVERRIDABLE_FIELDS),
        *("tokenizer", "vocab_size", "init_from"),
    ]
)


@dataclass(frozen=True, kw_only=True)
class Flags(ConfigFlags):
    """The settings of a fine-tuned run."""

    hidden_fields = FIXED_FIELDS

    run: RunArgument
    full: bool = False
    """Train all weights instead of adapters."""
    study: Annotated[str | None, optional_flag("rank|targets", "none: one model")] = None
    """Train several models to compare ranks (2 to 64), or choices of the adapted matrices."""
    run_dir: Annotated[Path | None, optional_flag("PATH", "a new one under ./runs")] = None
    """Folder of the new run or study, which must not contain one yet."""
    json: JsonFlag = False
    track: TrackFlag = ""
    preference: PreferenceConfig = field(default_factory=PreferenceConfig)
    compute: ComputeConfig = field(default_factory=ComputeConfig)


def main(argv: list[str]) -> int:
    from glasslm.training import launch

    flags = parse(argv)
    if not (flags.data.has_source or flags.preference.is_active):  # the base has a text
        raise InputError(
            "no text to learn was given: give --text-file PATH, --corpus NAME or --chat FILE"
        )
    if flags.study and flags.preference.is_active:
        raise InputError(
            "--study compares adapters on a text: leave it out, or --preferences and --reward"
        )
    config = flags.config
    command = shlex.join(["glasslm", "finetune", *argv])
    if flags.study:
        _require_study_flags(flags, argv)
        from glasslm.lab.studies.adapter_study import run_study

        print_result(str(run_study(flags.study, config, flags.compute, flags.run_dir, command)))
        return 0
    name = "full" if flags.full else f"lora-{config.model.lora_rank}"
    if flags.preference.is_active:
        name += "-grpo" if flags.preference.reward else "-dpo"
    outcome = launch.train(
        config, flags.compute, flags.run_dir, preset=name, command=command, track=flags.track
    )
    return report_outcome(outcome, flags.json)


def _require_study_flags(flags: Flags, argv: list[str]) -> None:
    """Raise InputError for flags that show one run, and for the setting that the study varies."""
    from glasslm.cli import parsing

    if flags.track:
        raise InputError("--track shows one run, and --study trains several: leave one of them out")
    if flags.json:
        raise InputError(
            "--json prints one run, and --study trains several: leave one of them out. The study "
            "writes its numbers into adapters.csv"
        )
    varied = {"rank": "lora_rank", "targets": "lora_targets"}.get(flags.study or "", "")
    if varied in parsing.given_fields(argv):
        flag = f"--{varied.replace('_', '-')}"
        raise InputError(f"--study {flags.study} tries several values of {flag}: leave it out")


def parse(argv: list[str]) -> Flags:
    """The flags, over the recipe that follows from the trained model."""
    from glasslm.cli import parsing
    from glasslm.training import fine_tuning

    default: Flags | SimpleNamespace
    is_preference = bool({"reward", "preferences"} & parsing.given_fields(argv))
    if argv and not argv[0].startswith("-"):
        make_config = (
            fine_tuning.preference_tuning_config
            if is_preference
            else fine_tuning.fine_tuning_config
        )
        config = make_config(fine_tuning.BaseRun(argv[0]), with_adapters="--full" not in argv)
        default = Flags(
            run=argv[0],
            model=config.model,
            data=config.data,
            optimizer=config.optimizer,
            train=config.train,
        )
    elif parsing.HELP_FLAGS & set(argv):
        default = _help_defaults("--full" not in argv, is_preference)
    else:
        raise InputError("RUN comes first, as in glasslm finetune RUN --text-file PATH")
    if parsing.HELP_FLAGS & set(argv) and default.data.corpus is None:  # no text is the default
        data = SimpleNamespace(**vars(default.data) | {"corpus": "none"})
        default = SimpleNamespace(**vars(default) | {"data": data})
    flags = parsing.parse(Flags, argv, "glasslm finetune", DESCRIPTION, default=default)
    if flags.full and flags.model.lora_rank:
        raise InputError("both --full and --lora-rank were given: train all weights, or adapters")
    if not (flags.full or flags.model.lora_rank):
        raise InputError(
            "lora_rank is 0, so there is nothing to train: "
            "expected 1 or more, or --full for all weights"
        )
    if flags.train.init_from != default.train.init_from:
        raise InputError("RUN is the model to start from: leave out --init-from")
    return flags


def _help_defaults(with_adapters: bool, is_preference: bool) -> SimpleNamespace:
    """The defaults for help without RUN: values of the recipe, and OF_RUN for all others."""
    from glasslm.training import fine_tuning

    settings = (
        fine_tuning.preference_tuning_settings(with_adapters, has_experts=True)
        if is_preference
        else fine_tuning.fine_tuning_settings(with_adapters)
    )
    parts: dict[str, Any] = {
        name: SimpleNamespace(
            **{field.name: settings.get(field.name, OF_RUN) for field in fields(part)}
        )
        for name, part in vars(RunConfig()).items()
        if name in ("model", "optimizer", "train") or (name == "data" and is_preference)
    }
    return SimpleNamespace(**vars(Flags(run="RUN")) | parts)
