"""The data card: its numbers are the facts', nothing of the user's becomes markup, and a browser shows all of it."""

import base64
import copy
import io
import json
import os
import re
import signal
import subprocess
from html import escape
from html.parser import HTMLParser

import numpy as np
import pytest
from browser import CHROMIUM
from PIL import Image

from dex.data import open_dataset
from dex.data.images import decode
from dex.prepare import card, filters
from dex.prepare.card import _DROPPED, _MEANING, Example, build
from dex.prepare.readers import REASONS
from dex.prepare.thumbnails import SIDE

SECTIONS = ["modalities", "sources", "left-out", "examples", "duplicates", "text", "licences", "rules"]
HOSTILE = "<script>alert(1)</script>\"'&amp; <img src=http://x/>"


def source(name: str, modality: str, train: int, val: int, **changes) -> dict:
    facts = {
        "name": name,
        "modality": modality,
        "anatomy": "heart",
        "normalisation": "display",
        "licence": "CC-BY-4.0",
        "citation": "Anybody et al., 2024. https://doi.org/10.1000/182",
        "package": "",
        "public": True,
        "simulated": False,
        "units": 40,
        "refused": {},
        "dropped": {},
        "kept": train + val,
        "train": train,
        "val": val,
        "patients": 7,
        "text_suspected": 0,
        "burned_in_declared": 0,
        **changes,
    }
    return {**facts, "seen": facts["kept"] + sum(facts["dropped"].values())}


