"""glasslm chat: a conversation with a model in the terminal or through pipes."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from signal import SIGINT
from typing import Annotated

import tyro

from glasslm import files
from glasslm.cli.flag_groups import CheckpointFlag, RunOpsFlag
from glasslm.cli.parsing import parse
from glasslm.config.config_fields import optional_flag
from glasslm.config.schema import DeviceConfig
from glasslm.errors import InputError, explain_system_errors
from glasslm.inference.chat_session import (
    AnswerSource,
    ChatSession,
    LocalAnswers,
    read_chat_template,
)
from glasslm.inference.context_config import ContextConfig
from glasslm.inference.sampling import Sampling
from glasslm.text import escape_control_chars, notify, plural, suggest_name
from glasslm.training.interruption import signal_number

DESCRIPTION = """Talk to a model that was fine-tuned on conversations.

Examples:
  glasslm chat RUN
  echo "What is 12 plus 7?" | glasslm chat RUN --temperature 0
  glasslm chat RUN --server http://127.0.0.1:8000

Each line is a turn. Ctrl-C stops an answer. /help lists the commands."""

COMMANDS = {
    "/help": "list the commands",
    "/quit": "end, as Ctrl-D does",
    "/reset": "forget the conversation",
    "/retry": "another answer to the last question",
    "/save FILE": "write the conversation as a line of JSON, which finetune --chat reads",
    "/system TEXT": "set the message of the system and forget the conversation",
}


@dataclass(frozen=True)
class Flags:
    """The model, and how its answers are sampled."""

    run: Annotated[
        tyro.conf.Positional[str],
        tyro.conf.arg(
            metavar="RUN",
            help="Folder of a run, or its name under ./runs; with --server the name of a model.",
        ),
    ]
    server: Annotated[str, optional_flag("URL", "none: the model is loaded here")] = ""
    """Ask a running `glasslm serve`, or another server with OpenAI's API."""
    api_key: Annotated[str, optional_flag("KEY", "none")] = ""
    """Key of the server."""
    system: Annotated[str, optional_flag("TEXT", "none")] = ""
    """Message of the system, which stands before the conversation."""
    max_new_tokens: int = 200
    """Largest number of tokens of an answer."""
    sampling: tyro.conf.OmitArgPrefixes[Sampling] = field(default_factory=Sampling)
    checkpoint: CheckpointFlag = "best"
    ops: RunOpsFlag = ""
    reading: tyro.conf.OmitArgPrefixes[ContextConfig] = field(default_factory=ContextConfig)
    compute: tyro.conf.OmitArgPrefixes[DeviceConfig] = field(default_factory=DeviceConfig)
    json: bool = False
    """Print one JSON object for each turn: question, answer, and the error of one that failed."""


def main(argv: list[str]) -> int:
    flags = parse(Flags, argv, "glasslm chat", DESCRIPTION)
    if flags.max_new_tokens < 1:
        raise InputError(f"--max-new-tokens is {flags.max_new_tokens}: expected 1 or more")
    _refuse_unused_flags(flags)
    session = ChatSession(_open_source(flags), flags.sampling.seed, notify)
    session.system = flags.system
    exit_code = 0
    for line in _read_lines():
        if not line.strip():
            continue
        try:
            if line.startswith("/"):
                if not _run_command(session, line, flags.json):
                    break
            else:
                _print_answer(line, partial(session.ask, line), flags.json)
        except InputError as error:  # of one turn
            notify(f"glasslm chat: {error}")
            exit_code = error.exit_code
    return 0 if _is_terminal() else exit_code


def _refuse_unused_flags(flags: Flags) -> None:
    """Raise InputError for a flag that would change nothing."""
    if not flags.server:
        if flags.api_key:
            raise InputError("--api-key is for a server: give --server URL, or leave it out")
        return
    defaults, given = (
        {"checkpoint": each.checkpoint, "ops": each.ops, **vars(each.reading), **vars(each.compute)}
        for each in (Flags(flags.run), flags)
    )
    unused = [f"--{name.replace('_', '-')}" for name in given if given[name] != defaults[name]]
    if unused:
        raise InputError(
            f"{', '.join(unused)} would change nothing, because a server answers with the model "
            "that it has loaded: leave this out with --server"
        )


def _is_terminal() -> bool:
    """Whether a person types the lines."""
    return sys.stdin is not None and sys.stdin.isatty()


