import pytest
import torch

import dex

pytest.importorskip("huggingface_hub", reason="needs huggingface_hub, of the extra 'adapt'")

from dex.inference import hub  # noqa: E402
from dex.inference.hub import DEXModel  # noqa: E402


def test_a_saved_folder_comes_back(trained, tmp_path):
    loaded = dex.load(trained)
    DEXModel(loaded).save_pretrained(tmp_path / "model")
    assert sorted(path.name for path in (tmp_path / "model").iterdir()) == [
        "README.md",
        "config.json",
        "model.safetensors",
    ]
    assert "DEX ViT 32/2/2" in (tmp_path / "model" / "README.md").read_text()
    back = DEXModel.from_pretrained(tmp_path / "model", path="director").loaded
    assert (back.step, back.path, back.modalities) == (12, "director", loaded.modalities)
    images = torch.rand(2, 3, 64, 64)
    assert torch.equal(dex.load(tmp_path / "model").embed(images).cls, loaded.embed(images).cls)


def test_a_repository_is_fetched_once(trained, tmp_path, monkeypatch):
    DEXModel(dex.load(trained)).save_pretrained(tmp_path / "model")
    asked = []

    def fetch(name, **options):
        asked.append((name, options))
        return str(tmp_path / "model")

    monkeypatch.setattr(hub, "snapshot_download", fetch)
    model = DEXModel._from_pretrained(model_id="somebody/model", revision="v1", cache_dir="there", proxies=None)
    assert model.loaded.step == 12
    files = ["config.json", "model.safetensors"]
    assert asked == [("somebody/model", {"revision": "v1", "allow_patterns": files, "cache_dir": "there"})]
