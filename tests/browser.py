"""A page in headless Chromium, driven by selenium; tests skip with a reason where one of them is missing.

with open_browser() as browser:
    browser.open("file:///tmp/report.html", width=400)
    assert not browser.errors() and not browser.requests() and browser.overflow() == 0
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest


#: Width of a desktop's and of a phone's window, in CSS pixels.
WIDTHS = (1280, 400)
#: Addresses without a network: what is in the page itself, or the browser's own.
INTERNAL = ("data:", "blob:", "about:", "chrome:", "chrome-extension:", "devtools:")


class Browser:
    """An open browser, with one page at a time.

    Args:
        driver: of selenium, for all that this class does not do.
    """

    def __init__(self, driver: Any):
        self.driver = driver
        self._address = ""

    def open(self, address: str | Path, width: int = WIDTHS[0], height: int = 900, dark: bool = False) -> None:
        """Open a page and wait until it is loaded; what was seen of the page before is forgotten.

        Args:
            address: a URL, or a file.
            width, height: of the page's window in CSS pixels.
            dark: whether the user prefers dark colours.
        """
        self._address = address.absolute().as_uri() if isinstance(address, Path) else address
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [scheme]})
        for kind in ("browser", "performance"):
            self.driver.get_log(kind)
        self.driver.get(self._address)

    def run(self, script: str, *arguments) -> Any:
        """What JavaScript returns."""
        return self.driver.execute_script(script, *arguments)

    def errors(self) -> list[str]:
        """Messages of the console that are errors, since the page was opened or this was last asked."""
        return [entry["message"] for entry in self.driver.get_log("browser") if entry["level"] == "SEVERE"]

    def requests(self) -> list[str]:
        """Addresses that were asked for beside the page itself, since the page was opened or this was last asked."""
        messages = [json.loads(entry["message"])["message"] for entry in self.driver.get_log("performance")]
        asked = [m["params"]["request"]["url"] for m in messages if m["method"] == "Network.requestWillBeSent"]
        return [address for address in asked if address != self._address and not address.startswith(INTERNAL)]

    def overflow(self) -> int:
        """CSS pixels by which the page is wider than its window."""
        return self.run("const e = document.documentElement; return e.scrollWidth - e.clientWidth")

    def broken_images(self) -> list[str]:
        """The first letters of the addresses of images that could not be shown."""
        return self.run(
            "return [...document.images].filter(i => !i.complete || !i.naturalWidth).map(i => i.src.slice(0, 80))"
        )

    def text(self) -> str:
        """What a reader sees of the page, without what is folded up."""
        return self.run("return document.body.innerText")

    def screenshot(self, path: Path, whole: bool = True) -> None:
        """Write a PNG of the page, or of its window alone."""
        if whole:
            height = self.run("return document.documentElement.scrollHeight")
            width = self.run("return document.documentElement.clientWidth")
            size = {"width": width, "height": min(height, 16000), "deviceScaleFactor": 1, "mobile": False}
            self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        path.write_bytes(self.driver.get_screenshot_as_png())


@contextmanager
def open_browser(*arguments: str) -> Iterator[Browser]:
    """A browser for the block; skips the test without selenium, Chromium or its driver.

    Args:
        arguments: of Chromium, beside those that it needs to run here.
    """
    selenium = pytest.importorskip("selenium.webdriver", reason="a browser needs the package selenium")
    programs = {name: shutil.which(name) for name in ("chromium", "chromedriver")}
    if missing := [name for name, path in programs.items() if path is None]:
        pytest.skip(f"a browser needs the program {' and '.join(missing)}")
    options = selenium.ChromeOptions()
    options.binary_location = programs["chromium"]
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        for argument in (
            "--headless=new",
            "--no-sandbox",  # containers have none, and the pages are ours
            "--disable-dev-shm-usage",
            "--disable-gpu",
            "--disable-background-networking",
            "--disable-component-update",
            "--no-first-run",
            "--force-color-profile=srgb",
            f"--user-data-dir={profile}",
            *arguments,
        ):
            options.add_argument(argument)
        service = selenium.ChromeService(executable_path=programs["chromedriver"])
        driver = selenium.Chrome(options=options, service=service)
        try:
            driver.set_page_load_timeout(60)
            yield Browser(driver)
        finally:
            driver.quit()
