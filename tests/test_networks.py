"""The networks are the study's, layer by layer, and load from nothing but their own weights."""

import numpy as np
import pytest
import torch
from scipy.signal import correlate
from torch import nn

from brainsex import networks
from brainsex.networks import MriNet2d, MriNet3d

SHAPE = (22, 26, 24)
CPU = torch.device("cpu")

pytestmark = pytest.mark.usefixtures("one_cpu_thread")


def lively(network: nn.Module) -> nn.Module:
    """Give a network's batch norms statistics and weights of either sign."""
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d | nn.BatchNorm3d):
            nn.init.normal_(module.running_mean, 0.1, 0.3)
            nn.init.uniform_(module.running_var, 0.2, 3)
            nn.init.normal_(module.weight, 0.2, 1)
            nn.init.normal_(module.bias)
    return network


def make_3d(seed: int = 0, channels: int = 2, shape: tuple = SHAPE) -> MriNet3d:
    torch.manual_seed(seed)
    return lively(MriNet3d(channels, shape))


def make_2d(seed: int = 0, **options) -> MriNet2d:
    torch.manual_seed(seed)
    return lively(MriNet2d(**{"channels": 2, "shape": SHAPE} | options))


def make_volumes(count: int = 3, shape: tuple = SHAPE, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).random((count, *shape), np.float32)


def cut(volume: np.ndarray, depth: int) -> np.ndarray:
    """Slabs (S, depth, X, Z), one by one."""
    starts = range(0, volume.shape[1] - depth + 1, depth)
    return np.stack([volume[:, start : start + depth].swapaxes(0, 1) for start in starts])


def logits_by_hand(network: nn.Module, maps: np.ndarray) -> np.ndarray:
    """Logits (2,) in float64 by scipy, of a volume (1, X, Y, Z) or a slab (depth, X, Z)."""
    maps = maps_by_hand(network, maps, "hidden1", "hidden2", "hidden3")
    weight, bias = (value.double().numpy() for value in network.linear.state_dict().values())
    return weight @ maps.ravel() + bias


def maps_by_hand(network: nn.Module, maps: np.ndarray, *layers: str) -> np.ndarray:
    """Feature maps of a network's first layers, likewise."""
    state = {name: value.double().numpy() for name, value in network.state_dict().items()}

    def per_channel(name: str) -> np.ndarray:
        return state[name].reshape(-1, *[1] * (maps.ndim - 1))

    def convolve(maps: np.ndarray, name: str, mode: str) -> np.ndarray:
        sums = [
            sum(correlate(image, kernel, mode, "direct") for image, kernel in zip(maps, kernels))
            for kernels in state[f"{name}.weight"]
        ]
        return np.stack(sums) + per_channel(f"{name}.bias")

    maps = maps.astype(float)
    if "convolution.weight" in state:
        maps = convolve(np.pad(maps, ((0, 0), (1, 1), (1, 1))), "convolution", "valid")
    for hidden in layers:
        inputs, maps = maps, convolve(maps, f"{hidden}.0", "valid")
        names = ("running_mean", "running_var", "weight", "bias")
        mean, variance, scale, shift = (per_channel(f"{hidden}.1.{name}") for name in names)
        maps = (maps - mean) / np.sqrt(variance + 1e-5) * scale + shift
        if f"{hidden}.4.weight" in state:
            inputs = np.tensordot(state[f"{hidden}.4.weight"][:, :, 0, 0], inputs, 1)
            inputs += per_channel(f"{hidden}.4.bias")
        if hasattr(getattr(network, hidden), "4"):
            maps += inputs[:, 1:-1, 1:-1]
        halves = np.array(maps.shape[1:]) // 2  # an odd voxel at the end is left out
        even = np.maximum(maps, 0)[(slice(None), *(slice(2 * half) for half in halves))]
        pairs = even.reshape(-1, *np.column_stack([halves, 2 * np.ones_like(halves)]).ravel())
        maps = pairs.max(tuple(range(2, pairs.ndim, 2)))
    return maps


def test_sizes_and_names_are_the_studys() -> None:
    network = MriNet3d()
    assert sum(map(torch.numel, network.parameters())) == 322_818
    assert network.linear.in_features == 22_400
    names = ["0.weight", "0.bias", "1.weight", "1.bias", "1.running_mean", "1.running_var"]
    names += ["1.num_batches_tracked"]
    expected = [f"hidden{n}.{name}" for n in (1, 2, 3) for name in names]
    assert list(network.state_dict()) == [*expected, "linear.weight", "linear.bias"]


@pytest.mark.parametrize(("depth", "slabs"), [(3, 23), (5, 14)])
def test_the_studys_slabs(depth: int, slabs: int) -> None:
    network, expected = MriNet2d(depth), depth * 32 * 9 + 32
    for inputs, outputs in ((32, 32), (32, 64), (64, 128)):
        expected += inputs * outputs * 9 + outputs + 2 * outputs
    assert sum(map(torch.numel, network.parameters())) == expected + 128 * 5 * 5 * 2 + 2
    with torch.no_grad():
        assert network.eval()(torch.rand(2, 1, 58, 70, 58)).shape == (2, slabs, 2)


