"""The table of people: found, told by the IDs that stand in paths, and joined with those beside."""

import json
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from itertools import chain
from pathlib import Path

import pandas as pd

from brainsex import tables
from brainsex.tables import compare_id, match_columns

NAMES = (  # of tables of people, the likeliest first
    r"(?i)(HCP_YA_subjects_|unrestricted_(?!.*freesurfer)).*\.csv",
    r"(?i)participants\.tsv",
)
COLUMNS = {"Age": "age", "QC_Issue": "qc_issue"}  # of a table of people, and the names used here
COMPANIONS = {  # columns that HCP ships in tables of their own, beside the table of people or in it
    "Family_ID": "group",
    "Age_in_Yrs": "age",  # known in years, it replaces HCP's age bands
    "FS_InterCranial_Vol": "intracranial_volume_ml",  # in mm³ in the file
    "FS_IntraCranial_Vol": "intracranial_volume_ml",
}
MORPHOMETRY_NAMES = ("unrestricted_hcp_freesurfer.csv", "morphometry.csv")
TABLE_NAME = r"(?i)^(?!\.|(subjects|rejected)\.csv$).*\.(csv|tsv|txt|xlsx)$"  # none of convert's
MAX_TABLES, MAX_FOLDERS, MAX_FAMILY = 1000, 20, 15  # the last: members
MAX_HEADER, MAX_CODEBOOK = 1 << 16, 1 << 20  # bytes
NO_FAMILY = [code for code in tables.MISSING if not code.isdecimal()]


def find_people(
    folder: str | Path,
    *,
    subject: str | None = None,
    sex: str | None = None,
    known: tuple[set[str], set[str]] = (set(), set()),
) -> list[Path]:
    """Find a cohort's table of people at any depth: HCP's or BIDS's, or that which knows most IDs.

    `subject` and `sex` name its columns; `known` is what `layouts.split_paths` returns. Tables of
    a folder with the same columns are one in parts; those that cannot be read are passed over.
    Raises FileNotFoundError if there is none, or if several are as likely.
    """
    parts, wanted, merits = {}, (subject or "Subject", sex or "Gender"), {}
    for path, names in (headers := _read_headers(folder)).items():
        if len(names) > 1 and match_columns(names, wanted[1]):
            rank = next((n for n, name in enumerate(NAMES) if re.fullmatch(name, path.name)), 9)
            parts.setdefault((rank, path.parent, *names), []).append(path)
    likeliest = [key for key in parts if key[0] == min(key[0] for key in parts)]
    for key in likeliest:
        count = (0, 0, 0, 0)
        for path in parts[key] if any(known) and len(likeliest) > 1 else ():
            with suppress(ValueError):
                rows = tables.read_text_table(path)
                count = tuple(map(sum, zip(count, max(_count_known(rows, *known).values()))))
        merits[key] = count, bool(match_columns(key[2:], wanted[0])), -len(key[1].parts)
    best = [key for key in merits if merits[key] == max(merits.values())]
    if len(best) != 1:
        names = [str(path) for key in best for path in parts[key]] or [*map(str, headers)][:9]
        problem = f"expected one table with columns {' and '.join(wanted)}, found {names}"
        remedy = "name a CSV by --table, columns by --subject and --sex; see DATA_ACCESS.md"
        raise FileNotFoundError(f"{folder}: {problem}; {remedy}")
    return parts[best[0]]


def read_people(
    table: str | Path | Sequence[Path],
    *,
    subject: str | None = None,
    sex: str | None = None,
    session: str | None = None,
    known: tuple[set[str], set[str]] = (set(), set()),
    folder: Path | None = None,
) -> pd.DataFrame:
    """Read a table of people, perhaps in parts, and the columns `COMPANIONS` of it and of others.

    `subject` and `sex` name its columns where neither their names nor the `known` parts of paths
    tell, as by `find_id_column`; `session` chooses among rows; other tables lie in the cohort's
    `folder`, by default the table's. The result is indexed by Subject (str) and has Gender (F, M)
    and, where known, ``age`` (years, or HCP's age band), ``qc_issue``, ``intracranial_volume_ml``
    and ``group`` (family ID). The codes of sex are printed. Raises FileNotFoundError, or ValueError
    if a column is missing or a subject has two rows that differ in these.
    """
    paths = [table] if isinstance(table, str | Path) else table
    paths = [Path(os.path.abspath(path)) for path in paths]
    rows = pd.concat(map(tables.read_text_table, paths), ignore_index=True)
    table, folder = paths[0], folder or paths[0].parent
    if subject is None:
        subject, rows = find_id_column(table, rows, *known)
    else:
        rows = _fill_blanks(rows, tables.find_column(table, rows, subject))
    column = tables.find_column(table, rows, sex or "Gender")
    used = [column, *(name for key in COLUMNS | COMPANIONS for name in match_columns(rows, key))]
    rows = tables.index_subjects(table, rows, subject, used, session)
    codebooks = read_codebooks(table, folder, rows[column])
    people = tables.read_sex(table, rows, sex or column, codebooks).to_frame("Gender")
    _add_columns(people, table, rows, COLUMNS | COMPANIONS)
    return join_companions(people, folder, paths, session)


