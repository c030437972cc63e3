"""Explanations of a network: masks and Captum's methods, in one table behind one function.

All explain the log-odds of the target class, since a number added to both logits changes no
probability, on the plain network in float32. With a reference, what is positive speaks for the
target. Without one the sign only says which way a voxel pushes: there the magnitude counts.
"""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from captum.attr import GuidedBackprop, IntegratedGradients, LayerGradCam, Saliency
from scipy.ndimage import gaussian_filter
from torch import Tensor, nn

from brainsex import networks, perturbation, speed


class _LogOdds(nn.Module):
    """Log-odds (N, 2) of either class, of volumes (N, 1, X, Y, Z)."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, volumes: Tensor) -> Tensor:
        logits = networks.average_slab_logits(self.network(volumes))
        return logits - logits.flip(1)


@dataclass(frozen=True)
class _Method:
    """An entry of `METHODS`."""

    name: str  # as figures and tables show it
    # maps of a _LogOdds, volumes, the classes explained and references, if any; None for masks
    compute: Callable[..., Tensor] | None
    reference: str | None = None  # other or difference, of a cohort's means: see `reference_for`

    @property
    def options(self) -> dict[str, object]:
        """The options of `attribute` that this method takes, with their defaults."""
        if self.compute is None:
            defaults = perturbation.optimise_masks.__kwdefaults__
            return {name: defaults[name] for name in ("iterations", "area")}
        return {"sigma": 1.0} | (self.compute.__kwdefaults__ or {})


def attribute(
    network: nn.Module,
    volumes: np.ndarray,
    method: str,
    *,
    target: int | np.ndarray | None = None,
    reference: np.ndarray | None = None,
    subjects: Sequence[str] | None = None,
    seed: int = 0,
    sigma: float = 1.0,
    progress: bool = True,
    **options: object,
) -> np.ndarray:
    """Explain a network's decisions on volumes by one method.

    Parameters
    ----------
    volumes : (N, X, Y, Z), finite.
    method : a key of `METHODS`; `options` are its own, as ``METHODS[method].options`` lists them.
    target : the class explained, 0 or 1, for all or (N,); by default the class predicted.
    reference : (X, Y, Z) or (N, X, Y, Z), where the method needs one, as from `reference_for`.
    subjects, seed : of masks, as in `perturbation.optimise_masks`.
    sigma : of the Gaussian under which all maps but masks are smoothed, voxels.

    Returns maps (N, X, Y, Z) float32, of masks their persistence. Raises ValueError for an unknown
    method, a reference missing or not used, and inputs or options that do not fit.
    """
    entry, needed = METHODS[method], METHODS[method].reference is not None
    if needed != (reference is not None):
        raise ValueError(f"{method} takes {'a' if needed else 'no'} reference; see reference_for.")
    if entry.compute is None:
        options |= {"target": target, "reference": reference, "subjects": subjects, "seed": seed}
        options["progress"] = progress
        return perturbation.optimise_masks(network, volumes, **options).persistence
    device = networks.device()
    plain = speed.inference_copy(network, device, fuse=method != "grad_cam")
    target, reference = perturbation.broadcast_inputs(plain, volumes, target, reference)
    maps = np.empty(volumes.shape, np.float32)

    def work(rows: np.ndarray) -> None:
        batch = perturbation.volume_tensor(volumes, rows, device)
        classes = torch.as_tensor(target[rows], dtype=torch.long, device=device)
        images = [perturbation.volume_tensor(reference, rows, device)] if needed else []
        score = _LogOdds(copy.deepcopy(plain))  # Captum hangs its hooks on it
        attributed = entry.compute(score, batch.requires_grad_(), classes, *images, **options)
        maps[rows] = attributed.detach()[:, 0].cpu()

    list(speed.map_batches(work, len(volumes), device, name=entry.name * progress))
    return gaussian_filter(maps, sigma, axes=(1, 2, 3), mode="nearest")


def reference_for(
    method: str, means: np.ndarray, target: np.ndarray, sigma: float = 1.0
) -> np.ndarray | None:
    """Return the references (N, X, Y, Z) of a method for the classes (N,) explained, or None.

    `means` (2, X, Y, Z) are those of women and men in training: the mean of the other sex, or, for
    ``difference``, the mean of the target's minus the other's, under a Gaussian of `sigma` voxels.
    """
    kind = METHODS[method].reference
    if kind == "difference":
        return gaussian_filter(means - means[::-1], sigma, axes=(1, 2, 3), mode="nearest")[target]
    return means[1 - target] if kind else None


def _gradient(
    score: _LogOdds, volumes: Tensor, target: Tensor, reference: Tensor | None = None
) -> Tensor:
    """The gradient times the volume, or the reference (Shrikumar et al. 2017, arXiv 1605.01713)."""
    slopes = Saliency(score).attribute(volumes, target, abs=False)
    return slopes * (volumes if reference is None else reference)


def _integral(
    score: _LogOdds, volumes: Tensor, target: Tensor, reference: Tensor, *, steps: int = 8
) -> Tensor:
    """Gradients from the reference to the volume (Sundararajan et al. 2017, arXiv 1703.01365)."""
    options = {"n_steps": steps, "internal_batch_size": max(speed.CPU_BATCH, len(volumes))}
    return IntegratedGradients(score).attribute(volumes, reference, target, **options)


def _grad_cam(score: _LogOdds, volumes: Tensor, target: Tensor) -> Tensor:
    """Maps of `hidden3`, weighted by mean gradients (Selvaraju et al. 2017, arXiv 1610.02391).

    Each cell is put at the centre of the voxels it sees. Stretching the map over the volume, as is
    usual, is wrong without padding: the cells lie from voxel 10.5 to 42.5 of 58.
    """
    if not isinstance(score.network, networks.MriNet3d):
        raise ValueError(f"grad_cam: expected a MriNet3d, found {type(score.network).__name__}.")
    camera = LayerGradCam(score, score.network.hidden3)
    coarse = camera.attribute(volumes, target, relu_attributions=True)
    for axis in (2, 3, 4):
        cells, voxels = np.eye(coarse.shape[axis]), np.arange(volumes.shape[axis])
        centres = 10.5 + 8 * np.arange(len(cells))  # three poolings; a cell sees 22 voxels
        weights = coarse.new_tensor(np.array([np.interp(voxels, centres, cell) for cell in cells]))
        coarse = torch.tensordot(coarse, weights, ([axis], [0])).movedim(-1, axis)
    return coarse


def _guided_backpropagation(score: _LogOdds, volumes: Tensor, target: Tensor) -> Tensor:
    """The gradient, kept positive at every nn.ReLU (Springenberg et al. 2015, arXiv 1412.6806)."""
    return GuidedBackprop(score).attribute(volumes, target)


METHODS = {
    "mask": _Method("mask (blur)", None),
    "counterfactual": _Method("mask (other sex's mean)", None, "other"),
    "gradient_difference": _Method("gradient × group difference", _gradient, "difference"),
    "integrated_gradients": _Method("integrated gradients (other sex's mean)", _integral, "other"),
    "grad_cam": _Method("Grad-CAM", _grad_cam),
    "guided_backpropagation": _Method("guided backpropagation", _guided_backpropagation),
    "gradient_input": _Method("gradient × input", _gradient),
}
"""The methods of `attribute`."""
