import csv
import io

import pytest
from PIL import Image

from dex.analysis.examine import paired
from dex.analysis.intervals import Interval
from dex.report import analysis_features as features
from dex.report.analysis_parts import names


def rows(block):
    return list(csv.DictReader(io.StringIO(block.files[f"{block.anchor}.csv"].decode())))


def test_the_held_out_loss(analysis):
    block = features.heldout(analysis)
    table = {(r["model"], r["modality"]): r for r in rows(block)}
    for name in names(analysis):
        assert float(table["step 12", name]["loss"]) == analysis.findings.modality_loss[name]
    assert float(table["step 0", "all"]["low"]) == analysis.start.loss.low
    gap = paired(analysis.findings, analysis.other.findings, analysis.material.groups)
    assert float(table["this run less step-00000010", "all"]["loss"]) == gap.value
    other = analysis._replace(other=analysis.other._replace(comparable=False))
    assert "This run minus" in block.content and "This run minus" not in features.heldout(other).content


def test_the_probe_stands_beside_pixels_and_step_0(analysis):
    some = Interval(0.5, 0.25, 0.75)
    block = features.probe(analysis._replace(pixels=some, findings=analysis.findings._replace(probe=some)))
    assert [r["features"] for r in rows(block)][0] == "16×16 pixels" and 'data-v="0.5 0.25 0.75"' in block.content
    assert features.probe(analysis._replace(findings=analysis.findings._replace(probe=None))) is None


def test_spectra(analysis):
    block = features.spectra(analysis)
    values = [float(r["singular_value"]) for r in rows(block) if (r["model"], r["features"]) == ("step 12", "patches")]
    assert values == analysis.findings.patches.singular_values.tolist()
    assert f"<td>{analysis.findings.cls.rankme:.1f}</td>" in block.content and 'data-axis="component"' in block.content
    assert features.spectra(analysis._replace(findings=analysis.findings._replace(cls=None))) is None


def test_maps_are_a_picture_of_their_own(analysis):
    block = features.maps(analysis)
    with Image.open(io.BytesIO(block.files["maps.png"])) as image:
        assert image.format == "PNG" and image.width > 900
    assert features.maps(analysis._replace(maps=None)) is None


def test_over_the_steps(analysis):
    block = features.steps(analysis)
    table = rows(block)
    gaps = [r for r in table if r["measure"] == "swap gap, other modality"]
    assert [int(r["step"]) for r in gaps] == [0, 5, 10, 12]
    last = next(g for g in analysis.findings.gaps if g.kind == "other modality" and g.layer is None)
    assert [float(gaps[-1][f]) for f in ("value", "low", "high")] == list(last.gap)
    mean = sum(layer.masked.value for layer in analysis.findings.layers) / len(analysis.findings.layers)
    told = [r for r in table if r["measure"] == "corrected information, masked"]
    assert float(told[-1]["value"]) == pytest.approx(mean) and told[-1]["low"] == ""
    assert f"12,{last.gap.value:.6g}" in block.content
    assert features.steps(analysis._replace(curve=[])) is None
