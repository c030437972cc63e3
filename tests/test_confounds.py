"""Confounds: what is matched is alike, what is regressed out is what the training rows explain."""

import dataclasses

import numpy as np
import pandas as pd
import pytest
from scipy.sparse import csr_array
from scipy.sparse.csgraph import maximum_bipartite_matching

from brainsex import classifiers, population, synthetic, tabular
from brainsex.confounds import Residuals, columns, matched

# ---------------------------------------------------------------------------------------- columns

pytestmark = pytest.mark.usefixtures("in_process")


def test_columns_are_numbers_or_one_per_category():
    table = pd.DataFrame(
        {"age": [22, 31, 25, 29], "site": ["a", "b", "c", "b"], "moved": [True, False, True, True]}
    )
    found = columns(table, ["age", "site"])
    assert found.dtype == float
    np.testing.assert_array_equal(found, [[22, 0, 0], [31, 1, 0], [25, 0, 1], [29, 1, 0]])
    np.testing.assert_array_equal(columns(table, ("moved",)), [[1], [0], [1], [1]])
    np.testing.assert_array_equal(
        columns(table.astype({"site": "category"}), ["site"]), found[:, 1:]
    )


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["age", "height", "weight"], r"no column height, weight: there are age, blank, "),
        (["blank"], r"confound blank is blank for 2 of 4 subjects"),
        (["infinite"], r"confound infinite is blank for 1 of 4 subjects"),
        (["age", "same"], r"confound same is the same for everybody"),
        (["one site"], r"confound one site is the same for everybody"),
        (["some sites"], r"confound some sites is blank for 1 of 4 subjects"),
    ],
)
def test_columns_refuses(names, message):
    table = pd.DataFrame(
        {
            "age": [22, 31, 25, 29],
            "blank": [1, np.nan, 2, np.nan],
            "infinite": [1, 2, np.inf, 4],
            "same": [3, 3, 3, 3],
            "one site": ["a"] * 4,
            "some sites": ["a", None, "b", "a"],
        }
    )
    with pytest.raises(ValueError, match=message):
        columns(table, names)


# -------------------------------------------------------------------------------------- Residuals


def expected(values, confounds, train):
    """In float64: values less (confounds - their training mean) · b, b by least squares."""
    flat = np.asarray(values, float).reshape(len(values), -1)
    design = np.column_stack([np.ones(len(train)), confounds[train]])
    b = np.linalg.lstsq(design, flat[train], rcond=None)[0][1:]
    return (flat - (confounds - confounds[train].mean(0)) @ b).reshape(np.shape(values))


def draws(count=90, seed=0):
    """Two confounds on other scales, and five features that follow them."""
    rng = np.random.default_rng(seed)
    confounds = rng.normal([1.5e6, 28], [1.2e5, 4], (count, 2))
    slopes = rng.normal(0, [[1e-5], [0.3]], (2, 5))
    return rng.standard_normal((count, 5)) + confounds @ slopes + 7, confounds


@pytest.mark.parametrize("rows", [np.arange(60), np.arange(70)[::-1][:65], np.arange(89)])
def test_residuals_are_those_of_least_squares(rows):
    values, confounds = draws()
    found = Residuals(values, confounds, rows)
    assert len(found) == 90
    assert found.shape == (90, 5)
    assert found[:].dtype == np.float64
    np.testing.assert_allclose(found[:], expected(values, confounds, rows), rtol=1e-9)
    # the mean stays, what the confounds explain does not
    np.testing.assert_allclose(found[rows].mean(0), values[rows].mean(0), rtol=1e-9)
    assert np.abs(np.corrcoef(np.c_[found[rows], confounds[rows]].T)[5:, :5]).max() < 1e-8
    one = Residuals(values, confounds[:, 1], rows)  # (N,)
    np.testing.assert_allclose(one[:], expected(values, confounds[:, 1:], rows), rtol=1e-9)


def test_residuals_of_memory_mapped_volumes(tmp_path):
    _, confounds = draws()
    rng = np.random.default_rng(3)
    volumes = 0.3 + 1e-7 * confounds[:, 0, None, None, None] * rng.random((4, 3, 2))
    volumes = (volumes + 0.01 * rng.standard_normal((90, 4, 3, 2))).astype(np.float32)
    np.save(tmp_path / "v.npy", volumes)
    mapped = np.load(tmp_path / "v.npy", mmap_mode="r")
    train = np.flatnonzero(np.arange(90) % 5 != 2)
    found = Residuals(mapped, confounds, train)
    assert found.shape == (90, 4, 3, 2)
    wanted = expected(volumes, confounds, train)
    for rows in (7, [3, 88, 2], slice(10, 20), np.arange(90) % 5 == 2):
        assert found[rows].dtype == np.float32
        np.testing.assert_allclose(found[rows], wanted[rows], atol=2e-6)
    np.testing.assert_array_equal(mapped, volumes)


