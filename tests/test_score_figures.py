"""Drawings of scores and features: each number stands where it belongs, under its own name."""

import matplotlib
import numpy as np
import pandas as pd
import pytest
from matplotlib.colors import to_hex
from matplotlib.text import Text
from scipy.stats import binomtest, norm

from brainsex import figures, score_figures

matplotlib.use("Agg")

HEAD = {"title": "A title", "cohort": "synthetic cohort, n=7"}
SCORES = pd.DataFrame(
    {
        "classifier": ["SVM", "KNN", "SVM", "KNN"],
        "protocol": ["10-fold", "10-fold", "leave-one-out", "leave-one-out"],
        "accuracy": [0.91, 0.82, 0.93, 0.74],
        "auc": [0.95, 0.86, 0.97, 0.78],
        "low": [0.88, 0.78, 0.9, 0.7],
        "high": [0.96, 0.9, 0.95, 0.79],
    }
)


def texts(artist):
    return [text.get_text() for text in artist.findobj(Text) if text.get_text()]


def lines(ax):
    """Label -> line, of those that have one."""
    return {line.get_label(): line for line in ax.lines if not line.get_label().startswith("_")}


def legend(ax):
    """What the legend says -> colour of its mark."""
    shown = ax.get_legend()
    return {
        text.get_text(): to_hex(handle.get_color())
        for text, handle in zip(shown.get_texts(), shown.legend_handles)
    }


# ------------------------------------------------------------------------------------------- dots


def dots(table=SCORES, **options):
    return score_figures.dots(table, rows="classifier", hue="protocol", **HEAD, **options)


def test_dots_draw_each_score_in_its_row_and_kind():
    figure = dots()
    (ax,) = figure.axes
    assert [label.get_text() for label in ax.get_yticklabels()] == ["SVM", "KNN"]
    assert ax.get_yticks().tolist() == [0, 1]
    bottom, top = ax.get_ylim()
    assert bottom > 1 > 0 > top  # the first row stands above
    found = lines(ax)
    assert list(found) == ["10-fold", "leave-one-out"]
    assert found["10-fold"].get_xdata().tolist() == [0.91, 0.82]
    assert found["leave-one-out"].get_xdata().tolist() == [0.93, 0.74]
    for row in (0, 1):  # kinds beside each other within their row
        first, second = (line.get_ydata()[row] for line in found.values())
        assert row - 0.4 < first < row < second < row + 0.4
    assert found["10-fold"].get_color() != found["leave-one-out"].get_color()
    assert found["10-fold"].get_marker() != found["leave-one-out"].get_marker()
    assert legend(ax) == {name: to_hex(line.get_color()) for name, line in found.items()}
    assert ax.get_xlabel() == "accuracy (share of subjects)"
    assert {"A title", "synthetic cohort, n=7"} <= set(texts(figure))


def test_dots_draw_intervals_through_their_dots():
    (ax,) = dots().axes
    for line, (kind, rows) in zip(lines(ax).values(), SCORES.groupby("protocol")):
        (bars,) = (
            bars
            for bars in ax.collections
            if to_hex(bars.get_color()[0]) == to_hex(line.get_color())
        )
        segments = np.array(bars.get_segments())
        np.testing.assert_allclose(segments[:, :, 0], rows[["low", "high"]], err_msg=kind)
        np.testing.assert_allclose(segments[:, :, 1], line.get_ydata()[:, None] * [[1, 1]])


def test_dots_write_the_numbers_beside():
    (ax,) = dots().axes
    at = {text.get_text(): text.get_position()[1] for text in ax.texts}
    found = {
        f"{x:.3f}": y for line in lines(ax).values() for x, y in zip(*line.get_data(), strict=True)
    }
    assert at == found
    assert set(at) == {"0.910", "0.820", "0.930", "0.740"}


def test_dots_of_another_value_without_intervals():
    (ax,) = dots(SCORES.drop(columns=["low", "high"]), value="auc", label="AUC").axes
    assert lines(ax)["leave-one-out"].get_xdata().tolist() == [0.97, 0.78]
    assert not ax.collections
    assert ax.get_xlabel() == "AUC"
    (chance,) = (line for line in ax.lines if line.get_linestyle() == ":")
    assert list(chance.get_xdata()) == [0.5, 0.5]


def test_dots_draw_what_was_published_beneath_its_own():
    published = {("KNN", "10-fold"): (0.8, 0.03), ("SVM", "leave-one-out"): (0.9, None)}
    (ax,) = dots(published=published).axes
    own = {
        (row, kind): y
        for kind, line in lines(ax).items()
        if kind != "published"
        for row, y in zip(("SVM", "KNN"), line.get_ydata())
    }
    assert legend(ax)["published"] == figures.PALE
    for (row, kind), (number, deviation) in published.items():
        (bars,) = (c for c in ax.containers if c.lines[0].get_xdata() == [number])
        point, _, spreads = bars.lines
        assert to_hex(point.get_color()) == figures.PALE
        assert 0 < point.get_ydata()[0] - own[row, kind] < 0.2  # ylim falls: beneath
        if deviation:
            ((left, right),) = spreads[0].get_segments()
            assert (left[0], right[0]) == pytest.approx((0.77, 0.83))
    assert "published" not in texts(dots())


