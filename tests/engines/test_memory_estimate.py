"""Estimates of a run: FLOPs against counts by hand, by PyTorch and by the course, and memory.

Memory is compared with the counts of tracemalloc, autograd, PyTorch's dispatcher and the system.
This file is also a program, which trains for a few steps and prints the memory that they took:
`python test_memory_estimate.py JSON`.
"""

import dataclasses
import gc
import json
import re
import subprocess
import sys
import tracemalloc
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from glasslm.config.conversion import with_flags
from glasslm.config.presets import PRESETS
from glasslm.config.schema import ComputeConfig, ModelConfig, Precision, RunConfig
from glasslm.engines import memory_estimate
from glasslm.engines.choice import resolve_micro_batch_size
from glasslm.engines.factory import make_engine
from glasslm.engines.memory_estimate import (
    numpy_memory_bytes,
    torch_activation_bytes,
    torch_memory_bytes,
    training_bytes,
)
from glasslm.engines.protocol import Batch
from glasslm.model.flops import course_flops, course_parameters, flops_per_token
from glasslm.model.parameters import initial_weights, parameter_table
from glasslm.training.memory import free_memory_bytes, memory_advice

V = 65

# -- FLOPs -----------------------------------------------------------------------------------------


def test_flops_by_hand() -> None:
    """4 D² + 3 D F weights a block, V D the head; scores and mixture cost 2 D a position each."""
    D, F, T, L = 128, 352, 128, 4
    weights = L * (4 * D * D + 3 * D * F) + V * D
    forward = 2 * weights + L * 2 * (2 * D * T)
    assert flops_per_token(ModelConfig(), V) == 3 * forward


def test_grouped_queries_save_their_projections_and_no_scores() -> None:
    saved = flops_per_token(ModelConfig(), V) - flops_per_token(ModelConfig(n_kv_heads=1), V)
    assert saved == 6 * 4 * 2 * 128 * 96  # layers x (k and v) x D x the rows that went


MODELS = {name: preset().model for name, preset in PRESETS.items()} | {
    "grouped": ModelConfig(n_layers=2, n_kv_heads=1),
    "untied": ModelConfig(n_layers=2, tie_embeddings=False),
    "not gated, biased": ModelConfig(n_layers=2, feedforward="relu2", bias=True),
    "learned, post": ModelConfig(
        n_layers=2, position="learned", norm_position="post", qk_norm=True
    ),
    "alibi": ModelConfig(n_layers=2, position="alibi", feedforward="geglu"),
    "long and narrow": ModelConfig(d_model=32, n_heads=2, n_layers=2, block_size=512),
    "any inner width": ModelConfig(n_layers=2, d_ff=500),
}


@pytest.mark.parametrize("name", MODELS)
def test_flops_are_those_that_pytorch_counts(name: str) -> None:
    """Forward and backward, with attention of operations that PyTorch's counter knows."""
    attention = pytest.importorskip("torch").nn.attention
    config = MODELS[name]
    with attention.sdpa_kernel(attention.SDPBackend.MATH):
        counts = counted_flops_per_token(config)
    assert counts == pytest.approx(flops_per_token(config, V), rel=0.05)


def test_attention_written_out_leaves_out_few_flops() -> None:
    """With dropped probabilities, keys after a tile have no scores; the estimate counts them."""
    config = MODELS["nanogpt"]
    pytest.importorskip("torch")
    assert 0.95 < counted_flops_per_token(config, dropping=True) / flops_per_token(config, V) < 1


def counted_flops_per_token(config: ModelConfig, dropping: bool = False) -> float:
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    from glasslm.engines.torch.model import Transformer

    model = Transformer(config.resolve(), V, torch.float32).to("meta")  # shapes without numbers
    tokens = torch.zeros((1, config.block_size), dtype=torch.int64, device="meta")
    keys = torch.zeros((100, 1), dtype=torch.int32, device="meta") if dropping else None
    with FlopCounterMode(display=False) as counter:
        model(tokens, keys)[0].sum().backward()
    return counter.get_total_flops() / tokens.numel()


def test_the_course_counts_its_own_model_as_we_do() -> None:
    """The capstone: 25.2M by its formula, 25,338,880 in all; C does not count the scores."""
    c = PRESETS["capstone"]().model
    n, counts = course_parameters(c, V), parameter_table(c, V).counts()
    assert n == 25_199_104 == counts["matmul"]
    assert counts["total"] == 25_338_880 == n + (2 * 8 + 1) * 512 + 256 * 512
    d, L, T = c.d_model, c.n_layers, c.block_size
    assert (
        flops_per_token(c, V) == 3 * L * (24 * d**2 + 4 * T * d) + 6 * V * d
    )  # as it also says, and the head
    assert flops_per_token(c, V) - course_flops(n, 1) == 12 * L * T * d
    assert course_flops(n, 1000) == 6 * n * 1000


