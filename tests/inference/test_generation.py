"""Generation against a loop without a cache.

The text does not depend on batches, caches, portions or stop strings.
"""

import io
import json
import math
import shutil
import sys

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

import glasslm.cli
from doubles import HistoryEngine, make_run
from glasslm.config.schema import ModelConfig, RunConfig
from glasslm.data.tokenizers import ByteTokenizer, CharTokenizer
from glasslm.errors import DamagedError, InputError
from glasslm.inference import trained_model
from glasslm.inference.generation import generate
from glasslm.inference.json_grammar import JsonGrammar
from glasslm.inference.sampling import Sampling, sample_tokens, uniform_draw
from glasslm.inference.stop_strings import StopStringBuffer
from glasslm.inference.stream import visible_length

LETTERS = CharTokenizer("\nabcdef")
PROMPTS = st.lists(st.text("abcdef", max_size=30), min_size=1, max_size=4)
SAMPLING = st.builds(
    Sampling,
    temperature=st.sampled_from([0.0, 0.8, 2.0]),
    top_k=st.sampled_from([0, 3]),
    repetition_penalty=st.sampled_from([1.0, 1.3]),
    seed=st.integers(0, 2**64 - 1),
)


def model_config(block_size, rolling=False):
    """A model of this context; with a window, its cache rolls."""
    return ModelConfig(block_size=block_size, window=block_size if rolling else 0)


def texts(pieces):
    """{(prompt, sample): text}"""
    result = {}
    for piece in pieces:
        result[piece.prompt, piece.sample] = (
            result.get((piece.prompt, piece.sample), "") + piece.text
        )
    return result


def generate_without_cache(engine, prompt, sampling, sample, block_size, n, rolling):
    """Every token from the tokens that are visible, or from all, read afresh: the definition."""
    ids = LETTERS.encode(prompt).tolist() or [0]
    start = len(ids)
    for _ in range(n):
        used_tokens = np.isin(np.arange(LETTERS.vocab_size), ids)
        logits = engine.after(
            ids if rolling else ids[len(ids) - visible_length(len(ids), block_size) :]
        )
        draws = [uniform_draw(sampling.seed, sample, len(ids))]
        ids.append(int(sample_tokens(logits[None], sampling, draws, used_tokens)[0]))
    return LETTERS.decode(ids[start:])


@given(PROMPTS, SAMPLING, st.integers(1, 12), st.integers(1, 3), st.integers(1, 40), st.booleans())
@settings(deadline=None, max_examples=60)
def test_batched_and_cached_text_is_that_of_the_definition(
    prompts, sampling, block_size, samples, n, rolling
):
    engine = HistoryEngine(LETTERS.vocab_size)
    pieces = list(
        generate(
            engine,
            LETTERS,
            prompts,
            model_config=model_config(block_size, rolling),
            max_new_tokens=n,
            sampling=sampling,
            samples=samples,
        )
    )
    expected = {
        (p, s): generate_without_cache(engine, prompt, sampling, s, block_size, n, rolling)
        for p, prompt in enumerate(prompts)
        for s in range(samples)
    }
    assert texts(pieces) == expected
    # At most one for each portion of a prompt, also when it is read again past the context.
    assert engine.calls <= sum(
        math.ceil(len(prompt) / block_size) + n for prompt in prompts for _ in range(samples)
    )
    assert engine.widest <= block_size
    assert all(np.isfinite(piece.logprob) and piece.logprob <= 0 for piece in pieces)
    uncached = generate(
        engine, LETTERS, prompts, model_config=model_config(block_size, rolling),
        max_new_tokens=n, sampling=sampling, samples=samples, use_cache=False,
    )  # fmt: skip
    assert texts(uncached) == expected


