"""Every explanation of the same held-out subjects, each by the network that did not see it."""

import re
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
from torch import nn
from tqdm.auto import tqdm

from brainsex import (
    controls,
    masks,
    measures,
    networks,
    nifti,
    perturbation,
    saliency,
    training,
)
from brainsex.cohort import Cohort

OTHER = "other sex's mean"
MASK, FINAL, COUNTERFACTUAL = "mask (blur)", "mask (blur), last step", f"mask ({OTHER})"
DIFFERENCE, INTEGRATED = "gradient × group difference", f"integrated gradients ({OTHER})"
GRADIENT, SMOOTH = "gradient × input", "SmoothGrad"
CAM, GUIDED, OCCLUSION = "Grad-CAM", "guided backpropagation", "occlusion (blur)"
RANDOM = ", random weights"
SINGLE = (COUNTERFACTUAL, DIFFERENCE, INTEGRATED, OCCLUSION, CAM, GUIDED, GRADIENT, SMOOTH)
REFERRED = (DIFFERENCE, COUNTERFACTUAL)
"""Methods that bring the groups' difference in: random weights say what the network adds."""


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
    iterations: int = 60,
    seed: int = 0,
    **options,
) -> tuple[dict[str, np.ndarray], pd.DataFrame]:
    """Single subjects' maps by every method, of the class that their own network predicts.

    Parameters
    ----------
    cohort, networks_folder, masks_folder, rows : as in `masks.explain`, whose masks are used where
        they are.
    out : gets ``<method>/<ID>.nii.gz``. What is there of the same networks and settings is kept.
    iterations, seed, options : as in `single`.

    Returns
    -------
    maps : method -> (n, X, Y, Z), also of random weights, drawn once a fold; references and group
        differences are of the training folds. table : of `masks.explain`.
    """
    rows, out, masks_folder = np.asarray(rows), Path(out), Path(masks_folder)
    options |= {"iterations": iterations, "seed": seed}
    settings = {"iterations": iterations, "seed": seed}
    table = masks.explain(cohort, networks_folder, masks_folder, rows=rows, **settings)
    names = [*SINGLE, *(name + RANDOM for name in REFERRED)]
    maps = {name: np.empty((len(rows), *cohort.volumes.shape[1:]), np.float32) for name in names}
    folds = masks.held_out(networks_folder, cohort.subjects)
    for fold in table["fold"].unique():
        how = sys.modules[__name__], saliency, perturbation, sorted(options.items())
        network, key = masks.load(networks_folder, fold, cohort, *how)
        *_, (_, random) = controls.randomised(network, seed=100 * seed + fold)
        here = np.flatnonzero(table["fold"] == fold)
        means = masks.training_means(cohort, folds, fold)
        for name in names:
            explained = random if name.endswith(RANDOM) else network
            compute = partial(_some, cohort, rows, table, here, explained, name, means, options)
            paths = [_path(out / slug(name), subject) for subject in table["Subject"][here]]
            maps[name][here] = masks.kept(paths, cohort.affine, key, compute)
    for name, folder in ((MASK, masks_folder / "persistence"), (FINAL, masks_folder)):
        paths = [_path(folder, subject) for subject in table["Subject"]]
        maps[name] = np.stack([nifti.load(path)[0] for path in paths])
    maps[f"{GRADIENT}, magnitude"] = np.abs(maps[GRADIENT])
    return maps, table


def _some(cohort, rows, table, here, network, name, means, options, places) -> np.ndarray:
    """Maps of some of a fold's subjects, by their places in `here`."""
    chosen = here[places]
    return single(
        network,
        np.array(cohort.volumes[rows[chosen]]),
        name.removesuffix(RANDOM),
        target=table["target"].to_numpy()[chosen],
        subjects=cohort.subjects[rows[chosen]],
        means=means,
        **options,
    )


def _path(folder: Path, name: str) -> Path:
    return folder / f"{name}.nii.gz"


def slug(name: str) -> str:
    """A method's name as a folder's."""
    return re.sub("[^a-z0-9]+", "-", name.lower()).strip("-")


def judge(
    cohort: Cohort,
    networks_folder: str | Path,
    rows: Sequence[int],
    table: pd.DataFrame,
    maps: Mapping[str, np.ndarray],
    brain: np.ndarray,
) -> dict[str, dict[str, np.ndarray]]:
    """Deletion and insertion of every method, each subject by the network that `explain` took.

    Parameters
    ----------
    rows, table, maps : as `explain` takes and gives them; of other maps, n in the same order.

    Returns
    -------
    Method -> as `measures.faithfulness`.
    """
    rows, found = np.asarray(rows), {name: {} for name in maps}
    for fold in tqdm(table["fold"].unique(), "deletion and insertion", unit="fold"):
        network = networks.load(Path(networks_folder) / f"fold-{fold}.pt", cohort.volumes.shape[1:])
        here = (table["fold"] == fold).to_numpy()
        volumes = np.array(cohort.volumes[rows[here]])
        options = {"target": table["target"][here].to_numpy(), "progress": False}
        for name, one in maps.items():
            part = measures.faithfulness(network, volumes, one[here], brain, **options)
            for measure, values in part.items():
                whole = found[name].setdefault(measure, np.empty((len(rows), *values.shape[1:])))
                whole[here] = values
    return found


def alike(
    network: nn.Module,
    others: Mapping[str, tuple[nn.Module, int]],
    volumes: np.ndarray,
    names: Sequence[str],
    brain: np.ndarray,
    *,
    seed: int = 0,
    **options,
) -> pd.DataFrame:
    """How like a network's maps are those that others give of the same subjects and classes.

    Adebayo et al. 2018, arXiv 1810.03292, where the others have random weights, or learnt shuffled
    labels: what explains the network must change. Where only a seed is another it must not.

    Parameters
    ----------
    others : what is other -> a network, and the seed of its explanation.
    volumes : (n, X, Y, Z).
    names : methods of `single`; of their maps the magnitude counts.
    seed, options : of `single`, of the network's own maps; the class is the one it predicts.

    Returns
    -------
    One row a method, other and subject: map, other, spearman, dice (of 2 % of the brain).
    """
    options |= {"target": training.predict(network, volumes).argmax(1), "progress": False}
    rows = []
    for name in names:
        own = single(network, volumes, name, seed=seed, **options)
        for label, (other, draw) in others.items():
            changed = single(other, volumes, name, seed=draw, **options)
            rows += [
                {"map": name, "other": label} | measures.similarity(np.abs(one), np.abs(two), brain)
                for one, two in zip(own, changed)
            ]
    return pd.DataFrame(rows)
