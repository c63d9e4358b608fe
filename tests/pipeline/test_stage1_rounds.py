"""Rounds of Stage 1 over stand-in models: what a round records, growth between rounds, kills within one, and the three rules of selection."""

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from synpref_ray.errors import ConfigError, InputError
from synpref_ray.pipeline import stage1
from synpref_ray.pipeline.clean import CleanConfig, remove_garbage
from synpref_ray.pipeline.curated_sets import without_leaks
from synpref_ray.pipeline.gold import open_gold
from synpref_ray.pipeline.growth import check_leak_pins
from synpref_ray.pipeline.job import JobConfig
from synpref_ray.pipeline.stage1 import Stage1Config
from synpref_ray.reporting.pair_story import tell_pair
from synpref_ray.reporting.run import Run
from synpref_ray.rules.leaks import LEAKS, LEAKS_SCHEMA
from synpref_ray.rules.query_selection import SELECTION_SCHEMA
from synpref_ray.rules.stop import stop_reason
from synpref_ray.tables.pools import Pool, commit_pool, content_digest, open_pool, write_pool_shard
from synpref_ray.tables.sets import load_set
from synpref_ray.tables.sidecars import Sidecar, open_sidecar
from synpref_ray.tables.storage import Storage
from tests.builders import make_pairs
from tests.pipeline.stand_ins import Killed, Models, add_shards, run_rounds, stage1_config, write_truth


@pytest.fixture
def models(monkeypatch: pytest.MonkeyPatch) -> Models:
    found = Models()
    found.install(monkeypatch)
    return found


def start(root: Path, name: str = "ws", **changes: Any) -> Stage1Config:
    """Return the config of a workspace with 24 seed and 40 unverified pairs."""
    storage = Storage(str(root / name))
    add_shards(storage, "seed", [12, 12])
    add_shards(storage, "unverified", [16, 16, 8])
    return stage1_config(root / name, write_truth(root / f"{name}.parquet", storage), **changes)


def records(config: Stage1Config) -> list[dict[str, Any]]:
    paths = [path for path in config.storage.list_files("rounds") if path.endswith("/round.json")]
    return [config.storage.read_json(path) for path in paths]


def picks(config: Stage1Config, number: int) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = config.storage.read_table(f"rounds/{number:02d}/selected.parquet").to_pylist()
    return rows


@dataclass(frozen=True)
class Finished:
    """A Stage 1 that ran once, undisturbed: what others are compared with. Tests leave it as it is."""

    config: Stage1Config
    table: str
    num_shards: int


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Finished]:
    with pytest.MonkeyPatch.context() as patch:
        models = Models()
        models.install(patch)
        config = start(tmp_path_factory.mktemp("finished"))
        yield Finished(config, run_rounds(config)[0], models.num_shards)


def test_a_round_says_what_it_read_decided_and_measured(finished: Finished) -> None:
    config, table = finished.config, finished.table
    seed, first, second = records(config)
    assert [entry["decided"]["then"] for entry in (seed, first, second)] == [None, None, "max_rounds"]
    assert config.storage.read_json("rounds/stage1.json")["stop_reason"] == "max_rounds"
    assert first["read"] == seed["wrote"]
    assert first["pools"] == {"seed": 0, "unverified": 0}
    selection = first["selection"]
    assert selection["selected"] == first["selected_pairs"] == len(picks(config, 1)) == selection["called_for"]
    assert sum(int(k) * count for k, count in selection["gold_pairs_by_k"].items()) == selection["called_for"]
    assert sum(first["decided"]["of_new_pairs"].values()) == first["selected_pairs"]
    assert sum(second["decided"]["labels"].values()) == 24 + first["selected_pairs"] + second["selected_pairs"]
    assert first["joined"]["silver"] == first["set_sizes"]["silver"] - seed["set_sizes"]["silver"]
    assert first["best_rm_on_audit_gold"]["low"] <= first["best_rm_on_audit_gold"]["accuracy"] <= first["best_rm_on_audit_gold"]["high"]
    ids = [row["pair_id"] for number in (1, 2) for row in picks(config, number)]
    assert len(ids) == len(set(ids))
    assert table.count("WARNING: gold is too small to judge by") == 1
    assert " to " in table.splitlines()[3]  # round 1
    story = tell_pair(config.storage, ids[0])
    assert story["retrieved"][0]["round"] == 1
    assert {"round 1", "round 2"} <= {user for told in story["tables"] for user in told["used_by"]}


