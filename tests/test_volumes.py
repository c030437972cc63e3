"""Volumes: read in RAS, reduced as the study does, a folder to one array, whatever is in it."""

import errno
import gzip
import itertools
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd
import pytest
from scipy.ndimage import center_of_mass, gaussian_filter, zoom
from scipy.optimize import brentq
from skimage.transform import resize

from brainsex import cohort, nifti, replacing, volumes
from brainsex.nifti import normalise
from brainsex.volumes import brain_volume, clean, convert, identifier, load, resample

SHAPE = (23, 28, 25)
LAS = np.array([[-2.5, 0, 0, 29], [0, 2.25, 0, -31], [0, 0, 2.0, -24], [0, 0, 0, 1]])
RAS = np.array([[2.5, 0, 0, 29 - 2.5 * 22], [0, 2.25, 0, -31], [0, 0, 2.0, -24], [0, 0, 0, 1]])
"""The affine of the same voxels once the first axis is reversed."""
SMALL = (10, 12, 9)


def save(path, data, affine=LAS, *, code=2, **header):
    """A NIfTI file with header fields as given; `path` says whether it is compressed."""
    image = nib.Nifti1Image(data, affine)
    image.set_sform(affine, code)
    image.set_qform(affine, code)
    for name, value in header.items():
        image.header[name] = value
    content = image.to_bytes()
    path.write_bytes(gzip.compress(content, 1, mtime=0) if path.suffix == ".gz" else content)
    return path


def fa(seed=0, shape=SHAPE):
    """An FA map: an ellipsoid of values in [0.05, 0.95], zero outside."""
    axes = np.meshgrid(*(np.linspace(-1.1, 1.1, n) for n in shape), indexing="ij")
    inside = sum(axis**2 for axis in axes) < 1
    values = np.random.default_rng(seed).uniform(0.05, 0.95, shape)
    return np.where(inside, values, 0).astype(np.float32)


def test_what_fails_half_way_leaves_what_was_there(tmp_path):
    path = tmp_path / "new" / "t.txt"

    def write(text, fails=False):
        with replacing(path) as partial:
            partial.write_text(text)
            assert not fails, "boom"

    write("old")
    with pytest.raises(AssertionError, match="boom"):
        write("ne", fails=True)
    assert path.read_text() == "old"
    assert list(path.parent.iterdir()) == [path]


# ------------------------------------------------------------------------------------------- load


@pytest.mark.parametrize("code", ["LAS", "RAS", "PIR", "SAL", "IRP", "LPI"])
def test_load_finds_a_point_at_its_millimetres_in_any_orientation(tmp_path, code):
    axis = {"R": (0, 1), "L": (0, -1), "A": (1, 1), "P": (1, -1), "S": (2, 1), "I": (2, -1)}
    affine = np.eye(4)
    for column, letter in enumerate(code):
        row, sign = axis[letter]
        affine[:3, column] = 0
        affine[row, column] = sign * (1.5, 2.0, 3.0)[column]
    affine[:3, 3] = -7, 11, 5
    data = np.zeros((5, 6, 7), np.float32)
    data[1, 4, 2], data[3, 1, 6] = 0.8, 0.3
    points = {0.8: affine @ (1, 4, 2, 1), 0.3: affine @ (3, 1, 6, 1)}
    volume, found = load(save(tmp_path / "v.nii.gz", data, affine))
    assert volume.dtype == np.float32
    assert volume.flags.c_contiguous
    assert "".join(nib.aff2axcodes(found)) == "RAS"
    assert np.count_nonzero(volume) == 2
    for value, point in points.items():
        (where,) = np.argwhere(volume == np.float32(value))
        np.testing.assert_allclose(found @ (*where, 1), point, atol=1e-6)


@pytest.mark.parametrize("code", ["RAS", "LAS", "LPI", "SAR"])
def test_a_volume_measures_the_same_as_it_lies_in_its_file(tmp_path, code):
    values = np.random.default_rng(0).uniform(-0.001, 1, (5, 6, 7)).astype(np.float32)
    values[2, 3, 4] = np.nan
    ornt = nib.orientations.axcodes2ornt(code)
    affine = nib.orientations.inv_ornt_aff(ornt, (5, 6, 7))
    image = nib.Nifti1Image(values, affine)
    nib.save(image, tmp_path / "v.nii.gz")
    (laid, one), (copied, other) = (take(tmp_path / "v.nii.gz") for take in (nifti.read, load))
    np.testing.assert_array_equal(laid, copied)
    np.testing.assert_array_equal(one, other)
    assert copied.flags.c_contiguous
    (cleaned, counts), (plain, expected) = clean(laid), clean(copied)
    np.testing.assert_array_equal(cleaned, plain)
    assert counts == expected == {"non_finite": 1, "negative": (values < 0).sum(), "above_one": 0}
    assert volumes.brain_volume(cleaned, one) == pytest.approx((values > 0.02).sum() / 1000)


def test_load_tells_left_from_right(tmp_path):
    data = np.zeros(SHAPE, np.float32)
    data[4, 9, 12] = 0.9  # x = 29 - 2.5 * 4 = 19 mm: to the right
    volume, affine = load(save(tmp_path / "v.nii.gz", data))
    assert np.unravel_index(volume.argmax(), SHAPE) == (18, 9, 12)
    np.testing.assert_allclose(affine, RAS, atol=1e-6)
    mirrored, _ = load(save(tmp_path / "m.nii.gz", data[::-1]))
    assert mirrored[4, 9, 12] == volume[18, 9, 12] != mirrored[18, 9, 12]


