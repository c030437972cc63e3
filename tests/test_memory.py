"""Memory of a process's own, files mapped apart, does not grow with the number of subjects."""

import os
import subprocess
import sys
import threading
from functools import partial
from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd
import pytest
import torch

from brainsex import cohort, explain, first_layer, networks, training, volumes

SHAPE = (22, 22, 22)
VOLUME = np.random.default_rng(0).uniform(0.2, 0.6, SHAPE).astype(np.float32)
make_network = partial(networks.MriNet3d, 2, SHAPE)


def convert(folder, data):  # one file under many names
    (folder / "fa").mkdir()
    nib.save(nib.Nifti1Image(VOLUME, np.diag([8, 8, 8, 1])), folder / "volume.nii.gz")
    for name in data.subjects:
        os.link(folder / "volume.nii.gz", folder / "fa" / f"{name}.nii.gz")
    people = pd.DataFrame({"Subject": data.subjects, "Gender": "F"})
    people.to_csv(folder / "people.csv", index=False)
    volumes.convert(folder / "fa", folder / "people.csv", folder / "out", shape=SHAPE)


def train(folder, data):
    options = {"folds": 2, "only": [0], "epochs": 1, "workers": 1, "out": folder / "out"}
    training.cross_validate(data, make_network, **options)


def summarise(folder, data):
    first_layer.summarise(make_network(), data.volumes)


def explain_all(folder, data):
    table = pd.DataFrame({"Subject": data.subjects, "fold": 0})
    table.to_csv(folder / "folds.csv", index=False)
    torch.save(make_network().state_dict(), folder / "fold-0.pt")
    explain.explain(data, folder, folder / "masks", iterations=1)


STEPS = {step.__name__: step for step in (convert, train, summarise, explain_all)}


def print_peak(step, folder, count):
    """Run a step on one volume over and over; print the kB that it takes, looked at every 2 ms."""
    kilobytes, ended = [], threading.Event()
    np.save(folder / "tensors.npy", np.broadcast_to(VOLUME, (count, *SHAPE)))
    np.save(folder / "labels.npy", np.arange(count) % 2)

    def look():
        while not ended.wait(0.002):
            status = Path("/proc/self/status").read_text().split()
            kilobytes.append(int(status[status.index("RssAnon:") + 1]))

    threading.Thread(target=look, daemon=True).start()
    STEPS[step](folder, cohort.load_cohort(folder, affine=np.eye(4)))
    ended.set()
    print(max(kilobytes))


@pytest.mark.soak
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("step", STEPS)
def test_the_peak_is_that_of_a_hundred_subjects(tmp_path, step):
    """Up to a quarter of a volume a subject, in which their names and numbers have room."""
    options = {"env": os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}}
    peaks = []
    for count in (100, 10_000):
        (folder := tmp_path / str(count)).mkdir()
        command = [sys.executable, __file__, step, folder, str(count)]
        done = subprocess.run(command, check=False, capture_output=True, text=True, **options)
        assert done.returncode == 0, done.stderr
        peaks.append(int(done.stdout.splitlines()[-1]))
    print(f"{step}: {peaks[0] / 1e3:.0f} MB for 100, {peaks[1] / 1e3:.0f} MB for 10,000 subjects")
    assert 1000 * (peaks[1] - peaks[0]) < 9_900 * VOLUME.nbytes / 4


if __name__ == "__main__":
    print_peak(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]))
