"""Pictures and arrays as the bytes of files."""

import io

import numpy as np
from PIL import Image

from dex.data import open_dataset

rng = np.random.default_rng(0)


GREY = rng.integers(0, 256, (256, 256), dtype=np.uint8)


COLOUR = rng.integers(0, 256, (256, 256, 3), dtype=np.uint8)


def png(image, **options):
    stream = io.BytesIO()
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(stream, "PNG", **options)
    return stream.getvalue()


def npy(array):
    stream = io.BytesIO()
    np.save(stream, array, allow_pickle=False)
    return stream.getvalue()


def put(folder, **files):
    for name, data in files.items():
        path = folder / name.replace("__", "/").replace("_dot_", ".")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return folder


def only(folder):
    return open_dataset(folder)[0].image.permute(1, 2, 0).numpy()


def jpeg(array, **options):
    stream = io.BytesIO()
    (array if isinstance(array, Image.Image) else Image.fromarray(array)).save(stream, "JPEG", quality=95, **options)
    return stream.getvalue()


def smooth():
    x = np.linspace(0, 255, 256)
    return np.stack(
        [np.broadcast_to(x, (256, 256)), np.broadcast_to(x[:, None], (256, 256)), np.full((256, 256), 90.0)], 2
    ).astype(np.uint8)


WIDE = rng.integers(0, 65536, (256, 256), dtype=np.uint16)
