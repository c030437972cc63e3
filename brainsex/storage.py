"""What is written stays whole: atomic files, one record a run, one border for unreadable files."""

import errno
import glob
import gzip
import json
import os
import platform
import secrets
import signal
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import joblib
import nibabel as nib
import numpy as np
from filelock import FileLock, Timeout

RUN_RECORD = "run.json"
RECORDED_PACKAGES = "brainsex numpy pandas scipy torch nibabel scikit-learn dipy".split()
MAX_VOXELS = 1 << 25  # of the largest NIfTI grid read; a head at 0.7 mm has two thirds


@contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path, which replaces `path` if the block succeeds: so `path` is whole.

    Temporary files that a killed run left for it are deleted; a writer that outlives its run fails.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    for stale in path.parent.glob(f".{glob.escape(path.name)}.????????.partial"):
        with suppress(OSError):
            stale.unlink()
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


def files_below(folder: str | Path, *endings: str) -> Iterator[Path]:
    """Yield the files at any depth whose ``/name`` ends in one of `endings`, behind links too.

    Hidden folders are left out (DataLad's ``.git/annex``). A broken link counts, a pipe does not.
    """
    real = cache(os.path.realpath)
    for parent, folders, names in os.walk(folder, followlinks=True):
        if real(parent) in map(real, Path(parent).parents):  # a link to a folder above
            folders.clear()
            continue
        folders[:] = (name for name in folders if not name.startswith("."))
        paths = (Path(parent, name) for name in names if f"/{name}".lower().endswith(endings))
        yield from (path for path in paths if path.is_file() or not path.exists())


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
    with reading(path, "a JSON object", "delete it"):
        return dict(json.loads(Path(path).read_text(encoding="utf-8")))


@contextmanager
def folder_lock(folder: str | Path) -> Iterator[None]:
    """Hold an exclusive lock on `folder`, created if missing; a crash frees it, too.

    Raises BlockingIOError if another run holds it, OSError if the folder cannot be written.
    """
    lock = FileLock(Path(folder) / ".lock", timeout=0)
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except Timeout:
        problem = "another run is writing here; wait, stop it, or name another folder"
        raise BlockingIOError(f"{folder}: {problem}") from None
    except OSError as error:
        raise OSError(error.errno, f"cannot write ({error.strerror})", str(folder)) from error
    try:
        yield
    finally:
        lock.release()


def start_run(
    folder: str | Path,
    command: str,
    settings: Mapping,
    *,
    overwrite: bool = False,
    results: Sequence[str] = (),
) -> None:
    """Record in ``run.json`` what a command is asked for; refuse to mix it with other results.

    Each command has its entry: the settings, and in ``made_with`` the versions of all runs that
    contributed. Versions are not compared: an update must not cost days of finished work.

    Parameters
    ----------
    settings : what the results depend on, as JSON or anything that prints.
    overwrite : delete the files that `results` (glob patterns within the folder) match, and start
        anew. Otherwise other settings raise a ValueError that names the difference.
    """
    folder, path = Path(folder), Path(folder) / RUN_RECORD
    settings = json.loads(json.dumps(dict(settings), default=str))
    record = read_json(path) if path.is_file() else {}
    before = record.get(command, {})
    made_with = before.pop("made_with", [])
    names = [name for name in {**settings, **before} if settings.get(name) != before.get(name)]
    if before and names and not overwrite:
        wanted, present = (values.get(names[0]) for values in (settings, before))
        raise ValueError(
            f"{folder}: expected results of {command} with {names[0]} = {wanted!r:.80}, found "
            f"those with {present!r:.80}; name another folder, or start anew with --overwrite"
        )
    made_with = [] if names else made_with
    for pattern in results if overwrite else ():
        for stale in folder.glob(pattern):
            stale.unlink()
    if environment() not in made_with:
        entry = settings | {"made_with": [*made_with, environment()]}
        write_text(path, json.dumps(record | {command: entry}, indent=1) + "\n")


@cache
def environment() -> dict:
    """Return versions of Python, platform and packages."""
    versions = {"python": platform.python_version(), "platform": platform.platform()}
    versions["cores"] = joblib.cpu_count()
    for name in RECORDED_PACKAGES:
        with suppress(PackageNotFoundError):
            versions[name] = version(name)
    return versions


@cache
def exit_with_parent(parent_pid: int) -> None:
    """Make a worker process ignore Ctrl-C and end with its parent, however that ends."""
    if parent_pid == os.getpid():
        return

    def watch() -> None:
        while os.getppid() == parent_pid:
            time.sleep(0.1)
        os._exit(1)

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=watch, daemon=True).start()
