"""Meaningful perturbation: the smallest blurred-out region that makes the network change its mind.

After Fong and Vedaldi 2017, arXiv 1704.03296, in 3D. With a volume x, its Gaussian blur b, and a
saliency s in [0, 1] on a coarser grid, enlarged trilinearly to S, the network sees

    x' = x + S (b - x)

and, with l the log-odds of the target, s minimises

    weight · relu(l(x') - floor) / (l(x) - floor)
    + ramp · (area · mean s + smoothness · mean |∇s|²).

The published objective has the probability in place of the log-odds. But a network that is sure of
itself has a probability that no longer moves, with the volume or with its blur: log-odds do. The
weight is a volume's own: it grows for as long as its target stays above the floor.

Saliency is 1 where the evidence was removed, 0 where the volume was kept: Fong and Vedaldi's
1 - m. The settings were chosen by measurement against the published ones: tests/benchmarks.

A mask is 0 or 1 nearly everywhere, and does not say which of its voxels the network needs most. Its
persistence does: the mean of the masks on the way, in which what is removed first and kept to the
end is highest. It costs nothing, and deletes and localises single subjects better (notebook 07).

The blur is itself evidence: most networks take a blurred brain for one sex, whoever's it was. Any
image may stand for b. With the other sex's mean the mask says what would have to change for the
network to see that sex; but that reference brings the difference of the groups in with it, and only
the same with a network of random weights tells what the network adds.
"""

import copy
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from scipy.ndimage import gaussian_filter1d
from torch import Tensor, nn
from torch.nn import functional as F

from brainsex import networks, seeded

WARM, RAMP, DECAY = 10, 20, 40
"""Iterations after which masks count for persistence; over which the penalty grows to its full
weight; after which the rate is cut."""
LR, SMOOTHNESS, FLOOR = 0.3, 3.0, 0.02
"""Rate of Adam; weight of the squared gradient; probability at which nothing is left to remove."""
SURE = 10.0
"""Log-odds beyond which the floor lies as many times lower: there, a hair's breadth decides."""
GROWTH = 1.2
"""By which a volume's weight grows each iteration after the ramp that its target is above floor."""
SHIFT = 1
"""Voxels by which the network's input is moved at most, at random, along each axis."""


@dataclass(frozen=True)
class Masks:
    """What was found for N volumes, in their order."""

    masks: np.ndarray
    """(N, X, Y, Z) float32 in [0, 1]: saliency, the very mask the network saw."""
    persistence: np.ndarray
    """(N, X, Y, Z) float32 in [0, 1]: the mean mask on the way there. It ranks voxels."""
    history: pd.DataFrame
    """One row a volume: target, the class whose evidence was removed; its probability before and
    after deletion, in float32; volume, the mean of the mask."""


def blurred(volumes: Tensor, sigma: float = 5.0) -> Tensor:
    """Volumes (N, 1, X, Y, Z) under a Gaussian of `sigma` voxels that reaches 4 sigma.

    Edges are replicated, and the weights sum to one: a constant stays what it is.
    """
    for axis in (2, 3, 4):
        weights = gaussian_filter1d(np.eye(volumes.shape[axis]), sigma, axis=0, mode="nearest")
        weights = torch.from_numpy(weights).to(volumes)
        volumes = torch.tensordot(volumes, weights, ([axis], [1])).movedim(-1, axis)
    return volumes


def _optimise(
    network: nn.Module,
    volumes: Tensor,
    removed: Tensor,
    target: Tensor,
    log_odds: Tensor,
    shifts: np.ndarray,
    area: float,
) -> tuple[Tensor, Tensor]:
    """Masks (n, 1, X, Y, Z) of some volumes and their persistence, each of its own objective.

    `removed`, of the volumes' shape, is what a mask of 1 adds: the reference minus the volumes.
    `shifts` (n, iterations, 3) are in voxels.
    """
    lowest, scale = goal(log_odds)
    weight = torch.ones_like(scale)

    def evidence(coarse: Tensor, iteration: int, moves: Sequence) -> Tensor:
        nonlocal weight
        above = F.relu(seen(network, volumes, coarse, removed, target, moves) - lowest)
        if iteration >= RAMP:
            weight = torch.where(above > 0, GROWTH * weight, weight).detach()
        return weight * above / scale

    return descend(evidence, volumes, shifts.swapaxes(0, 1).tolist(), area)


