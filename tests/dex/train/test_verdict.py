"""What ranks agree on about a step, field by field; tests/reliability has it of real ranks."""

from types import SimpleNamespace

import pytest
import torch

from dex.common.ranks import ALONE, Ranks
from dex.train import verdict
from dex.train.verdict import Agreement, Fields, Losses, send

YES, NO = torch.tensor(True), torch.tensor(False)


def output(**changes):
    """What the verdict reads of 3 images' output: layers of 2 and 4 experts, 2 of which an image takes."""
    values = {
        "image_loss": torch.tensor([0.5, 1.0, 3.0]),
        "expert_indices": [
            torch.tensor([[0, 1], [1, 0], [1, 0]], dtype=torch.int32),
            torch.tensor([[3, 0], [0, 2], [0, 3]], dtype=torch.int32),
        ],
        "gate_mass": [torch.tensor([1.25, 1.75]), torch.tensor([1.5, 0.0, 0.5, 1.0])],
    }
    return SimpleNamespace(**values | changes)


def losses(**changes):
    values = dict(zip(Losses._fields, torch.tensor([1.5, 2.0, 0.25, 0.125, 7.0]), strict=True))
    return Losses(**values | changes)


MODALITY = torch.tensor([1, 0, 1])


def reach(given=None, out=None, stop=NO, unreadable=NO, ranks=ALONE):
    return Agreement(ranks, [2, 4], 3).reach(given or losses(), out or output(), MODALITY, stop, unreadable)


def test_fields_keep_names_shapes_and_order():
    fields = Fields({"a": (), "b": (2, 2), "none": (0,), "c": (3,)})
    values = {"a": torch.tensor(True), "b": torch.arange(4).view(2, 2), "none": torch.empty(0), "c": torch.ones(3)}
    vector = fields.pack(torch.float64, **values)
    assert vector.tolist() == [1, 0, 1, 2, 3, 1, 1, 1] and vector.dtype == torch.float64
    back = fields.unpack(vector)
    assert list(back) == list(values)
    for name, value in values.items():
        assert back[name].shape == value.shape and torch.equal(back[name], value.double())
        assert not value.numel() or back[name].untyped_storage().data_ptr() == vector.untyped_storage().data_ptr()
    with pytest.raises(KeyError, match="'c'"):
        fields.pack(torch.float64, **{name: value for name, value in values.items() if name != "c"})


def test_every_field_is_what_its_name_says():
    told = reach()
    assert told.good and told.stop == 0 and told.unreadable == 0
    assert Losses(*map(float, told.losses)) == Losses(
        loss=1.5, total=2.0, align_loss=0.25, balance_loss=0.125, grad_norm=7
    )
    assert told.modality_loss.tolist() == [1.0, 3.5, 0.0] and told.modality_images.tolist() == [1, 2, 0]
    assert told.slots.tolist() == [3, 3, 3, 0, 1, 2]
    assert [mass.tolist() for mass in told.gate_mass] == [[1.25, 1.75], [1.5, 0.0, 0.5, 1.0]]
    assert {value.dtype for value in told.losses} == {torch.float64}
    assert [mass.dtype for mass in told.gate_mass] == [torch.float32] * 2
    asked = reach(stop=YES)
    assert asked.good and asked.stop == 1


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("where", ["total", "grad_norm", "align_loss", "gate_mass", "image_loss"])
def test_one_number_that_is_not_finite_makes_the_step_bad(where, bad):
    if where in Losses._fields:
        told = reach(losses(**{where: torch.tensor(bad)}))
    else:
        out = output()
        number = out.gate_mass[1] if where == "gate_mass" else out.image_loss
        number[1] = bad
        told = reach(out=out)
    assert not told.good and told.stop == 0 and told.unreadable == 0


def test_a_rank_without_images_makes_the_step_bad():
    told = reach(unreadable=YES)
    assert not told.good and told.unreadable == 1


def test_ranks_exchange_one_vector(monkeypatch):
    """Two ranks that say the same: losses are means, everything else is a sum."""
    sent = []

    def all_reduce(vector):
        sent.append(vector.clone())
        vector.mul_(2)

    monkeypatch.setattr(torch.distributed, "all_reduce", all_reduce)
    told, alone = reach(stop=YES, ranks=Ranks(0, 2, 0)), reach(stop=YES)
    assert len(sent) == 1 and sent[0].shape == (3 + 5 + 2 * 3 + 2 * 6,) and sent[0].dtype == torch.float64
    assert told.good and told.stop == 2 and told.losses == alone.losses
    for name in ("modality_loss", "modality_images", "slots"):
        assert torch.equal(getattr(told, name), 2 * getattr(alone, name)), name
    assert all(torch.equal(two, 2 * one) for two, one in zip(told.gate_mass, alone.gate_mass, strict=True))


def test_a_bad_rank_spoils_the_step_of_all(monkeypatch):
    def all_reduce(vector):  # the other rank's step was bad, whose numbers were finite in the end
        vector[list(Agreement(ALONE, [2, 4], 3).fields.shapes).index("bad")] += 1

    monkeypatch.setattr(torch.distributed, "all_reduce", all_reduce)
    assert not reach(ranks=Ranks(0, 2, 0)).good


def test_without_experts_there_is_no_mass():
    out = output(expert_indices=[], gate_mass=[])
    told = Agreement(ALONE, [], 3).reach(losses(), out, MODALITY, NO, NO)
    assert told.good and told.gate_mass == [] and told.slots.numel() == 0


@pytest.mark.parametrize("good", [True, False])
def test_the_host_learns_what_it_needs(good):
    out = output()
    if not good:
        out.image_loss[1] = float("nan")
    sent = send(reach(out=out, stop=YES), out.image_loss, 7, ["a", "b", "c"])
    assert (sent.step, sent.ids, sent.ready) == (7, ["a", "b", "c"], None)
    read = sent.read()
    assert (read.good, read.stop, read.unreadable) == (good, True, False)
    assert (read.loss, read.grad_norm) == (1.5, 7.0)
    assert torch.equal(read.image_loss.nan_to_num(-1), out.image_loss.nan_to_num(-1))


def test_whoever_reads_early_waits_for_the_copy():
    waits = []
    sent = send(reach(), output().image_loss, 0, ["a", "b", "c"])._replace(
        ready=SimpleNamespace(synchronize=lambda: waits.append(True))
    )
    assert sent.read().good and waits == [True]
    assert verdict.NonFinite(0, 1.0, 2.0, ["a"]).samples == ["a"]
