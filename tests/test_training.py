"""Fitting, prediction and cross-validation: the same bits whatever happens on the way."""

import copy
import inspect
import json
from typing import ClassVar

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

from brainsex import cohort, evaluation, networks, training
from brainsex.networks import MriNet2d, MriNet3d
from brainsex.training import cross_validate, fit, predict

SHAPE = (22, 26, 24)
FAST = {"epochs": 3, "batch_size": 5, "lr": 3e-3, "precision": torch.float32, "progress": False}

pytestmark = pytest.mark.usefixtures("one_cpu_thread")


def toy(count=12, seed=0):
    """Noise, in men brighter in half of the brain; a corner voxel holds the subject's number."""
    sex = np.arange(count) % 2
    volumes = np.random.default_rng(seed).uniform(0, 0.4, (count, *SHAPE)).astype(np.float32)
    volumes[sex == 1, :11] += 0.3
    volumes[:, 0, 0, 0] = np.arange(count)
    return volumes, sex


def numbers(volumes):
    return volumes[np.arange(len(volumes))][:, 0, 0, 0].astype(int).tolist()


def make(seed=0, **options):
    torch.manual_seed(seed)
    return MriNet3d(2, SHAPE, **options)


def same(one, other):
    """Whether two state dicts agree to the bit."""
    pairs = zip(one.items(), other.items(), strict=True)
    return all(a == b and torch.equal(x, y) for (a, x), (b, y) in pairs)


class Watched(MriNet3d):
    """Notes mode, gradients and size of every pass, its copies' too."""

    passes: ClassVar[list] = []

    def forward(self, volumes):
        self.passes.append((self.training, torch.is_grad_enabled(), len(volumes)))
        return super().forward(volumes)


def watched():
    torch.manual_seed(0)
    network = Watched(2, SHAPE)
    Watched.passes.clear()
    return network


# -------------------------------------------------------------------------------------------- fit


def test_the_loss_falls():
    volumes, sex = toy(24)
    network = make()
    history = fit(network, *toy(24), validation=toy(10, seed=1), **FAST | {"epochs": 8}).epochs
    assert history.columns.tolist() == [
        "epoch",
        "train_loss",
        "train_accuracy",
        "validation_loss",
        "validation_accuracy",
    ]
    assert history["epoch"].tolist() == [1, 2, 3, 4, 5, 6, 7, 8]
    assert 0.4 < history["train_loss"][0] < 1.2  # about log 2, before anything is learnt
    assert history["train_loss"][7] < 0.5 * history["train_loss"][0]
    assert history["validation_accuracy"][7] == 1
    assert not network.training
    assert (predict(network, volumes).argmax(1) == sex).all()


def test_fit_is_adam_on_cross_entropy():
    """The same losses as a loop written out, where one batch is everybody and nothing is drawn."""
    volumes, sex = toy(6)
    network = make(dropout=0.0)
    plain = copy.deepcopy(network)
    options = {"lr": 2e-3, "precision": torch.float32, "progress": False}
    found = fit(network, volumes, sex, validation=(volumes, sex), epochs=4, **options).epochs
    adam = torch.optim.Adam(plain.parameters(), lr=2e-3)
    images, labels = torch.from_numpy(volumes)[:, None], torch.from_numpy(sex)
    for epoch in range(4):
        logits = plain.train()(images)
        loss = -logits.log_softmax(1)[torch.arange(6), labels].mean()
        adam.zero_grad()
        loss.backward()
        adam.step()
        assert found["train_loss"][epoch] == pytest.approx(loss.item(), rel=1e-3)
        assert found["train_accuracy"][epoch] == (logits.argmax(1) == labels).float().mean()
        with torch.no_grad():
            after = plain.eval()(images)
        loss = -after.log_softmax(1)[torch.arange(6), labels].mean()
        assert found["validation_loss"][epoch] == pytest.approx(loss.item(), rel=1e-2)
        assert found["validation_accuracy"][epoch] == (after.argmax(1) == labels).float().mean()


