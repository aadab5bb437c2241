"""Exports carry special tokens and a chat template, and imports keep them."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

import torch
import transformers
from exported_models import make_export, small_config, value

import glasslm
from glasslm import cli
from glasslm.data.tokenizers import ByteTokenizer, CharTokenizer, Tokenizer, train_bpe
from glasslm.errors import DamagedError, InputError
from glasslm.inference.sampling import Sampling
from glasslm.interop import hf
from glasslm.interop.gguf_tokenizer import CONTROL, NORMAL, convert_tokenizer
from glasslm.interop.hf_special_tokens import read_settings
from glasslm.interop.model_card import render_card
from glasslm.interop.model_export import load_export
from small_runs import logged_lines, read_json, train, write_text

END, START = "<|endoftext|>", "<|im_start|>"
STORY = "the cat sees a dog. "
TEXT = f"{STORY}{END}{START}{STORY} <|im_{END}{STORY}"
END_TOKEN = {"__type": "AddedToken", "content": "</s>", "special": True}
TEMPLATE = "{% for m in messages %}<|im_start|>{{ m['content'] }}{% endfor %}"

PLAIN: dict[str, Tokenizer] = {
    "char": CharTokenizer(STORY + "<|im_"),
    "byte": ByteTokenizer(),
    "bpe": train_bpe([STORY * 40], 270),
}


@pytest.mark.parametrize("kind", PLAIN)
def test_transformers_reads_the_same_ids_and_the_return_too(tmp_path: Path, kind: str) -> None:
    tokenizer = PLAIN[kind].with_special_tokens([END, START])
    hf.write(make_export(tmp_path, small_config(), tokenizer), tmp_path / "out")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    ids = tokenizer.encode(TEXT).tolist()
    assert theirs(TEXT)["input_ids"] == ids
    assert theirs.decode(ids, skip_special_tokens=True) == tokenizer.decode(ids)
    assert theirs.eos_token == theirs.bos_token == theirs.pad_token == END
    assert theirs.eos_token_id == tokenizer.end_id
    assert set(theirs.all_special_tokens) == {END, START}
    for name in ("config.json", "generation_config.json"):
        content = read_json(tmp_path / "out" / name)
        roles = [content[f"{role}_token_id"] for role in ("bos", "eos", "pad")]
        assert roles == [tokenizer.end_id] * 3
    back = hf.read(tmp_path / "out")
    assert back.tokenizer.sha256 == tokenizer.sha256


@pytest.mark.parametrize("kind", PLAIN)
def test_without_special_tokens_the_files_have_none(tmp_path: Path, kind: str) -> None:
    hf.write(make_export(tmp_path, small_config(), PLAIN[kind]), tmp_path / "out")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert theirs.all_special_tokens == []
    assert read_json(tmp_path / "out" / "config.json")["eos_token_id"] is None
    assert hf.read(tmp_path / "out").tokenizer.sha256 == PLAIN[kind].sha256


def test_a_model_that_reads_them_as_text_says_so_in_its_files(tmp_path: Path) -> None:
    """As a model with GPT-2's vocabulary that was trained without --special-tokens."""
    content = json.loads(PLAIN["bpe"].with_special_tokens([END]).to_json())
    del content["added_tokens"][0]["eos_token"]
    tokenizer = glasslm.data.tokenizers.SubwordTokenizer(json.dumps(content))
    hf.write(make_export(tmp_path, small_config(), tokenizer), tmp_path / "out")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert theirs(TEXT)["input_ids"] == tokenizer.encode(TEXT).tolist()
    back = hf.read(tmp_path / "out")
    assert back.tokenizer.sha256 == tokenizer.sha256
    assert back.tokenizer.end_id is None


@pytest.fixture(scope="module")
def story_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("stories")
    flags: dict[str, Any] = {"max_steps": 30, "document_separator": ".\n", "optimizer": "adamw"}
    train(write_text(folder / "text.txt"), folder / "run", **flags)
    return folder / "run"


