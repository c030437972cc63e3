"""A subject's diffusion series: found in folders or packages, checked, read a volume at a time."""

import gzip
import math
import re
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import BinaryIO

import nibabel as nib
import numpy as np

from brainsex.archives import CHUNK, MAX_INNER, MAX_RATIO, Rejected, check, find, reading
from brainsex.nifti import MAX_BYTES, MAX_VOXELS, NOT_NIFTI

DATA, MASK, DEVIATIONS = "data.nii.gz", "nodif_brain_mask.nii.gz", "grad_dev.nii.gz"
NEEDED = (DATA, "bvals", "bvecs", MASK)
MAX_TEXT = 1 << 20
"""Bytes of the largest bvals or bvecs, and of what a NIfTI file may hold before its voxels."""
MAX_KEPT = 2 << 30
"""Bytes that the voxels and volumes kept of a file may take; HCP's take 0.3 GB."""
MAX_DEVIATION = 0.3
"""Largest element of L taken (HCP's are below 0.1): so I + L always has an inverse."""
SEVEN_TESLA = re.compile(r"Diffusion_?7T|_7T_[^/]*\.zip")
"""In the place of a series that HCP has beside a subject's at 3 T: no second session."""
File = tuple[str, Callable[[], BinaryIO]]  # how messages name it, and how it is opened


def locate(paths: list[Path], root: Path, scratch: Path, stack: ExitStack) -> dict[str, File]:
    """The files of the one series that a subject's packages and ``data.nii.gz`` hold, by name.

    `root` is the folder that messages name paths from; `scratch` takes inner archives that have to
    be inflated; packages stay open until `stack` closes.
    """
    folders: dict[str, dict[str, File]] = {}
    for path in paths:
        label = path.relative_to(root).as_posix()
        if SEVEN_TESLA.search(label):
            continue
        if path.suffix.lower() == ".zip":
            for member in find(path, label, (*NEEDED, DEVIATIONS), stack, scratch):
                check(member, MAX_INNER)
                archive, info, where = member
                folder, name = re.split(r"[/\\](?=[^/\\]*$)", where)
                if not SEVEN_TESLA.search(folder):
                    file = where, partial(archive.open, info)
                    folders.setdefault(folder, {})[name.lower()] = file
        else:
            near = {name: path.with_name(name) for name in (*NEEDED, DEVIATIONS)}
            absent = [file for file in near.values() if file.is_symlink() and not file.exists()]
            if absent:
                named = ", ".join(file.relative_to(root).as_posix() for file in absent)
                raise Rejected(f"{named}: expected a file, found a link: not fetched: datalad get")
            folders[path.parent.relative_to(root).as_posix()] = {
                name: (near[name].relative_to(root).as_posix(), partial(open, near[name], "rb"))
                for name in near
                if near[name].is_file()
            }
    found = {folder: series for folder, series in folders.items() if DATA in series}
    if len(found) != 1:
        names = ", ".join(path.relative_to(root).as_posix() for path in paths)
        several = ", ".join(found) + ": keep one session" if found else "none"
        raise Rejected(f"{names}: expected one folder with {DATA}, found {several}")
    ((folder, series),) = found.items()
    if missing := [name for name in NEEDED if name not in series]:
        raise Rejected(f"{folder}: expected {', '.join(NEEDED)}, found no {', '.join(missing)}")
    return series


def gradients(series: dict[str, File]) -> tuple[np.ndarray, np.ndarray]:
    """The b-values (volumes,) in s/mm² and the gradients' directions (volumes, 3) of a series."""
    bvals, bvecs = _numbers(series["bvals"]).ravel(), _numbers(series["bvecs"])
    if bvecs.shape != (3, len(bvals)):
        hint = ": transpose it" if bvecs.shape == (len(bvals), 3) else ""
        raise Rejected(
            f"{series['bvecs'][0]}: expected 3 rows of as many numbers as in bvals, {len(bvals)}, "
            f"found shape {bvecs.shape}{hint}"
        )
    return bvals, bvecs.T


def _numbers(file: File) -> np.ndarray:
    label, opened = file
    with reading(label, "rows of as many numbers each"), opened() as stream:
        text = stream.read(MAX_TEXT + 1)
        if len(text) > MAX_TEXT:
            raise ValueError(f"more than {MAX_TEXT} bytes")
        return np.array([row.split() for row in text.decode().splitlines() if row.strip()], float)


def shells(bvals: np.ndarray, b0: float) -> np.ndarray:
    """The shell of each volume: b rounded to hundreds, 0 for what is not weighted by diffusion."""
    return np.where(bvals <= b0, 0, np.round(bvals, -2))


def select(bvals: np.ndarray, bvecs: np.ndarray, bmax: float, b0: float, label: str) -> np.ndarray:
    """The volumes of the shells up to `bmax`, ascending, if a tensor can be fitted to them.

    `bvals` (volumes,), `bvecs` (volumes, 3); `label` names the series in messages.
    """
    if not (bvals >= 0).all() or not (bvals <= b0).any():
        raise Rejected(
            f"{label}: expected b ≥ 0 and b0 volumes (b ≤ {b0:g}) among them, found b from "
            f"{bvals.min():g} to {bvals.max():g} (bvals)"
        )
    keep = np.flatnonzero(shells(bvals, b0) <= bmax)
    weighted = keep[bvals[keep] > b0]
    if not len(weighted):
        found = ", ".join(f"{b:g}" for b in np.unique(shells(bvals, b0)))
        raise Rejected(f"{label}: expected a shell up to b = {bmax:g}, found {found} (bvals)")
    for volume in weighted:
        if not abs(np.linalg.norm(bvecs[volume]) - 1) < 0.01:
            raise Rejected(
                f"{label}: expected unit vectors where b > {b0:g}, found {bvecs[volume]} for "
                f"volume {volume}, counted from 0 (bvecs)"
            )
    dyads = bvecs[weighted, :, None] * bvecs[weighted, None, :]
    if np.linalg.matrix_rank(dyads.reshape(-1, 9), tol=1e-2) < 6:
        raise Rejected(
            f"{label}: expected six independent directions up to b = {bmax:g}, found "
            f"{len(weighted)} volumes that do not determine a tensor (bvecs)"
        )
    return keep


