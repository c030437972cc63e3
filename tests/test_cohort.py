"""The one loader, and HCP's tables behind it: what belongs together loads, nothing else does."""

import json
import mmap

import numpy as np
import pandas as pd
import pytest

from brainsex import cohort, tables

AFFINE = np.array([[3.0, 0, 0, -21], [0, 4, 0, -30], [0, 0, 5, -17], [0, 0, 0, 1]])
SHAPE = (5, 7, 6)


def folder(path, count=6, **columns):
    """What `convert` leaves: volume n is filled with n / 10; women and men in turn."""
    path.mkdir(parents=True, exist_ok=True)
    tensors = np.zeros((count, *SHAPE), np.float32) + np.arange(count)[:, None, None, None] / 10
    labels = np.arange(count) % 2
    np.save(path / "tensors.npy", tensors.astype(np.float32))
    np.save(path / "labels.npy", labels)
    subjects = [f"{n:06d}" for n in range(count)]
    table = pd.DataFrame({"Subject": subjects, "label": labels, **columns})
    table.to_csv(path / "subjects.csv", index=False)
    grid = {"shape": SHAPE, "affine": AFFINE.tolist(), "key": "k"}
    (path / "grid.json").write_text(json.dumps(grid))
    return path


# ----------------------------------------------------------------------------------------- cohort


def test_load_opens_what_convert_wrote(tmp_path):
    families = ["07", "07", "08", "09", "09", "10"]
    found = cohort.load(folder(tmp_path / "hcp", group=families, brain_volume_ml=1234.5))
    assert len(found) == 6
    assert found.name == "hcp"
    assert not found.synthetic
    assert found.volumes.shape == (6, *SHAPE)
    assert found.volumes.dtype == np.float32
    assert found.volumes[4, 1, 2, 3] == np.float32(0.4)
    assert found.sex.tolist() == [0, 1, 0, 1, 0, 1]
    assert found.sex.dtype == np.int64
    assert found.subjects.tolist() == ["000000", "000001", "000002", "000003", "000004", "000005"]
    assert found.groups.tolist() == families
    np.testing.assert_array_equal(found.affine, AFFINE)
    assert found.table["brain_volume_ml"].tolist() == [1234.5] * 6


def test_load_maps_the_volumes_read_only(tmp_path):
    found = cohort.load(folder(tmp_path / "c"))
    assert isinstance(found.volumes, np.memmap)
    with pytest.raises(ValueError, match="read-only"):
        found.volumes[0] = 1
    found.sex[0] = 1  # an ordinary array
    assert cohort.load(tmp_path / "c").sex[0] == 0


def test_load_takes_two_arrays_from_elsewhere(tmp_path):
    folder(tmp_path / "c", 12)
    (tmp_path / "c" / "subjects.csv").unlink()
    (tmp_path / "c" / "grid.json").unlink()
    np.save(tmp_path / "c" / "labels.npy", np.arange(12) % 2 == 1)  # of another type
    found = cohort.load(tmp_path / "c")
    assert found.affine is None
    assert found.groups is None
    assert found.sex.tolist() == [0, 1] * 6
    assert found.subjects.tolist() == [f"{n:02d}" for n in range(12)]
    given = cohort.load(tmp_path / "c", affine=AFFINE.tolist())
    np.testing.assert_array_equal(given.affine, AFFINE)
    with pytest.raises(ValueError, match=r"affine \(4, 4\), found \(3, 3\)"):
        cohort.load(tmp_path / "c", affine=AFFINE[:3, :3])


def test_who_has_no_known_family_is_one_alone(tmp_path):
    found = cohort.load(folder(tmp_path / "c", 5, group=["7", None, "8", None, "7"]))
    first, second, third, fourth, fifth = found.groups
    assert (first, third, fifth) == ("7", "8", "7")
    assert len({first, second, third, fourth}) == 4
    unknown = cohort.load(folder(tmp_path / "d", 3, group=[None, None, None]))
    assert unknown.groups is None


