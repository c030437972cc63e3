"""The first layer's means and entropies against float64, and the tests between the sexes."""

import weakref
from functools import partial

import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose, assert_array_equal
from scipy import stats
from scipy.signal import correlate
from torch import nn

from brainsex import feature_figures, features, networks
from brainsex.confounds import Residuals
from brainsex.networks import MriNet2d, MriNet3d

SHAPE = (23, 26, 24)  # pooled to 10, 12, 11: the last plane of the convolution along X is unused

pytestmark = pytest.mark.usefixtures("one_cpu_thread")


def network(channels=4, shape=SHAPE, seed=0):
    """A network whose batch norm has seen something."""
    torch.manual_seed(seed)
    made = MriNet3d(channels, shape)
    nn.init.normal_(made.hidden1[1].running_mean, 0.1, 0.1)
    nn.init.uniform_(made.hidden1[1].running_var, 0.02, 0.3)
    made.hidden1[1].weight = nn.Parameter(torch.linspace(-1, 1.5, channels))
    made.hidden1[1].bias = nn.Parameter(torch.linspace(1, 0.1, channels))
    return made


def brains(count=7, shape=SHAPE, seed=0):
    """Noise of its own brightness in each, within a background of zeros."""
    generator = np.random.default_rng(seed)
    volumes = generator.random((count, *shape), np.float32)
    volumes *= generator.uniform(0.5, 1, (count, 1, 1, 1)).astype(np.float32)
    volumes[:, :6] = 0
    return volumes


def by_hand(made, volumes):
    """Feature maps (N, C, X', Y', Z') in float64 by scipy."""
    state = {name: value.double().numpy() for name, value in made.state_dict().items()}
    parts = ("1.running_mean", "1.running_var", "1.weight", "1.bias", "0.bias")
    maps = []
    for volume in volumes.astype(float):
        for c, kernel in enumerate(state["hidden1.0.weight"][:, 0]):
            mean, variance, scale, shift, bias = (state[f"hidden1.{part}"][c] for part in parts)
            one = correlate(volume, kernel, "valid", "direct") + bias
            one = np.maximum((one - mean) / np.sqrt(variance + 1e-5) * scale + shift, 0)
            half = np.array(one.shape) // 2
            even = one[: 2 * half[0], : 2 * half[1], : 2 * half[2]]
            maps.append(even.reshape(half[0], 2, half[1], 2, half[2], 2).max((1, 3, 5)))
    return np.reshape(maps, (len(volumes), -1, *half))


def test_mean_and_entropy_are_those_of_float64():
    made, volumes = network(), brains()
    maps = by_hand(made, volumes)
    found = features.summarise(made, volumes)
    assert_allclose(found.mean, maps.mean((2, 3, 4)), atol=1e-5)
    for n, c in np.ndindex(found.entropy.shape):
        limits = maps[:, c].min(), maps[:, c].max()  # over all subjects
        histogram, _ = np.histogram(maps[n, c], 256, limits)
        assert found.entropy[n, c] == pytest.approx(stats.entropy(histogram), abs=1e-5)
    assert found.mean.dtype == found.entropy.dtype == np.float64
    assert found.entropy.min() > 0.5
    assert found.entropy.std(0).min() > 1e-3


@pytest.mark.parametrize("batch_size", [2, 3, 7, 50])
def test_neither_batches_nor_threads_change_anything(monkeypatch, batch_size):
    made, volumes = network(), brains()
    one = features.summarise(made, volumes)
    torch.set_num_threads(2)
    monkeypatch.setattr(networks, "in_batches", partial(networks.in_batches, size=batch_size))
    other = features.summarise(made, volumes)
    for name in ("mean", "entropy"):
        assert_allclose(getattr(other, name), getattr(one, name), rtol=0, atol=1e-12)
    back = features.summarise(made, volumes[::-1])
    assert_array_equal(back.entropy[::-1], one.entropy)


