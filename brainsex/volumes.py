"""FA or T1 volumes: read in RAS, cleaned, reduced to the study's grid; a folder to one array.

The study reduces each volume with ``skimage.transform.resize``: a Gaussian of (factor - 1) / 2
voxels against aliasing, then linear interpolation; here, a small matrix for each axis.
"""

import hashlib
import json
import math
import shutil
from collections.abc import Sequence
from contextlib import suppress
from functools import lru_cache
from pathlib import Path

import joblib
import nibabel as nib
import numpy as np
import pandas as pd
from isal import igzip
from scipy.ndimage import affine_transform, gaussian_filter1d, zoom
from tqdm.auto import tqdm

from brainsex import BRAIN_THRESHOLD, LABELS, SHAPE, registration, storage, tables
from brainsex.storage import MAX_VOXELS

MAX_EXTRA_BYTES = 1 << 20  # read before the voxels (header and extensions), and after them
MAX_OUT_OF_RANGE = 0.01  # share of the voxels beyond [0, 1] that an FA map may have
FILLED_SHARE = 0.75  # of each axis of the grid, that `normalise_size` makes a brain fill
MAX_BRAIN_ML = 2500  # a T1-weighted volume with more of it is a head with its skull
MEASURES = ["brain_volume_ml", "non_finite", "negative", "above_one"]
RESULTS = ("subjects.csv", "labels.npy", "rejected.csv", "grid.json", "tensors.npy")