def test_load_keeps_an_oblique_affine(tmp_path):
    turn = np.eye(4)
    turn[:2, :2] = [[0.96, -0.28], [0.28, 0.96]]
    data = fa()
    volume, affine = load(save(tmp_path / "v.nii", data, turn @ LAS))
    np.testing.assert_array_equal(volume, data[::-1])
    np.testing.assert_allclose(affine @ (22, 3, 4, 1), turn @ LAS @ (0, 3, 4, 1), atol=1e-5)


def test_load_scales_integers(tmp_path):
    data = np.arange(np.prod(SHAPE)).reshape(SHAPE).astype(np.int16)
    path = save(tmp_path / "v.nii.gz", data, scl_slope=0.0001, scl_inter=-0.25)
    volume, _ = load(path)
    np.testing.assert_allclose(volume, data[::-1] * 0.0001 - 0.25, atol=2e-7)


def broken(tmp_path, kind):
    """A path to something that is no FA volume."""
    path = save(tmp_path / "v.nii.gz", fa())
    content = path.read_bytes()
    plain = gzip.decompress(content)
    if kind == "missing":
        path.unlink()
    elif kind == "truncated gzip":
        path.write_bytes(content[: len(content) // 2])
    elif kind == "empty file":
        path.write_bytes(b"")
    elif kind == "flipped byte":  # inside a stored block: only the checksum can tell
        content = bytearray(gzip.compress(plain, 0))
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
    elif kind == "not gzip":
        path.write_bytes(plain)
    elif kind == "not NIfTI":
        path.write_bytes(gzip.compress(b"Subject,Gender\n" * 100))
    elif kind == "truncated NIfTI":
        path.write_bytes(gzip.compress(plain[:-4]))
    elif kind == "header only":
        path.write_bytes(gzip.compress(plain[:200]))
    elif kind == "claims more than memory":
        image = nib.Nifti1Image.from_bytes(plain)
        image.header["dim"][1:4] = 32767
        path.write_bytes(gzip.compress(image.header.binaryblock + b"\0\0\0\0" + plain[352:]))
    elif kind == "bomb":
        path.write_bytes(gzip.compress(plain + bytes(10_000)))
    elif kind == "4D":
        save(path, fa()[..., None].repeat(2, axis=3))
    elif kind == "2D":
        save(path, fa()[..., 0])
    elif kind == "no affine":
        save(path, fa(), code=0)
    elif kind == "singular":
        save(path, fa())
        plain = bytearray(gzip.decompress(path.read_bytes()))
        plain[280:296] = plain[296:312]  # the sform's first row is its second
        path.write_bytes(gzip.compress(bytes(plain)))
    elif kind == "NaN in the affine":
        plain = bytearray(plain)
        plain[280:284] = np.float32(np.nan).tobytes()
        path.write_bytes(gzip.compress(bytes(plain)))
    elif kind == "complex":
        save(path, fa().astype(np.complex64))
    elif kind == "colours":
        rgb = np.zeros(SHAPE, [("R", "u1"), ("G", "u1"), ("B", "u1")])
        save(path, rgb)
    elif kind == "folder":
        path.unlink()
        path.mkdir()
    return path


@pytest.mark.parametrize(
    ("kind", "error", "message"),
    [
        ("missing", FileNotFoundError, "no such volume.*DATA_ACCESS"),
        ("folder", FileNotFoundError, "no such volume"),
        ("truncated gzip", ValueError, "damaged gzip"),
        ("empty file", ValueError, "not a NIfTI-1 file"),
        ("flipped byte", ValueError, "damaged gzip.*CRC"),
        ("not gzip", ValueError, "damaged gzip"),
        ("not NIfTI", ValueError, "not a NIfTI-1 file"),
        ("truncated NIfTI", ValueError, r"truncated: expected \d+ bytes, found \d+"),
        ("header only", ValueError, "not a NIfTI-1 file"),
        ("claims more than memory", ValueError, "at most 33554432 voxels"),
        ("bomb", ValueError, "more than 9999 bytes after"),
        ("4D", ValueError, r"expected a 3D volume, found shape \(23, 28, 25, 2\)"),
        ("2D", ValueError, r"expected a 3D volume, found shape \(23, 28\)"),
        ("no affine", ValueError, "no affine"),
        ("singular", ValueError, "singular"),
        ("NaN in the affine", ValueError, "singular"),
        ("complex", ValueError, "real numbers, found complex64"),
        ("colours", ValueError, "real numbers"),
    ],
)
def test_load_refuses(tmp_path, monkeypatch, kind, error, message):
    if kind == "bomb":
        monkeypatch.setattr("brainsex.nifti.MAX_BYTES", 9_999)
    path = broken(tmp_path, kind)
    with pytest.raises(error, match=message) as caught:
        load(path)
    assert str(path) in str(caught.value)


SOME_OR_MANY = pytest.mark.parametrize(
    "count", [300, pytest.param(20_000, marks=pytest.mark.soak)], ids=["some", "many"]
)


@SOME_OR_MANY
def test_load_survives_any_damage_to_the_header(tmp_path, count):
    """A volume that could not be meant is refused; nothing else is ever raised."""
    rng = np.random.default_rng(0)
    whole = save(tmp_path / "v.nii", fa()).read_bytes()
    refused = 0
    for _ in range(count):
        content = bytearray(whole)
        for place in rng.integers(0, 352, rng.integers(1, 5)):
            content[place] = rng.integers(256)
        (tmp_path / "v.nii").write_bytes(content)
        try:
            volume, affine = load(tmp_path / "v.nii")
        except ValueError:
            refused += 1
        else:
            assert volume.ndim == 3
            assert 0 < abs(np.linalg.det(affine)) < np.inf
    assert 0.1 < refused / count < 0.9


@SOME_OR_MANY
def test_load_gives_the_right_volume_or_none_whatever_happens_to_its_bytes(tmp_path, count):
    """Cut off, or a byte changed: gzip's checksum sees it, or (in gzip's header) it is harmless."""
    rng = np.random.default_rng(1)
    shape = (7, 9, 8)
    whole = save(tmp_path / "v.nii.gz", fa(0, shape)).read_bytes()
    refused = 0
    for _ in range(count):
        content = bytearray(whole)
        if rng.random() < 0.2:
            del content[rng.integers(len(content)) :]
        else:
            content[rng.integers(len(content))] ^= rng.integers(1, 256)
        (tmp_path / "v.nii.gz").write_bytes(content)
        try:
            volume, affine = load(tmp_path / "v.nii.gz")
        except ValueError:
            refused += 1
        else:
            np.testing.assert_array_equal(volume, fa(0, shape)[::-1])
            assert affine[0, 0] == 2.5
    assert 0.95 < refused / count < 1


# --------------------------------------------------------------------------------------- resample


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ((31, 37, 29), (12, 14, 13)),
        ((73, 87, 73), (58, 70, 58)),
        ((20, 37, 29), (24, 14, 29)),  # one axis enlarged, one kept
    ],
)
def test_resample_is_the_study_s_resize(old, new):
    volume = np.random.default_rng(1).random(old, np.float32)
    found, _ = resample(volume, np.eye(4), new)
    assert found.dtype == np.float32
    for order, turn in (("F", 1), ("F", -1), ("C", -1)):  # as a file in RAS, in LPI
        turned = np.array(volume[::turn, ::turn, ::turn], order=order)[::turn, ::turn, ::turn]
        again, _ = resample(turned, np.eye(4), new)
        np.testing.assert_allclose(again, found, atol=1e-6)
        assert again.flags.c_contiguous
    np.testing.assert_allclose(found, resize(volume, new), atol=1e-6)
    factors = np.divide(old, new)
    smooth = gaussian_filter(
        volume.astype(float), np.maximum(0, (factors - 1) / 2), mode="mirror", truncate=4
    )
    expected = zoom(smooth, 1 / factors, order=1, mode="mirror", grid_mode=True)
    np.testing.assert_allclose(found, expected, atol=1e-6)


