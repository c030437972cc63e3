"""Measures of explanations: whether they find what was planted, and what the network uses.

Maps are (N, X, Y, Z), or (X, Y, Z) for one, large where the evidence is; `brain` and `truth` are
(X, Y, Z) bool, the voxels that count and those that were planted. Where a map's first voxels are
taken, ties are broken at random, the same way every time: zeros gain nothing from voxels' order.
"""

import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import joblib
import nibabel as nib
import numpy as np
import pandas as pd
import torch
from nilearn.maskers import NiftiLabelsMasker
from scipy.ndimage import gaussian_filter
from scipy.stats import rankdata
from sklearn.metrics import average_precision_score
from torch import nn
from tqdm.auto import tqdm

from brainsex import evaluation, explain, networks, perturbation, speed, storage, training
from brainsex.cohort import Cohort

FRACTIONS = (0, 0.001, 0.0025, 0.005, 0.01, 0.02)
"""Shares of the brain at which deletion and insertion are measured: masks take about 1 %."""
BOOTSTRAP_DRAWS = 50


def localisation(maps: np.ndarray, truth: np.ndarray, brain: np.ndarray) -> pd.DataFrame:
    """Measure how well maps (N, X, Y, Z) find what was planted, one row a map.

    Columns: average_precision over the brain's voxels; base_rate, that of a map that knows nothing;
    pointing, the planted share of the voxels where the map is largest (Zhang et al. 2018,
    arXiv 1608.00507); mass_inside, the planted share of the map's positive sum, 0 for none. Raises
    ValueError if nothing planted lies in the brain, or a map is not finite.
    """
    inside = truth[brain]
    if not inside.any():
        raise ValueError("expected planted voxels in the brain, found none")
    rows = []
    for values in maps[:, brain]:
        precision, positive = average_precision_score(inside, values), values.clip(0)
        mass = positive[inside].sum(dtype=float) / (positive.sum(dtype=float) or 1)
        pointing = inside[values == values.max()].mean()
        rows.append((precision, inside.mean(), pointing, mass))
    return pd.DataFrame(rows, columns=["average_precision", "base_rate", "pointing", "mass_inside"])


def group_average_precision(
    maps: np.ndarray, truth: np.ndarray, brain: np.ndarray, strata: np.ndarray | None = None
) -> tuple[float, float, float]:
    """Return the average precision of the mean of maps (N, X, Y, Z), with 95 % limits.

    They are ± 1.96 bootstrap standard errors over subjects, drawn within `strata` (N,), and NaN if
    every stratum is one subject.
    """
    strata = np.zeros(len(maps)) if strata is None else np.asarray(strata)
    members = [np.flatnonzero(strata == stratum) for stratum in np.unique(strata)]
    rng, draws = np.random.default_rng(0), [np.arange(len(maps))]
    for _ in range(BOOTSTRAP_DRAWS if len(members) < len(maps) else 0):
        draws.append(np.concatenate([rng.choice(rows, len(rows)) for rows in members]))
    means = (maps[rows].mean(0, dtype=np.float64)[None] for rows in draws)
    scores = [localisation(mean, truth, brain)["average_precision"][0] for mean in means]
    half = 1.96 * np.std(scores[1:], ddof=1) if len(scores) > 1 else np.nan
    return float(scores[0]), float(scores[0] - half), float(scores[0] + half)


def top_voxels(values: np.ndarray, brain: np.ndarray, voxels: int) -> np.ndarray:
    """Return, as bool (X, Y, Z), exactly so many of the brain's voxels: those of largest value."""
    if not 0 <= voxels <= np.count_nonzero(brain):
        raise ValueError(f"expected 0 to {np.count_nonzero(brain)} voxels, found {voxels}")
    chosen = np.zeros(brain.size, bool)
    chosen[_order_voxels(values, brain)[:voxels]] = True
    return chosen.reshape(brain.shape)


