"""GGUF, the one file that llama.cpp reads: the architecture's numbers, the tokenizer, and weights in 32, 16 or 8 bits.

llama.cpp computes fewer variants than transformers: what it would compute otherwise is refused. Matrices are (out, in)
as here, norms and biases stay in 32 bits, and a tied head is left out.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import io
import re
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from glasslm import files
from glasslm.config.schema import ModelConfig
from glasslm.errors import InputError
from glasslm.files import Chunk
from glasslm.interop import families, gguf_vocabulary, hf, llama
from glasslm.interop.gguf_vocabulary import Vocabulary
from glasslm.interop.model_export import Leaving, largest_difference

Array = NDArray[Any]
Kind = Literal["f32", "f16", "q8_0"]

LLAMA_CPP = "llama.cpp"

BLOCK = 32  # neighbours in a row that share a scale in q8_0
LARGEST_HALF = 65504.0
ARCHITECTURES = {"llama": "llama", "mistral": "llama", "mixtral": "llama", "qwen3": "qwen3", "qwen3_moe": "qwen3moe",
                 "gpt2": "gpt2"}  # fmt: skip
STAY_WHOLE = ("position_embd.", ".ffn_gate_inp.")  # small matrices that llama.cpp wants in 32 bits


def write(leaving: Leaving, path: Path, kind: Kind) -> None:
    """Write the file `path`, as a whole or not at all.

    Raises InputError for a model or a tokenizer that llama.cpp does not have, for widths that `kind` cannot cut, and
    where the library gguf is not installed.
    """
    c = computed(leaving.config)
    _require_blocks(c, kind)
    vocabulary = gguf_vocabulary.of(leaving.tokenizer)
    tensors = _tensors(c, leaving.weights)
    files.make_folder(path.parent)
    header = _header(leaving, c, vocabulary, tensors, kind)
    files.write_stream(path, _chunks(header, tensors, kind))


def computed(c: ModelConfig) -> ModelConfig:
    """The model as llama.cpp computes it, without a window that nothing lies beyond.

    Raises InputError where it computes no such model.
    """
    if c.window >= c.block_size:
        c = dataclasses.replace(c, window=0)
    families.of(c)
    reasons = []
    if c.window:
        reasons.append("a token sees only a window (--window 0)")
    if c.feedforward not in ("swiglu", "gelu"):
        reasons.append(
            f"its feed-forward is {c.feedforward} (--feedforward {'swiglu' if c.gated else 'gelu'})"
        )
    if c.n_experts and c.experts_per_token == 1:
        reasons.append(
            "a token's only expert is weighted by its probability (--experts-per-token 2)"
        )
    if reasons:
        raise InputError(
            f"llama.cpp has no {architecture(c)} like this: {'; '.join(reasons)}. Train with what stands in "
            "parentheses and export that, or export --to hf"
        )
    return c


def architecture(c: ModelConfig) -> str:
    """llama.cpp's name for it."""
    model_type: str = families.of(c).to_config(c, 1)["model_type"]
    return ARCHITECTURES[model_type]


def _require_blocks(c: ModelConfig, kind: Kind) -> None:
    wrong = {name: getattr(c, name) for name in ("d_model", "d_ff") if getattr(c, name) % BLOCK}
    if kind == "q8_0" and wrong:
        found = " and ".join(f"{name} is {width}" for name, width in wrong.items())
        nearest = " ".join(
            f"--{name.replace('_', '-')} {-(-width // BLOCK) * BLOCK}"
            for name, width in wrong.items()
        )
        raise InputError(
            f"q8_0 cuts rows into {BLOCK} numbers with one scale, and {found}: take f16, or train with {nearest}"
        )