def load_volume(path: str | Path, *, contiguous: bool = True) -> tuple[np.ndarray, np.ndarray]:
    """Read a NIfTI volume (.nii, .nii.gz) whole, with its checksum verified, in RAS orientation.

    Returns a volume (X, Y, Z) float32, its axes closest to right, anterior, superior, and its
    affine (4, 4) to mm; unless `contiguous`, a view in the file's memory order, whose axes may run
    backwards. Raises FileNotFoundError; ValueError for anything but one real 3D NIfTI-1 volume.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such volume; DATA_ACCESS.md says how to get the data")
    with storage.reading(path, f"a whole NIfTI-1 file of 3D real voxels, at most {MAX_VOXELS}"):
        with igzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            header = nib.Nifti1Header(file.read(nib.Nifti1Header.sizeof_hdr))
            shape, dtype = header.get_data_shape(), header.get_data_dtype()
            offset, bounded = header.get_data_offset(), 0 < math.prod(shape) <= MAX_VOXELS
            bounded &= header.sizeof_hdr <= offset <= MAX_EXTRA_BYTES
            if len(shape) != 3 or not bounded or dtype.kind not in "iuf":
                raise ValueError(f"found {shape} of {dtype} from byte {offset}")
            file.seek(0)
            content = file.read(offset + dtype.itemsize * math.prod(shape))
            file.read(MAX_EXTRA_BYTES)  # to its end, where gzip compares the checksum
        affine, codes = header.get_best_affine(), (header["sform_code"], header["qform_code"])
        if not (any(codes) and np.isfinite(affine).all() and abs(np.linalg.det(affine)) > 1e-6):
            raise ValueError(f"no affine that tells left from right: {affine.tolist()}")
        voxels = np.ndarray(shape, dtype, content, offset, order="F")  # a view, not a copy
        voxels = nib.volumeutils.apply_read_scaling(voxels, *header.get_slope_inter())
        voxels = voxels.astype(np.float32, copy=False)
        image = nib.as_closest_canonical(nib.Nifti1Image(voxels, affine))
    return np.ascontiguousarray(image.dataobj) if contiguous else image.dataobj, image.affine


load = load_volume


def _memory_order(volume: np.ndarray) -> tuple[slice, ...]:
    """Index that mirrors backward axes: numpy is ten times as fast in the order of memory."""
    return tuple(slice(None, None, -1 if step < 0 else 1) for step in volume.strides)


def _range(volume: np.ndarray) -> tuple[np.number, np.number]:
    """Return the least and the largest value; NaN where there is one."""
    stored = volume[_memory_order(volume)]
    return stored.min(), stored.max()


@lru_cache(maxsize=32)
def _axis_operator(old: int, new: int) -> np.ndarray:
    """Build the (new, old) float32 matrix of anti-aliasing and interpolation along one axis."""
    smooth = np.eye(old)
    if old > new:
        smooth = gaussian_filter1d(smooth, (old / new - 1) / 2, axis=0, mode="mirror")
    return np.float32(zoom(smooth, (new / old, 1), order=1, mode="mirror", grid_mode=True))


def resample(
    volume: np.ndarray, affine: np.ndarray, shape: tuple[int, int, int] = SHAPE
) -> tuple[np.ndarray, np.ndarray]:
    """Reduce a finite volume (X, Y, Z) to `shape` over the same field of view, without aliasing.

    Equal to ``skimage.transform.resize(volume, shape)`` up to float32 rounding. Returns the volume,
    float32 within the range of its values, and its affine (4, 4): voxel faces stay aligned. Raises
    ValueError if volume or shape are not 3D, or a value is not finite: `clean` it first.
    """
    low, high = _range(volume)
    if volume.ndim != 3 or len(shape) != 3 or min(shape) < 1 or not np.isfinite([low, high]).all():
        sizes = f"{volume.shape} with {low} to {high}, and {shape}"
        raise ValueError(f"expected a finite 3D volume and a 3D shape, found {sizes}; clean it")
    x, y, z = (_axis_operator(old, new) for old, new in zip(volume.shape, shape))
    order = _memory_order(volume)
    stored = np.asfortranarray(volume[order], dtype=np.float32).T  # (Z, Y, X), a file's uncopied
    # mirrored afterwards, which is the same: each operator mirrored along both axes is itself
    reduced = np.tensordot(z, y @ (stored @ x.T), 1).T[order]
    factors = np.divide(volume.shape, shape)
    to_old = nib.affines.from_matvec(np.diag(factors), (factors - 1) / 2)
    return np.ascontiguousarray(reduced.clip(np.float32(low), np.float32(high))), affine @ to_old


def clean(volume: np.ndarray, modality: str = "fa") -> tuple[np.ndarray, dict[str, int]]:
    """Bring a volume (X, Y, Z) into [0, 1]: non-finite and negative voxels to 0, those above to 1.

    A T1-weighted volume (``t1``, of the brain alone) is divided first by twice the median of the
    brain, that being what is above a tenth of the 99th percentile: white matter is then near 0.6.

    Returns the volume, float32, and how many voxels were ``non_finite``, ``negative``,
    ``above_one``. Raises ValueError if nothing is left, or more than 1 % of FA was out of range.
    """
    counts = dict.fromkeys(MEASURES[1:], 0)
    if not np.isfinite(_range(volume)).all():
        counts["non_finite"] = int(np.count_nonzero(~np.isfinite(volume)))
        volume = np.nan_to_num(volume, posinf=0, neginf=0)
    values = volume.astype(np.float32, copy=False)
    if modality == "t1" and (floor := np.percentile(values, 99) / 10) > 0:
        values = values / (2 * np.median(values[values > floor]))
    low, high = _range(values)
    if high <= 0:
        raise ValueError("no voxel above 0: an empty volume")
    if low < 0 or high > 1:
        negative, above = np.count_nonzero(values < 0), np.count_nonzero(values > 1)
        counts |= {"negative": int(negative), "above_one": int(above)}
        values = values.clip(0, 1)
        if modality == "fa" and negative + above > MAX_OUT_OF_RANGE * np.count_nonzero(values):
            problem = f"values from {low:.4g} to {high:.4g}: another kind of image, or scaled"
            raise ValueError(f"expected fractional anisotropy in [0, 1], found {problem}")
    return values, counts


def normalise_size(volume: np.ndarray) -> np.ndarray:
    """Stretch and shift a brain along X, Y and Z to fill the middle three quarters of its grid.

    A brain's ends along an axis are where the half per cent of its voxels begins: a stray one does
    not count. Takes (X, Y, Z) in [0, 1] with some brain; returns float32 on the same grid.
    """
    brain, step, middle = volume > BRAIN_THRESHOLD, np.ones(3), np.zeros(3)
    for axis, size in enumerate(volume.shape):
        share = np.cumsum(brain.sum(axis=tuple({0, 1, 2} - {axis})))
        edges = np.arange(size + 1) - 0.5  # of the voxels, between which the share grows evenly
        low, high = np.interp((0.005, 0.995), np.concatenate([[0], share]) / share[-1], edges)
        step[axis] = max((high - low) / (FILLED_SHARE * size), 1e-3)
        middle[axis] = (low + high) / 2
    offset = middle - step * (np.array(volume.shape) - 1) / 2
    return affine_transform(volume, step, offset, order=1)  # step < 4/3: nothing to smooth for


def brain_volume(volume: np.ndarray, affine: np.ndarray) -> float:
    """Return the volume in ml of what is above `BRAIN_THRESHOLD`: in native space, brain size."""
    brain = volume[_memory_order(volume)] > BRAIN_THRESHOLD
    return float(np.count_nonzero(brain) * abs(np.linalg.det(affine[:3, :3])) / 1000)


def prepare(
    path: str | Path,
    modality: str = "fa",
    normalised: bool = False,
    masks: Sequence[Path] | None = None,
) -> tuple[np.ndarray, np.ndarray, dict[str, float]]:
    """Read and clean a volume on its own grid, as a cohort of `modality` and `normalised` has it.

    Returns the volume (X, Y, Z) float32 in [0, 1]; its affine (4, 4), voxel indices to mm; and the
    counts of `clean` with the native ``brain_volume_ml``. `masks` holds the path of one mask or
    label volume, outside which voxels become 0. Raises ValueError for a skull, or an unfit mask.
    """
    volume, affine = load_volume(path, contiguous=False)
    if masks is not None:
        if len(masks) != 1:
            names = ", ".join(map(str, masks)) or "none"
            raise ValueError(f"expected one mask, found {names}; see --mask")
        labels, mask_affine = load_volume(masks[0], contiguous=False)
        if not registration.same_grid(labels, mask_affine, (volume.shape, affine)):
            raise ValueError(f"{masks[0]}: expected its volume's grid, found another")
        if not (inside := labels > 0).any():
            raise ValueError(f"{masks[0]}: expected labels above 0, found none")
        volume = np.where(inside, volume, 0)
    volume, counts = clean(volume, modality)
    size = round(brain_volume(volume, affine), 3)
    if not size or (modality == "t1" and size > MAX_BRAIN_ML):
        raise ValueError(f"expected a brain, without its skull, found {size:.0f} ml of it")
    volume = normalise_size(volume) if normalised else volume
    return volume, affine, {"brain_volume_ml": size, **counts}


def convert(
    source: str | Path | pd.DataFrame,
    table: str | Path,
    out_dir: str | Path,
    *,
    shape: tuple[int, int, int] = SHAPE,
    regrid: bool = False,
    normalised: bool = False,
    leave_out_qc: bool = False,
    mask: str | None = None,
    align: str | None = None,
    workers: int | None = None,
    overwrite: bool = False,
) -> Path:
    """Turn volumes and a table of people into a cohort; return the path of its ``tensors.npy``.

    Memory does not depend on the number of subjects. A killed run goes on where it stopped; a
    complete one is repeated only if files or people have changed. A bad subject is only left out.

    Parameters
    ----------
    source : folder of FA ``<ID>.nii.gz`` or ``<ID>.nii``; or rows from `layouts.choose_volumes`.
    table : of people, or the folder that holds it.
    out_dir : gets ``tensors.npy`` (N, X, Y, Z) float32 in RAS, ``labels.npy`` (N,) int64,
        ``subjects.csv``, ``grid.json`` and ``rejected.csv``; subjects in the order of their IDs.
    regrid : resample volumes on another grid than the first usable one's, instead of rejecting.
    leave_out_qc : reject the subjects whose QC_Issue is not blank.
    mask : the pattern that the column ``mask`` of `source`, lists of paths, was matched by.
    align : ``rigid`` or ``affine``: register to MNI152; how well is ``alignment_dice``.
    overwrite : start anew in a folder made with other options, otherwise a ValueError.
    """
    table, out_dir = Path(table), Path(out_dir)
    if not isinstance(source, pd.DataFrame):
        if not (paths := sorted(Path(source).glob("[!.]*.nii*"))):
            raise FileNotFoundError(f"{source}: expected <ID>.nii.gz, found none; run `extract`")
        subjects = map(tables.subject_id, paths)
        source = pd.DataFrame({"Subject": subjects, "path": paths, "modality": "fa"})
    people = tables.read_people(tables.find_people(table) if table.is_dir() else table)
    files = source.groupby("Subject")["path"].agg(list).to_dict()
    accepted, rejected = tables.match_subjects(files, people, leave_out_qc)
    grid = {"shape": list(map(int, shape)), "modality": str(source["modality"].iloc[0])}
    grid["normalised"] = normalised
    grid |= {name: value for name, value in {"mask": mask, "align": align}.items() if value}
    masks = source.set_index("Subject").get("mask", {})
    settings = grid | {"regrid": regrid, "leave_out_qc": leave_out_qc}
    results = (*RESULTS, ".parts/*.npz")
    storage.start_run(out_dir, "convert", settings, overwrite=overwrite, results=results)
    jobs = {subject: (path, masks.get(subject)) for subject, path in accepted.items()}
    paths = [path for volume, own in jobs.values() for path in (volume, *(own or ()))]
    stamps = [(stat.st_size, stat.st_mtime_ns) for stat in map(Path.stat, paths)]
    inputs = json.dumps([stamps, rejected, people.loc[list(accepted)].to_json(), settings])
    inputs = hashlib.sha256(inputs.encode()).hexdigest()
    whole = all((out_dir / name).is_file() for name in RESULTS)
    if not whole or storage.read_json(out_dir / "grid.json").get("inputs") != inputs:
        settings["inputs"] = inputs
        records = _convert_subjects(jobs, out_dir / ".parts", workers, settings)
        rejected |= {s: record["reason"] for s, record in records.items() if "reason" in record}
        grid["inputs"] = "" if any(record.get("retry") for record in records.values()) else inputs
        _write_cohort(out_dir, grid, people, records, rejected)
    shutil.rmtree(out_dir / ".parts", ignore_errors=True)
    count, left_out = np.load(out_dir / "labels.npy").size, pd.read_csv(out_dir / "rejected.csv")
    print(f"{out_dir.name}: {count} subjects, {len(left_out)} left out (rejected.csv says why)")
    return out_dir / "tensors.npy"


def _convert_subjects(
    jobs: dict[str, tuple], parts: Path, workers: int | None, settings: dict
) -> dict[str, dict]:
    """Reduce each subject into ``parts/<ID>.npz``; the first usable one sets the cohort's grid."""
    grid = registration.MNI_GRID if "align" in settings else None
    for path, masks in jobs.values() if grid is None else ():
        with suppress(ValueError, OSError):  # `_convert_subject` says why
            volume, affine, _ = prepare(path, settings["modality"], masks=masks)
            grid = volume.shape, affine
            break
    settings = settings | {"inputs": f"{settings['inputs']} {grid}"}  # what a part is made of
    work = joblib.delayed(_convert_subject)
    calls = (work(parts / f"{s}.npz", *job, grid, settings) for s, job in jobs.items())
    run = joblib.Parallel(workers or joblib.cpu_count(), "threading", return_as="generator")
    return dict(zip(jobs, tqdm(run(calls), "convert", total=len(jobs), unit="subject")))


