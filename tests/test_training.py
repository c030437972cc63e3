"""Fitting, prediction and cross-validation: the same bits whatever happens on the way."""

import copy
import json
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.linear_model import LinearRegression
from torch import nn

from brainsex import cohort, evaluation, networks, perturbation, speed, training
from brainsex.networks import MriNet2d, MriNet3d
from brainsex.training import cross_validate, fit, predict
from tests.conftest import write_cohort

SHAPE = (22, 26, 24)
FAST = {"epochs": 3, "batch_size": 5, "lr": 3e-3, "precision": torch.float32, "progress": False}

pytestmark = pytest.mark.usefixtures("one_cpu_thread")


def toy(count: int = 12, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Noise, in men brighter in half of the brain; a corner voxel holds the subject's number."""
    sex = np.arange(count) % 2
    volumes = np.random.default_rng(seed).uniform(0, 0.4, (count, *SHAPE)).astype(np.float32)
    volumes[sex == 1, :11] += 0.3
    volumes[:, 0, 0, 0] = np.arange(count)
    return volumes, sex


def numbers(volumes: np.ndarray) -> list[int]:
    return volumes[np.arange(len(volumes))][:, 0, 0, 0].astype(int).tolist()


def make_3d(seed: int = 0, **options) -> MriNet3d:
    torch.manual_seed(seed)
    return MriNet3d(2, SHAPE, **options)


def make_2d(seed: int = 0, **options) -> MriNet2d:
    torch.manual_seed(seed)
    return MriNet2d(5, channels=2, shape=SHAPE, **options)


def same_bits(state: dict, other: dict) -> bool:
    pairs = zip(state.items(), other.items(), strict=True)
    return all(a == b and torch.equal(x, y) for (a, x), (b, y) in pairs)


@pytest.mark.parametrize("make", [make_3d, make_2d, partial(make_2d, residual=True)])
def test_fit_is_adam_on_cross_entropy(make: Callable) -> None:
    """The losses of a loop written out, where a batch is everybody and nothing is drawn.

    A slab has its subject's label; a subject is classified by the mean of its slabs' log-odds.
    """
    volumes, sex = toy(6)[0], np.array([0, 1, 1, 0, 0, 1])
    network = make(dropout=0.0)
    plain = copy.deepcopy(network)
    adam = torch.optim.Adam(plain.parameters(), lr=2e-3)
    options = {"lr": 2e-3, "precision": torch.float32, "progress": False}
    history = fit(network, volumes, sex, validation=(volumes, sex), epochs=3, **options)

    def by_hand(logits: torch.Tensor) -> tuple[torch.Tensor, float]:
        log_odds = logits[..., 1] - logits[..., 0]  # (6,) or (6, S)
        signs = torch.from_numpy(1 - 2 * sex).reshape(6, *[1] * (log_odds.ndim - 1))
        right = log_odds.reshape(6, -1).mean(1).detach().numpy() > 0
        return (1 + (signs * log_odds).exp()).log().mean(), np.mean(right == sex)

    for epoch in range(3):
        loss, accuracy = by_hand(plain.train()(torch.from_numpy(volumes)[:, None]))
        adam.zero_grad()
        loss.backward()
        adam.step()
        assert history["train_loss"][epoch] == pytest.approx(loss.item(), rel=1e-3)
        assert history["train_accuracy"][epoch] == accuracy
        loss, accuracy = by_hand(plain.eval()(torch.from_numpy(volumes)[:, None]))
        assert history["validation_loss"][epoch] == pytest.approx(loss.item(), rel=1e-2)
        assert history["validation_accuracy"][epoch] == accuracy


def test_the_same_seed_gives_the_same_bits_with_and_without_validation(tmp_path) -> None:
    volumes, sex = toy()
    np.save(tmp_path / "v.npy", volumes)
    mapped = np.load(tmp_path / "v.npy", mmap_mode="r")
    first, second = make_3d(), make_3d()
    curves = fit(first, volumes, sex, seed=1, **FAST)
    torch.manual_seed(99)  # the caller's own draws play no part, and are not disturbed
    state = torch.get_rng_state()
    validated = fit(second, mapped, sex.tolist(), seed=1, validation=toy(4, seed=1), **FAST)
    assert torch.equal(torch.get_rng_state(), state)
    assert same_bits(first.state_dict(), second.state_dict())
    pd.testing.assert_frame_equal(curves, validated[curves.columns], check_exact=True)


def test_an_epoch_takes_everybody_once_in_batches_of_equal_size(monkeypatch) -> None:
    batches, read_batch = [], speed.read_batch

    def recorded(volumes: np.ndarray, rows: np.ndarray, device: torch.device) -> torch.Tensor:
        batches.append(rows)
        return read_batch(volumes, rows, device)

    monkeypatch.setattr(speed, "read_batch", recorded)
    fit(make_3d(), *toy(11), **FAST | {"epochs": 2, "batch_size": 4})
    batches = batches[11:]  # after each volume's moments
    assert [len(rows) for rows in batches] == [4, 4, 3, 4, 4, 3]
    first, second = np.concatenate(batches[:3]).tolist(), np.concatenate(batches[3:]).tolist()
    assert sorted(first) == sorted(second) == list(range(11))
    assert first != second


def test_the_rate_falls_after_each_milestone(monkeypatch) -> None:
    rates, step = [], torch.optim.AdamW.step

    def recorded(self: torch.optim.AdamW, *arguments: object, **options: object) -> object:
        rates.append(self.param_groups[0]["lr"])
        return step(self, *arguments, **options)

    monkeypatch.setattr(torch.optim.AdamW, "step", recorded)
    fit(make_3d(), *toy(4), **FAST | {"epochs": 5, "lr": 0.5}, milestones=(2, 4))
    np.testing.assert_allclose(rates, [0.5, 0.5, 0.05, 0.05, 0.005])


def test_the_neutral_layer_is_the_minimum_of_its_regression_and_makes_a_blur_neutral() -> None:
    """Newton's method by hand in float64, on features of the plain network; a blur says nothing."""
    volumes, sex = toy(16)
    network, plain = make_3d(), make_3d()
    fit(plain, volumes, sex, **FAST)
    fit(network, volumes, sex, neutral=True, **FAST)
    assert same_bits(network.hidden3.state_dict(), plain.hidden3.state_dict())
    blurred = perturbation.BlurredVolumes(volumes)[np.arange(16)]
    samples = [volumes, blurred, blurred]
    samples += [perturbation.BlurredVolumes(volumes, seed=n)[np.arange(16)] for n in range(2)]
    with torch.no_grad():
        images = torch.from_numpy(np.concatenate(samples))[:, None]
        features = plain.hidden3(plain.hidden2(plain.hidden1(images))).flatten(1).numpy()
    x = (features - features[:16].mean(0)) / features[:16].std(0).clip(1e-3)
    x = np.column_stack([x, np.ones(len(x))]).astype(float)
    y = np.concatenate([sex, 1 - sex, sex, sex, sex])
    weight, beta = np.repeat([1, 0.5, 0.5, 1, 1], 16), np.zeros(x.shape[1])
    effect = x[:16][sex == 1].mean(0) - x[:16][sex == 0].mean(0)
    effect = effect[:-1] ** 2 / np.sqrt((effect[:-1] ** 4).mean())
    penalty = 100 / np.maximum(effect, 1e-9) ** 2  # 1 / C, less where the sexes differ
    ridge = np.diag([*penalty, 0])  # the constant without a penalty
    for _ in range(30):
        p = 1 / (1 + np.exp(-x @ beta))
        slope = x.T @ (weight * (p - y)) + ridge @ beta
        beta -= np.linalg.solve((x.T * (weight * p * (1 - p))) @ x + ridge, slope)
    log_odds = np.diff(np.log(predict(network, volumes)), axis=1)[:, 0]
    np.testing.assert_allclose(log_odds, x[:16] @ beta, atol=0.02)
    assert (log_odds > 0).tolist() == sex.tolist()
    assert np.abs(predict(network, blurred)[:, 1] - 0.5).mean() < 0.1


def test_fit_takes_the_machines_precision(precision: torch.dtype) -> None:
    chosen, named = make_3d(), make_3d()
    fit(chosen, *toy(), **FAST | {"precision": None})
    fit(named, *toy(), **FAST | {"precision": precision})
    assert same_bits(chosen.state_dict(), named.state_dict())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sex": [0, 1]}, "as many labels 0 or 1: found 12 and 2"),
        ({"sex": np.arange(12) % 3}, r"found 12 and 12, which are \[0 1 2\]"),
        ({"validation": (np.zeros((1, *SHAPE)), [2])}, r"found 1 and 1, which are \[2\]"),
        ({"volumes": np.zeros((12, 26, 22, 24))}, "expected volumes"),
    ],
)
def test_fit_refuses(change: dict, message: str) -> None:
    volumes, sex = toy()
    with pytest.raises(ValueError, match=message):
        fit(**{"network": make_3d(), "volumes": volumes, "sex": sex} | FAST | change)


