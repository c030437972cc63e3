"""Controls against what they must not be able to do."""

import copy
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn

from brainsex import controls
from brainsex.cohort import Cohort
from brainsex.networks import MriNet3d


def test_cascading_randomisation_goes_from_the_last_layer_to_the_first():
    torch.manual_seed(0)
    network = MriNet3d(2, (22, 23, 24))
    for module in network.modules():
        if isinstance(module, nn.BatchNorm3d):
            for value in (module.running_mean, module.running_var, module.weight.data):
                value.fill_(3.0)
            module.bias.data.fill_(3.0)
    before = copy.deepcopy(network.state_dict())
    rng = torch.get_rng_state()
    steps = list(controls.randomised(network, seed=1))
    assert [name for name, _ in steps] == [
        "linear", "hidden3.1", "hidden3.0", "hidden2.1", "hidden2.0", "hidden1.1", "hidden1.0",
    ]  # fmt: skip
    for number, (_, changed) in enumerate(steps, 1):
        drawn = {name for name, _ in steps[:number]}
        for name, value in changed.state_dict().items():
            layer, _, kind = name.rpartition(".")
            if kind != "num_batches_tracked":
                assert torch.equal(value, before[name]) == (layer not in drawn), name
    assert steps[-1][1].hidden1[1].running_mean.abs().max() == 0
    again = list(controls.randomised(network, seed=1))
    other = list(controls.randomised(network, seed=2))
    for name, value in steps[-1][1].state_dict().items():
        assert torch.equal(value, again[-1][1].state_dict()[name])
    weight = steps[-1][1].linear.weight
    assert not torch.equal(weight, other[-1][1].linear.weight)
    assert torch.equal(torch.get_rng_state(), rng)
    for name, value in network.state_dict().items():
        assert torch.equal(value, before[name])


def test_random_region_has_the_volume_asked_for_within_the_brain():
    brain = np.zeros((16, 18, 20), bool)
    brain[3:12, 3:14, 3:15] = True
    region = controls.random_region(brain, 100, seed=1)
    assert region.sum() == 100
    assert not (region & ~brain).any()
    assert (region != controls.random_region(brain, 100, seed=2)).any()
    known = controls.random_map(brain.shape, seed=1)
    assert known[region].min() >= known[brain & ~region].max()
    neighbours = (region[1:] & region[:-1]).sum() / 100
    assert neighbours > 0.5, "blobs, not dust: dust would have a tenth"


def test_without_the_planted_region_nothing_is_learnt_and_with_it_alone_everything(planted):
    volumes, sex, box, held_out = planted

    def learnt(region, **options):
        settings = {"epochs": 12, "batch_size": 6, "lr": 1e-2, "milestones": (8,)}
        make = lambda: MriNet3d(4, (22, 22, 22), dropout=0.0)  # noqa: E731
        settings |= {"progress": False} | options
        return controls.retrained(volumes, sex, held_out, region, make, **settings)

    assert learnt(~box) > 21  # of 24: from the box alone
    assert learnt(box) < 18  # chance
    elsewhere = np.zeros_like(box)
    elsewhere[0:5, 0:6, 0:6] = True
    assert learnt(elsewhere) > 21
    assert learnt(~elsewhere) < 18


def test_what_is_removed_tells_nothing_of_the_held_out(planted, monkeypatch):
    volumes, sex, box, held_out = planted
    seen = {}
    monkeypatch.setattr(
        controls.training, "fit", lambda network, v, s, **_: seen.update(train=v[:], sex=s)
    )

    def predict(network, v):
        seen["test"] = v[:]
        return np.eye(2)[np.zeros(len(v), int)]

    monkeypatch.setattr(controls.training, "predict", predict)
    right = controls.retrained(volumes, sex, held_out, box, lambda: MriNet3d(2, (22, 22, 22)))
    assert right == (sex[held_out] == 0).sum()
    mean = volumes[~held_out].astype(float).mean(0)
    np.testing.assert_allclose(seen["test"][:, box], np.tile(mean[box], (24, 1)), atol=1e-6)
    np.testing.assert_array_equal(seen["test"][:, ~box], volumes[held_out][:, ~box])
    np.testing.assert_array_equal(seen["sex"], sex[~held_out])


SIDE = (22, 22, 22)
QUICK = {"epochs": 1, "batch_size": 6}


