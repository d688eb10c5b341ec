import re

import pytest

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


def test_colours_are_told_from_the_ground_in_light_and_dark():
    def luminance(colour):
        colour = colour if len(colour) == 7 else "#" + "".join(2 * c for c in colour[1:])
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        parts = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
        return 0.2126 * parts[0] + 0.7152 * parts[1] + 0.0722 * parts[2]

    def contrast(a, b):
        a, b = sorted((luminance(a), luminance(b)))
        return (b + 0.05) / (a + 0.05)

    light, dark = (
        dict(re.findall(r"--([\w-]+):(#\w+)", part))
        for part in report_charts.STYLE.split("*{box")[0].split("@media (pref")
    )
    assert set(dark) == set(light)
    for theme in (light, dark):
        for text in ("ink", "quiet", "accent"):
            assert contrast(theme[text], theme["page"]) >= 4.5 and contrast(theme[text], theme["panel"]) >= 4.5
        assert contrast(theme["warn"], theme["warn-page"]) >= 4.5
        lines = [theme[f"s{i}"] for i in range(report_charts.COLOURS)]
        marks = [theme[k] for k in ("resume", "preempt", "bad", "spike", "unused")]
        for colour in [*lines, *marks, *(report_charts.layer_colour(n, 12) for n in range(12))]:
            assert contrast(colour, theme["page"]) >= 3, colour


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
