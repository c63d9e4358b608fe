"""Gold, labels and sets derived from stored verdicts and votes; and what happens when somebody lets gold leak."""

from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pytest

from synpref_ray.errors import CleanGoldError, InputError
from synpref_ray.llm.judge import VOTES_SCHEMA
from synpref_ray.pipeline.gold import (
    Dropped,
    LabelledPool,
    gather_gold,
    label_pool,
    measure_judges,
    measure_on_doubted,
    merge_pool_votes,
    save_label_sets,
)
from synpref_ray.pipeline.judge_steps import pairs_to_judge, spread_rows
from synpref_ray.pipeline.training_batches import read_member_tokens
from synpref_ray.retrieval.embedder import embeddings_schema
from synpref_ray.reward.training_plan import TOKENS_SCHEMA
from synpref_ray.rules.gold import GoldConfig, check_best_rm_training, check_silver, split_gold
from synpref_ray.rules.judges import TrustConfig, describe_doubted, judge_trust
from synpref_ray.rules.verdicts import MergeConfig
from synpref_ray.schema import ATTRIBUTES_SCHEMA, HUMAN_SCHEMA, REWARDS_SCHEMA
from synpref_ray.tables.pools import Pool, commit_pool, write_pool_shard
from synpref_ray.tables.sets import load_set, read_member
from synpref_ray.tables.sidecars import Sidecar
from synpref_ray.tables.storage import Storage
from tests.builders import make_pairs

GOLD = GoldConfig(seed=3, audit_fraction=0.5)
EMBEDDINGS = embeddings_schema(2)


def seal(sidecar: Sidecar, table: pa.Table) -> Sidecar:
    """Write a one-shard sidecar, sealed."""
    sidecar.write(0, table)
    sidecar.pool.storage.write_json(
        f"{sidecar.folder}/manifest.json", {"pool_digest": sidecar.pool.digest, "fingerprint": sidecar.fingerprint, "rejected": {}}
    )
    return sidecar


def labelled_pool(root: Path, verdicts: list[str | None]) -> LabelledPool:
    """Return a pool of one pair per verdict (None: nobody was asked), all tagged `math` and embedded alike."""
    storage, pairs = Storage(str(root)), make_pairs(len(verdicts))
    pool = commit_pool(storage, "seed", "f" * 32, [write_pool_shard(storage, "seed", 0, pairs)], {})
    ids = pairs["pair_id"].to_pylist()
    splits = split_gold(pairs["prompt_group"], GOLD).to_pylist()
    human = [
        {"pair_id": i, "drop_reason": "not_selected"}
        if verdict is None
        else {"pair_id": i, "human_verdict": verdict, "annotator": "a", "simulated": False, "gold_split": split if verdict != "abstain" else None}
        for i, verdict, split in zip(ids, verdicts, splits, strict=True)
    ]
    tags = [{"pair_id": i, "task_category": "math", "objectivity": "objective", "controversiality": "low"} for i in ids]
    vectors = [{"pair_id": i, "embedding": [1.0, 0.0]} for i in ids]
    return LabelledPool(
        pool,
        seal(Sidecar(pool, "attributes", "a" * 32), pa.Table.from_pylist(tags, schema=ATTRIBUTES_SCHEMA)),
        seal(Sidecar(pool, "embeddings", "b" * 32), pa.Table.from_pylist(vectors, schema=EMBEDDINGS)),
        seal(Sidecar(pool, "human", "c" * 32), pa.Table.from_pylist(human, schema=HUMAN_SCHEMA)),
    )


def vote_table(pool: Pool, verdicts: str | Sequence[str], name: str = "d") -> Sidecar:
    """Return a sealed votes sidecar in which one judge says this of every pair, or these in turn, in both orders."""
    ids = pool.read_all(["pair_id"])["pair_id"].to_pylist()
    origin = {"judge": "j", "model": "m", "revision": "r", "prompt_version": "v", "sample": 0, "raw": "1", "logprob": -0.1}
    in_turn = [verdicts] if isinstance(verdicts, str) else verdicts
    votes = [[{**origin, "order": order, "verdict": verdict} for order in (0, 1)] for verdict in in_turn]
    rows = [{"pair_id": i, "votes": votes[number % len(votes)], "num_exemplars": 0} for number, i in enumerate(ids)]
    return seal(Sidecar(pool, "votes.j", name * 32), pa.Table.from_pylist(rows, schema=VOTES_SCHEMA))


def test_gold_is_every_decided_pair_with_its_sidecars(tmp_path: Path) -> None:
    labelled = labelled_pool(tmp_path, ["chosen", None, "rejected", "abstain", None])
    gold = gather_gold(labelled.pool.storage, "gold-r00", [labelled], GOLD, EMBEDDINGS).read()
    ids = labelled.pool.read_all(["pair_id"])["pair_id"].to_pylist()
    assert gold["pair_id"].to_pylist() == [ids[0], ids[2]]
    assert gold["human_verdict"].to_pylist() == ["chosen", "rejected"]
    assert gold["task_category"].to_pylist() == ["math", "math"]
    with pytest.raises(InputError, match="no pair of these pools has a human verdict"):
        gather_gold(Storage(str(tmp_path / "other")), "gold-r00", [labelled_pool(tmp_path / "other", [None])], GOLD, EMBEDDINGS)


