"""Kill commands at random moments, start them again until they are done, and compare.

``python -m tests.reliability.kills FOLDER`` prints the figures. An attempt is a fork of this
process, which has imported everything and computed nothing: so a kill falls within the work.
"""

import itertools
import json
import multiprocessing
import os
import random
import signal
import sys
import time
import traceback
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from pathlib import Path

import numpy as np
import pandas as pd
import torch
import torch._dynamo  # which Adam would import in each attempt

from brainsex import explain, storage, volumes
from brainsex.__main__ import main
from tests.test_diffusion import save, series

KILLS = {"extract": 20, "convert": 20, "train": 20, "train, 2 workers": 5, "masks": 15, "fa": 20}
"""Kills of each command, at least, in `make soak`."""
SHAPE = (22, 22, 22)
TRAIN = "--channels 2 --folds 2 --batch-size 6 --lr 0.003 --milestones 3".split()
FINISHED = {"convert": ".parts/[!.]*.npz", "train": "fold-*.json", "masks": "mask/*.nii.gz"}
"""Files that no later run may write again; of other commands the volumes of the subjects."""


def make_inputs(folder: Path, subjects: int = 36, trained: int = 12, epochs: int = 6) -> None:
    """Write inputs and, as ``commands.json``, the arguments of each command for a folder OUT."""
    data, small = folder / "cohort", folder / "small"
    main(["synthesize", str(data), "--subjects", str(subjects), "--spacing", "8"])
    main(["extract", str(data), str(data / "fa")])
    small.mkdir()
    people = pd.read_csv(data / "unrestricted_behavioral.csv", dtype=str)
    people = people[[(data / "fa" / f"{name}.nii.gz").is_file() for name in people["Subject"]]]
    people = people.groupby("Gender").head(trained // 2)
    people.to_csv(small / "unrestricted_behavioral.csv", index=False)
    volumes.convert(data / "fa", small, small, shape=SHAPE)
    main(["train", str(small), str(folder / "networks"), *TRAIN, "--epochs", "1", "--workers", "1"])
    for number in range(subjects):
        save(folder / "series" / f"{900000 + number}" / "T1w" / "Diffusion", series(number % 7))
    train = ["train", str(small), "OUT", *TRAIN, "--epochs", str(epochs), "--workers"]
    commands = {
        "extract": ["extract", str(data), "OUT"],
        "convert": ["convert", str(data), "--fa", str(data / "fa"), "--out", "OUT"],
        "train": [*train, "1"],
        "train, 2 workers": [*train, "2"],
        "masks": ["masks", str(small), str(folder / "networks"), "OUT"],
        "fa": ["fa", str(folder / "series"), "OUT"],
    }
    (folder / "commands.json").write_text(json.dumps(commands))


def arguments(folder: Path, command: str, out: Path) -> list[str]:
    """Return the arguments of a command on the inputs in `folder`."""
    words = json.loads((folder / "commands.json").read_text())[command]
    return [str(out) if word == "OUT" else word for word in words]


def start(folder: Path, command: str, out: Path) -> int:
    """Start a command in a child process, the head of its own group; return its ID."""
    if pid := os.fork():
        with suppress(OSError):  # the child may have done so, and ended
            os.setpgid(pid, pid)
        return pid
    os.setpgid(0, 0)
    log = os.open(out.with_suffix(".log"), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    explain.CHUNK, replace = 2, os.replace

    def replace_slowly(*paths) -> None:  # between a file's writing and its naming kills are worst
        time.sleep(0.005)
        replace(*paths)

    os.replace = replace_slowly
    try:
        main(arguments(folder, command, out))
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)
    os._exit(0)


def wait_for_group(group: int) -> None:
    """Wait until no process of a group is left: none may outlive its parent for a minute."""
    end = time.monotonic() + 60
    with suppress(ProcessLookupError):
        while time.monotonic() < end:
            os.killpg(group, 0)
            time.sleep(0.01)
        raise AssertionError(f"processes of {group} outlive the run that was killed")


def read_tree(folder: Path) -> dict[str, bytes]:
    """Read the files of a folder at any depth, but hidden ones."""
    paths = [path.relative_to(folder) for path in folder.rglob("*") if path.is_file()]
    paths = [path for path in paths if not any(part.startswith(".") for part in path.parts)]
    return {str(path): (folder / path).read_bytes() for path in paths}


def check_whole(out: Path, expected: dict[str, bytes]) -> None:
    """Assert that each file under a final name is whole, and the undisturbed run's or a part."""
    tree = read_tree(out)
    assert tree.items() <= expected.items(), [name for name in tree if tree[name] != expected[name]]
    for path in out.glob(FINISHED["convert"]):
        with np.load(path) as part:
            assert np.isfinite(part["volume"]).all()
    for path in out.glob(".*.checkpoint"):
        assert torch.load(path, weights_only=True)["history"]


def finished_files(out: Path, command: str) -> dict[Path, tuple[int, int]]:
    """Return inode and time of the files that no later run may write again."""
    paths = list(out.glob(FINISHED.get(command.split(",")[0], "*.nii.gz")))
    if command.startswith("train"):
        paths += [path.with_suffix(".pt") for path in paths]
    return {path: (path.stat().st_ino, path.stat().st_mtime_ns) for path in paths}


def kill(folder: Path, command: str, least: int, draw: random.Random) -> dict[str, int]:
    """Kill a command `least` times or more; AssertionError where anything is lost or differs."""
    began, whole = time.monotonic(), folder / command
    assert os.waitpid(start(folder, command, whole), 0)[1] == 0, whole.with_suffix(".log")
    duration, expected = time.monotonic() - began, read_tree(whole)
    figures = {"kills": 0, "runs": 0, "partial files": 0, "finished files kept": 0}
    while figures["kills"] < least:
        out, before = folder / f"{command} {figures['runs']}", {}
        figures["runs"] += 1
        for attempts in itertools.count():
            pid = start(folder, command, out)
            time.sleep(draw.uniform(0, 0.9 * duration) * (1 + attempts / 8))  # so one gets there
            if os.waitpid(pid, os.WNOHANG)[0]:
                break  # it was done before: what it left shows how it ended
            only_parent, overlap = draw.random() < 0.5, draw.random() < 0.5
            (os.kill if only_parent else os.killpg)(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            figures["kills"] += 1
            figures["partial files"] += len(list(out.rglob(".*.partial")))
            if overlap:
                continue  # the next one starts while orphans may still be there
            wait_for_group(pid)
            check_whole(out, expected)
            after = finished_files(out, command)
            repeated = [path for path in before.keys() & after if after[path] != before[path]]
            assert not repeated, f"{command}: made again: {repeated}"
            before |= after
            figures["finished files kept"] = max(figures["finished files kept"], len(before))
        assert read_tree(out) == expected, f"another result than undisturbed: {out}.log"
        assert {path.name for path in out.rglob(".*")} <= {".lock"}
        after = finished_files(out, command)
        assert all(after.get(path, stamp) == stamp for path, stamp in before.items())
    return figures


def measure(folder: Path, kills: dict[str, int]) -> None:
    """Print the figures of each command after so many kills of it."""
    storage.environment()  # once: a commit on the way would be on record
    if not (folder / "commands.json").is_file():
        with ProcessPoolExecutor(1, multiprocessing.get_context("fork")) as pool:
            pool.submit(make_inputs, folder).result()
    for command, least in kills.items():
        print(command, kill(folder, command, least, random.Random(0)), flush=True)


if __name__ == "__main__":  # a process of its own, for tests whose process has threads
    measure(Path(sys.argv[1]), json.loads(sys.argv[2]) if len(sys.argv) > 2 else KILLS)
