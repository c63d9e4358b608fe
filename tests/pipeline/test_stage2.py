"""Stage 2 over stand-in models: which pairs its judges are asked about when settings change, and that each is asked about a pair once."""

import shutil
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pytest

from synpref_ray.pipeline import stage2
from synpref_ray.pipeline.clean import CleanConfig, remove_garbage
from synpref_ray.pipeline.job import JobConfig
from synpref_ray.pipeline.llm_steps import num_unanswered
from synpref_ray.pipeline.stage2 import STAGE2_RECORD, Stage2Config, run_stage2
from synpref_ray.pipeline.steps import Output, StepInput, StepResult, plan_sidecars
from synpref_ray.reporting.run import Run
from synpref_ray.rules.leaks import LEAKS, LEAKS_SCHEMA
from synpref_ray.schema import DropReason, stable_uniform
from synpref_ray.tables.pools import Pool, commit_pool, open_pool, write_pool_shard
from synpref_ray.tables.sets import load_set
from synpref_ray.tables.sidecars import Sidecar, open_sidecar
from synpref_ray.tables.storage import Storage
from tests.builders import make_pairs
from tests.pipeline.stand_ins import DIMENSION, Answer, Killed, Models, add_shards, run_rounds, stage1_config, write_truth

ENGINE = {"engine": {"model": "stand-in"}}
TAGS = "attributes"
SHARD_PAIRS = 12


@dataclass
class Stage2Models(Models):
    """The stand-ins of Stage 2; `asked` counts what each was asked, by its table and the pair. Planning asks nothing."""

    asked: Counter[tuple[str, str]] = field(default_factory=Counter)
    is_planning: bool = False

    def install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Put them in the place of Stage 2's models."""
        for name in ("tag_pools", "embed_pools", "judge_pools", "score_pools", "plan_tags", "plan_embeddings", "plan_votes"):
            monkeypatch.setattr(stage2, name, getattr(self, name))

    def _run(self, name: str, answer: Answer, outputs: Sequence[Output], inputs: Sequence[StepInput], digests: Mapping[str, str]) -> StepResult:
        def counted(row: dict[str, Any]) -> dict[str, Any]:
            self.asked[outputs[0].name, row["pair_id"]] += 1
            return answer(row)

        if self.is_planning:
            return StepResult(plan_sidecars(self._step(name, answer, outputs, digests), inputs), 0, 0, 0, {}, {}, 0.0)
        return super()._run(name, counted, outputs, inputs, digests)

    def _plan(self, made: Any, *arguments: Any) -> Any:
        self.is_planning = True
        try:
            return made(None, "", *arguments)
        finally:
            self.is_planning = False

    def plan_tags(self, pools: Sequence[Pool], taggers: Any) -> Any:
        return self._plan(self.tag_pools, pools, taggers)

    def plan_embeddings(self, pool: Pool, attributes: Sidecar, config: Any) -> Sidecar:
        found: Sidecar = self._plan(self.embed_pools, [(pool, attributes)], config)[0]
        return found

    def plan_votes(self, judged: Any, gold: Any, config: Any) -> Sidecar:
        found: Sidecar = self._plan(self.judge_pools, [judged], gold, config)[0]
        return found

    def pairs(self, table: str, of: set[str]) -> Counter[str]:
        """Return how often a model was asked about each of some pairs, where it was."""
        return Counter({pair: count for (name, pair), count in self.asked.items() if name == table and pair in of})


