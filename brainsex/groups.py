"""Maps of men and women at once: group masks, and the voxelwise t test beside them."""

import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from torch import nn

from brainsex import controls, group_masks, masks, networks, perturbation, voxelwise
from brainsex.cohort import Cohort, Rows
from brainsex.comparison import OTHER, RANDOM, slug

MASKS = ("group mask (blur)", f"group mask ({OTHER})", f"group mask ({OTHER}){RANDOM}")
T, T_OUT, CORRECTED = "t map", "t map (brain volume out)", "corrected p"


def explain(
    cohort: Cohort,
    networks_folder: str | Path,
    out: str | Path,
    folds: Sequence[int],
    brain: np.ndarray,
    *,
    sigma: float = 1.0,
    iterations: int = 60,
    permutations: int = 100,
    tfce: bool = False,
    seed: int = 0,
) -> dict[str, np.ndarray]:
    """Group maps by every method, the means over folds.

    Each fold's mask is of its held-out subjects and their sexes. The t maps are of the training
    subjects of those folds; the corrected p is of the first fold's, with brain volume out where it
    is known.

    Parameters
    ----------
    cohort, networks_folder : as in `masks.explain`.
    out : gets ``<method>/fold-K.nii.gz``. What is there of the same networks and settings is kept.
    brain : (X, Y, Z) bool, the voxels tested.
    sigma : of the Gaussian under which FA is tested, voxels.
    iterations, seed : of `group_masks.group_mask`.
    permutations, tfce : of `voxelwise.family_wise`.

    Returns
    -------
    Method -> (X, Y, Z): `MASKS`, `T` and, where brain volume is known, `T_OUT` (magnitudes),
    `CORRECTED` (minus log10 of p).
    """
    assignment, found = masks.held_out(networks_folder, cohort.subjects), {}
    tests = {"sigma": sigma, "permutations": permutations, "tfce": tfce}
    draws = {"iterations": iterations, "seed": seed}
    how = sys.modules[__name__], perturbation, group_masks, voxelwise, tests, draws
    for fold in folds:
        network, key = masks.load(networks_folder, fold, cohort, *how)
        methods = _masks(cohort, network, assignment, fold, draws)
        methods |= _tests(cohort, assignment != fold, brain, fold == folds[0], seed, **tests)
        for name, make in methods.items():
            path = Path(out) / slug(name) / f"fold-{fold}.nii.gz"
            one = masks.kept([path], cohort.affine, key, make)[0]
            found.setdefault(name, []).append(one)
    return {name: np.mean(maps, axis=0) for name, maps in found.items()}


def _masks(
    cohort: Cohort, network: nn.Module, folds, fold: int, draws: dict
) -> dict[str, Callable]:
    *_, (_, random) = controls.randomised(network, seed=100 * draws["seed"] + fold)
    test = np.flatnonzero(folds == fold)
    sex, volumes = cohort.sex[test], Rows(cohort.volumes, test)
    other = masks.training_means(cohort, folds, fold)[1 - sex]

    def mask(network, reference=None) -> np.ndarray:
        given = {"target": sex, "reference": reference, **draws}
        return group_masks.group_mask(network, volumes, **given)[None]

    blur, counterfactual, by_chance = MASKS
    return {
        blur: lambda _: mask(network),
        counterfactual: lambda _: mask(network, other),
        by_chance: lambda _: mask(random, other),
    }


def _tests(
    cohort: Cohort, train, brain, first: bool, seed: int, sigma, permutations, tfce
) -> dict[str, Callable]:
    seen = Rows(cohort.volumes, np.flatnonzero(train)), cohort.sex[train], brain
    volume, smooth = cohort.table.get("brain_volume_ml"), {"sigma": sigma}
    tests = {T: lambda _: np.abs(voxelwise.t_map(*seen, **smooth))[None]}
    controlled = smooth | {"confound": None if volume is None else volume.to_numpy()[train]}
    if volume is not None:
        tests[T_OUT] = lambda _: np.abs(voxelwise.t_map(*seen, **controlled))[None]
    if first:
        how = {"permutations": permutations, "tfce": tfce, "seed": seed, **controlled}
        how["workers"] = networks.workers()
        tests[CORRECTED] = lambda _: voxelwise.family_wise(*seen, cohort.affine, **how)[None]
    return tests
