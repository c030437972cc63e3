"""The study's CNNs (Kan et al. 2020, arXiv 2006.15969), and how they are loaded and placed."""

import math
import zipfile
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.modules.utils import consume_prefix_in_state_dict_if_present

from brainsex import SHAPE


class MriNet3d(nn.Module):
    """Three hidden layers of convolution, batch norm, ReLU and pooling, then one linear layer.

    It has 322,818 parameters at the study's sizes.

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
        self.shape, sizes = tuple(shape), _pooled_sizes(shape)
        if len(sizes) != 3 or min(sizes) < 1:
            raise ValueError(f"expected a shape of at least (22, 22, 22), found {shape}.")
        self.hidden1 = _hidden3d(1, channels)
        self.hidden2 = _hidden3d(channels, 2 * channels)
        self.hidden3 = _hidden3d(2 * channels, 4 * channels)
        self.dropout = nn.Dropout(dropout)
        self.linear = nn.Linear(4 * channels * math.prod(sizes), 2)

    def forward(self, volumes: Tensor) -> Tensor:
        """Return logits (N, 2), women and men, of volumes (N, 1, X, Y, Z)."""
        check_input(volumes, self.shape)
        features = self.hidden3(self.hidden2(self.hidden1(volumes)))
        return self.linear(self.dropout(features.flatten(1)))


class MriNet2d(nn.Module):
    """A convolution and three hidden layers on slabs of a volume, whose layers are the channels.

    Slabs follow each other along the second axis, Y. At the study's sizes a slab of 58×58 pixels
    leaves 5×5 of 128 channels. The other parameters are those of `MriNet3d`.

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
        self.depth, self.shape, sizes = depth, tuple(shape), _pooled_sizes(shape[::2])
        if len(shape) != 3 or min(sizes) < 1 or depth not in range(1, shape[1] + 1):
            raise ValueError(
                "expected a shape (X, Y, Z) of at least 22 voxels along X and Z, and slabs of 1 to "
                f"Y whole layers, found {shape} and {depth}."
            )
        hidden = _Residual2d if residual else _hidden2d
        self.convolution = nn.Conv2d(depth, channels, 3, padding=1)
        self.hidden1 = hidden(channels, channels)
        self.hidden2 = hidden(channels, 2 * channels)
        self.hidden3 = hidden(2 * channels, 4 * channels)
        self.dropout = nn.Dropout(dropout)
        self.linear = nn.Linear(4 * channels * math.prod(sizes), 2)

    def slabs(self, volumes: Tensor) -> Tensor:
        """Cut volumes (N, 1, X, Y, Z) into all their slabs (N S, depth, X, Z)."""
        check_input(volumes, self.shape)
        slabs = volumes[:, 0].unfold(2, self.depth, self.depth)  # (N, X, S, Z, depth)
        return slabs.permute(0, 2, 4, 1, 3).flatten(0, 1)

    def forward(self, volumes: Tensor) -> Tensor:
        """Return logits (N, S, 2), women and men, of the S slabs of volumes (N, 1, X, Y, Z)."""
        features = self.convolution(self.slabs(volumes))
        features = self.hidden3(self.hidden2(self.hidden1(features)))
        logits = self.linear(self.dropout(features.flatten(1)))
        return logits.unflatten(0, (len(volumes), -1))


def _hidden3d(inputs: int, outputs: int) -> nn.Sequential:
    """One hidden layer of `MriNet3d`."""
    return nn.Sequential(
        nn.Conv3d(inputs, outputs, 3), nn.BatchNorm3d(outputs), nn.ReLU(), nn.MaxPool3d(2)
    )


def _hidden2d(inputs: int, outputs: int) -> nn.Sequential:
    """One hidden layer of `MriNet2d`."""
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3), nn.BatchNorm2d(outputs), nn.ReLU(), nn.MaxPool2d(2)
    )


class _Residual2d(nn.Sequential):
    """A hidden layer that adds its input, cropped and projected to its output, before the ReLU."""

    def __init__(self, inputs: int, outputs: int) -> None:
        projection = nn.Conv2d(inputs, outputs, 1) if inputs != outputs else nn.Identity()
        super().__init__(*_hidden2d(inputs, outputs), projection)

    def forward(self, images: Tensor) -> Tensor:
        convolution, norm, relu, pooling, projection = self
        return pooling(relu(norm(convolution(images)) + projection(images[..., 1:-1, 1:-1])))


