import ast
import dataclasses
import inspect
import itertools
from pathlib import Path

import pytest
import yaml

from dex import config


@pytest.mark.parametrize("name", config.PRESETS)
def test_yaml_returns_every_preset(name, tmp_path):
    preset = config.preset(name)
    config.check(preset)
    path = tmp_path / "config.yaml"
    path.write_text(config.to_yaml(preset))
    assert config.read_yaml(path, config.Config()) == preset
    assert config.differences(preset, config.read_yaml(path, config.preset("paper"))) == {}


def test_published_presets_hold_the_published_values():
    code, paper = config.preset("published-code"), config.preset("paper")
    m = code.model
    assert (m.embed_dim, m.depth, m.num_heads, m.num_experts, m.top_k) == (768, 12, 12, 8, 2)
    assert (m.decoder_embed_dim, m.decoder_depth, m.decoder_num_heads) == (512, 8, 16)
    assert (m.img_size, m.patch_size, m.mask_ratio, m.norm_pix_loss) == (256, 16, 0.75, True)
    o = code.optim
    assert (o.base_lr, o.betas, o.weight_decay, o.eps, o.clip_norm) == (1e-4, (0.9, 0.999), 1e-6, 1e-8, 1.0)
    s = code.schedule
    assert (s.epochs, s.warmup * s.epochs, s.noise_std, s.momentum) == (200, 10, (1.0, 0.0), (0.99, 0.999))
    assert (s.align_weight, s.balance_weight, code.run.precision) == (0.01, (0.01, 0.01), "bf16")
    assert code.data.num_workers is None and paper.data.num_workers is None
    assert config.differences(code, paper) == {
        "model.align": ("kd", "cosine"),
        "data.batch_size": (896, 448),
        "schedule.balance_weight": ([0.01, 0.01], [0.001, 0.0]),
    }
    assert code.peak_lr == pytest.approx(1e-4 * 896 / 512, rel=1e-15)


def test_the_documented_difference_is_the_difference():
    """The table in docs/pretraining.md of where code and paper differ."""
    text = (Path(__file__).parents[2] / "docs" / "pretraining.md").read_text()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line[:2] == "| "]
    table = {row[0]: row[1:] for row in rows if len(row) == 3}
    code, paper = config.preset("published-code"), config.preset("paper")
    for name, values in config.differences(code, paper).items():
        shown = [", ".join(map(str, v)) if isinstance(v, list) else str(v) for v in values]
        assert table.pop(name) == shown
    assert [float(v) for v in table.pop("peak learning rate")] == pytest.approx([code.peak_lr, paper.peak_lr])
    assert list(table) == ["field", "---"]


