"""The picture of a network's architecture, drawn from the network itself."""

import itertools
from functools import partial
from math import prod

import numpy as np
import torch
from matplotlib import pyplot as plt
from matplotlib.collections import PolyCollection
from matplotlib.colors import to_rgb

from brainsex import figures


@plt.rc_context(figures.STYLE)
def draw(network, *, title):
    """Layers, their sizes and parameters, drawn from the network itself by a forward pass.

    It has a `shape` (X, Y, Z), takes (N, 1, X, Y, Z), and is left as it was found.
    """
    blocks, children = _trace(network), dict(network.named_children())
    counts = {name: sum(p.numel() for p in child.parameters()) for name, child in children.items()}
    hues = itertools.cycle(("#56B4E9", "#009E73", "#E69F00", "#CC79A7"))
    colours = {name: next(hues) if counts[name] else figures.PALE for name in counts}
    colours["input"] = figures.PALE
    figure, ax = figures.opened(1, 1, figsize=(1.42 * len(blocks), 3.6))
    small = {"ha": "center", "fontsize": 8}
    for place, (name, layers, shape) in enumerate(blocks):
        _block(ax, place, shape, 0.6 / max(network.shape) ** 0.5, colours[name])
        ax.text(place, -0.58, " × ".join(f"{size:,}" for size in shape), **small)
        if layers:
            ax.text(place - 0.5, 0.5, "\n".join(layers), color="#555555", **small)
            arrow = {"arrowstyle": "->", "color": "#777777"}
            ax.annotate("", (place - 0.42, 0), (place - 0.58, 0), arrowprops=arrow)
    for name, group in itertools.groupby(range(len(blocks)), lambda place: blocks[place][0]):
        start, *_, end = [place + side for place in group for side in (-0.42, 0.42)]
        ax.plot([start, end], [-0.66] * 2, color=colours[name], linewidth=3)
        ax.text((start + end) / 2, -0.82, name, weight="bold", ha="center")
        if counts.get(name):
            ax.text((start + end) / 2, -0.95, f"{counts[name]:,} parameters", **small)
    ax.set(xlim=(-0.55, len(blocks) - 0.45), ylim=(-1, 0.9), aspect="equal")
    ax.axis("off")
    total = sum(p.numel() for p in network.parameters())
    scale = "channels × X × Y × Z in voxels (edges drawn as their square roots)"
    return figures.finish(figure, title, f"{scale} · {total:,} parameters in all")


def _trace(network):
    """Blocks (child, layers, output shape) that a zero volume meets, a new one at each new size."""
    blocks = [("input", [], (1, *network.shape))]

    def note(name, layer, inputs, output):
        before, given, made = blocks[-1][2], tuple(inputs[0].shape[1:]), tuple(output.shape[1:])
        if given == (prod(before),) != before:
            blocks.append((name, ["flatten"], given))
        if (name, made) != (blocks[-1][0], blocks[-1][2]):
            blocks.append((name, [], made))
        size = getattr(layer, "kernel_size", getattr(layer, "p", ""))
        size = "×".join(map(str, size)) if isinstance(size, tuple) else size
        blocks[-1][1].append(f"{type(layer).__name__} {size}".strip())

    modes = [(module, module.training) for module in network.modules()]
    handles = [
        layer.register_forward_hook(partial(note, name))
        for name, child in network.named_children()
        for layer in child.modules()
        if not list(layer.children())
    ]
    try:
        with torch.no_grad():
            network.eval()(next(network.parameters()).new_zeros(1, 1, *network.shape))
    finally:
        for handle in handles:
            handle.remove()
        for module, mode in modes:
            module.training = mode
    return blocks


def _block(ax, place, shape, scale, colour):
    """Draw a (channels, X, Y, Z) output as a stack of cuboids, a (features,) one as a bar."""
    bits = np.log2(shape[0])
    width, *depth, height = scale * np.sqrt(shape[1:]) if shape[1:] else (0.05, 0.05 + 0.06 * bits)
    right, up = 0.35 * sum(depth), 0.28 * sum(depth)
    front = np.array([(0, 0), (width, 0), (width, height), (0, height)])
    back = front + np.array([right, up])
    top, side = (np.array([*front[[i, 2]], *back[[2, i]]]) for i in (3, 1))
    shifts = np.linspace(0, 0.016 * bits, 1 + round(bits / 1.75)) if shape[1:] else np.zeros(1)
    corner = np.array([place - (width + right + shifts[-1]) / 2, -(height + up + shifts[-1]) / 2])
    faces = [face + corner + shift for shift in shifts[::-1] for face in (front, top, side)]
    rgb = np.array(to_rgb(colour))
    tones = [0.25 + 0.75 * rgb, 0.5 + 0.5 * rgb, 0.85 * rgb] * len(shifts)
    ax.add_collection(PolyCollection(faces, facecolors=tones, edgecolors="white", linewidths=0.7))
