"""A converted cohort and its loader: volumes, sex, subjects, families and affine."""

import hashlib
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd

from brainsex import storage, tables

MODALITIES = {"fa": "FA", "t1": "T1w (brain's median 0.5)"}  # and how figures label the values
PREPARATION = ("mask", "align", "regrid", "native")  # in grid.json, where a cohort has them
CONVERT_AGAIN = "run `python -m brainsex convert` again"


@dataclass(frozen=True)
class Cohort:
    """A converted cohort; ``len()`` is its number of subjects."""

    name: str  # the folder's name, with the word synthetic where the cohort is
    synthetic: bool
    volumes: "np.ndarray | VolumeRows"  # (N, X, Y, Z) float32 in [0, 1], RAS; memory-mapped
    sex: np.ndarray  # (N,) int64, women 0, men 1
    subjects: np.ndarray  # (N,) str
    groups: np.ndarray | None  # (N,) str, as `tables.fill_missing_families` gives them
    affine: np.ndarray | None  # (4, 4), voxel indices to mm; None where unknown
    table: pd.DataFrame  # subjects.csv, rows in the same order
    modality: str = "fa"  # a key of MODALITIES
    preparation: dict = field(default_factory=dict)  # what else `volumes.prepare_like` needs

    def __len__(self) -> int:
        return len(self.sex)


class VolumeRows:
    """Rows of a memory-mapped array (N, …), read when they are indexed."""

    def __init__(self, volumes: np.ndarray, rows: np.ndarray) -> None:
        self.volumes, self.rows = volumes, rows
        self.shape = (len(rows), *volumes.shape[1:])

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int | slice | np.ndarray) -> np.ndarray:
        return self.volumes[self.rows[index]]


def load_cohort(folder: str | Path, *, affine: np.ndarray | None = None) -> Cohort:
    """Load what `volumes.convert` wrote, or any folder with ``tensors.npy`` and ``labels.npy``.

    `affine` (4, 4) is used where there is no ``grid.json``. Volumes stay on disk, memory-mapped.
    Raises FileNotFoundError if an array is missing, ValueError if files do not belong together.
    """
    folder = Path(folder)
    volumes, sex = _map_array(folder / "tensors.npy"), _map_array(folder / "labels.npy")
    fitting = volumes.ndim == 4 and volumes.size and sex.shape == volumes.shape[:1]
    if not fitting or volumes.dtype.kind != "f" or not np.isin(sex, (0, 1)).all():
        expected = "tensors (N, X, Y, Z) of floats and labels (N,) 0 and 1"
        found = f"{volumes.shape} of {volumes.dtype} and {np.ravel(sex)[:9].tolist()}"
        raise ValueError(f"{folder}: expected {expected}, found {found}; {CONVERT_AGAIN}")
    sex, width = np.array(sex, np.int64), len(str(len(sex)))
    table = pd.DataFrame({"Subject": [f"{n:0{width}d}" for n in range(len(sex))], "label": sex})
    if (path := folder / "subjects.csv").is_file():
        with storage.reading(path, "a table of Subject and label", CONVERT_AGAIN):
            table = pd.read_csv(path, dtype={"Subject": str, "group": str})
            table["Subject"] = tables.check_subject_ids(path, table["Subject"])
            if not np.array_equal(table["label"], sex):
                raise ValueError("subjects.csv and labels.npy disagree")
    path, grid = folder / "grid.json", {"shape": volumes.shape[1:], "affine": affine}
    grid = check_grid(storage.read_json(path) if path.is_file() else grid, path)
    if grid.pop("shape") != volumes.shape[1:]:
        raise ValueError(f"{folder}: grid.json and tensors.npy disagree; {CONVERT_AGAIN}")
    subjects, families = table["Subject"].to_numpy(str), table.set_index("Subject").get("group")
    groups = None if families is None else tables.fill_missing_families(families)
    return Cohort(*tables.cohort_name(folder), volumes, sex, subjects, groups, table=table, **grid)


load = load_cohort


def digest(cohort: Cohort) -> str:
    """Hash subjects, sex, shape and every eighth voxel, finite or a ValueError, along each axis."""
    text = repr((*map(str, cohort.subjects), *map(int, cohort.sex), cohort.volumes.shape))
    checksum = hashlib.sha256(text.encode())
    for subject, volume in zip(cohort.subjects, cohort.volumes):
        voxels = np.ascontiguousarray(volume[::8, ::8, ::8], np.float32)
        if not np.isfinite(voxels).all():
            raise ValueError(f"tensors.npy is not finite for {subject}; {CONVERT_AGAIN}")
        checksum.update(voxels)
    return checksum.hexdigest()


def check_grid(grid: dict, path: Path) -> dict:
    """Return the fields of a `Cohort` that a record holds, and its shape, or raise ValueError."""
    with storage.reading(path, "shape, modality and affine of a cohort", CONVERT_AGAIN):
        modality, affine = grid.get("modality", "fa"), grid.get("affine")
        if affine is not None:
            affine = np.asarray_chkfinite(affine, float).reshape(4, 4)
        more = {name: grid[name] for name in PREPARATION if grid.get(name)}
        checked = {"shape": tuple(map(int, grid["shape"])), "affine": affine, "preparation": more}
        return checked | {"modality": modality}


def _map_array(path: Path) -> np.ndarray:
    """Memory-map a NumPy file read-only; nothing in it is executed."""
    if not path.is_file():
        remedy = f"run `python -m brainsex convert {path.parent}` (notebook 02)"
        raise FileNotFoundError(f"{path}: no such file; {remedy}, DATA_ACCESS.md says how to start")
    with storage.reading(path, "a whole NumPy array", CONVERT_AGAIN):
        return np.lib.format.open_memmap(path, mode="r")
