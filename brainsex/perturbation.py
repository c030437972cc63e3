"""Meaningful perturbation: the smallest region whose removal changes the network's mind.

After Fong and Vedaldi 2017, arXiv 1704.03296, in 3D. With a volume x, a reference r (by default the
Gaussian blur of x) and a saliency s in [0, 1] on a coarser grid, enlarged trilinearly to S, the
network sees x' = x + S (r - x), moved at random by one voxel at most. With l the log-odds of the
target, s minimises

    weight · relu(l(x')) / l(x) + ramp · (area · mean s + smoothness · mean |∇s|²).

The published objective has the probability in place of the log-odds, but a confident network's
probability no longer moves. Evidence is gone at even odds, l = 0. Each volume has a weight of its
own, which grows for as long as evidence is left. Saliency is 1 where the evidence was removed and 0
where the volume was kept: Fong and Vedaldi's 1 - m. A mask's persistence, the mean of the masks on
the way to it, ranks the voxels: what is removed first and stays removed is highest.

A reference is neutral if the network sees no sex in it. A blur is not, unless the network has been
taught so (`training.fit` with ``neutral``): to others a blurred brain is one sex's, and no mask can
take that sex's evidence away. The other sex's mean as reference brings the groups' difference in:
compare with random weights.
"""

import copy
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from scipy.ndimage import gaussian_filter1d
from torch import Tensor, nn

from brainsex import networks, speed

BLUR = 5.0  # voxels: the Gaussian of the reference, where none is passed
WARM_UP = 2  # iterations before masks count for persistence
RAMP = 12  # iterations until the penalty has its full weight
DECAY = 26  # iterations until the learning rate is cut to a tenth
LEARNING_RATE = 0.45  # of Adam
SMOOTHNESS = 3.0  # weight of a mask's squared gradient
WEIGHT_GROWTH = 1.3  # factor per iteration, after the ramp, with evidence left
MAX_SHIFT = 1  # voxels by which the network's input is moved at most along each axis
REGION = 8  # voxels between the control points of a random region of `BlurredVolumes`


@dataclass(frozen=True)
class Masks:
    """The masks of N volumes, in their order."""

    masks: np.ndarray  # (N, X, Y, Z) float32 in [0, 1]: saliency, the very mask the network saw
    persistence: np.ndarray  # (N, X, Y, Z) float32 in [0, 1]: the mean mask on the way there
    history: pd.DataFrame
    """One row a volume: target, the class whose evidence was removed; its probability before and
    after deletion, in float32; volume, the mean of the mask."""


def optimise_masks(
    network: nn.Module,
    volumes: np.ndarray,
    *,
    target: int | np.ndarray | None = None,
    subjects: Sequence[str] | None = None,
    reference: np.ndarray | None = None,
    seed: int = 0,
    iterations: int = 40,
    area: float = 400.0,
    progress: bool = True,
) -> Masks:
    """Learn, for each volume, the smallest mask whose blurring-out removes the network's evidence.

    Neither order nor company of a volume changes its mask; on a CPU not by a bit.

    Parameters
    ----------
    network : `MriNet3d`; a copy runs in the machine's fast precision.
    volumes : (N, X, Y, Z) finite floats, FA in [0, 1].
    target : class whose evidence is removed, for all or (N,); by default the class predicted.
    subjects : (N,) IDs that seed each volume's draws; by default its number, "0", "1", …
    reference : image that replaces the evidence, (X, Y, Z) or (N, X, Y, Z); by default each
        volume's blur.
    iterations, area : steps of Adam; weight of the mask's mean.

    Raises ValueError for volumes that are not finite or not of the network's shape, and for a
    target, subjects or a reference that do not fit them.
    """
    device = networks.device()
    plain, dtype = speed.inference_copy(network, device), networks.fast_precision(device)
    fast = copy.deepcopy(plain).to(dtype)
    size = speed.CPU_BATCH if device.type == "cpu" and dtype == torch.float32 else None
    subjects = range(len(volumes)) if subjects is None else subjects
    target, reference = broadcast_inputs(plain, volumes, target, reference)
    keys = (hashlib.sha256(f"{seed}/{subject}".encode()).digest() for subject in subjects)
    draws = [np.random.default_rng(int.from_bytes(key[:7], "big")) for key in keys]
    shifts = [draw.integers(-MAX_SHIFT, MAX_SHIFT + 1, (iterations, 3)) for draw in draws]

    masks, persistence = np.empty((2, *volumes.shape), np.float32)
    history = np.empty((len(volumes), 4))

    def work(places: np.ndarray) -> None:
        count, rows = len(places), np.resize(places, size or len(places))
        batch = volume_tensor(volumes, rows, device)
        logits = speed.forward_in_chunks(plain, batch)
        classes = torch.as_tensor(target[rows], dtype=torch.long, device=device)
        removed = reference_images(reference, rows, batch) - batch
        steps = np.stack([shifts[row] for row in rows], 1).tolist()
        last, mean = _descend(fast, batch, removed, classes, logits, steps, area)
        after = speed.forward_in_chunks(plain, batch + last * removed)
        chances = (part.softmax(1).gather(1, classes[:, None])[:, 0] for part in (logits, after))
        columns = torch.stack([classes, *chances, last.mean((1, 2, 3, 4))], 1)
        history[places] = columns[:count].cpu()
        masks[places], persistence[places] = last[:count, 0].cpu(), mean[:count, 0].cpu()

    list(speed.map_batches(work, len(volumes), device, name="masks" * progress, size=size))
    history = pd.DataFrame(history, columns=["target", "before", "after", "volume"])
    return Masks(masks, persistence, history.astype({"target": int}))


