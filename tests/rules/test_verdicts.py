"""Stored votes to verdicts, on whole shards."""

import pyarrow as pa
import pytest

from synpref_ray.errors import SchemaError
from synpref_ray.rules.judges import AgreementRecord, judge_trust
from synpref_ray.rules.verdicts import (
    VERDICT_SCHEMA,
    MergeConfig,
    add_verdicts,
    agreement_records,
)
from synpref_ray.schema import Verdict

C, R, A = Verdict.CHOSEN, Verdict.REJECTED, Verdict.ABSTAIN
VOTE = pa.struct([("judge", pa.string()), ("order", pa.int8()), ("sample", pa.int8()), ("raw", pa.string()), ("verdict", pa.string())])


def vote(judge, order, verdict):
    return {"judge": judge, "order": order, "sample": 0, "raw": "", "verdict": verdict}


def both(judge, verdict):
    return [vote(judge, 0, verdict), vote(judge, 1, verdict)]


def shard(rows):
    """Rows of (votes, category)."""
    return pa.table(
        {
            "pair_id": pa.array([f"p{i}" for i in range(len(rows))], pa.string()),
            "votes": pa.array([row[0] for row in rows], pa.list_(VOTE)),
            "task_category": pa.array([row[1] for row in rows], pa.string()),
        }
    )


GOOD = judge_trust([AgreementRecord("math", C, C)] * 20)
BAD = judge_trust([AgreementRecord("math", C, C), AgreementRecord("math", R, C)] * 20)


def test_only_judges_that_may_decide_decide():
    rows = [
        (both("good", "chosen"), "math"),
        (both("good", "rejected") + both("bad", "chosen") + both("worse", "chosen"), "math"),
        (both("bad", "rejected"), "math"),
        (both("good", "rejected"), "coding"),
        (both("stranger", "rejected"), "math"),
        (None, "math"),
        ([], "math"),
        ([vote("good", 0, "chosen"), vote("good", 1, "rejected")], "math"),
        (both("good", "chosen"), None),
    ]
    table = add_verdicts(shard(rows), {"good": GOOD, "bad": BAD, "worse": BAD})
    assert table.schema.equals(VERDICT_SCHEMA)
    assert table["pair_id"].to_pylist() == [f"p{i}" for i in range(9)]
    assert table["judge_verdict"].to_pylist() == ["chosen", "rejected", None, None, None, None, None, "abstain", None]
    assert table["verdict_reason"].to_pylist() == [
        "agreed",
        "agreed",
        "no_deciding_vote",
        "no_judge_decides",
        "no_deciding_vote",
        "no_votes",
        "no_votes",
        "orders_disagree",
        "no_deciding_vote",  # it may be of a category that a judge decides
    ]
    nobody = add_verdicts(shard(rows), {"bad": BAD, "worse": BAD})
    assert set(nobody["verdict_reason"].to_pylist()) == {"no_judge_decides"}
    assert nobody["judge_verdict"].null_count == len(rows)
    everyone = ["chosen", "chosen", "rejected", "rejected", "rejected", None, None, "abstain", "chosen"]
    assert table["all_judges_verdict"].to_pylist() == everyone
    assert table["num_votes"].to_pylist() == [2, 6, 2, 2, 2, 0, 0, 2, 2]


def test_a_drop_reason_is_handed_on_and_columns_are_checked():
    table = shard([(None, "math"), (both("good", "chosen"), "math")]).append_column("drop_reason", pa.array(["too_long", None]))
    assert add_verdicts(table, {})["drop_reason"].to_pylist() == ["too_long", None]
    assert add_verdicts(shard([]), {}).schema.equals(VERDICT_SCHEMA)
    with pytest.raises(SchemaError, match="task_category"):
        add_verdicts(table.drop_columns(["task_category"]), {})


def test_records_by_judge():
    gold = shard([(both("a", "chosen") + both("b", "rejected"), "math"), (None, "math"), (both("a", "chosen"), "math")])
    gold = gold.append_column("human_verdict", pa.array(["rejected", "chosen", "abstain"])).append_column("prompt_group", pa.array(["g", "g", "h"]))
    assert agreement_records(gold) == {"a": [AgreementRecord("math", C, R, 1, 2, "g")], "b": [AgreementRecord("math", R, R, 1, 2, "g")]}


def test_judges_weigh_as_they_agreed_if_that_is_asked_for():
    better = judge_trust([AgreementRecord("math", C, C)] * 60)
    usual = judge_trust([AgreementRecord("math", C, C)] * 17 + [AgreementRecord("math", R, C)] * 3)
    table = shard([(both("better", "chosen") + both("b", "rejected") + both("c", "rejected"), "math")])
    trust = {"better": better, "b": usual, "c": usual}
    assert better.weight > 2 * usual.weight
    for weights, verdict in (("equal", "rejected"), ("agreement", "chosen")):
        merged = add_verdicts(table, trust, MergeConfig(weights=weights))
        assert merged["judge_verdict"].to_pylist() == [verdict]
        assert merged["all_judges_verdict"].to_pylist() == ["rejected"]