def test_probabilities_are_those_of_the_mean_log_odds() -> None:
    """Against the plain networks in float64."""
    volumes, sex = toy()
    for network in (make_3d(), make_2d()):
        fit(network, volumes, sex, **FAST)
        probabilities = predict(network, volumes)
        assert probabilities.dtype == np.float32
        np.testing.assert_allclose(probabilities.sum(1), 1, atol=1e-6)
        with torch.no_grad():
            exact = copy.deepcopy(network).double().eval()
            logits = exact(torch.from_numpy(volumes)[:, None].double()).numpy()
        odds = np.exp((logits[..., 1] - logits[..., 0]).reshape(12, -1).mean(1))
        assert np.std(odds) > 1e-4
        np.testing.assert_allclose(probabilities[:, 1], odds / (1 + odds), atol=1e-6)


def test_the_same_bits_whatever_the_company_and_the_threads() -> None:
    network, (volumes, _) = make_3d(), toy()
    together = predict(network, volumes)
    alone = np.concatenate([predict(network, volumes[n : n + 1]) for n in range(12)])
    np.testing.assert_array_equal(alone, together)
    np.testing.assert_array_equal(predict(network, volumes[[7, 7, 2]]), together[[7, 7, 2]])
    torch.set_num_threads(3)
    np.testing.assert_array_equal(predict(network, volumes[::-1]), together[::-1])


