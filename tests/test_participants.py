"""Tables of people as labs leave them: where they lie, in how many parts, in which words."""

import json
from pathlib import Path

import pandas as pd
import pytest

from brainsex import layouts, participants
from brainsex.__main__ import main

PATHS = [f"scans/P0{n}/dti_FA.nii.gz" for n in range(1, 5)]
KNOWN = layouts.split_paths(PATHS)


def write(folder: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text, encoding="utf-8")


def read(folder: Path, **options) -> pd.DataFrame:
    found = participants.find_people(folder, known=KNOWN)
    return participants.read_people(found, known=KNOWN, folder=folder, **options)


NUMBERS = "id,age,sex\nP01,30,1\nP02,31,2\nP03,32,1\nP04,33,2\n"
LEVELS = {"1": {"TermURL": "x:248152002", "Label": "Female"}, "2": {"Label": "Male"}}
PLAIN = {"sex": {"Description": "at birth", "Levels": {"1": "woman", "2": "man"}}}
CODEBOOKS = [  # what lies beside a table whose women are 1 and men 2, against ISO 5218
    {"people.json": json.dumps(PLAIN, indent=2)},
    {"people.json": json.dumps({"sex": {"Annotations": {"Levels": LEVELS}}})},
    {"dictionary.csv": 'Variable,Choices\nage,\nsex,"1, Female | 2, Male | 3, Other"\n'},
    {"docs/dictionary.csv": 'Question,Name,Values\nSex of participant,sex,"1=Female, 2=Male"\n'},
    {"NOTES.txt": "Age\tyears\nSex\tFemales = 1, Males = 2\n"},
    {"codes.txt": "Sex: Females = 1, Males = 2"},
    {"lines.csv": 'Name,Labels\nsex,"1=Female\n2=Male"\n'},
    {"labels.tsv": "name\tcodes\nsex\tfemale 1 male 2\n"},
    {"codes.csv": "name,code,label\nsex,1,Female\nsex,2,Male\n"},  # a line a code
]


@pytest.mark.parametrize("files", CODEBOOKS)
def test_codes_mean_what_the_codebook_says(tmp_path, capsys, files):
    write(tmp_path, {"people.csv": NUMBERS} | files)
    assert read(tmp_path)["Gender"].tolist() == list("FMFM")
    assert "1 is F, 2 is M" in capsys.readouterr().out


OTHERS = [  # what says nothing of the codes of sex, though it has the word
    {"dictionary.csv": "name,codes,more\nsex,1 = left, 2 = right\n"},
    {"dictionary.csv": "name,codes,more\nsexes,1 = f, 2 = m\nage,sex 3\n"},
    {"parents.tsv": "id\tsex (1=f, 2=m)\n"},
    {"redcap.csv": 'Variable,Label,Choices\nchild_sex,"Sex of the child","1, Female | 2, Male"\n'},
    {"notes.txt": "Pairs\nsame-sex pairs: female = 1, male = 2\n"},
    {"people.json": json.dumps({"sex": {}, "rater": {"Levels": {"1": "female", "2": "male"}}})},
]


@pytest.mark.parametrize("files", OTHERS)
def test_what_says_nothing_of_the_codes_changes_nothing(tmp_path, capsys, files):
    write(tmp_path, {"people.csv": NUMBERS} | files)
    assert read(tmp_path)["Gender"].tolist() == list("MFMF")
    assert (
        '2 is F\nWARNING: no codebook says so; if it is reversed: --sex "sex (1=female, 2=male)"'
        in (capsys.readouterr().out)
    )


def test_codebooks_that_disagree_are_an_error(tmp_path):
    lines = "name,codes\nsex,1=f 2=m\n", "name,codes\nsex,1=m 2=f\n"
    write(tmp_path, {"people.csv": NUMBERS, "a.csv": lines[0], "b.csv": lines[1]})
    with pytest.raises(ValueError, match=r"column sex: codebooks say .*; keep one"):
        read(tmp_path)


