"""Maps of t against SciPy's, corrected p against what permutation promises."""

import numpy as np
import pytest
from scipy.stats import ttest_ind

from brainsex import voxelwise

AFFINE = np.diag([3.0, 3, 3, 1])
SIGNIFICANT = -np.log10(0.05)


def test_t_map_is_scipys_welch_and_positive_where_men_are_higher(planted):
    volumes, sex, box, _ = planted
    brain = np.ones(box.shape, bool)
    brain[0] = False
    found = voxelwise.t_map(volumes, sex, brain, sigma=1e-9)
    at = (8, 9, 10)
    expected = ttest_ind(
        volumes[sex == 1][:, *at].astype(float), volumes[sex == 0][:, *at], equal_var=False
    ).statistic
    assert found[at] == pytest.approx(expected, rel=1e-4)
    assert expected > 5
    assert not found[0].any()
    constant = np.zeros_like(volumes)
    assert not voxelwise.t_map(constant, sex, brain).any()


@pytest.mark.parametrize("tfce", [False, True])
def test_corrected_p_finds_the_planted_box_and_little_else(planted, tfce):
    volumes, sex, box, _ = planted
    brain, affine = np.ones(box.shape, bool), np.diag([3.0, 3, 3, 1])
    brain[0] = False
    options = {"sigma": 0.5, "permutations": 40, "tfce": tfce}
    found = voxelwise.family_wise(volumes, sex, brain, affine, **options)
    significant = found > -np.log10(0.05)
    assert significant[box].mean() > 0.95
    assert significant[~box].mean() < 0.15  # the blur's rim, and TFCE's
    assert found.max() <= np.log10(41) + 1e-6
    assert not found[0].any()


@pytest.mark.parametrize("tfce", [False, True])
def test_workers_change_nothing(tfce):
    rng = np.random.default_rng(0)
    sex, brain = np.arange(20) % 2, np.ones((5, 6, 7), bool)
    volumes = rng.normal(0.4, 0.1, (20, *brain.shape))
    confound = rng.normal(size=20)
    options = {"permutations": 47, "tfce": tfce, "confound": confound, "seed": 3}
    one, two = (
        voxelwise.family_wise(volumes, sex, brain, AFFINE, workers=workers, **options)
        for workers in (1, 2)
    )
    np.testing.assert_array_equal(one, two)
    assert len(np.unique(one)) > 5
    assert (
        one != voxelwise.family_wise(volumes, sex, brain, AFFINE, **options | {"seed": 4})
    ).any()


def test_all_permutations_count_each_once(monkeypatch):
    """Of 21 in three runs of 7, as large as 5 are 2, as large as 3 are 6: p = 3/22 and 7/22."""
    null = [5, 9, 3, 4, 3, 4] + [1] * 15
    runs, asked = iter(np.random.default_rng(0).permutation(null).reshape(3, 1, 7)), []

    def permuted_ols(*_, n_perm, random_state, **__):
        asked.append((n_perm, random_state))
        return {"t": np.array([[-5.0, 3.0, 0.5, np.nan]]), "h0_max_t": next(runs)}

    monkeypatch.setattr(voxelwise, "permuted_ols", permuted_ols)
    volumes, brain = np.random.default_rng(1).random((6, 1, 2, 2)), np.ones((1, 2, 2), bool)
    found = voxelwise.family_wise(volumes, np.arange(6) % 2, brain, AFFINE, permutations=21)
    expected = -np.log10([3 / 22, 7 / 22, 1, 1])
    np.testing.assert_allclose(found.ravel(), expected, atol=1e-6)
    assert [count for count, _ in asked] == [7, 7, 7]
    assert len({seed for _, seed in asked}) == 3


@pytest.mark.parametrize("tfce", [False, True])
def test_what_the_confound_explains_is_not_significant(tfce):
    """Brain volume, larger in men, raises FA in a box: sex itself does nothing."""
    rng = np.random.default_rng(1)
    sex, brain = np.arange(60) % 2, np.ones((6, 7, 8), bool)
    confound = rng.normal(sex * 2.0, 1.0)
    volumes = rng.normal(0.4, 0.05, (60, *brain.shape))
    volumes[:, 1:5, 2:6, 2:7] += 0.1 * confound[:, None, None, None]
    how = {"sigma": 0.5, "permutations": 99, "tfce": tfce}
    with_it, without = (
        voxelwise.family_wise(volumes, sex, brain, AFFINE, confound=one, **how)
        for one in (1000 + 100 * confound, None)
    )
    assert (without[1:5, 2:6, 2:7] > SIGNIFICANT).all()
    assert with_it.max() < SIGNIFICANT
    volumes[:, 1:5, 2:6, 2:7] += 0.2 * sex[:, None, None, None]
    its_own = voxelwise.family_wise(volumes, sex, brain, AFFINE, confound=1000 + confound, **how)
    assert (its_own[1:5, 2:6, 2:7] > SIGNIFICANT).mean() > 0.9, "what sex itself does stays"


@pytest.mark.parametrize("controlled", [False, True])
def test_noise_is_rarely_significant(controlled):
    """Of 40 cohorts in which nothing differs 2 are expected; 7 come in one of 300 such tests."""
    sex, brain = np.arange(24) % 2, np.ones((5, 6, 7), bool)
    largest = []
    for seed in range(40):
        rng = np.random.default_rng(seed)
        volumes = rng.normal(0.4, 0.1, (24, *brain.shape))
        how = {"confound": rng.normal(sex, 1.0) if controlled else None, "permutations": 39}
        found = voxelwise.family_wise(volumes, sex, brain, AFFINE, seed=seed, **how)
        largest.append(found.max())
    assert (np.array(largest) > SIGNIFICANT - 1e-6).sum() < 7  # p = 2/40 counts
