"""Runs of preference tuning: DPO and GRPO end to end, exact resumption, refusals, warnings."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from glasslm.cli import finetune
from glasslm.config.conversion import to_dict, with_flags
from glasslm.config.schema import ComputeConfig, DataConfig, RunConfig
from glasslm.data.preference_pairs import PreferencePair
from glasslm.data.tokenizers import CharTokenizer
from glasslm.engines import memory_estimate
from glasslm.errors import DamagedError, InputError
from glasslm.inference.sampling import Sampling
from glasslm.inference.trained_model import load_model
from glasslm.lab.diagnosis import diagnose
from glasslm.lab.diagnosis.diagnosis_input import input_from_run
from glasslm.lab.diagnosis.replay import replay_step
from glasslm.lab.verification.integrity import examine_run
from glasslm.lab.verification.resumption import try_resume
from glasslm.model.parameters import parameter_table
from glasslm.report import run_report
from glasslm.runs import checkpoint
from glasslm.runs.metrics import Line, comparable_lines, eval_lines, step_lines, warning_lines
from glasslm.runs.run_folder import Run
from glasslm.training import launch, run_inputs
from glasslm.training.fine_tuning import BaseRun, preference_tuning_config
from glasslm.training.merging import merge_run
from glasslm.training.preference import opening, rewards, warning_signs
from glasslm.training.preference.objective import encode_pair
from glasslm.training.preference.rewards import AdditionReward
from glasslm.training.preference.rollouts import RolloutSampler
from glasslm.training.preference.warning_signs import PreferenceMonitor
from small_runs import COMPUTE, SMALL, ignore_message, small_config, without_report

BASE_FLAGS = {"max_steps": 60, "sample_interval": 0, "eval_interval": 60, "block_size": 24}
TUNING: dict[str, Any] = {
    "max_steps": 6, "batch_size": 16, "group_size": 4, "answer_tokens": 5, "eval_interval": 3,
    "sample_interval": 0, "checkpoint_interval": 3, "lr": 2e-3, "keep": 9,
}  # fmt: skip


@pytest.fixture(autouse=True)
def few_held_out_prompts(monkeypatch: pytest.MonkeyPatch) -> None:
    """An evaluation of all of them takes longer than the rest of a run."""
    monkeypatch.setattr(rewards, "HELD_OUT_PROMPTS", 8)


@pytest.fixture(scope="module")
def additions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that has read sums, some of them wrong."""
    folder = tmp_path_factory.mktemp("additions")
    draw, prompts = np.random.default_rng(0), AdditionReward().prompts
    lines = []
    for prompt in draw.choice(prompts, 1500).tolist():
        total = int(AdditionReward.right_answer(prompt)) + int(draw.integers(-1, 2))
        lines.append(f"{prompt}{abs(total)}\n")
    (folder / "sums.txt").write_text("".join(lines), encoding="utf-8", newline="\n")
    with without_report():
        config = small_config(folder / "sums.txt", **BASE_FLAGS)
        launch.train(config, COMPUTE, folder / "run", notify=ignore_message)
    return folder / "run"


@pytest.fixture(scope="module")
def pairs(additions: Path) -> Path:
    """Pairs that prefer the answer 7 to the answer 3."""
    lines = [
        json.dumps({"prompt": f"\n{a}+{a}=", "chosen": "7\n", "rejected": "3\n"}) for a in range(40)
    ]
    path = additions.parent / "pairs.jsonl"
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


def tuning_config(base: Path, adapters: bool = False, **flags: Any) -> RunConfig:
    return with_flags(preference_tuning_config(BaseRun(str(base)), adapters), TUNING | flags)


def tune(
    base: Path, run_dir: Path, *, stop_at: int | None = None, engine: str = "numpy", **flags: Any
) -> Run:
    compute = ComputeConfig(engine=engine, threads=1)  # type: ignore[arg-type]
    adapters = bool(flags.get("lora_rank"))
    with without_report():
        launch.train(
            tuning_config(base, adapters, **flags), compute, run_dir,
            stop_at=stop_at, notify=ignore_message,
        )  # fmt: skip
    return Run(run_dir)


