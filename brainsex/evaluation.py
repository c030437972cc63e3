"""Folds, and scores with intervals that a referee would accept.

One protocol for every classifier: `folds` assigns, the classifier gives each held-out subject a
decision, above 0 for man; `score` and `paired_test` judge the decisions.
"""

import math
from collections.abc import Mapping

import numpy as np
import pandas as pd
from scipy.stats import binomtest, bootstrap, norm, t
from sklearn.metrics import balanced_accuracy_score, roc_auc_score
from sklearn.model_selection import StratifiedGroupKFold, StratifiedKFold

BOOTSTRAP_DRAWS = 2000


def folds(
    sex: np.ndarray, *, groups: np.ndarray | None = None, folds: int = 10, seed: int = 0
) -> np.ndarray:
    """Assign each subject to the fold in which it is tested, (N,) int64 from 0 to `folds` - 1.

    Folds are stratified by sex, and no family in `groups` (N,) spans two. Raises ValueError if
    there are too few subjects of a sex, or families, for that.
    """
    sex = np.asarray(sex)
    if groups is not None and (count := len(set(groups))) < folds:
        raise ValueError(f"expected {folds} families or more, found {count}: check Family_ID.")
    splitter = StratifiedKFold if groups is None else StratifiedGroupKFold
    splits = splitter(folds, shuffle=True, random_state=seed).split(sex, sex, groups)
    assignment = np.empty(len(sex), np.int64)
    for fold, (_, test) in enumerate(splits):
        assignment[test] = fold
        if len(set(sex[test])) < 2:
            raise ValueError(f"fold {fold} of {folds} does not hold both sexes: take fewer folds.")
    return assignment


