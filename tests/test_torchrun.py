"""Several processes do what one does: two on this machine's CPU, by torchrun."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from brainsex import __main__ as commands
from tests.conftest import write_cohort

ROOT = Path(__file__).parents[1]
OPTIONS = "--channels 1 --folds 3 --epochs 1 --batch-size 5 --milestones".split()


def torchrun(*command, processes=2):
    """Run by PyTorch's launcher, without a GPU, with this checkout's package."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    words = [*launcher, f"--nproc-per-node={processes}", *map(str, command)]
    environment = {"PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    environment |= {"LOKY_MAX_CPU_COUNT": "2"}  # one thread a process
    options = {"capture_output": True, "text": True, "timeout": 300, "check": False}
    return subprocess.run(words, env=os.environ | environment, **options)


@pytest.fixture(scope="module")
def cohort(tmp_path_factory):
    """Six subjects in noise, of whom the men are brighter in half of the brain."""
    folder, sex = tmp_path_factory.mktemp("torchrun") / "cohort", np.arange(6) % 2
    volumes = np.random.default_rng(0).uniform(0, 0.4, (6, 22, 23, 24)).astype(np.float32)
    volumes[sex == 1, :11] += 0.3
    grid = {"shape": [22, 23, 24], "affine": np.diag([3, 3.1, 3.2, 1]).tolist()}
    return write_cohort(folder, volumes, sex, grid=grid)


@pytest.fixture(scope="module")
def one_process(cohort):
    """Networks and masks as one process makes them, each fold on one thread."""
    networks, masks = cohort.parent / "networks", cohort.parent / "masks"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: False)
        patch.setenv("LOKY_MAX_CPU_COUNT", "1")
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        commands.main(["train", str(cohort), str(networks), *OPTIONS])
        commands.main(["masks", str(cohort), str(networks), str(masks)])
        torch.set_num_threads(threads)
    return networks, masks


def contents(folder):
    """All files: weights as tensors, records without versions, the rest as bytes."""
    files = {}
    for path in filter(Path.is_file, folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.suffix == ".pt":
            state = torch.load(path, weights_only=True)
            files[name] = {key: value.numpy().tobytes() for key, value in state.items()}
        elif path.name == "run.json":
            entries = json.loads(path.read_text()).items()
            files[name] = {command: entry | {"made_with": None} for command, entry in entries}
        else:
            files[name] = path.read_bytes()
    return files


def test_two_processes_train_the_networks_of_one(cohort, one_process, tmp_path):
    """Of three folds, one is there from before."""
    for name in ("run.json", "folds.csv", "fold-2.json", "fold-2.pt"):
        shutil.copy2(one_process[0] / name, tmp_path)
    stamp = (tmp_path / "fold-2.pt").stat().st_mtime_ns
    done = torchrun("-m", "brainsex", "train", cohort, tmp_path, *OPTIONS)
    assert done.returncode == 0, done.stderr
    assert contents(tmp_path) == contents(one_process[0])
    assert (tmp_path / "fold-2.pt").stat().st_mtime_ns == stamp
    assert done.stdout.count("accuracy") == 1


@pytest.mark.soak
def test_two_processes_make_the_masks_of_one(cohort, one_process, tmp_path):
    done = torchrun("-m", "brainsex", "masks", cohort, one_process[0], tmp_path)
    assert done.returncode == 0, done.stderr
    made, expected = contents(tmp_path), contents(one_process[1])
    assert sorted(made.pop("masks.csv").split()) == sorted(expected.pop("masks.csv").split())
    assert made == expected
    assert done.stdout.count("before") == 1


@pytest.mark.soak
def test_a_process_that_fails_ends_the_run_and_the_next_goes_on(cohort, one_process, tmp_path):
    out, script = tmp_path / "networks", tmp_path / "run.py"
    script.write_text(f"""
import os, sys, time
from pathlib import Path
from brainsex import training
from brainsex.__main__ import main

def failing(*arguments, fit=training.fit, **options):
    while os.environ["RANK"] == "1" and not Path({str(out / "fold-0.json")!r}).is_file():
        time.sleep(0.01)
    if os.environ["RANK"] == "1":
        raise OSError("the disk is full.")
    return fit(*arguments, **options)

training.fit = failing
main(sys.argv[1:])
""")
    done = torchrun(script, "train", cohort, out, *OPTIONS)
    assert done.returncode != 0
    assert "error: the disk is full." in done.stderr
    assert not (out / "fold-1.pt").exists()
    stamp = (out / "fold-0.pt").stat().st_mtime_ns
    done = torchrun("-m", "brainsex", "train", cohort, out, *OPTIONS, processes=4)  # three folds
    assert done.returncode == 0, done.stderr
    assert (out / "fold-0.pt").stat().st_mtime_ns == stamp
    assert contents(out) == contents(one_process[0])


@pytest.mark.parametrize(
    ("visible", "rank", "own"),
    [("", 1, "1"), ("3,5", 0, "3"), ("3,5", 2, "3"), ("GPU-a,GPU-b", 1, "GPU-b")],
)
def test_each_process_takes_its_own_gpu_and_part_of_the_cores(monkeypatch, visible, rank, own):
    variables = {"CUDA_VISIBLE_DEVICES": visible, "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": "3"}
    for name, value in (variables | {"RANK": str(rank)}).items():
        monkeypatch.setenv(name, value)
    threads = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(commands.joblib, "cpu_count", lambda: 7)
    monkeypatch.setattr(torch, "set_num_threads", threads.append)
    assert commands.place_process() == (rank == 0)
    assert os.environ["CUDA_VISIBLE_DEVICES"] == own
    assert threads == [2]


@pytest.mark.parametrize("words", ["convert {0}", "train {0} {0} --overwrite"])
def test_other_commands_and_starting_anew_are_for_one_process(monkeypatch, tmp_path, words):
    for name in ("TORCHELASTIC_RUN_ID", "RANK", "WORLD_SIZE"):
        monkeypatch.setenv(name, "1")
    with pytest.raises(SystemExit, match="error: torchrun shares train and masks"):
        commands.main(words.format(tmp_path).split())
