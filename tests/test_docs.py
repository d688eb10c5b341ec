"""The Python blocks of README and docs run as they stand, in order; links to files of the repository exist."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").glob("*.md")])


def blocks_of(page):
    return re.findall(r"^```python\n(.*?)^```", page.read_text(), flags=re.M | re.S)


# docs/your-own-model.md has blocks that need other packages; tests/dropin/test_guide.py runs all of it.
WITH_CODE = [page for page in PAGES if blocks_of(page) and page.name != "your-own-model.md"]


@pytest.mark.parametrize("page", WITH_CODE, ids=lambda p: p.name)
def test_python_blocks_run(page):
    names = {}
    for i, block in enumerate(blocks_of(page)):
        exec(compile(block, f"{page.name}, block {i + 1}", "exec"), names)


def test_the_pages_with_code_are_found():
    assert {"README.md", "layer.md"} <= {page.name for page in WITH_CODE}


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_exist(page):
    links = re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text())
    missing = [link for link in links if "://" not in link and not (page.parent / link).exists()]
    assert not missing
