"""Descriptions of downstream tasks."""

import dataclasses
import json

import pytest
import yaml

from dex.tasks import task as tasks
from dex.tasks.task import IGNORED, SPLITS, Layout, Task, find, from_dict, names, to_dict, without_texts

FIVES = {
    "name": "vessels",
    "kind": "segmentation",
    "modality": "fundus",
    "classes": ["vessels"],
    "layout": {
        "state": "loader",
        "source": "a page",
        "rules": [{"image": "{split}/Original/{case}.png", "mask": "{split}/Truth/{case}.png", "split": "{split}"}],
        "values": {0: "background", 255: "vessels"},
    },
    "published": {"train": 200, "val": 100, "test": 500},
}


def test_a_task_says_nothing_that_nobody_knows():
    task = Task("mine")
    assert (task.licence, task.citation, task.overlap, task.metric) == ("unknown", "unknown", "", "dice")
    assert task.layout == Layout() and task.layout.state == "unknown"
    assert SPLITS == ("train", "val", "test") and IGNORED == 255
    assert Task("mine", kind="classification").metric == "auc"


def test_a_description_there_and_back(tmp_path):
    task = from_dict(FIVES)
    assert task.layout.values == (("0", "background"), ("255", "vessels"))
    assert task.layout.rules[0].mask == "{split}/Truth/{case}.png" and task.published.test == 500
    assert from_dict(json.loads(json.dumps(to_dict(task)))) == task
    (tmp_path / "vessels.yaml").write_text(yaml.safe_dump({k: v for k, v in FIVES.items() if k != "name"}))
    assert find(tmp_path / "vessels.yaml") == task


def test_texts_do_not_make_another_task():
    task = from_dict(FIVES)
    reworded = from_dict(changed(title="Retinal vessels", licence="CC0", layout__note="A note", published={"train": 1}))
    assert reworded != task and without_texts(reworded) == without_texts(task)
    for change in ({"layout__values": {1: "vessels"}}, {"metric": "nsd"}, {"modality": "OCT"}, {"name": "other"}):
        assert without_texts(from_dict(changed(**change))) != without_texts(task), change


def changed(**changes):
    values = json.loads(json.dumps(FIVES))
    for key, value in changes.items():
        place = values
        *path, last = key.split("__")
        for name in path:
            place = place[int(name)] if name.isdecimal() else place[name]
        place[last] = value
    return values


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kind": "detection"}, "kind: expected one of segmentation, classification"),
        ({"name": "a/b"}, "name: expected"),
        ({"colour": "red"}, "colour: expected one of"),
        ({"classes": ["a", "a"]}, "classes: expected names, each once"),
        ({"classes": ["background"]}, "classes: expected names"),
        ({"classes": "vessels"}, "classes: expected a list"),
        ({"classes": [f"c{i}" for i in range(255)]}, "classes: expected at most 254"),
        ({"modality": "CTT"}, "modality"),
        ({"plane": "tilted"}, "plane: expected one of"),
        ({"layout__values": {255: "veins"}}, "layout.values.255: expected a class, background or ignore"),
        ({"layout__values": {"#12": "vessels"}}, "#rrggbb"),
        ({"layout__values": [1]}, "layout.values: expected texts or numbers"),
        ({"layout__splits": {"a": "learn"}}, "layout.splits.a: expected one of train, val, test"),
        ({"layout__columns": {"who": "x"}}, "layout.columns: expected some of"),
        ({"layout__state": "guessed"}, "layout.state: expected one of"),
        ({"layout__rules": []}, "layout: expected rules"),
        ({"layout__source": ""}, "layout: expected rules, and their source"),
        ({"layout__rules": "x"}, "layout.rules: expected a list"),
        ({"layout__rules__0__mask": "{who}.png"}, "rules.0.mask: expected names of the image's pattern"),
        ({"layout__rules__0__mask": ""}, "rules.0: expected one of mask, masks and polygons"),
        ({"layout__rules__0__masks": {"veins": "x"}}, "rules.0.masks: expected classes"),
        ({"layout__rules__0__image": ""}, "rules.0.image: expected a pattern"),
        ({"layout__rules__0__pattern": "x"}, "layout.rules.0.pattern: expected one of"),
        ({"layout": 3}, "layout: expected fields"),
        ({"published__train": "many"}, "published.train: expected a whole number"),
    ],
)
def test_mistakes_are_named(changes, message):
    with pytest.raises(ValueError, match=message) as caught:
        from_dict(changed(**changes), "my.yaml")
    assert "my.yaml" in str(caught.value)


@pytest.mark.parametrize("text", ["", "[1]", "a: b: c", "name: x\nname: y", "\xff"])
def test_files_that_are_no_description(tmp_path, text):
    (tmp_path / "t.yaml").write_bytes(text.encode("latin-1"))
    with pytest.raises(ValueError, match="task: expected"):
        find(tmp_path / "t.yaml")


def test_names_that_are_none(tmp_path):
    with pytest.raises(ValueError, match=r"got 'five'; did you mean fives"):
        find("five")
    with pytest.raises(FileNotFoundError, match="nothing at"):
        find("some/where.yaml")
    for wrong in ("", None, 3):
        with pytest.raises(ValueError, match="task: expected a name"):
            find(wrong)


def test_a_folder_is_a_task_of_ones_own(tmp_path):
    (tmp_path / "meine Aufgabe (1)").mkdir()
    task = find(tmp_path / "meine Aufgabe (1)")
    assert (task.name, task.layout.state, task.public) == ("meine-Aufgabe-1", "own", False)
    assert task.root == str(tmp_path / "meine Aufgabe (1)") and "root" not in {k for k, v in to_dict(task).items() if v}


def test_the_catalogue_has_the_26_tasks_of_the_paper():
    assert len(names()) == 26
    for name in names():
        task = find(name)
        assert task.name == name and task.public and task.title and task.modality and task.anatomy
        assert task.published.row and task.published.train and task.published.test
        assert task.licence and task.citation
        if task.published.classes and task.classes:
            same = len(task.classes) == task.published.classes
            assert same != bool(task.published.difference), name
        if task.layout.state == "unknown":
            assert not task.layout.rules and task.layout.note, name
        else:
            assert task.layout.rules and task.layout.source and task.classes, name


def test_overlap_with_pretraining_is_declared():
    declared = {name for name in names() if find(name).overlap}
    assert {"fhu-hc18", "autopet-org", "pdcxr"} <= declared


def test_kinds_and_counts_sum_to_what_the_paper_prints():
    kinds = [find(name).kind for name in names()]
    assert kinds.count("classification") == 5 and kinds.count("segmentation") == 21
    modalities = [find(name).modality for name in names()]
    assert (modalities.count("fundus"), modalities.count("pathology")) == (2, 4)
    assert (modalities.count("X-ray"), modalities.count("ultrasound")) == (6, 3)


def test_every_field_of_a_description_is_read():
    fields = {field.name for field in dataclasses.fields(Task)}
    for path in tasks.CATALOGUE.glob("*.yaml"):
        assert set(yaml.safe_load(path.read_text())) <= fields
