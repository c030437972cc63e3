"""Folds that split what they should, and intervals equal to the textbook's."""

import math
from collections.abc import Iterator
from functools import partial

import numpy as np
import pytest
from scipy.stats import chisquare, t

from brainsex.evaluation import (
    _corrected_t_interval,
    bootstrap_interval,
    folds,
    paired_test,
    permuted_labels,
    score,
    score_table,
    wilson_interval,
)


def sexes(women: int = 30, men: int = 23, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).permutation([0] * women + [1] * men)


def test_folds_are_stratified_and_depend_on_the_seed_alone():
    sex = sexes(30, 23)
    assignment = folds(sex, folds=5, seed=3)
    assert assignment.dtype == np.int64
    assert np.bincount(assignment[sex == 0]).tolist() == [6] * 5
    assert sorted(np.bincount(assignment[sex == 1])) == [4, 4, 5, 5, 5]
    np.testing.assert_array_equal(assignment, folds(sex.tolist(), folds=5, seed=3))
    assert (assignment != folds(sex, folds=5, seed=4)).any()
    assert (assignment != np.sort(assignment)).any()
    assert folds(sex).max() == 9


def test_families_stay_together_and_sexes_balanced():
    rng = np.random.default_rng(1)
    families = np.repeat(np.arange(60), rng.integers(1, 5, 60))
    families = np.array([f"{n:02d}_1" for n in families])[rng.permutation(len(families))]
    sex = rng.integers(0, 2, len(families))
    assignment = folds(sex, groups=families, folds=5, seed=2)
    for family in np.unique(families):
        assert len(set(assignment[families == family])) == 1
    for fold in range(5):
        assert abs(sex[assignment == fold].mean() - sex.mean()) < 0.1
        assert abs((assignment == fold).mean() - 0.2) < 0.05
    np.testing.assert_array_equal(assignment, folds(sex, groups=families, folds=5, seed=2))


@pytest.mark.parametrize(
    ("sex", "groups", "count", "message"),
    [
        ([0, 0, 0, 1, 1], None, 3, "of 3 does not hold both sexes"),
        ([0, 0, 0, 1, 1], None, 1, "n_splits=2 or more"),
        ([0, 0, 0, 0], None, 2, "both sexes"),
        ([0, 1, 0, 1, 0, 1], list("aaabbb"), 3, "3 families or more, found 2"),
        ([0] * 97 + [1] * 3, np.arange(100), 5, "both sexes"),
        ([0, 1] * 8, ["a"] * 15 + ["b"], 4, "families or more, found 2"),
        ([0, 1] * 6 + [1] * 4, ["a", "a"] * 4 + ["b", "b"] * 2 + list("cdef"), 5, "both sexes"),
    ],
)
@pytest.mark.filterwarnings("ignore:The least populated class")
def test_folds_refuses(sex, groups, count, message):
    groups = None if groups is None else np.asarray(groups, str)
    with pytest.raises(ValueError, match=message):
        folds(np.array(sex), groups=groups, folds=count)


@pytest.mark.parametrize(
    ("correct", "n", "low", "high"),
    [
        # Newcombe 1998, Stat. Med. 17:857, table I, method 3
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0000, 0.1611),
        (10, 10, 0.72247, 1.0),  # 1 - z² / (10 + z²), z² = 3.8415
    ],
)
def test_wilson_is_the_textbooks(correct, n, low, high):
    np.testing.assert_allclose(wilson_interval(correct, n), (low, high), atol=5.1e-5)


def test_corrected_t_by_hand():
    """Mean .85, s² = .05 / 3; one repetition of 4 folds: error² = (1/4 + 1/3) s², t(3) = 3.1824."""
    half = 3.182446 * math.sqrt((1 / 4 + 1 / 3) * 0.05 / 3)
    interval = _corrected_t_interval([0.9, 0.8, 1.0, 0.7], folds=4)
    np.testing.assert_allclose(interval, (0.85, 0.85 - half, 0.85 + half), atol=1e-6)
    # twice: s² = .1 / 7, error² = (1/8 + 1/3) s², t(7) = 2.3646
    half = 2.364624 * math.sqrt((1 / 8 + 1 / 3) * 0.1 / 7)
    interval = _corrected_t_interval([0.9, 0.8, 1.0, 0.7] * 2, folds=4)
    np.testing.assert_allclose(interval, (0.85, 0.85 - half, 0.85 + half), atol=1e-6)


