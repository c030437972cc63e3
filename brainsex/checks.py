"""Checks of a converted cohort: numbers of each volume, and all subjects on one page.

No subject is left out by these checks: they say where to look.
"""

import html
from base64 import b64encode
from io import BytesIO
from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image
from scipy.ndimage import center_of_mass
from tqdm.auto import tqdm

from brainsex import BRAIN_THRESHOLD, storage
from brainsex.cohort import MODALITIES, Cohort
from brainsex.volumes import brain_volume

OUTLIER_Z = 3.5  # robust z beyond which a value is flagged (Iglewicz and Hoaglin 1993, ASQC 16)
PAGE_HEAD = """<!DOCTYPE html><meta charset="utf-8"><title>{title}</title>
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:;
 style-src 'unsafe-inline'"><style>body {{font: 13px sans-serif; background: #111; color: #ddd}}
figure {{display: inline-block; width: 260px; margin: 3px; vertical-align: top}}</style>
<h1>{title}</h1><p>{count} flagged, first. Sagittal (A right), coronal, axial (R right) planes.</p>
"""


def check_table(cohort: Cohort) -> pd.DataFrame:
    """Measure each volume of a cohort and flag outliers, one volume in memory at a time.

    Each subject is a row, in the cohort's order: Subject; brain_volume_ml, native where `convert`
    wrote it; mean of the voxels above `BRAIN_THRESHOLD`; correlation with the mean of the others;
    qc_issue, where the cohort has it; and flags: the issue, and what has a robust z beyond
    `OUTLIER_Z`. Raises ValueError for fewer than three subjects, or volumes not finite or empty.
    """
    total, rows = _mean_volume(cohort) * len(cohort), []
    for volume in tqdm(cohort.volumes, "check", unit="subject"):
        brain = volume[volume > BRAIN_THRESHOLD]
        size = np.nan if cohort.affine is None else brain_volume(volume, cohort.affine)
        others = (total - volume) / (len(cohort) - 1)
        correlation = np.corrcoef(volume.ravel(), others.ravel())[0, 1] if np.ptp(volume) else 0.0
        rows.append((size, brain.mean() if brain.size else 0.0, correlation))
    table = pd.DataFrame(rows, columns=["brain_volume_ml", "mean", "correlation"])
    table.insert(0, "Subject", cohort.subjects)
    for column in {"brain_volume_ml", "qc_issue"} & set(cohort.table):
        table[column] = cohort.table[column].to_numpy()
    table["brain_volume_ml"] = pd.to_numeric(table["brain_volume_ml"], errors="coerce")
    z = table[["brain_volume_ml", "mean"]].apply(_robust_z)
    correlation = np.arctanh(table["correlation"].clip(-0.999999, 0.999999))  # symmetric tails
    z["correlation"] = _robust_z(correlation).clip(upper=0)
    table["flags"] = ""
    for name in z:
        text = [f"{name} {value:.4g} (z {far:.1f}); " for value, far in zip(table[name], z[name])]
        table["flags"] += np.where(abs(z[name]) > OUTLIER_Z, text, "")
    if "qc_issue" in table:
        issues = table["qc_issue"].map("QC_Issue {}; ".format, na_action="ignore")
        table["flags"] += issues.fillna("")
    return table.assign(flags=table["flags"].str.removesuffix("; "))


def write_montage(cohort: Cohort, table: pd.DataFrame, path: str | Path) -> None:
    """Write one HTML page with three planes of every subject, the flagged ones first.

    `table` is of `check_table`. A subject takes about 10 KB of the page, and none of the memory.
    """
    mean = _mean_volume(cohort)
    point = np.round(center_of_mass(mean)).astype(int)
    white = np.percentile(mean[mean > BRAIN_THRESHOLD], 99.5)
    zoom = 250 / (2 * mean.shape[0] + mean.shape[1])  # pixels a voxel
    title = html.escape(f"{cohort.name} cohort, n={len(cohort)}: {MODALITIES[cohort.modality]}")
    with storage.atomic_path(path) as partial, open(partial, "w", encoding="utf-8") as file:
        file.write(PAGE_HEAD.format(title=title, count=(table["flags"] != "").sum()))
        for row in tqdm(np.argsort(table["flags"] == "", kind="stable"), "montage"):
            file.write("<figure>")
            for axis in range(3):
                plane = np.take(cohort.volumes[row], point[axis], axis).T[::-1] / white
                Image.fromarray(np.uint8(255 * plane.clip(0, 1))).save(png := BytesIO(), "PNG")
                encoded, width = b64encode(png.getvalue()).decode(), zoom * plane.shape[1]
                file.write(f"<img width={width:.0f} src='data:image/png;base64,{encoded}'>")
            subject, flags = map(html.escape, table.loc[row, ["Subject", "flags"]])
            file.write(f"<figcaption><b>{subject}</b> {flags}</figcaption></figure>\n")


def _mean_volume(cohort: Cohort) -> np.ndarray:
    """Return the mean volume (X, Y, Z) float64 of a cohort that can be checked, or raise."""
    mean = sum(volume.astype(float) for volume in cohort.volumes) / len(cohort)
    if len(cohort) < 3 or not (np.isfinite(mean).all() and mean.max() > BRAIN_THRESHOLD):
        expected = f"expected at least three finite volumes of brains, found {len(cohort)} volumes"
        raise ValueError(f"{cohort.name}: {expected}; convert them again")
    return mean


def _robust_z(values: pd.Series) -> pd.Series:
    """Return distances from the median in scaled median absolute deviations, or 0."""
    distance = values - values.median()
    return (distance / (1.4826 * distance.abs().median())).fillna(0)
