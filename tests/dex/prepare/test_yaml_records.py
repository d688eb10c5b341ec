"""Dataclasses from YAML: values of the annotated types alone, and back without a loss."""

from dataclasses import dataclass

import pytest

pytest.importorskip("yaml")

from dex.prepare import yaml_records  # noqa: E402


@dataclass(frozen=True)
class Inner:
    size: int
    box: tuple[int, int] | None = None


@dataclass(frozen=True)
class Outer:
    name: str
    share: float = 0.5
    files: tuple[str, ...] = ()
    parts: tuple[Inner, ...] = ()
    public: bool = False


def test_there_and_back():
    values = yaml_records.load("name: ü\nshare: 1\nfiles: [a, b]\nparts: [{size: 3, box: [1, 2]}, {size: 4}]".encode())
    outer = yaml_records.build(Outer, values, "")
    assert outer == Outer("ü", 1.0, ("a", "b"), (Inner(3, (1, 2)), Inner(4))) and isinstance(outer.share, float)
    assert yaml_records.plain(outer) == values
    assert yaml_records.build(Outer, yaml_records.plain(outer), "") == outer


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[a]", "description: expected keys and values, got list"),
        ("{}", "name: missing"),
        ("{name: a, other: 1}", "other: expected one of name, share, files, parts, public"),
        ("{name: 3}", "name: expected str, got 3"),
        ("{name: a, share: true}", "share: expected float, got True"),
        ("{name: a, public: 1}", "public: expected bool, got 1"),
        ("{name: a, files: b}", "files: expected a list, got 'b'"),
        ("{name: a, parts: [{box: [1, 2]}]}", "parts.size: missing"),
        ("{name: a, parts: [{size: 1, box: [1]}]}", "parts.box: expected 2 values, got 1"),
        ("{name: a, parts: [7]}", "parts: expected keys and values, got int"),
    ],
)
def test_other_values_are_refused_by_field(text, message):
    with pytest.raises(ValueError) as caught:
        yaml_records.build(Outer, yaml_records.load(text.encode()), "")
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"{a: 1, a: 2}", "a: expected once"),
        (b"{1: 2}", "expected keys that are words"),
        (b"a: [", "expected YAML"),
        (b"\xff\xfe", "expected YAML"),
        (b"!!python/object/apply:os.getcwd []", "expected YAML"),
        (b"#" * (yaml_records.MAX_YAML_BYTES + 1), "expected at most 1048576 bytes"),
    ],
)
def test_other_files_are_refused(tmp_path, data, message):
    (tmp_path / "a.yaml").write_bytes(data)
    with pytest.raises(ValueError, match=message):
        yaml_records.read(tmp_path / "a.yaml")
    with pytest.raises(ValueError, match="expected a source description; No such file"):
        yaml_records.read(tmp_path / "b.yaml")
