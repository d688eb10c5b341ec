import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import dex
from dex.inference import export as exporting
from dex.inference.export import FORMATS, check, export, timm_state_dict
from dex.model import VisionTransformer


@pytest.fixture
def batches():
    """Batches of 1 and 5 images."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(n, 3, 64, 64, generator=generator) for n in (1, 5)]


def tokens(loaded, batch):
    with torch.no_grad():
        return loaded.encoder(batch)


def test_safetensors_come_back(trained, tmp_path, batches):
    loaded = dex.load(trained, img_size=64)
    export(loaded, "safetensors", tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["config.json", "model.safetensors"]
    back = dex.load(tmp_path / "out")
    assert torch.equal(tokens(back, batches[1]), tokens(loaded, batches[1]))
    assert back.modalities == loaded.modalities and back.step == 12
    assert back.config.data.path is None and loaded.config.data.path is not None  # it may name somebody
    assert loaded.config.data.path not in (tmp_path / "out" / "config.json").read_text()


def test_hf_is_a_folder_with_a_card(trained, tmp_path):
    export(dex.load(trained), "hf", tmp_path / "out")
    assert (tmp_path / "out" / "README.md").read_text().startswith("---\nlibrary_name: dexkernels\n")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["model_type"] == "dex"
    assert dex.load(tmp_path / "out").step == 12


def test_timm_names_and_shapes_are_those_that_timm_has():
    with torch.device("meta"):
        encoder = VisionTransformer(img_size=224)
    state = timm_state_dict(encoder)
    recorded = Path(__file__).parents[2] / "recorded" / "timm_vit_base_patch16_224.json"
    assert {name: list(tensor.shape) for name, tensor in state.items()} == json.loads(recorded.read_text())


def test_timm_is_read_by_transformers(trained, tmp_path, batches):
    """Another implementation of the same network, with its own names."""
    transformers = pytest.importorskip("transformers", reason="needs transformers, of the extra 'adapt'")
    loaded = dex.load(trained, path="director")
    export(loaded, "timm", tmp_path / "out")
    state, model = load_file(tmp_path / "out" / "model.safetensors"), loaded.config.model
    config = transformers.ViTConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=128, image_size=64,
        patch_size=model.patch_size, layer_norm_eps=1e-6, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    host = transformers.ViTModel(config, add_pooling_layer=False).eval()
    renamed = {
        "embeddings.cls_token": state["cls_token"],
        "embeddings.position_embeddings": state["pos_embed"],
        **{f"embeddings.patch_embeddings.projection.{k}": state[f"patch_embed.proj.{k}"] for k in ("weight", "bias")},
        **{f"layernorm.{k}": state[f"norm.{k}"] for k in ("weight", "bias")},
    }
    for i in range(2):
        mine, theirs = f"blocks.{i}", f"layers.{i}"
        for k in ("weight", "bias"):
            heads = zip(("q_proj", "k_proj", "v_proj"), state[f"{mine}.attn.qkv.{k}"].chunk(3), strict=True)
            renamed |= {f"{theirs}.attention.{name}.{k}": part for name, part in heads}
            renamed |= {
                f"{theirs}.attention.o_proj.{k}": state[f"{mine}.attn.proj.{k}"],
                f"{theirs}.layernorm_before.{k}": state[f"{mine}.norm1.{k}"],
                f"{theirs}.layernorm_after.{k}": state[f"{mine}.norm2.{k}"],
                f"{theirs}.mlp.fc1.{k}": state[f"{mine}.mlp.fc1.{k}"],
                f"{theirs}.mlp.fc2.{k}": state[f"{mine}.mlp.fc2.{k}"],
            }
    host.load_state_dict(renamed)
    for batch in batches:
        with torch.no_grad():
            got = host(pixel_values=batch).last_hidden_state
        torch.testing.assert_close(got, tokens(loaded, batch), rtol=1e-5, atol=1e-5)


BY_TIMM = """
import importlib.util, json, pathlib, re, sys
import torch
folder, given, got = map(pathlib.Path, sys.argv[1:])
# torchvision's wheels from PyPI are built for CUDA. Beside another torch their native operators are missing, which no
# vision transformer uses: with their names declared, the Python part imports.
origin = importlib.util.find_spec("torchvision").origin
try:
    import torchvision
except (ImportError, RuntimeError):
    for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
        del sys.modules[name]
    text = pathlib.Path(origin).with_name("_meta_registrations.py").read_text()
    library = torch.library.Library("torchvision", "FRAGMENT")
    for name in sorted(set(re.findall(r'register_(?:meta|fake)\\("(?:torchvision::)?(\\w+)"', text))):
        library.define(f"{name}(Tensor x) -> Tensor")
