"""Figures: what lies right, in front or above is drawn there, and what is written is true."""

import base64
import json
import re
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path

import matplotlib
import numpy as np
import pandas as pd
import pytest
import torch
from matplotlib import pyplot as plt
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.text import Text
from torch import nn

from brainsex import architecture, figures, networks, pages

matplotlib.use("Agg")

AFFINE = np.array([[2.0, 0, 0, -20], [0, 3, 0, -21], [0, 0, 4, -18], [0, 0, 0, 1]])
SHAPE = (20, 16, 12)
BLOB = (15, 12, 2)  # right, anterior, inferior
BLOB_MM = np.array([10.0, 15.0, -10.0])
HEAD = {"title": "A title", "cohort": "synthetic cohort, n=7"}


@pytest.fixture
def volume():
    """A dim block, three unequal axes, with one bright blob to the right, in front and below."""
    volume = np.zeros(SHAPE, np.float32)
    volume[1:-1, 1:-1, 1:-1] = 0.2
    volume[14:17, 11:14, 1:4] = 1
    return volume


def texts(figure):
    return [text.get_text() for text in figure.findobj(Text) if text.get_text()]


def pixels(figure):
    """The figure as it is saved: (rows, columns, RGB) in [0, 1], first row at the bottom."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[::-1, :, :3] / 255


def found(figure, ax, match):
    """Centre (x, y) in pixels of the saved picture of those in `ax` that `match`."""
    picture = pixels(figure)
    inside = np.zeros(picture.shape[:2], bool)
    left, bottom, right, top = ax.get_window_extent().extents.astype(int)
    inside[bottom:top, left:right] = True
    for text in ax.texts:  # the letters are as bright as the blob
        left, bottom, right, top = text.get_window_extent().extents.astype(int)
        inside[bottom - 2 : top + 3, left - 2 : right + 3] = False
    rows, columns = np.nonzero(match(picture) & inside)
    assert len(rows)
    return np.array([columns.mean(), rows.mean()])


def nearer(ax, spot, letters):
    """Whether `spot` is on the side of the first letter rather than on that of the second."""
    at = {text.get_text(): text.get_window_extent() for text in ax.texts}
    first, second = (np.mean([at[letter].min, at[letter].max], axis=0) for letter in letters)
    along = first - second
    return (spot - (first + second) / 2) @ along > 0.1 * along @ along


def white(picture):
    return picture.min(-1) > 0.9


def hot(picture):
    return (picture[..., 0] > 0.6) & (picture[..., 2] < 0.4)


@pytest.mark.parametrize(
    ("plane", "sides"), [(0, ["AP", "IS"]), (1, ["RL", "IS"]), (2, ["RL", "AP"])]
)
def test_slices_show_each_end_where_its_letter_is(monkeypatch, volume, plane, sides):
    monkeypatch.setattr(figures, "centre", lambda volume, affine: BLOB_MM)
    figure = figures.slices({"one": (volume, AFFINE)}, **HEAD)
    ax = figure.axes[plane]
    spot = found(figure, ax, white)
    assert all(nearer(ax, spot, letters) for letters in sides)
    left, right = {"AP": "PA", "RL": "LR"}[sides[0]]
    centres = {text.get_text(): text.get_window_extent().x0 for text in ax.texts}
    assert centres[left] < centres[right]


def test_slices_draw_two_grids_to_one_scale(volume):
    # The same head on a grid of half the resolution, its first voxel over eight of the other's
    coarse = volume.reshape(10, 2, 8, 2, 6, 2).mean((1, 3, 5))
    affine = AFFINE @ np.diag([2, 2, 2, 1])
    affine[:3, 3] = (AFFINE @ [0.5, 0.5, 0.5, 1])[:3]
    figure = figures.slices({"fine": (volume, AFFINE), "coarse": (coarse, affine)}, **HEAD)
    pixels(figure)
    for above, below in zip(figure.axes[:3], figure.axes[3:6]):
        assert above.get_xlim() == below.get_xlim()
        assert above.get_ylim() == below.get_ylim()
        assert above.images[0].get_extent() == pytest.approx(below.images[0].get_extent())
    scales = [
        ax.get_window_extent().size / np.abs([np.diff(ax.get_xlim())[0], np.diff(ax.get_ylim())[0]])
        for ax in figure.axes[:6]
    ]
    assert np.ptp(scales) < 0.02 * np.mean(scales)
    assert "fine\n20 × 16 × 12 voxels\n2 × 3 × 4 mm" in texts(figure)
    assert "coarse\n10 × 8 × 6 voxels\n4 × 6 × 8 mm" in texts(figure)


def test_slices_leave_room_for_the_largest_head(volume):
    small = np.zeros(SHAPE)
    small[8:12, 6:10, 4:8] = 1
    figure = figures.slices({"small": (small, AFFINE), "large": (volume, AFFINE)}, **HEAD)
    (left, right), (back, front) = figure.axes[5].get_xlim(), figure.axes[5].get_ylim()
    # Voxels 1 to 18 and 1 to 14 are not empty, to their edges
    assert left < -20 + 2 * 0.5 < -20 + 2 * 18.5 < right
    assert back < -21 + 3 * 0.5 < -21 + 3 * 14.5 < front


def test_slices_go_through_the_centre_of_mass(volume):
    figure = figures.slices({"one": (volume, AFFINE)}, **HEAD)
    weights = volume / volume.sum(dtype=np.float64)
    voxel = [(weights * index).sum() for index in np.indices(SHAPE)]
    for name, at in zip("xyz", AFFINE[:3] @ [*voxel, 1]):
        assert f"{name} = {at:.0f} mm".replace("-", "−") in texts(figure)


@pytest.mark.parametrize(
    ("affine", "at", "message"),
    [
        (AFFINE @ np.diag([-1, 1, 1, 1]), (0, 0, 0), "expected a volume in RAS, found LAS"),
        (AFFINE, (0, 0, 200), "outside"),
        (AFFINE, (-25, 0, 0), "outside"),
    ],
)
def test_slices_refuse_what_they_would_draw_wrongly(monkeypatch, volume, affine, at, message):
    monkeypatch.setattr(figures, "centre", lambda volume, affine: at)
    with pytest.raises(ValueError, match=message):
        figures.slices({"one": (volume, affine)}, **HEAD)


def test_overlay_shows_the_mask_where_it_is(monkeypatch, volume):
    monkeypatch.setattr(figures, "COLUMNS", 3)
    saliency = np.zeros(SHAPE)
    saliency[BLOB] = 0.8
    figure = figures.overlay(0.2 * (volume > 0), saliency, AFFINE, **HEAD)
    planes = [("z", 2, ["RL", "AP"]), ("y", 1, ["RL", "IS"]), ("x", 0, ["AP", "IS"])]
    for row, (name, axis, sides) in enumerate(planes):
        place = f"{name} = {BLOB_MM[axis]:.0f} mm".replace("-", "−")
        (ax,) = (
            ax
            for ax in figure.axes[3 * row : 3 * row + 3]
            if place in [text.get_text() for text in ax.texts]
        )
        spot = found(figure, ax, hot)
        assert all(nearer(ax, spot, letters) for letters in sides)
        assert ax.images[1].get_clim() == (0, 0.8)
    assert "saliency (share of evidence removed)" in texts(figure)
    assert "synthetic cohort, n=7" in texts(figure)


def test_overlay_outlines_each_region_at_its_place_in_mm(monkeypatch, volume):
    monkeypatch.setattr(figures, "COLUMNS", 3)
    outlines = np.zeros(SHAPE, int)
    outlines[14:17, 11:14, 1:4] = 1
    outlines[2:5, 3:5, 1:4] = 2
    figure = figures.overlay(volume, 0 * volume, AFFINE, outlines=outlines, **HEAD)
    ax = figure.axes[0]  # axial
    boxes = [contour.get_paths()[0].get_extents() for contour in ax.collections]
    assert [(box.x0, box.y0, box.x1, box.y1) for box in boxes] == [
        pytest.approx((7, 10.5, 13, 19.5)),  # half a voxel beyond the outermost centres
        pytest.approx((-17, -13.5, -11, -7.5)),
    ]
    assert "synthetic cohort, n=7 · blue contours: planted regions" in texts(figure)


def test_overlay_cuts_where_mask_and_regions_lie(monkeypatch, volume):
    monkeypatch.setattr(figures, "COLUMNS", 4)
    saliency, outlines = np.zeros(SHAPE), np.zeros(SHAPE, bool)
    saliency[:, :, 8] = 0.01
    outlines[3, 3, 3] = True
    figure = figures.overlay(volume, saliency, AFFINE, outlines=outlines, **HEAD)
    places = [next(t for t in texts_of(ax) if t[:3] == "z =") for ax in figure.axes[:4]]
    assert len(set(places)) == 4
    assert {"z = 14 mm", "z = −6 mm"} <= set(places)  # indices 8 and 3


def texts_of(ax):
    return [text.get_text() for text in ax.texts]


def test_overlay_scale_is_given_or_found(monkeypatch, volume):
    monkeypatch.setattr(figures, "COLUMNS", 2)
    given = figures.overlay(volume, 0.3 * volume, AFFINE, vmax=0.9, **HEAD)
    assert given.axes[0].images[1].get_clim() == (0, 0.9)
    nothing = figures.overlay(volume, 0 * volume, AFFINE, **HEAD)
    assert nothing.axes[0].images[1].get_clim() == (0, 1)


def test_overlay_refuses_another_grid(volume):
    with pytest.raises(ValueError, match=r"on one grid; found \(20, 16, 12\), \(19, 16, 12\)"):
        figures.overlay(volume, volume[1:], AFFINE, **HEAD)


def test_curves_mean_the_folds():
    loss = {0: [0.7, 0.5, 0.1], 1: [0.6, 0.3, 0.2]}
    rows = [
        {"fold": fold, "epoch": epoch, "train_loss": value, "validation_loss": value + 0.1}
        | {"train_accuracy": 1 - value, "validation_accuracy": 0.9 - value}
        for fold, values in loss.items()
        for epoch, value in enumerate(values, 1)
    ]
    # Out of order, as processes that share the folds leave them
    figure = figures.curves(pd.DataFrame(rows[::-1]), **HEAD)
    left, right = figure.axes
    means = {line.get_label(): line for line in left.lines}
    assert means["train"].get_xdata().tolist() == [1, 2, 3]
    assert means["train"].get_ydata() == pytest.approx([0.65, 0.4, 0.15])
    assert means["validation"].get_ydata() == pytest.approx([0.75, 0.5, 0.25])
    assert means["chance"].get_ydata() == pytest.approx([np.log(2)] * 2)
    means = {line.get_label(): line for line in right.lines}
    assert means["validation"].get_ydata() == pytest.approx([0.25, 0.5, 0.75])
    assert means["chance"].get_ydata() == pytest.approx([0.5] * 2)
    assert len(left.lines) == 2 * (2 + 1) + 1
    assert "synthetic cohort, n=7 · thin: each of 2 folds, bold: their mean" in texts(figure)


def test_fold_accuracies_stand_beside_their_own_model():
    table = pd.DataFrame(
        {"model": ["CNN", "CNN", "SVM"], "fold": [0, 1, 0], "accuracy": [0.8, 1.0, 0.7]}
    )
    intervals = {"SVM": (0.7, 0.6, 0.75, "Wilson, 95 %"), "CNN": (0.9, 0.85, 0.95, "t, 95 %")}
    figure = figures.fold_accuracies(table, intervals, published={"CNN": (0.92, 0.03)}, **HEAD)
    (ax,) = figure.axes
    assert [tick.get_text() for tick in ax.get_yticklabels()] == ["SVM", "CNN"]
    spots = [(x, y) for line in ax.lines for x, y in zip(line.get_xdata(), line.get_ydata())]
    near = {row: sorted(x for x, y in spots if abs(y - row) < 0.5 and x != 0.5) for row in (0, 1)}
    assert near[0] == pytest.approx([0.6, 0.7, 0.7, 0.75])
    assert near[1] == pytest.approx([0.8, 0.85, 0.9, 0.92, 0.95, 1.0])
    bars = [segment for bar in ax.collections for segment in bar.get_segments()]
    assert [segment[:, 0].tolist() for segment in bars] == [
        pytest.approx(ends) for ends in ([0.6, 0.75], [0.85, 0.95], [0.89, 0.95])
    ]
    assert "0.900  [0.850, 0.950]\nt, 95 %" in texts(figure)
    assert "0.700  [0.600, 0.750]\nWilson, 95 %" in texts(figure)
    assert any("published mean ± standard deviation" in text for text in texts(figure))
    plain = figures.fold_accuracies(table, intervals, **HEAD)
    assert not any("published" in text for text in texts(plain))


class Toy(nn.Module):
    """Not the study's network: other names, other layers, a module used without parameters."""

    def __init__(self, broken=False):
        super().__init__()
        self.shape, self.broken = (9, 13, 11), broken
        self.stem = nn.Sequential(nn.Conv3d(1, 4, (3, 5, 3)), nn.BatchNorm3d(4), nn.ReLU())
        self.shrink = nn.AvgPool3d(2)
        self.head = nn.Sequential(nn.Linear(4 * 3 * 4 * 4, 6), nn.ReLU(), nn.Linear(6, 2))
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, volumes):
        features = self.shrink(self.stem(volumes)).flatten(1)
        if self.broken:
            raise RuntimeError("broken")
        return self.scale * self.head(features)


