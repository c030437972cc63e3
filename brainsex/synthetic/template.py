"""The anatomy that every synthetic subject starts from: an FA template with planted regions.

The MNI152 tissue templates inside nilearn, tracts drawn into the white matter, values mapped onto
the distribution of a real group FA template; or a real template itself.
"""

from dataclasses import dataclass
from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd
from nibabel.affines import apply_affine, from_matvec, voxel_sizes
from nilearn import datasets
from scipy.ndimage import affine_transform, gaussian_filter
from scipy.spatial import KDTree

from brainsex import storage, volumes
from brainsex.synthetic.planting import REGIONS, plant_regions

FA_PERCENTILES = (  # 0, 5, …, 100 over the brain (FA > 0.02) of a real group template
    *(0.020, 0.080, 0.099, 0.113, 0.125, 0.136, 0.147, 0.157, 0.169, 0.182, 0.198),
    *(0.213, 0.232, 0.259, 0.300, 0.353, 0.412, 0.469, 0.528, 0.603, 0.913),
)
TRACTS = pd.read_csv(Path(__file__).with_name("tracts.csv"))
"""Courses of the great tracts: points in MNI mm (right hemisphere, mirrored), radius, strength."""


@dataclass(frozen=True)
class Anatomy:
    """A template and what is planted in it: images (X, Y, Z) in RAS on one grid."""

    fa: np.ndarray
    mask: np.ndarray  # 1 in the brain
    effect: np.ndarray  # FA of men minus FA of women
    labels: np.ndarray  # 1, 2, … in the order of `REGIONS`; 0 elsewhere
    affine: np.ndarray  # (4, 4), voxel indices to MNI mm


def hcp_grid(spacing: float) -> tuple[tuple[int, int, int], np.ndarray]:
    """Return shape and RAS affine of HCP's field of view at `spacing` mm (1.25: HCP's own grid)."""
    shape = tuple(int(n * 1.25 / spacing + 0.5) for n in (145, 174, 145))
    corner = 90 - spacing * (shape[0] - 1), -126, -72  # LAS's first voxel is at x = 90
    return shape, from_matvec(spacing * np.eye(3), corner)


def make_anatomy(spacing: float = 2.5, template: str | Path | None = None) -> Anatomy:
    """Make the FA template on voxels of `spacing` mm, and plant the regions in it.

    `template` is a real FA map in MNI space to start from (FSL's FMRIB58_FA, whose scale of 0 to
    10,000 is recognised, or any in [0, 1]); by default FA is made from the MNI152 tissue templates.
    Raises ValueError if it is no FA map or a planted region has no voxel.
    """
    shape, affine = hcp_grid(spacing)
    positions = apply_affine(affine, np.moveaxis(np.indices(shape), 0, -1))
    white = _on_grid(datasets.load_mni152_wm_template(resolution=1), shape, affine)
    if template is None:
        mask = _on_grid(datasets.load_mni152_brain_mask(resolution=1), shape, affine) > 0.5
        grey = _on_grid(datasets.load_mni152_gm_template(resolution=1), shape, affine)
        fa = 0.10 * grey + white * (0.35 + _tract_strength(positions))
        texture = gaussian_filter(np.random.default_rng(0).standard_normal(shape), 5 / spacing)
        fa = fa + 0.05 * (0.2 + white) * texture / texture.std()
        rank = np.argsort(np.argsort(fa[mask])) / mask.sum() * 100
        fa = np.zeros(shape, np.float32)
        fa[mask] = np.interp(rank, np.linspace(0, 100, len(FA_PERCENTILES)), FA_PERCENTILES)
    else:
        real, real_affine = volumes.load_volume(template)
        with storage.reading(template, "an FA map", "choose another"):
            real, _ = volumes.clean(real / (10_000 if np.nanmax(real) > 100 else 1))
        fa = _on_grid(nib.Nifti1Image(real, real_affine), shape, affine)
        mask = fa > volumes.BRAIN_THRESHOLD
    effect, labels = plant_regions(white, mask, positions)
    if len(np.unique(labels)) <= len(REGIONS):
        name = template or f"{spacing} mm"
        raise ValueError(f"{name}: expected a brain in MNI space, not too coarse; choose another")
    return Anatomy(fa * mask, mask.astype(np.float32), effect, labels, affine)


def _on_grid(image: nib.Nifti1Image, shape: tuple[int, int, int], affine: np.ndarray) -> np.ndarray:
    """Sample an image on our grid, smoothed first where our voxels are the larger ones."""
    data = image.get_fdata(dtype=np.float32)
    factors = voxel_sizes(affine) / voxel_sizes(image.affine)
    data = gaussian_filter(data, np.clip((factors - 1) / 2, 0, None))
    matrix = np.linalg.inv(image.affine) @ affine
    return affine_transform(data, matrix[:3, :3], matrix[:3, 3], shape, order=1)


def _tract_strength(positions: np.ndarray) -> np.ndarray:
    """Strength of the strongest tract in each voxel, falling off as a Gaussian of its radius."""
    strength = np.zeros(positions.shape[:-1], np.float32)
    for (_, radius, peak), rows in TRACTS.groupby(["course", "radius_mm", "strength"]):
        points = rows[["x_mm", "y_mm", "z_mm"]].to_numpy(float)
        steps = np.linspace(0, len(points) - 1, 20 * len(points))
        course = np.stack([np.interp(steps, range(len(points)), axis) for axis in points.T], 1)
        course = np.concatenate([course, course * (-1, 1, 1)])
        distance = KDTree(course).query(positions, distance_upper_bound=3 * radius)[0]
        strength = np.maximum(strength, peak * np.exp(-0.5 * (distance / radius) ** 2))
    return strength
