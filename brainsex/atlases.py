"""A map summed up over the regions of any label atlas."""

import json
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

import nibabel as nib
import numpy as np
import pandas as pd
from nibabel.affines import apply_affine

from brainsex import nifti, tables

INSIDE = 0.9
"""Share of a map that has to lie in the atlas's field of view, and of its labels in the brain."""
SIDES = {"left": r"(?i:\bleft\b)|(^|[ _.-])(L|lh)($|[ _.-])",
         "right": r"(?i:\bright\b)|(^|[ _.-])(R|rh)($|[ _.-])"}  # fmt: skip
"""How a region's name says on which side it lies."""
MAX_TABLE = 1 << 24
"""Bytes of the longest table of labels."""
NO_TABLE = (ValueError, TypeError, AttributeError, SyntaxError, LookupError, OverflowError)
NO_TABLE += (RecursionError,)
"""What a file that is none raises."""


@dataclass(frozen=True)
class Atlas:
    """Labels with their names and their place."""

    labels: np.ndarray
    """(X, Y, Z) int64 in RAS, 0 where there is no region."""
    affine: np.ndarray
    """(4, 4), voxel indices to mm."""
    names: dict[int, str]
    """Name of each label but 0."""


def load(
    image: str | Path | nib.spatialimages.SpatialImage, table: str | Path | pd.DataFrame
) -> Atlas:
    """Read a label volume and the table of its names.

    Parameters
    ----------
    image : path of a 3D NIfTI volume of whole numbers, any grid and orientation; or such an image.
    table : path of a CSV or TSV (columns label, index or id, and name or region), of FSL's XML, of
        JSON (``{"1": "name"}``, ``{"name": 1}`` or a list of objects), or of text with a label and
        a name a line (a colour may follow); or a table: of nilearn's atlases, `maps` is the image
        and `lut` the table.

    Raises
    ------
    FileNotFoundError
        One of them is not there: DATA_ACCESS.md says how to get two atlases of white matter.
    ValueError
        4D probability maps, values that are no labels, a table that cannot be read, names a label
        twice or has a blank or a label that is no whole number, or a label without a name. (A name
        without a voxel is a warning.)
    """
    where = "the atlas"
    if not isinstance(image, nib.spatialimages.SpatialImage):
        where = image
        try:
            nifti.load(image)  # is it a whole volume in a known place?
        except ValueError as error:
            hint = " Of probability maps take the maximum-probability file."
            raise ValueError(f"{error}{hint if '3D' in str(error) else ''}") from error
        image = nib.load(image)
    if len(image.shape) != 3:
        raise ValueError(
            f"{where}: expected a 3D volume, found {image.shape}. Of probability maps take the "
            "maximum-probability file."
        )
    image = nib.as_closest_canonical(image)
    volume = np.asarray(image.dataobj)  # float32 has no labels above 2 ** 24
    if not np.isfinite(volume).all() or (volume != np.rint(volume)).any():
        raise ValueError(f"{where}: expected whole numbers, labels, found others: probabilities?")
    if volume.min() < 0:
        raise ValueError(
            f"{where}: expected labels from 0, found {volume.min():.0f}: more than 127 labels were "
            "saved as int8. Get a file of a wider type."
        )
    names = _names(table)
    found = {int(label) for label in np.unique(volume)} - {0}
    if not found:
        raise ValueError(f"{where}: no label but 0: an empty atlas.")
    if unnamed := sorted(found - set(names)):
        raise ValueError(f"{where}: labels without a name in its table: {unnamed[:10]}.")
    if unseen := sorted(set(names) - found - {0}):
        warnings.warn(f"{where}: names without a voxel: {unseen[:10]}.", stacklevel=2)
    return Atlas(volume.astype(np.int64), image.affine, {k: v for k, v in names.items() if k})


