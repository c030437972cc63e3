"""Confounds: what is matched is alike, what is regressed out is what the training rows explain."""

from itertools import permutations

import numpy as np
import pandas as pd
import pytest
from scipy.sparse import csr_array
from scipy.sparse.csgraph import maximum_bipartite_matching
from sklearn.base import clone
from sklearn.linear_model import LogisticRegression

from brainsex.confounds import (
    ConfoundRegressor,
    RegressedVolumes,
    confound_matrix,
    matched_rows,
)
from brainsex.evaluation import folds
from brainsex.tabular import cross_val_decisions

pytestmark = pytest.mark.usefixtures("in_process")

TABLE = pd.DataFrame(
    {
        "age": [22, 31, 25, 29],
        "site": ["a", "b", "c", "b"],
        "moved": [True, False, True, True],
        "years": ["29", "31", "27", "30"],  # text that is all numbers
        "blank": [1, np.nan, 2, np.nan],
        "infinite": [1, 2, np.inf, 4],
        "same": [3, 3, 3, 3],
    }
)


def test_confounds_are_numbers_or_one_column_per_category():
    matrix = confound_matrix(TABLE, ["age", "site", "years"])
    assert matrix.dtype == float
    expected = [[22, 29, 0, 0], [31, 31, 1, 0], [25, 27, 0, 1], [29, 30, 1, 0]]
    np.testing.assert_array_equal(matrix, expected)
    np.testing.assert_array_equal(confound_matrix(TABLE, ("moved",)), [[1], [0], [1], [1]])


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["age", "height"], "confound height .*found 4 blanks and 0 values"),
        (["blank"], "confound blank .*found 2 blanks and 2 values"),
        (["infinite"], "confound infinite .*found 1 blanks and 3 values"),
        (["age", "same"], "confound same .*found 0 blanks and 1 values"),
    ],
)
def test_confound_matrix_refuses(names, message):
    with pytest.raises(ValueError, match=message):
        confound_matrix(TABLE, names)


# ------------------------------------------------------------------------------------- regression


def least_squares(values: np.ndarray, confounds: np.ndarray, train: np.ndarray) -> np.ndarray:
    """In float64: values less (confounds - their training mean) · b, b by least squares."""
    flat = np.asarray(values, float).reshape(len(values), -1)
    design = np.column_stack([np.ones(len(train)), confounds[train]])
    b = np.linalg.lstsq(design, flat[train], rcond=None)[0][1:]
    return (flat - (confounds - confounds[train].mean(0)) @ b).reshape(np.shape(values))


def draw(count: int = 90) -> tuple[np.ndarray, np.ndarray]:
    """Five features that follow two confounds on other scales."""
    rng = np.random.default_rng(0)
    confounds = rng.normal([1.5e6, 28], [1.2e5, 4], (count, 2))
    slopes = rng.normal(0, [[1e-5], [0.3]], (2, 5))
    return rng.standard_normal((count, 5)) + confounds @ slopes + 7, confounds


def regressed(values: np.ndarray, confounds: np.ndarray, train: np.ndarray) -> np.ndarray:
    """Values of everybody, by the transformer fitted on the training rows."""
    both = np.column_stack([confounds, values])
    return ConfoundRegressor(both.shape[1] - values.shape[1]).fit(both[train]).transform(both)


@pytest.mark.parametrize("train", [np.arange(60), np.arange(70)[::-1][:65], np.arange(89)])
@pytest.mark.parametrize("number", [1, 2])
def test_residuals_are_those_of_least_squares(train, number):
    values, confounds = draw()
    confounds = confounds[:, :number]
    expected = least_squares(values, confounds, train)
    volumes = RegressedVolumes(values, confounds, train)
    assert len(volumes) == 90
    assert volumes.shape == (90, 5)
    for residuals in (volumes[:], regressed(values, confounds, train)):
        assert residuals.dtype == np.float64
        np.testing.assert_allclose(residuals, expected, rtol=1e-9)
        # the mean stays, what the confounds explain does not
        np.testing.assert_allclose(residuals[train].mean(0), values[train].mean(0), rtol=1e-9)
        correlations = np.corrcoef(np.c_[residuals[train], confounds[train]].T)[5:, :5]
        assert np.abs(correlations).max() < 1e-8


def test_memory_mapped_volumes_are_read_when_indexed(tmp_path):
    _, confounds = draw()
    rng = np.random.default_rng(3)
    volumes = 0.3 + 1e-7 * confounds[:, 0, None, None, None] * rng.random((4, 3, 2))
    volumes = (volumes + 0.01 * rng.standard_normal((90, 4, 3, 2))).astype(np.float32)
    np.save(tmp_path / "v.npy", volumes)
    mapped = np.load(tmp_path / "v.npy", mmap_mode="r")
    train = np.flatnonzero(np.arange(90) % 5 != 2)
    residuals = RegressedVolumes(mapped, confounds, train)
    expected = least_squares(volumes, confounds, train)
    for rows in (7, [3, 88, 2], slice(10, 20), np.arange(90) % 5 == 2):
        assert residuals[rows].dtype == np.float32
        np.testing.assert_allclose(residuals[rows], expected[rows], atol=2e-6)
    np.testing.assert_array_equal(mapped, volumes)


def test_coefficients_come_from_training_rows_alone():
    values, confounds = draw()
    train = np.arange(60)
    before = RegressedVolumes(values, confounds, train)[:80]
    values[80:], confounds[80:] = -1e6, 1e9
    np.testing.assert_array_equal(RegressedVolumes(values, confounds, train)[:80], before)
    counts = np.random.default_rng(0).poisson(9, (90, 3))  # residuals of whole numbers are none
    residuals = RegressedVolumes(counts, confounds, train)[:80]
    np.testing.assert_allclose(residuals, least_squares(counts, confounds, train)[:80], atol=1e-5)


