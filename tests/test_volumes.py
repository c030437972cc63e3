"""Volumes: read in RAS, reduced as the study does, a folder to one array, whatever is in it."""

import errno
import gzip
import itertools
import json
import os
from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd
import pytest
from skimage.transform import resize

from brainsex import storage, volumes
from brainsex.volumes import clean, convert, load, prepare, resample

SHAPE = (23, 28, 25)
LAS = np.array([[-2.5, 0, 0, 29], [0, 2.25, 0, -31], [0, 0, 2.0, -24], [0, 0, 0, 1]])
RAS = np.array([[2.5, 0, 0, 29 - 2.5 * 22], [0, 2.25, 0, -31], [0, 0, 2.0, -24], [0, 0, 0, 1]])
"""The affine of the same voxels once the first axis is reversed."""
SMALL = (10, 12, 9)


def save(path, data, affine=LAS, *, code=2, **header):
    """A NIfTI file with header fields as given; `path` says whether it is compressed."""
    path.parent.mkdir(parents=True, exist_ok=True)
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


def ellipsoid(shape, centre, radii):
    axes = np.meshgrid(*map(np.arange, shape), indexing="ij")
    return sum(((x - c) / r) ** 2 for x, c, r in zip(axes, centre, radii))


# ------------------------------------------------------------------------------------------- load


@pytest.mark.parametrize("code", ["LAS", "RAS", "PIR", "IRP", "LPI"])
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
    volume, to_mm = load(save(tmp_path / "v.nii.gz", data, affine))
    assert volume.dtype == np.float32
    assert volume.flags.f_contiguous == (code[0] in "LR" and code[1] in "PA")  # a file's order
    assert "".join(nib.aff2axcodes(to_mm)) == "RAS"
    assert np.count_nonzero(volume) == 2
    for value, point in points.items():
        (index,) = np.argwhere(volume == np.float32(value))
        np.testing.assert_allclose(to_mm @ (*index, 1), point, atol=1e-6)


def test_load_scales_integers(tmp_path):
    data = np.arange(np.prod(SHAPE)).reshape(SHAPE).astype(np.int16)
    volume, _ = load(save(tmp_path / "v.nii.gz", data, scl_slope=0.0001, scl_inter=-0.25))
    np.testing.assert_allclose(volume, data[::-1] * 0.0001 - 0.25, atol=2e-7)


MAP = nib.Nifti1Image(fa(), LAS)
SWAPPED = nib.Nifti1Image(fa().astype(">f4"), LAS, nib.Nifti1Header(endianness=">"))


@pytest.mark.parametrize(
    ("name", "image", "gzipped"),
    [
        ("v.nii.gz", nib.Nifti1Image(fa()[..., None, None], LAS), True),
        ("v.nii.gz", nib.Nifti2Image(fa(), LAS), True),
        ("v.mgz", nib.MGHImage(fa(), LAS), True),
        ("v.nii.gz", SWAPPED, True),
        ("V.NII.GZ", MAP, True),
        *(("v.nii.gz", MAP, False), ("v.nii", MAP, True)),  # against their names
    ],
)
def test_load_reads_what_other_programs_write(tmp_path, name, image, gzipped):
    path, content = tmp_path / name, image.to_bytes()
    path.write_bytes(gzip.compress(content) if gzipped else content)
    volume, affine = load(path)
    shape, grid = volumes.read_grid(path)
    np.testing.assert_array_equal(volume, fa()[::-1])
    np.testing.assert_allclose([affine, grid], [RAS, RAS], atol=1e-5)
    assert shape == SHAPE


PLAIN = MAP.to_bytes()
FLIPPED = bytearray(gzip.compress(PLAIN, 0, mtime=0))
FLIPPED[-50_000] ^= 1  # in a stored block only the checksum can tell


def patched(place, values):
    """The map's file with values in its header."""
    values = np.array(values).tobytes()
    return gzip.compress(PLAIN[:place] + values + PLAIN[place + len(values) :], mtime=0)


