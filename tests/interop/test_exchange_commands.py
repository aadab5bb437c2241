"""`glasslm export` and `glasslm import`: export, compare, import again, and fine-tune."""

import json
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

import transformers

import glasslm
from chat_runs import make_random_chat
from glasslm import cli
from glasslm.runs import checkpoint, run_folder
from small_runs import train, write_text

pytestmark = pytest.mark.usefixtures("no_figures")


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text(tmp_path_factory.mktemp("text") / "text.txt")


@pytest.fixture(scope="module")
def run(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with averaged weights, which differ from the last ones."""
    return train(text, tmp_path_factory.mktemp("runs") / "small", ema=0.5, n_kv_heads=1).run_dir


def test_a_trained_model_goes_out_is_compared_and_comes_back(
    run: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, back = tmp_path / "out", tmp_path / "back"
    assert cli.main(["export", str(run), "--to", "hf", "--out", str(out)]) == 0
    assert "logits equal in transformers" in capsys.readouterr().out
    assert cli.main(["import", str(out), "--run-dir", str(back)]) == 0
    assert capsys.readouterr().out == f"run: {back}\n"
    here, there = glasslm.load(run), glasslm.load(back)
    assert here.tokenizer.sha256 == there.tokenizer.sha256
    assert here.generate("the cat", 30) == there.generate("the cat", 30)
    np.testing.assert_allclose(
        here.logits("the cat"), there.logits("the cat"), rtol=1e-5, atol=1e-5
    )

    words = transformers.AutoTokenizer.from_pretrained(out)
    assert words.encode("the old king") == here.tokenizer.encode("the old king").tolist()
    card = (out / "README.md").read_text(encoding="utf-8")
    assert "text.txt" in card

    for command in ("report", "verify"):
        assert cli.main([command, str(back)]) == 0
    assert cli.main(["evaluate", str(back), "--text-file", str(text)]) == 0
    for command in (["evaluate", str(back)], ["diagnose", str(back)]):
        capsys.readouterr()
        assert cli.main(command) == 2
        assert "--text-file" in capsys.readouterr().err
    assert cli.main(["resume", str(back)]) == 2


def test_adapters_go_out_and_come_back(
    run: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("peft")
    tuned, out, back = (str(tmp_path / name) for name in ("tuned", "out", "back"))
    flags = ["--max-steps", "3", "--threads", "1", "--sample-interval", "0"]
    assert (
        cli.main(["finetune", str(run), "--text-file", str(text), "--run-dir", tuned, *flags]) == 0
    )
    capsys.readouterr()
    assert cli.main(["export", tuned, "--to", "peft", "--out", out, "--checkpoint", "latest"]) == 0
    assert "logits equal in PEFT" in capsys.readouterr().out
    assert cli.main(["import", out, "--run-dir", back]) == 2
    assert "--base" in capsys.readouterr().err
    assert cli.main(["import", out, "--base", str(run), "--run-dir", back]) == 0
    here, there = glasslm.load(tuned, "latest"), glasslm.load(back)
    np.testing.assert_allclose(here.logits("a dog"), there.logits("a dog"), rtol=1e-6, atol=1e-6)
    left = checkpoint.load(Path(tuned)).weights()
    for name, array in checkpoint.load(Path(back)).weights().items():
        np.testing.assert_array_equal(left[name], array)


def test_impossible_exports_are_refused_before_anything_is_written(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    hf = ["export", str(run), "--to", "hf", "--out"]
    for argv, word in (
        ([*hf, str(out), "--quantize", "f16"], "--quantize"),
        ([*hf, str(out), "--base", "there"], "--base"),
        ([*hf, str(tmp_path / "full")], "choose a new folder"),
        (["export", str(run), "--to", "peft", "--out", str(out)], "no adapters"),
        (["export", "nobody", "--to", "hf", "--out", str(out)], "nobody"),
        (["import", str(out), "--run-dir", str(tmp_path / "run")], "config.json"),
        (["import", str(run), "--run-dir", str(tmp_path / "run")], "config.json"),
        (["import", "model.gguf", "--run-dir", str(tmp_path / "run")], "safetensors folder"),
    ):
        assert cli.main(argv) == 2
        assert word in capsys.readouterr().err
        assert not out.exists()
        assert not (tmp_path / "run").exists()


def test_a_chat_that_llama_cpp_would_hang_on_is_refused_before_any_work(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Characters without "<" and the special token "<|endoftext|>": "<b" has no token."""
    chat = make_random_chat(tmp_path / "chat", block_size=16)
    capsys.readouterr()
    out = tmp_path / "chat.gguf"
    assert cli.main(["export", str(chat), "--to", "gguf", "--out", str(out)]) == 2
    error = capsys.readouterr().err
    assert "first character is in the vocabulary" in error
    assert "note:" not in error
    assert "writing" not in error
    assert not out.exists()


def test_logits_that_differ_give_exit_code_1(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from glasslm.interop import llama

    monkeypatch.setitem(llama.MODULES, "attention.q", "self_attn.k_proj")
    monkeypatch.setitem(llama.MODULES, "attention.k", "self_attn.q_proj")
    same_heads = train(
        write_text(tmp_path / "t.txt"), tmp_path / "run", max_steps=2, n_layers=1
    ).run_dir
    assert cli.main(["export", str(same_heads), "--to", "hf", "--out", str(tmp_path / "out")]) == 1
    assert "logits differ" in capsys.readouterr().err
    assert [path.name for path in tmp_path.glob("out*")] == []


def test_an_imported_model_can_be_fine_tuned(run: Path, text: Path, tmp_path: Path) -> None:
    assert cli.main(["export", str(run), "--to", "hf", "--out", str(tmp_path / "out")]) == 0
    assert cli.main(["import", str(tmp_path / "out"), "--run-dir", str(tmp_path / "back")]) == 0
    flags = [
        "--max-steps",
        "3",
        "--threads",
        "1",
        "--sample-interval",
        "0",
        "--run-dir",
        str(tmp_path / "more"),
    ]
    assert (
        cli.main(["finetune", str(tmp_path / "back"), "--full", "--text-file", str(text), *flags])
        == 0
    )
    losses = [
        line["loss"]
        for line in run_folder.Run(tmp_path / "more").metrics()
        if line["kind"] == "eval"
    ]
    first = glasslm.load(run).evaluate(text.read_text()).loss
    assert losses[0] == pytest.approx(first, abs=0.1)  # of the validation part alone
    origin = json.loads((tmp_path / "back" / "run.json").read_text())["imported"]
    assert origin["model_type"] == "llama"
    assert len(origin["sha256"]["model.safetensors"]) == 64


def test_an_import_stores_no_moments_and_trains_as_with_zeros(run: Path, tmp_path: Path) -> None:
    """A checkpoint without moments loads in both engines, and gives the bits of moments of zero."""
    from glasslm.config.schema import ComputeConfig, EngineName
    from glasslm.engines.factory import make_engine
    from glasslm.engines.protocol import Batch

    out, back = tmp_path / "out", tmp_path / "back"
    assert cli.main(["export", str(run), "--to", "hf", "--out", str(out)]) == 0
    assert cli.main(["import", str(out), "--run-dir", str(back)]) == 0
    imported, opened = checkpoint.load(back), run_folder.Run(back)
    assert (imported.path / "optimizer.safetensors").stat().st_size < 100
    without = dict(imported.state())
    assert without.keys() == dict(imported.weights()).keys()
    rng, V = np.random.default_rng(0), opened.tokenizer.vocab_size
    fresh = make_engine(opened.config, V, ComputeConfig(engine="numpy"))
    zeros = {name: np.zeros_like(array) for name, array in fresh.state() if "/" in name}
    assert zeros
    tokens = rng.integers(0, V, (4, opened.config.model.block_size))
    batch = Batch(tokens, np.roll(tokens, -1, 1), 0, np.arange(4))
    engines: tuple[EngineName, ...] = ("numpy", "torch")
    for name in engines:
        states = []
        for state in (without, without | zeros):
            engine = make_engine(
                opened.config, V, ComputeConfig(engine=name, threads=1, device="cpu")
            )
            engine.load(state.items())
            engine.accumulate(batch, 1 / tokens.size)
            engine.update(1e-3)
            states.append({key: array.copy() for key, array in engine.state()})
        assert states[0].keys() == states[1].keys() >= zeros.keys()
        for key, array in states[0].items():
            np.testing.assert_array_equal(array, states[1][key])


def test_exported_files_hold_no_path_of_this_machine(
    run: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In text and in metadata, whatever command made the run; with a relative --out, too."""
    pytest.importorskip("peft")
    pytest.importorskip("gguf")
    monkeypatch.chdir(tmp_path)
    flags = ["--max-steps", "2", "--threads", "1", "--sample-interval", "0", "--run-dir", "tuned"]
    assert cli.main(["finetune", str(run), "--text-file", str(text), *flags]) == 0
    model = str(tmp_path / "hf")
    assert cli.main(["export", str(run), "--to", "hf", "--out", model]) == 0
    assert cli.main(["import", model, "--run-dir", "back"]) == 0
    for number, (name, to, *more) in enumerate(
        [
            (str(run), "gguf"), ("tuned", "hf"), ("tuned", "gguf"), ("tuned", "peft"),
            ("tuned", "peft", "--base", model), ("tuned", "peft", "--base", "hf"),
            (str(tmp_path / "back"), "hf"), (str(tmp_path / "back"), "gguf"),
        ]
    ):  # fmt: skip
        assert cli.main(["export", name, "--to", to, "--out", f"out-{number}", *more]) == 0
    files = [path for folder in ("hf", *Path().glob("out-*")) for path in Path(folder).rglob("*")]
    assert len([path for path in files if path.is_file()]) > 30
    secrets = {str(path).encode() for path in (tmp_path, run.parent, text.parent, Path.home())}
    for path in files:
        if path.is_file():
            content = path.read_bytes()
            assert not [secret for secret in secrets if secret in content], path
            if path.name == "README.md":
                assert b"base_model" not in content
