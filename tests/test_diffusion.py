"""FA fitted to diffusion series: against its definition, DIPY's own fit, and bad series."""

import gzip
import json
import os
import re
import struct
import subprocess
import sys
import tracemalloc
from importlib.metadata import version
from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd
import pytest

pytest.importorskip("dipy")

from dipy.core.gradients import gradient_table
from dipy.data import get_fnames
from dipy.reconst.dti import TensorModel

from brainsex import diffusion, nifti
from brainsex.__main__ import main
from tests.conftest import NO_RESULT
from tests.test_archives import DEFLATED, STORED, zipped

ROOT = Path(__file__).parents[1]
SHAPE = (7, 6, 5)
AFFINE = np.array([[-1.25, 0, 0.1, 90], [0, 1.25, 0, -126], [0.1, 0, 1.25, -72], [0, 0, 0, 1]])
FOLDER = "900001/T1w/Diffusion"
BVALS = np.array([5, 990, 1000, 1005, 995, 2000, 1000, 5, 1010, 1000, 1005, 3000, 990, 1000, 995.0])


def directions(count, seed=0):
    """(count, 3) random unit vectors."""
    vectors = np.random.default_rng(seed).normal(size=(count, 3))
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


BVECS = directions(len(BVALS))


def by_definition(eigenvalues):
    """FA of (…, 3) eigenvalues: Basser and Pierpaoli (1996), with the mean diffusivity."""
    deviation = eigenvalues - eigenvalues.mean(-1, keepdims=True)
    return np.sqrt(1.5 * (deviation**2).sum(-1) / (eigenvalues**2).sum(-1))


def tensors(seed=1):
    """SHAPE + (3, 3) tensors in mm²/s, turned at random, and their FA."""
    draw = np.random.default_rng(seed)
    eigenvalues = draw.uniform(2e-4, 2e-3, (*SHAPE, 3))
    turn = np.linalg.qr(draw.normal(size=(*SHAPE, 3, 3)))[0]
    return np.einsum("...ij,...j,...kj->...ik", turn, eigenvalues, turn), by_definition(eigenvalues)


def signals(tensor, bvals, bvecs, s0=1000):
    """S0 exp(-b gᵀDg): (…, volumes); `bvals` and `bvecs` may differ between voxels."""
    exponent = np.einsum("...vi,...ij,...vj->...v", bvecs, tensor, bvecs)
    return s0 * np.exp(-bvals * exponent)


def image(values, dtype=np.float32, affine=AFFINE):
    return gzip.compress(nib.Nifti1Image(values.astype(dtype), affine).to_bytes(), 1)


def text(rows):
    return "".join(" ".join(f"{x:.9g}" for x in row) + "\n" for row in np.atleast_2d(rows)).encode()


def mask():
    inside = np.ones(SHAPE, bool)
    inside[0], inside[:, :, -1] = False, False
    return inside


def series(seed=1, noise=0, **changes):
    """The files of a series by name; keywords replace them, as in ``bvals=…``, ``data=None``."""
    data = signals(tensors(seed)[0], BVALS, BVECS)
    data = data + noise * np.random.default_rng(seed).normal(size=data.shape)
    files = {
        "data": image(data),
        "bvals": text(BVALS),
        "bvecs": text(BVECS.T),
        "mask": image(mask(), np.uint8),
    }
    names = {"data": "data.nii.gz", "mask": "nodif_brain_mask.nii.gz", "dev": "grad_dev.nii.gz"}
    files = {name: content for name, content in (files | changes).items() if content is not None}
    return {names.get(name, name): content for name, content in files.items()}


def save(folder, files):
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)


def package(files, folder=FOLDER, method=STORED):
    extra = [("900001/T1w/Diffusion/eddylogs/eddy.txt", b"log"), ("a/T1w_acpc_dc.nii.gz", b"T1w")]
    return zipped([*extra, *((f"{folder}/{name}", each) for name, each in files.items())], method)


@pytest.fixture
def source(tmp_path):
    return tmp_path / "source"


@pytest.fixture
def target(tmp_path):
    return tmp_path / "fa"


def fitted(source, target, subject="900001", **options):
    """The map of one subject after a fit that takes it."""
    table = diffusion.fit(source, target, workers=1, **options).set_index("Subject")
    assert table.loc[subject, "status"] == "fitted", table.loc[subject, "reason"]
    return nib.load(target / f"{subject}.nii.gz")


