"""What people have, recognised by the names of files: one layout after the other."""

import gzip
import os
from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd
import pytest

from brainsex import cohort, layouts, volumes

SHAPE = (7, 9, 8)
LAS = np.array([[-2.5, 0, 0, 29], [0, 2.25, 0, -31], [0, 0, 2.0, -24], [0, 0, 0, 1]])
LINKS = pytest.mark.skipif(os.name == "nt", reason="links need a privilege on Windows")


def fa(seed: int) -> np.ndarray:
    """Make a volume of random FA."""
    return np.random.default_rng(seed).uniform(0.05, 0.95, SHAPE).astype(np.float32)


def write(folder: Path, files: dict[str, int | str]) -> None:
    """Write a compressed volume of a seed, or an empty file, and the folders they lie in."""
    for name, seed in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        content = nib.Nifti1Image(fa(seed), LAS).to_bytes() if seed else b""
        (folder / name).write_bytes(gzip.compress(content, 1, mtime=0))


HCP, FITS = "HCP_1200/900001/T1w/Diffusion", "derivatives/fits"
TBSS = (
    {"FA/con-01_FA.nii.gz": 1, "FA/con-02_FA.nii.gz": 2, "stats/all_FA.nii.gz": 9}
    | {"FA/con-01_FA_to_target.nii.gz": 9, "FA/con-01_FA_mask.nii.gz": 9}
    | {"stats/mean_FA.nii.gz": 9, "stats/all_FA_skeletonised.nii.gz": 9}
)
UKB = "dMRI/dMRI/dti_FA.nii.gz", "dMRI/TBSS/FA/dti_FA.nii.gz", "dMRI/TBSS/FA/dti_FA_to_MNI.nii.gz"
LAYOUTS = [  # options, subjects, and files: subjects' volumes have seeds 1 and 2, others 9
    ({}, ["900001", "900002"], {"fa/900001.nii.gz": 1, "fa/900002.nii.gz": 2}),
    (  # as unpacked packages, S3 or DataLad lay it out, with FA beside the series it is of
        {},
        ["900001", "900002"],
        {f"{HCP}/dti_FA.nii.gz": 1, "HCP_1200/900002/T1w/Diffusion/dti_FA.nii.gz": 2}
        | {f"{HCP}{name}.nii.gz": 9 for name in ("/data", "/nodif_brain_mask", "_7T/dti_FA")},
    ),
    (
        {},
        ["01", "A2"],
        {f"{FITS}/sub-01/ses-a/dwi/sub-01_ses-a_space-T1w_FA.nii.gz": 1}
        | {f"{FITS}/sub-A2/dwi/sub-A2_model-tensor_param-fa_dwimap.nii.gz": 2}
        | {f"{FITS}/sub-01/ses-a/dwi/sub-01_ses-a_space-T1w_MD.nii.gz": 9}
        | {"sub-01/ses-a/anat/sub-01_ses-a_T1w.nii.gz": 9},
    ),
    (  # as FSL leaves it in a folder of each subject, under one name
        {},
        ["900001", "02"],
        {"all/900001/dtifit/dti_FA.nii.gz": 1, "all/sub-02/ses-1/dti_FA.nii.gz": 2}
        | {"all/900001/dtifit/dti_MD.nii.gz": 9},
    ),
    ({}, ["con-01", "con-02"], TBSS),
    (  # as tbss_1_preproc leaves it: what it moved, and beside it what it eroded
        {},
        ["con-01", "con-02"],
        {"origdata/con-01.nii.gz": 1, "origdata/con-02_FA.nii.gz": 2}
        | {"FA/con-01_FA.nii.gz": 9, "FA/con-02_FA_FA.nii.gz": 9},
    ),
    (
        {"match": "*_to_target.*"},
        ["con-01", "con-02"],
        {"FA/con-01_FA_to_target.nii.gz": 1, "FA/con-02_FA_FA_to_target.nii.gz": 2}
        | {"FA/target_to_MNI152.nii.gz": 9},
    ),
    ({}, ["1001", "1002"], {f"{1001 + n}/{name}": n + 1 for name in UKB[:1] for n in (0, 1)}),
    (
        {"match": UKB[2]},
        ["1001", "1002"],
        {f"{1001 + n}/{name}": n + 1 if name == UKB[2] else 9 for name in UKB for n in (0, 1)},
    ),
    ({}, ["900001", "900002"], {"maps/900001_FA.nii.gz": 1, "maps/900002_FA.NII.GZ": 2}),
    ({}, ["01", "02"], {f"out/sub-0{n}/DTI_Metrics/sub-0{n}__fa.nii.gz": n for n in (1, 2)}),
    (
        {},
        ["S1_x", "S2_y"],
        {"lab/S1_x/run/tensor_fa.nii.gz": 1, "lab/S2_y/run/tensor_fa.nii.gz": 2},
    ),
    ({"match": "best/*"}, ["p1", "p2"], {f"best/p{n}.nii.gz": n for n in (1, 2)}),
    ({}, ["7", "8"], {"dti/A/wave1/7_FA.nii.gz": 1, "dti/B/wave1/8_FA.nii.gz": 2}),
    (  # a session that is a folder
        {"session": "wave2"},
        ["7", "8"],
        {
            f"dti/wave{wave}/{7 + n}_FA.nii.gz": n + 1 if wave == 2 else 9
            for wave in (1, 2)
            for n in (0, 1)
        },
    ),
]