def test_the_same_seed_gives_the_same_bits(tmp_path):
    volumes, sex = toy()
    np.save(tmp_path / "v.npy", volumes)
    mapped = np.load(tmp_path / "v.npy", mmap_mode="r")
    one, two, three = make(), make(), make()
    first = fit(one, volumes, sex, seed=1, **FAST)
    torch.manual_seed(99)  # the caller's own draws play no part, and are not disturbed
    state = torch.get_rng_state()
    second = fit(two, mapped, sex.tolist(), seed=1, **FAST)
    assert torch.equal(torch.get_rng_state(), state)
    third = fit(three, volumes, sex, seed=2, **FAST)
    assert same(one.state_dict(), two.state_dict())
    pd.testing.assert_frame_equal(first.epochs, second.epochs, check_exact=True)
    assert not same(one.state_dict(), three.state_dict())
    assert not first.epochs.equals(third.epochs)


def test_validation_is_one_pass_an_epoch_without_gradients_and_changes_nothing():
    volumes, sex = toy()
    network, alone = watched(), make()
    fit(network, volumes, sex, validation=toy(4, seed=1), **FAST)
    train = [(True, True, 4)] * 3  # 12 in batches of at most 5
    evaluate = [(False, False, 2)] * 2
    assert network.passes == (train + evaluate) * 3
    fit(alone, volumes, sex, **FAST)
    assert same(network.state_dict(), alone.state_dict())


def test_an_epoch_takes_everybody_once_in_batches_of_equal_size(monkeypatch):
    volumes, sex = toy(11)
    seen, batch = [], networks.batch
    monkeypatch.setattr(
        networks, "batch", lambda v, rows, device: seen.append(rows) or batch(v, rows, device)
    )
    fit(make(), volumes, sex, **FAST | {"epochs": 2, "batch_size": 4})
    assert [len(rows) for rows in seen] == [4, 4, 3, 4, 4, 3]
    first, second = np.concatenate(seen[:3]).tolist(), np.concatenate(seen[3:]).tolist()
    assert sorted(first) == sorted(second) == list(range(11))
    assert first != second


def test_the_rate_falls_after_each_milestone(monkeypatch):
    rates, step = [], torch.optim.Adam.step

    def noting(self, *arguments, **options):
        rates.append(self.param_groups[0]["lr"])
        return step(self, *arguments, **options)

    monkeypatch.setattr(torch.optim.Adam, "step", noting)
    fit(make(), *toy(4), **FAST | {"epochs": 5, "lr": 0.5}, milestones=(2, 4))
    np.testing.assert_allclose(rates, [0.5, 0.5, 0.05, 0.05, 0.005])


@pytest.mark.parametrize("epoch", [1, 3])
def test_a_run_killed_in_the_middle_of_an_epoch_goes_on_to_the_same_bits(
    tmp_path, monkeypatch, epoch
):
    options = FAST | {"epochs": 4, "milestones": (2,), "validation": toy(4, seed=1)}
    whole, killed, resumed = make(), make(), make()
    expected = fit(whole, *toy(), **options)
    step, steps = torch.optim.Adam.step, []

    def dying(self, *arguments, **others):
        if len(steps) == 3 * epoch + 1:  # three batches an epoch
            raise KeyboardInterrupt
        steps.append(1)
        return step(self, *arguments, **others)

    file = tmp_path / "run" / "fit.checkpoint"
    with monkeypatch.context() as patch:
        patch.setattr(torch.optim.Adam, "step", dying)
        with pytest.raises(KeyboardInterrupt):
            fit(killed, *toy(), checkpoint=file, **options)
    passes = []
    resumed.register_forward_hook(lambda *_: passes.append(1))
    found = fit(resumed, *toy(), checkpoint=file, **options)
    assert len(passes) == (4 - epoch) * (3 + 2)  # of two volumes each in the validation
    assert same(resumed.state_dict(), whole.state_dict())
    pd.testing.assert_frame_equal(found.epochs, expected.epochs, check_exact=True)
    again = make(seed=5)
    found = fit(again, *toy(), checkpoint=file, **options)  # complete: nothing is left to do
    assert same(again.state_dict(), whole.state_dict())
    pd.testing.assert_frame_equal(found.epochs, expected.epochs, check_exact=True)
    assert [path.name for path in file.parent.iterdir()] == ["fit.checkpoint"]


