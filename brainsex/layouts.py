"""What a folder holds, told by the names of its files before any volume is read (notebook 02).

One table of patterns names what people have, of HCP or of another study. `choose_volumes` takes the
volumes for `volumes.convert`; for packages and series a command makes volumes first.
"""

import os
import re
from collections.abc import Iterable
from fnmatch import fnmatchcase
from glob import glob
from pathlib import Path

import pandas as pd

from brainsex import storage, tables

NII, LABEL = r"\.nii(\.gz)?", "[0-9A-Za-z]+"
SESSION = f"(ses-(?P<session>{LABEL})/)?"
HCP = f"(.*/)?(?P<subject>(?!ses-)[^/]+)/{SESSION}T1w/"
PACKAGE = f"(.*/)?(?:sub-)?(?P<subject>{LABEL})"
BIDS = f"(.*/)?sub-(?P<subject>{LABEL})/{SESSION}"
DTIFIT = f"(?!(.*/)?T1w/)(.*/)?(?P<subject>(?!ses-|dwi/|dtifit/)[^/]+)/{SESSION}((dwi|dtifit)/)?"
ENTITIES = f"(_[a-z]+-{LABEL})*"
MAPS = (  # how BIDS derivatives name FA: as DIPY, MRtrix, FSL, QSIPrep and others write it
    f"(_FA|_(param|mdp)-(fa|FA){ENTITIES}_dwimap|_map-(fa|FA){ENTITIES}(_dwi(map)?)?"
    f"|_model-(DTI|dti){ENTITIES}_desc-FA_dwi)"
)
STRUCTURAL = "(3T_Structural_preproc|StructuralRecommended)"
FIT_FA = "python -m brainsex fa COHORT COHORT/fa"
EXTRACT_FA = "python -m brainsex extract COHORT COHORT/fa"
EXTRACT_T1 = "python -m brainsex extract COHORT COHORT/t1 --member T1w_acpc_dc_restore_brain.nii.gz"
PATTERNS = {  # kind: modality, path below the folder, the command that makes volumes of it
    "fa": ("fa", rf"fa/[^/]+{NII}", ""),
    "bids-fa": ("fa", rf"{BIDS}dwi/[^/]+{MAPS}{NII}", ""),
    "hcp-fa": ("fa", rf"{HCP}(?!.*_7T/)(.*/)?([^/]*_)?FA{NII}", ""),
    "tbss-origdata": ("fa", rf"(.*/)?origdata/[^/]+{NII}", ""),
    "tbss-fa": ("fa", rf"(.*/)?FA/[^/]+_FA{NII}", ""),
    "tbss-target": ("fa", rf"(.*/)?FA/(?P<subject>[^/]+?)(_FA)+_to_target{NII}", ""),
    "dtifit": ("fa", rf"{DTIFIT}dti_FA{NII}", ""),
    "t1": ("t1", rf"t1/[^/]+{NII}", ""),
    "hcp-t1": ("t1", rf"{HCP}T1w_acpc_dc_restore_brain{NII}", ""),
    "hcp-series": ("series", rf"{HCP}Diffusion/data\.nii\.gz", FIT_FA),
    "package-2017": ("series", rf"{PACKAGE}_3T_Diffusion_preproc\.zip", FIT_FA),
    "package-2025": ("series", rf"{PACKAGE}_Diffusion3TRecommended\.zip", FIT_FA),
    "package-t1": ("t1", rf"{PACKAGE}_{STRUCTURAL}\.zip", EXTRACT_T1),
    "archive": ("fa", rf"{PACKAGE}([_-]([^/]*[_-])?(?i:FA|DTI)([_-][^/]*)?)?\.zip", EXTRACT_FA),
}
VOLUME_KINDS = [kind for kind, (*_, command) in PATTERNS.items() if not command]


def find_volumes(folder: str | Path) -> pd.DataFrame:
    """Find what `folder` holds of each subject, at any depth. No volume is read.

    Each volume, series or package is a row: Subject, session (empty if there is none), kind and
    modality of `PATTERNS`, and path. Raises FileNotFoundError if nothing is recognised.
    """
    folder, rows = Path(folder), {}
    for path in sorted(storage.files_below(folder, ".nii", ".nii.gz", ".zip")):
        below = path.relative_to(folder).as_posix()
        kind, subject, session = _match_pattern(below)
        if kind and not re.search(r"(^|/)(\.|__MACOSX/)", below):
            place = (kind, subject, session, os.path.realpath(path))  # of two links, the first
            rows.setdefault(place, (subject, session, kind, PATTERNS[kind][0], path))
    if not rows:
        expected = "expected fa/<ID>.nii.gz, packages, or another layout that DATA_ACCESS.md lists"
        names = [path.name for path in folder.glob("*")][:9]
        raise FileNotFoundError(f"{folder}: {expected}, found {names}")
    return pd.DataFrame(rows.values(), columns=["Subject", "session", "kind", "modality", "path"])