RELEASES = {
    "pheno/R1.csv": "EID,Sex,Age\nP01,F,9\nP02,M,8\n",
    "pheno/R2.csv": "EID,Sex,Age\nP02,M,8\nP03,F,7\nP04,M,6\nP99,M,5\n",
}
EXCEL = (
    "Project: memory, 2016;;\n\nFp-nr;Kjønn (K/M);Alder\np1;K;34,6\nP 2;M;29,8\nP3;K;30\nP4;M;31\n"
)
DEEP = "participant,site,Geschlecht\nP01,1,w\nP02,1,m\nP03,1,w\nP04,1,m\n"
VISITS = "record_id,event,sex,scan\n" + "".join(
    f"{n},screening,{'FMFM'[n - 1]},\n{n},baseline,,P0{n}\n{n},drugs,,\n" for n in range(1, 5)
)
IMAGES = "Image,Subject,Sex,Description\n" + "".join(
    f"I{n},P0{1 + n % 4},{'FMFM'[n % 4]},{'FA MD'.split()[n % 2]}\n" for n in range(12)
)
FOLDERS = [
    RELEASES,  # one table in parts, a person in two of them
    {"list.csv": EXCEL},  # titles above the header, decimal commas, IDs in another spelling
    {
        "a/b/c/d/people.csv": DEEP,
        "o.csv": "id,sex\nP01,M\nX7,M\n",
        "x.xlsx": "PK\3\4",
    },  # known best
    {"export.csv": VISITS},  # sexes and scans in rows of different events
    {"images.csv": IMAGES},  # a row an image; those of a person agree
    {"t.txt": "P01\t1\t24\tf\nP02\t1\t20\tm\nP03\t0\t33\tf\nP04\t1\t22\tm\n"},  # no header
    {"t.txt": "# pht1\n\n##\tphv1\tphv2\n" + DEEP.replace(",", "\t")},  # as dbGaP's
    {"participants.tsv": "participant_id\nP01\n", "tabular/x.tsv": DEEP.replace(",", "\t")},
]


@pytest.mark.parametrize("files", FOLDERS)
def test_the_table_of_people_is_the_one_that_knows_the_subjects(tmp_path, files):
    write(tmp_path, files)
    people = read(tmp_path)
    people.index = participants.spell_ids(people.index, ["P01", "P02", "P03", "P04"])
    sexes = people["Gender"].drop("P99", errors="ignore").to_dict()
    assert sexes == {"P01": "F", "P02": "M", "P03": "F", "P04": "M"}


def test_a_workbook_is_read_and_its_dictionary_too(tmp_path):
    rows = [["Liste, 12.3.2021", None], [None, None], ["被験者ID", "性別"], ["Ｐ01", 0], ["P02", 1]]
    pd.DataFrame(rows).to_excel(tmp_path / "people.xlsx", header=False, index=False)
    lines = [["Variable Name", "Value Labels"], ["性別", "0=Male\n1=Female"]]
    pd.DataFrame(lines).to_excel(tmp_path / "dictionary.xlsx", header=False, index=False)
    people = participants.read_people(tmp_path / "people.xlsx", subject="被験者ID")
    assert people["Gender"].to_dict() == {"P01": "M", "P02": "F"}


@pytest.mark.parametrize("end", ["", ".0"])
def test_codes_may_be_named_by_the_option_which_goes_before_codebooks(tmp_path, end):
    rows = NUMBERS.replace(",1\n", f",1{end}\n").replace(",2\n", f",2{end}\n")
    write(tmp_path, {"t.csv": rows, "d.csv": "name,codes\nsex,1=male 2=female\n"})
    assert read(tmp_path)["Gender"].tolist() == list("MFMF")
    reversed_sexes = read(tmp_path, sex=f"sex (1{end}=female, 2{end}=male)")["Gender"]
    assert reversed_sexes.tolist() == list("FMFM")
    for unknown in ("sex (1=female)", "sex (1=hombre, 2=kobieta)", "sex (0=male, 1=female)"):
        with pytest.raises(ValueError, match="rename it if it says no codes"):
            read(tmp_path, sex=unknown)


def test_a_column_named_f_is_no_person_and_a_workbook_is_not_read_beside_its_export(tmp_path):
    write(tmp_path, {"t.csv": "PK_1,F,sex\nP01,1,w\nP02,0,m\n", "t.xlsx": "PK\3\4"})
    assert read(tmp_path)["Gender"].to_dict() == {"P01": "F", "P02": "M"}


def test_sessions_in_ids_and_in_columns_and_that_no_row_has(tmp_path):
    write(tmp_path, {"a.csv": "id,n,sex\nP01_Ses1,1,M\nP01_Ses2,2,M\n", "b.csv": "id,sex\nP01,F\n"})
    assert read(tmp_path)["Gender"].to_dict() == {"P01": "F"}  # a row a person
    assert participants.read_people(tmp_path / "a.csv", session="first").index.tolist() == ["P01"]
    write(tmp_path, {"t.csv": "id,visit,sex\nP01,SC,f\nP02,SC,m\nP03,BL,m\n"})
    for session, people in {"V04": ["P01", "P02", "P03"], "BL": ["P03"]}.items():
        assert (
            participants.read_people(tmp_path / "t.csv", session=session).index.tolist() == people
        )


def test_rows_of_a_person_that_differ_are_refused_unless_the_first_is_asked_for(tmp_path):
    write(tmp_path, {"t.csv": NUMBERS + "P01,35,1\n"})
    with pytest.raises(ValueError, match="'P01'; choose a visit by --session"):
        read(tmp_path)
    assert read(tmp_path, session="first")["age"].to_dict()["P01"] == "30"