@pytest.mark.parametrize(
    "change",
    [
        {"epochs": 4},
        {"batch_size": 6},
        {"lr": 1e-3},
        {"milestones": (1,)},
        {"seed": 1},
        {"precision": torch.bfloat16},
        {"volumes": toy(11)[0], "sex": toy(11)[1]},
        {"sex": 1 - toy()[1]},
        {"network": MriNet3d(3, SHAPE)},
        {"network": MriNet3d(2, SHAPE, dropout=0.1)},
    ],
    ids=lambda change: "-".join(change),
)
def test_a_checkpoint_of_another_call_is_refused(tmp_path, change):
    volumes, sex = toy()
    call = {"network": make(), "volumes": volumes, "sex": sex} | FAST
    call |= {"checkpoint": tmp_path / "fit.checkpoint"}
    fit(**call)
    with pytest.raises(ValueError, match=r"fit\.checkpoint is of another call\. Delete it"):
        fit(**call | {"network": make()} | change)


def test_a_checkpoint_that_is_a_pickle_is_not_executed(tmp_path, capsys):
    class Hostile:
        def __reduce__(self):
            return print, ("executed",)

    torch.save({"call": Hostile()}, tmp_path / "fit.checkpoint")
    with pytest.raises(Exception, match="weights_only"):
        fit(make(), *toy(), checkpoint=tmp_path / "fit.checkpoint", **FAST)
    assert "executed" not in capsys.readouterr().out


def test_bfloat16_is_within_noise_of_float32():
    options = FAST | {"epochs": 6, "validation": toy(10, seed=1)}
    single, half = make(), make()
    one = fit(single, *toy(24), **options).epochs
    other = fit(half, *toy(24), **options | {"precision": torch.bfloat16}).epochs
    assert not one.equals(other)
    assert all(value.dtype != torch.bfloat16 for value in half.state_dict().values())
    np.testing.assert_allclose(other["train_loss"], one["train_loss"], atol=0.05)
    volumes, _ = toy(10, seed=1)
    np.testing.assert_allclose(predict(half, volumes), predict(single, volumes), atol=0.1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sex": [0, 1]}, "as many labels 0 or 1: found 12 and 2"),
        ({"volumes": np.zeros((0, *SHAPE)), "sex": []}, "found 0 and 0"),
        ({"sex": np.arange(12) % 3}, r"found 12 and 12, which are \[0 1 2\]"),
        ({"sex": np.full(12, np.nan)}, r"which are \[nan\]"),
        ({"validation": (np.zeros((0, *SHAPE)), [])}, "found 0 and 0"),
        ({"validation": (np.zeros((1, *SHAPE)), [2])}, r"found 1 and 1, which are \[2\]"),
        ({"volumes": np.zeros((12, 26, 22, 24))}, "expected volumes"),
    ],
)
def test_fit_refuses(change, message):
    volumes, sex = toy()
    with pytest.raises(ValueError, match=message):
        fit(**{"network": make(), "volumes": volumes, "sex": sex} | FAST | change)


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path):
    volumes, sex = toy()
    volumes[3, 5, 5, 5] = np.nan
    with pytest.raises(FloatingPointError, match="epoch 1: the loss is not finite"):
        fit(make(), volumes, sex, checkpoint=tmp_path / "fit.checkpoint", **FAST)
    assert not list(tmp_path.iterdir())


# ---------------------------------------------------------------------------------------- predict


def test_probabilities():
    network, (volumes, sex) = make(), toy()
    fit(network, volumes, sex, **FAST)
    found = predict(network, volumes)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found.sum(1), 1, atol=1e-6)
    with torch.no_grad():
        logits = copy.deepcopy(network).double().eval()(torch.from_numpy(volumes)[:, None].double())
    logits = logits.numpy()
    expected = 1 / (1 + np.exp(logits[:, 0] - logits[:, 1]))
    assert expected.std() > 1e-3
    np.testing.assert_allclose(found[:, 1], expected, atol=1e-6)


