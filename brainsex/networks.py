"""The study's CNNs, and in one place how a network runs: device, precision, layout, folding."""

import copy
import math
import pickle
import struct
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import joblib
import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.utils import consume_prefix_in_state_dict_if_present
from torch.nn.utils.fusion import fuse_conv_bn_eval
from tqdm.auto import tqdm

from brainsex import SHAPE

torch.backends.cudnn.allow_tf32 = False  # float32 means it; what trades precision is bfloat16


UNREADABLE = (RuntimeError, LookupError, TypeError, AttributeError, ValueError, EOFError)
UNREADABLE += (AssertionError, ArithmeticError, pickle.UnpicklingError, zipfile.BadZipFile)
UNREADABLE += (NotImplementedError, struct.error)
"""What a file that is no state dict raises."""


class MaxPool3d(nn.MaxPool3d):
    """PyTorch's, in its input's precision: a CPU's autocast would copy its input to float32."""

    def forward(self, features: Tensor) -> Tensor:
        with torch.autocast(features.device.type, enabled=False):
            return super().forward(features)


class _Hidden(nn.Sequential):
    """Convolution, batch norm, pooling and ReLU.

    The study has the ReLU before the pooling, which is the same function, to the bit.

    In training, the batch norm of a layer of one input channel is folded into its convolution, as
    in inference: the mean and the variance of what a convolution makes of one channel follow from
    the `_moments` of that channel. So a network's largest tensors are never normalised, and on a
    CPU made and pooled a few volumes at a time, in the cache. Statistics and gradients are still
    those of the whole batch.
    """

    def __init__(self, inputs: int, outputs: int):
        convolution, norm = nn.Conv3d(inputs, outputs, 3), nn.BatchNorm3d(outputs)
        super().__init__(convolution, norm, MaxPool3d(2), nn.ReLU())

    def forward(self, volumes: Tensor) -> Tensor:
        convolution, norm, pooling, relu = self
        if not norm.training or convolution.in_channels > 1:
            return super().forward(volumes)
        # the norm takes any constant out; without it gradients in bfloat16 cancel less. Of that
        # precision, it leaves a background of zeros exact
        middle = volumes.detach().mean().bfloat16().float()
        few = (volumes - middle).split(FEW if volumes.device.type == "cpu" else len(volumes))
        weight, bias = _normed(convolution, norm, few, middle)
        pooled = torch.cat([pooling(nn.functional.conv3d(some, weight)) for some in few])
        return relu(pooled + bias.view(-1, 1, 1, 1))  # in the bias's precision


def _normed(
    convolution: nn.Conv3d, norm: nn.BatchNorm3d, few: Sequence[Tensor], middle: Tensor
) -> tuple[Tensor, Tensor]:
    """Weight (C, 1, 3, 3, 3) and bias (C,) of a convolution with the batch norm after it folded in.

    `few` together, (n, 1, X, Y, Z) each, are the batch less `middle`: the norm's running statistics
    are those of the batch itself.
    """
    with torch.autocast(few[0].device.type, enabled=False):
        count, sums, products = _moments(few)
        kernels = convolution.weight.double().flatten(1)
        centre = kernels @ sums / count
        variance = (kernels @ products * kernels).sum(1) / count - centre**2
        mean = centre + convolution.bias
        scale = norm.weight / (variance + norm.eps).sqrt()
        bias = norm.bias + scale * (convolution.bias - mean)  # whose gradient is 0, and not None
        with torch.no_grad():
            norm.num_batches_tracked += 1
            unbiased = variance * count / (count - 1)
            mean = mean + middle * kernels.sum(1)
            for kept, new in ((norm.running_mean, mean), (norm.running_var, unbiased)):
                kept.lerp_(new.to(kept.dtype), norm.momentum)
        dtype = convolution.weight.dtype
        return scale.to(dtype).view(-1, 1, 1, 1, 1) * convolution.weight, bias.to(dtype)


