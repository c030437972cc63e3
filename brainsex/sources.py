"""What a folder holds, told by the names of its files before any volume is read (notebook 02).

One table of patterns for what people have, of HCP or of another study. `choose` takes the volumes
for `volumes.convert`; of packages and series, the last column says which command makes volumes.
"""

import gzip
import json
import math
import os
import re
import zlib
from fnmatch import fnmatchcase
from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd
from tqdm.auto import tqdm

from brainsex import identifier, replacing, runs, write
from brainsex.archives import CHUNK, SUBJECT, files, owner
from brainsex.nifti import MAX_VOXELS, NOT_NIFTI

NII, LABEL = r"\.nii(\.gz)?", "[0-9A-Za-z]+"
HCP = f"(.*/)?(?!ses-)[^/]+/(ses-(?P<session>{LABEL})/)?T1w/"
ZIP = f"(.*/)?{SUBJECT.pattern}"
BIDS = f"(.*/)?sub-(?P<subject>{LABEL})/(ses-(?P<session>{LABEL})/)?"
ENTITIES = f"(_[a-z]+-{LABEL})*"
MAPS = (  # how BIDS derivatives name FA: as DIPY, MRtrix, FSL, QSIPrep and others write it
    f"(_FA|_(param|mdp)-(fa|FA){ENTITIES}_dwimap|_map-(fa|FA){ENTITIES}(_dwi(map)?)?"
    f"|_model-(DTI|dti){ENTITIES}_desc-FA_dwi)"
)
FIT, TAKE = "python -m brainsex fa COHORT COHORT/fa", "python -m brainsex extract COHORT COHORT/"
SOURCES = {
    # kind: modality, path below the folder (of a subject where it says, else the file is its), next
    "fa": ("fa", rf"fa/[^/]+{NII}", ""),
    "bids-fa": ("fa", rf"{BIDS}dwi/[^/]+{MAPS}{NII}", ""),
    "hcp-fa": ("fa", rf"{HCP}(?!.*_7T/)(.*/)?([^/]*_)?FA{NII}", ""),
    "tbss-origdata": ("fa", rf"(.*/)?origdata/[^/]+{NII}", ""),
    "tbss-fa": ("fa", rf"(.*/)?FA/[^/]+_FA{NII}", ""),
    "tbss-target": ("fa", rf"(.*/)?FA/(?P<subject>[^/]+?)(_FA)+_to_target{NII}", ""),
    "tbss-4d": ("fa", rf"(.*/)?all_FA{NII}", ""),
    "t1": ("t1", rf"t1/[^/]+{NII}", ""),
    "hcp-t1": ("t1", rf"{HCP}T1w_acpc_dc_restore_brain{NII}", ""),
    "hcp-series": ("series", rf"{HCP}Diffusion/data\.nii\.gz", FIT),
    "package-2017": ("series", rf"{ZIP}_3T_Diffusion_preproc\.zip", FIT),
    "package-2025": ("series", rf"{ZIP}_Diffusion3TRecommended\.zip", FIT),
    "package-t1": (
        "t1",
        rf"{ZIP}_(3T_Structural_preproc|StructuralRecommended)\.zip",
        f"{TAKE}t1 --member T1w_acpc_dc_restore_brain.nii.gz",
    ),
    "archive": ("fa", rf"{ZIP}([_-]([^/]*[_-])?(?i:FA|DTI)([_-][^/]*)?)?\.zip", f"{TAKE}fa"),
}
"""The kinds; of volumes, `choose` takes the first that is there."""
NO_LIST = "no list of IDs: DATA_ACCESS.md, section 7"
VOLUMES = [kind for kind, (*_, command) in SOURCES.items() if not command]
DAMAGED = (EOFError, zlib.error, gzip.BadGzipFile, ValueError, OverflowError)
MAX_LIST = 1 << 24
"""Bytes of the longest list of IDs."""


