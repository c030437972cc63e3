"""What people have, found by name and turned into a cohort: one layout after the other."""

import gzip
import json
import os
from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd
import pytest
from skimage.transform import resize

from brainsex import archives, cohort, tables
from brainsex.__main__ import main
from brainsex.sources import choose, find, subject, summary
from tests.test_volumes import LAS, fa, save

PEOPLE = pd.DataFrame({"Subject": ["01", "02", "03"], "Gender": list("FMF")})


def put(path, seed=0, data=None):
    """A volume, and the folders it lies in."""
    path.parent.mkdir(parents=True, exist_ok=True)
    return save(path, fa(seed) if data is None else data)


def hcp_table(folder, subjects=("900001", "900002")):
    rows = "".join(f"{s},{'FM'[n % 2]},26-30\n" for n, s in enumerate(subjects))
    (folder / "unrestricted_behavioral.csv").write_text("Subject,Gender,Age\n" + rows)


def participants(folder, rows):
    lines = ["participant_id\tage\tsex", *("\t".join(row) for row in rows)]
    (folder / "participants.tsv").write_text("\n".join(lines) + "\n")


def own(folder):
    for n in (1, 2):
        put(folder / f"fa/90000{n}.nii.gz", n)
    hcp_table(folder)
    return ["900001", "900002"]


def tree(folder):
    """As unpacked packages, S3 or DataLad lay it out, with FA beside the series it is of."""
    for n in (1, 2):
        diffusion = folder / f"HCP_1200/90000{n}/T1w/Diffusion"
        put(diffusion / "dti_FA.nii.gz", n)
        put(diffusion / "nodif_brain_mask.nii.gz")
        (diffusion / "data.nii.gz").touch()
    hcp_table(folder)
    return ["900001", "900002"]


def bids(folder):
    derivatives = folder / "derivatives/fits"
    put(derivatives / "sub-01/ses-a/dwi/sub-01_ses-a_space-T1w_FA.nii.gz", 1)
    put(derivatives / "sub-01/ses-a/dwi/sub-01_ses-a_space-T1w_MD.nii.gz", 9)
    put(derivatives / "sub-A2/dwi/sub-A2_model-tensor_param-fa_dwimap.nii.gz", 2)
    put(folder / "sub-01/ses-a/anat/sub-01_ses-a_T1w.nii.gz", 9)
    participants(folder, [("sub-01", "31", "female"), ("sub-A2", "n/a", "M")])
    return ["01", "A2"]


def tbss(folder):
    for n, name in ((1, "con-01"), (2, "con-02")):
        put(folder / f"FA/{name}_FA.nii.gz", n)
        put(folder / f"FA/{name}_FA_to_target.nii.gz", 9)
        put(folder / f"FA/{name}_FA_mask.nii.gz", 9)
    put(folder / "stats/mean_FA.nii.gz", 9)
    put(folder / "stats/all_FA_skeletonised.nii.gz", 9)
    hcp_table(folder, ["con-01", "con-02"])
    return ["con-01", "con-02"]


def tbss_with_originals(folder):
    """As tbss_1_preproc leaves it: what it moved, and beside it what it eroded."""
    for n, name in ((1, "con-01"), (2, "con-02_FA")):
        put(folder / f"FA/{name}_FA.nii.gz", 9)
        put(folder / f"origdata/{name}.nii.gz", n)
    hcp_table(folder, ["con-01", "con-02"])
    return ["con-01", "con-02"]


def tbss_target(folder):
    for n, name in ((1, "con-01"), (2, "con-02_FA")):
        put(folder / f"FA/{name}_FA_to_target.nii.gz", n)
    put(folder / "FA/target_to_MNI152.nii.gz", 9)
    hcp_table(folder, ["con-01", "con-02"])
    return ["con-01", "con-02"]


