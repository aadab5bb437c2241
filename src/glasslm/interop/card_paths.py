"""Paths without their folders: a model card is published and must not name folders of a machine."""

from __future__ import annotations

import re
import shlex
from pathlib import PureWindowsPath

# The beginning of a path that names folders of a machine: absolute, or in the home folder.
ABSOLUTE = re.compile(r"[/\\~]|[A-Za-z]:[/\\]")


def file_name(path: str) -> str:
    """The last part of a path of any system."""
    return PureWindowsPath(path).name or path


def strip_folders(command: str) -> str:
    """A command with file names in place of absolute paths; empty if it cannot be parsed.

    The command is a shell command or a call of `glasslm.train`.
    """
    if command.startswith("glasslm.train("):
        return re.sub(
            r"(['\"])([^'\"]*)\1",
            lambda match: f"{match[1]}{_strip_word(match[2])}{match[1]}",
            command,
        )
    try:
        return shlex.join(map(_strip_word, shlex.split(command)))
    except ValueError:  # a quote that is never closed
        return ""


def _strip_word(word: str) -> str:
    """
    >>> _strip_word("--text-file=/home/me/faust.txt")
    '--text-file=faust.txt'
    """
    flag, equals, value = word.partition("=") if word.startswith("--") else ("", "", word)
    return flag + equals + (file_name(value) if ABSOLUTE.match(value) else value)