def maps(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name not in NO_RESULT}


def test_fa_of_known_tensors_is_that_of_its_definition(source, target):
    save(source / FOLDER, series())
    result = fitted(source, target)
    assert result.shape == SHAPE
    assert result.get_data_dtype() == np.float32
    np.testing.assert_array_equal(
        result.affine, nib.Nifti1Image.from_bytes(gzip.decompress(series()["data.nii.gz"])).affine
    )
    expected = np.where(mask(), tensors()[1], 0)
    np.testing.assert_allclose(result.get_fdata(), expected, atol=2e-5)
    volume, affine = nifti.load(target / "900001.nii.gz")  # as the next step reads it, in RAS
    np.testing.assert_allclose(volume, expected[::-1], atol=2e-5)
    assert affine[0, 0] > 0


def test_the_series_in_dipys_package_gives_dipys_own_result(source, target):
    data, bvals, bvecs = get_fnames(name="small_64D")
    stored, bvals, bvecs = nib.load(data), np.loadtxt(bvals), np.loadtxt(bvecs)
    values = stored.get_fdata()
    inside = values[..., 0] > np.median(values[..., 0])
    table = gradient_table(bvals, bvecs=np.nan_to_num(bvecs), b0_threshold=50)
    expected = TensorModel(table).fit(values, mask=inside).fa
    files = {
        "data": image(values, np.int16, stored.affine),
        "bvals": text(bvals),
        "bvecs": text(bvecs.T),
        "mask": image(inside, np.uint8, stored.affine),
    }
    save(source / FOLDER, series(**files))
    result = fitted(source, target)
    np.testing.assert_allclose(result.get_fdata(), expected, atol=1e-6)
    np.testing.assert_allclose(result.affine, stored.affine, atol=1e-5)
    assert expected[inside].std() > 0.1
    record = json.loads((target / "900001.json").read_text())
    assert record["shells"] == {"0": 1, "1000": 64}


def deviations(scale=0.05):
    """SHAPE + (3, 3): L, another in each voxel and not symmetric."""
    return np.random.default_rng(2).uniform(-scale, scale, (*SHAPE, 3, 3))


def stored_by_columns(deviation):
    return deviation.swapaxes(-1, -2).reshape(*deviation.shape[:3], 9)


def actual(deviation):
    """b (…, volumes) and g (…, volumes, 3) of each voxel: g is (I + L)g, its length raises b."""
    bvecs = np.einsum("...ij,vj->...vi", np.eye(3) + deviation, BVECS)
    length = np.linalg.norm(bvecs, axis=-1)
    return BVALS * length**2, bvecs / length[..., None]


def test_gradient_deviations_are_honoured_or_their_neglect_is_said(source, target, capsys):
    tensor, expected = tensors()
    data = image(signals(tensor, *actual(deviations())))
    save(source / FOLDER, series(data=data, dev=image(stored_by_columns(deviations()))))
    save(source / FOLDER.replace("1/", "2/"), series(data=data))
    inside = mask()
    honoured = fitted(source, target).get_fdata()[inside]
    np.testing.assert_allclose(honoured, expected[inside], atol=2e-5)
    neglected = nib.load(target / "900002.nii.gz").get_fdata()[inside]
    assert np.abs(neglected - expected[inside]).mean() > 0.01
    assert "1 without grad_dev.nii.gz: gradient non-linearity neglected" in capsys.readouterr().out
    said = [json.loads((target / f"90000{n}.json").read_text()) for n in (1, 2)]
    assert [each["gradient_nonlinearity"] for each in said] == ["honoured", "neglected"]


def test_gradient_deviations_agree_with_dipy_voxel_by_voxel(source, target):
    draw, tensor = np.random.default_rng(3), tensors()[0]
    bvals, bvecs = actual(deviations())
    data = signals(tensor, bvals, bvecs) + draw.normal(0, 30, (*SHAPE, len(BVALS)))
    data = data.astype(np.float32).clip(1)
    save(source / FOLDER, series(data=image(data), dev=image(stored_by_columns(deviations()))))
    result, low = fitted(source, target).get_fdata(), BVALS < 1500
    for voxel in np.argwhere(mask())[::5]:
        at = tuple(voxel)
        table = gradient_table(bvals[at][low], bvecs=bvecs[at][low], b0_threshold=50)
        expected = TensorModel(table).fit(data[at][low].astype(float)).fa
        assert result[at] == pytest.approx(expected, abs=2e-5)