def find(folder: str | Path) -> pd.DataFrame:
    """Find what `folder` holds of each subject, at any depth. No volume is read.

    Returns
    -------
    A row a volume, series or package: Subject (str, without BIDS's ``sub-``), session (str, empty
    where there is none), kind and modality (``fa``, ``t1`` or ``series``) of `SOURCES`, path;
    number of the volume in a 4D file, else -1. A 4D file without a list of IDs is one row, without
    a Subject.

    Raises
    ------
    FileNotFoundError
        No such folder, or nothing in it that a pattern of `SOURCES` fits.
    """
    folder, rows, real = Path(folder), [], set()
    for path in sorted(files(folder, ".nii", ".nii.gz", ".zip")):
        below = path.relative_to(folder).as_posix()
        if re.search(r"(^|/)(\.|__MACOSX/)", below):
            continue
        kind, subject, session = _match(below)
        place = (kind, subject, session, os.path.realpath(path))
        if kind and place not in real:  # what two links lead to counts once
            real.add(place)
            subjects = [(-1, subject)]
            if kind == "tbss-4d":
                subjects = list(enumerate(_list(path)[0])) or [(-1, "")]
            modality = SOURCES[kind][0]
            rows += [(name, session, kind, modality, path, number) for number, name in subjects]
    if not rows:
        found = "none of these" if folder.is_dir() else "no such folder"
        raise FileNotFoundError(
            f"{folder}: expected fa/<ID>.nii.gz, <ID>/T1w/…, sub-<ID>/…/dwi/…_FA.nii.gz, "
            f"FA/<ID>_FA.nii.gz or packages <ID>_….zip, found {found}. DATA_ACCESS.md lists what "
            "is recognised, and says how to get HCP's data."
        )
    return pd.DataFrame(rows, columns=["Subject", "session", "kind", "modality", "path", "number"])


def subject(path: str | Path) -> str:
    """The ID in the path of a volume: of the folder that a pattern names, else of the file."""
    return _match(Path(os.path.abspath(path)).as_posix())[1]


def _match(place: str) -> tuple[str, str, str]:
    """Kind (empty if there is none), subject and session of a path."""
    for kind, (_, pattern, _) in SOURCES.items():
        if hit := re.fullmatch(pattern, place):
            groups = hit.groupdict()
            rule = owner if kind.startswith("hcp-") else identifier
            name = groups.get("subject") or rule(place)
            return kind, name.removeprefix("sub-"), groups.get("session") or ""
    return "", identifier(place), ""


def _list(path: Path) -> tuple[list[str], str]:
    """The IDs of a 4D file's volumes, and where they are from; no IDs, and what was found instead.

    They are one a line of the text file beside it. Without one they are of the images in TBSS's
    ``FA/``, which it merges in the order of their names.
    """
    named, images = path.with_name("all_FA.txt"), path.parent.parent / "FA"
    texts = set(path.parent.glob("*.txt")) - {path.with_name("thresh.txt")}  # of tbss_4
    found = [named] if named.is_file() else sorted(filter(Path.is_file, texts))
    if len(found) == 1 and found[0].stat().st_size <= MAX_LIST:
        lines = found[0].read_text("utf-8-sig", "replace").split()
        return [identifier(line) for line in lines], found[0].name
    if not found and (names := sorted(image.name for image in images.glob("*_FA.nii*"))):
        return [identifier(name) for name in names], "the sorted names of ../FA/*_FA.nii.gz"
    return [], ", ".join(text.name for text in found) or "none"


def summary(found: pd.DataFrame, people: pd.DataFrame | None) -> pd.DataFrame:
    """How many subjects of what kind, and what is missing, before anything is read.

    Parameters
    ----------
    found : as from `find`.
    people : as from `tables.read`; None where there is no table.

    Returns
    -------
    A row a kind: modality; subjects; of these ``several`` (volumes, as of two sessions), ``absent``
    (a name, but no file behind it: a broken link, or content that DataLad has not fetched),
    ``no row`` (in the table of people); ``rows without`` (people of whom there is none); next (the
    command that makes volumes of it, none for volumes, or what a 4D file lacks).
    """
    rows = {}
    for kind, part in found.groupby("kind", sort=False):
        subjects = set(part["Subject"]) - {""}
        rows[kind] = {
            "modality": SOURCES[kind][0],
            "subjects": len(subjects),
            "several": sum(part["Subject"].value_counts().drop("", errors="ignore") > 1),
            "absent": sum(not path.is_file() for path in part["path"]),
        }
        if people is not None:
            rows[kind]["no row"] = len(subjects - set(people.index))
            rows[kind]["rows without"] = len(set(people.index) - subjects)
        rows[kind]["next"] = SOURCES[kind][-1] if part["Subject"].all() else NO_LIST
    return pd.DataFrame.from_dict(rows, orient="index").reindex([k for k in SOURCES if k in rows])


