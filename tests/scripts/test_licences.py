"""docs/licences.md against constraints.txt, pyproject.toml and the metadata of what is installed here."""

import re
import tomllib
from importlib.metadata import PackageNotFoundError, metadata

import licences
import pytest
from packaging.utils import canonicalize_name

PINS = dict(re.findall(r"^([\w.-]+)==(\S+)$", licences.CONSTRAINTS.read_text(encoding="utf-8"), flags=re.M))
ROWS = {
    name: licences.Package(name, version, licence, tuple(by.split(", ")) if by else ())
    for name, version, licence, by in re.findall(
        r"^\| ([\w.-]+) \| ([\d.]+\S*) \| (.+?) \| ([\w, ]*?) ?\|$",
        licences.PAGE.read_text(encoding="utf-8"),
        flags=re.M,
    )
}


def test_every_pinned_package_is_named_in_its_version():
    """Red after a change of a pin: run `python scripts/licences.py`."""
    page = {canonicalize_name(row.name): row.version for row in ROWS.values()}
    assert page == {canonicalize_name(name): version for name, version in PINS.items()}
    assert "not stated" not in {row.licence for row in ROWS.values()}


def test_licences_are_those_of_the_installed_metadata():
    compared = []
    for row in ROWS.values():
        try:
            fields = metadata(row.name)
        except PackageNotFoundError:
            continue
        if fields["Version"].partition("+")[0] == row.version:
            compared.append(row.name)
            stated = licences.licence_of(
                fields.get("License-Expression"), fields.get("License"), fields.get_all("Classifier", [])
            )
            assert stated == row.licence, row.name
    assert {"torch", "numpy", "pytest"} <= set(compared)


def test_the_sets_that_install_a_package_are_named():
    project = tomllib.loads((licences.ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = {licences.LIBRARY, *project["optional-dependencies"]}
    assert {by for row in ROWS.values() for by in row.installed_by} <= extras
    assert ROWS["torch"].installed_by == ("library",)
    assert ROWS["pylibjpeg-libjpeg"].installed_by == ("data",)  # The only one under the GPL
    assert [row.name for row in ROWS.values() if "GPL" in row.licence] == ["pylibjpeg-libjpeg"]


@pytest.mark.parametrize(
    ("expression", "text", "classifiers", "licence"),
    [
        ("MIT", "BSD", ["License :: OSI Approved :: ISC License (ISCL)"], "MIT"),
        (None, "BSD-3-Clause", ["License :: OSI Approved :: BSD License"], "BSD-3-Clause"),
        (None, "Copyright\nAll rights", ["Topic :: X", "License :: OSI Approved :: BSD License"], "BSD License"),
        ("", "UNKNOWN", ["License :: OSI Approved :: MIT License"], "MIT License"),
        (None, None, [], ""),
    ],
)
def test_the_licence_of_metadata(expression, text, classifiers, licence):
    assert licences.licence_of(expression, text, classifiers) == licence


def test_what_an_extra_reaches():
    known = {
        "a": {"requires_dist": ["b[fast]>=1", "never; sys_platform == 'win32'", "d; extra == 'x'"]},
        "b": {"requires_dist": ["c; extra == 'fast'", "a"]},
        "c": {},
        "d": {"requires_dist": []},
        "never": {},
    }
    assert licences.reached(["A>=2"], known) == {"a", "b", "c"}
    assert licences.reached(["a[x]", "unknown"], known) == {"a", "b", "c", "d"}
    assert licences.reached(["c; sys_platform == 'win32'"], known) == set()
