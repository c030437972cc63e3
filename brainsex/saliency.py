"""The other explanations of a network, by Captum, of the very score that the masks remove.

All explain the log-odds of the target, since a number added to both logits changes no probability,
on the plain network in float32. Maps are (N, X, Y, Z) float32 on the volumes' grid, so in their
space. With a reference, what is positive speaks for the target. Without one, as in a gradient or in
a gradient times the input, the sign only says which way a voxel pushes: there the magnitude counts.
"""

import copy
import hashlib
from collections.abc import Sequence

import numpy as np
import torch
from captum.attr import GuidedBackprop, IntegratedGradients, LayerGradCam, Occlusion, Saliency
from scipy.ndimage import gaussian_filter
from torch import Tensor, nn

from brainsex.explaining import LogOdds, each, image
from brainsex.perturbation import blurred, matching


def grad_cam(
    network: nn.Module,
    volumes: np.ndarray,
    *,
    layer: str = "hidden3",
    target: int | np.ndarray | None = None,
    progress: bool = True,
) -> np.ndarray:
    """A layer's feature maps, weighted by their mean gradients; what is negative becomes 0.

    Selvaraju et al. 2017, arXiv 1610.02391. The coarse map is enlarged linearly with each of its
    cells at the centre of the voxels it sees. Stretching it over the volume instead, as is usual,
    is wrong without padding: `hidden3` of `MriNet3d` sees from voxel 10.5 to 42.5 of 58, and
    would be displaced by up to 9 voxels.

    Parameters
    ----------
    network : its convolutions and poolings up to `layer` follow each other.
    volumes : (N, X, Y, Z) finite.
    layer : name of the module whose output (N, C, X', Y', Z') is explained.
    target : class explained, for all or (N,); by default the class predicted.

    Raises
    ------
    ValueError
        No such layer, or one without feature maps.
    """
    names = [name for name, _ in network.named_modules()]
    if layer not in names or not layer:
        raise ValueError(f"expected a layer among {', '.join(names[1:])}, found {layer!r}.")

    def explain(score: LogOdds, volume: Tensor, target: int, _) -> Tensor:
        module = score.network.get_submodule(layer)
        coarse = LayerGradCam(score, module).attribute(volume, target, relu_attributions=True)
        if coarse.ndim != 5:
            raise ValueError(f"expected feature maps (N, C, X, Y, Z) of a layer, {layer} has none.")
        for axis in range(3):
            step, start = _centres(score.network, layer, axis)
            cells, sizes = coarse.shape[2 + axis], np.arange(volume.shape[2 + axis])
            where = start + step * np.arange(cells)
            weights = np.array([np.interp(sizes, where, cell) for cell in np.eye(cells)])
            weights = torch.from_numpy(weights).to(coarse)
            coarse = torch.tensordot(coarse, weights, ([2 + axis], [0])).movedim(-1, 2 + axis)
        return coarse

    return each(explain, "Grad-CAM", network, volumes, target, progress)


def _centres(network: nn.Module, layer: str, axis: int) -> tuple[float, float]:
    """Voxels from one cell of a layer to the next, and the voxel the first is centred on."""
    step, start = 1, 0.0
    leaves = [(n, m) for n, m in network.named_modules() if not list(m.children())]
    last = max(i for i, (n, _) in enumerate(leaves) if f"{n}.".startswith(f"{layer}."))
    for _, module in leaves[: last + 1]:
        if hasattr(module, "kernel_size"):
            size, stride, padding = (
                value if isinstance(value, int) else value[axis]
                for value in (module.kernel_size, module.stride, module.padding)
            )
            start += step * ((size - 1) / 2 - padding)
            step *= stride
    return step, start


def guided_backpropagation(
    network: nn.Module,
    volumes: np.ndarray,
    *,
    target: int | np.ndarray | None = None,
    progress: bool = True,
) -> np.ndarray:
    """The gradient with what is negative set to 0 on its way back through every ReLU.

    Springenberg et al. 2015, arXiv 1412.6806. `volumes` and `target` as in `grad_cam`.

    Raises
    ------
    ValueError
        A ReLU that is a function call: only modules can be guided, and without them the plain
        gradient would come back under this name.
    """
    if len(volumes) and volumes.ndim == 4:
        calls, modules = _relus(network, volumes[:1])
        if modules == 0 or modules < calls:
            raise ValueError(
                f"expected every ReLU to be an nn.ReLU, found {modules} of {calls}: the others are "
                "function calls, where guided backpropagation is but the plain gradient."
            )

    def explain(score: LogOdds, volume: Tensor, target: int, _) -> Tensor:
        return GuidedBackprop(score).attribute(volume, target)

    return each(explain, "guided backpropagation", network, volumes, target, progress)


def _relus(network: nn.Module, volumes: np.ndarray) -> tuple[int, int]:
    """How often a pass applies a ReLU, and how often an nn.ReLU does."""
    network, modules = copy.deepcopy(network).eval(), []
    for module in network.modules():
        if isinstance(module, nn.ReLU):
            module.register_forward_hook(lambda *_: modules.append(1))
    volume = torch.from_numpy(np.array(volumes, np.float32))[:, None].requires_grad_()
    seen, ahead = set(), [network.cpu()(volume).grad_fn]
    while ahead:
        node = ahead.pop()
        if node is not None and node not in seen:
            seen.add(node)
            ahead += [parent for parent, _ in node.next_functions]
    names = [node.name() for node in seen]
    return sum(name.startswith(("Relu", "Clamp", "Threshold")) for name in names), len(modules)


