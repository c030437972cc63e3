"""The synthetic cohort: what lies on disk, what is planted, that one seed gives it again."""

import gzip
import hashlib
import io
import os
import re
import tracemalloc
import zipfile
from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd
import pytest
from scipy.ndimage import binary_erosion, map_coordinates
from scipy.stats import rice, wasserstein_distance

from brainsex import archives, population, synthetic, volumes
from brainsex.anatomy import Anatomy, anatomy, grid
from brainsex.synthetic import load_truth, subject_volume, write_cohort

SUBJECTS = 12


@pytest.fixture(scope="module")
def coarse():
    return anatomy(5)


@pytest.fixture(scope="module")
def base():
    return anatomy(2.5)


@pytest.fixture(scope="module")
def cohort(tmp_path_factory):
    return write_cohort(tmp_path_factory.mktemp("synthetic") / "c", subjects=SUBJECTS, spacing=5)


@pytest.fixture
def quick(monkeypatch, coarse):
    """The anatomy at 5 mm, made once instead of for every cohort."""
    monkeypatch.setattr(synthetic, "anatomy", lambda spacing, template: coarse)


def checksums(folder):
    files = (path for path in folder.rglob("[!.]*") if path.is_file())
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def image_in(path):
    """The NIfTI in an archive, read by nothing but zipfile and nibabel."""
    with zipfile.ZipFile(path) as outer:
        (inner,) = outer.infolist()
        assert inner.filename.endswith(".zip")
        assert inner.compress_type == zipfile.ZIP_STORED  # so it can be read in place
        with zipfile.ZipFile(io.BytesIO(outer.read(inner))) as archive:
            (name,) = archive.namelist()
            subject = path.name.split("_")[0]
            assert name == f"{subject}/T1w/Diffusion/dti_FA.nii.gz"
            return nib.Nifti1Image.from_stream(
                gzip.GzipFile(fileobj=io.BytesIO(archive.read(name)))
            )


def paired(base, pairs, head_size=0.0):
    """Women (pairs, X, Y, Z) and men who share every random draw, so that only sex differs."""
    return [np.stack([made(base, sex, rng, head_size) for rng in rngs(pairs)]) for sex in (0, 1)]


def made(base, sex, rng, head_size=0.0, effect=1.0):
    """A subject of nobody's family."""
    draws = rng.standard_normal(synthetic.DRAWS)
    return subject_volume(base, sex, draws, head_size=head_size, effect=effect, rng=rng)


def rngs(count):
    return [np.random.default_rng([7, number]) for number in range(count)]


@pytest.fixture(scope="module")
def difference(base):
    """Men minus women, the mean of ten pairs."""
    women, men = paired(base, 10)
    return (men - women).mean(0)


def millimetres(image, voxels):
    return nib.affines.apply_affine(image.affine, np.argwhere(voxels))


def test_archives_are_read_by_zipfile_and_nibabel(cohort):
    paths = sorted((cohort / "archives").iterdir())
    assert len(paths) == SUBJECTS
    for path in paths:
        image = image_in(path)
        assert nib.aff2axcodes(image.affine) == ("L", "A", "S")
        assert image.get_data_dtype() == np.float32
        np.testing.assert_allclose(image.affine[:3, 3], (90, -126, -72))
        np.testing.assert_allclose(image.affine[:3, :3], np.diag((-5, 5, 5)))
        fa = image.get_fdata()
        assert np.isfinite(fa).all()
        assert fa.min() == 0 < (fa > 0.02).mean() < 0.5
        assert 0.95 < fa.max() <= 1  # the bright rim


def test_fine_spacing_is_hcps_own_grid(tmp_path, monkeypatch):
    shape, affine = grid(1.25)
    empty = Anatomy(*np.zeros((3, *shape), np.float32), np.zeros(shape, np.int16), affine)
    monkeypatch.setattr(synthetic, "anatomy", lambda spacing, template: empty)
    write_cohort(tmp_path, subjects=1, spacing=1.25)
    (path,) = (tmp_path / "archives").iterdir()
    image = image_in(path)
    assert grid(2.5)[0] == (73, 87, 73)
    assert image.shape == (145, 174, 145)
    expected = [[-1.25, 0, 0, 90], [0, 1.25, 0, -126], [0, 0, 1.25, -72], [0, 0, 0, 1]]
    np.testing.assert_array_equal(image.affine, expected)
    np.testing.assert_array_equal(image.get_qform(), expected)