def tbss_4d_without_a_list(folder):
    """As tbss_4_prestats leaves it."""
    put(folder / "stats/all_FA.nii.gz", data=np.stack([fa(1), fa(2)], axis=-1))
    (folder / "stats/thresh.txt").write_text("0.2\n")
    for name in ("con-02_FA_FA", "con-01_FA"):
        (folder / "FA").mkdir(exist_ok=True)
        (folder / f"FA/{name}.nii.gz").touch()
    hcp_table(folder, ["con-01", "con-02"])
    return ["con-01", "con-02"]


def tbss_4d(folder):
    """IDs in another order than that of their names."""
    stacked = np.stack([fa(2), fa(1)], axis=-1)
    put(folder / "stats/all_FA.nii.gz", data=stacked)
    (folder / "stats/ids.txt").write_text("900002\nsub-900001_FA.nii.gz\n")
    hcp_table(folder)
    return ["900001", "900002"]


@pytest.mark.parametrize(
    ("layout", "kind"),
    [
        (own, "fa"),
        (tree, "hcp-fa"),
        (bids, "bids-fa"),
        (tbss, "tbss-fa"),
        (tbss_with_originals, "tbss-origdata"),
        (tbss_target, "tbss-target"),
        (tbss_4d, "tbss-4d"),
        (tbss_4d_without_a_list, "tbss-4d"),
    ],
)
def test_convert_takes_a_folder_as_people_have_it(tmp_path, capsys, layout, kind):
    (tmp_path / "c").mkdir()
    names = layout(tmp_path / "c")
    before = sorted(path for path in (tmp_path / "c").rglob("*"))
    main(["convert", str(tmp_path / "c"), "--out", str(tmp_path / "out"), "--kind", kind])
    assert before == sorted(path for path in (tmp_path / "c").rglob("*"))
    said = capsys.readouterr().out
    assert kind in said
    assert ("IDs from the sorted names of ../FA" in said) == (layout is tbss_4d_without_a_list)
    assert said.index(kind) < said.index("2 subjects; 0 volumes rejected, 0 rows without")
    data = cohort.load(tmp_path / "out")
    assert data.subjects.tolist() == names
    assert data.sex.tolist() == [0, 1]
    for volume, seed in zip(data.volumes, (1, 2), strict=True):  # stored in LAS
        np.testing.assert_allclose(volume, resize(fa(seed)[::-1], (58, 70, 58)), atol=1e-6)


def test_packages_old_and_new_are_told_apart_and_led_to_the_next_command(tmp_path):
    for name in (
        "900001_3T_Diffusion_preproc.zip",
        "900002_Diffusion3TRecommended.zip",
        "900002_StructuralRecommended.zip",
        "900003_3T_Structural_preproc.zip",
        "deeper/900004.zip",
        "sub-01.zip",
        "900006_FA.zip",
        "900007_dti_maps.zip",
        "900008_7T_Diffusion_preproc.zip",
        "900008_3T_rfMRI_REST_fix.zip",
        "backup of 2019.zip",
    ):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "900005/T1w/Diffusion").mkdir(parents=True)
    (tmp_path / "900005/T1w/Diffusion/data.nii.gz").touch()
    hcp_table(tmp_path, ["900001", "900002", "900009"])
    found = find(tmp_path)
    kinds = found.groupby("kind")["Subject"].agg(list).to_dict()
    assert kinds == {
        "package-2017": ["900001"],
        "package-2025": ["900002"],
        "package-t1": ["900002", "900003"],
        "archive": ["900006", "900007", "900004", "01"],
        "hcp-series": ["900005"],
    }
    table = summary(found, tables.read(tables.find(tmp_path)))
    assert table.loc["package-2017", "next"] == "python -m brainsex fa COHORT COHORT/fa"
    assert "extract" in table.loc["package-t1", "next"]
    assert table.loc["package-t1", ["subjects", "no row", "rows without"]].tolist() == [2, 1, 2]
    with pytest.raises(ValueError, match=r"kind none\. `python -m brainsex extract COHORT .*fa`"):
        choose(found, tmp_path)


