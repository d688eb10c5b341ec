"""Option parsing, checks of folders and one-line error messages for all commands."""

import argparse
import sys
from pathlib import Path
from typing import Any, NoReturn

from dex.common import exits


class _Help(argparse.HelpFormatter):
    """Appends the default to the help of an option unless it says it itself."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        default = action.default
        is_plain = not action.option_strings or action.nargs == 0 or default in (None, [], argparse.SUPPRESS)
        if is_plain or not action.help or "(default" in action.help:
            return action.help
        return f"{action.help} (default: {' '.join(map(str, default)) if isinstance(default, list) else default})"


class Parser(argparse.ArgumentParser):
    """Shows defaults in the help, and raises ValueError on wrong usage instead of exiting."""

    def __init__(self, **options: Any):
        super().__init__(formatter_class=_Help, **options)

    def error(self, message: str) -> NoReturn:
        raise ValueError(message)


def folder_argument(name: str, text: str) -> Path:
    """Path from the value ``text`` of option ``name``, with a leading ``~`` expanded. ValueError: empty text."""
    if not text.strip():
        raise ValueError(f"{name}: expected a folder, got {text!r}")
    return Path(text).expanduser()


def require_one_process(command: str) -> None:
    """ValueError if a launcher started several processes."""
    from dex.common.ranks import announced  # Imports torch, so not at the top: `dex --help` must be fast

    ranks = announced().world_size
    if ranks > 1:
        raise ValueError(f"WORLD_SIZE: expected 1, since {command} runs in one process, got {ranks}")


def print_line(command: str, message: str) -> None:
    """Print ``command: message`` as one line on stderr."""
    sys.stderr.write(f"{command}: {' '.join(message.split())}\n")  # In one write, since ranks share stderr


def failed(command: str, error: Exception | str) -> int:
    """Print ``error`` and return the exit code of a command that failed after validation."""
    print_line(command, str(error))
    return exits.FAILED
