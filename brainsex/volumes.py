"""NIfTI volumes: read in RAS, reduced to the study's grid, a folder of them to one array.

The study reduces each volume with ``skimage.transform.resize``: a Gaussian of (factor - 1) / 2
voxels against aliasing, then linear interpolation. Both are linear and separable, so each axis is
one small matrix here, built from scipy's own filters; the affine follows the grid.
"""

import gzip
import hashlib
import json
import os
import zlib
from functools import lru_cache
from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd
from joblib import Parallel, delayed
from scipy.ndimage import affine_transform, gaussian_filter1d, zoom
from tqdm.auto import tqdm

from brainsex import LABELS, SHAPE, replacing

MAX_BYTES = 2 << 30
"""No volume is inflated beyond this (a 0.7 mm whole-head T1 is 0.1 GB)."""
BRAIN_FA = 0.02
"""Fractional anisotropy above which a voxel counts as brain."""
MAX_OUT_OF_RANGE = 0.01
"""Largest share of non-zero voxels that may be no FA at all before a volume is rejected."""


def load(path: str | Path) -> tuple[np.ndarray, np.ndarray]:
    """Read a NIfTI volume whole, with its checksum verified, in RAS orientation.

    Parameters
    ----------
    path : path of a ``.nii`` or ``.nii.gz`` file, any orientation.

    Returns
    -------
    volume : (X, Y, Z) float32, axes closest to right, anterior, superior; values as stored.
    affine : (4, 4) float64, voxel indices to mm.

    Raises
    ------
    FileNotFoundError
        No such file.
    ValueError
        Truncated or corrupted, not NIfTI-1, not 3D, or without an affine.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such volume. DATA_ACCESS.md says how to get the data.")
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            content = file.read(MAX_BYTES + 1)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ValueError(f"{path}: damaged gzip file ({error}). Fetch it again.") from error
    if len(content) > MAX_BYTES:
        raise ValueError(f"{path}: more than {MAX_BYTES} bytes once inflated: no brain volume.")
    try:
        image = nib.Nifti1Image.from_bytes(content)
        header, ndim = image.header, len(image.shape)
        if ndim != 3:
            raise ValueError(f"expected a 3D volume, found shape {image.shape}")
        if header["sform_code"] == 0 and header["qform_code"] == 0:
            raise ValueError("no affine (sform and qform codes are 0): left and right are unknown")
        if not abs(np.linalg.det(image.affine[:3, :3])) > 1e-6:
            raise ValueError(f"its affine is singular: {image.affine.tolist()}")
        image = nib.as_closest_canonical(image)
        volume = np.ascontiguousarray(image.dataobj, dtype=np.float32)
    except (nib.filebasedimages.ImageFileError, nib.spatialimages.HeaderDataError) as error:
        raise ValueError(f"{path}: not a NIfTI-1 file ({error}).") from error
    except (ValueError, TypeError, OSError, np.linalg.LinAlgError) as error:
        raise ValueError(f"{path}: {error}.") from error
    return volume, image.affine


@lru_cache(maxsize=32)
def _operator(old: int, new: int) -> np.ndarray:
    """(new, old) float32 matrix of anti-aliasing and linear interpolation along one axis."""
    factor = old / new
    smooth = np.eye(old)
    if factor > 1:
        smooth = gaussian_filter1d(smooth, (factor - 1) / 2, axis=0, mode="mirror")
    columns = zoom(smooth, (new / old, 1), order=1, mode="mirror", grid_mode=True)
    return columns.astype(np.float32)


def resample(
    volume: np.ndarray, affine: np.ndarray, shape: tuple[int, int, int] = SHAPE
) -> tuple[np.ndarray, np.ndarray]:
    """Reduce a volume to `shape` over the same field of view, without aliasing.

    Equal to ``skimage.transform.resize(volume, shape)`` up to float32 rounding.

    Parameters
    ----------
    volume : (X, Y, Z) finite floats.
    affine : (4, 4), voxel indices to mm.
    shape : voxels wanted along X, Y, Z.

    Returns
    -------
    volume : `shape`, float32.
    affine : (4, 4), the same millimetres from the new indices.
    """
    if volume.ndim != 3 or len(shape) != 3 or min(shape) < 1:
        raise ValueError(f"expected a 3D volume and shape, found {volume.shape} and {shape}.")
    factors = np.divide(volume.shape, shape)
    x, y, z = (_operator(old, new) for old, new in zip(volume.shape, shape))
    reduced = np.tensordot(x, volume.astype(np.float32, copy=False), 1)  # (x, Y, Z)
    reduced = y @ reduced @ z.T
    return reduced, affine @ _corners(factors)


def _corners(factors: np.ndarray) -> np.ndarray:
    """Affine from new to old voxel indices when voxel faces, not centres, stay aligned."""
    scaling = np.diag([*factors, 1.0])
    scaling[:3, 3] = (factors - 1) / 2
    return scaling


def clean(volume: np.ndarray) -> tuple[np.ndarray, dict[str, int]]:
    """Bring an FA volume into [0, 1]: non-finite and negative voxels to 0, others to 1 at most.

    Returns
    -------
    volume : (X, Y, Z) float32 in [0, 1].
    counts : voxels changed: ``non_finite``, ``negative``, ``above_one``.

    Raises
    ------
    ValueError
        If nothing is left, or if more than 1 % of the non-zero voxels were out of range:
        then it is no FA map.
    """
    finite = np.isfinite(volume)
    with np.errstate(invalid="ignore"):
        negative, above = finite & (volume < 0), finite & (volume > 1)
    counts = {
        "non_finite": int(volume.size - finite.sum()),
        "negative": int(negative.sum()),
        "above_one": int(above.sum()),
    }
    cleaned = np.where(finite, volume, 0).clip(0, 1).astype(np.float32, copy=False)
    brain = np.count_nonzero(cleaned)
    if brain == 0:
        raise ValueError("no voxel above 0: an empty volume")
    if counts["negative"] + counts["above_one"] > MAX_OUT_OF_RANGE * brain:
        raise ValueError(
            f"values from {volume[finite].min():.4g} to {volume[finite].max():.4g}, expected "
            "fractional anisotropy in [0, 1]: another kind of image, or scaled"
        )
    return cleaned, counts


def brain_volume(volume: np.ndarray, affine: np.ndarray) -> float:
    """Volume in ml of the voxels with FA above 0.02; in native space, a measure of brain size."""
    return float(np.count_nonzero(volume > BRAIN_FA) * abs(np.linalg.det(affine[:3, :3])) / 1000)


def identifier(path: Path) -> str:
    """The subject's ID in a volume's name: what stands before ``.nii`` or ``.nii.gz``."""
    return path.name.removesuffix(".gz").removesuffix(".nii")


def find_table(folder: str | Path) -> Path:
    """The behavioural CSV in a cohort's folder, under the project's or HCP's own name."""
    folder = Path(folder)
    named = folder / "unrestricted_behavioral.csv"
    found = [named] if named.is_file() else sorted(folder.glob("unrestricted_*.csv"))
    found = [path for path in found if "freesurfer" not in path.name.lower()]
    if len(found) != 1:
        raise FileNotFoundError(
            f"{folder}: expected unrestricted_behavioral.csv or one unrestricted_*.csv with the "
            f"columns Subject and Gender, found {[p.name for p in found] or 'none'}. "
            "DATA_ACCESS.md says where to get it."
        )
    return found[0]


