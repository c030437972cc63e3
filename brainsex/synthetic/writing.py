"""Subjects made from one anatomy, and a cohort of them written to disk in HCP's layout.

Every subject has a head size, a smooth deformation, FA variation, Rician-like noise, and the bright
rim of real maps. Relatives share a part of all but noise and rim, and of FreeSurfer's measures.
"""

import gzip
import hashlib
import io
import json
import math
import zipfile
from functools import partial
from pathlib import Path

import joblib
import nibabel as nib
import numpy as np
import pandas as pd
from numpy.random import Generator
from scipy.ndimage import binary_erosion, map_coordinates, zoom
from tqdm.auto import tqdm

from brainsex import LABELS, storage
from brainsex.synthetic import people as population
from brainsex.synthetic.freesurfer import freesurfer_measures
from brainsex.synthetic.planting import region_table
from brainsex.synthetic.template import Anatomy, make_anatomy

HEAD_SIZE = 0.12  # men's mean head volume less women's, over the mean of both, as in life
HEAD_SPREAD = 0.075  # coefficient of variation of head volume within a sex
DEFORMATION = 1.5  # standard deviation of a subject's displacement along each axis, mm
NOISE = 0.05  # standard deviation of either noise component of FA
FIELD = (7, 8, 7)  # control points of a smooth random field along X, Y, Z
DRAWS = 2 + 4 * math.prod(FIELD)  # a subject's: head, level of FA, 3 displacements, a field of FA


def head_volume(sex: np.ndarray, head_size: float, draw: np.ndarray) -> np.ndarray:
    """Return head volume relative to the template, by sex and the first anatomical draw."""
    return 1 + head_size * (sex - 0.5) + HEAD_SPREAD * np.clip(draw, -2.5, 2.5)


def subject_volume(
    base: Anatomy, sex: int, draws: np.ndarray, head_size: float, effect: float, rng: Generator
) -> np.ndarray:
    """Make one subject's FA (X, Y, Z) in [0, 1], from `DRAWS` anatomical numbers and noise."""
    *displacement, variation = draws[2:].reshape(4, *FIELD)
    position = _template_positions(base, head_volume(sex, head_size, draws[0]), displacement)
    fa = map_coordinates(base.fa, position, order=1)
    difference = map_coordinates(base.effect, position, order=1)
    mask = map_coordinates(base.mask, position, order=1) > 0.5
    fa *= 1 + 0.03 * draws[1] + 0.05 * _smooth_field(fa.shape, variation)
    fa += effect * (sex - 0.5) * difference
    noise = NOISE * rng.standard_normal((2, *fa.shape), np.float32)
    fa = np.hypot(0.9 * fa + noise[0], noise[1])
    rim = mask & ~binary_erosion(mask)
    bright = rim & (rng.random(fa.shape, np.float32) < 0.15)
    fa[bright] = rng.uniform(0.4, 1.0, bright.sum())
    return (np.clip(fa, 0, 1) * mask).astype(np.float32)


def _template_positions(base: Anatomy, head: float, displacement: list) -> list[np.ndarray]:
    """Say where in the template each voxel of a subject lies: three (X, Y, Z) of voxel indices."""
    shape, spacing = base.fa.shape, base.affine[0, 0]
    centre = np.linalg.solve(base.affine[:3, :3], np.array([0, -18, 8]) - base.affine[:3, 3])
    axes = np.ogrid[tuple(map(slice, shape))]
    return [
        (axis - c) / head ** (1 / 3) + c + DEFORMATION / spacing * _smooth_field(shape, field)
        for axis, c, field in zip(axes, centre, displacement)
    ]


def _smooth_field(shape: tuple[int, ...], field: np.ndarray) -> np.ndarray:
    """Make a field of unit standard deviation and about 30 mm correlation from `FIELD` draws."""
    field = field.astype(np.float32)
    for axis, size in enumerate(shape):
        spline = zoom(np.eye(field.shape[axis], dtype=np.float32), (size / field.shape[axis], 1))
        field = np.moveaxis(np.tensordot(spline, field, (1, axis)), 0, axis)
    return field / field.std()


