"""The drawing of the packages says what the code says."""

import subprocess
import sys
import xml.etree.ElementTree
from pathlib import Path

import architecture
import pytest
from architecture import Import

ROOT = Path(__file__).parents[2]


def test_the_drawing_is_what_the_code_says():
    command = [sys.executable, str(ROOT / "scripts/architecture.py"), "--check"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A package with every way to import."""
    files = {
        "__init__.py": "",
        "a/__init__.py": "from .one import f\n",
        "a/one.py": "from . import two\nfrom ..b import three as t\nimport os\n",
        "a/two.py": "def f():\n    from dex.b.three import g\n    import dex.config\n",
        "b/__init__.py": "",
        "b/three.py": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from dex.config import Config\n",
        "config.py": "import numpy as np\n",
    }
    for name, code in files.items():
        path = tmp_path / "dex" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(code)
    monkeypatch.setattr(architecture, "SOURCES", {"dex": tmp_path / "dex"})
    return architecture.modules()


def test_every_import_is_found(package):
    assert list(package) == ["dex", "dex.a", "dex.a.one", "dex.a.two", "dex.b", "dex.b.three", "dex.config"]
    assert sorted(architecture.imports(package)) == [
        Import("dex.a", "dex.a.one", 1),
        Import("dex.a.one", "dex.a.two", 1),
        Import("dex.a.one", "dex.b.three", 2),
        Import("dex.a.two", "dex.b.three", 2),
        Import("dex.a.two", "dex.config", 3),
        Import("dex.b.three", "dex.config", 3),
    ]


def test_a_module_has_a_package():
    packages = {
        name: architecture.package_of(name) for name in ("dex", "dex.config", "dex.data.loader", "dexkernels.ops")
    }
    assert list(packages.values()) == ["dex", "config", "data", "dexkernels"]


def test_an_import_is_drawn_with_its_number():
    paths = ["dex/__init__", "dex/train/__init__", "dex/train/run", "dex/data/__init__", "dex/data/loader"]
    paths += ["dexkernels/__init__", "dexkernels/ops/__init__", "dexkernels/ops/route/__init__"]
    named = {path.removesuffix("/__init__").replace("/", "."): Path(f"{path}.py") for path in paths}
    found = [Import("dex.train.run", "dex.data.loader", line) for line in range(1, 78)]
    svg = architecture.draw(named, found)
    root = xml.etree.ElementTree.fromstring(svg)
    words = [element.text for element in root.iter("{http://www.w3.org/2000/svg}text")]
    assert "77" in words and {"train", "data", "run", "loader", "dexkernels", "route"} <= set(words)
    assert svg == architecture.draw(named, found)


@pytest.mark.parametrize(
    ("importer", "imported"), [("dex.data.loader", "dex.train.run"), ("dexkernels.layer", "dex.common.units")]
)
def test_an_import_upwards_is_refused(importer, imported):
    with pytest.raises(ValueError, match="expected imports of lower packages, got"):
        architecture.draw({}, [Import(importer, imported, 1)])


def test_words_are_wrapped_and_cut():
    width = 9 * architecture.LETTER
    assert architecture.wrapped(["one", "two", "six"], width, 2) == ["one, two,", "six"]
    assert architecture.wrapped(["one", "two", "six"], width, 1) == ["one, two, ..."]
