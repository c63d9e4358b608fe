"""Judging a shard: both orders, exemplars, what a vote says."""

import math
import tracemalloc
from collections.abc import Callable

import pyarrow as pa
import pytest
from pydantic import ValidationError

from synpref_ray.errors import SchemaError
from synpref_ray.llm.engine import REFUSED, TOO_LONG, Reply, Request
from synpref_ray.llm.guidelines import BY_CATEGORY, BY_OBJECTIVITY
from synpref_ray.llm.judge import VOTES_SCHEMA, JudgeConfig, judge_pairs
from synpref_ray.llm.prompts import judge_prompt_version
from synpref_ray.llm.tagger import ADDS as ATTRIBUTES
from synpref_ray.schema import Objectivity, TaskCategory
from tests.builders import make_pairs
from tests.llm.fakes import ScriptedEngine

NO_EXEMPLARS = make_pairs(0)


def config(**settings: object) -> JudgeConfig:
    return JudgeConfig(**{"judge": "j", "max_exemplars": 0, "max_input_tokens": 10_000, "guideline": "general", **settings})


def tagged(count: int, topic: str = "tea") -> pa.Table:
    table = make_pairs(count, topic)
    for name in ATTRIBUTES:
        table = table.append_column(name, pa.array([f"{name} {row}" for row in range(count)]))
    return table


def gold(count: int, verdict: str = "chosen") -> pa.Table:
    return tagged(count, "gold").append_column("human_verdict", pa.array([verdict] * count))


def naming(shard: pa.Table, ids: list[str] | None) -> pa.Table:
    return shard.append_column("exemplar_ids", pa.array([ids] * shard.num_rows, pa.list_(pa.string())))


def candidates(prompt: str) -> list[str]:
    return [line.partition('"')[2][:-1] for line in prompt.splitlines() if line.startswith("Candidate ")][-2:]


def by_truth(better: Callable[[str], bool]) -> Callable[[Request], str]:
    return lambda request: "1" if better(candidates(request.prompt)[0]) else "2"


def test_a_judge_that_knows_names_the_same_reply_in_both_orders() -> None:
    shard = tagged(3)
    table = judge_pairs(shard, NO_EXEMPLARS, ScriptedEngine(by_truth(lambda text: text.startswith("tea is good"))), config())
    assert table.schema == VOTES_SCHEMA
    assert table["pair_id"].to_pylist() == shard["pair_id"].to_pylist()
    for votes in table["votes"].to_pylist():
        assert [(vote["order"], vote["raw"], vote["verdict"]) for vote in votes] == [(0, "1", "chosen"), (1, "2", "chosen")]
        assert {(vote["judge"], vote["sample"], vote["logprob"]) for vote in votes} == {("j", 0, None)}
    assert table["num_exemplars"].to_pylist() == [0, 0, 0]


def test_a_judge_that_always_names_candidate_1_contradicts_itself() -> None:
    table = judge_pairs(tagged(2), NO_EXEMPLARS, ScriptedEngine(lambda request: "1"), config())
    assert [[vote["verdict"] for vote in votes] for votes in table["votes"].to_pylist()] == [["chosen", "rejected"]] * 2


def test_the_logprob_is_of_the_candidate_named() -> None:
    def answer(request: Request) -> Reply:
        logprobs = (math.log(0.2), math.log(0.8))
        return Reply(key=request.key, text="2", finish_reason="stop", prompt_tokens=1, output_tokens=1, choice_logprobs=logprobs)

    [votes] = judge_pairs(tagged(1), NO_EXEMPLARS, ScriptedEngine(answer), config())["votes"].to_pylist()
    assert [vote["logprob"] for vote in votes] == pytest.approx([math.log(0.8)] * 2)


def test_samples_are_separate_requests() -> None:
    engine = ScriptedEngine(lambda request: "1")
    [votes] = judge_pairs(tagged(1), NO_EXEMPLARS, engine, config(num_samples=3, temperature=0.7))["votes"].to_pylist()
    assert [(vote["order"], vote["sample"]) for vote in votes] == [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (1, 2)]
    assert len({request.key for request in engine.sent}) == 6