def write_cohort(
    folder: str | Path,
    *,
    subjects: int = 200,
    spacing: float = 2.5,
    head_size: float = HEAD_SIZE,
    effect: float = 1.0,
    template: str | Path | None = None,
    seed: int = 0,
    workers: int | None = None,
    overwrite: bool = False,
) -> Path:
    """Write a synthetic cohort in HCP's layout, which DATA_ACCESS.md describes; return its folder.

    Memory does not depend on the number of subjects; archives already there are kept.

    Parameters
    ----------
    subjects : how many of 1113 rows, or more, have a volume.
    spacing : voxel size in mm; 1.25 gives HCP's own grid.
    head_size : men's mean head volume less women's, over the mean of both; 0 removes the confound.
    effect : multiplies every difference planted beside it, in volumes and in FreeSurfer's table.
    template : a real FA map in MNI space to start from.
    seed : a subject's volume depends on it and on the subject's row alone.
    workers : threads; all cores by default.
    overwrite : start anew in the folder of a synthetic cohort of other options. A ValueError
        otherwise, and always if the folder holds anything else.
    """
    folder, marker = Path(folder), Path(folder) / "SYNTHETIC"
    if subjects < 1 or not abs(head_size) < 1 or not 0.5 <= spacing <= 10:
        raise ValueError(
            "expected at least one subject, |head_size| < 1 and a spacing of 0.5 to 10 mm, found "
            f"subjects={subjects}, head_size={head_size}, spacing={spacing}"
        )
    if not marker.is_file() and folder.is_dir() and any(folder.glob("[!.]*")):
        raise ValueError(f"{folder}: expected an empty folder or a synthetic cohort; name another")
    base = make_anatomy(spacing, template)
    checksum = template and hashlib.sha256(Path(template).read_bytes()).hexdigest()
    options = {"subjects": subjects, "spacing": float(spacing), "head_size": float(head_size)}
    options |= {"effect": float(effect), "template": checksum, "seed": seed}
    if not marker.is_file():  # before anything else, so that nothing passes for real
        storage.write_text(marker, json.dumps(options))
    stale = ("archives/*.zip", "*.csv")
    storage.start_run(folder, "synthesize", options, overwrite=overwrite, results=stale)
    storage.write_text(marker, json.dumps(options))
    people = population.draw_people(subjects, seed)
    with storage.atomic_path(folder / "truth" / "regions.nii.gz") as path:
        path.write_bytes(_nifti(base.labels, base.affine))
    regions = region_table(base.labels, base.affine).to_csv(index=False, float_format="%.3f")
    storage.write_text(folder / "truth" / "regions.csv", regions)
    sexes = people["Gender"].map(LABELS)

    def write_subject(row: int) -> None:
        subject = people.at[row, "Subject"]
        path = folder / "archives" / f"{subject}_3T_Diffusion_FA.zip"
        if not path.is_file():
            rng = np.random.default_rng([seed, row])
            draws = population.anatomical_draws(people.loc[row], seed, DRAWS)
            volume = subject_volume(base, sexes[row], draws, head_size, effect, rng)
            _write_archive(path, subject, volume, base.affine)

    rows = sexes.index[people["3T_dMRI_Compl"] == "true"]
    run = joblib.Parallel(workers or joblib.cpu_count(), "threading", return_as="generator")
    jobs = (joblib.delayed(write_subject)(row) for row in rows)
    list(tqdm(run(jobs), "synthesize", total=len(rows), unit="subject"))
    _write_tables(folder, people, head_size=head_size, effect=effect, seed=seed)
    return folder


def _nifti(volume: np.ndarray, affine: np.ndarray) -> bytes:
    """Make a gzipped NIfTI in HCP's LAS orientation, the same bytes on every run."""
    flip = np.diag([-1.0, 1, 1, 1])
    flip[0, 3] = volume.shape[0] - 1
    image = nib.Nifti1Image(volume[::-1], affine @ flip)
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


def _write_tables(folder: Path, people: pd.DataFrame, **sizes: float) -> None:
    """Write the three tables; the behavioural one last: where it is, all is written."""
    for name, table in {
        "unrestricted_hcp_freesurfer": freesurfer_table(people, **sizes),
        "restricted": people[population.RESTRICTED],
        "unrestricted_behavioral": people[population.BEHAVIOURAL],
    }.items():
        storage.write_text(folder / f"{name}.csv", table.to_csv(index=False))


def freesurfer_table(
    people: pd.DataFrame, *, head_size: float = HEAD_SIZE, effect: float = 1.0, seed: int = 0
) -> pd.DataFrame:
    """Make `freesurfer_measures` of `draw_people`, their heads as large as in their volumes."""
    draws = [population.anatomical_draws(person, seed, 1)[0] for _, person in people.iterrows()]
    head = head_volume(people["Gender"].map(LABELS).to_numpy(), head_size, np.array(draws))
    draw = partial(population.correlated_draws, people, np.random.default_rng([seed, 1]))
    return freesurfer_measures(people, head, draw, effect=effect)


def head_size_alone(cohort: str | Path, folder: str | Path) -> Path:
    """Write the tables of a synthetic cohort's people anew, as if only their heads differed.

    Returns the folder. Raises FileNotFoundError for a real cohort, of which nobody knows these.
    """
    folder, marker = Path(folder), Path(cohort) / "SYNTHETIC"
    if not marker.is_file():
        raise FileNotFoundError(f"{cohort}: expected a synthetic cohort, found no SYNTHETIC file")
    options = storage.read_json(marker) | {"effect": 0.0}
    storage.write_text(folder / "SYNTHETIC", json.dumps(options))
    sizes = {name: options[name] for name in ("head_size", "effect", "seed")}
    _write_tables(folder, population.draw_people(options["subjects"], options["seed"]), **sizes)
    return folder
