"""Drawings that more than one notebook makes, or that take more than a few lines.

Volumes are (X, Y, Z) with a 4×4 affine to RAS mm; the left of the brain is on the left. `title`
stands at the head of a figure, `cohort`, name and n ("synthetic cohort, n=200"), at its foot.
"""

import copy
from collections.abc import Mapping, Sequence
from functools import partial
from textwrap import fill

import numpy as np
import pandas as pd
import torch
from matplotlib import pyplot as plt
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from nibabel import Nifti1Image
from nibabel.affines import apply_affine, voxel_sizes
from nilearn import plotting
from scipy.ndimage import center_of_mass

PALETTE = {"women": "#D55E00", "men": "#0072B2"}  # colour-blind safe: Okabe and Ito's
DARK, PALE, ACCENT, OUTLINE = "#222222", "#999999", "#009E73", "#56B4E9"
HUES = (DARK, "#E69F00", "#56B4E9", "#009E73", "#CC79A7", "#D55E00", "#0072B2", PALE)
MARKERS = "osDv^<>P"
CHANCE = {"color": DARK, "linewidth": 0.9, "linestyle": ":"}
ACCURACY = "accuracy (share of subjects)"
CUTS = 7  # planes of a mosaic in each direction
GLOW = plt.get_cmap("inferno")(np.linspace(0.35, 0.97, 256))
GLOW[:, 3] = np.clip(np.linspace(0, 4, 256), 0, 1)  # small values leave the brain visible
GLOW = ListedColormap(GLOW)
STYLE = {"font.size": 9, "axes.titlesize": 9, "text.color": DARK, "legend.frameon": False}
STYLE |= {"font.family": "sans-serif", "axes.spines.top": False, "axes.spines.right": False}
"""Matplotlib settings of every figure, for ``plt.rc_context``."""

PANELS = {"vmin": 0, "bg_img": None, "threshold": None, "symmetric_cbar": False, "colorbar": False}
PANELS |= {"draw_cross": False, "annotate": False, "black_bg": True}  # of plot_stat_map


def new_figure(rows: int = 1, columns: int = 1, **options: object) -> tuple[Figure, np.ndarray]:
    """Open a figure and its axes, which pyplot forgets, so that a notebook shows it only once."""
    figure, axes = plt.subplots(rows, columns, layout="constrained", **options)
    plt.close(figure)
    return figure, axes


def finish(figure: Figure, title: str, foot: str) -> Figure:
    """Write the title at the head of a figure and who was measured at its foot; return it."""
    figure.suptitle(title, weight="bold", fontsize=11)
    foot = fill(foot, int(15 * figure.get_figwidth()))  # characters in a line of this size
    figure.supxlabel(foot, fontsize=8, color="#555555")
    return figure


def to_image(volume: np.ndarray, affine: np.ndarray) -> Nifti1Image:
    """Wrap an array (X, Y, Z) and its affine (4, 4) for nilearn."""
    return Nifti1Image(np.asarray(volume, np.float32), affine)


