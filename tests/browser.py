"""Headless Chromium for tests that look at pages, and the reason why they are skipped where there is none."""

import base64
import json
import shutil
from pathlib import Path

import pytest
from selenium import webdriver
from selenium.webdriver.remote.webdriver import WebDriver

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
needs_browser = pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="no Chromium here (Debian: apt-get install chromium chromium-driver)")
FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"),
    *("--disable-component-update", "--disable-sync", "--disable-dev-shm-usage", "--force-color-profile=srgb"),
)


def open_browser(profile: Path, window: str, *, log_requests: bool = False) -> WebDriver:
    """Start a browser with a profile of its own; `window` is its width and height."""
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM or ""
    for flag in (*FLAGS, f"--user-data-dir={profile}", f"--window-size={window}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", **({"performance": "ALL"} if log_requests else {})})
    return webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))


def requested(browser: WebDriver) -> list[str]:
    """Return the addresses of all requests since the last call; the browser logs them if it was asked to."""
    messages = (json.loads(entry["message"])["message"] for entry in browser.get_log("performance"))
    return [message["params"]["request"]["url"] for message in messages if message["method"] == "Network.requestWillBeSent"]


def shoot_page(browser: WebDriver, file: Path, *, height: int | None = None) -> None:
    """Take a picture of the page from its top, whole or so many pixels of it."""
    width, whole = (browser.execute_script(f"return document.documentElement.{name}") for name in ("scrollWidth", "scrollHeight"))
    clip = {"x": 0, "y": 0, "width": width, "height": min(whole, height or whole), "scale": 1}
    picture = browser.execute_cdp_cmd("Page.captureScreenshot", {"captureBeyondViewport": True, "clip": clip})  # type: ignore[attr-defined]
    file.parent.mkdir(exist_ok=True)
    file.write_bytes(base64.b64decode(picture["data"]))
