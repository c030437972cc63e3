"""A cohort with planted sex differences, written to disk exactly as HCP's would lie there.

Every subject starts from one `anatomy`, and has a head size, a smooth deformation, FA variation,
Rician-like noise, and the bright rim of real maps. Relatives share a part of all but noise and rim,
and of what FreeSurfer would measure.

The truth is kept in the template's space. Head size and deformation move a brain voxel by 2.5 mm
(median; 2.7 mm with the default `head_size`), so that a subject's own regions overlap the
template's with a Dice coefficient of 0.76 (standard deviation 0.05). Averaged over subjects, and
after noise, the sexes' difference in a region is therefore 0.7 of what is planted there.
"""

import gzip
import hashlib
import io
import json
import math
import zipfile
from functools import partial
from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd
from joblib import Parallel, cpu_count, delayed
from scipy.ndimage import binary_erosion, map_coordinates, zoom
from tqdm.auto import tqdm

from brainsex import (
    LABELS,
    SHAPE,
    morphometry,
    nifti,
    population,
    read_record,
    replacing,
    runs,
    write,
)
from brainsex.anatomy import Anatomy, anatomy, region_table

HEAD_SIZE = 0.12  # men's mean head volume less women's, over the mean of both, as in life
HEAD_SPREAD = 0.075  # coefficient of variation of head volume within a sex
DEFORMATION = 1.5  # standard deviation of a subject's displacement along each axis, mm
NOISE = 0.05  # standard deviation of either noise component of FA
FIELD = (7, 8, 7)  # control points of a smooth random field along X, Y, Z
DRAWS = 2 + 4 * math.prod(FIELD)
"""Anatomical numbers a subject: head, level of FA, three displacements, a field of FA."""


def head_volume(sex, head_size: float, draw):
    """Head volume relative to the template, by sex and the first of the anatomical draws."""
    return 1 + head_size * (sex - 0.5) + HEAD_SPREAD * np.clip(draw, -2.5, 2.5)


def subject_volume(
    base: Anatomy, sex: int, draws: np.ndarray, *, head_size: float, effect: float, rng
) -> np.ndarray:
    """One subject's FA (X, Y, Z) in [0, 1], of its anatomy's standard normal `DRAWS` and noise."""
    *displacement, variation = draws[2:].reshape(4, *FIELD)
    position = _position(base, head_volume(sex, head_size, draws[0]), displacement)
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


def _position(base: Anatomy, head: float, displacement: list[np.ndarray]) -> list[np.ndarray]:
    """Where in the template each voxel of a subject lies: three (X, Y, Z) of voxel indices."""
    shape, spacing = base.fa.shape, base.affine[0, 0]
    centre = np.linalg.solve(base.affine[:3, :3], np.array([0, -18, 8]) - base.affine[:3, 3])
    return [
        ((np.arange(n) - c) / head ** (1 / 3) + c).reshape([-1 if a == x else 1 for a in range(3)])
        + DEFORMATION / spacing * _smooth_field(shape, displacement[x])
        for x, (n, c) in enumerate(zip(shape, centre))
    ]


