"""Every explanation of the same held-out subjects, each by the network that did not see it."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from tqdm.auto import tqdm

from brainsex import (
    controls,
    group_masks,
    masks,
    measures,
    networks,
    nifti,
    perturbation,
    saliency,
    training,
)
from brainsex.cohort import Cohort, Rows

OTHER = "other sex's mean"
MASK, COUNTERFACTUAL = "mask (blur)", f"mask ({OTHER})"
DIFFERENCE = "gradient × group difference"
RANDOM = f"{DIFFERENCE}, random weights"


def explain(
    cohort: Cohort,
    networks_folder: str | Path,
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
    """Single subjects' maps by every method, of the class predicted; all but masks smoothed alike.

    Parameters
    ----------
    cohort, networks_folder, out, rows : as in `masks.explain`, whose masks are used where they are.
    sigma : of the Gaussian, voxels.
    iterations, samples, steps, window, stride, seed : of the masks and of `saliency`.

    Returns
    -------
    maps : method -> (n, X, Y, Z), signed but for SmoothGrad, which has no input to give it a sign;
        references and group differences are of the training folds, random weights are drawn
        once a fold. table : of `masks.explain`.
    """
    rows = np.asarray(rows)
    options = {"seed": seed, "iterations": iterations}
    table = masks.explain(cohort, networks_folder, out, rows=rows, **options)
    paths = [Path(out) / f"{subject}.nii.gz" for subject in table["Subject"]]
    found = {MASK: np.stack([nifti.load(path)[0] for path in paths])}
    folds = masks.held_out(networks_folder, cohort.subjects)
    for fold in table["fold"].unique():
        here = (table["fold"] == fold).to_numpy()
        network = networks.load(Path(networks_folder) / f"fold-{fold}.pt", cohort.volumes.shape[1:])
        *_, (_, random) = controls.randomised(network, seed=100 * seed + fold)
        names, target = cohort.subjects[rows[here]], table["target"][here].to_numpy()
        volumes = np.array(cohort.volumes[rows[here]])
        means = masks.training_means(cohort, folds, fold)
        other, same = {"reference": means[1 - target]}, {"target": target}
        difference = saliency.smoothed(means - means[::-1], sigma)[target]
        given = network, volumes
        methods = {
            COUNTERFACTUAL: perturbation.optimise_masks(
                *given, subjects=names, **same, **other, **options
            ).masks,
            DIFFERENCE: saliency.gradient(*given, times=difference, **same),
            f"integrated gradients ({OTHER})": saliency.integrated_gradients(
                *given, steps=steps, **same, **other
            ),
            "occlusion (blur)": saliency.occlusion(*given, window=window, stride=stride, **same),
            "Grad-CAM": saliency.grad_cam(*given, **same),
            "guided backpropagation": saliency.guided_backpropagation(*given, **same),
            "gradient × input": saliency.gradient(*given, **same),
            "SmoothGrad": saliency.smooth_grad(
                *given, samples=samples, subjects=names, seed=seed, **same
            ),
            RANDOM: saliency.gradient(random, volumes, times=difference, **same),
        }
        for name, maps in methods.items():
            found.setdefault(name, np.empty((len(rows), *volumes.shape[1:]), np.float32))
            found[name][here] = maps
    for name, maps in found.items():
        if name not in (MASK, COUNTERFACTUAL):  # smooth already, by their price
            found[name] = saliency.smoothed(maps, sigma)
    found["SmoothGrad"] = np.abs(found["SmoothGrad"])
    found["gradient × input, magnitude"] = np.abs(found["gradient × input"])
    return found, table


def explain_groups(
    cohort: Cohort,
    networks_folder: str | Path,
    folds: Sequence[int],
    brain: np.ndarray,
    *,
    sigma: float = 1.0,
    iterations: int = 60,
    permutations: int = 100,
    tfce: bool = False,
    workers: int = 1,
    seed: int = 0,
) -> dict[str, np.ndarray]:
    """Maps of men and women at once: group masks of the folds' networks, and the t test of all.

    Each fold's mask is of its held-out subjects and their sexes; the mean over folds is given. The
    t maps are of the training subjects of those folds, averaged likewise; the corrected p is of the
    first fold's, brain volume out where it is known.

    Returns
    -------
    Method -> (X, Y, Z): "group mask (blur)", "group mask (other sex's mean)", "t map" (magnitude),
    "t map (brain volume out)" where it is known, "corrected p" (minus log10).
    """
    assignment = masks.held_out(networks_folder, cohort.subjects)
    found: dict[str, list] = {}
    for fold in folds:
        network = networks.load(Path(networks_folder) / f"fold-{fold}.pt", cohort.volumes.shape[1:])
        test, train = (np.flatnonzero(at) for at in (assignment == fold, assignment != fold))
        sex, volumes = cohort.sex[test], Rows(cohort.volumes, test)
        means = masks.training_means(cohort, assignment, fold)
        options = {"target": sex, "iterations": iterations, "seed": seed}
        for name, reference in (("blur", None), (OTHER, means[1 - sex])):
            one = group_masks.group_mask(network, volumes, reference=reference, **options)
            found.setdefault(f"group mask ({name})", []).append(one)
        seen = cohort.volumes[train], cohort.sex[train], brain
        t = {"t map": None}
        if (volume := cohort.table.get("brain_volume_ml")) is not None:
            t["t map (brain volume out)"] = volume.to_numpy()[train]
        for name, confound in t.items():
            one = controls.t_map(*seen, sigma=sigma, confound=confound)
            found.setdefault(name, []).append(np.abs(one))
        if "corrected p" not in found:
            options = {"permutations": permutations, "tfce": tfce, "workers": workers, "seed": seed}
            p = controls.family_wise(
                *seen, cohort.affine, sigma=sigma, confound=confound, **options
            )
            found["corrected p"] = [p]
    return {name: np.mean(maps, axis=0) for name, maps in found.items()}


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


def again(
    cohort: Cohort,
    networks_folder: str | Path,
    rows: Sequence[int],
    brain: np.ndarray,
    *,
    sigma: float = 1.0,
    iterations: int = 60,
    seed: int = 0,
) -> pd.DataFrame:
    """How like themselves single subjects' maps are with another seed, or by another network.

    All explain the class that the subject's own network predicts.

    The other network is the next fold's: it has seen the subject, which its own had not.

    Returns
    -------
    One row a subject, map and what is other: Subject, map, other, spearman, dice (of 2 %).
    """
    folds = masks.held_out(networks_folder, cohort.subjects)
    found = []
    for row in rows:
        volume, name = cohort.volumes[row : row + 1], cohort.subjects[row]
        numbers = (folds[row], (folds[row] + 1) % (folds.max() + 1))
        paths = [Path(networks_folder) / f"fold-{number}.pt" for number in numbers]
        own, next_ = (networks.load(path, volume.shape[1:]) for path in paths)
        quiet = {"target": training.predict(own, volume).argmax(1), "progress": False}

        def mask(network, seed, volume=volume, name=name, quiet=quiet):
            options = {"subjects": [name], "seed": seed, "iterations": iterations}
            return perturbation.optimise_masks(network, volume, **quiet, **options).masks

        first, second = (saliency.gradient(network, volume, **quiet) for network in (own, next_))
        base = mask(own, seed)
        for label, change, one, two in (
            (MASK, "optimiser seed", base, mask(own, seed + 1)),
            (MASK, "network", base, mask(next_, seed)),
            ("gradient × input", "network", first, second),
        ):
            pair = (np.abs(saliency.smoothed(maps, sigma)[0]) for maps in (one, two))
            similar = measures.similarity(*pair, brain)
            found.append({"Subject": name, "map": label, "other": change, **similar})
    return pd.DataFrame(found)


def cascade(
    network, volumes: np.ndarray, brain: np.ndarray, *, sigma: float = 1.0, seed: int = 0
) -> pd.DataFrame:
    """How like the network's maps of (n, X, Y, Z) are those with layers drawn anew, last to first.

    Gives a row a layer and method: layer, map, and the means of spearman and dice."""
    target = training.predict(network, volumes).argmax(1)

    def maps(network) -> dict[str, np.ndarray]:
        options = {"target": target, "progress": False}
        found = {
            "Grad-CAM": saliency.grad_cam(network, volumes, **options),
            "guided backpropagation": saliency.guided_backpropagation(network, volumes, **options),
            "gradient × input": saliency.gradient(network, volumes, **options),
        }
        return {name: np.abs(saliency.smoothed(one, sigma)) for name, one in found.items()}

    learnt, rows = maps(network), []
    for layer, changed in controls.randomised(network, seed=seed):
        for name, drawn in maps(changed).items():
            pairs = zip(learnt[name], drawn)
            similar = pd.DataFrame(measures.similarity(*pair, brain) for pair in pairs)
            rows.append({"layer": layer, "map": name, **similar.mean()})
    return pd.DataFrame(rows)
