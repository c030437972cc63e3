"""The first hidden layer: mean and entropy of its feature maps, tested between the sexes.

After Xin et al. 2019, Frontiers in Neuroscience 13:185. With h(b) the share of a map's voxels in
bin b, of 256 equal bins from the lowest to the highest value that the map takes in any subject,

    entropy = - sum_b h(b) log h(b), in nats.

All voxels count, as in the study, also those outside the brain: both numbers know head size.
"""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from nibabel.affines import from_matvec
from scipy import stats
from torch import Tensor

from brainsex import LABELS, evaluation, networks, speed

BINS = 256
ALPHA = 0.05
PLANES = 4  # of the convolution's output at once: an even number, pooling pairs them


@dataclass(frozen=True)
class FeatureSummary:
    """Mean over voxels and entropy in nats, (N subjects, C feature maps)."""

    mean: np.ndarray
    entropy: np.ndarray


def summarise(network: networks.MriNet3d, volumes: np.ndarray) -> FeatureSummary:
    """Compute mean and entropy of every feature map of volumes (N, X, Y, Z), in two passes.

    No map is kept. The layer runs in float64: in float32, rounding moves voxels from one bin into
    the next, which was seen to change an entropy by 2e-4 nats. A constant map has entropy 0. Raises
    ValueError for another network or shape, and for volumes that are not finite.
    """

    def extremes(maps: Tensor, _: np.ndarray) -> Tensor:
        maps = maps.flatten(2)
        return torch.stack([maps.amin(2), maps.amax(2), maps.mean(2)])

    lowest, highest, mean = np.concatenate(_measure_maps(network, volumes, extremes), 1)
    if bad := np.flatnonzero(~np.isfinite(mean).all(1)).tolist():
        raise ValueError(f"volumes {bad[:10]}: expected finite FA; clean the volumes first")
    low, high = lowest.min(0), highest.max(0)
    width = np.where(high - low > 1e-12 * high, high - low, 1)  # rounding is no variation

    def entropies(maps: Tensor, _: np.ndarray) -> Tensor:
        maps = maps.flatten(2)
        start, span = (torch.from_numpy(limit[:, None]).to(maps) for limit in (low, width))
        bins = (BINS * ((maps - start) / span)).long()
        bins.clamp_(0, BINS - 1)  # the highest value closes the last bin
        count, channels, voxels = bins.shape
        bins += BINS * torch.arange(count * channels, device=bins.device).view(count, channels, 1)
        counts = torch.bincount(bins.flatten(), minlength=BINS * count * channels)
        return torch.special.entr(counts.view(count, channels, BINS).double() / voxels).sum(2)

    return FeatureSummary(mean, np.concatenate(_measure_maps(network, volumes, entropies)))


def mean_feature_maps(
    network: networks.MriNet3d, volumes: np.ndarray, sex: np.ndarray, maps: Sequence[int]
) -> np.ndarray:
    """Average chosen maps over women and men: (2, maps, X', Y', Z') on the grid of `map_affine`."""

    def sums(values: Tensor, rows: np.ndarray) -> Tensor:
        chosen = values[:, list(maps)]
        return torch.stack([chosen[sex[rows] == label].sum(0) for label in (0, 1)])

    return sum(_measure_maps(network, volumes, sums)) / np.bincount(sex).reshape(2, 1, 1, 1, 1)


def map_affine(affine: np.ndarray) -> np.ndarray:
    """Return the (4, 4) affine, to mm, of the pooled feature maps of volumes with `affine`.

    Voxel i of a map is the maximum of the convolutions centred on voxels 2 i + 1 and 2 i + 2.
    """
    if affine is None:
        raise ValueError("expected an affine (4, 4), found none; use cohort.load(folder, affine=…)")
    return affine @ from_matvec(2 * np.eye(3), [1.5] * 3)


def _measure_maps(
    network: networks.MriNet3d, volumes: np.ndarray, measure: Callable
) -> list[np.ndarray]:
    """Return `measure` of each batch's maps (n, C, X', Y', Z') and rows (n,), batch after batch."""
    if not isinstance(network, networks.MriNet3d):
        raise ValueError(f"expected a MriNet3d, found a {type(network).__name__}")
    if len(volumes) == 0 or tuple(volumes.shape[1:]) != network.shape:
        expected = ", ".join(map(str, network.shape))
        raise ValueError(f"expected volumes (N, {expected}), found {tuple(volumes.shape)}")
    device = networks.device()
    layer = speed.inference_copy(copy.deepcopy(network).double(), device).hidden1

    def work(rows: np.ndarray) -> np.ndarray:
        batch = speed.read_batch(volumes, rows, device).double()
        starts = range(0, batch.shape[2] - 3, PLANES)  # few planes stay in the processor's cache
        maps = torch.cat([layer(batch[:, :, start : start + PLANES + 2]) for start in starts], 2)
        return measure(maps, rows).cpu().numpy()

    return list(speed.map_batches(work, len(volumes), device))


