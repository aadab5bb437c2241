"""The axes of an ablation: what is varied, one thing at a time, and what is held equal meanwhile."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

from glasslm.config.conversion import from_dict, to_dict
from glasslm.config.schema import ModelConfig, RunConfig
from glasslm.errors import InputError
from glasslm.model.flops import flops_per_token
from glasslm.model.parameters import parameter_table

Match = Literal["tokens", "flops", "time", "parameters"]


class Variant(NamedTuple):
    """The baseline with one thing changed."""

    axis: str
    value: str
    config: RunConfig

    @property
    def name(self) -> str:
        return f"{self.axis}-{self.value}".replace("/", "-")


class Axis(NamedTuple):
    """Values as words, and what each of them makes of a baseline."""

    values: tuple[str, ...]
    change: Callable[[RunConfig, str], RunConfig]
    note: str = ""  # what else has to change with it


def _model(**named: Callable[[str], Any] | str) -> Callable[[RunConfig, str], RunConfig]:
    """A change of fields of the model: each by a function of the value's word, or to a fixed word."""

    def change(base: RunConfig, word: str) -> RunConfig:
        changes = {name: of if isinstance(of, str) else of(word) for name, of in named.items()}
        return with_model(base, **changes)

    return change


def with_model(base: RunConfig, **changes: Any) -> RunConfig:
    """`base` with other fields of the model; derived sizes (d_ff, n_kv_heads) are derived again."""
    c = base.model
    derived = {
        "d_ff": 0 if c.resolved().d_ff == dataclasses.replace(c, d_ff=0).resolved().d_ff else c.d_ff
    }
    derived["n_kv_heads"] = 0 if c.n_kv_heads in (0, c.n_heads) else c.n_kv_heads
    model = from_dict(ModelConfig, to_dict(c) | derived | changes)
    return dataclasses.replace(base, model=model)


def _width(base: RunConfig, word: str) -> RunConfig:
    d_model, size = int(word), base.model.head_size
    if d_model % size:
        raise InputError(
            f"width {d_model} is no multiple of the head size {size}, which this axis keeps"
        )
    return with_model(base, d_model=d_model, n_heads=d_model // size)


def _norm(base: RunConfig, word: str) -> RunConfig:
    norm, _, position = word.partition("/")
    return with_model(base, norm=norm, norm_position=position or base.model.norm_position)


def _optimizer(base: RunConfig, word: str) -> RunConfig:
    changed = from_dict(
        type(base.optimizer), dataclasses.asdict(base.optimizer) | {"optimizer": word}
    )
    return dataclasses.replace(base, optimizer=changed)


AXES: dict[str, Axis] = {
    "depth": Axis(("2", "4", "6", "8", "12"), _model(n_layers=int)),
    "width": Axis(("64", "128", "256", "384", "512"), _width, "the size of a head stays, so their number changes"),
    "heads": Axis(("1", "2", "4", "6", "8"), _model(n_heads=int), "the width stays, so the size of a head changes"),
    "activation": Axis(("relu", "gelu", "swiglu"), _model(feedforward=str), "a gated one is 8/3 wide instead of 4"),
    "norm": Axis(("layernorm/pre", "layernorm/post", "rmsnorm/pre", "rmsnorm/post"), _norm),
    "position": Axis(("none", "sinusoidal", "learned", "rope", "alibi"), _model(position=str)),
    "tying": Axis(("tied", "untied"), _model(tie_embeddings=lambda word: _one_of(word, "tied", "untied"))),
    "optimizer": Axis(("adamw", "muon", "sgd"), _optimizer, "at the same rate, unless --rates are given"),
    "qk_norm": Axis(("off", "on"), _model(qk_norm=lambda word: _one_of(word, "on", "off"))),
    "dropout": Axis(("0", "0.1", "0.2"), _model(dropout=float)),
}  # fmt: skip


def _one_of(word: str, yes: str, no: str) -> bool:
    if word not in (yes, no):
        raise InputError(f"'{word}': expected {yes} or {no}")
    return word == yes


def variants(asked: Sequence[str], base: RunConfig) -> list[Variant]:
    """The variants of some axes, each "depth" or "depth=2/3/4"; a value that is the baseline's own is left out.

    Raises InputError for an unknown axis, and for a value that does not go together with the baseline unless it is one
    of the axis's own, which is then left out.
    """
    found = []
    for text in asked:
        name, given, words = text.partition("=")
        if name not in AXES:
            raise InputError(f"there is no axis '{name}': choose from {', '.join(AXES)}")
        axis = AXES[name]
        separator = "|" if "/" in axis.values[0] else "/"
        for word in words.split(separator) if given else axis.values:
            try:
                config = axis.change(base, word).resolved()
            except (InputError, ValueError) as error:
                if given:
                    raise InputError(f"--axes {name}={word}: {error}") from None
                continue
            if config != base.resolved():
                found.append(Variant(name, word, config))
    return found


def left_out(asked: Sequence[str], base: RunConfig) -> list[str]:
    """A line for each of the axes' own values that does not go together with the baseline, with the reason."""
    found = []
    for name in asked:
        for word in AXES[name].values if name in AXES else ():
            try:
                AXES[name].change(base, word).resolved()
            except (InputError, ValueError) as error:
                found.append(f"{name} {word} is left out: {error}")
    return found


def matched(
    variant: RunConfig,
    base: RunConfig,
    match: Match,
    vocab_size: int,
    pace: Callable[[RunConfig], float],
) -> RunConfig:
    """The variant with as many tokens, FLOPs, seconds (by `pace`, of a step), or parameters as the baseline has."""
    if match == "flops":
        ratio = flops_per_token(base.model, vocab_size) / flops_per_token(variant.model, vocab_size)
        return _with_steps(variant, round(base.train.max_steps * ratio))
    if match == "time":
        return _with_steps(variant, round(base.train.max_steps * pace(base) / pace(variant)))
    if match == "parameters":
        return _as_large(variant, base, vocab_size)
    return variant


def _with_steps(config: RunConfig, steps: int) -> RunConfig:
    return dataclasses.replace(
        config, train=dataclasses.replace(config.train, max_steps=max(1, steps))
    )


def _as_large(variant: RunConfig, base: RunConfig, vocab_size: int) -> RunConfig:
    """Made as large as the baseline by its width, or by its depth where the width is what varies."""

    def size(config: RunConfig) -> int:
        return parameter_table(config.model.resolved(), vocab_size).total

    wanted, c = size(base), variant.model
    if c.d_model != base.model.d_model:
        tried = [with_model(variant, n_layers=n) for n in range(1, 65)]
    else:
        step = c.n_heads * 2
        tried = [with_model(variant, d_model=d) for d in range(step, 4 * c.d_model + 1, step)]
    return min(tried, key=lambda config: abs(size(config) - wanted)).resolved()
