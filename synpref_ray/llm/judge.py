"""Asks an LLM which reply of a pair is better, with retrieved gold pairs as exemplars. Paper: arXiv:2507.01352, Sec. 3.2, Step 3.

Paper: at most 8 exemplars, each with attributes and human label, then the pair with its attributes as Candidate 1 and Candidate 2, in
random order.
Our choice: both orders are asked, always, so that position bias shows as disagreement and a merge rule can abstain. Every vote is stored;
merging them is a rule of its own (`rules/votes.py`), and whether the judge may decide at all another (`rules/judges.py`).
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any, Literal, NamedTuple

import pyarrow as pa
import pyarrow.compute as pc
from pydantic import Field

from synpref_ray.errors import SchemaError
from synpref_ray.llm.both_orders import VOTE, Asked, SamplingConfig, ask_in_both_orders, is_choice, read_votes, reason_unread
from synpref_ray.llm.engine import TOO_LONG, Engine, Reply
from synpref_ray.llm.guidelines import guideline_for
from synpref_ray.llm.journal import Journal, generate_readable
from synpref_ray.llm.prompts import (
    JUDGE_GUIDELINES,
    JUDGE_REPLY_START,
    JudgedExample,
    JudgeGuideline,
    judge_prompt,
    judge_prompt_version,
)
from synpref_ray.llm.tagger import NAME_PATTERN
from synpref_ray.schema import DropReason, Verdict, stable_hash

REQUIRES = ("pair_id", "prompt", "chosen", "rejected")
ADDS = ("votes", "num_exemplars")

VERDICTS = (Verdict.CHOSEN.value, Verdict.REJECTED.value, Verdict.ABSTAIN.value)
"""Of the pair as ingested; candidate 1 is the chosen reply in order 0, the rejected one in order 1."""
VOTES_SCHEMA = pa.schema(
    [
        pa.field("pair_id", pa.string(), nullable=False),
        pa.field("votes", pa.list_(VOTE)),
        pa.field("num_exemplars", pa.int32()),
        pa.field("drop_reason", pa.string()),
    ]
)

Attribute = Literal["task_category", "objectivity", "controversiality", "desired_attributes", "annotation_guideline"]


GUIDELINE_ATTRIBUTES = ("task_category", "objectivity", "controversiality")


class JudgeConfig(SamplingConfig):
    """How pairs are judged; all of it changes results."""

    judge: str = Field(pattern=NAME_PATTERN)  # the name that its votes carry
    guideline: JudgeGuideline = "full"  # ours: by category, objectivity and controversiality; general and short are for small models
    max_exemplars: int = Field(default=8, ge=0, le=8)  # Sec. 3.2, Step 3
    attributes: tuple[Attribute, ...] = (  # Sec. 3.2, Step 3: the target and the exemplars carry all five
        "task_category",
        "objectivity",
        "controversiality",
        "desired_attributes",
        "annotation_guideline",
    )
    seed: int = 0  # of the exemplars' candidate order


class _Plan(NamedTuple):
    """What is sent for one pair: requests by (order, sample), or the reason why none is."""

    requests: Asked
    num_exemplars: int
    drop_reason: DropReason | None


def judge_pairs(shard: pa.Table, exemplars: pa.Table, engine: Engine, config: JudgeConfig, journal: Journal | None = None) -> pa.Table:
    """Return the judge's votes on every pair of the shard, same rows and order (VOTES_SCHEMA).

    Args:
        shard: pairs with the configured attribute columns and, unless `max_exemplars` is 0, `exemplar_ids` (most similar first).
        exemplars: gold pairs with the same columns and `human_verdict`; rows that no pair names are ignored.

    Raises:
        SchemaError: a column or a named exemplar is missing, or an exemplar's verdict is not one of the two replies.
        EngineDied: the engine ended; what it finished is in the journal.
    """
    _require(shard, exemplars, config)
    named = _named_exemplars(shard, exemplars, config)
    pairs = shard.to_pylist()
    plans = [_plan(pair, _exemplars_of(pair, named, config), engine, config) for pair in pairs]
    together = sorted(range(len(pairs)), key=lambda row: (_specific_guideline(pairs[row], config) or "", row))  # a prefix cache computes each once
    requests = {request.key: request for row in together for request in plans[row].requests.values()}
    replies = generate_readable(list(requests.values()), engine, journal, is_choice, config)
    origin = {"judge": config.judge, **asdict(engine.identity()), "prompt_version": judge_prompt_version(config.guideline)}
    rows = [_row(pair["pair_id"], plan, replies, origin) for pair, plan in zip(pairs, plans, strict=True)]
    return pa.Table.from_pylist(rows, schema=VOTES_SCHEMA)


def _require(shard: pa.Table, exemplars: pa.Table, config: JudgeConfig) -> None:
    specific = GUIDELINE_ATTRIBUTES if config.guideline == "full" else ()
    wanted = dict.fromkeys((*REQUIRES, *config.attributes, *specific, *(("exemplar_ids",) if config.max_exemplars else ())))
    needed = {"the shard": (shard, tuple(wanted))}
    if config.max_exemplars:
        needed["the exemplar table"] = (exemplars, (*REQUIRES, *config.attributes, "human_verdict"))
    for name, (table, columns) in needed.items():
        missing = [column for column in columns if column not in table.column_names]
        if missing:
            raise SchemaError(f"judge: {name} lacks {', '.join(missing)}; found {', '.join(table.column_names)}")


def _named_exemplars(shard: pa.Table, exemplars: pa.Table, config: JudgeConfig) -> dict[str, dict[str, Any]]:
    """Return the exemplars that the shard's pairs name, by `pair_id`: all of gold as Python values would be seconds of every shard."""
    if not config.max_exemplars:
        return {}
    named = pc.list_flatten(shard["exemplar_ids"]).unique()
    rows = exemplars.select([*REQUIRES, *config.attributes, "human_verdict"]).filter(pc.is_in(exemplars["pair_id"], value_set=named))
    return {row["pair_id"]: row for row in rows.to_pylist()}


