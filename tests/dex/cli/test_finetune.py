"""`dex finetune` as a user types it."""

import json
import os
import signal
import time

import pytest

from dex.cli import main
from dex.tasks import recipe
from dex.train.runlog import read_rows

QUICK = ["--epochs", "2", "--warmup-epochs", "1", "--batch-size", "8", "--lr", "3e-3", "--feature-size", "4"]
QUICK += ["--device", "cpu", "--precision", "fp32", "--workers", "0"]


@pytest.fixture
def command(pretrained, discs, tmp_path):
    """Its arguments; the salt of ids lies apart."""
    data = ["--classes", "disc=255", "--private", str(tmp_path / "salt")]
    return ["finetune", str(pretrained), str(discs), "--data", str(discs), *data, *QUICK]


def test_help_names_every_setting_and_whose_default_it_is(capsys):
    assert main(["finetune", "--help-all"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    for field in recipe.fields():
        assert f"--{field.name.replace('_', '-')}" in text
    assert text.count("not stated by the paper") > 15 and text.count("as the supplement states") == 4


def test_a_dry_run_says_what_would_run_and_writes_nothing(command, tmp_path, capsys):
    assert main([*command, "--out", str(tmp_path / "out"), "--dry-run", "--mode", "frozen"]) == 0
    out = capsys.readouterr().out
    assert "segmentation of disc; metric dice" in out and "mode: frozen" in out and "parameters trained" in out
    assert "train: 17 cases of 17 patients, 17 images; with disc 17" in out and "3 steps per epoch, 6 steps" in out
    assert not (tmp_path / "out").exists()


def test_it_ends_with_an_evaluation_and_a_row(command, tmp_path, capsys):
    out, sheet = tmp_path / "aus gabe ß", tmp_path / "sheet.csv"
    assert main([*command, "--out", str(out), "--sheet", str(sheet)]) == 0
    assert "cases of" in capsys.readouterr().out
    evaluation = json.loads((out / "evaluation.json").read_text(encoding="utf-8"))
    assert evaluation["about"]["split"] == "test" and (out / "report.html").stat().st_mode & 0o077 == 0
    assert len(sheet.read_text().splitlines()) == 2 and evaluation["about"]["leak"] in sheet.read_text()
    assert evaluation["about"]["leak"].startswith("none found in ")
    assert main([*command, "--out", str(out), "--resume", "auto", "--no-evaluation"]) == 0


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--resume", "yes"], "resume: expected auto, got 'yes'"),
        (["--epochs", "many"], "epochs"),
        (["--epochs", "1"], "warmup_epochs: expected at least 0 and less than the 1 epochs"),
        (["--mode", "half"], "mode"),
        (["--img-size", "20"], "img_size: expected a multiple of the patch size, 8, got 20"),
        (["--path", "both"], "path"),
        (["--gema", "--mode", "lora"], "gema: expected mode full and path experts"),
        (["--data", "/nowhere/at/all"], "/nowhere/at/all"),
        (["--classes", "disc=7"], "classes"),
    ],
)
def test_wrong_usage_is_one_line_and_2_and_makes_nothing(command, tmp_path, capsys, arguments, words):
    out = tmp_path / "out"
    assert main([*command, "--out", str(out), *arguments]) == 2
    err = capsys.readouterr().err
    assert words in err and err.startswith("dex finetune: ") and len(err.splitlines()) == 1
    assert not out.exists()


def test_a_file_in_the_place_of_the_folder(command, tmp_path, capsys):
    (tmp_path / "out").write_text("mine")
    assert main([*command, "--out", str(tmp_path / "out")]) == 2
    assert "out: expected a folder" in capsys.readouterr().err and (tmp_path / "out").read_text() == "mine"


@pytest.mark.slow
@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 75), (signal.SIGKILL, -9)])
def test_a_process_that_is_stopped_or_killed_goes_on(dex_process, command, tmp_path, number, code):
    out = tmp_path / "out"
    arguments = [*command, "--out", out, "--epochs", "40", "--checkpoint-every", "1", "--no-evaluation"]
    process = dex_process(*arguments)
    deadline = time.monotonic() + 120
    while len(read_rows(out / "metrics.jsonl")) < 6:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)
    os.kill(process.pid, number)
    assert process.wait(60) == code
    second = dex_process(*arguments, "--resume", "auto")
    assert second.wait(180) == 0
    whole = dex_process(*[tmp_path / "whole" if a is out else a for a in arguments])
    assert whole.wait(180) == 0
    losses = []
    for folder in (out, tmp_path / "whole"):
        rows = read_rows(folder / "metrics.jsonl")
        losses.append([(row["step"], row[n]) for row in rows for n in ("loss", "val_dice") if n in row])
    assert losses[0] == losses[1] and len(losses[0]) == 80
