"""Kills, Ctrl-C, full and read-only disks, vanished files, other places: no result is lost."""

import contextlib
import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from brainsex import archives, cohort, explain, training, volumes
from brainsex.__main__ import main
from brainsex.networks import MriNet3d
from tests.test_archives import nested, save, volume
from tests.test_volumes import make as make_people

ROOT = Path(__file__).parents[1]
LINUX = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork and process groups")
MOUNTS = pytest.mark.skipif(
    sys.platform != "linux" or os.geteuid() != 0, reason="needs root to mount a small disk"
)
QUICK = {"folds": 2, "epochs": 1, "batch_size": 6, "workers": 1}


def make_network() -> MriNet3d:
    return MriNet3d(2, (22, 22, 22))


def read_shown(folder: Path) -> dict[str, bytes]:
    """Read all files of a folder but hidden ones."""
    paths = [path.relative_to(folder) for path in folder.rglob("*") if path.is_file()]
    paths = [path for path in paths if not any(part.startswith(".") for part in path.parts)]
    return {str(path): (folder / path).read_bytes() for path in paths}


@LINUX
@pytest.mark.parametrize(
    "kills",
    [{"extract": 3, "convert": 3, "train": 2}, pytest.param(None, marks=pytest.mark.soak)],
    ids=["few", "all"],
)
def test_kills_at_random_moments_lose_nothing_and_change_nothing(kills):
    pytest.importorskip("dipy")
    from tests.reliability.kills import KILLS

    command = [sys.executable, "-m", "tests.reliability.kills", json.dumps(kills or KILLS), "3"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    figures = json.loads(done.stdout.splitlines()[-1])
    assert all(figures[name]["kills"] >= least for name, least in (kills or KILLS).items())


@LINUX
@pytest.mark.soak
def test_ctrl_c_ends_every_command_within_two_seconds():
    pytest.importorskip("dipy")
    from tests.reliability import interrupts

    seconds = interrupts.measure()
    assert len(seconds) == 7
    assert max(seconds.values()) < 2, seconds


@pytest.fixture(scope="module")
def commands(tmp_path_factory):
    """The arguments of each command on small inputs; OUT stands for the folder it writes."""
    pytest.importorskip("dipy")
    from tests.reliability.kills import make_inputs

    commands = make_inputs(tmp_path_factory.mktemp("inputs"), epochs=1)
    del commands["train, 2 workers"]
    return commands


def fill_in(arguments: list[str], out: Path) -> list[str]:
    return [str(out) if word == "OUT" else word for word in arguments]


@contextlib.contextmanager
def mount(place: Path, *options: str):
    place.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "tmpfs", place, *options], check=True)
    try:
        yield place
    finally:
        subprocess.run(["umount", place], check=True)


@MOUNTS
def test_after_a_full_disk_the_same_command_goes_on_to_the_same_result(tmp_path, commands):
    for name, arguments in commands.items():
        main(fill_in(arguments, tmp_path / name))
        whole = read_shown(tmp_path / name)
        room = int(sum(len(content) // 4096 + 1 for content in whole.values()) * 0.6) * 4096
        with mount(tmp_path / f"{name}-disk", "-o", f"size={room}") as place:
            with pytest.raises(SystemExit, match=r"No space left.*disk/out.*make room and run"):
                main(fill_in(arguments, place / "out"))
            left = read_shown(place / "out")
            assert left.items() <= whole.items()
            subprocess.run(["mount", "-o", "remount,size=100m", place], check=True)
            main(fill_in(arguments, place / "out"))
            assert read_shown(place / "out") == whole, name


@MOUNTS
def test_a_read_only_folder_is_named(tmp_path, commands):
    with mount(tmp_path / "disk", "-o", "ro"):
        for arguments in commands.values():
            with pytest.raises(SystemExit, match=r"^error: .*cannot write \(Read-only.*disk'"):
                main(fill_in(arguments, tmp_path / "disk"))


def test_a_vanished_input_ends_with_a_line_or_a_rejection(tmp_path, monkeypatch):
    save(tmp_path / "packages", _900001=nested(volume(1)), _900002=nested(volume(2)))
    group, convert = archives.group_by_subject, volumes._convert_subject

    def lose_archive(paths):
        groups = group(paths)
        groups["900001"][0].unlink()
        return groups

    def lose_volume(part, path, *options):
        if path.name.startswith("000002"):
            path.unlink()
        return convert(part, path, *options)

    monkeypatch.setattr(archives, "group_by_subject", lose_archive)
    table = archives.extract(tmp_path / "packages", tmp_path / "fa")
    assert table["status"].tolist() == ["rejected", "extracted"]
    assert "900001.zip" in table["reason"][0]
    monkeypatch.setattr(volumes, "_convert_subject", lose_volume)
    folder, out = make_people(tmp_path / "p", 4), tmp_path / "out"
    volumes.convert(folder / "fa", folder, out, shape=(22, 22, 22), workers=1)
    data = cohort.load_cohort(out)
    assert data.subjects.tolist() == ["000001", "000003", "000004"]
    assert "000002,cannot be read now" in (out / "rejected.csv").read_text()
    (tmp_path / "networks").mkdir()
    table = pd.DataFrame({"Subject": data.subjects, "fold": [0, 1, 1]})
    table.to_csv(tmp_path / "networks" / "folds.csv")
    with pytest.raises(FileNotFoundError, match=r"fold-0\.pt"):
        explain.explain(data, tmp_path / "networks", tmp_path / "masks")


def test_locale_time_zone_and_folder_change_no_byte(tmp_path, commands):
    trees, runs = [], []
    for folder, place, variables in (
        (tmp_path / "first", ROOT, {"LC_ALL": "C", "TZ": "UTC", "PYTHONUTF8": "0"}),
        (tmp_path / "second", tmp_path, {"LC_ALL": "C.utf8", "TZ": "Asia/Kathmandu"}),
    ):
        calls = [fill_in(arguments, folder / name) for name, arguments in commands.items()]
        code = f"from brainsex.__main__ import main\nfor call in {calls}: main(call)"
        environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONWARNDEFAULTENCODING": "1"}
        options = {"cwd": place, "env": environment | variables, "stderr": subprocess.PIPE}
        options |= {"stdout": subprocess.DEVNULL, "encoding": "utf-8"}
        runs.append((folder, subprocess.Popen([sys.executable, "-c", code], **options)))
    for folder, process in runs:
        printed = process.communicate()[1]
        assert process.returncode == 0, printed
        warned = [line for line in printed.splitlines() if "EncodingWarning" in line]
        assert not [line for line in warned if str(ROOT / "brainsex") in line]
        trees.append(read_shown(folder))
    assert trees[0] == trees[1]
    assert len(trees[0]) > 50


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_no_voxel_that_is_not_finite_reaches_a_mean(tmp_path, value):
    tensors = np.random.default_rng(0).uniform(0, 1, (12, 22, 22, 22)).astype(np.float32)
    tensors[3, 8, 8, 16] = value
    np.save(tmp_path / "tensors.npy", tensors)
    np.save(tmp_path / "labels.npy", np.arange(12) % 2)
    with pytest.raises(ValueError, match="not finite for 03"):
        training.cross_validate(cohort.load_cohort(tmp_path), make_network, **QUICK)
    with pytest.raises(SystemExit, match="not finite for 03"):
        main(["check", str(tmp_path), str(tmp_path / "check")])
