"""Checks of a converted cohort: numbers of each volume, and all subjects on one page.

No subject is left out by these checks: they say where to look.
"""

import html
import itertools
from base64 import b64encode
from io import BytesIO
from pathlib import Path

import numpy as np
import pandas as pd
from nibabel.affines import voxel_sizes
from PIL import Image
from scipy.ndimage import center_of_mass
from tqdm.auto import tqdm

from brainsex import storage
from brainsex.cohort import MODALITIES, Cohort
from brainsex.volumes import BRAIN_THRESHOLD, brain_volume

OUTLIER_Z = 3.5
"""Robust z beyond which a value is flagged (Iglewicz and Hoaglin 1993, ASQC vol. 16)."""

PAGE_HEAD = """<!DOCTYPE html><meta charset="utf-8"><title>{title}</title>
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:;
 style-src 'unsafe-inline'"><style>body {{font: 13px sans-serif; background: #111; color: #ddd}}
figure {{display: inline-block; width: 260px; margin: 3px; vertical-align: top}}</style>
<h1>{title}</h1><p>{count} flagged, first. Sagittal (A right), coronal, axial (R right) planes.</p>
"""


def check_table(cohort: Cohort) -> pd.DataFrame:
    """Measure each volume of a cohort and flag outliers, one volume in memory at a time.

    The table has one row a subject, in the cohort's order: Subject; brain_volume_ml, native where
    `convert` wrote it; mean of the voxels above `BRAIN_THRESHOLD`; correlation with the mean of all
    other subjects; orientation, RAS unless the volume resembles the others more when mirrored;
    qc_issue, where the cohort has it; and flags: what has a robust z beyond `OUTLIER_Z` (the
    correlation only below), mirroring, and the issue.
    Raises ValueError for fewer than three subjects and for volumes that are not finite or empty.
    """
    total, rows = _mean_volume(cohort) * len(cohort), []
    for volume in tqdm(cohort.volumes, "check", unit="subject"):
        brain = volume[volume > BRAIN_THRESHOLD]
        size = np.nan if cohort.affine is None else brain_volume(volume, cohort.affine)
        similarity = _similarity(volume, (total - volume) / (len(cohort) - 1))
        rows.append((size, brain.mean() if brain.size else 0.0, *similarity))
    table = pd.DataFrame(rows)
    table.columns = ["brain_volume_ml", "mean", "correlation", "mirrored", "orientation"]
    # Where about half of a cohort is mirrored nothing can tell which half, and all stay RAS
    upright = _robust_z(table["correlation"] - table.pop("mirrored")) >= -OUTLIER_Z
    table.loc[upright, "orientation"] = "RAS"
    table.insert(0, "Subject", cohort.subjects)
    for column in {"brain_volume_ml", "qc_issue"} & set(cohort.table):
        table[column] = cohort.table[column].to_numpy()
    z = table[["brain_volume_ml", "mean"]].apply(_robust_z)
    correlation = np.arctanh(table["correlation"].clip(-0.999999, 0.999999))  # symmetric tails
    z["correlation"] = _robust_z(correlation).clip(upper=0)
    flags = pd.Series("", table.index)
    for name in z:
        text = [f"{name} {value:.4g} (z {far:.1f}); " for value, far in zip(table[name], z[name])]
        flags += np.where(abs(z[name]) > OUTLIER_Z, text, "")
    mirrored = "seems mirrored: " + table["orientation"] + "; "
    flags += mirrored.where(table["orientation"] != "RAS", "")
    if "qc_issue" in table:
        flags += table["qc_issue"].map("QC_Issue {}; ".format, na_action="ignore").fillna("")
    table["flags"] = flags.str.removesuffix("; ")
    return table


def write_montage(cohort: Cohort, table: pd.DataFrame, path: str | Path) -> None:
    """Write one HTML page with three planes of every subject, the flagged ones first.

    `table` is of `check_table`. A subject takes about 10 KB of the page, and none of the memory.
    """
    mean = _mean_volume(cohort)
    point = np.round(center_of_mass(mean)).astype(int)
    white = np.percentile(mean[mean > BRAIN_THRESHOLD], 99.5)
    extent = np.ones(3) if cohort.affine is None else voxel_sizes(cohort.affine)
    extent = extent * mean.shape
    extent *= 250 / extent[[0, 0, 1]].sum()  # pixels
    title = html.escape(f"{cohort.name} cohort, n={len(cohort)}: {MODALITIES[cohort.modality]}")
    with storage.atomic_path(path) as partial, open(partial, "w", encoding="utf-8") as file:
        file.write(PAGE_HEAD.format(title=title, count=(table["flags"] != "").sum()))
        for row in tqdm(np.argsort(table["flags"] == "", kind="stable"), "montage"):
            file.write("<figure>")
            for axis, (across, up) in enumerate(((1, 2), (0, 2), (0, 1))):
                plane = np.take(cohort.volumes[row], point[axis], axis).T[::-1] / white
                Image.fromarray(np.uint8(255 * plane.clip(0, 1))).save(png := BytesIO(), "PNG")
                image = (
                    f"<img width={extent[across]:.0f} height={extent[up]:.0f} src='data:image/png"
                )
                file.write(f"{image};base64,{b64encode(png.getvalue()).decode()}'>")
            subject, flags = map(html.escape, table.loc[row, ["Subject", "flags"]])
            file.write(f"<figcaption><b>{subject}</b> {flags}</figcaption></figure>\n")


def _mean_volume(cohort: Cohort) -> np.ndarray:
    """Return the mean volume (X, Y, Z) float64 of a cohort that can be checked, or raise."""
    mean = sum(volume.astype(float) for volume in cohort.volumes) / len(cohort)
    if len(cohort) < 3 or not (np.isfinite(mean).all() and mean.max() > BRAIN_THRESHOLD):
        expected = f"expected at least three finite volumes of brains, found {len(cohort)} volumes"
        raise ValueError(f"{cohort.name}: {expected}; convert them again")
    return mean


def _similarity(volume: np.ndarray, mean: np.ndarray) -> tuple[float, float, str]:
    """Correlate with a mean as it is, mirrored at its best, and name the best orientation."""
    volume, mean = volume - volume.mean(dtype=float), mean - mean.mean()
    scale = (np.linalg.norm(volume) * np.linalg.norm(mean)) or 1.0
    correlations = {}
    for letters in itertools.product("RL", "AP", "SI"):
        flips = [axis for axis, letter in enumerate(letters) if letter in "LPI"]
        correlations["".join(letters)] = float(np.vdot(volume, np.flip(mean, flips)) / scale)
    best = max(correlations, key=correlations.get)
    return correlations.pop("RAS"), max(correlations.values()), best


def _robust_z(values: pd.Series) -> pd.Series:
    """Return distances from the median in scaled median absolute deviations, or 0."""
    distance = values - values.median()
    return (distance / (1.4826 * distance.abs().median())).fillna(0)