def test_shells_above_the_limit_are_not_read(source, target):
    data = signals(tensors()[0], BVALS, BVECS)
    data[..., BVALS > 1500] = 7
    save(source / FOLDER, series(data=image(data)))
    expected = np.where(mask(), tensors()[1], 0)
    np.testing.assert_allclose(fitted(source, target).get_fdata(), expected, atol=2e-5)
    record = json.loads((target / "900001.json").read_text())
    assert record["shells"] == {"0": 2, "1000": 11}
    assert (record["bmax"], record["b0"]) == (1500, 50)
    assert record["voxels"] == mask().sum()
    assert record["fitter"] == "dipy.reconst.dti.wls_fit_tensor"
    assert record["versions"] == {name: version(name) for name in ("dipy", "numpy", "brainsex")}
    fitted(source, target / "1000", bmax=1000)  # b = 1010 belongs to it
    shells = json.loads((target / "1000/900001.json").read_text())["shells"]
    assert shells == {"0": 2, "1000": 11}
    fitted(source, target / "all", bmax=3000)
    shells = json.loads((target / "all/900001.json").read_text())["shells"]
    assert shells == {"0": 2, "1000": 11, "2000": 1, "3000": 1}


@pytest.mark.parametrize("dtype", ["<i2", ">i2", "<f8"])
def test_scaled_and_foreign_numbers_are_read(source, target, dtype):
    data = signals(tensors()[0], BVALS, BVECS, s0=20000)
    empty = nib.Nifti1Header(endianness=dtype[0])
    empty.set_data_dtype(dtype)
    content = bytearray(
        nib.Nifti1Image(np.round(data / 2 - 100).astype(dtype), AFFINE, empty).to_bytes()
    )
    struct.pack_into(dtype[0] + "2f", content, 112, 2, 200)  # slope and intercept
    save(source / FOLDER, series(data=gzip.compress(content)))
    result = fitted(source, target).get_fdata()
    np.testing.assert_allclose(result, np.where(mask(), tensors()[1], 0), atol=2e-3)


def test_voxels_without_a_signal_are_zero_and_fa_stays_in_range(source, target):
    data = signals(tensors()[0], BVALS, BVECS).astype(np.float32)
    data[1, 1, 1, 3], data[1, 1, 2, 0] = np.nan, np.inf
    data[2, 2, 2], data[3, 3, 3] = 0, -5
    data[4, 4, 3] = np.random.default_rng(0).uniform(0, 2, len(BVALS))
    save(source / FOLDER, series(data=image(data)))
    result = fitted(source, target).get_fdata()
    assert [result[1, 1, 1], result[1, 1, 2], result[2, 2, 2], result[3, 3, 3]] == [0, 0, 0, 0]
    assert 0 <= result.min() <= result.max() <= 1
    others = mask()
    others[[1, 1, 2, 3, 4], [1, 1, 2, 3, 4], [1, 2, 2, 3, 3]] = False
    np.testing.assert_allclose(result[others], tensors()[1][others], atol=2e-5)
    assert (result[~mask()] == 0).all()


def test_every_source_gives_the_same_map(source, target):
    files = series(noise=20, dev=image(stored_by_columns(deviations())))
    save(source / "loose/HCP_1200" / FOLDER, files)
    save(source / "bare/900001", files)
    inner = package(files, method=DEFLATED)
    archives = {
        "legacy/900001_3T_Diffusion_preproc.zip": package(files),
        "new/a/900001_Diffusion3TRecommended.zip": package(files, method=DEFLATED),
        "nested/900001.zip": zipped([("packed.zip", inner)], STORED),
        "inflated/900001.zip": zipped([("packed.zip", inner)], DEFLATED),
        "upper/900001_x.ZIP": package({name.upper(): each for name, each in files.items()}),
    }
    for name, content in archives.items():
        save((source / name).parent, {Path(name).name: content})
    places = ["loose", "bare", *(name.split("/")[0] for name in archives)]
    for place in places:
        fitted(source / place, target / place)
    fitted(source / "legacy/900001_3T_Diffusion_preproc.zip", target / "file")
    fitted(source / "loose/HCP_1200" / FOLDER, target / "folder")
    found = {place.name: (place / "900001.nii.gz").read_bytes() for place in target.iterdir()}
    assert len(found) == len(places) + 2
    assert len(set(found.values())) == 1