def test_the_range_is_everybody_s():
    """A subject's entropy depends on how far others reach, but on nothing else of theirs."""
    made, volumes = network(), brains(4)
    one = features.summarise(made, volumes)
    alone = features.summarise(made, volumes[:1])
    assert np.abs(alone.entropy[0] - one.entropy[0]).max() > 0.001
    twice = features.summarise(made, np.concatenate([volumes, volumes[::-1]]))
    assert_array_equal(twice.entropy[:4], one.entropy)


class Watched:
    """A cohort on disk: what is read at once, and which maps are alive meanwhile."""

    def __init__(self, volumes):
        self.volumes, self.shape, self.most = volumes, volumes.shape, 0

    def __len__(self):
        return len(self.volumes)

    def __getitem__(self, rows):
        self.most = max(self.most, len(rows))
        return self.volumes[rows]


def test_no_more_maps_are_kept_of_more_subjects(monkeypatch):
    alive, most, cat = [], [], torch.cat

    def noting(parts, *dimension):
        whole = cat(parts, *dimension)
        if whole.ndim == 5:
            alive.append(weakref.ref(whole))
            most.append(sum(one() is not None for one in alive))
        return whole

    monkeypatch.setattr(torch, "cat", noting)
    monkeypatch.setattr(networks, "in_batches", partial(networks.in_batches, size=2))
    for count in (5, 40):
        volumes = Watched(brains(count))
        alive.clear()
        most.clear()
        features.summarise(network(), volumes)
        features.mean_maps(network(), volumes, np.arange(count) % 2, [1])
        assert len(most) == -(-count // 2) * 3
        assert max(most) == 1
        assert volumes.most == 2


def test_the_network_is_left_as_it_is():
    made = network().train()
    before = {name: value.clone() for name, value in made.state_dict().items()}
    features.summarise(made, brains(3))
    assert made.training
    assert all(torch.equal(value, before[name]) for name, value in made.state_dict().items())
    assert made.hidden1[0].weight.requires_grad


def test_a_constant_map_has_no_entropy_and_no_test():
    volumes, sex = brains(8), np.arange(8) % 2
    made = network(3)
    nn.init.constant_(made.hidden1[0].weight[0], 1e-16)  # nothing but rounding
    nn.init.constant_(made.hidden1[1].bias, 3.3)
    nn.init.constant_(made.hidden1[1].weight[1], 0.1)
    with torch.no_grad():
        made.hidden1[1].bias[1] = -9  # the ReLU leaves nothing
    found = features.summarise(made, volumes)
    assert (found.entropy[:, :2] == 0).all()
    assert (found.entropy[:, 2] > 0).all()
    adjusted = Residuals(found.mean, np.arange(8.0), np.arange(8))[:]
    for values in (found.mean, found.entropy, adjusted):
        table = features.compare(values, sex)
        assert table["tested"].tolist() == [False, False, True]
        assert table.loc[:1, ["t", "p", "d", "holm", "fdr_u"]].isna().all(axis=None)
        assert table.notna().loc[2].all()
        assert features.counts(table)["not defined"] == 2
        assert set(features.shuffled(values, sex, shuffles=30)) <= {0, 1}  # of the one that varies
    none = features.compare(np.ones((8, 2)), sex)
    assert not none["tested"].any()
    assert features.counts(none)["p < .05"] == 0


@pytest.mark.parametrize("function", [features.summarise, features.mean_maps])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"volumes": brains(4, (26, 23, 24))}, r"volumes \(N, 23, 26, 24\), found \(4, 26, 23, 24"),
        ({"volumes": brains()[:0]}, r"found \(0, "),
        ({"network": MriNet2d(5, channels=2, shape=SHAPE)}, "a MriNet3d, found a MriNet2d"),
    ],
)
def test_another_shape_or_network_is_refused(function, change, message):
    call = {"network": network(), "volumes": brains(4)} | change
    if function is features.mean_maps:
        call |= {"sex": np.array([0, 1, 0, 1]), "maps": [0]}
    with pytest.raises(ValueError, match=message):
        function(**call)


