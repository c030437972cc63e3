"""The first hidden layer: mean and entropy of each of its feature maps, tested between the sexes.

After Xin et al. 2019, Frontiers in Neuroscience 13:185. With h(b) the share of a map's voxels in
bin b, of 256 equal bins from the lowest to the highest value which that map takes in any subject,

    entropy = - sum_b h(b) log h(b), in nats.

The range of a feature map is the same for everybody: a subject's own would take away how far its
values spread. All voxels count, as in the study, those outside the brain too: so both numbers know
how much of the volume a head fills.
"""

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from nibabel.affines import from_matvec
from scipy import stats
from torch import Tensor

from brainsex import LABELS, evaluation, networks
from brainsex.networks import MriNet3d

BINS = 256
LEVEL = 0.05
PLANES = 4  # of the convolution's output at once, an even number: pooling pairs them


@dataclass(frozen=True)
class Features:
    """Of N subjects and the C feature maps of the first hidden layer, pooled: (N, C) float64."""

    mean: np.ndarray  # over the map's voxels
    entropy: np.ndarray  # nats; 0 where a map is constant in a subject


def summarise(network: MriNet3d, volumes: np.ndarray) -> Features:
    """Mean and entropy of every feature map, in two streamed passes: no map is kept.

    The layer runs in float64, in evaluation mode, and is left as it is: in float32, rounding moves
    voxels from one bin into the next, which was seen to change an entropy by 2e-4 nats. Volumes
    (N, X, Y, Z), perhaps memory-mapped, are finite and of its shape, or it is a ValueError.
    """
    _check(network, volumes)
    channels = network.hidden1[0].out_channels
    mean, entropy = np.empty((2, len(volumes), channels))
    low, high = np.full(channels, np.inf), np.full(channels, -np.inf)

    def extent(maps: Tensor, _) -> Tensor:
        maps = maps.flatten(2)
        return torch.stack([maps.amin(2), maps.amax(2), maps.mean(2)])

    for rows, (lowest, highest, average) in _each(network, volumes, extent):
        mean[rows] = average
        low, high = np.minimum(low, lowest.min(0)), np.maximum(high, highest.max(0))
    if bad := np.flatnonzero(~np.isfinite(mean).all(1)).tolist():
        raise ValueError(f"volumes {bad[:10]}: expected finite FA. Clean the volumes first.")
    width = np.where(high - low > 1e-12 * high, high - low, 1)  # rounding is no variation

    def disorder(maps: Tensor, _) -> Tensor:
        maps = maps.flatten(2)
        first, span = (torch.from_numpy(one[:, None]).to(maps) for one in (low, width))
        bins = (BINS * ((maps - first) / span)).long()
        bins.clamp_(0, BINS - 1)  # the highest value closes the last bin
        count, channels, voxels = bins.shape
        bins += BINS * torch.arange(count * channels, device=bins.device).view(count, channels, 1)
        counts = torch.bincount(bins.flatten(), minlength=BINS * count * channels)
        shares = counts.view(count, channels, BINS).double() / voxels
        return torch.special.entr(shares).sum(2)

    for rows, found in _each(network, volumes, disorder):
        entropy[rows] = found
    return Features(mean, entropy)


def mean_maps(
    network: MriNet3d, volumes: np.ndarray, sex: np.ndarray, maps: Sequence[int]
) -> np.ndarray:
    """Mean over women and over men of some feature maps, (2, maps, X', Y', Z') float64.

    They lie on the grid of `map_affine`. Raises as `summarise`.
    """
    _check(network, volumes)
    sex = _sexes(sex)

    def total(values: Tensor, rows: np.ndarray) -> Tensor:
        chosen = values[:, list(maps)]
        return torch.stack([chosen[sex[rows] == label].sum(0) for label in (0, 1)])

    sums = sum(found for _, found in _each(network, volumes, total))
    return sums / np.bincount(sex).reshape(2, 1, 1, 1, 1)


def map_affine(affine: np.ndarray) -> np.ndarray:
    """The (4, 4) affine, to mm, of the first layer's feature maps after pooling; it must be known.

    A voxel i of theirs is the maximum of the convolutions centred on voxels 2 i + 1 and 2 i + 2.
    """
    if affine is None:
        raise ValueError("expected an affine (4, 4), found none: cohort.load(folder, affine=…).")
    return affine @ from_matvec(2 * np.eye(3), [1.5] * 3)


def _check(network, volumes) -> None:
    if not isinstance(network, MriNet3d):
        raise ValueError(f"expected a MriNet3d, found a {type(network).__name__}.")
    if len(volumes) == 0 or tuple(volumes.shape[1:]) != network.shape:
        expected = ", ".join(map(str, network.shape))
        raise ValueError(f"expected volumes (N, {expected}), found {tuple(volumes.shape)}.")


