import html
import re

from PIL import Image
from run_folders import event, held_out, read, row, write


def test_a_step_without_images_of_a_modality_leaves_no_gap_and_a_loss_that_was_not_finite_does(tmp_path):
    losses = [{"ct": 1.0}, {"ct": 2.0, "mr": 5.0}, {"mr": None}, {"ct": 3.0}]
    rows = [row(4 + 4 * i, modality_loss=by_name) for i, by_name in enumerate(losses)]
    page = read(write(tmp_path / "run", [held_out(0), *rows]), out=tmp_path / "r.html")
    assert page.lines["ct"]["training"] == [(4, 1), (8, 2), (16, 3)] and page.lines["mr"]["training"] == [(8, 5)]
    drawn = dict(re.findall(r'data-l="training" data-p="([^"]*)" d="([^"]*)"', page.source))
    assert drawn["4,1 8,2 16,3"].count("M") == 1


def test_what_a_run_did_not_log_is_not_mentioned(few, tmp_path):
    page = read(few, out=tmp_path / "r.html")
    for words in ("MFU", "Memory", "kNN", "Director to experts", "steps skipped", "0.0%"):
        assert words not in page.words.replace("Speed and memory", "")
    assert "reconstructions" not in page.text


def test_what_newer_runs_log_is_shown(tmp_path):
    more = {"mfu": 0.4125, "memory_mb": 61000.5, "director_distance": [0.5, 0.75], "val_gate_entropy": [0.25, 0.5]}
    more |= {"slowest_rank": 1, "slowest_rank_s": 0.75, "median_rank_s": 0.5}
    rows = [row(4, **more), row(8, **more | {"mfu": None, "skipped": 3, "loss": None}), held_out(8, probe_knn=0.875)]
    page = read(write(tmp_path / "run", rows), out=tmp_path / "r.html")
    assert page.lines["MFU"] == {"MFU": [(4, 0.4125)]}
    assert page.lines["Memory"] == {"Memory": [(4, 61000.5), (8, 61000.5)]}
    assert page.lines["Director to experts"] == {"layer 0": [(4, 0.5), (8, 0.5)], "layer 1": [(4, 0.75), (8, 0.75)]}
    assert page.lines["Gate entropy"] == {"layer 0": [(4, 0.25), (8, 0.25)], "layer 1": [(4, 0.5), (8, 0.5)]}
    assert page.lines["Slowest rank"] == {"Slowest rank": [(4, 1.5), (8, 1.5)]}
    assert page.lines["kNN probe"] == {"kNN probe": [(8, 0.875)]}
    head = page.section_words("")
    assert (
        "87.5% kNN probe" in head and "41.2% MFU" in head and "61,000 MB memory" in head and "3 steps skipped" in head
    )
    assert page.lines["Masked loss"]["training"] == [(4, 0.4)]


def test_expert_maps_are_drawn_from_the_newest_row(tmp_path):
    mass = {"ct": [[3.0, 1.0], [0.0, 2.0]], "mr": [[1.0, 1.0], [1.0, 0.0]], "us": [[0.0, 0.0], [0.0, 0.0]]}
    old = {"ct": [[0.0, 1.0], [0.0, 2.0]]}
    rows = [held_out(0, val_expert_mass=old), held_out(8, val_expert_mass=mass)]
    page = read(write(tmp_path / "run", rows), out=tmp_path / "r.html")
    told = page.section_words("experts")
    assert "layer 0: ct gives expert 0 75.0%" in told and "layer 1: mr gives expert 1 0.0%" in told
    assert "us gives" not in told and "full colour is a share of 100%" in told
    assert re.findall(r'fill-opacity="([^"]*)"', page.source) == [
        *("0.750", "0.250", "0.500", "0.500"),
        *("0.000", "1.000", "1.000", "0.000"),
    ]


def test_events_are_listed_and_marked(tmp_path):
    events = [
        event(5, "non-finite step", loss="nan", grad_norm="inf", samples=[f"ct/{i}" for i in range(40)]),
        event(5, "non-finite step", loss="nan", samples=["once more"]),
        event(6, "unused experts", layer=0, dead=[1, 2], nearly_dead=[3]),
        event(7, "preempted", signal="SIGTERM"),
    ]
    page = read(write(tmp_path / "run", [row(4), row(7)], events), out=tmp_path / "r.html")
    told = page.section_words("events")
    assert "non-finite step ×2; unused experts; preempted" in told
    assert "ct/0, ct/1" in told and "ct/11 and 28 more" in told and "ct/12" not in told
    assert "layer 0; no image goes to expert 1, 2; almost no image goes to expert 3" in told
    assert "preempted by SIGTERM, resumable" in page.section_words("")
    hero = page.source[page.source.index("Masked loss") : page.source.index("Align loss")]
    drawings = re.findall(r"<svg viewBox=.*?</svg>(?=</div>)", hero, re.S)
    assert len(drawings) == 2  # broad and narrow
    for drawing in drawings:
        assert drawing.count('<path class="rod m-bad"') == 1  # two at one place are drawn once
        assert drawing.count('<path class="rod m-unused"') == drawing.count('<path class="rod m-preempt"') == 1
        assert html.escape("step 6: unused experts: layer 0") in drawing


def test_very_many_events_are_cut(tmp_path):
    events = [event(5, "unreadable sample", sample=f"sample {i}", reason="cut") for i in range(1000)]
    told = read(write(tmp_path / "run", [row(8)], events), out=tmp_path / "r.html").section_words("events")
    assert "unreadable sample ×1000" in told and "800 events omitted" in told
    assert "sample 99;" in told and "sample 100;" not in told and "sample 900;" in told and "sample 999;" in told


def test_a_picture_of_steps_to_come_or_of_nothing_is_not_shown(few, tmp_path):
    for step, colour in ((4, "red"), (40, "blue")):  # the run was resumed and is at step 8
        Image.new("RGB", (30, 20), colour).save(few / "pictures" / f"reconstructions-step-{step:06d}.png")
    (few / "pictures" / "reconstructions-step-000008.png").write_bytes(b"\x89PNG\r\n\x1a\nnothing")
    page = read(few, out=tmp_path / "r.html")
    assert "reconstructions, step 4" in page.section_words("reconstructions") and page.tags.count("img") == 1
    assert "The picture reconstructions-step-000008.png cannot be read" in page.section_words("")
