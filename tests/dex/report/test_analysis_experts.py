"""The numbers of pictures, tables and CSV files are those that were found."""

import csv
import io
import re

import pytest

from dex.report import analysis_experts as experts
from dex.report.analysis_parts import names, present


def rows(block):
    return list(csv.DictReader(io.StringIO(block.files[f"{block.anchor}.csv"].decode())))


def test_the_swap_gap(analysis):
    block = experts.swap(analysis)
    found = {(g.kind, g.layer): g for g in analysis.findings.gaps}
    told = {
        (r["kind"], None if r["layer"] == "all" else int(r["layer"])): r for r in rows(block) if r["model"] == "step 12"
    }
    for key, gap in found.items():
        assert [float(told[key][f]) for f in ("gap", "low", "high", "own_loss")] == [*gap.gap, gap.own]
        words = " ".join(f"{v:.6g}" for v in gap.gap)
        assert f'data-v="{words}"' in block.content
    assert {r["model"] for r in rows(block)} == {"step 12", "step 0", "step-00000010"}
    assert block.files["swap.svg"].startswith(b"<svg") and "compare with step 0" in block.content
    assert experts.swap(analysis._replace(findings=analysis.findings._replace(gaps=None))) is None


def test_experts_by_modality_beside_step_0_and_chance(analysis):
    block = experts.heatmaps(analysis)
    table = rows(block)
    assert {r["model"] for r in table} == {"step 12", "step 0", "step-00000010", "modalities permuted"}
    first = names(analysis)[0]
    mass = analysis.findings.layers[1].mass[present(analysis)[0]]
    told = [float(r["share"]) for r in table if (r["model"], r["layer"], r["modality"]) == ("step 12", "1", first)]
    assert told == pytest.approx((mass / mass.sum()).tolist())
    information = analysis.findings.layers[0].whole
    cells = "".join(f"<td>{v:.3f}</td>" for v in (information.value, information.null_high, information.p))
    assert f"<th>layer 0, whole</th>{cells}" in block.content and "no evidence of specialisation" in block.content


def test_how_the_router_decides(analysis):
    block = experts.routing(analysis)
    layer = analysis.findings.layers[0]
    row = rows(block)[0]
    assert float(row["entropy"]) == layer.entropy and int(row["sets_whole"]) == layer.sets_whole
    assert float(row["masked_null_high"]) == layer.masked.null_high
    assert f"<th>layer 0, step 12</th><td>{layer.entropy:.3f}</td><td>{layer.sets_masked}</td>" in block.content


def test_overlap_beside_random_sets(analysis):
    block = experts.overlap(analysis)
    layer = analysis.findings.layers[0]
    assert f"random sets: {layer.random_overlap:.2f}" in block.content
    kept = present(analysis)
    values = [v for v in layer.overlap[kept][:, kept].flatten().tolist() if v == v]
    told = [float(r["jaccard"]) for r in rows(block) if r["layer"] == "0" and r["jaccard"]]
    assert told == values


def test_what_is_lost_without_an_expert(analysis):
    block = experts.ablation(analysis)
    one = next(r for r in rows(block) if r["layer"] == "1" and r["expert"] == "2")
    place = present(analysis)[0]
    assert float(one["rise"]) == float(analysis.findings.ablations[1].rise[2, place])
    percent = 100 * float(one["rise"]) / analysis.findings.modality_loss[one["modality"]]
    assert float(one["rise_percent"]) == pytest.approx(percent) and f'data-v="{percent:.6g}"' in block.content


def test_likeness_of_experts_and_director(analysis):
    block = experts.similarity(analysis)
    layer = analysis.findings.similarity[0]
    told = next(r for r in rows(block) if (r["one"], r["other"], r["layer"]) == ("director", "2", "0"))
    assert float(told["cka"]) == pytest.approx(float(layer[-1, 2]))
    assert f"<td>{float(layer[-1, :-1].mean()):.3f}</td>" in block.content


def test_conflict_of_modalities(analysis):
    block = experts.gradients(analysis)
    conflict = analysis.findings.conflict
    assert len({r["parameters"] for r in rows(block)}) == len(conflict.groups)
    assert "step-00000010: between" in block.content and "halves of one modality" in block.content
    assert re.search("layer 0: experts</b>", block.content) and "<b>decoder</b>" in block.content


def test_nothing_is_drawn_of_a_model_without_experts(analysis):
    dense = analysis.findings._replace(layers=[], gaps=None, ablations=None, similarity=None)
    alone = analysis._replace(findings=dense)
    for section in (
        experts.swap,
        experts.heatmaps,
        experts.routing,
        experts.overlap,
        experts.ablation,
        experts.similarity,
    ):
        assert section(alone) is None
    assert experts.gradients(alone) is not None
    assert experts.gradients(analysis._replace(findings=analysis.findings._replace(conflict=None))) is None