def test_a_table_may_be_named_from_the_root_and_a_readme_is_none(tmp_path, monkeypatch, capsys):
    write(
        tmp_path, {"c/people.csv": NUMBERS, "c/README.txt": "Sex and age of all people\nline two\n"}
    )
    write(tmp_path, {"c/restricted.csv": "id,Family_ID\nP01,a\nP02,a\n"})
    monkeypatch.chdir(tmp_path)
    table = tmp_path / "c/people.csv"
    assert participants.find_people(Path("c"), known=KNOWN) == [table]
    people = participants.read_people(table, folder=Path("c"))
    assert people["group"].tolist()[:2] == ["a", "a"]


def test_visits_of_a_person_are_no_people(tmp_path):
    table = "visit,id,sex,age\nV1,P01,F,9\nV2,P01,F,11\nV1,P02,M,9\n"
    write(tmp_path, {"people.csv": table})
    known = layouts.split_paths(["V1/P01/fa.nii", "V2/P01/fa.nii", "V1/P02/fa.nii"])
    with pytest.raises(ValueError, match="'P01'; choose a visit by --session"):
        participants.read_people(tmp_path / "people.csv", known=known)


def test_tables_of_subjects_own_folders_are_not_looked_at(tmp_path):
    write(tmp_path, {f"sub-{n:03d}/stats/age.csv": "id,sex\nP01,F\n" for n in range(30)})
    write(tmp_path, {"phenotype/people.csv": NUMBERS})
    assert participants.find_people(tmp_path, known=KNOWN) == [tmp_path / "phenotype/people.csv"]


def test_the_first_session_of_each_subject_is_taken(tmp_path):
    visits = ("P01_d0129", "P01_d0757", "P02_d0031", "P03_d0500", "P03_d0501")
    write(tmp_path, {f"fs/{visit}/mri/brain.mgz": "" for visit in visits})
    files = layouts.find_volumes(tmp_path, known=["P01", "P02", "P03"])
    assert files["kind"].unique().tolist() == ["fs/*_d*/mri/brain.mgz"]
    with pytest.raises(ValueError, match="choose by --match, --session or --id"):
        layouts.choose_volumes(files)
    chosen = layouts.choose_volumes(files, session="first")
    assert [path.parts[-3] for path in chosen["path"]] == [visits[0], visits[2], visits[3]]


def test_a_folder_without_a_table_of_people_says_what_is_missing(tmp_path, capsys):
    write(tmp_path, {path: "" for path in PATHS} | {"readme.txt": "P01 is a man\n"})
    main(["survey", str(tmp_path)])
    assert "expected one table with columns Subject and Gender" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="expected one table with columns Subject and Gender"):
        main(["convert", str(tmp_path)])


@pytest.mark.parametrize(
    ("cells", "sexes"),
    [("F H F H", "FMFM"), ("niña varón niña varón", "FMFM")],
)
def test_letters_and_words_of_other_languages_are_sexes(tmp_path, cells, sexes):
    rows = "".join(f"P0{n},{cell}\n" for n, cell in enumerate(cells.split(), 1))
    write(tmp_path, {"t.csv": "id,sexo\n" + rows})
    assert read(tmp_path)["Gender"].tolist() == list(sexes)


def test_a_rare_code_of_neither_sex_makes_no_other_unreadable(tmp_path):
    rows = "".join(f"P{n:02d},{1 + n % 2}\n" for n in range(20))
    write(tmp_path, {"t.csv": "id,sex\n" + rows + "P99,3\n"})
    assert read(tmp_path)["Gender"].tolist() == [*("MF" * 10), "3"]


def test_the_folder_that_is_an_id_goes_before_names_that_have_it_within():
    paths = [Path(f"/d/CON-{n}/CON-{n}.{part}.nii.gz") for n in (1, 2) for part in ("bfc", "bse")]
    paths += [Path(f"/d/{name}/{name}.nii.gz") for name in ("CON-1", "PAC-1", "PAC-2")]
    names = layouts.name_subjects(paths, known=["CON-1", "CON-2"])
    assert names == ["CON-1", "CON-1", "CON-2", "CON-2", "CON-1", "PAC-1", "PAC-2"]


def test_a_column_named_wrongly_and_a_sidecar_of_another_form_end_in_words(tmp_path):
    write(tmp_path, {"people.csv": NUMBERS, "people.json": '{"sex": "at birth"}'})
    assert read(tmp_path)["Gender"].tolist() == list("MFMF")
    with pytest.raises(ValueError, match="expected one column Nope, found id, age, sex; name it"):
        read(tmp_path, subject="Nope")
