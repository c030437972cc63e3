"""Measures of explanations against cases worked out by hand."""

import copy
from functools import partial
from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd
import pytest
import torch
from scipy.ndimage import gaussian_filter
from scipy.stats import spearmanr
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


def test_localisation_by_hand():
    """Five voxels, two planted; ranked first and third: AP = (1/1 + 2/3) / 2 = 5/6."""
    brain, truth = line(1, 1, 1, 1, 1) > 0, line(1, 0, 0, 1, 0) > 0
    truth[2, 3, 4] = True  # outside the brain: does not count
    maps = np.stack([line(5, 4, 1, 3), line(1, 3, 0, 2), line(0, 0), line(7, 2, 2, 7, -5)])
    maps[:, 2, 3, 4] = 9
    scores = metrics.localisation(maps, truth, brain)
    assert scores["base_rate"].tolist() == [0.4] * 4
    # ranks of the planted: 1 and 3; 3 and 2; all tied; first and first
    expected = [(1 + 2 / 3) / 2, (1 / 2 + 2 / 3) / 2, 0.4, 1]
    assert scores["average_precision"].tolist() == pytest.approx(expected)
    assert scores["pointing"].tolist() == [1, 0, 0.4, 1]
    assert scores["mass_inside"].tolist() == pytest.approx([8 / 13, 3 / 6, 0, 14 / 18])
    tied = metrics.localisation(line(7, 7, 7, 1, 0)[None], truth, brain)
    assert tied["pointing"][0] == pytest.approx(1 / 3), "the planted share of the largest"


@pytest.mark.parametrize(
    ("maps", "truth", "message"),
    [
        (np.zeros((1, *SHAPE)), np.zeros(SHAPE, bool), "planted voxels in the brain, found none"),
        (np.full((1, *SHAPE), np.nan), line(1) > 0, "NaN"),
    ],
)
def test_localisation_bad_input(maps, truth, message):
    with pytest.raises(ValueError, match=message):
        metrics.localisation(maps, truth, line(1, 1) > 0)


def test_the_groups_interval_is_of_bootstrap_standard_errors():
    """Of two voxels one is planted; AP is 1 where it leads in the mean map, else 1/2."""
    brain, truth = line(1, 1) > 0, line(1, 0) > 0
    rng = np.random.default_rng(1)
    maps = np.stack([line(1 + noise, 1) for noise in rng.normal(0.05, 1, 40)])
    ap, low, high = metrics.group_average_precision(maps, truth, brain)
    assert ap == (1 if maps.mean(0)[0, 0, 0] > 1 else 0.5)
    p = np.mean([maps[rng.integers(40, size=40)].mean(0)[0, 0, 0] > 1 for _ in range(4000)])
    error = np.sqrt(p * (1 - p)) / 2  # of a value that is 1 with probability p, else 1/2
    assert 0.1 < p < 0.9
    assert (high - low) / 2 == pytest.approx(1.96 * error, rel=0.25)
    assert (low + high) / 2 == pytest.approx(ap)
    assert metrics.group_average_precision(maps, truth, brain) == (ap, low, high)


def test_the_groups_interval_within_strata():
    """Women all agree, and so do men: whoever is drawn, the mean map is the same."""
    brain, truth = line(1, 1) > 0, line(1, 0) > 0
    maps = np.stack([line(3, 0), line(3, 0), line(0, 2), line(0, 2)])
    sex = np.array([0, 0, 1, 1])
    assert metrics.group_average_precision(maps, truth, brain, sex) == (1, 1, 1)
    _, low, _ = metrics.group_average_precision(maps, truth, brain)
    assert low < 0.9
    _, low, high = metrics.group_average_precision(maps, truth, brain, np.arange(4))
    assert np.isnan([low, high]).all(), "strata of one subject know no spread"


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
    with pytest.raises(ValueError, match="0 to 40 voxels, found 41"):
        metrics.top_voxels(values, brain, 41)


