"""The scheduler: a text does not depend on its neighbours, on chunks or on shared prefixes."""

import dataclasses
import importlib.util

import numpy as np
import pytest

from glasslm.config.schema import ComputeConfig, ModelConfig, RunConfig
from glasslm.data.tokenizers import CharTokenizer
from glasslm.engines.factory import make_engine
from glasslm.inference.request import Request, Token
from glasslm.inference.sampling import Sampling
from glasslm.inference.scheduler import Scheduler
from glasslm.model.parameters import initial_weights

LETTERS = CharTokenizer("\nabcdefghijklmnopqrstuvwxyz")
ENGINES = [
    "numpy",
    pytest.param(
        "torch",
        marks=pytest.mark.skipif(not importlib.util.find_spec("torch"), reason="needs torch"),
    ),
]
MODELS = {
    "rope": ModelConfig(d_model=48, n_layers=2, n_heads=4, n_kv_heads=2, block_size=160),
    "learned": ModelConfig(
        d_model=40, n_layers=2, n_heads=2, block_size=96, norm="layernorm", feedforward="gelu",
        position="learned", bias=True,
    ),
    "alibi": ModelConfig(d_model=32, n_layers=1, n_heads=4, block_size=80, position="alibi"),
    "rolling": ModelConfig(d_model=32, n_layers=2, n_heads=2, block_size=80, window=24),
    "experts": ModelConfig(
        d_model=32, n_layers=2, n_heads=2, block_size=80, n_experts=4, experts_per_token=2
    ),
}  # fmt: skip


def build_engine(config, engine="numpy", precision="fp32"):
    """An engine with weights so large that a wrong position or mask shows."""
    compute = ComputeConfig(engine=engine, device="cpu", precision=precision, threads=2)
    built = make_engine(RunConfig(model=config).resolve(), LETTERS.vocab_size, compute)
    rng = np.random.default_rng(0)
    built.load(
        (name, w + 0.1 * rng.standard_normal(w.shape))
        for name, w in initial_weights(built.table, 0)
    )
    return built


def build_scheduler(name="rope", engine="numpy", precision="fp32", slots=32):
    config = MODELS[name].resolve()
    return Scheduler(build_engine(config, engine, precision), LETTERS, config, slots=slots)


def run(scheduler, arrivals):
    """{request's index: its events}; arrivals: {step: requests}, in order."""
    events, numbers, step = {}, {}, 0
    arrivals = dict(arrivals)
    while arrivals or scheduler.has_work:
        for request in arrivals.pop(step, []):
            stream = scheduler.submit(request)
            numbers[stream] = len(numbers)
        for stream, event in scheduler.step():
            events.setdefault(numbers[stream], []).append(event)
        step += 1
    return events


def random_request(rng, **settings):
    ids = rng.integers(0, LETTERS.vocab_size, rng.integers(1, 150)).tolist()
    sampling = Sampling(temperature=rng.choice([0.0, 1.0]), seed=int(rng.integers(100)))
    return Request(ids, int(rng.integers(1, 40)), sampling, top_logprobs=3, **settings)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", MODELS)
def test_logits_do_not_depend_on_the_neighbours_bit_for_bit(name, engine):
    """Alone, beside 6 and beside 31 others that arrive in any order, sharing prefixes or not."""
    rng = np.random.default_rng(1)
    request = random_request(rng)
    request = dataclasses.replace(request, max_new_tokens=60)
    scheduler = build_scheduler(name, engine)
    (alone,) = run(scheduler, {0: [request]}).values()
    assert len([event for event in alone if isinstance(event, Token)]) == 60
    for neighbours in (6, 31):
        scheduler = build_scheduler(name, engine)
        arrivals, order = {}, rng.permutation(neighbours + 1)
        for index in order:
            other = random_request(rng)
            if index % 3 == 0:
                shared = request.ids[: rng.integers(1, len(request.ids) + 1)]
                other = dataclasses.replace(other, ids=[*shared, *other.ids])
            arrivals.setdefault(int(rng.integers(0, 40)), []).append(
                (index, request if index == 0 else other)
            )
        numbered = [pair for step in sorted(arrivals) for pair in arrivals[step]]
        answers = run(
            scheduler, {step: [r for _, r in pairs] for step, pairs in sorted(arrivals.items())}
        )
        place = [index for index, _ in numbered].index(0)
        assert [e[:4] for e in answers[place] if isinstance(e, Token)] == [
            e[:4] for e in alone if isinstance(e, Token)
        ]
