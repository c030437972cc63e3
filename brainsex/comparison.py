"""Every explanation of the same held-out subjects, each by the network that did not see it."""

import re
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
from torch import nn

from brainsex import (
    controls,
    masks,
    nifti,
    perturbation,
    saliency,
)
from brainsex.cohort import Cohort

OTHER = "other sex's mean"
MASK, FINAL, COUNTERFACTUAL = "mask (blur)", "mask (blur), last step", f"mask ({OTHER})"
DIFFERENCE, INTEGRATED = "gradient × group difference", f"integrated gradients ({OTHER})"
GRADIENT, SMOOTH = "gradient × input", "SmoothGrad"
CAM, GUIDED, OCCLUSION = "Grad-CAM", "guided backpropagation", "occlusion (blur)"
RANDOM, MAGNITUDE = ", random weights", ", magnitude"
SINGLE = (COUNTERFACTUAL, DIFFERENCE, INTEGRATED, OCCLUSION, CAM, GUIDED, GRADIENT, SMOOTH)
REFERRED = (DIFFERENCE, COUNTERFACTUAL)
"""Methods that bring the groups' difference in: random weights say what the network adds."""
USES = {
    COUNTERFACTUAL: ("iterations", "seed"),
    INTEGRATED: ("steps",),
    OCCLUSION: ("window", "stride"),
    SMOOTH: ("samples", "seed"),
}
"""Which options of `single` a method's maps depend on, beside sigma."""


def single(
    network: nn.Module,
    volumes: np.ndarray,
    name: str,
    *,
    target: np.ndarray,
    subjects: Sequence[str],
    means: np.ndarray,
    sigma: float = 1.0,
    iterations: int = 60,
    samples: int = 10,
    steps: int = 8,
    window: int = 16,
    stride: int = 14,
    seed: int = 0,
    progress: bool = True,
) -> np.ndarray:
    """Maps (n, X, Y, Z) of volumes by one method; all but masks, smooth by their price, smoothed.

    Parameters
    ----------
    name : `MASK` or one of `SINGLE`. Masks are given by their persistence.
    target : (n,) class explained.
    subjects : (n,) names, which seed the draws.
    means : (2, X, Y, Z) mean volumes of women and of men whom the network was trained on.
    sigma : of the Gaussian, voxels.
    iterations, samples, steps, window, stride, seed : of the masks and of `saliency`.
    """
    given, same = (network, volumes), {"target": target, "progress": progress}
    draws, other = {"subjects": subjects, "seed": seed}, {"reference": means[1 - target]}

    def difference() -> np.ndarray:
        times = saliency.smoothed(means - means[::-1], sigma)[target]
        return saliency.gradient(*given, times=times, **same)

    def mask(**reference) -> np.ndarray:
        options = {"iterations": iterations, **draws, **same, **reference}
        return perturbation.optimise_masks(*given, **options).persistence

    methods = {
        MASK: mask,
        COUNTERFACTUAL: lambda: mask(**other),
        DIFFERENCE: difference,
        INTEGRATED: lambda: saliency.integrated_gradients(*given, steps=steps, **other, **same),
        OCCLUSION: lambda: saliency.occlusion(*given, window=window, stride=stride, **same),
        CAM: lambda: saliency.grad_cam(*given, **same),
        GUIDED: lambda: saliency.guided_backpropagation(*given, **same),
        GRADIENT: lambda: saliency.gradient(*given, **same),
        SMOOTH: lambda: saliency.smooth_grad(*given, samples=samples, **draws, **same),
    }
    maps = methods[name]()
    if name not in (MASK, COUNTERFACTUAL):
        maps = saliency.smoothed(maps, sigma)
    return np.abs(maps) if name == SMOOTH else maps  # which has no input to give it a sign


def explain(
    cohort: Cohort,
    networks_folder: str | Path,
    masks_folder: str | Path,
    out: str | Path,
    rows: Sequence[int],
    *,
    sigma: float = 1.0,
    iterations: int = 60,
    samples: int = 10,
    steps: int = 8,
    window: int = 16,
    stride: int = 14,
    seed: int = 0,
) -> tuple[dict[str, np.ndarray], pd.DataFrame]:
    """Single subjects' maps by every method, of the class that their own network predicts.

    Parameters
    ----------
    cohort, networks_folder, masks_folder, rows : as in `masks.explain`, whose masks are used where
        they are.
    out : gets ``<method>/<ID>.nii.gz``. What is there of the same networks and settings is kept.
    sigma, iterations, samples, steps, window, stride, seed : as in `single`.

    Returns
    -------
    maps : method -> (n, X, Y, Z), also of random weights, drawn once a fold; references and group
        differences are of the training folds. table : of `masks.explain`.
    """
    rows, out, masks_folder = np.asarray(rows), Path(out), Path(masks_folder)
    draws = {"iterations": iterations, "seed": seed}
    options = {"sigma": sigma, "samples": samples, "steps": steps, **draws}
    options |= {"window": window, "stride": stride}
    table = masks.explain(cohort, networks_folder, masks_folder, rows=rows, **draws)
    names = [*SINGLE, *(name + RANDOM for name in REFERRED)]
    maps = {name: np.empty((len(rows), *cohort.volumes.shape[1:]), np.float32) for name in names}
    folds = masks.held_out(networks_folder, cohort.subjects)
    sources = sys.modules[__name__], saliency, perturbation, controls
    for fold in table["fold"].unique():
        network = masks.load(networks_folder, fold, cohort)
        random = by_chance(network, fold, seed)
        here = np.flatnonzero(table["fold"] == fold)
        means = masks.training_means(cohort, folds, fold)
        for name in names:
            method = name.removesuffix(RANDOM)
            explained = network if name == method else random
            used = {use: options[use] for use in ("sigma", "seed", *USES.get(method, ()))}
            key = masks.key(networks_folder, fold, *sources, name, sorted(used.items()))
            paths = [_path(out / slug(name), subject) for subject in table["Subject"][here]]
            compute = partial(_some, cohort, rows, table, here, explained, method, means, options)
            maps[name][here] = masks.kept(paths, cohort.affine, key, compute)
    for name, folder in ((MASK, masks_folder / "persistence"), (FINAL, masks_folder)):
        paths = [_path(folder, subject) for subject in table["Subject"]]
        maps[name] = np.stack([nifti.load(path)[0] for path in paths])
    for name in (GRADIENT, GUIDED):
        maps[name + MAGNITUDE] = np.abs(maps[name])
    return maps, table


def by_chance(network: nn.Module, fold: int, seed: int) -> nn.Module:
    """The network with all its layers drawn anew, once a fold."""
    *_, (_, random) = controls.randomised(network, seed=100 * seed + fold)
    return random


def _some(
    cohort: Cohort,
    rows: np.ndarray,
    table: pd.DataFrame,
    here: np.ndarray,
    network: nn.Module,
    method: str,
    means: np.ndarray,
    options: Mapping,
    places: np.ndarray,
) -> np.ndarray:
    """Maps of some of a fold's subjects, who are at `places` in `here`."""
    chosen = here[places]
    given = options | {
        "target": table["target"].to_numpy()[chosen],
        "subjects": cohort.subjects[rows[chosen]],
        "means": means,
    }
    return single(network, np.array(cohort.volumes[rows[chosen]]), method, **given)


def _path(folder: Path, name: str) -> Path:
    return folder / f"{name}.nii.gz"


def slug(name: str) -> str:
    """A method's name as a folder's."""
    return re.sub("[^a-z0-9]+", "-", name.lower()).strip("-")
