"""What `dex analyse` measures of a run; the measures themselves are in tests/dex/analysis."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from dex.analysis.examine import examine
from dex.data import open_dataset
from dex.inference import analyse_job as job
from dex.inference.load import load
from dex.train.initial import first_model
from dex.train.run import pretrain

EMBEDDED_RUN = Path(__file__).parents[1] / "train" / "earlier_run" / "embedded"
CPU = torch.device("cpu")


def options(**more):
    return job.Options(**{"probed": 40, **more})


def test_everything_is_measured_beside_its_references(trained, control):
    said = []
    before = {p: p.read_bytes() for p in trained.rglob("*") if p.is_file()}
    prepared = job.prepare(trained, options(checkpoints="all"), compare=control)
    found = job.analyse(prepared, CPU, lambda *a: said.append(a))
    assert found.findings.step == 12 and found.start.step == 0 and found.other.findings.step == 1
    assert [f.step for f in found.curve] == [0, 5, 10, 12] and found.curve[-1] is found.findings
    assert found.other.findings.layers == [] and found.other.findings.gaps is None and found.other.comparable
    assert found.pixels is None or found.pixels.low <= found.pixels.value
    assert len(found.maps.images) == len(found.maps.labels) and found.maps.colours.shape[1:] == (4, 4, 3)
    totals = {total for _, total, _ in said}
    assert totals == {said[-1][0]} and [done for done, _, _ in said] == list(range(said[-1][1] + 1))
    assert {p: p.read_bytes() for p in trained.rglob("*") if p.is_file()} == before


def test_step_0_is_the_model_that_the_run_began_with(trained):
    prepared = job.prepare(trained, options(parts=("heldout", "swap")))
    found = job.analyse(prepared, CPU)
    begun = examine(first_model(load(trained).config), 0, found.config, found.material, ("heldout", "swap"))
    assert found.start.loss == begun.loss and found.start.gaps == begun.gaps
    assert found.start.loss != found.findings.loss and found.curve == [] and found.maps is None and found.pixels is None


def test_only_the_held_out_loss_is_one_forward(trained):
    prepared = job.prepare(trained, options(parts=("heldout",), images=4))
    found = job.analyse(prepared, CPU)
    assert prepared.start is None and found.start is None and len(found.material.held_out.ids) == 4


def test_some_of_the_checkpoints(trained):
    assert [s.step for s in job.prepare(trained, options(checkpoints=2)).earlier] == [5]
    one = job.prepare(trained, options(checkpoints=1))
    assert one.earlier == [] and "There is no checkpoint before step 12" in one.notes[0]


def test_a_damaged_checkpoint_is_left_out_and_told(trained, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(trained, run)
    broken = next((run / "checkpoints" / "step-00000005").glob("*.safetensors"))
    broken.write_bytes(broken.read_bytes()[:-9])
    prepared = job.prepare(run, options(checkpoints="all"))
    assert [s.step for s in prepared.earlier] == [10]
    assert prepared.notes[0].startswith("The checkpoint of step 5 is left out: ")


def test_where_the_run_began_elsewhere_and_that_is_gone(trained, tmp_path, change, monkeypatch):
    loaded = load(trained)
    elsewhere = loaded._replace(config=change(loaded.config, model__init=str(tmp_path / "gone.pth")))
    monkeypatch.setattr(job, "load", lambda *a, **k: elsewhere)
    prepared = job.prepare(trained, options())
    assert prepared.start is None and prepared.notes[0].startswith("The model at step 0 is not shown: it began as ")


def test_other_data_are_taken_and_told(trained, images, tmp_path):
    shutil.copytree(images / "ct", tmp_path / "some" / "ct")
    prepared = job.prepare(trained, options(parts=("heldout",)), data=tmp_path / "some")
    assert prepared.dataset.name == "some" and "given by --data" in prepared.notes[0]


def test_a_shard_set_that_has_changed_since_training_is_told(tmp_path):
    run = tmp_path / "run"
    shutil.copytree(EMBEDDED_RUN, run)
    data = json.loads((run / "run.json").read_text())
    for fingerprint, notes in ((open_dataset().fingerprint, 0), ("0" * 64, 1)):
        data["starts"][-1]["data"]["fingerprint"] = fingerprint
        (run / "run.json").write_text(json.dumps(data))
        found = job.prepare(run, options(parts=("heldout",))).notes
        assert len(found) == notes and all(
            "is not, or no longer, the one that the run was trained on" in n for n in found
        )


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"parts": ("swap", "heatmap")}, "only: expected some of heldout, routing, .*, got heatmap"),
        ({"images": 0}, "images: expected at least 1, got 0"),
        ({"probed": -1}, "probed: expected at least 1, got -1"),
        ({"batch_size": 0}, "batch-size: expected at least 1, got 0"),
        ({"checkpoints": "some"}, "checkpoints: expected all, last, or a number of at least 1, got 'some'"),
        ({"checkpoints": 0}, "checkpoints: expected all, last, or a number of at least 1, got 0"),
    ],
)
def test_wrong_options(more, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        job.prepare(tmp_path, options(**more))


def test_wrong_input(trained, images, tmp_path):
    with pytest.raises(ValueError, match="run: expected a run folder"):
        job.prepare(images, options())
    with pytest.raises(
        FileNotFoundError, match="data: expected a folder of images or shards, found nothing at '.*/no'"
    ):
        job.prepare(trained, options(), data=tmp_path / "no")
    with pytest.raises(FileNotFoundError, match="compare: expected a run folder, .*; nothing at .*/no"):
        job.prepare(trained, options(), compare=tmp_path / "no")
    shutil.copytree(images / "ct", tmp_path / "named" / "CT scans")
    with pytest.raises(
        ValueError, match=r"data: expected modalities of the run \(ct, mr, us\); named also has CT scans"
    ):
        job.prepare(trained, options(), data=tmp_path / "named")
    (tmp_path / "one" / "ct").mkdir(parents=True)
    (tmp_path / "one" / "ct" / "a.png").write_bytes((images / "ct" / "000.png").read_bytes())
    with pytest.raises(ValueError, match="data: expected held-out images; the split 'val' of one is empty"):
        job.prepare(trained, options(), data=tmp_path / "one")
    step = trained / "checkpoints" / "step-00000005"
    with pytest.raises(ValueError, match="checkpoints: expected a run folder, which has several, got the single model"):
        job.prepare(step, options(checkpoints="all"), data=images)


def test_data_that_have_moved_are_asked_for(trained, tmp_path, change):
    loaded = load(trained)
    moved = loaded._replace(config=change(loaded.config, data__path=str(tmp_path / "gone")))
    with pytest.raises(FileNotFoundError, match="found nothing at '.*/gone'. The run had its data there; give"):
        job.open_data(moved, None)


def test_averages_are_measured_where_they_are_asked_for(trained, tiny, change, tmp_path):
    run = tmp_path / "averaged"
    assert pretrain(change(tiny, optim__ema=0.5, run__checkpoint_every=6), run) == 0
    found = {}
    for ema in (False, True):
        prepared = job.prepare(run, options(parts=("heldout",), checkpoints="all", ema=ema))
        found[ema] = job.analyse(prepared, CPU)
    assert found[True].findings.loss != found[False].findings.loss
    assert found[True].curve[0].loss != found[False].curve[0].loss  # of an earlier checkpoint
    assert "The averaged weights (optim.ema) were measured" in found[True].notes[0] and not found[False].notes
    with pytest.raises(ValueError, match="ema: expected a run with an average of the weights .optim.ema."):
        job.prepare(trained, options(ema=True))
    with pytest.raises(ValueError, match="compare: ema: expected a run with an average"):
        job.prepare(run, options(ema=True), compare=trained)