def join_companions(
    people: pd.DataFrame, folder: Path, own: Sequence[Path] = (), session: str | None = None
) -> pd.DataFrame:
    """Join the columns `COMPANIONS` of the tables in a folder, but their `own`, to people, by ID.

    A table that knows fewer than half of the people is named in a line. Raises ValueError if two
    tables have the same column.
    """
    headers = _read_headers(folder, *(path.parent for path in own))
    subjects = {compare_id(name): name for name in people.index}
    for column, name in COMPANIONS.items():
        paths = [p for p, names in headers.items() if p not in own and match_columns(names, column)]
        if len(paths) > 1:
            names = [path.name for path in paths]
            raise ValueError(f"{folder}: expected one table with {column}, found {names}: keep one")
        for path in paths:
            beside = tables.read_text_table(path)
            id_column, beside = find_id_column(path, beside, {*subjects}, {*subjects})
            used = match_columns(beside, column)
            beside = tables.index_subjects(path, beside, id_column, used, session)
            beside.index = [subjects.get(compare_id(key), key) for key in beside.index]
            _add_columns(people, path, beside, {column: name})
            count = people.index.isin(beside.index).sum()
            if 2 * count < len(people):
                print(f"WARNING: {path.name} has {column} of {count} of {len(people)}: compare IDs")
    return people


def _add_columns(people: pd.DataFrame, table: Path, rows: pd.DataFrame, columns: dict) -> None:
    """Add those columns of rows (by Subject) that there are, under their new names, to people."""
    for column, name in columns.items():
        if len(matches := match_columns(rows, column)) > 1:
            several = f"several columns {column}, not read"
            print(f"WARNING: {table.name}: {', '.join(matches)}: {several}")
        elif matches:
            values = rows[matches[0]].reindex(people.index)
            if name == "group":
                values = values.mask(values.str.strip().str.lower().isin(NO_FAMILY))
                # nor is what many share: a code for unknown, or another question's answers
                values = values.mask(values.map(values.value_counts()) > MAX_FAMILY)
            if name == "intracranial_volume_ml":
                values = pd.to_numeric(values, errors="coerce") / 1000
            people[name] = values.combine_first(people.get(name, values))


def _read_headers(*places: str | Path) -> dict[Path, pd.Series]:
    """Return the columns of up to `MAX_TABLES` tables in some folders, those at the top first.

    Of many folders beside each other, those with a number in the name are subjects': left out.
    """
    paths, headers = [], {}
    for parent, folders, names in chain(*map(os.walk, {*map(os.path.abspath, places)})):
        many = len(folders) > MAX_FOLDERS
        folders[:] = [f for f in folders if f[0] != "." and not (many and re.search(r"\d", f))]
        paths += [Path(parent, name) for name in names if re.search(TABLE_NAME, name)]
    paths = {p for p in paths if p.suffix != ".xlsx" or p.with_suffix(".csv") not in paths}
    for path in sorted(paths, key=lambda path: (len(path.parts), path))[:MAX_TABLES]:
        with suppress(Exception):  # a file that cannot be read as a table is left out
            headers[path] = tables.open_table(path, MAX_HEADER)[1]["names"]
    return headers


