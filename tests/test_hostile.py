"""Files that are broken or made to harm: no command and no reader is led astray by one."""

import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from brainsex import cohort, explain, training, volumes
from tests.reliability.kills import SHAPE, read_tree
from tests.test_reliability import QUICK, ROOT, make_network
from tests.test_volumes import make as make_people


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc")
@pytest.mark.parametrize("every", [199, pytest.param(1, marks=pytest.mark.soak)])
def test_no_hostile_file_stops_a_command_or_takes_more_than_it_may(every):
    command = [sys.executable, "-m", "tests.reliability.hostile", str(every)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    print(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr
    count = next(line for line in done.stdout.splitlines() if "hostile files, 0 failed" in line)
    assert int(count.split()[0]) > 1000 / every


def convert(folder):
    volumes.convert(folder / "fa", folder, folder / "data", shape=SHAPE, workers=1)


def train(folder):
    data = cohort.load_cohort(folder / "data")
    training.cross_validate(data, make_network, out=folder / "networks", **QUICK)


def explain_all(folder):
    data = cohort.load_cohort(folder / "data")
    explain.explain(data, folder / "networks", folder / "masks", iterations=1)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """What convert, train and masks leave of six subjects, with their parts and checkpoints."""
    folder = make_people(tmp_path_factory.mktemp("finished") / "people", 6)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shutil, "rmtree", lambda *_, **__: None)
        convert(folder)
        patch.setattr(Path, "unlink", lambda *_, **__: None)
        train(folder)
    explain_all(folder)
    return folder


@pytest.mark.parametrize("how", ["cut", "noise"])
@pytest.mark.parametrize(
    ("name", "command", "made_anew", "absent"),
    [
        ("data/grid.json", convert, False, None),
        ("data/.parts/000002.npz", convert, True, "data/tensors.npy"),
        ("networks/run.json", train, False, None),
        ("networks/fold-0.json", train, False, None),
        ("networks/.fold-0.checkpoint", train, False, "networks/fold-0.json"),
        ("networks/folds.csv", train, True, None),
        ("networks/folds.csv", explain_all, False, None),
        ("masks/mask/000002.json", explain_all, False, None),
        ("masks/masks.csv", explain_all, True, None),
    ],
)
def test_a_damaged_file_of_the_projects_own_is_named_or_made_anew(
    tmp_path, finished, name, command, made_anew, absent, how
):
    folder = tmp_path / "copy"
    shutil.copytree(finished, folder)
    path, expected = folder / name, read_tree(folder)
    noise, half = random.Random(0).randbytes(200), path.read_bytes()[: path.stat().st_size // 2]
    path.write_bytes({"cut": half, "noise": noise}[how])
    if absent:
        (folder / absent).unlink()
    if made_anew:
        command(folder)
        assert read_tree(folder) == expected
    else:
        with pytest.raises(ValueError, match=rf"^\S*{path.name}: (line|expected)"):
            command(folder)
