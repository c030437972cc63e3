"""The classical answer: a t test voxel by voxel, as TBSS has it, and its family-wise correction."""

import nibabel as nib
import numpy as np
from joblib import Parallel, delayed
from nilearn.maskers import NiftiMasker
from nilearn.mass_univariate import permuted_ols
from scipy.ndimage import gaussian_filter
from scipy.stats import ttest_ind
from tqdm.auto import tqdm

from brainsex.confounds import Residuals

CHUNK = 10
"""Permutations drawn from one seed: always as many, so that workers change nothing."""


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
    (X, Y, Z) float32, positive where men's FA is higher; 0 outside the brain, and where FA is the
    same in everybody.

    Raises
    ------
    ValueError
        Volumes or a confound that are not finite.
    """
    confound = _checked(confound, len(volumes))
    values = _smooth_values(volumes, brain, sigma)
    varies = np.ptp(values, axis=0) > 0
    values, found = values[:, varies], np.zeros(brain.shape, np.float32)
    if confound is None:
        statistic = ttest_ind(values[sex == 1], values[sex == 0], equal_var=False).statistic
    else:  # Frisch and Waugh: what is left of both once the confound is taken out
        everybody = np.arange(len(sex))
        values, left = (
            Residuals(one, confound, everybody)[:] for one in (values, 1.0 * sex[:, None])
        )
        values, left = values - values.mean(0), left[:, 0] - left.mean()
        slope = left @ values / (left @ left)
        error = ((values - np.outer(left, slope)) ** 2).sum(0) / (len(sex) - 3) / (left @ left)
        statistic = slope / np.sqrt(error)
    found[tuple(np.argwhere(brain)[varies].T)] = statistic
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
    """Minus log10 of the two-sided p of sex in a linear model, corrected over the brain's voxels.

    Of Student's t, beside a confound if there is one (`t_map` without one is Welch's), by
    permutation of the largest statistic: t or, as in TBSS, the threshold-free enhanced (Smith and
    Nichols 2009, NeuroImage 44:83). Subjects are taken for exchangeable, which relatives are not:
    families are not permuted as a whole, and among relatives p is approximate.

    Parameters
    ----------
    volumes, sex, brain, sigma, confound : as in `t_map`.
    affine : (4, 4), voxel indices to mm.
    workers : processes at once, each with copies of the values. They do not change the result.

    Returns
    -------
    (X, Y, Z) float32, at most log10(1 + permutations); 0 outside the brain, and where FA is the
    same in everybody.

    Raises as `t_map`.
    """
    confound = _checked(confound, len(volumes))
    values, sex = _smooth_values(volumes, brain, sigma), np.asarray(sex, float)[:, None]
    masker = NiftiMasker(nib.Nifti1Image(brain.astype(np.uint8), affine)).fit()
    options = {"masker": masker, "tfce": tfce}
    parts = np.array_split(np.arange(permutations), -(-permutations // CHUNK))
    seeds = np.random.SeedSequence(seed).generate_state(len(parts)).tolist()
    runs = Parallel(workers, return_as="generator")(
        delayed(permuted_ols)(
            *(sex, values, confound), n_perm=len(part), random_state=each, **options
        )
        for part, each in zip(parts, seeds)
    )
    name, null = "tfce" if tfce else "t", []
    for run in tqdm(runs, "permutations", total=len(parts), unit="chunk"):
        null.extend(run[f"h0_max_{name}"][0])
    observed = np.nan_to_num(np.abs(run[name][0]))  # NaN: the same in everybody
    exceeded = np.searchsorted(np.sort(null), observed)  # how many of the null are smaller
    found = np.zeros(brain.shape, np.float32)
    found[brain] = -np.log10((1 + permutations - exceeded) / (1 + permutations))
    return found


def _smooth_values(volumes: np.ndarray, brain: np.ndarray, sigma: float) -> np.ndarray:
    """The brain's voxels (N, voxels) float32 of volumes under a Gaussian, read one by one."""
    values = np.empty((len(volumes), np.count_nonzero(brain)), np.float32)
    for row in range(len(volumes)):
        values[row] = gaussian_filter(np.asarray(volumes[row]), sigma, mode="nearest")[brain]
        if not np.isfinite(values[row]).all():
            raise ValueError(f"volume {row} holds NaN or infinity, not finite FA.")
    return values


def _checked(confound: np.ndarray | None, count: int) -> np.ndarray | None:
    """A confound (N, 1)."""
    if confound is None:
        return None
    confound = np.asarray(confound, float)
    if confound.shape != (count,) or not np.isfinite(confound).all():
        raise ValueError(
            f"expected a confound ({count},) without blanks, found {confound.shape}, "
            f"{(~np.isfinite(confound)).sum()} blank. Leave those subjects out, or it."
        )
    return confound[:, None]