def _each(network, volumes, measure: Callable) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Rows of each batch and `measure` of its maps (n, C, X', Y', Z') and rows, in their order."""
    device = networks.device()
    layer = networks.folded(copy.deepcopy(network).double()).hidden1.to(device)

    def some(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        batch = networks.batch(volumes, rows, device).double()
        starts = range(0, batch.shape[2] - 3, PLANES)  # few planes stay in the processor's cache
        maps = torch.cat([layer(batch[:, :, start : start + PLANES + 2]) for start in starts], 2)
        return rows, measure(maps, rows).cpu().numpy()

    return networks.in_batches(some, len(volumes), device)


def compare(values: np.ndarray, sex: np.ndarray) -> pd.DataFrame:
    """Test every feature map between women and men, two of each at least, by finite values (N, C).

    Returns
    -------
    One row a feature map: women, men (means over subjects) with women_half, men_half (half their
    95 % t intervals); d, d_low, d_high (Cohen's d, positive where men are higher, with the
    large-sample 95 % interval of Hedges and Olkin 1985); t, p (Welch); u, p_u (Mann-Whitney); holm,
    fdr, holm_u, fdr_u (p corrected over the maps, after Holm and after Benjamini and Hochberg).
    A map that varies within neither sex has ``tested`` False and no t, u, p or d (NaN).
    """
    values, sex = _checked(values, sex)
    groups = women, men = [values[sex == label] for label in (LABELS["F"], LABELS["M"])]
    counts = np.array([len(women), len(men)])
    means = [group.mean(0) for group in groups]
    spread = np.array([group.std(0, ddof=1) for group in groups])
    halves = [stats.t.ppf(1 - LEVEL / 2, n - 1) * sd / np.sqrt(n) for n, sd in zip(counts, spread)]
    names = ("women", "men", "women_half", "men_half")
    table = pd.DataFrame(dict(zip(names, (*means, *halves)))).rename_axis("map")
    pooled = np.sqrt((counts - 1) @ spread**2 / (counts.sum() - 2))
    tested = pooled > 1e-9 * np.abs(values).max(0)  # rounding is no variation
    table["tested"] = tested
    welch = stats.ttest_ind(men[:, tested], women[:, tested], equal_var=False)
    mann_whitney = stats.mannwhitneyu(men[:, tested], women[:, tested])
    d = (means[1] - means[0])[tested] / pooled[tested]
    half = stats.norm.ppf(1 - LEVEL / 2) * np.sqrt(
        counts.sum() / counts.prod() + d**2 / (2 * counts.sum())
    )
    found = {"d": d, "d_low": d - half, "d_high": d + half}
    for name, short, test in (("t", "", welch), ("u", "_u", mann_whitney)):
        p = test.pvalue
        found |= {name: test.statistic, f"p{short}": p, f"holm{short}": _holm(p)}
        found[f"fdr{short}"] = stats.false_discovery_control(p) if len(p) else p
    for name, column in found.items():
        table.loc[tested, name] = column
    return table


def counts(table: pd.DataFrame) -> dict[str, int]:
    """How many maps of `compare` differ at p < .05 by Welch's t: as published, and corrected."""
    differ = table["p"] < LEVEL
    found = {
        "not defined": ~table["tested"],
        "p < .05": differ,
        "men higher": differ & (table["t"] > 0),
        "women higher": differ & (table["t"] < 0),
        "Mann-Whitney p < .05": table["p_u"] < LEVEL,
        "Holm": table["holm"] < LEVEL,
        "FDR": table["fdr"] < LEVEL,
    }
    return {"maps": len(table)} | {name: int(which.sum()) for name, which in found.items()}


def shuffled(
    values: np.ndarray, sex: np.ndarray, *, groups=None, shuffles: int = 1000, seed: int = 0
) -> np.ndarray:
    """Share of the maps with p < .05 (Welch), uncorrected, for each of some shuffles of the sexes.

    `groups` as of `evaluation.shuffled`. The subjects must be new to the network, which otherwise
    knows their sex. Maps are correlated, so the share scatters by more than a binomial law allows:
    take intervals over the shuffles. Constant maps are left out; all of them raise a ValueError.
    """
    values, sex = _checked(values, sex)
    values = values[:, compare(values, sex)["tested"]]
    if values.shape[1] == 0:
        raise ValueError("expected a map that varies, found none.")
    generator, men = np.random.default_rng(seed), int(sex.sum())
    shares = []
    for block in np.array_split(np.arange(shuffles), -(-shuffles // 100)):  # memory
        labels = [evaluation.shuffled(sex, generator, groups) for _ in block]
        orders = np.argsort(-np.array(labels), axis=1, kind="stable")  # men first
        parts = values[orders[:, :men]], values[orders[:, men:]]  # (shuffles, n, C)
        shares.append((stats.ttest_ind(*parts, axis=1, equal_var=False).pvalue < LEVEL).mean(1))
    return np.concatenate(shares)


def _holm(p: np.ndarray) -> np.ndarray:
    """Holm 1979, Scand. J. Stat. 6:65."""
    order = np.argsort(p)
    steps = np.maximum.accumulate(np.arange(len(p), 0, -1) * p[order])
    return np.minimum(steps, 1)[np.argsort(order)]


def _checked(values: np.ndarray, sex: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    values, sex = np.asarray(values, float), _sexes(sex)
    bad = (~np.isfinite(values)).sum()
    if values.ndim != 2 or len(values) != len(sex) or bad:
        found = f"{values.shape}, {bad} of them not finite"
        raise ValueError(f"expected finite values ({len(sex)}, maps), found {found}.")
    return values, sex


def _sexes(sex: np.ndarray) -> np.ndarray:
    sex = np.asarray(sex)
    women, men = ((sex == LABELS[letter]).sum() for letter in "FM")
    if min(women, men) < 2 or women + men != len(sex):
        both = "labels 0 (women) and 1 (men), at least two of each"
        found = f"{women} women and {men} men among {len(sex)}"
        raise ValueError(f"expected {both}: found {found}.")
    return sex.astype(np.int64)
