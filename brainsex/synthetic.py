"""A cohort with planted sex differences, written to disk exactly as HCP's would lie there.

Anatomy: the MNI152 tissue templates inside nilearn, tracts drawn into the white matter, values
mapped onto the distribution of a real group FA template. Every subject then has a head size, a
smooth deformation, FA variation, Rician-like noise, and the bright rim of real maps. The truth,
where and by how much men's and women's FA differ, is kept in the template's space.
"""

import gzip
import io
import json
import os
import zipfile
from dataclasses import dataclass
from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd
from joblib import Parallel, delayed
from nilearn.datasets import (
    load_mni152_brain_mask,
    load_mni152_gm_template,
    load_mni152_wm_template,
)
from scipy.ndimage import affine_transform, binary_erosion, gaussian_filter, map_coordinates, zoom
from scipy.spatial import KDTree
from tqdm.auto import tqdm

from brainsex import LABELS, SHAPE, replacing, volumes

ROWS, MEN = 1113, 507
"""Subjects in HCP's tables, and the men among them."""
HEAD_SIZE = 0.12
"""How much larger men's heads are than women's, by volume, as in life."""
HEAD_SPREAD = 0.075
"""Coefficient of variation of head volume within a sex."""
DEFORMATION = 1.5
"""Standard deviation of a subject's displacement along each axis, mm."""
NOISE = 0.05
"""Standard deviation of either noise component of FA."""

# Percentiles 0, 5, …, 100 of FA over the brain (FA > 0.02) in a real group template.
FA_PERCENTILES = (
    *(0.020, 0.080, 0.099, 0.113, 0.125, 0.136, 0.147, 0.157, 0.169, 0.182, 0.198),
    *(0.213, 0.232, 0.259, 0.300, 0.353, 0.412, 0.469, 0.528, 0.603, 0.913),
)

# Courses of the great tracts in MNI mm (right hemisphere, mirrored), radius in mm, strength.
TRACTS = {
    "corpus callosum": (
        (4.0, 0.75, ((0, 20, -4), (0, 30, 2), (0, 30, 10), (0, 22, 18), (0, 5, 24))),
        (4.0, 0.75, ((0, 5, 24), (0, -10, 26), (0, -25, 23), (0, -36, 17), (0, -40, 9))),
        (4.0, 0.65, ((0, 29, 6), (10, 34, 6), (18, 45, 4), (20, 56, 2))),
        (4.0, 0.40, ((0, 26, 13), (12, 33, 14), (18, 44, 16))),
        (4.0, 0.40, ((0, 12, 22), (12, 14, 26), (22, 16, 34))),
        (4.0, 0.40, ((0, -8, 26), (12, -8, 29), (22, -10, 38))),
        (4.0, 0.40, ((0, -24, 24), (12, -26, 28), (22, -30, 38))),
        (4.5, 0.65, ((0, -38, 14), (14, -44, 14), (24, -62, 12), (20, -80, 8))),
    ),
    "corticospinal tract": (
        (4.5, 0.65, ((26, -24, 58), (24, -22, 38), (24, -18, 22), (21, -12, 8))),
        (4.5, 0.65, ((21, -12, 8), (17, -15, -4), (12, -18, -14), (7, -22, -28), (6, -28, -44))),
    ),
    "internal capsule": (
        (3.5, 0.65, ((12, 6, 2), (18, 14, 6), (22, 26, 12), (24, 38, 16))),
        (4.0, 0.60, ((16, 4, 4), (21, -10, 8), (26, -26, 8))),
        (4.0, 0.45, ((24, -18, 22), (24, 0, 28), (24, 18, 28))),
    ),
    "cingulum": (
        (3.0, 0.50, ((8, 38, 4), (8, 32, 18), (9, 12, 32), (9, -12, 36), (9, -34, 32))),
        (3.0, 0.50, ((9, -34, 32), (10, -46, 18), (20, -42, 2), (24, -26, -14))),
    ),
    "superior longitudinal fasciculus": (
        (4.5, 0.45, ((38, 12, 24), (38, -10, 30), (38, -32, 30), (42, -46, 16), (46, -40, 2))),
    ),
    "inferior fronto-occipital fasciculus": (
        (4.0, 0.45, ((30, 24, -4), (32, 4, -8), (36, -20, -6), (36, -44, 0), (30, -66, 4))),
        (4.0, 0.40, ((20, 30, -8), (32, 8, -10), (34, 2, -22))),
    ),
    "middle cerebellar peduncle": ((4.5, 0.55, ((0, -26, -34), (14, -36, -32), (22, -50, -34))),),
}

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
    effect: np.ndarray
    """FA of men minus FA of women."""
    labels: np.ndarray
    """1, 2, … in the order of `REGIONS`; 0 elsewhere."""
    affine: np.ndarray


