"""Label smoothing and z-loss in both engines, against PyTorch's own functions, and their reports.

The reported loss stays the cross-entropy. The terms are sums over the targets, like the nats.
"""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from glasslm.config.schema import (
    ComputeConfig,
    ModelConfig,
    OptimizerConfig,
    Precision,
    RunConfig,
    TrainConfig,
)
from glasslm.data.batch_sampler import make_sampler
from glasslm.engines.factory import make_engine
from glasslm.engines.numpy.softmax_terms import SOFTMAX_TERMS
from glasslm.engines.objective import coefficients, objective
from glasslm.engines.protocol import Batch, Losses
from glasslm.model.parameters import initial_weights, parameter_table
from glasslm.runs import checkpoint, run_folder
from glasslm.training import launch
from small_runs import (
    COMPUTE,
    ignore_message,
    logged_lines,
    small_config,
    without_report,
    write_text,
)

Array = np.ndarray[Any, Any]
V, B, T = 11, 4, 6
MODEL = ModelConfig(d_model=16, n_layers=2, n_heads=2, d_ff=24, block_size=T)
TERMS = [
    {"label_smoothing": 0.2},
    {"z_loss": 0.3},
    {"label_smoothing": 0.1, "z_loss": 0.05},
]


@pytest.fixture(params=["numpy", "torch"])
def engine_name(request: pytest.FixtureRequest) -> str:
    if request.param == "torch":
        pytest.importorskip("torch")
    return request.param


def build_engine(
    engine_name: str,
    micro: int = 2,
    precision: Precision = "fp64",
    model: ModelConfig = MODEL,
    **terms: float,
) -> Any:
    """An engine with weights so large that the logits are far apart."""
    config = RunConfig(
        model,
        optimizer=OptimizerConfig(**terms),
        train=TrainConfig(batch_size=B, micro_batch_size=micro),
    )
    compute = ComputeConfig(engine=engine_name, device="cpu", precision=precision, threads=1)  # type: ignore[arg-type]
    engine = make_engine(config, V, compute, training=True)
    draw = np.random.default_rng(0)
    start = initial_weights(parameter_table(config.model, V), 0, np.float64)
    engine.load((name, array + 0.3 * draw.standard_normal(array.shape)) for name, array in start)
    return engine


def make_batch(masked: bool = True) -> Batch:
    text = np.random.default_rng(3).integers(0, V, (B, T + 1))
    targets = text[:, 1:].copy()
    if masked:
        targets[0, 2:4] = targets[3, -1] = -1
    return Batch(text[:, :-1], targets, 0, np.arange(B))


def mean_weight(batch: Batch) -> float:
    return 1 / np.count_nonzero(batch.targets >= 0)


def loss_terms(losses: Losses) -> dict[str, float]:
    return {"cross_entropy": losses.cross_entropy, **losses.auxiliary}


# -- against PyTorch's own functions ---------------------------------------------------------------


def torch_objective(
    logits: Any, targets: Any, label_smoothing: float = 0.0, z_loss: float = 0.0
) -> Any:
    """The objective, as a mean over the targets, by PyTorch's functions."""
    torch = pytest.importorskip("torch")
    nats = torch.nn.functional.cross_entropy(
        logits, targets, ignore_index=-1, label_smoothing=label_smoothing
    )
    return nats + z_loss * torch.logsumexp(logits[targets >= 0], -1).square().mean()


