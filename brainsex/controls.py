"""What explanations are held to: random weights and regions, learning without one, a t test."""

import copy
from collections.abc import Callable, Iterator

import nibabel as nib
import numpy as np
import pandas as pd
import torch
from nilearn.maskers import NiftiMasker
from nilearn.mass_univariate import permuted_ols
from scipy.ndimage import gaussian_filter
from scipy.stats import ttest_ind
from torch import nn

from brainsex import training
from brainsex.cohort import Cohort, Rows
from brainsex.group_masks import group_mask
from brainsex.measures import top
from brainsex.saliency import smoothed


def randomised(network: nn.Module, *, seed: int = 0) -> Iterator[tuple[str, nn.Module]]:
    """The network with its layers drawn anew one after the other, from the last to the first.

    The cascading randomisation of Adebayo et al. 2018, arXiv 1810.03292: an explanation of what was
    learnt has to change on the way. Weights are drawn as before training; batch norm forgets too.

    Yields
    ------
    name of the layer just drawn, and a copy of the network.
    """
    network = copy.deepcopy(network).eval()
    layers = [(n, m) for n, m in network.named_modules() if hasattr(m, "reset_parameters")]
    for number, (name, module) in enumerate(reversed(layers)):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1000 * seed + number)
            module.reset_parameters()
        yield name, copy.deepcopy(network)


def random_map(shape: tuple[int, int, int], *, seed: int = 0) -> np.ndarray:
    """Smooth noise (X, Y, Z): a map that knows nothing."""
    return gaussian_filter(np.random.default_rng(seed).standard_normal(shape), 2.0)


def random_region(brain: np.ndarray, voxels: int, *, seed: int = 0) -> np.ndarray:
    """So many voxels of the brain in smooth random blobs: a mask's equal in volume."""
    return top(random_map(brain.shape, seed=seed), brain, voxels)