def modality(name: str, sources: list[dict]) -> dict:
    mine = [entry for entry in sources if entry["modality"] == name]
    train, val = sum(entry["train"] for entry in mine), sum(entry["val"] for entry in mine)
    histogram = [50_000 // (1 + value) + 3 * value for value in range(256)] if train + val else [0] * 256
    return {
        "name": name,
        "train": train,
        "val": val,
        "sources": len(mine),
        "empty": train + val == 0,
        "histogram": histogram,
    }


@pytest.fixture
def facts() -> dict:
    sources = [
        source("heart-ct", "CT", 12_345, 678, dropped={"foreground": 2_501, "near duplicate": 31, "blank": 0}),
        source(
            "clinic", "ultrasound", 4_321, 0, public=False, licence="", citation="", units=2_000, text_suspected=1_290
        )
        | {"refused": {"unreadable": 3, "burned-in": 1_111, "timeout": 0}, "burned_in_declared": 1_111},
        source("made-pet", "PET", 160, 9, simulated=True, dropped={"exact duplicate": 5, "near duplicate": 8}),
        source("all-gone", "OCT", 0, 0, dropped={"too small": 77}),
    ]
    return {
        "name": "hearts",
        "image_size": 256,
        "bits": 8,
        "encoding": "jpg",
        "images": sum(entry["kept"] for entry in sources),
        "train": sum(entry["train"] for entry in sources),
        "val": sum(entry["val"] for entry in sources),
        "modalities": [modality(name, sources) for name in ("CT", "ultrasound", "PET", "OCT", "endoscopy")],
        "sources": sources,
        "duplicates": [
            {"source": "heart-ct", "of": "heart-ct", "exact": 0, "near": 31},
            {"source": "made-pet", "of": "made-pet", "exact": 5, "near": 6},
            {"source": "made-pet", "of": "heart-ct", "exact": 0, "near": 2},
        ],
        "rules": {
            "foreground": "0.02 of full scale",
            "bits": 10,
            "by modality": {"PET": 0.01, "others": [1_500, True]},
        },
    }


@pytest.fixture(scope="module")
def examples() -> list[Example]:
    """Real images, one of each kind of file among them."""
    dataset = open_dataset(None)
    grey = np.ascontiguousarray(dataset[0].image.numpy()[0])
    png, npy = io.BytesIO(), io.BytesIO()
    Image.fromarray(grey).save(png, "PNG")
    np.save(npy, grey)
    jpegs = [Example("CT", "heart-ct", f"heart-ct/axial-{i:03d}", dataset.image_bytes(i), "jpg") for i in range(7)]
    return [
        *jpegs,
        Example("ultrasound", "clinic", "0123456789abcdef0123456789abcdef", png.getvalue(), "png"),
        Example("PET", "made-pet", "made-pet/axial-001", npy.getvalue(), "npy"),
    ]


class Page(HTMLParser):
    """Text of every section and of every row in it, tags, attributes; raises where tags do not match."""

    VOID = {"meta", "img", "br", "path"}

    def __init__(self, html: bytes):
        super().__init__()
        self.open, self.tags, self.headings, self.images = [], [], [], []
        self.text: dict[str, str] = {}
        self.section = "header"
        self.feed(html.decode())
        self.close()
        assert not self.open, self.open

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.tags.append((tag, attributes))
        if tag == "section":
            self.section = attributes["id"]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag
        if tag in {"td", "th", "dt", "dd", "li", "small", "tr", "p", "h3", "figcaption", "article"}:
            self.handle_data(" | ")

    def handle_data(self, data):
        if self.open and self.open[-1] not in {"style", "title"}:
            self.text[self.section] = self.text.get(self.section, "") + data

    def row(self, section: str, name: str) -> str:
        """What follows `name` in a section, as far as the next row's heading could be."""
        text = self.text[section]
        return text[text.index(name) :][:400]


def test_structure(facts, examples):
    page = Page(build(facts, examples)[0])
    assert [attributes["id"] for tag, attributes in page.tags if tag == "section"] == SECTIONS
    assert dict(page.tags)["html"] == {"lang": "en"}
    assert [tag for tag, _ in page.tags].count("h1") == 1 and "main" in dict(page.tags)
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(set(ids)) == len(ids)
    links = [attributes["href"] for tag, attributes in page.tags if tag == "a"]
    assert links == [f"#{section}" for section in SECTIONS]
    for tag, attributes in page.tags:
        if tag == "section":
            assert attributes["aria-labelledby"] in ids
        if tag in ("svg", "img") or attributes.get("role") == "img":
            assert attributes.get("aria-label") or attributes.get("alt")
        if tag == "th":
            assert attributes.get("scope")
    assert sum(tag == "svg" for tag, _ in page.tags) == 3


def test_headline_numbers(facts, examples):
    text = Page(build(facts, examples)[0]).text["header"]
    assert "hearts" in text and "256 × 256 pixels, 8-bit JPG" in text
    for label, number in {
        "Images": "17,513",
        "Modalities": "3",
        "Sources": "4",
        "Patients": "28",
        "Slices seen": "20,135",
        "Slices dropped": "2,622",
        "Refused": "1,114",
        "Text suspected": "1,290",
    }.items():
        assert f"{label} | {number}" in text, label
    assert "16,826 train, 687 val" in text and "units or parts; 2,120 units in all" in text
    assert "1 private, 1 simulated" in text
    assert "foreground 2,501 12 %" in text and "near duplicate 39 0.2 %" in text
    assert "too small 77 0.4 %" in text and "exact duplicate 5 < 0.1 %" in text
    assert "blank" not in text, "a reason that no slice was dropped for is not listed"


def test_modalities(facts, examples):
    html = build(facts, examples)[0]
    text = Page(html).text["modalities"]
    assert "13,02374 % of all" in text and "12,345 train, 678 val, 1 source" in text
    assert re.search(r"PET simulated \| 1691\.0 % of all", text)
    assert "OCT: all slices of 1 source were dropped" in text and "endoscopy: no source" in text
    paths = re.findall(r'<path d="M0 72(V[^"]*)Z"', html.decode())
    assert len(paths) == 3
    bars = [72 - float(y) for y in re.findall(r"V([\d.]+)h4", paths[0])]
    values = facts["modalities"][0]["histogram"]
    expected = np.sqrt(np.add.reduceat(np.array(values, float), np.arange(0, 256, 4)))
    assert np.abs(np.array(bars) - 68 * expected / expected.max()).max() <= 0.051
    mean = (np.arange(256) * values).sum() / sum(values) / 255
    assert f"mean {mean:.2f}" in text


def test_sources(facts, examples):
    html = build(facts, examples)[0]
    page = Page(html)
    row = page.row("sources", "heart-ct")
    assert "13,02312,345 train | 678 val" in row
    assert "15,555 seen; dropped: foreground\xa02,501, near duplicate\xa031" in row
    clinic = page.row("sources", "clinic")
    assert "private" in clinic and "refused: burned-in\xa01,111, unreadable\xa03" in clinic and "timeout" not in clinic
    assert "77 seen; dropped: too small\xa077" in page.row("sources", "all-gone")
    bars = [a["aria-label"] for tag, a in page.tags if a.get("class") == "bar"]
    assert bars == [
        "all sources: train 16,826, val 687, foreground 2,501, too small 77, exact duplicate 5, near duplicate 39",
        "heart-ct: train 12,345, val 678, foreground 2,501, near duplicate 31",
        "clinic: train 4,321",
        "made-pet: train 160, val 9, exact duplicate 5, near duplicate 8",
        "all-gone: too small 77",
    ]
    grown = re.findall(r'aria-label="heart-ct:.*?</div>', html.decode())[0]
    assert re.findall(r"flex-grow:(\d+)", grown) == ["12345", "678", "2501", "31"]


def test_simulated_is_said_wherever_it_is_shown(facts, examples):
    page = Page(build(facts, examples)[0])
    assert "169 of the images, from 1 source, are simulated" in page.text["header"]
    for section in ("modalities", "sources", "examples", "duplicates", "licences"):
        text = page.text[section]
        assert "simulated" in text, section
        for place in re.finditer("made-pet(?!/)", text):
            if section != "examples":
                assert text[place.end() :].lstrip().startswith("simulated"), (section, place)
    assert page.text["examples"].count("simulated") == 1
    for entry in facts["sources"]:
        entry["simulated"] = False
    assert "simulated" not in "".join(Page(build(facts, examples)[0]).text.values())


def test_a_modality_that_is_partly_simulated(facts):
    facts["sources"][0]["simulated"], facts["sources"][3]["modality"] = True, "CT"
    facts["modalities"][0]["sources"], facts["modalities"][3]["sources"] = 2, 0
    assert "CT simulated" in Page(build(facts)[0]).text["modalities"], "a source that gave nothing is not shown there"
    facts["sources"][1]["modality"] = "CT"
    facts["modalities"][0] = modality("CT", facts["sources"])
    facts["modalities"][1] = modality("ultrasound", facts["sources"])
    assert "CT partly simulated" in Page(build(facts)[0]).text["modalities"]


def test_duplicates(facts, examples):
    page = Page(build(facts, examples)[0])
    text = page.text["duplicates"]
    assert (
        "44 slices dropped: 5 with the same pixels, 39 similar; 42 repeat an image of their own source, 2 one" in text
    )
    titles = [a["title"] for tag, a in page.tags if tag == "td" and "title" in a]
    assert titles == [
        "heart-ct repeats heart-ct: 0 exact, 31 near",
        "made-pet repeats made-pet: 5 exact, 6 near",
        "made-pet repeats heart-ct: 0 exact, 2 near",
    ]
    facts["duplicates"] = []
    for entry in facts["sources"]:
        for kind in ("exact duplicate", "near duplicate"):
            entry["seen"] -= entry["dropped"].pop(kind, 0)
    assert "No image repeats another one." in Page(build(facts, examples)[0]).text["duplicates"]


def test_burned_in_text(facts, examples):
    page = Page(build(facts, examples)[0])
    text = page.text["text"]
    assert "clinic private | 1,290" in text and "30 % of 4,321" in text and "1,111" in text
    assert "Nothing suspected or declared in the other 3 sources." in text and "heart-ct" not in text
    facts["sources"][3]["burned_in_declared"] = 2
    assert "all-gone  | 0 | 2 | " in Page(build(facts, examples)[0]).text["text"]


def test_licences_and_rules(facts, examples):
    page = Page(build(facts, examples)[0])
    text = page.text["licences"]
    assert text.count("Anybody et al.") == 1, "sources of one licence and citation share a row"
    assert text.index("heart-ct") < text.index("all-gone") < text.index("CC-BY-4.0") < text.index("clinic")
    assert text.count("not stated") == 2
    rules = page.text["rules"]
    assert "foreground | 0.02 of full scale" in rules and "bits | 10" in rules and "others | 1,500, yes" in rules


def test_examples_are_the_files_made_small(facts, examples):
    page = Page(build(facts, examples)[0])
    images = [a["src"] for tag, a in page.tags if tag == "img"]
    assert len(images) == len(examples)
    for url, example in zip(images, examples, strict=True):
        (data,) = re.fullmatch(r"data:image/jpeg;base64,(.+)", url).groups()
        shown = Image.open(io.BytesIO(base64.b64decode(data)))
        whole = decode(example.image, example.kind)
        assert shown.size == (SIDE, SIDE) and shown.mode == whole.mode
        small = np.asarray(whole.resize(shown.size, Image.Resampling.BICUBIC), np.float32)
        assert np.abs(np.asarray(shown, np.float32) - small).mean() < 4  # of 255: JPEG
    assert "heart-ct axial-003" in page.text["examples"]
    titles = [a["title"] for tag, a in page.tags if tag == "img"]
    assert titles == [example.id for example in examples]


def test_everything_of_the_user_is_escaped(facts, examples):
    facts["name"] = HOSTILE
    old = [entry["name"] for entry in facts["sources"]]
    for number, entry in enumerate(facts["sources"]):
        for key in ("anatomy", "licence", "citation", "package", "normalisation"):
            entry[key] = HOSTILE
        entry["name"] = f"{HOSTILE}{number}"
        repeats = {key: count for key, count in entry["dropped"].items() if "duplicate" in key}
        entry["refused"], entry["dropped"] = {HOSTILE: 1}, {HOSTILE: 2, **repeats}
        entry["seen"] = entry["kept"] + sum(entry["dropped"].values())
    for row in facts["duplicates"]:
        row["source"], row["of"] = (f"{HOSTILE}{old.index(row[key])}" for key in ("source", "of"))
    facts["rules"] = {HOSTILE: [HOSTILE]}
    examples = [example._replace(source=f"{HOSTILE}0", id=HOSTILE) for example in examples]
    clean = Page(build(facts)[0])
    page = Page(build(facts, examples)[0])
    assert {tag for tag, _ in page.tags} - {tag for tag, _ in clean.tags} <= {"img", "figure"}
    assert "script" not in {tag for tag, _ in page.tags}
    assert not [a for _, a in page.tags for key in a if key.startswith("on")]
    assert all(
        HOSTILE in page.text[section] for section in SECTIONS if section not in ("modalities", "text", "left-out")
    )
    facts["modalities"][0]["name"] = facts["sources"][0]["modality"] = HOSTILE
    facts["sources"][0]["text_suspected"] = 1
    page = Page(build(facts)[0])
    assert HOSTILE in page.text["modalities"] and HOSTILE in page.text["text"] and HOSTILE in page.text["sources"]
    assert "script" not in {tag for tag, _ in page.tags}


def test_nothing_is_fetched(facts, examples):
    html = build(facts, examples)[0].decode()
    page = Page(html.encode())
    for tag, attributes in page.tags:
        assert tag not in {"script", "link", "iframe", "object", "embed", "base", "form"}
        for key in ("src", "href", "srcset", "action", "data", "poster", "background"):
            assert attributes.get(key, "#").startswith(("#", "data:image/")), (tag, attributes)
    style = html[html.index("<style>") : html.index("</style>")]
    assert "url(" not in style and "@import" not in style and "http" not in style
    policy = [a["content"] for tag, a in page.tags if a.get("http-equiv") == "Content-Security-Policy"]
    assert policy == ["default-src 'none'; img-src data:; style-src 'unsafe-inline'"]


def test_same_bytes_and_the_arguments_untouched(facts, examples):
    before = copy.deepcopy(facts)
    first = build(facts, examples)
    assert facts == before
    assert build(copy.deepcopy(facts), iter(examples)) == first
    shuffled = dict(reversed(facts.items()))
    assert build(shuffled, examples) == first


def test_json_is_the_facts(facts, examples):
    data = json.loads(build(facts, examples)[1])
    assert data.pop("examples")[0] == {"modality": "CT", "source": "heart-ct", "id": "heart-ct/axial-000"}
    assert data == facts


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f: f["sources"][0].update(seen=15_554), "source 'heart-ct': slices seen, kept and dropped"),
        (lambda f: f["sources"][0].update(train=1), "source 'heart-ct': images kept"),
        (lambda f: f.update(images=1), "images: expected 17513, got 1"),
        (lambda f: f.update(val=1), "val images of all sources"),
        (lambda f: f["modalities"][2].update(train=159), "train images of modality 'PET': expected 160, got 159"),
        (lambda f: f["modalities"][2].update(histogram=[1]), "modality 'PET': counts in its histogram"),
        (lambda f: f["sources"][1].update(name="heart-ct"), "sources: expected different names"),
        (lambda f: f["duplicates"][0].update(of="nobody"), "source of a duplicate: expected one of"),
        (lambda f: f["duplicates"][0].update(near=9_999), "source 'heart-ct': near duplicates listed: expected 31"),
        (lambda f: f["duplicates"].pop(1), "source 'made-pet': exact duplicates listed: expected 5, got 0"),
        (lambda f: f["modalities"][0].update(sources=2), "modality 'CT': sources: expected 1, got 2"),
        (lambda f: f["modalities"][0].update(empty=True), "modality 'CT': 'empty' contradicts its counts"),
        (lambda f: f["modalities"][3].update(empty=False), "modality 'OCT': 'empty' contradicts its counts"),
        (lambda f: f["sources"][0].update(patients=-1), "source 'heart-ct': patients: expected at least 0, got -1"),
        (lambda f: f["sources"][1]["refused"].update(timeout=-1), "'clinic': timeout: expected at least 0, got -1"),
        (lambda f: f["modalities"].pop(3), "modality of a source: expected one of .*, got 'OCT'"),
    ],
)
def test_numbers_that_do_not_add_up_are_named(facts, change, message):
    change(facts)
    with pytest.raises(ValueError, match=message):
        build(facts)