@pytest.mark.parametrize("terms", TERMS, ids=str)
def test_what_is_minimized_is_what_pytorch_says(engine_name: str, terms: dict[str, float]) -> None:
    """The value and every gradient. The logits are the engine's, the rest is PyTorch's."""
    torch = pytest.importorskip("torch")
    data, model = make_batch(), build_engine("torch").model
    logits, _ = model(torch.from_numpy(data.tokens))
    logits, targets = logits.flatten(0, 1), torch.from_numpy(data.targets).flatten()
    expected = torch_objective(logits, targets, **terms)
    expected.backward()

    engine = build_engine(engine_name, **terms)
    losses = engine.accumulate(data, mean_weight(data))
    assert objective(losses, engine.config) == pytest.approx(expected.item(), rel=1e-12)
    assert losses.cross_entropy == pytest.approx(torch_objective(logits, targets).item(), rel=1e-12)
    gradients = engine.gradients(data, mean_weight(data))
    largest = max(float(p.grad.abs().max()) for p in model.parameters())
    for name, p in model.named_parameters():
        np.testing.assert_allclose(
            gradients[name], p.grad.numpy(), rtol=0, atol=1e-12 * largest, err_msg=name
        )


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("name", SOFTMAX_TERMS)
def test_the_ops_stay_exact_where_an_exponential_would_overflow(name: str, dtype: Any) -> None:
    """Logits of hundreds, a row without a target, and the type of what comes in."""
    torch = pytest.importorskip("torch")
    draw = np.random.default_rng(1)
    logits = (300 * draw.standard_normal((7, V))).astype(dtype)
    targets = np.array([3, 0, -1, V - 1, 5, 5, 0])
    x = torch.tensor(logits, dtype=torch.float64, requires_grad=True)
    valid = torch.from_numpy(targets >= 0)
    if name == "z":
        nats = torch.logsumexp(x, -1).square() * valid
    else:  # the mean nats of all symbols minus those of the target
        log_p = torch.log_softmax(x, -1)
        hit = log_p[torch.arange(7), torch.from_numpy(np.maximum(targets, 0))]
        nats = (hit - log_p.mean(-1)) * valid
    (0.25 * nats.sum()).backward()

    values, backward = SOFTMAX_TERMS[name](
        logits, targets, lambda shape: np.full(shape, np.nan, dtype)
    )
    gradient = backward(0.25)
    assert values.dtype == gradient.dtype == dtype
    tolerance = 1e-12 if dtype is np.float64 else 1e-5
    np.testing.assert_allclose(values, nats.detach().numpy(), rtol=tolerance, atol=1e-3 * tolerance)
    largest = float(x.grad.abs().max())
    np.testing.assert_allclose(gradient, x.grad.numpy(), rtol=0, atol=tolerance * largest)
    assert not gradient[2].any()


# -- sums over targets -----------------------------------------------------------------------------

BOTH = TERMS[-1]


@pytest.mark.parametrize("micro", [1, 3, B])
def test_micro_batches_do_not_change_the_sums(engine_name: str, micro: int) -> None:
    whole, parts = (
        build_engine(engine_name, micro=2, **BOTH),
        build_engine(engine_name, micro=micro, **BOTH),
    )
    data = make_batch()
    expected = loss_terms(whole.accumulate(data, mean_weight(data)))
    assert loss_terms(parts.accumulate(data, mean_weight(data))) == pytest.approx(
        expected, rel=1e-12
    )
    first, second = (engine.gradients(data, mean_weight(data)) for engine in (whole, parts))
    for name in first:
        np.testing.assert_allclose(second[name], first[name], rtol=1e-9, atol=1e-13, err_msg=name)


def test_parts_of_a_batch_are_parts_of_the_sums(engine_name: str) -> None:
    """Each part has the weight of the whole step, as on the ranks of a group."""
    engine, data = build_engine(engine_name, **BOTH), make_batch()
    whole = loss_terms(engine.accumulate(data, mean_weight(data)))
    halves = [
        Batch(data.tokens[r], data.targets[r], 0, data.rows[r]) for r in (slice(0, 1), slice(1, B))
    ]
    first, second = (loss_terms(engine.accumulate(half, mean_weight(data))) for half in halves)
    assert {name: first[name] + second[name] for name in whole} == pytest.approx(whole, rel=1e-12)


def test_a_position_without_a_target_has_no_term(engine_name: str) -> None:
    """A padded text counts as the text without its padding."""
    data = make_batch(masked=False)
    targets = data.targets.copy()
    targets[:, 4:] = -1
    engine = build_engine(engine_name, **BOTH)
    padded = Batch(data.tokens, targets, 0, data.rows)
    shorter = Batch(data.tokens[:, :4], data.targets[:, :4], 0, data.rows)
    expected = loss_terms(engine.accumulate(shorter, mean_weight(shorter)))
    assert loss_terms(engine.accumulate(padded, mean_weight(padded))) == pytest.approx(
        expected, rel=1e-12
    )
    first = {
        name: array.copy() for name, array in engine.gradients(padded, mean_weight(padded)).items()
    }
    for name, gradient in engine.gradients(shorter, mean_weight(shorter)).items():
        np.testing.assert_allclose(first[name], gradient, rtol=1e-9, atol=1e-13, err_msg=name)


# -- reports ---------------------------------------------------------------------------------------


