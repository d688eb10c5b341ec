"""The page in chromium, where it is installed."""

import random
import shutil

import pytest
from browser import CHROMIUM, chromium, measured
from run_folders import START, event, held_out, row, write

from dex.report import charts as report_charts
from dex.report.page import report


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
    for result in measured(page.read_text(), tmp_path).values():
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
