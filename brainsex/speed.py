"""How networks run fast: the same functions as the plain ones of `networks`, in another order."""

import contextlib
import copy
import ctypes
from collections.abc import Callable, Iterator
from functools import partial

import joblib
import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx
from torch.nn.utils.fusion import fuse_conv_bn_eval
from tqdm.auto import tqdm

from brainsex import networks

CPU_BATCH, GPU_BATCH = 2, 32
"""Volumes a pass: on a CPU one alone takes twice as long, more than a few leave the cache."""


def training_forward(network: nn.Module, batch: Tensor, moments: Tensor | None = None) -> Tensor:
    """Compute ``network(batch)``, for a `MriNet3d` in training faster than by its own forward.

    Pooling comes before the ReLU, with which a maximum commutes. The first batch norm is folded
    into its convolution: mean and variance of what that makes of one channel follow from the
    channel's `moments`, those of `patch_moments`. So the largest tensors are never normalised, and
    on a CPU they are made and pooled two or three volumes at a time. Statistics and gradients are
    those of the whole batch.
    """
    if type(network) is not networks.MriNet3d or not network.training:
        return network(batch)
    networks.check_input(batch, network.shape)
    features = _first_layer(network.hidden1, networks.crop_unused_voxels(batch), moments)
    for convolution, norm, relu, _ in (network.hidden2, network.hidden3):
        features = relu(_Pooling.apply(norm(convolution(features))))
    return network.linear(network.dropout(features.flatten(1)))


class _Pooling(torch.autograd.Function):
    """Max pooling by 2, in its input's precision, that saves no input for the gradient."""

    @staticmethod
    def forward(ctx: FunctionCtx, features: Tensor) -> Tensor:
        pooled, indices = torch.ops.aten.max_pool3d_with_indices(features, 2)
        ctx.save_for_backward(indices)
        ctx.layout = features.shape, features.stride()
        return pooled

    @staticmethod
    def backward(ctx: FunctionCtx, gradient: Tensor) -> Tensor:
        input_like = gradient.new_empty_strided(*ctx.layout)
        pool = torch.ops.aten.max_pool3d_with_indices_backward
        return pool(gradient, input_like, 2, 2, 0, 1, False, *ctx.saved_tensors)


