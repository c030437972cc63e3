"""The score that explanations explain, and how they run: one volume a thread."""

import copy
from collections.abc import Callable

import numpy as np
import torch
from joblib import Parallel, delayed
from torch import Tensor, nn
from tqdm.auto import tqdm

from brainsex import networks
from brainsex.perturbation import targets


class LogOdds(nn.Module):
    """Log-odds (N, 2) of either class, of volumes (N, 1, X, Y, Z)."""

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = network

    def forward(self, volumes: Tensor) -> Tensor:
        logits = networks.by_subject(self.network(volumes))
        return logits - logits.flip(1)


def each(
    explain: Callable[[LogOdds, Tensor, int, int], Tensor],
    name: str,
    network: nn.Module,
    volumes: np.ndarray,
    target: int | np.ndarray | None,
    progress: bool,
) -> np.ndarray:
    """Maps (N, X, Y, Z) of volumes (N, X, Y, Z), one thread a volume, each on its own copy.

    `explain` takes the score, a volume (1, 1, X, Y, Z), its target and its row.
    """
    device = networks.device()
    plain = copy.deepcopy(network).eval().requires_grad_(False).to(device)
    if volumes.ndim != 4:
        raise ValueError(f"expected volumes (N, X, Y, Z), found {volumes.shape}.")
    target = targets(target, volumes)
    if target is None and len(volumes):
        logits = networks.evaluate(plain, volumes, torch.float32)
        target = networks.by_subject(logits).argmax(1).numpy()

    def one(row: int) -> np.ndarray:
        score = LogOdds(copy.deepcopy(plain))  # Captum hangs its hooks on it
        volume = torch.from_numpy(np.array(volumes[row], np.float32))[None, None].to(device)
        if not volume.isfinite().all():
            raise ValueError(f"volume {row} holds NaN or infinity, not finite FA.")
        found = explain(score, volume.requires_grad_(), int(target[row]), row)
        return found.detach()[0, 0].cpu().numpy()

    maps = np.empty(volumes.shape, np.float32)
    with networks.one_thread_each(device) as workers:
        done = Parallel(workers, require="sharedmem", return_as="generator")(
            delayed(one)(row) for row in range(len(volumes))
        )
        bar = tqdm(done, name, total=len(volumes), unit="subject", disable=not progress)
        for row, found in enumerate(bar):
            maps[row] = found
    return maps


def image(images: np.ndarray, row: int, like: Tensor) -> Tensor:
    """One image (1, 1, X, Y, Z) where and as `like` is."""
    return torch.from_numpy(np.array(images[row], np.float32))[None, None].to(like.device)
