"""Explanations against their definitions, worked out by hand or by autograd alone."""

import copy
from functools import partial

import numpy as np
import pytest
import torch
from scipy.interpolate import RegularGridInterpolator
from scipy.ndimage import gaussian_filter
from torch import nn

from brainsex import saliency, speed
from brainsex.networks import MriNet2d, MriNet3d
from brainsex.saliency import METHODS

pytestmark = pytest.mark.usefixtures("one_cpu_thread")

SHAPE = (22, 24, 27)
QUICK = {
    "mask": {"iterations": 3, "area": 1.0},
    "counterfactual": {"iterations": 3, "area": 1.0},
    "integrated_gradients": {"steps": 3},
}
CAPTUM = [method for method in METHODS if METHODS[method].compute]


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
    volumes = np.random.default_rng(0).uniform(0, 0.6, (3, *SHAPE)).astype(np.float32)
    volumes[:, 4:10, 5:12, 6:14] += 0.3
    volumes.flags.writeable = False  # as a memory-mapped cohort's are
    return volumes


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


def plain_gradient(network, volume, target):
    volume = torch.tensor(volume, requires_grad=True)
    logits = network(volume[None, None]).reshape(-1, 2).mean(0)  # of slabs
    return torch.autograd.grad(logits[target] - logits[1 - target], volume)[0].numpy()


def explain(method, network, volumes, **options):
    """Attribute without smoothing, quickly, with a reference where the method needs one."""
    settings = {"sigma": 0, "progress": False} | QUICK.get(method, {})
    if METHODS[method].reference:
        settings["reference"] = np.full(volumes.shape[1:], 0.1, np.float32)
    return saliency.attribute(network, volumes, method, **settings | options)


def test_grad_cam_is_its_definition():
    """A cell of hidden3 sees 22 voxels, from 0 to 21 the first, and 8 further on the next."""
    rng, shape = np.random.default_rng(2), (30, 38, 46)  # 2, 3 and 4 cells
    volumes = rng.uniform(0, 1, (2, *shape)).astype(np.float32)
    torch.manual_seed(1)
    network = MriNet3d(4, shape).eval()
    maps = explain("grad_cam", network, volumes, target=np.array([1, 0]))
    assert maps.any()
    for volume, target, image in zip(volumes, (1, 0), maps):
        hidden = nn.Sequential(network.hidden1, network.hidden2, network.hidden3)
        features = hidden(torch.from_numpy(volume)[None, None]).detach().requires_grad_()
        logits = network.linear(features.flatten(1))[0]
        slope = torch.autograd.grad(logits[target] - logits[1 - target], features)[0]
        weights = slope.mean((2, 3, 4), keepdim=True)
        coarse = (weights * features).sum(1).clamp(min=0)[0].detach().double().numpy()
        centres = [10.5 + 8 * np.arange(cells) for cells in coarse.shape]
        voxels = [np.clip(np.arange(n), c[0], c[-1]) for n, c in zip(shape, centres)]
        grid = np.stack(np.meshgrid(*voxels, indexing="ij"), -1)
        expected = RegularGridInterpolator(centres, coarse)(grid)
        np.testing.assert_allclose(image, expected, atol=1e-5 * max(1, coarse.max()))


class Guided(torch.autograd.Function):
    @staticmethod
    def forward(context, values):
        context.save_for_backward(values)
        return values.clamp(min=0)

    @staticmethod
    def backward(context, slope):
        (values,) = context.saved_tensors
        return slope.clamp(min=0) * (values > 0)


def replaced(network, function):
    """A copy of a network with a function in place of its ReLUs."""
    network = copy.deepcopy(network)
    for layer in (network.hidden1, network.hidden2, network.hidden3):
        place = [isinstance(module, nn.ReLU) for module in layer].index(True)
        layer[place] = nn.Module()
        layer[place].forward = function
    return network


@pytest.mark.parametrize("slabs", [False, True])
def test_guided_backpropagation_is_its_definition_and_not_the_gradient(network, volumes, slabs):
    torch.manual_seed(0)
    network = MriNet2d(channels=8, shape=SHAPE, residual=True).eval() if slabs else network
    image = explain("guided_backpropagation", network, volumes[:1], target=1)[0]
    expected = plain_gradient(replaced(network, Guided.apply), volumes[0].copy(), 1)
    np.testing.assert_allclose(image, expected, atol=1e-5 * np.abs(expected).max())
    gradient = plain_gradient(network, volumes[0].copy(), 1)
    assert np.abs(image - gradient).max() > 0.1 * np.abs(gradient).max()


