"""What a folder holds, told by the names of its files before any volume is read (notebook 02).

A subject's ID is the part of a path that differs between subjects. `choose_volumes` takes the
volumes for `volumes.convert`; of packages and series a command makes volumes first.
"""

import os
import re
from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase
from functools import cache
from glob import glob
from pathlib import Path

import numpy as np
import pandas as pd

from brainsex import tables
from brainsex.tables import SESSION_ENDS, SESSION_SUFFIX

LABEL = "[0-9A-Za-z+]+"
VOLUME_ENDINGS = (".nii", ".nii.gz", ".mgz")
FIT_FA = "python -m brainsex fa {0} {0}/fa"
EXTRACT_FA = "python -m brainsex extract {0} {0}/fa"
EXTRACT_UKB = "python -m brainsex extract {0} {0}/fa --member dMRI/dMRI/dti_FA.nii.gz"
EXTRACT_T1 = "python -m brainsex extract {0} {0}/t1 --member T1w_acpc_dc_restore_brain.nii.gz"
PACKAGES = {  # kind: modality, how its path ends, and the command that makes volumes of it
    "package": ("series", r"_(3T_Diffusion_preproc|Diffusion3TRecommended)\.zip", FIT_FA),
    "series": ("series", r"(?<!_7T)/data\.nii\.gz", FIT_FA),
    "package-t1": ("t1", r"_(3T_Structural_preproc|StructuralRecommended)\.zip", EXTRACT_T1),
    "package-ukb": ("fa", r"_20250_\d_\d\.zip", EXTRACT_UKB),  # UK Biobank's, by its field
    "archive": ("fa", rf"/(sub-)?{LABEL}([_-]([^/]*[_-])?(FA|DTI)([_-][^/]*)?)?\.zip", EXTRACT_FA),
}
NEXT = (  # what is run on a folder of volumes
    "python -m brainsex convert {0}{2}",
    "python -m brainsex train {0} results/{1}/cnn3d",
    "python -m brainsex masks {0} results/{1}/cnn3d results/{1}/masks",
)
COSTS = {"fa": (90, 4), "extract": (2, 4), "convert": (0.3, 1), "train": (60, 1), "masks": (8, 1)}
"""Rough seconds of a core and MB on disk a subject; of 10 folds and 32 channels (`make bench`)."""
STRIPPED = r"(?i).*(skull_?strip|(_brain|_bet)(?![A-Za-z]))[^/]*"
PREFERRED = {  # how the paths of volumes look that are taken where there are others of a modality
    "fa": (r"fa/[^/]+", r"(.*/)?origdata/[^/]+", r"(.*/)?FA/\*_FA\..*", r".*/dMRI/dMRI/dti_FA\..*"),
    "t1": (r"t1/[^/]+", r"(.*/)?T1w/T1w_acpc_dc_restore_brain\..*", r".*mri/brain\.mgz", STRIPPED),
}
FOLDERS = {"fa": "fa", "origdata": "fa", "t1": "t1"}  # whose volumes are of what modality
NAMES = {
    "fa": r"fa(map)?|(fractional)?anisotropy",
    "t1": r"t1w?|mprage|struct(ural)?|extractedbrain0n4|bfc",
}  # words of names
NO_MAP_WORDS = set("mask mean all skeleton skeletonised template seg dseg probseg labels".split())
SPM_TISSUE = re.compile(r"m0?w[pc][1-7]|[pc][0-7](?=[a-z])")  # how names of tissues begin
SPM_PREFIX = re.compile(r"^[swrum]{1,4}(?=[A-Z0-9])")  # of what SPM and CAT12 have made
WORDS = re.compile(  # parts of paths that are no subject's ID
    r"fa(map)?|t1w?|dti|dwi|dmri|data|diffusion.*|anat|dtifit|tensor|maps?|brain|restore|acpc|dc|to"
    r"|target|mni.*|native|std|origdata|stats|tbss|results|derivatives|mri|metrics|models?|fdt"
    r"|dti_metrics|(ses|space|desc|model|param|mdp|map|run|acq|dir|rec|res|from|mode)-.*|",
    re.IGNORECASE,
)
BIDS = {name: re.compile(rf".*(?<![^/_]){name}-({LABEL})") for name in ("sub", "ses")}
HCP = re.compile(r"(?:.*/)?((?!ses-)[^/]+)/(?:ses-[^/]+/)?T1w/")


