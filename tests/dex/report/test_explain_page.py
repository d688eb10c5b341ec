import html
import re

import pytest
import torch

from dex.analysis.intervals import Interval
from dex.analysis.one_image import change
from dex.inference import explain_job
from dex.report import explain_page as page


@pytest.fixture
def found(real, images):
    options = explain_job.Options(masks=3, train=20, neighbours=3)
    prepared = explain_job.prepare(real, images / "us" / "003.png", options)
    return explain_job.explain(prepared, torch.device("cpu"))


def test_the_page_holds_every_section_and_its_numbers(found, tmp_path):
    out = tmp_path / "page.html"
    page.write(found, out)
    source = out.read_text()
    assert re.findall(r'<section id="(\w+)"', source) == ["route", "experts", "modalities", "alike"]
    assert out.stat().st_mode & 0o777 == 0o600 and "This page contains the scan" in source
    assert html.escape(page.sentence(found), quote=True) in source
    own = found.alternatives.own
    for losses in found.alternatives.swapped[1]:
        percent = 100 * change(losses, own).value / float(own.mean())
        assert f'data-v="{percent:.6g}"' in source
    for e, p in enumerate(found.whole.probabilities[0][0].tolist()):
        assert f"layer 0, {e}: {p:.4g}" in source
    for neighbour in found.neighbours:
        assert neighbour.id in source and f"cosine {neighbour.similarity:.2f}" in source
    assert source.count("data:image/jpeg;base64,") == 1 + len(found.neighbours)
    assert not re.search(r"https?:|//[a-z]|url\(", re.sub(r"base64,[A-Za-z0-9+/=]+", "", source))


def test_without_training_images_their_sections_are_left_out(found, tmp_path):
    alone = found._replace(usual=[], neighbours=[], compared=0, notes=["No training images are shown: <gone>"])
    page.write(alone, tmp_path / "p.html")
    source = (tmp_path / "p.html").read_text()
    assert re.findall(r'<section id="(\w+)"', source) == ["route", "experts"] and "&lt;gone&gt;." in source


def test_the_sentence_says_no_more_than_the_intervals(found):
    def usual(name, low, high):
        return explain_job.Usual(name, Interval((low + high) / 2, low, high), [])

    some = [usual("CT", 0.1, 0.2), usual("MR", -0.2, -0.1), usual("PET", -0.1, 0.3), usual("X-ray", 0.0, 0.5)]
    text = page.sentence(found._replace(usual=some, modality="CT"))
    assert "with the usual experts of CT it changes by +0.150 [0.100, 0.200]" in text
    assert text.endswith("It is lower with those of MR; not clearly different with those of PET, X-ray.")
    assert page.sentence(found._replace(usual=some, modality=None)).count("higher with those of CT") == 1
    assert page.sentence(found._replace(usual=[])).endswith("mean of 3 masks.")
