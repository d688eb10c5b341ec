"""Run folders as `dex.train.runlog` leaves them, and their page taken apart."""

import json
from html.parser import HTMLParser
from pathlib import Path

from dex import config
from dex.report.page import report

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
    settings = config.from_dict({"data": {"batch_size": 16}, **(changes or {})}, config.preset("demo"))
    (folder / "pictures").mkdir(parents=True)
    (folder / "config.yaml").write_text(config.to_yaml(settings), encoding="utf-8")
    (folder / "run.json").write_text(json.dumps({"starts": [start, *starts]}, indent=1) + "\n", encoding="utf-8")
    for name, lines in (("metrics.jsonl", rows), ("events.jsonl", events)):
        (folder / name).write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def event(step, kind, **details):
    return {"step": step, "event": kind, **details}


def read(*runs, out):
    return Page(report([Path(r) for r in runs], Path(out)))
