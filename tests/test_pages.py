"""The 3D page in a real browser with its network off: it draws, turns, zooms and switches."""

import io
import shutil
import time

import numpy as np
import pytest
from matplotlib.image import imread

from brainsex import pages

webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
from selenium.webdriver.common.action_chains import ActionChains  # noqa: E402
from selenium.webdriver.common.actions.wheel_input import ScrollOrigin  # noqa: E402
from selenium.webdriver.common.by import By  # noqa: E402

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
CHROMEDRIVER = shutil.which("chromedriver")
pytestmark = pytest.mark.skipif(
    not (CHROMIUM and CHROMEDRIVER), reason="chromium or chromedriver is not installed"
)
SWITCHES = (
    "--headless=new --no-sandbox --use-angle=swiftshader --enable-unsafe-swiftshader "
    "--window-size=900,700 --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --disable-dev-shm-usage"
)


def block(*slices):
    """Surface of a block of voxels within a head-sized grid, x to the right."""
    volume = np.zeros((40, 48, 40))
    volume[tuple(slice(*ends) for ends in slices)] = 1
    return pages.surface(volume, np.diag([4.0, 4, 4, 1]), 0.5)


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    """A pale head with a red mask on its left, a blue one on its right."""
    meshes = {
        "head": (block((4, 36), (4, 44), (4, 36)), "#999999", 0.2),
        "left <mask>": (block((8, 14), (20, 28), (16, 24)), "#FF0000", 1.0),
        "right mask": (block((26, 32), (20, 28), (16, 24)), "#0000FF", 1.0),
    }
    path = tmp_path_factory.mktemp("page") / "mask.html"
    pages.page(path, meshes, title="A <mask>", caption="synthetic cohort, n=7 & more")
    return path


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for switch in SWITCHES.split():
        options.add_argument(switch)
    options.add_argument(f"--user-data-dir={tmp_path_factory.mktemp('profile')}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    browser = webdriver.Chrome(options=options, service=webdriver.ChromeService(CHROMEDRIVER))
    browser.execute_cdp_cmd("Network.enable", {})
    offline = {"offline": True, "latency": 0, "downloadThroughput": 0, "uploadThroughput": 0}
    browser.execute_cdp_cmd("Network.emulateNetworkConditions", offline)
    yield browser
    browser.quit()


@pytest.fixture(scope="module")
def opened(browser, path):
    browser.get(path.as_uri())
    wait(lambda: red(browser) > 500)
    return browser


@pytest.fixture
def page(opened):
    """The browser, the page as it was when it was opened."""
    for box in opened.find_elements(By.CSS_SELECTOR, "label input:not(:checked)"):
        box.click()
    press(opened, "Oblique")
    wait(lambda: red(opened) > 500 and blue(opened) > 500)
    return opened


def wait(condition):
    """Until the condition holds; drawing by software takes its time."""
    end = time.monotonic() + 15
    while not condition():
        assert time.monotonic() < end, "the picture did not come"
        time.sleep(0.1)


def picture(browser):
    """What the scene shows, (rows, columns, RGB) in [0, 1]."""
    main = browser.find_element(By.TAG_NAME, "main")
    return imread(io.BytesIO(main.screenshot_as_png))[..., :3]


def red(browser):
    seen = picture(browser)
    return int((seen[..., 0] - seen[..., 2] > 0.3).sum())


def blue(browser):
    seen = picture(browser)
    return int((seen[..., 2] - seen[..., 0] > 0.3).sum())


def eye(browser):
    layout = "document.querySelector('main')._fullLayout"
    return browser.execute_script(f"return {layout}.scene._scene.getCamera().eye")


def press(browser, name):
    browser.find_element(By.XPATH, f"//button[text()='{name}']").click()


def test_page_draws_without_a_request_or_an_error(page):
    assert picture(page).std() > 0.02
    entries = page.execute_script("return performance.getEntriesByType('resource')")
    assert entries == []
    assert [entry for entry in page.get_log("browser") if entry["level"] == "SEVERE"] == []
    assert page.title == "A <mask>"
    assert page.find_element(By.TAG_NAME, "h1").text == "A <mask>"
    footer = page.find_element(By.TAG_NAME, "footer")
    assert "synthetic cohort, n=7 & more" in footer.text
    bottom = footer.location["y"] + footer.size["height"]
    assert bottom <= page.execute_script("return window.innerHeight")
    labels = [label.text for label in page.find_elements(By.TAG_NAME, "label")]
    assert labels == ["head", "left <mask>", "right mask"]


def test_page_may_ask_for_nothing(page):
    script = """
      const done = arguments[0];
      document.addEventListener("securitypolicyviolation", event => done(event.blockedURI));
      fetch("http://127.0.0.1:9/").catch(() => null);
      setTimeout(() => done(null), 3000);
    """
    assert page.execute_async_script(script) == "http://127.0.0.1:9/"


def test_page_turns_and_zooms(page):
    before, seen = eye(page), picture(page)
    main = page.find_element(By.TAG_NAME, "main")
    drag = ActionChains(page).move_to_element(main).click_and_hold().move_by_offset(160, 30)
    drag.release().perform()
    wait(lambda: np.abs(picture(page) - seen).mean() > 0.005)
    turned = eye(page)
    assert abs(turned["x"] - before["x"]) + abs(turned["y"] - before["y"]) > 0.3
    distance, seen = np.linalg.norm(list(turned.values())), picture(page)
    ActionChains(page).scroll_from_origin(ScrollOrigin.from_element(main), 0, -300).perform()
    wait(lambda: np.linalg.norm(list(eye(page).values())) < 0.95 * distance)
    wait(lambda: np.abs(picture(page) - seen).mean() > 0.005)


def test_each_mesh_can_be_switched_off_and_on(page):
    boxes = page.find_elements(By.CSS_SELECTOR, "label input")
    assert all(box.is_selected() for box in boxes)
    whole, shown = picture(page), blue(page)
    boxes[1].click()
    wait(lambda: red(page) == 0)
    assert blue(page) >= shown > 500
    boxes[1].click()
    wait(lambda: red(page) > 500)
    boxes[0].click()
    wait(lambda: np.abs(picture(page) - whole).mean() > 0.005)
    assert red(page) > 500


@pytest.mark.parametrize(
    ("view", "left_is_left"), [("Top", True), ("Back", True), ("Front", False)]
)
def test_views_show_left_and_right_as_their_names_say(page, view, left_is_left):
    start = eye(page)
    press(page, view)
    wait(lambda: eye(page) != start)

    def sides():
        seen = picture(page)
        hues = seen[..., 0] - seen[..., 2]
        return [np.nonzero(mask)[1].mean() for mask in (hues > 0.3, hues < -0.3) if mask.any()]

    wait(lambda: len(sides()) == 2 and abs(sides()[0] - sides()[1]) > 100)
    red_at, blue_at = sides()
    assert (red_at < blue_at) == left_is_left


def test_letters_stand_at_their_ends(page):
    letters = page.execute_script(
        "const {text, x, y, z} = document.querySelector('main').data.at(-1);"
        "return text.map((letter, at) => [letter, [x[at], y[at], z[at]]]);"
    )
    at = {letter: np.array(place) for letter, place in letters}
    # The head reaches from 16 to 140 mm in X and Z, to 172 in Y
    for axis, (low, high) in enumerate(("LR", "PA", "IS")):
        assert at[low][axis] < 14
        assert at[high][axis] > (142, 174, 142)[axis]
    assert len(at) == 6


def test_left_view_hides_the_right_mask(page):
    press(page, "Left")
    wait(lambda: blue(page) == 0)
    assert red(page) > 500


def test_page_says_when_the_browser_cannot_draw(opened, path):
    opened.switch_to.new_window("tab")
    script = "HTMLCanvasElement.prototype.getContext = () => null;"
    opened.execute_cdp_cmd("Page.addScriptToEvaluateOnNewDocument", {"source": script})
    opened.get(path.as_uri())
    main = opened.find_element(By.TAG_NAME, "main")
    said = main.text
    opened.close()
    opened.switch_to.window(opened.window_handles[0])
    assert said == "This page needs WebGL to draw, which this browser does not offer."
