"""Fractional anisotropy from HCP's diffusion series, by DIPY (notebook 02).

The tensor D of a voxel explains its signal by S = S0 exp(-b gᵀDg) (Basser et al. 1994). Where the
gradients deviate from their nominal direction and strength by L, a voxel's g is (I + L)g, so that
the tensor fitted with the nominal g is (I + L)ᵀ D (I + L), from which D is recovered exactly.
"""

import gzip
import math
import re
from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pandas as pd
from nibabel import Nifti1Header
from nibabel.arrayproxy import ArrayProxy

from brainsex import archives, storage
from brainsex.archives import File

DATA, MASK, DEVIATIONS = "data.nii.gz", "nodif_brain_mask.nii.gz", "grad_dev.nii.gz"
NEEDED = (DATA, "bvals", "bvecs", MASK)
MAX_TEXT = 1 << 20  # bytes read of bvals and bvecs
MAX_VALUES = 1 << 28  # voxels by volumes kept in memory; HCP's series has 1e8, in 0.4 GB
MAX_B0 = 50  # s/mm², up to which a volume counts as not weighted by diffusion
SLAB = 2000  # voxels fitted at a time: DIPY's memory does not grow with the brain
SEVEN_TESLA = re.compile(r"Diffusion_?7T|_7T_[^/]*\.zip")  # HCP has it beside the series at 3 T


def fit_folder(
    source: str | Path,
    target: str | Path,
    *,
    bmax: float = 1500,
    workers: int | None = None,
    overwrite: bool = False,
) -> pd.DataFrame:
    """Fit FA to each subject's diffusion series, into ``target/<ID>.nii.gz``.

    Parameters
    ----------
    source : packages ``<ID>_….zip`` or folders ``<ID>/T1w/Diffusion``, at any depth, of
        ``data.nii.gz``, ``bvals``, ``bvecs``, the mask and, if there is one, ``grad_dev.nii.gz``.
    bmax : s/mm², the largest shell fitted; a volume's shell is its b rounded to hundreds.
    workers : subjects at the same time, all cores by default; 1.1 GB each for HCP's series.

    `target` and `overwrite`, what is returned (status ``fitted``) and raised are as in
    `archives.extract`; besides ImportError without DIPY.
    """
    if find_spec("dipy") is None:
        raise ImportError("fitting FA needs DIPY: pip install dipy")
    source, target = Path(source), Path(target)

    def work(subject: str, files: dict[str, Path]) -> str:
        with ExitStack() as stack:
            series = _find_series(files, stack)
            _fit_series(series, target / f"{subject}.nii.gz", bmax)
        return "fitted" if DEVIATIONS in series else f"fitted without {DEVIATIONS}"

    run = {"command": "fa", "settings": {"bmax": bmax}, "overwrite": overwrite}
    return archives.process_subjects(work, source, (".zip", f"/{DATA}"), target, workers, **run)


def _find_series(paths: dict[str, Path], stack: ExitStack) -> dict[str, File]:
    """Return the files, by name, of the one series that a subject's packages and folders hold."""
    names, files = (*NEEDED, DEVIATIONS), []
    for label, path in paths.items():
        if path.name == DATA:
            places = map(path.with_name, names)  # what opens a broken link will name it
            places = [place for place in places if place.is_file() or place.is_symlink()]
            files += [(label.removesuffix(DATA) + p.name, partial(open, p, "rb")) for p in places]
        else:
            files += archives.find_members(path, label, names, stack, archives.MAX_INNER)
    folders: dict[str, dict[str, File]] = {}
    for file in files:
        folder, _, name = file[0].replace("\\", "/").rpartition("/")
        if not SEVEN_TESLA.search(folder):
            folders.setdefault(folder, {})[name.lower()] = file
    whole = [folder for folder, series in folders.items() if not set(NEEDED) - set(series)]
    if len(whole) != 1:
        expected = f"expected one folder with {', '.join(NEEDED)} (one session)"
        raise ValueError(f"{', '.join(paths)}: {expected}, found {', '.join(whole) or 'none'}")
    return folders[whole[0]]


def _fit_series(files: dict[str, File], path: Path, bmax: float) -> None:
    """Write the FA map of the files of a series: float32 in [0, 1], 0 outside the mask."""
    design, keep, count = _read_gradients(files, bmax)
    grid, (mask,) = _read_nifti(files[MASK], None, slice(None), (0,), 1)
    voxels = np.flatnonzero(mask > 0)  # X fastest
    if not 0 < len(voxels) * len(keep) <= MAX_VALUES:
        expected = f"expected 1 to {MAX_VALUES // len(keep)} voxels above 0"
        raise ValueError(f"{files[MASK][0]}: {expected}, found {len(voxels)}")
    deviations = np.zeros((len(voxels), 3, 3), np.float32)
    if DEVIATIONS in files:
        stored = np.float32(_read_nifti(files[DEVIATIONS], grid, voxels, range(9), 9)[1])
        deviations = stored.T.reshape(-1, 3, 3).swapaxes(1, 2)  # HCP stores L by columns
    volumes = _read_nifti(files[DATA], grid, voxels, keep, count)[1]
    fa = np.zeros(mask.size, np.float32)
    for start in range(0, len(voxels), SLAB):
        slab = slice(start, start + SLAB)
        signal = np.stack([volume[slab] for volume in volumes]).T
        fa[voxels[slab]] = _fractional_anisotropy(signal, design, deviations[slab])
    fa = fa.reshape(grid.get_data_shape(), order="F")
    storage.write_nifti(path, fa, grid.get_best_affine())