def test_integrated_gradients_add_up_to_the_difference(volumes, weight):
    """Of squares the integrand is linear, so the sum is exact: w (x² − r²)."""
    network, reference = Weighted(weight, power=2), np.full(SHAPE, 0.25, np.float32)
    settings = {"reference": reference, "target": 1, "steps": 2}
    maps = explain("integrated_gradients", network, volumes, **settings)
    # (x - r) times the mean gradient 2 w (x + r) / 2
    np.testing.assert_allclose(maps, weight * (volumes**2 - 0.25**2), atol=1e-5)


def test_reference_for_and_smoothing(network, volumes, weight):
    means, target = np.stack([weight, 3 * weight**2]), np.array([1, 0, 1])
    assert saliency.reference_for("grad_cam", means, target) is None
    other = saliency.reference_for("counterfactual", means, target)
    np.testing.assert_array_equal(other, means[[0, 1, 0]])
    difference = saliency.reference_for("gradient_difference", means, target, 1.5)
    expected = gaussian_filter(means[1] - means[0], 1.5, mode="nearest")
    np.testing.assert_allclose(difference, [expected, -expected, expected], atol=1e-5)
    maps = (explain("gradient_input", network, volumes[:1], sigma=sigma) for sigma in (0, 1.5))
    plain, smoothed = (image[0] for image in maps)
    expected = gaussian_filter(plain, 1.5, mode="nearest")
    np.testing.assert_allclose(smoothed, expected, atol=1e-6 * np.abs(plain).max())


@pytest.mark.parametrize("method", METHODS)
def test_every_method_alike(method, network, volumes):
    """The class predicted by default, the same bits in any company, nothing left on the network."""
    network = copy.deepcopy(network).train()
    network.hidden1[0].bias.requires_grad_(False)
    network.linear.register_forward_hook(lambda *_: None)

    def state():
        modules = [(m.training, *map(len, (m._forward_hooks, m._backward_hooks))) for m in parts]
        return modules, [(p.requires_grad, p.grad) for p in network.parameters()]

    parts = list(network.modules())
    before, weights = state(), copy.deepcopy(network.state_dict())
    maps = explain(method, network, volumes)
    assert (maps.shape, maps.dtype) == (volumes.shape, np.float32)
    assert maps.any()
    with torch.no_grad():
        logits = copy.deepcopy(network).eval()(torch.from_numpy(volumes.copy())[:, None])
    single = explain(method, network, volumes[:1], target=logits.argmax(1).numpy()[:1])
    np.testing.assert_array_equal(single, maps[:1])
    assert state() == before
    for key, value in network.state_dict().items():
        assert torch.equal(value, weights[key])


@pytest.mark.parametrize("method", CAPTUM)
def test_a_batch_as_a_gpu_has_it_is_one_after_the_other(method, network, volumes, monkeypatch):
    target = np.array([1, 0, 1])
    single = explain(method, network, volumes, target=target)
    monkeypatch.setattr(speed, "map_batches", partial(speed.map_batches, size=2))
    together = explain(method, network, volumes, target=target)
    np.testing.assert_allclose(together, single, atol=1e-4 * np.abs(single).max())


@pytest.mark.parametrize(
    ("method", "change", "options", "message"),
    [
        ("gradient_input", lambda v: v[0], {}, r"\(N, X, Y, Z\), found \(22, 24, 27\)"),
        ("gradient_input", lambda v: np.where(v > 0.89, np.nan, v), {}, "NaN or infinity"),
        ("grad_cam", lambda v: v, {"target": 2}, "target of 0 or 1"),
        ("counterfactual", lambda v: v, {"reference": None}, "takes a reference; see"),
        (
            "gradient_difference",
            lambda v: v,
            {"reference": np.zeros((5, 6))},
            r"found \(5, 6\)",
        ),
    ],
)
def test_bad_input(method, change, options, message, network, volumes):
    settings = {"progress": False} | QUICK.get(method, {})
    with pytest.raises(ValueError, match=message):
        saliency.attribute(network, change(volumes), method, **settings | options)