def test_what_is_not_finite_is_refused() -> None:
    network, (volumes, _) = make_3d().train(), toy(4)
    volumes[2, 5, 5, 5] = np.nan
    with pytest.raises(FloatingPointError, match="epoch 1: the loss is not finite"):
        fit(make_3d(), volumes, [0, 1, 0, 1], **FAST)
    cases = [(volumes, r"volumes \[2\]: no finite probability")]
    for array, message in [*cases, (volumes[:, :-1], "expected volumes")]:
        with pytest.raises(ValueError, match=message):
            predict(network, array)
    assert predict(network, volumes[:0]).shape == (0, 2)
    assert network.training


CV = {"folds": 3, "epochs": 1, "batch_size": 8, "lr": 3e-3, "precision": torch.float32}


network_3d = partial(MriNet3d, 2, SHAPE)
network_2d = partial(MriNet2d, 5, channels=2, shape=SHAPE)


def make_cohort(folder: Path, **columns: np.ndarray) -> cohort.Cohort:
    """A cohort of the toy's volumes, memory-mapped."""
    return cohort.load(write_cohort(folder, *toy(), **columns))


@pytest.fixture
def fits(in_process, monkeypatch) -> list[dict]:
    """What each call of `fit` gets: subjects' numbers, options, and the weights it starts from."""
    calls = []

    def recorded(network: nn.Module, volumes: object, sex: object, **options: object) -> object:
        train, test = numbers(volumes), numbers((options["validation"] or (volumes,))[0])
        start = network.linear.weight.detach().clone()
        calls.append({"train": train, "test": test, "start": start, **options})
        return fit(network, volumes, sex, **options)

    monkeypatch.setattr(training, "fit", recorded)
    return calls


def test_each_subject_is_tested_once_by_a_network_that_did_not_see_it(tmp_path, fits) -> None:
    out, state, families = tmp_path / "out", torch.get_rng_state(), np.repeat(np.arange(6), 2)
    data = make_cohort(tmp_path / "c", group=families)
    predictions = cross_validate(data, network_3d, out=out, seed=4, **CV | {"epochs": 2})
    assert torch.equal(torch.get_rng_state(), state)
    assert predictions.columns.tolist() == ["Subject", "fold", "sex", "probability"]
    expected = evaluation.folds(data.sex, groups=families, folds=3, seed=4)
    for table in (predictions, pd.read_csv(out / "folds.csv", dtype={"Subject": str})):
        assert table["Subject"].tolist() == data.subjects.tolist()
        assert table["fold"].tolist() == expected.tolist()
    assert predictions["sex"].tolist() == data.sex.tolist()
    for fold, call in enumerate(fits):
        assert call["test"] == np.flatnonzero(expected == fold).tolist()
        assert sorted(call["train"] + call["test"]) == list(range(12))
        assert not set(families[call["train"]]) & set(families[call["test"]])
        network = networks.load(out / f"fold-{fold}.pt", SHAPE)
        probabilities = predict(network, data.volumes[call["test"]])[:, 1]
        np.testing.assert_array_equal(predictions["probability"][call["test"]], probabilities)
    history = pd.DataFrame(predictions.attrs["history"])
    epochs = [(fold, epoch) for fold in range(3) for epoch in (1, 2)]
    assert list(zip(history["fold"], history["epoch"])) == epochs
    files = {f"fold-{fold}.{end}" for fold in range(3) for end in ("pt", "json")}
    assert {path.name for path in out.iterdir()} == files | {"folds.csv", "run.json"}
    settings = json.loads((out / "run.json").read_text())["train"]
    assert (settings["epochs"], settings["seed"], settings["milestones"]) == (2, 4, [5, 15])
    assert not torch.equal(fits[0]["start"], fits[1]["start"])


