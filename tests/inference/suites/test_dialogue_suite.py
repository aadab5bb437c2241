"""The suite "dialogues" counts an answer as right if every token of it is, its end included."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from chat_runs import learn_chat, make_byte_base, write_chat
from glasslm.cli import main
from glasslm.data.chat import dialogues
from glasslm.inference.suites import dialogues as suite
from glasslm.inference.trained_model import load_model
from glasslm.runs.run_folder import Run
from small_runs import ignore_message


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("runs")
    base = make_byte_base(folder, max_steps=2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dialogues, "N_CONVERSATIONS", 200)
        yield Run(learn_chat(base, Path("dialogues"), folder / "run", max_steps=2, block_size=128))


def measure(run: Run, monkeypatch: pytest.MonkeyPatch, break_answers: int = 0) -> Any:
    """The result of a model that knows all tokens but those that end the first answers."""
    dataset = run.dataset(ignore_message)
    end = run.tokenizer.special_tokens["<|im_end|>"]
    left = [break_answers]

    def know(engine: Any, tokens: Any) -> Any:
        following = np.roll(tokens, -1, axis=1)
        marks = _answer_ends(tokens, run)
        for row, position in np.argwhere((following == end) & marks):
            if left[0]:
                following[row, position] = 0
                left[0] -= 1
        return following

    monkeypatch.setattr(suite, "likeliest_tokens", know)
    return suite.measure_dialogues(load_model(run.path, engine="numpy"), dataset)


def _answer_ends(tokens: Any, run: Run) -> Any:
    """(B, T): positions before the token that ends an answer, not a question."""
    start, (a,) = run.tokenizer.special_tokens["<|im_start|>"], b"a"
    after = np.roll(tokens, 1, axis=1) == start
    role = np.where(after, tokens, -1)
    last = np.maximum.accumulate(np.where(role >= 0, np.arange(tokens.shape[1]), 0), axis=1)
    return np.take_along_axis(tokens, last, axis=1) == a


def test_all_answers_of_a_model_that_knows_them_are_right(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    result = measure(run, monkeypatch)
    facts = result.facts["all"]
    assert facts["count"] == facts["of"] > 20
    assert set(result.facts) == {*dialogues.KINDS, "all"}


def test_an_answer_without_its_end_is_wrong(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    facts = measure(run, monkeypatch, break_answers=10**6).facts["all"]
    assert facts["count"] == 0
    assert facts["ci_high"] < 0.2


def test_another_chat_has_no_such_score(
    run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    chat = write_chat(tmp_path / "chat.jsonl")
    other = learn_chat(run.path.parent / "base", chat, tmp_path / "run", max_steps=1)
    assert main(["evaluate", str(other), "--suite", "dialogues"]) == 2
    assert "--chat dialogues" in capsys.readouterr().err
