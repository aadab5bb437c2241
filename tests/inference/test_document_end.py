"""Generation stops at the token that ends a document, and a run keeps its special tokens."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

import glasslm
from doubles import HistoryEngine
from glasslm.cli import main
from glasslm.config.schema import ModelConfig
from glasslm.data.tokenizers import CharTokenizer
from glasslm.errors import InputError
from glasslm.inference.generation import encode_prompt, generate
from glasslm.inference.sampling import Sampling
from glasslm.inference.trained_model import Model
from glasslm.runs.run_folder import Run
from glasslm.training.fine_tuning import BaseRun, fine_tuning_config
from small_runs import logged_lines, read_json, resume, small_config, train, write_text

END = "<|endoftext|>"
LETTERS = CharTokenizer("\nabcdef", [END])


def pieces_of(tokenizer: CharTokenizer, prompt: str = "ab", n: int = 200, **options: object):
    engine = HistoryEngine(LETTERS.vocab_size)
    sampling = Sampling(temperature=2.0, seed=5)
    return list(
        generate(
            engine,
            tokenizer,
            [prompt],
            model_config=ModelConfig(block_size=16),
            max_new_tokens=n,
            sampling=sampling,
            samples=8,
            **options,
        )
    )


def test_generation_stops_at_the_end_of_the_document() -> None:
    pieces = pieces_of(LETTERS)
    for sample in range(8):
        text = [piece for piece in pieces if piece.sample == sample]
        *before, last = text
        assert (last.token, last.finish, last.text) == (LETTERS.end_id, "stop", "")
        assert all(piece.token != LETTERS.end_id and piece.finish is None for piece in before)
        assert "".join(piece.text for piece in text) == LETTERS.decode([p.token for p in before])


def test_text_held_back_for_a_stop_string_is_shown_at_the_end() -> None:
    stops = [f"{letter}{other}Z" for letter in "abcdef\n" for other in "abcdef\n"]
    plain, held = pieces_of(LETTERS), pieces_of(LETTERS, stop=stops)
    assert [piece.token for piece in held] == [piece.token for piece in plain]
    assert "".join(piece.text for piece in held if piece.sample == 0) == "".join(
        piece.text for piece in plain if piece.sample == 0
    )


def test_the_last_token_may_be_the_end() -> None:
    length = sum(piece.sample == 0 for piece in pieces_of(LETTERS))
    last = [piece for piece in pieces_of(LETTERS, n=length) if piece.sample == 0][-1]
    assert (last.token, last.finish) == (LETTERS.end_id, "stop")


def test_an_empty_prompt_starts_a_document() -> None:
    assert encode_prompt(LETTERS, "") == [LETTERS.end_id]
    assert encode_prompt(LETTERS, f"a{END}b") == [1, LETTERS.end_id, 2]
    assert encode_prompt(CharTokenizer("\nab"), "") == [0]


@pytest.fixture(scope="module")
def story_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on documents of one sentence, a separator between them."""
    folder = tmp_path_factory.mktemp("stories")
    text = write_text(folder / "text.txt")
    train(text, folder / "run", max_steps=150, document_separator=".\n", lr=0.03)
    return folder / "run"


