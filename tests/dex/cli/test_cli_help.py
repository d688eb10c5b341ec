"""The help of every command, and what an answer to wrong usage costs."""

import argparse
import re
import resource
import subprocess
import sys

import pytest

from dex import cli
from dex.cli._console import Parser

WIDTH, LINES = 80, 62
WORDS = re.compile(r"[A-Z]+([ |=/][A-Z]+)*")


def parsers(name, monkeypatch):
    """The parser of a command, and those of its subcommands."""

    class Asked(Exception):
        """The command parses its arguments."""

    def parse_args(parser, arguments):
        raise Asked(parser)

    with monkeypatch.context() as patch:
        patch.setattr(Parser, "parse_args", parse_args)
        with pytest.raises(Asked) as asked:
            cli.commands()[name].run(["--preset", "demo", "--help-all"] if name == "pretrain" else [])
    found = [asked.value.args[0]]
    for parser in found:
        for action in parser._actions:
            if isinstance(action, argparse._SubParsersAction):
                found += action.choices.values()
    return found


@pytest.mark.parametrize("name", sorted(cli.commands()))
def test_every_option_has_a_sentence_and_a_value_in_capitals(name, monkeypatch):
    for parser in parsers(name, monkeypatch):
        formatter = parser._get_formatter()
        for action in parser._actions:
            if isinstance(action, argparse._SubParsersAction) or action.help == argparse.SUPPRESS:
                continue
            assert action.help and len(action.help.split()) > 1 and not action.help.endswith("."), action
            if action.nargs != 0:
                (word,) = formatter._metavar_formatter(action, action.dest.upper())(1)
                assert WORDS.fullmatch(word) and (len(word) > 1 or not action.option_strings), action


@pytest.mark.parametrize("name", sorted(cli.commands()))
def test_help_is_short_and_fits_a_terminal(name, monkeypatch):
    for parser in parsers(name, monkeypatch):
        short, whole = parser.format_short_help(), parser.format_help()
        shown = short if parser.essentials else whole
        if name != "pretrain":  # Its short help is another parser
            assert len(shown.splitlines()) <= LINES, parser.prog
        for text in (short, whole):
            assert max(map(len, text.splitlines())) <= WIDTH and "None" not in re.findall(r"default: (\w+)", text)
            assert not set(text) & set("{}\u2502\u256d\u2500\x1b"), parser.prog
        unknown = parser.essentials - {action.dest for action in parser._actions}
        assert not unknown, f"{parser.prog}: no such options"


def test_the_first_help_is_short_and_begins_with_what_to_do(run):
    code, out, err = run("--help")
    assert (code, err) == (0, "") and len(out.splitlines()) < 40
    assert max(map(len, out.splitlines())) <= WIDTH
    start, data = out.index("start here:"), out.index("\ndata:")
    assert start < out.index("dex doctor") < out.index("dex pretrain --preset demo") < data


def options(text):
    return set(re.findall(r"^  (?:-h, )?(--[a-z.-]+)", text, re.MULTILINE))


def test_pretrain_shows_what_people_set_with_the_values_of_their_preset(run, tmp_path):
    demo = run("pretrain", "--help")[1]
    assert len(demo.splitlines()) <= LINES
    for name in (
        "preset",
        "config",
        "data",
        "out",
        "steps",
        "resume",
        "data.batch-size",
        "optim.base-lr",
        "model.depth",
    ):
        assert f"--{name}" in options(demo)
    flat = " ".join(demo.split())
    assert "those of --preset demo" in flat and "Images per step (default: 16)" in flat
    assert "length of the run in steps (default: 1000)" in flat and "--schedule.epochs" not in flat
    paper = " ".join(run("pretrain", "--preset", "paper", "--help")[1].split())
    assert "Images per step (default: 448)" in paper and "Length of the run in epochs (default: 200)" in paper
    (tmp_path / "mine.yaml").write_text("data: {batch_size: 24}\nmodel: {num_experts: [2, 4]}\n")
    mine = " ".join(run("pretrain", "--config", "mine.yaml", "--help")[1].split())
    assert "Images per step (default: 24)" in mine and "(default: 2 4)" in mine and "those of mine.yaml" in mine


