"""What may go and what must stay, on workspaces made by hand and by the steps themselves; nothing is removed that a record or a lease refers to."""

import json
import os
import time
from dataclasses import replace
from pathlib import Path

import pytest

from jobs import clean
from synpref_ray.pipeline.gathering import gather_pool, gather_sidecars
from synpref_ray.pipeline.steps import Resources, StepInput, run_step
from synpref_ray.rules.leaks import LEAKS
from synpref_ray.tables.garbage import Item, find_items, names_in
from synpref_ray.tables.leases import Lease
from synpref_ray.tables.parts import pool_parts
from synpref_ray.tables.pools import Pool, commit_pool, write_pool_shard
from synpref_ray.tables.selection import Piece
from synpref_ray.tables.sets import Member, save_set
from synpref_ray.tables.sidecars import Sidecar
from tests.builders import make_pairs
from tests.pipeline.test_steps import LENGTHS, counting_step, make_pool


def lengths(pool: Pool, version: int, beside: tuple[Sidecar, ...] = ()) -> Sidecar:
    step = replace(counting_step(Path(pool.storage.url) / "log", Resources()), version=version)
    inputs = StepInput(pool, ("chosen",), tuple((sidecar, {"chosen_characters": f"before.{sidecar.fingerprint}"}) for sidecar in beside))
    return run_step(step, [inputs]).sidecars[0][0]


def may_go(pool: Pool, *, unfinished: bool = False) -> dict[str, str]:
    return {item.path: item.kind for item in find_items(pool.storage, unfinished=unfinished) if item.may_go}


def why_kept(pool: Pool, path: str) -> str:
    return next(item.kept for item in find_items(pool.storage) if item.path == path)


def test_old_versions_may_go_and_what_a_record_reaches_stays(tmp_path: Path) -> None:
    pool = make_pool(tmp_path, "seed", [3, 2])
    used, unused = lengths(pool, 1), lengths(pool, 2)
    on_top = lengths(pool, 3, (used,))
    newest = lengths(pool, 4)
    assert may_go(pool) == dict.fromkeys((used.folder, unused.folder, on_top.folder), "table")
    pool.storage.write_json("rounds/stage2.json", {"decision": on_top.fingerprint})
    assert may_go(pool) == {unused.folder: "table"}
    assert why_kept(pool, used.folder) == "a record refers to it"  # through the manifest of the one on top
    assert why_kept(pool, newest.folder) == "the newest version of its kind"


def test_sets_keep_their_members(tmp_path: Path) -> None:
    pool = make_pool(tmp_path, "seed", [3])
    old, _ = lengths(pool, 1), lengths(pool, 2)
    assert old.folder in may_go(pool)
    save_set(pool.storage, "silver-r00", [Member(old, ())])
    assert may_go(pool) == {}


def test_an_unfinished_table_goes_only_when_asked_for_and_never_under_a_lease(tmp_path: Path) -> None:
    pool = make_pool(tmp_path, "seed", [3])
    table = lengths(pool, 1)
    pool.storage.delete(f"{table.folder}/manifest.json")
    assert may_go(pool) == {}
    assert may_go(pool, unfinished=True) == {table.folder: "unfinished table"}
    with Lease(pool.storage, f"{table.folder}/lease.json"):
        assert may_go(pool, unfinished=True) == {}


def test_a_gathered_pool_goes_with_its_tables_unless_something_of_it_is_in_use(tmp_path: Path) -> None:
    seed = make_pool(tmp_path, "seed", [4, 3])
    table = lengths(seed, 1)
    pools = [gather_pool(seed.storage, "round-01-selected", [Piece(seed, 0, rows)], inputs={}) for rows in ((0,), (1, 2))]
    sidecars = [gather_sidecars("lengths", LENGTHS, [(pool, {"seed": table})])[0] for pool in pools]
    paths = [f"pools/{pool.name}" for pool in pools]
    assert may_go(seed) == dict.fromkeys(paths, "gathered pool")
    seed.storage.write_json("rounds/01/round.json", {"selected_pool": pools[0].name})
    assert may_go(seed) == {paths[1]: "gathered pool", sidecars[0].folder: "table"}
    seed.storage.write_json("rounds/stage2.json", {"decision": sidecars[1].fingerprint})
    assert may_go(seed) == {sidecars[0].folder: "table"}


