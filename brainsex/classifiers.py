"""The study's classifiers on flat features, and how each meets a subject it has not seen.

Pipelines of scikit-learn: imputing, scaling and the choice of k or C happen inside the training
folds.
"""

from collections.abc import Callable

import joblib
import numpy as np
import pandas as pd
from sklearn.base import BaseEstimator, clone
from sklearn.impute import SimpleImputer
from sklearn.linear_model import LogisticRegression, LogisticRegressionCV
from sklearn.metrics import roc_auc_score
from sklearn.metrics.pairwise import rbf_kernel
from sklearn.model_selection import GridSearchCV
from sklearn.neighbors import KNeighborsClassifier, NearestNeighbors
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.svm import SVC
from tqdm.auto import tqdm
from xgboost import XGBClassifier

from brainsex.cohort import Cohort
from brainsex.confounds import Residuals
from brainsex.nifti import BRAIN_FA

NEIGHBOURS = (1, 3, 5, 9, 15, 25, 39, 59, 99)
"""The k among which the inner folds choose."""
STRONGEST, REPEATS = 50, 5
"""Features that `importances` permutes, and how often in each fold."""


def _standardised(classifier: BaseEstimator) -> Pipeline:
    """Columns get the training folds' mean 0 and variance 1, blanks their mean."""
    blanks = SimpleImputer(strategy="constant", fill_value=0, keep_empty_features=True)
    return make_pipeline(StandardScaler(), blanks, classifier)


def boosted_trees(**settings) -> XGBClassifier:
    """XGBoost with the study's rate of 0.5; blanks are its own business."""
    return XGBClassifier(**{"learning_rate": 0.5, "n_jobs": 1, "random_state": 0} | settings)


def neighbours(k: int) -> Pipeline:
    """The k nearest neighbours, on standardised features."""
    return _standardised(KNeighborsClassifier(k))


def chosen_inside() -> dict[str, BaseEstimator]:
    """The four classifiers, their settings chosen by five inner folds, which may part relatives."""
    nearest = GridSearchCV(KNeighborsClassifier(), {"n_neighbors": NEIGHBOURS})
    vectors = GridSearchCV(SVC(), {"C": (0.1, 1.0, 10.0)})
    options = {"scoring": "accuracy", "max_iter": 1000, "use_legacy_attributes": False}
    logistic = LogisticRegressionCV(Cs=np.logspace(-4, 0, 5), l1_ratios=(0,), **options)
    return {
        "XGBoost": boosted_trees(),
        "KNN": _standardised(nearest),
        "logistic regression": _standardised(logistic),
        "SVM": _standardised(vectors),
    }


def as_published() -> dict[str, BaseEstimator]:
    """Those with the study's settings, but for KNN, whose k it sweeps: `neighbour_sweep`."""
    return {
        "XGBoost": boosted_trees(),
        "logistic regression": _standardised(LogisticRegression(max_iter=1000)),
        "SVM": _standardised(SVC()),
    }


def over_folds(
    one: Callable[..., np.ndarray],
    assignment: np.ndarray,
    *arguments,
    name: str | None = None,
) -> np.ndarray:
    """Decisions (…, N) gathered from folds worked on at once, each in a process of its own.

    Parameters
    ----------
    one : takes rows of training and test, each (N,) bool, and the arguments; returns decisions
        (…, n) of the tested.
    assignment : (N,) the fold in which each subject is tested; below 0, in none: NaN.
    name : shown beside the progress; without it there is none.
    """
    tested = [fold for fold in np.unique(assignment) if fold >= 0]
    found = joblib.Parallel(-1, return_as="generator")(
        joblib.delayed(one)(assignment != fold, assignment == fold, *arguments) for fold in tested
    )
    found = list(tqdm(found, name, total=len(tested), unit="fold", disable=name is None))
    decision = np.full((*found[0].shape[:-1], len(assignment)), np.nan)
    for fold, values in zip(tested, found):
        decision[..., assignment == fold] = values
    return decision


def cross_predict(
    classifier: BaseEstimator,
    features: np.ndarray,
    sex: np.ndarray,
    assignment: np.ndarray,
    *,
    confounds: np.ndarray | None = None,
    name: str | None = None,
) -> np.ndarray:
    """Decisions (N,) on held-out subjects, above 0 for man: a margin, log-odds, or a probability.

    All that is learnt comes from the training folds. Features (N, P) are NaN where blank, and the
    training folds' mean if confounds (N, K) are to be regressed out of them. `assignment` and
    `name` as of `over_folds`.
    """
    data = (np.asarray(features, float), np.asarray(sex), classifier, confounds)
    return over_folds(_predict, assignment, *data, name=name)


def _predict(train, test, values, sex, classifier, confounds) -> np.ndarray:
    if confounds is not None:
        whole = SimpleImputer(keep_empty_features=True).fit(values[train]).transform(values)
        values = Residuals(whole, confounds, np.flatnonzero(train))[:]
        # a confound among the features leaves its rounding, which a tree could read
        values[:, values[train].std(0) < 1e-6 * whole[train].std(0)] = 0
    return _decide(clone(classifier).fit(values[train], sex[train]), values[test])


def _decide(fitted: BaseEstimator, features: np.ndarray) -> np.ndarray:
    """A fitted classifier's decision (n,), above 0 for man."""
    if hasattr(fitted, "decision_function"):
        return fitted.decision_function(features)
    return fitted.predict_proba(features)[:, 1] - 0.5


