"""Volumes as the networks take them: one at a time (`nifti`), or a folder of them to one array."""

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import joblib
import numpy as np
import pandas as pd
from scipy.ndimage import affine_transform, gaussian_filter
from tqdm.auto import tqdm

from brainsex import LABELS, SHAPE, cohort, identifier, read_record, replacing, runs, tables, write
from brainsex.archives import UNREADABLE
from brainsex.nifti import brain_volume, clean, load, normalise, read, resample

__all__ = ["brain_volume", "clean", "convert", "identifier", "load", "prepare", "resample"]

MEASURES = ("brain_volume_ml", "non_finite", "negative", "above_one")
RECORD = {"volume", "affine", "native_shape", "native_affine", *MEASURES}
MAX_BRAIN = 2500
"""ml: a T1-weighted volume with more of it is a head with its skull."""


def convert(
    fa_dir: str | Path | pd.DataFrame,
    table: str | Path,
    out_dir: str | Path,
    *,
    shape: tuple[int, int, int] = SHAPE,
    regrid: bool = False,
    normalised: bool = False,
    leave_out_qc: bool = False,
    workers: int | None = None,
) -> Path:
    """Turn a folder of volumes and a table of people into a cohort that loads at once.

    Streams: memory does not depend on the number of subjects. Resumes after a kill where it
    stopped, and does nothing when files, table and options are those of the last complete run.

    Parameters
    ----------
    fa_dir : folder of ``<ID>.nii.gz`` or ``<ID>.nii``, FA at native resolution; or what
        `sources.choose` found in any other layout.
    table : the behavioural CSV (Subject, Gender, …), or the folder that holds it.
    out_dir : gets ``tensors.npy`` (N, X, Y, Z) float32 in RAS, ``labels.npy`` (N,) int64,
        ``subjects.csv``, ``grid.json`` and ``rejected.csv``; subjects in the order of their IDs.
    regrid : resample volumes on another grid than the first accepted one's, instead of rejecting.
    normalised : bring all brains to one size and place (`nifti.normalise`): in native space a
        network sees the size of a head. The brain volume in ``subjects.csv`` stays the native one.
    leave_out_qc : reject the subjects whose QC_Issue is not blank.
    workers : threads; all cores by default.

    Returns
    -------
    Path of ``tensors.npy``.

    Raises
    ------
    FileNotFoundError, ValueError
        No volumes, no table, or not one usable volume. A bad subject is only left out.
    """
    table, out_dir = Path(table), Path(out_dir)
    if not isinstance(fa_dir, pd.DataFrame):
        fa_dir = Path(fa_dir)
        paths = sorted([*fa_dir.glob("*.nii.gz"), *fa_dir.glob("*.nii")])
        found = pd.DataFrame({"Subject": map(identifier, paths), "path": paths})
    else:
        found, fa_dir = fa_dir, os.path.commonpath(list(fa_dir["path"]))
    files = found.groupby("Subject")["path"].agg(list).to_dict()
    if not files:
        advice = "Run `python -m brainsex extract` first, or fit FA as DATA_ACCESS.md says."
        raise FileNotFoundError(f"{fa_dir}: expected <ID>.nii.gz volumes, found none. {advice}")
    rows = tables.read(tables.find(table) if table.is_dir() else table)
    accepted, rejected = tables.match(files, rows, leave_out_qc)
    known = rows.loc[list(accepted)]
    stamps = [(s.st_size, s.st_mtime_ns) for s in (path.stat() for path in accepted.values())]
    modality = "fa" if "modality" not in found else found["modality"].iloc[0]
    options = [list(map(int, shape)), regrid, modality, normalised]
    key = json.dumps([stamps, rejected, known.to_json(), *options])
    key = hashlib.sha256(key.encode()).hexdigest()
    target, parts = out_dir / "tensors.npy", out_dir / f".convert-{key[:16]}"
    if not _done(out_dir, key):
        with runs.alone(out_dir):
            for stale in set(out_dir.glob(".convert-*")) - {parts}:
                shutil.rmtree(stale)
            records = _reduce(accepted, parts, workers or joblib.cpu_count(), *options)
            rejected |= {s: record["reason"] for s, record in records.items() if "reason" in record}
            target.unlink(missing_ok=True)  # nothing loads until everything is written
            reasons = pd.DataFrame(sorted(rejected.items()), columns=["Subject", "reason"])
            write(out_dir / "rejected.csv", reasons.to_csv(index=False))
            kept = {s: record for s, record in records.items() if "reason" not in record}
            if kept:
                again = any("again" in record for record in records.values())
                grid = {"key": "" if again else key, "shape": options[0]}
                grid |= {"modality": modality, "normalised": normalised}
                facts = {"source": fa_dir, "table": table}
                facts |= {"regrid": regrid, "leave_out_qc": leave_out_qc}
                _write(out_dir, grid, facts, known.loc[list(kept)], kept, parts)
    shutil.rmtree(parts, ignore_errors=True)
    if not target.is_file():
        raise ValueError(
            f"{fa_dir}: not one of {len(files)} volumes is usable; {out_dir / 'rejected.csv'} "
            f"lists why, the first being {min(files)}: {rejected[min(files)]}"
        )
    reasons = tables.written(out_dir / "rejected.csv", "reason")["reason"]
    absent = int((reasons == tables.NO_VOLUME).sum())
    print(
        f"{out_dir.name}: {len(cohort.load(out_dir))} subjects; {len(reasons) - absent} "
        f"volumes rejected, {absent} rows without a volume (rejected.csv)"
    )
    return target


