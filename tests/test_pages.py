"""Surfaces in millimetres; stills that show what lies where; a page that asks for nothing."""

import base64
import io
import json
import re
import shutil
from collections import Counter
from typing import Any

import matplotlib
import numpy as np
import pytest
from matplotlib.image import imread
from nilearn.surface import InMemoryMesh

from brainsex import pages

matplotlib.use("Agg")

HEAD = {"title": "A title", "cohort": "synthetic cohort, n=7"}
CENTRE, RADIUS = np.array([3.0, -5.0, 7.0]), 12.0
AFFINES = {
    "RAS": np.diag([1.0, 1.5, 2.0]),
    "LAS": np.diag([-1.0, 1.5, 2.0]),
    "axes swapped": np.array([[0, 1.5, 0], [1.0, 0, 0], [0, 0, 2.0]]),
    "oblique": np.array([[0.8, -0.6, 0], [0.6, 0.8, 0], [0, 0, 1]]) @ np.diag([1.0, 1.5, 2.0]),
}


def ball(linear: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Make a volume that falls to 0.5 at RADIUS mm from CENTRE, and its affine."""
    shape, affine = (48, 34, 26), np.eye(4)
    affine[:3, :3] = linear
    affine[:3, 3] = CENTRE - linear @ (np.array(shape) / 2 - 0.3)
    places = np.einsum("ij,jxyz->ixyz", linear, np.indices(shape)) + affine[:3, 3, None, None, None]
    distance = np.linalg.norm(places - CENTRE[:, None, None, None], axis=0)
    return np.clip(1 - distance / (2 * RADIUS), 0, None), affine


def block(*ends: tuple[int, int]) -> InMemoryMesh:
    """Make the surface of a block of voxels in a grid of 40 × 48 × 40 at 4 mm."""
    volume = np.zeros((40, 48, 40))
    volume[tuple(slice(*pair) for pair in ends)] = 1
    return pages.surface(volume, np.diag([4.0, 4, 4, 1]), 0.5)


MESHES = {
    "head": (block((4, 36), (4, 44), (4, 36)), "#999999", 0.2),
    "left <mask>": (block((8, 14), (20, 28), (16, 24)), "#FF0000", 1.0),
    "right mask": (block((26, 32), (30, 38), (22, 30)), "#0000FF", 1.0),  # in front and above
}


def signed_volume(mesh: InMemoryMesh) -> float:
    """Compute the volume by the divergence theorem: positive where triangles look outwards."""
    a, b, c = mesh.coordinates.astype(np.float64)[mesh.faces].transpose(1, 0, 2)
    return (a * np.cross(b, c)).sum() / 6


def is_closed(mesh: InMemoryMesh) -> bool:
    """Tell whether every edge has two triangles, which run along it in opposite directions."""
    edges = Counter((face[k], face[k - 1]) for face in mesh.faces.tolist() for k in range(3))
    return all(edges[end, start] == count == 1 for (start, end), count in edges.items())


@pytest.mark.parametrize("linear", AFFINES.values(), ids=AFFINES)
def test_surface_is_the_ball_in_mm(linear):
    volume, affine = ball(linear)
    mesh = pages.surface(volume, affine, 0.5, smooth=0)
    assert (mesh.coordinates.dtype, mesh.faces.dtype) == (np.float32, np.int32)
    assert signed_volume(mesh) == pytest.approx(4 / 3 * np.pi * RADIUS**3, rel=0.03)
    assert np.linalg.norm(mesh.coordinates - CENTRE, axis=1) == pytest.approx(RADIUS, abs=0.3)
    assert is_closed(mesh)
    small = pages.surface(volume, affine, 0.5, max_faces=500)
    assert len(small.faces) <= 500 < len(mesh.faces)
    assert signed_volume(small) == pytest.approx(signed_volume(mesh), rel=0.15)


def test_surface_closes_at_the_edge_and_needs_a_level_that_is_passed():
    affine = np.array([[2.0, 0, 0, -20], [0, 3, 0, -21], [0, 0, 4, -18], [0, 0, 0, 1]])
    mesh = pages.surface(np.ones((6, 7, 8)), affine, 0.5, smooth=0)
    assert is_closed(mesh)
    assert mesh.coordinates.min(0) == pytest.approx([-21, -22.5, -20])
    assert mesh.coordinates.max(0) == pytest.approx([-9, -1.5, 12])
    for level in (0, 2, -1):
        with pytest.raises(ValueError, match=rf"no surface at {level}: expected a level in \(0, 1"):
            pages.surface(np.ones((4, 5, 6)), affine, level, smooth=0)


def test_page_holds_the_meshes_escapes_its_texts_and_asks_for_nothing(tmp_path):
    path, nasty = tmp_path / "new" / "mask.html", "</script><b>\"&'@SCENE@"
    pages.write_page(path, MESHES | {nasty: MESHES["head"]}, title=nasty, caption=nasty)
    text = path.read_text(encoding="utf-8")
    assert [file.name for file in path.parent.iterdir()] == ["mask.html"]
    assert path.stat().st_size < 4e6
    assert "default-src 'none'" in text
    assert "<title>&lt;/script&gt;&lt;b&gt;&quot;&amp;&#x27;@SCENE@</title>" in text
    assert text.count("</script>") == 2
    assert "<b>" not in text
    tags = re.sub(r"(?s)<script>.*?</script>", "", text)
    assert re.findall(r"""(?:src|href|srcset|data)=["']([^"']*)""", tags) == ["data:,"]
    scene = json.loads(re.search(r"const \{meshes, ends\} = (.*), main = ", text)[1])
    assert [mesh["name"] for mesh in scene["meshes"]] == [*MESHES, nasty]
    for saved, (mesh, colour, opacity) in zip(scene["meshes"], MESHES.values()):
        assert (saved["color"], saved["opacity"]) == (colour, opacity)
        for field, array in (("vertices", mesh.coordinates), ("faces", mesh.faces)):
            dtype = "<f4" if field == "vertices" else "<i4"
            columns = np.frombuffer(base64.b64decode(saved[field]), dtype).reshape(3, -1)
            assert np.array_equal(columns.T, array)
    ends = np.array(scene["ends"])  # L R P A I S; the head ends at 14 and 142 mm, in Y at 174
    assert [ends[n, n // 2] < 14 for n in (0, 2, 4)] == [True] * 3
    assert [ends[n, n // 2] > limit for n, limit in ((1, 142), (3, 174), (5, 142))] == [True] * 3


def colours(browser: Any) -> tuple[np.ndarray, np.ndarray]:
    """Find the columns of the red pixels and of the blue ones of the scene as it is shown."""
    main = browser.find_element("tag name", "main")
    seen = imread(io.BytesIO(main.screenshot_as_png))
    hue = seen[..., 0] - seen[..., 2]
    return np.nonzero(hue > 0.3)[1], np.nonzero(hue < -0.3)[1]


def test_page_works_offline_in_a_browser_with_a_switch_a_mesh_and_each_side_in_its_view(tmp_path):
    """In a real browser that draws by software."""
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    driver = shutil.which("chromedriver")
    if not (chromium and driver):
        pytest.skip("chromium or chromedriver is not installed")
    from selenium.webdriver.support.wait import WebDriverWait

    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    switches = "headless=new no-sandbox use-angle=swiftshader enable-unsafe-swiftshader "
    switches += f"window-size=700,600 disable-dev-shm-usage user-data-dir={tmp_path / 'profile'}"
    for switch in switches.split():
        options.add_argument(f"--{switch}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    pages.write_page(tmp_path / "mask.html", MESHES, title="A <mask>", caption="n=7 & more")
    with webdriver.Chrome(options=options, service=webdriver.ChromeService(driver)) as browser:
        wait = WebDriverWait(browser, 30)
        browser.get((tmp_path / "mask.html").as_uri())
        wait.until(lambda _: min(map(len, colours(browser))) > 100)
        assert browser.execute_script("return performance.getEntriesByType('resource')") == []
        assert [e for e in browser.get_log("browser") if e["level"] == "SEVERE"] == []
        assert browser.title == browser.find_element("tag name", "h1").text == "A <mask>"
        assert "n=7 & more" in browser.find_element("tag name", "footer").text
        labels = browser.find_elements("tag name", "label")
        assert [label.text for label in labels] == list(MESHES)
        box = browser.find_elements("css selector", "label input")[1]
        box.click()
        wait.until(lambda _: len(colours(browser)[0]) == 0)
        box.click()
        for view, sign in (("Back", 1), ("Front", -1)):  # red is on the left
            browser.find_element("xpath", f"//button[text()='{view}']").click()
            wait.until(lambda _: min(map(len, colours(browser))) > 100)
            wait.until(
                lambda _, s=sign: s * np.subtract(*(c.mean() for c in colours(browser))) < -30
            )
