"""The gallery and the slice explorer in a headless browser, on a desktop and on a phone."""

import base64
import gzip
import json
import re
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from tests.conftest import assert_page_is_whole, drag, operate, text_of

ROOT = Path(__file__).resolve().parent.parent
TEMPLATE = ROOT / "notebooks/pages/explore.html"
SHAPE, AFFINE = (6, 8, 7), [[3, 0, 0, -9], [0, -4, 0, 14], [0, 0, 5, -11], [0, 0, 0, 1]]
LINK = re.compile(r'(?:href|src)="(?!data:|https?:|#)([^"]+)"')
PICTURES = "return [...document.querySelectorAll('canvas')].map((canvas) => canvas.toDataURL())"


def pack(voxels: np.ndarray) -> str:
    return base64.b64encode(gzip.compress(voxels.astype(np.uint8).tobytes())).decode()


def unpack(text: str, data: dict) -> np.ndarray:
    return np.frombuffer(gzip.decompress(base64.b64decode(text)), np.uint8).reshape(data["shape"])


def made_up_page(path: Path, strict: str = '"use strict";') -> Path:
    """Fill the template with two people, two maps and a planted region of one voxel."""
    rng, region, people = np.random.default_rng(0), np.zeros(SHAPE), []
    region[1, 5, 2] = 3
    for name, before in (("woman 1", 0.875), ("man 1", 0.999)):
        volume, *maps = (pack(rng.integers(20, 256, SHAPE)) for _ in range(3))
        maps = [{"voxels": voxels, "after": 0.25} for voxels in maps]
        person = {"name": name, "explained": "woman", "before": before}
        people.append(person | {"volume": volume, "maps": maps})
    data = {"cohort": "synthetic cohort, n=2", "values": "FA", "shape": SHAPE, "affine": AFFINE}
    data["methods"] = [{"name": "plain", "own_deletion": n == 1} for n in range(2)]
    data["regions"] = [{"label": 3, "name": "tract <b> & tract", "higher": "women"}]
    data |= {"brain": pack(np.ones(SHAPE)), "labels": pack(region), "people": people}
    text = TEMPLATE.read_text(encoding="utf-8").replace('"use strict";', strict)
    path.write_text(text.replace("__DATA__", json.dumps(data)), encoding="utf-8")
    return path


def assert_at(browser, data: dict, voxel: list[int], choice: int = 0) -> None:
    """Compare the read-out with the affine, a person's volume and the map of the same number."""
    position = re.findall(r"-?\d+\.\d", text_of(browser, "position").replace("−", "-"))
    expected = np.array(data["affine"])[:3] @ [*voxel, 1]
    np.testing.assert_allclose(np.array(position, float), expected, atol=0.051)
    person = data["people"][choice]
    texts = person["volume"], person["maps"][choice]["voxels"]
    value, root = (unpack(text, data)[tuple(voxel)] / 255 for text in texts)
    assert float(text_of(browser, "volume-value")) == pytest.approx(value, abs=0.0051)
    assert float(text_of(browser, "map-value")) == pytest.approx(root**2, abs=0.0051)


def test_gallery_shows_and_links_only_what_there_is(browser):
    path = ROOT / "image/index.html"
    browser.get(path.as_uri())
    assert_page_is_whole(browser)
    links = set(LINK.findall(path.read_text(encoding="utf-8")))
    assert {"explore.html", "mask.html", "person.png"} < links
    assert [link for link in links if not (path.parent / link).is_file()] == []


@pytest.mark.parametrize("made_up", [True, False], ids=["made up", "committed"])
def test_explorer(browser, made_up, tmp_path):
    path = made_up_page(tmp_path / "page.html") if made_up else ROOT / "image/explore.html"
    if not path.is_file():
        pytest.skip("image/explore.html: notebook 07 has not written it")
    source = path.read_text(encoding="utf-8")
    assert "http" not in re.sub(r"http-equiv|[\w+/=]{200,}", "", source)
    assert path.stat().st_size < 4e6
    data = json.loads(re.search(r'id="data">(.*?)</script>', source, re.DOTALL)[1])
    browser.get(path.as_uri())
    browser.find_element("css selector", "body[data-ready]")
    labels, brain = (unpack(data[name], data) for name in ("labels", "brain"))
    for region in data["regions"]:
        voxel = np.argwhere((labels == region["label"]) & (brain > 0))[0].tolist()
        for plane, index in zip(("sagittal", "coronal", "axial"), voxel):
            operate(browser, f"slice-{plane}", index)
        assert_at(browser, data, voxel)
        assert text_of(browser, "region") == f"{region['name']}, higher in {region['higher']}"
    pictures = [browser.execute_script(PICTURES)]
    for control in (("person-1",), ("outlines",), ("method", 1), ("threshold", 0)):
        operate(browser, *control)
        browser.find_element("css selector", "body[data-ready]")
        pictures.append(browser.execute_script(PICTURES))
    assert all(before != after for before, after in pairwise(pictures))
    assert data["cohort"][1:] in text_of(browser, "cohort")
    assert "own deletion" in text_of(browser, "deleted")
    if made_up:  # its planes show the whole grid; the second axis runs from front to back
        drag(browser, "axial", (0.5 / 6, 1 - 2.5 / 8))
        assert_at(browser, data, [0, 5, 2], choice=1)
        drag(browser, "coronal", (0.5, 0.5), (3.5 / 6, 1 - 6.5 / 7))
        assert_at(browser, data, [3, 5, 6], choice=1)
        drag(browser, "sagittal", (7.5 / 8, 1 - 0.5 / 7))
        browser.find_element("css selector", "body").send_keys("\ue012")  # left
        assert_at(browser, data, [3, 1, 0], choice=1)
        assert text_of(browser, "region") == "none"
        assert (text_of(browser, "before"), text_of(browser, "after")) == ("> .99", ".25")
    assert_page_is_whole(browser)


def test_explorer_without_decompression_says_so(browser, tmp_path):
    path = made_up_page(tmp_path / "page.html", "DecompressionStream = undefined;")
    browser.get(path.as_uri())
    assert "DecompressionStream" in browser.find_element("id", "notice").text
