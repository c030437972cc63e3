"""Drawings of slabs and of the first layer, after the manner of `figures`."""

import numpy as np
from matplotlib import pyplot as plt
from nibabel.affines import apply_affine

from brainsex import figures
from brainsex.figures import DARK, PALE, PALETTE, STYLE, finish, opened, plane

LINES = (("#000000", "-"), ("#CC79A7", "--"))  # two forms, told apart by colour and by dash


@plt.rc_context(STYLE)
def form_curves(histories, *, title, cohort):
    """Loss and accuracy over epochs, a column a form: form -> history as of `figures.curves`."""
    size = (2.3 * len(histories) + 1.2, 4.2)
    figure, axes = opened(2, len(histories), figsize=size, sharex=True, sharey="row", squeeze=False)
    for column, (form, history) in zip(axes.T, histories.items()):
        figures.draw_curves(column, history)
        column[0].set_title(form)
        column[1].set_xlabel("epoch")
    axes[0, 0].set(ylabel="loss of slabs\n(cross-entropy, nats)", ylim=(0, None))
    axes[1, 0].set(ylabel="accuracy\n(share of subjects)", ylim=(None, 1.01))
    axes[0, 0].legend(loc="lower left")
    folds = history["fold"].nunique()
    foot = f"thin: each of {folds} folds, bold: their mean" if folds > 1 else "one split"
    return finish(figure, title, f"{cohort} · {foot}; a subject by the mean of its log-odds")


@plt.rc_context(STYLE)
def slab_positions(background, affine, accuracy, *, title, cohort):
    """Accuracy of each slab along Y under the anatomy it lies in, slabs of one depth a column.

    The background (X, Y, Z) is the mean FA; `accuracy` are a column's label -> form -> table of
    `slabs.positions`.
    """
    shares = {"sharex": True, "squeeze": False, "height_ratios": (1.8, 1)}
    figure, axes = opened(2, len(accuracy), figsize=(5 * len(accuracy), 7), **shares)
    at = figures.centre(background, affine)
    for (above, below), (label, forms) in zip(axes.T, accuracy.items()):
        plane(above, background, affine, 0, at, cmap="gray", vmin=0)
        middles = next(iter(forms.values()))["mm"].to_numpy()
        half = np.diff(middles).mean() / 2 if len(middles) > 1 else 1
        for edge in (*(middles - half), middles[-1] + half):
            above.axvline(edge, color=PALE, linewidth=0.5)
        place = f"sagittal, x = {at[0]:.0f} mm".replace("-", "−")
        above.set(title=f"{label}\n{place}", ylabel="z (mm)")
        figures.letters(above, "AS", "white")
        for (form, table), (colour, dash) in zip(forms.items(), LINES):
            below.fill_between(table["mm"], table["low"], table["high"], color=colour, alpha=0.12)
            look = {"color": colour, "marker": ".", "label": form}
            below.plot(table["mm"], table["accuracy"], dash, **look)
        below.axhline(0.5, color=DARK, linewidth=0.9, linestyle=":", label="chance")
        below.set(xlabel="y (mm), posterior to anterior", ylim=(0.3, 1.02))
    axes[1, 0].set_ylabel("accuracy (share of subjects)")
    axes[1, 0].legend(loc="lower center", ncols=3)
    foot = f"{cohort} · shaded: 95 % Wilson interval of each slab; grey lines: edges of the slabs"
    return finish(figure, title, foot)


@plt.rc_context(STYLE)
def feature_bars(tables, *, title, cohort):
    """Women's and men's mean of every feature map, a panel a measure, marked where they differ.

    `tables` are axis label with its unit -> table of `features.compare`.
    """
    size = (max(7.5, 0.36 * max(map(len, tables.values())) + 1), 2.7 * len(tables))
    figure, axes = opened(len(tables), 1, figsize=size, squeeze=False)
    for ax, (label, table) in zip(axes[:, 0], tables.items()):
        for shift, name in ((-0.2, "women"), (0.2, "men")):
            look = {"width": 0.38, "color": PALETTE[name], "ecolor": DARK, "label": name}
            bars = {"yerr": table[f"{name}_half"], "error_kw": {"linewidth": 0.9}}
            ax.bar(table.index + shift, table[name], **bars, **look)
        top = np.maximum(*(table[name] + table[f"{name}_half"] for name in ("women", "men")))
        for row in table[table["tested"]].itertuples():
            if row.p < 0.05:
                weight = "bold" if row.holm < 0.05 else "normal"
                mark = "*" if row.t > 0 else "+"
                where = (row.Index, top[row.Index])
                place = {"xytext": (0, 2), "textcoords": "offset points", "ha": "center"}
                ax.annotate(mark, where, **place, weight=weight, size=12 if mark == "*" else 9)
        for place in table.index[~table["tested"]]:
            ax.text(place, 0, "constant", rotation=90, ha="center", va="bottom", fontsize=7)
        ax.set(ylabel=label, xticks=table.index, xlim=(-0.7, len(table) - 0.3))
        ax.margins(y=0.12)
    axes[-1, 0].set_xlabel("feature map of the first hidden layer")
    axes[0, 0].legend(loc="upper left", bbox_to_anchor=(1, 1))
    foot = (
        f"{cohort} · bars: mean of subjects ± 95 % t interval; Welch's t: * men higher, + women "
        "higher, p < .05 uncorrected, bold: Holm-corrected too"
    )
    return finish(figure, title, foot)


