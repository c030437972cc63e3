"""The study's own protocol on FreeSurfer's table, leaks included: to compare, not to copy."""

import numpy as np
import pandas as pd

from brainsex import classifiers, evaluation
from brainsex.tabular import Table, scores


def as_in_the_study(
    table: Table,
    *,
    first: int | None = None,
    one_hot: bool = False,
    folds: int | None = 10,
    seed: int = 0,
    leave_out: tuple[str, ...] = (),
) -> tuple[pd.DataFrame, np.ndarray]:
    """Scores by the study's protocol, for comparison with its published figures.

    Parameters
    ----------
    first : the first so many subjects only; the study also has 500.
    one_hot : whether HCP's Release enters as a feature a kind; a number a kind otherwise.
    folds : of a random stratified split; None for leave-one-out.
    leave_out : classifiers that take too long.

    Returns
    -------
    `tabular.scores`, with a column leaks: what of the tested subjects training saw; and the
    accuracy (99,) of KNN by k from 1 on, of which KNN's is the best.
    """
    rows = slice(first)
    sex, features = table.sex[rows], table.features[rows]
    if table.release is not None:
        kind = pd.Categorical(table.release)
        coded = pd.get_dummies(kind) if one_hot else pd.DataFrame({"Release": kind.codes})
        features = pd.concat([features, coded[rows].add_prefix("Release ").astype(float)], axis=1)
    assignment = np.arange(len(sex))
    if folds is not None:
        assignment = evaluation.folds(sex, folds=folds, seed=seed)
    largest = min(99, len(sex) - int(np.bincount(assignment).max()))
    given = features, sex, assignment
    votes = classifiers.neighbour_sweep(*given, largest=largest)
    sweep = ((votes > 0) == sex).mean(1)
    found = {"KNN": votes[sweep.argmax()]}
    for name, classifier in classifiers.as_published().items():
        if name not in leave_out:
            found[name] = classifiers.cross_predict(classifier, *given, name=name)
    compared = scores(sex, found, assignment)
    compared["leaks"] = "relatives" if table.groups is not None else "relatives, if there are any"
    best = f"k = {sweep.argmax() + 1} chosen by these scores"
    compared.loc[0, "leaks"] += f", {best}"
    return compared, sweep
