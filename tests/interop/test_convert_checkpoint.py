"""examples/convert_checkpoint.py: files as nanoGPT and LLMs-from-scratch write them are imported
with the logits of their own models, and a file that would run code is refused.
"""

from __future__ import annotations

import pickle
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from torch import Tensor, nn  # noqa: E402 - need PyTorch
from torch.nn import functional as F  # noqa: E402

from glasslm.interop import hf  # noqa: E402
from glasslm.interop.model_export import compute_logits, largest_difference  # noqa: E402

SCRIPT = Path(__file__).parents[2] / "examples" / "convert_checkpoint.py"
V, T, D, H, L = 11, 8, 16, 4, 2  # vocabulary, context, width, heads, layers
ALPHABET = "\n abcdefghi"


def run_program(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(SCRIPT), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, encoding="utf-8")


def run_script(*arguments: object) -> str:
    """Run it in this process, which has PyTorch in memory; returns its error, or nothing."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [str(SCRIPT), *map(str, arguments)])
        try:
            runpy.run_path(str(SCRIPT), run_name="__main__")
        except SystemExit as request:
            return str(request)
    return ""


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """(B, T, D) each, of H heads."""
    B, T, D = q.shape
    q, k, v = (x.view(B, T, H, D // H).transpose(1, 2) for x in (q, k, v))
    y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    return y.transpose(1, 2).reshape(B, T, D)


def random_state(shapes: dict[str, tuple[int, ...]]) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {name: 0.3 * torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def nanogpt_state(bias: bool) -> dict[str, Tensor]:
    shapes: dict[str, tuple[int, ...]] = {
        "transformer.wte.weight": (V, D), "transformer.wpe.weight": (T, D),
        "transformer.ln_f.weight": (D,),
    }  # fmt: skip
    for i in range(L):
        block = f"transformer.h.{i}"
        shapes |= {f"{block}.{name}.weight": (D,) for name in ("ln_1", "ln_2")}
        shapes |= {
            f"{block}.attn.c_attn.weight": (3 * D, D), f"{block}.attn.c_proj.weight": (D, D),
            f"{block}.mlp.c_fc.weight": (4 * D, D), f"{block}.mlp.c_proj.weight": (D, 4 * D),
        }  # fmt: skip
    if bias:
        names = [name for name in shapes if ".h." in name or "ln_f" in name]
        shapes |= {f"{name[:-7]}.bias": shapes[name][:1] for name in names}
    state = random_state(shapes)
    return state | {"lm_head.weight": state["transformer.wte.weight"]}


def nanogpt_logits(s: dict[str, Tensor], tokens: Tensor) -> Tensor:
    def linear(x: Tensor, name: str) -> Tensor:
        return F.linear(x, s[f"{name}.weight"], s.get(f"{name}.bias"))

    def norm(x: Tensor, name: str) -> Tensor:
        return F.layer_norm(x, (D,), s[f"{name}.weight"], s.get(f"{name}.bias"), 1e-5)

    x = s["transformer.wte.weight"][tokens] + s["transformer.wpe.weight"][: tokens.shape[1]]
    for i in range(L):
        block = f"transformer.h.{i}"
        qkv = linear(norm(x, f"{block}.ln_1"), f"{block}.attn.c_attn").split(D, 2)
        x = x + linear(attend(*qkv), f"{block}.attn.c_proj")
        inner = nn.GELU()(linear(norm(x, f"{block}.ln_2"), f"{block}.mlp.c_fc"))
        x = x + linear(inner, f"{block}.mlp.c_proj")
    return F.linear(norm(x, "transformer.ln_f"), s["lm_head.weight"])


def from_scratch_state(bias: bool) -> dict[str, Tensor]:
    shapes: dict[str, tuple[int, ...]] = {
        "tok_emb.weight": (V, D), "pos_emb.weight": (T, D), "out_head.weight": (V, D),
        "final_norm.scale": (D,), "final_norm.shift": (D,),
    }  # fmt: skip
    for i in range(L):
        block = f"trf_blocks.{i}"
        for word in ("query", "key", "value"):
            shapes[f"{block}.att.W_{word}.weight"] = (D, D)
            if bias:
                shapes[f"{block}.att.W_{word}.bias"] = (D,)
        shapes |= {
            f"{block}.att.mask": (T, T), f"{block}.att.out_proj.weight": (D, D),
            f"{block}.att.out_proj.bias": (D,), f"{block}.ff.layers.0.weight": (4 * D, D),
            f"{block}.ff.layers.0.bias": (4 * D,), f"{block}.ff.layers.2.weight": (D, 4 * D),
            f"{block}.ff.layers.2.bias": (D,),
        }  # fmt: skip
        shapes |= {f"{block}.{n}.{p}": (D,) for n in ("norm1", "norm2") for p in ("scale", "shift")}
    return random_state(shapes)


def from_scratch_logits(s: dict[str, Tensor], tokens: Tensor) -> Tensor:
    def linear(x: Tensor, name: str) -> Tensor:
        return F.linear(x, s[f"{name}.weight"], s.get(f"{name}.bias"))

    def norm(x: Tensor, name: str) -> Tensor:
        return F.layer_norm(x, (D,), s[f"{name}.scale"], s[f"{name}.shift"], 1e-5)

    x = s["tok_emb.weight"][tokens] + s["pos_emb.weight"][: tokens.shape[1]]
    for i in range(L):
        block = f"trf_blocks.{i}"
        h = norm(x, f"{block}.norm1")
        qkv = [linear(h, f"{block}.att.W_{word}") for word in ("query", "key", "value")]
        x = x + linear(attend(*qkv), f"{block}.att.out_proj")
        inner = F.gelu(
            linear(norm(x, f"{block}.norm2"), f"{block}.ff.layers.0"), approximate="tanh"
        )
        x = x + linear(inner, f"{block}.ff.layers.2")
    return linear(norm(x, "final_norm"), "out_head")


def write_meta(folder: Path) -> Path:
    """meta.pkl as nanoGPT's prepare.py writes it."""
    stoi = {character: i for i, character in enumerate(ALPHABET)}
    meta = {"vocab_size": V, "stoi": stoi, "itos": dict(enumerate(ALPHABET))}
    (folder / "meta.pkl").write_bytes(pickle.dumps(meta))
    return folder / "meta.pkl"


