"""What counts as evidence that a submission does something else than compute its answer."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

FlagKind = Literal[
    "library",
    "checker",
    "file",
    "program",
    "network",
    "memory",
    "patch",
    "survives",
    "random",
    "environment",
    "text_as_code",
    "remembered",
    "near_copy",
]

SENTENCES: dict[FlagKind, str] = {
    "library": "uses a library that has the answer",
    "checker": "looks at the checker, at frames or at objects of other code",
    "file": "opens, lists or changes files",
    "program": "starts another program or process",
    "network": "uses the network",
    "memory": "reads or writes memory through ctypes",
    "patch": "replaces functions of NumPy or Python",
    "survives": "leaves a thread or a function for the end of the process",
    "random": "sets the seed of NumPy's shared generator",
    "environment": "reads the environment of the process",
    "text_as_code": "runs text as code",
    "remembered": "returns remembered values",
    "near_copy": "is nearly the same as another submission",
}

# Libraries that compute the operations of the exercises, or their gradients.
ANSWER_LIBRARIES = frozenset(
    ("glasslm", "torch", "torchvision", "jax", "jaxlib", "flax", "optax", "equinox", "tensorflow",
     "keras", "tinygrad", "mlx", "mxnet", "paddle", "theano", "pytensor", "autograd", "cupy",
     "chainer", "dynet", "transformers", "sklearn", "tokenizers", "tiktoken", "sentencepiece",
     "onnxruntime", "numba", "micrograd", "haiku", "trax", "minbpe", "casadi", "aesara")
)  # fmt: skip
# Modules that lead to the interpreter's frames, objects and memory, or out of the process.
MODULE_KINDS: dict[str, FlagKind] = {
    **dict.fromkeys(ANSWER_LIBRARIES, "library"),
    **dict.fromkeys(
        ("inspect", "gc", "bdb", "pdb", "signal", "resource", "faulthandler"), "checker"
    ),
    **dict.fromkeys(("ctypes", "_ctypes", "cffi", "mmap"), "memory"),
    **dict.fromkeys(("subprocess", "multiprocessing", "pty", "_posixsubprocess"), "program"),
    **dict.fromkeys(("concurrent", "threading", "_thread", "atexit", "asyncio"), "survives"),
    **dict.fromkeys(
        ("socket", "_socket", "urllib", "http", "requests", "ftplib", "smtplib", "ssl"), "network"
    ),
    **dict.fromkeys(("code", "codeop", "runpy"), "text_as_code"),
    **dict.fromkeys(("hashlib", "_md5", "_sha1", "_sha256", "zlib", "pickle"), "remembered"),
    **dict.fromkeys(("shutil", "tempfile", "glob", "sqlite3", "dbm", "shelve"), "file"),
}


@dataclass(frozen=True, order=True)
class Flag:
    """Something in a submission that a teacher should look at, with its evidence.

    Args:
        kind: What it is; SENTENCES has its meaning.
        line: The line of the submission; 0 where none can be named.
        detail: What was done, as in "import torch".
        text: The text of the line.
    """

    kind: FlagKind
    line: int
    detail: str
    text: str = ""

    def to_json(self) -> dict[str, Any]:
        """The fields as JSON types."""
        return asdict(self)

    def __str__(self) -> str:
        place = f"line {self.line}: " if self.line else ""
        return f"{SENTENCES[self.kind]}: {place}{self.detail}"


def module_kind(name: str) -> FlagKind | None:
    """The kind of flag for the import of a module, by its first name; None for an ordinary one.

    >>> module_kind("torch.nn.functional"), module_kind("math")
    ('library', None)
    """
    return MODULE_KINDS.get(name.partition(".")[0])