def test_an_example_of_no_source(facts, examples):
    with pytest.raises(ValueError, match="source of an example"):
        build(facts, [examples[0]._replace(source="nobody")])


MEASURE = """<script>addEventListener("load", () => {
  const root = document.documentElement, width = root.clientWidth;
  const out = [...document.querySelectorAll("main *")].filter(e => {
    if (e.closest(".scroll") && !e.classList.contains("scroll") || e.closest(".cards thead")) return false;
    const box = e.getBoundingClientRect();
    return box.right > width + 0.5 || box.left < -0.5 || e.tagName != "SPAN" && e.scrollWidth > e.clientWidth + 1
      && e.clientWidth > 0 && !e.classList.contains("scroll") && getComputedStyle(e).display != "inline";
  }).map(e => e.tagName + "." + e.className);
  const boxes = {};
  for (const e of document.querySelectorAll("header, section")) {
    const box = e.getBoundingClientRect();
    boxes[e.id || "header"] = [Math.round(box.top + scrollY), Math.round(box.bottom + scrollY)];
  }
  const images = [...document.images];
  const report = {width, page: root.scrollWidth, height: root.scrollHeight, out, boxes, images: images.length,
    decoded: images.filter(i => i.complete && i.naturalWidth > 0 && i.getBoundingClientRect().width > 40).length};
  parent.document.body.dataset.report = JSON.stringify(report);
});</script>"""


