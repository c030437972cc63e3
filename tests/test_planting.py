"""Real brains with a planted difference: its size and place, and that nothing else was touched."""

import json

import numpy as np
import pandas as pd
import pytest

from brainsex import cohort
from brainsex.synthetic import load_truth, plant
from brainsex.synthetic.template import REGIONS
from tests.conftest import write_cohort

AFFINE = np.array([[6.0, 0, 0, -84], [0, 5, 0, -110], [0, 0, 7, -70], [0, 0, 0, 1]])
SHAPE, SEX = (29, 38, 24), np.arange(81) // 41
POSITIONS = np.moveaxis(np.indices(SHAPE), 0, -1) * (6, 5, 7) + AFFINE[:3, 3]  # mm


def write_folder(path, count=81, affine=AFFINE, synthetic=None):
    """Make a converted cohort: ellipsoids of noise, some of it at 0 or 1; men's brains larger."""
    rng, brain = np.random.default_rng(5), np.linalg.norm(POSITIONS / (70, 100, 80), axis=-1) < 1
    voxels = rng.uniform(0.2, 0.8, (count, 1, 1, 1)) + rng.normal(0, 0.1, (count, *SHAPE))
    age = rng.choice(["22-25", "26-30", "31-35", "36+"], count)
    size = rng.normal(1100, 90, count) + 120 * SEX[:count]
    grid = {"shape": SHAPE, "affine": None if affine is None else affine.tolist()}
    columns = {"grid": grid, "age": age, "brain_volume_ml": size}
    write_cohort(path, brain * voxels.clip(0, 1), SEX[:count], **columns)
    if synthetic is not None:  # its effect
        (path / "SYNTHETIC").write_text(json.dumps({"effect": synthetic}))
    return path


def cohens_d(values, labels):
    women, men = values[labels == 0], values[labels == 1]
    return (men.mean() - women.mean()) / np.sqrt((women.var(ddof=1) + men.var(ddof=1)) / 2)


def test_only_the_regions_differ_between_balanced_labels_and_always_the_same(tmp_path, monkeypatch):
    source, out, again = write_folder(tmp_path / "hcp"), tmp_path / "brains", tmp_path / "again"
    data, before = cohort.load(plant(source, out, effect=0.8)), np.load(source / "tensors.npy")
    assert (data.name, data.synthetic) == ("brains (planted, d = 0.8)", False)
    (truth, regions), untouched = load_truth(out, SHAPE), np.ones(SHAPE, bool)
    for n, region in REGIONS.iterrows():
        distance = np.linalg.norm(POSITIONS - region[["x_mm", "y_mm", "z_mm"]].to_list(), axis=-1)
        np.testing.assert_array_equal(truth == n + 1, distance < region["radius_mm"] * 0.75**0.5)
        d = cohens_d(data.volumes[:, truth == n + 1].mean(1), data.sex)
        expected = 0.8 * np.sign(region["fa_men_minus_women"])
        assert [d, regions["d"][n]] == pytest.approx([expected] * 2, abs=0.05)
        untouched &= distance >= region["radius_mm"]
    np.testing.assert_array_equal(data.volumes[:, untouched], before[:, untouched])
    assert abs(cohens_d(data.table["brain_volume_ml"], data.sex)) < 0.25
    assert abs(cohens_d(data.table["age"].str[:2].astype(int), data.sex)) < 0.25
    assert np.ptp(pd.crosstab(data.table["sex_in_life"], data.table["Gender"]), axis=1).max() <= 1
    assert (data.table["sex_in_life"] == np.array(["F", "M"])[SEX]).all()
    monkeypatch.setattr(np.lib.format, "write_array_header_1_0", None)  # the run ends there
    with pytest.raises(TypeError):
        plant(source, again, effect=0.8)
    assert (again / "PLANTED").is_file() > (again / "tensors.npy").is_file()
    monkeypatch.undo()
    plant(source, again, effect=0.8)
    for path in (path for path in out.rglob("[!.]*") if path.is_file()):
        assert (again / path.relative_to(out)).read_bytes() == path.read_bytes(), path
    with pytest.raises(ValueError, match="seed = 1, found those with 0"):
        plant(source, again, effect=0.8, seed=1)
    with pytest.raises(ValueError, match="found planted True"):
        plant(out, source.parent / "twice")


def test_synthetic_people_without_differences_stay_synthetic(tmp_path):
    out = plant(write_folder(tmp_path / "people", synthetic=0.0), tmp_path / "out", effect=2)
    data = cohort.load(out)
    assert (data.name, data.synthetic) == ("out (planted, d = 2) (synthetic)", True)


def test_bad_input_is_refused_and_nothing_written(tmp_path):
    source = write_folder(tmp_path / "hcp")
    moved, coarse = AFFINE + np.eye(4)[3] * [[0], [70], [0], [0]], AFFINE * [[3], [3], [3], [1]]
    cases = {"half of each": {"affine": moved}, "4 voxels or": {"affine": coarse}}
    cases |= {"affine False": {"affine": None}, "True, 3, ": {"count": 3}}
    cases |= {"planted True": {"synthetic": 1.0}}
    for n, (message, options) in enumerate(cases.items()):
        with pytest.raises(ValueError, match=f"/{n}: expected .*{message}"):
            plant(write_folder(tmp_path / str(n), **options), tmp_path / "out")
    for options in ({"effect": -1}, {"effect": np.nan}, {"out": tmp_path / "hcp"}):
        with pytest.raises(ValueError, match=r"hcp: expected .*found .*(d -1|d nan|tensors\.npy)"):
            plant(source, **{"out": tmp_path / "out"} | options)
    assert not (tmp_path / "out").exists()
