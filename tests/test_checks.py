"""What came in, looked over: a cohort with one of each fault; the page of all subjects."""

import tracemalloc
from base64 import b64decode
from html.parser import HTMLParser
from io import BytesIO

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from scipy.ndimage import gaussian_filter
from scipy.stats import median_abs_deviation

from brainsex import checks
from brainsex.__main__ import main
from brainsex.cohort import Cohort
from tests.test_volumes import SHAPE, ellipsoid, make, run, save

AFFINE = np.diag([3.0, 3.0, 3.0, 1])
FAULTS = {3: "small", 5: "dark", 8: "LAS", 11: "RPI", 13: "another brain"}


def toy(count=30, faults=FAULTS, affine=AFFINE, **table):
    """Brains alike, with a bright lobe that no mirror keeps in place; and one of each fault."""
    rng = np.random.default_rng(0)
    lobe = gaussian_filter((ellipsoid(SHAPE, (16, 19, 16), (5, 6, 5)) < 1).astype(float), 1)
    volumes = []
    for row in range(count):
        size = 1 + 0.02 * rng.standard_normal()
        radii = np.array([9, 11, 10]) * (size if faults.get(row) != "small" else 0.7)
        inside = ellipsoid(SHAPE, (11, 13.5, 12), radii) < 1
        volume = inside * (0.3 + 0.4 * lobe + 0.03 * rng.standard_normal(SHAPE))
        fault = faults.get(row, "")
        if fault == "dark":
            volume *= 0.4
        elif fault == "another brain":
            volume = inside * rng.uniform(0.1, 0.6, SHAPE)
        elif fault == "LAS":
            volume = volume[::-1]
        elif fault == "RPI":
            volume = volume[:, ::-1, ::-1]
        volumes.append(np.float32(volume.clip(0, 1)))
    names = np.array([f"{row:06d}" for row in range(count)])
    frame = pd.DataFrame({"Subject": names, **table})
    sex = np.arange(count) % 2
    return Cohort("c", False, np.stack(volumes), sex, names, None, affine, frame)


def test_table_flags_each_fault_and_no_one_else():
    issues = pd.Series([None] * 29 + ["A;<b>"], dtype=object)
    cohort = toy(qc_issue=issues)
    found = checks.table(cohort)
    assert found["Subject"].tolist() == cohort.subjects.tolist()
    flags = found.loc[found["flags"] != "", "flags"].to_dict()
    assert "brain_volume_ml" in flags.pop(3)
    assert "mean 0." in flags.pop(5)
    assert "seems mirrored: LAS" in flags.pop(8)
    assert "seems mirrored: RPI" in flags.pop(11)
    assert "correlation 0." in flags.pop(13)
    assert flags.pop(29) == "QC_Issue A;<b>"
    assert not flags
    for row in (0, 3, 13):
        others = np.delete(cohort.volumes, row, axis=0).mean(axis=0, dtype=float)
        expected = np.corrcoef(cohort.volumes[row].ravel(), others.ravel())[0, 1]
        assert found.at[row, "correlation"] == pytest.approx(expected, abs=1e-6)
        brain = cohort.volumes[row] > 0.02
        assert found.at[row, "mean"] == pytest.approx(cohort.volumes[row][brain].mean(), abs=1e-6)
        assert found.at[row, "brain_volume_ml"] == pytest.approx(brain.sum() * 27 / 1000)


@pytest.mark.parametrize(("mirrored", "named"), [(13, 13), (15, 0), (17, 13)])
def test_of_a_cohort_mirrored_in_part_the_fewer_are_named_and_of_halves_none(mirrored, named):
    found = checks.table(toy(faults=dict.fromkeys(range(mirrored), "LAS")))
    said = found["flags"].str.contains("seems mirrored: LAS")
    assert said.sum() == named
    if named:  # and not one of the more
        assert said[:mirrored].all() == (mirrored < 15)
    assert (found["orientation"] != "RAS").equals(said)


def test_the_native_brain_volume_counts_where_it_is_known():
    native = np.full(30, 1400.0) + np.arange(30)
    native[7] = 700
    found = checks.table(toy(faults={}, brain_volume_ml=native))
    assert found["brain_volume_ml"].tolist() == native.tolist()
    expected = (700 - np.median(native)) / median_abs_deviation(native, scale="normal")
    assert found.at[7, "flags"] == f"brain_volume_ml 700 (z {expected:.1f})"
    assert found["flags"].str.contains("brain_volume_ml").sum() == 1


def test_without_an_affine_and_with_brains_all_the_same():
    cohort = toy(4, {}, affine=None)
    found = checks.table(cohort)
    assert found["brain_volume_ml"].isna().all()
    same = Cohort(**vars(cohort) | {"volumes": np.stack([cohort.volumes[0]] * 4)})
    assert (checks.table(same)["flags"] == "").all()
    volumes = cohort.volumes.copy()
    volumes[3] = 0
    empty = Cohort(**vars(cohort) | {"volumes": volumes})
    assert "correlation 0 " in checks.table(empty).at[3, "flags"]
    with pytest.raises(ValueError, match="expected three subjects at least, found 2"):
        checks.table(toy(2, {}))