def test_the_table_is_hcps(cohort):
    table = pd.read_csv(cohort / "unrestricted_behavioral.csv", dtype=str)
    assert table["Gender"].value_counts().to_dict() == {"F": 606, "M": 507}
    assert table["Subject"].is_unique
    assert table["Subject"].str.fullmatch("0[0-9]{5}").all()
    assert set(table["Age"]) == {"22-25", "26-30", "31-35", "36+"}
    imaged = table[table["3T_dMRI_Compl"] == "true"]
    names = {path.name for path in (cohort / "archives").iterdir()}
    assert names == {f"{subject}_3T_Diffusion_FA.zip" for subject in imaged["Subject"]}
    assert imaged["Gender"].value_counts().to_dict() == {"F": 7, "M": 5}  # 12 · 507 / 1113 = 5.5


def test_a_man_in_the_table_has_a_mans_volume(tmp_path, quick, coarse):
    """With heads far apart and nothing else to tell them, volume and Gender go together."""
    write_cohort(tmp_path, subjects=30, spacing=5, head_size=0.6)
    table = pd.read_csv(tmp_path / "unrestricted_behavioral.csv", dtype=str).set_index("Subject")
    sizes = {"F": [], "M": []}
    for path in (tmp_path / "archives").iterdir():
        fa = image_in(path).get_fdata()
        sizes[table.at[path.name.split("_")[0], "Gender"]].append((fa > 0).sum())
    assert max(sizes["F"]) < min(sizes["M"])


def test_extract_takes_them(cohort, tmp_path):
    table = archives.extract(cohort / "archives", tmp_path)
    assert table["status"].tolist() == ["extracted"] * SUBJECTS
    for path in (cohort / "archives").iterdir():
        fa, affine = volumes.load(tmp_path / f"{path.name.split('_')[0]}.nii.gz")
        image = image_in(path)
        np.testing.assert_array_equal(fa, image.get_fdata()[::-1])
        np.testing.assert_allclose(affine @ (0, 0, 0, 1), image.affine @ (fa.shape[0] - 1, 0, 0, 1))


def test_same_seed_same_bytes_whatever_the_workers(cohort, tmp_path, quick):
    write_cohort(tmp_path, subjects=SUBJECTS, spacing=5, workers=1)
    assert checksums(tmp_path) == checksums(cohort)