def test_the_sets_of_a_round_are_those_of_the_paper(finished: Finished) -> None:
    config = finished.config
    for number, entry in enumerate(records(config)):
        rows = {name: load_set(config.storage, f"{name}-r{number:02d}").read().to_pylist() for name in entry["set_sizes"]}
        assert {name: len(found) for name, found in rows.items()} == entry["set_sizes"]
        names = {name: {row["pair_id"] for row in found} for name, found in rows.items()}
        assert names["filtered"] | names["corrected"] == names["original"] == names["filtered-and-corrected"] >= names["gold-working"]
        assert len(names["silver"] - names["original"]) == entry["decided"]["labels"].get("silver/source_label", 0)
        assert not names["original"] - names["silver"] - names["gold-working"]
        assert not names["filtered"] & names["corrected"]
        assert not names["original"] & names["gold-audit"]
        assert all(row["flipped"] for row in rows["corrected"])
        assert not any(row["flipped"] for row in rows["original"])
        original = {row["pair_id"]: row["chosen"] for row in rows["original"]}
        assert all(row["rejected"] == original[row["pair_id"]] for row in rows["corrected"])
        assert all(row["chosen"] == original[row["pair_id"]] for row in rows["filtered"])
    assert rows["corrected"]


def test_a_second_run_computes_and_trains_nothing(finished: Finished, models: Models) -> None:
    before = records(finished.config)
    run_rounds(finished.config)
    assert records(finished.config) == before
    assert (models.num_shards, models.trained) == (0, [])


def test_a_second_run_selects_and_counts_nothing_and_reads_no_texts(finished: Finished, models: Models, monkeypatch: pytest.MonkeyPatch) -> None:
    storage, reads = finished.config.storage, list[tuple[str, list[str] | None]]()
    read = Storage.read_table

    def watched(of: Storage, path: str, columns: list[str] | None = None) -> pa.Table:
        reads.append((path, columns))
        return read(of, path, columns)

    def files() -> dict[str, bytes]:
        return {path: storage.read_bytes(path) for folder in ("rounds", "sets") for path in storage.list_files(folder)}

    before = files()
    monkeypatch.setattr(Storage, "read_table", watched)
    assert run_rounds(finished.config)[0] == finished.table
    assert files() == before
    shards = [(path, columns) for path, columns in reads if re.fullmatch(r"pools/[^/]+/shard-\d+\.parquet", path)]
    assert shards
    assert not [path for path, columns in shards if columns is None or {"prompt", "chosen", "rejected"} & {*columns}]
    assert not [path for path, _ in reads if path.startswith("pools/unverified/embeddings/")]  # what selection searches
    assert not [path for path, _ in reads if "/label/" in path]  # what sets and records count
    assert sum(path.endswith("/selected.parquet") for path, _ in reads) == 2
    prompts = Counter(path for path, columns in shards if columns == ["prompt_group"])
    assert max(prompts.values()) == 1  # gold's prompts: once a round, not once for every pool that it labels
    splits = Counter(path for path, columns in reads if path.startswith("pools/seed/human/") and columns == ["gold_split"])
    assert set(splits.values()) == {3}  # where people verify, and gathered before and after its votes; not again in later rounds


def test_other_hardware_selects_nothing_anew(tmp_path: Path, models: Models) -> None:
    config = start(tmp_path, stop={"max_rounds": 1})
    run_rounds(config)
    before = config.storage.read_bytes("rounds/01/selected.parquet")  # with the digest of what it was made from
    run_rounds(config.model_copy(update={"index": config.index.model_copy(update={"use_gpu": True, "num_threads": 7})}))
    assert config.storage.read_bytes("rounds/01/selected.parquet") == before


def test_other_settings_select_anew(tmp_path: Path, models: Models) -> None:
    config = start(tmp_path, stop={"max_rounds": 1})
    run_rounds(config)
    assert len(picks(config, 1)) > 1
    run_rounds(config.model_copy(update={"max_pairs_per_round": 1}))
    assert [records(config)[1]["selected_pairs"], len(picks(config, 1))] == [1, 1]


