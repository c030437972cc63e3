"""Tables of people and measures, whatever their naming, and IDs in one form everywhere."""

import csv
import io
import os
import re
import unicodedata
import warnings
import zipfile
from collections.abc import Iterable, Sequence
from decimal import Decimal
from itertools import islice, zip_longest
from pathlib import Path

import numpy as np
import pandas as pd

from brainsex import storage

MAX_TITLE_LINES, MAX_LINE, MAX_UNKNOWN_SHARE = 30, 1 << 16, 0.1
"""Lines among which a header is looked for, their characters, people of neither sex's code."""
MAX_WORKBOOK, UTF_16_MARKS = 1 << 28, (b"\xff\xfe", b"\xfe\xff")  # bytes, inflated
INVALID_ID_CHARACTERS, MAX_ID_LENGTH = r"[/\\\x00-\x1f\x7f]", 200  # IDs become file names
SESSION_ENDS = "first", "last"  # sessions: those of each person
SESSION_SUFFIX = r"[_-](ses(?:sion)?-?\d+)"  # of an ID or of a folder that is called by one
SYNONYMS = {  # of HCP's columns, in any case, as BIDS, UK Biobank, OASIS, REDCap … name them
    "Subject": r"(sub|subj|subject|sujet|participant|patient|proband|pbn|case|record|src_subject)"
    r"([ _.-]?(id|key|code|name|label|number|no|nr))?|twin[ _.-]?(id|code|no|nr)|eid|id|iid|mrn"
    r"|ptid|ixi_id|measure:.*|[lr]h\.aparc\S*",
    "Gender": r"sex|gender|m/f|f/m|(f\.|p)?31([-.]0\.0)?|female|male",
    "Age": r"(f\.|p)?21003.*|(age|alter)([ _.]?(at|in)?[ _.]?(scan|years|yrs|y))?( ?\(.*\))?",
    "session": r"(redcap_)?(ses|session|visit|event|timepoint|wave)([ _.]?(id|name|label))?",
    "Family_ID": r"(rel_)?(fam(ily|ilie|ille)?|sib(ling|ship)?|søsken|pedigree|mother|家系)"
    r"[ _.]?(user_def_)?(id|no|nr|number|code|group|gruppe|pair|番号)?",
}
SEX_WORD_IN_NAME = (
    r"(?<![^\W\d_])(?<!same_)(?:sexe?|sexo|(?:pt)?gender|g[eé]nero|geschl|geschlecht|kj[oø]nn|k[öo]n"
    r"|køn|geslacht|sukupuoli|p[lł]e[cć])(?![^\W\d_])|性别|性別|성별"
)
WOMAN = """f female w woman girl weiblich frau mädchen femme fille kvinne kvinna k vrouw meisje
    mujer niña femenino femenina feminino femminile nainen 女 女性 여"""
MAN = """m male man boy männlich mann junge homme garçon mies jongen hombre varón niño masculino
    masculina maschile 男 男性 남"""
SEX_WORDS = dict.fromkeys(WOMAN.split(), 0) | dict.fromkeys(MAN.split(), 1)
SEX_CODES = ({"0": 0, "1": 1}, {"1": 1, "2": 0}, SEX_WORDS, {"f": 0, "h": 1})
"""UK Biobank's, ISO 5218's, words, and femme and homme."""
MISSING = {"", "9", "-9", "99", "999", "n/a", "na", "nan", "-", ".", "unknown"}


def subject_id(text: object) -> str:
    """Return an ID as it is meant: of ``sub-01_ses-2`` ``01``, of 9.00106E+05 ``900106``."""
    name = unicodedata.normalize("NFKC", str(text)).strip().rstrip("/")  # full-width letters, too
    name = re.sub(rf"(?i)^sub[-_](?=.)|(?<=.){SESSION_SUFFIX}$", "", name)
    name = name.replace("NDAR_INV", "NDARINV")  # ABCD's tables have the line, its files not
    number = re.fullmatch(r"\d+\.0*|\d(\.\d+)?[eE]\+\d\d?", name) and Decimal(name)
    return str(int(number)) if number and number == int(number) else name