def test_architecture_says_what_the_network_is():
    written = texts(architecture.draw(Toy(), title="A toy"))
    # 9×13×11 less 2, 4, 2; halved, rounded down; flattened
    for size in ("1 × 9 × 13 × 11", "4 × 7 × 9 × 9", "4 × 3 × 4 × 4", "192", "6", "2"):
        assert size in written
    stem, head = 4 * 3 * 5 * 3 + 4 + 2 * 4, 192 * 6 + 6 + 6 * 2 + 2
    assert f"{stem:,} parameters" in written
    assert f"{head:,} parameters" in written
    assert any(text.endswith(f"{stem + head + 1:,} parameters in all") for text in written)
    assert {"input", "stem", "shrink", "head", "A toy"} <= set(written)
    assert {"Conv3d 3×5×3\nBatchNorm3d\nReLU", "AvgPool3d 2", "flatten", "Linear\nReLU"} <= set(
        written
    )


def test_architecture_of_the_study():
    written = texts(architecture.draw(networks.MriNet3d(), title="CNN"))
    for size in ("32 × 56 × 68 × 56", "64 × 13 × 16 × 13", "128 × 5 × 7 × 5", "22,400"):
        assert size in written
    assert any("322,818 parameters in all" in text for text in written)


@pytest.mark.parametrize("broken", [False, True])
def test_architecture_leaves_the_network_as_it_was(broken):
    network = Toy(broken).train()
    network.stem[1].eval()  # a frozen batch norm stays frozen
    before = {name: value.clone() for name, value in network.state_dict().items()}
    modes = [module.training for module in network.modules()]
    try:
        architecture.draw(network, title="A toy")
    except RuntimeError:
        assert broken
    assert [module.training for module in network.modules()] == modes
    assert not any(module._forward_hooks for module in network.modules())
    for name, value in network.state_dict().items():
        assert torch.equal(value, before[name])


