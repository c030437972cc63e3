"""The study's CNNs (Kan et al. 2020, arXiv 2006.15969), and how they are loaded and placed."""

import math
import os
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.modules.utils import consume_prefix_in_state_dict_if_present

from brainsex import SHAPE


class MriNet3d(nn.Module):
    """Three hidden layers of convolution, batch norm, ReLU and pooling, then one linear layer.

    In training the study's batch norms count voxels that reach no feature; these do not.

    Parameters
    ----------
    channels : of the first hidden layer; the second has twice, the third four times as many.
    shape : voxels of the input along X, Y, Z, at least 22 each, else ValueError.
    dropout : share of the features dropped before the linear layer.
    """

    def __init__(
        self, channels: int = 32, shape: tuple[int, int, int] = SHAPE, dropout: float = 0.5
    ) -> None:
        super().__init__()
        x, y, z = self.shape = tuple(shape)
        self.hidden1 = _hidden(3, 1, channels)
        self.hidden2 = _hidden(3, channels, 2 * channels)
        self.hidden3 = _hidden(3, 2 * channels, 4 * channels)
        self.dropout = nn.Dropout(dropout)
        self.linear = nn.Linear(4 * channels * _count_pooled(x, y, z), 2)

    def forward(self, volumes: Tensor) -> Tensor:
        """Return logits (N, 2), women and men, of volumes (N, 1, X, Y, Z)."""
        check_input(volumes, self.shape)
        features = self.hidden3(self.hidden2(self.hidden1(crop_unused_voxels(volumes))))
        return self.linear(self.dropout(features.flatten(1)))


class MriNet2d(nn.Module):
    """A convolution and three hidden layers on slabs of a volume, whose layers are the channels.

    Slabs follow each other along the second axis, Y. Other parameters are those of `MriNet3d`.

    Parameters
    ----------
    depth : layers of a slab; the study has 3 (23 slabs, the last layer unused) and 5 (14 slabs).
    residual : whether each hidden layer adds its input.
    """

    def __init__(
        self,
        depth: int = 3,
        *,
        channels: int = 32,
        shape: tuple[int, int, int] = SHAPE,
        residual: bool = False,
        dropout: float = 0.2,
    ) -> None:
        super().__init__()
        self.depth, self.shape = depth, tuple(shape)
        x, y, z = shape
        if depth not in range(1, y + 1):
            raise ValueError(f"expected slabs of 1 to {y} whole layers, found {depth}.")
        hidden = _Residual2d if residual else partial(_hidden, 2)
        self.convolution = nn.Conv2d(depth, channels, 3, padding=1)
        self.hidden1 = hidden(channels, channels)
        self.hidden2 = hidden(channels, 2 * channels)
        self.hidden3 = hidden(2 * channels, 4 * channels)
        self.dropout = nn.Dropout(dropout)
        self.linear = nn.Linear(4 * channels * _count_pooled(x, z), 2)

    def forward(self, volumes: Tensor) -> Tensor:
        """Return logits (N, S, 2), women and men, of the S slabs of volumes (N, 1, X, Y, Z)."""
        check_input(volumes, self.shape)
        slabs = volumes[:, 0].unfold(2, self.depth, self.depth)  # (N, X, S, Z, depth)
        slabs = slabs.permute(0, 2, 4, 1, 3).flatten(0, 1)
        features = self.hidden3(self.hidden2(self.hidden1(self.convolution(slabs))))
        return self.linear(self.dropout(features.flatten(1))).unflatten(0, (len(volumes), -1))


def _hidden(dimensions: int, inputs: int, outputs: int) -> nn.Sequential:
    """One hidden layer of `MriNet3d` or, with two dimensions, of `MriNet2d`."""
    names = (f"{name}{dimensions}d" for name in ("Conv", "BatchNorm", "MaxPool"))
    convolution, norm, pooling = (getattr(nn, name) for name in names)
    return nn.Sequential(convolution(inputs, outputs, 3), norm(outputs), nn.ReLU(), pooling(2))


class _Residual2d(nn.Sequential):
    """A hidden layer that adds its input, cropped and projected to its output, before the ReLU."""

    def __init__(self, inputs: int, outputs: int) -> None:
        projection = nn.Conv2d(inputs, outputs, 1) if inputs != outputs else nn.Identity()
        super().__init__(*_hidden(2, inputs, outputs), projection)

    def forward(self, images: Tensor) -> Tensor:
        convolution, norm, relu, pooling, projection = self
        cropped = nn.functional.pad(images, (-1, -1, -1, -1))  # two slices would make two gradients
        return pooling(relu(norm(convolution(images)) + projection(cropped)))


