"""Surfaces of a brain and of masks within it, in 3D pages that work offline."""

import html
import itertools
import json
import re
from base64 import b64encode
from collections.abc import Mapping
from pathlib import Path

import nilearn
import numpy as np
from nibabel.affines import apply_affine
from nilearn.surface import InMemoryMesh
from scipy.ndimage import gaussian_filter
from skimage.measure import marching_cubes

from brainsex import storage

DIRECTIONS = dict(zip("LRPAIS", np.kron(np.eye(3), [[-1], [1]])))
TEMPLATE = Path(__file__).with_name("page.html")  # contents go where it has @NAMES@
Meshes = Mapping[str, tuple[InMemoryMesh, str, float]]  # name -> mesh, colour, opacity


def surface(
    volume: np.ndarray, affine: np.ndarray, level: float, smooth: float = 1, max_faces: int = 40_000
) -> InMemoryMesh:
    """Compute the surface where a volume (X, Y, Z) passes `level`, closed where the volume ends.

    Coordinates are in mm (RAS), triangles counter-clockwise from outside; the affine may flip axes.
    `smooth` is the sigma in voxels of a Gaussian that comes first. The volume is sampled more
    coarsely until there are at most `max_faces` triangles. Raises ValueError if no voxel passes.
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
    return InMemoryMesh(vertices.astype(np.float32), faces.astype(np.int32))


def write_page(path: str | Path, meshes: Meshes, *, title: str, caption: str) -> None:
    """Write an HTML page that shows meshes in 3D, each with its switch; it works offline.

    The caption stands at the foot. A mesh takes about 1 MB of the page, plotly another 1 MB.
    """
    (bundle,) = Path(nilearn.__file__).parent.rglob("plotly-gl3d*.min.js")  # of nilearn's own pages
    corners = np.concatenate([mesh.coordinates for mesh, *_ in meshes.values()])
    low, high = corners.min(0) - 12, corners.max(0) + 12  # mm, with room for the letters
    ends = [(low + high + way * (high - low)) / 2 for way in DIRECTIONS.values()]
    scene = {"ends": np.array(ends).tolist(), "meshes": []}
    for name, (mesh, colour, opacity) in meshes.items():
        arrays = {"vertices": mesh.coordinates, "faces": mesh.faces}  # float32, int32
        parts = {key: b64encode(array.T.tobytes()).decode() for key, array in arrays.items()}
        scene["meshes"].append({"name": name, "color": colour, "opacity": opacity} | parts)
    contents = {"TITLE": html.escape(title), "CAPTION": html.escape(caption)}
    contents["SCENE"] = json.dumps(scene).replace("<", r"\u003c")
    contents["PLOTLY"] = bundle.read_text(encoding="utf-8").replace("</script", r"<\/script")
    page = TEMPLATE.read_text(encoding="utf-8")
    storage.write_text(path, re.sub("@([A-Z]+)@", lambda match: contents[match[1]], page))
