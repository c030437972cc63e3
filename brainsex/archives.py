"""Volumes from HCP's zip archives, nested ones read in place: one NIfTI file a subject."""

import errno
import glob
import io
import os
import re
import struct
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from fnmatch import fnmatchcase
from pathlib import Path
from typing import IO

import pandas as pd
from joblib import Parallel, cpu_count, delayed
from tqdm.auto import tqdm

from brainsex import storage, tables

FA_MEMBERS = ("*_FA.nii.gz", "FA.nii.gz", "*_FA.nii", "FA.nii")
MAX_MEMBER = 2 << 30  # bytes of the largest volume extracted
MAX_INNER = 8 << 30  # bytes of the largest compressed archive within another one
MAX_RATIO = 500  # inflated bytes to stored ones: brain masks reach 350, zip bombs 1000
CHUNK = 1 << 20  # bytes read at a time
DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
SUBJECT = re.compile("(?:sub-)?([0-9A-Za-z]*).*", re.DOTALL)  # how an archive's name starts
NO_SUBJECT = re.compile("T1w|Diffusion.*|dwi|ses-.*", re.IGNORECASE)  # folders below a subject's
Member = tuple[zipfile.ZipFile, zipfile.ZipInfo, str]  # the string names it in messages


def extract(
    source: str | Path,
    target: str | Path,
    member: str | Sequence[str] = FA_MEMBERS,
    *,
    workers: int | None = None,
    overwrite: bool = False,
) -> pd.DataFrame:
    """Extract each subject's volume from its archives to ``target/<ID>.nii.gz``.

    Subjects whose volume is there are skipped; ``target/rejected.csv`` lists who was left out.

    Parameters
    ----------
    source : folder of archives ``<ID>_….zip``, at any depth; a subject's hold one such volume.
    member : glob patterns of the volume's name, in any case; inner archives are searched, too.
    workers : subjects at the same time; by default the cores that this process may use.
    overwrite : delete these subjects' volumes first.

    Returns a table sorted by Subject: status (extracted, present, rejected) and reason. Raises
    FileNotFoundError without an archive, ValueError if `target` has volumes of another `member`,
    and OSError if the disk is full.
    """
    source, target = Path(source), Path(target)
    patterns = (member,) if isinstance(member, str) else tuple(member)

    def work(subject: str, paths: dict[str, Path]) -> str:
        members = []
        with ExitStack() as stack:
            for label, path in paths.items():
                members += find_members(path, label, patterns, stack, MAX_MEMBER)
            members = [member for member in members if re.search(r"(?i)\.nii(\.gz)?$", member[2])]
            if len(members) != 1:
                hits = ", ".join(label for _, _, label in members[:4])
                hits = hits or "none (HCP ships no FA map: DATA_ACCESS.md says how to fit one)"
                expected = f"expected one file named like {' or '.join(patterns)}"
                raise ValueError(f"{', '.join(paths)}: {expected}, found {hits}")
            ending = ".nii.gz" if members[0][2].lower().endswith(".gz") else ".nii"
            with storage.atomic_path(target / f"{subject}{ending}") as partial:
                with open(partial, "wb") as file:
                    file.writelines(_read_chunks(members[0]))
        return "extracted"

    archives, settings = storage.files_below(source, ".zip"), {"member": patterns}
    return process_subjects(work, source, archives, target, "extract", settings, workers, overwrite)


def process_subjects(
    work: Callable[[str, dict[str, Path]], str],
    source: Path,
    paths: Iterable[Path],
    target: Path,
    command: str,
    settings: Mapping,
    workers: int | None,
    overwrite: bool,
) -> pd.DataFrame:
    """Call `work` for each subject without a volume in `target`; return the table of `extract`.

    `work` takes the subject and its files among `paths`, by their names below `source`; it writes
    ``target/<ID>.nii.gz`` and returns the status. A subject for whom it raises is rejected; only a
    failure to write to `target` ends the run, which ``run.json`` records.
    """
    groups: dict[str, dict[str, Path]] = {}
    for path in sorted(paths):
        if subject := _subject_of(path):  # two links to one file count once
            groups.setdefault(subject, {}).setdefault(os.path.realpath(path), path)
    if not groups:
        expected = "expected archives <ID>_….zip or <ID>.zip (to fit: or <ID>/T1w/Diffusion)"
        raise FileNotFoundError(f"{source}: {expected}, found none; DATA_ACCESS.md has the source")
    volumes = list(target.glob("[!.]*.nii*"))
    stale = [glob.escape(path.name) for path in volumes if tables.subject_id(path) in groups]
    storage.start_run(target, command, settings, overwrite=overwrite, results=stale)
    present = set() if overwrite else set(map(tables.subject_id, volumes))

    def attempt(subject: str) -> tuple[str, str, str]:
        if subject in present:
            return subject, "present", ""
        try:
            files = {p.relative_to(source).as_posix(): p for p in groups[subject].values()}
            return subject, work(subject, files), ""
        except Exception as error:
            path = Path(getattr(error, "filename", None) or "")
            if target in path.parents or getattr(error, "errno", None) in DISK_FULL:
                raise
            name = "" if isinstance(error, ValueError) else f"{subject}: {type(error).__name__}: "
            return subject, "rejected", f"{name}{error}"

    run = Parallel(workers or cpu_count(), require="sharedmem", return_as="generator")  # threads
    rows = run(delayed(attempt)(subject) for subject in sorted(groups))
    rows = list(tqdm(rows, command, total=len(groups), unit="subject"))
    table = pd.DataFrame(rows, columns=["Subject", "status", "reason"])
    rejected = table.loc[table["status"] == "rejected", ["Subject", "reason"]]
    storage.write_text(target / "rejected.csv", rejected.to_csv(index=False))
    counts = table["status"].value_counts().rename_axis(f"{command} (rejected.csv says why)")
    print(counts.to_string())
    return table


