"""Masks: right where the answer is known by hand, scored as stated, equal on any machine."""

import copy

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.ndimage import binary_dilation, gaussian_filter

from brainsex import perturbation, speed
from brainsex.networks import MriNet3d
from brainsex.perturbation import gaussian_blur, optimise_masks

pytestmark = pytest.mark.usefixtures("one_cpu_thread")

SMALL, LARGE = (22, 24, 26), (34, 42, 38)
BOX, DECOY = np.zeros((2, *LARGE), bool)
BOX[6:14, 26:34, 20:28] = True
DECOY[22:30, 8:16, 8:16] = True
FAR = ~binary_dilation(BOX, iterations=3)  # the mask's grid is half as fine, and moves


class BoxMean(MriNet3d):
    """Man where the mean of `BOX` is above 0.45: no other voxel counts."""

    def __init__(self, gain=30.0):
        super().__init__(2, LARGE)
        self.gain = gain
        self.register_buffer("box", torch.from_numpy(BOX / BOX.sum()).float())

    def forward(self, volumes):
        evidence = self.gain * ((volumes[:, 0] * self.box).sum((1, 2, 3)) - 0.45)
        return torch.stack([-evidence / 2, evidence / 2], 1)


@pytest.fixture
def bright():
    """One volume: evidence in `BOX`, as bright a box elsewhere, some noise."""
    volume = 0.15 + 0.02 * np.random.default_rng(0).standard_normal(LARGE)
    volume[BOX | DECOY] = 0.8
    return volume[None].astype(np.float32)


@pytest.fixture(scope="module")
def volumes():
    volumes = np.random.default_rng(1).uniform(0, 0.3, (4, *SMALL)).astype(np.float32)
    volumes[:, 3:9, 12:18, 14:20] += 0.5
    volumes.flags.writeable = False  # as a memory-mapped cohort's are
    return volumes


@pytest.fixture(scope="module")
def network(volumes):
    """Random convolutions, batch norms as after training; men by what their blur has not."""
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        network = MriNet3d(2, SMALL)
        smooth = np.stack([gaussian_filter(v, 5, mode="nearest") for v in volumes])
        both = torch.from_numpy(np.stack([volumes, smooth]))[:, :, None]
        for _ in range(30):
            network(both.flatten(0, 1))
        network.eval()
        sharp, blunt = (network.hidden3(network.hidden2(network.hidden1(b))) for b in both)
        sharp, blunt = sharp.flatten(1).mean(0), blunt.flatten(1).mean(0)
        evidence = 3 * (sharp - blunt) / (sharp - blunt).square().sum()
        network.linear.weight.copy_(torch.stack([-evidence, evidence]))
        middle = evidence @ (sharp + blunt) / 2
        network.linear.bias.copy_(torch.stack([middle, -middle]))
    return network


def quick_masks(network, volumes, **options):
    """A few steps under light penalties: masks of a small volume, neither empty nor full."""
    settings = {"iterations": 6, "area": 1.0, "progress": False} | options
    return optimise_masks(network, volumes, **settings)


@pytest.fixture
def unmoved(monkeypatch):
    """No shifts: `BoxMean` sees most where nothing is moved, which is where masks are scored."""
    monkeypatch.setattr(perturbation, "MAX_SHIFT", 0)


def test_the_mask_covers_the_evidence_and_leaves_the_rest(bright, precision, unmoved):
    masks = optimise_masks(BoxMean(), bright, progress=False)
    mask, (record,) = masks.masks[0], masks.history.to_dict("records")
    assert record["target"] == 1
    assert record["before"] > 0.999
    assert record["after"] < 0.55
    assert mask[BOX].mean() > 0.5
    assert mask[FAR].max() < 0.05
    assert mask[DECOY].max() == 0


def test_the_evidence_goes_however_dear_the_area(bright, monkeypatch, unmoved):
    dear = {"area": 1000.0, "progress": False}
    assert optimise_masks(BoxMean(), bright, **dear).history["after"][0] < 0.55
    monkeypatch.setattr(perturbation, "WEIGHT_GROWTH", 1.0)
    assert optimise_masks(BoxMean(), bright, **dear).history["after"][0] > 0.9


