"""The study's 3D CNN, and in one place how a network runs: device, precision, layout, folding."""

import copy
import math

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
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float32
    return torch.bfloat16 if torch.cpu._is_avx512_bf16_supported() else torch.float32


def folded(network: MriNet3d) -> MriNet3d:
    """A copy for inference: batch norm folded into the convolutions, pooling before the ReLU.

    Both are exact in evaluation, up to rounding: batch norm is then a fixed affine map, and the
    maximum commutes with the ReLU. Parameters need no gradient. The network itself is untouched.
    """
    network = copy.deepcopy(network).eval().requires_grad_(False)
    for name in ("hidden1", "hidden2", "hidden3"):
        convolution, norm, relu, pooling = getattr(network, name)
        setattr(
            network, name, nn.Sequential(fuse_conv_bn_eval(convolution, norm), pooling, relu)
        )
    return network