def test_the_loss_of_transformers_is_ours(story_run: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert cli.main(["export", str(story_run), "--to", "hf", "--out", str(out)]) == 0
    tokenizer = transformers.AutoTokenizer.from_pretrained(out)
    model = transformers.AutoModelForCausalLM.from_pretrained(out)
    text = f"the cat sees a dog{END}my sister{END}"
    ids = torch.tensor([tokenizer(text)["input_ids"]])
    ours = glasslm.load(story_run).evaluate(text)
    assert model(ids, labels=ids).loss.item() == pytest.approx(ours.loss, rel=1e-4)
    assert ours.bytes == len("the cat sees a dogmy sister") - 1
    # The card has the numbers of training and evaluation.
    best = [line for line in logged_lines(story_run, "eval") if line["best"]][-1]
    card = (out / "README.md").read_text(encoding="utf-8")
    assert f"{best['bpb']:.4f}" in card
    assert "Special tokens have no bytes" in card
    assert r"ends each document" in card


def test_generation_stops_there_and_here_at_the_same_token(story_run: Path, tmp_path: Path) -> None:
    hf.write(load_export(str(story_run)), tmp_path / "out")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.generation_config.eos_token_id == glasslm.load(story_run).tokenizer.end_id


@pytest.fixture
def foreign(tmp_path: Path) -> Path:
    """A model folder as another program writes it, with roles, a template and two end ids."""
    tokenizer = PLAIN["bpe"].with_special_tokens(["<pad>", "<s>", "</s>", START])
    folder = tmp_path / "foreign"
    hf.write(make_export(tmp_path, small_config(), tokenizer), folder)
    settings = read_json(folder / "tokenizer_config.json")
    settings |= {"bos_token": "<s>", "eos_token": END_TOKEN, "pad_token": "<pad>"}
    settings |= {"chat_template": "not this one"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    (folder / "special_tokens_map.json").unlink()
    (folder / "chat_template.jinja").write_text(TEMPLATE, encoding="utf-8")
    ids = tokenizer.special_tokens
    generation = {"eos_token_id": [ids["</s>"], ids[START]]}
    (folder / "generation_config.json").write_text(json.dumps(generation), encoding="utf-8")
    return folder


def test_an_import_and_its_export_keep_roles_and_template(foreign: Path, tmp_path: Path) -> None:
    run, out = tmp_path / "run", tmp_path / "out"
    assert cli.main(["import", str(foreign), "--run-dir", str(run)]) == 0
    record = read_json(run / "run.json")
    assert record["tokenizer"]["transformers"]["chat_template"] == TEMPLATE
    assert record["config"]["data"]["special_tokens"] == ["</s>"]
    model = glasslm.load(run)
    before = transformers.AutoTokenizer.from_pretrained(foreign)
    assert model.tokenizer.end_id == before.eos_token_id
    text = f"<s>{STORY}</s>{START}{STORY}"
    assert model.tokenizer.encode(text).tolist() == before(text)["input_ids"]
    hf.write(load_export(str(run)), out)
    after = transformers.AutoTokenizer.from_pretrained(out)
    for role in ("bos_token", "eos_token", "pad_token", "chat_template"):
        assert getattr(after, role) == getattr(before, role)
    assert after(text)["input_ids"] == before(text)["input_ids"]
    messages = [{"role": "user", "content": STORY}]
    assert after.apply_chat_template(messages, tokenize=False) == START + STORY
    generation = read_json(out / "generation_config.json")
    assert (
        generation["eos_token_id"] == read_json(foreign / "generation_config.json")["eos_token_id"]
    )


@pytest.mark.parametrize("file", ["generation_config.json", "config.json"])
@pytest.mark.parametrize("engine", ["numpy", "torch"])
def test_generation_stops_at_any_of_several_ends_as_transformers_does(
    file: str, engine: str, foreign: Path, tmp_path: Path
) -> None:
    run, prompt = tmp_path / "run", "the cat"
    assert cli.main(["import", str(foreign), "--run-dir", str(run)]) == 0
    greedy = Sampling(temperature=0.0)
    free = [piece.token for piece in glasslm.load(run).pieces([prompt], 12, sampling=greedy)]
    end = free[4]  # where the two ids of the folder end no text
    first = free.index(end)
    (foreign / "generation_config.json").unlink()
    ends = {"eos_token_id": [PLAIN["bpe"].vocab_size + 2, end]}
    content = read_json(foreign / file) if file == "config.json" else {}
    (foreign / file).write_text(json.dumps(content | ends), encoding="utf-8")
    again, out = tmp_path / "again", tmp_path / "out"
    assert cli.main(["import", str(foreign), "--run-dir", str(again)]) == 0
    model = glasslm.load(again, engine=engine)
    pieces = list(model.pieces([prompt], 12, sampling=greedy))
    assert [piece.token for piece in pieces] == free[: first + 1]
    assert (pieces[-1].finish, pieces[-1].text) == ("stop", "")
    hf.write(load_export(str(again)), out)
    assert read_json(out / "config.json")["eos_token_id"] == ends["eos_token_id"]
    theirs = transformers.AutoModelForCausalLM.from_pretrained(out)
    ids = torch.tensor([model.tokenizer.encode(prompt).tolist()])
    generated = theirs.generate(ids, max_new_tokens=12, do_sample=False)[0, ids.shape[1] :]
    assert generated.tolist() == free[: first + 1]


def test_a_fine_tuned_import_keeps_them_too(foreign: Path, tmp_path: Path) -> None:
    run, tuned = tmp_path / "run", tmp_path / "tuned"
    text = write_text(tmp_path / "text.txt")
    assert cli.main(["import", str(foreign), "--run-dir", str(run)]) == 0
    command = ["finetune", str(run), "--full", "--text-file", str(text), "--run-dir", str(tuned)]
    flags = ["--max-steps", "1", "--sample-interval", "0", "--block-size", "24"]
    assert cli.main([*command, *flags, "--threads", "1"]) == 0
    settings = read_json(run / "run.json")["tokenizer"]["transformers"]
    assert read_json(tuned / "run.json")["tokenizer"]["transformers"] == settings
    assert load_export(str(tuned)).token_settings == settings
    assert read_json(tuned / "run.json")["data"]["special_tokens"] == {"</s>": 1}


def test_a_byte_order_mark_is_not_part_of_a_template(foreign: Path) -> None:
    (foreign / "chat_template.jinja").write_text(TEMPLATE, encoding="utf-8-sig")
    assert read_settings(foreign, {}, {})["chat_template"] == TEMPLATE


def test_a_damaged_template_is_refused(foreign: Path) -> None:
    (foreign / "chat_template.jinja").write_bytes(b"\xff")
    with pytest.raises(DamagedError, match=r"chat_template\.jinja is damaged"):
        hf.read(foreign)


@pytest.mark.parametrize(
    "settings", [[], {"eos_token": 5, "chat_template": 1}, {"eos_token": "no such token"}]
)
def test_settings_of_other_types_are_ignored(foreign: Path, settings: Any) -> None:
    (foreign / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    config = read_json(foreign / "config.json") | {"eos_token_id": None}
    (foreign / "config.json").write_text(json.dumps(config), encoding="utf-8")
    assert "eos_token" not in hf.read(foreign).token_settings


A, B = ({"Sequence": {"id": text, "type_id": 0}} for text in "AB")
BEGIN, FINISH = ({"SpecialToken": {"id": token, "type_id": 0}} for token in ("<s>", "</s>"))


def write_post_processor(folder: Path, step: dict[str, Any]) -> None:
    content = read_json(folder / "tokenizer.json") | {"post_processor": step}
    (folder / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")


def template(*single: dict[str, Any]) -> dict[str, Any]:
    """The library accepts each of the pieces, and some that it cannot compute."""
    known = {"<s>": {"id": "<s>", "ids": [271], "tokens": ["<s>"]}}
    return {
        "type": "TemplateProcessing", "single": single, "pair": [A, B], "special_tokens": known,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("step", "reason"),
    [
        (template(BEGIN), "'single' of its post_processor has 0 texts"),
        (template(BEGIN, A, A), "'single' of its post_processor has 2 texts"),
        (template(BEGIN, B), "expected the text A once"),
        (template(A, FINISH), "'special_tokens' of its post_processor has no '</s>'"),
        ({"type": "Sequence", "processors": [template()]}, "has 0 texts"),
    ],
)
def test_a_template_that_gives_no_text_once_is_refused(
    foreign: Path, step: dict[str, Any], reason: str
) -> None:
    write_post_processor(foreign, step)
    with pytest.raises(DamagedError, match=f"tokenizer.json is damaged: .*{reason}"):
        hf.read(foreign)


def test_an_import_notes_the_tokens_around_each_text(
    foreign: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    both = {"type": "BertProcessing", "cls": ["<s>", 271], "sep": ["</s>", 272]}
    write_post_processor(foreign, {"type": "Sequence", "processors": [both]})
    assert cli.main(["import", str(foreign), "--run-dir", str(tmp_path / "run")]) == 0
    notes = capsys.readouterr().err
    assert "note: transformers begins each text of this model with <s>" in notes
    assert "note: transformers ends each text of this model with </s>" in notes
    assert transformers.AutoTokenizer.from_pretrained(foreign)("")["input_ids"] == [271, 272]


@pytest.mark.parametrize("kind", PLAIN)
def test_an_import_and_its_export_keep_the_tokens_around_each_text(
    tmp_path: Path, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    tokenizer = PLAIN[kind].with_special_tokens(["<s>"])
    folder, run, out = (tmp_path / name for name in ("foreign", "run", "out"))
    hf.write(make_export(tmp_path, small_config(), tokenizer), folder)
    step = template(BEGIN, A)
    step["special_tokens"]["<s>"]["ids"] = [tokenizer.special_tokens["<s>"]]
    write_post_processor(folder, step)
    assert cli.main(["import", str(folder), "--run-dir", str(run)]) == 0
    assert "transformers begins each text of this model with <s>" in capsys.readouterr().err
    assert type(glasslm.load(run).tokenizer) is type(tokenizer)
    hf.write(load_export(run), out)
    ids = [tokenizer.special_tokens["<s>"], *tokenizer.encode("cat").tolist()]
    assert transformers.AutoTokenizer.from_pretrained(out)("cat")["input_ids"] == ids
    write_post_processor(folder, {"type": "TemplateProcessing"})
    with pytest.raises(InputError, match=r"tokenizer\.json: .* the tokenizers library reads"):
        hf.read(folder)


# -- GGUF ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", PLAIN)
def test_gguf_has_the_special_tokens(kind: str) -> None:
    tokenizer = PLAIN[kind].with_special_tokens([END, START])
    converted = convert_tokenizer(tokenizer, {"eos_token": END, "chat_template": TEMPLATE})
    V = tokenizer.vocab_size
    assert converted.tokens[V - 2 :] == [END, START]
    assert converted.types == [NORMAL] * (V - 2) + [CONTROL] * 2
    assert (converted.end, converted.begin, converted.pad) == (V - 2, V - 2, None)
    assert converted.chat_template == TEMPLATE
    assert convert_tokenizer(tokenizer).pad == V - 2


def test_gguf_refuses_a_special_token_that_it_would_misread() -> None:
    with pytest.raises(InputError, match="special token"):
        convert_tokenizer(CharTokenizer("abc", [END]))


def test_the_gguf_file_has_the_roles(tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    from glasslm.interop import gguf_file

    tokenizer = PLAIN["bpe"].with_special_tokens([END])
    gguf_file.write(make_export(tmp_path, small_config(), tokenizer), tmp_path / "m.gguf", "f32")
    for role in ("bos", "eos", "padding"):
        key = f"tokenizer.ggml.{role}_token_id"
        assert value(tmp_path / "m.gguf", key) == tokenizer.end_id


def test_a_card_names_the_special_tokens(story_run: Path) -> None:
    card = render_card(load_export(str(story_run)), None)
    assert np.char.count(card, "ends each document") == 1


def test_an_export_says_that_attention_kept_inside_documents_is_not_there(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = {"document_separator": ".\n", "document_attention": True, "max_steps": 20}
    train(write_text(tmp_path / "text.txt"), tmp_path / "run", **flags)
    out = tmp_path / "out"
    assert cli.main(["export", str(tmp_path / "run"), "--to", "hf", "--out", str(out)]) == 0
    captured = capsys.readouterr()
    assert "logits equal in transformers" in captured.out  # of single documents
    assert "note: this model attends within one document" in captured.err
    assert "This model attends within one document" in (out / "README.md").read_text("utf-8")
    tokens = np.array([[1, 2, 3, 4, 5]])
    model = load_export(str(tmp_path / "run"))
    np.testing.assert_allclose(hf.logits(out, tokens), model.logits(tokens), rtol=1e-4, atol=1e-5)
    tokens[0, 2] = model.tokenizer.end_id
    assert not np.allclose(hf.logits(out, tokens)[0, 3:], model.logits(tokens)[0, 3:], atol=1e-4)
