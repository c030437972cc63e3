"""What is written stays whole: atomic files, one record a run, one border for unreadable files."""

import errno
import gzip
import json
import math
import os
import platform
import secrets
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import IO

import nibabel as nib
import numpy as np
from filelock import FileLock, Timeout
from isal import igzip
from nibabel.arrayproxy import ArrayProxy

RUN_RECORD = "run.json"
RECORDED_PACKAGES = "brainsex numpy pandas scipy torch nibabel scikit-learn dipy".split()
MAX_EXTRA_BYTES = 1 << 20  # read after the voxels
POINTERS = {  # how files begin that stand for content elsewhere
    (b"/annex/", b"../.git/annex"): "datalad get, or git annex get",
    (b"version https://git-lfs",): "git lfs pull",
}
MAX_VOXELS = 1 << 25  # of the largest NIfTI grid read; a head at 0.7 mm has two thirds


@contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path, which replaces `path` if the block succeeds: so `path` is whole.

    Of several processes that write the same file at the same time, the last one wins.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{secrets.token_hex(4)}.partial")
    try:
        yield partial
        os.replace(partial, path)
    except OSError as error:
        if error.errno and not error.filename:  # a write to a full disk names no file
            error.filename = str(path)
        raise
    finally:
        partial.unlink(missing_ok=True)


def write_text(path: str | Path, text: str) -> None:
    """Write a UTF-8 text file, whole or not at all."""
    with atomic_path(path) as partial:
        partial.write_text(text, encoding="utf-8")


@contextmanager
def reading(path: str | Path, expected: str, remedy: str = "download it again") -> Iterator[None]:
    """Turn whatever an unreadable file raises into one ValueError that names it, and the remedy.

    A ValueError that names the file already, and an OSError of the disk itself, pass unchanged.
    """
    name = str(path)
    try:
        yield
    except Exception as error:
        if isinstance(error, OSError) and error.errno not in (None, errno.EINVAL):
            error.filename = error.filename or name
            raise  # of the disk; EINVAL is of a damaged offset
        if isinstance(error, ValueError) and str(error).startswith(name):
            raise
        problem = " ".join(str(error).split())[:300] or type(error).__name__
        message = f"{name}: expected {expected}, cannot read it ({problem}); {remedy}"
        raise ValueError(message) from error


def write_nifti(path: str | Path, volume: np.ndarray, affine: np.ndarray) -> None:
    """Write a volume (X, Y, Z) as compressed NIfTI: the same bytes whenever it is written."""
    with atomic_path(path) as partial:
        partial.write_bytes(gzip.compress(nib.Nifti1Image(volume, affine).to_bytes(), 1, mtime=0))


def write_array(path: Path, shape: tuple, dtype: np.dtype, parts: Iterable[np.ndarray]) -> None:
    """Write a NumPy file of `shape` whole, from parts that follow each other in memory order."""
    with atomic_path(path) as partial, partial.open("wb") as file:
        header = {"shape": shape, "fortran_order": False, "descr": np.dtype(dtype).str}
        np.lib.format.write_array_header_1_0(file, header)
        file.writelines(np.ascontiguousarray(part, dtype) for part in parts)


def read_json(path: str | Path) -> dict:
    """Read a JSON object that the project wrote, or raise FileNotFoundError or ValueError."""
    with reading(path, "a JSON object", "make its folder anew"):
        return dict(json.loads(Path(path).read_text(encoding="utf-8")))


@contextmanager
def folder_lock(folder: str | Path) -> Iterator[None]:
    """Hold an exclusive lock on `folder`, created if missing; a crash frees it, too.

    Raises BlockingIOError if another run holds it, OSError if the folder cannot be written.
    """
    try:
        with FileLock(Path(folder) / ".lock", timeout=0):
            yield
    except Timeout:
        problem = "another run is writing here; wait, stop it, or name another folder"
        raise BlockingIOError(f"{folder}: {problem}") from None