def test_deletion_and_insertion_by_hand():
    """Two of four voxels carry log-odds of 2 and 1; an empty reference; fractions 0, 1/4, 1/2."""
    brain, volume = line(1, 1, 1, 1) > 0, line(1, 1, 1, 1)[None]
    options = {"fractions": (0, 0.25, 0.5), "reference": np.zeros(SHAPE), "progress": False}
    measure = partial(metrics.deletion_insertion, Sum(line(2, 1, 0, 0)), volume, **options)
    scores = measure(line(4, 3, 2, 1)[None], brain, target=1)
    deleted, inserted = [sigmoid(3), sigmoid(1), sigmoid(0)], [sigmoid(0), sigmoid(2), sigmoid(3)]
    np.testing.assert_allclose(scores["deletion"][0], deleted, atol=1e-6)
    np.testing.assert_allclose(scores["insertion"][0], inserted, atol=1e-6)
    for name, (a, b, c) in (("deletion", deleted), ("insertion", inserted)):
        area = ((a + b) / 2 + (b + c) / 2) / 2
        assert scores[f"{name}_area"][0] == pytest.approx(area, abs=1e-6)
    worse = measure(line(1, 2, 3, 4)[None], brain, target=1)
    np.testing.assert_allclose(worse["deletion"][0], [sigmoid(3)] * 3, atol=1e-6)
    woman = measure(line(4, 3, 2, 1)[None], brain, target=0, insertion=False)
    assert set(woman) == {"deletion", "deletion_area"}
    np.testing.assert_allclose(woman["deletion"], 1 - scores["deletion"], atol=1e-6)


def test_the_reference_is_the_blur_by_default():
    """All of a volume deleted is its blur, which scipy makes too."""
    volume, weight = np.random.default_rng(0).random((2, 8, 9, 10)).astype(np.float32)
    inputs = Sum(weight / 100, 2.0), volume[None], volume[None], np.ones(volume.shape, bool)
    scores = metrics.deletion_insertion(*inputs, target=1, fractions=(0, 1), progress=False)
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
    measure = partial(metrics.deletion_insertion, network, target=1, progress=False)
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
        ({"fractions": (0, 0.5, 0.5)}, "increase within"),
        ({"fractions": (0, 1.5)}, "increase within"),
        ({"fractions": (0.5,)}, "increase within"),
        ({"maps": np.zeros((1, 3, 4, 6))}, r"found \(1, 3, 4, 6\)"),
        ({"maps": np.full((1, *SHAPE), np.inf)}, "finite map"),
        ({"reference": np.zeros((4, 5))}, r"expected a reference \(3, 4, 5\).* found \(4, 5\)"),
        ({"volumes": np.full((1, *SHAPE), np.nan)}, "volume 0 holds NaN or infinity"),
        ({"target": -1}, "target of 0 or 1.* found -1"),
    ],
)
def test_deletion_bad_input(change, message):
    inputs = {"volumes": np.zeros((1, *SHAPE)), "maps": np.zeros((1, *SHAPE))}
    inputs |= {"brain": np.ones(SHAPE, bool), "target": 1, "progress": False} | change
    with pytest.raises(ValueError, match=message):
        metrics.deletion_insertion(Sum(line(1)), **inputs)


def test_held_out_deletion_takes_each_subjects_own_network(tmp_path: Path):
    """Eight subjects in two folds, networks of random weights."""
    shape, rng = (22, 24, 26), np.random.default_rng(0)
    sex, fold = np.arange(8) % 2, np.arange(8) // 4
    cohort = make_cohort(rng.uniform(0.1, 0.5, (8, *shape)).astype(np.float32), sex)
    networks = []
    for number in range(2):
        torch.manual_seed(number)
        networks.append(MriNet3d(2, shape).eval())
        torch.save(networks[-1].state_dict(), tmp_path / f"fold-{number}.pt")
    folds = pd.DataFrame({"Subject": cohort.subjects, "fold": fold})
    folds.to_csv(tmp_path / "folds.csv", index=False)
    rows, target = [5, 0, 3], np.array([0, 1, 1])
    table = folds.loc[rows].assign(target=target).reset_index(drop=True)
    maps, brain = rng.standard_normal((3, *shape)), np.ones(shape, bool)
    scores = metrics.held_out_deletion(cohort, tmp_path, table, {"noise": maps}, brain)["noise"]
    for n, row in enumerate(rows):
        inputs = networks[fold[row]], cohort.volumes[row : row + 1], maps[n : n + 1], brain
        measure = partial(metrics.deletion_insertion, *inputs, target=target[n], progress=False)
        for name, values in measure().items():
            np.testing.assert_allclose(scores[name][n], values[0], rtol=1e-5)
        other = cohort.volumes[(fold != fold[row]) & (sex == 1 - target[n])].mean(0)
        area = measure(reference=other)["deletion_area"][0]
        assert scores["deletion_area_other"][n] == pytest.approx(area, rel=1e-4)