def test_the_same_bits_whatever_the_company_and_the_threads():
    network, (volumes, _) = make(), toy()
    together = predict(network, volumes)
    np.testing.assert_array_equal(
        np.concatenate([predict(network, volumes[n : n + 1]) for n in range(12)]), together
    )
    np.testing.assert_array_equal(predict(network, volumes[::-1]), together[::-1])
    np.testing.assert_array_equal(predict(network, volumes[[7, 7, 2]]), together[[7, 7, 2]])
    for count in (2, 3):
        torch.set_num_threads(count)
        np.testing.assert_array_equal(predict(network, volumes), together)


@pytest.mark.parametrize("mode", [True, False])
def test_predict_puts_the_mode_back(mode):
    network, (volumes, _) = watched().train(mode), toy(3)
    predict(network, volumes)
    assert network.training == mode
    assert network.passes == [(False, False, 2)] * 2
    with pytest.raises(ValueError, match="expected volumes"):
        predict(network, volumes[:, :-1])
    assert network.training == mode


def test_predict_refuses_what_has_no_probability():
    network, (volumes, _) = make(), toy(4)
    volumes[2, 5, 5, 5] = np.nan
    with pytest.raises(ValueError, match=r"volumes \[2\]: no finite probability"):
        predict(network, volumes)
    with pytest.raises(ValueError, match="found none"):
        predict(network, volumes[:0])


# --------------------------------------------------------------------------------- cross_validate

CV = {"folds": 3, "epochs": 2, "batch_size": 8, "lr": 3e-3, "precision": torch.float32}


def make_network():
    return MriNet3d(2, SHAPE)


def people(folder, count=18, groups=None):
    """A cohort of the toy's volumes, memory-mapped."""
    folder.mkdir(exist_ok=True)
    volumes, sex = toy(count)
    np.save(folder / "tensors.npy", volumes)
    np.save(folder / "labels.npy", sex)
    subjects = [f"{n:06d}" for n in range(count)]
    table = pd.DataFrame({"Subject": subjects, "label": sex})
    if groups is not None:
        table["group"] = groups
    table.to_csv(folder / "subjects.csv", index=False)
    return cohort.load(folder)


@pytest.fixture
def alone(monkeypatch):
    """One fold after the other, in this process."""
    monkeypatch.setattr(training.joblib, "cpu_count", lambda: 1)


@pytest.fixture
def fitted(monkeypatch):
    """What each call of `fit` was given: numbers of training and of validation subjects."""
    calls = []

    def noting(network, volumes, sex, **options):
        calls.append((numbers(volumes), numbers(options["validation"][0]), options))
        return fit(network, volumes, sex, **options)

    monkeypatch.setattr(training, "fit", noting)
    return calls


def test_each_subject_is_tested_once_by_a_network_that_did_not_see_it(tmp_path, alone, fitted):
    data, out = people(tmp_path / "c"), tmp_path / "out"
    state = torch.get_rng_state()
    found = cross_validate(data, make_network, out=out, seed=4, **CV)
    assert torch.equal(torch.get_rng_state(), state)
    assert found.columns.tolist() == ["Subject", "fold", "sex", "probability"]
    assert found["Subject"].tolist() == data.subjects.tolist()
    assert found["sex"].tolist() == data.sex.tolist()
    expected = evaluation.folds(data.sex, folds=3, seed=4)
    assert found["fold"].tolist() == expected.tolist()
    assert sorted(n for _, tested, _ in fitted for n in tested) == list(range(18))
    for fold, (seen, tested, _) in enumerate(fitted):
        assert tested == np.flatnonzero(expected == fold).tolist()
        assert sorted(seen + tested) == list(range(18))
        network = networks.load(out / f"fold-{fold}.pt", SHAPE)
        probabilities = predict(network, data.volumes[tested])[:, 1]
        np.testing.assert_array_equal(found["probability"][tested], probabilities)
    table = pd.read_csv(out / "folds.csv", dtype={"Subject": str})
    assert table["Subject"].tolist() == data.subjects.tolist()
    assert table["fold"].tolist() == expected.tolist()
    history = pd.DataFrame(found.attrs["history"])
    assert list(zip(history["fold"], history["epoch"])) == [
        (fold, epoch) for fold in range(3) for epoch in (1, 2)
    ]
    files = {f"fold-{fold}.{end}" for fold in range(3) for end in ("pt", "json")}
    assert {path.name for path in out.iterdir()} == files | {"folds.csv", "run.json", ".lock"}
    settings = json.loads((out / "run.json").read_text())["train"]
    assert (settings["epochs"], settings["seed"], settings["milestones"]) == ("2", "4", "(5, 15)")


