"""The command line: one small module a command, each parsing its flags and calling one function."""

from __future__ import annotations

import importlib
import os
import signal
import sys
import warnings

from glasslm.cli import streams
from glasslm.cli.streams import discard_output, open_standard_streams
from glasslm.errors import (
    DISK_FULL_ERRNOS,
    EXHAUSTED_ERRNOS,
    ExhaustedError,
    GlasslmError,
    GroupError,
    InputError,
    explain_exhaustion,
    explain_system_errors,
)
from glasslm.text import notify, suggest_name, to_one_line
from glasslm.training.interruption import raise_on_signals, signal_number

COMMAND_GROUPS = {
    "Train": {
        "train": "train a model on text",
        "finetune": "continue a trained model on other text, with adapters or without",
        "merge": "merge adapters into the weights",
        "resume": "continue an interrupted run from its latest checkpoint",
    },
    "Use": {
        "generate": "generate text with a trained model",
        "chat": "talk to a model that was fine-tuned on conversations",
        "evaluate": "loss, perplexity and bits per byte on a text",
        "serve": "serve trained models over HTTP, with OpenAI's API",
        "corpus": "list, download or inspect training text",
    },
    "Understand": {
        "look": "see inside a model: a page that shows how it reads and writes",
        "report": "write the report of a run or a study again",
        "diagnose": "find faults of a run, a configuration or a loss curve",
        "compare": "compare runs: settings, results, loss curves",
        "check": "check the gradients against finite differences and PyTorch",
        "verify": "check the files of a run, and that it resumes exactly",
        "reproduce": "train a run again from its record and compare the two",
    },
    "Experiment": {
        "ablate": "measure the effect of each design choice over several seeds",
        "try": "accept or reject a change, by paired seeds and one ledger",
        "scale": "fit a scaling law, and plan the size and tokens for a compute",
        "capstone": "a course project: model, ablation, scaling study, questions",
    },
    "Learn": {
        "learn": "write operations by hand, and be told what is wrong with them",
    },
    "Exchange": {
        "export": "export a model to transformers, llama.cpp or PEFT",
        "import": "import a model folder of transformers as a run",
    },
}
COMMANDS = {name: text for group in COMMAND_GROUPS.values() for name, text in group.items()}

# Commands that finish early, with exit code 0, when the reader of their output (head, less) closes.
COMMANDS_THAT_PRINT = {
    "generate", "chat", "evaluate", "corpus", "report", "diagnose", "compare", "verify", "scale",
    "learn",
}  # fmt: skip
COMMANDS_UNDER_TORCHRUN = ("train", "finetune", "resume")


def main(argv: list[str] | None = None) -> int:
    """Run one command. Returns its exit code (errors.py): 2 for bad input, without a traceback.

    Without `argv` this is the program: it takes the standard streams as they are, and after an
    interruption it ends at once, whatever its threads still do.
    """
    if argv is not None:
        return _run_and_report_errors(argv)
    open_standard_streams()
    exit_code = _run_and_report_errors(sys.argv[1:])
    if exit_code > 128:
        os._exit(exit_code)  # a thread may be in a library call that does not return
    return exit_code


def _run_and_report_errors(argv: list[str]) -> int:
    program = f"glasslm {to_one_line(argv[0])}" if argv and argv[0] in COMMANDS else "glasslm"
    try:
        with raise_on_signals():
            exit_code = _run(argv)
            sys.stdout.flush()
        return exit_code
    except GlasslmError as error:
        notify(f"{program}: {error}")
        return error.exit_code
    except MemoryError:
        return _report_no_memory(program)
    except RuntimeError as error:
        if "can't start new thread" not in str(error):
            raise
        return _report_no_memory(program)
    except KeyboardInterrupt as interrupt:  # a training run catches it first and saves a checkpoint
        number = signal_number(interrupt)
        name = "interrupted" if number == signal.SIGINT else signal.Signals(number).name
        notify(f"\n{program}: {name}")
        return 128 + number
    except OSError as error:
        return _report_system_error(error, program, argv)
    finally:
        discard_output()


def _report_no_memory(program: str) -> int:
    notify(
        f"{program}: out of memory: close other programs, or choose a smaller model or less "
        "text at once"
    )
    return ExhaustedError.exit_code


