"""PPE (lmarena/PPE): human preferences from the arena, and correctness of replies that were sampled many times.

The official metric code was not to be had, so both are marked unverified. What is measured:
- Preference: the share of pairs whose winning reply has the strictly higher reward; ties of the voters are left out.
- Correctness: per set (MMLU-Pro, MATH, GPQA, IFEval, MBPP-Plus) the share of its `sampled_conflict_pairs` in which the correct reply has the
  strictly higher reward, pooled over pairs; `accuracy` is the plain mean of the five sets. `best_of/<n>/model` is the expected correctness of the
  best-scored of n replies, the plain mean of the five sets again, beside what an oracle and a blind pick reach.
PPE publishes more metrics (twelve, by domain); the paper does not say which one its column shows.
Formats: rows of lmarena-ai/PPE-Human-Preference-V1 (`prompt`, `response_1`, `response_2`, `winner`) and of lmarena-ai/PPE-<set>-Best-of-K (`prompt`,
`response_1` … `response_32`, `scores`, `sampled_conflict_pairs`), the set named by the file.
"""

import re
from collections.abc import Sequence

from synpref_ray.errors import InputError
from synpref_ray.evaluation.benchmarks.core import (
    Benchmark,
    CellBuilder,
    Counted,
    Floats,
    HubPart,
    Item,
    Means,
    Measured,
    Outcome,
    Part,
    ReadItems,
    Row,
    Verified,
    mean_of,
    missing_cells,
)
from synpref_ray.evaluation.benchmarks.curves import add_curve, curves_over_groups
from synpref_ray.evaluation.benchmarks.fields import one_of, read_name, read_prompt, read_text

SETS = {"mmlu_pro": "mmlupro", "math": "math", "gpqa": "gpqa", "ifeval": "ifeval", "mbpp_plus": "mbppplus"}
"""By its name in metrics, how a set is told by the letters and digits of a file's name."""
_WINNERS = ("model_a", "model_b")
_TIES = "tie"
TIES_LEFT_OUT = "ties of the voters"


def read_preference(parts: Sequence[Part]) -> ReadItems:
    """Read votes; ties are left out and counted.

    Raises:
        InputError: a row lacks a field, or its winner is unknown.
    """
    items, ties = [], 0
    for part in parts:
        for number, row in enumerate(part.rows):
            where = f"{part.name}, row {number}"
            winner = read_text(row, "winner", where)
            if winner.startswith(_TIES):
                ties += 1
                continue
            first = one_of(winner, _WINNERS, where, "winner") == "model_a"
            replies = (read_text(row, "response_1", where), read_text(row, "response_2", where))
            name = read_name(row, ("question_id", "id"), str(number))
            items.append(Item(name, read_prompt(row, "prompt", where), replies, ((0, 1),) if first else ((1, 0),)))
    return ReadItems(items, {TIES_LEFT_OUT: ties} if ties else {})


def measure_preference(items: Sequence[Item], outcomes: Sequence[Outcome]) -> Measured:
    """Return the accuracy over pairs."""
    builder = CellBuilder()
    for item, outcome in zip(items, outcomes, strict=True):
        builder.add("accuracy", float(outcome.wins[0]), item.prompt_key)
    return Measured(builder.finish(), dict)


def read_correctness(parts: Sequence[Part]) -> ReadItems:
    """Read prompts with all their replies; conflict pairs of equal truth are left out and counted.

    Raises:
        InputError: a row lacks a field, scores and replies differ in number, a pair names a reply that is not there, or no set is known by the
        file's name.
    """
    items, equal = [], 0
    for part in parts:
        name_of_set = _set_of(part)
        for number, row in enumerate(part.rows):
            where = f"{part.name}, row {number}"
            replies, quality = _replies(row, where), _quality(row, where)
            if len(replies) != len(quality):
                raise InputError(f"{where}: {len(replies)} replies have {len(quality)} scores")
            pairs = _conflict_pairs(row, len(replies), where)
            decided = [(i, j) if quality[i] > quality[j] else (j, i) for i, j in pairs if quality[i] != quality[j]]
            equal += len(pairs) - len(decided)
            name = f"{name_of_set}/{read_name(row, ('question_id', 'id'), str(number))}/{read_name(row, ('model_name',), '')}"
            items.append(Item(name, read_prompt(row, "prompt", where), replies, tuple(decided), name_of_set, quality))
    return ReadItems(items, {"conflict pairs of equal truth": equal} if equal else {})


