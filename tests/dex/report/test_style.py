import re

from dex.report import charts as report_charts
from dex.report.style import STYLE


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
        dict(re.findall(r"--([\w-]+):(#\w+)", part)) for part in STYLE.split("*{box")[0].split("@media (pref")
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