def test_a_class_without_evidence_needs_no_removal(bright):
    both = np.concatenate([bright, np.full_like(bright, 0.15)])
    settings = {"iterations": 25, "progress": False}
    predicted = optimise_masks(BoxMean(), both, **settings)
    assert predicted.history["target"].tolist() == [1, 0]
    women = optimise_masks(BoxMean(), both, target=0, **settings)
    assert women.history["before"][0] < 0.01
    assert women.masks[0].max() == 0
    np.testing.assert_array_equal(women.masks[1], predicted.masks[1])


def test_the_returned_mask_is_the_one_that_was_scored_in_float32(network, volumes, precision):
    masks = quick_masks(network, volumes)
    assert masks.masks.dtype == np.float32
    assert 0 <= masks.masks.min() < 0.1 < masks.masks.max() <= 1
    assert masks.history.columns.tolist() == ["target", "before", "after", "volume"]
    for volume, mask, row in zip(volumes, masks.masks, masks.history.itertuples()):
        smooth = gaussian_filter(volume, 5.0, mode="nearest", truncate=4)
        shown = torch.from_numpy(np.stack([volume, volume * (1 - mask) + smooth * mask]))
        with torch.no_grad():
            before, after = network(shown[:, None]).softmax(1)[:, row.target].tolist()
        assert row.before == pytest.approx(before, abs=1e-5)
        assert row.after == pytest.approx(after, abs=1e-4)
        assert row.volume == pytest.approx(mask.mean(dtype=float), abs=1e-6)
    assert (masks.history["before"] > 0.5).all()
    assert (masks.history["after"] < masks.history["before"] - 0.01).all()


def state(network):
    return (
        [module.training for module in network.modules()],
        [(p.requires_grad, p.grad, p.dtype, p.device) for p in network.parameters()],
        [len(module._forward_hooks) for module in network.modules()],
        (torch.get_num_threads(), torch.is_grad_enabled(), torch.get_rng_state().tolist()),
    )


@pytest.mark.parametrize("raising", [False, True])
def test_the_network_is_left_as_it_was(network, volumes, raising, monkeypatch):
    changed = copy.deepcopy(network).train()
    changed.hidden1[0].bias.requires_grad_(False)
    changed.linear.register_forward_hook(lambda *_: None)
    before = state(changed)
    if raising:
        monkeypatch.setattr(perturbation, "_perturb", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            quick_masks(changed, volumes)
    else:  # explained in evaluation mode
        masks, expected = (quick_masks(net, volumes[:2]).masks for net in (changed, network))
        np.testing.assert_array_equal(masks, expected)
    assert state(changed) == before
    for name, value in network.state_dict().items():
        assert torch.equal(changed.state_dict()[name], value), name


def test_same_bits_in_any_order_company_and_number_of_threads(network, volumes, precision):
    names, order = np.array(["000010", "000011", "000012", "000013"]), [2, 0, 3, 1]
    expected = quick_masks(network, volumes, subjects=names)
    for threads in (1, 3):
        torch.set_num_threads(threads)
        again = quick_masks(network, volumes[order], subjects=names[order])
        np.testing.assert_array_equal(again.masks, expected.masks[order])
        history = expected.history.iloc[order].reset_index(drop=True)
        pd.testing.assert_frame_equal(again.history, history)
    single = quick_masks(network, volumes[1:2], subjects=names[1:2])
    np.testing.assert_array_equal(single.masks[0], expected.masks[1])


def test_seed_and_subject_choose_the_draws_and_no_option_is_ignored(network, volumes):
    same = np.repeat(volumes[:1], 3, 0)
    masks = quick_masks(network, same, subjects=["a", "b", "a"]).masks
    np.testing.assert_array_equal(masks[0], masks[2])
    assert np.abs(masks[0] - masks[1]).max() > 1e-3
    for name, value in {"seed": 1, "iterations": 7, "area": 3.0}.items():
        changed = quick_masks(network, same[:1], subjects=["a"], **{name: value}).masks
        assert np.abs(changed[0] - masks[0]).max() > 1e-3, name
    assert len(np.unique(quick_masks(network, same).masks[:, 3:9].sum((1, 2, 3)))) == 3


def with_value(volumes, value):
    volumes = volumes.copy()
    volumes[2, 3, 4, 5] = value
    return volumes


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        (lambda v: v[0], {}, r"\(N, X, Y, Z\), found \(22, 24, 26\)"),
        (lambda v: v[..., :25], {}, r"expected volumes \(N, 1, 22, 24, 26\)"),
        (lambda v: with_value(v, np.nan), {}, r"NaN or infinity in rows \[2"),
        (lambda v: v, {"target": 2}, "target of 0 or 1.* found 2"),
        (lambda v: v, {"target": [0, 1]}, r"\(2,\) .* shape \(4,\)"),
        (lambda v: v, {"reference": np.zeros((2, *SMALL))}, r"\(2,22,.* \(4,22,"),
    ],
)
def test_bad_input(network, volumes, change, options, message):
    with pytest.raises(ValueError, match=message):
        quick_masks(network, change(volumes), **options)