NO_AFFINE = patched(252, np.int16([0, 0]))  # neither qform nor sform
BAD = [  # a file, as an array or its content, and what is said of it
    (
        gzip.compress(PLAIN, mtime=0)[:9000],
        "a whole file .NIfTI or .mgz. of 3D.*cannot read it.*download",
    ),
    (FLIPPED, "cannot read it.*CRC"),
    (gzip.compress(PLAIN, mtime=0)[:-8] + bytes(8), "cannot read it.*CRC"),  # the checksum itself
    (gzip.compress(b"Subject,Gender\n" * 100, mtime=0), "cannot read it"),
    (gzip.compress(PLAIN[:-4], mtime=0), "Expected 64400 bytes, got 64396"),
    (b"/annex/objects/MD5E-s3145728--0123.nii.gz\n", "a pointer to content .*; datalad get"),
    (
        b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n",
        "a pointer to content .*; git lfs pull",
    ),
    (patched(42, np.int16([32767] * 3)), r"at most 33554432.*found \(32767, 32767, 32767\)"),
    (patched(108, np.float32(1e30)), "cannot read it"),  # voxels far away
    (fa()[..., None].repeat(2, axis=3), r"found \(23, 28, 25, 2\)"),
    (fa().astype(np.complex64), "real voxels.*complex64"),
    (NO_AFFINE, "expected an affine that tells left from right"),
    (patched(280, np.zeros(4, np.float32)), "expected an affine that tells left from right"),
    (patched(292, np.float32(np.nan)), "expected an affine that tells left from right"),
]


@pytest.mark.parametrize(("content", "message"), BAD)
def test_load_refuses(tmp_path, content, message):
    path = tmp_path / "v.nii.gz"
    save(path, content) if isinstance(content, np.ndarray) else path.write_bytes(content)
    with pytest.raises(ValueError, match=message) as caught:
        load(path)
    assert str(caught.value).startswith(f"{path}: ")


@pytest.mark.parametrize("name", ["missing.nii.gz", "folder"])
def test_load_says_where_a_volume_comes_from_that_is_absent(tmp_path, name):
    (tmp_path / "folder").mkdir()
    with pytest.raises(FileNotFoundError, match=f"{name}: .*no such volume.*DATA_ACCESS"):
        load(tmp_path / name)


# --------------------------------------------------------------------------------------- resample


@pytest.mark.parametrize(
    ("old", "new"), [((31, 37, 29), (12, 14, 13)), ((20, 37, 29), (24, 14, 29))]
)
def test_resample_is_the_study_s_resize(old, new):
    volume = np.random.default_rng(1).random(old, np.float32)
    small, _ = resample(volume, np.eye(4), new)
    assert small.dtype == np.float32
    for order, turn in (("F", 1), ("F", -1), ("C", -1)):  # as a file in RAS, in LPI
        turned = np.array(volume[::turn, ::turn, ::turn], order=order)[::turn, ::turn, ::turn]
        again, _ = resample(turned, np.eye(4), new)
        np.testing.assert_allclose(again, small, atol=1e-6)
    np.testing.assert_allclose(small, resize(volume, new), atol=1e-6)
    ones, _ = resample(np.ones(old, np.float32), np.eye(4), new)
    assert ones.max() == 1  # rounding does not lift FA above what there was
    for wrong, shape in ((ones[0], new), (ones, (2, 0, 2)), (ones * np.inf, new)):
        with pytest.raises(ValueError, match="expected finite 3D, found"):
            resample(wrong, np.eye(4), shape)


# ------------------------------------------------------------------- clean, prepare


def test_clean_counts_what_it_changes():
    volume = np.full((9, 10, 11), 0.5, np.float32)
    expected = volume.copy()
    volume[0, 0, :4], expected[0, 0, :4] = (np.nan, np.inf, -np.inf, np.nan), 0
    volume[1, 1, :3], expected[1, 1, :3] = (-0.1, -2, -1e-6), 0
    volume[2, 2, :2], expected[2, 2, :2] = (1.2, 3), 1
    volume[3, 3, :3] = expected[3, 3, :3] = 0, 1, 0.999
    before = volume.copy()
    cleaned, counts = clean(volume)
    assert counts == {"non_finite": 4, "negative": 3, "above_one": 2}
    assert all(type(count) is int for count in counts.values())  # for JSON
    np.testing.assert_array_equal(cleaned, expected)
    assert cleaned.dtype == np.float32
    np.testing.assert_array_equal(volume, before)


@pytest.mark.parametrize(
    ("volume", "message"),
    [
        (fa() * 10_000, r"anisotropy in \[0, 1\], found values from 0 to 9\d+: divide it by"),
        (fa() * 1.5, "divide it by"),  # a third above 1
        (-fa() + 0.5 * (fa() > 0), "values from -0.4"),
    ],
)
def test_clean_refuses_what_is_no_fa(volume, message):
    with pytest.raises(ValueError, match=message):
        clean(volume)


