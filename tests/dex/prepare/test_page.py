"""The frame of a page, and numbers on it."""

import pytest

from dex.prepare import page


def test_a_document_has_its_sections_and_fetches_nothing():
    sections = [page.Section("one", "First", "<p>a</p>"), page.Section("two", "Second", "<p>b</p>")]
    html = page.document("A & B", "<header>h</header>", sections)
    assert "<title>A &amp; B</title>" in html and "default-src 'none'" in html and "<script" not in html
    assert html.index('href="#one"') < html.index('href="#two"') < html.index('id="one"') < html.index('id="two"')
    tile = page.tiles([page.Tile("Files", "3", "of 9")])
    assert tile == '<dl class="tiles"><div><dt>Files</dt><dd><b>3</b><span>of 9</span></dd></div></dl>'


@pytest.mark.parametrize(
    "part, whole, text",
    [
        (0, 9, "0 %"),
        (9, 9, "100 %"),
        (1, 10_000, "< 0.1 %"),
        (9999, 10_000, "99.9 %"),
        (1, 3, "33 %"),
        (1, 20, "5.0 %"),
    ],
)
def test_a_share_is_whole_only_where_it_is(part, whole, text):
    assert page.percent(part, whole) == text


def test_counts():
    assert (page.count(1, "file"), page.count(2345, "file"), page.number(1000)) == ("1 file", "2,345 files", "1,000")