def test_the_pool_that_notes_are_from_stays_while_the_notes_do(tmp_path: Path) -> None:
    seed = make_pool(tmp_path, "seed", [4, 3])
    storage, old, new = seed.storage, *(gather_pool(seed.storage, "seed-preverified", [Piece(seed, 0, rows)], inputs={}) for rows in ((0,), (1, 2)))
    tables = [lengths(pool, 1) for pool in (old, new)]
    unused = lengths(new, 2)
    assert may_go(seed) == dict.fromkeys((f"pools/{old.name}", f"pools/{new.name}"), "gathered pool")
    storage.write_table("annotation/notes/seed.parquet", make_pairs(1))
    assert may_go(seed) == {}  # notes of an earlier version, which do not say what they are from
    assert "annotation/notes/seed.parquet may be from it" in why_kept(seed, tables[0].folder)
    storage.write_json("annotation/notes/seed.json", {"pool": "seed", "gathered": new.name, "tables": {"noter": tables[1].fingerprint}})
    assert may_go(seed) == {f"pools/{old.name}": "gathered pool", unused.folder: "table"}
    assert why_kept(seed, f"pools/{new.name}") == why_kept(seed, tables[1].folder) == "a record refers to it"


def test_models_of_rounds_and_trainings(tmp_path: Path) -> None:
    pool = make_pool(tmp_path, "seed", [1])
    storage = pool.storage
    for name in ("best-r01-0123abcd", "gold-0123abcd", "reward-model-0123abcd"):
        storage.write_json(f"models/{name}/training_record.json", {})
        storage.write_bytes(f"tmp/train-{name}/identity.json", b"1")
    storage.write_bytes("tmp/train-best-r02-0123abcd/identity.json", b"1")
    storage.write_json("rounds/stage1.json", {"gold_rm": {"name": "gold-0123abcd"}})
    done = dict.fromkeys((f"tmp/train-{name}" for name in ("best-r01-0123abcd", "gold-0123abcd", "reward-model-0123abcd")), "training")
    assert may_go(pool) == {"models/best-r01-0123abcd": "model", **done}
    assert "tmp/train-best-r02-0123abcd" in may_go(pool, unfinished=True)


def test_an_index_stays_with_its_embeddings(tmp_path: Path) -> None:
    pool = make_pool(tmp_path, "seed", [3])
    old, new = lengths(pool, 1), lengths(pool, 2)
    for name, table in (("seed-0", old), ("seed-1", new)):
        pool.storage.write_json(f"indexes/{name}/manifest.json", {"fingerprint": "0" * 32, "embeddings": table.fingerprint})
    pool.storage.write_bytes("indexes/seed-2/trained.faiss", b"begun")
    assert may_go(pool) == {old.folder: "table", "indexes/seed-0": "index"}
    assert may_go(pool, unfinished=True)["indexes/seed-2"] == "unfinished index"


