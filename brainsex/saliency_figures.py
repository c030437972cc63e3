"""Drawings of explanations side by side, after the manner of `figures`."""

import numpy as np
from matplotlib import pyplot as plt
from matplotlib.colors import ListedColormap
from nibabel.affines import apply_affine

from brainsex.figures import (
    DARK,
    GLOW,
    OUTLINE,
    PALE,
    PALETTE,
    STYLE,
    box,
    finish,
    frame,
    grid,
    opened,
    plane,
)

COLOURS = ("#000000", "#E69F00", "#56B4E9", "#009E73", "#D55E00", "#0072B2", "#CC79A7", "#999999")


@plt.rc_context(STYLE)
def maps(background, saliency, affine, at, *, title, cohort, outlines=None):
    """The same three planes under every map, each map to its own scale.

    Parameters
    ----------
    background : (X, Y, Z) array
        FA under the maps.
    saliency : dict
        Label -> map (X, Y, Z); what is negative is not drawn.
    at : (x, y, z)
        Point in mm where sagittal, coronal and axial planes meet.
    outlines : (X, Y, Z) int array, optional
        Planted regions, drawn as contours.
    """
    columns = 2
    low, high = box(background, affine)
    widths, height = (high - low)[[1, 0, 0]], max((high - low)[1:])
    rows = -(-len(saliency) // columns)
    figure, axes = grid([height] * rows, [*widths] * columns, 10 / (sum(widths) * columns))
    look = {"cmap": "gray", "vmin": 0, "vmax": 1.4 * np.percentile(background[background > 0], 99)}
    blocks = axes.reshape(rows * columns, 3)
    for block, (label, values) in zip(blocks, saliency.items()):
        positive = np.clip(values, 0, None)
        floor, top = np.quantile(positive[background > 0], (0.9, 0.9995))
        floor *= floor < top  # a map that is at its top in a tenth of the brain is shown whole
        shown = np.clip((positive - floor) / ((top - floor) or positive.max() or 1), 0, 1)
        for axis, ax in enumerate(block):
            plane(ax, background, affine, axis, at, **look)
            glow = {"cmap": ListedColormap(GLOW), "vmin": 0, "vmax": 1}
            picture = plane(ax, shown, affine, axis, at, interpolation="bilinear", **glow)
            if outlines is not None:
                index = round(apply_affine(np.linalg.inv(affine), at)[axis])
                cut, extent = np.take(outlines, index, axis).T, picture.get_extent()
                for region in np.setdiff1d(cut, 0):
                    edge = {"origin": "lower", "colors": OUTLINE, "linewidths": 0.8}
                    ax.contour(cut == region, [0.5], extent=extent, **edge)
            frame(ax, axis, at, (low + high) / 2, (widths[axis], height))
        block[1].set_title(label)
    for block in blocks[len(saliency) :]:
        for ax in block:
            ax.set_axis_off()
    label = "saliency, each map's own scale (90th to 99.95th percentile of the brain)"
    bar = figure.colorbar(picture, ax=axes, label=label, shrink=0.5, aspect=30, pad=0.01)
    bar.ax.set_facecolor("#444444")
    foot = f"{cohort} · blue contours: planted regions" if outlines is not None else cohort
    return finish(figure, title, foot)


@plt.rc_context(STYLE)
def curves(fractions, deletion, insertion, *, title, cohort):
    """Probability of the target as a method's first voxels are deleted or inserted.

    Parameters
    ----------
    fractions : shares of the brain.
    deletion, insertion : dict
        Method -> (N, fractions) probabilities.
    """
    figure, axes = opened(1, 2, figsize=(10, 3.8), sharey=True)
    for ax, label, found in zip(axes, ("deleted", "inserted"), (deletion, insertion)):
        for number, (name, values) in enumerate(found.items()):
            colour = COLOURS[number % len(COLOURS)]
            dash = ("-", "--")[number // len(COLOURS)]
            look = {"color": colour, "marker": "o", "markersize": 3, "linestyle": dash}
            ax.plot(100 * np.asarray(fractions), values.mean(0), label=name, **look)
        ax.set(xlabel=f"{label} (% of the brain's voxels)", ylim=(-0.02, 1.02))
        ax.axhline(0.5, color=DARK, linewidth=0.9, linestyle=":")
    axes[0].set_ylabel("probability of the class explained")
    axes[0].set_title("deletion: low is faithful")
    axes[1].set_title("insertion: high is faithful")
    figure.legend(
        *axes[0].get_legend_handles_labels(), loc="outside right center", fontsize=7, handlelength=4
    )
    count = len(next(iter(deletion.values())))
    return finish(figure, title, f"{cohort} · means of {count} held-out subjects; dotted: 0.5")


@plt.rc_context(STYLE)
def region_bars(table, *, title, cohort):
    """Share of a map in each region, of the twelve with the largest shares; women beside men.

    Parameters
    ----------
    table : DataFrame
        Of `atlases.regions`, of groups among women and men.
    """
    inside = table[table["label"] > 0]
    order = inside.groupby("label")["share"].max().sort_values()[-12:].index
    names = inside.drop_duplicates("label").set_index("label").loc[order, "name"]
    groups = [name for name in PALETTE if name in set(table["group"])]
    figure, ax = opened(1, 1, figsize=(7.5, 1.2 + 0.36 * len(order)))
    for number, group in enumerate(groups):
        rows = inside[inside["group"] == group].set_index("label").loc[order]
        places = np.arange(len(order)) + 0.2 * (2 * number - 1) * (len(groups) > 1)
        ax.barh(places, 100 * rows["share"], 0.38, color=PALETTE[group], label=f"maps of {group}")
        expected = 100 * rows["volume_ml"] / table.loc[table["group"] == group, "volume_ml"].sum()
        ax.plot(expected, places, "|", color=DARK, markersize=9)
    ax.set_yticks(range(len(order)), names, fontsize=8)
    ax.set_xlabel("share of the map inside the region (%)")
    ax.plot([], [], "|", color=DARK, label="the region's share of the brain")
    ax.legend(loc="lower right")
    ax.axvline(0, color=PALE, linewidth=0.8)
    return finish(figure, title, cohort)
