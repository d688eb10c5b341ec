"""What all commands have in common: `dex.cli` itself."""

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from dex import cli
from dex.common import exits

COMMAND = """
HELP = "says what it was given"
POSITION = 25
NEEDS = "data"


def run(arguments):
    if not arguments:
        raise ValueError("word: expected one, got none")
    if arguments == ["absent"]:
        import a_package_that_nobody_has
    return lambda: print(*arguments) or 4
"""


def test_help_lists_only_what_works(run):
    code, out, _ = run("--help")
    lines = out.split("\ndata:")[1].split("\noptions:")[0].splitlines()
    commands = [line.split()[0] for line in lines if line.startswith("  ")]
    assert code == 0 and commands == [
        "prepare",
        "data",
        "pretrain",
        "report",
        "analyse",
        "explain",
        "embed",
        "probe",
        "export",
        "tasks",
        "finetune",
        "evaluate",
        "predict",
        "compare",
        "doctor",
        "verify",
    ]
    for command in commands:
        code, out, err = run(command, "--help")
        assert (code, err) == (0, "") and f"usage: dex {command}" in out


def test_version(run):
    assert run("--version")[1].startswith("dex, from dexkernels ")


def test_every_exit_code_is_documented():
    """The table in docs/pretraining.md."""
    text = (Path(__file__).parents[3] / "docs" / "pretraining.md").read_text()
    table = text.split("| exit code | |")[1]
    codes = {
        int(line.split("|")[1])
        for line in table.splitlines()
        if line[:2] == "| " and line.split("|")[1].strip().isdigit()
    }
    assert codes == {value for name, value in vars(exits).items() if name.isupper() and isinstance(value, int)}


def test_help_imports_nothing_that_is_slow_or_optional():
    light = subprocess.run(
        [sys.executable, "-c", "import sys; from dex.cli import main; main(['--help']); print(*sys.modules)"],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    slow = {"torch", "numpy", "yaml", "PIL", "matplotlib", "monai", "peft", "pyarrow", "sklearn", "dex.config"}
    assert "dex.cli.doctor" in light.stdout and not slow & set(light.stdout.split())


def test_a_new_command_is_one_module(run, tmp_path, monkeypatch):
    folder = tmp_path / "more"
    folder.mkdir()
    (folder / "echo.py").write_text(COMMAND)
    (folder / "_helper.py").write_text("raise AssertionError('not a command')\n")
    monkeypatch.setattr(cli, "__path__", [*cli.__path__, str(folder)])
    monkeypatch.delitem(sys.modules, "dex.cli.echo", raising=False)
    try:
        assert list(cli.commands()) == [
            "prepare",
            "data",
            "echo",
            "pretrain",
            "report",
            "analyse",
            "explain",
            "embed",
            "probe",
            "export",
            "tasks",
            "finetune",
            "evaluate",
            "predict",
            "compare",
            "doctor",
            "verify",
        ]
        assert "  echo       says what it was given\n" in run("--help")[1]
        assert run("echo", "a", "b") == (4, "a b\n", "")
        assert run("echo") == (2, "", "dex echo: word: expected one, got none\n")
        code, _, err = run("echo", "absent")
        assert code == 2 and "pip install -e '.[data]'" in err
        names = (
            "prepare, data, echo, pretrain, report, analyse, explain, embed, probe, export, tasks, finetune, evaluate, "
            "predict, compare, doctor, verify"
        )
        assert f"expected one of {names}, got '_helper'" in run("_helper")[2]
    finally:
        sys.modules.pop("dex.cli.echo", None)
        vars(cli).pop("echo", None)
    assert run("echo")[0] == 2


@pytest.mark.parametrize(
    ("text", "error"),
    [("import a_package_that_nobody_has\n", "No module named 'a_package_that_nobody_has'"), ("x = =\n", "invalid")],
)
def test_a_command_that_cannot_be_imported_leaves_the_others(text, error, run, tmp_path, monkeypatch):
    (tmp_path / "broken.py").write_text(text)
    monkeypatch.setattr(cli, "__path__", [*cli.__path__, str(tmp_path)])
    monkeypatch.delitem(sys.modules, "dex.cli.broken", raising=False)
    code, out, _ = run("--help")
    assert code == 0 and "  doctor " in out and f"\ncannot be imported:\n  broken     {error}" in out
    assert "verify, got 'unknown'" in run("unknown")[2]
    if "import" in text:
        assert run("broken") == (2, "", f"dex broken: expected to import dex.cli.broken; {error}\n")
    else:
        with pytest.raises(SyntaxError):
            run("broken")


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (PermissionError("not yours"), 2, "dex doctor: not yours\n"),
        (OSError(5, "I/O"), 1, "dex doctor: [Errno 5] I/O\n"),
        (KeyboardInterrupt(), 130, ""),
    ],
)
def test_errors_of_the_first_phase(error, code, line, run, monkeypatch):
    def check(arguments):
        raise error

    monkeypatch.setattr(cli.commands()["doctor"], "run", check)
    assert run("doctor") == (code, "", line)


def test_a_reader_that_has_had_enough_is_no_fault():
    """`dex ... | head`: no traceback, neither of ours nor of Python's last flush."""
    program = (
        "import sys; from dex import cli; cli.commands()['doctor'].run = lambda a: lambda: print('x' * 10**6) or 0; "
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program + "sys.exit(cli.main(['doctor']))"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    process.stdout.close()
    assert (process.wait(60), process.stderr.read()) == (1, "")
    process.stderr.close()


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
def test_a_closed_input_or_output_goes_to_no_other_file(closed, tmp_path):
    """A descriptor that is closed would be the next file's, and take what is printed."""
    said = (
        "import os, sys; from dex.cli import main; code = main(['--version']); "
        "file = open('file', 'w'); sys.exit(code or 100 * (file.fileno() < 3))"
    )
    command = f"exec {sys.executable} -c {shlex.quote(said)} {closed}"
    assert subprocess.run(["sh", "-c", command], cwd=tmp_path, capture_output=False).returncode == 0


WRITERS = [
    ("pretrain", "--preset", "demo", "--out", "OUT"),
    ("prepare", ".", "--modality", "CT", "--out", "OUT"),
    ("data", "inventory", ".", "--modality", "CT", "--out", "OUT"),
    ("report", "nowhere", "--out", "OUT/page.html"),
    ("explain", "nowhere", "scan.png", "--out", "OUT/page.html"),
    ("analyse", "nowhere", "--out", "OUT"),
    ("probe", "nowhere", "images", "--out", "OUT"),
    ("embed", "nowhere", "images", "--out", "OUT/features.npz"),
    ("export", "nowhere", "--format", "hf", "--out", "OUT"),
    ("finetune", "nowhere", "fives", "--out", "OUT"),
    ("evaluate", "nowhere", "--out", "OUT"),
    ("predict", "nowhere", "scan.png", "--out", "OUT"),
    ("compare", "nowhere", "nowhere", "--tasks", "fives", "--out", "OUT"),
]


@pytest.mark.parametrize("command", WRITERS, ids=lambda command: command[0])
def test_a_place_that_cannot_be_written_is_named_before_anything_is_read(command, run):
    """Root may write to /proc by its permissions, and fails when it does."""
    if not os.path.isdir("/proc/self"):
        pytest.skip("no /proc here")
    code, _, err = run(*(text.replace("OUT", "/proc/x") for text in command))
    assert code == 2 and "out: expected a writable folder, got /proc: " in err and err.count("\n") == 1
