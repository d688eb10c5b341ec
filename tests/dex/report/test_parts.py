import re

from run_folders import event, held_out, read, row, write

from dex.report.parts import Drawer, details, kind_of, tell
from dex.report.runs import read_run


def test_charts_that_are_compared_have_one_scale(few, tmp_path):
    other = write(tmp_path / "other", [row(8, usage_entropy=[0.125, 0.25]), held_out(8)])
    page = read(few, other, out=tmp_path / "r.html")
    charts = page.source.split("<figcaption>")
    for titles in (("Usage entropy: few", "Usage entropy: other"), ("ct", "mr")):
        scales = [re.findall(r'<text x="41" y="[^"]*" [^>]*>[^<]*', c) for c in charts if c[3:].startswith(titles)]
        assert len(scales) == 2 and len(scales[0]) > 2 and scales[0] == scales[1]


def test_the_monolithic_control_has_no_losses_of_experts(few, tmp_path):
    rows = [row(4, align_loss=0.0, balance_loss=0.0, usage_entropy=[], usage_min_share=[]), held_out(4)]
    plain = write(tmp_path / "plain", rows, changes={"model": {"num_experts": 0}})
    page = read(plain, out=tmp_path / "r.html")
    assert "Align loss" not in page.lines and "Exploration noise" not in page.lines and "experts" not in page.text
    assert "monolithic control" in page.section_words("") and "align loss" not in page.section_words("")
    both = read(few, plain, out=tmp_path / "r.html")
    assert list(both.lines["Align loss"]) == ["few"] and list(both.lines["Masked loss"])[2] == "plain, training"


def test_an_event_in_words():
    spike = event(3, "loss spike", loss=2.5, samples=["a", "b"], reason="", layer=None)
    assert details(spike) == "loss 2.5; samples a, b" and tell(spike) == "loss spike: loss 2.5; samples a, b"
    assert kind_of(spike) == kind_of(event(3, "a spike of something")) == "loss spike"
    assert tell(event(3, "resumed")) == "resumed"


def test_marks_are_of_one_run_or_of_all(tmp_path):
    events = [event(5, "preempted"), event(6, "unused experts", layer=0)]
    runs = [read_run(write(tmp_path / name, [row(8)], events), name) for name in ("a", "b")]
    draw = Drawer(runs)
    assert [mark.text for mark in draw.marks()] == ["a, step 5: preempted", "b, step 5: preempted"]
    assert [mark.step for mark in draw.marks(unused=True, run=runs[1])] == [5, 6]
    assert Drawer(runs[:1]).marks()[0].text == "step 5: preempted"
