"""The page in chromium, where it is installed."""

import html
import json
import os
import random
import re
import shutil
import subprocess

import pytest
from run_folders import START, event, held_out, row, write

from dex.report import charts as report_charts
from dex.report.page import report

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