def test_monolithic_control_differs_in_the_experts_alone():
    difference = config.differences(config.preset("demo"), config.preset("demo-monolithic"))
    assert difference == {"model.num_experts": (8, 0)}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model: {dept: 3}", r"model\.dept: expected one of img_size, .*unknown key"),
        ("modell: {}", r"modell: expected one of model, data, optim, schedule, parallel, run"),
        ("model: {depth: 3.5}", r"model\.depth: expected a whole number, got 3\.5"),
        ("model: {depth: true}", r"model\.depth: expected a whole number, got True"),
        ("model: 3", r"model: expected fields and their values, got 3"),
        ("- 1", r"expected fields and their values"),
        ("run: {device: tpu}", r"run\.device: expected one of auto, cpu, cuda, got 'tpu'"),
        ("optim: {betas: [0.9]}", r"optim\.betas: expected 2 numbers, got \[0\.9\]"),
        ("optim: {base_lr: fast}", r"optim\.base_lr: expected a number, got 'fast'"),
        ("model: {align: dot}", r"model\.align: expected one of kd, cosine, mse, got 'dot'"),
        ("model: {norm_pix_loss: 1}", r"model\.norm_pix_loss: expected true or false, got 1"),
        ("model: {num_experts: [4, x]}", r"model\.num_experts: expected a whole number or a list of a whole number"),
        ("optim: {eps: 1e-8}\nrun: {}\noptim: {clip_norm: 2}", r"optim occurs twice, in lines 1 and 3"),
        ("optim: {\n  eps: 1e-8,\n  eps: 1e-9}", r"eps occurs twice, in lines 2 and 3"),
        ("optim: {eps: 1e-8, eps: 1e-9}", r"eps occurs twice, in lines 1 and 1"),
        ("model: {embed_dims: 32}", r"unknown key in .*; did you mean model\.embed_dim\?$"),
        ("model: {img-size: 32}", r"did you mean model\.img_size\?$"),
        ("modle: {depth: 32}", r"did you mean model\?$"),
        ("data: {batch_size: 010}", r"010 in line 1 is 8 in YAML; write 8"),
        ("schedule:\n  steps: 1:30", r"1:30 in line 2 is 90 in YAML; write 90"),
        ("run: {device: cuda:0}", r"run\.device: expected one of auto, cpu, cuda, got 'cuda:0'"),
        ("model: {norm_pix_loss: 'no'}", r"model\.norm_pix_loss: expected true or false, got 'no'"),
        ("run: {seed: yes}", r"run\.seed: expected a whole number, got True"),
        ("model:\n\tdepth: 2", r"expected YAML in .*config\.yaml, got: .*line 2"),
        ("model: *m", r"expected YAML in .*undefined alias"),
        ("model: !!python/object/apply:os.system [ls]", r"expected YAML in .*could not determine a constructor"),
        ("model: {}\n---\nmodel: {}", r"expected YAML in .*single document"),
        ("run: {wandb: 2020-01-01}", r"run\.wandb: expected text or null, got datetime"),
        ("model: &m {depth: *m}", r"model\.depth: expected a whole number, got"),
        ("model:", r"model: expected fields and their values, got nothing"),
        ("model: {", r"expected YAML in .*config\.yaml"),
    ],
)
def test_wrong_yaml_is_named(text, message, tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        config.read_yaml(path, config.Config())


def test_yaml_numbers_without_a_dot_are_numbers(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text("optim: {base_lr: 3e-4, clip_norm: 2}\nmodel: {num_experts: [4, 6]}\n")
    read = config.read_yaml(path, config.Config())
    assert (read.optim.base_lr, read.optim.clip_norm, read.model.num_experts) == (3e-4, 2.0, (4, 6))
    assert read.optim.betas == config.Config().optim.betas


@pytest.mark.parametrize("data", [b"\x91\x00\xff" * 50, "model: {}".encode("utf-16"), b"model: {}\0", b"a: \xe9"])
def test_a_file_that_is_no_text_is_named(data, tmp_path):
    (tmp_path / "config.yaml").write_bytes(data)
    with pytest.raises(ValueError, match=r"^config: expected YAML in .*config\.yaml, got: "):
        config.read_yaml(tmp_path / "config.yaml", config.Config())


def test_numbers_that_are_what_they_look_like_are_read(tmp_path):
    (tmp_path / "config.yaml").write_text("data: {batch_size: 0x10}\nschedule: {steps: 1_000, warmup: 0.0, decay: 1.0}")
    read = config.read_yaml(tmp_path / "config.yaml", config.Config())
    assert (read.data.batch_size, read.schedule.steps, read.schedule.warmup) == (16, 1000, 0.0)


def test_missing_file_and_unknown_preset_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="config: expected a YAML file; found nothing at .*absent.yaml"):
        config.read_yaml(tmp_path / "absent.yaml", config.Config())
    with pytest.raises(ValueError, match="preset: expected one of published-code, paper, demo.*, got 'demos'"):
        config.preset("demos")


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("model__img_size", 100, "model.img_size: expected a multiple of model.patch_size = 16, got 100"),
        ("model__num_heads", 7, "model.embed_dim: expected a multiple of model.num_heads = 7, got 768"),
        ("model__decoder_num_heads", 5, "model.decoder_embed_dim: expected a multiple of"),
        ("model__num_experts", (8, 8), "model.num_experts: expected one number or model.depth = 12 numbers"),
        ("model__num_experts", 1, "model.num_experts: expected 0 in every layer, or at least model.top_k = 2, got 1"),
        ("model__num_experts", (0,) + (8,) * 11, "model.num_experts: expected 0 in every layer"),
        ("model__top_k", 0, "model.top_k: expected at least 1, got 0"),
        ("model__depth", 0, "model.depth: expected at least 1, got 0"),
        ("model__mask_ratio", 1.0, "model.mask_ratio: expected a share"),
        ("data__path", "", "data.path: expected a folder, got ''"),
        ("data__path", " ", "data.path: expected a folder, got ' '"),
        ("data__batch_size", 0, "data.batch_size: expected at least 1, got 0"),
        ("optim__base_lr", float("nan"), "optim.base_lr: expected above 0, got nan"),
        ("optim__base_lr", 1.0, "optim.base_lr: expected a peak, base_lr * data.batch_size / 512, of at most 1, got 1"),
        ("optim__weight_decay", 1e5, "optim.weight_decay: expected less than 1 after multiplication by the peak"),
        ("model__mlp_ratio", 1e6, "model.mlp_ratio: expected a ratio that gives at most 1,048,576 hidden units"),
        ("model__embed_dim", 4 * 10**8, "model.embed_dim: expected at most 1,048,576, got 400000000"),
        ("model__decoder_depth", 10**9, "model.decoder_depth: expected at most 1,000, got 1000000000"),
        ("model__num_experts", 10**9, "model.num_experts: expected at most 65,536 per layer, got 1000000000"),
        ("model__mlp_ratio", 0.001, "model.mlp_ratio: expected a ratio that gives at least one hidden unit for"),
        ("data__num_workers", 257, "data.num_workers: expected 0 to 256, got 257"),
        ("optim__clip_norm", float("inf"), "optim.clip_norm: expected finite numbers, got inf"),
        ("optim__betas", (0.9, 1.0), "optim.betas: expected two numbers in"),
        ("schedule__warmup", 1.0, "schedule.warmup: expected a share in"),
        ("schedule__steps", 0, "schedule.steps: expected at least 1, got 0"),
        ("schedule__momentum", (0.9, 1.1), "schedule.momentum: expected two numbers in"),
        ("schedule__decay", 0.0, "schedule.decay: expected a share above 0, at most 1, got 0.0"),
        ("schedule__span", 0, "schedule.span: expected at least 1, or null, got 0"),
        ("optim__layer_decay", 0.0, "optim.layer_decay: expected a factor above 0, at most 1, got 0.0"),
        ("optim__ema", 1.0, "optim.ema: expected a number in [0, 1), or null, got 1.0"),
        ("run__wandb", " ", "run.wandb: expected the name of a project, or null, got ' '"),
        ("run__milestones", (5, 0), "run.milestones: expected steps of at least 1, got (5, 0)"),
        ("run__seed", -1, "run.seed: expected at least 0"),
        ("run__log_every", 0, "run.log_every: expected at least 1, got 0"),
        ("parallel__micro_batch", 0, "parallel.micro_batch: expected at least 1, or null, got 0"),
        ("parallel__timeout", 1e12, "parallel.timeout: expected at most 10,000,000 seconds, got 1000000000000.0"),
        ("optim__eps", 1e-320, "optim.eps: expected 0 or numbers that float32 holds, got 1e-320"),
        ("schedule__balance_weight", (1e300, 0.0), "schedule.balance_weight: expected 0 or numbers that float32 holds"),
        ("parallel__timeout", 0.0, "parallel.timeout: expected above 0, got 0.0"),
    ],
)
def test_values_that_cannot_work_are_named(field, value, message, change):
    with pytest.raises(ValueError) as error:
        config.check(change(config.Config(), **{field: value}))
    assert message in str(error.value)


