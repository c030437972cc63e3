"""Sums over regions by hand, tables in every form, atlases that lie elsewhere or are none."""

import json
import warnings

import nibabel as nib
import numpy as np
import pandas as pd
import pytest

from brainsex import atlases

NAMES = {1: "left tract", 2: "right tract", 5: "Genu, of corpus callosum"}
AFFINE = np.array([[2.0, 0, 0, -11], [0, 3, 0, -9], [0, 0, 4, -6], [0, 0, 0, 1]])
SHAPE = (12, 7, 5)


def labels():
    found = np.zeros(SHAPE, np.int16)
    found[1:4, 2:4, 1:3] = 1  # x from -9 to -5 mm
    found[8:11, 2:4, 1:3] = 2
    found[5:7, 5, 1] = 5
    return found


def write(path, volume, affine=AFFINE, dtype=None):
    image = nib.Nifti1Image(volume if dtype is None else volume.astype(dtype), affine)
    image.set_sform(affine, 1)
    nib.save(image, path)
    return path


def table(folder, kind):
    path = folder / f"labels.{kind}"
    rows = list(NAMES.items())
    if kind == "csv":
        pd.DataFrame(rows, columns=["Label", "Name"]).to_csv(path, index=False)
    elif kind == "tsv":
        pd.DataFrame(rows, columns=["index", "region"]).to_csv(path, index=False, sep="\t")
    elif kind == "xml":
        entries = "".join(f'<label index="{k}" x="1" y="2" z="3">{v}</label>' for k, v in rows)
        head = "<header><name>JHU</name><type>Label</type></header>"
        path.write_text(f'<?xml version="1.0"?><atlas>{head}<data>{entries}</data></atlas>')
    elif kind == "json":
        path.write_text(json.dumps(NAMES))
    elif kind == "txt":
        lines = [f"{k} {v}" for k, v in rows]
        path.write_text("\n".join(["# FreeSurfer's way, with colours", "", *lines[:2]]) + "\n")
        with path.open("a") as file:
            file.write(f"{lines[2]}   205 62 78 0\n")
    return path


@pytest.fixture
def atlas():
    return atlases.Atlas(labels().astype(np.int64), AFFINE, NAMES)


@pytest.fixture
def brain():
    return np.ones(SHAPE, bool)


@pytest.mark.parametrize("kind", ["csv", "tsv", "xml", "json", "txt"])
def test_every_form_of_table(tmp_path, kind):
    image = write(tmp_path / "atlas.nii.gz", labels())
    found = atlases.load(image, table(tmp_path, kind))
    assert found.names == NAMES
    np.testing.assert_array_equal(found.labels, labels())
    np.testing.assert_allclose(found.affine, AFFINE)


def test_more_forms(tmp_path):
    image = write(tmp_path / "atlas.nii.gz", labels())
    path = tmp_path / "labels.json"
    path.write_text(json.dumps({name: label for label, name in NAMES.items()}))
    assert atlases.load(image, path).names == NAMES
    path.write_text(json.dumps([{"index": k, "name": v} for k, v in NAMES.items()]))
    assert atlases.load(image, path).names == NAMES
    lut = pd.DataFrame({"index": [0, *NAMES], "name": ["Background", *NAMES.values()]})
    assert atlases.load(image, lut).names == NAMES, "nilearn's lut; 0 is no region"


def test_fsl_numbers_volumes_of_probabilities_from_zero(tmp_path):
    """In FSL's probabilistic atlases the maximum-probability image has index + 1."""
    path = tmp_path / "prob.xml"
    entries = "".join(f'<label index="{k - 1}">{v}</label>' for k, v in NAMES.items())
    head = "<header><type>Probabalistic</type></header>"  # as FSL spells it
    path.write_text(f"<atlas>{head}<data>{entries}</data></atlas>")
    assert atlases.load(write(tmp_path / "atlas.nii.gz", labels()), path).names == NAMES


@pytest.mark.parametrize("axes", [("L", "A", "S"), ("A", "R", "I"), ("S", "L", "P")])
def test_any_orientation_is_the_same_atlas(tmp_path, axes):
    image = nib.Nifti1Image(labels(), AFFINE)
    turn = nib.orientations.ornt_transform(
        nib.io_orientation(AFFINE), nib.orientations.axcodes2ornt(axes)
    )
    turned = image.as_reoriented(turn)
    path = write(tmp_path / "atlas.nii", np.asarray(turned.dataobj), turned.affine)
    found = atlases.load(path, table(tmp_path, "csv"))
    np.testing.assert_array_equal(found.labels, labels())
    np.testing.assert_allclose(found.affine, AFFINE)


def test_another_grid_takes_the_nearest_label(atlas):
    """Twice as fine along X, and one voxel further along Z; worked out by hand."""
    affine = AFFINE.copy()
    affine[0, 0], affine[0, 3] = 1.0, -11.5
    affine[2, 3] += 4
    found, inside = atlases.on_grid(atlas, (24, 7, 5), affine)
    expected = np.zeros((24, 7, 5), int)
    expected[:, :, :4] = np.repeat(labels(), 2, axis=0)[:, :, 1:]
    np.testing.assert_array_equal(found, expected)
    assert inside[:, :, :4].all()
    assert not inside[:, :, 4].any()


