"""Real FA volumes are read and reduced as they are, and their left stays their left.

Where BRAINSEX_REAL_FA names a folder with two maps of TractSeg: template_FA_1.25mm.nii.gz, a
group template on HCP's own grid, and subject_FA_2.5mm.nii.gz, one subject's.
"""

import gzip
import os
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from nibabel.affines import apply_affine
from scipy.ndimage import center_of_mass
from skimage.transform import resize

from brainsex import volumes

FOLDER = os.environ.get("BRAINSEX_REAL_FA")
NAMES = ("template_FA_1.25mm.nii.gz", "subject_FA_2.5mm.nii.gz")

pytestmark = pytest.mark.skipif(
    not FOLDER, reason="BRAINSEX_REAL_FA is not set: it names a folder with real FA volumes"
)


@pytest.fixture(scope="module", params=NAMES)
def path(request):
    return Path(FOLDER) / request.param


def test_load_and_resample(path):
    """At any millimetre, what nibabel's own arithmetic finds in the file as it is stored."""
    volume, affine = volumes.load(path)
    stored = nib.load(path)
    assert nib.aff2axcodes(stored.affine) == ("L", "A", "S")
    assert nib.aff2axcodes(affine) == ("R", "A", "S")
    data = stored.get_fdata()
    indices = np.random.default_rng(0).integers(0, data.shape, (2000, 3))
    millimetres = apply_affine(stored.affine, indices)
    places = apply_affine(np.linalg.inv(affine), millimetres).round().astype(int)
    np.testing.assert_allclose(volume[tuple(places.T)], data[tuple(indices.T)], atol=1e-6)
    assert volume.max() <= 1
    np.testing.assert_allclose(volumes.prepare(path, "fa")[0], volume, atol=1e-6)  # as it is
    assert 1100 < volumes.brain_volume(volume, affine) < 2500  # ml
    small, small_affine = volumes.resample(volume, affine)
    np.testing.assert_allclose(small, resize(volume, (58, 70, 58)), atol=1e-6)
    before = apply_affine(affine, center_of_mass(volume))
    after = apply_affine(small_affine, center_of_mass(small))
    np.testing.assert_allclose(after, before, atol=0.05)
    if volume.shape == (145, 174, 145):
        np.testing.assert_allclose(np.diag(small_affine)[:3], [3.125, 3.1071, 3.125], atol=5e-5)
        origin = [-89.0625, -125.0714, -71.0625]
        np.testing.assert_allclose(small_affine[:3, 3], origin, atol=5e-5)


def test_a_flip_between_left_and_right_is_seen(path, tmp_path):
    """Mirrored data are not the same brain; mirrored together with their affine, they are."""
    volume, affine = volumes.load(path)
    image = nib.load(path)
    data = np.ascontiguousarray(image.get_fdata(dtype=np.float32)[::-1])
    nib.save(nib.Nifti1Image(data, image.affine), tmp_path / "flipped.nii.gz")
    mirrored, same_affine = volumes.load(tmp_path / "flipped.nii.gz")
    np.testing.assert_array_equal(same_affine, affine)
    np.testing.assert_array_equal(mirrored, volume[::-1])
    # even a group template is not symmetric: the flip shows after the study's resize too
    small, mirror = (volumes.resample(v, affine)[0] for v in (volume, mirrored))
    assert abs(mirror - small).max() > 0.1
    reverse = np.diag([-1.0, 1, 1, 1])
    reverse[0, 3] = image.shape[0] - 1
    stored_in_ras = nib.Nifti1Image(data, image.affine @ reverse)
    (tmp_path / "ras.nii.gz").write_bytes(gzip.compress(stored_in_ras.to_bytes(), 1))
    again, again_affine = volumes.load(tmp_path / "ras.nii.gz")
    np.testing.assert_array_equal(again, volume)
    np.testing.assert_allclose(again_affine, affine, atol=1e-5)