def test_workers_slabs_and_order_change_no_bit(source, target, monkeypatch):
    for number in range(4):
        save(source / f"90000{number}/T1w/Diffusion", series(seed=number, noise=40))
    for workers in (1, 2):
        diffusion.fit(source, target / str(workers), workers=workers)
    assert len(maps(target / "1")) == 8
    assert maps(target / "1") == maps(target / "2")
    for slab in (1, 7, 64):
        monkeypatch.setattr(diffusion, "SLAB", slab)
        diffusion.fit(source, target / f"slab {slab}", workers=1)
        assert maps(target / "1") == maps(target / f"slab {slab}")


KILLED = """
import os, sys
from brainsex import diffusion

fit_voxels, calls = diffusion.fractional_anisotropy, []

def fit_and_die(*given, **options):
    calls.append(1)
    return fit_voxels(*given, **options) if len(calls) < 4 else os._exit(9)

diffusion.SLAB, diffusion.fractional_anisotropy = 100, fit_and_die
diffusion.fit(sys.argv[1], sys.argv[2], workers=1)
"""


def test_a_killed_run_is_resumed(source, target, monkeypatch):
    for number in (1, 2, 3):
        save(source / f"90000{number}/T1w/Diffusion", series(seed=number))
    diffusion.fit(source, target / "whole", workers=1)
    command = [sys.executable, "-c", KILLED, source, target / "killed"]
    assert subprocess.run(command, cwd=ROOT, capture_output=True).returncode == 9
    assert sorted(maps(target / "killed")) == ["900001.json", "900001.nii.gz"]
    stamp = (target / "killed/900001.nii.gz").stat().st_mtime_ns
    table = diffusion.fit(source, target / "killed", workers=1)
    assert table["status"].tolist() == ["present", "fitted", "fitted"]
    assert (target / "killed/900001.nii.gz").stat().st_mtime_ns == stamp
    assert maps(target / "killed") == maps(target / "whole")
    save(source / FOLDER, series(seed=9))
    table = diffusion.fit(source, target / "killed", workers=1, overwrite=True)
    assert set(table["status"]) == {"fitted"}
    assert maps(target / "killed")["900001.nii.gz"] != maps(target / "whole")["900001.nii.gz"]


def test_another_recipe_in_the_same_folder_is_refused(source, target):
    save(source / FOLDER, series())
    fitted(source, target)
    with pytest.raises(
        ValueError, match=r"900001.json: expected .*\(3000, 50\).*\(1500, 50\).*over"
    ):
        diffusion.fit(source, target, bmax=3000)
    fitted(source, target, bmax=3000, overwrite=True)
    assert json.loads((target / "900001.json").read_text())["bmax"] == 3000


def header(**fields):
    """The series with fields of its header overwritten: (offset, form, value)."""
    content = bytearray(gzip.decompress(series()["data.nii.gz"]))
    for offset, form, value in fields.values():
        struct.pack_into(f"<{form}", content, offset, value)
    return gzip.compress(content)


def other_affine():
    moved = AFFINE.copy()
    moved[0, 3] += 1.25
    return moved