def test_a_judge_that_agrees_with_gold_decides_and_one_that_does_not_falls_back(tmp_path: Path) -> None:
    verdicts: list[str | None] = ["chosen"] * 24 + [None] * 3
    labelled = labelled_pool(tmp_path, verdicts)
    gold = gather_gold(labelled.pool.storage, "gold-r00", [labelled], GOLD, EMBEDDINGS)
    for gold_says, pool_says, reason, flipped in (("chosen", "rejected", "judge", True), ("rejected", "rejected", "source_label", False)):
        name = "d" if gold_says == "chosen" else "e"
        trust, audit = measure_judges(gold, [vote_table(gold.pool, gold_says, name)], TrustConfig())
        assert trust["j"].decides("math") is (gold_says == "chosen")
        assert trust["j"].overall.num_pairs + audit["j"].overall.num_pairs == 24
        verdict = merge_pool_votes(labelled.pool, labelled.attributes, [vote_table(labelled.pool, pool_says)], trust, MergeConfig())
        labels = label_pool(labelled, verdict, gold).read(0).to_pylist()
        assert [row["label_source"] for row in labels] == ["gold"] * 24 + ["silver"] * 3
        assert {row["label_reason"] for row in labels[24:]} == {reason}
        assert {row["flipped"] for row in labels[24:]} == {flipped}


def test_the_sets_hold_what_they_say_and_a_leak_is_refused(tmp_path: Path) -> None:
    labelled = labelled_pool(tmp_path, ["chosen", "rejected", "chosen", None, None])
    gold = gather_gold(labelled.pool.storage, "gold-r00", [labelled], GOLD, EMBEDDINGS)
    trust, _ = measure_judges(gold, [vote_table(gold.pool, "chosen")], TrustConfig())
    verdict = merge_pool_votes(labelled.pool, labelled.attributes, [vote_table(labelled.pool, "chosen")], trust, MergeConfig())
    sets = save_label_sets(labelled.pool.storage, "r00", [label_pool(labelled, verdict, gold)])
    silver, everything = sets["silver"].read(), gold.read()
    assert silver.num_rows == 2
    assert sets["gold-working"].read().num_rows + sets["gold-audit"].read().num_rows == 3
    nobody_agreed = {*silver["pair_id"].to_pylist()}  # no judge may decide: the source label stands in
    for name in ("original", "filtered", "corrected", "filtered-and-corrected"):
        assert not nobody_agreed & {*sets[name].read()["pair_id"].to_pylist()}
    assert sets["filtered-and-corrected"].count() == sets["gold-working"].count()
    check_silver(silver, everything)
    leaked = pa.concat_tables([silver, labelled.pool.read_all(["prompt_group", "pair_id"]).slice(0, 1)], promote_options="default")
    with pytest.raises(CleanGoldError):
        check_silver(leaked, everything)
    with pytest.raises(CleanGoldError):
        check_best_rm_training(sets["gold-working"].read(), everything)


def test_training_reads_every_set_as_it_is_read(tmp_path: Path) -> None:
    labelled = labelled_pool(tmp_path, ["chosen", "rejected"] * 12 + [None] * 3)
    gold = gather_gold(labelled.pool.storage, "gold-r00", [labelled], GOLD, EMBEDDINGS)
    trust, _ = measure_judges(gold, [vote_table(gold.pool, ["chosen", "rejected"])], TrustConfig())
    verdict = merge_pool_votes(labelled.pool, labelled.attributes, [vote_table(labelled.pool, "rejected")], trust, MergeConfig())
    label = label_pool(labelled, verdict, gold)
    pairs = labelled.pool.read_all()
    texts = sorted({*pairs["chosen"].to_pylist(), *pairs["rejected"].to_pylist()})
    known = {"prompt_key": "p", "shortened": False, "spelled": False}
    rows = [{**known, "pair_id": r["pair_id"], **{n: [texts.index(r[n])] for n in ("chosen", "rejected")}} for r in pairs.to_pylist()]
    tokens = seal(Sidecar(labelled.pool, "tokens", "e" * 32), pa.Table.from_pylist(rows, schema=TOKENS_SCHEMA))
    counts = {}
    for name, found in save_label_sets(labelled.pool.storage, "r00", [label]).items():
        for saved in found, load_set(labelled.pool.storage, f"{name}-r00"):
            read = pa.concat_tables([read_member(member, 0) for member in saved.members]).to_pylist()
            trained = pa.concat_tables([read_member_tokens(member, tokens, 0) for member in saved.members]).to_pylist()
            told = [(row["pair_id"], *(texts[row[name][0]] for name in ("chosen", "rejected")), row["flipped"]) for row in trained]
            assert told == [tuple(row[name] for name in ("pair_id", "chosen", "rejected", "flipped")) for row in read]
            counts[name] = (len(read), sum(row["flipped"] for row in read))
    assert counts["original"] == (counts["filtered-and-corrected"][0], 0)
    assert counts["corrected"] == (counts["filtered-and-corrected"][1],) * 2
    assert 3 < counts["corrected"][0] < counts["original"][0]