def _moments(few: Sequence[Tensor]) -> tuple[int, Tensor, Tensor]:
    """Of all patches of 3×3×3 in volumes (n, 1, X, Y, Z): number, sum (27,), products (27, 27).

    Float64, of sums over planes across X in the volumes' precision, in a kernel's order. A sum of
    products serves all pairs of taps whose planes are as far apart.
    """
    x, y, z = (size - 2 for size in few[0].shape[2:])
    sums = torch.zeros(3, 9, dtype=torch.float64, device=few[0].device)
    products = sums.new_zeros(3, 9, 3, 9)
    for some in few:
        beside = some[:, 0].transpose(0, 1)
        taps = [beside[..., b : b + y, c : c + z] for b in range(3) for c in range(3)]
        planes = torch.stack(taps, 2).flatten(3)  # (X, n, 9, Y Z)
        alone = planes.sum(3).sum(1, dtype=torch.float64)
        pairs = [(planes[: x + 2 - step] @ planes[step:].mT).sum(1) for step in range(3)]
        for a in range(3):
            sums[a] += alone[a : a + x].sum(0)
            for b in range(a, 3):
                products[a, :, b] += pairs[b - a][a : a + x].sum(0, dtype=torch.float64)
    upper = products.view(27, 27)
    return sum(map(len, few)) * x * y * z, sums.flatten(), upper.triu() + upper.triu(1).T


def _hidden2d(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3), nn.BatchNorm2d(outputs), nn.MaxPool2d(2), nn.ReLU()
    )


class _Residual(nn.Sequential):
    """The same layer, which adds its input to what enters the ReLU.

    The input is cropped to the pixels that the convolution without padding is centred on, and
    projected (convolution of one pixel) where the number of channels differs.
    """

    def __init__(self, inputs: int, outputs: int):
        projection = nn.Conv2d(inputs, outputs, 1) if inputs != outputs else nn.Identity()
        super().__init__(*_hidden2d(inputs, outputs), projection)

    def forward(self, images: Tensor) -> Tensor:
        convolution, norm, pooling, relu, projection = self
        return relu(pooling(norm(convolution(images)) + projection(images[..., 1:-1, 1:-1])))