@pytest.mark.parametrize(
    ("changes", "difference"),
    [
        (
            {"feedforward": "swiglu"},
            8 * (3 * 512 * 1376 - 8 * 512**2),
        ),  # 8/3 d, rounded up to a multiple of 32
        ({"n_kv_heads": 2}, -8 * 2 * 512 * 384),
        ({"d_ff": 1024}, -8 * 2 * 512 * 1024),
    ],
)
def test_the_course_counts_other_shapes_as_if_they_were_that_one(
    changes: dict[str, Any], difference: int
) -> None:
    c = ModelConfig(
        **{"d_model": 512, "n_layers": 8, "n_heads": 8, "feedforward": "gelu"} | changes
    )
    assert parameter_table(c, V).matmul - course_parameters(c, V) == difference


def test_the_course_counts_a_head_of_its_own_only_as_what_it_multiplies() -> None:
    c = ModelConfig(feedforward="gelu", tie_embeddings=False)
    assert parameter_table(c, V).matmul == course_parameters(c, V)
    assert parameter_table(c, V).total > course_parameters(c, V) + V * c.d_model


# -- memory of the NumPy engine --------------------------------------------------------------------

SHAPES: dict[str, dict[str, Any]] = {
    "tiny": {},
    "wide, AdamW, GELU, dropout, untied, two threads": {
        "d_model": 192, "n_layers": 2, "n_heads": 6, "block_size": 64, "dropout": 0.1,
        "attention_dropout": 0.1, "feedforward": "gelu", "position": "learned", "norm": "layernorm",
        "tie_embeddings": False, "bias": True, "optimizer": "adamw", "threads": 2,
    },
    "long, grouped, post, qk-norm, SGD": {
        "d_model": 64, "n_layers": 3, "n_heads": 4, "n_kv_heads": 1, "block_size": 256,
        "batch_size": 8, "norm_position": "post", "qk_norm": True, "position": "alibi",
        "optimizer": "sgd",
    },
    "documents": {
        "d_model": 64, "n_layers": 2, "n_heads": 2, "block_size": 256, "batch_size": 8,
        "document_attention": True, "document_end_id": 0,
    },
    "soft cap": {
        "d_model": 32, "n_layers": 2, "n_heads": 4, "block_size": 256, "batch_size": 4,
        "attention_softcap": 20.0,
    },
    "large vocabulary": {
        "d_model": 64, "n_layers": 1, "block_size": 64, "batch_size": 32, "vocab": 2000,
    },
}  # fmt: skip


@pytest.mark.parametrize("name", SHAPES)
def test_peak_memory_is_as_estimated(name: str) -> None:
    flags = dict(SHAPES[name])
    threads, vocab = flags.pop("threads", 1), flags.pop("vocab", V)
    config = with_flags(PRESETS["tiny"](), flags).resolve()
    peak = peak_of_three_steps(config, vocab, threads)
    rows = resolve_micro_batch_size(config, "numpy")
    assert 0.4 <= peak / numpy_memory_bytes(config, vocab, rows, threads) <= 1.5


def peak_of_three_steps(config: RunConfig, vocab: int, threads: int) -> int:
    draw = np.random.default_rng(0)
    shape = (config.train.batch_size, config.model.block_size)
    tokens = draw.integers(0, vocab, shape)
    gc.collect()
    tracemalloc.start()
    try:
        engine = make_engine(config, vocab, ComputeConfig(engine="numpy", threads=threads))
        engine.load(initial_weights(parameter_table(config.model, vocab), 0))
        for step in range(3):
            batch = Batch(tokens, np.roll(tokens, -1, 1), step, np.arange(len(tokens)))
            engine.accumulate(batch, 1 / tokens.size)
            engine.update(1e-3)
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


# -- memory of the PyTorch engine ------------------------------------------------------------------

