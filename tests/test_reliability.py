"""Kills, Ctrl-C, full and read-only disks, second runs, vanished files, and what is on record."""

import contextlib
import errno
import json
import os
import platform
import shlex
import subprocess
import sys
import threading
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch

from brainsex import __main__ as commands
from brainsex import (
    archives,
    cohort,
    controls,
    diffusion,
    masks,
    replacing,
    runs,
    training,
    volumes,
)
from brainsex.cohort import fingerprint
from brainsex.networks import MriNet3d
from tests.reliability import versions
from tests.test_archives import STORED, nested, save, volume
from tests.test_volumes import make as people

ROOT = Path(__file__).parents[1]
SOAK = pytest.mark.soak
LINUX = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork and process groups")
MOUNTS = pytest.mark.skipif(
    sys.platform != "linux" or os.geteuid() != 0, reason="needs root to mount a small disk"
)


@LINUX
@pytest.mark.parametrize(
    "kills",
    [
        {"extract": 4, "convert": 4, "train": 2},
        pytest.param(None, marks=SOAK),
    ],
    ids=["some", "all"],
)
def test_kills_at_random_moments_lose_nothing_and_change_nothing(kills):
    pytest.importorskip("dipy")
    from tests.reliability.kills import KILLS

    kills = kills or KILLS
    run = [sys.executable, "-m", "tests.reliability.kills", json.dumps(kills), "3"]
    done = subprocess.run(run, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert all(found[command]["kills"] >= least for command, least in kills.items())


@LINUX
@SOAK
def test_ctrl_c_ends_every_command_within_two_seconds():
    pytest.importorskip("dipy")
    from tests.reliability import interrupts

    found = interrupts.measured()
    assert set(found) == {*interrupts.COMMANDS, "notebooks/run.py"}
    assert max(found.values()) < 2, found


def test_ctrl_c_says_what_is_finished_and_how_to_go_on(tmp_path, monkeypatch, capsys):
    def interrupted(source, target, **_):
        target.mkdir()
        for name in ("a.nii.gz", "b.nii", ".c.nii.gz.1.partial"):
            (target / name).touch()
        raise KeyboardInterrupt

    monkeypatch.setattr(archives, "extract", interrupted)
    with pytest.raises(SystemExit) as stopped:
        commands.main(["extract", "x", str(tmp_path / "fa")])
    assert stopped.value.code == 130
    said = capsys.readouterr().err
    assert f"{tmp_path / 'fa'} holds 2 finished subjects. The same command goes on" in said


@contextlib.contextmanager
def disk(place, *options):
    place.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "tmpfs", place, *options], check=True)
    try:
        yield place
    finally:
        subprocess.run(["umount", place], check=True)


def toy(folder, count=12):
    """A small cohort on disk, converted."""
    folder.mkdir()
    sex = np.arange(count) % 2
    small = np.random.default_rng(0).uniform(0, 1, (count, 22, 22, 22)).astype(np.float32)
    np.save(folder / "tensors.npy", small)
    np.save(folder / "labels.npy", sex)
    return cohort.load(folder, affine=np.eye(4))


QUICK = {"folds": 2, "epochs": 1, "batch_size": 6, "workers": 1}


def network():
    return MriNet3d(2, (22, 22, 22))


def steps(tmp_path):
    """What each command's function writes, given a folder."""
    data, packages, taken = toy(tmp_path / "toy"), tmp_path / "packages", people(tmp_path / "p", 9)
    for number in range(6):
        content = nested(np.random.default_rng(number).bytes(60_000), STORED)
        save(packages, **{f"_90000{number}": content})
    networks = tmp_path / "networks"
    training.cross_validate(data, network, out=networks, **QUICK)
    every = {
        "extract": lambda out: archives.extract(packages, out),
        "convert": lambda out: volumes.convert(taken / "fa", taken, out, shape=(24, 24, 24)),
        "train": lambda out: training.cross_validate(data, network, out=out, **QUICK),
        "masks": lambda out: masks.explain(data, networks, out, iterations=2),
    }
    if find_spec("dipy"):
        from tests import test_diffusion as diffusion_tests

        series = tmp_path / "series"
        for number in range(3):
            folder = series / f"90000{number}" / "T1w" / "Diffusion"
            diffusion_tests.save(folder, diffusion_tests.series(number))
        every["fa"] = lambda out: diffusion.fit(series, out, workers=1)
    return every