def check_conversion(folder: Path, expected: Tensor, tokens: Tensor) -> None:
    imported = hf.read(folder)
    ours = compute_logits(imported.config, V, imported.weights, tokens.numpy())
    assert largest_difference(expected.numpy(), ours) < 1e-5
    assert imported.tokenizer.encode("abc\n").tolist() == [2, 3, 4, 0]


TOKENS = torch.from_numpy(np.random.default_rng(0).integers(0, V, (2, T)))


@pytest.mark.parametrize("bias", [False, True])
def test_nanogpt_is_converted(bias: bool, tmp_path: Path) -> None:
    state = nanogpt_state(bias)
    args: dict[str, Any] = {
        "n_layer": L, "n_head": H, "n_embd": D, "block_size": T, "bias": bias, "vocab_size": V,
        "dropout": 0.0,
    }  # fmt: skip
    checkpoint = {
        "model": {f"_orig_mod.{name}": tensor for name, tensor in state.items()},
        "optimizer": {"state": {0: {"exp_avg": torch.ones(3)}}, "param_groups": []},
        "model_args": args,
        "iter_num": 5,
        "best_val_loss": torch.tensor(1.5),
        "config": {"dataset": "shakespeare_char"},
    }
    torch.save(checkpoint, tmp_path / "ckpt.pt")
    flags = ("--tokenizer", write_meta(tmp_path), "--out", tmp_path / "out")
    if bias:
        assert run_script(tmp_path / "ckpt.pt", *flags) == ""
    else:
        done = run_program(tmp_path / "ckpt.pt", *flags)
        assert done.returncode == 0, done.stderr
    check_conversion(tmp_path / "out", nanogpt_logits(state, TOKENS), TOKENS)


@pytest.mark.parametrize("bias", [False, True])
def test_llms_from_scratch_is_converted(bias: bool, tmp_path: Path) -> None:
    state, meta = from_scratch_state(bias), write_meta(tmp_path)
    torch.save({"model_state_dict": state} if bias else state, tmp_path / "model.pth")
    flags = ("--tokenizer", meta, "--out", tmp_path / "out")
    assert "--n-heads" in run_script(tmp_path / "model.pth", *flags)
    assert run_script(tmp_path / "model.pth", *flags, "--n-heads", H) == ""
    check_conversion(tmp_path / "out", from_scratch_logits(state, TOKENS), TOKENS)


class Hostile:
    """A pickle that writes a file when it is read."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


def test_a_file_that_would_run_code_is_refused(tmp_path: Path) -> None:
    torch.save({"model_args": Hostile(tmp_path / "ran")}, tmp_path / "ckpt.pt")
    (tmp_path / "bad.pkl").write_bytes(pickle.dumps({"itos": Hostile(tmp_path / "ran")}))
    torch.save(from_scratch_state(False), tmp_path / "model.pth")
    for checkpoint, tokenizer in (("ckpt.pt", "bad.pkl"), ("model.pth", "bad.pkl")):
        with pytest.raises(pickle.UnpicklingError):
            run_script(
                tmp_path / checkpoint, "--tokenizer", tmp_path / tokenizer, "--out",
                tmp_path / "out", "--n-heads", H,
            )  # fmt: skip
    assert not (tmp_path / "ran").exists()
