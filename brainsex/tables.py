"""HCP's tables: found under their own names, read with IDs as strings, joined by subject."""

import csv
import re
import warnings
from collections import Counter
from contextlib import suppress
from pathlib import Path

import numpy as np
import pandas as pd

from brainsex import LABELS

MAX_COLUMNS, MAX_HEADER = 50_000, 1 << 22
"""Columns and letters of the widest header that is read: UK Biobank's have some 30,000 columns."""
MAX_WRITTEN = 1 << 28
"""Bytes of the longest table that is read as our own."""
UNFIT, MAX_NAME = r"[/\\\x00-\x1f\x7f]", 200
"""What no ID may hold, and its length: it is part of the names of files."""
NO_VOLUME = "a row, but no volume"  # why `match` leaves out whom only the table knows

UNREADABLE = (UnicodeDecodeError, csv.Error, pd.errors.ParserError, pd.errors.ParserWarning)
UNREADABLE += (pd.errors.EmptyDataError,)

BESIDE = {
    "unrestricted_hcp_freesurfer.csv": {
        "FS_InterCranial_Vol": "intracranial_volume_ml",
        "FS_IntraCranial_Vol": "intracranial_volume_ml",
    },
    "restricted.csv": {"Family_ID": "group", "Age_in_Yrs": "age"},
}
"""What is read of the tables that may lie beside the behavioural one; FreeSurfer's are mm³."""

BIDS = {"participant_id": "Subject", "sex": "Gender", "gender": "Gender", "age": "Age"}
"""HCP's names of the columns of a ``participants.tsv``, in any case."""
SEXES = {"f": "F", "female": "F", "m": "M", "male": "M"}


def find(folder: str | Path) -> Path:
    """The table of people in a cohort's folder, under the project's, HCP's own or BIDS's name."""
    folder = Path(folder)
    named = folder / "unrestricted_behavioral.csv"
    found = [named] if named.is_file() else sorted(folder.glob("unrestricted_*.csv"))
    found = [path for path in found if "freesurfer" not in path.name.lower()]
    if not found and (folder / "participants.tsv").is_file():
        found = [folder / "participants.tsv"]
    if len(found) != 1:
        names = [path.name for path in found] or "none"
        raise FileNotFoundError(
            f"{folder}: expected unrestricted_behavioral.csv or one unrestricted_*.csv with the "
            "columns Subject and Gender, or participants.tsv with participant_id and sex, found "
            f"{names}. DATA_ACCESS.md says where to get it."
        )
    return found[0]


def read(table: str | Path) -> pd.DataFrame:
    """HCP's behavioural table, or BIDS's, with what the tables `BESIDE` it know of the subjects.

    Returns
    -------
    Indexed by Subject (str): Gender, and where known ``age`` (years, or HCP's band),
    ``qc_issue``, ``intracranial_volume_ml``, ``group`` (family).

    Raises
    ------
    FileNotFoundError, ValueError
        No such table; no Subject or Gender; a subject in two rows; a volume that is no number.
    """
    table = Path(table)
    rows = _columns(table, {"Gender": "Gender"}, {"Age": "age", "QC_Issue": "qc_issue"})
    rows["Gender"] = rows["Gender"].str.strip().str.lower().map(SEXES).fillna(rows["Gender"])
    for name, wanted in BESIDE.items():
        path = _beside(table.parent, name)
        if path is not None and path != table:
            more = _columns(path, {}, wanted)
            if "intracranial_volume_ml" in more:
                try:
                    millilitres = more["intracranial_volume_ml"].astype(float) / 1000
                except ValueError as error:
                    raise ValueError(f"{path}: the intracranial volume: {error}.") from error
                more["intracranial_volume_ml"] = millilitres
            more = more.reindex(rows.index)
            for column in more:  # where years are unknown, a band of age stays
                known = rows.get(column, more[column])
                rows[column] = more[column].combine_first(known)
    return rows