@pytest.mark.parametrize("settings", [{"num_samples": 2}, {"temperature": 0.5}, {"max_exemplars": 9}, {"judge": "j", "attributes": ["mood"]}])
def test_contradicting_settings_are_refused(settings: dict) -> None:
    with pytest.raises(ValidationError):
        config(**settings)


def test_exemplars_come_first_with_alternating_answers_and_equal_in_both_orders() -> None:
    exemplars = gold(4)
    shard = naming(tagged(1), exemplars["pair_id"].to_pylist())
    engine = ScriptedEngine(lambda request: "1")
    table = judge_pairs(shard, exemplars, engine, config(max_exemplars=3))
    assert table["num_exemplars"].to_pylist() == [3]
    starts = set()
    for request in engine.sent:
        head, _, target = request.prompt.rpartition('Request: "')
        starts.add(head)
        assert "tea number 0" in target
        answers = [line[-1] for line in request.prompt.splitlines() if line.startswith("The better candidate is")]
        assert answers in (["1", "2", "1"], ["2", "1", "2"])
        shown = [line for line in request.prompt.splitlines() if line.startswith("Candidate ")][:6]
        winners = [shown[2 * number + int(answer) - 1] for number, answer in enumerate(answers)]
        assert all("gold is good" in winner for winner in winners)  # the human verdict was: chosen
    assert len(starts) == 1


def test_an_exemplar_whose_label_people_reversed_shows_the_other_reply_as_better() -> None:
    exemplars = gold(1, "rejected")
    engine = ScriptedEngine(lambda request: "1")
    judge_pairs(naming(tagged(1), exemplars["pair_id"].to_pylist()), exemplars, engine, config(max_exemplars=1))
    lines = engine.sent[0].prompt.splitlines()
    answer = next(line[-1] for line in lines if line.startswith("The better candidate is"))
    assert next(line for line in lines if line.startswith(f"Candidate {answer}: ")) == f'Candidate {answer}: "no gold"'


def test_gold_that_no_pair_names_costs_no_memory() -> None:
    exemplars = gold(5000)
    shard = naming(tagged(1), exemplars["pair_id"].to_pylist()[2500:2502])
    tracemalloc.start()
    table = judge_pairs(shard, exemplars, ScriptedEngine(lambda request: "1"), config(max_exemplars=8))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert table["num_exemplars"].to_pylist() == [2]
    assert peak < 1 << 20  # 21 MiB with all of gold as Python values


def test_exemplars_are_dropped_from_the_end_until_the_prompt_fits_then_the_pair() -> None:
    exemplars = gold(4)
    ids = exemplars["pair_id"].to_pylist()
    shard = naming(tagged(1), ids)
    engine = ScriptedEngine(lambda request: "1")
    judge_pairs(shard, exemplars, engine, config(max_exemplars=4))
    whole = max(len(request.prompt + request.reply_start) for request in engine.sent)
    for limit, expected in ((whole, 4), (whole - 1, 3)):
        table = judge_pairs(shard, exemplars, engine, config(max_exemplars=4, max_input_tokens=limit))
        assert table["num_exemplars"].to_pylist() == [expected]
        assert "gold number 0" in engine.sent[-1].prompt  # the most similar stays
    engine.sent.clear()
    table = judge_pairs(shard, exemplars, engine, config(max_exemplars=4, max_input_tokens=50))
    assert (table["drop_reason"].to_pylist(), table["votes"].to_pylist(), engine.sent) == (["too_long"], [None], [])


def test_a_pair_without_attributes_is_not_judged_unless_none_are_shown() -> None:
    shard = tagged(2)
    column = shard.column_names.index("annotation_guideline")
    shard = shard.set_column(column, "annotation_guideline", pa.array([None, "g"]))
    table = judge_pairs(shard, NO_EXEMPLARS, ScriptedEngine(lambda request: "1"), config())
    assert table["drop_reason"].to_pylist() == ["no_attributes", None]
    table = judge_pairs(shard, NO_EXEMPLARS, ScriptedEngine(lambda request: "1"), config(attributes=()))
    assert table["drop_reason"].to_pylist() == [None, None]