def test_clean_clips_and_counts_what_interpolation_leaves():
    volume = fa()
    rim = np.argwhere(volume == 0)[::3]
    volume[tuple(rim.T)] = -1e-3  # more of it than of the brain
    volume[tuple(np.argwhere(volume > 0.9).T)] = 1.2
    cleaned, counts = clean(volume)
    np.testing.assert_array_equal(cleaned, volume.clip(0, 1))
    above = np.count_nonzero(volume > 1)
    assert counts == {"non_finite": 0, "negative": len(rim), "above_one": above}


@pytest.mark.parametrize("scale", [1e-3, 4e4])
def test_clean_scales_t1_by_the_brain_s_median(scale):
    volume = fa(1)
    brain = volume > 0
    volume[brain] += 0.5
    expected = volume / np.median(volume[brain]) / 2
    assert (expected > 1).sum() == 0
    volume[~brain] = 1e-6  # ringing
    volume[2, 3, 4:6] = -1, np.nan
    volume[12, 14, 12] = 50  # a vessel
    cleaned, counts = clean(volume * scale, "t1")
    assert counts == {"non_finite": 1, "negative": 1, "above_one": 1}
    expected[12, 14, 12] = 1
    np.testing.assert_allclose(cleaned, expected, atol=2e-4)


def test_prepare_refuses_t1_with_its_skull_and_what_has_no_brain(tmp_path):
    path = save(tmp_path / "v.nii", fa(), np.diag([8.0, 8, 8, 1]))
    with pytest.raises(ValueError, match=r"without its skull .or --mask., found 2863 ml"):
        prepare(path, "t1")
    volume, _, record = volumes.prepare_like(path, {"shape": SHAPE, "modality": "fa"})
    np.testing.assert_array_equal(volume, fa())
    assert record["brain_volume_ml"] == pytest.approx((fa() > 0).sum() * 0.512)  # the native one


# ---------------------------------------------------------------------------------------- convert

FILES = {"tensors.npy", "labels.npy", "subjects.csv", "grid.json", "rejected.csv"}


def make(folder, count=5, *, shape=SHAPE, rows=()):
    """A cohort's folder: volumes 000001, 000002, … and a table of them and of `rows` besides."""
    (folder / "fa").mkdir(parents=True)
    subjects = [f"{n:06d}" for n in range(1, count + 1)]
    for n, subject in enumerate(subjects):
        save(folder / "fa" / f"{subject}.nii.gz", fa(n, shape))
    table = [(s, "FM"[n % 2], "26-30") for n, s in enumerate(subjects)] + list(rows)
    table = pd.DataFrame(table, columns=["Subject", "Gender", "Age"])
    table["QC_Issue"] = "A;B"  # which leaves nobody out
    table.to_csv(folder / "unrestricted_behavioral.csv", index=False)
    return folder


def run(folder, out=None, **options):
    return convert(folder / "fa", folder, out or folder, **{"shape": SMALL, "workers": 1} | options)


def rejected(folder):
    table = pd.read_csv(folder / "rejected.csv", dtype=str)
    return dict(zip(table["Subject"], table["reason"]))


def subjects_of(folder):
    return pd.read_csv(folder / "subjects.csv", dtype=str)["Subject"].tolist()


def contents(folder):
    """Every file of a converted cohort, and nothing else lies there but the run's record."""
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert set(files) == FILES | {"run.json"}
    return files


def test_convert_writes_the_cohort(tmp_path, capsys):
    folder = make(tmp_path / "c", rows=[("900000", "F", "31-35")])
    assert run(folder) == folder / "tensors.npy"
    tensors, labels = np.load(folder / "tensors.npy"), np.load(folder / "labels.npy")
    assert (tensors.dtype, labels.dtype) == (np.float32, np.int64)
    assert labels.tolist() == [0, 1, 0, 1, 0]
    table = pd.read_csv(folder / "subjects.csv", dtype=str)
    assert table["Subject"].tolist() == [f"00000{n}" for n in range(1, 6)]
    assert table["age"].tolist() == ["26-30"] * 5
    for n, volume in enumerate(table["brain_volume_ml"].astype(float)):
        np.testing.assert_allclose(tensors[n], resize(fa(n)[::-1], SMALL), atol=1e-6)  # from LAS
        assert volume == pytest.approx((fa(n) > 0.02).sum() * 11.25 / 1000, abs=6e-4)
    grid = json.loads((folder / "grid.json").read_text())
    factors = np.divide(SHAPE, SMALL)
    assert grid["shape"] == list(SMALL)
    np.testing.assert_allclose(np.diag(grid["affine"])[:3], factors * (2.5, 2.25, 2), rtol=1e-6)
    corner = RAS @ (*((factors - 1) / 2), 1)
    np.testing.assert_allclose(np.array(grid["affine"])[:, 3], corner, rtol=1e-6)
    assert rejected(folder) == {"900000": "a row, but no volume"}
    assert "c: 5 subjects, 1 left out (rejected.csv" in capsys.readouterr().out


