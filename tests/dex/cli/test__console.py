import argparse
from pathlib import Path

import pytest

from dex import cli
from dex.cli._console import Parser, failed, folder_argument, print_line


def test_wrong_usage_is_a_value_error_and_help_ends():
    parser = Parser(prog="dex x")
    parser.add_argument("name")
    with pytest.raises(ValueError, match="the following arguments are required: name"):
        parser.parse_args([])
    with pytest.raises(SystemExit) as ended:
        parser.parse_args(["--help"])
    assert ended.value.code == 0


def test_help_shows_the_default_unless_the_text_does():
    parser = Parser(prog="dex x")
    parser.add_argument("--size", type=int, default=256, help="pixels")
    parser.add_argument("--seeds", nargs="+", default=[0, 1], help="seeds")
    parser.add_argument("--out", help="folder")
    parser.add_argument("--only", nargs="+", default=[], help="parts")
    parser.add_argument("--share", default=0.1, help="a tenth, or 5 %% (default: some)")
    parser.add_argument("--fast", action="store_true", help="no waiting")
    text = " ".join(parser.format_help().split())
    for shown in ("pixels (default: 256) --seeds", "seeds (default: 0 1) --out", "5 % (default: some) --fast"):
        assert shown in text
    assert "folder --only" in text and "parts --share" in text and text.endswith("no waiting")


@pytest.mark.parametrize(
    "name", sorted(cli.commands().keys() - {"pretrain"})
)  # tests/dex/test_config.py has pretrain's
def test_every_option_has_a_help_text_and_a_metavar_of_words(name, monkeypatch):
    class Asked(Exception):
        """The command parses its arguments."""

    def parse_args(parser, arguments):
        raise Asked(parser)

    monkeypatch.setattr(Parser, "parse_args", parse_args)
    with pytest.raises(Asked) as asked:
        cli.commands()[name].run([])
    parsers = [asked.value.args[0]]
    for parser in parsers:
        for action in parser._actions:
            if isinstance(action, argparse._SubParsersAction):
                parsers += action.choices.values()
                continue
            assert action.help and not action.help.endswith("."), action
            single = isinstance(action.metavar, str) and len(action.metavar) == 1
            assert not (single and action.option_strings), action


def test_an_empty_folder_is_not_the_current_one():
    assert folder_argument("out", "a b") == Path("a b")
    assert folder_argument("out", "~/set") == Path.home() / "set"
    for text in ("", " \n"):
        with pytest.raises(ValueError, match="out: expected a folder, got "):
            folder_argument("out", text)


def test_messages_are_one_line_on_stderr(capsys):
    print_line("dex x", "two\n  lines")
    assert failed("dex y", OSError(5, "I/O\nerror")) == 1
    assert capsys.readouterr() == ("", "dex x: two lines\ndex y: [Errno 5] I/O error\n")