def test_the_blur_is_scipys_gaussian_of_5_voxels(volumes):
    blurred = gaussian_blur(torch.from_numpy(volumes.copy())[:, None])
    for volume, image in zip(volumes, blurred[:, 0]):
        expected = gaussian_filter(volume.astype(float), 5.0, mode="nearest", truncate=4)
        np.testing.assert_allclose(image, expected, atol=1e-6)


def test_blurred_volumes_are_blurred_in_regions_of_the_seed_and_the_row(volumes):
    """All of a volume without a seed; with one, from nothing to about half, smoothly."""
    blur = np.stack([gaussian_filter(v, 5.0, mode="nearest") for v in volumes])
    whole = perturbation.BlurredVolumes(volumes)
    assert (len(whole), whole.shape) == (4, volumes.shape)
    np.testing.assert_allclose(whole[np.array([2, 0])], blur[[2, 0]], atol=1e-6)
    many = np.repeat(volumes[:1], 40, 0)
    parts = perturbation.BlurredVolumes(many, seed=3)[np.arange(40)]
    masks = ((parts - volumes[0]) / (blur[0] - volumes[0]))[:, np.abs(blur[0] - volumes[0]) > 0.05]
    assert -1e-3 < masks.min() < masks.max() < 1.001
    assert masks.mean(1).min() < 0.1 < 0.35 < masks.mean(1).max() < 0.75
    assert np.ptp(masks.mean(1)) > 0.3, "rows differ"
    alone = perturbation.BlurredVolumes(many, seed=3)[np.array([7])]
    np.testing.assert_array_equal(alone[0], parts[7])
    other = perturbation.BlurredVolumes(many, seed=4)[np.array([7])]
    assert np.abs(other - alone).max() > 0.01


def test_the_penalty_by_hand(monkeypatch):
    """One mask of 2 x 2 x 3 with a single step, one of zeros; worked out on paper."""
    monkeypatch.setattr(perturbation, "SMOOTHNESS", 2.0)
    coarse = torch.zeros(2, 1, 2, 2, 3)
    coarse[0, ..., 2] = 1.0  # mean 1/3; squared gradient along z: 0, 1 -> mean 1/2; none in x, y
    assert perturbation._penalty(coarse, 3.0).item() == pytest.approx((3 / 3 + 2 / 2) + 0)


def test_persistence_is_the_mean_mask_on_the_way(monkeypatch):
    """Constant masks, each step up or down; without the first step, which is the warm-up."""
    monkeypatch.setattr(perturbation, "WARM_UP", 1)
    seen, zeros = [], torch.zeros(1, 1, 4, 6, 8)

    def descend(slopes):
        left = iter(slopes)

        def network(images):  # which are the masks: log-odds of 5 and more
            seen.append(images.mean().item())
            return torch.stack([torch.zeros(1), 5 + images.mean((1, 2, 3, 4)) * next(left)], 1)

        inputs = zeros, zeros + 1, torch.tensor([1]), torch.zeros(1, 2), [[(0, 0, 0)]] * len(slopes)
        return perturbation._descend(network, *inputs, 0.0)

    final, mean = descend([0.5, -2.0, 1.0, 3.0])
    on_the_way = [*seen[2:], final.mean().item()]  # after steps 2, 3 and 4
    assert len(set(on_the_way)) == 3
    assert mean.mean().item() == pytest.approx(np.mean(on_the_way), abs=1e-6)
    np.testing.assert_array_equal(*descend([0.5]))  # nothing after the warm-up: the mask itself


def test_together_as_one_by_one(network, volumes, monkeypatch):
    """A batch, as a GPU has it: every volume minimises its own objective, no mean over all."""
    monkeypatch.setattr(perturbation, "LEARNING_RATE", 0.1)
    monkeypatch.setattr(perturbation.networks, "fast_precision", lambda device: torch.float32)
    # weights grow after the ramp, where the target is above the floor
    options = {"iterations": perturbation.RAMP + 20, "area": 30.0, "target": np.array([0, 1, 1])}
    masks = []
    for size in (1, 3):
        monkeypatch.setattr(speed, "CPU_BATCH", size)
        masks.append(quick_masks(network, volumes[:3], **options).masks)
    assert (masks[0] != masks[1]).any()
    np.testing.assert_allclose(*masks, atol=2e-3)


