"""Flags: errors in one line, and no flag is overridden silently."""

import contextlib
import importlib
import io
import re
from dataclasses import dataclass, field, fields
from typing import Literal

import pytest
import tyro

import glasslm
from glasslm.cli import COMMANDS, ablate, chat, corpus, diagnose, finetune, generate, train
from glasslm.cli.parsing import choose_recipe, flag_value, parse
from glasslm.cli.validation import list_arguments
from glasslm.config.config_fields import MAY_BE_EMPTY
from glasslm.config.schema import (
    ALIASES,
    DataConfig,
    ModelConfig,
    OptimizerConfig,
    RunConfig,
    TrainConfig,
)
from glasslm.config.unused_flags import refuse_unread_settings
from glasslm.errors import InputError
from glasslm.training.fine_tuning import OVERRIDABLE_FIELDS


@dataclass(frozen=True)
class Flags:
    """Flags of each kind."""

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    mode: Literal["fast", "slow"] = "fast"
    stop: tyro.conf.UseAppendAction[tuple[str, ...]] = ()


def parse_words(*words: str) -> Flags:
    return parse(Flags, list(words), "glasslm try", "What it does.")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ("--lr fast", "--lr is 'fast': expected a number"),
        ("--n-layers 2.5", "--n-layers is '2.5': expected a whole number"),
        ("--n_layers=2.5", "--n_layers is '2.5': expected a whole number"),
        ("--mode slwo", "--mode is 'slwo': expected one of fast, slow"),
        ("--lr", "--lr has no value: expected a number"),
        ("--lr --mode fast", "--lr has no value: expected a number"),
        ("--lr=", "--lr is '': expected a number"),
        ("--betas 0.9", "--betas has 1 of its 2 values: give all of them after it"),
        ("--bias=1", "--bias takes no value: leave out =1"),
        ("--n-layer 2", "unknown flag --n-layer: did you mean --n-layers?"),
        ("--no-biass", "unknown flag --no-biass: did you mean --no-bias?"),
        ("-lr 2", "unknown flag -lr: did you mean --lr?"),
        (
            "--n-layer 2 --lrr 1",
            "unknown flags --n-layer and --lrr: did you mean --n-layers and --lr?",
        ),
        ("--xyzzy", "unknown flag --xyzzy: see glasslm try --help"),
        ("nothing", "'nothing' is not expected here: did you mean --text-file nothing?"),
        ("--max-steps 0", "max_steps is 0: expected at least 1"),
    ],
)
@pytest.mark.parametrize("columns", ["30", "200"])
def test_bad_words_are_refused_in_one_line(
    argv: str, message: str, columns: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    with pytest.raises(InputError) as caught:
        parse_words(*argv.split())
    assert str(caught.value) == message


def test_an_error_has_no_colours(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    with pytest.raises(InputError) as caught:
        parse_words("--lr", "fast")
    assert str(caught.value).isprintable()


def test_a_long_message_is_whole_and_one_line() -> None:
    with pytest.raises(InputError) as caught:
        parse_words("--d-model", "130")
    assert str(caught.value) == (
        "d_model is 130, which 4 heads do not divide: "
        "choose --d-model as a multiple of --n-heads, for example 128"
    )


@pytest.mark.parametrize(
    "argv",
    [
        "--lr 1 --lr 2",
        "--lr=1 --lr 2",
        "--n-layers 2 --n_layers 3",
        "--seq-len 64 --block-size 128",
        "--block_size=64 --seq_len=128",
        "--tie-embeddings --no-tie-embeddings",
        "--no-tie-embeddings --no_tie_embeddings",
    ],
)
def test_a_setting_given_twice_is_refused_however_it_is_written(argv: str) -> None:
    words = argv.split()
    with pytest.raises(InputError, match="give it once") as caught:
        parse_words(*words)
    for flag in (
        words[0].partition("=")[0],
        words[-2 if words[-1][0] != "-" else -1].partition("=")[0],
    ):
        assert flag in str(caught.value)


def test_repeatable_and_similar_flags_are_accepted() -> None:
    assert parse_words("--stop", "a", "--stop", "b").stop == ("a", "b")
    flags = parse_words(
        "--norm", "layernorm", "--norm-position", "post", "--seq-len", "64", "--no-bias"
    )
    assert (flags.model.norm, flags.model.block_size, flags.model.bias) == ("layernorm", 64, False)


@pytest.mark.parametrize("alias", ALIASES)
def test_every_alias_is_a_flag(alias: str) -> None:
    assert getattr(parse_words(f"--{alias.replace('_', '-')}", "7").model, ALIASES[alias]) == 7


def test_help_is_printed_and_ends_the_program(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_request:
        parse_words("--help")
    assert not exit_request.value.code
    assert "What it does." in capsys.readouterr().out


def test_flag_value_reads_one_flag() -> None:
    assert flag_value("--preset", ["--lr", "1", "--preset", "small"], "tiny") == "small"
    assert flag_value("--preset", ["--preset=small"], "tiny") == "small"
    assert flag_value("--preset", ["--preset"], "tiny") == "tiny"


def test_max_time_chooses_the_recipe_for_the_command_and_for_the_call() -> None:
    for argv, preset, d_model in (
        ([], "quick", 96),
        (["--max-time=1h", "--lr", "1e-3"], "quick", 128),
        (["--max-time", "1h", "--preset", "tiny"], "tiny", 128),
        (["--max-time", "1h", "--seq_len", "64"], "quick", 96),
        (["--max-time", "1h", "--no-qk-norm"], "quick", 128),
    ):
        flags = train.parse(argv)
        assert (choose_recipe(argv).preset, flags.preset) == (preset, preset)
        assert flags.model.d_model == d_model
        assert diagnose.parse(argv).config == flags.config
        assert flags.model.qk_norm == (preset != "tiny" and "--no-qk-norm" not in argv)
    name, config = glasslm._default_config(None, {"max_time": "1h"})
    assert (name, config) == ("quick", choose_recipe(["--max-time", "1h"]).config)
    assert config.model.d_model == 128
    _, config = glasslm._default_config(None, {"max_time": "1h", "seq_len": 64})
    assert config.model.d_model == 96


def test_a_preset_beside_a_base_is_refused_by_the_call_as_by_the_command() -> None:
    with pytest.raises(InputError, match="both preset and init_from"):
        glasslm.train(preset="tiny", init_from="runs/none")


@pytest.mark.parametrize(
    ("flags_class", "flag"),
    [
        (train.Flags, "--preset"),
        (train.Flags, "--init-from"),
        (train.Flags, "--ops"),
        (train.Flags, "--run-dir"),
        (finetune.Flags, "--preferences"),
        (finetune.Flags, "--study"),
        (train.Flags, "--document-separator"),
        (ablate.Flags, "--rates"),
        (ablate.Flags, "--columns"),
        (ablate.Flags, "--against"),
        (ablate.Flags, "--address"),
        (diagnose.Flags, "--out"),
        (chat.Flags, "--server"),
        (chat.Flags, "--api-key"),
    ],
)
def test_an_empty_word_is_not_a_flag_that_was_left_out(flags_class: type, flag: str) -> None:
    words = ["RUN"] * (flags_class in (finetune.Flags, chat.Flags))
    with pytest.raises(InputError, match=f"^{flag} is empty: give it a value, or leave it out$"):
        parse(flags_class, [*words, flag, ""], "glasslm", "")


def test_an_empty_argument_has_no_value_to_leave_out() -> None:
    with pytest.raises(InputError, match=r"^RUN is empty: give it a value$"):
        parse(finetune.Flags, [""], "glasslm", "")


@pytest.mark.parametrize("flag", sorted(MAY_BE_EMPTY))
def test_an_empty_text_that_says_something_is_accepted(flag: str) -> None:
    classes = (train.Flags, generate.Flags, chat.Flags)
    arguments = [argument for each in classes for argument in list_arguments(each)]
    next(argument for argument in arguments if argument.name == flag).check("", flag)


@pytest.mark.parametrize("name", ["preset", "run_dir", "init_from", "preferences", "tokenizer"])
def test_an_empty_value_is_refused_by_the_call_too(name: str) -> None:
    with pytest.raises(InputError, match=f"^{name} is empty: give it a value, or leave it out$"):
        glasslm.train(**{"text_file": "book.txt", name: ""})
    with pytest.raises(InputError, match=r"book\.txt"):  # the default of a field, and no such file
        glasslm.train(text_file="book.txt", document_separator=DataConfig.document_separator)


@pytest.mark.parametrize(
    ("flags_class", "argv", "message"),
    [
        (ablate.Flags, "--axes norm --max-results 9", "--max-results needs --corpus arxiv"),
        (train.Flags, "--corpus python --category hep-th", "--category needs --corpus arxiv"),
        (train.Flags, "--max-results 9", "--max-results needs --corpus arxiv"),
        (
            train.Flags,
            "--init-from RUN --tokenizer bpe --vocab-size 300",
            "no effect on the tokenizer of RUN",
        ),
        (finetune.Flags, "RUN --preferences P --kl 0.9", "--kl needs --reward"),
        (finetune.Flags, "RUN --preferences P --group-size 7", "--group-size needs --reward"),
        (finetune.Flags, "RUN --text-file T --answer-tokens 7", "--answer-tokens needs --reward"),
        (finetune.Flags, "RUN --reward names --beta 0.2", "--beta needs --preferences"),
        (train.Flags, "--lora-alpha 32", "--lora-alpha needs --lora-rank"),
        (train.Flags, "--experts-per-token 1", "--experts-per-token needs --n-experts"),
        (train.Flags, "--router-z-loss 0.1", "--router-z-loss needs --n-experts"),
        (train.Flags, "--position alibi --rope-base 500", "--rope-base needs --position rope"),
        (
            train.Flags,
            "--rope-scaling ntk --rope-factor 2 --rope-original-context 64",
            "--rope-original-context needs --rope-scaling dynamic, yarn or llama3",
        ),
        (
            train.Flags,
            "--rope-scaling llama3 --rope-factor 2 --rope-attention-factor 2",
            "--rope-attention-factor needs --rope-scaling yarn",
        ),
        (diagnose.Flags, "--lora-targets q", "--lora-targets needs --lora-rank"),
        (train.Flags, "--lora-rank 2 --lora-alpha 32 --lora-targets q", ""),
        (train.Flags, "--n-experts 4 --experts-per-token 1 --balance-loss 0", ""),
        (train.Flags, "--rope-base 500 --rope-scaling yarn --rope-factor 2", ""),
        (train.Flags, "--lora-alpha 16 --experts-per-token 2 --rope-low-rotations 1", ""),
        (ablate.Flags, "--experts-per-token 1 --axes n_experts=2/4", ""),
        (train.Flags, "--tokenizer bpe --vocab-size 300", ""),
        (train.Flags, "--corpus arxiv --category hep-th --max-results 9", ""),
        (finetune.Flags, "RUN --preferences P --beta 0.2", ""),
        (finetune.Flags, "RUN --reward names --kl 0.9 --group-size 7 --answer-tokens 7", ""),
    ],
)
def test_a_flag_without_effect_is_refused(flags_class: type, argv: str, message: str) -> None:
    with pytest.raises(InputError, match=message) if message else contextlib.nullcontext():
        parse(flags_class, argv.split(), "glasslm", "")


def test_a_study_may_give_what_one_of_its_runs_reads() -> None:
    base = RunConfig(model=ModelConfig(experts_per_token=1))
    mixture = RunConfig(model=ModelConfig(n_experts=4, experts_per_token=1))
    refuse_unread_settings({"experts_per_token"}, [base, mixture])
    with pytest.raises(InputError, match="--experts-per-token needs --n-experts"):
        refuse_unread_settings({"experts_per_token"}, [base, base])


def test_a_vocabulary_size_without_effect_is_a_note(capsys: pytest.CaptureFixture[str]) -> None:
    for words, tokenizer in (("", "char"), ("--tokenizer gpt2", "gpt2"), ("--tokenizer bpe", "")):
        parse(train.Flags, ["--vocab-size", "300", *words.split()], "glasslm train", "")
        note = f"--vocab-size has no effect: the tokenizer {tokenizer} sets its own size"
        assert (note in capsys.readouterr().err) == bool(tokenizer)


def test_a_setting_without_effect_is_refused_by_the_call_too() -> None:
    with pytest.raises(InputError, match="--max-results needs --corpus arxiv"):
        glasslm.train(text_file="book.txt", max_results=9)
    with pytest.raises(InputError, match="--lora-alpha needs --lora-rank"):
        glasslm.train(text_file="book.txt", lora_alpha=2)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ("shakespeare --corpus python", "both shakespeare and --corpus python were given"),
        ("python --category hep-th", "--category needs --corpus arxiv"),
        ("shakespeare --text-file x", "both the corpus shakespeare and --text-file were given"),
        ("task:copy --corpus python", "--corpus was given twice"),
    ],
)
def test_a_corpus_is_named_once(argv: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        corpus.main(["inspect", *argv.split()])


@pytest.mark.parametrize(
    "argv",
    ["task:copy --task-size 3", "--task-size 3 task:copy", "--task-size 3 --json task:copy",
     "--task-size 3 --corpus task:copy"],
)  # fmt: skip
def test_a_task_is_named_before_or_after_its_flags(
    argv: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert corpus.main(["inspect", "--task-examples", "40", *argv.split()]) == 0
    assert "task:copy" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ("--study rank --lora-rank 4", "--study rank tries several values of --lora-rank"),
        ("--study targets --lora-targets q,v", "--study targets tries several values"),
        ("--study rank --json", "--json prints one run"),
    ],
)
def test_a_study_refuses_what_it_varies_or_does_not_print(argv: str, message: str) -> None:
    words = ["RUN", "--text-file", "new.txt", *argv.split()]
    flags = parse(finetune.Flags, words, "glasslm finetune", "")
    with pytest.raises(InputError, match=message):
        finetune._require_study_flags(flags, words)


def test_a_forgotten_path_is_refused() -> None:
    for argv in (["--text-file"], ["--text-file", "--lr", "1e-3"]):
        with pytest.raises(InputError, match="--text-file has no value"):
            parse(Flags, argv, "glasslm train", "")


def test_negative_numbers_and_words_after_flags_are_values() -> None:
    with pytest.raises(InputError, match=r"lr is -0\.1"):
        parse_words("--lr", "-0.1")
    with pytest.raises(InputError, match="lr is -inf"):
        parse_words("--lr", "-inf")
    assert parse_words("--betas", "0.5", "0.6", "--stop=--x").stop == ("--x",)


@pytest.mark.parametrize("name", COMMANDS)
def test_checks_know_the_flags_that_help_shows(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise a flag of a command would be refused as unknown."""
    module = importlib.import_module(f"glasslm.cli.{name}")
    for flags_class in (value for key, value in vars(module).items() if key.endswith("Flags")):
        arguments = list_arguments(flags_class)
        text = io.StringIO()
        monkeypatch.setenv("COLUMNS", "80")
        with contextlib.redirect_stdout(text), pytest.raises(SystemExit):
            parse(flags_class, ["--help-all"], "glasslm", "")
        shown = set(re.findall(r"^\W{2}(--[a-z][\w-]*)", text.getvalue(), re.MULTILINE))
        labels = {argument.label for argument in arguments if not argument.is_positional}
        hidden = getattr(flags_class, "hidden_fields", ())
        assert shown == labels - {f"--{name.replace('_', '-')}" for name in hidden}


@pytest.mark.parametrize(
    ("argv", "defaults"),
    [
        ([], {"lora_rank": "8", "max_steps": "300", "warmup_steps": "20", "corpus": "none"}),
        (["--full"], {"lora_rank": "0", "lr": "0.003", "eval_interval": "50"}),
        (["--reward", "names"], {"max_steps": "200", "dropout": "0", "text_file": "that of RUN"}),
    ],
)
def test_the_help_of_finetune_has_the_defaults_of_its_recipe(
    argv: list[str], defaults: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        finetune.parse([*argv, "--help-all"])
    text = capsys.readouterr().out
    expected = {"optimizer": "adamw", "window": "that of RUN", "seed": "that of RUN"}
    for name, default in (expected | defaults).items():
        flag = f"^  --{name.replace('_', '-')} "
        shown = re.search(rf"{flag}.*?\(default:\s(.*?)\)", text, re.MULTILINE | re.DOTALL)
        assert shown is not None, name
        assert " ".join(shown[1].split()) == default, name
    for flag in ("--d-model", "--bias", "--tokenizer", "--init-from"):
        assert f"\n  {flag} " not in text


def test_the_fields_that_finetune_hides_are_those_that_must_be_of_the_run() -> None:
    assert not finetune.FIXED_FIELDS & OVERRIDABLE_FIELDS
    parts = (ModelConfig, DataConfig, TrainConfig)
    assert {item.name for part in parts for item in fields(part)} >= finetune.FIXED_FIELDS


@pytest.mark.parametrize(
    ("flag", "suggestion"),
    [
        ("--activation", "--feedforward"),
        ("--learning-rate", "--lr"),
        ("--learning_rate=1e-3", "--lr"),
        ("--hidden-size", "--d-model"),
        ("--n-embd", "--d-model"),
        ("--num-hidden-layers", "--n-layers"),
        ("--steps", "--max-steps"),
        ("--context-length", "--block-size"),
        ("--max-tokens", "--max-new-tokens"),
    ],
)
def test_a_word_of_another_program_leads_to_the_flag(flag: str, suggestion: str) -> None:
    command = "generate" if suggestion == "--max-new-tokens" else "train"
    flags_class = importlib.import_module(f"glasslm.cli.{command}").Flags
    expected = f"unknown flag {flag.partition('=')[0]}: did you mean {suggestion}?"
    with pytest.raises(InputError) as error:
        parse(flags_class, [*(["RUN"] * (command == "generate")), flag, "1"], "glasslm", "")
    assert str(error.value) == expected


def test_a_text_without_its_flag_leads_to_it() -> None:
    with pytest.raises(InputError, match=r"did you mean --text-file book\.txt\?"):
        parse(Flags, ["book.txt", "--lr", "1"], "glasslm train", "")


def test_the_short_help_of_train_fits_two_screens(capsys: pytest.CaptureFixture[str]) -> None:
    lines = {}
    for flag in ("--help", "--help-all"):
        with pytest.raises(SystemExit):
            parse(Flags, [flag], "glasslm train", "")
        lines[flag] = capsys.readouterr().out.splitlines()
    assert len(lines["--help"]) < 110 < len(lines["--help-all"])
    assert "glasslm train --help-all" in lines["--help"][-1]
    assert set(lines["--help"][:-1]) <= set(lines["--help-all"])
    assert all(len(line) <= 80 for line in lines["--help-all"] if not line.endswith(":"))
