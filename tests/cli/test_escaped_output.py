"""Foreign text never steers a terminal: names of folders and files, prompts, generated text."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest

from glasslm import cli
from glasslm.config.schema import ComputeConfig
from glasslm.text import escape_control_chars, notify, print_escaped, print_result
from glasslm.training import launch
from small_runs import ignore_message, small_config

# Controls of C0 and C1, marks, overrides and isolates of direction, tags.
STEERING = re.compile(
    "[\x00-\x09\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u206f\ufff9-\ufffb"
    "\U000e0000-\U000e007f]"
)
HOSTILE = "\u202ekcab\u2069\u200f\u061c\U000e0041\x9b31m"
COMPUTE = ComputeConfig(engine="numpy", device="cpu", precision="fp64", threads=1)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run in a folder with a hostile name, on a text with hostile characters."""
    folder = tmp_path_factory.mktemp("runs") / HOSTILE
    folder.mkdir()
    path = folder / f"text{HOSTILE}.txt"
    path.write_text(f"some {HOSTILE} text\x1b[31m\n" * 60, encoding="utf-8", newline="")
    config = small_config(path, max_steps=4, sample_interval=0)
    return launch.train(config, COMPUTE, folder / "run", notify=ignore_message).run_dir


@pytest.mark.usefixtures("no_figures")
@pytest.mark.parametrize(
    "command",
    [
        "verify RUN", "evaluate RUN", "report RUN/nothing", "compare RUN RUN --out OUT",
        "generate RUN/nothing", "generate RUN --compare --prompt some --max-new-tokens 60",
        "generate RUN --prompt HOSTILE\u2067", "evaluate RUN --text-file RUN/nothing", "HOSTILE",
        "evaluate RUN --text-file RUN/run.lock", "diagnose RUN --out OUT", "train --preset HOSTILE",
        "corpus inspect --text-file RUN/tokenizer.json",
    ],
)  # fmt: skip
def test_no_output_for_people_holds_a_steering_character(
    command: str, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    values = {"RUN": str(run), "OUT": str(tmp_path / HOSTILE), "HOSTILE": HOSTILE}
    words = [re.sub("RUN|OUT|HOSTILE", lambda m: values[m[0]], word) for word in command.split()]
    cli.main(words)
    output = capsys.readouterr()
    assert STEERING.findall(output.err) == []
    assert STEERING.findall(output.out) == []
    assert output.err + output.out


def test_data_stays_exact(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """JSON and the text in a pipe are what the model wrote."""
    command = ["generate", str(run), "--prompt", "some", "--max-new-tokens", "60"]
    assert cli.main([*command, "--json"]) == 0
    text = json.loads(capsys.readouterr().out)["text"]
    assert STEERING.search(text)  # the model has learned them
    assert cli.main(command) == 0
    assert capsys.readouterr().out == f"some{text}\n"


def test_a_terminal_gets_no_steering_character(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    command = ["generate", str(run), "--prompt", "some \u202e", "--max-new-tokens", "60"]
    assert cli.main(command) == 0
    output = capsys.readouterr()
    assert STEERING.findall(output.out) == []
    assert "some \ufffd" in output.out
    print_result(f"run: {HOSTILE}")
    assert STEERING.findall(capsys.readouterr().out) == []


def test_messages_are_escaped_where_they_are_printed(capsys: pytest.CaptureFixture[str]) -> None:
    notify(f"a file {HOSTILE}\x1b]0;title\x07")
    print_escaped(f"a file {HOSTILE}")
    print_result("run: \u202e")  # into a pipe: exact
    output = capsys.readouterr()
    assert STEERING.findall(output.err) == []
    assert output.out == f"{escape_control_chars('a file ' + HOSTILE)}\nrun: \u202e\n"
    assert escape_control_chars("می\u200cخواهم \U0001f469\u200d\U0001f680") == (
        "می\u200cخواهم \U0001f469\u200d\U0001f680"  # joiners belong to the text
    )
