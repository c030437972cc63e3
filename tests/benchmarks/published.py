"""The published mask optimiser and training epoch as plain loops: baselines, to be read.

Fong and Vedaldi 2017, arXiv 1704.03296, with the study's settings in 3D. Two choices are kinder
to it than its sources: the reference is a proper Gaussian, and the random shifts move the network's
input as a whole, so that the mask stays where it is relative to the volume.
"""

import numpy as np
import torch
from scipy.ndimage import gaussian_filter
from torch import nn
from torch.nn import functional

ITERATIONS, SHIFTS, RAMP = 300, 10, 60


def published_mask(
    network: nn.Module, volume: np.ndarray, target: int, *, seed: int = 0, iterations=ITERATIONS
) -> np.ndarray:
    """Saliency (X, Y, Z) in [0, 1] of one volume (X, Y, Z): 1 - m of the publication.

    The network is used as it is, in float32, on its own device.
    """
    device = next(network.parameters()).device
    generator = torch.Generator().manual_seed(seed)
    image = torch.from_numpy(volume)[None, None].to(device)
    reference = torch.from_numpy(gaussian_filter(volume, 5, mode="nearest"))[None, None].to(device)
    mask = torch.full((1, 1, 14, 17, 14), 0.5, device=device, requires_grad=True)
    optimiser = torch.optim.Adam([mask], 0.3, betas=(0.9, 0.99), amsgrad=True)
    schedule = torch.optim.lr_scheduler.StepLR(optimiser, 30)
    layers = every_voxel(network)
    for iteration in range(1, iterations + 1):
        kept = functional.interpolate(mask, size=volume.shape, mode="trilinear")
        seen = kept * image + (1 - kept) * reference
        moves = torch.randint(0, 5, (SHIFTS, 3), generator=generator).tolist()
        shifted = (layers(seen.roll(move, (2, 3, 4))).softmax(1)[0, target] for move in moves)
        probability = sum(shifted) / SHIFTS
        penalty = 3 * (1 - mask).abs().mean() + total_variation(mask, beta=7)
        loss = functional.relu(probability - 0.05) + min(1, iteration / RAMP) * penalty
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
        with torch.no_grad():
            mask.clamp_(0, 1)
    kept = functional.interpolate(mask.detach(), size=volume.shape, mode="trilinear")
    return (1 - kept)[0, 0].cpu().numpy()


def every_voxel(network: nn.Module) -> nn.Module:
    """Return the layers of a `MriNet3d` one after the other, without its crop."""
    hidden = network.hidden1, network.hidden2, network.hidden3
    return nn.Sequential(*hidden, nn.Flatten(), network.dropout, network.linear)


def total_variation(mask: torch.Tensor, beta: float) -> torch.Tensor:
    """Mean over the grid of each axis's absolute differences to the power of beta."""
    return sum(mask.diff(dim=axis).abs().pow(beta).mean() for axis in (2, 3, 4))


def deleted(network: nn.Module, volume: np.ndarray, mask: np.ndarray, target: int) -> float:
    """Probability of `target` for the volume under a mask, in float32 on the plain network."""
    blurred = gaussian_filter(volume, 5, mode="nearest")
    seen = torch.from_numpy((1 - mask) * volume + mask * blurred)[None, None]
    with torch.no_grad():
        logits = network(seen.to(next(network.parameters()).device))
    return logits.softmax(1)[0, target].item()


def published_epoch(network: nn.Module, optimiser, train, validation, batch: int) -> None:
    """An epoch as published, of (volumes, sex) pairs: float32, gradients on throughout.

    Each of loss and accuracy is a pass of its own: two over the training set, three over the
    validation set, whose loss is asked for once more to choose what is kept.
    """
    criterion = nn.CrossEntropyLoss()

    def passes(volumes, sex):
        for start in range(0, len(sex), batch):
            rows = slice(start, start + batch)
            yield layers(torch.from_numpy(volumes[rows])[:, None]), torch.from_numpy(sex[rows])

    layers = every_voxel(network)
    network.train()
    for logits, labels in passes(*train):
        optimiser.zero_grad()
        criterion(logits, labels).backward()
        optimiser.step()
        del logits  # with all that leads to it, before the next batch
    network.eval()
    for volumes, sex in (train, train, validation, validation, validation):
        for logits, labels in passes(volumes, sex):
            criterion(logits, labels).item(), (logits.argmax(1) == labels).sum().item()
            del logits