def test_resample_s_affine_on_hcp_s_grid():
    hcp = np.diag([1.25, 1.25, 1.25, 1])
    hcp[:3, 3] = 90 - 144 * 1.25, -126, -72
    volume, affine = resample(np.ones((145, 174, 145), np.float32), hcp)
    assert volume.shape == (58, 70, 58)
    np.testing.assert_allclose(np.diag(affine), [3.125, 3.1071, 3.125, 1], atol=5e-5)
    np.testing.assert_allclose(affine[:3, 3], [-89.0625, -125.0714, -71.0625], atol=5e-5)
    assert volume.max() == 1  # rounding does not lift FA above what there was


def test_resample_keeps_a_point_s_millimetres():
    point = np.array([11.0, -4.0, 6.5])  # mm
    turn = np.eye(4)
    turn[1:3, 1:3] = [[0.96, -0.28], [0.28, 0.96]]
    affine = turn @ np.diag([-1.25, 1.5, 1.0, 1])
    affine[:3, 3] = 60, -50, -40
    shape = (80, 70, 90)
    indices = np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"), -1)
    millimetres = indices @ affine[:3, :3].T + affine[:3, 3]
    blob = np.exp(-((millimetres - point) ** 2).sum(-1) / 2 / 5**2)
    found, small = resample(blob, affine, (32, 29, 37))
    np.testing.assert_allclose(small @ (*center_of_mass(found), 1), (*point, 1), atol=0.02)


def test_resample_leaves_a_fifth_of_the_noise():
    noise = np.random.default_rng(2).standard_normal((145, 87, 70))
    found, _ = resample(noise, np.eye(4), (58, 35, 28))
    assert 0.185 < found.std() < 0.195


@pytest.mark.parametrize(
    ("volume", "shape", "message"),
    [
        (np.ones((4, 5)), (2, 2, 2), "3D volume"),
        (np.ones((4, 5, 6)), (2, 2), "3D volume and shape"),
        (np.ones((4, 5, 6)), (2, 0, 2), "3D volume and shape"),
        (np.full((4, 5, 6), np.nan), (2, 2, 2), "finite"),
        (np.full((4, 5, 6), np.inf), (2, 2, 2), "finite"),
    ],
)
def test_resample_refuses(volume, shape, message):
    with pytest.raises(ValueError, match=message):
        resample(volume, np.eye(4), shape)


# ------------------------------------------------------------------------------------------ clean


