"""Morphometry tables, FreeSurfer's or any other, and the study's classifiers on their features.

Imputing, scaling and the choice of k or C happen inside the training folds.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from sklearn.base import BaseEstimator
from sklearn.impute import SimpleImputer
from sklearn.linear_model import LogisticRegression, LogisticRegressionCV
from sklearn.model_selection import GridSearchCV, PredefinedSplit, cross_val_predict
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.svm import SVC
from xgboost import XGBClassifier

from brainsex import BRAIN_THRESHOLD, LABELS, evaluation, participants, tables
from brainsex.confounds import ConfoundRegressor

# HCP's two spellings, FreeSurfer's own names, and other programs', in mm³.
HEAD_SIZE_COLUMNS = "FS_IntraCranial_Vol FS_InterCranial_Vol EstimatedTotalIntraCranialVol".split()
HEAD_SIZE_COLUMNS += ["eTIV", "ICV", "TIV"]
INNER = 3  # folds of the training subjects, by which k and C are chosen
NEIGHBOURS = (1, 3, 5, 9, 15, 25, 39, 59, 99)  # the k among which the inner folds choose


@dataclass(frozen=True)
class Table:
    """Morphometry of N subjects; ``len()`` is their number."""

    name: str  # the cohort's name, with the word synthetic where it is
    features: pd.DataFrame  # (N, P) numbers, NaN where blank
    sex: np.ndarray  # (N,) int64, women 0, men 1
    subjects: np.ndarray  # (N,) str
    groups: np.ndarray | None  # (N,) str, families, of the cohort's tables or this one
    release: np.ndarray | None  # (N,) str, HCP's Release, which is no feature

    def __len__(self) -> int:
        return len(self.sex)


def load_table(
    csv: str | Path,
    *,
    cohort: Path | None = None,
    subject: str = "Subject",
    sex: str = "Gender",
    session: str | None = None,
) -> Table:
    """Load a morphometry table: HCP's FreeSurfer CSV as exported, or any other.

    Name and families are those of the folder `cohort`, by default the one that holds the table;
    families that are not known there may stand in the table itself.
    IDs, sex and `session` are read as by `participants.read_people`; a table without a column of
    sex, as FreeSurfer writes them, takes it from the folder's people. Columns with text, or blank
    or the same for everybody, and subjects without a sex or measure are dropped, which is printed.
    Infinite values become blanks. Raises FileNotFoundError, or ValueError for a missing column,
    unknown codes of sex, a repeated subject, one sex only, or no subject of `cohort`.
    """
    csv, folder = Path(csv), cohort or Path(csv).parent
    rows = tables.index_subjects(csv, tables.read_text_table(csv), subject, session=session)
    has_sex = sex != "Gender" or bool(tables.match_columns(rows, sex))
    if cohort is not None or not has_sex:
        table = folder / "subjects.csv"  # who was converted
        table = table if table.is_file() else participants.find_people(folder)
        people = participants.read_people(table)
        rows.index = participants.spell_ids(rows.index, people.index)
        if not people.index.isin(rows.index).any():
            problem = f"expected subjects of {folder}, found none among {len(rows)}"
            raise ValueError(f"{csv}: {problem}: {', '.join(rows.index[:3])}; name its own table.")
        letters = people["Gender"].reindex(rows.index)
    if has_sex:
        name = tables.find_column(csv, rows, sex)
        codebooks = participants.read_codebooks(csv, folder, rows[name])
        letters = tables.read_sex(csv, rows, sex, codebooks)
    labels = letters.map(LABELS)
    named = rows.columns.str.replace(r" \(\d+\)$", "", regex=True)  # of repeated columns
    no_features = named.str.fullmatch("|".join(tables.SYNONYMS.values()), case=False)
    no_features |= named.str.contains(tables.SEX_WORD_IN_NAME, case=False)
    about = [column for name in (subject, sex) for column in tables.match_columns(rows, name)]
    cells = rows.loc[:, ~(no_features | rows.columns.isin([*about, "Release"]))]
    values = cells.apply(pd.to_numeric, errors="coerce").astype(float)
    values = values.loc[:, (values.isna() == cells.isna()).all()]  # a number in every cell
    values = values.replace([np.inf, -np.inf], np.nan)[labels.notna()]
    features = values.loc[:, values.nunique() > 1].dropna(how="all")
    labels = labels[features.index].astype(np.int64)
    if features.empty or labels.nunique() < 2:
        expected = f"both sexes in {sex} and a column of numbers beside it and {subject}"
        raise ValueError(f"{csv}: expected {expected}, found {set(labels)}, {[*features][:3]}.")
    dropped = cells.columns.difference(features.columns, sort=False)
    names = rows.index.difference(features.index, sort=False)
    print(f"{csv.name}: {len(labels)} subjects, {features.shape[1]} features; left out:")
    print(f"  columns of text, blank or the same for all: {len(dropped)}", *dropped[:3])
    print(f"  subjects without a sex or measure: {len(names)}", *names[:3])
    rows = rows.loc[features.index]
    families = participants.join_companions(rows[[]], folder).get("group")
    if families is None and (own := tables.match_columns(rows, "Family_ID")):
        families = rows[own[0]]
    return Table(
        name=tables.cohort_name(folder)[0],
        features=features.reset_index(drop=True),
        sex=labels.to_numpy(),
        subjects=rows.index.to_numpy(str),
        groups=None if families is None else tables.fill_missing_families(families),
        release=rows["Release"].fillna("").to_numpy(str) if "Release" in rows else None,
    )


load = load_table


def make_classifiers(
    *, nested: bool = False, neighbours: int = 15, largest: int = NEIGHBOURS[-1]
) -> dict[str, BaseEstimator]:
    """Make the study's four classifiers with its settings; its KNN swept over k instead.

    Nested, k (up to `largest`) and C are chosen by `INNER` inner folds, which may part relatives.
    """
    nearest = KNeighborsClassifier(neighbours)
    logistic, svm = LogisticRegression(max_iter=1000), SVC()
    if nested:
        options = {"scoring": "accuracy", "max_iter": 1000, "use_legacy_attributes": False}
        counts = [k for k in NEIGHBOURS if k <= largest]
        nearest = GridSearchCV(nearest, {"n_neighbors": counts}, cv=INNER)
        options["cv"] = INNER
        logistic = LogisticRegressionCV(Cs=np.logspace(-4, 0, 5), l1_ratios=(0,), **options)
        svm = GridSearchCV(svm, {"C": (0.1, 1.0, 10.0)}, cv=INNER)
    return {
        "XGBoost": XGBClassifier(learning_rate=0.5, n_jobs=1, random_state=0),  # blanks as they are
        "KNN": _standardised(nearest),
        "logistic regression": _standardised(logistic),
        "SVM": _standardised(svm),
    }


def _standardised(classifier: BaseEstimator) -> Pipeline:
    """Scale columns to mean 0 and variance 1 of the training folds; blanks become their mean."""
    blanks = SimpleImputer(strategy="constant", fill_value=0, keep_empty_features=True)
    return make_pipeline(StandardScaler(), blanks, classifier)


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


def compare(table: Table, *, folds: int = 10, seed: int = 0) -> pd.DataFrame:
    """Score the nested classifiers on the same folds, which keep families together."""
    assignment = evaluation.folds(table.sex, groups=table.groups, folds=folds, seed=seed)
    largest = len(table) * (folds - 1) // folds * (INNER - 1) // INNER - 1
    decisions = {
        name: cross_val_decisions(classifier, table.features, table.sex, assignment)
        for name, classifier in make_classifiers(nested=True, largest=largest).items()
    }
    return evaluation.score_table(table.sex, decisions, assignment)


def voxel_svm(
    volumes: np.ndarray,
    sex: np.ndarray,
    assignment: np.ndarray,
    *,
    confounds: np.ndarray | None = None,
) -> np.ndarray:
    """Return decisions (N,) of the study's support vector machine (RBF) on standardised voxels.

    The brain is that of all subjects' mean, which knows no sex; all else is as in
    `cross_val_decisions`. Volumes (N, X, Y, Z) may be memory-mapped; their brains must fit into
    memory several times over.
    """
    brain = sum(volume / len(volumes) for volume in volumes) > BRAIN_THRESHOLD
    voxels = np.stack([volume[brain] for volume in volumes])
    return cross_val_decisions(_standardised(SVC()), voxels, sex, assignment, confounds=confounds)
