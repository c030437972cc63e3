"""The one loader: volumes, sex, subjects, groups and affine of a converted cohort."""

import hashlib
import math
import mmap
import os
from dataclasses import dataclass, replace
from pathlib import Path
from tokenize import TokenError

import numpy as np
import pandas as pd

from brainsex import MODALITIES, read_record, tables
from brainsex.nifti import MAX_VOXELS

NO_ARRAY = (ValueError, EOFError, TypeError, OverflowError, RecursionError, MemoryError, TokenError)
"""What a file that is no array raises: NumPy reads its header as Python's literals."""


@dataclass(frozen=True)
class Cohort:
    """A converted cohort. ``len()`` is its number of subjects."""

    name: str  # the folder's name, with the word synthetic where the cohort is
    synthetic: bool
    volumes: np.ndarray  # (N, X, Y, Z) float32, FA or T1 in [0, 1], RAS; memory-mapped, read-only
    sex: np.ndarray  # (N,) int64, women 0, men 1
    subjects: np.ndarray  # (N,) str
    groups: np.ndarray | None
    """(N,) str, families, who has none known being one alone; None where all are unknown."""
    affine: np.ndarray | None  # (4, 4), voxel indices to mm; None where unknown
    table: pd.DataFrame
    """subjects.csv: brain volume in ml, intracranial volume in ml, age, … in the same order."""
    modality: str = "fa"
    """``fa`` or ``t1``: a key of `brainsex.MODALITIES`, for labels and for scaling new volumes."""
    normalised: bool = False
    """Whether all brains were brought to one size; else head size is in the volumes."""

    def __len__(self) -> int:
        return len(self.sex)


class Rows:
    """Some rows of a memory-mapped array (N, …), read when they are asked for."""

    def __init__(self, volumes: np.ndarray, rows: np.ndarray):
        self.volumes, self.rows = volumes, rows
        self.shape = (len(rows), *volumes.shape[1:])

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index) -> np.ndarray:
        rows = self.rows[index]
        _announce(self.volumes, rows)
        return self.volumes[rows]


def _announce(volumes: np.ndarray, rows: np.ndarray) -> None:
    """Have the kernel read these rows of a mapped file, and no more.

    Around each page that is missed it would read some MB: several times a cohort that does not fit
    into memory (`python -m tests.benchmarks`).
    """
    mapped = getattr(volumes, "base", None)  # residuals have none
    if isinstance(mapped, mmap.mmap) and hasattr(mmap, "MADV_WILLNEED"):
        offset = volumes.ctypes.data - np.frombuffer(mapped, np.uint8).ctypes.data
        for row in np.atleast_1d(rows):
            start = offset + int(row) * volumes.strides[0]
            page = start // mmap.PAGESIZE * mmap.PAGESIZE
            mapped.madvise(mmap.MADV_WILLNEED, page, start + volumes.strides[0] - page)


def load(folder: str | Path, *, affine: np.ndarray | None = None) -> Cohort:
    """Open what `volumes.convert` wrote, or any folder with ``tensors.npy`` and ``labels.npy``.

    The affine (4, 4) is used where there is no ``grid.json``.

    Raises
    ------
    FileNotFoundError, ValueError
        One of the two arrays is not there; the files do not belong together.
    """
    folder = Path(folder)
    volumes, sex = _array(folder / "tensors.npy"), _array(folder / "labels.npy")
    if volumes.ndim != 4 or sex.shape != volumes.shape[:1]:
        raise ValueError(
            f"{folder}: expected tensors (N, X, Y, Z) and labels (N,), found {volumes.shape} "
            f"and {sex.shape}. Convert again."
        )
    if volumes.dtype.kind != "f" or sex.dtype.kind not in "biuf" or not volumes.size:
        raise ValueError(
            f"{folder}: expected tensors of floats and labels of numbers, found {volumes.shape} of "
            f"{volumes.dtype} and {sex.dtype}. Convert again."
        )
    if not np.isin(sex, (0, 1)).all():
        raise ValueError(f"{folder / 'labels.npy'}: expected 0 and 1, found {np.unique(sex)}.")
    sex = np.array(sex, np.int64)
    if (folder / "subjects.csv").is_file():
        table = tables.written(folder / "subjects.csv", "Subject", "label")
        if not np.array_equal(table["label"], sex):
            raise ValueError(f"{folder}: subjects.csv and labels.npy disagree. Convert again.")
        for name in ("brain_volume_ml", "intracranial_volume_ml"):
            if name in table and table[name].dtype.kind not in "fiu":
                where = folder / "subjects.csv"
                raise ValueError(f"{where}: {name} is not numbers throughout. Convert again.")
    else:
        names = [f"{i:0{len(str(len(sex)))}d}" for i in range(len(sex))]
        table = pd.DataFrame({"Subject": names, "label": sex})
    made, path = {}, folder / "grid.json"
    if path.is_file():
        made = checked_grid(read_record(path), path)
        if made.pop("shape") != volumes.shape[1:]:
            raise ValueError(f"{folder}: grid.json and tensors.npy disagree. Convert again.")
        affine = made.pop("affine")
    elif affine is not None:
        affine = _affine(affine, "the affine given")
    groups = table.set_index("Subject")["group"] if "group" in table else pd.Series(dtype=str)
    subjects, groups = table["Subject"].to_numpy(str), tables.filled(groups)
    return Cohort(*name_of(folder), volumes, sex, subjects, groups, affine, table, **made)