@pytest.mark.parametrize("share", [pytest.param(0.1, marks=pytest.mark.slow), 0.6, pytest.param(0.95, marks=pytest.mark.slow)])
def test_a_round_that_is_killed_goes_on_within(tmp_path: Path, finished: Finished, models: Models, share: float) -> None:
    config = start(tmp_path)
    models.kill_after = int(share * finished.num_shards)
    with pytest.raises(Killed):
        run_rounds(config)
    models.kill_after = 10**9
    run_rounds(config)
    assert models.num_shards <= finished.num_shards + 1  # the shard in flight, and no other
    assert records(config) == records(finished.config)
    for name in ("silver-r02", "corrected-r02", "gold-working-r02"):
        assert load_set(config.storage, name).read().equals(load_set(finished.config.storage, name).read())


def test_what_joins_between_runs_is_read_by_later_rounds_alone(tmp_path: Path, models: Models, caplog: pytest.LogCaptureFixture) -> None:
    config = start(tmp_path, stop={"max_rounds": 1})
    run_rounds(config)
    before, shards, trained = records(config), models.num_shards, list(models.trained)
    add_shards(config.storage, "unverified", [30])
    add_shards(config.storage, "seed", [4])
    run_rounds(config)  # finished: what has joined since changes nothing
    assert records(config) == before
    assert (models.num_shards, models.trained) == (shards, trained)
    assert "pairs that joined are not read" in caplog.text  # of the seed, by any round
    more = config.model_copy(update={"stop": config.stop.model_copy(update={"max_rounds": 2})})
    run_rounds(more)
    after = records(more)
    assert [entry["pools"]["unverified"] for entry in after] == [0, 0, 1]
    assert after[0] == before[0]
    assert {**after[1], "decided": None} == {**before[1], "decided": None}  # `then` went from stopping to going on
    joined = set(open_pool(config.storage, "unverified").read(3, ["pair_id"])["pair_id"].to_pylist())
    assert joined & {row["pair_id"] for row in picks(more, 2)}
    assert not joined & {row["pair_id"] for row in picks(more, 1)}
    pool = open_pool(config.storage, after[2]["selected_pool"])
    assert set(pool.read_all(["source_shard"])["source_shard"].to_pylist()) >= {3}


def test_clean_keeps_all_that_rounds_over_a_grown_pool_stand_on(tmp_path: Path, models: Models) -> None:
    config = start(tmp_path, stop={"max_rounds": 1}, selection={"kind": "uncertainty", "gold_rm": True})
    run_rounds(config)
    add_shards(config.storage, "unverified", [30])
    more = config.model_copy(update={"stop": config.stop.model_copy(update={"max_rounds": 2})})
    run_rounds(more)
    parts = [Sidecar(open_pool(config.storage, "unverified"), name, fp) for _, name, fp in records(more)[2]["candidates"]]
    assert sorted(table.name for table in parts) == ["attributes", "attributes", "embeddings", "embeddings"]
    for table in parts:  # as if tagged and embedded anew by an experiment with other settings
        decoy = Sidecar(table.pool, table.name, table.fingerprint[::-1])
        config.storage.write_json(f"{decoy.folder}/manifest.json", {**table.manifest, "fingerprint": decoy.fingerprint})
    remove_garbage(CleanConfig(workspace=config.workspace, unfinished=True), Run(config.storage, "clean", JobConfig(workspace=config.workspace)))
    before, shards, trained = records(more), models.num_shards, list(models.trained)
    run_rounds(more)
    assert records(more) == before
    assert (models.num_shards, models.trained) == (shards, trained)


def test_fewer_rounds_leave_nothing_of_the_later_ones(tmp_path: Path, models: Models) -> None:
    config = start(tmp_path)
    run_rounds(config)
    assert config.storage.exists("sets/silver-r02.json")
    run_rounds(config.model_copy(update={"stop": config.stop.model_copy(update={"max_rounds": 1})}))
    assert not config.storage.list_files("rounds/02")
    assert not [path for path in config.storage.list_files("sets") if "-r02" in path]
    add_shards(config.storage, "unverified", [30])
    run_rounds(config)
    assert [entry["pools"]["unverified"] for entry in records(config)] == [0, 0, 1]  # round 2 begins anew, with what has joined


def test_what_joins_while_a_round_is_cut_off_waits_for_the_next(tmp_path: Path, finished: Finished, models: Models) -> None:
    config, models.kill_after = start(tmp_path), finished.num_shards - 4
    with pytest.raises(Killed):
        run_rounds(config)
    assert config.storage.exists("rounds/02/inputs.json")
    models.kill_after = 10**9
    add_shards(config.storage, "unverified", [30])
    run_rounds(config)
    assert records(config) == records(finished.config)


