"""What a network sees in men's and women's brains: from FA archives to perturbation masks."""

import hashlib
import json
import os
import re
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

SHAPE = (58, 70, 58)
"""Voxels of a volume as the networks take it: X, Y, Z in RAS (about 3.1 mm each)."""

LABELS = {"F": 0, "M": 1}
"""Label coding of HCP's Gender column, used everywhere: women 0, men 1."""

MODALITIES = {"fa": "FA", "t1": "T1w (brain's median 0.5)"}
"""What a cohort's volumes are, and how figures label their values, which are in [0, 1]."""


def identifier(path: str | Path) -> str:
    """The subject's ID in a volume's name, ``<ID>.nii.gz``, ``<ID>_FA.nii.gz`` or without gz.

    TBSS appends ``_FA`` to names that end so already. BIDS's ``sub-`` is no part of it, here and in
    tables.
    """
    name = Path(path).name.removesuffix(".gz").removesuffix(".nii")
    return re.sub("(_FA)+$", "", name).removeprefix("sub-")


def seeded(seed: int, subject: str) -> int:
    """A seed for one subject's draws, of the run's seed and the subject's name alone."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{subject}".encode()).digest()[:7], "big")


KEEP_MEMORY = {"GLIBC_TUNABLES": "glibc.malloc.mmap_max=0:glibc.malloc.trim_threshold=8000000000"}
"""Environment in which glibc keeps what a training step frees for the next one: else the kernel
clears every page of every step anew. Read when a process starts, so set for child processes."""


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a partial path beside `path`; rename it to `path` on success, delete it on failure.

    A file under its final name is therefore always whole, whatever kills the process. The partial
    name is this call's own: no other process, left over from a killed run, writes there.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{secrets.token_hex(4)}.partial")
    try:
        yield partial
        os.replace(partial, path)
    except OSError as error:
        if error.errno and not error.filename:  # a write to a full disk, which names no file
            error.filename = str(path)
        raise
    finally:
        partial.unlink(missing_ok=True)


def read_record(path: Path) -> dict:
    """The JSON object that a command left; a ValueError that names the file where there is none."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file.")
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: expected JSON, cannot read it ({error}). Delete it.") from error
    if not isinstance(record, dict):
        raise ValueError(f"{path}: expected a JSON object, found {record!r:.100}. Delete it.")
    return record


def write(path: Path, text: str) -> None:
    """Write a text whole, or not at all."""
    with replacing(path) as partial:
        partial.write_text(text, encoding="utf-8")
