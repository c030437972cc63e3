"""What several test files share; of pages, a browser and what is done in it."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import joblib
import numpy as np
import pandas as pd
import pytest
import torch

from brainsex import networks

NO_RESULT = {".lock", "run.json", "rejected.csv"}
"""What a run leaves in its folder beside its results."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the tests that take longest: those that run the notebooks, in their order."""
    items.sort(key=lambda item: not item.name.startswith("test_smoke_profile"))


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Name a folder of archives or packages, which a test makes."""
    return tmp_path / "archives"


@pytest.fixture
def target(tmp_path: Path) -> Path:
    """Name a folder for the volumes that are made of `source`."""
    return tmp_path / "fa"


@pytest.fixture
def in_process() -> Iterator[None]:
    """Train folds one after the other in this process, which sees what a test puts in place."""
    with joblib.parallel_config(backend="sequential"):
        yield


@pytest.fixture
def one_cpu_thread(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Use one thread and no GPU: small volumes only wait for a second thread."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # for the processes of cross_validate
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def precision(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> torch.dtype:
    """Run a test in both precisions, whichever of them this processor would choose."""
    monkeypatch.setattr(networks, "fast_precision", lambda device: request.param)
    return request.param


@pytest.fixture(scope="module")
def planted() -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Make sixty volumes of 22 a side: men are brighter in one box, and nowhere else.

    Volumes (60, 22, 22, 22), sex (60,), the box (22, 22, 22) and who is held out (60,).
    """
    rng = np.random.default_rng(3)
    sex = np.arange(60) % 2
    volumes = rng.uniform(0.2, 0.4, (60, 22, 22, 22)).astype(np.float32)
    box = np.zeros((22, 22, 22), bool)
    box[6:14, 8:16, 7:15] = True
    volumes[:, box] += 0.3 * sex[:, None]
    return volumes, sex, box, np.arange(60) >= 36


def write_cohort(
    folder: Path, volumes: np.ndarray, sex: np.ndarray, *, grid: dict | None = None, **columns
) -> Path:
    """Write what `convert` leaves: arrays, a table of 000000, 000001, … and perhaps a grid."""
    folder.mkdir(parents=True, exist_ok=True)
    np.save(folder / "tensors.npy", np.asarray(volumes, np.float32))
    np.save(folder / "labels.npy", sex)
    subjects = [f"{n:06d}" for n in range(len(sex))]
    table = pd.DataFrame({"Subject": subjects, "label": sex, **columns})
    table.to_csv(folder / "subjects.csv", index=False)
    if grid is not None:
        (folder / "grid.json").write_text(json.dumps(grid))
    return folder


SIZES = {"desktop": (1280, 800), "phone": (390, 844)}
OVERFLOW = """
return [...document.body.querySelectorAll("*")].filter((element) => {
  const box = element.getBoundingClientRect(), tall = document.documentElement.scrollHeight;
  const wide = element.clientWidth && element.scrollWidth > element.clientWidth + 1;
  return box.width && (wide || box.left < -1 || box.right > innerWidth + 1
    || box.bottom + scrollY > tall + 1);
}).map((element) => `${element.tagName} ${element.id} ${element.textContent.trim().slice(0, 50)}`)
"""
POINT = """
const [name, column, row] = arguments, item = document.getElementById(name);
item.scrollIntoView({ block: "center" });
const box = item.getBoundingClientRect();
return { x: box.left + column * box.width, y: box.top + row * box.height };
"""


@pytest.fixture(scope="session")
def chromium() -> Iterator:
    """Start one headless Chromium for all tests of a worker, or skip and say what is missing."""
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
    names = ("google-chrome", "chromium", "chromium-browser", "chrome")
    browser, driver = next(filter(None, map(shutil.which, names)), None), "chromedriver"
    if browser is None or shutil.which(driver) is None:
        pytest.skip("no Chromium or Chrome with chromedriver on the PATH")
    options = webdriver.ChromeOptions()
    options.binary_location = browser
    arguments = "headless=new no-sandbox disable-dev-shm-usage "
    arguments += "use-angle=swiftshader enable-unsafe-swiftshader ignore-gpu-blocklist"  # for WebGL
    for argument in arguments.split():
        options.add_argument(f"--{argument}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    chromium = webdriver.Chrome(options, webdriver.ChromeService(shutil.which(driver)))
    yield chromium
    chromium.quit()


@pytest.fixture(params=SIZES)
def browser(chromium, request: pytest.FixtureRequest):
    """Give an empty browser of a desktop's and of a phone's size, with an empty console."""
    width, height = SIZES[request.param]
    look = {"width": width, "height": height, "deviceScaleFactor": 1}
    phone = request.param == "phone"
    chromium.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", look | {"mobile": phone})
    chromium.execute_cdp_cmd("Emulation.setTouchEmulationEnabled", {"enabled": phone})
    chromium.implicitly_wait(20)  # seconds that an element may take to appear
    chromium.get("about:blank")
    chromium.get_log("browser")
    return chromium


def assert_page_is_whole(browser) -> None:
    """Check a loaded page: nothing cut off or wider than the window, no error, nothing fetched."""
    assert browser.execute_script(OVERFLOW) == []
    width = "return [document.documentElement.scrollWidth, innerWidth]"
    page, window = browser.execute_script(width)
    assert page <= window
    assert_no_error_and_nothing_fetched(browser)


def assert_no_error_and_nothing_fetched(browser) -> None:
    """Check the console and the requests of a loaded page."""
    assert [entry for entry in browser.get_log("browser") if entry["level"] != "INFO"] == []
    entries = browser.execute_script("return performance.getEntriesByType('resource')")
    names = [entry["name"] for entry in entries]
    assert [name for name in names if not name.startswith(("file:", "data:"))] == []


def text_of(browser, name: str) -> str:
    """Return the text of the element of this id."""
    return browser.execute_script(f"return document.getElementById('{name}').textContent")


def operate(browser, name: str, value: object = None) -> None:
    """Click the control of this id, or give it a value as its user would."""
    script = "const item = document.getElementById(arguments[0]), value = arguments[1];"
    script += "if (value === null) { item.click(); return; } item.value = value;"
    script += "['input', 'change'].forEach((kind) => item.dispatchEvent(new Event(kind)));"
    browser.execute_script(script, name, value)


def drag(browser, name: str, *places: tuple[float, float]) -> None:
    """Press an element at the first place, in shares of its sides, move to the others, let go."""
    points = [browser.execute_script(POINT, name, *place) for place in places]
    for kind, point in zip(("Start", *["Move"] * (len(places) - 1), "End"), [*points, points[-1]]):
        if browser.execute_script("return innerWidth < 800"):  # by a finger
            event = {"type": f"touch{kind}", "touchPoints": [] if kind == "End" else [point]}
            browser.execute_cdp_cmd("Input.dispatchTouchEvent", event)
        else:
            kind = {"Start": "Pressed", "Move": "Moved", "End": "Released"}[kind]
            event = {"type": f"mouse{kind}", "button": "left", "buttons": 1, "clickCount": 1}
            browser.execute_cdp_cmd("Input.dispatchMouseEvent", event | point)