def grid(spacing: float) -> tuple[tuple[int, int, int], np.ndarray]:
    """Shape and RAS affine of HCP's field of view at `spacing` mm (1.25: HCP's own grid)."""
    shape = tuple(int(n * 1.25 / spacing + 0.5) for n in (145, 174, 145))
    affine = np.diag([spacing, spacing, spacing, 1.0])
    affine[:3, 3] = 90 - spacing * (shape[0] - 1), -126, -72  # LAS's first voxel is at x = 90
    return shape, affine


def anatomy(spacing: float = 2.5, template: str | Path | None = None) -> Anatomy:
    """The FA template and what is planted in it.

    Parameters
    ----------
    spacing : voxel size in mm over HCP's field of view.
    template : path of a real FA map in MNI space to start from (FSL's FMRIB58_FA, scaled to
        [0, 1], or any group template); by default FA is made from the MNI152 tissue templates.
    """
    shape, affine = grid(spacing)
    white = _sampled(load_mni152_wm_template(resolution=1), shape, affine)
    if template is None:
        mask = _sampled(load_mni152_brain_mask(resolution=1), shape, affine) > 0.5
        grey = _sampled(load_mni152_gm_template(resolution=1), shape, affine)
        fa = 0.10 * grey + white * (0.35 + _tracts(shape, affine))
        texture = gaussian_filter(np.random.default_rng(0).standard_normal(shape), 5 / spacing)
        fa = fa + 0.05 * (0.2 + white) * texture / texture.std()
        rank = np.argsort(np.argsort(fa[mask])) / mask.sum() * 100
        fa = np.zeros(shape, np.float32)
        fa[mask] = np.interp(rank, np.linspace(0, 100, len(FA_PERCENTILES)), FA_PERCENTILES)
    else:
        real, real_affine = volumes.load(template)
        real, _ = volumes.clean(real / (10_000 if real.max() > 100 else 1))  # FMRIB58_FA's scale
        fa = _sampled(nib.Nifti1Image(real, real_affine), shape, affine)
        mask = fa > volumes.BRAIN_FA
    effect, labels = np.zeros(shape, np.float32), np.zeros(shape, np.int16)
    millimetres = _millimetres(shape, affine)
    for label, (centre, radius, peak) in enumerate(REGIONS.values(), 1):
        distance = np.linalg.norm(millimetres - centre, axis=-1) / radius
        bump = np.clip(2 - 2 * distance**2, 0, 1) * np.clip(1.5 * white, 0, 1) * mask
        effect += peak * bump
        labels[bump > 0.5] = label
    return Anatomy(fa * mask, mask.astype(np.float32), effect, labels, affine)


def _millimetres(shape, affine) -> np.ndarray:
    return np.moveaxis(np.indices(shape), 0, -1) @ affine[:3, :3].T + affine[:3, 3]


def _sampled(image, shape, affine) -> np.ndarray:
    """A template on our grid, smoothed first where our voxels are the larger ones."""
    data = image.get_fdata(dtype=np.float32)
    factors = np.abs(np.diag(affine)[:3] / np.diag(image.affine)[:3])
    data = gaussian_filter(data, np.clip((factors - 1) / 2, 0, None))
    matrix = np.linalg.inv(image.affine) @ affine
    return affine_transform(data, matrix[:3, :3], matrix[:3, 3], shape, order=1)


def _tracts(shape, affine) -> np.ndarray:
    """Strength of the strongest tract in each voxel, falling off as a Gaussian of its radius."""
    strength = np.zeros(shape, np.float32)
    millimetres = _millimetres(shape, affine)
    for courses in TRACTS.values():
        for radius, peak, points in courses:
            points = np.array(points, float)
            steps = np.linspace(0, len(points) - 1, 20 * len(points))
            course = np.stack([np.interp(steps, range(len(points)), axis) for axis in points.T], 1)
            course = np.concatenate([course, course * (-1, 1, 1)])
            distance = KDTree(course).query(millimetres, distance_upper_bound=3 * radius)[0]
            strength = np.maximum(strength, peak * np.exp(-0.5 * (distance / radius) ** 2))
    return strength


def head_volume(sex: int, head_size: float, rng: np.random.Generator) -> float:
    """A subject's head volume relative to the template; the first draw of its generator."""
    return 1 + head_size * (sex - 0.5) + HEAD_SPREAD * np.clip(rng.standard_normal(), -2.5, 2.5)


