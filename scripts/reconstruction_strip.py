#!/usr/bin/env python3
"""The README's strip of a run: a held-out image of each modality, the patches that the model sees, its reconstruction.

usage: python scripts/reconstruction_strip.py [RUN]

RUN: a run on the embedded images (default: runs/demo). Writes docs/images/reconstructions.jpg, at most 300 pixels high.
"""

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PICTURE = ROOT / "docs/images/reconstructions.jpg"
SIDE, GAP, TEXT = 90, 4, 18


def strip(run: Path) -> None:
    """Write `PICTURE` from the newest checkpoint of ``run``."""
    from PIL import Image, ImageDraw, ImageFont

    from dex.config import Config, read_yaml
    from dex.data import open_dataset
    from dex.train import checkpoint
    from dex.train.plan import resolve
    from dex.train.trainer import Trainer

    config = read_yaml(run / "config.yaml", Config())
    trainer = Trainer(resolve(config, open_dataset(config.data.path)))
    trainer.restore(checkpoint.newest_good(run / "checkpoints")[0])
    evaluation = trainer.evaluate()
    trainer.close()
    columns = sorted(
        {label: i for i, label in reversed(list(enumerate(evaluation.labels)))}.items(), key=lambda c: c[1]
    )
    rows = (evaluation.original, evaluation.masked, evaluation.reconstruction)
    size = (len(columns) * (SIDE + GAP) - GAP, TEXT + len(rows) * (SIDE + GAP) - GAP)
    canvas = Image.new("RGB", size, "white")
    draw, font = ImageDraw.Draw(canvas), ImageFont.load_default(11)
    for c, (label, i) in enumerate(columns):
        x = c * (SIDE + GAP)
        draw.text((x + SIDE / 2, TEXT / 2), label.removeprefix("clinical "), "#333333", font, anchor="mm")
        for r, images in enumerate(rows):
            pixels = (images[i].clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy()
            canvas.paste(
                Image.fromarray(pixels).resize((SIDE, SIDE), Image.Resampling.LANCZOS), (x, TEXT + r * (SIDE + GAP))
            )
    canvas.save(PICTURE, quality=90)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("run", type=Path, nargs="?", default=ROOT / "runs/demo")
    strip(parser.parse_args().run)
    return 0


if __name__ == "__main__":
    sys.exit(main())
