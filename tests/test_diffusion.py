"""FA fitted to diffusion series: against its definition, DIPY's own fit, and bad series."""

import gzip
import re
import struct
import sys
import tracemalloc
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

pytest.importorskip("dipy")

from brainsex import diffusion, volumes
from tests.test_archives import DEFLATED, STORED, contents, zipped

SHAPE = (7, 6, 5)
AFFINE = np.array([[-1.25, 0, 0.1, 90], [0, 1.25, 0, -126], [0.1, 0, 1.25, -72], [0, 0, 0, 1]])
FOLDER = "900001/T1w/Diffusion"
BVALS = np.array([5, 990, 1000, 1005, 995, 2000, 1000, 5, 1010, 1000, 1005, 3000, 990, 1000, 995.0])


def directions(count, seed=0):
    """Draw (count, 3) random unit vectors."""
    vectors = np.random.default_rng(seed).normal(size=(count, 3))
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


BVECS = directions(len(BVALS))


def by_definition(eigenvalues):
    """Compute FA of (…, 3) eigenvalues as Basser and Pierpaoli (1996) define it."""
    deviation = eigenvalues - eigenvalues.mean(-1, keepdims=True)
    return np.sqrt(1.5 * (deviation**2).sum(-1) / (eigenvalues**2).sum(-1))


def tensors(seed=1):
    """Draw SHAPE + (3, 3) tensors in mm²/s, turned at random, and their FA."""
    draw = np.random.default_rng(seed)
    eigenvalues = draw.uniform(2e-4, 2e-3, (*SHAPE, 3))
    turn = np.linalg.qr(draw.normal(size=(*SHAPE, 3, 3)))[0]
    return np.einsum("...ij,...j,...kj->...ik", turn, eigenvalues, turn), by_definition(eigenvalues)


def signals(tensor, bvals, bvecs, s0=1000):
    """Compute S0 exp(-b gᵀDg): (…, volumes); `bvals` and `bvecs` may differ between voxels."""
    return s0 * np.exp(-bvals * np.einsum("...vi,...ij,...vj->...v", bvecs, tensor, bvecs))


def image(values, dtype=np.float32, affine=AFFINE):
    return gzip.compress(nib.Nifti1Image(values.astype(dtype), affine).to_bytes(), 1)


def text(rows):
    return "".join(" ".join(f"{x:.9g}" for x in row) + "\n" for row in np.atleast_2d(rows)).encode()


def mask():
    inside = np.ones(SHAPE, bool)
    inside[0], inside[:, :, -1] = False, False
    return inside


def series(seed=1, noise=0, **changes):
    """Make the files of a series; keywords replace them, as in ``bvals=…``, ``data=None``."""
    data = signals(tensors(seed)[0], BVALS, BVECS)
    data = data + noise * np.random.default_rng(seed).normal(size=data.shape)
    files = {"data": image(data), "bvals": text(BVALS), "bvecs": text(BVECS.T)}
    files["mask"] = image(mask(), np.uint8)
    names = {"data": "data.nii.gz", "mask": "nodif_brain_mask.nii.gz", "dev": "grad_dev.nii.gz"}
    files = {name: content for name, content in (files | changes).items() if content is not None}
    return {names.get(name, name): content for name, content in files.items()}


def save(folder, files):
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)


def package(files, folder=FOLDER, method=STORED):
    extra = [("900001/T1w/Diffusion/eddylogs/eddy.txt", b"log"), ("a/T1w_acpc_dc.nii.gz", b"T1w")]
    members = [(f"{folder}/{name}", content) for name, content in files.items()]
    return zipped([*extra, *members], method)


def fitted(source, target, subject="900001", **options):
    """Fit a folder; return the map (X, Y, Z) of one subject."""
    table = diffusion.fit_folder(source, target, workers=1, **options).set_index("Subject")
    assert table.loc[subject, "status"].startswith("fitted"), table.loc[subject, "reason"]
    return nib.load(target / f"{subject}.nii.gz").get_fdata()