def _done(out_dir: Path, key: str) -> bool:
    """Whether a run before left a whole cohort of the same files, table and options."""
    names = ("subjects.csv", "rejected.csv", "grid.json")
    try:
        cohort.load(out_dir)
        tables.written(out_dir / "rejected.csv", "reason")
        same = read_record(out_dir / "grid.json").get("key") == key
    except (ValueError, FileNotFoundError):
        return False
    return same and all((out_dir / name).is_file() for name in names)


def _reduce(accepted: dict[str, Path], parts: Path, workers: int, *options) -> dict[str, dict]:
    """The record of each subject, reduced into ``parts/<ID>.npz`` unless that is there."""
    tasks = ((parts / f"{subject}.npz", path, *options) for subject, path in accepted.items())

    def records() -> Iterator[dict]:
        for task in tasks:  # one by one, until there is one whose grid is the cohort's
            yield (first := _part(None, *task))
            if "reason" not in first:
                break
        run = joblib.Parallel(workers, prefer="threads", return_as="generator")
        yield from run(joblib.delayed(_part)(first, *task) for task in tasks)

    return dict(zip(accepted, tqdm(records(), "convert", total=len(accepted), unit="subject")))


def _part(first: dict | None, part: Path, path: Path, *options) -> dict:
    """What `_reduced` found, without the volume, or the reason why it could not: kept in `part`."""
    if (record := _kept(part, options[0])) is None:
        try:
            content = _reduced(first, path, *options)
        except ValueError as error:
            content = {"reason": str(error)}
        except OSError as error:  # a disk's fault, not the file's: the next run tries again
            return {"reason": f"cannot be read now: {error}", "again": True}
        with replacing(part) as partial, partial.open("wb") as file:
            np.savez(file, **content)
        record = _plain(content)
    return record


def _plain(content: dict) -> dict:
    """All but the volume, in Python's own types."""
    return {name: np.asarray(value).tolist() for name, value in content.items() if name != "volume"}


def _kept(part: Path, shape: list[int]) -> dict | None:
    """A subject's record, but for the volume; None where it is not there, or not whole."""
    if not part.is_file():
        return None
    try:
        with np.load(part, allow_pickle=False) as saved:
            record = {name: saved[name] for name in saved.files}
    except (*UNREADABLE, *cohort.NO_ARRAY):
        return None
    if "reason" not in record and (
        not RECORD <= record.keys() or record["volume"].shape != tuple(shape)
    ):
        return None
    return _plain(record)


def prepare(
    path: str | Path, modality: str = "fa", normalised: bool = False
) -> tuple[np.ndarray, np.ndarray, dict]:
    """Read a volume as a cohort's `modality` and `normalised` want it, on its own grid.

    Returns
    -------
    volume : (X, Y, Z) float32 in [0, 1], RAS; in memory as `nifti.read` has it.
    affine : (4, 4), voxel indices to mm; of a normalised brain, those of its grid.
    record : ``brain_volume_ml``, of the native brain, and the counts of `clean`.

    Raises
    ------
    FileNotFoundError, ValueError
        As `load` and `clean`; a T1-weighted volume with its skull.
    """
    volume, affine, record = _measured(path, modality)
    return normalise(volume) if normalised else volume, affine, record


