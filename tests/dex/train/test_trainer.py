import json
import shutil

import pytest
import torch

from dex.data import open_dataset
from dex.train import checkpoint
from dex.train import trainer as engine
from dex.train.plan import resolve
from dex.train.trainer import Trainer


@pytest.fixture
def trainer(tiny, images, change):
    def build(**fields):
        return Trainer(resolve(change(tiny, **fields), open_dataset(images)))

    return build


def everything(trainer):
    """Copies of all weights, buffers, moments and step counters."""
    return {k: v.detach().clone() for k, v in trainer.tensors().items()}


def changed_bits(before, after):
    assert before.keys() == after.keys()
    return [k for k in before if before[k].numpy().tobytes() != after[k].numpy().tobytes()]


def poison_pixel(monkeypatch, *rows):
    """The next augmented batches hold one NaN pixel in each of these images."""
    real = engine.augment

    def poisoned(images, size, keys):
        out = real(images, size, keys)
        out[list(rows), 1, 5, 7] = float("nan")
        return out

    monkeypatch.setattr(engine, "augment", poisoned)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("experts", [4, 0])
def test_a_nan_pixel_changes_nothing_and_names_its_image(trainer, monkeypatch, experts, precision):
    t = trainer(model__num_experts=experts, run__precision=precision)
    assert t.train_step() == [] and t.train_step() == []
    before = everything(t)
    assert any(k.startswith("step.") and v == 2 for k, v in before.items())
    ids = next(iter(engine.Loader(t.loader.dataset, 8, seed=0, start_batch=2))).ids
    with monkeypatch.context() as patch:
        poison_pixel(patch, 3, 6)
        bad = t.train_step()
    assert changed_bits(before, everything(t)) == []
    assert [b.samples for b in bad] == [[ids[3], ids[6]]] and bad[0].step == 2
    assert t.nonfinite_in_a_row == 1
    assert t.train_step() == [] and t.nonfinite_in_a_row == 0
    moved = changed_bits(before, everything(t))
    assert any("director" in k for k in moved) == bool(experts)
    assert any(k.startswith("exp_avg.") for k in moved) and any(k.startswith("step.") for k in moved)
    row = t.row()
    assert row["skipped"] == 1 and row["step"] == 4
    assert all(row[k] is not None and row[k] > 0 for k in ("loss", "total", "grad_norm"))  # means of the good ones


def test_an_infinite_gradient_changes_nothing_and_names_the_batch(trainer):
    t = trainer()
    t.train_step()
    before = everything(t)
    hook = t.parameters[0].register_hook(lambda g: g.index_fill(-1, torch.tensor([0]), float("inf")))
    bad = t.train_step()
    hook.remove()
    assert changed_bits(before, everything(t)) == []
    assert len(bad) == 1 and len(bad[0].samples) == 8
    assert bad[0].grad_norm == float("inf") and 0 < bad[0].loss < 10
    t.train_step()
    assert changed_bits(before, everything(t)) != []


def test_a_non_finite_gate_mass_alone_is_caught(trainer, monkeypatch):
    t = trainer()
    t.train_step()
    before = everything(t)
    real = t.model.forward

    def forward(*arguments, **options):
        out = real(*arguments, **options)
        return out._replace(gate_mass=[out.gate_mass[0], torch.full_like(out.gate_mass[1], float("nan"))])

    monkeypatch.setattr(t.model, "forward", forward)
    assert len(t.train_step()) == 1
    assert changed_bits(before, everything(t)) == []


def test_order_of_a_step(trainer, monkeypatch):
    """GEMA comes first, with the experts as they were and gradients not yet clipped; AdamW gets clipped ones."""
    t = trainer(optim__clip_norm=1e-3)
    t.train_step()
    seen = []

    def norm():
        return torch.linalg.vector_norm(torch.cat([p.grad.flatten() for p in t.parameters])).item()

    gema, adamw = t.model.update_directors, t.optimizer.step
    weights = everything(t)

    def update_directors(gate_mass, momentum, *, skip, process_group):
        assert changed_bits(weights, everything(t)) == []
        seen.append(("gema", norm(), momentum))
        gema(gate_mass, momentum, skip=skip, process_group=process_group)

    def step():
        seen.append(("adamw", norm(), t.optimizer.param_groups[0]["lr"]))
        adamw()

    monkeypatch.setattr(t.model, "update_directors", update_directors)
    monkeypatch.setattr(t.optimizer, "step", step)
    t.train_step()
    values = engine.schedule_at(t.config, 1, t.steps)
    assert [s[0] for s in seen] == ["gema", "adamw"]
    assert seen[0][1] > 1e-2 and seen[1][1] == pytest.approx(1e-3, rel=1e-2)
    assert seen[0][2] == values.momentum and seen[1][2] == values.lr
    assert t.row()["grad_norm"] > 1e-2  # the norm that is reported is the one before clipping


def test_one_group_holds_what_takes_a_gradient(trainer):
    t = trainer()
    (group,) = t.optimizer.param_groups
    held = {id(p) for p in group["params"]}
    names = {n: id(p) in held for n, p in t.model.named_parameters()}
    assert not any(v for n, v in names.items() if ".director." in n)
    assert all(v for n, v in names.items() if ".director." not in n)
    assert any(".director." in n for n in names) and any(".experts." in n for n in names)
    assert (group["betas"], group["eps"], group["weight_decay"]) == ((0.9, 0.999), 1e-8, 1e-6)