def browse(folder, *arguments: str) -> str:
    """What headless Chromium prints; its processes are gone afterwards, whatever happened."""
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"]
    command += ["--disable-background-networking", "--disable-component-update", "--disable-sync", "--hide-scrollbars"]
    command += ["--disable-dev-shm-usage", f"--user-data-dir={folder / 'profile'}", *arguments]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, start_new_session=True
    )
    try:
        return process.communicate(timeout=60)[0]
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


@pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")
@pytest.mark.parametrize(("width", "scheme"), [(1200, "light"), (400, "dark")])
def test_in_a_browser(facts, examples, width, scheme, tmp_path):
    facts["sources"][0]["name"] = facts["sources"][0]["name"] + "-with-a-name-that-is-long-enough-to-need-two-lines"
    for row in facts["duplicates"]:
        for key in ("source", "of"):
            row[key] = facts["sources"][0]["name"] if row[key] == "heart-ct" else row[key]
    examples = [e._replace(source=facts["sources"][0]["name"]) if e.source == "heart-ct" else e for e in examples]
    for number in range(16):  # a matrix that is wider than any page
        facts["sources"].append(source(f"other-{number}", "CT", 0, 0))
        facts["duplicates"].append({"source": "made-pet", "of": f"other-{number}", "exact": 0, "near": 12_345})
        facts["sources"][2]["dropped"]["near duplicate"] += 12_345
        facts["sources"][2]["seen"] += 12_345
        facts["modalities"][0]["sources"] += 1
    html = build(facts, examples)[0].decode()
    measured = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", html)
    measured = measured.replace("</body>", f"{MEASURE}</body>")
    assert measured.count("<script>") == 1 and "Content-Security-Policy" not in measured
    # in a frame: a window of its own is never narrower than 500 pixels
    frame = f'<iframe style="width:{width}px;height:3000px;border:0" srcdoc="{escape(measured)}"></iframe>'
    (tmp_path / "card.html").write_text(html)
    (tmp_path / "measured.html").write_text(f"<!doctype html><body>{frame}</body>")
    look = f"--blink-settings=preferredColorScheme={1 if scheme == 'light' else 0}"

    dom = browse(tmp_path, look, "--window-size=1300,3100", "--dump-dom", (tmp_path / "measured.html").as_uri())
    found = re.search(r'data-report="([^"]*)"', dom)
    assert found, "the browser did not load the page"
    report = json.loads(found[1].replace("&quot;", '"'))
    assert report["width"] == width
    assert report["page"] == width and report["out"] == []
    assert report["images"] == report["decoded"] == len(examples)
    assert list(report["boxes"]) == ["header", *SECTIONS]

    shot = tmp_path / "card.png"
    browse(
        tmp_path, look, f"--window-size={width},{report['height']}", f"--screenshot={shot}",
        (tmp_path / "card.html").as_uri(),
    )  # fmt: skip
    pixels = np.asarray(Image.open(shot).convert("RGB"))
    assert pixels.shape == (report["height"], width, 3)
    assert (pixels[2, 2].mean() > 200) == (scheme == "light")
    for name, (top, bottom) in report["boxes"].items():
        part = pixels[top:bottom].reshape(-1, 3)
        colours, counts = np.unique(part, axis=0, return_counts=True)
        assert bottom - top > 60 and len(colours) > 30, name
        assert counts.max() < 0.99 * len(part), f"{name} is nearly blank"


