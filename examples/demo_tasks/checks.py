"""One checker per kind of task: does a reply do what its prompt asks? Truth of the demo is these functions and nothing else.

Every checker sees the reply's text alone (and the prompt's slots), so that the truth of a shipped pair can be recomputed from it. Where
prose is asked for, a reply must also finish: one that stops in the middle of a sentence (sampling ends after 64 tokens) fails in any case.
"""

import re
from collections.abc import Callable, Mapping

Slots = Mapping[str, str]
Check = Callable[[str, Slots], bool]

_CLOSERS = "\"'\u201d\u2019)*_`"
_SENTENCE_END = re.compile(r"[.!?…]+[\"'\u201d\u2019)*_]*(?=\s|$)")
_ABBREVIATION = re.compile(r"\b(?:Mr|Mrs|Ms|Dr|St|vs|etc|e\.g|i\.e|[A-Z])\.(?=\s+\S)")
_LIST_LINE = re.compile(r"^\s*(?:\d+[.)]|[-*•])\s+\S")
_NUMBERED_LINE = re.compile(r"^\s*(\d+)[.)]\s+\S")
_FIRST_PERSON = re.compile(r"\b(?:I|me|my|My|mine|I'm|I've|I'd|I'll)\b")
_QUOTED = re.compile(r"\"[^\"\n]{3,}\"|“[^”\n]{3,}”")


def num_words(reply: str) -> int:
    """Count the words of `reply` (runs of non-space that hold a letter or digit)."""
    return sum(1 for word in reply.split() if any(character.isalnum() for character in word))


def num_sentences(reply: str) -> int:
    """Count sentence ends; an abbreviation's or initial's period does not end a sentence."""
    return len(_SENTENCE_END.findall(_ABBREVIATION.sub("", reply)))


def lines_of(reply: str) -> list[str]:
    """Return the lines of `reply` that are not blank."""
    return [line for line in reply.splitlines() if line.strip()]


def ends_cleanly(reply: str) -> bool:
    """Tell whether the reply finishes its last sentence: final punctuation, perhaps inside closing quotes or brackets."""
    return reply.rstrip().rstrip(_CLOSERS).endswith((".", "!", "?", "…"))


def finishes(reply: str, slots: Slots) -> bool:
    """Prose that finishes its last sentence."""
    return ends_cleanly(reply)


def one_sentence(reply: str, slots: Slots) -> bool:
    """Exactly one finished sentence on one line."""
    return ends_cleanly(reply) and num_sentences(reply) == 1 and len(lines_of(reply)) == 1


def at_most_15_words(reply: str, slots: Slots) -> bool:
    """A finished reply of at most 15 words."""
    return ends_cleanly(reply) and 1 <= num_words(reply) <= 15


def two_sentences(reply: str, slots: Slots) -> bool:
    """At least two finished sentences, the last one included."""
    return ends_cleanly(reply) and num_sentences(reply) >= 2


def ends_with_question(reply: str, slots: Slots) -> bool:
    """The last sentence is a question."""
    return reply.rstrip().rstrip(_CLOSERS).endswith("?")


def ends_with_exclamation(reply: str, slots: Slots) -> bool:
    """The last sentence ends with an exclamation mark."""
    return reply.rstrip().rstrip(_CLOSERS).endswith("!")


def includes_word(reply: str, slots: Slots) -> bool:
    """A finished reply that holds the given word as a whole word (a plural s allowed)."""
    return bool(re.search(rf"\b{re.escape(slots['word'])}s?\b", reply, re.IGNORECASE)) and ends_cleanly(reply)


def names_topic(reply: str, slots: Slots) -> bool:
    """A finished reply that names its topic (stays on topic)."""
    return bool(re.search(re.escape(slots["stem"]), reply, re.IGNORECASE)) and ends_cleanly(reply)


def three_numbered_items(reply: str, slots: Slots) -> bool:
    """A numbered list with the items 1, 2, 3 and no more."""
    numbers = [int(match.group(1)) for match in map(_NUMBERED_LINE.match, lines_of(reply)) if match]
    return numbers == [1, 2, 3]


def no_list(reply: str, slots: Slots) -> bool:
    """Finished prose in which no line is a list item."""
    return ends_cleanly(reply) and not any(_LIST_LINE.match(line) for line in lines_of(reply))


def has_digits(reply: str, slots: Slots) -> bool:
    """A finished reply with a number written in digits (a list marker is no number)."""
    text = "\n".join(re.sub(r"^\s*\d+[.)]\s", "", line) for line in lines_of(reply))
    return ends_cleanly(reply) and bool(re.search(r"\d", text))


def short_title(reply: str, slots: Slots) -> bool:
    """One line of at most ten words."""
    return len(lines_of(reply)) == 1 and 1 <= num_words(reply) <= 10


def has_quotation(reply: str, slots: Slots) -> bool:
    """Something stands between quotation marks, and the reply finishes."""
    return bool(_QUOTED.search(reply)) and ends_cleanly(reply)


def starts_with_yes_or_no(reply: str, slots: Slots) -> bool:
    """The first word is yes or no."""
    return bool(re.match(r"\W*(?:yes|no)\b", reply, re.IGNORECASE))


def states_sum(reply: str, slots: Slots) -> bool:
    """Says that something equals the sum of the two operands (or is nothing but that sum), and nothing equals another number."""
    total = int(slots["first"]) + int(slots["second"])
    alone = re.fullmatch(r"\W*(\d+)\W*", reply)
    stated = {int(number) for number in re.findall(r"(?:=|\bis|\bequals)\s*(\d+)\b(?!\s*[+*/^-])", reply, re.IGNORECASE)}
    if alone:
        return int(alone.group(1)) == total
    return stated == {total}


def first_person(reply: str, slots: Slots) -> bool:
    """A finished reply that speaks as I."""
    return ends_cleanly(reply) and bool(_FIRST_PERSON.search(reply))


def gives_thanks(reply: str, slots: Slots) -> bool:
    """A finished reply with the word thank or thanks."""
    return ends_cleanly(reply) and bool(re.search(r"\bthank", reply, re.IGNORECASE))