def test_clean_counts_what_it_changes():
    volume = np.full((9, 10, 11), 0.5, np.float32)
    volume[0, 0, :4] = np.nan, np.inf, -np.inf, np.nan
    volume[1, 1, :3] = -0.1, -2, -1e-6
    volume[2, 2, :2] = 1.2, 3
    volume[3, 3, :3] = 0, 1, 0.999
    before = volume.copy()
    cleaned, counts = clean(volume)
    assert counts == {"non_finite": 4, "negative": 3, "above_one": 2}
    expected = np.full((9, 10, 11), 0.5, np.float32)
    expected[0, 0, :4] = 0
    expected[1, 1, :3] = 0
    expected[2, 2, :2] = 1
    expected[3, 3, :3] = 0, 1, 0.999
    np.testing.assert_array_equal(cleaned, expected)
    assert cleaned.dtype == np.float32
    np.testing.assert_array_equal(volume, before)


@pytest.mark.parametrize(
    ("volume", "message"),
    [
        (fa() * 10_000, r"values from 0 to 9\d\d\d, expected fractional anisotropy in \[0, 1\]"),
        (fa() * 1.1, "another kind of image, or scaled"),  # 9 % above 1
        (-fa() + 0.5 * (fa() > 0), "values from -0.4"),
        (np.zeros(SHAPE), "empty volume"),
        (np.full(SHAPE, np.nan), "empty volume"),
        (-fa(), "empty volume"),
    ],
)
def test_clean_refuses_what_is_no_fa(volume, message):
    with pytest.raises(ValueError, match=message):
        clean(volume)


@pytest.mark.parametrize("scale", [1e-3, 1, 4e4])
def test_clean_scales_t1_by_the_brain_s_median(scale):
    volume = fa(1)
    brain = volume > 0
    volume[brain] += 0.5
    expected = volume / np.median(volume[brain]) / 2
    assert (expected > 1).sum() == 0
    volume[2, 3, 4:9] = -1, np.nan, 1e-9, 1e-12, 0  # ringing outside the brain
    volume[12, 14, 12] = 50  # a vessel
    cleaned, counts = clean(volume * scale, "t1")
    assert counts == {"non_finite": 1, "negative": 1, "above_one": 1}
    expected[12, 14, 12] = 1
    np.testing.assert_allclose(cleaned, expected, atol=2e-4)
    with pytest.raises(ValueError, match="empty volume"):
        clean(np.zeros(SHAPE), "t1")


def test_clean_puts_white_matter_of_a_real_template_near_three_fifths():
    """The MNI template that nilearn brings along: a T1-weighted brain."""
    from nilearn.datasets import load_mni152_template, load_mni152_wm_mask

    volume = load_mni152_template(resolution=2).get_fdata()
    cleaned, counts = clean(volume * 700, "t1")
    white = cleaned[load_mni152_wm_mask(resolution=2).get_fdata() > 0]
    assert 0.5 < white.mean() < 0.65
    assert counts["above_one"] == 0
    assert 1500 < brain_volume(cleaned, 2 * np.eye(4)) < 2100


def ellipsoid(shape, centre, radii):
    axes = np.meshgrid(*map(np.arange, shape), indexing="ij")
    return sum(((x - c) / r) ** 2 for x, c, r in zip(axes, centre, radii))


def test_normalise_gives_heads_of_any_size_and_place_one_size_and_place():
    shape = (40, 50, 44)
    low = ellipsoid(shape, (17, 26, 20), (12, 15, 11))
    high = ellipsoid(shape, (21, 24, 23), (17, 21, 18))
    found = [normalise(np.float32((1 - r).clip(0))) for r in (low, high)]
    # where the half per cent of an ellipsoid begins, as a share of its radii; and it is smaller
    # than its rim, as what is above 0.02 is 0.99 of the radii
    share = brentq(lambda x: (2 - 3 * x + x**3) / 4 - 0.005, 0, 1) * 0.98**0.5
    expected = ellipsoid(shape, (np.array(shape) - 1) / 2, 0.375 / share * np.array(shape))
    for volume in found:
        assert volume.shape == shape
        np.testing.assert_allclose(volume, (1 - expected).clip(0), atol=0.06)
    stray = np.float32(high < 1)
    stray[0, 0, 0] = 1
    np.testing.assert_allclose(normalise(stray), normalise(np.float32(high < 1)), atol=0.02)
    with pytest.raises(ValueError, match="no voxel"):
        normalise(np.zeros(shape))


def test_brain_volume_in_millilitres():
    volume = np.zeros(SHAPE, np.float32)
    volume[:10, :10, :10] = 0.5
    volume[10, 0, :2] = 0.02, 0.021  # not above 0.02; above
    assert brain_volume(volume, LAS) == pytest.approx(1001 * 2.5 * 2.25 * 2.0 / 1000)


def test_identifier():
    names = ("012345.nii.gz", "012345_FA.nii.gz", "012345.nii", "012345_FA.nii")
    assert {identifier(Path("fa") / name) for name in names} == {"012345"}
    assert identifier("fa/sub-01_FA.nii.gz") == "01"


# ---------------------------------------------------------------------------------------- convert


def make(folder, count=5, *, shape=SHAPE, rows=()):
    """A cohort's folder: volumes 000001, 000002, … and a table of them and of `rows` besides."""
    (folder / "fa").mkdir(parents=True)
    subjects = [f"{n:06d}" for n in range(1, count + 1)]
    for n, subject in enumerate(subjects):
        save(folder / "fa" / f"{subject}.nii.gz", fa(n, shape))
    table = [(s, "FM"[n % 2], "26-30") for n, s in enumerate(subjects)] + list(rows)
    table = pd.DataFrame(table, columns=["Subject", "Gender", "Age"])
    table.to_csv(folder / "unrestricted_behavioral.csv", index=False)
    return folder


