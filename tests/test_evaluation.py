"""Folds that split what they should, and intervals equal to the textbook's."""

import math

import numpy as np
import pytest
from scipy.stats import binom, binomtest, chisquare, norm, t

from brainsex.evaluation import (
    corrected_t,
    folds,
    paired,
    permutation_test,
    score,
    shuffled,
    wilson,
)


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


def test_wilson_is_scipy_s():
    for n in (1, 2, 7, 40, 1113):
        for correct in range(0, n + 1, max(1, n // 7)):
            expected = binomtest(correct, n).proportion_ci(0.95, "wilson")
            found = wilson(correct, n)
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


@pytest.mark.parametrize(
    ("scores", "count", "message"),
    [([0.9], 10, "two scores and at least two folds, got 1 and 10"), ([0.9, 0.8], 1, "2 and 1")],
)
def test_corrected_t_refuses(scores, count, message):
    with pytest.raises(ValueError, match=message):
        corrected_t(scores, folds=count)


# --------------------------------------------------------------------------------------- coverage


def coverage(n, shares):
    """Wilson's exact coverage (P,): the binomial's mass where the interval of n holds p."""
    low, high = np.array([wilson(correct, n) for correct in range(n + 1)]).T[:, :, None]
    mass = binom.pmf(np.arange(n + 1)[:, None], n, shares)
    return np.where((low <= shares) & (shares <= high), mass, 0).sum(0)


@pytest.mark.parametrize("n", [100, 200, 500, 1113])
def test_wilson_covers_what_it_says(n):
    """Exactly, not simulated; p from .5 to .95 in steps of .05."""
    found = coverage(n, np.arange(10, 20) / 20)
    assert 0.93 < found.min()
    assert found.max() < 0.97


@pytest.mark.soak
def test_wilson_covers_between_those_points_too():
    """In steps of .001 an n of up to 137 misses 93 to 97 % at few p; the mean over p never does."""
    shares = np.linspace(0.5, 0.95, 451)
    found = {n: coverage(n, shares) for n in [*range(100, 401), 500, 1113]}
    assert all(0.948 < each.mean() < 0.953 for each in found.values())
    outside = {n: ((each < 0.93) | (each > 0.97)).mean() for n, each in found.items()}
    assert max(outside.values()) < 0.03
    assert max(n for n, share in outside.items() if share) < 140
    assert min(each.min() for each in found.values()) > 0.925
    assert max(each.max() for each in found.values()) < 0.975


SIZE, FOLDS, DISTANCE = 200, 10, 1.5  # subjects, folds, Mahalanobis distance of the two means


def nearest_mean(x):
    """Weights (..., D) and offset (...) of the classifier of the nearer mean; x (..., 2, n, D)."""
    women, men = np.moveaxis(x.mean(-2), -2, 0)
    weights = men - women
    return weights, -(weights * (men + women)).sum(-1) / 2


def gaussians(rng, *shape, features=5):
    """(*shape, 2, n, D): women around -d / 2, men around d / 2 along the first axis."""
    x = rng.standard_normal((*shape[:-1], 2, shape[-1], features))
    x[..., 0] += np.array([-DISTANCE / 2, DISTANCE / 2])[:, None]
    return x


def true_accuracy(draws=4000):
    """Mean, over training sets of the folds' size, of the accuracy on everybody else there is."""
    rng = np.random.default_rng(1)
    weights, offset = nearest_mean(gaussians(rng, draws, SIZE // 2 * (FOLDS - 1) // FOLDS))
    shift, spread = weights[:, 0] * DISTANCE / 2, np.sqrt((weights**2).sum(-1))
    return (
        norm.cdf((shift + offset) / spread).mean() / 2
        + norm.cdf((shift - offset) / spread).mean() / 2
    )


def covered(experiments, repeats, seed):
    """Share of simulated cross-validations whose interval holds the true accuracy."""
    rng, truth, inside = np.random.default_rng(seed), true_accuracy(), 0
    for _ in range(experiments):
        everybody = gaussians(rng, SIZE // 2)
        accuracy = []
        for _ in range(repeats):
            x = rng.permuted(everybody, axis=1).reshape(2, FOLDS, -1, everybody.shape[-1])
            for fold in range(FOLDS):
                train = np.delete(x, fold, 1).reshape(2, -1, x.shape[-1])
                weights, offset = nearest_mean(train)
                decision = x[:, fold] @ weights + offset
                accuracy.append(((decision > 0) == [[False], [True]]).mean())
        _, low, high = corrected_t(accuracy, folds=FOLDS)
        inside += low <= truth <= high
    return inside / experiments


@pytest.mark.parametrize("repeats", [1, 3])
def test_corrected_t_covers_the_true_accuracy(repeats):
    """At least 90 %; below 300 x .90 - 3 standard errors of a sample would be news."""
    assert covered(300 // repeats, repeats, seed=2) >= 0.9


@pytest.mark.soak
@pytest.mark.parametrize("repeats", [1, 10])
def test_corrected_t_covers_in_many_experiments(repeats):
    found = covered(5000 // repeats, repeats, seed=3)
    print(f"corrected resampled t, {repeats} repetitions: covers {found:.4f}")
    assert found >= 0.9


# ------------------------------------------------------------------------------------------ score

SEX = np.array([0, 0, 1, 1, 0, 0, 0, 1, 0, 1, 1, 1])
DECISION = np.array([-1, -2, 3, -0.5, 1, -1, -2, 2, 0.5, 1, -1, 2])
FOLD = np.repeat([0, 1, 2], 4)
MIXED = np.random.default_rng(0).permutation(12)
"""Accuracy 3/4, 3/4, 1/2; balanced 3/4, (2/3 + 1)/2, (0 + 2/3)/2; AUC 1, 1, 2/3."""


def test_score_is_the_mean_over_folds():
    found = score(SEX[MIXED], DECISION[MIXED], FOLD[MIXED])
    assert found["interval"] == "corrected resampled t"
    assert found["n"] == 12
    assert found["accuracy"] == pytest.approx(2 / 3)
    assert found["balanced_accuracy"] == pytest.approx(23 / 36)
    assert found["auc"] == pytest.approx(8 / 9)
    # s² = 1 / 48, error² = (1/3 + 1/2) s², t(2) = 4.3027
    assert found["low"] == pytest.approx(2 / 3 - 4.302653 * math.sqrt(5 / 6 / 48), abs=1e-6)
    assert found["high"] == 1  # not 1.23
    assert score(SEX, -DECISION, FOLD)["low"] == 0  # not -0.23


def test_who_was_not_tested_counts_nowhere():
    decision = np.append(DECISION, [np.nan, np.inf, np.nan])
    sex, fold = np.append(SEX, [0, 0, 1]), np.append(FOLD, [0, 1, 2])
    assert score(sex, decision, fold) == pytest.approx(score(SEX, DECISION, FOLD))
    other = np.append(1 - DECISION, [1, 1, 1])
    expected = paired(SEX, DECISION, other[:12], FOLD)
    assert paired(sex, decision, other, fold) == pytest.approx(expected)
    assert score(sex, np.stack([decision, -other]), np.stack([fold, fold]))["n"] == 15


def test_score_of_repeated_folds():
    decision = np.stack([DECISION, -DECISION])  # none is 0: what was right is wrong
    found = score(SEX, decision, np.stack([FOLD, FOLD]))
    scores = np.array([3, 3, 2, 1, 1, 2]) / 4
    error = math.sqrt((1 / 6 + 1 / 2) * scores.var(ddof=1))
    assert found["accuracy"] == pytest.approx(0.5)
    assert found["auc"] == pytest.approx(0.5)
    assert found["n"] == 12
    limits = [0.5 - 2.570582 * error, 0.5 + 2.570582 * error]  # t(5)
    assert limits == pytest.approx([found["low"], found["high"]], abs=1e-6)


def test_score_takes_each_repetition_s_own_folds():
    rng = np.random.default_rng(0)
    sex, decision = rng.integers(0, 2, 40), rng.standard_normal((2, 40))
    where = np.stack([rng.permutation(np.arange(40) % 4) for _ in range(2)])
    right = (decision > 0) == sex
    scores = [right[r][where[r] == fold].mean() for r in range(2) for fold in range(4)]
    found = score(sex, decision, where)
    expected = corrected_t(scores, folds=4)
    assert expected == pytest.approx([found[name] for name in ("accuracy", "low", "high")])


def test_leave_one_out_is_pooled():
    found = score(SEX, DECISION, np.arange(12))
    assert found["interval"] == "Wilson"
    assert found["n"] == 12
    expected = binomtest(8, 12).proportion_ci(0.95, "wilson")
    assert found["accuracy"] == pytest.approx(2 / 3)
    assert (found["low"], found["high"]) == pytest.approx((expected.low, expected.high))
    assert found["balanced_accuracy"] == pytest.approx((4 / 6 + 4 / 6) / 2)
    wins = [(m > w) + (m == w) / 2 for m in DECISION[SEX == 1] for w in DECISION[SEX == 0]]
    assert found["auc"] == pytest.approx(np.mean(wins))


def test_one_split_is_pooled():
    decision = np.where(FOLD == 2, DECISION, np.nan)
    for others in (1, -1):
        found = score(SEX, decision, np.where(FOLD == 2, 2, others))
        assert found["interval"] == "Wilson"
        assert found["n"] == 4
        expected = binomtest(2, 4).proportion_ci(0.95, "wilson")
        assert (found["low"], found["high"]) == pytest.approx((expected.low, expected.high))
        assert found["balanced_accuracy"] == pytest.approx(1 / 3)
        assert found["auc"] == pytest.approx(2 / 3)
    assert score(SEX, decision, FOLD) == pytest.approx(found)  # two of three folds not tested


def test_who_is_in_no_fold_is_no_fold():
    """`over_folds` marks them below 0; they do not change n_test / n_train of the others."""
    found = score(np.tile(SEX, 2), np.tile(DECISION, 2), np.tile(FOLD, 2))
    sex, decision = np.tile(SEX, 3), np.append(np.tile(DECISION, 2), np.full(12, np.nan))
    fold = np.append(np.tile(FOLD, 2), np.full(12, -1))
    assert score(sex, decision, fold) == pytest.approx(found)
    other = np.append(-np.tile(DECISION, 2), np.full(12, np.nan))
    assert paired(sex, decision, other, fold) == pytest.approx(
        paired(sex[:24], decision[:24], other[:24], fold[:24])
    )


def test_leave_one_out_counts_every_repetition():
    """Right about everybody, then wrong about everybody."""
    sex = np.array([0, 1] * 3)
    decision = np.stack([sex - 0.5, 0.5 - sex])
    assert score(sex, decision, np.stack([np.arange(6)] * 2))["accuracy"] == 0.5


def test_a_decision_of_zero_is_a_woman():
    sex = np.array([0, 0, 1])
    assert score(sex, [0.0, 0.0, 1.0], [0, 1, 2])["accuracy"] == 1
    found = paired(sex, [0.0, 0.0, 1.0], [1.0, 1.0, 1.0], np.zeros(3, int))
    assert found["difference"] == pytest.approx(2 / 3)


def test_score_says_what_is_never_above_one_or_below_nought():
    perfect = score(SEX, SEX - 0.5, FOLD)
    assert (perfect["accuracy"], perfect["low"], perfect["high"]) == (1, 1, 1)
    assert perfect["auc"] == perfect["balanced_accuracy"] == 1
    never = score(SEX, 0.5 - SEX, FOLD)
    assert (never["accuracy"], never["low"], never["high"], never["auc"]) == (0, 0, 0, 0)


@pytest.mark.parametrize(
    ("decision", "assignment", "message"),
    [
        (np.full(12, np.nan), FOLD, "expected decisions, found none that is finite"),
        (np.stack([DECISION] * 2), FOLD, "shape"),  # or the second repetition is left out
        (DECISION, np.stack([FOLD] * 2), "shape"),
        (DECISION[:8], FOLD, "shape"),
    ],
)
def test_score_refuses(decision, assignment, message):
    with pytest.raises(ValueError, match=message):
        score(SEX, decision, assignment)
    with pytest.raises(ValueError, match=message):
        paired(SEX, decision, decision, assignment)


# ----------------------------------------------------------------------------------------- paired


def test_paired_over_folds_by_hand():
    """Right in 3/4, 3/4, 1/2 against none, all, 1/4: gains of 3/4, -1/4, 1/4."""
    second = np.where(FOLD == 0, 0.5 - SEX, SEX - 0.5)
    second[[8, 9, 10]] *= -1
    found = paired(SEX[MIXED], DECISION[MIXED], second[MIXED], FOLD[MIXED])
    error = math.sqrt((1 / 3 + 1 / 2) * 0.25)  # s² = .25
    assert found["difference"] == pytest.approx(0.25)
    assert found["low"] == pytest.approx(0.25 - 4.302653 * error, abs=1e-6)
    assert found["high"] == pytest.approx(0.25 + 4.302653 * error, abs=1e-6)
    assert found["p"] == pytest.approx(2 * t.cdf(-0.25 / error, 2))
    other = paired(SEX, second, DECISION, FOLD)
    assert other["difference"] == pytest.approx(-0.25)
    assert other["p"] == pytest.approx(found["p"])


@pytest.mark.parametrize("protocol", ["leave-one-out", "one split"])
def test_paired_is_mcnemar_s_where_folds_are_pooled(protocol):
    """Of 20, 7 only the first gets right, 2 only the second, 8 both."""
    sex = np.arange(20) % 2
    right = np.array([[1] * 7 + [0] * 2 + [1] * 8 + [0] * 3, [0] * 7 + [1] * 2 + [1] * 8 + [0] * 3])
    first, second = (2 * right - 1) * (sex - 0.5)
    where = np.arange(20) if protocol == "leave-one-out" else np.zeros(20, int)
    found = paired(sex, first, second, where)
    assert found["difference"] == pytest.approx(5 / 20)
    assert found["p"] == pytest.approx(2 * (1 + 9 + 36) / 2**9)
    table = np.array([[8, 7], [2, 3]]) + 0.5  # Agresti and Min: half a subject to each cell
    share = table / table.sum()
    middle = share[0, 1] - share[1, 0]
    variance = (share[0, 1] + share[1, 0] - middle**2) / table.sum()
    half = 1.959964 * math.sqrt(variance)
    assert found["low"] == pytest.approx(middle - half, abs=1e-6)
    assert found["high"] == pytest.approx(middle + half, abs=1e-6)


@pytest.mark.parametrize("where", [FOLD, np.arange(12), np.zeros(12, int)])
def test_a_classifier_does_not_differ_from_itself(where):
    found = paired(SEX, DECISION, DECISION, where)
    assert found["difference"] == 0
    assert found["p"] == 1
    assert found["low"] <= 0 <= found["high"]


def test_the_same_gain_in_every_fold_is_beyond_chance():
    found = paired(SEX, SEX - 0.5, 0.5 - SEX, FOLD)
    assert (found["difference"], found["low"], found["high"], found["p"]) == (1, 1, 1, 0)


def test_paired_takes_only_whom_both_tested():
    first, second = SEX - 0.5, 0.5 - SEX
    second[:3] = np.nan
    first[3] = np.nan
    found = paired(SEX, first, second, np.arange(12))
    assert found["difference"] == 1
    assert found["p"] == pytest.approx(2 / 2**8)
    assert found["high"] <= 1  # a difference of shares


# --------------------------------------------------------------------------------------- shuffled


def test_shuffled_keeps_the_counts_and_the_labels_given():
    sex = sexes(30, 11)
    given = sex.copy()
    found = shuffled(sex, np.random.default_rng(0))
    assert np.bincount(found).tolist() == [30, 11]
    assert found.dtype == sex.dtype
    assert (found != sex).any()
    np.testing.assert_array_equal(sex, given)
    np.testing.assert_array_equal(found, shuffled(sex.tolist(), np.random.default_rng(0)))


def test_shuffled_is_uniform():
    rng = np.random.default_rng(0)
    found = [tuple(shuffled(np.array([0, 0, 1, 1]), rng)) for _ in range(1200)]
    _, counts = np.unique(found, axis=0, return_counts=True)
    assert len(counts) == 6
    assert chisquare(counts).pvalue > 0.001


FAMILIES = np.array(list("abcabcdeffgfhh"))  # a, b, c and h: pairs; d, e and g: alone; f: three
LABELS = np.array([0, 0, 1, 0, 1, 1, 1, 0, 1, 1, 1, 0, 0, 0])  # 00, 01, 11, 00; 1, 0, 1; 110


def compositions(sex, size):
    """Women and men of each family of a size, in the families' order."""
    return [
        tuple(np.bincount(sex[FAMILIES == name], minlength=2))
        for name in np.unique(FAMILIES)
        if (FAMILIES == name).sum() == size
    ]


def test_whole_families_of_one_size_change_places_and_only_those():
    rng = np.random.default_rng(0)
    pairs, alone = [], []
    for _ in range(600):
        found = shuffled(LABELS, rng, FAMILIES)
        assert compositions(found, 3) == [(1, 2)]
        assert sorted(compositions(found, 2)) == [(0, 2), (1, 1), (2, 0), (2, 0)]
        assert sorted(compositions(found, 1)) == [(0, 1), (0, 1), (1, 0)]
        pairs.append(str(compositions(found, 2)))
        alone.append(str(compositions(found, 1)))
    for drawn, possible in ((pairs, 12), (alone, 3)):
        counts = np.unique(drawn, return_counts=True)[1]
        assert len(counts) == possible
        assert chisquare(counts).pvalue > 0.001


def test_labels_change_places_within_a_family_too():
    """Which of two siblings the table names first says nothing."""
    rng = np.random.default_rng(0)
    found = np.array([shuffled(np.array([0, 1]), rng, ["a", "a"])[0] for _ in range(400)])
    assert 150 < found.sum() < 250


def test_shuffled_refuses_a_blank_family():
    """Its labels would be whatever lies in memory."""
    with pytest.raises(ValueError, match="famil"):
        shuffled(np.array([0, 1, 1]), np.random.default_rng(0), np.array(["a", None, "a"], object))


# ------------------------------------------------------------------------------- permutation_test


def test_permutation_p_by_hand():
    """The statistic gives 5 for the labels as they are, then 1, 5, 7, 2: two of four reach it."""
    given, seen = iter([5, 1, 5, 7, 2]), []

    def statistic(labels):
        seen.append(labels)
        return next(given)

    sex = sexes(6, 5)
    observed, null, p = permutation_test(statistic, sex.tolist(), permutations=4)
    assert observed == 5
    assert null.tolist() == [1, 5, 7, 2]
    assert p == 3 / 5
    np.testing.assert_array_equal(seen[0], sex)
    assert all(sorted(labels) == sorted(sex) for labels in seen)
    assert len({tuple(labels) for labels in seen}) == 5


def test_permutation_test_shuffles_whole_families():
    seen = []
    permutation_test(lambda labels: seen.append(labels) or 0.0, LABELS, groups=FAMILIES)
    assert len(seen) == 101
    assert all(compositions(labels, 3) == [(1, 2)] for labels in seen)


def test_a_score_that_is_no_number_is_not_significant():
    _, _, p = permutation_test(lambda labels: math.nan, SEX, permutations=19)
    assert not p < 1


def levels(trials, groups):
    """p of a family's feature, where twins share feature and sex, and the two are unrelated."""
    rng, found = np.random.default_rng(0), []
    for trial in range(trials):
        feature, sex = rng.standard_normal(12).repeat(2), rng.permutation([0, 1] * 6).repeat(2)

        def difference(labels, feature=feature):
            return feature[labels == 1].mean() - feature[labels == 0].mean()

        _, _, p = permutation_test(difference, sex, groups=groups, permutations=19, seed=trial)
        found.append(p)
    return np.array(found)


def test_p_is_uniform_under_the_null():
    found = levels(400, np.arange(12).repeat(2))
    counts = np.histogram(found, np.arange(5) / 4 + 0.01)[0]  # multiples of 1/20
    assert counts.sum() == 400
    assert chisquare(counts).pvalue > 0.001
    assert (found <= 0.05).mean() < 0.09
    # twins counted as strangers are significant too often
    assert (levels(200, None) <= 0.05).mean() > 0.09


@pytest.mark.parametrize(
    ("sex", "groups", "message"),
    [
        ([0] * 97 + [1] * 3, np.arange(100), "3 subjects of either sex"),
        ([0, 1] * 6 + [1] * 4, ["a", "a"] * 4 + ["b", "b"] * 2 + list("cdef"), "one sex only"),
    ],
)
def test_no_fold_is_left_without_one_sex(sex, groups, message):
    with pytest.raises(ValueError, match=message):
        folds(np.array(sex), groups=np.asarray(groups, str), folds=5)


def test_the_interval_of_an_auc(monkeypatch):
    """One split: Hanley and McNeil's variance by their formula; over folds, corrected t."""
    sex = np.array([0] * 6 + [1] * 5)
    decision = np.array([-3, -2, -1, 0.5, -0.5, 1.5, -0.2, 2, 3, 1, 0.7])
    area = np.mean([[(m > w) for w in decision[:6]] for m in decision[6:]])
    q1, q2 = area / (2 - area), 2 * area**2 / (1 + area)
    se = math.sqrt((area * (1 - area) + 4 * (q1 - area**2) + 5 * (q2 - area**2)) / 30)
    found = score(sex, decision, np.zeros(11))
    assert found["auc"] == pytest.approx(area)
    assert found["auc_low"] == pytest.approx(area - 1.959964 * se)
    assert found["auc_high"] == pytest.approx(min(area + 1.959964 * se, 1))
    where = np.array([0, 0, 0, 1, 1, 1, 0, 0, 1, 1, 1])
    areas = [
        np.mean([[m > w for w in decision[(where == n) & (sex == 0)]]
                 for m in decision[(where == n) & (sex == 1)]])
        for n in (0, 1)
    ]  # fmt: skip
    found = score(sex, decision, where)
    mean, low, high = corrected_t(areas, folds=2)
    assert found["auc"] == pytest.approx(mean)
    assert found["auc_low"] == pytest.approx(max(low, 0))
    assert found["auc_high"] == pytest.approx(min(high, 1))
