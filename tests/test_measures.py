"""Measures against cases worked out by hand."""

import copy

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter
from scipy.stats import spearmanr
from torch import nn

from brainsex import measures
from brainsex.networks import MriNet3d

SHAPE = (3, 4, 5)


def line(*values):
    """A map whose first voxels along Z of corner (0, 0) have these values; zero elsewhere."""
    found = np.zeros(SHAPE)
    found[0, 0, : len(values)] = values
    return found


class Sum(nn.Module):
    """Log-odds of man: the sum of a volume's voxels, each with its weight, less a threshold."""

    def __init__(self, weight, threshold=0.0):
        super().__init__()
        self.weight = nn.Parameter(torch.from_numpy(np.asarray(weight)).float())
        self.threshold = threshold

    def forward(self, volumes):
        score = (volumes[:, 0] * self.weight).sum((1, 2, 3)) - self.threshold
        return torch.stack([-score / 2, score / 2], 1)


def test_localisation_by_hand():
    """Five voxels, two planted; ranked first and third: AP = (1/1 + 2/3) / 2 = 5/6."""
    brain, truth = line(1, 1, 1, 1, 1) > 0, line(1, 0, 0, 1, 0) > 0
    truth[2, 3, 4] = True  # outside the brain: does not count
    maps = np.stack([line(5, 4, 1, 3, 0), line(1, 3, 0, 2, 0), line(0, 0, 0, 0, 0)])
    maps[:, 2, 3, 4] = 9
    found = measures.localisation(maps, truth, brain)
    assert found["base_rate"].tolist() == [0.4] * 3
    # ranks of the planted: 1 and 3; 3 and 2; all tied
    expected = [(1 + 2 / 3) / 2, (1 / 2 + 2 / 3) / 2, 0.4]
    assert found["average_precision"].tolist() == pytest.approx(expected)
    assert found["pointing"].tolist() == [1, 0, 0.4]
    assert found["mass_inside"].tolist() == pytest.approx([8 / 13, 3 / 6, 0])


def test_pointing_of_ties_is_the_planted_share_of_them():
    brain, truth = line(1, 1, 1, 1) > 0, line(0, 1, 1) > 0
    found = measures.localisation(line(7, 7, 7, 1)[None], truth, brain)
    assert found["pointing"][0] == pytest.approx(2 / 3)


def test_localisation_counts_no_negative_mass():
    brain, truth = line(1, 1, 1) > 0, line(1) > 0
    found = measures.localisation(line(2, 2, -5)[None], truth, brain)
    assert found["mass_inside"][0] == 0.5


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"maps": np.zeros((1, 3, 4, 6))}, r"\(1, 3, 4, 6\), \(3, 4, 5\)"),
        ({"truth": np.zeros(SHAPE, bool)}, "planted voxels in the brain, found none"),
        ({"maps": np.full((1, *SHAPE), np.nan)}, "finite map"),
    ],
)
def test_localisation_bad_input(change, message):
    given = {"maps": np.zeros((1, *SHAPE)), "truth": line(1) > 0, "brain": line(1, 1) > 0}
    with pytest.raises(ValueError, match=message):
        measures.localisation(**given | change)


def test_top_takes_exactly_so_many_of_the_brain_and_ties_know_no_order():
    brain = np.ones(SHAPE, bool)
    brain[0] = False
    saliency = np.zeros(SHAPE)
    saliency[0], saliency[1, 2, 3] = 7, 1
    chosen = measures.top(saliency, brain, 20)
    assert chosen.sum() == 20
    assert chosen[1, 2, 3]
    assert not chosen[0].any()
    halves = chosen[1].sum(), chosen[2].sum()
    assert min(halves) > 4, "ties are not taken in the order of voxels"
    with pytest.raises(ValueError, match="0 to 40 voxels, found 41"):
        measures.top(saliency, brain, 41)


