"""Brain masks and registration to MNI152: from whole heads in scanner space to one cohort."""

import json
import os
from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd
import pytest
from nibabel.affines import apply_affine, from_matvec
from nilearn.datasets import load_mni152_template
from scipy.ndimage import binary_erosion, center_of_mass, distance_transform_edt
from scipy.spatial.transform import Rotation

from brainsex import layouts, registration, volumes
from brainsex.__main__ import main

IXI = os.environ.get("BRAINSEX_IXI")
RAW = Path(IXI or "", "../ixi_raw")
SCANNER = np.array([[0, 0, -3.0, 40], [-2, 0, 0, 30], [0, 2.5, 0, -20], [0, 0, 0, 1]])  # LSP
SHAPE = (20, 22, 18)


@pytest.fixture(scope="module")
def template():
    image = load_mni152_template(resolution=4)
    return image.get_fdata(dtype=np.float32), image.affine


@pytest.mark.parametrize(("pose", "size"), [("affine", 1), ("rigid", 0.9)])
def test_a_rotated_shifted_and_smaller_head_gets_back_to_its_place(template, pose, size):
    brain, to_mm = template
    turn = Rotation.from_euler("xyz", [12, -6, 8], degrees=True).as_matrix()
    away = from_matvec(0.9 * turn, [25, -30, 40])
    points = apply_affine(to_mm, np.argwhere(brain > 0.3)[::50])
    centre = apply_affine(to_mm, center_of_mass(brain > 0))
    affine, dice = registration.align(brain, away @ to_mm, pose)
    moved = apply_affine(affine @ np.linalg.inv(to_mm), points)
    assert np.linalg.norm(moved - (centre + size * (points - centre)), axis=1).max() < 2
    assert dice > 0.95
    if pose == "rigid":
        assert np.linalg.det(affine[:3, :3]) == pytest.approx(0.9**3 * 64, rel=1e-5)


def test_a_head_upside_down_is_refused(template):
    brain, to_mm = template
    with pytest.raises(ValueError, match=r"registration failed: Dice 0\.[78]\d*, not 0\.9"):
        registration.align(brain, np.diag([1.0, -1, -1, 1]) @ to_mm, "affine")


def heads(folder, count=6):
    rng, labels = np.random.default_rng(0), np.zeros(SHAPE, np.uint8)
    labels[:10] = 7
    images = [np.float32(rng.uniform(1, 2, SHAPE)) for _ in range(count)]
    for name in ("t1", "masks"):
        (folder / name).mkdir()
    for n, image in enumerate(images):
        nib.save(nib.Nifti1Image(image, SCANNER), folder / f"t1/s-{n}_T1w.nii.gz")
        nib.save(nib.Nifti1Image(labels, SCANNER), folder / f"masks/s-{n}_labels.nii.gz")
    rows = "".join(f"s-{n}\t{'FM'[n % 2]}\n" for n in range(count))
    (folder / "participants.tsv").write_text("participant_id\tsex\n" + rows)
    return images


def test_voxels_outside_the_mask_are_0_and_bad_masks_leave_one_subject_out(tmp_path):
    images, masks = heads(tmp_path, 8), tmp_path / "masks"
    nib.save(nib.Nifti1Image(np.zeros(SHAPE, np.uint8), SCANNER), masks / "s-1_labels.nii.gz")
    shifted = SCANNER + np.outer([1, 0, 0, 0], [0, 0, 0, 2])
    nib.save(nib.Nifti1Image(np.ones(SHAPE, np.uint8), shifted), masks / "s-2_labels.nii.gz")
    (masks / "s-3_labels.nii.gz").rename(masks / "s-33_labels.nii.gz")
    (masks / "s-4_mask.nii").write_bytes(b"")
    main(["convert", str(tmp_path), "--mask", "masks/*", "--workers", "1"])
    reasons = pd.read_csv(tmp_path / "rejected.csv", index_col="Subject")["reason"]
    assert reasons.index.tolist() == ["s-1", "s-2", "s-3", "s-4"]
    parts = ("expected a brain", "its volume's grid", "one mask, found []", "s-4_mask.nii")
    assert all(part in reason for part, reason in zip(parts, reasons, strict=True))
    table = pd.read_csv(tmp_path / "subjects.csv", index_col="Subject")
    assert table["brain_volume_ml"].tolist() == [10 * 22 * 18 * 15 / 1000] * 4
    assert "alignment_dice" not in table
    brain = np.where(np.arange(20)[:, None, None] < 10, images[5], 0)
    ras = nib.as_closest_canonical(nib.Nifti1Image(brain / 2 / np.median(images[5][:10]), SCANNER))
    expected, _ = volumes.resample(ras.get_fdata().clip(0, 1), ras.affine)
    np.testing.assert_allclose(np.load(tmp_path / "tensors.npy")[1], expected, atol=1e-4)
    with pytest.raises(SystemExit, match="expected masks that match 'nothing/"):
        main(["convert", str(tmp_path), "--mask", "nothing/*", "--overwrite"])