def run(folder, out=None, **options):
    options = {"shape": SMALL, "workers": 1} | options
    return convert(folder / "fa", folder, out or folder, **options)


def rejected(folder):
    table = pd.read_csv(folder / "rejected.csv", dtype=str)
    return dict(zip(table["Subject"], table["reason"]))


FILES = {"tensors.npy", "labels.npy", "subjects.csv", "grid.json", "rejected.csv"}


def contents(folder):
    """Every file of a converted cohort, and nothing else lies there but the run's record."""
    found = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert set(found) == FILES | {".lock", "run.json"}
    del found["run.json"]  # which names the folders
    return found


def test_convert_writes_the_cohort(tmp_path, capsys):
    folder = make(tmp_path / "c", rows=[("900000", "F", "31-35")])
    assert run(folder) == folder / "tensors.npy"
    tensors = np.load(folder / "tensors.npy")
    labels = np.load(folder / "labels.npy")
    assert tensors.dtype == np.float32
    assert labels.dtype == np.int64
    for n in range(5):  # stored in LAS, so reversed in RAS
        np.testing.assert_allclose(tensors[n], resize(fa(n)[::-1], SMALL), atol=1e-6)
    assert labels.tolist() == [0, 1, 0, 1, 0]
    table = pd.read_csv(folder / "subjects.csv", dtype=str)
    assert table["Subject"].tolist() == ["000001", "000002", "000003", "000004", "000005"]
    assert table["Gender"].tolist() == list("FMFMF")
    assert table["age"].tolist() == ["26-30"] * 5
    for n, volume in enumerate(table["brain_volume_ml"].astype(float)):
        assert volume == pytest.approx((fa(n) > 0).sum() * 11.25 / 1000, abs=6e-4)
    grid = json.loads((folder / "grid.json").read_text())
    factors = np.divide(SHAPE, SMALL)
    assert grid["shape"] == list(SMALL)
    np.testing.assert_allclose(np.diag(grid["affine"])[:3], factors * (2.5, 2.25, 2), rtol=1e-6)
    corner = RAS @ (*((factors - 1) / 2), 1)
    np.testing.assert_allclose(np.array(grid["affine"])[:, 3], corner, rtol=1e-6)
    assert rejected(folder) == {"900000": "a row, but no volume"}
    assert "5 subjects; 0 volumes rejected, 1 rows without a volume" in capsys.readouterr().out


def test_convert_leaves_out_every_bad_subject_and_does_the_rest(tmp_path, capsys):
    folder = make(tmp_path / "c", 3, rows=[("900000", "F", ""), ("000014", "U", "")])
    volumes_dir, table = folder / "fa", folder / "unrestricted_behavioral.csv"
    bad = {"000011": "truncated gzip", "000012": "flipped byte", "000013": "4D"}
    bad |= {"000015": "no affine", "000016": "not NIfTI", "000020": "folder"}
    names = [*bad, "000017", "000018", "000021", "000022", "000023"]
    with table.open("a") as file:
        file.writelines(f"{name},M,\n" for name in names)
        file.write("000019,,\n")
    for name, kind in bad.items():
        path = broken(tmp_path, kind)
        path.rename(volumes_dir / f"{name}.nii.gz")
    save(volumes_dir / "000014.nii.gz", fa(14))
    save(volumes_dir / "000017.nii.gz", fa(17, (23, 28, 26)))
    save(volumes_dir / "000018.nii.gz", fa(18))
    save(volumes_dir / "000018_FA.nii", fa(18))
    save(volumes_dir / "000019.nii.gz", fa(19))
    save(volumes_dir / "000021.nii.gz", fa(21) * 10_000)
    save(volumes_dir / "000022.nii.gz", fa(22)[::-1], RAS)  # the same brain, stored in RAS
    save(volumes_dir / "000023.nii.gz", fa(23), RAS)  # the same brain seen from below: refused
    shifted = LAS.copy()
    shifted[:3, 3] += 40
    save(volumes_dir / "000023.nii.gz", fa(23), shifted)
    save(volumes_dir / "800000.nii.gz", fa(80))
    (volumes_dir / "800001.nii.gz").symlink_to("nowhere")
    run(folder, workers=2)
    reasons = rejected(folder)
    for subject, reason in {
        "000011": "damaged gzip",
        "000012": "CRC",
        "000013": "expected a 3D volume, found shape (23, 28, 25, 2)",
        "000014": "Gender is 'U', expected M or F",
        "000015": "no affine",
        "000016": "not a NIfTI-1 file",
        "000017": "its grid (23, 28, 26)",
        "000018": "2 volumes: c/fa/000018.nii.gz, c/fa/000018_FA.nii: keep one",
        "000019": "Gender is nan, expected M or F",
        "000020": "no file behind its name",
        "000021": "expected fractional anisotropy in [0, 1]",
        "000023": "is not the cohort's (23, 28, 25)",
        "800000": "a volume, but no row in the table",
        "800001": "a volume, but no row in the table",
        "900000": "a row, but no volume",
    }.items():
        assert reason in reasons.pop(subject)
    assert not reasons
    kept = pd.read_csv(folder / "subjects.csv", dtype=str)
    assert kept["Subject"].tolist() == ["000001", "000002", "000003", "000022"]
    tensors = np.load(folder / "tensors.npy")
    for tensor, n in zip(tensors, (0, 1, 2, 22), strict=True):
        np.testing.assert_allclose(tensor, resize(fa(n)[::-1], SMALL), atol=1e-6)
    assert np.load(folder / "labels.npy").tolist() == [0, 1, 0, 1]
    assert "4 subjects; 14 volumes rejected, 1 rows without" in capsys.readouterr().out