def test_the_loss_stays_the_cross_entropy(engine_name: str) -> None:
    """It has the same bits as without the terms. Validation reports nothing else."""
    data, without, with_terms = (
        make_batch(),
        build_engine(engine_name),
        build_engine(engine_name, **BOTH),
    )
    without_terms = without.accumulate(data, mean_weight(data))
    losses = with_terms.accumulate(data, mean_weight(data))
    assert losses.cross_entropy == without_terms.cross_entropy
    assert (without_terms.auxiliary, set(losses.auxiliary)) == ({}, {"smoothing", "z"})
    nats = with_terms.losses(data.tokens, data.targets)
    np.testing.assert_array_equal(nats, without.losses(data.tokens, data.targets))
    assert losses.cross_entropy == pytest.approx(nats.sum() * mean_weight(data), rel=1e-12)


def test_terms_have_the_coefficients_that_were_given_and_no_others() -> None:
    config = RunConfig(MODEL, optimizer=OptimizerConfig(label_smoothing=0.25, z_loss=0.5))
    assert coefficients(config) == {"smoothing": 0.25, "z": 0.5}
    assert objective(Losses(2.0, {"smoothing": 4.0, "z": 3.0}), config) == 2 + 1 + 1.5
    assert coefficients(RunConfig(MODEL)) == {}
    experts = RunConfig(
        ModelConfig(n_experts=2), optimizer=OptimizerConfig(balance_loss=0.0, router_z_loss=0.125)
    )
    assert coefficients(experts) == {"balance": 0.0, "router_z": 0.125}


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text(tmp_path_factory.mktemp("text") / "text.txt")


def test_the_terms_are_reported_in_the_lines_of_the_steps(text: Path, tmp_path: Path) -> None:
    """As the engine returns them for that batch, without coefficients. Validation has nats only."""
    flags: dict[str, Any] = {
        "max_steps": 2,
        "eval_interval": 1,
        "checkpoint_interval": 1,
        "sample_interval": 0,
    }
    with without_report():
        for name, terms in {"plain": {}, "terms": BOTH | {"n_experts": 4}}.items():
            launch.train(
                small_config(text, **flags | terms), COMPUTE, tmp_path / name, notify=ignore_message
            )
    run = run_folder.Run(tmp_path / "terms")
    dataset = run.dataset(ignore_message)
    rows = np.arange(run.config.train.batch_size)
    inputs, targets = make_sampler(run.config, dataset).batch(dataset.train.tokens, 1, rows)
    engine = make_engine(run.config, run.tokenizer.vocab_size, COMPUTE)
    saved = checkpoint.load(run.path, 1)
    engine.load(saved.state(), saved.position.updates)
    losses = engine.accumulate(Batch(inputs, targets, 1, rows), 1 / targets.size)
    line = logged_lines(run.path, "step")[1]
    assert line["auxiliary"] == losses.auxiliary
    assert set(line["auxiliary"]) == {"smoothing", "z", "balance", "router_z"}
    assert line["loss"] == losses.cross_entropy
    shares = np.array(line["experts"])
    assert shares.shape == (2, 4)
    np.testing.assert_allclose(shares.sum(-1), 1, atol=1e-3)
    assert all(
        "auxiliary" not in line and "experts" not in line for line in logged_lines(run.path, "eval")
    )
    assert all("auxiliary" not in line for line in logged_lines(tmp_path / "plain", "step"))


def test_smoothing_keeps_the_model_from_certainty(text: Path, tmp_path: Path) -> None:
    """And z-loss keeps the sum of the softmax from drifting: measured after a short training."""

    def train_and_read(name: str, **terms: float) -> tuple[float, float]:
        config = small_config(
            text, max_steps=60, eval_interval=60, checkpoint_interval=60, sample_interval=0, **terms
        )
        with without_report():
            launch.train(config, COMPUTE, tmp_path / name, notify=ignore_message)
        line = logged_lines(tmp_path / name, "step")[-1]
        # A tiny coefficient reports the terms of a run that is trained without them.
        return line["auxiliary"]["smoothing"], line["auxiliary"]["z"]

    margin, z = train_and_read("plain", label_smoothing=1e-6, z_loss=1e-9)
    assert train_and_read("smooth", label_smoothing=0.3, z_loss=1e-9)[0] < 0.7 * margin
    assert train_and_read("z", label_smoothing=1e-6, z_loss=0.1)[1] < 0.2 * z
