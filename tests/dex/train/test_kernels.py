"""Before a run on GPUs its kernels are verified once for each model of GPU; ranks are threads here, or gloo's.

Run as a program, this file is one of two ranks of gloo.
"""

import functools
import json
import os
import sys
import threading
import time

import pytest
import torch

from dex.common import ranks as meeting
from dex.common.ranks import ALONE, Ranks
from dex.config import Config
from dex.train import kernels
from dexkernels.verification import choice, record
from dexkernels.verification.identity import Identity
from dexkernels.verification.record import FOLDER, Check, Record, Sizes, Timing

WHO = Identity("NVIDIA H200", "sm_90", "570.1", "2.11.0", "12.8", "3.6.0", "0.1.0", "0123456789abcdef")
OTHER = WHO._replace(gpu="NVIDIA A100")
SIZES = Sizes(8, 65, 768, 3072, 8, 2)
OPS = (("route", "bfloat16"), ("grouped_mlp", "bfloat16"))


def found(who=WHO, sizes=SIZES, ops=OPS, state="right"):
    checks = tuple(Check(op, "triton", dtype, state, 1e-3, 1e-3, "") for op, dtype in ops)
    times = tuple(Timing(op, "triton", dtype, sizes, 0.5, 1.0, 0.1, "copy") for op, dtype in ops)
    return Record(who, "2026-11-30", 1.0, (sizes,), checks, times)


@pytest.fixture(autouse=True)
def machine(monkeypatch, tmp_path):
    """GPU i is ``machine[i]``; all of them share a home."""
    gpus = [WHO, WHO, OTHER]
    monkeypatch.setenv(FOLDER, str(tmp_path / "cache"))
    monkeypatch.setattr(kernels, "identity", lambda device: gpus[device.index or 0])
    monkeypatch.setattr(kernels, "_MEET_EVERY", 0.01)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    choice.forget()
    yield gpus
    choice.forget()


@pytest.fixture
def verified(monkeypatch, machine):
    """The devices that were verified; ``verified.give`` says what is found there."""

    class Verified(list):
        give = staticmethod(found)
        seconds = 0.05

        def verify(self, sizes, *, device, say, stop):
            self.append(device.index or 0)
            stop.wait(self.seconds)
            result = self.give(machine[device.index or 0], sizes)
            record.write(result)
            return result

    played = Verified()
    monkeypatch.setattr(kernels, "verify", played.verify)
    return played


def prove(device=0, config=None, ranks=ALONE, waiting=lambda: None):
    return kernels.prove(config or Config(), ranks, torch.device("cuda", device), 8, waiting)


