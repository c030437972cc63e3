"""The anatomy every synthetic subject starts from: an FA template and what is planted in it.

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

from brainsex import nifti

# Percentiles 0, 5, …, 100 of FA over the brain (FA > 0.02) in a real group template.
FA_PERCENTILES = (
    *(0.020, 0.080, 0.099, 0.113, 0.125, 0.136, 0.147, 0.157, 0.169, 0.182, 0.198),
    *(0.213, 0.232, 0.259, 0.300, 0.353, 0.412, 0.469, 0.528, 0.603, 0.913),
)

TRACTS = pd.read_csv(Path(__file__).with_name("tracts.csv"))
"""Courses of the great tracts: points in MNI mm (right hemisphere, mirrored), radius, strength."""

# Planted differences: centre in MNI mm, radius in mm, FA of men minus FA of women at its peak.
# Fixed before any mask was made.
REGIONS = {
    "genu of corpus callosum": ((0, 30, 6), 12, -0.20),
    "splenium of corpus callosum": ((0, -39, 12), 12, +0.20),
    "left posterior limb of internal capsule": ((-22, -14, 8), 11, +0.20),
    "right superior longitudinal fasciculus": ((38, -30, 30), 11, +0.20),
    "left cingulum": ((-9, -6, 35), 10, -0.20),
    "right inferior fronto-occipital fasciculus": ((36, -40, -1), 11, -0.20),
    "left anterior corona radiata": ((-22, 28, 16), 11, +0.20),
    "middle cerebellar peduncle": ((16, -38, -32), 11, -0.20),
}


@dataclass(frozen=True)
class Anatomy:
    """The template: volumes (X, Y, Z) float32 in RAS on one grid, with its affine in mm."""

    fa: np.ndarray
    mask: np.ndarray
    effect: np.ndarray  # FA of men minus FA of women
    labels: np.ndarray  # 1, 2, … in the order of `REGIONS`; 0 elsewhere
    affine: np.ndarray


def grid(spacing: float) -> tuple[tuple[int, int, int], np.ndarray]:
    """Shape and RAS affine of HCP's field of view at `spacing` mm (1.25: HCP's own grid)."""
    shape = tuple(int(n * 1.25 / spacing + 0.5) for n in (145, 174, 145))
    first = 90 - spacing * (shape[0] - 1), -126, -72  # LAS's first voxel is at x = 90
    return shape, from_matvec(spacing * np.eye(3), first)


def anatomy(spacing: float = 2.5, template: str | Path | None = None) -> Anatomy:
    """The FA template and what is planted in it.

    Voxels are `spacing` mm wide, over HCP's field of view. `template` is a real FA map in MNI space
    to start from (FSL's FMRIB58_FA, whose scale of 0 to 10,000 is recognised, or any in [0, 1]); by
    default FA is made from the MNI152 tissue templates. ValueError: a planted region has no voxel.
    """
    shape, affine = grid(spacing)
    millimetres = apply_affine(affine, np.moveaxis(np.indices(shape), 0, -1))
    white = _sampled(datasets.load_mni152_wm_template(resolution=1), shape, affine)
    if template is None:
        mask = _sampled(datasets.load_mni152_brain_mask(resolution=1), shape, affine) > 0.5
        grey = _sampled(datasets.load_mni152_gm_template(resolution=1), shape, affine)
        fa = 0.10 * grey + white * (0.35 + _tracts(millimetres))
        texture = gaussian_filter(np.random.default_rng(0).standard_normal(shape), 5 / spacing)
        fa = fa + 0.05 * (0.2 + white) * texture / texture.std()
        rank = np.argsort(np.argsort(fa[mask])) / mask.sum() * 100
        fa = np.zeros(shape, np.float32)
        fa[mask] = np.interp(rank, np.linspace(0, 100, len(FA_PERCENTILES)), FA_PERCENTILES)
    else:
        real, real_affine = nifti.load(template)
        scale = 10_000 if np.nanmax(real) > 100 else 1  # FMRIB58_FA's
        try:
            real, _ = nifti.clean(real / scale)
        except ValueError as error:
            raise ValueError(f"{template}: {error}.") from error
        fa = _sampled(nib.Nifti1Image(real, real_affine), shape, affine)
        mask = fa > nifti.BRAIN_FA
    effect, labels = np.zeros(shape, np.float32), np.zeros(shape, np.int16)
    for label, (centre, radius, peak) in enumerate(REGIONS.values(), 1):
        distance = np.linalg.norm(millimetres - centre, axis=-1) / radius
        bump = np.clip(2 - 2 * distance**2, 0, 1) * np.clip(1.5 * white, 0, 1) * mask
        effect += peak * bump
        labels[bump > 0.5] = label
    if len(np.unique(labels)) <= len(REGIONS):
        what = f"{template or f'{spacing} mm'} is not a brain in MNI space, or too coarse"
        raise ValueError(f"a planted region has no voxel: {what}.")
    return Anatomy(fa * mask, mask.astype(np.float32), effect, labels, affine)


def region_table(base: Anatomy) -> pd.DataFrame:
    """The planted regions, one row each, as ``truth/regions.csv`` holds them.

    label, name; ``fa_men_minus_women`` at the region's peak, of which deformation and noise leave
    0.7 in the volumes' mean; ``x_mm``, ``y_mm``, ``z_mm``, the centre in MNI space; ``volume_ml``.
    """
    centres, _, effects = zip(*REGIONS.values())
    voxels = np.bincount(base.labels.ravel(), minlength=len(REGIONS) + 1)[1:]
    columns = {"label": range(1, len(REGIONS) + 1), "name": list(REGIONS)}
    columns |= {"fa_men_minus_women": effects}
    columns |= dict(zip(("x_mm", "y_mm", "z_mm"), zip(*centres)))
    columns |= {"volume_ml": voxels * abs(np.linalg.det(base.affine[:3, :3])) / 1000}
    return pd.DataFrame(columns)


def _sampled(image, shape, affine) -> np.ndarray:
    """A template on our grid, smoothed first where our voxels are the larger ones."""
    data = image.get_fdata(dtype=np.float32)
    factors = voxel_sizes(affine) / voxel_sizes(image.affine)
    data = gaussian_filter(data, np.clip((factors - 1) / 2, 0, None))
    matrix = np.linalg.inv(image.affine) @ affine
    return affine_transform(data, matrix[:3, :3], matrix[:3, 3], shape, order=1)


def _tracts(millimetres) -> np.ndarray:
    """Strength of the strongest tract in each voxel, falling off as a Gaussian of its radius."""
    strength = np.zeros(millimetres.shape[:-1], np.float32)
    for (_, radius, peak), rows in TRACTS.groupby(["course", "radius_mm", "strength"]):
        points = rows[["x_mm", "y_mm", "z_mm"]].to_numpy(float)
        steps = np.linspace(0, len(points) - 1, 20 * len(points))
        course = np.stack([np.interp(steps, range(len(points)), axis) for axis in points.T], 1)
        course = np.concatenate([course, course * (-1, 1, 1)])
        distance = KDTree(course).query(millimetres, distance_upper_bound=3 * radius)[0]
        strength = np.maximum(strength, peak * np.exp(-0.5 * (distance / radius) ** 2))
    return strength
