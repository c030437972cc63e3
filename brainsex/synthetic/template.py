"""The FA template that every synthetic subject starts from, and what is planted in it.

FA is made from the MNI152 tissue templates inside nilearn: tracts are drawn into the white matter,
and values are mapped onto the distribution of a real group template.
"""

from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd
from nibabel.affines import apply_affine, from_matvec, voxel_sizes
from nilearn import datasets
from scipy.ndimage import affine_transform, gaussian_filter
from scipy.spatial import KDTree

from brainsex import SHAPE, volumes

PERCENTILES = pd.read_csv(Path(__file__).with_name("fa_percentiles.csv"))
"""FA over the brain (FA > 0.02) of a real group template."""
TRACTS = pd.read_csv(Path(__file__).with_name("tracts.csv"))
"""Courses of the great tracts: points in MNI mm (right hemisphere, mirrored), radius, strength."""
REGIONS = pd.read_csv(Path(__file__).with_name("regions.csv"))
"""Centre in MNI mm, radius in mm, FA of men minus women at the peak; fixed before any mask."""


def make_anatomy(spacing: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Make the FA template on voxels of `spacing` mm, and plant `REGIONS` in its white matter.

    Returns images (3, X, Y, Z) float32 in RAS: FA, brain mask, and FA of men minus FA of women;
    labels (X, Y, Z) int16 of `REGIONS`, 0 elsewhere; affine (4, 4), voxel indices to MNI mm.
    """
    shape = tuple(int(n * 1.25 / spacing + 0.5) for n in (145, 174, 145))  # HCP's field of view
    corner = 90 - spacing * (shape[0] - 1), -126, -72  # LAS's first voxel is at x = 90
    affine = from_matvec(spacing * np.eye(3), corner)
    positions = apply_affine(affine, np.moveaxis(np.indices(shape), 0, -1))
    white = _on_grid(datasets.load_mni152_wm_template(resolution=1), shape, affine)
    grey = _on_grid(datasets.load_mni152_gm_template(resolution=1), shape, affine)
    mask = _on_grid(datasets.load_mni152_brain_mask(resolution=1), shape, affine) > 0.5
    strength = np.zeros(shape)
    strength[mask] = _tract_strength(positions[mask])
    contrast = 0.10 * grey + white * (0.35 + strength)
    texture = gaussian_filter(np.random.default_rng(0).standard_normal(shape), 5 / spacing)
    contrast = contrast + 0.05 * (0.2 + white) * texture / texture.std()
    rank = np.argsort(np.argsort(contrast[mask])) / mask.sum() * 100
    images, labels = np.zeros((3, *shape), np.float32), np.zeros(shape, np.int16)
    images[0, mask] = np.interp(rank, PERCENTILES["percentile"], PERCENTILES["fa"])
    images[1] = mask
    for region in REGIONS.itertuples():
        centre = region.x_mm, region.y_mm, region.z_mm
        distance = np.linalg.norm(positions - centre, axis=-1) / region.radius_mm
        bump = np.clip(2 - 2 * distance**2, 0, 1) * np.clip(1.5 * white, 0, 1) * mask
        images[2] += region.fa_men_minus_women * bump
        labels[bump > 0.5] = region.label
    return images, labels, affine


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


def load_truth(
    folder: str | Path, shape: tuple[int, int, int] = SHAPE
) -> tuple[np.ndarray, pd.DataFrame]:
    """Load the planted regions of a cohort on the networks' grid, in the template's space.

    Returns labels (X, Y, Z) int64, RAS, a voxel belonging to the region that fills more than half
    of it; and a row a region: label, name, ``fa_men_minus_women`` at the peak, the centre ``x_mm``,
    ``y_mm``, ``z_mm`` in MNI space, ``volume_ml``. Raises FileNotFoundError for a real cohort.
    """
    folder = Path(folder) / "truth"
    regions = pd.read_csv(folder / "regions.csv")
    labels, affine = volumes.load_volume(folder / "regions.nii.gz")
    shares = [volumes.resample(labels == label, affine, shape)[0] for label in regions["label"]]
    return np.stack([np.full(shape, 0.5, np.float32), *shares]).argmax(0), regions