def test_help_all_has_every_field(run):
    from dex.config import Config, to_dict

    text = run("pretrain", "--preset", "demo", "--help-all")[1]
    fields = {f"--{s}.{name.replace('_', '-')}" for s, values in to_dict(Config()).items() for name in values}
    assert fields <= options(text) and options(run("pretrain", "--help")[1]) < options(text)
    left_out = int(re.search(r"(\d+) more options: dex pretrain --help-all", run("pretrain", "--help")[1])[1])
    assert left_out == len(options(text)) - len(options(run("pretrain", "--help")[1]))
    flat = " ".join(text.split())
    assert "--run.device DEVICE auto takes CUDA if available, else the CPU (auto, cpu or cuda; default: auto)" in flat
    assert "--schedule.momentum NUMBER NUMBER" in flat and "--model.img-size NUMBER ..." in flat
    assert "--model.norm-pix-loss, --model.no-norm-pix-loss" in flat and "(default: off)" in flat


WRONG = [
    ("trian",),
    *((name, "--nonsense") for name in cli.commands()),
    ("pretrain", "--preset", "demo", "--steps", "many"),
    ("pretrain", "--preset", "demo", "--data.batch-size", "0"),
    ("pretrain", "--preset", "demo", "--data", "absent"),
    ("pretrain", "--preset", "demo", "--init", "absent"),
    ("pretrain", "--preset", "demo", "--out", "file/run"),
    ("pretrain", "--config", "absent.yaml"),
    ("prepare", "absent", "--out", "o"),
    ("prepare", "folder", "--modality", "CT", "--out", "o", "--size", "0"),
    *(("data", name, "folder") for name in ("check", "refused", "withdraw")),
    ("data", "where", "folder", "x"),
    ("data", "inventory", "absent"),
    ("data", "leak", "absent", "folder"),
    ("report", "absent"),
    ("analyse", "absent", "--out", "o"),
    ("explain", "absent", "scan.png"),
    ("embed", "absent", "folder", "--out", "x.npz"),
    ("embed", "folder", "absent", "--out", "x.npz"),
    ("probe", "absent", "folder", "--out", "o"),
    ("export", "absent", "--format", "hf", "--out", "o"),
    ("tasks", "nonsense"),
    ("finetune", "absent", "fives", "--out", "o"),
    ("finetune", "folder", "nonsense", "--out", "o"),
    ("finetune", "folder", "fives", "--out", "o", "--lr", "many"),
    ("finetune", "folder", "fives", "--data", "absent", "--out", "o"),
    ("tasks", "fives", "--data", "absent"),
    ("evaluate", "absent"),
    ("evaluate", "folder", "--data", "absent"),
    ("analyse", "folder", "--data", "absent", "--out", "o"),
    ("explain", "folder", "scan.png", "--data", "absent"),
    ("predict", "absent", "scan.png", "--out", "o"),
    ("predict", "folder", "absent.png", "--out", "o"),
    ("compare", "absent", "absent", "--tasks", "fives", "--out", "o"),
    ("doctor", "--preset", "x"),
    ("verify", "--dim", "wide"),
]
SLOW = {"torch", "matplotlib", "monai", "transformers", "sklearn", "scipy", "pyarrow", "pandas", "tensorboard", "cv2"}


def test_wrong_usage_and_help_load_no_slow_package(tmp_path):
    """Each is answered in well under half a second of processor time; ``import torch`` alone takes more than one."""
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("x")
    helps = [(name, option) for name in cli.commands() for option in ("--help", "--help-all")]
    program = (
        "import sys\nfrom dex.cli import main\n"
        f"for code, calls in ((2, {WRONG!r}), (0, {helps!r})):\n    for words in calls:\n"
        f"        assert main(words) == code, words\n        assert not {SLOW!r} & set(sys.modules), words\n"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    lines = done.stderr.splitlines()
    assert len(lines) == len(WRONG) and "Traceback" not in done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder"]
    for words, line in zip(WRONG[1:], lines[1:], strict=True):
        assert line.startswith(f"dex {words[0]}: ") and ": expected " in line, line


def processor_time(*arguments):
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, *arguments], capture_output=True, timeout=300)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def test_wrong_usage_takes_little_processor_time(tmp_path):
    """Relative to the start of Python with the standard library's parser: torch alone would take 50 times as long."""
    start, answer = [], []
    for _ in range(3):
        start.append(processor_time("-c", "import argparse"))
        answer.append(processor_time("-m", "dex", "pretrain", "--preset", "demo", "--data", str(tmp_path / "absent")))
    assert min(answer) < 30 * min(start)
