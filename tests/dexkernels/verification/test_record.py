"""The record as a file, and the rule by which it chooses."""

import json
import multiprocessing
import os
import time

import pytest

from dexkernels.verification import record as module
from dexkernels.verification.record import (
    FOLDER,
    Sizes,
    alone,
    common,
    folder,
    from_json,
    load,
    path_of,
    read,
    shared,
    to_json,
    write,
)

BEST = {("route", "bfloat16"): "triton", ("group_ema_", "float32"): "cuda"}


# --- the rule


def test_the_fastest_that_is_right_is_chosen(right):
    """Not the slower align_loss, not the wrong grouped_mlp however fast; of two GEMAs the faster one."""
    assert right.choices() == BEST


def test_hardly_faster_is_not_faster(right):
    times = tuple(t._replace(ms=0.99) if t.op == "route" else t for t in right.times)
    assert ("route", "bfloat16") not in right._replace(times=times).choices()


@pytest.mark.parametrize("state", ["wrong", "failed", "absent", "no time"])
def test_one_check_that_is_not_right_excludes_a_backend(right, state):
    checks = (*right.checks, right.checks[0]._replace(state=state))
    assert ("route", "bfloat16") not in right._replace(checks=checks).choices()


def test_what_was_not_checked_is_not_chosen(right):
    assert right._replace(checks=()).choices() == {}


def test_each_sizes_have_their_own_choice_and_the_newest_decide(right):
    larger = Sizes()
    newer = right._replace(sizes=(larger,), times=tuple(t._replace(sizes=larger, ms=2.0) for t in right.times))
    both = newer.with_times_of(right)
    assert both.sizes == (*right.sizes, larger) and both.choices() == {} and both.choices(right.sizes[0]) == BEST


def test_times_of_the_same_sizes_are_replaced_and_those_of_other_machines_left_out(right, somewhere):
    again = right._replace(times=tuple(t._replace(ms=3.0) for t in right.times))
    assert again.with_times_of(right) == again
    elsewhere = right._replace(identity=somewhere._replace(driver="1"), sizes=(Sizes(),))
    assert again.with_times_of(elsewhere) == again


def test_only_the_newest_sizes_are_kept(right):
    found = right
    for images in range(1, 12):
        times = tuple(t._replace(sizes=Sizes(images=images)) for t in right.times)
        found = right._replace(sizes=(Sizes(images=images),), times=times).with_times_of(found)
    assert [s.images for s in found.sizes] == list(range(4, 12)) and {t.sizes for t in found.times} == {*found.sizes}


def test_gpus_that_differ_use_what_all_agree_on():
    assert common([BEST, BEST]) == BEST
    assert common([BEST, {("route", "bfloat16"): "triton", ("group_ema_", "float32"): "triton"}]) == {
        ("route", "bfloat16"): "triton"
    }
    assert common([BEST, {}]) == {}


def test_states_for_the_report(right):
    assert right.states("route", "triton") == "bfloat16 right, 2.00 times as fast as plain torch"
    assert right.states("grouped_mlp", "triton") == "bfloat16 wrong" and right.states("route", "cuda") == ""
    assert [c.op for c in right.wrong()] == ["grouped_mlp"]


# --- the file


def test_written_and_read_back(right, somewhere, cache):
    path = write(right)
    assert path == path_of(somewhere) and path.parent == cache and path.name.startswith("nvidia-h200-")
    assert load(somewhere) == (right, "") and sorted(p.name for p in cache.iterdir()) == [path.name]


def test_without_a_file_there_is_no_record_and_nothing_to_say(somewhere):
    assert load(somewhere) == (None, "")


@pytest.mark.parametrize(
    "text",
    ["", "{", "null", "[]", "{}", "\xff\xfe", "[" * 100_000, '{"format": "x"}'],
    ids=["empty", "cut off", "null", "list", "nothing", "no UTF-8", "deep", "other"],
)
def test_a_corrupt_file_counts_as_none_and_says_so(right, somewhere, text):
    path = write(right)
    path.write_bytes(text.encode("latin-1"))
    record, reason = load(somewhere)
    assert record is None and reason.startswith("the record cannot be used: ") and str(path) in reason


