"""Updates of weights in place, clipping of gradients, and learning rates."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar, get_args

import numpy as np

from glasslm.config.schema import OptimizerConfig
from glasslm.config.training_config import ScheduleName
from glasslm.engines.numpy import optimizer
from glasslm.engines.numpy.ops import Array
from glasslm.engines.numpy.optimizer import ADAM_EPS
from glasslm.errors import DivergedError, InputError, require
from glasslm.ops.arguments import (
    as_array,
    read_arrays,
    require_count,
    require_floats,
    require_number,
)
from glasslm.training.learning_rate import lr_at

Gradients = TypeVar("Gradients", bound=Array | Sequence[Any] | Mapping[str, Any])


def adamw(
    p: Array,
    g: Any,
    m: Array,
    v: Array,
    *,
    t: int,
    lr: float,
    decay: float = 0.0,
    betas: tuple[float, float] = (0.9, 0.95),
    eps: float = ADAM_EPS,
) -> None:
    """One update of p by AdamW, in place. arXiv:1711.05101, algorithm 2.

    m = b1 m + (1 - b1) g, v = b2 v + (1 - b2) g², and p = (1 - lr decay) p - lr (m / (1 - b1^t)) /
    (sqrt(v / (1 - b2^t)) + eps).

    Args:
        p: The weight, any shape. It is overwritten.
        g: Its gradient, of the same shape.
        m: The first moment, of the same shape, zeros before update 1. It is overwritten.
        v: The second moment, likewise.
        t: The number of the update, from 1.
        lr: The learning rate.
        decay: Decoupled weight decay.
        betas: The decay rates b1 and b2 of the moments.
        eps: Added to the denominator.

    Raises:
        InputError: A shape or type differs from that of p, p, m or v cannot be overwritten or share
            memory, or a number is out of its range.
    """
    gradient = _read_update(g, p=p, m=m, v=v)
    _require_rates(lr, decay)
    require_count("t", t)
    require(as_array("betas", betas).shape == (2,), "betas", betas, "a pair, such as (0.9, 0.95)")
    for beta in betas:
        require_number("each of betas", beta, lambda x: 0 <= x < 1, "at least 0 and below 1")
    require_number("eps", eps, lambda x: 0 < x < math.inf, "above 0 and finite")
    optimizer.adamw(
        p,
        gradient,
        m,
        v,
        t=int(t),
        lr=float(lr),
        decay=float(decay),
        betas=(float(betas[0]), float(betas[1])),
        scale=1.0,
        eps=float(eps),
    )


def sgd(
    p: Array, g: Any, m: Array, *, lr: float, decay: float = 0.0, momentum: float = 0.95
) -> None:
    """One update of p by SGD with momentum, in place.

    m = momentum m + g, and p = (1 - lr decay) p - lr m. p, g and m have the same shape (any); m is
    zeros before the first update. p and m are overwritten. Raises InputError as `adamw` does.
    """
    gradient = _read_update(g, p=p, m=m)
    _require_rates(lr, decay, momentum)
    optimizer.sgd(p, gradient, m, lr=float(lr), decay=float(decay), momentum=momentum, scale=1.0)


def muon(
    p: Array, g: Any, m: Array, *, lr: float, decay: float = 0.0, momentum: float = 0.95
) -> None:
    """One update of a matrix p (O, I) by Muon, in place: momentum with all singular values near 1.

    p, g and m have the same shape; m is zeros before the first update. p and m are overwritten. The
    root mean square of the update is about 0.2 lr, that of AdamW. arXiv:2502.16982, equation 4.
    Raises InputError as `adamw` does, and for arrays that are not matrices.
    """
    gradient = _read_update(g, p=p, m=m)
    _require_rates(lr, decay, momentum)
    if p.ndim != 2:
        raise InputError(
            f"p has the shape {p.shape}: expected a matrix (O, I); update vectors with adamw"
        )
    optimizer.muon(p, gradient, m, lr=float(lr), decay=float(decay), momentum=momentum, scale=1.0)


def _require_rates(lr: float, decay: float, momentum: float = 0.0) -> None:
    require_number("lr", lr, lambda x: 0 <= x < math.inf, "0 or more, and finite")
    require_number("decay", decay, lambda x: 0 <= x < math.inf, "0 or more, and finite")
    require_number("momentum", momentum, lambda x: 0 <= x < 1, "at least 0 and below 1")


def _read_update(g: Any, **overwritten: Array) -> Array:
    """A copy of the gradient, of the shape and type of the arrays that an update overwrites."""
    (gradient,) = read_arrays(g=(g, "..."))
    arrays = list(overwritten.items())
    for name, array in arrays:
        if not isinstance(array, np.ndarray):
            raise InputError(
                f"{name} is {type(array).__name__}: expected an array of float32 or float64, which "
                f"is updated in place; give np.array({name}, np.float32)"
            )
        require_floats(name, array)
        if array.shape != gradient.shape or array.dtype != gradient.dtype:
            raise InputError(
                f"{name} is {array.dtype} {array.shape} and g is {gradient.dtype} {gradient.shape}:"
                f" expected one shape and type; give np.zeros_like(p) as the first {name}"
                if name != "p"
                else f"g is {gradient.dtype} {gradient.shape} and p is {array.dtype} "
                f"{array.shape}: expected one shape and type, those of the weight"
            )
        if not array.flags.writeable:
            raise InputError(f"{name} is read-only, but is updated in place: give {name}.copy()")
    for index, (name, array) in enumerate(arrays):
        for other, earlier in arrays[:index]:
            if np.shares_memory(array, earlier):
                raise InputError(
                    f"{name} and {other} share memory, but each is updated in place: give "
                    f"{name} an array of its own, such as np.zeros_like(p)"
                )
    return gradient


def clip_by_norm(gradients: Gradients, max_norm: float) -> tuple[Gradients, float]:
    """Scale gradients together, so that their global norm is at most max_norm. arXiv:1211.5063.

    gradients: an array, a list or a dictionary of arrays of any shape -> the same with new arrays,
    and the norm before clipping. Raises InputError unless max_norm is above 0, and DivergedError
    for a norm that is not finite.

    >>> clipped, norm = clip_by_norm({"w": np.array([3.0]), "b": np.array([4.0])}, 2.5)
    >>> float(clipped["w"].sum()), norm
    (1.5, 5.0)
    """
    require_number("max_norm", max_norm, lambda x: 0 < x < math.inf, "above 0 and finite")
    squares: list[float] = []

    def add_square(g: Array) -> Array:
        flat = g.reshape(-1).astype(np.float64)
        squares.append(float(np.vdot(flat, flat)))
        return g

    copies = _map_arrays(gradients, add_square)
    norm = math.sqrt(math.fsum(squares))
    if not math.isfinite(norm):
        raise DivergedError(
            f"the norm of the gradients is {norm}: expected a finite number; skip this update, or "
            "lower the learning rate"
        )
    scale = min(1.0, max_norm / norm) if norm else 1.0
    return _map_arrays(copies, lambda g: np.multiply(g, scale, out=g)), norm


def clip_by_value(gradients: Gradients, max_value: float) -> Gradients:
    """Limit each entry of gradients to the range from -max_value to max_value.

    gradients: an array, a list or a dictionary of arrays of any shape -> the same with new arrays.
    Raises InputError unless max_value is above 0, and DivergedError for nan.
    """
    require_number("max_value", max_value, lambda x: 0 < x < math.inf, "above 0 and finite")

    def clip(g: Array) -> Array:
        if np.isnan(g).any():
            raise DivergedError(
                f"gradients hold nan, in an array with the shape {g.shape}: expected numbers; skip "
                "this update, or lower the learning rate"
            )
        return np.clip(g, -max_value, max_value, out=g)

    return _map_arrays(gradients, clip)


def _map_arrays(gradients: Any, function: Callable[[Array], Array]) -> Any:
    """function(copy) of an array, or of each in a list, tuple or dictionary.

    `function` may overwrite the copy.
    """
    if isinstance(gradients, Mapping):
        return {
            name: function(read_arrays(**{f"gradients[{name!r}]": (g, "...")})[0])
            for name, g in gradients.items()
        }
    if isinstance(gradients, (list, tuple)):
        return type(gradients)(
            [
                function(read_arrays(**{f"gradients[{index}]": (g, "...")})[0])
                for index, g in enumerate(gradients)
            ]
        )
    return function(read_arrays(gradients=(gradients, "..."))[0])


def learning_rate(
    step: int,
    max_steps: int,
    *,
    lr: float,
    min_lr: float = 0.0,
    warmup_steps: int = 0,
    schedule: ScheduleName = "cosine",
) -> float:
    """The learning rate of update `step`, 0 to max_steps - 1, as `glasslm train` computes it.

    A linear warmup, lr (step + 1) / warmup_steps, is at most half of max_steps long. Then the
    schedule "cosine" or "wsd" (flat, with a linear fall over the last fifth) ends at min_lr;
    "constant" stays at lr. Raises InputError for a number out of its range.
    """
    require_count("step", step, 0)
    require_count("max_steps", max_steps)
    schedules = get_args(ScheduleName)
    is_known = isinstance(schedule, str) and schedule in schedules
    require(is_known, "schedule", schedule, f"one of {', '.join(schedules)}")
    _require_rates(lr, 0.0)
    require_number("min_lr", min_lr, lambda x: 0 <= x < math.inf, "0 or more, and finite")
    require_count("warmup_steps", warmup_steps, 0)
    config = OptimizerConfig(lr=lr, min_lr=min_lr, warmup_steps=warmup_steps, schedule=schedule)
    return lr_at(step, config, max_steps)


def step_decay(
    step: int, *, lr: float, every: int, factor: float = 0.1, warmup_steps: int = 0
) -> float:
    """The learning rate of update `step`, from 0, by a step schedule: lr factor^(step // every).

    With warmup_steps, the first updates have lr (step + 1) / warmup_steps at most. Raises
    InputError unless every >= 1, 0 < factor <= 1 and lr >= 0.

    >>> step_decay(5, lr=1.0, every=2, factor=0.5)
    0.25
    """
    require_count("step", step, 0)
    require_count("every", every)
    _require_rates(lr, 0.0)
    require_number("factor", factor, lambda x: 0 < x <= 1, "above 0 and at most 1")
    require_count("warmup_steps", warmup_steps, 0)
    warmup = min(1.0, (step + 1) / warmup_steps) if warmup_steps else 1.0
    return lr * warmup * factor ** (step // every)
