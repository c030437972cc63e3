"""Folds, and scores with intervals that a referee would accept.

One protocol for every classifier: `folds` assigns, the classifier gives each held-out subject a
decision, positive for man, `score`, `paired` and `permutation_test` judge it.
"""

import math
from collections.abc import Callable

import numpy as np
import pandas as pd
from scipy.stats import binomtest, norm, t
from sklearn.metrics import balanced_accuracy_score, roc_auc_score
from sklearn.model_selection import StratifiedGroupKFold, StratifiedKFold
from tqdm.auto import tqdm

Z = norm.ppf(0.975)


def folds(
    sex: np.ndarray, *, groups: np.ndarray | None = None, folds: int = 10, seed: int = 0
) -> np.ndarray:
    """The fold in which each subject is tested, 0 to `folds` - 1, (N,) int64.

    Stratified by sex; where groups (families) are known, none of them spans two folds. A ValueError
    where there are too few for that.
    """
    sex = np.asarray(sex)
    unit, fewest = "subjects of either sex", min(np.bincount(sex, minlength=2))
    if groups is not None and len(np.unique(groups)) <= fewest:
        unit, fewest = "families", len(np.unique(groups))
    if not 2 <= folds <= fewest:
        raise ValueError(f"expected 2 to {fewest} folds (there are {fewest} {unit}), got {folds}.")
    kind = StratifiedKFold if groups is None else StratifiedGroupKFold
    splits = kind(folds, shuffle=True, random_state=seed).split(sex, sex, groups)
    assignment = np.empty(len(sex), np.int64)
    for fold, (_, test) in enumerate(splits):
        assignment[test] = fold
        if len(set(sex[test])) < 2:
            raise ValueError(f"fold {fold} of {folds} holds one sex only: take fewer folds.")
    return assignment


