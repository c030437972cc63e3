"""What slabs decide alone and together, and where they lie."""

import json
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

from brainsex import cohort, feature_figures, networks, slabs
from brainsex.networks import MriNet2d

SHAPE = (22, 27, 24)
AFFINE = np.array([[3.0, 0, 0, -90], [0, 3.1, 0, -126], [0, 0, 2.5, -72], [0, 0, 0, 1]])

pytestmark = pytest.mark.usefixtures("one_cpu_thread")


def make(seed=0, **options):
    torch.manual_seed(seed)
    made = MriNet2d(**{"depth": 5, "channels": 2, "shape": SHAPE} | options).eval()
    nn.init.normal_(made.linear.weight, std=2)
    return made


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"depth": 5, "axis": 1}, [-126 + 3.1 * m for m in (2, 7, 12, 17, 22)]),  # 2 layers unused
        ({"depth": 4, "axis": 1}, [-126 + 3.1 * m for m in (1.5, 5.5, 9.5, 13.5, 17.5, 21.5)]),
        ({"depth": 11, "axis": 0}, [-90 + 3 * m for m in (5, 16)]),
        ({"depth": 24, "axis": 2}, [-72 + 2.5 * 11.5]),
    ],
)
def test_centres_are_the_middle_layers_in_millimetres(options, expected):
    options |= {"shape": (22, 27, 24) if options["axis"] == 1 else (22, 26, 24)}
    np.testing.assert_allclose(slabs.centres(make(**options), AFFINE), expected)


def test_an_oblique_affine_is_taken_at_the_middle_of_the_slab():
    affine = AFFINE.copy()
    affine[1, 0] = 0.5
    found = slabs.centres(make(), affine)
    np.testing.assert_allclose(found, [-126 + 3.1 * m + 0.5 * 10.5 for m in (2, 7, 12, 17, 22)])


def test_centres_need_an_affine():
    with pytest.raises(ValueError, match=r"expected an affine \(4, 4\), found none"):
        slabs.centres(make(), None)


def test_the_majority_decides_and_the_mean_where_there_is_none():
    log_odds = np.array(
        [
            [1, 1, 1, -9],  # three of four are for man, the mean is not
            [-1, -1, -1, 9],
            [1, 1, -3, -3],  # two and two: the mean decides
            [3, 3, -1, -1],
            [0, 0, -1, 0],  # who is for neither does not vote
        ]
    )
    men = [slabs.scores(one[None], np.array([1]))["correct_vote"] for one in log_odds]
    assert men == [1, 0, 0, 1, 0]


def test_scores_counted_by_hand():
    log_odds = np.array([[1, 1, 1, -9], [-1, -1, -1, 9], [1, 1, -3, -3.0]])
    assert slabs.scores(log_odds, np.array([1, 1, 0])) == {
        "subjects": 3,
        "slabs": 12,
        "correct_slabs": 3 + 1 + 2,
        "correct_vote": 1 + 0 + 1,
        "correct_mean": 0 + 1 + 1,
        "correct_by_slab": [1, 1, 2, 2],
    }


def test_positions_pool_the_folds_test_subjects():
    table = pd.DataFrame(
        {
            "fold": [0, 0, 1, 1],
            "part": ["train", "test", "train", "test"],
            "subjects": [30, 10, 26, 14],
            "correct_by_slab": [[30, 30], [5, 10], [26, 26], [7, 14]],
        }
    )
    found = slabs.positions(table, np.array([-10.0, 20]))
    assert found["mm"].tolist() == [-10, 20]
    assert found["accuracy"].tolist() == [12 / 24, 1]
    z = 1.959964
    half = z / (24 + z**2) * np.sqrt(24 / 4 + z**2 / 4)  # Wilson, at one half
    np.testing.assert_allclose(found["low"], [0.5 - half, 24 / (24 + z**2)], atol=1e-6)
    np.testing.assert_allclose(found["high"], [0.5 + half, 1], atol=1e-6)


@pytest.fixture
def data():
    sex = np.arange(12) % 2
    volumes = np.random.default_rng(0).random((12, *SHAPE), np.float32)
    return cohort.Cohort(
        *("synthetic", True, volumes, sex, np.array([f"{n:06d}" for n in range(12)]), None, AFFINE),
        pd.DataFrame(),
    )


@pytest.fixture
def folder(tmp_path, data):
    """Two folds' networks, as `cross_validate` leaves them."""
    folds = pd.DataFrame({"Subject": data.subjects, "fold": [0, 0, 0, 0, 1] + [1] * 7})
    folds.to_csv(tmp_path / "folds.csv", index=False)
    for fold in (0, 1):
        torch.save(make(fold).state_dict(), tmp_path / f"fold-{fold}.pt")
    return tmp_path


