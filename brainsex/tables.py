"""Tables of people and measures, of any encoding and naming, and IDs in one form everywhere."""

import os
import re
import warnings
from collections.abc import Iterable
from contextlib import suppress
from decimal import Decimal
from pathlib import Path

import numpy as np
import pandas as pd

from brainsex import storage

INVALID_ID_CHARACTERS, MAX_ID_LENGTH = r"[/\\\x00-\x1f\x7f]", 200  # IDs become file names
SYNONYMS = {  # of HCP's columns, in any case, as BIDS, UK Biobank, OASIS, REDCap … name them
    "Subject": r"(sub|subj|subject|participant|patient|proband|pbn|twin|case|record|src_subject)"
    r"([ _.-]?(id|key|code|name|label|number|no|nr))?|eid|id|iid|mrn|ptid|ixi_id|measure:.*"
    r"|[lr]h\.aparc\S*",
    "Gender": r"sex|gender|m/f|f/m|(f\.|p)?31([-.]0\.0)?|female|male",
    "Age": r"(f\.|p)?21003.*|(age|alter)([ _.]?(at|in)?[ _.]?(scan|years|yrs|y))?( ?\(.*\))?",
    "session": r"(redcap_)?(ses|session|visit|event|timepoint|wave)([ _.]?(id|name|label))?",
    "Family_ID": r"(rel_)?fam(ily)?[ _.]?(id|no|nr|number|code)?|pedigree[ _.]?(id|no)?",
}
SEX_WORD_IN_NAME = r"(?<![a-z])(?<!same_)(?:sex|gender|geschl|geschlecht)(?![a-z])"
PEOPLE_NAMES = (  # of tables of people, the likeliest first
    r"(?i)unrestricted_behavioral\.csv",
    r"(?i)(HCP_YA_subjects_|unrestricted_(?!.*freesurfer)).*\.csv",
    r"(?i)participants\.tsv",
)
PEOPLE = {"Age": "age", "QC_Issue": "qc_issue"}  # columns, and the names used here
BESIDE = {  # columns that HCP ships in tables of their own, beside the table of people or in it
    "Family_ID": "group",
    "Age_in_Yrs": "age",  # known in years, it replaces HCP's age bands
    "FS_InterCranial_Vol": "intracranial_volume_ml",  # in mm³ in the file
    "FS_IntraCranial_Vol": "intracranial_volume_ml",
}
OWN_TABLES = ("subjects.csv", "rejected.csv")  # what convert leaves
SEX_WORDS = dict.fromkeys("f female w woman weiblich frau".split(), 0)
SEX_WORDS |= dict.fromkeys("m male man männlich mann".split(), 1)
SEX_CODES = ({"0": 0, "1": 1}, {"1": 1, "2": 0}, SEX_WORDS)  # UK Biobank, ISO 5218, or words
MISSING = {"", "9", "-9", "99", "999", "n/a", "na", "nan", "-", ".", "unknown"}


def subject_id(text: object) -> str:
    """Return an ID as it is meant: of ``sub-01`` ``01``, of 900106.0 and 9.00106E+05 ``900106``."""
    name = re.sub(r"(?i)^sub[-_](?=.)", "", str(text).strip().rstrip("/"))
    name = name.replace("NDAR_INV", "NDARINV")  # ABCD's tables have the line, its files not
    number = re.fullmatch(r"\d+\.0*|\d(\.\d+)?[eE]\+\d\d?", name) and Decimal(name)
    return str(int(number)) if number and number == int(number) else name


def compare_id(text: object) -> str:
    """Return the form in which IDs are compared: ``HC_07``, ``hc-7`` and ``HC7`` are one."""
    words = re.findall(r"\d+|[^\W\d_]+", subject_id(text).casefold())
    return " ".join(word.lstrip("0") or "0" if word.isdecimal() else word for word in words)


def spell_ids(ids: Iterable[object], others: Iterable[str]) -> list[str]:
    """Spell IDs as `others` do where they mean the same subjects; else as `subject_id` does."""
    spelling = {compare_id(other): other for other in others}
    return [spelling.get(compare_id(name), subject_id(name)) for name in ids]


def cohort_name(folder: str | Path) -> tuple[str, bool]:
    """Return a cohort's name, with the word synthetic or planted where it is; if synthetic."""
    synthetic, planted = (Path(folder) / "SYNTHETIC").is_file(), Path(folder) / "PLANTED"
    name = Path(os.path.abspath(folder)).name  # a link keeps its own name
    if planted.is_file():
        name += f" (planted, d = {storage.read_json(planted)['effect']:g})"
    return name if not synthetic or "synthetic" in name else f"{name} (synthetic)", synthetic


