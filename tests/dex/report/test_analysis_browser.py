"""The pages of `dex analyse` and `dex explain` in chromium, where it is installed."""

import pytest
import torch
from browser import CHROMIUM, measured

from dex.inference import explain_job
from dex.report import analysis_page, explain_page

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed"),
]
LONG = ("a modality with quite a long name", "mr", "unbrokennameofamodalitythatgoesonandonandon")


def test_an_analysis_fits_a_desktop_and_a_telephone(analysis, tmp_path):
    renamed = dict(zip(analysis.material.modalities, LONG, strict=True))

    def longer(found):
        return found._replace(modality_loss={renamed[m]: v for m, v in found.modality_loss.items()})

    wide = analysis._replace(
        name="run-of-a-long-name" * 4,
        material=analysis.material._replace(modalities=LONG),
        findings=longer(analysis.findings),
        start=longer(analysis.start),
        other=analysis.other._replace(name="another-run" * 5, findings=longer(analysis.other.findings)),
        notes=["A note " * 30],
    )
    source = analysis_page.write(wide, tmp_path / "out").read_text()
    for result in measured(source, tmp_path, "#spectra figure, #steps figure").values():
        assert result["bad"] == [], "\n".join(result["bad"])
        assert result["drawn"] > 8 and result["images"] == 1
        assert any("at component " in tip for tip in result["tips"]) and any("at step 12" in t for t in result["tips"])


def test_an_explanation_fits_too(real, images, tmp_path):
    options = explain_job.Options(masks=2, train=12, neighbours=8)
    found = explain_job.explain(explain_job.prepare(real, images / "us" / "003.png", options), torch.device("cpu"))
    explain_page.write(found._replace(file="a-scan-of-a-long-name" * 6 + ".png"), tmp_path / "e.html")
    for result in measured((tmp_path / "e.html").read_text(), tmp_path).values():
        assert result["bad"] == [], "\n".join(result["bad"])
        assert result["images"] == 9
