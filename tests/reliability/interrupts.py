"""Ctrl-C, as a terminal sends it to a command and all its workers, while it works."""

import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tests.reliability.kills import finished_files, make_inputs

ROOT = Path(__file__).resolve().parents[2]
FIRST_FILE = {"convert": ".parts/*.npz", "train": ".fold-*.checkpoint", "masks": "run.json"}
"""What a command that has begun leaves; the others leave a subject's volume."""
OPTIONS = {"text": True, "cwd": ROOT, "stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE}


def stop(command: list[str], out: Path, first_file: str, delay: float) -> float:
    """Press Ctrl-C some time after a command has begun; return the seconds until it ended."""
    with subprocess.Popen(command, start_new_session=True, **OPTIONS) as process:
        while not any(out.glob(first_file)):
            assert process.poll() is None, process.stderr.read()[-2000:]
            time.sleep(0.01)
        time.sleep(delay)
        began = time.monotonic()
        os.killpg(process.pid, signal.SIGINT)
        printed = process.communicate(timeout=60)[1]
        seconds = time.monotonic() - began
    assert process.returncode == 130, (process.returncode, printed[-2000:])
    assert "Traceback" not in printed, printed[-2000:]
    assert "the same command goes on from what is" in printed, printed[-2000:]
    return seconds


def measure(seed: int = 0) -> dict[str, float]:
    """Return the seconds from Ctrl-C to the end of each command, which then goes on to its end."""
    draw, seconds = random.Random(seed), {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        for name, arguments in make_inputs(folder / "made", copies=60, epochs=100).items():
            out, first_file = folder / name, FIRST_FILE.get(name.split(",")[0], "*.nii.gz")
            command = [sys.executable, "-m", "brainsex", *arguments]
            command[command.index("OUT")] = str(out)
            seconds[name] = stop(command, out, first_file, draw.uniform(0, 0.3))
            before = finished_files(out, name)
            again = subprocess.run(command, check=False, **OPTIONS)
            assert again.returncode == 0, again.stderr[-2000:]
            after = finished_files(out, name)  # convert deletes its parts
            assert all(after.get(path, stamp) == stamp for path, stamp in before.items()), name
        out, cohort = folder / "figures", folder / "made" / "cohort"
        command = [sys.executable, "notebooks/run.py", "--profile", "smoke"]
        command += ["--cohort", str(cohort), "--out", str(out)]
        seconds["notebooks/run.py"] = stop(command, out, "02_*.ipynb", draw.uniform(0, 3))
    return seconds


if __name__ == "__main__":
    print(measure())
