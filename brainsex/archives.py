"""HCP's archives, old and new, nested or not: one volume a subject, named by its ID (notebook 02).

In the study each subject is one archive of about 1 GB that holds an inner archive with the wanted
file. The outer one is never unpacked: an inner archive that is stored is read in place, one that
is compressed is inflated to a bounded temporary file.
"""

import io
import os
import re
import struct
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from fnmatch import fnmatchcase
from pathlib import Path

import pandas as pd
from joblib import Parallel, cpu_count, delayed
from tqdm.auto import tqdm

from brainsex import identifier, replacing, runs, write

FA_MEMBERS = ("*_FA.nii.gz", "FA.nii.gz", "*_FA.nii", "FA.nii")
MAX_MEMBER = 2 << 30  # bytes of the largest volume taken out
MAX_INNER = 8 << 30  # bytes of the largest compressed inner archive inflated to a temporary file
MAX_RATIO = 500  # of what a member inflates to, to what is stored: brain masks 350, bombs 1000
CHUNK = 1 << 20
UNREADABLE = (zipfile.BadZipFile, zlib.error, struct.error, EOFError, OSError, OverflowError)
UNREADABLE += (RuntimeError, ValueError)
SUBJECT = re.compile("(?:sub-)?(?P<subject>[0-9A-Za-z]+)")
"""A subject's ID, at the start of the name of its archive; BIDS's ``sub-`` is no part."""
NO_SUBJECT = re.compile("T1w|Diffusion.*|dwi|ses-.*", re.IGNORECASE)
"""Folders between a subject's and its files."""
Member = tuple[zipfile.ZipFile, zipfile.ZipInfo, str]  # the string names it in messages


class Rejected(Exception):
    """Why a subject's archives give no volume, in words its user can act on."""


def extract(
    source: str | Path,
    target: str | Path,
    member: str | Sequence[str] = FA_MEMBERS,
    *,
    workers: int | None = None,
    overwrite: bool = False,
) -> pd.DataFrame:
    """Take each subject's volume out of its archives, to ``target/<ID>.nii.gz``.

    An interrupted run goes on where it stopped: archives of a subject whose volume is in `target`
    are not opened. ``target/rejected.csv`` lists whom this run left out, and why.

    Parameters
    ----------
    source : folder of archives at any depth. An ID is the leading letters and digits of a name,
        after ``sub-`` where it starts so; a subject's archives together hold one matching member,
        directly or in an inner archive.
    target : folder for the volumes, made if absent.
    member : glob patterns of the member's base name, in any case; only NIfTI files are taken.
    workers : subjects at the same time; as many as there are cores by default.
    overwrite : extract anew what is in `target` (what is then rejected keeps its old volume).

    Returns
    -------
    By Subject (str), sorted: status (``extracted``, ``present``, ``rejected``) and reason.

    Raises
    ------
    FileNotFoundError, OSError
        No archive and no volume; a full disk, say: finished volumes stay.
    """
    source, target = Path(source), Path(target)
    patterns = (member,) if isinstance(member, str) else tuple(member)
    archives = by_subject(files(source, ".zip"))

    def work(subject: str) -> None:
        _extract_one(subject, archives[subject], source, target, patterns)

    expected = "a folder with archives named <ID>_….zip or <ID>.zip"
    facts = {"command": "extract", "source": source, "member": patterns}
    return each_subject(
        work, archives, source, target, expected, "extracted", workers, overwrite, facts
    )