def test_volumes_that_are_not_finite_are_named():
    volumes = brains(5)
    volumes[3, 9, 9, 9] = np.nan
    with pytest.raises(ValueError, match=r"volumes \[3\]: expected finite FA"):
        features.summarise(network(), volumes)


def test_mean_maps_are_the_sexes_means():
    made, volumes, sex = network(), brains(), np.array([1, 0, 0, 1, 0, 0, 0])
    maps = by_hand(made, volumes)
    found = features.mean_maps(made, volumes, sex, [2, 0])
    for label in (0, 1):
        assert_allclose(found[label], maps[sex == label][:, [2, 0]].mean(0), atol=1e-6)


def test_maps_lie_where_the_network_looked():
    """The centre of what one voxel of a map was pooled from, by hand."""
    affine = np.array([[3.0, 0, 0, -90], [0, 3.1, 0, -126], [0, 0, 2.5, -72], [0, 0, 0, 1]])
    found = features.map_affine(affine)
    for voxel in ((0, 0, 0), (4, 2, 7)):
        # convolutions are centred on voxels 1, 2, 3, …; pooling takes 2 of them
        seen = [[1 + 2 * v + part for v in voxel] for part in (0, 1)]
        expected = np.mean([affine @ [*one, 1] for one in seen], 0)
        assert_allclose(found @ [*voxel, 1], expected)


# ----------------------------------------------------------------------------- between the sexes


