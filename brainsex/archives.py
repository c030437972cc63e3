"""Volumes from HCP's zip archives, nested or not: one NIfTI file a subject (notebook 02).

In the study each subject is one archive of about 1 GB that holds an inner archive with the wanted
file. The outer one is never unpacked: a stored inner archive is read in place, a compressed one is
inflated to a bounded temporary file.
"""

import errno
import glob
import io
import os
import re
import struct
import tempfile
import zipfile
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path

import pandas as pd
from joblib import Parallel, cpu_count, delayed
from tqdm.auto import tqdm

from brainsex import storage, tables

FA_MEMBERS = ("*_FA.nii.gz", "FA.nii.gz", "*_FA.nii", "FA.nii")
MAX_MEMBER = 2 << 30  # bytes of the largest volume extracted
MAX_INNER = 8 << 30  # bytes of the largest inner archive inflated to a temporary file
MAX_RATIO = 500  # inflated bytes to stored ones: brain masks reach 350, zip bombs 1000
CHUNK = 1 << 20  # bytes read at a time
DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
SUBJECT = re.compile("(?:sub-)?(?P<subject>[0-9A-Za-z]+)")  # how an archive's name starts
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

    Returns
    -------
    DataFrame sorted by Subject (str): status (extracted, present, rejected) and reason.

    Raises
    ------
    FileNotFoundError, ValueError, OSError
        There is no archive; `target` has volumes of another `member`; the disk is full.
    """
    source, target = Path(source), Path(target)
    patterns = (member,) if isinstance(member, str) else tuple(member)
    archives = group_by_subject(files_below(source, ".zip"))
    if not archives:
        raise FileNotFoundError(
            f"{source}: expected archives named <ID>_….zip or <ID>.zip, found none; DATA_ACCESS.md "
            "says how to get them"
        )

    def work(subject: str) -> None:
        _extract_subject(subject, archives[subject], source, target, patterns)

    settings = {"member": patterns}
    options = {"workers": workers, "overwrite": overwrite}
    return process_subjects(work, archives, target, "extract", settings, "extracted", **options)


def process_subjects(
    work: Callable[[str], None],
    subjects: Collection[str],
    target: Path,
    command: str,
    settings: Mapping,
    status: str,
    *,
    workers: int | None = None,
    overwrite: bool = False,
) -> pd.DataFrame:
    """Call `work` for each subject without a volume in `target`; return the table of `extract`.

    A subject for whom `work` raises is rejected; only a failure to write to `target` ends the run.

    Parameters
    ----------
    work : writes ``target/<ID>.nii.gz`` of the subject it is given.
    command, settings : the run's entry in ``run.json``.
    status : what the table says of a success.
    """
    volumes = [path for path in target.glob("*.nii*") if path.name.endswith((".nii", ".nii.gz"))]
    stale = [glob.escape(path.name) for path in volumes if tables.subject_id(path) in subjects]
    storage.start_run(target, command, settings, overwrite=overwrite, results=stale)
    present = set() if overwrite else set(map(tables.subject_id, volumes)).intersection(subjects)

    def attempt(subject: str) -> tuple[str, str]:
        if subject in present:
            return "present", ""
        try:
            work(subject)
        except ValueError as error:
            return "rejected", str(error)
        except Exception as error:
            filename = getattr(error, "filename", None) or ""
            if target in Path(filename).parents or getattr(error, "errno", None) in DISK_FULL:
                error.filename = filename or str(target)
                raise
            return "rejected", f"{subject}: {type(error).__name__}: {error}"
        return status, ""

    names = sorted(subjects)
    run = Parallel(workers or cpu_count(), require="sharedmem", return_as="generator")  # threads
    outcomes = run(delayed(attempt)(subject) for subject in names)
    outcomes = list(tqdm(outcomes, status, total=len(names), unit="subject"))
    table = pd.DataFrame(outcomes, columns=["status", "reason"])
    table.insert(0, "Subject", names)
    rejected = table.loc[table["status"] == "rejected", ["Subject", "reason"]]
    storage.write_text(target / "rejected.csv", rejected.to_csv(index=False))
    print(f"{len(table)} subjects, {len(rejected)} of them rejected (rejected.csv says why)")
    return table


def files_below(folder: str | Path, *endings: str) -> Iterator[Path]:
    """Yield the files at any depth whose names end in one of `endings`, behind links too.

    A download folder is often a link to a large disk. Hidden folders are left out: DataLad keeps
    its contents in ``.git/annex``. A broken link counts as a file, a pipe does not.
    """
    real = cache(os.path.realpath)
    for parent, folders, names in os.walk(folder, followlinks=True):
        if real(parent) in map(real, Path(parent).parents):  # a link to a folder above
            folders.clear()
            continue
        folders[:] = (name for name in folders if not name.startswith("."))
        paths = (Path(parent, name) for name in names if name.lower().endswith(endings))
        yield from (path for path in paths if path.is_file() or not path.exists())


def archive_subject(path: str | Path) -> str:
    """Return the ID of the subject that an archive or a file in a subject's folder belongs to.

    An archive's name starts with it. For a file it is the name of the folder above ``T1w`` and
    ``ses-…``, or above the series. BIDS's ``sub-`` is no part of it; "" if there is none.
    """
    path = Path(os.path.abspath(path))
    if path.suffix.lower() == ".zip":
        match = SUBJECT.match(path.name)
        return match["subject"] if match else ""
    folders = path.parent.parts[:0:-1]  # the innermost first, without the root
    if "T1w" in folders:
        folders = folders[folders.index("T1w") :]
    names = (name for name in folders if not NO_SUBJECT.fullmatch(name))
    return next(names, "").removeprefix("sub-")


def group_by_subject(paths: Iterable[Path]) -> dict[str, list[Path]]:
    """Group paths by `archive_subject`; two links to one file count once."""
    groups: dict[str, dict[str, Path]] = {}
    for path in sorted(paths):
        if subject := archive_subject(path):
            groups.setdefault(subject, {}).setdefault(os.path.realpath(path), path)
    return {subject: list(files.values()) for subject, files in groups.items()}


def find_members(
    file: Path | io.BufferedIOBase,
    label: str,
    patterns: Sequence[str],
    stack: ExitStack,
    scratch: Path | None = None,
) -> list[Member]:
    """Return an archive's matching members; with `scratch` also those of the archives in it.

    `label` names the archive in messages; files stay open until `stack` closes.
    """
    with _reading_zip(label):
        archive = stack.enter_context(zipfile.ZipFile(file))
    members = []
    for info in archive.infolist():
        member = archive, info, f"{label}/{info.filename}"
        name = re.split(r"[/\\]", info.filename.lower())[-1]
        if re.search(r"(^|[/\\])(__MACOSX[/\\]|\._)", info.filename):
            continue
        if name.endswith(".zip") and scratch:
            inner = _open_inner(file, member, scratch, stack)
            inner_members = find_members(inner, member[2], patterns, stack)
            if not inner_members:
                inner.close()  # frees the space of a temporary file
            members += inner_members
        elif any(fnmatchcase(name, pattern.lower()) for pattern in patterns):
            members.append(member)
    return members


def member_chunks(member: Member, limit: int) -> Iterator[bytes]:
    """Yield the bytes of a member of at most `limit` bytes; zipfile compares their checksum."""
    archive, info, label = member
    check_member(member, limit)
    with _reading_zip(label), archive.open(info) as stream:
        while chunk := stream.read(CHUNK):
            yield chunk


def check_member(member: Member, limit: int) -> None:
    """Raise ValueError if a member declares more than `limit` bytes, or is a zip bomb."""
    archive, info, label = member
    stored = min(info.compress_size, archive.start_dir)  # the declared size could be a lie
    limit = min(limit, MAX_RATIO * stored + CHUNK)
    if info.file_size > limit:
        problem = f"expected at most {limit} bytes ({stored} are stored)"
        raise ValueError(f"{label}: {problem}, found {info.file_size} declared; repack it")


@contextmanager
def _reading_zip(label: str) -> Iterator[None]:
    """Blame the archive, not `target`, for an OSError, too: damaged offsets give an EINVAL."""
    with storage.reading(label, "a whole zip archive"):
        try:
            yield
        except OSError as error:
            raise ValueError(str(error)) from error


def _extract_subject(
    subject: str, paths: list[Path], source: Path, target: Path, patterns: Sequence[str]
) -> None:
    """Write the one volume that a subject's archives hold."""
    labels = [path.relative_to(source).as_posix() for path in paths]
    with ExitStack() as stack:
        searches = [find_members(*pair, patterns, stack, target) for pair in zip(paths, labels)]
        members = [member for search in searches for member in search]
        members = [member for member in members if re.search(r"(?i)\.nii(\.gz)?$", member[2])]
        if len(members) != 1:
            hits = ", ".join(label for _, _, label in members[:4]) or "none"
            if not members and any("fa.nii" in pattern.lower() for pattern in patterns):
                hits += "; HCP ships no FA map: fit one, DATA_ACCESS.md says how"
            expected = f"one file named like {' or '.join(patterns)}"
            raise ValueError(f"{', '.join(labels)}: expected {expected}, found {hits}")
        ending = ".nii.gz" if members[0][2].lower().endswith(".gz") else ".nii"
        with storage.atomic_path(target / (subject + ending)) as partial:
            with open(partial, "wb") as file:
                file.writelines(member_chunks(members[0], MAX_MEMBER))


def _open_inner(path: Path, member: Member, scratch: Path, stack: ExitStack) -> io.BufferedIOBase:
    """Open an archive within an archive as a file that seeks fast."""
    _, info, label = member
    if info.compress_type != zipfile.ZIP_STORED:
        file = stack.enter_context(tempfile.TemporaryFile(dir=scratch))
        file.writelines(member_chunks(member, MAX_INNER))
        file.flush()  # zipfile would take a full disk for a bad archive
        return file
    check_member(member, info.file_size)  # of any size: it is read in place
    with _reading_zip(label):
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
