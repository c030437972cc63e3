"""FA or T1 volumes: read in RAS, cleaned, reduced to the study's grid; a folder to one array.

The study reduces each volume with ``skimage.transform.resize``: a Gaussian of (factor - 1) / 2
voxels against aliasing, then linear interpolation; here, a small matrix for each axis.
"""

import json
import shutil
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from functools import lru_cache
from pathlib import Path

import joblib
import nibabel as nib
import numpy as np
import pandas as pd
from scipy.ndimage import gaussian_filter1d, zoom
from tqdm.auto import tqdm

from brainsex import BRAIN_THRESHOLD, LABELS, SHAPE, layouts, participants, registration, storage
from brainsex.storage import load_volume, read_grid

NO_VOLUME = "a row, but no volume"
NO_ROW = "a volume, but no row in the table; --id, --subject or --session take others"
MAX_OUT_OF_RANGE = 0.25  # share of the brain beyond [0, 1], as by ringing, that an FA map may have
MAX_BRAIN_ML = 2500  # a T1-weighted volume with more of it is a head with its skull
MEASURES = ["brain_volume_ml", "non_finite", "negative", "above_one"]
RESULTS = ("subjects.csv", "labels.npy", "rejected.csv", "grid.json", "tensors.npy")
load = load_volume


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
    low, high = volume.min(), volume.max()
    if volume.ndim != 3 or len(shape) != 3 or min(shape) < 1 or not np.isfinite([low, high]).all():
        raise ValueError(f"expected finite 3D, found {volume.shape}, {low} to {high}, and {shape}")
    x, y, z = (_axis_operator(old, new) for old, new in zip(volume.shape, shape))
    slices = y @ (volume.T.astype(np.float32, copy=False) @ x.T)  # (Z, y, x): a file's own order
    reduced = np.tensordot(z, slices, 1).T.clip(np.float32(low), np.float32(high))
    factors = np.divide(volume.shape, shape)
    return reduced, affine @ nib.affines.from_matvec(np.diag(factors), (factors - 1) / 2)


def clean(volume: np.ndarray, modality: str = "fa") -> tuple[np.ndarray, dict[str, int]]:
    """Bring a volume (X, Y, Z) into [0, 1]: non-finite and negative voxels to 0, those above to 1.

    A T1-weighted volume (``t1``, of the brain alone) is divided first by twice the median of the
    brain, that being what is above a tenth of the 99th percentile: white matter is then near 0.6.

    Returns the volume, float32, and how many voxels were ``non_finite``, ``negative``,
    ``above_one``. Raises ValueError if nothing is left, or for what cannot be FA: of a median above
    1, or with more than a quarter of the brain out of range.
    """
    counts = dict.fromkeys(MEASURES[1:], 0)
    if not np.isfinite(volume).all():
        counts["non_finite"] = int(np.count_nonzero(~np.isfinite(volume)))
        volume = np.nan_to_num(volume, posinf=0, neginf=0)
    values = volume.astype(np.float32, copy=False)
    if modality == "t1" and (floor := np.percentile(values, 99) / 10) > 0:
        values = values / (2 * np.median(values[values > floor]))
    low, high = values.min(), values.max()
    if low < 0 or high > 1:
        negative, above = np.count_nonzero(values < 0), np.count_nonzero(values > 1)
        counts |= {"negative": int(negative), "above_one": int(above)}
        brain = np.abs(values[np.abs(values) > BRAIN_THRESHOLD])  # ringing around 0 is none of it
        out = np.count_nonzero(values < -BRAIN_THRESHOLD) + above
        if modality == "fa" and (np.median(brain) > 1 or out > MAX_OUT_OF_RANGE * len(brain)):
            remedy = "divide it by its scale, as 1000; or is it no FA (--kind t1)?"
            problem = f"found values from {low:.4g} to {high:.4g}: {remedy}"
            raise ValueError(f"expected fractional anisotropy in [0, 1], {problem}")
        values = values.clip(0, 1)
    return values, counts