def test_residuals_of_whole_numbers_are_no_whole_numbers():
    _, confounds = draws()
    counts = np.random.default_rng(0).poisson(9, (90, 3))
    found = Residuals(counts, confounds, np.arange(50))[:]
    np.testing.assert_allclose(found, expected(counts, confounds, np.arange(50)), atol=1e-5)


def test_residuals_learn_from_training_rows_alone():
    values, confounds = draws()
    train, test = np.arange(60), np.arange(60, 90)
    before = Residuals(values, confounds, train)[:80]
    values[80:], confounds[80:] = -1e6, 1e9
    np.testing.assert_array_equal(Residuals(values, confounds, train)[:80], before)
    values[test] = np.nan
    assert np.isfinite(Residuals(values, confounds, train).coefficients).all()


def test_residuals_read_a_row_when_it_is_asked_for():
    class Counting:
        shape = (90, 5)

        def __init__(self):
            self.read = []

        def __len__(self):
            return 90

        def __getitem__(self, rows):
            self.read.extend(np.arange(90)[rows].ravel())
            return values[rows]

    values, confounds = draws()
    counting = Counting()
    found = Residuals(counting, confounds, np.arange(70))
    assert sorted(counting.read) == list(range(70))
    found[[80, 3]]
    assert counting.read[70:] == [80, 3]


def test_a_category_nobody_in_training_has_explains_nothing():
    values, confounds = draws()
    site = np.zeros((90, 1))
    site[85:] = 1
    train = np.arange(80)
    found = Residuals(values, np.hstack([confounds, site]), train)[:]
    np.testing.assert_allclose(found, Residuals(values, confounds, train)[:], rtol=1e-9)


@pytest.mark.parametrize("constant", [0.1, 1.7, 2.9, 22.3, 1e6 / 3])
def test_a_confound_everybody_in_training_shares_explains_nothing(constant):
    """Its standard deviation is rounding, such as 3e-17, and no scale."""
    values, confounds = draws()
    shared = np.full((90, 1), constant)
    shared[85:] = 2 * constant
    train = np.arange(80)
    found = Residuals(values, np.hstack([confounds, shared]), train)[:]
    np.testing.assert_allclose(found, Residuals(values, confounds, train)[:], rtol=1e-6)


def test_collinear_confounds_do_no_harm():
    values, confounds = draws()
    train = np.arange(60)
    twice = np.hstack([confounds, confounds @ [[1e-5], [0.2]]])
    found = Residuals(values, twice, train)[:]
    np.testing.assert_allclose(found, Residuals(values, confounds, train)[:], rtol=1e-6)


# ---------------------------------------------------------------------------------------- matched


def most_pairs(near):
    """Size of a maximum matching, by trying everything: rows women, columns men."""
    if not len(near):
        return 0
    rest = [most_pairs(np.delete(near[1:], man, 1)) + 1 for man in np.flatnonzero(near[0])]
    return max([most_pairs(near[1:]), *rest])


def least_apart(apart, near, count):
    """Least sum over `count` pairs, by trying everything."""
    if not count:
        return 0
    if not len(near):
        return np.inf
    rest = [
        apart[0, man] + least_apart(*(np.delete(a[1:], man, 1) for a in (apart, near)), count - 1)
        for man in np.flatnonzero(near[0])
    ]
    return min([least_apart(apart[1:], near[1:], count), *rest])


@pytest.mark.parametrize("confounds", [1, 2])
@pytest.mark.parametrize("seed", range(6))
def test_matched_finds_as_many_pairs_as_there_are_and_the_closest(seed, confounds):
    rng = np.random.default_rng(seed)
    sex = rng.permutation([0] * 5 + [1] * 6)
    values = rng.standard_normal((11, confounds)) * [1, 300][:confounds] + sex[:, None]
    caliper = 0.5
    scaled = values / values.std(0)
    difference = np.abs(scaled[sex == 0][:, None] - scaled[sex == 1])
    near, apart = (difference <= caliper).all(-1), (difference**2).sum(-1)
    if not near.any():
        with pytest.raises(ValueError, match=r"within 0\.5 standard deviations"):
            matched(sex, values, caliper=caliper)
        return
    found = matched(sex, values, caliper=caliper)
    assert (np.diff(found) > 0).all()
    women, men = found[sex[found] == 0], found[sex[found] == 1]
    assert len(women) == len(men) == most_pairs(near)
    at = np.flatnonzero(sex == 0).searchsorted(women), np.flatnonzero(sex == 1).searchsorted(men)
    among = near[np.ix_(*at)], apart[np.ix_(*at)]
    assert most_pairs(among[0]) == len(women)  # within the caliper of each other, one to one
    closest = least_apart(apart, near, len(women))
    assert least_apart(among[1], among[0], len(women)) == pytest.approx(closest)


