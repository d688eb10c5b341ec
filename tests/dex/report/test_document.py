import os

from dex.report.document import UNFINISHED_AFTER, Section, document, write


def test_sections_without_content_are_left_out_and_texts_are_escaped():
    sections = [Section("a", "One & two", "<p>here</p>"), Section("b", "None", "")]
    page = document("kind <x>", "a <b> run", "<p>head</p>", ["less < more"], sections)
    assert '<a href="#a">One &amp; two</a>' in page and "None" not in page
    assert "<h1>a &lt;b&gt; run</h1><p>head</p>" in page and '<p class="notice">less &lt; more.</p>' in page
    assert "<title>a &lt;b&gt; run: kind &lt;x&gt;</title>" in page and "default-src 'none'" in page


def test_a_page_is_written_whole_with_its_mode_and_old_remains_go(tmp_path):
    old, young = tmp_path / "p.html.1-a.partial", tmp_path / "p.html.2-b.partial"
    old.write_text("cut sh")
    young.write_text("cut sh")
    os.utime(old, (0, 0))
    write("page é \ud800", tmp_path / "p.html", 0o600)
    assert (tmp_path / "p.html").read_bytes() == "page é ?".encode() and not old.exists() and young.exists()
    assert (tmp_path / "p.html").stat().st_mode & 0o777 == 0o600 and UNFINISHED_AFTER >= 600
