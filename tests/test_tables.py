"""Tables of people and measures: read as text, whatever wrote them, and joined by subject."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from brainsex import layouts, participants, tables


def write(folder: Path, content: str | bytes, name: str = "t.csv") -> Path:
    """Write a table and return its path."""
    content = content.encode() if isinstance(content, str) else content
    (folder / name).write_bytes(content)
    return folder / name


@pytest.mark.parametrize(
    ("text", "subject"),
    [
        *(("012345", "012345"), (" sub-012345 ", "012345"), ("sub-012345/", "012345")),
        *(("900106.0", "900106"), ("9.00106E+05", "900106"), (900106, "900106"), ("0012.0", "12")),
        *(("1E5", "1E5"), ("900106.5", "900106.5"), ("SUB_con-01", "con-01"), ("sub-", "sub-")),
    ],
)
def test_subject_id_is_what_was_meant(text, subject):
    assert tables.subject_id(text) == subject


def test_ids_are_spelt_as_others_have_them():
    others = ["007", "CC01", "900106", "0", "HC_07", "A1-23"]
    ids = ["7", "sub-cc01", "9.00106e+05", "000", "hc 7", "a1_23", "sub-new"]
    assert participants.spell_ids(ids, others) == [*others, "new"]


def test_cells_stay_text_and_repeated_names_are_numbered(tmp_path):
    rows = tables.read_text_table(write(tmp_path, 'a, b ,a,c,a\n007," x, y ",,NA,1.50\n\n2,,,,\n'))
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


def test_bytes_of_no_encoding_hide_no_table(tmp_path):
    write(tmp_path, b"Subject,Family_ID,Comment\n1,a,\x81\n", "restricted.csv")
    path = write(tmp_path, "Subject,Gender\n1,F\n")
    assert participants.read_people(path)["group"].tolist() == ["a"]


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"", "No columns"),
        (b'a,b\n1,F\n2,"M\n', "EOF inside string"),
        (b"a,b\n1,F\n2,M,3\n", "Expected 2 fields in line 3, saw 3"),
        (b"a,a,a (2)\n1,2,3\n", "Duplicate names"),
    ],
)
def test_what_is_no_table_is_refused(tmp_path, content, problem):
    with pytest.raises(ValueError, match=rf"t\.csv: expected a CSV table.*{problem}.*export it"):
        tables.read_text_table(write(tmp_path, content))


def test_a_table_that_is_absent_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"t\.csv"):
        tables.read_text_table(tmp_path / "t.csv")


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["1", None, "3"], r"t\.csv: line 3: expected Subject of 1 to 200 .*found '';"),
        (["1", "2", "01 "], "line 4: .*in one row, found '01'; .*--session"),
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
    with pytest.raises(FileNotFoundError, match=r"found \[\].*DATA_ACCESS\.md"):
        participants.find_people(tmp_path)
    (tmp_path / "unrestricted_hcp_freesurfer.csv").write_text("Subject")
    (tmp_path / "participants.tsv").write_text("Subject,Gender")
    assert participants.find_people(tmp_path)[0].name == "participants.tsv"
    (tmp_path / "unrestricted_me_7_7_2024.csv").write_text("Subject,Gender")
    assert participants.find_people(tmp_path)[0].name == "unrestricted_me_7_7_2024.csv"
    (tmp_path / "unrestricted_you.csv").write_text("Subject,Gender,Age")
    with pytest.raises(FileNotFoundError, match=r"found \['\S*unrestricted_me.*you\.csv'\]"):
        participants.find_people(tmp_path)


def test_people_keep_leading_zeros_and_hcp_s_columns(tmp_path):
    path = write(
        tmp_path,
        "\ufeffSubject,Release,Acquisition,Gender,Age,QC_Issue\n"
        "012345,S900,Q01,M,26-30,\n 900007 ,S900,Q01,F,36+,A\n,S1200,,F,,\n",
    )
    people = participants.read_people(path)
    assert people.index.tolist() == ["012345", "900007"]
    assert people.columns.tolist() == ["Gender", "age", "qc_issue"]
    assert people["Gender"].tolist() == ["M", "F"]
    assert people["age"].tolist() == ["26-30", "36+"]
    assert people["qc_issue"].tolist()[1] == "A"


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
    people = participants.read_people(path)
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
        (
            {"t.csv": "Subject,sex,sex\n1,F,1\n"},
            r"column Gender, found sex, sex \(2\); name it",
        ),
        ({"RESTRICTED_a.csv": "Family_ID\n1\n"}, r"_a\.csv: expected one column Subject"),
        (
            dict.fromkeys(("RESTRICTED_a.csv", "b.csv"), "Subject,Family_ID\n1,x\n"),
            r"one table with Family_ID, found \['RESTRICTED_a.csv', 'b.csv'\]: keep one",
        ),
    ],
)
def test_bad_tables_of_people_are_refused(tmp_path, files, message):
    for name, content in ({"t.csv": "Subject,Gender\n1,F\n"} | files).items():
        write(tmp_path, content, name)
    with pytest.raises(ValueError, match=message):
        participants.read_people(tmp_path / "t.csv")


def test_a_subject_without_a_family_is_one_of_its_own():
    families = pd.Series(["a", None, "a", None], ["1", "2", "3", "4"], dtype=str)
    groups = tables.fill_missing_families(families)
    assert groups[0] == groups[2] == "a"
    assert len({groups[0], groups[1], groups[3]}) == 3
    assert tables.fill_missing_families(families.where(families.isna())) is None
    assert tables.fill_missing_families(pd.Series(dtype=str)) is None


def test_families_are_joined_in_any_spelling_of_ids_or_missed_loudly(tmp_path, capsys):
    write(tmp_path, "Subject,Family_ID\n2.0,b\n1.0,a\n9.0,\n", "restricted.csv")
    people = participants.join_companions(pd.DataFrame(index=["001", "002"]), tmp_path)
    assert people["group"].tolist() == ["a", "b"]
    assert "WARNING" not in capsys.readouterr().out
    people = participants.join_companions(pd.DataFrame(index=["5", "6", "1"]), tmp_path)
    assert people["group"].tolist()[2] == "a"
    assert people["group"].isna().tolist() == [True, True, False]
    message = "WARNING: restricted.csv has Family_ID of 1 of 3: compare IDs"
    assert message in capsys.readouterr().out


EXPORTS = [  # a table of people as people have it, and how it is read
    ("Subject,Gender,Age\n1.0,M,26-30\n2.00000E+00,F,36+\n", "utf-8", {}),
    ("participant_id\tsex\tage\nsub-1\t1\t26-30\nsub-2\t2\t36+\n", "utf-8", {}),
    ("Participant_ID\tGENDER\tAGE\nsub-1\tm\t26-30\n2\tFemale\t36+\n", "utf-8", {}),
    ("ID;M/F;Größe;Age\n1;M;170;26-30\n2;F;160;36+\n", "cp1252", {}),
    ("sep=;\r\nSubject;Gender;Age\r\n1;M;26-30\r\n2;F;36+\r\n", "utf-16", {}),
    ("eid,31-0.0,21003-2.0\n1,1,26-30\n2,0,36+\n", "utf-8-sig", {}),
    ("nr,geslacht,age\n1,man,26-30\n2,woman,36+\n", "utf-8", {"subject": "nr", "sex": "geslacht"}),
    (
        "participant_id\tsession_id\tsex\tage\nsub-1\tses-a\tM\t26-30\n"
        "sub-1\tses-b\tM\t27\nsub-2\tses-a\tF\t36+\n",
        "utf-8",
        {"session": "a"},
    ),
    ("Subject,Gender,Age\n1,M,26-30\n2,F,36+\n2,F,36+\n", "utf-8", {}),
    ("MRN\tsex\tage\n1.00\t1.00\t26-30\n2.00\t2.00\t36+\n", "utf-16", {}),
    ("id,female,age\n1,0,26-30\n2,1,36+\n", "utf-8", {}),
    ("id\tsex (0=m,1=f)\tage\n1\t0\t26-30\n2\t1\t36+\n", "utf-8", {}),
    ("IXI_ID,SEX_ID (1=f; 2=m),age\n1,2,26-30\n2,1,36+\n", "utf-8", {}),
    ("Proband;Geschlecht;Alter (Jahre)\n1;männlich;26-30\n2;weiblich;36+\n", "cp1252", {}),
]


@pytest.mark.parametrize(("text", "encoding", "options"), EXPORTS)
def test_people_are_read_as_they_are_exported(tmp_path, capsys, text, encoding, options):
    path = write(tmp_path, text.encode(encoding), "people.csv")
    people = participants.read_people(path, **options)
    assert people[["Gender", "age"]].T.to_dict("list") == {"1": ["M", "26-30"], "2": ["F", "36+"]}
    said = capsys.readouterr().out
    assert said.startswith("people.csv: sex, by column ")
    assert said.count(" is M") == said.count(" is F") == 1


def test_a_missing_code_makes_no_other_unreadable(tmp_path):
    path = write(tmp_path, "record_id,dem_sex\nBOR-1,1\nBOR-2,2\nBOR-3,9\n", "people.csv")
    assert participants.read_people(path)["Gender"].tolist() == ["M", "F", "9"]


@pytest.mark.parametrize("cells", ["V M V M", "H M H M", "3 4 3 4", "x y x y", "1 1 1 1"])
def test_codes_that_leave_one_sex_are_refused_with_those_that_are_known(tmp_path, cells):
    rows = "".join(f"{n},{cell}\n" for n, cell in enumerate(cells.split()))
    path = write(tmp_path, "Subject,sex\n" + rows, "people.csv")
    with pytest.raises(ValueError, match=r"people\.csv: column sex: expected M and F"):
        participants.read_people(path)


@pytest.mark.parametrize(
    ("name", "cells", "sexes"),
    [
        *(("sex (1=females, 2=males)", "1 2", [0, 1]), ("Sex (1-female, 2-male)", "1 2", [0, 1])),
        *(("sex (0 male; 1 female)", "0 1", [1, 0]), ("male", "1 0", [1, 0])),
        *(("sex (2012)", "1 2", [1, 0]), ("sex", "1.0 2.00", [1, 0])),
    ],
)
def test_codes_are_read_as_the_column_says(name, cells, sexes):
    assert tables.decode_sex(pd.Series(cells.split(), name=name)).tolist() == sexes


@pytest.mark.parametrize("name", ["sex (1=lady, 2=gent)", "Geschlecht (1=weibl., 2=männl.)"])
def test_codes_that_a_column_states_in_other_words_are_refused(name):
    with pytest.raises(ValueError, match=r"expected codes as in sex \(1=f, 2=m\), found"):
        tables.decode_sex(pd.Series(["1", "2"], name=name))


def test_missing_codes_are_no_family(tmp_path):
    rows = "".join(
        f"{n},{code}\n" for n, code in enumerate(["-9", "n/a", ".", "unknown", "a", "9"])
    )
    write(tmp_path, "Subject,Family_ID\n" + rows, "families.csv")
    people = participants.join_companions(pd.DataFrame(index=list("012345")), tmp_path)
    assert people["group"].isna().tolist() == [True] * 4 + [False] * 2
    write(tmp_path, "Subject,Family_ID\n" + "".join(f"{n},99\n" for n in range(20)), "families.csv")
    people = participants.join_companions(pd.DataFrame(index=[str(n) for n in range(20)]), tmp_path)
    assert people["group"].isna().all()  # a code for unknown, or another question's answers


@pytest.mark.parametrize("name", ["Family_ID", "family", "FamilyID", "FAMNO", "fam_id"])
def test_families_are_known_by_many_names(tmp_path, name):
    write(tmp_path, f"record_id,{name}\nBOR-1,a\nBOR-2,a\n", "pedigree.csv")
    path = write(tmp_path, "code,sex\nBOR_01,F\nBOR_02,M\n", "people.csv")
    people = participants.read_people(path, subject="code")
    assert people["group"].to_dict() == {"BOR_01": "a", "BOR_02": "a"}


def test_the_one_table_of_a_folder_is_named_with_its_columns(tmp_path):
    path = write(tmp_path, "Kennung,Sex2\n1,F\n", "Stammdaten.csv")
    assert participants.find_people(tmp_path) == [path]
    write(tmp_path, "region,sex ratio\n1,2\n", "atlas.csv")
    with pytest.raises(FileNotFoundError, match=r"found \['\S*Stammdaten\.csv', '\S*atlas\.csv'\]"):
        participants.find_people(tmp_path)
    assert participants.find_people(tmp_path, subject="Kennung", sex="Sex2") == [path]


def test_the_only_table_with_ids_and_sexes_is_that_of_people(tmp_path):
    write(tmp_path, "ID,M/F,Age\n1,M,30\n", "oasis_cross-sectional.csv")
    write(tmp_path, "region,volume\n1,2\n", "atlas.csv")
    write(tmp_path, "Subject,Gender\n1,M\n", "subjects.csv")  # that convert wrote
    assert participants.find_people(tmp_path)[0].name == "oasis_cross-sectional.csv"
    write(tmp_path, "Subject,Gender,Age_in_Yrs,Family_ID\n1,M,30,f\n", "HCP_YA_subjects_2026.csv")
    people = participants.read_people(participants.find_people(tmp_path))
    assert people.loc["1"].to_dict() == {"Gender": "M", "age": "30", "group": "f"}


def test_the_right_cerebellum_gets_its_name(tmp_path, capsys):
    path = write(tmp_path, "Subject,FS_L_Cerebellum_Cort_Vol,FS_L_Cerebellum_Cort_Vol\n1,2,3\n")
    columns = ["Subject", "FS_L_Cerebellum_Cort_Vol", "FS_R_Cerebellum_Cort_Vol"]
    assert tables.read_text_table(path).columns.tolist() == columns
    assert "1 columns FS_L_Cerebellum… stand twice" in capsys.readouterr().out


EVENTS = """Record ID,Event Name,Scan,What sex were you assigned at birth?
1,Screening,,Male
1,MRI,MR_2,
2,Screening,,Female
2,MRI,MR_1,
"""
CODES = "Nr,CCID,gender_code,gender_text\n1,CC11,1,MALE\n2,CC12,2,FEMALE\n"
SESSIONS = "Subject,Label,sex\nOAS31,OAS31_MR_d1,M\nOAS32,OAS32_MR_d9,F\n"
MEANINGS = "src_subject_id,eventname,sex\nSubject ID how it is defined,The event,At birth\n"
SITES = "participant_id,site,sex\n02,101,M\n01,101,F\n"
COUNTED = "no,participant_id,sex\n1,P2,M\n2,P1,F\n"
IMAGES = "Image ID,Subject,Sex\nI118,S1,M\nI119,S1,M\nI120,S2,F\n"
ID_COLUMNS = [  # a table, the paths of the cohort's files, and the IDs that it gives
    ("Nr;Pseudonym;Geschl.\n1;AK17B;m\n2;BM03T;w\n", "a/Messung 0{} {}", ["AK17B", "BM03T"]),
    (CODES, "mri/wmsub-{1}_T1w.nii", ["CC11", "CC12"]),
    ("record_id,scan,sex\n1,MR_2,M\n2,MR_1,F\n", "Scans/{1}/fa.nii.gz", ["MR_2", "MR_1"]),
    (EVENTS, "Scans/{1}/fa.nii.gz", ["MR_2", "MR_1"]),  # the sex stands in another event
    (SESSIONS, "{1}/mri/brain.mgz", ["OAS31", "OAS32"]),  # a session is nobody
    (COUNTED, "sub-0{0}/{1}_FA.nii", ["P2", "P1"]),  # nor is the number of a row
    (SITES, "site-101/{1}_FA.nii", ["02", "01"]),  # nor is a site
    (MEANINGS, "", []),  # below the header stands what a column means
    ("subjectID,Sex\nUMN_1001,1\nBCN_1001,2\n", "data/{1}/1001_FA.nii", ["UMN_1001", "BCN_1001"]),
]


@pytest.mark.parametrize(("content", "path", "subjects"), ID_COLUMNS)
def test_the_column_of_ids_is_the_one_whose_values_stand_in_the_paths(
    tmp_path, content, path, subjects
):
    table = write(tmp_path, content)
    ids = [name.replace("OAS31", "OAS31_MR_d1").replace("_1001", "/1001") for name in subjects]
    paths = [path.format(n, name) for n, name in enumerate(ids, start=1)]
    people = participants.read_people(table, known=layouts.split_paths(paths))
    assert people["Gender"].to_dict() == dict(zip(subjects, "MF"))


@pytest.mark.parametrize("folder", ["S1", "x"])
def test_images_of_a_person_are_no_people(tmp_path, folder):
    known = layouts.split_paths([f"{folder}/I118/x.nii", f"{folder}/I119/x.nii", "S2/I120/x.nii"])
    people = participants.read_people(write(tmp_path, IMAGES), known=known)
    assert people["Gender"].to_dict() == {"S1": "M", "S2": "F"}
    differing = write(tmp_path, IMAGES.replace("I119,S1,M", "I119,S1,F"))
    with pytest.raises(ValueError, match="'S1'; choose a visit by --session"):
        participants.read_people(differing, known=known)


def test_of_several_columns_of_one_meaning_none_is_guessed(tmp_path, capsys):
    path = write(tmp_path, "Subject,Gender,fam_id,pedigree_id\n1,F,a,b\n2,M,a,c\n")
    assert participants.read_people(path).columns.tolist() == ["Gender"]
    assert (
        "WARNING: t.csv: fam_id, pedigree_id: several columns Family_ID" in capsys.readouterr().out
    )
