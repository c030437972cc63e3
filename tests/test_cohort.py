"""The one loader: what belongs together loads, nothing else does, and nothing in it is executed."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from brainsex import cohort
from tests.conftest import write_cohort

AFFINE = np.array([[3.0, 0, 0, -21], [0, 4, 0, -30], [0, 0, 5, -17], [0, 0, 0, 1]])
SHAPE = (5, 7, 6)
GRID = {"shape": SHAPE, "affine": AFFINE.tolist()}


def write_folder(path: Path, count: int = 6, **columns: object) -> Path:
    """Write what `convert` leaves: volume n is filled with n / 10; women and men in turn."""
    tensors = np.zeros((count, *SHAPE)) + np.arange(count)[:, None, None, None] / 10
    return write_cohort(path, tensors, np.arange(count) % 2, grid=GRID | {"inputs": "a"}, **columns)


def test_load_opens_what_convert_wrote(tmp_path):
    families = ["07", "07", "08", "09", "09", "10"]
    data = cohort.load(write_folder(tmp_path / "hcp", group=families, brain_volume_ml=1234.5))
    assert len(data) == 6
    assert data.name == "hcp"
    assert not data.synthetic
    assert isinstance(data.volumes, np.memmap)
    assert not data.volumes.flags.writeable
    assert data.volumes[4, 1, 2, 3] == np.float32(0.4)
    assert data.sex.tolist() == [0, 1, 0, 1, 0, 1]
    assert data.sex.dtype == np.int64
    assert data.subjects.tolist() == ["000000", "000001", "000002", "000003", "000004", "000005"]
    assert data.groups.tolist() == families
    np.testing.assert_array_equal(data.affine, AFFINE)
    assert data.table["brain_volume_ml"].tolist() == [1234.5] * 6
    assert data.modality == "fa"


def test_load_takes_two_arrays_from_elsewhere(tmp_path):
    write_folder(tmp_path / "c", 12)
    (tmp_path / "c" / "subjects.csv").unlink()
    (tmp_path / "c" / "grid.json").unlink()
    np.save(tmp_path / "c" / "labels.npy", np.arange(12) % 2 == 1)  # of another type
    data = cohort.load(tmp_path / "c")
    assert data.affine is None
    assert data.groups is None
    assert data.sex.tolist() == [0, 1] * 6
    assert data.subjects.tolist() == [f"{n:02d}" for n in range(12)]
    data = cohort.load(tmp_path / "c", affine=AFFINE.tolist())
    np.testing.assert_array_equal(data.affine, AFFINE)
    for affine in (AFFINE[:3, :3], AFFINE * np.nan):
        with pytest.raises(ValueError, match=r"expected shape, modality and affine"):
            cohort.load(tmp_path / "c", affine=affine)
    grid = {"shape": SHAPE, "modality": "t1"}
    (tmp_path / "c" / "grid.json").write_text(json.dumps(grid))
    data = cohort.load(tmp_path / "c", affine=AFFINE)
    assert (data.modality, data.affine) == ("t1", None)


def test_the_name_says_what_is_synthetic(tmp_path):
    for name, expected in (("hcp", "hcp (synthetic)"), ("synthetic-2", "synthetic-2")):
        (write_folder(tmp_path / name) / "SYNTHETIC").touch()
        data = cohort.load(tmp_path / name)
        assert (data.name, data.synthetic) == (expected, True)


class Bomb:
    """Unpickling it would print something."""

    def __reduce__(self) -> tuple:
        return print, ("executed",)


ROWS = "Subject,label\n" + "".join(f"{n},{n % 2}\n" for n in range(6))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("labels.npy", np.arange(5) % 2, r"found \(6, 5, 7, 6\) of float32 and \[0, 1, 0, 1, 0\]"),
        ("labels.npy", np.arange(6) % 3, r"labels \(N,\) 0 and 1, .* \[0, 1, 2"),
        ("labels.npy", np.full(6, np.nan), r"\[nan"),
        ("labels.npy", np.full(6, "F"), r"\['F'"),
        ("labels.npy", 1 - np.arange(6) % 2, r"subjects\.csv and labels\.npy disagree"),
        ("labels.npy", np.array([Bomb()] * 6, object), r"labels\.npy: expected a whole NumPy arr"),
        ("tensors.npy", np.zeros((6, 1, *SHAPE)), r"expected tensors \(N, X, Y, Z\)"),
        ("tensors.npy", np.zeros((6, *SHAPE), int), r"expected tensors .* of floats"),
        ("tensors.npy", np.zeros((6, 7, 5, 6)), r"grid\.json and tensors\.npy disagree"),
        ("tensors.npy", lambda path: path.read_bytes()[:-100], r"tensors\.npy: expected a whole"),
        ("tensors.npy", b"", r"tensors\.npy: expected a whole NumPy array"),
        ("tensors.npy", b"Subject,Gender\n" * 20, r"tensors\.npy: expected a whole NumPy array"),
        ("subjects.csv", ROWS[:-4], r"subjects\.csv and labels\.npy disagree"),
        ("subjects.csv", "Subject\n1\n", r"subjects\.csv: expected a table of Subject and label"),
        ("subjects.csv", ROWS.replace("4,", "../4,"), r"subjects\.csv: line 6: expected Subject"),
        ("grid.json", "{", r"grid\.json: expected a JSON object"),
        ("grid.json", {}, r"grid\.json: expected shape, modality"),
        ("grid.json", GRID | {"shape": 5}, r"grid\.json: expected shape, modality"),
        ("grid.json", GRID | {"affine": [[1]]}, r"grid\.json: .*cannot reshape"),
    ],
)
def test_load_refuses_what_does_not_belong_together(tmp_path, capsys, name, content, message):
    path = write_folder(tmp_path / "c") / name
    if isinstance(content, np.ndarray):
        np.save(path, content, allow_pickle=True)
    elif isinstance(content, dict | str):
        path.write_text(content if isinstance(content, str) else json.dumps(content))
    else:
        path.write_bytes(content if isinstance(content, bytes) else content(path))
    with pytest.raises(ValueError, match=message):
        cohort.load(tmp_path / "c")
    assert "executed" not in capsys.readouterr().out


def test_rows_are_read_when_they_are_indexed(tmp_path):
    rows = cohort.VolumeRows(
        cohort.load(write_folder(tmp_path / "c", 5)).volumes, np.array([4, 0, 2])
    )
    assert (len(rows), rows.shape) == (3, (3, *SHAPE))
    expected = np.float32([0.4, 0, 0.2])
    np.testing.assert_array_equal(rows[np.arange(3)][:, 1, 2, 3], expected)
    np.testing.assert_array_equal(np.stack(list(rows))[:, 4, 6, 5], expected)


def test_the_digest_tells_cohorts_apart(tmp_path):
    data = cohort.load(write_folder(tmp_path / "c"))
    whole = cohort.digest(data)
    assert cohort.digest(cohort.load(tmp_path / "c")) == whole
    rows = cohort.VolumeRows(data.volumes, np.arange(6))
    assert cohort.digest(replace(data, volumes=rows)) == whole
    brighter, broken = np.array(data.volumes), np.array(data.volumes)
    brighter[4, 0, 0, 0] += 1e-3
    others = [
        {"subjects": data.subjects[::-1]},
        {"sex": 1 - data.sex},
        {"volumes": brighter},
        {"volumes": np.array(data.volumes).reshape(6, 7, 5, 6)},
    ]
    assert len({whole, *(cohort.digest(replace(data, **other)) for other in others)}) == 5
    broken[3] = np.nan
    with pytest.raises(ValueError, match=r"tensors\.npy is not finite for 000003"):
        cohort.digest(replace(data, volumes=broken))
