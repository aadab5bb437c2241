"""The axes of an ablation: what a variant changes, and what equals the baseline."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal, NamedTuple, get_args, get_origin, get_type_hints

from glasslm.config.conversion import from_dict, with_flags, with_model
from glasslm.config.schema import (
    ALIASES,
    DataConfig,
    ModelConfig,
    OperationsConfig,
    OptimizerConfig,
    RunConfig,
    TrainConfig,
)
from glasslm.config.unused_flags import refuse_unread_settings
from glasslm.engines.operations import admit_operations
from glasslm.errors import InputError
from glasslm.model.flops import flops_per_token
from glasslm.model.parameters import parameter_table
from glasslm.text import Notify, suggest_name

Match = Literal["tokens", "flops", "time", "parameters"]
MATCH_LABELS: dict[Match, str] = {
    "tokens": "equal tokens",
    "flops": "equal FLOPs",
    "time": "equal time",
    "parameters": "equal parameters",
}

MAX_MATCHED_LAYERS = 64
MAX_MATCHED_WIDTH_RATIO = 4
MAX_MATCHED_ERROR = 0.15  # of the number of parameters, which changes in steps


class Variant(NamedTuple):
    """The baseline with one thing changed."""

    axis: str
    value: str
    config: RunConfig
    checkout: str = ""  # of another version of glasslm, which trains the runs

    @property
    def name(self) -> str:
        return f"{self.axis}-{self.value}".replace("/", "-")


class Axis(NamedTuple):
    """The values of an axis as words, and how each of them changes a baseline."""

    values: tuple[str, ...]
    change: Callable[[RunConfig, str], RunConfig]
    note: str = ""  # what else has to change with it


def _change_model(**fields: Callable[[str], Any] | str) -> Callable[[RunConfig, str], RunConfig]:
    """A change of fields of the model: parsed from the value's word, or set to a fixed word."""

    def change(base: RunConfig, word: str) -> RunConfig:
        changes = {
            name: parse if isinstance(parse, str) else parse(word) for name, parse in fields.items()
        }
        return with_model(base, **changes)

    return change


