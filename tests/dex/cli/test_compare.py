"""`dex compare` from the command line; fine-tuning and evaluation are those of `tests/dex/tasks`."""

import json

import numpy as np
import pytest
from PIL import Image


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Two pretrained runs of one step, a DEX and a monolithic control, and a folder of classes."""
    from dex import config
    from dex.train.run import pretrain

    root = tmp_path_factory.mktemp("compare")
    for name, experts in (("dex", 2), ("mono", 0)):
        sizes = {"img_size": 16, "patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2, "num_experts": experts}
        decoder = {"decoder_embed_dim": 16, "decoder_depth": 1, "decoder_num_heads": 2, "norm_pix_loss": False}
        run = {"device": "cpu", "precision": "fp32", "evaluate_every": 0}
        values = {"model": sizes | decoder, "data": {"batch_size": 4}, "schedule": {"steps": 1}, "run": run}
        assert pretrain(config.from_dict(values, config.Config()), root / name) == 0
    rng = np.random.default_rng(0)
    for label, level in (("bright", 150), ("dark", 60)):
        (root / "shades" / label).mkdir(parents=True)
        for i in range(16):
            picture = (level + rng.integers(-40, 40, (16, 16))).astype(np.uint8)
            Image.fromarray(picture).save(root / f"shades/{label}/{label[0]}{i:02d}.png")
    (root / "quick.yaml").write_text("{epochs: 1, warmup_epochs: 0, batch_size: 8, device: cpu, precision: fp32}")
    return root


@pytest.mark.slow
def test_a_comparison_and_its_second_start(run, made, tmp_path):
    words = ["compare", made / "dex", made / "mono", "--tasks", made / "shades", "--out", "out", "--seeds", "0", "1"]
    words += ["--settings", made / "quick.yaml", "--discard"]
    code, out, err = run(*words)
    assert code == 0, err
    assert "No verdict: the sample is too small (" in out and "2 seeds, fewer than 3" in out
    assert "shades, dex, seed 1" in err
    result = json.loads((tmp_path / "out/comparison.json").read_text())
    assert [one["name"] for one in result["compute"]] == ["dex", "mono"]
    page = (tmp_path / "out/report.html").read_text()
    assert "No verdict" in page and "What the two cost" in page and "Test images in the pretraining set of dex" in page
    (task,) = result["tasks"]
    assert set(task["leaks"]) == {"dex", "mono"} and task["leaks"]["dex"].startswith("none found in ")
    assert len((tmp_path / "out/sheet.csv").read_text().splitlines()) == 5
    code, again, err = run(*words)
    assert code == 0 and "seed" not in err
    assert again.splitlines() == out.splitlines()[-3:]  # without what the fine-tunings said


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("A", "A", "--tasks", "T", "--out", "o"), "B: expected another run than A"),
        (("A", "absent", "--tasks", "T", "--out", "o"), "run: expected a run folder"),
        (("A", "B", "--tasks", "no such task", "--out", "o"), "task: expected a name of `dex tasks`"),
        (("A", "B", "--tasks", "T", "T", "--out", "o"), "tasks: expected each once"),
        (("A", "B", "--tasks", "T", "--out", "o", "--seeds", "1", "1"), "seeds: expected each once"),
        (("A", "B", "--tasks", "T", "--out", "o", "--preset", "x"), "preset: expected one of"),
        (("A", "B", "--tasks", "T", "--out", "o", "--settings", "absent.yaml"), "settings: expected a YAML file"),
        (("A", "B", "--tasks", "T", "--out", ""), "out: expected a folder"),
        (("A", "B", "--out", "o"), "tasks: expected a value, got nothing"),
    ],
)
def test_wrong_usage_trains_nothing(run, made, tmp_path, words, says):
    names = {"A": made / "dex", "B": made / "mono", "T": made / "shades"}
    code, _, err = run("compare", *(names.get(word, word) for word in words))
    assert code == 2 and says in err
    assert not (tmp_path / "o").exists()


def test_settings_that_are_not_the_users(run, made, tmp_path):
    for text, says in (("seed: 3", "expected neither seed nor start"), ("epochs: x", "epochs"), ("{", "expected YAML")):
        (tmp_path / "s.yaml").write_text(text)
        code, _, err = run(
            "compare", made / "dex", made / "mono", "--tasks", made / "shades", "--out", "o", "--settings", "s.yaml"
        )
        assert code == 2 and says in err, text
