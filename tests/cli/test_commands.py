"""The commands: help, one line for bad input, exit codes, and the last line of output."""

import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from glasslm import __version__
from glasslm.cli import COMMANDS, main
from glasslm.cli.completion import list_flags
from small_runs import run_program, train_command, write_text


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text(tmp_path_factory.mktemp("text") / "text.txt")


# -- help ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("argv", [["--help"], ["-h"], ["--help-all"], ["help"], []])
def test_help_lists_the_commands(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(argv) == 0
    out = capsys.readouterr().out
    for command, summary in COMMANDS.items():
        assert f"  {command:<10} {summary}" in out
    assert "glasslm train" in out


def test_help_is_instant_because_it_loads_nothing_heavy() -> None:
    code = (
        "import sys; from glasslm.cli import main; main(['--help']); "
        "names = {'numpy', 'tyro', 'rich', 'matplotlib', 'tokenizers', 'torch', 'requests'}; "
        "heavy = names & set(sys.modules); "
        "sys.exit(', '.join(heavy) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("flag", ["-h", "--help", "--help-all"])
@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_with_an_example(
    command: str, flag: str, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out = run_command([command, flag], capsys)
    assert code == 0
    assert "Example" in out
    assert f"glasslm {command}" in out.partition("Example")[2]


def test_the_flags_of_the_contract_are_there(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["train", "--help-all"])
    out = capsys.readouterr().out
    flags = (
        "corpus text-file preset run-dir engine device precision threads tokenizer vocab-size "
        "val-fraction test-fraction encoding-errors d-model n-layers n-heads n-kv-heads d-ff "
        "block-size seq-len dropout attention-dropout norm norm-position feedforward position "
        "tie-embeddings qk-norm bias optimizer lr min-lr warmup-steps schedule betas "
        "weight-decay grad-clip batch-size micro-batch-size max-steps epochs max-time stop-at-loss "
        "patience eval-interval log-interval sample-interval checkpoint-interval keep seed "
        "json"
    )
    for flag in flags.split():
        assert f"--{flag}" in out


def test_python_m_glasslm_is_the_same_program(capsys: pytest.CaptureFixture[str]) -> None:
    done = run_program("--version")
    assert (done.returncode, done.stdout) == (0, f"glasslm {__version__}\n")
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == done.stdout


def test_an_unknown_command_says_what_was_meant(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["trian"]) == 2
    assert "did you mean 'train'?" in capsys.readouterr().err
    assert main(["42"]) == 2
    assert "Start with: glasslm train" in capsys.readouterr().err


# -- bad input ------------------------------------------------------------------------------------

BAD: dict[str, tuple[list[str], str]] = {
    "a misspelt flag": (["--n-layer", "2"], "--n-layers"),
    "an unknown preset": (["--preset", "huge"], "capstone-10m"),
    "an unknown word": (["--norm", "batchnorm"], "rmsnorm"),
    "an unknown optimizer": (["--optimizer", "adam"], "adamw"),
    "no number": (["--lr", "fast"], "--lr"),
    "a flag without its value": (["--lr"], "--lr"),
    "a flag given twice": (["--lr", "1", "--lr", "2"], "twice"),
    "heads that do not divide": (["--d-model", "130"], "--d-model"),
    "key heads that do not divide": (["--n-kv-heads", "3"], "--n-kv-heads"),
    "a negative rate": (["--lr", "-0.1"], "above 0"),
    "a rate that is no number": (["--lr", "nan"], "lr is nan"),
    "a decay that is no number": (["--weight-decay", "nan"], "weight_decay is nan"),
    "an endless rate": (["--lr", "inf"], "lr is inf"),
    "an endless norm": (["--grad-clip", "inf"], "grad_clip is inf"),
    "endless epochs": (["--epochs", "inf"], "epochs is inf"),
    "a seed too large": (["--seed", str(2**64)], "2**64"),
    "all dropped": (["--dropout", "1"], "below 1"),
    "no steps": (["--max-steps", "0"], "max_steps is 0"),
    "a strange duration": (["--max-time", "soon"], "90s"),
    "two lengths": (["--max-time", "1m", "--epochs", "2"], "choose one"),
    "a context longer than the text": (["--block-size", "100000"], "--block-size"),
    "a batch larger than the text": (["--batch-size", "100000"], "--batch-size"),
    "no text": (["--text-file", "nowhere.txt"], "nowhere.txt"),
    "two texts": (["--corpus", "python"], "choose one"),
    "no tokenizer": (["--tokenizer", "nowhere.json"], "nowhere.json"),
    "no fraction": (["--val-fraction", "1.5"], "below 1"),
    "negative threads": (["--threads", "-1"], "threads is -1"),
}


def run_command(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    try:
        code = main(arguments)
    except SystemExit as exit_request:
        code = int(exit_request.code or 0)
    out, err = capsys.readouterr()
    return code, out + err


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_clear_message_and_exit_code_2(
    case: str, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags, expected = BAD[case]
    given = [] if "--text-file" in flags else ["--text-file", str(text)]
    code, message = run_command(
        ["train", *given, *flags, "--run-dir", str(tmp_path / "run")], capsys
    )
    assert code == 2, message
    assert expected in message
    assert "Traceback" not in message
    assert len(message.splitlines()) == 1
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("threads", ["two", "0", "-1", "1.5"])
def test_a_strange_number_of_threads_in_the_environment(
    threads: str,
    text: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("GLASSLM_THREADS", threads)
    code, message = run_command(
        ["train", "--text-file", str(text), "--run-dir", str(tmp_path / "run")], capsys
    )
    assert code == 2, message
    assert f"GLASSLM_THREADS is '{threads}'" in message
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("command", ["look", "serve", "compare", "resume"])
def test_a_missing_run_has_the_name_that_help_gives_it(
    command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    code, message = run_command([command], capsys)
    assert code == 2
    assert message == f"glasslm {command}: RUN is missing: see glasslm {command} --help\n"


@pytest.mark.parametrize(
    ("command", "cure"),
    [
        ("scale --budget 5m --max-steps=9", "leave it out"),
        ("capstone --budget 5m --max-steps 9", "leave out --max-steps"),
        ("verify RUN --ops own.py", "give both, or leave it out"),
        ("check RUN --combinations 50", "leave it out with RUN and --ops"),
        ("check --ops own.py --combinations=9", "leave it out with RUN and --ops"),
        ("check --combinations -1", "expected 0 or more"),
        ("generate RUN --compare --no-cache", "leave out one flag"),
    ],
)
def test_a_flag_without_an_effect_is_refused_with_the_cure(
    command: str, cure: str, capsys: pytest.CaptureFixture[str]
) -> None:
    code, message = run_command(command.split(), capsys)
    assert code == 2
    assert message.endswith(f"{cure}\n")
    assert message.count("\n") == 1


def test_sampling_flags_beside_compare_are_named(capsys: pytest.CaptureFixture[str]) -> None:
    command = "generate RUN --compare --temperature 0.1 --top_k 5 --seed 1"
    _, message = run_command(command.split(), capsys)
    assert "--compare has samplers of its own: no effect of --temperature and --top-k" in message


@pytest.mark.parametrize("flag", ["--help", "--help-all"])
@pytest.mark.parametrize("command", ["ablate", "scale", "try", "capstone"])
def test_help_leaves_out_what_a_study_refuses(
    command: str, flag: str, capsys: pytest.CaptureFixture[str]
) -> None:
    code, text = run_command([command, flag], capsys)
    assert code == 0
    refused = ["epochs", "max-time", "init-from", "patience", "stop-at-loss"]
    refused += {"scale": ["max-steps"], "capstone": ["max-steps", "ops"]}.get(command, [])
    shown = re.findall(r"^  --([a-z-]+)", text, re.MULTILINE)
    assert "batch-size" in shown
    assert not set(refused) & {*shown, *(name[2:] for name in list_flags(command))}
    assert ("--redo run|ablation|scaling\n" in text) == (command == "capstone")


def test_the_help_of_a_curve_names_its_folder(capsys: pytest.CaptureFixture[str]) -> None:
    _, text = run_command(["diagnose", "--help"], capsys)
    assert "of curves diagnosis-FILE)" in " ".join(text.split())


@pytest.mark.parametrize("command", ["resume", "generate", "evaluate", "report", "check"])
def test_a_run_that_is_not_there(
    command: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    code, message = run_command([command, str(tmp_path / "nothing")], capsys)
    assert code == 2
    assert "nothing" in message
    assert "Traceback" not in message


def test_a_bug_is_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    from glasslm.runs import run_folder

    def bug(name: str) -> Path:
        raise KeyError(name)

    monkeypatch.setattr(run_folder, "find_run", bug)
    with pytest.raises(KeyError):
        main(["resume", "x"])


# -- output ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def done(
    text: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, "subprocess.CompletedProcess[str]"]:
    run = tmp_path_factory.mktemp("runs") / "a run with spaces"
    return run, run_program(*train_command(text, run))


def test_train_prints_the_run_last_and_everything_else_to_stderr(done: tuple[Path, Any]) -> None:
    run, process = done
    assert process.returncode == 0, process.stderr
    lines = process.stdout.splitlines()
    assert lines[-1] == f"run: {run}"
    assert str(run / "report.html") in process.stdout
    assert "glasslm generate" in process.stdout
    assert "parameters" in process.stderr
    assert "val loss" in process.stderr
    assert (run / "report.html").is_file()


def test_the_recorded_command_can_be_given_again(done: tuple[Path, Any], text: Path) -> None:
    run, _ = done
    recorded = json.loads((run / "run.json").read_text(encoding="utf-8"))["command"]
    assert shlex.split(recorded) == ["glasslm", *train_command(text, run)]


def test_a_second_training_into_the_same_folder_exits_with_2(
    done: tuple[Path, Any], text: Path
) -> None:
    run, _ = done
    again = run_program(*train_command(text, run))
    assert again.returncode == 2
    assert "glasslm resume" in again.stderr
    assert "Traceback" not in again.stderr
    assert again.stdout == ""


def test_resume_of_a_finished_run_exits_with_2(
    done: tuple[Path, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    code, message = run_command(["resume", str(done[0])], capsys)
    assert code == 2
    assert "nothing left to do" in message


def test_damaged_files_exit_with_4(
    done: tuple[Path, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import shutil

    run = shutil.copytree(done[0], tmp_path / "run")
    for path in (run / "checkpoints").glob("*/model.safetensors"):
        path.write_bytes(path.read_bytes()[:-1])
    code, message = run_command(["generate", str(run), "--prompt", "the"], capsys)
    assert code == 4
    assert "model.safetensors" in message


def test_json_is_one_object_last(
    text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*train_command(text, tmp_path / "run", max_steps=5), "--json"]) == 0
    out, err = capsys.readouterr()
    facts = json.loads(out)
    assert facts["run"] == str(tmp_path / "run")
    assert facts["status"] == "finished"
    assert facts["best_step"] == 5
    assert 0 < facts["best_loss"] < 4
    assert Path(facts["report"]).is_file()
    assert "report" in err
    assert main(["evaluate", str(tmp_path / "run"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["loss"] == pytest.approx(facts["best_loss"])


def test_generate_writes_the_same_text_for_the_same_seed(
    done: tuple[Path, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    texts = []
    for seed in ("1", "1", "2"):
        words = [
            "generate",
            str(done[0]),
            "--prompt",
            "the ",
            "--max-new-tokens",
            "30",
            "--seed",
            seed,
        ]
        assert main(words) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] != texts[2]
    assert texts[0].startswith("the ")


def test_help_of_a_command_by_its_name(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["help", "train"])
    by_word = capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["train", "--help"])
    assert capsys.readouterr().out == by_word
    assert main(["help", "trian"]) == 2


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs POSIX signals")
@pytest.mark.parametrize(
    ("words", "expected"),
    [("tra", "train"), ("train --max-st", "--max-steps"), ("corpus --js", "--json --json-field")],
)
def test_bash_completes_commands_and_flags(
    words: str, expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--print-completion", "bash"]) == 0
    script = capsys.readouterr().out
    count = len(words.split())
    asked = f'COMP_WORDS=(glasslm {words}); COMP_CWORD={count}; _glasslm; echo "${{COMPREPLY[@]}}"'
    done = subprocess.run(["bash", "-c", script + asked], capture_output=True, text=True)
    assert done.stdout.split() == expected.split(), done.stderr


@pytest.mark.parametrize(
    ("command", "offered", "left_out"),
    [
        ("learn", "--exercise --budget --students --class-file", "--file"),
        ("generate", "--no-cache --json", "--cache --no-json"),
        ("look", "--no-browser", "--browser"),
        ("train", "--seq-len --block-size --qk-norm --no-qk-norm", "--no-json"),
        ("finetune", "--lora-rank --full", "--d-model --tokenizer --init-from --no-full"),
    ],
)
def test_completion_offers_the_flags_that_change_something(
    command: str, offered: str, left_out: str
) -> None:
    flags = set(list_flags(command))
    assert set(offered.split()) <= flags
    assert not set(left_out.split()) & flags


def test_there_is_completion_for_each_shell(capsys: pytest.CaptureFixture[str]) -> None:
    for shell in ("zsh", "fish"):
        assert main(["--print-completion", shell]) == 0
        assert "train" in capsys.readouterr().out
    assert main(["--print-completion", "tcsh"]) == 2
    assert "choose from bash, zsh, fish" in capsys.readouterr().err
