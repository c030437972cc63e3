"""Tables of people and measures: read as text, whatever wrote them, and joined by subject."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from brainsex import tables


def write(folder: Path, content: str | bytes, name: str = "t.csv") -> Path:
    """Write a table and return its path."""
    content = content.encode() if isinstance(content, str) else content
    (folder / name).write_bytes(content)
    return folder / name


def test_subject_id():
    names = "012345 fa/012345.nii.gz 012345.nii 012345_FA_FA.nii sub-012345_FA.nii.gz".split()
    assert {*map(tables.subject_id, names), tables.subject_id(Path("012345.nii"))} == {"012345"}


def test_cells_stay_text_and_repeated_names_are_numbered(tmp_path):
    path = write(tmp_path, 'a, b ,a,c,a\n007," x, y ",,NA,1.50\n\n2,,,,\n')
    rows = tables.read_text_table(path)
    assert rows.columns.tolist() == ["a", "b", "a (2)", "c", "a (3)"]
    assert rows.iloc[0, [0, 1, 4]].tolist() == ["007", " x, y ", "1.50"]
    assert rows.iloc[0, [2, 3]].isna().all()
    assert rows.iloc[1].isna().all()  # a blank line is kept, so that lines can be counted
    assert rows.iloc[2, 0] == "2"
    assert rows.iloc[2, 1:].isna().all()


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("separator", [",", ";", "\t"])
@pytest.mark.parametrize("variant", ["BOM", "separator at the end", "quoted"])
def test_text_of_any_system_is_read(tmp_path, separator, end, variant):
    lines = [["Subject", "Gender", "A"], ["01", "F", "1.5"], ["02", "M", "3e5"]]
    if variant == "separator at the end":
        lines = [lines[0], *([*line, ""] for line in lines[1:])]
    elif variant == "quoted":
        lines = [[f'"{cell}"' for cell in line] for line in lines]
    text = end.join(separator.join(line) for line in lines) + end
    path = write(tmp_path, text.encode("utf-8-sig" if variant == "BOM" else "utf-8"))
    assert tables.read_text_table(path).to_dict("list") == {
        "Subject": ["01", "02"],
        "Gender": ["F", "M"],
        "A": ["1.5", "3e5"],
    }


def test_semicolons_go_with_decimal_commas(tmp_path):
    cells = "1,5 0,25 2 ,5 +2,0 -1,5e+06 a,b".split()
    path = write(tmp_path, "Subject;A\n" + "".join(f"1;{cell}\n" for cell in cells))
    values = "1.5 0.25 2 .5 +2.0 -1.5e+06 a,b".split()
    assert tables.read_text_table(path)["A"].tolist() == values


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"", "no header"),
        (b"a" + b"," * 60_000, "over 50000 columns"),
        (b'a,b\n1,F\n2,"M\n', "EOF inside string"),
        (b"a,b\n\xff\xfe,F\n", "can't decode"),
        (b"a,b\n1,F\n2,M,3\n", "Expected 2 fields in line 3, saw 3"),
        (b"a,a,a (2)\n1,2,3\n", "Duplicate names"),
    ],
)
def test_what_is_no_table_is_refused(tmp_path, content, problem):
    with pytest.raises(ValueError, match=rf"t\.csv: expected a CSV table.*{problem}.*export it"):
        tables.read_text_table(write(tmp_path, content))


def test_a_table_that_is_absent_or_too_large_is_named(tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match=r"no such table.*DATA_ACCESS\.md"):
        tables.read_text_table(tmp_path)
    monkeypatch.setattr(tables, "MAX_TABLE_BYTES", 10)
    assert len(tables.read_text_table(write(tmp_path, "a,b\n1,2\n"))) == 1
    with pytest.raises(ValueError, match="or 10 bytes"):
        tables.read_text_table(write(tmp_path, "a,b\n1,2\n3,4\n"))


def test_an_output_table_has_numbers_but_ids_as_text(tmp_path):
    path = write(tmp_path, "Subject,group,fold,auc,sex\n007,08,1,0.5,F\n8,,2,,M\n")
    rows = tables.read_output_table(path, "Subject", "fold")
    assert rows["Subject"].tolist() == ["007", "8"]
    assert rows["group"].tolist()[0] == "08"
    assert rows["fold"].tolist() == [1, 2]
    assert rows["auc"].tolist()[0] == 0.5
    assert rows["sex"].tolist() == ["F", "M"]
    with pytest.raises(ValueError, match=r"t\.csv: expected a column key, found none"):
        tables.read_output_table(path, "fold", "key")


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["1", None, "3"], r"t\.csv: line 3: expected Subject of 1 to 200 .*found ''$"),
        (["1", "2", "1 "], "line 4: .*in no more than one row, found '1'"),
        (["1", "../../x"], r"line 3: .*found '\.\./\.\./x'"),
        (["..\\x", "2"], "line 2: expected"),
        (["1", "x" * 201], "line 3: expected"),
    ],
)
def test_what_is_no_id_is_refused(tmp_path, names, message):
    column = pd.Series(names, name="Subject", dtype=str)
    with pytest.raises(ValueError, match=message):
        tables.check_subject_ids(tmp_path / "t.csv", column)


def test_the_table_of_people_has_the_project_s_or_hcp_s_or_bids_s_name(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"found none.*DATA_ACCESS\.md"):
        tables.find_people(tmp_path)
    (tmp_path / "unrestricted_hcp_freesurfer.csv").touch()
    (tmp_path / "participants.tsv").touch()
    assert tables.find_people(tmp_path).name == "participants.tsv"
    (tmp_path / "unrestricted_me_7_7_2024.csv").touch()
    assert tables.find_people(tmp_path).name == "unrestricted_me_7_7_2024.csv"
    (tmp_path / "unrestricted_you.csv").touch()
    with pytest.raises(FileNotFoundError, match=r"found \['unrestricted_me.*you\.csv'\]"):
        tables.find_people(tmp_path)
    (tmp_path / "unrestricted_behavioral.csv").touch()
    assert tables.find_people(tmp_path).name == "unrestricted_behavioral.csv"


def test_people_keep_leading_zeros_and_hcp_s_columns(tmp_path):
    path = write(
        tmp_path,
        "\ufeffSubject,Release,Acquisition,Gender,Age,QC_Issue\n"
        "012345,S900,Q01,M,26-30,\n 900007 ,S900,Q01,F,36+,A\n,S1200,,F,,\n",
    )
    people = tables.read_people(path)
    assert people.index.tolist() == ["012345", "900007"]
    assert people.columns.tolist() == ["Gender", "age", "qc_issue"]
    assert people["Gender"].tolist() == ["M", "F"]
    assert people["age"].tolist() == ["26-30", "36+"]
    assert people["qc_issue"].tolist()[1] == "A"


def test_people_of_bids_in_any_case(tmp_path):
    header, name = "Participant_ID\tGENDER\tage\n", "participants.tsv"
    path = write(tmp_path, header + "sub-01\tFemale\t40\nsub-2\tm\t41\n3\tother\t9\n", name)
    assert tables.read_people(path).to_dict("index") == {
        "01": {"Gender": "F", "age": "40"},
        "2": {"Gender": "M", "age": "41"},
        "3": {"Gender": "other", "age": "9"},
    }


@pytest.mark.parametrize("restricted", ["restricted.csv", "RESTRICTED_me_7_7_2024.csv"])
@pytest.mark.parametrize("spelling", ["FS_InterCranial_Vol", "FS_IntraCranial_Vol"])
def test_people_are_joined_with_the_tables_beside(tmp_path, spelling, restricted):
    rows = "000001,F,22-25\n000002,M,26-30\n000003,M,31-35\n"
    path = write(tmp_path, "Subject,Gender,Age\n" + rows, "unrestricted_behavioral.csv")
    freesurfer = "000003,S900,M,1650250.5,9\n000001,S900,F,1400000,9\n999999,S900,F,1,9\n"
    header = f"Subject,Release,Gender,{spelling},FS_Mask_Vol\n"
    write(tmp_path, header + freesurfer, "unrestricted_hcp_freesurfer.csv")
    rows = "000002,29,0052_81,5\n000001,24,0052_82,6\n"
    write(tmp_path, "Subject,Age_in_Yrs,Family_ID,Mother_ID\n" + rows, restricted)
    people = tables.read_people(path)
    assert people.index.tolist() == ["000001", "000002", "000003"]
    assert people["Gender"].tolist() == ["F", "M", "M"]
    np.testing.assert_array_equal(people["intracranial_volume_ml"], [1400, np.nan, 1650.2505])
    assert people["group"].tolist()[:2] == ["0052_82", "0052_81"]
    assert people["age"].tolist() == ["24", "29", "31-35"]  # the band where years are unknown
    assert pd.isna(people.at["000003", "group"])


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"t.csv": "Subject,Hand\n1,F\n"}, r"t\.csv: expected one column Gender, found Subject, H"),
        ({"t.csv": "x" * 5000}, r"one column Subject, found x{100};"),
        ({"t.csv": "Subject,Gender\n1,F\n2,M\n1 ,M\n"}, r"t\.csv: line 4: .*one row, found '1'"),
        ({"unrestricted_hcp_freesurfer.csv": "Subject,FS_IntraCranial_Vol\n1,large\n"}, "'large'"),
        ({"unrestricted_hcp_freesurfer.csv": "A\n1\n"}, r"\.csv: expected one column Subject"),
        ({"RESTRICTED_a.csv": "", "RESTRICTED_b.csv": ""}, "one restricted table, found"),
    ],
)
def test_bad_tables_of_people_are_refused(tmp_path, files, message):
    for name, content in ({"t.csv": "Subject,Gender\n1,F\n"} | files).items():
        write(tmp_path, content, name)
    with pytest.raises(ValueError, match=message):
        tables.read_people(tmp_path / "t.csv")


def test_a_subject_without_a_family_is_one_of_its_own():
    families = pd.Series(["a", None, "a", None], ["1", "2", "3", "4"], dtype=str)
    groups = tables.fill_missing_families(families)
    assert groups[0] == groups[2] == "a"
    assert len({groups[0], groups[1], groups[3]}) == 3
    assert tables.fill_missing_families(families.where(families.isna())) is None
    assert tables.fill_missing_families(pd.Series(dtype=str)) is None


def test_families_are_in_the_subjects_order(tmp_path):
    assert tables.read_families(tmp_path, np.array(["1"])) is None
    write(tmp_path, "Subject,Family_ID\n2,b\n1,a\n3,\n", "restricted.csv")
    groups = tables.read_families(tmp_path, np.array(["3", "1", "2", "4"]))
    assert groups[1:3].tolist() == ["a", "b"]
    assert len(set(groups)) == 4
    assert tables.read_families(tmp_path, np.array(["9"])) is None