@pytest.mark.parametrize(
    ("names", "subjects", "sessions", "found"),
    [
        ("sub-01/ses-02/a.nii sub-02/ses-01/s.nii.gz x/101.nii 01.json", "01 02 03", (), [0, 1]),
        ("P01_2.nii sub-3/ses-1/m.nii sub-3/ses-2/m.nii", "P01_2 3 P01", ["", "2", ""], [0, 2]),
    ],
)
def test_a_mask_is_of_the_longest_id_in_its_path_and_of_the_same_session(
    tmp_path, names, subjects, sessions, found
):
    paths = [tmp_path / name for name in names.split()]
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    masks = layouts.match_masks(tmp_path, "**/*", subjects.split(), sessions)
    assert masks == [*([paths[n]] for n in found), []]


def test_masks_named_as_their_volumes_are_no_volumes(tmp_path):
    heads(tmp_path, 4)
    for folder, ending in (("t1", "_T1w"), ("masks", "_labels")):
        for path in sorted((tmp_path / folder).iterdir()):
            path.rename(path.with_name(path.name.replace(ending, "-HH")))
    main(["convert", str(tmp_path), "--match", "*-HH*", "--mask", "masks/*", "--id", r"(s-\d)"])
    assert len(np.load(tmp_path / "tensors.npy")) == 4


def test_aligned_subjects_share_a_grid_and_a_failed_one_is_left_out(tmp_path, monkeypatch):
    heads(tmp_path, 3)
    scores = iter([0.95, None, 0.93])

    def align(volume, affine, pose):
        if (score := next(scores)) is None:
            raise ValueError("registration failed")
        return np.diag([3.0, 3, 3, 1]), score

    monkeypatch.setattr(registration, "align", align)
    main(["convert", str(tmp_path), "--mask", "masks/*", "--align", "rigid", "--workers", "1"])
    assert pd.read_csv(tmp_path / "subjects.csv")["alignment_dice"].tolist() == [0.95, 0.93]
    assert (tmp_path / "rejected.csv").read_text().split("\n")[1] == "s-1,registration failed"
    grid = json.loads((tmp_path / "grid.json").read_text())
    record = json.loads((tmp_path / "run.json").read_text())["convert"]
    assert all((r["align"], r["mask"]) == ("rigid", "masks/*") for r in (grid, record))
    size = np.array([182 / 58, 218 / 70, 182 / 58])
    np.testing.assert_allclose(np.diag(grid["affine"])[:3], size)
    np.testing.assert_allclose(np.array(grid["affine"])[:3, 3], size / 2 - (91, 127, 73))


@pytest.mark.skipif(not (IXI and RAW.is_dir()), reason="BRAINSEX_IXI has no ixi_raw beside it")
@pytest.mark.parametrize("subject", ["IXI014-HH-1236", "IXI159-HH-1549"])
def test_ixi_comes_out_where_it_was_aligned_elsewhere(subject):
    paths = RAW / f"t1/{subject}_T1.nii.gz", [RAW / f"labels/{subject}_T1_DLMUSE.nii.gz"]
    volume, affine, _ = volumes.prepare(paths[0], "t1", masks=paths[1])
    affine, _ = registration.align(volume, affine, "rigid")
    there, to_mm = volumes.load(Path(IXI, f"t1/{subject}.nii.gz"))
    brains = registration.regrid(volume, affine, (there.shape, to_mm)) > 0.02, there > 0
    shift = 2 * np.subtract(*map(center_of_mass, brains))
    assert np.linalg.norm(shift) < 4
    rims = [brain & ~binary_erosion(brain) for brain in brains]
    assert distance_transform_edt(~rims[1], sampling=2)[rims[0]].mean() < 3
