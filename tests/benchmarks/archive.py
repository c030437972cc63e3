"""Reading one member of an archive of 1 GB within an archive, stored or compressed."""

import zipfile
import zlib
from contextlib import ExitStack
from pathlib import Path

import numpy as np

from brainsex import archives
from tests.benchmarks.measure import Table, seconds

SERIES, MAP = 1 << 30, 15 << 20  # bytes of what lies beside the wanted member, and of that


def _made(path: Path, how: int) -> None:
    """An outer archive with an inner one, of a noisy series and the map, `how` compressed."""
    rng = np.random.default_rng(0)
    part = rng.normal(1000, 60, 1 << 23).astype(np.int16).tobytes()
    path.parent.mkdir(parents=True, exist_ok=True)
    inner = path.with_suffix(".inner")
    with zipfile.ZipFile(inner, "w", how, compresslevel=1) as archive:
        with archive.open("T1w/Diffusion/data.nii", "w", force_zip64=True) as file:
            for _ in range(SERIES // len(part)):
                file.write(part)
        fa = rng.normal(1000, 60, MAP // 2).astype(np.int16).tobytes()
        archive.writestr("T1w/Diffusion/900001_FA.nii", fa, zipfile.ZIP_DEFLATED)
    with zipfile.ZipFile(path, "w", how, compresslevel=1) as archive:
        archive.write(inner, "900001_inner.zip")
    inner.unlink()


def read_member(folder: Path, table: Table) -> None:
    table.heading(
        "Archives: a member of an inner archive of 1 GB, against reading its bytes, inflating them "
        "and their checksum (where the inner archive is compressed, all of its bytes)"
    )
    for what, how in (("stored", zipfile.ZIP_STORED), ("compressed", zipfile.ZIP_DEFLATED)):
        path = folder / f"900001_{what}.zip"
        if not path.is_file():
            _made(path, how)

        def ours(path=path):
            with ExitStack() as stack:
                names, limit = ("*_FA.nii",), archives.MAX_MEMBER
                ((_, opener),) = archives.find_members(path, path.name, names, stack, limit)
                with opener() as stream:
                    while stream.read(1 << 20):
                        pass

        start, size = _place(path, how)

        def plain(path=path, start=start, size=size):
            inflate, checksum = zlib.decompressobj(-15).decompress, 0
            with path.open("rb", buffering=0) as file:
                file.seek(start)
                for offset in range(0, size, 1 << 20):
                    part = inflate(file.read(min(1 << 20, size - offset)))
                    checksum = zlib.crc32(part, checksum)

        table.add("archive", f"inner archive {what}", "s", seconds(ours), seconds(plain))


def _place(path: Path, how: int) -> tuple[int, int]:
    """Where in the file the deflated bytes begin that must be inflated, and how many they are."""
    with zipfile.ZipFile(path) as outer:
        info = outer.getinfo("900001_inner.zip")
        inner_at = _data(path, info.header_offset)
        if how != zipfile.ZIP_STORED:
            return inner_at, info.compress_size
        with outer.open(info) as file, zipfile.ZipFile(file) as inner:
            member = inner.getinfo("T1w/Diffusion/900001_FA.nii")
        return _data(path, inner_at + member.header_offset), member.compress_size


def _data(path: Path, header: int) -> int:
    """Where a member's bytes begin, by its local header."""
    with path.open("rb") as file:
        file.seek(header + 26)
        return header + 30 + sum(int.from_bytes(file.read(2), "little") for _ in range(2))