def _first_layer(layer: nn.Sequential, volumes: Tensor, moments: Tensor | None = None) -> Tensor:
    """Compute ``layer(volumes)`` of volumes (N, 1, X, Y, Z) with the batch norm folded."""
    convolution, norm, relu, _ = layer
    # Batch norm removes any constant; without it bfloat16 gradients cancel less. Rounded to
    # bfloat16, the constant leaves a background of zeros exact.
    offset = volumes.detach().mean().bfloat16().float()
    with torch.autocast(volumes.device.type, enabled=False):
        total = (_patch_moments(volumes) if moments is None else moments).sum(0)
        products, sums, count = total[:-1, :-1], total[:-1, -1], total[-1, -1]
        kernels = convolution.weight.double().flatten(1)
        mean = kernels @ sums / count
        variance = ((kernels @ products * kernels).sum(1) / count - mean**2).clamp(min=0)
        scale = norm.weight / (variance + norm.eps).sqrt()
        centre = mean - offset * kernels.sum(1) + 0 * convolution.bias  # a gradient of 0, not None
        bias = norm.bias - scale * centre
        weight = scale.to(norm.weight.dtype).view(-1, 1, 1, 1, 1) * convolution.weight
        with torch.no_grad():
            norm.num_batches_tracked += 1
            mean, variance = mean + convolution.bias, variance * count / (count - 1)
            norm.running_mean.lerp_(mean.to(norm.running_mean.dtype), norm.momentum)
            norm.running_var.lerp_(variance.to(norm.running_var.dtype), norm.momentum)
    # none of one volume, which PyTorch convolves by slower code into another memory format
    parts = max(len(volumes) // CPU_BATCH, 1) if volumes.device.type == "cpu" else 1
    chunks = (volumes - offset).tensor_split(parts)
    pooled = [_Pooling.apply(nn.functional.conv3d(chunk, weight)) for chunk in chunks]
    return relu(torch.cat(pooled) + bias.to(weight.dtype).view(-1, 1, 1, 1))


def patch_moments(network: nn.Module, volumes: np.ndarray) -> Tensor:
    """Compute the moments that `training_forward` needs of volumes (N, X, Y, Z), once for all.

    They are (N, 28, 28), float64: of each volume, the sum over its 3×3×3 patches of the products
    of the 27 voxels and a 1 with each other. Other networks than `MriNet3d` need none: (N, 0).
    """
    if type(network) is not networks.MriNet3d:
        return torch.empty(len(volumes), 0)
    return map_volumes(lambda batch: _patch_moments(networks.crop_unused_voxels(batch)), volumes)


def _patch_moments(volumes: Tensor) -> Tensor:
    """Moments (n, 28, 28) of volumes (n, 1, X, Y, Z)."""
    x, y, z = (size - 2 for size in volumes.shape[2:])
    taps = [volumes[:, 0, a : a + x, b : b + y, c : c + z] for a, b, c in np.ndindex(3, 3, 3)]
    patches = torch.stack([*taps, torch.ones_like(taps[0])], 1).flatten(2)  # (n, 28, voxels)
    return (patches @ patches.mT).double()


def inference_copy(network: nn.Module, device: torch.device, fuse: bool = True) -> nn.Module:
    """Copy a network to a device, in evaluation mode, with parameters that need no gradient.

    With `fuse`, a `MriNet3d` gets its batch norms fused into its convolutions, and its poolings
    before its ReLUs: the same function, up to rounding. A copy may be copied again.
    """
    network = copy.deepcopy(network).eval().requires_grad_(False)
    if fuse and isinstance(network, networks.MriNet3d) and len(network.hidden1) == 4:
        for name in ("hidden1", "hidden2", "hidden3"):
            convolution, norm, relu, pooling = getattr(network, name)
            fused = fuse_conv_bn_eval(convolution, norm)
            setattr(network, name, nn.Sequential(fused, pooling, relu))
        network.hidden1[0].__class__ = _FirstConv3d  # the same weights, a faster gradient
    return networks.to_device(network, device)


class _FirstConv3d(nn.Conv3d):
    """A convolution of one channel that takes volumes of any precision."""

    def forward(self, volumes: Tensor) -> Tensor:
        return _InputGradient.apply(volumes, self.weight, self.bias)


class _InputGradient(torch.autograd.Function):
    """Convolution of one channel whose input's gradient is one matrix product and a sum over taps.

    PyTorch's own gradient is slower, except on processors with AMX (tests/benchmarks).
    """

    @staticmethod
    def forward(ctx: FunctionCtx, volumes: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(weight)
        volumes = volumes.to(weight.dtype, memory_format=torch.channels_last_3d)
        return nn.functional.conv3d(volumes, weight, bias)

    @staticmethod
    def backward(ctx: FunctionCtx, gradient: Tensor) -> tuple[Tensor, None, None]:
        (weight,) = ctx.saved_tensors
        taps, (count, _, *sizes) = weight.shape[2:], gradient.shape
        shape = count, *(size + tap - 1 for size, tap in zip(sizes, taps))
        dtype = torch.promote_types(gradient.dtype, torch.float32)
        input_gradient = gradient.new_zeros(shape, dtype=dtype)
        rows = gradient.movedim(1, -1).flatten(0, -2)
        products = (weight.flatten(1).T @ rows.T).view(*taps, count, *sizes)
        for tap in np.ndindex(*taps):
            x, y, z = (slice(start, start + size) for start, size in zip(tap, sizes))
            input_gradient[:, x, y, z] += products[tap]
        return input_gradient[:, None], None, None


def forward_in_chunks(network: nn.Module, volumes: Tensor) -> Tensor:
    """Compute ``network(volumes)``; on a CPU a volume's logits do not depend on the others."""
    if volumes.device.type != "cpu":
        return network(volumes)
    padded = torch.cat([volumes, *[volumes[-1:]] * (-len(volumes) % CPU_BATCH)])
    return torch.cat([network(chunk) for chunk in padded.split(CPU_BATCH)])[: len(volumes)]


def predict_logits(network: nn.Module, volumes: np.ndarray) -> Tensor:
    """Compute logits (N, 2), or (N, S, 2) of slabs, in float32, of volumes (N, X, Y, Z)."""
    fast = inference_copy(network, device := networks.device())
    size = CPU_BATCH if device.type == "cpu" else GPU_BATCH
    return map_volumes(partial(forward_in_chunks, fast), volumes, size).cpu()


def map_volumes(compute: Callable, volumes: np.ndarray, size: int | None = None) -> Tensor:
    """Return ``compute(batch)`` of volumes (N, X, Y, Z), by `map_batches`, in one tensor (N, …).

    It is made first: results kept one by one lie between, and so hold, what batches free.
    """
    device = networks.device()
    example = compute(torch.zeros(1, 1, *volumes.shape[1:], device=device))
    results = example.new_empty(len(volumes), *example.shape[1:])

    def work(rows: np.ndarray) -> None:
        results[rows] = compute(read_batch(volumes, rows, device))

    list(map_batches(work, len(volumes), device, size=size))
    return results


def map_batches(
    work: Callable, count: int, device: torch.device, *, name: str = "", size: int | None = None
) -> Iterator:
    """Yield ``work(rows)`` for the rows of each batch of `count` subjects, in their order.

    Batches have `size` subjects, by default one on a CPU and `GPU_BATCH` on a GPU. Each CPU core
    runs one, on one thread: results do not depend on their number. `name` labels a progress bar.
    """
    keep_memory()
    on_cpu, threads = device.type == "cpu", torch.get_num_threads()
    size = size or (1 if on_cpu else GPU_BATCH)
    batches = [np.arange(start, min(start + size, count)) for start in range(0, count, size)]
    workers = joblib.Parallel(threads if on_cpu else 1, require="sharedmem", return_as="generator")
    torch.set_num_threads(1 if on_cpu else threads)
    try:
        # no TF32: float32 means it, and bfloat16 is what is faster
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            results = workers(joblib.delayed(work)(rows) for rows in batches)
            yield from tqdm(results, name, total=len(batches), unit="batch", disable=not name)
    finally:
        torch.set_num_threads(threads)


def keep_memory() -> None:
    """Let glibc keep for this process what it frees, which the kernel would have to clear again."""
    with contextlib.suppress(AttributeError, TypeError):  # another C library, or Windows
        # M_MMAP_MAX, M_TRIM_THRESHOLD, M_ARENA_MAX
        for option, value in ((-4, 0), (-1, -1), (-8, 1)):
            ctypes.CDLL(None).mallopt(option, value)


def read_batch(volumes: np.ndarray, rows: np.ndarray, device: torch.device) -> Tensor:
    """Read volumes (n, 1, X, Y, Z) of rows in any order, in the order they lie on disk."""
    order = np.argsort(rows)
    batch = np.empty((len(rows), 1, *volumes.shape[1:]), np.float32)
    batch[order, 0] = volumes[rows[order]]
    return torch.from_numpy(batch).to(device, memory_format=torch.channels_last_3d)
