"""Files of benchmarks/results/, and what is made from them: what was measured of the backends, tables of the pages."""

import copy
import json
import shutil
import subprocess
import sys
import types
import xml.etree.ElementTree
from pathlib import Path

import cpu_record
import pages
import pytest
import record

ROOT = Path(__file__).parents[2]


def row(backend="triton", ratio=2.0, **changed):
    made = {
        "case": "route forward",
        "shape": {"B": 8, "E": 4, "routing": "uniform"},
        "backend": backend,
        "dtype": "float32",
        "baseline": "reference",
        "ms": 0.5,
        "baseline_ms": 0.5 * ratio,
        "ratio": ratio,
        "tflops": None,
        "gbps": 100,
        "share_of_limit": 0.4,
        "max_rel_err": 1e-6,
        "peak_mb": 3.5,
    }
    return made | changed


def result(*rows, device="NVIDIA H100 80GB HBM3", date="2026-11-25", architecture="sm_90"):
    versions = dict.fromkeys(record.VERSIONS, "1.0") | {"architecture": architecture}
    ceilings = {"copy_gbps": 3000.0, "bf16_tflops": 800}
    return {
        "device": device,
        "date": date,
        "commit": "0123abc",
        "versions": versions,
        "ceilings": ceilings,
        "rows": list(rows),
    }


REFERENCE = row("reference", 1.0)


# --- what is committed


def test_committed_results_are_right():
    for path in record.RESULTS.glob("*.json"):
        assert path.name == record.name_of(record.read(path))
    assert {p.suffix for p in record.RESULTS.iterdir()} <= {".json", ""}


def test_committed_pages_and_modules_follow_from_the_results():
    """`make pages` mends it."""
    first, second = pages.made(record.newest()), pages.made(record.newest())
    assert first == second and {p.name for p in first} == {
        "_measured.py",
        "_executed.py",
        "README.md",
        "kernels.md",
        "verify.md",
    }
    for path, text in first.items():
        assert path.read_text() == text, path


def test_without_results_nothing_is_claimed(tmp_path):
    assert record.newest(tmp_path) == []
    assert "Not measured on a GPU" in pages.region("summary", []) == pages.region("full", [])
    assert evaluated([]) == ({}, {})


# --- the files


def test_written_files_come_back(tmp_path):
    written = result(REFERENCE, row(), row(shape={"B": 9}, tflops=1.5, share_of_limit=None))
    path = tmp_path / record.name_of(written)
    record.write(written, path)
    assert path.name == "h100-80gb-hbm3-2026-11-25.json" and record.read(path) == written
    assert path.read_text().count("\n") < 30  # a row is a line


def test_the_newest_of_each_device_counts(tmp_path):
    for device, date in (("A", "2026-01-02"), ("A", "2026-03-01"), ("B", "2025-01-01")):
        made = result(row(), device=device, date=date)
        record.write(made, tmp_path / record.name_of(made))
    assert [(r["device"], r["date"]) for r in record.newest(tmp_path)] == [("A", "2026-03-01"), ("B", "2025-01-01")]


def test_a_run_adds_its_rows_to_those_of_an_earlier_one(tmp_path):
    """A process for every benchmark, of which any may be killed: one file, what is measured anew replaced."""
    first = result(REFERENCE, row(ratio=2.0))
    assert record.add(first, tmp_path) == "" and record.earlier(tmp_path, first) == first
    second = result(row(ratio=3.0), row(case="group_ema_"))
    assert record.add(second, tmp_path) == ""
    (path,) = tmp_path.iterdir()
    assert record.read(path)["rows"] == [REFERENCE, row(ratio=3.0), row(case="group_ema_")]
    for changed in ({"commit": "fedcba9"}, {"versions": first["versions"] | {"torch": "2.0"}}):
        assert record.earlier(tmp_path, first | changed) is None
        assert record.add(first | changed, tmp_path) == "" and record.read(path) == first | changed


def test_what_was_measured_is_not_lost_for_a_fault_around_it(tmp_path):
    first = result(REFERENCE, row()) | {"commit": "unknown"}
    assert "commit: expected a hash" in record.add(first, tmp_path)
    second = result(row(case="group_ema_")) | {"commit": "unknown"}
    assert "commit: expected a hash" in record.add(second, tmp_path)
    (path,) = tmp_path.iterdir()
    assert path.name == "rejected.json"
    kept = json.loads(path.read_text())
    assert kept["rows"] == [REFERENCE, row(), row(case="group_ema_")]
    assert record.problems(kept | {"commit": "0123abc"}) == []


