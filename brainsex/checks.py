"""What came in, looked over: numbers of each subject's volume, and all subjects on one page.

Nothing is left out by these checks: they say where to look.
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

from brainsex import MODALITIES, replacing
from brainsex.cohort import Cohort
from brainsex.nifti import BRAIN_FA, brain_volume

LIMIT = 3.5
"""Robust z beyond which a value is an outlier (Iglewicz and Hoaglin 1993, ASQC vol. 16)."""


def table(cohort: Cohort) -> pd.DataFrame:
    """Measure each volume of a cohort, and flag outliers. Two passes, a volume at a time.

    Returns
    -------
    A row a subject, in the cohort's order: Subject; brain_volume_ml, native where `convert` wrote
    it; mean, of the voxels above `BRAIN_FA`; correlation, with the mean of all other subjects;
    orientation, ``RAS`` unless mirroring along some axes makes the volume more alike the others, as
    it does for none of them, and then the way its axes seem to run (who differs from most: where
    about half of a cohort is mirrored nothing can tell, and all are ``RAS``); qc_issue, where the
    table has it; flags, empty or what stands out: a robust z (by the median absolute deviation)
    beyond `LIMIT`, of the correlation only below it.

    Raises
    ------
    ValueError
        Fewer than three subjects.
    """
    if len(cohort) < 3:
        raise ValueError(f"expected three subjects at least, found {len(cohort)}.")
    total, rows = _mean(cohort) * len(cohort), []
    for volume in tqdm(cohort.volumes, "check", unit="subject"):
        brain = volume[volume > BRAIN_FA]
        size = np.nan if cohort.affine is None else brain_volume(volume, cohort.affine)
        alike = _alike(volume, (total - volume) / (len(cohort) - 1))
        rows.append((size, brain.mean() if brain.size else 0.0, *alike))
    columns = ["brain_volume_ml", "mean", "correlation", "mirrored", "orientation"]
    found = pd.DataFrame(rows, columns=columns)
    straight = _robust(found["correlation"] - found.pop("mirrored")) >= -LIMIT
    found.loc[straight, "orientation"] = "RAS"
    found.insert(0, "Subject", cohort.subjects)
    for column in {"brain_volume_ml", "qc_issue"} & set(cohort.table):
        found[column] = cohort.table[column].to_numpy()
    scores = {name: _robust(found[name]) for name in ("brain_volume_ml", "mean")}
    alike = np.arctanh(found["correlation"].clip(-0.999999, 0.999999))  # whose tails are even
    scores["correlation"] = _robust(alike).clip(upper=0)
    reasons = [
        (abs(z) > LIMIT, found[name].map((name + " {:.4g}").format) + z.map(" (z {:.1f})".format))
        for name, z in scores.items()
    ]
    reasons.append((found["orientation"] != "RAS", "seems mirrored: " + found["orientation"]))
    if "qc_issue" in found:
        reasons.append((found["qc_issue"].notna(), "QC_Issue " + found["qc_issue"].astype(str)))
    said = pd.concat([text.where(holds, "") for holds, text in reasons], axis=1)
    found["flags"] = ["; ".join(filter(None, row)) for row in said.to_numpy()]
    return found


def montage(cohort: Cohort, found: pd.DataFrame, path: str | Path) -> None:
    """Write one HTML page of all subjects, three planes each, the flagged first.

    A subject takes some 10 KB; memory does not depend on how many there are.

    Parameters
    ----------
    found : as from `table`.
    """
    mean = _mean(cohort)
    at = [round(place) for place in center_of_mass(mean)]
    white = np.percentile(mean[mean > BRAIN_FA], 99.5)
    sizes = np.ones(3) if cohort.affine is None else voxel_sizes(cohort.affine)
    order = np.argsort(found["flags"] == "", kind="stable")
    head = {
        "TITLE": f"{cohort.name} cohort, n={len(cohort)}: {MODALITIES[cohort.modality]}",
        "COUNT": f"{(found['flags'] != '').sum()} flagged, first and framed",
    }
    with replacing(path) as partial, open(partial, "w", encoding="utf-8") as file:
        file.write(PAGE.format(**{name: html.escape(text) for name, text in head.items()}))
        for row in tqdm(order, "montage", unit="subject"):
            subject, flags = (html.escape(found.at[row, name]) for name in ("Subject", "flags"))
            picture = b64encode(_strip(cohort.volumes[row] / white, at, sizes)).decode()
            file.write(
                f'<figure{" class=flagged" if flags else ""}><img alt="{subject}" '
                f'src="data:image/png;base64,{picture}"><figcaption><b>{subject}</b> {flags}'
                "</figcaption></figure>\n"
            )
        file.write("</main></body></html>\n")


def _mean(cohort: Cohort) -> np.ndarray:
    """The mean image (X, Y, Z) float64."""
    mean = np.zeros(cohort.volumes.shape[1:])
    for row, subject in enumerate(cohort.subjects):
        mean += cohort.volumes[row]
        if not np.isfinite(mean).all():
            raise ValueError(f"{cohort.name}: tensors.npy is not finite from {subject} on.")
    if not (mean / len(cohort) > BRAIN_FA).any():
        raise ValueError(f"{cohort.name}: tensors.npy has no voxel that counts as brain.")
    return mean / len(cohort)


def _alike(volume: np.ndarray, others: np.ndarray) -> tuple[float, float, str]:
    """Correlation with the others' mean; the highest when mirrored; and the axes of the higher."""
    volume, others = volume - volume.mean(dtype=float), others - others.mean()
    scale = (np.linalg.norm(volume) * np.linalg.norm(others)) or 1.0
    alike = {}
    for flips in itertools.product((False, True), repeat=3):
        code = "".join(ends[flip] for ends, flip in zip(("RL", "AP", "SI"), flips))
        flipped = np.flip(others, np.flatnonzero(flips))
        alike[code] = float(np.vdot(volume, flipped) / scale)
    best = max(alike, key=alike.get)
    straight = alike.pop("RAS")
    return straight, max(alike.values()), best