def _exemplars_of(pair: Mapping[str, Any], named: Mapping[str, Mapping[str, Any]], config: JudgeConfig) -> list[JudgedExample]:
    """Return the pair's exemplars. Which candidate wins alternates, from a start that depends on the pair, so that no answer is the usual
    one.
    """
    if not config.max_exemplars:
        return []
    ids = pair["exemplar_ids"] or []
    unknown = [name for name in ids if name not in named]
    if unknown:
        raise SchemaError(f"judge: pair {pair['pair_id']} names exemplars that the exemplar table lacks: {', '.join(unknown[:3])}")
    usable = [named[name] for name in ids if _attributes(named[name], config) is not None][: config.max_exemplars]
    start = stable_hash(config.seed, pair["pair_id"], "exemplar-order")
    return [_exemplar(row, config, winner_first=(start + number) % 2 == 0) for number, row in enumerate(usable)]


def _exemplar(row: Mapping[str, Any], config: JudgeConfig, *, winner_first: bool) -> JudgedExample:
    if row["human_verdict"] not in {Verdict.CHOSEN, Verdict.REJECTED}:
        raise SchemaError(f"judge: exemplar {row['pair_id']} has human_verdict {row['human_verdict']!r}; only chosen or rejected can be shown")
    order = 0 if (row["human_verdict"] == Verdict.CHOSEN) == winner_first else 1
    return _example(row, config, order=order, answer="1" if winner_first else "2")


def _example(row: Mapping[str, Any], config: JudgeConfig, *, order: int, answer: str | None = None) -> JudgedExample:
    first, second = (row["chosen"], row["rejected"]) if order == 0 else (row["rejected"], row["chosen"])
    return JudgedExample(prompt=row["prompt"], candidate_1=first, candidate_2=second, attributes=_attributes(row, config) or {}, answer=answer)


def _attributes(row: Mapping[str, Any], config: JudgeConfig) -> dict[str, str] | None:
    attributes: dict[str, Any] = {str(name): row[name] for name in config.attributes}
    return None if None in attributes.values() else attributes


def _specific_guideline(pair: Mapping[str, Any], config: JudgeConfig) -> str | None:
    """Return what the guideline adds for this pair's attributes, "" for a guideline that adds nothing; None: it needs attributes that are null."""
    if config.guideline != "full":
        return ""
    values = [pair[name] for name in GUIDELINE_ATTRIBUTES]
    return None if None in values else guideline_for(*values) + "\n"


def _plan(pair: Mapping[str, Any], exemplars: Sequence[JudgedExample], engine: Engine, config: JudgeConfig) -> _Plan:
    """Fit both orders with as many exemplars as `max_input_tokens` allows, the least similar dropped first; candidates are never cut."""
    if _attributes(pair, config) is None:
        return _Plan({}, 0, DropReason.NO_ATTRIBUTES)
    targets = [_example(pair, config, order=order) for order in (0, 1)]
    specific = _specific_guideline(pair, config)
    if specific is None:
        return _Plan({}, 0, DropReason.NO_ATTRIBUTES)
    guideline = JUDGE_GUIDELINES[config.guideline] + specific
    for num_exemplars in range(len(exemplars), -1, -1):
        prompts = [judge_prompt(guideline, target, exemplars[:num_exemplars]) for target in targets]
        if max(engine.count_tokens(prompt + JUDGE_REPLY_START) for prompt in prompts) <= config.max_input_tokens:
            asked = ask_in_both_orders(prompts, judge_prompt_version(config.guideline), JUDGE_REPLY_START, config)
            return _Plan(asked, num_exemplars, None)
    return _Plan({}, 0, DropReason.TOO_LONG)


def _row(pair_id: str, plan: _Plan, replies: Mapping[str, Reply], origin: Mapping[str, str]) -> dict[str, Any]:
    if plan.drop_reason is not None:
        return {"pair_id": pair_id, "drop_reason": plan.drop_reason.value}
    if any(replies[request.key].finish_reason == TOO_LONG for request in plan.requests.values()):  # one order alone would be no judgement
        return {"pair_id": pair_id, "drop_reason": DropReason.TOO_LONG.value}
    votes = read_votes(plan.requests, replies, VERDICTS, origin)
    row = {"pair_id": pair_id, "votes": votes, "num_exemplars": plan.num_exemplars}
    if all(vote["verdict"] == Verdict.ABSTAIN for vote in votes):  # counted as a failure; the votes stay, an unreadable answer is an abstention
        return {**row, "drop_reason": reason_unread(plan.requests, replies).value}
    return row
