"""Figures: what is right, in front or above is drawn there, and each number stands in its place."""

import matplotlib
import numpy as np
import pandas as pd
import pytest
import torch
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.text import Text
from torch import nn

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
    panel = {"label": "", "stat_map_img": figures.to_image(stored, affine), "cmap": "gray"}
    rows = [[panel | {"planes": "xyz", "cut_coords": BLOB_MM, "vmax": 1}]]
    figure = figures.brain_panels(rows, title="A title", foot="n=7")
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


def test_slices_share_a_point_and_name_their_grids(volume):
    # The same head at half the resolution, its first voxel over eight of the other's
    coarse = volume.reshape(10, 2, 8, 2, 6, 2).mean((1, 3, 5))
    affine = AFFINE @ np.diag([2, 2, 2, 1])
    affine[:3, 3] = (AFFINE @ [0.5, 0.5, 0.5, 1])[:3]
    panels = {"fine": (volume, AFFINE), "coarse": (coarse, affine)}
    figure = figures.volume_slices(panels, values="FA of a test", **HEAD)
    weights = volume / volume.sum(dtype=np.float64)
    voxel = [(weights * index).sum() for index in np.indices(SHAPE)]
    for axis, place in zip("xyz", AFFINE[:3] @ [*voxel, 1]):
        written = [text for text in texts(figure) if text.startswith(f"{axis}=")]
        assert written == [f"{axis}={place:.0f}"] * 2
    assert "fine: 20 × 16 × 12 voxels of 2 × 3 × 4 mm" in texts(figure)
    assert "coarse: 10 × 8 × 6 voxels of 4 × 6 × 8 mm" in texts(figure)
    assert {"A title", "FA of a test"} <= set(texts(figure))
    assert any(text.startswith("synthetic cohort, n=7 · x, y, z in mm") for text in texts(figure))
    assert not plt.get_fignums()
    limits = {image.get_clim() for ax in planes(figure, "z").values() for image in ax.images[-1:]}
    assert limits == {(0, 1)}


def test_person_strip_cuts_where_the_last_volume_differs_most(volume):
    mask, removed = np.zeros(SHAPE), volume.copy()
    mask[BLOB], removed[14:17, 11:14, 3] = 1, 0
    panels = {"brain": volume, "mask": mask, "mask blurred": removed}
    figure = figures.person_strip(panels, AFFINE, **HEAD)
    axes = [ax for ax in figure.axes if "z=-6" in texts(ax)]  # plane 3: −18 + 3 · 4 mm
    assert len(axes) == 3
    for ax, drawn in zip(axes, panels.values()):
        np.testing.assert_array_equal(ax.images[-1].get_array(), np.rot90(drawn[:, :, 3]))
    assert [ax.get_title() for ax in figure.axes[:3]] == [*panels]


def test_overlay_shows_mask_and_outlines_where_they_are(volume, monkeypatch):
    monkeypatch.setattr(figures, "CUTS", 4)
    saliency, outlines = np.zeros(SHAPE), np.zeros(SHAPE, int)
    saliency[BLOB], outlines[2:5, 3:5, 7:10] = 0.8, 2
    figure = figures.mask_overlay(0.3 * volume, saliency, AFFINE, outlines=outlines, **HEAD)
    picture = saved(figure)
    for axis, others in (("x", (1, 2)), ("y", (0, 2)), ("z", (0, 1))):
        assert len(planes(figure, axis)) == 4
        ax = planes(figure, axis)[BLOB_MM["xyz".index(axis)]]
        place = ax.transData.inverted().transform(spot(picture, ax, *HOT))
        assert place == pytest.approx(np.take(BLOB_MM, others), abs=2)
        assert ax.images[-1].get_clim() == (0, 0.8)
    ax = planes(figure, "z")[14]  # through the outlined region: voxel 8, −18 + 8 · 4 mm
    corners = np.concatenate([path.vertices for c in ax.collections for path in c.get_paths()])
    middle = (corners.min(0) + corners.max(0)) / 2
    assert middle == pytest.approx((-14, -10.5), abs=2)  # voxels 2 to 4 and 3 to 4
    assert "mean mask (1 = blurred out in every subject)" in texts(figure)
    assert any("blue contours: planted regions" in text for text in texts(figure))


