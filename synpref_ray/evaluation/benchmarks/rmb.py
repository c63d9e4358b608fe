"""RMB (Zhou-Zoey/RMB-Reward-Model-Benchmark): 49 scenarios of helpfulness and harmlessness, as pairs and as best-of-N.

Official: `eval/scripts/my_run_rm.py` for pairs: right when the chosen reply has the strictly higher reward, pooled over the items. For best-of-N the
repository has no code; by its paper an item is right when the best reply beats every loser. The usual table has the four numbers, and their plain
mean as the overall score (OpenCompass). `bon/best_of/<n>/…` are our curves over the best-of-N sets: how often the best reply is the pick out of n.
Format: the folder `RMB_dataset` with `Pairwise_set/` and `BoN_set/`, each with `Helpfulness/` and `Harmlessness/`; rows with `conversation_input`,
`chosen` and `reject` (or `rejected`), or `bon_best` and `loser_list`; each reply has an `answer`; `category_path` or the file's path says which of
the four it is. Files outside these two folders (examples, results) are not read.
"""

from collections.abc import Mapping, Sequence

from synpref_ray.errors import InputError
from synpref_ray.evaluation.benchmarks.core import (
    Benchmark,
    CellBuilder,
    Counted,
    Floats,
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
from synpref_ray.evaluation.benchmarks.curves import add_curve, curve_names
from synpref_ray.evaluation.benchmarks.fields import read_name, read_prompt, read_text

GOALS = ("helpfulness", "harmlessness")
CURVE_SIZES = (1, 2, 3)  # ours: every official item has three replies or more, so all points are over the same items
COLUMNS = tuple(f"{kind}/{goal}" for kind in ("pairwise", "bon") for goal in GOALS)

NUM_BON = {"bon/helpfulness": 2109, "bon/harmlessness": 1677}
"""Of the pairs no number was to be had, so whether a copy of them is whole is not known."""


def read_rmb(parts: Sequence[Part]) -> ReadItems:
    """Read pairs and best-of-N items.

    Raises:
        InputError: a row lacks a field, or nothing says its goal.
    """
    items = []
    for part in parts:
        for number, row in enumerate(part.rows):
            where = f"{part.name}, row {number}"
            best, losers, kind = _replies(row, where)
            path = read_name(row, ("category_path",), part.name)
            goal = next((goal for goal in GOALS if goal in path.lower()), None)
            if goal is None:
                raise InputError(f"{where}: neither category_path nor the file's path names helpfulness or harmlessness")
            name = f"{kind}/{read_name(row, ('pair_uid', 'bon_uid'), f'{part.name} {number}')}"
            pairs = tuple((0, place) for place in range(1, len(losers) + 1))
            quality = (1.0, *(0.0 for _ in losers)) if kind == "bon" else ()
            items.append(Item(name, read_prompt(row, "conversation_input", where), (best, *losers), pairs, f"{kind}/{goal}", quality))
    return ReadItems(items)


def _replies(row: Row, where: str) -> tuple[str, tuple[str, ...], str]:
    if "bon_best" in row:
        losers = row.get("loser_list")
        if not isinstance(losers, Sequence) or isinstance(losers, str) or not losers:
            raise InputError(f"{where}: expected a list of replies under 'loser_list'")
        return _answer(row["bon_best"], where), tuple(_answer(loser, where) for loser in losers), "bon"
    other = "reject" if "reject" in row else "rejected"
    return _answer(row.get("chosen"), where), (_answer(row.get(other), where),), "pairwise"


def _answer(reply: object, where: str) -> str:
    if not isinstance(reply, Mapping):
        raise InputError(f"{where}: expected a reply with its answer, found {type(reply).__name__}")
    return read_text(reply, "answer", where)


def measure_rmb(items: Sequence[Item], outcomes: Sequence[Outcome]) -> Measured:
    """Return the four columns, their mean, and the curves of the best-of-N sets."""
    builder = CellBuilder()
    for item, outcome in zip(items, outcomes, strict=True):
        builder.add(item.subset, float(outcome.wins.all()), item.prompt_key)
        add_curve(builder, item, outcome, sizes=CURVE_SIZES)
    cells = builder.finish()
    reason = missing_cells(cells, COLUMNS)
    missing = {"overall": reason} if reason else {}

    def combine(means: Means) -> dict[str, Floats]:
        overall = {} if reason else {"overall": mean_of(means, COLUMNS)}
        curves = {f"bon/{name}": means[name] for name in curve_names(cells)}
        return {**overall, **{name: means[name] for name in COLUMNS if name in cells}, **curves}

    return Measured(cells, combine, missing)


RMB = Benchmark(
    name="rmb",
    read=read_rmb,
    measure=measure_rmb,
    verified=Verified.HAND_WORKED,
    verified_of=dict.fromkeys(("overall", "bon"), Verified.UNVERIFIED) | {"bon/best_of": Verified.HAND_WORKED},
    headline=("overall", *COLUMNS),
    num_items=0,
    counted={name: Counted(NUM_BON.get(name, 0), (name,)) for name in COLUMNS} | {"bon/best_of": Counted(sum(NUM_BON.values()), ("bon",))},
    folders=("rmb", "RMB", "RMB_dataset"),
    is_part=lambda path: any(f"{name}/" in path.lower() for name in ("pairwise_set", "bon_set")),
)
