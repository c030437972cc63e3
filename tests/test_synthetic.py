"""The synthetic cohort: what lies on disk, what is planted, that one seed gives it again."""

import gzip
import hashlib
import io
import zipfile
from unittest.mock import Mock

import nibabel as nib
import numpy as np
import pandas as pd
import pytest

from brainsex import archives, diffusion, volumes
from brainsex.synthetic import head_size_alone, load_truth, template, write_cohort, writing


@pytest.fixture(scope="module")
def coarse():
    return template.make_anatomy(5)


@pytest.fixture(scope="module")
def fine():
    return template.make_anatomy(2.5)


@pytest.fixture(scope="module")
def cohort(coarse, tmp_path_factory):
    """A cohort at 5 mm, whose anatomy is made once for every cohort."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(writing, "make_anatomy", lambda spacing: coarse)
        yield write_cohort(tmp_path_factory.mktemp("synthetic") / "c", subjects=12, spacing=5)


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
            assert name == f"{path.name.split('_')[0]}/T1w/Diffusion/dti_FA.nii.gz"
            return nib.Nifti1Image.from_bytes(gzip.decompress(archive.read(name)))


def test_fa_is_fitted_back_from_the_diffusion_packages(cohort, tmp_path, coarse, monkeypatch):
    pytest.importorskip("dipy")
    monkeypatch.setattr(writing, "make_anatomy", lambda spacing: coarse)
    write_cohort(tmp_path / "c", subjects=12, spacing=5, diffusion=1)
    packages = sorted((tmp_path / "c/archives").glob("*_3T_Diffusion_preproc.zip"))
    assert len(packages) == 1
    subject = packages[0].name.split("_")[0]
    with zipfile.ZipFile(packages[0]) as archive:
        names = "data.nii.gz bvals bvecs nodif_brain_mask.nii.gz".split()
        assert {*archive.namelist()} == {f"{subject}/T1w/Diffusion/{name}" for name in names}
        bvals = archive.read(f"{subject}/T1w/Diffusion/bvals").split()
    assert {*bvals} == {b"5", b"1000", b"2000", b"3000"}
    diffusion.fit_folder(tmp_path / "c", tmp_path / "fa", workers=1)
    fitted = volumes.load(tmp_path / "fa" / f"{subject}.nii.gz")[0]
    image = nib.as_closest_canonical(image_in(cohort / f"archives/{subject}_3T_Diffusion_FA.zip"))
    np.testing.assert_allclose(fitted, image.get_fdata(), atol=0.01)


def make_pairs(anatomy, pairs, *, head_size=0.0, effect=1.0):
    """Women (pairs, X, Y, Z) and men who share every random draw, so that only sex differs."""
    subjects = np.empty((2, pairs, *anatomy[1].shape), np.float32)
    for sex, pair in np.ndindex(2, pairs):
        rng = np.random.default_rng([7, pair])
        draws = rng.standard_normal(writing.DRAWS)
        head = writing._head_volume(sex, head_size, draws[0])
        args = anatomy, head, draws, effect * (sex - 0.5), rng
        subjects[sex, pair] = writing._subject_volume(*args)
    return subjects


def test_archives_are_read_by_zipfile_and_nibabel_and_extracted(cohort, tmp_path):
    paths = sorted((cohort / "archives").iterdir())
    assert len(paths) == 12
    archives.extract(cohort / "archives", tmp_path)
    for path in paths:
        image = image_in(path)
        assert image.get_data_dtype() == np.float32
        np.testing.assert_allclose(image.affine[:3, 3], (90, -126, -72))
        np.testing.assert_allclose(image.affine[:3, :3], np.diag((-5, 5, 5)))
        np.testing.assert_array_equal(image.get_qform(), image.affine)
        fa = image.get_fdata()
        assert np.isfinite(fa).all()
        assert fa.min() == 0
        assert (fa > 0.02).mean() < 0.5
        assert 0.95 < fa.max() <= 1  # the bright rim
        extracted, affine = volumes.load(tmp_path / f"{path.name.split('_')[0]}.nii.gz")
        np.testing.assert_array_equal(extracted, fa[::-1])
        np.testing.assert_allclose(affine[:, 3], image.affine @ (fa.shape[0] - 1, 0, 0, 1))


def test_same_seed_same_bytes_whatever_the_workers_or_what_is_there_already(cohort, tmp_path):
    (tmp_path / "archives").mkdir()
    (tmp_path / "SYNTHETIC").touch()
    first = min((cohort / "archives").iterdir())
    kept = tmp_path / "archives" / first.name
    kept.write_bytes(b"kept")
    write_cohort(tmp_path, workers=1, subjects=12, spacing=5)
    assert kept.read_bytes() == b"kept"
    kept.write_bytes(first.read_bytes())
    assert checksums(tmp_path) == checksums(cohort)


def test_a_killed_run_leaves_a_marker_and_no_table_of_people(cohort, tmp_path, monkeypatch):
    three = iter([writing._write_archive] * 3)
    interrupted = Mock(side_effect=lambda *a: next(three, Mock(side_effect=KeyboardInterrupt))(*a))
    monkeypatch.setattr(writing, "_write_archive", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_cohort(tmp_path, subjects=12, spacing=5, workers=1)
    assert len(list((tmp_path / "archives").iterdir())) == 3
    assert (tmp_path / "SYNTHETIC").is_file()
    assert not list(tmp_path.glob("*.csv"))  # so no half cohort is read as a whole one


def test_refuses_a_folder_of_anything_else_or_of_other_options(cohort, tmp_path, monkeypatch):
    monkeypatch.setattr(writing, "_freesurfer_table", lambda people, **_: people[["Subject"]])
    (tmp_path / "unrestricted_behavioral.csv").write_text("Subject,Gender\n100000,M\n")
    before = checksums(tmp_path)
    with pytest.raises(ValueError, match="or a synthetic cohort"):
        write_cohort(tmp_path, subjects=1, spacing=5, overwrite=True)
    assert checksums(tmp_path) == before
    options = {"subjects": 1, "spacing": 5}
    before = checksums(write_cohort(tmp_path / "c", **options))
    for other in ({"seed": 1}, {"subjects": 2}, {"head_size": 0}):
        with pytest.raises(ValueError, match=f"synthesize with {next(iter(other))}"):
            write_cohort(tmp_path / "c", **options | other)
        assert checksums(tmp_path / "c") == before
    anew = checksums(write_cohort(tmp_path / "c", **options | {"seed": 1}, overwrite=True))
    assert anew == checksums(write_cohort(tmp_path / "d", **options | {"seed": 1}))
    same = {name for name in before if anew.get(name) == before[name]}
    assert same == {"truth/regions.nii.gz", "truth/regions.csv"}


@pytest.mark.parametrize(
    "options", [{"subjects": 0}, {"spacing": 0}, {"spacing": float("nan")}, {"head_size": 2}]
)
def test_refuses_options_out_of_range(tmp_path, options):
    with pytest.raises(ValueError, match=f"found .*{next(iter(options))}"):
        write_cohort(tmp_path / "new", **options)
    assert not (tmp_path / "new").exists()


def test_the_tables_are_hcps(cohort):
    behavioural, restricted, freesurfer = (
        pd.read_csv(cohort / f"{name}.csv", dtype=str)
        for name in ("unrestricted_behavioral", "restricted", "unrestricted_hcp_freesurfer")
    )
    people = behavioural["Subject"]
    assert people.tolist() == restricted["Subject"].tolist() == freesurfer["Subject"].tolist()
    assert people.is_unique
    assert people.str.fullmatch("0[0-9]{5}").all()
    assert behavioural["Gender"].value_counts().to_dict() == {"F": 606, "M": 507}
    with (cohort / "unrestricted_hcp_freesurfer.csv").open() as file:  # 938 names, seven twice
        header = file.readline().strip()
    assert hashlib.sha256(header.encode()).hexdigest()[:16] == "15ddf5284f51688c"  # of HCP's export
    imaged = behavioural[behavioural["3T_dMRI_Compl"] == "true"]
    names = {path.name for path in (cohort / "archives").iterdir()}
    assert names == {f"{subject}_3T_Diffusion_FA.zip" for subject in imaged["Subject"]}
    assert imaged["Gender"].value_counts().to_dict() == {"F": 7, "M": 5}  # 12 · 507 / 1113 = 5.5
    band = behavioural["Age"].str.extract(r"(\d+)\D*(\d*)").replace("", "99").astype(int)
    age = restricted["Age_in_Yrs"].astype(int)
    assert ((band[0] <= age) & (age <= band[1])).all()
    women, men = (age[behavioural["Gender"] == sex].mean() for sex in "FM")
    assert 0.7 < women - men < 2.1


def test_families_and_twins_are_whole():
    table = writing._draw_people(200, 0)
    families = table.groupby("Family_ID")
    assert families.ngroups == pytest.approx(1113 / 2.51, rel=0.05)
    assert families.size().max() <= 6
    twins = table[table["ZygositySR"] != "NotTwin"].groupby("Family_ID")
    assert twins.size().eq(2).all()
    assert twins["Age_in_Yrs"].nunique().eq(1).all()
    identical = table[table["ZygositySR"] == "MZ"].groupby("Family_ID")
    assert identical["Gender"].nunique().eq(1).all()
    assert 0.1 < identical.ngroups * 2 / len(table) < 0.3
    imaged = table["3T_dMRI_Compl"] == "true"
    assert (table["Gender"][imaged] == "M").sum() == round(200 * 507 / 1113)
    assert (imaged.groupby(table["Family_ID"]).nunique() > 1).sum() <= 2
    more = writing._draw_people(1200, 3)  # than HCP has
    assert (more["3T_dMRI_Compl"] == "true").sum() == len(more) == 1200


@pytest.mark.parametrize(
    ("kin", "expected"),
    [
        ({"family": (0, 0), "twins": (0, 1), "own": (0, 1)}, 0.4),
        ({"family": (0, 0), "twins": (0, 0), "own": (0, 1)}, 0.85),
        ({"family": (0, 1), "twins": (0, 1), "own": (0, 1)}, 0.0),
    ],
    ids=["siblings", "identical twins", "strangers"],
)
def test_relatives_share_a_part_of_their_anatomy(kin, expected):
    """Correlations of the draws over pairs are the shares of variance that the module states."""
    kin = pd.DataFrame(kin)
    draws = [writing._anatomical_draws(person, 0, 3000) for _, person in kin.iterrows()]
    for values in (draws, writing._correlated_draws(kin, np.random.default_rng(0), 3000)):
        assert np.corrcoef(values)[0, 1] == pytest.approx(expected, abs=0.05)
        assert np.std(values, axis=1) == pytest.approx(1, abs=0.05)
    np.testing.assert_array_equal(writing._anatomical_draws(kin.loc[0], 0, 5), draws[0][:5])


def test_freesurfer_measures_are_those_of_brains_and_of_relatives():
    relations = writing._draw_people(1, 0)
    table = writing._freesurfer_table(relations)
    sex, values = table["Gender"], table.loc[:, ~table.columns.duplicated()]
    assert values.iloc[:, 3:].stack().between(0, 1e8).all()  # no blanks among them
    grey = values.filter(regex="^FS_L_.*_GrayVol$").sum(axis=1)
    np.testing.assert_allclose(grey, values["FS_LCort_GM_Vol"])
    span = values["FS_L_Caudate_Max"] - values["FS_L_Caudate_Min"]
    np.testing.assert_allclose(span, values["FS_L_Caudate_Range"])
    size = values["FS_InterCranial_Vol"]
    assert size[sex == "M"].mean() / size[sex == "F"].mean() == pytest.approx(1.12, abs=0.02)
    assert values["FS_BrainSeg_Vol"].corr(size) > 0.8
    assert abs(values["FS_L_Insula_Thck"].corr(size)) < 0.2
    area = np.log(table["FS_L_Insula_Area"])
    area -= area.groupby(sex).transform("mean")
    for kind, low, high in (("MZ", 0.7, 1), ("NotTwin", 0.2, 0.6)):
        relatives = area[relations["ZygositySR"] == kind].groupby(relations["Family_ID"])
        pairs = relatives.agg(["first", "last"])[relatives.size() > 1]
        assert low < pairs["first"].corr(pairs["last"]) < high


def test_without_effect_the_sexes_differ_in_head_size_alone(coarse):
    women, men = make_pairs(coarse, 4, effect=0)
    np.testing.assert_array_equal(women, men)
    relations = writing._draw_people(1, 0)
    swapped = relations.assign(Gender=relations["Gender"].map({"F": "M", "M": "F"}))
    for effect, expected in ((0, 0), (1, 0.14)):
        tables = [
            writing._freesurfer_table(p, head_size=0, effect=effect) for p in (relations, swapped)
        ]
        first, second = (table.filter(regex="_Thck$") for table in tables)
        d = (first - second).abs().mean() / first.std()  # Cohen's
        assert np.sqrt((d**2).mean()) == pytest.approx(expected, abs=0.03)


def test_the_same_people_as_if_only_their_heads_differed(cohort, tmp_path):
    alike = head_size_alone(cohort, tmp_path / "alike")
    ours, theirs = (
        pd.read_csv(folder / "unrestricted_hcp_freesurfer.csv", dtype={"Subject": str})
        for folder in (cohort, alike)
    )
    assert (alike / "SYNTHETIC").is_file()
    for name in ("Subject", "Gender", "FS_InterCranial_Vol"):
        pd.testing.assert_series_equal(ours[name], theirs[name])
    assert (ours["FS_L_Insula_Thck"] != theirs["FS_L_Insula_Thck"]).mean() > 0.9
    assert (cohort / "restricted.csv").read_bytes() == (alike / "restricted.csv").read_bytes()
    with pytest.raises(FileNotFoundError, match="SYNTHETIC"):  # of a real cohort
        head_size_alone(tmp_path, tmp_path / "other")


def test_a_volume_and_its_row_of_the_table_have_the_same_head(cohort):
    table = pd.read_csv(cohort / "unrestricted_hcp_freesurfer.csv", dtype={"Subject": str})
    sizes = {p.name[:6]: (image_in(p).get_fdata() > 0).sum() for p in cohort.glob("archives/*")}
    brain, head = 125 * pd.Series(sizes, dtype=float), table.set_index("Subject")
    assert brain.corr(head["FS_InterCranial_Vol"]) > 0.9  # 0.2 with heads of the other sex
    assert (head["FS_InterCranial_Vol"] / brain).dropna().between(1, 1.2).all()


@pytest.mark.parametrize("head_size", [0.0, 0.12])
def test_head_size_is_the_difference_of_brain_volumes(coarse, head_size):
    women, men = ((v > 0.02).sum() for v in make_pairs(coarse, 6, head_size=head_size))
    assert (men - women) / (men + women) * 2 == pytest.approx(head_size, abs=0.012)


def test_planted_effects_have_their_sign_and_place(fine, cohort):
    (_, mask, effect), labels, _ = fine
    women, men = make_pairs(fine, 5)
    difference = (men - women).mean(0)
    regions = pd.read_csv(cohort / "truth/regions.csv")
    assert len(np.unique(labels)) == 9
    assert set(np.sign(regions["fa_men_minus_women"])) == {-1, 1}
    shares = []
    for region in regions.itertuples():
        inside = labels == region.label
        share = difference[inside].mean() / region.fa_men_minus_women
        assert 0.45 < share < 0.85, region.name  # smeared by the deformation
        shares.append((difference[inside] / effect[inside].mean()).mean())
        if region.name.split()[0] in ("left", "right"):
            assert abs(difference[inside[::-1]].mean()) < 0.02, region.name
    assert np.mean(shares) == pytest.approx(0.7, abs=0.05)  # as the template's docstring states
    assert abs(difference[(effect == 0) & (mask > 0)].mean()) < 0.002


def test_truth_lies_where_its_table_says(cohort):
    image = nib.load(cohort / "truth/regions.nii.gz")
    stored = np.asarray(image.dataobj)
    labels, regions = load_truth(cohort, stored.shape)
    np.testing.assert_array_equal(labels, stored)
    reduced, _ = load_truth(cohort, (30, 36, 30))
    share = (reduced > 0).mean() / (labels > 0).mean()  # a voxel is a region's if half of it is
    assert share == pytest.approx(1, abs=0.4)
    names = "label name fa_men_minus_women x_mm y_mm z_mm volume_ml"
    assert regions.columns.tolist() == names.split()
    for region in regions.itertuples():
        places = nib.affines.apply_affine(image.affine, np.argwhere(stored == region.label))
        centre = (region.x_mm, region.y_mm, region.z_mm)
        assert np.linalg.norm(places.mean(0) - centre) < 5, region.name  # one voxel
        assert region.volume_ml == pytest.approx(len(places) * 0.125, abs=1e-3)
        side = {"left": -1, "right": 1}.get(region.name.split()[0])
        if side:
            assert (side * places[:, 0] > 0).all(), region.name
            assert (side * (np.argwhere(reduced == region.label)[:, 0] - 14.5) > 0).all()
    with pytest.raises(FileNotFoundError, match=r"regions\.csv"):
        load_truth(cohort / "archives")
