"""Masks: right where the answer is known by hand, scored as said, the same whatever runs them."""

import copy

import nibabel as nib
import numpy as np
import pandas as pd
import pytest
import torch
from scipy.ndimage import binary_dilation, gaussian_filter

from brainsex import group_masks, networks, perturbation
from brainsex.cohort import Cohort
from brainsex.group_masks import group_mask
from brainsex.masks import explain, held_out
from brainsex.networks import MriNet3d
from brainsex.perturbation import blurred, optimise_masks

SMALL = (22, 24, 26)
FULL = (58, 70, 58)
BOX, DECOY = np.zeros((2, *FULL), bool)
BOX[10:18, 40:48, 30:38] = True
DECOY[36:44, 16:24, 12:20] = True
QUICK = {"iterations": 6, "area": 1.0}


class BoxMean(MriNet3d):
    """Man where the mean of `BOX` is above 0.45: no other voxel counts."""

    def __init__(self, gain=30.0):
        super().__init__(2, FULL)
        self.gain = gain
        self.register_buffer("box", torch.from_numpy(BOX / BOX.sum()).float())

    def forward(self, volumes):
        evidence = self.gain * ((volumes[:, 0] * self.box).sum((1, 2, 3)) - 0.45)
        return torch.stack([-evidence / 2, evidence / 2], 1)


class Blind(MriNet3d):
    """The same logits for whatever it is shown."""

    def __init__(self, logits=(-1.0, 1.0)):
        super().__init__(2, FULL)
        self.logits = logits

    def forward(self, volumes):
        return torch.tensor([self.logits], dtype=volumes.dtype).expand(len(volumes), 2)


@pytest.fixture
def bright():
    """One volume: evidence in `BOX`, as bright a box elsewhere, some noise."""
    volume = 0.15 + 0.02 * np.random.default_rng(0).standard_normal(FULL)
    volume[BOX | DECOY] = 0.8
    return volume[None].astype(np.float32)


@pytest.fixture(scope="module")
def volumes():
    rng = np.random.default_rng(1)
    found = rng.uniform(0, 0.3, (4, *SMALL)).astype(np.float32)
    found[:, 3:9, 12:18, 14:20] += 0.5
    return found


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


def masks_of(network, volumes, **options):
    """A few steps under light penalties: masks of a small volume, neither empty nor full."""
    return optimise_masks(network, volumes, **QUICK | {"progress": False} | options)


