"""Write a GGUF file for llama.cpp: hyperparameters, tokenizer, and weights in 32, 16 or 8 bits.

llama.cpp computes fewer variants than transformers; the others are refused. Matrices are (out, in)
as in glasslm, norms and biases stay in 32 bits, and a tied head is left out.
"""

from __future__ import annotations

import dataclasses
import re
import tempfile
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from glasslm import files
from glasslm.config.schema import ModelConfig
from glasslm.errors import InputError
from glasslm.files import Chunk
from glasslm.interop import families, gguf_tokenizer
from glasslm.interop.gguf_tokenizer import GGUFTokenizer
from glasslm.interop.model_export import ModelExport

Array = NDArray[Any]
Quantization = Literal["f32", "f16", "q8_0"]

Q8_0_BLOCK = 32  # adjacent numbers of a row that share a scale in q8_0
MAX_FLOAT16 = 65504.0
ALIGNMENT_BYTES = 32  # the default of the format

# What llama.cpp has: its architecture for a model type of transformers, and the feed-forwards that
# it computes. A variant that is not listed here is refused by `llama_cpp_config`.
ARCHITECTURES = {
    "llama": "llama",
    "mistral": "llama",
    "mixtral": "llama",
    "qwen3": "qwen3",
    "qwen3_moe": "qwen3moe",
    "gpt2": "gpt2",
}
FEEDFORWARDS = ("swiglu", "gelu")

FLOAT32_TENSORS = (
    "position_embd.",
    ".ffn_gate_inp.",
)  # small matrices that llama.cpp wants in 32 bits


def write(export: ModelExport, path: Path, quantization: Quantization) -> None:
    """Write the file `path` atomically.

    Raises InputError for a model or a tokenizer that llama.cpp does not have, for widths that
    `quantization` cannot divide, and where the library gguf is not installed.
    """
    c, tokenizer = llama_cpp_form(export, quantization)
    tensors = _gguf_tensors(c, export.weights)
    files.make_folder(path.parent)
    header = _header(export, c, tokenizer, tensors, quantization)
    files.write_stream(path, _file_chunks(header, tensors, quantization))


def llama_cpp_form(
    export: ModelExport, quantization: Quantization
) -> tuple[ModelConfig, GGUFTokenizer]:
    """The config and the tokenizer for llama.cpp; no weight is touched.

    Raises InputError for what llama.cpp does not have, and for widths that `quantization` cannot
    divide.
    """
    c = llama_cpp_config(export.config)
    _require_whole_blocks(c, quantization)
    return c, gguf_tokenizer.convert_tokenizer(export.tokenizer, export.token_settings)


def llama_cpp_config(c: ModelConfig) -> ModelConfig:
    """The same model for llama.cpp, without a window as long as the context.

    Raises InputError where llama.cpp does not compute this model; the message names the switches
    that help.
    """
    if c.window >= c.block_size:
        c = dataclasses.replace(c, window=0)
    model_type = _model_type(c)
    reasons = []
    if model_type not in ARCHITECTURES:
        reasons.append(f"it is a {model_type} (--norm rmsnorm --position rope)")
    if c.window:
        reasons.append(f"its attention has a window of {c.window} tokens (--window 0)")
    reasons += _missing_settings(c)
    if c.feedforward not in FEEDFORWARDS:
        nearest = "swiglu" if c.is_gated else "gelu"
        reasons.append(f"its feed-forward is {c.feedforward} (--feedforward {nearest})")
    if c.n_experts and c.experts_per_token == 1:
        reasons.append(
            "it weights a token's only expert by the expert's probability (--experts-per-token 2)"
        )
    if reasons:
        raise InputError(
            f"llama.cpp has no {model_type} like this model: {'; '.join(reasons)}. Train with the "
            "flags in parentheses, then export; or export --to hf"
        )
    return c


def _missing_settings(c: ModelConfig) -> list[str]:
    """Settings that glasslm does not write into a file for llama.cpp, each with its flag."""
    reasons = []
    if c.rope_scaling not in ("none", "linear", "ntk"):
        reasons.append(f"its rope is scaled by {c.rope_scaling} (--rope-scaling linear)")
    if extra := sorted(c.biased_modules & {"k", "head"}):
        reasons.append(f"it has biases of {', '.join(extra)} (--bias-targets '')")
    return reasons


