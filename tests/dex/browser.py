"""A page in chromium, where it is installed."""

import html
import json
import os
import re
import shutil
import subprocess

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
    const ink = [...svg.querySelectorAll('.line:not(.dots), .cell, .bar')], dots = svg.querySelector('.dots');
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
  const tips = [];
  for (const hero of document.querySelectorAll(HERO)) {
    const shown = [...hero.querySelectorAll('svg[data-x]')].find(s => s.getBoundingClientRect().width);
    if (!shown) continue;
    const box = shown.getBoundingClientRect();
    shown.dispatchEvent(new PointerEvent('pointermove', {clientX: box.right - 5, clientY: box.top + 50}));
    tips.push(...[...hero.querySelectorAll('.tip')].filter(t => !t.hidden).map(t => t.textContent));
  }
  const drawn = document.querySelectorAll('svg[data-x]').length;
  parent.document.body.dataset[NAME] = JSON.stringify({bad, tips, drawn, images: document.images.length});
});
</script>"""
"""Reports what does not fit, in a frame; ``HERO`` chooses the figures whose values under the pointer are asked for."""


def chromium(page, profile, *options):
    """The DOM after the page has loaded, in a browser that nothing else uses."""
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"]
    command += ["--disable-background-networking", "--disable-component-update", "--disable-sync"]
    command += [f"--user-data-dir={profile}", "--virtual-time-budget=20000", *options, "--dump-dom", page.as_uri()]
    environment = {k: v for k, v in os.environ.items() if k not in ("DISPLAY", "DBUS_SESSION_BUS_ADDRESS")}
    return subprocess.run(command, capture_output=True, text=True, timeout=180, check=True, env=environment).stdout


def measured(source, tmp_path, hero="figure.wide"):
    """What `MEASURE` finds of the page in frames of a desktop's and a telephone's width, by their names."""
    frames = ""
    for name, width in (("desktop", 1200), ("phone", 400)):
        script = MEASURE.replace("NAME", f"'{name}'").replace("HERO", f"'{hero}'")
        inner = re.sub(r"<meta http-equiv[^>]*>", "", source).replace("</body>", script + "</body>")
        frames += (
            f'<iframe srcdoc="{html.escape(inner, quote=True)}" style="width:{width}px;height:900px;border:0"></iframe>'
        )
    (tmp_path / "frames.html").write_text(f"<!doctype html><body>{frames}</body>", encoding="utf-8")
    seen = chromium(tmp_path / "frames.html", tmp_path / "profile", "--window-size=1300,1000")
    found = {}
    for name in ("desktop", "phone"):
        match = re.search(rf'<body[^>]*data-{name}="([^"]*)"', seen)
        assert match, seen[:300]
        found[name] = json.loads(html.unescape(match[1]))
    return found
