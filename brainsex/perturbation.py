"""Meaningful perturbation: the smallest blurred-out region that makes the network change its mind.

After Fong and Vedaldi 2017, arXiv 1704.03296, in 3D. With a volume x, its Gaussian blur b, and a
saliency s in [0, 1] on a coarser grid, enlarged trilinearly to S, the network sees

    x' = x + S (b - x)

and s minimises

    relu(p(target | x') - floor) + ramp · (area · mean s + smoothness · mean |∇s|²).

Saliency is 1 where the evidence was removed, 0 where the volume was kept: Fong and Vedaldi's
1 - m. The settings were chosen by measurement against the published ones: tests/benchmarks.
"""

import copy
import gzip
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd
import torch
from joblib import Parallel, delayed
from scipy.ndimage import gaussian_filter1d
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm.auto import tqdm

from brainsex import networks, replacing
from brainsex.cohort import Cohort

RAMP, DECAY = 20, 30
"""Iterations over which the penalty grows to its full weight; after which the rate is cut."""
SURE = 10.0
"""Log-odds beyond which a network is searched at a temperature that brings it down to these: its
probability would no longer move with the mask, and the penalty alone would empty it."""
SHIFT = 1
"""Voxels by which the network's input is moved at most, at random, along each axis."""


@dataclass(frozen=True)
class Masks:
    """What was found for N volumes, in their order."""

    masks: np.ndarray
    """(N, X, Y, Z) float32 in [0, 1]: saliency, the very mask the network saw."""
    history: pd.DataFrame
    """One row a volume: target, the class whose evidence was removed; its probability before and
    after deletion, in float32 on the plain network; volume, the mean of the mask."""


def blurred(volumes: Tensor, sigma: float = 5.0) -> Tensor:
    """Volumes (N, 1, X, Y, Z) under a Gaussian of `sigma` voxels that reaches 4 sigma.

    Edges are replicated, and the weights sum to one: a constant stays what it is.
    """
    for axis in (2, 3, 4):
        weights = gaussian_filter1d(np.eye(volumes.shape[axis]), sigma, axis=0, mode="nearest")
        weights = torch.from_numpy(weights).to(volumes)
        volumes = torch.tensordot(volumes, weights, ([axis], [1])).movedim(-1, axis)
    return volumes


def _shifts(subject: str, seed: int, iterations: int) -> list[list[int]]:
    """A shift an iteration, in voxels along X, Y, Z, from the seed and the subject alone."""
    digest = hashlib.sha256(f"{seed}/{subject}".encode()).digest()
    generator = np.random.default_rng(int.from_bytes(digest[:8], "big"))
    return generator.integers(-SHIFT, SHIFT + 1, (iterations, 3)).tolist()


def _objective(
    probability: Tensor, coarse: Tensor, ramp: float, area: float, smoothness: float, floor: float
) -> Tensor:
    """The sum over volumes of what each one's saliency minimises."""
    variation = sum(coarse.diff(dim=axis).square().mean() for axis in (2, 3, 4))
    penalty = area * coarse.mean() + smoothness * variation
    return F.relu(probability - floor).sum() + ramp * penalty * len(coarse)