@pytest.mark.parametrize(
    ("name", "expected"), [("hcp", "hcp (synthetic)"), ("synthetic-2", "synthetic-2")]
)
def test_the_name_says_what_is_synthetic(tmp_path, name, expected):
    (folder(tmp_path / name) / "SYNTHETIC").touch()
    found = cohort.load(tmp_path / name)
    assert found.synthetic
    assert found.name == expected


@pytest.mark.parametrize("name", ["tensors.npy", "labels.npy"])
def test_load_says_what_to_run_when_an_array_is_absent(tmp_path, name):
    (folder(tmp_path / "c") / name).unlink()
    with pytest.raises(FileNotFoundError, match=rf"{name}.*notebook 02.*DATA_ACCESS\.md"):
        cohort.load(tmp_path / "c")


class Hostile:
    """Unpickling it would say so."""

    def __reduce__(self):
        return print, ("executed",)


def spoil(path, kind):
    """Make a cohort's files disagree."""
    tensors, labels = path / "tensors.npy", path / "labels.npy"
    if kind == "count":
        np.save(labels, np.arange(5) % 2)
    elif kind == "dimensions":
        np.save(tensors, np.zeros((6, 1, *SHAPE), np.float32))
    elif kind == "third sex":
        np.save(labels, np.arange(6) % 3)
    elif kind == "not a number":
        np.save(labels, np.full(6, np.nan))
    elif kind == "other labels":
        np.save(labels, 1 - np.arange(6) % 2)
    elif kind == "fewer rows":
        pd.read_csv(path / "subjects.csv")[:5].to_csv(path / "subjects.csv", index=False)
    elif kind == "other table":
        pd.DataFrame({"Subject": range(6)}).to_csv(path / "subjects.csv", index=False)
    elif kind == "no number":
        table = pd.read_csv(path / "subjects.csv").assign(brain_volume_ml=["1200", *"vwxyz"])
        table.to_csv(path / "subjects.csv", index=False)
    elif kind == "other grid":
        np.save(tensors, np.zeros((6, 7, 5, 6), np.float32))
    elif kind == "truncated":
        tensors.write_bytes(tensors.read_bytes()[:-100])
    elif kind == "empty":
        tensors.write_bytes(b"")
    elif kind == "text":
        tensors.write_text("Subject,Gender\n" * 20)
    elif kind == "archive":
        np.savez(tensors.open("wb"), np.zeros(6))
    elif kind == "pickle":
        np.save(labels, np.array([Hostile()] * 6, object), allow_pickle=True)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("count", r"found \(6, 5, 7, 6\) and \(5,\)"),
        ("dimensions", r"expected tensors \(N, X, Y, Z\)"),
        ("third sex", r"labels\.npy: expected 0 and 1, found \[0 1 2\]"),
        ("not a number", r"labels\.npy: expected 0 and 1"),
        ("other labels", r"subjects\.csv and labels\.npy disagree"),
        ("fewer rows", r"subjects\.csv and labels\.npy disagree"),
        ("other table", r"subjects\.csv: expected a column label, found none"),
        ("no number", r"subjects\.csv: brain_volume_ml is not numbers"),
        ("other grid", r"grid\.json and tensors\.npy disagree"),
        ("truncated", r"tensors\.npy: no whole NumPy array"),
        ("empty", r"tensors\.npy: no whole NumPy array"),
        ("text", r"tensors\.npy: no whole NumPy array"),
        ("archive", r"tensors\.npy: no whole NumPy array"),
        ("pickle", r"labels\.npy: no whole NumPy array"),
    ],
)
def test_load_refuses_what_does_not_belong_together(tmp_path, capsys, kind, message):
    spoil(folder(tmp_path / "c"), kind)
    with pytest.raises(ValueError, match=message):
        cohort.load(tmp_path / "c")
    assert "executed" not in capsys.readouterr().out


# ----------------------------------------------------------------------------------------- tables