def at(*path, to):
    def change(made):
        for key in path[:-1]:
            made = made[key]
        if to is KeyError:
            del made[path[-1]]
        else:
            made[path[-1]] = to

    return change


ROW = ("rows", 0)


@pytest.mark.parametrize(
    "change, message",
    [
        (at("device", to=KeyError), "expected an object of"),
        (at("more", to=1), "expected an object of"),
        (at("date", to="25.11.2026"), "date: expected YYYY-MM-DD"),
        (at("commit", to="unknown"), "commit: expected a hash"),
        (at("versions", "torch", to=KeyError), "versions.torch"),
        (at("versions", "architecture", to="9.0"), "versions.architecture"),
        (at("ceilings", "copy_gbps", to=0), "ceilings: expected"),
        (at("rows", to=[]), "rows: expected at least one"),
        (at("rows", to={}), "rows: expected list"),
        (at("rows", to=[row(), row()]), "measured twice"),
        (at(*ROW, "ms", to=KeyError), r"rows\[0\].expected case"),
        (at(*ROW, "ms", to="1"), r"rows\[0\].ms: unexpected"),
        (at(*ROW, "ms", to=True), r"rows\[0\].ms: unexpected"),
        (at(*ROW, "ms", to=0), "ms: expected above 0"),
        (at(*ROW, "baseline_ms", to=float("nan")), "baseline_ms: expected a finite"),
        (at(*ROW, "ratio", to=3.0), "ratio: expected baseline_ms / ms"),
        (at(*ROW, "backend", to="fast"), "backend: expected one of"),
        (at(*ROW, "dtype", to="float8"), "dtype: expected one of"),
        (at(*ROW, "shape", to={"B": 1.5}), "shape.B"),
        (at(*ROW, "gbps", to=None), "tflops: expected it or gbps"),
        (at(*ROW, "share_of_limit", to=1.5), "share_of_limit: expected a share"),
        (at(*ROW, "max_rel_err", to=3e-4), "max_rel_err: expected at most"),  # what tf32 has
        (at(*ROW, "max_rel_err", to=-1.0), "max_rel_err: expected at most"),
        (at(*ROW, "peak_mb", to=-1), "peak_mb"),
    ],
)
def test_wrong_files_are_refused(tmp_path, change, message):
    made = copy.deepcopy(result(row()))
    change(made)
    with pytest.raises(ValueError, match=message):
        record.write(made, tmp_path / "file.json")
    assert not list(tmp_path.iterdir())
    (tmp_path / "file.json").write_text(json.dumps(made))
    with pytest.raises(ValueError, match=message):
        record.newest(tmp_path)


# --- which backend is the fastest


def evaluated(results):
    names = {}
    exec(pages.measured_module(results), names)
    fastest = {(v.architecture, v.op): v.backend for v in record.verdicts(results) if v.fastest}
    return fastest, names["MEASURED"]


def test_right_and_faster_everywhere_is_the_fastest():
    other = {"shape": {"B": 64}}
    made = [result(REFERENCE, row(), REFERENCE | other, row(ratio=1.1, **other))]
    fastest, measured = evaluated(made)
    assert fastest == {("sm_90", "route"): "triton"}
    assert set(measured) == {("sm_90", "route", "triton")}
    assert measured["sm_90", "route", "triton"].startswith("1.10 to 2.00 times as fast as plain torch in 2 cases")
    assert all(len(line) <= 120 for line in pages.measured_module(made).splitlines())


@pytest.mark.parametrize(
    "rows, why",
    [
        ((REFERENCE, row(ratio=0.9)), "slower"),
        ((REFERENCE, row(ratio=1.0)), "no faster"),
        ((REFERENCE, row(), REFERENCE | {"dtype": "bfloat16"}, row(ratio=0.99, dtype="bfloat16")), "slower in one"),
        ((REFERENCE, row(), REFERENCE | {"dtype": "bfloat16"}), "wrong in one, so without a row"),
        ((row(),), "plain torch itself was not measured"),
        ((REFERENCE, row(case="grouped_mlp forward")), "another operator"),
        ((REFERENCE, row(baseline="something slow")), "another baseline"),
    ],
)
def test_otherwise_plain_torch_stays(rows, why):
    assert evaluated([result(*rows)])[0] == {}, why


def test_of_two_that_win_the_faster_one():
    ema = {"case": "group_ema_"}
    rows = [REFERENCE | ema, row(**ema), row("cuda", 2.5, ms=0.4, baseline_ms=1.0, **ema)]
    assert evaluated([result(*rows)])[0] == {("sm_90", "group_ema_"): "cuda"}


