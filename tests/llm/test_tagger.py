"""Tagging a shard: rows, reasons, what is sent."""

import pyarrow as pa
import pytest

from synpref_ray.errors import SchemaError
from synpref_ray.llm.engine import REFUSED, TOO_LONG, Reply, Request
from synpref_ray.llm.journal import Journal
from synpref_ray.llm.tagger import TaggerConfig, tag_pairs
from synpref_ray.schema import POOL_SCHEMA, TAGS_SCHEMA
from tests.builders import make_pairs
from tests.llm.fakes import GOOD_TAG, MemoryStorage, ScriptedEngine

CONFIG = TaggerConfig(max_input_tokens=5000)  # the scripted engine counts characters


def test_every_row_gets_its_tag_in_order() -> None:
    def answer(request: Request) -> str:
        return GOOD_TAG.replace("the right sum", request.prompt.splitlines()[-1].removeprefix('Request: "Say something about tea ')[:8])

    shard = make_pairs(5)
    table = tag_pairs(shard, ScriptedEngine(answer), CONFIG)
    assert table.schema == TAGS_SCHEMA
    assert table["pair_id"].to_pylist() == shard["pair_id"].to_pylist()
    assert table["desired_attributes"].to_pylist() == [f"number {number}" for number in range(5)]
    assert table["task_category"].to_pylist() == ["math"] * 5
    assert table["drop_reason"].null_count == 5


def test_an_unreadable_reply_makes_a_null_row() -> None:
    engine = ScriptedEngine(lambda request: GOOD_TAG[:50] if "number 1." in request.prompt else GOOD_TAG)
    table = tag_pairs(make_pairs(3), engine, CONFIG)
    assert table["drop_reason"].to_pylist() == [None, "unparsable_reply", None]
    assert [row is None for row in table["task_category"].to_pylist()] == [False, True, False]


def test_an_over_long_pair_is_not_sent() -> None:
    shard = make_pairs(2)
    long = shard.slice(0, 1).to_pylist()[0]
    long["prompt"][0]["content"] = "x" * 6000
    shard = pa.concat_tables([pa.Table.from_pylist([long], schema=POOL_SCHEMA), shard.slice(1)])
    engine = ScriptedEngine(lambda request: GOOD_TAG)
    table = tag_pairs(shard, engine, CONFIG)
    assert table["drop_reason"].to_pylist() == ["too_long", None]
    assert engine.counts().requests_sent == 1


def test_replies_are_shown_when_asked_in_an_order_that_the_label_does_not_decide() -> None:
    shard = make_pairs(40)
    columns = [name if name not in {"chosen", "rejected"} else {"chosen": "rejected", "rejected": "chosen"}[name] for name in shard.column_names]
    swapped = shard.rename_columns(columns)
    engine = ScriptedEngine(lambda request: GOOD_TAG)
    shown = TaggerConfig(max_input_tokens=5000, show_replies=True)
    tag_pairs(shard, engine, shown)
    as_labelled = {request.prompt for request in engine.sent}
    engine.sent.clear()
    tag_pairs(swapped, engine, shown)
    assert {request.prompt for request in engine.sent} == as_labelled
    engine.sent.clear()
    tag_pairs(shard, engine, CONFIG)
    assert all("Reply A" not in request.prompt for request in engine.sent)


def test_pairs_of_one_prompt_are_tagged_once_and_a_resumed_shard_not_at_all() -> None:
    shard, storage = make_pairs(3), MemoryStorage()
    doubled = pa.concat_tables([shard, shard])
    engine = ScriptedEngine(lambda request: GOOD_TAG)
    first = tag_pairs(doubled, engine, CONFIG, Journal(storage, "journal/00000"))
    assert (first.num_rows, engine.counts().requests_sent) == (6, 3)
    idle = ScriptedEngine(lambda request: "never asked")
    assert tag_pairs(doubled, idle, CONFIG, Journal(storage, "journal/00000")).equals(first)
    assert idle.counts().requests_sent == 0


def test_an_empty_shard() -> None:
    engine = ScriptedEngine(lambda request: GOOD_TAG)
    table = tag_pairs(make_pairs(0), engine, CONFIG)
    assert (table.num_rows, table.schema) == (0, TAGS_SCHEMA)
    assert engine.counts().requests_sent == 0


def test_a_missing_column_names_itself() -> None:
    with pytest.raises(SchemaError, match="lacks chosen"):
        tag_pairs(make_pairs(1).drop_columns(["chosen"]), ScriptedEngine(lambda request: GOOD_TAG), CONFIG)


def test_an_unreadable_reply_is_asked_for_again_a_bounded_number_of_times_and_kept_raw() -> None:
    def answer(request: Request) -> str:
        if "number 0." in request.prompt:
            return GOOD_TAG if request.temperature > 0 else "{"
        return "no" if "number 1." in request.prompt else GOOD_TAG

    engine = ScriptedEngine(answer)
    table = tag_pairs(make_pairs(3), engine, CONFIG)
    assert table["drop_reason"].to_pylist() == [None, "unparsable_reply", None]
    assert table["raw"].to_pylist() == [None, "no", None]
    assert engine.counts().requests_sent == 3 + 2 + 1
    assert len({request.key for request in engine.sent}) == 6


def test_texts_beyond_the_configured_limits_are_asked_for_again_and_then_rejected_with_what_was_said() -> None:
    short = CONFIG.model_copy(update={"max_attributes_chars": 12})  # of "the right sum", which has 13
    engine = ScriptedEngine(lambda request: GOOD_TAG.replace("right", "sum") if request.temperature and "number 0." in request.prompt else GOOD_TAG)
    table = tag_pairs(make_pairs(2), engine, short)
    assert table["drop_reason"].to_pylist() == [None, "unparsable_reply"]
    assert table["raw"].to_pylist() == [None, GOOD_TAG]
    assert engine.counts().requests_sent == 2 + 2 + 1


def test_retries_are_journaled_like_any_request() -> None:
    storage = MemoryStorage()
    first = tag_pairs(make_pairs(2), ScriptedEngine(lambda request: GOOD_TAG if request.temperature else "{"), CONFIG, Journal(storage, "journal/0"))
    idle, journal = ScriptedEngine(lambda request: "never asked"), Journal(storage, "journal/0")
    assert tag_pairs(make_pairs(2), idle, CONFIG, journal).equals(first)
    assert (idle.counts().requests_sent, journal.num_retries) == (0, 2)


def test_a_refusal_is_a_null_row_with_a_reason_of_its_own() -> None:
    def refuse(request: Request) -> Reply:
        return Reply(key=request.key, text="I cannot.", finish_reason=REFUSED, prompt_tokens=1, output_tokens=2)

    engine = ScriptedEngine(refuse)
    table = tag_pairs(make_pairs(1), engine, CONFIG)
    assert (table["drop_reason"].to_pylist(), table["raw"].to_pylist()) == (["refused_by_model"], ["I cannot."])
    assert engine.counts().requests_sent == 1


def test_a_prompt_that_does_not_fit_the_server_is_a_null_row_and_is_not_asked_again() -> None:
    engine = ScriptedEngine(lambda request: Reply(key=request.key, text="", finish_reason=TOO_LONG, prompt_tokens=0, output_tokens=0))
    table = tag_pairs(make_pairs(1), engine, CONFIG)
    assert (table["drop_reason"].to_pylist(), table["raw"].to_pylist()) == (["too_long"], [None])
    assert engine.counts().requests_sent == 1