def compare_id(text: object) -> str:
    """Return the form in which IDs are compared: ``HC_07``, ``hc-7`` and ``HC7`` are one."""
    words = re.findall(r"\d+|[^\W\d_]+", subject_id(text).casefold())
    return " ".join(word.lstrip("0") or "0" if word.isdecimal() else word for word in words)


def cohort_name(folder: str | Path) -> tuple[str, bool]:
    """Return a cohort's name, with the word synthetic or planted where it is; if synthetic."""
    synthetic, planted = (Path(folder) / "SYNTHETIC").is_file(), Path(folder) / "PLANTED"
    name = Path(os.path.abspath(folder)).name  # a link keeps its own name
    if planted.is_file():
        name += f" (planted, d = {storage.read_json(planted)['effect']:g})"
    return name if not synthetic or "synthetic" in name else f"{name} (synthetic)", synthetic


def index_subjects(
    table: Path,
    rows: pd.DataFrame,
    column: str,
    used: Sequence[str] | None = None,
    session: str | None = None,
) -> pd.DataFrame:
    """Index a table's rows of a session by its column of IDs; rows without an ID are left out.

    Of a person's rows that agree in the columns `used`, by default all, the first is kept. Raises
    ValueError if the column is missing, or an ID is no file name or has two rows.
    """
    column = find_column(table, rows, column)
    rows = select_session(rows, session).dropna(subset=column)
    rows = rows.assign(**{column: rows[column].map(subject_id)})
    rows = rows.drop_duplicates(column, keep=session) if session in SESSION_ENDS else rows
    rows = rows.drop_duplicates([column, *used] if used else None)
    # NDA's tables say below the header what each column means
    rows = rows.drop(rows.index[:1][rows[column].iloc[:1].str.count(r"\s\S") > 3])
    return rows.set_index(check_subject_ids(table, rows[column])).rename_axis("Subject")


def fill_missing_families(families: pd.Series) -> np.ndarray | None:
    """Return family IDs (N,) str, own ones where unknown, of a Series by subject; None if empty."""
    own_ids = pd.Series("subject " + families.index.astype(str), families.index)
    return None if families.isna().all() else families.fillna(own_ids).to_numpy(str)


def open_table(table: Path, size: int = -1) -> tuple[io.StringIO, dict]:
    """Return a table's text, perhaps only its first bytes, and how pandas reads it.

    The header is the first line with more than half of the cells filled and as many cells as most
    lines have, or one fewer, but no ``##`` before. Comma, semicolon or tab separate cells. The
    encoding is UTF-8, UTF-16 or Windows-1252. Of an Excel workbook the first sheet is read. A
    repeated name gets " (2)" appended. Without a header, a column of F and M is named sex.
    """
    with table.open("rb") as stream:
        content = stream.read(size)
    if content.startswith(b"PK\3\4"):
        if sum(info.file_size for info in zipfile.ZipFile(table).infolist()) > MAX_WORKBOOK:
            raise ValueError(f"a workbook of more than {MAX_WORKBOOK >> 20} MB")
        lines = MAX_TITLE_LINES if size > 0 else None
        sheet = pd.read_excel(table, header=None, dtype=str, nrows=lines, engine="openpyxl")
        content = sheet.to_csv(index=False, header=False).encode()
    elif b"\0" in content and content[:2] not in UTF_16_MARKS:
        raise ValueError("binary")
    content = content[: content.rfind(b"\n") + 1] if len(content) == size else content
    try:
        marked = content[:2] in UTF_16_MARKS
        text = content.decode(*(("utf-16", "ignore") if marked else ("utf-8-sig",)))
    except UnicodeDecodeError:  # as Excel encodes text in the West
        text = content.decode("cp1252", errors="replace")
    file = io.StringIO(text, newline=None)
    lines, looks = [line[:MAX_LINE] for line in islice(file, MAX_TITLE_LINES)], []
    for separator in ",;\t":
        rows = [*csv.reader(lines, delimiter=separator)] or [[]]
        widths = [len(row) for row in rows if row] or [0]
        width = max(set(widths), key=widths.count)
        filled = [sum(map(bool, r)) * (len(r) >= width - 1 and r[:1] != ["##"]) for r in rows]
        start = next((n for n, count in enumerate(filled) if 2 * count > max(filled)), 0)
        looks.append((width < 2, -widths.count(width), start, -width, separator, rows[start:][:4]))
    *_, start, _, separator, (header, *people) = min(looks)
    file.seek(0)
    names = pd.Series(header, dtype=str).str.strip()
    letters = [bool(people) and {*cells} <= {*"FMfm"} for cells in zip_longest(header, *people)]
    names = names.mask(np.array(letters[: len(names)], bool), "sex")  # a table without a header
    repeats = names.groupby(names).cumcount() + 1
    names = names.where(repeats == 1, names + " (" + repeats.astype(str) + ")")
    options = {"sep": separator, "dtype": str, "skip_blank_lines": False}
    return file, options | {"header": None, "skiprows": start + (not any(letters)), "names": names}