def _remaining(sizes) -> list[int]:
    """Sizes after three hidden layers; 22 is the least that leaves anything."""
    for _ in range(3):
        sizes = [(size - 2) // 2 for size in sizes]
    return sizes


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
        self.hidden1 = _Hidden(1, channels)
        self.hidden2 = _Hidden(channels, 2 * channels)
        self.hidden3 = _Hidden(2 * channels, 4 * channels)
        sizes = _remaining(shape)
        if len(sizes) != 3 or min(sizes) < 1:
            raise ValueError(f"expected a shape of at least (22, 22, 22), found {shape}.")
        self.dropout = nn.Dropout(dropout)
        self.linear = nn.Linear(4 * channels * math.prod(sizes), 2)

    def forward(self, volumes: Tensor) -> Tensor:
        """Logits (N, 2), women and men, of volumes (N, 1, X, Y, Z)."""
        _check(volumes, self.shape)
        features = self.hidden3(self.hidden2(self.hidden1(volumes)))
        # (N, C, X, Y, Z) flattens in that order whatever the memory layout
        return self.linear(self.dropout(features.flatten(1)))


class MriNet2d(nn.Module):
    """A convolution and three hidden layers on slabs of a volume, whose layers are the channels.

    After the study's 2D CNN, at whose sizes a slab of 58×58 pixels leaves 5×5 of 128 channels.

    Parameters
    ----------
    depth : layers of a slab; the study has 3 (23 slabs, the last layer unused) and 5 (14 slabs).
    axis : along which slabs follow each other: 0, 1, 2 for X, Y, Z.
    channels : of the first hidden layer; the second has twice, the third four times as many.
    shape : voxels of the input along X, Y, Z.
    residual : whether each hidden layer adds its input.
    dropout : share of the features dropped before the linear layer.

    Raises
    ------
    ValueError
        No such axis, slabs that do not fit into it, or too few voxels (22) along another one.
    """

    def __init__(
        self,
        depth: int = 3,
        *,
        axis: int = 1,
        channels: int = 32,
        shape: tuple[int, int, int] = SHAPE,
        residual: bool = False,
        dropout: float = 0.2,
    ):
        super().__init__()
        self.depth, self.axis, self.shape = depth, axis, tuple(shape)
        if len(shape) != 3 or axis not in (0, 1, 2):
            raise ValueError(
                f"expected a shape (X, Y, Z) and an axis of 0, 1 or 2, found {shape} and {axis}."
            )
        if depth not in range(1, shape[axis] + 1):
            raise ValueError(f"expected slabs of 1 to {shape[axis]} whole layers, found {depth}.")
        sizes = _remaining(np.delete(shape, axis).tolist())
        if min(sizes) < 1:
            raise ValueError(f"expected slabs of at least 22×22 voxels across, found {shape}.")
        hidden = _Residual if residual else _hidden2d
        self.convolution = nn.Conv2d(depth, channels, 3, padding=1)
        self.hidden1 = hidden(channels, channels)
        self.hidden2 = hidden(channels, 2 * channels)
        self.hidden3 = hidden(2 * channels, 4 * channels)
        self.dropout = nn.Dropout(dropout)
        self.linear = nn.Linear(4 * channels * math.prod(sizes), 2)

    def extra_repr(self) -> str:
        """What the layers' own descriptions do not say, and a checkpoint must not mix up."""
        return f"depth={self.depth}, axis={self.axis}, shape={self.shape}"

    def get_extra_state(self) -> Tensor:
        """The axis, which no weight's shape tells."""
        return torch.tensor(self.axis)

    def set_extra_state(self, state: Tensor) -> None:
        if state.item() != self.axis:
            raise ValueError(f"expected weights for axis {self.axis}, found axis {state.item()}.")

    def forward(self, volumes: Tensor) -> Tensor:
        """Logits (N, S, 2), women and men, of the S slabs of each of volumes (N, 1, X, Y, Z)."""
        _check(volumes, self.shape)
        slabs = volumes[:, 0].unfold(self.axis + 1, self.depth, self.depth)
        slabs = slabs.movedim((self.axis + 1, -1), (1, 2))  # (N, S, depth, A, B), a view until here
        features = self.convolution(slabs.flatten(0, 1))
        features = self.hidden3(self.hidden2(self.hidden1(features)))
        logits = self.linear(self.dropout(features.flatten(1)))
        return logits.unflatten(0, (len(volumes), -1))


def _check(volumes: Tensor, shape: tuple[int, int, int]) -> None:
    if tuple(volumes.shape[1:]) != (1, *shape):
        raise ValueError(
            f"expected volumes (N, 1, {', '.join(map(str, shape))}), found {tuple(volumes.shape)}."
        )


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


def workers() -> int:
    """How many networks to train at once: one a CPU core, in processes; one on a GPU."""
    return 1 if device().type == "cuda" else joblib.cpu_count()


class _InputGradient(torch.autograd.Function):
    """Convolution of one channel without padding, with a quick gradient with respect to its input.

    That gradient is one matrix product with the kernels and an addition a tap. PyTorch's takes a
    third of a mask's time at 32 channels, most of it at 8 (tests/benchmarks).
    """

    @staticmethod
    def forward(ctx, volumes: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(weight)
        volumes = volumes.to(weight.dtype, memory_format=torch.channels_last_3d)
        return nn.functional.conv3d(volumes, weight, bias)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None, None]:
        (weight,) = ctx.saved_tensors
        taps, (count, _, *sizes) = weight.shape[2:], gradient.shape
        shares = weight.flatten(1).T @ gradient.movedim(1, -1).flatten(0, -2).T
        shares = shares.view(*taps, count, *sizes)
        whole = count, *(size + tap - 1 for size, tap in zip(sizes, taps))
        dtype = torch.promote_types(gradient.dtype, torch.float32)
        found = torch.zeros(whole, dtype=dtype, device=gradient.device)
        for tap in np.ndindex(*taps):
            x, y, z = (slice(start, start + size) for start, size in zip(tap, sizes))
            found[:, x, y, z] += shares[tap]
        return found[:, None], None, None


class _First(nn.Conv3d):
    """The first convolution of a folded network, which takes volumes of any precision."""

    def forward(self, volumes: Tensor) -> Tensor:
        return _InputGradient.apply(volumes, self.weight, self.bias)


def folded(network: MriNet3d) -> MriNet3d:
    """A copy for inference: batch norm folded into the convolutions, pooling before the ReLU.

    Both are exact in evaluation, up to rounding: batch norm is then a fixed affine map, and the
    maximum commutes with the ReLU. Parameters need no gradient. The network itself is untouched.
    """
    network = copy.deepcopy(network).eval().requires_grad_(False)
    if isinstance(network.hidden1[0], _First):
        return network
    for name in ("hidden1", "hidden2", "hidden3"):
        convolution, norm, pooling, relu = getattr(network, name)
        setattr(network, name, nn.Sequential(fuse_conv_bn_eval(convolution, norm), pooling, relu))
    fused = network.hidden1[0]
    first = nn.utils.skip_init(_First, 1, fused.out_channels, fused.kernel_size)
    first.weight, first.bias = fused.weight, fused.bias
    network.hidden1[0] = first
    return network


def frozen(network: nn.Module, device: torch.device, fold: bool = True) -> nn.Module:
    """A copy on a device, in evaluation mode and without gradients of its own; 3D ones folded."""
    if fold and isinstance(network, MriNet3d):
        return place(folded(network), device)
    return place(copy.deepcopy(network).eval().requires_grad_(False), device)


def place(network: nn.Module, device: torch.device) -> nn.Module:
    """Move a network to a device, channels last: the layout its convolutions are fastest in."""
    flat = any(isinstance(module, nn.Conv2d) for module in network.modules())
    layout = torch.channels_last if flat else torch.channels_last_3d
    return network.to(device, memory_format=layout)


FEW = 2
"""Volumes a pass on a CPU: for a single one in float32 PyTorch takes its own convolution, twice to
three times as slow as oneDNN's (tests/benchmarks), and more than a few leave the cache."""


def passes(network: nn.Module, volumes: Tensor) -> Tensor:
    """Logits of volumes (N, 1, X, Y, Z): on a CPU `FEW` a pass, so that none depend on how many."""
    if volumes.device.type != "cpu":
        return network(volumes)
    missing = -len(volumes) % FEW
    padded = torch.cat([volumes, *[volumes[-1:]] * missing])
    return torch.cat([network(few) for few in padded.split(FEW)])[: len(volumes)]


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


def in_batches(
    work: Callable[[np.ndarray], object],
    count: int,
    device: torch.device,
    *,
    name: str | None = None,
    size: int | None = None,
) -> Iterator:
    """What `work` gives for the rows of each batch of `count` subjects, in their order.

    Batches are of one subject on a CPU, where one a core runs at once, and of 32 on a GPU, unless
    `size` is given. A progress bar is shown under `name`.
    """
    size = size or (32 if device.type == "cuda" else 1)
    batches = [np.arange(start, min(start + size, count)) for start in range(0, count, size)]
    with one_thread_each(device) as workers:
        done = joblib.Parallel(workers, require="sharedmem", return_as="generator")(
            joblib.delayed(work)(rows) for rows in batches
        )
        yield from tqdm(done, name, total=len(batches), unit="batch", disable=name is None)


def batch(volumes: np.ndarray, rows: np.ndarray, device: torch.device) -> Tensor:
    """Volumes (n, 1, X, Y, Z) of some rows, read in the order they lie on disk."""
    order = np.argsort(rows)
    stacked = np.empty((len(rows), 1, *volumes.shape[1:]), np.float32)
    stacked[order, 0] = volumes[rows[order]]
    return torch.from_numpy(stacked).to(device, memory_format=torch.channels_last_3d)


def autocast(device: torch.device, dtype: torch.dtype) -> torch.autocast:
    """Where networks compute in `dtype` what is safe in it."""
    return torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32)