def test_every_device_of_an_architecture_has_a_say_and_other_architectures_none():
    fast, slow = result(REFERENCE, row()), result(REFERENCE, row(ratio=0.5), device="NVIDIA H200")
    assert evaluated([fast, slow])[0] == {}
    slow["versions"]["architecture"] = "sm_80"
    fastest, measured = evaluated([fast, slow])
    assert fastest == {("sm_90", "route"): "triton"} and len(measured) == 2


# --- the pages


def test_tables_hold_every_row_and_the_limits():
    made = [result(REFERENCE, row(dtype="bfloat16", shape={"B": 8, "N": 65}))]
    full = pages.region("full", made)
    assert full.count("| route forward |") == 2 and "3000 GB/s" in full and "800 TFLOP/s" in full and "0123abc" in full
    assert "| B 8, N 65 | triton | bfloat16 | 0.500 | reference | 1.000 | 2.00 |" in pages.region("summary", made)


def test_peers_that_were_not_timed_are_named():
    made = result(REFERENCE, row())
    made["versions"] |= {"without cupy": "not installed", "without quack": "computes something else: no bias"}
    made["versions"] |= {"grouped_gemm": "0.3.0"}
    text = pages.region("full", [made])
    assert "Not timed: cupy (not installed); quack (computes something else: no bias)." in text


def test_only_marked_regions_change():
    page = "a\n<!-- results: full -->\nold\n<!-- end of results -->\nb\n"
    once = pages.fill(page, [], "page")
    assert once.startswith("a\n<!-- results: full -->\nNot measured") and once.endswith(
        "\n<!-- end of results -->\nb\n"
    )
    assert pages.fill(once, [], "page") == once and "old" not in once
    for broken in ("no marker", "<!-- results: full -->\nopen"):
        with pytest.raises(ValueError, match="page: "):
            pages.fill(broken, [], "page")


def test_ratios_on_a_cpu_come_back_and_say_where_and_how(tmp_path, monkeypatch):
    for name in cpu_record.LIMITS:
        monkeypatch.delenv(name, raising=False)
    rows = [
        cpu_record.Row("step", "loop", 1.25, 1.0, 1.2, "4 ms, loop 5 ms"),
        cpu_record.Row("step", "dense", 0.6, 0.5, 0.65, "5 ms, dense 3 ms"),
    ]
    options = types.SimpleNamespace(processor_time=True)
    cpu_record.write(tmp_path / "folder" / "a.json", rows, "0123456789abcdef", options)
    monkeypatch.setenv("ATEN_CPU_CAPABILITY", "avx2")
    cpu_record.write(tmp_path / "folder" / "b.json", rows[:1], "0123456789abcdef", options)
    results = cpu_record.load(tmp_path / "folder")
    text = cpu_record.tables(results)
    assert "| step | loop | 1.25 | 1.20 | yes | 4 ms, loop 5 ms |" in text
    assert "| step | dense | 0.60 | 0.65 | no | 5 ms, dense 3 ms |" in text
    assert text.count("by processor time") == 2 and text.count("commit 0123456789ab,") == 2
    assert text.count("imitated on a larger processor by `ATEN_CPU_CAPABILITY=avx2`") == 1
    assert cpu_record.tables([]) == cpu_record.NOTHING


def test_the_readme_says_what_a_cpu_measured_and_no_imitated_one():
    rows = [{"case": case, "baseline": baseline, "ratio": 1.96} for case, baseline in cpu_record.HEADLINES]
    ours = {"processor": "A", "capability": "AVX2", "limited": {}, "rows": rows[:1]}
    imitated = ours | {"processor": "B", "limited": {"ATEN_CPU_CAPABILITY": "avx2"}, "rows": rows}
    first, second = cpu_record.headlines([ours, imitated]).splitlines()
    assert "2.0 times as fast (A, AVX2)" in first and "(B" not in first
    assert second.endswith(": not measured.")


# --- the pictures


def measured(letter, sizes, case="layer step", baseline="reference", **changed):
    """Rows of two backends whose cost follows ``changed["ms"]``, a function of the size."""
    base = {"B": 224, "N": 65, "D": 768, "H": 3072, "E": 8, "K": 2}
    ms = changed.pop("ms", lambda size: 0.01 * size)
    return [
        row(
            backend,
            case=case,
            shape=base | {letter: size},
            dtype="bfloat16",
            baseline=baseline,
            ms=ms(size) * factor,
            baseline_ms=ms(size) * (4 if baseline == "reference" else 0.8),
            ratio=(4 if baseline == "reference" else 0.8) / factor,
            tflops=400.0 / factor,
            gbps=2000.0 / factor,
        )
        for size in sizes
        for backend, factor in (("reference", 4), ("triton", 1))
    ]