def test_fa_of_known_tensors_is_that_of_its_definition(source, target):
    data = signals(tensors()[0], BVALS, BVECS)
    data[..., BVALS > 1500] = 7  # not read
    save(source / FOLDER, series(data=image(data)))
    expected = np.where(mask(), tensors()[1], 0)
    result = fitted(source, target)
    np.testing.assert_allclose(result, expected, atol=2e-5)
    stored = nib.load(target / "900001.nii.gz")
    assert stored.get_data_dtype() == np.float32
    np.testing.assert_allclose(stored.affine, AFFINE, atol=1e-5)
    volume, affine = volumes.load(target / "900001.nii.gz")  # as the next step reads it, in RAS
    np.testing.assert_allclose(volume, expected[::-1], atol=2e-5)
    assert affine[0, 0] > 0
    again = fitted(source, target / "1000", bmax=1000)  # b = 1010 belongs to it
    np.testing.assert_array_equal(again, result)


def deviations(scale=0.05):
    """Draw SHAPE + (3, 3): L, another in each voxel and not symmetric."""
    return np.random.default_rng(2).uniform(-scale, scale, (*SHAPE, 3, 3))


def stored_by_columns(deviation):
    return deviation.swapaxes(-1, -2).reshape(*deviation.shape[:3], 9)


def actual(deviation):
    """Compute b (…, volumes) and g (…, volumes, 3): g is (I + L)g, its length raises b."""
    bvecs = np.einsum("...ij,vj->...vi", np.eye(3) + deviation, BVECS)
    length = np.linalg.norm(bvecs, axis=-1)
    return BVALS * length**2, bvecs / length[..., None]


def test_gradient_deviations_are_honoured_or_their_neglect_is_said(source, target):
    tensor, expected = tensors()
    data = image(signals(tensor, *actual(deviations())))
    save(source / FOLDER, series(data=data, dev=image(stored_by_columns(deviations()))))
    save(source / FOLDER.replace("1/", "2/"), series(data=data))
    result = fitted(source, target)
    np.testing.assert_allclose(result[mask()], expected[mask()], atol=2e-5)
    status = diffusion.fit_folder(source, target, overwrite=True)["status"].tolist()
    assert status == ["fitted", "fitted without grad_dev.nii.gz"]
    result = nib.load(target / "900002.nii.gz").get_fdata()
    assert np.abs(result - expected)[mask()].mean() > 0.01


@pytest.mark.parametrize("dtype", ["<i2", ">i2", "<f8"])
def test_scaled_and_foreign_numbers_are_read(source, target, dtype):
    data = signals(tensors()[0], BVALS, BVECS, s0=200_000)  # beyond int16
    empty = nib.Nifti1Header(endianness=dtype[0])
    empty.set_data_dtype(dtype)
    scaled = nib.Nifti1Image(np.round(data / 25 - 8).astype(dtype), AFFINE, empty)
    content = bytearray(scaled.to_bytes())
    struct.pack_into(dtype[0] + "2f", content, 112, 25, 200)  # slope and intercept
    save(source / FOLDER, series(data=gzip.compress(content)))
    expected = np.where(mask(), tensors()[1], 0)
    np.testing.assert_allclose(fitted(source, target), expected, atol=2e-3)


def test_voxels_without_a_signal_are_zero_and_fa_stays_in_range(source, target):
    data = signals(tensors()[0], BVALS, BVECS).astype(np.float32)
    data[1, 1, 1, 3], data[1, 1, 2, 0] = np.nan, np.inf
    data[2, 2, 2], data[3, 3, 3] = 0, -5
    data[4, 4, 3] = np.random.default_rng(0).uniform(0, 2, len(BVALS))
    save(source / FOLDER, series(data=image(data)))
    result = fitted(source, target)
    assert [result[1, 1, 1], result[1, 1, 2], result[2, 2, 2], result[3, 3, 3]] == [0, 0, 0, 0]
    assert 0 <= result.min() <= result.max() <= 1
    assert result[1, 1, 0] == pytest.approx(tensors()[1][1, 1, 0], abs=2e-5)


