"""One NIfTI volume: read in RAS, cleaned, reduced to the study's grid.

The study reduces each volume with ``skimage.transform.resize``: a Gaussian of (factor - 1) / 2
voxels against aliasing, then linear interpolation. Both are linear and separable, so each axis is
one small matrix here, built from scipy's own filters; the affine follows the grid.
"""

import math
from functools import lru_cache
from pathlib import Path
from typing import BinaryIO

import nibabel as nib
import numpy as np
from isal import igzip, isal_zlib
from nibabel.affines import from_matvec
from nibabel.orientations import inv_ornt_aff
from nibabel.volumeutils import apply_read_scaling
from scipy.ndimage import affine_transform, gaussian_filter1d, zoom

from brainsex import SHAPE

MAX_VOXELS = 1 << 25
"""Voxels of the largest grid taken; a head at 0.7 mm has two thirds, HCP's FA 3.7 million."""
MAX_BYTES = 16 * MAX_VOXELS
"""No volume is inflated beyond it."""
MAX_BEFORE = 1 << 20
"""Bytes of the longest header with its extensions."""
CHUNK = 1 << 20
NOT_NIFTI = (
    nib.filebasedimages.ImageFileError,
    nib.spatialimages.HeaderDataError,
    nib.wrapstruct.WrapStructError,
)
BRAIN_FA = 0.02  # or scaled T1 intensity, above which a voxel counts as brain
MAX_OUT_OF_RANGE = 0.01  # share of the voxels that may be no FA before a volume is rejected
MIDDLE = 0.75  # share of each axis of the grid that `normalise` makes a brain fill


def load(path: str | Path) -> tuple[np.ndarray, np.ndarray]:
    """Read a NIfTI volume (.nii, .nii.gz) whole, with its checksum verified, in RAS orientation.

    Returns
    -------
    volume : (X, Y, Z) float32, axes closest to right, anterior, superior; the file's scaling done.
    affine : (4, 4) float64, voxel indices to mm.

    Raises
    ------
    FileNotFoundError, ValueError
        No such file; truncated or corrupted, not NIfTI-1, not 3D, not real, or without an affine.
    """
    volume, affine = read(path)
    return np.ascontiguousarray(volume), affine


def read(path: str | Path) -> tuple[np.ndarray, np.ndarray]:
    """As `load`, without a copy: as the file has it in memory, perhaps read-only and mirrored.

    Axes follow each other and run as in the file (PyTorch takes no array whose axes run backwards).
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such volume. DATA_ACCESS.md says how to get the data.")
    try:
        with igzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            content = _content(file)
    except (EOFError, isal_zlib.error, igzip.BadGzipFile) as error:
        raise ValueError(f"{path}: damaged gzip file ({error}). Fetch it again.") from error
    except NOT_NIFTI as error:
        raise ValueError(f"{path}: not a NIfTI-1 file ({error}).") from error
    except (ValueError, OverflowError) as error:
        raise ValueError(f"{path}: {error}.") from error
    try:
        image = nib.Nifti1Image.from_bytes(content)
        if image.header["sform_code"] == 0 and image.header["qform_code"] == 0:
            raise ValueError("no affine (sform and qform codes are 0): left and right are unknown")
        affine = image.affine
        singular = not np.isfinite(affine).all() or abs(np.linalg.det(affine[:3, :3])) < 1e-6
        if singular or np.isnan(turn := nib.io_orientation(affine)).any():
            raise ValueError(f"its affine is singular: {affine.tolist()}")
        proxy = image.dataobj
        voxels = np.ndarray(proxy.shape, proxy.dtype, content, proxy.offset, order="F")
        volume = nib.apply_orientation(apply_read_scaling(voxels, proxy.slope, proxy.inter), turn)
        volume = volume.astype(np.float32, copy=False)
        affine = affine @ inv_ornt_aff(turn, image.shape)
    except NOT_NIFTI as error:
        raise ValueError(f"{path}: not a NIfTI-1 file ({error}).") from error
    except (ValueError, OSError, np.linalg.LinAlgError) as error:
        raise ValueError(f"{path}: {error}.") from error
    return volume, affine


def _content(file: BinaryIO) -> bytes:
    """A file's bytes up to its last voxel, read as far as its header says, and on to its end."""
    header = nib.Nifti1Header(file.read(nib.Nifti1Header.sizeof_hdr))
    shape, dtype = header.get_data_shape(), header.get_data_dtype()
    if len(shape) != 3 or min(shape) < 1:
        raise ValueError(f"expected a 3D volume, found shape {shape}")
    if dtype.kind not in "iuf":
        raise ValueError(f"expected real numbers, found {dtype}")
    if math.prod(shape) > MAX_VOXELS:
        raise ValueError(f"expected at most {MAX_VOXELS} voxels, found shape {shape}: crop it")
    size = dtype.itemsize * math.prod(shape)
    whole = (before := header.get_data_offset()) + size
    if not header.sizeof_hdr <= before <= MAX_BEFORE:
        raise ValueError(
            f"expected {header.sizeof_hdr} to {MAX_BEFORE} bytes before its voxels, found {before}"
        )
    file.seek(0)
    content = file.read(whole)
    if len(content) < whole:
        raise ValueError(f"truncated: expected {whole} bytes, found {len(content)}")
    after = 0
    while chunk := file.read(CHUNK):  # at its end gzip compares the checksum
        after += len(chunk)
        if after > MAX_BYTES:
            raise ValueError(f"more than {MAX_BYTES} bytes after its voxels: no brain volume")
    return content