CENTRE, RADIUS = np.array([3.0, -5.0, 7.0]), 12.0
TURN = np.array([[0.8, -0.6, 0], [0.6, 0.8, 0], [0, 0, 1]])
AFFINES = {
    "RAS": np.diag([1.0, 1.5, 2.0]),
    "LAS": np.diag([-1.0, 1.5, 2.0]),
    "LPS": np.diag([-1.0, -1.5, 2.0]),
    "axes swapped": np.array([[0, 1.5, 0], [1.0, 0, 0], [0, 0, 2.0]]),
    "oblique": TURN @ np.diag([1.0, 1.5, 2.0]),
}


def ball(linear, shape=(48, 34, 26)):
    """A ball of RADIUS mm around CENTRE: volume that falls to 0.5 at its surface, and affine."""
    affine = np.eye(4)
    affine[:3, :3] = linear
    affine[:3, 3] = CENTRE - linear @ (np.array(shape) / 2 - 0.3)
    at = np.einsum("ij,jxyz->ixyz", linear, np.indices(shape)) + affine[:3, 3, None, None, None]
    distance = np.linalg.norm(at - CENTRE[:, None, None, None], axis=0)
    return np.clip(1 - distance / (2 * RADIUS), 0, None), affine


def signed_volume(mesh):
    """By the divergence theorem: positive where the triangles look outwards."""
    a, b, c = mesh.vertices.astype(np.float64)[mesh.faces].transpose(1, 0, 2)
    return (a * np.cross(b, c)).sum() / 6