def _beside(folder: Path, name: str) -> Path | None:
    """A table under the project's name, or the restricted one as HCP exports it."""
    found = [folder / name] if (folder / name).is_file() else []
    if not found and name == "restricted.csv":
        found = sorted(folder.glob("RESTRICTED_*.csv"))
    if len(found) > 1:
        names = [path.name for path in found]
        raise ValueError(f"{folder}: several restricted tables, {names}: keep one.")
    return found[0] if found else None


def match(
    files: dict[str, list[Path]], rows: pd.DataFrame, leave_out_qc: bool = False
) -> tuple[dict, dict]:
    """A path by subject, where volumes and `read` rows agree; a reason by subject, elsewhere.

    With `leave_out_qc` subjects with a QC_Issue are among those left out.
    """
    if leave_out_qc and "qc_issue" not in rows:
        raise ValueError(f"expected a column QC_Issue in the table, found {', '.join(rows)}.")
    accepted, rejected = {}, {}
    for subject in sorted({*files, *rows.index}):
        if subject not in files:
            rejected[subject] = NO_VOLUME
        elif subject not in rows.index:
            rejected[subject] = "a volume, but no row in the table"
        elif len(files[subject]) > 1:
            names = ", ".join("/".join(path.parts[-3:]) for path in files[subject])
            rejected[subject] = (
                f"{len(files[subject])} volumes: {names}: keep one (--session, --match)"
            )
        elif not files[subject][0].is_file():
            rejected[subject] = "no file behind its name: a folder, or a broken link (datalad get)"
        elif (gender := rows.at[subject, "Gender"]) not in LABELS:
            rejected[subject] = f"Gender is {gender!r}, expected M or F"
        elif leave_out_qc and not pd.isna(issue := rows.at[subject, "qc_issue"]):
            rejected[subject] = f"QC_Issue {issue}"
        else:
            accepted[subject] = files[subject][0]
    return accepted, rejected


def families(folder: str | Path, subjects: np.ndarray) -> np.ndarray | None:
    """Family (N,) str of each subject, from the restricted table in a folder; None if unknown."""
    path = _beside(Path(folder), "restricted.csv")
    if path is None:
        return None
    known = _columns(path, {}, BESIDE["restricted.csv"]).reindex(subjects)
    return filled(known["group"]) if "group" in known else None


def filled(groups: pd.Series) -> np.ndarray | None:
    """Groups (N,) str of subjects, the index; who has none is alone; None where nobody has one."""
    if groups.isna().all():
        return None
    alone = pd.Series("subject " + groups.index.astype(str), groups.index)
    return groups.fillna(alone).to_numpy(str)


def raw(table: str | Path) -> pd.DataFrame:
    """A table's cells as text, NaN where blank; of a name that stands twice, the second is "… (2)".

    Commas, semicolons (then with decimal commas) or tabs, whichever the header has most of; line
    ends of any system. A ValueError where it is not text in columns.
    """
    table = Path(table)
    if not table.is_file():
        raise FileNotFoundError(f"{table}: no such table. DATA_ACCESS.md says where to get it.")
    try:
        with table.open(encoding="utf-8-sig") as file:  # any line end reads as \n
            header = file.readline(MAX_HEADER)
            separator = max(",;\t", key=header.count)
            names = [name.strip() for name in next(csv.reader([header], delimiter=separator), [])]
            if not names or "\0" in header:
                raise ValueError(f"{table}: not a CSV table (no header, or one with NUL bytes).")
            if len(header) == MAX_HEADER or len(names) > MAX_COLUMNS:
                raise ValueError(
                    f"{table}: expected a header of at most {MAX_COLUMNS} columns and {MAX_HEADER} "
                    f"letters, found {len(names)} columns: keep those of interest."
                )
            seen = Counter()
            for n, name in enumerate(names):
                seen[name] += 1
                names[n] = name if seen[name] == 1 else f"{name} ({seen[name]})"
            if twice := [name for name, count in Counter(names).items() if count > 1]:
                raise ValueError(f"{table}: expected one column {twice[0]}, found several.")
            # one column more, for rows that end in a separator, and for cells beyond the header;
            # index_col: pandas would shift the columns by one
            options = {"dtype": str, "index_col": False, "skip_blank_lines": False}
            names = [*names, "beyond the header"]
            with warnings.catch_warnings():
                warnings.simplefilter("error", pd.errors.ParserWarning)
                rows = pd.read_csv(file, sep=separator, names=names, header=None, **options)
    except UNREADABLE as error:
        # pandas counts the lines after the header
        said = re.sub(r"line (\d+)", lambda found: f"line {int(found[1]) + 1}", str(error))
        raise ValueError(f"{table}: not a CSV table ({said.strip()}).") from error
    beyond = rows.pop("beyond the header").dropna()
    if len(beyond):
        raise ValueError(
            f"{table}: line {beyond.index[0] + 2}: expected {len(names) - 1} cells, as in the "
            f"header, found one more, {beyond.iloc[0]!r}."
        )
    if separator == ";":
        rows = rows.replace(r"^\s*([-+]?\d*),(\d+(?:[eE][-+]?\d+)?)\s*$", r"\1.\2", regex=True)
    return rows