def _measured(path: str | Path, modality: str) -> tuple[np.ndarray, np.ndarray, dict]:
    """As `prepare`, not normalised."""
    volume, affine = read(path)
    volume, counts = clean(volume, modality)
    size = round(brain_volume(volume, affine), 3)
    if modality == "t1" and size > MAX_BRAIN:
        raise ValueError(
            f"expected the brain alone, at most {MAX_BRAIN} ml, found {size:.0f} ml: take the "
            "skull off first (HCP's is T1w_acpc_dc_restore_brain.nii.gz)."
        )
    return volume, affine, {"brain_volume_ml": size, **counts}


def _reduced(
    first: dict | None, path: Path, shape, regrid: bool, modality: str, normalised: bool
) -> dict:
    """A subject's volume on the small grid, what it measured and what was cleaned before."""
    volume, affine, record = _measured(path, modality)
    if first is not None:
        grid, to_mm = tuple(first["native_shape"]), np.array(first["native_affine"])
        if volume.shape != grid or not np.allclose(affine, to_mm, atol=1e-3):
            if not regrid:
                raise ValueError(
                    f"its grid {volume.shape}, {np.round(affine, 3).tolist()} is not the cohort's "
                    f"{grid}, {np.round(to_mm, 3).tolist()}; regrid=True resamples it."
                )
            volume, affine = _onto(volume, affine, grid, to_mm), to_mm
    volume = normalise(volume) if normalised else volume  # within the cohort's grid, not its own
    small, small_affine = resample(volume, affine, shape)
    record |= {"native_shape": volume.shape, "native_affine": affine, "affine": small_affine}
    return {"volume": small, **record}


def _onto(volume: np.ndarray, affine: np.ndarray, shape: tuple, to_mm: np.ndarray) -> np.ndarray:
    """A volume on another grid, interpolated linearly and without aliasing; 0 outside its own."""
    to_own = np.linalg.inv(affine) @ to_mm
    step = np.linalg.norm(to_own[:3, :3], axis=1)  # along each own axis, in own voxels
    smooth = gaussian_filter(volume, np.maximum(step - 1, 0) / 2, mode="mirror")
    moved = affine_transform(smooth, to_own[:3, :3], to_own[:3, 3], shape, order=1)
    if brain_volume(moved, to_mm) < 0.5 * brain_volume(volume, affine):
        raise ValueError("more than half of its brain lies outside the cohort's grid.")
    return moved


def _write(
    out_dir: Path, grid: dict, facts: dict, known: pd.DataFrame, records: dict, parts: Path
) -> None:
    """The cohort's files from its parts; ``tensors.npy``, without which nothing loads, last."""

    def volumes() -> Iterator[np.ndarray]:
        for subject in records:
            with np.load(parts / f"{subject}.npz") as saved:
                volume = saved["volume"]
            file.write(volume.tobytes())
            yield volume

    subjects = known.reset_index()
    subjects.insert(2, "label", subjects["Gender"].map(LABELS))
    for column in MEASURES:
        subjects[column] = [record[column] for record in records.values()]
    write(out_dir / "subjects.csv", subjects.to_csv(index=False))
    with replacing(out_dir / "labels.npy") as path, path.open("wb") as file:
        np.save(file, subjects["label"].to_numpy(np.int64))
    grid = {"affine": next(iter(records.values()))["affine"], **grid}
    write(out_dir / "grid.json", json.dumps(grid))
    with replacing(out_dir / "tensors.npy") as path:
        with path.open("wb") as file:
            header = {"shape": (len(records), *grid["shape"]), "fortran_order": False}
            header["descr"] = np.lib.format.dtype_to_descr(np.dtype(np.float32))
            np.lib.format.write_array_header_1_0(file, header)
            digest = cohort.fingerprint(subjects["Subject"], subjects["label"], volumes())
        runs.record(out_dir, "convert", cohort=digest, **facts, **grid)
