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
from scipy.stats import ttest_ind

from brainsex import explain, perturbation, saliency, storage
from brainsex.cohort import Cohort
from brainsex.networks import MriNet3d

pytestmark = pytest.mark.usefixtures("one_cpu_thread", "in_process")

SHAPE = (22, 24, 26)
AFFINE = np.array([[3.0, 0, 0, -30], [0, 3.1, 0, -40], [0, 0, 3.2, -50], [0, 0, 0, 1]])
SIGNIFICANT = -np.log10(0.05)


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


def blur(volume):
    return gaussian_filter(volume, 1.0, mode="nearest")


def last_randomised(network, fold, seed=0):
    return list(explain.randomised_layers(network, seed=100 * seed + fold))[-1][1]


def test_training_means_by_hand_need_both_sexes(study):
    cohort, _, _, fold = study
    women, men = explain.training_means(cohort, fold, 1)
    np.testing.assert_allclose(women, cohort.volumes[[0, 2]].mean(0), atol=1e-6)
    np.testing.assert_allclose(men, cohort.volumes[[1, 3]].mean(0), atol=1e-6)
    for sex, name in enumerate(("women", "men")):
        with pytest.raises(ValueError, match=f"fold 1: no {name} among training subjects"):
            explain.training_means(cohort, (cohort.sex == sex).astype(int), 1)


def test_held_out_folds(study, tmp_path):
    cohort, folder, _, fold = study
    order = [2, 7, 0]
    assert explain.held_out_folds(folder, cohort.subjects[order]).tolist() == fold[order].tolist()
    with pytest.raises(FileNotFoundError, match="04_cnn_3d"):
        explain.held_out_folds(tmp_path, cohort.subjects)
    with pytest.raises(ValueError, match=r"folds.csv does not know 000001x, 000099\."):
        explain.held_out_folds(folder, ["000099", "000007", "000001x"])


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
        difference = blur(mean[target] - mean[1 - target])
        slope = log_odds_slope(network, volume, target)
        drawn = log_odds_slope(last_randomised(network, fold[row]), volume, target)
        expected = slope * volume, slope * difference, drawn * difference
        for image, product in zip(images, map(blur, expected)):
            np.testing.assert_allclose(image, product, atol=1e-4 * np.abs(product).max())


def test_masks_are_those_of_the_references_they_name(study, tmp_path):
    cohort, folder, networks, fold = study
    options, run, rows = {"iterations": 3, "area": 1.0}, (cohort, folder, tmp_path), [5, 2]
    table = explain.explain(*run, ["mask", "counterfactual"], rows=rows, **options)
    explain.explain(*run, ["mask"], rows=rows, random_weights=True, **options)
    for n, row in enumerate(rows):
        network, subject, train = networks[fold[row]], cohort.subjects[[row]], fold != fold[row]
        target, volume = int(table["target"][n]), cohort.volumes[[row]]
        other = cohort.volumes[train & (cohort.sex == 1 - target)].mean(0)
        random = last_randomised(network, fold[row])
        own, counterfactual, drawn = (
            perturbation.optimise_masks(
                *(explained, volume),
                reference=reference,
                target=target,
                subjects=subject,
                **options,
            )
            for explained, reference in ((network, None), (network, other), (random, None))
        )
        assert np.abs(own.persistence - own.masks).max() > 0.01
        expected = {
            "mask": own.masks,
            "persistence": own.persistence,
            "counterfactual": counterfactual.persistence,
            "mask-random": drawn.persistence,
        }
        for name, masks in expected.items():
            saved = explain.load_maps(tmp_path, name, subject)
            np.testing.assert_allclose(saved, masks, atol=1e-4, err_msg=name)
        columns = ["target", "before", "after", "volume"]
        assert table.loc[n, columns].tolist() == own.history.loc[0, columns].tolist()
    image = nib.load(tmp_path / "mask" / "000005.nii.gz")
    np.testing.assert_allclose(image.affine, AFFINE, atol=1e-6)
    expected = table.sort_values("Subject").to_csv(index=False)
    assert (tmp_path / "masks.csv").read_text() == expected
    explain.explain(*run, ["mask"], rows=[0], iterations=1, overwrite=True)
    for name in ("mask", "persistence"):
        assert [path.name for path in (tmp_path / name).glob("*.nii.gz")] == ["000000.nii.gz"]


