"""Files that are broken or made to harm: no command and no reader is led astray by one."""

import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from nibabel import Nifti1Image, save

from brainsex import cohort, explain, networks, training, volumes
from brainsex.__main__ import main
from tests.test_reliability import QUICK, make_network, read_shown

ROOT = Path(__file__).parents[1]


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc")
@pytest.mark.parametrize("every", [97, pytest.param(1, marks=pytest.mark.soak)])
def test_no_hostile_file_stops_a_command_or_takes_more_than_it_may(every):
    pytest.importorskip("dipy")
    command = [sys.executable, "-m", "tests.reliability.hostile", str(every)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    print(done.stdout)
    *problems, count, _, _, _ = done.stdout.splitlines()
    assert problems == []
    assert int(count.split()[0]) > 1000 / every


class Bomb:
    """Unpickling it makes a file."""

    def __init__(self, marker):
        self.marker = str(marker)

    def __reduce__(self):
        return open, (self.marker, "w")


READERS = {
    "tensors.npy": lambda path: cohort.load_cohort(path.parent),
    "labels.npy": lambda path: cohort.load_cohort(path.parent),
    "fold-0.pt": networks.load_network,
}


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("name", READERS)
def test_a_pickle_is_not_run(tmp_path, name, zipped):
    path, marker = tmp_path / name, tmp_path / "marker"
    for other, values in {"tensors.npy": np.ones((2, 3, 3, 3)), "labels.npy": [0, 1]}.items():
        np.save(tmp_path / other, values)
    state = networks.MriNet3d(1, (22, 22, 22)).state_dict() | {"more": Bomb(marker)}
    if name == "fold-0.pt":
        torch.save(state, path, _use_new_zipfile_serialization=zipped)
    else:
        np.save(path, np.array([Bomb(marker)] * 2, object), allow_pickle=True)
    with pytest.raises(ValueError, match=name):
        READERS[name](path)
    assert not marker.exists()
    torch.load(path, weights_only=False) if name == "fold-0.pt" else np.load(path, None, True)
    assert marker.exists()  # it was one


@pytest.mark.skipif(os.name == "nt", reason="links need a privilege on Windows")
def test_nothing_is_written_through_a_link_that_lay_in_wait(tmp_path, finished):
    shutil.copytree(finished / "data", tmp_path / "data")
    (tmp_path / "out").mkdir()
    (tmp_path / "mine.txt").write_text("mine")
    for name in ("checks.csv", ".checks.csv.12345678.partial", "montage.html"):
        (tmp_path / "out" / name).symlink_to(tmp_path / "mine.txt")
    main(["check", str(tmp_path / "data"), str(tmp_path / "out")])
    assert (tmp_path / "mine.txt").read_text() == "mine"
    assert not (tmp_path / "out" / "checks.csv").is_symlink()


def convert(folder):
    volumes.convert(folder / "fa", folder, folder / "data", shape=(22, 22, 22), workers=1)


def train(folder):
    data = cohort.load_cohort(folder / "data")
    training.cross_validate(data, make_network, out=folder / "networks", **QUICK)


def explain_all(folder):
    data = cohort.load_cohort(folder / "data")
    explain.explain(data, folder / "networks", folder / "masks", iterations=1)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """What convert, train and masks leave of six subjects, a part and a checkpoint too."""
    folder = tmp_path_factory.mktemp("finished")
    (folder / "fa").mkdir()
    for n in range(6):
        volume = np.random.default_rng(n).uniform(0.1, 0.9, (22, 22, 22)).astype(np.float32)
        save(Nifti1Image(volume, np.diag([8, 8, 8, 1])), folder / "fa" / f"00000{n}.nii.gz")
    people = pd.DataFrame({"Subject": [f"00000{n}" for n in range(6)], "Gender": list("FMFMFM")})
    people.to_csv(folder / "unrestricted.csv", index=False)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shutil, "rmtree", lambda *_, **__: None)  # keeps convert's parts
        convert(folder)
        patch.setattr(Path, "unlink", lambda *_, **__: None)  # keeps train's checkpoints
        train(folder)
    explain_all(folder)
    return folder


@pytest.mark.parametrize("how", ["cut", "noise"])
@pytest.mark.parametrize(
    ("name", "command", "remade"),
    [
        ("data/grid.json", convert, False),
        ("data/.parts/000002.npz", convert, True),
        ("networks/run.json", train, False),
        ("networks/fold-0.json", train, False),
        ("networks/.fold-0.checkpoint", train, False),
        ("networks/folds.csv", train, True),
        ("networks/folds.csv", explain_all, False),
        ("masks/mask/000002.json", explain_all, False),
        ("masks/masks.csv", explain_all, True),
    ],
)
def test_a_damaged_file_of_the_projects_own_is_named_or_made_anew(
    tmp_path, finished, name, command, remade, how
):
    folder = tmp_path / "copy"
    shutil.copytree(finished, folder)
    path, expected = folder / name, read_shown(folder)
    content = path.read_bytes()
    noise = random.Random(0).randbytes(200)
    path.write_bytes(content[: len(content) // 2] if how == "cut" else noise)
    if name == "data/.parts/000002.npz":
        (folder / "data" / "tensors.npy").unlink()
    if name.endswith("checkpoint"):
        (folder / "networks" / "fold-0.json").unlink()
    if remade:
        command(folder)
        assert read_shown(folder) == expected
    else:
        with pytest.raises(ValueError, match=rf"^\S*{path.name}: expected"):
            command(folder)
