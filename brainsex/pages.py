"""Surfaces of a brain and of masks within it: 3D pages that work offline, and stills of them.

`meshes` are a dict name -> (Mesh, colour, opacity); millimetres are in RAS.
"""

import html
import itertools
import json
import re
from base64 import b64encode
from dataclasses import dataclass
from pathlib import Path

import nilearn
import numpy as np
from matplotlib import pyplot as plt
from matplotlib.colors import to_rgb
from matplotlib.patches import Patch
from nibabel.affines import apply_affine
from scipy.ndimage import gaussian_filter
from skimage.measure import marching_cubes

from brainsex import figures, replacing

WAYS = dict(zip(figures.ENDS, [sign * axis for axis in np.eye(3) for sign in (-1, 1)]))
VIEWS = {"left": "PS", "front": "LS", "top": "RA"}  # what lies to the right, and up
PAGE = Path(__file__).with_name("page.html")  # with names between @ for what goes in
LIGHT = np.array([-0.35, 0.45, 0.82])  # towards the light: right, up, to the viewer


@dataclass(frozen=True)
class Mesh:
    """A closed surface: corners in mm (RAS), and triangles, counter-clockwise from outside."""

    vertices: np.ndarray  # (V, 3) float32
    faces: np.ndarray  # (F, 3) int32


def surface(volume, affine, level, *, smooth=1.0, max_faces=40_000):
    """Surface where a volume (X, Y, Z) passes `level`, closed where the volume ends.

    The affine may flip axes; `smooth` is the sigma in voxels of a Gaussian that comes first; the
    volume is sampled the more coarsely until there are at most `max_faces` triangles.
    """
    for step in itertools.count(1):
        margin = int(np.ceil(4 * smooth)) + 2 * step
        field = gaussian_filter(np.pad(np.asarray(volume, np.float32), margin), smooth)
        if not 0 < level < field.max():
            raise ValueError(f"no surface at {level}: expected a level in (0, {field.max():.3g})")
        vertices, faces, *_ = marching_cubes(field, level, step_size=step)
        if len(faces) <= max_faces:
            break
    if np.linalg.det(affine) > 0:  # marching_cubes' triangles are clockwise from outside
        faces = faces[:, ::-1]
    vertices = apply_affine(affine, vertices - margin)
    return Mesh(vertices.astype(np.float32), faces.astype(np.int32))


@plt.rc_context(figures.STYLE)
def preview(meshes, *, title, cohort):
    """A still picture of what `page` shows, from the left, the front and the top."""
    low, high = _reach(meshes)
    across, up = (high - low)[[1, 0, 0]], (high - low)[1:].max()
    figure, (axes,) = figures.grid([up], across, 9 / sum(across))
    for ax, width, (name, ends) in zip(axes, across, VIEWS.items()):
        right, top = (WAYS[end] for end in ends)
        sight = np.array([right, top, np.cross(right, top)])
        bounds = (sight @ (low + high))[:2] / 2 + np.array([[-width, -up], [width, up]]) / 2
        picture = _render(meshes.values(), sight, *bounds)
        ax.imshow(picture, origin="lower", extent=bounds.T.ravel())
        figures.letters(ax, ends, figures.DARK)
        ax.set_title(f"from the {name}")
        ax.axis("off")
    handles = [Patch(color=colour, label=name) for name, (_, colour, _) in meshes.items()]
    axes[1].legend(handles=handles, loc="upper center", bbox_to_anchor=(0.5, 0), ncols=len(handles))
    figure.set_figheight(figure.get_figheight() + 0.8)
    return figures.finish(figure, title, cohort)


def page(path, meshes, *, title, caption):
    """Write an HTML page that shows meshes in 3D, each with its switch; it works offline.

    The caption stands at the foot. A page of 4 MB or more is a ValueError.
    """
    bundle = next(Path(nilearn.__file__).parent.rglob("plotly-gl3d*.min.js"), None)
    if bundle is None:
        raise FileNotFoundError(f"nilearn {nilearn.__version__} brings no plotly-gl3d*.min.js")
    low, high = _reach(meshes)
    scene = {
        "ends": [((low + high + way * (high - low)) / 2).tolist() for way in WAYS.values()],
        "meshes": [
            {"name": name, "color": colour, "opacity": opacity}
            | {"vertices": _packed(mesh.vertices, "<f4"), "faces": _packed(mesh.faces, "<i4")}
            for name, (mesh, colour, opacity) in meshes.items()
        ],
    }
    parts = {
        "TITLE": html.escape(title),
        "CAPTION": html.escape(caption),
        "SCENE": json.dumps(scene).replace("<", r"\u003c"),
        "PLOTLY": bundle.read_text(encoding="utf-8").replace("</script", r"<\/script"),
    }
    text = re.sub("@([A-Z]+)@", lambda match: parts[match[1]], PAGE.read_text("utf-8")).encode()
    if len(text) >= 4e6:
        raise ValueError(f"{path}: {len(text) / 1e6:.1f} MB, 4 at most; lower max_faces of surface")
    with replacing(path) as unfinished:
        unfinished.write_bytes(text)


def _reach(meshes):
    """Lowest and highest corner in mm of all the meshes, with room for the letters."""
    corners = np.concatenate([mesh.vertices for mesh, *_ in meshes.values()])
    return corners.min(0) - 12, corners.max(0) + 12


def _packed(array, kind):
    """Base64 of an array's columns, one after the other."""
    return b64encode(array.T.astype(kind).tobytes()).decode()


def _render(meshes, sight, low, high):
    """Picture (rows, columns, RGB) of the meshes' outer sides, seen against `sight`'s third row."""
    pixel = max(high - low) / 600
    size = np.ceil((high - low) / pixel).astype(int)[::-1]
    layers, depths = [], []
    for mesh, colour, opacity in meshes:
        vertices, normals = mesh.vertices @ sight.T, np.zeros(mesh.vertices.shape)
        corners = vertices[mesh.faces]
        facing = np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0])
        np.add.at(normals, mesh.faces, facing[:, None])
        # Points so dense over each triangle that no pixel is left out
        count = int(np.ceil(1.5 * np.abs(corners - np.roll(corners, 1, axis=1)).max() / pixel))
        steps = [(i, j, count - i - j) for i in range(count + 1) for j in range(count + 1 - i)]
        front = mesh.faces[facing[:, 2] > 0]
        points, normals = (
            (np.array(steps) / count @ values[front]).reshape(-1, 3)
            for values in (vertices, normals)
        )
        normals /= np.linalg.norm(normals, axis=1, keepdims=True) + 1e-12
        light = 0.4 + 0.6 * np.clip(normals @ LIGHT, 0, 1)
        rim = opacity + (1 - opacity) * 0.5 * (1 - np.abs(normals[:, 2])) ** 2
        order = np.argsort(points[:, 2])  # the nearest point is written last
        column, row = ((points[order, :2] - low) / pixel).astype(int).T
        layers.append(np.zeros((*size, 4)))
        layers[-1][row, column] = np.column_stack([light[:, None] * to_rgb(colour), rim])[order]
        depths.append(np.full(size, -np.inf))
        depths[-1][row, column] = points[order, 2]
    picture = np.ones((*size, 3))
    for layer in np.take_along_axis(np.array(layers), np.argsort(depths, axis=0)[..., None], 0):
        picture += layer[..., 3:] * (layer[..., :3] - picture)
    return picture