def test_what_was_left_out_has_a_section_of_its_own(facts):
    for row in facts["sources"]:
        row["refused"] = {}
    facts["sources"][0]["refused"] = {"localizer": 1_200, "unreadable": 7}
    facts["left_out"] = [{"source": "heart-ct", "units": 3, "refused": {"secondary capture": 5, "localizer": 1}}]
    page, numbers = build(facts)
    section = page.decode().split('id="left-out"', 1)[1].split("</section>", 1)[0]
    assert "1,201" in section and "a localizer" in section and "secondary capture" in section and "5" in section
    assert "unreadable" in section and "label map" not in section and "near duplicate" in section
    assert "left_out.html" in section
    for row in facts["sources"]:
        row["public"] = True
    assert "left_out.html" not in build(facts)[0].decode()
    assert json.loads(numbers)["left_out"] == facts["left_out"]


def test_a_set_that_leaves_nothing_out_has_no_such_section(facts):
    for row in facts["sources"]:
        row |= {"refused": {}, "dropped": {}, "seen": row["kept"]}
    facts["duplicates"] = []
    assert 'id="left-out"' not in build(facts)[0].decode()


def test_every_reason_to_leave_something_out_is_explained():
    assert all(_MEANING[reason] for reason in REASONS) and all(_DROPPED[reason] for reason in filters.DROPPED)


def test_what_is_held_out_is_counted_and_what_is_unsure_is_said(facts):
    assert "Train and held out" not in build(facts)[0].decode()
    row = {"source": "a<b>", "by": "series", "images": {"train": 90, "val": 10}, "fits": True, "sure": True}
    row |= {"groups": {"file": {"train": 18, "val": 2}}, "wanted": 0.05, "patients": 2}
    page = build(facts | {"split": [row]})[0].decode()
    assert "18 files" in page and "of 2 files" in page and "a&lt;b&gt;" in page
    assert "2 patients, by headers and folders, are too few" in page and "--patient" in page


def test_a_split_says_what_stands_for_patients():
    row = {"by": "patient", "groups": {"patient": {"train": 3, "val": 1}}}
    assert card._split_by(row) == "patient"
    assert card._split_by({**row, "groups": row["groups"] | {"folder": {"train": 2, "val": 0}}}) == "patient or folder"
    assert card._split_by({**row, "groups": {"file": {"train": 2, "val": 1}}}) == "file"
    assert card._split_by({**row, "groups": {}, "unnamed": ["file"]}) == "patient or file"  # after a withdrawal
    assert card._split_by({**row, "by": "series", "groups": {"file": {}}}) == "series, or file"