def test_warmup_and_decay_fit_into_a_run(change):
    both = change(config.Config(), schedule__warmup=0.6, schedule__decay=0.5)
    config.check(both)  # a cosine has no decay
    with pytest.raises(
        ValueError, match=r"schedule.decay: expected at most the share that schedule.warmup = 0.6 leaves"
    ):
        config.check(change(both, schedule__lr_shape="wsd"))


def test_every_field_survives_yaml(tmp_path):
    """Every field, set to something else than its default, comes back."""
    other = {int: 3, float: 0.3, bool: False, str: "x", type(None): None}

    def altered(value):
        if isinstance(value, tuple):
            return [altered(v) for v in value]
        choices = {"auto": "cpu", "bf16": "fp32", "kd": "cosine", "ddp": "fsdp", "cls": "mean", "xavier": "linear"}
        choices |= {"cosine": "wsd", "none": "vectors", "part": "batch"}
        return choices[value] if value in choices else other[type(value)]

    values = {
        section.name: {
            f.name: altered(getattr(getattr(config.Config(), section.name), f.name))
            for f in dataclasses.fields(getattr(config.Config(), section.name))
        }
        for section in dataclasses.fields(config.Config)
    }
    values["schedule"]["steps"], values["run"]["stop_at"], values["data"]["path"] = 7, 5, "p"
    values["optim"]["ema"], values["run"]["wandb"] = 0.9, "project"
    values["schedule"]["span"], values["run"]["milestones"] = 6, [2, 4]
    built = config.from_dict(values, config.Config())
    assert yaml.safe_load(config.to_yaml(built)) == values
    assert config.from_dict(yaml.safe_load(config.to_yaml(built)), config.Config()) == built


def test_a_batch_is_shared_evenly():
    base = config.Config(data=config.DataConfig(batch_size=24))
    assert [config.images_per_rank(base, ranks) for ranks in (1, 2, 8)] == [24, 12, 3]
    assert [config.resolve_micro_batch(base, ranks) for ranks in (1, 8)] == [24, 3]
    cut = dataclasses.replace(base, parallel=config.ParallelConfig(micro_batch=6))
    assert [config.resolve_micro_batch(cut, ranks) for ranks in (1, 4)] == [6, 6]
    with pytest.raises(ValueError, match="data.batch_size: expected a multiple of the 5 ranks, got 24"):
        config.images_per_rank(base, 5)
    with pytest.raises(ValueError, match="parallel.micro_batch: expected a divisor of the images per rank, 3, got 6"):
        config.resolve_micro_batch(cut, 8)


def test_every_field_has_a_help_text():
    """The docstrings of the fields are the help of ``dex pretrain``."""
    tree = ast.parse(inspect.getsource(config))
    for section in (node for node in tree.body if isinstance(node, ast.ClassDef) and node.name != "Config"):
        body = section.body
        for field, text in itertools.pairwise([*body, None]):
            if isinstance(field, ast.AnnAssign):
                is_text = isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant)
                assert is_text and text.value.value.rstrip().endswith("."), f"{section.name}.{field.target.id}"
