"""Measures of any explanation, in 3D: is it right, does the network use it, is it there again?

Maps are (N, X, Y, Z) or one (X, Y, Z), large where the evidence is; `brain` (X, Y, Z) says which
voxels count. Where voxels are counted off, ties are broken at random, the same way every time, so
that a map with many zeros gains nothing from the order of voxels.
"""

from collections.abc import Sequence

import numpy as np
import pandas as pd
import torch
from scipy import stats
from sklearn.metrics import average_precision_score
from torch import nn

from brainsex import networks
from brainsex.perturbation import matching, replacement, targets, tensor

FRACTIONS = (0, 0.001, 0.0025, 0.005, 0.01, 0.02)
"""Shares of the brain at which deletion and insertion are measured: masks take about 1 %."""


def localisation(maps: np.ndarray, truth: np.ndarray, brain: np.ndarray) -> pd.DataFrame:
    """How well maps find what was planted.

    Parameters
    ----------
    maps : (N, X, Y, Z), finite.
    truth : (X, Y, Z) bool, where something was planted.

    Returns
    -------
    One row a map: average_precision, over the brain's voxels ranked by the map; base_rate, what a
    map that knows nothing has; pointing, whether the largest value is planted, or the share
    of the largest that is (Zhang et al. 2018, arXiv 1608.00507); mass_inside, the share of what is
    positive that is planted (0 of an empty map: it finds nothing).

    Raises
    ------
    ValueError
        Grids that differ, no planted voxel in the brain, or a map that is not finite.
    """
    if maps.shape[1:] != truth.shape or truth.shape != brain.shape:
        raise ValueError(
            f"expected maps (N, X, Y, Z) and truth and brain (X, Y, Z) on one grid, found "
            f"{maps.shape}, {truth.shape} and {brain.shape}."
        )
    inside = truth[brain]
    if not inside.any():
        raise ValueError("expected planted voxels in the brain, found none.")
    rows = []
    for values in maps[:, brain]:
        _finite(values)
        positive = values.clip(0)
        total = positive.sum(dtype=float)
        rows.append(
            {
                "average_precision": average_precision_score(inside, values),
                "base_rate": inside.mean(),
                "pointing": inside[values == values.max()].mean(),
                "mass_inside": positive[inside].sum(dtype=float) / total if total else 0.0,
            }
        )
    return pd.DataFrame(rows)


def top(saliency: np.ndarray, brain: np.ndarray, voxels: int) -> np.ndarray:
    """The brain's voxels where a map (X, Y, Z) is largest, exactly so many, as bool (X, Y, Z)."""
    if not 0 <= voxels <= np.count_nonzero(brain):
        raise ValueError(f"expected 0 to {np.count_nonzero(brain)} voxels, found {voxels}.")
    chosen = np.zeros(brain.size, bool)
    chosen[_order(saliency, brain)[:voxels]] = True
    return chosen.reshape(brain.shape)


def _order(saliency: np.ndarray, brain: np.ndarray) -> np.ndarray:
    """Flat indices of the brain's voxels, the largest value first."""
    _finite(saliency[brain])
    where = np.random.default_rng(0).permutation(np.flatnonzero(brain))
    return where[np.argsort(-saliency.ravel()[where], kind="stable")]


def _finite(values: np.ndarray) -> None:
    if not np.isfinite(values).all():
        raise ValueError("expected a finite map, found NaN or infinity in the brain.")


