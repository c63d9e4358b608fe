"""A person at the real app in headless Chromium: sign in, vote by keyboard, undo, edit attributes, finish; and hostile pairs that stay inert."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.remote.webdriver import WebDriver
from selenium.webdriver.support import expected_conditions as expected
from selenium.webdriver.support.ui import Select, WebDriverWait
from sqlalchemy import select

from synpref_ray.human.accounts import Accounts, LoginConfig
from synpref_ray.human.assignments import AnnotationQueue, NewItem
from synpref_ray.human.database import Role, VerdictRow
from synpref_ray.human.protocol import ProtocolConfig
from synpref_ray.pipeline.annotation import AnnotateConfig
from tests.browser import needs_browser, open_browser
from tests.human.live import REPOSITORY, LiveServer
from tests.human.site import QUICK_HASHER, SECRET, TAGS, make_item
from tests.human.test_rendering import HOSTILE

pytestmark = [pytest.mark.slow, needs_browser]
PLAN = """Here is a plan for **three evenings**:

1. *Day one:* read the chapter and mark what is new.
2. *Day two:* solve the exercises, at most forty minutes.
3. *Day three:* explain it aloud, then rest.

| day | minutes |
|-----|---------|
| 1   | 60      |
| 2   | 40      |
"""
CODE = """The list is changed while it is walked over. Build a new one:

```python
def evens(numbers):
    return [number for number in numbers if number % 2 == 0]
```