def tree(folder):
    """Files but hidden ones."""
    files = {p.relative_to(folder): p for p in folder.rglob("*") if p.is_file()}
    shown = {path for path in files if not any(part.startswith(".") for part in path.parts)}
    return {str(path): files[path].read_bytes() for path in shown}


@MOUNTS
def test_after_a_full_disk_the_same_command_goes_on_to_the_same_result(tmp_path):
    for name, step in steps(tmp_path).items():
        step(tmp_path / name)
        whole = tree(tmp_path / name)
        room = int(sum(map(len, whole.values())) * 0.6)
        with disk(tmp_path / f"{name}-disk", "-o", f"size={room}") as place:
            with pytest.raises(OSError, match=r"No space left.*make room, run again") as full:
                step(place / "out")
            assert full.value.errno == errno.ENOSPC
            assert full.value.filename == str(place / "out")
            left = tree(place / "out")
            assert {k: v for k, v in left.items() if k != "masks.csv"}.items() <= whole.items()
            subprocess.run(["mount", "-o", "remount,size=100m", place], check=True)
            step(place / "out")
            assert tree(place / "out") == whole, name


@MOUNTS
def test_a_read_only_folder_is_named(tmp_path):
    every = steps(tmp_path)
    with disk(tmp_path / "disk") as place:
        subprocess.run(["mount", "-o", "remount,ro", place], check=True)
        for step in every.values():
            with pytest.raises(OSError, match=r"cannot write \(Read-only.*disk'"):
                step(place)


def test_a_second_run_in_a_folder_is_refused_and_a_third_after_it_is_not(tmp_path):
    code = "import sys, time; from brainsex import runs\n"
    code += "with runs.alone(sys.argv[1]): print('held', flush=True); time.sleep(60)"
    for name, step in steps(tmp_path).items():
        out = tmp_path / name
        run = [sys.executable, "-c", code, out]
        with subprocess.Popen(run, cwd=ROOT, stdout=subprocess.PIPE, text=True) as other:
            assert other.stdout.readline() == "held\n"
            with pytest.raises(OSError, match=rf"{name}: another run is writing here\. Wait"):
                step(out)
            assert tree(out) == {}
            other.kill()  # which frees the lock
        step(out)
        assert tree(out)


def test_partial_files_of_two_writers_never_meet_and_the_next_run_deletes_them(tmp_path):
    both, contents = threading.Barrier(2), ("a" * 1000, "b" * 1000)

    def write(text):
        with replacing(tmp_path / "x") as partial:
            partial.write_text(text)
            both.wait()
            assert partial.read_text() == text
            both.wait()

    threads = [threading.Thread(target=write, args=(text,)) for text in contents]
    [each.start() for each in threads]
    [each.join() for each in threads]
    assert (tmp_path / "x").read_text() in contents
    (tmp_path / "below").mkdir()
    (tmp_path / "below" / ".y.0123.partial").touch()
    (tmp_path / ".y.0123.partial").touch()
    with runs.alone(tmp_path, "below"):
        pass
    assert not list(tmp_path.rglob("*.partial"))


def test_a_vanished_input_ends_with_a_line_or_a_rejection(tmp_path, monkeypatch):
    save(tmp_path / "packages", _900001=nested(volume(1)), _900002=nested(volume(2)))
    listed = archives.by_subject

    def gone(paths):
        found = listed(paths)
        found["900001"][0].unlink()
        return found

    monkeypatch.setattr(archives, "by_subject", gone)
    table = archives.extract(tmp_path / "packages", tmp_path / "fa")
    assert table["status"].tolist() == ["rejected", "extracted"]
    assert "900001.zip" in table["reason"][0] or "900001" in table["reason"][0]
    folder = people(tmp_path / "p", 4)
    whole = volumes._reduced

    def lost(first, path, *options):
        if path.name.startswith("000002"):
            path.unlink()
        return whole(first, path, *options)

    monkeypatch.setattr(volumes, "_reduced", lost)
    volumes.convert(folder / "fa", folder, tmp_path / "out", shape=(10, 12, 9), workers=1)
    assert cohort.load(tmp_path / "out").subjects.tolist() == ["000001", "000003", "000004"]
    data = toy(tmp_path / "toy")
    training.cross_validate(data, network, out=tmp_path / "networks", **QUICK)
    (tmp_path / "networks" / "fold-1.pt").unlink()
    with pytest.raises(FileNotFoundError, match=r"fold-1\.pt"):
        masks.explain(data, tmp_path / "networks", tmp_path / "masks", iterations=2)


