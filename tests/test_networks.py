"""The networks are the study's, and the inference form is the same function."""

import copy

import joblib
import numpy as np
import pytest
import torch
from scipy.signal import correlate, correlate2d
from torch import nn

from brainsex import networks
from brainsex.networks import MriNet2d, MriNet3d, folded, one_thread_each

SHAPE = (22, 26, 24)
CPU = torch.device("cpu")

pytestmark = pytest.mark.usefixtures("one_cpu_thread")


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


# ------------------------------------------------------------------------------- the 2D network


def flat_network(seed=0, **options):
    """The same as `network`, of slabs."""
    torch.manual_seed(seed)
    made = MriNet2d(**{"channels": 2, "shape": SHAPE} | options)
    for module in made.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean, 0.1, 0.3)
            nn.init.uniform_(module.running_var, 0.2, 3)
            nn.init.normal_(module.weight, 0.2, 1)
            nn.init.normal_(module.bias)
    return made


def cut(volume, depth, axis):
    """Slabs (S, depth, A, B), one by one."""
    moved = np.moveaxis(volume, axis, 0)
    return np.stack([moved[n : n + depth] for n in range(0, len(moved) - depth + 1, depth)])


def slab_by_hand(made, slab):
    """Logits in float64 by scipy of one slab (depth, A, B)."""
    state = {name: value.double().numpy() for name, value in made.state_dict().items()}

    def convolved(maps, name, mode):
        sums = [
            sum(correlate2d(one, kernel, mode) for one, kernel in zip(maps, kernels))
            for kernels in state[f"{name}.weight"]
        ]
        return np.stack(sums) + state[f"{name}.bias"][:, None, None]

    maps = convolved(slab.astype(float), "convolution", "same")
    for hidden in ("hidden1", "hidden2", "hidden3"):
        inputs, maps = maps, convolved(maps, f"{hidden}.0", "valid")
        mean, variance, scale, shift = (
            state[f"{hidden}.1.{name}"][:, None, None]
            for name in ("running_mean", "running_var", "weight", "bias")
        )
        maps = (maps - mean) / np.sqrt(variance + 1e-5) * scale + shift
        if f"{hidden}.4.weight" in state:
            inputs = np.tensordot(state[f"{hidden}.4.weight"][:, :, 0, 0], inputs, 1)
            inputs += state[f"{hidden}.4.bias"][:, None, None]
        if hasattr(getattr(made, hidden), "4"):
            maps += inputs[:, 1:-1, 1:-1]
        pairs = np.array(maps.shape[1:]) // 2
        even = np.maximum(maps, 0)[:, : 2 * pairs[0], : 2 * pairs[1]]
        maps = even.reshape(-1, pairs[0], 2, pairs[1], 2).max((2, 4))
    return state["linear.weight"] @ maps.ravel() + state["linear.bias"]


@pytest.mark.parametrize(("depth", "slabs"), [(3, 23), (5, 14)])
def test_the_study_s_slabs(depth, slabs):
    made = MriNet2d(depth)
    expected = depth * 32 * 9 + 32  # convolution
    for inputs, outputs in ((32, 32), (32, 64), (64, 128)):
        expected += inputs * outputs * 9 + outputs + 2 * outputs
    expected += 128 * 5 * 5 * 2 + 2
    assert sum(parameter.numel() for parameter in made.parameters()) == expected
    assert made.dropout.p == 0.2
    with torch.no_grad():
        assert made.eval()(torch.rand(2, 1, 58, 70, 58)).shape == (2, slabs, 2)


@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("depth", [1, 4, 22])
def test_slabs_are_cut_along_the_axis(axis, depth):
    made, images = flat_network(depth=depth, axis=axis, shape=(24, 26, 28)), []
    made.convolution.register_forward_hook(lambda *call: images.append(call[1][0]))
    given = volumes(2, (24, 26, 28))
    with torch.no_grad():
        made(torch.from_numpy(given)[:, None])
    expected = np.concatenate([cut(volume, depth, axis) for volume in given])
    np.testing.assert_array_equal(images[0], expected)


@pytest.mark.parametrize("residual", [False, True])
def test_slab_logits_are_the_study_s_layers(residual):
    shape = (23, 13, 31)  # odd sizes: pooling leaves the last pixel out
    made = flat_network(1, depth=5, shape=shape, residual=residual).eval()
    given = volumes(2, shape)
    found = networks.evaluate(made, given, torch.float32)
    assert found.shape == (2, 2, 2)
    assert found.std() > 0.05
    for logits, volume in zip(found, given):
        expected = [slab_by_hand(made, slab) for slab in cut(volume, 5, 1)]
        np.testing.assert_allclose(logits, expected, atol=1e-5)