def read_text_table(table: str | Path) -> pd.DataFrame:
    """Read a table's cells as text, NaN where blank, as `open_table` tells columns apart.

    Decimal commas become points. Of HCP's columns of the left cerebellum that stand twice, the
    second is named as the right one's. Raises FileNotFoundError, or ValueError if the file is not
    text in columns.
    """
    table = Path(table)
    with storage.reading(table, "a CSV table", "export it again"), warnings.catch_warnings():
        warnings.simplefilter("error", pd.errors.ParserWarning)  # of cells beyond the header
        file, options = open_table(table)
        rows = pd.read_csv(file, index_col=False, **options)
    if options["sep"] == ";":
        rows = rows.replace(r"^\s*([-+]?\d*),(\d+(?:[eE][-+]?\d+)?)\s*$", r"\1.\2", regex=True)
    names = rows.columns.str.replace(r"^FS_L_(Cerebellum\w*) \(2\)$", r"FS_R_\1", regex=True)
    if (renamed := (~names.isin(rows.columns)).sum()) and names.is_unique:
        mistake = f"{renamed} columns FS_L_Cerebellum… stand twice, by HCP's mistake"
        print(f"{table.name}: {mistake}: the second is taken for the right, FS_R_Cerebellum…")
        rows.columns = names
    return rows


def select_session(rows: pd.DataFrame, session: str | None) -> pd.DataFrame:
    """Keep a table's rows of a session, where one is named and some row has it."""
    if session not in (None, *SESSION_ENDS) and len(columns := match_columns(rows, "session")) == 1:
        visits = rows[columns[0]].str.strip().str.removeprefix("ses-")
        chosen = visits == session.removeprefix("ses-")
        rows = rows[chosen] if chosen.any() else rows
    return rows


def check_subject_ids(path: str | Path, column: pd.Series) -> np.ndarray:
    """Return a column's `subject_id` (N,) str; ValueError if blank, repeated or no file name."""
    names = column.fillna("").map(subject_id).astype(str)
    invalid = names.str.contains(INVALID_ID_CHARACTERS) | ~names.str.len().between(1, MAX_ID_LENGTH)
    invalid |= names.map(compare_id).duplicated()  # case, separators and leading zeros aside
    if invalid.any():
        line = names.index[invalid][0]
        expected = f"{column.name} of 1 to {MAX_ID_LENGTH} characters without / and \\"
        problem = f"expected {expected}, in one row, found {names[line]!r:.100}"
        raise ValueError(f"{path}: line {line + 2}: {problem}; choose a visit by --session")
    return names.to_numpy(str)