def architecture(c: ModelConfig) -> str:
    """llama.cpp's name for the architecture of a model that `llama_cpp_config` accepts."""
    return ARCHITECTURES[_model_type(c)]


def _model_type(c: ModelConfig) -> str:
    """The model type in transformers. Raises InputError where transformers has none."""
    model_type: str = families.choose_family(c).to_hf_config(c, 1)["model_type"]
    return model_type


def _require_whole_blocks(c: ModelConfig, quantization: Quantization) -> None:
    """Raise InputError where q8_0 cannot divide the rows of a matrix into blocks."""
    widths = {
        name: getattr(c, name) for name in ("d_model", "d_ff") if getattr(c, name) % Q8_0_BLOCK
    }
    if quantization == "q8_0" and widths:
        listed = " and ".join(f"{name} is {width}" for name, width in widths.items())
        flags = " ".join(
            f"--{name.replace('_', '-')} {-(-width // Q8_0_BLOCK) * Q8_0_BLOCK}"
            for name, width in widths.items()
        )
        raise InputError(
            f"q8_0 divides rows into blocks of {Q8_0_BLOCK} numbers, but {listed}: take f16, or "
            f"train with {flags}"
        )


def _gguf_tensors(c: ModelConfig, weights: dict[str, Array]) -> dict[str, list[Array]]:
    """llama.cpp's names -> a list of one matrix, or of the matrices of all experts."""
    library, arch, family = _import_gguf(), architecture(c), families.choose_family(c)
    numbers = {name: number for number, name in library.MODEL_ARCH_NAMES.items()}
    names = library.get_tensor_name_map(numbers[arch], c.n_layers)
    tensors: dict[str, list[Array]] = {}
    for hf_name, array in family.to_hf_weights(c, weights).items():
        # All experts of a layer are one tensor in GGUF.
        name = names.get_name(
            re.sub(r"\.experts\.\d+\.", ".experts.", hf_name), (".weight", ".bias")
        )
        if arch == "llama" and (".attn_q." in name or ".attn_k." in name):
            array = _interleave_halves(array, c.n_heads if ".attn_q." in name else c.n_kv_heads)
        if arch == "gpt2" and array.ndim == 2 and name.startswith("blk."):
            array = array.T  # transformers stores these as (in, out)
        tensors.setdefault(name, []).append(array)
    return tensors


