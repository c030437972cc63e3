"""Every subject by the network that did not see it; nothing of the held-out in any reference."""

import copy

import numpy as np
import pandas as pd
import pytest
import torch
from matplotlib.figure import Figure
from matplotlib.text import Text
from scipy.ndimage import gaussian_filter

from brainsex import (
    comparison,
    controls,
    group_masks,
    groups,
    judging,
    masks,
    measures,
    perturbation,
    voxelwise,
)
from brainsex import saliency_figures as figures
from brainsex.cohort import Cohort
from brainsex.networks import MriNet3d

SHAPE = (22, 24, 26)
AFFINE = np.array([[3.0, 0, 0, -30], [0, 3.1, 0, -40], [0, 0, 3.2, -50], [0, 0, 0, 1]])
QUICK = {"iterations": 3, "samples": 2, "steps": 2, "window": 12, "stride": 10}


@pytest.fixture(scope="module", autouse=True)
def warm_at_once():
    """Persistence is a mean of all masks, so that it cannot be taken for the last."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(perturbation, "WARM", 0)
        yield


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """Eight subjects in two folds, men brighter in a box, and two networks of random weights."""
    folder = tmp_path_factory.mktemp("study")
    rng = np.random.default_rng(0)
    sex, fold = np.arange(8) % 2, np.arange(8) // 4
    volumes = rng.uniform(0.1, 0.5, (8, *SHAPE)).astype(np.float32)
    volumes[sex == 1, 8:14, 9:15, 10:16] += 0.3
    subjects = np.array([f"00000{n}" for n in range(8)])
    table = pd.DataFrame({"Subject": subjects, "label": sex, "brain_volume_ml": 1000.0 + sex})
    table["brain_volume_ml"] += rng.uniform(0, 9, 8)
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
    pd.DataFrame({"Subject": subjects, "fold": fold}).to_csv(folder / "folds.csv", index=False)
    return cohort, folder, networks, fold


@pytest.fixture(scope="module")
def explained(study, tmp_path_factory):
    cohort, folder, *_ = study
    rows = [5, 0, 3]
    out = tmp_path_factory.mktemp("maps")
    return rows, *comparison.explain(cohort, folder, out / "masks", out, rows, sigma=1.0, **QUICK)


def predicted(network, volume):
    with torch.no_grad():
        return int(network(torch.from_numpy(volume)[None, None]).argmax())


def slope(network, volume, target):
    volume = torch.tensor(volume, requires_grad=True)
    logits = network(volume[None, None])[0]
    return torch.autograd.grad(logits[target] - logits[1 - target], volume)[0].numpy()


def blur(volume):
    return gaussian_filter(volume, 1.0, mode="nearest")


def test_training_means_by_hand(study):
    cohort, _, _, fold = study
    women, men = masks.training_means(cohort, fold, 1)
    np.testing.assert_allclose(women, cohort.volumes[[0, 2]].mean(0), atol=1e-6)
    np.testing.assert_allclose(men, cohort.volumes[[1, 3]].mean(0), atol=1e-6)


@pytest.mark.parametrize(("sex", "name"), [(0, "women"), (1, "men")])
def test_training_means_need_both_sexes(study, sex, name):
    cohort, *_ = study
    with pytest.raises(ValueError, match=f"fold 1: no {name} among training subjects"):
        masks.training_means(cohort, (cohort.sex == sex).astype(int), 1)


@pytest.mark.parametrize("value", [np.nan, -np.inf])
@pytest.mark.parametrize("given", ["volumes", "reference"])
def test_group_masks_refuse_what_is_not_finite(study, given, value):
    cohort, _, networks, _ = study
    options = {"volumes": cohort.volumes[:2].copy(), "reference": cohort.volumes[2].copy()}
    options[given][..., -1, -1, -1] = value  # which no pooled cell sees
    with pytest.raises(ValueError, match="NaN or infinity"):
        group_masks.group_mask(networks[0], iterations=2, progress=False, **options)


def test_every_map_is_of_the_network_that_did_not_see_the_subject(study, explained):
    cohort, _, networks, fold = study
    rows, maps, table = explained
    assert table["Subject"].tolist() == cohort.subjects[rows].tolist()
    assert {one.shape for one in maps.values()} == {(3, *SHAPE)}
    assert len(maps) == 14
    for n, row in enumerate(rows):
        network, volume = networks[fold[row]], cohort.volumes[row]
        target = predicted(network, volume)
        assert table["target"][n] == target
        gradient = slope(network, volume, target)
        atol = 1e-5 * np.abs(gradient).max()
        product = blur(gradient * volume)
        np.testing.assert_allclose(maps["gradient × input"][n], product, atol=atol)
        magnitude = maps["gradient × input, magnitude"][n]
        np.testing.assert_allclose(magnitude, np.abs(product), atol=atol)
        train = fold != fold[row]
        mean = [cohort.volumes[train & (cohort.sex == sex)].mean(0) for sex in (0, 1)]
        difference = blur(mean[target] - mean[1 - target])
        expected = blur(gradient * difference)
        np.testing.assert_allclose(maps[comparison.DIFFERENCE][n], expected, atol=2 * atol)
        *_, (_, random) = controls.randomised(network, seed=fold[row])  # another draw a fold
        drawn = blur(slope(random, volume, target) * difference)
        atol = 1e-4 * np.abs(drawn).max()
        name = comparison.DIFFERENCE + comparison.RANDOM
        np.testing.assert_allclose(maps[name][n], drawn, atol=atol)
    assert maps["SmoothGrad"].min() >= 0


def test_masks_are_those_of_the_references_they_name(study, explained):
    cohort, _, networks, fold = study
    rows, maps, table = explained
    for n, row in enumerate(rows):
        train = fold != fold[row]
        target = table["target"][n]
        other = cohort.volumes[train & (cohort.sex == 1 - target)].mean(0)
        *_, (_, random) = controls.randomised(networks[fold[row]], seed=fold[row])
        for name, network, reference in (
            (comparison.MASK, networks[fold[row]], None),
            (comparison.COUNTERFACTUAL, networks[fold[row]], other),
            (comparison.COUNTERFACTUAL + comparison.RANDOM, random, other),
        ):
            expected = comparison.perturbation.optimise_masks(
                network,
                cohort.volumes[row : row + 1],
                subjects=[cohort.subjects[row]],
                target=int(target),
                reference=reference,
                iterations=QUICK["iterations"],
                progress=False,
            )
            assert np.abs(expected.persistence - expected.masks).max() > 0.01
            np.testing.assert_allclose(maps[name][n], expected.persistence[0], atol=1e-4)
            if reference is None:
                np.testing.assert_array_equal(maps[comparison.FINAL][n], expected.masks[0])


def test_what_is_saved_is_kept(study, tmp_path, monkeypatch):
    """A run that was stopped, or its files damaged, goes on: only what is missing is computed."""
    cohort, folder, *_ = study
    calls, whole = [], comparison.single

    def counted(network, volumes, name, **options):
        calls.append((name, len(volumes)))
        if len(calls) == limit:
            raise KeyboardInterrupt
        return whole(network, volumes, name, **options)

    monkeypatch.setattr(comparison, "single", counted)
    given, limit = (cohort, folder, tmp_path / "masks", tmp_path / "maps", [5, 0, 3]), 14
    with pytest.raises(KeyboardInterrupt):  # in the second fold's third or fourth method
        comparison.explain(*given, **QUICK)
    done, limit = len(calls) - 1, None
    maps, _ = comparison.explain(*given, **QUICK)
    assert len(calls) - 1 - done == 2 * 10 - done
    calls.clear()
    for method, size in (("grad-cam", 40), ("smoothgrad", -4000)):  # in the header, in the data
        path = tmp_path / "maps" / method / "000005.nii.gz"
        path.write_bytes(path.read_bytes()[:size])
    again, _ = comparison.explain(*given, **QUICK)
    assert calls == [("Grad-CAM", 1), ("SmoothGrad", 1)]
    for name, values in maps.items():
        np.testing.assert_array_equal(again[name], values)
    calls.clear()
    comparison.explain(*given, **QUICK | {"window": 11})
    assert calls == [("occlusion (blur)", 1), ("occlusion (blur)", 2)]
    calls.clear()
    comparison.explain(*given, **QUICK | {"seed": 1})
    assert len(calls) == 20


def test_group_maps_are_means_over_folds_of_held_out_subjects(study, tmp_path, monkeypatch):
    cohort, folder, networks, fold = study
    brain, quick = np.ones(SHAPE, bool), {"iterations": 3, "permutations": 9}
    found = groups.explain(cohort, folder, tmp_path, [0, 1], brain, **quick)
    expected = {name: [] for name in groups.MASKS}
    for number, network in enumerate(networks):
        *_, (_, random) = controls.randomised(network, seed=number)
        test, train = fold == number, fold != number
        means = [cohort.volumes[train & (cohort.sex == sex)].mean(0) for sex in (0, 1)]
        other = np.stack([means[1 - sex] for sex in cohort.sex[test]])
        given = (network, None), (network, other), (random, other)
        for name, (one, reference) in zip(groups.MASKS, given):
            options = {"target": cohort.sex[test], "reference": reference, "iterations": 3}
            made = group_masks.group_mask(one, cohort.volumes[test], progress=False, **options)
            expected[name].append(made)
    for name, maps in expected.items():
        np.testing.assert_allclose(found[name], np.mean(maps, axis=0), atol=1e-4)
    assert len({found[name].tobytes() for name in groups.MASKS}) == 3
    t = [voxelwise.t_map(cohort.volumes[fold != n], cohort.sex[fold != n], brain) for n in (0, 1)]
    np.testing.assert_allclose(found["t map"], np.abs(t).mean(0), rtol=1e-6)
    assert np.abs(found["t map"] - found["t map (brain volume out)"]).max() > 0.1
    assert 0 < found["corrected p"].max() <= 1 + 1e-6  # of nine permutations
    calls = []
    monkeypatch.setattr(group_masks, "group_mask", lambda *_, **__: calls.append("mask"))
    again = groups.explain(cohort, folder, tmp_path, [0, 1], brain, **quick)
    for name, values in found.items():
        np.testing.assert_array_equal(again[name], values)
    smaller = brain.copy()
    smaller[0] = False
    fewer = groups.explain(cohort, folder, tmp_path, [0, 1], smaller, **quick)
    assert calls == [], "the brain's voxels and the tests change no mask"
    assert not fewer["corrected p"][0].any()
    assert not fewer["t map"][0].any()


def test_each_is_judged_by_its_own_network(study, explained):
    cohort, folder, networks, fold = study
    rows, maps, table = explained
    brain = np.ones(SHAPE, bool)
    name = "gradient × input"
    found, by_other = judging.judge(cohort, folder, rows, table, {name: maps[name]}, brain)
    found = found[name]
    for n, row in enumerate(rows):
        train, target = fold != fold[row], int(table["target"][n])
        other = cohort.volumes[train & (cohort.sex == 1 - target)].mean(0)
        given = networks[fold[row]], cohort.volumes[row : row + 1], maps[name][n : n + 1], brain
        options = {"target": target, "reference": other, "progress": False}
        area = measures.faithfulness(*given, **options)["deletion_area"][0]
        assert by_other[name][n] == pytest.approx(area, rel=1e-4)
        expected = measures.faithfulness(
            networks[fold[row]],
            cohort.volumes[row : row + 1],
            maps[name][n : n + 1],
            brain,
            target=int(table["target"][n]),
            progress=False,
        )
        for measure, values in expected.items():
            np.testing.assert_allclose(found[measure][n], values[0], rtol=1e-5)


def test_alike_compares_a_subject_with_itself(study):
    cohort, _, networks, fold = study
    brain, rows = np.ones(SHAPE, bool), [2, 3]
    before = copy.deepcopy(networks[0].state_dict())
    others = {"optimiser seed": (networks[0], 1), "network": (networks[1], 0)}
    found = judging.alike(
        networks[0],
        others,
        cohort.volumes[rows],
        [comparison.MASK, comparison.GRADIENT],
        brain,
        subjects=cohort.subjects[rows],
        means=masks.training_means(cohort, fold, 0),
        iterations=2,
    )
    assert found["map"].tolist() == [comparison.MASK] * 4 + [comparison.GRADIENT] * 4
    assert (
        found["other"].tolist()
        == ["optimiser seed"] * 2 + ["network"] * 2 + ["optimiser seed"] * 2 + ["network"] * 2
    )
    for n, row in enumerate(rows):
        target = predicted(networks[0], cohort.volumes[row])  # of both networks' maps
        maps = [
            np.abs(blur(slope(network, cohort.volumes[row], target) * cohort.volumes[row]))
            for network in networks
        ]
        expected = measures.similarity(*maps, brain)
        assert found["spearman"][6 + n] == pytest.approx(expected["spearman"], abs=1e-3)
    assert (found["dice"][4:6] == 1).all(), "a gradient draws nothing"
    assert not (found["dice"][[0, 1, 2, 3, 6, 7]] == 1).any()
    for name, value in networks[0].state_dict().items():
        assert torch.equal(value, before[name])


def test_blurred_brains_are_counted_by_their_own_network(study):
    cohort, folder, networks, _ = study
    found = judging.blurred_brains(cohort, folder, [1, 3, 4, 6, 7])
    assert found[["fold", "sex", "n"]].values.tolist() == [[0, "M", 2], [1, "F", 2], [1, "M", 1]]
    for row, rows in zip(found.itertuples(), ([1, 3], [4, 6], [7])):
        taken = [
            predicted(networks[row.fold], gaussian_filter(cohort.volumes[r], 5.0, mode="nearest"))
            for r in rows
        ]
        assert row.taken_for_men == sum(taken)


def test_several_networks_alone_and_averaged(study, monkeypatch):
    """Networks that give maps made up here; of two voxels one is planted."""
    brain, truth = np.zeros(SHAPE, bool), np.zeros(SHAPE, bool)
    brain[0, 0, :2] = truth[0, 0, 0] = True

    def single(network, volumes, name, **_):
        maps = np.zeros((2, *SHAPE))
        maps[:, 0, 0, :2] = {"a": [[3, 0], [0, 2]], "b": [[1, 3], [1, 0]]}[network]
        return maps

    monkeypatch.setattr(judging, "single", single)
    found = judging.averaged(["a", "b"], np.zeros((2, *SHAPE)), ["x"], truth, brain)
    # a: right, wrong, and its mean right; b: wrong, right, its mean wrong; a + b: right, wrong
    assert found["of"].tolist() == ["one network", "their mean"]
    assert found["single"].tolist() == [0.75, 0.75]
    assert found["group"].tolist() == [0.75, 0.5]
    assert found["n"].tolist() == [2, 2]


def test_t_of_sex_in_a_linear_model_with_brain_volume(study):
    cohort, *_ = study
    brain, volume = np.ones(SHAPE, bool), cohort.table["brain_volume_ml"].to_numpy()
    found = voxelwise.t_map(cohort.volumes, cohort.sex, brain, sigma=1e-9, confound=volume)
    at = (9, 10, 11)
    design = np.column_stack([np.ones(8), cohort.sex, volume])
    y = cohort.volumes[:, *at].astype(float)
    beta, (rss,), *_ = np.linalg.lstsq(design, y)
    error = np.sqrt(rss / 5 * np.linalg.inv(design.T @ design)[1, 1])
    assert found[at] == pytest.approx(beta[1] / error, rel=1e-3)


@pytest.mark.parametrize(
    "confound", [np.r_[np.nan, np.ones(7)], np.ones(7), np.ones((8, 2))], ids=str
)
def test_a_confound_with_blanks_is_refused(study, confound):
    cohort, *_ = study
    with pytest.raises(ValueError, match=r"expected a confound \(8,\) without blanks"):
        voxelwise.t_map(cohort.volumes, cohort.sex, np.ones(SHAPE, bool), confound=confound)


def test_t_map_refuses_what_is_not_finite(study):
    cohort, *_ = study
    volumes = cohort.volumes.copy()
    volumes[3, 4, 5, 6] = np.nan
    with pytest.raises(ValueError, match="volume 3 holds NaN"):
        voxelwise.t_map(volumes, cohort.sex, np.ones(SHAPE, bool))


def test_regions_are_of_training_subjects_and_of_one_volume(study, monkeypatch):
    cohort, _, networks, fold = study
    brain, seen = np.ones(SHAPE, bool), []
    planted = np.zeros(SHAPE, bool)
    planted[8:14, 9:15, 10:16] = True

    def group(network, volumes, **options):
        seen.append((volumes.rows.tolist(), options["target"].tolist()))
        return np.arange(np.prod(SHAPE), dtype=np.float32).reshape(SHAPE)

    monkeypatch.setattr(controls, "group_mask", group)
    options = {"planted": planted, "share": 0.1, "randoms": 2}
    found = controls.regions(cohort, networks[0], fold == 0, brain, **options)
    assert seen == [([5, 7], [1, 1]), ([4, 6], [0, 0]), ([4, 5, 6, 7], [0, 1, 0, 1])]
    assert {region.sum() for region in found.values()} == {round(0.1 * brain.sum())}
    assert found["planted regions"][planted].all()
    assert list(found)[-2:] == ["random 1", "random 2"]
    assert (found["random 1"] != found["random 2"]).any()
    assert found["group mask of both"].ravel()[-100:].all(), "where the mask is largest"


def test_an_empty_group_mask_is_no_random_region(study, monkeypatch):
    cohort, _, networks, fold = study
    monkeypatch.setattr(controls, "group_mask", lambda *_, **__: np.zeros(SHAPE, np.float32))
    with pytest.warns(UserWarning, match="group mask of .*: expected 275 voxels.* found 0"):
        found = controls.regions(cohort, networks[0], fold == 0, np.ones(SHAPE, bool), randoms=1)
    assert list(found) == ["random 1"]


def test_removal_counts_the_held_out_who_are_right(study, monkeypatch):
    """Without the region 3 of 4, from it alone 1 of 4; Wilson's intervals from their formula."""
    cohort, *_, fold = study
    region = np.zeros(SHAPE, bool)
    region[8:14] = True

    def retrained(volumes, sex, held_out, gone, make, **_):
        return 3 if np.array_equal(gone, region) else 1

    monkeypatch.setattr(controls, "retrained", retrained)
    monkeypatch.setattr(controls.networks, "workers", lambda: 1)
    found = controls.removal(cohort, {"box": region}, fold == 0, None, epochs=1)
    assert found["sees"].tolist() == ["all but the region", "the region alone"]
    assert found["accuracy"].tolist() == [0.75, 0.25]
    assert found["n"].tolist() == [4, 4]
    z, n = 1.959964, 4
    centre, half = (0.75 + z**2 / (2 * n)), z * np.sqrt(0.75 * 0.25 / n + z**2 / (4 * n**2))
    limits = (centre - half) / (1 + z**2 / n), (centre + half) / (1 + z**2 / n)
    assert tuple(found.loc[0, ["low", "high"]]) == pytest.approx(limits, abs=1e-5)


