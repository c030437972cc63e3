"""Explanations against their definitions, worked out by hand or by autograd alone."""

import copy
from functools import partial

import numpy as np
import pytest
import torch
from scipy.interpolate import RegularGridInterpolator
from scipy.ndimage import gaussian_filter
from torch import nn
from torch.nn import functional as F

from brainsex import networks, saliency
from brainsex.networks import MriNet2d, MriNet3d

SHAPE = (22, 24, 27)
IN_BATCHES = networks.in_batches
METHODS = {
    "grad_cam": {},
    "guided_backpropagation": {},
    "gradient": {},
    "smooth_grad": {"samples": 2},
    "integrated_gradients": {"steps": 3, "reference": np.full(SHAPE, 0.1, np.float32)},
    "occlusion": {"window": 12, "stride": 10},
}


class Weighted(nn.Module):
    """Log-odds of man: the weighted sum of a volume's voxels, or of their squares."""

    def __init__(self, weight, power=1):
        super().__init__()
        self.weight, self.power = nn.Parameter(torch.from_numpy(weight)), power

    def forward(self, volumes):
        score = (volumes[:, 0] ** self.power * self.weight).sum((1, 2, 3))
        return torch.stack([3 - score, 3 + 0 * score], 1)


@pytest.fixture(scope="module")
def volumes():
    found = np.random.default_rng(0).uniform(0, 0.6, (3, *SHAPE)).astype(np.float32)
    found[:, 4:10, 5:12, 6:14] += 0.3
    found.flags.writeable = False  # as a memory-mapped cohort's are
    return found


@pytest.fixture(scope="module")
def network(volumes):
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(3)
        network = MriNet3d(2, SHAPE)
        for _ in range(20):  # batch norms as after training
            network(torch.from_numpy(volumes.copy())[:, None])
    return network.eval()


@pytest.fixture
def weight():
    return np.random.default_rng(5).standard_normal(SHAPE).astype(np.float32)


def log_odds(network, volume, target):
    logits = network(torch.as_tensor(volume)[None, None]).reshape(-1, 2).mean(0)  # of slabs
    return logits[target] - logits[1 - target]


def plain_gradient(network, volume, target):
    volume = torch.tensor(volume, requires_grad=True)
    return torch.autograd.grad(log_odds(network, volume, target), volume)[0].numpy()


def explained(name, network, volumes, **options):
    return getattr(saliency, name)(
        network, volumes, **METHODS[name] | {"progress": False} | options
    )


@pytest.mark.parametrize(
    ("layer", "part", "start", "step"),
    # a cell of the first layer is the largest of 2 convolved voxels, so sees 4: 0 to 3
    [("hidden1", 1, 1.5, 2), ("hidden2", 2, 4.5, 4), ("hidden3", 3, 10.5, 8)],
)
def test_grad_cam_is_its_definition(layer, part, start, step):
    rng = np.random.default_rng(2)
    shape = (38, 46, 54)  # 3, 4 and 5 cells in hidden3
    volumes = rng.uniform(0, 1, (2, *shape)).astype(np.float32)
    torch.manual_seed(1)
    network = MriNet3d(4, shape).eval()
    found = saliency.grad_cam(network, volumes, layer=layer, target=[1, 0], progress=False)
    assert found.any()
    for volume, target, one in zip(volumes, (1, 0), found):
        features = torch.from_numpy(volume)[None, None]
        for hidden in (network.hidden1, network.hidden2, network.hidden3)[:part]:
            features = hidden(features)
        features = features.detach().requires_grad_()
        rest = features
        for hidden in (network.hidden1, network.hidden2, network.hidden3)[part:]:
            rest = hidden(rest)
        logits = network.linear(rest.flatten(1))[0]
        slope = torch.autograd.grad(logits[target] - logits[1 - target], features)[0]
        weights = slope.mean((2, 3, 4), keepdim=True)
        coarse = (weights * features).sum(1).clamp(min=0)[0].detach().double().numpy()
        centres = [start + step * np.arange(cells) for cells in coarse.shape]
        voxels = [
            np.clip(np.arange(n), c[0], c[-1]) for n, c in zip(shape, centres)
        ]  # beyond the outermost centres nothing is known but them
        expected = RegularGridInterpolator(centres, coarse)(
            np.stack(np.meshgrid(*voxels, indexing="ij"), -1)
        )
        assert one.dtype == np.float32
        np.testing.assert_allclose(one, expected, atol=1e-5 * max(1, coarse.max()))