def test_resumes_to_the_same_bytes(tmp_path, quick, monkeypatch):
    options = {"subjects": SUBJECTS, "spacing": 5, "workers": 1}
    before = checksums(write_cohort(tmp_path / "whole", **options))
    whole, calls = synthetic._write_archive, []

    def interrupted(*arguments):
        calls.append(arguments)
        if len(calls) == 4:
            raise KeyboardInterrupt
        whole(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(synthetic, "_write_archive", interrupted)
        with pytest.raises(KeyboardInterrupt):
            write_cohort(tmp_path / "cut", **options)
    left = checksums(tmp_path / "cut")
    assert len([name for name in left if name.endswith(".zip")]) == 3
    assert "unrestricted_behavioral.csv" not in left  # so no half cohort is read as a whole one
    assert left.items() < before.items()
    assert checksums(write_cohort(tmp_path / "cut", **options)) == before


def test_only_what_is_missing_is_written_again(tmp_path, quick):
    write_cohort(tmp_path, subjects=4, spacing=5)
    before, paths = checksums(tmp_path), sorted((tmp_path / "archives").iterdir())
    paths[1].unlink()
    paths[2].write_bytes(b"kept")
    write_cohort(tmp_path, subjects=4, spacing=5, workers=2)
    assert paths[2].read_bytes() == b"kept"
    paths[2].unlink()
    write_cohort(tmp_path, subjects=4, spacing=5)
    assert checksums(tmp_path) == before


def test_another_seed_gives_other_subjects(cohort, tmp_path, quick):
    write_cohort(tmp_path, subjects=SUBJECTS, spacing=5, seed=1)
    ours, theirs = checksums(cohort), checksums(tmp_path)
    same = {name for name, value in ours.items() if theirs.get(name) == value}
    truth = {str(Path("truth", name)) for name in ("regions.csv", "regions.nii.gz")}
    assert same == truth  # what is planted does not depend on the seed


def test_another_seed_gives_the_same_row_another_volume(cohort, tmp_path, quick, monkeypatch):
    people = population.draw(SUBJECTS, 0)
    monkeypatch.setattr(population, "draw", lambda subjects, seed: people)
    write_cohort(tmp_path, subjects=SUBJECTS, spacing=5, seed=1)
    for path in (cohort / "archives").iterdir():
        first, second = image_in(path), image_in(tmp_path / "archives" / path.name)
        assert (first.get_fdata() != second.get_fdata()).mean() > 0.05


def test_relatives_share_a_part_of_their_anatomy():
    """Correlations of the draws over pairs are the shares of variance that the module states."""
    rows = range(3000)
    pairs = {
        "siblings": pd.DataFrame({"family": 7, "twins": (1, 2), "own": (1, 2)}),
        "identical twins": pd.DataFrame({"family": 7, "twins": 1, "own": (1, 2)}),
        "strangers": pd.DataFrame({"family": (7, 8), "twins": (1, 2), "own": (1, 2)}),
    }
    for name, expected in (("siblings", 0.4), ("identical twins", 0.85), ("strangers", 0.0)):
        drawn = [
            population.anatomical_draws(kin, 0, len(rows)) for _, kin in pairs[name].iterrows()
        ]
        assert np.corrcoef(drawn)[0, 1] == pytest.approx(expected, abs=0.05)
        assert np.std(drawn, axis=1) == pytest.approx(1, abs=0.05)
        drawn = population.correlated(pairs[name] % 2, np.random.default_rng(0), len(rows))
        assert np.corrcoef(drawn)[0, 1] == pytest.approx(expected, abs=0.05)
    some = population.anatomical_draws(pairs["siblings"].loc[0], 0, 5)
    np.testing.assert_array_equal(
        some, population.anatomical_draws(pairs["siblings"].loc[0], 0, 9)[:5]
    )


def test_families_and_twins_are_whole(cohort):
    tables = [pd.read_csv(cohort / f"{name}.csv", dtype=str) for name in
              ("restricted", "unrestricted_behavioral", "unrestricted_hcp_freesurfer")]  # fmt: skip
    assert all((table["Subject"] == tables[0]["Subject"]).all() for table in tables)
    people = tables[0].merge(tables[1], on="Subject")
    assert len(people) == 1113
    assert (people["Gender"] == "M").sum() == 507
    assert people["Family_ID"].nunique() == pytest.approx(1113 / 2.51, rel=0.05)
    sizes = people.groupby("Family_ID").size()
    assert sizes.max() <= 6
    assert people.groupby("Family_ID")["Mother_ID"].nunique().eq(1).all()
    twins = people[people["ZygositySR"] != "NotTwin"].groupby("Family_ID")
    assert twins.size().eq(2).all()
    assert twins["Age_in_Yrs"].nunique().eq(1).all()
    identical = people[people["ZygositySR"] == "MZ"].groupby("Family_ID")
    assert identical["Gender"].nunique().eq(1).all()
    assert 0.1 < identical.ngroups * 2 / len(people) < 0.3
    age = people["Age_in_Yrs"].astype(int)
    women, men = (age[people["Gender"] == sex].mean() for sex in "FM")
    assert 0.7 < women - men < 2.1
    band = people["Age"].str.extract(r"(\d+)\D*(\d*)").replace("", "99").astype(int)
    assert ((band[0] <= age) & (age <= band[1])).all()


def test_families_have_volumes_as_a_whole():
    people = population.draw(200, 0)
    imaged = people.behavioural["3T_dMRI_Compl"] == "true"
    assert imaged.sum() == 200
    assert (people.behavioural["Gender"][imaged] == "M").sum() == round(200 * 507 / 1113)
    by_family = imaged.groupby(people.restricted["Family_ID"])
    assert (by_family.nunique() > 1).sum() <= 2


@pytest.mark.parametrize("count", [1, 2, 1112, 1113, 1200])
def test_any_number_of_subjects_has_volumes(count):
    people = population.draw(count, 3)
    assert (people.behavioural["3T_dMRI_Compl"] == "true").sum() == count
    assert len(people.behavioural) == max(count, 1113)


def test_freesurfer_columns_are_those_of_hcps_export(cohort):
    """The header of HCP's unrestricted FreeSurfer export: 938 names, seven of them twice."""
    with (cohort / "unrestricted_hcp_freesurfer.csv").open() as file:
        header = file.readline().strip()
    names = header.split(",")
    assert len(names) == 938
    assert len(set(names)) == 931
    assert hashlib.sha256(header.encode()).hexdigest()[:16] == "15ddf5284f51688c"
    assert names[:5] == ["Subject", "Release", "Gender", "FS_InterCranial_Vol", "FS_BrainSeg_Vol"]
    assert "FS_R_Cerebellum_Cort_Vol" not in names


def test_freesurfer_measures_are_those_of_brains():
    table = synthetic.freesurfer_table(population.draw(1, 0))
    sex = table["Gender"]
    values = table.loc[:, ~table.columns.duplicated()]
    assert np.isfinite(values.iloc[:, 3:].to_numpy(float)).all()
    assert (values.iloc[:, 3:] >= 0).all().all()
    means = {
        "FS_InterCranial_Vol": (1.45e6, 1.65e6), "FS_L_Hippo_Vol": (4000, 4800),
        "FS_L_Insula_Thck": (2.8, 3.2), "FS_CC_Posterior_Vol": (850, 1050),
        "FS_BrainSegVol_eTIV_Ratio": (0.7, 0.8), "FS_L_Superiorfrontal_Area": (6900, 7900),
    }  # fmt: skip
    for name, (low, high) in means.items():
        assert low < values[name].mean() < high, name
    parts = values["FS_LCort_GM_Vol"] + values["FS_RCort_GM_Vol"]
    np.testing.assert_allclose(parts, values["FS_TotCort_GM_Vol"])
    grey = values.filter(regex="^FS_L_.*_GrayVol$").sum(axis=1)
    np.testing.assert_allclose(grey, values["FS_LCort_GM_Vol"])
    span = values["FS_L_Caudate_Max"] - values["FS_L_Caudate_Min"]
    np.testing.assert_allclose(span, values["FS_L_Caudate_Range"])
    size = values["FS_InterCranial_Vol"]
    assert size[sex == "M"].mean() / size[sex == "F"].mean() == pytest.approx(1.12, abs=0.02)
    assert values["FS_BrainSeg_Vol"].corr(size) > 0.8
    assert abs(values["FS_L_Insula_Thck"].corr(size)) < 0.2
    left, right = values["FS_L_Putamen_Vol"], values["FS_R_Putamen_Vol"]
    assert left.corr(right) > 0.7


def test_without_effect_the_sexes_differ_in_head_size_alone(coarse):
    women, men = (np.stack([made(coarse, s, rng, effect=0) for rng in rngs(4)]) for s in (0, 1))
    np.testing.assert_array_equal(women, men)
    people = population.draw(1, 0)
    rows = people.behavioural["Gender"].map({"F": 0, "M": 1}).to_numpy()
    same, other = (
        synthetic.freesurfer_table(people, head_size=0, effect=effect).filter(regex="_Thck$")
        for effect in (0, 1)
    )

    def squared(table):
        """Mean over regions of Cohen's d, squared; by chance 1/507 + 1/606."""
        women, men = table[rows == 0], table[rows == 1]
        return (((men.mean() - women.mean()) / table.std()) ** 2).mean()

    assert squared(same) < 0.008
    assert squared(other) == pytest.approx(0.14**2 + 1 / 507 + 1 / 606, rel=0.6)


def test_the_same_people_as_if_only_their_heads_differed(cohort, tmp_path):
    alike = synthetic.head_size_alone(cohort, tmp_path / "alike")
    ours, theirs = (
        pd.read_csv(folder / "unrestricted_hcp_freesurfer.csv", dtype={"Subject": str})
        for folder in (cohort, alike)
    )
    assert (alike / "SYNTHETIC").is_file()
    for name in ("Subject", "Gender", "FS_InterCranial_Vol"):
        pd.testing.assert_series_equal(ours[name], theirs[name])
    assert (ours["FS_L_Insula_Thck"] != theirs["FS_L_Insula_Thck"]).mean() > 0.9
    restricted = [(folder / "restricted.csv").read_bytes() for folder in (cohort, alike)]
    assert restricted[0] == restricted[1]
    with pytest.raises(FileNotFoundError, match="no synthetic cohort"):
        synthetic.head_size_alone(tmp_path, tmp_path / "other")


def test_relatives_resemble_each_other_in_the_table():
    people = population.draw(1, 0)
    size = np.log(synthetic.freesurfer_table(people)["FS_L_Insula_Area"])
    size -= size.groupby(people.behavioural["Gender"]).transform("mean")
    kind = people.restricted["ZygositySR"]
    pairs = size[kind == "MZ"].groupby(people.restricted["Family_ID"]).agg(["first", "last"])
    assert pairs["first"].corr(pairs["last"]) > 0.7
    other = size[kind == "NotTwin"].groupby(people.restricted["Family_ID"]).agg(["first", "last"])
    other = other[other["first"] != other["last"]]
    assert 0.2 < other["first"].corr(other["last"]) < 0.6


def test_volume_and_table_agree_on_the_head(tmp_path):
    cohort = write_cohort(tmp_path / "c", subjects=8, spacing=5)
    table = pd.read_csv(cohort / "unrestricted_hcp_freesurfer.csv", dtype={"Subject": str})
    table = table.set_index("Subject")["FS_InterCranial_Vol"]
    archives_ = sorted((cohort / "archives").iterdir())
    volume = [(image_in(path).get_fdata() > 0.02).sum() for path in archives_]
    assert np.corrcoef(volume, table[[path.name[:6] for path in archives_]])[0, 1] > 0.9


@pytest.mark.parametrize(("head_size", "expected"), [(0.0, 0.0), (0.12, 0.12)])
def test_head_size_is_the_difference_of_brain_volumes(coarse, head_size, expected):
    women, men = ((v > 0.02).sum() for v in paired(coarse, 6, head_size))
    assert (men - women) / (men + women) * 2 == pytest.approx(expected, abs=0.012)


@pytest.mark.parametrize("fa", [0.05, 0.6])
def test_noise_biases_low_values_upwards(coarse, fa):
    """The mean of Rice's distribution, where everything but noise and variation is constant."""
    flat = Anatomy(fa * coarse.mask, coarse.mask, 0 * coarse.effect, coarse.labels, coarse.affine)
    found = np.stack([made(flat, 0, rng) for rng in rngs(12)])
    inside = binary_erosion(coarse.mask > 0, iterations=3)
    expected = rice(0.9 * fa / 0.05, scale=0.05).mean()
    assert found[:, inside].mean() == pytest.approx(expected, rel=0.03)


def test_planted_effects_have_their_sign_and_place(base, difference, cohort):
    labels = base.labels
    assert len(np.unique(labels)) == 9
    regions = pd.read_csv(cohort / "truth/regions.csv")
    assert set(np.sign(regions["fa_men_minus_women"])) == {-1, 1}
    for region in regions.itertuples():
        inside = labels == region.label
        share = difference[inside].mean() / region.fa_men_minus_women
        assert 0.45 < share < 0.85, region.name  # smeared by the deformation
        mirrored = inside[::-1]
        if region.name.split()[0] in ("left", "right"):
            assert abs(difference[mirrored].mean()) < 0.02, region.name
    away = (np.abs(base.effect) == 0) & (base.mask > 0)
    assert abs(difference[away].mean()) < 0.002


def test_what_a_deformation_does_to_the_truth(base, difference):
    """The module's docstring and region_table's state these figures."""
    indices, truth = np.indices(base.fa.shape), base.labels > 0
    for head_size, expected in ((0.0, 2.5), (synthetic.HEAD_SIZE, 2.7)):
        displacements, overlaps = [], []
        for row in range(24):
            draws = np.random.default_rng([0, row]).standard_normal(synthetic.DRAWS)
            head = synthetic.head_volume(row % 2, head_size, draws[0])
            fields = draws[2:].reshape(4, *synthetic.FIELD)
            position = synthetic._position(base, head, fields[:3])
            moved = np.stack([p - i for p, i in zip(position, indices)]) * 2.5
            displacements.append(np.median(np.linalg.norm(moved, axis=0)[base.mask > 0]))
            own = map_coordinates(truth.astype(float), position, order=1) > 0.5
            overlaps.append(2 * (own & truth).sum() / (own.sum() + truth.sum()))
        assert np.median(displacements) == pytest.approx(expected, abs=0.25)
        assert np.mean(overlaps) == pytest.approx(0.76, abs=0.02)
        assert np.std(overlaps) == pytest.approx(0.05, abs=0.015)
    left = [
        (difference[base.labels == k] / base.effect[base.labels == k].mean()).mean()
        for k in range(1, 9)
    ]
    assert np.mean(left) == pytest.approx(0.7, abs=0.05)


def test_truth_lies_where_its_table_says(cohort):
    image = nib.load(cohort / "truth/regions.nii.gz")
    assert nib.aff2axcodes(image.affine) == ("L", "A", "S")
    labels = np.asarray(image.dataobj)
    regions = pd.read_csv(cohort / "truth/regions.csv")
    assert regions.columns.tolist() == [
        *("label", "name", "fa_men_minus_women", "x_mm", "y_mm", "z_mm", "volume_ml")
    ]
    for region in regions.itertuples():
        where = millimetres(image, labels == region.label)
        centre = (region.x_mm, region.y_mm, region.z_mm)
        assert np.linalg.norm(where.mean(0) - centre) < 5, region.name  # one voxel
        assert region.volume_ml == pytest.approx(len(where) * 0.125, abs=1e-3)
        if region.name.startswith("left"):
            assert where[:, 0].max() < 0, region.name
        if region.name.startswith("right"):
            assert where[:, 0].min() > 0, region.name


def test_load_truth_is_the_image_in_ras(cohort):
    stored = np.asarray(nib.load(cohort / "truth/regions.nii.gz").dataobj)
    labels, regions = load_truth(cohort, stored.shape)
    np.testing.assert_array_equal(labels, stored[::-1])
    reduced, _ = load_truth(cohort, (30, 36, 30))
    assert reduced.shape == (30, 36, 30)
    for region in regions.itertuples():
        if region.name.startswith("left"):
            assert np.argwhere(reduced == region.label)[:, 0].max() < 15
    with pytest.raises(FileNotFoundError, match="only synthetic cohorts"):
        load_truth(cohort / "archives")


def test_the_marker_comes_first(tmp_path, quick, monkeypatch):
    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(synthetic, "_nifti", fail)
    with pytest.raises(OSError, match="disk full"):
        write_cohort(tmp_path / "new", subjects=1, spacing=5)
    assert list(checksums(tmp_path / "new")) == ["SYNTHETIC"]


def test_refuses_a_folder_that_is_not_synthetic(tmp_path, quick):
    (tmp_path / "unrestricted_behavioral.csv").write_text("Subject,Gender\n100000,M\n")
    before = checksums(tmp_path)
    with pytest.raises(ValueError, match="not a synthetic cohort"):
        write_cohort(tmp_path, subjects=1, spacing=5)
    assert checksums(tmp_path) == before


@pytest.mark.parametrize(
    "other",
    [{"seed": 1}, {"subjects": 2}, {"head_size": 0}, {"spacing": 6}, {"template": __file__}],
)
def test_refuses_a_cohort_of_other_options(tmp_path, quick, other):
    options = {"subjects": 1, "spacing": 5}
    write_cohort(tmp_path, **options)
    before = checksums(tmp_path)
    with pytest.raises(ValueError, match=r"other options.*SYNTHETIC"):
        write_cohort(tmp_path, **options | other)
    assert checksums(tmp_path) == before


@pytest.mark.parametrize(
    "options", [{"subjects": 0}, {"spacing": 0}, {"spacing": float("nan")}, {"head_size": 2}]
)
def test_refuses_options_out_of_range(tmp_path, options):
    with pytest.raises(ValueError, match=re.escape(f"{next(iter(options))}=")):
        write_cohort(tmp_path / "new", **options)
    assert not (tmp_path / "new").exists()


def save_template(path, fa, affine, scale=1.0, las=False):
    fa = (fa * scale).astype(np.float32 if scale == 1 else np.int16)
    if las:
        flip = np.diag([-1.0, 1, 1, 1])
        flip[0, 3] = fa.shape[0] - 1
        fa, affine = fa[::-1], affine @ flip
    nib.save(nib.Nifti1Image(fa, affine), path)
    return path


@pytest.mark.parametrize(("scale", "las"), [(1.0, False), (1.0, True), (10_000, True)])
def test_a_template_is_taken_as_it_lies(tmp_path, coarse, scale, las):
    """Among them one stored as FSL's FMRIB58_FA: whole numbers up to 10,000."""
    path = save_template(tmp_path / "t.nii.gz", coarse.fa, coarse.affine, scale, las)
    made = anatomy(5, path)
    np.testing.assert_allclose(made.fa, coarse.fa, atol=0.021)  # below 0.02 is no brain
    assert np.abs(made.fa - coarse.fa)[coarse.fa > 0.021].max() < 2e-4
    np.testing.assert_array_equal(made.labels, coarse.labels)


def test_a_cohort_from_a_template(tmp_path, coarse):
    path = save_template(tmp_path / "t.nii.gz", coarse.fa * 0.5, coarse.affine)
    cohort = write_cohort(tmp_path / "c", subjects=1, spacing=5, template=path)
    (archive,) = (cohort / "archives").iterdir()
    fa = image_in(archive).get_fdata()
    assert 0.3 < np.median(fa[fa > 0.02]) / np.median(coarse.fa[coarse.fa > 0.02]) < 0.7
    save_template(path, coarse.fa, coarse.affine)  # another one under the same name
    with pytest.raises(ValueError, match="other options"):
        write_cohort(tmp_path / "c", subjects=1, spacing=5, template=path)


def test_bad_templates(tmp_path, coarse):
    with pytest.raises(FileNotFoundError, match=r"absent\.nii"):
        write_cohort(tmp_path / "c", template=tmp_path / "absent.nii")
    elsewhere = coarse.affine.copy()
    elsewhere[1, 3] += 500
    path = save_template(tmp_path / "t.nii", coarse.fa, elsewhere)
    with pytest.raises(ValueError, match=r"t\.nii is not a brain in MNI"):
        write_cohort(tmp_path / "c", template=path)
    path = save_template(tmp_path / "t.nii", -coarse.fa, coarse.affine)
    with pytest.raises(ValueError, match=r"t\.nii: .*empty volume"):
        write_cohort(tmp_path / "c", template=path)
    assert not (tmp_path / "c").exists()


def test_memory_does_not_grow_with_the_subjects(tmp_path, quick):
    """What numpy holds at the peak; a process's whole size would hide 40 volumes of 5 mm."""
    peaks = []
    for subjects in (8, 40):
        tracemalloc.start()
        write_cohort(tmp_path / str(subjects), subjects=subjects, spacing=5, workers=1)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] == pytest.approx(peaks[0], rel=0.1)


