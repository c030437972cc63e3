"""What people have, recognised by the names of files: one layout after the other."""

import gzip
import os
from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd
import pytest

from brainsex import archives, cohort, layouts, volumes

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
LAYOUTS = [  # kind, subjects, and files: subjects' volumes have seeds 1 and 2, others 9
    ("fa", ["900001", "900002"], {"fa/900001.nii.gz": 1, "fa/900002.nii.gz": 2}),
    (  # as unpacked packages, S3 or DataLad lay it out, with FA beside the series it is of
        "hcp-fa",
        ["900001", "900002"],
        {f"{HCP}/dti_FA.nii.gz": 1, "HCP_1200/900002/T1w/Diffusion/dti_FA.nii.gz": 2}
        | {f"{HCP}{name}.nii.gz": 9 for name in ("/data", "/nodif_brain_mask", "_7T/dti_FA")},
    ),
    (
        "bids-fa",
        ["01", "A2"],
        {f"{FITS}/sub-01/ses-a/dwi/sub-01_ses-a_space-T1w_FA.nii.gz": 1}
        | {f"{FITS}/sub-A2/dwi/sub-A2_model-tensor_param-fa_dwimap.nii.gz": 2}
        | {f"{FITS}/sub-01/ses-a/dwi/sub-01_ses-a_space-T1w_MD.nii.gz": 9}
        | {"sub-01/ses-a/anat/sub-01_ses-a_T1w.nii.gz": 9},
    ),
    (  # as FSL leaves it in a folder of each subject, under one name
        "dtifit",
        ["900001", "02"],
        {"all/900001/dtifit/dti_FA.nii.gz": 1, "all/sub-02/ses-1/dti_FA.nii.gz": 2}
        | {"all/900001/dtifit/dti_MD.nii.gz": 9},
    ),
    (
        "tbss-fa",
        ["con-01", "con-02"],
        {"FA/con-01_FA.nii.gz": 1, "FA/con-02_FA.nii.gz": 2, "stats/all_FA.nii.gz": 9}
        | {"FA/con-01_FA_to_target.nii.gz": 9, "FA/con-01_FA_mask.nii.gz": 9}
        | {"stats/mean_FA.nii.gz": 9, "stats/all_FA_skeletonised.nii.gz": 9},
    ),
    (  # as tbss_1_preproc leaves it: what it moved, and beside it what it eroded
        "tbss-origdata",
        ["con-01", "con-02"],
        {"origdata/con-01.nii.gz": 1, "origdata/con-02_FA.nii.gz": 2}
        | {"FA/con-01_FA.nii.gz": 9, "FA/con-02_FA_FA.nii.gz": 9},
    ),
    (
        "tbss-target",
        ["con-01", "con-02"],
        {"FA/con-01_FA_to_target.nii.gz": 1, "FA/con-02_FA_FA_to_target.nii.gz": 2}
        | {"FA/target_to_MNI152.nii.gz": 9},
    ),
]


@pytest.mark.parametrize(("kind", "subjects", "files"), LAYOUTS)
def test_a_folder_is_taken_as_people_have_it(tmp_path, capsys, kind, subjects, files):
    write(tmp_path / "c", files)
    volumes_there = layouts.find_volumes(tmp_path / "c")
    assert set(volumes_there["Subject"]) == set(subjects)
    option = None if kind == "tbss-fa" else kind  # by default the first of the table
    chosen = layouts.choose_volumes(volumes_there, kind=option)
    assert chosen["Subject"].tolist() == subjects
    assert set(chosen["modality"]) == {"fa"}
    for path, seed in zip(chosen["path"], (1, 2), strict=True):
        image = nib.load(path)
        np.testing.assert_array_equal(image.get_fdata(dtype=np.float32), fa(seed))
    assert f"2 subjects of kind {kind} (there are: " in capsys.readouterr().out


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


def test_packages_old_and_new_are_told_apart_and_led_to_the_next_command(tmp_path):
    names = [
        *("900001_3T_Diffusion_preproc.zip", "900002_Diffusion3TRecommended.zip"),
        *("900002_StructuralRecommended.zip", "900003_3T_Structural_preproc.zip"),
        *("deeper/900004.zip", "sub-01.zip", "900006_FA.zip", "900007_dti_maps.zip"),
        *("900008_7T_Diffusion_preproc.zip", "backup of 2019.zip"),
        "900005/T1w/Diffusion/data.nii.gz",
    ]
    write(tmp_path, dict.fromkeys(names, ""))
    files = layouts.find_volumes(tmp_path)
    assert files.groupby("kind")["Subject"].agg(list).to_dict() == {
        "package-2017": ["900001"],
        "package-2025": ["900002"],
        "package-t1": ["900002", "900003"],
        "archive": ["900006", "900007", "900004", "01"],
        "hcp-series": ["900005"],
    }
    people = pd.DataFrame({"Gender": list("FMF")}, ["900001", "900002", "900009"])
    summary = layouts.summarise_layout(files, people)
    assert summary.loc["package-2017", "next"] == "python -m brainsex fa COHORT COHORT/fa"
    assert "extract" in summary.loc["package-t1", "next"]
    assert summary.loc["package-t1", ["subjects", "no row", "rows without"]].tolist() == [2, 1, 2]
    assert "no row" not in layouts.summarise_layout(files, None)
    message = "kind none; to make some: python -m brainsex extract COHORT"
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
    assert set(files["kind"]) == {"bids-fa"}
    assert {path.name for path in files["path"]} == {f"sub-01_{name}.nii.gz" for name in names}


