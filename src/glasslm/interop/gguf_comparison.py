"""Compare the logits of transformers and llama.cpp for a GGUF file with those of glasslm."""

from __future__ import annotations

import contextlib
import importlib
import io
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from glasslm.config.schema import ModelConfig
from glasslm.errors import InputError
from glasslm.interop import hf
from glasslm.interop.gguf_file import Quantization, architecture, llama_cpp_config
from glasslm.interop.model_export import ModelExport, largest_difference

Array = NDArray[Any]

LLAMA_CPP = "llama.cpp"

# The largest allowed difference of logits, as a share of the largest one. Measured were 1e-6 in 32
# bits, 1e-3 in 16 and 2e-2 in 8; a matrix in the wrong order gives 0.3 and more.
TOLERANCES: dict[Quantization, float] = {"f32": 1e-5, "f16": 5e-3, "q8_0": 1e-1}
# llama.cpp reads GELU from a table in half precision: 4e-4 was measured.
GELU_TABLE_TOLERANCE = 2e-3


@dataclass(frozen=True)
class LogitsComparison:
    """Logits (B, T, V) that another program computes from a file, and those of glasslm."""

    reader: str
    ours: Array
    theirs: Array
    same_tokens: bool | None = (
        None  # whether a text has the same tokens; None where this was not checked
    )

    @property
    def largest_difference(self) -> float:
        """The largest difference, as a share of the largest logit of glasslm."""
        return largest_difference(self.ours, self.theirs)

    @property
    def median_difference(self) -> float:
        """The largest difference at the median position, as a share of the largest logit.

        With 8 bits a router may choose another expert; the logits of these few positions differ by
        far more.
        """
        differences = np.abs(self.ours - self.theirs).max(axis=-1)
        return float(np.nan_to_num(np.median(differences) / np.abs(self.ours).max(), nan=np.inf))

    @property
    def kl_divergence(self) -> float:
        """The mean of KL(ours || theirs) over all positions, in nats per token."""
        from scipy.special import log_softmax

        ours, theirs = (
            log_softmax(logits.astype(np.float64), axis=-1) for logits in (self.ours, self.theirs)
        )
        return float((np.exp(ours) * (ours - theirs)).sum(axis=-1).mean())

    def is_close(self, c: ModelConfig, quantization: Quantization) -> bool:
        """Whether the file holds the model, up to the rounding of its quantization."""
        difference, bound = self.median_difference, TOLERANCES[quantization]
        if quantization == "f32":
            difference = self.largest_difference
            if self.reader == LLAMA_CPP and not c.is_gated:
                bound = GELU_TABLE_TOLERANCE
        return difference <= bound and self.same_tokens is not False


def compare_readers(
    export: ModelExport, path: Path, quantization: Quantization
) -> Iterator[LogitsComparison]:
    """A comparison for each installed program that reads all of a file just written."""
    tokens = export.probe_tokens()
    ours = export.logits(tokens)
    has_transformers = all(map(find_spec, ("torch", "transformers", "accelerate")))
    if has_transformers and not transformers_misreading(export.config):
        yield LogitsComparison("transformers", ours, logits_by_transformers(path, tokens))
    if find_spec("llama_cpp"):
        text = export.tokenizer.decode(tokens[0])
        same = ids_by_llama_cpp(path, text) == export.tokenizer.encode(text).tolist()
        yield LogitsComparison(LLAMA_CPP, ours, logits_by_llama_cpp(path, tokens), same)


def transformers_misreading(c: ModelConfig) -> str:
    """The other model that transformers makes of the model's GGUF file; empty for the same model.

    Version 5 of transformers reads some keys of the file and takes defaults for the others. `export
    --to hf` writes all of them.
    """
    c = llama_cpp_config(c)
    match architecture(c):
        case "llama" if c.n_experts:
            return "a Llama without experts"
        case "llama" if c.bias:
            return "a model without biases"
        case "llama" | "qwen3" | "qwen3moe" if c.rope_scaling == "linear":
            return "a model without rope scaling"
        case "qwen3" if c.head_size != 128:
            return "a model with a head size of 128"
        case "qwen3moe" if c.d_ff != 768:
            return "a model with experts of width 768"
        case "gpt2" if c.block_size != 1024:
            return "a model with a context of 1,024 tokens"
        case "gpt2" if c.d_ff != 4 * c.d_model:
            return "a model with a feed-forward of width 4 d_model"
    return ""


def logits_by_transformers(path: Path, tokens: NDArray[np.int64]) -> Array:
    """tokens (B, T) -> logits (B, T, V) in float32, computed by transformers from the file.

    Raises InputError where transformers, PyTorch or accelerate is not installed.
    """
    try:
        importlib.import_module("accelerate")  # transformers' reader of GGUF needs it
    except ImportError as error:
        raise InputError(f"{error.name} is not installed: pip install 'glasslm[interop]'") from None
    return hf.model_logits(hf.load_model(path.parent, gguf_file=path.name), tokens)


def logits_by_llama_cpp(path: Path, tokens: NDArray[np.int64]) -> Array:
    """tokens (B, T) -> logits (B, T, V), computed by llama.cpp from the file.

    Keys and values are cached in float32. Raises InputError where llama-cpp-python is not
    installed.
    """
    model = _load_llama_cpp(path, n_ctx=tokens.shape[1])
    logits = []
    for row in tokens.tolist():
        model.reset()
        model.eval(row)
        logits.append(np.array(model.scores[: len(row)]))
    model.close()
    return np.stack(logits)


def ids_by_llama_cpp(path: Path, text: str) -> list[int]:
    """The token ids of `text` by llama.cpp with the tokenizer of the file."""
    model = _load_llama_cpp(path, vocab_only=True)
    ids: list[int] = model.tokenize(text.encode(), add_bos=True, special=False)
    model.close()
    return ids


def _load_llama_cpp(path: Path, **settings: Any) -> Any:
    try:
        import llama_cpp as library  # not among the extras: it is compiled at installation
    except ImportError:
        raise InputError("llama.cpp is not installed: pip install llama-cpp-python") from None
    settings |= {
        "type_k": library.GGML_TYPE_F32,
        "type_v": library.GGML_TYPE_F32,
        "flash_attn": False,
    }
    # llama.cpp makes room for at least 256 tokens, and warns that this is more than n_ctx.
    with contextlib.redirect_stderr(io.StringIO()):
        return library.Llama(str(path), logits_all=True, n_gpu_layers=0, verbose=False, **settings)
