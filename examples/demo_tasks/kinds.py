"""The kinds of tasks: how each one asks, and which checker decides.

Our choice: kinds that SmolLM2-135M-Instruct passes 15 to 85 % of the time and whose outcome shows in the reply (measured rates: README.md).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product

from . import checks
from .words import HELD_OUT, POOL, Vocabulary


@dataclass(frozen=True)
class Kind:
    """One kind of task: its wordings (with slots in braces) and its checker."""

    name: str
    templates: tuple[str, ...]
    check: checks.Check


@dataclass(frozen=True)
class Task:
    """One prompt: its text, its kind and what fills its slots. `held_out` prompts share no slot with the others."""

    kind: str
    text: str
    slots: dict[str, str]
    held_out: bool


KINDS = (
    Kind("finish", ("Briefly explain {topic}.", "What are {topic}? Answer briefly."), checks.finishes),
    Kind("one_sentence", ("Tell me about {topic} in exactly one sentence.", "Tell a one-sentence story about {topic}."), checks.one_sentence),
    Kind(
        "at_most_15_words",
        ("Describe {topic} in at most 15 words.", "Use no more than 15 words: what are {topic}?"),
        checks.at_most_15_words,
    ),
    Kind("two_sentences", ("Write two sentences about {topic}.", "Tell me two facts about {topic} in two sentences."), checks.two_sentences),
    Kind(
        "question",
        ("Write one short question about {topic}, ending with a question mark.", "Write a question that a child may ask about {topic}."),
        checks.ends_with_question,
    ),
    Kind(
        "exclamation",
        (
            "Write one excited sentence about {topic}! End it with an exclamation mark!",
            "Cheer for {topic} in one short sentence that ends with an exclamation mark!",
        ),
        checks.ends_with_exclamation,
    ),
    Kind(
        "include_word",
        ('Use the word "{word}" in a short sentence.', 'Write one short sentence that contains the word "{word}".'),
        checks.includes_word,
    ),
    Kind("on_topic", ("Write one short sentence about {topic}.", "Say something nice about {topic} in one sentence."), checks.names_topic),
    Kind(
        "numbered_list",
        ("Make a numbered list of three {category}.", "Name three {category} in a numbered list."),
        checks.three_numbered_items,
    ),
    Kind(
        "no_list",
        (
            "Give me one tip about {topic} in plain sentences, not as a list.",
            "Tell me in plain sentences, without a list, why {topic} are useful.",
        ),
        checks.no_list,
    ),
    Kind(
        "digits",
        (
            "Write one sentence about {topic} with a number in it, such as 7 or 12.",
            "Write one short sentence that says how many {topic} there are. Use digits.",
        ),
        checks.has_digits,
    ),
    Kind("title", ("Write a short title for a book about {topic}.", "Suggest a short title for a song about {topic}."), checks.short_title),
    Kind(
        "quotation",
        (
            'Make up a short saying about {topic} and put it in "quotation marks".',
            'What would a poet say about {topic}? Answer with a "quote".',
        ),
        checks.has_quotation,
    ),
    Kind(
        "yes_or_no",
        ('Are {topic} important? Start your answer with "Yes" or "No".', "Do you like {topic}? Answer yes or no."),
        checks.starts_with_yes_or_no,
    ),
    Kind("sum", ("What is {first} plus {second}?",), checks.states_sum),
    Kind(
        "first_person",
        ("Tell me in one short sentence what you like about {topic}.", "Tell me in one sentence how you feel about {topic}."),
        checks.first_person,
    ),
    Kind(
        "thanks",
        (
            'Write one sentence that says "thank you" for a gift of {topic}.',
            'Say "thank you" to someone who gave you {topic}, in one short sentence.',
        ),
        checks.gives_thanks,
    ),
)
CHECKS = {kind.name: kind.check for kind in KINDS}


def build_tasks(num_pool_prompts: int, num_held_out_prompts: int, kinds: Sequence[Kind] = KINDS) -> list[Task]:
    """Write the prompts: for every kind that many of each side (fewer where the words run out), all different."""
    tasks: list[Task] = []
    for offset, kind in enumerate(kinds):
        tasks += _tasks_of_kind(kind, POOL, num_pool_prompts, offset=offset, held_out=False)
        tasks += _tasks_of_kind(kind, HELD_OUT, num_held_out_prompts, offset=offset, held_out=True)
    return tasks


def _tasks_of_kind(kind: Kind, vocabulary: Vocabulary, num_prompts: int, *, offset: int, held_out: bool) -> Iterator[Task]:
    seen: set[str] = set()
    fillings = _slot_fillings(kind, vocabulary, offset)
    for shift in range(len(kind.templates)):  # every filling with one wording, then with the next
        for number, slots in enumerate(fillings):
            text = kind.templates[(number + shift) % len(kind.templates)].format(**slots)
            if text not in seen and len(seen) < num_prompts:
                seen.add(text)
                yield Task(kind.name, text, slots, held_out)


def _slot_fillings(kind: Kind, vocabulary: Vocabulary, offset: int) -> list[dict[str, str]]:
    """Every filling of the kind's slots, each main filler (topic, word, category, sum) once, starting at another one for every kind."""
    template = kind.templates[0]
    if "{first}" in template:
        fillings = [{"first": str(a), "second": str(b)} for a, b in product(vocabulary.operands, repeat=2)]
    elif "{category}" in template:
        fillings = [{"category": category} for category in vocabulary.categories]
    elif "{word}" in template:
        fillings = [{"word": word} for word in vocabulary.words]
    else:
        fillings = [{"topic": topic, "stem": stem} for topic, stem in vocabulary.topics.items()]
    start = offset * 7 % len(fillings)
    return fillings[start:] + fillings[:start]
