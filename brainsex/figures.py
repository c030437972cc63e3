"""The drawings more than one notebook makes: matplotlib figures, and 3D pages that work offline.

Volumes are (X, Y, Z) in RAS with a 4×4 affine to mm; the left of the brain is on the left of the
picture. Figures are returned for the caller to save; `title` stands at their head and `cohort`, the
cohort's name and n ("synthetic cohort, n=200"), at their foot. `meshes` are a dict
name -> (Mesh, colour, opacity).
"""

import html
import itertools
import json
import re
from base64 import b64encode
from dataclasses import dataclass
from functools import partial
from math import prod
from pathlib import Path

import nilearn
import numpy as np
import torch
from matplotlib import pyplot as plt
from matplotlib.collections import PolyCollection
from matplotlib.colors import ListedColormap, to_rgb
from matplotlib.patches import Patch
from nibabel import aff2axcodes
from nibabel.affines import apply_affine, voxel_sizes
from scipy.ndimage import center_of_mass, gaussian_filter
from skimage.measure import marching_cubes

from brainsex import replacing

PALETTE = {"women": "#D55E00", "men": "#0072B2"}
"""The sexes' colours, of Okabe and Ito's set for colour-blind readers."""

ACCENT, OUTLINE, PALE, DARK = "#009E73", "#56B4E9", "#999999", "#222222"
ENDS = "LRPAIS"  # the low and the high end of X, Y, Z
WAYS = dict(zip(ENDS, [sign * axis for axis in np.eye(3) for sign in (-1, 1)]))
VIEWS = {"left": "PS", "front": "LS", "top": "RA"}  # what lies to the right, and up
LIGHT = np.array([-0.35, 0.45, 0.82])  # towards the light: right, up, to the viewer
GLOW = plt.get_cmap("inferno")(np.linspace(0.35, 0.97, 256))
GLOW[:, 3] = np.linspace(0, 1, 256)
STYLE = plt.rc_context(
    {"font.family": "sans-serif", "font.size": 9, "axes.titlesize": 9, "text.color": DARK}
    | {"axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False}
)


@STYLE
def slices(panels, *, title, cohort, at=None):
    """Sagittal, coronal and axial slices through one point, a row a volume, all to one scale.

    Parameters
    ----------
    panels : dict
        Label -> (FA (X, Y, Z), affine); the grids may differ.
    at : (x, y, z), optional
        Point in mm; the first volume's centre of mass by default.
    """
    volume, affine = next(iter(panels.values()))
    at = apply_affine(affine, center_of_mass(volume)) if at is None else at
    boxes = np.array([_box(*panel) for panel in panels.values()])
    low, high = boxes[:, 0].min(0), boxes[:, 1].max(0)
    widths, height = (high - low)[[1, 0, 0]], max((high - low)[1:])
    figure, axes = _grid([height] * len(panels), widths, 7 / sum(widths))
    for row, (label, (volume, affine)) in zip(axes, panels.items()):
        shape = " × ".join(map(str, volume.shape))
        sizes = " × ".join(f"{size:.4g}" for size in voxel_sizes(affine))
        row[0].set_ylabel(f"{label}\n{shape} voxels\n{sizes} mm")
        for axis, ax in enumerate(row):
            picture = _slice(ax, volume, affine, axis, at, cmap="gray", vmin=0, vmax=1)
            _frame(ax, axis, at, (low + high) / 2, (widths[axis], height))
    figure.colorbar(picture, ax=axes, label="FA", shrink=0.6, aspect=30, pad=0.02)
    return _finish(figure, title, cohort)


@STYLE
def overlay(background, saliency, affine, *, title, cohort, outlines=None, vmax=None, n_slices=7):
    """Mosaics of a mean mask over the mean FA, cut where the mask and the outlined regions lie.

    Parameters
    ----------
    background, saliency : (X, Y, Z) arrays
        Mean FA; mean mask in [0, 1], 1 where all the evidence was removed.
    outlines : (X, Y, Z) bool or int array, optional
        Planted regions: each value but 0 is drawn as a contour.
    vmax : float, optional
        Saliency at the top of the colour bar; its largest value by default.
    """
    outlines = np.zeros(background.shape, int) if outlines is None else np.asarray(outlines, int)
    if not background.shape == saliency.shape == outlines.shape:
        found = f"{background.shape}, {saliency.shape}, {outlines.shape}"
        raise ValueError(f"background, saliency and outlines must be on one grid; found {found}")
    weight = saliency / (saliency.sum() or 1) + (outlines != 0) / ((outlines != 0).sum() or 1)
    low, high = _box(background, affine)
    heights, width = (high - low)[[1, 2, 2]], max((high - low)[:2])
    figure, axes = _grid(heights, [width] * n_slices, 11 / width / n_slices)
    grey = {"cmap": "gray", "vmin": 0, "vmax": np.percentile(background[background > 0], 99.5)}
    glow = {"cmap": ListedColormap(GLOW), "vmin": 0, "vmax": vmax or saliency.max() or 1}
    for row, axis, height in zip(axes, (2, 1, 0), heights):
        for ax, index in zip(row, _telling(weight if weight.any() else background, axis, n_slices)):
            at = apply_affine(affine, [index] * 3)
            _slice(ax, background, affine, axis, at, **grey)
            picture = _slice(ax, saliency, affine, axis, at, interpolation="bilinear", **glow)
            cut, extent = np.take(outlines, index, axis).T, picture.get_extent()
            for region in np.setdiff1d(cut, 0):
                look = {"origin": "lower", "colors": OUTLINE, "linewidths": 0.9}
                ax.contour(cut == region, [0.5], extent=extent, **look)
            _frame(ax, axis, at, (low + high) / 2, (width, height))
    label = "saliency (share of evidence removed)"
    bar = figure.colorbar(picture, ax=axes, label=label, shrink=0.6, aspect=30, pad=0.01)
    bar.ax.set_facecolor("#444444")
    foot = f"{cohort} · blue contours: planted regions" if outlines.any() else cohort
    return _finish(figure, title, foot)


@STYLE
def curves(history, *, title, cohort):
    """Loss and accuracy over epochs, each fold thin and their mean bold.

    Parameters
    ----------
    history : DataFrame
        Columns fold, epoch, train_loss, validation_loss, train_accuracy, validation_accuracy.
    """
    figure, axes = _open(1, 2, figsize=(8.4, 3.4))
    for ax, measure, chance in zip(axes, ("loss", "accuracy"), (np.log(2), 0.5)):
        for part, colour in (("train", PALE), ("validation", ACCENT)):
            table = history.pivot(index="epoch", columns="fold", values=f"{part}_{measure}")
            ax.plot(table, color=colour, linewidth=0.7, alpha=0.5)
            ax.plot(table.mean(axis=1), color=colour, linewidth=2.2, label=part)
        ax.axhline(chance, color=DARK, linewidth=0.9, linestyle=":", label="chance")
    axes[0].set(xlabel="epoch", ylabel="loss (cross-entropy, nats)", ylim=(0, None))
    axes[1].set(xlabel="epoch", ylabel="accuracy (share of subjects)", ylim=(None, 1.01))
    axes[0].legend()
    folds = history["fold"].nunique()
    return _finish(figure, title, f"{cohort} · thin: each of {folds} folds, bold: their mean")


@STYLE
def fold_accuracies(table, intervals, *, title, cohort, published=None):
    """Accuracy of every fold, the mean and its interval, beside published values.

    Parameters
    ----------
    table : DataFrame
        Columns model, fold, accuracy (share of subjects).
    intervals : dict
        Model -> (mean, low, high, name of the interval).
    published : dict, optional
        Model -> (mean, standard deviation).
    """
    figure, ax = _open(1, 1, figsize=(8.4, 1.2 + 0.7 * len(intervals)))
    for row, (model, (mean, low, high, name)) in enumerate(intervals.items()):
        folds = table.loc[table["model"] == model, "accuracy"]
        ax.plot(folds, row - np.linspace(0.14, 0.3, len(folds)), "o", color=ACCENT, ms=4, alpha=0.6)
        ax.errorbar(mean, row, xerr=[[mean - low], [high - mean]], fmt="o", color=DARK, capsize=3)
        note = f"{mean:.3f}  [{low:.3f}, {high:.3f}]\n{name}"
        ax.text(1.02, row, note, transform=ax.get_yaxis_transform(), va="center", fontsize=8)
    for model, (mean, deviation) in (published or {}).items():
        row = list(intervals).index(model) + 0.22
        ax.errorbar(mean, row, xerr=deviation, fmt="D", color=PALE, ms=5)
    ax.axvline(0.5, color=DARK, linewidth=0.9, linestyle=":")
    ax.set(xlabel="accuracy (share of subjects)", ylim=(len(intervals) - 0.5, -0.5))
    ax.set_yticks(range(len(intervals)), intervals)
    foot = f"{cohort} · green: folds, black: mean and interval, dotted: chance"
    grey = ", grey: published mean ± standard deviation" if published else ""
    return _finish(figure, title, foot + grey)


@STYLE
def architecture(network, *, title):
    """Layers, their sizes and parameters, drawn from the network itself by a forward pass.

    Parameters
    ----------
    network : nn.Module
        With `shape` (X, Y, Z); takes (N, 1, X, Y, Z), and is left as it was found.
    """
    blocks, children = _trace(network), dict(network.named_children())
    counts = {name: sum(p.numel() for p in child.parameters()) for name, child in children.items()}
    hues = itertools.cycle(("#56B4E9", "#009E73", "#E69F00", "#CC79A7"))
    colours = {name: next(hues) if counts[name] else PALE for name in counts} | {"input": PALE}
    figure, ax = _open(1, 1, figsize=(1.42 * len(blocks), 3.6))
    small = {"ha": "center", "fontsize": 8}
    for place, (name, layers, shape) in enumerate(blocks):
        _block(ax, place, shape, 0.6 / max(network.shape) ** 0.5, colours[name])
        ax.text(place, -0.58, " × ".join(f"{size:,}" for size in shape), **small)
        if layers:
            ax.text(place - 0.5, 0.5, "\n".join(layers), color="#555555", **small)
            arrow = {"arrowstyle": "->", "color": "#777777"}
            ax.annotate("", (place - 0.42, 0), (place - 0.58, 0), arrowprops=arrow)
    for name, group in itertools.groupby(range(len(blocks)), lambda place: blocks[place][0]):
        start, *_, end = [place + side for place in group for side in (-0.42, 0.42)]
        ax.plot([start, end], [-0.66] * 2, color=colours[name], linewidth=3)
        ax.text((start + end) / 2, -0.82, name, weight="bold", ha="center")
        if counts.get(name):
            ax.text((start + end) / 2, -0.95, f"{counts[name]:,} parameters", **small)
    ax.set(xlim=(-0.55, len(blocks) - 0.45), ylim=(-1, 0.9), aspect="equal")
    ax.axis("off")
    total = sum(p.numel() for p in network.parameters())
    scale = "channels × X × Y × Z in voxels (edges drawn as their square roots)"
    return _finish(figure, title, f"{scale} · {total:,} parameters in all")


def _box(volume, affine):
    """Lowest and highest corner in mm of what stands out from zero, with a margin."""
    if (axes := "".join(aff2axcodes(affine))) != "RAS":
        raise ValueError(f"expected a volume in RAS, found {axes}: read it by volumes.load")
    inside = np.argwhere(volume >= 0.05 * volume.max())
    low, high = apply_affine(affine, [inside.min(0) - 0.5, inside.max(0) + 0.5])
    return low - 10, high + 10


def _grid(heights, widths, inches):
    """Rows and columns of axes, at so many inches a mm."""
    size = (sum(widths) * inches + 1.2, sum(heights) * inches + 0.7)
    ratios = {"height_ratios": heights, "width_ratios": widths, "figsize": size}
    return _open(len(heights), len(widths), squeeze=False, **ratios)


def _slice(ax, volume, affine, axis, at, **look):
    """Draw the plane across `axis` through `at`, all in mm."""
    index = round(apply_affine(np.linalg.inv(affine), at)[axis])
    if not 0 <= index < volume.shape[axis]:
        raise ValueError(f"{np.round(at, 1)} mm lies outside a volume of {volume.shape}")
    edges = apply_affine(affine, [[-0.5] * 3, np.array(volume.shape) - 0.5])
    extent = np.delete(edges, axis, axis=1).T.ravel()
    return ax.imshow(np.take(volume, index, axis).T, origin="lower", extent=extent, **look)


def _frame(ax, axis, at, centre, size):
    """Show `size` mm around `centre` on black, with orientation letters and the plane's place."""
    across, up = (other for other in range(3) if other != axis)
    for middle, length, limit in zip(centre[[across, up]], size, (ax.set_xlim, ax.set_ylim)):
        limit(middle - length / 2, middle + length / 2)
    ax.set(xticks=[], yticks=[], facecolor="black")
    _letters(ax, ENDS[2 * across + 1] + ENDS[2 * up + 1], "white")
    place = f"{'xyz'[axis]} = {at[axis]:.0f} mm".replace("-", "−")
    ax.text(0.02, 0.98, place, transform=ax.transAxes, va="top", color="white", fontsize=6)


def _letters(ax, ends, colour):
    """Write the letters `ends` at the right and the top, their opposites at the left and bottom."""
    left, bottom = (ENDS[ENDS.index(end) ^ 1] for end in ends)
    look = {"transform": ax.transAxes, "ha": "center", "va": "center", "color": colour}
    spots = ((0.97, 0.5), (0.5, 0.96), (0.03, 0.5), (0.5, 0.04))
    for letter, spot in zip((*ends, left, bottom), spots):
        ax.text(*spot, letter, fontsize=8, **look)


def _telling(weight, axis, count):
    """Indices along `axis`, all different, at even shares of the weight."""
    profile = weight.sum(axis=tuple({0, 1, 2} - {axis}))
    share = np.cumsum(profile) / profile.sum()
    chosen = {int(at) for at in np.searchsorted(share, (np.arange(count) + 0.5) / count)}
    others = [at for at in np.argsort(-profile) if at not in chosen]
    return sorted([*chosen, *others[: count - len(chosen)]])


def _open(rows, columns, **options):
    """A figure and its axes; pyplot forgets it at once, so that a notebook shows it once."""
    figure, axes = plt.subplots(rows, columns, layout="constrained", **options)
    plt.close(figure)
    return figure, axes


def _finish(figure, title, foot):
    """Write head and foot."""
    figure.suptitle(title, weight="bold", fontsize=11)
    figure.supxlabel(foot, fontsize=8, color="#555555")
    return figure


def _trace(network):
    """Blocks (child, layers, output shape) that a zero volume meets, a new one at each new size."""
    blocks = [("input", [], (1, *network.shape))]

    def note(name, layer, inputs, output):
        before, shape = blocks[-1][2], tuple(output.shape[1:])
        if (name, shape) != (blocks[-1][0], before):
            flat = tuple(inputs[0].shape[1:]) == (prod(before),) != before
            blocks.append((name, ["flatten"] if flat else [], shape))
        size = getattr(layer, "kernel_size", getattr(layer, "p", ""))
        size = "×".join(map(str, size)) if isinstance(size, tuple) else size
        blocks[-1][1].append(f"{type(layer).__name__} {size}".strip())

    modes = [(module, module.training) for module in network.modules()]
    handles = [
        layer.register_forward_hook(partial(note, name))
        for name, child in network.named_children()
        for layer in child.modules()
        if not list(layer.children())
    ]
    try:
        with torch.no_grad():
            network.eval()(next(network.parameters()).new_zeros(1, 1, *network.shape))
    finally:
        for handle in handles:
            handle.remove()
        for module, mode in modes:
            module.training = mode
    return blocks


def _block(ax, place, shape, scale, colour):
    """Draw a (channels, X, Y, Z) output as a stack of cuboids, a (features,) one as a bar."""
    bits = np.log2(shape[0])
    width, *depth, height = scale * np.sqrt(shape[1:]) if shape[1:] else (0.05, 0.05 + 0.06 * bits)
    right, up = 0.35 * sum(depth), 0.28 * sum(depth)
    front = np.array([(0, 0), (width, 0), (width, height), (0, height)])
    back = front + np.array([right, up])
    top, side = (np.array([*front[[i, 2]], *back[[2, i]]]) for i in (3, 1))
    shifts = np.linspace(0, 0.016 * bits, 1 + round(bits / 1.75)) if shape[1:] else np.zeros(1)
    corner = np.array([place - (width + right + shifts[-1]) / 2, -(height + up + shifts[-1]) / 2])
    faces = [face + corner + shift for shift in shifts[::-1] for face in (front, top, side)]
    rgb = np.array(to_rgb(colour))
    tones = [0.25 + 0.75 * rgb, 0.5 + 0.5 * rgb, 0.85 * rgb] * len(shifts)
    ax.add_collection(PolyCollection(faces, facecolors=tones, edgecolors="white", linewidths=0.7))


@dataclass(frozen=True)
class Mesh:
    """A closed surface: corners in mm (RAS), and triangles, counter-clockwise from outside."""

    vertices: np.ndarray  # (V, 3) float32
    faces: np.ndarray  # (F, 3) int32


def surface(volume, affine, level, *, smooth=1.0, max_faces=40_000):
    """Surface where a volume (X, Y, Z) passes `level`, closed where the volume ends.

    Parameters
    ----------
    affine : (4, 4) array
        To mm; it may flip axes.
    smooth : float
        Gaussian sigma in voxels, applied first.
    max_faces : int
        The volume is sampled the more coarsely until the triangles are no more than this.
    """
    for step in itertools.count(1):
        margin = int(np.ceil(4 * smooth)) + 2 * step
        field = gaussian_filter(np.pad(np.asarray(volume, np.float32), margin), smooth)
        if not 0 < level < field.max():
            raise ValueError(f"no surface at {level}: expected a level in (0, {field.max():.3g})")
        vertices, faces, *_ = marching_cubes(field, level, step_size=step)
        if len(faces) <= max_faces:
            break
    if np.linalg.det(affine) > 0:  # marching_cubes' triangles are clockwise from outside
        faces = faces[:, ::-1]
    vertices = apply_affine(affine, vertices - margin)
    return Mesh(vertices.astype(np.float32), faces.astype(np.int32))


@STYLE
def preview(meshes, *, title, cohort):
    """A still picture of what `page` shows, from the left, the front and the top."""
    low, high = _reach(meshes)
    across, up = (high - low)[[1, 0, 0]], (high - low)[1:].max()
    figure, (axes,) = _grid([up], across, 9 / sum(across))
    for ax, width, (name, ends) in zip(axes, across, VIEWS.items()):
        right, top = (WAYS[end] for end in ends)
        sight = np.array([right, top, np.cross(right, top)])
        bounds = (sight @ (low + high))[:2] / 2 + np.array([[-width, -up], [width, up]]) / 2
        picture = _render(meshes.values(), sight, *bounds)
        ax.imshow(picture, origin="lower", extent=bounds.T.ravel())
        _letters(ax, ends, DARK)
        ax.set_title(f"from the {name}")
        ax.axis("off")
    handles = [Patch(color=colour, label=name) for name, (_, colour, _) in meshes.items()]
    axes[1].legend(handles=handles, loc="upper center", bbox_to_anchor=(0.5, 0), ncols=len(handles))
    return _finish(figure, title, cohort)


def page(path, meshes, *, title, caption):
    """Write an HTML page that shows meshes in 3D, each with its switch; it works offline.

    Parameters
    ----------
    caption : str
        Stands at the foot, with the cohort's name and n.

    Raises
    ------
    ValueError
        If the page would have 4 MB or more.
    """
    bundle = next(Path(nilearn.__file__).parent.rglob("plotly-gl3d*.min.js"), None)
    if bundle is None:
        raise FileNotFoundError(f"nilearn {nilearn.__version__} brings no plotly-gl3d*.min.js")
    low, high = _reach(meshes)
    scene = {
        "ends": [((low + high + way * (high - low)) / 2).tolist() for way in WAYS.values()],
        "meshes": [
            {"name": name, "color": colour, "opacity": opacity}
            | {"vertices": _packed(mesh.vertices, "<f4"), "faces": _packed(mesh.faces, "<i4")}
            for name, (mesh, colour, opacity) in meshes.items()
        ],
    }
    parts = {
        "TITLE": html.escape(title),
        "CAPTION": html.escape(caption),
        "SCENE": json.dumps(scene).replace("<", r"\u003c"),
        "PLOTLY": bundle.read_text(encoding="utf-8").replace("</script", r"<\/script"),
    }
    text = re.sub("@([A-Z]+)@", lambda match: parts[match[1]], PAGE).encode()
    if len(text) >= 4e6:
        raise ValueError(f"{path}: {len(text) / 1e6:.1f} MB, 4 at most; lower max_faces of surface")
    with replacing(path) as unfinished:
        unfinished.write_bytes(text)


def _reach(meshes):
    """Lowest and highest corner in mm of all the meshes, with room for the letters."""
    corners = np.concatenate([mesh.vertices for mesh, *_ in meshes.values()])
    return corners.min(0) - 12, corners.max(0) + 12


def _packed(array, kind):
    """Base64 of an array's columns, one after the other."""
    return b64encode(array.T.astype(kind).tobytes()).decode()


def _render(meshes, sight, low, high):
    """Picture (rows, columns, RGB) of the meshes' outer sides, seen against `sight`'s third row."""
    pixel = max(high - low) / 600
    size = np.ceil((high - low) / pixel).astype(int)[::-1]
    layers, depths = [], []
    for mesh, colour, opacity in meshes:
        vertices, normals = mesh.vertices @ sight.T, np.zeros(mesh.vertices.shape)
        corners = vertices[mesh.faces]
        facing = np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0])
        np.add.at(normals, mesh.faces, facing[:, None])
        # Points so dense over each triangle that no pixel is left out
        count = int(np.ceil(1.5 * np.abs(corners - np.roll(corners, 1, axis=1)).max() / pixel))
        steps = [(i, j, count - i - j) for i in range(count + 1) for j in range(count + 1 - i)]
        front = mesh.faces[facing[:, 2] > 0]
        points, normals = (
            (np.array(steps) / count @ values[front]).reshape(-1, 3)
            for values in (vertices, normals)
        )
        normals /= np.linalg.norm(normals, axis=1, keepdims=True) + 1e-12
        light = 0.4 + 0.6 * np.clip(normals @ LIGHT, 0, 1)
        rim = opacity + (1 - opacity) * 0.5 * (1 - np.abs(normals[:, 2])) ** 2
        order = np.argsort(points[:, 2])  # the nearest point is written last
        column, row = ((points[order, :2] - low) / pixel).astype(int).T
        layers.append(np.zeros((*size, 4)))
        layers[-1][row, column] = np.column_stack([light[:, None] * to_rgb(colour), rim])[order]
        depths.append(np.full(size, -np.inf))
        depths[-1][row, column] = points[order, 2]
    picture = np.ones((*size, 3))
    for layer in np.take_along_axis(np.array(layers), np.argsort(depths, axis=0)[..., None], 0):
        picture += layer[..., 3:] * (layer[..., :3] - picture)
    return picture


PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:;
 style-src 'unsafe-inline'; script-src 'unsafe-inline' 'unsafe-eval'">
<link rel="icon" href="data:,">
<title>@TITLE@</title>
<style>
body {margin: 0; height: 100vh; height: 100dvh; display: flex; flex-direction: column;
  font: 15px/1.5 system-ui, sans-serif; color: #222; background: #fff}
header, footer {padding: 12px 24px}
h1 {font-size: 20px; margin: 0 0 6px}
nav {display: flex; flex-wrap: wrap; gap: 6px 8px}
label {margin-right: 14px}
i {display: inline-block; width: 12px; height: 12px; border-radius: 3px; margin: 0 6px}
button {font: inherit; padding: 1px 10px; border: 1px solid #bbb; border-radius: 6px;
  background: #fff; cursor: pointer}
main {flex: 1; min-height: 240px; overflow: hidden}
footer {color: #555; border-top: 1px solid #e5e5e5; font-size: 14px}
</style>
</head>
<body>
<header><h1>@TITLE@</h1><nav></nav></header>
<main role="img" aria-label="@TITLE@"><noscript>This page draws with JavaScript.</noscript></main>
<footer>@CAPTION@<br>Drag to turn, scroll to zoom. L left, R right, A front, P back, S top, I bottom
of the brain.</footer>
<script>@PLOTLY@</script>
<script>
const {meshes, ends} = @SCENE@, main = document.querySelector("main");
const columns = (text, Kind) => {
  const all = new Kind(Uint8Array.from(atob(text), c => c.charCodeAt(0)).buffer);
  return [0, 1, 2].map(at => all.subarray(at * all.length / 3, (at + 1) * all.length / 3));
};
// In clip space, from behind the viewer: the light keeps its place when the brain turns
const lighting = {ambient: 0.35, diffuse: 0.65, specular: 0.05, roughness: 0.6, fresnel: 0.1};
const lightposition = {x: 0.5, y: -0.6, z: 1.001};
const traces = meshes.map(({color, opacity, vertices, faces}) => {
  const [x, y, z] = columns(vertices, Float32Array), [i, j, k] = columns(faces, Int32Array);
  return {type: "mesh3d", x, y, z, i, j, k, color, opacity, lighting, lightposition};
});
const [x, y, z] = [0, 1, 2].map(axis => ends.map(end => end[axis]));
traces.push({type: "scatter3d", mode: "text", text: [..."LRPAIS"], x, y, z});
const axis = {visible: false}, eyes = {Oblique: [-1.1, 0.9, 0.6], Left: [-1.5, 0, 0],
  Right: [1.5, 0, 0], Front: [0, 1.5, 0], Back: [0, -1.5, 0], Top: [0, -0.001, 1.7],
  Bottom: [0, 0.001, -1.7]};
const camera = ([x, y, z]) => ({eye: {x, y, z}, up: {x: 0, y: 0, z: 1}});
const add = (kind, ...content) => {
  const element = document.createElement(kind);
  element.append(...content);
  document.querySelector("nav").append(element);
  return element;
};
if (!document.createElement("canvas").getContext("webgl")) {
  main.textContent = "This page needs WebGL to draw, which this browser does not offer.";
} else {
  meshes.forEach(({name, color}, at) => {
    const box = document.createElement("input"), swatch = document.createElement("i");
    Object.assign(box, {type: "checkbox", checked: true});
    box.onchange = () => Plotly.restyle(main, {visible: box.checked}, [at]);
    swatch.style.background = color;
    add("label", box, swatch, name);
  });
  for (const view in eyes)
    add("button", view).onclick = () => Plotly.relayout(main, {"scene.camera": camera(eyes[view])});
  const layout = {margin: {l: 0, r: 0, t: 0, b: 0}, showlegend: false, hovermode: false,
    font: {size: 18, color: "#222"}, scene: {xaxis: axis, yaxis: axis, zaxis: axis,
      aspectmode: "data", camera: camera(eyes.Oblique)}};
  Plotly.newPlot(main, traces, layout, {displayModeBar: false, responsive: true});
}
</script>
</body>
</html>
"""