def test_read_keeps_leading_zeros_and_hcp_s_columns(tmp_path):
    (tmp_path / "t.csv").write_text(
        "\ufeffSubject,Release,Acquisition,Gender,Age,QC_Issue\n"
        "012345,S900,Q01,M,26-30,\n 900007 ,S900,Q01,F,36+,A\n,S1200,,F,,\n",
        encoding="utf-8",
    )
    rows = tables.read(tmp_path / "t.csv")
    assert rows.index.tolist() == ["012345", "900007"]
    assert rows.columns.tolist() == ["Gender", "age", "qc_issue"]
    assert rows["Gender"].tolist() == ["M", "F"]
    assert rows["age"].tolist() == ["26-30", "36+"]
    assert rows["qc_issue"].tolist()[1] == "A"


def test_read_is_not_misled_by_a_comma_at_the_end_of_each_row(tmp_path):
    (tmp_path / "t.csv").write_text("Subject,Gender,Age\n000001,F,22-25,\n000002,M,36+,\n")
    rows = tables.read(tmp_path / "t.csv")
    assert rows.to_dict("index") == {
        "000001": {"Gender": "F", "age": "22-25"},
        "000002": {"Gender": "M", "age": "36+"},
    }


@pytest.mark.parametrize("restricted", ["restricted.csv", "RESTRICTED_me_7_7_2024.csv"])
@pytest.mark.parametrize("spelling", ["FS_InterCranial_Vol", "FS_IntraCranial_Vol"])
def test_read_joins_the_tables_beside(tmp_path, spelling, restricted):
    (tmp_path / "unrestricted_behavioral.csv").write_text(
        "Subject,Gender,Age\n000001,F,22-25\n000002,M,26-30\n000003,M,31-35\n"
    )
    (tmp_path / "unrestricted_hcp_freesurfer.csv").write_text(
        f"Subject,Release,Gender,{spelling},FS_Mask_Vol\n"
        "000003,S900,M,1650250.5,9\n000001,S900,F,1400000,9\n999999,S900,F,1,9\n"
    )
    (tmp_path / restricted).write_text(
        "Subject,Age_in_Yrs,Family_ID,Mother_ID\n000002,29,0052_81,5\n000001,24,0052_82,6\n"
    )
    rows = tables.read(tables.find(tmp_path))
    assert rows.index.tolist() == ["000001", "000002", "000003"]
    assert rows["Gender"].tolist() == ["F", "M", "M"]
    np.testing.assert_array_equal(rows["intracranial_volume_ml"], [1400, np.nan, 1650.2505])
    assert rows["group"].tolist()[:2] == ["0052_82", "0052_81"]
    assert rows["age"].tolist() == ["24", "29", "31-35"]  # the band where years are unknown
    assert pd.isna(rows.at["000003", "group"])


def test_two_restricted_tables_are_refused(tmp_path):
    table = tmp_path / "unrestricted_behavioral.csv"
    table.write_text("Subject,Gender\n000001,F\n")
    for name in ("RESTRICTED_a.csv", "RESTRICTED_b.csv"):
        (tmp_path / name).write_text("Subject,Family_ID\n000001,9\n")
    with pytest.raises(ValueError, match="several restricted tables"):
        tables.read(table)


def test_find_knows_the_project_s_name_and_hcp_s(tmp_path):
    (tmp_path / "unrestricted_hcp_freesurfer.csv").touch()
    (tmp_path / "unrestricted_me_7_7_2024.csv").touch()
    assert tables.find(tmp_path).name == "unrestricted_me_7_7_2024.csv"
    (tmp_path / "unrestricted_you.csv").touch()
    with pytest.raises(FileNotFoundError, match=r"found \['unrestricted_me.*you\.csv'\]"):
        tables.find(tmp_path)
    (tmp_path / "unrestricted_behavioral.csv").touch()
    assert tables.find(tmp_path).name == "unrestricted_behavioral.csv"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"Subject,Hand\n1,F\n", "expected a column Gender, found Subject, Hand"),
        (b"ID|Gender\n1|F\n", r"expected a column Subject and Gender, found ID\|Gender"),
        (b"", "not a CSV table"),
        (b"\0" * 5000, "not a CSV table .* NUL bytes"),
        (b"x" * 5000, "expected a column Subject and Gender, found x{100}\\.$"),
        (b'Subject,Gender\n1,F\n2,"M\n', "not a CSV table"),
        (b"Subject,Gender\n\xff\xfe,F\n", "not a CSV table"),
        (b"Subject,Gender\n1,F\n2,M\n1 ,M\n", "more than one row: 1"),
    ],
)
def test_read_refuses(tmp_path, content, message):
    (tmp_path / "t.csv").write_bytes(content)
    with pytest.raises(ValueError, match=message) as caught:
        tables.read(tmp_path / "t.csv")
    assert "t.csv" in str(caught.value)