def in_precision(monkeypatch, dtype):
    monkeypatch.setattr(networks, "precision", lambda device: dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_mask_covers_the_evidence_and_leaves_the_rest(bright, monkeypatch, dtype):
    in_precision(monkeypatch, dtype)
    found = optimise_masks(BoxMean(), bright, progress=False)
    mask, (record,) = found.masks[0], found.history.to_dict("records")
    assert record["target"] == 1
    assert record["before"] > 0.999
    assert record["after"] < 0.1
    assert mask[BOX].mean() > 0.75
    beside = ~binary_dilation(BOX, iterations=3)  # the mask's grid is half as fine, and moves
    assert mask[beside].max() < 0.05
    assert mask[DECOY].max() == 0


def test_a_network_that_is_very_sure_is_explained_too(bright):
    """Log-odds of 350: the probability is 1 whatever the mask, until it is nearly done."""
    expected = optimise_masks(BoxMean(), bright, progress=False)
    sure = optimise_masks(BoxMean(gain=1000.0), bright, progress=False)
    assert sure.history["after"][0] < 1e-6
    assert np.corrcoef(sure.masks.ravel(), expected.masks.ravel())[0, 1] > 0.95


def test_without_evidence_nothing_is_removed(bright):
    found = optimise_masks(Blind(), bright, progress=False)
    assert found.masks.max() == 0
    expected = 1 / (1 + np.exp(-2))
    np.testing.assert_allclose(found.history[["before", "after"]], expected, rtol=1e-6)
    assert found.history["volume"].tolist() == [0]


def test_removal_stops_where_the_evidence_is_gone(bright, monkeypatch):
    """Full removal would leave far less than the floor; the mask takes no more than it must."""
    cheap = optimise_masks(BoxMean(), bright, progress=False)
    monkeypatch.setattr(perturbation, "FLOOR", 0.6)
    lenient = optimise_masks(BoxMean(), bright, progress=False)
    (low,), (high,) = cheap.history["after"], lenient.history["after"]
    assert low < 0.1 < high
    assert lenient.history["volume"][0] < cheap.history["volume"][0]


def test_the_evidence_goes_however_dear_the_area(bright, monkeypatch):
    dear = {"area": 1000.0, "progress": False}
    assert optimise_masks(BoxMean(), bright, **dear).history["after"][0] < 0.1
    monkeypatch.setattr(perturbation, "GROWTH", 1.0)
    assert optimise_masks(BoxMean(), bright, **dear).history["after"][0] > 0.9


def test_target(bright):
    """Without a target the predicted class; a class without evidence needs no removal."""
    dark = np.full_like(bright, 0.15)
    both = np.concatenate([bright, dark])
    network = BoxMean()
    predicted = optimise_masks(network, both, progress=False)
    assert predicted.history["target"].tolist() == [1, 0]
    assert predicted.history["before"].min() > 0.99
    women = optimise_masks(network, both, target=0, progress=False)
    assert women.history["target"].tolist() == [0, 0]
    assert women.history["before"][0] < 0.01
    assert women.masks[0].max() == 0
    np.testing.assert_array_equal(women.masks[1], predicted.masks[1])
    each = optimise_masks(network, both, target=np.array([1, 0]), progress=False)
    np.testing.assert_array_equal(each.masks, predicted.masks)


def test_the_returned_mask_is_the_one_that_was_scored(network, volumes):
    sigma = 3.0
    found = masks_of(network, volumes, sigma=sigma)
    assert found.masks.dtype == np.float32
    assert 0 <= found.masks.min() < 0.1 < found.masks.max() <= 1
    table = found.history
    assert table.columns.tolist() == ["target", "before", "after", "volume"]
    for volume, mask, row in zip(volumes, found.masks, table.itertuples()):
        smooth = gaussian_filter(volume, sigma, mode="nearest", truncate=4)
        shown = torch.from_numpy(np.stack([volume, volume * (1 - mask) + smooth * mask]))
        with torch.no_grad():
            before, after = network(shown[:, None]).softmax(1)[:, row.target].tolist()
        assert row.before == pytest.approx(before, abs=1e-5)
        assert row.after == pytest.approx(after, abs=1e-4)
        assert row.volume == pytest.approx(mask.mean(dtype=float), abs=1e-6)
    assert (table["before"] > 0.5).all()
    assert (table["after"] < table["before"] - 0.01).all()


def test_scored_in_float32_whatever_the_search_ran_in(network, volumes, monkeypatch):
    in_precision(monkeypatch, torch.bfloat16)
    coarse = masks_of(network, volumes).history["before"]
    in_precision(monkeypatch, torch.float32)
    np.testing.assert_array_equal(masks_of(network, volumes).history["before"], coarse)


def test_bfloat16_finds_what_float32_finds(bright, monkeypatch):
    found = {}
    for dtype in (torch.float32, torch.bfloat16):
        in_precision(monkeypatch, dtype)
        found[dtype] = optimise_masks(BoxMean(), bright, progress=False).masks.ravel()
    assert np.corrcoef(*found.values())[0, 1] > 0.95


def state(network):
    return (
        {name: value.clone() for name, value in network.state_dict().items()},
        [module.training for module in network.modules()],
        [(p.requires_grad, p.grad, p.dtype, p.device) for p in network.parameters()],
        [len(module._forward_hooks) for module in network.modules()],
        [type(module) for module in network.modules()],
        (torch.get_num_threads(), torch.is_grad_enabled(), torch.get_rng_state().tolist()),
    )


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("raising", [True, False])
def test_the_network_is_left_as_it_was(network, volumes, training, raising, monkeypatch):
    network = copy.deepcopy(network).train(training)
    network.hidden1[0].bias.requires_grad_(False)
    network.linear.register_forward_hook(lambda *_: None)
    before = state(network)
    if raising:

        def fail(*_, **__):
            raise RuntimeError("out of memory")

        monkeypatch.setattr(perturbation, "_price", fail)
        with pytest.raises(RuntimeError, match="out of memory"):
            masks_of(network, volumes)
    else:
        masks_of(network, volumes)
    after = state(network)
    assert after[1:] == before[1:]
    for name, value in before[0].items():
        assert torch.equal(after[0][name], value), name


def test_volumes_are_left_as_they_were(network, volumes):
    given = volumes.copy()
    given.flags.writeable = False  # as a memory-mapped cohort's are
    masks_of(network, given)
    np.testing.assert_array_equal(given, volumes)


def test_a_network_in_training_mode_is_explained_in_evaluation(network, volumes):
    expected = masks_of(network, volumes[:2])
    found = masks_of(copy.deepcopy(network).train(), volumes[:2])
    np.testing.assert_array_equal(found.masks, expected.masks)
    pd.testing.assert_frame_equal(found.history, expected.history)


def test_same_bits_in_any_order_company_and_number_of_threads(network, volumes):
    names, threads = ["000010", "000011", "000012", "000013"], torch.get_num_threads()
    expected = masks_of(network, volumes, subjects=names)
    order = [2, 0, 3, 1]
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            again = masks_of(network, volumes[order], subjects=[names[i] for i in order])
            np.testing.assert_array_equal(again.masks, expected.masks[order])
            shuffled = expected.history.iloc[order].reset_index(drop=True)
            pd.testing.assert_frame_equal(again.history, shuffled)
    finally:
        torch.set_num_threads(threads)
    alone = masks_of(network, volumes[1:2], subjects=names[1:2])
    np.testing.assert_array_equal(alone.masks[0], expected.masks[1])


def test_seed_and_subject_choose_the_draws(network, volumes):
    same = np.repeat(volumes[:1], 3, 0)
    one = masks_of(network, same, subjects=["a", "b", "a"]).masks
    np.testing.assert_array_equal(one[0], one[2])
    assert np.abs(one[0] - one[1]).max() > 1e-3
    other = masks_of(network, same[:1], subjects=["a"], seed=1).masks
    assert np.abs(other[0] - one[0]).max() > 1e-3
    assert len(np.unique(masks_of(network, same).masks[:, 3:9].sum((1, 2, 3)))) == 3


@pytest.mark.parametrize(
    "option",
    [
        {"iterations": 7},
        {"area": 3.0},
        {"sigma": 1.0},
    ],
)
def test_no_option_is_ignored(network, volumes, option):
    plain, changed = (masks_of(network, volumes[:1], **o).masks for o in ({}, option))
    assert np.abs(plain - changed).max() > 1e-3


def _with(volumes, value):
    volumes = volumes.copy()
    volumes[2, 3, 4, 5] = value
    return volumes


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        (lambda v: v[0], {}, r"\(N, X, Y, Z\) and N subjects, found \(22, 24, 26\)"),
        (lambda v: v[..., :25], {}, r"expected volumes \(N, 1, 22, 24, 26\)"),
        (lambda v: _with(v, np.nan), {}, "volume 2 .* finite"),
        (lambda v: _with(v, np.inf), {"subjects": list("abcd")}, "volume 2 .* finite"),
        (lambda v: v, {"target": 2}, "target of 0 or 1.* found 2"),
        (lambda v: v, {"target": 0.5}, r"target of 0 or 1.* found 0\.5"),
        (lambda v: v, {"target": [0, 1]}, r"each of 4 volumes, found \[0, 1\]"),
        (lambda v: v, {"target": np.zeros((4, 1), int)}, "each of 4 volumes"),
        (lambda v: v, {"subjects": ["a"]}, "N subjects, found .* and 1"),
    ],
)
def test_bad_input(network, volumes, change, options, message):
    with pytest.raises(ValueError, match=message):
        masks_of(network, change(volumes), **options)


