"""Fractional anisotropy from HCP's diffusion series, by DIPY (notebook 02).

The tensor D of a voxel explains its signal by S = S0 exp(-b gᵀDg) (Basser et al. 1994). Where the
gradients deviate from their nominal direction and strength by L, a voxel's g is (I + L)g, so that
the tensor fitted with the nominal g is (I + L)ᵀ D (I + L), from which D is recovered exactly.
"""

import gzip
import math
import re
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import BinaryIO

import nibabel as nib
import numpy as np
import pandas as pd
from nibabel.arrayproxy import ArrayProxy

from brainsex import archives, storage
from brainsex.volumes import MAX_VOXELS

DATA, MASK, DEVIATIONS = "data.nii.gz", "nodif_brain_mask.nii.gz", "grad_dev.nii.gz"
NEEDED = (DATA, "bvals", "bvecs", MASK)
MAX_TEXT = 1 << 20  # bytes of the largest bvals or bvecs, and of what precedes voxels
MAX_VALUES = 1 << 28  # voxels by volumes kept in memory; HCP's series has 1e8, in 0.4 GB
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

    A subject whose map is there is skipped; ``target/rejected.csv`` lists who was left out.

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
    if find_spec("dipy") is None:
        raise ImportError("fitting FA needs DIPY: pip install -r requirements-diffusion.txt")
    source, target = Path(source), Path(target)
    paths = archives.files_below(source, ".zip", DATA)
    paths = (path for path in paths if path.suffix.lower() == ".zip" or path.name == DATA)
    series, neglected = archives.group_by_subject(paths), []
    if not series:
        expected = f"packages named <ID>_….zip or folders <ID>/T1w/Diffusion with {DATA}"
        remedy = "DATA_ACCESS.md says how to get them"
        raise FileNotFoundError(f"{source}: expected {expected}, found none; {remedy}")

    def work(subject: str) -> str:
        with ExitStack() as stack:
            files = _find_series(series[subject], source, target, stack)
            _fit_series(files, target / f"{subject}.nii.gz", bmax, b0)
        neglected.extend([subject] * (DEVIATIONS not in files))
        return "fitted"

    settings = {"bmax": bmax, "b0": b0}
    table = archives.process_subjects(work, series, target, "fa", settings, workers, overwrite)
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
    from dipy.core.gradients import gradient_table
    from dipy.reconst import dti

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


def _fit_series(files: dict[str, File], path: Path, bmax: float, b0: float) -> None:
    """Write the FA map of the files of a series."""
    bvals, bvecs, keep = _read_gradients(files, bmax, b0)
    grid, (mask,) = _read_nifti(files[MASK])
    voxels, deviations = np.flatnonzero(mask > 0), None  # X fastest
    if not 0 < len(voxels) * len(keep) <= MAX_VALUES:
        expected = f"expected 1 to {MAX_VALUES // len(keep)} voxels above 0"
        raise ValueError(f"{files[MASK][0]}: {expected}, found {len(voxels)}; correct the mask")
    if DEVIATIONS in files:
        deviations = _read_deviations(files[DEVIATIONS], grid, voxels)
    header, volumes = _read_nifti(files[DATA], grid, voxels, keep, len(bvals))
    fa = np.zeros(math.prod(grid.get_data_shape()), np.float32)
    with storage.reading(files[DATA][0], "signals that a tensor can be fitted to"):
        for start in range(0, len(voxels), SLAB):
            slab = slice(start, start + SLAB)
            signal = np.stack([volume[slab] for volume in volumes]).T
            local = None if deviations is None else deviations[slab]
            fa[voxels[slab]] = fractional_anisotropy(
                signal, bvals[keep], bvecs[keep], b0=b0, deviations=local
            )
    header.set_data_shape(grid.get_data_shape())
    header.set_data_dtype(np.float32)
    header.set_slope_inter(1, 0)
    header["cal_min"], header["cal_max"] = 0, 1  # what viewers show as black and white
    image = nib.Nifti1Image(fa.reshape(grid.get_data_shape(), order="F"), None, header)
    with storage.atomic_path(path) as partial_path:
        partial_path.write_bytes(gzip.compress(image.to_bytes(), 6, mtime=0))


def _find_series(paths: list[Path], root: Path, scratch: Path, stack: ExitStack) -> dict[str, File]:
    """Return the files, by name, of the one series that a subject's packages and folders hold."""
    names, files = (*NEEDED, DEVIATIONS), []
    labels = {path: path.relative_to(root).as_posix() for path in paths}
    for path, label in labels.items():
        if SEVEN_TESLA.search(label):
            continue
        if path.name == DATA:
            for place in map(path.with_name, names):
                if place.is_file() or place.is_symlink():  # a broken link is named by what opens it
                    files.append((place.relative_to(root).as_posix(), partial(open, place, "rb")))
        else:
            for member in archives.find_members(path, label, names, stack, scratch):
                archives.check_member(member, archives.MAX_INNER)
                files.append((member[2], partial(member[0].open, member[1])))
    folders: dict[str, dict[str, File]] = {}
    for file in files:
        folder, _, name = file[0].replace("\\", "/").rpartition("/")
        if not SEVEN_TESLA.search(folder):
            folders.setdefault(folder, {})[name.lower()] = file
    whole = [folder for folder, series in folders.items() if not set(NEEDED) - set(series)]
    if len(whole) != 1:
        problem = f"{', '.join(whole)}; keep one session" if whole else "none"
        expected = f"expected one folder with {', '.join(NEEDED)}"
        raise ValueError(f"{', '.join(labels.values())}: {expected}, found {problem}")
    return folders[whole[0]]


