"""The other explanations of a network, by Captum, of the very score that the masks remove.

All explain the log-odds of the target, since a number added to both logits changes no probability,
on the plain network in float32. All take volumes (N, X, Y, Z), finite, and `target`, the class
explained, 0 or 1, for all or (N,), by default the class predicted; a ValueError says what does not
fit. Maps are (N, X, Y, Z) float32 on the volumes' grid, so in their space. With a reference, what
is positive speaks for the target. Without one, as in a gradient or in a gradient times the input,
the sign only says which way a voxel pushes: there the magnitude counts.
"""

import copy
import re
from collections.abc import Callable, Sequence

import numpy as np
import torch
from captum.attr import GuidedBackprop, IntegratedGradients, LayerGradCam, Occlusion, Saliency
from scipy.ndimage import gaussian_filter
from torch import Tensor, nn

from brainsex import networks, seeded
from brainsex.networks import FEW
from brainsex.perturbation import blurred, matching, targets, tensor

ALLOWED = re.compile(
    r"torch::autograd::AccumulateGrad|(Convolution|NativeBatchNorm|(Adaptive)?(Max|Avg)Pool\dD"
    r"(WithIndices)?|Addmm|Mm|Linear|Add|Mean|Cat|ConstantPadNd|Clone|ToCopy|View|UnsafeView|"
    r"ReshapeAlias|T|Transpose|Permute|Squeeze|Unsqueeze|Unfold|Slice|Select)Backward\d"
)
"""Autograd's names of what needs no guiding: linear in the volumes, or a pooling."""


class LogOdds(nn.Module):
    """Log-odds (N, 2) of either class, of volumes (N, 1, X, Y, Z)."""

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = network

    def forward(self, volumes: Tensor) -> Tensor:
        logits = networks.by_subject(self.network(volumes))
        return logits - logits.flip(1)