def test_overlay_scale_is_given_or_the_largest_value(volume, monkeypatch):
    monkeypatch.setattr(figures, "CUTS", 2)
    for peak, vmax, top in ((0.3, 0.9, 0.9), (0.3, None, 0.3), (0, None, 1)):
        figure = figures.mask_overlay(volume, peak * volume, AFFINE, vmax=vmax, **HEAD)
        (ax, *_) = planes(figure, "z").values()
        assert ax.images[-1].get_clim() == pytest.approx((0, top))
        assert not any("planted" in text for text in texts(figure))
    with pytest.raises(ValueError, match=r"\(19,16,12\) \(20,16,12\)"):
        figures.mask_overlay(volume, volume[1:], AFFINE, **HEAD)


def test_explanations_are_drawn_to_their_own_scale_and_only_where_positive(volume):
    rng = np.random.default_rng(0)
    small = np.where(volume > 0, rng.uniform(0, 1e-3, SHAPE), 0)
    flat = np.zeros(SHAPE)
    flat[BLOB], flat[2:5, 3:5, 1:4] = 5, -9
    maps = {"small": small, "flat": flat, "zero": 0 * volume}
    figure = figures.explanation_maps(volume, maps, AFFINE, BLOB_MM, outlines=volume == 1, **HEAD)
    axes = [ax for ax in figure.axes if "z=-10" in texts(ax)]
    assert len(axes) == 3
    drawn = [ax.images[-1].get_array() for ax in axes]
    inside = small[volume > 0]
    floor, top = np.sort(inside)[[round(q * (inside.size - 1)) for q in (0.9, 0.9995)]]
    expected = np.clip((small[:, :, 2] - floor) / (top - floor), 0, 1)
    np.testing.assert_allclose(drawn[0], np.rot90(expected), atol=0.02)
    np.testing.assert_allclose(drawn[1], np.rot90(flat[:, :, 2] == 5))
    assert not drawn[2].any()
    assert {"small", "flat", "zero", "A title"} <= set(texts(figure))


def test_training_curves_draw_folds_and_their_mean():
    history = pd.DataFrame({"fold": [0, 0, 0, 1, 1, 1], "epoch": [1, 2, 3] * 2})
    history["train_loss"] = [0.7, 0.5, 0.1, 0.6, 0.3, 0.2]
    history["validation_loss"] = history["train_loss"] + 0.1
    history["train_accuracy"] = history["validation_accuracy"] = 1 - history["train_loss"]
    history = history[::-1]  # as processes that share the folds leave them
    single = history[history["fold"] == 1]
    figure = figures.training_curves({"3D": history, "2D": single}, **HEAD)
    above, _, below, _ = figure.axes
    means = {line.get_label(): line for line in above.lines}
    assert means["train"].get_xdata().tolist() == [1, 2, 3]
    assert means["train"].get_ydata() == pytest.approx([0.65, 0.4, 0.15])
    assert means["validation"].get_ydata() == pytest.approx([0.75, 0.5, 0.25])
    assert means["chance"].get_ydata() == pytest.approx([np.log(2)] * 2)
    means = {line.get_label(): line for line in below.lines}
    assert means["validation"].get_ydata() == pytest.approx([0.35, 0.6, 0.85])
    assert means["chance"].get_ydata() == pytest.approx([0.5] * 2)
    assert len(above.lines) == 2 * (2 + 1) + 1
    assert [ax.get_title() for ax in figure.axes[:2]] == ["3D", "2D"]
    assert {"loss (cross-entropy, nats)", "accuracy (share of subjects)"} <= set(texts(figure))


