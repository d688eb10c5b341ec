import html
import re
import stat

import numpy as np
import pytest
from browser import CHROMIUM, measured
from evaluations import classified, segmented

from dex.report.task_comparison import Other
from dex.report.task_page import Picture, write
from dex.tasks.metrics.evaluation import examples
from dex.tasks.recipe import OURS, STATED, Settings

ABOUT = {"run": "a run", "finetuned": "fives-full", "mode": "full", "split": "test", "notes": ["A note of the data"]}


def pictures(evaluation):
    rng = np.random.default_rng(0)
    return [
        Picture(evaluation.cases[place].id, rng.integers(0, 256, (150, 900, 3), np.uint8))
        for place in dict.fromkeys(examples(evaluation))
    ]


def text_of(page):
    return html.unescape(re.sub(r"<[^>]+>", " ", page.read_text(encoding="utf-8")))


def test_a_segmentation_in_whole(tmp_path):
    out, evaluation = tmp_path / "a b" / "report.html", segmented(**ABOUT)
    write(
        out,
        evaluation,
        settings=Settings(epochs=7),
        pictures=pictures(evaluation),
        leak="no case is a copy of a pretraining image",
        notes=["labels by a model", *ABOUT["notes"]],
        other=Other("control", [segmented(0, 0.6)]),
    )
    source, text = out.read_text(encoding="utf-8"), text_of(out)
    anchors = re.findall(r'<section id="(\w+)"', source)
    assert anchors == ["classes", "cases", "pictures", "confusion", "comparison", "basis"]
    dice = evaluation.estimate("dice")
    assert f"Dice {dice.value:.3f}, 95 % interval {dice.low:.3f} to {dice.high:.3f}, over 6 patients, 12" in text
    assert "Reference: background only scores 0.000." in text
    assert source.count("data:image/png;base64") == 3 and stat.S_IMODE(out.stat().st_mode) == 0o600
    for words in (
        "fives-full is better than control",
        "no case is a copy of a pretraining image",
        "A note of the data",
        "Labels by a model",
        "neither truth nor prediction contains the class: 6 of 24",
        "Distances are in mm, by the spacing of each file",
        "HD95 (mm)",
        "NSD at 2 mm",
        "fewer than 10 patients",
        STATED,
        OURS,
        "changed here",
        "lesion missed",
    ):
        assert words in text, words
    assert text.count("A note of the data") == 1
    counts = re.search(r"<th>lesion</th>(?:<td>[^<]*</td>){3}((?:<td>\d+</td>)+)</tr>", source)[1]
    assert re.findall(r"\d+", counts) == ["6", "2", "2", "2", "6"]  # patients, scored, missed, spurious, empty
    assert not re.search(r"https?:|//[a-z]|@import|url\(", re.sub(r"base64,[A-Za-z0-9+/=]+", "", source))


def test_a_classification_in_whole(tmp_path):
    evaluation = classified(**ABOUT | {"leak": "12 copies"})
    write(tmp_path / "r.html", evaluation)
    source, text = (tmp_path / "r.html").read_text(), text_of(tmp_path / "r.html")
    assert re.findall(r'<section id="(\w+)"', source) == ["classes", "cases", "confusion", "reliability", "basis"]
    name, value = evaluation.baseline()
    assert f"Reference: {name} scores {value:.3f}." in text
    reliability = evaluation.reliability()
    assert f"ECE {reliability.ece:.3f}; perfectly" in text and f"give {reliability.by_chance:.3f} on average" in text
    assert "pretraining set: 12 copies" in text and "Without an interval: ECE: chance" in text
    assert stat.S_IMODE((tmp_path / "r.html").stat().st_mode) & 0o400 and "images of cases" not in text
    worst = min(zip(evaluation.case_values(), evaluation.cases, strict=True))[1]
    assert worst.id in text and f"{evaluation.classes[worst.label]}, predicted " in text


def test_three_patients_have_no_interval_on_the_page(tmp_path):
    write(tmp_path / "r.html", segmented(n=6))
    text = text_of(tmp_path / "r.html")
    assert "without an interval: an interval over 3 patients says nothing; at least 4 are needed." in text
    assert "BCa" not in text and "pretraining set: not checked" in text


def test_rare_classes_are_named(tmp_path):
    evaluation = segmented()
    lesion = [i for i, case in enumerate(evaluation.cases) if case.classes[1].dice is not None]
    kept = evaluation._replace(cases=tuple(c for i, c in enumerate(evaluation.cases) if i not in lesion[2:]))
    write(tmp_path / "r.html", kept)
    assert "In fewer than 4 patients: lesion." in text_of(tmp_path / "r.html")


def test_what_does_not_belong_leaves_the_earlier_page(tmp_path):
    out = tmp_path / "r.html"
    write(out, classified())
    before = out.read_bytes()
    with pytest.raises(ValueError, match="pictures: expected cases of the evaluation, got another"):
        write(out, classified(), pictures=[Picture("another", np.zeros((4, 4, 3), np.uint8))])
    one = classified().cases[0].id
    for image in (np.zeros((4, 4, 3)), np.zeros((0, 4, 3), np.uint8), np.zeros((4, 4, 4), np.uint8)):
        with pytest.raises(ValueError, match=f"pictures: expected uint8 .* of {one}"):
            write(out, classified(), pictures=[Picture(one, image)])
    with pytest.raises(ValueError, match="second: expected the cases"):
        write(out, classified(), other=Other("b", [classified(n=46)]))
    assert out.read_bytes() == before and list(tmp_path.iterdir()) == [out]


def test_names_cannot_break_the_page(tmp_path):
    evaluation = classified(classes=("<script>alert(1)</script>", '"quoted"', "ünïcode"), finetuned="<b>")
    write(tmp_path / "r.html", evaluation._replace(task="a <i>task</i>"))
    source = (tmp_path / "r.html").read_text()
    assert "<script>alert" not in source and "<i>task" not in source and "<b>," not in source and "ünïcode" in source


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")
@pytest.mark.parametrize("kind", ["segmentation", "classification"])
def test_the_page_fits_a_desktop_and_a_telephone(tmp_path, kind):
    about = ABOUT | {"finetuned": "a-name-of-a-run" * 6, "checkpoint": "9f" * 32}
    if kind == "segmentation":
        evaluation, other = segmented(**about), segmented(0, 0.6)
    else:
        classes = ("normal", "an unusually long name of a class of some disease", "unbroken" * 8)
        evaluation, other = classified(classes=classes, **about), classified(1, 0.5, classes=classes)
    shown = pictures(evaluation) if kind == "segmentation" else []
    out = tmp_path / "r.html"
    write(out, evaluation, settings=Settings(), pictures=shown, notes=["long " * 40], other=Other("b" * 60, [other]))
    for result in measured(out.read_text(encoding="utf-8"), tmp_path).values():
        assert result["bad"] == [], "\n".join(result["bad"])
        assert result["images"] == len(shown)
