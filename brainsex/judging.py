"""Explanations judged by networks: deletion, other seeds, labels and weights, several averaged."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from torch import nn
from tqdm.auto import tqdm

from brainsex import LABELS, masks, measures, saliency, training
from brainsex.cohort import Cohort
from brainsex.comparison import single


def judge(
    cohort: Cohort,
    networks_folder: str | Path,
    rows: Sequence[int],
    table: pd.DataFrame,
    maps: Mapping[str, np.ndarray],
    brain: np.ndarray,
) -> tuple[dict[str, dict[str, np.ndarray]], dict[str, np.ndarray]]:
    """Deletion and insertion of every method, each subject by the network that `explain` took.

    Masks of a blur are learnt to delete by blurring, and may win for that alone: so deletion is
    measured by the other sex's mean, too.

    Parameters
    ----------
    rows, table, maps : as `explain` takes and gives them; of other maps, n in the same order.

    Returns
    -------
    Method -> as `measures.faithfulness`, with the blur; method -> areas (n,) of deletion by the
    training subjects' mean of the other sex.
    """
    rows = np.asarray(rows)
    folds = masks.held_out(networks_folder, cohort.subjects)
    found, replaced = {name: {} for name in maps}, {name: np.empty(len(rows)) for name in maps}
    for fold in tqdm(table["fold"].unique(), "deletion and insertion", unit="fold"):
        network = masks.load(networks_folder, fold, cohort)
        here = (table["fold"] == fold).to_numpy()
        volumes, target = np.array(cohort.volumes[rows[here]]), table["target"][here].to_numpy()
        other = masks.training_means(cohort, folds, fold)[1 - target]
        options = {"target": target, "progress": False}
        for name, values in maps.items():
            given = network, volumes, values[here], brain
            for measure, part in measures.faithfulness(*given, **options).items():
                whole = found[name].setdefault(measure, np.empty((len(rows), *part.shape[1:])))
                whole[here] = part
            part = measures.faithfulness(*given, reference=other, insertion=False, **options)
            replaced[name][here] = part["deletion_area"]
    return found, replaced


def blurred_brains(
    cohort: Cohort, networks_folder: str | Path, rows: Sequence[int], sigma: float = 5.0
) -> pd.DataFrame:
    """How many blurred brains each network takes for a man's: is the blur neutral?

    One row a fold and sex of the subjects: fold, sex, n, taken_for_men.
    """
    rows = np.asarray(rows)
    folds = masks.held_out(networks_folder, cohort.subjects[rows])
    found = []
    for fold in np.unique(folds):
        network = masks.load(networks_folder, fold, cohort)
        for label, sex in LABELS.items():
            here = rows[(folds == fold) & (cohort.sex[rows] == sex)]
            if len(here):
                volumes = saliency.smoothed(np.array(cohort.volumes[here]), sigma)
                men = training.predict(network, volumes).argmax(1) == LABELS["M"]
                found.append(
                    {"fold": fold, "sex": label, "n": len(here), "taken_for_men": men.sum()}
                )
    return pd.DataFrame(found)


def averaged(
    found: Sequence[nn.Module],
    volumes: np.ndarray,
    names: Sequence[str],
    truth: np.ndarray,
    brain: np.ndarray,
    **options,
) -> pd.DataFrame:
    """Average precision of several networks' maps, alone (their mean) and averaged.

    One row a method and what is judged: map, of, n, single, group. `options` are of `single`;
    `truth` and `brain` (X, Y, Z) bool.
    """
    rows = []
    for name in names:
        each = np.array([single(network, volumes, name, **options) for network in found])
        for label, judged in (("one network", each), ("their mean", each.mean(0, keepdims=True))):
            means = np.array([maps.mean(0) for maps in judged])
            alone, group = (
                measures.localisation(maps, truth, brain)["average_precision"].mean()
                for maps in (np.concatenate(judged), means)
            )
            rows.append(
                {"map": name, "of": label, "n": len(volumes), "single": alone, "group": group}
            )
    return pd.DataFrame(rows)


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
    One row a method, other and subject: map, other, spearman, dice (of 2 % of the brain); NaN of
    a map that is the same everywhere.
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
