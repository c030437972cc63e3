"""Fractional anisotropy from HCP's diffusion series, by DIPY (notebook 02).

The tensor D of a voxel explains its signal by S = S0 exp(-b gᵀDg) (Basser et al. 1994). Where the
gradients deviate from their nominal direction and strength by L, a voxel's g is (I + L)g, so that
the tensor fitted with the nominal g is (I + L)ᵀ D (I + L), from which D is recovered exactly.
"""

import gzip
import json
import math
import os
import re
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import BinaryIO

import nibabel as nib
import numpy as np
import pandas as pd
from nibabel.arrayproxy import ArrayProxy

from brainsex import archives, storage
from brainsex.volumes import MAX_VOXELS

DATA, MASK, DEVIATIONS = "data.nii.gz", "nodif_brain_mask.nii.gz", "grad_dev.nii.gz"
NEEDED = (DATA, "bvals", "bvecs", MASK)
MAX_TEXT = 1 << 20  # bytes of the largest bvals or bvecs, and of what precedes a file's voxels
MAX_KEPT = 2 << 30  # bytes of the voxels and volumes kept in memory; HCP's take 0.4 GB
MAX_DEVIATION = 0.3  # largest element of L accepted (HCP's are below 0.1): I + L has an inverse
SLAB = 2000  # voxels fitted at a time: DIPY's memory does not grow with the brain
SEVEN_TESLA = re.compile(r"Diffusion_?7T|_7T_[^/]*\.zip")  # HCP has it beside the series at 3 T
File = tuple[str, Callable[[], BinaryIO]]  # its name in messages, and what opens it


def fit_folder(
    source: str | Path,
    target: str | Path,
    *,
    bmax: float = 1500,
    b0: float = 50,
    workers: int | None = None,
    overwrite: bool = False,
) -> pd.DataFrame:
    """Fit FA to each subject's diffusion series, into ``target/<ID>.nii.gz``.

    A subject whose map is there is skipped. ``target/rejected.csv`` lists who was left out, and
    ``<ID>.json`` the shells used and whether gradient non-linearity was honoured.

    Parameters
    ----------
    source : packages ``<ID>_….zip`` or folders ``<ID>/T1w/Diffusion``, at any depth, of
        ``data.nii.gz``, ``bvals``, ``bvecs``, the mask and, if there is one, ``grad_dev.nii.gz``.
    bmax : s/mm², the largest shell fitted; a volume's shell is its b rounded to hundreds.
    b0 : s/mm², up to which a volume counts as not weighted by diffusion.
    workers : subjects at the same time, all cores by default; 1.1 GB each for HCP's series.
    overwrite : delete these subjects' maps first.

    Returns the table of `archives.extract`, with status ``fitted``. Raises FileNotFoundError if
    there is no series, ValueError if `target` has maps of another `bmax` or `b0`, and OSError if
    the disk is full.
    """
    _import_dipy()
    source, target = Path(source), Path(target)
    paths = [source] if source.is_file() else archives.files_below(source, ".zip", DATA)
    paths = (path for path in paths if path.suffix.lower() == ".zip" or path.name == DATA)
    series = archives.group_by_subject(paths)
    if not series:
        raise FileNotFoundError(
            f"{source}: expected packages named <ID>_….zip or folders <ID>/T1w/Diffusion with "
            f"{DATA}, found none; DATA_ACCESS.md says how to get them"
        )
    root, neglected = source if source.is_dir() else source.parent, []

    def work(subject: str) -> None:
        if not _fit_subject(subject, series[subject], root, target, bmax, b0):
            neglected.append(subject)

    settings = {"bmax": bmax, "b0": b0}
    options = {"workers": workers, "overwrite": overwrite}
    table = archives.process_subjects(work, series, target, "fa", settings, "fitted", **options)
    if neglected:
        print(f"{len(neglected)} without {DEVIATIONS}: gradient non-linearity neglected")
    return table