def read_table(table: str | Path) -> pd.DataFrame:
    """HCP's behavioural table, with what the tables beside it know of the same subjects.

    ``unrestricted_hcp_freesurfer.csv`` adds the intracranial volume; ``restricted.csv`` adds
    family and exact age.

    Returns
    -------
    Indexed by Subject (str): Gender, and where known ``intracranial_volume_ml``, ``age`` (years,
    or HCP's band), ``group`` (family), ``qc_issue``.

    Raises
    ------
    FileNotFoundError, ValueError
        No such table; no Subject or Gender column; a subject in two rows.
    """
    table = Path(table)
    rows = _columns(table, {"Gender": "Gender"}, {"Age": "age", "QC_Issue": "qc_issue"})
    beside = {
        "unrestricted_hcp_freesurfer.csv": {
            "FS_InterCranial_Vol": "intracranial_volume_ml",
            "FS_IntraCranial_Vol": "intracranial_volume_ml",
        },
        "restricted.csv": {"Family_ID": "group", "Age_in_Yrs": "age"},
    }
    for name, wanted in beside.items():
        if (table.parent / name).is_file() and name != table.name:
            more = _columns(table.parent / name, {}, wanted)
            if "intracranial_volume_ml" in more:  # FreeSurfer's are mm³
                more["intracranial_volume_ml"] = more["intracranial_volume_ml"].astype(float) / 1000
            rows = rows.drop(columns=more.columns, errors="ignore").join(more)
    return rows


def _columns(table: Path, needed: dict[str, str], wanted: dict[str, str]) -> pd.DataFrame:
    if not table.is_file():
        raise FileNotFoundError(f"{table}: no such table. DATA_ACCESS.md says where to get it.")
    columns = {"Subject": "Subject"} | needed | wanted
    try:
        rows = pd.read_csv(table, dtype=str, usecols=lambda name: name in columns)
    except (UnicodeDecodeError, pd.errors.ParserError, pd.errors.EmptyDataError) as error:
        raise ValueError(f"{table}: not a CSV table ({error}).") from error
    missing = [name for name in ("Subject", *needed) if name not in rows]
    if missing:
        raise ValueError(f"{table}: expected the columns Subject and Gender, {missing} not found.")
    rows = rows.rename(columns=columns).dropna(subset="Subject")
    rows["Subject"] = rows["Subject"].str.strip()
    twice = rows["Subject"][rows["Subject"].duplicated()].unique()
    if len(twice):
        raise ValueError(f"{table}: subjects in more than one row: {', '.join(twice[:10])}.")
    return rows.set_index("Subject")