def is_closed(mesh):
    """Every edge belongs to two triangles, which run along it in opposite directions."""
    edges = Counter(
        (int(face[k]), int(face[k - 1])) for face in mesh.faces.tolist() for k in range(3)
    )
    return all(edges[end, start] == count == 1 for (start, end), count in edges.items())


@pytest.mark.parametrize("linear", AFFINES.values(), ids=AFFINES)
def test_surface_is_the_ball_in_mm(linear):
    volume, affine = ball(linear)
    mesh = pages.surface(volume, affine, 0.5, smooth=0)
    assert (mesh.vertices.dtype, mesh.faces.dtype) == (np.float32, np.int32)
    assert signed_volume(mesh) == pytest.approx(4 / 3 * np.pi * RADIUS**3, rel=0.03)
    assert np.linalg.norm(mesh.vertices - CENTRE, axis=1) == pytest.approx(RADIUS, abs=0.3)
    assert mesh.vertices.mean(0) == pytest.approx(CENTRE, abs=0.1)
    assert is_closed(mesh)


def test_surface_closes_at_the_edge():
    mesh = pages.surface(np.ones((6, 7, 8)), AFFINE, 0.5, smooth=0)
    assert is_closed(mesh)
    low, high = (AFFINE @ [*[-0.5] * 3, 1])[:3], (AFFINE @ [5.5, 6.5, 7.5, 1])[:3]
    assert mesh.vertices.min(0) == pytest.approx(low)
    assert mesh.vertices.max(0) == pytest.approx(high)


