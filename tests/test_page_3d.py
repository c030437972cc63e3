"""mask.html, as notebook 06 fills its template, in a headless browser at two sizes."""

import contextlib
import io
from pathlib import Path

import nbformat
import numpy as np
import pandas as pd
import pytest
from PIL import Image

from tests.conftest import assert_no_error_and_nothing_fetched, drag, text_of

NOTEBOOKS = Path(__file__).parents[1] / "notebooks"


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """Run the notebook's cells on an ellipsoid: women's region on the left, men's on the right."""
    x, y, z = np.meshgrid(*(np.linspace(-1, 1, size) for size in (24, 32, 20)), indexing="ij")
    balls = [np.exp(-20 * ((x - side) ** 2 + y**2 + z**2)) for side in (-0.5, 0.5)]
    regions = {"name": ["left <ball>", "right ball"], "label": [1, 2], "sex": ["women", "men"]}
    regions = pd.DataFrame(regions)
    cohort = type("Cohort", (), {"affine": np.diag([6.0, 5, 7, 1]), "synthetic": True})
    names = {"data": cohort, "IMAGE": tmp_path_factory.mktemp("page"), "title": "Two balls"}
    names |= {"brain": x**2 + y**2 + z**2 < 0.8, "mean_mask": dict(zip(regions["sex"], balls))}
    names |= {"truth": 1 * (balls[0] > 0.4) + 2 * (balls[1] > 0.4), "planted": True}
    names |= {"regions": regions, "higher_in": dict(zip(regions["name"], regions["sex"]))}
    names |= {"levels": {"women": 0.5}, "millilitres": 0.2, "n": {"women": 3, "men": 4}}
    names["FOOT"] = "synthetic cohort, n=7"
    with contextlib.chdir(NOTEBOOKS):
        cells = nbformat.read("06_perturbation_masks.ipynb", as_version=4).cells
        exec(cells[1].source.partition("\nplt.")[0], names)  # the imports
        for cell in cells:
            if "marching_cubes(" in cell.source or "pages/mask.html" in cell.source:
                exec(cell.source, names)
    return (names["IMAGE"] / "mask.html").as_uri()


def centres(browser):
    """Return the columns in which the women's and the men's surfaces lie on average."""
    picture = browser.find_element("id", "canvas").screenshot_as_png
    red, _, blue = np.array(Image.open(io.BytesIO(picture)).convert("RGB"), int).transpose(2, 0, 1)
    columns = [np.nonzero(seen)[1] for seen in (red - blue > 60, blue - red > 60)]
    assert min(map(len, columns)) > 200, "pixels of each sex"
    return [column.mean() for column in columns]


def test_page_draws_turns_switches_and_names(browser, page):
    actions = pytest.importorskip("selenium.webdriver").ActionChains(browser, 0)
    browser.get(page)
    canvas = browser.find_element("id", "canvas")
    assert "Synthetic" in text_of(browser, "about")
    view = {button.text: button for button in browser.find_elements("css selector", "#views *")}
    for name, order, hidden in (("Above", 1, "SI"), ("Front", -1, "AP"), ("Back", 1, "AP")):
        view[name].click()
        women, men = centres(browser)
        assert (men - women) * order > 20, f"women's ball is on the left, {name}"
        shown = {x: browser.find_element("id", f"letter-{x}") for x in "LRAPSI"}
        assert not any(shown[letter].is_displayed() for letter in hidden)
        assert (shown["R"].rect["x"] - shown["L"].rect["x"]) * order > 100
    yaw, size = float(canvas.get_attribute("data-yaw")), canvas.rect
    drag(browser, "canvas", (0.5, 0.5), (0.5 + 50 / size["width"], 0.5))
    centres(browser)  # drawn anew
    assert 25 < (float(canvas.get_attribute("data-yaw")) - yaw) % 360 < 35
    before = canvas.screenshot_as_png
    browser.find_element("id", "slider").send_keys("\ue014" * 2)  # to the right
    assert canvas.screenshot_as_png != before
    x, y = browser.execute_script("return page.project(page.regions[0].centre)")
    x, y = int(x - size["width"] / 2), int(y - size["height"] / 2)  # from the middle
    actions.move_to_element_with_offset(canvas, x, y).perform()
    assert "left <ball>" in text_of(browser, "label")
    boxes = "return [...document.querySelectorAll('body *')].map((e) => e.getBoundingClientRect())"
    width = browser.execute_script("return innerWidth")
    assert all(-1 < b["left"] and b["right"] < width + 1 for b in browser.execute_script(boxes))
    assert_no_error_and_nothing_fetched(browser)


def test_page_without_webgl_says_so(browser, page):
    script = {"source": "HTMLCanvasElement.prototype.getContext = () => null"}
    added = browser.execute_cdp_cmd("Page.addScriptToEvaluateOnNewDocument", script)
    browser.get(page)
    browser.execute_cdp_cmd("Page.removeScriptToEvaluateOnNewDocument", added)
    assert "WebGL" in browser.find_element("id", "missing").text
    assert not browser.find_element("id", "canvas").is_displayed()
    assert_no_error_and_nothing_fetched(browser)
