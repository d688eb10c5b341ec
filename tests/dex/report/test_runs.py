import shutil

import pytest
from run_folders import START, event, held_out, read, row, write

from dex.report.page import report


def test_a_resumed_run_is_drawn_once(tmp_path):
    """Killed at 16, resumed from 6: what was done twice counts as it was done the second time."""
    first = [held_out(0), row(4), row(8), held_out(8), row(12), row(16), held_out(16)]
    again = [row(8, loss=7.0), held_out(8, val_loss=70.0), row(12, loss=8.0)]
    events = [
        event(2, "unused experts", layer=1, dead=[2], nearly_dead=[]),
        event(14, "loss spike", loss=9.0, samples=["ct/17"]),
        event(6, "resumed", notes=["passed over step-00000010: hash differs"]),
    ]
    run = write(tmp_path / "run", first + again, events, starts=[START | {"step": 6, "torch": "2.14.0"}])
    page = read(run, out=tmp_path / "r.html")
    assert page.lines["Masked loss"]["training"] == [(4, 0.4), (8, 7), (12, 8)]
    assert page.lines["Masked loss"]["held out"] == [(0, 3), (8, 70)]
    assert page.lines["mr"]["held out"] == [(0, 1.25), (8, 9.25)]
    head = page.section_words("")
    assert "12 of 40 steps unfinished" in head and "2 starts" in head
    # 4 steps, then 2 from the resume at 6 to the row at 8, then 4, at 2 steps a second
    assert "5s training time" in head and "32 images/s" in head
    assert page.lines["Waiting for data"]["Waiting for data"] == [(4, 0.125), (8, 0.25), (12, 0.125)]
    told = page.section_words("events")
    assert "resumed notes passed over step-00000010" in told and "no image goes to expert 2" in told
    assert "loss spike" not in page.words  # it belongs to steps that were taken again
    assert "2.13.0 → 2.14.0" in page.section_words("machine")


def test_a_row_written_twice_at_one_step_counts_once(tmp_path):
    rows = [row(4), held_out(4), row(4, loss=5.0), held_out(4, val_loss=6.0), row(8)]
    page = read(write(tmp_path / "run", rows), out=tmp_path / "r.html")
    assert [v for _, v in page.lines["Masked loss"]["training"]] == [5, pytest.approx(2 / 9, rel=1e-5)]
    assert page.lines["Masked loss"]["held out"] == [(4, 6)]


def test_an_event_that_is_told_late_takes_nothing_back(tmp_path):
    events = [event(8, "unreadable sample", sample="a"), event(7, "non-finite step", loss="nan", samples=["b"])]
    told = read(write(tmp_path / "run", [row(8)], events), out=tmp_path / "r.html").section_words("events")
    assert told.index("non-finite step loss nan; samples b") < told.index("unreadable sample sample a")


@pytest.mark.parametrize(
    ("tail", "said"),
    [
        ('{"step": 12, "loss": 0.', "The last line of metrics.jsonl is incomplete, as after a kill"),
        ('{"step": 12, "loss": 0.\n', "1 line(s) of metrics.jsonl cannot be read and are left out: 5"),
        ("null\n[]\n{}\n\n\x00", "4 line(s) of metrics.jsonl cannot be read and are left out: 5, 6, 7, 9"),
        ('{"step": -3}\n' + "[" * 100000 + "\n", "2 line(s) of metrics.jsonl cannot be read"),
    ],
)
def test_damaged_lines_are_left_out_and_said(few, tmp_path, tail, said):
    with (few / "metrics.jsonl").open("a") as file:
        file.write(tail)
    page = read(few, out=tmp_path / "r.html")
    assert said in page.section_words("")
    assert page.lines["Masked loss"]["training"] == [(4, 0.4), (8, pytest.approx(2 / 9, rel=1e-5))]


def test_a_run_without_damage_says_nothing_of_it(few, tmp_path):
    assert "notice" not in [v for n, v in read(few, out=tmp_path / "r.html").attributes if n == "class"]


@pytest.mark.parametrize("name", ["config.yaml", "run.json", "metrics.jsonl", "events.jsonl"])
def test_a_missing_file_is_named_with_its_run(few, tmp_path, name):
    good = shutil.copytree(few, tmp_path / "good")
    (few / name).unlink()
    with pytest.raises(ValueError, match=f"run {few}: expected the files of a run folder; {name} is missing"):
        report([good, few], tmp_path / "r.html")
    assert not (tmp_path / "r.html").exists()


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("config.yaml", "a: [", "config.yaml or run.json cannot be read"),
        ("config.yaml", "- 3", "expected fields and values in config.yaml, got list"),
        ("config.yaml", "!!python/object/apply:os.system ['true']", "cannot be read"),
        ("run.json", '{"starts": [', "config.yaml or run.json cannot be read"),
        ("run.json", '{"starts": []}', "expected a list of at least one start"),
        ("run.json", "[]", "cannot be read"),
        ("metrics.jsonl", "", "expected rows in metrics.jsonl; the file is empty"),
        ("metrics.jsonl", '{"st', "expected rows in metrics.jsonl; The last line of metrics.jsonl is incomplete"),
    ],
)
def test_a_useless_file_is_named_with_its_run(few, tmp_path, name, text, message):
    (few / name).write_text(text)
    with pytest.raises(ValueError, match=f"run {few}: .*{message}"):
        report([few], tmp_path / "r.html")


def test_runs_of_one_name_are_told_apart(few, tmp_path):
    copy = shutil.copytree(few, tmp_path / "b" / "few")
    page = read(few, copy, out=tmp_path / "r.html")
    assert list(page.lines["Gradient norm"]) == [f"{tmp_path.name}/few", "b/few"]
    assert list(read(few, few, out=tmp_path / "r.html").lines["Gradient norm"]) == ["few (1)", "few (2)"]