@plt.rc_context(STYLE)
def brain_panels(
    rows: Sequence[Sequence[Mapping]],
    *,
    title: str,
    foot: str,
    width: float = 9,
    bar: tuple[str | ListedColormap, float, str] | None = None,
) -> Figure:
    """Draw rows of panels by nilearn, `width` inches wide, each with some planes of an image.

    A panel has `label`, `planes` ("xyz", or one letter as often as there are cuts), perhaps
    `outlines` (an array (X, Y, Z) on the image's grid, contoured where not 0), and arguments of
    `nilearn.plotting.plot_stat_map`, at least `stat_map_img` and `cut_coords` in mm. `bar` is the
    colour map, top value and label of one colour bar, from 0, for all panels.
    """
    image = rows[0][0]["stat_map_img"]
    extent = np.abs(image.affine[:3, :3]) @ image.shape  # mm
    widths = [sum(extent[int(axis == "x")] for axis in panel["planes"]) for panel in rows[0]]
    heights = [max(extent[1 if "z" in panel["planes"] else 2] for panel in row) for row in rows]
    size = (width + 0.8, width * sum(heights) / sum(widths) + 0.25 * len(rows) + 0.6)
    ratios = {"width_ratios": widths, "height_ratios": heights, "squeeze": False}
    ratios["subplot_kw"] = {"frame_on": False, "xticks": [], "yticks": []}
    figure, axes = new_figure(len(rows), len(rows[0]), figsize=size, **ratios)
    panels = [(ax, dict(panel)) for pair in zip(axes, rows) for ax, panel in zip(*pair)]
    for ax, panel in panels:
        ax.set_title(panel.pop("label"))
    if bar:
        look = {"label": bar[2], "aspect": 25, "pad": 0.01, "shrink": min(0.8, 3.5 / size[1])}
        scale = figure.colorbar(
            plt.cm.ScalarMappable(plt.Normalize(0, bar[1]), bar[0]), ax=axes, **look
        )
        scale.ax.set_facecolor("#444444")
    foot += " · blue contours: planted regions" * (rows[0][0].get("outlines") is not None)
    finish(figure, title, f"{foot} · x, y, z in mm; L left, R right; sagittal: front to the right")
    figure.draw_without_rendering()  # nilearn reads where the axes are: nothing may move from here
    figure.set_layout_engine("none")
    for ax, panel in panels:
        planes, outlines = panel.pop("planes"), panel.pop("outlines", None)
        panel["cut_coords"] = np.round(panel["cut_coords"])  # whole mm, as nilearn writes them
        mode = "ortho" if planes == "xyz" else planes[0]
        display = plotting.plot_stat_map(axes=ax, display_mode=mode, **PANELS | panel)
        if outlines is not None:
            contours = to_image(np.not_equal(outlines, 0), panel["stat_map_img"].affine)
            display.add_contours(contours, levels=[0.5], colors=OUTLINE, linewidths=0.9)
        display.annotate(size=7)
    return figure


def volume_slices(
    panels: Mapping[str, tuple], *, title: str, cohort: str, values: str = "FA"
) -> Figure:
    """Draw a sagittal, a coronal and an axial plane of each volume, all to one scale.

    `panels` is label -> (volume (X, Y, Z) in [0, 1], affine); the grids may differ, all planes go
    through the first volume's centre of mass. `values`, one of `cohort.MODALITIES`, labels the bar.
    """
    volume, affine = next(iter(panels.values()))
    look = {"planes": "xyz", "cut_coords": apply_affine(affine, center_of_mass(volume))}
    look |= {"cmap": "gray", "vmax": 1}
    rows = []
    for label, (volume, affine) in panels.items():
        sizes = " × ".join(f"{size:.4g}" for size in voxel_sizes(affine))
        label += f": {' × '.join(map(str, volume.shape))} voxels of {sizes} mm"
        rows.append([look | {"label": label, "stat_map_img": to_image(volume, affine)}])
    return brain_panels(rows, title=title, foot=cohort, width=7, bar=("gray", 1, values))


def person_strip(
    panels: Mapping[str, np.ndarray], affine: np.ndarray, *, title: str, cohort: str
) -> Figure:
    """Draw one axial plane of several volumes of one person, side by side.

    `panels` is label -> volume (X, Y, Z) in [0, 1]. The plane is the one where the last volume (for
    example the brain with the mask blurred) differs most from the first.
    """
    first, *_, last = panels.values()
    difference = np.abs(np.subtract(last, first, dtype=float)) + 1e-9 * first  # of an empty mask
    plane = difference.sum((0, 1)).argmax()
    place = apply_affine(affine, [0, 0, plane])[2:]
    look = {"planes": "z", "cut_coords": place, "cmap": "gray", "vmax": 1}
    images = {label: to_image(volume, affine) for label, volume in panels.items()}
    row = [look | {"label": label, "stat_map_img": image} for label, image in images.items()]
    return brain_panels([row], title=title, foot=cohort, bar=("gray", 1, "value of a voxel"))