@plt.rc_context(STYLE)
def effect_sizes(tables, *, title, cohort):
    """Cohen's d of every feature map with its interval, a column a measure, a row a condition.

    `tables` are measure -> condition -> table of `features.compare`.
    """
    rows = list(next(iter(tables.values())))
    size = (8.4, 1.2 + 0.85 * len(rows))
    figure, axes = opened(1, len(tables), figsize=size, squeeze=False, sharex=True, sharey=True)
    for ax, (measure, conditions) in zip(axes[0], tables.items()):
        for row, table in enumerate(conditions.values()):
            table = table[table["tested"]].sort_values("d")
            places = row + np.linspace(-0.32, 0.32, len(table))
            sign = np.where(table["t"] > 0, PALETTE["men"], PALETTE["women"])
            sure = (table["holm"] < 0.05).to_numpy()
            ax.hlines(places, table["d_low"], table["d_high"], color=PALE, linewidth=0.9)
            face = np.where(sure, sign, "w")
            ax.scatter(table["d"], places, s=16, facecolor=face, edgecolor=sign)
        ax.axvline(0, color=DARK, linewidth=0.9, linestyle=":")
        ax.set(title=f"{measure} of the map", xlabel="Cohen's d (men − women)")
    axes[0, 0].set_yticks(range(len(rows)), rows)
    axes[0, 0].set_ylim(len(rows) - 0.5, -0.5)
    foot = (
        f"{cohort} · a dot a feature map, blue: men higher, orange: women higher, filled: p < .05 "
        "after Holm; lines: 95 % intervals of d"
    )
    return finish(figure, title, foot)


@plt.rc_context(STYLE)
def kernels(weights, *, title, cohort):
    """The first layer's kernels, (C, 3, 3, 3), a column a kernel, its axial planes from above."""
    count, limit = len(weights), np.abs(weights).max() or 1
    columns = min(count, 16)
    blocks = -(-count // columns)
    size = (0.55 * columns + 1.6, 1.85 * blocks + 0.9)
    figure, axes = opened(3 * blocks, columns, figsize=size, squeeze=False)
    for place in range(blocks * columns):
        block, column = divmod(place, columns)
        for row in range(3):
            ax = axes[3 * block + row, column]
            ax.set(xticks=[], yticks=[], frame_on=False)
            if place < count:
                layer = weights[place, :, :, 2 - row].T
                look = {"cmap": "PuOr", "vmin": -limit, "vmax": limit, "origin": "lower"}
                picture = ax.imshow(layer, **look)
                if row == 0:
                    ax.set_title(place, fontsize=8)
            if column == 0:
                ax.set_ylabel(("upper", "middle", "lower")[row], fontsize=7)
    bar = figure.colorbar(picture, ax=axes, label="weight", shrink=0.8, aspect=20)
    bar.ax.tick_params(labelsize=7)
    foot = f"{cohort} · each square: right of the brain to the right, anterior up; one voxel a side"
    return finish(figure, title, foot)


@plt.rc_context(STYLE)
def feature_maps(background, affine, maps, map_affine, chosen, *, title, cohort):
    """Women's and men's mean feature maps, and their difference over the mean FA.

    The background (X, Y, Z) is the mean FA; `maps` are of `features.mean_maps`, on the grid of
    `map_affine`; `chosen` are their numbers, which label the rows.
    """
    low, high = figures.box(background, affine)
    at = figures.centre(background, affine)
    widths, height = (high - low)[[0, 0, 0, 1, 0]], max((high - low)[1:])
    figure, axes = figures.grid([height] * len(chosen), widths, 9 / sum(widths))
    grey = {"cmap": "gray", "vmin": 0, "vmax": 1.4 * background.max()}
    shown = ("women", 2), ("men", 2), *(("men − women", axis) for axis in (2, 0, 1))
    for row, number, (women, men) in zip(axes, chosen, maps.swapaxes(0, 1)):
        change, top = men - women, max(women.max(), men.max()) or 1
        limit = np.abs(change).max() or 1
        faint = np.clip(3 * np.abs(change) / limit, 0, 1)
        for ax, (what, axis), width in zip(row, shown, widths):
            if what in PALETTE:
                look = {"cmap": "cividis", "vmin": 0, "vmax": top}
                mean = plane(ax, women if what == "women" else men, map_affine, axis, at, **look)
            else:
                plane(ax, background, affine, axis, at, **grey)
                index = round(apply_affine(np.linalg.inv(map_affine), at)[axis])
                look = {"cmap": "PuOr", "vmin": -limit, "vmax": limit}
                look["alpha"] = np.take(faint, index, axis).T
                apart = plane(ax, change, map_affine, axis, at, **look)
            figures.frame(ax, axis, at, (low + high) / 2, (width, height))
            if row[0] is axes[0, 0]:
                ax.set_title(what)
        row[0].set_ylabel(f"map {number}")
        figure.colorbar(mean, ax=row[:2], label="activation", shrink=0.8, pad=0.02)
        figure.colorbar(apart, ax=row[2:], label="men − women", shrink=0.8, pad=0.02)
    foot = "activation after ReLU, in the network's units; differences: faint where small"
    return finish(figure, title, f"{cohort} · {foot}")