def test_an_interrupted_run_goes_on(study, tmp_path, monkeypatch):
    """Also with other rows, as the processes of torchrun have them; nothing is done twice."""
    cohort, folder, *_ = study
    attribute, calls = saliency.attribute, []

    def counted(network, volumes, method, **options):
        calls.extend((method, name) for name in options["subjects"])
        if len(calls) == 4:
            raise KeyboardInterrupt
        return attribute(network, volumes, method, **options)

    monkeypatch.setattr(saliency, "attribute", counted)
    run = cohort, folder, tmp_path, ["gradient_input", "lrp"]
    with pytest.raises(KeyboardInterrupt):
        explain.explain(*run, rows=[6, 0])
    finished = calls[:3]
    calls.clear()
    table = explain.explain(*run, gamma=0.25, seed=1)  # the default; and nothing is drawn
    assert len(calls) == len(set(calls)) == 13
    assert not set(calls) & set(finished)
    calls.clear()
    pd.testing.assert_frame_equal(explain.explain(*run), table)
    assert calls == []
    assert len(explain.explain(*run, rows=[])) == 0
    with pytest.raises(ValueError, match=r"explain lrp with gamma = 0\.5, found those with"):
        explain.explain(*run[:3], ["lrp"], gamma=0.5)
    explain.explain(*run[:3], ["lrp"], rows=[1], gamma=0.5, overwrite=True)
    assert calls == [("lrp", "000001")]
    assert [path.name for path in (tmp_path / "lrp").iterdir()] == ["000001.nii.gz"]
    assert len(list((tmp_path / "gradient_input").iterdir())) == 8


def test_two_processes_may_write_the_table_at_once(study, tmp_path, monkeypatch):
    """Each deletes what the other, as it must seem to it, left half-written."""
    cohort, folder, *_ = study
    write_text = storage.write_text

    def raced(path, text):
        with storage.atomic_path(path) as partial:
            partial.write_text(text, encoding="utf-8")
            if path.name == "masks.csv":
                write_text(path, text)

    monkeypatch.setattr(storage, "write_text", raced)
    explain.explain(cohort, folder, tmp_path, rows=[3], iterations=1)
    assert len(pd.read_csv(tmp_path / "masks.csv")) == 1


def test_other_networks_and_draws_are_refused(study, tmp_path):
    cohort, folder, networks, _ = study
    changed = shutil.copytree(folder, tmp_path / "networks")
    run = cohort, changed, tmp_path / "maps", ["smooth_grad"]
    explain.explain(*run, rows=[0], samples=1)
    with pytest.raises(ValueError, match="smooth_grad with seed = 1, found those with 0"):
        explain.explain(*run, samples=1, seed=1)
    torch.save(networks[0].state_dict(), changed / "fold-1.pt")
    with pytest.raises(ValueError, match="smooth_grad with networks"):
        explain.explain(*run, samples=1)


@pytest.mark.parametrize(
    ("change", "methods", "options", "message"),
    [
        ({"affine": None}, ["mask"], {}, r"no affine .* pass cohort\.load"),
        ({"subjects": np.array([*"abcdefgh"])}, ["mask"], {}, "does not know a, b, c, d, e, f, g"),
        ({}, ["masks"], {}, r"methods among mask, .*, found \['masks'\]"),
        ({}, ["mask", "lrp"], {"samples": 1}, r"options of mask, lrp, found \['samples'\]"),
    ],
)
def test_bad_input(study, tmp_path, change, methods, options, message):
    cohort, folder, *_ = study
    with pytest.raises(ValueError, match=message):
        explain.explain(replace(cohort, **change), folder, tmp_path / "maps", methods, **options)
    assert not (tmp_path / "maps").exists()


def test_group_maps_are_means_over_folds_of_held_out_subjects(study, tmp_path, monkeypatch):
    cohort, folder, networks, fold = study
    brain, quick = np.ones(SHAPE, bool), {"iterations": 3, "permutations": 9}
    brain[0] = False
    maps = explain.explain_groups(cohort, folder, tmp_path, [0, 1], brain, **quick)
    assert list(maps) == [*explain.GROUP_MASKS, *explain.T_MAPS]
    expected = {name: [] for name in maps}
    volume = cohort.table["brain_volume_ml"].to_numpy()
    for number, network in enumerate(networks):
        test, train = fold == number, fold != number
        means = [cohort.volumes[train & (cohort.sex == sex)].mean(0) for sex in (0, 1)]
        other = np.stack([means[1 - sex] for sex in cohort.sex[test]])
        learners = (network, None), (network, other), (last_randomised(network, number), other)
        for name, (explained, reference) in zip(explain.GROUP_MASKS, learners):
            options = {"target": cohort.sex[test], "reference": reference, "iterations": 3}
            mask = perturbation.optimise_group_mask(explained, cohort.volumes[test], **options)
            expected[name].append(mask)
        tested = cohort.volumes[train], cohort.sex[train], brain
        expected["t map"].append(np.abs(explain.t_map(*tested)[0]))
        t, p = explain.t_map(*tested, confounds=volume[train], permutations=9)
        expected["t map (brain volume out)"].append(np.abs(t))
        expected["corrected p"] += [p] * (number == 0)
    for name, images in expected.items():
        np.testing.assert_allclose(maps[name], np.mean(images, axis=0), atol=1e-4, err_msg=name)
    assert len({image.tobytes() for image in maps.values()}) == 6
    monkeypatch.setattr(perturbation, "optimise_group_mask", None)  # everything is there
    again = explain.explain_groups(cohort, folder, tmp_path, [0, 1], brain, **quick)
    for name, image in maps.items():
        np.testing.assert_array_equal(again[name], image)


