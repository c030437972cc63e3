"""The 3D network is the study's, and its inference form is the same function."""

import joblib
import numpy as np
import pytest
import torch
from scipy.signal import correlate
from torch import nn

from brainsex import networks
from brainsex.networks import MriNet3d, folded, one_thread_each

SHAPE = (22, 26, 24)
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def one_cpu_thread(monkeypatch):
    """Volumes as small as these only wait for a second thread, where others use the cores."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # for the processes of cross_validate
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def network(seed=0, channels=2, shape=SHAPE):
    """A network whose batch norms have seen something: statistics and weights of either sign."""
    torch.manual_seed(seed)
    made = MriNet3d(channels, shape)
    for module in made.modules():
        if isinstance(module, nn.BatchNorm3d):
            nn.init.normal_(module.running_mean, 0.1, 0.3)
            nn.init.uniform_(module.running_var, 0.2, 3)
            nn.init.normal_(module.weight, 0.2, 1)
            nn.init.normal_(module.bias)
    return made


def volumes(count=3, shape=SHAPE, seed=0):
    return np.random.default_rng(seed).random((count, *shape), np.float32)


def by_hand(made, volume):
    """Logits in float64 by scipy: convolution, batch norm, ReLU, pooling; thrice; then linear."""
    state = {name: value.double().numpy() for name, value in made.state_dict().items()}
    maps = volume[None].astype(float)
    for hidden in ("hidden1", "hidden2", "hidden3"):
        weight, bias = state[f"{hidden}.0.weight"], state[f"{hidden}.0.bias"]
        maps = np.stack(
            [
                sum(correlate(one, kernel, "valid", "direct") for one, kernel in zip(maps, kernels))
                for kernels in weight
            ]
        )
        maps += bias[:, None, None, None]
        mean, variance, scale, shift = (
            state[f"{hidden}.1.{name}"][:, None, None, None]
            for name in ("running_mean", "running_var", "weight", "bias")
        )
        maps = np.maximum((maps - mean) / np.sqrt(variance + 1e-5) * scale + shift, 0)
        even = maps[:, : maps.shape[1] // 2 * 2, : maps.shape[2] // 2 * 2, : maps.shape[3] // 2 * 2]
        pairs = np.array(even.shape[1:]) // 2
        maps = even.reshape(-1, pairs[0], 2, pairs[1], 2, pairs[2], 2).max((2, 4, 6))
    return state["linear.weight"] @ maps.ravel() + state["linear.bias"]


def test_the_study_s_sizes():
    made = MriNet3d()
    assert sum(parameter.numel() for parameter in made.parameters()) == 322_818
    assert made.linear.in_features == 22_400
    assert [made.hidden1[0].out_channels, made.hidden2[0].out_channels] == [32, 64]
    with torch.no_grad():
        assert made.eval()(torch.rand(1, 1, 58, 70, 58)).shape == (1, 2)
    names = ["0.weight", "0.bias", "1.weight", "1.bias", "1.running_mean", "1.running_var"]
    names += ["1.num_batches_tracked"]
    expected = [f"hidden{n}.{name}" for n in (1, 2, 3) for name in names]
    assert list(made.state_dict()) == [*expected, "linear.weight", "linear.bias"]


def test_forward_is_the_study_s_layers():
    shape = (23, 31, 24)  # odd sizes: pooling leaves the last voxel out
    made, images = network(shape=shape).eval(), volumes(2, shape)
    with torch.no_grad():
        found = made(torch.from_numpy(images)[:, None])
    for logits, image in zip(found, images):
        np.testing.assert_allclose(logits, by_hand(made, image), atol=1e-5)


def test_dropout_acts_in_training_alone():
    made, image = network(), torch.from_numpy(volumes(1))[:, None]
    with torch.no_grad():
        assert not torch.equal(made.train()(image), made(image))
        assert torch.equal(made.eval()(image), made(image))
        assert MriNet3d(2, SHAPE, dropout=0.25).dropout.p == 0.25


@pytest.mark.parametrize("shape", [(21, 26, 24), (22, 26), (22, 22, 22, 22)])
def test_shapes_that_leave_nothing(shape):
    with pytest.raises(ValueError, match=r"at least \(22, 22, 22\), found"):
        MriNet3d(2, shape)


@pytest.mark.parametrize("wrong", [(3, *SHAPE), (3, 1, 26, 22, 24), (3, 2, *SHAPE)])
def test_forward_refuses_volumes_of_another_shape(wrong):
    with pytest.raises(ValueError, match=r"expected volumes \(N, 1, 22, 26, 24\), found \(3, "):
        network()(torch.zeros(wrong))


@pytest.mark.parametrize(("channels", "shape"), [(2, SHAPE), (4, (31, 22, 38))])
def test_folded_is_the_same_function(channels, shape):
    made = network(1, channels, shape)
    image = torch.from_numpy(volumes(3, shape))[:, None]
    before = {name: value.clone() for name, value in made.state_dict().items()}
    assert made.training
    fast = folded(made)
    assert made.training
    assert all(parameter.requires_grad for parameter in made.parameters())
    for name, value in made.state_dict().items():
        assert torch.equal(value, before[name])
    assert not fast.training
    assert not any(parameter.requires_grad for parameter in fast.parameters())
    assert not any(isinstance(module, nn.BatchNorm3d) for module in fast.modules())
    with torch.no_grad():
        plain = made.eval()(image)
        np.testing.assert_allclose(fast(image), plain, atol=1e-5)
    assert plain.std() > 0.1
    for one, volume in zip(fast(image), volumes(3, shape)):
        np.testing.assert_allclose(one, by_hand(made, volume), atol=1e-5)


def test_folded_has_the_same_gradient():
    made = network(2).eval()
    one = torch.from_numpy(volumes(2))[:, None].requires_grad_()
    other = one.detach().clone().requires_grad_()
    made(one)[:, 1].sum().backward()
    folded(made)(other)[:, 1].sum().backward()
    largest = one.grad.abs().max().item()
    assert largest > 1e-4
    np.testing.assert_allclose(other.grad, one.grad, atol=1e-4 * largest)


def test_one_thread_each_puts_the_threads_back():
    torch.set_num_threads(3)
    with one_thread_each(CPU) as workers:
        assert workers == 3
        inside = joblib.Parallel(workers, require="sharedmem")(
            joblib.delayed(torch.get_num_threads)() for _ in range(6)
        )
        assert inside == [1] * 6
    assert torch.get_num_threads() == 3
    with pytest.raises(RuntimeError, match="boom"), one_thread_each(CPU):
        raise RuntimeError("boom")
    assert torch.get_num_threads() == 3
    with one_thread_each(torch.device("cuda")) as workers:
        assert workers == 1
        assert torch.get_num_threads() == 3


def test_batch_keeps_the_order_asked_for():
    images = volumes(9)
    found = networks.batch(images, np.array([7, 0, 3]), CPU)
    assert found.dtype == torch.float32
    np.testing.assert_array_equal(found[:, 0], images[[7, 0, 3]])


def test_evaluate_puts_the_mode_back_and_needs_no_gradient():
    made, images = network(), volumes(3)
    for mode in (True, False):
        made.train(mode)
        found = networks.evaluate(made, images, torch.float32)
        assert made.training == mode
        assert not found.requires_grad
        for logits, image in zip(found, images):
            np.testing.assert_allclose(logits, by_hand(made, image), atol=1e-5)
        with pytest.raises(ValueError, match="expected volumes"):
            networks.evaluate(made, volumes(2, (22, 22, 22)), torch.float32)
        assert made.training == mode


def test_half_the_precision_gives_nearly_the_same_logits():
    made, images = network(), volumes(3)
    single = networks.evaluate(made, images, torch.float32)
    half = networks.evaluate(made, images, torch.bfloat16)
    assert half.dtype == torch.float32
    assert not torch.equal(half, single)
    np.testing.assert_allclose(half, single, atol=0.05 * single.abs().max().item())


def test_load_reads_the_channels_off_the_weights(tmp_path):
    made = network(3, channels=4)
    torch.save(made.state_dict(), tmp_path / "fold-0.pt")
    found = networks.load(tmp_path / "fold-0.pt", SHAPE)
    assert not found.training
    image = torch.from_numpy(volumes())[:, None]
    with torch.no_grad():
        assert torch.equal(found(image), made.eval()(image))


class Hostile:
    """Unpickling it would say so."""

    def __reduce__(self):
        return print, ("executed",)


@pytest.mark.filterwarnings("ignore:Using a non-tuple sequence")
@pytest.mark.parametrize(
    "content",
    [
        MriNet3d(2, (22, 22, 38)).state_dict(),  # other sizes
        {"weight": torch.zeros(3)},
        {"hidden1.0.weight": torch.zeros(2, 1, 3, 3, 3)},
        {"hidden1.0.weight": 5},
        torch.zeros(3),
        [1, 2],
        Hostile(),
        b"Subject,Gender\n",
        b"",
    ],
    ids=["sizes", "other", "part", "number", "tensor", "list", "pickle", "text", "empty"],
)
def test_load_refuses_what_is_no_state_dict(tmp_path, capsys, content):
    path = tmp_path / "fold-0.pt"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        torch.save(content, path)
    with pytest.raises(ValueError, match=r"fold-0\.pt: no state dict of MriNet3d"):
        networks.load(path, SHAPE)
    assert "executed" not in capsys.readouterr().out


def test_load_of_an_absent_network_names_the_notebook(tmp_path):
    with pytest.raises(FileNotFoundError, match="04_cnn_3d"):
        networks.load(tmp_path / "fold-0.pt")
