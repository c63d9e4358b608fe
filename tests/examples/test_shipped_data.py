"""The committed files of examples/data: what ingest will read, what the truth says, and that neither gives away the other."""

import json
from collections import Counter
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from examples import make_pool
from examples.demo_tasks.assembly import HELD_OUT_POOL
from examples.demo_tasks.kinds import CHECKS, Task, build_tasks
from synpref_ray.schema import comparison_id, pair_id, prompt_group

DATA = Path(make_pool.__file__).parent / "data"
POOLS = ("seed", "unverified", "wild", HELD_OUT_POOL)
Row = dict[str, object]


@pytest.fixture(scope="module")
def shipped() -> dict[str, list[Row]]:
    pools = {name: [json.loads(line) for line in (DATA / "pools" / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()] for name in POOLS[:3]}
    return pools | {HELD_OUT_POOL: pq.read_table(DATA / "held_out.parquet").to_pylist()}


@pytest.fixture(scope="module")
def truth() -> dict[str, Row]:
    rows = pq.read_table(DATA / "truth.parquet").to_pylist()
    assert len({row["pair_id"] for row in rows}) == len(rows)
    return {row["pair_id"]: row for row in rows}


@pytest.fixture(scope="module")
def tasks() -> dict[str, Task]:
    return {task.text: task for task in build_tasks(make_pool.NUM_POOL_PROMPTS, make_pool.NUM_HELD_OUT_PROMPTS)}


def id_of(row: Row) -> str:
    return pair_id(row["prompt"], row["chosen"], row["rejected"])  # type: ignore[arg-type]


def text_of(row: Row) -> str:
    prompt = row["prompt"]
    assert isinstance(prompt, list)
    assert len(prompt) == 1
    return str(prompt[0]["content"])


def test_sizes_and_noise(shipped: dict[str, list[Row]], truth: dict[str, Row]) -> None:
    wrong = {name: sum(truth[id_of(row)]["verdict"] == "rejected" for row in rows) for name, rows in shipped.items()}
    assert {name: len(rows) for name, rows in shipped.items()} == {"seed": 150, "unverified": 300, "wild": 500, HELD_OUT_POOL: 400}
    assert wrong == {"seed": 15, "unverified": 30, "wild": 150, HELD_OUT_POOL: 0}
    assert len(truth) == 1350


def test_truth_is_what_the_checkers_say(shipped: dict[str, list[Row]], truth: dict[str, Row], tasks: dict[str, Task]) -> None:
    for name, rows in shipped.items():
        for row in rows:
            known, task = truth[id_of(row)], tasks[text_of(row)]
            passed = tuple(CHECKS[task.kind](str(row[reply]), task.slots) for reply in ("chosen", "rejected"))
            assert (known["pool"], known["kind"], task.held_out) == (name, task.kind, name == HELD_OUT_POOL)
            assert passed == ((True, False) if known["verdict"] == "chosen" else (False, True))


def test_prompts_are_disjoint(shipped: dict[str, list[Row]]) -> None:
    groups = {name: {prompt_group(row["prompt"]) for row in rows} for name, rows in shipped.items()}  # type: ignore[arg-type]
    for first in POOLS:
        for second in POOLS[POOLS.index(first) + 1 :]:
            assert not groups[first] & groups[second]


def test_no_comparison_twice_and_few_pairs_per_prompt(shipped: dict[str, list[Row]]) -> None:
    rows = [row for rows in shipped.values() for row in rows]
    assert len({comparison_id(row["prompt"], row["chosen"], row["rejected"]) for row in rows}) == len(rows)  # type: ignore[arg-type]
    assert max(Counter(text_of(row) for row in rows).values()) <= 3


def test_pair_files_tell_nothing_but_the_pair(shipped: dict[str, list[Row]]) -> None:
    for name, rows in shipped.items():
        for number, row in enumerate(rows):
            assert set(row) == {"prompt", "chosen", "rejected", "source", "source_id"}
            assert (row["source"], row["source_id"]) == (f"demo_{name}", f"{name}-{number:04d}")


def test_flips_are_spread_over_the_file(shipped: dict[str, list[Row]], truth: dict[str, Row]) -> None:
    wrong = [truth[id_of(row)]["verdict"] == "rejected" for row in shipped["wild"]]
    halves = sum(wrong[:250]), sum(wrong[250:])
    assert min(halves) > 55  # 75 expected in each, standard deviation 5.1; more than that, since pairs of one prompt are neighbours


def test_script_makes_the_shipped_files_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert make_pool.main(["--output", str(tmp_path)]) == 0
    assert "wild: 500 pairs, 0.700 of labels right" in capsys.readouterr().out
    for name in ("pools/seed.jsonl", "pools/unverified.jsonl", "pools/wild.jsonl"):
        assert (tmp_path / name).read_bytes() == (DATA / name).read_bytes()
    for name in ("held_out.parquet", "truth.parquet"):
        assert pq.read_table(tmp_path / name).equals(pq.read_table(DATA / name))


def test_damaged_samples_file_is_one_line_and_exit_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    damaged = tmp_path / "samples.jsonl.gz"
    damaged.write_bytes(b"not gzip")
    assert make_pool.main(["--output", str(tmp_path), "--samples", str(damaged)]) == 2
    assert len(capsys.readouterr().err.strip().splitlines()) == 1
