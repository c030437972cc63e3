"""Morphometry tables: HCP's FreeSurfer export or any other, and what classifiers make of it."""

import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd

from brainsex import classifiers, evaluation, tables
from brainsex.cohort import name_of

SUBJECT = ("Subject", "participant_id", "eid")
SEX = ("Gender", "sex")
"""Columns looked for, in any case, when the one named is not there: HCP, BIDS, UK Biobank."""
WORDS = {"f": 0, "female": 0, "w": 0, "woman": 0, "m": 1, "male": 1, "man": 1}
CODES = ({"0": 0, "1": 1}, {"1": 1, "2": 0}, WORDS)
"""Numbers: 0 women, 1 men (UK Biobank), or 1 men, 2 women (ISO 5218); or words."""
NO_FEATURES = ("Release",)
INTRACRANIAL = "FS_IntraCranial_Vol"


@dataclass(frozen=True)
class Table:
    """Morphometry of N subjects. ``len()`` is their number."""

    name: str  # the folder's name, with the word synthetic where the cohort is
    features: pd.DataFrame  # (N, P) numbers, NaN where blank
    sex: np.ndarray  # (N,) int64, women 0, men 1
    subjects: np.ndarray  # (N,) str
    groups: np.ndarray | None
    """(N,) str, families, of ``restricted.csv`` beside the table; None where all are unknown."""
    release: np.ndarray | None  # (N,) str, HCP's Release, which is no feature
    notes: dict[str, tuple[str, ...]]  # what was dropped, renamed or changed: columns by reason

    def __len__(self) -> int:
        return len(self.sex)


def load(csv: str | Path, *, subject: str = "Subject", sex: str = "Gender") -> Table:
    """Read a morphometry table: HCP's FreeSurfer CSV as exported, or any other.

    What is dropped is printed, and kept in ``notes``: columns of text, blank or the same for
    everybody, subjects without a sex. Infinite values become blanks.

    Parameters
    ----------
    csv : with a header; commas, semicolons or tabs; any line ends.
    subject, sex : the columns; HCP's, BIDS's and UK Biobank's names are found by themselves.
        Sexes are M and F, male and female, 0 and 1 (men), or 1 (men) and 2.

    Raises
    ------
    FileNotFoundError, ValueError
        No such table; no such column, or several; an unknown code; a subject twice; a value among a
        column's numbers that is none; one sex only; no feature.
    """
    csv = Path(csv)
    rows = tables.raw(csv).dropna(how="all")  # blank lines; the index still counts lines
    subject, sex = _named(csv, rows, subject, SUBJECT), _named(csv, rows, sex, SEX)
    said = defaultdict(list, {"second of a name": [n for n in rows if n.endswith(" (2)")]})
    label = _labels(csv, rows[sex])
    if blank := int(label.isna().sum()):
        said["subjects without a sex, left out"].append(str(blank))
    rows, label = rows[label.notna()], label[label.notna()].astype(np.int64)
    if (count := label.nunique()) < 2:
        raise ValueError(
            f"{csv}: expected both sexes in {sex}, found {('none', 'one only')[count]}."
        )
    names = tables.identifiers(csv, rows[subject])
    numbers = {}
    no_features = {name.lower() for name in (subject, sex, *SUBJECT, *SEX, *NO_FEATURES)}
    for name in rows:
        if re.sub(r" \(\d+\)$", "", name).lower() in no_features:
            if name not in (subject, sex, *NO_FEATURES):
                said["names a subject, its sex or release, dropped"].append(name)
            continue
        values, problem = _numbers(csv, rows[name])
        if problem:
            said[problem].append(name)
        if values is not None:
            numbers[name] = values
    if not numbers:
        raise ValueError(f"{csv}: no column of numbers beside {subject} and {sex}.")
    features = pd.DataFrame(numbers)
    empty = features.isna().all(axis=1).to_numpy()
    if empty.any():
        said["subjects without a measure, left out"].append(str(empty.sum()))
        features, label, rows, names = (part[~empty] for part in (features, label, rows, names))
    if "FS_InterCranial_Vol" in features and INTRACRANIAL not in features:
        features = features.rename(columns={"FS_InterCranial_Vol": INTRACRANIAL})
        said[f"called {INTRACRANIAL}, as in other exports"] = ["FS_InterCranial_Vol"]
    found = Table(
        name=name_of(csv.parent)[0],
        features=features.reset_index(drop=True),
        sex=label.to_numpy(),
        subjects=names,
        groups=tables.families(csv.parent, names),
        release=rows["Release"].fillna("").to_numpy(str) if "Release" in rows else None,
        notes={problem: tuple(names) for problem, names in said.items() if names},
    )
    print(f"{csv.name}: {len(found)} subjects, {features.shape[1]} features")
    for problem, names in found.notes.items():
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        print(f"  {problem}: {', '.join(names[:3])}{more}")
    return found


