"""Subjects made from one anatomy, and a cohort of them written to disk in HCP's layout.

Every subject has a head size, a smooth deformation, FA variation, noise, and real maps' bright rim.
"""

import gzip
import io
import json
import zipfile
from pathlib import Path

import joblib
import nibabel as nib
import numpy as np
import pandas as pd
from numpy.random import Generator
from scipy.ndimage import binary_erosion, map_coordinates, zoom
from tqdm.auto import tqdm

import brainsex.synthetic.people as population
from brainsex import LABELS, storage
from brainsex.synthetic.people import HEAD_SIZE, freesurfer_table
from brainsex.synthetic.template import REGIONS, make_anatomy

DEFORMATION = 1.5  # standard deviation of a subject's displacement along each axis, mm
NOISE = 0.05  # standard deviation of either noise component of FA
FIELDS = (4, 7, 8, 7)  # control points along X, Y, Z of a subject's displacements (3) and of FA
DRAWS = 2 + np.prod(FIELDS)  # of a subject: head size, level of FA, `FIELDS`


def write_cohort(
    folder: str | Path,
    *,
    subjects: int = 200,
    spacing: float = 2.5,
    head_size: float = HEAD_SIZE,
    effect: float = 1.0,
    seed: int = 0,
    workers: int | None = None,
    overwrite: bool = False,
) -> Path:
    """Write a synthetic cohort in HCP's layout, which DATA_ACCESS.md describes; return its folder.

    Memory does not depend on the number of subjects; archives already there are kept.

    Parameters
    ----------
    subjects : how many of 1113 rows, or more, have a volume.
    spacing : voxel size in mm, 0.5 to 10; 1.25 gives HCP's own grid.
    head_size : men's mean head volume less women's, over the mean of both; 0 removes the confound.
    effect : multiplies every difference planted beside it, in volumes and in FreeSurfer's table.
    seed : a subject's volume depends on it and on the subject's row alone.
    workers : threads; all cores by default.
    overwrite : start anew in the folder of a synthetic cohort; a ValueError for any other folder.
    """
    folder, marker = Path(folder), Path(folder) / "SYNTHETIC"
    options = {"subjects": subjects, "spacing": float(spacing), "head_size": float(head_size)}
    options |= {"effect": float(effect), "seed": seed}
    if subjects < 1 or not abs(head_size) < 1 or not 0.5 <= spacing <= 10:
        expected = "at least one subject, a spacing of 0.5 to 10 mm and |head_size| < 1"
        raise ValueError(f"expected {expected}, found {options}")
    beside = (path for path in folder.glob("[!.]*") if path.name != storage.RUN_RECORD)
    if not marker.is_file() and any(beside):
        raise ValueError(f"{folder}: expected an empty folder or a synthetic cohort; name another")
    stale = ("archives/*.zip", "*.csv", "*.npy", "grid.json", "fa/*.nii.gz")
    storage.start_run(folder, "synthesize", options, overwrite=overwrite, results=stale)
    storage.write_text(marker, json.dumps(options))  # first, so that nothing passes for real
    people = population.draw_people(subjects, seed)
    images, labels, affine = make_anatomy(spacing)
    with storage.atomic_path(folder / "truth" / "regions.nii.gz") as path:
        path.write_bytes(_nifti(labels, affine))
    volume_ml = np.bincount(labels.flat)[1:] * spacing**3 / 1000
    regions = REGIONS.drop(columns="radius_mm").assign(volume_ml=volume_ml)
    text = regions.to_csv(index=False, float_format="%.3f")
    storage.write_text(folder / "truth" / "regions.csv", text)

    def write_subject(row: int, person: pd.Series) -> None:
        path = folder / "archives" / f"{person['Subject']}_3T_Diffusion_FA.zip"
        if not path.is_file():
            rng, sex = np.random.default_rng([seed, row]), LABELS[person["Gender"]]
            draws = population.anatomical_draws(person, seed, DRAWS)
            head = population.head_volume(sex, head_size, draws[0])
            positions = _template_positions(images.shape[1:], affine, head, draws)
            volume = _subject_volume(images, positions, draws, effect * (sex - 0.5), rng)
            _write_archive(path, person["Subject"], volume, affine)

    imaged = people[people["3T_dMRI_Compl"] == "true"]
    rows = tqdm(imaged.iterrows(), "synthesize", total=len(imaged), unit="subject")
    run = joblib.Parallel(workers or joblib.cpu_count(), "threading")
    run(joblib.delayed(write_subject)(*row) for row in rows)
    _write_tables(folder, people, options)
    return folder


