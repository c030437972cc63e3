"""Reading a cohort larger than memory: one in ten of its volumes, from the disk."""

import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from brainsex import SHAPE, speed
from brainsex.cohort import VolumeRows
from tests.benchmarks.measure import Table

VOLUMES, TAKEN, BATCH = 2000, 200, 40  # so few that what is read beside them is of no use
COHORT = 40_000


def read_cohort(path: Path, table: Table) -> None:
    """Batches in random order as training reads them, and by a plain map, against one sweep."""
    if sys.platform != "linux":
        print("\nReading is measured on Linux alone.")
        return
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        volumes = np.lib.format.open_memmap(path, "w+", np.float32, (VOLUMES, *SHAPE))
        noise = np.random.default_rng(0).random((BATCH, *SHAPE), np.float32)
        for start in range(0, VOLUMES, BATCH):
            volumes[start : start + BATCH] = noise
        volumes.flush()
        del volumes  # what is mapped stays in memory
    volume = int(np.prod(SHAPE)) * 4
    order = np.random.default_rng(0).permutation(VOLUMES)[:TAKEN]

    def swept():
        with path.open("rb", buffering=0) as file:
            for _ in range(TAKEN):
                file.read(volume)

    def batches(form: Callable):
        source = form(np.load(path, mmap_mode="r"))
        for rows in np.array_split(order, TAKEN // BATCH):
            speed.read_batch(source, rows, torch.device("cpu"))

    table.heading(
        f"Reading {TAKEN} of {VOLUMES} volumes of {volume / 1e6:.2f} MB from the disk, scaled to "
        f"{COHORT} volumes, against one sweep"
    )
    sweep, swept_bytes = _cold(swept, path)
    ways = {
        "random order, as in training": lambda: batches(
            lambda v: VolumeRows(v, np.arange(VOLUMES))
        ),
        "random order, by a plain map": lambda: batches(lambda v: v),
    }
    for what, way in ways.items():
        took, read = _cold(way, path)
        table.add("reading", what, "s", took * COHORT / TAKEN, sweep * COHORT / TAKEN)
        needed = TAKEN * volume
        table.add(
            "reading",
            f"{what}: bytes read, of each needed",
            "",
            read / needed,
            swept_bytes / needed,
        )


def _cold(function: Callable, path: Path) -> tuple[float, int]:
    """Seconds (the shortest of three runs) and bytes read, nothing of the file being in memory."""
    runs = []
    for _ in range(3):
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        before, start = _bytes_read(), time.perf_counter()
        function()
        runs.append((time.perf_counter() - start, _bytes_read() - before))
    return min(runs)


def _bytes_read() -> int:
    """By this process from disks so far."""
    lines = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(lines["read_bytes"])
