"""Kill commands at random moments, start them again until they are done, and compare.

Each attempt is a fork of this process, which has imported everything and computed nothing: so a
kill falls within the work, not within imports.
"""

import contextlib
import itertools
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from pathlib import Path

import numpy as np
import pandas as pd
import torch
import torch._dynamo  # which Adam would import in each attempt

from brainsex import masks, runs, volumes
from brainsex.__main__ import main
from tests.test_diffusion import save, series

KILLS = {"extract": 25, "convert": 25, "train": 25, "train, 2 workers": 5, "masks": 20, "fa": 25}
"""How many at least in `make soak`."""
CV = "--channels 2 --folds 2 --batch-size 6 --lr 0.003 --milestones 3".split()


def make(folder: Path, copies: int = 1, epochs: int = 6) -> dict[str, list[str]]:
    """Small inputs, each subject so many times, and the arguments of every command; OUT is open."""
    data, small = folder / "cohort", folder / "small"
    main(["synthesize", str(data), "--subjects", "12", "--spacing", "5"])
    main(["extract", str(data), str(data / "fa")])
    volumes.convert(data / "fa", data, small, shape=(22, 22, 22))
    main(["train", str(small), str(folder / "networks"), *CV, "--epochs", "1", "--workers", "1"])
    people = pd.read_csv(data / "unrestricted_behavioral.csv", dtype=str).set_index("Subject")
    rows = []
    for n, path in itertools.product(range(copies), sorted((data / "archives").glob("*.zip"))):
        old, new = path.name.split("_")[0], f"{n}{path.name.split('_')[0]}"
        for place, end in (("packages", "_FA.zip"), ("people/fa", ".nii.gz")):
            (folder / place).mkdir(parents=True, exist_ok=True)
            source = path if end == "_FA.zip" else data / "fa" / f"{old}.nii.gz"
            os.link(source, folder / place / f"{new}{end}")
        rows.append({"Subject": new, "Gender": people.at[old, "Gender"]})
        save(folder / "series" / new / "T1w" / "Diffusion", series(seed=len(rows) % 7))
    table = pd.DataFrame(rows)
    table.to_csv(folder / "people" / "unrestricted_behavioral.csv", index=False)
    train = ["train", str(small), "OUT", *CV, "--epochs", str(epochs), "--workers"]
    return {
        "extract": ["extract", str(folder / "packages"), "OUT"],
        "convert": f"convert {folder}/people --fa {folder}/people/fa --out OUT".split(),
        "train": [*train, "1"],
        "train, 2 workers": [*train, "2"],
        "masks": ["masks", str(small), str(folder / "networks"), "OUT"],
        "fa": ["fa", str(folder / "series"), "OUT"],
    }


def forked(work) -> int:
    """Do something in a child process, the head of its own group."""
    if pid := os.fork():
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.setpgid(pid, pid)
        return pid
    os.setpgid(0, 0)
    code = 2
    try:
        work()
        code = 0
    except SystemExit as stop:
        print(stop, file=sys.stderr)
        code = 1
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


def start(arguments: list[str], out: Path) -> int:
    def work() -> None:
        with (out.parent / f"{out.name}.log").open("a") as log:
            os.dup2(log.fileno(), 1)
            os.dup2(log.fileno(), 2)
        masks.CHUNK, replace = 2, os.replace

        def slowly(*paths) -> None:  # between a file's writing and its naming kills are worst
            time.sleep(0.005)
            replace(*paths)

        os.replace = slowly
        main([str(out) if word == "OUT" else word for word in arguments])

    return forked(work)