def test_bootstrap_is_of_the_mean_over_subjects():
    """The mean of 400 fair coins has a standard error of 1 / 40."""
    mean, low, high = bootstrap_interval(np.arange(400) % 2)
    assert mean == 0.5
    assert (low, high) == (pytest.approx(0.451, abs=0.01), pytest.approx(0.549, abs=0.01))


def test_one_subject_has_no_interval():
    mean, low, high = bootstrap_interval(np.array([0.3]))
    assert (mean, math.isnan(low), math.isnan(high)) == (0.3, True, True)


@pytest.mark.parametrize(
    ("interval", "arguments", "message"),
    [
        (
            partial(_corrected_t_interval, folds=10),
            ([0.9],),
            "two scores and folds .*, got 1 and 10",
        ),
        (partial(_corrected_t_interval, folds=1), ([0.9, 0.8],), "or more, got 2 and 1"),
    ],
)
def test_intervals_refuse(interval, arguments, message):
    with pytest.raises(ValueError, match=message):
        interval(*arguments)


SEX = np.array([0, 0, 1, 1, 0, 0, 0, 1, 0, 1, 1, 1])
DECISIONS = np.array([-1, -2, 3, -0.5, 1, -1, -2, 2, 0.5, 1, -1, 2])
FOLD = np.repeat([0, 1, 2], 4)
"""Accuracy 3/4, 3/4, 1/2; balanced 3/4, (2/3 + 1)/2, (0 + 2/3)/2; AUC 1, 1, 2/3."""


def test_score_is_the_mean_over_folds():
    order = np.random.default_rng(0).permutation(12)
    scores = score(SEX[order], DECISIONS[order], FOLD[order])
    assert (scores["interval"], scores["n"]) == ("corrected resampled t", 12)
    assert scores["accuracy"] == pytest.approx(2 / 3)
    assert scores["balanced_accuracy"] == pytest.approx(23 / 36)
    assert scores["auc"] == pytest.approx(8 / 9)
    # s² = 1 / 48, error² = (1/3 + 1/2) s², t(2) = 4.3027
    assert scores["low"] == pytest.approx(2 / 3 - 4.302653 * math.sqrt(5 / 6 / 48), abs=1e-6)
    assert scores["high"] == 1  # not 1.23
    assert score(SEX, -DECISIONS, FOLD)["low"] == 0  # not -0.23
    table = score_table(SEX, {"as it is": DECISIONS, "turned": -DECISIONS}, FOLD)
    assert table["classifier"].tolist() == ["as it is", "turned"]
    assert table.drop(columns="classifier").loc[1].to_dict() == score(SEX, -DECISIONS, FOLD)


def test_who_was_not_tested_counts_nowhere():
    """A fold below 0 is none, and does not count in n_test / n_train."""
    decisions = np.append(DECISIONS, [np.nan, np.inf, np.nan, 1])
    sex, fold = np.append(SEX, [0, 0, 1, 0]), np.append(FOLD, [0, 1, -1, -1])
    assert score(sex, decisions, fold) == pytest.approx(score(SEX, DECISIONS, FOLD))
    other = np.append(1 - DECISIONS, [1, 1, 1, 1])
    expected = paired_test(SEX, DECISIONS, other[:12], FOLD)
    assert paired_test(sex, decisions, other, fold) == pytest.approx(expected)


def test_score_takes_each_repetitions_own_folds():
    rng = np.random.default_rng(0)
    sex, decisions = rng.integers(0, 2, 40), rng.standard_normal((2, 40))
    assignment = np.stack([rng.permutation(np.arange(40) % 4) for _ in range(2)])
    right = (decisions > 0) == sex
    accuracy = [right[r][assignment[r] == fold].mean() for r in range(2) for fold in range(4)]
    scores = score(sex, decisions, assignment)
    expected = _corrected_t_interval(accuracy, folds=4)
    assert expected == pytest.approx([scores[name] for name in ("accuracy", "low", "high")])
    assert scores["n"] == 40