def _tensors(c: ModelConfig, weights: dict[str, Array]) -> dict[str, list[Array]]:
    """llama.cpp's names -> the matrix, or those of all experts."""
    library, arch, family = _library(), architecture(c), families.of(c)
    numbers = {name: number for number, name in library.MODEL_ARCH_NAMES.items()}
    names = library.get_tensor_name_map(numbers[arch], c.n_layers)
    tensors: dict[str, list[Array]] = {}
    for name, array in family.to_weights(c, weights).items():
        found = names.get_name(re.sub(r"\.experts\.\d+\.", ".experts.", name), (".weight", ".bias"))
        if arch == "llama" and (".attn_q." in found or ".attn_k." in found):
            array = _interleaved(array, c.n_heads if ".attn_q." in found else c.n_kv_heads)
        if arch == "gpt2" and array.ndim == 2 and found.startswith("blk."):
            array = array.T  # transformers has these (in, out)
        tensors.setdefault(found, []).append(array)
    return tensors


def _interleaved(rows: Array, heads: int) -> Array:
    """Rope turns number i of a head with number i + Q/2 here, and 2i with 2i + 1 in llama.cpp's Llama."""
    halves = rows.reshape(heads, 2, len(rows) // heads // 2, *rows.shape[1:])
    return halves.swapaxes(1, 2).reshape(rows.shape)


def _shape(parts: list[Array]) -> tuple[int, ...]:
    return parts[0].shape if len(parts) == 1 else (len(parts), *parts[0].shape)


def _kind(name: str, parts: list[Array], kind: Kind) -> Kind:
    """Of one tensor."""
    return "f32" if parts[0].ndim == 1 or any(word in name for word in STAY_WHOLE) else kind


def _header(
    leaving: Leaving,
    c: ModelConfig,
    vocabulary: Vocabulary,
    tensors: dict[str, list[Array]],
    kind: Kind,
) -> bytes:
    """All that comes before the numbers of the tensors, padded as they are."""
    library = _library()
    with tempfile.TemporaryDirectory() as folder:  # the library writes nowhere but into a file
        path = Path(folder) / "header"
        writer = library.GGUFWriter(path, architecture(c))
        try:
            _describe(writer, leaving, c, kind)
            _describe_tokenizer(writer, vocabulary)
            for name, parts in tensors.items():
                shape, type_ = (
                    _shape(parts),
                    library.GGMLQuantizationType[_kind(name, parts, kind).upper()],
                )
                per_block, bytes_of_block = library.GGML_QUANT_SIZES[type_]
                size = int(np.prod(shape)) // per_block * bytes_of_block
                writer.add_tensor_info(name, shape, np.dtype(np.float32), size, type_)
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
        finally:
            writer.close()
        return _padded(path.read_bytes())


def _padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % 32)  # the alignment of a file that names no other


def _chunks(header: bytes, tensors: dict[str, list[Array]], kind: Kind) -> Iterator[Chunk]:
    """The file, a tensor at a time."""
    library = _library()
    yield header
    for name, parts in tensors.items():
        array = parts[0] if len(parts) == 1 else np.stack(parts)
        match _kind(name, parts, kind):
            case "f32":
                data = array.astype("<f4", copy=False)
            case "f16":
                if (largest := float(np.abs(array).max())) > LARGEST_HALF:
                    raise InputError(
                        f"{name} reaches {largest:.3g}, and f16 ends at {LARGEST_HALF:.0f}: take f32"
                    )
                data = array.astype("<f2")
            case "q8_0":
                data = library.quantize(array, library.GGMLQuantizationType.Q8_0)
        yield data
        yield bytes(-data.nbytes % 32)