def evaluate(network: nn.Module, volumes: np.ndarray, dtype: torch.dtype) -> Tensor:
    """Logits (N, 2), or of slabs (N, S, 2), float32, of volumes (N, X, Y, Z) in evaluation mode.

    Computed in `dtype` by a frozen copy on the network's own device: on a CPU, one subject's do
    not depend on how many there are.
    """
    device = next(network.parameters()).device
    ready = frozen(network, device)

    @torch.no_grad()
    def some(rows: np.ndarray) -> Tensor:
        with autocast(device, dtype):
            return passes(ready, batch(volumes, rows, device)).float().cpu()

    size = None if device.type == "cuda" else FEW
    return torch.cat(list(in_batches(some, len(volumes), device, size=size)))


def by_subject(logits: Tensor) -> Tensor:
    """Logits (N, 2): of a subject's slabs (N, S, 2) the mean, and so the mean of their log-odds."""
    return logits if logits.ndim == 2 else logits.mean(1)


def load(path: str | Path, shape: tuple[int, int, int] = SHAPE) -> MriNet3d | MriNet2d:
    """The network of a state dict, in evaluation mode; its form is read off the weights.

    One saved from the published architecture loads too: its parts have these names and shapes, and
    whether its head was a log-softmax or logits makes no difference to the probabilities. Class 1
    is taken for man: nothing in a state dict says so. One that lies in a checkpoint as
    ``state_dict`` or ``model_state_dict`` is taken out of it.

    Raises
    ------
    FileNotFoundError
        No such file: notebook 04 (``python -m brainsex train``) writes it, 03 that of slabs.
    ValueError
        No state dict of `MriNet3d` or `MriNet2d` for volumes of `shape`. Nothing in the file is
        executed.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(
            f"{path}: no such network. Run notebook 04_cnn_3d first (03_cnn_2d for slabs)."
        )
    try:
        state = read(path)
        state = state.get("state_dict", state.get("model_state_dict", state))
        consume_prefix_in_state_dict_if_present(state, "module.")  # of DataParallel
        if sum(value.numel() for value in state.values()) > path.stat().st_size:
            raise ValueError("more weights than the file has bytes")
        if not all(value.isfinite().all() for value in state.values()):
            raise ValueError("weights that are not finite")
        others = ("num_batches_tracked", "_extra_state")
        weights = [value for name, value in state.items() if not name.endswith(others)]
        if not all(value.is_floating_point() for value in weights):
            raise ValueError("weights that are no floating-point numbers")
        if "convolution.weight" in state:
            channels, depth = state["convolution.weight"].shape[:2]
            form = {"axis": state["_extra_state"].item(), "residual": "hidden2.4.weight" in state}
            make = partial(MriNet2d, depth, channels=channels, shape=shape, **form)
        else:
            make = partial(MriNet3d, len(state["hidden1.0.weight"]), shape)
        with torch.device("meta"):  # no memory, until the weights are known to fit
            network = make()
        network.load_state_dict(state, assign=True)
    except UNREADABLE as error:
        why = " ".join(str(error).split())
        raise ValueError(
            f"{path}: no state dict of MriNet3d or MriNet2d for {shape} ({why:.1000})."
        ) from error
    return network.float().eval()


def read(path: str | Path, device: torch.device | str = "cpu"):
    """What `torch.save` wrote, of tensors and plain values: nothing in the file is executed.

    Any of `UNREADABLE` where it is no such file.
    """
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:  # torch stores, and would inflate without a limit
            if any(info.compress_type != zipfile.ZIP_STORED for info in archive.infolist()):
                raise ValueError("its parts are compressed")
    return torch.load(path, map_location=device, weights_only=True)