def wilson(correct: int, n: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a proportion: for a single split, leave-one-out, or pooled folds.

    Wilson 1927, J. Am. Stat. Assoc. 22:209.
    """
    if not 0 <= correct <= n or n < 1:
        raise ValueError(f"expected 0 <= correct <= n and n > 0, got {correct} of {n}.")
    centre = (correct + Z**2 / 2) / (n + Z**2)
    half = Z / (n + Z**2) * math.sqrt(correct * (n - correct) / n + Z**2 / 4)
    share = correct / n  # rounding must not put it, or 0 and 1, outside
    return float(np.clip(centre - half, 0, share)), float(np.clip(centre + half, share, 1))


def corrected_t(scores: np.ndarray, *, folds: int) -> tuple[float, float, float]:
    """Mean of k folds' scores (J,), repeated or not, and limits of its 95 % resampled-t interval.

    Folds share training subjects, so their scores' variance is inflated by n_test / n_train, which
    is 1 / (k - 1): Nadeau and Bengio 2003, Machine Learning 52:239.
    """
    scores = np.asarray(scores, float)
    if len(scores) < 2 or folds < 2:
        raise ValueError(
            f"expected at least two scores and at least two folds, got {len(scores)} and {folds}."
        )
    error = math.sqrt((1 / len(scores) + 1 / (folds - 1)) * scores.var(ddof=1))
    half = float(t.ppf(0.975, len(scores) - 1)) * error
    mean = float(scores.mean())
    return mean, mean - half, mean + half


def score(sex: np.ndarray, decision: np.ndarray, assignment: np.ndarray) -> dict:
    """Accuracy, balanced accuracy and area under the ROC curve, with 95 % intervals.

    Parameters
    ----------
    decision : (N,), or (R, N) of R repetitions; above 0 for man. Not finite: not tested.
    assignment : the same shape: the fold in which each subject was tested.

    Returns
    -------
    accuracy, balanced_accuracy, auc (means over folds; where a fold is one subject, or there is
    one fold, of all subjects together), low and high (of the accuracy), interval (its name),
    auc_low and auc_high (in the same way, or after Hanley and McNeil 1982, Radiology 143:29) and n
    (subjects tested).
    """
    sex, decision = np.asarray(sex), np.atleast_2d(decision)
    parts, count, pooled = _tested(sex, np.isfinite(decision), assignment)
    tested = [(sex[at], decision[r, at]) for r, at in parts]
    if pooled:
        tested = [tuple(map(np.concatenate, zip(*tested)))]
    accuracy = np.array([np.mean((values > 0) == labels) for labels, values in tested])
    balanced = [balanced_accuracy_score(labels, values > 0) for labels, values in tested]
    auc = [roc_auc_score(*each) if len(set(each[0])) == 2 else np.nan for each in tested]
    anybody = np.isfinite(decision).any(0)
    n = int(anybody.sum())
    if pooled:
        mean = float(accuracy[0])
        low, high = wilson(round(mean * n), n)
        half = _hanley(auc[0], sex[anybody])
        auc_low, auc_high = auc[0] - half, auc[0] + half
    else:
        mean, low, high = corrected_t(accuracy, folds=count)
        _, auc_low, auc_high = corrected_t(auc, folds=count)
    return {
        "accuracy": mean,
        "low": max(low, 0.0),
        "high": min(high, 1.0),
        "interval": "Wilson" if pooled else "corrected resampled t",
        "balanced_accuracy": float(np.mean(balanced)),
        "auc": float(np.mean(auc)),
        "auc_low": max(float(auc_low), 0.0),
        "auc_high": min(float(auc_high), 1.0),
        "n": n,
    }


def _hanley(auc: float, sex: np.ndarray) -> float:
    """Half of the 95 % interval of one sample's AUC."""
    women, men = np.bincount(sex, minlength=2)
    above, below = auc / (2 - auc), 2 * auc**2 / (1 + auc)
    variance = auc * (1 - auc) + (men - 1) * (above - auc**2) + (women - 1) * (below - auc**2)
    return float(Z * math.sqrt(variance / (women * men)))


def _tested(sex, tested, assignment):
    """Repetition and rows of every fold tested; how many folds there are; whether to pool them."""
    assignment = np.atleast_2d(assignment)
    if not tested.shape == assignment.shape == (len(assignment), len(sex)):
        found = f"of {len(sex)} subjects, found {tested.shape} and {assignment.shape}"
        raise ValueError(f"expected decisions and folds of one shape, {found}.")
    parts = [
        (r, np.flatnonzero((folds == fold) & tested[r]))
        for r, folds in enumerate(assignment)
        for fold in np.unique(folds[tested[r]])
    ]
    if not parts:
        raise ValueError("expected decisions, found none that is finite.")
    pooled = len(parts) == 1 or max(len(rows) for _, rows in parts) == 1
    return parts, len(np.unique(assignment[0][assignment[0] >= 0])), pooled


def paired(
    sex: np.ndarray, first: np.ndarray, second: np.ndarray, assignment: np.ndarray
) -> dict[str, float]:
    """Accuracy of the first classifier less that of the second, over the same folds.

    The corrected resampled t test (Nadeau and Bengio 2003); where a fold is one subject or there
    is one fold, McNemar's exact test with the interval of Agresti and Min 2005, Stat. Med. 24:729.
    Parameters as in `score`.

    Returns
    -------
    difference, its 95 % limits low and high, and p, two-sided.
    """
    sex = np.asarray(sex)
    first, second = np.atleast_2d(first), np.atleast_2d(second)
    parts, count, pooled = _tested(sex, np.isfinite(first) & np.isfinite(second), assignment)
    right = [(decision > 0) == sex for decision in (first, second)]
    gains = [right[0][r, at].astype(int) - right[1][r, at] for r, at in parts]
    if pooled:
        gain = np.concatenate(gains)
        better, worse, n = int((gain > 0).sum()), int((gain < 0).sum()), len(gain) + 2
        p = binomtest(better, better + worse).pvalue if better + worse else 1.0
        middle = (better - worse) / n
        half = Z / n * math.sqrt(better + worse + 1 - (better - worse) ** 2 / n)
        mean, low, high = float(gain.mean()), max(middle - half, -1), min(middle + half, 1)
    else:
        scores = [gain.mean() for gain in gains]
        mean, low, high = corrected_t(scores, folds=count)
        error = (high - mean) / t.ppf(0.975, len(scores) - 1)
        p = 2 * t.sf(abs(mean) / error, len(scores) - 1) if error else mean == 0
    return {"difference": mean, "low": float(low), "high": float(high), "p": float(p)}


def shuffled(
    sex: np.ndarray, rng: np.random.Generator, groups: np.ndarray | None = None
) -> np.ndarray:
    """Labels in random order; with groups, families of one size change places as a whole.

    Within a family labels depend on each other, identical twins' most of all, so families are
    exchanged and not persons: Winkler et al. 2015, NeuroImage 123:253. The labels that come to a
    family are given to its members in random order, who is whose twin being unknown here.
    """
    sex = np.asarray(sex)
    if groups is None:
        return rng.permutation(sex)
    if pd.isna(groups).any():
        raise ValueError(f"expected a family of everybody, {pd.isna(groups).sum()} are blank.")
    found = np.empty_like(sex)
    blocks: dict[int, list[np.ndarray]] = {}
    for rows in pd.Series(sex).groupby(np.asarray(groups)).indices.values():
        blocks.setdefault(len(rows), []).append(rows)
    for rows in map(np.array, blocks.values()):  # (families, members)
        found[rows] = rng.permuted(sex[rng.permutation(rows)], axis=1)
    return found


def permutation_test(
    statistic: Callable, sex: np.ndarray, *, groups=None, permutations: int = 100, seed: int = 0
) -> tuple[float, np.ndarray, float]:
    """Whether a whole procedure's score, of labels (N,), is higher than on `shuffled` labels.

    Returns
    -------
    observed, null (permutations,), and p = (1 + #{null >= observed}) / (1 + permutations):
    Phipson and Smyth 2010, Stat. Appl. Genet. Mol. Biol. 9:39.
    """
    rng = np.random.default_rng(seed)
    observed = statistic(np.asarray(sex))
    labels = (shuffled(sex, rng, groups) for _ in range(permutations))
    bar = tqdm(labels, "permutations", total=permutations, unit="permutation")
    null = np.array([statistic(each) for each in bar])
    return observed, null, float((1 + (~(null < observed)).sum()) / (1 + permutations))