def test_folds_start_from_different_weights_and_keep_the_study_s_milestones(
    tmp_path, alone, monkeypatch
):
    starts = []

    def noting(network, *arguments, **options):
        starts.append((network.linear.weight.detach().clone(), options))
        return fit(network, *arguments, **options)

    monkeypatch.setattr(training, "fit", noting)
    cross_validate(people(tmp_path / "c", 6), make_network, **CV | {"epochs": 1, "folds": 2})
    (one, options), (two, _) = starts
    assert not torch.equal(one, two)
    assert options["milestones"] == (5, 15)
    assert inspect.signature(cross_validate).parameters["milestones"].default == (5, 15)


def test_families_never_span_folds(tmp_path, alone, fitted):
    families = np.repeat([f"{n}_1" for n in range(9)], 2)
    data = people(tmp_path / "c", groups=families)
    cross_validate(data, make_network, **CV | {"epochs": 1})
    for seen, tested, _ in fitted:
        assert not set(families[seen]) & set(families[tested])


def test_finished_folds_are_kept_and_lost_ones_made_again(tmp_path, alone, fitted):
    data, out = people(tmp_path / "c"), tmp_path / "out"
    first = cross_validate(data, make_network, out=out, **CV)
    files = {path.name: path.read_bytes() for path in out.iterdir()}
    del fitted[:]
    again = cross_validate(data, make_network, out=out, **CV)
    assert not fitted
    pd.testing.assert_frame_equal(again, first, check_exact=True)
    assert again.attrs["history"] == first.attrs["history"]
    (out / "fold-1.pt").unlink()
    (out / "fold-2.json").unlink()
    (out / "folds.csv").unlink()
    again = cross_validate(data, make_network, out=out, **CV)
    assert len(fitted) == 2
    pd.testing.assert_frame_equal(again, first, check_exact=True)
    assert {path.name for path in out.iterdir()} == set(files)
    for name, content in files.items():
        if not name.endswith(".pt"):
            assert (out / name).read_bytes() == content


@pytest.mark.parametrize("change", ["lr", "seed", "network", "volume", "sex", "milestones"])
def test_other_settings_or_data_start_anew(tmp_path, alone, fitted, monkeypatch, change):
    options = CV | {"epochs": 1}
    data, out = people(tmp_path / "c"), tmp_path / "out"
    cross_validate(data, make_network, out=out, **options)
    network = make_network
    if change == "lr":
        options |= {"lr": 1e-3}
    elif change == "seed":
        options |= {"seed": 3}
    elif change == "milestones":
        options |= {"milestones": (1,)}
    elif change == "network":
        network = lambda: MriNet3d(3, SHAPE)  # noqa: E731
    elif change == "volume":
        volumes = np.load(tmp_path / "c" / "tensors.npy")
        volumes[13, 4, 5, 6] += 0.1
        np.save(tmp_path / "c" / "tensors.npy", volumes)
    elif change == "sex":
        (tmp_path / "c" / "subjects.csv").unlink()
        np.save(tmp_path / "c" / "labels.npy", 1 - data.sex)
    del fitted[:]

    def dying(*arguments, **others):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(training, "fit", dying)
        with pytest.raises(KeyboardInterrupt):
            cross_validate(cohort.load(tmp_path / "c"), network, out=out, **options)
    names = {path.name for path in out.iterdir()}
    assert names == {"folds.csv", "run.json", ".lock"}  # no network of other folds
    cross_validate(cohort.load(tmp_path / "c"), network, out=out, **options)
    assert len(fitted) == 3