def test_evaluation_and_forward_change_no_state(trainer):
    """Neither the weights nor what training draws afterwards: a run that evaluates equals one that does not."""
    plain, evaluating = trainer(), trainer()
    for step in range(3):
        plain.train_step()
        before = everything(evaluating)
        found = [evaluating.evaluate(), evaluating.evaluate()]
        assert found[0].loss == found[1].loss and found[0].modality_loss == found[1].modality_loss
        assert torch.equal(found[0].masked, found[1].masked)
        images = torch.randn(4, 3, 64, 64)
        for training in (True, False):
            evaluating.model.train(training)
            evaluating.model(images, noise_std=1.0)
        assert changed_bits(before, everything(evaluating)) == []
        evaluating.train_step()
        assert changed_bits(everything(plain), everything(evaluating)) == [], step
    assert plain.row() == evaluating.row()


def test_the_seed_decides_the_run(trainer):
    runs = [trainer(run__seed=seed) for seed in (0, 0, 1)]
    start = [everything(t) for t in runs]
    assert changed_bits(start[0], start[1]) == []
    drawn = [k for k in changed_bits(start[0], start[2]) if "weight" in k]
    assert len(drawn) > 10
    for t in runs:
        t.train_step()
        t.train_step()
    assert changed_bits(everything(runs[0]), everything(runs[1])) == []
    assert changed_bits(everything(runs[0]), everything(runs[2])) != []
    rows = [t.row() for t in runs]
    assert rows[0] == rows[1] and rows[0]["loss"] != rows[2]["loss"]


def test_two_halves_are_the_whole(trainer, tmp_path):
    """state() and a checkpoint hold all that the next step depends on, in the middle of a window of metrics too."""
    whole, first = trainer(), trainer()
    for _ in range(5):
        first.train_step()
    saver = checkpoint.Saver(tmp_path, 1)
    saver.save(5, first.tensors(), first.state())
    saver.wait()
    folder = tmp_path / "step-00000005"
    second = trainer(data__num_workers=0)
    second.restore(checkpoint.load(folder))
    torch.manual_seed(99)
    for _ in range(8):
        whole.train_step()
    for _ in range(3):
        second.train_step()
    assert changed_bits(everything(whole), everything(second)) == []
    a, b = whole.state(), second.state()
    assert json.dumps(a) == json.dumps(b)
    assert whole.row() == second.row()


def test_a_resume_builds_one_loader(trainer, tmp_path, monkeypatch):
    first = trainer()
    first.train_step()
    saver = checkpoint.Saver(tmp_path, 1)
    saver.save(1, first.tensors(), first.state())
    saver.wait()
    saved, starts, real = checkpoint.load(tmp_path / "step-00000001"), [], engine.Loader

    def loader(*arguments, start_batch, **options):
        starts.append(start_batch)
        return real(*arguments, start_batch=start_batch, **options)

    monkeypatch.setattr(engine, "Loader", loader)
    second = Trainer(first.plan._replace(saved=saved))
    second.restore(saved)
    assert starts == [1] and second.loader.position == 1 == second.step


def test_row_is_the_mean_of_its_steps(trainer):
    t = trainer()
    losses, wholes = [], []
    real = t.model.forward

    def forward(*arguments, **options):
        out = real(*arguments, **options)
        losses.append(out.loss.item())
        wholes.append(out.image_loss.tolist())
        return out

    t.model.forward = forward
    batches = [next(b) for b in [engine.Loader(t.loader.dataset, 8, seed=0)] for _ in range(3)]
    for _ in range(3):
        t.train_step()
    row = t.row()
    assert row["loss"] == pytest.approx(sum(losses) / 3, rel=1e-6)
    assert row["total"] == pytest.approx(row["loss"] + 0.01 * row["align_loss"] + 0.01 * row["balance_loss"], rel=1e-6)
    kinds = torch.cat([b.modality for b in batches])
    flat = torch.tensor(sum(wholes, []), dtype=torch.float64)
    for m, name in enumerate(t.modalities):
        assert row["modality_loss"][name] == pytest.approx(flat[kinds == m].mean().item(), rel=1e-9)
    assert len(row["usage_entropy"]) == len(row["usage_min_share"]) == 2
    assert all(0 < e <= 1 for e in row["usage_entropy"])


def test_a_data_set_without_held_out_images_trains(tiny, images, change, tmp_path):
    import shutil

    alone = tmp_path / "few" / "ct"
    alone.mkdir(parents=True)
    for path in sorted((images / "ct").iterdir())[:12]:
        shutil.copy(path, alone / path.name)
    dataset = open_dataset(alone.parent)
    dataset._in_split = lambda name: [name == "train"] * len(dataset)
    t = Trainer(resolve(tiny, dataset))
    assert t.evaluate() is None
    assert t.train_step() == []


@pytest.mark.skipif(
    not any(map(shutil.which, ("c++", "g++", "clang++"))), reason="torch.compile needs a C++ compiler for the CPU"
)
def test_compiled_blocks_take_the_same_steps(trainer):
    """Nothing is compiled anew when schedules move."""
    losses = []
    for compiled in (False, True):
        torch._dynamo.reset()
        t = trainer(model__depth=1, parallel__compile=compiled)
        rows = []
        for step in range(4):
            with torch._dynamo.config.patch(error_on_recompile=step > 0):
                t.train_step()
            row = t.row()
            rows.append([row[name] for name in ("loss", "align_loss", "balance_loss", "grad_norm")])
        losses.append(torch.tensor(rows))
        t.close()
    torch._dynamo.reset()
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-4, atol=0)
    assert len(losses[0].unique(dim=0)) == 4
