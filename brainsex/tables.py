"""Tables of people and measures, read as text and joined by subject ID."""

import csv
import json
import os
import re
import warnings
from pathlib import Path

import numpy as np
import pandas as pd

from brainsex import LABELS, storage

MAX_TABLE_BYTES, MAX_COLUMNS = 1 << 31, 50_000  # UK Biobank's tables have some 30,000 columns
INVALID_ID_CHARACTERS, MAX_ID_LENGTH = r"[/\\\x00-\x1f\x7f]", 200  # IDs become file names
COMPANION_TABLES = {  # file beside the table of people: its columns, and the names used here
    "unrestricted_hcp_freesurfer.csv": {
        "FS_InterCranial_Vol": "intracranial_volume_ml",  # in mm³ in the file
        "FS_IntraCranial_Vol": "intracranial_volume_ml",
    },
    "restricted.csv": {"Family_ID": "group", "Age_in_Yrs": "age"},
}
SYNONYMS = {"Subject": ("participant_id", "eid"), "Gender": ("sex",)}  # of HCP, BIDS, UK Biobank
SEX_WORDS = {"f": 0, "female": 0, "w": 0, "woman": 0, "m": 1, "male": 1, "man": 1}
SEX_CODES = ({"0": 0, "1": 1}, {"1": 1, "2": 0}, SEX_WORDS)  # UK Biobank, ISO 5218, or words


def subject_id(name: str | Path) -> str:
    """Return the subject ID in a path, a file name or an ID: ``sub-01_FA.nii.gz`` gives ``01``."""
    stem = Path(name).name.removesuffix(".gz").removesuffix(".nii")
    return re.sub("(_FA)+$|_T1w?$", "", stem).removeprefix("sub-")


def cohort_name(folder: str | Path) -> tuple[str, bool]:
    """Return a cohort's name, with the word synthetic or planted where it is; if synthetic."""
    synthetic, planted = (Path(folder) / "SYNTHETIC").is_file(), Path(folder) / "PLANTED"
    name = Path(os.path.abspath(folder)).name  # a link keeps its own name
    if planted.is_file():
        with storage.reading(planted, "the record of the planted effect", "plant again"):
            name += f" (planted, d = {json.loads(planted.read_text())['effect']:g})"
    return name if not synthetic or "synthetic" in name else f"{name} (synthetic)", synthetic


def find_people(folder: str | Path) -> Path:
    """Find a cohort's one table of people, under its usual names, or raise FileNotFoundError."""
    patterns = ("unrestricted_behavioral.csv", "unrestricted_*.csv", "participants.tsv")
    for pattern in patterns:
        paths = sorted(Path(folder).glob(pattern))
        if names := [path.name for path in paths if "freesurfer" not in path.name.lower()]:
            break
    if len(names) != 1:
        problem = f"expected one table of people, {' or '.join(patterns)}, found {names or 'none'}"
        raise FileNotFoundError(f"{folder}: {problem}. DATA_ACCESS.md says where to get it.")
    return Path(folder) / names[0]


def read_people(table: str | Path) -> pd.DataFrame:
    """Read a table of people, and join the `COMPANION_TABLES` beside it.

    The result is indexed by Subject (str) and has Gender (F, M) and, where known, ``age`` (years,
    or HCP's age band), ``qc_issue``, ``intracranial_volume_ml`` and ``group`` (family ID). Raises
    FileNotFoundError, or ValueError if Subject or Gender is missing or a subject has two rows.
    """
    table = Path(table)
    people = _read_columns(table, {"Gender": "Gender", "Age": "age", "QC_Issue": "qc_issue"})
    people["Gender"] = read_sex(people["Gender"]).map({0: "F", 1: "M"}).fillna(people["Gender"])
    for name in COMPANION_TABLES:
        companion, path = _read_companion(table.parent, name), table.parent / name
        if (volume := "intracranial_volume_ml") in companion:
            with storage.reading(path, "numbers as intracranial volumes", "correct the cells"):
                companion[volume] = companion[volume].astype(float) / 1000
        for column, values in companion.reindex(people.index).items():
            band = people.get(column, values)  # of age, stays where years are unknown
            people[column] = values.combine_first(band)
    return people


