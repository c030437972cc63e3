"""Maps of a cohort's held-out subjects, each by the network that did not see it, saved as NIfTI."""

import copy
import gzip
import hashlib
import json
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd
import torch
from nilearn.maskers import NiftiMasker
from nilearn.mass_univariate import permuted_ols
from scipy.ndimage import gaussian_filter
from torch import nn
from tqdm.auto import tqdm

from brainsex import networks, perturbation, saliency, storage, tables
from brainsex.cohort import Cohort, VolumeRows, digest
from brainsex.saliency import METHODS
from brainsex.volumes import load_volume

CHUNK = 64  # subjects explained and saved at a time: what a killed run may lose
PERMUTATION_JOBS = 4  # processes of a permutation test on any machine: its draws depend on them
GROUP_MASKS = {  # names of the maps of `explain_groups`, and their folders
    "group mask (blur)": "group-blur",
    "group mask (other sex's mean)": "group-other",
    "group mask (other sex's mean), random weights": "group-other-random",
}
T_MAPS = {"t map": "t", "t map (brain volume out)": "t-volume-out", "corrected p": "t-corrected"}


def explain(
    cohort: Cohort,
    networks_folder: str | Path,
    out: str | Path,
    methods: Sequence[str] = ("mask",),
    *,
    rows: Sequence[int] | None = None,
    random_weights: bool = False,
    seed: int = 0,
    overwrite: bool = False,
    **options: object,
) -> pd.DataFrame:
    """Explain held-out subjects, each by the network that did not see it, and save map by map.

    The class explained is the one that this network predicts. Maps that are there are kept, so an
    interrupted run goes on.

    Parameters
    ----------
    networks_folder : ``fold-K.pt`` and ``folds.csv``, as `training.cross_validate` leaves them.
    out : gets ``<method>/<ID>.nii.gz``, in the cohort's space. Those of ``mask`` are the masks;
        ``persistence/<ID>.nii.gz`` and ``masks.csv`` come beside them.
    methods, options : keys of `saliency.METHODS`, and what their `Method.options` list.
    rows : the subjects, by their place in the cohort; all by default.
    random_weights : explain networks with all layers drawn anew, into ``<method>-random/``.
    overwrite : delete the methods' maps in `out` first.

    Returns
    -------
    One row a subject, in the order of `rows`: Subject, sex, fold; and, where it has a mask,
    target, before, after and volume, as in `perturbation.Masks`.

    Raises FileNotFoundError without networks; ValueError for a cohort without affine, subjects that
    ``folds.csv`` does not know, an option of no method, or maps in `out` that were made otherwise.
    """
    networks_folder, out = Path(networks_folder), Path(out)
    rows = np.arange(len(cohort)) if rows is None else np.asarray(rows, int)
    folds, used = held_out_folds(networks_folder, cohort.subjects), _used_options(methods, options)
    sources, suffix = _sources(cohort, networks_folder), "-random" * random_weights
    for method, values in used.items():
        drawn = random_weights or METHODS[method].compute is None or "samples" in values
        draws = {"seed": seed} if drawn else {}
        results = [f"{method}{suffix}/*"] + ["persistence/*"] * (method + suffix == "mask")
        settings = {"overwrite": overwrite, "results": results}
        storage.start_run(out, f"explain {method}{suffix}", sources | values | draws, **settings)
    with tqdm(total=len(used) * len(rows), desc="explain", unit="map") as bar:
        for fold in np.unique(folds[rows]):
            network = explained = fold_network(networks_folder, fold, cohort)
            if random_weights:
                *_, (_, explained) = randomised_layers(network, seed=100 * seed + fold)
            needed = any(METHODS[method].needs_means for method in used)
            means = training_means(cohort, folds, fold) if needed else None
            for method, values in used.items():
                folder, fold_rows = out / (method + suffix), rows[folds[rows] == fold]
                paths = [folder / f"{name}.nii.gz" for name in cohort.subjects[fold_rows]]
                missing = fold_rows[[not path.is_file() for path in paths]]
                bar.update(len(paths) - len(missing))
                for start in range(0, len(missing), CHUNK):
                    chunk = missing[start : start + CHUNK]
                    volumes = np.array(cohort.volumes[chunk])
                    target = saliency.predicted_classes(network, volumes)
                    settings = {"target": target, "seed": seed, "progress": False} | values
                    settings["subjects"], sigma = cohort.subjects[chunk], values.get("sigma")
                    settings["reference"] = saliency.reference_for(method, means, target, sigma)
                    _save_chunk(explained, volumes, folder, cohort.affine, settings)
                    bar.update(len(chunk))
    table = pd.DataFrame({"Subject": cohort.subjects, "sex": cohort.sex, "fold": folds})
    return table.iloc[rows].join(_mask_records(table, out), on="Subject").reset_index(drop=True)


