"""`dex verify`: what it asks to be timed, what it writes, and its exit codes; the verification itself is played."""

import json

import pytest
import torch

from dex import config
from dexkernels import verification
from dexkernels.verification import record
from dexkernels.verification import run as verifying
from dexkernels.verification.identity import Identity
from dexkernels.verification.record import FOLDER, Check, Record, Sizes, Timing

WHO = Identity("NVIDIA H200", "sm_90", "570.1", "2.11.0", "12.8", "3.6.0", "0.1.0", "0123456789abcdef")


@pytest.fixture
def asked(monkeypatch, tmp_path):
    """Plays a GPU where Triton's route is what ``asked.state`` says; ``asked.sizes`` is what was to be timed."""
    monkeypatch.setenv(FOLDER, str(tmp_path / "cache"))
    monkeypatch.setattr(verifying, "check_device", lambda device: torch.device(device))
    monkeypatch.setattr(verification.identity, "identity", lambda device: WHO)

    class Asked:
        state, keeps = "right", True

        def verify(self, sizes, *, device, seconds, say):
            self.sizes, self.seconds, self.device = sizes, seconds, device
            say("  route triton bfloat16: played")
            check = Check("route", "triton", "bfloat16", self.state, 1e-3, 1e-3, "ValueError: /home/me")
            timing = Timing("route", "triton", "bfloat16", sizes, 0.5, 1.0, 0.1, "copy")
            found = Record(WHO, "2026-11-30", 1.0, (sizes,), (check,), (timing,))
            if self.keeps:
                record.write(found)
            return found

    played = Asked()
    monkeypatch.setattr(verifying, "verify", played.verify)
    return played


def test_without_options_a_vit_b_is_timed(run, asked):
    code, out, err = run("verify")
    assert (code, err) == (0, "") and asked.sizes == Sizes() and asked.seconds == 165 and asked.device.type == "cuda"
    assert out.splitlines()[1:] == ["route in bfloat16: triton", "everything else: plain torch"]


def test_the_sizes_of_a_configuration_and_what_options_change(run, asked, tmp_path):
    file = tmp_path / "mine ü.yaml"
    file.write_text("model: {img_size: 64, patch_size: 8, embed_dim: 48, num_heads: 4, num_experts: 5}\n")
    assert run("verify", "--config", file)[0] == 0
    assert asked.sizes == Sizes(config.Config().data.batch_size, 17, 48, 192, 5, 2)
    assert run("verify", "--config", file, "--images", "7", "--top-k", 1)[0] == 0
    assert asked.sizes == Sizes(7, 17, 48, 192, 5, 1)
    assert run("verify", "--preset", "demo", "--device", "cuda:0", "--minutes", "0.5")[0] == 0
    assert asked.sizes.dim == 192 and asked.seconds == 30 and asked.device.index == 0


def test_a_wrong_result_fails_and_says_what_to_send(run, asked):
    asked.state = "wrong"
    code, out, err = run("verify")
    assert code == 1 and "WRONG OR FAILED: route triton bfloat16" in out and "--share FILE" in out


def test_a_shared_record_holds_no_path(run, asked, tmp_path):
    asked.state = "failed"
    code, out, _ = run("verify", "--share", tmp_path / "to share.json")
    text = (tmp_path / "to share.json").read_text()
    assert code == 1 and "/home" not in text and record.from_json(json.loads(text)).identity == WHO
    assert "to be contributed or sent with a report" in out


def test_a_record_that_was_not_kept_fails(run, asked):
    asked.keeps = False
    code, _, err = run("verify")
    assert code == 1 and f"the record was not kept; set {FOLDER}" in err


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--images", "0"], "images: expected a whole number of at least 1, got 0"),
        (["--top-k", "9"], "top_k: expected at most num_experts = 8, got 9"),
        (["--minutes", "0"], "minutes: expected a number above 0, got 0"),
        (["--share", " "], "share: expected a file"),
        (["--share", "."], "share: expected a file, got the folder ."),
        (["--share", "nowhere/x.json"], "share: expected a file in a folder that exists"),
        (["--config", "absent.yaml"], "config: expected a YAML file"),
        (["--preset", "demo-monolithic"], "config: expected a model with experts"),
        (["--preset", "nonsense"], "preset: expected"),
        (["--dim", "wide"], "dim: expected a whole number, got 'wide'"),
    ],
)
def test_wrong_usage(run, asked, arguments, message):
    code, out, err = run("verify", *arguments)
    assert code == 2 and message in err and out == "" and err.count("\n") == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_without_a_gpu_it_says_so(run):
    code, _, err = run("verify")
    assert code == 2 and "device: expected a CUDA device, got none" in err


def test_more_processes_than_one_are_refused(run, monkeypatch):
    for name, value in {"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "x", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    code, _, err = run("verify")
    assert code == 2 and err.startswith("dex verify: WORLD_SIZE: expected")


def test_help_names_every_option(run):
    out = run("verify", "--help")[1]
    names = ("config", "preset", "share", "minutes", "device", *Sizes._fields)
    assert all(f"--{name.replace('_', '-')}" in out for name in names)