def test_a_file_that_is_cut_anywhere_is_no_record(right, somewhere):
    path = write(right)
    whole = path.read_bytes().rstrip()
    for length in range(0, len(whole), 97):
        path.write_bytes(whole[:length])
        assert load(somewhere)[0] is None


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda v: v.update(version=2), "format: expected 'dexkernels verification', version 1"),
        (lambda v: v.update(more=1), "record: expected format"),
        (lambda v: v["identity"].pop("driver"), "identity: expected gpu"),
        (lambda v: v["identity"].update(gpu=5), "identity.gpu: unexpected 5"),
        (lambda v: v["checks"][0].update(state="fine"), r"checks\[0\].state: unexpected 'fine'"),
        (lambda v: v["checks"][0].update(error=float("nan")), r"checks\[0\].error: unexpected nan"),
        (lambda v: v["times"][1].update(ms=None), r"times\[1\].ms: unexpected None"),
        (lambda v: v["times"][1].update(ms=-1.0), r"times\[1\].ms: unexpected -1.0"),
        (lambda v: v["times"][1]["sizes"].update(dim=0), r"times\[1\].sizes.dim: unexpected 0"),
        (lambda v: v["times"][1]["sizes"].update(dim=True), r"times\[1\].sizes.dim: unexpected True"),
        (lambda v: v.update(times=7), "sizes, checks, times: expected lists"),
        (lambda v: v.update(sizes=[]), "sizes, checks, times: expected lists, with at least one size"),
        (lambda v: v["sizes"][0].update(top_k="2"), r"sizes\[0\].top_k: unexpected '2'"),
        (lambda v: v.update(date=None), "date: unexpected None"),
    ],
)
def test_what_is_not_of_this_format_is_refused_by_name(right, change, message):
    value = json.loads(json.dumps(to_json(right)))
    assert from_json(value) == right
    change(value)
    with pytest.raises(ValueError, match=f"^{message}"):
        from_json(value)


def test_a_record_of_another_machine_is_foreign(right, somewhere):
    other = somewhere._replace(driver="580.2")
    write(right).rename(path_of(other))
    record, reason = load(other)
    assert record is None and "is of another machine: NVIDIA H200 (driver 570.1" in reason


def test_a_folder_in_the_place_of_the_record(somewhere):
    path_of(somewhere).mkdir(parents=True)
    assert load(somewhere)[1].startswith("the record cannot be used: ")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_is_read_only(right, cache):
    cache.mkdir()
    cache.chmod(0o500)
    with pytest.raises(PermissionError):
        write(right)


def test_a_file_in_the_place_of_the_folder(right, somewhere, cache):
    cache.write_text("")
    with pytest.raises(OSError):
        write(right)
    assert load(somewhere)[0] is None
    with alone(somewhere):
        pass


def test_where_records_lie(monkeypatch, tmp_path):
    assert str(folder()) == os.environ[FOLDER]
    monkeypatch.setenv(FOLDER, "~/mine")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert folder() == tmp_path / "mine"
    monkeypatch.delenv(FOLDER)
    monkeypatch.setenv("XDG_CACHE_HOME", "/big/cache")
    assert str(folder()) == "/big/cache/dexkernels"
    monkeypatch.setenv("XDG_CACHE_HOME", "not/absolute")
    assert folder() == tmp_path / ".cache/dexkernels"


def test_without_a_home_there_is_no_record(monkeypatch, somewhere):
    def homeless():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv(FOLDER)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(module.Path, "home", homeless)
    record, reason = load(somewhere)
    assert record is None and FOLDER in reason


def test_a_write_that_fails_leaves_the_old_record(right, somewhere, monkeypatch, cache):
    write(right)
    monkeypatch.setattr(module.os, "fsync", lambda descriptor: (_ for _ in ()).throw(OSError(28, "No space left")))
    with pytest.raises(OSError, match="No space"):
        write(right._replace(seconds=1.0))
    assert load(somewhere)[0] == right and len(list(cache.iterdir())) == 1


# --- what is shared


def test_what_is_shared_holds_no_path_and_no_name(right):
    text = json.dumps(shared(right))
    assert "/home" not in text and '"detail": "ValueError"' in text
    assert from_json(shared(right)).choices() == right.choices()


@pytest.mark.parametrize("detail", ["/home/me: broken", "me@host died", "no such file: 'x'"])
def test_a_detail_that_begins_otherwise_is_dropped(right, detail):
    checks = (right.checks[2]._replace(detail=detail),)
    assert shared(right._replace(checks=checks))["checks"][0]["detail"] == ""


# --- two at once


def hold(somewhere, log, seconds):
    with alone(somewhere):
        with open(log, "a") as file:
            file.write("in\n")
        time.sleep(seconds)
        with open(log, "a") as file:
            file.write("out\n")


def test_two_processes_take_turns(somewhere, tmp_path):
    log, context = tmp_path / "log", multiprocessing.get_context("fork")
    both = [context.Process(target=hold, args=(somewhere, log, 0.3)) for _ in range(2)]
    for process in both:
        process.start()
    for process in both:
        process.join(30)
        assert process.exitcode == 0
    assert log.read_text().split() == ["in", "out", "in", "out"]


def write_often(record, times):
    for _ in range(times):
        write(record)


def test_two_processes_that_write_at_once_leave_a_whole_record(right, somewhere, cache):
    context = multiprocessing.get_context("fork")
    records = [right._replace(seconds=float(n)) for n in (1, 2)]
    both = [context.Process(target=write_often, args=(record, 40)) for record in records]
    for process in both:
        process.start()
    while any(process.is_alive() for process in both):
        if path_of(somewhere).exists():
            assert read(path_of(somewhere)) in records
    assert load(somewhere)[0] in records and len(list(cache.iterdir())) == 1