def mask_overlay(
    background: np.ndarray,
    saliency: np.ndarray,
    affine: np.ndarray,
    *,
    title: str,
    cohort: str,
    outlines: np.ndarray | None = None,
    vmax: float | None = None,
) -> Figure:
    """Draw planes of a mean mask over the mean brain, where the mask and the outlined regions lie.

    `background`, `saliency` (in [0, 1]) and `outlines` (planted regions, where not 0) are (X, Y, Z)
    on one grid, else ValueError; `vmax` is the top of the colour bar.
    """
    vmax = vmax or float(saliency.max()) or 1.0
    weight = saliency / vmax + 0.01 * background  # the brain decides what is left open
    weight = weight if outlines is None else weight + np.not_equal(outlines, 0)
    look = {"label": "", "stat_map_img": to_image(saliency, affine), "cmap": GLOW, "vmax": vmax}
    look |= {"bg_img": to_image(background, affine), "outlines": outlines}
    rows = []
    for axis in "zyx":
        cuts = plotting.find_cut_slices(to_image(weight, affine), axis, CUTS)
        rows.append([look | {"planes": axis * CUTS, "cut_coords": cuts}])
    bar = (GLOW, vmax, "mean mask (1 = blurred out in every subject)")
    return brain_panels(rows, title=title, foot=cohort, width=11, bar=bar)


def explanation_maps(
    background: np.ndarray,
    saliency: Mapping[str, np.ndarray],
    affine: np.ndarray,
    point: Sequence[float],
    *,
    title: str,
    cohort: str,
    outlines: np.ndarray | None = None,
) -> Figure:
    """Draw three planes through `point`, in mm, under every explanation, each to its own scale.

    `background` (X, Y, Z) lies under the maps; `saliency` is label -> map (X, Y, Z), of which the
    positive part is drawn; `outlines` are planted regions, where not 0.
    """
    look = {"planes": "xyz", "cut_coords": point, "bg_img": to_image(background, affine)}
    look |= {"outlines": outlines, "cmap": GLOW, "vmax": 1}
    panels = []
    for label, values in saliency.items():
        positive = np.clip(values, 0, None)
        floor, top = np.quantile(positive[background > 0], (0.9, 0.9995))
        floor *= floor < top  # a map at its top in a tenth of the brain is drawn whole
        scaled = np.clip((positive - floor) / ((top - floor) or positive.max() or 1), 0, 1)
        panels.append(look | {"label": label, "stat_map_img": to_image(scaled, affine)})
    rows = [panels[start : start + 2] for start in range(0, len(panels), 2)]
    bar = (GLOW, 1, "saliency, each map's own scale (90th to 99.95th percentile of the brain)")
    return brain_panels(rows, title=title, foot=cohort, width=10, bar=bar)


@plt.rc_context(STYLE)
def training_curves(histories: Mapping[str, pd.DataFrame], *, title: str, cohort: str) -> Figure:
    """Draw loss and accuracy over epochs, a column a network, each fold thin and the mean bold.

    `histories` is network -> table with the columns fold, epoch, train_loss, validation_loss,
    train_accuracy and validation_accuracy.
    """
    size = {"figsize": (2.6 * len(histories) + 1.4, 4.6), "squeeze": False}
    figure, axes = new_figure(2, len(histories), sharex=True, sharey="row", **size)
    for column, (name, history) in zip(axes.T, histories.items()):
        for ax, measure, chance in zip(column, ("loss", "accuracy"), (np.log(2), 0.5)):
            for part, colour in (("train", PALE), ("validation", ACCENT)):
                curves = history.pivot(index="epoch", columns="fold", values=f"{part}_{measure}")
                ax.plot(curves, color=colour, linewidth=0.7, alpha=0.5)
                ax.plot(curves.mean(axis=1), color=colour, linewidth=2.2, label=part)
            ax.axhline(chance, label="chance", **CHANCE)
        column[0].set_title(name)
        column[1].set_xlabel("epoch")
    axes[0, 0].set(ylabel="loss (cross-entropy, nats)", ylim=(0, None))
    axes[1, 0].set(ylabel=ACCURACY, ylim=(None, 1.01))
    axes[0, 0].legend()
    return finish(figure, title, f"{cohort} · thin: a fold, bold: mean of the folds")


