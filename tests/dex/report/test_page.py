import base64
import hashlib
import html
import json
import os
import random
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dex import config
from dex.report import charts as report_charts
from dex.report.page import report
from dex.train.run import pretrain
from dex.train.runlog import RunLog, read_rows

START = {
    "started": "2026-01-02T03:04:05+00:00",
    "step": 0,
    "resumed_from": None,
    "command": ["dex", "pretrain", "--preset", "demo"],
    "steps": 40,
    "precision": "fp32",
    "data": {"name": "little", "fingerprint": "f1", "images": {"ct": 40, "mr": 1200}},
    "torch": "2.13.0",
    "device": "cpu",
    "commit": "0123abcd",
    "dirty": False,
}


class Page(HTMLParser):
    """Tags, text by section, and the values of every line by the title of its chart."""

    def __init__(self, path):
        super().__init__()
        self.source = path.read_text(encoding="utf-8")
        self.tags, self.attributes, self.open, self.lines, self.text = [], [], [], {}, {}
        self.section, self._title, self._reading = "", "", False
        self.feed(self.source)
        self.close()
        assert not self.open, f"not closed: {self.open}"

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        attrs = dict(attrs)
        if tag not in ("meta", "img"):
            self.open.append(tag)
        if tag == "section":
            self.section = attrs["id"]
        if tag == "figcaption":
            self._title, self._reading = "", True
        if attrs.get("data-p") is not None:
            points = [tuple(map(float, p.split(","))) for p in attrs["data-p"].split()]
            self.lines.setdefault(self._title, {})[attrs["data-l"]] = points

    def handle_endtag(self, tag):
        assert self.open.pop() == tag
        if tag == "b":
            self._reading = False

    def handle_data(self, data):
        if self.open and self.open[-1] not in ("style", "script") and self.open[-2:] != ["head", "title"]:
            self.text[self.section] = self.text.get(self.section, "") + data + " "
        if self._reading:
            self._title += data

    @property
    def words(self):
        return " ".join(" ".join(self.text.values()).split())

    def section_words(self, name):
        return " ".join(self.text[name].split())


def row(step, **more):
    values = {"loss": 2 / (1 + step), "align_loss": 2.0 + step, "balance_loss": 1.5, "grad_norm": 0.1 * step}
    schedule = {"lr": 1e-3 / step, "momentum": 0.99, "noise_std": 0.5, "balance_weight": 0.1}
    layers = {"usage_entropy": [0.9, 0.8], "usage_min_share": [0.1, 0.05]}
    speed = {"images_per_s": 32.0, "data_wait_s": 0.25, "skipped": 0}
    return {"step": step, "epoch": step / 20, "modality_loss": {"ct": 1.0}} | values | schedule | layers | speed | more


def held_out(step, **more):
    return {"step": step, "val_loss": 3 / (1 + step), "val_modality_loss": {"ct": 0.5, "mr": 1.25 + step}} | more


def write(folder, rows, events=(), start=START, changes=None, starts=()):
    """A run folder as `dex.train.runlog` leaves it."""
    log = RunLog(folder)
    settings = config.from_dict({"data": {"batch_size": 16}, **(changes or {})}, config.preset("demo"))
    for entry in (start, *starts):
        log.open(settings, entry)
        log.close()
    for name, lines in (("metrics.jsonl", rows), ("events.jsonl", events)):
        (folder / name).write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def event(step, kind, **details):
    return {"step": step, "event": kind, **details}


def read(*runs, out):
    return Page(report([Path(r) for r in runs], Path(out)))


@pytest.fixture
def few(tmp_path):
    return write(tmp_path / "few", [held_out(0), row(4), row(8), held_out(8)])


@pytest.fixture(scope="module")
def trained():
    return {}


@pytest.fixture
def real(trained, tiny, change, tmp_path_factory):
    """A pretraining of 12 steps with evaluations, as it is; tests do not change it."""
    if not trained:
        trained["folder"] = tmp_path_factory.mktemp("trained") / "tiny run"
        assert pretrain(change(tiny, run__evaluate_every=6), trained["folder"], command=["dex", "pretrain"]) == 0
    return trained["folder"]