def _optimise(
    network: nn.Module,
    volumes: Tensor,
    target: Tensor,
    temperature: Tensor,
    shifts: list,
    *,
    lr: float,
    sigma: float,
    **weights,
) -> Tensor:
    """Masks (n, 1, X, Y, Z) of some volumes, each minimising its own objective."""
    sizes = volumes.shape[2:]
    removed = blurred(volumes, sigma) - volumes
    dtype = next(network.parameters()).dtype
    coarse = torch.full(
        (len(volumes), 1, *(-(-size // 2) for size in sizes)), 0.5, device=volumes.device
    ).requires_grad_()
    optimiser = torch.optim.Adam([coarse], lr, betas=(0.9, 0.99), amsgrad=True)
    schedule = torch.optim.lr_scheduler.StepLR(optimiser, DECAY)
    for iteration, moves in enumerate(zip(*shifts), 1):
        seen = volumes + F.interpolate(coarse, size=sizes, mode="trilinear") * removed
        seen = torch.stack([one.roll(move, (1, 2, 3)) for one, move in zip(seen, moves)])
        logits = network(seen.to(dtype, memory_format=torch.channels_last_3d)).float()
        probability = (logits / temperature[:, None]).softmax(1).gather(1, target[:, None])
        loss = _objective(probability, coarse, min(1.0, iteration / RAMP), **weights)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
        with torch.no_grad():
            coarse.clamp_(0, 1)
    return F.interpolate(coarse.detach(), size=sizes, mode="trilinear").clamp_(0, 1)  # rounding


def optimise_masks(
    network: nn.Module,
    volumes: np.ndarray,
    *,
    target: int | np.ndarray | None = None,
    subjects: Sequence[str] | None = None,
    seed: int = 0,
    iterations: int = 40,
    lr: float = 0.3,
    area: float = 30.0,
    smoothness: float = 3.0,
    floor: float = 0.05,
    sigma: float = 5.0,
    progress: bool = True,
) -> Masks:
    """Learn, for each volume, the smallest mask whose blurring-out removes the network's evidence.

    Parameters
    ----------
    network : `MriNet3d`; a copy is folded and run in the machine's fast precision, the network
        itself is left as it is.
    volumes : (N, X, Y, Z) finite floats, FA in [0, 1].
    target : class whose evidence is removed, for all or (N,); by default the class predicted.
    subjects : (N,) names that seed each volume's draws; by default its number, "0", "1", …
    seed : of the random shifts.
    iterations, lr : steps and rate of Adam; the rate falls to a tenth after 30 steps.
    area, smoothness : weights of the mask's mean and of its squared gradient.
    floor : probability below which there is nothing more to remove.
    sigma : of the Gaussian reference, in voxels.

    Returns
    -------
    Masks. Neither order nor company of a volume changes its mask; on a CPU not by a bit.

    Raises
    ------
    ValueError
        Volumes of another shape than the network's or not finite, a target that is no class, or
        another number of targets or subjects than of volumes.
    """
    device = networks.device()
    plain = copy.deepcopy(network).eval().requires_grad_(False).to(device)
    fast = networks.folded(network).to(
        device, networks.precision(device), memory_format=torch.channels_last_3d
    )
    subjects = [str(n) for n in range(len(volumes))] if subjects is None else subjects
    if volumes.ndim != 4 or len(subjects) != len(volumes):
        raise ValueError(
            f"expected volumes (N, X, Y, Z) and N subjects, found {volumes.shape} and "
            f"{len(subjects)}."
        )
    if target is not None:
        if np.shape(target) not in ((), (len(volumes),)) or not np.isin(target, (0, 1)).all():
            raise ValueError(
                f"expected a target of 0 or 1, or one for each of {len(volumes)} volumes, "
                f"found {target}."
            )
        target = np.broadcast_to(target, len(volumes))

    def some(rows: slice) -> tuple[np.ndarray, list]:
        batch = np.array(volumes[rows], np.float32)
        finite = np.isfinite(batch).all((1, 2, 3))
        if not finite.all():
            name = subjects[rows][finite.argmin()]
            raise ValueError(f"the volume of subject {name} holds NaN or infinity, not finite FA.")
        batch = torch.from_numpy(batch)[:, None].to(device)
        with torch.no_grad():
            logits = plain(batch)
        before, chosen = logits.softmax(1), logits.argmax(1)
        temperature = (logits.diff(dim=1)[:, 0].abs() / SURE).clamp(min=1)
        if target is not None:
            chosen = torch.as_tensor(target[rows].copy(), dtype=torch.long, device=device)
        shifts = [_shifts(name, seed, iterations) for name in subjects[rows]]
        weights = {"area": area, "smoothness": smoothness, "floor": floor}
        found = _optimise(fast, batch, chosen, temperature, shifts, lr=lr, sigma=sigma, **weights)
        with torch.no_grad():
            after = plain(batch + found * (blurred(batch, sigma) - batch)).softmax(1)
        columns = (
            chosen,
            before.gather(1, chosen[:, None])[:, 0],
            after.gather(1, chosen[:, None])[:, 0],
            found.mean((1, 2, 3, 4)),
        )
        return found[:, 0].cpu().numpy(), list(zip(*(column.tolist() for column in columns)))

    size = 32 if device.type == "cuda" else 1
    slices = [slice(start, start + size) for start in range(0, len(volumes), size)]
    masks, history = np.empty(volumes.shape, np.float32), []
    with (
        networks.one_thread_each(device) as workers,
        tqdm(total=len(volumes), desc="masks", unit="subject", disable=not progress) as bar,
    ):
        done = Parallel(workers, require="sharedmem", return_as="generator")(
            delayed(some)(rows) for rows in slices
        )
        for (found, records), where in zip(done, slices):
            masks[where] = found
            history += records
            bar.update(len(found))
    return Masks(masks, pd.DataFrame(history, columns=["target", "before", "after", "volume"]))


def mask_cohort(
    cohort: Cohort,
    networks_folder: str | Path,
    out: str | Path,
    *,
    rows: Sequence[int] | None = None,
    **settings,
) -> pd.DataFrame:
    """Masks of held-out subjects, each by the network that did not see it, saved one by one.

    Parameters
    ----------
    cohort : with an affine.
    networks_folder : ``fold-K.pt`` and ``folds.csv``, as `training.cross_validate` leaves them.
    out : gets ``<ID>.nii.gz``, the masks in the cohort's space, and ``masks.csv``. What is there
        of the same networks and settings is kept: an interrupted run goes on.
    rows : which subjects, by their place in the cohort; all by default.
    settings : of `optimise_masks`.

    Returns
    -------
    One row a subject, in the order of `rows`: Subject, sex, fold, target, before, after, volume.

    Raises
    ------
    FileNotFoundError
        No networks there: run notebook 04.
    ValueError
        The cohort has no affine, or a subject that ``folds.csv`` does not know.
    """
    networks_folder, out = Path(networks_folder), Path(out)
    if cohort.affine is None:
        raise ValueError("the cohort has no affine: masks would lie nowhere. Give cohort.load one.")
    if not (networks_folder / "folds.csv").is_file():
        raise FileNotFoundError(f"{networks_folder}: no folds.csv. Run notebook 04_cnn_3d first.")
    folds = pd.read_csv(networks_folder / "folds.csv", dtype={"Subject": str})
    folds = folds.set_index("Subject")["fold"]
    rows = np.arange(len(cohort)) if rows is None else np.asarray(rows)
    subjects = cohort.subjects[rows]
    if unknown := sorted(set(subjects) - set(folds.index)):
        raise ValueError(f"{networks_folder}: folds.csv does not know {', '.join(unknown[:10])}.")
    held_out = folds[subjects].to_numpy()
    record = out / "masks.csv"
    done = pd.read_csv(record, dtype={"Subject": str}) if record.is_file() else pd.DataFrame()
    bar = tqdm(total=len(rows), desc="masks", unit="subject")
    for fold in np.unique(held_out):
        path = networks_folder / f"fold-{fold}.pt"
        network = networks.load(path, cohort.volumes.shape[1:])
        key = hashlib.sha256(path.read_bytes() + repr(sorted(settings.items())).encode())
        key = key.hexdigest()[:16]
        same = done[done["key"] == key]["Subject"] if len(done) else []
        here = rows[(held_out == fold) & ~np.isin(subjects, list(same))]
        bar.update((held_out == fold).sum() - len(here))
        for some in np.array_split(here, -(-len(here) // 64)) if len(here) else []:
            names = cohort.subjects[some]
            found = optimise_masks(
                network, cohort.volumes[some], subjects=names, progress=False, **settings
            )
            for name, mask in zip(names, found.masks):
                image = nib.Nifti1Image(mask, cohort.affine)
                with replacing(out / f"{name}.nii.gz") as path:
                    path.write_bytes(gzip.compress(image.to_bytes(), mtime=0))
            more = found.history.assign(Subject=names, sex=cohort.sex[some], fold=fold, key=key)
            done = pd.concat([done, more]).drop_duplicates("Subject", keep="last")
            with replacing(record) as path:
                done.to_csv(path, index=False)
            bar.update(len(some))
    bar.close()
    columns = ["sex", "fold", "target", "before", "after", "volume"]
    return done.set_index("Subject").loc[subjects, columns].reset_index()
