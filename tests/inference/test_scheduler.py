"""The scheduler: a text does not depend on its neighbours, on chunks or on shared prefixes."""

import dataclasses
import importlib.util
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from doubles import HistoryEngine
from glasslm.config.schema import ComputeConfig, ModelConfig, RunConfig
from glasslm.data.tokenizers import CharTokenizer
from glasslm.engines.factory import make_engine
from glasslm.errors import DivergedError, InputError
from glasslm.inference import cache_rows
from glasslm.inference.generation import generate
from glasslm.inference.json_grammar import JsonGrammar
from glasslm.inference.request import Finished, PromptLogprobs, Request, Token
from glasslm.inference.sampling import Sampling, sample_tokens, uniform_draw
from glasslm.inference.scheduler import Scheduler
from glasslm.inference.stream import visible_length
from glasslm.model.parameters import initial_weights

LETTERS = CharTokenizer('\nabcdefghijklmnopqrstuvwxyz{}[]":,0123456789')
V = LETTERS.vocab_size
GREEDY = Sampling(temperature=0.0)
ENGINES = [
    "numpy",
    pytest.param(
        "torch",
        marks=pytest.mark.skipif(
            not importlib.util.find_spec("torch"), reason="could not import 'torch'"
        ),
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


def build_engine(config, engine="numpy", precision="fp32", seed=0):
    """An engine with weights so large that a wrong position or mask shows."""
    threads = 2 if engine == "numpy" else 1
    compute = ComputeConfig(engine=engine, device="cpu", precision=precision, threads=threads)
    built = make_engine(RunConfig(model=config).resolve(), V, compute)
    rng = np.random.default_rng(seed)
    built.load(
        (name, w + 0.1 * rng.standard_normal(w.shape))
        for name, w in initial_weights(built.table, 0)
    )
    return built


def build_scheduler(name="rope", engine="numpy", precision="fp32", slots=16):
    config = MODELS[name].resolve()
    return Scheduler(build_engine(config, engine, precision), LETTERS, config, slots=slots)


def answer(scheduler, arrivals):
    """The events of each request, in the order of arrival; arrivals: (step, request), sorted."""
    arrivals, streams, events, step = list(arrivals), [], {}, 0
    while arrivals or scheduler.has_work:
        while arrivals and arrivals[0][0] <= step:
            streams.append(scheduler.submit(arrivals.pop(0)[1]))
        for stream, event in scheduler.step():
            events.setdefault(stream, []).append(event)
        step += 1
    return [events[stream] for stream in streams]


def answer_alone(scheduler, request):
    (events,) = answer(scheduler, [(0, request)])
    return events


def without_shown(events):
    """The tokens with their log-probabilities, bit for bit."""
    return [event[:4] for event in events if isinstance(event, Token)]


def text(events):
    return "".join(event.text for event in events if isinstance(event, Token | Finished))


def random_request(rng, **settings):
    ids = rng.integers(0, V, rng.integers(1, 150)).tolist()
    sampling = Sampling(temperature=rng.choice([0.0, 1.0]), seed=int(rng.integers(100)))
    settings = {"max_new_tokens": int(rng.integers(1, 40)), "top_logprobs": 3} | settings
    return Request(ids, sampling=sampling, **settings)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", MODELS)
def test_logits_do_not_depend_on_the_neighbours_bit_for_bit(name, engine):
    """Alone, beside 6 and beside 31 others that arrive in any order, sharing prefixes or not."""
    rng = np.random.default_rng(1)
    request = random_request(rng, max_new_tokens=60 if engine == "numpy" else 25)
    alone = without_shown(answer_alone(build_scheduler(name, engine, slots=32), request))
    assert len(alone) == request.max_new_tokens
    for n_neighbours in (6, 31):
        arrivals = [(int(rng.integers(0, 40)), request)]
        for index in range(n_neighbours):
            other = random_request(rng)
            if index % 3 == 0:
                shared = request.ids[: rng.integers(1, len(request.ids) + 1)]
                other = dataclasses.replace(other, ids=[*shared, *other.ids])
            arrivals.append((int(rng.integers(0, 40)), other))
        arrivals.sort(key=lambda arrival: arrival[0])
        place = [other for _, other in arrivals].index(request)
        answers = answer(build_scheduler(name, engine, slots=32), arrivals)
        assert without_shown(answers[place]) == alone


@pytest.mark.parametrize("name", MODELS)
def test_a_text_is_that_of_generate_for_the_same_prompt_seed_and_settings(name):
    """In float64, where another order of rounding changes no token; also past the context."""
    rng = np.random.default_rng(2)
    scheduler = build_scheduler(name, precision="fp64")
    requests = [random_request(rng, max_new_tokens=int(n)) for n in rng.integers(1, 130, 5)]
    for request, events in zip(requests, answer(scheduler, enumerate(requests))):
        pieces = generate(
            build_engine(MODELS[name].resolve(), precision="fp64"), LETTERS, [request.ids],
            model_config=MODELS[name].resolve(), max_new_tokens=request.max_new_tokens,
            sampling=request.sampling,
        )  # fmt: skip
        assert text(events) == "".join(piece.text for piece in pieces)


@pytest.mark.parametrize("name", MODELS)
def test_both_engines_write_the_same_text(name):
    pytest.importorskip("torch")
    rng = np.random.default_rng(3)
    requests = [random_request(rng, prompt_logprobs=length < 70) for length in (60, 70, 90)]
    requests = [dataclasses.replace(r, ids=r.ids[:70], max_new_tokens=30) for r in requests]
    one, other = (
        answer(build_scheduler(name, engine, "fp64"), enumerate(requests))
        for engine in ("numpy", "torch")
    )
    for events, others in zip(one, other):
        assert text(events) == text(others)
        for event, twin in zip(events, others):
            if isinstance(event, Token):
                assert event.logprob == pytest.approx(twin.logprob, abs=1e-9)
            if isinstance(event, PromptLogprobs):
                assert event.logprobs[1:] == pytest.approx(twin.logprobs[1:], abs=1e-9)


@pytest.mark.parametrize("name", MODELS)
def test_chunks_give_the_text_of_a_prompt_that_is_read_at_once(name, monkeypatch):
    rng = np.random.default_rng(4)
    request = random_request(rng, max_new_tokens=100)
    texts = set()
    for chunk in (1, 7, 1000):
        monkeypatch.setattr(cache_rows, "CHUNK_TOKENS", chunk)
        texts.add(text(answer_alone(build_scheduler(name, precision="fp64"), request)))
    assert len(texts) == 1


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", ["rope", "rolling"])
def test_a_shared_prefix_is_read_once_and_changes_no_bit(name, engine, monkeypatch):
    """Of running texts, of finished ones, and of a prompt of which several samples are asked."""
    monkeypatch.setattr(cache_rows, "CHUNK_TOKENS", 4)
    rng = np.random.default_rng(5)
    prefix = rng.integers(0, V, 13).tolist()
    requests = [
        Request([*prefix, *rng.integers(0, V, n).tolist()], 4, Sampling(1.0, seed=n))
        for n in (5, 0, 3, 9)
    ]
    requests += [dataclasses.replace(requests[0], sample=sample) for sample in (1, 2)]
    scheduler = build_scheduler(name, engine)
    shared = answer(scheduler, [(20 * (n > 1), request) for n, request in enumerate(requests)])
    cached = [events[-1].usage.cached_tokens for events in shared]
    assert cached == [0, 12, 12, 12, 18, 18]
    assert scheduler.counts.cached_tokens == sum(cached)
    for request, events in zip(requests, shared):
        alone = answer_alone(build_scheduler(name, engine), request)
        assert without_shown(events) == without_shown(alone)


@pytest.mark.parametrize("late", [12, 30])
def test_a_prefix_that_newer_tokens_have_overwritten_is_not_shared(late, monkeypatch):
    """A rolling cache has room for its window only, while a text runs and after it has ended."""
    monkeypatch.setattr(cache_rows, "CHUNK_TOKENS", 4)
    prompt = np.random.default_rng(6).integers(0, V, 20).tolist()
    first, second = Request(prompt, 20), Request([*prompt, 1], 5)  # in a window of 24 tokens
    _, events = answer(build_scheduler("rolling"), [(0, first), (late, second)])
    assert events[-1].usage.cached_tokens == 0
    assert without_shown(events) == without_shown(answer_alone(build_scheduler("rolling"), second))


def test_at_most_one_chunk_is_read_between_two_tokens():
    """A long prompt does not stop the other texts, and reads on at every step."""
    scheduler = build_scheduler("rope")
    running = scheduler.submit(Request([1, 2, 3], 100))
    scheduler.step()
    calls = []
    engine = scheduler._batch.engine
    original = engine.logits
    engine.logits = lambda tokens, *args: calls.append(tokens.shape) or original(tokens, *args)
    late = scheduler.submit(Request([5] * 150, 10))
    for step in range(3):
        calls.clear()
        events = scheduler.step()
        assert [stream for stream, _ in events if stream is running] == [running]
        assert any(stream is late for stream, _ in events) == (step == 2)
        assert calls == [(1, 64 if step < 2 else 22), (16, 1)]


@given(
    st.lists(
        st.tuples(
            st.integers(0, 30),  # the step of its arrival
            st.lists(st.integers(0, 1), min_size=1, max_size=25),
            st.integers(1, 15),  # new tokens
            st.integers(-40, 20),  # the tokens after which it is cancelled; none if negative
        ),
        min_size=1,
        max_size=12,
    ),
    st.integers(1, 5), st.integers(1, 6), st.integers(1, 12), st.booleans(),
)  # fmt: skip
@settings(deadline=None, max_examples=80)
def test_any_order_of_arrivals_and_cancels_gives_the_texts_of_the_definition(
    arrivals, slots, chunk, block_size, use_cache
):
    """With an engine whose logits depend on all tokens; prompts of two symbols share prefixes."""
    config = ModelConfig(block_size=block_size)
    engine = HistoryEngine(V)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cache_rows, "CHUNK_TOKENS", chunk)
        scheduler = Scheduler(engine, LETTERS, config, slots=slots, use_cache=use_cache)
    arrivals, step, streams, ended = sorted(arrivals), 0, {}, {}
    while arrivals or scheduler.has_work:
        while arrivals and arrivals[0][0] <= step:
            _, ids, n, cancel_after = arrivals.pop(0)
            stream = scheduler.submit(Request(ids, n, Sampling(1.0, seed=step)))
            streams[stream] = cancel_after
        for stream, event in scheduler.step():
            assert stream not in ended
            if isinstance(event, Finished):
                ended[stream] = event.reason
        for stream, cancel_after in streams.items():
            if stream not in ended and stream.new_tokens == cancel_after:
                ended[stream] = scheduler.cancel(stream).reason
        step += 1
    assert ended.keys() == streams.keys()
    assert engine.widest <= chunk
    assert engine.cache.lengths.tolist() == [0] * slots
    for stream in streams:
        ids = list(stream.request.ids)
        for _ in range(stream.new_tokens):
            logits = engine.after(ids[len(ids) - visible_length(len(ids), block_size) :])
            draw = uniform_draw(stream.request.sampling.seed, 0, len(ids))
            ids.append(int(sample_tokens(logits[None], stream.distribution, [draw])[0]))
        assert stream.ids == ids


STATES = {
    "waiting": lambda stream: stream.row < 0,
    "in a row": lambda stream: stream.row >= 0 and stream.is_new,
    "in its prompt": lambda stream: not stream.is_new and not stream.new_tokens,
    "decoding": lambda stream: stream.new_tokens == 5,
}


@pytest.mark.parametrize("state", STATES)
def test_a_cancelled_request_frees_its_row_at_once_and_changes_no_other(state):
    rng = np.random.default_rng(7)
    others = [random_request(rng, max_new_tokens=30) for _ in range(20)]
    expected = answer(build_scheduler(), [(0, request) for request in others])
    scheduler, events = build_scheduler(), {}
    streams = [scheduler.submit(request) for request in others[:8]]
    cancelled = scheduler.submit(Request([3] * 150, 100))
    streams += [scheduler.submit(request) for request in others[8:]]
    is_cancelled = False
    while scheduler.has_work:
        if not is_cancelled and STATES[state](cancelled):
            before = scheduler.counts
            last = scheduler.cancel(cancelled)
            assert (last.reason, last.usage[2]) == ("cancelled", 5 if state == "decoding" else 0)
            n_waiting = int(state == "waiting")
            assert scheduler.counts.queued == before.queued - n_waiting
            assert scheduler.counts.running == before.running - (1 - n_waiting)
            is_cancelled = True
        for stream, event in scheduler.step():
            assert not (is_cancelled and stream is cancelled)
            events.setdefault(stream, []).append(event)
    assert is_cancelled
    assert [without_shown(events[stream]) for stream in streams] == [
        without_shown(of_one) for of_one in expected
    ]
    assert scheduler.counts[:3] == (0, 0, 0.0)


class FailingGrammar:
    """A grammar that allows nothing after some tokens, or raises."""

    finished = can_end = False

    def __init__(self, n, error):
        self.n, self.error = n, error

    def allowed(self, remaining):
        self.n -= 1
        if self.n < 0 and self.error:
            raise self.error
        return np.full(V, self.n >= 0)

    def advance(self, token):
        pass


@pytest.mark.parametrize("error", [None, ZeroDivisionError("a bug")])
def test_a_request_that_fails_does_not_end_the_others(error):
    rng = np.random.default_rng(8)
    requests = [
        dataclasses.replace(random_request(rng, max_new_tokens=20), sampling=GREEDY)
        for _ in range(6)
    ]
    expected = answer(build_scheduler(), [(0, request) for request in requests])
    scheduler = build_scheduler()
    failing = Request([1, 2], 20, GREEDY, grammar=lambda n: FailingGrammar(4, error))
    arrivals = [(0, request) for request in [*requests[:3], failing, *requests[3:]]]
    answers = answer(scheduler, arrivals)
    *tokens, last = answers.pop(3)
    assert len(tokens) == 4
    assert last.reason == "failed"
    assert type(last.error) is (type(error) if error else InputError)
    assert [without_shown(a) for a in answers] == [without_shown(e) for e in expected]
    assert len(answer_alone(scheduler, requests[0])) == 21  # the scheduler goes on


def test_logits_that_are_not_finite_fail_their_request_only():
    """Of one text among others, and of a prompt that is only scored."""
    scheduler = build_scheduler()
    engine = scheduler._batch.engine
    original = engine.logits

    def poisoned(tokens, cache, counts, every=False):
        logits = original(tokens, cache, counts, every)
        logits[tokens[:, -1] == 7] = np.nan
        return logits

    engine.logits = poisoned
    bias = {7: -1000.0}
    requests = [
        Request([1], 8, GREEDY, logit_bias=bias),
        Request([2], 8, GREEDY, logit_bias={7: 1000.0}),
        Request([3, 7], 0, prompt_logprobs=True),
        Request([3, 7, 7], 0, prompt_logprobs=True),
    ]
    answers = answer(scheduler, [(0, request) for request in requests])
    assert [events[-1].reason for events in answers] == ["length", "failed", "length", "failed"]
    assert all(isinstance(answers[index][-1].error, DivergedError) for index in (1, 3))


def test_a_text_that_outgrows_the_context_is_read_before_the_prompts_that_wait():
    scheduler = build_scheduler("alibi")  # 80 tokens
    running = scheduler.submit(Request([1] * 79, 30))
    steps = []
    for step in range(60):
        if step == 2:
            for token in range(2, 12):
                scheduler.submit(Request([token] * 78, 1))
        steps += [step] * sum(stream is running for stream, _ in scheduler.step())
    assert max(np.diff(steps[:30])) == 1  # 40 tokens are one chunk


def test_an_exception_of_the_engine_fails_the_requests_of_its_call_only():
    scheduler = build_scheduler()
    engine = scheduler._batch.engine
    original = engine.logits

    def fail(*arguments):
        raise MemoryError

    running = scheduler.submit(Request([1], 10))
    scheduler.step()
    engine.logits = fail
    waiting = scheduler.submit(Request([2], 10))
    events = dict(scheduler.step())
    assert {stream: type(event.error) for stream, event in events.items()} == {
        running: MemoryError, waiting: MemoryError,
    }  # fmt: skip
    engine.logits = original
    assert len(answer_alone(scheduler, Request([1], 10))) == 11


@pytest.mark.parametrize("max_new_tokens", [0, 5])
@pytest.mark.parametrize("name", MODELS)
def test_log_probabilities_of_a_prompt_are_those_of_the_evaluation(name, max_new_tokens):
    config = MODELS[name].resolve()
    ids = np.random.default_rng(10).integers(0, V, config.block_size + (max_new_tokens == 0))
    scheduler = build_scheduler(name, precision="fp64")
    request = Request(ids.tolist(), max_new_tokens, prompt_logprobs=True, top_logprobs=2)
    prompt, *rest = answer_alone(scheduler, request)
    engine = scheduler._batch.engine
    expected = -engine.losses(ids[None, :-1], ids[None, 1:])[0]
    assert prompt.logprobs[0] is prompt.top[0] is None
    np.testing.assert_allclose(prompt.logprobs[1:], expected, rtol=0, atol=1e-9)
    for logprob, top in zip(prompt.logprobs[1:], prompt.top[1:]):
        assert len(top) == 2
        assert top[0][1] >= max(top[1][1], logprob)
    assert len(rest) == max_new_tokens + 1
    assert rest[-1].reason == "length"
    assert rest[-1].usage == (len(ids), 0, max_new_tokens)


def test_a_prompt_of_which_nothing_is_asked_is_not_read():
    scheduler = build_scheduler()
    scheduler._batch.engine.logits = None
    (finished,) = answer_alone(scheduler, Request([1, 2, 3], 0))
    assert finished == Finished("length", (3, 0, 0))
    events = answer_alone(scheduler, Request([1], 0, prompt_logprobs=True))
    assert events[0] == PromptLogprobs([None], [None])


def test_settings_of_one_request_do_not_touch_another():
    """A bias, a penalty, a grammar, a stop string and greedy sampling in one batch."""
    prompts = [[1, 2, 3], [4, 5]]
    settings = [
        {"logit_bias": {7: 1000.0}},
        {"logit_bias": {7: -1000.0, 8: 3.0}},
        {"sampling": Sampling(1.0, repetition_penalty=2.0)},
        {"sampling": Sampling(1.0, top_k=3, seed=5)},
        {"sampling": GREEDY},
        {"grammar": JsonGrammar(LETTERS.token_bytes).start_text},
        {"stop": ("a", "b", "c")},
        {},
    ]
    requests = [
        Request(ids, 30, **{"sampling": Sampling(1.0), **setting})
        for ids in prompts
        for setting in settings
    ]
    together = answer(build_scheduler(), [(0, request) for request in requests])
    for request, events in zip(requests, together):
        alone = answer_alone(build_scheduler(), request)
        assert events[:-1] == alone[:-1]
        assert text(events) == text(alone)
    assert text(together[0]) == LETTERS.decode([7] * 30)
    assert LETTERS.decode([7]) not in text(together[1])


def test_a_line_break_that_ends_other_texts_does_not_cut_json():
    end = LETTERS.encode("\n").tolist()
    request = Request(
        [1, 2], 60, Sampling(1.0), grammar=JsonGrammar(LETTERS.token_bytes).start_text,
        logit_bias={end[0]: 20.0}, end_ids=frozenset(end),
    )  # fmt: skip
    events = answer_alone(build_scheduler(), request)
    assert "\n" in text(events)
    assert isinstance(json.loads(text(events)), dict | list)
    assert events[-1].reason == "stop"


@pytest.mark.parametrize(
    ("request_", "says"),
    [
        (Request([]), "empty"),
        (Request([1, V]), f"token {V}"),
        (Request([-1]), "token -1"),
        (Request([1], logit_bias={V: 1.0}), f"token {V}"),
        (Request([1], logit_bias={1: float("nan")}), "finite"),
        (Request([1], max_new_tokens=-1), "max_new_tokens"),
        (Request([1], top_logprobs=-1), "top_logprobs"),
        (Request([1], stop=("",)), "empty"),
        (Request([1] * 161, prompt_logprobs=True), "160"),
        (Request([1] * 162, 0, prompt_logprobs=True), "160"),
        (Request([1], 1, grammar=JsonGrammar(LETTERS.token_bytes).start_text), "max_new_tokens"),
    ],
)
def test_a_request_that_cannot_be_answered_is_refused(request_, says):
    scheduler = build_scheduler()
    with pytest.raises(InputError, match=says):
        scheduler.submit(request_)
    assert not scheduler.has_work


def test_requests_wait_in_the_order_of_arrival_and_are_counted():
    scheduler = build_scheduler(slots=1)
    streams = [scheduler.submit(Request([1], 3)) for _ in range(4)]
    assert scheduler.counts.queued == 4
    assert scheduler.counts.oldest_wait_s >= 0
    ended = []
    while scheduler.has_work:
        assert scheduler.counts.running <= 1
        ended += [s for s, event in scheduler.step() if isinstance(event, Finished)]
    assert ended == streams
    counts = scheduler.counts
    assert (counts.prompt_tokens, counts.completion_tokens) == (4, 12)


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
@pytest.mark.parametrize("engine", ENGINES)
def test_numbers_of_a_failed_text_do_not_reach_the_next_one_in_its_row(engine):
    """Hidden keys have the weight 0, and 0 times nan is nan."""
    config = dataclasses.replace(MODELS["learned"], tie_embeddings=False).resolve()
    built = build_engine(config, engine)
    weights = {name: array for name, array in built.state() if name in built.table}
    poison = LETTERS.encode("z").item()
    weights["embedding.weight"][poison] = np.nan
    built.load(weights.items())
    scheduler = Scheduler(built, LETTERS, config, slots=16)
    no_poison = {poison: -1e9}
    good = Request([1, 2, 3], 20, GREEDY, logit_bias=no_poison)
    expected = without_shown(answer_alone(scheduler, good))
    bad = Request([1, poison, *[4] * 60], 20, GREEDY)
    answers = answer(scheduler, [(0, bad)] * 16 + [(0, good)] * 16)
    assert all(isinstance(events[-1].error, DivergedError) for events in answers[:16])
    assert all(without_shown(events) == expected for events in answers[16:])


def test_a_text_without_a_shared_prefix_marks_no_other_row_as_used():
    """The row of the common prefix is the longest unused one, and a new text must not take it."""
    config = MODELS["rope"].resolve()
    rows = cache_rows.CacheRows(HistoryEngine(V), config, 3, config.block_size)
    prompt = [1] * cache_rows.CHUNK_TOKENS
    order = []
    for ids in ([2], [3], [4], [5], [6], [7]):
        index = rows.acquire()
        rows.begin(index, [*ids, *prompt], share=True)
        rows.release(index)
        order.append(index)
    assert order == [0, 1, 2, 0, 1, 2]