def _pooled_sizes(sizes: tuple[int, ...]) -> list[int]:
    """Sizes that three hidden layers leave of an input."""
    for _ in range(3):
        sizes = [(size - 2) // 2 for size in sizes]
    return sizes


def check_input(volumes: Tensor, shape: tuple[int, int, int]) -> None:
    """Raise ValueError unless `volumes` are (N, 1, X, Y, Z) with `shape` along X, Y, Z."""
    if tuple(volumes.shape[1:]) != (1, *shape):
        raise ValueError(
            f"expected volumes (N, 1, {', '.join(map(str, shape))}), found {tuple(volumes.shape)}."
        )


def average_slab_logits(logits: Tensor) -> Tensor:
    """Average the logits of slabs (N, S, 2), and so their log-odds; logits (N, 2) stay."""
    return logits if logits.ndim == 2 else logits.mean(1)


def device() -> torch.device:
    """Return the GPU where there is one, otherwise the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def fast_precision(device: torch.device) -> torch.dtype:
    """Return bfloat16 where the hardware multiplies it faster than float32, otherwise float32."""
    if device.type == "cuda":
        faster = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        faster = torch.cpu._is_avx512_bf16_supported()
    return torch.bfloat16 if faster else torch.float32


def to_device(network: nn.Module, device: torch.device) -> nn.Module:
    """Move a network to a device, channels last: its convolutions are fastest in that layout."""
    slabs = any(isinstance(module, nn.Conv2d) for module in network.modules())
    layout = torch.channels_last if slabs else torch.channels_last_3d
    return network.to(device, memory_format=layout)


def load_network(path: str | Path, shape: tuple[int, int, int] = SHAPE) -> MriNet3d | MriNet2d:
    """Load the network of a state dict, in evaluation mode; its form is read off the weights.

    A state dict of the published architecture loads too, with class 1 taken for man; a log-softmax
    after it changes no probability. A state dict may lie in a checkpoint as ``state_dict`` or
    ``model_state_dict``. Nothing in the file is executed.

    Raises
    ------
    FileNotFoundError, ValueError
        There is no such file; it holds no network for volumes of `shape` (X, Y, Z).
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(
            f"{path}: no such network. Run notebook 04_cnn_3d first (03_cnn_2d for slabs)."
        )
    try:
        state = read_checkpoint(path)
        state = state.get("state_dict", state.get("model_state_dict", state))
        consume_prefix_in_state_dict_if_present(state, "module.")  # of DataParallel
        if state.pop("_extra_state", torch.tensor(1)).item() != 1:  # in files of older versions
            raise ValueError("slabs along another axis than Y")
        if sum(value.numel() for value in state.values()) > path.stat().st_size:
            raise ValueError("more weights than the file has bytes")
        weights = [value for name, value in state.items() if not name.endswith("batches_tracked")]
        if not all(value.is_floating_point() and value.isfinite().all() for value in weights):
            raise ValueError("weights that are no finite numbers")
        if "convolution.weight" in state:
            channels, depth = state["convolution.weight"].shape[:2]
            form = {"channels": channels, "residual": "hidden2.4.weight" in state}
            make_network = partial(MriNet2d, depth, shape=shape, **form)
        else:
            make_network = partial(MriNet3d, len(state["hidden1.0.weight"]), shape)
        with torch.device("meta"):  # no memory, until the weights are known to fit
            network = make_network()
        network.load_state_dict(state, assign=True)
    except Exception as error:
        if isinstance(error, OSError) and error.errno:  # the disk's fault
            raise
        problem = " ".join(str(error).split())
        raise ValueError(
            f"{path}: no state dict of MriNet3d or MriNet2d for {shape} ({problem:.1000})."
        ) from error
    return network.float().eval()


load = load_network


def read_checkpoint(path: str | Path, device: torch.device | str = "cpu") -> dict:
    """Read what `torch.save` wrote of tensors and plain values; nothing in the file is executed.

    A file that is none raises whatever it provokes: see `storage.reading`.
    """
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:  # torch stores, and would inflate without a limit
            if any(info.compress_type != zipfile.ZIP_STORED for info in archive.infolist()):
                raise ValueError("its parts are compressed")
    return torch.load(path, map_location=device, weights_only=True)