@pytest.mark.parametrize(("options", "subjects", "files"), LAYOUTS)
def test_a_folder_is_taken_as_people_have_it(tmp_path, options, subjects, files):
    write(tmp_path / "c", files)
    chosen = layouts.choose_volumes(layouts.find_volumes(tmp_path / "c"), **options)
    assert chosen["Subject"].tolist() == subjects
    assert set(chosen["modality"]) == {"fa"}
    for path, seed in zip(chosen["path"], (1, 2), strict=True):
        image = nib.Nifti1Image.from_bytes(gzip.decompress(path.read_bytes()))
        np.testing.assert_array_equal(image.get_fdata(dtype=np.float32), fa(seed))


def test_what_is_chosen_converts(tmp_path):
    write(tmp_path, LAYOUTS[2][2])
    rows = "participant_id\tage\tsex\nsub-01\t31\tfemale\nsub-A2\tn/a\tM\n"
    (tmp_path / "participants.tsv").write_text(rows)
    chosen = layouts.choose_volumes(layouts.find_volumes(tmp_path))
    volumes.convert(chosen, tmp_path, tmp_path, shape=SHAPE)
    data = cohort.load(tmp_path)
    assert data.subjects.tolist() == ["01", "A2"]
    assert data.sex.tolist() == [0, 1]
    np.testing.assert_allclose(data.volumes[1], fa(2)[::-1], atol=1e-6)  # stored in LAS


def test_brains_of_freesurfer_and_spm_are_told_from_what_lies_beside(tmp_path):
    names = [f"P0{n}/mri/{name}.mgz" for n in (1, 2) for name in ("brain", "T1", "orig", "aseg")]
    write(tmp_path / "fs", dict.fromkeys(names, ""))
    names = [
        f"mri/{name}sub-0{n}_T1w.nii" for n in (1, 2) for name in ("wm", "mwp1", "mwp2", "m0wp1")
    ]
    write(tmp_path / "spm", dict.fromkeys(names, ""))
    names = [f"CAT12/mri/{name}KU0{n}_T1.nii" for n in (1, 2) for name in ("wm", "mwp1", "p0")]
    write(tmp_path / "cat", dict.fromkeys(names, ""))
    names = [f"s0{n}/T1{end}.nii" for n in (1, 2) for end in ("", "_brain", "_brain_mask")]
    write(tmp_path / "bet", dict.fromkeys(names, ""))
    assert layouts.find_volumes(tmp_path / "cat", known=["KU01", "KU02"])["Subject"].nunique() == 2
    wanted = {"fs": "P0{}/mri/brain.mgz", "spm": "mri/wmsub-0{}_T1w.nii"}
    wanted["cat"], wanted["bet"] = "CAT12/mri/wmKU0{}_T1.nii", "s0{}/T1_brain.nii"
    for folder, name in wanted.items():
        chosen = layouts.choose_volumes(layouts.find_volumes(tmp_path / folder))
        expected = [tmp_path / folder / name.format(n) for n in (1, 2)]
        assert chosen["path"].tolist() == expected


def test_ids_of_two_folders_are_those_of_the_table():
    paths = [
        Path(f"/data/{site}/100{n}/100{n}_FA.nii.gz") for site in ("UMN", "BCN") for n in (1, 2)
    ]
    known = ["UMN_1001", "UMN_1002", "BCN_1001", "BCN_1002"]
    assert layouts.name_subjects(paths, known=known) == known