def test_a_cross_validation_killed_within_a_fold_goes_on_to_the_same_bits(
    tmp_path, alone, monkeypatch
):
    data = people(tmp_path / "c")
    expected = cross_validate(data, make_network, out=tmp_path / "whole", **CV)
    epochs, train = [], training._epoch

    def dying(*arguments):
        if len(epochs) == 3:
            raise KeyboardInterrupt
        epochs.append(1)
        return train(*arguments)

    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(training, "_epoch", dying)
        with pytest.raises(KeyboardInterrupt):
            cross_validate(data, make_network, out=out, **CV)
    assert len(list(out.glob(".*.checkpoint"))) == 1
    monkeypatch.setattr(training, "_epoch", lambda *a: epochs.append(1) or train(*a))
    found = cross_validate(data, make_network, out=out, **CV)
    assert len(epochs) == 6
    pd.testing.assert_frame_equal(found, expected, check_exact=True)
    assert {p.name for p in out.iterdir()} == {p.name for p in (tmp_path / "whole").iterdir()}
    for fold in range(3):
        one, other = (torch.load(p / f"fold-{fold}.pt") for p in (out, tmp_path / "whole"))
        assert same(one, other)
        record = json.loads((out / f"fold-{fold}.json").read_text())
        assert record == json.loads((tmp_path / "whole" / f"fold-{fold}.json").read_text())


def test_the_same_bits_in_several_processes(tmp_path, monkeypatch, alone):
    data = people(tmp_path / "c", 12)
    one = cross_validate(data, make_network, out=tmp_path / "one", **CV)
    monkeypatch.setattr(training.joblib, "cpu_count", lambda: 2)
    two = cross_validate(data, make_network, out=tmp_path / "two", **CV)
    pd.testing.assert_frame_equal(one, two, check_exact=True)
    for fold in range(3):
        first, second = (torch.load(tmp_path / n / f"fold-{fold}.pt") for n in ("one", "two"))
        assert same(first, second)


def test_hidden_layers_keep_their_names():
    """A state dict of the published architecture has these parts."""
    assert [name for name, _ in MriNet3d().named_children()] == [
        "hidden1",
        "hidden2",
        "hidden3",
        "dropout",
        "linear",
    ]
    kinds = [nn.Conv3d, nn.BatchNorm3d, nn.MaxPool3d, nn.ReLU]
    assert all(map(isinstance, MriNet3d().hidden2, kinds))


# -------------------------------------------------------------------------------- slabs, and folds


def make_flat(seed=0, **options):
    torch.manual_seed(seed)
    return MriNet2d(**{"depth": 5, "channels": 2, "shape": SHAPE} | options)


def make_flat_network():
    return MriNet2d(5, channels=2, shape=SHAPE)


@pytest.mark.parametrize("residual", [False, True])
def test_slabs_learn_and_their_subjects_are_told_apart(residual):
    (volumes, sex), validation = toy(24), toy(10, seed=1)
    network = make_flat(residual=residual)
    options = FAST | {"epochs": 8, "validation": validation}
    history = fit(network, volumes, sex, **options).epochs
    assert 0.4 < history["train_loss"][0] < 1.2
    assert history["train_loss"][7] < 0.5 * history["train_loss"][0]
    assert history["validation_accuracy"][7] == 1
    assert predict(network, volumes).shape == (24, 2)
    assert (predict(network, volumes).argmax(1) == sex).all()