DATA = series()["data.nii.gz"]
PLAIN = gzip.decompress(DATA)
HIGH = text(np.where(BVALS > 50, 3000, BVALS))
BAD = {
    "fewer bvals": ({"bvals": text(BVALS[:-1])}, "bvecs: expected 3 rows of .* 14, found .*15"),
    "fewer gradients than volumes": (
        {"bvals": text(BVALS[:-1]), "bvecs": text(BVECS[:-1].T)},
        r"data.nii.gz: expected shape \(7, 6, 5, 14\).*bvals.*found \(7, 6, 5, 15\)",
    ),
    "fewer volumes than gradients": (
        {"data": image(np.ones((*SHAPE, 9)))},
        r"expected shape \(7, 6, 5, 15\).*found \(7, 6, 5, 9\)",
    ),
    "transposed bvecs": ({"bvecs": text(BVECS)}, r"bvecs: .*found shape \(15, 3\): transpose it"),
    "no b0": ({"bvals": text(BVALS.clip(990))}, "b0 volumes .*b ≤ 50.*from 990 to 3000"),
    "negative b": ({"bvals": text(BVALS - 10)}, "expected b ≥ 0 .*from -5 to 2990"),
    "no bvals": ({"bvals": b"\n"}, "found shape"),
    "high shell only": ({"bvals": HIGH}, "shell up to b = 1500, found 0, 3000"),
    "few directions": (
        {"bvecs": text(BVECS[np.arange(15) % 5].T)},
        "six independent directions.*11 volumes",
    ),
    "no unit vectors": ({"bvecs": text(BVECS.T * 0.9)}, "unit vectors where b > 50.*volume 1"),
    "NaN bvecs": ({"bvecs": text(BVECS.T * np.nan)}, "unit vectors where b > 50.*volume 1"),
    "words": ({"bvals": b"b values\n"}, "bvals: expected rows of .*numbers"),
    "ragged": ({"bvecs": b"0 1\n0\n0 1"}, "bvecs: expected rows of as many numbers each"),
    "no text": ({"bvals": b"\xff\xfe\0"}, "bvals: expected rows of"),
    "endless text": ({"bvals": b"1 " * 600000}, "bvals: .*more than 1048576 bytes"),
    "mask of another shape": (
        {"mask": image(mask()[1:], np.uint8)},
        r"data.nii.gz: expected shape \(6, 6, 5, 15\), the grid of nodif.*found \(7, 6, 5, 15\)",
    ),
    "mask elsewhere": (
        {"mask": image(mask(), np.uint8, other_affine())},
        "the grid of nodif_brain_mask.*found another affine",
    ),
    "4D mask": ({"mask": image(mask()[..., None, None] * np.ones(2), np.uint8)}, "mask.* 3D"),
    "empty mask": ({"mask": image(mask() * 0, np.uint8)}, "nodif_brain_mask.*empty mask"),
    "3D series": ({"data": image(np.ones(SHAPE))}, r"expected shape \(7, 6, 5, 15\).*\(7, 6, 5\)"),
    "cut short": ({"data": DATA[:-200]}, "data.nii.gz: expected a whole gzip.*ended before"),
    "cut, zipped anew": ({"data": gzip.compress(PLAIN[:-4])}, "ends in volume 15 of 15"),
    "longer": ({"data": gzip.compress(PLAIN + b"\0")}, "goes on after the last volume"),
    "flipped": ({"data": DATA[:-6] + b"\1\1" + DATA[-4:]}, "data.nii.gz: .*CRC"),
    "not gzipped": ({"data": PLAIN}, "data.nii.gz: .*Not a gzipped file"),
    "no NIfTI": ({"data": gzip.compress(b"<html>" * 100)}, "a whole gzipped NIfTI-1 file"),
    "empty": ({"data": b""}, "a whole gzipped NIfTI-1 file"),
    "far voxels": ({"data": header(offset=(108, "f", 1e9))}, "bytes before its voxels"),
    "voxels within the header": (
        {"data": header(magic=(344, "4s", b"ni1"), offset=(108, "f", 347))},
        "-1 bytes before its voxels",
    ),
    "colours": (
        {"data": header(kind=(70, "h", 128), bits=(72, "h", 24))},
        "expected real numbers, found",
    ),
    "no mask": ({"mask": None}, "found no nodif_brain_mask.nii.gz"),
    "deviations in per cent": (
        {"dev": image(100 * stored_by_columns(deviations()))},
        "grad_dev.nii.gz: expected fractions up to 0.3, found 5.*per cent",
    ),
    "eight deviations": (
        {"dev": image(stored_by_columns(deviations())[..., :8])},
        r"grad_dev.nii.gz: expected shape \(7, 6, 5, 9\).*found \(7, 6, 5, 8\)",
    ),
    "no bvecs": ({"bvecs": None}, "expected data.nii.gz, .*found no bvecs"),
    "no series": ({"data": None}, "expected one folder with data.nii.gz, found none"),
}


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("case", BAD)
def test_a_bad_series_is_rejected_with_its_reason_and_the_rest_is_done(
    source, target, case, packed
):
    changes, message = BAD[case]
    if packed or "data.nii.gz" not in series(**changes):
        save(source, {"900001_3T_Diffusion_preproc.zip": package(series(**changes))})
    else:
        save(source / FOLDER, series(**changes))
    save(source / "900002/T1w/Diffusion", series())
    table = diffusion.fit(source, target, workers=1)
    assert table["status"].tolist() == ["rejected", "fitted"]
    assert re.search(message, table["reason"][0], re.DOTALL), table["reason"][0]
    assert "900001" in table["reason"][0]
    assert sorted(maps(target)) == ["900002.json", "900002.nii.gz"]
    listed = pd.read_csv(target / "rejected.csv", dtype=str)
    assert listed.values.tolist() == [["900001", table["reason"][0]]]