def _set_of(part: Part) -> str:
    places = (part.name.rsplit("/", 1)[-1], part.name.lower().rsplit("ppe", 1)[-1])  # the file's own name first, then its folders behind PPE
    letters = [re.sub(r"[^a-z0-9]", "", place.lower()) for place in places]
    found = next((name for place in letters for name, told in SETS.items() if told in place), None)
    if found is None:
        raise InputError(f"{part.name}: its name tells none of PPE's sets ({', '.join(SETS)})")
    return found


def _replies(row: Row, where: str) -> tuple[str, ...]:
    names = sorted(int(name.removeprefix("response_")) for name in row if re.fullmatch(r"response_\d+", name))
    if names != list(range(1, len(names) + 1)) or not names:
        raise InputError(f"{where}: expected replies response_1, response_2 …, found {names}")
    return tuple(read_text(row, f"response_{number}", where) for number in names)


def _quality(row: Row, where: str) -> tuple[float, ...]:
    scores = row.get("scores")
    if not isinstance(scores, Sequence) or not all(isinstance(score, bool | int | float) for score in scores):
        raise InputError(f"{where}: expected a list of numbers under 'scores'")
    return tuple(float(score) for score in scores)


def _conflict_pairs(row: Row, num_replies: int, where: str) -> list[tuple[int, int]]:
    pairs = row.get("sampled_conflict_pairs")
    if not isinstance(pairs, Sequence):
        raise InputError(f"{where}: expected a list of pairs under 'sampled_conflict_pairs'")
    found = [tuple(int(place) for place in pair) for pair in pairs]
    if any(len(pair) != 2 or not all(0 <= place < num_replies for place in pair) for pair in found):
        raise InputError(f"{where}: a conflict pair names no two of the {num_replies} replies")
    return [(pair[0], pair[1]) for pair in found]


def measure_correctness(items: Sequence[Item], outcomes: Sequence[Outcome]) -> Measured:
    """Return the pairwise accuracy per set and their mean, and the best-of-N curves."""
    builder = CellBuilder()
    for item, outcome in zip(items, outcomes, strict=True):
        for win in outcome.wins:
            builder.add(f"{item.subset}/accuracy", float(win), item.prompt_key)
        add_curve(builder, item, outcome, group=item.subset)
    cells = builder.finish()
    accuracies = [f"{name}/accuracy" for name in SETS]
    reason = missing_cells(cells, accuracies)
    missing = {"accuracy": reason} if reason else {}
    if not any(name.startswith("best_of/") for name in cells):
        missing["best_of"] = "needs rewards of all replies"
    elif reason:
        missing["best_of"] = reason

    def combine(means: Means) -> dict[str, Floats]:
        own = {name: means[name] for name in cells if name in accuracies}
        of_sets = {f"{group}/{name}": means[cell] for cell in cells for name, at, group in [cell.partition("@")] if at}
        overall = {} if reason else {"accuracy": mean_of(means, accuracies)}
        return {**overall, **own, **curves_over_groups(means, cells, list(SETS)), **of_sets}

    return Measured(cells, combine, missing)


PPE_PREFERENCE = Benchmark(
    name="ppe_preference",
    read=read_preference,
    measure=measure_preference,
    verified=Verified.UNVERIFIED,
    headline=("accuracy",),
    num_items=16_038,
    counts_left_out=(TIES_LEFT_OUT,),
    folders=("ppe_preference", "PPE-Human-Preference-V1"),
    hub=(HubPart("lmarena-ai/PPE-Human-Preference-V1", "test"),),
)
PPE_CORRECTNESS = Benchmark(
    name="ppe_correctness",
    read=read_correctness,
    measure=measure_correctness,
    verified=Verified.UNVERIFIED,
    headline=("accuracy", *(f"{name}/accuracy" for name in SETS), "best_of/32/model"),
    num_items=2555,
    counted={name: Counted(507 if name == "mbpp_plus" else 512, (name,)) for name in SETS},
    folders=("ppe_correctness", "PPE-Correctness"),
    hub=tuple(HubPart(f"lmarena-ai/PPE-{name}-Best-of-K", "train") for name in ("MMLU-Pro", "MATH", "GPQA", "IFEval", "MBPP-Plus")),
)