def example():
    """A results file in which everything that is drawn occurs; its numbers are invented."""
    rows = []
    for case, scale in (("grouped_mlp forward + backward", 1.0), ("layer step", 1.4)):
        for baseline in ("reference", "dense products"):
            for letter, sizes, ms in (
                ("E", (4, 8, 16, 64), lambda e: 2 + e / 80),
                ("B", (8, 64, 896), lambda b: b / 90),
            ):
                rows += measured(letter, sizes, case, baseline, ms=lambda n, ms=ms, scale=scale: scale * ms(n))
    rows += measured("B", (224,), "grouped_mlp forward", ms=lambda b: 0.7)
    rows += measured("E", (8, 64), pages.charts.ALIGNED + "grouped_mlp forward + backward", ms=lambda e: 1.7)
    return result(*rows)


def test_pictures_hold_every_measurement_once():
    drawn = pages.pictures([example()])
    assert drawn.keys() == {"h100-80gb-hbm3-roofline.svg", "h100-80gb-hbm3-growth.svg"}
    roofline, growth = drawn.values()
    for svg in drawn.values():
        xml.etree.ElementTree.fromstring(svg)
        assert "nan" not in svg
    points = {(r["case"], r["backend"], str(r["shape"])) for r in example()["rows"]}
    points -= {p for p in points if p[0].startswith("aligned") and p[1] == "reference"}
    assert roofline.count(" ms</title>") == len(points)
    assert "800 TFLOP/s" in roofline and "3000 GB/s" in roofline
    # 4 sizes of E and 4 of B (224 is among both), for two cases of two backends, and the limit of one case; aligned: 2.
    assert growth.count(" ms</title>") == (4 + 4) * (2 * 2 + 1) + 2
    assert pages.pictures([example()]) == drawn


def test_pictures_move_with_the_results():
    made = example()
    before = pages.pictures([made])
    for r in (r for r in made["rows"] if r["backend"] == "triton" and r["shape"]["E"] == 4):
        r |= {"ms": 2 * r["ms"], "tflops": r["tflops"] / 2, "gbps": r["gbps"] / 4}
    after = pages.pictures([made])
    assert all(before[name] != after[name] for name in before)


def test_what_was_not_measured_is_not_drawn():
    assert pages.pictures([]) == {} and pages.region("charts", []) == pages.NO_CHARTS
    made = [result(REFERENCE, row())]
    assert pages.pictures(made) == {}
    assert pages.region("charts", made).count("nothing was measured for a") == 2
    text = pages.region("charts", [example()])
    assert "(../docs/images/h100-80gb-hbm3-roofline.svg)" in text and "nothing" not in text


def test_pages_are_written_checked_and_cleared(tmp_path, monkeypatch):
    """In a copy of the tree with a results file: what is made, then nothing to do, then what is left without it."""
    code = (
        "benchmarks/record.py",
        "benchmarks/cpu_record.py",
        "scripts/pages.py",
        "scripts/charts.py",
        "scripts/generated.py",
    )
    code += ("scripts/kernel_page.py", "scripts/verified_page.py", "tests/emulator/results.json")
    generated = ("dexkernels/_measured.py", "dexkernels/_executed.py")
    for name in (*pages.PAGES, *generated, *code):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    for name in ("dexkernels/ops", "csrc", "benchmarks/results/cpu"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "docs/images").mkdir(parents=True)
    path = tmp_path / "benchmarks/results" / record.name_of(example())
    record.write(example(), path)

    def run(*arguments):
        return subprocess.run(
            [sys.executable, tmp_path / "scripts/pages.py", *arguments], capture_output=True, text=True
        )

    assert run("--check").returncode == 1
    assert run().returncode == 0 and run("--check").stdout == ""
    assert len(list((tmp_path / "docs/images").iterdir())) == 2
    path.unlink()
    assert "has no result" in run("--check").stdout
    assert run().returncode == 0 and run("--check").returncode == 0
    assert not list((tmp_path / "docs/images").iterdir())
    for name in (*pages.PAGES, *generated):
        assert (tmp_path / name).read_text() == (ROOT / name).read_text()