def contains_5(self: AdditionReward, prompt: str, answer: str | None) -> float:
    """A reward that this small model can learn in a few steps."""
    return float("5" in (answer or ""))


OBJECTIVES = ["dpo", "grpo"]


@pytest.fixture(params=OBJECTIVES)
def objective(request: pytest.FixtureRequest, pairs: Path) -> dict[str, Any]:
    return {"preferences": str(pairs)} if request.param == "dpo" else {"reward": "addition"}


def test_the_first_step_compares_equal_weights(
    additions: Path, objective: dict[str, Any], tmp_path: Path
) -> None:
    run = tune(additions, tmp_path / "run", max_steps=1, **objective)
    (line,) = step_lines(run.metrics())
    measures = line["preference"]
    if "reward" in objective:
        assert measures["kl"] == 0
        assert line["loss"] == 1 - float(measures["reward"] or 0)
        assert 0 < float(measures["entropy"] or 0) < math.log(20)
    else:
        assert line["loss"] == pytest.approx(math.log(2), rel=1e-12)
        assert (measures["margin"], measures["accuracy"]) == (0, 0)
    splits = [line.get("split") for line in eval_lines(run.metrics(), None)]
    assert splits == ["val", "old"] * 2
    assert run.record["config"]["preference"]["group_size"] == 4


def test_a_resumed_run_has_the_bits_of_an_uninterrupted_one(
    additions: Path, objective: dict[str, Any], tmp_path: Path
) -> None:
    whole = tune(additions, tmp_path / "whole", **objective)
    cut = tune(additions, tmp_path / "cut", stop_at=4, **objective)
    with without_report():
        launch.resume(cut.path, COMPUTE, notify=ignore_message)
    first, second = (dict(checkpoint.load(run.path).state()) for run in (whole, cut))
    assert first.keys() == second.keys()
    assert all(np.array_equal(first[name], second[name]) for name in first)
    assert comparable_lines(whole.metrics()) == comparable_lines(cut.metrics())


def test_both_engines_tune_to_the_same_weights(
    additions: Path, objective: dict[str, Any], tmp_path: Path
) -> None:
    """In float64 the rollouts are the same ones, token by token."""
    pytest.importorskip("torch")
    runs = []
    for engine in ("numpy", "torch"):
        compute = ComputeConfig(engine=engine, precision="fp64", threads=1, device="cpu")  # type: ignore[arg-type]
        with without_report():
            launch.train(
                tuning_config(additions, max_steps=3, **objective), compute, tmp_path / engine,
                notify=ignore_message,
            )  # fmt: skip
        runs.append(Run(tmp_path / engine))
    by_hand, by_autograd = (dict(checkpoint.load(run.path).state()) for run in runs)
    for name, array in by_hand.items():
        np.testing.assert_allclose(array, by_autograd[name], rtol=1e-7, atol=1e-9, err_msg=name)
    for lines in zip(*(step_lines(run.metrics()) for run in runs)):
        first, second = (line["preference"] for line in lines)
        assert first == pytest.approx(second, rel=1e-9, abs=1e-12)


def test_pairs_are_learned(additions: Path, pairs: Path, tmp_path: Path) -> None:
    run = tune(additions, tmp_path / "run", preferences=str(pairs), max_steps=15, lr=5e-3)
    steps, held_out = step_lines(run.metrics()), eval_lines(run.metrics())
    assert float(steps[-1]["loss"] or 9) < 0.5 < float(steps[0]["loss"] or 0)
    assert steps[-1]["preference"]["accuracy"] == 1
    assert held_out[-1]["preference"]["accuracy"] == 1
    assert held_out[-1]["bpb"] is None