def read_mask(file: File) -> tuple[nib.Nifti1Header, np.ndarray]:
    """A mask's header, and the indices of its voxels above 0, X fastest."""
    header, values = read(file)
    slabs = (values[0, start : start + CHUNK] for start in range(0, values.size, CHUNK))
    voxels = np.flatnonzero(np.concatenate([scaled(header, slab) > 0 for slab in slabs]))
    if not len(voxels):
        raise Rejected(f"{file[0]}: no voxel above 0: an empty mask")
    return header, voxels


def read_deviations(file: File, grid: nib.Nifti1Header, voxels: np.ndarray) -> np.ndarray:
    """L at `voxels` (N, 3, 3) float32; HCP stores its elements by columns."""
    header, values = read(file, grid, voxels, range(9), 9)
    deviations = np.stack([scaled(header, row).astype(np.float32) for row in values])
    if (largest := max(np.nanmax(deviations), -np.nanmin(deviations))) > MAX_DEVIATION:
        raise Rejected(
            f"{file[0]}: expected fractions up to {MAX_DEVIATION}, found {largest:.3g}: per cent?"
        )
    return deviations.T.reshape(-1, 3, 3).swapaxes(1, 2)


def scaled(header: nib.Nifti1Header, values: np.ndarray) -> np.ndarray:
    """Stored values as float64, with the header's slope and intercept applied."""
    slope, intercept = header.get_slope_inter()
    values = values.astype(float)
    return values if slope is None else values * slope + intercept


def read(
    file: File,
    grid: nib.Nifti1Header | None = None,
    voxels: np.ndarray | None = None,
    keep: Iterable[int] = (0,),
    volumes: int = 1,
) -> tuple[nib.Nifti1Header, np.ndarray]:
    """Stream a gzipped NIfTI-1 file to its end, a volume at a time.

    Parameters
    ----------
    file : 4D, `volumes` on the grid of the header `grid`; without one, a 3D volume.
    voxels : indices of those to keep, X fastest; all of them by default.
    keep : the volumes to keep, ascending.

    Returns
    -------
    header : the file's.
    values : (kept volumes, voxels) as stored: `scaled` gives what they stand for.
    """
    label, opened = file
    with (
        reading(label, "a whole gzipped NIfTI-1 file"),
        opened() as compressed,
        gzip.open(compressed) as stream,
    ):
        header = _header(stream)
        shape, dtype = header.get_data_shape(), header.get_data_dtype()
        if grid is None and len(shape) != 3:
            raise Rejected(f"{label}: expected a 3D volume, found shape {shape}")
        if grid is not None:
            expected = (*grid.get_data_shape(), volumes)
            affines = header.get_best_affine(), grid.get_best_affine()
            if shape != expected or not np.allclose(*affines, atol=1e-3):
                found = shape if shape != expected else f"another affine, {affines[0].tolist()}"
                raise Rejected(
                    f"{label}: expected shape {expected}, the grid of {MASK} by {volumes} volumes "
                    f"(as many as bvals has values, 9 in {DEVIATIONS}), found {found}"
                )
        if not 0 < (size := math.prod(shape[:3]) * dtype.itemsize) <= MAX_BYTES:
            raise ValueError(f"a volume of {size} bytes, at most {MAX_BYTES} are taken")
        if (count := math.prod(shape[:3])) > MAX_VOXELS:
            raise Rejected(f"{label}: expected at most {MAX_VOXELS} voxels, found {count}: crop it")
        rows = {int(number): row for row, number in enumerate(keep)}
        count, voxels = (count, slice(None)) if voxels is None else (len(voxels), voxels)
        if (kept := len(rows) * count * dtype.itemsize) > MAX_KEPT:
            raise Rejected(
                f"{label}: expected at most {MAX_KEPT} bytes, found {kept} in the {len(rows)} "
                f"volumes and {count} voxels of the mask: crop the mask or lower bmax"
            )
        values = np.empty((len(rows), count), dtype)
        for number in range(volumes):
            if len(content := stream.read(size)) < size:
                raise ValueError(f"it ends in volume {number + 1} of {volumes}")
            # a mask, of one volume, may well be smaller
            if grid is not None and (number + 1) * size > MAX_RATIO * compressed.tell() + CHUNK:
                raise ValueError(f"it inflates to more than {MAX_RATIO} times what is stored")
            if number in rows:
                values[rows[number]] = np.frombuffer(content, dtype)[voxels]
        if stream.read(1):
            raise ValueError("it goes on after the last volume that its header declares")
    return header, values


def _header(stream: BinaryIO) -> nib.Nifti1Header:
    """Read a NIfTI-1 header that holds together, up to the first voxel."""
    try:
        header = nib.Nifti1Header(stream.read(nib.Nifti1Header.sizeof_hdr))
        header.get_best_affine(), header.get_slope_inter()
    except NOT_NIFTI as error:
        raise ValueError(str(error)) from error
    if header.get_data_dtype().kind not in "iuf":
        raise ValueError(f"expected real numbers, found {header.get_data_dtype()}")
    before = header.get_data_offset() - header.sizeof_hdr
    if not 0 <= before <= MAX_TEXT:
        raise ValueError(f"{before} bytes before its voxels, 0 to {MAX_TEXT} are taken")
    stream.read(before)
    return header
