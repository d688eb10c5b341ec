"""Commands in the documentation exist, with their options: those of dex, make, and the scripts.

What they do is tested with each command; here the pages must not name what is no longer there.
"""

import re
import shlex
from pathlib import Path
from typing import NamedTuple

import pytest

import dex.cli

ROOT = Path(__file__).parents[1]
PAGES = sorted([ROOT / "README.md", ROOT / "benchmarks" / "README.md", *(ROOT / "docs").rglob("*.md")])
OPTION = re.compile(r"(?<![\w-])--[a-z][\w.-]*")
MAKE = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M))
GIVEN_BY_MAKE = {"PYTHON", "PIP_ARGS"}


class Command(NamedTuple):
    page: str
    words: list[str]


def commands(page):
    """Each command of a page, in code blocks and within the text."""
    text = page.read_text(encoding="utf-8")
    lines = []
    for language, block in re.findall(r"^```(\w*)[^\n]*\n(.*?)^```", text, re.M | re.S):
        if language in ("", "sh", "bash"):
            lines += block.replace("\\\n", " ").splitlines()
    lines += re.findall(r"(?<!`)`([^`\n]+)`(?!`)", re.sub(r"^```.*?^```", "", text, flags=re.M | re.S))
    for line in lines:
        for part in re.split(r";|&&|\|(?!\w)", re.sub(r"#.*| \.\.\.", "", line)):
            match = re.search(r"(?:^|\s|-m )(dex (?!:)|make |(?:python )?scripts/\S+\.(?:py|sh))(.*)", part.strip())
            prefix = part.strip()[: match.start()] if match else ""
            if match and (not prefix or prefix.startswith(("torchrun", "srun", "exec", "TORCH", "python", "RANK"))):
                words = split(re.sub(r"[][]", "", match[1] + match[2]))
                yield Command(page.relative_to(ROOT).as_posix(), words)


def split(text):
    try:
        return shlex.split(text)
    except ValueError:  # An apostrophe of the text
        return text.split()


ALL = [command for page in PAGES for command in commands(page)]
DEX = sorted({tuple(c.words) for c in ALL if c.words[0] == "dex" and len(c.words) > 1 and c.words[1].isidentifier()})


def topic_of(words):
    """The command, and the subcommand of `dex data`."""
    return words[1:3] if words[1] == "data" else words[1:2]


def listed(topic, capsys):
    """The options that the help of a command lists."""
    for option in ("--help-all", "--help"):  # Commands with few options have no --help-all
        if dex.cli.main([*topic, option]) == 0:
            return set(OPTION.findall(capsys.readouterr().out))
    raise AssertionError(topic)


def test_commands_are_found():
    assert len(DEX) > 80 and {"pretrain", "prepare", "data", "finetune", "verify"} <= {words[1] for words in DEX}


@pytest.mark.parametrize("topic", sorted({topic_of(words) for words in DEX}), ids=" ".join)
def test_commands_of_dex_and_their_options_exist(topic, capsys):
    known = {option.replace("_", "-") for option in listed(topic, capsys)}
    named = {word.partition("=")[0] for words in DEX if topic_of(words) == topic for word in words}
    assert not {word for word in named if OPTION.fullmatch(word) and word.replace("_", "-") not in known}


def test_targets_of_make_and_scripts_exist():
    missing = []
    for page, words in ALL:
        if words[0] == "make":
            targets = [word for word in words[1:] if re.fullmatch(r"[a-z][a-z-]*", word)]
            missing += [(page, target) for target in targets[:1] if target not in MAKE]
            missing += [(page, word) for word in words[1:] if "=" in word and word.split("=")[0] not in GIVEN_BY_MAKE]
        if words[0] == "python" or words[0].startswith("scripts/"):
            script, *rest = words[1:] if words[0] == "python" else words
            path = ROOT / script
            text = path.read_text(encoding="utf-8") if path.is_file() else ""
            missing += [(page, script)] if not text else []
            missing += [(page, script, word) for word in rest if OPTION.fullmatch(word) and text and word not in text]
    assert not missing
