"""Option parsing, checks of folders and one-line error messages for all commands."""

import argparse
import difflib
import itertools
import re
import sys
import textwrap
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from dex.common import exits

_KINDS: dict[Any, str] = {int: "a whole number", float: "a number"}


class _Help(argparse.HelpFormatter):
    """Words in capitals for values; the possible values and the default where the help of an option lacks them."""

    def __init__(self, prog: str):
        super().__init__(prog, max_help_position=26)

    def _metavar_formatter(self, action: argparse.Action, default_metavar: str) -> Any:
        shown = action.metavar if action.metavar is not None else (default_metavar or "").rpartition("_")[2]
        return lambda size: shown if isinstance(shown, tuple) else (shown,) * size

    def _format_args(self, action: argparse.Action, default_metavar: str) -> str:
        (word,) = self._metavar_formatter(action, default_metavar)(1)
        if action.nargs == "*" and " " in word:  # Several words, all of them needed
            return word
        if action.nargs in ("*", "+"):
            return f"{word} ..." if action.option_strings else f"{word} [{word} ...]"
        return super()._format_args(action, default_metavar)

    def _get_help_string(self, action: argparse.Action) -> str | None:
        text, default, notes = action.help, action.default, []
        if not action.option_strings or action.nargs == 0 or not text:
            return text
        if action.choices and not names_all(text, action.choices):
            notes.append(either(action.choices))
        if default not in (None, [], argparse.SUPPRESS) and "(default" not in text:
            notes.append(f"default: {' '.join(map(str, default)) if isinstance(default, list) else default}")
        return f"{text} ({'; '.join(notes)})" if notes else text

    def add_usage(self, usage: Any, actions: Any, groups: Any, prefix: str | None = None) -> None:
        """The command, what it needs and "[options]". argparse would list every option."""
        parts = [self._format_args(action, action.dest) for action in actions if not action.option_strings]
        for action in actions:
            if action.option_strings and action.required:
                parts += [f"{action.option_strings[-1]} {self._format_args(action, action.dest.upper())}"]
        text = " ".join([self._prog, *parts, "[options]"])
        if prefix is not None:  # argparse asks for the name of a subcommand's program
            super().add_usage(" ".join([self._prog, *parts]).replace("%", "%%"), [], [], prefix)
            return
        wrapped = textwrap.fill(
            text, self._width, initial_indent="usage: ", subsequent_indent=" " * 11, break_on_hyphens=False
        )
        self._add_item(lambda: f"{wrapped}\n\n", [])


class _ShowHelp(argparse.Action):
    """Print the short help, or with ``const`` True the whole one, and end."""

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        if isinstance(parser, Parser) and not self.const:
            sys.stdout.write(parser.format_short_help())
        else:
            sys.stdout.write(parser.format_help())
        parser.exit()