It keeps the order, and the input stays as it was.
"""
PROMPT = [
    {
        "role": "user",
        "content": "I want to keep the even numbers of a list. Why does this skip some?\n\n```python\nfor n in ns:\n    if n % 2: ns.remove(n)\n```",
    },
    {"role": "assistant", "content": "Because `ns` changes while the loop walks over it."},
    {"role": "user", "content": "Show me how to write it."},
]


@pytest.fixture
def browser(tmp_path: Path) -> Iterator[WebDriver]:
    driver = open_browser(tmp_path / "profile", "1440,1000")
    yield driver
    driver.quit()


def fill(workspace: Path, items: list[NewItem]) -> AnnotateConfig:
    config = AnnotateConfig(workspace=str(workspace))
    database = config.open_database()
    accounts = Accounts(database, LoginConfig(), QUICK_HASHER)
    accounts.save_user("ann", Role.ANNOTATOR, SECRET)
    accounts.save_user("root", Role.ADMIN, SECRET)
    AnnotationQueue(database, ProtocolConfig()).add(items)
    database.close()
    return config


def sign_in(browser: WebDriver, url: str, name: str) -> None:
    browser.get(f"{url}/login")
    browser.find_element(By.ID, "name").send_keys(name)
    browser.find_element(By.ID, "secret").send_keys(SECRET, Keys.ENTER)
    wait(browser).until(expected.url_to_be(f"{url}/"))


def wait(browser: WebDriver) -> WebDriverWait[WebDriver]:
    return WebDriverWait(browser, 60)


def press(browser: WebDriver, *keys: str) -> None:
    ActionChains(browser).send_keys(*keys).perform()


def next_page(browser: WebDriver, key: str, *, control: bool = False) -> None:
    """Press a key and wait until another page has come."""
    before = browser.find_element(By.TAG_NAME, "html")
    if control:
        ActionChains(browser).key_down(Keys.CONTROL).send_keys(key).key_up(Keys.CONTROL).perform()
    else:
        press(browser, key)
    wait(browser).until(expected.staleness_of(before))
    wait(browser).until(lambda driver: driver.execute_script("return document.readyState") == "complete")


def assert_no_complaints(browser: WebDriver) -> None:
    """Neither a script error nor a refused source: the policy had nothing of ours to stop."""
    assert [entry["message"] for entry in browser.get_log("browser") if entry["level"] == "SEVERE" and "422" not in entry["message"]] == []


def test_a_person_works_through_the_queue_by_keyboard(tmp_path: Path, browser: WebDriver) -> None:
    code = {**TAGS, "task_category": "coding_and_debugging", "desired_attributes": "correct, short", "annotation_guideline": "Run both versions."}
    items = [
        make_item(0, prompt=PROMPT, chosen=CODE, rejected="Use `filter`:\n\n- it is shorter\n- `list(filter(lambda n: n % 2, ns))`", attributes=code),
        make_item(1, prompt=[{"role": "user", "content": "Plan three evenings of study."}], chosen=PLAN, rejected="Study hard. Good luck!"),
        make_item(2),
    ]
    config = fill(tmp_path, [NewItem(**{**vars(items[0]), "notes": {"chosen": "correct: ran on four lists"}}), *items[1:]])
    with LiveServer(tmp_path) as server:
        sign_in(browser, server.url, "ann")
        next_page(browser, Keys.ENTER)  # the button has the focus
        press(browser, "1", "9")
        shoot(browser, "annotation.png")
        next_page(browser, Keys.ENTER)
        assert "Code must be run" in browser.find_element(By.CSS_SELECTOR, "[role=alert]").text
        press(browser, "c")
        press(browser, "evens([1, 2, 4]) gave [2, 4]", Keys.ESCAPE)
        assert browser.find_element(By.ID, "code_run").get_attribute("value") == "evens([1, 2, 4]) gave [2, 4]"
        assert not browser.find_element(By.NAME, "own_judgement").is_displayed()
        press(browser, "g")  # folded, and so it stays on the next page
        wait(browser).until(lambda driver: not driver.find_element(By.ID, "guideline").is_displayed())
        press(browser, "r")
        press(browser, "the other one keeps the odd ones", Keys.ESCAPE)
        next_page(browser, Keys.ENTER)
        assert "Plan three evenings" in browser.find_element(By.ID, "main").text
        assert not browser.find_element(By.ID, "guideline").is_displayed()
        press(browser, "g")
        press(browser, "0")
        next_page(browser, Keys.ENTER)
        next_page(browser, "u")  # not undecidable after all
        assert browser.find_element(By.CSS_SELECTOR, "input[value=undecidable]").is_selected()
        press(browser, "2", "e")
        guideline = browser.find_element(By.ID, "guideline").text
        Select(browser.find_element(By.ID, "task_category")).select_by_value("planning")
        wait(browser).until(lambda driver: driver.find_element(By.ID, "guideline").text != guideline)
        next_page(browser, Keys.ENTER, control=True)  # works inside a field too
        press(browser, "1")
        next_page(browser, Keys.ENTER)
        assert "All done" in browser.find_element(By.TAG_NAME, "h1").text
        assert_no_complaints(browser)
        sign_in(browser, server.url, "root")
        browser.get(f"{server.url}/admin")
        assert browser.find_element(By.ID, "count-settled").text == "3"
        shoot(browser, "annotation-admin.png")
        browser.set_window_size(360, 900)
        assert not browser.execute_script("return document.documentElement.scrollWidth > document.documentElement.clientWidth")
        broken = """
            return [...document.querySelectorAll('th, td')].filter(cell => {
              const all = document.createRange();
              all.selectNodeContents(cell);
              const lines = new Set([...all.getClientRects()].map(box => Math.round(box.bottom / 8)));
              return lines.size > cell.textContent.trim().split(/[\\s-]+/).length;
            }).map(cell => cell.textContent)
        """
        assert browser.execute_script(broken) == []  # no word and no figure of a table is broken over lines
        assert server.stop() == 0
    database = config.open_database()
    with database.read() as session:
        rows = list(session.scalars(select(VerdictRow).order_by(VerdictRow.id)))
    assert [row.verdict for row in rows][1:3] == ["undecidable", "withdrawn"]
    assert rows[0].strength == 3
    assert rows[0].rationale == "the other one keeps the odd ones"
    assert rows[3].attributes["task_category"] == "planning"


@pytest.mark.parametrize("width", [360, 1440])
def test_hostile_pairs_stay_inert(tmp_path: Path, browser: WebDriver, width: int) -> None:
    evil = "\n\n".join([*HOSTILE, "\u05e9\u05dc\u05d5\u05dd \u05e2\u05d5\u05dc\u05dd", "\u202egnp.exe", "[a](https://example.org)"])
    huge = "word " * 40_000 + "the end"
    fill(
        tmp_path,
        [make_item(0, prompt=[{"role": "user", "content": evil}], chosen=evil, rejected=huge, attributes={**TAGS, "desired_attributes": evil})],
    )
    browser.set_window_size(width, 900)
    with LiveServer(tmp_path) as server:
        sign_in(browser, server.url, "ann")
        next_page(browser, Keys.ENTER)
        facts = browser.execute_script(
            """
            const all = [...document.querySelectorAll('main *')];
            return {
              tags: all.filter(e => ['SCRIPT', 'IMG', 'IFRAME', 'SVG', 'STYLE', 'BASE', 'OBJECT'].includes(e.tagName.toUpperCase())).length,
              handlers: all.filter(e => [...e.attributes].some(a => a.name.startsWith('on'))).length,
              links: [...document.querySelectorAll('main .text a[href]')].map(a => [a.protocol, a.rel, a.target]),
              huge: [...document.querySelectorAll('.reply .text')].some(e => e.textContent.includes('the end')),
              folded: [...document.querySelectorAll('.long')].every(e => e.clientHeight < 900),
              sideways: document.documentElement.scrollWidth > document.documentElement.clientWidth,
              hebrew: [...document.querySelectorAll('.message p')]
                .filter(p => p.textContent.startsWith('\\u05e9')).map(p => getComputedStyle(p).unicodeBidi),
              unlabelled: [...document.querySelectorAll('input:not([type=hidden]), select, textarea')].filter(e => !e.labels.length).map(e => e.name),
            }
            """
        )
        assert (facts["tags"], facts["handlers"]) == (0, 0)
        assert facts["links"]
        assert all(protocol in ("http:", "https:") and "noopener" in rel and target == "_blank" for protocol, rel, target in facts["links"])
        assert facts["huge"]
        assert facts["folded"]
        assert not facts["sideways"]
        assert facts["hebrew"] == ["plaintext"]
        assert facts["unlabelled"] == []
        assert_no_complaints(browser)
        assert browser.execute_script("return typeof window.xss") == "undefined"
        if width == 360:
            shoot(browser, "annotation-phone.png")


def shoot(browser: WebDriver, name: str) -> None:
    """Take a picture; SYNPREF_PICTURES names the folder in which those of docs/ are made anew."""
    folder = Path(os.environ.get("SYNPREF_PICTURES") or REPOSITORY / ".pytest_cache")
    folder.mkdir(exist_ok=True)
    assert browser.save_screenshot(str(folder / name))
