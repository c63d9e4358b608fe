"""The annotation guideline that judges read, by task category, objectivity and controversiality (Sec. 3.2, Step 3; Sec. 3.1 names the axes).

The paper's guideline is not published; every word here is ours. It is put together from three parts, so each of the 72 combinations has one
text. It comes before exemplars and pair: requests of one combination share it, and an engine's prefix cache computes it once.
"""

from synpref_ray.schema import Controversiality, Objectivity, TaskCategory

GUIDELINE_VERSION = "guideline-1"
"""Raise it with any change of wording: it is part of every judge request's key and of every vote."""

BY_CATEGORY = {
    TaskCategory.INFORMATION_SEEKING: (
        "The request seeks information. Check each claim first: one wrong fact weighs more than several missing ones. Then ask whether the "
        "question itself is answered, at the depth it was asked, and whether doubt is admitted where facts are uncertain. Invented sources, "
        "names or figures are errors, not details."
    ),
    TaskCategory.CODING: (
        "The request is about code. Read the code as if you ran it: does it do what was asked, in the language and with the interfaces named, "
        "also on empty and extreme input? Working code with little comment beats explained code that fails. For debugging, the true cause must "
        "be found, not only its symptom. Prefer the simpler of two correct programs."
    ),
    TaskCategory.ADVICE: (
        "The request asks for advice. Prefer what this person can act on in the situation described, with the risks named. Advice that endangers "
        "health, money or rights without a warning loses. A reply that only sends the person elsewhere is worse than one that helps as far as is "
        "safe and then does so."
    ),
    TaskCategory.MATH: (
        "The request is mathematical. The final answer decides: work it out yourself, then compare. If both are right, the one with valid and "
        "complete steps is better; if both are wrong, the one whose first error comes later. A right answer from wrong steps beats a wrong answer "
        "only narrowly."
    ),
    TaskCategory.CREATIVE_WRITING: (
        "The request asks for creative writing. Form, topic, length and mood that were asked for come first. Then judge the writing: concrete and "
        "coherent beats generic, and a voice that fits beats ornament. Do not reward length for its own sake."
    ),
    TaskCategory.REASONING: (
        "The request calls for reasoning. Follow each step from the given facts: a conclusion must follow from them. Assumptions must be stated. A "
        "correct conclusion with sound steps is best; a confident wrong conclusion is worst."
    ),
    TaskCategory.PLANNING: (
        "The request asks for a plan. Every stated constraint (time, money, order, people) must be met. Prefer steps that are concrete, in a "
        "workable order and complete; a fine plan that breaks one constraint loses to a plain one that breaks none."
    ),
    TaskCategory.DATA_ANALYSIS: (
        "The request is about data. Numbers must follow from the data given; recompute the decisive ones. The method must suit the question, and "
        "the conclusion must not claim more than the data shows. Made-up data is an error."
    ),
    TaskCategory.EDITING: (
        "The request asks to edit a text. The change asked for must be made everywhere, and nothing else may change: meaning, facts and voice stay. "
        "A reply that adds content, leaves errors in, or talks about the text in place of editing it is worse."
    ),
    TaskCategory.ROLE_PLAYING: (
        "The request asks to play a role. Prefer the reply that stays in character, knows what the character knows, answers what was said last and "
        "moves the scene on. Leaving the role without need is a fault; harm is not excused by the role."
    ),
    TaskCategory.BRAINSTORMING: (
        "The request asks for ideas. Count the ideas that fit and differ from each other; restated ideas count once. Prefer specific and usable "
        "ideas over many vague ones, and keep to the number asked for."
    ),
    TaskCategory.OTHER: (
        "Decide what the request wants its reply to do, and prefer the reply that does it more fully and correctly. A reply in another language or "
        "on another matter than asked loses."
    ),
}

BY_OBJECTIVITY = {
    Objectivity.OBJECTIVE: (
        "Facts or rules decide here: settle correctness before anything else, and let style decide only between replies that are equally correct."
    ),
    Objectivity.SUBJECTIVE: (
        "Taste plays a part here: ask which reply the writer of this request would rather have received, not which one you would have written."
    ),
}

BY_CONTROVERSIALITY = {
    Controversiality.LOW: "Most people would agree on the better reply: look for the plain reason and decide by it.",
    Controversiality.MEDIUM: "People may differ: name to yourself the strongest point of each reply before you decide.",
    Controversiality.HIGH: (
        "People disagree on this matter. Do not prefer the reply that shares your view: prefer fairness to other views, accuracy about them, and "
        "respect; a refusal to answer is better only where answering would do harm."
    ),
}


def guideline_for(task_category: str, objectivity: str, controversiality: str) -> str:
    """Return the three lines that apply to a pair with these attributes.

    Raises:
        ValueError: a value is not one of the enums'.
    """
    return "\n".join(
        (
            BY_CATEGORY[TaskCategory(task_category)],
            BY_OBJECTIVITY[Objectivity(objectivity)],
            BY_CONTROVERSIALITY[Controversiality(controversiality)],
        )
    )