class Parser(argparse.ArgumentParser):
    """Options of a command. Wrong usage raises ValueError, as "NAME: expected ..., got ...".

    essentials: the options that ``--help`` shows, by their names in the parsed options; ``--help-all`` shows the rest.
    With none, ``--help`` shows all.
    """

    def __init__(self, *, essentials: Sequence[str] = (), add_help: bool = True, **options: Any):
        super().__init__(formatter_class=_Help, add_help=False, **options)
        self.essentials = frozenset(essentials)
        self._positionals.title = "arguments"
        # argparse of Python before 3.14 takes -1e-3 for an option.
        self._negative_number_matcher = re.compile(r"-(\d+\.?\d*|\.\d+)(e[-+]?\d+)?$", re.IGNORECASE)
        if not add_help:
            return
        help_text = "show the options that most people need" if essentials else "show this help"
        self._help_option("-h", "--help", const=not essentials, help=help_text)
        self._help_option("--help-all", const=True, help="show all options" if essentials else argparse.SUPPRESS)

    def _help_option(self, *names: str, **options: Any) -> None:
        self.add_argument(*names, action=_ShowHelp, nargs=0, dest="help", default=argparse.SUPPRESS, **options)

    def format_short_help(self) -> str:
        """The help with the arguments, the needed options and the ``essentials``."""
        formatter = self._get_formatter()
        formatter.add_usage(None, self._actions, [])
        formatter.add_text(self.description)
        hidden = 0
        for group in self._action_groups:
            shown = [action for action in group._group_actions if self._is_essential(action)]
            hidden += len(group._group_actions) - len(shown)
            formatter.start_section(group.title)
            formatter.add_arguments(shown)
            formatter.end_section()
        formatter.add_text(f"{hidden} more options: {self.prog} --help-all")
        formatter.add_text(self.epilog)
        return formatter.format_help()

    def _is_essential(self, action: argparse.Action) -> bool:
        return not action.option_strings or action.required or action.dest in self.essentials | {"help"}

    def parse_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:
        """The options. ValueError: an unknown option, a wrong value, or an argument too many."""
        arguments = list(sys.argv[1:] if args is None else args)
        self._check_known(arguments)
        options, rest = self.parse_known_args(arguments, namespace)
        if not rest:
            return options
        place = arguments.index(rest[0]) if rest[0] in arguments else 0
        before = self._options().get(arguments[place - 1].partition("=")[0]) if place else None
        if before is not None and before.nargs == 0:
            raise ValueError(f"{_name(before)}: expected a switch without a value, got {rest[0]!r}")
        raise ValueError(f"arguments: expected no more, got {' '.join(rest)!r}; {self._where()}")

    def _check_known(self, arguments: list[str]) -> None:
        if {"-h", "--help", "--help-all"} & set(arguments):
            return
        known = self._options()
        for word in itertools.takewhile("--".__ne__, arguments):
            name = word.partition("=")[0]
            abbreviates = self.allow_abbrev and any(option.startswith(name) for option in known)
            if not name.startswith("--") or " " in name or name in known or abbreviates:
                continue
            close = closest(name, known)
            remedy = f"did you mean {close}?" if close else self._where()
            raise ValueError(f"option: expected an option of {self.prog}, got {name}; {remedy}")

    def _options(self) -> dict[str, argparse.Action]:
        """Every option by its names, also those of subcommands."""
        known = dict(self._option_string_actions)
        for action in self._actions:
            if isinstance(action, argparse._SubParsersAction):
                for parser in action.choices.values():
                    known |= parser._options()
        return known

    def _where(self) -> str:
        return f"{self.prog} {'--help-all' if self.essentials else '--help'} lists what there is"

    def _get_value(self, action: argparse.Action, arg_string: str) -> Any:
        try:
            return super()._get_value(action, arg_string)
        except argparse.ArgumentError as error:
            kind = _KINDS.get(action.type)
            problem = error.message if kind is None else f"expected {kind}, got {arg_string!r}"
            raise ValueError(f"{_name(action)}: {problem}") from None

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is None or value in action.choices:
            return
        close = closest(str(value), map(str, action.choices))
        hint = f"; did you mean {close}?" if close else ""
        choices = ", ".join(map(str, action.choices))
        raise ValueError(f"{_name(action)}: expected one of {choices}, got {value!r}{hint}")

    def error(self, message: str) -> NoReturn:
        if match := re.fullmatch(r"the following arguments are required: (.+)", message):
            names = [name.split("/")[-1].lstrip("-") for name in match[1].split(", ")]
            value = "a value" if len(names) == 1 else "values"
            raise ValueError(f"{', '.join(names)}: expected {value}, got nothing; {self.format_usage().strip()}")
        if match := re.fullmatch(r"argument (\S+): (.+)", message):
            name = _field(match[1].split("/")[0])
            problem = match[2].replace("expected one argument", "expected a value, got nothing")
            problem = problem.replace("expected at least one argument", "expected a value or more, got nothing")
            problem = problem.replace("ignored explicit argument", "expected a switch without a value, got")
            message = f"{name}: {problem}"
        raise ValueError(message)


def either(words: Iterable[Any]) -> str:
    """``words`` as a choice: "a, b or c"."""
    *first, last = map(str, words)
    return f"{', '.join(first)} or {last}" if first else last


def names_all(text: str, words: Iterable[Any]) -> bool:
    """Whether ``text`` has every one of ``words``."""
    return all(re.search(rf"\b{re.escape(str(word))}\b", text) for word in words)


def closest(word: str, known: Iterable[str]) -> str | None:
    """What was probably meant by ``word``: the known name that ends in it, or that differs by few letters."""
    word, names = word.lstrip("-"), {name.lstrip("-"): name for name in known}
    ends = [name for name in names if name.endswith((f".{word}", f"-{word}"))]
    close = [*ends, *difflib.get_close_matches(word, names, 1)]
    return names[close[0]] if close else None


def _name(action: argparse.Action) -> str:
    """How errors name an argument: that of the configuration for an option, the metavar for another."""
    if not action.option_strings:
        return str(action.metavar or action.dest)
    return _field(max(action.option_strings[0], action.option_strings[-1], key=lambda option: option.startswith("--")))


def _field(option: str) -> str:
    return option.lstrip("-").replace("-", "_")


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