def _robust(values: pd.Series) -> pd.Series:
    """Distance from the median in median absolute deviations, scaled to standard deviations."""
    distance = values - values.median()
    return (distance / (1.4826 * distance.abs().median())).fillna(0)


def _strip(volume: np.ndarray, at: list[int], sizes: np.ndarray) -> bytes:
    """PNG of a sagittal, a coronal and an axial slice side by side; 1 is white."""
    pictures = []
    for axis in range(3):
        across, up = np.delete(sizes, axis)
        grey = np.uint8(255 * np.take(volume, at[axis], axis).T[::-1].clip(0, 1))
        size = np.rint(np.multiply(grey.shape[::-1], (across, up)) / sizes.min()).astype(int)
        pictures.append(Image.fromarray(grey).resize(size))
    strip = Image.new("L", (sum(p.width for p in pictures), max(p.height for p in pictures)))
    for number, picture in enumerate(pictures):
        strip.paste(picture, (sum(p.width for p in pictures[:number]), 0))
    buffer = BytesIO()
    strip.save(buffer, "PNG")
    return buffer.getvalue()


PAGE = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:;
 style-src 'unsafe-inline'">
<title>{TITLE}</title>
<style>
body {{margin: 0; font: 13px/1.3 system-ui, sans-serif; background: #111; color: #ddd}}
header {{padding: 10px 16px}}
h1 {{font-size: 18px; margin: 0}}
main {{display: flex; flex-wrap: wrap; gap: 6px; padding: 0 10px}}
figure {{margin: 0; width: 260px; border: 2px solid #111; content-visibility: auto;
  contain-intrinsic-size: 260px 120px}}
.flagged {{border-color: #e69f00}}
img {{width: 100%; display: block}}
figcaption {{overflow-wrap: anywhere}}
</style></head>
<body><header><h1>{TITLE}</h1>{COUNT}. Sagittal (A right), coronal and axial (R right) slices, in
the same place and to the same scale for all.</header><main>
"""
