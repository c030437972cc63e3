"""Kills, Ctrl-C, full and read-only disks, vanished files, other places: no result is lost."""

import json
import os
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pandas as pd
import pytest

from brainsex import archives, cohort, explain, volumes
from brainsex.__main__ import main
from brainsex.networks import MriNet3d
from tests.test_archives import nested, save, volume
from tests.test_volumes import make as make_people

ROOT = Path(__file__).parents[1]
LINUX = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork and process groups")
MOUNTS = pytest.mark.skipif(
    sys.platform != "linux" or os.geteuid() != 0, reason="needs root to mount a small disk"
)
SHAPE = (22, 22, 22)
QUICK = {"folds": 2, "epochs": 1, "batch_size": 6, "workers": 1}


def make_network() -> MriNet3d:
    return MriNet3d(2, SHAPE)


def read_shown(folder: Path) -> dict[str, bytes]:
    """Read all files of a folder but hidden ones."""
    paths = [path.relative_to(folder) for path in folder.rglob("*") if path.is_file()]
    paths = [path for path in paths if not any(part.startswith(".") for part in path.parts)]
    return {str(path): (folder / path).read_bytes() for path in paths}


@pytest.fixture(scope="module")
def commands(tmp_path_factory):
    """The arguments of each command on small inputs; OUT stands for its folder."""
    pytest.importorskip("dipy")
    from tests.reliability.kills import make_inputs

    return make_inputs(tmp_path_factory.mktemp("inputs"), subjects=6, trained=4, epochs=1)


def fill_in(arguments: list[str], out: Path) -> list[str]:
    return [str(out) if word == "OUT" else word for word in arguments]


@pytest.fixture(scope="module")
def results(tmp_path_factory, commands):
    """The files of each command that nothing disturbs."""
    folder = tmp_path_factory.mktemp("results")
    for name, arguments in commands.items():
        main(fill_in(arguments, folder / name))
    return {name: read_shown(folder / name) for name in commands}


FEW = {"extract": 3, "convert": 2, "train": 1, "masks": 0, "fa": 0}


@LINUX
@pytest.mark.parametrize("soak", [False, pytest.param(True, marks=pytest.mark.soak)])
def test_no_kill_locale_time_zone_or_folder_changes_a_byte(tmp_path, commands, results, soak):
    from tests.reliability.kills import KILLS, make_inputs

    commands = make_inputs(tmp_path / "inputs") if soak else commands
    arguments = [json.dumps(KILLS if soak else FEW), tmp_path / "out", json.dumps(commands)]
    variables = {"LC_ALL": "C", "TZ": "Asia/Kathmandu", "PYTHONUTF8": "0"}
    variables |= {"PYTHONPATH": str(ROOT), "PYTHONWARNDEFAULTENCODING": "1"}
    run = [sys.executable, "-m", "tests.reliability.kills", *arguments]
    options = {"cwd": tmp_path, "env": os.environ | variables, "check": False}
    done = subprocess.run(run, capture_output=True, encoding="utf-8", **options)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    print(done.stdout)
    assert f"{ROOT}/brainsex" not in done.stderr  # no EncodingWarning
    for name in FEW if not soak else ():
        assert read_shown(tmp_path / "out" / name / "whole") == results[name], name


@LINUX
@pytest.mark.soak
def test_ctrl_c_ends_every_command_within_two_seconds():
    pytest.importorskip("dipy")
    from tests.reliability import interrupts

    seconds = interrupts.measure()
    print(seconds)
    assert len(seconds) == 7
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
def test_after_a_full_disk_the_same_command_goes_on_to_the_same_result(tmp_path, commands, results):
    for name, whole in results.items():
        room = int(sum(len(content) // 4096 + 1 for content in whole.values()) * 0.6) * 4096
        with mount(tmp_path / name, "-o", f"size={room}") as disk:
            arguments = fill_in(commands[name], disk / "out")
            with pytest.raises(SystemExit, match=rf"No space left.*/{name}/out/.*make room and ru"):
                main(arguments)
            assert read_shown(disk / "out").items() <= whole.items()
            subprocess.run(["mount", "-o", "remount,size=100m", disk], check=True)
            main(arguments)
            assert read_shown(disk / "out") == whole, name


@MOUNTS
def test_a_read_only_folder_is_named(tmp_path, commands):
    with mount(tmp_path / "disk", "-o", "ro") as disk:
        for arguments in commands.values():
            with pytest.raises(SystemExit, match=r"cannot write \(Read-only.*disk/out'"):
                main(fill_in(arguments, disk / "out"))


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
    volumes.convert(folder / "fa", folder, out, shape=SHAPE, workers=1)
    data = cohort.load_cohort(out)
    assert data.subjects.tolist() == ["000001", "000003", "000004"]
    assert "000002,cannot be read now" in (out / "rejected.csv").read_text()
    table = pd.DataFrame({"Subject": data.subjects, "fold": [0, 1, 1]})
    table.to_csv(tmp_path / "folds.csv", index=False)
    with pytest.raises(FileNotFoundError, match=r"fold-0\.pt"):
        explain.explain(data, tmp_path, tmp_path / "masks")
