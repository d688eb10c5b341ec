"""What a run says and writes about its held-out images."""

import re

import pytest

from dex.train.run import pretrain
from dex.train.runlog import read_rows


@pytest.fixture
def evaluated(tiny, change, tmp_path, capsys):
    def run(**fields):
        assert pretrain(change(tiny, run__evaluate_every=6, **fields), tmp_path / "out") == 0
        rows = [row for row in read_rows(tmp_path / "out" / "metrics.jsonl") if "val_loss" in row]
        return rows, read_rows(tmp_path / "out" / "events.jsonl"), capsys.readouterr().out

    return run


def test_every_evaluation_writes_the_instruments_and_how_long_it_took(evaluated):
    rows, _, said = evaluated(run__evaluate_images=12)
    assert [row["step"] for row in rows] == [0, 6, 12]
    for row in rows:
        assert row["swap_gap"].keys() == {"same modality", "other modality", "other less same modality"}
        assert all(
            row["swap_gap_low"][kind] <= gap <= row["swap_gap_high"][kind] for kind, gap in row["swap_gap"].items()
        )
        for name in ("probability_entropy", "expert_sets", "expert_sets_whole", "first_agreement", "information"):
            assert len(row[name]) == 2, name
        assert 1 <= row["rankme"]["CLS token"] <= 12 and row["probe_linear_low"] <= row["probe_linear"]
        assert row["probe_pixels"] == rows[0]["probe_pixels"] and row["evaluation_s"] > 0
    assert re.search(r"step 6/12  held-out loss [\d.]+  swap gap \+?-?[\d.]+ \[.*\]  modality by linear probe", said)
    assert re.search(r"evaluations took .*, [\d.]+% of the run", said)


def test_a_monolithic_run_has_no_swap_gap(evaluated):
    rows, events, said = evaluated(model__num_experts=0)
    assert "swap_gap" not in rows[-1] and "information" not in rows[-1] and rows[-1]["rankme"]
    assert "swap gap" not in said and events == []


def test_what_is_bad_is_said_and_kept_as_an_event(evaluated, monkeypatch):
    """Routers that tell nothing apart send all images to the same experts."""
    from dex.train import trainer as engine

    real = engine.first_model

    def one_way(config):
        model = real(config)
        for layer in model.encoder.dex_layers:
            layer.router_weight.data.zero_()
        return model

    monkeypatch.setattr(engine, "first_model", one_way)
    _, events, said = evaluated(
        model__num_experts=6, schedule__noise_std=(0.0, 0.0), optim__base_lr=1e-6, run__evaluate_images=12
    )
    (few,) = [event for event in events if event["event"] == "few expert sets"]
    assert few["step"] == 6 and "of at least 3: raise" in few["text"] and "schedule.balance_weight" in few["text"]
    assert f"warning: step 6: {few['text']}" in said
