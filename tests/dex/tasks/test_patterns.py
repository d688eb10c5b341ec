"""Files that belong together, by patterns."""

import pytest

from dex.tasks import patterns
from dex.tasks.task import Layout, Rule


@pytest.fixture
def tree(tmp_path):
    def make(*paths):
        for path in paths:
            (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / path).write_text("")
        return patterns.listed(tmp_path)

    return make


def rules(*rules, **fields):
    return Layout("loader", "a page", rules=rules, **fields)


def test_names_recur_and_fill_in_the_mask(tree):
    files = tree("v01/v01_8/f_1_endo.png", "v01/v02_8/f_1_endo.png", "v01/v01_8/f_1_endo_mask.png", "v01/v01_8/.x.png")
    rule = Rule(image="v{v}/v{v}_{clip}/f_{n}_endo.png", mask="v{v}/v{v}_{clip}/f_{n}_endo_mask.png", patient="{v}")
    (match,) = patterns.matches(rules(rule), files)
    assert match.names == {"v": "01", "clip": "8", "n": "1"} and match.prefix == ""
    assert match.text("{v}-{n}") == "01-1"
    assert patterns.targets(match, files) == ["v01/v01_8/f_1_endo_mask.png"]


def test_a_layout_may_begin_below_the_folder_but_in_one_place(tree):
    rule = Rule(image="{split}/Original/{case}.png", mask="{split}/Truth/{case}.png", split="{split}")
    files = tree("a b/c/train/Original/1.png", "a b/c/train/Truth/1.png", "a b/c/other/Original/1.png")
    (match,) = patterns.matches(rules(rule), files)
    assert (match.image, match.prefix) == ("a b/c/train/Original/1.png", "a b/c/")
    files = tree("copy/train/Original/1.png")
    with pytest.raises(ValueError, match="2 places: .*a b/c.*copy"):
        patterns.matches(rules(rule), files)


def test_a_mask_beside_its_image_is_no_image(tree):
    files = tree("1.pgm", "1_gt.pgm", "2.pgm", "2_gt.pgm", "2.txt", "__MACOSX/1.pgm")
    found = patterns.matches(rules(Rule(image="{case}.pgm", mask="{case}_gt.pgm")), files)
    assert [match.image for match in found] == ["1.pgm", "2.pgm"]


def test_the_first_rule_that_fits_counts(tree):
    files = tree("train/A/BACTERIA-1-2.jpeg", "train/A/x.jpeg")
    first, second = Rule(image="{split}/{class}/{kind}-{p}-{n}.jpeg", label="a"), Rule(image="{split}/{class}/{c}.jpeg")
    found = patterns.matches(rules(first, second), files)
    assert [match.rule for match in found] == [first, second]


def test_splits_are_those_of_the_layout(tree):
    files = tree("a. Training/1.png", "b. Testing/2.png", "c. Other/3.png")
    splits = (("a. Training", "train"), ("b. Testing", "test"))
    found = patterns.matches(rules(Rule(image="{split}/{case}.png"), splits=splits), files)
    assert [match.names["split"] for match in found] == ["a. Training", "b. Testing"]


def test_stars(tree):
    files = tree("i/1.png", "m/1_mask.tif", "m/1.tif", "x/y/z/2.png")
    (match,) = patterns.matches(rules(Rule(image="i/{case}.png")), files)
    assert patterns.beside(match, "m/{case}*", files) == ["m/1.tif", "m/1_mask.tif"]
    (match,) = patterns.matches(rules(Rule(image="x/**/{case}.png")), files)
    assert match.names == {"case": "2"}


def test_letters_of_patterns_are_no_expressions(tree):
    files = tree("a.b+(c)/1.png", "aXb+(c)/2.png")
    (match,) = patterns.matches(rules(Rule(image="a.b+(c)/{case}.png")), files)
    assert match.image == "a.b+(c)/1.png"


def test_a_folder_of_a_series_is_an_image(tree):
    files = tree("CT/p1/0.dcm", "CT/p1/1.dcm")
    (match,) = patterns.matches(rules(Rule(image="CT/{case}")), files)
    assert match.image == "CT/p1"


def test_what_is_expected_names_the_folder_that_is_not_there(tree):
    layout = rules(Rule(image="train/Original/{case}.png"))
    assert patterns.expected(layout, tree("train/1.png")) == "train/Original/<case>.png (there is no folder 'Original')"


def test_no_folder(tmp_path):
    (tmp_path / "f").write_text("")
    with pytest.raises(FileNotFoundError, match="data: expected a folder"):
        patterns.listed(tmp_path / "none")
    with pytest.raises(NotADirectoryError, match="got the file"):
        patterns.listed(tmp_path / "f")


def test_links_are_not_followed(tmp_path, tree):
    tree("a/1.png")
    (tmp_path / "b").symlink_to(tmp_path / "a")
    (tmp_path / "a/2.png").symlink_to(tmp_path / "a/1.png")
    assert patterns.listed(tmp_path).files == {"a/1.png"}
