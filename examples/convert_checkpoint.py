"""Convert a checkpoint of nanoGPT or LLMs-from-scratch into a folder that `glasslm import` reads.

glasslm opens no pickle, because reading one can run code. This script does it in a process of its
own, and lets PyTorch and the unpickler build nothing except tensors, numbers, texts and lists.

    python convert_checkpoint.py out-shakespeare-char/ckpt.pt --tokenizer meta.pkl --out folder
    python convert_checkpoint.py model.pth --n-heads 12 --tokenizer gpt2-folder --out folder
    glasslm import folder
"""

from __future__ import annotations

import argparse
import json
import pickle
import shutil
import sys
from pathlib import Path
from typing import Any, NoReturn

import torch
from safetensors.torch import save_file

Tensors = dict[str, torch.Tensor]
WRAPPERS = ("_orig_mod.", "module.")  # prefixes of torch.compile and DistributedDataParallel
TOKENIZER_FILES = ("tokenizer.json", "vocab.json", "merges.txt")


class PlainUnpickler(pickle.Unpickler):
    """An unpickler that knows no class, so that a file can only hold plain Python values."""

    def find_class(self, module: str, name: str) -> NoReturn:
        raise pickle.UnpicklingError(f"the file wants to build {module}.{name}")


def load_checkpoint(path: Path) -> dict[str, Any]:
    """The content of a file of torch.save; nothing but tensors and plain values is built."""
    content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    if not isinstance(content, dict):
        sys.exit(f"{path} holds a {type(content).__name__}: expected a dictionary of tensors")
    return content


def without_wrapper(state: Tensors) -> Tensors:
    """A state dict without the prefix of a wrapper."""
    for prefix in WRAPPERS:
        if all(name.startswith(prefix) for name in state):
            state = {name.removeprefix(prefix): tensor for name, tensor in state.items()}
    return state


def convert_nanogpt(content: dict[str, Any], gelu: str) -> tuple[dict[str, Any], Tensors]:
    """config.json and weights, with GPT-2's names, of a nanoGPT checkpoint."""
    args, state = content["model_args"], without_wrapper(content["model"])
    config = gpt2_config(
        args["vocab_size"], args["n_embd"], args["n_layer"], args["n_head"], args["block_size"],
        {"exact": "gelu", "tanh": "gelu_new"}[gelu or "exact"], is_tied=True,
    )  # fmt: skip
    weights: Tensors = {}
    for name, tensor in state.items():
        is_matrix = name.endswith(".weight") and ".h." in name and tensor.dim() == 2
        if not name.endswith(".attn.bias"):  # a mask
            weights[name] = tensor.T if is_matrix else tensor  # GPT-2 stores (in, out)
    weights.pop("lm_head.weight", None)  # the embedding
    return config, weights


def convert_from_scratch(state: Tensors, n_heads: int, gelu: str) -> tuple[dict[str, Any], Tensors]:
    """config.json and weights, with GPT-2's names, of a GPTModel of LLMs-from-scratch."""
    state = without_wrapper(state)
    vocab_size, width = state["tok_emb.weight"].shape
    blocks = {int(name.split(".")[1]) for name in state if name.startswith("trf_blocks.")}
    config = gpt2_config(
        vocab_size, width, len(blocks), n_heads, len(state["pos_emb.weight"]),
        {"exact": "gelu", "tanh": "gelu_new"}[gelu or "tanh"], is_tied=False,
    )  # fmt: skip
    weights = {
        "transformer.wte.weight": state["tok_emb.weight"],
        "transformer.wpe.weight": state["pos_emb.weight"],
        "lm_head.weight": state["out_head.weight"],
        "transformer.ln_f.weight": state["final_norm.scale"],
        "transformer.ln_f.bias": state["final_norm.shift"],
    }
    for i in blocks:
        old, new = f"trf_blocks.{i}", f"transformer.h.{i}"
        for norm, name in (("norm1", "ln_1"), ("norm2", "ln_2")):
            weights[f"{new}.{name}.weight"] = state[f"{old}.{norm}.scale"]
            weights[f"{new}.{name}.bias"] = state[f"{old}.{norm}.shift"]
        parts = [f"{old}.att.W_{word}" for word in ("query", "key", "value")]
        weights[f"{new}.attn.c_attn.weight"] = torch.cat([state[f"{p}.weight"] for p in parts]).T
        if f"{parts[0]}.bias" in state:
            weights[f"{new}.attn.c_attn.bias"] = torch.cat([state[f"{p}.bias"] for p in parts])
        for layer, name in (
            ("att.out_proj", "attn.c_proj"), ("ff.layers.0", "mlp.c_fc"),
            ("ff.layers.2", "mlp.c_proj"),
        ):  # fmt: skip
            weights[f"{new}.{name}.weight"] = state[f"{old}.{layer}.weight"].T
            weights[f"{new}.{name}.bias"] = state[f"{old}.{layer}.bias"]
    return config, weights