def goal(log_odds: Tensor) -> tuple[Tensor, Tensor]:
    """Log-odds (n,) at which nothing is left to remove, and how far away they are."""
    lowest = math.log(FLOOR / (1 - FLOOR)) * (log_odds / SURE).clamp(min=1)
    return lowest, (log_odds - lowest).clamp(min=1)


def seen(network, volumes, coarse, removed, target, moves) -> Tensor:
    """Log-odds (n,) of the targets in volumes under a mask, or one each, moved by some voxels."""
    seen = volumes + enlarged(coarse, volumes.shape[2:]) * removed
    seen = torch.stack([one.roll(move, (1, 2, 3)) for one, move in zip(seen, moves)])
    return of_target(network(seen).float(), target)


def _price(coarse: Tensor, area: float) -> Tensor:
    """The second part of the objective, summed over masks."""
    variation = sum(coarse.diff(dim=axis).square().mean() for axis in (2, 3, 4))
    return len(coarse) * (area * coarse.mean() + SMOOTHNESS * variation)


def descend(evidence, like: Tensor, steps: Iterable, area: float) -> tuple[Tensor, Tensor]:
    """Masks of the shape of `like` (n, 1, X, Y, Z) that minimise `evidence` and their own price.

    `evidence` takes the coarse mask, the iteration from 1 and what is next in `steps`. With the
    masks comes their persistence.
    """
    sizes = like.shape[2:]
    grid = [-(-size // 2) for size in sizes]
    coarse = torch.full((len(like), 1, *grid), 0.5, device=like.device).requires_grad_()
    optimiser = torch.optim.Adam([coarse], LR, betas=(0.9, 0.99), amsgrad=True)
    schedule = torch.optim.lr_scheduler.StepLR(optimiser, DECAY)
    total = count = 0
    for iteration, step in enumerate(steps, 1):
        ramp = min(1.0, iteration / RAMP)
        loss = evidence(coarse, iteration, step).sum() + ramp * _price(coarse, area)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
        with torch.no_grad():
            coarse.clamp_(0, 1)
            if iteration > WARM:
                total, count = total + coarse, count + 1
    mean = total / count if count else coarse
    return tuple(enlarged(one.detach(), sizes) for one in (coarse, mean))


def enlarged(coarse: Tensor, sizes: Sequence[int]) -> Tensor:
    """Masks (n, 1, x, y, z) on the volumes' grid, trilinearly, by one matrix an axis.

    PyTorch's interpolation takes seven times as long, most of it on the way back.
    """
    for size in sizes:
        cells = torch.eye(coarse.shape[2], device=coarse.device)[None]
        weights = F.interpolate(cells, size=size, mode="linear")[0]
        coarse = torch.tensordot(coarse, weights, ([2], [0]))  # the axis done goes last
    return coarse


def targets(target: int | np.ndarray | None, volumes: np.ndarray) -> np.ndarray | None:
    """The class of each volume (N,), checked; None where the network's own prediction counts."""
    if target is None:
        return None
    if np.shape(target) not in ((), (len(volumes),)) or not np.isin(target, (0, 1)).all():
        raise ValueError(
            f"expected a target of 0 or 1, or one for each of {len(volumes)} volumes, "
            f"found {target}."
        )
    return np.broadcast_to(target, len(volumes))


def matching(image: np.ndarray, volumes: np.ndarray, name: str) -> np.ndarray:
    """A view (N, X, Y, Z) of one image (X, Y, Z) for all volumes, or of one each; checked."""
    image = np.asarray(image)
    if image.shape not in (volumes.shape, volumes.shape[1:]):
        raise ValueError(
            f"expected {name} {volumes.shape[1:]}, or one for each of {len(volumes)} volumes, "
            f"found {image.shape}."
        )
    if not np.isfinite(image).all():
        raise ValueError(f"expected {name} that is finite, found NaN or infinity.")
    return np.broadcast_to(image, volumes.shape)


def replacement(images: np.ndarray | None, rows, batch: Tensor, sigma: float = 5.0) -> Tensor:
    """What takes the evidence's place in a batch (n, 1, X, Y, Z): its blur, where none is given."""
    return blurred(batch, sigma) if images is None else tensor(images, rows, batch.device)


def tensor(images: np.ndarray, rows, device: torch.device) -> Tensor:
    """Some rows of images (N, X, Y, Z) as (n, 1, X, Y, Z); what is not finite is refused."""
    found = np.array(images[rows], np.float32)
    finite = np.isfinite(found).all((1, 2, 3))
    if not finite.all():
        row = np.atleast_1d(rows)[finite.argmin()]
        raise ValueError(f"volume {row} holds NaN or infinity, not finite FA.")
    return torch.from_numpy(found)[:, None].to(device)


def of_target(logits: Tensor, target: Tensor) -> Tensor:
    """Log-odds (n,) of each volume's target, of logits (n, 2)."""
    return (logits * (2 * F.one_hot(target, 2) - 1)).sum(1)


def optimise_masks(
    network: nn.Module,
    volumes: np.ndarray,
    *,
    target: int | np.ndarray | None = None,
    subjects: Sequence[str] | None = None,
    reference: np.ndarray | None = None,
    seed: int = 0,
    iterations: int = 60,
    area: float = 200.0,
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
    reference : what takes the evidence's place, (X, Y, Z) for all or (N, X, Y, Z); by default each
        volume's blur. Means of a cohort come from training folds where volumes are held out.
    seed : of the random shifts.
    iterations : steps of Adam; the rate falls to a tenth after 40.
    area : weight of the mask's mean.
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
    plain, dtype = networks.frozen(network, device), networks.precision(device)
    fast = copy.deepcopy(plain).to(dtype)
    size = networks.FEW if device.type == "cpu" and dtype == torch.float32 else None
    subjects = [str(n) for n in range(len(volumes))] if subjects is None else subjects
    if volumes.ndim != 4 or len(subjects) != len(volumes):
        raise ValueError(
            f"expected volumes (N, X, Y, Z) and N subjects, found {volumes.shape} and "
            f"{len(subjects)}."
        )
    target = targets(target, volumes)
    if reference is not None:
        reference = matching(reference, volumes, "a reference")
    draws = [np.random.default_rng(seeded(seed, subject)) for subject in subjects]
    shifts = [draw.integers(-SHIFT, SHIFT + 1, (iterations, 3)) for draw in draws]

    def some(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray, list]:
        count, rows = len(rows), np.resize(rows, size or len(rows))
        batch = tensor(volumes, rows, device)
        with torch.no_grad():
            logits = networks.passes(plain, batch)
        before, chosen = logits.softmax(1), logits.argmax(1)
        if target is not None:
            chosen = torch.as_tensor(target[rows], dtype=torch.long, device=device)
        removed = replacement(reference, rows, batch, sigma) - batch
        moves = np.array([shifts[row] for row in rows])
        found, mean = _optimise(
            fast, batch, removed, chosen, of_target(logits, chosen), moves, area
        )
        with torch.no_grad():
            after = networks.passes(plain, batch + found * removed).softmax(1)
        columns = (
            chosen,
            before.gather(1, chosen[:, None])[:, 0],
            after.gather(1, chosen[:, None])[:, 0],
            found.mean((1, 2, 3, 4)),
        )
        records = list(zip(*(column[:count].tolist() for column in columns)))
        return found[:count, 0].cpu().numpy(), mean[:count, 0].cpu().numpy(), records

    masks, persistence = np.empty((2, *volumes.shape), np.float32)
    history, name = [], "masks" if progress else None
    for found, mean, records in networks.in_batches(
        some, len(volumes), device, name=name, size=size
    ):
        rows = slice(len(history), len(history) + len(records))
        masks[rows], persistence[rows] = found, mean
        history += records
    columns = ["target", "before", "after", "volume"]
    return Masks(masks, persistence, pd.DataFrame(history, columns=columns))
