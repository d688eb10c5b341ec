import base64
import hashlib
import json
import os
import random
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from run_folders import START, event, held_out, read, row, write

from dex.report import charts as report_charts
from dex.report.page import report
from dex.train.runlog import read_rows


def test_a_real_run_is_shown_with_the_numbers_it_logged(real, tmp_path):
    page = read(real, out=tmp_path / "r.html")
    assert list(page.text) == [
        "",
        "losses",
        "modalities",
        "specialisation",
        "experts",
        "reconstructions",
        "speed",
        "schedules",
        "events",
        "configuration",
        "machine",
    ]
    rows = read_rows(real / "metrics.jsonl")
    train, val = [r for r in rows if "loss" in r], [r for r in rows if "val_loss" in r]

    def points(source, *keys):
        found = []
        for r in source:
            value = r
            for key in keys:
                value = value[key]
            found.append((r["step"], pytest.approx(value, rel=1e-5, abs=1e-12)))
        return found

    assert page.lines["Masked loss"] == {"training": points(train, "loss"), "held out": points(val, "val_loss")}
    for title, key in (
        ("Align loss", "align_loss"),
        ("Balance loss", "balance_loss"),
        ("Gradient norm", "grad_norm"),
        ("Images per second", "images_per_s"),
        ("Learning rate", "lr"),
        ("Exploration noise", "noise_std"),
        ("Momentum of the directors", "momentum"),
        ("Weight of the balance loss", "balance_weight"),
    ):
        assert page.lines[title] == {title: points(train, key)}, title
    for title, key in (("Usage entropy", "usage_entropy"), ("Least used expert's share", "usage_min_share")):
        assert page.lines[title] == {f"layer {n}": points(train, key, n) for n in (0, 1)}, title
    for name in ("ct", "mr", "us"):
        assert page.lines[name]["held out"] == points(val, "val_modality_loss", name)
    waits = [(r["step"], pytest.approx(r["data_wait_s"] * r["images_per_s"] / (4 * 8), rel=1e-5)) for r in train]
    assert page.lines["Waiting for data"] == {"Waiting for data": waits}
    head = page.section_words("")
    assert "12 of 12 steps finished" in head and "96 images seen" in head
    assert f"{report_charts.number(val[-1]['val_loss'])} held-out loss" in head
    assert (
        "width 32, 2 layers, 2 heads; 4 experts per layer, 2 per image" in head and "120 images of 3 modalities" in head
    )