def _maps(
    explain: Callable[[LogOdds, Tensor, Tensor, np.ndarray], Tensor],
    name: str,
    network: nn.Module,
    volumes: np.ndarray,
    target: int | np.ndarray | None,
    progress: bool,
    fold: bool = True,
) -> np.ndarray:
    """Maps (N, X, Y, Z) of volumes (N, X, Y, Z), batch by batch, each on its own copy.

    `explain` takes the score, volumes (n, 1, X, Y, Z), their targets (n,) and their rows.
    """
    device = networks.device()
    plain = networks.frozen(network, device, fold)
    if volumes.ndim != 4:
        raise ValueError(f"expected volumes (N, X, Y, Z), found {volumes.shape}.")
    target = targets(target, volumes)
    if target is None and len(volumes):
        logits = networks.evaluate(plain, volumes, torch.float32)
        target = networks.by_subject(logits).argmax(1).numpy()

    def some(rows: np.ndarray) -> np.ndarray:
        score = LogOdds(copy.deepcopy(plain))  # Captum hangs its hooks on it
        batch = tensor(volumes, rows, device).requires_grad_()
        chosen = torch.as_tensor(target[rows], dtype=torch.long, device=device)
        return explain(score, batch, chosen, rows).detach()[:, 0].cpu().numpy()

    done = networks.in_batches(some, len(volumes), device, name=name if progress else None)
    return np.concatenate([np.empty((0, *volumes.shape[1:]), np.float32), *done])


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
    layer : name of the module whose output (N, C, X', Y', Z') is explained.

    Raises
    ------
    ValueError
        No such layer, or one without feature maps.
    """
    names = [name for name, _ in network.named_modules()]
    if layer not in names or not layer:
        raise ValueError(f"expected a layer among {', '.join(names[1:])}, found {layer!r}.")

    def explain(score: LogOdds, batch: Tensor, target: Tensor, _) -> Tensor:
        module = score.network.get_submodule(layer)
        coarse = LayerGradCam(score, module).attribute(batch, target, relu_attributions=True)
        if coarse.ndim != 5:
            raise ValueError(f"expected feature maps (N, C, X, Y, Z) of a layer, {layer} has none.")
        for axis in range(3):
            step, start = _centres(score.network, layer, axis)
            cells, sizes = coarse.shape[2 + axis], np.arange(batch.shape[2 + axis])
            where = start + step * np.arange(cells)
            weights = np.array([np.interp(sizes, where, cell) for cell in np.eye(cells)])
            weights = torch.from_numpy(weights).to(coarse)
            coarse = torch.tensordot(coarse, weights, ([2 + axis], [0])).movedim(-1, 2 + axis)
        return coarse

    return _maps(explain, "Grad-CAM", network, volumes, target, progress, fold=False)


def _centres(network: nn.Module, layer: str, axis: int) -> tuple[float, float]:
    """Voxels from one cell of a layer to the next, and the voxel the first is centred on."""
    step, start = 1, 0.0
    leaves = [(n, m) for n, m in network.named_modules() if not list(m.children())]
    last = max(i for i, (n, _) in enumerate(leaves) if f"{n}.".startswith(f"{layer}."))
    for _, module in leaves[: last + 1]:
        if hasattr(module, "kernel_size"):
            size, stride, dilation = (
                value if isinstance(value, int) else value[axis]
                for value in (module.kernel_size, module.stride, getattr(module, "dilation", 1))
            )
            reach, padding = dilation * (size - 1) / 2, module.padding
            if isinstance(padding, str):
                padding = reach if padding == "same" else 0
            start += step * (reach - (padding if np.ndim(padding) == 0 else padding[axis]))
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

    Springenberg et al. 2015, arXiv 1412.6806.

    Raises
    ------
    ValueError
        No nn.ReLU, or a step that is neither one nor among `ALLOWED`, such as a function call: it
        cannot be guided, and the plain gradient would come back under this name.
    """
    if len(volumes) and volumes.ndim == 4:
        if found := _unguided(network, volumes[:1]):
            raise ValueError(
                "expected nn.ReLU modules between convolutions, batch norms, poolings and linear "
                f"layers, found {', '.join(found)}: nothing but an nn.ReLU can be guided. Make "
                "every rectifier one, also those that are function calls."
            )

    def explain(score: LogOdds, batch: Tensor, target: Tensor, _) -> Tensor:
        return GuidedBackprop(score).attribute(batch, target)

    return _maps(explain, "guided backpropagation", network, volumes, target, progress)


def _unguided(network: nn.Module, volumes: np.ndarray) -> list[str]:
    """Autograd's names of the steps from volumes to output that are nonlinear and no nn.ReLU."""
    network = copy.deepcopy(network).cpu().eval().requires_grad_(False)  # a graph of volumes only
    guided = set()
    for module in network.modules():
        if isinstance(module, nn.ReLU):
            module.register_forward_hook(lambda *call: guided.add(call[-1].grad_fn))
    volume = torch.from_numpy(np.array(volumes, np.float32))[:, None].requires_grad_()
    seen, ahead = set(), [network(volume).grad_fn]
    while ahead:
        node = ahead.pop()
        if node is not None and node not in seen:
            seen.add(node)
            ahead += [parent for parent, _ in node.next_functions]
    names = sorted({node.name() for node in seen - guided})
    found = [name for name in names if not ALLOWED.fullmatch(name)]
    return found if seen & guided else [*found, "no nn.ReLU"]


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
    """
    factors = matching(volumes if times is None else times, volumes, "an image to multiply with")

    def explain(score: LogOdds, batch: Tensor, target: Tensor, rows: np.ndarray) -> Tensor:
        slopes = Saliency(score).attribute(batch, target, abs=False)
        return slopes * tensor(factors, rows, batch.device)

    return _maps(explain, "gradient", network, volumes, target, progress)


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
    """
    names = range(len(volumes)) if subjects is None else subjects

    def explain(score: LogOdds, batch: Tensor, target: Tensor, rows: np.ndarray) -> Tensor:
        total = torch.zeros_like(batch)
        for place, row in enumerate(rows):
            generator = torch.Generator().manual_seed(seeded(seed, names[row]))
            draws = torch.randn((samples, *batch.shape[1:]), generator=generator).to(batch)
            for some in (batch[place] + noise * draws).split(FEW):
                total[place] += Saliency(score).attribute(some, target[place], abs=False).sum(0)
        return total / samples

    return _maps(explain, "SmoothGrad", network, volumes, target, progress)


def integrated_gradients(
    network: nn.Module,
    volumes: np.ndarray,
    *,
    reference: np.ndarray,
    steps: int = 16,
    target: int | np.ndarray | None = None,
    progress: bool = True,
) -> np.ndarray:
    """The mean gradient on the way from a reference to the volume, times their difference.

    Sundararajan et al. 2017, arXiv 1703.01365. Adds up to the log-odds of the volume minus those of
    the reference.

    Parameters
    ----------
    reference : (X, Y, Z), or (N, X, Y, Z), one a volume.
    steps : of the Gauss-Legendre sum over the way.
    """
    reference = matching(reference, volumes, "a reference")

    def explain(score: LogOdds, batch: Tensor, target: Tensor, rows: np.ndarray) -> Tensor:
        start = tensor(reference, rows, batch.device)
        options = {"n_steps": steps, "internal_batch_size": max(FEW, len(batch))}
        return IntegratedGradients(score).attribute(batch, start, target, **options)

    return _maps(explain, "integrated gradients", network, volumes, target, progress)


def occlusion(
    network: nn.Module,
    volumes: np.ndarray,
    *,
    window: int = 8,
    stride: int = 4,
    target: int | np.ndarray | None = None,
    progress: bool = True,
) -> np.ndarray:
    """What the log-odds lose when a cube is blurred, averaged over the cubes a voxel lies in.

    Zeiler and Fergus 2014, arXiv 1311.2901.

    Parameters
    ----------
    window, stride : the cube's side and the step from one to the next, voxels.

    Raises
    ------
    ValueError
        A cube larger than the volumes, or a step larger than a cube, which leaves voxels out.
    """
    if not 1 <= stride <= window <= min(volumes.shape[-3:]):
        raise ValueError(
            f"expected 1 <= stride <= window <= {min(volumes.shape[-3:])}, the volumes' shortest "
            f"side, found a stride of {stride} and a window of {window}."
        )

    def explain(score: LogOdds, batch: Tensor, target: Tensor, _) -> Tensor:
        batch = batch.detach()
        how = ((1, *[window] * 3), (1, *[stride] * 3), blurred(batch), target)
        return Occlusion(score).attribute(batch, *how, perturbations_per_eval=FEW)

    return _maps(explain, "occlusion", network, volumes, target, progress)


def smoothed(maps: np.ndarray, sigma: float) -> np.ndarray:
    """Maps (N, X, Y, Z) under a Gaussian of `sigma` voxels: the last step of every explanation."""
    return gaussian_filter(maps, sigma, axes=(1, 2, 3), mode="nearest")