def test_deletion_and_insertion_by_hand():
    """Two of four voxels carry log-odds of 2 and 1; an empty reference; fractions 0, 1/4, 1/2."""
    brain, volume = line(1, 1, 1, 1) > 0, line(1, 1, 1, 1)[None]
    network = Sum(line(2, 1, 0, 0))
    sigmoid = lambda x: 1 / (1 + np.exp(-x))  # noqa: E731
    found = measures.faithfulness(
        network, volume, line(4, 3, 2, 1)[None], brain, target=1, progress=False,
        fractions=(0, 0.25, 0.5), reference=np.zeros(SHAPE),
    )  # fmt: skip
    deleted, inserted = [sigmoid(3), sigmoid(1), sigmoid(0)], [sigmoid(0), sigmoid(2), sigmoid(3)]
    np.testing.assert_allclose(found["deletion"][0], deleted, atol=1e-6)
    np.testing.assert_allclose(found["insertion"][0], inserted, atol=1e-6)
    for name, (a, b, c) in (("deletion", deleted), ("insertion", inserted)):
        area = ((a + b) / 2 + (b + c) / 2) / 2
        assert found[f"{name}_area"][0] == pytest.approx(area, abs=1e-6)
    worse = measures.faithfulness(
        network, volume, line(1, 2, 3, 4)[None], brain, target=1, progress=False,
        fractions=(0, 0.25, 0.5), reference=np.zeros(SHAPE),
    )  # fmt: skip
    np.testing.assert_allclose(worse["deletion"][0], [sigmoid(3)] * 3, atol=1e-6)
    other = measures.faithfulness(
        network, volume, line(4, 3, 2, 1)[None], brain, target=0, progress=False,
        fractions=(0, 0.25, 0.5), reference=np.zeros(SHAPE),
    )  # fmt: skip
    np.testing.assert_allclose(other["deletion"], 1 - found["deletion"], atol=1e-6)


def test_what_is_deleted_is_blurred_by_default():
    """All of a volume deleted is its blur, which scipy makes too."""
    rng = np.random.default_rng(0)
    volume, weight = rng.random((2, 8, 9, 10)).astype(np.float32)
    network = Sum(weight / 100, 2.0)
    found = measures.faithfulness(
        network, volume[None], volume[None], np.ones(volume.shape, bool), target=1,
        fractions=(0, 1), progress=False,
    )  # fmt: skip
    blur = gaussian_filter(volume.astype(float), 5.0, mode="nearest")
    expected = [1 / (1 + np.exp(2.0 - (weight / 100 * v).sum())) for v in (volume, blur)]
    np.testing.assert_allclose(found["deletion"][0], expected, rtol=1e-5)
    np.testing.assert_allclose(found["insertion"][0], expected[::-1], rtol=1e-5)


def test_deletion_alone_is_the_same_deletion():
    rng = np.random.default_rng(2)
    volumes, maps = rng.random((2, 2, 3, 4, 5)).astype(np.float32)
    given = Sum(rng.random(SHAPE).astype(np.float32), 3.0), volumes, maps, np.ones(SHAPE, bool)
    both = measures.faithfulness(*given, target=1, progress=False)
    alone = measures.faithfulness(*given, target=1, insertion=False, progress=False)
    assert set(alone) == {"deletion", "deletion_area"}
    np.testing.assert_array_equal(alone["deletion"], both["deletion"])


