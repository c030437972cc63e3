"""Each fast piece equals its plain form: outputs, gradients and running statistics."""

import copy
import ctypes
import sys

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from brainsex import networks, speed
from brainsex.networks import MriNet2d, MriNet3d
from tests.test_networks import CPU, SHAPE, lively, logits_by_hand, make_3d, make_volumes

pytestmark = pytest.mark.usefixtures("one_cpu_thread")


def batch_of(count: int, shape: tuple = SHAPE) -> Tensor:
    return torch.from_numpy(make_volumes(count, shape))[:, None]


def step(network: nn.Module, forward: object, batch: Tensor, weights: Tensor) -> dict:
    """Logits, gradients and statistics of a step with ``(logits * weights).sum()`` as loss."""
    torch.manual_seed(7)  # of the dropout
    batch = batch.clone().requires_grad_()
    logits = forward(batch)
    (logits.to(weights.dtype) * weights).sum().backward()
    gradients = {name: parameter.grad for name, parameter in network.named_parameters()}
    both = {"logits": logits.detach(), "batch": batch.grad}
    return both | gradients | dict(network.named_buffers())


def compare_steps(network: nn.Module, batch: Tensor, weights: Tensor) -> list[dict]:
    """Steps of `training_forward` and of the plain network, each from the same state."""
    plain = copy.deepcopy(network)
    fast = step(network, lambda batch: speed.training_forward(network, batch), batch, weights)
    return [fast, step(plain, plain, batch, weights)]


@pytest.mark.parametrize("count", [1, 2, 5])
@pytest.mark.parametrize("shape", [SHAPE, (23, 31, 24)])
def test_training_forward_is_the_networks_own(shape: tuple, count: int) -> None:
    torch.manual_seed(0)
    network = lively(MriNet3d(3, shape)).double()
    batch = batch_of(count, shape).double()
    weights = torch.randn_like(network.eval()(batch))
    fast, plain = compare_steps(network.train(), batch, weights)
    assert list(fast) == list(plain)
    for name in plain:
        torch.testing.assert_close(fast[name], plain[name], rtol=1e-9, atol=1e-9)
    assert plain["hidden1.1.num_batches_tracked"] == 1
    assert plain["batch"].abs().max() > 1e-3


def test_moments_known_beforehand_are_sums_over_patches_and_change_nothing() -> None:
    network, volumes = make_3d(), make_volumes(3, SHAPE)
    moments = speed.patch_moments(network, volumes)
    seen = volumes[:, :, :22, :22].astype(float)  # the poolings leave 4 of 26 and 2 of 24 out
    windows = np.lib.stride_tricks.sliding_window_view(seen, (3, 3, 3), (1, 2, 3))
    patches = windows.reshape(3, -1, 27)
    np.testing.assert_allclose(moments[:, 27, :27], patches.sum(1), rtol=1e-5)
    products = np.einsum("npi,npj->nij", patches, patches)
    np.testing.assert_allclose(moments[:, :27, :27], products, rtol=1e-5)
    assert moments[:, 27, 27].tolist() == [patches.shape[1]] * 3
    rows, batch = [2, 0], torch.from_numpy(volumes[[2, 0]])[:, None]
    network.train().dropout.p = 0.0
    known = speed.training_forward(network, batch, moments[rows])
    torch.testing.assert_close(known, network(batch), rtol=1e-4, atol=1e-4)
    assert speed.patch_moments(MriNet2d(channels=2, shape=SHAPE), volumes).shape == (3, 0)