def find_people(folder: str | Path, *, subject: str | None = None, sex: str | None = None) -> Path:
    """Find a cohort's one table of people: HCP's, BIDS's, or the only one with IDs and sexes.

    `subject` and `sex` name its columns. Raises FileNotFoundError if there is none, or several.
    """
    headers, wanted = _find_headers(folder), (subject or "Subject", sex or "Gender")
    named = [[path for path in headers if re.fullmatch(name, path.name)] for name in PEOPLE_NAMES]
    full = [path for path in headers if all(match_columns(headers[path], name) for name in wanted)]
    sexed = [path for path in headers if match_columns(headers[path], wanted[1])]
    excel = sorted(Path(folder).glob("*.xls*"))
    paths = next(filter(None, (*named, full, sexed, [*headers])), excel)
    if len(paths) != 1 or paths[0] not in headers:
        names = [path.name for path in paths]
        problem = f"expected one table with columns {' and '.join(wanted)}, found {names or 'none'}"
        remedy = "name a CSV by --table, columns by --subject and --sex; see DATA_ACCESS.md"
        raise FileNotFoundError(f"{folder}: {problem}; {remedy}")
    return paths[0]


def read_people(
    table: str | Path,
    *,
    subject: str | None = None,
    sex: str | None = None,
    session: str | None = None,
    known: tuple[set[str], set[str]] = (set(), set()),
) -> pd.DataFrame:
    """Read a table of people, and the columns `BESIDE` of it and of the tables in its folder.

    `subject` and `sex` name its columns where neither their names nor the `known` parts of paths
    tell, as by `find_id_column`; `session` chooses among rows. The result is indexed by
    Subject (str) and has Gender (F, M) and, where known, ``age`` (years, or HCP's age band),
    ``qc_issue``, ``intracranial_volume_ml`` and ``group`` (family ID). The codes of sex are
    printed. Raises FileNotFoundError, or ValueError if a column is missing or a subject has two
    rows.
    """
    table = Path(table)
    rows = read_text_table(table)
    if subject is None:
        subject, rows = find_id_column(table, rows, *known, session)
    rows = index_subjects(table, select_session(rows, session), subject)
    people = read_sex(table, rows, sex or "Gender").to_frame("Gender")
    _add_columns(people, table, rows, PEOPLE | BESIDE)
    return join_beside(people, table.parent, table, subject, session)


def join_beside(
    people: pd.DataFrame,
    folder: Path,
    table: Path | None = None,
    subject: str | None = None,
    session: str | None = None,
) -> pd.DataFrame:
    """Join the columns `BESIDE` of the tables in a folder, but `table`, to people, by ID.

    A table that knows fewer than half of the people is named in a line. Raises ValueError if two
    tables have the same column.
    """
    headers = {path: names for path, names in _find_headers(folder).items() if path != table}
    for column, name in BESIDE.items():
        paths = [path for path, names in headers.items() if match_columns(names, column)]
        if len(paths) > 1:
            names = [path.name for path in paths]
            raise ValueError(f"{folder}: expected one table with {column}, found {names}: keep one")
        for path in paths:
            rows, keys = read_text_table(path, session), {*map(compare_id, people.index)}
            id_column = subject if subject in rows else find_id_column(path, rows, keys, keys)[0]
            rows = index_subjects(path, rows, id_column)
            rows.index = spell_ids(rows.index, people.index)
            _add_columns(people, path, rows, {column: name})
            known = people.index.isin(rows.index).sum()
            if 2 * known < len(people):
                print(f"WARNING: {path.name} has {column} of {known} of {len(people)}: compare IDs")
    return people


def _add_columns(people: pd.DataFrame, table: Path, rows: pd.DataFrame, columns: dict) -> None:
    """Add those columns of rows (by Subject) that there are, under their new names, to people."""
    for column, name in columns.items():
        if len(matches := match_columns(rows, column)) > 1:
            print(
                f"WARNING: {table.name}: {', '.join(matches)}: several columns {column}, not read"
            )
        elif matches:
            values = rows[matches[0]].reindex(people.index)
            if name == "group":
                values = values.mask(values.str.strip().str.lower().isin({*MISSING, "0"}))
            if name == "intracranial_volume_ml":
                with storage.reading(table, "numbers as intracranial volumes", "correct the cells"):
                    values = values.astype(float) / 1000
            people[name] = values.combine_first(people.get(name, values))