def test_a_worker_that_is_killed_ends_with_one_line(tmp_path, monkeypatch, capsys):
    def killed(**_):
        raise commands.BrokenProcessPool("A worker was killed.\n\nThe exit codes are {SIGKILL}")

    monkeypatch.setattr(archives, "extract", killed)
    with pytest.raises(SystemExit, match=r"^error: A worker was killed\. The exit codes"):
        commands.main(["extract", "x", "y"])


def test_run_json_says_what_was_asked_for_on_which_cohort_and_with_what(tmp_path):
    data, out = toy(tmp_path / "toy"), tmp_path / "out"
    training.cross_validate(data, network, out=out, seed=7, **QUICK)
    save(tmp_path / "packages", _900001=nested(volume(1)))
    archives.extract(tmp_path / "packages", out)
    found = json.loads((out / "run.json").read_text())
    assert set(found) == {"train", "extract"}
    assert found["train"]["seed"] == "7"
    assert found["train"]["cohort"] == fingerprint(data.subjects, data.sex, data.volumes)
    (made,) = found["train"]["made_with"]
    assert made["python"] == platform.python_version()
    assert made["torch"] == torch.__version__.split("+")[0] or made["torch"] == torch.__version__
    head = ["git", "-C", ROOT, "rev-parse", "HEAD"]
    commit = subprocess.run(head, capture_output=True, text=True, check=False).stdout.strip()
    assert made.get("git", "").removesuffix("-dirty") == commit


def test_other_versions_go_on_and_are_on_record_beside_those_before(tmp_path, monkeypatch):
    runs.record(tmp_path, "train", seed=1)
    before = runs.environment()
    monkeypatch.setattr(runs, "environment", lambda: before | {"torch": "99"})
    assert runs.same(tmp_path, "train", seed=1)
    runs.record(tmp_path, "train", seed=1)
    made = json.loads((tmp_path / "run.json").read_text())["train"]["made_with"]
    assert [each["torch"] for each in made] == [before["torch"], "99"]
    assert not runs.same(tmp_path, "train", seed=2)
    runs.record(tmp_path, "train", seed=2)
    assert len(json.loads((tmp_path / "run.json").read_text())["train"]["made_with"]) == 1


def test_no_checkout_no_git_state(tmp_path, monkeypatch):
    monkeypatch.setattr(runs, "ROOT", tmp_path)
    assert "git" not in runs.environment.__wrapped__()


def test_one_fingerprint_of_arrays_parts_and_rows(tmp_path):
    folder = people(tmp_path / "p", 5)
    volumes.convert(folder / "fa", folder, tmp_path / "out", shape=(10, 12, 9))
    data = cohort.load(tmp_path / "out")
    whole = fingerprint(data.subjects, data.sex, data.volumes)
    assert json.loads((tmp_path / "out" / "run.json").read_text())["convert"]["cohort"] == whole
    same = cohort.subset(data, np.arange(5))
    assert fingerprint(same.subjects, same.sex, same.volumes) == whole
    other = np.array(data.volumes)
    other[4, 3, 2, 1] += 1e-3
    changed = [
        (data.subjects, data.sex, other),
        (data.subjects, 1 - data.sex, data.volumes),
        (data.subjects[::-1], data.sex, data.volumes),
        (data.subjects, data.sex, np.array(data.volumes).reshape(5, 12, 10, 9)),
    ]
    assert len({whole, *(fingerprint(*each) for each in changed)}) == 5


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_no_voxel_that_is_not_finite_reaches_a_mean(tmp_path, value):
    data = toy(tmp_path / "toy")
    training.cross_validate(data, network, out=tmp_path / "networks", **QUICK)
    volumes_ = np.array(data.volumes)
    volumes_[3, 4, 5, 6] = value
    np.save(tmp_path / "toy" / "tensors.npy", volumes_)
    bad, held_out = cohort.load(tmp_path / "toy", affine=np.eye(4)), np.arange(12) < 4
    region = {"all": np.ones((22, 22, 22), bool)}
    for use in (
        lambda: training.cross_validate(bad, network, **QUICK),
        lambda: masks.explain(bad, tmp_path / "networks", tmp_path / "masks"),
        lambda: controls.removal(bad, region, held_out, network, out=tmp_path / "removal"),
        lambda: commands.main(["check", str(tmp_path / "toy"), str(tmp_path / "check")]),
    ):
        with pytest.raises((ValueError, SystemExit), match="not finite for 03"):
            use()


