import json

import pytest

from dex.tasks.metrics.evaluation_file import read, write


def test_what_is_read_is_what_was_written(classified, segmented, tmp_path):
    path = tmp_path / "an évaluation.json"
    for evaluation in (classified(run="läuft", leak=None), segmented(), segmented(spacing=None)):
        write(evaluation, path)
        again = read(path)
        assert again == evaluation and again.summary() == evaluation.summary()
        plain = json.loads(path.read_text(encoding="utf-8"))
        first = next(iter(evaluation.summary().items()))
        assert plain["summary"][first[0]]["low"] == first[1].low
        assert list(plain["by_class"][evaluation.metric]) == list(evaluation.classes)


def test_the_file_stays_when_writing_fails(classified, tmp_path):
    path = tmp_path / "e.json"
    write(classified(), path)
    before = path.read_bytes()
    with pytest.raises(TypeError):
        write(classified()._replace(about={"run": object()}), path)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


def changed(plain, *way):
    *keys, last, value = way
    inner = plain
    for key in keys:
        inner = inner[key]
    inner[last] = value
    return plain


@pytest.mark.parametrize(
    "way",
    [
        ("cases", []),
        ("cases", 0, "label", 9),
        ("cases", 0, "probabilities", [1.0]),
        ("cases", 0, {}),
        ("cases", 0, "id", "case-001"),
        ("metric", "dice"),
        ("kind", "segmentation"),
        ("classes", ["one", "two"]),
        ("confusion", [[1]]),
        ("confusion", None),
    ],
)
def test_a_file_that_was_changed_is_refused_by_name(classified, tmp_path, way):
    path = tmp_path / "e.json"
    write(classified(), path)
    path.write_text(json.dumps(changed(json.loads(path.read_text()), *way)))
    with pytest.raises(ValueError, match=r"evaluation: expected a complete .*, got one that was changed in .*e\.json"):
        read(path)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"3", b"\xff\xfe", b'{"a": 1}', b"[" * 100000])
def test_another_file_is_refused_by_name(tmp_path, content):
    path = tmp_path / "e.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"evaluation: expected .* got .*e\.json"):
        read(path)
    path.write_text('{"format": "dex-evaluation", "version": 99}')
    with pytest.raises(ValueError, match="version 1, got dex-evaluation 99"):
        read(path)
    with pytest.raises(ValueError, match="does not exist"):
        read(tmp_path / "none.json")
    with pytest.raises(ValueError, match="IsADirectoryError"):
        read(tmp_path)