def _match(fa_dir: Path, rows: pd.DataFrame) -> tuple[dict[str, Path], list[tuple[str, str]]]:
    """The volumes that have a row and a sex, by ID; and (Subject, reason) of everything else."""
    files: dict[str, list[Path]] = {}
    for path in sorted([*fa_dir.glob("*.nii.gz"), *fa_dir.glob("*.nii")]):
        files.setdefault(identifier(path), []).append(path)
    if not files:
        raise FileNotFoundError(
            f"{fa_dir}: expected <ID>.nii.gz volumes, found none. Run `python -m brainsex extract` "
            "first, or fit FA as DATA_ACCESS.md says."
        )
    accepted, rejected = {}, []
    for subject in sorted({*files, *rows.index}):
        if subject not in files:
            rejected.append((subject, "a row, but no volume"))
        elif subject not in rows.index:
            rejected.append((subject, "a volume, but no row in the table"))
        elif len(files[subject]) > 1:
            rejected.append((subject, f"two volumes: {[p.name for p in files[subject]]}"))
        elif (gender := rows.at[subject, "Gender"]) not in LABELS:
            rejected.append((subject, f"Gender is {gender!r}, expected M or F"))
        else:
            accepted[subject] = files[subject][0]
    return accepted, rejected


def _prepare(path: Path, shape, grid: tuple[tuple, np.ndarray] | None, regrid: bool):
    """One subject's row and record, or the reason why there is none."""
    try:
        volume, affine = load(path)
        volume, counts = clean(volume)
        record = {"brain_volume_ml": round(brain_volume(volume, affine), 3), **counts}
        if grid is not None and not _same_grid((volume.shape, affine), grid):
            if not regrid:
                raise ValueError(
                    f"its grid {volume.shape}, {np.round(affine, 3).tolist()} is not the cohort's "
                    f"{grid[0]}, {np.round(grid[1], 3).tolist()}; regrid=True resamples it"
                )
            to_own = np.linalg.inv(affine) @ grid[1]
            volume = affine_transform(volume, to_own[:3, :3], to_own[:3, 3], grid[0], order=1)
            affine = grid[1]
        return *resample(volume, affine, shape), (volume.shape, affine), record
    except (ValueError, OSError) as error:
        return str(error)


def _same_grid(one, other) -> bool:
    return tuple(one[0]) == tuple(other[0]) and np.allclose(one[1], other[1], atol=1e-3)