@LINKS
def test_the_summary_says_what_is_missing_before_a_volume_is_read(tmp_path):
    names = [f"sub-01/ses-{n}/dwi/sub-01_ses-{n}_FA.nii.gz" for n in (1, 2)]
    write(tmp_path, dict.fromkeys(names, ""))
    (tmp_path / "sub-09/dwi").mkdir(parents=True)
    (tmp_path / "sub-09/dwi/sub-09_FA.nii.gz").symlink_to("not-fetched")
    people = pd.DataFrame({"Gender": list("FMF")}, ["01", "02", "03"])
    summary = layouts.summarise_layout(layouts.find_volumes(tmp_path), people)
    assert summary.loc["bids-fa"].tolist() == ["fa", 2, 1, 1, 1, 2, ""]


def test_of_several_sessions_or_spaces_one_is_chosen(tmp_path):
    for session, space in (("a", "T1w"), ("a", "MNI"), ("b", "T1w")):
        name = f"sub-01/ses-{session}/dwi/sub-01_ses-{session}_space-{space}_FA.nii.gz"
        write(tmp_path, {name: ""})
    files = layouts.find_volumes(tmp_path)
    assert len(layouts.choose_volumes(files)) == 3
    chosen = layouts.choose_volumes(files, session="a", match="*_space-T1w_*")
    assert [path.name for path in chosen["path"]] == ["sub-01_ses-a_space-T1w_FA.nii.gz"]
    for options, message in (
        ({"match": "*_x"}, r"name \*_x, found those of kind bids-fa"),
        ({"session": "c"}, "session c, name any, found those of kind bids-fa"),
        ({"kind": "t1"}, "of kind t1, session any, name any, found those of kind bids-fa"),
    ):
        with pytest.raises(ValueError, match=message):
            layouts.choose_volumes(files, **options)


def test_nothing_recognised(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"that DATA_ACCESS\.md lists, found \[\]"):
        layouts.find_volumes(tmp_path / "nowhere")
    hidden = ".hidden/fa/1.nii.gz", "__MACOSX/900001/T1w/FA.nii.gz", "FA/._900001_FA.nii.gz"
    write(tmp_path, dict.fromkeys(["T1.nii.gz", *hidden], ""))
    with pytest.raises(FileNotFoundError, match=r"lists, found \[.*'T1\.nii\.gz'.*\]"):
        layouts.find_volumes(tmp_path)


@LINKS
def test_what_two_links_lead_to_counts_once_a_subject(tmp_path):
    """DataLad's files are links; a subject's folder may be one, and a whole tree twice."""
    write(tmp_path, {"store/x_FA.nii.gz": "", "data/sub-02/dwi/sub-02_FA.nii.gz": ""})
    (tmp_path / "data/sub-01/dwi").mkdir(parents=True)
    (tmp_path / "data/sub-01/dwi/sub-01_FA.nii.gz").symlink_to(tmp_path / "store/x_FA.nii.gz")
    (tmp_path / "data/again").symlink_to(tmp_path / "data")
    (tmp_path / "data/copy").mkdir()
    (tmp_path / "data/copy/sub-01").symlink_to(tmp_path / "data/sub-01")
    assert sorted(layouts.find_volumes(tmp_path / "data")["Subject"]) == ["01", "02"]


@pytest.mark.parametrize(
    ("path", "subject"),
    [
        ("x/sub-01/ses-1/dwi/sub-01_ses-1_FA.nii.gz", "01"),
        ("900001/T1w/T1w_acpc_dc_restore_brain.nii.gz", "900001"),
        ("fa/000012_FA.nii.gz", "000012"),
        ("sub-7.nii", "7"),
        ("con-01_FA_FA.nii.gz", "con-01"),
        ("900003/dti_FA.nii.gz", "900003"),
        ("con-01/T1w/Diffusion/data.nii.gz", "con-01"),
        ("HCA6002236_V1_MR/T1w/Diffusion/data.nii.gz", "HCA6002236_V1_MR"),
        ("sub-01/ses-1/T1w/Diffusion/data.nii.gz", "01"),
        ("900001_3T_Diffusion_preproc.zip", "900001"),
    ],
)
def test_subject_of_a_path(tmp_path, path, subject):
    assert layouts.subject_of(tmp_path / path) == subject
    if path.endswith(("data.nii.gz", ".zip")):  # the same for the command fa
        assert archives._subject_of(tmp_path / path) == subject