def prove_on(monkeypatch, count, config=None):
    """Notes of ``count`` ranks, each a thread with the GPU of its number."""
    barrier, values = threading.Barrier(count), [None] * count

    def gather(ranks, value, group=None):
        values[ranks.rank] = json.loads(json.dumps(value))
        barrier.wait(30)
        everyone = list(values)
        barrier.wait(30)
        return everyone

    monkeypatch.setattr(kernels, "gather", gather)
    notes = [None] * count

    def rank(number):
        notes[number] = prove(number, config, Ranks(number, count, number))

    threads = [threading.Thread(target=rank, args=(number,)) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert None not in notes
    return notes


def in_use(device):
    return choice.in_use(torch.device("cuda", device))


def test_sizes_of_a_configuration(change):
    assert kernels.sizes_of(Config(), 8) == SIZES
    oblong = change(Config(), model__img_size=(32, 64), model__num_experts=(0, 4) * 6, model__top_k=1)
    assert kernels.sizes_of(oblong, 1) == Sizes(1, 3, 768, 3072, 4, 1)
    assert kernels.sizes_of(change(Config(), model__num_experts=0), 8) is None


def test_a_gpu_without_a_record_is_verified_first(verified, capsys):
    waited = []
    (note,) = prove(waiting=lambda: waited.append(1))
    assert note == "kernels: grouped_mlp in bfloat16 by triton, route in bfloat16 by triton"
    assert verified == [0] and in_use(0) == dict.fromkeys(OPS, "triton") and waited
    assert f"not verified on this GPU yet; {kernels.SWITCH}" in capsys.readouterr().out


def test_a_record_with_the_runs_sizes_is_enough(verified):
    record.write(found())
    prove()
    assert verified == [] and in_use(0) == dict.fromkeys(OPS, "triton")


def test_a_record_of_other_sizes_is_not(verified):
    record.write(found(sizes=SIZES._replace(images=9)))
    prove()
    assert verified == [0]


@pytest.mark.parametrize("fields", [{"model__backend": "reference"}, {"model__num_experts": 0}])
def test_a_backend_that_is_asked_for_and_a_model_without_experts_need_no_record(verified, change, fields):
    assert prove(config=change(Config(), **fields)) == [] and verified == []


def test_a_cpu_needs_no_record(verified):
    assert kernels.prove(Config(), ALONE, torch.device("cpu"), 8) == [] and verified == []


def test_switched_off_nothing_is_verified_but_a_record_is_used(verified, change):
    off = change(Config(), parallel__verify_kernels=False)
    plain, remedy = prove(config=off)
    assert plain == "kernels: plain torch" and "run `dex verify` once, or omit" in remedy
    record.write(found(sizes=SIZES._replace(images=9)))
    prove(config=off)
    assert verified == [] and in_use(0) == dict.fromkeys(OPS, "triton")


def test_a_verification_that_fails_leaves_plain_torch(monkeypatch, capsys):
    def fails(*given, **options):
        raise RuntimeError("no memory")

    monkeypatch.setattr(kernels, "verify", fails)
    assert prove()[0] == "kernels: plain torch" and in_use(0) == {}
    assert "the kernels could not be verified: RuntimeError: no memory" in capsys.readouterr().out


def test_what_is_wrong_is_said(verified):
    verified.give = functools.partial(found, state="wrong")
    notes = prove()
    assert notes[0] == "kernels: plain torch" and "WRONG OR FAILED" in notes[1] and "--share FILE" in notes[1]


def test_an_interrupt_stops_the_verification(verified):
    def interrupt():
        raise KeyboardInterrupt

    verified.seconds = 60
    began = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        prove(waiting=interrupt)
    assert time.monotonic() - began < 20


def test_one_rank_of_each_model_verifies_and_the_others_receive_its_record(verified, monkeypatch, machine):
    machine[:] = [WHO, OTHER, WHO, OTHER]
    notes = prove_on(monkeypatch, 4)
    assert sorted(verified) == [0, 1]
    assert {json.dumps(n) for n in notes} == {json.dumps(notes[0])} and "2 kinds of GPU" in notes[0][1]
    assert all(in_use(rank) == dict.fromkeys(OPS, "triton") for rank in range(4))
    assert record.load(WHO)[0] is not None and record.load(OTHER)[0] is not None


def test_ranks_of_different_models_use_what_all_prove(verified, monkeypatch, machine):
    machine[:] = [WHO, OTHER]
    verified.give = lambda who, sizes: found(who, sizes, OPS if who == WHO else OPS[:1])
    prove_on(monkeypatch, 2)
    assert in_use(0) == in_use(1) == {OPS[0]: "triton"}


def test_homes_of_their_own(verified, monkeypatch, tmp_path):
    """Rank 1 has a record, rank 0 has none: nobody verifies, and rank 0 keeps what it receives."""
    homes = threading.local()
    monkeypatch.setattr(record, "folder", lambda: tmp_path / str(getattr(homes, "number", 0)))
    homes.number = 1
    record.write(found())
    real = kernels.prove

    def with_home(config, ranks, *rest):
        homes.number = ranks.rank
        return real(config, ranks, *rest)

    monkeypatch.setattr(kernels, "prove", with_home)
    prove_on(monkeypatch, 2)
    assert verified == [] and len(list((tmp_path / "0").glob("*.json"))) == 1
    assert in_use(0) == in_use(1) == dict.fromkeys(OPS, "triton")


def test_a_home_that_is_read_only_costs_the_file_alone(verified, monkeypatch, tmp_path):
    (tmp_path / "cache").write_text("in the way")
    verified.verify = None
    monkeypatch.setattr(kernels, "verify", lambda sizes, **_: found(sizes=sizes))
    with pytest.warns(UserWarning, match="the record of the kernels was not kept"):
        prove()
    assert in_use(0) == dict.fromkeys(OPS, "triton")


def test_a_start_records_its_kernels_and_says_when_they_changed():
    device = torch.device("cuda", 0)
    choice.use({OPS[0]: "triton"}, device)
    assert kernels.described(device) == {"route bfloat16": "triton"} and kernels.described(torch.device("cpu")) == {}
    assert kernels.changed(None, device) == kernels.changed({}, device) == []
    assert kernels.changed({"kernels": {"route bfloat16": "triton"}}, device) == []
    (note,) = kernels.changed({"kernels": {}}, device)
    assert note.startswith("kernels were plain torch and are {'route bfloat16': 'triton'}")


# --- two processes


def main(number, home):
    os.environ[FOLDER] = home
    torch.cuda.current_device = lambda: 0
    kernels.identity = lambda device: WHO
    joined = meeting.start(meeting.announced(), torch.device("cpu"), 5.0)
    calls = []

    def verify(sizes, *, device, say, stop):
        calls.append(number)
        time.sleep(6)  # longer than ranks wait for each other
        return found(sizes=sizes)

    kernels.verify = verify
    kernels._say = lambda line: None
    notes = kernels.prove(Config(), joined, torch.device("cuda", 0), 8)
    meeting.stop(joined)
    print(json.dumps([calls, notes, len(choice.in_use(torch.device("cuda", 0)))]))


@pytest.mark.slow
def test_ranks_wait_for_a_verification_that_is_longer_than_their_timeout(on_two_ranks, tmp_path):
    first, second = on_two_ranks(__file__, tmp_path / "home")
    assert first[0] == [0] and second[0] == [] and first[1:] == second[1:] and first[2] == 2


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])
