import re
from xml.etree import ElementTree

from evaluations import classified

from dex.report.task_charts import Strip, reliability_diagram, strips

ROWS = [
    Strip("liver & gall", [0.5, 0.75, 1.0], 0.75, 0.6, 0.9),
    Strip("a name that is far too long for its place", [0.25], 0.25, None, None),
    Strip("never", [], None, None, None),
    Strip("interval alone", [], 0.5, 0.25, 0.75),
]


def places(figure, kind):
    """Left ends of the strokes of a class in the broad drawing."""
    broad = figure.partition('class="broad"')[2]
    paths = re.findall(rf'class="{kind}"[^>]* d="([^"]+)"', broad)
    return [float(x) for path in paths for x in re.findall(r"M([\d.]+)", path)]


def test_every_case_is_a_dot_at_its_value():
    figure = strips("Dice", ROWS, span=(0.0, 1.0))
    ElementTree.fromstring(figure)
    dots = places(figure, "line faint dots s0")
    assert len(dots) == 4
    low, high, mid = dots[0], dots[2], dots[1]  # 0.5, 1.0, 0.75
    assert abs(mid - (low + high) / 2) < 0.2 and dots[3] < low
    assert 'data-v="0.5 0.75 1"' in figure and "liver &amp; gall" in figure and "never" not in figure
    assert "a name that is far too long" in figure and "a name that is far …" in figure
    means, whiskers = places(figure, "line dots s1"), places(figure, "line s1")
    assert len(means) == 3 and len(whiskers) == 2 and abs(means[0] - mid) < 0.2


def test_without_a_value_there_is_no_figure():
    assert strips("Dice", [ROWS[2]]) == strips("Dice", []) == ""
    assert "cases" not in re.sub("every case", "", strips("Dice", [ROWS[3]]))


def test_values_that_are_all_alike_have_an_axis():
    for value in (0.0, 3.0):
        ElementTree.fromstring(strips("HD95", [Strip("x", [value] * 5, value, None, None)], unit="mm"))


def test_the_diagram_shows_every_bin_that_holds_a_case():
    found = classified().reliability()
    figure = reliability_diagram(found)
    ElementTree.fromstring(figure)
    held = [b for b in found.bins if b.cases]
    drawn = re.findall(r'data-v="([\d.]+) ([\d.]+) (\d+)"', figure)
    assert [int(cases) for *_, cases in drawn] == [b.cases for b in held]
    assert [float(confidence) for confidence, *_ in drawn] == [round(b.confidence, 6) for b in held]