def neighbour_sweep(
    features: np.ndarray, sex: np.ndarray, assignment: np.ndarray, *, largest: int
) -> np.ndarray:
    """Decisions (largest, N) of k nearest neighbours on standardised features, k from 1 on.

    Parameters as in `cross_predict`. One search serves every k.
    """
    data = (np.asarray(features, float), np.asarray(sex), largest)
    return over_folds(_sweep, assignment, *data, name="KNN")


def _sweep(train, test, values, sex, largest) -> np.ndarray:
    scale = _standardised("passthrough").fit(values[train])
    search = NearestNeighbors(n_neighbors=largest).fit(scale.transform(values[train]))
    nearest = search.kneighbors(scale.transform(values[test]), return_distance=False)
    return sex[train][nearest].T.cumsum(0) / np.arange(1, largest + 1)[:, None] - 0.5


def importances(
    classifier: BaseEstimator,
    features: pd.DataFrame,
    sex: np.ndarray,
    assignment: np.ndarray,
    *,
    seed: int = 0,
) -> pd.DataFrame:
    """What a classifier weighs, over folds, and what it loses without.

    One fit's importances of correlated features mislead: another fold weighs a neighbour instead.
    So the spread over folds stands beside the mean, and of the `STRONGEST` the loss of AUC in
    held-out subjects when their values change places: Breiman 2001, Mach. Learn. 45:5. The
    classifier, or its pipeline's last, has ``feature_importances_`` or ``coef_``.

    Returns
    -------
    Sorted: Region_name, Importance (mean over folds; of coefficients, their size), higher_in (the
    sex with the higher mean), permutation (loss of AUC); their SD over folds, …spread.
    """
    values, sex = features.to_numpy(float), np.asarray(sex)
    tested = np.unique(assignment)
    parallel = joblib.Parallel(-1)
    fits = (joblib.delayed(_weigh)(classifier, values, sex, assignment != f) for f in tested)
    fitted, weights = zip(*parallel(fits))
    order = np.argsort(-np.mean(weights, 0), kind="stable")
    losses = parallel(
        joblib.delayed(_lose)(one, values[held_out], sex[held_out], order[:STRONGEST], [seed, fold])
        for fold, one in zip(tested, fitted)
        for held_out in [assignment == fold]
    )
    higher = np.nanmean(values[sex == 1], 0) > np.nanmean(values[sex == 0], 0)
    columns = {"Region_name": features.columns, "Importance": np.mean(weights, 0)}
    columns["spread"] = pd.DataFrame(weights).std().to_numpy()
    columns["higher_in"] = np.where(higher, "men", "women")
    found = pd.DataFrame(columns).iloc[order].reset_index(drop=True)
    found["permutation"] = pd.Series(np.mean(losses, 0))
    found["permutation_spread"] = pd.DataFrame(losses).std()
    return found


def _weigh(classifier, values, sex, train) -> tuple[BaseEstimator, np.ndarray]:
    """A classifier fitted, and the weights (P,) of its features."""
    fitted = clone(classifier).fit(values[train], sex[train])
    last = fitted[-1] if isinstance(fitted, Pipeline) else fitted
    weights = last.coef_ if hasattr(last, "coef_") else last.feature_importances_
    return fitted, np.abs(np.ravel(weights))


def _lose(fitted, values, sex, columns, seed) -> list[float]:
    """Loss of AUC when a column's values change places, for each of some columns."""
    rng, losses = np.random.default_rng(seed), []
    whole = roc_auc_score(sex, _decide(fitted, values))
    for column in columns:
        changed = np.tile(values, (REPEATS, 1, 1))
        changed[..., column] = rng.permuted(changed[..., column], axis=1)
        found = _decide(fitted, changed.reshape(-1, values.shape[1])).reshape(REPEATS, -1)
        losses.append(whole - np.mean([roc_auc_score(sex, each) for each in found]))
    return losses


def voxel_svm(
    cohort: Cohort, assignment: np.ndarray, *, confounds: np.ndarray | None = None
) -> np.ndarray:
    """Decisions (N,) of the study's support vector machine (RBF) on standardised voxels.

    Brain mask (mean FA above 0.02), scaling and regression come from the training folds alone. The
    voxels within the brain must fit into memory, several times over.
    """
    decision = np.full(len(cohort), np.nan)
    for fold in tqdm(np.unique(assignment), desc="voxel SVM", unit="fold"):
        train, test = (np.flatnonzero(rows) for rows in (assignment != fold, assignment == fold))
        brain = sum(cohort.volumes[row] / len(train) for row in train) > BRAIN_FA
        values = cohort.volumes
        if confounds is not None:
            values = Residuals(values, confounds, train)
        voxels = [np.stack([values[row][brain] for row in rows]) for rows in (train, test)]
        scaler = StandardScaler(copy=False).fit(voxels[0])
        seen, new = (scaler.transform(each) for each in voxels)
        gamma = 1 / (seen.shape[1] * seen.var())  # SVC's own; but a matrix product a kernel
        fitted = SVC(kernel="precomputed").fit(rbf_kernel(seen, seen, gamma), cohort.sex[train])
        decision[test] = fitted.decision_function(rbf_kernel(new, seen, gamma))
    return decision
