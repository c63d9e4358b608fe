"""Each kind's checker on replies judged by hand."""

import pytest

from examples.demo_tasks import checks
from examples.demo_tasks.kinds import CHECKS, KINDS

CUT = "Honey bees live in hives and they collect the sweet nectar of"
SLOTS = {"topic": "honey bees", "stem": "bee", "word": "river", "category": "fruits", "first": "3", "second": "5"}

PASS = {
    "finish": ["Honey bees make honey.", 'He said, "Bees!"', "So be it..."],
    "one_sentence": ["Honey bees make honey, every day.", "Dr. Smith likes bees!", '"Bees fly."'],
    "at_most_15_words": ["One two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen.", "Bees!"],
    "two_sentences": ["Bees fly. Bees sting.", "Bees fly! Do they sting? Yes."],
    "question": ["Why do bees sting?", 'He asked: "Why do bees sting?"'],
    "exclamation": ["Go bees!", '"Go bees!"', "**Go bees!**"],
    "include_word": ["The river is wide.", "Two rivers meet.", "A River."],
    "on_topic": ["A bee is small.", "Bumblebees are big."],
    "numbered_list": ["1. apple\n2. pear\n3. plum", "Here you are:\n\n1) apple\n2) pear\n\n3) plum\nEnjoy!"],
    "no_list": ["Feed the bees. Be kind."],
    "digits": ["There are 20,000 kinds of bees.", "1. There are 7 bees."],
    "title": ["The Honey Bees", '"Bees: One Two Three Four Five Six Seven Eight Nine"'],
    "quotation": ['As they say: "Bees know the way."', "\u201cBees know the way.\u201d"],
    "yes_or_no": ["Yes", "No, they are not.", '"Yes," I think.', "yes."],
    "sum": ["3 + 5 = 8.", "The answer is 8.", "8", "3 plus 5 equals 8"],
    "first_person": ["I love bees.", "Bees make me happy.", "They are my friends."],
    "thanks": ["Thank you for the bees!", "Many thanks for the bees."],
}
FAIL = {
    "finish": [CUT, "Bees,", "Bees:"],
    "one_sentence": ["Bees fly. Bees sting.", CUT, "Bees\n\nBees fly."],
    "at_most_15_words": [
        "One two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen.",
        "Bees",
        "...",
    ],
    "two_sentences": ["Bees fly.", "Bees fly. Bees sting. And they", "Mr. Bee flies."],
    "question": ["Bees sting.", "Why? Because.", "Why do bees"],
    "exclamation": ["Go bees.", "Go! Bees", "Go bees!?"],
    "include_word": ["The riverside is wide.", "A lake.", "The river is"],
    "on_topic": ["A wasp is small.", "A bee is"],
    "numbered_list": [
        "1. apple\n2. pear",
        "1. apple\n2. pear\n3. plum\n4. fig",
        "apple, pear, plum",
        "1. apple 2. pear 3. plum",
        "2. a\n3. b\n1. c",
    ],
    "no_list": ["1. Feed the bees.", "Do this:\n- Feed the bees.", CUT],
    "digits": ["There are seven bees.", "1. There are bees.", "There are 7 bees and"],
    "title": ["One two three four five six seven eight nine ten eleven", "Bees\nA book", "..."],
    "quotation": ["Bees know the way.", 'As they say: "Bees know', '""'],
    "yes_or_no": ["They are.", "Not at all.", "I say yes.", "Yesterday."],
    "sum": ["3 + 5 = 9.", "8 is nice, but 3 + 5 = 9", "eight", "The answer is 3 + 5", "The answer is 18."],
    "first_person": ["Bees are nice.", "I love bees and", "AI is nice."],
    "thanks": ["I am grateful.", "Thank you for the"],
}


def cases(table: dict[str, list[str]]) -> list[tuple[str, str]]:
    return [(kind, reply) for kind, replies in table.items() for reply in replies]


def test_every_kind_has_cases() -> None:
    names = [kind.name for kind in KINDS]
    assert len(set(names)) == len(names) >= 12
    assert set(names) == PASS.keys() == FAIL.keys()


@pytest.mark.parametrize(("kind", "reply"), cases(PASS))
def test_passes(kind: str, reply: str) -> None:
    assert CHECKS[kind](reply, SLOTS)


@pytest.mark.parametrize(("kind", "reply"), cases(FAIL))
def test_fails(kind: str, reply: str) -> None:
    assert not CHECKS[kind](reply, SLOTS)


@pytest.mark.parametrize(
    ("reply", "expected"),
    [("", 0), ("...", 0), ("a - b", 2), ("don't stop", 2), ("*hi*", 1)],
)
def test_num_words(reply: str, expected: int) -> None:
    assert checks.num_words(reply) == expected


@pytest.mark.parametrize(
    ("reply", "expected"),
    [
        ("", 0),
        ("Bees fly", 0),
        ("Bees fly.", 1),
        ("Bees... fly.", 2),
        ('"Bees fly." They do!', 2),
        ("It is 3.5 mm long.", 1),
        ("J. R. Bee flies.", 1),
    ],
)
def test_num_sentences(reply: str, expected: int) -> None:
    assert checks.num_sentences(reply) == expected