def subject_volume(
    base: Anatomy, sex: int, *, head_size: float, rng: np.random.Generator
) -> np.ndarray:
    """One subject's FA, (X, Y, Z) float32 in [0, 1], on the template's grid."""
    shape, spacing = base.fa.shape, base.affine[0, 0]
    scale = head_volume(sex, head_size, rng) ** (1 / 3)
    centre = np.linalg.solve(base.affine[:3, :3], np.array([0, -18, 8]) - base.affine[:3, 3])
    position = [
        ((np.arange(n) - c) / scale + c).reshape([-1 if a == axis else 1 for a in range(3)])
        + DEFORMATION / spacing * _smooth_field(shape, rng)
        for axis, (n, c) in enumerate(zip(shape, centre))
    ]
    fa = map_coordinates(base.fa, position, order=1)
    effect = map_coordinates(base.effect, position, order=1)
    mask = map_coordinates(base.mask, position, order=1) > 0.5
    fa *= 1 + 0.03 * rng.standard_normal() + 0.05 * _smooth_field(shape, rng)
    fa += (sex - 0.5) * effect
    noise = NOISE * rng.standard_normal((2, *shape), np.float32)
    fa = np.hypot(0.9 * fa + noise[0], noise[1])
    rim = mask & ~binary_erosion(mask)
    bright = rim & (rng.random(shape, np.float32) < 0.15)
    fa[bright] = rng.uniform(0.4, 1.0, bright.sum())
    return (np.clip(fa, 0, 1) * mask).astype(np.float32)


def _smooth_field(shape, rng: np.random.Generator) -> np.ndarray:
    """A random field of unit standard deviation and about 30 mm correlation length."""
    field = rng.standard_normal((7, 8, 7)).astype(np.float32)
    for axis, size in enumerate(shape):
        spline = zoom(np.eye(field.shape[axis], dtype=np.float32), (size / field.shape[axis], 1))
        field = np.moveaxis(np.tensordot(spline, field, (1, axis)), 0, axis)
    return field / field.std()


def behavioural_table(subjects: int, seed: int) -> pd.DataFrame:
    """HCP's behavioural table, as far as it matters here; the first column's IDs begin with 0.

    The subjects who have volumes are marked in ``3T_dMRI_Compl``; both sexes keep HCP's share.
    """
    rng = np.random.default_rng(seed)
    rows = max(ROWS, subjects)
    numbers = np.sort(rng.choice(np.arange(1000, 100_000), rows, replace=False))
    men, imaged_men = (round(n * MEN / ROWS) for n in (rows, subjects))
    sex = rng.permutation(np.arange(rows) < men).astype(int)
    imaged = np.zeros(rows, bool)
    for value, count in ((1, imaged_men), (0, subjects - imaged_men)):
        imaged[rng.choice(np.flatnonzero(sex == value), count, replace=False)] = True
    age = np.clip(np.round(rng.normal(28.9 - 1.4 * sex, 3.5)), 22, 37).astype(int)
    bands = np.array(["22-25", "26-30", "31-35", "36+"])[np.digitize(age, (26, 31, 36))]
    return pd.DataFrame(
        {
            "Subject": [f"{n:06d}" for n in numbers],
            "Release": rng.choice(["S500", "S900", "S1200"], rows),
            "Acquisition": [f"Q{n:02d}" for n in rng.integers(1, 14, rows)],
            "Gender": np.array(list(LABELS))[sex],
            "Age": bands,
            "QC_Issue": "",
            "3T_dMRI_Compl": np.where(imaged, "true", "false"),
        }
    )


def _nifti(volume: np.ndarray, affine: np.ndarray) -> bytes:
    """A gzipped NIfTI in HCP's LAS orientation, the same bytes on every run."""
    flip = np.diag([-1.0, 1, 1, 1])
    flip[0, 3] = volume.shape[0] - 1
    image = nib.Nifti1Image(volume[::-1], affine @ flip)
    image.set_sform(image.affine, 1)
    image.set_qform(image.affine, 1)
    return gzip.compress(image.to_bytes(), 3, mtime=0)


def _write_archive(path: Path, subject: str, volume: np.ndarray, affine: np.ndarray) -> None:
    """The outer archive holds an inner one, stored, which holds the FA file."""
    inner = io.BytesIO()
    with zipfile.ZipFile(inner, "w") as archive:
        name = f"{subject}/T1w/Diffusion/dti_FA.nii.gz"
        archive.writestr(zipfile.ZipInfo(name), _nifti(volume, affine))
    with replacing(path) as partial, zipfile.ZipFile(partial, "w") as archive:
        archive.writestr(zipfile.ZipInfo(f"{subject}/{subject}_dtifit.zip"), inner.getvalue())