def test_an_exemplar_without_attributes_is_passed_over_and_no_exemplars_is_fine() -> None:
    exemplars = gold(2)
    column = exemplars.column_names.index("task_category")
    exemplars = exemplars.set_column(column, "task_category", pa.array([None, "math"]))
    engine = ScriptedEngine(lambda request: "1")
    table = judge_pairs(naming(tagged(1), exemplars["pair_id"].to_pylist()), exemplars, engine, config(max_exemplars=2))
    assert table["num_exemplars"].to_pylist() == [1]
    assert "gold number 1" in engine.sent[0].prompt
    table = judge_pairs(naming(tagged(1), None), exemplars, engine, config(max_exemplars=2))
    assert table["num_exemplars"].to_pylist() == [0]


def test_unreadable_replies_abstain_and_a_pair_with_nothing_else_is_counted() -> None:
    first_order_only = judge_pairs(tagged(1), NO_EXEMPLARS, ScriptedEngine(by_truth(lambda text: text.startswith("tea"))), config())
    assert first_order_only["drop_reason"].to_pylist() == [None]
    half = ScriptedEngine(lambda request: "1" if candidates(request.prompt)[0].startswith("tea") else "neither")
    [votes] = judge_pairs(tagged(1), NO_EXEMPLARS, half, config())["votes"].to_pylist()
    assert [(vote["verdict"], vote["raw"]) for vote in votes] == [("chosen", "1"), ("abstain", "neither")]
    none = judge_pairs(tagged(1), NO_EXEMPLARS, ScriptedEngine(lambda request: "neither"), config())
    assert none["drop_reason"].to_pylist() == ["unparsable_reply"]
    [votes] = none["votes"].to_pylist()  # kept: a judge that may decide and gives no readable answer abstains, and makes no label
    assert [vote["verdict"] for vote in votes] == ["abstain", "abstain"]


def test_wrong_input_is_one_line() -> None:
    engine = ScriptedEngine(lambda request: "1")
    with pytest.raises(SchemaError, match="the shard lacks annotation_guideline"):
        judge_pairs(tagged(1).drop_columns(["annotation_guideline"]), NO_EXEMPLARS, engine, config())
    with pytest.raises(SchemaError, match="the shard lacks exemplar_ids"):
        judge_pairs(tagged(1), gold(1), engine, config(max_exemplars=1))
    with pytest.raises(SchemaError, match="the exemplar table lacks human_verdict"):
        judge_pairs(naming(tagged(1), []), tagged(1), engine, config(max_exemplars=1))
    with pytest.raises(SchemaError, match="names exemplars that the exemplar table lacks: nobody"):
        judge_pairs(naming(tagged(1), ["nobody"]), gold(1), engine, config(max_exemplars=1))
    exemplars = gold(1, "abstain")
    with pytest.raises(SchemaError, match="human_verdict 'abstain'"):
        judge_pairs(naming(tagged(1), exemplars["pair_id"].to_pylist()), exemplars, engine, config(max_exemplars=1))


def test_an_empty_shard() -> None:
    table = judge_pairs(tagged(0), NO_EXEMPLARS, ScriptedEngine(lambda request: "1"), config())
    assert (table.num_rows, table.schema) == (0, VOTES_SCHEMA)


def with_enums(categories: list[str]) -> pa.Table:
    shard = tagged(len(categories))
    values = {"task_category": categories, "objectivity": ["objective"] * len(categories), "controversiality": ["low"] * len(categories)}
    for name, column in values.items():
        shard = shard.set_column(shard.column_names.index(name), name, pa.array(column))
    return shard


