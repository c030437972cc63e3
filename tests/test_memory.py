"""Memory of a process's own, files mapped apart, does not grow with the number of subjects."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from nibabel import Nifti1Image, save

from brainsex import cohort, features, masks, networks, training, volumes

ROOT = Path(__file__).parents[1]
SHAPE = (22, 22, 22)


def people(folder: Path, count: int) -> cohort.Cohort:
    """As `convert` leaves them, one volume over and over; networks for two folds beside them."""
    one = np.random.default_rng(0).uniform(0.2, 0.6, SHAPE).astype(np.float32)
    tensors = np.lib.format.open_memmap(folder / "tensors.npy", "w+", np.float32, (count, *SHAPE))
    for row in range(count):
        tensors[row] = one
    del tensors
    np.save(folder / "labels.npy", np.arange(count) % 2)
    loaded = cohort.load(folder, affine=np.eye(4))
    table = pd.DataFrame({"Subject": loaded.subjects, "fold": np.arange(count) // 2 % 2})
    table.to_csv(folder / "folds.csv", index=False)
    for fold in (0, 1):
        training.torch.save(network().state_dict(), folder / f"fold-{fold}.pt")
    return loaded


def network() -> networks.MriNet3d:
    return networks.MriNet3d(2, SHAPE)


def convert(folder: Path, count: int):
    """One file under many names."""
    (folder / "fa").mkdir()
    one = np.random.default_rng(0).uniform(0.2, 0.6, SHAPE).astype(np.float32)
    save(Nifti1Image(one, np.diag([8, 8, 8, 1])), folder / "one.nii.gz")
    names = [str(100000 + n) for n in range(count)]
    for name in names:
        os.link(folder / "one.nii.gz", folder / "fa" / f"{name}.nii.gz")
    table = pd.DataFrame({"Subject": names, "Gender": ["F", "M"] * (count // 2)})
    table.to_csv(folder / "unrestricted.csv", index=False)
    volumes.convert(folder / "fa", folder / "unrestricted.csv", folder, shape=SHAPE)
    assert len(cohort.load(folder)) == count


def train(folder: Path, count: int):
    options = {"folds": 2, "only": [0], "epochs": 1, "workers": 1, "out": folder / "out"}
    training.cross_validate(people(folder, count), network, **options)


def summarise(folder: Path, count: int):
    features.summarise(network(), people(folder, count).volumes)


def explain(folder: Path, count: int):
    found = masks.explain(people(folder, count), folder, folder / "masks", iterations=1)
    assert len(found) == count


def peak(step: str, folder: Path, count: int) -> int:
    """Bytes a step takes at most in a process of its own, looked at every 2 ms."""
    folder.mkdir()
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tests.test_memory", step, str(folder), str(count)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return int(done.stdout.splitlines()[-1])


@pytest.mark.soak
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("step", ["convert", "train", "summarise", "explain"])
def test_the_peak_is_that_of_a_hundred_subjects(tmp_path, step):
    """Up to a quarter of a volume a subject, in which their names and numbers have room."""
    few, many = (peak(step, tmp_path / str(count), count) for count in (100, 10_000))
    volume = 4 * np.prod(SHAPE)
    print(f"{step}: {few / 1e6:.0f} MB for 100, {many / 1e6:.0f} MB for 10,000 subjects")
    assert many - few < 9_900 * volume / 4


if __name__ == "__main__":
    import threading

    def own() -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return 1024 * int(next(line.split()[1] for line in lines if line.startswith("RssAnon")))

    seen, over = [own()], threading.Event()

    def look():
        while not over.wait(0.002):
            seen[0] = max(seen[0], own())

    watch = threading.Thread(target=look, daemon=True)
    watch.start()
    globals()[sys.argv[1]](Path(sys.argv[2]), int(sys.argv[3]))
    over.set()
    print(seen[0])