@given(
    st.text("abcdef", min_size=1, max_size=30), st.integers(1, 12), st.integers(1, 30),
    st.integers(1, 30),
    st.booleans(),
)  # fmt: skip
@settings(deadline=None, max_examples=60)
def test_a_text_goes_on_in_the_same_way_wherever_it_is_cut(
    prompt, block_size, first, second, rolling
):
    """Also past the context: what is visible depends on the length alone."""
    engine = HistoryEngine(LETTERS.vocab_size)

    def write(prompt, n):
        pieces = generate(
            engine,
            LETTERS,
            [prompt],
            model_config=model_config(block_size, rolling),
            max_new_tokens=n,
        )
        return "".join(piece.text for piece in pieces)

    begun = write(prompt, first)
    assert write(prompt, first + second) == begun + write(prompt + begun, second)


def test_past_the_context_the_newest_half_is_read_again():
    assert [visible_length(n, 8) for n in range(1, 20)] == [
        1,
        2,
        3,
        4,
        5,
        6,
        7,
        8,
        4,
        5,
        6,
        7,
        8,
        4,
        5,
        6,
        7,
        8,
        4,
    ]
    assert [visible_length(n, 1) for n in (1, 2, 3)] == [1, 1, 1]
    assert [visible_length(n, 3) for n in (3, 4, 5, 6, 7)] == [3, 1, 2, 3, 1]


STOPS = st.lists(st.text("abcd", min_size=1, max_size=4), min_size=1, max_size=3)


@example(["abcd", "bc"], "abcd", [4])
@given(STOPS, st.text("abcd", max_size=40), st.lists(st.integers(1, 5), min_size=1, max_size=20))
def test_nothing_of_a_stop_string_is_shown_however_the_text_is_portioned(stops, text, portions):
    ends = [(at + len(stop), at) for stop in stops if (at := text.find(stop)) >= 0]
    buffer, shown, rest = StopStringBuffer(tuple(stops)), "", text
    for size in [*portions, len(text) + 1]:
        if buffer.stopped:
            break
        part, rest = rest[:size], rest[size:]
        shown += buffer.push(part)
        assert text.startswith(shown)
        assert not any(stop in shown for stop in stops)
    assert buffer.stopped == bool(ends)
    assert shown + buffer.flush() == (text[: min(ends)[1]] if ends else text)


@given(STOPS, st.integers(0, 50))
@settings(deadline=None, max_examples=40)
def test_stop_strings_end_a_text_and_leave_the_others_alone(stops, seed):
    engine = HistoryEngine(LETTERS.vocab_size)

    def run(stop):
        prompts, sampling = ["a", "fade"], Sampling(1.5, seed=seed)
        return list(
            generate(
                engine,
                LETTERS,
                prompts,
                model_config=model_config(8),
                max_new_tokens=40,
                samples=2,
                sampling=sampling,
                stop=stop,
            )
        )

    free, stopped = texts(run(())), run(stops)
    finish = {(piece.prompt, piece.sample): piece.finish for piece in stopped}
    for key, text in free.items():
        ends = [(at + len(stop), at) for stop in stops if (at := text.find(stop)) >= 0]
        assert texts(stopped)[key] == (text[: min(ends)[1]] if ends else text)
        assert finish[key] == ("stop" if ends else "length")
        written = sum((piece.prompt, piece.sample) == key for piece in stopped)
        assert written == (min(ends)[0] if ends else 40)
    assert sum(piece.finish is not None for piece in stopped) == 4


def test_streams_never_hold_half_a_character():
    """Random bytes: mostly broken UTF-8, so every kind of half character occurs."""
    tokenizer = ByteTokenizer()
    engine = HistoryEngine(256)
    for seed in range(20):
        pieces = list(
            generate(
                engine,
                tokenizer,
                ["é"],
                model_config=model_config(16),
                max_new_tokens=60,
                sampling=Sampling(5.0, seed=seed),
            )
        )
        assert "".join(piece.text for piece in pieces) == tokenizer.decode(
            [piece.token for piece in pieces]
        )
        assert "".join(piece.text for piece in pieces).encode("utf-8")