DOCUMENTS = {"document_attention": True, "document_end_id": 0}
ACTIVATION_CASES: list[tuple[str, Precision, int, dict[str, Any]]] = [
    ("tiny", "fp32", V, {}),
    ("tiny", "bf16", V, {}),
    ("tiny", "fp64", V, {"norm_position": "post", "bias": True}),
    (
        "tiny",
        "fp32",
        V,
        {"n_kv_heads": 1, "norm": "layernorm", "norm_position": "post", "qk_norm": True},
    ),
    (
        "tiny",
        "bf16",
        V,
        {"norm": "layernorm", "qk_norm": True, "feedforward": "relu2", "tie_embeddings": False},
    ),
    ("tiny", "fp32", V, {"feedforward": "relu", "position": "learned", "dropout": 0.1}),
    ("tiny", "fp32", V, {"position": "alibi"}),
    ("tiny", "fp32", V, {"attention_dropout": 0.1, "n_kv_heads": 2, "feedforward": "geglu"}),
    ("tiny", "bf16", V, {"attention_dropout": 0.1, "n_kv_heads": 2, "feedforward": "gelu"}),
    ("tiny", "bf16", 5000, {"position": "none"}),
    ("tiny", "bf16", V, {"norm": "rmsnorm1p", "qk_norm": True}),
    ("tiny", "fp32", V, {"attention": "plain"}),
    ("tiny", "bf16", V, {"attention": "plain"}),
    ("tiny", "fp32", V, {"attention_softcap": 20.0}),
    ("tiny", "bf16", V, {"attention_softcap": 20.0}),
    ("tiny", "fp32", V, {"attention_softcap": 20.0, "attention_dropout": 0.1}),
    ("tiny", "fp32", V, {"window": 16}),
    ("tiny", "fp32", V, {"block_size": 256, "n_layers": 1} | DOCUMENTS),
    ("tiny", "bf16", V, {"block_size": 256} | DOCUMENTS),
    ("tiny", "fp32", V, {"position": "alibi", "window": 16} | DOCUMENTS),
    ("tiny", "fp32", V, {"attention_dropout": 0.1} | DOCUMENTS),
    ("nanogpt", "fp32", V, {"n_layers": 2}),
    ("nanogpt", "bf16", V, {"n_layers": 2}),
]


