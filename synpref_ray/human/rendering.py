"""Text of strangers as HTML that does nothing: Markdown without raw HTML, sanitised once more, links only to the web.

Our choice: Markdown up to `MAX_MARKDOWN_CHARS`; longer texts are shown as they are, whole, because formatting time grows faster than length for
hostile input. Images are not loaded: their address is shown as a link. White space and every character of a plain text are kept.
"""

import html

import nh3
from markdown_it import MarkdownIt
from markupsafe import Markup

MAX_MARKDOWN_CHARS = 20_000
_TAGS = {*("p", "br", "hr", "em", "strong", "s", "code", "pre", "blockquote", "ul", "ol", "li", "a"), *(f"h{level}" for level in range(1, 7))}
_TAGS |= {"table", "thead", "tbody", "tr", "th", "td"}
_MARKDOWN = MarkdownIt("commonmark", {"html": False, "breaks": True}).enable(["table", "strikethrough"]).disable("image")


def render_text(text: str) -> Markup:
    """Return HTML that shows `text`: Markdown and code blocks formatted, everything active inert. Safe to put into a page as it is."""
    if len(text) > MAX_MARKDOWN_CHARS:
        return Markup(f'<pre class="plain">{html.escape(_visible(text))}</pre>')
    return Markup(
        nh3.clean(
            _MARKDOWN.render(_visible(text)),
            tags=_TAGS,
            attributes={"a": {"href", "title"}, "ol": {"start"}},
            url_schemes={"http", "https"},
            url_relative="deny",
            link_rel="noopener noreferrer nofollow",
            set_tag_attribute_values={"a": {"target": "_blank"}},
        )
    )


def _visible(text: str) -> str:
    """Return the text with NUL, which no page can hold, as its picture."""
    return text.replace("\x00", "\u2400")