def test_faithfulness_leaves_network_and_volumes_alone_and_ignores_company():
    torch.manual_seed(0)
    network = MriNet3d(2, (22, 23, 24)).train()
    before = copy.deepcopy(network.state_dict())
    rng = np.random.default_rng(1)
    volumes, maps = rng.random((2, 3, 22, 23, 24)).astype(np.float32)
    volumes.flags.writeable = False
    brain = np.ones((22, 23, 24), bool)
    options = {"target": 1, "progress": False}
    found = measures.faithfulness(network, volumes, maps, brain, **options)
    alone = measures.faithfulness(network, volumes[1:2], maps[1:2], brain, **options)
    np.testing.assert_array_equal(found["deletion"][1:2], alone["deletion"])
    assert network.training
    for name, value in network.state_dict().items():
        assert torch.equal(value, before[name])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"fractions": (0, 0.5, 0.5)}, "increase within"),
        ({"fractions": (0, 1.5)}, "increase within"),
        ({"fractions": (0.5,)}, "increase within"),
        ({"maps": np.zeros((1, 3, 4, 6))}, r"found \(1, 3, 4, 6\)"),
        ({"maps": np.full((1, *SHAPE), np.inf)}, "finite map"),
        ({"reference": np.zeros((4, 5))}, r"expected a reference \(3, 4, 5\).* found \(4, 5\)"),
        ({"reference": np.full(SHAPE, np.nan)}, "reference that is finite, found NaN"),
        ({"volumes": np.full((1, *SHAPE), np.nan)}, "volume 0 holds NaN or infinity"),
        ({"target": -1}, "target of 0 or 1.* found -1"),
        ({"target": [0, 1]}, "each of 1 volumes"),
    ],
)
def test_faithfulness_bad_input(change, message):
    given = {"volumes": np.zeros((1, *SHAPE)), "maps": np.zeros((1, *SHAPE))}
    given |= {"brain": np.ones(SHAPE, bool), "target": 1, "progress": False} | change
    with pytest.raises(ValueError, match=message):
        measures.faithfulness(Sum(line(1)), **given)


def test_dice_by_hand():
    a, b = line(1, 1, 1, 0) > 0, line(0, 1, 1, 1, 1) > 0
    assert measures.dice(a, b) == pytest.approx(2 * 2 / (3 + 4))
    assert measures.dice(a, a) == 1
    assert measures.dice(a, line(0, 0, 0, 1) > 0) == 0
    assert np.isnan(measures.dice(line() > 0, line() > 0))


def smooth(seed, shape=(16, 18, 20)):
    return gaussian_filter(np.random.default_rng(seed).standard_normal(shape), 2)


def test_similarity_is_scipys_spearman_and_dice_at_equal_volume():
    first, second = smooth(0), smooth(1)
    brain = np.zeros(first.shape, bool)
    brain[2:14, 3:15, 4:16] = True
    found = measures.similarity(first, second, brain, share=0.1)
    expected = spearmanr(first[brain], second[brain]).statistic
    assert found["spearman"] == pytest.approx(expected)
    count = round(0.1 * brain.sum())
    tops = [set(np.argsort(-m[brain])[:count]) for m in (first, second)]
    assert found["dice"] == pytest.approx(len(tops[0] & tops[1]) / count)
    assert set(found) == {"spearman", "dice"}
    same = measures.similarity(first, first, brain, permutations=19)
    assert (same["spearman"], same["dice"]) == (pytest.approx(1), 1)
    assert same["dice_p"] == 0.05  # 1 of 20
    assert set(same) == {"spearman", "dice", "dice_p"}, "no test of the correlation"


def test_unrelated_smooth_maps_of_a_brain_are_rarely_called_alike():
    """In an ellipsoid, where maps fall off at its edge: of 60 pairs about 5 % at p < .05."""
    grid = np.stack(np.meshgrid(*(np.linspace(-1, 1, n) for n in (24, 28, 24)), indexing="ij"))
    brain = (grid**2).sum(0) < 0.9
    edge = gaussian_filter(brain.astype(float), 1.0) * brain
    maps = [np.abs(smooth(seed, brain.shape)) * edge for seed in range(120)]
    p = np.array(
        [
            measures.similarity(*pair, brain, permutations=39)["dice_p"]
            for pair in zip(maps[::2], maps[1::2])
        ]
    )
    assert (p <= 0.05).mean() <= 0.15


def test_a_move_without_dice_counts_against_significance():
    """Of one voxel outside the brain's middle every other move leaves nothing to compare."""
    brain = np.zeros((4, 4, 4), bool)
    brain[0, 0, 0] = brain[3, 3, 3] = True
    one = np.zeros(brain.shape)
    one[0, 0, 0] = 1
    found = measures.similarity(one, one, brain, share=0.5, permutations=99)
    assert found["dice"] == 1
    assert found["dice_p"] > 0.9


