"""Every subject by the network that did not see it; nothing of the held-out in any reference."""

import copy
import shutil
from dataclasses import replace

import nibabel as nib
import numpy as np
import pandas as pd
import pytest
import torch
from scipy.ndimage import gaussian_filter

from brainsex import explain, perturbation, saliency
from brainsex.cohort import Cohort
from brainsex.networks import MriNet3d

pytestmark = pytest.mark.usefixtures("one_cpu_thread", "in_process")

SHAPE = (22, 24, 26)
AFFINE = np.array([[3.0, 0, 0, -30], [0, 3.1, 0, -40], [0, 0, 3.2, -50], [0, 0, 0, 1]])


@pytest.fixture(scope="module", autouse=True)
def no_warm_up():
    """Persistence is a mean of all masks, so that it cannot be taken for the last."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(perturbation, "WARM_UP", 0)
        yield


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """Eight subjects in two folds, men brighter in a box, and two networks of random weights."""
    folder, rng = tmp_path_factory.mktemp("study"), np.random.default_rng(0)
    sex, fold = np.arange(8) % 2, np.arange(8) // 4
    volumes = rng.uniform(0.1, 0.5, (8, *SHAPE)).astype(np.float32)
    volumes[sex == 1, 8:14, 9:15, 10:16] += 0.3
    subjects = np.array([f"00000{n}" for n in range(8)])
    table = pd.DataFrame({"Subject": subjects, "brain_volume_ml": sex + rng.uniform(1000, 1009, 8)})
    cohort = Cohort("toy", True, volumes, sex, subjects, None, AFFINE, table)
    networks = []
    for number in range(2):
        torch.manual_seed(number)
        network = MriNet3d(2, SHAPE)
        with torch.no_grad():
            for _ in range(20):
                network(torch.from_numpy(volumes)[:, None])
        networks.append(network.eval())
        torch.save(network.state_dict(), folder / f"fold-{number}.pt")
    folds = pd.DataFrame({"Subject": subjects[::-1], "fold": fold[::-1]})
    folds.to_csv(folder / "folds.csv", index=False)
    return cohort, folder, networks, fold


def log_odds_slope(network, volume, target):
    volume = torch.tensor(volume, requires_grad=True)
    logits = network(volume[None, None])[0]
    return torch.autograd.grad(logits[target] - logits[1 - target], volume)[0].numpy()


def last_randomised(network, fold, seed=0):
    return list(explain.randomised_layers(network, seed=100 * seed + fold))[-1][1]


def test_gradients_are_of_the_network_that_did_not_see_the_subject(study, tmp_path):
    cohort, folder, networks, fold = study
    rows, methods = [5, 0, 3], ["gradient_input", "gradient_difference"]
    table = explain.explain(cohort, folder, tmp_path, methods, rows=rows)
    explain.explain(cohort, folder, tmp_path, methods[1:], rows=rows, random_weights=True)
    assert table["Subject"].tolist() == cohort.subjects[rows].tolist()
    assert table[["sex", "fold"]].values.tolist() == [[1, 1], [0, 0], [1, 0]]
    names = [*methods, "gradient_difference-random"]
    maps = [explain.load_maps(tmp_path, name, cohort.subjects[rows]) for name in names]
    for row, *images in zip(rows, *maps):
        network, volume, train = networks[fold[row]], cohort.volumes[row], fold != fold[row]
        target = int(network(torch.from_numpy(volume)[None, None]).argmax())
        mean = [cohort.volumes[train & (cohort.sex == sex)].mean(0) for sex in (0, 1)]
        difference = gaussian_filter(mean[target] - mean[1 - target], 1.0, mode="nearest")
        slope = log_odds_slope(network, volume, target)
        drawn = log_odds_slope(last_randomised(network, fold[row]), volume, target)
        expected = slope * volume, slope * difference, drawn * difference
        for image, product in zip(images, expected):
            product = gaussian_filter(product, 1.0, mode="nearest")
            np.testing.assert_allclose(image, product, atol=1e-4 * np.abs(product).max())
    path = tmp_path / "gradient_input/000005.nii.gz"
    np.testing.assert_allclose(nib.load(path).affine, AFFINE, atol=1e-6)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"000005\.nii\.gz: expected a whole file"):
        explain.load_maps(tmp_path, "gradient_input", ["000005"])


def test_masks_are_those_of_the_references_they_name(study, tmp_path):
    cohort, folder, networks, fold = study
    options, run, rows = {"iterations": 3, "area": 1.0}, (cohort, folder, tmp_path), [5, 2]
    table = explain.explain(*run, ["mask", "counterfactual"], rows=rows, **options)
    for n, row in enumerate(rows):
        subject, train, target = cohort.subjects[[row]], fold != fold[row], int(table["target"][n])
        inputs = {"target": target, "subjects": subject} | options
        other = cohort.volumes[train & (cohort.sex == 1 - target)].mean(0)
        sample = networks[fold[row]], cohort.volumes[[row]]
        own, counterfactual = (
            perturbation.optimise_masks(*sample, reference=reference, **inputs)
            for reference in (None, other)
        )
        assert np.abs(own.persistence - own.masks).max() > 0.01
        expected = {"mask": own.masks, "persistence": own.persistence}
        for name, masks in (expected | {"counterfactual": counterfactual.persistence}).items():
            saved = explain.load_maps(tmp_path, name, subject)
            np.testing.assert_allclose(saved, masks, atol=1e-4, err_msg=name)
        columns = ["target", "before", "after", "volume"]
        assert table.loc[n, columns].tolist() == own.history.loc[0, columns].tolist()
    expected = table.sort_values("Subject").to_csv(index=False)
    assert (tmp_path / "masks.csv").read_text() == expected


def test_an_interrupted_run_goes_on(study, tmp_path, monkeypatch):
    """Also with other rows; nothing is done twice."""
    cohort, folder, *_ = study
    attribute, calls = saliency.attribute, []

    def counted(network, volumes, method, **options):
        calls.extend((method, name) for name in options["subjects"])
        if len(calls) == 4:
            raise KeyboardInterrupt
        return attribute(network, volumes, method, **options)

    monkeypatch.setattr(saliency, "attribute", counted)
    run = cohort, folder, tmp_path, ["gradient_input", "integrated_gradients"]
    with pytest.raises(KeyboardInterrupt):
        explain.explain(*run, rows=[6, 0])
    finished = calls[:3]
    calls.clear()
    table = explain.explain(*run, steps=8, seed=1)  # the default; and nothing is drawn
    assert len(calls) == len(set(calls)) == 13
    assert not set(calls) & set(finished)
    calls.clear()
    pd.testing.assert_frame_equal(explain.explain(*run), table)
    assert calls == []
    with pytest.raises(ValueError, match="integrated_gradients with steps = 3, found those with"):
        explain.explain(*run[:3], ["integrated_gradients"], steps=3)
    explain.explain(*run[:3], ["integrated_gradients"], rows=[1], steps=3, overwrite=True)
    assert calls == [("integrated_gradients", "000001")]
    assert [path.stem for path in (tmp_path / "integrated_gradients").iterdir()] == ["000001.nii"]
    assert len(list((tmp_path / "gradient_input").iterdir())) == 8


def test_other_networks_and_draws_are_refused(study, tmp_path):
    cohort, folder, networks, _ = study
    changed = shutil.copytree(folder, tmp_path / "networks")
    run = cohort, changed, tmp_path / "maps", ["counterfactual"]
    explain.explain(*run, rows=[0], iterations=1)
    with pytest.raises(ValueError, match="counterfactual with seed = 1, found those with 0"):
        explain.explain(*run, iterations=1, seed=1)
    torch.save(networks[0].state_dict(), changed / "fold-1.pt")
    with pytest.raises(ValueError, match="counterfactual with networks"):
        explain.explain(*run, iterations=1)


@pytest.mark.parametrize(
    ("change", "methods", "options", "message"),
    [
        ({"affine": None}, ["mask"], {}, r"no affine .* pass cohort\.load"),
        ({}, ["masks"], {}, r"methods among mask, .*, found \['masks'\]"),
        ({}, ["mask", "grad_cam"], {"steps": 1}, r"options of those, found \['steps'\]"),
    ],
)
def test_bad_input(study, tmp_path, change, methods, options, message):
    cohort, folder, *_ = study
    with pytest.raises(ValueError, match=message):
        explain.explain(replace(cohort, **change), folder, tmp_path / "maps", methods, **options)
    assert not (tmp_path / "maps").exists()


def test_t_of_sex_in_a_linear_model_with_brain_volume(study):
    cohort, *_ = study
    volume, at = cohort.table[["brain_volume_ml"]].to_numpy(), (9, 10, 11)
    brain = np.indices(SHAPE)[0] > 0
    y = cohort.volumes[:, *at].astype(float)
    for confounds in (None, volume):
        t = explain.t_map(cohort.volumes, cohort.sex, brain, sigma=0, confounds=confounds)
        columns = np.ones(8), cohort.sex, *([] if confounds is None else volume.T)
        design = np.column_stack(columns)
        beta, (rss,), *_ = np.linalg.lstsq(design, y)
        variance = rss / (8 - len(columns)) * np.linalg.inv(design.T @ design)[1, 1]
        assert t[at] == pytest.approx(beta[1] / np.sqrt(variance), rel=1e-3)
        assert not t[0].any()
    assert not explain.t_map(np.ones_like(cohort.volumes), cohort.sex, brain).any()
    with pytest.raises(ValueError, match="infs or NaNs"):
        explain.t_map(cohort.volumes, cohort.sex, brain, confounds=volume * np.nan)


def test_layers_are_randomised_from_the_last_to_the_first(study):
    network = copy.deepcopy(study[2][0])
    for norm in (network.hidden1[1], network.hidden2[1], network.hidden3[1]):
        norm.weight.data, norm.bias.data = norm.weight + 1, norm.bias + 1  # as after training
    before, state = copy.deepcopy(network.state_dict()), torch.get_rng_state()
    steps = list(explain.randomised_layers(network, seed=1))
    names = "linear hidden3.1 hidden3.0 hidden2.1 hidden2.0 hidden1.1 hidden1.0".split()
    assert [name for name, _ in steps] == names
    for number, (_, changed) in enumerate(steps, 1):
        for name, value in changed.state_dict().items():
            same = torch.equal(value, before[name])
            assert same == (name.rpartition(".")[0] not in names[:number]), name
    again, reseeded = (last_randomised(network, 1, seed).state_dict() for seed in (0, 1))
    for name, value in steps[-1][1].state_dict().items():
        assert torch.equal(value, again[name])
        assert torch.equal(network.state_dict()[name], before[name])
    assert not torch.equal(again["linear.weight"], reseeded["linear.weight"])
    assert torch.equal(torch.get_rng_state(), state)


def test_subjects_without_a_fold_are_named_as_the_folds_fault(tmp_path):
    (tmp_path / "folds.csv").write_text("Subject,fold\n000001,0\n")
    assert explain.held_out_folds(tmp_path, ["000001"]).tolist() == [0]
    with pytest.raises(ValueError, match=r"folds\.csv: expected a fold of every subject.*000002"):
        explain.held_out_folds(tmp_path, ["000001", "000002"])
