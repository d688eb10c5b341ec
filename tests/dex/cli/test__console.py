import re
from pathlib import Path

import pytest

from dex.cli._console import Parser, closest, either, failed, folder_argument, names_all, print_line


def test_wrong_usage_is_a_value_error_and_help_ends():
    parser = Parser(prog="dex x")
    parser.add_argument("name")
    with pytest.raises(ValueError, match="name: expected a value, got nothing; usage: dex x name"):
        parser.parse_args([])
    with pytest.raises(SystemExit) as ended:
        parser.parse_args(["--help"])
    assert ended.value.code == 0


@pytest.fixture
def parser():
    parser = Parser(prog="dex x", essentials=("size",))
    parser.add_argument("name", metavar="NAME", help="what it is about")
    parser.add_argument("--size", type=int, default=256, metavar="PIXELS", help="side")
    parser.add_argument("--share", type=float, metavar="SHARE", help="share to hold out")
    parser.add_argument("--kind", choices=("ct", "mr"), help="kind of image")
    parser.add_argument("--parts", nargs="+", metavar="PART", help="parts")
    parser.add_argument("--img-side", type=int, metavar="PIXELS", help="side")
    parser.add_argument("--fast", action="store_true", help="no waiting")
    return parser


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (("a", "--size", "no"), "size: expected a whole number, got 'no'"),
        (("a", "--img-side", "4.5"), "img_side: expected a whole number, got '4.5'"),
        (("a", "--share", "half"), "share: expected a number, got 'half'"),
        (("a", "--size"), "size: expected a value, got nothing"),
        (("a", "--parts"), "parts: expected a value or more, got nothing"),
        (("a", "--kind", "cr"), "kind: expected one of ct, mr, got 'cr'"),
        (("a", "--kinds", "ct"), "option: expected an option of dex x, got --kinds; did you mean --kind?"),
        (("a", "--kinds=ct"), "option: expected an option of dex x, got --kinds; did you mean --kind?"),
        (("--zzz",), "option: expected an option of dex x, got --zzz; dex x --help-all lists what there is"),
        (("a", "--side", "3"), "option: expected an option of dex x, got --side; did you mean --img-side?"),
        (("a", "--s", "3"), "ambiguous option: --s could match --size, --share"),
        (("a", "--fast", "yes"), "fast: expected a switch without a value, got 'yes'"),
        (("a", "--fast=yes"), "fast: expected a switch without a value, got 'yes'"),
        (("a", "b"), "arguments: expected no more, got 'b'; dex x --help-all lists what there is"),
        ((), "NAME: expected a value, got nothing; usage: dex x NAME [options]"),
    ],
)
def test_wrong_usage_names_the_argument(arguments, error, parser):
    with pytest.raises(ValueError, match="^" + re.escape(error) + "$"):
        parser.parse_args(arguments)


def test_right_usage_stays_right(parser):
    options = parser.parse_args(
        ["--name-of-a-file--", "--size=3"][1:] + ["--share", "-1e-3", "--kin", "ct", "--", "--a"]
    )
    assert (options.name, options.size, options.share, options.kind, options.fast) == ("--a", 3, -1e-3, "ct", False)


def test_the_short_help_has_the_essentials_and_says_how_many_it_leaves_out(parser, capsys):
    with pytest.raises(SystemExit):
        parser.parse_args(["-h"])
    short = capsys.readouterr().out
    assert short.startswith("usage: dex x NAME [options]\n") and "--size PIXELS" in short and "--share" not in short
    assert "5 more options: dex x --help-all" in short
    with pytest.raises(SystemExit):
        parser.parse_args(["--help-all", "--unknown"])
    whole = capsys.readouterr().out
    assert all(
        option in whole for option in ("--size PIXELS", "--share SHARE", "--kind KIND", "--parts PART ...", "--fast")
    )
    assert "kind of image (ct or mr)" in whole and "more options" not in whole


def test_words():
    assert either(["a"]) == "a" and either((1, 3)) == "1 or 3" and either("abc") == "a, b or c"
    assert names_all("ct, else mr", ["ct", "mr"]) and not names_all("direct", ["ct"])
    assert closest("--lr", ["--optim.base-lr", "--model.depth"]) == "--optim.base-lr"
    assert closest("trian", ["pretrain", "report"]) == "pretrain" and closest("--nonsense", ["--run.seed"]) is None


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