def test_leave_one_out_is_pooled():
    scores = score(SEX, DECISIONS, np.arange(12))
    assert (scores["interval"], scores["n"]) == ("Wilson", 12)
    assert scores["accuracy"] == pytest.approx(2 / 3)
    assert (scores["low"], scores["high"]) == pytest.approx(wilson_interval(8, 12))
    assert scores["balanced_accuracy"] == pytest.approx((4 / 6 + 4 / 6) / 2)
    wins = [(m > w) + (m == w) / 2 for m in DECISIONS[SEX == 1] for w in DECISIONS[SEX == 0]]
    assert scores["auc"] == pytest.approx(np.mean(wins))


@pytest.mark.parametrize("others", [0, 2, -1])
def test_one_split_is_pooled(others):
    scores = score(SEX, np.where(FOLD == 2, DECISIONS, np.nan), np.where(FOLD == 2, 2, others))
    assert (scores["interval"], scores["n"]) == ("Wilson", 4)
    assert (scores["low"], scores["high"]) == pytest.approx(wilson_interval(2, 4))
    assert scores["balanced_accuracy"] == pytest.approx(1 / 3)
    assert scores["auc"] == pytest.approx(2 / 3)


def test_a_decision_of_zero_is_a_woman():
    assert score(np.array([0, 0, 1]), [0.0, 0.0, 1.0], [0, 1, 2])["accuracy"] == 1


def test_the_interval_of_an_auc():
    """One split: Hanley and McNeil's variance by their formula; over folds, corrected t."""
    sex = np.array([0] * 6 + [1] * 5)
    decisions = np.array([-3, -2, -1, 0.5, -0.5, 1.5, -0.2, 2, 3, 1, 0.7])

    def area(rows):
        men, women = decisions[rows & (sex == 1)], decisions[rows & (sex == 0)]
        return (men[:, None] > women).mean()

    auc = area(np.ones(11, bool))
    q1, q2 = auc / (2 - auc), 2 * auc**2 / (1 + auc)
    error = math.sqrt((auc * (1 - auc) + 4 * (q1 - auc**2) + 5 * (q2 - auc**2)) / 30)
    scores = score(sex, decisions, np.zeros(11))
    assert scores["auc"] == pytest.approx(auc)
    assert scores["auc_low"] == pytest.approx(auc - 1.959964 * error)
    assert scores["auc_high"] == pytest.approx(min(auc + 1.959964 * error, 1))
    fold = np.array([0, 0, 0, 1, 1, 1, 0, 0, 1, 1, 1])
    scores = score(sex, decisions, fold)
    mean, low, high = _corrected_t_interval([area(fold == n) for n in (0, 1)], folds=2)
    limits = [mean, max(low, 0), min(high, 1)]
    assert [scores[name] for name in ("auc", "auc_low", "auc_high")] == pytest.approx(limits)


@pytest.mark.parametrize(
    ("decisions", "assignment", "message"),
    [
        (np.full(12, np.nan), FOLD, "expected decisions, found none that is finite"),
        (np.stack([DECISIONS] * 2), FOLD, "shape"),  # or the second repetition is left out
        (DECISIONS, np.stack([FOLD] * 2), "shape"),
        (DECISIONS[:8], FOLD, "shape"),
    ],
)
def test_score_refuses(decisions, assignment, message):
    with pytest.raises(ValueError, match=message):
        score(SEX, decisions, assignment)
    with pytest.raises(ValueError, match=message):
        paired_test(SEX, decisions, decisions, assignment)


