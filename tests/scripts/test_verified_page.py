"""The table of contributed records, and that those which are committed can be read and hold no path."""

import json

import pages
import pytest
import verified_page

from dexkernels.verification import record
from dexkernels.verification.identity import Identity
from dexkernels.verification.record import Check, Record, Sizes, Timing


@pytest.fixture
def contributed():
    who = Identity("NVIDIA H200", "sm_90", "570.1", "2.11.0", "12.8", "3.6.0", "0.1.0", "0123456789abcdef")
    checks = (
        Check("route", "reference", "bfloat16", "right", 1e-3, 1e-3, ""),
        Check("route", "triton", "bfloat16", "right", 1e-3, 1e-3, ""),
        Check("align_loss", "triton", "bfloat16", "wrong", None, 1e-3, "result 0: error inf"),
        Check("group_ema_", "cuda", "float32", "absent", None, None, "no nvcc"),
    )
    old, new = Sizes(images=1), Sizes()
    times = tuple(Timing("route", "triton", "bfloat16", s, ms, 1.0, 0.1, "copy") for s, ms in ((old, 9.0), (new, 0.4)))
    return record.shared(Record(who, "2026-11-30", 9.0, (old, new), checks, times))


def test_a_row_for_each_kernel_that_was_tried(contributed, tmp_path):
    (tmp_path / "h200.json").write_text(json.dumps(contributed))
    text = verified_page.table(verified_page.load(tmp_path))
    rows = [line for line in text.splitlines() if "| NVIDIA H200 |" in line]
    assert len(rows) == 2 and "absent" not in text and "9.000" not in text
    sizes = "B 224, N 65, D 768, H 3072, E 8, K 2"
    assert f"| route | triton | bfloat16 | right, error 1.0e-03 | {sizes} | 0.400 | 2.50 | 25% |" in rows[0]
    assert rows[1].endswith("| align_loss | triton | bfloat16 | wrong |  |  |  |  |")
    assert all(line.count(" | ") == len(verified_page.COLUMNS) - 1 for line in text.splitlines() if "---" not in line)


def test_without_records_nothing_is_claimed(tmp_path):
    assert verified_page.table(verified_page.load(tmp_path)) == verified_page.NOTHING
    assert "docs/verify.md" in pages.PAGES


def test_committed_records_are_records_without_paths():
    for path in verified_page.FOLDER.glob("*.json"):
        value = json.loads(path.read_text(encoding="utf-8"))
        assert record.shared(record.from_json(value)) == value
