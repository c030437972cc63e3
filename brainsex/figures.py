"""Drawings that more than one notebook makes, or that take more than a few lines.

Volumes are (X, Y, Z) with a 4×4 affine to RAS mm; the left of the brain is on the left. `title`
stands at the head of a figure, `cohort`, name and n ("synthetic cohort, n=200"), at its foot; both
are among the `options` of a figure of brains, which are those of `brain_panels`.
"""

from collections.abc import Mapping, Sequence
from textwrap import fill

import numpy as np
import pandas as pd
from matplotlib import pyplot as plt
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from nibabel import Nifti1Image
from nilearn import plotting

PALETTE = {"women": "#D55E00", "men": "#0072B2"}  # colour-blind safe: Okabe and Ito's
OUTLINES = {"women": "#FF8C42", "men": "#56B4E9"}  # the same hues, legible on a dark brain
DARK, PALE, ACCENT, OUTLINE = "#222222", "#999999", "#009E73", "#56B4E9"
HUES = (DARK, "#E69F00", "#56B4E9", "#009E73", "#CC79A7", "#D55E00", "#0072B2", PALE)
MARKERS = "osDv^<>P"
CHANCE = {"color": DARK, "linewidth": 0.9, "linestyle": ":"}
ACCURACY = "accuracy (share of subjects)"
GLOW = plt.get_cmap("viridis")(np.linspace(0.5, 1, 256))
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


@plt.rc_context(STYLE)
def brain_panels(
    rows: Sequence[Sequence[Mapping]],
    *,
    title: str,
    cohort: str,
    width: float = 9,
    bar: tuple[str | ListedColormap, float, str] | None = None,
    outlines: Mapping[str, np.ndarray] | None = None,
) -> Figure:
    """Draw rows of panels by nilearn, `width` inches wide, each with some planes of an image.

    A panel has `label`, `planes` ("xyz", or one letter as often as there are cuts) and arguments of
    `nilearn.plotting.plot_stat_map`, at least `stat_map_img` and `cut_coords` in mm. `bar` is the
    colour map, top value and label of one colour bar, from 0, for all panels. `outlines` are the
    planted regions (X, Y, Z) bool that are higher in ``women`` and in ``men``, to be contoured.
    """
    image = rows[0][0]["stat_map_img"]
    extent = np.abs(image.affine[:3, :3]) @ image.shape  # mm
    widths = [sum(extent[int(axis == "x")] for axis in panel["planes"]) for panel in rows[0]]
    heights = [max(extent[1 if "z" in panel["planes"] else 2] for panel in row) for row in rows]
    size = (width + 0.8, width * sum(heights) / sum(widths) + 0.25 * len(rows) + 0.6)
    ratios = {"width_ratios": widths, "height_ratios": heights, "squeeze": False}
    ratios["subplot_kw"] = {"frame_on": False, "xticks": [], "yticks": []}
    figure, axes = new_figure(len(rows), len(rows[0]), figsize=size, **ratios)
    drawn = [*zip(axes.flat, (panel for row in rows for panel in row))]
    for ax, panel in drawn:
        ax.set_title(panel["label"])
    if bar:
        scale = plt.cm.ScalarMappable(plt.Normalize(0, bar[1]), bar[0])
        look = {"label": bar[2], "aspect": 25, "pad": 0.01, "shrink": min(0.8, 3.5 / size[1])}
        figure.colorbar(scale, ax=axes, **look).ax.set_facecolor("#444444")
    cohort += " · contours: planted, orange higher in women, blue in men" * bool(outlines)
    cohort += " · x, y, z in mm; L left, R right; sagittal: front to the right"
    finish(figure, title, cohort)
    figure.draw_without_rendering()  # nilearn reads where the axes are: nothing may move from here
    figure.set_layout_engine("none")
    for ax, panel in drawn:
        look = {name: panel[name] for name in panel.keys() - {"label", "planes"}}
        look["cut_coords"] = np.round(panel["cut_coords"])  # whole mm, as nilearn writes them
        look["display_mode"] = "ortho" if panel["planes"] == "xyz" else panel["planes"][0]
        display = plotting.plot_stat_map(axes=ax, **PANELS | look)
        for sex, regions in (outlines or {}).items():
            image = Nifti1Image(np.float32(regions), panel["stat_map_img"].affine)
            display.add_contours(image, levels=[0.5], colors=OUTLINES[sex], linewidths=1.2)
        display.annotate(size=8)
    return figure


