"""Fractional anisotropy from HCP's diffusion series, by DIPY (notebook 02).

The tensor D of a voxel explains its signal by S = S0 exp(-b gᵀDg) (Basser et al. 1994). Where the
gradients deviate from their nominal direction and strength by L, a voxel's g is (I + L)g, so that
the tensor fitted with the nominal g is (I + L)ᵀ D (I + L): the fit stays one for all voxels, with
the same weights and residuals, and D is recovered from it afterwards, exactly.
"""

import gzip
import json
import math
import re
from contextlib import ExitStack
from importlib.metadata import version
from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd

from brainsex import read_record, replacing, series
from brainsex.archives import by_subject, each_subject, files, reading

try:
    from dipy.core.gradients import gradient_table
    from dipy.reconst import dti
except ImportError as error:
    raise ImportError(
        "fitting FA needs DIPY, which is not installed: pip install -r requirements-diffusion.txt"
    ) from error

SLAB = 2000
"""Voxels fitted at a time: what DIPY takes does not grow with the brain."""


def fit(
    source: str | Path,
    target: str | Path,
    *,
    bmax: float = 1500,
    b0: float = 50,
    workers: int | None = None,
    overwrite: bool = False,
) -> pd.DataFrame:
    """Fit FA to each subject's diffusion series, into ``target/<ID>.nii.gz``.

    Beside each map, ``<ID>.json`` says how it was made. An interrupted run goes on where it
    stopped: subjects whose map is in `target` are skipped. ``target/rejected.csv`` lists whom this
    run left out, and why.

    Parameters
    ----------
    source : folder with HCP's diffusion packages (``<ID>_….zip``, or such in another archive) or
        folders ``<ID>/T1w/Diffusion`` at any depth; or one package. A series is ``data.nii.gz``,
        ``bvals``, ``bvecs``, ``nodif_brain_mask.nii.gz`` and, for gradient non-linearity to be
        honoured, ``grad_dev.nii.gz``.
    target : folder for the maps, made if absent.
    bmax : s/mm², the largest shell fitted; a volume's shell is its b rounded to hundreds.
    b0 : s/mm², up to which a volume counts as not weighted by diffusion.
    workers : subjects at the same time, as many as there are cores by default; some 1.1 GB each
        for HCP's series (`make soak` measures it).
    overwrite : fit anew what is in `target` (what is then rejected keeps its old map).

    Returns
    -------
    DataFrame sorted by Subject (a string) with status (``fitted``, ``present`` or ``rejected``) and
    reason (of a rejection, else empty).

    Raises
    ------
    FileNotFoundError
        No `source`, or no series in it and no map in `target`.
    ValueError
        `target` holds maps fitted with another `bmax` or `b0`.
    OSError
        `target` cannot be written (the disk is full, say). Finished maps stay.

    References
    ----------
    Basser et al. (1994), Biophys J 66:259 (tensor); Chung et al. (2006), NeuroImage 33:531
    (weighted least squares); Bammer et al. (2003), MRM 50:560 (gradient non-linearity).
    """
    source, target = Path(source), Path(target)
    for map_ in [] if overwrite else sorted(target.glob("*.nii.gz")):
        if not (path := map_.with_name(map_.name.removesuffix(".nii.gz") + ".json")).is_file():
            continue
        before = read_record(path)
        if (found := (before.get("bmax", bmax), before.get("b0", b0))) != (bmax, b0):
            raise ValueError(
                f"{path}: expected bmax and b0 {(bmax, b0)} as asked for now, found {found}. A "
                "cohort has one recipe: choose another target, or overwrite."
            )
    paths = [source] if source.is_file() else files(source, ".zip", series.DATA)
    wanted = re.compile(rf".*\.zip|{re.escape(series.DATA)}", re.IGNORECASE)
    inputs = by_subject(path for path in paths if wanted.fullmatch(path.name))
    root, neglected = source if source.is_dir() else source.parent, []

    def work(subject: str) -> None:
        if not _fit_one(subject, inputs[subject], root, target, bmax, b0):
            neglected.append(subject)

    expected = f"packages named <ID>_….zip or folders <ID>/T1w/Diffusion with {series.DATA}"
    facts = {"command": "fa", "source": source, "bmax": bmax, "b0": b0}
    table = each_subject(
        work, inputs, source, target, expected, "fitted", workers, overwrite, facts
    )
    if neglected:
        print(f"{len(neglected)} without {series.DEVIATIONS}: gradient non-linearity neglected")
    return table