def test_a_reward_is_learned_with_adapters(
    additions: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """base/ has the frozen weights."""
    monkeypatch.setattr(AdditionReward, "score", contains_5)
    run = tune(
        additions, tmp_path / "run", reward="addition", lora_rank=4, max_steps=30, lr=5e-2,
        batch_size=64, group_size=32, eval_interval=30, checkpoint_interval=30, kl=0.0,
        schedule="constant",
    )  # fmt: skip
    scores = [float(line["preference"]["reward"] or 0) for line in step_lines(run.metrics())]
    assert np.mean(scores[-5:]) > np.mean(scores[:5]) + 0.05
    table = parameter_table(run.config.model, run.tokenizer.vocab_size)
    saved = {name for name, _ in checkpoint.load(run.path).state() if "/" not in name}
    assert saved == set(table)  # with those of base/


def test_a_constant_reward_changes_nothing(
    additions: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(AdditionReward, "score", lambda self, prompt, answer: 1.0)
    run = tune(additions, tmp_path / "run", reward="addition", max_steps=2)
    first, last = (dict(checkpoint.load(run.path, step).state()) for step in (0, 2))
    weights = [name for name in last if "/" not in name]
    assert all(np.array_equal(first[name], last[name]) for name in weights)
    assert {line["grad_norm"] for line in step_lines(run.metrics())} == {0}


def test_the_page_has_the_measures_and_a_copy_resumes_to_the_bit(
    additions: Path, objective: dict[str, Any], tmp_path: Path
) -> None:
    run = tune(additions, tmp_path / "run", **objective)
    page = run_report.write(run.path, time_share=0).read_text(encoding="utf-8")
    measure = "reward" if "reward" in objective else "accuracy"
    assert f"held-out {measure}" in page
    assert (run.path / "figures" / "preference.png").exists()
    assert "Entropy of the answers" in page or "reward" not in objective
    resumption = try_resume(run.path, ignore_message)
    assert resumption.difference == 0
    assert resumption.same_lines
    with pytest.raises(InputError, match="learned preferences"):
        replay_step(run.path, 2, COMPUTE, ignore_message)


# -- refusals --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"dropout": 0.1}, "dropout is 0.1: expected 0 with --reward"),
        ({"ema": 0.9}, "ema is 0.9: expected 0"),
        ({"z_loss": 0.1}, "z_loss is 0.1: expected 0"),
        ({"batch_size": 18}, "expected a multiple.*--batch-size 16"),
        ({"epochs": 1.0}, "--epochs counts a text"),
        ({"init_from": None}, "glasslm finetune RUN --reward"),
        ({"answer_tokens": 30}, "fewer --answer-tokens"),
        ({"reward": "names"}, "--reward names needs a model of names"),
    ],
)
def test_settings_that_do_not_fit_are_refused_before_a_run_is_made(
    additions: Path, tmp_path: Path, flags: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        tune(additions, tmp_path / "run", **{"reward": "addition"} | flags)
    assert not (tmp_path / "run").exists()


def verify_pairs(run: Path) -> tuple[str, bool]:
    """The verdict on the pairs, and whether the message has their hash."""
    (part,) = [part for part in examine_run(run) if part.name == "pairs"]
    return part.verdict, Run(run).config.preference.preferences_sha256 in part.message


def test_pairs_that_changed_or_are_too_long_are_refused(
    additions: Path, pairs: Path, tmp_path: Path
) -> None:
    copy = tmp_path / "pairs.jsonl"
    copy.write_bytes(pairs.read_bytes())
    tune(additions, tmp_path / "run", preferences=str(copy), stop_at=3)
    copy.write_bytes(pairs.read_bytes().replace(b"7", b"8"))
    with pytest.raises(DamagedError, match=r"pairs\.jsonl has changed since the run began"):
        launch.resume(tmp_path / "run", COMPUTE, notify=ignore_message)
    assert verify_pairs(tmp_path / "run") == ("damaged", True)
    copy.unlink()
    assert verify_pairs(tmp_path / "run") == ("note", True)
    with pytest.raises(DamagedError, match=r"are missing or have changed: .*pairs\.jsonl"):
        launch.resume(tmp_path / "run", COMPUTE, notify=ignore_message)
    copy.write_bytes(pairs.read_bytes())
    assert verify_pairs(tmp_path / "run")[0] == "ok"
    line = {"prompt": "1" * 30, "chosen": "1", "rejected": "2"}
    copy.write_text("\n".join(json.dumps(line | {"prompt": p}) for p in ("1" * 30, "2")))
    with pytest.raises(InputError, match=r"a pair has 32 tokens.*at most 25"):
        tune(additions, tmp_path / "other", preferences=str(copy))


def test_without_a_source_the_text_is_that_which_the_base_recorded(
    additions: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its config names a relative path, which is another file in another folder."""
    here, there, base = tmp_path / "here", tmp_path / "there", str(tmp_path / "base")
    for folder, change in ((here, ""), (there, "1+1=2\n" * 50)):
        folder.mkdir()
        text = (additions.parent / "sums.txt").read_text(encoding="utf-8")
        (folder / "sums.txt").write_text(change + text, encoding="utf-8", newline="\n")
    monkeypatch.chdir(here)
    config = small_config(Path("sums.txt"), **BASE_FLAGS | {"max_steps": 2, "eval_interval": 2})
    with without_report():
        launch.train(config, COMPUTE, Path(base), notify=ignore_message)
    monkeypatch.chdir(there)

    def open_text(*flags: str) -> tuple[dict[str, Any], str]:
        parsed = finetune.parse([base, "--full", "--reward", "addition", *flags])
        dataset = run_inputs.open_run_inputs(parsed.config, ignore_message).dataset
        return dataset.facts, dataset.facts["files"][0]["path"]

    recorded = Run(base).record["data"]
    assert open_text() == (recorded, str(here / "sums.txt"))
    facts, path = open_text("--val-fraction", "0.3")  # split in another way
    assert path == str(here / "sums.txt")
    assert facts["val_tokens"] > 2 * recorded["val_tokens"]
    assert open_text("--text-file", "sums.txt")[1] == str(there / "sums.txt")
    assert finetune.parse([base, "--reward", "addition", "--corpus", "python"]).data.text_file == ()
    (here / "sums.txt").unlink()
    assert open_text()[0] == recorded  # the tokens are in the cache
    with pytest.raises(
        InputError, match=r"sums\.txt.* is gone.*give a text like it as --text-file"
    ):
        open_text("--val-fraction", "0.3")


def test_pairs_are_found_from_another_folder(
    additions: Path, pairs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(pairs.parent)
    run = tune(additions, tmp_path / "run", preferences=pairs.name, stop_at=3)
    assert run.config.preference.preferences == str(pairs.resolve())
    monkeypatch.chdir(tmp_path)
    with without_report():
        launch.resume(run.path, COMPUTE, notify=ignore_message)
    assert run.history.status == "finished"


def test_base_weights_that_changed_are_refused(additions: Path, tmp_path: Path) -> None:
    run = tune(additions, tmp_path / "run", reward="addition", stop_at=3)
    path = run.path / checkpoint.BASE / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(DamagedError, match="base"):
        launch.resume(run.path, COMPUTE, notify=ignore_message)
    shutil.rmtree(path.parent)  # all weights are in the checkpoints
    parts = {part.name: part for part in examine_run(run.path) if part.verdict == "damaged"}
    assert list(parts) == ["base"]
    assert "is missing. Cure: restore it from a copy" in parts["base"].message


def test_a_merged_run_resumes_from_its_own_weights(
    additions: Path, pairs: Path, tmp_path: Path
) -> None:
    small = {"lora_rank": 2, "batch_size": 4, "max_steps": 1}
    run = tune(additions, tmp_path / "run", preferences=str(pairs), **small)
    merged = merge_run(run, tmp_path / "merged", "glasslm merge", ignore_message)
    assert {part.verdict for part in examine_run(merged)} == {"ok"}
    assert try_resume(merged, ignore_message).passed


def test_the_command_has_the_recipe_and_refuses_a_study(additions: Path, pairs: Path) -> None:
    flags = finetune.parse([str(additions), "--full", "--reward", "addition", "--kl", "0.5"])
    assert flags.preference.kl == 0.5
    assert flags.data == Run(additions).config.data.without_source()
    assert flags.train.log_interval == 1
    assert to_dict(flags.config)["preference"]["reward"] == "addition"
    assert "preference" not in to_dict(finetune.parse([str(additions)]).config)
    with pytest.raises(InputError, match="--study compares adapters on a text"):
        finetune.main([str(additions), "--reward", "addition", "--study", "rank"])
    with pytest.raises(InputError, match="both --preferences and --reward"):
        finetune.parse([str(additions), "--reward", "names", "--preferences", str(pairs)])


def test_a_prompt_begins_a_line_in_pairs_and_rollouts_alike(additions: Path) -> None:
    """A line end comes before it, once, so that both objectives see the same prompt."""
    model, config = load_model(additions), tuning_config(additions, reward="addition")
    prompts = ["1+2=", "\n1+2=", ""]
    sampler = RolloutSampler(model.engine, model.tokenizer, model.config.model, answer_tokens=1)
    rollouts = sampler.sample(prompts, Sampling(temperature=0), 0, lambda: None)
    expected = tuple(map(int, model.tokenizer.encode("\n1+2=")))
    for prompt, rollout in zip(prompts, rollouts):
        chosen, rejected = encode_pair(PreferencePair(prompt, "3", "4"), model.tokenizer, config)
        tokens = expected if prompt else expected[:1]
        assert tokens == chosen.prompt == rejected.prompt == rollout.answer.prompt
    without_lines = CharTokenizer("ab")  # no token begins a text
    assert encode_pair(PreferencePair("ab", "a", "b"), without_lines, config)[0].prompt == (0, 1)


def test_a_chat_is_refused_because_its_template_is_not_written(additions: Path) -> None:
    config = tuning_config(additions, reward="addition")
    chat = dataclasses.replace(config, data=DataConfig(chat="chat.jsonl"))
    with pytest.raises(InputError, match=r"--reward .* template .* base of plain text"):
        opening.require_tunable(chat)


def test_a_base_with_a_chat_template_is_noted(
    additions: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As an imported model that answers: its prompts are written without the template."""
    monkeypatch.setattr(BaseRun, "chat_template", "{{ messages }}")
    notes: list[str] = []
    run_inputs.open_run_inputs(tuning_config(additions, reward="addition"), notes.append)
    assert any("prompts are written without it" in note for note in notes)


def test_experts_are_tuned_without_their_auxiliary_losses(pairs: Path, tmp_path: Path) -> None:
    few = BASE_FLAGS | {"max_steps": 2, "eval_interval": 2, "n_experts": 2, "experts_per_token": 1}
    with without_report():
        config = small_config(pairs.parent / "sums.txt", **few)
        launch.train(config, COMPUTE, tmp_path / "base", notify=ignore_message)
    assert config.optimizer.balance_loss > 0
    run = tune(tmp_path / "base", tmp_path / "run", preferences=str(pairs), max_steps=1)
    optimizer = run.config.optimizer
    assert (optimizer.balance_loss, optimizer.router_z_loss) == (0, 0)
    for name in opening.ROUTER_LOSSES:
        with pytest.raises(InputError, match=f"{name} is 0.1: expected 0 with --preferences"):
            tune(tmp_path / "base", tmp_path / "other", preferences=str(pairs), **{name: 0.1})


def test_the_plan_counts_pairs_or_prompts(
    additions: Path, objective: dict[str, Any], tmp_path: Path
) -> None:
    """A step has no tokens before its answers are sampled, and an epoch is a pass over pairs."""
    said: list[str] = []
    with without_report():
        config = tuning_config(additions, **objective | {"max_steps": 2})
        launch.train(config, COMPUTE, tmp_path / "run", notify=said.append)
    (plan,) = [message for message in said if "  training  " in message]
    (step_line,) = step_lines(Run(tmp_path / "run").metrics())[-1:]
    contents = "4 prompts with 4 answers each" if "reward" in objective else "8 pairs"
    assert f"training  2 steps of {contents}, {step_line['epoch']:.3g} epochs\n" in plan
    assert "FLOPs" not in plan
    assert "training tokens" not in plan


def test_a_diagnosis_tries_no_training_on_the_text(additions: Path, tmp_path: Path) -> None:
    run = tune(additions, tmp_path / "run", reward="addition", max_steps=20)
    target = input_from_run(run.path, COMPUTE, ignore_message)
    diagnosis = diagnose.diagnose(target, ignore_message)
    findings = {finding.signal: finding for finding in diagnosis.findings}
    assert "learned preferences" in findings["trials"].meaning
    assert not {"overfit", "range", "widths"} & {picture.name for picture in diagnosis.pictures}
    assert "initial loss" not in findings  # 1 - reward is not compared with ln V
    assert "divergence" in findings


def test_the_first_weights_are_part_of_the_memory(additions: Path) -> None:
    tuned = tuning_config(additions, reward="addition")
    plain = dataclasses.replace(tuned, preference=type(tuned.preference)())
    compute = ComputeConfig(engine="numpy", device="cpu", precision="fp32", threads=1)
    with_first, without = (
        memory_estimate.training_bytes(config, 20, compute, 4) for config in (tuned, plain)
    )
    assert with_first - without == 4 * parameter_table(tuned.model, 20).total


# -- signs of reward hacking -----------------------------------------------------------------------


def step_with(step: int, **measures: float) -> Line:
    return {
        "kind": "step", "step": step, "loss": 0.5, "lr": 0.1, "grad_norm": 1.0, "clipped": False,
        "tokens": step, "epoch": 0.0, "preference": measures,
    }  # fmt: skip


def eval_with(step: int, loss: float, split: str = "val") -> Line:
    line: dict[str, Any] = {"kind": "eval", "step": step, "split": split, "loss": loss}
    return line | ({"preference": {"reward": 1 - loss}} if split == "val" else {})  # type: ignore[return-value]


HEALTHY = {"reward": 0.5, "kl": 0.1, "entropy": 1.0, "distinct": 1.0, "length": 3.0}
PAIRS = {"accuracy": 0.9, "margin": 0.2, "chosen_nats": 10.0, "rejected_nats": 12.0}


@pytest.mark.parametrize(
    ("start", "end", "evals", "codes"),
    [
        (HEALTHY, HEALTHY, [], []),
        (HEALTHY, HEALTHY | {"entropy": 0.05}, [], ["entropy"]),
        (HEALTHY, HEALTHY | {"entropy": 0.05, "reward": 0.95}, [], []),  # it knows the answers
        (HEALTHY, HEALTHY | {"kl": 1.5}, [], ["kl"]),
        (HEALTHY, HEALTHY | {"distinct": 0.4}, [], ["distinct"]),
        (HEALTHY, HEALTHY | {"reward": 0.7}, [eval_with(0, 0.5), eval_with(9, 0.7)], ["held_out"]),
        (HEALTHY, HEALTHY, [eval_with(0, 0.5), eval_with(9, 0.7)], []),  # no rise in training
        (
            HEALTHY,
            HEALTHY | {"reward": 0.7},
            [eval_with(0, 1.0, "old"), eval_with(9, 1.3, "old")],
            ["old_text"],
        ),
        (PAIRS, PAIRS, [], []),
        (PAIRS, PAIRS | {"chosen_nats": 12.0}, [], ["displacement"]),
    ],
)
def test_signs_are_warned_of_once_by_name(
    start: dict[str, float], end: dict[str, float], evals: list[Line], codes: list[str]
) -> None:
    lines = [step_with(i, **(start if i <= 5 else end)) for i in range(1, 16)]
    monitor = PreferenceMonitor([*lines, *evals])
    signs = monitor.new_signs()
    assert [code for code, _ in signs] == codes
    for code, message in signs:
        assert any(character.isdigit() for character in message)
        monitor.add({"kind": "warning", "step": 15, "code": code, "message": message})
    assert monitor.new_signs() == []


def test_a_run_whose_answers_drift_is_warned(
    additions: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(AdditionReward, "score", contains_5)
    monkeypatch.setattr(warning_signs, "MAX_KL", 1e-6)
    run = tune(additions, tmp_path / "run", reward="addition", max_steps=9)
    assert [line["code"] for line in warning_lines(run.metrics())].count("kl") == 1


def test_several_processes_are_refused(additions: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(opening, "count_ranks", lambda: 2)
    with pytest.raises(InputError, match="without torchrun"):
        opening.require_tunable(tuning_config(additions, reward="addition"))
    opening.require_tunable(small_config(Path("text.txt"), **SMALL))