def _enlarge(coarse: Tensor, sizes: Sequence[int]) -> Tensor:
    """The parametrisation: coarse masks (n, 1, x, y, z) on the volumes' grid, trilinearly."""
    for size in sizes:  # one matrix an axis; PyTorch's own backward takes seven times as long
        cells = torch.eye(coarse.shape[2], device=coarse.device)[None]
        weights = nn.functional.interpolate(cells, size=size, mode="linear")[0]
        coarse = torch.tensordot(coarse, weights, ([2], [0]))  # the axis done goes last
    return coarse


def _perturb(volumes: Tensor, coarse: Tensor, removed: Tensor, shifts: Sequence) -> Tensor:
    """Volumes (n, 1, X, Y, Z) plus masks times what a mask of 1 adds, each rolled by 3 shifts."""
    seen = volumes + _enlarge(coarse, volumes.shape[2:]) * removed
    return torch.stack([volume.roll(shift, (1, 2, 3)) for volume, shift in zip(seen, shifts)])


def _penalty(coarse: Tensor, area: float) -> Tensor:
    """The objective's second part, summed over masks (n, 1, x, y, z)."""
    variation = sum(coarse.diff(dim=axis).square().mean() for axis in (2, 3, 4))
    return len(coarse) * (area * coarse.mean() + SMOOTHNESS * variation)