def fractional_anisotropy(
    signal: np.ndarray,
    bvals: np.ndarray,
    bvecs: np.ndarray,
    *,
    b0: float = 50,
    deviations: np.ndarray | None = None,
) -> np.ndarray:
    """FA of voxels from their signal, by DIPY's weighted least squares.

    Parameters
    ----------
    signal : (N, volumes), any scale; below DIPY's least positive signal it counts as that.
    bvals : (volumes,) s/mm².
    bvecs : (volumes, 3), unit vectors where b is above `b0`; elsewhere they may be 0.
    b0 : s/mm², up to which a volume counts as not weighted by diffusion.
    deviations : (N, 3, 3), L of each voxel: its g is (I + L)g, its b is b |(I + L)g|². In the frame
        of `bvecs`, as FSL writes both (image axes, x flipped if the affine's determinant is
        positive): no flip is needed between them, and FA does not change with one of both.

    Returns
    -------
    (N,) float32 in [0, 1]; 0 where a signal or a deviation is not finite.
    """
    design = dti.design_matrix(gradient_table(bvals, bvecs=bvecs, b0_threshold=b0))
    finite = np.isfinite(signal).all(axis=1)
    if deviations is not None:
        finite &= np.isfinite(deviations).all(axis=(1, 2))
    signal = np.maximum(signal[finite], dti.MIN_POSITIVE_SIGNAL)
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


def _fit_one(
    subject: str, paths: list[Path], root: Path, target: Path, bmax: float, b0: float
) -> bool:
    """Write a subject's map and its record; return whether gradient deviations were honoured."""
    with ExitStack() as stack:
        found = series.locate(paths, root, target, stack)
        label = found[series.DATA][0]
        bvals, bvecs = series.gradients(found)
        keep = series.select(bvals, bvecs, bmax, b0, label)
        grid, voxels = series.read_mask(found[series.MASK])
        deviations = None
        if series.DEVIATIONS in found:
            deviations = series.read_deviations(found[series.DEVIATIONS], grid, voxels)
        header, signal = series.read(found[series.DATA], grid, voxels, keep, len(bvals))
    volume = np.zeros(math.prod(grid.get_data_shape()), np.float32)
    with reading(label, "signals that a tensor can be fitted to"):
        for start in range(0, len(voxels), SLAB):
            slab = slice(start, start + SLAB)
            volume[voxels[slab]] = fractional_anisotropy(
                series.scaled(header, signal[:, slab].T),
                bvals[keep],
                bvecs[keep],
                b0=b0,
                deviations=None if deviations is None else deviations[slab],
            )
    counts = zip(*np.unique(series.shells(bvals[keep], b0), return_counts=True))
    record = {
        "fitter": "dipy.reconst.dti.wls_fit_tensor",
        "bmax": bmax,
        "b0": b0,
        "shells": {f"{shell:g}": int(count) for shell, count in counts},
        "gradient_nonlinearity": "neglected" if deviations is None else "honoured",
        "series": label,
        "voxels": len(voxels),
        "versions": {name: version(name) for name in ("dipy", "numpy", "brainsex")},
    }
    header.set_data_shape(grid.get_data_shape())
    header.set_data_dtype(np.float32)
    header.set_slope_inter(1, 0)
    header["cal_min"], header["cal_max"] = 0, 1  # what viewers show as black and white
    image = nib.Nifti1Image(volume.reshape(grid.get_data_shape(), order="F"), None, header)
    places = [target / f"{subject}{end}" for end in (".nii.gz", ".json", ".nii")]
    with replacing(places[0]) as map_, replacing(places[1]) as beside:
        map_.write_bytes(gzip.compress(image.to_bytes(), 6, mtime=0))
        beside.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        for old in (places[0], places[2]):  # so that no old map is ever beside the new recipe
            old.unlink(missing_ok=True)
    return deviations is not None