def test_survey_without_a_table_of_people_says_so(tmp_path, capsys):
    own(tmp_path)
    (tmp_path / "unrestricted_behavioral.csv").unlink()
    main(["survey", str(tmp_path)])
    said = capsys.readouterr().out
    assert "no table of people" in said
    assert "absent" in said
    assert "no row" not in said
    with pytest.raises(SystemExit, match="expected unrestricted_behavioral"):
        main(["convert", str(tmp_path)])


def test_columns_of_participants_in_any_case(tmp_path):
    table = "Participant_ID\tGENDER\tage\nsub-01\tFemale\t40\n"
    (tmp_path / "participants.tsv").write_text(table)
    people = tables.read(tables.find(tmp_path))
    assert people.to_dict("index") == {"01": {"Gender": "F", "age": "40"}}


FORMS = [
    "FA",
    "space-ACPC_model-tensor_param-fa_dwimap",
    "param-FA_dwimap",
    "param-fa_desc-wls_dwimap",
    "space-T1w_mdp-fa_dwimap",
    "mdp-FA_dwimap",
    "model-DTI_desc-FA_dwi",
    "model-DTI_map-FA",
]


@pytest.mark.parametrize("form", FORMS)
def test_names_of_fa_in_bids_derivatives(tmp_path, form):
    for name in (form, "param-md_dwimap", "desc-FA_mask", "model-DTI_desc-FA_mask", "map-FAx"):
        put(tmp_path / f"sub-01/dwi/sub-01_{name}.nii.gz")
    found = find(tmp_path)
    assert found["kind"].tolist() == ["bids-fa"]
    assert found["path"][0].name == f"sub-01_{form}.nii.gz"


def test_of_several_models_or_spaces_match_keeps_one(tmp_path):
    for space, seed in (("T1w", 1), ("MNI", 2)):
        put(tmp_path / f"sub-01/dwi/sub-01_space-{space}_FA.nii.gz", seed)
    put(tmp_path / "sub-02/dwi/sub-02_space-T1w_FA.nii.gz", 3)
    participants(tmp_path, [("sub-01", "31", "F"), ("sub-02", "31", "M")])
    main(["convert", str(tmp_path)])
    assert "keep one (--session, --match)" in (tmp_path / "rejected.csv").read_text()
    main(["convert", str(tmp_path), "--match", "*_space-T1w_*"])
    data = cohort.load(tmp_path)
    assert data.subjects.tolist() == ["01", "02"]
    np.testing.assert_allclose(data.volumes[0], resize(fa(1)[::-1], (58, 70, 58)), atol=1e-6)
    with pytest.raises(SystemExit, match=r"name \*_x, found those of kind bids-fa"):
        main(["convert", str(tmp_path), "--match", "*_x"])


def test_a_7t_map_in_a_tree_is_no_second_volume(tmp_path):
    tree(tmp_path)
    put(tmp_path / "HCP_1200/900001/T1w/Diffusion_7T/dti_FA.nii.gz", 9)
    assert find(tmp_path)["Subject"].value_counts().to_dict() == {"900001": 2, "900002": 2}


@pytest.mark.skipif(os.name == "nt", reason="links need a privilege on Windows")
def test_summary_says_what_is_missing_before_a_volume_is_read(tmp_path):
    for n in (1, 2):
        path = tmp_path / f"sub-01/ses-{n}/dwi/sub-01_ses-{n}_FA.nii.gz"
        path.parent.mkdir(parents=True)
        path.write_bytes(b"no volume")
    other = tmp_path / "sub-09/dwi/sub-09_FA.nii.gz"
    other.parent.mkdir(parents=True)
    other.symlink_to("not-fetched")
    table = summary(find(tmp_path), PEOPLE.set_index("Subject"))
    assert table.loc["bids-fa"].to_dict() == {
        "modality": "fa", "subjects": 2, "several": 1, "absent": 1, "no row": 1, "rows without": 2,
        "next": "",
    }  # fmt: skip