def test_shifts_reach_one_voxel_either_way(bright, precision, monkeypatch):
    """In float32 a single volume is padded to a pair, and both are moved alike."""
    shifts, perturb = [], perturbation._perturb

    def spied(*arguments):
        shifts.append(arguments[-1])
        return perturb(*arguments)

    monkeypatch.setattr(perturbation, "_perturb", spied)
    optimise_masks(BoxMean(), bright, iterations=100, progress=False)
    shifts = np.array(shifts)
    assert shifts.shape == (100, 2 if precision == torch.float32 else 1, 3)
    np.testing.assert_array_equal(shifts[:, 0], shifts[:, -1])
    for axis in shifts[:, 0].T:
        assert sorted(set(axis)) == [-1, 0, 1]
        assert abs(axis.mean()) < 0.3


def test_another_reference_takes_the_blurs_place(bright, unmoved):
    """The box is dark in the reference, and nothing else differs."""
    dark = np.where(BOX, 0.1, bright[0]).astype(np.float32)
    masks = optimise_masks(BoxMean(), bright, reference=dark, progress=False)
    seen = bright[0] + masks.masks[0] * (dark - bright[0])
    expected = 1 / (1 + np.exp(-30 * (seen[BOX].mean() - 0.45)))
    assert masks.history["after"][0] == pytest.approx(expected, abs=1e-3)
    assert expected < 0.55


@pytest.mark.parametrize("scale", [1, 0.02])  # log-odds without a mask above 1, and below
def test_a_step_goes_against_the_gradient_of_the_objective(network, volumes, monkeypatch, scale):
    """One step, no shifts: the mask moves against the sign of evidence's and area's gradient."""
    monkeypatch.setattr(perturbation, "MAX_SHIFT", 0)
    monkeypatch.setattr(perturbation.networks, "fast_precision", lambda device: torch.float32)
    network, volumes = copy.deepcopy(network), volumes[2:3]
    network.linear.load_state_dict({k: scale * v for k, v in network.linear.state_dict().items()})
    batch = torch.from_numpy(volumes.astype(float))[:, None]
    coarse = torch.full((1, 1, 11, 12, 13), 0.5, dtype=torch.double, requires_grad=True)
    large = torch.nn.functional.interpolate(coarse, size=SMALL, mode="trilinear")
    blur = np.stack([gaussian_filter(v.astype(float), 5, mode="nearest") for v in volumes])
    removed = torch.from_numpy(blur)[:, None] - batch
    plain = copy.deepcopy(network).double()
    start, now = (plain(v).diff(dim=1)[:, 0] for v in (batch, batch + large * removed))
    share = now.clamp(min=0) / start.detach().clamp(min=1)
    assert (start.item() > 1) == (scale == 1)
    (slope,) = torch.autograd.grad(share.sum(), coarse)
    values = slope.flatten().sort().values[100:800]  # of 1716
    gap = values.diff().argmax()
    price = -values[gap : gap + 2].mean()  # no voxel is near the sign's change
    area = price.item() * slope.numel() * 12  # steps of the ramp
    expected = 0.5 - 0.45 * (slope + price).sign()
    expected = torch.nn.functional.interpolate(expected, size=SMALL, mode="trilinear")[0, 0]
    mask = quick_masks(network, volumes, iterations=1, area=area, target=1).masks[0]
    np.testing.assert_allclose(mask, expected, atol=6e-3)  # Adam's epsilon
    assert mask.min() < 0.21 < 0.7 < mask.max()


def test_there_is_no_evidence_below_even_odds(network, volumes, monkeypatch):
    """Half of the blur is too much for this volume, unshifted: without a price nothing moves."""
    monkeypatch.setattr(perturbation, "MAX_SHIFT", 0)
    half = (volumes[0] + gaussian_filter(volumes[0], 5, mode="nearest")) / 2
    assert network(torch.from_numpy(half)[None, None]).diff(dim=1).item() < 0
    mask = quick_masks(network, volumes[:1], iterations=1, area=0.0, target=1).masks
    np.testing.assert_array_equal(mask, np.full_like(mask, 0.5))