def test_dots_draw_a_row_that_lacks_a_kind():
    (ax,) = dots(SCORES.iloc[:3]).axes
    found = lines(ax)
    assert found["leave-one-out"].get_xdata().tolist() == [0.93]
    assert found["leave-one-out"].get_ydata()[0] < 0.4


def test_nothing_is_left_out_for_want_of_a_colour():
    """Drawn, or refused: not silently dropped."""
    many = pd.DataFrame({"classifier": "SVM", "protocol": list("abcdefg"), "accuracy": 0.7})
    sweeps = {name: np.array([0.5, 0.6]) for name in "abcdefg"}
    for draw in (lambda: dots(many), lambda: score_figures.neighbours(sweeps, **HEAD)):
        try:
            figure = draw()
        except ValueError:
            continue
        assert len(lines(figure.axes[0])) == 7


# ------------------------------------------------------------------------------------- neighbours


def test_neighbours_draw_accuracy_against_k_and_ring_the_best():
    sweeps = {"all": np.array([0.6, 0.7, 0.9, 0.8]), "first 500": np.array([0.75, 0.5])}
    figure = score_figures.neighbours(sweeps, **HEAD)
    (ax,) = figure.axes
    found = lines(ax)
    assert list(found) == ["all: best k = 3, 0.900", "first 500: best k = 1, 0.750"]
    for line, accuracy in zip(found.values(), sweeps.values()):
        assert line.get_xdata().tolist() == list(range(1, len(accuracy) + 1))
        assert line.get_ydata().tolist() == accuracy.tolist()
    rings = [line for line in ax.lines if line.get_marker() == "o"]
    assert [(r.get_xdata()[0], r.get_ydata()[0]) for r in rings] == [(3, 0.9), (1, 0.75)]
    assert [r.get_color() for r in rings] == [line.get_color() for line in found.values()]
    assert len({line.get_color() for line in found.values()}) == 2
    assert ax.get_xlabel().startswith("k, number of neighbours")
    assert ax.get_ylabel() == "accuracy (share of subjects)"
    assert {"A title", "synthetic cohort, n=7"} <= set(texts(figure))


# -------------------------------------------------------------------------------------- strongest

WEIGHTS = pd.DataFrame(
    {
        "Region_name": ["FS_L_Hippo_Vol", "age", "FS_CSF_Vol", "FS_X"],
        "Importance": [0.5, 0.3, 0.2, 0.1],
        "spread": [0.05, 0.02, 0.01, 0.04],
        "higher_in": ["men", "women", "men", "women"],
        "permutation": [0.1, -0.02, 0.01, np.nan],
        "permutation_spread": [0.03, 0.01, 0.02, np.nan],
    }
)


def strongest(count=3):
    return score_figures.strongest(WEIGHTS, count=count, label="gain (share)", **HEAD)


def test_strongest_draw_weight_and_loss_side_by_side():
    figure = strongest()
    left, right = figure.axes
    assert [label.get_text() for label in left.get_yticklabels()] == [
        "L_Hippo_Vol",
        "age",
        "CSF_Vol",
    ]
    bottom, top = left.get_ylim()
    assert bottom > 2 > 0 > top  # the strongest above
    for ax, value in ((left, "Importance"), (right, "permutation")):
        bars = ax.patches[:3]
        assert [bar.get_width() for bar in bars] == WEIGHTS[value][:3].tolist()
        assert [bar.get_y() + bar.get_height() / 2 for bar in bars] == pytest.approx([0, 1, 2])
        colours = [to_hex(bar.get_facecolor()).upper() for bar in bars]
        women, men = figures.PALETTE["women"], figures.PALETTE["men"]
        assert colours == [men, women, men]
    assert left.get_xlabel() == "gain (share)"
    assert right.get_xlabel() == "loss of AUC when permuted"


def test_strongest_draw_the_spread_over_folds_around_each_bar():
    for ax, value, spread in zip(
        strongest().axes, ("Importance", "permutation"), ("spread", "permutation_spread")
    ):
        (segments,) = (lines.get_segments() for lines in ax.collections)
        middle, deviation = WEIGHTS[value][:3], WEIGHTS[spread][:3]
        np.testing.assert_allclose(np.array(segments)[:, 0, 0], middle - deviation)
        np.testing.assert_allclose(np.array(segments)[:, 1, 0], middle + deviation)
        np.testing.assert_allclose(np.array(segments)[:, :, 1], [[0, 0], [1, 1], [2, 2]])


