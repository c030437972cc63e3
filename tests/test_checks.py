"""Checks of a cohort: one with one of each fault is found out; the page shows all subjects."""

from base64 import b64decode
from dataclasses import replace
from html.parser import HTMLParser
from io import BytesIO

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
FAULTS = {3: "small", 5: "dark", 8: "LAS", 11: "RPI", 13: "another brain"}


def ellipsoid(centre: tuple, radii: np.ndarray) -> np.ndarray:
    """Return a mask (X, Y, Z) of an ellipsoid in voxels."""
    places = np.moveaxis(np.indices(SHAPE), 0, -1)
    return (((places - centre) / radii) ** 2).sum(-1) < 1


def make_cohort(count: int = 30, faults: dict = FAULTS, **table: object) -> Cohort:
    """Make similar brains with a bright lobe that no mirror leaves in place, and some faults."""
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
        elif fault in ("LAS", "RPI"):
            volume = np.flip(volume, {"LAS": (0,), "RPI": (1, 2)}[fault])
        volumes.append(np.float32(volume.clip(0, 1)))
    names = np.array([f"{row:06d}" for row in range(count)])
    frame, sex = pd.DataFrame({"Subject": names, **table}), np.arange(count) % 2
    return Cohort("c", False, np.stack(volumes), sex, names, None, AFFINE, frame)


def test_table_flags_each_fault_and_nobody_else():
    cohort = make_cohort(qc_issue=pd.Series([None] * 29 + ["A;<b>"], dtype=object))
    table = checks.check_table(cohort)
    assert table["Subject"].tolist() == cohort.subjects.tolist()
    flags = table.loc[table["flags"] != "", "flags"].to_dict()
    expected = {3: "brain_volume_ml ", 5: "mean 0.", 8: "seems mirrored: LAS"}
    expected |= {11: "seems mirrored: RPI", 13: "correlation 0.", 29: "QC_Issue A;<b>"}
    assert set(flags) == set(expected)
    assert all(text in flags[row] for row, text in expected.items())
    assert not any("mirrored: RAS" in text for text in flags.values())
    for row in (0, 3, 13):
        others = np.delete(cohort.volumes, row, axis=0).mean(axis=0, dtype=float)
        correlation = np.corrcoef(cohort.volumes[row].ravel(), others.ravel())[0, 1]
        assert table.at[row, "correlation"] == pytest.approx(correlation, abs=1e-6)
        brain = cohort.volumes[row] > 0.02
        assert table.at[row, "mean"] == pytest.approx(cohort.volumes[row][brain].mean(), abs=1e-6)
        assert table.at[row, "brain_volume_ml"] == pytest.approx(brain.sum() * 27 / 1000)


@pytest.mark.parametrize(("mirrored", "named"), [(13, 13), (15, 0)])
def test_the_minority_is_named_as_mirrored_and_of_halves_nobody(mirrored, named):
    table = checks.check_table(make_cohort(faults=dict.fromkeys(range(mirrored), "LAS")))
    flagged = table["flags"].str.contains("seems mirrored: LAS")
    assert flagged.sum() == named
    assert flagged[:mirrored].all() == (mirrored < 15)
    assert (table["orientation"] != "RAS").equals(flagged)


def test_the_native_brain_volume_counts_where_it_is_known():
    native = np.full(30, 1400.0) + np.arange(30)
    native[7] = 700
    cohort = make_cohort(faults={}, brain_volume_ml=native)
    cohort.volumes[2] = cohort.volumes.mean(0)  # nobody is blamed for resembling the others
    table = checks.check_table(cohort)
    assert table["correlation"].argmax() == 2
    assert "correlation" not in table.at[2, "flags"]
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


class Page(HTMLParser):
    """Read the figures of a page: what is written there, and size and pictures of the planes."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.figures = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list) -> None:
        if tag == "figure":
            self.figures.append({"text": "", "planes": []})
        elif tag == "img":
            png = b64decode(dict(attrs)["src"].removeprefix("data:image/png;base64,"))
            self.figures[-1]["planes"].append(np.asarray(Image.open(BytesIO(png))))
            self.figures[-1] |= {name: value for name, value in attrs if name != "src"}

    def handle_data(self, data: str) -> None:
        if self.figures:
            self.figures[-1]["text"] += data


def test_montage_shows_all_subjects_the_flagged_first_and_escapes_names(tmp_path):
    cohort = make_cohort()
    cohort.subjects[4] = "<b>&"
    checks.write_montage(cohort, checks.check_table(cohort), tmp_path / "montage.html")
    text = (tmp_path / "montage.html").read_text(encoding="utf-8")
    page = Page(text)
    assert "default-src 'none'; img-src data:" in text
    assert "<b><b>" not in text
    assert "<b>&" in page.figures[8]["text"]
    flagged = [f"{row:06d}" for row in FAULTS]
    names = [*flagged, *(name for name in cohort.subjects if name not in flagged)]
    assert [figure["text"].split()[0] for figure in page.figures] == names
    assert "seems mirrored: LAS" in page.figures[2]["text"]
    assert "c cohort, n=30: FA" in text


def test_planes_have_the_front_and_the_right_to_the_right_in_the_shape_of_millimetres(tmp_path):
    cohort = replace(make_cohort(6, {}), affine=np.diag([4.0, 2.0, 3.0, 1]))
    volumes = cohort.volumes.copy()
    mean = volumes.mean(0, dtype=float) * 5 / 6  # with subject 1 left empty
    x, y, z = (round((mean * index).sum() / mean.sum()) for index in np.indices(SHAPE))
    volumes[1] = 0
    volumes[1, x, 25, 3] = volumes[1, 20, y, 3] = volumes[1, 20, 25, z] = 1
    cohort = replace(cohort, volumes=volumes)
    checks.write_montage(cohort, checks.check_table(cohort), tmp_path / "m.html")
    page = Page((tmp_path / "m.html").read_text())
    (figure,) = (figure for figure in page.figures if figure["text"].startswith("000001"))
    # row from the top and column in the sagittal (Y, Z), coronal (X, Z) and axial (X, Y) plane
    expected = [(22, 25), (22, 20), (2, 20)]
    assert [tuple(np.argwhere(plane == 255)[0]) for plane in figure["planes"]] == expected
    assert [(plane == 255).sum() for plane in figure["planes"]] == [1, 1, 1]
    width, height = int(figure["width"]), int(figure["height"])
    assert width / height == pytest.approx(24 * 4 / (28 * 2), rel=0.02)