def subject_of(path: str | Path) -> str:
    """Return the subject ID of a volume from the folder that a pattern names, or its file name."""
    return _match_pattern(Path(os.path.abspath(path)).as_posix())[1]


def summarise_layout(files: pd.DataFrame, people: pd.DataFrame | None) -> pd.DataFrame:
    """Count the subjects of each kind in `find_volumes`, and what is missing, for `read_people`.

    Each kind is a row: modality; subjects; of these ``several`` (volumes, as of two sessions),
    ``absent`` (a broken link, as of content that DataLad has not fetched), ``no row`` (in the table
    of people); ``rows without`` (people who have none); next (the command that makes volumes).
    """
    rows = {}
    for kind, part in files.groupby("kind"):
        subjects = set(part["Subject"])
        rows[kind] = {
            "modality": PATTERNS[kind][0],
            "subjects": len(subjects),
            "several": part["Subject"][part["Subject"].duplicated()].nunique(),
            "absent": sum(not path.is_file() for path in part["path"]),
        }
        if people is not None:
            rows[kind]["no row"] = len(subjects - set(people.index))
            rows[kind]["rows without"] = len(set(people.index) - subjects)
        rows[kind]["next"] = PATTERNS[kind][-1]
    return pd.DataFrame.from_dict(rows, orient="index").loc[[k for k in PATTERNS if k in rows]]


def choose_volumes(
    files: pd.DataFrame,
    *,
    kind: str | None = None,
    session: str | None = None,
    match: str | None = None,
) -> pd.DataFrame:
    """Choose the rows of `find_volumes` for `volumes.convert`: volumes of one kind.

    `kind` is the first of `VOLUME_KINDS` that is there by default; `session` keeps one session and
    `match` the file names that fit a pattern. Raises ValueError if no volume is left.
    """
    present = [name for name in VOLUME_KINDS if name in set(files["kind"])]
    kind = kind or next(iter(present), None)
    chosen = files[files["kind"] == kind]
    if session is not None:
        chosen = chosen[chosen["session"] == session]
    if match is not None:
        chosen = chosen[[fnmatchcase(path.name, match) for path in chosen["path"]]]
    if kind not in VOLUME_KINDS or chosen.empty:
        commands = {PATTERNS[name][-1] for name in files["kind"]} - {""} or {"DATA_ACCESS.md"}
        raise ValueError(
            f"expected volumes of kind {kind or 'fa or t1'}, session {session or 'any'}, name "
            f"{match or 'any'}, found those of kind {', '.join(present) or 'none'}; to make some: "
            f"{' or '.join(sorted(commands))}"
        )
    count = chosen["Subject"].nunique()
    print(f"{count} subjects of kind {kind} (there are: {', '.join(present)})")
    return chosen.copy()


def match_masks(folder: str | Path, pattern: str, subjects: Iterable[str]) -> list[list[Path]]:
    """Match the NIfTI files of a glob `pattern` below `folder` to `subjects`, one list a subject.

    A file is a subject's if the ID stands in its path as a whole word, and not as the label of a
    session or a run. Raises FileNotFoundError if the pattern matches nothing.
    """
    names = sorted(glob(pattern, root_dir=folder, recursive=True))
    masks: dict[str, list[Path]] = {subject: [] for subject in subjects}
    for name in (name for name in names if name.endswith((".nii", ".nii.gz"))):
        words = list(re.finditer(r"[^\W_]+", re.sub(r"(ses|run)-[^\W_]+", "", name)))
        spans = {first.string[first.start() : last.end()] for first in words for last in words}
        for subject in spans & masks.keys():
            masks[subject].append(Path(folder, name))
    if not names:
        raise FileNotFoundError(f"{folder}: expected masks that match {pattern!r}, found none")
    return [masks[subject] for subject in subjects]


def _match_pattern(path: str) -> tuple[str, str, str]:
    """Return kind (empty if no pattern fits), subject and session of a path."""
    for kind, (_, pattern, _) in PATTERNS.items():
        if hit := re.fullmatch(pattern, path):
            groups = hit.groupdict()
            subject = groups.get("subject", tables.subject_id(path)).removeprefix("sub-")
            return kind, subject, groups.get("session") or ""
    return "", tables.subject_id(path), ""
