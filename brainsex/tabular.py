"""Morphometry tables, FreeSurfer's or any other, and the study's classifiers on their features.

Imputing, scaling and the choice of k or C happen inside the training folds.
"""

import itertools
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import joblib
import numpy as np
import pandas as pd
from sklearn.base import BaseEstimator
from sklearn.impute import SimpleImputer
from sklearn.inspection import permutation_importance
from sklearn.linear_model import LogisticRegression, LogisticRegressionCV
from sklearn.metrics import get_scorer
from sklearn.metrics.pairwise import rbf_kernel
from sklearn.model_selection import GridSearchCV, PredefinedSplit, cross_val_predict, cross_validate
from sklearn.neighbors import KNeighborsClassifier, NearestNeighbors
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.svm import SVC
from xgboost import XGBClassifier

from brainsex import evaluation, tables
from brainsex.cohort import Cohort, cohort_name
from brainsex.confounds import ConfoundRegressor, RegressedVolumes

INTRACRANIAL = "FS_IntraCranial_Vol"  # mm³; an export spells it FS_InterCranial_Vol
NEIGHBOURS = (1, 3, 5, 9, 15, 25, 39, 59, 99)  # the k among which the inner folds choose
BRAIN_THRESHOLD = 0.02  # mean FA over subjects above which a voxel is brain
STRONGEST, REPEATS = 50, 5  # features that `importances` permutes, and how often in each fold


@dataclass(frozen=True)
class Table:
    """Morphometry of N subjects; ``len()`` is their number."""

    name: str  # the folder's name, with the word synthetic where the cohort is
    features: pd.DataFrame  # (N, P) numbers, NaN where blank
    sex: np.ndarray  # (N,) int64, women 0, men 1
    subjects: np.ndarray  # (N,) str
    groups: np.ndarray | None  # (N,) str, families of the restricted table beside this one
    release: np.ndarray | None  # (N,) str, HCP's Release, which is no feature
    notes: dict[str, tuple[str, ...]]  # what was dropped or changed: columns, by reason

    def __len__(self) -> int:
        return len(self.sex)


def load_table(csv: str | Path, *, subject: str = "Subject", sex: str = "Gender") -> Table:
    """Load a morphometry table: HCP's FreeSurfer CSV as exported, or any other.

    Columns of text, or blank or the same for everybody, and subjects without a sex or measure are
    dropped; this is printed and kept in ``notes``. Infinite values become blanks. HCP's, BIDS's and
    UK Biobank's columns of IDs and sex need not be named. Sexes are M and F, male and female, 0 and
    1 (men), or 1 (men) and 2. Raises FileNotFoundError, or ValueError for a missing column, an
    unknown code of sex, a repeated subject, text among a column's numbers, or one sex only.
    """
    csv = Path(csv)
    rows = tables.read_text_table(csv).dropna(how="all")  # the index still counts lines
    subject, sex = (tables.find_column(csv, rows, name) for name in (subject, sex))
    labels = tables.read_sex(rows[sex])
    unknown = labels.isna() & (rows[sex].str.strip().fillna("") != "")
    _refuse(csv, rows[sex], unknown, "M, F or words, or 0 and 1 (men), or 1 (men) and 2")
    synonyms = (*tables.SYNONYMS, *itertools.chain(*tables.SYNONYMS.values()), "Release")
    no_features = {name.lower() for name in (subject, sex, *synonyms)}
    names = rows.columns.str.replace(r" \(\d+\)$", "", regex=True)  # of repeated columns
    cells = rows.loc[:, ~names.str.lower().isin(no_features)]
    values = cells.apply(pd.to_numeric, errors="coerce").astype(float)
    text = values.isna().all() & cells.notna().any()
    for name in values.columns[~text]:
        _refuse(csv, cells[name], cells[name].notna() & values[name].isna(), "a number")
    values = values.replace([np.inf, -np.inf], np.nan)[labels.notna()]
    constant = ~text & (values.nunique() < 2)
    features = values.loc[:, ~text & ~constant]
    if features.empty:
        raise ValueError(f"{csv}: no column of numbers beside {subject} and {sex}.")
    features = features.dropna(how="all")
    left_out = rows.index.difference(features.index)
    rows, labels = rows.loc[features.index], labels[features.index].astype(np.int64)
    if labels.nunique() < 2:
        raise ValueError(f"{csv}: expected both sexes in {sex}, found {set(labels)}.")
    notes = {
        "second of a name": [name for name in features if name.endswith(" (2)")],
        "text, dropped": cells.columns[text],
        "blank or the same for everybody, dropped": cells.columns[constant],
        "lines without a sex or measure, left out": (left_out + 2).astype(str),
    }
    if INTRACRANIAL not in features:
        features = features.rename(columns={"FS_InterCranial_Vol": INTRACRANIAL})
    subjects = tables.check_subject_ids(csv, rows[subject])
    table = Table(
        name=cohort_name(csv.parent)[0],
        features=features.reset_index(drop=True),
        sex=labels.to_numpy(),
        subjects=subjects,
        groups=tables.read_families(csv.parent, subjects),
        release=rows["Release"].fillna("").to_numpy(str) if "Release" in rows else None,
        notes={note: tuple(names) for note, names in notes.items() if len(names)},
    )
    print(f"{csv.name}: {len(table)} subjects, {features.shape[1]} features")
    for note, names in table.notes.items():
        print(f"  {note}: {', '.join(names[:3])}{', …' * (len(names) > 3)} ({len(names)})")
    return table


