"""The 2D network's slabs: where each lies, how well it decides, and what all of them decide.

A subject's class is the majority of its slabs, as in the study, a tie going to the side of the mean
of their log-odds; or that mean's side alone.
"""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from nibabel.affines import apply_affine

from brainsex import evaluation, networks, tables, write
from brainsex.cohort import Cohort, Rows


def centres(network: networks.MriNet2d, affine: np.ndarray | None) -> np.ndarray:
    """Millimetres along the network's axis of the middle of each slab, (S,); of a known affine."""
    if affine is None:
        raise ValueError("expected an affine (4, 4), found none: cohort.load(folder, affine=…).")
    count = network.shape[network.axis] // network.depth
    voxels = np.tile((np.array(network.shape) - 1) / 2, (count, 1))
    voxels[:, network.axis] = np.arange(count) * network.depth + (network.depth - 1) / 2
    return apply_affine(affine, voxels)[:, network.axis]


def positions(table: pd.DataFrame, millimetres: np.ndarray) -> pd.DataFrame:
    """Held-out accuracy of each slab, folds pooled: mm, accuracy and its Wilson interval low, high.

    `table` is that of `evaluate`, `millimetres` the slabs' `centres`.
    """
    test = table[table["part"] == "test"]
    correct, subjects = np.sum(test["correct_by_slab"].tolist(), 0), int(test["subjects"].sum())
    low, high = zip(*(evaluation.wilson(int(right), subjects) for right in correct))
    columns = {"mm": millimetres, "accuracy": correct / subjects, "low": low, "high": high}
    return pd.DataFrame(columns)


def scores(log_odds: np.ndarray, sex: np.ndarray) -> dict:
    """How many are right, of slabs and of subjects, by log-odds of man (N, S) and sex (N,).

    Returns
    -------
    subjects, slabs (N S), and of them right: correct_slabs, correct_vote (majority, or the mean
    where there is none), correct_mean (of the log-odds); correct_by_slab, S numbers of subjects.
    """
    right, margin, mean = (log_odds > 0) == sex[:, None], np.sign(log_odds).sum(1), log_odds.mean(1)
    return {
        "subjects": len(sex),
        "slabs": right.size,
        "correct_slabs": int(right.sum()),
        "correct_vote": int(((np.where(margin == 0, mean, margin) > 0) == sex).sum()),
        "correct_mean": int(((mean > 0) == sex).sum()),
        "correct_by_slab": right.sum(0).tolist(),
    }


def evaluate(data: Cohort, folder: Path, *, only: Sequence[int] | None = None) -> pd.DataFrame:
    """Score each fold's network on the subjects it was trained on and on those it has not seen.

    The folder is the `out` of `training.cross_validate`, and gets ``slabs.json``, the same rows:
    two a fold, with fold, part (train or test), and the columns of `scores`.
    """
    folder = Path(folder)
    if not (folder / "folds.csv").is_file():
        raise FileNotFoundError(f"{folder / 'folds.csv'}: no folds. Run notebook 03_cnn_2d first.")
    folds = tables.folds(folder / "folds.csv")
    if folds.index.tolist() != data.subjects.tolist():
        raise ValueError(f"{folder / 'folds.csv'}: expected the subjects of {data.name}, in order.")
    folds, rows = folds.to_numpy(), []
    for fold in np.unique(folds) if only is None else only:
        network = networks.load(folder / f"fold-{fold}.pt", data.volumes.shape[1:])
        if not isinstance(network, networks.MriNet2d):
            raise ValueError(f"{folder}: expected a MriNet2d, found a MriNet3d.")
        network.to(networks.device())
        for part, chosen in (("train", folds != fold), ("test", folds == fold)):
            volumes = Rows(data.volumes, np.flatnonzero(chosen))
            logits = networks.evaluate(network, volumes, torch.float32).numpy()
            log_odds = logits[..., 1] - logits[..., 0]
            rows.append({"fold": int(fold), "part": part, **scores(log_odds, data.sex[chosen])})
    write(folder / "slabs.json", json.dumps(rows, indent=1))
    return pd.DataFrame(rows)