def find_files(folder: str | Path, *endings: str) -> list[Path]:
    """Find the files at any depth whose ``/name`` ends in one of `endings`, behind links too.

    Hidden files and folders are left out, and what macOS leaves in archives. A broken link counts,
    a pipe does not; of two links to one file, the first.
    """
    paths, real = [], cache(os.path.realpath)
    for parent, folders, names in os.walk(folder, followlinks=True):
        if real(parent) in map(real, Path(parent).parents):  # a link to a folder above
            folders.clear()
            continue
        folders[:] = (name for name in folders if not name.startswith((".", "__MACOSX")))
        names = (name for name in names if f"/{name}".lower().endswith(endings))
        paths += [Path(parent, name) for name in names if not name.startswith(".")]
    paths = [path for path in sorted(paths, reverse=True) if path.is_file() or not path.exists()]
    return sorted({real(path): path for path in paths}.values())


def split_paths(paths: Iterable[str]) -> tuple[set[str], set[str]]:
    """Return the parts of paths, and all words that follow each other, as IDs are compared."""
    parts, spans = set(), set()
    for path in paths:
        parts |= {tables.compare_id(part.split(".")[0]) for part in path.split("/")}
        spans |= _split_words(path)
    return parts, spans


def _split_words(text: str) -> set[str]:
    """Return all words, and those that follow each other, of a text in the form of `compare_id`."""
    words = tables.compare_id(text).split()
    return {" ".join(words[i:j]) for j in range(len(words) + 1) for i in range(j)}


def name_subjects(
    paths: Sequence[Path], *, pattern: str | None = None, known: Iterable[str] = ()
) -> list[str]:
    """Tell the subject IDs from the paths of a cohort's files.

    BIDS's ``sub-`` and HCP's folders say which part is the ID, and a package's name starts with it.
    Of other paths that are built alike, it is the part that agrees with most of the IDs that are
    `known`, or else differs most. A `pattern` (regular expression, its first group) overrules that;
    files in whose path it finds nothing are nobody's (""). Raises ValueError if that is all of
    them, or if several parts agree with known IDs, but not with each other.
    """
    names, alike = [""] * len(paths), {}
    known = {tables.compare_id(name): name for name in known}
    full_paths = [os.path.abspath(path).replace(os.sep, "/") for path in paths]
    stated = [BIDS["sub"].match(path) or HCP.match(path) for path in full_paths]
    if known and not {tables.compare_id(hit[1]) for hit in stated if hit} & known.keys():
        stated = [None] * len(paths)  # of a folder above, perhaps
    for n, path in enumerate(full_paths):
        hit = re.search(pattern, path) if pattern else stated[n]
        *folders, name = path.split("/")
        if hit:
            names[n] = next((group for group in hit.groups() if group), hit[0])
        elif pattern:  # nobody's
            continue
        elif name.lower().endswith(".zip"):
            names[n] = re.match(f"({LABEL})?", name)[0]
        else:
            fields = [*folders, *re.sub(r"(?i)(\.nii)?\.(gz|nii|mgz)$", "", name).split("_")]
            free = tuple(not WORDS.fullmatch(field) for field in fields)
            alike.setdefault((len(folders), free), []).append((n, fields))
    if pattern and not any(names):
        raise ValueError(f"expected IDs that --id {pattern} finds, found none as in {paths[0]}")
    for (depth, free), members in alike.items():
        rows, columns = zip(*members)
        for n, name in zip(rows, _tell_apart(np.array(columns), np.array(free), depth, known)):
            names[n] = name
    return [tables.subject_id(name.replace("/", "_")) for name in names]