def test_grad_cam_lies_where_the_evidence_is():
    """A layer of means: one bright spot; the map's centre of mass is at it, not displaced."""

    class Spot(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Sequential(nn.Conv3d(1, 1, 3, bias=False), nn.AvgPool3d(4))
            nn.init.ones_(self.layer[0].weight)

        def forward(self, volumes):
            score = self.layer(volumes).sum((1, 2, 3, 4))
            return torch.stack([-score, score], 1)

    volume = np.zeros((1, 42, 46, 50), np.float32)
    centre = (2.5 + 4 * 8, 2.5 + 4 * 2, 2.5 + 4 * 10)  # of a cell that sees 6 voxels a side
    spot = tuple(slice(int(c - 0.5), int(c + 1.5)) for c in centre)
    volume[0][spot] = 1
    found = saliency.grad_cam(Spot(), volume, layer="layer", target=1, progress=False)[0]
    for axis, expected in enumerate(centre):
        profile = found.sum(tuple({0, 1, 2} - {axis}))
        assert (profile * np.arange(len(profile))).sum() / profile.sum() == pytest.approx(expected)


@pytest.mark.parametrize("layer", ["hidden4", "", "hidden1.9"])
def test_grad_cam_of_no_layer(network, volumes, layer):
    with pytest.raises(ValueError, match=rf"layer among hidden1, .*linear, found '{layer}'"):
        saliency.grad_cam(network, volumes, layer=layer, progress=False)


def test_grad_cam_of_a_layer_without_feature_maps(network, volumes):
    with pytest.raises(ValueError, match=r"feature maps .* linear has none"):
        saliency.grad_cam(network, volumes, layer="linear", progress=False)


class Guided(torch.autograd.Function):
    @staticmethod
    def forward(context, values):
        context.save_for_backward(values)
        return values.clamp(min=0)

    @staticmethod
    def backward(context, slope):
        (values,) = context.saved_tensors
        return slope.clamp(min=0) * (values > 0)


class Apply(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, values):
        return self.function(values)


class Idle(nn.Module):
    """A module whose output nobody takes, beside the function call that counts."""

    def __init__(self):
        super().__init__()
        self.relu = nn.ReLU()

    def forward(self, values):
        self.relu(values)
        return F.relu(values)


def replaced(network, function, names=("hidden1", "hidden2", "hidden3")):
    network = copy.deepcopy(network)
    for name in names:
        getattr(network, name)[3] = Apply(function)
    return network


def test_guided_backpropagation_is_its_definition_and_not_the_gradient(network, volumes):
    found = saliency.guided_backpropagation(network, volumes, target=1, progress=False)
    by_hand = replaced(network, Guided.apply)
    for volume, one in zip(volumes, found):
        expected = plain_gradient(by_hand, volume.copy(), 1)
        np.testing.assert_allclose(one, expected, atol=1e-5 * np.abs(expected).max())
        gradient = plain_gradient(network, volume.copy(), 1)
        assert np.abs(one - gradient).max() > 0.1 * np.abs(gradient).max()


@pytest.mark.parametrize(
    ("function", "found"),
    [
        (F.relu, "ReluBackward0"),
        (nn.LeakyReLU(), "LeakyReluBackward0"),
        (Idle(), "ReluBackward0"),
        (lambda values: values.clamp(min=0), "ClampBackward1"),
        (lambda values: F.threshold(values, 0, 0), "ThresholdBackward0"),
        (F.relu6, "HardtanhBackward0"),
        (F.elu, "EluBackward0"),
        (F.gelu, "GeluBackward0"),
        (torch.tanh, "TanhBackward0"),
        (lambda values: torch.maximum(values, torch.zeros(())), "MaximumBackward0"),
        (lambda values: torch.where(values > 0, values, 0), "WhereBackward0"),
        (lambda values: values * (values > 0), "MulBackward0"),
        (lambda values: (values + values.abs()) / 2, "AbsBackward0, DivBackward0"),
        (Guided.apply, "GuidedBackward"),
    ],
)
def test_guided_backpropagation_refuses_what_it_cannot_guide(network, volumes, function, found):
    with pytest.raises(ValueError, match=rf"layers, found {found}: nothing but an nn\.ReLU"):
        saliency.guided_backpropagation(
            replaced(network, function, ["hidden2"]), volumes, progress=False
        )


def test_guided_backpropagation_needs_a_relu(network, volumes):
    network = replaced(network, nn.Identity())
    with pytest.raises(ValueError, match=r"layers, found no nn\.ReLU"):
        saliency.guided_backpropagation(network, volumes, progress=False)


@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("residual", [False, True])
def test_guided_backpropagation_of_slabs_is_its_definition(volumes, axis, residual):
    torch.manual_seed(0)
    network = MriNet2d(3, axis=axis, channels=8, shape=SHAPE, residual=residual).eval()
    found = saliency.guided_backpropagation(network, volumes[:1], target=1, progress=False)[0]
    expected = plain_gradient(replaced(network, Guided.apply), volumes[0].copy(), 1)
    assert found.any()
    np.testing.assert_allclose(found, expected, atol=1e-5 * np.abs(expected).max())


def test_linear_steps_and_poolings_need_no_guiding(volumes):
    def steps(values):  # (N, 4, X, Y, Z)
        values = torch.cat([values[:, 2:], values[:, :2]], 1) + values.transpose(1, 2).permute(
            0, 2, 1, 3, 4
        )
        return values.mean((2, 3)).reshape(len(values), -1)

    network = nn.Sequential(
        *(nn.ZeroPad3d(1), nn.Conv3d(1, 4, 3, padding="same"), nn.BatchNorm3d(4), nn.ReLU()),
        *(nn.AvgPool3d(2), nn.AdaptiveMaxPool3d(8), nn.AdaptiveAvgPool3d(4), Apply(steps)),
        *(nn.Dropout(), nn.Linear(16, 8, bias=False), nn.ReLU(), nn.Linear(8, 2)),
    )
    assert saliency.guided_backpropagation(network, volumes[:1], progress=False).any()


def test_gradient_times_input_and_times_another_image(network, volumes, weight):
    found = saliency.gradient(network, volumes, target=[0, 1, 0], progress=False)
    other = saliency.gradient(network, volumes, target=[0, 1, 0], times=weight, progress=False)
    for n, target in enumerate((0, 1, 0)):
        slope = plain_gradient(network, volumes[n].copy(), target)
        atol = 1e-5 * np.abs(slope).max()
        np.testing.assert_allclose(found[n], slope * volumes[n], atol=atol)
        np.testing.assert_allclose(other[n], slope * weight, atol=4 * atol)
    each = saliency.gradient(network, volumes, target=1, times=volumes, progress=False)
    same = saliency.gradient(network, volumes, target=1, progress=False)
    np.testing.assert_array_equal(each, same)


def test_integrated_gradients_add_up_to_the_difference(volumes, weight):
    """Of squares the integrand is linear, so the sum is exact: w (x² − r²)."""
    network = Weighted(weight, power=2)
    reference = np.full(SHAPE, 0.25, np.float32)
    found = saliency.integrated_gradients(
        network, volumes, reference=reference, target=1, steps=2, progress=False
    )
    # (x - r) times the mean gradient 2 w (x + r) / 2
    np.testing.assert_allclose(found, weight * (volumes**2 - 0.25**2), atol=1e-5)


def test_integrated_gradients_take_no_more_than_a_batch_at_once(network, volumes, monkeypatch):
    """On a GPU, of 32 volumes with their gradients; a single one goes `FEW` steps at once."""
    network, sizes = copy.deepcopy(network), []
    network.linear.register_forward_hook(lambda _, given, __: sizes.append(len(given[0])))
    volumes = np.concatenate([volumes, volumes])
    for size, most in ((6, 6), (1, saliency.FEW)):
        monkeypatch.setattr(networks, "in_batches", partial(IN_BATCHES, size=size))
        sizes.clear()
        explained("integrated_gradients", network, volumes, steps=8, target=1)
        assert max(sizes) == most


def test_smooth_grad_is_the_mean_gradient_of_noisy_copies(volumes, weight):
    """Of squares: 2 w (x + the mean of the noise), which is normal with noise² / samples."""
    found = saliency.smooth_grad(
        Weighted(weight, power=2), volumes, target=1, samples=9, noise=0.3, progress=False
    )
    noise = found / (2 * weight) - volumes
    assert noise[np.broadcast_to(np.abs(weight) > 0.1, noise.shape)].std() == pytest.approx(
        0.1, rel=0.05
    )
    quiet = saliency.smooth_grad(Weighted(weight), volumes, target=0, noise=0.3, progress=False)
    np.testing.assert_allclose(quiet, np.broadcast_to(-weight, quiet.shape), atol=1e-5)


def test_smooth_grads_draws_come_from_seed_and_subject(network, volumes):
    options = {"target": 1, "samples": 2, "noise": 0.1, "progress": False}
    found = saliency.smooth_grad(network, volumes, subjects=["a", "b", "c"], **options)
    state = torch.get_rng_state()
    again = saliency.smooth_grad(network, volumes[[2, 0]], subjects=["c", "a"], **options)
    assert torch.equal(torch.get_rng_state(), state)
    np.testing.assert_array_equal(again, found[[2, 0]])
    other = saliency.smooth_grad(network, volumes, subjects=["a", "b", "c"], seed=1, **options)
    assert np.abs(other - found).max() > 1e-6


def test_occlusion_by_hand(volumes):
    """Cubes of 12 voxels from 0, 10 and 20: what a cube loses, averaged over a voxel's cubes."""
    found = saliency.occlusion(
        Weighted(np.ones(SHAPE, np.float32)),
        volumes,
        window=12,
        stride=10,
        target=1,
        progress=False,
    )
    assert np.abs(found).max() > 1
    for volume, one in zip(volumes.astype(float), found):
        lost = volume - gaussian_filter(volume, 5.0, mode="nearest")
        total, count = np.zeros((2, *SHAPE))
        for x in (0, 10):
            for y in (0, 10, 20):
                for z in (0, 10, 20):
                    cube = (slice(x, x + 12), slice(y, y + 12), slice(z, z + 12))
                    total[cube] += lost[cube].sum()
                    count[cube] += 1
        np.testing.assert_allclose(one, total / count, atol=1e-2)


@pytest.mark.parametrize(("window", "stride"), [(23, 4), (8, 9), (8, 0), (0, 0)])
def test_occlusion_of_cubes_that_do_not_fit(network, volumes, window, stride):
    message = rf"window <= 22, .* found a stride of {stride} and a window of {window}\."
    with pytest.raises(ValueError, match=message):
        explained("occlusion", network, volumes, window=window, stride=stride)


def test_smoothed_map_by_map():
    maps = np.random.default_rng(1).standard_normal((2, 9, 10, 11)).astype(np.float32)
    for one, expected in zip(saliency.smoothed(maps, 1.5), maps):
        np.testing.assert_allclose(one, gaussian_filter(expected, 1.5, mode="nearest"), atol=1e-6)


@pytest.mark.parametrize("name", METHODS)
def test_every_method_alike(name, network, volumes):
    """The class predicted by default, the same bits in any company, nothing left on the network."""
    network = copy.deepcopy(network).train()
    network.hidden1[0].bias.requires_grad_(False)
    network.linear.register_forward_hook(lambda *_: None)

    def state():
        return (
            [m.training for m in network.modules()],
            [(p.requires_grad, p.grad) for p in network.parameters()],
            [(len(m._forward_hooks), len(m._backward_hooks)) for m in network.modules()],
            torch.get_num_threads(),
        )

    before, weights = state(), copy.deepcopy(network.state_dict())
    found = explained(name, network, volumes)
    assert found.shape == volumes.shape
    assert found.dtype == np.float32
    assert np.isfinite(found).all()
    assert found.any()
    with torch.no_grad():
        logits = copy.deepcopy(network).eval()(torch.from_numpy(volumes.copy())[:, None])
    predicted = logits.argmax(1).numpy()
    np.testing.assert_array_equal(explained(name, network, volumes, target=predicted), found)
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        alone = explained(name, network, volumes[:1])
        np.testing.assert_array_equal(alone, found[:1])
    finally:
        torch.set_num_threads(threads)
    assert state() == before
    for key, value in network.state_dict().items():
        assert torch.equal(value, weights[key])
    assert explained(name, network, volumes[:0]).shape == (0, *SHAPE)


@pytest.mark.parametrize("name", METHODS)
def test_a_batch_as_a_gpu_has_it_is_one_after_the_other(name, network, volumes, monkeypatch):
    alone = explained(name, network, volumes, target=np.array([1, 0, 1]))
    monkeypatch.setattr(networks, "in_batches", partial(IN_BATCHES, size=2))
    together = explained(name, network, volumes, target=np.array([1, 0, 1]))
    np.testing.assert_allclose(together, alone, atol=1e-4 * np.abs(alone).max())


@pytest.mark.parametrize("name", ["gradient", "smooth_grad", "integrated_gradients", "occlusion"])
def test_the_other_target_turns_the_sign(name, network, volumes):
    men, women = (explained(name, network, volumes, target=target) for target in (1, 0))
    np.testing.assert_allclose(men, -women, atol=1e-5 * np.abs(men).max())


def test_networks_of_slabs_are_explained_too(volumes):
    torch.manual_seed(0)
    network = MriNet2d(3, axis=0, channels=2, shape=SHAPE).eval()
    found = saliency.gradient(network, volumes, target=1, progress=False)
    slope = plain_gradient(network, volumes[0].copy(), 1)
    np.testing.assert_allclose(found[0], slope * volumes[0], atol=1e-6)


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        (lambda v: v[0], {}, r"\(N, X, Y, Z\), found \(22, 24, 27\)"),
        (lambda v: np.where(v > 0.89, np.nan, v), {"target": 1}, "NaN or infinity"),
        (lambda v: v, {"target": 2}, "target of 0 or 1"),
        (lambda v: v, {"target": [0, 1]}, "each of 3 volumes"),
    ],
)
def test_bad_input(name, network, volumes, change, options, message):
    with pytest.raises(ValueError, match=message):
        explained(name, network, change(volumes), **options)


@pytest.mark.parametrize(
    ("name", "option"),
    [("gradient", "times"), ("integrated_gradients", "reference")],
)
@pytest.mark.parametrize(
    ("image", "message"),
    [
        (np.zeros((5, 6)), r"\(22, 24, 27\), or one for each of 3 .* found \(5, 6\)"),
        (np.full(SHAPE, np.nan), "finite, found NaN"),
    ],
)
def test_image_on_another_grid_or_not_finite(name, option, image, message, network, volumes):
    with pytest.raises(ValueError, match=message):
        explained(name, network, volumes, **{option: image})


def test_where_a_cell_looks_with_padding_and_dilation():
    """Same padding moves nothing, a dilation of 2 two voxels, pooling half a voxel and doubles."""
    network = nn.Sequential(
        nn.Conv3d(1, 2, 3, padding="same"),
        nn.ReLU(),
        nn.Conv3d(2, 2, 3, dilation=2, padding="valid"),
        nn.MaxPool3d(2),
        nn.Conv3d(2, 2, (3, 1, 1), padding=(1, 0, 0)),
    )
    assert [saliency._centres(network, "4", axis) for axis in range(3)] == [(2, 2.5)] * 3
    assert saliency._centres(network, "0", 0) == (1, 0)
