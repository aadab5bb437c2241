"""References of exercises are what glasslm computes: its operations, its library, its run."""

import dataclasses
import importlib
import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from glasslm import ops
from glasslm.config.schema import ModelConfig
from glasslm.course.learn import check
from glasslm.course.learn.exercise import Case, Exercise
from glasslm.course.learn.exercises import COURSE, load_exercise
from glasslm.course.learn.exercises.encode_bpe import encode_bpe
from glasslm.course.learn.exercises.flash_backward import flash_backward
from glasslm.course.learn.exercises.flash_step import flash_step
from glasslm.course.learn.exercises.train_bpe import train_bpe, train_with
from glasslm.data import tokenizers
from glasslm.engines.numpy import moe, optimizer
from glasslm.engines.numpy.flash import flash_attention
from glasslm.engines.numpy.ops import adapter
from glasslm.inference.evaluation import evaluate
from glasslm.inference.sampling import Sampling, sample_tokens
from glasslm.lab.diagnosis.gradient_trials import scaled_initial_weights
from glasslm.model.flops import flops_per_token
from glasslm.model.parameters import parameter_table


def distinct_cases(exercise: Exercise, seed: int = 5) -> Iterator[Case]:
    yield from exercise.draw_cases(exercise.sizes.distinct, seed)


def close(actual: Any, expected: Any) -> None:
    np.testing.assert_allclose(actual, expected, rtol=1e-10, atol=1e-12)


def test_positions() -> None:
    for case in distinct_cases(exercise := load_exercise("alibi_bias")):
        close(exercise.compute(case).total("bias"), ops.alibi_bias(*case.inputs.values(), "f8"))
    for case in distinct_cases(exercise := load_exercise("sinusoidal_positions")):
        table = ops.sinusoidal_positions(*case.inputs.values(), "f8")
        close(exercise.compute(case).total("table"), table)


def test_initial_matrix_has_the_deviations_of_glasslm() -> None:
    exercise = load_exercise("initial_matrix")
    config = ModelConfig(d_model=64, n_layers=3, n_heads=4)
    table = parameter_table(config, 65)
    normal = np.random.default_rng(0).standard_normal((64, 64))
    for scheme, name, init in (
        ("plain", "blocks.0.attention.q.weight", "plain"),
        ("residual", "blocks.0.attention.o.weight", "scaled"),
        ("xavier", "blocks.0.attention.q.weight", "xavier"),
        ("he", "blocks.0.attention.q.weight", "he"),
    ):
        weights = dict(scaled_initial_weights(table, init, 0))  # type: ignore[arg-type]
        case = Case({}, {"normal": normal, "scheme": scheme, "n_layers": 3})
        ours = exercise.compute(case).total("w")
        assert ours.std() == pytest.approx(float(weights[name].std()), rel=0.1)


def test_updates() -> None:
    for case in distinct_cases(exercise := load_exercise("muon")):
        p, g, m = (array.copy() for array in case.inputs.values())
        ops.muon(p, g, m, **case.options)
        close(exercise.compute(case).total("new m"), m)
        close(exercise.compute(case).total("change of p"), p - case.inputs["p"])
    exercise = load_exercise("orthogonalize")
    for case in distinct_cases(exercise):
        five = Case(case.sizes, case.inputs | {"steps": 5})
        close(exercise.compute(five).total("x"), optimizer.orthogonalize(case.inputs["g"]))
    for case in distinct_cases(exercise := load_exercise("clip_by_norm")):
        *gradients, max_norm = case.inputs.values()
        (dw, db), norm = ops.clip_by_norm(gradients, max_norm)
        reference = exercise.compute(case)
        for name, expected in (("clipped dw", dw), ("clipped db", db), ("norm", norm)):
            close(reference.total(name), expected)


def test_dropout_is_that_of_the_engine_with_its_mask() -> None:
    exercise, x = load_exercise("dropout"), np.random.default_rng(1).standard_normal((4, 5))
    y, backward = ops.dropout(x, 0.4, seed=3)
    case = Case({}, {"x": x, "uniform": np.where(y == 0, 0.1, 0.9), "p": 0.4}, {}, x[::-1])
    close(exercise.compute(case).total("y"), y)
    close(exercise.compute(case).total("dx"), backward(x[::-1]))


def test_mixture_has_the_gates_of_the_engine() -> None:
    for case in distinct_cases(exercise := load_exercise("mixture")):
        logits, outputs, k = case.inputs.values()
        gates, expert_ids, _, route_back = moe.route(logits, k, 1, np.empty)
        rows = np.arange(len(logits))[:, None]
        reference = exercise.compute(case)
        close(reference.total("y"), np.vecmat(gates, outputs[rows, expert_ids]))
        dgates = np.vecdot(outputs[rows, expert_ids], case.dy[:, None])
        close(reference.total("dlogits"), route_back(dgates, 0.0, 0.0))


def test_lora_is_the_adapter_of_the_engine() -> None:
    for case in distinct_cases(exercise := load_exercise("lora")):
        x, w, a, b, alpha = case.inputs.values()
        y, backward = adapter(x, a, b, alpha / len(a), np.empty)
        dx, da, db = backward(case.dy)
        reference = exercise.compute(case)
        close(reference.total("y"), x @ w.T + y)
        for name, gradient in (("dx", case.dy @ w + dx), ("da", da), ("db", db)):
            close(reference.total(name), gradient)


