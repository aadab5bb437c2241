"""A run that learns conversations: answers alone, packed, resumable, equal in both engines."""

import dataclasses
import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer as Library

from chat_runs import NOUNS, learn_chat, make_byte_base, write_chat
from glasslm.cli import main
from glasslm.config.conversion import with_flags
from glasslm.config.schema import ComputeConfig, ModelConfig
from glasslm.data.chat.chat_source import ChatSource
from glasslm.data.chat.conversation_rows import ConversationRows, Conversations
from glasslm.data.chat.named_templates import NAMED_TEMPLATES
from glasslm.data.tokenizers import SubwordTokenizer, train_bpe
from glasslm.engines.factory import make_engine
from glasslm.engines.protocol import NO_TARGET
from glasslm.inference import evaluation
from glasslm.inference.evaluation import evaluate_windows, split_windows
from glasslm.inference.trained_model import load_model
from glasslm.runs import checkpoint
from glasslm.runs.run_folder import Run
from glasslm.training import launch
from glasslm.training.fine_tuning import BaseRun, fine_tuning_config
from small_runs import (
    COMPUTE,
    comparable_results,
    ignore_message,
    logged_lines,
    read_json,
    resume,
    without_report,
)
from tuned_runs import QUICK, make_base


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_byte_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def chat(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_chat(tmp_path_factory.mktemp("chat") / "chat.jsonl")


@pytest.fixture(scope="module")
def run(base: Path, chat: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    return Run(learn_chat(base, chat, tmp_path_factory.mktemp("run") / "run", max_steps=24))


def test_run_json_records_template_tokens_and_conversations(run: Run) -> None:
    record = run.record
    settings = record["tokenizer"]["transformers"]
    special = run.tokenizer.special_tokens
    assert list(special) == ["<|endoftext|>", "<|im_end|>", "<|im_start|>"]
    assert "<|im_start|>" in settings["chat_template"]
    assert settings["eos_token"] == "<|im_end|>"
    assert settings["generation_eos_ids"] == [special["<|im_end|>"], special["<|endoftext|>"]]
    facts = record["data"]["chat"]
    assert (facts["train_conversations"], facts["val_conversations"]) == (54, 6)
    assert len(facts["template_sha256"]) == 64
    assert run.config.data.special_tokens == tuple(special)
    assert run.config.model.document_attention
    assert run.config.model.document_end_id == special["<|endoftext|>"]
    assert record["parameters"]["total"] == 259 * 32 + record["parameters"]["non_embedding"]


def test_the_loss_is_that_of_the_answers_alone(run: Run) -> None:
    """Measured again one conversation at a time, by their texts."""
    model = load_model(run.path, "best", engine="numpy", precision="fp64")
    from glasslm.data.chat.chat_template import ChatTemplate

    template = ChatTemplate(run.record["tokenizer"]["transformers"], run.tokenizer)
    lines = Path(run.record["data"]["files"][0]["path"]).read_text().splitlines()
    nats, count, size = 0.0, 0, 0
    for line in lines[-6:]:
        messages = json.loads(line)["messages"]
        ids, is_answer = template.encode_conversation(messages)
        tokens = ids.astype(np.int64)[None]
        losses = model.engine.losses(tokens[:, :-1], tokens[:, 1:])[0]
        nats += float(losses[is_answer[1:]].sum())
        count += int(is_answer.sum())
        size += sum(len(m["content"]) for m in messages if m["role"] == "assistant")
    best = logged_lines(run.path, "eval")[-2]
    assert best["split"] == "val"
    assert best["whole"]
    assert (best["tokens"], best["bytes"]) == (count, size)
    assert best["loss"] == pytest.approx(nats / count, rel=1e-5)
    assert best["bpb"] == pytest.approx(nats / math.log(2) / size, rel=1e-5)


@pytest.mark.parametrize("engine", ["numpy", "torch"])
def test_conversations_in_one_row_do_not_see_each_other(run: Run, engine: Any) -> None:
    if engine == "torch":
        pytest.importorskip("torch")
    split, c = run.dataset(ignore_message).train, run.config.model
    alone = dataclasses.replace(c, document_attention=False)
    assert split.conversations is not None
    assert len(ConversationRows(split.conversations, c)) < 45 < len(split.conversations) == 54
    compute = ComputeConfig(engine=engine, device="cpu", precision="fp64", threads=1)
    lengths, scores = run.tokenizer.byte_lengths, []
    best = checkpoint.load(run.path, "best")
    for model in (c, alone):
        config = dataclasses.replace(run.config, model=model)
        made = make_engine(config, run.tokenizer.vocab_size, compute)
        made.load(best.weights().items())
        scores.append(evaluate_windows(made, split_windows(split, model), lengths))
    assert scores[0].tokens == scores[1].tokens
    assert scores[0].loss == pytest.approx(scores[1].loss, rel=1e-12)


def test_conversations_are_packed_once_for_all_evaluations(
    base: Path, chat: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    packed = []

    def pack(conversations: Conversations, c: ModelConfig) -> ConversationRows:
        packed.append(conversations)
        return ConversationRows(conversations, c)

    monkeypatch.setattr(evaluation, "ConversationRows", pack)
    run = learn_chat(base, chat, tmp_path / "run", max_steps=4, eval_interval=1)
    assert len([line for line in logged_lines(run, "eval") if line["split"] == "val"]) == 5
    assert len(packed) == 2  # to time one of them, and to train


def test_both_engines_learn_the_same(base: Path, chat: Path, tmp_path: Path) -> None:
    pytest.importorskip("torch")
    curves = []
    for engine in ("numpy", "torch"):
        run = learn_chat(
            base, chat, tmp_path / engine, engine=engine, precision="fp64", max_steps=6
        )
        curves.append([line["loss"] for line in logged_lines(run, "eval")])
    assert curves[0] == pytest.approx(curves[1], rel=1e-9)


def test_an_interrupted_run_resumes_to_the_bit(base: Path, chat: Path, tmp_path: Path) -> None:
    config = fine_tuning_config(BaseRun(str(base)), with_adapters=False)
    flags = {name: value for name, value in QUICK.items() if name != "threads"}
    config = with_flags(config, flags | {"chat": str(chat), "batch_size": 5})
    for name, stop in (("whole", None), ("stopped", 5)):
        with without_report():
            launch.train(config, COMPUTE, tmp_path / name, stop_at=stop, notify=ignore_message)
    resume(tmp_path / "stopped")
    assert comparable_results(tmp_path / "whole", 12) == comparable_results(
        tmp_path / "stopped", 12
    )


def test_the_conversations_are_made_again_without_the_cache(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GLASSLM_CACHE", str(tmp_path))
    again = Run(run.path).dataset(ignore_message)
    assert again.sha256 == run.record["data"]["sha256"]


def test_paths_are_found_from_another_folder(
    base: Path, chat: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """run.json has absolute ones; the relative ones of older runs are replaced by its `files`."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    (tmp_path / "here" / "talks.jsonl").write_bytes(chat.read_bytes())
    source = NAMED_TEMPLATES["plain"].source
    (tmp_path / "here" / "chat.jinja").write_text(source, encoding="utf-8-sig")
    flags = {"chat_template": "chat.jinja", "max_steps": 1}
    run = Run(learn_chat(base, Path("talks.jsonl"), Path("run"), **flags).resolve())
    assert run.record["tokenizer"]["transformers"]["chat_template"] == source
    data = run.config.data
    assert data.chat == str(tmp_path / "here" / "talks.jsonl")
    assert data.chat_template == str(tmp_path / "here" / "chat.jinja")
    older = dataclasses.replace(data, chat="talks.jsonl")
    monkeypatch.chdir(tmp_path)
    facts = dict(run.record["data"])
    assert ChatSource.reopen(older, facts).files[0].path == data.chat
    record = read_json(run.path / "run.json")
    record["config"]["data"]["chat"] = "talks.jsonl"
    (run.path / "run.json").write_text(json.dumps(record), encoding="utf-8")
    shutil.rmtree(run.path / "checkpoints")  # they have the hash of the config
    with without_report():
        assert main(["reproduce", str(run.path), "--run-dir", "again"]) == 0
    (tmp_path / "here").rename(tmp_path / "there")  # with its text
    monkeypatch.chdir(tmp_path / "there")
    moved = ChatSource.reopen(older, facts).files[0]
    assert (moved.path, moved.sha256) == (
        str(Path("talks.jsonl").absolute()),
        facts["files"][0]["sha256"],
    )


def test_a_short_training_answers_exactly(base: Path, chat: Path, tmp_path: Path) -> None:
    path = learn_chat(base, chat, tmp_path / "run", max_steps=150, eval_interval=50)
    run = Run(path)
    from glasslm.inference.chat_session import ChatSession, LocalAnswers, read_chat_template
    from glasslm.inference.sampling import Sampling

    model = load_model(path, "best", engine="numpy")
    greedy = LocalAnswers(model, read_chat_template(run), Sampling(temperature=0), 20)
    session = ChatSession(greedy, 0, ignore_message)
    for noun, sound in NOUNS.items():
        session.reset()
        assert "".join(session.ask(f"{noun}?")) == sound


def test_adapters_train_with_frozen_rows_of_new_tokens(
    base: Path, chat: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = learn_chat(base, chat, tmp_path / "run", full=False)
    assert "LoRA trains no embeddings" in capsys.readouterr().err
    weights = checkpoint.load(path, "best").weights()
    old = BaseRun(str(base)).weights()["embedding.weight"]
    assert np.array_equal(weights["embedding.weight"][:256], old)
    assert len(weights["embedding.weight"]) == 259
    losses = [line["loss"] for line in logged_lines(path, "eval") if line["split"] == "val"]
    assert losses[-1] < losses[0]


def test_plain_adds_one_token_and_fills_no_row_twice(
    base: Path, chat: Path, tmp_path: Path
) -> None:
    run = Run(learn_chat(base, chat, tmp_path / "run", chat_template="plain", max_steps=2))
    assert list(run.tokenizer.special_tokens) == ["<|endoftext|>"]
    split = run.dataset(ignore_message).train
    assert split.conversations is not None
    rows = ConversationRows(split.conversations, run.config.model)
    assert len(rows) == len(split.conversations)
    _, targets = rows.read(split.tokens, [0])
    assert np.count_nonzero(targets != NO_TARGET) > 0


def test_a_chat_is_learnt_again_without_new_tokens(run: Run, chat: Path, tmp_path: Path) -> None:
    again = Run(learn_chat(run.path, chat, tmp_path / "again", max_steps=2))
    assert again.tokenizer.sha256 == run.tokenizer.sha256
    first = logged_lines(again.path, "eval")[0]
    assert first["loss"] == pytest.approx(run.best_val_loss, rel=1e-6)


def test_a_chat_is_reproduced_to_the_bit(
    run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with without_report():
        assert main(["reproduce", str(run.path), "--run-dir", str(tmp_path / "again")]) == 0
    assert "bit for bit" in capsys.readouterr().out


def test_tokens_that_dropout_drew_are_reproduced(
    tmp_path: Path, chat: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Older versions applied the dropout of a tokenizer.json; the cache has their tokens."""
    library = Library.from_str(train_bpe([chat.read_text(encoding="utf-8")], 300).to_json())
    library.model.dropout = 0.5
    library.save(str(tmp_path / "tokenizer.json"))
    flags: dict[str, Any] = {"tokenizer": tmp_path / "tokenizer.json", "block_size": 64}
    base = make_base(tmp_path, max_steps=1, **flags)
    with monkeypatch.context() as older:
        older.setattr(SubwordTokenizer, "encoding_identity", SubwordTokenizer.sha256, False)
        run = Run(learn_chat(base, chat, tmp_path / "run", max_steps=1))
    newer = Run(learn_chat(base, chat, tmp_path / "newer", max_steps=1))
    assert newer.record["data"]["sha256"] != run.record["data"]["sha256"]
    with without_report():
        assert main(["reproduce", str(run.path), "--run-dir", str(tmp_path / "again")]) == 0
    again = Run(tmp_path / "again").record["data"]
    assert again["sha256"] == run.record["data"]["sha256"]


def test_evaluate_scores_the_answers(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate", str(run.path), "--json", "--engine", "numpy"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["loss"] == pytest.approx(run.best_val_loss, rel=1e-6)
    assert "gzip_bpb" not in result


REFUSED: dict[str, tuple[list[str], str]] = {
    "train": (["train", "--chat", "CHAT"], "glasslm finetune RUN --chat"),
    "two sources": (
        ["finetune", "BASE", "--chat", "CHAT", "--corpus", "python"], "choose one of them",
    ),
    "a template alone": (["finetune", "BASE", "--chat-template", "chatml"], "needs --chat"),
    "no file": (["finetune", "BASE", "--chat", "none.jsonl"], "none.jsonl cannot be read"),
    "one line": (["finetune", "BASE", "--chat", "ONE"], "has 1 conversations"),
    "an empty file": (["finetune", "BASE", "--chat", "EMPTY"], "has 0 conversations"),
    "a faulty line": (["finetune", "BASE", "--chat", "FAULTY"], "line 2"),
    "a short context": (
        ["finetune", "BASE", "--chat", "CHAT", "--block-size", "8"], "use a larger --block-size",
    ),
    "a study": (["ablate", "--axes", "norm", "--chat", "CHAT"], "--chat"),
}  # fmt: skip


def test_forgetting_needs_a_context_that_holds_an_answer(run: Run) -> None:
    notes: list[str] = []
    assert BaseRun(str(run.path)).old_text(run.config.model.block_size, notes.append) is not None
    assert BaseRun(str(run.path)).old_text(1, notes.append) is None
    assert "1 tokens hold no answer of its conversations" in notes[-1]


@pytest.mark.parametrize(("argv", "reason"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_learnt_is_refused(
    argv: list[str], reason: str, base: Path, chat: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    lines = chat.read_text().splitlines()
    (tmp_path / "one.jsonl").write_text(lines[0])
    (tmp_path / "empty.jsonl").write_text("\n")
    (tmp_path / "faulty.jsonl").write_text(lines[0] + '\n{"messages": 3}\n')
    names = {
        "CHAT": chat, "BASE": base, "ONE": tmp_path / "one.jsonl",
        "FAULTY": tmp_path / "faulty.jsonl", "EMPTY": tmp_path / "empty.jsonl",
    }  # fmt: skip
    assert main([str(names.get(word, word)) for word in argv]) == 2
    assert reason in capsys.readouterr().err


def test_a_run_of_text_has_no_fields_of_a_chat(base: Path) -> None:
    record = read_json(base / "run.json")
    assert "chat" not in record["data"]
    assert "transformers" not in record["tokenizer"]
