import io

import numpy as np
import torch

from dex.analysis.sample import groups, spread_out
from dex.data import ShardWriter, open_dataset


def test_modalities_take_turns_and_the_same_images_come_again(images):
    dataset = open_dataset(images)
    one, two = spread_out(dataset, 12), spread_out(dataset, 12)
    assert torch.equal(one.images, two.images) and one.ids == two.ids and len(set(one.ids)) == 12
    kinds = one.modality.unique()
    assert one.modality[: len(kinds)].sort().values.tolist() == kinds.tolist()
    counts = torch.bincount(one.modality)[kinds]
    assert counts.max() - counts.min() <= 1
    assert dataset[[dataset.sample_id(i) for i in range(len(dataset))].index(one.ids[3])].modality == one.modality[3]
    assert len(spread_out(dataset, 10**6).images) == len(dataset)


def shards(folder, ids):
    image = np.zeros((3, 32, 32), np.uint8)
    with ShardWriter(folder, name="s", modalities=("CT",), image_size=32) as writer:
        for number, name in enumerate(ids):
            image[:] = number
            data = io.BytesIO()
            np.save(data, image[0])
            writer.add(name, data.getvalue(), kind="npy", modality="CT", split="train", group=f"patient-{number // 2}")
    return open_dataset(folder)


def test_sources_where_there_are_enough_else_patients_else_images(tmp_path, images):
    many = shards(tmp_path / "many", [f"source-{n % 5}/image-{n}" for n in range(10)])
    found = groups(many, [many.sample_id(i) for i in (0, 5, 1, 9, 2, 3)])
    assert found.kind == "sources" and found.of.tolist() == [0, 0, 1, 2, 3, 4]
    few = shards(tmp_path / "few", [f"mine/image-{n}" for n in range(6)])
    found = groups(few, [few.sample_id(i) for i in (0, 4, 1, 5, 2)])
    assert found.kind == "patients" and found.of.tolist() == [0, 1, 0, 1, 2]
    folder = open_dataset(images)
    assert groups(folder, ["a/1", "a/2"]).of.tolist() == [0, 1]
    assert groups(folder, ["a/1", "a/2"]).kind == "images"