def _used_options(methods: Sequence[str], options: dict) -> dict[str, dict]:
    """Each method's options, with their defaults."""
    if unknown := set(methods) - set(METHODS):
        raise ValueError(f"expected methods among {', '.join(METHODS)}, found {sorted(unknown)}.")
    used = {method: METHODS[method].options for method in methods}
    if unknown := set(options).difference(*used.values()):
        raise ValueError(f"expected options of {', '.join(methods)}, found {sorted(unknown)}.")
    for values in used.values():
        values |= {name: options[name] for name in values if name in options}
    return used


def _sources(cohort: Cohort, networks_folder: Path) -> dict[str, str]:
    """Digests of the cohort and of the networks, for the run's record."""
    if cohort.affine is None:
        raise ValueError("cohort has no affine to save maps with; pass cohort.load(…, affine=…)")
    checksum = hashlib.sha256((networks_folder / "folds.csv").read_bytes())
    for path in sorted(networks_folder.glob("fold-*.pt")):
        checksum.update(path.read_bytes())
    return {"networks": checksum.hexdigest()[:16], "cohort": digest(cohort)[:16]}


def _save_chunk(
    network: nn.Module, volumes: np.ndarray, folder: Path, affine: np.ndarray, settings: dict
) -> None:
    """Compute the maps (n, X, Y, Z) of the method that `folder` is named after, and save them."""
    if folder.name == "mask":
        masks = perturbation.optimise_masks(network, volumes, **settings)
        maps, records = masks.masks, masks.history.to_dict("records")
        for name, image, record in zip(settings["subjects"], masks.persistence, records):
            save_map(folder.parent / "persistence" / f"{name}.nii.gz", image, affine)
            storage.write_text(folder / f"{name}.json", json.dumps(record) + "\n")
    else:
        method = folder.name.removesuffix("-random")
        maps = saliency.attribute(network, volumes, method, **settings)
    for name, image in zip(settings["subjects"], maps):
        save_map(folder / f"{name}.nii.gz", image, affine)


def _mask_records(table: pd.DataFrame, out: Path) -> pd.DataFrame:
    """Return the records of masks, by Subject; write them and the table as ``masks.csv``."""
    paths = {name: out / "mask" / f"{name}.json" for name in table["Subject"]}
    records = {name: storage.read_json(path) for name, path in paths.items() if path.is_file()}
    records = pd.DataFrame(records.values(), index=pd.Index(list(records), dtype=str))
    if len(records):
        masks = table.join(records, on="Subject", how="inner").sort_values("Subject")
        with suppress(FileNotFoundError):  # another process of the run writes it, too
            storage.write_text(out / "masks.csv", masks.to_csv(index=False))
    return records


def save_map(path: str | Path, image: np.ndarray, affine: np.ndarray) -> None:
    """Write a map (X, Y, Z) as compressed NIfTI: the same bytes whenever it is written."""
    with storage.atomic_path(path) as partial:
        partial.write_bytes(gzip.compress(nib.Nifti1Image(image, affine).to_bytes(), 1, mtime=0))


def load_maps(out: str | Path, method: str, subjects: Sequence[str]) -> np.ndarray:
    """Load the maps (N, X, Y, Z) of a folder in `out`, as ``persistence`` or ``mask-random``."""
    return np.stack([load_volume(Path(out) / method / f"{name}.nii.gz")[0] for name in subjects])