def trained(
    volumes: np.ndarray,
    sex: np.ndarray,
    make_network: Callable[[], nn.Module],
    *,
    seed: int = 0,
    **settings,
) -> nn.Module:
    """A network made under `seed` and fitted: with another seed, or on other labels or volumes.

    `settings` are of `training.fit`. Labels of `evaluation.shuffled` give Adebayo's second test.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = make_network()
    training.fit(network, volumes, sex, seed=seed, **settings)
    return network


def retrained(
    volumes: np.ndarray,
    sex: np.ndarray,
    held_out: np.ndarray,
    region: np.ndarray,
    make_network: Callable[[], nn.Module],
    *,
    keep: bool = False,
    seed: int = 0,
    **settings,
) -> float:
    """Accuracy on held-out subjects of a network that learns without a region, or from it alone.

    Remove-and-retrain (Hooker et al. 2019, arXiv 1806.10758) with one region for everybody, and,
    with `keep`, the study's experiment: a network that sees only what a mean mask leaves. Elsewhere
    every volume is the training subjects' mean, in which nothing tells one from another.

    Parameters
    ----------
    volumes : (N, X, Y, Z).
    sex : (N,).
    held_out : (N,) bool, on whom it is judged; the region comes from the others.
    region : (X, Y, Z) bool, what is removed.
    make_network : called under `torch.manual_seed`.
    keep : remove all but the region instead.
    settings : of `training.fit`.
    """
    train, test = np.flatnonzero(~held_out), np.flatnonzero(held_out)
    mean = sum(np.asarray(volumes[row], np.float64) / len(train) for row in train)
    gone = ~region if keep else region
    masked = np.empty(volumes.shape, np.float32)
    for row, volume in enumerate(volumes):
        masked[row] = np.where(gone, mean, volume)
    network = trained(masked[train], sex[train], make_network, seed=seed, **settings)
    return float((training.predict(network, masked[test]).argmax(1) == sex[test]).mean())


def removal(
    cohort: Cohort,
    network: nn.Module,
    held_out: np.ndarray,
    brain: np.ndarray,
    make_network: Callable[[], nn.Module],
    *,
    share: float = 0.02,
    iterations: int = 60,
    seed: int = 0,
    **settings,
) -> pd.DataFrame:
    """Accuracy with and without the network's group masks of men, of women and of both.

    Masks are of training subjects, networks are judged on held-out ones (N,) bool. A random region
    of the same volume stands beside them.

    Returns
    -------
    One row a region: region, only (networks that see nothing else), without; NaN, and said, where
    a mask is positive, once smoothed, in fewer voxels than the share asks for.
    """
    voxels, regions = round(share * np.count_nonzero(brain)), {}
    for name, sexes in (("men", (1,)), ("women", (0,)), ("both", (0, 1))):
        train = np.flatnonzero(~held_out & np.isin(cohort.sex, sexes))
        options = {"target": cohort.sex[train], "iterations": iterations, "seed": seed}
        mask = group_mask(network, Rows(cohort.volumes, train), **options)
        mask = smoothed(mask[None], 1.0)[0]
        regions[f"group mask of {name}"] = top(mask, brain, voxels)
        if (found := np.count_nonzero(mask[brain] > 0)) < voxels:  # the rest would be random
            print(f"group mask of {name}: {found} voxels, not {voxels}: no network sees it")
            regions[f"group mask of {name}"] = None
    regions["random"] = random_region(brain, voxels, seed=seed)

    def accuracy(region: np.ndarray | None, keep: bool) -> float:
        if region is None:
            return np.nan
        given = cohort.volumes, cohort.sex, held_out, region, make_network
        return retrained(*given, keep=keep, seed=seed, **settings)

    return pd.DataFrame(
        {"region": name, "only": accuracy(region, True), "without": accuracy(region, False)}
        for name, region in regions.items()
    )


def t_map(
    volumes: np.ndarray,
    sex: np.ndarray,
    brain: np.ndarray,
    *,
    sigma: float = 1.0,
    confound: np.ndarray | None = None,
) -> np.ndarray:
    """Welch's t of men against women, voxel by voxel, of volumes (N, X, Y, Z) under a Gaussian.

    With a confound (N,), such as brain volume, the t of sex in a linear model of both.

    Returns
    -------
    (X, Y, Z) float32, positive where men's FA is higher; 0 outside the brain.
    """
    values = smoothed(np.asarray(volumes, np.float32), sigma)[:, brain]
    found = np.zeros(brain.shape, np.float32)
    if confound is None:
        statistic = ttest_ind(values[sex == 1], values[sex == 0], equal_var=False).statistic
    else:  # Frisch and Waugh: what is left of both once the confound is taken out
        known = np.column_stack([np.ones(len(sex)), confound])
        values, left = (y - known @ np.linalg.lstsq(known, y)[0] for y in (values, 1.0 * sex))
        slope = left @ values / (left @ left)
        error = ((values - np.outer(left, slope)) ** 2).sum(0) / (len(sex) - 3) / (left @ left)
        with np.errstate(divide="ignore", invalid="ignore"):
            statistic = slope / np.sqrt(error)
    found[brain] = np.nan_to_num(statistic, nan=0, posinf=0, neginf=0)
    return found


def family_wise(
    volumes: np.ndarray,
    sex: np.ndarray,
    brain: np.ndarray,
    affine: np.ndarray,
    *,
    sigma: float = 1.0,
    confound: np.ndarray | None = None,
    permutations: int = 100,
    tfce: bool = False,
    workers: int = 1,
    seed: int = 0,
) -> np.ndarray:
    """Minus log10 of the two-sided p of the same difference, corrected over the brain's voxels.

    By permutation of the largest statistic: t or, as in TBSS, the threshold-free enhanced (Smith
    and Nichols 2009, NeuroImage 44:83). Subjects are taken for exchangeable: relatives are not.

    Returns
    -------
    (X, Y, Z) float32, at most log10(1 + permutations); 0 outside the brain.
    """
    values = smoothed(np.asarray(volumes, np.float32), sigma)[:, brain]
    masker = NiftiMasker(nib.Nifti1Image(brain.astype(np.uint8), affine)).fit()
    result = permuted_ols(
        np.asarray(sex, float)[:, None],
        values,
        None if confound is None else np.asarray(confound, float)[:, None],
        n_perm=permutations,
        masker=masker,
        tfce=tfce,
        n_jobs=workers,
        random_state=seed,
    )
    found = np.zeros(brain.shape, np.float32)
    found[brain] = result["logp_max_tfce" if tfce else "logp_max_t"][0]
    return found