def match_subjects(
    files: dict[str, list[Path]], people: pd.DataFrame, leave_out_qc: bool
) -> tuple[dict[str, Path], dict[str, str]]:
    """Match volumes by subject to `read_people`: paths to use, and reasons of who is rejected."""
    if leave_out_qc and "qc_issue" not in people:
        raise ValueError(f"expected a column QC_Issue in the table, found {', '.join(people)}")
    accepted, rejected = {}, {}
    for subject in sorted({*files, *people.index}):
        if subject not in files:
            rejected[subject] = "a row, but no volume"
        elif subject not in people.index:
            rejected[subject] = "a volume, but no row in the table"
        elif len(paths := files[subject]) > 1:
            names = ", ".join("/".join(path.parts[-3:]) for path in paths)
            rejected[subject] = f"{len(paths)} volumes: {names}: keep one (--session, --match)"
        elif not paths[0].is_file():
            rejected[subject] = "no file behind its name: a folder, or a broken link (datalad get)"
        elif (gender := people.at[subject, "Gender"]) not in LABELS:
            rejected[subject] = f"Gender is {gender!r}, expected M or F"
        elif leave_out_qc and not pd.isna(issue := people.at[subject, "qc_issue"]):
            rejected[subject] = f"QC_Issue {issue}"
        else:
            accepted[subject] = paths[0]
    return accepted, rejected


def read_families(folder: str | Path, subjects: np.ndarray) -> np.ndarray | None:
    """Read family IDs (N,) as `fill_missing_families` does, from a folder's restricted table."""
    families = _read_companion(Path(folder), "restricted.csv").reindex(subjects)
    return fill_missing_families(families["group"]) if "group" in families else None


def fill_missing_families(families: pd.Series) -> np.ndarray | None:
    """Return family IDs (N,) str, own ones where unknown, of a Series by subject; None if empty."""
    own_ids = pd.Series("subject " + families.index.astype(str), families.index)
    return None if families.isna().all() else families.fillna(own_ids).to_numpy(str)


def read_text_table(table: str | Path) -> pd.DataFrame:
    """Read a table's cells as text, NaN where blank; a repeated column name gets " (2)" appended.

    The separator is the commonest in the header: comma, semicolon (decimal commas) or tab. Raises
    FileNotFoundError, or ValueError if the file is not text in columns.
    """
    table = Path(table)
    if not table.is_file():
        raise FileNotFoundError(f"{table}: no such table. DATA_ACCESS.md says where to get it.")
    with storage.reading(table, "a CSV table", "export it again"):
        with table.open(encoding="utf-8-sig") as file:
            header = file.readline(1000 * MAX_COLUMNS)
        separator = max(",;\t", key=header.count)
        columns = next(csv.reader([header], delimiter=separator), [])
        if not columns or len(columns) > MAX_COLUMNS or table.stat().st_size > MAX_TABLE_BYTES:
            raise ValueError(f"no header, or over {MAX_COLUMNS} columns or {MAX_TABLE_BYTES} bytes")
        names = pd.Series(columns, dtype=str).str.strip()
        repeats = names.groupby(names).cumcount() + 1
        names = names.where(repeats == 1, names + " (" + repeats.astype(str) + ")")
        options = {"names": names, "header": 0, "index_col": False, "skip_blank_lines": False}
        with warnings.catch_warnings():  # cells beyond the header are only warned of
            warnings.simplefilter("error", pd.errors.ParserWarning)
            rows = pd.read_csv(table, sep=separator, dtype=str, **options)
    if separator == ";":
        rows = rows.replace(r"^\s*([-+]?\d*),(\d+(?:[eE][-+]?\d+)?)\s*$", r"\1.\2", regex=True)
    return rows