def test_convert_gives_the_same_bytes_whatever_the_workers_and_the_order_of_files(
    tmp_path, monkeypatch
):
    folder = make(tmp_path / "c", 8)
    (folder / "fa" / "000003.nii.gz").write_bytes(b"not a volume")
    shutil.copy(folder / "fa" / "000005.nii.gz", folder / "fa" / "000005_FA.nii.gz")
    run(folder, tmp_path / "one", workers=1)
    glob = Path.glob
    monkeypatch.setattr(Path, "glob", lambda *a: reversed(list(glob(*a))))
    run(folder, tmp_path / "four", workers=4)
    assert contents(tmp_path / "one") == contents(tmp_path / "four")


def test_convert_goes_on_where_a_file_cannot_be_read(tmp_path, monkeypatch):
    folder = make(tmp_path / "c", 3)

    def failing(path):
        if path.name == "000002.nii.gz":
            raise OSError(errno.EIO, "Input/output error")
        return load(path)

    monkeypatch.setattr(volumes, "read", failing)
    run(folder)
    assert list(rejected(folder)) == ["000002"]
    assert "Input/output error" in rejected(folder)["000002"]
    assert len(np.load(folder / "tensors.npy")) == 2


def test_a_second_run_does_nothing(tmp_path, monkeypatch, capsys):
    folder = make(tmp_path / "c", 3)
    out = tmp_path / "out"
    run(folder, out)
    capsys.readouterr()
    before = {path: path.stat().st_mtime_ns for path in out.iterdir()}
    monkeypatch.setattr(volumes, "read", lambda path: pytest.fail(f"{path} was read"))
    run(folder, out)
    assert {path: path.stat().st_mtime_ns for path in out.iterdir()} == before
    assert "3 subjects" in capsys.readouterr().out


@pytest.mark.parametrize("name", sorted(FILES - {"tensors.npy"}))
def test_convert_restores_a_file_that_was_lost(tmp_path, name):
    folder = make(tmp_path / "c", 3)
    run(folder, tmp_path / "out")
    before = contents(tmp_path / "out")
    (tmp_path / "out" / name).unlink()
    run(folder, tmp_path / "out")
    assert contents(tmp_path / "out") == before


def test_convert_anew_when_table_volume_or_options_changed(tmp_path):
    folder = make(tmp_path / "c", 3)
    table = folder / "unrestricted_behavioral.csv"
    run(folder)
    table.write_text(table.read_text().replace("000001,F", "000001,M"))
    run(folder)
    assert np.load(folder / "labels.npy").tolist() == [1, 1, 0]
    save(folder / "fa" / "000002.nii.gz", fa(77))
    run(folder)
    tensors = np.load(folder / "tensors.npy")
    np.testing.assert_allclose(tensors[1], resize(fa(77)[::-1], SMALL), atol=1e-6)
    (folder / "fa" / "000003.nii.gz").unlink()
    run(folder)
    assert len(np.load(folder / "tensors.npy")) == len(np.load(folder / "labels.npy")) == 2
    run(folder, shape=(7, 8, 9))
    assert np.load(folder / "tensors.npy").shape == (2, 7, 8, 9)


def test_convert_resamples_other_grids_when_asked(tmp_path):
    folder = make(tmp_path / "c", 4)
    fine_shape = (69, 84, 75)
    fine = LAS @ np.diag([1 / 3, 1 / 3, 1 / 3, 1])
    fine[:3, 3] = LAS[:3, 3] - LAS[:3, :3] @ (1 / 3, 1 / 3, 1 / 3)  # the same field of view
    wave = [np.cos(np.linspace(-1.5, 1.5, n)) for n in fine_shape]
    smooth = 0.9 * np.einsum("i,j,k->ijk", *wave)
    smooth *= np.linspace(0.5, 1, 69)[:, None, None]  # left and right differ
    noise = np.random.default_rng(5).uniform(-0.05, 0.05, fine_shape)
    save(folder / "fa" / "000002.nii.gz", np.float32(smooth), fine)
    save(folder / "fa" / "000003.nii.gz", np.float32(0.5 + noise), fine)
    away = LAS.copy()
    away[:3, 3] += 300
    save(folder / "fa" / "000004.nii.gz", fa(3), away)
    run(folder, regrid=True)
    tensors = np.load(folder / "tensors.npy")
    direct = resize(smooth[::-1], SMALL, order=1)
    inner = (slice(1, -1),) * 3  # at the edge, there is nothing to interpolate from
    assert abs(tensors[1] - direct)[inner].max() < 0.02
    np.testing.assert_allclose(tensors[0], resize(fa(0)[::-1], SMALL), atol=1e-6)
    assert tensors[2][inner].std() < 0.002  # aliased, it would be about 0.006
    assert rejected(folder) == {
        "000004": "more than half of its brain lies outside the cohort's grid."
    }
    table = pd.read_csv(folder / "subjects.csv")
    expected = (smooth.astype(np.float32) > 0.02).sum() * 11.25 / 27 / 1000
    assert table["brain_volume_ml"][1] == pytest.approx(expected, abs=1e-3)  # in native space