@pytest.mark.parametrize("constant", [0, 0.1, 2.9, 1e6 / 3])
def test_a_confound_everybody_in_training_shares_explains_nothing(constant):
    """Such as a site; its standard deviation is rounding, such as 3e-17, and no scale."""
    values, confounds = draw()
    train = np.arange(80)
    site = np.where(np.arange(90) < 85, constant, 2 * constant + 1)
    expected = regressed(values, confounds, train)
    residuals = regressed(values, np.column_stack([confounds, site]), train)
    np.testing.assert_allclose(residuals, expected, rtol=1e-6)
    collinear = np.column_stack([confounds, confounds @ [1e-5, 0.2]])
    np.testing.assert_allclose(regressed(values, collinear, train), expected, rtol=1e-6)


def test_a_feature_that_is_the_confound_becomes_zero_and_the_transformer_clones():
    values, confounds = draw()
    features = np.column_stack([confounds, confounds.sum(1), 1e-6 * confounds[:, 0] + 3, values])
    residuals = regressed(features, confounds, np.arange(60))
    assert (residuals[:, :4] == 0).all()
    assert (residuals[:, 4:].std(0) > 0.5).all()
    assert clone(ConfoundRegressor(3)).count == 3


# ---------------------------------------------------------------------------------------- matching


def best_pairs(distance: np.ndarray, near: np.ndarray) -> tuple[int, float]:
    """Return the most pairs there are and minus their least distance, by trying everything."""
    women, totals = np.arange(len(near)), []
    for men in map(list, permutations(range(near.shape[1]), len(near))):
        pairs = near[women, men]
        totals.append((pairs.sum(), -distance[women, men][pairs].sum()))
    return max(totals)


@pytest.mark.parametrize("confounds", [1, 2])
@pytest.mark.parametrize("seed", range(4))
def test_as_many_pairs_as_there_are_and_the_closest(seed, confounds):
    rng = np.random.default_rng(seed)
    sex = rng.permutation([0] * 5 + [1] * 6)
    values = rng.standard_normal((11, confounds)) * [1, 300][:confounds] + sex[:, None]
    scaled = values / values.std(0)
    difference = np.abs(scaled[sex == 0][:, None] - scaled[sex == 1])
    near, distance = (difference <= 0.5).all(-1), (difference**2).sum(-1)
    rows = matched_rows(sex, values, caliper=0.5)
    assert (np.diff(rows) > 0).all()
    women, men = (np.flatnonzero(np.isin(np.flatnonzero(sex == label), rows)) for label in (0, 1))
    pairs = np.ix_(women, men)
    assert best_pairs(distance[pairs], near[pairs]) == pytest.approx(best_pairs(distance, near))
    assert len(women) == len(men) == best_pairs(distance, near)[0] > 0


def test_pairs_within_folds_are_alike_and_span_none():
    rng = np.random.default_rng(0)
    sex = rng.permutation([0, 1] * 60)
    size = rng.normal(sex, 1)
    assignment = rng.integers(0, 4, 120)
    rows = matched_rows(sex, size, within=assignment)
    near = np.abs(size[sex == 0][:, None] - size[sex == 1]) <= 0.1 * size.std()
    for fold in range(4):
        members = rows[assignment[rows] == fold]
        assert sex[members].mean() == 0.5
        pairs = near[np.ix_(assignment[sex == 0] == fold, assignment[sex == 1] == fold)]
        assert len(members) == 2 * (maximum_bipartite_matching(csr_array(pairs)) >= 0).sum()
    assert len(rows) < len(matched_rows(sex, size))
    means = [size[rows][sex[rows] == label].mean() for label in (0, 1)]
    assert abs(means[1] - means[0]) < 0.1 * size.std()


@pytest.mark.parametrize(
    ("sex", "size", "caliper", "message"),
    [
        ([0, 0, 1, 1], [1, 2, 8, 9], 0.1, "no man and woman within 0.1 standard deviations"),
        ([0, 0, 0], [1, 2, 3], 5, "no man and woman within 5 standard deviations"),
    ],
)
def test_matched_rows_refuses(sex, size, caliper, message):
    with pytest.raises(ValueError, match=message):
        matched_rows(np.array(sex), np.array(size, float), caliper=caliper)


@pytest.mark.parametrize("local", [False, True])
def test_controls_leave_chance_of_heads_and_keep_what_is_local(local):
    """Twelve features follow head size; with a local effect, two more differ between the sexes."""
    rng = np.random.default_rng(1)
    sex = rng.permutation([0, 1] * 150)
    head = rng.normal(1 + 0.12 * sex, 0.075)
    features = head[:, None] ** rng.uniform(0.5, 1.2, 12) + 0.05 * rng.standard_normal((300, 12))
    if local:
        features = np.hstack([features, rng.standard_normal((300, 2)) + 1.5 * sex[:, None]])
    assignment, rows = folds(sex, folds=5), matched_rows(sex, head)
    linear, samples = LogisticRegression(C=100), (features, sex, assignment)
    alike = cross_val_decisions(linear, features[rows], sex[rows], folds(sex[rows], folds=5))
    regressed = cross_val_decisions(linear, *samples, confounds=head[:, None])
    as_it_is = cross_val_decisions(linear, *samples)
    assert ((as_it_is > 0) == sex).mean() > 0.7
    assert len(rows) > 100
    for decisions, truth in ((alike, sex[rows]), (regressed, sex)):
        accuracy = ((decisions > 0) == truth).mean()
        assert accuracy > 0.62 if local else 0.4 < accuracy < 0.6
