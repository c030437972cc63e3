"""Tables: what is loaded is what stands there. Classifiers: all is learnt from training folds."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.neighbors import KNeighborsClassifier
from sklearn.svm import SVC
from xgboost import XGBClassifier

from brainsex import cohort, evaluation, tabular

pytestmark = pytest.mark.usefixtures("in_process")

PLAIN = "Subject,Gender,FS_A,FS_B\n000001,F,1.5,10\n000002,M,2.5,20\n000003,F,,30\n"
HEAD = "Subject,Gender,A\n"


def load(folder: Path, content: str | bytes, **options: str) -> tabular.Table:
    """Write a table and load it."""
    folder.mkdir(exist_ok=True)
    path = folder / "t.csv"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return tabular.load(path, **options)


# --------------------------------------------------------------------------------------- load_table


def test_load_gives_numbers_sex_and_subjects(tmp_path, capsys):
    (tmp_path / "hcp").mkdir()
    (tmp_path / "hcp" / "SYNTHETIC").touch()
    table = load(tmp_path / "hcp", PLAIN)
    assert (len(table), table.name) == (3, "hcp (synthetic)")
    assert table.features.columns.tolist() == ["FS_A", "FS_B"]
    np.testing.assert_array_equal(table.features, [[1.5, 10], [2.5, 20], [np.nan, 30]])
    assert table.sex.tolist() == [0, 1, 0]
    assert table.sex.dtype == np.int64
    assert table.subjects.tolist() == ["000001", "000002", "000003"]
    assert (table.groups, table.release, table.notes) == (None, None, {})
    assert capsys.readouterr().out == "t.csv: 3 subjects, 2 features\n"


def test_load_reads_hcps_export(tmp_path, capsys):
    """A name twice, one misspelt, a constant, Release; blank lines, text and infinite values."""
    (tmp_path / "restricted.csv").write_text("Subject,Family_ID\n3,f1\n1,f1\n9,f9\n")
    table = load(
        tmp_path,
        "Subject,Release,Gender,FS_InterCranial_Vol,FS_Same,FS_V,FS_V,note,empty,huge\n\n"
        "1,S500,F,5,7,1,11,good,,1e999\n2,S900,M,6,7,2,12,2 of 3,,3\n\n3,,F,7,7,3,13,,,4\n"
        "4,S900,,8,7,4,14,,,5\n5,S900,F,,,,,,,\n",
    )
    expected = {tabular.INTRACRANIAL: [5, 6, 7], "FS_V": [1, 2, 3], "FS_V (2)": [11, 12, 13]}
    expected = pd.DataFrame(expected | {"huge": [np.nan, 3, 4]}, dtype=float)
    pd.testing.assert_frame_equal(table.features, expected)
    assert table.release.tolist() == ["S500", "S900", ""]
    assert table.groups[0] == table.groups[2] == "f1"
    assert table.groups[1] not in ("f1", "f9", "nan")
    assert table.notes == {
        "second of a name": ("FS_V (2)",),
        "text, dropped": ("note",),
        "blank or the same for everybody, dropped": ("FS_Same", "empty"),
        "lines without a sex or measure, left out": ("7", "8"),
    }
    assert "  text, dropped: note (1)\n" in capsys.readouterr().out


def test_the_other_spelling_is_kept(tmp_path):
    both = "Subject,Gender,FS_InterCranial_Vol,FS_IntraCranial_Vol\n1,F,3,5\n2,M,4,6\n"
    assert load(tmp_path, both).features["FS_IntraCranial_Vol"].tolist() == [5, 6]


@pytest.mark.parametrize(
    ("women", "men"),
    [("F", "M"), ("Female", " MALE "), ("w", "man"), ("0", "1"), ("2", "1"), ("2.0", "1.0")],
)
def test_load_knows_the_codes_of_sex(tmp_path, women, men):
    table = load(tmp_path, f"{HEAD}1,{women},1\n2,{men},2\n3,,3\n4,{women},4\n")
    assert table.sex.tolist() == [0, 1, 0]
    assert table.features["A"].tolist() == [1, 2, 4]
    assert table.features.index.tolist() == [0, 1, 2]


@pytest.mark.parametrize(
    ("header", "options"),
    [
        ("subject,gender", {}),
        ("eid,Sex", {}),
        ("participant_id\tsex", {}),
        (" Subject ; Gender ", {}),
        ("code,biological sex", {"subject": "code", "sex": "biological sex"}),
        ("Subject,Gender,Release,Release,sex", {}),  # none of them is a feature
    ],
)
def test_load_finds_the_columns(tmp_path, header, options):
    separator = max(",;\t", key=header.count)
    more = 3 * ("Release" in header)
    people = [["007", "F", *["2"] * more, "1"], ["008", "M", *["1"] * more, "2"]]
    lines = [f"{header}{separator}A", *map(separator.join, people)]
    table = load(tmp_path, "\r\n".join(lines), **options)
    assert table.subjects.tolist() == ["007", "008"]
    assert table.features.columns.tolist() == ["A"]


@pytest.mark.parametrize(
    ("content", "options", "message"),
    [
        ("Subject,A\n1,2\n", {}, "expected one column Gender, found Subject, A; name it"),
        ("Subject,Sex,SEX,A\n1,F,F,2\n", {}, "one column Gender, found Sex, SEX"),
        ("Subject,Gender,Gender,A\n1,F,F,2\n2,M,M,3\n", {}, r"found Gender, Gender \(2\)"),
        ("Subject,sex,sex,A\n1,1,1,3\n2,2,2,4\n", {}, "one column Gender"),
        ("eid,participant_id,Gender\n1,1,F\n", {}, "found eid, participant_id"),
        ("Subject,sex,A\n1,F,2\n", {"sex": "Geschlecht"}, "Geschlecht, found Subject, sex"),
        (HEAD + "1,F,1\n2,M,2\n3,X,3\n", {}, "column Gender, line 4: expected M, F .*'X'"),
        (HEAD + "1,0,1\n2,1,2\n3,2,3\n", {}, "column Gender, line 2: expected M, F .* or 0 and"),
        (HEAD + "1,F,1\n2,F,2\n", {}, "expected both sexes in Gender, found {0}"),
        (HEAD + "1,,1\n2,,2\n", {}, "no column of numbers"),
        (HEAD + "1,F,1\n2,M,2\n 1,F,3\n", {}, "no more than one row, found '1'"),
        (HEAD + "1,F,1\n,M,2\n", {}, "line 3"),
        (
            HEAD + "1,F,1\n\n2,M,2\n\n3,F,?\n",
            {},
            r"column A, line 6: expected a number, found '\?'",
        ),
        ((HEAD + "1,F,1\n2,M,x\n").replace("\n", "\r"), {}, "column A, line 3: .*'x'"),
        ("Subject,Gender,note\n1,F,a\n2,M,b\n", {}, "no column of numbers beside Subject and Gen"),
        ("Subject,Gender,Release\n1,F,1\n2,M,2\n", {}, "no column of numbers"),
        (HEAD + "1,F,5\n2,M,5\n", {}, "no column of numbers"),
        (b"", {}, "expected a CSV table"),
    ],
)
def test_load_refuses(tmp_path, content, options, message):
    with pytest.raises(ValueError, match=message) as error:
        load(tmp_path, content, **options)
    assert str(error.value).startswith(str(tmp_path / "t.csv"))


def test_a_subset_is_those_subjects():
    table = make_table(*draw(12)[:2], groups=np.array(list("aabbccddeeff")))
    subset = tabular.subset_table(table, np.array([7, 2]))
    assert subset.subjects.tolist() == ["7", "2"]
    assert subset.groups.tolist() == ["d", "b"]
    assert subset.release is None
    np.testing.assert_array_equal(subset.features, table.features.iloc[[7, 2]])
    assert subset.features.index.tolist() == [0, 1]
    assert subset.sex.tolist() == table.sex[[7, 2]].tolist()


# ---------------------------------------------------------------------------------------- decisions

PUBLISHED = tabular.published_classifiers() | {"KNN": tabular.nearest_neighbours(9)}
NESTED = tabular.nested_cv_classifiers()


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
    return tabular.Table("t", frame, sex, np.arange(len(sex)).astype(str), groups, None, {})


def standardise(values: np.ndarray, train: np.ndarray) -> np.ndarray:
    """In float64, on the training rows, blanks their mean."""
    scaled = (values - np.nanmean(values[train], 0)) / np.nanstd(values[train], 0)
    return np.where(np.isnan(values), 0, scaled)


def expected_decisions(
    name: str, values: np.ndarray, sex: np.ndarray, train: np.ndarray, test: np.ndarray
) -> np.ndarray:
    """The decisions by scikit-learn or XGBoost themselves."""
    if name == "XGBoost":
        fitted = XGBClassifier(learning_rate=0.5, random_state=0, n_jobs=1).fit(
            values[train], sex[train]
        )
        return fitted.predict_proba(values[test])[:, 1] - 0.5
    values = standardise(values, train)
    if name == "KNN":
        fitted = KNeighborsClassifier(9).fit(values[train], sex[train])
        return fitted.predict_proba(values[test])[:, 1] - 0.5
    fitted = SVC() if name == "SVM" else LogisticRegression(max_iter=1000)
    return fitted.fit(values[train], sex[train]).decision_function(values[test])


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


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_feature_that_is_the_confound_says_nothing_and_an_empty_one_does_no_harm(name):
    """Even the rounding that regression leaves could be read by a tree."""
    _, sex, assignment = draw(90)
    confounds = (
        np.random.default_rng(2).normal([1.5e6, 28], [1e5, 3], (90, 2)) + [2e5, 1] * sex[:, None]
    )
    blank = np.where(assignment == 0, 3, np.nan)  # in all training rows of a fold
    values = np.column_stack([confounds, confounds.sum(1), 1e-6 * confounds[:, 0] + 3, blank])
    samples = values, sex, assignment
    decisions = tabular.cross_val_decisions(PUBLISHED[name], *samples, confounds=confounds)
    assert np.ptp(decisions[assignment == 0]) < 1e-9
    decisions = tabular.cross_val_decisions(PUBLISHED[name], *samples)
    assert np.isfinite(decisions).all()


def test_compare_scores_each_classifier_on_the_same_folds_of_whole_families():
    """Twins share features and sex, which are otherwise unrelated: random folds leak."""
    rng = np.random.default_rng(0)
    features = rng.standard_normal((60, 4)).repeat(2, 0) + 0.1 * rng.standard_normal((120, 4))
    sex, families = rng.permutation([0, 1] * 30).repeat(2), np.arange(60).repeat(2).astype(str)
    classifiers = {"KNN": tabular.nearest_neighbours(1), "linear": LogisticRegression()}
    options = {"folds": 5, "seed": 3, "classifiers": classifiers}
    apart = tabular.compare(make_table(features, sex), **options)
    together = tabular.compare(make_table(features, sex, families), **options)
    assert together["classifier"].tolist() == ["KNN", "linear"]
    assert apart["accuracy"][0] > 0.8
    assert 0.35 < together["accuracy"][0] < 0.65
    assignment = evaluation.folds(sex, groups=families, folds=5, seed=3)
    decisions = tabular.cross_val_decisions(classifiers["KNN"], features, sex, assignment)
    expected = evaluation.score(sex, decisions, assignment)
    assert together.drop(columns="classifier").loc[0].to_dict() == expected


def test_table_decisions_have_the_assignments_shape():
    values, sex, _ = draw()
    assignment = np.stack([evaluation.folds(sex, folds=3, seed=seed) for seed in (0, 1)])
    linear = {"linear": PUBLISHED["logistic regression"]}
    decisions = tabular.table_decisions(make_table(values, sex), assignment, classifiers=linear)
    for folds, repetition in zip(assignment, decisions["linear"]):
        expected = tabular.cross_val_decisions(linear["linear"], values, sex, folds)
        np.testing.assert_array_equal(repetition, expected)
    decisions = tabular.table_decisions(make_table(values, sex), folds, classifiers=linear)
    assert decisions["linear"].shape == (60,)


@pytest.mark.filterwarnings("ignore:.*non-finite", "ignore:.*fits failed", "ignore:.*Scoring")
@pytest.mark.parametrize("classifiers", [NESTED, PUBLISHED], ids=["nested", "published"])
def test_with_permuted_labels_every_classifier_is_at_chance(classifiers):
    """On 90 x 6, whose first features tell the sexes apart until labels change places."""
    rng = np.random.default_rng(4)
    sex = rng.permutation([0, 1] * 45)
    features = rng.standard_normal((90, 6)) + 1.5 * sex[:, None] * (np.arange(6) < 3)
    options = {"folds": 3, "classifiers": classifiers}
    assert tabular.compare(make_table(features, sex), **options)["accuracy"].min() > 0.75
    permuted = make_table(features, evaluation.permuted_labels(sex, rng))
    scores = tabular.compare(permuted, **options).set_index("classifier")[["accuracy", "auc"]]
    assert set(scores.index) == set(classifiers)
    assert ((scores > 0.35) & (scores < 0.65)).all(axis=None)


def test_one_search_serves_every_k():
    values, sex, assignment = draw(78)
    values[::7, 1] = np.nan
    decisions = tabular.neighbour_sweep(values, sex, assignment, largest=50)
    assert decisions.shape == (50, 78)
    for k in (1, 2, 3, 8, 25, 50):  # an even k may tie: a woman, as in scikit-learn
        for fold in range(3):
            train, test = assignment != fold, assignment == fold
            scaled = standardise(values, train)
            fitted = KNeighborsClassifier(k).fit(scaled[train], sex[train])
            share = fitted.predict_proba(scaled[test])[:, 1]
            np.testing.assert_allclose(decisions[k - 1, test], share - 0.5, atol=1e-12)
            np.testing.assert_array_equal(decisions[k - 1, test] > 0, fitted.predict(scaled[test]))
    with pytest.raises(ValueError, match="n_neighbors"):
        tabular.neighbour_sweep(values, sex, assignment, largest=53)


# -------------------------------------------------------------------------------------- importances

COLUMNS = ["Region_name", "Importance", "spread", "higher_in", "permutation", "permutation_spread"]


def planted_features() -> tuple[pd.DataFrame, np.ndarray, np.ndarray]:
    """FS_3 is larger in men, FS_1 somewhat smaller; FS_5 has blanks."""
    rng = np.random.default_rng(0)
    sex = rng.permutation([0, 1] * 45)
    values = rng.standard_normal((90, 6))
    values[:, 3] += 2.5 * sex
    values[:, 1] -= 1.2 * sex
    values[::9, 5] = np.nan
    return make_table(values * 50 + 900, sex).features, sex, evaluation.folds(sex, folds=3)


@pytest.mark.parametrize("name", ["XGBoost", "logistic regression"])
def test_importances_are_the_mean_over_folds_and_their_spread(name):
    features, sex, assignment = planted_features()
    table = tabular.importances(PUBLISHED[name], features, sex, assignment)
    assert table.columns.tolist() == COLUMNS
    assert table["Region_name"].tolist()[:2] == ["FS_3", "FS_1"]
    weights = []
    for train in (assignment != fold for fold in range(3)):
        values = features.to_numpy()
        if name == "XGBoost":
            fitted = XGBClassifier(learning_rate=0.5, random_state=0, n_jobs=1).fit(
                values[train], sex[train]
            )
            weights.append(fitted.feature_importances_)
        else:
            scaled = standardise(values, train)[train]
            weights.append(
                np.abs(LogisticRegression(max_iter=1000).fit(scaled, sex[train]).coef_[0])
            )
    order = np.argsort(-np.mean(weights, 0))
    assert table["Region_name"].tolist() == [f"FS_{n}" for n in order]
    np.testing.assert_allclose(table["Importance"], np.mean(weights, 0)[order], rtol=1e-4)
    np.testing.assert_allclose(table["spread"], np.std(weights, 0, ddof=1)[order], rtol=1e-3)
    difference = features[sex == 1].mean() - features[sex == 0].mean()
    higher = np.where(difference[table["Region_name"]] > 0, "men", "women")
    assert table["higher_in"].tolist() == higher.tolist()
    assert table["permutation"].idxmax() == 0


def test_permutation_costs_the_auc_that_it_costs_by_hand(monkeypatch):
    """Not the same permutations: many of them."""
    monkeypatch.setattr(tabular, "STRONGEST", 2)
    monkeypatch.setattr(tabular, "REPEATS", 40)
    features, sex, assignment = planted_features()
    classifier = PUBLISHED["logistic regression"]
    table = tabular.importances(classifier, features, sex, assignment)
    for column in ("permutation", "permutation_spread"):
        assert table[column].notna().tolist() == [True] * 2 + [False] * 4
    rng, losses = np.random.default_rng(9), np.zeros((3, 2))
    for fold in range(3):
        train, test = assignment != fold, assignment == fold
        scaled = standardise(features.to_numpy(), train)
        weights = LogisticRegression(max_iter=1000).fit(scaled[train], sex[train]).coef_[0]
        auc = roc_auc_score(sex[test], scaled[test] @ weights)
        for n, column in enumerate((3, 1)):
            permuted = np.tile(scaled[test], (40, 1, 1))
            permuted[..., column] = rng.permuted(permuted[..., column], axis=1)
            lost = [auc - roc_auc_score(sex[test], sample @ weights) for sample in permuted]
            losses[fold, n] = np.mean(lost)
    np.testing.assert_allclose(table["permutation"][:2], losses.mean(0), atol=0.03)
    np.testing.assert_allclose(table["permutation_spread"][:2], losses.std(0, ddof=1), atol=0.03)
    monkeypatch.setattr(tabular, "REPEATS", 1)
    samples = classifier, features, sex, assignment
    once, again, other = (tabular.importances(*samples, seed=seed) for seed in (0, 0, 1))
    pd.testing.assert_frame_equal(once, again)
    assert (once["permutation"] != other["permutation"])[:2].all()


def test_importances_of_a_column_blank_in_training_and_of_a_classifier_that_weighs_nothing():
    features, sex, assignment = planted_features()
    features["FS_0"] = features["FS_0"].where(assignment == 0)
    for name in ("XGBoost", "logistic regression"):
        table = tabular.importances(PUBLISHED[name], features, sex, assignment)
        assert table["Region_name"].tolist()[:2] == ["FS_3", "FS_1"]
        assert np.isfinite(table["Importance"]).all()
    with pytest.raises(AttributeError, match="importances"):
        tabular.importances(PUBLISHED["SVM"], features, sex, assignment)


@pytest.mark.parametrize("confounded", [False, True])
def test_voxel_svm_masks_scales_and_regresses_inside_the_folds(tmp_path, confounded):
    rng = np.random.default_rng(3)
    _, sex, assignment = draw(36)
    head = rng.normal(1500 + 100 * sex, 80)[:, None]
    volumes = 0.3 + 0.05 * rng.standard_normal((36, 4, 3, 5)) + head[:, :, None, None] / 1e4
    volumes[:, :2] += 0.04 * sex[:, None, None, None]
    volumes[:, 3, 2] = 0
    volumes[assignment == 1, 3, 2] = 0.9  # brain in one fold only: its mean exceeds 0.02 elsewhere
    np.save(tmp_path / "v.npy", volumes.astype(np.float32))
    mapped = np.load(tmp_path / "v.npy", mmap_mode="r")
    people = np.arange(36).astype(str), None, None, pd.DataFrame()
    data = cohort.Cohort("c", False, mapped, sex, *people)
    options = {"confounds": head} if confounded else {}
    decisions = tabular.voxel_svm(data, assignment, **options)
    for fold in range(3):
        train, test = assignment != fold, assignment == fold
        values = np.asarray(mapped, float)
        values = values[:, values[train].mean(0) > 0.02]
        assert values.shape[1] == (55 if fold == 1 else 60)
        if confounded:
            design = np.column_stack([np.ones(36), head - head[train].mean()])
            values = values - design[:, 1:] @ np.linalg.lstsq(design[train], values[train])[0][1:]
        expected = expected_decisions("SVM", values, sex, train, test)
        np.testing.assert_allclose(decisions[test], expected, atol=1e-3)