def _descend(
    network: nn.Module,
    volumes: Tensor,
    removed: Tensor,
    target: Tensor,
    original: Tensor,
    shifts: Sequence,
    area: float,
) -> tuple[Tensor, Tensor]:
    """The loop: masks (n, 1, X, Y, Z) that minimise the objective, and their persistence.

    Each step moves volumes by its `shifts`; `original` are the logits (n, 2) without a mask.
    """
    sizes, sign = volumes.shape[2:], 2 * nn.functional.one_hot(target, 2) - 1
    start = (original * sign).sum(1).clamp(min=1)  # the log-odds without a mask, at least 1
    grid = [-(-size // 2) for size in sizes]
    coarse = torch.full((len(volumes), 1, *grid), 0.5, device=volumes.device).requires_grad_()
    optimiser = torch.optim.Adam([coarse], LEARNING_RATE, betas=(0.9, 0.99), amsgrad=True)
    schedule = torch.optim.lr_scheduler.StepLR(optimiser, DECAY)
    weight, total, count = torch.ones(len(volumes), device=volumes.device), 0, 0
    for iteration, shift in enumerate(shifts, 1):
        logits = network(_perturb(volumes, coarse, removed, shift))
        evidence = (logits.float() * sign).sum(1).relu()
        if iteration >= RAMP:
            weight = torch.where(evidence > 0, WEIGHT_GROWTH, 1.0) * weight
        loss = (weight * evidence / start).sum()
        loss += min(1.0, iteration / RAMP) * _penalty(coarse, area)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
        with torch.no_grad():
            coarse.clamp_(0, 1)
            if iteration > WARM_UP:
                total, count = total + coarse, count + 1
    mean = total / count if count else coarse
    return tuple(_enlarge(masks.detach(), sizes) for masks in (coarse, mean))


class BlurredVolumes:
    """Volumes (N, X, Y, Z) blurred as a whole, or in smooth random regions, when they are indexed.

    With a `seed`, regions cover up to half of a volume, and are those of the seed and the row.
    """

    def __init__(self, volumes: np.ndarray, *, seed: int | None = None) -> None:
        self.volumes, self.seed, self.shape = volumes, seed, volumes.shape

    def __len__(self) -> int:
        return len(self.volumes)

    def __getitem__(self, rows: np.ndarray) -> np.ndarray:
        volumes = torch.from_numpy(np.array(self.volumes[rows], np.float32))[:, None]
        masks = 1 if self.seed is None else torch.cat([self._region(int(row)) for row in rows])
        return (volumes + masks * (gaussian_blur(volumes) - volumes))[:, 0].numpy()

    def _region(self, row: int) -> Tensor:
        """Draw a mask (1, 1, X, Y, Z) in [0, 1], where a smooth random field is high."""
        rng, sizes = np.random.default_rng([self.seed, row]), self.shape[1:]
        points = rng.standard_normal((1, 1, *(-(-size // REGION) + 1 for size in sizes)))
        field = _enlarge(torch.from_numpy(np.float32(points)), sizes)
        return (0.5 + 1.5 * (field / field.std() - rng.uniform(0, 2))).clamp(0, 1)


def gaussian_blur(volumes: Tensor) -> Tensor:
    """Blur volumes (N, 1, X, Y, Z) by a Gaussian of `BLUR` voxels, with edges replicated."""
    for axis in (2, 3, 4):
        weights = gaussian_filter1d(np.eye(volumes.shape[axis]), BLUR, axis=0, mode="nearest")
        weights = torch.from_numpy(weights).to(volumes)
        volumes = torch.tensordot(volumes, weights, ([axis], [1])).movedim(-1, axis)
    return volumes


def reference_images(images: np.ndarray | None, rows: np.ndarray, batch: Tensor) -> Tensor:
    """Return what replaces a batch (n, 1, X, Y, Z): rows of `images` (N, X, Y, Z), or its blur."""
    return gaussian_blur(batch) if images is None else volume_tensor(images, rows, batch.device)


def volume_tensor(images: np.ndarray, rows: np.ndarray, device: torch.device) -> Tensor:
    """Return rows of images (N, X, Y, Z) as a tensor (n, 1, X, Y, Z); ValueError if not finite."""
    values = np.array(images[rows], np.float32)
    if not np.isfinite(values).all():
        raise ValueError(f"expected finite images, found NaN or infinity in rows {rows}.")
    return torch.from_numpy(values)[:, None].to(device)


def broadcast_inputs(
    network: nn.Module,
    volumes: np.ndarray,
    target: int | np.ndarray | None,
    reference: np.ndarray | None,
) -> tuple[np.ndarray, np.ndarray | None]:
    """Return targets (N,) and references (N, X, Y, Z), a view, of N volumes.

    Targets are by default the classes that the network predicts; no reference stays None. Raises
    ValueError for a class other than 0 or 1, or for other shapes.
    """
    if len(volumes.shape) != 4:
        raise ValueError(f"expected volumes (N, X, Y, Z), found {volumes.shape}.")
    target = predicted_classes(network, volumes) if target is None else target
    if not np.isin(target, (0, 1)).all():
        raise ValueError(f"expected a target of 0 or 1 for each volume, found {target}.")
    if reference is not None:
        if np.shape(reference)[-3:] != volumes.shape[1:]:
            raise ValueError(f"expected a reference {volumes.shape}, found {np.shape(reference)}.")
        reference = np.broadcast_to(reference, volumes.shape)
    return np.broadcast_to(target, len(volumes)), reference


def predicted_classes(network: nn.Module, volumes: np.ndarray) -> np.ndarray:
    """Return the class (N,) that a network predicts for volumes (N, X, Y, Z), in float32."""
    return networks.average_slab_logits(speed.predict_logits(network, volumes)).argmax(1).numpy()