def _read_gradients(files: dict[str, File], bmax: float) -> tuple[np.ndarray, np.ndarray, int]:
    """Return DIPY's design matrix (fitted, 7), the volumes to fit, and how many there are."""
    from dipy.core.gradients import gradient_table
    from dipy.reconst import dti

    bvals, bvecs = _read_numbers(files["bvals"]).ravel(), _read_numbers(files["bvecs"]).T
    keep = np.flatnonzero(np.where(bvals <= MAX_B0, 0, np.round(bvals, -2)) <= bmax)
    expected = f"b0 volumes (b ≤ {MAX_B0}) and six directions up to b = {bmax:g} in bvecs"
    with storage.reading(files["bvals"][0], expected):
        table = gradient_table(bvals, bvecs=bvecs, b0_threshold=MAX_B0)
        directions = table.bvecs[keep][bvals[keep] > MAX_B0]
        dyads = (directions[:, :, None] * directions[:, None, :]).reshape(-1, 9)
        if np.linalg.matrix_rank(dyads, tol=1e-2) < 6 or not 0 <= bvals.min() <= MAX_B0:
            shells = f"b from {bvals.min():g} to {bvals.max():g}"
            raise ValueError(f"{len(directions)} volumes, {shells}")
    return dti.design_matrix(table)[keep], keep, len(bvals)


def _fractional_anisotropy(
    signal: np.ndarray, design: np.ndarray, deviations: np.ndarray
) -> np.ndarray:
    """Fit FA to the signal (N, volumes) of voxels, by DIPY's weighted least squares.

    `deviations` is L (N, 3, 3) of each voxel in the frame of bvecs, as FSL writes both. Returns
    (N,) float32 in [0, 1], 0 where a signal or a deviation is not finite.
    """
    from dipy.reconst import dti

    finite = np.isfinite(signal).all(axis=1) & np.isfinite(deviations).all(axis=(1, 2))
    signal = np.maximum(signal[finite].astype(float), dti.MIN_POSITIVE_SIGNAL)
    coefficients, _ = dti.wls_fit_tensor(design, signal, return_lower_triangular=True)
    undo = np.linalg.inv(np.eye(3) + deviations[finite])
    tensors = undo.swapaxes(1, 2) @ dti.from_lower_triangular(coefficients[:, :6]) @ undo
    least = 1e-6 / -design.min()  # where DIPY clips eigenvalues
    eigenvalues, _ = dti.decompose_tensor(tensors, min_diffusivity=least)
    fa = np.zeros(len(finite), np.float32)
    fa[finite] = dti.fractional_anisotropy(eigenvalues).clip(0, 1)
    return fa


def _read_numbers(file: File) -> np.ndarray:
    """Read rows of numbers from a text file of bounded size."""
    with storage.reading(file[0], "rows of as many numbers each"), file[1]() as stream:
        return np.loadtxt(stream.read(MAX_TEXT).decode("utf-8-sig").splitlines(), ndmin=2)


def _read_nifti(
    file: File, grid: Nifti1Header | None, voxels: np.ndarray | slice, keep: Sequence, count: int
) -> tuple[Nifti1Header, list[np.ndarray]]:
    """Stream a gzipped NIfTI-1 file to its end, where gzip compares the checksum.

    The file has `count` volumes on the `grid` of a header; without one, it is 3D. Returns its
    header and, of each volume to `keep` (ascending), the scaled values at `voxels` (X fastest):
    (N,).
    """
    kind = f"a whole gzipped NIfTI-1 file of real voxels, at most {storage.MAX_VOXELS}"
    reading = storage.reading(file[0], f"{kind}, on the grid of {MASK}")
    with reading, file[1]() as compressed, gzip.open(compressed) as stream:
        header = Nifti1Header(stream.read(Nifti1Header.sizeof_hdr))
        shape, dtype = header.get_data_shape(), header.get_data_dtype()
        expected = (*grid.get_data_shape(), count) if grid else shape[:3]
        affine, grid_affine = header.get_best_affine(), (grid or header).get_best_affine()
        fits = shape == expected and np.allclose(affine, grid_affine, atol=1e-3)
        bounded = 0 < math.prod(shape[:3]) <= storage.MAX_VOXELS
        if not fits or not bounded or dtype.kind not in "iuf":
            problem = f"found {shape} of {dtype}, affine {affine.tolist()}"
            raise ValueError(f"expected shape {expected}, {problem}")
        stored = ArrayProxy(stream, header).reshape((*shape[:3], count))
        values = [stored[..., number].ravel(order="F")[voxels] for number in keep]
        while stream.read(archives.CHUNK):  # to its end
            pass
    return header, values
