"""The command line: one small module a command, each parsing its flags and calling one function."""

from __future__ import annotations

import difflib
import importlib
import os
import sys
import warnings
from typing import TextIO

from glasslm.errors import GlasslmError
from glasslm.text import tell

COMMANDS = {
    "train": "train a model from raw text",
    "finetune": "go on from a trained model with other text",
    "merge": "make one model of weights and adapters",
    "resume": "go on with an interrupted run, exactly where it stopped",
    "generate": "let a trained model write",
    "evaluate": "loss, perplexity and bits per byte on any text",
    "check": "hand-written gradients against finite differences and PyTorch",
    "diagnose": "what is wrong with a run, a model or a loss curve, and what to do",
    "compare": "runs side by side: what differs, and what came of it",
    "reproduce": "train a run again from its record, and compare",
    "verify": "whether a run folder is whole, and whether it resumes to the bit",
    "ablate": "what each choice of a model is worth, over several seeds",
    "scale": "a scaling law fitted to runs, and what to train with a given compute",
    "capstone": "a whole capstone: a model, an ablation, a scaling study, the questions",
    "export": "take a model to transformers, llama.cpp or PEFT",
    "import": "bring in a model folder of transformers as a run",
    "corpus": "list, get or inspect text to train on",
    "report": "make a run's report.html again",
}

# Done when the reader of their output (head, less) is.
WRITERS = {"generate", "evaluate", "corpus", "report", "diagnose", "compare", "verify", "scale"}


def main(argv: list[str] | None = None) -> int:
    """Run one command and return its exit code: 2 for bad input, others in errors.py, without a traceback."""
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0] in ("-h", "--help"):
        print(_help())
        return 0
    if argv[0] in ("-V", "--version"):
        from importlib.metadata import version

        print(f"glasslm {version('glasslm')}")
        return 0
    if argv[0] not in COMMANDS:
        close = difflib.get_close_matches(argv[0], COMMANDS, n=1)
        hint = f": did you mean '{close[0]}'?" if close else ""
        print(f"glasslm: there is no command '{argv[0]}'{hint}\n\n{_help()}", file=sys.stderr)
        return 2
    for stream in (sys.stdout, sys.stderr):  # a model may write what the terminal's encoding lacks
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
    # The NumPy engine has threads of its own and holds BLAS to one; telling BLAS so before it starts spares the rest.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    # A run that diverges says so in its own words.
    warnings.filterwarnings("ignore", category=RuntimeWarning, module=r"glasslm\.engines")
    try:
        if (
            argv[0] in ("train", "finetune", "resume")
            and "WORLD_SIZE" in os.environ
            and not {"-h", "--help"} & set(argv)
        ):
            return _in_a_group(argv)
        return _command(argv)
    except GlasslmError as error:
        tell(f"glasslm {argv[0]}: {error}")
        return error.exit_code
    except MemoryError:
        tell(
            f"glasslm {argv[0]}: out of memory: close other programs, or choose a smaller model or less text at once"
        )
        return 6
    except (
        KeyboardInterrupt
    ):  # where there is nothing to save; a run under way saves first (training.py)
        tell(f"\nglasslm {argv[0]}: interrupted")
        return 130
    except BrokenPipeError:
        if argv[0] in WRITERS:
            return 0
        tell(f"glasslm {argv[0]}: its output was closed before the end")
        return 1
    finally:
        for stream in (sys.stdout, sys.stderr):
            _let_go(stream)


def _command(argv: list[str]) -> int:
    result: int = importlib.import_module(f"glasslm.cli.{argv[0]}").main(argv[1:])
    return result


def _in_a_group(argv: list[str]) -> int:
    """As one of torchrun's processes: the first runs the command, the others help it compute."""
    from glasslm.engines.choice import ranks, torch_installed

    if ranks() == 1 or not torch_installed():
        return _command(argv)
    from glasslm.engines.torch import distributed

    if int(os.environ["RANK"]) > 0:
        return distributed.follow()
    try:
        return _command(argv)
    finally:
        distributed.dismiss()


def _let_go(stream: TextIO | None) -> None:
    """Send what nobody reads any more to nowhere, or Python would fail to write it once more when it exits."""
    if stream is None:  # it was closed from the start
        return
    try:
        stream.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _help() -> str:
    rows = "\n".join(f"  {name:<10} {text}" for name, text in COMMANDS.items())
    return (
        "glasslm: train, see through and trust a small language model.\n\n"
        f"usage: glasslm COMMAND [FLAGS]\n\n{rows}\n\n"
        "Each command has help with an example: glasslm COMMAND --help\n"
        "Start with: glasslm train"
    )
