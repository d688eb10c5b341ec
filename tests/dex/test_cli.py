import pytest
import yaml

from dex import cli, config


@pytest.fixture
def run(capsys, tmp_path, monkeypatch):
    """`dex ARGUMENTS` in an empty folder: exit code, stdout, stderr."""
    monkeypatch.chdir(tmp_path)

    def call(*arguments):
        capsys.readouterr()
        code = cli.main([str(a) for a in arguments])
        said = capsys.readouterr()
        return code, said.out, said.err

    return call


def resolved(stdout):
    return config.from_dict(yaml.safe_load(stdout), config.Config())


def test_help_lists_only_what_works(run):
    code, out, _ = run("--help")
    commands = [line.split()[0] for line in out.split("commands:")[1].split("options:")[0].splitlines() if line.strip()]
    assert code == 0 and commands == ["pretrain", "doctor"]
    for command in commands:
        code, out, err = run(command, "--help")
        assert (code, err) == (0, "") and f"usage: dex {command}" in out


def test_version(run):
    assert run("--version")[1].startswith("dex, from dexkernels ")


def test_dry_run_prints_what_would_run_and_writes_nothing(run, images, tmp_path):
    code, out, err = run("pretrain", "--preset", "demo", "--data", images, "--dry-run")
    assert (code, err) == (0, "")
    want = config.preset("demo")
    assert config.differences(want, resolved(out)) == {"data.path": (None, str(images))}
    assert "training and" in out and "steps per epoch" in out and "# parameters: " in out
    assert "ct: 40" in out
    assert list(tmp_path.iterdir()) == []


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


def test_printed_configuration_reloads_to_itself(run, images, tmp_path):
    out = run("pretrain", "--preset", "demo", "--data", images, "--run.seed", 5, "--dry-run")[1]
    (tmp_path / "again.yaml").write_text(out)
    assert run("pretrain", "--config", tmp_path / "again.yaml", "--dry-run")[1] == out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "usage: dex COMMAND"),
        (["train"], "dex: command: expected one of pretrain, doctor; got 'train'"),
        (["pretrain"], "preset: expected one of published-code, paper, demo, demo-monolithic, or --config FILE"),
        (
            ["pretrain", "--preset", "x"],
            "preset: expected one of published-code, paper, demo, demo-monolithic; got 'x'",
        ),
        (["pretrain", "--preset"], "--preset: expected one argument"),
        (["pretrain", "--config", "absent.yaml"], "config: expected a YAML file; nothing at absent.yaml"),
        (
            ["pretrain", "--preset", "demo", "--optim.lr", "3"],
            "Unrecognized options: --optim.lr, 3; perhaps --optim.base-lr",
        ),
        (["pretrain", "--preset", "demo", "--steps", "many"], "--steps"),
        (["pretrain", "--preset", "demo", "--steps", "0"], "schedule.steps: expected at least 1; got 0"),
        (["pretrain", "--preset", "demo", "--run.device", "tpu"], "'tpu' for argument '--run.device'"),
        (["pretrain", "--preset", "demo", "--model.img-size", "100"], "model.img_size: expected a multiple of"),
        (["pretrain", "--preset", "demo", "--model.backend", "x"], "backend: expected one of"),
        (["pretrain", "--preset", "demo", "--data", "absent"], "expected a folder of images or shards, found nothing"),
        (["pretrain", "--preset", "demo", "--data", "empty"], "expected PNG, JPEG or NPY files below"),
        (["pretrain", "--preset", "demo", "--data", "file"], "expected a folder of images or shards, got the file"),
        (["pretrain", "--preset", "demo", "--resume", "auto"], "resume: expected --out"),
        (["pretrain", "--preset", "demo", "--resume", "absent"], "resume: expected auto, a run folder or a checkpoint"),
        (["pretrain", "--preset", "demo", "--resume", "empty"], "resume: expected auto, a run folder or a checkpoint"),
        (["doctor", "--nonsense"], "unrecognized arguments: --nonsense"),
    ],
)
def test_wrong_usage_is_one_line_and_leaves_nothing(arguments, message, run, images, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("x")
    before = sorted(tmp_path.rglob("*"))
    if "--model.backend" in arguments:
        arguments = [*arguments, "--data", images]
    code, out, err = run(*arguments)
    assert code == 2 and out == ""
    assert message in err
    assert len(err.splitlines()) == 1 or not arguments
    assert "Traceback" not in err and sorted(tmp_path.rglob("*")) == before


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
    assert code == 2 and "holds a run, --resume auto continues it" in err
    code, _, err = run("pretrain", "--resume", "run", "--out", "elsewhere")
    assert code == 2 and "out: expected the run that is resumed" in err
    code, _, err = run("pretrain", "--resume", "run", "--run.seed", 3)
    assert code == 2 and "run.seed: expected 0, got 3" in err
    code, out, _ = run("pretrain", "--resume", "run/checkpoints/step-00000003", "--run.stop-at", 5)
    assert code == 0 and "resumed from step-00000003" in out
    code, out, _ = run("pretrain", "--resume", "auto", "--out", "run")
    assert code == 0 and "resumed from step-00000005" in out and "done: 12 of 12" in out
