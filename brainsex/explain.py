"""Maps of a cohort's held-out subjects, each by the network that did not see it, saved as NIfTI."""

import copy
import hashlib
import json
from collections.abc import Iterator, Sequence
from functools import cache, partial
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from nilearn.mass_univariate import permuted_ols
from scipy.ndimage import gaussian_filter
from torch import nn
from tqdm.auto import tqdm

from brainsex import networks, perturbation, saliency, storage
from brainsex.cohort import Cohort, digest
from brainsex.saliency import METHODS

CHUNK = 64  # subjects explained and saved at a time: what a killed run may lose


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
    methods, options : keys of `saliency.METHODS`, and options of theirs.
    rows : the subjects, by their place in the cohort; all by default.
    random_weights : explain networks with all layers drawn anew, into ``<method>-random/``.
    overwrite : delete the methods' maps in `out` first.

    Returns one row a subject, in the order of `rows`: Subject, sex, fold; and, where it has a mask,
    target, before, after and volume, as in `perturbation.Masks`. Raises FileNotFoundError without
    networks; ValueError for what does not fit them, or maps in `out` that were made otherwise.
    """
    networks_folder, out = Path(networks_folder), Path(out)
    rows = np.arange(len(cohort)) if rows is None else np.asarray(rows, int)
    folds, used = held_out_folds(networks_folder, cohort.subjects), _used_options(methods, options)
    if cohort.affine is None:
        raise ValueError("cohort has no affine to save maps with; pass cohort.load(…, affine=…)")
    files = [networks_folder / "folds.csv", *sorted(networks_folder.glob("fold-*.pt"))]
    checksum = hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()
    sources = {"networks": checksum[:16], "cohort": digest(cohort)[:16]}
    suffix, chunks = "-random" * random_weights, []
    for method, values in used.items():
        drawn = random_weights or METHODS[method].compute is None
        settings = sources | values | ({"seed": seed} if drawn else {})
        results = [f"{method}{suffix}/*"] + ["persistence/*"] * (method + suffix == "mask")
        options = {"overwrite": overwrite, "results": results}
        storage.start_run(out, f"explain {method}{suffix}", settings, **options)
        paths = (out / (method + suffix) / f"{name}.nii.gz" for name in cohort.subjects[rows])
        missing = rows[[not path.is_file() for path in paths]]
        for fold in np.unique(folds[missing]):
            left = missing[folds[missing] == fold]
            parts = np.array_split(left, range(CHUNK, len(left), CHUNK))
            chunks += [(method, fold, part) for part in parts]
    load_fold = cache(partial(fold_network, networks_folder, cohort=cohort))
    load_means = cache(partial(training_means, cohort, folds))
    for method, fold, chunk in tqdm(chunks, "explain", unit="chunk"):
        volumes, network = np.array(cohort.volumes[chunk]), load_fold(fold)
        settings = {"seed": seed, "progress": False, "subjects": cohort.subjects[chunk]}
        settings |= used[method] | {"target": perturbation.predicted_classes(network, volumes)}
        if METHODS[method].reference:
            inputs = load_means(fold), settings["target"], settings.get("sigma")
            settings["reference"] = saliency.reference_for(method, *inputs)
        if random_weights:
            *_, (_, network) = randomised_layers(network, seed=100 * seed + fold)
        _save_chunk(network, volumes, out / (method + suffix), cohort.affine, settings)
    table = pd.DataFrame({"Subject": cohort.subjects, "sex": cohort.sex, "fold": folds})
    return table.iloc[rows].join(_mask_records(table, out), on="Subject").reset_index(drop=True)


def _used_options(methods: Sequence[str], options: dict) -> dict[str, dict]:
    """Each method's options, with their defaults."""
    used = {method: METHODS[method].options for method in methods if method in METHODS}
    if unknown := {*methods, *options}.difference(METHODS, *used.values()):
        expected = f"methods among {', '.join(METHODS)}, and options of those"
        raise ValueError(f"expected {expected}, found {sorted(unknown)}.")
    for values in used.values():
        values |= {name: options[name] for name in values if name in options}
    return used


