"""Notebooks: what is committed was run once from top to bottom, and runs again in an empty folder."""

import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


def text_of(cell) -> str:
    return "".join("".join(output.get("text", ())) for output in cell["outputs"])


def pictures_of(cells) -> list[int]:
    """Number of pictures below each cell."""
    return [sum("image" in " ".join(o.get("data", ())) for o in cell.get("outputs", ())) for cell in cells]


@pytest.fixture(params=NOTEBOOKS, ids=lambda path: path.stem)
def notebook(request):
    return request.param


@pytest.fixture
def cells(notebook):
    return json.loads(notebook.read_text(encoding="utf-8"))["cells"]


def test_the_notebooks_are_found():
    assert [path.name for path in NOTEBOOKS] == ["from-images-to-masks.ipynb"]


def test_the_outputs_are_those_of_one_run_without_errors(notebook, cells):
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    outputs = [output for cell in code for output in cell["outputs"]]
    assert "error" not in {output["output_type"] for output in outputs}
    assert sum("image/png" in output.get("data", ()) for output in outputs) >= 2
    assert notebook.stat().st_size < 1_000_000
    assert not re.search(r"/(home|root|tmp|work|Users)/", "".join(text_of(cell) for cell in code))


def test_links_lead_somewhere(notebook, cells):
    text = "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown")
    links = re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", text)
    assert len(links) >= 5
    assert [link for link in links if not (notebook.parent / link).is_file()] == []


@pytest.mark.slow
def test_it_runs_in_an_empty_folder(notebook, tmp_path, monkeypatch):
    """About two minutes of one core."""
    import nbformat
    from nbclient import NotebookClient

    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    folder = tmp_path / "a folder é"
    folder.mkdir()
    document = nbformat.read(notebook, as_version=4)
    committed = pictures_of(document.cells)
    NotebookClient(document, timeout=1200, kernel_name="python3", resources={"metadata": {"path": folder}}).execute()
    assert pictures_of(document.cells) == committed
    last = text_of([cell for cell in document.cells if cell["cell_type"] == "code"][-1])
    score, reference = map(float, re.search(r"fine-tuned DEX (\S+), threshold at \d+ (\S+)", last).groups())
    assert score > 0.6 and reference > 0.8  # An empty mask has 0, a full one less than 0.4
