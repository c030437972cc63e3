"""Folds, and scores with intervals that a referee would accept."""

import math

import numpy as np
from scipy.stats import norm, t
from sklearn.model_selection import StratifiedGroupKFold, StratifiedKFold


def folds(
    sex: np.ndarray, *, groups: np.ndarray | None = None, folds: int = 10, seed: int = 0
) -> np.ndarray:
    """The fold in which each subject is tested, 0 to `folds` - 1, (N,) int64.

    Stratified by sex; where groups (families) are known, none of them spans two folds. One
    assignment for every classifier: it depends on the arguments alone.

    Raises
    ------
    ValueError
        Fewer subjects of one sex, or fewer groups, than folds.
    """
    sex = np.asarray(sex)
    fewest = min(np.bincount(sex, minlength=2)) if groups is None else len(np.unique(groups))
    if not 2 <= folds <= fewest:
        unit = "subjects of either sex" if groups is None else "families"
        raise ValueError(f"expected 2 to {fewest} folds (there are {fewest} {unit}), got {folds}.")
    kind = StratifiedKFold if groups is None else StratifiedGroupKFold
    splits = kind(folds, shuffle=True, random_state=seed).split(sex, sex, groups)
    assignment = np.empty(len(sex), np.int64)
    for fold, (_, test) in enumerate(splits):
        assignment[test] = fold
    return assignment


def wilson(correct: int, n: int, *, level: float = 0.95) -> tuple[float, float]:
    """Wilson's score interval of a proportion: for a single split, leave-one-out, or pooled folds.

    Wilson 1927, J. Am. Stat. Assoc. 22:209.
    """
    if not 0 <= correct <= n or n < 1:
        raise ValueError(f"expected 0 <= correct <= n and n > 0, got {correct} of {n}.")
    z = norm.ppf(0.5 + level / 2)
    centre = (correct + z**2 / 2) / (n + z**2)
    half = z / (n + z**2) * math.sqrt(correct * (n - correct) / n + z**2 / 4)
    share = correct / n  # rounding must not put it, or 0 and 1, outside
    return float(np.clip(centre - half, 0, share)), float(np.clip(centre + half, share, 1))


def corrected_t(
    scores: np.ndarray, *, folds: int, level: float = 0.95
) -> tuple[float, float, float]:
    """Mean of the scores of k folds, once or repeated, and its corrected resampled-t interval.

    Folds share training subjects, so their scores' variance is inflated by n_test / n_train.
    Nadeau and Bengio 2003, Machine Learning 52:239.

    Parameters
    ----------
    scores : (J,), one a fold and repetition.
    folds : k, so that n_test / n_train is 1 / (k - 1).

    Returns
    -------
    mean, lower and upper limit.
    """
    scores = np.asarray(scores, float)
    if len(scores) < 2 or folds < 2:
        raise ValueError(
            f"expected at least two scores and at least two folds, got {len(scores)} and {folds}."
        )
    error = math.sqrt((1 / len(scores) + 1 / (folds - 1)) * scores.var(ddof=1))
    half = float(t.ppf(0.5 + level / 2, len(scores) - 1)) * error
    mean = float(scores.mean())
    return mean, mean - half, mean + half