def each_subject(
    work: Callable[[str], None],
    subjects: Iterable[str],
    source: Path,
    target: Path,
    expected: str,
    done: str,
    workers: int | None,
    overwrite: bool,
    facts: dict,
) -> pd.DataFrame:
    """Call `work` for each of `subjects` without a volume in `target`; return as `extract` does.

    `work` writes ``target/<ID>.nii.gz`` or raises why it rejects the subject; an OSError, a full
    disk's say, is no subject's fault and ends the run. `expected` says what `source` should hold,
    `done` is the status of a success, `facts` are what `runs.record` notes.
    """
    subjects = set(subjects)

    def present() -> dict[str, tuple[str, str]]:
        names = map(identifier, (*target.glob("*.nii"), *target.glob("*.nii.gz")))
        return {name: ("present", "") for name in names if name in subjects or name.isalnum()}

    if not source.exists() or not (subjects or present()):
        found = "none in it" if source.exists() else "no such folder"
        raise FileNotFoundError(
            f"{source}: expected {expected}, found {found}. DATA_ACCESS.md says how to get them."
        )
    failures: list[OSError] = []

    def attempt(subject: str) -> tuple[str, str]:
        if not failures:  # a full disk is no subject's fault: the others stop too
            try:
                work(subject)
            except Rejected as reason:
                return "rejected", str(reason)
            except OSError as error:
                failures.append(error)
            except Exception as error:  # whatever one subject's files do, the others are done
                return "rejected", f"{subject}: {type(error).__name__}: {error}"
        return done, ""

    workers = cpu_count() if workers is None else workers  # those that this process may use
    run = Parallel(workers, require="sharedmem", return_as="generator")  # threads
    with runs.alone(target):
        runs.record(target, **facts)
        outcome = present()
        todo = sorted(subjects if overwrite else subjects - outcome.keys())
        results = run(delayed(attempt)(subject) for subject in todo)
        outcome |= zip(todo, list(tqdm(results, done, total=len(todo), unit="subject")))
        if failures:
            raise failures[0]
        rows = [(subject, *outcome[subject]) for subject in sorted(outcome)]
        table = pd.DataFrame(rows, columns=["Subject", "status", "reason"])
        rejected = table.loc[table["status"] == "rejected", ["Subject", "reason"]]
        write(target / "rejected.csv", rejected.to_csv(index=False))
    print(f"{len(table)} subjects, {len(rejected)} of them rejected (rejected.csv says why)")
    return table


def files(source: Path, *endings: str) -> Iterator[Path]:
    """Files at any depth, behind links too: a download folder is often one, to a large disk.

    Hidden folders are left out: DataLad keeps its contents in ``.git/annex``.
    """
    above: dict[str, tuple[str, ...]] = {}  # by folder, its own and its parents' real places
    for folder, folders, names in os.walk(source, followlinks=True):
        real, parents = os.path.realpath(folder), above.get(os.path.dirname(folder), ())
        if real in parents:  # a link to a folder above
            folders.clear()
            continue
        above[folder] = (*parents, real)
        folders[:] = (name for name in folders if not name.startswith("."))
        paths = (Path(folder, name) for name in names if name.lower().endswith(endings))
        yield from (path for path in paths if path.is_file() or not path.exists())  # no pipes


def owner(path: str | Path) -> str:
    """The ID of the subject that an archive or a file in a subject's tree belongs to, "" if none.

    Of an archive, how its name starts; of a tree, the whole name of the folder above ``T1w`` and
    ``ses-…``, or above the series.
    """
    path = Path(os.path.abspath(path))
    if path.suffix.lower() == ".zip":
        hit = SUBJECT.match(path.name)
        return hit["subject"] if hit else ""
    folders = path.parent.parts[:0:-1]  # upwards, but for the root
    if "T1w" in folders:
        folders = folders[folders.index("T1w") :]
    name = next((name for name in folders if not NO_SUBJECT.fullmatch(name)), "")
    return name.removeprefix("sub-")


def by_subject(paths: Iterable[Path]) -> dict[str, list[Path]]:
    """Paths by their `owner`; what two links lead to counts once."""
    found: dict[str, dict[str, Path]] = {}
    for path in sorted(paths):
        if subject := owner(path):
            found.setdefault(subject, {}).setdefault(os.path.realpath(path), path)
    return {subject: list(real.values()) for subject, real in found.items()}


def _extract_one(subject: str, paths: list[Path], source: Path, target: Path, patterns) -> None:
    with ExitStack() as stack:
        labels = [path.relative_to(source).as_posix() for path in paths]
        searches = (find(*each, patterns, stack, target) for each in zip(paths, labels))
        members = [hit for search in searches for hit in search]
        found = [hit for hit in members if hit[1].filename.lower().endswith((".nii", ".nii.gz"))]
        if len(found) != 1:
            hits = ", ".join(label for _, _, label in found[:4]) or "none"
            hint = ""
            if not found and any("fa.nii" in pattern.lower() for pattern in patterns):
                hint = "; HCP ships no FA map: fit one, DATA_ACCESS.md says how"
            raise Rejected(
                f"{', '.join(labels)}: expected one file named like {' or '.join(patterns)}, "
                f"found {hits}{hint}"
            )
        end, other = ".nii.gz", ".nii"
        if found[0][1].filename.lower().endswith(other):
            end, other = other, end
        with replacing(target / (subject + end)) as partial, open(partial, "wb") as file:
            for chunk in chunks(found[0], MAX_MEMBER):
                file.write(chunk)
        (target / (subject + other)).unlink(missing_ok=True)  # one volume a subject