def text(figure):
    return " ".join(one.get_text() for one in figure.findobj(Text))


def test_figures_say_what_they_show(study, explained):
    cohort, *_ = study
    _, maps, _ = explained
    background, labels = cohort.volumes.mean(0), np.zeros(SHAPE, int)
    labels[8:14, 9:15, 10:16] = 3
    options = {"title": "T", "cohort": "toy cohort, n=8"}
    one = {name: values[0] for name, values in maps.items()}
    one["nothing"] = np.zeros(SHAPE)
    drawn = figures.maps(background, one, AFFINE, (0, -5, -10), outlines=labels, **options)
    assert isinstance(drawn, Figure)
    shown = text(drawn)
    for name in (*one, "toy cohort, n=8", "planted regions", "x = 0 mm", "L", "R", "A"):
        assert name in shown
    values = {"a": np.array([[0.9, 0.5], [0.7, 0.1]]), "b": np.ones((2, 2))}
    drawn = figures.curves((0, 0.02), values, values, **options)
    line = drawn.axes[0].lines[0]
    np.testing.assert_allclose(line.get_xydata(), [[0, 0.8], [2, 0.3]])
    assert "2 held-out subjects" in text(drawn)


def test_region_bars_are_the_shares():
    rows = [
        ("women", 1, "genu", 2.0, 0.5, 0.4, 1.0),
        ("women", 0, "none", 8.0, 0.1, 0.6, np.nan),
        ("men", 1, "genu", 2.0, 0.5, 0.25, 1.0),
        ("men", 0, "none", 8.0, 0.1, 0.75, np.nan),
    ]
    columns = ["group", "label", "name", "volume_ml", "mean", "share", "rank"]
    drawn = figures.region_bars(pd.DataFrame(rows, columns=columns), title="T", cohort="toy")
    widths = [bar.get_width() for bar in drawn.axes[0].patches]
    assert widths == pytest.approx([40, 25])
    assert "genu" in text(drawn)
    assert [line.get_xdata()[0] for line in drawn.axes[0].lines[:2]] == pytest.approx([20, 20])
    more = [(group, 2, "genu", 2.0, 0.5, 0.1, 2.0) for group in ("women", "men")]
    twice = pd.DataFrame([*rows, *more], columns=columns)
    drawn = figures.region_bars(twice, title="T", cohort="toy")
    assert len(drawn.axes[0].patches) == 4, "two labels of one name are two regions"
