"""JudgeBench (ScalerLab/JudgeBench): pairs of replies of which one is correct, in four groups, by GPT-4o and by Claude 3.5 Sonnet.

Official: `utils/metrics.py`, called from `run_judge.py`. A judge is asked in both orders; the pair is right when the sum of its verdicts (+1 for
the label, -1 against it, 0 for none) is above 0; the overall score is *micro*, pooled over pairs. A reward model's verdict is A>B when A's reward
is strictly higher, else B>A, whatever the order shown, so an exact tie is wrong here; in the single-game mode that the officials allow for it
(`single_game/…`) a tie is right where the label is B>A. The two differ on exact ties only.
*macro* is the plain mean of the four groups: what the paper reports under JudgeBench (arXiv:2507.01352, Table 1; not the benchmark's own metric).
`micro`, `macro` and the groups are of the GPT-4o pairs, as on the leaderboard; those of Claude's pairs are under `claude/`.
Format: JSON lines with `pair_id`, `source`, `question`, `response_model`, `response_A`, `response_B`, `label` (A>B or B>A).
"""

from collections.abc import Sequence

from synpref_ray.evaluation.benchmarks.core import (
    Benchmark,
    Cell,
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
    Verified,
    mean_of,
    missing_cells,
)
from synpref_ray.evaluation.benchmarks.fields import one_of, read_name, read_prompt, read_text

GROUPS = ("mmlu-pro", "livebench-reasoning", "livebench-math", "livecodebench")
SPLITS = {"gpt-4o": "", "claude": "claude/"}
"""By the beginning of `response_model`, what its metrics' names begin with."""
MODES = {"wins": "", "single_game": "single_game/"}
_LABELS = ("A>B", "B>A")
NUM_PAIRS = {"gpt-4o": 350, "claude": 270}
NUM_GPT_PAIRS = {"mmlu-pro": 154, "livebench-reasoning": 98, "livebench-math": 56, "livecodebench": 42}
"""By group; the groups of Claude's pairs are not known here."""


def read_judgebench(parts: Sequence[Part]) -> ReadItems:
    """Read pairs; the replies of an item are A and B.

    Raises:
        InputError: a row lacks a field, or its source, model or label is unknown.
    """
    items = []
    for part in parts:
        for number, row in enumerate(part.rows):
            where = f"{part.name}, row {number}"
            source, model = read_text(row, "source", where), read_text(row, "response_model", where)
            group = one_of(next((name for name in GROUPS if source.startswith(name)), source), GROUPS, where, "source")
            split = one_of(next((name for name in SPLITS if model.startswith(name)), model), tuple(SPLITS), where, "response_model")
            label = one_of(read_text(row, "label", where), _LABELS, where, "label")
            replies = (read_text(row, "response_A", where), read_text(row, "response_B", where))
            pair = (0, 1) if label == "A>B" else (1, 0)
            name = read_name(row, ("pair_id",), f"{part.name} {number}")
            items.append(Item(name, read_prompt(row, "question", where), replies, (pair,), f"{split}/{group}"))
    return ReadItems(items)


def measure_judgebench(items: Sequence[Item], outcomes: Sequence[Outcome]) -> Measured:
    """Return micro and macro and the groups, of both splits, in both modes where there are rewards."""
    builder = CellBuilder()
    for item, outcome in zip(items, outcomes, strict=True):
        flags = {"wins": bool(outcome.wins[0])}
        if outcome.scores is not None:
            flags["single_game"] = right_in_single_game(item, outcome)
        split, _, group = item.subset.partition("/")
        for mode, flag in flags.items():
            for name in ("micro", group):
                builder.add(f"{MODES[mode]}{SPLITS[split]}{name}", float(flag), item.prompt_key)
    cells = builder.finish()
    missing = {}
    for prefix in SPLITS.values():
        if reason := missing_cells(cells, [f"{prefix}{group}" for group in GROUPS]):
            missing[f"{prefix}macro"] = reason
    if "micro" not in cells:
        missing["micro"] = "no item of the GPT-4o split"
    return Measured(cells, lambda means: _combine(means, cells), missing)


def right_in_single_game(item: Item, outcome: Outcome) -> bool:
    """Return whether the one verdict of a reward model equals the label: A>B when A's reward is strictly higher, else B>A."""
    if outcome.scores is None or not outcome.answered:
        return False
    a_wins = bool(outcome.scores[0] > outcome.scores[1])
    return a_wins == (item.pairs[0] == (0, 1))


def _combine(means: Means, cells: dict[str, Cell]) -> dict[str, Floats]:
    values = {}
    for mode in MODES.values():
        for prefix in SPLITS.values():
            groups = [f"{mode}{prefix}{group}" for group in GROUPS]
            if not missing_cells(cells, groups):
                values[f"{mode}{prefix}macro"] = mean_of(means, groups)
    return {**{name: means[name] for name in cells if name.endswith("micro")}, **values, **means}


def _counted() -> dict[str, Counted]:
    """Return what each metric is of: one split, or one group of it."""
    found: dict[str, Counted] = {}
    for mode in MODES.values():
        for split, prefix in SPLITS.items():
            found |= {f"{mode}{prefix}{name}": Counted(NUM_PAIRS[split], (split,)) for name in ("micro", "macro")}
            numbers = NUM_GPT_PAIRS if split == "gpt-4o" else {}
            found |= {f"{mode}{prefix}{group}": Counted(numbers.get(group, 0), (f"{split}/{group}",)) for group in GROUPS}
    return found


JUDGEBENCH = Benchmark(
    name="judgebench",
    read=read_judgebench,
    measure=measure_judgebench,
    verified=Verified.OFFICIAL_OUTPUT,
    verified_of=dict.fromkeys([f"{mode}{prefix}macro" for mode in MODES.values() for prefix in SPLITS.values()], Verified.HAND_WORKED),
    headline=("micro", "macro", "claude/micro"),
    num_items=620,
    counted=_counted(),
    folders=("judgebench", "JudgeBench", "judge_bench"),
    is_part=lambda path: ".jsonl" in path or path.endswith(".parquet"),
    hub=(HubPart("ScalerLab/JudgeBench", "gpt"), HubPart("ScalerLab/JudgeBench", "claude")),
)