def test_a_real_run_is_shown_with_the_numbers_it_logged(real, tmp_path):
    page = read(real, out=tmp_path / "r.html")
    assert list(page.text) == [
        "",
        "losses",
        "modalities",
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
    assert "width 32, 2 layers, 2 heads; 4 experts a layer, 2 an image" in head and "120 images of 3 modalities" in head


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


def test_a_resumed_run_is_drawn_once(tmp_path):
    """Killed at 16, resumed from 6: what was done twice counts as it was done the second time."""
    first = [held_out(0), row(4), row(8), held_out(8), row(12), row(16), held_out(16)]
    again = [row(8, loss=7.0), held_out(8, val_loss=70.0), row(12, loss=8.0)]
    events = [
        event(2, "unused experts", layer=1, dead=[2], nearly_dead=[]),
        event(14, "loss spike", loss=9.0, samples=["ct/17"]),
        event(6, "resumed", notes=["passed over step-00000010: hash differs"]),
    ]
    run = write(tmp_path / "run", first + again, events, starts=[START | {"step": 6, "torch": "2.14.0"}])
    page = read(run, out=tmp_path / "r.html")
    assert page.lines["Masked loss"]["training"] == [(4, 0.4), (8, 7), (12, 8)]
    assert page.lines["Masked loss"]["held out"] == [(0, 3), (8, 70)]
    assert page.lines["mr"]["held out"] == [(0, 1.25), (8, 9.25)]
    head = page.section_words("")
    assert "12 of 40 steps unfinished" in head and "2 starts" in head
    # 4 steps, then 2 from the resume at 6 to the row at 8, then 4, at 2 steps a second
    assert "5s training time" in head and "32 images/s" in head
    assert page.lines["Waiting for data"]["Waiting for data"] == [(4, 0.125), (8, 0.25), (12, 0.125)]
    told = page.section_words("events")
    assert "resumed notes passed over step-00000010" in told and "no image goes to expert 2" in told
    assert "loss spike" not in page.words  # it belongs to steps that were taken again
    assert "2.13.0 → 2.14.0" in page.section_words("machine")


def test_a_step_without_images_of_a_modality_leaves_no_gap_and_a_loss_that_was_not_finite_does(tmp_path):
    losses = [{"ct": 1.0}, {"ct": 2.0, "mr": 5.0}, {"mr": None}, {"ct": 3.0}]
    rows = [row(4 + 4 * i, modality_loss=by_name) for i, by_name in enumerate(losses)]
    page = read(write(tmp_path / "run", [held_out(0), *rows]), out=tmp_path / "r.html")
    assert page.lines["ct"]["training"] == [(4, 1), (8, 2), (16, 3)] and page.lines["mr"]["training"] == [(8, 5)]
    drawn = dict(re.findall(r'data-l="training" data-p="([^"]*)" d="([^"]*)"', page.source))
    assert drawn["4,1 8,2 16,3"].count("M") == 1


def test_a_row_written_twice_at_one_step_counts_once(tmp_path):
    rows = [row(4), held_out(4), row(4, loss=5.0), held_out(4, val_loss=6.0), row(8)]
    page = read(write(tmp_path / "run", rows), out=tmp_path / "r.html")
    assert [v for _, v in page.lines["Masked loss"]["training"]] == [5, pytest.approx(2 / 9, rel=1e-5)]
    assert page.lines["Masked loss"]["held out"] == [(4, 6)]


def test_an_event_that_is_told_late_takes_nothing_back(tmp_path):
    events = [event(8, "unreadable sample", sample="a"), event(7, "non-finite step", loss="nan", samples=["b"])]
    told = read(write(tmp_path / "run", [row(8)], events), out=tmp_path / "r.html").section_words("events")
    assert told.index("non-finite step loss nan; samples b") < told.index("unreadable sample sample a")


@pytest.mark.parametrize(
    ("tail", "said"),
    [
        ('{"step": 12, "loss": 0.', "The last line of metrics.jsonl is cut short, as a killed run leaves it"),
        ('{"step": 12, "loss": 0.\n', "1 line(s) of metrics.jsonl cannot be read and are left out: 5"),
        ("null\n[]\n{}\n\n\x00", "4 line(s) of metrics.jsonl cannot be read and are left out: 5, 6, 7, 9"),
        ('{"step": -3}\n' + "[" * 100000 + "\n", "2 line(s) of metrics.jsonl cannot be read"),
    ],
)
def test_damaged_lines_are_left_out_and_said(few, tmp_path, tail, said):
    with (few / "metrics.jsonl").open("a") as file:
        file.write(tail)
    page = read(few, out=tmp_path / "r.html")
    assert said in page.section_words("")
    assert page.lines["Masked loss"]["training"] == [(4, 0.4), (8, pytest.approx(2 / 9, rel=1e-5))]


def test_a_run_without_damage_says_nothing_of_it(few, tmp_path):
    assert "notice" not in [v for n, v in read(few, out=tmp_path / "r.html").attributes if n == "class"]


@pytest.mark.parametrize("name", ["config.yaml", "run.json", "metrics.jsonl", "events.jsonl"])
def test_a_missing_file_is_named_with_its_run(few, tmp_path, name):
    good = shutil.copytree(few, tmp_path / "good")
    (few / name).unlink()
    with pytest.raises(ValueError, match=f"run {few}: expected the files of a run folder; {name} is missing"):
        report([good, few], tmp_path / "r.html")
    assert not (tmp_path / "r.html").exists()


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("config.yaml", "a: [", "config.yaml or run.json cannot be read"),
        ("config.yaml", "- 3", "expected fields and their values in config.yaml"),
        ("config.yaml", "!!python/object/apply:os.system ['true']", "cannot be read"),
        ("run.json", '{"starts": [', "config.yaml or run.json cannot be read"),
        ("run.json", '{"starts": []}', "expected a list of at least one start"),
        ("run.json", "[]", "cannot be read"),
        ("metrics.jsonl", "", "expected rows in metrics.jsonl; the file is empty"),
        ("metrics.jsonl", '{"st', "expected rows in metrics.jsonl; The last line of metrics.jsonl is cut short"),
    ],
)
def test_a_useless_file_is_named_with_its_run(few, tmp_path, name, text, message):
    (few / name).write_text(text)
    with pytest.raises(ValueError, match=f"run {few}: .*{message}"):
        report([few], tmp_path / "r.html")


