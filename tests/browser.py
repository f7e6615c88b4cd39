"""A real browser, headless, and what its reader sees of the dashboard page."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil

WALK = """
const found = [];
const walk = root => {
  for (const element of root.querySelectorAll("*")) {
    if (element.matches(arguments[0])) found.push(element);
    if (element.shadowRoot) walk(element.shadowRoot);
  }
};
walk(document);
"""
READ = WALK + "return found.map(one => ({...one.dataset, text: one.innerText, width: one.naturalWidth ?? 0}))"
COLUMN = """
const plot = Bokeh.documents[0].get_model_by_name(arguments[0]);
const values = [];
for (const renderer of plot.renderers) {
  const column = renderer.data_source.data[arguments[1]];
  if (column !== undefined) values.push(...column);
}
return values
"""
PLACE = """
const plot = Bokeh.documents[0].get_model_by_name(arguments[0]), view = Bokeh.index.find_one(plot);
const data = plot.renderers.map(one => one.data_source.data).find(one => one[arguments[1]] && one[arguments[2]]);
const box = view.el.getBoundingClientRect();
const last = data[arguments[1]].length - 1;
return [
  box.left + view.frame.x_scale.compute(data[arguments[1]][last]),
  box.top + view.frame.y_scale.compute(data[arguments[2]][last]),
]
"""


class Page:
    """An open page; Bokeh's parts live in shadow roots, so that they are searched one by one."""

    def __init__(self, driver: Any) -> None:
        self.driver = driver

    def read(self, selector: str) -> list[dict[str, Any]]:
        """``text`` and data attributes of all elements that match; for pictures their natural ``width``."""
        found: list[dict[str, Any]] = self.driver.execute_script(READ, selector)
        return found

    def column(self, plot: str, name: str) -> list[Any]:
        """The values of one column of a plot's data, as the browser has them."""
        values: list[Any] = self.driver.execute_script(COLUMN, plot, name)
        return values

    def hover(self, plot: str, x: str, y: str) -> None:
        """Put the mouse on the last point of a plot whose columns are ``x`` and ``y``."""
        from selenium.webdriver.common.action_chains import ActionChains

        left, top = self.driver.execute_script(PLACE, plot, x, y)
        chain = ActionChains(self.driver)
        chain.w3c_actions.pointer_action.move_to_location(round(left), round(top))
        chain.perform()

    def fact(self, name: str) -> str:
        return " ".join(one["text"] for one in self.read(f"[data-fact={name}]"))

    def errors(self) -> list[str]:
        return [entry["message"] for entry in self.driver.get_log("browser") if entry["level"] == "SEVERE"]

    def processes(self) -> list[psutil.Process]:
        """The browser's own, without the driver."""
        return psutil.Process(self.driver.service.process.pid).children(recursive=True)

    def screenshot(self, path: Path) -> None:
        self.driver.save_screenshot(str(path))


@contextmanager
def open_page(url: str, scheme: str = "light") -> Iterator[Page]:
    """Load ``url`` in Debian's chromium, with the colour scheme that its reader prefers."""
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    programs = {name: shutil.which(name) for name in ("chromium", "chromedriver")}
    missing = [name for name, path in programs.items() if path is None]
    if missing:
        raise RuntimeError(f"no {' and no '.join(missing)} here; run: apt-get install -y chromium chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = str(programs["chromium"])
    for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--window-size=1400,1650"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(str(programs["chromedriver"])))
    try:
        preferred = [{"name": "prefers-color-scheme", "value": scheme}]
        driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": preferred})
        driver.get(url)
        yield Page(driver)
    finally:
        service = driver.service
        for process in psutil.Process(service.process.pid).children(recursive=True):
            process.kill()  # a browser that a test stopped or killed does not quit
        service.process.kill()
        service.process.wait(10)