def test_each_fold_is_scored_on_those_it_saw_and_those_it_did_not(data, folder):
    found = slabs.evaluate(data, folder)
    assert found["fold"].tolist() == [0, 0, 1, 1]
    assert found["part"].tolist() == ["train", "test"] * 2
    parts = [range(4, 12), range(4), range(4), range(4, 12)]
    for row, fold, rows in zip(found.itertuples(), (0, 0, 1, 1), map(list, parts)):
        with torch.no_grad():
            logits = make(fold).double()(torch.from_numpy(data.volumes[rows])[:, None].double())
        chance = logits.softmax(2)[..., 1].numpy()
        right = (chance > 0.5) == data.sex[rows][:, None]
        assert (row.subjects, row.slabs) == (len(rows), 5 * len(rows))
        assert row.correct_slabs == right.sum()
        assert row.correct_by_slab == right.sum(0).tolist()
        assert row.correct_vote == (right.sum(1) >= 3).sum()
        odds = np.log(chance / (1 - chance)).mean(1)
        assert row.correct_mean == ((odds > 0) == data.sex[rows]).sum()
    assert 0 < found["correct_slabs"].sum() < found["slabs"].sum()
    assert json.loads((folder / "slabs.json").read_text()) == found.to_dict("records")


def test_only_the_folds_asked_for(data, folder):
    (folder / "fold-0.pt").unlink()
    assert slabs.evaluate(data, folder, only=[1])["fold"].tolist() == [1, 1]
    with pytest.raises(FileNotFoundError, match=r"fold-0\.pt"):
        slabs.evaluate(data, folder)


def test_folds_of_other_subjects_or_none_are_refused(data, folder):
    others = replace(data, subjects=data.subjects[::-1])
    with pytest.raises(ValueError, match=r"folds\.csv: expected the subjects of synthetic"):
        slabs.evaluate(others, folder)
    (folder / "folds.csv").unlink()
    with pytest.raises(FileNotFoundError, match="03_cnn_2d"):
        slabs.evaluate(data, folder)


def test_a_3d_network_has_no_slabs(data, folder):
    torch.save(networks.MriNet3d(2, SHAPE).state_dict(), folder / "fold-0.pt")
    with pytest.raises(ValueError, match="expected a MriNet2d"):
        slabs.evaluate(data, folder)


def test_positions_are_drawn_under_the_anatomy():
    background = np.zeros(SHAPE)
    background[5:17, 5:22, 5:19] = 0.5
    middles = slabs.centres(make(), AFFINE)
    columns = {"mm": middles, "accuracy": np.linspace(0.5, 0.9, 5)}
    table = pd.DataFrame(columns).assign(low=0.4, high=0.95)
    forms = {"plain": table, "residual": table.assign(accuracy=0.7)}
    figure = feature_figures.slab_positions(
        background, AFFINE, {"slabs of 5": forms}, title="T", cohort="C, n=12"
    )
    above, below = figure.axes
    edges = sorted({round(line.get_xdata()[0], 6) for line in above.lines})
    assert edges == pytest.approx([-126 + 3.1 * (edge - 0.5) for edge in range(0, 26, 5)])
    assert above.images[0].get_extent()[0] == pytest.approx(-126 - 3.1 / 2)
    assert {text.get_text() for text in above.texts} == {"A", "P", "S", "I"}
    drawn = below.get_lines()[0]
    np.testing.assert_allclose(drawn.get_xdata(), middles)
    np.testing.assert_allclose(drawn.get_ydata(), table["accuracy"])
    assert [line.get_label() for line in below.lines] == ["plain", "residual", "chance"]
    assert above.get_shared_x_axes().joined(above, below)
    assert "95 % Wilson interval" in figure.get_supxlabel()


def test_curves_of_every_form():
    epochs = {"fold": [0, 0, 1, 1], "epoch": [1, 2, 1, 2]}
    values = {
        f"{part}_{measure}": [0.7, 0.5, 0.9, 0.3]
        for part in ("train", "validation")
        for measure in ("loss", "accuracy")
    }
    history = pd.DataFrame(epochs | values)
    figure = feature_figures.form_curves(
        {"plain": history, "residual": history}, title="T", cohort="C"
    )
    assert [ax.get_title() for ax in figure.axes[:2]] == ["plain", "residual"]
    bold = [line for line in figure.axes[0].lines if line.get_linewidth() > 2]
    np.testing.assert_allclose(bold[0].get_ydata(), [0.8, 0.4])
    assert "each of 2 folds" in figure.get_supxlabel()