def test_wrong_arguments(few, tmp_path):
    with pytest.raises(ValueError, match="runs: expected at least one"):
        report([], tmp_path / "r.html")
    with pytest.raises(ValueError, match=f"run {tmp_path / 'none'}: expected a run folder"):
        report([tmp_path / "none"], tmp_path / "r.html")
    with pytest.raises(ValueError, match="out: expected a file"):
        report([few], tmp_path)


def test_what_a_run_did_not_log_is_not_mentioned(few, tmp_path):
    page = read(few, out=tmp_path / "r.html")
    for words in ("MFU", "Memory", "kNN", "Director to experts", "steps skipped", "0.0%"):
        assert words not in page.words.replace("Speed and memory", "")
    assert "reconstructions" not in page.text


def test_what_newer_runs_log_is_shown(tmp_path):
    more = {"mfu": 0.4125, "memory_mb": 61000.5, "director_distance": [0.5, 0.75], "val_gate_entropy": [0.25, 0.5]}
    more |= {"slowest_rank": 1, "slowest_rank_s": 0.75, "median_rank_s": 0.5}
    rows = [row(4, **more), row(8, **more | {"mfu": None, "skipped": 3, "loss": None}), held_out(8, probe_knn=0.875)]
    page = read(write(tmp_path / "run", rows), out=tmp_path / "r.html")
    assert page.lines["MFU"] == {"MFU": [(4, 0.4125)]}
    assert page.lines["Memory"] == {"Memory": [(4, 61000.5), (8, 61000.5)]}
    assert page.lines["Director to experts"] == {"layer 0": [(4, 0.5), (8, 0.5)], "layer 1": [(4, 0.75), (8, 0.75)]}
    assert page.lines["Gate entropy"] == {"layer 0": [(4, 0.25), (8, 0.25)], "layer 1": [(4, 0.5), (8, 0.5)]}
    assert page.lines["Slowest rank"] == {"Slowest rank": [(4, 1.5), (8, 1.5)]}
    assert page.lines["kNN probe"] == {"kNN probe": [(8, 0.875)]}
    head = page.section_words("")
    assert (
        "87.5% kNN probe" in head and "41.2% MFU" in head and "61,000 MB memory" in head and "3 steps skipped" in head
    )
    assert page.lines["Masked loss"]["training"] == [(4, 0.4)]