def test_two_sessions_are_rejected_or_one_is_chosen(tmp_path, capsys):
    for name, session, seed in (("01", "a", 1), ("01", "b", 2), ("02", "a", 3)):
        place = f"sub-{name}/ses-{session}/dwi/sub-{name}_ses-{session}_FA.nii.gz"
        put(tmp_path / place, seed)
    put(tmp_path / "sub-04/dwi/sub-04_FA.nii.gz", data=np.stack([fa(4)] * 2, axis=-1))
    people = [("sub-01", "40", "Male"), ("02", "41", "f"), ("03", "9", "other"), ("04", "9", "M")]
    participants(tmp_path, people)
    main(["convert", str(tmp_path)])
    assert cohort.load(tmp_path).subjects.tolist() == ["02"]
    reasons = pd.read_csv(tmp_path / "rejected.csv", dtype=str).set_index("Subject")["reason"]
    assert "ses-a/dwi/sub-01_ses-a_FA.nii.gz" in reasons["01"]
    assert "keep one" in reasons["01"]
    assert "expected a 3D volume, found shape (23, 28, 25, 2)" in reasons["04"]
    main(["convert", str(tmp_path), "--session", "a"])
    data = cohort.load(tmp_path)
    assert data.subjects.tolist() == ["01", "02"]
    assert data.sex.tolist() == [1, 0]
    assert data.table["age"].tolist() == [40, 41]
    with pytest.raises(SystemExit, match="session c, name any, found those of kind bids-fa"):
        main(["convert", str(tmp_path), "--session", "c"])


def test_one_kind_at_a_time_by_default_the_first_of_the_table(tmp_path, capsys):
    tbss(tmp_path)
    stacked = np.stack([fa(5), fa(6)], axis=-1)
    put(tmp_path / "stats/all_FA.nii.gz", data=stacked)
    (tmp_path / "stats/all_FA.txt").write_text("con-01\ncon-02\n")
    (tmp_path / "stats/design.txt").write_text("1 0\n0 1\n")
    main(["convert", str(tmp_path), "--out", str(tmp_path / "a")])
    assert "kind tbss-fa (there are: tbss-fa, tbss-target, tbss-4d)" in capsys.readouterr().out
    main(["convert", str(tmp_path), "--out", str(tmp_path / "b"), "--kind", "tbss-4d"])
    for out, seed in (("a", 1), ("b", 5)):
        volume = cohort.load(tmp_path / out).volumes[0]
        np.testing.assert_allclose(volume, resize(fa(seed)[::-1], (58, 70, 58)), atol=1e-6)


