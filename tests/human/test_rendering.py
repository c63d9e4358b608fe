"""Texts of strangers render inert, and nothing of them is lost."""

import html
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from synpref_ray.human.rendering import MAX_MARKDOWN_CHARS, render_text
from tests.human.site import SmallSite, make_item, take

HOSTILE = [
    "<script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    '<a href="javascript:alert(1)" onclick="alert(1)">x</a>',
    "[x](javascript:alert(1))",
    "[x](JaVaScRiPt:alert(1))",
    "[x](&#106;avascript:alert(1))",
    "[x](data:text/html;base64,PHNjcmlwdD4=)",
    "<javascript:alert(1)>",
    "![x](https://example.org/track.png)",
    "[x](/logout)",
    "[x](//example.org)",
    "<svg/onload=alert(1)>",
    "</pre></div></form><form action=/logout>",
    "```html\n<script>alert(1)</script>\n```",
    "`<iframe src=x>`",
    "<style>*{display:none}</style>",
    "[x]: javascript:alert(1)\n\n[x]",
    "<!-- --><base href=//evil>",
    "{{ 7*7 }}{% raw %}",
    "[" * 500 + "](" * 500,
    "> " * 300 + "deep",
]
ACTIVE = re.compile(r"<(?!/?(?:p|br|hr|em|strong|s|code|pre|blockquote|ul|ol|li|a|h[1-6]|table|thead|tbody|tr|th|td)\b)[a-z/!]", re.IGNORECASE)


class Tags(HTMLParser):
    """Collects every tag with its attributes, as a browser would read them."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, dict[str, str | None]]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attrs)))


def assert_inert(page: str) -> None:
    assert not ACTIVE.search(page), page
    for tag in re.findall(r"<[a-z][^>]*>", page):
        names = set(re.findall(r'\s([a-z-]+)="', tag))
        assert names <= {"href", "title", "rel", "target", "start", "class"}, tag
        for address in re.findall(r'href="([^"]*)"', tag):
            assert re.match(r"https?://", address), tag
            assert 'rel="noopener noreferrer nofollow"' in tag


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_text_is_inert(text: str) -> None:
    assert_inert(str(render_text(text)))


@settings(max_examples=150, deadline=None)
@given(
    st.lists(
        st.sampled_from([*HOSTILE, "*", "_", "`", "```", "\n", "<", ">", '"', "'", "&", "(", ")", "[", "]", "|", "- ", "a", "\u202e", "\x00"])
    ).map("".join)
)
def test_any_mixture_is_inert(text: str) -> None:
    assert_inert(str(render_text(text)))


def test_what_people_write_is_formatted() -> None:
    assert "<strong>b</strong>" in render_text("a **b**")
    assert "<pre><code>x &lt; 1\n</code></pre>" in render_text("```py\nx < 1\n```")
    assert "<td>1</td>" in render_text("| a |\n|---|\n| 1 |")
    assert 'href="https://example.org/a?b=1&amp;c=2"' in render_text("[x](https://example.org/a?b=1&c=2)")


def test_a_huge_text_is_all_there() -> None:
    text = "<b>& " * MAX_MARKDOWN_CHARS
    page = str(render_text(text))
    assert html.unescape(page.removeprefix('<pre class="plain">').removesuffix("</pre>")) == text
    assert_inert(page)


def test_a_page_of_hostile_pairs_holds_no_script_of_theirs(tmp_path: Path) -> None:
    site = SmallSite(tmp_path)
    evil = "\n\n".join(HOSTILE) + "\n\n\u05e9\u05dc\u05d5\u05dd\u202e"
    tags = {"task_category": '"><script>x</script>', "objectivity": None, "controversiality": "low", "desired_attributes": evil}
    site.queue.add(
        [make_item(0, prompt=[{"role": '"><script>', "content": evil}], chosen=evil, rejected=evil + "!", attributes=tags, notes={"chosen": evil})]
    )
    client = site.signed_in("ann")
    page = client.get(take(client)).text
    found = Tags()
    found.feed(page)
    assert [attributes for name, attributes in found.seen if name == "script"] == [{"src": "/static/annotate.js", "defer": None}]
    assert not {name for name, _ in found.seen} & {"img", "svg", "iframe", "style", "base", "object"}
    assert not {key for _, attributes in found.seen for key in attributes if key.startswith("on") or key == "style"}
    links = [attributes.get("href") or "" for name, attributes in found.seen if name == "a"]
    assert all(link.startswith("https://example.org/") or link in ("", "#main", "/") for link in links), links
    actions = {attributes["action"] for name, attributes in found.seen if name == "form"}
    assert actions == {"/logout", "/assignments/1/verdict", "/assignments/1/skip"}
    assert "\u05e9\u05dc\u05d5\u05dd" in page
