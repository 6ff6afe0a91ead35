"""The report in a real browser: it sorts, filters, zooms, fits a phone, runs nothing else."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn

import graphprune
from graphprune.training import History

webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
if not CHROMIUM or not DRIVER:
    pytest.skip("there is no chromium with its chromedriver", allow_module_level=True)
# Sockets of the driver are closed when it quits, and reported by the collector where it is late.
pytestmark = pytest.mark.filterwarnings("ignore::ResourceWarning")

EVIL = "<script>window.ran = true</script><img src=x onerror='window.ran = true'>"


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.add_module(EVIL.replace(".", ""), nn.Conv2d(3, 4, 3))
        self.wide = nn.Conv2d(4, 32, 3)
        self.narrow_layer_with_a_long_name_that_has_to_fit_on_a_phone = nn.Conv2d(32, 8, 3)
        self.head = nn.Linear(8, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for conv in list(self.children())[:3]:
            x = torch.relu(conv(x))
        return self.head(x.mean((2, 3)))


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> str:
    net, x = Net().eval(), torch.zeros(1, 3, 16, 16)
    plan = graphprune.trace(net, x).plan(0.5)
    small = graphprune.rebuild(net, plan)
    history = History(x)
    for step, model in enumerate((net, small, small)):
        history.record(model, step, EVIL, accuracy=0.5 + step / 10)
    path = tmp_path_factory.mktemp("report") / "report.html"
    plan.report(
        path, net, x, small=small, verification=graphprune.verify(net, small, x),
        measured=(graphprune.measure(net, x), graphprune.measure(small, x)),
        accuracy={EVIL: (0.5, 0.25)}, history=history, command=EVIL, title=EVIL,
    )  # fmt: skip
    return path.as_uri()


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    options.add_argument("--headless=new")
    options.add_argument("--disable-dev-shm-usage")
    options.add_argument("--window-size=1400,1100")
    options.add_argument(f"--user-data-dir={tmp_path_factory.mktemp('profile')}")
    if os.name == "posix" and os.geteuid() == 0:
        options.add_argument("--no-sandbox")  # as whose user chromium does not start with one
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    yield driver
    driver.quit()


def show(browser: Any, address: str, width: int = 1280, dark: bool = False) -> None:
    screen = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600}
    scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
    still = {"name": "prefers-reduced-motion", "value": "reduce"}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", screen)
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [scheme, still]})
    browser.get(address)


def names(browser: Any) -> list[str]:
    code = "return [...document.querySelectorAll('#layer-rows tr')].filter(r => !r.hidden)"
    return browser.execute_script(f"{code}.map(r => r.cells[1].textContent.trim())")


def head(browser: Any, title: str) -> Any:
    code = "return [...document.querySelectorAll('#layers thead button')]"
    return browser.execute_script(f"{code}.find(b => b.textContent === arguments[0])", title)


def test_nothing_runs_and_nothing_is_loaded_but_the_page(browser: Any, address: str) -> None:
    show(browser, address)
    assert browser.execute_script("return window.ran === undefined")
    assert browser.execute_script("return performance.getEntriesByType('resource').length") == 0
    assert browser.get_log("browser") == []
    assert browser.execute_script("return document.querySelector('h1').textContent") == EVIL
    policy = "const s = document.createElement('script'); s.textContent = 'window.ran = true';"
    browser.execute_script(f"{policy} document.body.append(s)")
    assert browser.execute_script("return window.ran === undefined"), "the policy stops any script"


def test_titles_sort_by_click_and_by_key(browser: Any, address: str) -> None:
    show(browser, address)
    as_run = names(browser)
    macs = head(browser, "MACs before")
    macs.click()
    assert names(browser)[:2] == as_run[2:0:-1]  # the largest first
    assert macs.find_element("xpath", "..").get_attribute("aria-sort") == "descending"
    macs.send_keys("\n")
    assert names(browser)[-2:] == as_run[1:3]
    assert macs.find_element("xpath", "..").get_attribute("aria-sort") == "ascending"
    head(browser, "layer").click()
    assert names(browser) == sorted(as_run)
    head(browser, "#").send_keys(" ")
    assert names(browser) == as_run


def test_layers_are_filtered(browser: Any, address: str) -> None:
    show(browser, address)
    box = browser.find_element("id", "filter")
    box.send_keys("conv wide")
    assert names(browser) == ["wide"]
    assert browser.find_element("id", "shown").text == "1 of 4"
    box.clear()
    box.send_keys(" ")
    assert len(names(browser)) == 4


def test_the_graph_zooms(browser: Any, address: str) -> None:
    show(browser, address)

    def width() -> float:
        return browser.execute_script("return document.querySelector('.picture').clientWidth")

    first = width()
    browser.find_element("css selector", "[data-zoom=in]").click()
    assert width() > 1.2 * first
    canvas = browser.find_element("id", "canvas")
    for key in "---":
        canvas.send_keys(key)
    assert width() < 0.8 * first
    canvas.send_keys("0")
    assert width() == pytest.approx(first, abs=1)


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390], ids=["desktop", "phone"])
def test_it_fits_and_can_be_read(browser: Any, address: str, width: int, dark: bool) -> None:
    """Nothing is wider than the screen, and all text stands out from what is behind it."""
    show(browser, address, width, dark)
    sizes = "const page = document.documentElement; return [page.scrollWidth, page.clientWidth]"
    needed, there = browser.execute_script(sizes)
    assert needed <= there
    paper = browser.execute_script("return getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, paper[4:-1].split(","))) < 200) == dark
    assert browser.execute_script(CONTRAST) == []


CONTRAST = """
const light = (text) => text.match(/[\\d.]+/g).slice(0, 3).map(Number).map(v => v / 255)
  .map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
  .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
const behind = (node) => {
  for (; node; node = node.parentElement) {
    const colour = getComputedStyle(node).backgroundColor;
    if (!/, 0\\)$/.test(colour) && colour !== "transparent") return colour;
  }
};
const poor = [];
for (const node of document.querySelectorAll("body *:not(script):not(svg)")) {
  const own = [...node.childNodes].some(c => c.nodeType === 3 && c.textContent.trim());
  if (!own || node.tagName === "title" || node.closest(".arrow")) continue;
  const style = getComputedStyle(node);
  const ink = light(node.tagName === "text" ? style.fill : style.color), back = light(behind(node));
  const ratio = (Math.max(ink, back) + 0.05) / (Math.min(ink, back) + 0.05);
  if (ratio < 4.5) poor.push([node.tagName, node.textContent.trim().slice(0, 30), ratio]);
}
return poor;
"""
