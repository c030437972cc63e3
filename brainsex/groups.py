"""Maps of men and women at once: group masks, and the voxelwise t test beside them."""

import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import numpy as np
from torch import nn

from brainsex import controls, group_masks, masks, networks, perturbation, voxelwise
from brainsex.cohort import Cohort, Rows
from brainsex.comparison import OTHER, RANDOM, by_chance, slug

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
    for fold in folds:
        methods = _masks(cohort, networks_folder, assignment, fold, iterations, seed)
        methods |= _tests(
            cohort, assignment != fold, brain, fold == folds[0], sigma, permutations, tfce, seed
        )
        for name, (make, how) in methods.items():
            path = Path(out) / slug(name) / f"fold-{fold}.nii.gz"
            key = masks.key(networks_folder, fold, sys.modules[__name__], *how)
            one = masks.kept([path], cohort.affine, key, make)[0]
            found.setdefault(name, []).append(one)
    return {name: np.mean(maps, axis=0) for name, maps in found.items()}


def _masks(
    cohort: Cohort, networks_folder, folds: np.ndarray, fold: int, iterations: int, seed: int
) -> dict[str, tuple[Callable, tuple]]:
    """How each group mask of a fold is made, and what it depends on."""
    network = masks.load(networks_folder, fold, cohort)
    test = np.flatnonzero(folds == fold)
    sex, volumes = cohort.sex[test], Rows(cohort.volumes, test)
    other = masks.training_means(cohort, folds, fold)[1 - sex]

    def mask(network: nn.Module, reference: np.ndarray | None, _) -> np.ndarray:
        options = {"target": sex, "reference": reference, "iterations": iterations, "seed": seed}
        return group_masks.group_mask(network, volumes, **options)[None]

    random = by_chance(network, fold, seed)
    how = perturbation, group_masks, controls, iterations, seed
    given = (network, None), (network, other), (random, other)
    return {name: (partial(mask, *one), how) for name, one in zip(MASKS, given)}


def _tests(
    cohort: Cohort, train, brain, first: bool, sigma: float, permutations: int, tfce: bool, seed
) -> dict[str, tuple[Callable, tuple]]:
    """The same of the t maps of a fold's training subjects."""
    seen = Rows(cohort.volumes, np.flatnonzero(train)), cohort.sex[train], brain
    volume = cohort.table.get("brain_volume_ml")
    confounds = {T: None} if volume is None else {T: None, T_OUT: volume.to_numpy()[train]}
    tests = {}
    for name, confound in confounds.items():

        def t(_, confound=confound) -> np.ndarray:
            return np.abs(voxelwise.t_map(*seen, sigma=sigma, confound=confound))[None]

        tests[name] = t, (voxelwise, brain, confound, sigma)
    if first:
        options = {"sigma": sigma, "permutations": permutations, "tfce": tfce, "seed": seed}

        def corrected(_) -> np.ndarray:
            given = {"confound": confound, "workers": networks.workers(), **options}
            return voxelwise.family_wise(*seen, cohort.affine, **given)[None]

        tests[CORRECTED] = corrected, (voxelwise, brain, confound, sorted(options.items()))
    return tests
