"""What a folder holds, told by the names of its files before any volume is read (notebook 02).

One table of patterns names what people have, of HCP or of another study. `choose_volumes` takes the
volumes for `volumes.convert`; for packages and series a command makes volumes first.
"""

import gzip
import math
import os
import re
from fnmatch import fnmatchcase
from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd
from tqdm.auto import tqdm

from brainsex import archives, storage, tables, volumes

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
    "tbss-4d": ("fa", rf"(.*/)?all_FA{NII}", ""),
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
NO_ID_LIST = "no list of IDs: DATA_ACCESS.md, section 7"
MAX_ID_LIST_BYTES = 1 << 24


def find_volumes(folder: str | Path) -> pd.DataFrame:
    """Find what `folder` holds of each subject, at any depth. No volume is read.

    Each volume, series or package is a row: Subject (empty for a 4D file without a list of IDs),
    session (empty if there is none), kind and modality of `PATTERNS`, path, and number of the
    volume in a 4D file, else -1. Raises FileNotFoundError if nothing is recognised.
    """
    folder, rows, places = Path(folder), [], set()
    for path in sorted(archives.files_below(folder, ".nii", ".nii.gz", ".zip")):
        below = path.relative_to(folder).as_posix()
        kind, subject, session = _match_pattern(below)
        place = (kind, subject, session, os.path.realpath(path))
        if not kind or place in places or re.search(r"(^|/)(\.|__MACOSX/)", below):
            continue
        places.add(place)  # two links to one file count once
        numbered = [(-1, subject)]
        if kind == "tbss-4d":
            numbered = list(enumerate(_read_id_list(path))) or [(-1, "")]
        rows += [(name, session, kind, PATTERNS[kind][0], path, n) for n, name in numbered]
    if not rows:
        raise FileNotFoundError(
            f"{folder}: expected fa/<ID>.nii.gz, <ID>/T1w/…, sub-<ID>/…/dwi/…_FA.nii.gz, "
            "FA/<ID>_FA.nii.gz or packages <ID>_….zip, found "
            f"{[path.name for path in folder.glob('*')][:9]}. DATA_ACCESS.md lists what fits."
        )
    return pd.DataFrame(rows, columns=["Subject", "session", "kind", "modality", "path", "number"])


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
    for kind in PATTERNS:
        part = files[files["kind"] == kind]
        if part.empty:
            continue
        subjects = set(part["Subject"]) - {""}
        rows[kind] = {
            "modality": PATTERNS[kind][0],
            "subjects": len(subjects),
            "several": part["Subject"][part["Subject"].duplicated()].nunique(),
            "absent": sum(not path.is_file() for path in part["path"]),
        }
        if people is not None:
            rows[kind]["no row"] = len(subjects - set(people.index))
            rows[kind]["rows without"] = len(set(people.index) - subjects)
        rows[kind]["next"] = PATTERNS[kind][-1] if part["Subject"].all() else NO_ID_LIST
    return pd.DataFrame.from_dict(rows, orient="index")


def choose_volumes(
    files: pd.DataFrame,
    scratch: str | Path,
    *,
    kind: str | None = None,
    session: str | None = None,
    match: str | None = None,
) -> pd.DataFrame:
    """Choose the rows of `find_volumes` for `volumes.convert`: volumes of one kind.

    `kind` is the first of `VOLUME_KINDS` that is there by default; `session` keeps one session and
    `match` the file names that fit a pattern. A 4D file's volumes are written to `scratch`, one
    file each. Raises ValueError if no volume is left, or a 4D file does not fit its list of IDs.
    """
    present = [name for name in VOLUME_KINDS if name in set(files["kind"])]
    kind = kind or next(iter(present), None)
    chosen = files[files["kind"] == kind]
    if session is not None:
        chosen = chosen[chosen["session"] == session]
    if match is not None:
        chosen = chosen[[fnmatchcase(path.name, match) for path in chosen["path"]]]
    if kind not in VOLUME_KINDS or chosen.empty:
        commands = sorted({PATTERNS[name][-1] for name in files["kind"]} - {""})
        raise ValueError(
            f"expected volumes of kind {kind or 'fa or t1'}, session {session or 'any'}, name "
            f"{match or 'any'}, found those of kind {', '.join(present) or 'none'}; to make some: "
            f"{' or '.join(commands) or 'DATA_ACCESS.md'}"
        )
    count = chosen["Subject"].nunique()
    print(f"{count} subjects of kind {kind} (there are: {', '.join(present)})")
    return chosen if kind != "tbss-4d" else _split(chosen, Path(scratch))


def _match_pattern(path: str) -> tuple[str, str, str]:
    """Return kind (empty if no pattern fits), subject and session of a path."""
    for kind, (_, pattern, _) in PATTERNS.items():
        if hit := re.fullmatch(pattern, path):
            groups = hit.groupdict()
            subject = groups.get("subject", tables.subject_id(path)).removeprefix("sub-")
            return kind, subject, groups.get("session") or ""
    return "", tables.subject_id(path), ""


def _read_id_list(path: Path) -> list[str]:
    """Read the IDs of a 4D file's volumes from ``all_FA.txt``, or from TBSS's ``FA/``.

    TBSS merges the images of that folder in the order of their names.
    """
    listed = path.with_name("all_FA.txt")
    if listed.is_file() and listed.stat().st_size <= MAX_ID_LIST_BYTES:
        names = listed.read_text("utf-8-sig", "replace").split()
    else:
        names = sorted(image.name for image in (path.parent.parent / "FA").glob("*_FA.nii*"))
    return [tables.subject_id(name) for name in names]


def _split(chosen: pd.DataFrame, scratch: Path) -> pd.DataFrame:
    """Write a 4D file's volumes as one file each, the last after the checksum has been verified."""
    path, *extra = chosen["path"].unique()
    ids = _read_id_list(path)
    if extra or not ids:
        expected = "expected one such file, with all_FA.txt beside it or the FA/ it is merged from"
        raise ValueError(f"{path}: {expected}, found {len(extra)} more and {len(ids)} IDs")
    expected = f"{len(ids)} volumes, of {ids[0]} to {ids[-1]}"
    print(f"{path.name}: {expected}")
    scratch = scratch / f"{path.stat().st_size}-{path.stat().st_mtime_ns}"
    parts = [scratch / f"{number:05d}.nii.gz" for number in range(len(ids))]
    missing = [number for number, part in enumerate(parts) if not part.is_file()]
    opened = gzip.open if path.suffix == ".gz" else open
    with storage.reading(path, expected), opened(path, "rb") as stream:
        image = nib.Nifti1Image.from_stream(stream)
        if image.shape[3:] != (len(ids),) or math.prod(image.shape[:3]) > volumes.MAX_VOXELS:
            raise ValueError(f"found {image.shape}, at most {volumes.MAX_VOXELS} voxels are read")
        header = image.header.copy()
        header.set_data_shape(image.shape[:3])
        header.set_data_dtype(np.float32)
        for number in tqdm(missing, "split", unit="volume"):
            volume = np.asarray(image.dataobj[..., number], np.float32)
            while number == len(ids) - 1 and stream.read(archives.CHUNK):
                pass  # at its end gzip compares the checksum
            with storage.atomic_path(parts[number]) as partial:
                content = nib.Nifti1Image(volume, None, header).to_bytes()
                partial.write_bytes(gzip.compress(content, 1, mtime=0))
    return chosen.assign(path=[parts[number] for number in chosen["number"]])
