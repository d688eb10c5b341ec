"""The process that runs kernels: a fault, a hang or chatter there is a finding, and the next step goes on."""

import json
import sys
import threading
import time

import pytest
import torch

from dexkernels.verification import worker as module
from dexkernels.verification.cases import bytes_needed
from dexkernels.verification.record import Sizes
from dexkernels.verification.worker import Died, Worker, answer, check, fitting, timed

CPU = torch.device("cpu")
TINY = Sizes(3, 5, 9, 14, 4, 2)
CHECK = {"kind": "check", "op": "align_loss", "backend": "reference", "dtype": "float32", "shapes": [list(TINY)]}


@pytest.fixture(autouse=True)
def no_other_backend(request):
    if request.config.getoption("--backend") or request.config.getoption("--device") != "cpu":
        pytest.skip("on a CPU, with the backends that it asks for")


def python(code):
    return Worker(command=(sys.executable, "-c", f"import json, os, sys, time\nfor line in sys.stdin:\n    {code}"))


@pytest.mark.slow
def test_answers_of_a_real_process():
    with Worker() as worker:
        found = worker.ask(CHECK | {"device": "cpu"}, 120)
        assert found["state"] == "right" and found["error"] < 1e-6
        assert "unknown" in worker.ask(CHECK | {"device": "cpu", "backend": "unknown"}, 120)["failed"]


def test_a_process_that_dies_is_named_with_its_last_words_and_started_again():
    dies = "step = json.loads(line)\n    if step['n'] == 1: print('why', file=sys.stderr); os._exit(9)\n"
    with python(dies + "    print(json.dumps(step), flush=True)") as worker:
        assert worker.ask({"n": 0}, 60) == {"n": 0}
        with pytest.raises(Died, match="^ProcessDied: exit status 9, why$"):
            worker.ask({"n": 1}, 60)
        assert worker.ask({"n": 2}, 60) == {"n": 2}


def test_a_process_that_is_killed():
    with python("os.kill(os.getpid(), 11)") as worker, pytest.raises(Died, match="exit status -11"):
        worker.ask({}, 60)


def test_a_process_that_hangs_is_ended_and_started_again():
    with python("time.sleep(0 if 'quick' in line else 60); print(line, flush=True)") as worker:
        began = time.monotonic()
        with pytest.raises(Died, match="^TimeoutError: no answer within 0 s$"):
            worker.ask({"slow": 1}, 0.4)
        assert time.monotonic() - began < 20
        assert worker.ask({"quick": 1}, 60) == {"quick": 1}


def test_a_process_is_ended_when_it_is_to_stop():
    stop, command = threading.Event(), (sys.executable, "-c", "import time; time.sleep(60)")
    threading.Timer(0.3, stop.set).start()
    began = time.monotonic()
    with Worker(stop, command) as worker, pytest.raises(Died):
        worker.ask({}, 60)
    assert time.monotonic() - began < 20


def test_as_many_images_as_the_memory_holds():
    need = bytes_needed(Sizes())
    assert fitting(Sizes(), 2 * need) == Sizes() and fitting(Sizes(), need).images == 112
    assert fitting(Sizes(), 0).images == 1


def test_nothing_is_left_running():
    with python("print(line, flush=True)") as worker:
        worker.ask({}, 60)
        process = worker._process
    assert process.poll() is not None


def test_the_checks_of_some_shapes():
    found = check("route", "reference", "float32", [TINY, TINY._replace(top_k=1)], CPU)
    assert found["state"] == "right" and found["error"] == found["plain_error"]
    assert not torch.are_deterministic_algorithms_enabled()


def test_what_a_backend_cannot_compute_is_not_asked_of_it(monkeypatch):
    """Of the CUDA library's experts: widths that are not multiples of 8, and float32 altogether."""
    compared = []

    def compare(case, backend, dtype):
        compared.append(case.feature)
        return module_finding("")

    monkeypatch.setattr(module, "compare", compare)
    shapes = [TINY, TINY._replace(dim=16, hidden_dim=24, top_k=1)]
    assert check("grouped_mlp", "cuda", "bfloat16", shapes, CPU)["state"] == "right"
    assert compared == [None, None]  # with the exact GELU, and a layer
    found = check("grouped_mlp", "cuda", "float32", shapes, CPU)
    assert found["state"] == "absent" and found["detail"].startswith("no elements of more than 16 bits: its products")
    assert compared == [None, None]


def test_a_wrong_backend_is_named_with_its_sizes(monkeypatch):
    monkeypatch.setattr(module, "compare", lambda case, backend, dtype: module_finding("result 0: error 1"))
    found = check("route", "triton", "float32", [TINY], CPU)
    assert found["state"] == "wrong" and found["detail"] == f"{TINY}: result 0: error 1"


def module_finding(problem):
    from dexkernels.verification.cases import Finding

    return Finding(1.0, 1e-7, problem)


def test_times_of_what_is_right(monkeypatch):
    """Another backend, in whose place plain torch computes; one more, whose results are off, has no time."""
    cases = module.cases

    def with_others(*arguments):
        case = cases(*arguments)[0]

        def run(backend):
            results = case.run("reference")
            return [t * 2 for t in results] if backend == "wrong" else results

        return [case._replace(run=run, timed=lambda backend: case.timed("reference"))]

    monkeypatch.setattr(module, "cases", with_others)
    found = timed("align_loss", ["same", "wrong"], "float32", TINY, CPU, rounds=2)
    assert set(found["ms"]) == {"reference", "same"} and all(ms > 0 for ms in found["ms"].values())
    assert found["limit"] == "copy" and found["limit_ms"] > 0 and set(found["wrong"]) == {"wrong"}


def test_an_error_is_an_answer():
    found = answer(CHECK | {"device": "cpu", "op": "nothing"})
    assert found == {"failed": "KeyError: 'nothing'", "fatal": False}
    assert json.loads(json.dumps(found)) == found
    step = {"kind": "time", "op": "route", "backends": [], "dtype": "float32", "sizes": list(TINY), "rounds": 1}
    assert set(answer(step | {"device": "cpu"})["ms"]) == {"reference"}