def values_and_sex(count=60, maps=9, seed=0):
    """Correlated maps; the first third higher in men, the second in women."""
    generator = np.random.default_rng(seed)
    sex = (np.arange(count) % 5 < 2).astype(int)
    values = generator.normal(5, 1, (count, maps)) + generator.normal(0, 1, (count, 1))
    values[:, : maps // 3] += sex[:, None] * 1.5
    values[:, maps // 3 : 2 * maps // 3] -= sex[:, None] * np.linspace(0.3, 1, maps // 3)
    return values, sex


def test_each_map_is_tested_as_by_hand():
    values, sex = values_and_sex()
    table = features.compare(values, sex)
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
        assert row.u == higher
        deviation = np.sqrt(n_men * n_women * (n_men + n_women + 1) / 12)
        z = (abs(higher - n_men * n_women / 2) - 0.5) / deviation
        assert row.p_u == pytest.approx(2 * stats.norm.sf(z))
        pooled = ((n_men - 1) * men.var(ddof=1) + (n_women - 1) * women.var(ddof=1)) / 58
        d = (men.mean() - women.mean()) / np.sqrt(pooled)
        half = 1.959964 * np.sqrt(1 / n_men + 1 / n_women + d**2 / (2 * 60))
        assert (row.d, row.d_low, row.d_high) == pytest.approx((d, d - half, d + half))
        assert row.men_half == pytest.approx(stats.t.ppf(0.975, n_men - 1) * np.sqrt(errors[0]))
        assert row.women_half == pytest.approx(stats.t.ppf(0.975, n_women - 1) * np.sqrt(errors[1]))
    assert table["tested"].all()


def test_corrections_by_hand(monkeypatch):
    """Holm 1979 and Benjamini and Hochberg 1995, of p = .01, .04, .03, .005."""
    p = np.array([0.01, 0.04, 0.03, 0.005])

    class Known:
        statistic, pvalue = np.ones(4), p

    monkeypatch.setattr(features.stats, "ttest_ind", lambda *_, **__: Known)
    table = features.compare(*values_and_sex(maps=4))
    assert table["holm"].tolist() == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert table["fdr"].tolist() == pytest.approx([0.02, 0.04, 0.04, 0.02])


def test_counts_are_those_of_the_table():
    table = features.compare(*values_and_sex(120))
    found = features.counts(table)
    assert found["maps"] == 9
    assert found["p < .05"] == sum(p < 0.05 for p in table["p"])
    men = sum(p < 0.05 and t > 0 for p, t in zip(table["p"], table["t"]))
    assert (found["men higher"], found["women higher"]) == (men, found["p < .05"] - men)
    assert found["men higher"] >= 3
    assert found["women higher"] >= 1
    assert found["Holm"] <= found["FDR"] <= found["p < .05"]


def test_the_interval_of_d_covers():
    generator = np.random.default_rng(0)
    sex = np.arange(60) % 2
    values = generator.normal(0, 1, (60, 2000))
    values[sex == 1] += 0.8
    table = features.compare(values, sex)
    covered = ((table["d_low"] < 0.8) & (table["d_high"] > 0.8)).mean()
    assert 0.93 < covered < 0.97


def test_shuffled_sexes_differ_in_one_map_of_twenty():
    """Interval over the shuffles: the maps are correlated, a binomial one would be too narrow."""
    values, sex = values_and_sex(80, 30)
    share = features.shuffled(values, sex, shuffles=1000, seed=3)
    assert share.shape == (1000,)
    error = share.std(ddof=1) / np.sqrt(1000)
    assert error > 1.5 * np.sqrt(0.05 * 0.95 / 30 / 1000)
    assert abs(share.mean() - 0.05) < 2.58 * error
    assert (features.compare(values, sex)["p"] < 0.05).mean() > 0.5


def test_shuffles_are_permutations_tested_by_welch(monkeypatch):
    values, sex = values_and_sex(20, 4)
    calls, test = [], stats.ttest_ind

    def noting(*groups, **options):
        calls.append(groups)
        return test(*groups, **options)

    monkeypatch.setattr(features.stats, "ttest_ind", noting)
    found = features.shuffled(values, sex, shuffles=150, seed=1)
    men, women = (np.concatenate(part) for part in zip(*calls[1:]))  # the first was `compare`
    assert men.shape == (150, 8, 4)
    expected = np.sort(values, 0)
    for one, other, share in zip(men, women, found):
        assert_allclose(np.sort(np.concatenate([one, other]), 0), expected)
        p = [test(one[:, c], other[:, c], equal_var=False).pvalue for c in range(4)]
        assert share == np.mean(np.array(p) < 0.05)
    assert len({one.tobytes() for one in men}) == 150
    assert_array_equal(features.shuffled(values, sex, shuffles=150, seed=1), found)


VALUES, SEX = values_and_sex(20, 3)


@pytest.mark.parametrize("function", [features.compare, features.shuffled])
@pytest.mark.parametrize(
    ("values", "sex", "message"),
    [
        (VALUES, np.zeros(20), "found 20 women and 0 men among 20"),
        (VALUES, np.ones(20), "found 0 women and 20 men"),
        (VALUES, np.eye(20)[0], "found 19 women and 1 men"),
        (VALUES, SEX * 2, "found 12 women and 0 men among 20"),
        (VALUES[:-1], SEX, r"finite values \(20, maps\), found \(19, 3\)"),
        (VALUES[:, 0], SEX, r"found \(20,\)"),
        (np.where(VALUES > 6, np.nan, VALUES), SEX, "of them not finite"),
    ],
)
def test_what_cannot_be_tested(function, values, sex, message):
    with pytest.raises(ValueError, match=message):
        function(values, sex)


def test_mean_maps_need_both_sexes():
    with pytest.raises(ValueError, match="found 4 women and 0 men"):
        features.mean_maps(network(), brains(4), np.zeros(4, int), [0])


# ------------------------------------------------------------------------------------- drawings


def texts(ax):
    return {round(text.get_position()[0], 3): text.get_text() for text in ax.texts}


def test_bars_are_marked_where_the_sexes_differ_and_constants_are_named():
    values, sex = values_and_sex(120)
    values[:, 4] = 2
    table = features.compare(values, sex)
    figure = feature_figures.feature_bars({"mean": table}, title="T", cohort="C, n=120")
    ax = figure.axes[0]
    marks = {
        c: "*" if t > 0 else "+" for c, t, p in zip(range(9), table["t"], table["p"]) if p < 0.05
    }
    assert {*marks.values()} == {"*", "+"}
    assert {text.xy[0]: text.get_text() for text in ax.texts if hasattr(text, "xy")} == marks
    assert [text.get_position()[0] for text in ax.texts if text.get_text() == "constant"] == [4]
    heights = [bar.get_height() for bar in ax.patches]
    assert_allclose(heights, [*values[sex == 0].mean(0), *values[sex == 1].mean(0)])
    foot = figure.get_supxlabel()
    assert "C, n=120" in foot
    assert "95 % t interval" in foot


def test_effect_sizes_leave_out_what_is_not_defined():
    values, sex = values_and_sex(120)
    values[:, 4] = 2
    table = features.compare(values, sex)
    figure = feature_figures.effect_sizes({"mean": {"all": table}}, title="T", cohort="C")
    found = np.sort(figure.axes[0].collections[1].get_offsets()[:, 0])
    assert_allclose(found, np.sort(table["d"].drop(4)))
    assert "95 % intervals of d" in figure.get_supxlabel().replace("\n", " ")


def test_kernels_are_seen_from_above():
    weights = np.zeros((2, 3, 3, 3))
    weights[1, 2, 0, 2] = 1  # right, posterior, upper
    figure = feature_figures.kernels(weights, title="T", cohort="C")
    images = [ax.images[0] for ax in figure.axes if ax.images]
    drawn = {
        tuple(np.argwhere(image.get_array())[0]) for image in images if image.get_array().any()
    }
    upper = figure.axes[1].images[0]  # the first row's second column
    assert drawn == {(0, 2)}
    assert upper.origin == "lower"
    assert upper.get_array()[0, 2] == 1


def test_maps_are_drawn_in_millimetres():
    affine = np.array([[3.0, 0, 0, -33], [0, 3.0, 0, -39], [0, 0, 3, -36], [0, 0, 0, 1]])
    background = np.zeros((22, 26, 24))
    background[4:18, 4:22, 4:20] = 0.5
    maps = np.zeros((2, 1, 10, 12, 11))
    maps[1, 0, 6, 5, 5] = 2.0  # at z = −1.5 mm, as the middle of the background
    figure = feature_figures.feature_maps(
        *(background, affine, maps, features.map_affine(affine), [7]), title="T", cohort="C"
    )
    women, men, axial = figure.axes[:3]
    assert [women.get_title(), men.get_title()] == ["women", "men"]
    assert women.get_ylabel() == "map 7"
    # a pooled voxel is 6 mm wide, its first one centred 1.5 voxels into the volume
    left, _, bottom, _ = men.images[0].get_extent()
    assert (left, bottom) == pytest.approx((-33 + 4.5 - 3, -39 + 4.5 - 3))
    assert len(axial.images) == 2
    assert men.images[0].get_array().max() == 2
    assert women.images[0].get_array().max() == 0
    assert {text.get_text() for text in axial.texts} >= {"L", "R", "A", "P"}


def test_families_change_places_as_a_whole(monkeypatch):
    """Two families of four: all women, all men. Only two ways to label them."""
    values = np.random.default_rng(0).normal(size=(8, 3))
    sex, groups = np.array([0, 0, 0, 0, 1, 1, 1, 1]), np.array(list("aaaabbbb"))
    share = features.shuffled(values, sex, groups=groups, shuffles=50, seed=0)
    p = stats.ttest_ind(values[:4], values[4:], equal_var=False).pvalue
    assert_allclose(share, np.mean(p < 0.05))
    with pytest.raises(ValueError, match="a map that varies"):
        features.shuffled(np.ones((8, 2)), sex)


def test_maps_without_an_affine_lie_nowhere():
    with pytest.raises(ValueError, match="expected an affine"):
        features.map_affine(None)