def _save_chunk(
    network: nn.Module, volumes: np.ndarray, folder: Path, affine: np.ndarray, settings: dict
) -> None:
    """Compute the maps (n, X, Y, Z) of the method that `folder` is named after, and save them."""
    if folder.name == "mask":
        masks = perturbation.optimise_masks(network, volumes, **settings)
        maps, records = masks.masks, masks.history.to_dict("records")
        for name, image, record in zip(settings["subjects"], masks.persistence, records):
            storage.write_nifti(folder.parent / "persistence" / f"{name}.nii.gz", image, affine)
            storage.write_text(folder / f"{name}.json", json.dumps(record) + "\n")
    else:
        maps = saliency.attribute(network, volumes, folder.name.removesuffix("-random"), **settings)
    for name, image in zip(settings["subjects"], maps):
        storage.write_nifti(folder / f"{name}.nii.gz", image, affine)


def _mask_records(table: pd.DataFrame, out: Path) -> pd.DataFrame:
    """Return the records of masks, by Subject; write them and the table as ``masks.csv``."""
    paths = sorted((out / "mask").glob("[!.]*.json"))
    names = pd.Index([path.stem for path in paths], dtype=str)
    records = pd.DataFrame(map(storage.read_json, paths), index=names)
    if len(records):
        masks = table.join(records, on="Subject", how="inner").sort_values("Subject")
        storage.write_text(out / "masks.csv", masks.to_csv(index=False))
    return records


def load_maps(out: str | Path, method: str, subjects: Sequence[str]) -> np.ndarray:
    """Load the maps (N, X, Y, Z) of a folder in `out`, as ``persistence`` or ``mask-random``."""
    paths = (Path(out) / method / f"{name}.nii.gz" for name in subjects)
    return np.stack([storage.load_volume(path)[0] for path in paths])


def t_map(
    volumes: np.ndarray,
    sex: np.ndarray,
    brain: np.ndarray,
    *,
    sigma: float = 1.0,
    confounds: np.ndarray | None = None,
) -> np.ndarray:
    """Test men against women voxel by voxel, by nilearn, in a linear model with confounds (N, K).

    Volumes (N, X, Y, Z) are tested under a Gaussian of `sigma` voxels in the `brain` (X, Y, Z).
    Raises ValueError for confounds that are not finite: leave out who has blanks.

    Returns t (X, Y, Z) float32, positive where men's values are higher, and 0 outside the brain and
    where all volumes are equal.
    """
    smooth = (gaussian_filter(volume, sigma, mode="nearest") for volume in volumes)
    values = np.array([volume[brain] for volume in smooth], np.float32)
    tested = permuted_ols(np.asarray(sex, float)[:, None], values, confounds, n_perm=0)
    t = np.zeros(brain.shape, np.float32)
    t[brain] = np.where(np.ptp(values, axis=0) > 0, tested["t"][0], 0)
    return t


def held_out_folds(networks_folder: str | Path, subjects: Sequence[str]) -> np.ndarray:
    """Return each subject's fold (N,): the K of the network ``fold-K.pt`` that did not see it.

    Raises FileNotFoundError without a ``folds.csv``, ValueError for a subject it does not know.
    """
    path = Path(networks_folder) / "folds.csv"
    with storage.reading(path, "a fold of every subject", "run notebook 04_cnn_3d again"):
        folds = pd.read_csv(path, dtype={"Subject": str}).set_index("Subject")["fold"]
        return folds[subjects].to_numpy()


def fold_network(networks_folder: str | Path, fold: int, cohort: Cohort) -> nn.Module:
    """Load a fold's network for the cohort's volumes; raises as `networks.load`."""
    return networks.load_network(f"{networks_folder}/fold-{fold}.pt", cohort.volumes.shape[1:])


def training_means(cohort: Cohort, folds: np.ndarray, fold: int) -> np.ndarray:
    """Average the women and the men (2, X, Y, Z) in training; there are some of both sexes."""
    groups = (np.flatnonzero((folds != fold) & (cohort.sex == sex)) for sex in (0, 1))
    means = (sum(cohort.volumes[row] / np.float32(len(rows)) for row in rows) for rows in groups)
    return np.stack([*means])


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