def test_expert_maps_are_drawn_from_the_newest_row(tmp_path):
    mass = {"ct": [[3.0, 1.0], [0.0, 2.0]], "mr": [[1.0, 1.0], [1.0, 0.0]], "us": [[0.0, 0.0], [0.0, 0.0]]}
    old = {"ct": [[0.0, 1.0], [0.0, 2.0]]}
    rows = [held_out(0, val_expert_mass=old), held_out(8, val_expert_mass=mass)]
    page = read(write(tmp_path / "run", rows), out=tmp_path / "r.html")
    told = page.section_words("experts")
    assert "layer 0: ct gives expert 0 75.0%" in told and "layer 1: mr gives expert 1 0.0%" in told
    assert "us gives" not in told and "the full colour is a share of 100%" in told
    assert re.findall(r'fill-opacity="([^"]*)"', page.source) == [
        *("0.750", "0.250", "0.500", "0.500"),
        *("0.000", "1.000", "1.000", "0.000"),
    ]


def test_events_are_listed_and_marked(tmp_path):
    events = [
        event(5, "non-finite step", loss="nan", grad_norm="inf", samples=[f"ct/{i}" for i in range(40)]),
        event(5, "non-finite step", loss="nan", samples=["once more"]),
        event(6, "unused experts", layer=0, dead=[1, 2], nearly_dead=[3]),
        event(7, "preempted", signal="SIGTERM"),
    ]
    page = read(write(tmp_path / "run", [row(4), row(7)], events), out=tmp_path / "r.html")
    told = page.section_words("events")
    assert "non-finite step ×2; unused experts; preempted" in told
    assert "ct/0, ct/1" in told and "ct/11 and 28 more" in told and "ct/12" not in told
    assert "layer 0; no image goes to expert 1, 2; almost no image goes to expert 3" in told
    assert "preempted by SIGTERM, resumable" in page.section_words("")
    hero = page.source[page.source.index("Masked loss") : page.source.index("Align loss")]
    drawings = re.findall(r"<svg viewBox=.*?</svg>(?=</div>)", hero, re.S)
    assert len(drawings) == 2  # broad and narrow
    for drawing in drawings:
        assert drawing.count('<path class="rod m-bad"') == 1  # two at one place are drawn once
        assert drawing.count('<path class="rod m-unused"') == drawing.count('<path class="rod m-preempt"') == 1
        assert html.escape("step 6: unused experts: layer 0") in drawing


def test_very_many_events_are_cut(tmp_path):
    events = [event(5, "unreadable sample", sample=f"sample {i}", reason="cut") for i in range(1000)]
    told = read(write(tmp_path / "run", [row(8)], events), out=tmp_path / "r.html").section_words("events")
    assert "unreadable sample ×1000" in told and "800 events left out here" in told
    assert "sample 99;" in told and "sample 100;" not in told and "sample 900;" in told and "sample 999;" in told


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
    assert "do not measure the same" not in page.words


def test_charts_that_are_compared_have_one_scale(few, tmp_path):
    other = write(tmp_path / "other", [row(8, usage_entropy=[0.125, 0.25]), held_out(8)])
    page = read(few, other, out=tmp_path / "r.html")
    charts = page.source.split("<figcaption>")
    for titles in (("Usage entropy: few", "Usage entropy: other"), ("ct", "mr")):
        scales = [re.findall(r'<text x="41" y="[^"]*" [^>]*>[^<]*', c) for c in charts if c[3:].startswith(titles)]
        assert len(scales) == 2 and len(scales[0]) > 2 and scales[0] == scales[1]


def test_runs_that_measure_another_loss_are_told_apart(few, tmp_path):
    data = START["data"] | {"fingerprint": "f2"}
    other = write(
        tmp_path / "other", [held_out(4)], start=START | {"data": data}, changes={"model": {"mask_ratio": 0.5}}
    )
    page = read(few, other, out=tmp_path / "r.html")
    assert "do not measure the same: different model.mask_ratio, the data set" in page.section_words("")
    assert "<td><b>" not in page.source


def test_the_monolithic_control_has_no_losses_of_experts(few, tmp_path):
    rows = [row(4, align_loss=0.0, balance_loss=0.0, usage_entropy=[], usage_min_share=[]), held_out(4)]
    plain = write(tmp_path / "plain", rows, changes={"model": {"num_experts": 0}})
    page = read(plain, out=tmp_path / "r.html")
    assert "Align loss" not in page.lines and "Exploration noise" not in page.lines and "experts" not in page.text
    assert "monolithic control" in page.section_words("") and "align loss" not in page.section_words("")
    both = read(few, plain, out=tmp_path / "r.html")
    assert list(both.lines["Align loss"]) == ["few"] and list(both.lines["Masked loss"])[2] == "plain, training"