@pytest.fixture(scope="module")
def after_stage1(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A workspace in which Stage 1 has finished, with a wild pool of 84 pairs, 12 of which share their prompts with the seed."""
    root = tmp_path_factory.mktemp("stage1")
    storage = Storage(str(root / "ws"))
    add_shards(storage, "seed", [12, 12])
    add_shards(storage, "unverified", [16, 16])
    shards = [write_pool_shard(storage, "wild", number, make_pairs(36, f"wild {number}")) for number in range(2)]
    seed = make_pairs(12, "seed 0").to_pylist()
    other = [{**row, "pair_id": row["pair_id"][::-1]} for row in seed]  # other pairs of the same prompts
    shards.append(write_pool_shard(storage, "wild", 2, pa.Table.from_pylist(other, schema=make_pairs(1).schema)))
    commit_pool(storage, "wild", "f" * 32, shards, {})
    with pytest.MonkeyPatch.context() as patch:
        Models().install(patch)
        run_rounds(stage1_config(root / "ws", write_truth(root / "truth.parquet", storage), stop={"max_rounds": 1}))
    return root / "ws"


@pytest.fixture
def models(monkeypatch: pytest.MonkeyPatch) -> Stage2Models:
    found = Stage2Models()
    found.install(monkeypatch)
    return found


def copied(workspace: Path, to: Path) -> Path:
    return Path(shutil.copytree(workspace, to))


def curate(workspace: Path, band: float = 0.0, judges: Sequence[str] = ("j",), **more: Any) -> dict[str, Any]:
    """Run Stage 2 and return its record."""
    judged = [{**ENGINE, "judge": {"judge": name, "max_exemplars": 2}} for name in judges]
    values = {"taggers": [ENGINE], "judges": judged, "embed": {"dimension": DIMENSION}, "gate": {"band": band}, "gathered_shard_pairs": SHARD_PAIRS}
    config = Stage2Config.model_validate({"workspace": str(workspace), **values, **more})
    run_stage2(config, Run(config.storage, "stage2", JobConfig(workspace=str(workspace))))
    record: dict[str, Any] = config.storage.read_json(STAGE2_RECORD)
    return record


def wild(workspace: Path) -> Pool:
    return open_pool(Storage(str(workspace)), "wild")


def ids(workspace: Path) -> set[str]:
    return {*wild(workspace).read_all(["pair_id"])["pair_id"].to_pylist()}


def decisions(workspace: Path, record: Mapping[str, Any]) -> pa.Table:
    return open_sidecar(wild(workspace), "decision", record["decision"]).read_all()


def mismatches(workspace: Path) -> dict[str, set[str]]:
    storage = Storage(str(workspace))
    names = [name for name in storage.list_folders("pools") if name.startswith("wild-mismatches-")]
    return {name: {*open_pool(storage, name).read_all(["pair_id"])["pair_id"].to_pylist()} for name in names}


def test_nobody_is_asked_about_pairs_of_gold_prompts(after_stage1: Path, tmp_path: Path, models: Stage2Models) -> None:
    workspace = copied(after_stage1, tmp_path / "ws")
    record = curate(workspace)
    storage = Storage(str(workspace))
    gold = {*open_pool(storage, storage.read_json("rounds/stage1.json")["gold"]["pool"]).read_all(["prompt_group"])["prompt_group"].to_pylist()}
    table = wild(workspace).read_all(["pair_id", "prompt_group"])
    near = {pair for pair, group in zip(*(table[name].to_pylist() for name in table.column_names), strict=True) if group in gold}
    assert near
    assert record["reasons"]["drop/gold_prompt"] == len(near)
    for name in (TAGS, "embeddings", "votes.j"):
        assert len(models.pairs(name, ids(workspace))) == record["judged_pairs"]
        assert not models.pairs(name, near)
    asked = Counter(models.asked)
    assert curate(workspace) == record
    assert models.asked == asked


def test_a_judge_that_joins_asks_no_other_judge_anew(after_stage1: Path, tmp_path: Path, models: Stage2Models) -> None:
    workspace = copied(after_stage1, tmp_path / "ws")
    curate(workspace)
    curate(workspace, band=0.1)
    pools = mismatches(workspace)
    assert len(pools) == 2  # those of the threshold, and the rest of the band
    record = curate(workspace, band=0.1, judges=("j", "k"))
    assert mismatches(workspace) == pools
    every = set.union(*pools.values())
    for name in (TAGS, "votes.j", "votes.k"):
        assert models.pairs(name, ids(workspace)) == Counter(dict.fromkeys(every, 1))
    asked = Counter(models.asked)
    assert curate(workspace, band=0.1, judges=("j", "k")) == record
    assert models.asked == asked
    at_once = copied(after_stage1, tmp_path / "at-once")
    assert decisions(at_once, curate(at_once, band=0.1, judges=("j", "k"))).equals(decisions(workspace, record))


def test_a_judge_that_joins_as_the_band_narrows_is_asked_about_the_whole_pool(after_stage1: Path, tmp_path: Path, models: Stage2Models) -> None:
    workspace = copied(after_stage1, tmp_path / "ws")
    curate(workspace, band=0.1)
    pools = mismatches(workspace)
    record = curate(workspace, judges=("j", "k"))
    assert mismatches(workspace) == pools
    assert record["judged_pairs"] < sum(map(len, pools.values()))
    for name in ("votes.j", "votes.k"):
        assert models.pairs(name, ids(workspace)) == Counter(dict.fromkeys(set.union(*pools.values()), 1))


def test_what_a_run_that_was_cut_off_asked_serves_a_wider_band(after_stage1: Path, tmp_path: Path, models: Stage2Models) -> None:
    workspace, quiet = copied(after_stage1, tmp_path / "ws"), copied(after_stage1, tmp_path / "quiet")
    curate(quiet)
    [(_, first)] = mismatches(quiet).items()
    shards = -(-len(first) // SHARD_PAIRS)
    models.asked.clear()
    models.num_shards, models.kill_after = 0, 3 + 2 * shards + shards // 2  # scored, tagged, embedded, half of them judged
    with pytest.raises(Killed):
        curate(workspace)
    models.kill_after = 10**9
    curate(workspace, band=0.1)
    assert len(mismatches(workspace)) == 2
    for name in (TAGS, "votes.j"):
        assert models.pairs(name, ids(workspace)) == Counter(dict.fromkeys(set.union(*mismatches(workspace).values()), 1))


def test_answers_that_are_all_there_and_not_sealed_serve_a_narrower_band(after_stage1: Path, tmp_path: Path, models: Stage2Models) -> None:
    """A step that is killed at one pool leaves those before it whole, without their seals."""
    workspace = copied(after_stage1, tmp_path / "ws")
    curate(workspace, band=0.1)
    [(name, pairs)] = mismatches(workspace).items()
    for manifest in (workspace / "pools" / name).glob("votes.*/*/manifest.json"):
        manifest.unlink()
    curate(workspace)
    assert mismatches(workspace) == {name: pairs}
    assert models.pairs("votes.j", ids(workspace)) == Counter(dict.fromkeys(pairs, 1))


def test_a_table_without_a_seal_lacks_what_is_missing_or_all_that_it_failed_at(tmp_path: Path) -> None:
    storage = Storage(str(tmp_path))
    table = Sidecar(add_shards(storage, "wild", [4, 6]), "votes.j", "1" * 32)
    names = ["pair_id", "drop_reason"]

    def write(number: int, num_rejected: int) -> None:
        pairs = table.pool.read(number, ["pair_id"])["pair_id"]
        reasons = [DropReason.UNPARSABLE_REPLY.value if row < num_rejected else None for row in range(len(pairs))]
        table.write(number, pa.table([pairs, pa.array(reasons, pa.string())], names))

    assert num_unanswered(table, 0.5) == 10
    write(0, 4)
    assert num_unanswered(table, 0.5) == 6
    write(1, 2)
    assert (num_unanswered(table, 0.5), num_unanswered(table, 0.6)) == (10, 0)
    storage.write_json(f"{table.folder}/manifest.json", {})
    assert num_unanswered(table, 0.5) == 0


def test_silver_that_leaks_is_in_no_curated_set(after_stage1: Path, tmp_path: Path, models: Stage2Models) -> None:
    workspace = copied(after_stage1, tmp_path / "ws")
    storage = Storage(str(workspace))
    silver = load_set(storage, **storage.read_json("rounds/stage1.json")["sets"]["silver"])
    labels = {member.sidecar.fingerprint for member in silver.members}
    curate(workspace)
    assert {member["fingerprint"] for member in storage.read_json("sets/curated-wild-silver-kept.json")["members"]} > labels
    pool, leaked = open_pool(storage, "unverified"), set(silver.read()["pair_id"].to_pylist())
    leaks = Sidecar(pool, LEAKS, "7" * 32)
    for shard in pool.shards:
        names = pool.read(shard.number, ["pair_id"])["pair_id"].to_pylist()
        rows = [{"pair_id": name, "leak_decision": "drop" if name in leaked else None, "num_proposals": 0} for name in names]
        leaks.write(shard.number, pa.Table.from_pylist(rows, schema=LEAKS_SCHEMA))
    storage.write_json(f"{leaks.folder}/manifest.json", {"pool_digest": pool.digest, "fingerprint": leaks.fingerprint, "rejected": {}})
    record = curate(workspace)
    members = load_set(storage, "curated-wild-silver-kept").members
    [late] = [member.sidecar for member in members if member.sidecar.pool.name.startswith("round-01")]
    assert late.fingerprint not in labels
    assert set(late.read_all(["label_reason"])["label_reason"].to_pylist()) >= {"contaminated"}
    assert not {*late.read_all().filter(pc.equal(late.read_all()["label_source"], "silver"))["pair_id"].to_pylist()} & leaked
    remove_garbage(CleanConfig(workspace=str(workspace), unfinished=True), Run(storage, "clean", JobConfig(workspace=str(workspace))))
    assert curate(workspace) == record
    assert load_set(storage, "curated-wild-silver-kept").members == members


def test_pairs_that_judges_may_decide_and_did_not_answer_are_counted(
    after_stage1: Path, tmp_path: Path, models: Stage2Models, monkeypatch: pytest.MonkeyPatch
) -> None:
    workspace = copied(after_stage1, tmp_path / "ws")
    assert curate(workspace)["unanswered_pairs"] == 0  # nobody may decide: no answer is missing
    real = stage2.merge_pool_votes

    def reason_of(pair_id: str) -> str:
        return ("no_votes", "no_deciding_vote", "no_judge_decides")[int(3 * stable_uniform(0, pair_id, "reason"))]

    def some_without(pool: Pool, attributes: Sidecar, votes: Sequence[Sidecar], trust: Any, config: Any) -> Sidecar:
        merged = real(pool, attributes, votes, trust, config)
        found = Sidecar(pool, "verdict", "9" * 32)
        for shard in pool.shards:
            rows = merged.read(shard.number)
            reasons = [reason_of(name) for name in rows["pair_id"].to_pylist()]
            found.write(shard.number, rows.set_column(rows.column_names.index("verdict_reason"), "verdict_reason", pa.array(reasons, pa.string())))
        storage = pool.storage
        storage.write_json(f"{found.folder}/manifest.json", {**merged.manifest, "fingerprint": found.fingerprint})
        return found

    monkeypatch.setattr(stage2, "merge_pool_votes", some_without)
    alone = copied(after_stage1, tmp_path / "alone")
    record = curate(alone)
    [asked] = mismatches(alone).values()
    assert record["unanswered_pairs"] == sum(reason_of(name) != "no_judge_decides" for name in asked) > 0
    curate(workspace, band=0.1)
    assert curate(workspace)["unanswered_pairs"] == record["unanswered_pairs"]  # of a pool that holds more than it is asked about now


def test_a_grown_pool_is_scored_whole_and_judged_where_it_is_new(after_stage1: Path, tmp_path: Path, models: Stage2Models) -> None:
    workspace = copied(after_stage1, tmp_path / "ws")
    curate(workspace)
    old, before = ids(workspace), mismatches(workspace)
    add_shards(Storage(str(workspace)), "wild", [24])
    curate(workspace)
    pools, every = mismatches(workspace), ids(workspace)
    assert before.items() < pools.items()
    for name in (TAGS, "votes.j"):
        assert models.pairs(name, every) == Counter(dict.fromkeys(set.union(*pools.values()), 1))
    assert models.pairs("rewards.best", every) == Counter({pair: 2 if pair in old else 1 for pair in every})