@plt.rc_context(STYLE)
def training_curves(histories: Mapping[str, pd.DataFrame], *, title: str, cohort: str) -> Figure:
    """Draw loss and accuracy over epochs, a column a network, each fold thin and the mean bold.

    `histories` is network -> table with the columns fold, epoch, train_loss, validation_loss,
    train_accuracy and validation_accuracy.
    """
    size = {"figsize": (min(9, 2.6 * len(histories) + 2.9), 4.6), "squeeze": False}
    figure, axes = new_figure(2, len(histories), sharex=True, sharey="row", **size)
    parts = ("train", "training", PALE), ("validation", "held-out fold", ACCENT)
    for column, (name, history) in zip(axes.T, histories.items()):
        for ax, measure, chance in zip(column, ("loss", "accuracy"), (np.log(2), 0.5)):
            for part, label, colour in parts:
                curves = history.pivot(index="epoch", columns="fold", values=f"{part}_{measure}")
                ax.plot(curves, color=colour, linewidth=0.7, alpha=0.5)
                ax.plot(curves.mean(axis=1), color=colour, linewidth=2.2, label=label)
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
    label: str = ACCURACY,
    folds: pd.DataFrame | None = None,
    published: pd.DataFrame | None = None,
) -> Figure:
    """Draw scores with intervals: a line of dots a row, a colour and mark a kind.

    `table` has the columns `rows`, `hue`, accuracy (`label` on the axis), low, high and n.
    `folds`, one row a fold, and `published`, with sd too (NaN if unknown), have the first three.
    Raises ValueError for more kinds than colours.
    """
    names, kinds = (list(dict.fromkeys(table[column])) for column in (rows, hue))
    figure, ax = new_figure(figsize=(8.4, 1.5 + len(names) * (0.22 + 0.2 * len(kinds))))
    step = 0.8 / len(kinds)
    shifts = {kind: step * (n - (len(kinds) - 1) / 2) for n, kind in enumerate(kinds)}

    def heights(scores: pd.DataFrame) -> pd.Series:
        return scores[rows].map({n: y for y, n in enumerate(names)}) + scores[hue].map(shifts)

    for kind, colour, marker in zip(kinds, HUES[: len(kinds)], MARKERS[: len(kinds)], strict=True):
        scores = table[table[hue] == kind]
        ax.plot(scores["accuracy"], heights(scores), marker, color=colour, markersize=5, label=kind)
        ax.hlines(heights(scores), scores["low"], scores["high"], color=colour, linewidth=1.6)
        look = {"transform": ax.get_yaxis_transform(), "va": "center"}
        for y, row in zip(heights(scores), scores.itertuples()):
            ax.text(1.01, y, f"{row.accuracy:.2f}, n={row.n}", fontsize=8, **look)
        if folds is not None:
            dots = folds[folds[hue] == kind]
            ax.plot(dots["accuracy"], heights(dots) - 0.3 * step, ".", color=colour, alpha=0.4)
    if published is not None:
        look = {"xerr": published["sd"], "fmt": "d", "color": PALE, "label": "published", "ms": 4}
        ax.errorbar(published["accuracy"], heights(published) + 0.38 * step, **look)
    ax.axvline(0.5, **CHANCE)
    ax.set(xlabel=label, ylim=(len(names) - 0.5, -0.5))
    ax.set_yticks(range(len(names)), names)
    ax.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=3, fontsize=8)
    return finish(figure, title, cohort)
