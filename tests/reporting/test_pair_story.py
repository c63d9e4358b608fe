"""One pair's story, over a small workspace whose tables were made by the real rules: Stage 1's labels and sets, Stage 2's decision."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from jobs import report
from synpref_ray.pipeline.gathering import gather_pool, scatter_sidecars
from synpref_ray.pipeline.gold import gather_gold, label_pool, measure_judges, merge_pool_votes, save_label_sets
from synpref_ray.reporting.pair_story import tell_pair, why_decided
from synpref_ray.rules.gate import DECISION_SCHEMA, TRUTH_TABLE, GateConfig, decide_shard
from synpref_ray.rules.judges import TrustConfig
from synpref_ray.rules.query_selection import SELECTION_SCHEMA
from synpref_ray.rules.verdicts import VERDICT_SCHEMA, MergeConfig
from synpref_ray.schema import REWARDS_SCHEMA
from synpref_ray.tables.pools import Pool, commit_pool, write_pool_shard
from synpref_ray.tables.selection import Piece
from synpref_ray.tables.sidecars import Sidecar, fingerprint
from synpref_ray.tables.storage import Storage
from tests.builders import make_pairs
from tests.pipeline.test_gold import EMBEDDINGS, GOLD, labelled_pool, seal, vote_table


def rewards(pool: Pool, name: str, margins: list[float]) -> Sidecar:
    ids = pool.read_all(["pair_id"])["pair_id"].to_pylist()
    rows = [{"pair_id": i, "reward_chosen": m, "reward_rejected": 0.0, "margin": m, "p_chosen": 0.5} for i, m in zip(ids, margins, strict=True)]
    return seal(Sidecar(pool, name, fingerprint(name, 1, {}, {})), pa.Table.from_pylist(rows, schema=REWARDS_SCHEMA))


def seal_made_from(sidecar: Sidecar, table: pa.Table, made_from: list[Sidecar], **manifest: Any) -> Sidecar:
    """Write a one-shard sidecar whose manifest says what it was made from, as `run_step` does."""
    seal(sidecar, table)
    path = f"{sidecar.folder}/manifest.json"
    record = sidecar.pool.storage.read_json(path)
    sidecar.pool.storage.write_json(path, {**record, "sidecars": {other.name: other.fingerprint for other in made_from}, **manifest})
    return sidecar


@pytest.fixture
def workspace(tmp_path: Path) -> Storage:
    """Return a workspace with a seed of five pairs (three gold, one of them turned round), a round that selected, and four wild pairs decided."""
    labelled = labelled_pool(tmp_path, ["chosen", "rejected", "chosen", None, None])
    storage = labelled.pool.storage
    gold = gather_gold(storage, "gold-r01", [labelled], GOLD, EMBEDDINGS)
    votes = vote_table(labelled.pool, "chosen")
    gold_votes = vote_table(gold.pool, "chosen")
    trust, _ = measure_judges(gold, [gold_votes], TrustConfig())
    label = label_pool(labelled, merge_pool_votes(labelled.pool, labelled.attributes, [votes], trust, MergeConfig()), gold)
    vote_table(labelled.pool, "rejected", "9")  # of other settings: nothing rests on it
    save_label_sets(storage, "r01", [label])
    ids = labelled.pool.read_all(["pair_id"])["pair_id"].to_pylist()
    storage.write_json("rounds/01/round.json", {"round": 1, "tables": [[gold.pool.name, gold_votes.name, gold_votes.fingerprint]]})
    called = {"pair_id": ids[3], "selected_by": "similarity", "rank": 0, "gold_pair_id": ids[0], "gold_confidence": 0.25, "k": 8, "place": 2}
    storage.write_table("rounds/01/selected.parquet", pa.Table.from_pylist([{**called, "similarity": 0.5}], schema=SELECTION_SCHEMA))
    wild = commit_pool(storage, "wild", "e" * 32, [write_pool_shard(storage, "wild", 0, make_pairs(4, "wild"))], {})
    best, gold_rm = rewards(wild, "rewards.best", [-1.0, 1.0, -2.0, 3.0]), rewards(wild, "rewards.gold", [2.0, 1.0, -1.5, -4.0])
    mismatches = gather_pool(storage, "wild-mismatches", [Piece(wild, 0, (0, 2))], inputs={})
    said = [{"pair_id": i, "judge_verdict": "chosen", "verdict_reason": "agreed", "num_votes": 2} for i in mismatches.read(0)["pair_id"].to_pylist()]
    verdict = seal_made_from(Sidecar(mismatches, "verdict", "7" * 32), pa.Table.from_pylist(said, schema=VERDICT_SCHEMA), [])
    spread = scatter_sidecars(wild, [(mismatches, verdict)], "judge_verdict", VERDICT_SCHEMA)
    shard = pa.table(
        {
            "pair_id": wild.read(0)["pair_id"],
            "margin_best": best.read(0)["margin"],
            "margin_gold": gold_rm.read(0)["margin"],
            "judge_verdict": spread.read(0)["judge_verdict"],
        }
    )
    settings = GateConfig().model_dump(mode="json")
    decision = Sidecar(wild, "decision", "5" * 32)
    seal_made_from(decision, decide_shard(shard, GateConfig()), [best, gold_rm, spread], step="decide", version=2, settings=settings)
    storage.write_json("rounds/stage2.json", {"pool": "wild", "decision": decision.fingerprint})
    return storage


def ids_of(storage: Storage, pool: str) -> list[str]:
    return storage.read_table(f"pools/{pool}/shard-00000.parquet", ["pair_id"])["pair_id"].to_pylist()


def explain(storage: Storage, pair: str, capsys: pytest.CaptureFixture[str], *more: str) -> str:
    assert report.main(["explain", f"workspace={storage.url}", f"pair={pair}", *more]) == 0
    return capsys.readouterr().out


def test_a_wild_pair_is_told_from_source_to_decision(workspace: Storage, capsys: pytest.CaptureFixture[str]) -> None:
    pair = ids_of(workspace, "wild")[2]
    text = " ".join(explain(workspace, pair[:10], capsys).split())
    assert f"pair {pair}" in text
    assert "gathered from wild shard 0 row 2" in text
    assert "in use by stage 2: chosen, agreed" in text
    assert "drop, because judge_defends_label" in text
    assert "best RM -2.0000 (disagrees with the label), gold RM -1.5000 (disagrees with the label); judge's verdict: chosen" in text
    assert "vetoes it" in text
    assert "rule: step decide, version 2, band 0.0, min_flip_confidence 0.5; table 55555555" in text
    story = json.loads(explain(workspace, pair, capsys, "format=json"))
    assert story["decision"]["decision"] == "drop"
    assert [place["pool"] for place in story["places"]] == ["wild", story["places"][1]["pool"]]
    used = {(told["pool"].split("-")[0], told["table"]): told["used_by"] for told in story["tables"]}
    assert used[("wild", "rewards.gold")] == used[("wild", "verdict")] == ["stage 2"]


def test_a_pair_of_a_round_is_told_with_who_called_for_it_and_what_rests_on_which_table(
    workspace: Storage, capsys: pytest.CaptureFixture[str]
) -> None:
    seed = ids_of(workspace, "seed")
    text = " ".join(explain(workspace, seed[3], capsys).split())
    assert f"round 1: called for by gold pair {seed[0]} (p 0.2500 in the human label, so k = 8), its neighbour 3 of them, similarity 0.5000" in text
    assert "order 0 (chosen shown first), sample 0: chosen, logprob -0.100" in text
    assert "rule merge votes 2, weights equal; 2 votes" in text
    assert "1 tables of other settings or earlier runs are not shown" in text
    assert "silver-r01 (label as ingested)" in text
    assert "filtered-r01" not in text  # no judge may decide here, so nobody has agreed with its label
    assert f"round 1: p 0.2500 in its label, k = 8, got 1: {seed[3]}" in " ".join(explain(workspace, seed[0], capsys).split())


def test_a_corrected_gold_pair_lies_in_the_sets_that_the_paper_defines(workspace: Storage) -> None:
    story = tell_pair(workspace, ids_of(workspace, "seed")[1])
    turned = {entry["set"]: entry["flipped"] for entry in story["sets"]}
    human = next(told for told in story["tables"] if told["table"] == "human" and told["pool"] == "seed")
    if human["values"]["gold_split"] == "audit":
        assert turned == {"gold-audit-r01": True}
    else:
        assert turned == {"gold-working-r01": True, "corrected-r01": True, "original-r01": False, "filtered-and-corrected-r01": True}


@pytest.mark.parametrize(
    ("pair", "said"),
    [
        ("pair=" + "0" * 31 + "a", "holds a pair"),
        ("pair=12345678", "holds a pair"),
        ("pair=xyz", "is no pair_id"),
        ("pair=abc", "is no pair_id"),
        ("format=text", "name the pair"),
    ],
)
def test_what_is_no_pair_is_one_line(workspace: Storage, capsys: pytest.CaptureFixture[str], pair: str, said: str) -> None:
    assert report.main(["explain", f"workspace={workspace.url}", pair]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1


def test_every_cell_of_the_gate_has_its_sentence() -> None:
    for cell in TRUTH_TABLE:
        values: dict[str, Any] = dict.fromkeys(DECISION_SCHEMA.names)
        values |= {"best_agrees": cell.best, "gold_agrees": cell.gold, "judge_verdict": cell.judge, "decision": cell.decision}
        assert why_decided({**values, "decision_reason": cell.reason}) == cell.why
    assert "min_flip_confidence" in why_decided({**dict.fromkeys(DECISION_SCHEMA.names), "decision": "drop", "decision_reason": "flip_unsure"})