def test_members_of_any_name_and_faults_of_any_kind_reject_one_subject(source, target, monkeypatch):
    save(source, {"900001.zip": package(series(), "a\n"), "900002.zip": package(series())})
    assert set(diffusion.fit(source, target, workers=1)["status"]) == {"fitted"}

    def exhausted(paths, *_):
        if "900001" in paths[0].name:
            raise MemoryError("no 9 GB")
        return locate(paths, *_)

    locate = diffusion.series.locate
    monkeypatch.setattr(diffusion.series, "locate", exhausted)
    table = diffusion.fit(source, target, workers=1, overwrite=True)
    assert table["status"].tolist() == ["rejected", "fitted"]
    assert table["reason"][0] == "900001: MemoryError: no 9 GB"


def test_a_series_that_inflates_a_thousandfold_is_no_series(source, target):
    shape = (60, 60, 60)
    data = gzip.compress(gzip.decompress(image(np.zeros((*shape, 15)))), 9)
    save(source / FOLDER, series(data=data, mask=image(np.ones(shape), np.uint8)))
    reason = diffusion.fit(source, target, workers=1)["reason"][0]
    assert "inflates to more than 500 times what is stored" in reason


def test_what_a_series_may_keep_in_memory_is_bounded(source, target, monkeypatch):
    save(source / FOLDER, series())
    monkeypatch.setattr(diffusion.series, "MAX_KEPT", 144 * 13 * 4 - 1)  # voxels, volumes, float32
    reason = diffusion.fit(source, target, workers=1)["reason"][0]
    assert "data.nii.gz: expected at most 7487 bytes, found 7488 in the 13 volumes" in reason
    monkeypatch.setattr(diffusion.series, "MAX_KEPT", 144 * 13 * 4)
    fitted(source, target)


@pytest.mark.parametrize("shape", [(32767, 32767, 32767), (512, 512, 129)])
def test_a_header_that_declares_a_huge_volume_takes_no_memory(source, target, shape):
    content = bytearray(gzip.decompress(series()["nodif_brain_mask.nii.gz"]))
    struct.pack_into("<3h", content, 42, *shape)
    save(source / FOLDER, series(mask=gzip.compress(content)))
    tracemalloc.start()
    reason = diffusion.fit(source, target, workers=1)["reason"][0]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert "at most" in reason
    assert peak < 20e6


def test_a_subject_with_two_sessions_is_rejected_and_the_rest_is_done(source, target):
    save(source / "900001/ses-1/T1w/Diffusion", series())
    save(source / "900001/ses-2/T1w/Diffusion", series(seed=2))
    save(source, {"900002_3T_Diffusion_preproc.zip": package(series())})
    save(source / "again", {"900002_Diffusion3TRecommended.zip": package(series())})
    both = [(f"{n}/T1w/Diffusion/{name}", x) for n in "ab" for name, x in series().items()]
    save(source, {"900003.zip": zipped(both)})
    save(source, {"900004_3T_Diffusion_preproc.zip": package(series())})
    save(source, {"900004_3T_Structural_preproc.zip": package({"T1w.nii.gz": b""})})
    table = diffusion.fit(source, target, workers=1)
    assert table["Subject"].tolist() == [f"90000{n}" for n in (1, 2, 3, 4)]
    assert table["status"].tolist() == ["rejected"] * 3 + ["fitted"]
    assert (
        "found 900001/ses-1/T1w/Diffusion, 900001/ses-2/T1w/Diffusion: keep" in table["reason"][0]
    )
    assert "900002_3T_Diffusion_preproc.zip/" in table["reason"][1]
    assert "again/900002_Diffusion3TRecommended.zip/" in table["reason"][1]
    assert "found 900003.zip/a/T1w/Diffusion, 900003.zip/b/T1w" in table["reason"][2]


def test_subjects_of_trees_have_the_whole_name_and_go_on(source, target):
    places = ["con-01", "con-02", "HCA6002236_V1_MR", "sub-01/ses-1"]
    for place in places:
        save(source / place / "T1w/Diffusion", series())
    save(source / ".git/annex/objects/x", series())
    for status in ("fitted", "present"):
        table = diffusion.fit(source, target, workers=1)
        assert table["Subject"].tolist() == ["01", "HCA6002236_V1_MR", "con-01", "con-02"]
        assert set(table["status"]) == {status}