def brain_volume(volume: np.ndarray, affine: np.ndarray) -> float:
    """Return the volume in ml of what is above `BRAIN_THRESHOLD`: in native space, brain size."""
    brain = np.count_nonzero(volume > BRAIN_THRESHOLD)
    return float(brain * abs(np.linalg.det(affine[:3, :3])) / 1000)


def prepare(
    path: str | Path, modality: str = "fa", masks: Sequence[Path] | None = None
) -> tuple[np.ndarray, np.ndarray, dict[str, float]]:
    """Read and clean a volume on its own grid, as a cohort of `modality` has it.

    Returns the volume (X, Y, Z) float32 in [0, 1]; its affine (4, 4), voxel indices to mm; and the
    counts of `clean` with the native ``brain_volume_ml``. `masks` holds the path of one mask or
    label volume, outside which voxels become 0. Raises ValueError for a skull, or an unfit mask.
    """
    volume, affine = load_volume(path)
    if masks is not None:
        if len(masks) != 1:
            raise ValueError(f"expected one mask, found {[*map(str, masks)]}; see --mask")
        labels, mask_affine = load_volume(masks[0])
        if not registration.same_grid(labels.shape, mask_affine, (volume.shape, affine)):
            raise ValueError(f"{masks[0]}: expected its volume's grid, found another")
        volume = np.where(labels > 0, volume, 0)
    volume, counts = clean(volume, modality)
    size = round(brain_volume(volume, affine), 3)
    if not size or (modality == "t1" and size > MAX_BRAIN_ML):
        raise ValueError(f"expected a brain without its skull (or --mask), found {size:.0f} ml")
    return volume, affine, {"brain_volume_ml": size, **counts}


def prepare_like(
    path: str | Path, grid: Mapping, masks: Sequence[Path] | None = None
) -> tuple[np.ndarray, np.ndarray, dict[str, float]]:
    """Read a volume and prepare it as those of a cohort, down to its small grid.

    `grid` is what ``grid.json`` and a network's ``run.json`` hold: shape, modality and, where the
    cohort had them, mask, align, regrid and the native grid (shape, affine). Returns the
    volume, float32 in [0, 1], its affine (4, 4) and the record of `prepare`. Raises ValueError for
    a volume that cannot be prepared so.
    """
    if ("mask" in grid) != (masks is not None):
        raise ValueError(f"expected {'no' if masks else 'a'} mask, as the cohort was made; --mask")
    volume, affine, record = prepare(path, grid["modality"], masks=masks)
    if pose := grid.get("align"):
        affine, record["alignment_dice"] = registration.align(volume, affine, pose)
    native = grid.get("native")
    if native and not registration.same_grid(volume.shape, affine, native):
        if not (grid.get("regrid") or pose):
            own = f"{volume.shape} {affine.round(3).tolist()}"
            raise ValueError(f"its grid is {own}, not the cohort's {native}; --regrid")
        volume, affine = registration.regrid(volume, affine, native), np.array(native[1])
    volume, affine = resample(volume, affine, tuple(grid["shape"]))
    small = volume.shape, affine if grid.get("affine") is None else grid["affine"]
    if not registration.same_grid(volume.shape, affine, small):
        raise ValueError(f"another field of view than the cohort's, {affine.round(3).tolist()}")
    return volume, affine, record