def test_an_id_twice_in_the_list_of_a_4d_file_is_a_rejected_line(tmp_path):
    tbss_4d(tmp_path)
    put(tmp_path / "stats/all_FA.nii.gz", data=np.stack([fa(2), fa(1), fa(3)], axis=-1))
    (tmp_path / "stats/ids.txt").write_text("900002\r\n900001\r\n900002\r\n")
    main(["convert", str(tmp_path)])
    assert cohort.load(tmp_path).subjects.tolist() == ["900001"]
    assert "2 volumes" in (tmp_path / "rejected.csv").read_text()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ("more IDs", r"expected 3 volumes \(IDs of ids\.txt\), found \(23, 28, 25, 2\)"),
        ("3D", r"expected 2 volumes \(IDs of ids\.txt\), found \(23, 28, 25\)"),
        ("truncated", r"all_FA\.nii\.gz: cannot be split"),
        ("checksum", r"all_FA\.nii\.gz: cannot be split: CRC"),
        ("no list", r"expected all_FA\.txt .*found none"),
        ("two lists", r"found b\.txt, ids\.txt"),
        ("more in FA", r"expected 3 volumes \(IDs of the sorted names of \.\./FA/"),
        ("colours", r"cannot be split: expected real numbers, found"),
        ("checksum far on", r"all_FA\.nii\.gz: cannot be split: CRC"),
    ],
)
def test_a_4d_file_that_does_not_fit_its_list(tmp_path, damage, message):
    tbss_4d(tmp_path)
    path, names = tmp_path / "stats/all_FA.nii.gz", tmp_path / "stats/ids.txt"
    if damage == "more IDs":
        names.write_text("1\n2\n3\n")
    elif damage == "3D":
        put(path)
    elif damage == "truncated":
        path.write_bytes(path.read_bytes()[:-2000])
    elif damage == "checksum":  # in stored blocks nothing else can tell
        content = bytearray(gzip.compress(gzip.decompress(path.read_bytes()), 0))
        content[-2000] ^= 1
        path.write_bytes(content)
    elif damage == "checksum far on":
        content = bytearray(gzip.compress(gzip.decompress(path.read_bytes()) + bytes(3 << 20)))
        content[-8] ^= 1
        path.write_bytes(content)
    elif damage == "colours":
        put(path, data=np.zeros((2, 2, 2, 2), [(name, np.uint8) for name in "RGB"]))
    elif damage == "no list":
        names.unlink()
    elif damage == "more in FA":
        names.unlink()
        for n in range(3):
            put(tmp_path / f"FA/{n}_FA.nii.gz")
        (tmp_path / "FA").joinpath("mask.txt").touch()
    else:
        (tmp_path / "stats/b.txt").touch()
    main(["survey", str(tmp_path)])
    with pytest.raises(SystemExit, match=message):
        main(["convert", str(tmp_path), "--kind", "tbss-4d"])
    assert not (tmp_path / "tensors.npy").exists()


def test_a_4d_file_without_a_list_stands_in_nothings_way(tmp_path, capsys):
    own(tmp_path)
    put(tmp_path / "stats/all_FA.nii.gz", data=np.stack([fa(5), fa(6)], axis=-1))
    (tmp_path / "stats/a.txt").write_bytes(b"\xff")
    (tmp_path / "stats/b.txt").touch()
    main(["convert", str(tmp_path)])
    assert cohort.load(tmp_path).subjects.tolist() == ["900001", "900002"]
    line = capsys.readouterr().out.split("tbss-4d")[1].splitlines()[0]
    assert line.split()[:3] == ["fa", "0", "0"]
    assert "no list of IDs: DATA_ACCESS.md, section 7" in line


def test_a_4d_file_is_split_once_with_its_scaling_and_affine_and_anew_when_it_changed(tmp_path):
    stacked = np.stack([fa(0), fa(1)], axis=-1)
    image = nib.Nifti1Image(np.int16(stacked * 10_000), LAS)
    image.set_sform(LAS, 4)
    image.header.set_slope_inter(0.0001, 0)
    (tmp_path / "all_FA.nii").write_bytes(image.to_bytes())
    (tmp_path / "all_FA.txt").write_text("1\n2\n")
    chosen = choose(find(tmp_path), tmp_path / "out")
    stamps = [path.stat().st_mtime_ns for path in chosen["path"]]
    for path, seed in zip(chosen["path"], (0, 1), strict=True):
        one = nib.load(path)
        assert int(one.header["sform_code"]) == 4
        np.testing.assert_allclose(one.affine, LAS)
        np.testing.assert_allclose(one.get_fdata(), fa(seed), atol=1e-4)
    again = choose(find(tmp_path), tmp_path / "out")
    assert [path.stat().st_mtime_ns for path in again["path"]] == stamps
    os.utime(tmp_path / "all_FA.nii", ns=(0, 0))
    choose(find(tmp_path), tmp_path / "out")
    assert [path.stat().st_mtime_ns for path in again["path"]] > stamps
    assert json.loads((tmp_path / "out/split.json").read_text())[2] == 2