def read_codebooks(table: Path, folder: Path, cells: pd.Series) -> Iterator[str]:
    """Yield what is written beside a table about a column that has numbers: texts for `read_sex`.

    They are levels in BIDS's JSON, and what follows the column's name, where that is a cell or
    starts a line, in short texts and tables of the folder.
    """
    name = rf"[\"\s]*{re.escape(cells.name)}[\"\s]*"
    if not cells.str.contains(r"\d").any() or not re.search(r"[^\W\d]", cells.name):
        return
    table = Path(os.path.abspath(table))
    with suppress(OSError, ValueError, AttributeError):  # no such file, or none as BIDS has it
        entry = json.loads(table.with_suffix(".json").read_text("utf-8")).get(cells.name, {})
        levels = entry.get("Levels") or entry.get("Annotations", {}).get("Levels", {})
        yield re.sub(r"'TermURL': '[^']*',?|'(Label|Description)':|[{}]", " ", str(levels))
    pattern = rf"(?im)(?:\A|(?<=\n)(?:.*[,;\t|])?){name}(?:[,;\t|:=(]|\s\s)(.+)"
    for path in _read_headers(folder, table.parent):
        with suppress(Exception):  # a file whose later lines cannot be read is left out
            if path != table and path.stat().st_size < MAX_CODEBOOK:
                text = tables.open_table(path)[0].getvalue()
                text = re.sub('"[^"]{,1000}"', lambda cell: cell[0].replace("\n", "; "), text)
                lines = re.findall(pattern, text)
                yield from (*lines, " | ".join(lines))  # a line a code, perhaps


def find_morphometry(cohort: str | Path, table: str | Path | None = None) -> Path | None:
    """Return `table` if one is named, or the first of `MORPHOMETRY_NAMES` in a cohort's folder."""
    paths = [Path(cohort) / name for name in MORPHOMETRY_NAMES]
    return Path(table) if table else next((path for path in paths if path.is_file()), None)


def spell_ids(ids: Iterable[object], others: Iterable[str]) -> list[str]:
    """Spell IDs as `others` do where they mean the same subjects; else as `subject_id` does."""
    spelling = {compare_id(other): other for other in others}
    return [spelling.get(compare_id(name), tables.subject_id(name)) for name in ids]


def find_id_column(
    table: Path, rows: pd.DataFrame, parts: set[str], spans: set[str]
) -> tuple[str, pd.DataFrame]:
    """Return the column of IDs, by its name or by the values that stand in paths, and the rows.

    `parts` and `spans` are those of `layouts.split_paths`. Where they have more than twice as many
    values of another column than of the one named as IDs are, that is taken, unless a person has
    several of its values, as of images, or several people one, as a site. Blanks are filled from
    other rows of the same ID, as of another event, where these agree.
    """
    named, counts = match_columns(rows, "Subject"), _count_known(rows, parts, spans)
    best, named = max(counts, key=counts.get), named[0] if len(named) == 1 else None
    if not named and not counts[best][0]:
        named = tables.find_column(table, rows, "Subject")
    pairs = rows[[named or best, best]].dropna().drop_duplicates()
    several = pairs.iloc[:, 0].duplicated().any() or pairs.iloc[:, 1].duplicated().any()
    best = named if named and (several or 2 * counts[named][0] >= counts[best][0]) else best
    if best != named:
        print(f"{table.name}: IDs, by column {best}, whose values stand in the paths")
    return best, _fill_blanks(rows, named or best).dropna(subset=best)


def _fill_blanks(rows: pd.DataFrame, person: str) -> pd.DataFrame:
    """Fill a person's blanks from other rows of the same, where those agree."""
    repeated = rows[rows[person].duplicated(keep=False) & rows[person].notna()]
    if repeated.empty:
        return rows
    people = repeated.drop(columns=match_columns(rows, "Age")).groupby(person)
    return rows.fillna(people.transform("first").where(people.transform("nunique") == 1))


def _count_known(
    rows: pd.DataFrame, parts: set[str], spans: set[str]
) -> dict[str, tuple[int, ...]]:
    """Count each column's values in `spans`, those in `parts`, and their characters; less rows."""
    named, counts = match_columns(rows, "Subject"), {}
    counters = [[str(n + start) for n in range(len(rows))] for start in (0, 1)]
    for column in dict.fromkeys([*named, *rows.columns[:200]]):  # IDs stand among the first
        ids = {compare_id(value) for value in rows[column].dropna().unique()}
        known = {key for key in ids & spans if len(key) > 2 or key in parts}
        known = known if column in named or rows[column].tolist() not in counters else set()
        counts[column] = len(known), len(known & parts), sum(map(len, known)), -len(rows)
    return counts