def _report_system_error(error: OSError, program: str, argv: list[str]) -> int:
    """Tell what the system refused; returns the exit code."""
    refused = streams.output_error()
    if isinstance(error, BrokenPipeError) or isinstance(refused, BrokenPipeError):
        is_help = bool({"-h", "--help", "--help-all"} & set(argv))
        if is_help or not argv or argv[0] in COMMANDS_THAT_PRINT or argv[0] not in COMMANDS:
            return 0
        notify(f"{program}: its output was closed before the end")
        return 1
    if refused is not None:
        notify(f"{program}: standard output cannot be written ({refused.strerror})")
        return 6 if refused.errno in DISK_FULL_ERRNOS else 1
    if error.filename is None and error.errno in DISK_FULL_ERRNOS:
        notify(f"{program}: no room to write its output ({error.strerror}): free some space")
        return 6
    if error.errno in EXHAUSTED_ERRNOS:
        notify(
            f"{program}: {explain_exhaustion(error, to_one_line(str(error.filename or 'a file')))}"
        )
        return ExhaustedError.exit_code
    names = [os.fsdecode(name) for name in (error.filename, error.filename2) if name is not None]
    where = ", ".join(to_one_line(str(name)) for name in names)
    cure = f": check {where}" if where else ""
    notify(f"{program}: {to_one_line(error.strerror or str(error))}{cure}")
    return InputError.exit_code


def _run(argv: list[str]) -> int:
    """Run a command, or show the help, the version or the completion."""
    if not argv or argv[0] in ("-h", "--help", "--help-all") or argv == ["help"]:
        print(_format_help())
        return 0
    if argv[0] == "help" and len(argv) == 2:
        argv = [argv[1], "--help"]
    if argv[0] in ("-V", "--version"):
        from importlib.metadata import version

        print(f"glasslm {version('glasslm')}")
        return 0
    if argv[0] == "--print-completion":
        from glasslm.cli.completion import format_completion

        print(format_completion(argv[1] if len(argv) > 1 else "", COMMANDS))
        return 0
    if argv[0] not in COMMANDS:
        hint = suggest_name(argv[0], COMMANDS)
        notify(f"glasslm: there is no command '{argv[0]}'{hint}\n\n{_format_help()}")
        return 2
    _require_readable_names(argv)
    for stream in (sys.stdout, sys.stderr):  # a model may write what the terminal's encoding lacks
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
    # The NumPy engine has its own threads and limits BLAS to one, which saves starting the others.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    # The training loop reports a run that diverges; NumPy's warnings would repeat it.
    warnings.filterwarnings("ignore", category=RuntimeWarning, module=r"glasslm\.engines")
    try:
        is_distributed = "WORLD_SIZE" in os.environ and not {"-h", "--help"} & set(argv)
        if argv[0] in COMMANDS_UNDER_TORCHRUN and is_distributed:
            return _run_in_group(argv)
        return _run_command(argv)
    except SystemExit:  # the help of a command
        sys.stdout.flush()
        raise


def _require_readable_names(argv: list[str]) -> None:
    """Raise InputError where an argument or the working folder cannot be the name of a file."""
    for position, word in enumerate(argv):
        if "\0" in word:
            raise InputError(f"argument {position} holds a NUL character: leave it out")
        if surrogate := next((c for c in word if "\ud800" <= c <= "\udfff"), ""):
            raise InputError(
                f"argument {position} is not UTF-8 (lone surrogate U+{ord(surrogate):04X} at "
                f"character {word.index(surrogate)} of '{to_one_line(word)}'): rename the file, "
                "or write it in UTF-8"
            )
    with explain_system_errors(
        "the working folder",
        lambda why: InputError(
            f"the working folder cannot be used ({why}): change to another one with cd"
        ),
    ):
        folder = os.getcwd()
    if any("\ud800" <= character <= "\udfff" for character in folder):
        raise InputError(
            f"the name of the working folder is not UTF-8: {to_one_line(folder)}. Rename it"
        )


def _run_command(argv: list[str]) -> int:
    exit_code: int = importlib.import_module(f"glasslm.cli.{argv[0]}").main(argv[1:])
    return exit_code


def _run_in_group(argv: list[str]) -> int:
    """Run as one of torchrun's processes: rank 0 runs the command, the others compute with it."""
    from glasslm.engines.resources import count_ranks, is_torch_installed

    if count_ranks() == 1 or not is_torch_installed():
        return _run_command(argv)
    from glasslm.engines.torch import distributed

    try:
        if int(os.environ["RANK"]) > 0:
            return distributed.follow_leader()
        try:
            return _run_command(argv)
        finally:
            distributed.release_workers()
    except GroupError as error:
        notify(f"glasslm {argv[0]}: {error}")
        discard_output()
        # The error keeps objects of the group alive. Their destructors wait for ranks that hang.
        os._exit(error.exit_code)


def _format_help() -> str:
    groups = "\n\n".join(
        "\n".join([f"{title}:", *(f"  {name:<10} {text}" for name, text in group.items())])
        for title, group in COMMAND_GROUPS.items()
    )
    return (
        "glasslm: train, inspect and test a small language model.\n\n"
        f"usage: glasslm COMMAND [FLAGS]\n\n{groups}\n\n"
        "Each command has help with an example: glasslm COMMAND --help (all flags: --help-all)\n"
        "Start with: glasslm train"
    )
