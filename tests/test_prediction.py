"""Networks on new volumes: ours, and state dicts saved from the published architecture."""

import json
import os
from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd
import pytest
import torch
from skimage.transform import resize
from torch import nn

from brainsex import cohort, networks
from brainsex.__main__ import main
from brainsex.prediction import predict
from brainsex.volumes import brain_volume
from tests.test_volumes import LAS, broken, fa, make, save

STUDY = (58, 70, 58)


class Published(nn.Module):
    """The study's network as its paper describes it, with 4 channels: its head is a log-softmax."""

    def __init__(self):
        super().__init__()
        inputs = 1
        for number, outputs in ((1, 4), (2, 8), (3, 16)):
            layers = (nn.Conv3d(inputs, outputs, 3), nn.BatchNorm3d(outputs), nn.ReLU())
            setattr(self, f"hidden{number}", nn.Sequential(*layers, nn.MaxPool3d(2)))
            inputs = outputs
        self.linear = nn.Linear(16 * 5 * 7 * 5, 2)

    def forward(self, volumes):
        for number in (1, 2, 3):
            volumes = getattr(self, f"hidden{number}")(volumes)
        return torch.log_softmax(self.linear(volumes.flatten(1)), 1)


@pytest.fixture
def published(tmp_path):
    """A published network that tells left from right, and its file."""
    torch.manual_seed(3)
    network = Published().eval()
    nn.init.normal_(network.linear.weight, std=0.3)
    torch.save(network.state_dict(), tmp_path / "published.pt")
    return network, tmp_path / "published.pt"


def probability(network, array):
    """Of man, as who reads arrays without their affine would compute it."""
    with torch.no_grad():
        small = torch.tensor(resize(array, STUDY), dtype=torch.float32)[None, None]
        return network(small).exp()[0, 1].item()


def test_a_published_checkpoint_in_the_orientation_it_was_trained_in(tmp_path, published):
    network, file = published
    array = fa(1) * np.linspace(0, 1, len(fa(1)), dtype=np.float32)[:, None, None]
    path = save(tmp_path / "900001.nii.gz", array, LAS)
    stored, mirrored = probability(network, array), probability(network, array[::-1])
    assert abs(stored - mirrored) > 0.01
    for orientation, expected in (("LAS", stored), ("RAS", mirrored)):
        found, rejected = predict(file, [path], orientation=orientation)
        assert rejected.empty
        assert found["Subject"].tolist() == ["900001"]
        assert found["probability_of_man"][0] == pytest.approx(expected, abs=1e-5)
    turned = probability(network, array[::-1].transpose(2, 0, 1)[::-1])  # axes I, R, A
    found, _ = predict(file, [path], orientation="IRA")
    assert found["probability_of_man"][0] == pytest.approx(turned, abs=1e-5)


@pytest.mark.skipif(
    "BRAINSEX_REAL_FA" not in os.environ,
    reason="BRAINSEX_REAL_FA is not set: a folder of real FA volumes",
)
def test_a_published_checkpoint_on_a_real_volume_read_as_the_study_did(published):
    network, file = published
    path = Path(os.environ["BRAINSEX_REAL_FA"]) / "template_FA_1.25mm.nii.gz"
    found, _ = predict(file, [path], orientation="LAS")
    array = nib.load(path).get_fdata(dtype=np.float32)
    assert found["probability_of_man"][0] == pytest.approx(probability(network, array), abs=1e-5)


@pytest.mark.parametrize("key", ["state_dict", "model_state_dict"])
def test_a_state_dict_within_a_checkpoint(tmp_path, published, key):
    network, file = published
    torch.save({"epoch": 3, key: nn.DataParallel(network).state_dict()}, file)
    assert networks.load(file).hidden1[0].weight.equal(network.hidden1[0].weight)
    torch.save({key: 3}, file)
    with pytest.raises(ValueError, match="no state dict of MriNet3d"):
        networks.load(file)


def test_a_checkpoint_of_dataparallel(tmp_path, published):
    network, file = published
    torch.save(nn.DataParallel(network).state_dict(), file)
    assert networks.load(file).hidden1[0].weight.equal(network.hidden1[0].weight)


