"""A trained model read in another context: what changes, what does not, what is refused.

And the cache's memory.
"""

import dataclasses
import json
import math
import re
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest

import glasslm.cli
from doubles import make_run
from glasslm.config.schema import EngineName, ModelConfig, Position
from glasslm.engines.memory_estimate import cache_bytes, cache_numbers
from glasslm.engines.numpy.kv_cache import KVCache
from glasslm.errors import InputError
from glasslm.inference import trained_model
from glasslm.inference.context_config import ContextConfig
from glasslm.inference.trained_model import Model

BLOCK, LONG = 16, 40
TEXT = "a cab had a bag\nbad ace fed a hag\ncafe face deaf cage head bead\n"
EXTENDABLE_POSITIONS = sorted(set(get_args(Position)) - {"learned"})


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A run for each kind of position, and one whose model rolls."""
    folder = tmp_path_factory.mktemp("runs")
    kinds: dict[str, dict[str, Any]] = {
        position: {"position": position} for position in get_args(Position)
    }
    kinds["rolling"] = {"window": 6, "n_kv_heads": 1}
    kinds["stretched"] = {"rope_scaling": "linear", "rope_factor": 2.0}
    for scaling in ("dynamic", "yarn", "llama3"):
        kinds[scaling] = {"rope_scaling": scaling, "rope_factor": 2.0}
        kinds[scaling] |= {"rope_low_rotations": 0.1, "rope_high_rotations": 1.5}
    kinds["fraction"] = {"rope_scaling": "yarn", "rope_factor": 1.5}
    return {
        kind: make_run(folder / kind, "\n abcdefghi", **switches)
        for kind, switches in kinds.items()
    }


def load_in_fp64(run: Path, **more: Any) -> Model:
    return trained_model.load_model(run, engine="numpy", precision="fp64", **more)


# -- the model of another context ------------------------------------------------------------------


@pytest.mark.parametrize("position", EXTENDABLE_POSITIONS)
def test_a_longer_context_reads_on_where_the_shorter_one_ends(
    runs: dict[str, Path], position: str
) -> None:
    """The first tokens are predicted as before.

    Those after the context from all before them, not from none.
    """
    short, long = load_in_fp64(runs[position]), load_in_fp64(runs[position], context=LONG)
    assert long.config.model == dataclasses.replace(short.config.model, block_size=LONG)
    short_losses, long_losses = short.losses(TEXT[: LONG + 1]), long.losses(TEXT[: LONG + 1])
    np.testing.assert_allclose(long_losses[:BLOCK], short_losses[:BLOCK], atol=1e-12)
    assert abs(long_losses[BLOCK] - short_losses[BLOCK]) > 1e-6
    for end in (BLOCK + 5, LONG):  # the same by the cache
        logits = long.logits(TEXT[:end]).astype(np.float64)
        target = long.tokenizer.encode(TEXT[end])[0]
        assert np.log(np.exp(logits - logits[target]).sum()) == pytest.approx(
            long_losses[end - 1], rel=1e-5
        )
    assert long.evaluate(TEXT).loss == pytest.approx(long.losses(TEXT).mean())


def test_a_shorter_context_forgets_earlier(runs: dict[str, Path]) -> None:
    short = load_in_fp64(runs["rope"], context=4)
    np.testing.assert_allclose(short.losses(TEXT)[4:8], short.losses(TEXT[4:9]), atol=1e-12)


@pytest.mark.parametrize("scaling", ["linear", "ntk"])
def test_rope_is_stretched_by_how_much_longer_the_context_is(
    runs: dict[str, Path], scaling: Any
) -> None:
    model = load_in_fp64(runs["rope"], context=LONG, rope_scaling=scaling)
    c = model.config.model
    assert (c.block_size, c.rope_scaling, c.rope_factor) == (LONG, scaling, LONG / BLOCK)
    plain = load_in_fp64(runs["rope"], context=LONG)
    assert np.abs(model.losses(TEXT[:BLOCK]) - plain.losses(TEXT[:BLOCK])).max() > 1e-3


def test_a_model_trained_with_scaling_is_stretched_further(runs: dict[str, Path]) -> None:
    c = load_in_fp64(runs["stretched"], context=2 * BLOCK, rope_scaling="ntk").config.model
    assert (c.rope_scaling, c.rope_factor) == ("ntk", 4.0)
    c = load_in_fp64(
        runs["stretched"], context=2 * BLOCK
    ).config.model  # not asked: as it was trained
    assert (c.rope_scaling, c.rope_factor) == ("linear", 2.0)


@pytest.mark.parametrize("scaling", ["linear", "dynamic", "yarn", "llama3"])
def test_another_context_keeps_the_frequencies_of_a_model_trained_with_scaling(
    runs: dict[str, Path], scaling: str
) -> None:
    run = runs["stretched" if scaling == "linear" else scaling]
    losses = load_in_fp64(run).losses(TEXT[: BLOCK + 1])
    for context in (LONG, BLOCK, 4):
        other = load_in_fp64(run, context=context).losses(TEXT[: BLOCK + 1])
        end = min(context, BLOCK)
        np.testing.assert_allclose(other[:end], losses[:end], atol=1e-12)


def test_an_original_context_of_no_whole_number_allows_no_other_context(
    runs: dict[str, Path],
) -> None:
    assert load_in_fp64(runs["fraction"], context=BLOCK).config.model.rope_original_context == 0
    with pytest.raises(InputError, match=r"16 / 1\.5 = 10\.6667 .* leave out --context"):
        load_in_fp64(runs["fraction"], context=LONG)


def test_without_a_context_everything_is_as_it_was() -> None:
    model = ModelConfig(position="learned")
    assert ContextConfig().apply_to(model) is model
    assert ContextConfig(context=model.block_size).apply_to(model) == model


@pytest.mark.parametrize(
    ("kind", "arguments", "says"),
    [
        ("learned", ["--context", "17"], "learned a vector for each of 16 positions"),
        ("learned", ["--context", "15"], "--position rope"),
        ("alibi", ["--context", "32", "--rope-scaling", "ntk"], "needs --position rope, not alibi"),
        ("rope", ["--rope-scaling", "linear"], "--context above 16"),
        ("rope", ["--context", "16", "--rope-scaling", "linear"], "--context above 16"),
        ("rope", ["--context", "0"], "block_size is 0"),
        ("rope", ["--context", "20", "--rope-scaling", "yarn"], "yarn"),
    ],
)
@pytest.mark.parametrize("command", ["generate", "evaluate"])
def test_what_its_positions_do_not_allow_is_refused_in_one_line(
    runs: dict[str, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    command: str,
    kind: str,
    arguments: list[str],
    says: str,
) -> None:
    text = tmp_path / "text.txt"
    text.write_text(TEXT, encoding="utf-8")
    rest = ["--prompt", "a"] if command == "generate" else ["--text-file", str(text)]
    assert glasslm.cli.main([command, str(runs[kind]), *rest, *arguments]) == 2
    err = capsys.readouterr().err.strip()
    assert says in err
    if "yarn" not in arguments:  # the parser of flags says that in several
        phases = err.splitlines()[:-1]
        assert set(phases) <= {"reading the model and the text"}


def test_a_wrong_scaling_is_refused_in_python_too(runs: dict[str, Path]) -> None:
    """Models are trained with further scalings, and "none" is no stretch."""
    for name in ("yarn", "llama3", "dynamic", "none", "Linear"):
        with pytest.raises(InputError, match=f"'{name}': expected one of linear, ntk$"):
            trained_model.load_model(runs["rope"], context=32, rope_scaling=name)  # type: ignore[arg-type]


def test_the_commands_read_the_context_that_they_are_given(
    runs: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = tmp_path / "text.txt"
    text.write_text(TEXT, encoding="utf-8")
    for more, settings in (
        ([], {}),
        (["--context", "40", "--rope-scaling", "ntk"], {"context": 40, "rope_scaling": "ntk"}),
    ):
        model = trained_model.load_model(runs["rope"], **settings)
        assert (
            glasslm.cli.main(
                ["evaluate", str(runs["rope"]), "--text-file", str(text), "--json", *more]
            )
            == 0
        )
        assert json.loads(capsys.readouterr().out)["loss"] == pytest.approx(
            model.evaluate(TEXT).loss
        )
        arguments = [
            "generate",
            str(runs["rope"]),
            "--prompt",
            TEXT,
            "--max-new-tokens",
            "30",
            "--json",
            *more,
        ]
        assert glasslm.cli.main(arguments) == 0
        assert json.loads(capsys.readouterr().out)["text"] == model.generate(TEXT, 30)


# -- models that roll ------------------------------------------------------------------------------


def test_a_model_that_rolls_reads_and_writes_without_end(runs: dict[str, Path]) -> None:
    """Each token has the probability that one pass over all of the text gives it."""
    model, wide = (
        load_in_fp64(runs["rolling"]),
        load_in_fp64(runs["rolling"], context=len(TEXT) + 3 * BLOCK),
    )
    prompts = ["a", TEXT[:30], TEXT]
    pieces = list(model.pieces(prompts, 3 * BLOCK))
    for number, prompt in enumerate(prompts):
        written = [piece for piece in pieces if piece.prompt == number]
        text = prompt + "".join(piece.text for piece in written)
        expected = wide.losses(text)[len(prompt) - 1 :]
        np.testing.assert_allclose(
            [-piece.logprob for piece in written], expected, rtol=0, atol=1e-9
        )
        for end in (1, BLOCK, BLOCK + 1, len(text) - 1):
            logits = model.logits(text[:end]).astype(np.float64)
            target = model.tokenizer.encode(text[end])[0]
            nats = np.log(np.exp(logits - logits[target]).sum())
            assert nats == pytest.approx(wide.losses(text)[end - 1], rel=1e-5)


# -- the cache's memory ----------------------------------------------------------------------------


def test_the_formula_of_the_cache() -> None:
    model = ModelConfig(d_model=64, n_layers=3, n_heads=4, n_kv_heads=2, block_size=100)
    assert cache_bytes(model, 5, 100, 4) == 2 * 3 * 2 * 16 * 100 * 5 * 4
    rolling = dataclasses.replace(model, window=30)
    assert cache_bytes(rolling, 5, 100, 4) == 2 * 3 * 2 * 16 * 30 * 5 * 4
    assert cache_bytes(rolling, 5, 20, 2) == 2 * 3 * 2 * 16 * 20 * 5 * 2
    assert cache_bytes(dataclasses.replace(rolling, position="learned"), 1, 100, 4) == cache_bytes(
        model, 1, 100, 4
    )
    assert math.prod(cache_numbers(model, 5, 100).values()) == 2 * 3 * 2 * 16 * 100 * 5


@pytest.mark.parametrize("tokens", [1, 31, 32, 33, 64, 65])
def test_the_cache_of_numpy_has_whole_blocks_of_keys(tokens: int) -> None:
    model = ModelConfig(d_model=64, n_layers=3, n_heads=4, n_kv_heads=2, block_size=100)
    for config in (model, dataclasses.replace(model, window=33)):
        cache = KVCache(config.resolve(), 2, tokens, np.float32)
        allocated = cache.keys.nbytes + cache.values.nbytes
        assert cache_bytes(config, 2, tokens, 4, "numpy") == allocated
    factors = cache_numbers(model, 2, tokens, "numpy")
    assert ("tokens, in blocks of 32" in factors) == (tokens in (33, 65))


@pytest.mark.parametrize(
    ("engine", "precision"),
    [("numpy", "fp32"), ("numpy", "fp64"), ("torch", "fp32"), ("torch", "bf16")],
)
@pytest.mark.parametrize(("kind", "tokens"), [("rope", BLOCK), ("rolling", 6)])
def test_generate_tells_the_memory_that_the_cache_takes(
    runs: dict[str, Path],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    engine: EngineName,
    precision: str,
    kind: str,
    tokens: int,
) -> None:
    if engine == "torch":
        pytest.importorskip("torch")
        # A CPU without bfloat16 instructions emulates them, with a cache of the same size.
        monkeypatch.setattr("glasslm.engines.torch.hardware.has_bf16", lambda device: True)
    made: list[Any] = []

    def load(*arguments: Any, **settings: Any) -> Model:
        model = trained_model.load_model(*arguments, **settings)
        original = model.engine.new_cache
        monkeypatch.setattr(
            model.engine, "new_cache", lambda *sizes: made.append(original(*sizes)) or made[-1]
        )
        return model

    monkeypatch.setattr("glasslm.cli.generate.load_model", load)
    arguments = ["--prompt", "a bag", "--num-samples", "3", "--max-new-tokens", "20"]
    assert (
        glasslm.cli.main(
            ["generate", str(runs[kind]), *arguments, "--engine", engine, "--precision", precision]
        )
        == 0
    )
    (line,) = re.findall("^cache: .*", capsys.readouterr().err, re.M)
    formula, _, printed = line.removeprefix("cache: ").partition(" = ")
    numbers = [int(number) for number in re.findall(r"\b(\d+) (?:\(|bytes)", formula)]
    (cache,) = made
    assert math.prod(numbers) == cache.keys.nbytes + cache.values.nbytes
    assert f"{tokens} (tokens) x 3 (texts)" in formula
    assert float(printed.split()[0]) * 1000 == pytest.approx(math.prod(numbers), rel=0.01)
    assert printed.endswith("kB")