def test_sums_by_hand(atlas, brain):
    brain[0] = False
    women = np.zeros(SHAPE, np.float32)
    women[1:4, 2:4, 1:3], women[8:11, 2:4, 1:3] = 0.5, 0.25
    women[11, 6, 4] = 3.0  # in no region
    women[0, 0, 0] = 100.0  # outside the brain
    men = np.where(labels() == 5, 1.0, 0.0)
    found = atlases.regions({"women": women, "men": men}, AFFINE, atlas, brain)
    total = 12 * 0.5 + 12 * 0.25 + 3
    rows = found[found["group"] == "women"].set_index("label")
    assert rows.index.tolist() == [1, 2, 5, 0]
    assert rows["name"].tolist() == [*NAMES.values(), "none"]
    assert rows["volume_ml"][[1, 2, 5]].tolist() == pytest.approx([0.288, 0.288, 0.048])
    assert rows["mean"][[1, 2, 5]].tolist() == pytest.approx([0.5, 0.25, 0])
    assert rows["share"].tolist() == pytest.approx([6 / total, 3 / total, 0, 3 / total])
    assert rows["rank"][[1, 2, 5]].tolist() == [1, 2, 3]
    assert np.isnan(rows["rank"][0])
    rows = found[found["group"] == "men"].set_index("label")
    assert rows["share"].tolist() == pytest.approx([0, 0, 1, 0])
    assert rows["rank"][5] == 1
    assert found.groupby("group")["share"].sum().tolist() == pytest.approx([1, 1])


def test_a_region_outside_the_brain_has_no_mean(atlas, brain):
    brain[5:7] = False
    found = atlases.regions({"men": np.ones(SHAPE)}, AFFINE, atlas, brain)
    region = found.set_index("label").loc[5]
    assert region["volume_ml"] == 0
    assert np.isnan(region["mean"])
    assert region["share"] == 0


def test_an_atlas_in_place_is_not_doubted(atlas, brain):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        atlases.regions({"men": np.ones(SHAPE)}, AFFINE, atlas, brain)


def test_doubts(atlas, brain):
    maps = {"men": np.ones(SHAPE)}
    moved = AFFINE.copy()
    moved[1, 3] += 9  # mm
    with pytest.warns(UserWarning, match=r"men: 57% of the map lies in the atlas's field of view"):
        atlases.regions(maps, AFFINE, atlases.Atlas(atlas.labels, moved, NAMES), brain)
    brain[:, 3:] = False
    with pytest.warns(UserWarning, match=r"46% of the atlas's labels lie in the brain"):
        atlases.regions(maps, AFFINE, atlas, brain)
    flipped = atlases.Atlas(atlas.labels[::-1], AFFINE, NAMES)
    with pytest.warns(UserWarning, match="2 of 2 regions .* left and right are flipped"):
        atlases.regions(maps, AFFINE, flipped, np.ones(SHAPE, bool))


@pytest.mark.parametrize(
    "names", [("L_SLF", "R_SLF"), ("SFG_L_7_1", "SFG_R_7_1"), ("tract L", "tract R")]
)
def test_sides_in_names(atlas, brain, names):
    flipped = atlases.Atlas(atlas.labels[::-1], AFFINE, dict(zip((1, 2, 5), (*names, "Limbic"))))
    with pytest.warns(UserWarning, match="2 of 2 regions"):
        atlases.regions({"men": np.ones(SHAPE)}, AFFINE, flipped, brain)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda v: np.stack([v] * 3, -1), r"3D .* maximum-probability file"),
        (lambda v: v.astype(np.float32) / 3, "expected whole numbers"),
        (lambda v: np.where(v == 5, -56, v), "more than 127 labels were saved as int8"),
        (lambda v: np.where(v == 5, 6, v), r"labels without a name in its table: \[6\]"),
        (lambda v: 0 * v, "no label but 0"),
    ],
)
def test_images_that_are_no_atlas(tmp_path, make, message):
    image = write(tmp_path / "atlas.nii.gz", make(labels()))
    with pytest.raises(ValueError, match=message):
        atlases.load(image, table(tmp_path, "csv"))


def test_200_labels_in_int8_are_not_taken_for_others(tmp_path):
    volume = np.zeros(SHAPE, np.uint8)
    volume[2, 2, :2] = 7, 200
    image = write(tmp_path / "atlas.nii.gz", volume.view(np.int8))
    names = pd.DataFrame({"index": range(201), "name": "x"})
    with pytest.raises(ValueError, match="int8"):
        atlases.load(image, names)
    wide = write(tmp_path / "wide.nii.gz", volume)
    with pytest.warns(UserWarning, match="names without a voxel"):
        assert atlases.load(wide, names).labels.max() == 200


