"""Morphometry tables: what is read is what stands there, and what is wrong is found and named."""

import dataclasses

import numpy as np
import pandas as pd
import pytest

from brainsex import (
    classifiers,
    evaluation,
    population,
    replication,
    synthetic,
    tables,
    tabular,
)

pytestmark = pytest.mark.usefixtures("in_process")


def written(folder, content, name="t.csv"):
    """A table's path."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def loaded(folder, content, **options):
    return tabular.load(written(folder, content), **options)


PLAIN = "Subject,Gender,FS_A,FS_B\n000001,F,1.5,10\n000002,M,2.5,20\n000003,F,,30\n"


# ------------------------------------------------------------------------------------------- load


def test_load_gives_numbers_sex_and_subjects(tmp_path, capsys):
    found = loaded(tmp_path / "mine", PLAIN)
    assert len(found) == 3
    assert found.name == "mine"
    assert found.features.columns.tolist() == ["FS_A", "FS_B"]
    np.testing.assert_array_equal(found.features, [[1.5, 10], [2.5, 20], [np.nan, 30]])
    assert found.sex.tolist() == [0, 1, 0]
    assert found.sex.dtype == np.int64
    assert found.subjects.tolist() == ["000001", "000002", "000003"]
    assert found.groups is None
    assert found.release is None
    assert found.notes == {}
    assert capsys.readouterr().out == "t.csv: 3 subjects, 2 features\n"


def test_the_name_says_that_a_table_is_synthetic(tmp_path):
    (tmp_path / "hcp").mkdir()
    (tmp_path / "hcp" / "SYNTHETIC").touch()
    assert loaded(tmp_path / "hcp", PLAIN).name == "hcp (synthetic)"


def test_load_reads_hcp_s_export(tmp_path, capsys):
    """As `synthetic` writes it: 938 columns, seven names twice, one misspelt, some constant."""
    people = population.draw(1, 0)
    given = synthetic.freesurfer_table(people)[:150]
    given.to_csv(tmp_path / "unrestricted_hcp_freesurfer.csv", index=False)
    people.restricted.to_csv(tmp_path / "restricted.csv", index=False)
    found = tabular.load(tmp_path / "unrestricted_hcp_freesurfer.csv")

    assert found.subjects.tolist() == given["Subject"].tolist()
    assert found.sex.tolist() == [{"F": 0, "M": 1}[gender] for gender in given["Gender"]]
    assert found.release.tolist() == given["Release"].tolist()
    family = people.restricted.set_index("Subject")["Family_ID"]
    assert found.groups.tolist() == family[given["Subject"]].tolist()

    position = np.flatnonzero(given.iloc[:, 3:].to_numpy().std(0)) + 3
    assert found.features.shape == (150, len(position))
    np.testing.assert_allclose(found.features, given.iloc[:, position], rtol=1e-12)
    twice = "FS_L_Cerebellum_Cort_Vol"
    both = given.iloc[:, np.flatnonzero(given.columns == twice)].to_numpy()
    np.testing.assert_allclose(found.features[[twice, f"{twice} (2)"]], both, rtol=1e-12)
    assert "FS_InterCranial_Vol" not in found.features
    volume = given["FS_InterCranial_Vol"]
    np.testing.assert_allclose(found.features["FS_IntraCranial_Vol"], volume, rtol=1e-12)
    assert not {"Subject", "Release", "Gender"} & set(found.features)

    seconds, constant = (
        found.notes[reason] for reason in ("second of a name", "the same for everybody, dropped")
    )
    assert len(seconds) == 7
    assert f"{twice} (2)" in seconds
    assert len(constant) == 935 - len(position) > 0
    assert "FS_L_WM_Hypointens_Vol" in constant
    assert found.notes["called FS_IntraCranial_Vol, as in other exports"]
    said = capsys.readouterr().out
    assert f"150 subjects, {len(position)} features" in said
    assert f"and {len(constant) - 3} more" in said


def test_the_other_spelling_is_kept(tmp_path):
    found = loaded(tmp_path, "Subject,Gender,FS_IntraCranial_Vol\n1,F,3\n2,M,4\n")
    assert found.features.columns.tolist() == ["FS_IntraCranial_Vol"]
    assert found.notes == {}
    both = "Subject,Gender,FS_InterCranial_Vol,FS_IntraCranial_Vol\n1,F,3,5\n2,M,4,6\n"
    assert loaded(tmp_path, both).features["FS_IntraCranial_Vol"].tolist() == [5, 6]


def test_load_reads_bids_participants(tmp_path):
    path = written(
        tmp_path,
        "participant_id\tage\tsex\tgroup\tvolume\n"
        "sub-01\t34\tF\tcontrol\t1.5\nsub-02\tn/a\tM\tcontrol\t2.5\nsub-03\t22\tn/a\tn/a\t3.5\n",
        "participants.tsv",
    )
    found = tabular.load(path)
    assert found.subjects.tolist() == ["sub-01", "sub-02"]
    assert found.sex.tolist() == [0, 1]
    assert found.features.columns.tolist() == ["volume"]  # of two, one age is known
    assert found.notes == {
        "subjects without a sex, left out": ("1",),
        "text, dropped": ("group",),
        "the same for everybody, dropped": ("age",),
    }


@pytest.mark.parametrize(
    ("women", "men"),
    [
        ("F", "M"),
        ("female", "male"),
        ("Female", " MALE "),
        ("woman", "man"),
        ("w", "m"),
        ("0", "1"),
        ("2", "1"),
        ("0.0", "1.0"),
        ("2.0", "1.0"),
    ],
)
def test_load_knows_the_sexes_codes(tmp_path, women, men):
    content = f"Subject,Gender,A\n1,{women},1\n2,{men},2\n3,,3\n4,{women},4\n"
    found = loaded(tmp_path, content)
    assert found.sex.tolist() == [0, 1, 0]
    assert found.sex.dtype == np.int64
    assert found.features["A"].tolist() == [1, 2, 4]
    assert found.features.index.tolist() == [0, 1, 2]  # as `as_in_the_study` joins Release to them
    assert found.notes["subjects without a sex, left out"] == ("1",)


@pytest.mark.parametrize(
    ("header", "options"),
    [
        ("Subject,Gender", {}),
        ("subject,gender", {}),
        ("eid,Sex", {}),
        ("participant_id,sex", {}),
        (" Subject , Gender ", {}),
        ("code,biological sex", {"subject": "code", "sex": "biological sex"}),
        ("eid,SEX", {"subject": "eid", "sex": "SEX"}),
    ],
)
def test_load_finds_the_columns(tmp_path, header, options):
    found = loaded(tmp_path, f"{header},A\n007,F,1\n008,M,2\n", **options)
    assert found.subjects.tolist() == ["007", "008"]
    assert found.features.columns.tolist() == ["A"]


ROWS = [["Subject", "Gender", "A", "B"], ["01", "F", "1.5", "-0.25"], ["02", "M", "2", "3e5"]]


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("separator", [",", ";", "\t"])
@pytest.mark.parametrize("variant", ["plain", "BOM", "separator at the end", "quoted"])
def test_load_reads_any_system_s_text(tmp_path, separator, end, variant):
    rows = ROWS
    if variant == "separator at the end":
        rows = [ROWS[0], *([*row, ""] for row in ROWS[1:])]
    elif variant == "quoted":
        rows = [[f'"{cell}"' for cell in row] for row in ROWS]
    text = end.join(separator.join(row) for row in rows) + end
    content = text.encode("utf-8-sig" if variant == "BOM" else "utf-8")
    found = loaded(tmp_path, content)
    assert found.subjects.tolist() == ["01", "02"]
    assert found.sex.tolist() == [0, 1]
    assert found.features.columns.tolist() == ["A", "B"]
    np.testing.assert_array_equal(found.features, [[1.5, -0.25], [2, 3e5]])


@pytest.mark.parametrize(
    ("cells", "values"),
    [
        (("1,5", "-0,25"), (1.5, -0.25)),
        (("1,5", "2"), (1.5, 2)),
        ((",5", "+2,0"), (0.5, 2)),
        ((" 1,5", "2,5 "), (1.5, 2.5)),
        (("1,5e+06", "2,5E-3"), (1.5e6, 2.5e-3)),  # as R's write.csv2 does
    ],
)
def test_semicolons_go_with_decimal_commas(tmp_path, cells, values):
    found = loaded(tmp_path, f"Subject;Gender;A;B\n1;F;{cells[0]};1\n2;M;{cells[1]};2\n")
    assert found.features["A"].tolist() == list(values)


def test_what_is_no_feature_is_dropped_and_said(tmp_path, capsys):
    found = loaded(
        tmp_path,
        "Subject,Gender,Release,A,note,empty,same,huge,endless\n"
        "1,F,S500,1,good,,7,1e999,inf\n2,M,S900,2,2 of 3,,7,3,-inf\n3,F,,3,,,7,4,inf\n",
    )
    assert found.features.columns.tolist() == ["A", "huge"]
    np.testing.assert_array_equal(found.features["huge"], [np.nan, 3, 4])
    assert found.release.tolist() == ["S500", "S900", ""]
    assert found.notes["text, dropped"] == ("note",)
    assert found.notes["all blank, dropped"] == ("empty",)
    assert "same" in found.notes["the same for everybody, dropped"]
    assert found.notes["1 infinite, the first in line 2: now blank"] == ("huge",)
    assert "text, dropped: note" in capsys.readouterr().out


def test_release_is_never_a_feature_though_a_number(tmp_path):
    found = loaded(tmp_path, "Subject,Gender,Release,A\n1,F,500,1\n2,M,900,2\n")
    assert found.features.columns.tolist() == ["A"]
    assert found.release.tolist() == ["500", "900"]


def test_an_id_or_release_that_stands_twice_is_no_feature(tmp_path):
    """As in tables joined from several."""
    content = "Subject,Gender,A,Release,Release\n1,F,1,500,500\n2,M,2,900,900\n3,M,3,900,900\n"
    assert loaded(tmp_path, content).features.columns.tolist() == ["A"]
    content = "Subject,Gender,Subject,A\n1,F,1,1\n2,M,2,2\n3,M,3,3\n"
    try:
        found = loaded(tmp_path, content)
    except ValueError as error:
        assert "several: Subject, Subject" in str(error)  # noqa: PT017, either will do
    else:
        assert found.features.columns.tolist() == ["A"]


def test_the_sex_in_other_words_is_no_feature(tmp_path):
    """A classifier of it would be right about everybody."""
    content = "Subject,Gender,sex,A\n1,F,2,1\n2,M,1,2\n3,F,2,3\n"
    try:
        found = loaded(tmp_path, content)
    except ValueError as error:
        assert "several: Gender, sex" in str(error)  # noqa: PT017, either will do
    else:
        assert found.features.columns.tolist() == ["A"]
    found = loaded(tmp_path, content, sex="Gender")
    assert "sex" not in found.features


@pytest.mark.parametrize("name", ["restricted.csv", "RESTRICTED_me_7_7_2024.csv"])
def test_families_come_from_the_table_beside(tmp_path, name):
    written(tmp_path, "Subject,Family_ID\n000003,f1\n000001,f1\n000009,f9\n", name)
    first, second, third = loaded(tmp_path, PLAIN).groups
    assert first == third == "f1"
    assert second not in ("f1", "f9", "nan")


@pytest.mark.parametrize(
    "content",
    ["Subject,Age_in_Yrs\n000001,22\n", "Subject,Family_ID\n000009,f9\n"],
)
def test_families_of_nobody_are_none(tmp_path, content):
    written(tmp_path, content, "restricted.csv")
    assert loaded(tmp_path, PLAIN).groups is None


def test_two_restricted_tables_are_refused(tmp_path):
    for name in ("RESTRICTED_a.csv", "RESTRICTED_b.csv"):
        written(tmp_path, "Subject,Family_ID\n000001,f\n", name)
    with pytest.raises(ValueError, match="several restricted tables"):
        loaded(tmp_path, PLAIN)


HEAD = "Subject,Gender,A\n"


@pytest.mark.parametrize(
    ("content", "options", "message"),
    [
        # the columns
        ("Subject,A\n1,2\n", {}, "expected one column Gender, found Subject, A"),
        ("Subject,Sex,SEX,A\n1,F,F,2\n", {}, "one column Gender, found several: Sex, SEX"),
        ("Subject,Gender,Gender,A\n1,F,F,2\n2,M,M,3\n", {}, "several"),
        ("Subject,sex,sex,A\n1,1,1,3\n2,2,2,4\n", {}, "several"),
        ("Gender,A\nF,2\n", {}, "expected one column Subject, found Gender, A"),
        ("eid,participant_id,Gender\n1,1,F\n", {}, "several: eid, participant_id"),
        ("Subject,Geschlecht,A\n1,F,2\n", {"sex": "geschlecht"}, "one column geschlecht, found Su"),
        ("Subject,sex,A\n1,F,2\n", {"sex": "Geschlecht"}, r"Geschlecht, found (Subject|sex)"),
        ("Subject|Gender|A\n1|F|2\n", {}, r"found Subject\|Gender\|A"),
        # the sex
        (HEAD + "1,F,1\n2,M,2\n3,X,3\n", {}, "column Gender, line 4: expected one of f, .*'X'"),
        (HEAD + "1,0,1\n2,1,2\n3,2,3\n", {}, "column Gender, line [234]: expected one of .*recode"),
        (HEAD + "1,3,1\n2,1,2\n", {}, "line 2: .*recode.*'3'"),
        (HEAD + "1,F,1\n2,F,2\n", {}, "expected both sexes in Gender, found one only"),
        (HEAD + "1,1,1\n2,1,2\n", {}, "expected both sexes in Gender, found one only"),
        (HEAD + "1,,1\n2,,2\n", {}, "expected both sexes in Gender"),
        (HEAD, {}, "expected both sexes in Gender"),
        # the subjects
        (HEAD + "1,F,1\n2,M,2\n1,F,3\n", {}, "subjects in more than one row: 1"),
        (HEAD + "1,F,1\n2,M,2\n 1,F,3\n", {}, "subjects in more than one row: 1"),
        (HEAD + "1,F,1\n2,M,2\n,F,3\n", {}, "line 4 has no Subject"),
        (HEAD + "1,F,1\n  ,M,2\n3,F,3\n", {}, "line 3 has no Subject"),
        # the numbers
        (HEAD + "1,F,1\n2,M,2\n3,F,?\n4,M,4\n", {}, r"column A, line 4: .*number, found '\?'"),
        (HEAD + "1,F,1\n2,,2\n3,M,3\n4,M,1.2.3\n", {}, r"column A, line 5: .*'1\.2\.3'"),
        (HEAD + "1,F,1\n\n2,M,2\n\n3,M,x\n", {}, "column A, line 6: expected a number, found 'x'"),
        ((HEAD + "1,F,1\n2,M,x\n").replace("\n", "\r"), {}, "column A, line 3: .*'x'"),
        ((HEAD + "1,F,1\n2,M,x\n").replace("\n", "\r\n"), {}, "column A, line 3: .*'x'"),
        ("Subject,Gender,note\n1,F,a\n2,M,b\n", {}, "no column of numbers beside Subject and Gen"),
        ("Subject,Gender,Release\n1,F,1\n2,M,2\n", {}, "no column of numbers"),
        ("Subject,Gender\n1,F\n2,M\n", {}, "no column of numbers"),
        (HEAD + "1,F,5\n2,M,5\n", {}, "no column of numbers"),
        # the file
        (b"", {}, "not a CSV table"),
        (b"\n", {}, "not a CSV table"),
        (b"Subject,Gender,A\n1,F,\xff\n", {}, "not a CSV table"),
        ("Subject,Gender,A\n1,F,1\n".encode("utf-16"), {}, "not a CSV table"),
        (HEAD + "1,F,1\n2,M,2,3\n", {}, "line 3"),
        (HEAD + "1,F,1\n2,M,2,3,4\n", {}, "line 3"),
        (HEAD + "1,F,1,5\n2,M,2,5\n", {}, "line 2"),  # decimal commas, most likely
        (HEAD + "1,F,1,5,6\n2,M,2,5,6\n", {}, "t.csv"),
        ("Subject,Gender,A,A,A (2)\n1,F,1,2,3\n2,M,4,5,6\n", {}, r"A \(2\)"),
    ],
)  # fmt: skip
@pytest.mark.filterwarnings("ignore:Length of header or names")
def test_load_refuses(tmp_path, content, options, message):
    with pytest.raises(ValueError, match=message) as caught:
        loaded(tmp_path, content, **options)
    assert "t.csv" in str(caught.value)


def test_blank_lines_at_the_end_are_nobody(tmp_path):
    found = loaded(tmp_path, HEAD + "1,F,1\n2,M,2\n\n\n")
    assert len(found) == 2
    assert found.notes == {}


def test_a_table_that_is_not_there_or_is_a_folder(tmp_path):
    for path in (tmp_path / "t.csv", tmp_path):
        with pytest.raises(FileNotFoundError, match=r"no such table.*DATA_ACCESS\.md"):
            tabular.load(path)


# ----------------------------------------------------------------------------------------- tables


def test_raw_keeps_text_and_blanks(tmp_path):
    path = written(tmp_path, 'a, b ,a,c,a\n007," x, y ",,NA,1.50\n\n2\n')
    rows = tables.raw(path)
    assert rows.columns.tolist() == ["a", "b", "a (2)", "c", "a (3)"]
    assert rows.iloc[0, [0, 1, 4]].tolist() == ["007", " x, y ", "1.50"]
    assert rows.iloc[0, [2, 3]].isna().all()
    assert rows.iloc[1].isna().all()  # so that lines can be counted
    assert rows.iloc[2, 0] == "2"
    assert rows.iloc[2, 1:].isna().all()


def test_identifiers_are_stripped_text(tmp_path):
    column = pd.Series([" 007", "8 ", "sub-9"], name="Subject", dtype=str)
    found = tables.identifiers(tmp_path / "t.csv", column)
    assert found.tolist() == ["007", "8", "sub-9"]
    assert found.dtype.kind == "U"


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["1", None, "3"], r"t\.csv: line 3 has no Subject"),
        (["1", "2", " "], r"t\.csv: line 4 has no Subject"),
        (["1", "2", "1 "], r"t\.csv: subjects in more than one row: 1\."),
    ],
)
def test_identifiers_refuses(tmp_path, names, message):
    with pytest.raises(ValueError, match=message):
        tables.identifiers(tmp_path / "t.csv", pd.Series(names, name="Subject", dtype=str))


def test_filled_makes_who_has_no_family_one_alone():
    groups = pd.Series(["a", None, "a", None], ["1", "2", "3", "4"], dtype=str)
    found = tables.filled(groups)
    assert found[0] == found[2] == "a"
    assert len({found[0], found[1], found[3]}) == 3
    assert tables.filled(groups.where(groups.isna())) is None
    assert tables.filled(pd.Series(dtype=str)) is None


def test_families_are_in_the_subjects_order(tmp_path):
    assert tables.families(tmp_path, np.array(["1"])) is None
    written(tmp_path, "Subject,Family_ID\n2,b\n1,a\n3,\n", "restricted.csv")
    found = tables.families(tmp_path, np.array(["3", "1", "2", "4"]))
    assert found[1:3].tolist() == ["a", "b"]
    assert len(set(found)) == 4


# ------------------------------------------------------------------------------ scores of a table


def simulated(count=60, features=4, effect=1.0, seed=0, **known):
    """Features of which the first differs between the sexes by `effect` standard deviations."""
    rng = np.random.default_rng(seed)
    sex = rng.permutation([0, 1] * (count // 2))
    values = rng.standard_normal((count, features))
    values[:, 0] += effect * sex
    frame = pd.DataFrame(values, columns=[f"FS_{n}" for n in range(features)])
    known = {"groups": None, "release": None} | known
    return tabular.Table("t", frame, sex, np.arange(count).astype(str), notes={}, **known)


LINEAR = {"linear": classifiers.as_published()["logistic regression"]}


def test_decisions_are_those_of_cross_predict_in_the_folds_shape():
    table = simulated()
    where = np.stack([evaluation.folds(table.sex, folds=3, seed=seed) for seed in (0, 1)])
    found = tabular.decisions(table, where, chosen=LINEAR)
    assert list(found) == ["linear"]
    for folds, decision in zip(where, found["linear"]):
        expected = classifiers.cross_predict(LINEAR["linear"], table.features, table.sex, folds)
        np.testing.assert_array_equal(decision, expected)
    assert tabular.decisions(table, where[0], chosen=LINEAR)["linear"].shape == (60,)


def test_compare_scores_each_on_the_same_folds_of_whole_families(monkeypatch):
    families = np.arange(20).repeat(3).astype(str)
    table = simulated(groups=families)
    seen = []

    def decisions(given, assignment, **options):
        seen.append(assignment)
        return {"first": np.where(assignment >= 0, given.sex - 0.5, 0), "second": 0.5 - assignment}

    monkeypatch.setattr(tabular, "decisions", decisions)
    found = tabular.compare(table, folds=4, seed=5)
    (assignment,) = seen
    expected = evaluation.folds(table.sex, groups=families, folds=4, seed=5)
    np.testing.assert_array_equal(assignment, expected)
    assert all(len(set(assignment[families == family])) == 1 for family in families)
    assert found["classifier"].tolist() == ["first", "second"]
    assert found.loc[0, "accuracy"] == 1
    expected = evaluation.score(table.sex, 0.5 - assignment, assignment)
    assert found.drop(columns="classifier").loc[1].to_dict() == expected


# --------------------------------------------------------------------------- the study's protocol


def test_as_in_the_study_sweeps_k_and_says_what_leaks():
    table = simulated(80, groups=np.arange(40).repeat(2).astype(str))
    found, sweep = replication.as_in_the_study(table, folds=4, leave_out=("SVM", "XGBoost"))
    assert found["classifier"].tolist() == ["KNN", "logistic regression"]
    where = evaluation.folds(table.sex, folds=4, seed=0)
    votes = classifiers.neighbour_sweep(table.features, table.sex, where, largest=60)
    np.testing.assert_allclose(sweep, ((votes > 0) == table.sex).mean(1))
    best = int(np.argmax(sweep)) + 1
    assert found.loc[0, "leaks"] == f"relatives, k = {best} chosen by these scores"
    assert found.loc[1, "leaks"] == "relatives"
    fold = [np.mean((votes[best - 1] > 0)[where == n] == table.sex[where == n]) for n in range(4)]
    assert found.loc[0, "accuracy"] == pytest.approx(np.mean(fold))


def test_as_in_the_study_leaves_one_out_of_the_first():
    table = simulated(60)
    found, sweep = replication.as_in_the_study(
        table, first=25, folds=None, leave_out=("SVM", "XGBoost")
    )
    assert found["n"].tolist() == [25, 25]
    assert found["interval"].tolist() == ["Wilson", "Wilson"]
    assert len(sweep) == 24
    # by hand: the nearest neighbour of each, standardised on the others
    values, sex, right = table.features.to_numpy()[:25], table.sex[:25], 0
    for row in range(25):
        others = np.delete(np.arange(25), row)
        scaled = (values - values[others].mean(0)) / values[others].std(0)
        nearest = others[((scaled[others] - scaled[row]) ** 2).sum(1).argmin()]
        right += sex[nearest] == sex[row]
    assert sweep[0] == pytest.approx(right / 25)
    assert found.loc[1, "leaks"] == "relatives, if there are any"


@pytest.mark.parametrize(("one_hot", "names"), [(False, 1), (True, 3)])
def test_release_enters_as_the_study_coded_it(monkeypatch, one_hot, names):
    rng = np.random.default_rng(0)
    releases = rng.choice(["S1200", "S500", "S900"], 60)
    seen = []

    def predict(classifier, features, sex, assignment, **options):
        seen.append(features)
        return sex - 0.5

    monkeypatch.setattr(classifiers, "cross_predict", predict)
    table = simulated(release=releases)
    replication.as_in_the_study(table, first=50, folds=3, one_hot=one_hot)
    given = seen[0]
    assert given.shape == (50, 4 + names)
    codes = np.searchsorted(["S1200", "S500", "S900"], releases[:50])
    expected = codes[:, None] if names == 1 else np.eye(3)[codes]
    np.testing.assert_array_equal(given.iloc[:, 4:], expected)
    np.testing.assert_array_equal(given.iloc[:, :4], table.features[:50])
    replication.as_in_the_study(dataclasses.replace(table, release=None), folds=3)
    assert seen[-1].shape == (60, 4)


def test_subjects_without_any_measure_are_left_out_and_said(tmp_path, capsys):
    found = loaded(tmp_path, "Subject,Gender,A,B\n1,F,1,2\n2,M,,\n3,M,2,\n4,F,3,1\n")
    assert found.subjects.tolist() == ["1", "3", "4"]
    assert found.sex.tolist() == [0, 1, 0]
    np.testing.assert_array_equal(found.features, [[1, 2], [2, np.nan], [3, 1]])
    assert "without a measure, left out: 1" in capsys.readouterr().out


def test_a_subset_is_those_subjects():
    table = simulated(12, groups=np.array(list("aabbccddeeff")))
    some = tabular.subset(table, np.array([7, 2]))
    assert some.subjects.tolist() == table.subjects[[7, 2]].tolist()
    assert some.groups.tolist() == ["d", "b"]
    np.testing.assert_array_equal(some.features, table.features.iloc[[7, 2]])
    assert some.features.index.tolist() == [0, 1]
    assert some.sex.tolist() == table.sex[[7, 2]].tolist()