load = load_table


def _refuse(csv: Path, column: pd.Series, bad: pd.Series, expected: str) -> None:
    """Raise ValueError naming the first bad cell, if there is one."""
    if bad.any():
        row = bad.idxmax()
        where = f"{csv}: column {column.name}, line {row + 2}"
        raise ValueError(f"{where}: expected {expected}, found {column[row]!r}.")


def subset_table(table: Table, rows: np.ndarray) -> Table:
    """Return the subjects of a table at `rows` (indices)."""
    arrays = {name: getattr(table, name) for name in ("sex", "subjects", "groups", "release")}
    arrays = {name: None if array is None else array[rows] for name, array in arrays.items()}
    return replace(table, features=table.features.iloc[rows].reset_index(drop=True), **arrays)


def _standardised(classifier: BaseEstimator | str) -> Pipeline:
    """Scale columns to mean 0 and variance 1 of the training folds; blanks become their mean."""
    blanks = SimpleImputer(strategy="constant", fill_value=0, keep_empty_features=True)
    return make_pipeline(StandardScaler(), blanks, classifier)


def boosted_trees(**settings: object) -> XGBClassifier:
    """XGBoost with the study's learning rate of 0.5; it handles missing values natively."""
    return XGBClassifier(**{"learning_rate": 0.5, "n_jobs": 1, "random_state": 0} | settings)


def nearest_neighbours(k: int) -> Pipeline:
    """The k nearest neighbours on standardised features."""
    return _standardised(KNeighborsClassifier(k))


def nested_cv_classifiers() -> dict[str, BaseEstimator]:
    """The four classifiers, their settings chosen by five inner folds, which may part relatives."""
    options = {"scoring": "accuracy", "max_iter": 1000, "use_legacy_attributes": False}
    logistic = LogisticRegressionCV(Cs=np.logspace(-4, 0, 5), l1_ratios=(0,), **options)
    return {
        "XGBoost": boosted_trees(),
        "KNN": _standardised(GridSearchCV(KNeighborsClassifier(), {"n_neighbors": NEIGHBOURS})),
        "logistic regression": _standardised(logistic),
        "SVM": _standardised(GridSearchCV(SVC(), {"C": (0.1, 1.0, 10.0)})),
    }


def published_classifiers() -> dict[str, BaseEstimator]:
    """Classifiers with the study's settings, except KNN, whose k it sweeps: `neighbour_sweep`."""
    return {
        "XGBoost": boosted_trees(),
        "logistic regression": _standardised(LogisticRegression(max_iter=1000)),
        "SVM": _standardised(SVC()),
    }


def cross_val_decisions(
    classifier: BaseEstimator,
    features: np.ndarray | pd.DataFrame,
    sex: np.ndarray,
    assignment: np.ndarray,
    *,
    confounds: np.ndarray | None = None,
) -> np.ndarray:
    """Decide on each held-out subject, (N,), above 0 for man: a margin, or a probability less 0.5.

    Features are (N, P), NaN where blank; `assignment` (N,) is the fold in which each subject is
    tested. Confounds (N, K) are regressed out of the features with coefficients of the training
    folds, whose mean blanks then become.
    """
    values = np.asarray(features, float)
    if confounds is not None:
        values = np.hstack([confounds, values])
        blanks = SimpleImputer(keep_empty_features=True)
        classifier = make_pipeline(blanks, ConfoundRegressor(confounds.shape[1]), classifier)
    margin = hasattr(classifier, "decision_function")
    method = "decision_function" if margin else "predict_proba"
    split = PredefinedSplit(assignment)
    decisions = cross_val_predict(classifier, values, sex, cv=split, method=method, n_jobs=-1)
    return (decisions if margin else decisions[:, 1] - 0.5).astype(float)


def table_decisions(
    table: Table,
    assignment: np.ndarray,
    *,
    classifiers: Mapping[str, BaseEstimator] | None = None,
    confounds: np.ndarray | None = None,
) -> dict[str, np.ndarray]:
    """Return each classifier's `cross_val_decisions`, of the shape of the assignment.

    The assignment is (N,) or (R, N); `classifiers` by name default to `nested_cv_classifiers`.
    """
    decisions = {}
    for name, classifier in (classifiers or nested_cv_classifiers()).items():
        repetitions = [
            cross_val_decisions(classifier, table.features, table.sex, folds, confounds=confounds)
            for folds in np.atleast_2d(assignment)
        ]
        decisions[name] = np.reshape(repetitions, np.shape(assignment))
    return decisions


