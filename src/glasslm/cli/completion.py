"""Completion of commands and flags in bash, zsh and fish: `glasslm --print-completion SHELL`."""

from __future__ import annotations

import dataclasses
import importlib
import shlex
from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import TYPE_CHECKING

from glasslm.errors import InputError

if TYPE_CHECKING:
    from glasslm.cli.validation import Argument

SHELLS = ("bash", "zsh", "fish")

_BASH = """
_glasslm() {{
  local word=${{COMP_WORDS[COMP_CWORD]}} flags=""
  if [ "$COMP_CWORD" = 1 ]; then COMPREPLY=($(compgen -W {commands} -- "$word")); return; fi
  case ${{COMP_WORDS[1]}} in
{cases}
  esac
  case $word in
    -*) COMPREPLY=($(compgen -W "$flags" -- "$word")) ;;
    *) COMPREPLY=($(compgen -f -- "$word")) ;;
  esac
}}
complete -o filenames -F _glasslm glasslm
"""


def format_completion(shell: str, commands: Mapping[str, str]) -> str:
    """The script for a shell, with the commands and their summaries.

    Raises InputError for a shell that is not in SHELLS.
    """
    if shell not in SHELLS:
        raise InputError(f"there is no completion for '{shell}': choose from {', '.join(SHELLS)}")
    flags = {command: list_flags(command) for command in commands}
    if shell == "fish":
        lines = ["complete -c glasslm -f -n __fish_use_subcommand -a " + shlex.join([name])
                 + f" -d {shlex.quote(text)}" for name, text in commands.items()]  # fmt: skip
        lines += [
            f"complete -c glasslm -n '__fish_seen_subcommand_from {command}' -l {flag[2:]}"
            for command, names in flags.items()
            for flag in names
        ]
        return "\n".join(lines)
    cases = "\n".join(
        f"    {command}) flags={shlex.quote(' '.join(names))} ;;"
        for command, names in flags.items()
    )
    script = _BASH.format(commands=shlex.quote(" ".join(commands)), cases=cases).strip()
    # zsh runs bash's completions.
    return f"autoload -U +X bashcompinit && bashcompinit\n{script}" if shell == "zsh" else script


def list_flags(command: str) -> Sequence[str]:
    """The flags of a command as they are typed, those of its subcommands included."""
    from glasslm.cli.validation import list_arguments

    module = importlib.import_module(f"glasslm.cli.{command}")
    # A module such as learn_train has the flags of a subcommand.
    subcommands = [
        value
        for value in vars(module).values()
        if isinstance(value, ModuleType) and value.__name__.startswith(f"{module.__name__}_")
    ]
    flag_classes = [
        value
        for part in [module, *subcommands]
        for name, value in vars(part).items()
        if name.endswith("Flags") and value.__module__ == part.__name__
    ]
    names = {
        name
        for flags_class in flag_classes
        for argument in list_arguments(flags_class)
        if not argument.is_positional
        and argument.name not in getattr(flags_class, "hidden_fields", ())
        for name in _list_names(argument)
    }
    return [*sorted(names), "--help", "--help-all"]


def _list_names(argument: Argument) -> list[str]:
    """The names of a flag, without that of a switch which changes nothing."""
    from glasslm.config.schema import ALIASES, RunConfig

    aliases = [alias for alias, field in ALIASES.items() if field == argument.name]
    names = [argument.label, *(f"--{alias.replace('_', '-')}" for alias in aliases)]
    if argument.kind is not bool:
        return names
    off = f"--no-{argument.label.removeprefix('--')}"
    parts = vars(RunConfig()).values()
    if argument.name in {field.name for part in parts for field in dataclasses.fields(part)}:
        return [*names, off]  # a preset may turn it on or off
    return [off] if argument.default else names
