"""Operations of a file in both engines: the reference's curve, and faults in one line."""

import dataclasses
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from glasslm.config.schema import (
    ModelConfig,
    OperationsConfig,
    OptimizerConfig,
    RunConfig,
    TrainConfig,
)
from glasslm.engines.numpy.engine import NumpyEngine
from glasslm.engines.numpy.operations import array_operations
from glasslm.engines.operation_call import OperationError
from glasslm.engines.operations import SIGNATURES, admit_operations, read_operations
from glasslm.engines.protocol import Batch, Engine
from glasslm.errors import InputError
from glasslm.model.parameters import initial_weights, parameter_table

Array = NDArray[Any]
V, B, T = 11, 4, 8

# Each operation as a learner writes it in plain NumPy, and the settings of a model that uses it.
SOURCES = Path(__file__).with_name("plain_operations.py").read_text(encoding="utf-8")
MODELS: dict[str, dict[str, Any]] = {
    "embedding": {},
    "linear": {},
    "rms_norm": {"qk_norm": True, "n_kv_heads": 2},
    "layer_norm": {"norm": "layernorm"},
    "silu": {"n_experts": 4},
    "gelu": {"feedforward": "geglu"},
    "relu": {"feedforward": "relu"},
    "relu2": {"feedforward": "relu2"},
    "softmax": {"window": 3, "attention_dropout": 0.2, "position": "alibi"},
    "rope": {},
    "attention": {"n_kv_heads": 2},
    "cross_entropy": {},
    "adamw": {},
    "muon": {},
    "sgd": {},
}
# The same operation for tensors: with autograd, and with its own backward pass.
TORCH_SILU = "import torch\ndef silu(x):\n    return x * torch.sigmoid(x)\n"
TORCH_PAIR = (
    "import torch\ndef silu(x):\n    s = torch.sigmoid(x)\n"
    "    return x * s, lambda dy: dy * (s + x * s * (1 - s))\n"
)


def select(name: str) -> str:
    """The text of plain_operations.py in which only one function has the name of an operation."""
    return re.sub(
        r"\b(" + "|".join(SIGNATURES) + r")\(",
        lambda match: match[0] if match[1] == name else f"_{match[0]}",
        SOURCES,
    )


def make_config(**model: Any) -> RunConfig:
    sizes = {"d_model": 16, "n_layers": 2, "n_heads": 4, "block_size": T + 1}
    return RunConfig(
        ModelConfig(**sizes, **model), train=TrainConfig(batch_size=B, micro_batch_size=2)
    ).resolve()


def with_file(config: RunConfig, path: Path, text: str) -> RunConfig:
    path.write_text(text, encoding="utf-8")
    return admit_operations(dataclasses.replace(config, operations=OperationsConfig(str(path))))


def make_engine(engine: str, config: RunConfig) -> Engine:
    made: Engine
    if engine == "numpy":
        made = NumpyEngine(config, V, threads=1, dtype=np.float64)
    else:
        pytest.importorskip("torch")
        from glasslm.engines.torch.engine import TorchEngine

        made = TorchEngine(config, V, device="cpu", precision="fp64", threads=1)
    rng = np.random.default_rng(5)
    made.load(
        (name, w + 0.1 * rng.standard_normal(w.shape))
        for name, w in initial_weights(parameter_table(config.model, V), 0)
    )
    return made


def batches(count: int) -> list[Batch]:
    rng = np.random.default_rng(0)
    made = []
    for step in range(count):
        tokens, targets = rng.integers(0, V, (2, B, T))
        targets[0, 2] = -1
        made.append(Batch(tokens, targets, step, np.arange(B)))
    return made


def results(engine: Engine) -> dict[str, Array]:
    """Losses and norms of three steps, then losses and logits with a cache in two ways."""
    numbers = []
    for batch in batches(3):
        numbers.append(engine.accumulate(batch, 1 / 31).cross_entropy)
        numbers.append(engine.update(1e-2).norm)
    tokens, targets = batches(1)[0][:2]
    cache = engine.new_cache(B, T)
    one = np.ones(B, np.int64)
    cached = [engine.logits(tokens[:, t : t + 1], cache, one, every=True) for t in range(T)]
    ragged = engine.new_cache(B, T)
    lengths = np.array([3, 1, T - 1, 5])
    engine.logits(tokens, ragged, lengths)
    after = engine.logits(tokens[np.arange(B), lengths][:, None], ragged, one)
    return {
        "training": np.array(numbers),
        "losses": engine.losses(tokens, targets),
        "cached": np.concatenate(cached, axis=1),
        "ragged": after,
        "the same positions": np.concatenate(cached, axis=1)[np.arange(B), lengths],
    }