@pytest.fixture
def study(planted):
    volumes, sex, box, held_out = planted
    subjects = np.array([str(n) for n in range(60)])
    return Cohort("toy", True, volumes, sex, subjects, None, np.eye(4), None), box, held_out


@pytest.fixture
def counted(monkeypatch, in_process):
    """`retrained` replaced by one that takes note of what it is asked for, and learns nothing."""
    asked = []

    def retrained(volumes, sex, held_out, gone, make_network, **_):
        if len(asked) == counted.stop:
            raise KeyboardInterrupt
        asked.append(int(gone.sum()))
        return asked[-1] % 25

    counted = retrained
    counted.stop, counted.asked = None, asked
    monkeypatch.setattr(controls, "retrained", retrained)
    return counted


def network(channels=2):
    return MriNet3d(channels, SIDE)


def test_a_killed_removal_goes_on(study, counted, tmp_path):
    cohort, box, held_out = study
    regions = {"box": box, "other": np.roll(box, 3, 0)[..., ::-1] & box}
    run = partial(controls.removal, cohort, regions, held_out, network, **QUICK)
    expected = run()
    whole = counted.asked.copy()
    assert len(whole) == 4
    counted.asked.clear()
    counted.stop = 3
    with pytest.raises(KeyboardInterrupt):
        run(out=tmp_path / "removal")
    assert counted.asked == whole[:3]
    counted.asked.clear()
    counted.stop = None
    again = run(out=tmp_path / "removal")
    assert counted.asked == whole[3:], "what was finished is kept"
    assert again.equals(expected)
    assert run(out=tmp_path / "removal").equals(expected)
    assert counted.asked == whole[3:]


@pytest.mark.parametrize(
    "change",
    ["volumes", "sex", "held_out", "region", "network", "seed", "epochs"],
)
def test_removal_of_anything_else_is_another(study, counted, tmp_path, change):
    cohort, box, held_out = study
    controls.removal(cohort, {"box": box}, held_out, network, out=tmp_path, **QUICK)
    counted.asked.clear()
    volumes, sex, held_out, box = (
        np.copy(one) for one in (cohort.volumes, cohort.sex, held_out, box)
    )
    options, make = dict(QUICK), network
    if change == "volumes":
        volumes[59, 3, 4, 5] += 0.01
    elif change == "sex":
        sex[:2] = sex[1::-1]
    elif change == "held_out":
        held_out[[0, 59]] = held_out[[59, 0]]
    elif change == "region":
        box = np.roll(box, 1, 0)
    elif change == "network":
        make = partial(network, 4)
    elif change == "seed":
        options["seed"] = 1
    else:
        options["epochs"] = 2
    other = Cohort("toy", True, volumes, sex, cohort.subjects, None, np.eye(4), None)
    controls.removal(other, {"box": box}, held_out, make, out=tmp_path, **options)
    assert len(counted.asked) == 2


def test_networks_in_processes_of_their_own_leave_what_they_count(
    study, one_cpu_thread, monkeypatch, tmp_path
):
    cohort, box, held_out = study
    monkeypatch.setattr(controls.networks, "workers", lambda: 2)
    run = partial(controls.removal, cohort, {"box": box}, held_out, network, out=tmp_path, **QUICK)
    found = run()
    assert len(list(tmp_path.glob("*.json"))) == 2
    monkeypatch.setattr(controls.networks, "workers", lambda: 1)
    monkeypatch.setattr(controls, "retrained", None)
    assert run().equals(found)


@pytest.mark.parametrize("asked", [40, 41])
def test_a_region_that_is_rim_for_the_most_part_is_none(study, monkeypatch, asked):
    """A mask of 20 voxels: smoothed it is positive in thousands, but it is half of 40."""
    cohort, _, held_out = study
    mask = np.zeros(SIDE, np.float32)
    mask[10, 8:12, 9:14] = 1
    monkeypatch.setattr(controls, "group_mask", lambda *_, **__: mask)
    brain = np.ones(SIDE, bool)
    run = partial(controls.regions, cohort, None, held_out, brain, share=asked / mask.size)
    if asked == 40:
        found = run(randoms=0)
        assert list(found) == [f"group mask of {name}" for name in ("men", "women", "both")]
        assert all(one.sum() == 40 and one[mask > 0].all() for one in found.values())
    else:
        with pytest.warns(
            UserWarning, match="mask of (men|women|both): expected 41 voxels.* found 20"
        ):
            assert list(run(randoms=1)) == ["random 1"]