def read_sex(
    table: Path, rows: pd.DataFrame, name: str, codebooks: Iterable[str] = ()
) -> pd.Series:
    """Return the column `name` of a table as F and M, other codes as they are; print the coding.

    Codes mean what the column's name or a codebook says, where one does. Raises ValueError if
    there is no such column, or if its codes do not tell the sexes apart.
    """
    cells = rows[find_column(table, rows, name)].str.strip()
    cells, codebooks = (cells.rename(name), ()) if "=" in name else (cells, codebooks)
    sexes = decode_sex(cells, codebooks)
    letters = sexes.map({0: "F", 1: "M"})
    coding = ", ".join((cells + " is " + letters).dropna().unique())
    unknown = sorted(set(cells[letters.isna()].dropna()))
    if letters.nunique() < 2 and (unknown or coding[:1].isdigit()):
        problem = f"expected M and F, words, 0 and 1 (men), or 1 (men) and 2, found {unknown[:9]}"
        raise ValueError(f"{table}: column {cells.name}: {problem} ({coding or 'none known'})")
    print(f"{table.name}: sex, by column {cells.name}: {coding}")
    if coding[:1].isdigit() and not sexes.attrs["stated"]:
        swapped = coding.replace(" is F", "=male").replace(" is M", "=female")
        print(f'WARNING: no codebook says so; if it is reversed: --sex "{cells.name} ({swapped})"')
    return letters.fillna(cells)


def decode_sex(column: pd.Series, codebooks: Iterable[str] = ()) -> pd.Series:
    """Return 0 (women) and 1 (men) of a column of `SEX_CODES`; NaN where blank or unknown.

    What its name, ``female`` or ``sex (1=f, 2=m)``, or else a codebook says goes before.
    """
    cells = column.str.strip().str.lower().str.replace(r"\.0+$", "", regex=True)
    present, name = set(cells.dropna()) - MISSING, str(column.name).lower()
    own = _stated_codes(name)
    if name in SEX_WORDS and len(name) > 1:
        own = [{"1": SEX_WORDS[name], "0": 1 - SEX_WORDS[name]}]
    stated = own + [codes for text in codebooks for codes in _stated_codes(text)]

    def known_share(codes: dict) -> float:
        return cells.dropna().isin([*codes, *MISSING]).mean()

    stated = [codes for codes in stated if {0, 1} <= {*codes.values()}]
    known = [codes for codes in stated if known_share(codes) >= 1 - MAX_UNKNOWN_SHARE]
    if not known and any(present & set(codes) for codes in own):
        problem = f"expected codes as in sex (1=f, 2=m), found {sorted(present)[:9]}"
        raise ValueError(f"column {column.name}: {problem}; rename it if it says no codes")
    if any(known[0].get(cell) != codes.get(cell) for codes in known for cell in present):
        raise ValueError(f"column {column.name}: codebooks say {known}; keep one")
    usual = max(SEX_CODES, key=known_share)
    usual = usual if known_share(usual) >= 1 - MAX_UNKNOWN_SHARE else {}
    sexes = cells.map(SEX_WORDS | (known[0] if known else usual))
    sexes.attrs["stated"] = bool(known)
    return sexes


def _stated_codes(text: str) -> list[dict[str, int | None]]:
    """Return what codes may mean by a text: ``1=f``, ``f=1``, ``1 f`` or ``f 1``; None: no sex."""
    word, code, quote = r"([^\W\d_]+)", r"(?<![\d.])(\d+)(?:\.0+)?", r"[\"']?"
    forms = rf"{code}{quote} *[=:-] *{quote}{word}", rf"{word}{quote} *[=:] *{code}"
    forms += rf"{code}{quote}[,;\t]? *{quote}{word}", rf"{word} +{code}"
    # the code of each pair first: digits are sorted before letters
    pairs = ([sorted(pair) for pair in re.findall(form, text.lower())] for form in forms)
    return [{c: SEX_WORDS.get(w.removesuffix("s")) for c, w in reversed(form)} for form in pairs]


def match_columns(columns: Iterable[str], name: str) -> list[str]:
    """Return the columns of that name, in any case, or its `SYNONYMS`; of sex, with the word in."""
    names = pd.Series([*columns], dtype=str)
    plain = names.str.replace(r" \(\d+\)$", "", regex=True)  # of repeated columns
    name = name if (plain == name).any() else re.sub(r" *\([^(]*=.*\)$", "", name)  # codes
    exact, alike = plain == name, plain.str.lower() == name.lower()
    other = plain.str.fullmatch(SYNONYMS.get(name, re.escape(name)), case=False)
    worded = plain.str.contains(SEX_WORD_IN_NAME if name == "Gender" else "(?!)", case=False)
    hits = next((hit for hit in (exact, alike, other, worded) if hit.any()), worded)
    return names[hits].to_list()


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
