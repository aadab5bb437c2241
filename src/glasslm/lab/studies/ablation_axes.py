"""The axes of an ablation: what a variant changes, and what equals the baseline."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

from glasslm.config.conversion import from_dict, with_model
from glasslm.config.schema import RunConfig
from glasslm.errors import InputError
from glasslm.model.flops import flops_per_token
from glasslm.model.parameters import parameter_table

Match = Literal["tokens", "flops", "time", "parameters"]
MATCH_LABELS: dict[Match, str] = {
    "tokens": "equal tokens",
    "flops": "equal FLOPs",
    "time": "equal time",
    "parameters": "equal parameters",
}

MAX_MATCHED_LAYERS = 64
MAX_MATCHED_WIDTH_RATIO = 4


class Variant(NamedTuple):
    """The baseline with one thing changed."""

    axis: str
    value: str
    config: RunConfig

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


def _parse_choice(word: str, yes: str, no: str) -> bool:
    if word not in (yes, no):
        raise InputError(f"'{word}': expected {yes} or {no}")
    return word == yes


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
        _change_model(tie_embeddings=lambda word: _parse_choice(word, "tied", "untied")),
    ),
    "optimizer": Axis(
        ("adamw", "muon", "sgd"),
        _change_optimizer,
        "all at the same learning rate, unless --rates are given",
    ),
    "qk_norm": Axis(
        ("off", "on"), _change_model(qk_norm=lambda word: _parse_choice(word, "on", "off"))
    ),
    "dropout": Axis(("0", "0.1", "0.2"), _change_model(dropout=float)),
}


def variants(axes: Sequence[str], base: RunConfig) -> list[Variant]:
    """The variants of the axes, each "depth" or "depth=2/3/4", without the baseline's value.

    Raises InputError for an unknown axis, and for a given value that does not fit the baseline. One
    of the axis's own values that does not fit is skipped.
    """
    result = []
    for text in axes:
        name, equals_sign, words = text.partition("=")
        if name not in AXES:
            raise InputError(f"there is no axis '{name}': choose from {', '.join(AXES)}")
        axis = AXES[name]
        separator = "|" if "/" in axis.values[0] else "/"
        for word in words.split(separator) if equals_sign else axis.values:
            try:
                config = axis.change(base, word).resolve()
            except (InputError, ValueError) as error:
                if equals_sign:
                    raise InputError(f"--axes {name}={word}: {error}") from None
                continue
            if config != base.resolve():
                result.append(Variant(name, word, config))
    return result


def skipped_values(axes: Sequence[str], base: RunConfig) -> list[str]:
    """A message with the reason for each of the axes' own values that does not fit the base."""
    messages = []
    for name in axes:
        for word in AXES[name].values if name in AXES else ():
            try:
                AXES[name].change(base, word).resolve()
            except (InputError, ValueError) as error:
                messages.append(f"{name} {word} is left out: {error}")
    return messages


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
        return _with_max_steps(variant, round(base.train.max_steps * ratio))
    if match == "time":
        return _with_max_steps(
            variant, round(base.train.max_steps * step_seconds(base) / step_seconds(variant))
        )
    if match == "parameters":
        return _match_parameters(variant, base, vocab_size)
    return variant


def _with_max_steps(config: RunConfig, steps: int) -> RunConfig:
    return dataclasses.replace(
        config, train=dataclasses.replace(config.train, max_steps=max(1, steps))
    )


def _match_parameters(variant: RunConfig, base: RunConfig, vocab_size: int) -> RunConfig:
    """The variant with the baseline's number of parameters.

    Its width is changed, or its depth if the variant changes the width.
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
    return min(candidates, key=lambda config: abs(size(config) - target)).resolve()
