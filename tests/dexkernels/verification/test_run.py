"""`dexkernels.verify` with a worker that plays a GPU: what is right, wrong, dead or late, and what is kept of it."""

import json
import multiprocessing
import threading
import time

import pytest
import torch

import dexkernels
from dexkernels.ops import backends
from dexkernels.verification import choice, record, run
from dexkernels.verification.record import Sizes, load, path_of, to_json
from dexkernels.verification.worker import Died

SIZES = Sizes(8, 5, 16, 32, 4, 2)
FINE = {"state": "right", "error": 1e-3, "plain_error": 1e-3, "detail": ""}


class GPU:
    """Answers steps in the place of a process: ``answers(step)`` gives what differs from a GPU where all is right."""

    def __init__(self, answers):
        self.answers, self.steps = answers, []

    def __call__(self, stop):
        return self

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def ask(self, step, seconds):
        assert 0 < seconds <= run.STEP_SECONDS and json.loads(json.dumps(step)) == step
        self.steps.append(step)
        if (answer := self.answers(step)) is not None:
            return answer
        if step["kind"] == "check":
            return FINE
        ms = {"reference": 1.0} | {b: 0.5 if b == "triton" else 0.6 for b in step["backends"]}
        return {"ms": ms, "limit_ms": 0.25, "limit": "copy", "wrong": {}, "images": step["sizes"][0]}


@pytest.fixture
def gpu(monkeypatch, h200, somewhere, request):
    """``gpu(answers)`` plays the machine; its backends are all there."""
    if request.config.getoption("--backend"):
        pytest.skip("--backend replaces the choice")
    monkeypatch.setattr(run, "identity", lambda device: somewhere)
    monkeypatch.setattr(backends, "why_not", lambda op, backend, feature=None: None)

    def play(answers=lambda step: None):
        played = GPU(answers)
        monkeypatch.setattr(run, "Worker", played)
        return played

    return play


def verify(**options):
    lines = []
    return dexkernels.verify(SIZES, say=lines.append, **options), lines


def test_all_is_checked_and_timed_and_the_record_kept(gpu, somewhere, h200):
    played = gpu()
    found, lines = verify()
    keys = {(op, b, d) for op, t in backends.TABLES.items() for b in t for d in map(choice.name_of, run.DTYPES[op])}
    assert {c[:3] for c in found.checks} == keys and len(found.checks) == len(keys)
    assert {t[:3] for t in found.times} == {key for key in keys if key[1] != "reference"}
    assert load(somewhere)[0] == found and f"record: {path_of(somewhere)}" in lines
    assert found.choices()["grouped_mlp", "bfloat16"] == "triton" and found.wrong() == []
    assert choice.default("grouped_mlp", h200, torch.bfloat16) == "triton"
    triton = [s for s in played.steps if s["kind"] == "check" and s["backend"] == "triton" and s["op"] == "route"]
    assert len(triton) == 3 * len(run.SMALL) and all(step["device"] == "cuda:0" for step in played.steps)


def test_what_training_needs_comes_first(gpu, monkeypatch):
    monkeypatch.setattr(run, "JOBS", 1)
    played = gpu()
    verify()
    dtypes = [step["dtype"] for step in played.steps]
    checks = [d for d, step in zip(dtypes, played.steps, strict=True) if step["kind"] == "check"]
    times = dtypes[len(checks) :]
    order = ["bfloat16", "float32", "float16"]
    assert checks == sorted(checks, key=order.index) and times == sorted(times, key=order.index)
    assert played.steps[0]["op"] == "grouped_mlp"


def of_triton(op, answer):
    def answers(step):
        return answer if step["kind"] == "check" and (step["op"], step["backend"]) == (op, "triton") else None

    return answers


def test_a_wrong_result_is_not_used_and_says_what_to_send(gpu, h200):
    wrong = {"state": "wrong", "error": 0.5, "plain_error": 1e-3, "detail": "result 0: error 0.5"}
    gpu(of_triton("route", wrong))
    found, lines = verify()
    assert [(c.op, c.backend) for c in found.wrong()] == [("route", "triton")] * 3
    assert ("route", "bfloat16") not in found.choices() and not any(t.op == "route" for t in found.times)
    assert any("route triton bfloat16: wrong, error 5.0e-01" in line for line in lines)
    text = " ".join(run.summary(found))
    assert "WRONG OR FAILED: route triton bfloat16" in text and "--share FILE" in text and "dex doctor" in text
    assert choice.default("route", h200, torch.bfloat16) == "reference"


def test_one_shape_that_is_wrong_suffices(gpu):
    def answers(step):
        if step.get("backend") == "triton" and step.get("shapes") == [list(run.SMALL[1])]:
            return FINE | {"state": "wrong", "detail": "odd"}

    gpu(answers)
    found, _ = verify()
    assert {c.state for c in found.checks if c.backend == "triton"} == {"wrong"}


def test_a_kernel_that_takes_its_process_with_it_costs_only_itself(gpu):
    def answers(step):
        if step["kind"] == "check" and (step["op"], step["backend"]) == ("route", "triton"):
            raise Died("ProcessDied: exit status -11")

    gpu(answers)
    found, _ = verify()
    assert {c.state for c in found.checks if c[:2] == ("route", "triton")} == {"failed"}
    assert ("align_loss", "bfloat16") in found.choices() and ("route", "bfloat16") not in found.choices()


