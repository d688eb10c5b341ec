from run_folders import START, held_out, read, row, write

from dex.report.facts import facts, sentence
from dex.report.runs import read_run


def test_runs_that_measure_another_loss_are_told_apart(few, tmp_path):
    data = START["data"] | {"fingerprint": "f2"}
    other = write(
        tmp_path / "other", [held_out(4)], start=START | {"data": data}, changes={"model": {"mask_ratio": 0.5}}
    )
    page = read(few, other, out=tmp_path / "r.html")
    assert "are not comparable: the runs differ in model.mask_ratio, the data set" in page.section_words("")
    assert "<td><b>" not in page.source


def test_figures_of_a_run(tmp_path):
    rows = [held_out(0), row(4, mfu=0.5, memory_mb=100.0), row(8, skipped=2, memory_mb=90.0), held_out(8, val_loss=4.0)]
    run = write(tmp_path / "run", rows, starts=[START | {"step": 4}])
    figures = facts(read_run(run, "run"))
    assert list(figures) == [
        *("steps", "images seen", "training time", "images/s", "training loss", "held-out loss"),
        *("align loss", "balance loss", "MFU", "memory", "steps skipped"),
    ]
    assert figures["steps"].value == "8 of 40" and figures["memory"].value == "100 MB"
    # 16 images a step, 32 images a second; a quarter of a second of waiting in every row of 4 steps
    assert figures["training time"] == ("4s", "without evaluation and saving, 2 starts", None)
    assert figures["images/s"] == ("32", "12.5% of the time waiting for data", None)
    assert figures["held-out loss"] == ("4", "step 8; lowest 3 at step 0", 4.0)
    assert figures["steps skipped"].value == "2"


def test_a_run_in_a_sentence(few):
    assert sentence(read_run(few, "few")) == (
        "Masked autoencoder with a DEX vision transformer (width 192, 4 layers, 3 heads; 8 experts per layer, 2 per "
        "image), 256 px images in patches of 16, 75% masked. Data: little, 1,240 images of 2 modalities. The held-out "
        "masked loss went from 3 to 0.3333 at step 8."
    )