def test_the_guideline_is_of_the_pairs_category_and_pairs_of_one_are_sent_together() -> None:
    engine = ScriptedEngine(lambda request: "1")
    table = judge_pairs(with_enums(["math", "editing", "math", "editing"]), NO_EXEMPLARS, engine, config(guideline="full"))
    assert table["drop_reason"].to_pylist() == [None] * 4
    asked = ["math" if BY_CATEGORY[TaskCategory.MATH] in request.prompt else "editing" for request in engine.sent]
    assert asked == ["editing"] * 4 + ["math"] * 4
    for request in engine.sent:
        assert request.prompt.index(BY_OBJECTIVITY[Objectivity.OBJECTIVE]) < request.prompt.index("Request: ")
    versions = {vote["prompt_version"] for votes in table["votes"].to_pylist() for vote in votes}
    assert versions == {judge_prompt_version("full")}


def test_the_full_guideline_needs_its_attributes_even_if_none_are_shown() -> None:
    shard = with_enums(["math", "editing"])
    shard = shard.set_column(shard.column_names.index("objectivity"), "objectivity", pa.array([None, "objective"]))
    table = judge_pairs(shard, NO_EXEMPLARS, ScriptedEngine(lambda request: "1"), config(guideline="full", attributes=()))
    assert table["drop_reason"].to_pylist() == ["no_attributes", None]
    with pytest.raises(SchemaError, match="the shard lacks objectivity"):
        judge_pairs(shard.drop_columns(["objectivity"]), NO_EXEMPLARS, ScriptedEngine(str), config(guideline="full", attributes=()))


def test_an_unreadable_reply_is_asked_for_again_with_temperature() -> None:
    engine = ScriptedEngine(lambda request: "1" if request.temperature > 0 else "neither")
    table = judge_pairs(tagged(1), NO_EXEMPLARS, engine, config())
    assert [vote["raw"] for vote in table["votes"].to_pylist()[0]] == ["1", "1"]
    assert [request.temperature for request in engine.sent] == [0.0, 0.0, 0.7, 0.7]


def test_a_refusal_is_an_abstention_with_a_reason_of_its_own_and_not_asked_again() -> None:
    def refuse(request: Request) -> Reply:
        return Reply(key=request.key, text="", finish_reason=REFUSED, prompt_tokens=1, output_tokens=0)

    engine = ScriptedEngine(refuse)
    table = judge_pairs(tagged(1), NO_EXEMPLARS, engine, config())
    assert table["drop_reason"].to_pylist() == ["refused_by_model"]
    assert [vote["verdict"] for vote in table["votes"].to_pylist()[0]] == ["abstain", "abstain"]
    assert engine.counts().requests_sent == 2


def test_a_refused_reply_is_an_abstention_whatever_its_text_reads() -> None:
    def refuse(request: Request) -> Reply:
        logprobs = (math.log(0.9), math.log(0.1))
        return Reply(key=request.key, text="1", finish_reason=REFUSED, prompt_tokens=1, output_tokens=1, choice_logprobs=logprobs)

    table = judge_pairs(tagged(1), NO_EXEMPLARS, ScriptedEngine(refuse), config())
    assert table["drop_reason"].to_pylist() == ["refused_by_model"]
    assert [(vote["raw"], vote["verdict"], vote["logprob"]) for vote in table["votes"].to_pylist()[0]] == [("1", "abstain", None)] * 2


def test_a_pair_of_which_one_order_does_not_fit_is_too_long_and_has_no_votes() -> None:
    def answer(request: Request) -> str | Reply:
        if candidates(request.prompt)[0].startswith("tea"):
            return "1"
        return Reply(key=request.key, text="", finish_reason=TOO_LONG, prompt_tokens=0, output_tokens=0)

    engine = ScriptedEngine(answer)
    table = judge_pairs(tagged(1), NO_EXEMPLARS, engine, config())
    assert (table["drop_reason"].to_pylist(), table["votes"].to_pylist()) == (["too_long"], [None])
    assert engine.counts().requests_sent == 2  # not asked again


def test_votes_say_where_they_come_from() -> None:
    [votes] = judge_pairs(tagged(1), NO_EXEMPLARS, ScriptedEngine(lambda request: "1"), config())["votes"].to_pylist()
    origins = {(vote["model"], vote["revision"], vote["prompt_version"]) for vote in votes}
    assert origins == {("scripted", "r1", judge_prompt_version("general"))}
