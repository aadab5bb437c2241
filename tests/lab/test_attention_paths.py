"""No path of attention leaves out a position or a mask: the check finds one that does, and a path
that does not know a word, a bias or a mask fails.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any, Literal, get_args, get_origin, get_type_hints

import numpy as np
import pytest

from glasslm.config.model_config import Mask
from glasslm.config.schema import ModelConfig, OptimizerConfig, Position, RunConfig, TrainConfig
from glasslm.engines import state
from glasslm.engines.numpy import attention, flash, inference, key_blocks, model, positions
from glasslm.engines.numpy.engine import NumpyEngine
from glasslm.engines.numpy.positions import PositionTables
from glasslm.engines.protocol import Batch
from glasslm.engines.resources import is_torch_installed
from glasslm.errors import InputError
from glasslm.interop import families, gguf_file
from glasslm.lab.checks import attention_paths
from glasslm.lab.checks.attention_paths import PathResult, check_attention_paths
from glasslm.model.parameters import initial_weights, parameter_table
from glasslm.training.learning_rate import lr_at

V, B, T = 7, 2, 5
UNKNOWN: Any = "unheard-of"
ENGINES = ["numpy", *(["torch"] if is_torch_installed() else [])]
VARIANT_CASES = {
    f"{position}, {setting}"
    for position in ("rope", "alibi")
    for setting in (
        "--document-attention",
        "--attention-pattern wf",
        "--attention-softcap 0.5",
    )
}


@pytest.fixture
def numpy_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention_paths, "is_torch_installed", lambda: False)
    monkeypatch.setattr(attention_paths, "KV_HEADS", (2,))


@pytest.fixture
def two_positions(numpy_only: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention_paths, "Position", Literal["none", "rope"])
    monkeypatch.setattr(attention_paths, "VARIANT_POSITIONS", ("rope",))


def failed_cases() -> dict[str, PathResult]:
    return {result.case: result for result in check_attention_paths() if not result.passed}


def test_every_position_is_crossed_with_every_mask_and_sharing_of_heads(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(attention_paths, "is_torch_installed", lambda: False)
    results = list(check_attention_paths())
    assert all(result.passed for result in results), results
    assert {result.case for result in results} == {
        f"{position}, {heads} key-value heads, {mask} mask"
        for position in get_args(Position)
        for heads in (4, 2, 1)
        for mask in get_args(Mask)
    } | VARIANT_CASES
    assert all(result.paths >= 5 for result in results)


def test_the_paths_of_both_engines_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("torch")
    monkeypatch.setattr(attention_paths, "KV_HEADS", (2,))
    results = list(check_attention_paths(seed=3))
    assert all(result.passed for result in results), results
    assert len(results) == len(get_args(Position)) * len(get_args(Mask)) + len(VARIANT_CASES)


@pytest.mark.usefixtures("numpy_only")
@pytest.mark.parametrize(
    ("module", "name", "path"),
    [(model, "tile_slopes", "flash"), (inference, "dense_bias", "cache")],
)
def test_a_path_without_the_bias_is_found(
    module: Any, name: str, path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, name, lambda *arguments: None)
    failed = failed_cases()
    assert {case.partition(",")[0] for case in failed} == {"alibi"}
    assert all(path in result.where for result in failed.values())


@pytest.mark.usefixtures("two_positions")
def test_tiles_that_leave_out_earlier_keys_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """A fault that the engine's own tiles hide here, because they hold the whole text."""
    right_tiles, right_keys = flash.TileMask.tiles, attention.visible_keys
    sizes = attention.TILE_QUERIES, flash.TILE_LENGTH, key_blocks.KEY_BLOCK

    def newest_tile(mask: flash.TileMask, length: int) -> Iterator[Any]:
        return ((queries, keys[:1]) for queries, keys in right_tiles(mask, length))

    monkeypatch.setattr(flash.TileMask, "tiles", newest_tile)
    failed = failed_cases()
    assert all("flash" in result.where for result in failed.values())
    assert {"none, 2 key-value heads, causal mask", "rope, --attention-pattern wf"} <= failed.keys()
    assert sizes == (attention.TILE_QUERIES, flash.TILE_LENGTH, key_blocks.KEY_BLOCK)
    monkeypatch.setattr(flash.TileMask, "tiles", right_tiles)

    def keys_of_own_tile(*arguments: Any) -> Any:
        visible = right_keys(*arguments)
        position, tile = np.arange(visible.shape[-1]), attention.TILE_QUERIES
        return visible * (position >= position[:, None] // tile * tile)

    monkeypatch.setattr(attention, "visible_keys", keys_of_own_tile)
    assert {"none, 2 key-value heads, causal mask", "rope, --attention-softcap 0.5"} <= {
        *failed_cases()
    }


@pytest.mark.usefixtures("two_positions")
def test_a_setting_that_changes_nothing_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention_paths, "VARIANTS", {"--nothing": {}})
    failed = failed_cases()
    assert {case: result.missing_effect for case, result in failed.items()} == {
        "rope, --nothing": "--nothing"
    }


