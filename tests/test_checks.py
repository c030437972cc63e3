"""Checks of a cohort: one with one of each fault is found out; the page shows all subjects."""

import re
from base64 import b64decode
from dataclasses import replace
from io import BytesIO
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from scipy.ndimage import gaussian_filter
from scipy.stats import median_abs_deviation

from brainsex import checks
from brainsex.cohort import Cohort

AFFINE = np.diag([3.0, 3.0, 3.0, 1])
SHAPE = (24, 28, 26)
FAULTS = {3: "small", 5: "dark", 13: "another brain"}


def ellipsoid(centre: tuple, radii: np.ndarray) -> np.ndarray:
    """Return a mask (X, Y, Z) of an ellipsoid in voxels."""
    places = np.moveaxis(np.indices(SHAPE), 0, -1)
    return (((places - centre) / radii) ** 2).sum(-1) < 1


def make_cohort(count: int = 30, faults: dict = FAULTS, **table: object) -> Cohort:
    """Make similar brains with a bright lobe, and some faults."""
    rng = np.random.default_rng(0)
    lobe, volumes = gaussian_filter(ellipsoid((16, 19, 16), (5, 6, 5)).astype(float), 1), []
    for row in range(count):
        size, fault = 1 + 0.02 * rng.standard_normal(), faults.get(row)
        radii = np.array([9, 11, 10]) * (0.7 if fault == "small" else size)
        brain = ellipsoid((11, 13.5, 12), radii)
        volume = brain * (0.3 + 0.4 * lobe + 0.03 * rng.standard_normal(SHAPE))
        if fault == "dark":
            volume *= 0.4
        elif fault == "another brain":
            volume = brain * rng.uniform(0.1, 0.6, SHAPE)
        volumes.append(np.float32(volume.clip(0, 1)))
    names = np.array([f"{row:06d}" for row in range(count)])
    frame, sex = pd.DataFrame({"Subject": names, **table}), np.arange(count) % 2
    return Cohort("c", False, np.stack(volumes), sex, names, None, AFFINE, frame)


def test_table_flags_each_fault_and_nobody_else():
    cohort = make_cohort(qc_issue=pd.Series([None] * 29 + ["A;<b>"], dtype=object))
    table = checks.check_table(cohort)
    assert table["Subject"].tolist() == cohort.subjects.tolist()
    flags = table.loc[table["flags"] != "", "flags"].to_dict()
    expected = {3: "brain_volume_ml ", 5: "mean 0.", 13: "correlation 0.", 29: "QC_Issue A;<b>"}
    assert set(flags) == set(expected)
    assert all(text in flags[row] for row, text in expected.items())
    for row in (0, 3, 13):
        others = np.delete(cohort.volumes, row, axis=0).mean(axis=0, dtype=float)
        correlation = np.corrcoef(cohort.volumes[row].ravel(), others.ravel())[0, 1]
        assert table.at[row, "correlation"] == pytest.approx(correlation, abs=1e-6)
        brain = cohort.volumes[row] > 0.02
        assert table.at[row, "mean"] == pytest.approx(cohort.volumes[row][brain].mean(), abs=1e-6)
        assert table.at[row, "brain_volume_ml"] == pytest.approx(brain.sum() * 27 / 1000)


def test_the_native_brain_volume_counts_where_it_is_known():
    native = np.full(30, 1400.0) + np.arange(30)
    native[7] = 700
    table = checks.check_table(make_cohort(faults={}, brain_volume_ml=native))
    assert table["brain_volume_ml"].tolist() == native.tolist()
    z = (700 - np.median(native)) / median_abs_deviation(native, scale="normal")
    assert table.at[7, "flags"] == f"brain_volume_ml 700 (z {z:.1f})"
    assert table["flags"].str.contains("brain_volume_ml").sum() == 1


def test_cohorts_without_affine_or_spread_and_cohorts_that_cannot_be_checked():
    cohort = replace(make_cohort(4, {}), affine=None)
    assert checks.check_table(cohort)["brain_volume_ml"].isna().all()
    alike = replace(cohort, volumes=np.stack([cohort.volumes[0]] * 4))
    assert (checks.check_table(alike)["flags"] == "").all()
    volumes = cohort.volumes.copy()
    volumes[3] = 0
    assert "correlation 0 " in checks.check_table(replace(cohort, volumes=volumes)).at[3, "flags"]
    volumes[3, 0, 0, 0] = np.nan
    for broken, message in (
        (make_cohort(2, {}), "at least three finite volumes of brains, found 2"),
        (replace(cohort, volumes=volumes), "c: expected at least three finite"),
        (replace(cohort, volumes=0 * cohort.volumes), "c: expected at least three finite"),
    ):
        with pytest.raises(ValueError, match=message):
            checks.check_table(broken)


def read_page(path: Path) -> list[tuple[str, list[np.ndarray]]]:
    """Read the figures of a page: what is written there, and the pictures of the planes."""
    figures = []
    for text in path.read_text(encoding="utf-8").split("<figure>")[1:]:
        pictures = re.findall("base64,([^']+)'", text)
        planes = [np.asarray(Image.open(BytesIO(b64decode(picture)))) for picture in pictures]
        figures.append((re.search("<figcaption>(.*)</figcaption>", text)[1], planes))
    return figures


def test_montage_shows_all_subjects_the_flagged_first_and_escapes_names(tmp_path):
    cohort = make_cohort()
    cohort.subjects[4] = "<b>&"
    checks.write_montage(cohort, checks.check_table(cohort), tmp_path / "m.html")
    names = [
        text.split("</b>")[0].removeprefix("<b>") for text, _ in read_page(tmp_path / "m.html")
    ]
    flagged = [f"{row:06d}" for row in FAULTS]
    others = [name for name in cohort.subjects if name not in flagged]
    assert names == flagged + [name.replace("<b>&", "&lt;b&gt;&amp;") for name in others]
    text = (tmp_path / "m.html").read_text(encoding="utf-8")
    assert "default-src 'none'; img-src data:" in text
    assert "c cohort, n=30: FA" in text
    assert "correlation 0." in text


def test_planes_have_the_front_and_the_right_to_the_right(tmp_path):
    cohort = make_cohort(6, {})
    volumes = cohort.volumes.copy()
    mean = volumes.mean(0, dtype=float) * 5 / 6  # with subject 1 left empty
    x, y, z = (round((mean * index).sum() / mean.sum()) for index in np.indices(SHAPE))
    volumes[1] = 0
    volumes[1, x, 25, 3] = volumes[1, 20, y, 3] = volumes[1, 20, 25, z] = 1
    cohort = replace(cohort, volumes=volumes)
    checks.write_montage(cohort, checks.check_table(cohort), tmp_path / "m.html")
    (planes,) = (planes for text, planes in read_page(tmp_path / "m.html") if "000001" in text)
    # row from the top and column in the sagittal (Y, Z), coronal (X, Z) and axial (X, Y) plane
    expected = [[[22, 25]], [[22, 20]], [[2, 20]]]
    assert [np.argwhere(plane == 255).tolist() for plane in planes] == expected