def test_the_residual_form_adds_its_input():
    """With nothing but zeros in the convolutions, what is left is the input, cropped and pooled."""
    made = flat_network(residual=True).eval()
    for hidden in (made.hidden1, made.hidden2):
        for parameter in (*hidden[0].parameters(), *hidden[1].parameters()):
            nn.init.zeros_(parameter)
    pictures = torch.arange(2 * 8 * 10.0).view(1, 2, 8, 10)
    expected = pictures[..., 2:-1:2, 2:-1:2]  # the larger of each pair, the border left out
    with torch.no_grad():
        np.testing.assert_array_equal(made.hidden1(pictures), expected)
        nn.init.eye_(made.hidden2[4].weight.view(4, 2))
        nn.init.constant_(made.hidden2[4].bias, 7)
        found = made.hidden2(pictures)
    np.testing.assert_array_equal(found[:, :2], expected + 7)
    assert (found[:, 2:] == 7).all()


def test_relus_are_modules():
    """Guided backpropagation finds no other."""
    for made in (MriNet3d(2, SHAPE), flat_network(), flat_network(residual=True)):
        calls = []
        for module in made.modules():
            if isinstance(module, nn.ReLU):
                module.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        with torch.no_grad():
            made(torch.zeros(1, 1, *SHAPE))
        assert len(calls) == 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"axis": 3}, "an axis of 0, 1 or 2, found .* and 3"),
        ({"axis": -1}, "an axis of 0, 1 or 2, found .* and -1"),
        ({"depth": 0}, "slabs of 1 to 26 whole layers, found 0"),
        ({"depth": 27}, "slabs of 1 to 26 whole layers, found 27"),
        ({"depth": 23, "axis": 0}, "slabs of 1 to 22 whole layers, found 23"),
        ({"depth": 2.5}, "whole layers, found 2.5"),
        ({"shape": (22, 26)}, r"a shape \(X, Y, Z\)"),
        ({"shape": (21, 26, 24)}, r"at least 22×22 voxels across, found \(21, 26, 24\)"),
    ],
)
def test_slabs_that_do_not_fit(options, message):
    with pytest.raises(ValueError, match=message):
        MriNet2d(**{"channels": 2, "shape": SHAPE} | options)


def test_slabs_need_22_voxels_only_across():
    made = MriNet2d(2, channels=2, shape=(22, 3, 22)).eval()
    assert made(torch.zeros(1, 1, 22, 3, 22)).shape == (1, 1, 2)


def test_slabs_of_volumes_of_another_shape_are_refused():
    with pytest.raises(ValueError, match=r"expected volumes \(N, 1, 22, 26, 24\), found \(3, "):
        flat_network()(torch.zeros(3, 1, 26, 22, 24))


def test_the_axis_is_in_the_description_that_checkpoints_compare():
    cube = (24, 24, 24)
    one, other = (flat_network(shape=cube, axis=axis) for axis in (0, 2))
    assert str(one) != str(other)
    with pytest.raises(ValueError, match="expected weights for axis 2, found axis 0"):
        other.load_state_dict(one.state_dict())


@pytest.mark.parametrize("residual", [False, True])
def test_load_reads_the_form_of_slabs_off_the_weights(tmp_path, residual):
    made = flat_network(3, channels=4, depth=2, axis=2, residual=residual)
    torch.save(made.state_dict(), tmp_path / "fold-0.pt")
    found = networks.load(tmp_path / "fold-0.pt", SHAPE)
    assert not found.training
    assert str(found) == str(made)
    image = torch.from_numpy(volumes())[:, None]
    with torch.no_grad():
        assert torch.equal(found(image), made.eval()(image))
    with pytest.raises(ValueError, match=r"fold-0\.pt: no state dict of MriNet3d or MriNet2d"):
        networks.load(tmp_path / "fold-0.pt", (30, 30, 30))


def test_a_subject_is_the_mean_of_its_slabs_log_odds():
    slabs = torch.tensor([[[0.0, 1], [0, 2], [5, 0]], [[1, 0], [1, 1], [0, 4]]])
    found = networks.by_subject(slabs)
    np.testing.assert_allclose(found[:, 1] - found[:, 0], [(1 + 2 - 5) / 3, (-1 + 0 + 4) / 3])
    assert networks.by_subject(found) is found


def test_networks_are_placed_channels_last():
    flat, solid = (networks.place(made, CPU) for made in (flat_network(), network()))
    assert flat.hidden2[0].weight.is_contiguous(memory_format=torch.channels_last)
    assert solid.hidden2[0].weight.is_contiguous(memory_format=torch.channels_last_3d)


# ---------------------------------------------------------------------------- memory and speed


def trained(layer, images, weights, dtype):
    """Output, gradients and statistics of a step with ``(output * weights).sum()`` as the loss."""
    given = images.clone().requires_grad_()
    with networks.autocast(CPU, dtype):
        out = layer(given)
    (out.to(weights.dtype) * weights).sum().backward()
    return out, given.grad, *(one.grad for one in layer.parameters()), *layer.buffers()


