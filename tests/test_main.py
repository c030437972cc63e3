"""The commands, from archives to masks, on a small synthetic cohort."""

import errno
import inspect
import re
import runpy
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd
import pytest

from brainsex import cohort, layouts, networks, perturbation, storage, training
from brainsex.__main__ import COMMANDS, build_parser, main


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A cohort of ten that went HCP's way, by fa, and by extract and convert."""
    pytest.importorskip("dipy")
    folder = tmp_path_factory.mktemp("data") / "synthetic"
    main(["synthesize", str(folder), *"--subjects 10 --spacing 5 --diffusion 2".split()])
    main(["fa", str(folder), str(folder / "fa")])
    main(["extract", str(folder), str(folder / "fa")])
    main(["convert", str(folder)])
    return folder


@pytest.fixture(scope="module")
def trained(folder):
    out = folder.parent / "cnn3d"
    options = "--channels 2 --folds 2 --epochs 1 --batch-size 5 --workers 1 --milestones".split()
    main(["train", str(folder), str(out), *options])
    return out


def test_convert_leaves_a_cohort_of_all_who_have_a_volume(folder):
    data = cohort.load_cohort(folder)
    table = pd.read_csv(folder / "unrestricted_behavioral.csv", dtype=str).set_index("Subject")
    assert len(data) == 10
    assert data.synthetic
    assert list(table.loc[data.subjects, "Gender"]) == ["FM"[label] for label in data.sex]


def test_a_synthetic_cohort_converted_elsewhere_stays_one(folder, tmp_path, capsys):
    main(["convert", str(folder), "--out", str(tmp_path / "other")])
    data = cohort.load_cohort(tmp_path / "other")
    assert (len(data), data.synthetic) == (10, True)


def test_survey_says_what_is_there_and_what_to_run_next(folder, capsys):
    main(["survey", str(folder)])
    said = capsys.readouterr().out
    people = f"{folder / 'unrestricted_behavioral.csv'}, 1113 people, 1113 with a known family"
    assert people in said
    assert f"morphometry: {folder / 'unrestricted_hcp_freesurfer.csv'}" in said
    assert f"python -m brainsex convert {folder.as_posix()}  # 0.00 hours, 0.0 GB" in said
    rows = {line.split()[0]: line.split()[2] for line in said.splitlines() if " fa  " in line}
    assert rows == {"archive": "8", "fa/*.nii.gz": "10"}


def test_nobody_who_can_be_used_is_an_error(folder, tmp_path):
    packages = [path for path in folder.rglob("*.zip") if "preproc" in path.name]
    (tmp_path / "hcp").mkdir()
    for path in packages:
        (tmp_path / "hcp" / path.name).write_bytes(path.read_bytes())
    with pytest.raises(SystemExit, match=r"error: nobody could be used.*HCP has no FA"):
        main(["extract", str(tmp_path / "hcp"), str(tmp_path / "fa")])


def test_the_tour_is_of_people_whom_its_network_has_not_seen(
    folder, trained, tmp_path, monkeypatch
):
    notebooks = Path(__file__).parents[1] / "notebooks"
    monkeypatch.syspath_prepend(notebooks)
    runpy.run_path(str(notebooks / "tour.py"))["write_tour"](folder, trained, tmp_path / "t", 1)
    tour, data = cohort.load(tmp_path / "t"), cohort.load(folder)
    folds = pd.read_csv(trained / "folds.csv", dtype={"Subject": str}).set_index("Subject")["fold"]
    assert (folds[tour.subjects] == 0).all()
    assert sorted(tour.sex) == [0, 1]
    row = list(data.subjects).index(tour.subjects[0])
    np.testing.assert_allclose(tour.volumes[0], data.volumes[row], atol=1e-3)


def test_predict_prepares_as_the_cohort_was(folder, tmp_path, capsys):
    """Of a cohort on several grids and with masks, all its own volumes, as they were."""
    (tmp_path / "c/fa").mkdir(parents=True)
    (tmp_path / "c/masks").mkdir()
    (tmp_path / "c/people.csv").write_text((folder / "unrestricted_behavioral.csv").read_text())
    for n, path in enumerate(sorted((folder / "fa").glob("*.nii.gz"))):
        image = nib.load(path)
        image = image.slicer[1:] if n % 4 == 0 else image
        nib.save(image, tmp_path / "c/fa" / path.name)
        mask = (np.arange(image.shape[2]) > 10) * np.ones(image.shape, np.uint8)
        nib.save(nib.Nifti1Image(mask, image.affine), tmp_path / "c/masks" / path.name)
    main(["convert", str(tmp_path / "c"), "--regrid", "--mask", "masks/*"])
    options = "--channels 2 --folds 2 --epochs 1 --workers 1 --no-neutral --milestones".split()
    main(["train", str(tmp_path / "c"), str(tmp_path / "cnn"), *options])
    data, network = cohort.load(tmp_path / "c"), tmp_path / "cnn/fold-0.pt"
    capsys.readouterr()
    masks = str(tmp_path / "c/masks/*")
    main(["predict", str(network), str(tmp_path / "c/fa"), "--mask", masks])
    printed = [line.split(",") for line in capsys.readouterr().out.split()][1:]
    expected = training.predict(networks.load(network), data.volumes[:])[:, 1]
    np.testing.assert_allclose([float(row[2]) for row in printed], expected, atol=1e-6)
    with pytest.raises(SystemExit, match="not one of 10 volumes"):
        main(["predict", str(network), str(tmp_path / "c/fa")])


