"""The first layer's means and entropies against float64, and the tests between the sexes."""

from functools import partial

import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose
from scipy import stats
from torch import nn

from brainsex import first_layer, speed
from brainsex.networks import MriNet3d
from tests.test_networks import maps_by_hand

AFFINE = np.array([[3.0, 0, 0, -90], [0, 3.1, 0, -126], [0, 0, 2.5, -72], [0, 0, 0, 1]])
SHAPE = (23, 26, 24)  # pooled to 10, 12, 11: the last plane of the convolution along X is unused

pytestmark = pytest.mark.usefixtures("one_cpu_thread")


def make_network(channels: int = 4) -> MriNet3d:
    """Make a network whose batch norm has seen something."""
    torch.manual_seed(0)
    network = MriNet3d(channels, SHAPE)
    nn.init.normal_(network.hidden1[1].running_mean, 0.1, 0.1)
    nn.init.uniform_(network.hidden1[1].running_var, 0.02, 0.3)
    network.hidden1[1].weight = nn.Parameter(torch.linspace(-1, 1.5, channels))
    network.hidden1[1].bias = nn.Parameter(torch.linspace(1, 0.1, channels))
    return network


def make_volumes(count: int = 7, shape: tuple = SHAPE) -> np.ndarray:
    """Make noise of its own brightness in each volume, within a background of zeros."""
    rng = np.random.default_rng(0)
    volumes = rng.random((count, *shape), np.float32)
    volumes *= rng.uniform(0.5, 1, (count, 1, 1, 1)).astype(np.float32)
    volumes[:, :6] = 0
    return volumes


@pytest.mark.parametrize("size", [1, 3])  # of a batch, on a CPU and as on a GPU
def test_mean_entropy_and_mean_maps_are_those_of_float64(monkeypatch, size):
    monkeypatch.setattr(speed, "map_batches", partial(speed.map_batches, size=size))
    network, volumes = make_network(), make_volumes()
    network.train()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    maps = [maps_by_hand(network, volume[None], "hidden1") for volume in volumes]
    maps = np.array(maps)  # (N, C, X', Y', Z')
    mean, entropy = first_layer.summarise(network, volumes)
    assert_allclose(mean, maps.mean((2, 3, 4)), atol=1e-5)
    for n, c in np.ndindex(entropy.shape):
        histogram, _ = np.histogram(maps[n, c], 256, (maps[:, c].min(), maps[:, c].max()))
        assert entropy[n, c] == pytest.approx(stats.entropy(histogram), abs=1e-5)
    assert entropy.std(0).min() > 1e-3
    assert network.training
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())


def test_a_constant_map_has_no_entropy_and_no_test():
    volumes, sex, network = make_volumes(8), np.arange(8) % 2, make_network(3)
    nn.init.constant_(network.hidden1[0].weight[0], 1e-16)  # nothing but rounding
    nn.init.constant_(network.hidden1[1].bias, 3.3)
    nn.init.constant_(network.hidden1[1].weight[1], 0.1)
    with torch.no_grad():
        network.hidden1[1].bias[1] = -9  # the ReLU leaves nothing
    mean, entropy = first_layer.summarise(network, volumes)
    assert (entropy[:, :2] == 0).all()
    assert (entropy[:, 2] > 0).all()
    for values in (mean, entropy):
        table = first_layer.compare_sexes(values, sex)
        assert table["tested"].tolist() == [False, False, True]
        assert table.loc[:1, ["t", "p", "d", "fdr", "p_u"]].isna().all(axis=None)
        assert table.notna().loc[2].all()
    assert not first_layer.compare_sexes(np.ones((8, 2)), sex)["tested"].any()
    with pytest.warns(RuntimeWarning):  # of a single man
        assert not first_layer.compare_sexes(entropy, np.arange(8) // 7)["tested"].any()


def test_volumes_of_another_shape_are_refused():
    with pytest.raises(ValueError, match=r"found \(1, 1, 26, 23, 24\)"):
        first_layer.summarise(make_network(), make_volumes(4, (26, 23, 24)))


def make_values(count: int = 60, maps: int = 9) -> tuple[np.ndarray, np.ndarray]:
    """Make correlated maps; the first third is higher in men, the second in women."""
    rng = np.random.default_rng(0)
    sex = (np.arange(count) % 5 < 2).astype(int)
    values = rng.normal(5, 1, (count, maps)) + rng.normal(0, 1, (count, 1))
    values[:, : maps // 3] += sex[:, None] * 1.5
    values[:, maps // 3 : 2 * maps // 3] -= sex[:, None] * np.linspace(0.3, 1, maps // 3)
    return values, sex


def test_each_map_is_tested_as_by_hand():
    values, sex = make_values()
    table = first_layer.compare_sexes(values, sex)
    n_men, n_women = sex.sum(), (1 - sex).sum()
    for c, row in enumerate(table.itertuples()):
        men, women = values[sex == 1, c], values[sex == 0, c]
        errors = men.var(ddof=1) / n_men, women.var(ddof=1) / n_women
        t = (men.mean() - women.mean()) / np.sqrt(sum(errors))
        freedom = sum(errors) ** 2 / (errors[0] ** 2 / (n_men - 1) + errors[1] ** 2 / (n_women - 1))
        assert (row.women, row.men) == pytest.approx((women.mean(), men.mean()))
        assert row.t == pytest.approx(t)
        assert row.p == pytest.approx(2 * stats.t.sf(abs(t), freedom))
        higher = sum((man > women).sum() for man in men)  # no ties
        deviation = np.sqrt(n_men * n_women * (n_men + n_women + 1) / 12)
        z = (abs(higher - n_men * n_women / 2) - 0.5) / deviation
        assert row.p_u == pytest.approx(2 * stats.norm.sf(z))
        pooled = ((n_men - 1) * men.var(ddof=1) + (n_women - 1) * women.var(ddof=1)) / 58
        d = (men.mean() - women.mean()) / np.sqrt(pooled)
        half = 1.959964 * np.sqrt(1 / n_men + 1 / n_women + d**2 / (2 * 60))
        assert (row.d, row.d_low, row.d_high) == pytest.approx((d, d - half, d + half))
    assert table["tested"].all()
    order = table["p"].sort_values(ascending=False)  # Benjamini and Hochberg 1995
    expected = (order * len(order) / np.arange(len(order), 0, -1)).cummin()
    assert_allclose(table["fdr"], expected.sort_index())
