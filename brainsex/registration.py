"""Linear registration of a brain to the MNI152 template in nilearn's own package, by DIPY.

A rigid pose is the rigid part of an affine fit: fitted rigidly, a small brain would slide aside.
"""

import logging
from collections.abc import Sequence

import numpy as np
from nibabel.affines import apply_affine, from_matvec, voxel_sizes
from nilearn.datasets import load_mni152_template
from scipy.linalg import polar
from scipy.ndimage import affine_transform, center_of_mass, gaussian_filter
from skimage.measure import block_reduce

from brainsex import BRAIN_THRESHOLD

POSES = ("rigid", "affine")
MNI_GRID = [[91, 109, 91], from_matvec(2 * np.eye(3), (-90, -126, -72)).tolist()]  # in mm
SPACING = 4  # mm, of the template and of the brain while they are fitted
LEVELS = {"level_iters": [100, 50, 25], "sigmas": [3, 1, 0], "factors": [4, 2, 1]}  # bounds time
MIN_DICE = 0.9  # fits of 134 healthy heads are above, heads upside down or backwards below


def align(volume: np.ndarray, affine: np.ndarray, pose: str) -> tuple[np.ndarray, float]:
    """Register a brain without its skull to MNI152; no voxel is resampled.

    Takes a volume (X, Y, Z), 0 outside the brain, and its affine (4, 4) to mm. Returns its affine
    to MNI millimetres, and the Dice overlap of the two brains after the affine fit. A ``rigid``
    pose keeps the brain's size. Raises ValueError if the overlap is below `MIN_DICE`, which a
    mirrored head is not; ImportError without DIPY.
    """
    if pose not in POSES:
        raise ValueError(f"expected a pose of {POSES}, found {pose!r}")
    from dipy.align import affine_registration  # optional: pip install dipy

    logging.getLogger("dipy").setLevel(logging.WARNING)
    mni = load_mni152_template(resolution=SPACING)
    template, to_mni = mni.get_fdata(dtype=np.float32), mni.affine
    block = np.maximum(1, np.round(SPACING / voxel_sizes(affine))).astype(int)
    coarse = block_reduce(volume, tuple(block), np.mean)
    coarse_affine = affine @ from_matvec(np.diag(block), (block - 1) / 2)
    grids = {"moving_affine": coarse_affine, "static_affine": to_mni}
    steps = ["center_of_mass", "rigid", "affine"]
    _, to_own = affine_registration(coarse, template, **grids, pipeline=steps, **LEVELS)
    to_voxels = np.linalg.inv(affine) @ to_own @ to_mni
    moved = affine_transform(volume, to_voxels, output_shape=template.shape, order=0)
    brains = moved > BRAIN_THRESHOLD, template > BRAIN_THRESHOLD
    dice = 2 * np.count_nonzero(brains[0] & brains[1]) / sum(map(np.count_nonzero, brains))
    if dice < MIN_DICE:
        raise ValueError(f"registration failed: Dice {dice:.3f}, not {MIN_DICE}; look at its mask")
    if pose == "rigid":
        centre = apply_affine(to_mni, center_of_mass(brains[1]))
        rotation, _ = polar(to_own[:3, :3])
        to_own = from_matvec(rotation, apply_affine(to_own, centre) - rotation @ centre)
    return np.linalg.inv(to_own) @ affine, round(float(dice), 4)


def same_grid(shape: Sequence[int], affine: np.ndarray, grid: tuple) -> bool:
    """Say whether a shape and affine (4, 4) are those of a `grid`, to a tenth of a voxel."""
    corners = np.array([*np.ndindex(2, 2, 2)]) * (np.array(shape) - 1)
    apart = apply_affine(affine, corners) - apply_affine(np.array(grid[1]), corners)
    close = np.linalg.norm(apart, axis=1).max() <= voxel_sizes(affine).min() / 10
    return bool(tuple(shape) == tuple(grid[0]) and close)


def regrid(volume: np.ndarray, affine: np.ndarray, grid: tuple) -> np.ndarray:
    """Interpolate a volume linearly on another grid, without aliasing; 0 outside its own.

    Raises ValueError if more than half of the brain lies outside the `grid` (shape, affine).
    """
    shape, to_mm = tuple(grid[0]), np.array(grid[1])
    to_own = np.linalg.inv(affine) @ to_mm
    step = np.linalg.norm(to_own[:3, :3], axis=1)  # along each own axis, in own voxels
    smooth = gaussian_filter(volume, np.maximum(step - 1, 0) / 2, mode="mirror")
    moved = affine_transform(smooth, to_own[:3, :3], to_own[:3, 3], shape, order=1)
    kept = np.sum(moved > BRAIN_THRESHOLD) * abs(np.linalg.det(to_own[:3, :3]))
    if kept < 0.5 * np.sum(volume > BRAIN_THRESHOLD):
        raise ValueError("more than half of its brain lies outside the cohort's grid")
    return moved
