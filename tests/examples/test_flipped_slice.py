"""The slice of real pairs with labels turned round: the truth tells which, prompts do not cross pools, and a seed is a slice."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from examples.make_flipped_slice import SliceConfig, main, take_slice
from synpref_ray.schema import pair_id, prompt_group

CONFIG = SliceConfig(num_pairs=40, num_held_out=10)


def rows(count: int) -> list[dict[str, Any]]:
    """Return pairs of two sources, three to a prompt, and one comparison that comes with both labels."""
    made = []
    for number in range(count):
        prompt = [{"role": "user", "content": f"Question {number // 3}?"}]
        made.append({"prompt": prompt, "chosen": f"good {number}", "rejected": f"bad {number}", "source": f"s{number // 3 % 2}"})
    return [*made, {**made[0], "chosen": made[0]["rejected"], "rejected": made[0]["chosen"]}]


def test_a_slice_keeps_prompts_apart_and_the_truth_finds_the_published_label() -> None:
    taken = take_slice(rows(120), CONFIG)
    assert {pool: len(pairs) for pool, pairs in taken.items()} == {"held_out": 10, "seed": 10, "unverified": 14, "wild": 16}
    groups = {pool: {prompt_group(pair["prompt"]) for pair in pairs} for pool, pairs in taken.items()}
    assert sum(len(found) for found in groups.values()) == len(set.union(*groups.values()))
    pairs = [pair for found in taken.values() for pair in found]
    assert all(("good" in pair["chosen"]) == (pair["verdict"] == "chosen") for pair in pairs)
    assert all(pair["verdict"] == "chosen" for pair in taken["held_out"])
    flipped = sum(pair["verdict"] == "rejected" for pair in pairs)
    assert 4 <= flipped <= 20  # 30 % of 40; the same for everybody, since chance is by name
    assert all({pair["source"] for pair in found} == {"s0", "s1"} for found in taken.values())
    assert take_slice(rows(120), CONFIG) == taken
    assert not any(pair["verdict"] == "rejected" for pair in take_slice(rows(120), SliceConfig(40, 10, 0.3, ("wild",)))["seed"])


def test_what_is_written_is_what_ingest_will_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "hh_rlhf").mkdir()
    pq.write_table(pa.Table.from_pylist(rows(120)), tmp_path / "hh_rlhf" / "train.parquet")
    assert main(["--data", str(tmp_path), "--output", str(tmp_path / "out"), "--pairs", "40", "--held-out", "10"]) == 0
    assert "labels turned round" in capsys.readouterr().out
    truth = set(pq.read_table(tmp_path / "out" / "truth.parquet")["pair_id"].to_pylist())
    lines = [json.loads(line) for path in sorted((tmp_path / "out" / "pools").glob("*.jsonl")) for line in path.read_text().splitlines()]
    assert {pair_id(line["prompt"], line["chosen"], line["rejected"]) for line in lines} == truth
    assert main(["--data", str(tmp_path / "out"), "--output", str(tmp_path / "none")]) == 2