@pytest.mark.parametrize("count", [1, 2, 5])
@pytest.mark.parametrize("shape", [(4, 4, 4), (9, 8, 7), (6, 13, 10)])
def test_the_first_layer_trains_as_its_parts(count, shape):
    layer = MriNet3d(6, (22, 24, 26)).hidden1.double()
    for parameter in layer.parameters():
        nn.init.normal_(parameter)  # norms that mirror among them
    parts = nn.Sequential(*copy.deepcopy(layer))
    images = torch.rand(count, 1, *shape, dtype=torch.float64)
    weights = torch.randn(count, 6, *((size - 2) // 2 for size in shape), dtype=torch.float64)
    found, expected = (trained(made, images, weights, torch.float32) for made in (layer, parts))
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 1e-5), (torch.bfloat16, 0.1)])
def test_the_first_layer_trains_in_other_precisions(dtype, limit):
    torch.manual_seed(0)
    layer = networks.place(MriNet3d(8, (22, 24, 26)), CPU).hidden1
    parts = nn.Sequential(*copy.deepcopy(layer))
    exact = copy.deepcopy(parts).double()
    images = torch.from_numpy(volumes(5))[:, None]
    weights = torch.randn(5, 8, *((size - 2) // 2 for size in SHAPE))
    found, usual = (trained(one, images, weights, dtype) for one in (layer, parts))
    truth = trained(exact, images.double(), weights.double(), torch.float32)
    for what in (0, 2, 4, 5, 6, 7):  # output, gradients but of the bias, which is 0, statistics
        error = (found[what].double() - truth[what]).norm() / truth[what].norm()
        assert error < limit, what
        if dtype == torch.bfloat16 and what != 2:
            assert error < (usual[what].double() - truth[what]).norm() / truth[what].norm()
    assert found[3].abs().max() < 1e-3 * found[5].abs().max()


def test_volumes_that_hardly_vary_give_no_nan():
    """Of large values, moments in float32 would differ by more than the variance, or less."""
    layer = MriNet3d(4, (22, 24, 26)).hidden1
    out = layer(3e3 + torch.rand(2, 1, 8, 8, 8, generator=torch.Generator().manual_seed(0)) / 1e3)
    out.sum().backward()
    assert out.isfinite().all()
    assert all(one.isfinite().all() for one in (layer[0].weight.grad, *layer.buffers()))


def test_only_a_training_batch_moves_the_first_layer_s_statistics():
    layer, images = MriNet3d(2, (22, 24, 26)).hidden1, torch.rand(2, 1, 8, 8, 8)
    before = [one.clone() for one in layer.buffers()]
    layer.eval()(images)
    assert all(map(torch.equal, before, layer.buffers()))
    layer.train()(images)
    assert not any(map(torch.equal, before, layer.buffers()))


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("kernel", [(3, 3, 3), (2, 3, 1)])
def test_the_first_convolution_s_gradient(count, kernel):
    first = networks._First(1, 5, kernel).double()
    plain = nn.Conv3d(1, 5, kernel).double()
    plain.load_state_dict(first.state_dict())
    volumes = torch.randn(count, 1, 6, 8, 7, dtype=torch.float64)
    weights = torch.randn_like(plain(volumes))
    gradients = []
    for made in (first, plain):
        given = volumes.clone().requires_grad_()
        (made(given) * weights).sum().backward()
        gradients.append(given.grad)
    torch.testing.assert_close(*gradients, rtol=1e-12, atol=1e-12)


def test_the_first_convolution_in_bfloat16_gives_gradients_in_the_volumes_precision():
    first = networks._First(1, 4, 3).bfloat16()
    given = torch.rand(2, 1, 6, 8, 7, requires_grad=True)
    first(given).float().sum().backward()
    rows = first.weight.detach().double().sum(0, keepdim=True).sum((2, 3, 4))
    assert given.grad.dtype == torch.float32
    torch.testing.assert_close(
        given.grad[:, :, 2:-2, 2:-2, 2:-2].double(),
        rows.reshape(1, 1, 1, 1, 1).expand(2, 1, 2, 4, 3),
        rtol=0.02,
        atol=0.02,
    )


def test_folding_twice_is_folding_once_and_draws_nothing():
    made = MriNet3d(2, (22, 24, 26))
    state = torch.get_rng_state()
    once = folded(made)
    assert torch.equal(torch.get_rng_state(), state)
    for one, other in zip(once.parameters(), folded(once).parameters(), strict=True):
        assert torch.equal(one, other)


def test_passes_are_of_a_fixed_size_and_in_order():
    sizes = []

    class Noted(nn.Module):
        def forward(self, volumes):
            sizes.append(len(volumes))
            return volumes.flatten(1).sum(1, keepdim=True)

    volumes = torch.arange(5.0).reshape(5, 1, 1, 1, 1)
    assert networks.passes(Noted(), volumes).flatten().tolist() == [0, 1, 2, 3, 4]
    assert sizes == [networks.FEW] * 3