def test_runs_of_one_name_are_told_apart(few, tmp_path):
    copy = shutil.copytree(few, tmp_path / "b" / "few")
    page = read(few, copy, out=tmp_path / "r.html")
    assert list(page.lines["Gradient norm"]) == [f"{tmp_path.name}/few", "b/few"]
    assert list(read(few, few, out=tmp_path / "r.html").lines["Gradient norm"]) == ["few (1)", "few (2)"]


def test_a_picture_of_steps_to_come_or_of_nothing_is_not_shown(few, tmp_path):
    for step, colour in ((4, "red"), (40, "blue")):  # the run was resumed and is at step 8
        Image.new("RGB", (30, 20), colour).save(few / "pictures" / f"reconstructions-step-{step:06d}.png")
    (few / "pictures" / "reconstructions-step-000008.png").write_bytes(b"\x89PNG\r\n\x1a\nnothing")
    page = read(few, out=tmp_path / "r.html")
    assert "reconstructions, step 4" in page.section_words("reconstructions") and page.tags.count("img") == 1
    assert "The picture reconstructions-step-000008.png cannot be read" in page.section_words("")


def test_a_long_run_is_drawn_as_means_and_ranges(tmp_path):
    rows = [
        row(s, loss=9.0 if s == 3000 else 1.0 + s % 2, grad_norm=None if 4000 < s < 4100 else 1.0)
        for s in range(1, 6001)
    ]
    page = read(write(tmp_path / "run", rows), out=tmp_path / "r.html")
    assert len(page.source) < 900_000
    hero = page.source[page.source.index("Masked loss") : page.source.index("Align loss")]
    narrow, broad = re.findall(r'<path class="band f0" d="([^"]*)"', hero)
    for band, height in ((narrow, 14), (broad, 14)):
        top = min(float(p.split()[1]) for p in re.split("[MLZ]", band) if p)
        assert top < height + 15  # the spike reaches the top although its column's mean does not
    points = page.lines["Masked loss"]["training"]
    assert 400 < len(points) < 600 and max(v for _, v in points) < 4
    gap = re.search(r'data-l="Gradient norm" data-p="[^"]*" d="([^"]*)"', page.source)[1]
    assert gap.count("M") == 2  # a gap stays a gap


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


CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
MEASURE = """<script>
addEventListener('load', () => {
  const bad = [], wide = document.documentElement.clientWidth;
  if (document.documentElement.scrollWidth > wide) bad.push(`page ${document.documentElement.scrollWidth} > ${wide}`);
  for (const e of document.body.querySelectorAll('*')) {
    const box = e.getBoundingClientRect();
    if (box.width && !e.closest('.scroll') && !e.closest('script') && (box.right > wide + 1 || box.left < -1))
      bad.push(`${e.outerHTML.slice(0, 90)} from ${box.left} to ${box.right}`);
  }
  for (const image of document.images) if (!image.naturalWidth) bad.push('an image is not decoded');
  for (const svg of document.querySelectorAll('figure > svg, figure > div > svg')) {
    const frame = svg.getBoundingClientRect();
    if (!frame.width) continue;  // the drawing for the other width
    const ink = [...svg.querySelectorAll('.line:not(.dots), .cell')], dots = svg.querySelector('.dots');
    if (!dots && !ink.some(p => p.getBoundingClientRect().width > 1)) bad.push('an empty drawing');
    const texts = [...svg.querySelectorAll(':scope > text')].map(t => [t.textContent, t.getBoundingClientRect()]);
    texts.forEach(([a, p], i) => {
      if (p.height < 6) bad.push(`too small to read: ${a}`);
      texts.slice(i + 1).forEach(([b, q]) => {
        const across = Math.min(p.right, q.right) - Math.max(p.left, q.left);
        const down = Math.min(p.bottom, q.bottom) - Math.max(p.top, q.top);
        if (across > 1 && down > 3) bad.push(`${a} lies on ${b} in ${svg.getAttribute('aria-label').slice(0, 30)}`);
      });
    });
  }
  for (const s of document.querySelectorAll('section')) if (s.offsetHeight < 80) bad.push(`section ${s.id} is blank`);
  const hero = document.querySelector('figure.wide'), tip = hero.querySelector('.tip');
  const shown = [...hero.querySelectorAll('svg[data-x]')].find(s => s.getBoundingClientRect().width);
  const box = shown.getBoundingClientRect();
  shown.dispatchEvent(new PointerEvent('pointermove', {clientX: box.right - 5, clientY: box.top + 50}));
  const tips = [...hero.querySelectorAll('.tip')].filter(t => !t.hidden).map(t => t.textContent);
  const drawn = document.querySelectorAll('svg[data-x]').length;
  parent.document.body.dataset[NAME] = JSON.stringify({bad, tips, drawn, images: document.images.length});
});
</script>"""


