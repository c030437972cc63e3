"""Figures: what is right, in front or above is drawn there, and each number stands in its place."""

import matplotlib
import numpy as np
import pandas as pd
import pytest
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.text import Text
from nibabel import Nifti1Image

from brainsex import figures

matplotlib.use("Agg")

AFFINE = np.array([[2.0, 0, 0, -20], [0, 3, 0, -21], [0, 0, 4, -18], [0, 0, 0, 1]])
SHAPE = (20, 16, 12)
BLOB = (slice(14, 17), slice(11, 14), slice(1, 4))  # right, anterior, inferior
BLOB_MM = (10, 15, -10)
WHITE, HOT = ((0.9, 0.9, 0.9), (1, 1, 1)), ((0.6, 0, 0), (1, 1, 0.7))  # ranges of RGB
HEAD = {"title": "A title", "cohort": "synthetic cohort, n=7"}


@pytest.fixture
def volume() -> np.ndarray:
    """Make a dim block with three unequal axes and one bright blob: right, in front and below."""
    volume = np.zeros(SHAPE, np.float32)
    volume[1:-1, 1:-1, 1:-1] = 0.2
    volume[BLOB] = 1
    return volume


def texts(artist: Figure | Axes) -> list[str]:
    return [text.get_text() for text in artist.findobj(Text) if text.get_text()]


def planes(figure: Figure, axis: str) -> dict[int, Axes]:
    """Find the axes that nilearn wrote a place on: place in mm -> axes."""
    places = [(ax, text.get_text()) for ax in figure.axes for text in ax.texts]
    return {int(text[2:]): ax for ax, text in places if text.startswith(f"{axis}=")}