def test_paired_over_folds_by_hand():
    """Right in 3/4, 3/4, 1/2 against none, all, 1/4: gains of 3/4, -1/4, 1/4."""
    second = np.where(FOLD == 0, 0.5 - SEX, SEX - 0.5)
    second[[8, 9, 10]] *= -1
    result = paired_test(SEX, DECISIONS, second, FOLD)
    error = math.sqrt((1 / 3 + 1 / 2) * 0.25)  # s² = .25
    assert result["difference"] == pytest.approx(0.25)
    assert result["low"] == pytest.approx(0.25 - 4.302653 * error, abs=1e-6)
    assert result["high"] == pytest.approx(0.25 + 4.302653 * error, abs=1e-6)
    assert result["p"] == pytest.approx(2 * t.cdf(-0.25 / error, 2))
    turned = paired_test(SEX, second, DECISIONS, FOLD)
    assert (turned["difference"], turned["p"]) == pytest.approx((-0.25, result["p"]))


def test_a_classifier_does_not_differ_from_itself_but_from_its_opposite():
    same = paired_test(SEX, DECISIONS, DECISIONS, FOLD)
    assert same == {"difference": 0, "low": 0, "high": 0, "p": 1}
    opposite = paired_test(SEX, SEX - 0.5, 0.5 - SEX, FOLD)
    assert opposite == {"difference": 1, "low": 1, "high": 1, "p": 0}
    with pytest.raises(ValueError, match="two scores and folds"):
        paired_test(SEX, SEX - 0.5, 0.5 - SEX, np.arange(12))  # leave-one-out is one sample


FAMILIES = np.array(list("abcabcdeffgfhh"))  # a, b, c and h: pairs; d, e and g: alone; f: three
LABELS = np.array([0, 0, 1, 0, 1, 1, 1, 0, 1, 1, 1, 0, 0, 0])  # 00, 01, 11, 00; 1, 0, 1; 110


def compositions(sex: np.ndarray, size: int) -> list[tuple]:
    """Women and men of each family of a size, in the families' order."""
    names, counts = np.unique(FAMILIES, return_counts=True)
    return [tuple(np.bincount(sex[FAMILIES == n], minlength=2)) for n in names[counts == size]]


def test_permuted_labels_are_uniform():
    rng = np.random.default_rng(0)
    draws = [tuple(permuted_labels(np.array([0, 0, 1, 1]), rng)) for _ in range(1200)]
    _, counts = np.unique(draws, axis=0, return_counts=True)
    assert len(counts) == 6
    assert chisquare(counts).pvalue > 0.001
    siblings = [permuted_labels(np.array([0, 1]), rng, ["a", "a"])[0] for _ in range(400)]
    assert 150 < sum(siblings) < 250  # within a family labels change places too


def test_whole_families_of_one_size_change_places_and_only_those():
    rng = np.random.default_rng(0)
    pairs, alone = [], []
    for _ in range(600):
        labels = permuted_labels(LABELS, rng, FAMILIES)
        assert compositions(labels, 3) == [(1, 2)]
        pairs.append(compositions(labels, 2))
        alone.append(compositions(labels, 1))
    for draws, possible in ((pairs, 12), (alone, 3)):
        counts = np.unique(list(map(str, draws)), return_counts=True)[1]
        assert len(counts) == possible
        assert chisquare(counts).pvalue > 0.001


def p_values(trials: int, groups: np.ndarray | None) -> Iterator[float]:
    """p of a family's feature, where twins share feature and sex, and the two are unrelated."""
    rng = np.random.default_rng(0)
    for _ in range(trials):
        feature, sex = rng.standard_normal(12).repeat(2), rng.permutation([0, 1] * 6).repeat(2)

        draws = [sex, *(permuted_labels(sex, rng, groups) for _ in range(19))]
        observed, *null = (feature[s == 1].mean() - feature[s == 0].mean() for s in draws)
        yield (1 + sum(value >= observed for value in null)) / 20


def test_p_is_uniform_under_the_null():
    p = np.array([*p_values(200, np.arange(12).repeat(2))])
    counts = np.histogram(p, np.arange(5) / 4 + 0.01)[0]  # multiples of 1/20
    assert counts.sum() == 200
    assert chisquare(counts).pvalue > 0.001
    assert (p <= 0.05).mean() < 0.1
    # twins counted as strangers are significant too often
    assert (np.array([*p_values(100, None)]) <= 0.05).mean() > 0.1
