import shutil

import numpy as np
import pytest
import torch

from dex.analysis.maps import Tokens
from dex.inference import explain_job as job
from dex.inference.load import load

CPU = torch.device("cpu")
FEW = job.Options(masks=3, train=30, neighbours=4)


def explained(*arguments, **more):
    return job.explain(job.prepare(*arguments, more.pop("options", FEW), **more), CPU)


def test_a_picture(trained, images):
    file = images / "us" / "003.png"
    before = {p: p.stat().st_mtime_ns for p in [*trained.rglob("*"), *images.rglob("*")]}
    found = explained(trained, file)
    assert (found.file, found.label, found.labels, found.modality) == ("003.png", "image", ("image",), None)
    assert found.step == 12 and found.compared == 30 and len(found.neighbours) == 4
    assert [len(losses) for losses in found.alternatives.swapped] == [4, 4] and len(found.alternatives.own) == 3
    assert {u.modality for u in found.usual} == {"ct", "mr", "us"} and found.notes == []
    first = found.alternatives.routes.experts[0][:, 0].long()
    own = torch.stack([found.alternatives.swapped[0][e, v] for v, e in enumerate(first.tolist())])
    assert torch.allclose(own, found.alternatives.own, atol=1e-6)
    assert {p: p.stat().st_mtime_ns for p in before} == before
    again = explained(trained, file)
    assert torch.equal(again.alternatives.own, found.alternatives.own)


def test_an_image_of_the_training_set_is_its_own_nearest(trained, images):
    options = job.Options(masks=2, train=200, neighbours=2)
    prepared = job.prepare(trained, images / "ct" / "000.png", options)
    name = prepared.train.sample_id(0)
    found = explained(trained, images / name, options=options)
    assert found.neighbours[0].id == name and found.neighbours[0].similarity == pytest.approx(1.0, abs=1e-5)
    assert found.neighbours[0].similarity > found.neighbours[1].similarity
    assert found.neighbours[0].experts == [experts[0].tolist() for experts in found.whole.experts]


def test_a_volume_and_which_of_its_slices(trained, tmp_path):
    nibabel = pytest.importorskip("nibabel")
    rng = np.random.default_rng(0)
    values = (rng.random((48, 48, 9)) * np.linspace(0, 1, 48)[:, None, None] * 900).astype(np.int16)
    path = tmp_path / "scan.nii.gz"
    nibabel.save(nibabel.Nifti1Image(values, np.eye(4)), path)
    prepared = job.prepare(trained, path, FEW, modality="MR", planes=("axial",))
    assert len(prepared.scan.labels) > 3 and prepared.scan.modality == "MR"
    kept = [i for i, why in enumerate(prepared.scan.dropped) if why is None] or list(range(len(prepared.scan.labels)))
    assert prepared.place == kept[len(kept) // 2]
    assert any(note.startswith("The model was not trained on MR") for note in prepared.notes)  # but on "mr"
    label = prepared.scan.labels[2]
    one = job.prepare(trained, path, FEW._replace(label=label), modality="MR", planes=("axial",))
    assert one.place == 2
    with pytest.raises(ValueError, match="image: expected one of the file's images .axial-.*, got 'axial-999'"):
        job.prepare(trained, path, FEW._replace(label="axial-999"), modality="MR")


def test_without_the_training_data_the_rest_is_explained(trained, images, tmp_path, change, monkeypatch):
    loaded = load(trained)
    moved = loaded._replace(config=change(loaded.config, data__path=str(tmp_path / "gone")))
    monkeypatch.setattr(job, "load", lambda *a, **k: moved)
    found = explained(trained, images / "ct" / "000.png")
    assert found.usual == found.neighbours == [] and found.compared == 0 and len(found.alternatives.swapped) == 2
    assert found.notes[0].startswith("No training images are shown: data: ")
    with pytest.raises(FileNotFoundError, match="data: expected a folder of images or shards, found nothing"):
        job.prepare(trained, images / "ct" / "000.png", FEW, data=tmp_path / "gone")


def test_a_common_offset_does_not_make_images_alike():
    generator = torch.Generator().manual_seed(0)
    cls, patches = torch.randn(20, 8, generator=generator), torch.randn(20, 4, 8, generator=generator)
    others = Tokens(cls + 1000, patches - 1000, torch.zeros(20, 1, 2, 2))
    one = Tokens(*(t[3:4] for t in others))
    found = job.similarities(one, others)
    assert found.argmax() == 3 and found[3] == pytest.approx(1.0, abs=1e-6) and found.median() < 0.5


@pytest.mark.parametrize("name", ["masks", "train", "neighbours", "batch_size"])
def test_wrong_numbers(name, trained, images):
    with pytest.raises(ValueError, match=f"{name.replace('_', '-')}: expected at least [12], got 0"):
        job.prepare(trained, images / "ct" / "000.png", FEW._replace(**{name: 0}))


def test_wrong_input(trained, control, images, tmp_path):
    with pytest.raises(ValueError, match="run: expected a model with experts, got a monolithic one"):
        job.prepare(control, images / "ct" / "000.png", FEW)
    with pytest.raises(FileNotFoundError, match="file: expected a file of the formats"):
        job.prepare(trained, tmp_path / "none.png", FEW)
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\nrubbish")
    with pytest.raises(ValueError, match="file: expected a readable picture"):
        job.prepare(trained, tmp_path / "broken.png", FEW)
    shutil.copytree(images / "ct", tmp_path / "named" / "CT scans")
    with pytest.raises(ValueError, match="data: expected modalities of the run"):
        job.prepare(trained, images / "ct" / "000.png", FEW, data=tmp_path / "named")
