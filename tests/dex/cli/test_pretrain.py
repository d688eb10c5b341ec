import dataclasses
import errno
import shutil
import signal
from pathlib import Path

import pytest
import yaml

from dex import config
from dex.cli import commands
from dex.data import CorruptDataError
from dex.train import checkpoint, cuda_graph, initial, trainer
from dex.train.runlog import RunLog

CUDA_GRAPH = ("--parallel.cuda-graph",)


@pytest.fixture
def before_step(monkeypatch):
    """``before_step(n, action)``: ``action()`` comes when n steps are done and another one begins."""
    real = trainer.Trainer.train_step

    def install(done, action):
        def train_step(self):
            if self.step == done:
                action()
            return real(self)

        monkeypatch.setattr(trainer.Trainer, "train_step", train_step)

    return install


def resolved(stdout):
    return config.from_dict(yaml.safe_load(stdout), config.Config())


def test_dry_run_prints_what_would_run_and_writes_nothing(run, images, tmp_path):
    code, out, err = run("pretrain", "--preset", "demo", "--data", images, "--dry-run")
    assert (code, err) == (0, "")
    want = config.preset("demo")
    assert config.differences(want, resolved(out)) == {"data.path": (None, str(images))}
    assert "training and" in out and "steps per epoch" in out and "# parameters: " in out
    assert "ct: 40" in out
    assert list(tmp_path.iterdir()) == []


def test_dry_run_says_that_no_gpu_has_replayed_a_step(run, images, monkeypatch):
    monkeypatch.setattr(cuda_graph, "why_not", lambda *_: None)
    told = [run("pretrain", "--preset", "demo", "--data", images, "--dry-run", *more)[1] for more in ((), CUDA_GRAPH)]
    assert ["not yet run on a GPU" in out for out in told] == [False, True]


def test_dry_run_counts_the_published_model(run, images):
    out = run("pretrain", "--preset", "published-code", "--data.batch-size", "8", "--data", images, "--dry-run")[1]
    line = next(text for text in out.splitlines() if text.startswith("# parameters"))
    numbers = {w[0]: int(w[1].replace(",", "")) for w in (p.split() for p in line.split("; ")[1].split(", "))}
    mlp = 768 * 3072 * 2 + 768 + 3072
    assert numbers["experts"] == 12 * 8 * mlp and numbers["directors"] == 12 * mlp
    assert 50e6 < numbers["rest"] < 80e6


def test_command_line_over_yaml_over_preset(run, images, tmp_path):
    path = tmp_path / "my.yaml"
    path.write_text(f"optim: {{base_lr: 3e-4, clip_norm: 2.0}}\ndata: {{path: '{images}'}}\nschedule: {{steps: 9}}\n")
    arguments = ("pretrain", "--preset", "demo", "--config", path, "--dry-run")
    got = resolved(run(*arguments, "--optim.base-lr", "5e-4", "--model.num-experts", 4, 4, 6, 6)[1])
    demo = config.preset("demo")
    assert got.optim.base_lr == 5e-4 and got.optim.clip_norm == 2.0  # command line; YAML
    assert got.optim.betas == demo.optim.betas and got.model.embed_dim == demo.model.embed_dim  # preset
    assert got.model.num_experts == (4, 4, 6, 6) and got.schedule.steps == 9
    assert resolved(run(*arguments, "--steps", 7)[1]).schedule.steps == 7
    got = resolved(run("pretrain", "--config", path, "--dry-run", "--data.batch-size", "8")[1])
    assert got.model == config.Config().model  # without a preset the published values are below


def test_an_option_may_come_twice_with_one_value(run, images):
    arguments = ("pretrain", "--preset", "demo", "--data", images, f"--data.path={images}", "--dry-run")
    once = run(*arguments, "--steps", 3)
    assert once[0] == 0 and run(*arguments, "--steps", 3, "--schedule.steps", 3, "--preset=demo") == once


