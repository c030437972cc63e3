"""A difference of known size and place in real brains, between labels drawn at random."""

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pandas as pd
from nibabel.affines import apply_affine
from scipy.spatial.distance import cdist

from brainsex import BRAIN_THRESHOLD, LABELS, storage
from brainsex.cohort import Cohort, digest, load_cohort
from brainsex.synthetic.template import REGIONS


def plant(
    cohort: Path, out: Path, *, effect: float = 1.5, seed: int = 0, overwrite: bool = False
) -> Path:
    """Plant a difference of known size in a converted cohort of real brains; return its folder.

    Labels are balanced in sex, brain volume and age. A smooth bump in each of `REGIONS` is added to
    the volumes of one label and subtracted from those of the other; no other voxel is changed.
    Raises ValueError if the cohort lacks an affine or these regions, or holds planted ones.

    Parameters
    ----------
    cohort : folder that `volumes.convert` wrote, roughly in MNI space; synthetic ones of effect 0.
    out : gets the cohort, its marker PLANTED, and ``truth``; ``sex_in_life`` in ``subjects.csv``.
    effect : Cohen's d of each region's mean between the labels, the chance difference included;
        ``truth/regions.csv`` has the measured ``d``, smaller where many voxels reach 0 or 1.
    overwrite : start anew in the folder of a planted cohort; a ValueError for any other folder.
    """
    cohort, out = Path(cohort), Path(out)
    data = load_cohort(cohort)
    marker, differing = cohort / "SYNTHETIC", (cohort / "PLANTED").is_file()
    differing |= marker.is_file() and storage.read_json(marker)["effect"] != 0
    if differing or data.affine is None or len(data) < 4 or not 0 <= effect < np.inf:
        present = f"planted {differing}, affine {data.affine is not None}, {len(data)}, d {effect}"
        expected = "nothing planted before, an affine, 4 subjects or more, and a d of 0 or more"
        raise ValueError(f"{cohort}: expected {expected}, found {present}; take another cohort")
    files = [path.name for path in out.glob("[!.]*") if path.name != storage.RUN_RECORD]
    if files and "PLANTED" not in files:
        raise ValueError(f"{out}: expected no files, found {files}; name another folder")
    bumps, labels = _place_regions(cohort, data), _draw_labels(data, seed)
    truth = (bumps > 0.5) @ REGIONS["label"].to_numpy()  # (V,); regions do not overlap
    count, target = np.bincount(truth)[1:], effect * np.sign(REGIONS["fa_men_minus_women"])
    planted = np.zeros(len(REGIONS))  # differences between the labels at the peaks
    for correction in (1, 1, 1, 0):  # for chance, twice for clipping; the last pass only measures
        volumes = _planted_volumes(data, labels, bumps @ planted)
        means = pd.DataFrame(np.bincount(truth, volume)[1:] / count for volume in volumes)
        groups = means.groupby(labels)
        difference, spread = np.diff(groups.mean(), axis=0)[0], np.sqrt(groups.var().mean())
        planted += correction * (target * spread - difference) / bumps.mean(0, where=bumps > 0.5)
    regions = REGIONS.drop(columns="radius_mm").assign(fa_men_minus_women=planted)
    regions["volume_ml"] = count * abs(np.linalg.det(data.affine[:3, :3])) / 1000
    regions["d"] = difference / spread
    settings = {"cohort": data.name, "effect": float(effect), "seed": seed, "inputs": digest(data)}
    stale = ("*.npy", "*.csv", "grid.json", "truth/*")
    storage.start_run(out, "plant", settings, overwrite=overwrite, results=stale)
    storage.write_text(out / "PLANTED", json.dumps(settings))  # first, so nothing passes for real
    if marker.is_file():
        storage.write_text(out / marker.name, marker.read_text())
    storage.write_text(out / "truth/regions.csv", regions.to_csv(index=False, float_format="%.4f"))
    regions_map = truth.reshape(data.volumes.shape[1:]).astype(np.int16)
    storage.write_nifti(out / "truth/regions.nii.gz", regions_map, data.affine)
    codes = np.array(list(LABELS))
    people = data.table.assign(Gender=codes[labels], label=labels, sex_in_life=codes[data.sex])
    storage.write_text(out / "subjects.csv", people.to_csv(index=False))
    storage.write_text(out / "rejected.csv", "Subject,reason\n")
    storage.write_text(out / "grid.json", (cohort / "grid.json").read_text())
    storage.write_array(out / "labels.npy", labels.shape, np.int64, [labels])
    volumes = _planted_volumes(data, labels, bumps @ planted)
    storage.write_array(out / "tensors.npy", data.volumes.shape, np.float32, volumes)
    return out


def _place_regions(cohort: Path, data: Cohort) -> np.ndarray:
    """Return the bumps (V, regions) of `REGIONS` in [0, 1], in the mean brain of a cohort."""
    positions = apply_affine(data.affine, np.indices(data.volumes.shape[1:]).reshape(3, -1).T)
    distance = cdist(positions, REGIONS[["x_mm", "y_mm", "z_mm"]]) / REGIONS["radius_mm"].to_numpy()
    bumps = np.clip(2 - 2 * distance**2, 0, 1)
    planted = bumps * (np.mean(data.volumes, axis=0).reshape(-1, 1) > BRAIN_THRESHOLD)
    count, count_in_brain = (bumps > 0.5).sum(0), (planted > 0.5).sum(0)
    if (count_in_brain < np.maximum(4, count / 2)).any():
        problem = f"expected 4 voxels or more, and half of each region, found {count_in_brain}"
        raise ValueError(f"{cohort}: {problem} of {count} in brain; use a finer grid, in MNI mm")
    return planted


def _draw_labels(data: Cohort, seed: int) -> np.ndarray:
    """Draw labels (N,) by a coin in each pair of people alike in sex, brain volume and age."""
    ranks = data.table.reindex(columns=["brain_volume_ml", "age"]).rank()  # of HCP's bands, too
    group = ((ranks["brain_volume_ml"].groupby(data.sex).rank("first") - 1) // 8).fillna(0)
    age = ranks["age"] * (-1) ** group  # up and down, as pairs may belong to two groups
    place = np.argsort(np.lexsort((age, group, data.sex)))
    return (place + np.random.default_rng(seed).integers(2, size=len(data))[place // 2]) % 2


def _planted_volumes(data: Cohort, labels: np.ndarray, shift: np.ndarray) -> Iterator[np.ndarray]:
    """Yield volumes (V,) float32 in [0, 1], moved by half of `shift` (V,) up or down by label."""
    for volume, label in zip(data.volumes, labels):
        yield np.clip(volume.ravel() + (label - 0.5) * shift, 0, 1).astype(np.float32)