def test_convert_leaves_out_every_bad_subject_and_does_the_rest(tmp_path, capsys):
    folder = make(tmp_path / "c", 9, rows=[("900000", "F", ""), ("000014", "U", "")])
    fa_dir, along_x = folder / "fa", np.outer([1, 0, 0, 0], [0, 0, 0, 1])
    save(fa_dir / "000001.nii.gz", fa(0), LAS + 40 * along_x)
    (fa_dir / "000000.nii.gz").write_bytes(NO_AFFINE)
    (fa_dir / "000012.nii.gz").write_bytes(FLIPPED)
    save(fa_dir / "000014.nii.gz", fa(14))
    save(fa_dir / "000017.nii.gz", fa(17, (23, 28, 26)))
    save(fa_dir / "000018.nii.gz", fa(18))
    save(fa_dir / "000018_FA.nii", fa(18))
    save(fa_dir / "000022.nii.gz", fa(22)[::-1], RAS + 0.15 * along_x)  # within a tenth
    save(fa_dir / "000023.nii.gz", fa(23), LAS + 0.3 * along_x)  # of a voxel it is not
    (fa_dir / "800001.nii.gz").symlink_to("nowhere")
    with (folder / "unrestricted_behavioral.csv").open("a") as file:
        file.writelines(f"0000{n},M,\n" for n in ("00", 12, 17, 18, 22, 23))
    run(folder, workers=2)
    reasons = rejected(folder)
    for subject, reason in {
        "000000": "expected an affine",
        "000001": "not the cohort's [[23, 28, 25]",
        "000012": "CRC",
        "000014": "sex is 'U', expected M or F",
        "000017": "its grid is (23, 28, 26)",
        "000018": "2 volumes: c/fa/000018.nii.gz, c/fa/000018_FA.nii: keep one",
        "000023": "--regrid",
        "800001": "a volume, but no row in the table",
        "900000": "a row, but no volume",
    }.items():
        assert reason in reasons.pop(subject)
    assert not reasons
    assert subjects_of(folder) == [*(f"00000{n}" for n in range(2, 10)), "000022"]
    for tensor, n in zip(np.load(folder / "tensors.npy"), (*range(1, 9), 22), strict=True):
        np.testing.assert_allclose(tensor, resize(fa(n)[::-1], SMALL), atol=1e-6)
    assert np.load(folder / "labels.npy").tolist() == [1, 0] * 4 + [1]
    assert "9 subjects, 9 left out" in capsys.readouterr().out


def test_workers_and_the_order_of_files_change_no_byte(tmp_path, monkeypatch):
    folder, glob = make(tmp_path / "c", 8), Path.glob
    run(folder, tmp_path / "one", workers=1)
    monkeypatch.setattr(Path, "glob", lambda *a: reversed(list(glob(*a))))
    run(folder, tmp_path / "four", workers=4)
    assert contents(tmp_path / "one") == contents(tmp_path / "four")


def test_a_file_that_cannot_be_read_now_is_left_out_and_tried_again(tmp_path, monkeypatch):
    folder, read = make(tmp_path / "c", 3), volumes.load_volume

    def failing(path, **options):
        if path.name == "000002.nii.gz":
            raise OSError(errno.EIO, "Input/output error")
        return read(path, **options)

    with monkeypatch.context() as patch:
        patch.setattr(volumes, "load_volume", failing)
        run(folder)
    assert list(rejected(folder)) == ["000002"]
    assert "[Errno 5] Input/output error" in rejected(folder)["000002"]
    assert len(np.load(folder / "tensors.npy")) == 2
    run(folder)
    assert len(np.load(folder / "tensors.npy")) == 3