def _order_voxels(values: np.ndarray, brain: np.ndarray) -> np.ndarray:
    """Return the flat indices of the brain's voxels, the one of the largest value first."""
    if not np.isfinite(values[brain]).all():
        raise ValueError("expected a finite map, found NaN or infinity in the brain")
    voxels = np.random.default_rng(0).permutation(np.flatnonzero(brain))
    return voxels[np.argsort(-values.ravel()[voxels], kind="stable")]


def deletion_insertion(
    network: nn.Module,
    volumes: np.ndarray,
    maps: np.ndarray,
    brain: np.ndarray,
    *,
    target: int | np.ndarray,
    fractions: Sequence[float] = FRACTIONS,
    reference: np.ndarray | None = None,
    insertion: bool = True,
    progress: bool = True,
) -> dict[str, np.ndarray]:
    """Follow the target's probability while a map's first voxels are replaced, or come back.

    Petsiuk et al. 2018, arXiv 1806.07421. Deletion starts from volumes (N, X, Y, Z) and replaces
    the voxels of largest saliency by `reference`, as in `perturbation.optimise_masks` their blur by
    default; insertion starts from the reference. `target` is one class for all or (N,); `fractions`
    are shares of the brain's voxels, increasing within [0, 1].

    Returns
    -------
    deletion and insertion, (N, fractions), and their means over the fractions, deletion_area and
    insertion_area, (N,): low is faithful in deletion, high in insertion. Raises ValueError if
    shapes, target or fractions do not fit, or a map, volume or reference is not finite.
    """
    steps = np.asarray(fractions, float)
    if len(steps) < 2 or not (np.diff(steps) > 0).all() or steps[0] < 0 or steps[-1] > 1:
        raise ValueError(f"expected fractions that increase within [0, 1], found {fractions}")
    if maps.shape != volumes.shape or brain.shape != volumes.shape[1:]:
        shapes = f"{maps.shape}, {volumes.shape} and {brain.shape}"
        raise ValueError(f"expected maps, volumes and a brain on one grid, found {shapes}")
    if reference is not None:
        reference = perturbation.broadcast_image(reference, volumes, "a reference")
    target = perturbation.resolve_target(target, volumes)
    counts = np.rint(steps * np.count_nonzero(brain)).astype(int)
    device = networks.device()
    plain = speed.inference_copy(network, device)

    @torch.no_grad()
    def work(rows: np.ndarray) -> list[np.ndarray]:
        volume = perturbation.volume_tensor(volumes, rows, device)
        replacement = perturbation.reference_images(reference, rows, volume)
        order = torch.from_numpy(_order_voxels(maps[rows[0]], brain)).to(device)
        curves = []
        for start, end in ((volume, replacement), (replacement, volume))[: 1 + insertion]:
            images = start.repeat(len(counts), 1, 1, 1, 1)
            for image, count in zip(images, counts):
                image.view(-1)[order[:count]] = end.reshape(-1)[order[:count]]
            logits = networks.average_slab_logits(speed.forward_in_chunks(plain, images))
            curves.append(logits.softmax(1)[:, int(target[rows[0]])].cpu().numpy())
        return curves

    name = "deletion and insertion" if progress else None
    curves = list(speed.map_batches(work, len(volumes), device, name=name, size=1))
    curves = np.array(curves).reshape(-1, 1 + insertion, len(steps))
    areas = np.trapezoid(curves, steps, axis=2) / (steps[-1] - steps[0])
    scores = {"deletion": curves[:, 0], "deletion_area": areas[:, 0]}
    if insertion:
        scores |= {"insertion": curves[:, 1], "insertion_area": areas[:, 1]}
    return scores