def _read_gradients(
    files: dict[str, File], bmax: float, b0: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Read b (volumes,) in s/mm², directions (volumes, 3) and the indices of volumes to fit.

    Raises ValueError unless the shells up to `bmax` determine a tensor.
    """
    bvals, bvecs = _read_numbers(files["bvals"]).ravel(), _read_numbers(files["bvecs"]).T
    if bvecs.shape != (len(bvals), 3):
        expected = f"expected 3 rows of as many numbers as in bvals, {len(bvals)}"
        raise ValueError(f"{files['bvecs'][0]}: {expected}, found shape {bvecs.T.shape}")
    shells = np.where(bvals <= b0, 0, np.round(bvals, -2))
    directions = bvecs[(shells <= bmax) & (bvals > b0)]
    unit = (abs(np.linalg.norm(directions, axis=1) - 1) < 0.01).all()
    dyads = (directions[:, :, None] * directions[:, None, :]).reshape(-1, 9)
    determined = unit and np.linalg.matrix_rank(dyads, tol=1e-2) == 6
    if not determined or not (bvals >= 0).all() or not (bvals <= b0).any():
        raise ValueError(
            f"{files['bvals'][0]}: expected b ≥ 0, b0 volumes (b ≤ {b0:g}) and unit vectors in six "
            f"independent directions up to b = {bmax:g}, found {len(directions)} volumes there, "
            f"and b from {bvals.min():g} to {bvals.max():g}"
        )
    return bvals, bvecs, np.flatnonzero(shells <= bmax)


def _read_numbers(file: File) -> np.ndarray:
    """Read rows of numbers from a text file of bounded size."""
    with storage.reading(file[0], "rows of as many numbers each"), file[1]() as stream:
        text = stream.read(MAX_TEXT + 1)
        if len(text) > MAX_TEXT:
            raise ValueError(f"more than {MAX_TEXT} bytes")
        return np.array([row.split() for row in text.decode().splitlines() if row.strip()], float)


def _read_deviations(file: File, grid: nib.Nifti1Header, voxels: np.ndarray) -> np.ndarray:
    """Read L at `voxels` (N, 3, 3) float32; HCP stores its elements by columns."""
    deviations = np.float32(_read_nifti(file, grid, voxels, range(9), 9)[1])
    if (largest := max(np.nanmax(deviations), -np.nanmin(deviations))) > MAX_DEVIATION:
        expected = f"expected fractions up to {MAX_DEVIATION}"
        raise ValueError(f"{file[0]}: {expected}, found {largest:.3g}; per cent?")
    return deviations.T.reshape(-1, 3, 3).swapaxes(1, 2)


def _read_nifti(
    file: File,
    grid: nib.Nifti1Header | None = None,
    voxels: np.ndarray | slice = slice(None),
    keep: Sequence[int] = (0,),
    count: int = 1,
) -> tuple[nib.Nifti1Header, list[np.ndarray]]:
    """Stream a gzipped NIfTI-1 file to its end, where gzip compares the checksum.

    The file has `count` volumes on the grid of the header `grid`, or is 3D. Returns its header and,
    of each volume to `keep` (ascending), the scaled values at `voxels` (X fastest): (N,).
    """
    label, opener = file
    with (
        storage.reading(label, "a whole gzipped NIfTI-1 file"),
        opener() as compressed,
        gzip.open(compressed) as stream,
    ):
        header = nib.Nifti1Header(stream.read(nib.Nifti1Header.sizeof_hdr))
        shape, dtype, start = (
            header.get_data_shape(),
            header.get_data_dtype(),
            header.get_data_offset(),
        )
        expected = (*grid.get_data_shape(), count) if grid else shape[:3]
        affine, grid_affine = header.get_best_affine(), (grid or header).get_best_affine()
        fits = shape == expected and np.allclose(affine, grid_affine, atol=1e-3)
        bounded = 0 < math.prod(shape[:3]) <= MAX_VOXELS and header.sizeof_hdr <= start <= MAX_TEXT
        if not fits or not bounded or dtype.kind not in "iuf":
            raise ValueError(
                f"{label}: expected shape {expected} on the grid of {MASK}, at most {MAX_VOXELS} "
                f"voxels of real numbers, found {shape} of {dtype} from byte {start} on, with the "
                f"affine {affine.tolist()}"
            )
        stored, values = ArrayProxy(stream, header).reshape((*shape[:3], count)), []
        for number in keep:
            values.append(np.asarray(stored[..., number]).ravel(order="F")[voxels])
        end = start + math.prod(shape) * dtype.itemsize
        while stream.tell() <= end and stream.read(archives.CHUNK):
            pass
        if stream.tell() != end:
            raise ValueError(f"its header declares {end} bytes, found {stream.tell()} or more")
    return header, values