def test_nothing_recognised(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such folder"):
        find(tmp_path / "nowhere")
    put(tmp_path / "T1.nii.gz")
    put(tmp_path / ".hidden/fa/1.nii.gz")
    put(tmp_path / "__MACOSX/900001/T1w/FA.nii.gz")
    put(tmp_path / "FA/._900001_FA.nii.gz")
    with pytest.raises(FileNotFoundError, match=r"found none of these\. DATA_ACCESS\.md"):
        find(tmp_path)


@pytest.mark.skipif(os.name == "nt", reason="links need a privilege on Windows")
def test_what_two_links_lead_to_counts_once_a_subject(tmp_path):
    """DataLad's files are links; a subject's folder may be one, and a whole tree twice."""
    put(tmp_path / "store/x_FA.nii.gz", 1)
    for name in ("01", "02"):
        place = tmp_path / f"data/sub-{name}/dwi"
        place.mkdir(parents=True)
        (place / f"sub-{name}_FA.nii.gz").symlink_to(tmp_path / "store/x_FA.nii.gz")
    (tmp_path / "data/again").symlink_to(tmp_path / "data")
    (tmp_path / "data/copy").mkdir()
    (tmp_path / "data/copy/sub-01").symlink_to(tmp_path / "data/sub-01")
    assert sorted(find(tmp_path / "data")["Subject"]) == ["01", "02"]


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("x/sub-01/ses-1/dwi/sub-01_ses-1_FA.nii.gz", "01"),
        ("900001/T1w/T1w_acpc_dc_restore_brain.nii.gz", "900001"),
        ("fa/000012_FA.nii.gz", "000012"),
        ("sub-7.nii", "7"),
        (".cache/sub-8/dwi/x_FA.nii.gz", "8"),
        ("con-01_FA_FA.nii.gz", "con-01"),
        ("con-01/T1w/Diffusion/data.nii.gz", "con-01"),
        ("HCA6002236_V1_MR/T1w/Diffusion/data.nii.gz", "HCA6002236_V1_MR"),
        ("sub-01/ses-1/T1w/Diffusion/data.nii.gz", "01"),
        ("900001_3T_Diffusion_preproc.zip", "900001"),
    ],
)
def test_subject_of_a_path(tmp_path, path, expected):
    assert subject(tmp_path / path) == expected
    if path.endswith(("data.nii.gz", ".zip")):  # the same for `fa`
        assert archives.owner(tmp_path / path) == expected


REAL = os.environ.get("BRAINSEX_REAL_FA")


@pytest.mark.skipif(not REAL, reason="BRAINSEX_REAL_FA is not set: a folder of real FA volumes")
def test_real_volumes_laid_out_as_bids_and_in_4d(tmp_path):
    path = Path(REAL) / "subject_FA_2.5mm.nii.gz"
    real = nib.load(path)
    place = tmp_path / "bids/sub-01/dwi/sub-01_FA.nii.gz"
    place.parent.mkdir(parents=True)
    place.write_bytes(path.read_bytes())
    (tmp_path / "tbss").mkdir()
    both = np.stack([real.get_fdata(dtype=np.float32)] * 2, axis=-1)
    nib.save(nib.Nifti1Image(both, real.affine), tmp_path / "tbss/all_FA.nii.gz")
    (tmp_path / "tbss/all_FA.txt").write_text("01\n02\n")
    for folder in ("bids", "tbss"):
        participants(tmp_path / folder, [("sub-01", "30", "F"), ("sub-02", "30", "M")])
        main(["convert", str(tmp_path / folder)])
        data = cohort.load(tmp_path / folder)
        expected = resize(real.get_fdata(dtype=np.float32)[::-1], (58, 70, 58))
        np.testing.assert_allclose(data.volumes[0], expected, atol=1e-6)
        steps = 2.5 * np.divide(real.shape, (58, 70, 58))
        np.testing.assert_allclose(np.diag(data.affine)[:3], steps, rtol=1e-6)