def test_matched_prefers_more_pairs_to_closer_ones():
    """The closest pair, 4 and 4, would leave 0 and 8 without one."""
    sex, size = [0, 0, 1, 1, 0, 1], [0.0, 4, 4, 8, 100, 200]
    found = matched(np.array(sex), np.array(size), caliper=4.01 / np.std(size))
    assert found.tolist() == [0, 1, 2, 3]


def test_matched_men_and_women_are_alike():
    rng = np.random.default_rng(0)
    sex = rng.permutation([0, 1] * 150)
    head = rng.normal(1.45e6 + 1.7e5 * sex, 1.1e5)
    age = rng.normal(29 - sex, 3.5)
    found = matched(sex, np.column_stack([head, age]), caliper=0.2)
    assert 60 < len(found) < 300
    assert sex[found].mean() == 0.5
    for values in (head, age):
        groups = [values[found][sex[found] == label] for label in (0, 1)]
        assert abs(np.mean(groups[1]) - np.mean(groups[0])) < 0.1 * values.std()
    np.testing.assert_array_equal(found, matched(sex, np.column_stack([head, age]), caliper=0.2))
    assert len(matched(sex, head, caliper=0.02)) < len(matched(sex, head, caliper=0.1))


def test_matched_takes_a_category_as_it_is():
    """Of one site only women, of another only men."""
    sex, site = np.array([0, 0, 0, 1, 1, 1]), ["a", "a", "b", "b", "b", "c"]
    confounds = columns(pd.DataFrame({"site": site}), ["site"])
    assert len(matched(sex, confounds)) == 2
    assert 2 in matched(sex, confounds)


def test_matched_within_folds_pairs_nobody_across_them():
    rng = np.random.default_rng(0)
    sex = rng.permutation([0, 1] * 60)
    size = rng.normal(sex, 1)
    folds = rng.integers(0, 4, 120)
    found = matched(sex, size, caliper=0.1, within=folds)
    assert (np.diff(found) > 0).all()
    near = np.abs(size[sex == 0][:, None] - size[sex == 1]) <= 0.1 * size.std()
    for fold in range(4):
        rows = found[folds[found] == fold]
        assert sex[rows].mean() == 0.5
        each = near[np.ix_(folds[sex == 0] == fold, folds[sex == 1] == fold)]
        assert len(rows) == 2 * (maximum_bipartite_matching(csr_array(each)) >= 0).sum()
    assert len(found) < len(matched(sex, size, caliper=0.1))


def test_a_pair_across_folds_scores_below_chance():
    """The nearest in training is the pair, who is of the other sex."""
    sex, where = np.repeat([0, 1], 150), np.tile(np.arange(5), 60)
    size = np.random.default_rng(1).normal(sex, 1)
    found = {}
    for within in (None, where):
        rows = matched(sex, size, caliper=0.05, within=within)
        decision = classifiers.cross_predict(
            classifiers.neighbours(1), size[rows, None], sex[rows], where[rows]
        )
        found[within is None] = ((decision > 0) == sex[rows]).mean()
    assert found[True] < 0.42
    assert 0.42 < found[False] < 0.58


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("constant", [0.1, 3.0])
def test_a_confound_that_is_the_same_for_everybody_parts_nobody(constant):
    """As it may be in a subsample."""
    size = np.array([1.0, 2, 3, 1, 2, 9])
    found = matched(np.array([0, 0, 0, 1, 1, 1]), np.column_stack([size, np.full(6, constant)]))
    assert found.tolist() == [0, 1, 3, 4]


@pytest.mark.parametrize(
    ("sex", "size", "caliper", "message"),
    [
        ([0, 0, 1, 1], [1, 2, 8, 9], 0.1, "no man and woman within 0.1 standard deviations"),
        ([0, 0, 0], [1, 2, 3], 5, "no man and woman within 5 standard deviations"),
        ([0, 1, 0, 1], [1, np.nan, 3, 3], 0.1, "blank|finite"),
    ],
)
def test_matched_refuses(sex, size, caliper, message):
    with pytest.raises(ValueError, match=message):
        matched(np.array(sex), np.array(size, float), caliper=caliper)


# --------------------------------------------------------------------------- what they bring about


