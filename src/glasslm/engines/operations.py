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

import dataclasses
import inspect
import re
from dataclasses import dataclass
from difflib import SequenceMatcher
from pathlib import Path

from glasslm.config.schema import OperationsConfig, RunConfig
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


# The files that this process has run, by SHA-256: those that the user named, and no other. Engines
# take their operations from here, so that the code in a foreign run.json is never run unasked.
_admitted: dict[str, OperationsFile] = {}


def admit_operations(config: RunConfig) -> RunConfig:
    """`config` with the hash of its --ops FILE, after that file was read and run.

    A config without a file, or with a hash (of a recorded run), is returned as it is.
    """
    if config.operations.is_resolved:
        return config
    operations = read_operations(config.operations.ops)
    return dataclasses.replace(config, operations=admit(operations))


def reopen_operations(config: RunConfig) -> None:
    """Read the --ops FILE of a study again, for one of its runs; InputError if it has changed."""
    named = config.operations
    if not named.ops or named.ops_sha256 in _admitted:
        return
    operations = read_operations(named.ops)
    if operations.file.sha256 != named.ops_sha256:
        raise InputError(
            f"{named.ops} has changed since the study began: its sha256 is "
            f"{operations.file.sha256[:12]}, expected {named.ops_sha256[:12]}: put it back, or "
            "start a new study"
        )
    admit(operations)


def admit(operations: OperationsFile) -> OperationsConfig:
    """Let the engines of this process compute with the operations of a file."""
    _admitted[operations.file.sha256] = operations
    return OperationsConfig(operations.file.name, operations.file.sha256)


def find_operations(config: RunConfig) -> OperationsFile | None:
    """The operations that a config names; None if it names none.

    Raises InputError where the user has not let this code in, and where a path of the model that
    this config uses cannot compute with an operation of the file.
    """
    named = config.operations
    if not named.ops:
        return None
    operations = _admitted.get(named.ops_sha256)
    if operations is None:
        raise InputError(
            f"this model computes with operations of {named.ops} (sha256 {named.ops_sha256[:12]}), "
            "and code of a run is not executed unasked: give --ops FILE with this file, or --ops "
            "recorded to run its text from run.json. A command without --ops cannot use this model"
        )
    require_support(operations, config)
    return operations


def uses(config: RunConfig) -> dict[str, str]:
    """How the model of a config comes to use each operation that it does not use; else ""."""
    c, optimizer = config.model, config.optimizer.optimizer
    feedforward = {"silu": ("swiglu",), "gelu": ("gelu", "geglu"), "relu": ("relu",),
                   "relu2": ("relu2",)}  # fmt: skip
    cures = {
        name: "" if c.feedforward in kinds else f"--feedforward {kinds[0]}"
        for name, kinds in feedforward.items()
    }
    cures["rms_norm"] = "" if c.norm == "rmsnorm" or c.qk_norm else "--norm rmsnorm"
    cures["layer_norm"] = "" if c.norm == "layernorm" else "--norm layernorm"
    cures["rope"] = "" if c.position == "rope" else "--position rope"
    cures["adamw"] = "" if optimizer in ("adamw", "muon") else "--optimizer adamw"
    cures |= {name: "" if optimizer == name else f"--optimizer {name}" for name in ("muon", "sgd")}
    return dict.fromkeys(SIGNATURES, "") | cures


def unused_operations(operations: OperationsFile, config: RunConfig) -> list[str]:
    """A sentence for each operation of a file that the model does not use, with the cure.

    Raises InputError if the model uses none of them.
    """
    cures = {name: cure for name, cure in uses(config).items() if name in operations.functions}
    sentences = [
        f"{name} is not used by this model: use {cure}" for name, cure in cures.items() if cure
    ]
    if "attention" in cures and "softmax" in cures:
        sentences.append("softmax is not used, because attention is replaced as a whole")
    if cures and all(cures.values()):
        raise InputError(f"{operations.file.name}: {'; '.join(sentences)}")
    return sentences


def require_support(operations: OperationsFile, config: RunConfig) -> None:
    """Raise InputError where a setting needs more of an operation than its signature says."""
    c = config.model
    settings = {
        f"--window {c.window}": ("attention",) if c.window else (),
        "--attention-softcap": ("attention", "softmax") if c.attention_softcap else (),
        "--position alibi": ("attention",) if c.position == "alibi" else (),
        "--attention-dropout": ("attention",) if c.attention_dropout else (),
        "--document-attention": ("attention",) if c.document_attention else (),
        "--attention flash": ("attention", "softmax") if c.attention == "flash" else (),
        "--n-experts, whose router has its own": ("softmax",) if c.n_experts else (),
        "--lora-rank": ("linear",) if c.lora_rank else (),
    }
    for setting, names in settings.items():
        for name in names:
            if name in operations.functions:
                raise InputError(
                    f"{operations.file.name}: {name} cannot be replaced with {setting}: "
                    f"{SIGNATURES[name].format(name)} does not express it. Leave one of them out"
                )


def describe_operations(operations: OperationsFile) -> str:
    """The operations of a file for people: "rms_norm, silu from own.py (sha256 0123456789ab)"."""
    file = operations.file
    return f"{', '.join(operations.functions)} from {file.name} (sha256 {file.sha256[:12]})"


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


def takes_new(function: Function) -> bool:
    """Whether a function has a parameter `new`, which gets an allocator: new(shape)."""
    try:
        return "new" in inspect.signature(function).parameters
    except (TypeError, ValueError):
        return False


def _require_signature(file: LearnerFile, name: str, function: Function) -> None:
    """Raise InputError unless the engines can call a function as the operation `name`."""
    expected = SIGNATURES[name]
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):
        return  # a callable without a signature: its first call shows whether it fits
    settings = dict.fromkeys([*expected.settings, *(["new"] if takes_new(function) else [])])
    try:
        signature.bind(*expected.inputs, **settings)
    except TypeError as error:
        raise InputError(
            f"{file.name}, line {file.first_line(function)}: {name}{signature} cannot be called as "
            f"{expected.format(name)} ({error}): give it these parameters"
        ) from None