def _tell_apart(
    columns: np.ndarray, free: np.ndarray, depth: int, known: dict[str, str]
) -> list[str]:
    """Return the IDs (N,) among the parts of paths (N, parts); ValueError if two are as likely.

    The first `depth` parts are folders, the others words of the file's name, which may be joined;
    `free` (parts,) are no `WORDS`. The part wins that has most known IDs, then is no part of a
    name, then has fewest others; if none is known, most different ones.
    """
    differs, choices = (columns != columns[0]).any(0), []
    for allowed in (differs & free, free, np.ones(len(free), bool)):
        places = np.flatnonzero(allowed)
        words, folders = places[places >= depth], places[places < depth][::-1]
        for k in (words, *folders[:, None], *words[::-1, None]):
            choices += [["_".join(row) for row in columns[:, k]]] if len(k) else []
    choices += [[_known_within(name, known) for name in choice] for choice in choices]
    joined = [_known_within("_".join(row), known) for row in columns[:, differs]]  # of two folders
    choices += [joined] if {*map(tables.compare_id, joined)} & known.keys() else []
    keys = [list(map(tables.compare_id, choice)) for choice in choices]
    counts = [(len(set(key) & known.keys()), len(set(key))) for key in keys]
    merits = [(c, n < len(keys) // 2, -d if c else d) for n, (c, d) in enumerate(counts)]
    best = max(merits)
    for n, row in enumerate(zip(*(k for k, merit in zip(keys, merits) if merit[0] == best[0]))):
        if len(rivals := dict.fromkeys(known[key] for key in row if key in known)) > 1:
            problem = f"expected one ID, found {' or '.join(rivals)}; --id REGEX says which"
            place = f"{'/'.join(columns[n, :depth])}/{'_'.join(columns[n, depth:])}"
            raise ValueError(f"{place}: {problem}")
    ids = choices[merits.index(best)]
    if merits.index(best) >= len(choices) // 2 and ids[0].isdecimal():
        place = "/".join(columns[0])[-50:]
        print(f"WARNING: IDs are taken from within names: is {ids[0]} meant by {place}?")
    return ids


def _known_within(name: str, known: dict[str, str]) -> str:
    """Return the only one of the `known` IDs that a name has within, as whole words; else it."""
    spans = (_split_words(name) | _split_words(SPM_PREFIX.sub("", name))) & known.keys()
    longest = max(spans, key=len, default="")
    nested = all(f" {span} " in f" {longest} " for span in spans)
    return known[longest] if spans and nested else name


def find_volumes(
    folder: str | Path, *, pattern: str | None = None, known: Iterable[str] = ()
) -> pd.DataFrame:
    """Find what `folder` holds of each subject, at any depth. No volume is read.

    Each volume, series or package is a row: Subject, as `name_subjects` tells it; session; kind, a
    key of `PACKAGES`, or the path with * for subject and session; modality (fa, t1, series; "" if
    the name does not tell); and path. Raises FileNotFoundError if nothing is there.
    """
    folder, rows = Path(folder), []
    paths = find_files(folder, *VOLUME_ENDINGS, ".zip")
    for subject, path in zip(name_subjects(paths, pattern=pattern, known=known), paths):
        below = path.relative_to(folder).as_posix()
        session = hit[1] if (hit := BIDS["ses"].match(below)) else ""
        kind, modality = _describe(f"{Path(os.path.abspath(folder)).name}/{below}")
        if not kind:
            kind = below.replace(f"ses-{session}", "ses-*") if session else below
            varying = rf"(?<![0-9A-Za-z]){re.escape(subject)}(?![0-9A-Za-z])|\d{{4,}}"  # as times
            kind = re.sub(rf"{varying}|(?<=sub-)[0-9A-Za-z]+", "*", kind)
        if subject and (modality or path.suffix.lower() != ".zip"):
            rows.append((subject, session, kind, modality, path))
    if not rows:
        expected = "expected volumes (NIfTI, .mgz), packages or archives, at any depth"
        raise FileNotFoundError(f"{folder}: {expected}, found none; see DATA_ACCESS.md")
    files = pd.DataFrame(rows, columns=["Subject", "session", "kind", "modality", "path"])
    files.attrs["folder"] = str(folder)
    return files


def _describe(path: str) -> tuple[str, str]:
    """Return the kind, if it is one of `PACKAGES`, and the modality of a path, "" if unknown."""
    for kind, (modality, ending, _) in PACKAGES.items():
        if re.search(f"(?i){ending}$", f"/{path}"):
            return kind, modality
    *folders, name = path.lower().split("/")
    words = set(re.split(r"[\W_]+", re.sub("space-[^_]+", "", name)))  # a space is no modality
    words |= {"t1"} if name == "brain.mgz" else set()
    if words & NO_MAP_WORDS or SPM_TISSUE.match(name) or "7t" in re.split("[/_]", path.lower()):
        return "", ""
    for modality, pattern in NAMES.items():
        if any(re.fullmatch(pattern, word) for word in words):
            return "", modality
    return "", FOLDERS.get(folders[-1] if folders else "", "")


def summarise_layout(files: pd.DataFrame, people: pd.DataFrame | None) -> pd.DataFrame:
    """Count the subjects of each kind in `find_volumes`, and what is missing, of `people`.

    Each kind is a row: modality; subjects; of these ``several`` (volumes, as of two sessions),
    ``no row`` (in the table of people); ``rows without`` (people who have none).
    """
    kinds = files[files["modality"] != ""].groupby("kind", sort=False)
    summary = kinds.agg(modality=("modality", "first"), subjects=("Subject", "nunique"))
    summary["several"] = kinds["Subject"].agg(lambda ids: ids[ids.duplicated()].nunique())
    if people is not None:
        known = set(map(tables.compare_id, people.index))
        subjects = kinds["Subject"].agg(lambda ids: set(map(tables.compare_id, ids)))
        summary["no row"] = subjects.map(lambda ids: len(ids - known))
        summary["rows without"] = subjects.map(lambda ids: len(known - ids))
    return summary


def next_commands(files: pd.DataFrame, cores: int, options: str = "") -> list[str]:
    """Return what to run after `find_volumes`, each command with the time and room it takes.

    `options` are those of ``survey``, which ``convert`` needs, too.
    """
    files, folder = files[files["modality"] != ""], Path(files.attrs["folder"])
    packages = [kind for kind in PACKAGES if kind in set(files["kind"])]
    only_packages = files["kind"].isin(packages).all()
    first = dict.fromkeys(PACKAGES[kind][-1] for kind in packages if only_packages)
    lines, count = [], files["Subject"].nunique()
    for command in (*first, *NEXT):
        seconds, megabytes = COSTS[command.split()[3]]
        hours, gigabytes = count * seconds / cores / 3600, count * megabytes / 1000
        line = command.format(folder.as_posix(), Path(os.path.abspath(folder)).name, options)
        lines.append(f"  {line}  # {hours:.2f} hours, {gigabytes:.1f} GB")
    return lines


def choose_volumes(
    files: pd.DataFrame,
    *,
    kind: str | None = None,
    session: str | None = None,
    match: str | None = None,
) -> pd.DataFrame:
    """Choose the rows of `find_volumes` for `volumes.convert`: volumes of one modality.

    `kind` is fa, or t1 where there is no FA, by default; `session` keeps one session, or of each
    subject the ``first`` or ``last``, and `match` the names or paths that fit a pattern. Otherwise
    volumes of a `PREFERRED` path are taken, where there are some. Raises ValueError if no volume is
    left, if most subjects have several, or if most have others only.
    """
    chosen = files[~files["kind"].isin(list(PACKAGES))]
    if match is not None:
        chosen = chosen[[fnmatchcase(f"/{p.as_posix()}", f"*/{match}") for p in chosen["path"]]]
    if session not in (None, *SESSION_ENDS):  # a part of paths, or else of the table's rows
        below = [path.relative_to(files.attrs["folder"]) for path in chosen["path"]]
        suffixes = [re.findall(f"(?i){SESSION_SUFFIX}(?=[_/])", p.as_posix()) for p in below]
        parts = [{*p.parts[:-1], *p.name.split("_")[:-1], *s} for p, s in zip(below, suffixes)]
        in_session = np.array([bool({session, f"ses-{session}"} & names) for names in parts], bool)
        chosen = chosen[in_session] if in_session.any() or any(files["session"]) else chosen
    kind = kind or next((name for name in NAMES if name in set(chosen["modality"])), "fa")
    others = match is not None and kind not in set(chosen["modality"])  # whatever their names
    chosen = chosen[chosen["modality"].isin([kind, ""] if others else [kind])].assign(modality=kind)
    kinds, most = chosen["kind"].value_counts(), chosen["Subject"].nunique() / 2
    for pattern in PREFERRED[kind] if match is None else ():
        if (preferred := chosen["kind"].str.fullmatch(pattern)).any():
            chosen = chosen[preferred]
            break
    if session in SESSION_ENDS:  # of files called alike but for numbers, by these: 129, then 1000
        chosen = chosen.loc[chosen["path"].map(lambda p: (len(str(p)), str(p))).sort_values().index]
        forms = chosen["Subject"] + "/" + chosen["kind"].str.replace(r"\d+", "", regex=True)
        chosen = chosen[~forms.duplicated(keep=session)]
    subjects = chosen["Subject"]
    if chosen.empty or subjects.duplicated().sum() > most or subjects.nunique() < most:
        paths = ", ".join(f"{name} ({count})" for name, count in kinds[:8].items()) or "none"
        asked = f"session {session or 'any'}, name {match or 'any'}"
        remedy = f"python -m brainsex survey {files.attrs['folder']} says how to make some"
        remedy = remedy if chosen.empty else "choose by --match, --session or --id"
        raise ValueError(f"expected one {kind} volume a subject, {asked}, found {paths}; {remedy}")
    return chosen


def match_masks(
    folder: str | Path, pattern: str, subjects: Sequence[str], sessions: Iterable[str] = ()
) -> list[list[Path]]:
    """Match the files of a glob `pattern` below `folder` to `subjects`, one list a subject.

    A file is of the subject whose ID stands in its path as whole words, the longest one, and not as
    the label of a session or a run. With `sessions`, of which each belongs to a subject, files of
    others are left out. Raises FileNotFoundError if the pattern matches nothing.
    """
    masks: dict[str, list[tuple[str, Path]]] = {subject: [] for subject in subjects}
    known = {tables.compare_id(subject): subject for subject in subjects}
    if not (names := sorted(glob(pattern, root_dir=folder, recursive=True))):
        raise FileNotFoundError(f"{folder}: expected masks that match {pattern!r}, found none")
    for name in (name for name in names if name.lower().endswith(VOLUME_ENDINGS)):
        session = hit[1] if (hit := BIDS["ses"].match(name)) else ""
        hit = BIDS["sub"].match(name)
        subject = _known_within(hit[1] if hit else re.sub(r"(ses|run)-[^\W_]+", "", name), known)
        if subject in masks:
            masks[subject].append((session, Path(folder, name)))
    return [
        [path for label, path in masks[subject] if not label or session in ("", label)]
        for subject, session in zip(subjects, list(sessions) or [""] * len(subjects), strict=True)
    ]