def test_strongest_say_what_colours_and_lines_mean():
    figure = strongest()
    shown = figure.axes[1].get_legend()
    said = {
        text.get_text(): to_hex(patch.get_facecolor()).upper()
        for text, patch in zip(shown.get_texts(), shown.get_patches())
    }
    assert said == {f"higher in {sex}": colour for sex, colour in figures.PALETTE.items()}
    foot = " ".join(" ".join(texts(figure)).split())
    assert "synthetic cohort, n=7 · bars: mean over folds, lines: ± standard deviation" in foot
    assert "A title" in foot


def test_strongest_of_more_than_there_are_or_were_permuted():
    left, right = strongest(20).axes
    assert len(left.get_yticklabels()) == 4
    assert left.patches[3].get_width() == 0.1
    assert np.isnan(right.patches[3].get_width())
    left.figure.canvas.draw()


# ---------------------------------------------------------------------------------------- overlap


def people(count=200):
    """Heads of unequal sexes, 80 women for every 120 men; who is told by its size, and whoever."""
    rng = np.random.default_rng(0)
    sex = rng.permutation([0] * (2 * count // 5) + [1] * (3 * count // 5))
    size = rng.normal(1400 + 200 * sex, 100)
    return size, sex, (size > 1500) == sex


def overlap(size, sex, right, **options):
    return score_figures.overlap(size, sex, right, label="head (ml)", **HEAD, **options)


def test_overlap_draws_each_sex_s_density():
    size, sex, right = people()
    figure = overlap(size, sex, {"size": right})
    ax = figure.axes[0]
    found = lines(ax)
    assert list(found) == ["women, n=80", "men, n=120"]
    for label, (name, colour) in enumerate(figures.PALETTE.items()):
        line = found[f"{name}, n={(sex == label).sum()}"]
        assert line.get_color() == colour
        x, y = line.get_data()
        assert x[y.argmax()] == pytest.approx(size[sex == label].mean(), abs=40)
        # by hand: a kernel at each subject, Scott's width
        own = size[sex == label]
        width = own.std(ddof=1) * len(own) ** -0.2
        expected = norm.pdf(x[:, None], own, width).mean(1)
        np.testing.assert_allclose(y, expected, rtol=1e-6, atol=1e-12)
        assert (x[0], x[-1]) == (size.min(), size.max())
    assert ax.get_xlabel() == "head (ml)"
    assert {"A title"} <= set(texts(figure))


def test_overlap_draws_who_is_right_about_whom(monkeypatch):
    monkeypatch.setattr(score_figures, "GROUPS", 5)
    size, sex, right = people()
    chance = np.arange(200) % 2 == 0
    figure = overlap(size, sex, {"by size": right, "by lot": chance})
    ax = figure.axes[1]
    densities = [
        norm.pdf(size[:, None], own, own.std(ddof=1) * len(own) ** -0.2).mean(1)
        for own in (size[sex == 0], size[sex == 1])
    ]
    typical = np.where(sex == 1, densities[1], densities[0]) / sum(densities)
    groups = np.argsort(typical, kind="stable").reshape(5, 40)
    assert len(ax.containers) == 2
    for bars, name, correct in zip(ax.containers, ("by size", "by lot"), (right, chance)):
        assert bars.get_label() == name
        point, _, (spread,) = bars.lines
        np.testing.assert_allclose(point.get_xdata(), typical[groups].mean(1))
        np.testing.assert_allclose(point.get_ydata(), correct[groups].mean(1))
        for segment, rows in zip(spread.get_segments(), groups):
            limits = binomtest(int(correct[rows].sum()), 40).proportion_ci(0.95, "wilson")
            np.testing.assert_allclose(segment[:, 1], limits, atol=1e-9)
    by_size = ax.containers[0].lines[0].get_ydata()
    assert by_size[0] < 0.3  # wrong about whoever looks like the other sex
    assert by_size[-1] == 1
    assert ax.get_ylabel() == "accuracy (share of subjects)"
    assert ax.get_xlabel().startswith("how typical for their own sex")
    assert set(legend_names(ax)) == {"by size", "by lot"}
    foot = " ".join(" ".join(texts(figure)).split())
    assert "synthetic cohort, n=7 · right: 5 groups of equal size, Wilson 95 %" in foot


def legend_names(ax):
    return [text.get_text() for text in ax.get_legend().get_texts()]


def test_overlap_has_an_outlier_at_its_own_end():
    """Where neither density is anything, 0 of 0 is no number."""
    size, sex, right = people()
    size[0] = 1e5
    figure = overlap(size, sex, {"size": right})
    assert np.isfinite(figure.axes[1].containers[0].lines[0].get_xdata()).all()