@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 1e-5), (torch.bfloat16, 0.1)])
def test_the_first_layer_in_other_precisions(dtype: torch.dtype, limit: float) -> None:
    """Against float64; in bfloat16 it is also closer to that than the plain layer is."""
    torch.manual_seed(0)
    layer = networks.to_device(MriNet3d(8, SHAPE), CPU).hidden1
    plain, exact = copy.deepcopy(layer), copy.deepcopy(layer).double()
    batch, weights = batch_of(5), torch.randn(5, 8, *((size - 2) // 2 for size in SHAPE))

    cast = torch.autocast("cpu", dtype, enabled=dtype != torch.float32)  # of the forward alone
    fast = step(layer, cast(lambda batch: speed._first_layer(layer, batch)), batch, weights)
    usual = step(plain, cast(plain), batch, weights)
    truth = step(exact, exact, batch.double(), weights.double())
    for name in ("logits", "0.weight", "1.weight", "1.bias", "1.running_mean", "1.running_var"):
        error, usual_error = (
            (values[name].double() - truth[name]).norm() / truth[name].norm()
            for values in (fast, usual)
        )
        assert error < limit, name
        assert dtype == torch.float32 or name == "0.weight" or error < usual_error, name
    assert fast["logits"].is_contiguous(memory_format=torch.channels_last_3d)  # of 5, an odd number
    assert fast["0.bias"].abs().max() < 1e-3 * fast["1.bias"].abs().max()  # zero, but for rounding


def test_volumes_that_hardly_vary_give_no_nan() -> None:
    """Of large values, moments in float32 would differ by more than the variance, or less."""
    layer = MriNet3d(4, SHAPE).hidden1
    noise = torch.rand(2, 1, 8, 8, 8, generator=torch.Generator().manual_seed(0))
    features = speed._first_layer(layer, 3e3 + noise / 1e3)
    features.sum().backward()
    assert features.isfinite().all()
    assert layer[0].weight.grad.isfinite().all()
    assert all(buffer.isfinite().all() for buffer in layer.buffers())


def test_other_networks_and_evaluation_run_as_they_are() -> None:
    class Doubled(MriNet3d):
        def forward(self, volumes: Tensor) -> Tensor:
            return 2 * super().forward(volumes)

    flat, batch = MriNet2d(channels=2, shape=SHAPE, dropout=0.0), batch_of(2)
    assert torch.equal(speed.training_forward(flat, batch), flat(batch))
    network = make_3d().eval()
    before = [buffer.clone() for buffer in network.buffers()]
    assert torch.equal(speed.training_forward(network, batch), network(batch))
    assert all(map(torch.equal, before, network.buffers()))
    doubled = Doubled(2, SHAPE, dropout=0.0)
    doubled.load_state_dict(network.state_dict())
    logits, expected = speed.training_forward(doubled, batch), network.train()(batch)
    assert not torch.allclose(logits, expected)
    with pytest.raises(ValueError, match=r"expected volumes \(N, 1, 22, 26, 24\)"):
        speed.training_forward(network, batch_of(2, (26, 22, 24)))


# -------------------------------------------------------------------------------- inference


@pytest.mark.parametrize(("channels", "shape"), [(2, SHAPE), (4, (31, 22, 38))])
def test_an_inference_copy_is_the_same_function(channels: int, shape: tuple) -> None:
    network, volumes = make_3d(1, channels, shape), make_volumes(3, shape)
    before, state = copy.deepcopy(network.state_dict()), torch.get_rng_state()
    fast = speed.inference_copy(network, CPU)
    assert torch.equal(torch.get_rng_state(), state)
    assert network.training
    assert all(parameter.requires_grad for parameter in network.parameters())
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    assert not fast.training
    assert not any(parameter.requires_grad for parameter in fast.parameters())
    assert not any(isinstance(module, nn.BatchNorm3d) for module in fast.modules())
    expected = [logits_by_hand(network, volume[None]) for volume in volumes]
    assert np.std(expected) > 0.1
    np.testing.assert_allclose(fast(torch.from_numpy(volumes)[:, None]), expected, atol=1e-5)
    again = speed.inference_copy(fast, CPU)
    assert all(map(torch.equal, again.parameters(), fast.parameters()))


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("kernel", [(3, 3, 3), (2, 3, 1)])
def test_the_first_convolutions_gradient(count: int, kernel: tuple) -> None:
    fast, plain = speed._FirstConv3d(1, 5, kernel).double(), nn.Conv3d(1, 5, kernel).double()
    plain.load_state_dict(fast.state_dict())
    volumes = torch.randn(count, 1, 6, 8, 7, dtype=torch.float64)
    weights = torch.randn_like(plain(volumes))
    gradients = []
    for convolution in (fast, plain):
        batch = volumes.clone().requires_grad_()
        (convolution(batch) * weights).sum().backward()
        gradients.append(batch.grad)
    torch.testing.assert_close(*gradients, rtol=1e-12, atol=1e-12)


def test_chunks_have_a_fixed_size_and_keep_the_order() -> None:
    sizes = []

    class Sums(nn.Module):
        def forward(self, volumes: Tensor) -> Tensor:
            sizes.append(len(volumes))
            return volumes.flatten(1).sum(1, keepdim=True)

    volumes = torch.arange(5.0).reshape(5, 1, 1, 1, 1)
    assert speed.forward_in_chunks(Sums(), volumes).flatten().tolist() == [0, 1, 2, 3, 4]
    assert sizes == [speed.CPU_BATCH] * 3


@pytest.mark.parametrize("training", [True, False])
def test_predicted_logits_are_those_of_evaluation(training: bool) -> None:
    network, volumes = make_3d().train(training), make_volumes(3)
    logits = speed.predict_logits(network, volumes)
    assert network.training == training
    assert not logits.requires_grad
    expected = [logits_by_hand(network, volume[None]) for volume in volumes]
    np.testing.assert_allclose(logits, expected, atol=1e-5)


@pytest.mark.skipif(sys.platform != "linux", reason="of glibc alone")
def test_large_tensors_come_from_memory_that_is_kept() -> None:
    class Counts(ctypes.Structure):
        names = "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost"
        _fields_ = [(name, ctypes.c_size_t) for name in names.split()]

    if (mallinfo := getattr(ctypes.CDLL(None), "mallinfo2", None)) is None:
        pytest.skip("the C library does not say what it maps")
    mallinfo.restype = Counts
    list(speed.map_batches(lambda rows: rows, 1, CPU))
    mapped = mallinfo().hblkhd  # bytes, which are given back when they are freed
    tensor = torch.ones(25_000_000)
    assert mallinfo().hblkhd - mapped < tensor.nbytes


def test_map_batches_runs_one_thread_a_batch_and_restores_all(monkeypatch) -> None:
    flags, threads = [], []

    def work(rows: np.ndarray) -> list[int]:
        flags.append(torch.backends.cudnn.allow_tf32)
        threads.append(torch.get_num_threads())
        return rows.tolist()

    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    torch.set_num_threads(3)
    assert list(speed.map_batches(work, 5, CPU, size=2)) == [[0, 1], [2, 3], [4]]
    assert list(speed.map_batches(work, 2, CPU)) == [[0], [1]]
    assert threads == [1] * 5
    assert (torch.get_num_threads(), torch.backends.cudnn.allow_tf32) == (3, True)
    with pytest.raises(ZeroDivisionError):
        list(speed.map_batches(lambda rows: 1 / 0, 2, CPU))
    assert (torch.get_num_threads(), torch.backends.cudnn.allow_tf32) == (3, True)
    batches = list(speed.map_batches(work, 40, torch.device("cuda")))
    assert batches == [list(range(32)), list(range(32, 40))]
    assert threads[5:] == [3, 3]
    assert flags == [False] * 7