def start_run(
    folder: str | Path,
    command: str,
    settings: Mapping,
    *,
    overwrite: bool = False,
    results: Sequence[str] = (),
) -> None:
    """Record in ``run.json`` what a command is asked for; refuse to mix it with other results.

    Each command has its entry: the `settings`, which are all that the results depend on, as JSON or
    anything that prints, and in ``made_with`` the versions of the run that made the first results.
    Versions are not compared: an update must not cost days of finished work. Other settings than
    before raise a ValueError that names the difference. With `overwrite`, the files that `results`
    (glob patterns within the folder) match are deleted instead, and the command starts anew.
    """
    folder, path = Path(folder), Path(folder) / RUN_RECORD
    settings = json.loads(json.dumps(dict(settings), default=str))
    record = read_json(path) if path.is_file() else {}
    before = record.get(command, {})
    before.pop("made_with", None)
    names = [name for name in {**settings, **before} if settings.get(name) != before.get(name)]
    if before and names and not overwrite:
        wanted, present = (values.get(names[0]) for values in (settings, before))
        problem = f"with {names[0]} = {wanted!r:.80}, found those with {present!r:.80}"
        remedy = "name another folder, or start anew with --overwrite"
        raise ValueError(f"{folder}: expected results of {command} {problem}; {remedy}")
    for pattern in results if overwrite else ():
        for stale in folder.glob(pattern):
            stale.unlink()
    if names or overwrite or not before:
        entry = settings | {"made_with": _environment()}
        write_text(path, json.dumps(record | {command: entry}, indent=1) + "\n")


@cache
def _environment() -> dict:
    """Return versions of Python, platform and packages."""
    versions = {"python": platform.python_version(), "platform": platform.platform()}
    for name in RECORDED_PACKAGES:
        with suppress(PackageNotFoundError):
            versions[name] = version(name)
    return versions


def _read_header(path: Path, file: IO[bytes]) -> nib.spatialimages.SpatialHeader:
    """Read the header at the start of a file, of the format that its first bytes tell."""
    start = file.read(nib.Nifti2Header.sizeof_hdr)
    for pointers, remedy in POINTERS.items():
        if start.startswith(pointers):
            problem = "expected a volume, found a pointer to content that is not here"
            raise ValueError(f"{path}: {problem}; {remedy}")
    nifti = nib.Nifti2Header if nib.Nifti2Header.may_contain_header(start) else nib.Nifti1Header
    header = nib.MGHImage.header_class if start.startswith(b"\0\0\0\1") else nifti
    return header(start[: header.template_dtype.itemsize])


@contextmanager
def _opened(path: str | Path) -> Iterator[tuple]:
    """Open a volume, compressed or not whatever its name says: voxels unread, affine, file."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such volume; DATA_ACCESS.md says how to get the data")
    expected = f"a whole file (NIfTI or .mgz) of 3D real voxels, at most {MAX_VOXELS}"
    with reading(path, expected), path.open("rb") as raw:
        packed = raw.read(2) == b"\x1f\x8b"
        raw.seek(0)
        with igzip.open(raw) if packed else nullcontext(raw) as file:
            header = _read_header(path, file)
            shape, dtype = header.get_data_shape(), header.get_data_dtype()
            bounded = 0 < math.prod(shape) <= MAX_VOXELS
            if len(shape) < 3 or set(shape[3:]) - {1} or not bounded or dtype.kind not in "iuf":
                raise ValueError(f"found {shape} of {dtype}")
            affine = header.get_best_affine()
            known = any(header.get(code, 1) for code in ("sform_code", "qform_code"))  # .mgz: none
            if not known or not np.isfinite(affine).all() or abs(np.linalg.det(affine)) < 1e-6:
                problem = f"expected an affine that tells left from right, found {affine.tolist()}"
                raise ValueError(f"{path}: {problem} of no known meaning; set its sform")
            yield ArrayProxy(file, header, mmap=False).reshape(shape[:3]), affine, file


def read_grid(path: str | Path) -> tuple[tuple[int, ...], np.ndarray]:
    """Return the grid of a volume, in RAS orientation, from its header: shape and affine (4, 4)."""
    with _opened(path) as (voxels, affine, _):
        empty = np.broadcast_to(np.float32(0), voxels.shape)
        image = nib.as_closest_canonical(nib.Nifti1Image(empty, affine))
        return image.shape, image.affine


def load_volume(path: str | Path) -> tuple[np.ndarray, np.ndarray]:
    """Read a NIfTI or .mgz volume whole, with gzip's checksum verified, in RAS orientation.

    Returns a volume (X, Y, Z) float32, its axes closest to right, anterior, superior, and its
    affine (4, 4) to mm. Raises FileNotFoundError; ValueError for anything but one real 3D volume.
    """
    with _opened(path) as (voxels, affine, file):
        voxels = np.asarray(voxels).astype(np.float32, copy=False)
        file.read(MAX_EXTRA_BYTES)  # to its end, where gzip compares the checksum
        image = nib.as_closest_canonical(nib.Nifti1Image(voxels, affine))
    return np.array(image.dataobj, order="K"), image.affine
