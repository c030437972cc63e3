"""The first hidden layer: mean and entropy of its feature maps, tested between the sexes.

After Xin et al. 2019, Frontiers in Neuroscience 13:185. With h(b) the share of a map's voxels in
bin b, of 256 equal bins from the lowest to the highest value that the map takes in any subject,

    entropy = - sum_b h(b) log h(b), in nats.

All voxels count, as in the study: both numbers know head size.
"""

from collections.abc import Callable

import numpy as np
import pandas as pd
import torch
from scipy import stats
from torch import Tensor

from brainsex import LABELS, networks, speed

BINS = 256


def summarise(network: networks.MriNet3d, volumes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Compute mean and entropy in nats, (N, C), of the C feature maps of volumes (N, X, Y, Z).

    The layer runs in float64: in float32, rounding moves voxels from one bin into the next, which
    was seen to change an entropy by 2e-4 nats. A constant map has entropy 0. Raises ValueError for
    another network or shape.
    """

    def extremes(maps: Tensor) -> Tensor:
        return torch.stack([maps.amin(2), maps.amax(2), maps.mean(2)], 2)

    lowest, highest, mean = np.moveaxis(_measure_maps(network, volumes, extremes), 2, 0)
    low, high = lowest.min(0), highest.max(0)
    width = np.where(high - low > 1e-12 * high, high - low, 1)  # rounding is no variation

    def entropies(maps: Tensor) -> Tensor:
        start, span = (torch.from_numpy(limit[:, None]).to(maps) for limit in (low, width))
        bins = (BINS * ((maps - start) / span)).long()
        bins.clamp_(0, BINS - 1)  # the highest value closes the last bin
        count, channels, voxels = bins.shape
        bins += BINS * torch.arange(count * channels, device=bins.device).view(count, channels, 1)
        counts = torch.bincount(bins.flatten(), minlength=BINS * count * channels)
        return torch.special.entr(counts.view(count, channels, BINS).double() / voxels).sum(2)

    return mean, _measure_maps(network, volumes, entropies)


def _measure_maps(network: networks.MriNet3d, volumes: np.ndarray, measure: Callable) -> np.ndarray:
    """Return `measure` (N, …) of all volumes' maps, which it takes in batches (n, C, voxels)."""
    layer = speed.inference_copy(network, networks.device(), fuse=False).double().hidden1

    def compute(batch: Tensor) -> Tensor:
        networks.check_input(batch, network.shape)
        return measure(layer(batch.double()).flatten(2))

    return speed.map_volumes(compute, volumes).cpu().numpy()


def compare_sexes(values: np.ndarray, sex: np.ndarray) -> pd.DataFrame:
    """Test every feature map between women and men on values (N, C), one row a map.

    Columns: women, men (means); d, d_low, d_high (Cohen's d, positive where men are higher, with
    the 95 % interval of Hedges and Olkin 1985); t, p (Welch); fdr (p corrected over maps after
    Benjamini and Hochberg 1995); p_u (Mann-Whitney). A map that varies within neither sex, or of
    fewer than two women or men, has ``tested`` False and no test (NaN).
    """
    values, sex = np.asarray(values, float), np.asarray(sex)
    counts = np.array([(sex == LABELS[letter]).sum() for letter in "FM"])
    women, men = groups = [values[sex == LABELS[letter]] for letter in "FM"]
    spread = np.array([group.std(0, ddof=1) for group in groups])
    table = pd.DataFrame({"women": women.mean(0), "men": men.mean(0)}).rename_axis("map")
    pooled = np.sqrt((counts - 1) @ spread**2 / (counts.sum() - 2))
    table["tested"] = tested = pooled > 1e-9 * np.abs(values).max(0)  # rounding is no variation
    d = (table["men"] - table["women"]).to_numpy()[tested] / pooled[tested]
    variance = counts.sum() / counts.prod() + d**2 / (2 * counts.sum())
    half = stats.norm.ppf(0.975) * np.sqrt(variance)
    t, p = stats.ttest_ind(men[:, tested], women[:, tested], equal_var=False)
    fdr = stats.false_discovery_control(p) if len(p) else p
    tests = {"d": d, "d_low": d - half, "d_high": d + half, "t": t, "p": p, "fdr": fdr}
    tests["p_u"] = stats.mannwhitneyu(men[:, tested], women[:, tested]).pvalue
    return table.join(pd.DataFrame(tests, index=table.index[tested]))