@pytest.mark.parametrize("engine", ["numpy", "torch"])
@pytest.mark.parametrize("name", MODELS)
def test_a_plain_copy_of_an_operation_trains_like_the_engines(
    name: str, engine: str, tmp_path: Path
) -> None:
    optimizer = name if name in ("adamw", "sgd") else "muon"
    config = dataclasses.replace(
        make_config(**MODELS[name]),
        optimizer=OptimizerConfig(optimizer),  # type: ignore[arg-type]
    )
    expected = results(make_engine("numpy", config))
    actual = results(make_engine(engine, with_file(config, tmp_path / "own.py", select(name))))
    for part, numbers in expected.items():
        np.testing.assert_allclose(actual[part], numbers, rtol=1e-10, atol=1e-12, err_msg=part)
    np.testing.assert_allclose(actual["ragged"], actual["the same positions"], rtol=1e-10)


@pytest.mark.parametrize("engine", ["numpy", "torch"])
@pytest.mark.parametrize("name", MODELS)
def test_every_path_computes_with_the_operation_of_the_file(
    name: str, engine: str, tmp_path: Path
) -> None:
    """An operation that counts its calls is called in training, and where it has a part there."""
    log = tmp_path / "calls"
    text = select(name) + (
        f"\n_inner_{name} = {name}\n"
        f"def {name}(*inputs, **settings):\n"
        f"    with open({str(log)!r}, 'a') as log:\n        log.write('x')\n"
        f"    return _inner_{name}(*inputs, **settings)\n"
    )
    config = dataclasses.replace(
        make_config(**MODELS[name]),
        optimizer=OptimizerConfig(name if name in ("adamw", "sgd") else "muon"),  # type: ignore[arg-type]
    )
    made = make_engine(engine, with_file(config, tmp_path / "own.py", text))

    def calls(act: Callable[[], object]) -> int:
        log.write_text("")
        act()
        return len(log.read_text())

    batch = batches(1)[0]
    is_optimizer = not SIGNATURES[name].gradients
    assert bool(calls(lambda: made.accumulate(batch, 1 / 31))) != is_optimizer
    assert bool(calls(lambda: made.update(1e-2))) == is_optimizer
    assert bool(calls(lambda: made.losses(*batch[:2]))) != is_optimizer
    cache = made.new_cache(B, T)
    has_part = not is_optimizer and name != "cross_entropy"
    for tokens in (batch.tokens[:, :5], batch.tokens[:, 5:6]):
        counts = np.full(B, tokens.shape[1])
        assert bool(calls(lambda t=tokens, c=counts: made.logits(t, cache, c))) == has_part


@pytest.mark.parametrize("norm", ["rmsnorm", "rmsnorm1p", "layernorm"])
def test_both_engines_replace_the_same_norms(norm: str, tmp_path: Path) -> None:
    """The file's rms_norm is no norm. With rmsnorm1p it takes the place of qk-norm alone."""
    text = (
        "def rms_norm(x, gain, eps):\n"
        "    return 2 * x * gain, lambda dy: (2 * dy * gain, (2 * dy * x).sum(0))\n"
    )
    config = with_file(make_config(norm=norm, qk_norm=True), tmp_path / "own.py", text)
    expected = results(make_engine("numpy", config))
    actual = results(make_engine("torch", config))
    for part, numbers in expected.items():
        np.testing.assert_allclose(actual[part], numbers, rtol=1e-8, atol=1e-10, err_msg=part)


@pytest.mark.parametrize("engine", ["numpy", "torch"])
@pytest.mark.parametrize("text", [TORCH_SILU, TORCH_PAIR], ids=["autograd", "own backward"])
def test_an_operation_for_tensors_works_in_both_engines(
    text: str, engine: str, tmp_path: Path
) -> None:
    pytest.importorskip("torch")
    config = make_config()
    expected = results(make_engine("numpy", config))
    actual = results(make_engine(engine, with_file(config, tmp_path / "own.py", text)))
    for part, numbers in expected.items():
        np.testing.assert_allclose(actual[part], numbers, rtol=1e-9, atol=1e-12, err_msg=part)


