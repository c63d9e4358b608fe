"""Asks an LLM whether a pair that shares words with a benchmark item gives that item away.

Paper: App. C (v3): a judge strikes the false alarms among n-gram overlaps; its prompt is not published, every word here is ours. As in
`prompts.py`, texts of pairs and benchmarks are data: one-line JSON strings, so that nothing inside can end them. Both statements are shown in both
orders, always, so that a judge that follows the position contradicts itself.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any, NamedTuple

import pyarrow as pa
from pydantic import Field

from synpref_ray.errors import SchemaError
from synpref_ray.llm.both_orders import VOTE, Asked, SamplingConfig, ask_in_both_orders, is_choice, read_votes, reason_unread
from synpref_ray.llm.engine import TOO_LONG, Engine, Reply
from synpref_ray.llm.journal import Journal, generate_readable
from synpref_ray.llm.prompts import DATA_RULE, conversation_lines, quote
from synpref_ray.llm.tagger import NAME_PATTERN
from synpref_ray.rules.leaks import LeakVerdict
from synpref_ray.schema import DropReason

LEAK_PROMPT_VERSION = "leak-1"
LEAK_REPLY_START = "The true statement is Statement "
"""Ends in a space, as the preference judge's does: the choice is one token."""
LEAK_INSTRUCTIONS = f"""A benchmark tests models with the request below. A training example shares some words with it.
Decide whether the example gives the benchmark's item away: whether it holds the same request, perhaps reworded or as a part, or an answer to it.
Set phrases, instructions about form, and requests of the same kind about other things give nothing away.
{DATA_RULE}
"""
STATEMENTS = (
    "The training example holds the benchmark's request or an answer to it.",
    "The training example is about something else; the shared words are a coincidence.",
)
"""The first says leak, the second clean."""
REQUIRES = ("pair_id", "prompt", "chosen", "rejected", "field", "ngram", "benchmark_prompt")

VERDICTS = (LeakVerdict.LEAK.value, LeakVerdict.CLEAN.value, LeakVerdict.ABSTAIN.value)
"""Statement 1 says leak in order 0, clean in order 1."""
LEAK_VOTES_SCHEMA = pa.schema(
    [
        pa.field("pair_id", pa.string(), nullable=False),
        pa.field("votes", pa.list_(VOTE)),
        pa.field("shown", pa.string()),  # pair, or turn: of a pair that does not fit, the turn with the shared words alone
        pa.field("drop_reason", pa.string()),
    ]
)


class LeakJudgeConfig(SamplingConfig):
    """How overlaps are judged; all of it changes results."""

    judge: str = Field(pattern=NAME_PATTERN)  # the name that its votes carry


class _Plan(NamedTuple):
    """What is sent for one proposal: requests by (order, sample), and how much of the pair they show; nothing fits where there are none."""

    requests: Asked
    shown: str | None


def judge_leaks(shard: pa.Table, engine: Engine, config: LeakJudgeConfig, journal: Journal | None = None) -> pa.Table:
    """Return the judge's votes on every proposal of the shard (columns REQUIRES), same rows and order (LEAK_VOTES_SCHEMA).

    Raises:
        SchemaError: a column is missing.
        EngineDied: the engine ended; what it finished is in the journal.
    """
    missing = [name for name in REQUIRES if name not in shard.column_names]
    if missing:
        raise SchemaError(f"judge leaks: the shard lacks {', '.join(missing)}; found {', '.join(shard.column_names)}")
    rows = shard.select(list(REQUIRES)).to_pylist()
    plans = [_plan(row, engine, config) for row in rows]
    requests = {request.key: request for plan in plans for request in plan.requests.values()}
    replies = generate_readable(list(requests.values()), engine, journal, is_choice, config)
    origin = {"judge": config.judge, **asdict(engine.identity()), "prompt_version": LEAK_PROMPT_VERSION}
    return pa.Table.from_pylist(
        [_row(row["pair_id"], plan, replies, origin) for row, plan in zip(rows, plans, strict=True)], schema=LEAK_VOTES_SCHEMA
    )


def leak_prompt(row: Mapping[str, Any], shown: Sequence[str], order: int) -> str:
    """Return the prompt up to, and without, `LEAK_REPLY_START`.

    Args:
        row: with `ngram` and `benchmark_prompt`.
        shown: the lines of the training example.
        order: 0 states the leak first.
    """
    first, second = STATEMENTS if order == 0 else STATEMENTS[::-1]
    benchmark = [f"Benchmark request: {quote(row['benchmark_prompt'])}", f"Shared words: {quote(row['ngram'])}"]
    return "\n\n".join([LEAK_INSTRUCTIONS, *benchmark, "Training example", *shown, f"Statement 1: {first}", f"Statement 2: {second}", ""])


def _plan(row: Mapping[str, Any], engine: Engine, config: LeakJudgeConfig) -> _Plan:
    """Show the whole pair, or the turn that shares the words; neither is ever cut."""
    replies = [f"Reply {letter}: {quote(row[name])}" for letter, name in (("A", "chosen"), ("B", "rejected"))]
    for shown, lines in (("pair", [*conversation_lines(row["prompt"]), *replies]), ("turn", [f"Part of it: {quote(_turn(row))}"])):
        prompts = [leak_prompt(row, lines, order) for order in (0, 1)]
        if max(engine.count_tokens(prompt + LEAK_REPLY_START) for prompt in prompts) <= config.max_input_tokens:
            return _Plan(ask_in_both_orders(prompts, LEAK_PROMPT_VERSION, LEAK_REPLY_START, config), shown)
    return _Plan({}, None)


def _turn(row: Mapping[str, Any]) -> str:
    """Return the text that shares the words: `field` is chosen, rejected or prompt.<turn>."""
    name, _, place = row["field"].partition(".")
    text: str = row["prompt"][int(place)]["content"] if name == "prompt" else row[name]
    return text


def _row(pair_id: str, plan: _Plan, replies: Mapping[str, Reply], origin: Mapping[str, str]) -> dict[str, Any]:
    answers = [replies[request.key].finish_reason for request in plan.requests.values()]
    if not answers or TOO_LONG in answers:  # one order alone would be no judgement
        return {"pair_id": pair_id, "drop_reason": DropReason.TOO_LONG.value}
    votes = read_votes(plan.requests, replies, VERDICTS, origin)
    abstained = all(vote["verdict"] == LeakVerdict.ABSTAIN for vote in votes)
    reason = reason_unread(plan.requests, replies).value if abstained else None
    return {"pair_id": pair_id, "votes": votes, "shown": plan.shown, "drop_reason": reason}