def test_no_volumes_give_no_masks(network):
    found = masks_of(network, np.empty((0, *SMALL), np.float32))
    assert found.masks.shape == (0, *SMALL)
    assert len(found.history) == 0


@pytest.mark.parametrize("sigma", [5.0, 1.3])
def test_the_reference_is_a_gaussian_blur(volumes, sigma):
    found = blurred(torch.from_numpy(volumes)[:, None], sigma)
    assert found.dtype == torch.float32
    assert found.shape == (4, 1, *SMALL)
    for volume, one in zip(volumes, found):
        expected = gaussian_filter(volume.astype(float), sigma, mode="nearest", truncate=4)
        np.testing.assert_allclose(one[0], expected, atol=1e-6)


def test_a_constant_stays_what_it_is():
    constant = torch.full((1, 1, *SMALL), 0.37)
    np.testing.assert_allclose(blurred(constant), constant, rtol=1e-6)


def test_an_impulse_stays_where_it_is():
    impulse = torch.zeros(1, 1, 41, 43, 45)
    centre = (19, 21, 23)
    impulse[0, 0][centre] = 1
    found = blurred(impulse, 2.0)[0, 0].double().numpy()
    assert np.unravel_index(found.argmax(), found.shape) == centre
    assert found.sum() == pytest.approx(1, abs=1e-6)
    for axis, expected in enumerate(centre):
        profile = found.sum(tuple(a for a in range(3) if a != axis))
        mean = (profile * np.arange(len(profile))).sum()
        assert mean == pytest.approx(expected, abs=1e-5)
        spread = (profile * (np.arange(len(profile)) - mean) ** 2).sum()
        assert spread == pytest.approx(4.0, abs=0.03)  # variance, cut off at 4 sigma


