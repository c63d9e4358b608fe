"""Every accepted form of a pair, and every reason to refuse one."""

import pytest

from synpref_ray.ingest.structure import StructuredPair, structure_pair
from synpref_ray.schema import DropReason


def user(content: object = "q") -> dict[str, object]:
    return {"role": "user", "content": content}


def assistant(content: object = "a") -> dict[str, object]:
    return {"role": "assistant", "content": content}


def system(content: object = "s") -> dict[str, object]:
    return {"role": "system", "content": content}


ONE_TURN = StructuredPair([("user", "q")], "yes", "no")
TWO_TURNS = StructuredPair([("user", "q"), ("assistant", "a"), ("user", "r")], "yes", "no")
HISTORY = [user(), assistant(), user("r")]


@pytest.mark.parametrize(
    ("prompt", "chosen", "rejected", "expected"),
    [
        ("q", "yes", "no", ONE_TURN),
        ([user()], "yes", "no", ONE_TURN),
        ([user()], [assistant("yes")], [assistant("no")], ONE_TURN),
        ("q", [assistant("yes")], "no", ONE_TURN),
        (None, [user(), assistant("yes")], [user(), assistant("no")], ONE_TURN),
        ("q", [user(), assistant("yes")], [user(), assistant("no")], ONE_TURN),
        (HISTORY, "yes", "no", TWO_TURNS),
        (None, [*HISTORY, assistant("yes")], [*HISTORY, assistant("no")], TWO_TURNS),
        ("q", [*HISTORY, assistant("yes")], [*HISTORY, assistant("no")], TWO_TURNS),  # the prompt column holds the first turn
        ("r", [*HISTORY, assistant("yes")], [*HISTORY, assistant("no")], TWO_TURNS),  # or the last one
        (HISTORY[:1], [*HISTORY[1:], assistant("yes")], [*HISTORY[1:], assistant("no")], TWO_TURNS),
        ([system(), user()], "yes", "no", StructuredPair([("system", "s"), ("user", "q")], "yes", "no")),
        (({"role": "user", "content": "q", "name": "Ann"},), "yes", "no", ONE_TURN),
        (" q ", " yes\n", "no ", StructuredPair([("user", " q ")], " yes\n", "no ")),
        ('[{"role": "user"}]', "yes", "no", StructuredPair([("user", '[{"role": "user"}]')], "yes", "no")),
    ],
)
def test_accepted_forms(prompt: object, chosen: object, rejected: object, expected: StructuredPair) -> None:
    assert structure_pair(prompt, chosen, rejected) == expected


@pytest.mark.parametrize(
    ("prompt", "chosen", "rejected", "reason"),
    [
        ("q", None, "no", DropReason.MISSING_FIELD),
        ("q", "yes", None, DropReason.MISSING_FIELD),
        (None, "yes", "no", DropReason.MISSING_FIELD),
        (None, [user(), assistant("yes")], "no", DropReason.MISSING_FIELD),
        (3, "yes", "no", DropReason.WRONG_TYPE),
        ("q", 3, "no", DropReason.WRONG_TYPE),
        ("q", "yes", {"role": "assistant", "content": "no"}, DropReason.WRONG_TYPE),
        (None, 3, 4, DropReason.WRONG_TYPE),
        (["q"], "yes", "no", DropReason.WRONG_TYPE),
        ([user(5)], "yes", "no", DropReason.WRONG_TYPE),
        ([{"from": "human", "value": "q"}], "yes", "no", DropReason.WRONG_TYPE),
        ("q", [assistant(["part"])], "no", DropReason.WRONG_TYPE),
        ("", "yes", "no", DropReason.EMPTY_PROMPT),
        (" \n\u00a0", "yes", "no", DropReason.EMPTY_PROMPT),
        ([], "yes", "no", DropReason.EMPTY_PROMPT),
        ([user(None)], "yes", "no", DropReason.EMPTY_PROMPT),
        ([user(), assistant(" "), user()], "yes", "no", DropReason.EMPTY_PROMPT),
        ([system(""), user()], "yes", "no", DropReason.EMPTY_PROMPT),
        (None, [assistant("yes")], [assistant("no")], DropReason.EMPTY_PROMPT),
        ("q", "", "no", DropReason.EMPTY_REPLY),
        ("q", "yes", " \t\n", DropReason.EMPTY_REPLY),
        ("q", [], "no", DropReason.EMPTY_REPLY),
        ("q", [assistant(None)], [assistant("no")], DropReason.EMPTY_REPLY),
        ([assistant()], "yes", "no", DropReason.BAD_ROLE_ORDER),
        ([user(), assistant()], "yes", "no", DropReason.BAD_ROLE_ORDER),
        ([user(), user()], "yes", "no", DropReason.BAD_ROLE_ORDER),
        ([user(), user(), user()], "yes", "no", DropReason.BAD_ROLE_ORDER),
        ([user(), system(), user()], "yes", "no", DropReason.BAD_ROLE_ORDER),
        ([system()], "yes", "no", DropReason.BAD_ROLE_ORDER),
        ([{"role": "human", "content": "q"}], "yes", "no", DropReason.BAD_ROLE_ORDER),
        (None, [user(), assistant("yes"), user()], [user(), assistant("no")], DropReason.BAD_ROLE_ORDER),
        (None, [user("x"), assistant("yes")], [user("y"), assistant("no")], DropReason.DIVERGING_TURNS),
        (None, [user(), assistant("yes")], [user(), assistant(), user(), assistant("no")], DropReason.DIVERGING_TURNS),
        (
            None,
            [user(), assistant("1"), user(), assistant("2")],
            [user(), assistant("3"), user(), assistant("4")],
            DropReason.DIVERGING_TURNS,
        ),
        ("other", [user(), assistant("yes")], [user(), assistant("no")], DropReason.DIVERGING_TURNS),
        ("q", "yes", "yes", DropReason.IDENTICAL_REPLIES),
        (None, [user(), assistant("yes")], [user(), assistant("yes")], DropReason.IDENTICAL_REPLIES),
    ],
)
def test_refused_rows_have_one_reason(prompt: object, chosen: object, rejected: object, reason: DropReason) -> None:
    assert structure_pair(prompt, chosen, rejected) is reason
