"""Kills, Ctrl-C, full and read-only disks, lost and damaged files: no result is lost or wrong."""

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from brainsex import synthetic
from brainsex.__main__ import main
from tests.reliability import kills
from tests.reliability.hostile import write_study

ROOT = Path(__file__).parents[1]
LINUX = pytest.mark.skipif(sys.platform != "linux", reason="needs fork, process groups and /proc")
FEW = {"extract": 3, "convert": 1, "train": 1, "masks": 0, "fa": 0}  # kills in the suite


def run(inputs, command, out):
    main(kills.arguments(inputs, command, out))
    return kills.read_tree(out)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """A study of four, which each command can read."""
    folder, threads = tmp_path_factory.mktemp("inputs"), torch.get_num_threads()
    write_study(folder, 4)
    torch.set_num_threads(1)
    yield folder
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def finished(tmp_path_factory, inputs):
    """A folder of what each command leaves, with convert's parts."""
    folder = tmp_path_factory.mktemp("finished")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shutil, "rmtree", lambda *_, **__: None)
        patch.setattr(Path, "unlink", lambda *_, **__: None)
        for command in FEW:
            run(inputs, command, folder / command)
    return folder


@LINUX
@pytest.mark.parametrize("soak", [False, pytest.param(True, marks=pytest.mark.soak)])
def test_no_kill_locale_time_zone_or_folder_changes_a_byte(tmp_path, inputs, finished, soak):
    variables = {"LC_ALL": "C", "TZ": "Asia/Kathmandu", "PYTHONUTF8": "0"}
    variables |= {"PYTHONWARNDEFAULTENCODING": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "tests.reliability.kills"]
    command += [tmp_path / "soak"] if soak else [inputs, json.dumps(FEW)]
    options = {"cwd": tmp_path, "env": os.environ | variables, "encoding": "utf-8"}
    done = subprocess.run(command, capture_output=True, check=False, **options)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    for name in FEW if not soak else ():
        assert kills.read_tree(inputs / name) == kills.read_tree(finished / name), name
    assert not re.search(rf"{ROOT}/brainsex.*EncodingWarning", done.stderr)


@LINUX
@pytest.mark.parametrize("every", [211, pytest.param(1, marks=pytest.mark.soak)])
def test_no_hostile_file_stops_a_command_or_takes_more_than_it_may(every):
    command = [sys.executable, "-m", "tests.reliability.hostile", str(every)]
    options = {"cwd": ROOT, "env": os.environ | {"OMP_NUM_THREADS": "1"}, "text": True}
    done = subprocess.run(command, capture_output=True, check=False, **options)
    assert done.returncode == 0, done.stdout + done.stderr
    assert int(re.search(r"(\d+) hostile files, 0 failed", done.stdout)[1]) > 1000 / every


@LINUX
@pytest.mark.soak
def test_ctrl_c_ends_every_command_within_two_seconds(tmp_path):
    write_study(tmp_path, 2160)
    cohort = synthetic.write_cohort(tmp_path / "cohort", subjects=16, spacing=5)
    begun = {"convert": ".parts/*.npz", "train": "folds.csv", "masks": "run.json"}
    begun |= {"train-by-two": begun["train"], "run.py": "02_*.ipynb"}
    options, seconds = {"cwd": ROOT, "stderr": subprocess.PIPE, "text": True}, {}
    for name in (*kills.KILLS, "run.py"):
        out, first_file = tmp_path / name, begun.get(name, "*.nii.gz")
        command = [sys.executable, "notebooks/run.py", "--profile", "smoke", "--out", out]
        command += ["--cohort", cohort]
        if name in kills.KILLS:
            command[1:] = ["-m", "brainsex", *kills.arguments(tmp_path, name, out)]
            command += ["--epochs", "200"] if "train" in name else []
        with subprocess.Popen(command, start_new_session=True, **options) as process:
            while not any(out.glob(first_file)):
                assert process.poll() is None, process.stderr.read()[-2000:]
                time.sleep(0.01)
            time.sleep(random.Random(name).uniform(0, 3 if name == "run.py" else 0.3))
            began = time.monotonic()
            os.killpg(process.pid, signal.SIGINT)
            printed = process.communicate(timeout=60)[1]
            seconds[name] = time.monotonic() - began
        assert process.returncode == 130, printed[-2000:]
        assert "Traceback" not in printed, printed[-2000:]
        assert "the same command goes on from what is" in printed, printed[-2000:]
        if name in kills.KILLS:
            before = kills.finished_files(out, name)
            again = subprocess.run(command, check=False, **options)
            assert again.returncode == 0, again.stderr[-2000:]
            after = kills.finished_files(out, name)  # convert deletes its parts
            assert all(after.get(path, stamp) == stamp for path, stamp in before.items()), name
    assert max(seconds.values()) < 2, seconds


@pytest.mark.skipif(
    sys.platform != "linux" or os.geteuid() != 0, reason="needs root to mount a small disk"
)
@pytest.mark.parametrize("name", FEW)
def test_a_full_or_read_only_disk_is_named_and_then_a_command_goes_on(
    tmp_path, inputs, finished, name
):
    whole = kills.read_tree(finished / name)
    room = int(sum(len(content) // 4096 + 1 for content in whole.values()) * 0.6) * 4096
    mount = ["mount", "-t", "tmpfs", "tmpfs", tmp_path, "-o"]
    subprocess.run([*mount, f"ro,size={room}"], check=True)
    try:
        with pytest.raises(SystemExit, match=r"Read-only.*/out"):
            run(inputs, name, tmp_path / "out")
        subprocess.run([*mount, "remount,rw"], check=True)
        with pytest.raises(SystemExit, match=r"No space left.*/out.*; make room and run"):
            run(inputs, name, tmp_path / "out")
        assert kills.read_tree(tmp_path / "out").items() <= whole.items()
        subprocess.run([*mount, "remount,size=100m"], check=True)
        assert run(inputs, name, tmp_path / "out") == whole
    finally:
        subprocess.run(["umount", tmp_path], check=True)


@pytest.mark.parametrize("how", ["cut", "noise"])
@pytest.mark.parametrize(
    ("name", "made_anew", "absent"),
    [
        ("convert/grid.json", False, ""),
        ("convert/.parts/*.npz", True, "tensors.npy"),
        ("train/fold-0.json", False, ""),
        ("train/folds.csv", True, ""),
        ("masks/mask/*.json", False, ""),
    ],
)
def test_a_damaged_file_of_the_projects_own_is_named_or_made_anew(
    tmp_path, inputs, finished, name, made_anew, absent, how
):
    command, _, name = name.partition("/")
    out = tmp_path / "copy"
    shutil.copytree(finished / command, out)
    path, whole = next(out.glob(name)), kills.read_tree(out)
    noise, half = random.Random(0).randbytes(200), path.read_bytes()[: path.stat().st_size // 2]
    path.write_bytes({"cut": half, "noise": noise}[how])
    (out / absent).unlink() if absent else None
    if made_anew:
        assert run(inputs, command, out) == whole
    else:
        with pytest.raises(SystemExit, match=rf"^error: \S*{path.name}: expected"):
            run(inputs, command, out)