def test_a_pool_that_ran_dry_and_then_grew_goes_on(tmp_path: Path, models: Models) -> None:
    config = start(tmp_path, stop={"max_rounds": 6}, retrieval={"k_max": 64})
    run_rounds(config)
    dry = records(config)
    assert dry[-1]["decided"]["then"] == "no_new_pairs"
    assert sum(entry["selected_pairs"] for entry in dry) == 40
    add_shards(config.storage, "unverified", [5])
    run_rounds(config)
    assert sum(entry["selected_pairs"] for entry in records(config)) == 45


@pytest.mark.parametrize(
    "selection", [{"kind": "random"}, {"kind": "uncertainty"}, {"kind": "uncertainty", "gold_rm": True, "max_clusters": 3}], ids=str
)
def test_every_rule_spends_what_the_errors_call_for(tmp_path: Path, finished: Finished, models: Models, selection: dict[str, Any]) -> None:
    similar, config = finished.config, start(tmp_path, selection=selection)
    run_rounds(config)
    by_errors, by_rule = records(similar)[1], records(config)[1]
    assert by_rule["selection"] == {**by_errors["selection"], "kind": selection["kind"]}
    assert {row["pair_id"] for row in picks(config, 1)} != {row["pair_id"] for row in picks(similar, 1)}
    rows = [row for number in (1, 2) for row in picks(config, number)]
    assert len(rows) == len({row["pair_id"] for row in rows})
    assert config.storage.read_table("rounds/01/selected.parquet").schema.equals(SELECTION_SCHEMA)
    scored = [name for name in config.storage.list_folders("pools/unverified") if name.startswith("rewards")]
    wanted = {"random": set(), "uncertainty": {"rewards.best.r01", "rewards.best.r02"}}[selection["kind"]]
    assert set(scored) == wanted | ({"rewards.gold.r01", "rewards.gold.r02"} if selection.get("gold_rm") else set())
    assert ("gold-r01" in models.trained) == bool(selection.get("gold_rm"))
    if selection["kind"] == "uncertainty":
        assert all(0 <= row["uncertainty"] <= 1 for row in rows)


def test_a_fixed_budget_holds_and_a_plateau_ends_the_rounds(tmp_path: Path, models: Models) -> None:
    stop = {"max_rounds": 6, "plateau_rounds": 1, "min_gain": 1.0}
    config = start(tmp_path, selection={"kind": "random", "num_pairs": 5}, stop=stop)
    run_rounds(config)
    assert [entry["selected_pairs"] for entry in records(config)] == [0, 5, 5]
    assert [entry["decided"]["then"] for entry in records(config)] == [None, None, "plateau"]


def accuracy_on_gold(config: Stage1Config, number: int, gold_of: int) -> float:
    """Return the round's RM's accuracy on the working gold that round `gold_of` left, from the tables that the records name."""
    before, entry = records(config)[number - 1], records(config)[number]
    gold = open_pool(config.storage, before["wrote"]["gold_pool"])
    tables = {name: fingerprint for pool, name, fingerprint in [*before["tables"], *entry["tables"]] if pool == gold.name}
    rewards, human = (open_sidecar(gold, name, tables[name]).read_all().to_pylist() for name in (f"rewards.best.r{number:02d}", "human"))
    names = set(load_set(config.storage, f"gold-working-r{gold_of:02d}").read()["pair_id"].to_pylist())
    right = [(r["margin"] > 0) == (h["human_verdict"] == "chosen") for r, h in zip(rewards, human, strict=True) if r["pair_id"] in names]
    assert len(right) == len(names)
    return sum(right) / len(right)


def test_a_plateau_is_measured_on_the_gold_of_round_0(finished: Finished) -> None:
    config = finished.config
    _, first, second = records(config)
    assert first["first_gold_accuracy"] == first["working_gold_accuracy"] == pytest.approx(accuracy_on_gold(config, 1, 0))
    assert second["first_gold_accuracy"] == pytest.approx(accuracy_on_gold(config, 2, 0))
    assert second["working_gold_accuracy"] == pytest.approx(accuracy_on_gold(config, 2, 1))
    assert second["best_rm_on_first_gold"]["num_pairs"] == first["best_rm_on_working_gold"]["num_pairs"]
    assert second["best_rm_on_working_gold"]["num_pairs"] > second["best_rm_on_first_gold"]["num_pairs"]