def test_packages_old_and_new_are_told_apart_and_led_to_the_next_command(tmp_path):
    names = [
        *("900001_3T_Diffusion_preproc.zip", "900002_Diffusion3TRecommended.zip"),
        *("900002_StructuralRecommended.zip", "900003_3T_Structural_preproc.zip"),
        *("deeper/900004.zip", "sub-01.zip", "900006_FA.zip", "900007_dti_maps.zip"),
        *("900008_7T_Diffusion_preproc.zip", "backup of 2019.zip"),
        *("900001_3T_Diffusion_preproc.zip.md5", "900005/T1w/Diffusion/data.nii.gz"),
    ]
    write(tmp_path, dict.fromkeys(names, ""))
    files = layouts.find_volumes(tmp_path)
    assert files.groupby("kind")["Subject"].agg(sorted).to_dict() == {
        "package": ["900001", "900002"],
        "package-t1": ["900002", "900003"],
        "archive": ["01", "900004", "900006", "900007"],
        "series": ["900005"],
    }
    people = pd.DataFrame({"Gender": list("FMF")}, ["900001", "900002", "900009"])
    summary = layouts.summarise_layout(files, people)
    assert summary.loc["package-t1", ["subjects", "no row", "rows without"]].tolist() == [2, 1, 2]
    assert "no row" not in layouts.summarise_layout(files, None)
    message = f"found none; python -m brainsex survey {tmp_path} says how to make some"
    with pytest.raises(ValueError, match=message):
        layouts.choose_volumes(files)


def test_names_of_fa_in_bids_derivatives(tmp_path):
    names = (
        "FA space-ACPC_model-tensor_param-fa_dwimap param-FA_desc-wls_dwimap mdp-FA_dwimap "
        "space-T1w_mdp-fa_dwimap model-DTI_desc-FA_dwi model-DTI_map-FA"
    ).split()
    for name in (*names, "param-md_dwimap", "desc-FA_mask", "model-DTI_desc-FA_mask", "map-FAx"):
        write(tmp_path, {f"sub-01/dwi/sub-01_{name}.nii.gz": ""})
    files = layouts.find_volumes(tmp_path)
    files = files[files["modality"] == "fa"]
    assert {path.name for path in files["path"]} == {f"sub-01_{name}.nii.gz" for name in names}


@LINKS
def test_the_summary_says_what_is_missing_before_a_volume_is_read(tmp_path):
    names = [f"sub-01/ses-{n}/dwi/sub-01_ses-{n}_FA.nii.gz" for n in (1, 2)]
    write(tmp_path, dict.fromkeys(names, ""))
    (tmp_path / "sub-09/dwi").mkdir(parents=True)
    (tmp_path / "sub-09/dwi/sub-09_FA.nii.gz").symlink_to("not-fetched")
    people = pd.DataFrame({"Gender": list("FMF")}, ["01", "02", "03"])
    summary = layouts.summarise_layout(layouts.find_volumes(tmp_path), people)
    assert summary.loc["sub-*/ses-*/dwi/sub-*_ses-*_FA.nii.gz"].tolist() == ["fa", 1, 1, 0, 2]
    assert summary.loc["sub-*/dwi/sub-*_FA.nii.gz"].tolist() == ["fa", 1, 0, 1, 3]


def test_of_several_sessions_or_spaces_one_is_chosen(tmp_path):
    for session, space in (("a", "T1w"), ("a", "MNI"), ("b", "T1w")):
        name = f"sub-01/ses-{session}/dwi/sub-01_ses-{session}_space-{space}_FA.nii.gz"
        write(tmp_path, {name: ""})
    files = layouts.find_volumes(tmp_path)
    chosen = layouts.choose_volumes(files, session="a", match="*_space-T1w_*")
    assert [path.name for path in chosen["path"]] == ["sub-01_ses-a_space-T1w_FA.nii.gz"]
    for options, message in (
        (
            {},
            r"session any, name any, found sub-\*/ses-\*/.* \(2\), .*; choose by --match",
        ),
        ({"match": "*_x"}, r"name \*_x, found none"),
        ({"session": "c"}, "session c, name any, found none"),
        ({"kind": "t1"}, "one t1 volume a subject, session any, name any, found none"),
    ):
        with pytest.raises(ValueError, match=message):
            layouts.choose_volumes(files, **options)


def test_nothing_there(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"at any depth, found none; see DATA_ACCESS"):
        layouts.find_volumes(tmp_path / "nowhere")
    hidden = ".hidden/fa/1.nii.gz", "__MACOSX/900001/T1w/FA.nii.gz", "FA/._900001_FA.nii.gz"
    write(tmp_path, dict.fromkeys(["readme.txt", *hidden], ""))
    with pytest.raises(FileNotFoundError, match="depth, found none"):
        layouts.find_volumes(tmp_path)


