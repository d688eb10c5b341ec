"""Fixtures of several folders. What they need is imported when one is asked for: some tests run without it."""

import sys
from pathlib import Path

import pytest


@pytest.fixture(autouse=True)
def same_draws_in_any_order(request) -> None:
    """Begin a module's random numbers anew for each test: none depends on which tests ran before it."""
    numpy = sys.modules.get("numpy")
    for value in vars(request.module).values() if numpy else ():
        if isinstance(value, numpy.random.Generator):
            value.bit_generator.state = type(value.bit_generator)(0).state


@pytest.fixture
def inline_workers(monkeypatch) -> None:
    """`dex prepare` works in this process, as if its workers never failed."""
    from dex.prepare import workers

    class Report:
        begun = 0

        def begin(self, unit, silence, total):
            self.begun += 1

        def beat(self, done=None):
            pass

        def save(self, state):
            pass

    def inline(work, jobs, **_):
        for job in jobs:
            yield job, work(workers.Task(job, None, {}), Report())

    monkeypatch.setattr(workers, "run", inline)


@pytest.fixture(scope="session")
def images(tmp_path_factory) -> Path:
    """A folder of 120 little pictures in three modalities, about 5 % of them held out by the hash of their name."""
    import numpy as np
    from PIL import Image

    root = tmp_path_factory.mktemp("images")
    y, x = np.mgrid[0:64, 0:64] / 63
    rng = np.random.default_rng(0)
    for channel, name in enumerate(("ct", "mr", "us")):
        (root / name).mkdir()
        for i in range(40):
            cx, cy, r = rng.uniform(0.3, 0.7), rng.uniform(0.3, 0.7), rng.uniform(0.2, 0.4)
            picture = np.full((64, 64, 3), 0.2)
            picture[..., channel] += 0.6 * ((x - cx) ** 2 + (y - cy) ** 2 < r * r)
            picture[..., (channel + 1) % 3] += 0.4 * y
            Image.fromarray((picture.clip(0, 1) * 255).astype(np.uint8)).save(root / name / f"{i:03d}.png")
    return root
