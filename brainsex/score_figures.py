"""Drawings of scores and of the features behind them: notebooks 01 and 08.

Figures are returned for the caller to save; title and cohort as in `brainsex.figures`.
"""

import numpy as np
from matplotlib import pyplot as plt
from scipy.stats import gaussian_kde

from brainsex.evaluation import wilson
from brainsex.figures import DARK, PALE, PALETTE, STYLE, finish, opened

HUES = (DARK, "#E69F00", "#56B4E9", "#009E73", "#CC79A7")  # of Okabe and Ito's set
MARKS = "osDv^"
SHARE = "accuracy (share of subjects)"
GROUPS = 6  # of subjects ordered by a confound


@plt.rc_context(STYLE)
def dots(table, *, rows, hue, title, cohort, value="accuracy", label=SHARE, published=None):
    """Scores with intervals: a line of dots a row, a colour and mark a kind.

    The table has columns `rows`, `hue`, `value` (`label` on the axis) and, where there is an
    interval, low and high; `published` are (row, kind) -> (value, standard deviation or None).
    """
    names, kinds = (list(dict.fromkeys(table[column])) for column in (rows, hue))
    _enough(kinds)
    step = 0.8 / len(kinds)
    height = 1.5 + len(names) * (0.22 + 0.2 * len(kinds))
    figure, ax = opened(1, 1, figsize=(8.4, height))
    place = {
        (name, kind): y + step * (n - (len(kinds) - 1) / 2)
        for y, name in enumerate(names)
        for n, kind in enumerate(kinds)
    }
    for kind, colour, mark in zip(kinds, HUES, MARKS):
        some = table[table[hue] == kind]
        at = [place[name, kind] for name in some[rows]]
        if "low" in some:
            ax.hlines(at, some["low"], some["high"], color=colour, linewidth=1.6)
        ax.plot(some[value], at, mark, color=colour, markersize=5, label=kind)
        for y, number in zip(at, some[value]):
            ax.text(1.01, y, f"{number:.3f}", transform=ax.get_yaxis_transform(), va="center",
                    fontsize=7, color=colour)  # fmt: skip
    for (name, kind), (number, deviation) in (published or {}).items():
        y = place[name, kind] + 0.38 * step
        ax.errorbar(number, y, xerr=deviation, fmt="d", color=PALE, markersize=4, linewidth=1)
    if published:
        ax.plot([], [], "d", color=PALE, markersize=4, label="published")
    ax.axvline(0.5, color=DARK, linewidth=0.9, linestyle=":")
    ax.set(xlabel=label, ylim=(len(names) - 0.5, -0.5))
    ax.set_yticks(range(len(names)), names)
    ax.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=3, fontsize=8)
    return finish(figure, title, cohort)


@plt.rc_context(STYLE)
def neighbours(sweeps, *, title, cohort):
    """Accuracy of k nearest neighbours against k, a line a protocol, its best k ringed."""
    _enough(sweeps)
    figure, ax = opened(1, 1, figsize=(7, 3.6))
    for (name, accuracy), colour in zip(sweeps.items(), HUES):
        ks, best = np.arange(1, len(accuracy) + 1), int(accuracy.argmax())
        label = f"{name}: best k = {best + 1}, {accuracy[best]:.3f}"
        ax.plot(ks, accuracy, color=colour, linewidth=1.3, label=label)
        ax.plot(best + 1, accuracy[best], "o", color=colour, mfc="none", ms=9)
    ax.set(xlabel="k, number of neighbours", ylabel=SHARE, xlim=(0, None))
    ax.legend(fontsize=8)
    return finish(figure, title, cohort)


@plt.rc_context(STYLE)
def strongest(table, *, count, label, title, cohort):
    """The strongest of `classifiers.importances`: weight (`label`), and loss without them."""
    some = table.head(count)
    figure, axes = opened(1, 2, figsize=(9, 1.6 + 0.19 * count), sharey=True)
    colours, y = some["higher_in"].map(PALETTE), np.arange(len(some))
    columns = ("Importance", "spread"), ("permutation", "permutation_spread")
    for ax, (value, spread) in zip(axes, columns):
        ax.barh(y, some[value], color=colours, height=0.7)
        ax.errorbar(some[value], y, xerr=some[spread], fmt="none", ecolor=DARK, elinewidth=0.8)
    axes[0].set(xlabel=label, ylim=(len(some) - 0.4, -0.6))
    axes[0].set_yticks(y, some["Region_name"].str.removeprefix("FS_"), fontsize=7)
    axes[1].axvline(0, color=DARK, linewidth=0.8)
    axes[1].set_xlabel("loss of AUC when permuted")
    for sex, colour in PALETTE.items():
        axes[1].barh(0, 0, color=colour, label=f"higher in {sex}")
    axes[1].legend(loc="lower right", fontsize=8)
    return finish(figure, title, f"{cohort} · bars: mean over folds, lines: ± standard deviation")


@plt.rc_context(STYLE)
def overlap(size, sex, right, *, label, title, cohort):
    """How men and women overlap in a confound, and who is right about whom.

    Subjects are ordered by how typical the confound `size` (N,), named by `label`, is for their
    sex: the share that their own sex's density has of both. A classifier that reads nothing else is
    wrong on the left and right on the right; one that does not depend on it is level. `right` are
    name -> (N,) bool, whether it was right about each held-out subject.
    """
    figure, axes = opened(1, 2, figsize=(9.6, 3.6), width_ratios=(1, 1.15))
    grid = np.linspace(size.min(), size.max(), 200)
    density = [gaussian_kde(size[sex == label_]) for label_ in (0, 1)]
    for (name, colour), curve, label_ in zip(PALETTE.items(), density, (0, 1)):
        axes[0].fill_between(grid, curve(grid), color=colour, alpha=0.25)
        axes[0].plot(grid, curve(grid), color=colour, label=f"{name}, n={(sex == label_).sum()}")
    axes[0].set(xlabel=label, ylabel="density", ylim=(0, None), yticks=[])
    axes[0].legend()
    at = np.stack([curve(size) for curve in density])
    typical = at[sex, np.arange(len(sex))] / at.sum(0)
    groups = np.array_split(np.argsort(typical, kind="stable"), GROUPS)
    middle = np.array([typical[rows].mean() for rows in groups])
    for (name, correct), colour, mark in zip(right.items(), HUES, MARKS):
        shares = np.array([correct[rows].mean() for rows in groups])
        limits = np.array([wilson(int(correct[rows].sum()), len(rows)) for rows in groups]).T
        error = np.abs(limits - shares)
        look = {"fmt": f"-{mark}", "color": colour, "ms": 5, "capsize": 2, "label": name}
        axes[1].errorbar(middle, shares, yerr=error, **look)
    axes[1].axhline(0.5, color=DARK, linewidth=0.9, linestyle=":")
    axes[1].axvline(0.5, color=PALE, linewidth=0.9, linestyle=":")
    axes[1].set(xlim=(0, 1), ylim=(-0.02, 1.02), ylabel=SHARE)
    axes[1].set_xlabel("how typical for their own sex\n(0: the other sex's, 1: their own)")
    axes[1].legend(fontsize=8, loc="lower right")
    return finish(figure, title, f"{cohort} · right: {GROUPS} groups of equal size, Wilson 95 %")


def _enough(kinds):
    if len(kinds) > len(HUES):
        raise ValueError(f"expected at most {len(HUES)} kinds, found {len(kinds)}.")