def test_a_trained_model_ends_its_documents(
    story_run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["generate", str(story_run), "--prompt", "the cat sees", "--json"]
    assert main([*command, "--temperature", "0"]) == 0
    line = json.loads(capsys.readouterr().out)
    assert line["finish"] == "stop"
    assert END not in line["text"]
    assert line["tokens"] == len(line["text"]) + 1
    assert glasslm.load(story_run).generate("the cat sees", temperature=0) == line["text"]


def test_training_evaluation_and_model_say_the_same_numbers(
    story_run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    best = [line for line in logged_lines(story_run, "eval") if line["best"]][-1]
    assert main(["evaluate", str(story_run), "--json"]) == 0
    measured = json.loads(capsys.readouterr().out)
    for key in ("tokens", "bytes", "loss", "bpb"):
        assert measured[key] == pytest.approx(best[key], rel=1e-6)
    model = glasslm.load(story_run)
    # The bytes are those of the text without the ends.
    dataset = Run(story_run).dataset(lambda message: None)
    assert best["bytes"] == len(model.tokenizer.decode(dataset.val.tokens[1:]))
    assert best["tokens"] == best["bytes"] + int(
        (dataset.val.tokens[1:] == model.tokenizer.end_id).sum()
    )


def test_a_run_resumes_with_its_documents(story_run: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(story_run, run)
    for step in (150, 145):
        shutil.rmtree(run / "checkpoints" / f"{step:06d}", ignore_errors=True)
    resume(run)
    assert [line["loss"] for line in logged_lines(run, "step")] == [
        line["loss"] for line in logged_lines(story_run, "step")
    ]
    data = read_json(run / "run.json")["data"]
    assert data["special_tokens"] == {END: 150}


def test_fine_tuning_keeps_the_special_tokens(story_run: Path, tmp_path: Path) -> None:
    text = write_text(tmp_path / "more.txt")
    base = BaseRun(str(story_run))
    config = fine_tuning_config(base, with_adapters=False)
    assert config.data.special_tokens == (END,)
    base.require_fit(config)
    with pytest.raises(InputError, match="special tokens are <x>"):
        base.require_fit(small_config(text, special_tokens=("<x>",)))


def test_a_prompt_that_spells_special_tokens_is_reported(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(write_text(tmp_path / "text.txt"), tmp_path / "run", max_steps=1, tokenizer="byte")
    command = ["generate", str(tmp_path / "run"), "--max-new-tokens", "1", "--prompt"]
    assert main([*command, f"the{END}{END}"]) == 0
    assert f"the prompt spells {END} 2 times: ordinary text here" in capsys.readouterr().err
    assert main([*command, "the cat"]) == 0
    assert "spells" not in capsys.readouterr().err


def test_attention_inside_documents_is_trained_resumed_and_used(tmp_path: Path) -> None:
    text = write_text(tmp_path / "text.txt")
    flags = {"document_separator": ".\n", "document_attention": True, "max_steps": 10}
    train(text, tmp_path / "run", **flags)
    model = glasslm.load(tmp_path / "run")
    assert model.config.model.document_end_id == model.tokenizer.end_id
    # Only the last document of a prompt matters; the token before it belongs to it.
    short = model.logits(f"{END}the cat")
    np.testing.assert_allclose(model.logits(f"a dog{END}the cat"), short, rtol=1e-5, atol=1e-5)
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "000010")
    before = logged_lines(tmp_path / "run", "step")
    resume(tmp_path / "run")
    assert [line["loss"] for line in logged_lines(tmp_path / "run", "step")] == [
        line["loss"] for line in before
    ]
    with pytest.raises(InputError, match="--document-attention needs documents"):
        train(text, tmp_path / "other", document_attention=True)


def test_the_api_warns_of_a_spelling_that_is_ordinary_text(tmp_path: Path) -> None:
    """As the commands do, once; a text without one, or a token of the model, gives no warning."""
    text = write_text(tmp_path / "text.txt")
    few = {"max_steps": 2, "sample_interval": 0, "tokenizer": "byte"}
    plain = glasslm.load(train(text, tmp_path / "plain", **few).run_dir)
    marked = glasslm.load(train(text, tmp_path / "marked", special_tokens=(END,), **few).run_dir)
    calls = (
        lambda model, text: model.generate(text, 1),
        lambda model, text: list(model.stream(text, 1)),
        lambda model, text: model.generate_ids(model.tokenizer.encode(text), 1),
        Model.logits,
        Model.losses,
        Model.evaluate,
        Model.inspect,
        Model.activations,
        Model.attention,
        Model.gradients,
    )
    for call in calls:
        with pytest.warns(UserWarning, match="ordinary text") as warned:
            call(plain, f"the cat{END}")
        assert [str(warning.message).split(":")[0] for warning in warned] == [
            f"the text spells {END} 1 time"
        ]
        assert warned[0].filename == __file__  # the line of the caller
        call(plain, "the cat")
        call(marked, f"the cat{END}")