def _names(table: str | Path | pd.DataFrame) -> dict[int, str]:
    """Name of each label."""
    where = "the table" if isinstance(table, pd.DataFrame) else table
    rows = pd.DataFrame(_rows(table), columns=["label", "name"])
    labels = pd.to_numeric(rows["label"].astype(str), errors="coerce")
    names = rows["name"].astype(str).str.strip()
    blank = rows["name"].isna() | (names == "")
    wrong = blank | (labels % 1 != 0) | labels.duplicated()  # what is no number is NaN
    if wrong.any():
        label, name = (" ".join(str(cell).split()) for cell in rows[wrong].iloc[0])
        raise ValueError(
            f"{where}: expected whole numbers with a name each, found another number, a blank, or "
            f"a label named twice: {label:.50}, {name:.50}. Mend that row."
        )
    return dict(zip(labels.astype(int).tolist(), names))


def _rows(table: str | Path | pd.DataFrame) -> list[tuple]:
    """Label and name of each row of a table, as they stand there."""
    if isinstance(table, pd.DataFrame):
        return _columns(table)
    if table is None:
        raise ValueError("expected a table of the labels' names, found None: name one.")
    path = Path(table)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such table. DATA_ACCESS.md says how to get atlases.")
    try:
        if (size := path.stat().st_size) > MAX_TABLE:
            raise ValueError(f"{size} bytes, at most {MAX_TABLE}")
        if path.suffix.lower() in (".csv", ".tsv"):
            return _columns(tables.raw(path))
        if path.suffix.lower() == ".xml":
            root = ElementTree.parse(path).getroot()
            # FSL numbers the volumes of probability maps from 0, and their labels from 1
            first = (root.findtext("header/type") or "").lower().startswith("prob")
            return [(float(at.get("index")) + first, at.text) for at in root.iter("label")]
        text = path.read_text(encoding="utf-8-sig")
        if path.suffix.lower() == ".json":
            content = json.loads(text, object_pairs_hook=tuple)  # a dict would drop doubles
            if isinstance(content, list):
                return _columns(pd.DataFrame([dict(row) for row in content]))
            flip = all(isinstance(value, (int, float)) for _, value in content)
            return [(value, key) if flip else (key, value) for key, value in content]
        lines = [line.strip() for line in text.splitlines()]
        matches = [
            re.fullmatch(r"(\d+)[\s,;:]+(.+?)((\s+\d+){4})?", line)
            for line in lines
            if line and not line.startswith("#")
        ]
        return [(match[1], match[2]) for match in matches]
    except NO_TABLE as error:
        raise ValueError(
            f"{path}: no table of labels and names ({error!s:.300}). Expected CSV with label and "
            "name, FSL's XML, JSON, or a label and a name a line."
        ) from error


def _columns(frame: pd.DataFrame) -> list[tuple]:
    """Label and name of each row, by the columns' names."""
    frame = frame.rename(columns=lambda column: str(column).strip().lower())
    chosen = [
        next((name for name in names if name in frame), None)
        for names in (("index", "label", "id", "value"), ("name", "region", "label name"))
    ]
    if None in chosen:
        raise ValueError(f"expected columns label and name, found {', '.join(frame.columns)}.")
    return list(zip(*(frame[column] for column in chosen)))