def explain_groups(
    cohort: Cohort,
    networks_folder: str | Path,
    out: str | Path,
    folds: Sequence[int],
    brain: np.ndarray,
    *,
    sigma: float = 1.0,
    iterations: int = 60,
    permutations: int = 100,
    tfce: bool = False,
    seed: int = 0,
    overwrite: bool = False,
) -> dict[str, np.ndarray]:
    """Map men and women at once: group masks, and the voxelwise t test beside them.

    A fold's masks are of its held-out subjects and their sexes, its t maps of its training
    subjects; the corrected p is of the first fold's, with brain volume out where it is known.

    Parameters
    ----------
    folds : the folds explained; a map is their mean.
    brain, sigma, permutations, tfce : as in `t_map`.
    cohort, networks_folder, out, seed, overwrite : as in `explain`, as is what is raised.

    Returns
    -------
    Name -> (X, Y, Z): `GROUP_MASKS`, and `T_MAPS` with the magnitude of t.
    """
    networks_folder, out, names = Path(networks_folder), Path(out), GROUP_MASKS | T_MAPS
    settings = _sources(cohort, networks_folder) | {"iterations": iterations, "seed": seed}
    settings |= {"sigma": sigma, "permutations": permutations, "tfce": tfce, "first": int(folds[0])}
    settings["brain"] = hashlib.sha256(np.packbits(brain)).hexdigest()[:16]
    results = [f"{folder}/*" for folder in names.values()]
    storage.start_run(out, "explain groups", settings, overwrite=overwrite, results=results)
    if "brain_volume_ml" not in cohort.table:
        names.pop("t map (brain volume out)")
    maps = {}
    for name, folder in names.items():
        for fold in folds[:1] if name == "corrected p" else folds:
            path = out / folder / f"fold-{fold}.nii.gz"
            if not path.is_file():
                image = _group_map(cohort, networks_folder, fold, brain, name, settings)
                save_map(path, image, cohort.affine)
            maps.setdefault(name, []).append(load_volume(path)[0])
    return {name: np.mean(images, axis=0) for name, images in maps.items()}


def _group_map(
    cohort: Cohort, networks_folder: Path, fold: int, brain: np.ndarray, name: str, settings: dict
) -> np.ndarray:
    """Compute a fold's group map (X, Y, Z) by its name."""
    folds, seed = held_out_folds(networks_folder, cohort.subjects), settings["seed"]
    rows = np.flatnonzero((folds == fold) == (name in GROUP_MASKS))
    volumes, sex = VolumeRows(cohort.volumes, rows), cohort.sex[rows]
    if name in GROUP_MASKS:
        network, options = fold_network(networks_folder, fold, cohort), {"target": sex}
        if "random weights" in name:
            *_, (_, network) = randomised_layers(network, seed=100 * seed + fold)
        if "other sex" in name:
            options["reference"] = training_means(cohort, folds, fold)[1 - sex]
        options |= {"iterations": settings["iterations"], "seed": seed}
        return perturbation.optimise_group_mask(network, volumes, **options)
    options = {"sigma": settings["sigma"]}
    if name != "t map" and "brain_volume_ml" in cohort.table:
        options["confounds"] = cohort.table["brain_volume_ml"].to_numpy()[rows]
    if name != "corrected p":
        return np.abs(t_map(volumes, sex, brain, **options)[0])
    options |= {key: settings[key] for key in ("permutations", "tfce", "seed")}
    return t_map(volumes, sex, brain, affine=cohort.affine, **options)[1]