def compare(table: Table, *, folds: int = 10, seed: int = 0, **options: object) -> pd.DataFrame:
    """Score `table_decisions` (its options) on the same folds, which keep families together."""
    assignment = evaluation.folds(table.sex, groups=table.groups, folds=folds, seed=seed)
    decisions = table_decisions(table, assignment, **options)
    return evaluation.score_table(table.sex, decisions, assignment)


def neighbour_sweep(
    features: np.ndarray | pd.DataFrame, sex: np.ndarray, assignment: np.ndarray, *, largest: int
) -> np.ndarray:
    """Return decisions (largest, N) of the k nearest neighbours, k from 1 on; one search for all.

    Features are standardised; parameters as in `cross_val_decisions`.
    """
    values, decisions = np.asarray(features, float), np.full((largest, len(sex)), np.nan)
    splits = list(PredefinedSplit(assignment).split())
    sweep = joblib.delayed(_sweep_fold)
    votes = joblib.Parallel(-1)(sweep(values, sex, *split, largest) for split in splits)
    for (_, test), vote in zip(splits, votes):
        decisions[:, test] = vote
    return decisions


def _sweep_fold(
    values: np.ndarray, sex: np.ndarray, train: np.ndarray, test: np.ndarray, largest: int
) -> np.ndarray:
    """Share of men less 0.5 among the 1 to `largest` nearest neighbours of each test subject."""
    scale = _standardised("passthrough")
    search = NearestNeighbors(n_neighbors=largest).fit(scale.fit_transform(values[train]))
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
    """Return what a classifier weighs, over folds, and what it loses without.

    One fit's importances of correlated features mislead: another fold weighs a neighbour instead.
    So the table, sorted by Importance (mean over folds of the importance or of a coefficient's
    size), also has its standard deviation over folds (spread), the sex with the higher mean and, of
    the `STRONGEST`, the loss of AUC in held-out subjects when a feature is permuted (Breiman 2001,
    Mach. Learn. 45:5). Raises AttributeError if the classifier weighs no features.
    """
    values, split = features.to_numpy(float), PredefinedSplit(assignment)
    fits = cross_validate(classifier, values, sex, cv=split, return_estimator=True, n_jobs=-1)
    last = [fit[-1] if isinstance(fit, Pipeline) else fit for fit in fits["estimator"]]
    weights = [fit.coef_[0] if hasattr(fit, "coef_") else fit.feature_importances_ for fit in last]
    weights = np.abs(weights)  # (folds, P)
    order = np.argsort(-weights.mean(0), kind="stable")
    loss = joblib.delayed(_permutation_auc_loss)
    losses = joblib.Parallel(-1)(
        loss(fit, values[test], sex[test], order[:STRONGEST], seed)
        for fit, (_, test) in zip(fits["estimator"], split.split())
    )
    higher = np.nanmean(values[sex == 1], 0) > np.nanmean(values[sex == 0], 0)
    columns = {"Region_name": features.columns, "Importance": weights.mean(0)}
    columns["spread"] = pd.DataFrame(weights).std()
    columns["higher_in"] = np.where(higher, "men", "women")
    table = pd.DataFrame(columns).iloc[order].reset_index(drop=True)
    columns = {"permutation": np.mean(losses, 0), "permutation_spread": np.std(losses, 0, ddof=1)}
    return table.join(pd.DataFrame(columns))


def _permutation_auc_loss(
    fitted: BaseEstimator, values: np.ndarray, sex: np.ndarray, columns: np.ndarray, seed: int
) -> np.ndarray:
    """Mean loss of AUC when each of some columns is permuted; to permute all would take minutes."""

    def auc(fitted: BaseEstimator, permuted: np.ndarray, sex: np.ndarray) -> float:
        whole = values.copy()
        whole[:, columns] = permuted
        return get_scorer("roc_auc")(fitted, whole, sex)

    options = {"scoring": auc, "n_repeats": REPEATS, "random_state": seed}
    return permutation_importance(fitted, values[:, columns], sex, **options).importances_mean


def voxel_svm(
    cohort: Cohort, assignment: np.ndarray, *, confounds: np.ndarray | None = None
) -> np.ndarray:
    """Return decisions (N,) of the study's support vector machine (RBF) on standardised voxels.

    Brain mask, scaling and regression on `confounds` (N, K) come from the training folds alone. The
    voxels within the brain must fit into memory, several times over.
    """
    decisions, volumes = np.full(len(cohort), np.nan), cohort.volumes
    for train, test in PredefinedSplit(assignment).split():
        brain = sum(volumes[row] / len(train) for row in train) > BRAIN_THRESHOLD
        values = volumes if confounds is None else RegressedVolumes(volumes, confounds, train)
        voxels = [np.stack([values[row][brain] for row in rows]) for rows in (train, test)]
        scaler = StandardScaler(copy=False).fit(voxels[0])
        seen, new = (scaler.transform(sample) for sample in voxels)
        gamma = 1 / (seen.shape[1] * seen.var())  # SVC's own; but a matrix product a kernel
        svm = SVC(kernel="precomputed").fit(rbf_kernel(seen, seen, gamma), cohort.sex[train])
        decisions[test] = svm.decision_function(rbf_kernel(new, seen, gamma))
    return decisions
