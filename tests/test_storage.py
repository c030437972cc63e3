"""Files are whole or absent, one run at a time writes in a folder, and each is on its record."""

import errno
import json
import platform
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from brainsex import storage


def start_python(code: str, *arguments: object) -> subprocess.Popen:
    """Start a Python process whose output is read line by line."""
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.Popen(
        command, cwd=Path(__file__).parents[1], stdout=subprocess.PIPE, text=True
    )


@pytest.mark.parametrize(
    ("error", "message"),
    [(RuntimeError("boom"), "boom"), (OSError(errno.ENOSPC, "No space left"), r"left.*t\.txt'")],
)
def test_what_fails_half_way_leaves_the_file_that_was_there(tmp_path, error, message):
    path = tmp_path / "new" / "t.txt"
    storage.write_text(path, "old ä")

    def write_and_fail() -> None:
        with storage.atomic_path(path) as partial:
            partial.write_text("half")
            raise error

    with pytest.raises(type(error), match=message):
        write_and_fail()
    assert path.read_text(encoding="utf-8") == "old ä"
    assert list(path.parent.iterdir()) == [path]


def test_the_last_of_two_writers_wins(tmp_path):
    path = tmp_path / "x[1].txt"
    with storage.atomic_path(path) as first, storage.atomic_path(path) as second:
        first.write_text("a")
        second.write_text("b")
    assert path.read_text() == "a"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("problem", "error", "message"),
    [
        (lambda path: [][1], ValueError, r"^{path}: expected an array, cannot read it \(list ind"),
        (lambda path: next(iter(())), ValueError, r"\(StopIteration\); download it again$"),
        (lambda path: float("a\nb" * 999), ValueError, r"^.{{20,500}}$"),
        (lambda path: storage.read_json(path), FileNotFoundError, "x'$"),
        (lambda path: sys.exit("over"), SystemExit, "over"),
    ],
)
def test_whatever_a_bad_file_raises_names_it(tmp_path, problem, error, message):
    path = tmp_path / "x"
    with pytest.raises(error, match=message.format(path=path)), storage.reading(path, "an array"):
        problem(path)


def test_an_error_that_names_the_file_already_passes(tmp_path):
    message, border = "t.zip/a: a mask", storage.reading("t.zip/a", "a volume")
    with pytest.raises(ValueError, match=f"^{message}$"), border:
        raise ValueError(message)


def test_damaged_json_is_named(tmp_path):
    path = tmp_path / "fold-1.json"
    path.write_text('{"a": "ä"}', encoding="utf-8")
    assert storage.read_json(path) == {"a": "ä"}
    for content in (b"{", b"[1]", b"\xff", b"[" * 100_000):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"fold-1\.json: expected a JSON object.*; make"):
            storage.read_json(path)


def test_a_second_run_in_a_folder_is_refused_and_a_third_after_it_is_not(tmp_path):
    code = "import sys, time\nfrom brainsex import storage\n"
    code += "with storage.folder_lock(sys.argv[1]): print('held', flush=True); time.sleep(60)"
    with start_python(code, tmp_path / "out") as holder:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(BlockingIOError, match="out: another run is writing here; wait"):
            storage.folder_lock(tmp_path / "out").__enter__()
        holder.kill()  # which frees the lock
    with storage.folder_lock(tmp_path / "out"):
        (tmp_path / "file").touch()
    with pytest.raises(OSError, match=r"(?i)file.*exists|not a directory"):
        storage.folder_lock(tmp_path / "file").__enter__()


def test_run_json_has_the_settings_and_versions_of_each_command(tmp_path):
    storage.start_run(tmp_path, "train", {"seed": 7, "shape": (2, 3), "out": tmp_path})
    storage.start_run(tmp_path, "extract", {"member": "*_FA.nii"})
    record = json.loads((tmp_path / "run.json").read_text())
    assert set(record) == {"train", "extract"}
    environment = record["train"].pop("made_with")
    assert record["train"] == {"seed": 7, "shape": [2, 3], "out": str(tmp_path)}
    assert environment["python"] == platform.python_version()
    assert environment["numpy"] == np.__version__


def test_other_settings_are_refused_unless_all_is_made_anew(tmp_path):
    storage.start_run(tmp_path, "train", {"seed": 1, "folds": 2})
    for name in ("fold-0.pt", "fold-1.pt", "mine.pt"):
        (tmp_path / name).touch()
    storage.start_run(tmp_path, "train", {"folds": 2, "seed": 1}, results=["fold-*.pt"])
    assert len(list(tmp_path.glob("*.pt"))) == 3
    message = r"with seed = 2, found those with 1; .* --overwrite"
    with pytest.raises(ValueError, match=message):
        storage.start_run(tmp_path, "train", {"seed": 2, "folds": 2})
    storage.start_run(tmp_path, "train", {"seed": 2}, overwrite=True, results=["fold-*.pt"])
    assert list(tmp_path.glob("*.pt")) == [tmp_path / "mine.pt"]
    storage.start_run(tmp_path, "train", {"seed": 2})


def test_other_versions_go_on_and_those_of_the_first_results_are_on_record(tmp_path, monkeypatch):
    before = storage._environment()
    for version, options in ((before["torch"], {}), ("99", {}), ("99", {"overwrite": True})):
        monkeypatch.setattr(
            storage, "_environment", lambda torch=version: before | {"torch": torch}
        )
        storage.start_run(tmp_path, "train", {"seed": 1}, **options)
        expected = "99" if options else before["torch"]
        assert storage.read_json(tmp_path / "run.json")["train"]["made_with"]["torch"] == expected
