"""HCP's tables: found under their own names, read with IDs as strings, joined by subject."""

from pathlib import Path

import pandas as pd

from brainsex import LABELS

NO_VOLUME = "a row, but no volume"
"""Why `match` leaves out the subjects of whom only the table knows."""

BESIDE = {
    "unrestricted_hcp_freesurfer.csv": {
        "FS_InterCranial_Vol": "intracranial_volume_ml",
        "FS_IntraCranial_Vol": "intracranial_volume_ml",
    },
    "restricted.csv": {"Family_ID": "group", "Age_in_Yrs": "age"},
}
"""What is read of the tables that may lie beside the behavioural one; FreeSurfer's are mm³."""


def find(folder: str | Path) -> Path:
    """The behavioural CSV in a cohort's folder, under the project's or HCP's own name."""
    folder = Path(folder)
    named = folder / "unrestricted_behavioral.csv"
    found = [named] if named.is_file() else sorted(folder.glob("unrestricted_*.csv"))
    found = [path for path in found if "freesurfer" not in path.name.lower()]
    if len(found) != 1:
        raise FileNotFoundError(
            f"{folder}: expected unrestricted_behavioral.csv or one unrestricted_*.csv with the "
            f"columns Subject and Gender, found {[p.name for p in found] or 'none'}. "
            "DATA_ACCESS.md says where to get it."
        )
    return found[0]


def read(table: str | Path) -> pd.DataFrame:
    """HCP's behavioural table, with what the tables beside it know of the same subjects.

    ``unrestricted_hcp_freesurfer.csv`` adds the intracranial volume; ``restricted.csv`` adds
    family and exact age.

    Returns
    -------
    Indexed by Subject (str): Gender, and where known ``age`` (years, or HCP's band),
    ``qc_issue``, ``intracranial_volume_ml``, ``group`` (family).

    Raises
    ------
    FileNotFoundError, ValueError
        No such table; no Subject or Gender column; a subject in two rows; a volume that is no
        number.
    """
    table = Path(table)
    rows = _columns(table, {"Gender": "Gender"}, {"Age": "age", "QC_Issue": "qc_issue"})
    for name, wanted in BESIDE.items():
        path = _beside(table.parent, name)
        if path is not None and path != table:
            more = _columns(path, {}, wanted)
            if "intracranial_volume_ml" in more:
                try:
                    more["intracranial_volume_ml"] = more["intracranial_volume_ml"].astype(float)
                except ValueError as error:
                    raise ValueError(f"{path}: the intracranial volume: {error}.") from error
                more["intracranial_volume_ml"] /= 1000
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
        raise ValueError(
            f"{folder}: several restricted tables, {[p.name for p in found]}: keep one."
        )
    return found[0] if found else None


def match(
    files: dict[str, list[Path]], rows: pd.DataFrame
) -> tuple[dict[str, Path], dict[str, str]]:
    """The volumes that have a row and a sex; and why every other file and row is left out.

    Parameters
    ----------
    files : by subject, the volumes named by its ID.
    rows : as from `read`.

    Returns
    -------
    accepted, rejected : a path, and a reason, by subject; each in the order of the IDs.
    """
    accepted, rejected = {}, {}
    for subject in sorted({*files, *rows.index}):
        if subject not in files:
            rejected[subject] = NO_VOLUME
        elif subject not in rows.index:
            rejected[subject] = "a volume, but no row in the table"
        elif len(files[subject]) > 1:
            rejected[subject] = f"two volumes: {', '.join(path.name for path in files[subject])}"
        elif not files[subject][0].is_file():
            rejected[subject] = "no file behind its name: a folder, or a broken link"
        elif (gender := rows.at[subject, "Gender"]) not in LABELS:
            rejected[subject] = f"Gender is {gender!r}, expected M or F"
        else:
            accepted[subject] = files[subject][0]
    return accepted, rejected


def _columns(table: Path, needed: dict[str, str], wanted: dict[str, str]) -> pd.DataFrame:
    """The columns needed, and those wanted where there are any, under our names, by Subject."""
    if not table.is_file():
        raise FileNotFoundError(f"{table}: no such table. DATA_ACCESS.md says where to get it.")
    columns = {"Subject": "Subject"} | needed | wanted
    try:
        # index_col: where rows end in a comma, pandas would shift the columns by one
        rows = pd.read_csv(table, dtype=str, usecols=lambda name: name in columns, index_col=False)
    except (UnicodeDecodeError, pd.errors.ParserError, pd.errors.EmptyDataError) as error:
        raise ValueError(f"{table}: not a CSV table ({error}).") from error
    if missing := [name for name in ("Subject", *needed) if name not in rows]:
        raise ValueError(f"{table}: expected a column {' and '.join(missing)}, found none.")
    rows = rows[[name for name in columns if name in rows]].rename(columns=columns)
    rows = rows.dropna(subset="Subject")
    rows["Subject"] = rows["Subject"].str.strip()
    twice = rows["Subject"][rows["Subject"].duplicated()].unique()
    if len(twice):
        raise ValueError(f"{table}: subjects in more than one row: {', '.join(twice[:10])}.")
    return rows.set_index("Subject")