def faithfulness(
    network: nn.Module,
    volumes: np.ndarray,
    maps: np.ndarray,
    brain: np.ndarray,
    *,
    target: int | np.ndarray,
    fractions: Sequence[float] = FRACTIONS,
    reference: np.ndarray | None = None,
    insertion: bool = True,
    progress: bool = True,
) -> dict[str, np.ndarray]:
    """Deletion and insertion: the target's probability as a map's first voxels go, or come back.

    Petsiuk et al. 2018, arXiv 1806.07421. Deletion starts from the volume and replaces the voxels
    with the largest saliency by the reference; insertion starts from the reference. Every map takes
    the same number of voxels, so methods are compared at equal volume.

    Parameters
    ----------
    volumes, maps : (N, X, Y, Z).
    target : class whose probability is followed, for all or (N,).
    fractions : shares of the brain's voxels, increasing.
    reference : as in `perturbation.optimise_masks`; by default the blur of 5 voxels.
    insertion : whether that is measured, too, which takes as long again.

    Returns
    -------
    deletion, insertion : (N, fractions) probabilities; deletion_area, insertion_area : (N,), their
        mean over the fractions (trapezoids): low is good in the first, high in the second.

    Raises
    ------
    ValueError
        Other shapes, a target that is no class, fractions that do not increase from 0 to 1 at
        most, or a map, volume or reference that is not finite.
    """
    steps = np.asarray(fractions, float)
    if len(steps) < 2 or not (np.diff(steps) > 0).all() or steps[0] < 0 or steps[-1] > 1:
        raise ValueError(f"expected fractions that increase within [0, 1], found {fractions}.")
    if maps.shape != volumes.shape or brain.shape != volumes.shape[1:]:
        raise ValueError(
            f"expected maps and volumes (N, X, Y, Z) and a brain on one grid, found {maps.shape}, "
            f"{volumes.shape} and {brain.shape}."
        )
    if reference is not None:
        reference = matching(reference, volumes, "a reference")
    target = targets(target, volumes)
    counts = np.rint(steps * np.count_nonzero(brain)).astype(int)
    device = networks.device()
    plain = networks.frozen(network, device)

    @torch.no_grad()
    def both(rows: np.ndarray) -> np.ndarray:
        volume = tensor(volumes, rows, device)
        other = replacement(reference, rows, volume)
        order = torch.from_numpy(_order(maps[rows[0]], brain)).to(device)
        curves = []
        for start, end in ((volume, other), (other, volume))[: 1 + insertion]:
            seen = start.repeat(len(counts), 1, 1, 1, 1)
            for step, count in zip(seen, counts):
                step.view(-1)[order[:count]] = end.reshape(-1)[order[:count]]
            logits = networks.by_subject(networks.passes(plain, seen))
            curves.append(logits.softmax(1)[:, int(target[rows[0]])].cpu().numpy())
        return np.array(curves)

    name = "deletion and insertion" if progress else None
    curves = list(networks.in_batches(both, len(volumes), device, name=name, size=1))
    curves = np.array(curves).reshape(-1, 1 + insertion, len(steps))
    areas = np.trapezoid(curves, steps, axis=2) / (steps[-1] - steps[0])
    names = ("deletion", "insertion")[: 1 + insertion]
    found = {name: curves[:, number] for number, name in enumerate(names)}
    return found | {f"{name}_area": areas[:, number] for number, name in enumerate(names)}


def interval(values: np.ndarray, strata: np.ndarray | None = None) -> tuple[float, float, float]:
    """Mean over subjects and its 95 % percentile bootstrap interval (Efron 1979).

    Subjects are drawn, networks are not: it says how another sample of subjects would come out.
    They are drawn within `strata` (N,), of which so many were chosen each, such as fold and sex.
    NaN, and no subjects, are a ValueError.
    """
    values = np.asarray(values, float)
    if len(values) == 0 or not np.isfinite(values).all():
        raise ValueError(f"expected finite values of subjects, found {values}.")
    rng, drawn = np.random.default_rng(0), np.empty((2000, len(values)))
    for rows in _strata(strata, len(values)):
        drawn[:, rows] = rng.choice(values[rows], (2000, len(rows)))
    low, high = np.quantile(drawn.mean(1), (0.025, 0.975))
    return float(values.mean()), float(low), float(high)


def _strata(strata: np.ndarray | None, count: int) -> list[np.ndarray]:
    """The rows of each stratum."""
    _, number = np.unique(np.zeros(count) if strata is None else strata, return_inverse=True)
    return [np.flatnonzero(number == one) for one in range(number.max() + 1)]