def _count_pooled(*sizes: int) -> int:
    """Count the voxels that three hidden layers leave of an input, or raise ValueError if none."""
    pooled = [(size - 14) // 8 for size in sizes]  # each layer takes two off, and halves the rest
    if min(pooled) < 1:
        raise ValueError(f"expected at least 22 voxels along each axis, found {sizes}.")
    return math.prod(pooled)


def crop_unused_voxels(volumes: Tensor) -> Tensor:
    """Drop the last voxels of each axis, 4 of 58, which poolings leave out of every feature."""
    x, y, z = (size - (size - 14) % 8 for size in volumes.shape[2:])
    return volumes[:, :, :x, :y, :z]


def check_input(volumes: Tensor, shape: tuple[int, int, int]) -> None:
    """Raise ValueError unless `volumes` are (N, 1, X, Y, Z) with `shape` along X, Y, Z."""
    if tuple(volumes.shape[1:]) != (1, *shape):
        expected = ", ".join(map(str, ("N", 1, *shape)))
        raise ValueError(f"expected volumes ({expected}), found {tuple(volumes.shape)}.")


def average_slab_logits(logits: Tensor) -> Tensor:
    """Average the logits of slabs (N, S, 2), and so their log-odds; logits (N, 2) stay."""
    return logits if logits.ndim == 2 else logits.mean(1)


def device() -> torch.device:
    """Return the GPU where there is one, unless BRAINSEX_DEVICE is cpu; otherwise the CPU."""
    on_cpu = os.environ.get("BRAINSEX_DEVICE") == "cpu" or not torch.cuda.is_available()
    return torch.device("cpu" if on_cpu else "cuda")


def fast_precision(device: torch.device) -> torch.dtype:
    """Return bfloat16 where the hardware multiplies it faster than float32, otherwise float32.

    DNNL_MAX_CPU_ISA, oneDNN's own bound on the instructions it uses, is respected.
    """
    faster = torch.cpu._is_avx512_bf16_supported() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    if device.type == "cuda":
        faster = torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.bfloat16 if faster else torch.float32


def to_device(network: nn.Module, device: torch.device) -> nn.Module:
    """Move a network to a device, channels last: its convolutions are fastest in that layout."""
    slabs = any(isinstance(module, nn.Conv2d) for module in network.modules())
    layout = torch.channels_last if slabs else torch.channels_last_3d
    return network.to(device, memory_format=layout)


def load_network(path: str | Path, shape: tuple[int, int, int] = SHAPE) -> MriNet3d | MriNet2d:
    """Load the network of a state dict, in evaluation mode; its form is read off the weights.

    A state dict of the published architecture loads too, with class 1 taken for man; a log-softmax
    after it changes no probability. It may lie in a checkpoint as ``state_dict``,
    ``model_state_dict`` or ``model``, with the usual prefixes. Nothing in the file is executed.
    Raises FileNotFoundError, or ValueError if the file holds no network for volumes of `shape`.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no network. Run notebook 04_cnn_3d (slabs: 03_cnn_2d).")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        names = ("state_dict", "model_state_dict", "model")
        state = next((state[name] for name in names if name in state), state)
        for prefix in ("_orig_mod.", "module.", "model.", "network."):  # of torch.compile, DDP, …
            consume_prefix_in_state_dict_if_present(state, prefix)
        weights = [value for name, value in state.items() if not name.endswith("batches_tracked")]
        if not all(value.is_floating_point() and value.isfinite().all() for value in weights):
            raise ValueError("weights that are not finite")
        with torch.device("meta"):  # no memory, until the weights are known to fit
            if "convolution.weight" in state:
                channels, depth = state["convolution.weight"].shape[:2]
                residual = "hidden2.4.weight" in state
                network = MriNet2d(depth, channels=channels, shape=shape, residual=residual)
            else:
                network = MriNet3d(len(state["hidden1.0.weight"]), shape)
        network.load_state_dict(state, assign=True)
    except Exception as error:
        if isinstance(error, OSError) and error.errno not in (None, 22):  # 22: a damaged offset
            raise
        problem = " ".join(str(error).split()).split(". ")[0][:300]
        expected = f"expected a state dict of MriNet3d or MriNet2d for {shape}, found {problem}"
        raise ValueError(f"{path}: {expected}; save network.state_dict()") from error
    return network.float().eval()


load = load_network