def test_every_slab_is_fitted_with_its_subject_s_label():
    """The same losses as a loop written out, where one batch is everybody and nothing is drawn."""
    volumes, _ = toy(6)
    sex = np.array([0, 1, 1, 0, 0, 1])
    network = make_flat(dropout=0.0)
    plain = copy.deepcopy(network)
    options = {"lr": 2e-3, "precision": torch.float32, "progress": False}
    found = fit(network, volumes, sex, validation=(volumes, sex), epochs=3, **options).epochs
    adam = torch.optim.Adam(plain.parameters(), lr=2e-3)
    images = torch.from_numpy(volumes)[:, None]
    for epoch in range(3):
        logits = plain.train()(images)
        chances = logits.softmax(2)  # (6, 5, 2)
        loss = -sum(chances[n, s, sex[n]].log() for n in range(6) for s in range(5)) / 30
        adam.zero_grad()
        loss.backward()
        adam.step()
        right = (logits[..., 1] - logits[..., 0]).mean(1).detach().numpy() > 0
        assert found["train_loss"][epoch] == pytest.approx(loss.item(), rel=1e-3)
        assert found["train_accuracy"][epoch] == (right == sex).mean()
        with torch.no_grad():
            after = plain.eval()(images)
        loss = -sum(after.log_softmax(2)[n, :, sex[n]].sum() for n in range(6)) / 30
        right = (after[..., 1] - after[..., 0]).mean(1).numpy() > 0
        assert found["validation_loss"][epoch] == pytest.approx(loss.item(), rel=1e-2)
        assert found["validation_accuracy"][epoch] == (right == sex).mean()


class Told(nn.Linear):
    """Its slabs' logits stand in the volume."""

    def forward(self, volumes):
        return 20 * volumes[:, 0, :5, 3, :2]


def test_a_subject_s_probability_is_that_of_the_mean_log_odds_of_its_slabs():
    volumes, _ = toy()
    logits = 20 * volumes[:, :5, 3, :2].astype(float)
    odds = np.exp((logits[..., 1] - logits[..., 0]).sum(1) / 5)
    assert odds.min() < 0.5 < 2 < odds.max()
    found = predict(Told(1, 1), volumes)
    np.testing.assert_allclose(found[:, 1], odds / (1 + odds), atol=1e-6)
    np.testing.assert_allclose(found.sum(1), 1, atol=1e-6)


def test_bfloat16_of_slabs_is_within_noise_of_float32():
    options = FAST | {"epochs": 6, "validation": toy(10, seed=1)}
    single, half = make_flat(), make_flat()
    one = fit(single, *toy(24), **options).epochs
    other = fit(half, *toy(24), **options | {"precision": torch.bfloat16}).epochs
    assert not one.equals(other)
    np.testing.assert_allclose(other["train_loss"], one["train_loss"], atol=0.05)
    volumes, _ = toy(10, seed=1)
    np.testing.assert_allclose(predict(half, volumes), predict(single, volumes), atol=0.1)


def test_a_checkpoint_of_another_axis_is_refused(tmp_path):
    cube, sex = toy()[0][:, :, :22, :22], toy()[1]
    options = FAST | {"checkpoint": tmp_path / "fit.checkpoint"}
    fit(make_flat(shape=(22, 22, 22)), cube, sex, **options)
    with pytest.raises(ValueError, match="is of another call"):
        fit(make_flat(shape=(22, 22, 22), axis=0), cube, sex, **options)


def leaked(fold):
    """Subjects of whom some slab was trained on and some slab held out."""
    return {n for n, _ in fold["train"]} & {n for n, _ in fold["test"]}