def _subject_of(path: Path) -> str:
    """Return the ID with which an archive's name starts, or that of the folder a series lies in.

    That folder is above ``T1w`` and ``ses-…``. BIDS's ``sub-`` is no part of an ID; "" if none.
    """
    path = Path(os.path.abspath(path))
    if path.suffix.lower() == ".zip":
        return SUBJECT.sub(r"\1", path.name)
    folders = path.parent.parts[:0:-1]  # the innermost first, without the root
    names = (name for name in folders if not NO_SUBJECT.fullmatch(name))
    return next(names, "").removeprefix("sub-")


def find_members(
    file: Path | IO, label: str, patterns: Sequence[str], stack: ExitStack, limit: int
) -> list[Member]:
    """Return the matching members of an archive, and of those within a file's archive.

    `label` names the archive in messages; files stay open until `stack` closes. Raises ValueError
    for a damaged archive, and for a member of more than `limit` bytes or a zip bomb.
    """
    with storage.reading(label, "a whole zip archive"):
        archive = stack.enter_context(zipfile.ZipFile(file))
    members = []
    for info in archive.infolist():
        member = archive, info, f"{label}/{info.filename}"
        name = re.split(r"[/\\]", info.filename.lower())[-1]
        if "__MACOSX" in info.filename or name.startswith("._"):
            continue
        if name.endswith(".zip") and isinstance(file, Path):  # no deeper than this
            inner = _open_inner(file, member, stack)
            members += find_members(inner, member[2], patterns, stack, limit)
        elif any(fnmatchcase(name, pattern.lower()) for pattern in patterns):
            _check_size(member, limit)
            members.append(member)
    return members


def _read_chunks(member: Member) -> Iterator[bytes]:
    """Yield the bytes of a member; zipfile compares their checksum."""
    archive, info, label = member
    with storage.reading(label, "a whole zip archive"), archive.open(info) as stream:
        while chunk := stream.read(CHUNK):
            yield chunk


def _check_size(member: Member, limit: int) -> None:
    """Raise ValueError if a member declares more than `limit` bytes, or is a zip bomb."""
    archive, info, label = member
    stored = min(info.compress_size, archive.start_dir)  # the declared size could be a lie
    limit = min(limit, MAX_RATIO * stored + CHUNK)
    if info.file_size > limit:
        problem = f"expected at most {limit} bytes ({stored} are stored)"
        raise ValueError(f"{label}: {problem}, found {info.file_size} declared; repack it")


def _open_inner(path: Path, member: Member, stack: ExitStack) -> IO:
    """Open an archive within an archive: a stored one, which is the rule, as a file that seeks."""
    archive, info, label = member
    stored = info.compress_type == zipfile.ZIP_STORED
    _check_size(member, info.file_size if stored else MAX_INNER)
    with storage.reading(label, "a whole zip archive"):
        if not stored:
            return stack.enter_context(archive.open(info))
        outer = stack.enter_context(open(path, "rb", buffering=0))
        outer.seek(info.header_offset + 26)  # lengths of name and extra field, in a local header
        start = info.header_offset + 30 + sum(struct.unpack("<HH", outer.read(4)))
        return stack.enter_context(io.BufferedReader(_Window(outer, start, info.file_size)))


class _Window(io.RawIOBase):
    """`size` bytes of a file from `start` on, as a file (ZipExtFile seeks by reading anew)."""

    def __init__(self, file: io.FileIO, start: int, size: int) -> None:
        self.file, self.start, self.end = file, start, start + size
        file.seek(start)

    def readable(self) -> bool:
        return True

    seekable = readable

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        origin = (self.start, self.file.tell(), self.end)[whence]
        return self.file.seek(origin + offset) - self.start

    def readinto(self, buffer: memoryview) -> int:
        return self.file.readinto(memoryview(buffer)[: max(self.end - self.file.tell(), 0)])
