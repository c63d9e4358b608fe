"""What pages show: notes of an LLM where the config asks for them, the person's own progress, and colours that can be read."""

import re
from itertools import pairwise
from pathlib import Path

import pytest

from synpref_ray.human.database import Role
from synpref_ray.human.protocol import ProtocolConfig
from synpref_ray.human.web.site import FOLDER
from tests.human.site import TAGS, SmallSite, better, judge, make_item, take, token_of

NOTES = {"chosen": "correct: ran on four lists", "rejected": "incorrect: keeps the odd ones"}


@pytest.mark.parametrize("show", [True, False])
def test_notes_stand_under_their_own_reply_where_the_config_asks_for_them(tmp_path: Path, show: bool) -> None:
    site = SmallSite(tmp_path, protocol=ProtocolConfig(show_notes=show))
    site.queue.add([make_item(number, notes=NOTES) for number in range(12)])  # so many that replies stand in both orders, all but surely
    client = site.signed_in("ann")
    path = take(client)
    while path != "/":
        page = client.get(path).text
        borders = [found.start() for found in re.finditer('<section class="reply card"|<aside', page)]
        replies = [page[start:stop] for start, stop in pairwise(borders)]
        assert len(replies) == 2
        for reply in replies:
            side, other = ("chosen", "rejected") if "good reply" in reply else ("rejected", "chosen")
            assert (NOTES[side] in reply) is show
            assert NOTES[other] not in reply
        path = judge(client, path).headers["location"]


def test_a_person_sees_how_far_they_are(tmp_path: Path) -> None:
    site = SmallSite(tmp_path)
    site.queue.add([make_item(number) for number in range(4)])
    ann, bob = site.signed_in("ann"), site.signed_in("bob")
    judge(ann, take(ann))
    judge(bob, take(bob))
    path = take(ann)
    assert "1 judged, 2 waiting" in ann.get(path).text
    ann.post(f"{path}/skip", data={"csrf": token_of(ann), "reason": "needs an expert"})
    page = ann.get("/").text
    assert "<strong>1</strong> judged, <strong>1</strong> skipped, <strong>1</strong> waiting" in page


def test_the_guideline_stands_before_the_replies_and_says_what_kind_of_pair_it_is(tmp_path: Path) -> None:
    site = SmallSite(tmp_path)
    site.queue.add([make_item(0, attributes={**TAGS, "task_category": "coding_and_debugging"}), make_item(1, attributes={})])
    client = site.signed_in("ann")
    path = take(client)
    page = client.get(path).text
    places = [page.index(part) for part in ("Question 0", "The request is about code.", 'class="reply card"', 'id="verdict"')]
    assert places == sorted(places)
    assert ">coding and debugging · objective · low controversy<" in page
    found = client.get("/guideline", params={"task_category": "math", "controversiality": "nonsense"}).json()
    assert found["kind"] == "math"
    assert found["guideline"].startswith("The request is mathematical.")
    path = client.post(f"{path}/skip", data={"csrf": token_of(client), "reason": "needs an expert"}).headers["location"]
    assert '<span id="kind"></span>' in client.get(path).text


def test_attributes_unfold_only_where_the_person_changed_them(tmp_path: Path) -> None:
    site = SmallSite(tmp_path)
    site.queue.add([make_item(0)])
    client = site.signed_in("ann")
    path = take(client)
    for changes, is_open in (({"llm_helped": "true"}, False), ({"llm_helped": "true", "desired_attributes": "other"}, True)):
        answer = judge(client, path, **changes)
        assert "confirm that the judgement is your own" in answer.text
        assert ('<details open id="attributes">' in answer.text) is is_open


def test_an_admin_reads_votes_and_skips_and_goes_from_dispute_to_dispute(tmp_path: Path) -> None:
    site = SmallSite(tmp_path)
    site.queue.add([make_item(number, required=2) for number in range(3)])
    ann, bob, root = site.signed_in("ann"), site.signed_in("bob"), site.signed_in("root", Role.ADMIN)
    for number in range(3):
        path = take(ann)
        judge(ann, path, choice=better(ann, path), strength="3", llm_helped="true", own_judgement="true", rationale="it <b>adds</b> up")
        path = take(bob)
        if number == 0:
            judge(bob, path, choice="undecidable")
        else:
            bob.post(f"{path}/skip", data={"csrf": token_of(bob), "reason": f"not <i>mine</i> {number}"})
    page = root.get("/admin/items/1").text
    assert re.search(r"<bdi>ann</bdi>: reply [12], strongly<", page)
    assert "An LLM helped." in page
    assert "it &lt;b&gt;adds&lt;/b&gt; up" in page
    assert "<bdi>bob</bdi>: cannot decide<" in page
    assert "not &lt;i&gt;mine&lt;/i&gt; 1" in root.get("/admin/items/2").text

    def settle(number: int) -> str:
        answer = root.post(f"/admin/items/{number}/adjudicate", data={"csrf": token_of(root), "choice": "undecidable"})
        assert answer.status_code == 303
        return str(answer.headers["location"])

    assert [settle(number) for number in (2, 3, 1)] == ["/admin/items/3", "/admin/items/1", "/admin"]


def luminance(colour: str) -> float:
    """Return the relative luminance of #rrggbb or #rgb, as WCAG 2.2 defines it."""
    digits = colour[1:] if len(colour) == 7 else "".join(2 * digit for digit in colour[1:])
    parts = [int(digits[start : start + 2], 16) / 255 for start in (0, 2, 4)]
    red, green, blue = (part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def test_text_has_the_contrast_that_wcag_asks_for_in_both_schemes() -> None:
    css = (FOLDER / "static" / "annotate.css").read_text()
    schemes = [dict(re.findall(r"--([a-z-]+): (#[0-9a-f]+)", block)) for block in re.findall(r":root \{([^}]*)\}", css)]
    assert len(schemes) == 2  # light and dark
    texts = [("ink", "paper"), ("ink", "card"), ("ink", "mark"), ("soft", "paper"), ("soft", "card"), ("main", "card"), ("main", "paper")]
    texts += [("card", "main"), ("bad", "bad-paper")]
    for colours in schemes:
        for text, ground in texts:
            light, dark = sorted((luminance(colours[text]), luminance(colours[ground])), reverse=True)
            assert (light + 0.05) / (dark + 0.05) >= 4.5, (text, ground, colours)  # level AA, text of any size