def ended(pid: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def gone(group: int) -> None:
    """Wait until no process of a group is left: what outlives its parent by 20 s fails."""
    for _ in range(2000):
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return
        time.sleep(0.01)
    raise AssertionError(f"processes of {group} outlive the run that was killed")


def tree(folder: Path) -> dict[str, bytes]:
    """Files under final names; none of them hidden, but for the lock."""
    found = {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    return {name: content for name, content in found.items() if name != ".lock"}


def check(out: Path, expected: dict[str, bytes]) -> None:
    """Each file under a final name is the undisturbed run's, or on the way to it, and whole."""
    for path in (path for path in out.rglob("*") if path.is_file()):
        name = str(path.relative_to(out))
        if path.name.endswith(".partial") or name == ".lock":
            continue
        if path.suffix == ".npz":  # of convert, which deletes them
            with np.load(path) as part:
                assert all(np.isfinite(part[key]).all() for key in part.files)
        elif path.suffix == ".checkpoint":
            assert torch.load(path, weights_only=True)["history"]
        elif name == "masks.csv":  # which grows
            rows = path.read_bytes().splitlines()
            assert set(rows) <= set(expected[name].splitlines()), name
        else:
            assert path.read_bytes() == expected[name], name


def finished(out: Path, command: str) -> dict[Path, tuple[int, int]]:
    """Inode and time of what no later run may make again."""
    paths = {
        "extract": lambda: out.glob("*.nii.gz"),
        "fa": lambda: out.glob("*.nii.gz"),
        "convert": lambda: out.glob(".convert-*/[!.]*.npz"),
        "train": lambda: (p.with_suffix(end) for p in out.glob("fold-*.json") for end in ENDS),
        "masks": lambda: saved(out),
    }[command.split(",")[0]]()
    return {path: (path.stat().st_ino, path.stat().st_mtime_ns) for path in paths}


ENDS = (".json", ".pt")


def saved(out: Path):
    if (out / "masks.csv").is_file():
        for subject in pd.read_csv(out / "masks.csv", dtype=str)["Subject"]:
            yield from masks._paths(out, subject)


def kill(command: str, arguments: list[str], folder: Path, least: int, draw) -> dict:
    """At least so many kills of a command; an AssertionError where anything is lost or differs."""
    began = time.monotonic()
    assert ended(start(arguments, folder / "whole")) == 0, (folder / "whole.log").read_text()
    duration, expected = time.monotonic() - began, tree(folder / "whole")
    assert not any(Path(name).name.startswith(".") for name in expected)
    found = {"kills": 0, "partial": 0, "kept": 0, "runs": 0, "duration": duration}
    while found["kills"] < least:
        out, before = folder / f"out-{found['runs']}", {}
        found["runs"] += 1
        while True:
            pid = start(arguments, out)
            time.sleep(draw.uniform(0, 0.9 * duration))
            if os.waitpid(pid, os.WNOHANG)[0]:
                break  # and was not waited for again: its code is seen in what it left
            alone, overlap = draw.random() < 0.5, draw.random() < 0.5
            (os.kill if alone else os.killpg)(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            found["kills"] += 1
            if not overlap:
                gone(pid)
            check(out, expected)
            found["partial"] += len(list(out.rglob(".*.partial")))
            if overlap:
                continue  # the next one starts while orphans may still be there
            now = finished(out, command)
            lost = {p for p, stamp in before.items() if p in now and now[p] != stamp}
            assert not lost, f"{command}: made again: {lost}"
            before |= now
            found["kept"] = max(found["kept"], len(before))
        log = (folder / f"{out.name}.log").read_text()
        assert tree(out) == expected, f"{command}: differs from an undisturbed run\n{log[-2000:]}"
        now = finished(out, command)
        assert all(now.get(path, stamp) == stamp for path, stamp in before.items())
        shutil.rmtree(out)
    return found


def survived(kills: dict[str, int], seed: int = 0) -> dict[str, dict]:
    """Figures of each command after so many kills of it."""
    draw, found = random.Random(seed), {}
    runs.environment()  # once: a commit on the way would be on record
    with tempfile.TemporaryDirectory() as folder:
        made = Path(folder, "made.json")
        work = forked(lambda: made.write_text(json.dumps(make(Path(folder, "made"), copies=3))))
        assert ended(work) == 0
        arguments = json.loads(made.read_text())
        for command, least in kills.items():
            place = Path(folder, command.replace(", ", "-").replace(" ", "-"))
            place.mkdir()
            found[command] = kill(command, arguments[command], place, least, draw)
            print(command, found[command], file=sys.stderr, flush=True)
    return found


def figures() -> list[tuple[str, str]]:
    """Rows of the README's table."""
    return [
        (
            f"`{command}`: kills survived, of {each['runs']} runs",
            f"{each['kills']}; results identical, no finished work repeated",
        )
        for command, each in survived(KILLS).items()
    ]


if __name__ == "__main__":  # a process of its own, for tests whose process has threads
    print(json.dumps(survived(json.loads(sys.argv[1]), int(sys.argv[2]))))