@pytest.fixture
def real():
    folder = os.environ.get("BRAINSEX_REAL_FA")
    if not folder:
        pytest.skip("BRAINSEX_REAL_FA, the folder of two real FA volumes, is unset")
    return Path(folder)


def brain(fa):
    return fa[fa > 0.02]


def test_values_are_distributed_as_in_real_volumes(real, base):
    template = nib.load(real / "template_FA_1.25mm.nii.gz").get_fdata()
    assert wasserstein_distance(brain(base.fa), brain(template)) < 0.01
    subject = nib.load(real / "subject_FA_2.5mm.nii.gz").get_fdata()
    ours = made(base, 1, np.random.default_rng(0), head_size=0.12)
    assert wasserstein_distance(brain(ours), brain(subject)) < 0.025


def test_a_cohort_from_the_real_template(real, tmp_path):
    path = real / "template_FA_1.25mm.nii.gz"
    cohort = write_cohort(tmp_path / "c", subjects=1, spacing=5, head_size=0, template=path)
    (archive,) = (cohort / "archives").iterdir()
    ours = np.asarray(image_in(archive).dataobj)
    template = nib.load(path).get_fdata()[::4, ::4, ::4][:36, :44, :36]  # LAS too, same origin
    assert np.corrcoef(ours.ravel(), template.ravel())[0, 1] > 0.8
    assert np.corrcoef(ours[::-1].ravel(), template.ravel())[0, 1] < 0.8  # not flipped