@pytest.mark.usefixtures("numpy_only")
@pytest.mark.parametrize("word", [word for word in get_args(Position) if word != "none"])
def test_a_position_that_trains_as_none_is_found(
    word: Position, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(positions.POSITIONS, word, PositionTables())
    if word == "learned":  # its weights are added wherever the table has them
        monkeypatch.setattr(NumpyEngine, "load", load_without_positions)
    failed = failed_cases()
    assert {case.partition(",")[0] for case in failed} == {word}
    assert {result.missing_effect for result in failed.values()} == {f"--position {word}"}


def load_without_positions(engine: NumpyEngine, state: Any, *_: Any) -> None:
    for name, array in state:
        engine.weights[name][...] = 0 if name == "position.weight" else array


# -- a path that does not know ---------------------------------------------------------------------


def make_config(**changes: Any) -> RunConfig:
    c = ModelConfig(d_model=8, n_layers=1, n_heads=2, d_ff=6, block_size=T + 1)
    run = RunConfig(c, optimizer=OptimizerConfig(), train=TrainConfig(batch_size=B)).resolve()
    return dataclasses.replace(run, model=dataclasses.replace(run.model, **changes))


def make_engine(name: str, config: RunConfig) -> Any:
    if name == "numpy":
        engine: Any = NumpyEngine(config, V, threads=1, dtype=np.float64)
    else:
        from glasslm.engines.torch.engine import TorchEngine

        engine = TorchEngine(config, V, device="cpu", precision="fp64", threads=1)
    engine.load(initial_weights(parameter_table(config.model, V), 0))
    return engine


def run_paths(engine: Any) -> Iterator[Any]:
    tokens = np.zeros((B, T), np.int64)
    yield lambda: engine.losses(tokens, tokens)
    yield lambda: engine.logits(tokens, engine.new_cache(B, T), np.full(B, T))


def literal_fields() -> list[str]:
    hints = get_type_hints(ModelConfig)
    return [field for field, hint in hints.items() if get_origin(hint) is Literal]


@pytest.mark.parametrize("engine_name", ENGINES)
@pytest.mark.parametrize("field", literal_fields())
def test_an_unknown_word_fails_and_does_not_train(engine_name: str, field: str) -> None:
    changes: dict[str, Any] = {field: UNKNOWN}
    if field == "rope_scaling":
        changes["rope_factor"] = 2.0

    def train() -> None:
        next(run_paths(make_engine(engine_name, make_config(**changes))))()

    with pytest.raises((AssertionError, KeyError)):
        train()


@pytest.mark.parametrize("engine_name", ENGINES)
@pytest.mark.parametrize("path", [0, 1])
@pytest.mark.parametrize("attention", ["plain", "flash"])
def test_an_unknown_mask_fails_in_every_path(
    engine_name: str, path: int, attention: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make_engine(engine_name, make_config(attention=attention))
    monkeypatch.setattr(ModelConfig, "mask", UNKNOWN)
    with pytest.raises(AssertionError):
        list(run_paths(engine))[path]()


@pytest.mark.parametrize("path", [0, 1])
@pytest.mark.parametrize("attention", ["plain", "flash"])
def test_an_unknown_bias_fails_in_every_path(path: int, attention: Any) -> None:
    engine = make_engine("numpy", make_config(attention=attention))
    engine.model.bias = UNKNOWN
    with pytest.raises(AssertionError):
        list(run_paths(engine))[path]()


def test_an_encoding_with_a_bias_need_not_say_so() -> None:
    pytest.importorskip("torch")
    from glasslm.engines.torch.positions import NoPositions

    class Biased(NoPositions):
        def bias(self, ahead: Any) -> Any:
            return -ahead.abs()

    config = make_config().model
    assert Biased(config, np.float64).has_bias
    assert not NoPositions(config, np.float64).has_bias


@pytest.mark.parametrize("engine_name", ENGINES)
def test_an_unknown_optimizer_fails_and_leaves_no_weight_as_it_is(
    engine_name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(state.MOMENTS, UNKNOWN, ("unheard-of.m",))
    config = make_config()
    config = dataclasses.replace(
        config, optimizer=dataclasses.replace(config.optimizer, optimizer=UNKNOWN)
    )

    def update() -> None:
        engine = make_engine(engine_name, config)
        tokens = np.zeros((B, T), np.int64)
        engine.accumulate(Batch(tokens, tokens, step=0, rows=np.arange(B)), 1.0)
        engine.update(1e-3)

    with pytest.raises(AssertionError, match="does not know the optimizer"):
        update()


def test_an_unknown_schedule_fails() -> None:
    config = dataclasses.replace(OptimizerConfig(), schedule=UNKNOWN)
    with pytest.raises(AssertionError):
        lr_at(500, config, 1000)


def test_no_export_takes_an_unknown_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ModelConfig, "mask", UNKNOWN)
    llama = make_config().model
    gpt2 = make_config(norm="layernorm", feedforward="gelu", position="learned").model
    for export in (families.choose_family, gguf_file.llama_cpp_config):
        for c in (llama, gpt2):
            with pytest.raises(InputError, match=UNKNOWN):
                export(c)
