"""Several processes do what one does, to the bit: two on this machine's CPU, by torchrun."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from brainsex import ranks
from brainsex.__main__ import main

ROOT = Path(__file__).parents[1]
OPTIONS = "--channels 2 --folds 3 --epochs 2 --batch-size 5 --milestones 1".split()


def torchrun(*command, processes=2):
    """Run by PyTorch's launcher, without a GPU, with this checkout's package."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(
        [*launcher, f"--nproc-per-node={processes}", *map(str, command)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.fixture(scope="module")
def cohort(tmp_path_factory):
    """Seven subjects in noise, of whom the men are brighter in half of the brain."""
    folder = tmp_path_factory.mktemp("ranks") / "cohort"
    folder.mkdir()
    sex = np.arange(7) % 2
    volumes = np.random.default_rng(0).uniform(0, 0.4, (7, 22, 26, 24)).astype(np.float32)
    volumes[sex == 1, :11] += 0.3
    np.save(folder / "tensors.npy", volumes)
    np.save(folder / "labels.npy", sex)
    table = pd.DataFrame({"Subject": [f"{n:06d}" for n in range(7)], "label": sex})
    table.to_csv(folder / "subjects.csv", index=False)
    grid = {"shape": [22, 26, 24], "affine": np.diag([3, 3.1, 3.2, 1]).tolist()}
    (folder / "grid.json").write_text(json.dumps(grid))
    return folder


@pytest.fixture(scope="module")
def alone(cohort):
    """Networks and masks as one process makes them, each fold on one thread."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: False)
        patch.setenv("LOKY_MAX_CPU_COUNT", "1")
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        networks, masks = cohort.parent / "networks", cohort.parent / "masks"
        main(["train", str(cohort), str(networks), *OPTIONS])
        main(["masks", str(cohort), str(networks), str(masks)])
        torch.set_num_threads(threads)
    return networks, masks


def contents(folder):
    """All files: state dicts as tensors, whose archives name the file, records without the number
    of cores, the rest as bytes."""
    found = {}
    for path in filter(Path.is_file, folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.suffix == ".pt":
            found[name] = {k: v.numpy().tobytes() for k, v in torch.load(path).items()}
        elif path.name == "run.json":
            entries = json.loads(path.read_text()).items()
            found[name] = {name: facts | {"made_with": None} for name, facts in entries}
        else:
            found[name] = path.read_bytes()
    return found


def test_two_processes_train_the_networks_of_one(cohort, alone, tmp_path, monkeypatch):
    """Of three folds, one is there from before."""
    monkeypatch.setenv("LOKY_MAX_CPU_COUNT", "2")  # one thread a process
    out = tmp_path / "networks"
    out.mkdir()
    kept = [shutil.copy2(alone[0] / n, out) for n in ("run.json", "fold-2.json", "fold-2.pt")]
    stamps = [Path(path).stat().st_mtime_ns for path in kept[1:]]
    done = torchrun("-m", "brainsex", "train", cohort, out, *OPTIONS)
    assert done.returncode == 0, done.stderr
    assert contents(out) == contents(alone[0])
    assert [Path(path).stat().st_mtime_ns for path in kept[1:]] == stamps
    assert done.stdout.count("accuracy") == 1
    assert "2/2 [" in done.stderr
    assert "/1 [" not in done.stderr  # the other's fold


def test_two_processes_make_the_masks_of_one(cohort, alone, tmp_path):
    """Two subjects are there from a run of more processes that was killed."""
    networks, masks = alone
    out = tmp_path / "masks"
    (out / "persistence").mkdir(parents=True)
    table = pd.read_csv(masks / "masks.csv", dtype=str)
    stale = table.assign(key="0" * 16, after="0.5")  # of other settings, in another's table
    table[1:3].to_csv(out / ".masks-3.csv", index=False)
    stale.to_csv(out / ".masks-5.csv", index=False)
    names = [f"{folder}{n:06d}.nii.gz" for n in (1, 2) for folder in ("", "persistence/")]
    stamps = [shutil.copy2(masks / n, out / n).stat().st_mtime_ns for n in names]
    done = torchrun("-m", "brainsex", "masks", cohort, networks, out)
    assert done.returncode == 0, done.stderr
    assert contents(out) == contents(masks)
    assert [(out / name).stat().st_mtime_ns for name in names] == stamps
    assert done.stdout.count("before") == 1
    assert "4/4 [" in done.stderr
    assert "/3 [" not in done.stderr


@pytest.mark.soak
def test_one_that_fails_ends_the_run_and_the_next_goes_on(cohort, alone, tmp_path, monkeypatch):
    monkeypatch.setenv("LOKY_MAX_CPU_COUNT", "2")
    out, script = tmp_path / "networks", tmp_path / "run.py"
    script.write_text(f"""
import sys, time
from pathlib import Path
from brainsex import ranks, training
from brainsex.__main__ import main

def failing(*arguments, fit=training.fit, **options):
    while ranks.number() == 1 and not Path({str(out / "fold-0.json")!r}).is_file():
        time.sleep(0.01)
    if ranks.number() == 1:
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
    assert contents(out) == contents(alone[0])


def test_without_the_launcher_there_is_one_process():
    assert ranks.first()
    assert ranks.mine([3, 1, 2]) == [3, 1, 2]
    assert ranks.gather("all") == ["all"]
    assert not torch.distributed.is_initialized()


@pytest.mark.parametrize(
    ("visible", "rank", "own"),
    [(None, 0, "0"), (None, 1, "1"), ("3,5", 1, "5"), ("3,5", 2, "3"), ("GPU-a,GPU-b", 1, "GPU-b")],
)
def test_each_process_takes_its_own_gpu_and_part_of_the_cores(monkeypatch, visible, rank, own):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    if visible:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    monkeypatch.setenv("LOCAL_RANK", str(rank))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    threads, met = [], []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(ranks.joblib, "cpu_count", lambda: 7)
    monkeypatch.setattr(torch, "set_num_threads", threads.append)
    monkeypatch.setattr(
        ranks.distributed, "init_process_group", lambda *a, timeout: met.append(timeout)
    )
    monkeypatch.setattr(ranks.distributed, "destroy_process_group", lambda: met.append("left"))
    with ranks.joined():
        assert len(met) == 1
    assert met[1] == "left"
    assert os.environ["CUDA_VISIBLE_DEVICES"] == own
    assert threads == [2]
    assert met[0].days >= 7  # the slowest may take long
    assert met[0].total_seconds() * 1000 < 2**31


def test_the_others_say_that_one_has_stopped(monkeypatch):
    def lost(*_):
        raise RuntimeError("Connection closed by peer")

    monkeypatch.setattr(ranks.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(ranks.distributed, "get_world_size", lambda: 2)
    monkeypatch.setattr(ranks.distributed, "all_gather_object", lost)
    with pytest.raises(ConnectionError, match=r"another process.*Start again"):
        ranks.gather()


def test_other_commands_are_for_one_process(monkeypatch, tmp_path):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")
    with pytest.raises(
        SystemExit, match=r"error: convert is work for one process.*train and masks"
    ):
        main(["convert", str(tmp_path)])