def test_no_slab_of_a_test_subject_is_ever_trained_on(tmp_path, alone, monkeypatch):
    """Each slab carries its subject and its place; what the convolution sees is written down."""
    volumes, sex = toy()
    volumes[:, 0, :, 0] = np.arange(12)[:, None]
    volumes[:, 1, :, 0] = np.repeat(np.arange(6), 5)[:26]
    data = people(tmp_path / "c", 12, np.repeat(np.arange(6), 2))
    data = cohort.Cohort(**{**vars(data), "volumes": volumes})
    seen = []

    def noting(network, *arguments, **options):
        fold = {"train": [], "test": []}
        seen.append(fold)

        def note(module, inputs):
            part = fold["train" if module.training else "test"]
            part += [(int(slab[0, 0, 0]), int(slab[0, 1, 0])) for slab in inputs[0]]

        network.convolution.register_forward_pre_hook(note)
        return fit(network, *arguments, **options)

    monkeypatch.setattr(training, "fit", noting)
    cross_validate(data, make_flat_network, **CV | {"epochs": 1})
    assert len(seen) == 3
    everything = {(n, s) for n in range(12) for s in range(5)}
    for fold in seen:
        assert not leaked(fold)
        families = [{n // 2 for n, _ in fold[part]} for part in ("train", "test")]
        assert not families[0] & families[1]
        assert set(fold["train"]) | set(fold["test"]) == everything
    by_slab = evaluation.folds(np.repeat(sex, 5), folds=3)  # what it would be otherwise
    parts = [[] for _ in range(2)]
    for held_out, slab in zip(by_slab == 0, sorted(everything)):
        parts[int(held_out)].append(slab)
    assert leaked(dict(zip(("train", "test"), parts)))


def test_some_folds_now_and_the_others_later(tmp_path, alone, fitted):
    data, out = people(tmp_path / "c"), tmp_path / "out"
    whole = cross_validate(data, make_flat_network, out=tmp_path / "whole", **CV)
    del fitted[:]
    found = cross_validate(data, make_flat_network, out=out, only=[2], **CV)
    assert len(fitted) == 1
    expected = whole[whole["fold"] == 2].reset_index(drop=True)
    pd.testing.assert_frame_equal(found, expected, check_exact=True)
    assert found.attrs["history"] == [h for h in whole.attrs["history"] if h["fold"] == 2]
    assert {path.name for path in out.glob("fold-*")} == {"fold-2.pt", "fold-2.json"}
    again = cross_validate(data, make_flat_network, out=out, **CV)
    assert len(fitted) == 3
    pd.testing.assert_frame_equal(again, whole, check_exact=True)
    one, other = (torch.load(folder / "fold-2.pt") for folder in (out, tmp_path / "whole"))
    assert same(one, other)
    alone_in_memory = cross_validate(data, make_flat_network, only=[2], **CV)
    pd.testing.assert_frame_equal(alone_in_memory, expected, check_exact=True)


@pytest.mark.parametrize("only", [[3], [-1], [], [0, 7]])
def test_folds_that_there_are_not(tmp_path, only):
    with pytest.raises(ValueError, match="expected some of folds 0 to 2, found"):
        cross_validate(people(tmp_path / "c"), make_flat_network, only=only, out=tmp_path, **CV)
    assert not (tmp_path / "run.json").exists()


def test_confounds_are_regressed_out_inside_the_training_folds(tmp_path, alone, monkeypatch):
    """What `fit` gets, against least squares on the training rows by numpy."""
    data = people(tmp_path / "cohort", 12)
    size = np.random.default_rng(0).normal(1500, 100, 12)
    assignment, out, seen = np.arange(12) % 3, tmp_path / "out", []

    def noting(network, volumes, sex, **options):
        seen.append((volumes[np.arange(8)], options["validation"][0][np.arange(4)]))
        return fit(network, volumes, sex, **options)

    monkeypatch.setattr(training, "fit", noting)
    options = CV | {"assignment": assignment, "out": out, "only": [1], "epochs": 1}
    cross_validate(data, make_network, confounds=size[:, None], **options)
    train = assignment != 1
    design = np.column_stack([np.ones(12), size - size[train].mean()])
    flat = np.asarray(data.volumes, float).reshape(12, -1)
    slope = np.linalg.lstsq(design[train], flat[train], rcond=None)[0][1]
    expected = (flat - design[:, 1:] * slope).reshape(data.volumes.shape)
    ((trained_on, held_out),) = seen
    np.testing.assert_allclose(trained_on, expected[train], atol=1e-4)
    np.testing.assert_allclose(held_out, expected[~train], atol=1e-4)
    before = (out / "fold-1.pt").stat().st_mtime_ns
    cross_validate(data, make_network, confounds=size[::-1, None], **options)
    assert (out / "fold-1.pt").stat().st_mtime_ns > before  # other volumes: nothing is kept


def test_folds_of_ones_own(tmp_path, alone):
    data = people(tmp_path / "cohort", 12)
    assignment, options = np.repeat([2, 0, 1], 4), CV | {"epochs": 1}
    found = cross_validate(
        data, make_network, assignment=assignment, out=tmp_path / "out", **options
    )
    assert found["fold"].tolist() == assignment.tolist()
    assert len(list((tmp_path / "out").glob("fold-*.pt"))) == 3
