"""The page about reliability says what was measured, and everything that was promised was."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.skipif("DEX_RELIABILITY_OUT" in os.environ, reason="the results are being made")


def test_the_page_is_what_the_results_say():
    done = subprocess.run([sys.executable, str(ROOT / "scripts/reliability_page.py"), "--check"], capture_output=True)
    assert done.returncode == 0, done.stdout


def test_the_results_are_of_every_row():
    results = json.loads((ROOT / "benchmarks/results/reliability/two-ranks.json").read_text())
    assert results["full"] and {row["row"] for row in results["rows"]} == {*range(7, 19), 27, 28}
    assert not results["failed"] and all(row["done"] == row["wanted"] for row in results["rows"])
    assert {"commit", "torch", "cpu"} <= results["machine"].keys()
    assert all(row["commit"] and not row["dirty"] and row["date"] and row["cpu"] for row in results["rows"])


def test_the_results_are_of_the_promises_as_they_are(tried):
    """Runs after all that try a promise. Numbers aside: a sample takes fewer steps."""

    def words(row):
        return row["row"], re.sub(r"[\d,]+", "#", row["promise"])

    if not tried:
        pytest.skip("no promise was tried in this session")
    results = json.loads((ROOT / "benchmarks/results/reliability/two-ranks.json").read_text())
    assert {words(row) for row in tried} <= {words(row) for row in results["rows"]}, "run `make reliability`"