def test_t_is_scipys_and_positive_where_men_are_higher(planted):
    volumes, sex, box, _ = planted
    brain = np.ones(box.shape, bool)
    brain[0] = False
    t, p = explain.t_map(volumes, sex, brain, sigma=0)
    at = (8, 9, 10)
    expected = ttest_ind(volumes[sex == 1][:, *at].astype(float), volumes[sex == 0][:, *at])
    assert t[at] == pytest.approx(expected.statistic, rel=1e-4)
    assert expected.statistic > 5
    assert not t[0].any()
    assert not p.any()
    constant, _ = explain.t_map(np.ones_like(volumes), sex, brain)
    assert not constant.any()


def test_t_of_sex_in_a_linear_model_with_brain_volume(study):
    cohort, *_ = study
    volume, at = cohort.table["brain_volume_ml"].to_numpy(), (9, 10, 11)
    tested = cohort.volumes, cohort.sex, np.ones(SHAPE, bool)
    t, _ = explain.t_map(*tested, sigma=0, confounds=volume)
    design = np.column_stack([np.ones(8), cohort.sex, volume])
    y = cohort.volumes[:, *at].astype(float)
    beta, (rss,), *_ = np.linalg.lstsq(design, y)
    error = np.sqrt(rss / 5 * np.linalg.inv(design.T @ design)[1, 1])
    assert t[at] == pytest.approx(beta[1] / error, rel=1e-3)
    with pytest.raises(ValueError, match="confounds without blanks, found 1"):
        explain.t_map(*tested, confounds=np.r_[np.nan, volume[1:]])
    volumes = np.where(np.arange(8)[:, None, None, None] == 3, np.nan, cohort.volumes)
    with pytest.raises(ValueError, match="volume 3 holds NaN"):
        explain.t_map(volumes, *tested[1:])


@pytest.mark.parametrize("tfce", [False, True])
def test_corrected_p_finds_what_sex_does_beside_the_confound(tfce):
    """Brain volume, larger in men, raises FA in the lower box; sex itself does so in the upper."""
    rng, brain = np.random.default_rng(1), np.ones((7, 8, 20), bool)
    sex, brain[0] = np.arange(60) % 2, False
    confound = rng.normal(sex * 2.0, 1.0)
    volumes = rng.normal(0.4, 0.05, (60, *brain.shape))
    volumes[:, 1:6, 2:7, 1:7] += 0.1 * confound[:, None, None, None]
    volumes[:, 1:6, 2:7, 12:18] += 0.2 * sex[:, None, None, None]
    settings = {"sigma": 0.5, "permutations": 24, "tfce": tfce, "affine": AFFINE}
    controlled, plain, reseeded = (
        explain.t_map(volumes, sex, brain, confounds=confounds, seed=seed, **settings)[1]
        for confounds, seed in ((1000 + 100 * confound, 0), (None, 0), (confound, 1))
    )
    assert (plain[1:6, 2:7, 1:7] > SIGNIFICANT).all()
    assert controlled[..., :9].max() < SIGNIFICANT
    assert (controlled[1:6, 2:7, 12:18] > SIGNIFICANT).mean() > 0.9
    assert controlled.max() <= np.log10(25) + 1e-6
    assert not controlled[0].any()
    assert (controlled != reseeded).any()


def test_layers_are_randomised_from_the_last_to_the_first():
    torch.manual_seed(0)
    network = MriNet3d(2, (22, 23, 24))
    for name, value in network.state_dict().items():
        if ".1." in name:
            value.fill_(3)  # batch norms as after training
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