def group_interval(
    maps: np.ndarray, truth: np.ndarray, brain: np.ndarray, strata: np.ndarray | None = None
) -> tuple[float, float, float]:
    """Average precision of the mean of maps (N, X, Y, Z), with its 95 % interval over subjects.

    By the jackknife (Efron and Stein 1981), of `strata` (N,) as in `interval`: the mean map without
    each subject in turn, the others of its stratum weighted up, so that signed maps of men and
    women stay in balance. One subject a stratum has no interval: NaN. `truth` and `brain`
    (X, Y, Z) bool.
    """

    def precision(total: np.ndarray) -> float:
        return float(localisation(total[None], truth, brain)["average_precision"][0])

    total, variance, freedom = maps.sum(0, dtype=np.float64), 0.0, 0
    whole = precision(total)
    for rows in _strata(strata, len(maps)):
        if (count := len(rows)) > 1:
            own = maps[rows].sum(0, dtype=np.float64)
            without = [
                precision(total - own + (own - maps[row]) * count / (count - 1)) for row in rows
            ]
            variance += (count - 1) * np.var(without)
            freedom += count - 1
    half = stats.t.ppf(0.975, freedom) * np.sqrt(variance) if freedom else np.nan
    return whole, float(whole - half), float(whole + half)


def dice(first: np.ndarray, second: np.ndarray) -> float:
    """2 |A ∩ B| / (|A| + |B|) of two bool arrays; of two empty ones NaN.

    Counting the voxels on which they agree, background included, gives .94 for two disjoint masks
    of 3 %.
    """
    total = np.count_nonzero(first) + np.count_nonzero(second)
    return 2 * np.count_nonzero(first & second) / total if total else np.nan


def similarity(
    first: np.ndarray,
    second: np.ndarray,
    brain: np.ndarray,
    *,
    share: float = 0.02,
    permutations: int = 0,
    seed: int = 0,
) -> dict[str, float]:
    """Spearman's correlation of two maps in the brain, and Dice of their first voxels.

    Neighbouring voxels are no independent draws, so shuffling voxels would call any two smooth maps
    alike. The null of Dice moves one map by a random distance along each axis, around the brain's
    box (toroidal shift: Lotwick and Silverman 1982, J. R. Stat. Soc. B 44:406), which keeps its
    smoothness and changes where it lies. The correlation has no test: a move also takes apart that
    two maps fall off at the brain's edge, so that unrelated ones would be called alike. Dice of the
    first voxels suffers little: of 150 such pairs 7 % came out below .05, 13 % of slow falls.

    Parameters
    ----------
    first, second : (X, Y, Z).
    share : of the brain's voxels whose Dice is taken: the same number in both, fewer where a map
        has fewer above its lowest value.
    permutations : moves; 0 for no test.

    Returns
    -------
    spearman, dice, and with a test dice_p, one-sided: (1 + moves as similar, or of no Dice) /
    (1 + moves); NaN where a map is constant.
    """
    corners = np.argwhere(brain)
    box = tuple(slice(low, high + 1) for low, high in zip(corners.min(0), corners.max(0)))
    first, second, brain = first[box], second[box], brain[box]
    most = round(share * np.count_nonzero(brain))

    def above(saliency: np.ndarray) -> int:
        # ties at the bottom are no agreement: both take as many as the emptier map has above it
        return int((saliency[brain] > saliency[brain].min()).sum())

    order, most = _order(first, brain), min(most, above(first))

    def overlap(other: np.ndarray) -> float:
        voxels, chosen = min(most, above(other)), np.zeros(brain.size, bool)
        chosen[order[:voxels]] = True
        return dice(chosen.reshape(brain.shape), top(other, brain, voxels))

    flat = np.ptp(first[brain]) == 0 or np.ptp(second[brain]) == 0
    ranks = [stats.rankdata(one[brain]) for one in (first, second)]
    spearman = np.nan if flat else np.corrcoef(*ranks)[0, 1]
    found = {"spearman": float(spearman), "dice": float(overlap(second))}
    if permutations:
        rng = np.random.default_rng(seed)
        moves = [rng.integers(0, brain.shape) for _ in range(permutations)]
        null = np.array([overlap(np.roll(second, move, (0, 1, 2))) for move in moves])
        p = (1 + (~(null < found["dice"])).sum()) / (1 + permutations)
        found["dice_p"] = np.nan if np.isnan(found["dice"]) else float(p)
    return found