@pytest.mark.parametrize("change", ["lr", "network", "volume", "confounds"])
def test_other_settings_or_data_are_refused_or_start_anew(tmp_path, fits, change: str) -> None:
    call = {"cohort": make_cohort(tmp_path / "c"), "make_network": network_3d} | CV
    call |= {"out": tmp_path / "out", "confounds": np.arange(12.0)[:, None]}
    cross_validate(**call)
    volumes = np.array(call["cohort"].volumes)
    volumes[7, 8, 8, 16] += 0.1  # one of the voxels that a digest takes
    other = {
        "lr": {"lr": 1e-3},
        "network": {"make_network": lambda: MriNet3d(3, SHAPE)},
        "volume": {"cohort": replace(call["cohort"], volumes=volumes)},
        "confounds": {"confounds": np.arange(12.0)[::-1, None]},
    }[change]
    before = {path.name: path.read_bytes() for path in call["out"].iterdir()}
    fits.clear()
    with pytest.raises(ValueError, match="expected results of train with"):
        cross_validate(**call | other)
    assert {path.name: path.read_bytes() for path in call["out"].iterdir()} == before
    cross_validate(**call | other, overwrite=True, only=[])
    assert {path.name for path in call["out"].iterdir()} == {"folds.csv", "run.json"}
    cross_validate(**call | other)
    assert len(fits) == 3


def test_finished_folds_are_kept_and_others_made_now_or_later(tmp_path, fits) -> None:
    data, out = make_cohort(tmp_path / "c"), tmp_path / "out"
    whole = cross_validate(data, network_2d, **CV)
    plain = cross_validate(data, network_2d, validation=None, **CV)
    assert (plain.equals(whole), "validation_loss" in plain.attrs["history"][0]) == (True, False)
    none = cross_validate(data, network_2d, out=out, only=[], **CV)
    assert (list(none), len(none), none.attrs["history"]) == (list(whole), 0, [])
    share = cross_validate(data, network_2d, out=out, only=[2], **CV)
    expected = whole[whole["fold"] == 2].reset_index(drop=True)
    pd.testing.assert_frame_equal(share, expected, check_exact=True)
    assert share.attrs["history"] == [h for h in whole.attrs["history"] if h["fold"] == 2]
    assert {path.name for path in out.glob("fold-*")} == {"fold-2.pt", "fold-2.json"}
    for lost, made in (([], 2), ([], 0), (["fold-1.pt", "fold-2.json", "folds.csv"], 2)):
        for name in lost:
            (out / name).unlink()
        fits.clear()
        again = cross_validate(data, network_2d, out=out, **CV)
        assert len(fits) == made
        pd.testing.assert_frame_equal(again, whole, check_exact=True)
        assert again.attrs["history"] == whole.attrs["history"]
    with pytest.raises(ValueError, match="expected volumes, and as many labels"):
        cross_validate(data, network_2d, only=[3], **CV)


def test_confounds_are_regressed_out_in_the_training_folds(tmp_path, in_process, monkeypatch):
    data, rows, seen = make_cohort(tmp_path / "cohort"), np.arange(12), []
    size = np.random.default_rng(0).normal(1500, 100, (12, 1))

    def record(network: nn.Module, volumes: object, sex: object, **options: object) -> object:
        seen.extend([volumes[np.arange(8)], options["validation"][0][np.arange(4)]])
        return fit(network, volumes, sex, **options)

    monkeypatch.setattr(training, "fit", record)
    cross_validate(data, network_3d, confounds=size, **CV | {"assignment": rows % 3, "only": [1]})
    train = rows % 3 != 1
    slope = LinearRegression().fit(size[train], data.volumes[train].reshape(8, -1)).coef_
    expected = data.volumes - ((size - size[train].mean()) @ slope.T).reshape(data.volumes.shape)
    np.testing.assert_allclose(seen[0], expected[train], atol=1e-4)
    np.testing.assert_allclose(seen[1], expected[~train], atol=1e-4)