def test_convert_normalised_keeps_the_native_brain_volume(tmp_path):
    folder = make(tmp_path / "c", 0)
    radii = {"000001": (7, 8, 7), "000002": (10, 12, 11)}
    for subject, sizes in radii.items():
        brain = np.float32(ellipsoid(SHAPE, (11, 14, 12), sizes) < 1) / 2
        save(folder / "fa" / f"{subject}.nii.gz", brain)
    (folder / "unrestricted_behavioral.csv").write_text("Subject,Gender\n000001,F\n000002,M\n")
    ratio = {}
    for normalised in (False, True):
        run(folder, shape=SHAPE, normalised=normalised)
        data = cohort.load(folder)
        assert (data.normalised, data.modality) == (normalised, "fa")
        small, large = (brain_volume(np.float32(v > 0.25), data.affine) for v in data.volumes)
        ratio[normalised] = large / small
        native = data.table["brain_volume_ml"]
        assert native[1] / native[0] == pytest.approx(10 * 12 * 11 / (7 * 8 * 7), rel=0.1)
    assert ratio[False] > 3
    assert ratio[True] == pytest.approx(1, abs=0.05)


def test_a_normalised_brain_is_the_same_whatever_field_of_view_it_came_on(tmp_path):
    folder = make(tmp_path / "c", 0)
    brain = np.float32((1 - ellipsoid(SHAPE, (11, 14, 12), (7, 9, 8))).clip(0))
    wide, before = LAS.copy(), (9, 4, 6)
    wide[:3, 3] -= LAS[:3, :3] @ before
    save(folder / "fa/000001.nii.gz", brain)
    save(folder / "fa/000002.nii.gz", np.pad(brain, [(n, n + 2) for n in before]), wide)
    (folder / "unrestricted_behavioral.csv").write_text("Subject,Gender\n000001,F\n000002,M\n")
    run(folder, shape=SHAPE, regrid=True, normalised=True)
    first, second = np.load(folder / "tensors.npy")
    assert first.max() > 0.8
    np.testing.assert_allclose(second, first, atol=1e-5)


def test_convert_leaves_out_who_has_a_qc_issue_when_asked(tmp_path):
    folder = make(tmp_path / "c", 3)
    with pytest.raises(ValueError, match="expected a column QC_Issue"):
        run(folder, leave_out_qc=True)
    table = "Subject,Gender,QC_Issue\n000001,F,\n000002,M,A;B\n000003,F,\n"
    (folder / "unrestricted_behavioral.csv").write_text(table)
    run(folder)
    assert cohort.load(folder).table["qc_issue"].tolist()[1] == "A;B"
    run(folder, leave_out_qc=True)
    assert cohort.load(folder).subjects.tolist() == ["000001", "000003"]
    assert rejected(folder) == {"000002": "QC_Issue A;B"}


def test_convert_refuses_t1_with_its_skull(tmp_path):
    folder = make(tmp_path / "c", 1)
    wide = np.diag([8.0, 8, 8, 1])  # 3220 ml
    save(folder / "fa" / "000001.nii.gz", fa(0), wide)
    found = pd.DataFrame({"Subject": "000001", "modality": "t1"}, index=[0])
    found = found.assign(path=[folder / "fa" / "000001.nii.gz"])
    with pytest.raises(ValueError, match=r"expected the brain alone.*skull"):
        convert(found, folder, folder, shape=SMALL)


def test_convert_when_nothing_is_usable(tmp_path):
    folder = make(tmp_path / "c", 3)
    run(folder)
    for path in (folder / "fa").iterdir():
        path.write_bytes(b"nothing")
    for _ in range(2):
        with pytest.raises(
            ValueError, match=r"not one of 3 volumes.*rejected\.csv.*000001: .*gzip"
        ):
            run(folder)
        assert not (folder / "tensors.npy").exists()
    assert len(rejected(folder)) == 3
    assert [path.name for path in folder.glob(".*")] == [".lock"]
    with pytest.raises(FileNotFoundError):
        cohort.load(folder)
    (folder / "unrestricted_behavioral.csv").write_text("Subject,Gender\n5,F\n")
    with pytest.raises(ValueError, match=r"not one of 3 volumes.*no row"):
        run(folder)


