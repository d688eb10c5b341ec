import re

import pytest
from run_folders import read, row, write

from dex.report import charts as report_charts
from dex.report.charts import Line, curves


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "–"),
        (0.0, "0"),
        (0.82131, "0.8213"),
        (2.15, "2.150"),
        (1250.0, "1,250"),
        (12345.6, "12,346"),
        (1.5e-5, "1.500e-05"),
    ],
)
def test_numbers(value, text):
    assert report_charts.number(value) == text


def ticks(chart):
    """What stands at the y axis."""
    return re.findall(r'<text x="41" [^>]*>([^<]*)</text>', chart)


@pytest.mark.parametrize(
    ("values", "how", "want"),
    [
        ([0.0, 1.0], {}, ["0", "0.2", "0.4", "0.6", "0.8", "1.0"]),
        ([0.0, 4.0], {}, ["0", "1", "2", "3", "4"]),
        ([0.1, 30.0], {"log": True}, ["0.1", "1", "10"]),
        ([1e-4, 1e4], {"log": True}, ["1e-4", "0.01", "1", "100", "10k"]),
        ([0.3, 2.5], {"log": True}, ["0.5", "1", "2"]),
        ([1.0, 2.0], {"log": True}, ["0", "0.5", "1.0", "1.5", "2.0"]),  # too little for a logarithmic scale
        ([0.0, 30.0], {"log": True}, ["0", "10", "20", "30"]),  # zero has no logarithm
        ([0.0, 1.5e-4], {}, ["0", "5e-5", "1e-4", "1.5e-4"]),
        ([0.99, 0.999], {}, ["0.990", "0.992", "0.994", "0.996", "0.998"]),
        ([0.0, 0.08], {"percent": True}, ["0%", "2%", "4%", "6%", "8%"]),
        ([61200.0, 61500.0], {}, ["61.2k", "61.3k", "61.4k", "61.5k"]),
        ([5.0, 5.0], {}, ["4.6", "4.8", "5.0", "5.2", "5.4"]),
    ],
)
def test_ticks_are_round_and_cover_the_values(values, how, want):
    assert ticks(curves("title", [Line("line", list(enumerate(values)))], **how)) == want


def test_a_line_goes_through_its_points():
    chart = curves("title", [Line("line", [(0, 0.0), (50, 10.0), (100, None), (150, 5.0), (200, 5.0)])])
    places = [[tuple(map(float, p.split())) for p in part.split("L")] for part in chart_path(chart).split("M")[1:]]
    assert [len(p) for p in places] == [2, 2]  # a gap between them
    (x0, y0), (x1, y1) = places[0]
    (x3, y3), (x4, y4) = places[1]
    assert x0 == 46 and x4 == 350 and x1 - x0 == pytest.approx(76, abs=0.1) and x3 - x1 == pytest.approx(152, abs=0.1)
    assert y0 == 168 and y3 == y4 and (y0 - y3) == pytest.approx((y0 - y1) / 2, abs=0.11) and y1 > 14


def chart_path(chart):
    return re.search(r'data-p="[^"]*" d="([^"]*)"', chart)[1]


def test_nothing_to_draw_is_no_chart():
    assert curves("title", []) == "" == curves("title", [Line("line", []), Line("line", [(1, None)])])


def test_a_ninth_line_is_told_from_the_first():
    chart = curves("title", [Line(f"run {i}", [(0, 1.0), (1, i + 1.0)], i) for i in range(10)], key=True)
    assert chart.count('class="line s0"') == 2 == chart.count('class="line s0 dashed"')  # in the key and in the chart


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