def test_the_price_by_hand(monkeypatch):
    """One mask of 2 x 2 x 3 with a single step, one of zeros; worked out on paper."""
    monkeypatch.setattr(perturbation, "SMOOTHNESS", 2.0)
    coarse = torch.zeros(2, 1, 2, 2, 3)
    coarse[0, ..., 2] = 1.0  # mean 1/3; squared gradient along z: 0, 1 -> mean 1/2; none in x, y
    assert perturbation._price(coarse, 3.0).item() == pytest.approx((3 / 3 + 2 / 2) + 0)


def test_persistence_is_the_mean_mask_on_the_way(monkeypatch):
    """Constant masks, each step up or down; without the first step, which is warming up."""
    monkeypatch.setattr(perturbation, "WARM", 1)
    seen = []

    def evidence(coarse, iteration, step):
        seen.append(coarse.detach().clone())
        return (coarse * step).sum((1, 2, 3, 4))

    like = torch.empty(1, 1, 4, 6, 8)
    final, mean = perturbation.descend(evidence, like, [0.5, -2.0, 1.0, 3.0], area=0.0)
    on_the_way = [one.mean().item() for one in (*seen[2:], final)]  # after steps 2, 3 and 4
    assert len(set(on_the_way)) > 1
    assert mean.mean().item() == pytest.approx(np.mean(on_the_way), abs=1e-6)
    short, alone = perturbation.descend(evidence, like, [0.5], area=0.0)
    np.testing.assert_array_equal(short, alone)  # nothing after the warm-up: the mask itself


def searched(network, batch, *others, area=3.0):
    """The search alone, given the blur's default as its reference."""
    removed = blurred(batch) - batch
    return perturbation._optimise(network, batch, removed, *others, area)[0]


def test_together_as_alone(network, volumes, monkeypatch):
    """A batch, as a GPU has it: every volume minimises its own objective, no mean over all."""
    count = perturbation.RAMP + 6  # weights grow, where the target is above the floor
    shifts = np.random.default_rng(0).integers(-1, 2, (3, count, 3))
    batch, target = torch.from_numpy(volumes[:3])[:, None], torch.tensor([0, 1, 1])
    frozen, log_odds = networks.folded(network), torch.tensor([1.0, 30.0, -4.0])
    monkeypatch.setattr(perturbation, "LR", 0.1)
    with networks.one_thread_each(torch.device("cpu")):
        together = searched(frozen, batch, target, log_odds, shifts)
        for n in range(3):
            some = slice(n, n + 1)
            one = (batch[some], target[some], log_odds[some], shifts[some])
            alone = searched(frozen, *one)
            np.testing.assert_allclose(together[some], alone, atol=2e-3)


def test_one_volume_above_the_floor_does_not_press_on_another(bright):
    """Evidence of two strengths: the weaker is gone while the stronger's weight still grows."""
    weaker = np.where(BOX, 0.55, bright[0]).astype(np.float32)
    batch, target = torch.from_numpy(np.stack([bright[0], weaker]))[:, None], torch.tensor([1, 1])
    log_odds = torch.tensor([30 * (0.8 - 0.45), 30 * (0.55 - 0.45)])
    shifts = np.random.default_rng(0).integers(-1, 2, (2, perturbation.RAMP + 15, 3))
    together = searched(BoxMean(), batch, target, log_odds, shifts, area=300.0)
    last = (batch[1:], target[1:], log_odds[1:], shifts[1:])
    alone = searched(BoxMean(), *last, area=300.0)
    assert alone.max() > 0.1
    np.testing.assert_allclose(together[1:], alone, atol=2e-3)


