"""Volumes from HCP's zip archives, nested ones read in place: one NIfTI file a subject."""

import errno
import glob
import re
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path
from typing import IO

import pandas as pd
from joblib import Parallel, cpu_count, delayed
from tqdm.auto import tqdm

from brainsex import layouts, storage

FA_MEMBERS = ("*_FA.nii.gz", "FA.nii.gz", "*_FA.nii", "FA.nii")
MAX_MEMBER = 2 << 30  # bytes of the largest volume extracted
MAX_INNER = 8 << 30  # bytes of the largest compressed archive within another one
MAX_RATIO = 500  # inflated bytes to stored ones: brain masks reach 350, zip bombs 1000
CHUNK = 1 << 20  # bytes read at a time
DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
File = tuple[str, Callable[[], IO[bytes]]]  # its name in messages, and what opens it


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
    member : glob patterns of the volume's name, or of the end of its path, in any case; inner
        archives are searched, too.
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
            members = [member for member in members if re.search(r"(?i)\.nii(\.gz)?$", member[0])]
            if len(members) != 1:
                hits = ", ".join(label for label, _ in members) or "none (HCP has no FA: use fa)"
                expected = f"expected one file named like {' or '.join(patterns)}"
                raise ValueError(f"{', '.join(paths)}: {expected}, found {hits}")
            ending = ".nii.gz" if members[0][0].lower().endswith(".gz") else ".nii"
            whole = storage.atomic_path(target / f"{subject}{ending}")
            with whole as partial_path, open(partial_path, "wb") as file:
                file.writelines(_read_chunks(members[0]))
        return "extracted"

    run = {"command": "extract", "settings": {"member": patterns}, "overwrite": overwrite}
    return process_subjects(work, source, (".zip",), target, workers, **run)


def process_subjects(
    work: Callable, source: Path, endings: Sequence[str], target: Path, workers: int | None, **run
) -> pd.DataFrame:
    """Call `work` for each subject without a volume in `target`; return the table of `extract`.

    `work` takes the subject and its files of these `endings`, by their names below `source`; it
    writes ``target/<ID>.nii.gz`` and returns the status. A subject for whom it raises is rejected;
    only a failure to write to `target` ends the `run`, which `storage.start_run` records.
    """
    paths, groups = layouts.find_files(source, *endings), {}
    for subject, path in zip(layouts.name_subjects(paths), paths):
        if subject:
            groups.setdefault(subject, {})[path.relative_to(source).as_posix()] = path
    if not groups:
        expected = "expected archives <ID>_….zip or <ID>.zip (to fit: or <ID>/T1w/Diffusion)"
        raise FileNotFoundError(f"{source}: {expected}, found none; DATA_ACCESS.md has the source")
    storage.start_run(target, **run, results=[f"{glob.escape(name)}.nii*" for name in groups])
    present = {path.name.split(".nii")[0] for path in target.glob("*.nii*")}

    def attempt(subject: str) -> tuple[str, str, str]:
        if subject in present:
            return subject, "present", ""
        try:
            return subject, work(subject, groups[subject]), ""
        except Exception as error:
            path = Path(getattr(error, "filename", None) or "")
            if target in path.parents or getattr(error, "errno", None) in DISK_FULL:
                raise
            name = "" if isinstance(error, ValueError) else f"{subject}: {type(error).__name__}: "
            return subject, "rejected", f"{name}{error}"

    threads = Parallel(workers or cpu_count(), require="sharedmem", return_as="generator")
    rows = threads(delayed(attempt)(subject) for subject in sorted(groups))
    rows = list(tqdm(rows, run["command"], total=len(groups), unit="subject"))
    table = pd.DataFrame(rows, columns=["Subject", "status", "reason"])
    rejected = table.loc[table["status"] == "rejected", ["Subject", "reason"]]
    storage.write_text(target / "rejected.csv", rejected.to_csv(index=False))
    print(run["command"], table["status"].value_counts().to_dict(), "(rejected.csv says why)")
    return table


def find_members(
    file: Path | IO[bytes], label: str, patterns: Sequence[str], stack: ExitStack, limit: int
) -> list[File]:
    """Return the matching members of an archive, and of those within a file's archive.

    `label` names the archive in messages; files stay open until `stack` closes. Raises ValueError
    for a damaged archive, and for a member of more than `limit` bytes or a zip bomb.
    """
    members: list[File] = []
    with storage.reading(label, "a whole zip archive"):
        archive = stack.enter_context(zipfile.ZipFile(file))
        for info in archive.infolist():
            path, place = "/" + info.filename.replace("\\", "/").lower(), f"{label}/{info.filename}"
            inner = path.endswith(".zip") and isinstance(file, Path)  # no deeper than this
            wanted = inner or any(fnmatchcase(path, f"*/{name.lower()}") for name in patterns)
            if not wanted or "/__macosx/" in path or "/._" in path:
                continue
            stored = min(info.compress_size, archive.start_dir)  # the declared size could be a lie
            most = min(MAX_INNER if inner else limit, MAX_RATIO * stored + CHUNK)
            if info.file_size > most:
                problem = f"expected at most {most} bytes ({stored} are stored)"
                raise ValueError(f"{place}: {problem}, found {info.file_size} declared; repack it")
            elif inner:
                stream = stack.enter_context(archive.open(info))
                members += find_members(stream, place, patterns, stack, limit)
            else:
                members.append((place, partial(archive.open, info)))
    return members


def _read_chunks(member: File) -> Iterator[bytes]:
    """Yield the bytes of a member; zipfile compares their checksum."""
    with storage.reading(member[0], "a whole zip archive"), member[1]() as stream:
        yield from iter(partial(stream.read, CHUNK), b"")