def test_surface_smooths_and_stays_in_place():
    volume, affine = ball(AFFINES["RAS"])
    rough = (volume > 0.5) * 1.0
    smooth, raw = (pages.surface(rough, affine, 0.5, smooth=sigma) for sigma in (1, 0))
    spread = [np.linalg.norm(mesh.vertices - CENTRE, axis=1).std() for mesh in (smooth, raw)]
    assert spread[0] < 0.6 * spread[1]
    assert smooth.vertices.mean(0) == pytest.approx(CENTRE, abs=0.3)


def test_surface_keeps_to_the_number_of_triangles():
    volume, affine = ball(AFFINES["RAS"])
    full = pages.surface(volume, affine, 0.5)
    for limit in (len(full.faces) - 1, 500):
        mesh = pages.surface(volume, affine, 0.5, max_faces=limit)
        assert len(mesh.faces) <= limit
        assert is_closed(mesh)
        assert signed_volume(mesh) == pytest.approx(signed_volume(full), rel=0.15)


@pytest.mark.parametrize("level", [0, 2, -1])
def test_surface_needs_a_level_that_is_passed(level):
    with pytest.raises(ValueError, match=rf"no surface at {level}: expected a level in \(0, 1\)"):
        pages.surface(np.ones((4, 5, 6)), AFFINE, level, smooth=0)