def test_constant_map_is_like_nothing():
    brain = np.ones((16, 18, 20), bool)
    found = measures.similarity(smooth(0), np.zeros(brain.shape), brain, permutations=5)
    assert np.isnan([found["spearman"], found["dice"], found["dice_p"]]).all()
    empty = measures.similarity(np.zeros(brain.shape), np.zeros(brain.shape), brain)
    assert np.isnan(empty["dice"]), "two empty maps agree on nothing"


def test_what_two_sparse_maps_lack_is_no_agreement():
    """Ten voxels each, five in common; 2 % would be 115, filled up from the same zeros."""
    brain, first = np.ones((16, 18, 20), bool), np.zeros((16, 18, 20))
    second = first.copy()
    first[3, 4, :10], second[3, 4, 5:15] = np.arange(10) + 1, np.arange(10) + 1
    assert measures.similarity(first, second, brain)["dice"] == 0.5
    assert measures.similarity(first, first, brain)["dice"] == 1
    assert measures.similarity(first, np.roll(first, 8, 0), brain)["dice"] == 0


def test_interval_is_of_the_mean_over_subjects():
    """Of 0 and 1 in equal parts: mean 1/2, standard error 1/(2 √n)."""
    mean, low, high = measures.interval(np.arange(400) % 2)
    assert mean == 0.5
    assert high - low == pytest.approx(2 * 1.96 / 2 / 20, rel=0.1)
    assert low < 0.5 < high
    with pytest.raises(ValueError, match="expected finite values"):
        measures.interval([0.25, np.nan])
    with pytest.raises(ValueError, match="expected finite values"):
        measures.interval([])


def test_the_interval_within_strata_has_no_spread_between_them():
    """All women 0, all men 1: whoever is drawn, half are women."""
    values, strata = np.repeat([0.0, 1.0], 8), np.repeat([3, 5], 8)
    assert measures.interval(values, strata) == (0.5, 0.5, 0.5)
    assert measures.interval(values)[1] < 0.4


def test_the_groups_interval_is_the_jackknifes():
    """Three maps of two voxels, one planted: without the third the order is right, else wrong."""
    brain, truth = line(1, 1) > 0, line(1, 0) > 0
    maps = np.stack([line(3, 1), line(3, 2), line(0, 9)])
    found, low, high = measures.group_interval(maps, truth, brain)
    assert found == 0.5  # 6 against 12: the planted voxel is second
    without = np.array([0.5, 0.5, 1.0])
    error = np.sqrt(2 / 3 * ((without - without.mean()) ** 2).sum())
    assert (low, high) == pytest.approx((0.5 - 4.302653 * error, 0.5 + 4.302653 * error))
    alone = measures.group_interval(maps[:1], truth, brain)
    assert alone[0] == 1
    assert np.isnan(alone[1:]).all()


def test_the_groups_interval_within_strata_keeps_their_balance():
    """Two women, two men; without one, the other of that sex counts twice."""
    brain, truth = line(1, 1) > 0, line(1, 0) > 0
    maps = np.stack([line(4, 0), line(0, 1), line(0, 2), line(1, 0)])
    found, low, high = measures.group_interval(maps, truth, brain, np.array([0, 0, 1, 1]))
    assert found == 1  # 5 against 3
    # women out: 0 + 1 against 2 + 2, 8 + 1 against 2; men out: 4 + 2 against 1, 4 against 1 + 4
    variance = sum(((np.array(w) - np.mean(w)) ** 2).sum() / 2 for w in ([0.5, 1], [1, 0.5]))
    half = 4.302653 * np.sqrt(variance)  # t of two degrees of freedom
    assert (low, high) == pytest.approx((1 - half, 1 + half))
    alone = measures.group_interval(maps[:2], truth, brain, np.array([0, 1]))
    assert np.isnan(alone[1:]).all()
