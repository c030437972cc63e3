"""The synthetic cohort: what lies on disk, what is planted, that one seed gives it again."""

import gzip
import hashlib
import io
import re
import zipfile

import nibabel as nib
import numpy as np
import pandas as pd
import pytest
from scipy.ndimage import binary_erosion, map_coordinates
from scipy.stats import rice

from brainsex import archives, synthetic, volumes
from brainsex.synthetic import freesurfer_table, load_truth, write_cohort, writing
from brainsex.synthetic.people import anatomical_draws, correlated_draws, draw_people
from brainsex.synthetic.template import Anatomy, hcp_grid, make_anatomy
from brainsex.synthetic.writing import subject_volume

SUBJECTS = 12


@pytest.fixture(scope="module")
def coarse():
    return make_anatomy(5)


@pytest.fixture(scope="module")
def base():
    return make_anatomy(2.5)


@pytest.fixture(scope="module", autouse=True)
def quick(coarse):
    """The anatomy at 5 mm, made once instead of for every cohort."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(writing, "make_anatomy", lambda spacing, template: coarse)
        yield


@pytest.fixture
def no_measures(monkeypatch):
    monkeypatch.setattr(writing, "freesurfer_table", lambda people, **_: people[["Subject"]])


@pytest.fixture(scope="module")
def cohort(quick, tmp_path_factory):
    return write_cohort(tmp_path_factory.mktemp("synthetic") / "c", subjects=SUBJECTS, spacing=5)


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


def make_subject(base, sex, rng, head_size=0.0, effect=1.0):
    """A subject of nobody's family."""
    return subject_volume(base, sex, rng.standard_normal(writing.DRAWS), head_size, effect, rng)


def make_pairs(base, pairs, **options):
    """Women (pairs, X, Y, Z) and men who share every random draw, so that only sex differs."""
    rngs = [[np.random.default_rng([7, n]) for n in range(pairs)] for _ in range(2)]
    return [
        np.stack([make_subject(base, sex, rng, **options) for rng in rngs[sex]]) for sex in (0, 1)
    ]


# ------------------------------------------------------------------------------- files on the disk


def test_archives_are_read_by_zipfile_and_nibabel_and_extracted(cohort, tmp_path):
    paths = sorted((cohort / "archives").iterdir())
    assert len(paths) == SUBJECTS
    table = archives.extract(cohort / "archives", tmp_path)
    assert table["status"].tolist() == ["extracted"] * SUBJECTS
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
        extracted, affine = volumes.load(tmp_path / f"{path.name.split('_')[0]}.nii.gz")
        np.testing.assert_array_equal(extracted, fa[::-1])
        np.testing.assert_allclose(affine[:, 3], image.affine @ (fa.shape[0] - 1, 0, 0, 1))


def test_fine_spacing_is_hcps_own_grid():
    shape, affine = hcp_grid(1.25)
    image = nib.Nifti1Image.from_bytes(gzip.decompress(writing._nifti(np.zeros(shape), affine)))
    assert image.shape == (145, 174, 145)
    expected = [[-1.25, 0, 0, 90], [0, 1.25, 0, -126], [0, 0, 1.25, -72], [0, 0, 0, 1]]
    np.testing.assert_array_equal(image.affine, expected)
    np.testing.assert_array_equal(image.get_qform(), expected)


def test_same_seed_same_bytes_whatever_the_workers_or_what_is_there_already(cohort, tmp_path):
    options = {"subjects": SUBJECTS, "spacing": 5}
    (tmp_path / "archives").mkdir()
    (tmp_path / "SYNTHETIC").touch()
    first = min((cohort / "archives").iterdir())
    kept = tmp_path / "archives" / first.name
    kept.write_bytes(b"kept")
    write_cohort(tmp_path, workers=1, **options)
    assert kept.read_bytes() == b"kept"
    kept.write_bytes(first.read_bytes())
    assert checksums(tmp_path) == checksums(cohort)