def test_the_plateau_rule_is_given_the_accuracies_on_that_gold(tmp_path: Path, models: Models, monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[list[float]] = []

    def noted(accuracies: list[float], **more: Any) -> Any:
        given.append(list(accuracies))
        return stop_reason(accuracies, **more)

    monkeypatch.setattr(stage1, "stop_reason", noted)
    config = start(tmp_path)
    run_rounds(config)
    _, first, second = records(config)
    assert given[-1] == [first["first_gold_accuracy"], second["first_gold_accuracy"]]
    assert second["first_gold_accuracy"] != second["working_gold_accuracy"]  # or the test would show nothing


def decide_leaks(storage: Storage, name: str, decisions: str, row: int) -> set[str]:
    """Drop the same row of every shard of a pool, as a run of jobs/decontaminate.py of that name would; return the pair_ids."""
    pool = open_pool(storage, name)
    leaks = Sidecar(pool, LEAKS, content_digest([pool.digest, decisions]))
    for shard in pool.shards:
        ids = ids_of(pool, shard.number)
        rows = [{"pair_id": i, "leak_decision": "drop" if place == row else None, "num_proposals": 0} for place, i in enumerate(ids)]
        leaks.write(shard.number, pa.Table.from_pylist(rows, schema=LEAKS_SCHEMA))
    sealed = {"pool_digest": pool.digest, "fingerprint": leaks.fingerprint, "rejected": {}, "digests": {"decisions": decisions}}
    storage.write_json(f"{leaks.folder}/manifest.json", sealed)
    return {ids_of(pool, shard.number)[row] for shard in pool.shards}


def all_selected(config: Stage1Config) -> set[str]:
    return {row["pair_id"] for number in range(1, len(records(config))) for row in picks(config, number)}


def test_a_pair_that_was_found_to_leak_stays_out_when_the_pool_has_grown(tmp_path: Path, models: Models) -> None:
    config = start(tmp_path, retrieval={"k_max": 8}, stop={"max_rounds": 6})
    leaked = decide_leaks(config.storage, "unverified", "d" * 32, 0)
    grown = add_shards(config.storage, "unverified", [6])
    run_rounds(config)
    assert all_selected(config) == {i for shard in grown.shards for i in ids_of(grown, shard.number)} - leaked


def test_leaks_decided_twice_are_refused_before_any_model_and_one_name_serves_every_pool(tmp_path: Path, models: Models) -> None:
    config = start(tmp_path, retrieval={"k_max": 64}, stop={"max_rounds": 6})
    both = {
        run: {name: decide_leaks(config.storage, name, run, row) for name in ("seed", "unverified")} for run, row in (("a" * 32, 0), ("b" * 32, 1))
    }
    with pytest.raises(ConfigError, match=r"pool 'seed' has 2 decisions .*(aaaaaaaa, bbbbbbbb|bbbbbbbb, aaaaaaaa).*decontamination=NAME"):
        check_leak_pins(config.storage, config.decontamination, 6)
    with pytest.raises(ConfigError, match="2 decisions"):
        run_rounds(config)
    unknown = config.model_copy(update={"decontamination": "cafe"})
    with pytest.raises(InputError, match="decontamination=cafe: pool 'seed' version 0 has no decisions of that name"):
        run_rounds(unknown)
    assert models.num_shards == 0
    named = config.model_copy(update={"decontamination": "b" * 8})
    check_leak_pins(named.storage, named.decontamination, 6)
    run_rounds(named)
    unverified = open_pool(config.storage, "unverified")
    assert all_selected(named) == {i for shard in unverified.shards for i in ids_of(unverified, shard.number)} - both["b" * 32]["unverified"]
    gold = open_pool(config.storage, config.storage.read_json("rounds/stage1.json")["gold"]["pool"])
    assert not both["b" * 32]["seed"] & set(gold.read_all(["pair_id"])["pair_id"].to_pylist())


def test_a_name_must_cover_both_pools(tmp_path: Path, models: Models) -> None:
    config = start(tmp_path, decontamination="aaaa")
    decide_leaks(config.storage, "seed", "a" * 32, 0)
    with pytest.raises(InputError, match="pool 'unverified' version 0 has no decisions of that name"):
        run_rounds(config)
    assert models.num_shards == 0


def test_a_round_keeps_the_leaks_that_it_began_with(tmp_path: Path, models: Models, caplog: pytest.LogCaptureFixture) -> None:
    config = start(tmp_path, stop={"max_rounds": 1})
    decide_leaks(config.storage, "unverified", "a" * 32, 0)
    run_rounds(config)
    before, shards = records(config), models.num_shards
    pinned = before[0]["decontamination"]
    assert (pinned["seed"], list(pinned["unverified"])) == (None, ["0"])
    assert before[1]["decontamination"] == pinned
    for name in ("seed", "unverified"):
        decide_leaks(config.storage, name, "b" * 32, 1)  # of version 0 too: `auto` alone could not tell which
    run_rounds(config)
    assert records(config) == before
    assert models.num_shards == shards
    assert "not those which round 0 began with" in caplog.text
    add_shards(config.storage, "unverified", [30])
    joined = decide_leaks(config.storage, "unverified", "c" * 32, 1)
    more = config.model_copy(update={"stop": config.stop.model_copy(update={"max_rounds": 3})})
    with pytest.raises(InputError, match="decontamination=cafe: pool 'unverified' version 1 has no decisions of that name"):
        check_leak_pins(more.storage, "cafe", 3)
    check_leak_pins(more.storage, more.decontamination, 3)
    run_rounds(more)
    after = records(more)
    assert after[1]["decontamination"] == pinned
    assert after[2]["decontamination"] == after[3]["decontamination"]
    assert {**after[2]["decontamination"]["unverified"], **pinned["unverified"]} == after[2]["decontamination"]["unverified"]
    assert list(after[2]["decontamination"]["unverified"]) == ["0", "1"]
    assert not joined & {row["pair_id"] for number in (2, 3) for row in picks(more, number)}


def with_rounds(config: Stage1Config, number: int) -> Stage1Config:
    return config.model_copy(update={"stop": config.stop.model_copy(update={"max_rounds": number})})


def held_by(config: Stage1Config, name: str) -> set[str]:
    return {*load_set(config.storage, name).read()["pair_id"].to_pylist()}


def leak_row(config: Stage1Config) -> int:
    """Return a row of every shard of the unverified pool among which a round selected one that became gold, and one that became silver."""
    pool, gold, silver = open_pool(config.storage, "unverified"), held_by(config, "gold-working-r01"), held_by(config, "silver-r01")
    shards = [ids_of(pool, shard.number) for shard in pool.shards]
    return next(row for row in range(8) if all({ids[row] for ids in shards} & some for some in (gold, silver)))


@pytest.mark.parametrize("k_max", [pytest.param(4, id="selects"), pytest.param(64, id="runs dry")])
def test_what_is_found_to_leak_after_a_round_is_gone_before_the_next_trains(tmp_path: Path, models: Models, k_max: int) -> None:
    config = start(tmp_path, retrieval={"k_max": k_max}, stop={"max_rounds": 1})
    run_rounds(config)
    first = records(config)
    leaked = decide_leaks(config.storage, "unverified", "d" * 32, leak_row(config))
    more = with_rounds(config, 2)
    models.kill_after = models.num_shards + 1
    with pytest.raises(Killed):
        run_rounds(more)
    models.kill_after = 10**9
    run_rounds(more)
    after = records(more)
    assert [entry["wrote"] for entry in after[:2]] == [entry["wrote"] for entry in first]
    assert bool(after[2]["selected_pairs"]) == (k_max == 4)
    names = ("silver", "gold-working", "gold-audit", "original", "filtered", "corrected")
    for suffix in ("r02-without-leaks", "r02"):
        assert not leaked & set().union(*(held_by(more, f"{name}-{suffix}") for name in names))
        for name in ("silver", "gold-working"):
            assert held_by(more, f"{name}-r01") & leaked
    assert after[2]["read"]["silver"] == load_set(more.storage, "silver-r02-without-leaks").digest != after[1]["wrote"]["silver"]
    assert after[2]["training"]["silver_pairs"] == len(held_by(more, "silver-r02-without-leaks"))
    assert not leaked & {row["gold_pair_id"] for row in picks(more, 2)}
    gold = open_pool(more.storage, more.storage.read_json("rounds/stage1.json")["gold"]["pool"])
    assert after[2]["set_sizes"]["gold-working"] + after[2]["set_sizes"]["gold-audit"] == gold.num_rows
    assert not leaked & set(gold.read_all(["pair_id"])["pair_id"].to_pylist())
    remove_garbage(CleanConfig(workspace=config.workspace, unfinished=True), Run(config.storage, "clean", JobConfig(workspace=config.workspace)))
    shards, trained = models.num_shards, list(models.trained)
    run_rounds(more)
    assert (records(more), models.num_shards, models.trained) == (after, shards, trained)
    run_rounds(config)
    assert [entry["wrote"] for entry in records(config)] == [entry["wrote"] for entry in first]
    assert not [path for path in config.storage.list_files("sets") if "-r02" in path]


def test_prompts_that_gold_left_stay_gold_s_and_pairs_come_back_where_decisions_are_off(tmp_path: Path, models: Models) -> None:
    config = start(tmp_path, retrieval={"k_max": 64}, stop={"max_rounds": 1})
    run_rounds(config)
    leaked = decide_leaks(config.storage, "unverified", "d" * 32, leak_row(config))
    left = leaked & (held_by(config, "gold-working-r01") | held_by(config, "gold-audit-r01"))
    pool = open_pool(config.storage, "unverified")
    rows = [row for row in pool.read_all().to_pylist() if row["pair_id"] in left]
    mates = [{**row, "pair_id": row["pair_id"][::-1]} for row in rows]  # other pairs of the same prompts
    shard = write_pool_shard(config.storage, "unverified", 3, pa.Table.from_pylist(mates, schema=make_pairs(1).schema))
    other = write_pool_shard(config.storage, "unverified", 4, make_pairs(4, "others"))
    commit_pool(config.storage, "unverified", "f" * 32, [*pool.shards, shard, other], {})
    run_rounds(with_rounds(config, 2))
    assert {row["pair_id"] for row in picks(config, 2)} == set(ids_of(open_pool(config.storage, "unverified"), 4))
    gold = open_gold(config.storage, config.storage.read_json("rounds/stage1.json")["gold"])
    assert gold.prompt_groups() >= {row["prompt_group"] for row in rows}
    assert gold.digest != gold.pool.digest
    off = with_rounds(config, 3).model_copy(update={"decontamination": "off"})
    run_rounds(off)
    assert left <= held_by(off, "gold-working-r03") | held_by(off, "gold-audit-r03")
    assert leaked & held_by(off, "silver-r03")
    assert open_gold(config.storage, config.storage.read_json("rounds/stage1.json")["gold"]).left_groups == frozenset()
    after = records(off)
    run_rounds(off)
    assert records(off) == after


def test_silver_that_is_found_to_leak_after_the_last_round_is_in_no_curated_set(tmp_path: Path, models: Models) -> None:
    config = start(tmp_path, retrieval={"k_max": 4}, stop={"max_rounds": 1})
    run_rounds(config)
    silver = load_set(config.storage, "silver-r01")
    assert without_leaks(silver, "auto") == silver
    leaked = decide_leaks(config.storage, "unverified", "d" * 32, leak_row(config))
    left = without_leaks(silver, "auto")
    assert {*left.read()["pair_id"].to_pylist()} == held_by(config, "silver-r01") - leaked < held_by(config, "silver-r01")
    assert without_leaks(silver, "off") == silver
    assert without_leaks(silver, "dddd").digest == left.digest  # a run need not have judged the seed
    decide_leaks(config.storage, "seed", "d" * 32, 0)
    assert without_leaks(silver, "dddd").digest != left.digest
    with pytest.raises(InputError, match="decontamination=cafe: pool 'seed' version 0 has no decisions of that name"):
        without_leaks(silver, "cafe")
    decide_leaks(config.storage, "unverified", "e" * 32, 7)
    with pytest.raises(ConfigError, match="pool 'unverified' has 2 decisions"):
        without_leaks(silver, "auto")
    run_rounds(with_rounds(config, 2).model_copy(update={"decontamination": "dddd"}))  # a round that goes by one of them
    assert without_leaks(silver, "auto").digest == without_leaks(silver, "dddd").digest


def ids_of(pool: Pool, number: int) -> list[str]:
    ids: list[str] = pool.read(number, ["pair_id"])["pair_id"].to_pylist()
    return ids