def test_an_empty_prompt_starts_from_a_newline_or_from_token_0():
    engine = HistoryEngine(7)
    empty = texts(generate(engine, LETTERS, [""], model_config=model_config(8)))
    assert empty == texts(generate(engine, LETTERS, ["\n"], model_config=model_config(8)))
    other = CharTokenizer("abcdefg")
    assert texts(generate(engine, other, [""], model_config=model_config(8))) == texts(
        generate(engine, other, ["a"], model_config=model_config(8))
    )


def test_json_comes_out_whole_from_every_row():
    tokenizer = ByteTokenizer()
    grammar = JsonGrammar(tokenizer.token_bytes)
    for n in (2, 3, 17, 64):
        pieces = generate(
            HistoryEngine(256),
            tokenizer,
            ["x", "long prompt"],
            model_config=model_config(8),
            max_new_tokens=n,
            samples=3,
            sampling=Sampling(3.0),
            grammar=grammar.start_text,
        )
        written = texts(pieces)
        assert len(written) == 6
        for text in written.values():
            json.loads(text)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens"),
        ({"samples": 0}, "samples"),
        ({"stop": [""]}, "empty"),
        ({"prompts": ["a?"]}, "QUESTION MARK"),
        ({"stop": ["a"], "grammar": lambda n: None}, "--grammar"),
    ],
)
def test_what_cannot_be_used_is_refused_before_anything_is_computed(arguments, says):
    engine = HistoryEngine(7)
    with pytest.raises(InputError, match=says):
        generate(engine, LETTERS, **{"prompts": ["a"], "model_config": model_config(8)} | arguments)
    assert engine.calls == 0


# -- with the NumPy engine and a run on disk -------------------------------------------------------

ALPHABET = '\n abcdefghijklmnopqrstuvwxyz{}[]:,"0123'


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("runs") / "small", ALPHABET)


def test_a_loaded_model_writes_the_same_in_every_way(run):
    model = trained_model.load_model(run, precision="fp64")
    settings = {"temperature": 0.9, "top_p": 0.95, "seed": 5}
    text = model.generate("the ", 60, **settings)
    assert len(text) == 60
    assert text == "".join(model.stream("the ", 60, sampling=Sampling(**settings)))
    batch = texts(
        model.pieces(
            ["a much longer prompt than the context", "the "], 60, sampling=Sampling(**settings)
        )
    )
    assert batch[1, 0] == text
    assert text == model.generate("the ", 20, **settings) + model.generate(
        "the " + text[:20], 40, **settings
    )
    assert text != model.generate("the ", 60, **settings | {"seed": 6})
    json.loads(model.generate("x", 30, grammar="json", temperature=2.0))


def test_logits_and_losses_agree(run):
    model = trained_model.load_model(run, precision="fp64")
    text = "abc def ghi"
    losses = model.losses(text)
    assert losses.shape == (len(text) - 1,)
    for at in range(1, len(text)):
        logits = model.logits(text[:at])
        assert logits.dtype == np.float32
        logits = logits.astype(np.float64)
        nats = (
            np.log(np.exp(logits - logits.max()).sum())
            + logits.max()
            - logits[model.tokenizer.encode(text[at])[0]]
        )
        assert losses[at - 1] == pytest.approx(nats, rel=1e-5)
    long = text * 5  # the context is 16: windows do not overlap
    assert model.losses(long)[16:32] == pytest.approx(model.losses(long[16:33]))
    assert model.evaluate(long).loss == pytest.approx(model.losses(long).mean())
    assert model.losses("a").shape == (0,)


def test_a_checkpoint_of_another_run_is_refused(run, tmp_path):
    """The same sizes and shapes, but other characters: it would write confident nonsense."""
    other = make_run(tmp_path / "other", ALPHABET.upper())
    shutil.rmtree(other / "checkpoints")
    shutil.copytree(run / "checkpoints", other / "checkpoints")
    with pytest.raises(DamagedError, match="a checkpoint of another run"):
        trained_model.load_model(other)