# What is wrong -> the text of a file, and words of the message. Each begins in line 1.
FAULTS: dict[str, tuple[str, list[str]]] = {
    "shape": ("def silu(x):\n    return x[:1], lambda dy: dy\n", ["line 1", "shape (1, "]),
    "dtype": (
        "import numpy as np\ndef silu(x):\n    return x.astype('f2'), lambda dy: dy\n",
        ["line 2", "float16", "expected float64"],
    ),
    "nan": (
        "def silu(x):\n    return x * float('nan'), lambda dy: dy\n",
        ["line 1", "nan in output"],
    ),
    "no pair": ("def silu(x):\n    return x\n", ["line 1", "output, backward"]),
    "nothing": ("def silu(x):\n    pass\n", ["line 1", "returned nothing"]),
    "exception": ("def silu(x):\n    y = x\n    return y / None\n", ["line 3", "TypeError"]),
    "exit": ("import sys\ndef silu(x):\n    sys.exit()\n", ["line 3", "SystemExit"]),
    "changed input": ("def silu(x):\n    x *= 2\n    return x, None\n", ["line 2", "in place"]),
    "changed gradient": (
        "def silu(x):\n    def backward(dy):\n        dy *= x\n        return dy\n"
        "    return x * 1, backward\n",
        ["line 3", "backward changes an input in place"],
    ),
    "gradient's shape": (
        "def silu(x):\n    return x * 1, lambda dy: dy.sum(0)\n",
        ["line 2", "backward returned dx with the shape"],
    ),
    "no gradient": (
        "def silu(x):\n    return x * 1, lambda dy: None\n",
        ["line 2", "backward returned nothing: expected dx"],
    ),
    "one gradient of two": (
        "def rms_norm(x, gain, eps):\n    return x * gain, lambda dy: dy\n",
        ["line 2", "expected (dx, dgain)"],
    ),
    "optimizer": (
        "def adamw(p, g, m, v, *, t, lr, decay, betas, eps):\n    p = p - lr * g\n",
        ["line 1", "changed neither p nor a moment"],
    ),
    "tensors": (
        "import torch\ndef silu(x):\n    return x.sum(-1)\n", ["line 2", "with the shape"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("engine", ["numpy", "torch"])
@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_one_line_with_the_operation_the_call_and_the_line(
    fault: str, engine: str, tmp_path: Path
) -> None:
    text, words = FAULTS[fault]
    if "torch" in text:
        pytest.importorskip("torch")
    path = tmp_path / "own.py"
    made = make_engine(engine, with_file(make_config(), path, text))

    def do_step() -> None:
        made.accumulate(batches(1)[0], 1 / 31)
        made.update(1e-2)

    with pytest.raises(OperationError) as caught:
        do_step()
    message = str(caught.value)
    assert message.startswith(str(path))
    assert "\n" not in message
    for word in (*words, "update 1" if fault == "optimizer" else "step 1"):
        assert word in message
    if fault != "optimizer":
        assert re.search(r"\((blocks\.\d|norm)", message)


@pytest.mark.parametrize("imports", ["", "import torch\n"])
def test_nan_of_numbers_that_overflow_is_not_a_fault_of_the_file(
    imports: str, tmp_path: Path
) -> None:
    if imports:
        pytest.importorskip("torch")
    path = tmp_path / "own.py"
    path.write_text(imports + "def silu(x):\n    return x * x - x * x, lambda dy: 0 * dy\n")
    silu = array_operations(read_operations(path))["silu"]
    with np.errstate(all="ignore"):
        y, _ = silu(np.full((2, 3), 1e30, np.float32))
    assert np.isnan(y).all()


UNSUPPORTED = {
    "attention": [
        {"window": 3},
        {"position": "alibi"},
        {"attention_dropout": 0.1},
        {"attention": "flash"},
        {"document_attention": True, "document_end_id": 1},
    ],
    "softmax": [{"attention": "flash"}, {"n_experts": 4}],
    "linear": [{"lora_rank": 2}],
}


@pytest.mark.parametrize(
    ("name", "settings"), [(name, case) for name, cases in UNSUPPORTED.items() for case in cases]
)
@pytest.mark.parametrize("engine", ["numpy", "torch"])
def test_what_a_signature_cannot_express_is_refused_by_name(
    name: str, settings: dict[str, Any], engine: str, tmp_path: Path
) -> None:
    config = with_file(make_config(**settings), tmp_path / "own.py", select(name))
    with pytest.raises(InputError, match=f"{name} cannot be replaced with --"):
        make_engine(engine, config)


def test_code_is_not_run_unless_the_user_names_its_file(tmp_path: Path) -> None:
    unseen = OperationsConfig(str(tmp_path / "own.py"), "0" * 64)
    with pytest.raises(InputError, match="not executed unasked"):
        make_engine("numpy", dataclasses.replace(make_config(), operations=unseen))