def wilson_interval(correct: int, n: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a proportion: for a single split, leave-one-out, or pooled folds.

    Wilson 1927, J. Am. Stat. Assoc. 22:209. Raises ValueError unless 0 <= correct <= n and n > 0.
    """
    interval = binomtest(correct, n).proportion_ci(0.95, method="wilson")
    return float(interval.low), float(interval.high)


def _corrected_t_interval(scores: np.ndarray, *, folds: int) -> tuple[float, float, float]:
    """Return the mean of folds' scores (J,), repeated or not, and its 95 % resampled-t interval.

    Folds share training subjects, so their scores' variance is inflated by n_test / n_train, which
    is 1 / (folds - 1): Nadeau and Bengio 2003, Machine Learning 52:239.
    """
    scores = np.asarray(scores, float)
    if len(scores) < 2 or folds < 2:
        raise ValueError(f"expected two scores and folds or more, got {len(scores)} and {folds}.")
    error = math.sqrt((1 / len(scores) + 1 / (folds - 1)) * scores.var(ddof=1))
    mean, half = float(scores.mean()), float(t.ppf(0.975, len(scores) - 1)) * error
    return mean, mean - half, mean + half


def bootstrap_interval(values: np.ndarray) -> tuple[float, float, float]:
    """Return the mean over subjects (N,) and its 95 % percentile bootstrap interval (Efron 1979).

    Subjects are drawn, networks are not: the interval says how another sample of subjects would
    come out. Of one subject it is NaN.
    """
    low = high = math.nan
    if len(values) > 1:
        options = {"n_resamples": BOOTSTRAP_DRAWS, "method": "percentile", "rng": 0}
        low, high = bootstrap((values,), np.mean, **options).confidence_interval
    return float(np.mean(values)), float(low), float(high)


def score(sex: np.ndarray, decisions: np.ndarray, assignment: np.ndarray) -> dict:
    """Accuracy, balanced accuracy and area under the ROC curve, with 95 % intervals.

    Parameters
    ----------
    decisions : (N,), or (R, N) of R repetitions; above 0 for man. Not finite: not tested.
    assignment : the same shape: the fold in which each subject was tested; below 0: not tested.

    Returns
    -------
    accuracy, balanced_accuracy, auc (means over folds; of all subjects if there is one fold, or
    each is one subject), low and high (of the accuracy), interval (its name), auc_low and auc_high
    (likewise, or by Hanley and McNeil 1982, Radiology 143:29) and n (subjects tested).
    """
    samples, tested, count = _split_folds(sex, assignment, decisions)
    accuracy = [np.mean((values > 0) == truth) for truth, values in samples]
    balanced = [balanced_accuracy_score(truth, values > 0) for truth, values in samples]
    auc = [roc_auc_score(*sample) if len(set(sample[0])) == 2 else np.nan for sample in samples]
    if len(samples) == 1:
        low, high = wilson_interval(round(accuracy[0] * len(tested)), len(tested))
        area, (women, men) = auc[0], np.bincount(tested, minlength=2)
        above, below = area / (2 - area) - area**2, 2 * area**2 / (1 + area) - area**2
        variance = area * (1 - area) + (men - 1) * above + (women - 1) * below
        half = float(norm.ppf(0.975) * math.sqrt(variance / (women * men)))
        auc_low, auc_high = area - half, area + half
    else:
        _, low, high = _corrected_t_interval(accuracy, folds=count)
        _, auc_low, auc_high = _corrected_t_interval(auc, folds=count)
    return {
        "accuracy": float(np.mean(accuracy)),
        "low": max(low, 0.0),
        "high": min(high, 1.0),
        "interval": "Wilson" if len(samples) == 1 else "corrected resampled t",
        "balanced_accuracy": float(np.mean(balanced)),
        "auc": float(np.mean(auc)),
        "auc_low": max(float(auc_low), 0.0),
        "auc_high": min(float(auc_high), 1.0),
        "n": len(tested),
    }


def score_table(
    sex: np.ndarray, decisions: Mapping[str, np.ndarray], assignment: np.ndarray
) -> pd.DataFrame:
    """Tabulate `score` of each classifier's decisions, one row each, under ``classifier``."""
    scores = {name: score(sex, values, assignment) for name, values in decisions.items()}
    return pd.DataFrame.from_dict(scores, orient="index").rename_axis("classifier").reset_index()


def _split_folds(
    sex: np.ndarray, assignment: np.ndarray, *decisions: np.ndarray
) -> tuple[list[tuple[np.ndarray, ...]], np.ndarray, int]:
    """Return (sex, decisions, …) of every fold, or of all where a fold is one subject.

    Also returns the sex of each subject that was tested, and the number of folds.
    """
    assignment, *decisions = np.stack(np.atleast_2d(assignment, *decisions))
    tested = np.isfinite(decisions).all(0) & (assignment >= 0)
    if not tested.any():
        raise ValueError("expected decisions, found none that is finite.")
    folds = assignment + (assignment.max() + 1) * np.arange(len(assignment))[:, None]
    masks = [tested & (folds == fold) for fold in np.unique(folds[tested])]
    masks = masks if max(map(np.sum, masks)) > 1 else [tested]
    labels = np.broadcast_to(sex, tested.shape)
    samples = [tuple(values[mask] for values in (labels, *decisions)) for mask in masks]
    return samples, labels[0][tested.any(0)], len(np.unique(assignment[0][assignment[0] >= 0]))


def paired_test(
    sex: np.ndarray,
    first: np.ndarray,
    second: np.ndarray,
    assignment: np.ndarray,
    *,
    auc: bool = False,
) -> dict[str, float]:
    """Compare two classifiers over the same folds: the accuracy, or AUC, of first less second.

    The corrected resampled t test (Nadeau and Bengio 2003), of two folds at least. Takes what
    `score` does; returns the difference, its 95 % limits low and high, and a two-sided p.
    """
    samples, _, count = _split_folds(sex, assignment, first, second)
    measure = roc_auc_score if auc else lambda truth, values: np.mean((values > 0) == truth)
    gains = [measure(truth, one) - measure(truth, other) for truth, one, other in samples]
    mean, low, high = _corrected_t_interval(gains, folds=count)
    error = (high - mean) / t.ppf(0.975, len(gains) - 1)
    p = 2 * t.sf(abs(mean) / error, len(gains) - 1) if error else mean == 0
    return {"difference": float(mean), "low": float(low), "high": float(high), "p": float(p)}


def permuted_labels(
    sex: np.ndarray, rng: np.random.Generator, groups: np.ndarray | None = None
) -> np.ndarray:
    """Put labels (N,) in random order; with groups, exchange whole families of equal size.

    Within a family labels depend on each other, identical twins' most of all: Winkler et al. 2015,
    NeuroImage 123:253. A family's new labels go to its members in random order. Nobody's family
    may be blank: `tables.fill_missing_families` fills them in.
    """
    groups = np.arange(len(sex)) if groups is None else np.asarray(groups)
    sex, labels = np.asarray(sex), np.empty_like(sex)
    families = [np.flatnonzero(groups == family) for family in np.unique(groups)]
    for size in dict.fromkeys(map(len, families)):  # rows are (families, members)
        rows = np.array([members for members in families if len(members) == size])
        labels[rows] = rng.permuted(sex[rng.permutation(rows)], axis=1)
    return labels
