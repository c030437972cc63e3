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


def nifti(*seeds: int) -> bytes:
    """Make a compressed volume, of several seeds a 4D one."""
    data = fa(*seeds) if len(seeds) == 1 else np.stack([fa(seed) for seed in seeds], -1)
    return gzip.compress(nib.Nifti1Image(data, LAS).to_bytes(), 1, mtime=0)


def write(folder: Path, files: dict[str, int | tuple[int, ...] | str]) -> None:
    """Write a volume of a seed, a 4D one of several, or a text, and the folders they lie in."""
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, str):
            (folder / name).write_text(content)
        else:
            (folder / name).write_bytes(nifti(*np.atleast_1d(content)))


HCP, FITS = "HCP_1200/900001/T1w/Diffusion", "derivatives/fits"
TBSS_4D = {"stats/all_FA.nii.gz": (1, 2), "stats/all_FA.txt": "900002\nsub-900001_FA.nii.gz\n"}
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
    ("tbss-4d", ["900002", "900001"], TBSS_4D),
    (  # as tbss_4_prestats leaves it
        "tbss-4d",
        ["con-01", "con-02"],
        {"stats/all_FA.nii.gz": (1, 2), "stats/thresh.txt": "0.2\n"}
        | {"FA/con-02_FA_FA.nii.gz": 9, "FA/con-01_FA.nii.gz": 9},
    ),
]


@pytest.mark.parametrize(("kind", "subjects", "files"), LAYOUTS)
def test_a_folder_is_taken_as_people_have_it(tmp_path, capsys, kind, subjects, files):
    write(tmp_path / "c", files)
    before = sorted((tmp_path / "c").rglob("*"))
    volumes_there = layouts.find_volumes(tmp_path / "c")
    assert set(volumes_there["Subject"]) == set(subjects)
    option = None if kind == "tbss-fa" else kind  # by default the first of the table
    chosen = layouts.choose_volumes(volumes_there, tmp_path / "scratch", kind=option)
    assert before == sorted((tmp_path / "c").rglob("*"))
    assert chosen["Subject"].tolist() == subjects
    assert set(chosen["modality"]) == {"fa"}
    for path, seed in zip(chosen["path"], (1, 2), strict=True):
        image = nib.load(path)
        np.testing.assert_array_equal(image.get_fdata(dtype=np.float32), fa(seed))
    output = capsys.readouterr().out
    assert f"2 subjects of kind {kind} (there are: " in output
    if kind == "tbss-4d":
        assert f"all_FA.nii.gz: 2 volumes, of {subjects[0]} to {subjects[1]}" in output


def test_what_is_chosen_converts(tmp_path):
    write(tmp_path, LAYOUTS[2][2])
    rows = "participant_id\tage\tsex\nsub-01\t31\tfemale\nsub-A2\tn/a\tM\n"
    (tmp_path / "participants.tsv").write_text(rows)
    chosen = layouts.choose_volumes(layouts.find_volumes(tmp_path), tmp_path)
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
    with pytest.raises(
        ValueError, match="kind none; to make some: python -m brainsex extract COHORT"
    ):
        layouts.choose_volumes(files, tmp_path)


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
    assert len(layouts.choose_volumes(files, tmp_path)) == 3
    chosen = layouts.choose_volumes(files, tmp_path, session="a", match="*_space-T1w_*")
    assert [path.name for path in chosen["path"]] == ["sub-01_ses-a_space-T1w_FA.nii.gz"]
    for options, message in (
        ({"match": "*_x"}, r"name \*_x, found those of kind bids-fa"),
        ({"session": "c"}, "session c, name any, found those of kind bids-fa"),
        ({"kind": "t1"}, "of kind t1, session any, name any, found those of kind bids-fa"),
    ):
        with pytest.raises(ValueError, match=message):
            layouts.choose_volumes(files, tmp_path, **options)


def spoil_the_checksum(content: bytes) -> bytes:
    """Spoil it where only who reads far beyond the voxels can tell."""
    content = bytearray(gzip.compress(gzip.decompress(content) + bytes(3 << 20)))
    content[-8] ^= 1
    return content


RGB = nib.Nifti1Image(np.zeros((2, 2, 2, 2), [(name, np.uint8) for name in "RGB"]), LAS).to_bytes()