def written(path: str | Path, *columns: str) -> pd.DataFrame:
    """A table that a command wrote, its columns numbers where all cells are, but for IDs.

    A ValueError where one of the columns is missing.
    """
    if Path(path).stat().st_size > MAX_WRITTEN:
        raise ValueError(f"{path}: more than {MAX_WRITTEN} bytes: no table of ours. Make it again.")
    rows = raw(path)
    if missing := [name for name in columns if name not in rows]:
        raise ValueError(f"{path}: expected a column {' and '.join(missing)}, found none.")
    for name in rows.columns.difference(["Subject", "group", "key"]):
        with suppress(ValueError):
            rows[name] = pd.to_numeric(rows[name])
    if "Subject" in columns:
        identifiers(path, rows["Subject"])
    return rows


def folds(path: str | Path) -> pd.Series:
    """The fold of each subject, the index, as ``folds.csv`` has them."""
    found = written(path, "Subject", "fold").set_index("Subject")["fold"]
    if found.dtype.kind not in "iu" or (found < 0).any():
        raise ValueError(f"{path}: expected folds 0, 1, …, found {found.iloc[:5].tolist()!r:.100}.")
    return found


def identifiers(table: Path, column: pd.Series) -> np.ndarray:
    """IDs (N,) str, none of them blank or twice, all of them good for the name of a file."""
    names = column.str.strip().replace("", np.nan)
    if names.isna().any():
        raise ValueError(f"{table}: line {names.isna().idxmax() + 2} has no {column.name}.")
    twice = names[names.duplicated()].unique()
    if len(twice):
        raise ValueError(f"{table}: subjects in more than one row: {', '.join(twice[:10])}.")
    unfit = names[names.str.contains(UNFIT) | (names.str.len() > MAX_NAME)]
    if len(unfit):
        raise ValueError(
            f"{table}: line {unfit.index[0] + 2}: expected {column.name} of at most {MAX_NAME} "
            f"letters, digits and the like, as files are named by it, found {unfit.iloc[0]!r:.100}."
        )
    return names.to_numpy(str)


def _columns(table: Path, needed: dict[str, str], wanted: dict[str, str]) -> pd.DataFrame:
    """The columns needed, and those wanted where there are any, under our names, by Subject."""
    columns = {"Subject": "Subject"} | needed | wanted
    rows = raw(table)
    for old, new in BIDS.items():
        same = [name for name in rows if name.lower() == old]
        if same and new not in rows:
            rows = rows.rename(columns={same[0]: new})
    if missing := [name for name in ("Subject", *needed) if name not in rows]:
        wanted = " and ".join(missing)
        there = [*(f"{name:.100}" for name in rows.columns[:20]), *["…"][: len(rows.columns) > 20]]
        raise ValueError(f"{table}: expected a column {wanted}, found {', '.join(there)}.")
    rows = rows[[name for name in columns if name in rows]].rename(columns=columns)
    rows = rows.dropna(subset="Subject")
    rows["Subject"] = identifiers(table, rows["Subject"].str.strip().str.removeprefix("sub-"))
    return rows.set_index("Subject")
