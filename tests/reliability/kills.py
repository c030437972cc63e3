"""Kill commands at random moments, start them again until they are done, and compare.

An attempt is a fork of this process, which has imported everything and computed nothing: so a kill
falls within the work, not within imports. ``python -m tests.reliability.kills`` prints the figures.
"""

import itertools
import json
import multiprocessing
import os
import random
import shutil
import signal
import sys
import tempfile
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
TRAIN = "--channels 2 --folds 2 --batch-size 6 --lr 0.003 --milestones 3".split()
FINISHED = {"convert": ".parts/[!.]*.npz", "train": "fold-*.json", "masks": "mask/*.nii.gz"}
"""Files that no later run may write again; of other commands the volumes of the subjects."""


def make_inputs(
    folder: Path, subjects: int = 36, trained: int = 12, epochs: int = 6
) -> dict[str, list[str]]:
    """Write inputs and return the arguments of each command, in which OUT stands for its folder."""
    data, small = folder / "cohort", folder / "small"
    main(["synthesize", str(data), "--subjects", str(subjects), "--spacing", "8"])
    main(["extract", str(data), str(data / "fa")])
    small.mkdir()
    people = pd.read_csv(data / "unrestricted_behavioral.csv", dtype=str)
    people = people[
        [(data / "fa" / f"{subject}.nii.gz").is_file() for subject in people["Subject"]]
    ]
    people = people.groupby("Gender").head(trained // 2)
    people.to_csv(small / "unrestricted_behavioral.csv", index=False)
    volumes.convert(data / "fa", small, small, shape=(22, 22, 22))
    main(["train", str(small), str(folder / "networks"), *TRAIN, "--epochs", "1", "--workers", "1"])
    for number in range(subjects):
        save(folder / "series" / f"{900000 + number}" / "T1w" / "Diffusion", series(number % 7))
    train = ["train", str(small), "OUT", *TRAIN, "--epochs", str(epochs), "--workers"]
    return {
        "extract": ["extract", str(data), "OUT"],
        "convert": ["convert", str(data), "--fa", str(data / "fa"), "--out", "OUT"],
        "train": [*train, "1"],
        "train, 2 workers": [*train, "2"],
        "masks": ["masks", str(small), str(folder / "networks"), "OUT"],
        "fa": ["fa", str(folder / "series"), "OUT"],
    }


def fill_in(arguments: list[str], out: Path) -> list[str]:
    return [str(out) if word == "OUT" else word for word in arguments]


def start(arguments: list[str], out: Path) -> int:
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
        main(fill_in(arguments, out))
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
    """Read the files of a folder at any depth, but for its lock."""
    paths = [path for path in folder.rglob("*") if path.is_file() and path.name != ".lock"]
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


def check_whole(out: Path, expected: dict[str, bytes]) -> None:
    """Assert that each file under a final name is whole, and the undisturbed run's or a part."""
    for name, content in read_tree(out).items():
        if name.endswith(".npz"):
            with np.load(out / name) as part:
                assert np.isfinite(part["volume"]).all()
        elif name.endswith(".checkpoint"):
            assert torch.load(out / name, weights_only=True)["history"]
        elif not name.endswith(".partial"):
            assert content == expected[name], name


def finished_files(out: Path, command: str) -> dict[Path, tuple[int, int]]:
    """Return inode and time of the files that no later run may write again."""
    paths = list(out.glob(FINISHED.get(command.split(",")[0], "*.nii.gz")))
    if command.startswith("train"):
        paths += [path.with_suffix(".pt") for path in paths]
    return {path: (path.stat().st_ino, path.stat().st_mtime_ns) for path in paths}


def kill(command: str, arguments: list[str], folder: Path, least: int, draw: random.Random) -> dict:
    """Kill a command `least` times or more; AssertionError where anything is lost or differs."""
    began = time.monotonic()
    pid = start(arguments, folder / "whole")
    assert os.waitpid(pid, 0)[1] == 0, (folder / "whole.log").read_text()
    duration, expected = time.monotonic() - began, read_tree(folder / "whole")
    assert not any(part.startswith(".") for name in expected for part in Path(name).parts)
    figures = {"kills": 0, "runs": 0, "partial files": 0, "finished files kept": 0}
    while figures["kills"] < least:
        out, before = folder / f"out-{figures['runs']}", {}
        figures["runs"] += 1
        for attempts in itertools.count():
            pid = start(arguments, out)
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
            repeated = {path for path in before.keys() & after if after[path] != before[path]}
            assert not repeated, f"{command}: made again: {repeated}"
            before |= after
            figures["finished files kept"] = max(figures["finished files kept"], len(before))
        log = out.with_suffix(".log").read_text()
        assert read_tree(out) == expected, f"{command}: another result than undisturbed\n{log}"
        after = finished_files(out, command)
        assert all(after.get(path, stamp) == stamp for path, stamp in before.items())
        shutil.rmtree(out)
    return figures


def measure(kills: dict[str, int], folder: Path, commands: dict[str, list[str]]) -> dict:
    """Return the figures of each command after so many kills of it; `folder` gets its results."""
    draw, figures = random.Random(0), {}
    storage.environment()  # once: a commit on the way would be on record
    for command, least in kills.items():
        (folder / command).mkdir(parents=True)
        figures[command] = kill(command, commands[command], folder / command, least, draw)
        print(command, figures[command], flush=True)
    return figures


if __name__ == "__main__":  # a process of its own, for tests whose process has threads
    if len(sys.argv) > 1:
        kills, results, commands = sys.argv[1:]
        measure(json.loads(kills), Path(results), json.loads(commands))
    else:
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary)
            with ProcessPoolExecutor(1, multiprocessing.get_context("fork")) as pool:
                commands = pool.submit(make_inputs, folder / "inputs").result()
            measure(KILLS, folder / "results", commands)