def _describe(writer: Any, leaving: Leaving, c: ModelConfig, kind: Kind) -> None:
    library = _library()
    run = leaving.run
    # llama.cpp takes a name with "phi3" in it for that model's, and runs have any name: it is told further down.
    writer.add_name(f"glasslm-{c.n_layers}L-{c.d_model}d")
    writer.add_type("model")
    writer.add_description(
        f"trained with glasslm {version('glasslm')}: run {run.path.name}, step {leaving.step:,}"
    )
    types = {"f32": "ALL_F32", "f16": "MOSTLY_F16", "q8_0": "MOSTLY_Q8_0"}
    writer.add_file_type(library.LlamaFileType[types[kind]])
    if kind == "q8_0":
        writer.add_quantization_version(library.GGML_QUANT_VERSION)
    writer.add_vocab_size(leaving.vocab_size)
    writer.add_context_length(c.block_size)
    writer.add_embedding_length(c.d_model)
    writer.add_block_count(c.n_layers)
    writer.add_feed_forward_length(c.d_ff)
    writer.add_head_count(c.n_heads)
    writer.add_head_count_kv(c.n_kv_heads)
    if architecture(c) == "gpt2":
        writer.add_layer_norm_eps(c.norm_eps)
    else:
        writer.add_layer_norm_rms_eps(c.norm_eps)
        _describe_rope(writer, c, leaving.vocab_size)
    if c.n_experts:
        writer.add_expert_count(c.n_experts)
        writer.add_expert_used_count(c.experts_per_token)
        writer.add_expert_feed_forward_length(c.d_ff)
    for key, value in {
        "version": version("glasslm"),
        "run": run.path.name,
        "step": str(leaving.step),
        "config_sha256": run.config_sha256,
        "data_sha256": run.record["data"]["sha256"],
        "tokenizer_sha256": leaving.tokenizer.sha256,
    }.items():
        writer.add_string(f"glasslm.{key}", value)