def test_every_source_gives_the_same_map(source, target):
    files = series(noise=20, dev=image(stored_by_columns(deviations())))
    save(source / "loose/HCP_1200" / FOLDER, files)
    save(source / "bare/900001", files)
    inner = package(files, method=DEFLATED)
    for place, content in {
        "new/900001_Diffusion3TRecommended.zip": package(files),
        "nested/900001.zip": zipped([("packed.zip", inner)], STORED),
        "inflated/900001.zip": zipped([("packed.zip", inner)], DEFLATED),
        "upper/900001_x.ZIP": package({name.upper(): files[name] for name in files}),
    }.items():
        save((source / place).parent, {Path(place).name: content})
    places = ["loose", "bare", "new", "nested", "inflated", "upper", f"loose/HCP_1200/{FOLDER}"]
    for place in places:
        fitted(source / place, target / place)
    assert len({(target / place / "900001.nii.gz").read_bytes() for place in places}) == 1


def test_workers_and_slabs_change_no_bit(source, target, monkeypatch):
    for number in range(3):
        save(source / f"90000{number}/T1w/Diffusion", series(seed=number, noise=40))
    for workers, slab in ((1, 2000), (2, 7)):
        monkeypatch.setattr(diffusion, "SLAB", slab)
        diffusion.fit_folder(source, target / f"{slab}", workers=workers)
    assert len(contents(target / "7")) == 3
    assert contents(target / "7") == contents(target / "2000")


def test_a_run_goes_on_and_refuses_another_recipe(source, target):
    save(source, {"mydata.nii.gz": b"", "readme.txt": b""})
    with pytest.raises(FileNotFoundError, match=r"<ID>/T1w/Diffusion.*none; DATA_ACCESS.md"):
        diffusion.fit_folder(source, target)
    save(source / FOLDER, series())
    fitted(source, target)
    save(source / "900002/T1w/Diffusion", series(seed=2))
    before = contents(target)
    assert diffusion.fit_folder(source, target)["status"][0] == "present"
    assert contents(target).items() > before.items()
    with pytest.raises(ValueError, match=r"results of fa with bmax = 3000, found those with 1500"):
        diffusion.fit_folder(source, target, bmax=3000)
    save(source / FOLDER, {"bvals": b""})
    table = diffusion.fit_folder(source, target, bmax=3000, overwrite=True)
    assert table["status"][0] == "rejected"
    assert not (target / "900001.nii.gz").exists()  # an old map would be of the old recipe


def header(*fields):
    """Overwrite fields of the series's header: (offset, form, value)."""
    content = bytearray(PLAIN)
    for offset, form, value in fields:
        struct.pack_into(f"<{form}", content, offset, value)
    return gzip.compress(content)


