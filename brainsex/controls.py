"""What explanations are held to: random weights, random regions, learning without a region."""

import copy
import json
import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from pathlib import Path

import joblib
import numpy as np
import pandas as pd
import torch
from scipy.ndimage import distance_transform_edt, gaussian_filter
from torch import nn
from tqdm.auto import tqdm

from brainsex import evaluation, networks, read_record, runs, training, write
from brainsex.cohort import Cohort, Rows, fingerprint
from brainsex.group_masks import group_mask
from brainsex.measures import top
from brainsex.saliency import smoothed


def randomised(network: nn.Module, *, seed: int = 0) -> Iterator[tuple[str, nn.Module]]:
    """The network with its layers drawn anew one after the other, from the last to the first.

    The cascading randomisation of Adebayo et al. 2018, arXiv 1810.03292: an explanation of what was
    learnt has to change on the way. Weights are drawn as before training; batch norm forgets too.

    Yields
    ------
    name of the layer just drawn, and a copy of the network.
    """
    network = copy.deepcopy(network).eval()
    layers = [(n, m) for n, m in network.named_modules() if hasattr(m, "reset_parameters")]
    for number, (name, module) in enumerate(reversed(layers)):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1000 * seed + number)
            module.reset_parameters()
        yield name, copy.deepcopy(network)


def random_map(shape: tuple[int, int, int], *, seed: int = 0) -> np.ndarray:
    """Smooth noise (X, Y, Z): a map that knows nothing."""
    return gaussian_filter(np.random.default_rng(seed).standard_normal(shape), 2.0)


def random_region(brain: np.ndarray, voxels: int, *, seed: int = 0) -> np.ndarray:
    """So many voxels of the brain in smooth random blobs: a mask's equal in volume."""
    return top(random_map(brain.shape, seed=seed), brain, voxels)


class Masked:
    """Volumes (N, X, Y, Z) in which a region is the same in everybody, read when asked for."""

    def __init__(self, volumes: np.ndarray, gone: np.ndarray, image: np.ndarray):
        self.volumes, self.gone, self.image, self.shape = volumes, gone, image, volumes.shape

    def __len__(self) -> int:
        return len(self.volumes)

    def __getitem__(self, rows) -> np.ndarray:
        return np.where(self.gone, self.image, self.volumes[rows])


def retrained(
    volumes: np.ndarray,
    sex: np.ndarray,
    held_out: np.ndarray,
    gone: np.ndarray,
    make_network: Callable[[], nn.Module],
    *,
    seed: int = 0,
    **settings,
) -> int:
    """How many held-out subjects a network gets right that learns, and sees them, without a region.

    Remove-and-retrain (Hooker et al. 2019, arXiv 1806.10758) with one region for everybody; of
    the complement of a mask it is the study's experiment, a network that sees only what a mask
    leaves. In the region every volume is the training subjects' mean, which tells nobody apart.

    Parameters
    ----------
    volumes : (N, X, Y, Z).
    sex : (N,).
    held_out : (N,) bool, on whom it is judged; the region comes from the others.
    gone : (X, Y, Z) bool, what is removed.
    make_network : called under `torch.manual_seed`.
    settings : of `training.fit`.
    """
    train, test = np.flatnonzero(~held_out), np.flatnonzero(held_out)
    mean = sum(np.asarray(volumes[row], np.float64) / len(train) for row in train)
    masked = Masked(volumes, gone, mean.astype(np.float32))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = make_network()
    training.fit(network, Rows(masked, train), sex[train], seed=seed, **settings)
    return int((training.predict(network, Rows(masked, test)).argmax(1) == sex[test]).sum())