def index_subjects(table: Path, rows: pd.DataFrame, column: str) -> pd.DataFrame:
    """Index a table's rows by its column of IDs, without those of nobody and repeats of a row.

    Raises ValueError if the column is missing, or an ID is no file name or has two rows.
    """
    column = find_column(table, rows, column)
    rows = rows.dropna(subset=column).drop_duplicates()
    meaning = r"\S+\s+\S+\s+\S+\s+\S"  # as NDA's tables say below the header what a column means
    rows = rows[~rows[column].str.contains(meaning)]
    return rows.set_index(check_subject_ids(table, rows[column])).rename_axis("Subject")


def _find_headers(folder: str | Path) -> dict[Path, pd.Series]:
    """Return the columns of each table in a folder that people may have put there."""
    headers = {}
    for path in sorted(Path(folder).glob("[!.]*")):
        if path.suffix.lower() in (".csv", ".tsv", ".txt") and path.name not in OWN_TABLES:
            with suppress(ValueError, OSError):
                headers[path] = storage.open_table(path)[1]["names"]
    return headers


def fill_missing_families(families: pd.Series) -> np.ndarray | None:
    """Return family IDs (N,) str, own ones where unknown, of a Series by subject; None if empty."""
    own_ids = pd.Series("subject " + families.index.astype(str), families.index)
    return None if families.isna().all() else families.fillna(own_ids).to_numpy(str)


def read_text_table(table: str | Path, session: str | None = None) -> pd.DataFrame:
    """Read a table's cells as text, NaN where blank, as `storage.open_table` tells columns apart.

    Decimal commas become points. Of HCP's columns of the left cerebellum that stand twice, the
    second is named as the right one's. A `session` keeps its rows, where a column has sessions.
    Raises FileNotFoundError, or ValueError if the file is not text in columns.
    """
    table = Path(table)
    with storage.reading(table, "a CSV table", "export it again"), warnings.catch_warnings():
        warnings.simplefilter("error", pd.errors.ParserWarning)  # of cells beyond the header
        file, options = storage.open_table(table)
        rows = pd.read_csv(file, index_col=False, **options)
    if options["sep"] == ";":
        rows = rows.replace(r"^\s*([-+]?\d*),(\d+(?:[eE][-+]?\d+)?)\s*$", r"\1.\2", regex=True)
    names = rows.columns.str.replace(r"^FS_L_(Cerebellum\w*) \(2\)$", r"FS_R_\1", regex=True)
    if (renamed := (~names.isin(rows.columns)).sum()) and names.is_unique:
        mistake = f"{renamed} columns FS_L_Cerebellum… stand twice, by HCP's mistake"
        print(f"{table.name}: {mistake}: the second is taken for the right side, FS_R_Cerebellum…")
        rows.columns = names
    return select_session(rows, session)


def select_session(rows: pd.DataFrame, session: str | None) -> pd.DataFrame:
    """Keep a table's rows of a session, where one is named and a column has sessions."""
    if session is not None and len(columns := match_columns(rows, "session")) == 1:
        sessions = rows[columns[0]].str.strip().str.removeprefix("ses-")
        rows = rows[sessions == session.removeprefix("ses-")]
    return rows


def check_subject_ids(path: str | Path, column: pd.Series) -> np.ndarray:
    """Return a column's `subject_id` (N,) str; ValueError if blank, repeated or no file name."""
    names = column.fillna("").map(subject_id).astype(str)
    invalid = names.str.contains(INVALID_ID_CHARACTERS) | ~names.str.len().between(1, MAX_ID_LENGTH)
    invalid |= names.map(compare_id).duplicated()  # case, separators and leading zeros aside
    if invalid.any():
        line = names.index[invalid][0]
        expected = f"{column.name} of 1 to {MAX_ID_LENGTH} characters without / and \\"
        problem = f"expected {expected}, in no more than one row, found {names[line]!r:.100}"
        raise ValueError(f"{path}: line {line + 2}: {problem}; of several visits: --session")
    return names.to_numpy(str)


def read_sex(table: Path, rows: pd.DataFrame, name: str) -> pd.Series:
    """Return the column `name` of a table as F and M, other codes as they are; print the coding.

    Raises ValueError if there is no such column, or if its codes do not tell the sexes apart.
    """
    cells = rows[find_column(table, rows, name)].str.strip()
    letters = decode_sex(cells).map({0: "F", 1: "M"})
    coding = ", ".join((cells + " is " + letters).dropna().unique())
    unknown = sorted(set(cells[letters.isna()].dropna()))
    if letters.nunique() < 2 and (unknown or coding[:1].isdigit()):
        problem = f"expected M and F, words, 0 and 1 (men), or 1 (men) and 2, found {unknown[:9]}"
        raise ValueError(f"{table}: column {cells.name}: {problem} ({coding or 'none known'})")
    print(f"{table.name}: sex, by column {cells.name}: {coding}")
    return letters.fillna(cells)


