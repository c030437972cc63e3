"""Memory of a process's own, files mapped apart, does not grow with the number of subjects."""

import os
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from nibabel import Nifti1Image, save

from brainsex import cohort, explain, first_layer, networks, training, volumes

ROOT = Path(__file__).parents[1]
SHAPE = (22, 22, 22)


def make_volume() -> np.ndarray:
    return np.random.default_rng(0).uniform(0.2, 0.6, SHAPE).astype(np.float32)


def make_network() -> networks.MriNet3d:
    return networks.MriNet3d(2, SHAPE)


def make_cohort(folder: Path, count: int) -> cohort.Cohort:
    """Write one volume over and over, as `convert` leaves them, and networks for two folds."""
    tensors = np.lib.format.open_memmap(folder / "tensors.npy", "w+", np.float32, (count, *SHAPE))
    volume = make_volume()
    for row in range(count):
        tensors[row] = volume
    del tensors
    np.save(folder / "labels.npy", np.arange(count) % 2)
    data = cohort.load_cohort(folder, affine=np.eye(4))
    table = pd.DataFrame({"Subject": data.subjects, "fold": np.arange(count) // 2 % 2})
    table.to_csv(folder / "folds.csv", index=False)
    for fold in (0, 1):
        torch.save(make_network().state_dict(), folder / f"fold-{fold}.pt")
    return data


def convert(folder: Path, count: int):
    """Convert one file under many names."""
    (folder / "fa").mkdir()
    save(Nifti1Image(make_volume(), np.diag([8, 8, 8, 1])), folder / "volume.nii.gz")
    names = [f"{row:06d}" for row in range(count)]
    for name in names:
        os.link(folder / "volume.nii.gz", folder / "fa" / f"{name}.nii.gz")
    table = pd.DataFrame({"Subject": names, "Gender": ["F", "M"] * (count // 2)})
    table.to_csv(folder / "unrestricted.csv", index=False)
    volumes.convert(folder / "fa", folder / "unrestricted.csv", folder, shape=SHAPE)
    assert len(cohort.load_cohort(folder)) == count


def train(folder: Path, count: int):
    options = {"folds": 2, "only": [0], "epochs": 1, "workers": 1, "out": folder / "out"}
    training.cross_validate(make_cohort(folder, count), make_network, **options)


def summarise(folder: Path, count: int):
    first_layer.summarise(make_network(), make_cohort(folder, count).volumes)


def explain_all(folder: Path, count: int):
    data = make_cohort(folder, count)
    assert len(explain.explain(data, folder, folder / "masks", iterations=1)) == count


STEPS = {step.__name__: step for step in (convert, train, summarise, explain_all)}


def peak_bytes(step: str, folder: Path, count: int) -> int:
    """Return what a step takes at most in a process of its own, looked at every 2 ms."""
    folder.mkdir()
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tests.test_memory", step, str(folder), str(count)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return int(done.stdout.splitlines()[-1])


@pytest.mark.soak
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("step", STEPS)
def test_the_peak_is_that_of_a_hundred_subjects(tmp_path, step):
    """Up to a quarter of a volume a subject, in which their names and numbers have room."""
    small, large = (peak_bytes(step, tmp_path / str(count), count) for count in (100, 10_000))
    print(f"{step}: {small / 1e6:.0f} MB for 100, {large / 1e6:.0f} MB for 10,000 subjects")
    assert large - small < 9_900 * 4 * np.prod(SHAPE) / 4


def own_bytes() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line.split()[1] for line in lines if line.startswith("RssAnon")))


if __name__ == "__main__":
    largest, ended = [own_bytes()], threading.Event()

    def look():
        while not ended.wait(0.002):
            largest[0] = max(largest[0], own_bytes())

    threading.Thread(target=look, daemon=True).start()
    STEPS[sys.argv[1]](Path(sys.argv[2]), int(sys.argv[3]))
    ended.set()
    print(largest[0])
