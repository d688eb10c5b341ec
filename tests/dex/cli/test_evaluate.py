"""`dex evaluate` as a user types it."""

import json
import shutil

import pytest

from dex.cli import main


@pytest.fixture
def folder(finetuned, tmp_path):
    return shutil.copytree(finetuned, tmp_path / "model")


@pytest.fixture
def command(folder, finetuned, discs):
    return ["evaluate", str(folder), "--data", str(discs), "--private", str(finetuned.parent / "private")]


def test_it_writes_numbers_page_and_row(command, folder, tmp_path, capsys):
    sheet = tmp_path / "sheet.csv"
    for _ in range(2):
        assert main([*command, "--device", "cpu", "--sheet", str(sheet)]) == 0
    out = capsys.readouterr().out
    assert "cases of" in out and "dice" in out and "nothing added" in out
    evaluation = json.loads((folder / "evaluation.json").read_text(encoding="utf-8"))
    assert evaluation["about"]["finetuned"] == "model" and (folder / "report.html").is_file()
    assert len(sheet.read_text().splitlines()) == 2


def test_another_side_goes_where_it_is_told(command, folder, tmp_path):
    assert main([*command, "--evaluate", "val", "--out", str(tmp_path / "out"), "--window", "1.5"]) == 0
    about = json.loads((tmp_path / "out/evaluation.json").read_text(encoding="utf-8"))["about"]
    assert (about["split"], about["window"]) == ("val", 1.5) and not (folder / "evaluation.json").exists()


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--split-seed", "3"], "split: expected patients that the model was not trained on"),
        (["--window", "0.5"], "window: expected a factor above 1"),
        (["--tolerance", "-1"], "tolerance: expected a distance of at least 0, got -1.0"),
        (["--batch-size", "0"], "batch_size: expected at least 1, got 0"),
        (["--sheet", f"{__file__}/sheet.csv"], "sheet: expected a CSV file"),
        (["--sheet", __file__], "sheet: expected the columns of this version"),
        (["--evaluate", "rest"], "evaluate"),
        (["--split", "train"], "split: expected cases to evaluate"),
        (["--data", "/nowhere"], "/nowhere"),
    ],
)
def test_wrong_usage_is_one_line_and_2_and_writes_nothing(command, folder, capsys, arguments, words):
    assert main([*command, *arguments]) == 2
    err = capsys.readouterr().err
    assert words in err and len(err.splitlines()) == 1
    assert not (folder / "evaluation.json").exists()


def test_one_place_is_for_one_folder(command, folder, tmp_path, capsys):
    assert main([*command[:2], str(folder.parent), *command[2:], "--out", str(tmp_path / "out")]) == 2
    assert "out: expected none with 2 folders" in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_a_pretrained_run_is_no_fine_tuned_one(pretrained, discs, capsys):
    assert main(["evaluate", str(pretrained), "--data", str(discs)]) == 2
    assert "folder that dex finetune wrote" in capsys.readouterr().err