def decode_sex(column: pd.Series) -> pd.Series:
    """Return 0 (women) and 1 (men) of a column of `SEX_CODES`; NaN where blank or unknown.

    What its name says of the codes goes before: ``female``, or ``sex (1=f, 2=m)``.
    """
    cells = column.str.strip().str.lower().str.replace(r"\.0+$", "", regex=True)
    present, name = set(cells.dropna()) - MISSING, str(column.name).lower()
    pairs = re.findall(r"(\d+) *[=:-]? *([a-zäö]+)|([a-zäö]+) *[=:] *(\d+)", name)
    stated = {a or d: SEX_WORDS.get((b or c).removesuffix("s")) for a, b, c, d in pairs}
    if name in SEX_WORDS and len(name) > 1:
        stated = {"1": SEX_WORDS[name], "0": 1 - SEX_WORDS[name]}
    if set(stated) & present and (None in stated.values() or not present <= set(stated)):
        problem = f"expected codes as in sex (1=f, 2=m), found {sorted(present)[:9]}"
        raise ValueError(f"column {column.name}: {problem}; rename it if it says no codes")
    known = ({**SEX_WORDS, **stated},) if set(stated) & present else SEX_CODES
    return cells.map(next((codes for codes in known if present <= set(codes)), SEX_WORDS))


def match_columns(columns: Iterable[str], name: str) -> list[str]:
    """Return the columns of that name, in any case, or its `SYNONYMS`; of sex, with the word in."""
    names = pd.Series([*columns], dtype=str)
    plain = names.str.replace(r" \(\d+\)$", "", regex=True)  # of repeated columns
    exact, alike = plain == name, plain.str.lower() == name.lower()
    other = plain.str.fullmatch(SYNONYMS.get(name, re.escape(name)), case=False)
    worded = plain.str.contains(SEX_WORD_IN_NAME if name == "Gender" else "(?!)", case=False)
    hits = next((hit for hit in (exact, alike, other, worded) if hit.any()), worded)
    return names[hits].to_list()


def find_id_column(
    table: Path, rows: pd.DataFrame, parts: set[str], spans: set[str], session: str | None = None
) -> tuple[str, pd.DataFrame]:
    """Return the column of IDs, by its name or by the values that stand in paths, and the rows.

    `parts` and `spans` are those of `layouts.split_paths`. Where they have more values of another
    column than of the one named as IDs are, that is taken, unless it is of a person's several
    images, or of several people, as a site, or counts rows. Blanks are filled from other rows of
    the same ID, as of another event.
    """
    named, merits = match_columns(rows, "Subject"), {}
    columns = dict.fromkeys([*named, *rows.columns[:200]])  # IDs stand among the first
    ids = rows[[*columns]].map(compare_id, na_action="ignore")
    counters = [[str(n + start) for n in range(len(rows))] for start in (0, 1)]
    for column in columns:
        known = {key for key in set(ids[column]) & spans if len(key) > 2 or key in parts}
        known = known if column in named or ids[column].tolist() not in counters else set()
        merits[column] = len(known), len(known & parts), sum(map(len, known))
    best, named = max(merits, key=merits.get), named[0] if len(named) == 1 else None
    if named and merits[named][:2] < merits[best][:2]:
        pairs = ids[[named, best]].dropna().to_numpy()
        within = len(pairs) and all(f" {inner} " in f" {outer} " for inner, outer in pairs)
        several = rows.groupby(named)[best].nunique().max() > 1 or not rows[best].dropna().is_unique
        if not (within or several) and 2 * merits[named][0] >= merits[best][0]:
            raise ValueError(f"{table}: expected one column of IDs, found {named}, {best}; name it")
        best = named if within or several else best
    else:
        best = named or (best if merits[best][0] else find_column(table, rows, "Subject"))
    if best != named:
        print(f"{table.name}: IDs, by column {best}, whose values stand in the paths")
    if session or best != named:
        people = rows.groupby(named or best)
        agreed = people.transform("first").where(people.transform("nunique") == 1)
        rows = rows.fillna(agreed) if session else rows.fillna(agreed)[rows[best].notna()]
    return best, rows


def find_column(table: Path, rows: pd.DataFrame, name: str) -> str:
    """Return the column `name`, or its only synonym; ValueError if there is none, or several."""
    matches = match_columns(rows, name)
    if name == "Gender" and len({tuple(decode_sex(rows[n]).fillna(-1)) for n in matches}) == 1:
        matches = matches[:1]  # of several that say the same
    if len(matches) != 1:
        columns = ", ".join(map("{:.100}".format, matches or rows.columns[:20]))
        problem = f"expected one column {name}, found {columns}; name it (--subject, --sex)"
        raise ValueError(f"{table}: {problem}")
    return matches[0]