def read_output_table(path: str | Path, *columns: str) -> pd.DataFrame:
    """Read a table that a command wrote: IDs as text, numbers as numbers.

    Raises FileNotFoundError, or ValueError if `columns` are missing or an ID names no file.
    """
    rows = read_text_table(path)
    if missing := [name for name in columns if name not in rows]:
        raise ValueError(f"{path}: expected a column {' and '.join(missing)}, found none")
    for name in rows.columns.difference(["Subject", "group"]):
        numbers = pd.to_numeric(rows[name], errors="coerce")
        rows[name] = numbers if numbers.isna().equals(rows[name].isna()) else rows[name]
    if "Subject" in columns:
        check_subject_ids(path, rows["Subject"])
    return rows


def check_subject_ids(path: str | Path, column: pd.Series) -> np.ndarray:
    """Return a column's IDs (N,) str, stripped; ValueError if blank, repeated or no file name."""
    names = column.fillna("").str.strip()
    invalid = names.str.contains(INVALID_ID_CHARACTERS) | ~names.str.len().between(1, MAX_ID_LENGTH)
    if (invalid | names.duplicated()).any():
        line = names.index[invalid | names.duplicated()][0]
        expected = f"{column.name} of 1 to {MAX_ID_LENGTH} characters without / and \\"
        problem = f"expected {expected}, in no more than one row, found {names[line]!r:.100}"
        raise ValueError(f"{path}: line {line + 2}: {problem}")
    return names.to_numpy(str)


def read_sex(column: pd.Series) -> pd.Series:
    """Return 0 (women) and 1 (men) of a column of `SEX_CODES`; NaN where blank or unknown."""
    cells = column.str.strip().str.lower().str.removesuffix(".0").replace("", np.nan)
    present = set(cells.dropna())
    return cells.map(next((codes for codes in SEX_CODES if present <= set(codes)), SEX_WORDS))


def find_column(table: Path, rows: pd.DataFrame, name: str) -> str:
    """Return the column `name`, or its only synonym; ValueError if there is none, or several."""
    names = rows.columns.str.replace(r" \(\d+\)$", "", regex=True)  # of repeated columns
    matches = rows.columns[names == name]
    if not len(matches):
        matches = rows.columns[names.str.lower().isin([name.lower(), *SYNONYMS.get(name, ())])]
    if len(matches) != 1:
        present = ", ".join(map("{:.100}".format, matches if len(matches) else rows.columns[:20]))
        raise ValueError(f"{table}: expected one column {name}, found {present}; name it")
    return matches[0]


def _read_companion(folder: Path, name: str) -> pd.DataFrame:
    """Read a companion table under the project's name, or the restricted one as HCP exports it."""
    paths = [path for path in (folder / name,) if path.is_file()]
    if not paths and name == "restricted.csv":
        paths = sorted(folder.glob("RESTRICTED_*.csv"))
    if len(paths) > 1:
        names = [path.name for path in paths]
        raise ValueError(f"{folder}: expected one restricted table, found {names}: keep one.")
    return _read_columns(paths[0], COMPANION_TABLES[name]) if paths else pd.DataFrame()


def _read_columns(table: Path, columns: dict[str, str]) -> pd.DataFrame:
    """Read those columns that there are, Gender if wanted, under their new names, by Subject."""
    rows = read_text_table(table)
    names, present = {}, {"subject", "gender", *rows.columns.str.lower()}
    for name, new_name in ({"Subject": "Subject"} | columns).items():
        if name.lower() in present:
            names[find_column(table, rows, name)] = new_name
    rows = rows[list(names)].rename(columns=names).dropna(subset="Subject")
    rows["Subject"] = check_subject_ids(table, rows["Subject"].str.strip().str.removeprefix("sub-"))
    return rows.set_index("Subject")