@plt.rc_context(STYLE)
def score_dots(
    table: pd.DataFrame,
    *,
    rows: str,
    hue: str,
    title: str,
    cohort: str,
    value: str = "accuracy",
    label: str = ACCURACY,
    folds: pd.DataFrame | None = None,
    published: pd.DataFrame | None = None,
) -> Figure:
    """Draw scores with intervals: a line of dots a row, a colour and mark a kind.

    `table` has the columns `rows`, `hue`, `value` (`label` on the axis) and, where there is an
    interval, low and high. `folds`, one row a fold, and `published`, which has sd too (NaN where
    unknown), have the first three. Raises ValueError for more kinds than colours.
    """
    names, kinds = (list(dict.fromkeys(table[column])) for column in (rows, hue))
    if len(kinds) > len(HUES):
        raise ValueError(f"{hue}: expected at most {len(HUES)} kinds, found {len(kinds)}")
    figure, ax = new_figure(figsize=(8.4, 1.5 + len(names) * (0.22 + 0.2 * len(kinds))))
    step = 0.8 / len(kinds)
    shifts = {kind: step * (n - (len(kinds) - 1) / 2) for n, kind in enumerate(kinds)}

    def heights(scores: pd.DataFrame) -> pd.Series:
        return scores[rows].map({n: y for y, n in enumerate(names)}) + scores[hue].map(shifts)

    for kind, colour, marker in zip(kinds, HUES, MARKERS):
        scores = table[table[hue] == kind]
        ax.plot(scores[value], heights(scores), marker, color=colour, markersize=5, label=kind)
        if "low" in scores:
            ax.hlines(heights(scores), scores["low"], scores["high"], color=colour, linewidth=1.6)
        look = {"color": colour, "transform": ax.get_yaxis_transform(), "va": "center"}
        for y, score in zip(heights(scores), scores[value]):
            ax.text(1.01, y, f"{score:.3f}", fontsize=7, **look)
        if folds is not None:
            dots = folds[folds[hue] == kind]
            ax.plot(dots[value], heights(dots) - 0.3 * step, ".", color=colour, alpha=0.4)
    if published is not None:
        look = {"xerr": published["sd"], "fmt": "d", "color": PALE, "label": "published", "ms": 4}
        ax.errorbar(published[value], heights(published) + 0.38 * step, **look)
    ax.axvline(0.5, **CHANCE)
    ax.set(xlabel=label, ylim=(len(names) - 0.5, -0.5))
    ax.set_yticks(range(len(names)), names)
    ax.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=3, fontsize=8)
    return finish(figure, title, cohort)


@plt.rc_context(STYLE)
def network_diagram(network: torch.nn.Module, *, title: str) -> Figure:
    """Draw the parts of a network: their layers, output sizes and numbers of parameters.

    The network has a `shape` (X, Y, Z) and takes (N, 1, X, Y, Z); it is not changed.
    """
    network, sizes = copy.deepcopy(network).cpu().eval(), {"input": (1, *network.shape)}

    def record(name: str, part: torch.nn.Module, _: tuple, output: torch.Tensor) -> None:
        sizes[name] = output.shape[1:]

    for name, part in network.named_children():
        part.register_forward_hook(partial(record, name))
    with torch.no_grad():
        network(torch.zeros(1, 1, *network.shape))
    network.input = torch.nn.Sequential()
    figure, ax = new_figure(figsize=(1.7 * len(sizes), 3.8))
    ax.set(xlim=(-0.5, len(sizes) - 0.5), ylim=(-1, 0.9), aspect="equal")
    ax.axis("off")
    for place, (name, size) in enumerate(sizes.items()):
        x, *y, z = 0.5 * np.sqrt(np.divide(size[1:] or (1, 9), max(network.shape)))
        slant = 0.35 * sum(y)
        corner = place - (x + slant) / 2, -(z + slant) / 2
        a, b, c, d = np.add(corner, [(0, 0), (x, 0), (x, z), (0, z)])
        faces = [a, b, c, d], [d, c, c + slant, d + slant], [b, c, c + slant, b + slant]
        for face, alpha in zip(faces, (0.8, 0.5, 1)):
            ax.fill(*np.transpose(face), facecolor=(OUTLINE, alpha), edgecolor="white")
        part = network.get_submodule(name)
        layers = [layer for layer in part.modules() if part and not [*layer.children()]]
        above = [f"{type(layer).__name__} {getattr(layer, 'kernel_size', '')}" for layer in layers]
        ax.text(place, 0.5, "\n".join(above), ha="center", fontsize=8, color="#555555")
        count = sum(values.numel() for values in part.parameters())
        below = [" × ".join(f"{n:,}" for n in size), "", name, f"{count:,} parameters"]
        ax.text(place, -0.45, "\n".join(below), ha="center", va="top", fontsize=8)
    total = sum(values.numel() for values in network.parameters())
    foot = f"channels × X × Y × Z of each output · {total:,} parameters in all"
    return finish(figure, title, foot)