def test_dice_by_hand():
    a, b = line(1, 1, 1, 0) > 0, line(0, 1, 1, 1, 1) > 0
    assert metrics.dice(a, b) == pytest.approx(2 * 2 / (3 + 4))
    assert metrics.dice(a, line(0, 0, 0, 1) > 0) == 0
    assert np.isnan(metrics.dice(line() > 0, line() > 0))


def test_similarity_is_scipys_spearman_and_dice_at_equal_volume():
    first, second = (metrics.random_map((16, 18, 20), seed=seed) for seed in (0, 1))
    brain = np.zeros(first.shape, bool)
    brain[2:14, 3:15, 4:16] = True
    similarity = metrics.map_similarity(first, second, brain, share=0.1)
    expected = spearmanr(first[brain], second[brain]).statistic
    assert similarity["spearman"] == pytest.approx(expected)
    count = round(0.1 * brain.sum())
    tops = [set(np.argsort(-m[brain])[:count]) for m in (first, second)]
    assert similarity["dice"] == pytest.approx(len(tops[0] & tops[1]) / count)
    constant = metrics.map_similarity(first, np.zeros(brain.shape), brain)
    assert np.isnan([constant["spearman"], constant["dice"]]).all()


def test_what_two_sparse_maps_lack_is_no_agreement():
    """Ten voxels each, five in common; 2 % would be 115, filled up from the same zeros."""
    brain, first = np.ones((16, 18, 20), bool), np.zeros((16, 18, 20))
    second = first.copy()
    first[3, 4, :10], second[3, 4, 5:15] = np.arange(10) + 1, np.arange(10) + 1
    assert metrics.map_similarity(first, second, brain)["dice"] == 0.5
    assert metrics.map_similarity(first, np.roll(first, 8, 0), brain)["dice"] == 0


@pytest.fixture
def retrain(planted, in_process):
    """Retrain without the planted box and from it alone, one epoch."""
    volumes, sex, box, held_out = planted
    make_network = partial(MriNet3d, 4, volumes.shape[1:], dropout=0.0)
    inputs = make_cohort(volumes, sex), {"The box": box}, held_out, make_network
    options = {"epochs": 1, "batch_size": 4, "lr": 1e-2, "milestones": ()}
    return partial(metrics.retrained_accuracy, *inputs, **options)


def test_without_the_planted_region_nothing_is_learnt_and_with_it_alone_everything(
    retrain, tmp_path, one_cpu_thread
):
    table = retrain(out=tmp_path, epochs=8, milestones=(6,))
    assert table["sees"].tolist() == ["all but the region", "the region alone"]
    assert table["n"].tolist() == [24, 24]
    assert table["accuracy"][0] < 0.75  # chance
    assert table["accuracy"][1] > 0.9


def test_what_is_removed_is_the_training_subjects_mean(retrain, planted, tmp_path, monkeypatch):
    """Wilson's interval of 12 of 24 is from its formula."""
    volumes, sex, box, held_out = planted
    cohorts = []

    def cross_validate(cohort: Cohort, make_network: object, *, only: list, **options: object):
        assert only == [0]
        assert np.array_equal(options["assignment"] == 0, held_out)
        cohorts.append(cohort)
        return pd.DataFrame({"sex": sex[held_out], "probability": 0.7})

    monkeypatch.setattr(metrics.training, "cross_validate", cross_validate)
    table = retrain(out=tmp_path)
    mean = volumes[~held_out].astype(float).mean(0)
    for cohort, removed in zip(cohorts, (box, ~box)):
        read = cohort.volumes[np.arange(60)]
        assert read.dtype == np.float32
        np.testing.assert_allclose(read[:, removed], np.tile(mean[removed], (60, 1)), atol=1e-6)
        np.testing.assert_array_equal(read[:, ~removed], volumes[:, ~removed])
    half = 1.959964 * np.sqrt(0.25 / 24 + 1.959964**2 / (4 * 24**2)) / (1 + 1.959964**2 / 24)
    assert table["accuracy"].tolist() == [0.5, 0.5]
    assert table.loc[0, ["low", "high"]].tolist() == pytest.approx([0.5 - half, 0.5 + half])


