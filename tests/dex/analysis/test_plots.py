import numpy as np
import pytest
from matplotlib.axes import Axes
from PIL import Image

from dex.analysis import plots
from dex.analysis.few_shot import Point


def text_boxes(figure):
    """Every text that is drawn, with its place in pixels."""
    plots.pixels(figure)
    texts = [figure._suptitle]
    for axis in figure.findobj(Axes):
        if axis.get_legend():
            texts += axis.get_legend().get_texts()
        texts += [axis.title, *axis.texts]
        for side, limits in ((axis.xaxis, axis.get_xlim()), (axis.yaxis, axis.get_ylim())):
            if axis.axison:
                texts.append(side.label)
                # matplotlib keeps a tick at either end that it does not draw
                ticks = [t for t in side.get_major_ticks() if min(limits) <= t.get_loc() <= max(limits)]
                texts += [label for t in ticks for label in (t.label1, t.label2)]
    renderer = figure.canvas.get_renderer()
    return [(t.get_text(), t.get_window_extent(renderer)) for t in texts if t.get_visible() and t.get_text().strip()]


def assert_inside_and_apart(figure):
    width, height = figure.get_size_inches() * figure.dpi
    boxes = text_boxes(figure)
    assert boxes
    for name, box in boxes:
        assert box.x0 >= -1 and box.y0 >= -1 and box.x1 <= width + 1 and box.y1 <= height + 1, name
    for i, (name, a) in enumerate(boxes):
        for other, b in boxes[i + 1 :]:
            overlap = min(a.x1, b.x1) - max(a.x0, b.x0), min(a.y1, b.y1) - max(a.y0, b.y0)
            assert min(overlap) < 2, (name, other)


@pytest.mark.parametrize("rows", [1, 5, 16])
def test_reconstructions_show_every_image_and_no_label_collides(rows):
    pictures = np.random.default_rng(0).random((rows, 32, 32, 3))
    labels = [f"modality {i % 3}" for i in range(rows)]
    figure = plots.reconstructions(pictures, pictures * 0.5, pictures, labels, "step 10: held-out masked loss 0.1234")
    shown = [image.get_array() for image in figure.axes[0].images]
    assert len(shown) == 3 * rows
    assert sum(np.array_equal(s, pictures[0]) for s in shown) == 2  # original and reconstruction
    assert_inside_and_apart(figure)


@pytest.mark.parametrize(("layers", "experts", "kinds"), [(1, 4, 1), (6, 8, 7), (12, 8, 10), (24, 64, 3)])
def test_heatmap_shows_shares_on_one_scale(layers, experts, kinds):
    rng = np.random.default_rng(0)
    mass = [rng.random((kinds + 1, experts)) for _ in range(layers)]
    for layer in mass:
        layer[kinds] = 0  # no image of the last modality
    names = [f"nuclear medicine {m}" for m in range(kinds + 1)]
    figure = plots.expert_heatmap(mass, names, "step 10: experts by modality")
    panels = [axis for axis in figure.axes if axis.images]
    assert len(panels) == layers
    for axis, layer in zip(panels, mass, strict=True):
        share = axis.images[0].get_array()
        np.testing.assert_allclose(share, layer[:kinds] / layer[:kinds].sum(1, keepdims=True))
        assert axis.images[0].get_clim() == panels[0].images[0].get_clim()
    assert_inside_and_apart(figure)


def test_loss_curves_take_rows_as_they_are_written():
    rows = [{"step": 0, "val_loss": 1.0}]
    for step in range(1, 41):
        rows.append(
            {"step": step, "loss": 1 / step, "align_loss": 2.0, "balance_loss": 1.0, "grad_norm": None, "lr": 1e-3}
            | {"modality_loss": {f"modality {m}": m / step for m in range(10 if step > 1 else 3)}}
        )
    figure = plots.loss_curves(rows, "step 40 of 40")
    masked = figure.axes[0]
    assert [line.get_label() for line in masked.lines] == ["training", "held out"]
    np.testing.assert_allclose(masked.lines[0].get_ydata(), [1 / s for s in range(1, 41)])
    assert len(figure.axes[3].lines) == 10
    assert_inside_and_apart(figure)


def test_a_picture_is_written_whole(tmp_path):
    figure = plots.loss_curves([], "nothing yet")
    drawn = plots.pixels(figure)
    plots.save(drawn, tmp_path / "losses.png")
    (tmp_path / "losses.png.partial").write_text("of a writer that was killed")
    plots.save(drawn, tmp_path / "losses.png", locked=True)
    assert [p.name for p in tmp_path.iterdir()] == ["losses.png"]
    np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "losses.png")), drawn)


def test_a_few_shot_curve_has_a_line_a_level_and_chance():
    points = [Point(shots, 0, draw, 0.5 + 0.1 * draw + shots / 100) for shots in (1, 4) for draw in range(3)]
    (axis,) = plots.few_shot_curve(points, 0.9, 4).axes
    curve, level, chance = axis.lines
    assert curve.get_xdata().tolist() == [1, 4] and curve.get_ydata() == pytest.approx([0.61, 0.64])
    assert set(level.get_ydata()) == {0.9} and set(chance.get_ydata()) == {0.25}


def test_feature_maps_have_a_row_for_each_image():
    images, rng = np.zeros((3, 8, 8, 3), np.uint8), np.random.default_rng(0)
    figure = plots.feature_maps(
        images, ["a", "b", "c"], {"colours": rng.random((3, 4, 4, 3)), "map": rng.random((3, 4, 4))}
    )
    assert len(figure.axes) == 9 and [axis.get_title() for axis in figure.axes[:3]] == ["image", "colours", "map"]
    assert [axis.get_ylabel() for axis in figure.axes[::3]] == ["a", "b", "c"]
    assert plots.pixels(figure).shape[2] == 3
