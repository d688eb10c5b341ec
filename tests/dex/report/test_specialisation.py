"""What evaluations measured of experts, as curves beside their references."""

import re

import pytest
from run_folders import held_out, read, row, write


def measured(step, gap=0.1, **more):
    kinds = {"same modality": gap / 2, "other modality": gap, "other less same modality": gap / 2}
    values = {"swap_gap": kinds, "swap_gap_of": 0.4, "swap_gap_images": 24, "probe_images": 1056}
    values |= {f"swap_gap_{end}": {k: v + by for k, v in kinds.items()} for end, by in (("low", -0.02), ("high", 0.03))}
    values |= {"information": [0.2 + gap, 0.4 + gap], "information_null": [0.05, 0.07], "information_whole": [0.3, 0.5]}
    values |= {"expert_sets": [6, 8], "probability_entropy": [0.9, 0.7], "first_agreement": [0.5, 0.75]}
    values |= {"rankme": {"CLS token": 10 + gap, "mean of patches": 20 + gap}}
    values |= {"probe_linear": 0.6 + gap, "probe_linear_low": 0.5, "probe_linear_high": 0.8, "probe_pixels": 0.5}
    return held_out(step, **values | {"evaluation_s": 0.25} | more)


@pytest.fixture
def run(tmp_path):
    return write(tmp_path / "run", [measured(0, gap=0.0), row(4), measured(4, gap=0.1), row(8), measured(8, gap=0.2)])


def test_curves_have_their_references(run, tmp_path):
    page = read(run, out=tmp_path / "r.html")
    lines = page.lines
    assert lines["Swap gap"]["of other modality"] == [(0, 0), (4, 0.1), (8, 0.2)]
    assert lines["Swap gap"]["of same modality"][-1] == (8, 0.1) and lines["Swap gap"]["0"] == [(0, 0), (8, 0)]
    assert lines["Linear probe"] == {
        "probe": [(0, 0.6), (4, 0.7), (8, 0.8)],
        "step 0": [(0, 0.6), (8, 0.6)],
        "pixels": [(0, 0.5), (8, 0.5)],
    }
    assert lines["RankMe, CLS token"]["step 0"] == [(0, 10), (8, 10)]
    assert lines["Information"]["layer 1"][-1] == (8, 0.6)
    assert lines["Information"]["step 0"] == [(0, pytest.approx(0.3)), (8, pytest.approx(0.3))]
    assert lines["Information"]["chance"][0] == (0, pytest.approx(0.06))
    assert lines["Sets of experts"]["step 0"] == [(0, 7), (8, 7)]
    assert page.source.count('class="band f1"') >= 1  # the interval of the swap gap
    assert re.search(r'class="line[^"]*dashed[^"]*" data-l="pixels"', page.source)
    told = page.section_words("")
    gap = "+0.200 swap gap [0.180, 0.230]; loss with another modality's experts minus loss with an image's own"
    assert f"{gap}; step 8, 24 images" in told
    probe = "80.0% linear probe balanced accuracy of the modality on unseen sources, pixels alone 50.0%"
    assert f"{probe}; step 8, 1,056 images" in told
    assert re.search(r"without evaluation \([\d.]+% of both\) and saving", told)


def test_runs_are_compared_by_the_swap_gap_of_another_modality(run, tmp_path):
    rows = [measured(8, gap=0.3, swap_gap={"random": 0.7}, swap_gap_low={"random": 0.1}, swap_gap_high={"random": 1.0})]
    page = read(run, write(tmp_path / "other", rows), out=tmp_path / "r.html")
    assert page.lines["Swap gap"].keys() == {"run", "other", "0"}
    assert page.lines["Swap gap"]["other"] == [(8, 0.7)]  # of one modality
    assert "other, step 0" not in page.lines["RankMe, CLS token"]  # it did not measure that
    assert "Information: other" in page.lines


def test_a_run_of_an_earlier_version_has_no_such_section(few, tmp_path):
    page = read(few, out=tmp_path / "r.html")
    assert "specialisation" not in page.text and "swap gap" not in page.section_words("")


def test_numbers_that_are_missing_leave_no_band_and_no_reference(tmp_path):
    rows = [
        measured(0, swap_gap_low=None, probe_linear=None, information=None, rankme={}),
        measured(4, probe_pixels=None),
    ]
    page = read(write(tmp_path / "run", rows), out=tmp_path / "r.html")
    assert page.lines["Linear probe"].keys() == {"probe", "pixels"} and "step 0" not in page.lines["Information"]
