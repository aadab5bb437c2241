"""The numbers of the microscope, against the model itself, sums that hold and steps really made."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from doubles import make_record
from glasslm.config.schema import ComputeConfig, ModelConfig, OptimizerConfig, RunConfig
from glasslm.data.answer_targets import AnswerFormat
from glasslm.data.chat.conversation_rows import Conversations
from glasslm.data.dataset import Split
from glasslm.data.tokenizers import CharTokenizer
from glasslm.engines.factory import make_engine
from glasslm.engines.inspection import forward_names
from glasslm.errors import InputError
from glasslm.inference.microscope import (
    ablation,
    attention,
    contributions,
    gradients,
    learning,
    lens,
    ngrams,
    patching,
    reading,
    recorded_pass,
    sgd_step,
    writing,
)
from glasslm.inference.microscope.recorded_pass import RecordedPass, choose_candidates, top_tokens
from glasslm.inference.sampling import Sampling, log_probabilities, probabilities
from glasslm.inference.trained_model import Model, load_model
from glasslm.model.parameters import initial_weights, parameter_table
from glasslm.runs import checkpoint, run_folder

ALPHABET = "\n abcdefghijklmnopqrstuvwxyz.,"
TEXT, OTHER = "the cat sat on the mat, the cat", "a dog sat by the mat. the king "
SMALL: dict[str, Any] = {"d_model": 24, "n_layers": 3, "n_heads": 4, "block_size": 48, "d_ff": 40}
VARIANTS: dict[str, dict[str, Any]] = {
    "default": {},
    "gpt2": {"norm": "layernorm", "bias": True, "feedforward": "gelu", "position": "learned"},
    "grouped": {"n_kv_heads": 2, "qk_norm": True, "tie_embeddings": False, "window": 5},
    "experts": {"n_experts": 3, "experts_per_token": 2, "shared_expert": True},
    "adapters": {"lora_rank": 2, "lora_targets": "v,o,down"},
    "no_norm": {"norm": "none", "position": "alibi"},
    "parallel": {"residual": "parallel", "attention_pattern": "wfn", "window": 6},
    "one_norm": {
        "residual": "parallel_one_norm",
        "norm": "layernorm",
        "feedforward": "gelu",
        "tie_embeddings": False,
        "bias_targets": "norm,q,k,v,o,mlp,head",
        "head_dim": 8,
        "partial_rotary_factor": 0.5,
    },
    "gemma": {"norm": "rmsnorm1p", "scale_embeddings": True, "attention_softcap": 4.0},
    "sandwich": {"norm_position": "sandwich"},
    "capped": {"logit_softcap": 3.0},
    "post": {"norm_position": "post"},
}
ADDITIVE = [name for name in VARIANTS if name not in ("sandwich", "capped", "post")]


def make_run(folder: Path, **changes: Any) -> Path:
    """A run of random weights that are large enough for parts to matter."""
    tokenizer = CharTokenizer(ALPHABET)
    model = ModelConfig(**SMALL | changes)
    config = RunConfig(model=model, optimizer=OptimizerConfig(grad_clip=0.0)).resolve()
    run_folder.create_run(folder, make_record(config, tokenizer), tokenizer.to_json())
    run, V = run_folder.Run(folder), tokenizer.vocab_size
    engine = make_engine(config, V, ComputeConfig(engine="numpy", threads=1))
    draw, table = np.random.default_rng(2), parameter_table(config.model, V)
    weights = {
        name: array + 0.15 * draw.standard_normal(array.shape).astype(np.float32)
        for name, array in initial_weights(table, seed=1)
    }
    engine.load(weights.items())
    if config.model.lora_rank:
        checkpoint.save_base(folder, {k: v for k, v in weights.items() if not table[k].trained})
    position = checkpoint.TrainingPosition(3, 3, 0, 0)
    checkpoint.save(folder, engine.state(), position, run.identity)
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("runs")
    return {name: make_run(root / name, **changes) for name, changes in VARIANTS.items()}


Case = tuple[RecordedPass, dict[str, Any]]


def open_case(folders: dict[str, Path], engine: str, variant: str, text: str = TEXT) -> Case:
    if engine == "torch":
        pytest.importorskip("torch")
    model = load_model(folders[variant], engine=engine, precision="fp32", threads=1)  # type: ignore[arg-type]
    weights = checkpoint.load(folders[variant]).weights()
    return RecordedPass(model, model.tokenizer.encode(text)), weights


def both(*variants: str) -> Any:
    """Parametrize a test by both engines and some variants."""
    cases = [(engine, variant) for engine in ("numpy", "torch") for variant in variants]
    return pytest.mark.parametrize(("engine", "variant"), cases)


# -- reading ------------------------------------------------------------------------------------


@both("default", "post")
def test_surprise_is_that_of_the_model(folders: dict[str, Path], engine: str, variant: str) -> None:
    recorded, _ = open_case(folders, engine, variant)
    result = reading.read_text(recorded)
    model = recorded.model
    np.testing.assert_allclose(result.nats[1:], model.losses(TEXT), atol=1e-5)
    assert np.isnan(result.nats[0])
    assert result.bits_per_byte == pytest.approx(model.evaluate(TEXT).bpb, abs=1e-5)
    logprobs = recorded.log_probabilities
    p = np.exp(logprobs)
    np.testing.assert_allclose(result.entropy, -(p * logprobs).sum(-1))
    for t in (0, 7, len(TEXT) - 2):
        order = np.argsort(-logprobs[t], kind="stable")
        assert order.tolist().index(recorded.ids[t + 1]) == result.rank[t + 1]
        assert result.top_ids[t].tolist() == order[:8].tolist()
    last = log_probabilities(model.logits(TEXT))
    np.testing.assert_allclose(result.top_logprobs[-1], last[result.top_ids[-1]], atol=1e-5)


def test_the_distribution_is_that_of_sampling(folders: dict[str, Path]) -> None:
    recorded, _ = open_case(folders, "numpy", "default")
    sampling = Sampling(temperature=0.7, top_k=5, top_p=0.9)
    result = reading.next_token_distribution(recorded, 9, sampling)
    expected = probabilities(recorded["logits"][9], sampling)
    np.testing.assert_allclose(result.after, expected[result.ids])
    assert recorded.ids[10] in result.ids
    assert result.others == 0
    assert result.after.sum() == pytest.approx(1)
    everything = reading.next_token_distribution(recorded, 9, Sampling(temperature=1.0))
    np.testing.assert_allclose(everything.before, everything.after)
    assert everything.others == len(ALPHABET) - len(everything.ids)


def test_writing_stops_when_nobody_waits(folders: dict[str, Path]) -> None:
    recorded, _ = open_case(folders, "numpy", "default")
    tokens = iter(range(3))
    with pytest.raises(StopIteration):
        writing.write_on(
            recorded.model, [1, 2], 20, Sampling(), check=lambda: next(tokens) and None
        )
    assert next(tokens, None) is None
    assert len(writing.write_on(recorded.model, [1, 2], 4, Sampling()).ids) == 4


def test_top_tokens_are_sorted_and_ties_go_to_the_lower() -> None:
    scores = np.array([[0.0, 3.0, 1.0, 3.0], [5.0, 5.0, 5.0, 5.0]])
    assert top_tokens(scores, 2)[0].tolist() == [1, 3]
    assert top_tokens(scores, 9).shape == (2, 4)
    assert choose_candidates(scores[0], 2, 0).tolist() == [1, 3, 0]
    assert choose_candidates(scores[0], 2, 3).tolist() == [1, 3]
    assert choose_candidates(scores[0], 2, -1).tolist() == [1, 3]


# -- attention and lens ---------------------------------------------------------------------------


def test_attention_is_that_of_the_model(folders: dict[str, Path]) -> None:
    recorded, _ = open_case(folders, "numpy", "grouped")
    weights = recorded.model.attention(TEXT)
    np.testing.assert_array_equal(attention.attention_from(recorded, 6), weights[:, :, 6])
    np.testing.assert_array_equal(attention.attention_thumbnails(recorded), weights)
    averages = attention.attention_averages(recorded)
    np.testing.assert_allclose(averages[:-1], weights.mean(1), atol=1e-7)
    np.testing.assert_allclose(averages[-1], weights.mean((0, 1)), atol=1e-7)


def test_attention_of_a_long_text_comes_in_portions(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    recorded, _ = open_case(folders, "numpy", "default")
    whole, scores = attention.attention_from(recorded, 9), attention.score_heads(recorded)
    size = 4 * SMALL["n_heads"] * len(TEXT) ** 2
    monkeypatch.setattr(recorded_pass, "MAX_KEPT_WEIGHTS_BYTES", 0)
    monkeypatch.setattr(recorded_pass, "MAX_PORTION_BYTES", 2 * size)  # two layers, then one
    long = RecordedPass(recorded.model, recorded.ids)
    np.testing.assert_array_equal(attention.attention_from(long, 9), whole)
    np.testing.assert_array_equal(attention.score_heads(long), scores)
    np.testing.assert_array_equal(long.weights(1), recorded.weights(1))
    assert not any("weights" in name for name in long._arrays)


def test_a_smaller_picture_keeps_the_mean() -> None:
    weights = np.random.default_rng(0).random((2, 8, 8))
    small = attention.shrink(weights, 4)
    np.testing.assert_allclose(small, weights.reshape(2, 4, 2, 4, 2).mean((2, 4)))
    uneven = attention.shrink(weights, 3)
    sizes = np.diff([0, 2, 5, 8])
    np.testing.assert_allclose((uneven * np.outer(sizes, sizes)).sum((1, 2)), weights.sum((1, 2)))


def test_the_induction_probe_is_repeated_once(folders: dict[str, Path]) -> None:
    recorded, _ = open_case(folders, "numpy", "default")
    tokens = attention.induction_probe(recorded.model)
    half = len(tokens) // 2
    assert half == SMALL["block_size"] // 2
    assert tokens[:half].tolist() == tokens[half:].tolist()


@both(*VARIANTS)
def test_the_last_lens_is_the_output(folders: dict[str, Path], engine: str, variant: str) -> None:
    recorded, _ = open_case(folders, engine, variant)
    result, logprobs = lens.read_lens(recorded), recorded.log_probabilities
    assert result.places[-1] == f"blocks.{SMALL['n_layers'] - 1}"
    assert len(result.places) == (4 if variant in ("post", "sandwich") else 7)
    assert result.top_ids[-1].tolist() == logprobs.argmax(-1).tolist()
    np.testing.assert_allclose(result.top_logprobs[-1], logprobs.max(-1), atol=1e-5)
    nats = recorded.model.losses(TEXT)
    np.testing.assert_allclose(-result.target_logprobs[-1, :-1], nats, atol=1e-5)
    column = lens.read_lens_at(recorded, 4, [2, 9])
    np.testing.assert_allclose(column.asked_logprobs[-1], logprobs[4, [2, 9]], atol=1e-5)
    assert column.ids[:, 0].tolist() == result.top_ids[:, 4].tolist()


# -- contributions --------------------------------------------------------------------------------


@both(*ADDITIVE)
def test_contributions_sum_to_the_logits(
    folders: dict[str, Path], engine: str, variant: str
) -> None:
    recorded, weights = open_case(folders, engine, variant)
    ids = np.arange(len(ALPHABET))
    for t in (0, 11, len(TEXT) - 1):
        result = contributions.contributions(recorded, weights, t, ids)
        np.testing.assert_allclose(result.shares.sum(0), recorded["logits"][t], atol=1e-4)
        np.testing.assert_allclose(result.logits, recorded["logits"][t])
    assert len(result.parts) == len(set(result.parts)) == len(result.shares)
    last = recorded.model.logits(TEXT)
    np.testing.assert_allclose(result.shares.sum(0), last, atol=1e-4)


@both(*ADDITIVE)
def test_a_heads_contribution_is_the_sum_over_what_it_read(
    folders: dict[str, Path], engine: str, variant: str
) -> None:
    recorded, weights = open_case(folders, engine, variant)
    ids, t = np.array([3, 8]), 13
    whole = contributions.contributions(recorded, weights, t, ids)
    for layer, head in ((0, 0), (1, 3), (2, 1)):
        shares = contributions.contributions_by_source(recorded, weights, t, layer, head, ids)
        part = whole.shares[whole.parts.index(f"{layer}.{head}")]
        np.testing.assert_allclose(shares.sum(-1), part, atol=1e-4)
        assert not shares[:, t + 1 :].any()


def test_a_head_of_the_last_layer_has_no_effect_but_its_contribution(
    folders: dict[str, Path],
) -> None:
    """Without norms and feed-forwards after it, what a head adds is what is missing without it."""
    recorded, weights = open_case(folders, "numpy", "no_norm")
    ids, t, head = np.arange(len(ALPHABET)), 10, "2.1"
    result = contributions.contributions(recorded, weights, t, ids)
    rest = ["2.feedforward"]
    _, without_rest = ablation.nats_without(recorded, rest)
    _, without_both = ablation.nats_without(recorded, [*rest, head])
    difference = without_rest[t] - without_both[t]  # log-probabilities: up to a constant
    share = result.shares[result.parts.index(head)]
    np.testing.assert_allclose(difference - difference[0], share - share[0], atol=1e-4)


def test_what_has_no_additive_parts_is_refused(folders: dict[str, Path]) -> None:
    for variant, reason in (("sandwich", "norm-position sandwich"), ("capped", "logit-softcap")):
        recorded, weights = open_case(folders, "numpy", variant)
        with pytest.raises(InputError, match=reason):
            contributions.contributions(recorded, weights, 3, np.array([1]))
    recorded, weights = open_case(folders, "numpy", "post")
    with pytest.raises(InputError, match="norm-position post"):
        contributions.contributions(recorded, weights, 3, np.array([1]))
    with pytest.raises(InputError, match="norm-position post"):
        contributions.contributions_by_source(recorded, weights, 3, 0, 0, np.array([1]))
    # Anything else that the parts do not explain is found by the sum.
    recorded, weights = open_case(folders, "numpy", "default")
    weights["blocks.1.attention.o.weight"] = weights["blocks.1.attention.o.weight"] * 1.5
    with pytest.raises(InputError, match="not a sum of its parts"):
        contributions.contributions(recorded, weights, 3, np.array([1, 2]))


# -- ablation and patching ------------------------------------------------------------------------


@both(*VARIANTS)
def test_ablating_nothing_changes_nothing(
    folders: dict[str, Path], engine: str, variant: str
) -> None:
    recorded, _ = open_case(folders, engine, variant)
    nats, logprobs = ablation.nats_without(recorded, [])
    np.testing.assert_array_equal(nats, reading.read_text(recorded).nats)
    np.testing.assert_array_equal(logprobs, recorded.log_probabilities)


@both("default", "gpt2", "post")
def test_each_ablation_is_the_part_switched_off_alone(
    folders: dict[str, Path], engine: str, variant: str
) -> None:
    recorded, _ = open_case(folders, engine, variant)
    t, ids = 14, np.array([1, 5, 7])
    result = ablation.ablate_each(recorded, t, ids)
    assert len(result.parts) == SMALL["n_layers"] * (SMALL["n_heads"] + 2)
    np.testing.assert_allclose(result.before, recorded.log_probabilities[t, ids])
    for index in (0, 5, 9, len(result.parts) - 1):
        _, logprobs = ablation.nats_without(recorded, [result.parts[index]])
        np.testing.assert_allclose(result.logprobs[index], logprobs[t, ids], atol=1e-5)
    assert np.abs(result.logprobs - result.before).max() > 0.01


def test_a_layer_that_is_off_is_a_model_without_it(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    recorded, weights = open_case(folders, "numpy", "default")
    shorter = {
        name.replace("blocks.2.", "blocks.1."): array
        for name, array in weights.items()
        if not name.startswith("blocks.1.")
    }
    config = recorded.model.config
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, n_layers=2))
    engine = make_engine(config, len(ALPHABET), ComputeConfig(engine="numpy", threads=1))
    engine.load(shorter.items())
    expected = Model(config, recorded.model.tokenizer, engine, 0).losses(TEXT)
    nats, _ = ablation.nats_without(recorded, ["1"])
    np.testing.assert_allclose(nats[1:], expected, atol=1e-5)


def test_all_neurons_together_are_the_feedforward(folders: dict[str, Path]) -> None:
    recorded, weights = open_case(folders, "numpy", "default")
    neurons = [f"1.n{i}" for i in range(SMALL["d_ff"])]
    alone, _ = ablation.nats_without(recorded, ["1.feedforward"])
    together, _ = ablation.nats_without(recorded, neurons)
    np.testing.assert_allclose(together, alone, atol=1e-6)
    pair, t = np.array([4, 9]), 12
    all_shares = ablation.strongest_neurons(recorded, weights, t, 1, pair, count=SMALL["d_ff"])
    whole = contributions.contributions(recorded, weights, t, pair)
    part = whole.shares[whole.parts.index("1.feedforward")]
    assert all_shares.shares.sum() == pytest.approx(part[0] - part[1], abs=1e-4)
    assert (np.diff(np.abs(all_shares.shares)) <= 0).all()


@pytest.mark.parametrize("part", ["", "9", "1.9", "1.n99", "x", "1.2.3", "-1", "1.attention.2"])
def test_a_part_that_does_not_exist_is_refused(folders: dict[str, Path], part: str) -> None:
    recorded, _ = open_case(folders, "numpy", "default")
    with pytest.raises(InputError, match="there is no part"):
        ablation.nats_without(recorded, [part])


def test_neurons_of_experts_are_refused(folders: dict[str, Path]) -> None:
    recorded, _ = open_case(folders, "numpy", "experts")
    with pytest.raises(InputError, match="mixture of experts"):
        ablation.nats_without(recorded, ["1.n3"])


@both("default", "post", "experts")
def test_patching_a_text_into_itself_changes_nothing(
    folders: dict[str, Path], engine: str, variant: str
) -> None:
    recorded, _ = open_case(folders, engine, variant)
    ids, t = np.arange(len(ALPHABET)), 15
    for place in patching.patch_places(recorded.config):
        result = patching.patch_stream(recorded, recorded, t, place, range(t + 1), ids)
        np.testing.assert_allclose(
            result.logprobs, np.tile(result.before, (t + 1, 1)), atol=1e-5, err_msg=place
        )


@both("default", "post")
def test_patches_put_the_other_text_in_and_are_causal(
    folders: dict[str, Path], engine: str, variant: str
) -> None:
    recorded, _ = open_case(folders, engine, variant)
    other, _ = open_case(folders, engine, variant, OTHER)
    other.model = recorded.model
    ids, t = np.arange(len(ALPHABET)), 15
    places = patching.patch_places(recorded.config)
    last = patching.patch_stream(recorded, other, t, places[-1], range(t + 1), ids)
    # The last place at the caret holds all that the output is made of, and nothing before does.
    np.testing.assert_allclose(last.logprobs[t], other.log_probabilities[t], atol=1e-5)
    np.testing.assert_allclose(last.logprobs[:t], np.tile(last.before, (t, 1)), atol=1e-5)
    first = patching.patch_stream(recorded, other, t, places[0], range(t + 1), ids)
    same = recorded.ids[: t + 1] == other.ids[: t + 1]
    changed = np.abs(first.logprobs - first.before).max(-1) > 1e-5
    assert not (changed & same).any()  # equal tokens have equal embeddings
    assert changed[~same].any()


def test_a_patch_of_one_token_is_the_text_with_that_token(folders: dict[str, Path]) -> None:
    recorded, _ = open_case(folders, "numpy", "default")
    changed = recorded.ids.copy()
    changed[4] = 7
    other = RecordedPass(recorded.model, changed)
    result = patching.patch_stream(
        recorded, other, 15, "embedding", range(4, 5), np.arange(len(ALPHABET))
    )
    np.testing.assert_allclose(result.logprobs[0], other.log_probabilities[15], atol=1e-5)


# -- gradients and the step -----------------------------------------------------------------------


@both("default", "gpt2", "adapters", "post")
def test_gradient_norms_of_all_targets_are_those_of_the_model(
    folders: dict[str, Path], engine: str, variant: str
) -> None:
    """A text of two tokens has one target: its gradients are those of Model.gradients."""
    recorded, _ = open_case(folders, engine, variant, TEXT[:2])
    result = gradients.gradient_norms(recorded, 0)
    expected = recorded.model.gradients(TEXT[:2])
    assert list(expected) == result.names
    norms = [np.linalg.norm(gradient) for gradient in expected.values()]
    np.testing.assert_allclose(result.weights, norms, rtol=1e-4, atol=1e-6)
    assert result.total == pytest.approx(np.sqrt(np.square(norms).sum()), rel=1e-4)
    assert result.stream.shape == (SMALL["n_layers"] + 1, 2)


def test_no_gradient_reaches_what_comes_later(folders: dict[str, Path]) -> None:
    recorded, _ = open_case(folders, "numpy", "default")
    t = 9
    result = gradients.gradient_norms(recorded, t)
    assert not result.stream[:, t + 1 :].any()
    assert (result.stream[:-1, : t + 1] > 0).all()
    assert not result.stream[-1, :t].any()  # after the last block only the caret's position counts
    with pytest.raises(InputError, match="text ends here"):
        gradients.gradient_norms(recorded, len(TEXT) - 1)


def test_the_norms_of_the_same_weight_of_all_experts_are_joined() -> None:
    up = "blocks.0.feedforward.experts.{}.up.weight"
    norms = gradients.join_experts(
        [up.format(0), up.format(1), "norm.bias"], np.array([3.0, 4.0, 1.0])
    )
    assert norms == {up.format("*"): 5.0, "norm.bias": 1.0}


@both("default", "gpt2", "adapters", "experts", "post")
def test_the_promised_loss_is_that_of_a_step_really_made(
    folders: dict[str, Path], engine: str, variant: str
) -> None:
    recorded, weights = open_case(folders, engine, variant)
    t, lr = 8, 0.3
    before = reading.read_text(recorded).nats
    effect = sgd_step.take_step(recorded, t, lr, sgd_step.make_step_engine(recorded.model), weights)
    np.testing.assert_allclose(effect.before, before, atol=1e-5)
    # The same step by hand: weights minus lr x gradient, in a second model.
    batch = sgd_step.make_batch(recorded.ids, sgd_step.targets_at(recorded, t))
    names = [name for name, spec in recorded.model.parameters.items() if spec.trained]
    arrays = recorded.model.engine.inspect(batch, [f"gradient/{name}" for name in names])
    stepped = weights | {name: weights[name] - lr * arrays[f"gradient/{name}"] for name in names}
    second = make_engine(
        recorded.model.config, len(ALPHABET), ComputeConfig(engine="numpy", threads=1)
    )
    second.load(stepped.items())
    after = second.losses(recorded.ids[None], recorded.targets[None])[0, :-1]
    np.testing.assert_allclose(effect.after[1:], after, atol=2e-4)
    assert effect.norm == pytest.approx(gradients.gradient_norms(recorded, t).total, rel=1e-4)
    assert abs(effect.after[t + 1] - effect.before[t + 1]) > 0.01
    np.testing.assert_array_equal(reading.read_text(recorded).nats, before)  # a copy was changed


# -- learning and n-grams -------------------------------------------------------------------------


def test_a_run_that_learned_answers_has_no_loss_by_position() -> None:
    tokens = np.arange(100)
    assert learning.probe_tokens(Split(tokens, 100)) is tokens
    answers = AnswerFormat(mark=1, line_end=0, line_length=10)
    conversations = Conversations(np.array([0, 100]), np.ones(100, np.uint8), -1)
    for split in (Split(tokens, 100, answers=answers), Split(tokens, 100, conversations)):
        with pytest.raises(InputError, match="learned answers alone"):
            learning.probe_tokens(split)


def test_loss_by_position_is_that_of_the_windows(folders: dict[str, Path]) -> None:
    recorded, _ = open_case(folders, "numpy", "default")
    model, block = recorded.model, SMALL["block_size"]
    tokens = np.random.default_rng(0).integers(0, len(ALPHABET), 3 * block + 1)
    result = learning.loss_by_position(model, tokens)
    expected = [
        model.losses(model.tokenizer.decode(tokens[i * block : (i + 1) * block + 1]))
        for i in range(3)
    ]
    np.testing.assert_allclose(result, np.mean(expected, axis=0), atol=1e-5)
    assert learning.loss_by_position(model, tokens[:5]).shape == (4,)
    np.testing.assert_allclose(learning.smooth(np.full(30, 2.0)), 2.0)
    assert learning.smooth(np.arange(5.0))[2] == pytest.approx(2.0)


def test_the_best_heads_have_the_highest_scores(folders: dict[str, Path]) -> None:
    recorded, _ = open_case(folders, "numpy", "default")
    probe = RecordedPass(recorded.model, attention.induction_probe(recorded.model))
    scores = attention.score_heads(probe)
    best = learning.best_heads(scores)
    np.testing.assert_allclose(best.scores, np.nanmax(scores, axis=(1, 2)))
    for kind, (layer, head) in enumerate(zip(best.layers, best.heads)):
        assert scores[kind, layer, head] == best.scores[kind]


def test_ngrams_are_those_of_the_baselines(folders: dict[str, Path]) -> None:
    from glasslm.data.baselines import ngram_bpb

    recorded, _ = open_case(folders, "numpy", "default")
    train = (OTHER * 20).encode()
    nats = ngrams.ngram_nats(ngrams.count_ngrams(train), recorded.model.tokenizer, recorded.ids)
    assert np.isnan(nats[0])
    first = -np.log(1 / 256)  # at most, of the first byte
    bits = ngram_bpb(train, TEXT.encode())[ngrams.ORDER - 1] * len(TEXT)
    assert 0 < bits * np.log(2) - nats[1:].sum() <= first


def test_looking_keeps_what_the_model_computes(folders: dict[str, Path]) -> None:
    """After everything above on one model, its activations have the same bits."""
    recorded, weights = open_case(folders, "numpy", "default")
    names = [name for name in forward_names(recorded.config) if not name.endswith(".scores")]
    before = recorded.model.inspect(TEXT, names)
    ablation.ablate_each(recorded, 9, np.array([1]))
    contributions.contributions(recorded, weights, 9, np.array([1]))
    gradients.gradient_norms(recorded, 9)
    sgd_step.take_step(recorded, 9, 0.5, sgd_step.make_step_engine(recorded.model), weights)
    after = recorded.model.inspect(TEXT, names)
    assert all(after[name].tobytes() == before[name].tobytes() for name in names)