def test_read_refuses_a_volume_that_is_no_number(tmp_path):
    (tmp_path / "t.csv").write_text("Subject,Gender\n1,F\n")
    beside = tmp_path / "unrestricted_hcp_freesurfer.csv"
    beside.write_text("Subject,FS_IntraCranial_Vol\n1,large\n")
    with pytest.raises(ValueError, match=r"freesurfer\.csv: .*'large'"):
        tables.read(tmp_path / "t.csv")
    beside.write_text("Gender,FS_IntraCranial_Vol\nF,1\n")
    with pytest.raises(ValueError, match=r"freesurfer\.csv: expected a column Subject"):
        tables.read(tmp_path / "t.csv")


def test_absent_table(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no such table.*DATA_ACCESS\.md"):
        tables.read(tmp_path / "t.csv")
    with pytest.raises(FileNotFoundError, match=r"found none.*DATA_ACCESS\.md"):
        tables.find(tmp_path)


def test_a_subset_is_those_subjects_read_when_asked_for(tmp_path):
    volumes = np.arange(5 * 8, dtype=np.float32).reshape(5, 2, 2, 2)
    np.save(tmp_path / "tensors.npy", volumes)
    np.save(tmp_path / "labels.npy", np.array([0, 1, 1, 0, 1]))
    table = pd.DataFrame({"Subject": list("abcde"), "label": [0, 1, 1, 0, 1]})
    table.assign(group=["f", "g", None, "f", "g"]).to_csv(tmp_path / "subjects.csv", index=False)
    data = cohort.load(tmp_path)
    some = cohort.subset(data, np.array([4, 0, 2]))
    assert len(some) == 3
    assert some.subjects.tolist() == ["e", "a", "c"]
    assert some.sex.tolist() == [1, 0, 1]
    assert some.groups.tolist() == ["g", "f", "subject c"]
    assert some.table["Subject"].tolist() == ["e", "a", "c"]
    np.testing.assert_array_equal(some.volumes[np.arange(3)], volumes[[4, 0, 2]])
    np.testing.assert_array_equal(np.stack(list(some.volumes)), volumes[[4, 0, 2]])
    assert data.subjects.tolist() == list("abcde")


class Advised(mmap.mmap):
    """A mapped file that notes what the kernel is told to read."""

    def madvise(self, option, start, length):
        assert option == mmap.MADV_WILLNEED
        self.told.append((start, start + length))


@pytest.mark.skipif(not hasattr(mmap, "MADV_WILLNEED"), reason="the system takes no advice")
def test_the_kernel_is_told_which_volumes_are_read_next(tmp_path):
    """Every byte of them, and less than two pages more."""
    values = np.arange(8 * 3000, dtype=np.float32).reshape(8, 10, 15, 20)
    np.save(tmp_path / "v.npy", values)
    with (tmp_path / "v.npy").open("rb") as file:
        mapped = Advised(file.fileno(), 0, access=mmap.ACCESS_READ)
    mapped.told = []
    volumes = np.ndarray(values.shape, np.float32, mapped, 128)  # after the header
    rows = cohort.Rows(volumes, np.array([7, 1, 4]))
    np.testing.assert_array_equal(rows[np.array([2, 0])], values[[4, 7]])
    np.testing.assert_array_equal(rows[1], values[1])
    assert len(mapped.told) == 3
    for row, (start, stop) in zip((4, 7, 1), mapped.told):
        begin, end = 128 + 12000 * row, 128 + 12000 * (row + 1)
        assert start <= begin < start + mmap.PAGESIZE
        assert end <= stop < end + mmap.PAGESIZE
        assert start % mmap.PAGESIZE == 0
