"""What the documentation says: every Python block runs by itself, links and anchors exist, quoted messages are those of
the code."""

import ast
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = sorted([ROOT / "README.md", ROOT / "CHANGELOG.md", ROOT / "benchmarks" / "README.md", *DOCS.rglob("*.md")])
FENCE = re.compile(r"^```[^\n]*\n.*?^```", flags=re.M | re.S)
HEADING = re.compile(r"^#+ (.*)$", flags=re.M)


def name_of(page):
    return page.relative_to(ROOT).as_posix()


def blocks_of(page):
    """Python blocks that need nothing but the extras of `make`; what another block needs stands after its ```python."""
    return re.findall(r"^```python\n(.*?)^```", page.read_text(encoding="utf-8"), flags=re.M | re.S)


BLOCKS = [
    pytest.param(block, f"{name_of(page)}, block {i + 1}", id=f"{name_of(page)}-{i + 1}")
    for page in PAGES
    for i, block in enumerate(blocks_of(page))
]


@pytest.mark.parametrize("block, where", BLOCKS)
def test_each_python_block_runs_by_itself(block, where, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    exec(compile(block, where, "exec"), {"__name__": "__main__"})


@pytest.mark.slow
@pytest.mark.parametrize("block, where", BLOCKS)
def test_each_python_block_runs_in_a_fresh_interpreter(block, where, tmp_path):
    """Nothing that another block has compiled, cached or registered helps it."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", block]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, f"{where}\n{done.stderr}"


def test_the_pages_with_code_are_found():
    assert {"README.md", "docs/layer.md", "docs/faq.md", "docs/your-own-model.md"} <= {
        name_of(page) for page in PAGES if blocks_of(page)
    }


def test_every_kind_of_block_belongs_to_a_test():
    """`needs=...` and `torchrun` are those of tests/dropin/test_guide.py and tests/test_checkpoint_page.py."""
    elsewhere = {"your-own-model.md", "you-have-a-checkpoint.md", "pretraining.md"}
    for page in PAGES:
        kinds = set(re.findall(r"^```(\w[^\n]*)$", page.read_text(encoding="utf-8"), flags=re.M))
        assert kinds <= {"python", "sh", "bash", "yaml"} or page.name in elsewhere, (page, kinds)


def anchors_of(page):
    """The anchors that a forge gives to the headings of a page."""
    seen, anchors = {}, set()
    for heading in HEADING.findall(FENCE.sub("", page.read_text(encoding="utf-8"))):
        text = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading).replace("`", "").strip().lower()
        slug = re.sub(r"[^\w\- ]", "", text).replace(" ", "-")
        seen[slug] = seen.get(slug, -1) + 1
        anchors.add(f"{slug}-{seen[slug]}" if seen[slug] else slug)
    return anchors


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_and_anchors_exist(page):
    dead = []
    for link in re.findall(r"\]\(([^)\s]+)\)", FENCE.sub("", page.read_text(encoding="utf-8"))):
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        if "://" in link:
            continue
        if not target.exists() or (anchor and target.suffix == ".md" and anchor not in anchors_of(target)):
            dead.append(link)
    assert not dead


def entries(nav):
    for item in nav:
        for value in item.values():
            yield from entries(value) if isinstance(value, list) else [value]


def test_every_page_is_in_the_navigation_and_the_index():
    nav = list(entries(tomllib.loads((ROOT / "zensical.toml").read_text(encoding="utf-8"))["project"]["nav"]))
    pages = {page.relative_to(DOCS).as_posix() for page in DOCS.rglob("*.md")}
    assert sorted(nav) == sorted(pages | {"changelog.md"})
    listed = re.findall(r"\]\(([\w/-]+\.md)\)", (DOCS / "index.md").read_text(encoding="utf-8"))
    assert pages - {"index.md"} == set(listed)


def texts(tree):
    """Every text of a module; what an f-string fills in is a NUL."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value
        if isinstance(node, ast.JoinedStr):
            yield "".join(part.value if isinstance(part, ast.Constant) else "\0" for part in node.values)


def test_messages_of_the_troubleshooting_page_are_those_of_the_code():
    sources = [*(ROOT / "dexkernels").rglob("*.py"), *(ROOT / "python" / "dex").rglob("*.py")]
    code = "\1".join(text for path in sources for text in texts(ast.parse(path.read_text(encoding="utf-8"))))
    page = (DOCS / "troubleshooting.md").read_text(encoding="utf-8")
    messages = re.findall(r"^### `(.*)`$", page, flags=re.M)
    assert len(messages) > 30 and page.count("\n### ") == len(messages) == len(set(messages))
    unknown = []
    for message in messages:
        parts = [re.escape(part) for part in message.split("...") if part]
        if not re.search("[^\1]*".join(parts), code):
            unknown.append(message)
    assert not unknown
