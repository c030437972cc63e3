"""Folds that split what they should, and intervals equal to the textbook's."""

import math

import numpy as np
import pytest
from scipy.stats import binomtest

from brainsex.evaluation import corrected_t, folds, wilson


def sexes(women=30, men=23, seed=0):
    return np.random.default_rng(seed).permutation([0] * women + [1] * men)


# ------------------------------------------------------------------------------------------ folds


def test_folds_are_stratified():
    sex = sexes(30, 23)
    found = folds(sex, folds=5)
    assert found.dtype == np.int64
    assert np.bincount(found[sex == 0]).tolist() == [6] * 5
    assert sorted(np.bincount(found[sex == 1])) == [4, 4, 5, 5, 5]


def test_folds_depend_on_the_seed_alone():
    sex = sexes()
    np.testing.assert_array_equal(folds(sex, folds=5, seed=3), folds(sex.tolist(), folds=5, seed=3))
    assert (folds(sex, folds=5, seed=3) != folds(sex, folds=5, seed=4)).any()
    assert (folds(sex, folds=5) != np.sort(folds(sex, folds=5))).any()  # shuffled
    assert folds(sex).max() == 9


def test_families_stay_together_and_sexes_balanced():
    rng = np.random.default_rng(1)
    families = np.repeat(np.arange(60), rng.integers(1, 5, 60))
    order = rng.permutation(len(families))
    families = np.array([f"{n:02d}_1" for n in families])[order]
    sex = rng.integers(0, 2, len(families))
    found = folds(sex, groups=families, folds=5, seed=2)
    for family in np.unique(families):
        assert len(set(found[families == family])) == 1
    assert set(found) == {0, 1, 2, 3, 4}
    for fold in range(5):
        assert abs(sex[found == fold].mean() - sex.mean()) < 0.1
        assert abs((found == fold).mean() - 0.2) < 0.05
    np.testing.assert_array_equal(found, folds(sex, groups=families, folds=5, seed=2))


@pytest.mark.parametrize(
    ("sex", "groups", "count", "message"),
    [
        ([0, 0, 0, 1, 1], None, 3, r"2 to 2 folds \(there are 2 subjects of either sex\), got 3"),
        ([0, 0, 0, 1, 1], None, 1, "got 1"),
        ([0, 0, 0, 0], None, 2, "there are 0 subjects of either sex"),
        ([0, 1, 0, 1], ["a", "a", "b", "b"], 3, r"2 to 2 folds \(there are 2 families\), got 3"),
    ],
)
def test_folds_refuses(sex, groups, count, message):
    with pytest.raises(ValueError, match=message):
        folds(np.array(sex), groups=groups, folds=count)


# ----------------------------------------------------------------------------------------- wilson


@pytest.mark.parametrize(
    ("correct", "n", "low", "high"),
    [
        # Newcombe 1998, Stat. Med. 17:857, table I, method 3
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0000, 0.1611),
        (1, 29, 0.0061, 0.1718),
        # with z² = 3.8415: z² / (10 + z²); 1/2 ± z / (10 + z²) · √(2.5 + z² / 4)
        (0, 10, 0.0, 0.27753),
        (10, 10, 0.72247, 1.0),
        (5, 10, 0.23659, 0.76341),
    ],
)
def test_wilson_is_the_textbook_s(correct, n, low, high):
    found = wilson(correct, n)
    np.testing.assert_allclose(found, (low, high), atol=5.1e-5)
    assert 0 <= found[0] <= correct / n <= found[1] <= 1


@pytest.mark.parametrize("level", [0.9, 0.95, 0.99])
def test_wilson_is_scipy_s(level):
    for n in (1, 2, 7, 40, 1113):
        for correct in range(0, n + 1, max(1, n // 7)):
            expected = binomtest(correct, n).proportion_ci(level, "wilson")
            found = wilson(correct, n, level=level)
            np.testing.assert_allclose(found, (expected.low, expected.high), atol=1e-12)
            assert 0 <= found[0] <= correct / n <= found[1] <= 1


@pytest.mark.parametrize(("correct", "n"), [(-1, 5), (6, 5), (0, 0)])
def test_wilson_refuses(correct, n):
    with pytest.raises(ValueError, match="expected 0 <= correct <= n"):
        wilson(correct, n)


# ------------------------------------------------------------------------------------ corrected_t


def test_corrected_t_by_hand():
    """Mean .85, s² = .05 / 3; one repetition of 4 folds: error² = (1/4 + 1/3) s², t(3) = 3.1824."""
    half = 3.182446 * math.sqrt((1 / 4 + 1 / 3) * 0.05 / 3)
    mean, low, high = corrected_t([0.9, 0.8, 1.0, 0.7], folds=4)
    np.testing.assert_allclose((mean, low, high), (0.85, 0.85 - half, 0.85 + half), atol=1e-6)
    # twice: s² = .1 / 7, error² = (1/8 + 1/3) s², t(7) = 2.3646
    half = 2.364624 * math.sqrt((1 / 8 + 1 / 3) * 0.1 / 7)
    found = corrected_t([0.9, 0.8, 1.0, 0.7] * 2, folds=4)
    np.testing.assert_allclose(found, (0.85, 0.85 - half, 0.85 + half), atol=1e-6)
    # at 90 %, t(3) = 2.3534
    half = 2.353363 * math.sqrt((1 / 4 + 1 / 3) * 0.05 / 3)
    found = corrected_t([0.9, 0.8, 1.0, 0.7], folds=4, level=0.9)
    np.testing.assert_allclose(found, (0.85, 0.85 - half, 0.85 + half), atol=1e-6)


@pytest.mark.parametrize(
    ("scores", "count", "message"),
    [([0.9], 10, "two scores and at least two folds, got 1 and 10"), ([0.9, 0.8], 1, "2 and 1")],
)
def test_corrected_t_refuses(scores, count, message):
    with pytest.raises(ValueError, match=message):
        corrected_t(scores, folds=count)