@pytest.fixture(scope="module")
def meshes():
    """A ball in a pale box, to the right, in front and above the box's middle."""
    box = np.zeros((30, 36, 28))
    box[2:-2, 2:-2, 2:-2] = 1
    inner = np.zeros(box.shape)
    inner[20:25, 25:30, 18:23] = 1
    affine = np.diag([2.0, 2, 2, 1])
    return {
        "box": (pages.surface(box, affine, 0.5), "#999999", 0.2),
        "ball": (pages.surface(inner, affine, 0.5), "#D55E00", 1.0),
    }


@pytest.mark.parametrize(
    ("view", "sides"), [(0, ["AP", "SI"]), (1, ["RL", "SI"]), (2, ["RL", "AP"])]
)
def test_preview_shows_the_mask_where_its_letters_are(meshes, view, sides):
    figure = pages.preview(meshes, **HEAD)
    ax = figure.axes[view]
    spot = found(figure, ax, hot)  # seen through the box
    assert all(nearer(ax, spot, letters) for letters in sides)
    left, right = [("A", "P"), ("R", "L"), ("L", "R")][view]
    at = {text.get_text(): text.get_window_extent() for text in ax.texts}
    assert at[left].x0 < at[right].x0
    assert {"A title", "synthetic cohort, n=7", "box", "ball"} <= set(texts(figure))


def test_preview_hides_what_is_behind():
    shape = (40, 20, 20)
    left, right = np.zeros(shape), np.zeros(shape)
    left[5:11, 7:13, 7:13], right[28:34, 7:13, 7:13] = 1, 1
    affine = np.eye(4)
    meshes = {
        "left": (pages.surface(left, affine, 0.5), "#0000FF", 1.0),
        "right": (pages.surface(right, affine, 0.5), "#FF0000", 1.0),
    }
    for order in (list(meshes), list(meshes)[::-1]):
        figure = pages.preview({name: meshes[name] for name in order}, **HEAD)
        seen = figure.axes[0].images[0].get_array()
        red, blue = seen[..., 0] - seen[..., 2] > 0.3, seen[..., 2] - seen[..., 0] > 0.3
        assert blue.sum() > 1000
        assert not red.any()


def test_preview_hides_what_is_behind_within_one_mesh():
    volume, affine = ball(AFFINES["RAS"])
    wall = np.zeros((4, 40, 40))
    wall[1:3, 5:-5, 5:-5] = 1
    behind = np.array([[1, 0, 0, 40], [0, 1, 0, -25], [0, 0, 1, -13], [0, 0, 0, 1]])
    near, far = pages.surface(volume, affine, 0.5), pages.surface(wall, behind, 0.5, smooth=0)
    both = pages.Mesh(
        np.concatenate([near.vertices, far.vertices]),
        np.concatenate([near.faces, far.faces + len(near.vertices)]),
    )
    apart = {"near": (near, "#999999", 1.0), "far": (far, "#999999", 1.0)}
    one, two = (
        pages.preview(meshes, **HEAD).axes[0].images[0].get_array()
        for meshes in (apart, {"both": (both, "#999999", 1.0)})
    )
    assert np.abs(one - two).mean() < 0.002


def test_preview_is_lit_from_the_upper_left():
    volume, affine = ball(AFFINES["RAS"])
    figure = pages.preview({"ball": (pages.surface(volume, affine, 0.5), "#FFFFFF", 1)}, **HEAD)
    seen = figure.axes[0].images[0].get_array()[..., 0]
    rows, columns = np.nonzero(seen < 1)
    middle = (rows.min() + rows.max()) // 2, (columns.min() + columns.max()) // 2
    step = (rows.max() - rows.min()) // 4
    upper_left = seen[middle[0] + step, middle[1] - step]  # the picture's first row is its lowest
    lower_right = seen[middle[0] - step, middle[1] + step]
    assert upper_left > lower_right + 0.2
    # No pixel is left out within the disc
    inside = np.hypot(*(np.indices(seen.shape) - np.reshape(middle, (2, 1, 1)))) < 1.9 * step
    assert (seen[inside] < 1).all()