def test_a_series_at_7_t_is_no_second_session(source, target):
    save(source / FOLDER, series())
    save(source / (FOLDER + "_7T"), series(seed=2))
    save(source, {"900002_3T_Diffusion_preproc.zip": package(series())})
    save(source / "study_7T/900003/T1w/Diffusion", series())
    both = [
        (f"T1w/{name}/{file}", content)
        for name in ("Diffusion", "Diffusion_7T")
        for file, content in series().items()
    ]
    save(source, {"900004.zip": zipped(both)})
    at_7t = package(series(seed=2), FOLDER + "_7T")
    save(source, {"900002_7T_Diffusion_preproc.zip": at_7t})
    assert set(diffusion.fit(source, target, workers=1)["status"]) == {"fitted"}


@pytest.mark.skipif(sys.platform == "win32", reason="links need a privilege on Windows")
@pytest.mark.parametrize("name", ["data.nii.gz", "grad_dev.nii.gz"])
def test_what_datalad_has_not_fetched_is_said(source, target, name):
    save(source / FOLDER, series())
    (source / FOLDER / name).unlink(missing_ok=True)
    (source / FOLDER / name).symlink_to(".git/annex/objects/none")
    reason = diffusion.fit(source, target, workers=1)["reason"][0]
    assert reason == f"{FOLDER}/{name}: expected a file, found a link: not fetched: datalad get"


@pytest.mark.parametrize("at", [1, 2])
def test_a_kill_never_leaves_an_old_map_beside_a_new_recipe(source, target, monkeypatch, at):
    save(source / FOLDER, series())
    fitted(source, target)
    (target / "dataset_description.json").write_text("[]")  # another's

    replace, calls = os.replace, []

    def killed(*paths):
        calls.extend(paths[1:] if paths[1].name != "run.json" else ())
        if len(calls) == at:
            raise KeyboardInterrupt
        replace(*paths)

    with monkeypatch.context() as patch:
        patch.setattr("brainsex.os.replace", killed)
        with pytest.raises(KeyboardInterrupt):
            diffusion.fit(source, target, bmax=3000, workers=1, overwrite=True)
    recipe = json.loads((target / "900001.json").read_text())
    assert recipe["bmax"] == (1500, 3000)[at - 1]
    assert at == 1 or not (target / "900001.nii.gz").exists()
    fitted(source, target, bmax=recipe["bmax"])


def test_a_damaged_archive_is_rejected_and_the_rest_is_done(source, target):
    whole = package(series())
    save(source, {"900001_x.zip": whole[:-40], "900002_x.zip": b"<html>", "900003_x.zip": whole})
    at = whole.index(series()["data.nii.gz"]) + 500
    save(source, {"900004_x.zip": whole[:at] + b"\xff\xff\xff" + whole[at + 3 :]})
    table = diffusion.fit(source, target, workers=1)
    assert table["status"].tolist() == ["rejected", "rejected", "fitted", "rejected"]
    assert table["reason"].iloc[:2].str.contains("expected a whole zip archive").all()
    assert "900004_x.zip/900001/T1w/Diffusion/data.nii.gz" in table["reason"][3]


def test_hostile_bytes_stop_nothing(source, target):
    draw = np.random.default_rng(0)
    whole = package(series(), method=STORED)
    for number in range(40):
        content = bytearray(whole)
        for at in draw.integers(len(content), size=3):
            content[at] = draw.integers(256)
        save(source, {f"{900000 + number}.zip": bytes(content)})
        plain = bytearray(PLAIN)
        plain[draw.integers(352)] = draw.integers(256)
        save(source / f"{900100 + number}", series(data=gzip.compress(plain, 1)))
    table = diffusion.fit(source, target, workers=1)
    assert len(table) == 80
    for subject in table.loc[table["status"] == "fitted", "Subject"]:
        values = nib.load(target / f"{subject}.nii.gz").get_fdata()
        assert values.shape == SHAPE
        assert 0 <= values.min() <= values.max() <= 1


def test_memory_is_that_of_the_voxels_and_volumes_fitted(source, target):
    shape, volumes = (50, 60, 40), 150
    inside = np.zeros(shape, bool)
    inside[:10] = True  # a fifth
    bvals = np.where(np.arange(volumes) < 20, 1000, 3000)
    bvals[0] = 0
    draw = np.random.default_rng(0)  # 36 MB, of which 1 MB counts
    data = draw.integers(1, 9, (*shape, volumes), np.int16)
    bvecs = text(directions(volumes).T)
    files = {"data": image(data, np.int16), "mask": image(inside, np.uint8), "bvecs": bvecs}
    save(source / FOLDER, series(bvals=text(bvals), **files))
    tracemalloc.start()
    fitted(source, target)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 16e6


