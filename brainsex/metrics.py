"""Measures of explanations: whether they find what was planted, and what the network uses.

Maps are (N, X, Y, Z), or (X, Y, Z) for one, large where the evidence is; `brain` and `truth` are
(X, Y, Z) bool, the voxels that count and those that were planted. Where a map's first voxels are
taken, ties are broken at random, the same way every time: zeros gain nothing from voxels' order.
"""

import numpy as np
import torch
from sklearn.metrics import average_precision_score
from torch import nn

from brainsex import networks, perturbation, speed

FRACTIONS = (0, 0.01, 0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5)
"""Shares of the brain at which deletion and insertion are measured."""


def average_precision(maps: np.ndarray, truth: np.ndarray, brain: np.ndarray) -> np.ndarray:
    """Return how well each of the maps (N, X, Y, Z) finds what was planted, (N,), in the brain.

    A random map scores about ``truth[brain].mean()``. Raises ValueError if a map is not finite.
    """
    return np.array([average_precision_score(truth[brain], image[brain]) for image in maps])


def top_voxels(values: np.ndarray, brain: np.ndarray, voxels: int) -> np.ndarray:
    """Return, as bool (X, Y, Z), so many of the brain's voxels: those of largest value."""
    chosen = np.zeros(brain.size, bool)
    chosen[_order_voxels(values, brain)[:voxels]] = True
    return chosen.reshape(brain.shape)


def _order_voxels(values: np.ndarray, brain: np.ndarray) -> np.ndarray:
    """Return the flat indices of the brain's voxels, the one of the largest value first."""
    voxels = np.random.default_rng(0).permutation(np.flatnonzero(brain))
    return voxels[np.argsort(-values.ravel()[voxels], kind="stable")]


def deletion_insertion(
    network: nn.Module,
    volumes: np.ndarray,
    maps: np.ndarray,
    brain: np.ndarray,
    *,
    target: int | np.ndarray,
    reference: np.ndarray | None = None,
    insertion: bool = True,
) -> dict[str, np.ndarray]:
    """Follow the target's probability while a map's first voxels are replaced, or come back.

    Petsiuk et al. 2018, arXiv 1806.07421. Deletion starts from volumes (N, X, Y, Z) and replaces
    the voxels of largest saliency by `reference`, as in `perturbation.optimise_masks` their blur by
    default; insertion starts from the reference. `target` is one class for all or (N,).

    Returns deletion and insertion, (N, `FRACTIONS`), and their means over these, deletion_area and
    insertion_area, (N,): low is faithful in deletion, high in insertion. Raises ValueError if
    shapes or target do not fit, or a volume or a reference is not finite.
    """
    device = networks.device()
    plain = speed.inference_copy(network, device)
    if maps.shape != volumes.shape or brain.shape != volumes.shape[1:]:
        raise ValueError(f"expected maps {volumes.shape}, found {maps.shape} in {brain.shape}")
    target, reference = perturbation.broadcast_inputs(plain, volumes, target, reference)
    steps = np.array(FRACTIONS, float)
    counts = np.rint(steps * np.count_nonzero(brain)).astype(int)
    measures = ("deletion", "insertion") if insertion else ("deletion",)
    curves = {name: np.empty((len(volumes), len(steps)), np.float32) for name in measures}

    def work(rows: np.ndarray) -> None:
        volume = perturbation.volume_tensor(volumes, rows, device)
        replacement = perturbation.reference_images(reference, rows, volume)
        order = torch.from_numpy(_order_voxels(maps[rows[0]], brain)).to(device)
        for curve, start, end in zip(curves.values(), (volume, replacement), (replacement, volume)):
            images = start.repeat(len(counts), 1, 1, 1, 1)
            for image, count in zip(images, counts):
                image.view(-1)[order[:count]] = end.reshape(-1)[order[:count]]
            logits = networks.average_slab_logits(speed.forward_in_chunks(plain, images))
            curve[rows] = logits.softmax(1)[:, int(target[rows[0]])].cpu()

    list(speed.map_batches(work, len(volumes), device, size=1))
    areas = {name: np.trapezoid(curve, steps) for name, curve in curves.items()}
    return curves | {f"{name}_area": area / np.ptp(steps) for name, area in areas.items()}