@pytest.mark.parametrize(("preset", "precision", "vocab", "flags"), ACTIVATION_CASES)
def test_autograd_keeps_as_much_as_estimated(
    preset: str, precision: Precision, vocab: int, flags: dict[str, Any]
) -> None:
    """Every tensor that autograd saves counts once; weights and tables do not count."""
    torch = pytest.importorskip("torch")
    from glasslm.engines.torch.layers import upcast
    from glasslm.engines.torch.model import Transformer
    from glasslm.engines.torch.precision import TORCH_DTYPES

    c, rows = with_flags(PRESETS[preset](), flags).resolve().model, 2
    model = Transformer(c, vocab, TORCH_DTYPES[precision]).to(
        torch.float64 if precision == "fp64" else torch.float32
    )
    tokens = torch.arange(rows * c.block_size).reshape(rows, -1) % V
    keys = torch.zeros((100, rows), dtype=torch.int32) if c.dropout or c.attention_dropout else None
    parameter_storages = {
        tensor.untyped_storage().data_ptr() for tensor in [*model.parameters(), *model.buffers()]
    }
    saved: dict[int, Any] = {}

    def save(tensor: Any) -> Any:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameter_storages:
            saved[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(save, lambda tensor: tensor):
        logits = upcast(model(tokens, keys)[0]).flatten(0, 1)
        torch.nn.functional.cross_entropy(logits, tokens.flatten())
    saved_bytes = sum(storage.nbytes() for storage in saved.values())
    estimate = torch_activation_bytes(c, vocab, rows, precision, "cpu")
    assert estimate == pytest.approx(saved_bytes, rel=0.12)


@pytest.mark.parametrize(
    ("flags", "is_plain"),
    [
        ({"block_size": 1023}, True),
        ({"block_size": 1024}, False),
        ({"block_size": 1024, "window": 16}, True),
        ({"block_size": 1024, "window": 16} | DOCUMENTS, False),
    ],
)
def test_a_model_that_may_be_compiled_for_a_cpu_keeps_the_weights_of_short_texts(
    flags: dict[str, Any], is_plain: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As --attention plain does, which is computed in the same way."""
    monkeypatch.setattr(memory_estimate, "can_compile", lambda compute: True)
    config = with_flags(PRESETS["tiny"](), flags).resolve()
    plain = with_flags(config, {"attention": "plain"})

    def needs(config: RunConfig, **changes: Any) -> int:
        settings: dict[str, Any] = {"engine": "torch", "device": "cpu", "precision": "fp32"}
        return training_bytes(config, V, ComputeConfig(**settings | changes), 2)

    expected = needs(plain if is_plain else config, compile="off")
    assert needs(config, compile="on") == needs(config) == expected
    assert needs(config, compile="off") != needs(plain, compile="off")
    assert needs(config, device="cuda") == needs(config, device="cuda", compile="off")


MEMORY_CASES: list[tuple[str, Precision, int, dict[str, Any]]] = [
    ("tiny", "fp32", V, {"batch_size": 4}),
    ("tiny", "bf16", V, {"optimizer": "adamw", "batch_size": 4}),
    ("tiny", "fp32", V, {"optimizer": "sgd", "batch_size": 4, "micro_batch_size": 1}),
    (
        "tiny",
        "fp32",
        V,
        {"batch_size": 1, "block_size": 16, "n_layers": 8},
    ),  # the update takes most
    (
        "tiny",
        "fp32",
        V,
        {"batch_size": 2, "micro_batch_size": 1, "block_size": 8, "optimizer": "adamw"},
    ),
    ("tiny", "fp32", 10_000, {"n_layers": 1, "batch_size": 2}),
    ("tiny", "bf16", 10_000, {"n_layers": 1, "batch_size": 2, "tie_embeddings": False}),
    ("tiny", "fp32", V, {"batch_size": 2, "block_size": 256} | DOCUMENTS),
    ("tiny", "fp32", V, {"batch_size": 2, "block_size": 256, "attention_softcap": 20.0}),
    ("nanogpt", "bf16", V, {"n_layers": 2, "batch_size": 2}),
    ("nanogpt", "fp32", V, {"n_layers": 3, "batch_size": 2, "d_model": 96}),
]


@pytest.mark.parametrize(("preset", "precision", "vocab", "flags"), MEMORY_CASES)
def test_pytorch_needs_as_much_as_estimated(
    preset: str, precision: Precision, vocab: int, flags: dict[str, Any]
) -> None:
    """The largest sum of all tensors in memory at one time, by PyTorch's dispatcher."""
    torch = pytest.importorskip("torch")
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves

    class Alive(TorchDispatchMode):
        def __init__(self) -> None:
            super().__init__()
            self.sizes: set[int] = set()
            self.now = self.peak = 0

        def __torch_dispatch__(
            self, function: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            result = function(*args, **(kwargs or {}))
            for tensor in tree_leaves(result):
                if isinstance(tensor, torch.Tensor):
                    self.meet(tensor.untyped_storage())
            return result

        def meet(self, storage: Any) -> None:
            key, size = storage._cdata, storage.nbytes()
            if key not in self.sizes:
                self.sizes.add(key)
                self.now += size
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self.forget, key, size)

        def forget(self, key: int, size: int) -> None:
            self.sizes.remove(key)
            self.now -= size

    config = with_flags(PRESETS[preset](), flags).resolve()
    with Alive() as alive:
        rows = train_briefly(config, vocab, precision, steps=2)
    estimate = torch_memory_bytes(config, vocab, rows, precision) / memory_estimate.HEAP_OVERHEAD
    assert 0.85 < estimate / alive.peak < 1.1


def train_briefly(config: RunConfig, vocab: int, precision: Precision, steps: int) -> int:
    """Returns the rows of a micro-batch."""
    compute = ComputeConfig(engine="torch", device="cpu", precision=precision, threads=1)
    with pytest.MonkeyPatch.context() as patch:
        # A CPU without bfloat16 instructions emulates them, with the same memory.
        patch.setattr("glasslm.engines.torch.hardware.has_bf16", lambda device: True)
        engine = make_engine(config, vocab, compute, training=True)
    engine.load(initial_weights(parameter_table(config.model, vocab), 0))
    tokens = np.random.default_rng(0).integers(
        0, vocab, (config.train.batch_size, config.model.block_size)
    )
    for step in range(steps):
        engine.accumulate(
            Batch(tokens, np.roll(tokens, -1, 1), step, np.arange(len(tokens))), 1 / tokens.size
        )
        engine.update(1e-3)
    return engine.micro_batch_size


@pytest.mark.slow
@pytest.mark.skipif(
    sys.platform != "linux", reason="needs resource limits, or what Linux says of memory"
)
@pytest.mark.parametrize(
    ("preset", "precision", "vocab", "flags"),
    [
        ("tiny", "fp32", V, {"batch_size": 32, "optimizer": "adamw"}),
        ("tiny", "bf16", V, {"batch_size": 32}),
        ("tiny", "bf16", 50_000, {"batch_size": 4}),
        ("nanogpt", "bf16", V, {"batch_size": 8}),
        ("nanogpt", "bf16", V, {"batch_size": 8, "dropout": 0.0, "attention_dropout": 0.0}),
        ("capstone", "fp32", V, {"batch_size": 2, "micro_batch_size": 1}),
    ],
)
def test_a_process_takes_as_much_as_estimated(
    preset: str, precision: Precision, vocab: int, flags: dict[str, Any]
) -> None:
    pytest.importorskip("torch")
    from glasslm.engines.torch import hardware

    if precision == "bf16" and not hardware.has_bf16("cpu"):
        pytest.skip("needs a CPU with bfloat16")  # emulation takes minutes
    what = json.dumps([preset, precision, vocab, flags])
    process = subprocess.run(
        [sys.executable, __file__, what], capture_output=True, encoding="utf-8", timeout=300
    )
    assert process.returncode == 0, process.stderr
    rows, grown = json.loads(process.stdout)
    config = with_flags(PRESETS[preset](), flags)
    assert 0.7 < torch_memory_bytes(config, vocab, rows, precision) / grown < 1.5


def resident_bytes(what: str) -> int:
    (kilobytes,) = re.findall(
        rf"{what}:\s+(\d+) kB", Path("/proc/self/status").read_text(encoding="ascii")
    )
    return int(kilobytes) * 1024


def main(preset: str, precision: Precision, vocab: int, flags: dict[str, Any]) -> None:
    """Train once to load PyTorch, then again, and print the largest growth of the process."""
    config = with_flags(PRESETS[preset](), flags)
    small = {"d_model": 32, "n_heads": 2, "n_layers": 1, "block_size": 32, "batch_size": 4}
    train_briefly(with_flags(config, small), V, precision, steps=2)
    gc.collect()
    before = resident_bytes("VmRSS")
    rows = train_briefly(config, vocab, precision, steps=3)
    print(json.dumps([rows, resident_bytes("VmHWM") - before]))


# -- free memory, and advice -----------------------------------------------------------------------


def test_free_memory_is_what_linux_says_or_the_limit_of_the_container(tmp_path: Path) -> None:
    meminfo, v2 = tmp_path / "proc" / "meminfo", tmp_path / "sys" / "fs" / "cgroup" / "memory.max"
    v1 = v2.parent / "memory" / "memory.limit_in_bytes"
    for path in (meminfo, v1):
        path.parent.mkdir(parents=True)
    meminfo.write_text(
        "MemTotal:  9000 kB\nMemFree:  1000 kB\nMemAvailable:    5000 kB\n", encoding="ascii"
    )
    assert free_memory_bytes(tmp_path) == 5000 * 1024
    v2.write_text("max\n", encoding="ascii")
    v1.write_text("9223372036854771712\n", encoding="ascii")
    assert free_memory_bytes(tmp_path) == 5000 * 1024
    v1.write_text("3000000\n", encoding="ascii")
    assert free_memory_bytes(tmp_path) == 3_000_000
    v2.write_text("2000000\n", encoding="ascii")
    assert free_memory_bytes(tmp_path) == 2_000_000


def test_this_machine_has_memory() -> None:
    free = free_memory_bytes()
    assert free is None or 10**7 < free < 10**14


@pytest.mark.parametrize("engine", ["numpy", "torch"])
def test_advice_is_the_largest_portion_that_fits(engine: Any) -> None:
    compute = ComputeConfig(engine=engine, device="cpu", precision="fp32", threads=2, compile="off")
    config = with_flags(PRESETS["nanogpt"](), {"batch_size": 64}).resolve()

    def needs(rows: int, threads: int = 2, **flags: Any) -> int:
        one_engine = dataclasses.replace(compute, threads=threads)
        return training_bytes(
            with_flags(config, flags | {"micro_batch_size": rows}), V, one_engine, rows
        )

    def advice_for(room: int) -> str:
        return memory_advice(config, V, compute, 32, room)

    assert advice_for(needs(8)).startswith("--micro-batch-size 8 would take ")
    assert advice_for(needs(8) - 1).startswith("--micro-batch-size 4 would take ")
    assert advice_for(needs(1)).startswith("--micro-batch-size 1 would take ")
    less = advice_for(needs(1) - 1)
    if engine == "numpy":
        assert less.startswith("--micro-batch-size 1 --threads 1 would take ")
        assert advice_for(needs(1, 1) - 1).startswith(
            "--micro-batch-size 1 --threads 1 --block-size 128 would take "
        )
    else:
        assert less.startswith("--micro-batch-size 1 --block-size 128 would take ")
    assert advice_for(1000).startswith("choose a smaller model")


if __name__ == "__main__":
    main(*json.loads(sys.argv[1]))