def compare_sexes(values: np.ndarray, sex: np.ndarray) -> pd.DataFrame:
    """Test every feature map between women and men on values (N, C), one row a map.

    Columns: women, men (means) with women_half, men_half (half their 95 % t intervals); d, d_low,
    d_high (Cohen's d, positive where men are higher, with the 95 % interval of Hedges and Olkin
    1985); t, p (Welch); u, p_u (Mann-Whitney); holm, fdr, holm_u, fdr_u (p corrected over maps,
    after Holm 1979 and after Benjamini and Hochberg 1995). A map that varies within neither sex has
    ``tested`` False and no test (NaN). Raises ValueError for values that are not finite, and for
    fewer than two women or men.
    """
    values, sex = _check_values(values, sex)
    women, men = groups = [values[sex == label] for label in (LABELS["F"], LABELS["M"])]
    counts = np.array([len(women), len(men)])
    means = [group.mean(0) for group in groups]
    spread = np.array([group.std(0, ddof=1) for group in groups])
    halves = [stats.t.ppf(1 - ALPHA / 2, n - 1) * sd / np.sqrt(n) for n, sd in zip(counts, spread)]
    names = ("women", "men", "women_half", "men_half")
    table = pd.DataFrame(dict(zip(names, (*means, *halves)))).rename_axis("map")
    pooled = np.sqrt((counts - 1) @ spread**2 / (counts.sum() - 2))
    tested = pooled > 1e-9 * np.abs(values).max(0)  # rounding is no variation
    table["tested"] = tested
    d = (means[1] - means[0])[tested] / pooled[tested]
    variance = counts.sum() / counts.prod() + d**2 / (2 * counts.sum())
    half = stats.norm.ppf(1 - ALPHA / 2) * np.sqrt(variance)
    columns = {"d": d, "d_low": d - half, "d_high": d + half}
    welch = stats.ttest_ind(men[:, tested], women[:, tested], equal_var=False)
    mann_whitney = stats.mannwhitneyu(men[:, tested], women[:, tested])
    for name, suffix, test in (("t", "", welch), ("u", "_u", mann_whitney)):
        p = test.pvalue
        columns |= {name: test.statistic, f"p{suffix}": p, f"holm{suffix}": _holm(p)}
        columns[f"fdr{suffix}"] = stats.false_discovery_control(p) if len(p) else p
    for name, column in columns.items():
        table.loc[tested, name] = column
    return table


def count_differences(table: pd.DataFrame) -> dict[str, int]:
    """Count the maps of `compare_sexes` that differ at p < .05, as published and corrected."""
    differ = table["p"] < ALPHA
    rows = {
        "not defined": ~table["tested"],
        "p < .05": differ,
        "men higher": differ & (table["t"] > 0),
        "women higher": differ & (table["t"] < 0),
        "Mann-Whitney p < .05": table["p_u"] < ALPHA,
        "Holm": table["holm"] < ALPHA,
        "FDR": table["fdr"] < ALPHA,
    }
    return {"maps": len(table)} | {name: int(chosen.sum()) for name, chosen in rows.items()}


def permuted_shares(
    values: np.ndarray,
    sex: np.ndarray,
    *,
    groups: np.ndarray | None = None,
    permutations: int = 1000,
    seed: int = 0,
) -> np.ndarray:
    """Return the share of maps with p < .05 (Welch, uncorrected) in each permutation of the labels.

    The subjects must be new to the network, which otherwise knows their sex. Families (`groups`)
    are exchanged as a whole. Maps are correlated, so the share scatters by more than a binomial law
    allows. Constant maps are left out; a ValueError where none varies, or as in `compare_sexes`.
    """
    values, sex = _check_values(values, sex)
    values = values[:, compare_sexes(values, sex)["tested"]]
    if values.shape[1] == 0:
        raise ValueError("expected a map that varies, found none")
    rng, men = np.random.default_rng(seed), int(sex.sum())
    labels = [evaluation.permuted_labels(sex, rng, groups) for _ in range(permutations)]
    orders = np.argsort(-np.array(labels), axis=1, kind="stable")  # men first
    groups = values[orders[:, :men]], values[orders[:, men:]]  # (permutations, n, C)
    return (stats.ttest_ind(*groups, axis=1, equal_var=False).pvalue < ALPHA).mean(1)


def _holm(p: np.ndarray) -> np.ndarray:
    """Correct p values after Holm 1979, Scand. J. Stat. 6:65."""
    order = np.argsort(p)
    steps = np.maximum.accumulate(np.arange(len(p), 0, -1) * p[order])
    return np.minimum(steps, 1)[np.argsort(order)]


def _check_values(values: np.ndarray, sex: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return finite values (N, C) and labels (N,) of two women and two men at least."""
    values, sex = np.asarray(values, float), np.asarray(sex)
    women, men = ((sex == LABELS[letter]).sum() for letter in "FM")
    if min(women, men) < 2 or women + men != len(sex):
        raise ValueError(
            "expected labels 0 (women) and 1 (men), at least two of each, found "
            f"{women} women and {men} men among {len(sex)}"
        )
    if values.ndim != 2 or len(values) != len(sex) or not np.isfinite(values).all():
        bad = f"{values.shape}, {(~np.isfinite(values)).sum()} of them not finite"
        raise ValueError(f"expected finite values ({len(sex)}, maps), found {bad}")
    return values, sex.astype(np.int64)