class Page(HTMLParser):
    """Subjects in the order of the page, what is written beside them, and their pictures."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.figures, self.headings = set(), [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.add(tag)
        attributes = dict(attributes)
        if tag == "figure":
            self.figures.append({"class": attributes.get("class"), "text": ""})
        elif tag == "img":
            content = attributes["src"].removeprefix("data:image/png;base64,")
            picture = np.asarray(Image.open(BytesIO(b64decode(content))))
            self.figures[-1] |= {"alt": attributes["alt"], "picture": picture}

    def handle_data(self, data):
        if self.figures:
            self.figures[-1]["text"] += data


def test_montage_shows_all_subjects_the_flagged_first(tmp_path):
    cohort = toy()
    cohort.subjects[4] = "<b>&"
    found = checks.table(cohort)
    checks.montage(cohort, found, tmp_path / "montage.html")
    text = (tmp_path / "montage.html").read_text(encoding="utf-8")
    page = Page(text)
    assert page.tags == {"html", "head", "meta", "title", "style", "body", "header", "h1", "main",
                         "figure", "img", "figcaption", "b"}  # fmt: skip
    assert "<b>&" in page.figures[8]["text"]
    assert "<b><b>" not in text
    names = [figure["alt"] for figure in page.figures]
    flagged = [f"{row:06d}" for row in FAULTS]
    assert names == [*flagged, *(s for s in cohort.subjects if s not in flagged)]
    assert [figure["class"] for figure in page.figures] == ["flagged"] * 5 + [None] * 25
    assert "seems mirrored: LAS" in page.figures[2]["text"]
    assert "c cohort, n=30: FA" in text


def test_a_picture_is_three_planes_with_anterior_and_right_to_the_right(tmp_path):
    cohort = toy(6, {})
    volume = np.zeros(SHAPE, np.float32)
    volume[11, 13, 12] = 1
    volumes = cohort.volumes.copy()
    volumes[:, 11, 13, 12] = 0.9
    at = np.rint(np.array(np.meshgrid(*map(range, SHAPE), indexing="ij")).reshape(3, -1)
                 @ volumes.mean(0).ravel() / volumes.mean(0).sum()).astype(int)  # fmt: skip
    volumes[1] = 0
    volumes[1, at[0], 25, 3] = volumes[1, 20, at[1], 3] = volumes[1, 20, 25, at[2]] = 1
    cohort = Cohort(**vars(cohort) | {"volumes": volumes})
    checks.montage(cohort, checks.table(cohort), tmp_path / "m.html")
    figure = Page((tmp_path / "m.html").read_text(encoding="utf-8")).figures[0]
    assert figure["alt"] == "000001"
    x, y, z = SHAPE
    picture = figure["picture"]
    assert picture.shape == (max(y, z), y + x + x)
    white = {tuple(place) for place in np.argwhere(picture == 255)}
    # row from the top, column: sagittal (Y, Z), coronal (X, Z), axial (X, Y)
    assert white == {(z - 1 - 3, 25), (z - 1 - 3, y + 20), (y - 1 - 25, y + x + 20)}


def test_planes_have_the_shape_they_have_in_millimetres(tmp_path):
    cohort = toy(3, {}, affine=np.diag([4.0, 2.0, 3.0, 1]))
    checks.montage(cohort, checks.table(cohort), tmp_path / "m.html")
    picture = Page((tmp_path / "m.html").read_text(encoding="utf-8")).figures[0]["picture"]
    x, y, z = np.rint(np.multiply(SHAPE, (2, 1, 1.5))).astype(int)
    assert picture.shape == (max(y, z), y + x + x)


def test_memory_does_not_grow_with_the_number_of_subjects(tmp_path):
    peak = {}
    for count in (20, 200):
        cohort = toy(20, {}).volumes[np.arange(count) % 20]
        names = np.array([f"{row}" for row in range(count)])
        frame = pd.DataFrame({"Subject": names})
        cohort = Cohort("c", False, cohort, np.arange(count) % 2, names, None, AFFINE, frame)
        tracemalloc.start()
        checks.montage(cohort, checks.table(cohort), tmp_path / "m.html")
        peak[count] = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak[200] < 2 * peak[20]  # 180 volumes more are 11 MB


def test_the_command_leaves_a_table_and_a_page(tmp_path, capsys):
    folder = make(tmp_path / "c", 6)
    brain = np.float32(ellipsoid(SHAPE, (11, 13, 12), (3, 3, 3)) < 1) / 2
    save(folder / "fa/000003.nii.gz", brain)
    run(folder, shape=SHAPE)
    main(["check", str(folder), str(tmp_path / "out")])
    assert "1 of 6 flagged" in capsys.readouterr().out
    table = pd.read_csv(tmp_path / "out/checks.csv", dtype=str)
    assert table.loc[table["flags"].notna(), "Subject"].tolist() == ["000003"]
    assert (tmp_path / "out/montage.html").stat().st_size > 1000