def gradient(
    network: nn.Module,
    volumes: np.ndarray,
    *,
    times: np.ndarray | None = None,
    target: int | np.ndarray | None = None,
    progress: bool = True,
) -> np.ndarray:
    """The gradient times the volume itself, or times another image.

    Simonyan et al. 2014, arXiv 1312.6034; Shrikumar et al. 2017, arXiv 1605.01713. Times the mean
    of the target's sex minus the other's it is, to first order, what the log-odds would lose if a
    subject moved from the one to the other, voxel by voxel.

    Parameters
    ----------
    times : (X, Y, Z), or (N, X, Y, Z), one a volume; by default the volumes.
    volumes, target : as in `grad_cam`.
    """
    factors = matching(volumes if times is None else times, volumes, "an image to multiply with")

    def explain(score: LogOdds, volume: Tensor, target: int, row: int) -> Tensor:
        return Saliency(score).attribute(volume, target, abs=False) * image(factors, row, volume)

    return each(explain, "gradient", network, volumes, target, progress)


def smooth_grad(
    network: nn.Module,
    volumes: np.ndarray,
    *,
    samples: int = 10,
    noise: float = 0.02,
    subjects: Sequence[str] | None = None,
    seed: int = 0,
    target: int | np.ndarray | None = None,
    progress: bool = True,
) -> np.ndarray:
    """The mean gradient of noisy copies of a volume.

    Smilkov et al. 2017, arXiv 1706.03825. Captum's NoiseTunnel draws from torch's one generator, so
    that a subject's map would depend on which came first: here each has its own.

    Parameters
    ----------
    samples : copies a volume.
    noise : standard deviation, FA.
    subjects : (N,) names that seed each volume's draws; by default its number, "0", "1", …
    volumes, target : as in `grad_cam`.
    """
    names = range(len(volumes)) if subjects is None else subjects

    def explain(score: LogOdds, volume: Tensor, target: int, row: int) -> Tensor:
        digest = hashlib.sha256(f"{seed}/{names[row]}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
        total = torch.zeros_like(volume)
        for _ in range(samples):
            draw = torch.randn(volume.shape, generator=generator).to(volume)
            noisy = volume.detach() + noise * draw
            total = total + Saliency(score).attribute(noisy.requires_grad_(), target, abs=False)
        return total / samples

    return each(explain, "SmoothGrad", network, volumes, target, progress)


def integrated_gradients(
    network: nn.Module,
    volumes: np.ndarray,
    *,
    reference: np.ndarray | None = None,
    steps: int = 16,
    target: int | np.ndarray | None = None,
    progress: bool = True,
) -> np.ndarray:
    """The mean gradient on the way from a reference to the volume, times their difference.

    Sundararajan et al. 2017, arXiv 1703.01365. Adds up to the log-odds of the volume minus those of
    the reference.

    Parameters
    ----------
    reference : (X, Y, Z), or (N, X, Y, Z), one a volume; by default an empty image.
    steps : of the Gauss-Legendre sum over the way.
    volumes, target : as in `grad_cam`.
    """
    start = np.zeros(volumes.shape[1:], np.float32) if reference is None else reference
    start = matching(start, volumes, "a reference")

    def explain(score: LogOdds, volume: Tensor, target: int, row: int) -> Tensor:
        options = {"target": target, "n_steps": steps, "internal_batch_size": 4}
        return IntegratedGradients(score).attribute(volume, image(start, row, volume), **options)

    return each(explain, "integrated gradients", network, volumes, target, progress)


def occlusion(
    network: nn.Module,
    volumes: np.ndarray,
    *,
    reference: np.ndarray | None = None,
    window: int = 8,
    stride: int = 4,
    sigma: float = 5.0,
    target: int | np.ndarray | None = None,
    progress: bool = True,
) -> np.ndarray:
    """What the log-odds lose when a cube is replaced, averaged over the cubes a voxel lies in.

    Zeiler and Fergus 2014, arXiv 1311.2901.

    Parameters
    ----------
    reference : what stands in the cube, (X, Y, Z) or (N, X, Y, Z); by default the volume's blur.
    window, stride : the cube's side and the step from one to the next, voxels.
    sigma : of the blur, voxels.
    volumes, target : as in `grad_cam`.
    """
    if reference is not None:
        reference = matching(reference, volumes, "a reference")

    def explain(score: LogOdds, volume: Tensor, target: int, row: int) -> Tensor:
        volume = volume.detach()
        other = blurred(volume, sigma) if reference is None else image(reference, row, volume)
        sizes = ((1, *[window] * 3), (1, *[stride] * 3))
        return Occlusion(score).attribute(volume, *sizes, other, target, perturbations_per_eval=4)

    return each(explain, "occlusion", network, volumes, target, progress)


def smoothed(maps: np.ndarray, sigma: float) -> np.ndarray:
    """Maps (N, X, Y, Z) under a Gaussian of `sigma` voxels: the last step of every explanation."""
    return gaussian_filter(maps, sigma, axes=(1, 2, 3), mode="nearest")