def _describe_rope(writer: Any, c: ModelConfig, vocab_size: int) -> None:
    values = llama.to_config(c, vocab_size)
    writer.add_key_length(c.head_size)
    writer.add_value_length(c.head_size)
    writer.add_rope_dimension_count(c.head_size)
    writer.add_rope_freq_base(values["rope_theta"])
    if values["rope_scaling"]:
        writer.add_rope_scaling_type(_library().RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(c.rope_factor)


def _describe_tokenizer(writer: Any, vocabulary: Vocabulary) -> None:
    writer.add_tokenizer_model(vocabulary.model)
    writer.add_token_list(vocabulary.tokens)
    writer.add_token_types(vocabulary.types)
    writer.add_add_bos_token(False)
    writer.add_add_eos_token(False)
    writer.add_add_space_prefix(False)
    if vocabulary.pre:
        writer.add_tokenizer_pre(vocabulary.pre)
        writer.add_token_merges(vocabulary.merges)
    if vocabulary.end is not None:
        writer.add_bos_token_id(vocabulary.end)
        writer.add_eos_token_id(vocabulary.end)


def _library() -> Any:
    try:
        import gguf
    except ImportError:
        raise InputError("gguf is not installed: pip install 'glasslm[interop]'") from None
    return gguf


# -- reading it with other programs ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Reading:
    """The logits that another program computes from a file, beside ours: (B, T, V) both."""

    reader: str
    ours: Array
    theirs: Array
    same_tokens: bool | None = None  # of a text; None where it was not asked

    @property
    def largest(self) -> float:
        """The largest difference, as a share of our largest logit."""
        return largest_difference(self.ours, self.theirs)

    @property
    def usual(self) -> float:
        """The same, of the median position: where 8 bits turn a router to another expert, a few differ by far more."""
        differences = np.abs(self.ours - self.theirs).max(axis=-1)
        return float(np.nan_to_num(np.median(differences) / np.abs(self.ours).max(), nan=np.inf))

    @property
    def divergence(self) -> float:
        """Nats a token: the mean of KL(ours || theirs)."""
        from scipy.special import log_softmax

        ours, theirs = (
            log_softmax(logits.astype(np.float64), axis=-1) for logits in (self.ours, self.theirs)
        )
        return float((np.exp(ours) * (ours - theirs)).sum(axis=-1).mean())

    def close(self, c: ModelConfig, kind: Kind) -> bool:
        """Whether this is the model that was written, rounded as `kind` rounds it."""
        # llama.cpp looks GELU up in a table of half precision: 4e-4 was measured. Else 1e-6 in 32 bits, 1e-3 in 16,
        # and 2e-2 in 8; a matrix in the wrong order makes it 0.3 and more.
        exact = 2e-3 if self.reader == LLAMA_CPP and not c.gated else 1e-5
        bound = {"f32": exact, "f16": 5e-3, "q8_0": 1e-1}[kind]
        return (
            self.largest if kind == "f32" else self.usual
        ) <= bound and self.same_tokens is not False


def readings(leaving: Leaving, path: Path, kind: Kind) -> Iterator[Reading]:
    """What those programs compute from a file just written that are installed and read all of it."""
    tokens = leaving.probe()
    ours = leaving.logits(tokens)
    if all(map(find_spec, ("torch", "transformers", "accelerate"))) and not misread(leaving.config):
        yield Reading("transformers", ours, logits_by_transformers(path, tokens))
    if find_spec("llama_cpp"):
        text = leaving.tokenizer.decode(tokens[0])
        same = ids_by_llama_cpp(path, text) == leaving.tokenizer.encode(text).tolist()
        yield Reading(LLAMA_CPP, ours, logits_by_llama_cpp(path, tokens), same)


def misread(c: ModelConfig) -> str:
    """What transformers makes of the file of a model, where that is another model; empty where it is the same.

    Its version 5 takes some of the file's keys, and defaults for the rest: export --to hf is the way there.
    """
    c = computed(c)
    match architecture(c):
        case "llama" if c.n_experts:
            return "a Llama without experts"
        case "llama" if c.bias:
            return "a model without biases"
        case "llama" | "qwen3" | "qwen3moe" if c.rope_scaling == "linear":
            return "a model whose rope is not stretched"
        case "qwen3" if c.head_size != 128:
            return "a model with heads of 128 numbers"
        case "qwen3moe" if c.d_ff != 768:
            return "a model with experts of width 768"
        case "gpt2" if c.block_size != 1024:
            return "a model with a context of 1,024 tokens"
        case "gpt2" if c.d_ff != 4 * c.d_model:
            return "a model whose feed-forward is four times as wide as the rest"
    return ""


def logits_by_transformers(path: Path, tokens: NDArray[np.int64]) -> Array:
    """tokens (B, T) -> (B, T, V), as transformers computes them from the file, in float32.

    Raises InputError where transformers, PyTorch or accelerate is not installed.
    """
    try:
        importlib.import_module("accelerate")  # which the reader asks for
    except ImportError as error:
        raise InputError(f"{error.name} is not installed: pip install 'glasslm[interop]'") from None
    return hf.logits_of(hf.loaded(path.parent, gguf_file=path.name), tokens)


def logits_by_llama_cpp(path: Path, tokens: NDArray[np.int64]) -> Array:
    """tokens (B, T) -> (B, T, V), as llama.cpp computes them from the file, with keys and values in float32.

    Raises InputError where llama-cpp-python is not installed.
    """
    model = _llama_cpp(path, n_ctx=tokens.shape[1])
    found = []
    for row in tokens.tolist():
        model.reset()
        model.eval(row)
        found.append(np.array(model.scores[: len(row)]))
    model.close()
    return np.stack(found)


def ids_by_llama_cpp(path: Path, text: str) -> list[int]:
    """The tokens that llama.cpp makes of `text` with the file's tokenizer."""
    model = _llama_cpp(path, vocab_only=True)
    found: list[int] = model.tokenize(text.encode(), add_bos=True, special=False)
    model.close()
    return found


def _llama_cpp(path: Path, **settings: Any) -> Any:
    try:
        import llama_cpp as library  # built on the machine where somebody wants it
    except ImportError:
        raise InputError("llama.cpp is not installed: pip install llama-cpp-python") from None
    settings |= {
        "type_k": library.GGML_TYPE_F32,
        "type_v": library.GGML_TYPE_F32,
        "flash_attn": False,
    }
    with contextlib.redirect_stderr(
        io.StringIO()
    ):  # it warns that 256 tokens, the fewest it makes room for, are many
        return library.Llama(str(path), logits_all=True, n_gpu_layers=0, verbose=False, **settings)