def test_shifts_reach_one_voxel_either_way(bright, monkeypatch):
    moves, whole = [], perturbation.seen

    def spied(*given):
        moves.extend(given[-1])
        return whole(*given)

    monkeypatch.setattr(perturbation, "seen", spied)
    optimise_masks(BoxMean(), bright, iterations=100, progress=False)
    moves = np.array(moves)
    assert moves.shape == (100, 3)
    for axis in moves.T:
        assert sorted(set(axis)) == [-1, 0, 1]
        assert abs(axis.mean()) < 0.3


@pytest.fixture
def study(network, volumes, tmp_path):
    """A cohort of four and the networks of two folds, as notebook 04 leaves them."""
    affine = np.array([[3.0, 0, 0, -30], [0, 3.1, 0, -40], [0, 0, 3.2, -50], [0, 0, 0, 1]])
    subjects = np.array(["000007", "000011", "000013", "000017"])
    sex = np.array([0, 1, 0, 1])
    table = pd.DataFrame({"Subject": subjects, "label": sex})
    cohort = Cohort("toy", False, volumes, sex, subjects, None, affine, table)
    folder = tmp_path / "cnn3d"
    folder.mkdir()
    other = copy.deepcopy(network)
    torch.nn.init.normal_(other.linear.weight, generator=torch.Generator().manual_seed(5))
    for fold, one in enumerate((network, other)):
        torch.save(one.state_dict(), folder / f"fold-{fold}.pt")
    folds = pd.DataFrame({"Subject": subjects[::-1], "fold": [0, 0, 1, 1]})
    folds.to_csv(folder / "folds.csv", index=False)
    return cohort, folder, (network, other), [1, 1, 0, 0]


def test_each_subject_by_the_network_that_did_not_see_it(study, tmp_path, monkeypatch):
    monkeypatch.setattr(perturbation, "WARM", 2)  # so that persistence is not the last mask
    cohort, folder, fitted, folds = study
    table = explain(cohort, folder, tmp_path / "masks", **QUICK)
    assert table["Subject"].tolist() == cohort.subjects.tolist()
    assert table["fold"].tolist() == folds
    assert table["sex"].tolist() == cohort.sex.tolist()
    for n, (subject, fold) in enumerate(zip(cohort.subjects, folds)):
        volume = cohort.volumes[n : n + 1]
        expected = masks_of(fitted[fold], volume, subjects=[subject])
        image = nib.load(tmp_path / "masks" / f"{subject}.nii.gz")
        np.testing.assert_allclose(image.affine, cohort.affine, atol=1e-6)
        np.testing.assert_array_equal(image.get_fdata(dtype=np.float32), expected.masks[0])
        image = nib.load(tmp_path / "masks" / "persistence" / f"{subject}.nii.gz")
        np.testing.assert_array_equal(image.get_fdata(dtype=np.float32), expected.persistence[0])
        assert np.abs(expected.persistence - expected.masks).max() > 0.01
        assert table.loc[n, "after"] == pytest.approx(expected.history["after"][0], abs=1e-6)
    some = explain(cohort, folder, tmp_path / "some", rows=[2, 1], **QUICK)
    assert some["Subject"].tolist() == ["000013", "000011"]
    assert some["after"].tolist() == pytest.approx(table["after"][[2, 1]].tolist(), abs=1e-6)


def test_masks_of_a_cohort_go_on_where_they_stopped(study, tmp_path, monkeypatch):
    cohort, folder, fitted, _ = study
    whole, calls = perturbation.optimise_masks, []

    def counted(network, volumes, **options):
        calls.extend(options["subjects"])
        if len(calls) == limit:
            raise KeyboardInterrupt
        return whole(network, volumes, **options)

    monkeypatch.setattr(perturbation, "optimise_masks", counted)
    limit = 4  # in the second fold
    with pytest.raises(KeyboardInterrupt):
        explain(cohort, folder, tmp_path / "masks", **QUICK)
    limit, done = None, calls[:2]
    calls.clear()
    table = explain(cohort, folder, tmp_path / "masks", **QUICK)
    assert sorted([*done, *calls]) == cohort.subjects.tolist()
    calls.clear()
    again = explain(cohort, folder, tmp_path / "masks", **QUICK)
    assert calls == []
    pd.testing.assert_frame_equal(again, table)
    torch.save(fitted[1].state_dict(), folder / "fold-0.pt")  # another network in fold 0
    explain(cohort, folder, tmp_path / "masks", **QUICK)
    assert sorted(calls) == ["000013", "000017"]
    calls.clear()
    explain(cohort, folder, tmp_path / "masks", **QUICK | {"seed": 1})
    assert len(calls) == 4  # other settings


