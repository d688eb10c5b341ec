"""Run folders that an earlier version wrote (earlier_run/README.md) go on to what that version made of them."""

import hashlib
import json
import shutil
from pathlib import Path

import pytest
import torch

from dex.cli import main
from dex.train import checkpoint
from dex.train.plan import EARLIER_FINGERPRINT
from dex.train.runlog import read_rows

HERE = Path(__file__).parent / "earlier_run"


@pytest.fixture(scope="module")
def resumed(tmp_path_factory):
    """Both runs, taken to their last step; what each said is beside it."""
    root = tmp_path_factory.mktemp("earlier")
    threads = torch.get_num_threads()
    for name in ("folder", "embedded"):
        torch.set_num_threads(expected(name)["threads"])  # sums are cut into as many parts
        shutil.copytree(HERE / name, root / name)
        data = ["--data", str(HERE / "images")] if name == "folder" else []
        assert main(["pretrain", "--resume", str(root / name), *data]) == 0
    torch.set_num_threads(threads)
    return root


def expected(name):
    return json.loads((HERE / f"{name}-expected.json").read_text())


def same_machine(want):
    """Whether the same bits can be expected here."""
    capability = torch.backends.cpu.get_cpu_capability()
    cpu = torch.cpu.get_capabilities().get("cpu_name")
    return (want["torch"], want["capability"], want["cpu"]) == (torch.__version__, capability, cpu)


@pytest.mark.parametrize("name", ["folder", "embedded"])
def test_it_goes_on_to_the_same_numbers(name, resumed):
    want = expected(name)
    rows = [row for row in read_rows(resumed / name / "metrics.jsonl") if row["step"] >= 3]
    got = [{key: row[key] for key in wanted} for row, wanted in zip(rows, want["rows"], strict=True)]
    assert got == [pytest.approx(row, rel=0 if same_machine(want) else 1e-5, abs=0) for row in want["rows"]]
    assert json.loads((resumed / name / "run.json").read_text())["starts"][1]["resumed_from"] == "step-00000003"


@pytest.mark.parametrize("name", ["folder", "embedded"])
def test_it_goes_on_to_the_same_bits(name, resumed):
    want = expected(name)
    if not same_machine(want):
        pytest.skip(f"bits are those of torch {want['torch']} on {want['cpu']} with {want['capability']}")
    sha = hashlib.sha256()
    for key, tensor in sorted(checkpoint.tensors(resumed / name / "checkpoints" / "step-00000006").items()):
        sha.update(key.encode() + tensor.numpy().tobytes())
    assert sha.hexdigest() == want["sha256"]


def test_a_folder_is_known_by_its_paths_and_sizes_and_that_is_said(resumed):
    notes = {name: read_rows(resumed / name / "events.jsonl")[0]["notes"] for name in ("folder", "embedded")}
    assert notes == {"folder": [EARLIER_FINGERPRINT], "embedded": []}


@pytest.mark.parametrize("root", ["as it was left", "resumed"])
def test_a_report_is_made_of_it(root, resumed, tmp_path):
    runs = [str((HERE if root == "as it was left" else resumed) / name) for name in ("folder", "embedded")]
    assert main(["report", *runs, "--out", str(tmp_path / "page.html")]) == 0
    page = (tmp_path / "page.html").read_text()
    assert "folder" in page and "embedded" in page and page.endswith("</html>\n")
