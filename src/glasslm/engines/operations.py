"""Operations of the engines that a file may replace: their names, signatures and reader.

A file given as --ops FILE defines functions named like these operations. Each takes the arrays of
its signature and returns `output, backward`; backward(gradient of the output) returns the gradients
of the arrays, in their order. In a file that imports torch, the functions take tensors and may
return only the output: autograd computes their gradients. A parameter `new` is optional: it gets
the engine's allocator, new(shape).

Letters: N tokens, D width, I and O input and output of a matrix, V vocabulary; B rows, T positions,
H query heads, K key-value heads, Q head size.
"""

from __future__ import annotations

import inspect
import re
from dataclasses import dataclass
from difflib import SequenceMatcher
from pathlib import Path

from glasslm.engines.learner_file import Function, LearnerFile, read_learner_file, run_text
from glasslm.errors import InputError

MIN_SIMILARITY = 0.8  # of a name to that of an operation, from which on it counts as misspelt


@dataclass(frozen=True)
class Signature:
    """How the engines call an operation: `name(*inputs, **settings)`."""

    inputs: tuple[str, ...]
    settings: tuple[str, ...] = ()
    gradients: tuple[str, ...] = ()  # that backward returns; none: the operation works in place

    def format(self, name: str) -> str:
        """The first line of a function with this signature.

        >>> SIGNATURES["rms_norm"].format("rms_norm")
        'rms_norm(x, gain, eps)'
        """
        star = ("*",) if not self.gradients else ()
        return f"{name}({', '.join((*self.inputs, *star, *self.settings))})"


SIGNATURES: dict[str, Signature] = {
    # tokens (N,), table (V, D) -> (N, D)
    "embedding": Signature(("tokens", "table"), gradients=("dtable",)),
    # x (N, I), w (O, I) -> (N, O)
    "linear": Signature(("x", "w"), gradients=("dx", "dw")),
    # x (N, D), gain and bias (D,) -> (N, D)
    "rms_norm": Signature(("x", "gain"), ("eps",), ("dx", "dgain")),
    "layer_norm": Signature(("x", "gain", "bias"), ("eps",), ("dx", "dgain", "dbias")),
    # x (any shape) -> the same shape; softmax over the last axis
    "silu": Signature(("x",), gradients=("dx",)),
    "gelu": Signature(("x",), gradients=("dx",)),
    "relu": Signature(("x",), gradients=("dx",)),
    "relu2": Signature(("x",), gradients=("dx",)),
    "softmax": Signature(("x",), gradients=("dx",)),
    # x (B, T, H, Q), cos and sin (T, Q / 2) -> (B, T, H, Q), the halves of a head rotated
    "rope": Signature(("x", "cos", "sin"), gradients=("dx",)),
    # q (B, T, H, Q), k and v (B, T, K, Q) -> (B, T, H, Q), causal, scores / sqrt(Q)
    "attention": Signature(("q", "k", "v"), gradients=("dq", "dk", "dv")),
    # logits (N, V), targets (N,) -> nats (N,); backward(weight) returns the gradient of
    # weight x their sum
    "cross_entropy": Signature(("logits", "targets"), gradients=("dlogits",)),
    # One weight p, its gradient g and moments, of one shape, are updated in place.
    "adamw": Signature(("p", "g", "m", "v"), ("t", "lr", "decay", "betas", "eps")),
    "muon": Signature(("p", "g", "m"), ("lr", "decay", "momentum")),
    "sgd": Signature(("p", "g", "m"), ("lr", "decay", "momentum")),
}


@dataclass(frozen=True)
class OperationsFile:
    """The operations of a learner's file, by name."""

    file: LearnerFile
    functions: dict[str, Function]

    @property
    def uses_torch(self) -> bool:
        """Whether its functions take tensors: the file imports torch."""
        return "torch" in self.file.imports


def read_operations(path: Path | str) -> OperationsFile:
    """The operations of a Python file, which is run once.

    Raises InputError, in one line, where the file cannot be run, defines no operation, misspells
    the name of one, or gives one another signature.
    """
    return _select_operations(read_learner_file(path))


def operations_from_text(text: str, name: str, sha256: str) -> OperationsFile:
    """The operations of the text of a file, as run.json records it. Running it runs its code."""
    return _select_operations(run_text(text, name, sha256))


def _select_operations(file: LearnerFile) -> OperationsFile:
    functions = {name: file.functions[name] for name in SIGNATURES if name in file.functions}
    for name, function in file.functions.items():
        if name in functions:
            _require_signature(file, name, function)
        elif (operation := suggest_operation(name)) and operation not in functions:
            raise InputError(
                f"{file.name}, line {file.first_line(function)}: '{name}' is not an operation: did "
                f"you mean '{operation}'? Begin the name of a helper function with _"
            )
    if not functions:
        raise InputError(
            f"{file.name} defines no operation: expected a function with one of the names "
            f"{', '.join(SIGNATURES)}"
        )
    return OperationsFile(file, functions)


def suggest_operation(name: str) -> str | None:
    """The operation whose name is probably misspelt as `name`; None for any other name.

    >>> suggest_operation("RMSNorm"), suggest_operation("rms_nrom"), suggest_operation("sigmoid")
    ('rms_norm', 'rms_norm', None)
    """
    if name.startswith("_"):
        return None

    def similarity(operation: str) -> float:
        letters, known = (re.sub("[^a-z0-9]", "", word.lower()) for word in (name, operation))
        return SequenceMatcher(None, letters, known).ratio()

    best = max(SIGNATURES, key=similarity)
    return best if similarity(best) >= MIN_SIMILARITY else None


def _require_signature(file: LearnerFile, name: str, function: Function) -> None:
    """Raise InputError unless the engines can call a function as the operation `name`."""
    expected = SIGNATURES[name]
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):
        return  # a callable without a signature: its first call shows whether it fits
    settings = dict.fromkeys(
        [*expected.settings, *(["new"] if "new" in signature.parameters else [])]
    )
    try:
        signature.bind(*expected.inputs, **settings)
    except TypeError as error:
        raise InputError(
            f"{file.name}, line {file.first_line(function)}: {name}{signature} cannot be called as "
            f"{expected.format(name)} ({error}): give it these parameters"
        ) from None