MOVED = AFFINE + np.pad([[1.25]], ((0, 3), (3, 0)))  # along X
DATA = series()["data.nii.gz"]
PLAIN = gzip.decompress(DATA)
FEWER = {"bvals": text(BVALS[:-1]), "bvecs": text(BVECS[:-1].T)}
BAD = {
    "fewer bvals": ({"bvals": text(BVALS[:-1])}, r"bvals: expected b0 .* in bvecs, cannot read"),
    "fewer gradients": (FEWER, r"data.nii.gz: .*\(7, 6, 5, 14\).*found \(7, 6, 5, 15\)"),
    "no b0": ({"bvals": text(BVALS.clip(990))}, "bvals: .*b0 volumes .*b ≤ 50.*from 990 to 3000"),
    "few directions": ({"bvecs": text(BVECS[[0, 1, 2, 3, 4] * 3].T)}, "six directions.*11 vol"),
    "no unit vectors": ({"bvecs": text(BVECS.T * 0.9)}, "bvecs should be unit"),
    "no text": ({"bvals": b"\xff\xfe\0"}, "bvals: expected rows of"),
    "mask elsewhere": ({"mask": image(mask(), np.uint8, MOVED)}, "grid of nodif.*affine"),
    "cut short": ({"data": DATA[:-200]}, "data.nii.gz: expected a whole gzip.*ended before"),
    "flipped": ({"data": DATA[:-6] + b"\1\1" + DATA[-4:]}, "data.nii.gz: .*CRC"),
    "far voxels": ({"data": header((108, "f", 1e9))}, "data.nii.gz: .*not enough data"),
    "colours": ({"data": header((70, "h", 128), (72, "h", 24))}, "real voxels"),
    "huge": ({"mask": header(*((at, "h", 9999) for at in (42, 44, 46)))}, "at most 33554432, on"),
    "empty mask": ({"mask": image(mask() * 0, np.uint8)}, "mask.*to .* voxels above 0, found 0"),
    "endless text": ({"bvals": b"1 " * 600000}, "bvals: expected b0 volumes"),
    "no series": ({"data": None}, "expected one folder with data.nii.gz, .*found none"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_series_is_rejected_and_the_rest_is_done(source, target, case):
    changes, message = BAD[case]
    save(source, {"900001_3T_Diffusion_preproc.zip": package(series(**changes))})
    save(source / "900002/T1w/Diffusion", series())
    table = diffusion.fit_folder(source, target, workers=1)
    assert table["status"][0] == "rejected"
    assert re.search(message, table["reason"][0]), table["reason"][0]
    assert table["reason"][0].startswith("900001")
    assert list(contents(target)) == ["900002.nii.gz"]


def test_memory_is_that_of_the_voxels_and_volumes_fitted(source, target, monkeypatch):
    shape, bvals = (50, 30, 20), np.array([0] + 19 * [1000] + 130 * [3000])
    inside = np.arange(50)[:, None, None] + np.zeros(shape) < 5
    data = image(np.random.default_rng(0).integers(1, 9, (*shape, 150)), np.int16)
    texts = {"bvals": text(bvals), "bvecs": text(directions(150).T)}
    save(source / FOLDER, series(data=data, mask=image(inside, np.uint8), **texts))
    monkeypatch.setattr(diffusion, "SLAB", 500)
    tracemalloc.start()
    fitted(source, target)  # 9 MB, of which 0.1 MB are fitted
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 6e6


def test_a_subject_with_two_sessions_is_rejected(source, target):
    save(source / "900001/ses-1/T1w/Diffusion", series())
    save(source / "900001/ses-2/T1w/Diffusion", series(seed=2))
    save(source, {"900001_3T_Diffusion_preproc.zip": package(series())})
    (reason,) = diffusion.fit_folder(source, target, workers=1)["reason"]
    assert "ses-1/T1w/Diffusion, 900001/ses-2/T1w/Diffusion, 900001_3T_" in reason


def test_a_series_at_7_t_is_no_second_session(source, target):
    at_7t = FOLDER + "_7T"
    save(source / FOLDER, series())
    save(source / at_7t, series(seed=2))
    save(source, {"900002_3T_Diffusion_preproc.zip": package(series())})
    save(source, {"900002_7T_Diffusion_preproc.zip": package(series(seed=3), at_7t)})
    save(source / "study_7T/900003/T1w/Diffusion", series())
    table = diffusion.fit_folder(source, target, workers=1)
    assert table["status"].str.startswith("fitted").tolist() == [True] * 3


@pytest.mark.skipif(sys.platform == "win32", reason="links need a privilege on Windows")
@pytest.mark.parametrize("name", ["data.nii.gz", "grad_dev.nii.gz"])
def test_what_datalad_has_not_fetched_is_missed(source, target, name):
    save(source / FOLDER, series())
    (source / FOLDER / name).unlink(missing_ok=True)
    (source / FOLDER / name).symlink_to(".git/annex/objects/none")
    reason = diffusion.fit_folder(source, target, workers=1)["reason"][0]
    assert re.match(f"900001: FileNotFoundError: .*{FOLDER}/{name}", reason)


def test_without_dipy_a_fit_names_the_requirements(monkeypatch):
    monkeypatch.setitem(sys.modules, "dipy", None)
    with pytest.raises(ImportError, match=r"needs DIPY: pip install dipy"):
        diffusion.fit_folder("a", "b")