def test_held_out_gives_the_fold_of_each_subject_asked_for(study, tmp_path):
    cohort, folder, _, folds = study
    order = [2, 0, 3]
    found = held_out(str(folder), cohort.subjects[order])
    assert found.tolist() == [folds[n] for n in order]
    with pytest.raises(FileNotFoundError, match="04_cnn_3d"):
        held_out(tmp_path / "absent", cohort.subjects)
    with pytest.raises(ValueError, match=r"cnn3d: folds.csv does not know 000001, 000099\."):
        held_out(folder, ["000099", "000007", "000001"])


def test_a_cohort_without_networks_or_affine(study, tmp_path):
    cohort, folder, *_ = study
    with pytest.raises(FileNotFoundError, match="04_cnn_3d"):
        explain(cohort, tmp_path / "absent", tmp_path / "masks")
    nowhere = Cohort(**{**vars(cohort), "affine": None})
    with pytest.raises(ValueError, match="no affine"):
        explain(nowhere, folder, tmp_path / "masks")
    pd.DataFrame({"Subject": ["000007"], "fold": [0]}).to_csv(folder / "folds.csv", index=False)
    with pytest.raises(ValueError, match="does not know 000011"):
        explain(cohort, folder, tmp_path / "masks")
    assert not (tmp_path / "masks").exists()


def test_another_reference_takes_the_blurs_place(bright):
    """The box is as bright in the reference: to put it there removes nothing; the decoy is gone."""
    kept = bright[0].copy()
    kept[DECOY] = 0.1
    found = optimise_masks(BoxMean(), bright, reference=kept, progress=False)
    assert found.masks.max() == 0
    assert found.history["after"][0] == pytest.approx(found.history["before"][0])
    dark = bright[0].copy()
    dark[BOX] = 0.1
    found = optimise_masks(BoxMean(), bright, reference=dark, progress=False)
    assert found.history["after"][0] < 0.1
    seen = bright[0] + found.masks[0] * (dark - bright[0])
    log_odds = 30 * (seen[BOX].mean() - 0.45)
    assert found.history["after"][0] == pytest.approx(1 / (1 + np.exp(-log_odds)), abs=1e-3)


def test_a_reference_for_all_one_each_and_the_blur_itself(network, volumes):
    blur = blurred(torch.from_numpy(volumes)[:, None])[:, 0].numpy()
    given = masks_of(network, volumes, reference=blur)
    np.testing.assert_array_equal(given.masks, masks_of(network, volumes).masks)
    same = masks_of(network, volumes, reference=np.broadcast_to(blur[0], volumes.shape))
    np.testing.assert_array_equal(masks_of(network, volumes, reference=blur[0]).masks, same.masks)
    message = r"reference \(22, 24, 26\), or one for each of 4 volumes, found \(2, 22, 24, 26\)"
    with pytest.raises(ValueError, match=message):
        masks_of(network, volumes, reference=volumes[:2])