class Tags(HTMLParser):
    """The names of a page's tags, and what they would load (scripts' text is not looked into)."""

    def __init__(self):
        super().__init__()
        self.names, self.sources = [], []

    def handle_starttag(self, tag, attrs):
        self.names.append(tag)
        self.sources += [value for key, value in attrs if key in ("src", "href", "srcset", "data")]


def scene(path):
    return json.loads(re.search(r"const \{meshes, ends\} = (.*), main = ", path.read_text())[1])


def test_page_holds_the_meshes_and_asks_for_nothing(meshes, tmp_path):
    path = tmp_path / "new" / "mask.html"
    pages.page(path, meshes, title="A mask", caption="synthetic cohort, n=7")
    text = path.read_text()
    assert path.stat().st_size < 4e6
    assert [file.name for file in path.parent.iterdir()] == ["mask.html"]
    tags = Tags()
    tags.feed(text)
    assert {"script", "style", "noscript"} <= set(tags.names)
    assert tags.sources == ["data:,"]
    assert "default-src 'none'" in text
    assert "<title>A mask</title>" in text
    assert "synthetic cohort, n=7" in text
    held = scene(path)
    for name, mesh in zip(meshes, held["meshes"]):
        expected, colour, opacity = meshes[name]
        assert (mesh["name"], mesh["color"], mesh["opacity"]) == (name, colour, opacity)
        for field, kind in (("vertices", "<f4"), ("faces", "<i4")):
            columns = np.frombuffer(base64.b64decode(mesh[field]), kind).reshape(3, -1)
            assert np.array_equal(columns.T, getattr(expected, field))
    corners = np.concatenate([mesh.vertices for mesh, *_ in meshes.values()])
    left, right, back, front, below, above = np.array(held["ends"])
    assert left[0] < corners[:, 0].min() < corners[:, 0].max() < right[0]
    assert back[1] < corners[:, 1].min() < corners[:, 1].max() < front[1]
    assert below[2] < corners[:, 2].min() < corners[:, 2].max() < above[2]


def test_page_escapes_what_it_is_given(meshes, tmp_path):
    path = tmp_path / "mask.html"
    nasty = "</script><b>\"&'@SCENE@"
    named = {nasty: meshes["ball"]}
    pages.page(path, named, title=nasty, caption=nasty)
    text = path.read_text()
    assert text.count("</script>") == 2
    assert "<b>" not in text
    assert "<title>&lt;/script&gt;&lt;b&gt;&quot;&amp;&#x27;@SCENE@</title>" in text
    assert scene(path)["meshes"][0]["name"] == nasty


def test_page_is_never_too_large_nor_half_written(meshes, tmp_path):
    mesh, colour, opacity = meshes["ball"]
    large = pages.Mesh(np.tile(mesh.vertices, (9000, 1)), mesh.faces)
    with pytest.raises(ValueError, match=r"MB, 4 at most; lower max_faces"):
        pages.page(tmp_path / "a.html", {"large": (large, colour, opacity)}, title="", caption="")
    assert not list(tmp_path.iterdir())


def test_page_says_when_plotly_is_not_there(meshes, tmp_path, monkeypatch):
    monkeypatch.setattr(pages.nilearn, "__file__", str(tmp_path / "nilearn" / "__init__.py"))
    with pytest.raises(FileNotFoundError, match=r"plotly-gl3d\*\.min\.js"):
        pages.page(tmp_path / "a.html", meshes, title="", caption="")


def test_figures_are_handed_over_and_forgotten(volume, tmp_path):
    figure = figures.slices({"one": (volume, AFFINE)}, **HEAD)
    assert not plt.get_fignums()
    assert {"A title", "synthetic cohort, n=7", "FA"} <= set(texts(figure))
    figure.savefig(tmp_path / "a.png")
    assert Path(tmp_path / "a.png").stat().st_size > 5000