def gpt2_config(
    vocab_size: int, width: int, layers: int, heads: int, context: int, gelu: str, is_tied: bool
) -> dict[str, Any]:
    """The config.json of a GPT-2."""
    return {
        "architectures": ["GPT2LMHeadModel"], "model_type": "gpt2", "vocab_size": vocab_size,
        "n_embd": width, "n_layer": layers, "n_head": heads, "n_inner": 4 * width,
        "n_positions": context, "activation_function": gelu, "layer_norm_epsilon": 1e-5,
        "tie_word_embeddings": is_tied, "bos_token_id": None, "eos_token_id": None,
    }  # fmt: skip


def add_missing_biases(weights: Tensors) -> None:
    """Zeros for each bias that GPT-2 has and the model does not."""
    for name in [name for name in weights if name.startswith(("transformer.h.", "transformer.ln"))]:
        if name.endswith(".weight"):
            weights.setdefault(f"{name[:-7]}.bias", torch.zeros(weights[name].shape[-1]))


def write_tokenizer(source: Path, out: Path) -> None:
    """tokenizer.json from nanoGPT's meta.pkl, or the tokenizer files of a folder."""
    if source.suffix == ".pkl":
        from glasslm.data.tokenizers import CharTokenizer
        from glasslm.interop.hf_tokenizer import tokenizer_files

        with open(source, "rb") as file:
            symbols = PlainUnpickler(file).load()["itos"]
        tokenizer = CharTokenizer("".join(symbols[i] for i in range(len(symbols))))
        for name, content in tokenizer_files(tokenizer, 1024).items():
            (out / name).write_bytes(content)
        return
    for path in [source] if source.is_file() else [source / name for name in TOKENIZER_FILES]:
        if path.is_file():
            shutil.copy(path, out / path.name)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("checkpoint", type=Path, help="ckpt.pt of nanoGPT, or a .pth of GPTModel")
    parser.add_argument("--out", type=Path, required=True, help="a new folder")
    parser.add_argument("--tokenizer", type=Path, required=True,
                        help="meta.pkl, tokenizer.json, or a folder with a tokenizer")  # fmt: skip
    parser.add_argument("--n-heads", type=int, default=0, help="of GPTModel, whose file has none")
    parser.add_argument("--gelu", choices=("exact", "tanh"), default="",
                        help="default: exact for nanoGPT, tanh for GPTModel")  # fmt: skip
    flags = parser.parse_args()
    content = load_checkpoint(flags.checkpoint)
    if "model_args" in content:
        config, weights = convert_nanogpt(content, flags.gelu)
    else:
        if flags.n_heads < 1:
            sys.exit("this file does not say how many heads the model has: give --n-heads")
        state = content.get("model_state_dict", content)
        config, weights = convert_from_scratch(state, flags.n_heads, flags.gelu)
    add_missing_biases(weights)
    flags.out.mkdir(parents=True)
    save_file(
        {name: tensor.float().contiguous() for name, tensor in weights.items()},
        flags.out / "model.safetensors",
        {"format": "pt"},
    )
    (flags.out / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
    write_tokenizer(flags.tokenizer, flags.out)
    print(f"{flags.out}: glasslm import {flags.out}")


if __name__ == "__main__":
    main()