def convert(
    source: str | Path | pd.DataFrame,
    table: str | Path,
    out_dir: str | Path,
    *,
    shape: tuple[int, int, int] = SHAPE,
    regrid: bool = False,
    mask: str | None = None,
    align: str | None = None,
    workers: int | None = None,
    overwrite: bool = False,
) -> Path:
    """Turn volumes and a table of people into a cohort; return the path of its ``tensors.npy``.

    Memory does not depend on the number of subjects. A killed run goes on where it stopped; a
    complete one is repeated only if files or people have changed. A bad subject is only left out;
    ValueError if that happens to more than half of them.

    Parameters
    ----------
    source : folder of FA ``<ID>.nii.gz`` and nothing else; or rows of `layouts.choose_volumes`.
    table : of people, the folder that holds it, or what `participants.read_people` returns.
    out_dir : gets ``tensors.npy`` (N, X, Y, Z) float32 in RAS, ``labels.npy`` (N,) int64,
        ``subjects.csv``, ``grid.json`` and ``rejected.csv``; subjects in the order of their IDs.
    regrid : resample volumes on another grid than the commonest, instead of rejecting them.
    mask : the pattern that the column ``mask`` of `source`, lists of paths, was matched by.
    align : ``rigid`` or ``affine``: register to MNI152; how well is ``alignment_dice``.
    overwrite : start anew in a folder made with other options, otherwise a ValueError.
    """
    out_dir = Path(out_dir)
    if not isinstance(table, pd.DataFrame):
        table = participants.find_people(table) if Path(table).is_dir() else table
        table = participants.read_people(table)
    if not isinstance(source, pd.DataFrame):
        source = layouts.choose_volumes(layouts.find_volumes(source), match="*")
    files = source.groupby("Subject")["path"].agg(list).to_dict()
    table = table.set_axis(participants.spell_ids(table.index, files)).rename_axis("Subject")
    accepted, rejected = _match_subjects(files, table)
    grid = {"shape": list(map(int, shape)), "modality": str(source["modality"].iloc[0])}
    asked = {"mask": mask, "align": align, "regrid": regrid}
    grid |= {name: value for name, value in asked.items() if value}
    whole = all((out_dir / name).is_file() for name in RESULTS)
    stale = [*RESULTS, ".parts/*"] if overwrite else ()  # an unfinished run may change its settings
    storage.start_run(out_dir, "convert", grid, overwrite=overwrite or not whole, results=stale)
    masks = source.set_index("Subject").get("mask", {})
    jobs = {subject: (path, masks.get(subject)) for subject, path in accepted.items()}
    stats = [(p, p.stat()) for path, own in jobs.values() for p in (path, *(own or ()))]
    stamps = [(*path.parts[-2:], stat.st_size, stat.st_mtime_ns) for path, stat in stats]
    rows = table.loc[list(accepted)].to_json()
    inputs = joblib.hash(json.dumps([stamps, rejected, rows, grid]))
    if overwrite or not whole or storage.read_json(out_dir / "grid.json").get("inputs") != inputs:
        grid["native"] = registration.MNI_GRID if align else _commonest_grid(accepted.values())
        settings, work = grid | {"inputs": inputs}, joblib.delayed(_convert_subject)
        calls = (work(out_dir / f".parts/{s}.npz", *job, settings) for s, job in jobs.items())
        run = joblib.Parallel(workers or joblib.cpu_count(), "threading", return_as="generator")
        records = dict(zip(jobs, tqdm(run(calls), "convert", total=len(jobs), unit="subject")))
        rejected |= {s: record["reason"] for s, record in records.items() if "reason" in record}
        grid["inputs"] = "" if any(record.get("retry") for record in records.values()) else inputs
        _write_cohort(out_dir, grid, table, records, rejected, len(files))
    shutil.rmtree(out_dir / ".parts", ignore_errors=True)
    count, left_out = np.load(out_dir / "labels.npy").size, pd.read_csv(out_dir / "rejected.csv")
    print(f"{out_dir.name}: {count} subjects, {len(left_out)} left out (rejected.csv says why)")
    if len(left_out):
        print(_count_reasons(left_out["reason"])[:3].to_string(header=False))
    return out_dir / "tensors.npy"


def _match_subjects(
    files: dict[str, list[Path]], people: pd.DataFrame
) -> tuple[dict[str, Path], dict[str, str]]:
    """Match volumes by subject to `read_people`: paths to use, and reasons of who is rejected."""
    accepted, rejected = {}, {}
    for subject in sorted({*files, *people.index}):
        if subject not in files:
            rejected[subject] = NO_VOLUME
        elif subject not in people.index:
            rejected[subject] = NO_ROW
        elif len(paths := files[subject]) > 1:
            names = ", ".join("/".join(path.parts[-3:]) for path in paths)
            rejected[subject] = f"{len(paths)} volumes: {names}: keep one (--session, --match)"
        elif not paths[0].is_file():
            rejected[subject] = "no file behind its name: a folder, or a broken link (datalad get)"
        elif (gender := people.at[subject, "Gender"]) not in LABELS:
            rejected[subject] = f"sex is {gender!r}, expected M or F"
        else:
            accepted[subject] = paths[0]
    return accepted, rejected


