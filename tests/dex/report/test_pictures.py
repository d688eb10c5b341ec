import re
from xml.etree import ElementTree

import pytest

from dex.report.charts import Line, curves, heatmap
from dex.report.pictures import Bar, Bars, along, bars, matrix, svg_file


def two_bars(**more):
    series = [Bars("one", [Bar(0.5, 0.4, 0.7), None], 0), Bars("other <", [Bar(-0.25, -0.5, 0.0), Bar(1, 1, 1)], 1)]
    return bars("Gap & co", ["layer 0", "all"], series, **more)


def drawings(figure):
    return [svg for svg in ElementTree.fromstring(figure).iter("svg") if svg.get("role") == "img"]


def test_bars_stand_on_zero_with_their_intervals():
    for svg in drawings(two_bars()):
        groups = [g for g in svg.iter("g") if g.get("class") == "bar"]
        assert [g.get("data-v") for g in groups] == ["0.5 0.4 0.7", "-0.25 -0.5 0", "1 1 1"]
        zero = float(next(p for p in svg.iter("path") if p.get("class") == "axis").get("d").split()[1].split("H")[0])
        up, down, full = (next(g.iter("rect")) for g in groups)
        assert float(up.get("y")) + float(up.get("height")) == pytest.approx(zero, abs=0.2)
        assert float(down.get("y")) == pytest.approx(zero, abs=0.2)
        assert float(full.get("height")) == pytest.approx(2 * float(up.get("height")), abs=0.3)
        whisker = next(groups[0].iter("path")).get("d")  # M x low V high ...
        low, high = map(float, re.match(r"M[\d.]+ ([\d.]+)V([\d.]+)M", whisker).groups())
        tall = float(full.get("height"))
        assert (zero - low, zero - high) == (pytest.approx(0.4 * tall, abs=0.3), pytest.approx(0.7 * tall, abs=0.3))
    assert len(drawings(two_bars())) == 2 and bars("t", ["a"], [Bars("x", [None], 0)]) == ""


def test_bars_that_are_compared_have_one_scale():
    one, two = (bars("t", ["a"], [Bars("x", [Bar(v, v, v)], 0)], span=(0, 1)) for v in (0.2, 0.4))
    heights = [float(next(drawings(f)[0].iter("rect")).get("height")) for f in (one, two)]
    assert heights[1] == pytest.approx(2 * heights[0], abs=0.3)


def test_a_matrix_shows_sign_size_and_numbers():
    figure = matrix("m", ["CT", "MR"], ["1", "2"], [[1.0, -0.5], [None, 0.004]], top=1.0, marked=[(0, 1)], unit="u")
    (svg,) = drawings(figure)
    cells = list(svg.iter("rect"))
    assert [c.get("class") for c in cells] == ["cell pos", "cell neg framed", "cell pos"]
    assert [c.get("fill-opacity") for c in cells] == ["0.750", "0.375", "0.003"]
    assert [c.get("data-v") for c in cells] == ["1", "-0.5", "0.004"]
    assert [t.text for t in svg.iter("text") if t.get("class") == "in"] == ["1.00", "-.50", "0"]
    many = matrix("m", ["a"], [str(i) for i in range(40)], [[0.5] * 40], top=1.0)
    assert not [t for t in drawings(many)[0].iter("text") if t.get("class") == "in"]


def test_figures_become_one_file_that_needs_nothing():
    lines = curves("Loss", [Line("a", [(0, 1.0), (5, 0.5)])], unit="mean", key=True)
    data = svg_file([two_bars(), "", along(lines, "component"), heatmap("h", ["x"], [[0.5, 0.5]], 1.0)], 2)
    tree = ElementTree.fromstring(data)
    text = data.decode()
    assert "var(" not in text and "http" not in text.replace("http://www.w3.org/2000/svg", "")
    assert {"Gap & co", "Loss ", "h"} <= {(t.text or "") for t in tree.iter() if t.get("class") == "title"}
    assert "other &lt;" in text and len(tree.findall("{*}g")) == 3
    _, _, width, height = map(float, tree.get("viewBox").split())
    assert width > 2 * 560 and height > 300
    assert svg_file([]) == b"" and svg_file([""]) == b""


def test_an_axis_of_its_own_is_named_for_the_pointer():
    figure = along(curves("s", [Line("a", [(1, 1.0), (2, 0.5)])]), "component")
    assert drawings(figure)[0].get("data-axis") == "component" and drawings(figure)[0].get("data-x")


def test_names_of_groups_have_room():
    many = [f"layer {i}" for i in range(24)]
    one = Bars("x", [Bar(1, 1, 1)] * 24, 0)
    for svg in drawings(bars("t", many, [one])):
        texts = [t for t in svg.iter("text") if t.get("text-anchor") == "middle"]
        places = [float(t.get("x")) for t in texts]
        assert texts[0].text == "layer 0" and texts[-1].text == "layer 23"
        assert min(b - a for a, b in zip(places, places[1:], strict=False)) >= 8 * 6.2
    long = bars("t", ["a" * 90, "b"], [Bars("x", [Bar(1, 1, 1)] * 2, 0)])
    names = [t.text for t in drawings(long)[0].iter("text") if t.get("text-anchor") == "middle"]
    assert names[0].endswith("…") and len(names[0]) * 6.2 < 160 and names[1] == "b"