@pytest.mark.parametrize(
    ("damage", "problem"),
    [
        (lambda content: nifti(1, 2, 3), r"found \(7, 9, 8, 3\)"),
        (lambda content: nifti(1), r"found \(7, 9, 8\)"),
        (lambda content: gzip.compress(RGB), "cannot read it"),
        (lambda content: content[:-500], "Compressed file ended"),
        (spoil_the_checksum, "CRC"),
    ],
)
def test_a_4d_file_that_is_damaged_or_does_not_fit_its_list(tmp_path, damage, problem):
    write(tmp_path, TBSS_4D)
    path = tmp_path / "stats/all_FA.nii.gz"
    path.write_bytes(damage(path.read_bytes()))
    files = layouts.find_volumes(tmp_path)
    for _ in range(2):  # what the first attempt left does not hide the damage
        message = rf"all_FA\.nii\.gz: expected 2 volumes, of 900002 to 900001, .*{problem}"
        with pytest.raises(ValueError, match=message):
            layouts.choose_volumes(files, tmp_path / "scratch")


def test_a_4d_file_needs_one_list(tmp_path):
    write(tmp_path, TBSS_4D | {f"FA/{n}_FA.nii.gz": "" for n in range(3)})
    (tmp_path / "stats" / "all_FA.txt").unlink()
    for message in (
        "expected 3 volumes, of 0 to 2",
        "expected one such file, .*found 0 more and 0 IDs",
    ):
        with pytest.raises(ValueError, match=message):
            layouts.choose_volumes(layouts.find_volumes(tmp_path), tmp_path, kind="tbss-4d")
        if (tmp_path / "FA").is_dir():
            (tmp_path / "FA").rename(tmp_path / "TBSS")


def test_a_4d_file_without_a_list_gets_in_nothing_s_way(tmp_path):
    write(tmp_path, {"fa/1.nii.gz": "", "stats/all_FA.nii.gz": "", "stats/b.txt": ""})
    (tmp_path / "stats/a.txt").write_bytes(b"\xff")
    files = layouts.find_volumes(tmp_path)
    assert layouts.choose_volumes(files, tmp_path)["Subject"].tolist() == ["1"]
    summary = layouts.summarise_layout(files, None)
    assert summary.loc["tbss-4d"].tolist() == [
        "fa", 0, 0, 0, "no list of IDs: DATA_ACCESS.md, section 7"
    ]  # fmt: skip


def test_a_4d_file_is_split_once_with_its_scaling_and_affine_and_anew_when_it_changed(tmp_path):
    image = nib.Nifti1Image(np.int16(np.stack([fa(0), fa(1)], -1) * 10_000), LAS)
    image.set_sform(LAS, 4)
    image.header.set_slope_inter(0.0001, 0)
    (tmp_path / "all_FA.nii").write_bytes(image.to_bytes())
    (tmp_path / "all_FA.txt").write_text("1\n1\n")

    def split() -> list[int]:
        chosen = layouts.choose_volumes(layouts.find_volumes(tmp_path), tmp_path / "out")
        assert chosen["Subject"].tolist() == ["1", "1"]
        for path, seed in zip(chosen["path"], (0, 1), strict=True):
            volume = nib.load(path)
            assert int(volume.header["sform_code"]) == 4
            np.testing.assert_allclose(volume.affine, LAS)
            np.testing.assert_allclose(volume.get_fdata(), fa(seed), atol=1e-4)
        return [path.stat().st_mtime_ns for path in chosen["path"]]

    first, second = split()
    assert split() == [first, second]
    next((tmp_path / "out").glob("*/00001.nii.gz")).unlink()
    assert split()[0] == first
    os.utime(tmp_path / "all_FA.nii", ns=(0, 0))
    assert split()[0] > first


def test_nothing_recognised(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"found \[\]\. DATA_ACCESS\.md"):
        layouts.find_volumes(tmp_path / "nowhere")
    hidden = ".hidden/fa/1.nii.gz", "__MACOSX/900001/T1w/FA.nii.gz", "FA/._900001_FA.nii.gz"
    write(tmp_path, dict.fromkeys(["T1.nii.gz", *hidden], ""))
    with pytest.raises(FileNotFoundError, match=r"found \[.*'T1\.nii\.gz'.*\]\. DATA_ACCESS\.md"):
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
        assert archives.archive_subject(tmp_path / path) == subject
