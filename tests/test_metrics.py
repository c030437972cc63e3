"""Measures of explanations against cases worked out by hand."""

import copy
from functools import partial

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.ndimage import gaussian_filter
from torch import nn

from brainsex import metrics
from brainsex.cohort import Cohort
from brainsex.networks import MriNet3d

SHAPE = (3, 4, 5)


def line(*values: float) -> np.ndarray:
    """Make a map whose first voxels along Z at (0, 0) have these values; it is 0 elsewhere."""
    volume = np.zeros(SHAPE)
    volume[0, 0, : len(values)] = values
    return volume


def sigmoid(x: float) -> float:
    return 1 / (1 + np.exp(-x))


class Sum(nn.Module):
    """Log-odds of man: the sum of a volume's voxels, each with its weight, less a threshold."""

    def __init__(self, weight: np.ndarray, threshold: float = 0.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.from_numpy(np.asarray(weight)).float())
        self.threshold = threshold

    def forward(self, volumes: torch.Tensor) -> torch.Tensor:
        score = (volumes[:, 0] * self.weight).sum((1, 2, 3)) - self.threshold
        return torch.stack([-score / 2, score / 2], 1)


def make_cohort(volumes: np.ndarray, sex: np.ndarray) -> Cohort:
    subjects = np.array([f"{n:03d}" for n in range(len(sex))])
    table = pd.DataFrame({"Subject": subjects, "label": sex})
    return Cohort("toy", True, volumes, sex, subjects, None, np.eye(4), table)


def test_average_precision_by_hand():
    """Five voxels, two planted; ranked first and third: AP = (1/1 + 2/3) / 2 = 5/6."""
    brain, truth = line(1, 1, 1, 1, 1) > 0, line(1, 0, 0, 1, 0) > 0
    truth[2, 3, 4] = True  # outside the brain: does not count
    maps = np.stack([line(5, 4, 1, 3), line(1, 3, 0, 2), line(0, 0), line(7, 2, 2, 7, -5)])
    maps[:, 2, 3, 4] = 9
    # ranks of the planted: 1 and 3; 3 and 2; all tied; first and first
    expected = [(1 + 2 / 3) / 2, (1 / 2 + 2 / 3) / 2, 0.4, 1]
    assert metrics.average_precision(maps, truth, brain).tolist() == pytest.approx(expected)
    with pytest.raises(ValueError, match="NaN"):
        metrics.average_precision(np.full((1, *SHAPE), np.nan), truth, brain)


def test_top_voxels_are_of_the_brain_and_ties_know_no_order():
    brain = np.ones(SHAPE, bool)
    brain[0] = False
    values = np.zeros(SHAPE)
    values[0], values[1, 2, 3] = 7, 1
    chosen = metrics.top_voxels(values, brain, 20)
    assert chosen.sum() == 20
    assert chosen[1, 2, 3]
    assert not chosen[0].any()
    assert min(chosen[1].sum(), chosen[2].sum()) > 4, "ties are not taken in the order of voxels"


def test_deletion_and_insertion_by_hand(monkeypatch):
    """Two of four voxels carry log-odds of 2 and 1; an empty reference; fractions 0, 1/4, 1/2."""
    monkeypatch.setattr(metrics, "FRACTIONS", (0, 0.25, 0.5))
    brain, volume = line(1, 1, 1, 1) > 0, line(1, 1, 1, 1)[None]
    measure = partial(metrics.deletion_insertion, Sum(line(2, 1, 0, 0)), volume)
    measure = partial(measure, brain=brain, reference=np.zeros(SHAPE))
    scores = measure(line(4, 3, 2, 1)[None], target=1)
    deleted, inserted = [sigmoid(3), sigmoid(1), sigmoid(0)], [sigmoid(0), sigmoid(2), sigmoid(3)]
    np.testing.assert_allclose(scores["deletion"][0], deleted, atol=1e-6)
    np.testing.assert_allclose(scores["insertion"][0], inserted, atol=1e-6)
    for name, (a, b, c) in (("deletion", deleted), ("insertion", inserted)):
        area = ((a + b) / 2 + (b + c) / 2) / 2
        assert scores[f"{name}_area"][0] == pytest.approx(area, abs=1e-6)
    worse = measure(line(1, 2, 3, 4)[None], target=1)
    np.testing.assert_allclose(worse["deletion"][0], [sigmoid(3)] * 3, atol=1e-6)
    woman = measure(line(4, 3, 2, 1)[None], target=0, insertion=False)
    assert set(woman) == {"deletion", "deletion_area"}
    np.testing.assert_allclose(woman["deletion"], 1 - scores["deletion"], atol=1e-6)


def test_the_reference_is_the_blur_by_default(monkeypatch):
    """All of a volume deleted is its blur, which scipy makes too."""
    monkeypatch.setattr(metrics, "FRACTIONS", (0, 1))
    volume, weight = np.random.default_rng(0).random((2, 8, 9, 10)).astype(np.float32)
    inputs = Sum(weight / 100, 2.0), volume[None], volume[None], np.ones(volume.shape, bool)
    scores = metrics.deletion_insertion(*inputs, target=1)
    blur = gaussian_filter(volume.astype(float), 5.0, mode="nearest")
    expected = [sigmoid((weight / 100 * v).sum() - 2.0) for v in (volume, blur)]
    np.testing.assert_allclose(scores["deletion"][0], expected, rtol=1e-5)
    np.testing.assert_allclose(scores["insertion"][0], expected[::-1], rtol=1e-5)


def test_deletion_leaves_the_network_alone_and_ignores_company():
    torch.manual_seed(0)
    network = MriNet3d(2, (22, 23, 24)).train()
    before = copy.deepcopy(network.state_dict())
    volumes, maps = np.random.default_rng(1).random((2, 3, 22, 23, 24)).astype(np.float32)
    volumes.flags.writeable = False
    measure = partial(metrics.deletion_insertion, network, target=1)
    brain = np.ones((22, 23, 24), bool)
    scores = measure(volumes, maps, brain)
    np.testing.assert_array_equal(
        scores["deletion"][1:2], measure(volumes[1:2], maps[1:2], brain)["deletion"]
    )
    assert network.training
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"maps": np.zeros((1, 3, 4, 6))}, r"found \(1, 3, 4, 6\)"),
        ({"reference": np.zeros((4, 6))}, r"\(1, 3, 4, 5\), found \(4, 6\)"),
        ({"volumes": np.full((1, *SHAPE), np.nan)}, r"NaN or infinity in rows \[0\]"),
        ({"target": -1}, "target of 0 or 1.* found -1"),
    ],
)
def test_deletion_bad_input(change, message):
    inputs = {"volumes": np.zeros((1, *SHAPE)), "maps": np.zeros((1, *SHAPE))}
    inputs |= {"brain": np.ones(SHAPE, bool), "target": 1} | change
    with pytest.raises(ValueError, match=message):
        metrics.deletion_insertion(Sum(line(1)), **inputs)