def _interleave_halves(rows: Array, heads: int) -> Array:
    """(H Q, ...) -> the same shape with the rows of each head in the order of llama.cpp's Llama.

    Rope rotates rows i and i + Q/2 of a head in glasslm, and rows 2i and 2i + 1 in llama.cpp.
    """
    halves = rows.reshape(heads, 2, len(rows) // heads // 2, *rows.shape[1:])
    return halves.swapaxes(1, 2).reshape(rows.shape)


def _stacked_shape(parts: list[Array]) -> tuple[int, ...]:
    return parts[0].shape if len(parts) == 1 else (len(parts), *parts[0].shape)


def _tensor_quantization(name: str, parts: list[Array], quantization: Quantization) -> Quantization:
    """The quantization of one tensor of a file: f32 for vectors and small matrices."""
    small = parts[0].ndim == 1 or any(word in name for word in FLOAT32_TENSORS)
    return "f32" if small else quantization


def _header(
    export: ModelExport,
    c: ModelConfig,
    tokenizer: GGUFTokenizer,
    tensors: dict[str, list[Array]],
    quantization: Quantization,
) -> bytes:
    """The file up to the numbers of the first tensor, padded to the alignment."""
    library = _import_gguf()
    with tempfile.TemporaryDirectory() as folder:  # the library can only write to a file
        path = Path(folder) / "header"
        writer = library.GGUFWriter(path, architecture(c))
        try:
            _add_metadata(writer, export, c, quantization)
            _add_tokenizer(writer, tokenizer)
            for name, parts in tensors.items():
                tensor_quantization = _tensor_quantization(name, parts, quantization)
                tensor_type = library.GGMLQuantizationType[tensor_quantization.upper()]
                block_numbers, block_bytes = library.GGML_QUANT_SIZES[tensor_type]
                shape = _stacked_shape(parts)
                size_bytes = int(np.prod(shape)) // block_numbers * block_bytes
                writer.add_tensor_info(name, shape, np.dtype(np.float32), size_bytes, tensor_type)
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
        finally:
            writer.close()
        header = path.read_bytes()
    return header + bytes(-len(header) % ALIGNMENT_BYTES)


def _file_chunks(
    header: bytes, tensors: dict[str, list[Array]], quantization: Quantization
) -> Iterator[Chunk]:
    """The content of the file, one tensor at a time."""
    library = _import_gguf()
    yield header
    for name, parts in tensors.items():
        array = parts[0] if len(parts) == 1 else np.stack(parts)
        match _tensor_quantization(name, parts, quantization):
            case "f32":
                data = array.astype("<f4", copy=False)
            case "f16":
                if (largest := float(np.abs(array).max())) > MAX_FLOAT16:
                    raise InputError(
                        f"{name} reaches {largest:.3g}, but f16 holds at most {MAX_FLOAT16:.0f}: "
                        "take f32"
                    )
                data = array.astype("<f2")
            case "q8_0":
                data = library.quantize(array, library.GGMLQuantizationType.Q8_0)
        yield data
        yield bytes(-data.nbytes % ALIGNMENT_BYTES)


def _add_metadata(
    writer: Any, export: ModelExport, c: ModelConfig, quantization: Quantization
) -> None:
    library = _import_gguf()
    run = export.run
    # The name holds no word of the run: llama.cpp takes any name with "phi3" in it for that model.
    writer.add_name(f"glasslm-{c.n_layers}L-{c.d_model}d")
    writer.add_type("model")
    writer.add_description(
        f"trained with glasslm {version('glasslm')}: run {run.path.name}, step {export.step:,}"
    )
    types = {"f32": "ALL_F32", "f16": "MOSTLY_F16", "q8_0": "MOSTLY_Q8_0"}
    writer.add_file_type(library.LlamaFileType[types[quantization]])
    if quantization == "q8_0":
        writer.add_quantization_version(library.GGML_QUANT_VERSION)
    writer.add_vocab_size(export.vocab_size)
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
        _add_rope(writer, c, export.vocab_size)
    if c.n_experts:
        writer.add_expert_count(c.n_experts)
        writer.add_expert_used_count(c.experts_per_token)
        writer.add_expert_feed_forward_length(c.d_ff)
    for key, value in {
        "version": version("glasslm"),
        "run": run.path.name,
        "step": str(export.step),
        "config_sha256": run.config_sha256,
        "data_sha256": run.record["data"]["sha256"],
        "tokenizer_sha256": export.tokenizer.sha256,
    }.items():
        writer.add_string(f"glasslm.{key}", value)


def _add_rope(writer: Any, c: ModelConfig, vocab_size: int) -> None:
    values = families.choose_family(c).to_hf_config(c, vocab_size)
    writer.add_key_length(c.head_size)
    writer.add_value_length(c.head_size)
    writer.add_rope_dimension_count(c.head_size)
    writer.add_rope_freq_base(values["rope_theta"])
    if values["rope_scaling"]:
        writer.add_rope_scaling_type(_import_gguf().RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(c.rope_factor)


def _add_tokenizer(writer: Any, tokenizer: GGUFTokenizer) -> None:
    writer.add_tokenizer_model(tokenizer.model)
    writer.add_token_list(tokenizer.tokens)
    writer.add_token_types(tokenizer.types)
    writer.add_add_bos_token(False)
    writer.add_add_eos_token(False)
    writer.add_add_space_prefix(False)
    if tokenizer.pre:
        writer.add_tokenizer_pre(tokenizer.pre)
        writer.add_token_merges(tokenizer.merges)
    if tokenizer.end is not None:
        writer.add_eos_token_id(tokenizer.end)
    if tokenizer.turn_end is not None:
        writer.add_eot_token_id(tokenizer.turn_end)
    if tokenizer.begin is not None:
        writer.add_bos_token_id(tokenizer.begin)
    if tokenizer.pad is not None:
        writer.add_pad_token_id(tokenizer.pad)
    if tokenizer.chat_template:
        writer.add_chat_template(tokenizer.chat_template)


def _import_gguf() -> Any:
    try:
        import gguf
    except ImportError:
        raise InputError("gguf is not installed: pip install 'glasslm[interop]'") from None
    return gguf
