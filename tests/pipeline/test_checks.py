"""What `--dry-run` refuses before a model is loaded: verdicts that no pool can use, pools and sets that are not there."""

from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from synpref_ray.config import load_config
from synpref_ray.errors import InputError
from synpref_ray.pipeline.stage1 import Stage1Config, check_stage1
from synpref_ray.tables.pools import commit_pool, write_pool_shard
from synpref_ray.tables.sets import load_set
from synpref_ray.tables.storage import Storage
from tests.builders import make_pairs

CONFIG = str(Path(__file__).parents[2] / "jobs" / "configs" / "laptop_stage1.yaml")


def make_pool(storage: Storage, name: str, pairs: pa.Table) -> list[str]:
    commit_pool(storage, name, name, [write_pool_shard(storage, name, 0, pairs)], {})
    return [str(pair_id) for pair_id in pairs["pair_id"].to_pylist()]


@pytest.fixture
def workspace(tmp_path: Path) -> tuple[Storage, list[str]]:
    storage = Storage(str(tmp_path / "ws"))
    pairs = make_pairs(8)
    ids = make_pool(storage, "seed", pairs.slice(0, 4))
    make_pool(storage, "unverified", pairs.slice(4))
    return storage, ids


def check(storage: Storage, file: Path, *overrides: str) -> None:
    check_stage1(load_config(Stage1Config, CONFIG, [f"workspace={storage.url}", f"annotator.path={file}", *overrides]))


def write_verdicts(file: Path, ids: Sequence[str]) -> Path:
    rows = [{"pair_id": pair_id, "verdict": "chosen", "annotator": "a"} for pair_id in ids]
    pq.write_table(pa.Table.from_pylist(rows, pa.schema([(name, pa.string()) for name in ("pair_id", "verdict", "annotator")])), file)
    return file


def test_verdicts_must_be_of_use(workspace: tuple[Storage, list[str]], tmp_path: Path) -> None:
    storage, ids = workspace
    check(storage, write_verdicts(tmp_path / "some.parquet", ids[:2]))
    for useless in (["elsewhere"], []):
        with pytest.raises(InputError, match="no verdict on any pair"):
            check(storage, write_verdicts(tmp_path / "none.parquet", useless))
    with pytest.raises(InputError, match="every seed pair"):
        check(storage, write_verdicts(tmp_path / "all.parquet", ids))


def test_a_simulated_annotator_needs_its_truth(workspace: tuple[Storage, list[str]], tmp_path: Path) -> None:
    storage, ids = workspace
    simulated = ["annotator.kind=simulated", "annotator.seed_pairs=2"]
    check(storage, write_verdicts(tmp_path / "truth.parquet", ids), *simulated)
    with pytest.raises(InputError, match="there is no truth file"):
        check(storage, tmp_path / "absent.parquet", *simulated)
    with pytest.raises(InputError, match="no verdict on any pair"):
        check(storage, write_verdicts(tmp_path / "other.parquet", ["elsewhere"]), *simulated)


def test_what_is_not_there_is_said_with_what_is(workspace: tuple[Storage, list[str]], tmp_path: Path) -> None:
    storage, _ = workspace
    with pytest.raises(InputError, match=r"no set 'curated' .*none yet"):
        load_set(storage, "curated")
    empty = Storage(str(tmp_path / "empty"))
    make_pool(empty, "wild", make_pairs(2))
    with pytest.raises(InputError, match=r"pool 'seed' does not exist .*\(there: wild\).*begin with seed"):
        check(empty, write_verdicts(tmp_path / "v.parquet", ["a"]))
