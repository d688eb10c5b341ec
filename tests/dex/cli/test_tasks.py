"""`dex tasks` as a user starts it; what a task is, is in tests/dex/tasks."""

import json

import numpy as np
import pytest
from PIL import Image


@pytest.fixture
def own(tmp_path):
    """24 pictures with masks of values 0, 1 and 2, in `my task`."""
    root = tmp_path / "my task"
    for i in range(24):
        mask = np.zeros((16, 20), np.uint8)
        mask[2:6], mask[9:12] = 1, 2
        pixels = np.random.default_rng(i).integers(0, 256, (16, 20, 3), dtype=np.uint8)
        for folder, image in (("images", pixels), ("masks", mask)):
            (root / folder).mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(root / folder / f"p{i % 12}_{i}.png")
    return root


def test_the_list(run, monkeypatch, tmp_path):
    monkeypatch.delenv("DEX_TASKS", raising=False)
    code, out, err = run("tasks")
    lines = out.splitlines()
    assert code == 0 and err == "" and lines[0].split() == "task kind modality classes layout overlap data".split()
    assert "26 tasks; no data folder: " in out and sum(line.endswith("no") for line in lines) == 26
    (tmp_path / "root/dca1").mkdir(parents=True)
    for name in ("1.pgm", "1_gt.pgm", "2.pgm"):
        (tmp_path / "root/dca1" / name).touch()
    (tmp_path / "root/fives/other").mkdir(parents=True)
    (tmp_path / "root/dias").mkdir()
    (tmp_path / "root/dias/x.png").touch()
    rows = {row["task"]: row for row in json.loads(run("tasks", "--data", "root", "--json")[1])}
    assert len(rows) == 26
    assert [rows[name]["data"] for name in ("dca1", "fives", "dias", "bcss")] == [
        "2 images",
        "other files",
        "1 files of unknown layout",
        "no",
    ]
    monkeypatch.setenv("DEX_TASKS", "root")
    assert {row["task"]: row for row in json.loads(run("tasks", "--json")[1])} == rows


def test_one_task(run, monkeypatch):
    monkeypatch.delenv("DEX_TASKS", raising=False)
    code, out, _ = run("tasks", "monusac")
    assert code == 0 and "CC BY-NC-SA 4.0" in out and "not verified on files" in out
    assert "dex finetune RUN monusac --data DIR --out DIR" in out
    out = run("tasks", "autopet-org")[1]
    assert "AutoPET is also in the pretraining corpus" in out and "--classes NAME=VALUE" in out
    facts = json.loads(run("tasks", "fives", "--json")[1])
    assert facts["task"]["published"]["test"] == 500 and "data" not in facts


def test_a_folder_of_ones_own(run, own, tmp_path):
    code, out, err = run("tasks", own, "--classes", "one", "two=2")
    assert code == 2 and "for all classes or for none" in err
    options = ("--classes", "one=1", "two=2", "--patient", r"(p\d+)_", "--check")
    code, out, err = run("tasks", own, *options)
    assert code == 0 and err == ""
    assert "cases with each class: one" in out
    assert r"dex finetune RUN '" in out and r"--patient '(p\d+)_' --classes one=1 two=2 --out DIR" in out
    facts = json.loads(run("tasks", own, *options, "--json")[1])
    assert sum(side["cases"] for side in facts["data"].values()) == 24
    assert sum(side["patients"] for side in facts["data"].values()) == 12
    assert "root" not in {name for name, value in facts["task"].items() if value}
    assert (tmp_path / "my task.private/salt").is_file()


def test_masks_are_read_by_check_alone(run, own):
    Image.fromarray(np.full((16, 20), 7, np.uint8)).save(own / "masks/p0_0.png")
    assert run("tasks", own, "--classes", "one", "two")[0] == 0
    code, out, err = run("tasks", own, "--classes", "one", "two", "--check")
    assert code == 1 and "got 7 in 320 pixels of" in err and err.count("\n") == 1


def test_the_leak_check(run, own, tmp_path):
    options = ("--classes", "one", "two", "--pretraining")
    code, out, _ = run("tasks", own, *options, own / "images")
    assert code == 0 and "leak check against pretraining: 24 images of 24 cases in images" in out
    code, out, _ = run("tasks", own, "--classes", "one", "two", "--run", tmp_path)
    assert code == 0 and "not checked because the run's folder does not state" in out
    assert run("tasks", own, *options, "nowhere")[0] == 1


@pytest.mark.slow
def test_the_leak_check_against_the_embedded_images(run, own):
    out = run("tasks", own, "--classes", "one", "two", "--pretraining", "embedded")[1]
    assert "none found in 24 images against" in out


def test_a_description_of_ones_own(run, own, tmp_path):
    (tmp_path / "mine.yaml").write_text(
        "modality: endoscopy\nclasses: [one, two]\nlayout:\n  state: own\n"
        "  rules:\n    - {image: 'images/{p}_{n}.png', mask: 'masks/{p}_{n}.png', patient: '{p}'}\n"
    )
    code, out, _ = run("tasks", "mine.yaml")
    assert code == 0 and "images/{p}_{n}.png  ->  masks/{p}_{n}.png" in out
    assert "dex finetune RUN mine.yaml --data DIR" in out
    code, out, _ = run("tasks", "mine.yaml", "--data", own, "--check", "--json")
    assert sum(side["patients"] for side in json.loads(out)["data"].values()) == 12
    code, out, err = run("tasks", "mine.yaml", "--data", own / "images")
    assert code == 2 and "expected files of mine below" in err and "by its layout: images/<p>_<n>.png" in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("nothing",), "task: expected a name of `dex tasks`, a YAML file, or a folder of your own, got 'nothing'"),
        (("some/folder",), "nothing at some/folder"),
        (("--data", "nowhere"), "data: expected a folder with a folder for each task, got nowhere"),
        (("--classes", "a"), "classes: expected a task and its data folder with it, got ['a'] alone"),
        (("fives", "--check"), "data: expected the folder of the data for --check, got none"),
        (("fives", "--run", "x"), "run: expected a task and its data folder with it, got 'x' alone"),
        (("fives", "--data", "nowhere"), "data: expected a folder; nothing at nowhere"),
        (("fives", "--split", "half"), "split: expected one of draw, train, val, test, got 'half'"),
    ],
)
def test_wrong_usage(run, monkeypatch, arguments, message):
    monkeypatch.delenv("DEX_TASKS", raising=False)
    code, out, err = run("tasks", *arguments)
    assert (code, out, err.count("\n")) == (2, "", 1) and message in err
