"""The drawings more than one notebook makes.

Volumes are (X, Y, Z) in RAS with a 4×4 affine to mm; the left of the brain is on the left of the
picture. Figures are returned for the caller to save; `title` stands at their head and `cohort`, the
cohort's name and n ("synthetic cohort, n=200"), at their foot.
"""

from textwrap import fill

import numpy as np
from matplotlib import pyplot as plt
from matplotlib.colors import ListedColormap
from nibabel import aff2axcodes
from nibabel.affines import apply_affine, voxel_sizes
from scipy.ndimage import center_of_mass

PALETTE = {"women": "#D55E00", "men": "#0072B2"}
"""The sexes' colours, of Okabe and Ito's set for colour-blind readers."""

ACCENT, OUTLINE, PALE, DARK = "#009E73", "#56B4E9", "#999999", "#222222"
ENDS = "LRPAIS"  # the low and the high end of X, Y, Z
COLUMNS = 7  # of a mosaic
GLOW = plt.get_cmap("inferno")(np.linspace(0.35, 0.97, 256))
GLOW[:, 3] = np.clip(np.linspace(0, 4, 256), 0, 1)  # what is faint shows the brain beneath
STYLE = {"font.size": 9, "axes.titlesize": 9, "text.color": DARK, "legend.frameon": False}
STYLE |= {"font.family": "sans-serif", "axes.spines.top": False, "axes.spines.right": False}
"""Matplotlib settings of every figure, for ``plt.rc_context``."""


@plt.rc_context(STYLE)
def slices(panels, *, title, cohort, values="FA"):
    """Slices through the first volume's centre of mass, a row a volume, all to one scale.

    `panels` are label -> (volume (X, Y, Z) in [0, 1], affine); the grids may differ. `values` says
    what they are, beside the colour bar: of `brainsex.MODALITIES`.
    """
    at = centre(*next(iter(panels.values())))
    boxes = np.array([box(*panel) for panel in panels.values()])
    low, high = boxes[:, 0].min(0), boxes[:, 1].max(0)
    widths, height = (high - low)[[1, 0, 0]], max((high - low)[1:])
    figure, axes = grid([height] * len(panels), widths, 7 / sum(widths))
    for row, (label, (volume, affine)) in zip(axes, panels.items()):
        shape = " × ".join(map(str, volume.shape))
        sizes = " × ".join(f"{size:.4g}" for size in voxel_sizes(affine))
        row[0].set_ylabel(f"{label}\n{shape} voxels\n{sizes} mm")
        for axis, ax in enumerate(row):
            picture = plane(ax, volume, affine, axis, at, cmap="gray", vmin=0, vmax=1)
            frame(ax, axis, at, (low + high) / 2, (widths[axis], height))
    figure.colorbar(picture, ax=axes, label=values, shrink=0.6, aspect=30, pad=0.02)
    return finish(figure, title, cohort)


@plt.rc_context(STYLE)
def overlay(background, saliency, affine, *, title, cohort, outlines=None, vmax=None):
    """Mosaics of a mean mask over the mean FA, cut where the mask and the outlined regions lie.

    Background, `saliency` (in [0, 1], 1 where all the evidence was removed) and `outlines` (bool or
    int, each value but 0 drawn as a contour) are (X, Y, Z); `vmax` is the top of the colour bar.
    """
    outlines = np.zeros(background.shape, int) if outlines is None else np.asarray(outlines, int)
    if not background.shape == saliency.shape == outlines.shape:
        found = f"{background.shape}, {saliency.shape}, {outlines.shape}"
        raise ValueError(f"background, saliency and outlines must be on one grid; found {found}")
    weight = saliency / (saliency.sum() or 1) + (outlines != 0) / ((outlines != 0).sum() or 1)
    low, high = box(background, affine)
    heights, width = (high - low)[[1, 2, 2]], max((high - low)[:2])
    figure, axes = grid(heights, [width] * COLUMNS, 11 / width / COLUMNS)
    brightest = 1.4 * np.percentile(background[background > 0], 99.5)
    grey = {"cmap": "gray", "vmin": 0, "vmax": brightest}
    glow = {"cmap": ListedColormap(GLOW), "vmin": 0, "vmax": vmax or saliency.max() or 1}
    for row, axis, height in zip(axes, (2, 1, 0), heights):
        for ax, index in zip(row, _telling(weight if weight.any() else background, axis, COLUMNS)):
            at = apply_affine(affine, [index] * 3)
            plane(ax, background, affine, axis, at, **grey)
            picture = plane(ax, saliency, affine, axis, at, interpolation="bilinear", **glow)
            cut, extent = np.take(outlines, index, axis).T, picture.get_extent()
            for region in np.setdiff1d(cut, 0):
                look = {"origin": "lower", "colors": OUTLINE, "linewidths": 0.9}
                ax.contour(cut == region, [0.5], extent=extent, **look)
            frame(ax, axis, at, (low + high) / 2, (width, height))
    label = "saliency (share of evidence removed)"
    bar = figure.colorbar(picture, ax=axes, label=label, shrink=0.6, aspect=30, pad=0.01)
    bar.ax.set_facecolor("#444444")
    foot = f"{cohort} · blue contours: planted regions" if outlines.any() else cohort
    return finish(figure, title, foot)