def test_wrong_or_failing_at_the_users_sizes_counts(gpu):
    def answers(step):
        if step["kind"] == "time" and step["op"] == "route":
            answer = {"ms": {"reference": 1.0}, "limit_ms": 0.2, "limit": "copy", "images": 8}
            return answer | {"wrong": {"triton": "errors 1"}}
        if step["kind"] == "time" and step["op"] == "align_loss":
            return {"failed": "OutOfMemoryError: no", "fatal": False}

    gpu(answers)
    found, lines = verify()
    assert {(c.op, c.state) for c in found.wrong()} == {("route", "wrong"), ("align_loss", "failed")}
    assert not {op for op, _ in found.choices()} & {"route", "align_loss"}
    assert any("align_loss bfloat16: not timed at B 8" in line for line in lines)


def test_what_the_memory_does_not_hold_is_timed_with_fewer_images_and_says_so(gpu):
    def answers(step):
        if step["kind"] == "time":
            ms = dict.fromkeys(("reference", *step["backends"]), 1.0)
            return {"ms": ms, "limit_ms": 0.2, "limit": "copy", "wrong": {}, "images": 4}

    gpu(answers)
    found, lines = verify()
    assert found.sizes == (SIZES,) and found.times and found.wrong() == [] and found.choices() == {}
    assert "  route bfloat16: timed with 4 images, since memory is limited" in lines
    assert list(run.summary(found)) == ["plain torch everywhere: no kernel was right and faster"]


def test_a_verification_that_is_stopped_tries_nothing_more_and_keeps_nothing(gpu, cache):
    stop = threading.Event()
    played = gpu(lambda step: stop.set())
    found, _ = verify(stop=stop)
    assert 1 <= len(played.steps) <= run.JOBS and found.wrong() == [] and not list(cache.glob("*.json"))


def test_when_plain_torch_itself_is_wrong_nothing_is_chosen(gpu):
    gpu(lambda step: FINE | {"state": "wrong"} if step.get("backend") == "reference" else None)
    found, _ = verify()
    assert found.choices() == {} and {c.backend for c in found.wrong()} == {"reference"}


def test_what_the_time_does_not_suffice_for_is_not_tried(gpu):
    def answers(step):
        time.sleep(0.02)

    played = gpu(answers)
    found, _ = verify(seconds=0.2)
    late = [c for c in found.checks if c.state == "no time"]
    assert late and len(played.steps) < 40 and found.wrong() == []
    assert all((c.op, c.dtype) not in found.choices() or c.state == "right" for c in late)


def test_checks_leave_time_for_timing(gpu, monkeypatch):
    """However slow they are."""
    monkeypatch.setattr(run, "JOBS", 1)
    gpu(lambda step: time.sleep(0.05) if step["kind"] == "check" else None)
    found, _ = verify(seconds=0.6)
    assert any(c.state == "no time" for c in found.checks) and found.times


def test_a_backend_that_cannot_run_here_is_absent(gpu, monkeypatch):
    gpu()
    monkeypatch.setattr(backends, "why_not", lambda op, backend, feature=None: "no nvcc" if backend == "cuda" else None)
    found, _ = verify()
    assert {c.detail for c in found.checks if c.state == "absent"} == {"no nvcc"} and found.wrong() == []


def test_times_of_other_sizes_are_kept(gpu, somewhere):
    gpu()
    verify()
    dexkernels.verify(SIZES._replace(images=9), say=lambda line: None)
    record, _ = load(somewhere)
    assert record.sizes == (SIZES, SIZES._replace(images=9)) and {t.sizes for t in record.times} == {*record.sizes}


def test_a_home_that_is_read_only_costs_the_record_but_not_the_choice(gpu, h200, monkeypatch):
    def refuse(found):
        raise PermissionError(13, "Permission denied", "/cache")

    gpu()
    monkeypatch.setattr(record, "write", refuse)
    found, lines = verify()
    assert "the record was not kept" in lines[-1] and record.FOLDER in lines[-1]
    assert choice.default("route", h200, torch.bfloat16) == "triton" and found.choices()


def test_nothing_is_written_when_it_is_not_to_be_kept(gpu, cache):
    gpu()
    verify(keep=False)
    assert not cache.exists()


def one_of_two(numbers):
    number = next(numbers)
    dexkernels.verify(SIZES._replace(images=number), say=lambda line: None)


def test_two_processes_at_once_leave_the_times_of_both(gpu, somewhere):
    gpu(lambda step: time.sleep(0.003))
    context = multiprocessing.get_context("fork")
    both = [context.Process(target=one_of_two, args=(iter([n]),)) for n in (1, 2)]
    for process in both:
        process.start()
    for process in both:
        process.join(60)
        assert process.exitcode == 0
    found, _ = load(somewhere)
    assert {sizes.images for sizes in found.sizes} == {1, 2}


@pytest.mark.parametrize(
    "given, message",
    [
        ({"device": "mps"}, "device: expected a CUDA device, got mps"),
        ({"device": "nonsense"}, "device: expected a CUDA device, got 'nonsense'"),
        ({"device": "cuda:7"}, "device: expected one of the 1 CUDA devices here, got cuda:7"),
        ({"seconds": 0}, "seconds: expected a number above 0, got 0"),
        ({"sizes": SIZES._replace(top_k=9)}, "top_k: expected at most num_experts = 4, got 9"),
    ],
)
def test_arguments_that_make_no_sense(gpu, given, message):
    gpu()
    with pytest.raises(ValueError, match=message):
        dexkernels.verify(**given)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_without_a_gpu_there_is_nothing_to_verify():
    with pytest.raises(ValueError, match="device: expected a CUDA device, got none"):
        dexkernels.verify()


def test_the_record_is_json_that_other_programs_read(gpu, somewhere):
    gpu()
    found, _ = verify()
    assert json.loads(path_of(somewhere).read_text()) == json.loads(json.dumps(to_json(found)))