def _change_width(base: RunConfig, word: str) -> RunConfig:
    d_model, head_size = int(word), base.model.head_size
    if d_model % head_size:
        raise InputError(
            f"width {d_model}: expected a multiple of the head size {head_size}, which this axis "
            "keeps"
        )
    return with_model(base, d_model=d_model, n_heads=d_model // head_size)


def _change_norm(base: RunConfig, word: str) -> RunConfig:
    norm, _, position = word.partition("/")
    return with_model(base, norm=norm, norm_position=position or base.model.norm_position)


def _change_optimizer(base: RunConfig, word: str) -> RunConfig:
    changed = from_dict(
        type(base.optimizer), dataclasses.asdict(base.optimizer) | {"optimizer": word}
    )
    return dataclasses.replace(base, optimizer=changed)


def _change_operations(base: RunConfig, word: str) -> RunConfig:
    return admit_operations(dataclasses.replace(base, operations=OperationsConfig(word)))


def _parse_tying(word: str) -> bool:
    if word not in ("tied", "untied"):
        raise InputError(f"'{word}': expected tied or untied")
    return word == "tied"


AXES: dict[str, Axis] = {
    "depth": Axis(("2", "4", "6", "8", "12"), _change_model(n_layers=int)),
    "width": Axis(
        ("64", "128", "256", "384", "512"),
        _change_width,
        "the size of a head stays the same, so the number of heads changes",
    ),
    "heads": Axis(
        ("1", "2", "4", "6", "8"),
        _change_model(n_heads=int),
        "the width stays the same, so the size of a head changes",
    ),
    "activation": Axis(
        ("relu", "gelu", "swiglu"),
        _change_model(feedforward=str),
        "a gated feed-forward layer is 8/3 wide instead of 4",
    ),
    "norm": Axis(("layernorm/pre", "layernorm/post", "rmsnorm/pre", "rmsnorm/post"), _change_norm),
    "position": Axis(
        ("none", "sinusoidal", "learned", "rope", "alibi"), _change_model(position=str)
    ),
    "tying": Axis(
        ("tied", "untied"),
        _change_model(tie_embeddings=_parse_tying),
    ),
    "optimizer": Axis(
        ("adamw", "muon", "sgd"),
        _change_optimizer,
        "all at the same learning rate, unless --rates are given",
    ),
    "qk_norm": Axis(("off", "on"), _change_model(qk_norm=lambda word: _parse_boolean(word))),
    "dropout": Axis(("0", "0.1", "0.2"), _change_model(dropout=float)),
}


# Flags of TrainConfig that change the training of every run, and nothing that a study sets itself.
TRAIN_FLAGS = ("batch_size", "micro_batch_size", "on_spike")
BOOLEANS = {"on": True, "true": True, "yes": True, "off": False, "false": False, "no": False}


def find_axis(name: str) -> tuple[str, Axis]:
    """The name and the axis of a row of AXES, or of a flag of `glasslm train` such as n_kv_heads.

    Raises InputError for a name that is neither, and for a flag that a study cannot vary.
    """
    if name in AXES:
        return name, AXES[name]
    if name == "ops":
        return name, Axis((), _change_operations)
    flag = name.strip().removeprefix("--").replace("-", "_")
    flag = ALIASES.get(flag, flag)
    hints = get_type_hints(ModelConfig) | get_type_hints(OptimizerConfig)
    train_hints = get_type_hints(TrainConfig)
    hints |= {field: train_hints[field] for field in TRAIN_FLAGS}
    if flag not in hints:
        if flag in train_hints or flag in get_type_hints(DataConfig):
            raise InputError(
                f"--axes cannot vary {flag}: all runs of a study have the same text, tokenizer, "
                "length and seeds"
            )
        suggestion = suggest_name(flag, [*AXES, *hints])
        listed = f": choose from {', '.join(AXES)}, or a flag of the model or optimizer"
        raise InputError(f"there is no axis or flag '{name}'{suggestion or listed}")
    hint = hints[flag]
    values: tuple[str, ...] = ()
    if hint is bool:
        values = ("off", "on")
    elif get_origin(hint) is Literal:
        values = tuple(map(str, get_args(hint)))
    return flag, Axis(values, partial(_change_flag, flag, hint))


def _change_flag(flag: str, hint: Any, base: RunConfig, word: str) -> RunConfig:
    """`base` with another value of a flag, as `glasslm train` would read its word."""
    value: Any = word
    if hint is bool:
        value = _parse_boolean(word)
    elif hint in (int, float):
        value = hint(word)
    if flag in get_type_hints(ModelConfig):
        return with_model(base, **{flag: value})
    return with_flags(base, {flag: value})


def _parse_boolean(word: str) -> bool:
    if word.lower() not in BOOLEANS:
        raise InputError(f"expected one of {', '.join(BOOLEANS)}")
    return BOOLEANS[word.lower()]


def variants(axes: Sequence[str], base: RunConfig) -> list[Variant]:
    """The variants of the axes, each "depth", "depth=2/3/4" or "n_kv_heads=1/2", without the
    baseline's value.

    Raises InputError for an unknown axis, for a value that is given twice, and for a given value
    that does not fit the baseline, or has no effect on it. One of the axis's own values that does
    not fit is skipped.
    """
    result: list[Variant] = []
    for text in axes:
        name, equals_sign, words = text.partition("=")
        name, axis = find_axis(name)
        if not (axis.values or words):
            form = "'ops=A.py|B.py'" if name == "ops" else f"{name}=A/B"
            raise InputError(f"--axes {name} needs values: give them as {form}")
        has_slashes = name == "ops" or (axis.values and "/" in axis.values[0])
        separator = "|" if has_slashes else "/"
        for word in words.split(separator) if equals_sign else axis.values:
            try:
                config = axis.change(base, word).resolve()
                refuse_unread_settings([name], [config])
            except InputError as error:
                if equals_sign:
                    raise InputError(f"--axes {name}={word}: {error}") from None
                continue
            except ValueError:
                raise InputError(f"--axes {name}={word}: '{word}' is not a number") from None
            if any((variant.axis, variant.value) == (name, word) for variant in result):
                raise InputError(f"--axes {name}={word} was given twice: give it once")
            if config != base.resolve():
                result.append(Variant(name, word, config))
    return result


def skipped_values(axes: Sequence[str], base: RunConfig) -> list[str]:
    """A message with the reason for each of the axes' own values that does not fit the base."""
    messages = []
    for name in axes:
        if "=" in name:
            continue
        name, axis = find_axis(name)
        for word in axis.values:
            try:
                axis.change(base, word).resolve()
            except InputError as error:
                messages.append(f"{name} {word} is left out: {error}")
    return messages


def list_variants(
    axes: Sequence[str], base: RunConfig, match: Match, vocab_size: int, notify: Notify
) -> list[Variant]:
    """The variants of the axes, without those whose parameters cannot equal the baseline's.

    `notify` gets a note on each value that is left out. Raises InputError if none remains.
    """
    for line in skipped_values(axes, base):
        notify(f"note: {line}")
    planned = variants(axes, base)
    if match != "parameters" or not planned:
        return planned
    matched = []
    for variant in planned:
        try:
            _match_parameters(variant.config, base, vocab_size)
            matched.append(variant)
        except InputError as error:
            notify(f"note: {variant.axis} {variant.value} is left out: {error}")
    if not matched:
        raise InputError(
            "--match parameters: no value of --axes can have as many parameters as the baseline. "
            "Give values nearer to it, or another --match"
        )
    return matched


def match_budget(
    variant: RunConfig,
    base: RunConfig,
    match: Match,
    vocab_size: int,
    step_seconds: Callable[[RunConfig], float],
) -> RunConfig:
    """The variant with as many tokens, FLOPs, seconds or parameters as the baseline.

    `step_seconds` gives the time of a step.
    """
    if match == "flops":
        ratio = flops_per_token(base.model, vocab_size) / flops_per_token(variant.model, vocab_size)
        steps = base.total_tokens * ratio / variant.tokens_per_step
    elif match == "time":
        steps = base.train.max_steps * step_seconds(base) / step_seconds(variant)
    else:
        if match == "parameters":
            variant = _match_parameters(variant, base, vocab_size)
        steps = base.total_tokens / variant.tokens_per_step
    return with_flags(variant, {"max_steps": max(1, round(steps))})


def _match_parameters(variant: RunConfig, base: RunConfig, vocab_size: int) -> RunConfig:
    """The variant with the baseline's number of parameters, to MAX_MATCHED_ERROR.

    Its width is changed, or its depth if the variant changes the width. Raises InputError where no
    width or depth comes near.
    """

    def size(config: RunConfig) -> int:
        return parameter_table(config.model.resolve(), vocab_size).total

    target, c = size(base), variant.model
    if c.d_model != base.model.d_model:
        candidates = [with_model(variant, n_layers=n) for n in range(1, MAX_MATCHED_LAYERS + 1)]
    else:
        step = c.n_heads * 2
        candidates = [
            with_model(variant, d_model=d)
            for d in range(step, MAX_MATCHED_WIDTH_RATIO * c.d_model + 1, step)
        ]
    nearest = min(candidates, key=lambda config: abs(size(config) - target)).resolve()
    if abs(size(nearest) - target) > MAX_MATCHED_ERROR * target:
        raise InputError(
            f"with --match parameters it has {size(nearest):,} parameters at best, and the "
            f"baseline {target:,}"
        )
    return nearest