def test_greedy_text_is_the_same_with_and_without_the_cache(run):
    """Model.logits reads afresh what is visible.

    The context is 16, so it is left behind several times.
    """
    model = trained_model.load_model(run, precision="fp64")
    for prompt in (
        "a",
        "hello w",
        "sixteen letters.".replace(".", "s"),
        "a prompt longer than the context",
    ):
        text = prompt
        for _ in range(40):
            text += model.tokenizer.decode([int(model.logits(text).argmax())])
        assert prompt + model.generate(prompt, 40, temperature=0) == text


def test_no_cache_writes_the_same_text_and_tells_what_the_cache_is_worth(run, capsys):
    flags = ["generate", str(run), "--prompt", "the ", "--temperature", "0", "--precision", "fp64"]
    assert glasslm.cli.main(flags) == 0
    cached = capsys.readouterr()
    assert glasslm.cli.main([*flags, "--no-cache"]) == 0
    uncached = capsys.readouterr()
    assert uncached.out == cached.out
    assert "with the KV cache: " in uncached.err
    assert "with the KV cache: " not in cached.err


def test_the_command_streams_text_or_prints_json(run, capsys):
    arguments = ["generate", str(run), "--prompt", "the ", "--max-new-tokens", "30", "--seed", "3"]
    assert glasslm.cli.main(arguments) == 0
    plain = capsys.readouterr()
    assert plain.out.startswith("the ")
    assert "tokens/s" in plain.err
    assert glasslm.cli.main([*arguments, "--json", "--num-samples", "2"]) == 0
    first, second = map(json.loads, capsys.readouterr().out.splitlines())
    assert "the " + first["text"] + "\n" == plain.out
    assert set(first) == {"text", "prompt", "tokens", "finish", "seed"}
    assert (first["prompt"], first["tokens"], first["finish"], first["seed"]) == (
        "the ",
        30,
        "length",
        3,
    )
    assert second["text"] != first["text"]
    assert second["tokens"] == 30
    assert (
        glasslm.cli.main([*arguments, "--json", "--stop", first["text"][9], "--stop", "zzzz"]) == 0
    )
    stopped = json.loads(capsys.readouterr().out)
    assert stopped["finish"] == "stop"
    assert stopped["text"] == first["text"][: first["text"].index(first["text"][9])]


def test_the_command_takes_a_prompt_from_a_pipe(run, capsys, tmp_path, monkeypatch):
    piped = tmp_path / "prompt.txt"
    piped.write_bytes(b"\xef\xbb\xbfthe ")  # Windows may write a byte-order mark
    arguments = ["generate", str(run), "--max-new-tokens", "5"]
    with open(piped, encoding="utf-8") as stdin:
        monkeypatch.setattr(sys, "stdin", stdin)
        assert glasslm.cli.main(arguments) == 0
    assert capsys.readouterr().out.startswith("the ")
    piped.write_bytes(b"\xff\xfe")
    with open(piped, encoding="utf-8") as stdin:
        monkeypatch.setattr(sys, "stdin", stdin)
        assert glasslm.cli.main(arguments) == 2
    assert "UTF-8" in capsys.readouterr().err


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_a_conversation_survives_bad_prompts_and_interrupted_texts(run, capsys, monkeypatch):
    def pieces(model, prompts, *arguments, **keywords):
        written = original(model, prompts, *arguments, **keywords)
        if prompts != ["stop me"]:
            return written
        return (interrupt() if i == 3 else piece for i, piece in enumerate(written))

    def interrupt():
        raise KeyboardInterrupt

    original = trained_model.Model.pieces
    monkeypatch.setattr(trained_model.Model, "pieces", pieces)
    monkeypatch.setattr(sys, "stdin", Terminal("the\nÄ\nstop me\nthe\n"))
    assert glasslm.cli.main(["generate", str(run), "--max-new-tokens", "12"]) == 0
    out, err = capsys.readouterr()
    turns = out.split("> ")
    assert len(turns) == 6
    assert turns[1].startswith("the")
    assert "U+00C4" in err
    assert len(turns[3]) == len("stop me") + 3 + 1
    assert turns[4].startswith("the")
    assert turns[4] != turns[1]
    assert glasslm.cli.main(["generate", str(run), "--prompt", "stop me"]) == 130