def fractional_anisotropy(
    signal: np.ndarray,
    bvals: np.ndarray,
    bvecs: np.ndarray,
    *,
    b0: float = 50,
    deviations: np.ndarray | None = None,
) -> np.ndarray:
    """Fit FA to the signal of voxels, by DIPY's weighted least squares (Chung et al. 2006).

    Parameters
    ----------
    signal : (N, volumes), any scale; below DIPY's least positive signal it counts as that.
    bvals : (volumes,) s/mm², not weighted by diffusion up to `b0`.
    bvecs : (volumes, 3), unit vectors where b is above `b0`; elsewhere they may be 0.
    deviations : (N, 3, 3), L of each voxel in the frame of `bvecs`, as FSL writes both; its g is
        (I + L)g, its b is b |(I + L)g|² (Bammer et al. 2003).

    Returns (N,) float32 in [0, 1], which is 0 where a signal or a deviation is not finite.
    """
    gradient_table, dti = _import_dipy()
    design = dti.design_matrix(gradient_table(bvals, bvecs=bvecs, b0_threshold=b0))
    finite = np.isfinite(signal).all(axis=1)
    if deviations is not None:
        finite &= np.isfinite(deviations).all(axis=(1, 2))
    signal = np.maximum(signal[finite].astype(float), dti.MIN_POSITIVE_SIGNAL)
    coefficients, _ = dti.wls_fit_tensor(design, signal, return_lower_triangular=True)
    tensors = dti.from_lower_triangular(coefficients[:, :6])
    if deviations is not None:
        undo = np.linalg.inv(np.eye(3) + deviations[finite])
        tensors = undo.swapaxes(1, 2) @ tensors @ undo
    least = 1e-6 / -design.min()  # where DIPY clips eigenvalues
    eigenvalues, _ = dti.decompose_tensor(tensors, min_diffusivity=least)
    fa = np.zeros(len(finite), np.float32)
    fa[finite] = dti.fractional_anisotropy(eigenvalues).clip(0, 1)
    return fa


def _import_dipy() -> tuple[Callable, ModuleType]:
    """Return DIPY's gradient_table and its module dti; DIPY is an optional dependency."""
    try:
        from dipy.core.gradients import gradient_table
        from dipy.reconst import dti
    except ImportError as error:
        remedy = "pip install -r requirements-diffusion.txt"
        raise ImportError(f"fitting FA needs DIPY, which is not installed: {remedy}") from error
    return gradient_table, dti


def _fit_subject(
    subject: str, paths: list[Path], root: Path, target: Path, bmax: float, b0: float
) -> bool:
    """Write a subject's map and its record; return whether gradient deviations were honoured."""
    deviations = None
    with ExitStack() as stack:
        files = _find_series(paths, root, target, stack)
        bvals, bvecs, shells = _read_gradients(files, bmax, b0)
        keep = np.flatnonzero(shells <= bmax)
        grid, values = _read_nifti(files[MASK])
        voxels = np.flatnonzero(values[0] > 0)  # X fastest
        if not len(voxels):
            raise ValueError(f"{files[MASK][0]}: expected voxels above 0, found an empty mask")
        if DEVIATIONS in files:
            deviations = _read_deviations(files[DEVIATIONS], grid, voxels)
        header, values = _read_nifti(files[DATA], grid, voxels, keep, len(bvals))
    volume = np.zeros(math.prod(grid.get_data_shape()), np.float32)
    with storage.reading(files[DATA][0], "signals that a tensor can be fitted to"):
        for start in range(0, len(voxels), SLAB):
            slab = slice(start, start + SLAB)
            local = None if deviations is None else deviations[slab]
            volume[voxels[slab]] = fractional_anisotropy(
                values[:, slab].T, bvals[keep], bvecs[keep], b0=b0, deviations=local
            )
    counts = zip(*np.unique(shells[keep], return_counts=True))
    record = {
        "series": files[DATA][0],
        "shells": {f"{shell:g}": int(count) for shell, count in counts},
        "gradient_nonlinearity": "neglected" if deviations is None else "honoured",
    }
    storage.write_text(target / f"{subject}.json", json.dumps(record, indent=1) + "\n")
    header.set_data_shape(grid.get_data_shape())
    header.set_data_dtype(np.float32)
    header.set_slope_inter(1, 0)
    header["cal_min"], header["cal_max"] = 0, 1  # what viewers show as black and white
    image = nib.Nifti1Image(volume.reshape(grid.get_data_shape(), order="F"), None, header)
    with storage.atomic_path(target / f"{subject}.nii.gz") as partial_path:
        partial_path.write_bytes(gzip.compress(image.to_bytes(), 6, mtime=0))
    return deviations is not None