def test_finished_networks_are_kept(retrain, planted, tmp_path, one_cpu_thread, monkeypatch):
    table = retrain(out=tmp_path)
    assert {path.name for path in tmp_path.iterdir() if path.is_dir()} == {
        "the-box-all-but-the-region",
        "the-box-the-region-alone",
    }
    monkeypatch.setattr(metrics.training, "fit", None)
    assert retrain(out=tmp_path).equals(table)
    with pytest.raises(ValueError, match="epochs = 2"):
        retrain(out=tmp_path, epochs=2)
    box = planted[2]
    moved = {"The box": np.roll(box, 1, 0)}
    run = partial(metrics.retrained_accuracy, retrain.args[0], moved, *retrain.args[2:])
    with pytest.raises(ValueError, match="expected results of removal with regions"):
        run(out=tmp_path, **retrain.keywords)


NAMES = pd.DataFrame({"index": [1, 2, 5], "name": ["left tract", "right tract", "Genu, of CC"]})
AFFINE = np.array([[2.0, 0, 0, -11], [0, 3, 0, -9], [0, 0, 4, -6], [0, 0, 0, 1]])
LABELS = np.zeros((12, 7, 5), np.int16)
LABELS[1:4, 2:4, 1:3], LABELS[8:11, 2:4, 1:3], LABELS[5:7, 5, 1] = 1, 2, 5


def test_shares_of_regions_by_hand():
    brain, women = np.ones(LABELS.shape, bool), np.zeros(LABELS.shape, np.float32)
    brain[0] = False
    women[LABELS == 1], women[LABELS == 2] = 0.5, 0.25
    women[11, 6, 4] = 3.0  # in no region
    women[0, 0, 0] = 100.0  # outside the brain
    maps = {"women": women, "men": np.where(LABELS == 5, 1.0, 0.0)}
    table = metrics.region_shares(maps, AFFINE, nib.Nifti1Image(LABELS, AFFINE), NAMES, brain)
    rows = table[table["group"] == "women"].set_index("label")
    assert [*table] == ["group", "label", "name", "volume_ml", "mean", "share", "rank"]
    assert rows.index.tolist() == [1, 2, 5, 0]
    assert rows["name"].tolist() == [*NAMES["name"], "none"]
    assert rows["volume_ml"].tolist() == pytest.approx([0.288, 0.288, 0.048, (385 - 26) * 0.024])
    assert rows["mean"].tolist() == pytest.approx([0.5, 0.25, 0, 3 / 359])
    assert rows["share"].tolist() == pytest.approx([6 / 12, 3 / 12, 0, 3 / 12])
    assert rows["rank"][[1, 2, 5]].tolist() == [1, 2, 3]
    assert np.isnan(rows["rank"][0])
    assert table.loc[table["group"] == "men", "share"].tolist() == pytest.approx([0, 0, 1, 0])


def test_atlases_on_another_grid_and_regions_outside_the_brain(tmp_path: Path):
    """The maps' grid is twice as fine along X, mirrored; the atlas and its names are files."""
    nib.save(nib.Nifti1Image(LABELS, AFFINE), tmp_path / "atlas.nii.gz")
    NAMES.to_csv(tmp_path / "names.csv", index=False)
    affine = AFFINE.copy()
    affine[0, 0], affine[0, 3] = -1.0, 11.5
    fine = np.repeat(LABELS, 2, axis=0)[::-1]
    brain = fine != 5
    files = tmp_path / "atlas.nii.gz", tmp_path / "names.csv"
    with pytest.warns(UserWarning, match="labels were removed"):
        table = metrics.region_shares({"men": 1.0 * (fine == 1)}, affine, *files, brain)
    assert table["share"].tolist() == [1, 0, 0, 0]
    assert table["volume_ml"].tolist()[:3] == pytest.approx([0.288, 0.288, 0])
    assert np.isnan(table["mean"][2])


@pytest.mark.parametrize("value", [0.0, -1.0, np.nan])
def test_maps_that_have_no_shares(value):
    maps, atlas = {"men": np.full(LABELS.shape, value)}, nib.Nifti1Image(LABELS, AFFINE)
    with pytest.raises(ValueError, match="men: expected a map that is nowhere negative"):
        metrics.region_shares(maps, AFFINE, atlas, NAMES, np.ones(LABELS.shape, bool))