def regions(
    cohort: Cohort,
    network: nn.Module,
    held_out: np.ndarray,
    brain: np.ndarray,
    *,
    planted: np.ndarray | None = None,
    share: float = 0.02,
    randoms: int = 3,
    iterations: int = 60,
    seed: int = 0,
) -> dict[str, np.ndarray]:
    """Regions (X, Y, Z) bool of equal volume for `removal`: of masks, planted, and random.

    Group masks are of the training subjects, those not in `held_out` (N,) bool: of men, of women
    and of both. Beside them stand the planted regions, where known, filled up by what is next to
    them, and random blobs. A mask is smoothed, which fills gaps and adds a rim; one that is itself
    positive in less than half of the voxels asked for would be rim for the most part: it is left
    out, with a warning.
    """
    voxels, found = round(share * np.count_nonzero(brain)), {}
    for name, sexes in (("men", (1,)), ("women", (0,)), ("both", (0, 1))):
        train = np.flatnonzero(~held_out & np.isin(cohort.sex, sexes))
        options = {"target": cohort.sex[train], "iterations": iterations, "seed": seed}
        mask = group_mask(network, Rows(cohort.volumes, train), **options)
        if (count := np.count_nonzero(mask[brain] > 0)) < voxels / 2:
            warnings.warn(
                f"group mask of {name}: expected {voxels} voxels or half of them, found {count}. "
                "It is left out. For a smaller region lower share.",
                stacklevel=2,
            )
        else:
            found[f"group mask of {name}"] = top(smoothed(mask[None], 1.0)[0], brain, voxels)
    if planted is not None:
        near = -distance_transform_edt(~planted)
        found["planted regions"] = top(near, brain, voxels)
    for number in range(randoms):
        found[f"random {number + 1}"] = random_region(brain, voxels, seed=seed + number)
    return found


def removal(
    cohort: Cohort,
    regions: Mapping[str, np.ndarray],
    held_out: np.ndarray,
    make_network: Callable[[], nn.Module],
    *,
    out: str | Path | None = None,
    seed: int = 0,
    **settings,
) -> pd.DataFrame:
    """Accuracy on held-out subjects of networks that learn without each region, or from it alone.

    On a CPU as many networks as there are cores are trained at once, each in a process of its own.

    Parameters
    ----------
    regions : name -> (X, Y, Z) bool.
    out : folder for a small JSON a network, named by a key of its data and settings. What is
        finished there is kept: an interrupted run goes on with the other networks.
    held_out, make_network, settings : as in `retrained`.

    Returns
    -------
    One row a region and what is left, sees ("all but the region", "the region alone"): region, n,
    accuracy, low, high (Wilson, 95 %: of subjects, for this one network).
    """
    jobs = [
        (name, sees, gone)
        for name, region in regions.items()
        for sees, gone in (("all but the region", region), ("the region alone", ~region))
    ]
    paths = [None] * len(jobs)
    if out is not None:
        key = _key(cohort, held_out, make_network, seed, settings)
        paths = [Path(out) / f"{joblib.hash((key, gone))}.json" for *_, gone in jobs]
    n, rows = int(held_out.sum()), []
    with nullcontext() if out is None else runs.alone(out):
        right = joblib.Parallel(networks.workers(), return_as="generator")(
            joblib.delayed(_kept)(
                *(os.getpid(), path, {"region": name, "sees": sees}),
                *(cohort.volumes, cohort.sex, held_out, gone, make_network),
                seed=seed,
                progress=False,
                **settings,
            )
            for path, (name, sees, gone) in zip(paths, jobs)
        )
        bar = tqdm(right, "networks trained anew", total=len(jobs), unit="network")
        for (name, sees, _), count in zip(jobs, bar):
            low, high = evaluation.wilson(count, n)
            row = {"region": name, "sees": sees, "n": n, "accuracy": count / n}
            rows.append({**row, "low": low, "high": high})
    return pd.DataFrame(rows)


def _key(cohort: Cohort, held_out, make_network, seed: int, settings: dict) -> str:
    """A digest of all that a network trained anew depends on, but for the region."""
    with torch.random.fork_rng(devices=[]):
        network = str(make_network())
    how = network, networks.precision(networks.device()), seed, sorted(settings.items())
    digest = fingerprint(cohort.subjects, cohort.sex, cohort.volumes)
    return joblib.hash((digest, held_out, repr(how)))


def _kept(parent: int, path: Path | None, record: dict, *data, **settings) -> int:
    """What `retrained` counts, read from the path if it is there, else written there."""
    runs.follow(parent)
    if path is not None and path.is_file():
        return read_record(path)["right"]
    right = retrained(*data, **settings)
    if path is not None:
        write(path, json.dumps({**record, "right": right}))
    return right
