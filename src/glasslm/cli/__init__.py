"""The command line: one small module a command, each parsing its flags and calling one function."""

from __future__ import annotations

import importlib
import os
import sys
import warnings
from contextlib import nullcontext
from typing import TextIO

from glasslm.cli.termination import exit_on_sigterm
from glasslm.errors import GlasslmError
from glasslm.text import notify, suggest_name

COMMAND_GROUPS = {
    "Train": {
        "train": "train a model on text",
        "finetune": "continue a trained model on other text, with adapters or without",
        "merge": "merge adapters into the weights",
        "resume": "continue an interrupted run from its latest checkpoint",
    },
    "Use": {
        "generate": "generate text with a trained model",
        "evaluate": "loss, perplexity and bits per byte on a text",
        "corpus": "list, download or inspect training text",
    },
    "Understand": {
        "report": "write the report of a run again",
        "diagnose": "find faults of a run, a configuration or a loss curve",
        "compare": "compare runs: settings, results, loss curves",
        "check": "check the gradients against finite differences and PyTorch",
        "verify": "check the files of a run, and that it resumes exactly",
        "reproduce": "train a run again from its record and compare the two",
    },
    "Experiment": {
        "ablate": "measure the effect of each design choice over several seeds",
        "scale": "fit a scaling law, and plan the size and tokens for a compute",
        "capstone": "a course project: model, ablation, scaling study, questions",
    },
    "Exchange": {
        "export": "export a model to transformers, llama.cpp or PEFT",
        "import": "import a model folder of transformers as a run",
    },
}
COMMANDS = {name: text for group in COMMAND_GROUPS.values() for name, text in group.items()}

# Commands that finish early, with exit code 0, when the reader of their output (head, less) closes.
COMMANDS_THAT_PRINT = {
    "generate", "evaluate", "corpus", "report", "diagnose", "compare", "verify", "scale",
}  # fmt: skip
COMMANDS_THAT_CLEAN_UP = ("export", "import", "merge")  # of a temporary model, on SIGTERM
COMMANDS_UNDER_TORCHRUN = ("train", "finetune", "resume")


def main(argv: list[str] | None = None) -> int:
    """Run one command. Returns its exit code (errors.py): 2 for bad input, without a traceback."""
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0] in ("-h", "--help"):
        print(_format_help())
        return 0
    if argv[0] == "help" and len(argv) == 2:
        argv = [argv[1], "--help"]
    if argv[0] in ("-V", "--version"):
        from importlib.metadata import version

        print(f"glasslm {version('glasslm')}")
        return 0
    if argv[0] == "--print-completion":
        return _print_completion(argv[1:])
    if argv[0] not in COMMANDS:
        hint = suggest_name(argv[0], COMMANDS)
        notify(f"glasslm: there is no command '{argv[0]}'{hint}\n\n{_format_help()}")
        return 2
    for stream in (sys.stdout, sys.stderr):  # a model may write what the terminal's encoding lacks
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
    # The NumPy engine has its own threads and limits BLAS to one, which saves starting the others.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    # The training loop reports a run that diverges; NumPy's warnings would repeat it.
    warnings.filterwarnings("ignore", category=RuntimeWarning, module=r"glasslm\.engines")
    return _run_and_report_errors(argv)


def _print_completion(shells: list[str]) -> int:
    from glasslm.cli.completion import format_completion

    try:
        print(format_completion(shells[0] if shells else "", COMMANDS))
    except GlasslmError as error:
        notify(f"glasslm: {error}")
        return error.exit_code
    return 0


def _run_and_report_errors(argv: list[str]) -> int:
    try:
        is_distributed = "WORLD_SIZE" in os.environ and not {"-h", "--help"} & set(argv)
        if argv[0] in COMMANDS_UNDER_TORCHRUN and is_distributed:
            return _run_in_group(argv)
        return _run_command(argv)
    except GlasslmError as error:
        notify(f"glasslm {argv[0]}: {error}")
        return error.exit_code
    except MemoryError:
        notify(
            f"glasslm {argv[0]}: out of memory: close other programs, or choose a smaller model or "
            "less text at once"
        )
        return 6
    except KeyboardInterrupt:  # a training run catches it first and saves a checkpoint
        notify(f"\nglasslm {argv[0]}: interrupted")
        return 130
    except BrokenPipeError:
        if argv[0] in COMMANDS_THAT_PRINT:
            return 0
        notify(f"glasslm {argv[0]}: its output was closed before the end")
        return 1
    finally:
        for stream in (sys.stdout, sys.stderr):
            _flush_or_discard(stream)


def _run_command(argv: list[str]) -> int:
    cleans_up = argv[0] in COMMANDS_THAT_CLEAN_UP
    with exit_on_sigterm() if cleans_up else nullcontext():
        exit_code: int = importlib.import_module(f"glasslm.cli.{argv[0]}").main(argv[1:])
    return exit_code


def _run_in_group(argv: list[str]) -> int:
    """Run as one of torchrun's processes: rank 0 runs the command, the others compute with it."""
    from glasslm.engines.resources import count_ranks, is_torch_installed

    if count_ranks() == 1 or not is_torch_installed():
        return _run_command(argv)
    from glasslm.engines.torch import distributed

    if int(os.environ["RANK"]) > 0:
        return distributed.follow_leader()
    try:
        return _run_command(argv)
    finally:
        distributed.release_workers()


def _flush_or_discard(stream: TextIO | None) -> None:
    """Flush a stream. A closed one is redirected, or Python would fail again at its exit."""
    if stream is None:  # closed before the program started
        return
    try:
        stream.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


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
