"""Ctrl-C, as a terminal sends it to a command and all its workers, while it works."""

import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from brainsex.__main__ import FINISHED
from tests.reliability.kills import make

ROOT = Path(__file__).resolve().parents[2]
COMMANDS = ("extract", "convert", "train", "train, 2 workers", "masks", "fa")
BEGUN = FINISHED | {"train": ".fold-*.checkpoint", "masks": "run.json"}


OPTIONS = {"text": True, "cwd": ROOT, "stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE}


def stop(run: list[str], out: Path, begun: str, delay: float) -> tuple[float, str]:
    """Seconds from Ctrl-C to the end of a command, some time after it has begun; what it said."""
    with subprocess.Popen(run, start_new_session=True, **OPTIONS) as process:
        while not any(out.glob(begun)):
            assert process.poll() is None, process.stderr.read()[-2000:]
            time.sleep(0.01)
        time.sleep(delay)
        began = time.monotonic()
        os.killpg(process.pid, signal.SIGINT)
        said = process.communicate(timeout=60)[1]
        seconds = time.monotonic() - began
    assert process.returncode == 130, (process.returncode, said[-2000:])
    assert "Traceback" not in said, said[-2000:]
    return seconds, said


def interrupt(command: str, arguments: list[str], out: Path, delay: float) -> float:
    """Seconds from Ctrl-C to the end of a command, which then says what is done, and resumes."""
    name = command.split(",")[0]
    words = [str(out) if word == "OUT" else word for word in arguments]
    run = [sys.executable, "-m", "brainsex", *words]
    seconds, said = stop(run, out, BEGUN[name], delay)
    hit = re.search(r"stopped: (\S+) holds (\d+) finished .*same command goes on", said)
    assert hit, said[-2000:]
    assert hit[1] == str(out)
    there = {path: path.stat().st_ino for path in out.glob(FINISHED[name])}
    assert 0 <= len(there) - int(hit[2]) <= 50  # threads finish what they are at
    again = subprocess.run(run, check=False, **OPTIONS)
    assert again.returncode == 0, again.stderr[-2000:]
    if name in ("extract", "fa", "train"):  # of the others a file is final where its table has it
        assert all(path.stat().st_ino == inode for path, inode in there.items())
    return seconds


def measured(commands=COMMANDS, seed: int = 0) -> dict[str, float]:
    draw, found = random.Random(seed), {}
    with tempfile.TemporaryDirectory() as folder:
        arguments = make(Path(folder, "made"), copies=60, epochs=100)
        for command in commands:
            out = Path(folder, f"out-{len(found)}")
            found[command] = interrupt(command, arguments[command], out, draw.uniform(0, 0.3))
        run = [sys.executable, "notebooks/run.py", "--profile", "smoke"]
        out, cohort = Path(folder, "figures"), Path(folder, "made", "cohort")
        run += ["--cohort", str(cohort), "--out", str(out)]
        found["notebooks/run.py"], said = stop(run, out, "02_*.ipynb", draw.uniform(0, 3))
        assert "stopped: the same command goes on" in said, said[-2000:]
    return found


def figures() -> list[tuple[str, str]]:
    """A row of the README's table."""
    found = measured()
    worst = max(found, key=found.get)
    what = f"Ctrl-C to the end of a command, worst of {', '.join(found)}"
    return [(what, f"{found[worst]:.1f} s ({worst})")]
