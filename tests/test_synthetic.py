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

from brainsex import archives, synthetic, volumes
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
    files = (path for path in folder.rglob("*") if path.is_file())
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
    return [
        np.stack([subject_volume(base, sex, head_size=head_size, rng=rng) for rng in rngs(pairs)])
        for sex in (0, 1)
    ]


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
    table = synthetic.behavioural_table(SUBJECTS, 0)
    monkeypatch.setattr(synthetic, "behavioural_table", lambda subjects, seed: table)
    write_cohort(tmp_path, subjects=SUBJECTS, spacing=5, seed=1)
    for path in (cohort / "archives").iterdir():
        first, second = image_in(path), image_in(tmp_path / "archives" / path.name)
        assert (first.get_fdata() != second.get_fdata()).mean() > 0.05


@pytest.mark.parametrize(("head_size", "expected"), [(0.0, 0.0), (0.12, 0.12)])
def test_head_size_is_the_difference_of_brain_volumes(coarse, head_size, expected):
    women, men = ((v > 0.02).sum() for v in paired(coarse, 6, head_size))
    assert (men - women) / (men + women) * 2 == pytest.approx(expected, abs=0.012)


@pytest.mark.parametrize("fa", [0.05, 0.6])
def test_noise_biases_low_values_upwards(coarse, fa):
    """The mean of Rice's distribution, where everything but noise and variation is constant."""
    flat = Anatomy(fa * coarse.mask, coarse.mask, 0 * coarse.effect, coarse.labels, coarse.affine)
    found = np.stack([subject_volume(flat, 0, head_size=0, rng=rng) for rng in rngs(12)])
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
    for head_size, expected in ((0.0, 2.6), (synthetic.HEAD_SIZE, 2.8)):
        displacements, overlaps = [], []
        for row in range(12):
            rng = np.random.default_rng([0, row])
            position = synthetic._position(base, row % 2, head_size, rng)
            moved = np.stack([p - i for p, i in zip(position, indices)]) * 2.5
            displacements.append(np.median(np.linalg.norm(moved, axis=0)[base.mask > 0]))
            own = map_coordinates(truth.astype(float), position, order=1) > 0.5
            overlaps.append(2 * (own & truth).sum() / (own.sum() + truth.sum()))
        assert np.median(displacements) == pytest.approx(expected, abs=0.25)
        assert np.mean(overlaps) == pytest.approx(0.75, abs=0.02)
        assert 0.66 < min(overlaps) < max(overlaps) < 0.81
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

    monkeypatch.setattr(synthetic, "_write_truth", fail)
    with pytest.raises(OSError, match="disk full"):
        write_cohort(tmp_path / "new", subjects=1, spacing=5)
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["SYNTHETIC"]


def test_refuses_a_folder_that_is_not_synthetic(tmp_path, quick):
    (tmp_path / "unrestricted_behavioral.csv").write_text("Subject,Gender\n100000,M\n")
    before = checksums(tmp_path)
    with pytest.raises(ValueError, match="not a synthetic cohort"):
        write_cohort(tmp_path, subjects=1, spacing=5)
    assert checksums(tmp_path) == before


@pytest.mark.parametrize(
    "other", [{"seed": 1}, {"subjects": 2}, {"head_size": 0}, {"spacing": 6}, {"template": "t.nii"}]
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
    made = subject_volume(base, 1, head_size=0.12, rng=np.random.default_rng(0))
    assert wasserstein_distance(brain(made), brain(subject)) < 0.025


def test_a_cohort_from_the_real_template(real, tmp_path):
    path = real / "template_FA_1.25mm.nii.gz"
    cohort = write_cohort(tmp_path / "c", subjects=1, spacing=5, head_size=0, template=path)
    (archive,) = (cohort / "archives").iterdir()
    made = np.asarray(image_in(archive).dataobj)
    template = nib.load(path).get_fdata()[::4, ::4, ::4][:36, :44, :36]  # LAS too, same origin
    assert np.corrcoef(made.ravel(), template.ravel())[0, 1] > 0.8
    assert np.corrcoef(made[::-1].ravel(), template.ravel())[0, 1] < 0.8  # not flipped