@plt.rc_context(STYLE)
def curves(history, *, title, cohort):
    """Loss and accuracy over epochs, each fold thin and their mean bold.

    `history`: fold, epoch, train_loss, validation_loss, train_accuracy, validation_accuracy.
    """
    figure, axes = opened(1, 2, figsize=(8.4, 3.4))
    draw_curves(axes, history)
    axes[0].set(xlabel="epoch", ylabel="loss (cross-entropy, nats)", ylim=(0, None))
    axes[1].set(xlabel="epoch", ylabel="accuracy (share of subjects)", ylim=(None, 1.01))
    axes[0].legend()
    folds = history["fold"].nunique()
    return finish(figure, title, f"{cohort} · thin: each of {folds} folds, bold: their mean")


def draw_curves(axes, history):
    """Loss on the first of two axes, accuracy on the second; `history` as in `curves`."""
    for ax, measure, chance in zip(axes, ("loss", "accuracy"), (np.log(2), 0.5)):
        for part, colour in (("train", PALE), ("validation", ACCENT)):
            table = history.pivot(index="epoch", columns="fold", values=f"{part}_{measure}")
            ax.plot(table, color=colour, linewidth=0.7, alpha=0.5)
            ax.plot(table.mean(axis=1), color=colour, linewidth=2.2, label=part)
        ax.axhline(chance, color=DARK, linewidth=0.9, linestyle=":", label="chance")


@plt.rc_context(STYLE)
def fold_accuracies(table, intervals, *, title, cohort, published=None):
    """Accuracy of every fold, the mean and its interval, beside published values.

    The table has model, fold and accuracy (share of subjects), `intervals` are model -> (mean, low,
    high, name of the interval), `published` model -> (mean, standard deviation).
    """
    figure, ax = opened(1, 1, figsize=(8.4, 1.2 + 0.7 * len(intervals)))
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
    return finish(figure, title, foot + grey)


def centre(volume, affine):
    """The centre of mass in mm."""
    return apply_affine(affine, center_of_mass(volume))


def box(volume, affine):
    """Lowest and highest corner in mm of what stands out from zero, with a margin."""
    if (axes := "".join(aff2axcodes(affine))) != "RAS":
        raise ValueError(f"expected a volume in RAS, found {axes}: read it by volumes.load")
    inside = np.argwhere(volume >= 0.05 * volume.max())
    low, high = apply_affine(affine, [inside.min(0) - 0.5, inside.max(0) + 0.5])
    return low - 10, high + 10


def grid(heights, widths, inches):
    """Rows and columns of axes, at so many inches a mm."""
    size = (sum(widths) * inches + 1.2, sum(heights) * inches + 0.7)
    ratios = {"height_ratios": heights, "width_ratios": widths, "figsize": size}
    return opened(len(heights), len(widths), squeeze=False, **ratios)


def plane(ax, volume, affine, axis, at, **look):
    """Draw the plane across `axis` through `at`, all in mm."""
    index = round(apply_affine(np.linalg.inv(affine), at)[axis])
    if not 0 <= index < volume.shape[axis]:
        raise ValueError(f"{np.round(at, 1)} mm lies outside a volume of {volume.shape}")
    edges = apply_affine(affine, [[-0.5] * 3, np.array(volume.shape) - 0.5])
    extent = np.delete(edges, axis, axis=1).T.ravel()
    return ax.imshow(np.take(volume, index, axis).T, origin="lower", extent=extent, **look)


def frame(ax, axis, at, centre, size):
    """Show `size` mm around `centre` on black, with orientation letters and the plane's place."""
    across, up = (other for other in range(3) if other != axis)
    for middle, length, limit in zip(centre[[across, up]], size, (ax.set_xlim, ax.set_ylim)):
        limit(middle - length / 2, middle + length / 2)
    ax.set(xticks=[], yticks=[], facecolor="black")
    letters(ax, ENDS[2 * across + 1] + ENDS[2 * up + 1], "white")
    place = f"{'xyz'[axis]} = {at[axis]:.0f} mm".replace("-", "−")
    ax.text(0.02, 0.98, place, transform=ax.transAxes, va="top", color="white", fontsize=6)


def letters(ax, ends, colour):
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


def opened(rows, columns, **options):
    """A figure and its axes; pyplot forgets it at once, so that a notebook shows it once."""
    figure, axes = plt.subplots(rows, columns, layout="constrained", **options)
    plt.close(figure)
    return figure, axes


def finish(figure, title, foot):
    """Write head and foot."""
    figure.suptitle(title, weight="bold", fontsize=11)
    width = int(15 * figure.get_figwidth())  # characters of this size in a line
    figure.supxlabel(fill(foot, width), fontsize=8, color="#555555")
    return figure