def test_the_parts_that_a_sealed_index_was_merged_from_may_go(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pool = make_pool(tmp_path, "seed", [3])
    table = lengths(pool, 1)
    manifest = {"fingerprint": "0" * 32, "embeddings": table.fingerprint}
    pool.storage.write_bytes("indexes/seed-0/parts/part-00000.faiss", b"merged")
    assert may_go(pool) == {}  # unfinished
    pool.storage.write_json("indexes/seed-0/manifest.json", manifest)
    assert may_go(pool) == {"indexes/seed-0/parts": "index parts"}
    assert clean.main([f"workspace={tmp_path}"]) == 0
    assert not pool.storage.list_files("indexes/seed-0/parts")
    assert pool.storage.read_json("indexes/seed-0/manifest.json") == manifest


def grow(pool: Pool, rows: int) -> Pool:
    new = write_pool_shard(pool.storage, pool.name, len(pool.shards), make_pairs(rows, f"grown {pool.version}"))
    return commit_pool(pool.storage, pool.name, "f" * 32, [*pool.shards, new], {})


def test_the_tables_of_the_parts_of_a_grown_pool_stay(tmp_path: Path) -> None:
    first = make_pool(tmp_path, "unverified", [3])
    old, of_first = lengths(first, 1), lengths(first, 2)
    second = pool_parts(first.storage, "unverified", grow(first, 2).version)[1]
    old_second, of_second = lengths(second, 1), lengths(second, 2)
    assert why_kept(first, of_first.folder) == "the newest version of its kind"
    assert why_kept(second, of_second.folder) == "the newest version of its kind"
    assert {*may_go(first)} == {old.folder, old_second.folder}
    named = [["unverified", table.name, table.fingerprint] for table in (old, old_second)]
    first.storage.write_json("rounds/01/round.json", {"pools": {"unverified": 1}, "candidates": named})
    assert may_go(first) == {}


def test_decisions_about_leaks_of_every_version_stay_and_older_ones_that_no_round_names_go(tmp_path: Path) -> None:
    pool = make_pool(tmp_path, "unverified", [3])
    paths = []
    for number, version in enumerate((pool, pool, grow(pool, 2))):
        folder = f"pools/unverified/{LEAKS}/{number:08d}"
        pool.storage.write_json(f"{folder}/manifest.json", {"pool_digest": version.digest, "fingerprint": f"{number:032d}"})
        os.utime(tmp_path / folder / "manifest.json", (number, number))
        paths.append(folder)
    assert may_go(pool) == {paths[0]: "table"}  # decided anew for the same version
    pool.storage.write_json("rounds/01/round.json", {"candidates": [["unverified", LEAKS, f"{0:032d}"]]})
    assert may_go(pool) == {}


def test_the_keys_of_a_comparison_stay_when_its_pool_has_grown(tmp_path: Path) -> None:
    pool = make_pool(tmp_path, "unverified", [3])
    grow(pool, 2)
    keys = Sidecar(pool, "text_keys", "a" * 32)
    pool.storage.write_json(f"{keys.folder}/manifest.json", {"pool_digest": "of an earlier version", "fingerprint": keys.fingerprint})
    assert keys.folder in may_go(pool)
    pool.storage.write_json("hygiene/0/done.json", {"name": "0", "pools": {"unverified": keys.fingerprint}})
    assert may_go(pool) == {}


def test_a_round_that_does_not_say_what_it_selected_from_keeps_all_that_it_may_have_read(tmp_path: Path) -> None:
    pool, other = make_pool(tmp_path, "unverified", [3]), make_pool(tmp_path, "wild", [2])
    old, _ = lengths(pool, 1), lengths(pool, 2)
    of_other, _ = lengths(other, 1), lengths(other, 2)
    pool.storage.write_json("models/gold-r01-0123abcd/training_record.json", {})
    record = {"round": 1, "pools": {"unverified": 0}}
    pool.storage.write_json("rounds/01/round.json", record)
    assert may_go(pool) == {of_other.folder: "table"}
    assert "does not say what it selected from" in why_kept(pool, old.folder)
    pool.storage.write_json("rounds/01/round.json", {**record, "candidates": []})
    assert may_go(pool) == {old.folder: "table", of_other.folder: "table", "models/gold-r01-0123abcd": "model"}
    pool.storage.write_json("rounds/01/round.json", {**record, "candidates": [], "gold_rm": "gold-r01-0123abcd"})
    assert "models/gold-r01-0123abcd" not in may_go(pool)


def write_run(pool: Pool, name: str, *events: str) -> None:
    lines = [json.dumps({"time": time.time() - 5.0, "event": event}) for event in events]
    pool.storage.write_bytes(f"runs/{name}/events.jsonl", "\n".join(lines).encode())


def test_what_a_stopped_job_made_is_kept_until_it_has_finished(tmp_path: Path) -> None:
    pool = make_pool(tmp_path, "seed", [3])
    write_run(pool, "stage1-20260101-000000-000001", "start", "step", "stop")
    old, _ = lengths(pool, 1), lengths(pool, 2)
    assert may_go(pool) == {}
    assert "stage1-20260101-000000-000001 began, which has not finished" in why_kept(pool, old.folder)
    assert may_go(pool, unfinished=True) == {old.folder: "table"}
    write_run(pool, "stage1-20260101-000000-000002", "start", "wait", "finish")  # for people's verdicts
    assert may_go(pool) == {}
    write_run(pool, "stage1-20260101-000000-000003", "start", "finish")
    assert may_go(pool) == {old.folder: "table"}


def test_the_job_lists_then_removes_and_what_stays_still_works(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pool = make_pool(tmp_path, "seed", [3])
    old, new = lengths(pool, 1), lengths(pool, 2)
    before = sorted(path for path in tmp_path.rglob("*") if path.is_file())
    assert clean.main([f"workspace={tmp_path}", "--dry-run"]) == 0
    assert f"{old.folder}" in capsys.readouterr().out
    assert sorted(path for path in tmp_path.rglob("*") if path.is_file()) == before
    assert clean.main([f"workspace={tmp_path}"]) == 0
    assert "removed 1" in capsys.readouterr().out
    assert not (tmp_path / old.folder).exists()
    assert new.read_all()["pair_id"].to_pylist() == pool.read_all(["pair_id"])["pair_id"].to_pylist()
    assert clean.main([f"workspace={tmp_path}"]) == 0
    assert "removed 0" in capsys.readouterr().out
    assert lengths(pool, 1).is_sealed  # and what went can be made again


def test_nothing_is_removed_while_a_job_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pool = make_pool(tmp_path, "seed", [3])
    old, _ = lengths(pool, 1), lengths(pool, 2)
    with Lease(pool.storage, "runs/stage1-20260101-000000-000001/lease.json"):
        assert clean.main([f"workspace={tmp_path}"]) == 2
        assert "is a job that is running" in capsys.readouterr().err
        assert clean.main([f"workspace={tmp_path}", "--dry-run"]) == 0
        assert "nothing can be removed until it ends" in capsys.readouterr().out
    assert old.is_sealed


def test_names_by_hand() -> None:
    value = {"human:round-01": ["a", {"b": 1}], "c": None}
    assert sorted(names_in(value)) == ["a", "b", "c", "human:round-01", "round-01"]
    assert Item("table", "x").may_go