def on_grid(
    atlas: Atlas, shape: tuple[int, int, int], affine: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """The nearest label of each voxel of a grid, (X, Y, Z), and whether the atlas reaches there."""
    to_atlas = np.linalg.inv(atlas.affine) @ affine
    places = np.rint(apply_affine(to_atlas, np.moveaxis(np.indices(shape), 0, -1))).astype(int)
    inside = ((places >= 0) & (places < atlas.labels.shape)).all(-1)
    labels = np.zeros(shape, np.int64)
    labels[inside] = atlas.labels[tuple(places[inside].T)]
    return labels, inside


def regions(
    maps: Mapping[str, np.ndarray], affine: np.ndarray, atlas: Atlas, brain: np.ndarray
) -> pd.DataFrame:
    """What of a map lies in which region.

    Parameters
    ----------
    maps : group ("women", "men") -> map (X, Y, Z), not negative.
    affine : (4, 4) of the maps, voxel indices to mm.
    brain : (X, Y, Z) bool, which voxels count.

    Returns
    -------
    One row a group and region: group, label, name, volume_ml (of the region in the brain), mean of
    the map there (NaN where it has no voxel), share of the map's sum, rank by the mean from 1; last
    of a group, with label 0, what lies in no region.

    Raises
    ------
    ValueError
        A map that is empty, negative or not finite, on another grid than the brain, or no affine.

    Warns
    -----
    Less than 90 % of a map in the atlas's field of view; less than 90 % of the atlas's labels in
    the brain: an offset; most regions named left on the right: a flip. (The ICBM-DTI-81 atlas was
    once given out flipped: Rohlfing 2013, Front. Neurosci. 7:4.)
    """
    if affine is None:
        raise ValueError("expected an affine, found None: without one the atlas lies nowhere.")
    labels, reached = on_grid(atlas, brain.shape, affine)
    _doubt(atlas, affine, brain)
    voxel = abs(np.linalg.det(affine[:3, :3])) / 1000
    rows = []
    for group, saliency in maps.items():
        if saliency.shape != brain.shape:
            raise ValueError(f"{group}: expected a map {brain.shape}, found {saliency.shape}.")
        values, at = saliency[brain].astype(float), labels[brain]
        if not np.isfinite(values).all() or values.min() < 0 or values.sum() == 0:
            raise ValueError(
                f"{group}: expected a map that is positive somewhere, negative nowhere."
            )
        if (seen := values[reached[brain]].sum() / values.sum()) < INSIDE:
            warnings.warn(
                f"{group}: {seen:.0%} of the map lies in the atlas's field of view.", stacklevel=2
            )
        table = pd.DataFrame({"label": [*atlas.names, 0], "name": [*atlas.names.values(), "none"]})
        parts = [values[at == label] for label in table["label"]]
        table["volume_ml"] = [len(part) * voxel for part in parts]
        table["mean"] = [part.mean() if len(part) else np.nan for part in parts]
        table["share"] = [part.sum() / values.sum() for part in parts]
        table["rank"] = table["mean"][:-1].rank(ascending=False, method="min")
        rows.append(table.assign(group=group))
    columns = ["group", "label", "name", "volume_ml", "mean", "share", "rank"]
    return pd.concat(rows, ignore_index=True)[columns]


def _doubt(atlas: Atlas, affine: np.ndarray, brain: np.ndarray) -> None:
    """Warn of an atlas that seems to lie elsewhere than the brain, or mirrored."""
    places = np.argwhere(atlas.labels)
    at = np.rint(apply_affine(np.linalg.inv(affine) @ atlas.affine, places)).astype(int)
    at = at[((at >= 0) & (at < brain.shape)).all(1)]
    if (inside := brain[tuple(at.T)].sum() / len(places)) < INSIDE:
        warnings.warn(
            f"{inside:.0%} of the atlas's labels lie in the brain: another space, or an offset "
            "between the affines.",
            stacklevel=3,
        )
    middle = apply_affine(affine, np.argwhere(brain)).mean(0)[0]
    x = pd.Series(apply_affine(atlas.affine, places)[:, 0] - middle)
    x = x.groupby(atlas.labels[tuple(places.T)]).mean()
    wrong, sided = 0, 0
    for label, where in x.items():
        for side, pattern in SIDES.items():
            if re.search(pattern, atlas.names[label]):
                sided, wrong = sided + 1, wrong + ((where > 0) == (side == "left"))
    if wrong > sided / 2:
        warnings.warn(
            f"{wrong} of {sided} regions lie on the other side than their names say: left and "
            "right are flipped, in the atlas or in the maps.",
            stacklevel=3,
        )
