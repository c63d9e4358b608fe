"""Ray's dashboard while a step runs: it asks for the cluster's token, and shows the step by its name with its progress."""

import os
import secrets
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from selenium.webdriver.common.by import By
from selenium.webdriver.remote.webdriver import WebDriver
from selenium.webdriver.remote.webelement import WebElement
from selenium.webdriver.support.ui import WebDriverWait

from tests.browser import needs_browser, open_browser
from tests.cluster.machines import free_port
from tests.pipeline.small_loop import REPOSITORY, environment

pytestmark = [pytest.mark.slow, pytest.mark.ray, needs_browser]
UP_SECONDS = 600.0
PICTURES = Path(os.environ.get("SYNPREF_PICTURES") or REPOSITORY / ".pytest_cache")
OVERVIEW = "//h4[contains(., 'Ray Data Overview')]"
FIRST_JOB = "01000000"


@dataclass(frozen=True)
class Session:
    """A running step: where its dashboard is, the token that this asks for, and the step's workspace."""

    url: str
    token: str
    workspace: Path


@pytest.fixture
def session(tmp_path: Path) -> Iterator[Session]:
    port, folder = free_port(), tempfile.mkdtemp(prefix="ray-")  # short: the path of a socket in it may have 107 bytes
    found = Session(f"http://127.0.0.1:{port}", secrets.token_hex(32), tmp_path / "ws")
    (tmp_path / "token").write_text(found.token)
    plain = {key: value for key, value in environment().items() if not key.startswith("RAY_")}
    patient = {"RAY_DASHBOARD_STARTUP_TIMEOUT_S": "600", "RAY_raylet_start_wait_time_s": "300"}
    command = [sys.executable, "-m", "tests.cluster.dashboard_session", str(found.workspace), folder, str(port)]
    with (tmp_path / "log").open("w") as log:
        step = subprocess.Popen(
            command,
            cwd=REPOSITORY,
            stdout=log,
            stderr=log,
            env={**plain, **patient, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(tmp_path / "token")},
        )
    try:

        def works(_: object) -> bool:
            assert step.poll() is None, (tmp_path / "log").read_text()[-3000:]
            return len(list(found.workspace.glob("pools/seed/lengths/*/shard-*.parquet"))) >= 4

        WebDriverWait(None, UP_SECONDS, 1.0).until(works)  # type: ignore[type-var]
        yield found
    finally:
        step.terminate()
        step.wait(timeout=120)
        shutil.rmtree(folder, ignore_errors=True)


def wait_for(browser: WebDriver, found: Callable[[WebDriver], WebElement]) -> WebElement:
    """Return an element as soon as it is there."""
    return WebDriverWait(browser, UP_SECONDS, ignored_exceptions=(IndexError,)).until(found)


def look(browser: WebDriver, session: Session, picture: Path) -> str:
    """Give the token, open the job's page with its operators, take a picture; return the page's text."""
    browser.get(f"{session.url}/#/jobs/{FIRST_JOB}")
    dialog = wait_for(browser, lambda page: page.find_element(By.CSS_SELECTOR, "[role=dialog] input[type=password]"))
    assert "Authentication Token" in browser.find_element(By.CSS_SELECTOR, "[role=dialog]").text
    dialog.send_keys(session.token)
    next(button for button in browser.find_elements(By.CSS_SELECTOR, "[role=dialog] button") if button.text.upper() == "SUBMIT").click()
    heading = wait_for(browser, lambda page: page.find_element(By.XPATH, OVERVIEW))
    browser.execute_script("arguments[0].click()", heading)  # the page's own bar may lie over it
    row = wait_for(browser, lambda page: page.find_elements(By.CSS_SELECTOR, "table tbody tr")[0])
    browser.execute_script(
        "arguments[0].dispatchEvent(new MouseEvent('click', {bubbles: true}))", row.find_element(By.CSS_SELECTOR, "td svg, th svg")
    )
    wait_for(browser, lambda page: page.find_elements(By.XPATH, "//table//*[contains(text(), 'tag (tagger)')]")[0])
    browser.execute_script("arguments[0].scrollIntoView(); document.documentElement.scrollTop -= 150; document.body.scrollTop -= 150", heading)
    picture.parent.mkdir(exist_ok=True)
    assert browser.save_screenshot(str(picture))
    return browser.find_element(By.TAG_NAME, "body").text


def test_the_dashboard_asks_for_the_token_and_shows_the_step_by_its_name(session: Session, tmp_path: Path) -> None:
    browser = open_browser(tmp_path / "profile", "1500,900")
    try:
        text = look(browser, session, PICTURES / "ray-dashboard.png")
    finally:
        browser.quit()
    assert "tag (tagger)" in text
    assert "RUNNING" in text