def test_rows_of_selected_pairs_are_spread_over_the_shard(tmp_path: Path) -> None:
    pairs = make_pairs(4)
    rows = pa.Table.from_pylist([{"pair_id": pairs["pair_id"][n].as_py(), "votes": [], "num_exemplars": n} for n in (1, 3)], schema=VOTES_SCHEMA)
    spread = spread_rows(pairs["pair_id"], pa.array([False, True, False, True]), rows).to_pylist()
    assert [row["num_exemplars"] for row in spread] == [None, 1, None, 3]
    assert [row["drop_reason"] for row in spread] == ["not_selected", None, "not_selected", None]
    assert spread_rows(pairs["pair_id"], pa.array([False] * 4), rows.slice(0, 0))["drop_reason"].to_pylist() == ["not_selected"] * 4


def test_a_judge_is_asked_about_no_pair_that_a_person_has_judged_or_could_not() -> None:
    reasons = ["not_selected", None, "undecidable", "not_selected", "not_selected"]  # None: gold
    shard = pa.table({"pair_id": list("abcde"), "prompt_group": ["g1", "g2", "g3", "g2", "g4"], "human_drop_reason": pa.array(reasons, pa.string())})
    assert pairs_to_judge(shard, pa.array(["g2"])).to_pylist() == [True, False, False, False, True]
    assert pairs_to_judge(shard, pa.array([], pa.string())).to_pylist() == [True, False, False, True, True]
    assert pairs_to_judge(shard.drop_columns(["human_drop_reason"]), pa.array(["g2"])).to_pylist() == [True] * 5  # nobody verifies this pool


def test_pairs_found_to_be_leaks_after_a_round_selected_them_leave_gold_and_silver(tmp_path: Path) -> None:
    labelled = labelled_pool(tmp_path, ["chosen", "rejected", "chosen", None, None])
    storage, ids = labelled.pool.storage, labelled.pool.read_all(["pair_id"])["pair_id"].to_pylist()
    leaked = [ids[1], ids[3]]
    dropped = Dropped.among([labelled], {*leaked})
    assert (dropped.pair_ids, dropped.gold_ids) == (frozenset(leaked), frozenset({ids[1]}))
    assert Dropped.among([labelled], set()) == Dropped()
    gold = gather_gold(storage, "gold-r01", [labelled], GOLD, EMBEDDINGS, dropped)
    assert gold.read()["pair_id"].to_pylist() == [ids[0], ids[2]]
    verdict = merge_pool_votes(labelled.pool, labelled.attributes, [vote_table(labelled.pool, "chosen")], {}, MergeConfig())
    label = label_pool(labelled, verdict, gold, dropped)
    rows = {row["pair_id"]: (row["label_source"], row["label_reason"]) for row in label.read(0).to_pylist()}
    assert {name for name, found in rows.items() if found == ("unverified", "contaminated")} == set(leaked)
    assert {source for name, (source, _) in rows.items() if name not in leaked} == {"gold", "silver"}
    assert label.fingerprint != label_pool(labelled, verdict, gold).fingerprint


def test_judges_are_measured_apart_where_the_best_rm_rejects_the_label(tmp_path: Path) -> None:
    """A judge that is right on what the best RM agrees with, and wrong on the rest: trusted, and shown for what it is in Stage 2."""
    labelled = labelled_pool(tmp_path, ["chosen"] * 40)
    gold = gather_gold(labelled.pool.storage, "gold-r00", [labelled], GOLD, EMBEDDINGS)
    names = gold.read()["pair_id"].to_pylist()
    rejected = set(names[::4])
    says = ["rejected" if name in rejected else "chosen" for name in names]
    margins = [None if place == 1 else -1.0 if name in rejected else 1.0 for place, name in enumerate(names)]
    rows = [{"pair_id": name, "margin": margin} for name, margin in zip(names, margins, strict=True)]
    rewards = seal(Sidecar(gold.pool, "rewards.best", "8" * 32), pa.Table.from_pylist(rows, schema=REWARDS_SCHEMA))
    votes = [vote_table(gold.pool, says)]
    trust, _ = measure_judges(gold, votes, TrustConfig())
    assert trust["j"].decides("math")
    found = measure_on_doubted(gold, votes, rewards, TrustConfig())["j"]
    working = dict(zip(names, gold.read()["gold_split"].to_pylist(), strict=True))
    assert found.overall.num_pairs == sum(working[name] == "working" for name in rejected) > 0
    assert found.overall.num_agreed == 0
    line = describe_doubted("j", found.report())
    assert "agrees on 0 % of" in line
    assert "not above chance" in line
    assert "no verdict" in describe_doubted("j", judge_trust([], TrustConfig()).report())
