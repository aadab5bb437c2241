"""transformers and llama.cpp compute the exported model from its GGUF file."""

from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("gguf")

from exported_models import GPT2, MODELS, SMALL, llama_cpp, make_export, small_config

from glasslm.interop import gguf_comparison, gguf_file
from glasslm.interop.gguf_comparison import LogitsComparison
from glasslm.interop.gguf_file import Quantization

QUICK = {"llama, shared keys", "llama, biases"}  # each takes half a second


@pytest.mark.parametrize(
    "name",
    [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in MODELS],
)
def test_transformers_computes_the_same_where_it_reads_the_whole_file(
    name: str, tmp_path: Path
) -> None:
    """... and another model, or none, where `transformers_misreading` says so."""
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    model = make_export(tmp_path, MODELS[name])
    gguf_file.write(model, tmp_path / "m.gguf", "f32")
    misreading, ours = (
        gguf_comparison.transformers_misreading(model.config),
        model.logits(model.probe_tokens()),
    )
    try:
        theirs = gguf_comparison.logits_by_transformers(tmp_path / "m.gguf", model.probe_tokens())
    except (RuntimeError, ValueError):  # weights of other shapes than it expects
        theirs = np.full_like(ours, np.inf)
    assert LogitsComparison("transformers", ours, theirs).is_close(model.config, "f32") != bool(
        misreading
    )


def test_transformers_reads_fewer_bits(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    model = make_export(tmp_path, MODELS["llama, shared keys"])
    for kind, least, most in (("f32", 0, 1e-6), ("f16", 1e-5, 1e-3), ("q8_0", 1e-3, 5e-2)):
        gguf_file.write(model, tmp_path / "m.gguf", kind)  # type: ignore[arg-type]
        reading = next(gguf_comparison.compare_readers(model, tmp_path / "m.gguf", kind))  # type: ignore[arg-type]
        assert reading.reader == "transformers"
        assert least <= reading.median_difference <= reading.largest_difference <= most
        assert reading.is_close(model.config, kind)  # type: ignore[arg-type]


def test_a_difference_is_a_share_of_the_largest_logit_and_a_divergence_nats() -> None:
    ours = np.log(np.array([[[0.5, 0.25, 0.25], [0.5, 0.25, 0.25], [0.8, 0.1, 0.1]]], np.float32))
    theirs = ours.copy()
    theirs[0, 2] = np.log([0.1, 0.8, 0.1])
    reading = LogitsComparison("llama.cpp", ours, theirs, same_tokens=True)
    assert reading.largest_difference == pytest.approx(np.log(8) / np.log(10), rel=1e-6)
    assert reading.median_difference == 0
    assert reading.kl_divergence == pytest.approx(0.7 * np.log(8) / 3, rel=1e-6)
    assert reading.is_close(SMALL, "f16")
    assert not reading.is_close(SMALL, "f32")
    gelu = small_config(**GPT2)
    for reader, config, kind, bound in (
        ("llama.cpp", SMALL, "f32", 1e-5),
        ("llama.cpp", gelu, "f32", 2e-3),
        ("transformers", gelu, "f32", 1e-5),
        ("llama.cpp", SMALL, "f16", 5e-3),
        ("transformers", SMALL, "q8_0", 1e-1),
    ):
        shift = bound * np.log(10)  # the largest logit is -ln 10
        assert LogitsComparison(reader, ours, ours + np.float32(0.9 * shift)).is_close(config, kind)  # type: ignore[arg-type]
        assert not LogitsComparison(reader, ours, ours + np.float32(1.1 * shift)).is_close(
            config, kind
        )  # type: ignore[arg-type]
    assert not LogitsComparison("llama.cpp", ours, ours, same_tokens=False).is_close(SMALL, "f32")
    assert not LogitsComparison("llama.cpp", ours, np.full_like(ours, np.nan)).is_close(
        SMALL, "q8_0"
    )


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("kind", ["f32", "f16", "q8_0"])
def test_llama_cpp_computes_the_same(name: str, kind: Quantization, tmp_path: Path) -> None:
    llama_cpp()
    model = make_export(tmp_path, MODELS[name])
    if kind == "q8_0" and model.config.d_ff % 32:
        return
    gguf_file.write(model, tmp_path / "m.gguf", kind)
    ours, theirs = (
        model.logits(model.probe_tokens()),
        gguf_comparison.logits_by_llama_cpp(tmp_path / "m.gguf", model.probe_tokens()),
    )
    reading = LogitsComparison("llama.cpp", ours, theirs)
    assert reading.is_close(model.config, kind), (
        reading.largest_difference,
        reading.median_difference,
    )


def test_only_gelu_differs_in_llama_cpp(tmp_path: Path) -> None:
    """With biases of 20 every GELU is the identity, also by the half-precision table."""
    llama_cpp()
    model = make_export(tmp_path, small_config(**GPT2, bias=True))
    for block in range(2):
        model.weights[f"blocks.{block}.feedforward.up.bias"] += np.float32(20)
    gguf_file.write(model, tmp_path / "m.gguf", "f32")
    theirs = gguf_comparison.logits_by_llama_cpp(tmp_path / "m.gguf", model.probe_tokens())
    assert (
        LogitsComparison("llama.cpp", model.logits(model.probe_tokens()), theirs).largest_difference
        < 1e-5
    )


@pytest.mark.parametrize("kind", ["f16", "q8_0"])
def test_a_matrix_in_the_wrong_order_is_not_close(
    kind: Quantization, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    llama_cpp()
    model = make_export(tmp_path, small_config())
    monkeypatch.setattr("glasslm.interop.gguf_file._interleave_halves", lambda rows, heads: rows)
    gguf_file.write(model, tmp_path / "m.gguf", kind)
    reading = list(gguf_comparison.compare_readers(model, tmp_path / "m.gguf", kind))[-1]
    assert (reading.reader, reading.same_tokens) == ("llama.cpp", True)
    assert not reading.is_close(model.config, kind), reading.median_difference