def test_3d_forward_is_the_studys_layers() -> None:
    shape = (23, 31, 24)
    network, volumes = make_3d(shape=shape).eval(), make_volumes(2, shape)
    with torch.no_grad():
        logits = network(torch.from_numpy(volumes)[:, None])
    expected = [logits_by_hand(network, volume[None]) for volume in volumes]
    np.testing.assert_allclose(logits, expected, atol=1e-5)


def test_batch_norm_counts_no_voxel_that_reaches_no_feature() -> None:
    volumes, buffers = torch.from_numpy(make_volumes())[:, None], []
    for last in (0, 9):  # of 24 voxels along Z the poolings leave 2 out
        network, volumes[..., 22:] = make_3d().train(), last
        network(volumes)
        buffers.append(network.hidden1[1].running_var)
    assert buffers[0].equal(buffers[1])


@pytest.mark.parametrize("residual", [False, True])
def test_2d_forward_is_the_studys_layers_on_slabs(residual: bool) -> None:
    shape = (23, 13, 31)
    network = make_2d(1, depth=5, shape=shape, residual=residual).eval()
    volumes = make_volumes(2, shape)
    with torch.no_grad():
        logits = network(torch.from_numpy(volumes)[:, None])
    assert logits.shape == (2, 2, 2)
    assert logits.std() > 0.05
    expected = [[logits_by_hand(network, slab) for slab in cut(volume, 5)] for volume in volumes]
    np.testing.assert_allclose(logits, expected, atol=1e-5)


@pytest.mark.parametrize(
    ("make", "options", "message"),
    [
        (MriNet3d, {"shape": (21, 26, 24)}, r"at least 22 voxels .*, found \(21, 26, 24\)"),
        (MriNet2d, {"depth": 0, "shape": SHAPE}, "of 1 to 26 whole layers, found 0"),
        (MriNet2d, {"shape": (22, 26, 21)}, r"at least 22 voxels .*\(22, 21\)"),
    ],
)
def test_sizes_that_do_not_fit(make: type, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(channels=2, **options)
    assert MriNet2d(2, channels=2, shape=(22, 3, 22)).linear.in_features == 8  # 22 across suffice


@pytest.mark.parametrize("make", [make_3d, make_2d])
@pytest.mark.parametrize("wrong", [(3, *SHAPE), (3, 1, 26, 22, 24), (3, 2, *SHAPE)])
def test_volumes_of_another_shape_are_refused(make: type, wrong: tuple) -> None:
    with pytest.raises(ValueError, match=r"expected volumes \(N, 1, 22, 26, 24\), found \(3, "):
        make()(torch.zeros(wrong))


@pytest.mark.parametrize(
    ("make", "options"),
    [(make_3d, {}), (make_2d, {"depth": 2}), (make_2d, {"depth": 2, "residual": True})],
)
def test_load_reads_the_form_off_the_weights(tmp_path, make: type, options: dict) -> None:
    network = make(3, channels=4, **options)
    torch.save(network.state_dict(), tmp_path / "fold-0.pt")
    loaded = networks.load(tmp_path / "fold-0.pt", SHAPE)
    assert not loaded.training
    volumes = torch.from_numpy(make_volumes())[:, None]
    with torch.no_grad():
        assert torch.equal(loaded(volumes), network.eval()(volumes))


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "_orig_mod.module.", "model."])
@pytest.mark.parametrize("key", ["state_dict", "model_state_dict", "model", None])
def test_load_takes_a_state_dict_as_people_save_it(tmp_path, key: str | None, prefix: str) -> None:
    state, path = make_3d().state_dict(), tmp_path / "fold-0.pt"
    named = {prefix + name: value for name, value in state.items()}
    torch.save(named if key is None else {"epoch": 3, key: named}, path)
    assert networks.load(path, SHAPE).hidden1[0].weight.equal(state["hidden1.0.weight"])


def test_load_says_what_to_save_instead_of_a_whole_network(tmp_path) -> None:
    torch.save(make_3d(), tmp_path / "whole.pt")
    with pytest.raises(ValueError, match=r"Weights only load failed; save network\.state_dict\(\)"):
        networks.load(tmp_path / "whole.pt", SHAPE)


class Hostile:
    """An object whose unpickling would print."""

    def __reduce__(self) -> tuple:
        return print, ("executed",)


def changed(name: str, value: torch.Tensor) -> dict:
    return MriNet3d(2, SHAPE).state_dict() | {name: value}


@pytest.mark.filterwarnings("ignore:Using a non-tuple sequence")
@pytest.mark.parametrize(
    "content",
    [
        MriNet3d(2, (22, 22, 38)).state_dict(),
        {"hidden1.0.weight": torch.zeros(2, 1, 3, 3, 3)},
        {"state_dict": 3},
        changed("linear.bias", torch.full((2,), torch.nan)),
        Hostile(),
        b"Subject,Gender\n",
    ],
    ids="sizes part nested nan pickle text".split(),
)
def test_load_refuses_what_is_no_state_dict(tmp_path, capsys, content: object) -> None:
    path = tmp_path / "fold-0.pt"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        torch.save(content, path)
    message = r"fold-0\.pt: expected a state dict of MriNet3d.*; save network\.state_dict\(\)"
    with pytest.raises(ValueError, match=message):
        networks.load(path, SHAPE)
    assert "executed" not in capsys.readouterr().out
