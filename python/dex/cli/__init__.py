"""The ``dex`` command. Each module of this package is the subcommand of the same name, except those named ``_...``.

A subcommand's module defines

- ``HELP``: its line in ``dex --help``;
- ``POSITION``: its sort key there, which also decides under which heading of ``_HEADINGS``; ties are sorted by name;
- ``NEEDS``: the extra of the package that installs what it imports;
- ``run(arguments) -> carry_out``: checks the arguments and all input, then returns the function that does the work and
  returns the exit code (``dex.common.exits``).

``run`` reports wrong usage or input by ValueError, FileNotFoundError, NotADirectoryError or PermissionError; ``main``
prints the error on one line and exits with 2. Errors in ``carry_out`` propagate. ``dex --help`` imports every command
module, so slow and optional packages are imported inside functions. A module that cannot be imported is listed last,
with the error.
"""

import importlib
import os
import pkgutil
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import NamedTuple

from dex.cli._console import closest, failed, print_line
from dex.common import exits

_USAGE = """usage: dex COMMAND [options]

Pretraining with Director-Experts networks.

start here:
  dex doctor                                  what works on this machine
  dex pretrain --preset demo --out runs/demo  a first run, on included images
  dex report runs/demo                        what came of it, as a page
{commands}
options:
  -h, --help   this help; `dex COMMAND --help` for that of a command
  --version    version of the installed package
"""
_HEADINGS = (
    (0, "data"),
    (30, "pretraining"),
    (42, "the trained model"),
    (45, "downstream tasks"),
    (50, "this machine"),
)
"""The first ``POSITION`` of each group of commands, and its heading."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code. Wrong usage or input prints one line on stderr and returns 2.

    Errors after validation propagate, so that the process exits with 1.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    _open_closed()
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_help(), end="", file=sys.stdout if arguments else sys.stderr)
        return exits.DONE if arguments else exits.USAGE
    if arguments[0] == "--version":
        from importlib.metadata import version

        print(f"dex, from dexkernels {version('dexkernels')}")
        return exits.DONE
    name, *rest = arguments
    if name not in _names():
        close = closest(name, commands())
        hint = f"; did you mean dex {close}?" if close else ""
        print_line("dex", f"command: expected one of {', '.join(commands())}, got {name!r}{hint}")
        return exits.USAGE
    try:
        code = _run(name, rest)
        sys.stdout.flush()
        return code
    except KeyboardInterrupt:
        return exits.INTERRUPTED
    except BrokenPipeError:  # The reader, such as `head`, has closed the pipe
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Receives the rest when Python flushes at exit
        return exits.FAILED


def _open_closed() -> None:
    """Connect closed standard streams to the null device, before another file gets their descriptor and with it
    whatever libraries print."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # Takes the lowest free descriptor
    for number, name in ((1, "stdout"), (2, "stderr")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(number, "w", encoding="utf-8", closefd=False))  # noqa: SIM115


def commands() -> dict[str, ModuleType]:
    """Module of every command that can be imported, by name, in the order of ``dex --help``."""
    return _imported().modules


class _Imported(NamedTuple):
    modules: dict[str, ModuleType]
    errors: dict[str, Exception]
    """Import error of every other command."""


def _imported() -> _Imported:
    modules: dict[str, ModuleType] = {}
    errors: dict[str, Exception] = {}
    for name in _names():
        try:
            modules[name] = _module(name)
        except Exception as error:  # One broken command must not hide the others
            errors[name] = error
    return _Imported(dict(sorted(modules.items(), key=lambda item: (item[1].POSITION, item[0]))), errors)


def _run(name: str, arguments: list[str]) -> int:
    try:
        command = _module(name)
    except ImportError as error:
        print_line(f"dex {name}", f"expected to import {__name__}.{name}; {error}")
        return exits.USAGE
    try:
        carry_out = command.run(arguments)
    except (ValueError, FileNotFoundError, NotADirectoryError, PermissionError) as error:
        print_line(f"dex {name}", str(error))
        return exits.USAGE
    except ModuleNotFoundError as error:
        remedy = f"pip install -e '.[{command.NEEDS}]' in the clone installs what the command needs"
        print_line(f"dex {name}", f"{error}; {remedy}")
        return exits.USAGE
    except BrokenPipeError:
        raise
    except OSError as error:
        return failed(f"dex {name}", error)
    except SystemExit as error:  # From argparse's --help
        return int(error.code or exits.DONE)
    return carry_out()


def _names() -> list[str]:
    return [module.name for module in pkgutil.iter_modules(__path__) if not module.name.startswith("_")]


def _module(name: str) -> ModuleType:
    return importlib.import_module(f"{__name__}.{name}")


def _help() -> str:
    modules, errors = _imported()
    lines = []
    headings = dict(_HEADINGS)
    for name, module in modules.items():
        begun = [position for position in headings if position <= module.POSITION]
        if begun:
            lines += ["", f"{headings[max(begun)]}:"]
            headings = {position: text for position, text in headings.items() if position not in begun}
        lines.append(f"  {name:<9}  {module.HELP}")
    if errors:
        lines += ["", "cannot be imported:"]
    lines += [f"  {name:<9}  {' '.join(str(error).split())}" for name, error in errors.items()]
    return _USAGE.format(commands="\n".join([*lines, ""]))
