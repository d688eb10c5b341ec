"""What the commands share: how they parse options and how they report an error on one line."""

import argparse
import os
import sys
from pathlib import Path
from typing import NoReturn

from dex.common import exits


class Parser(argparse.ArgumentParser):
    """Wrong usage is a ValueError instead of the end of the process."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(message)


def folder_argument(name: str, text: str) -> Path:
    """The folder that option ``name`` gives, with a leading ``~`` expanded; ValueError for an empty text."""
    if not text.strip():
        raise ValueError(f"{name}: expected a folder; got {text!r}")
    return Path(text).expanduser()


def check_folder(folder: Path) -> None:
    """ValueError: ``folder`` is a file, or nothing can be written there; before hours of work are lost to it."""
    there = next(place for place in (folder, *folder.absolute().parents) if place.exists())
    if not there.is_dir():
        raise ValueError(f"out: expected a folder; got the file {there}")
    if not os.access(there, os.W_OK | os.X_OK):
        raise ValueError(f"out: expected a folder that can be written; {there} cannot")


def require_one_process(command: str) -> None:
    """ValueError: a launcher has started several."""
    from dex.common.ranks import announced  # imports torch, which `dex --help` can do without

    ranks = announced().world_size
    if ranks > 1:
        raise ValueError(f"WORLD_SIZE: expected one process, which {command} runs in; got {ranks}")


def print_line(command: str, message: str) -> None:
    """``command: message`` on one line of stderr."""
    sys.stderr.write(f"{command}: {' '.join(message.split())}\n")  # at once: ranks share the output


def failed(command: str, error: Exception | str) -> int:
    """Print ``error``; the exit code of a command that failed after its input was accepted."""
    print_line(command, str(error))
    return exits.FAILED
