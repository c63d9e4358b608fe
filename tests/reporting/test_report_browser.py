"""The report in headless Chromium: it asks for nothing, hostile pairs stay inert, and it can be read in light and dark, on a desk and on a phone."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from selenium.webdriver.remote.webdriver import WebDriver

from jobs import report as job
from tests.browser import needs_browser, open_browser, requested, shoot_page
from tests.pipeline.small_loop import REPOSITORY
from tests.reporting.small_workspace import make_workspace
from tests.reporting.test_report import EVIL

pytestmark = [pytest.mark.slow, needs_browser]
PICTURES = Path(os.environ.get("SYNPREF_PICTURES") or REPOSITORY / ".pytest_cache")
LUMINANCES = """
const light = color => {
  const [r, g, b] = color.match(/[\\d.]+/g).map(Number).map(v => (v /= 255) <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
  return 0.2126 * r + 0.7152 * g + 0.0722 * b;
};
const paper = light(getComputedStyle(document.body).backgroundColor);
const contrast = color => { const own = light(color); return (Math.max(own, paper) + 0.05) / (Math.min(own, paper) + 0.05); };
const texts = [...document.querySelectorAll('p, td, th, h1, h2, dt, dd, pre, figcaption')].map(e => contrast(getComputedStyle(e).color));
const drawn = [...document.querySelectorAll('svg text')].map(e => contrast(getComputedStyle(e).fill));
const lines = ['--c1', '--c2', '--c3', '--c4', '--c5', '--c6'].map(name => {
  const probe = document.body.appendChild(document.createElement('i'));
  probe.style.color = `var(${name})`;
  return contrast(getComputedStyle(probe).color);
});
return {paper, texts: Math.min(...texts), lines: Math.min(...lines), drawn: drawn.length};
"""


@pytest.fixture
def browser(tmp_path: Path) -> Iterator[WebDriver]:
    driver = open_browser(tmp_path / "profile", "1400,1000", log_requests=True)
    yield driver
    driver.quit()


def scheme(browser: WebDriver, name: str) -> None:
    features = {"features": [{"name": "prefers-color-scheme", "value": name}]}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", features)  # type: ignore[attr-defined]


@pytest.mark.parametrize("hostile", [False, True])
def test_a_report_asks_for_nothing_and_can_be_read(tmp_path: Path, browser: WebDriver, hostile: bool) -> None:
    storage = make_workspace(tmp_path / "ws", hostile=EVIL if hostile else ())
    page = tmp_path / "report.html"
    assert job.main(["html", f"workspace={storage.url}", f"out={page}"]) == 0
    requested(browser)
    browser.get(page.as_uri())
    facts = browser.execute_script(
        """
        const all = [...document.querySelectorAll('*')];
        return {
          tags: all.filter(e => ['SCRIPT', 'IMG', 'IFRAME', 'LINK', 'BASE', 'OBJECT', 'FORM'].includes(e.tagName.toUpperCase())).length,
          handlers: all.filter(e => [...e.attributes].some(a => a.name.startsWith('on'))).length,
          charts: [...document.querySelectorAll('.chart svg')].filter(e => e.clientWidth < 300 || e.clientHeight < 60).length,
          sideways: document.documentElement.scrollWidth > document.documentElement.clientWidth,
          unnamed: [...document.querySelectorAll('[role=img], [role=region]')].filter(e => !e.getAttribute('aria-label')).length,
          targets: [...document.querySelectorAll('nav a')].filter(a => !document.getElementById(a.hash.slice(1))).length,
          xss: typeof window.xss,
        }
        """
    )
    assert facts == {"tags": 0, "handlers": 0, "charts": 0, "sideways": False, "unnamed": 0, "targets": 0, "xss": "undefined"}
    for name, is_light in (("light", True), ("dark", False)):
        scheme(browser, name)
        seen = browser.execute_script(LUMINANCES)
        assert (seen["paper"] > 0.5) is is_light
        assert seen["texts"] >= 4.5, "WCAG 2.1, AA: text"
        assert seen["lines"] >= 3.0, "WCAG 2.1, AA: graphics"
        assert seen["drawn"] > 100
        shoot_page(browser, PICTURES / f"report-{'hostile-' * hostile}{name}.png")
    browser.set_window_size(400, 900)
    assert not browser.execute_script("return document.documentElement.scrollWidth > document.documentElement.clientWidth")
    shoot_page(browser, PICTURES / f"report-{'hostile-' * hostile}phone.png", height=4000)
    assert [url for url in requested(browser) if url != page.as_uri()] == []
    assert [entry["message"] for entry in browser.get_log("browser")] == []