def head_size_alone(cohort: str | Path, folder: str | Path) -> Path:
    """Write the tables of a synthetic cohort's people anew, as if only their heads differed.

    Returns the folder. Raises FileNotFoundError for a real cohort, of which nobody knows these.
    """
    folder = Path(folder)
    options = storage.read_json(Path(cohort) / "SYNTHETIC") | {"effect": 0.0}
    storage.write_text(folder / "SYNTHETIC", json.dumps(options))
    people = population.draw_people(options["subjects"], options["seed"])
    _write_tables(folder, people, options)
    return folder


def _template_positions(
    shape: tuple[int, ...], affine: np.ndarray, head: float, draws: np.ndarray
) -> list[np.ndarray]:
    """Return where in the template each voxel of a subject lies: three (X, Y, Z) of indices."""
    centre = np.linalg.solve(affine[:3, :3], np.array([0, -18, 8]) - affine[:3, 3])
    axes, fields = np.ogrid[tuple(map(slice, shape))], draws[2:].reshape(FIELDS)
    return [
        (axis - c) / head ** (1 / 3) + c + DEFORMATION / affine[0, 0] * _smooth_field(shape, field)
        for axis, c, field in zip(axes, centre, fields)
    ]


def _subject_volume(
    images: np.ndarray, positions: list, draws: np.ndarray, effect: float, rng: Generator
) -> np.ndarray:
    """Make a subject's FA (X, Y, Z) in [0, 1], `effect` multiplying what is planted, with noise."""
    fa, mask, planted = (map_coordinates(image, positions, order=1) for image in images)
    fa *= 1 + 0.03 * draws[1] + 0.05 * _smooth_field(fa.shape, draws[2:].reshape(FIELDS)[3])
    fa += effect * planted
    noise = NOISE * rng.standard_normal((2, *fa.shape), np.float32)
    fa, mask = np.hypot(0.9 * fa + noise[0], noise[1]), mask > 0.5
    rim = mask & ~binary_erosion(mask)
    bright = rim & (rng.random(fa.shape, np.float32) < 0.15)
    fa[bright] = rng.uniform(0.4, 1.0, bright.sum())
    return (np.clip(fa, 0, 1) * mask).astype(np.float32)


def _smooth_field(shape: tuple[int, ...], field: np.ndarray) -> np.ndarray:
    """Make a field of unit standard deviation and about 30 mm correlation from control points."""
    field = field.astype(np.float32)
    for axis, size in enumerate(shape):
        spline = zoom(np.eye(field.shape[axis], dtype=np.float32), (size / field.shape[axis], 1))
        field = np.moveaxis(np.tensordot(spline, field, (1, axis)), 0, axis)
    return field / field.std()


def _nifti(volume: np.ndarray, affine: np.ndarray) -> bytes:
    """Make a gzipped NIfTI in HCP's LAS orientation, the same bytes on every run."""
    image = nib.Nifti1Image(volume, affine).as_reoriented([[0, -1], [1, 1], [2, 1]])
    image.set_sform(image.affine, 1)
    image.set_qform(image.affine, 1)
    return gzip.compress(image.to_bytes(), 3, mtime=0)


def _write_archive(path: Path, subject: str, volume: np.ndarray, affine: np.ndarray) -> None:
    """Write an archive that holds another one, stored, which holds the FA file."""
    inner = io.BytesIO()
    with zipfile.ZipFile(inner, "w") as archive:
        name = f"{subject}/T1w/Diffusion/dti_FA.nii.gz"
        archive.writestr(zipfile.ZipInfo(name), _nifti(volume, affine))
    with storage.atomic_path(path) as partial, zipfile.ZipFile(partial, "w") as archive:
        archive.writestr(zipfile.ZipInfo(f"{subject}/{subject}_dtifit.zip"), inner.getvalue())


def _write_tables(folder: Path, people: pd.DataFrame, options: dict) -> None:
    """Write the three tables; the behavioural one last: where it is, all is written."""
    sizes = {name: options[name] for name in ("head_size", "effect", "seed")}
    for name, table in {
        "unrestricted_hcp_freesurfer": freesurfer_table(people, **sizes),
        "restricted": people[population.RESTRICTED],
        "unrestricted_behavioral": people[population.BEHAVIOURAL],
    }.items():
        storage.write_text(folder / f"{name}.csv", table.to_csv(index=False))
