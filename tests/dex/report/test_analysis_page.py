import html
import json
import re

import pytest

from dex.report import analysis_page as page
from dex.report.analysis_parts import names

SECTIONS = ["swap", "steps", "experts", "routing", "overlap", "ablation", "similarity", "gradients"]
SECTIONS += ["probe", "spectra", "maps", "heldout"]


def test_every_section_and_every_file(analysis, tmp_path):
    written = page.write(analysis, tmp_path / "a b" / "out")
    source = written.read_text()
    there = re.findall(r'<section id="(\w+)"', source)
    assert there == [s for s in SECTIONS if s != "probe" or analysis.findings.probe is not None]
    record = json.loads((written.parent / "findings.json").read_text())
    for name in record["files"]:
        assert (written.parent / name).stat().st_size > 10 and name in source
    for anchor in set(there) - {"maps"}:
        assert f"{anchor}.csv" in record["files"]
    assert not re.search(r"https?:|//[a-z]|@import|url\(", re.sub(r"base64,[A-Za-z0-9+/=]+", "", source))
    assert 'class="read"' in source and source.count('class="read"') == len(there)
    assert {p.name for p in written.parent.iterdir()} == {"index.html", "findings.json", *record["files"]}


def test_the_verdict_comes_first_and_the_numbers_are_those_of_the_record(analysis, tmp_path):
    source = page.write(analysis, tmp_path).read_text()
    record = json.loads((tmp_path / "findings.json").read_text())
    verdict = re.search(r'<p class="verdict">(.*?)</p>', source)[1]
    assert html.unescape(verdict) == record["verdict"]["text"]
    assert source.index(verdict) < source.index("<table")
    assert record["held_out"]["images"] == len(analysis.material.held_out.ids)
    assert record["found"]["loss"]["value"] == analysis.findings.loss.value
    gap = next(g for g in record["found"]["gaps"] if g["kind"] == "other modality" and g["layer"] is None)
    told = f"{gap['gap']['value']:.6g} {gap['gap']['low']:.6g} {gap['gap']['high']:.6g}"
    assert f'data-v="{told}"' in source
    assert [f["step"] for f in record["curve"]] == [0, 5, 10, 12] and record["step_0"]["step"] == 0
    assert record["other"]["name"] == "step-00000010" and "image_loss" not in record["found"]
    assert f"{len(analysis.material.held_out.ids)} held-out images" in source


def test_nothing_is_claimed_of_what_was_not_measured(analysis):
    alone = analysis._replace(findings=analysis.findings._replace(gaps=None, modality_gap=None))
    assert page.concluded(alone, alone.findings).kind == "not measured"
    dense = analysis.findings._replace(gaps=None, layers=[])
    assert page.concluded(alone, dense).kind == "no experts"


def test_the_table_for_the_screen(analysis):
    lines = page.loss_table(analysis).splitlines()
    assert [line.split()[0] for line in lines[1:]] == [*names(analysis), "all"]
    first = names(analysis)[0]
    assert lines[1].split() == [
        first,
        *(f"{f.modality_loss[first]:.4f}" for f in (analysis.findings, analysis.start, analysis.other.findings)),
    ]


def test_a_page_that_cannot_be_written_leaves_the_earlier_one(analysis, tmp_path, monkeypatch):
    page.write(analysis, tmp_path)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    with pytest.raises(ZeroDivisionError):
        monkeypatch.setattr(page, "findings", lambda a: 1 / 0)
        page.write(analysis._replace(name="other"), tmp_path)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before