def _find_series(paths: list[Path], root: Path, scratch: Path, stack: ExitStack) -> dict[str, File]:
    """Return the files, by name, of the one series that a subject's packages and folders hold."""
    names, files = (*NEEDED, DEVIATIONS), []
    labels = {path: path.relative_to(root).as_posix() for path in paths}
    for path, label in labels.items():
        if path.suffix.lower() != ".zip":
            for name in filter(os.path.lexists, map(path.with_name, names)):  # or broken links
                files.append((name.relative_to(root).as_posix(), partial(open, name, "rb")))
        elif not SEVEN_TESLA.search(label):
            for member in archives.find_members(path, label, names, stack, scratch):
                archives.check_member(member, archives.MAX_INNER)
                files.append((member[2], partial(member[0].open, member[1])))
    folders: dict[str, dict[str, File]] = {}
    for file in files:
        folder, _, name = file[0].replace("\\", "/").rpartition("/")
        if not SEVEN_TESLA.search(folder):
            folders.setdefault(folder, {})[name.lower()] = file
    folders = {folder: series for folder, series in folders.items() if DATA in series}
    if len(folders) != 1:
        problem = ", ".join(folders) + "; keep one session" if folders else "none"
        places = ", ".join(labels.values())
        raise ValueError(f"{places}: expected one folder with {DATA}, found {problem}")
    ((folder, series),) = folders.items()
    if missing := [name for name in NEEDED if name not in series]:
        raise ValueError(f"{folder}: expected {', '.join(NEEDED)}, found no {', '.join(missing)}")
    return series