def table_of(sex, features):
    """A table as `tabular.load` gives it."""
    names = [f"FS_{n}" for n in range(features.shape[1])]
    frame = pd.DataFrame(features, columns=names)
    subjects = np.arange(len(sex)).astype(str)
    return tabular.Table("heads (synthetic)", frame, sex, subjects, None, None, {})


def heads(seed, *, local, people=300):
    """Sex, head size, and 12 features that follow it, each with an exponent and noise of its own.

    With a local effect, two more differ between the sexes and have nothing to do with head size.
    """
    rng = np.random.default_rng(seed)
    sex = rng.permutation([0, 1] * (people // 2))
    head = rng.normal(1 + 0.12 * sex, 0.075)
    noise = 0.05 * rng.standard_normal((people, 12))
    features = head[:, None] ** rng.uniform(0.5, 1.2, 12) + noise
    if local:
        features = np.hstack([features, rng.standard_normal((people, 2)) + 1.5 * sex[:, None]])
    return sex, head, features


def areas(sex, features, confounds=None):
    """AUC of each of the four classifiers, settings fixed, over five folds."""
    chosen = {**classifiers.as_published(), "KNN": classifiers.neighbours(15)}
    chosen["XGBoost"] = classifiers.boosted_trees(n_estimators=20)
    found = tabular.compare(table_of(sex, features), folds=5, chosen=chosen, confounds=confounds)
    return found.set_index("classifier")["auc"]


@pytest.mark.parametrize("local", [False, True])
def test_matching_leaves_chance_of_heads_and_keeps_what_is_local(local):
    sex, head, features = heads(0, local=local)
    assert areas(sex, features).min() > 0.72
    rows = matched(sex, head)
    assert len(rows) > 120
    found = areas(sex[rows], features[rows])
    if local:
        assert found.min() > 0.7
    else:
        assert found.between(0.4, 0.6).all(), found


@pytest.mark.parametrize("local", [False, True])
def test_regression_leaves_a_linear_classifier_chance_of_heads_and_what_is_local(local):
    sex, head, features = heads(1, local=local)
    found = areas(sex, features, confounds=head[:, None])
    if local:  # less than before: what head size predicts of it is gone too
        assert found.min() > 0.65
    else:
        assert 0.42 < found["logistic regression"] < 0.58


def test_a_confound_alone_is_a_classifier_until_it_is_matched():
    sex, head, _ = heads(2, local=False)
    everybody = areas(sex, head[:, None])
    rows = matched(sex, head)
    assert everybody["logistic regression"] > 0.8
    assert areas(sex[rows], head[rows, None]).between(0.35, 0.65).all()


@pytest.mark.soak
@pytest.mark.parametrize("effect", [0, 1])
def test_controls_recover_what_was_planted_in_freesurfer_s_table(tmp_path, effect):
    """1113 x 935, settings chosen inside; effect 0 plants head size and nothing else."""
    people = population.draw(1, 0)
    path = tmp_path / "unrestricted_hcp_freesurfer.csv"
    synthetic.freesurfer_table(people, effect=effect).to_csv(path, index=False)
    people.restricted.to_csv(tmp_path / "restricted.csv", index=False)
    table = tabular.load(path)
    head = table.features[[tabular.INTRACRANIAL]].to_numpy()
    rows = matched(table.sex, head)
    fewer = {name: getattr(table, name)[rows] for name in ("sex", "subjects", "groups", "release")}
    alike = dataclasses.replace(table, features=table.features.iloc[rows], **fewer)
    everybody = tabular.compare(table, folds=5).set_index("classifier")
    after = tabular.compare(alike, folds=5).set_index("classifier")
    linear = {"logistic regression": classifiers.chosen_inside()["logistic regression"]}
    regressed = tabular.compare(table, folds=5, chosen=linear, confounds=head)
    for name, found in (("all", everybody), ("matched", after), ("regressed", regressed)):
        print(f"effect {effect}, {name}\n{found.round(3).to_string()}")
    assert everybody["auc"].min() > 0.75
    if effect:
        assert after["auc"].min() > 0.6
        assert regressed["auc"].min() > 0.7
    else:
        assert (after["low"] < 0.5).all()
        assert after["auc"].between(0.4, 0.6).all()
        assert regressed["auc"].between(0.42, 0.58).all()


def test_text_that_is_all_numbers_is_numbers():
    table = pd.DataFrame({"age": ["29", "31", "27"], "band": ["22-25", "26-30", "22-25"]})
    found = columns(table, ["age", "band"])
    np.testing.assert_array_equal(found, [[29, 0], [31, 1], [27, 0]])