def _turns(volume: np.ndarray) -> tuple[slice, ...]:
    """What mirrors a volume into the order it has in memory, where numpy is ten times as fast."""
    return tuple(slice(None, None, -1 if step < 0 else 1) for step in volume.strides)


def _range(volume: np.ndarray) -> tuple[float, float]:
    """The least and the largest value; NaN where there is one."""
    laid = volume[_turns(volume)]
    return laid.min(), laid.max()


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

    Equal to ``skimage.transform.resize(volume, shape)`` up to float32 rounding. The volume
    (X, Y, Z) has to be finite: `clean` it first.

    Returns
    -------
    volume : `shape`, float32, within the values it had.
    affine : (4, 4), the same millimetres from the new indices: voxel faces stay aligned.
    """
    if volume.ndim != 3 or len(shape) != 3 or min(shape) < 1:
        raise ValueError(f"expected a 3D volume and shape, found {volume.shape} and {shape}.")
    low, high = _range(volume)
    if not np.isfinite((low, high)).all():
        raise ValueError(f"expected finite values, found {low} to {high}. Clean it first.")
    x, y, z = (_operator(old, new) for old, new in zip(volume.shape, shape))
    turns = _turns(volume)
    laid = np.asfortranarray(volume[turns], dtype=np.float32).T  # (Z, Y, X), no copy of a file's
    # mirrored afterwards, which is the same: each operator mirrored along both axes is itself
    reduced = np.tensordot(z, y @ (laid @ x.T), 1).T[turns]
    factors = np.divide(volume.shape, shape)
    to_old = from_matvec(np.diag(factors), (factors - 1) / 2)
    return np.ascontiguousarray(reduced.clip(np.float32(low), np.float32(high))), affine @ to_old


def clean(volume: np.ndarray, modality: str = "fa") -> tuple[np.ndarray, dict[str, int]]:
    """Bring a volume into [0, 1]: non-finite and negative voxels to 0, others to 1 at most.

    A T1-weighted volume (of the brain alone) has arbitrary units. It is divided first by twice the
    median of the brain, that being what is above a tenth of the 99th percentile: white matter
    then lies near 0.6, grey matter near 0.45, CSF below 0.3.

    Parameters
    ----------
    volume : (X, Y, Z).
    modality : ``fa``, or ``t1`` for T1-weighted.

    Returns
    -------
    volume : (X, Y, Z) float32 in [0, 1]; the one given, where nothing had to be changed.
    counts : voxels changed: ``non_finite``, ``negative``, ``above_one``.

    Raises
    ------
    ValueError
        Nothing is left, or more than 1 % of the non-zero voxels were out of range: that is no FA
        map. (Of T1, any share may be above: bright vessels.)
    """
    counts = dict.fromkeys(("non_finite", "negative", "above_one"), 0)
    if not np.isfinite(_range(volume)).all():
        finite = np.isfinite(volume)
        counts["non_finite"] = int(np.count_nonzero(~finite))
        volume = np.where(finite, volume, 0)
    values = volume.astype(np.float32, copy=False)
    if modality == "t1" and (floor := np.percentile(values, 99) / 10) > 0:
        values = values / (2 * np.median(values[values > floor]))
    low, high = _range(values)
    if low >= 0 and 0 < high <= 1:
        return values, counts
    if high <= 0:
        raise ValueError("no voxel above 0: an empty volume.")
    counts["negative"] = int(np.count_nonzero(values < 0))
    counts["above_one"] = int(np.count_nonzero(values > 1))
    cleaned, outside = values.clip(0, 1), counts["negative"] + counts["above_one"]
    if modality == "fa" and outside > MAX_OUT_OF_RANGE * np.count_nonzero(cleaned):
        raise ValueError(
            f"values from {low:.4g} to {high:.4g}, expected fractional "
            "anisotropy in [0, 1]: another kind of image, or scaled."
        )
    return cleaned, counts


def normalise(volume: np.ndarray) -> np.ndarray:
    """Stretch and shift a brain along X, Y and Z to fill the middle three quarters of its grid.

    So all brains get one size, and one place. A brain's ends along an axis are where the half per
    cent of its voxels begins, so that a stray voxel does not count.

    Parameters
    ----------
    volume : (X, Y, Z) in [0, 1], brain above `BRAIN_FA`.

    Returns
    -------
    (X, Y, Z) float32 on the same grid, interpolated linearly.

    Raises
    ------
    ValueError
        No voxel of brain.
    """
    brain, step, middle = volume > BRAIN_FA, np.ones(3), np.zeros(3)
    for axis, size in enumerate(volume.shape):
        share = np.cumsum(brain.sum(axis=tuple({0, 1, 2} - {axis})))
        if not share[-1]:
            raise ValueError("no voxel that counts as brain.")
        edges = np.arange(size + 1) - 0.5  # of the voxels, between which the share grows evenly
        low, high = np.interp((0.005, 0.995), np.concatenate([[0], share]) / share[-1], edges)
        step[axis] = max((high - low) / (MIDDLE * size), 1e-3)
        middle[axis] = (low + high) / 2
    offset = middle - step * (np.array(volume.shape) - 1) / 2
    return affine_transform(volume, step, offset, order=1)  # step < 4/3: nothing to smooth for


def brain_volume(volume: np.ndarray, affine: np.ndarray) -> float:
    """Volume in ml of the voxels above `BRAIN_FA`; in native space, a measure of brain size."""
    brain = volume[_turns(volume)] > BRAIN_FA
    return float(np.count_nonzero(brain) * abs(np.linalg.det(affine[:3, :3])) / 1000)
