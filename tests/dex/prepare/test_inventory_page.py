"""An inventory as text, page and JSON; the page at two widths in a browser, where one is installed."""

import json
import re
from collections import Counter

import pytest
from browser import CHROMIUM, chromium

from dex.prepare import inventory_page
from dex.prepare.discover import Undetermined
from dex.prepare.inventory import Inventory
from dex.prepare.survey import Alike, Kind, Leaf, Measured, Survey

CT, PHOTO = Kind("dicom", "CT", False), Kind("picture", "", False)


@pytest.fixture
def taken():
    leaves = {Leaf(CT, "axial", 512, 512): Alike(3, 300, 0, (0.7, 0.9), (5.0, 5.0))}
    leaves |= {Leaf(PHOTO, "", 100 + n, 200 + n): Alike(1, 1) for n in range(9)}
    survey = Survey(
        leaves=leaves,
        refused=Counter({("", "secondary capture", "a secondary capture"): 7, ("CT", "inconsistent", "<b>"): 1}),
        groups={("patient", "a"), ("patient", "b"), ("file", "c")},
        lengthless=1,
    )
    sample = {CT: Measured(units=1, expected=30, kept=27, bytes=270_000, seconds=0.5)}
    undetermined = Undetermined("folder", Counter({".jpg": 9}), False)
    return [Inventory("folder", 320, 2**20, survey, sample, {".txt": 2, "symbolic links": 1}, undetermined, 2)]


def test_text(taken):
    text = inventory_page.to_text(taken)
    assert text.startswith("folder: 320 files, 1 MB, 2 patients and 1 folder or file that name no patient, 309 slices")
    assert "3 series, 300 slices, axial\n      512 x 512 pixels; 0.7 to 0.9 mm per pixel, 5 mm between slices" in text
    assert "unknown" in text and "5 other sizes, 100 x 200 to 108 x 208" in text
    assert "7 secondary capture: a secondary capture" in text and "2 .txt" in text
    assert "about 270 of 300 slices kept (90 %), 3 MB, 2s with 2 workers" in text
    assert "Not measured: 9 slices" in text and "DICOM CT 60." in text


def test_json_tells_what_is_exact_from_what_is_estimated(taken):
    html, data = inventory_page.build(taken)
    (row,) = json.loads(data)
    assert row["exact"]["slices"] == 309 and row["exact"]["undetermined"] == [".jpg"] and row["exact"]["patients"] == 2
    assert row["estimate"]["kept"] == 270 and row["estimate"]["rates"][0]["slices_per_second"] == 60
    assert (html, data) == inventory_page.build(taken)


def test_the_page_escapes_and_fetches_nothing(taken):
    html = inventory_page.build(taken)[0].decode()
    assert "inconsistent: &lt;b&gt;" in html and "<script" not in html and "http://" not in html
    assert "will not start" in html and re.search(r"<dt>Files</dt><dd><b>320</b>", html)


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")
@pytest.mark.parametrize("width", [400, 1280])
def test_in_a_browser(taken, width, tmp_path):
    """Nothing is wider than the window."""
    measure = (
        "<script>addEventListener('load', () => { const wide = document.documentElement.clientWidth;"
        "document.title = JSON.stringify([wide, Math.max(...[...document.body.querySelectorAll('*')]"
        ".map(e => e.getBoundingClientRect().right))]) })</script>"
    )
    html = inventory_page.build(taken)[0].decode()
    html = re.sub(r"<meta http-equiv.*?>", "", html).replace("</body>", f"{measure}</body>")
    frame = tmp_path / "frame.html"
    (tmp_path / "page.html").write_text(html)
    script = "f.onload=()=>document.title=f.contentDocument.title"
    frame.write_text(f"<iframe id=f src=page.html width={width} height=900></iframe><script>{script}</script>")
    dom = chromium(frame, tmp_path / "profile", "--allow-file-access-from-files")
    wide, right = json.loads(re.search(r"<title>(.*?)</title>", dom).group(1))
    assert 0.9 * width < wide <= width and right <= wide + 1