def _commonest_grid(paths: Iterable[Path]) -> list | None:
    """Return the grid, shape and affine, that most volumes have, to a tenth of a voxel."""
    grids: dict[tuple, list] = {}
    for path in paths:
        with suppress(ValueError, OSError):  # `_convert_subject` says why
            shape, affine = read_grid(path)
            step = nib.affines.voxel_sizes(affine).min() / 10
            key = shape, (affine / step).round().tobytes()
            grids.setdefault(key, []).append([[*shape], affine.tolist()])
    return max(grids.values(), key=len, default=[None])[-1]


def _convert_subject(part: Path, path: Path, masks: list[Path] | None, settings: dict) -> dict:
    """Write a volume, prepared as the settings say, to `part`; return its record."""
    with suppress(Exception), np.load(part, allow_pickle=False) as saved:  # of a killed run
        if (record := json.loads(str(saved["record"])))["settings"] == settings:
            return record
    try:
        volume, affine, record = prepare_like(path, settings, masks)
    except (ValueError, OSError) as error:  # OSError is the disk's fault: the next run tries again
        return {"reason": str(error), "retry": isinstance(error, OSError)}
    record |= {"affine": affine.tolist(), "settings": settings}
    with storage.atomic_path(part) as partial, partial.open("wb") as file:
        np.savez(file, volume=volume, record=json.dumps(record))
    return record


def _write_cohort(
    out_dir: Path, grid: dict, people: pd.DataFrame, records: dict, rejected: dict, count: int
) -> None:
    """Write the cohort's files from its parts; ``tensors.npy``, without which none loads, last.

    Raises ValueError if more than half of the `count` subjects who have a volume are left out.
    """
    (out_dir / "tensors.npy").unlink(missing_ok=True)
    reasons = pd.DataFrame(sorted(rejected.items()), columns=["Subject", "reason"])
    storage.write_text(path := out_dir / "rejected.csv", reasons.to_csv(index=False))
    records = {s: record for s, record in records.items() if s not in rejected}
    if not records or 2 * len(records) < count:
        lost = _count_reasons(reason for reason in rejected.values() if reason != NO_VOLUME)
        problem = f"expected volumes of most of {count} subjects, found {len(records)} usable"
        raise ValueError(f"{path}: {problem}; {lost.iloc[0]} are left out as: {lost.index[0]}")
    measures = pd.DataFrame.from_dict(records, "index")
    measures = measures.reindex(columns=[*MEASURES, "alignment_dice"]).dropna(axis="columns")
    subjects = people.loc[list(records)].join(measures).reset_index()
    subjects.insert(2, "label", subjects["Gender"].map(LABELS))
    storage.write_text(out_dir / "subjects.csv", subjects.to_csv(index=False))
    labels = subjects["label"].to_numpy(np.int64)
    storage.write_array(out_dir / "labels.npy", labels.shape, labels.dtype, [labels])
    grid = {"affine": next(iter(records.values()))["affine"], **grid}
    storage.write_text(out_dir / "grid.json", json.dumps(grid))
    parts = (np.load(out_dir / ".parts" / f"{subject}.npz")["volume"] for subject in records)
    shape = (len(records), *grid["shape"])
    storage.write_array(out_dir / "tensors.npy", shape, np.float32, parts)


def _count_reasons(reasons: Iterable[str]) -> pd.Series:
    """Count the reasons of who is left out that begin alike, the commonest first, by an example."""
    plain = pd.Series(list(reasons), dtype=str).str.replace(r"^\S*[/\\]\S*: ", "", regex=True)
    return plain.groupby(plain.str.slice(0, 12)).transform("first").value_counts()
