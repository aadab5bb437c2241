"""Fine-tuning learns another text, measures forgetting of the old one, and refuses bad settings.

A fine-tuned run is a run like any other: it stops and goes on, by either engine, and needs no other
folder.
"""

import shutil
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

import glasslm
from doubles import make_run
from glasslm.cli import main
from glasslm.config.conversion import with_flags
from glasslm.config.schema import ComputeConfig, Precision
from glasslm.engines.protocol import EngineName
from glasslm.errors import DamagedError, InputError
from glasslm.runs import checkpoint, run_folder
from glasslm.training import launch
from glasslm.training.fine_tuning import DEFAULT_RANK, FULL_LR, LORA_LR, BaseRun, fine_tuning_config
from glasslm.training.outcome import Outcome
from small_runs import (
    COMPUTE,
    comparable_results,
    ignore_message,
    interrupt_at,
    logged_lines,
    read_json,
    without_report,
)
from tuned_runs import QUICK, finetune, flag_arguments, make_base, write_new_text


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def new(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_new_text(tmp_path_factory.mktemp("new"))


@pytest.fixture(scope="module")
def tuned(base: Path, new: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with adapters; its last step is its best."""
    return finetune(base, new, tmp_path_factory.mktemp("tuned") / "run", max_steps=24)


def losses(run: Path, split: str) -> dict[int, float]:
    """By step, as it was measured last."""
    return {
        line["step"]: line["loss"] for line in logged_lines(run, "eval") if line["split"] == split
    }


# -- what is learned, and what is forgotten --------------------------------------------------------


def test_the_new_text_is_learnt_and_the_old_one_watched(base: Path, tuned: Path) -> None:
    """From what the base knows of each of them."""
    new_losses, old_losses = losses(tuned, "val"), losses(tuned, "old")
    assert list(new_losses) == list(old_losses) == [0, 4, 8, 12, 16, 20, 24]
    assert new_losses[24] < 0.85 * new_losses[0]
    assert old_losses[0] == pytest.approx(min(losses(base, "val").values()), rel=1e-6)
    assert old_losses[24] > old_losses[0] + 0.05
    model, run = glasslm.load(base, engine="numpy"), run_folder.Run(tuned)
    new_text = run.dataset(ignore_message).val.tokens
    assert new_losses[0] == pytest.approx(model.score(new_text).loss, rel=1e-6)
    assert not any(line["best"] for line in logged_lines(tuned, "eval") if line["split"] == "old")


def test_the_run_says_where_it_comes_from_and_holds_all_it_needs(base: Path, tuned: Path) -> None:
    record, origin = read_json(tuned / "run.json"), run_folder.Run(base)
    best_checkpoint = checkpoint.load(base, "best")
    data = origin.record["data"]["sha256"]
    assert record["base"] == {
        "run": str(base.resolve()),
        "step": best_checkpoint.step,
        "data_sha256": data,
    }
    # Q and v of two blocks
    assert record["parameters"]["trained"] == 2 * 2 * DEFAULT_RANK * (32 + 32)
    assert record["tokenizer"] == origin.record["tokenizer"]
    frozen = load_file(tuned / "base" / "model.safetensors")
    assert frozen.keys() == best_checkpoint.weights().keys()
    for name, array in best_checkpoint.weights().items():
        np.testing.assert_array_equal(frozen[name], array)
    ours = load_file(checkpoint.load(tuned).path / "model.safetensors")
    assert {name.rpartition(".")[2] for name in ours} == {"lora_a", "lora_b"}


def test_full_fine_tuning_trains_all_weights(base: Path, new: Path, tmp_path: Path) -> None:
    run = finetune(base, new, tmp_path / "run", full=True)
    new_losses = losses(run, "val")
    assert new_losses[12] < 0.75 * new_losses[0]
    assert list(losses(run, "old")) == [0, 4, 8, 12]
    assert not (run / "base").exists()
    weights, base_weights = checkpoint.load(run).weights(), checkpoint.load(base, "best").weights()
    assert weights.keys() == base_weights.keys()
    assert not any(np.array_equal(weights[name], base_weights[name]) for name in weights)


@pytest.mark.parametrize(
    ("flags", "rate"), [({"lora_rank": 2, "lora_targets": "k,down"}, LORA_LR), ({}, FULL_LR)]
)
def test_python_says_it_by_init_from(
    flags: dict[str, Any], rate: float, base: Path, new: Path, tmp_path: Path
) -> None:
    with without_report():
        settings = {name: value for name, value in QUICK.items() if name != "warmup_steps"}
        run = glasslm.train(
            init_from=base,
            text_file=new,
            run_dir=tmp_path / "run",
            engine="numpy",
            **settings | flags,
        )
    new_losses = losses(run.path, "val")
    assert new_losses[12] < 0.9 * new_losses[0]
    assert list(losses(run.path, "old")) == [0, 4, 8, 12]
    assert run.config.optimizer.lr == rate
    assert run.config.model.d_model == 32
    problems = {
        name.rpartition(".")[0] for name in checkpoint.load(run.path).weights() if ".lora_" in name
    }
    assert {name.rpartition(".")[2] for name in problems} == ({"k", "down"} if flags else set())


@pytest.mark.parametrize(("flags", "rate"), [({"lora_rank": 2}, LORA_LR), ({}, FULL_LR)])
def test_train_takes_a_run_to_start_from(
    flags: dict[str, Any], rate: float, base: Path, new: Path, tmp_path: Path
) -> None:
    settings = (
        QUICK
        | {"max_steps": 4, "init_from": base, "text_file": new, "run_dir": tmp_path / "run"}
        | flags
    )
    with without_report():
        assert main(["train", *flag_arguments(**settings)]) == 0
    config = run_folder.Run(tmp_path / "run").config
    assert (config.optimizer.lr, config.model.lora_rank) == (rate, flags.get("lora_rank", 0))
    assert losses(tmp_path / "run", "old")[0] == pytest.approx(
        min(losses(base, "val").values()), rel=1e-6
    )


def test_what_is_not_said_is_as_the_base_has_it(base: Path) -> None:
    """Sizes, batches, seed, regularization.

    Only what belongs to a training of its own is the recipe's.
    """
    origin = run_folder.Run(base).config
    config = fine_tuning_config(BaseRun(str(base)), with_adapters=True)
    assert config.model == with_flags(origin, {"lora_rank": DEFAULT_RANK}).model
    assert config.train.batch_size == origin.train.batch_size
    assert config.train.seed == origin.train.seed
    assert (config.data.text_file, config.data.corpus) == ((), None)
    assert config.optimizer.weight_decay == origin.optimizer.weight_decay
    assert config.train.init_from == str(base)


def test_a_text_whose_old_one_is_gone_is_learnt_all_the_same(
    new: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    base = make_base(tmp_path, max_steps=2)
    (tmp_path / "old.txt").unlink()
    monkeypatch.setenv("GLASSLM_CACHE", str(tmp_path / "empty"))
    run = finetune(base, new, tmp_path / "run", max_steps=4)
    assert "forgetting of the text" in capsys.readouterr().err
    assert losses(run, "old") == {}
    assert list(losses(run, "val")) == [0, 4]


# -- what cannot be --------------------------------------------------------------------------------


def run_refused(argv: list[str], capsys: pytest.CaptureFixture[str], code: int = 2) -> str:
    """The one line that a command says of why it is refused."""
    with without_report():
        assert main(argv) == code
    out, err = capsys.readouterr()
    assert out == ""
    *phases, message = err.splitlines()
    assert all("glasslm" not in phase for phase in phases)  # reading ..., starting the engine
    assert message.startswith(f"glasslm {argv[0]}: ")
    return message


@pytest.mark.parametrize("full", [False, True])
def test_characters_that_the_tokenizer_lacks_are_named(
    full: bool, base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    foreign = tmp_path / "foreign.txt"
    foreign.write_text("the cat likes a naïve fox.\n" * 60, encoding="utf-8")
    flags = flag_arguments(text_file=foreign, run_dir=tmp_path / "run", **QUICK) + ["--full"] * full
    messages = run_refused(["finetune", str(base), *flags], capsys)
    assert "ï" in messages
    assert "x" in messages.replace("text", "")
    assert not (tmp_path / "run").exists()


REFUSED: dict[str, tuple[list[str], str]] = {
    "another width": (["--d-model", "64"], "--d-model"),
    "other heads, in matrices of the same shape": (["--n-heads", "4"], "--n-heads"),
    "another activation": (["--feedforward", "geglu"], "--feedforward"),
    "another place of the norms": (["--norm-position", "post"], "--norm-position"),
    "other positions": (["--position", "alibi"], "--position"),
    "another number of blocks": (["--n-layers", "3"], "--n-layers"),
    "another tokenizer": (["--tokenizer", "byte"], "--tokenizer"),
    "both ways at once": (["--full", "--lora-rank", "4"], "--lora-rank"),
    "adapters of no rank": (["--lora-rank", "0"], "--full"),
    "an unknown matrix": (["--lora-targets", "q,value"], "q,value"),
    "no matrix": (["--lora-targets", ","], "q,k,v"),
    "two models to start from": (["--init-from", "another"], "--init-from"),
    "an unknown study": (["--study", "seeds"], "rank or targets"),
    "a study of no adapters": (["--study", "rank", "--full"], "--full"),
    "two texts": (["--corpus", "python"], "choose one"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_cannot_be_is_refused_in_one_line(
    what: str, base: Path, new: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wrong, expected = REFUSED[what]
    argv = [
        "finetune",
        str(base),
        *flag_arguments(text_file=new, run_dir=tmp_path / "run", max_steps=2, threads=1),
        *wrong,
    ]
    assert expected in run_refused(argv, capsys)
    assert not (tmp_path / "run").exists()


def test_run_and_text_must_be_given(
    base: Path,
    new: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert "--text-file" in run_refused(["finetune", str(base)], capsys)
    assert "no run 'nowhere'" in run_refused(
        ["finetune", "nowhere", "--text-file", str(new)], capsys
    )
    assert "RUN" in run_refused(["finetune", "--full"], capsys)
    assert "RUN" in run_refused(["finetune"], capsys)
    assert "RUN comes first" in run_refused(
        ["finetune", "--full", str(base), "--text-file", str(new)], capsys
    )
    assert list(tmp_path.iterdir()) == []


def test_adapters_need_a_trained_model(
    new: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = flag_arguments(text_file=new, run_dir=tmp_path / "run", max_steps=2, lora_rank=4)
    assert "--init-from" in run_refused(["train", *flags], capsys)
    assert "--preset" in run_refused(
        ["train", "--init-from", "base", "--preset", "small", *flags], capsys
    )


def is_compatible(base: Path, **flags: Any) -> bool:
    start = BaseRun(str(base))
    config = with_flags(fine_tuning_config(start, with_adapters=True), {"lora_rank": 2} | flags)
    try:
        start.require_fit(config)
    except InputError:
        return False
    return True


def test_what_belongs_to_no_weight_may_change(base: Path, tmp_path: Path) -> None:
    """The context, too, where no weight belongs to a place."""
    free: dict[str, Any] = {
        "block_size": 64,
        "dropout": 0.1,
        "attention": "flash",
        "window": 8,
        "lora_targets": "o",
    }
    assert is_compatible(base, **free)
    assert is_compatible(base, rope_scaling="ntk", rope_factor=2.0)
    for name, value in {
        "n_kv_heads": 1,
        "qk_norm": True,
        "scale_embeddings": True,
        "tie_embeddings": False,
    }.items():
        assert not is_compatible(base, **{name: value}), name
    learned = make_run(tmp_path / "learned", "abc", position="learned")
    assert is_compatible(learned, dropout=0.1)
    assert not is_compatible(learned, block_size=64)


def test_a_checkpoint_of_another_run_is_no_start(base: Path, tmp_path: Path) -> None:
    """As any use of it is refused."""
    other = make_base(tmp_path, max_steps=1, seed=1)
    shutil.rmtree(other / "checkpoints")
    shutil.copytree(base / "checkpoints", other / "checkpoints")
    with pytest.raises(DamagedError, match="a checkpoint of another run"):
        BaseRun(str(other))


# -- stop and go on --------------------------------------------------------------------------------

VARIANTS: dict[str, dict[str, Any]] = {
    "adapters": {"lora_rank": 2, "optimizer": "muon"},
    "adapters, averaged": {"lora_rank": 2, "ema": 0.8, "dropout": 0.1, "lora_targets": "v,o,down"},
    "all weights, averaged, on a sample of the text": {
        "ema": 0.8,
        "block_size": 4,
        "val_fraction": 0.5,
    },
}


def train(
    base: Path,
    new: Path,
    run_dir: Path,
    engine: EngineName = "numpy",
    precision: Precision = "auto",
    **flags: Any,
) -> Outcome:
    settings = {name: value for name, value in QUICK.items() if name != "threads"} | {
        "sample_interval": 12
    }
    config = with_flags(
        fine_tuning_config(BaseRun(str(base)), with_adapters=False),
        settings | {"text_file": str(new), "log_interval": 1} | flags,
    )
    with without_report():
        return launch.train(
            config, ComputeConfig(engine, "cpu", precision, 1), run_dir, notify=ignore_message
        )


def interrupted_run(step: int, base: Path, new: Path, run_dir: Path, **flags: Any) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        interrupt_at(step, patch)
        assert train(base, new, run_dir, **flags).status == "interrupted"
    return run_dir


def resume(
    run_dir: Path, compute: ComputeConfig = COMPUTE, messages: list[str] | None = None
) -> Outcome:
    with without_report():
        return launch.resume(
            run_dir, compute, notify=ignore_message if messages is None else messages.append
        )


@pytest.mark.parametrize("engine", ["numpy", "torch"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_an_interrupted_run_ends_like_an_uninterrupted_one(
    variant: str, engine: EngineName, base: Path, new: Path, tmp_path: Path
) -> None:
    """Bit for bit: weights, moments, averages, and what was measured of both texts."""
    if engine == "torch":
        pytest.importorskip("torch")
    flags = {"engine": engine} | VARIANTS[variant]
    whole = train(base, new, tmp_path / "whole", **flags)
    run = interrupted_run(3, base, new, tmp_path / "run", **flags)
    with pytest.MonkeyPatch.context() as patch:
        interrupt_at(9, patch, signal.SIGTERM)
        assert resume(run, ComputeConfig(threads=1)).status == "interrupted"
    last = resume(run, ComputeConfig(threads=1))
    assert (last.status, last.sample) == ("finished", whole.sample)
    assert comparable_results(run, 12) == comparable_results(whole.run_dir, 12)
    assert list(losses(run, "old")) == [0, 4, 8, 12]


def test_the_other_engine_goes_on(base: Path, new: Path, tmp_path: Path) -> None:
    pytest.importorskip("torch")
    flags: dict[str, Any] = {"lora_rank": 2, "ema": 0.8, "precision": "fp64", "sample_interval": 0}
    whole = train(base, new, tmp_path / "whole", **flags).run_dir
    run = interrupted_run(5, base, new, tmp_path / "run", **flags)
    assert resume(run, ComputeConfig("torch", "cpu", threads=1)).status == "finished"
    for file in ("model.safetensors", "optimizer.safetensors"):
        one, other = (load_file(path / "checkpoints" / "000012" / file) for path in (whole, run))
        assert one.keys() == other.keys()
        for name, array in one.items():
            largest = max(float(np.abs(array).max()), 1e-3)
            np.testing.assert_allclose(
                other[name], array, rtol=0, atol=1e-9 * largest, err_msg=name
            )
    assert losses(run, "old") == pytest.approx(losses(whole, "old"), rel=1e-9)


# -- files that are gone or damaged ----------------------------------------------------------------


def flip_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-9] ^= 1
    path.write_bytes(data)


def replace_weights(path: Path) -> None:
    """Complete, with the right names and shapes, but not the weights that the adapters adapt."""
    weights = load_file(path / "model.safetensors")
    checkpoint.save_base(path.parent, {name: 2 * array for name, array in weights.items()})


DAMAGE: dict[str, tuple[Any, str]] = {
    "another run's": (replace_weights, "model.safetensors belongs to another run"),
    "a flipped bit": (
        lambda base: flip_bit(base / "model.safetensors"),
        "model.safetensors was altered",
    ),
    "no weights": (
        lambda base: (base / "model.safetensors").unlink(),
        "model.safetensors is missing",
    ),
    "no manifest": (lambda base: (base / "manifest.json").unlink(), "manifest.json"),
    "no folder": (shutil.rmtree, "manifest.json"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_frozen_weights_are_named(
    damage: str,
    base: Path,
    new: Path,
    tuned: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """By all that use a model, or go on with it, or start from it."""
    run = Path(shutil.copytree(tuned, tmp_path / "run"))
    shutil.rmtree(run / "checkpoints" / "000024")
    destroy, message = DAMAGE[damage]
    destroy(run / "base")
    capsys.readouterr()
    finetuning = [
        "finetune",
        str(run),
        "--text-file",
        str(new),
        "--threads",
        "1",
        "--run-dir",
        str(tmp_path / "again"),
    ]
    for argv in (["generate", str(run), "--prompt", "the"], ["resume", str(run), "--threads", "1"],
                 ["merge", str(run)], finetuning):  # fmt: skip
        messages = run_refused(argv, capsys, code=4)
        assert message in messages
        assert str(run / "base") in messages
    assert not (tmp_path / "again").exists()
    assert not (tmp_path / "run-merged").exists()


def test_without_the_run_it_started_from_a_run_goes_on(
    new: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Forgetting is no longer measured, and a note says so."""
    base = make_base(tmp_path, max_steps=2)
    run = interrupted_run(6, base, new, tmp_path / "run", lora_rank=2)
    whole = train(base, new, tmp_path / "whole", lora_rank=2).run_dir
    shutil.rmtree(base)
    capsys.readouterr()
    with without_report():
        assert main(["resume", str(run), "--threads", "1"]) == 0
    notes = [line for line in capsys.readouterr().err.splitlines() if line.startswith("note: ")]
    assert len(notes) == 1
    assert "forgetting" in notes[0]
    assert str(base) in notes[0]
    assert list(losses(run, "old")) == [0, 4]
    assert comparable_results(run, 12)[0] == comparable_results(whole, 12)[0]
    assert losses(run, "val") == losses(whole, "val")
    assert main(["generate", str(run), "--prompt", "the", "--max-new-tokens", "5"]) == 0
    assert capsys.readouterr().out.startswith("the")


def test_another_run_in_its_place_is_not_taken_for_it(new: Path, tmp_path: Path) -> None:
    base = make_base(tmp_path, max_steps=2)
    run = interrupted_run(6, base, new, tmp_path / "run", lora_rank=2)
    shutil.rmtree(base)
    (tmp_path / "other").mkdir()
    make_base(tmp_path / "other", max_steps=2, val_fraction=0.3).rename(base)
    messages: list[str] = []
    assert resume(run, messages=messages).status == "finished"
    assert [line for line in messages if "another run" in line]
    assert list(losses(run, "old")) == [0, 4]