def test_locale_time_zone_and_folder_change_no_byte(tmp_path):
    folder, small = people(tmp_path / "p", 4), tmp_path / "small"
    volumes.convert(folder / "fa", folder, small, shape=(22, 22, 22))
    save(tmp_path / "packages", _900001=nested(volume(1)), _900002=nested(volume(2)))
    found, fit = [], "--channels 2 --folds 2 --epochs 1 --batch-size 6 --workers 1".split()
    for name, place, more in (
        ("one", ROOT, {"LC_ALL": "C", "TZ": "UTC", "PYTHONUTF8": "0"}),
        ("two", tmp_path, {"LC_ALL": "C.utf8", "TZ": "Asia/Kathmandu"}),
    ):
        env = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONWARNDEFAULTENCODING": "1"} | more
        out = tmp_path / name
        calls = (
            ["extract", f"{tmp_path}/packages", f"{out}/fa"],
            ["convert", f"{folder}", "--fa", f"{folder}/fa", "--out", f"{out}/data"],
            ["train", f"{small}", f"{out}/networks", *fit],
            ["masks", f"{small}", f"{out}/networks", f"{out}/masks"],
        )
        code = f"from brainsex.__main__ import main\nfor call in {calls}: main(call)"
        run = [sys.executable, "-c", code]
        done = subprocess.run(run, cwd=place, env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        warned = [line for line in done.stderr.splitlines() if "EncodingWarning" in line]
        assert not [line for line in warned if str(ROOT / "brainsex") in line]
        here = str(out).encode()
        found.append({path: text.replace(here, b"") for path, text in tree(out).items()})
    assert found[0] == found[1]


def examples():
    sub = next(
        action
        for action in commands.parser()._actions
        if action.dest == "==SUPPRESS==" or getattr(action, "choices", None)
    )
    return {name: each.epilog for name, each in sub.choices.items()}


@pytest.mark.parametrize("name", examples())
def test_the_example_in_a_commands_help_is_one(name):
    start = f"Example: python -m brainsex {name} "
    assert examples()[name].startswith(start)
    words = shlex.split(examples()[name].removeprefix("Example: python -m brainsex "))
    assert commands.parser().parse_args(words).function.__name__ == name


def test_damaged_json_is_named(tmp_path):
    data = toy(tmp_path / "toy")
    training.cross_validate(data, network, out=tmp_path / "out", **QUICK)
    (tmp_path / "out" / "fold-1.json").write_text("{")
    with pytest.raises(ValueError, match=r"fold-1\.json: expected JSON, cannot read it"):
        training.cross_validate(data, network, out=tmp_path / "out", **QUICK)


def test_lower_bounds_become_pins_of_whatever_the_project_asks_for(tmp_path, monkeypatch):
    monkeypatch.setattr(versions, "ROOT", tmp_path)
    (tmp_path / "requirements.txt").write_text("# why\nnumpy>=2.0\n\ntorch==2.13.0  # CPU\n-e .\n")
    (tmp_path / "requirements-diffusion.txt").write_text("dipy>=1.10,<2; python_version>='3.11'\n")
    project = '[project]\n[project.optional-dependencies]\ntest = ["pytest>=8.2.1", "ruff"]\n'
    (tmp_path / "pyproject.toml").write_text(project)
    assert [versions.lowest(each) for each in versions.requirements()] == [
        "numpy==2.0",
        "torch==2.13.0",
        "dipy==1.10,<2; python_version>='3.11'",
        "pytest==8.2.1",
        "ruff",
    ]