def test_convert_without_volumes_or_table(tmp_path):
    folder = make(tmp_path / "c", 1)
    with pytest.raises(FileNotFoundError, match=r"found none.*extract"):
        convert(tmp_path / "nowhere", folder, tmp_path / "out")
    with pytest.raises(FileNotFoundError, match=r"unrestricted_behavioral\.csv.*DATA_ACCESS"):
        convert(folder / "fa", tmp_path, tmp_path / "out")
    with pytest.raises(FileNotFoundError, match="no such table"):
        convert(folder / "fa", tmp_path / "t.csv", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_full_disk_leaves_nothing_under_a_final_name(tmp_path, monkeypatch):
    folder = make(tmp_path / "c", 5)
    run(folder, tmp_path / "whole")
    savez, calls = np.savez, itertools.count()

    def full(file, **arrays):
        if next(calls) == 3:
            file.write(b"half")
            raise OSError(errno.ENOSPC, "No space left on device")
        savez(file, **arrays)

    with monkeypatch.context() as patch:
        patch.setattr(np, "savez", full)
        with pytest.raises(OSError, match="No space left"):
            run(folder, tmp_path / "out", workers=2)
    assert not FILES & {path.name for path in (tmp_path / "out").iterdir()}
    run(folder, tmp_path / "out")
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


KILLED = """
import os, resource, sys
from pathlib import Path
from brainsex import volumes

folder, out, log = map(Path, sys.argv[1:])
plain_read, plain_replace = volumes.read, os.replace

def run(kill_read=None, kill_replace=None, after=False, limit=None):
    "Convert in a process that dies at the given call of read or of os.replace."
    pid = os.fork()
    if pid:
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    reads, replaced = [], []
    def read(path):
        if len(reads) == kill_read:
            os._exit(9)
        reads.append(path)
        with log.open("a") as file:
            file.write(f"{path.name} ")
        return plain_read(path)
    def replace(*paths):
        replaced.append(paths)
        dies = len(replaced) - 1 == kill_replace
        if dies and not after:
            os._exit(9)
        plain_replace(*paths)
        if dies:
            os._exit(9)
    volumes.read, os.replace = read, replace
    if limit:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    try:
        volumes.convert(folder / "fa", folder, out, shape=(10, 12, 9), workers=1)
    except OSError as error:
        os._exit(error.errno)
    os._exit(0)

def attempt(name, code, **kill):
    global out, log
    out, log = out.parent / name, out.parent / f"{name}.log"
    assert run(**kill) == code, (name, kill)
    present = sorted(path.name for path in out.glob("[!.]*"))
    with log.open("a") as file:
        file.write("| ")
    assert run() == 0
    print(name, *present)

attempt("read", 9, kill_read=3)
attempt("full", 27, limit=20_000)  # tensors.npy has 21,728 bytes
for number in range(10):
    for after in (False, True):
        attempt(f"replace-{number}-{after}", 9, kill_replace=number, after=after)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork to die in the middle")
def test_a_kill_anywhere_changes_nothing_in_the_end(tmp_path):
    """Killed while reading, before and after each file gets its name, and on a full disk."""
    folder = make(tmp_path / "c", 5)
    run(folder, tmp_path / "whole")
    expected = contents(tmp_path / "whole")
    work = tmp_path / "work"
    work.mkdir()
    command = [sys.executable, "-c", KILLED, folder, work / "out", work / "log"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    lines = [
        line.split() for line in done.stdout.splitlines() if not line.endswith("(rejected.csv)")
    ]
    assert len(lines) == 22
    for name, *present in lines:
        # What stands under a final name is whole, and tensors.npy comes last.
        assert "tensors.npy" not in present or set(present) == FILES
        assert contents(work / name) == expected
        before, after = (work / f"{name}.log").read_text().split("|")
        subjects = before.split() + after.split()
        assert sorted(set(subjects)) == [f"{n:06d}.nii.gz" for n in range(1, 6)]
        # No subject whose part was finished is read again: at most the one being written.
        lost = name.startswith("replace") and name.endswith("False") and int(name[8]) < 5
        assert len(subjects) == 5 + lost


MEMORY = """
import sys
from brainsex import volumes
folder, out = sys.argv[1:]
volumes.convert(f"{folder}/fa", folder, out, workers=2)
print([line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")][0])
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc")
def test_memory_does_not_grow_with_the_number_of_subjects(tmp_path):
    peak = {}
    volume = save(tmp_path / "v.nii", fa(0, (60, 72, 64)))
    for count in (20, 200):
        folder = make(tmp_path / str(count), 0)
        subjects = [f"{n:06d}" for n in range(count)]
        for subject in subjects:
            os.link(volume, folder / "fa" / f"{subject}.nii")
        pd.DataFrame({"Subject": subjects, "Gender": "F"}).to_csv(
            folder / "unrestricted_behavioral.csv", index=False
        )
        # VmHWM, as ru_maxrss of a child starts at its parent's.
        command = [sys.executable, "-c", MEMORY, folder, tmp_path / "out"]
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
        peak[count] = int(done.stdout.split()[-1])
        assert np.load(tmp_path / "out" / "labels.npy").shape == (count,)
        shutil.rmtree(tmp_path / "out")
    assert abs(peak[200] / peak[20] - 1) < 0.1  # 200 small volumes are 190 MB


def test_convert_reads_freesurfer_s_and_the_restricted_table_beside(tmp_path):
    folder = make(tmp_path / "c", 2)
    (folder / "unrestricted_hcp_freesurfer.csv").write_text(
        "Subject,Gender,FS_InterCranial_Vol\n000001,F,1300500\n000002,M,1600250.5\n"
    )
    (folder / "restricted.csv").write_text("Subject,Family_ID,Age_in_Yrs\n000001,9_8,27\n")
    run(folder)
    table = pd.read_csv(folder / "subjects.csv", dtype=str)
    assert table["intracranial_volume_ml"].astype(float).tolist() == [1300.5, 1600.2505]
    assert table["group"].tolist()[0] == "9_8"
    assert table["age"].tolist()[0] == "27"
    assert table.at[1, "group"] != table.at[1, "group"]  # unknown


def test_a_disk_that_fails_for_a_moment_is_asked_again(tmp_path, monkeypatch):
    folder, read = make(tmp_path / "c", 3), volumes.read

    def failing(path):
        if path.name.startswith("000002"):
            raise OSError(5, "Input/output error")
        return read(path)

    monkeypatch.setattr(volumes, "read", failing)
    run(folder)
    assert "cannot be read now" in (folder / "rejected.csv").read_text()
    monkeypatch.setattr(volumes, "read", read)
    run(folder)
    assert np.load(folder / "labels.npy").shape == (3,)