def test_convert_anew_only_when_table_volumes_or_results_changed(tmp_path, monkeypatch):
    folder = make(tmp_path / "c", 3)
    table, out = folder / "unrestricted_behavioral.csv", tmp_path / "out"
    run(folder, out)
    whole = contents(out)
    with monkeypatch.context() as patch:
        patch.setattr(volumes, "load_volume", lambda path, **_: pytest.fail(f"{path} was read"))
        run(folder, out)
    (out / "grid.json").unlink()
    run(folder, out)
    assert contents(out) == whole
    table.write_text(table.read_text().replace("000001,F", "000001,M") + "000000,F,\n")
    run(folder, out)
    assert np.load(out / "labels.npy").tolist() == [1, 1, 0]
    save(folder / "fa" / "000002.nii.gz", fa(77))
    save(folder / "fa" / "000000.nii.gz", fa(5))  # more were downloaded
    run(folder, out)
    assert subjects_of(out) == ["000000", "000001", "000002", "000003"]
    changed = np.load(out / "tensors.npy")[2]
    np.testing.assert_allclose(changed, resize(fa(77)[::-1], SMALL), atol=1e-6)


def test_convert_resamples_other_grids_than_the_commonest_when_asked(tmp_path):
    folder = make(tmp_path / "c", 6)
    fine_shape = (69, 84, 75)
    fine = LAS @ np.diag([1 / 3, 1 / 3, 1 / 3, 1])
    fine[:3, 3] = LAS[:3, 3] - LAS[:3, :3] @ (1 / 3, 1 / 3, 1 / 3)  # the same field of view
    smooth = np.einsum("i,j,k->ijk", *(np.cos(np.linspace(-1.5, 1.5, n)) for n in fine_shape))
    smooth *= 0.9 * np.linspace(0.5, 1, 69)[:, None, None]  # left and right differ
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
    assert "more than half of its brain lies outside" in rejected(folder)["000004"]


@pytest.mark.parametrize("lost", [3, 5])
def test_losing_most_of_a_cohort_is_an_error_with_the_commonest_reason(tmp_path, lost):
    folder = make(tmp_path / "c", 5)
    run(folder)
    for n in range(1, 1 + lost):
        save(folder / f"fa/00000{n}.nii.gz", fa(n) * 1000)
    message = rf"rejected\.csv: .* of 5 subjects, found {5 - lost} usable; {lost} are left out as: "
    with pytest.raises(ValueError, match=message + ".*as 1000"):
        run(folder)
    assert not (folder / "tensors.npy").exists()
    assert sorted(rejected(folder)) == [f"00000{n}" for n in range(1, 1 + lost)]
    with pytest.raises(ValueError, match=message):  # and is no hindrance to other options
        run(folder, regrid=True)


def test_convert_without_a_table_or_volumes(tmp_path):
    folder = make(tmp_path / "c", 3)
    with pytest.raises(FileNotFoundError, match=r"expected volumes.*found none"):
        convert(tmp_path / "nowhere", folder, tmp_path / "out")
    with pytest.raises(FileNotFoundError, match=r"expected one table with columns.*DATA_ACCESS"):
        convert(folder / "fa", folder / "fa", tmp_path / "out")
    assert not (tmp_path / "out").exists()


class KilledError(BaseException):
    """What nothing catches, as nothing catches a kill."""


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
def test_a_kill_when_a_file_gets_its_name_changes_nothing_in_the_end(tmp_path, monkeypatch, after):
    folder, read, reads = make(tmp_path / "c", 3), volumes.load_volume, []
    run(folder, tmp_path / "whole")
    monkeypatch.setattr(volumes, "load_volume", lambda *a, **o: reads.append(a) or read(*a, **o))
    expected, replace = contents(tmp_path / "whole"), os.replace
    for last in range(1, 1 + 3 + len(FILES)):  # run.json comes first, tensors.npy last
        out, calls = tmp_path / str(last), itertools.count()
        reads.clear()

        def killed(*paths, calls=calls, last=last):
            dies = next(calls) == last
            if after or not dies:
                replace(*paths)
            if dies:
                raise KilledError

        with monkeypatch.context() as patch:
            patch.setattr(storage.os, "replace", killed)
            with pytest.raises(KilledError):
                run(folder, out)
        present = {path.name for path in out.glob("[!.]*")} - {"run.json"}
        assert "tensors.npy" not in present or present == FILES
        run(folder, out)
        assert contents(out) == expected
        assert len(reads) == 3 + (not after and last < 4), "it goes on where it stopped"
