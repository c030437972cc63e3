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


@LINUX
@pytest.mark.parametrize(
    "kills",
    [{"extract": 3, "convert": 3, "train": 1}, pytest.param(None, marks=pytest.mark.soak)],
)
def test_kills_at_random_moments_lose_nothing_and_change_nothing(kills):
    pytest.importorskip("dipy")
    from tests.reliability.kills import KILLS

    command = [sys.executable, "-m", "tests.reliability.kills", json.dumps(kills or KILLS), "3"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    figures = json.loads(done.stdout.splitlines()[-1])
    print(figures)
    assert all(figures[name]["kills"] >= least for name, least in (kills or KILLS).items())


@LINUX
@pytest.mark.soak
def test_ctrl_c_ends_every_command_within_two_seconds():
    pytest.importorskip("dipy")
    from tests.reliability import interrupts

    seconds = interrupts.measure()
    print(seconds)
    assert len(seconds) == 7
    assert max(seconds.values()) < 2, seconds


@pytest.fixture(scope="module")
def commands(tmp_path_factory):
    """The arguments of each command on small inputs, for an OUT."""
    pytest.importorskip("dipy")
    from tests.reliability.kills import fill_in, make_inputs

    commands = make_inputs(tmp_path_factory.mktemp("inputs"), subjects=6, trained=4, epochs=1)
    del commands["train, 2 workers"]
    return lambda out: {name: fill_in(words, out / name) for name, words in commands.items()}


@contextmanager
def mount(place: Path, *options: str):
    place.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "tmpfs", place, *options], check=True)
    try:
        yield place
    finally:
        subprocess.run(["umount", place], check=True)


@MOUNTS
def test_after_a_full_disk_the_same_command_goes_on_to_the_same_result(tmp_path, commands):
    for name, arguments in commands(tmp_path).items():
        main(arguments)
        whole = read_shown(tmp_path / name)
        room = int(sum(len(content) // 4096 + 1 for content in whole.values()) * 0.6) * 4096
        with mount(tmp_path / f"{name}-disk", "-o", f"size={room}") as disk:
            with pytest.raises(SystemExit, match=rf"No space left.*/{name}/.*make room and run"):
                main(commands(disk)[name])
            assert read_shown(disk / name).items() <= whole.items()
            subprocess.run(["mount", "-o", "remount,size=100m", disk], check=True)
            main(commands(disk)[name])
            assert read_shown(disk / name) == whole, name


@MOUNTS
def test_a_read_only_folder_is_named(tmp_path, commands):
    with mount(tmp_path / "disk", "-o", "ro") as disk:
        for name, arguments in commands(disk).items():
            with pytest.raises(SystemExit, match=rf"cannot write \(Read-only.*disk/{name}'"):
                main(arguments)


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


def test_locale_time_zone_and_folder_change_no_byte(tmp_path, commands):
    trees, processes = [], {}
    for name, place, variables in (
        ("first", ROOT, {"LC_ALL": "C", "TZ": "UTC", "PYTHONUTF8": "0"}),
        ("second", tmp_path, {"LC_ALL": "C.utf8", "TZ": "Asia/Kathmandu"}),
    ):
        calls = list(commands(tmp_path / name).values())
        code = f"from brainsex.__main__ import main\nfor call in {calls}: main(call)"
        environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONWARNDEFAULTENCODING": "1"}
        options = {"cwd": place, "env": environment | variables, "stderr": subprocess.PIPE}
        options |= {"stdout": subprocess.DEVNULL, "encoding": "utf-8"}
        processes[name] = subprocess.Popen([sys.executable, "-c", code], **options)
    for name, process in processes.items():
        printed = process.communicate()[1]
        assert process.returncode == 0, printed
        warnings = [line for line in printed.splitlines() if "EncodingWarning" in line]
        assert not [line for line in warnings if str(ROOT / "brainsex") in line]
        trees.append(read_shown(tmp_path / name))
    assert trees[0] == trees[1]
    assert len(trees[0]) > 40