def find(file, label: str, patterns, stack: ExitStack, scratch: Path | None = None) -> list[Member]:
    """Return an archive's matching members; with `scratch` also those of the archives in it."""
    with reading(label):
        archive = stack.enter_context(zipfile.ZipFile(file))
    found = []
    for info in archive.infolist():
        where, name = f"{label}/{info.filename}", re.split(r"[/\\]", info.filename.lower())[-1]
        if re.search(r"(^|[/\\])(__MACOSX[/\\]|\._)", info.filename):
            continue
        if name.endswith(".zip") and scratch:
            inner = _open_inner(file, (archive, info, where), scratch, stack)
            hits = find(inner, where, patterns, stack)
            if not hits:
                inner.close()  # which gives a temporary file's space back
            found += hits
        elif any(fnmatchcase(name, pattern.lower()) for pattern in patterns):
            found.append((archive, info, where))
    return found


def _open_inner(path: Path, member: Member, scratch: Path, stack: ExitStack) -> io.BufferedIOBase:
    """Open an archive within an archive as a file in which zipfile can seek."""
    _, info, label = member
    if info.compress_type != zipfile.ZIP_STORED:
        file = stack.enter_context(tempfile.TemporaryFile(dir=scratch))
        for chunk in chunks(member, MAX_INNER):
            file.write(chunk)
        file.flush()
        return file
    check(member, info.file_size)  # read in place: of any size
    with reading(label):
        outer = stack.enter_context(open(path, "rb", buffering=0))
        outer.seek(info.header_offset + 26)  # lengths of name and extra field, in a local header
        start = info.header_offset + 30 + sum(struct.unpack("<HH", outer.read(4)))
        return stack.enter_context(io.BufferedReader(_Window(outer, start, info.file_size)))


class _Window(io.RawIOBase):
    """`size` bytes of a file from `start` on, as a file (ZipExtFile seeks by reading anew)."""

    def __init__(self, file: io.FileIO, start: int, size: int):
        self.file, self.start, self.end = file, start, start + size
        file.seek(start)

    def readable(self) -> bool:
        return True

    seekable = readable

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        origin = (self.start, self.file.tell(), self.end)[whence]
        return self.file.seek(origin + offset) - self.start

    def readinto(self, buffer) -> int:
        return self.file.readinto(memoryview(buffer)[: max(self.end - self.file.tell(), 0)])


def chunks(member: Member, limit: int) -> Iterator[bytes]:
    """Yield a member's bytes to its end, where zipfile compares their checksum."""
    archive, info, label = member
    check(member, limit)
    with reading(label), archive.open(info) as stream:
        left = info.file_size
        while chunk := stream.read(CHUNK):
            left -= len(chunk)
            yield chunk
        if left:
            raise EOFError(f"{left} fewer bytes than declared")


def check(member: Member, limit: int) -> None:
    archive, info, label = member
    if info.flag_bits & 1:
        raise Rejected(f"{label}: encrypted, which HCP's archives are not: download it again")
    if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise Rejected(f"{label}: expected deflate, found method {info.compress_type}: repack it")
    if info.file_size > limit:
        raise Rejected(f"{label}: expected at most {limit} bytes, declared are {info.file_size}")
    stored = min(info.compress_size, archive.start_dir)  # which it says itself, and could be a lie
    if info.file_size > MAX_RATIO * stored + CHUNK:
        raise Rejected(
            f"{label}: expected at most {MAX_RATIO} times what is stored, {stored} bytes, declared "
            f"are {info.file_size}: no volume"
        )


@contextmanager
def reading(label: str, expected: str = "a whole zip archive") -> Iterator[None]:
    """Turn what a bad file raises into a rejection; what is written is written outside."""
    try:
        yield
    except UNREADABLE as error:
        problem = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise Rejected(
            f"{label}: expected {expected}, cannot read it ({problem}): download it again"
        ) from error
