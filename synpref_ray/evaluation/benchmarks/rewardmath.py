"""RewardMATH (kimsh0507/RewardMATH_official): one right solution against nine wrong ones.

Official: `src/evaluation/eval.py`, `RewardMATHEvaluation`. accuracy is the share of problems whose right solution has a reward strictly above *all*
wrong ones; `accuracy_with_ties` asks for at least as high; mrr is the mean of 1 / rank of the right one, ties against it. For judges of pairs a
problem is right when all nine verdicts are, and the rank is 1 + the verdicts lost. Solutions are lists of steps, joined by line breaks as the
officials' classifiers read them. `best_of/<n>/…` are our curves: how often the right solution is the pick out of n.
Formats: `RewardMATH_direct` (a solution a row: `problem_id`, `eval_solution`, `solution_type`), `RewardMATH_pairwise` (`eval_solution_A`,
`eval_solution_B`, `chosen_position`), and the stored results of models (`problem`, `solution_reference`, `score`; with `chosen_position` verdicts),
which need no model.
"""

from collections.abc import Sequence

import numpy as np

from synpref_ray.errors import InputError
from synpref_ray.evaluation.benchmarks.core import (
    Benchmark,
    CellBuilder,
    HubPart,
    Item,
    Measured,
    Outcome,
    Part,
    ReadItems,
    Row,
    Verified,
    outcome_of_scores,
)
from synpref_ray.evaluation.benchmarks.curves import add_curve
from synpref_ray.evaluation.benchmarks.fields import is_texts, one_of, read_name, read_text, read_texts, user_message

RIGHT_SOLUTION = "human_to_GPT-4"


def read_rewardmath(parts: Sequence[Part]) -> ReadItems:
    """Read problems with all their solutions, the right one first; a problem that several files hold is read from the first one.

    Raises:
        InputError: a row lacks a field, or a problem has not one right solution and at least one wrong one.
    """
    problems: dict[str, dict[str, list[str]]] = {}
    texts: dict[str, str] = {}
    source: dict[str, str] = {}
    for part in parts:
        for number, row in enumerate(part.rows):
            where = f"{part.name}, row {number}"
            name = read_name(row, ("problem_id",), read_text(row, "problem", where))
            if source.setdefault(name, part.name) != part.name:
                continue
            texts[name] = read_text(row, "problem", where)
            solutions = problems.setdefault(name, {"chosen": [], "rejected": []})
            for kind, text in _solutions(row, where):
                if kind == "rejected" or text not in solutions["chosen"]:
                    solutions[kind].append(text)
    items = []
    for name, found in problems.items():
        if len(found["chosen"]) != 1 or not found["rejected"]:
            raise InputError(
                f"RewardMATH problem {name}: expected one right solution and wrong ones, found {len(found['chosen'])}, {len(found['rejected'])}"
            )
        items.append(_item(name, texts[name], (*found["chosen"], *found["rejected"])))
    return ReadItems(items)


def _solutions(row: Row, where: str) -> list[tuple[str, str]]:
    if "eval_solution_A" in row:
        right = one_of(read_text(row, "chosen_position", where), ("A", "B"), where, "chosen_position")
        wrong = "B" if right == "A" else "A"
        return [("chosen", _steps(row, f"eval_solution_{right}", where)), ("rejected", _steps(row, f"eval_solution_{wrong}", where))]
    kind = read_name(row, ("solution_type",), "chosen" if row.get("solution_reference") == RIGHT_SOLUTION else "rejected")
    return [(one_of(kind, ("chosen", "rejected"), where, "solution_type"), _steps(row, "eval_solution", where))]


def _steps(row: Row, name: str, where: str) -> str:
    return "\n".join(read_texts(row, name, where)) if is_texts(row.get(name)) else read_text(row, name, where)


def _item(name: str, problem: str, replies: tuple[str, ...]) -> Item:
    quality = (1.0, *(0.0 for _ in replies[1:]))
    return Item(name, user_message(problem), replies, tuple((0, place) for place in range(1, len(replies))), "", quality)


def read_results(rows: Sequence[Row], where: str) -> tuple[list[Item], list[Outcome]]:
    """Read a stored result file of the officials: items whose replies are the solutions' names, and what the model made of them.

    Raises:
        InputError: a row is of neither form.
    """
    items, outcomes = [], []
    for number, row in enumerate(rows):
        names, scores = read_texts(row, "solution_reference", where), row.get("score")
        if not isinstance(scores, Sequence) or len(scores) != len(names):
            raise InputError(f"{where}, row {number}: expected a score for each of {len(names)} solutions")
        problem = read_text(row, "problem", where)
        if "chosen_position" in row:
            right = read_texts(row, "chosen_position", where)
            item = _item(f"{where} {number}", problem, (RIGHT_SOLUTION, *names))
            outcome = Outcome(np.array([verdict == place for verdict, place in zip(scores, right, strict=True)], dtype=bool))
        else:
            order = sorted(range(len(names)), key=lambda place: names[place] != RIGHT_SOLUTION)  # stable: the right one first
            item = _item(f"{where} {number}", problem, tuple(names[place] for place in order))
            outcome = outcome_of_scores(item, [float(scores[place]) for place in order])
        items.append(item)
        outcomes.append(outcome)
    return items, outcomes


def measure_rewardmath(items: Sequence[Item], outcomes: Sequence[Outcome]) -> Measured:
    """Return accuracy, with and without ties, MRR, and the curves."""
    return measure_one_against_many(items, outcomes)


def measure_one_against_many(items: Sequence[Item], outcomes: Sequence[Outcome]) -> Measured:
    """Return the metrics of items whose first reply is the right one; a judge of pairs has no ties and no curves.

    An item without a comparison has beaten nothing: it is wrong, and its reciprocal rank is 0.
    """
    builder = CellBuilder()
    for item, outcome in zip(items, outcomes, strict=True):
        compared = outcome.wins.size > 0
        builder.add("accuracy", float(compared and outcome.answered and outcome.wins.all()), item.prompt_key)
        if outcome.scores is not None:
            at_least = compared and outcome.answered and bool((outcome.scores[0] >= outcome.scores[1:]).all())
            builder.add("accuracy_with_ties", float(at_least), item.prompt_key)
        builder.add("mrr", 1.0 / (1 + int((~outcome.wins).sum())) if compared else 0.0, item.prompt_key)
        add_curve(builder, item, outcome)
    cells = builder.finish()
    missing = {} if "accuracy_with_ties" in cells else dict.fromkeys(("accuracy_with_ties", "best_of"), "needs rewards, not verdicts on pairs")
    return Measured(cells, dict, missing)


REWARDMATH = Benchmark(
    name="rewardmath",
    read=read_rewardmath,
    measure=measure_rewardmath,
    verified=Verified.OFFICIAL_OUTPUT,
    verified_of={"best_of": Verified.HAND_WORKED},
    headline=("accuracy", "mrr"),
    num_items=483,
    folders=("rewardmath", "RewardMATH"),
    is_part=lambda path: path.rsplit("/", 1)[-1].startswith("RewardMATH_"),
    hub=(HubPart("RewardMATH/RewardMATH_pairwise", "test"),),
)