def chromium(page, profile, *options):
    """The DOM after the page has loaded, in a browser that nothing else uses."""
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"]
    command += ["--disable-background-networking", "--disable-component-update", "--disable-sync"]
    command += [f"--user-data-dir={profile}", "--virtual-time-budget=20000", *options, "--dump-dom", page.as_uri()]
    environment = {k: v for k, v in os.environ.items() if k not in ("DISPLAY", "DBUS_SESSION_BUS_ADDRESS")}
    return subprocess.run(command, capture_output=True, text=True, timeout=180, check=True, env=environment).stdout


def write_wide(folder, pictures, seed):
    """Long names, many layers, many steps, every kind of event: what is hard to fit on a page."""
    names = ["a modality with quite a long name", "mr", "unbrokennameofamodalitythatgoesonandonandon"]
    rows, rng = [], random.Random(seed)
    for step in range(50, 40001, 50):
        more = {"mfu": 0.4, "memory_mb": 61234.0, "director_distance": [rng.random() for _ in range(12)]}
        more |= {"usage_entropy": [rng.random() for _ in range(12)], "usage_min_share": [rng.random() / 9] * 12}
        rows.append(row(step, loss=1 + rng.random(), modality_loss={n: rng.random() for n in names}) | more)
        if step % 4000 == 0:
            mass = {n: [[rng.random() for _ in range(16)] for _ in range(12)] for n in names}
            by_name = {n: 0.01 + rng.random() for n in names}
            rows.append(held_out(step, val_modality_loss=by_name, val_expert_mass=mass, probe_knn=rng.random()))
    events = [event(s, kind, samples=["x" * 200] * 3) for s, kind in enumerate(report_charts.MARKS, 5000) if kind]
    start = START | {"command": ["dex", "pretrain", "--out", "/a/very/long/path" * 9], "os": "o" * 120, "steps": 40000}
    write(folder, rows, events, start, {"run": {"seed": seed}})
    shutil.copytree(pictures, folder / "pictures", dirs_exist_ok=True)
    return folder


@pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")
@pytest.mark.parametrize("count", [0, 1, 2], ids=["a small run", "one run", "two runs"])
def test_in_a_browser_nothing_overflows_overlaps_or_stays_blank(real, tmp_path, count):
    """In frames of a desktop's and a telephone's width."""
    wide = [write_wide(tmp_path / ("run-of-a-long-name" * 4 + str(i)), real / "pictures", i) for i in range(count)]
    page = report(wide or [real], tmp_path / "r.html")
    source = page.read_text()
    frames = ""
    for name, width in (("desktop", 1200), ("phone", 400)):
        inner = re.sub(r"<meta http-equiv[^>]*>", "", source).replace(
            "</body>", MEASURE.replace("NAME", f"'{name}'") + "</body>"
        )
        frames += (
            f'<iframe srcdoc="{html.escape(inner, quote=True)}" style="width:{width}px;height:900px;border:0"></iframe>'
        )
    (tmp_path / "frames.html").write_text(f"<!doctype html><body>{frames}</body>", encoding="utf-8")
    seen = chromium(tmp_path / "frames.html", tmp_path / "profile", "--window-size=1300,1000")
    for name in ("desktop", "phone"):
        found = re.search(rf'<body[^>]*data-{name}="([^"]*)"', seen)
        assert found, seen[:300]
        result = json.loads(html.unescape(found[1]))
        assert result["bad"] == [], "\n".join(result["bad"])
        assert result["drawn"] > 12 and result["images"] == max(count, 1) and len(result["tips"]) == 1
        assert "at step" in result["tips"][0] and "held out: " in result["tips"][0]


@pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")
def test_the_browser_lets_the_script_run_and_nothing_else(few, tmp_path):
    page = report([few], tmp_path / "r.html")
    seen = chromium(page, tmp_path / "profile")
    assert seen.count('<div class="tip" hidden="">') == seen.count("data-x=")
    hostile = page.read_text().replace("</main>", "<script>document.title = 'owned'</script></main>")
    (tmp_path / "hostile.html").write_text(hostile)
    assert "<title>few: DEX" in chromium(tmp_path / "hostile.html", tmp_path / "profile")
