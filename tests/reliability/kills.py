"""Kill commands at random moments, start them again until they are done, and compare.

``python -m tests.reliability.kills FOLDER`` prints the figures. An attempt is a fork of this
process, which has imported everything and computed nothing: so a kill falls within the work.
"""

import itertools
import json
import os
import random
import signal
import sys
import time
import traceback
from contextlib import suppress
from pathlib import Path

import torch
import torch._dynamo  # which Adam would import in each attempt

from brainsex import explain, storage
from brainsex.__main__ import main
from tests.reliability.hostile import COMMANDS, write_study

# kills of each command, at least, in `make soak`
KILLS = {"extract": 20, "convert": 20, "train": 20, "train-by-two": 5, "masks": 15, "fa": 20}
FINISHED = {"convert": ".parts/[!.]*.npz", "train": "fold-*.json", "masks": "mask/*.nii.gz"}
"""Files that no later run may write again; of other commands the volumes of the subjects."""


def arguments(study: Path, name: str, out: Path) -> list[str]:
    """Return the arguments of a command that reads a study; of train also with two workers."""
    words = COMMANDS[name.split("-")[0]].format(study, out).split()
    return [*words[:-1], "2"] if name == "train-by-two" else words


def start(folder: Path, command: str, out: Path) -> int:
    """Start a command in a child process, the head of its own group; return its ID."""
    if pid := os.fork():
        with suppress(OSError):  # the child may have done so, and ended
            os.setpgid(pid, pid)
        return pid
    os.setpgid(0, 0)
    os.dup2(2, 1)
    explain.CHUNK, replace = 2, os.replace
    # between a file's writing and its naming kills are worst
    os.replace = lambda *paths: time.sleep(0.005) or replace(*paths)
    try:
        main(arguments(folder, command, out))
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)


def wait_for_group(group: int) -> None:
    """Wait until no process of a group is left: none may outlive its parent for a minute."""
    with suppress(ProcessLookupError):
        for _ in range(6000):
            os.killpg(group, 0)
            time.sleep(0.01)
        raise AssertionError(f"processes of {group} outlive the run that was killed")


def read_tree(folder: Path) -> dict[str, bytes]:
    """Read the files of a folder at any depth, but hidden ones."""
    names = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    return {name: (folder / name).read_bytes() for name in names if "/." not in f"/{name}"}


def finished_files(out: Path, command: str) -> dict[Path, tuple[int, int]]:
    """Return inode and time of the files that no later run may write again."""
    paths = list(out.glob(FINISHED.get(command.split("-")[0], "*.nii.gz")))
    if command.startswith("train"):
        paths += [path.with_suffix(".pt") for path in paths]
    return {path: (path.stat().st_ino, path.stat().st_mtime_ns) for path in paths}


def kill(folder: Path, command: str, least: int, draw: random.Random) -> dict[str, int]:
    """Kill a command `least` times or more; AssertionError where anything is lost or differs."""
    began, figures = time.monotonic(), {"kills": 0, "runs": 0}
    assert os.waitpid(start(folder, command, folder / command), 0)[1] == 0
    duration, expected = time.monotonic() - began, read_tree(folder / command)
    while figures["kills"] < least:
        out, before = folder / f"{command}-{figures['runs']}", {}
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
            if overlap:
                continue  # the next one starts while orphans may still be there
            wait_for_group(pid)
            assert read_tree(out).items() <= expected.items(), "a file is not whole"
            after = finished_files(out, command)
            repeated = [path for path in before.keys() & after if after[path] != before[path]]
            assert not repeated, f"{command}: made again: {repeated}"
            before |= after
        assert read_tree(out) == expected, f"{command}: another result than undisturbed"
        assert {path.name for path in out.rglob(".*") if path.suffix != ".partial"} <= {".lock"}
        after = finished_files(out, command)
        assert all(after.get(path, stamp) == stamp for path, stamp in before.items())
    return figures


def measure(folder: Path, kills: dict[str, int]) -> None:
    """Print the figures of each command, after so many kills of it, on the study in a folder."""
    torch.set_num_threads(1)  # small volumes only wait for a second one
    storage._environment()  # once: a commit on the way would be on record
    if not (folder / "in").is_dir():
        write_study(folder, 36)
    for command, least in kills.items():
        print(command, kill(folder, command, least, random.Random(0)), flush=True)


if __name__ == "__main__":  # a process of its own, for tests whose process has threads
    measure(Path(sys.argv[1]), json.loads(sys.argv[2]) if len(sys.argv) > 2 else KILLS)