def _open_source(flags: Flags) -> AnswerSource:
    """What answers: the server, or the model of the run."""
    if flags.server:
        from glasslm.cli.chat_client import RemoteAnswers

        return RemoteAnswers(
            flags.server, flags.run, flags.api_key, flags.sampling, flags.max_new_tokens
        )
    from glasslm.inference.trained_model import load_model
    from glasslm.runs.checkpoint_selector import parse_checkpoint
    from glasslm.runs.protection import open_run

    template = read_chat_template(open_run(flags.run))
    model = load_model(
        flags.run,
        parse_checkpoint(flags.checkpoint),
        **vars(flags.reading),
        **vars(flags.compute),
        ops=flags.ops,
    )
    return LocalAnswers(model, template, flags.sampling, flags.max_new_tokens)


def _read_lines() -> Iterator[str]:
    """The lines that a person types, or those of a pipe.

    At the prompt, Ctrl-C and Ctrl-D end the conversation.
    """
    is_terminal = _is_terminal()
    if is_terminal:
        with contextlib.suppress(ImportError):  # Windows has a history of its own
            import readline  # noqa: F401 - gives input() arrow keys and a history
        notify("Each line is a turn. Ctrl-C stops an answer, Ctrl-D ends, /help lists commands.")
    while True:
        try:
            if is_terminal:
                yield input("> ")
                continue
            line = sys.stdin.readline()
            if not line:
                return
            yield line.removeprefix("\ufeff").rstrip("\r\n")  # a file may begin with a mark
        except EOFError:
            print()
            return
        except UnicodeDecodeError as error:
            raise InputError(
                f"standard input is not UTF-8 (byte {error.start}): write it in UTF-8"
            ) from None
        except KeyboardInterrupt as interrupt:
            if signal_number(interrupt) != SIGINT or not is_terminal:
                raise
            print()
            return


def _print_answer(question: str, ask: Callable[[], Iterator[str]], as_json: bool) -> None:
    """Print the answer of `ask` as it is generated; Ctrl-C stops it.

    Raises the InputError with which it failed once that is printed as JSON, or the line is ended.
    """
    result = {"question": question, "answer": ""}
    error: InputError | None = None
    try:
        for piece in ask():
            result["answer"] += piece
            if not as_json:
                # What a model writes must not steer the terminal, also behind a pipe.
                sys.stdout.write(escape_control_chars(piece))
                sys.stdout.flush()
    except KeyboardInterrupt as interrupt:
        if signal_number(interrupt) != SIGINT:
            raise
        notify("\n(stopped)")
    except InputError as failure:
        error = failure
        result["error"] = str(error)
    if as_json:
        print(json.dumps(result), flush=True)
    elif error is None or result["answer"]:
        print(flush=True)
    if error is not None:
        raise error


def _run_command(session: ChatSession, line: str, as_json: bool) -> bool:
    """Run a command of the conversation; False where it ends the conversation."""
    name, _, argument = line.strip().partition(" ")
    argument = argument.strip()
    match name:
        case "/quit" | "/exit":
            return False
        case "/help":
            notify("\n".join(f"{command:<13} {text}" for command, text in COMMANDS.items()))
        case "/reset":
            session.reset()
            notify("the conversation is forgotten")
        case "/retry":
            if not session.turns:
                raise InputError("there is no question yet: ask one")
            _print_answer(session.turns[-2]["content"], session.ask_again, as_json)
        case "/save":
            save(session, argument)
        case "/system":
            session.system = argument
            session.reset()
            notify("the message of the system is set" if argument else "no message of the system")
        case _:
            known = [command.partition(" ")[0] for command in COMMANDS]
            raise InputError(f"there is no {name}{suggest_name(name, known)}: /help lists commands")
    return True


def save(session: ChatSession, path: str) -> None:
    """Write the conversation to a new file, without questions that have no answer."""
    if not path:
        raise InputError("/save needs the name of a file: /save talk.jsonl")
    if not session.turns:
        raise InputError("there is nothing to save yet: ask a question")
    if Path(path).exists():
        raise InputError(f"{path} exists: choose another name")
    messages = session.answered_messages
    if not messages:
        raise InputError("no question has an answer that could be saved: ask another one")
    line = json.dumps({"messages": messages}, ensure_ascii=False) + "\n"
    with explain_system_errors(
        path, lambda reason: InputError(f"{path} cannot be written ({reason}): choose another name")
    ):
        files.write_atomic(Path(path), line.encode())
    notify(f"saved: {path}")
    n_answered = sum(message["role"] == "assistant" for message in messages)
    if n_left_out := len(session.turns) // 2 - n_answered:
        turns = plural(n_left_out, "turn")
        notify(f"note: {turns} without an answer left out: finetune --chat refuses an empty one")