def _read_gradients(
    files: dict[str, File], bmax: float, b0: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Read b (volumes,) in s/mm² and directions (volumes, 3), and round b to shells (volumes,).

    Raises ValueError unless a tensor can be fitted to the shells up to `bmax`.
    """
    bvals, bvecs = _read_numbers(files["bvals"]).ravel(), _read_numbers(files["bvecs"])
    label, count = files["bvecs"][0], len(bvals)
    if bvecs.shape != (3, count):
        raise ValueError(
            f"{label}: expected 3 rows of as many numbers as in bvals, {count}, found shape "
            f"{bvecs.shape}"
        )
    shells = np.where(bvals <= b0, 0, np.round(bvals, -2))
    weighted = bvecs.T[(shells <= bmax) & (bvals > b0)]
    if not (bvals >= 0).all() or not (bvals <= b0).any() or not len(weighted):
        raise ValueError(
            f"{files['bvals'][0]}: expected b ≥ 0, b0 volumes (b ≤ {b0:g}) and a shell up to "
            f"b = {bmax:g}, found b from {bvals.min():g} to {bvals.max():g}"
        )
    unit = (abs(np.linalg.norm(weighted, axis=1) - 1) < 0.01).all()
    dyads = (weighted[:, :, None] * weighted[:, None, :]).reshape(-1, 9)
    if not unit or np.linalg.matrix_rank(dyads, tol=1e-2) < 6:
        raise ValueError(
            f"{label}: expected unit vectors in six independent directions where {b0:g} < b ≤ "
            f"{bmax:g}, found {len(weighted)} volumes that do not determine a tensor"
        )
    return bvals, bvecs.T, shells


def _read_numbers(file: File) -> np.ndarray:
    """Read rows of numbers from a text file of bounded size."""
    with storage.reading(file[0], "rows of as many numbers each"), file[1]() as stream:
        text = stream.read(MAX_TEXT + 1)
        if len(text) > MAX_TEXT:
            raise ValueError(f"more than {MAX_TEXT} bytes")
        return np.array([row.split() for row in text.decode().splitlines() if row.strip()], float)


def _read_deviations(file: File, grid: nib.Nifti1Header, voxels: np.ndarray) -> np.ndarray:
    """Read L at `voxels` (N, 3, 3) float32; HCP stores its elements by columns."""
    deviations = _read_nifti(file, grid, voxels, range(9), 9)[1].astype(np.float32)
    if (largest := max(np.nanmax(deviations), -np.nanmin(deviations))) > MAX_DEVIATION:
        expected = f"expected fractions up to {MAX_DEVIATION}"
        raise ValueError(f"{file[0]}: {expected}, found {largest:.3g}; per cent?")
    return deviations.T.reshape(-1, 3, 3).swapaxes(1, 2)


def _read_nifti(
    file: File,
    grid: nib.Nifti1Header | None = None,
    voxels: np.ndarray | None = None,
    keep: Sequence[int] = (0,),
    volumes: int = 1,
) -> tuple[nib.Nifti1Header, np.ndarray]:
    """Stream a gzipped NIfTI-1 file to its end, where gzip compares the checksum.

    The file has `volumes` on the grid of the header `grid`, or is 3D. Returns its header and the
    scaled values of the volumes to `keep` (ascending) at `voxels` (X fastest): (len(keep), N).
    """
    label, opener = file
    with (
        storage.reading(label, "a whole gzipped NIfTI-1 file"),
        opener() as compressed,
        gzip.open(compressed) as stream,
    ):
        header = nib.Nifti1Header(stream.read(nib.Nifti1Header.sizeof_hdr))
        shape, dtype = header.get_data_shape(), header.get_data_dtype()
        start, count = header.get_data_offset(), math.prod(shape[:3])
        end = start + math.prod(shape) * dtype.itemsize
        real = dtype.kind in "iuf" and header.sizeof_hdr <= start <= MAX_TEXT
        if not real or not 0 < count <= MAX_VOXELS:
            raise ValueError(
                f"{label}: expected at most {MAX_VOXELS} voxels of real numbers, found shape "
                f"{shape} of {dtype} from byte {start} on"
            )
        expected = shape[:3] if grid is None else (*grid.get_data_shape(), volumes)
        affine, grid_affine = header.get_best_affine(), (grid or header).get_best_affine()
        if shape != expected or not np.allclose(affine, grid_affine, atol=1e-3):
            raise ValueError(
                f"{label}: expected shape {expected}, the grid of {MASK} by the number of bvals "
                f"(9 in {DEVIATIONS}), found {shape} with the affine {affine.tolist()}"
            )
        if header.get_slope_inter() not in ((None, None), (1, 0)):
            dtype = np.dtype(float)  # of values once scaled
        count = count if voxels is None else len(voxels)
        if (size := len(keep) * count * dtype.itemsize) > MAX_KEPT:
            problem = f"found {size} in {len(keep)} volumes of {count} voxels; crop the mask"
            raise ValueError(f"{label}: expected at most {MAX_KEPT} bytes, {problem}")
        values, stored = np.empty((len(keep), count), dtype), ArrayProxy(stream, header)
        for row, number in zip(values, keep):
            volume = np.asarray(stored[... if grid is None else (..., number)])
            row[:] = volume.ravel(order="F")[... if voxels is None else voxels]
        while stream.tell() <= end and stream.read(archives.CHUNK):
            pass
        if stream.tell() != end:
            raise ValueError(f"its header declares {end} bytes, found {stream.tell()} or more")
    return header, values