def test_sampling() -> None:
    for case in distinct_cases(exercise := load_exercise("sample")):
        logits, uniform, *settings = case.inputs.values()
        token = sample_tokens(logits[None], Sampling(*settings), [uniform])[0]
        assert exercise.compute(case).total("token") == token


@pytest.mark.parametrize("seed", range(4))
def test_byte_pair_encoding_is_that_of_the_library(seed: int) -> None:
    letters = np.random.default_rng(seed).integers(0, 4, 120) + ord("a")
    text = bytes(letters.tolist()).decode()
    tokenizer = tokenizers.train_bpe([text], 256 + 20)
    assert isinstance(tokenizer, tokenizers.SubwordTokenizer)
    merges = train_bpe(letters.tolist(), 20)
    tokens = {i: bytes([i]) for i in range(256)}
    for i, (left, right) in enumerate(merges, 256):
        tokens[i] = tokens[left] + tokens[right]
    assert [(tokens[left], tokens[right]) for left, right in merges] == tokenizer.merges
    new = text[::-1] + text[::2]
    ours = [tokens[i] for i in encode_bpe(list(new.encode()), merges)]
    assert ours == [tokenizer.token_bytes[i] for i in tokenizer.encode(new)]


def test_flash_tiles_give_the_attention_of_the_engine() -> None:
    """One head, causal, in tiles of 4: the exercises' steps, forward and backward."""
    T, Q, tile = 12, 5, 4
    rng = np.random.default_rng(2)
    q, k, v, dout = rng.standard_normal((4, T, Q))
    qk = np.stack([q, k], 1)[None].copy()
    y, backward = flash_attention(qk, v[None, :, None], None, 0, np.empty, tile)
    dqkv = backward(dout[None, :, None].copy())[0]
    out, log = np.empty((T, Q)), np.empty(T)
    dq, dk, dv = np.zeros((3, T, Q))
    for start in range(0, T, tile):
        rows = slice(start, start + tile)
        state = np.full(tile, -np.inf), np.zeros(tile), np.zeros((tile, Q))
        for first in range(0, start + tile, tile):
            keys = slice(first, first + tile)
            scores = q[rows] @ k[keys].T / math.sqrt(Q)
            hidden = np.arange(first, first + tile) > np.arange(start, start + tile)[:, None]
            state = flash_step(np.where(hidden, -np.inf, scores), v[keys], *state)
        out[rows], log[rows] = state[2] / state[1][:, None], state[0] + np.log(state[1])
    close(out, y[0, :, 0])
    delta = np.vecdot(dout, out)
    for i in range(T):  # tiles of one query and one key, so that none is hidden
        for j in range(i + 1):
            a, b = slice(i, i + 1), slice(j, j + 1)
            parts = flash_backward(q[a], k[b], v[b], dout[a], log[a], delta[a])
            dq[a] += parts[0]
            dk[b] += parts[1]
            dv[b] += parts[2]
    close(dqkv, np.stack([dq, dk, dv], 1))


def test_measures_of_an_evaluation() -> None:
    exercise = load_exercise("perplexity_and_bpb")
    case = exercise.draw_cases(exercise.sizes.distinct, 0)[1]
    nats, byte_lengths = case.inputs.values()

    class GivenLosses:
        def losses(self, inputs: Any, targets: Any) -> Any:
            return nats[targets]

    tokens = np.array([0, *range(len(nats))])
    score = evaluate(GivenLosses(), tokens, byte_lengths, len(nats))  # type: ignore[arg-type]
    reference = exercise.compute(case)
    assert float(reference.total("perplexity")) == pytest.approx(score.perplexity)
    assert float(reference.total("bpb")) == pytest.approx(score.bpb)


def test_counts_are_those_of_the_table() -> None:
    for case in distinct_cases(exercise := load_exercise("count_parameters")):
        V, L, D, H, K, F, tied = case.inputs.values()
        config = ModelConfig(
            n_layers=L, d_model=D, n_heads=H, n_kv_heads=K, d_ff=F, tie_embeddings=tied
        )
        assert exercise.compute(case).total("count") == parameter_table(config, V).total
    for case in distinct_cases(exercise := load_exercise("training_flops")):
        V, L, D, H, K, F, T = case.inputs.values()
        config = ModelConfig(n_layers=L, d_model=D, n_heads=H, n_kv_heads=K, d_ff=F, block_size=T)
        for tied in (True, False):
            model = dataclasses.replace(config, tie_embeddings=tied)
            assert exercise.compute(case).total("flops") == pytest.approx(flops_per_token(model, V))


SOLVED_HERE = [
    name for name in COURSE if load_exercise(name).solution.startswith("course/learn/exercises/")
]


@pytest.mark.parametrize("name", SOLVED_HERE)
def test_solutions_that_learners_see_are_right(name: str) -> None:
    exercise = load_exercise(name)
    module = importlib.import_module(f"glasslm.course.learn.exercises.{name}")
    solution = getattr(module, exercise.solution.partition(":")[2])
    for seed in range(3):
        assert check(solution, name, seed).verdict == "right"


def test_training_with_mistakes_is_right_without_one() -> None:
    for case in distinct_cases(load_exercise("train_bpe")):
        assert train_with(*case.inputs.values()) == train_bpe(*case.inputs.values())