def saved(figure: Figure) -> np.ndarray:
    """Draw the figure as it is saved: (rows, columns, RGB) in [0, 1], the lowest row first."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[::-1, :, :3] / 255


def spot(picture: np.ndarray, ax: Axes, low: tuple, high: tuple) -> np.ndarray:
    """Return the mean place (x, y) of the pixels within `ax` whose colours are in a range."""
    inside = np.zeros(picture.shape[:2], bool)
    left, bottom, right, top = ax.get_window_extent().extents.astype(int)
    inside[bottom:top, left:right] = True
    for text in ax.texts:  # the letters are as bright as the blob
        left, bottom, right, top = text.get_window_extent().extents.astype(int)
        inside[bottom - 2 : top + 3, left - 2 : right + 3] = False
    match = ((picture >= low) & (picture <= high)).all(-1) & inside
    assert match.any()
    return np.argwhere(match)[:, ::-1].mean(0)


@pytest.mark.parametrize("flips", [(), (0,), (1, 2)])
def test_each_plane_shows_the_blob_at_its_place_in_mm(volume, flips):
    affine = AFFINE.copy()
    for axis in flips:  # the same brain, stored the other way round
        affine[:3, 3] += affine[:3, axis] * (SHAPE[axis] - 1)
        affine[:3, axis] *= -1
    stored = np.flip(volume, flips)
    panel = {"label": "", "stat_map_img": Nifti1Image(stored, affine), "cmap": "gray"}
    rows = [[panel | {"planes": "xyz", "cut_coords": BLOB_MM, "vmax": 1}]]
    figure = figures.brain_panels(rows, **HEAD)
    picture = saved(figure)
    for axis, others in (("x", (1, 2)), ("y", (0, 2)), ("z", (0, 1))):
        (ax,) = planes(figure, axis).values()
        place = spot(picture, ax, *WHITE)
        mm, (across, up) = (t.inverted().transform(place) for t in (ax.transData, ax.transAxes))
        # nilearn draws from centre to centre of the outer voxels: half a voxel off at the most
        assert mm == pytest.approx(np.take(BLOB_MM, others), abs=2)
        assert across > 0.6  # what is right in the brain is right in the picture; in "x", the front
        assert (up > 0.6) == (axis == "z")  # the front above, what is inferior below
        if axis != "x":
            at = {text.get_text(): text.get_window_extent().x0 for text in ax.texts}
            assert at["L"] < at["R"]


def test_a_row_of_panels_shows_each_image_in_the_plane_asked_for(volume):
    mask = np.zeros(SHAPE)
    mask[BLOB] = 1
    images, look = {"brain": volume, "mask": mask}, {"planes": "z", "cut_coords": [-6], "vmax": 1}
    row = [
        look | {"label": label, "cmap": "gray", "stat_map_img": Nifti1Image(image, AFFINE)}
        for label, image in images.items()
    ]
    figure = figures.brain_panels([row], bar=("gray", 1, "FA of a test"), **HEAD)
    axes = [ax for ax in figure.axes if "z=-6" in texts(ax)]  # plane 3: −18 + 3 · 4 mm
    for ax, drawn in zip(axes, images.values(), strict=True):
        np.testing.assert_array_equal(ax.images[-1].get_array(), np.rot90(drawn[:, :, 3]))
    assert [ax.get_title() for ax in figure.axes[:2]] == [*images]
    assert {"A title", "FA of a test"} <= set(texts(figure))
    assert any(text.startswith("synthetic cohort, n=7 · x, y, z in mm") for text in texts(figure))
    assert not plt.get_fignums()


def test_planted_regions_are_outlined_where_they_lie(volume):
    region = np.zeros(SHAPE, bool)
    region[2:5, 3:5, 7:10] = True
    panel = {"label": "", "planes": "z", "cut_coords": [14], "vmax": 1, "cmap": "gray"}
    panel["stat_map_img"] = Nifti1Image(volume, AFFINE)
    figure = figures.brain_panels([[panel]], outlines={"men": region}, **HEAD)
    ax = planes(figure, "z")[14]  # through the outlined region: voxel 8, −18 + 8 · 4 mm
    corners = np.concatenate([path.vertices for c in ax.collections for path in c.get_paths()])
    middle = (corners.min(0) + corners.max(0)) / 2
    assert middle == pytest.approx((-14, -10.5), abs=2)  # voxels 2 to 4 and 3 to 4
    colours = {to_hex(colour) for c in ax.collections for colour in c.get_edgecolor()}
    assert colours == {figures.OUTLINES["men"].lower()}
    assert any("orange higher in women, blue in men" in text for text in texts(figure))


def test_training_curves_draw_folds_and_their_mean():
    history = pd.DataFrame({"fold": [0, 0, 0, 1, 1, 1], "epoch": [1, 2, 3] * 2})
    history["train_loss"] = [0.7, 0.5, 0.1, 0.6, 0.3, 0.2]
    history["validation_loss"] = history["train_loss"] + 0.1
    history["train_accuracy"] = history["validation_accuracy"] = 1 - history["train_loss"]
    history = history[::-1]  # as processes that share the folds leave them
    figure = figures.training_curves({"3D": history, "2D": history[:3]}, **HEAD)
    above, _, below, _ = figure.axes
    means = {line.get_label(): line for line in above.lines}
    assert means["training"].get_xdata().tolist() == [1, 2, 3]
    assert means["training"].get_ydata() == pytest.approx([0.65, 0.4, 0.15])
    assert means["held-out fold"].get_ydata() == pytest.approx([0.75, 0.5, 0.25])
    assert means["chance"].get_ydata() == pytest.approx([np.log(2)] * 2)
    means = {line.get_label(): line for line in below.lines}
    assert means["held-out fold"].get_ydata() == pytest.approx([0.35, 0.6, 0.85])
    assert len(above.lines) == 2 * (2 + 1) + 1
    assert [ax.get_title() for ax in figure.axes[:2]] == ["3D", "2D"]


SCORES = pd.DataFrame({"classifier": ["SVM", "KNN"] * 2, "n": 100})
SCORES["protocol"] = ["10-fold", "10-fold", "leave-one-out", "leave-one-out"]
SCORES["accuracy"], SCORES["low"] = [0.91, 0.82, 0.93, 0.74], [0.88, 0.78, 0.9, 0.7]
SCORES["high"] = [0.96, 0.9, 0.95, 0.79]


def dots(table: pd.DataFrame = SCORES, **options: object) -> Axes:
    (ax,) = figures.score_dots(table, rows="classifier", hue="protocol", **HEAD, **options).axes
    return ax


def labelled(ax: Axes) -> dict:
    return {line.get_label(): line for line in ax.lines if not line.get_label().startswith("_")}


def test_dots_draw_scores_intervals_and_numbers_in_their_row_and_kind():
    ax = dots()
    assert [label.get_text() for label in ax.get_yticklabels()] == ["SVM", "KNN"]
    bottom, top = ax.get_ylim()
    assert bottom > 1 > 0 > top  # the first row stands above
    lines = labelled(ax)
    assert lines["10-fold"].get_xdata().tolist() == [0.91, 0.82]
    assert lines["leave-one-out"].get_xdata().tolist() == [0.93, 0.74]
    for row in (0, 1):
        first, second = (line.get_ydata()[row] for line in lines.values())
        assert row - 0.4 < first < row < second < row + 0.4
    written = {text.get_text(): text.get_position()[1] for text in ax.texts}
    for line, (kind, rows) in zip(lines.values(), SCORES.groupby("protocol")):
        colour = to_hex(line.get_color())
        (bars,) = (c for c in ax.collections if to_hex(c.get_color()[0]) == colour)
        segments = np.array(bars.get_segments())
        np.testing.assert_allclose(segments[:, :, 0], rows[["low", "high"]], err_msg=kind)
        np.testing.assert_allclose(segments[:, :, 1], line.get_ydata()[:, None] * [[1, 1]])
        assert [written[f"{x:.2f}, n=100"] for x in line.get_xdata()] == line.get_ydata().tolist()
    with pytest.raises(ValueError, match="shorter"):  # there are eight colours
        dots(pd.concat([SCORES[:1].assign(protocol=kind) for kind in "abcdefghi"]))
    assert dots(label="AUC").get_xlabel() == "AUC"
    assert {"0.91, n=40", "0.74, n=40"} <= set(texts(dots(SCORES.assign(n=40))))


def test_dots_draw_folds_above_and_published_values_below_their_own():
    folds = pd.concat([SCORES.assign(accuracy=SCORES["accuracy"] + d) for d in (-0.01, 0.02)])
    rows = [("KNN", "10-fold", 0.8, 0.03), ("SVM", "leave-one-out", 0.9, np.nan)]
    rows += [("unknown", "10-fold", 0.7, np.nan)]
    published = pd.DataFrame(rows, columns=["classifier", "protocol", "accuracy", "sd"])
    ax = dots(folds=folds, published=published)
    rows, lines = ("SVM", "KNN"), labelled(ax).items()
    height = {(row, kind): y for kind, line in lines for row, y in zip(rows, line.get_ydata())}
    small = [line for line in ax.lines if line.get_marker() == "."]
    assert small[0].get_xdata() == pytest.approx([0.90, 0.81, 0.93, 0.84])
    assert (small[0].get_ydata()[:2] < [height["SVM", "10-fold"], height["KNN", "10-fold"]]).all()
    points, _, (spreads,) = ax.containers[0].lines
    assert points.get_xdata()[:2].tolist() == [0.8, 0.9]
    assert 0 < points.get_ydata()[0] - height["KNN", "10-fold"] < 0.2  # ylim falls: beneath
    assert 0 < points.get_ydata()[1] - height["SVM", "leave-one-out"] < 0.2
    assert np.isnan(points.get_ydata()[2])  # no such row
    assert spreads.get_segments()[0][:, 0] == pytest.approx((0.77, 0.83))