@pytest.mark.soak
def test_a_series_of_hcps_size_takes_less_than_3_gb(source, target):
    """145 × 174 × 145 voxels, 917,000 of them brain, 288 volumes of three shells, grad_dev."""
    pytest.importorskip("resource")
    shape, bvals = (145, 174, 145), np.tile([5.0, 1000, 2000, 3000], 72)
    grid = np.indices(shape, np.float32) - np.reshape(shape, (3, 1, 1, 1)) / 2
    inside = (grid**2).sum(0) < 60.3**2
    noise = np.where(inside, np.random.default_rng(0).integers(200, 900, shape), 0)
    header = nib.Nifti1Header()
    header.set_data_shape((*shape, len(bvals)))
    header.set_data_dtype(np.float32)
    header.set_sform(AFFINE, 1)
    header["vox_offset"], header["magic"] = 352, b"n+1"
    folder = source / FOLDER
    bvecs = directions(len(bvals))
    files = {"bvals": text(bvals), "bvecs": text(bvecs.T), "mask": image(inside, np.uint8)}
    dev = np.random.default_rng(1).normal(0, 0.01, (*shape, 9)).astype(np.float32)
    save(folder, series(dev=image(dev, np.float32), data=b"", **files))
    with gzip.open(folder / "data.nii.gz", "wb", 1) as stream:
        stream.write(header.binaryblock + bytes(4))
        for number in range(len(bvals)):
            volume = noise * np.float32(np.exp(-bvals[number] * 5e-4) + 1e-3 * (number % 7))
            stream.write(volume.astype(np.float32).tobytes(order="F"))
    code = (
        "import resource, sys; from brainsex import diffusion; "
        "print(diffusion.fit(*sys.argv[1:], workers=1).status.tolist()); "
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6)"
    )
    run = [sys.executable, "-c", code, source, target]
    done = subprocess.run(run, capture_output=True, text=True, check=True, cwd=ROOT)
    status, peak = done.stdout.splitlines()[-2:]
    assert status == "['fitted']"
    print(f"{inside.sum()} voxels, {len(bvals)} volumes: {peak} GB")
    assert float(peak) < 3  # of kilobytes on Linux


@pytest.mark.parametrize(("made", "found"), [(True, "none in it"), (False, "no such folder")])
def test_no_source_says_what_was_expected(source, target, made, found):
    if made:
        save(source / "notes", {"mydata.nii.gz": b"", "readme.txt": b""})
    with pytest.raises(FileNotFoundError, match=rf"<ID>/T1w/Diffusion.*{found}.*DATA_ACCESS.md"):
        diffusion.fit(source, target)
    assert not target.exists()


def test_the_command_fits_and_ends_with_one_line_on_bad_input(source, target, capsys):
    save(source / FOLDER, series())
    main(["fa", str(source), str(target), "--bmax", "3000", "--workers", "1"])
    assert "1 subjects, 0 of them rejected" in capsys.readouterr().out
    assert json.loads((target / "900001.json").read_text())["shells"]["3000"] == 1
    with pytest.raises(SystemExit, match="error: nowhere: expected packages"):
        main(["fa", "nowhere", str(target / "none")])


def test_without_dipy_the_command_names_the_requirements(source, target):
    code = "import sys; sys.modules['dipy'] = None; from brainsex.__main__ import main; main()"
    command = [sys.executable, "-c", code, "fa", source, target]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert ended.returncode == 1
    assert ended.stderr.strip().startswith("error: fitting FA needs DIPY")
    assert "pip install -r requirements-diffusion.txt" in ended.stderr


def test_a_mask_may_inflate_more_than_a_hundredfold(source, target):
    shape, mask = (90, 90, 90), np.zeros((90, 90, 90))
    mask[40:44, 40:44, 40:44] = 1
    noise = np.random.default_rng(0).random((*shape, 15)) + 1
    content = image(mask, np.float32)
    assert len(gzip.decompress(content)) > 100 * len(content) + (1 << 20)
    save(source / FOLDER, series(data=image(noise), mask=content))
    assert diffusion.fit(source, target, workers=1)["status"].tolist() == ["fitted"]
