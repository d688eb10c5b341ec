"""scripts/docs.py: what it changes in a page, the faults it finds in a site, and the site as it is built and seen."""

import functools
import html
import http.server
import json
import re
import shutil
import subprocess
import threading
from pathlib import Path

import pytest

import docs

ROOT = Path(__file__).parents[2]
GENERATOR = ROOT / ".venv" / "docs" / "bin" / "python"
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
SEEN = ("index", "faq", "troubleshooting", "tasks", "study", "kernels", "architecture", "api/dexkernels", "api/data")
"""Pages that are looked at: the start, long ones, wide tables, pictures, and the API."""


@pytest.fixture
def stage(tmp_path):
    return tmp_path / "stage"


def test_links_within_docs_stay_and_those_out_of_it_lead_to_copies(stage):
    text = "[a](layer.md#weights) [b](../scripts/study.py) [c](https://arxiv.org) [d](#here)\n"
    got = docs.page_for_the_site(text, ROOT / "docs" / "study-plan.md", stage)
    assert got == "[a](layer.md#weights) [b](files/scripts/study.py) [c](https://arxiv.org) [d](#here)\n"
    assert (stage / "files/scripts/study.py").read_bytes() == (ROOT / "scripts/study.py").read_bytes()


def test_the_changelog_becomes_a_page_beside_the_others(stage):
    assert docs.page_for_the_site("[a](docs/layer.md)", ROOT / "CHANGELOG.md", stage) == "[a](layer.md)"


def test_words_for_tests_are_taken_from_code_blocks_and_their_links_are_left_alone(stage):
    text = "```python needs=run\nx = '[a](nothing.md)'\n```\n"
    assert docs.page_for_the_site(text, ROOT / "docs" / "layer.md", stage) == text.replace(" needs=run", "")


@pytest.mark.parametrize("address", ["nothing.md", "../dexkernels/ops"])
def test_a_link_to_nothing_or_to_a_folder_is_refused(address, stage):
    with pytest.raises(ValueError, match=f"docs/layer.md: expected a link to a file, got {re.escape(address)}"):
        docs.page_for_the_site(f"[a]({address})", ROOT / "docs" / "layer.md", stage)


@pytest.mark.parametrize(
    "page, problem",
    [
        ('<a href="gone.html">', "dead link: gone.html"),
        ('<a href="b.html#gone">', "dead anchor: b.html#gone"),
        ('<a href="#gone">', "dead anchor: #gone"),
        ('<img src="gone.png">', "dead link: gone.png"),
        ('<script src="https://cdn.example/x.js"></script>', "loads https://cdn.example/x.js"),
        ('<link rel="preconnect" href="//fonts.example">', "loads //fonts.example"),
        ('<img srcset="https://cdn.example/x.png 2x">', "loads https://cdn.example/x.png"),
    ],
)
def test_faults_are_found(page, problem, tmp_path):
    (tmp_path / "a.html").write_text(page)
    (tmp_path / "b.html").write_text('<h1 id="here">')
    assert docs.faults(tmp_path) == [docs.Fault("a.html", problem)]


def test_what_is_in_order_is_no_fault(tmp_path):
    page = '<a href="b.html#here"> <a href="https://arxiv.org"> <img src="data:image/png;base64,x"> <a href="./b.html">'
    (tmp_path / "a.html").write_text(page)
    (tmp_path / "b.html").write_text('<h1 id="here">')
    (tmp_path / "own.css").write_text("a { background: url(b.html) }")
    assert docs.faults(tmp_path) == []
    (tmp_path / "own.css").write_text("a { background: url(https://fonts.example/x) }")
    assert docs.faults(tmp_path) == [docs.Fault("own.css", "loads from another server")]


def test_a_folder_that_is_no_site_is_not_replaced(tmp_path, monkeypatch, capsys):
    (tmp_path / "kept").write_text("mine")
    monkeypatch.setattr("sys.argv", ["docs.py", "--out", str(tmp_path)])
    assert docs.main() == 2
    assert capsys.readouterr().err == f"--out: expected a new folder or an earlier site, got {tmp_path}\n"
    assert (tmp_path / "kept").read_text() == "mine"


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    if not GENERATOR.exists():
        pytest.skip("`make docs` has not installed the generator")
    out = tmp_path_factory.mktemp("site") / "a site"
    command = [GENERATOR, ROOT / "scripts" / "docs.py", "--out", out]
    built = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert built.returncode == 0, built.stdout + built.stderr
    return out


@pytest.mark.slow
def test_the_site_has_a_page_for_each_file_and_an_anchor_for_each_public_name(site):
    pages = {path.relative_to(ROOT / "docs").with_suffix(".html") for path in (ROOT / "docs").rglob("*.md")}
    assert not {page for page in pages if not (site / page).is_file()} and (site / "changelog.html").is_file()
    for page in (ROOT / "docs" / "api").glob("*.md"):
        anchors = docs.Page((site / "api" / f"{page.stem}.html").read_text(encoding="utf-8")).anchors
        assert not set(re.findall(r"^::: (\S+)$", page.read_text(encoding="utf-8"), re.M)) - anchors


FRAMES = """<!doctype html><body><script>
addEventListener('load', () => {
  const found = [];
  for (const frame of document.querySelectorAll('iframe')) {
    const page = frame.contentDocument, wide = page.documentElement.clientWidth;
    const overflow = Math.max(page.documentElement.scrollWidth, page.body.scrollWidth) - wide;
    const undecoded = [...page.images].filter(image => !image.naturalWidth).map(image => image.src);
    const article = page.querySelector('article').getBoundingClientRect();
    const cut = [...page.querySelectorAll('article :is(h1, h2, h3, h4, p, li, img)')].filter(e => {
      const box = e.getBoundingClientRect();
      return box.width && !e.closest('table') && (box.right > wide + 1 || box.left < -1);
    }).map(e => e.textContent.slice(0, 60));
    const loaded = frame.contentWindow.performance.getEntriesByType('resource').map(entry => entry.name);
    const abroad = loaded.filter(name => !name.startsWith(location.origin + '/'));
    found.push({page: frame.title, wide, overflow, undecoded, cut, abroad, loaded, height: article.height});
  }
  document.body.dataset.found = JSON.stringify(found);
});
</script>"""


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")
def test_pages_fit_a_desktop_and_a_telephone_and_load_nothing_from_elsewhere(site, tmp_path):
    frames = "".join(
        f'<iframe src="{page}.html" title="{page}" style="width:{width}px;height:900px"></iframe>'
        for page in SEEN
        for width in (1280, 400)
    )
    (site / "frames.html").write_text(FRAMES + frames)
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=site)
    handler.log_message = lambda *args: None
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--no-proxy-server"]
        command += ["--disable-background-networking", f"--user-data-dir={tmp_path}", "--window-size=1400,1000"]
        address = f"http://127.0.0.1:{server.server_port}/frames.html"
        done = subprocess.run(
            [*command, "--dump-dom", address], capture_output=True, text=True, timeout=180, check=True
        )
        server.shutdown()
    found = json.loads(html.unescape(re.search(r'data-found="([^"]*)"', done.stdout)[1]))
    assert [frame["page"] for frame in found] == [page for page in SEEN for _ in (1280, 400)]
    assert {round(frame["wide"], -2) for frame in found} == {1300, 400}
    assert all(len(frame["loaded"]) >= 4 for frame in found)  # Three style sheets and the script
    bad = [f for f in found if f["overflow"] > 0 or f["undecoded"] or f["cut"] or f["abroad"] or f["height"] < 500]
    assert not bad
