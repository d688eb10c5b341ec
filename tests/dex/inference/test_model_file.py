import json

import pytest
import torch
from safetensors.torch import save_file

import dex
from dex.inference import model_file
from dex.inference.model_file import CONFIG, WEIGHTS, Description


@pytest.fixture
def folder(trained, tmp_path):
    loaded = dex.load(trained)
    folder = tmp_path / "model"
    folder.mkdir()
    description = Description(loaded.config, loaded.modalities, loaded.step, "director")
    model_file.write_folder(folder, description, loaded.model.state_dict())
    return folder


def flip(path):
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def test_folder_and_file_alone_are_loaded(trained, folder):
    want = dex.load(trained)
    for place in (folder, folder / WEIGHTS, str(folder)):
        loaded = dex.load(place)
        assert loaded[1:4] == (want.config, want.modalities, 12) and loaded.folder == folder
        assert loaded.path == "director" and dex.load(place, path="experts").path == "experts"
        state = want.model.state_dict()
        assert all(torch.equal(tensor, state[name]) for name, tensor in loaded.model.state_dict().items())
    assert dex.load(folder, img_size=32).embed(torch.zeros(1, 3, 32, 32)).cls.shape == (1, 32)


def test_a_damaged_folder_is_named(folder):
    flip(folder / WEIGHTS)
    with pytest.raises(ValueError, match=f"run: {folder}/model.safetensors: damaged"):
        dex.load(folder)
    (folder / CONFIG).write_text("{}")
    with pytest.raises(ValueError, match=f"run: expected a folder that dex export wrote, .*; {folder}/config.json"):
        dex.load(folder)


def test_a_file_of_another_program_is_named(tmp_path):
    file = tmp_path / "other.safetensors"
    save_file({"weight": torch.zeros(2)}, file)
    assert model_file.read_description(file) is None
    with pytest.raises(ValueError, match=f"run: expected .*; {file} does not describe its model"):
        dex.load(file)
    file.write_bytes(b"no safetensors")
    with pytest.raises(ValueError, match=f"run: expected a safetensors file; {file}"):
        dex.load(file)
    words = {"format": model_file.FORMAT, "version": 99}
    save_file({"weight": torch.zeros(2)}, file, {"dex": json.dumps(words)})
    with pytest.raises(ValueError, match=f"run: expected a model that dex export wrote; {file}: .* version 99"):
        dex.load(file)


def test_weights_of_another_model_are_named(folder, trained):
    loaded = dex.load(trained)
    tensors = loaded.model.state_dict()
    del tensors["mask_token"]
    model_file.write_folder(folder, Description(loaded.config, (), 0, "experts"), tensors)
    with pytest.raises(ValueError, match=f"run: {folder}: .*mask_token"):
        dex.load(folder)