@pytest.mark.parametrize("pattern", ["", "*.nii.gz", "{0}.nii.gz"])
def test_predict_prints_what_the_network_says_of_files_folders_and_wildcards(
    folder, trained, capsys, pattern
):
    data = cohort.load_cohort(folder)
    paths = [str(folder / "fa" / pattern.format(subject)) for subject in data.subjects]
    capsys.readouterr()
    main(["predict", str(trained / "fold-0.pt"), *(paths if "{" in pattern else paths[:1])])
    printed = [line.split(",") for line in capsys.readouterr().out.split()]
    files = [str(folder / "fa" / f"{subject}.nii.gz") for subject in data.subjects]
    assert [row[0] for row in printed] == ["path", *files]
    assert [row[1] for row in printed] == ["Subject", *data.subjects]
    expected = training.predict(networks.load(trained / "fold-0.pt"), data.volumes[:])[:, 1]
    np.testing.assert_allclose([float(row[2]) for row in printed[1:]], expected, atol=1e-6)


def test_masks_are_nifti_in_the_cohorts_space_and_resume(folder, trained, monkeypatch):
    monkeypatch.setitem(perturbation.optimise_masks.__kwdefaults__, "iterations", 3)
    data, out = cohort.load(folder), folder.parent / "masks"
    main(["masks", str(folder), str(trained), str(out)])
    table = pd.read_csv(out / "masks.csv", dtype={"Subject": str})
    assert sorted(table["Subject"]) == sorted(data.subjects)
    image = nib.load(out / "mask" / f"{data.subjects[3]}.nii.gz")
    np.testing.assert_allclose(image.affine, data.affine, atol=1e-4)
    assert image.shape == data.volumes.shape[1:]
    volume = table.set_index("Subject").loc[data.subjects[3], "volume"]
    assert image.get_fdata().mean() == pytest.approx(volume, abs=1e-6)
    stamps = {path: path.stat().st_mtime_ns for path in out.rglob("*.nii.gz")}
    main(["masks", str(folder), str(trained), str(out)])
    assert stamps == {path: path.stat().st_mtime_ns for path in out.rglob("*.nii.gz")}
    with pytest.raises(SystemExit, match=r"seed = 1, found those with 0.*--overwrite"):
        main(["masks", str(folder), str(trained), str(out), "--seed", "1"])
    main(["masks", str(folder), str(trained), str(out), "--seed", "1", "--overwrite"])
    assert all(path.stat().st_mtime_ns > stamp for path, stamp in stamps.items())


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("convert nowhere", "nowhere"),
        ("survey nowhere", "DATA_ACCESS.md"),
        ("extract nowhere target", "DATA_ACCESS.md"),
        ("train nowhere out", "notebook 02"),
        ("predict nowhere.pt x.nii.gz", "notebook 04_cnn_3d"),
        ("predict {folder}/restricted.csv x.nii.gz", r"restricted\.csv: .*state dict of MriNet3d"),
        ("masks {folder} nowhere out", r"nowhere.folds\.csv"),
    ],
)
def test_bad_input_ends_with_one_line_that_says_what_to_do(
    folder, tmp_path, monkeypatch, command, message
):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match=message) as stopped:
        main(command.format(folder=folder).split())
    assert str(stopped.value).startswith("error: ")


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (KeyboardInterrupt(), r"(?s)the same command goes on from what is finished.*130$"),
        (BrokenProcessPool("A worker was killed.\n\nSIGKILL"), "^error: .*was killed. SIGKILL"),
        (OSError(errno.ENOSPC, "No space", "a.npz"), "^error: .*a.npz.*make room and run again"),
    ],
)
def test_what_stops_a_command_says_how_to_go_on(tmp_path, monkeypatch, capsys, error, line):
    def stopped(**_):
        """Stop."""
        raise error

    monkeypatch.setitem(COMMANDS, "extract", (stopped, COMMANDS["extract"][1]))
    with pytest.raises(SystemExit) as stop:
        main(["extract", "x", str(tmp_path / "fa")])
    assert re.search(line, capsys.readouterr().err + str(stop.value))


def test_a_second_run_in_a_folder_is_refused(tmp_path):
    with (
        storage.folder_lock(tmp_path / "fa"),
        pytest.raises(SystemExit, match="another run is writing here"),
    ):
        main(["extract", str(tmp_path), str(tmp_path / "fa")])


def test_what_help_and_survey_tell_to_run_parses_and_is_taken():
    commands = [package[-1] for package in layouts.PACKAGES.values()]
    text = "\n".join([*commands, *layouts.NEXT]).format("data/hcp", "hcp", "")
    told = re.findall(r"python -m brainsex (.*)", text.replace("'", ""))
    assert {line.split()[0] for line in told} == COMMANDS.keys() - {
        "plant",
        "predict",
        "survey",
        "synthesize",
    }
    for line in told:
        options = vars(build_parser().parse_args(line.split()))
        inspect.signature(COMMANDS[options.pop("command")][0]).bind(**options)