def test_the_command_compares_samplers_and_obeys_a_grammar(run, capsys):
    assert (
        glasslm.cli.main(
            ["generate", str(run), "--prompt", "a", "--compare", "--max-new-tokens", "8"]
        )
        == 0
    )
    out = capsys.readouterr().out
    assert out.startswith("== greedy ==\n")
    assert out.count("== ") == 9
    assert (
        glasslm.cli.main(
            ["generate", str(run), "--prompt", "a", "--grammar", "json", "--temperature", "3"]
        )
        == 0
    )
    captured = capsys.readouterr()
    json.loads(captured.out)
    assert "lacks" in captured.err  # this alphabet has no backslash
    words = ["--prompt", "a", "--grammar", "json", "--compare", "--max-new-tokens", "8"]
    assert glasslm.cli.main(["generate", str(run), *words]) == 0
    texts = [text for text in capsys.readouterr().out.splitlines() if not text.startswith("== ")]
    assert len([json.loads(text) for text in texts if text]) == 9


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--prompt", "Ä"], "U+00C4"),
        (["--prompt", "\udcff"], "surrogate"),
        (["--checkpoint", "newest"], "newest"),
        (["--checkpoint", "7"], "no checkpoint of step 7"),
        (["--grammar", "json", "--max-new-tokens", "1"], "takes 2 tokens"),
        (["--max-new-tokens", "0"], "max_new_tokens"),
    ],
)
def test_the_command_refuses_in_one_line(run, capsys, arguments, says):
    prompt = [] if "--prompt" in arguments else ["--prompt", "a"]
    assert glasslm.cli.main(["generate", str(run), *prompt, *arguments]) == 2
    err = capsys.readouterr().err
    assert says in err
    assert "Traceback" not in err


def test_generation_from_ids_continues_like_generation_from_text():
    config = RunConfig(model=model_config(8))
    model = trained_model.Model(config, LETTERS, HistoryEngine(LETTERS.vocab_size), 0)
    for text in ("abc", "fedcbafedcba", ""):  # within the context, longer, and none
        ids = LETTERS.encode(text)
        expected = model.generate(text, 12, temperature=0.8, top_k=3, seed=3)
        for prompt in (ids, ids.tolist(), tuple(ids), np.asarray(ids, np.uint16)):
            new = model.generate_ids(prompt, 12, temperature=0.8, top_k=3, seed=3)
            assert new.dtype == np.int64
            assert new.shape == (12,)
            assert LETTERS.decode(new.tolist()) == expected
        assert LETTERS.decode(ids.tolist()) == text


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ([0, 7], "ids hold 7: expected 0 to 6, the vocabulary of the model"),
        ([-1], "ids hold -1: expected 0 to 6"),
        ([0.5], r"ids is float64 with the shape \(1,\): expected integers \(T,\)"),
        ([[0, 1]], r"ids is int64 with the shape \(1, 2\): expected integers \(T,\)"),
        (3, r"ids is int64 with the shape \(\): expected integers \(T,\)"),
        ([True], "ids is bool"),
        ("abc", "ids is a text: give it to generate"),
    ],
)
def test_ids_that_are_no_text_of_the_model_are_refused(ids, message):
    config = RunConfig(model=model_config(8))
    model = trained_model.Model(config, LETTERS, HistoryEngine(LETTERS.vocab_size), 0)
    with pytest.raises(InputError, match=message):
        model.generate_ids(ids, 3)