def group_of(network, volumes, **options):
    quick = {"iterations": 6, "batch_size": 2, "progress": False}
    return group_mask(network, volumes, **quick | options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_groups_mask_covers_what_its_members_share(bright, monkeypatch, dtype):
    """Evidence of different strength, each with bright noise of its own, which no mask needs."""
    in_precision(monkeypatch, dtype)
    rng = np.random.default_rng(4)
    group = np.repeat(bright, 6, 0)
    group[:, BOX] *= rng.uniform(0.8, 1.2, (6, 1)).astype(np.float32)
    group += rng.uniform(0, 0.1, group.shape).astype(np.float32)
    found = group_mask(BoxMean(), group, progress=False)
    assert found.shape == FULL
    assert found.dtype == np.float32
    assert found[BOX].mean() > 0.6
    beside = ~binary_dilation(BOX, iterations=3)
    assert found[beside].max() < 0.05
    seen = group + found * (blurred(torch.from_numpy(group)[:, None])[:, 0].numpy() - group)
    before, after = (v[:, BOX].mean(1) - 0.45 for v in (group, seen))
    assert (before > 0.1).all()
    assert after.max() < 0.05, "log-odds of 1.5, after 6 and more"


def test_men_and_women_are_one_group(bright):
    """A woman's box is dark, in a bright surrounding: the other's box is what changes her mind."""
    woman = np.where(BOX, 0.1, bright[0]).astype(np.float32)
    both = np.stack([bright[0], woman])
    found = group_mask(
        BoxMean(), both, target=[1, 0], reference=both[::-1].copy(), batch_size=2, progress=False
    )
    assert found[BOX].mean() > 0.4
    assert found[~binary_dilation(BOX, iterations=3)].max() < 0.05


def test_the_groups_loss_is_the_mean_of_its_members(network, volumes, monkeypatch):
    """One step, no shifts: the mask moves against the sign of the mean loss's own gradient."""
    monkeypatch.setattr(group_masks, "SHIFT", 0)
    in_precision(monkeypatch, torch.float32)
    monkeypatch.setattr(group_masks, "AREA", 0.0)
    monkeypatch.setattr(perturbation, "SMOOTHNESS", 0.0)
    found = group_of(network, volumes, iterations=1, batch_size=4, target=1)
    batch = torch.from_numpy(volumes)[:, None].double()
    coarse = torch.full((1, 1, 11, 12, 13), 0.5, dtype=torch.double, requires_grad=True)
    large = torch.nn.functional.interpolate(coarse, size=SMALL, mode="trilinear")
    blur = np.stack([gaussian_filter(v.astype(float), 5, mode="nearest") for v in volumes])
    removed = torch.from_numpy(blur)[:, None] - batch
    plain = copy.deepcopy(network).double()

    def odds(x):
        logits = plain(x)
        return logits[:, 1] - logits[:, 0]

    whole = odds(batch).detach()
    lowest = np.log(0.02 / 0.98) * (whole / 10).clamp(min=1)
    scale = (whole - lowest).clamp(min=1)
    loss = ((odds(batch + large * removed) - lowest).clamp(min=0) / scale).mean()
    (slope,) = torch.autograd.grad(loss, coarse)
    expected = torch.nn.functional.interpolate(
        (0.5 - 0.3 * slope.sign()), size=SMALL, mode="trilinear"
    )[0, 0]
    np.testing.assert_allclose(found, expected, atol=6e-3)  # Adam's epsilon


def test_group_mask_same_seed_same_bits_and_no_option_ignored(network, volumes):
    before = state(network)
    found = group_of(network, volumes)
    np.testing.assert_array_equal(group_of(network, volumes), found)
    assert state(network)[1:] == before[1:]
    blur = blurred(torch.from_numpy(volumes)[:, None], 1.0)[:, 0].numpy()
    options = [{"iterations": 7}, {"seed": 1}, {"batch_size": 3}, {"target": 0}]
    for option in [*options, {"reference": blur}]:
        assert np.abs(group_of(network, volumes, **option) - found).max() > 1e-4, option
    few = group_of(network, volumes[:1], batch_size=4)  # a batch may hold a subject twice
    assert few.shape == SMALL


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        (lambda v: v[:0], {}, r"found \(0, 22, 24, 26\)"),
        (lambda v: v[0], {}, r"found \(22, 24, 26\)"),
        (lambda v: _with(v, np.nan), {}, "volume 2 .* finite"),
        (lambda v: v[..., :25], {}, r"expected volumes \(N, 1, 22, 24, 26\)"),
        (lambda v: v, {"target": 2}, "target of 0 or 1.* found 2"),
        (lambda v: v, {"reference": np.zeros((3, 4))}, r"expected a reference .* found \(3, 4\)"),
    ],
)
def test_group_mask_bad_input(network, volumes, change, options, message):
    with pytest.raises(ValueError, match=message):
        group_of(network, change(volumes), **options)


def test_masks_are_enlarged_trilinearly():
    coarse = torch.rand(2, 1, 4, 7, 5, requires_grad=True)
    sizes, weights = (8, 13, 10), torch.rand(2, 1, 8, 13, 10)
    expected = torch.nn.functional.interpolate(coarse, size=sizes, mode="trilinear")
    found = perturbation.enlarged(coarse, sizes)
    torch.testing.assert_close(found, expected)
    slopes = [torch.autograd.grad((one * weights).sum(), coarse)[0] for one in (found, expected)]
    torch.testing.assert_close(*slopes)
