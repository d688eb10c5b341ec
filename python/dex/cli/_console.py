"""Option parsing, checks of folders and one-line error messages for all commands."""

import argparse
import os
import sys
from pathlib import Path
from typing import NoReturn

from dex.common import exits


class Parser(argparse.ArgumentParser):
    """Raises ValueError on wrong usage instead of exiting."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(message)


def folder_argument(name: str, text: str) -> Path:
    """Path from the value ``text`` of option ``name``, with a leading ``~`` expanded. ValueError: empty text."""
    if not text.strip():
        raise ValueError(f"{name}: expected a folder; got {text!r}")
    return Path(text).expanduser()


def check_folder(folder: Path, name: str = "out") -> None:
    """ValueError, naming option ``name``: ``folder`` is a file or is not writable. Checked before hours of work."""
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not existing.is_dir():
        raise ValueError(f"{name}: expected a folder; got the file {existing}")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise ValueError(f"{name}: expected a writable folder; got {existing}")


def require_one_process(command: str) -> None:
    """ValueError if a launcher started several processes."""
    from dex.common.ranks import announced  # Imports torch, so not at the top: `dex --help` must be fast

    ranks = announced().world_size
    if ranks > 1:
        raise ValueError(f"WORLD_SIZE: expected 1, since {command} runs in one process; got {ranks}")


def print_line(command: str, message: str) -> None:
    """Print ``command: message`` as one line on stderr."""
    sys.stderr.write(f"{command}: {' '.join(message.split())}\n")  # In one write, since ranks share stderr


def failed(command: str, error: Exception | str) -> int:
    """Print ``error`` and return the exit code of a command that failed after validation."""
    print_line(command, str(error))
    return exits.FAILED