def test_a_killed_run_leaves_a_marker_and_no_table_of_people(tmp_path, monkeypatch):
    whole, calls = writing._write_archive, []

    def interrupted(*arguments):
        calls.append(arguments)
        if len(calls) == 4:
            raise KeyboardInterrupt
        whole(*arguments)

    monkeypatch.setattr(writing, "_write_archive", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_cohort(tmp_path, subjects=SUBJECTS, spacing=5, workers=1)
    assert len(list((tmp_path / "archives").iterdir())) == 3
    assert (tmp_path / "SYNTHETIC").is_file()
    assert not list(tmp_path.glob("*.csv"))  # so no half cohort is read as a whole one


def test_refuses_a_folder_of_anything_else_or_of_other_options(tmp_path, no_measures):
    (tmp_path / "unrestricted_behavioral.csv").write_text("Subject,Gender\n100000,M\n")
    before = checksums(tmp_path)
    with pytest.raises(ValueError, match="or a synthetic cohort"):
        write_cohort(tmp_path, subjects=1, spacing=5, overwrite=True)
    assert checksums(tmp_path) == before
    options = {"subjects": 1, "spacing": 5}
    before = checksums(write_cohort(tmp_path / "c", **options))
    for other in ({"seed": 1}, {"subjects": 2}, {"head_size": 0}, {"template": __file__}):
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
    with pytest.raises(ValueError, match=re.escape(f"{next(iter(options))}=")):
        write_cohort(tmp_path / "new", **options)
    assert not (tmp_path / "new").exists()


# ------------------------------------------------------------------------------------------ people


def test_the_tables_are_hcps(cohort):
    behavioural, restricted, freesurfer = (
        pd.read_csv(cohort / f"{name}.csv", dtype=str)
        for name in ("unrestricted_behavioral", "restricted", "unrestricted_hcp_freesurfer")
    )
    assert (behavioural["Subject"] == restricted["Subject"]).all()
    assert (behavioural["Subject"] == freesurfer["Subject"]).all()
    assert behavioural["Gender"].value_counts().to_dict() == {"F": 606, "M": 507}
    assert behavioural["Subject"].is_unique
    assert behavioural["Subject"].str.fullmatch("0[0-9]{5}").all()
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
    people = draw_people(200, 0)
    assert people["Family_ID"].nunique() == pytest.approx(1113 / 2.51, rel=0.05)
    assert people.groupby("Family_ID").size().max() <= 6
    assert people.groupby("Family_ID")["Mother_ID"].nunique().eq(1).all()
    twins = people[people["ZygositySR"] != "NotTwin"].groupby("Family_ID")
    assert twins.size().eq(2).all()
    assert twins["Age_in_Yrs"].nunique().eq(1).all()
    identical = people[people["ZygositySR"] == "MZ"].groupby("Family_ID")
    assert identical["Gender"].nunique().eq(1).all()
    assert 0.1 < identical.ngroups * 2 / len(people) < 0.3
    imaged = people["3T_dMRI_Compl"] == "true"
    assert (people["Gender"][imaged] == "M").sum() == round(200 * 507 / 1113)
    assert (imaged.groupby(people["Family_ID"]).nunique() > 1).sum() <= 2
    more = draw_people(1200, 3)  # than HCP has
    assert (more["3T_dMRI_Compl"] == "true").all()
    assert len(more) == 1200


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
    draws = [anatomical_draws(person, 0, 3000) for _, person in kin.iterrows()]
    for values in (draws, correlated_draws(kin, np.random.default_rng(0), 3000)):
        assert np.corrcoef(values)[0, 1] == pytest.approx(expected, abs=0.05)
        assert np.std(values, axis=1) == pytest.approx(1, abs=0.05)
    np.testing.assert_array_equal(anatomical_draws(kin.loc[0], 0, 5), draws[0][:5])


# -------------------------------------------------------------------------------------- FreeSurfer


def test_freesurfer_columns_are_those_of_hcps_export(cohort):
    """The header of HCP's unrestricted FreeSurfer export: 938 names, seven of them twice."""
    with (cohort / "unrestricted_hcp_freesurfer.csv").open() as file:
        header = file.readline().strip()
    names = header.split(",")
    assert (len(names), len(set(names))) == (938, 931)
    assert hashlib.sha256(header.encode()).hexdigest()[:16] == "15ddf5284f51688c"


def test_freesurfer_measures_are_those_of_brains_and_of_relatives():
    people = draw_people(1, 0)
    table = freesurfer_table(people)
    sex, values = table["Gender"], table.loc[:, ~table.columns.duplicated()]
    assert np.isfinite(values.iloc[:, 3:].to_numpy(float)).all()
    assert (values.iloc[:, 3:] >= 0).all().all()
    for name, (low, high) in {
        "FS_InterCranial_Vol": (1.45e6, 1.65e6),
        "FS_L_Hippo_Vol": (4000, 4800),
        "FS_L_Insula_Thck": (2.8, 3.2),
        "FS_BrainSegVol_eTIV_Ratio": (0.7, 0.8),
    }.items():
        assert low < values[name].mean() < high, name
    grey = values.filter(regex="^FS_L_.*_GrayVol$").sum(axis=1)
    np.testing.assert_allclose(grey, values["FS_LCort_GM_Vol"])
    span = values["FS_L_Caudate_Max"] - values["FS_L_Caudate_Min"]
    np.testing.assert_allclose(span, values["FS_L_Caudate_Range"])
    size = values["FS_InterCranial_Vol"]
    assert size[sex == "M"].mean() / size[sex == "F"].mean() == pytest.approx(1.12, abs=0.02)
    assert values["FS_BrainSeg_Vol"].corr(size) > 0.8
    assert abs(values["FS_L_Insula_Thck"].corr(size)) < 0.2
    assert values["FS_L_Putamen_Vol"].corr(values["FS_R_Putamen_Vol"]) > 0.7

    area = np.log(table["FS_L_Insula_Area"])
    area -= area.groupby(sex).transform("mean")
    for kind, low, high in (("MZ", 0.7, 1), ("NotTwin", 0.2, 0.6)):
        relatives = area[people["ZygositySR"] == kind].groupby(people["Family_ID"])
        pairs = relatives.agg(["first", "last"])[relatives.size() > 1]
        assert low < pairs["first"].corr(pairs["last"]) < high


def test_without_effect_the_sexes_differ_in_head_size_alone(coarse):
    women, men = make_pairs(coarse, 4, effect=0)
    np.testing.assert_array_equal(women, men)
    people = draw_people(1, 0)
    men = people["Gender"].to_numpy() == "M"
    for effect, expected in ((0, 0), (1, 0.14**2)):
        table = freesurfer_table(people, head_size=0, effect=effect).filter(regex="_Thck$")
        d = (table[men].mean() - table[~men].mean()) / table.std()  # Cohen's
        assert (d**2).mean() - (1 / 507 + 1 / 606) == pytest.approx(expected, abs=0.008)


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
    with pytest.raises(FileNotFoundError, match="expected a synthetic cohort"):
        synthetic.head_size_alone(tmp_path, tmp_path / "other")


# ----------------------------------------------------------------------------- heads, noise, truth


def test_a_man_s_volume_and_table_have_a_man_s_head(tmp_path):
    """With heads far apart and nothing else to tell them."""
    cohort = write_cohort(tmp_path, subjects=20, spacing=5, head_size=0.6)
    table = pd.read_csv(cohort / "unrestricted_hcp_freesurfer.csv", dtype={"Subject": str})
    table = table.set_index("Subject")
    sizes = {p.name[:6]: (image_in(p).get_fdata() > 0).sum() for p in cohort.glob("archives/*")}
    sizes = pd.Series(sizes, dtype=float)
    limits = sizes.groupby(table["Gender"]).agg(["min", "max"])
    assert limits["max"]["F"] < limits["min"]["M"]
    assert sizes.corr(table["FS_InterCranial_Vol"]) > 0.95


@pytest.mark.parametrize("head_size", [0.0, 0.12])
def test_head_size_is_the_difference_of_brain_volumes(coarse, head_size):
    women, men = ((v > 0.02).sum() for v in make_pairs(coarse, 6, head_size=head_size))
    assert (men - women) / (men + women) * 2 == pytest.approx(head_size, abs=0.012)


@pytest.mark.parametrize("fa", [0.05, 0.6])
def test_noise_biases_low_values_upwards(coarse, fa):
    """The mean of Rice's distribution, where everything but noise and variation is constant."""
    flat = Anatomy(fa * coarse.mask, coarse.mask, 0 * coarse.effect, coarse.labels, coarse.affine)
    subjects, _ = make_pairs(flat, 12)
    inside = binary_erosion(coarse.mask > 0, iterations=3)
    expected = rice(0.9 * fa / 0.05, scale=0.05).mean()
    assert subjects[:, inside].mean() == pytest.approx(expected, rel=0.03)


def test_planted_effects_have_their_sign_and_place(base, cohort):
    women, men = make_pairs(base, 5)
    difference = (men - women).mean(0)
    regions = pd.read_csv(cohort / "truth/regions.csv")
    assert len(np.unique(base.labels)) == 9
    assert set(np.sign(regions["fa_men_minus_women"])) == {-1, 1}
    shares = []
    for region in regions.itertuples():
        inside = base.labels == region.label
        share = difference[inside].mean() / region.fa_men_minus_women
        assert 0.45 < share < 0.85, region.name  # smeared by the deformation
        shares.append((difference[inside] / base.effect[inside].mean()).mean())
        if region.name.split()[0] in ("left", "right"):
            assert abs(difference[inside[::-1]].mean()) < 0.02, region.name
    assert np.mean(shares) == pytest.approx(0.7, abs=0.05)  # as planting's docstring states
    away = (np.abs(base.effect) == 0) & (base.mask > 0)
    assert abs(difference[away].mean()) < 0.002


def test_what_a_deformation_does_to_the_truth(base):
    """As planting's docstring states."""
    indices, truth = np.indices(base.fa.shape), base.labels > 0
    for head_size, expected in ((0.0, 2.5), (writing.HEAD_SIZE, 2.7)):
        displacements, overlaps = [], []
        for row in range(10):
            draws = np.random.default_rng([0, row]).standard_normal(writing.DRAWS)
            head = writing.head_volume(row % 2, head_size, draws[0])
            fields = draws[2:].reshape(4, *writing.FIELD)
            position = writing._template_positions(base, head, fields[:3])
            moved = np.stack([p - i for p, i in zip(position, indices)]) * 2.5
            displacements.append(np.median(np.linalg.norm(moved, axis=0)[base.mask > 0]))
            own = map_coordinates(truth.astype(float), position, order=1) > 0.5
            overlaps.append(2 * (own & truth).sum() / (own.sum() + truth.sum()))
        assert np.median(displacements) == pytest.approx(expected, abs=0.25)
        assert np.mean(overlaps) == pytest.approx(0.76, abs=0.03)
        assert np.std(overlaps) == pytest.approx(0.05, abs=0.02)


def test_truth_lies_where_its_table_says(cohort):
    image = nib.load(cohort / "truth/regions.nii.gz")
    assert nib.aff2axcodes(image.affine) == ("L", "A", "S")
    stored = np.asarray(image.dataobj)
    labels, regions = load_truth(cohort, stored.shape)
    np.testing.assert_array_equal(labels, stored[::-1])
    reduced, _ = load_truth(cohort, (30, 36, 30))
    assert reduced.shape == (30, 36, 30)
    share = (reduced > 0).mean() / (labels > 0).mean()  # a voxel is a region's if half of it is
    assert share == pytest.approx(1, abs=0.4)
    names = "label name fa_men_minus_women x_mm y_mm z_mm volume_ml"
    assert regions.columns.tolist() == names.split()
    for region in regions.itertuples():
        places = nib.affines.apply_affine(image.affine, np.argwhere(stored == region.label))
        centre = (region.x_mm, region.y_mm, region.z_mm)
        assert np.linalg.norm(places.mean(0) - centre) < 5, region.name  # one voxel
        assert region.volume_ml == pytest.approx(len(places) * 0.125, abs=1e-3)
        if region.name.startswith("left"):
            assert places[:, 0].max() < 0, region.name
            assert np.argwhere(reduced == region.label)[:, 0].max() < 15
        if region.name.startswith("right"):
            assert places[:, 0].min() > 0, region.name
    with pytest.raises(FileNotFoundError, match="only synthetic cohorts"):
        load_truth(cohort / "archives")


# --------------------------------------------------------------------------------- real templates


def save_template(path, fa, affine, scale=1.0):
    fa = (fa * scale).astype(np.float32 if scale == 1 else np.int16)
    nib.save(nib.Nifti1Image(fa, affine), path)
    return path


@pytest.mark.parametrize("scale", [1.0, 10_000])
def test_a_template_is_taken_as_it_lies(tmp_path, coarse, scale):
    """In LAS, among them one stored as FSL's FMRIB58_FA: whole numbers up to 10,000."""
    flip = np.diag([-1.0, 1, 1, 1])
    flip[0, 3] = coarse.fa.shape[0] - 1
    path = save_template(tmp_path / "t.nii.gz", coarse.fa[::-1], coarse.affine @ flip, scale)
    again = make_anatomy(5, path)
    np.testing.assert_allclose(again.fa, coarse.fa, atol=0.021)  # below 0.02 is no brain
    assert np.abs(again.fa - coarse.fa)[coarse.fa > 0.021].max() < 2e-4
    np.testing.assert_array_equal(again.labels, coarse.labels)


def test_bad_templates(tmp_path, coarse):
    elsewhere = coarse.affine + np.outer([0, 1, 0, 0], [0, 0, 0, 500])
    path = save_template(tmp_path / "t.nii", coarse.fa, elsewhere)
    with pytest.raises(ValueError, match=r"t\.nii: expected a brain in MNI space"):
        make_anatomy(5, path)
    path = save_template(tmp_path / "t.nii", -coarse.fa, coarse.affine)
    with pytest.raises(ValueError, match=r"t\.nii: expected an FA map.*empty volume"):
        make_anatomy(5, path)
