"""Runs that may be killed at any moment: one at a time in a folder, and each on its record."""

import errno
import json
import os
import platform
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import joblib
from filelock import FileLock, Timeout

from brainsex import ranks, read_record, write

RECORD = "run.json"
PACKAGES = ("brainsex", "numpy", "pandas", "scipy", "torch", "nibabel", "scikit-learn", "dipy")
ROOT = Path(__file__).resolve().parent.parent
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@contextmanager
def alone(folder: str | Path, *below: str) -> Iterator[None]:
    """Write into a folder, made if absent, and into those `below` it, while no other run does.

    The lock is the kernel's, which frees it with the process: none survives a crash. What a killed
    run left half-written is deleted. Of processes that share a run, the first does so for all.

    Raises
    ------
    OSError
        Another run writes there; the folder cannot be written, or its disk is full.
    """
    if not ranks.first():
        yield
        return
    folder = Path(folder)
    lock = FileLock(folder / ".lock", timeout=0)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except Timeout:
        advice = "Wait until it has ended, stop it, or name another folder"
        raise BlockingIOError(f"{folder}: another run is writing here. {advice}.") from None
    except OSError as error:
        message = f"cannot write ({error.strerror}). Name a folder that can be written"
        raise OSError(error.errno, message, str(folder)) from error
    try:
        for place in (folder, *(folder / name for name in below)):
            for stale in place.glob(".*.partial"):
                stale.unlink(missing_ok=True)
        yield
    except OSError as error:
        if error.errno not in FULL:
            raise
        advice = "Nothing half-written stays: make room, run again, and it goes on from here"
        message = f"cannot write ({os.strerror(error.errno)}). {advice}"
        raise OSError(error.errno, message, str(folder)) from error
    finally:
        lock.release()


def record(folder: str | Path, command: str, **facts) -> None:
    """Note in ``run.json`` what a command was asked for, and what it ran on, beside its results.

    A folder may hold the results of several commands: each has its entry. Where the same command
    goes on, what it runs on now is added in ``made_with`` to what it ran on before.
    """
    every, facts = read(folder), _plain(facts)
    made = every[command].get("made_with", []) if same(folder, command, **facts) else []
    made = made if environment() in made else [*made, environment()]
    if every.get(command) != (entry := facts | {"made_with": made}):
        write(Path(folder) / RECORD, json.dumps(every | {command: entry}, indent=1) + "\n")


def same(folder: str | Path, command: str, **facts) -> bool:
    """Whether a folder's record says that the command was asked for just this.

    Versions do not count: an update on the way must not cost days of finished folds.
    """
    before = read(folder).get(command)
    if not isinstance(before, dict):
        return False
    return {name: before[name] for name in before if name != "made_with"} == _plain(facts)


def read(folder: str | Path) -> dict:
    """What ``run.json`` says, by command; nothing where there is none."""
    path = Path(folder) / RECORD
    return read_record(path) if path.exists() else {}


def _plain(facts: dict) -> dict:
    """As JSON gives it back."""
    return json.loads(json.dumps(facts, default=str))


@cache
def environment() -> dict:
    """Python, platform, cores, packages; of a checkout the commit, ``-dirty`` if changed."""
    found = {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cores": joblib.cpu_count(),
    }
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    if (ROOT / ".git").exists():
        ask = ["git", "--no-optional-locks", "-C", ROOT, "describe", "--always", "--dirty"]
        ask += ["--abbrev=40", "--exclude=*"]
        with suppress(OSError, subprocess.CalledProcessError):  # no git, or it trusts no such owner
            said = subprocess.run(ask, capture_output=True, encoding="utf-8", check=True)
            found["git"] = said.stdout.strip()
    return found


@cache
def follow(parent: int) -> None:
    """In a worker process: leave Ctrl-C to the parent, and end when that ends, however it does.

    Else a killed run's workers would write on while the next run does.
    """
    if parent == os.getpid():
        return

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.1)
        os._exit(1)

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=watch, daemon=True).start()
