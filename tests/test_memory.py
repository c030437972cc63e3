"""Memory of a process's own, files mapped apart, does not grow with the number of subjects."""

import os
import subprocess
import sys
import threading
from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd
import pytest
import torch

from brainsex import cohort, explain, first_layer, training, volumes
from tests.reliability.kills import SHAPE
from tests.test_reliability import make_network

ROOT = Path(__file__).parents[1]
VOLUME = np.random.default_rng(0).uniform(0.2, 0.6, SHAPE).astype(np.float32)


def convert(folder: Path, count: int) -> None:
    """Convert one file under many names."""
    (folder / "fa").mkdir()
    nib.save(nib.Nifti1Image(VOLUME, np.diag([8, 8, 8, 1])), folder / "volume.nii.gz")
    table = pd.DataFrame({"Subject": map("{:06d}".format, range(count)), "Gender": "F"})
    for name in table["Subject"]:
        os.link(folder / "volume.nii.gz", folder / "fa" / f"{name}.nii.gz")
    table.to_csv(folder / "table.csv", index=False)
    volumes.convert(folder / "fa", folder / "table.csv", folder, shape=SHAPE)
    assert len(cohort.load_cohort(folder)) == count


def train(folder: Path, data: cohort.Cohort) -> None:
    options = {"folds": 2, "only": [0], "epochs": 1, "workers": 1, "out": folder / "out"}
    training.cross_validate(data, make_network, **options)


def summarise(folder: Path, data: cohort.Cohort) -> None:
    first_layer.summarise(make_network(), data.volumes)


def explain_all(folder: Path, data: cohort.Cohort) -> None:
    table = pd.DataFrame({"Subject": data.subjects, "fold": np.arange(len(data)) // 2 % 2})
    table.to_csv(folder / "folds.csv", index=False)
    for fold in (0, 1):
        torch.save(make_network().state_dict(), folder / f"fold-{fold}.pt")
    assert len(explain.explain(data, folder, folder / "masks", iterations=1)) == len(data)


STEPS = {step.__name__: step for step in (convert, train, summarise, explain_all)}


def own_bytes() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line.split()[1] for line in lines if line.startswith("RssAnon")))


def run_step(step: str, folder: Path, count: int) -> None:
    """Run a step on one volume over and over; print the most bytes it takes, every 2 ms."""
    largest, ended = [own_bytes()], threading.Event()

    def look() -> None:
        while not ended.wait(0.002):
            largest[0] = max(largest[0], own_bytes())

    threading.Thread(target=look, daemon=True).start()
    if step == "convert":
        convert(folder, count)
    else:
        path, shape = folder / "tensors.npy", (count, *SHAPE)
        np.lib.format.open_memmap(path, "w+", np.float32, shape)[:] = VOLUME
        np.save(folder / "labels.npy", np.arange(count) % 2)
        STEPS[step](folder, cohort.load_cohort(folder, affine=np.eye(4)))
    ended.set()
    print(largest[0])


@pytest.mark.soak
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("step", STEPS)
def test_the_peak_is_that_of_a_hundred_subjects(tmp_path, step):
    """Up to a quarter of a volume a subject, in which their names and numbers have room."""
    peaks = []
    for count in (100, 10_000):
        (tmp_path / str(count)).mkdir()
        command = [sys.executable, "-m", "tests.test_memory", step, tmp_path / str(count), count]
        environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
        options = {"cwd": ROOT, "env": environment, "capture_output": True, "text": True}
        done = subprocess.run(list(map(str, command)), check=False, **options)
        assert done.returncode == 0, done.stderr
        peaks.append(int(done.stdout.splitlines()[-1]))
    print(f"{step}: {peaks[0] / 1e6:.0f} MB for 100, {peaks[1] / 1e6:.0f} MB for 10,000 subjects")
    assert peaks[1] - peaks[0] < 9_900 * VOLUME.nbytes / 4


if __name__ == "__main__":
    run_step(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]))