def held_out_deletion(
    cohort: Cohort,
    networks_folder: str | Path,
    table: pd.DataFrame,
    maps: Mapping[str, np.ndarray],
    brain: np.ndarray,
) -> dict[str, dict[str, np.ndarray]]:
    """Measure deletion and insertion of every method's maps by the networks that were explained.

    `table` has Subject, fold and target of each map, as from `explain.explain`. Returns method ->
    what `deletion_insertion` does, by the blur, and deletion_area_other, by the mean of the other
    sex in training: a mask learnt to delete by blurring may win at the first for that alone.
    """
    rows = pd.Index(cohort.subjects).get_indexer(table["Subject"])
    folds = explain.held_out_folds(networks_folder, cohort.subjects)
    scores = {name: {} for name in maps}
    for fold in tqdm(table["fold"].unique(), "deletion and insertion", unit="fold"):
        network = explain.fold_network(networks_folder, fold, cohort)
        places = (table["fold"] == fold).to_numpy()
        volumes, target = np.array(cohort.volumes[rows[places]]), table["target"][places].to_numpy()
        mean = explain.training_means(cohort, folds, fold)[1 - target]
        options = {"target": target, "progress": False}
        for name, values in maps.items():
            inputs = network, volumes, values[places], brain
            measures = deletion_insertion(*inputs, **options)
            other = deletion_insertion(*inputs, reference=mean, insertion=False, **options)
            measures["deletion_area_other"] = other["deletion_area"]
            for measure, part in measures.items():
                shape = len(rows), *part.shape[1:]
                scores[name].setdefault(measure, np.empty(shape))[places] = part
    return scores


def dice(first: np.ndarray, second: np.ndarray) -> float:
    """Return 2 |A ∩ B| / (|A| + |B|) of two bool arrays; NaN if both are empty."""
    total = np.count_nonzero(first) + np.count_nonzero(second)
    return 2 * np.count_nonzero(first & second) / total if total else np.nan


def map_similarity(
    first: np.ndarray, second: np.ndarray, brain: np.ndarray, *, share: float = 0.02
) -> dict[str, float]:
    """Return Spearman's correlation of two maps (X, Y, Z), and dice of their first voxels.

    Of both maps as many voxels are taken, `share` of the brain's, or fewer where a map has fewer
    above its lowest value: ties at the bottom are no agreement. NaN for a constant map.
    """
    values = first[brain], second[brain]
    voxels = min(round(share * brain.sum()), *(int((part > part.min()).sum()) for part in values))
    constant = any(np.ptp(part) == 0 for part in values)
    spearman = np.nan if constant else np.corrcoef(*map(rankdata, values))[0, 1]
    overlap = dice(top_voxels(first, brain, voxels), top_voxels(second, brain, voxels))
    return {"spearman": float(spearman), "dice": float(overlap)}


def random_map(shape: tuple[int, int, int], *, seed: int = 0) -> np.ndarray:
    """Return smooth noise (X, Y, Z): a map that knows nothing."""
    return gaussian_filter(np.random.default_rng(seed).standard_normal(shape), 2.0)


def retrained_accuracy(
    cohort: Cohort,
    regions: Mapping[str, np.ndarray],
    held_out: np.ndarray,
    make_network: Callable[[], nn.Module],
    *,
    out: str | Path,
    overwrite: bool = False,
    **settings: object,
) -> pd.DataFrame:
    """Train networks without each region, and from it alone, and test them on the held-out.

    Remove-and-retrain (Hooker et al. 2019, arXiv 1806.10758): what is removed is the training
    subjects' mean in everybody. As many networks as there are cores are trained at once; each gets
    a folder in `out`, from which an interrupted run goes on.

    Parameters
    ----------
    regions, held_out : name -> (X, Y, Z) bool; (N,) bool.
    settings : of `training.cross_validate`.

    Returns
    -------
    One row a region and what is seen: region, sees ("all but the region", "the region alone"), n,
    accuracy, low, high (Wilson, 95 %: over subjects, for this one network).
    """
    digest = {"regions": joblib.hash(dict(regions)), "held_out": joblib.hash(held_out)}
    storage.start_run(out, "removal", digest, overwrite=overwrite)
    settings |= {"assignment": (~held_out).astype(int), "overwrite": overwrite}
    jobs = {
        (name, sees): removed
        for name, region in regions.items()
        for sees, removed in (("all but the region", region), ("the region alone", ~region))
    }
    counts = joblib.Parallel(speed.parallel_networks(), return_as="generator")(
        joblib.delayed(_retrain)(
            os.getpid(),
            Path(out) / re.sub("[^a-z0-9]+", "-", f"{name} {sees}".lower()),
            *(cohort, removed, make_network, settings),
        )
        for (name, sees), removed in jobs.items()
    )
    rows, n = [], int(held_out.sum())
    progress = tqdm(counts, "networks trained anew", total=len(jobs), unit="network")
    for (name, sees), correct in zip(jobs, progress):
        low, high = evaluation.wilson_interval(correct, n)
        row = {"region": name, "sees": sees, "n": n, "accuracy": correct / n}
        rows.append(row | {"low": low, "high": high})
    return pd.DataFrame(rows)


