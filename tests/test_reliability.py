"""Kills, Ctrl-C, full and read-only disks, vanished files, other places: no result is lost."""

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import pandas as pd
import pytest

from brainsex import archives, cohort, explain, volumes
from brainsex.__main__ import main
from brainsex.networks import MriNet3d
from tests.reliability import kills
from tests.test_archives import nested, save, volume
from tests.test_volumes import make as make_people

ROOT = Path(__file__).parents[1]
LINUX = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork and process groups")
MOUNTS = pytest.mark.skipif(
    sys.platform != "linux" or os.geteuid() != 0, reason="needs root to mount a small disk"
)
FEW = {"extract": 3, "convert": 2, "train": 1, "masks": 0, "fa": 0}
"""Kills of each command in the suite; `make soak` has many."""
QUICK = {"folds": 2, "epochs": 1, "batch_size": 6, "workers": 1}


def make_network() -> MriNet3d:
    return MriNet3d(2, kills.SHAPE)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """A folder of small inputs for each command."""
    folder = tmp_path_factory.mktemp("inputs")
    kills.make_inputs(folder, subjects=6, trained=4, epochs=1)
    return folder


def run(inputs, command, out):
    """Run a command; return its files."""
    main(kills.arguments(inputs, command, out))
    return kills.read_tree(out)


@LINUX
@pytest.mark.parametrize("soak", [False, pytest.param(True, marks=pytest.mark.soak)])
def test_no_kill_locale_time_zone_or_folder_changes_a_byte(tmp_path, inputs, soak):
    place = [tmp_path / "soak"] if soak else [inputs, json.dumps(FEW)]
    variables = {"LC_ALL": "C", "TZ": "Asia/Kathmandu", "PYTHONUTF8": "0"}
    variables |= {"PYTHONPATH": str(ROOT), "PYTHONWARNDEFAULTENCODING": "1"}
    options = {"cwd": tmp_path, "env": os.environ | variables, "encoding": "utf-8"}
    command = [sys.executable, "-m", "tests.reliability.kills", *place]
    done = subprocess.run(command, capture_output=True, check=False, **options)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    print(done.stdout)
    for name in FEW if not soak else ():
        log = (inputs / f"{name}.log").read_text(encoding="utf-8")
        assert not re.search(rf"{ROOT}/brainsex.*EncodingWarning", log)
        assert run(inputs, name, tmp_path / name) == kills.read_tree(inputs / name), name


@LINUX
@pytest.mark.soak
def test_ctrl_c_ends_every_command_within_two_seconds(tmp_path):
    kills.make_inputs(tmp_path, subjects=720, epochs=100)
    begun = {"convert": ".parts/*.npz", "train": ".fold-*.checkpoint", "masks": "run.json"}
    seconds, options = {}, {"cwd": ROOT, "stderr": subprocess.PIPE, "text": True}
    for name in (*kills.KILLS, "notebooks"):
        out, first_file = tmp_path / name, begun.get(name.split(",")[0], "*.nii.gz")
        command = [sys.executable, "-m", "brainsex"]
        if name == "notebooks":
            command, first_file = [sys.executable, "notebooks/run.py", "--profile"], "02_*.ipynb"
            command += ["smoke", "--cohort", str(tmp_path / "cohort"), "--out", str(out)]
        else:
            command += kills.arguments(tmp_path, name, out)
        with subprocess.Popen(command, start_new_session=True, **options) as process:
            while not any(out.glob(first_file)):
                assert process.poll() is None, process.stderr.read()[-2000:]
                time.sleep(0.01)
            time.sleep(random.Random(name).uniform(0, 0.3))
            began = time.monotonic()
            os.killpg(process.pid, signal.SIGINT)
            printed = process.communicate(timeout=60)[1]
            seconds[name] = time.monotonic() - began
        assert process.returncode == 130, printed[-2000:]
        assert "Traceback" not in printed, printed[-2000:]
        assert "the same command goes on from what is" in printed, printed[-2000:]
        if name != "notebooks":
            before = kills.finished_files(out, name)
            again = subprocess.run(command, check=False, **options)
            assert again.returncode == 0, again.stderr[-2000:]
            after = kills.finished_files(out, name)  # convert deletes its parts
            assert all(after.get(path, stamp) == stamp for path, stamp in before.items()), name
    print(seconds)
    assert max(seconds.values()) < 2, seconds


@contextmanager
def mount(place: Path, *options: str):
    place.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "tmpfs", place, *options], check=True)
    try:
        yield place
    finally:
        subprocess.run(["umount", place], check=True)


@MOUNTS
def test_after_a_full_disk_the_same_command_goes_on_to_the_same_result(tmp_path, inputs):
    for name in FEW:
        whole = run(inputs, name, tmp_path / "whole" / name)
        room = int(sum(len(content) // 4096 + 1 for content in whole.values()) * 0.6) * 4096
        with mount(tmp_path / name, "-o", f"size={room}") as disk:
            with pytest.raises(SystemExit, match=rf"No space left.*/{name}/out/.*make room and ru"):
                run(inputs, name, disk / "out")
            assert kills.read_tree(disk / "out").items() <= whole.items()
            subprocess.run(["mount", "-o", "remount,size=100m", disk], check=True)
            assert run(inputs, name, disk / "out") == whole, name


@MOUNTS
def test_a_read_only_folder_is_named(tmp_path, inputs):
    with mount(tmp_path / "disk", "-o", "ro") as disk:
        for name in FEW:
            with pytest.raises(SystemExit, match=r"cannot write \(Read-only.*disk/out'"):
                run(inputs, name, disk / "out")


def test_a_vanished_input_ends_with_a_line_or_a_rejection(tmp_path, monkeypatch):
    save(tmp_path / "packages", _900001=nested(volume(1)), _900002=nested(volume(2)))
    folder, out = make_people(tmp_path / "people", 4), tmp_path / "out"
    open_archive, prepare = archives.find_members, volumes.prepare

    def lose_archive(path, *options):
        (tmp_path / "packages" / "900001.zip").unlink(missing_ok=True)
        return open_archive(path, *options)

    def lose_volume(path, *options):
        (folder / "fa" / "000002.nii.gz").unlink(missing_ok=True)
        return prepare(path, *options)

    monkeypatch.setattr(archives, "find_members", lose_archive)
    table = archives.extract(tmp_path / "packages", tmp_path / "fa")
    assert table["status"].tolist() == ["rejected", "extracted"]
    assert "900001.zip" in table["reason"][0]
    monkeypatch.setattr(volumes, "prepare", lose_volume)
    volumes.convert(folder / "fa", folder, out, shape=kills.SHAPE, workers=1)
    data = cohort.load_cohort(out)
    assert data.subjects.tolist() == ["000001", "000003", "000004"]
    assert "000002,cannot be read now" in (out / "rejected.csv").read_text()
    table = pd.DataFrame({"Subject": data.subjects, "fold": [0, 1, 1]})
    table.to_csv(tmp_path / "folds.csv", index=False)
    with pytest.raises(FileNotFoundError, match=r"fold-0\.pt"):
        explain.explain(data, tmp_path, tmp_path / "masks")