SCORES = pd.DataFrame(
    [
        ("SVM", "10-fold", 0.91, 0.95, 0.88, 0.96),
        ("KNN", "10-fold", 0.82, 0.86, 0.78, 0.9),
        ("SVM", "leave-one-out", 0.93, 0.97, 0.9, 0.95),
        ("KNN", "leave-one-out", 0.74, 0.78, 0.7, 0.79),
    ],
    columns=["classifier", "protocol", "accuracy", "auc", "low", "high"],
)


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
    assert len({(line.get_color(), line.get_marker()) for line in lines.values()}) == 2
    written = {text.get_text(): text.get_position()[1] for text in ax.texts}
    for line, (kind, rows) in zip(lines.values(), SCORES.groupby("protocol")):
        (bars,) = (
            c for c in ax.collections if to_hex(c.get_color()[0]) == to_hex(line.get_color())
        )
        segments = np.array(bars.get_segments())
        np.testing.assert_allclose(segments[:, :, 0], rows[["low", "high"]], err_msg=kind)
        np.testing.assert_allclose(segments[:, :, 1], line.get_ydata()[:, None] * [[1, 1]])
        assert [written[f"{x:.3f}"] for x in line.get_xdata()] == line.get_ydata().tolist()
    ax = dots(SCORES.drop(columns=["low", "high"])[:3], value="auc", label="AUC")
    assert labelled(ax)["leave-one-out"].get_xdata().tolist() == [0.97]
    assert not ax.collections
    assert ax.get_xlabel() == "AUC"


def test_dots_draw_folds_above_and_published_values_below_their_own():
    folds = pd.concat([SCORES.assign(accuracy=SCORES["accuracy"] + d) for d in (-0.01, 0.02)])
    rows = [("KNN", "10-fold", 0.8, 0.03), ("SVM", "leave-one-out", 0.9, np.nan)]
    rows += [("unknown", "10-fold", 0.7, np.nan)]
    published = pd.DataFrame(rows, columns=["classifier", "protocol", "accuracy", "sd"])
    ax = dots(folds=folds, published=published)
    height = {
        (row, kind): y
        for kind, line in labelled(ax).items()
        for row, y in zip(("SVM", "KNN"), line.get_ydata())
    }
    small = [line for line in ax.lines if line.get_marker() == "."]
    assert small[0].get_xdata() == pytest.approx([0.90, 0.81, 0.93, 0.84])
    assert (small[0].get_ydata()[:2] < [height["SVM", "10-fold"], height["KNN", "10-fold"]]).all()
    points, _, (spreads,) = ax.containers[0].lines
    assert points.get_xdata()[:2].tolist() == [0.8, 0.9]
    assert 0 < points.get_ydata()[0] - height["KNN", "10-fold"] < 0.2  # ylim falls: beneath
    assert 0 < points.get_ydata()[1] - height["SVM", "leave-one-out"] < 0.2
    assert np.isnan(points.get_ydata()[2])  # no such row
    assert spreads.get_segments()[0][:, 0] == pytest.approx((0.77, 0.83))


def test_dots_refuse_more_kinds_than_there_are_colours():
    most = pd.DataFrame({"classifier": "SVM", "protocol": list("abcdefgh"), "accuracy": 0.7})
    assert len({line.get_color() for line in labelled(dots(most)).values()}) == 8
    with pytest.raises(ValueError, match="protocol: expected at most 8 kinds, found 9"):
        dots(pd.concat([most, most[:1].assign(protocol="i")]))


class Toy(nn.Module):
    """Make a network unlike the study's: other names and layers, a part without parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.shape = (9, 13, 11)
        self.stem = nn.Sequential(nn.Conv3d(1, 4, (3, 5, 3)), nn.BatchNorm3d(4), nn.ReLU())
        self.shrink = nn.AvgPool3d(2)
        self.head = nn.Sequential(nn.Linear(4 * 3 * 4 * 4, 6), nn.ReLU(), nn.Linear(6, 2))
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, volumes: torch.Tensor) -> torch.Tensor:
        return self.scale * self.head(self.shrink(self.stem(volumes)).flatten(1))


def test_diagram_has_sizes_and_parameters_and_leaves_the_network_as_it_was():
    network = Toy().train()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    figure = figures.network_diagram(network, title="A toy")
    written = " | ".join(texts(figure)).replace("\n", " ").replace("  ", " ")
    stem, head = 4 * 3 * 5 * 3 + 4 + 2 * 4, 192 * 6 + 6 + 6 * 2 + 2
    for expected in (
        f"4 × 7 × 9 × 9 stem {stem} parameters",  # less 2, 4, 2
        "4 × 3 × 4 × 4 shrink",  # halved, rounded down
        f"2 head {head:,} parameters",
        "Conv3d (3, 5, 3) BatchNorm3d ReLU",
        "Linear ReLU Linear",
        f"{stem + head + 1:,} parameters in all",
    ):
        assert expected in written
    assert all(module.training for module in network.modules())
    assert not any(module._forward_hooks for module in network.modules())
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