def t_map(
    volumes: np.ndarray,
    sex: np.ndarray,
    brain: np.ndarray,
    *,
    sigma: float = 1.0,
    confounds: np.ndarray | None = None,
    permutations: int = 0,
    tfce: bool = False,
    affine: np.ndarray | None = None,
    seed: int = 0,
) -> tuple[np.ndarray, np.ndarray]:
    """Test men against women voxel by voxel, by nilearn, in a linear model with confounds.

    `volumes` (N, X, Y, Z) are tested under a Gaussian of `sigma` voxels in the `brain` (X, Y, Z);
    `confounds` are (N,) or (N, K). With `permutations`, p is corrected over the brain by the
    largest t or, with `tfce`, the largest threshold-free enhanced t (Smith and Nichols 2009,
    NeuroImage 44:83) at the `affine` (4, 4). Relatives are not exchangeable, as it takes them for.
    Raises ValueError for volumes or confounds that are not finite.

    Returns
    -------
    t, positive where men's values are higher, and minus log10 of the corrected two-sided p, 0
    without permutations: (X, Y, Z) float32, 0 outside the brain and where all volumes are the same.
    """
    values = np.empty((len(volumes), np.count_nonzero(brain)), np.float32)
    for row in range(len(volumes)):
        values[row] = gaussian_filter(np.asarray(volumes[row]), sigma, mode="nearest")[brain]
        if not np.isfinite(values[row]).all():
            raise ValueError(f"volume {row} holds NaN or infinity, not finite FA.")
    if confounds is not None:
        confounds = np.asarray(confounds, float).reshape(len(sex), -1)
        if blank := np.count_nonzero(~np.isfinite(confounds)):
            raise ValueError(f"expected confounds without blanks, found {blank}; leave those out.")
    masker = NiftiMasker(nib.Nifti1Image(brain.astype(np.uint8), affine)).fit() if tfce else None
    options = {"n_perm": permutations, "random_state": seed, "tfce": tfce, "masker": masker}
    options["n_jobs"] = PERMUTATION_JOBS if permutations else 1
    statistics = permuted_ols(np.asarray(sex, float)[:, None], values, confounds, **options)
    maps = np.zeros((2, *brain.shape), np.float32)
    varies = np.ptp(values, axis=0) > 0
    maps[0][brain] = np.where(varies, statistics["t"][0], 0)
    if permutations:
        maps[1][brain] = varies * statistics["logp_max_tfce" if tfce else "logp_max_t"][0]
    return tuple(maps)


def held_out_folds(networks_folder: str | Path, subjects: Sequence[str]) -> np.ndarray:
    """Return each subject's fold (N,): the K of the network ``fold-K.pt`` that did not see it.

    Raises FileNotFoundError without a ``folds.csv``, ValueError for a subject it does not know.
    """
    path = Path(networks_folder) / "folds.csv"
    if not path.is_file():
        raise FileNotFoundError(f"{networks_folder}: no folds.csv. Run notebook 04_cnn_3d first.")
    folds = tables.read_folds(path)
    if unknown := sorted(set(subjects) - set(folds.index)):
        raise ValueError(f"{networks_folder}: folds.csv does not know {', '.join(unknown[:10])}.")
    return folds[subjects].to_numpy()


def fold_network(networks_folder: str | Path, fold: int, cohort: Cohort) -> nn.Module:
    """Load a fold's network for the cohort's volumes; raises as `networks.load`."""
    path = Path(networks_folder) / f"fold-{fold}.pt"
    return networks.load_network(path, cohort.volumes.shape[1:])


def training_means(cohort: Cohort, folds: np.ndarray, fold: int) -> np.ndarray:
    """Average the women and the men (2, X, Y, Z) in training; ValueError if there are none."""
    means = np.zeros((2, *cohort.volumes.shape[1:]), np.float32)
    for sex, mean in enumerate(means):
        rows = np.flatnonzero((folds != fold) & (cohort.sex == sex))
        if len(rows) == 0:
            raise ValueError(f"fold {fold}: no {('women', 'men')[sex]} among training subjects.")
        for row in rows:
            mean += cohort.volumes[row] / len(rows)
    return means


def randomised_layers(network: nn.Module, *, seed: int = 0) -> Iterator[tuple[str, nn.Module]]:
    """Yield copies of a network whose layers are drawn anew one by one, from the last to the first.

    The cascading randomisation of Adebayo et al. 2018, arXiv 1810.03292. Weights are drawn as
    before training, batch norm forgets too. With a copy comes the name of the layer just drawn.
    """
    network = copy.deepcopy(network).eval()
    layers = [(n, m) for n, m in network.named_modules() if hasattr(m, "reset_parameters")]
    for number, (name, module) in enumerate(reversed(layers)):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1000 * seed + number)
            module.reset_parameters()
        yield name, copy.deepcopy(network)