def convert(
    fa_dir: str | Path,
    table: str | Path,
    out_dir: str | Path,
    *,
    shape: tuple[int, int, int] = SHAPE,
    regrid: bool = False,
    workers: int | None = None,
) -> Path:
    """Turn a folder of FA volumes and HCP's behavioural table into a cohort that loads at once.

    Streams: memory does not depend on the number of subjects. Resumes after a kill where it
    stopped, and does nothing when files, table and options are those of the last complete run.

    Parameters
    ----------
    fa_dir : folder of ``<ID>.nii.gz`` or ``<ID>.nii``, FA at native resolution.
    table : the behavioural CSV (Subject, Gender, …), or the folder that holds it.
    out_dir : where ``tensors.npy`` (N, X, Y, Z) float32 in RAS, ``labels.npy`` (N,) int64,
        ``subjects.csv``, ``grid.json`` and ``rejected.csv`` go.
    shape : voxels along X, Y, Z.
    regrid : resample volumes on another grid than the first accepted one's, instead of rejecting.
    workers : threads; all cores by default.

    Returns
    -------
    Path of ``tensors.npy``.

    Raises
    ------
    FileNotFoundError, ValueError
        No volumes, no table, or not one usable volume. A single bad subject is left out, listed
        with its reason in ``rejected.csv``, and counted on screen.
    """
    fa_dir, table, out_dir = Path(fa_dir), Path(table), Path(out_dir)
    if not fa_dir.is_dir():
        raise FileNotFoundError(f"{fa_dir}: no such folder of volumes. See DATA_ACCESS.md.")
    rows = read_table(find_table(table) if table.is_dir() else table)
    accepted, rejected = _match(fa_dir, rows)
    known = rows.loc[list(accepted)]
    out_dir.mkdir(parents=True, exist_ok=True)
    target, grid_file = out_dir / "tensors.npy", out_dir / "grid.json"
    stamps = [(s, p.stat().st_size, p.stat().st_mtime_ns) for s, p in accepted.items()]
    key = hashlib.sha256(
        json.dumps([stamps, rejected, known.to_json(), shape, regrid]).encode()
    ).hexdigest()
    if target.is_file() and grid_file.is_file() and json.loads(grid_file.read_text())["key"] == key:
        _report(out_dir, len(np.load(target, mmap_mode="r")))
        return target

    partial, journal = out_dir / ".tensors.npy.partial", out_dir / ".convert.partial"
    records = _records(journal, key)
    paths = list(accepted.values())
    grid = None  # the native grid of the first volume accepted, then everybody's
    with partial.open("r+b" if records else "wb") as data, journal.open("a") as log:
        if not records:
            _header(data, len(paths), shape)
            log.write(json.dumps({"key": key}) + "\n")
        start = data.seek(0) or _header(data, len(paths), shape)
        good = [r for r in records if "reason" not in r]
        if good:
            grid = tuple(good[0]["grid"][0]), np.array(good[0]["grid"][1])
        bar = tqdm(total=len(paths), initial=len(records), desc="convert", unit="subject")
        while grid is None and len(records) < len(paths):  # serial until one sets the grid
            grid = _store(_prepare(paths[len(records)], shape, None, regrid), data, log, records)
            bar.update()
        data.seek(start + 4 * int(np.prod(shape)) * sum("reason" not in r for r in records))
        for result in Parallel(workers or os.cpu_count(), prefer="threads", return_as="generator")(
            delayed(_prepare)(path, shape, grid, regrid) for path in paths[len(records) :]
        ):
            _store(result, data, log, records)
            bar.update()
        bar.close()
        kept = [i for i, record in enumerate(records) if "reason" not in record]
        data.truncate(data.tell())
        data.seek(0)
        _header(data, len(kept), shape)
    rejected += [
        (subject, record["reason"])
        for subject, record in zip(accepted, records)
        if "reason" in record
    ]
    with replacing(out_dir / "rejected.csv") as path:
        pd.DataFrame(sorted(rejected), columns=["Subject", "reason"]).to_csv(path, index=False)
    if not kept:
        journal.unlink()
        partial.unlink()
        raise ValueError(
            f"{fa_dir}: not one usable volume of {len(paths)}; {out_dir / 'rejected.csv'} lists "
            f"the reasons, the first being: {min(rejected)[1]}"
        )
    subjects = known.iloc[kept].reset_index()
    subjects.insert(2, "label", subjects["Gender"].map(LABELS))
    for column in ("brain_volume_ml", "non_finite", "negative", "above_one"):
        subjects[column] = [records[i][column] for i in kept]
    target.unlink(missing_ok=True)  # until the new one stands there, nothing loads
    with replacing(out_dir / "subjects.csv") as path:
        subjects.to_csv(path, index=False)
    with replacing(out_dir / "labels.npy") as path, path.open("wb") as file:
        np.save(file, subjects["label"].to_numpy(np.int64))
    factors = np.divide(grid[0], shape)
    affine = (grid[1] @ _corners(factors)).tolist()
    with replacing(grid_file) as path:
        path.write_text(json.dumps({"shape": list(shape), "affine": affine, "key": key}))
    os.replace(partial, target)
    journal.unlink()
    _report(out_dir, len(kept))
    return target


def _header(file, count: int, shape) -> int:
    header = {"descr": "<f4", "fortran_order": False, "shape": (count, *shape)}
    np.lib.format.write_array_header_1_0(file, header)
    return file.tell()


def _records(journal: Path, key: str) -> list[dict]:
    """Records of an interrupted run over the very same input; none otherwise."""
    if not journal.is_file():
        return []
    lines = journal.read_text().split("\n")[:-1]  # what follows the last newline was cut off
    if not lines or json.loads(lines[0]) != {"key": key}:
        journal.unlink()
        return []
    journal.write_text("".join(line + "\n" for line in lines))
    return [json.loads(line) for line in lines[1:]]


def _store(result, data, log, records: list[dict]):
    """Append a subject's row to the array, then its record to the journal; return its grid."""
    if isinstance(result, str):
        grid, record = None, {"reason": result}
    else:
        row, _, grid, record = result
        data.write(row.tobytes())
        data.flush()
        record["grid"] = [list(grid[0]), grid[1].tolist()]
    log.write(json.dumps(record) + "\n")
    log.flush()
    records.append(record)
    return grid


def _report(out_dir: Path, count: int) -> None:
    rejected = pd.read_csv(out_dir / "rejected.csv", dtype=str)
    no_volume = int((rejected["reason"] == "a row, but no volume").sum())
    print(
        f"{out_dir}: {count} subjects; {len(rejected) - no_volume} volumes rejected, "
        f"{no_volume} rows without a volume (rejected.csv)"
    )