def fingerprint(subjects: np.ndarray, sex: np.ndarray, volumes: np.ndarray) -> str:
    """A digest of who is in a cohort and of each voxel; a ValueError where one is not finite.

    Whatever is averaged or learnt from a cohort is on record with it: so no NaN gets that far.
    """
    digest = hashlib.sha256(repr((*map(str, subjects), *map(int, sex))).encode())
    for subject, volume in zip(subjects, volumes):
        values = np.asarray(volume, np.float32)
        if not np.isfinite(np.vdot(values, values)):
            raise ValueError(
                f"tensors.npy is not finite for {subject}, or its squares are not. Convert again."
            )
        digest.update(repr((volume.shape, volume.dtype.str)).encode())
        digest.update(np.ascontiguousarray(volume))
    return digest.hexdigest()


def subset(cohort: Cohort, rows: np.ndarray) -> Cohort:
    """Some subjects of a cohort, whose volumes stay where they are until they are asked for."""
    return replace(
        cohort,
        volumes=Rows(cohort.volumes, rows),
        sex=cohort.sex[rows],
        subjects=cohort.subjects[rows],
        groups=None if cohort.groups is None else cohort.groups[rows],
        table=cohort.table.iloc[rows].reset_index(drop=True),
    )


def name_of(folder: str | Path) -> tuple[str, bool]:
    """A cohort's name, with the word synthetic where the cohort is; and whether it is."""
    synthetic = (Path(folder) / "SYNTHETIC").is_file()
    name = Path(os.path.abspath(folder)).name  # a link keeps its own
    return name if not synthetic or "synthetic" in name else f"{name} (synthetic)", synthetic


def checked_grid(grid: dict, path: Path) -> dict:
    """Shape, affine, modality and normalised of a cohort, as a record has them, or a ValueError."""
    if not isinstance(grid, dict):
        raise ValueError(f"{path}: expected a grid, found {grid!r:.100}.")
    shape, affine = grid.get("shape"), grid.get("affine")
    sizes = shape if isinstance(shape, list) and len(shape) == 3 else [0]
    if any(type(n) is not int or n < 1 for n in sizes) or math.prod(sizes) > MAX_VOXELS:
        raise ValueError(
            f"{path}: expected a shape of three whole numbers, {MAX_VOXELS} voxels at most, found "
            f"{shape!r:.100}."
        )
    modality, normalised = grid.get("modality", "fa"), grid.get("normalised", False)
    if modality not in [*MODALITIES] or type(normalised) is not bool:
        raise ValueError(
            f"{path}: expected a modality of {', '.join(MODALITIES)}, and normalised true or false,"
            f" found {modality!r:.100} and {normalised!r:.100}."
        )
    affine = None if affine is None else _affine(affine, path)
    made = {"modality": modality, "normalised": normalised}
    return {"shape": tuple(shape), "affine": affine, **made}


def _affine(affine, where: Path | str) -> np.ndarray:
    """An affine (4, 4) that has an inverse."""
    try:
        found = np.asarray(affine, float)
    except (ValueError, TypeError, OverflowError):
        found = np.empty(0)
    if found.shape != (4, 4):
        raise ValueError(f"{where}: expected an affine (4, 4), found {found.shape}.")
    if not np.isfinite(found).all() or not np.linalg.det(found):
        raise ValueError(
            f"{where}: expected an affine that has an inverse, found {found.tolist()}."
        )
    return found


def _array(path: Path) -> np.ndarray:
    """A NumPy file, memory-mapped read-only; nothing in it is executed."""
    if not path.is_file():
        run = f"Run `python -m brainsex convert {path.parent}` (notebook 02)"
        raise FileNotFoundError(
            f"{path} is not there. {run}; DATA_ACCESS.md says how to get the data."
        )
    try:
        return np.lib.format.open_memmap(path, mode="r")
    except NO_ARRAY as error:
        raise ValueError(f"{path}: no whole NumPy array ({error!s:.99}). Convert again.") from error
