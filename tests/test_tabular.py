"""Tables: what is loaded is what stands there. Classifiers: all is learnt from training folds."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from sklearn.svm import SVC
from xgboost import XGBClassifier

from brainsex import evaluation, participants, tabular

pytestmark = pytest.mark.usefixtures("in_process")

HEAD = "Subject,Gender,A\n"


def load(folder: Path, content: str | bytes, **options: str) -> tabular.Table:
    """Write a table and load it."""
    folder.mkdir(exist_ok=True)
    path = folder / "t.csv"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return tabular.load(path, **options)


# --------------------------------------------------------------------------------------- load_table


def test_load_reads_hcps_export(tmp_path, capsys):
    """A name twice, a constant, Release; blank lines, text and infinite values."""
    folder = tmp_path / "hcp"
    folder.mkdir()
    (folder / "SYNTHETIC").touch()
    (folder / "restricted.csv").write_text("Subject,Family_ID\n03,f1\n01,f1\n09,f9\n")
    table = load(
        folder,
        "Subject,Release,Gender,FS_InterCranial_Vol,FS_Same,FS_V,FS_V,note,empty,huge\n\n"
        "01,S500,F,5,7,1,11,good,,1e999\n02,S900,M,6,7,2,12,2 of 3,,3\n\n03,,F,7,7,3,13,,,4\n"
        "04,S900,,8,7,4,14,,,5\n05,S900,F,,,,,,,\n",
    )
    expected = {"FS_InterCranial_Vol": [5, 6, 7], "FS_V": [1, 2, 3], "FS_V (2)": [11, 12, 13]}
    expected = pd.DataFrame(expected | {"huge": [np.nan, 3, 4]}, dtype=float)
    pd.testing.assert_frame_equal(table.features, expected)
    assert (len(table), table.name) == (3, "hcp (synthetic)")
    assert table.sex.tolist() == [0, 1, 0]
    assert table.sex.dtype == np.int64
    assert table.subjects.tolist() == ["01", "02", "03"]
    assert table.release.tolist() == ["S500", "S900", ""]
    assert table.groups[0] == table.groups[2] == "f1"
    assert table.groups[1] not in ("f1", "f9", "nan")
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "t.csv: sex, by column Gender: F is F, M is M"
    assert [line.split(": ")[-1] for line in lines[2:4]] == ["3 FS_Same note empty", "2 04 05"]


def test_a_cohorts_table_is_found_and_matched(tmp_path):
    load(tmp_path / "t", "participant_id,sex,ICV\nsub-01,F,3\nsub-02,M,4\n")
    path = tmp_path / "t" / "t.csv"
    assert (
        participants.find_morphometry(tmp_path),
        participants.find_morphometry(tmp_path, path),
    ) == (None, path)
    (tmp_path / "participants.tsv").write_text("participant_id\tsex\n01\tF\n")
    assert tabular.load(path, cohort=tmp_path).name == tmp_path.name
    (tmp_path / "subjects.csv").write_text("Subject,Gender\n04,F\n")  # it comes first
    with pytest.raises(ValueError, match="found none among 2: 01"):
        tabular.load(path, cohort=tmp_path)


def test_families_of_a_table_outside_the_cohort_are_not_lost(tmp_path):
    (tmp_path / "participants.tsv").write_text("participant_id\tsex\n1\tF\n2\tM\n")
    table = "Subject,Gender,Family_ID,ICV\n1,F,a,3\n2,M,a,4\n"
    assert load(tmp_path / "t", table, cohort=tmp_path).groups.tolist() == ["a", "a"]


@pytest.mark.parametrize("column", ["Measure:volume", "lh.aparc.thickness"])
def test_freesurfers_table_takes_its_sexes_from_the_people(tmp_path, column):
    (tmp_path / "participants.tsv").write_text("participant_id\tsex\nsub-02\tM\nsub-01\tF\n")
    table = load(tmp_path, f"{column}\tCSF\nsub-01\t900.5\nsub-02\t1000\nsub-03\t800\n")
    assert (table.subjects.tolist(), table.sex.tolist()) == (["01", "02"], [0, 1])
    assert table.features.to_dict("list") == {"CSF": [900.5, 1000]}


def test_a_code_of_sex_that_is_unknown_leaves_its_subject_out(tmp_path, capsys):
    assert load(tmp_path, HEAD + "1,F,1\n2,M,2\n3,X,3\n").subjects.tolist() == ["1", "2"]
    assert "subjects without a sex or measure: 1 3" in capsys.readouterr().out


def test_a_plain_table_has_neither_families_nor_releases(tmp_path):
    table = load(tmp_path, HEAD + "1,F,3\n2,M,4\n")
    assert (table.name, table.groups, table.release) == (tmp_path.name, None, None)


@pytest.mark.parametrize(
    ("content", "options", "message"),
    [
        ("Subject,A\n1,2\n", {}, "expected one table with columns Subject and Gender, found"),
        ("Subject,sex,A\n1,F,2\n", {"sex": "Geschlecht"}, "Geschlecht, found Subject, sex"),
        (HEAD + "1,0,1\n2,1,2\n3,2,3\n", {}, "column Gender: expected M and F.*'2'.*none known"),
        (HEAD + "1,F,1\n2,F,2\n", {}, "expected both sexes in Gender .*, found {0}"),
        (HEAD + "1,F,1\n2,M,2\n 1,F,3\n", {}, "in one row, found '1'"),
        ("Subject,Gender,note\n1,F,a\n2,M,b\n", {}, "a column of numbers beside it and"),
        (b"", {}, "expected a CSV table"),
    ],
)
def test_load_refuses(tmp_path, content, options, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message) as error:
        load(tmp_path, content, **options)
    assert str(error.value).startswith(str(tmp_path))


# ---------------------------------------------------------------------------------------- decisions

PUBLISHED = tabular.make_classifiers(neighbours=9)
NESTED = tabular.make_classifiers(nested=True)


def draw(count: int = 60) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Five features on other scales, of which the first differs by 1 SD; sex; three folds."""
    rng = np.random.default_rng(0)
    sex = rng.permutation([0, 1] * (count // 2))
    values = rng.standard_normal((count, 5))
    values[:, 0] += sex
    return values * 10.0 ** np.arange(5) + 100, sex, evaluation.folds(sex, folds=3)


def make_table(
    features: np.ndarray, sex: np.ndarray, groups: np.ndarray | None = None
) -> tabular.Table:
    """Make a table as `tabular.load` would."""
    frame = pd.DataFrame(features, columns=[f"FS_{n}" for n in range(features.shape[1])])
    return tabular.Table("t", frame, sex, np.arange(len(sex)).astype(str), groups, None)


def standardise(values: np.ndarray, train: np.ndarray) -> np.ndarray:
    """In float64, on the training rows, blanks their mean."""
    scaled = (values - np.nanmean(values[train], 0)) / np.nanstd(values[train], 0)
    return np.where(np.isnan(values), 0, scaled)


def expected_decisions(
    name: str, values: np.ndarray, sex: np.ndarray, train: np.ndarray, test: np.ndarray
) -> np.ndarray:
    """The decisions by scikit-learn or XGBoost themselves, fitted on the training rows."""
    if name == "XGBoost":
        classifier = XGBClassifier(learning_rate=0.5, random_state=0, n_jobs=1)
    else:
        values = standardise(values, train)
        classifier = {"KNN": KNeighborsClassifier(9), "SVM": SVC()}.get(name)
        classifier = classifier or LogisticRegression(max_iter=1000)
    classifier.fit(values[train], sex[train])
    if name in ("XGBoost", "KNN"):
        return classifier.predict_proba(values[test])[:, 1] - 0.5
    return classifier.decision_function(values[test])


@pytest.mark.parametrize("name", PUBLISHED)
@pytest.mark.parametrize("kind", ["plain", "blanks", "confounds", "confounds and blanks"])
@pytest.mark.filterwarnings("error")
def test_decisions_are_those_of_the_libraries(name, kind):
    values, sex, assignment = draw()
    values[assignment == 1] += 1e4  # scaling must not know it
    rng = np.random.default_rng(1)
    confounds = rng.normal([1.5e6, 28], [1e5, 3], (60, 2)) + [8e4, 0] * sex[:, None]
    if "confounds" in kind:
        values += values.std(0) * (confounds[:, :1] - 1.5e6) / 1e5
    if "blanks" in kind:
        values[rng.random(values.shape) < 0.1] = np.nan
    options = {"confounds": confounds} if "confounds" in kind else {}
    decisions = tabular.cross_val_decisions(PUBLISHED[name], values, sex, assignment, **options)
    for fold in range(3):
        train, test = assignment != fold, assignment == fold
        rest = values
        if "confounds" in kind:
            whole = np.where(np.isnan(values), np.nanmean(values[train], 0), values)
            centred = confounds - confounds[train].mean(0)
            design = np.column_stack([np.ones(60), centred / centred[train].std(0)])
            rest = whole - design[:, 1:] @ np.linalg.lstsq(design[train], whole[train])[0][1:]
        expected = expected_decisions(name, rest, sex, train, test)
        np.testing.assert_allclose(decisions[test], expected, rtol=1e-4, atol=1e-5)
    assert not hasattr(PUBLISHED["logistic regression"][-1], "coef_")  # it was cloned


CLASSIFIERS = [*PUBLISHED.items(), *((f"{name}, nested", c) for name, c in NESTED.items())]


@pytest.mark.filterwarnings("ignore:.*non-finite", "ignore:.*fits failed", "ignore:.*Scoring")
@pytest.mark.parametrize("confounded", [False, True])
@pytest.mark.parametrize(("name", "classifier"), CLASSIFIERS)
def test_nothing_is_learnt_from_the_fold_that_is_tested(name, classifier, confounded):
    values, sex, _ = draw(32)
    assignment = np.arange(32) // 16
    rng = np.random.default_rng(5)
    confounds = rng.standard_normal((32, 2)) + sex[:, None] if confounded else None
    samples = values, sex, assignment
    before = tabular.cross_val_decisions(classifier, *samples, confounds=confounds)
    values[:8], sex[:8] = 1e7 * rng.standard_normal((8, 5)), 1 - sex[:8]
    values[0] = np.nan
    if confounded:
        confounds[:8] = 1e4
    after = tabular.cross_val_decisions(classifier, *samples, confounds=confounds)
    np.testing.assert_allclose(after[8:16], before[8:16], rtol=1e-9, atol=1e-12)
    assert np.isfinite(after).all()


def test_compare_scores_each_classifier_on_the_same_folds_of_whole_families(monkeypatch):
    """Twins share features and sex, which are otherwise unrelated: random folds leak."""
    rng = np.random.default_rng(0)
    features = rng.standard_normal((60, 4)).repeat(2, 0) + 0.1 * rng.standard_normal((120, 4))
    sex, families = rng.permutation([0, 1] * 30).repeat(2), np.arange(60).repeat(2).astype(str)
    classifiers = {"KNN": KNeighborsClassifier(1), "linear": LogisticRegression()}
    monkeypatch.setattr(tabular, "make_classifiers", lambda nested, largest: classifiers)
    apart = tabular.compare(make_table(features, sex), folds=5, seed=3)
    together = tabular.compare(make_table(features, sex, families), folds=5, seed=3)
    assert together["classifier"].tolist() == ["KNN", "linear"]
    assert apart["accuracy"][0] > 0.8
    assert 0.35 < together["accuracy"][0] < 0.65
    assignment = evaluation.folds(sex, groups=families, folds=5, seed=3)
    decisions = tabular.cross_val_decisions(classifiers["KNN"], features, sex, assignment)
    expected = evaluation.score(sex, decisions, assignment)
    assert together.drop(columns="classifier").loc[0].to_dict() == expected


@pytest.mark.filterwarnings("ignore:.*non-finite", "ignore:.*fits failed", "ignore:.*Scoring")
def test_with_permuted_labels_every_classifier_is_at_chance():
    """On 90 x 6, whose first features tell the sexes apart until labels change places."""
    rng = np.random.default_rng(4)
    sex = rng.permutation([0, 1] * 45)
    features = rng.standard_normal((90, 6)) + 1.5 * sex[:, None] * (np.arange(6) < 3)
    assert tabular.compare(make_table(features, sex), folds=3)["accuracy"].min() > 0.75
    permuted = make_table(features, evaluation.permuted_labels(sex, rng))
    scores = tabular.compare(permuted, folds=3).set_index("classifier")[["accuracy", "auc"]]
    assert set(scores.index) == set(NESTED)
    assert ((scores > 0.35) & (scores < 0.65)).all(axis=None)


@pytest.mark.parametrize("confounded", [False, True])
def test_voxel_svm_scales_and_regresses_inside_the_folds(tmp_path, confounded):
    rng = np.random.default_rng(3)
    _, sex, assignment = draw(36)
    head = rng.normal(1500 + 100 * sex, 80)[:, None]
    volumes = 0.3 + 0.05 * rng.standard_normal((36, 4, 3, 5)) + head[:, :, None, None] / 1e4
    volumes[:, :2] += 0.04 * sex[:, None, None, None]
    volumes[:, 3, 2] = 0
    np.save(tmp_path / "v.npy", volumes.astype(np.float32))
    mapped = np.load(tmp_path / "v.npy", mmap_mode="r")
    options = {"confounds": head} if confounded else {}
    decisions = tabular.voxel_svm(mapped, sex, assignment, **options)
    for fold in range(3):
        train, test = assignment != fold, assignment == fold
        values = np.asarray(mapped, float)
        values = values[:, values.mean(0) > 0.02]
        assert values.shape[1] == 55
        if confounded:
            design = np.column_stack([np.ones(36), head - head[train].mean()])
            values = values - design[:, 1:] @ np.linalg.lstsq(design[train], values[train])[0][1:]
        expected = expected_decisions("SVM", values, sex, train, test)
        np.testing.assert_allclose(decisions[test], expected, atol=1e-3)