def test_names_without_a_voxel_are_told(tmp_path):
    image = write(tmp_path / "atlas.nii.gz", np.where(labels() == 5, 0, labels()))
    with pytest.warns(UserWarning, match=r"names without a voxel: \[5\]"):
        atlases.load(image, table(tmp_path, "csv"))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", "number,title\n1,x\n", "expected columns label and name, found number, title"),
        ("a.xml", "<atlas><data><label>x</label></data></atlas>", "no table"),
        ("a.xml", "<atlas>", "no table"),
        ("a.json", "{", "no table"),
        ("a.json", "3", "no table"),
        ("a.txt", "left tract 1\n", "no table"),
        ("a.csv", "label,name\n1,a\n,b\n", "a blank, or a label named twice"),
        ("a.csv", "label,name\n1,a\n2,\n", "a blank, or a label named twice"),
        ("a.csv", "label,name\n1,a\n1,b\n", "named twice: 1, b"),
        ("a.csv", "label,name\n1,a\n2, \n", "a blank, or a label named twice: 2, "),
        ("a.csv", "label,name\n1,a\n1.5,b\n", "whole numbers .* another number, .*: 1.5, b"),
        ("a.csv", "label,name\n1,a\nx,b\n", "whole numbers .*: x, b"),
        ("a.txt", "1 a\n01 b\n", "named twice: 01, b"),
        ("a.xml", '<a><label index="1">a</label><label index="1">b</label></a>', "twice: 1.0, b"),
        ("a.xml", '<a><label index="1.5">a</label></a>', "whole numbers .*: 1.5, a"),
        ("a.xml", '<a><label index="1"></label></a>', "a blank, .*: 1.0, "),
        ("a.json", '{"a": 1, "b": 1}', "named twice: 1, b"),
        ("a.json", '{"1": "a", "1": "b"}', "named twice: 1, b"),
        ("a.json", '{"a": 1, "b": 1.5}', "whole numbers .*: 1.5, b"),
        ("a.json", '{"1": "a", "2": null}', "a blank, .*: 2, "),
        ("a.json", '[{"id": 1, "name": "a"}, {"id": 1, "name": "b"}]', "named twice: 1, b"),
    ],
)
def test_tables_that_are_none(tmp_path, name, content, message):
    image = write(tmp_path / "atlas.nii.gz", labels())
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=message):
        atlases.load(image, tmp_path / name)


def test_an_image_as_nilearn_returns_it():
    image = nib.Nifti1Image(labels()[::-1], AFFINE @ [[-1, 0, 0, 11], [0, 1, 0, 0], *np.eye(4)[2:]])
    names = pd.DataFrame({"index": [0, *NAMES], "name": ["Background", *NAMES.values()]})
    found = atlases.load(image, names)
    np.testing.assert_array_equal(found.labels, labels())
    np.testing.assert_allclose(found.affine, AFFINE)
    assert found.names == NAMES
    with pytest.raises(ValueError, match=r"the atlas: expected a 3D volume, found \(12, 7, 5, 2\)"):
        atlases.load(nib.Nifti1Image(np.stack([labels()] * 2, -1), AFFINE), names)


def test_labels_beyond_what_float32_tells_apart(tmp_path):
    large = labels().astype(np.int32)
    large[large > 0] += 2**24
    image = write(tmp_path / "atlas.nii.gz", large)
    names = pd.DataFrame({"index": [2**24 + k for k in NAMES], "name": NAMES.values()})
    assert np.unique(atlases.load(image, names).labels).tolist() == [0, *(2**24 + k for k in NAMES)]


def test_an_atlas_without_a_table(tmp_path):
    image = write(tmp_path / "atlas.nii.gz", labels())
    with pytest.raises(ValueError, match="expected a table of the labels' names, found None"):
        atlases.load(image, None)


def test_files_that_are_not_there(tmp_path):
    image = write(tmp_path / "atlas.nii.gz", labels())
    with pytest.raises(FileNotFoundError, match=r"DATA_ACCESS\.md"):
        atlases.load(tmp_path / "absent.nii.gz", table(tmp_path, "csv"))
    with pytest.raises(FileNotFoundError, match=r"DATA_ACCESS\.md"):
        atlases.load(image, tmp_path / "absent.csv")


@pytest.mark.parametrize(
    ("saliency", "affine", "message"),
    [
        (np.zeros(SHAPE), AFFINE, "men: expected a map that is positive somewhere"),
        (np.full(SHAPE, -1.0), AFFINE, "negative nowhere"),
        (np.full(SHAPE, np.nan), AFFINE, "men: expected a map"),
        (np.ones((3, 4, 5)), AFFINE, r"expected a map \(12, 7, 5\), found \(3, 4, 5\)"),
        (np.ones(SHAPE), None, "expected an affine, found None"),
    ],
)
def test_maps_that_cannot_be_summed_up(atlas, brain, saliency, affine, message):
    with pytest.raises(ValueError, match=message):
        atlases.regions({"men": saliency}, affine, atlas, brain)
