"""Networks on new volumes: ours, and state dicts saved from the published architecture."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from skimage.transform import resize
from torch import nn

from brainsex import cohort, layouts, networks, volumes
from brainsex.__main__ import predict_files
from brainsex.training import cross_validate
from tests.test_volumes import LAS, fa, save

STUDY, SMALL = (58, 70, 58), (22, 26, 24)

pytestmark = pytest.mark.usefixtures("one_cpu_thread")


@pytest.fixture
def published(tmp_path: Path) -> tuple[nn.Module, Path]:
    """The study's network with 4 channels, that tells left from right, and its state dict."""
    torch.manual_seed(3)
    network = networks.MriNet3d(4).eval()
    nn.init.normal_(network.linear.weight, std=0.3)
    torch.save(network.state_dict(), tmp_path / "published.pt")
    return network, tmp_path / "published.pt"


def fit_cohort(folder: Path, paths: list[Path], **options: object) -> tuple[cohort.Cohort, Path]:
    """Convert volumes in a folder and fit networks; return the cohort and the first network."""
    table = pd.DataFrame({"Subject": layouts.name_subjects(paths), "Gender": list("FMFMFM")})
    table.to_csv(folder / "unrestricted_people.csv", index=False)
    files = layouts.choose_volumes(layouts.find_volumes(folder))
    volumes.convert(files, folder, folder / "out", shape=SMALL, **options)
    data, settings = cohort.load(folder / "out"), {"folds": 2, "epochs": 1, "batch_size": 3}
    make = lambda: networks.MriNet3d(1, SMALL)  # noqa: E731
    cross_validate(data, make, out=folder / "cnn", workers=1, **settings)
    return data, folder / "cnn" / "fold-0.pt"


def test_a_published_network_takes_volumes_in_ras(tmp_path, published) -> None:
    network, checkpoint = published
    values = fa(1) * np.linspace(0, 1, 23, dtype=np.float32)[:, None, None]
    path = save(tmp_path / "900001.nii.gz", values)  # in LAS
    with torch.no_grad():
        small = torch.tensor(resize(values[::-1], STUDY), dtype=torch.float32)[None, None]
        expected = network(small).softmax(1)[0, 1].item()
    table = predict_files(checkpoint, [path])
    assert table[["path", "Subject"]].values.tolist() == [[path, "900001"]]
    assert table["probability_of_man"][0] == pytest.approx(expected, abs=1e-5)
    assert table["reason"].isna().all()


def test_one_bad_file_does_not_lose_the_rest(tmp_path, published) -> None:
    paths = [save(tmp_path / "4d.nii.gz", np.zeros((4, 5, 6, 7), np.float32))]
    paths += [tmp_path / "nowhere.nii.gz", save(tmp_path / "sub-07_FA.nii.gz", fa(1))]
    table = predict_files(published[1], paths)
    assert table["Subject"].tolist() == ["4d", "nowhere", "07"]
    assert table["probability_of_man"].isna().tolist() == [True, True, False]
    assert "3D real voxels" in table["reason"][0]


def test_the_field_of_view_and_the_confounds_must_be_the_training_cohorts(tmp_path) -> None:
    paths = [save(tmp_path / f"fa/{n:06d}.nii.gz", fa(n)) for n in range(6)]
    data, checkpoint = fit_cohort(tmp_path, paths)
    shifted = LAS.copy()
    shifted[0, 3] += 4
    table = predict_files(checkpoint, [save(tmp_path / "shifted.nii.gz", fa(0), shifted), paths[1]])
    network = networks.load(checkpoint, SMALL)
    with torch.no_grad():
        expected = network(torch.tensor(data.volumes[1])[None, None]).softmax(1)[0, 1]
    assert table["probability_of_man"][1] == pytest.approx(expected.item(), abs=1e-5)
    assert "not the cohort's" in table["reason"][0]
    make, options = lambda: networks.MriNet3d(1, SMALL), {"folds": 2, "epochs": 1, "workers": 1}
    cross_validate(data, make, confounds=np.arange(6.0), out=tmp_path / "less", **options)
    with pytest.raises(ValueError, match=r"run\.json: expected .* found confounds regressed out"):
        predict_files(tmp_path / "less" / "fold-0.pt", paths)


def test_t1_of_any_units_is_prepared_as_the_training_cohort_was(tmp_path) -> None:
    """Unpacked structural packages, each scanner's own units."""
    paths = []
    for n in range(6):
        path = tmp_path / f"90000{n}/T1w/T1w_acpc_dc_restore_brain.nii.gz"
        paths.append(save(path, (fa(n) + 0.4 * (fa(n) > 0)).astype(np.float32) * 10**n))
    data, checkpoint = fit_cohort(tmp_path, paths)
    assert data.modality == "t1"
    table = predict_files(checkpoint, paths)
    assert table["Subject"].tolist() == data.subjects.tolist()
    with torch.no_grad():
        logits = networks.load(checkpoint, SMALL)(torch.tensor(data.volumes[:])[:, None])
    np.testing.assert_allclose(table["probability_of_man"], logits.softmax(1)[:, 1], atol=1e-5)