def _convert_subject(
    part: Path, path: Path, masks: list[Path] | None, grid: tuple | None, settings: dict
) -> dict:
    """Write a volume of the cohort's native `grid` (shape, affine) to `part`; return its record."""
    with suppress(Exception), np.load(part, allow_pickle=False) as saved:  # of a killed run
        if (record := json.loads(str(saved["record"])))["inputs"] == settings["inputs"]:
            return record
    try:
        volume, affine, record = prepare(path, settings["modality"], masks=masks)
        if pose := settings.get("align"):
            affine, record["alignment_dice"] = registration.align(volume, affine, pose)
        if not registration.same_grid(volume, affine, grid):
            if not (settings["regrid"] or pose):
                message = f"its grid is {volume.shape} {affine.round(3).tolist()}, not the cohort's"
                raise ValueError(f"{message} {grid[0]} {grid[1].round(3).tolist()}; see --regrid")
            volume, affine = registration.regrid(volume, affine, grid), grid[1]
        volume = normalise_size(volume) if settings["normalised"] else volume
        volume, affine = resample(volume, affine, tuple(settings["shape"]))
    except (ValueError, OSError) as error:  # OSError is the disk's fault: the next run tries again
        return {"reason": str(error), "retry": isinstance(error, OSError)}
    record |= {"affine": affine.tolist(), "inputs": settings["inputs"]}
    with storage.atomic_path(part) as partial, partial.open("wb") as file:
        np.savez(file, volume=volume, record=json.dumps(record))
    return record


