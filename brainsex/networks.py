"""The study's 3D CNN, and in one place how a network runs: device, precision, layout, folding."""

import copy
import math
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import joblib
import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from brainsex import SHAPE


def _hidden(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv3d(inputs, outputs, 3), nn.BatchNorm3d(outputs), nn.ReLU(), nn.MaxPool3d(2)
    )


class MriNet3d(nn.Module):
    """Three hidden layers of convolution, batch norm, ReLU and pooling, then one linear layer.

    After Kan et al. 2020, arXiv 2006.15969; 322,818 parameters at the study's sizes.

    Parameters
    ----------
    channels : of the first hidden layer; the second has twice, the third four times as many.
    shape : voxels of the input along X, Y, Z.
    dropout : share of the features dropped before the linear layer.

    Raises
    ------
    ValueError
        `shape` leaves nothing after three convolutions and poolings (at least 22 a side).
    """

    def __init__(
        self, channels: int = 32, shape: tuple[int, int, int] = SHAPE, dropout: float = 0.5
    ):
        super().__init__()
        self.shape = tuple(shape)
        self.hidden1 = _hidden(1, channels)
        self.hidden2 = _hidden(channels, 2 * channels)
        self.hidden3 = _hidden(2 * channels, 4 * channels)
        sizes = self.shape
        for _ in range(3):
            sizes = [(size - 2) // 2 for size in sizes]
        if len(sizes) != 3 or min(sizes) < 1:
            raise ValueError(f"expected a shape of at least (22, 22, 22), found {shape}.")
        self.dropout = nn.Dropout(dropout)
        self.linear = nn.Linear(4 * channels * math.prod(sizes), 2)

    def forward(self, volumes: Tensor) -> Tensor:
        """Logits (N, 2), women and men, of volumes (N, 1, X, Y, Z)."""
        if tuple(volumes.shape[1:]) != (1, *self.shape):
            raise ValueError(
                f"expected volumes (N, 1, {', '.join(map(str, self.shape))}), "
                f"found {tuple(volumes.shape)}."
            )
        features = self.hidden3(self.hidden2(self.hidden1(volumes)))
        # (N, C, X, Y, Z) flattens in that order whatever the memory layout
        return self.linear(self.dropout(features.flatten(1)))


def device() -> torch.device:
    """The GPU where there is one, otherwise the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def precision(device: torch.device) -> torch.dtype:
    """bfloat16 where the hardware multiplies it faster than float32, otherwise float32."""
    if device.type == "cuda":
        return (
            torch.bfloat16
            if torch.cuda.is_bf16_supported(including_emulation=False)
            else torch.float32
        )
    return torch.bfloat16 if torch.cpu._is_avx512_bf16_supported() else torch.float32


def folded(network: MriNet3d) -> MriNet3d:
    """A copy for inference: batch norm folded into the convolutions, pooling before the ReLU.

    Both are exact in evaluation, up to rounding: batch norm is then a fixed affine map, and the
    maximum commutes with the ReLU. Parameters need no gradient. The network itself is untouched.
    """
    network = copy.deepcopy(network).eval().requires_grad_(False)
    for name in ("hidden1", "hidden2", "hidden3"):
        convolution, norm, relu, pooling = getattr(network, name)
        setattr(network, name, nn.Sequential(fuse_conv_bn_eval(convolution, norm), pooling, relu))
    return network


@contextmanager
def one_thread_each(device: torch.device) -> Iterator[int]:
    """How many subjects to work on at once: one a CPU core, each on one thread; one batch on a GPU.

    Small convolutions gain less from two threads than two subjects do, results no longer depend
    on the number of cores, and a busy core delays one subject instead of all.
    """
    threads = torch.get_num_threads()
    if device.type == "cpu":
        torch.set_num_threads(1)
    try:
        yield threads if device.type == "cpu" else 1
    finally:
        torch.set_num_threads(threads)


def batch(volumes: np.ndarray, rows: np.ndarray, device: torch.device) -> Tensor:
    """Volumes (n, 1, X, Y, Z) of some rows, read in the order they lie on disk."""
    order = np.argsort(rows)
    stacked = np.empty((len(rows), 1, *volumes.shape[1:]), np.float32)
    stacked[order, 0] = volumes[rows[order]]
    return torch.from_numpy(stacked).to(device, memory_format=torch.channels_last_3d)


def logits(network: nn.Module, volumes: Tensor, dtype: torch.dtype) -> Tensor:
    """The network's float32 output, computed in `dtype` where that is safe."""
    with torch.autocast(volumes.device.type, dtype=dtype, enabled=dtype != torch.float32):
        return network(volumes).float()


def evaluate(network: nn.Module, volumes: np.ndarray, dtype: torch.dtype) -> Tensor:
    """Logits (N, 2) of volumes (N, X, Y, Z) in evaluation mode, without gradients.

    A fixed few subjects at a time: one's logits do not depend on how many there are. The
    network's mode is put back.
    """
    device = next(network.parameters()).device
    size = 32 if device.type == "cuda" else 1
    mode = network.training
    network.eval()

    @torch.no_grad()
    def some(rows: np.ndarray) -> Tensor:
        return logits(network, batch(volumes, rows, device), dtype).cpu()

    try:
        with one_thread_each(device) as workers:
            return torch.cat(
                joblib.Parallel(workers, require="sharedmem")(
                    joblib.delayed(some)(rows)
                    for rows in np.array_split(np.arange(len(volumes)), -(-len(volumes) // size))
                )
            )
    finally:
        network.train(mode)


def load(path: str | Path, shape: tuple[int, int, int] = SHAPE) -> MriNet3d:
    """The 3D network of a state dict, in evaluation mode; its channels are read off the weights.

    Raises
    ------
    FileNotFoundError
        No such file: notebook 04 (``python -m brainsex train``) writes it.
    ValueError
        No state dict of `MriNet3d` for volumes of `shape`. Nothing in the file is executed.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such network. Run notebook 04_cnn_3d first.")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        network = MriNet3d(len(state["hidden1.0.weight"]), shape)
        network.load_state_dict(state)
    except (RuntimeError, LookupError, TypeError, EOFError, pickle.UnpicklingError) as error:
        raise ValueError(f"{path}: no state dict of MriNet3d for {shape} ({error}).") from error
    return network.eval()