@pytest.mark.parametrize("code", ["XYZ", "LA", "RRS", "RLS", ""])
def test_an_orientation_that_is_none(tmp_path, published, code):
    with pytest.raises(ValueError, match="such as RAS or LAS, found"):
        predict(published[1], [tmp_path / "x.nii.gz"], orientation=code)


def test_one_bad_file_does_not_lose_the_rest(tmp_path, published, capsys):
    good = save(tmp_path / "sub-07_FA.nii.gz", fa(1))
    again = save(tmp_path / "900002.nii.gz", fa(2))
    bad = [broken(tmp_path, "4D"), tmp_path / "nowhere.nii.gz"]
    main(["predict", str(published[1]), str(bad[0]), str(good), str(bad[1]), str(again)])
    printed = capsys.readouterr()
    assert [line.split(",")[0] for line in printed.out.split()] == ["Subject", "07", "900002"]
    assert "v: left out: " in printed.err
    assert "expected a 3D volume, found shape" in printed.err
    assert "nowhere: left out: " in printed.err
    with pytest.raises(SystemExit, match="not one of 2 volumes"):
        main(["predict", str(published[1]), *map(str, bad)])


def trained(folder, kind, *options):
    """A converted cohort and the folder of a network trained on it."""
    main(["convert", str(folder), "--kind", kind, "--out", str(folder / "out"), *options])
    settings = "--channels 1 --folds 2 --epochs 1 --batch-size 3 --milestones --workers 1"
    main(["train", str(folder / "out"), str(folder / "cnn"), *settings.split()])
    return cohort.load(folder / "out"), folder / "cnn"


def test_the_field_of_view_must_be_the_training_cohort_s(tmp_path, one_cpu_thread):
    folder = make(tmp_path / "c", 6)
    data, networks_ = trained(folder, "fa")
    shifted = LAS.copy()
    shifted[0, 3] += 4
    other = save(tmp_path / "shifted.nii.gz", fa(0), shifted)
    found, rejected = predict(networks_ / "fold-0.pt", [other, folder / "fa/000001.nii.gz"])
    assert found["Subject"].tolist() == ["000001"]
    assert "expected the training cohort's field of view" in rejected["reason"][0]
    _, rejected = predict(networks_ / "fold-0.pt", [folder / "fa/000001.nii.gz"], orientation="LAS")
    assert len(rejected) == 1, "ours are trained in RAS"
    grid = json.loads((networks_ / "run.json").read_text())["train"]["grid"]
    np.testing.assert_allclose(grid["affine"], data.affine)


def t1(seed, scale):
    """A T1-weighted brain in arbitrary units: the FA map's shape, with few dark voxels."""
    return fa(seed) * scale + 0.4 * scale * (fa(seed) > 0)


def test_the_whole_path_on_t1_in_any_units(tmp_path, one_cpu_thread):
    """Unpacked structural packages → array → network → predictions; each scanner's own units."""
    subjects = [f"90000{n}" for n in range(6)]
    paths = []
    for n, name in enumerate(subjects):
        paths.append(tmp_path / f"{name}/T1w/T1w_acpc_dc_restore_brain.nii.gz")
        paths[n].parent.mkdir(parents=True)
        save(paths[n], np.float32(t1(n, 10.0**n)))
    save(tmp_path / "900000/T1w/T1w_acpc_dc_restore.nii.gz", fa(9))
    table = pd.DataFrame({"Subject": subjects, "Gender": list("FMFMFM")})
    table.to_csv(tmp_path / "unrestricted_behavioral.csv", index=False)
    data, networks_ = trained(tmp_path, "hcp-t1", "--normalised")
    assert (data.modality, data.normalised, len(data)) == ("t1", True, 6)
    assert data.volumes.max() <= 1
    sizes = [brain_volume(volume, data.affine) for volume in data.volumes]
    assert np.ptp(sizes) / np.mean(sizes) < 0.02
    found, rejected = predict(networks_ / "fold-1.pt", paths)
    assert rejected.empty
    assert found["Subject"].tolist() == subjects
    network = networks.load(networks_ / "fold-1.pt")
    with torch.no_grad():
        logits = network(torch.tensor(data.volumes[:])[:, None])
    np.testing.assert_allclose(found["probability_of_man"], logits.softmax(1)[:, 1], atol=1e-5)