def _smooth_field(shape: tuple[int, ...], field: np.ndarray) -> np.ndarray:
    """A field of unit standard deviation and about 30 mm correlation length, from `FIELD` draws."""
    field = field.astype(np.float32)
    for axis, size in enumerate(shape):
        spline = zoom(np.eye(field.shape[axis], dtype=np.float32), (size / field.shape[axis], 1))
        field = np.moveaxis(np.tensordot(spline, field, (1, axis)), 0, axis)
    return field / field.std()


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
    effect: float = 1.0,
    template: str | Path | None = None,
    seed: int = 0,
    workers: int | None = None,
) -> Path:
    """Write a synthetic cohort in HCP's layout, which DATA_ACCESS.md describes.

    Memory does not depend on the number of subjects; archives already there are kept.

    Parameters
    ----------
    folder : new, or of an earlier call with the same options; otherwise it is a ValueError.
    subjects : how many of 1113 rows, or more, have a volume: whole families, as far as that goes.
    spacing : voxel size in mm; 1.25 gives HCP's own grid.
    head_size : men's mean head volume less women's, over the mean of both; 0 removes the confound.
    effect : multiplies every difference planted beside it, in volumes and in FreeSurfer's table;
        0 leaves head size alone.
    template : a real FA map in MNI space to start from.
    seed : a subject's volume depends on it and on the subject's row alone (beyond 1113 subjects
        also on their number).
    workers : threads; all cores by default.
    """
    folder, marker = Path(folder), Path(folder) / "SYNTHETIC"
    if subjects < 1 or not abs(head_size) < 1 or not 0.5 <= spacing <= 10:
        raise ValueError(
            "expected at least one subject, |head_size| < 1 and a spacing of 0.5 to 10 mm, found "
            f"subjects={subjects}, head_size={head_size}, spacing={spacing}."
        )
    if not marker.is_file() and folder.is_dir() and any(folder.glob("[!.]*")):
        raise ValueError(f"{folder} is not empty and not a synthetic cohort: choose another.")
    base = anatomy(spacing, template)
    start = None  # or the template's name and what is in it, so that no cohort mixes two
    if template is not None:
        checksum = hashlib.sha256(Path(template).read_bytes()).hexdigest()[:16]
        start = f"{Path(template).name} {checksum}"
    sizes = {"head_size": float(head_size), "effect": float(effect)}
    options = {"subjects": subjects, "spacing": float(spacing), **sizes}
    options = json.dumps(options | {"template": start, "seed": seed})
    if marker.is_file() and marker.read_text(encoding="utf-8") != options:
        raise ValueError(
            f"{folder} holds a synthetic cohort of other options than {options}: {marker}. "
            "Delete it or choose another folder."
        )
    people = population.draw(subjects, seed)
    with runs.alone(folder, "archives", "truth"):
        write(marker, options)  # first, so that nothing written here passes for real
        with replacing(folder / "truth" / "regions.nii.gz") as path:
            path.write_bytes(_nifti(base.labels, base.affine))
        regions = region_table(base).to_csv(index=False, float_format="%.3f")
        write(folder / "truth" / "regions.csv", regions)
        sexes = people.behavioural["Gender"].map(LABELS)

        def write_subject(row: int) -> None:
            subject = people.behavioural.at[row, "Subject"]
            path = folder / "archives" / f"{subject}_3T_Diffusion_FA.zip"
            if not path.is_file():
                rng = np.random.default_rng([seed, row])
                draws = population.anatomical_draws(people.kin.loc[row], seed, DRAWS)
                volume = subject_volume(base, sexes[row], draws, rng=rng, **sizes)
                _write_archive(path, subject, volume, base.affine)

        rows = sexes.index[people.behavioural["3T_dMRI_Compl"] == "true"]
        done = Parallel(workers or cpu_count(), prefer="threads", return_as="generator")(
            delayed(write_subject)(row) for row in rows
        )
        list(tqdm(done, "synthesize", total=len(rows), unit="subject"))
        _write_tables(folder, people, seed=seed, **sizes)
    return folder


def _write_tables(folder: Path, people: population.People, **options) -> None:
    table = freesurfer_table(people, **options)
    write(folder / "unrestricted_hcp_freesurfer.csv", table.to_csv(index=False))
    write(folder / "restricted.csv", people.restricted.to_csv(index=False))
    # last: where it is, all is written
    write(folder / "unrestricted_behavioral.csv", people.behavioural.to_csv(index=False))


def head_size_alone(cohort: str | Path, folder: str | Path) -> Path:
    """Write the tables of a synthetic cohort's people anew, as if only their heads differed.

    Of a real cohort's nobody knows what they would be like: FileNotFoundError.
    """
    folder, marker = Path(folder), Path(cohort) / "SYNTHETIC"
    if not marker.is_file():
        raise FileNotFoundError(f"{cohort}: no synthetic cohort.")
    options = read_record(marker) | {"effect": 0.0}
    write(folder / "SYNTHETIC", json.dumps(options))
    people = population.draw(options["subjects"], options["seed"])
    sizes = {name: options[name] for name in ("head_size", "effect", "seed")}
    _write_tables(folder, people, **sizes)
    return folder


def freesurfer_table(
    people: population.People, *, head_size: float = HEAD_SIZE, effect: float = 1.0, seed: int = 0
) -> pd.DataFrame:
    """`morphometry.freesurfer` of everybody, whose heads are as large as in their volumes."""
    first = [population.anatomical_draws(kin, seed, 1)[0] for _, kin in people.kin.iterrows()]
    sex = people.behavioural["Gender"].map(LABELS).to_numpy()
    head = head_volume(sex, head_size, np.array(first))
    drawn = partial(population.correlated, people.kin, np.random.default_rng([seed, 1]))
    return morphometry.freesurfer(people.behavioural, head, drawn, effect=effect)


def load_truth(
    folder: str | Path, shape: tuple[int, int, int] = SHAPE
) -> tuple[np.ndarray, pd.DataFrame]:
    """The planted regions on the networks' grid, in the template's space.

    Returns
    -------
    labels : (X, Y, Z) int64, RAS; a voxel belongs to the region that fills more than half of it.
    regions : as `anatomy.region_table`. A real cohort has neither: FileNotFoundError.
    """
    folder = Path(folder) / "truth"
    if not (folder / "regions.csv").is_file():
        raise FileNotFoundError(f"{folder}: no planted truth; only synthetic cohorts have one.")
    regions = pd.read_csv(folder / "regions.csv")
    labels, affine = nifti.load(folder / "regions.nii.gz")
    share = [nifti.resample(labels == label, affine, shape)[0] for label in regions["label"]]
    share = np.stack([np.full(shape, 0.5, np.float32), *share])
    return share.argmax(0), regions
