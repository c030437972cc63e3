"""The planted sex differences, in the template's space, and the truth that a cohort keeps of them.

Head size and deformation move a brain voxel by 2.5 mm (median; 2.7 mm with the default head size),
so that a subject's own regions overlap the template's with a Dice coefficient of 0.76 (standard
deviation 0.05). Averaged over subjects, and after noise, the sexes' difference in a region is
therefore 0.7 of what is planted there.
"""

from pathlib import Path

import numpy as np
import pandas as pd

from brainsex import SHAPE, volumes

REGIONS = pd.read_csv(Path(__file__).with_name("regions.csv"))
"""Centre in MNI mm, radius in mm, FA of men minus women at the peak; fixed before any mask."""


def plant_regions(
    white: np.ndarray, mask: np.ndarray, positions: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Plant `REGIONS` in a template: share of white matter and mask (X, Y, Z), (X, Y, Z, 3) MNI mm.

    Returns effect (X, Y, Z) float32, FA of men minus FA of women; and labels (X, Y, Z) int16, 1, 2,
    … in the order of `REGIONS`, 0 elsewhere.
    """
    effect, labels = np.zeros(mask.shape, np.float32), np.zeros(mask.shape, np.int16)
    for label, region in enumerate(REGIONS.itertuples(), 1):
        centre = region.x_mm, region.y_mm, region.z_mm
        distance = np.linalg.norm(positions - centre, axis=-1) / region.radius_mm
        bump = np.clip(2 - 2 * distance**2, 0, 1) * np.clip(1.5 * white, 0, 1) * mask
        effect += region.fa_men_minus_women * bump
        labels[bump > 0.5] = label
    return effect, labels


def region_table(labels: np.ndarray, affine: np.ndarray) -> pd.DataFrame:
    """Return the planted regions, a row each, as ``truth/regions.csv`` holds them.

    label, name; ``fa_men_minus_women`` at the region's peak, of which deformation and noise leave
    0.7 in the volumes' mean; ``x_mm``, ``y_mm``, ``z_mm``, the centre in MNI space; ``volume_ml``.
    """
    voxels = np.bincount(labels.ravel(), minlength=len(REGIONS) + 1)[1:]
    table = REGIONS[["name", "fa_men_minus_women", "x_mm", "y_mm", "z_mm"]].copy()
    table.insert(0, "label", range(1, len(REGIONS) + 1))
    return table.assign(volume_ml=voxels * abs(np.linalg.det(affine[:3, :3])) / 1000)


def load_truth(
    folder: str | Path, shape: tuple[int, int, int] = SHAPE
) -> tuple[np.ndarray, pd.DataFrame]:
    """Load the planted regions of a cohort on the networks' grid, in the template's space.

    Returns labels (X, Y, Z) int64, RAS, a voxel belonging to the region that fills more than half
    of it; and `region_table`. Raises FileNotFoundError for a real cohort, which has neither.
    """
    folder = Path(folder) / "truth"
    if not (folder / "regions.csv").is_file():
        raise FileNotFoundError(f"{folder}: no planted truth; only synthetic cohorts have one")
    regions = pd.read_csv(folder / "regions.csv")
    labels, affine = volumes.load_volume(folder / "regions.nii.gz")
    shares = [volumes.resample(labels == label, affine, shape)[0] for label in regions["label"]]
    return np.stack([np.full(shape, 0.5, np.float32), *shares]).argmax(0), regions