IXI = [f"IXI0{name}-T1.nii.gz" for name in ("07-Guys-0173", "12-Guys-0901", "13-Guys-0902")]


@pytest.mark.parametrize(
    ("paths", "options", "subjects"),
    [
        (["x/sub-01/ses-1/dwi/sub-01_ses-1_FA.nii.gz"], {}, ["01"]),
        (["900001/T1w/T1w_acpc_dc_restore_brain.nii.gz"], {}, ["900001"]),
        (["fa/000012_FA.nii.gz"], {}, ["000012"]),
        (["sub-7.nii"], {}, ["7"]),
        (["con-01_FA_FA.nii.gz"], {}, ["con-01"]),
        (["900003/dti_FA.nii.gz"], {}, ["900003"]),
        (["con-01/T1w/Diffusion/data.nii.gz"], {}, ["con-01"]),
        (["HCA6002236_V1_MR/T1w/Diffusion/data.nii.gz"], {}, ["HCA6002236_V1_MR"]),
        (["sub-01/ses-1/T1w/Diffusion/data.nii.gz"], {}, ["01"]),
        (["900001_3T_Diffusion_preproc.zip"], {}, ["900001"]),
        (["a/01/x_FA.nii", "a/02/x_FA.nii"], {}, ["01", "02"]),
        (["con/01/FA.nii", "pat/01/FA.nii"], {"pattern": r"([a-z]+/\d+)/FA"}, ["con_01", "pat_01"]),
        (["s/T1/9_x.nii", "s/T2/8_x.nii"], {"known": ["9", "8"]}, ["9", "8"]),
        (["s/A/1001.nii", "s/B/1002.nii"], {"known": ["a", "B"]}, ["A", "B"]),
        (
            ["TW01A.anat/T1.nii", "TW02B.anat/T1.nii"],
            {"known": ["tw-1a", "tw-2b"]},
            ["tw-1a", "tw-2b"],
        ),
        (["PX104/FA.nii", "PX105/FA.nii"], {"known": ["104", "105"]}, ["104", "105"]),
        (["IXI002-HH-01-T1.nii", "IXI012-G-07-T1.nii"], {"pattern": r"IXI(\d+)"}, ["002", "012"]),
        (["sub-1_ses-2.nii", "sub-3_ses-2.nii"], {"pattern": r"sub-(\d)_ses-(\d)"}, ["1", "3"]),
        (IXI, {"known": ["7", "12", "13"]}, ["7", "12", "13"]),
        (IXI, {"known": ["7", "12", "13", "173"]}, ["IXI007-Guys-0173-T1", "12", "13"]),
        (["mine/T1w/S1_FA.nii", "mine/T1w/S2_FA.nii"], {"known": ["S1", "S2"]}, ["S1", "S2"]),
        (["sub-acute/a/S1_FA.nii", "sub-acute/a/S2_FA.nii"], {"known": ["S1"]}, ["S1", "S2"]),
    ],
)
def test_the_id_is_what_is_usual_or_differs_or_is_known_or_asked(paths, options, subjects):
    assert layouts.name_subjects([Path("/data", path) for path in paths], **options) == subjects


def test_a_subject_whose_id_is_in_a_folders_name_is_no_other(tmp_path):
    write(tmp_path, {f"t1/{n}.nii.gz": "" for n in range(1, 7)} | {"t1w_raw/7_T1w.nii": ""})
    chosen = layouts.choose_volumes(layouts.find_volumes(tmp_path))
    assert chosen["Subject"].tolist() == list("123456")


def test_most_of_a_cohort_is_not_lost_to_a_preferred_folder(tmp_path):
    write(tmp_path, {f"fa/S{n}.nii.gz": "" for n in (1, 2)})
    write(tmp_path, {f"deriv/S{n}/dti_FA.nii.gz": "" for n in range(3, 9)})
    with pytest.raises(ValueError, match=r"found deriv/\*/dti_FA\.nii\.gz \(6\), fa/\*\.nii\.gz"):
        layouts.choose_volumes(layouts.find_volumes(tmp_path))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"known": ["1", "2"]}, "/data/S1_2_FA: expected one ID, found 2 or 1; --id REGEX says"),
        (
            {"pattern": r"T(\d)"},
            r"expected IDs that --id T\(\\d\) finds, found none as in /data/S1",
        ),
    ],
)
def test_parts_that_are_both_known_or_not_asked_for_are_an_error(options, message):
    paths = [Path("/data", name) for name in ("S1_2_FA.nii", "S2_1_FA.nii")]
    with pytest.raises(ValueError, match=message):
        layouts.name_subjects(paths, **options)