def _retrain(
    parent_pid: int,
    out: Path,
    cohort: Cohort,
    removed: np.ndarray,
    make_network: Callable[[], nn.Module],
    settings: dict,
) -> int:
    """Return how many of fold 0 are classified right by a network trained without `removed`."""
    storage.exit_with_parent(parent_pid)
    train = np.flatnonzero(settings["assignment"])
    mean = sum(np.asarray(cohort.volumes[row], np.float64) / len(train) for row in train)
    cohort = replace(cohort, volumes=_RegionRemoved(cohort.volumes, removed, mean))
    fold = training.cross_validate(cohort, make_network, only=[0], out=out, workers=1, **settings)
    return int(((fold["probability"] > 0.5) == fold["sex"]).sum())


class _RegionRemoved:
    """Volumes (N, X, Y, Z) in which the voxels `removed` are those of `image`, read lazily."""

    def __init__(self, volumes: np.ndarray, removed: np.ndarray, image: np.ndarray) -> None:
        self.volumes, self.removed, self.image = volumes, removed, image.astype(np.float32)
        self.shape = volumes.shape

    def __getitem__(self, rows: int | np.ndarray) -> np.ndarray:
        return np.where(self.removed, self.image, self.volumes[rows])


def region_shares(
    maps: Mapping[str, np.ndarray],
    affine: np.ndarray,
    atlas: str | Path | nib.Nifti1Image,
    lut: str | Path | pd.DataFrame,
    brain: np.ndarray,
) -> pd.DataFrame:
    """Sum maps up over the regions of any label atlas, by nilearn's `NiftiLabelsMasker`.

    Parameters
    ----------
    maps, affine : group ("women", "men") -> (X, Y, Z), nowhere negative; (4, 4), to mm.
    atlas, lut : labels on any grid, 0 is no region; their names, a table or CSV of index and name.

    Returns
    -------
    One row a group and region: group, label, name, volume_ml (within the brain), mean of the map,
    share of its sum, rank by the mean; last of a group, with label 0, what lies in no region.
    """
    for group, values in maps.items():
        if not (np.isfinite(values).all() and values.min() >= 0 and values[brain].any()):
            raise ValueError(f"{group}: expected a map that is nowhere negative, and not empty")
    images = np.stack([*maps.values(), np.ones(brain.shape)], -1)
    mask = nib.Nifti1Image(brain.astype(np.uint8), affine)
    options = {"strategy": "sum", "standardize": None, "reports": False}
    masker = NiftiLabelsMasker(atlas, lut=lut, mask_img=mask, **options)
    sums = masker.fit_transform(nib.Nifti1Image(images, affine)).T  # (regions, groups + 1)
    labels = [masker.region_ids_[number] for number in range(len(sums))]
    names = masker.lut_.set_index("index")["name"].drop(0)
    sums = pd.DataFrame(sums, labels, [*maps, "voxels"]).reindex(names.index, fill_value=0.0)
    names.loc[0], sums.loc[0] = "none", images[brain].sum(0) - sums.sum()
    voxel_ml, tables = abs(np.linalg.det(affine[:3, :3])) / 1000, {}
    for group in maps:
        columns = {"name": names, "volume_ml": sums["voxels"] * voxel_ml}
        columns["mean"] = sums[group] / sums["voxels"]
        tables[group] = pd.DataFrame(columns).assign(share=sums[group] / sums[group].sum())
    table = pd.concat(tables, names=["group", "label"]).reset_index()
    inside = table[table["label"] > 0].groupby("group")
    return table.assign(rank=inside["mean"].rank(ascending=False, method="min"))