def write_cohort(
    folder: str | Path,
    *,
    subjects: int = 200,
    spacing: float = 2.5,
    head_size: float = HEAD_SIZE,
    template: str | Path | None = None,
    seed: int = 0,
    workers: int | None = None,
) -> Path:
    """Write a synthetic cohort in HCP's layout; see DATA_ACCESS.md for that layout.

    Memory does not depend on the number of subjects; archives already there are kept.

    Parameters
    ----------
    folder : gets ``archives/<ID>_3T_Diffusion_FA.zip``, ``unrestricted_behavioral.csv``
        (1113 rows), ``truth/regions.nii.gz``, ``truth/regions.csv`` and the marker ``SYNTHETIC``.
    subjects : how many of the rows have a volume.
    spacing : voxel size in mm; 1.25 gives HCP's own grid.
    head_size : men's mean head volume over women's, minus one; 0 removes the confound.
    template : a real FA map in MNI space to start from.
    seed : a subject's volume depends on it and on the subject's row alone.
    workers : threads; all cores by default.

    Raises
    ------
    ValueError
        `folder` already holds a cohort, synthetic or real, that these options would not give.
    """
    folder = Path(folder)
    options = {
        "subjects": subjects,
        "spacing": spacing,
        "head_size": head_size,
        "template": None if template is None else Path(template).name,
        "seed": seed,
    }
    marker = folder / "SYNTHETIC"
    if marker.is_file() and json.loads(marker.read_text()) != options:
        raise ValueError(f"{folder} holds a synthetic cohort of other options: {marker}.")
    if not marker.is_file() and folder.is_dir() and any(p for p in folder.iterdir()):
        raise ValueError(f"{folder} is not empty and not a synthetic cohort: choose another.")
    base = anatomy(spacing, template)
    table = behavioural_table(subjects, seed)
    with replacing(marker) as path:  # first, so that nothing written here passes for real
        path.write_text(json.dumps(options))
    _write_truth(folder / "truth", base)

    def write(row: int) -> None:
        subject, gender = table.loc[row, ["Subject", "Gender"]]
        path = folder / "archives" / f"{subject}_3T_Diffusion_FA.zip"
        if not path.is_file():
            rng = np.random.default_rng([seed, row])
            volume = subject_volume(base, LABELS[gender], head_size=head_size, rng=rng)
            _write_archive(path, subject, volume, base.affine)

    rows = table.index[table["3T_dMRI_Compl"] == "true"]
    done = Parallel(workers or os.cpu_count(), prefer="threads", return_as="generator")(
        delayed(write)(row) for row in rows
    )
    for _ in tqdm(done, total=len(rows), desc="synthesize", unit="subject"):
        pass
    with replacing(folder / "unrestricted_behavioral.csv") as path:
        table.to_csv(path, index=False)
    return folder


def _write_truth(folder: Path, base: Anatomy) -> None:
    with replacing(folder / "regions.nii.gz") as path:
        path.write_bytes(_nifti(base.labels, base.affine))
    voxel = abs(np.linalg.det(base.affine[:3, :3])) / 1000
    regions = pd.DataFrame(
        {
            "label": range(1, len(REGIONS) + 1),
            "name": list(REGIONS),
            "fa_men_minus_women": [effect for *_, effect in REGIONS.values()],
            "x_mm y_mm z_mm": [" ".join(map(str, centre)) for centre, *_ in REGIONS.values()],
            "volume_ml": np.bincount(base.labels.ravel(), minlength=len(REGIONS) + 1)[1:] * voxel,
        }
    )
    with replacing(folder / "regions.csv") as path:
        regions.to_csv(path, index=False, float_format="%.3f")


def load_truth(
    folder: str | Path, shape: tuple[int, int, int] = SHAPE
) -> tuple[np.ndarray, pd.DataFrame]:
    """The planted regions on the networks' grid, in the template's space.

    Returns
    -------
    labels : (X, Y, Z) int64, RAS; a voxel belongs to the region that fills at least half of it.
    regions : label, name, FA of men minus FA of women at the peak, centre in mm, volume in ml.

    Raises
    ------
    FileNotFoundError
        The cohort has no truth: it is real.
    """
    folder = Path(folder) / "truth"
    if not (folder / "regions.csv").is_file():
        raise FileNotFoundError(f"{folder}: no planted truth; only synthetic cohorts have one.")
    regions = pd.read_csv(folder / "regions.csv")
    labels, affine = volumes.load(folder / "regions.nii.gz")
    share = [volumes.resample(labels == label, affine, shape)[0] for label in regions["label"]]
    share = np.stack([np.full(shape, 0.5, np.float32), *share])
    return share.argmax(0), regions
