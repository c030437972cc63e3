"""A trained network on new volumes, one file after the other, whatever one of them is."""

from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd
from nibabel.orientations import axcodes2ornt, ornt_transform
from tqdm.auto import tqdm

from brainsex import SHAPE, cohort, networks, runs, sources, training, volumes


def predict(
    checkpoint: str | Path, paths: list[Path], *, orientation: str = "RAS"
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The probability of man that a network gives each volume, prepared as its training cohort was.

    Parameters
    ----------
    checkpoint : ``fold-K.pt``, or a state dict saved from the published architecture, with man as
        class 1. What ``run.json`` beside it says of the cohort holds for the volumes: its grid, T1
        or FA, normalised or not. Without one: FA on the study's shape, on any field of view.
    paths : NIfTI volumes, at native resolution, in any orientation.
    orientation : which way the axes ran in the arrays that the network was trained on. Ours are
        RAS; HCP's files read without their affine are LAS, the mirror image.

    Returns
    -------
    Subject and probability_of_man; and Subject and reason of the volumes left out.

    Raises
    ------
    FileNotFoundError, ValueError
        As `networks.load`; an orientation that is none.
    """
    checkpoint = Path(checkpoint)
    grid = {"shape": SHAPE, "affine": None, "modality": "fa", "normalised": False}
    run = runs.read(checkpoint.parent)
    run = run.get("train", run)  # at the top, where it is of an older version
    if isinstance(run, dict) and "grid" in run:
        grid = cohort.checked_grid(run["grid"], checkpoint.with_name(runs.RECORD))
    if sorted(orientation.translate(str.maketrans("LPI", "RAS"))) != ["A", "R", "S"]:
        raise ValueError(f"expected an orientation such as RAS or LAS, found {orientation}.")
    turn = ornt_transform(axcodes2ornt("RAS"), axcodes2ornt(orientation))
    network, rows, rejected = networks.load(checkpoint, tuple(grid["shape"])), [], []
    for path in tqdm(paths, "predict", unit="volume"):
        try:
            volume, affine, _ = volumes.prepare(path, grid["modality"], grid["normalised"])
            image = nib.Nifti1Image(volume, affine).as_reoriented(turn)
            small, affine = volumes.resample(image.dataobj, image.affine, network.shape)
            if grid["affine"] is not None and not np.allclose(affine, grid["affine"], atol=1e-3):
                found, expected = (np.round(each, 3).tolist() for each in (affine, grid["affine"]))
                raise ValueError(
                    f"{path}: expected the training cohort's field of view, of affine {expected} "
                    f"on the network's grid, found {found}."
                )
            probability = training.predict(network, np.asarray(small)[None])[0, 1]
            rows.append((sources.subject(path), probability))
        except (ValueError, OSError) as error:
            rejected.append((sources.subject(path), str(error)))
    return (
        pd.DataFrame(rows, columns=["Subject", "probability_of_man"]),
        pd.DataFrame(rejected, columns=["Subject", "reason"]),
    )