def test_everything_else_of_a_real_run(real, tmp_path):
    page = read(real, out=tmp_path / "r.html")
    for name, value in (("num_experts", "4"), ("base_lr", "0.2"), ("warmup", "0.25"), ("backend", "none")):
        assert f"{name} {value}" in page.section_words("configuration")
    start = json.loads((real / "run.json").read_text())["starts"][0]
    for key in ("torch", "numpy", "os", "precision", "started"):
        assert start[key] in page.section_words("machine")
    assert start["data"]["fingerprint"] in page.section_words("machine")
    assert "dex pretrain" in page.section_words("machine")
    assert sum(k == "src" for k, _ in page.attributes) == 1  # experts are drawn from the rows' own table
    older = Path(shutil.copytree(real, tmp_path / "older"))
    rows = [json.loads(line) for line in (real / "metrics.jsonl").read_text().splitlines()]
    assert any([row.pop("val_expert_mass", None) for row in rows])
    (older / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    page = read(older, out=tmp_path / "older.html")
    pictures = [base64.b64decode(v.split(",", 1)[1]) for k, v in page.attributes if k == "src"]
    assert len(pictures) == 2
    for data, kind in zip(pictures, ("experts", "reconstructions"), strict=True):
        (tmp_path / "picture.jpg").write_bytes(data)
        with (
            Image.open(tmp_path / "picture.jpg") as shown,
            Image.open(real / "pictures" / f"{kind}-step-000012.png") as saved,
        ):
            assert shown.size == saved.size
            small = [np.asarray(picture.convert("RGB").resize((8, 8)), float) for picture in (shown, saved)]
            assert np.abs(small[0] - small[1]).max() < 4


def test_the_page_needs_nothing_else(real, few, tmp_path):
    page = read(real, few, out=tmp_path / "r.html")
    text = re.sub(r"base64,[A-Za-z0-9+/=]+", "", page.source)
    assert not re.search(r"https?:|//[a-z]|@import|url\(", text)
    for name, value in page.attributes:
        assert not name.startswith("on")
        if name in ("src", "href"):
            assert value.startswith(("data:image/jpeg;base64,", "#"))
        assert name not in ("action", "data", "poster", "srcset", "background")
    ids = [value for name, value in page.attributes if name == "id"]
    assert len(ids) == len(set(ids))
    assert {v[1:] for n, v in page.attributes if n == "href"} == set(ids)
    assert page.tags.count("script") == page.tags.count("style") == 1
    script = re.search(r"<script>(.*?)</script>", page.source, re.S)[1]
    allowed = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = next(v for n, v in page.attributes if n == "content" and "default-src" in v)
    assert policy.startswith("default-src 'none'") and f"script-src 'sha256-{allowed}'" in policy


def test_equal_folders_give_equal_bytes_wherever_they_lie(real, few, tmp_path):
    first = report([real, few], tmp_path / "a" / "one.html").read_bytes()
    copies = [shutil.copytree(run, tmp_path / "elsewhere" / run.name) for run in (real, few)]
    assert report(copies, tmp_path / "two.html").read_bytes() == first
    assert sorted(p.name for p in (tmp_path / "a").iterdir()) == ["one.html"]


HOSTILE = "\"'><script>alert(1)</script><img src=x onerror=alert(1)>&amp;\ud800"


def test_everything_is_escaped(tmp_path):
    rows = [
        held_out(0, val_modality_loss={HOSTILE: 1.0, "ct": 1.0}, val_expert_mass={HOSTILE: [[1.0, 2.0]]}),
        row(4, modality_loss={HOSTILE: 1.0}),
    ]
    events = [event(4, HOSTILE, **{HOSTILE: HOSTILE}), event(4, "non-finite step", samples=[HOSTILE] * 2)]
    data = {"name": HOSTILE, "fingerprint": HOSTILE, "images": {HOSTILE: 3}}
    start = START | {"command": [HOSTILE], "data": data, "cpu": HOSTILE, HOSTILE: HOSTILE, "started": HOSTILE}
    name = HOSTILE.replace("/", "").replace("\ud800", "")
    settings = {"data": {"path": HOSTILE.replace("\ud800", ""), "batch_size": 16}}
    run = write(tmp_path / name, rows, events, start, settings)
    for runs in ([run], [run, run]):
        page = read(*runs, out=tmp_path / "r.html")
        assert page.tags.count("script") == 1 and "img" not in page.tags and "alert" not in "".join(page.tags)
        assert not [n for n, _ in page.attributes if n.startswith("on")]
        assert "<script>alert(1)</script>" in page.words
        assert name in page.words


def test_wrong_arguments(few, tmp_path):
    with pytest.raises(ValueError, match="runs: expected at least one"):
        report([], tmp_path / "r.html")
    with pytest.raises(ValueError, match=f"run {tmp_path / 'none'}: expected a run folder"):
        report([tmp_path / "none"], tmp_path / "r.html")
    with pytest.raises(ValueError, match="out: expected a file"):
        report([few], tmp_path)


def test_what_a_killed_report_left_goes_once_it_is_old(few, tmp_path):
    names = ["a[1].html.12-ab.partial", "a[1].html.34-cd.partial", "a1.html.12-ab.partial", "losses.png.12-ab.partial"]
    for name in names:
        (tmp_path / name).write_text("cut sh")
    for name in (names[0], *names[2:]):
        os.utime(tmp_path / name, (0, 0))
    report([few], tmp_path / "a[1].html")
    left = {p.name for p in tmp_path.iterdir() if p.is_file()}
    assert left == {"a[1].html", *names[1:]}


def test_two_runs_are_compared(few, tmp_path):
    other = write(
        tmp_path / "other",
        [held_out(0), row(4, loss=0.25), row(6), held_out(6, val_loss=0.125)],
        start=START | {"torch": "2.12.0"},
        changes={"optim": {"clip_norm": 2.0}, "data": {"batch_size": 8}},
    )
    page = read(few, other, out=tmp_path / "r.html")
    assert list(page.lines["Masked loss"]) == ["few, training", "few, held out", "other, training", "other, held out"]
    assert page.lines["Masked loss"]["other, training"][0] == (4, 0.25)
    assert list(page.lines["Gradient norm"]) == ["few", "other"] == list(page.lines["mr"])
    assert list(page.lines["Usage entropy: other"]) == ["layer 0", "layer 1"]
    ends = {v.split()[2] for n, v in page.attributes if n == "data-x"}
    assert ends == {"8"}  # one axis of steps for all
    told = page.section_words("configuration")
    differences, same = told.split("The same in all runs")
    assert "data.batch_size 16 8" in differences and "optim.clip_norm 1 2" in differences
    assert "seed" not in differences and "clip_norm" not in same and "weight_decay 1e-06" in same
    assert "torch 2.13.0 2.12.0" in page.section_words("machine")
    assert "<b>0.1250</b>" in page.source and "<b>0.3333</b>" not in page.source  # the better held-out loss
    assert "not comparable" not in page.words


def test_odd_values_never_end_a_report(tmp_path):
    """Whatever stands in the rows, the page is written, or a ValueError names the run."""
    odd = [
        None,
        0,
        -1,
        1e-300,
        -1e-30,
        1e308,
        1e99,
        10**400,
        True,
        "x",
        [],
        [1, None, "x"],
        {},
        {"ct": [1]},
        {"ct": {}},
    ]
    chance = random.Random(0)
    keys = [*row(4), *held_out(0), "mfu", "memory_mb", "director_distance", "probe_knn", "val_expert_mass"]
    for turn in range(60):
        rows = [
            {key: chance.choice(odd) for key in keys if chance.random() < 0.8} | {"step": step}
            for step in sorted(chance.choices([0, 1, 7, 10**9], k=5))
        ]
        events = [event(chance.choice([0, 5]), chance.choice(odd), detail=chance.choice(odd)) for _ in range(5)]
        start = {key: chance.choice(odd) for key in START}
        run = tmp_path / f"run {turn}"
        run.mkdir()
        (run / "config.yaml").write_text(json.dumps({"model": {k: None for k in ("depth", "num_experts")}, "x": 1}))
        (run / "run.json").write_text(json.dumps({"starts": [start, start]}))
        for name, lines in (("metrics.jsonl", rows), ("events.jsonl", events)):
            (run / name).write_text("".join(json.dumps(line) + "\n" for line in lines))
        read(run, out=tmp_path / "r.html")
        read(run, run, out=tmp_path / "r.html")