def choose(
    found: pd.DataFrame,
    scratch: str | Path,
    *,
    kind: str | None = None,
    session: str | None = None,
    match: str | None = None,
) -> pd.DataFrame:
    """The rows of `found` for `volumes.convert`: volumes of one kind.

    Parameters
    ----------
    found : as from `find`.
    scratch : folder that a 4D file's volumes are written to, one file each.
    kind : of `SOURCES`; the first there is volumes of by default.
    session : keep this one, where subjects came twice.
    match : pattern of the files' names to keep, ``*_space-T1w_*``, where there are several.

    Raises
    ------
    FileNotFoundError
        No list of a 4D file's IDs.
    ValueError
        No volumes of that kind, session or name, or a 4D file that is damaged, or of more or fewer
        volumes than its list has IDs.
    """
    there = [name for name in VOLUMES if name in set(found["kind"])]
    kind = kind or next(iter(there), None)
    chosen = found[found["kind"] == kind]
    if session is not None:
        chosen = chosen[chosen["session"] == session]
    if match is not None:
        chosen = chosen[[fnmatchcase(path.name, match) for path in chosen["path"]]]
    if kind not in VOLUMES or chosen.empty:
        commands = {SOURCES[name][-1] for name in found["kind"]} - {""}
        raise ValueError(
            f"expected volumes of kind {kind or 'fa or t1'}, session {session or 'any'}, "
            f"name {match or 'any'}, found those of kind {', '.join(there) or 'none'}. "
            + " ".join(f"`{command}` makes some." for command in sorted(commands))
        )
    print(f"{chosen['Subject'].nunique()} subjects of kind {kind} (there are: {', '.join(there)})")
    if kind != "tbss-4d":
        return chosen
    with runs.alone(scratch):
        return _split(chosen, Path(scratch))


def _split(chosen: pd.DataFrame, target: Path) -> pd.DataFrame:
    """Write a 4D file's volumes one at a time; its record, without which all is done anew, last."""
    path, *others = chosen["path"].unique()
    if others:
        raise ValueError(
            f"expected one all_FA.nii.gz, found {path} and {others[0]}: move one away."
        )
    names, origin = _list(path)
    if not names:
        raise FileNotFoundError(
            f"{path}: expected all_FA.txt beside it, or one text file, of one ID a line in the "
            f"order of its volumes, or the FA/ that it was merged from, found {origin}."
        )
    print(f"{path.name}: IDs from {origin}")
    places = [target / f"{number:05d}.nii.gz" for number in chosen["number"]]
    stat, record = path.stat(), target / "split.json"
    key = json.dumps([stat.st_size, stat.st_mtime_ns, len(places)])
    if not record.is_file() or record.read_text(encoding="utf-8") != key:
        record.unlink(missing_ok=True)
        opened = gzip.open if path.suffix == ".gz" else open
        try:
            with opened(path, "rb") as stream:
                image = nib.Nifti1Image.from_stream(stream)
                if image.ndim != 4 or image.shape[3] != len(places):
                    raise ValueError(
                        f"expected {len(places)} volumes (IDs of {origin}), found {image.shape}"
                    )
                if image.get_data_dtype().kind not in "iuf":
                    raise ValueError(f"expected real numbers, found {image.get_data_dtype()}")
                if not 0 < math.prod(image.shape[:3]) <= MAX_VOXELS:
                    raise ValueError(f"expected 1 to {MAX_VOXELS} voxels, found {image.shape}")
                header = image.header.copy()
                header.set_data_shape(image.shape[:3])
                header.set_data_dtype(np.float32)
                header.set_slope_inter(1, 0)
                for number, place in enumerate(tqdm(places, "split", unit="volume")):
                    volume = np.asarray(image.dataobj[..., number], np.float32)
                    content = nib.Nifti1Image(volume, None, header).to_bytes()
                    with replacing(place) as partial:
                        partial.write_bytes(gzip.compress(content, 1, mtime=0))
                while stream.read(CHUNK):  # at its end gzip compares the checksum
                    pass
        except (*NOT_NIFTI, *DAMAGED) as error:
            raise ValueError(f"{path}: cannot be split: {error}.") from error
        write(record, key)
    return chosen.assign(path=places)
