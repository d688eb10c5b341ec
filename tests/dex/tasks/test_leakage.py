"""Images of a task that are in the pretraining set."""

import json

import numpy as np
import pytest
from PIL import Image

from dex.data import ShardWriter, open_dataset
from dex.tasks import leakage
from dex.tasks.cases import open_task


@pytest.fixture(scope="module")
def pictures():
    """Real images [256, 256, 3] that are no near duplicates of each other."""
    dataset = open_dataset(None)
    return [dataset[index].image.numpy().transpose(1, 2, 0) for index in range(0, 400, 13)][:24]


@pytest.fixture
def data(pictures, tmp_path):
    """24 pictures of two classes, 8 on each side."""
    lines = ["file,label,split"]
    for i, picture in enumerate(pictures):
        (tmp_path / "task").mkdir(exist_ok=True)
        Image.fromarray(picture).save(tmp_path / f"task/{i:02d}.png")
        lines.append(f"{i:02d}.png,{'ab'[i % 2]},{('train', 'val', 'test')[i // 8]}")
    (tmp_path / "task/labels.csv").write_text("\n".join(lines))
    return open_task(tmp_path / "task", labels=tmp_path / "task/labels.csv", private=tmp_path / "private")


@pytest.fixture
def trained(pictures, tmp_path):
    """A shard set with the 3rd and the 18th picture, and others turned by noise."""
    root = tmp_path / "trained"
    rng = np.random.default_rng(0)
    with ShardWriter(root, name="trained", modalities=("CT",)) as writer:
        noise = [rng.integers(0, 256, (256, 256, 3), dtype=np.uint8) for _ in range(3)]
        for number, picture in enumerate([pictures[2], pictures[17], *noise]):
            Image.fromarray(picture).save(tmp_path / "one.png")
            data = (tmp_path / "one.png").read_bytes()
            writer.add(f"s/{number}", data, kind="png", modality="CT", split="train", group="")
    return root


def test_copies_are_found_by_side_and_case(data, trained):
    check = leakage.check(data, trained)
    assert check.total == 2 and check.images == {"train": 8, "val": 8, "test": 8}
    assert check.found["train"]["exact"] == check.found["test"]["exact"] == 1 and not any(check.found["val"].values())
    assert set(check.cases) == {data.cases[2].id, data.cases[17].id}
    assert check.sentence == "2 images of 2 cases in trained: 1 of 8 in train (1 exact), 1 of 8 in test (1 exact)"
    assert json.loads(json.dumps(check._asdict()))["against"] == "trained"
    assert leakage.check(data, trained, sides=("val",)).sentence == "none found in 8 images against trained"


def test_cases_that_cannot_be_read_are_counted(data, trained):
    data.cases[0].image.write_bytes(b"no picture")
    assert leakage.check(data, trained).sentence.endswith("; 1 unreadable")
    for case in data.cases:
        case.image.write_bytes(b"no picture")
    assert leakage.check(data, trained).sentence == "not checked because no image of the task could be read"


def run_of(folder, data_path, dataset, **changes):
    folder.mkdir()
    (folder / "config.yaml").write_text(json.dumps({"data": {"path": None if data_path is None else str(data_path)}}))
    facts = {"name": dataset.name, "fingerprint": dataset.fingerprint, "images": dataset.modality_counts()} | changes
    (folder / "run.json").write_text(json.dumps({"starts": [{"data": facts}]}))
    return folder


def test_against_the_data_of_a_run(data, trained, tmp_path):
    dataset = open_dataset(trained)
    run = run_of(tmp_path / "run", trained, dataset)
    assert leakage.of_run(data, run).total == 2
    changed = run_of(tmp_path / "changed", trained, dataset, fingerprint="another")
    assert leakage.of_run(data, changed).sentence == (
        "not checked because the run's data, trained, have changed since it was trained"
    )
    counts = run_of(tmp_path / "counts", trained, dataset, images={"CT": 3})
    assert "have changed" in leakage.of_run(data, counts).sentence
    gone = run_of(tmp_path / "gone", tmp_path / "elsewhere", dataset)
    assert "trained, are not available" in leakage.of_run(data, gone).sentence


@pytest.mark.parametrize("text", [None, "{", "{}", '{"starts": []}'])
def test_a_folder_that_is_no_run(data, tmp_path, text):
    (tmp_path / "run").mkdir()
    (tmp_path / "run/config.yaml").write_text("{}")
    if text is not None:
        (tmp_path / "run/run.json").write_text(text)
    expected = "not checked because the run's folder does not state its pretraining set"
    assert leakage.of_run(data, tmp_path / "run").sentence == expected


def test_no_pretraining_set(data, tmp_path):
    with pytest.raises(FileNotFoundError):
        leakage.check(data, tmp_path / "none")
