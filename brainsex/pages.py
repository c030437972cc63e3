"""Surfaces of a brain and of masks within it: 3D pages that work offline, and stills of them."""

import html
import itertools
import json
import re
from base64 import b64encode
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import nilearn
import numpy as np
from matplotlib import pyplot as plt
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from nibabel.affines import apply_affine
from scipy.ndimage import gaussian_filter
from skimage.measure import marching_cubes

from brainsex import figures, storage

DIRECTIONS = dict(zip("LRPAIS", np.kron(np.eye(3), [[-1], [1]])))
VIEWS = {"left": "PS", "front": "LS", "top": "RA"}  # what lies to the right, and up
LIGHT = np.array([-0.35, 0.45, 0.82])  # towards the light: right, up, to the viewer
TEMPLATE = Path(__file__).with_name("page.html")  # contents go where it has @NAMES@
PIXELS = 480  # along the longer side of a still


@dataclass(frozen=True)
class Mesh:
    """A closed surface: corners in mm (RAS), and triangles, counter-clockwise from outside."""

    vertices: np.ndarray  # (V, 3) float32
    faces: np.ndarray  # (F, 3) int32


Meshes = Mapping[str, tuple[Mesh, str, float]]  # name -> mesh, colour, opacity


def surface(
    volume: np.ndarray, affine: np.ndarray, level: float, smooth: float = 1, max_faces: int = 40_000
) -> Mesh:
    """Compute the surface where a volume (X, Y, Z) passes `level`, closed where the volume ends.

    The affine may flip axes. `smooth` is the sigma in voxels of a Gaussian that comes first. The
    volume is sampled more coarsely until there are at most `max_faces` triangles. Raises ValueError
    if no voxel passes the level.
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
def preview(meshes: Meshes, *, title: str, cohort: str) -> Figure:
    """Draw a still of what `write_page` shows, from the left, the front and the top."""
    low, high = _bounds(meshes)
    widths, height = (high - low)[[1, 0, 0]], (high - low)[1:].max()
    size = (9, 9 * height / widths.sum() + 1.2)
    figure, axes = figures.new_figure(1, 3, figsize=size, width_ratios=widths)
    for ax, width, (name, (right, up)) in zip(axes, widths, VIEWS.items()):
        view = np.stack([DIRECTIONS[right], DIRECTIONS[up]])
        view = np.vstack([view, np.cross(*view)])  # rows: to the right, up, to the viewer
        bounds = (view @ (low + high))[:2] / 2 + np.outer([-0.5, 0.5], [width, height])
        ax.imshow(_render(meshes, view, *bounds), origin="lower", extent=bounds.T.ravel())
        ax.set_title(f"from the {name}")
        ax.axis("off")
        for letter, direction in DIRECTIONS.items():
            spot = 0.5 + 0.47 * (view @ direction)[:2]
            if (spot != 0.5).any():
                ax.annotate(letter, spot, xycoords="axes fraction", ha="center", va="center")
    handles = [Patch(color=colour, label=name) for name, (_, colour, _) in meshes.items()]
    axes[1].legend(handles=handles, loc="upper center", bbox_to_anchor=(0.5, 0), ncols=len(handles))
    return figures.finish(figure, title, cohort)


def write_page(path: str | Path, meshes: Meshes, *, title: str, caption: str) -> None:
    """Write an HTML page that shows meshes in 3D, each with its switch; it works offline.

    The caption stands at the foot. A mesh takes about 1 MB of the page, plotly another 1 MB.
    """
    (bundle,) = Path(nilearn.__file__).parent.rglob("plotly-gl3d*.min.js")  # of nilearn's own pages
    low, high = _bounds(meshes)
    ends = [(low + high + way * (high - low)) / 2 for way in DIRECTIONS.values()]
    scene = {"ends": np.array(ends).tolist(), "meshes": []}
    for name, (mesh, colour, opacity) in meshes.items():
        arrays = {"vertices": _base64(mesh.vertices, "<f4"), "faces": _base64(mesh.faces, "<i4")}
        scene["meshes"].append({"name": name, "color": colour, "opacity": opacity} | arrays)
    contents = {"TITLE": html.escape(title), "CAPTION": html.escape(caption)}
    contents["SCENE"] = json.dumps(scene).replace("<", r"\u003c")
    contents["PLOTLY"] = bundle.read_text(encoding="utf-8").replace("</script", r"<\/script")
    page = TEMPLATE.read_text(encoding="utf-8")
    storage.write_text(path, re.sub("@([A-Z]+)@", lambda match: contents[match[1]], page))


def _bounds(meshes: Meshes) -> tuple[np.ndarray, np.ndarray]:
    """Return the lowest and highest corner in mm of all meshes, with room for the letters."""
    corners = np.concatenate([mesh.vertices for mesh, *_ in meshes.values()])
    return corners.min(0) - 12, corners.max(0) + 12


def _base64(array: np.ndarray, dtype: str) -> str:
    """Encode the columns of an array, one after the other."""
    return b64encode(array.T.astype(dtype).tobytes()).decode()


def _render(meshes: Meshes, view: np.ndarray, low: np.ndarray, high: np.ndarray) -> np.ndarray:
    """Return a picture (rows, columns, RGB) of the outer sides between two corners of the view."""
    pixel = max(high - low) / PIXELS
    size = np.ceil((high - low) / pixel).astype(int)[::-1]
    layers, depths = np.zeros((len(meshes), *size, 4)), np.full((len(meshes), *size), -np.inf)
    for layer, depth, (mesh, colour, opacity) in zip(layers, depths, meshes.values()):
        vertices, normals = mesh.vertices @ view.T, np.zeros(mesh.vertices.shape)
        edges = np.diff(vertices[mesh.faces], axis=1, append=vertices[mesh.faces[:, :1]])
        facing = np.cross(edges[:, 0], edges[:, 1])
        np.add.at(normals, mesh.faces, facing[:, None])
        # Points on each triangle so dense that they leave no pixel out
        steps = np.arange(0, 1, 1 / np.ceil(1.5 * np.abs(edges).max() / pixel))
        weights = [(i, j, 1 - i - j) for i in steps for j in steps if i + j <= 1]
        front = mesh.faces[facing[:, 2] > 0]
        points, normals = ((weights @ v[front]).reshape(-1, 3) for v in (vertices, normals))
        normals /= np.linalg.norm(normals, axis=1, keepdims=True) + 1e-12
        light = 0.4 + 0.6 * np.clip(normals @ LIGHT, 0, 1)
        alpha = opacity + (1 - opacity) * 0.5 * (1 - np.abs(normals[:, 2])) ** 2  # denser at rims
        order = np.argsort(points[:, 2])  # the nearest point is written last
        column, row = ((points[order, :2] - low) / pixel).astype(int).T
        layer[row, column] = np.column_stack([light[:, None] * to_rgb(colour), alpha])[order]
        depth[row, column] = points[order, 2]
    picture = np.ones((*size, 3))
    for layer in np.take_along_axis(layers, np.argsort(depths, axis=0)[..., None], 0):
        picture += layer[..., 3:] * (layer[..., :3] - picture)
    return picture