def _write_cohort(
    out_dir: Path, grid: dict, people: pd.DataFrame, records: dict[str, dict], rejected: dict
) -> None:
    """Write the cohort's files from its parts; ``tensors.npy``, without which none loads, last."""
    (out_dir / "tensors.npy").unlink(missing_ok=True)
    reasons = pd.DataFrame(sorted(rejected.items()), columns=["Subject", "reason"])
    storage.write_text(path := out_dir / "rejected.csv", reasons.to_csv(index=False))
    records = {s: record for s, record in records.items() if s not in rejected}
    if not records:
        raise ValueError(f"{path}: no usable volume, the last as: {[*rejected.values()][-1]}")
    measures = pd.DataFrame.from_dict(records, "index")
    measures = measures.reindex(columns=[*MEASURES, "alignment_dice"]).dropna(axis="columns")
    subjects = people.loc[list(records)].join(measures).reset_index()
    subjects.insert(2, "label", subjects["Gender"].map(LABELS))
    storage.write_text(out_dir / "subjects.csv", subjects.to_csv(index=False))
    labels = subjects["label"].to_numpy(np.int64)
    storage.write_array(out_dir / "labels.npy", labels.shape, labels.dtype, [labels])
    grid = {"affine": next(iter(records.values()))["affine"], **grid}
    storage.write_text(out_dir / "grid.json", json.dumps(grid))
    parts = (_load_part(out_dir / ".parts" / f"{subject}.npz") for subject in records)
    shape = (len(records), *grid["shape"])
    storage.write_array(out_dir / "tensors.npy", shape, np.float32, parts)


def _load_part(path: Path) -> np.ndarray:
    """Load the reduced volume of one subject."""
    with np.load(path, allow_pickle=False) as saved:
        return saved["volume"]