def _named(csv: Path, rows: pd.DataFrame, name: str, others: tuple[str, ...]) -> str:
    """The column asked for or, when that is a default that is not there, its known synonyms."""
    if name in rows and f"{name} (2)" not in rows:
        return name
    names = {name.lower()} if name in rows else {other.lower() for other in others}
    found = [c for c in rows if re.sub(r" \(\d+\)$", "", c).lower() in names]
    if name not in others or len(found) != 1:
        there = ", ".join(found) or ", ".join(rows.columns[:10])
        several = "several: " if len(found) > 1 else ""
        raise ValueError(
            f"{csv}: expected one column {name}, found {several}{there:.200}. "
            "Name it: tabular.load(csv, subject=…, sex=…)."
        )
    return found[0]


def _labels(csv: Path, column: pd.Series) -> pd.Series:
    """0 and 1, NaN where blank."""
    values = column.str.strip().str.lower().str.removesuffix(".0").replace("", np.nan)
    present = set(values.dropna())
    known = next((codes for codes in CODES if present <= set(codes)), WORDS)
    numbers = "numbers (0 women, 1 men; 1 men, 2 women; recode others)"
    unknown = values.notna() & ~values.isin(list(known))
    _refuse(csv, column, unknown, f"one of {', '.join(known)}, or {numbers}")
    return values.map(known)


def _refuse(csv: Path, column: pd.Series, bad: pd.Series, expected: str) -> None:
    if bad.any():
        row = bad.idxmax()
        where = f"{csv}: column {column.name}, line {row + 2}"
        raise ValueError(f"{where}: expected {expected}, found {column[row]!r}.")


def _numbers(csv: Path, column: pd.Series) -> tuple[pd.Series | None, str]:
    """A column's numbers, or None; and what there is to say of it."""
    given = column[column.notna()]
    values = pd.to_numeric(given, errors="coerce")
    bad = values.isna()
    if given.empty:
        return None, "all blank, dropped"
    if bad.all():
        return None, "text, dropped"
    _refuse(csv, given, bad, "a number")
    infinite = np.isinf(values)
    values = values[~infinite]
    problem = f"{infinite.sum()} infinite, the first in line {infinite.idxmax() + 2}: now blank"
    if values.nunique() < 2:
        return None, "the same for everybody, dropped"
    return values.reindex(column.index), problem if infinite.any() else ""


def subset(table: Table, rows: np.ndarray) -> Table:
    """Some subjects of a table."""
    known = {name: getattr(table, name) for name in ("sex", "subjects", "groups", "release")}
    some = {name: values if values is None else values[rows] for name, values in known.items()}
    return replace(table, features=table.features.iloc[rows].reset_index(drop=True), **some)


def decisions(
    table: Table, assignment: np.ndarray, *, chosen: Mapping | None = None, confounds=None
) -> dict[str, np.ndarray]:
    """Each classifier's decisions on held-out subjects, of the shape of the assignment.

    Parameters
    ----------
    assignment : (N,) or (R, N), of `evaluation.folds`.
    chosen : classifiers by name; `classifiers.chosen_inside` by default.
    confounds : (N, K), of `classifiers.cross_predict`.
    """
    found, known = {}, (table.features, table.sex)
    for name, classifier in (chosen or classifiers.chosen_inside()).items():
        options = {"confounds": confounds, "name": name}
        each = [
            classifiers.cross_predict(classifier, *known, folds, **options)
            for folds in np.atleast_2d(assignment)
        ]
        found[name] = np.reshape(each, np.shape(assignment))
    return found


def compare(
    table: Table, *, folds: int = 10, seed: int = 0, chosen: Mapping | None = None, confounds=None
) -> pd.DataFrame:
    """`scores` of `decisions` on the same folds; families, where known, never span two."""
    assignment = evaluation.folds(table.sex, groups=table.groups, folds=folds, seed=seed)
    found = decisions(table, assignment, chosen=chosen, confounds=confounds)
    return scores(table.sex, found, assignment)


def scores(
    sex: np.ndarray, found: Mapping[str, np.ndarray], assignment: np.ndarray
) -> pd.DataFrame:
    """`evaluation.score` of each classifier's decisions, one row each."""
    rows = {name: evaluation.score(sex, each, assignment) for name, each in found.items()}
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("classifier").reset_index()