import timm
from safetensors.torch import load_file
config, state = json.loads((folder / "config.json").read_text()), load_file(folder / "model.safetensors")
host = timm.create_model(config["architecture"], num_classes=0, **config["model_args"]).eval()
host.load_state_dict(state)
with torch.no_grad():
    torch.save([host.forward_features(batch) for batch in torch.load(given)], got)
assert not any(name.split(".")[0] in ("dex", "dexkernels") for name in sys.modules)
"""


@pytest.mark.slow
def test_timm_is_read_by_timm(trained, tmp_path, batches):
    for name in ("timm", "torchvision"):
        if importlib.util.find_spec(name) is None:
            pytest.skip(f"{name} is not installed: timm's own code did not load the exported weights")
    loaded = dex.load(trained, path="director")
    export(loaded, "timm", tmp_path / "out")
    torch.save(batches, tmp_path / "in.pt")
    command = [sys.executable, "-c", BY_TIMM, tmp_path / "out", tmp_path / "in.pt", tmp_path / "got.pt"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for got, batch in zip(torch.load(tmp_path / "got.pt"), batches, strict=True):
        torch.testing.assert_close(got, tokens(loaded, batch), rtol=1e-5, atol=1e-5)


def test_timm_of_the_control_is_the_control(control, tmp_path):
    export(dex.load(control), "timm", tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["model_args"]["mlp_ratio"] == 8.0  # top_k times the hidden size of an expert


NO_DEX = """
import sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("dex", "dexkernels"):
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Blocked())
import torch
program = torch.export.load(sys.argv[1]).module()
torch.save([program(batch) for batch in torch.load(sys.argv[2])], sys.argv[3])
assert not any(name.split(".")[0] in ("dex", "dexkernels") for name in sys.modules)
"""


@pytest.mark.slow
@pytest.mark.parametrize("path", ["experts", "director"])
def test_torch_export_runs_without_this_package(trained, tmp_path, batches, path):
    loaded = dex.load(trained, path=path)
    export(loaded, "torch-export", tmp_path / "out")
    torch.save(batches, tmp_path / "in.pt")
    program = tmp_path / "out" / "model.pt2"
    subprocess.run([sys.executable, "-c", NO_DEX, program, tmp_path / "in.pt", tmp_path / "got.pt"], check=True)
    for got, batch in zip(torch.load(tmp_path / "got.pt"), batches, strict=True):
        torch.testing.assert_close(got, tokens(loaded, batch), rtol=1e-5, atol=1e-5)
    assert b"inference/plain.py" not in program.read_bytes()  # no paths of source files


@pytest.mark.slow
@pytest.mark.parametrize("path", ["experts", "director"])
def test_onnx_runs_at_any_batch_size(trained, tmp_path, batches, path):
    onnx = pytest.importorskip("onnx", reason="needs onnx, of the extra 'export'")
    pytest.importorskip("onnxscript", reason="needs onnxscript, of the extra 'export'")
    runtime = pytest.importorskip("onnxruntime", reason="needs onnxruntime, of the extra 'export'")
    loaded = dex.load(trained, path=path)
    export(loaded, "onnx", tmp_path / "out")
    file = tmp_path / "out" / "model.onnx"
    session = runtime.InferenceSession(file)
    for batch in batches:
        (got,) = session.run(None, {"images": batch.numpy()})
        torch.testing.assert_close(torch.from_numpy(got), tokens(loaded, batch), rtol=1e-4, atol=1e-4)
    graph = onnx.load(file)
    assert {node.domain for node in graph.graph.node} <= {"", "ai.onnx"} and not graph.functions
    (dimensions,) = [t.type.tensor_type.shape.dim for t in graph.graph.input]
    assert [d.dim_value for d in dimensions] == [0, 3, 64, 64] and b"plain.py" not in file.read_bytes()


def test_what_a_format_cannot_hold_is_named(trained, tmp_path):
    loaded = dex.load(trained)
    with pytest.raises(ValueError, match="format: expected one of safetensors, hf, timm, onnx, torch-export, got 'pt'"):
        check(loaded, "pt", tmp_path / "out")
    with pytest.raises(ValueError, match="path: expected director for format timm, a dense ViT, got 'experts'"):
        export(loaded, "timm", tmp_path / "out")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    for taken in (tmp_path / "full", tmp_path / "full" / "file"):
        with pytest.raises(ValueError, match=f"out: expected a new or empty folder, got {taken}"):
            check(loaded, FORMATS[0], taken)
    assert not (tmp_path / "out").exists()


def test_a_failed_export_leaves_nothing(trained, tmp_path, monkeypatch):
    def fail(loaded, folder):
        (folder / "half").touch()
        raise OSError(28, "No space left on device")

    monkeypatch.setitem(exporting._WRITERS, "hf", fail)
    with pytest.raises(OSError, match="No space"):
        export(dex.load(trained), "hf", tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