def test_printed_configuration_reloads_to_itself(run, images, tmp_path):
    out = run("pretrain", "--preset", "demo", "--data", images, "--run.seed", 5, "--dry-run")[1]
    (tmp_path / "again.yaml").write_text(out)
    assert run("pretrain", "--config", tmp_path / "again.yaml", "--dry-run")[1] == out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "usage: dex COMMAND"),
        (["train"], f"dex: command: expected one of {', '.join(commands())}, got 'train'"),
        (["pretrain"], "preset: expected one of published-code, paper, demo, demo-monolithic, or --config FILE"),
        (
            ["pretrain", "--preset", "x"],
            "preset: expected one of published-code, paper, demo, demo-monolithic, got 'x'",
        ),
        (["pretrain", "--preset"], "preset: expected a value, got nothing"),
        (["pretrain", "--config", "absent.yaml"], "config: expected a YAML file; found nothing at absent.yaml"),
        (
            ["pretrain", "--preset", "demo", "--optim.lr", "3"],
            "option: expected an option of dex pretrain, got --optim.lr; did you mean --optim.base-lr?",
        ),
        (["pretrain", "--preset", "demo", "--steps", "many"], "steps: expected a whole number or null, got 'many'"),
        (
            ["pretrain", "--preset", "demo", "--steps", "4", "--schedule.steps=5"],
            "steps: expected one value for --steps and --schedule.steps, which are the same, got 4 and 5",
        ),
        (
            ["pretrain", "--preset", "demo", "--data", "a", "--data.path", "b"],
            "data: expected one value for --data and --data.path, which are the same, got a and b",
        ),
        (
            ["pretrain", "--preset", "demo", "--model.init=b", "--init", "a"],
            "init: expected one value for --init and --model.init, which are the same, got a and b",
        ),
        (
            ["pretrain", "--preset", "demo", "--preset", "paper"],
            "preset: expected one value, got --preset demo and --preset paper",
        ),
        (
            ["pretrain", "--preset", "demo", "--optim.base-lr", "1e-3", "--optim.base_lr=2e-3"],
            "optim.base_lr: expected one value, got --optim.base-lr 1e-3 and --optim.base_lr=2e-3",
        ),
        (
            ["pretrain", "--preset", "demo", "--parallel.compile", "--parallel.no-compile"],
            "parallel.compile: expected one value, got --parallel.compile and --parallel.no-compile",
        ),
        (["pretrain", "--preset", "demo", "--steps="], "steps: expected a whole number or null, got nothing"),
        (["pretrain", "--preset", "demo", "--out", "a\0b"], "out: expected the path of a folder, got 'a\\x00b': "),
        (["pretrain", "--preset", "demo", "--out", "a" * 300], "a': File name too long"),
        (
            ["pretrain", "--preset", "demo", "--run.seed", "99999999999999999999"],
            "run.seed: expected at least 0, below",
        ),
        (["pretrain", "--preset", "demo", "--run.milestones", "a"], "run.milestones: expected "),
        (
            ["pretrain", "--preset", "demo", "--model.norm-pix-loss", "maybe"],
            "model.norm_pix_loss: expected a switch without a value, got 'maybe'",
        ),
        (["pretrain", "--preset", "demo", "--steps", "0"], "schedule.steps: expected at least 1, got 0"),
        (
            ["pretrain", "--preset", "demo", "--run.device", "tpu"],
            "run.device: expected one of auto, cpu, cuda, got 'tpu'",
        ),
        (["pretrain", "--preset", "demo", "--model.depth", "4.5"], "model.depth: expected a whole number, got '4.5'"),
        (
            ["pretrain", "--preset", "demo", "--schedule.momentum", "0.9"],
            "schedule.momentum: expected 2 numbers, got '0.9'",
        ),
        (["pretrain", "--preset", "demo", "--optim.betas"], "optim.betas: expected 2 numbers, got nothing"),
        (
            ["pretrain", "--preset", "demo", "--parallel.compile", "true"],
            "parallel.compile: expected a switch without a value, got 'true'",
        ),
        (
            ["pretrain", "--preset", "demo", "--run.stop-at", "1001"],
            "run.stop_at: expected at most the run's 1,000 steps",
        ),
        (
            ["pretrain", "--preset", "demo", "--model.img-size", "272"],
            "model.img_size: expected at most 256 pixels",
        ),
        (["pretrain", "--preset", "demo", "--config", "~/absent.yaml"], f"nothing at {Path.home()}/absent.yaml"),
        (["pretrain", "--preset", "demo", "--data", "~/absent"], f"found nothing at '{Path.home()}/absent'"),
        (
            ["pretrain", "--preset", "demo", "--run.device", "cpu", "--parallel.cuda-graph"],
            "parallel.cuda_graph: expected a CUDA device, got cpu",
        ),
        (["pretrain", "--preset", "demo", "--model.img-size", "100"], "model.img_size: expected a multiple of"),
        (["pretrain", "--preset", "demo", "--model.backend", "x"], "model.backend: expected one of"),
        (
            ["pretrain", "--preset", "demo", "--data", "absent"],
            "data.path: expected a folder of images or shards, found",
        ),
        (["pretrain", "--preset", "demo", "--data", ""], "data.path: expected a folder, got ''"),
        (["doctor", "--data", ""], "data: expected a folder, got ''"),
        (["pretrain", "--preset", "demo", "--out", "file/run"], "out: expected a folder, got the file "),
        (["pretrain", "--preset", "demo", "--out", "full", "--resume", "auto"], "full holds other files"),
        (["pretrain", "--preset", "demo", "--data.batch-size", "6000"], "data.batch_size: expected at most the 529"),
        (
            ["pretrain", "--preset", "demo", "--data", "empty"],
            "data.path: expected PNG, JPEG or NPY files, or other pictures, below",
        ),
        (["pretrain", "--preset", "demo", "--data", "file"], "expected a folder of images or shards, got the file"),
        (["pretrain", "--preset", "demo", "--resume", "auto"], "resume: expected the run folder as --out"),
        (["pretrain", "--preset", "demo", "--resume", "absent"], "resume: expected auto, a run folder or a checkpoint"),
        (["pretrain", "--preset", "demo", "--resume", "empty"], "resume: expected auto, a run folder or a checkpoint"),
        (["doctor", "--nonsense"], "option: expected an option of dex doctor, got --nonsense; dex doctor --help lists"),
    ],
)
def test_wrong_usage_is_one_line_and_leaves_nothing(arguments, message, run, images, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("x")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("mine")
    before = sorted(tmp_path.rglob("*"))
    if "--model.backend" in arguments:
        arguments = [*arguments, "--data", images]
    code, out, err = run(*arguments)
    assert code == 2 and out == ""
    assert message in err
    assert len(err.splitlines()) == 1 or not arguments
    assert "Traceback" not in err and sorted(tmp_path.rglob("*")) == before
    if arguments[:1] == ["pretrain"] and arguments[-1] != "--preset":
        assert run(*arguments, "--dry-run") == (code, out, err)  # it approves nothing that the call refuses
        assert sorted(tmp_path.rglob("*")) == before


def test_a_run_folder_in_its_own_data_is_refused(run, images, tmp_path):
    """Its pictures would be images of the next start."""
    shutil.copytree(images, tmp_path / "data")
    before = sorted(tmp_path.rglob("*"))
    arguments = ("pretrain", "--preset", "demo", "--data", "data", "--out", "data/ct/../runs/first")
    code, out, err = run(*arguments)
    assert (code, out) == (2, "") and sorted(tmp_path.rglob("*")) == before
    assert err.startswith(
        f"dex pretrain: out: expected a folder outside the data in {tmp_path / 'data'}, since the run's pictures"
    )
    assert run(*arguments, "--dry-run") == (code, out, err)


def test_default_run_folder_is_named_after_the_preset_or_the_file(run, tiny, tmp_path):
    (tmp_path / "little.yaml").write_text(config.to_yaml(tiny))
    code, out, _ = run("pretrain", "--config", "little.yaml", "--steps", 1)
    assert code == 0
    (folder,) = (tmp_path / "runs").iterdir()
    assert folder.name.startswith("little-20") and f"runs/{folder.name}" in out
    assert not (set(out) & set("│╭█\x1b"))  # plain lines off a terminal


def test_resume_finds_run_and_configuration(run, tiny, tmp_path):
    (tmp_path / "c.yaml").write_text(config.to_yaml(tiny))
    assert run("pretrain", "--config", "c.yaml", "--out", "run", "--run.stop-at", 3)[0] == 0
    code, _, err = run("pretrain", "--config", "c.yaml", "--out", "run")
    assert code == 2 and "holds a run: --resume auto continues it" in err
    code, _, err = run("pretrain", "--resume", "run", "--out", "elsewhere")
    assert code == 2 and "out: expected the resumed run" in err
    code, _, err = run("pretrain", "--resume", "run", "--run.seed", 3)
    assert code == 2 and "run.seed: expected 0, got 3" in err
    code, out, _ = run("pretrain", "--resume", "run/checkpoints/step-00000003", "--run.stop-at", 5)
    assert code == 0 and "resumed from step-00000003" in out
    new = RunLog(tmp_path / "run")  # a start that was killed before its first step
    new.open(dataclasses.replace(tiny, run=dataclasses.replace(tiny.run, seed=7)), {"step": 0}, overwrite=True)
    new.close()
    code, out, _ = run("pretrain", "--resume", "auto", "--out", "run", "--dry-run")
    assert code == 0 and "# resumes from step-00000005" in out
    code, out, _ = run("pretrain", "--resume", "auto", "--out", "run")
    assert code == 0 and "resumed from step-00000005" in out and "done: 12 of 12" in out


def test_dry_run_checks_out_and_resume_and_writes_nothing(run, tiny, tmp_path):
    (tmp_path / "c.yaml").write_text(config.to_yaml(tiny))
    assert run("pretrain", "--config", "c.yaml", "--out", "run", "--run.stop-at", 3)[0] == 0
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    for arguments, message in (
        (("--config", "c.yaml", "--out", "run"), "holds a run: --resume auto continues it"),
        (("--resume", "run", "--run.seed", 3), "run.seed: expected 0, got 3"),
        (("--resume", "run/checkpoints/step-00000009"), "there is none at run/checkpoints/step-00000009"),
    ):
        code, out, err = run("pretrain", *arguments, "--dry-run")
        assert (code, out) == (2, "") and message in err
        assert run("pretrain", *arguments) == (code, out, err)
    code, out, _ = run("pretrain", "--resume", "run", "--dry-run")
    assert code == 0 and resolved(out) == tiny and "# resumes from step-00000003 after 3 steps" in out
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before


@pytest.mark.parametrize(
    "error", [ValueError("of our own"), PermissionError("a cache"), ModuleNotFoundError("late"), OSError(5, "I/O")]
)
def test_what_fails_in_the_loop_is_no_usage_error(error, run, tiny, tmp_path, before_step):
    """It is raised: Python prints the traceback and ends with 1."""
    (tmp_path / "c.yaml").write_text(config.to_yaml(tiny))

    def fail():
        raise error

    before_step(6, fail)
    with pytest.raises(type(error)) as raised:
        run("pretrain", "--config", "c.yaml", "--out", "run")
    assert raised.value is error and (tmp_path / "run" / "checkpoints" / "step-00000005").is_dir()


@pytest.mark.parametrize(
    "error",
    [
        CorruptDataError("data set 'x': more than 10 of 120 samples cannot be read: a (torn)"),
        OSError(errno.ENOSPC, "full"),
        OSError(errno.EROFS, "read-only"),
        OSError(errno.EMFILE, "too many open files"),
    ],
)
def test_unreadable_images_and_a_failing_disk_are_one_line_and_1(error, run, tiny, tmp_path, before_step):
    (tmp_path / "c.yaml").write_text(config.to_yaml(tiny))

    def fail():
        raise error

    before_step(2, fail)
    code, _, err = run("pretrain", "--config", "c.yaml", "--out", "run")
    assert (code, err) == (1, f"dex pretrain: {error}\n")
    saved = [step for step, _ in checkpoint.list_checkpoints(tmp_path / "run" / "checkpoints")]
    assert saved == ([2] if isinstance(error, CorruptDataError) else [])


@pytest.mark.parametrize("becomes", ["nothing", "renamed", "another"])
@pytest.mark.parametrize("at", ["a row", "a save"])
def test_a_run_folder_that_goes_while_a_run_writes_is_one_line_and_1(
    becomes, at, run, tiny, change, tmp_path, before_step
):
    c = change(tiny, run__log_every=4 if at == "a row" else 100, run__checkpoint_every=5)
    (tmp_path / "c.yaml").write_text(config.to_yaml(c))
    folder = tmp_path / "run"

    def go():
        if becomes == "nothing":
            shutil.rmtree(folder)
        else:
            folder.rename(tmp_path / "kept")
        if becomes == "another":
            folder.mkdir()

    before_step(2, go)
    code, _, err = run("pretrain", "--config", "c.yaml", "--out", folder)
    assert code == 1 and err.count("\n") == 1, err
    assert f"out: expected the run folder to stay while the run writes to it; {folder} was removed, renamed" in err
    assert list(folder.iterdir()) == [] if becomes == "another" else not folder.exists()


def test_a_signal_while_the_model_is_built_ends_with_75(run, tiny, tmp_path, monkeypatch):
    (tmp_path / "c.yaml").write_text(config.to_yaml(tiny))
    monkeypatch.setattr(initial, "build_model", lambda config: signal.raise_signal(signal.SIGTERM))
    code, _, err = run("pretrain", "--config", "c.yaml", "--out", "run", "--resume", "auto")
    assert (code, err) == (75, "dex pretrain: SIGTERM before the first step: start the same command again\n")
    assert not (tmp_path / "run").exists()


def test_a_second_interrupt_ends_at_once(run, tiny, tmp_path, before_step):
    (tmp_path / "c.yaml").write_text(config.to_yaml(tiny))

    def interrupt():
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    before_step(6, interrupt)
    assert run("pretrain", "--config", "c.yaml", "--out", "run")[0] == 130
    assert [step for step, _ in checkpoint.list_checkpoints(tmp_path / "run" / "checkpoints")] == [5]


def test_overwrite_begins_anew(run, tiny, tmp_path):
    (tmp_path / "c.yaml").write_text(config.to_yaml(tiny))
    assert run("pretrain", "--config", "c.yaml", "--out", "run", "--run.stop-at", 3)[0] == 0
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    again = ("pretrain", "--config", "c.yaml", "--out", "run", "--overwrite", "--run.seed", 7, "--steps", 2)
    code, out, err = run(*again, "--dry-run")
    assert (code, err) == (0, "") and resolved(out).run.seed == 7
    code, _, err = run("pretrain", "--resume", "run", "--overwrite")
    assert code == 2 and err == "dex pretrain: overwrite: expected a new run, without resume, got both\n"
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before
    code, out, _ = run(*again)
    assert code == 0 and "done: 2 of 2" in out
    assert [step for step, _ in checkpoint.list_checkpoints(tmp_path / "run" / "checkpoints")] == [2]
