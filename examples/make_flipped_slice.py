"""Makes a slice of real human pairs with some labels turned round by seed: what flip detection is measured on.

Paper: Table 19 (how often flips agree with people). Our choice: the label as published is taken for the truth, and a known share is turned round, so
that precision and recall can be told. Published labels are wrong now and then too, which counts against whoever finds that out.

In:  DIR/hh_rlhf/train.parquet and DIR/human_extra/train.parquet (prompt, chosen, rejected, source), whichever are there; nothing of them is shipped.
Out: OUT/pools/{seed,unverified,wild}-SOURCE.jsonl, OUT/held_out.parquet (labels as published, prompts of no pool), OUT/truth.parquet.

    python examples/make_flipped_slice.py --data DIR --output OUT                   # 600 pairs, 30 % of the labels of every pool turned round
"""

import argparse
import json
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY))  # works without an installed package

from synpref_ray.schema import Verdict, comparison_id, pair_id, prompt_group, stable_hash, stable_uniform  # noqa: E402

FILES = ("hh_rlhf/train.parquet", "human_extra/train.parquet")
SHARES = {"seed": 0.25, "unverified": 0.35, "wild": 0.4}
"""Ours: a seed to verify half of, a pool for three rounds, and most for Stage 2."""


@dataclass(frozen=True)
class SliceConfig:
    """Which pairs are taken, and how many of their labels are turned round."""

    num_pairs: int = 600
    num_held_out: int = 200
    flipped: float = 0.3
    flipped_pools: tuple[str, ...] = tuple(SHARES)
    max_characters: int = 1500  # of prompt and both replies: two cores shall be done within the hour
    seed: int = 0


def take_slice(rows: Sequence[Mapping[str, Any]], config: SliceConfig) -> dict[str, list[dict[str, Any]]]:
    """Return pairs by pool (and `held_out`), each with its `verdict`; sources alike, all pairs of a prompt in one pool.

    Args:
        rows: prompt, chosen, rejected, source; a comparison that comes again, or with both labels, is taken once at most.
    """
    groups: dict[str, dict[str, list[dict[str, Any]]]] = {}
    seen: set[str] = set()
    for row in rows:
        name = comparison_id(row["prompt"], row["chosen"], row["rejected"])
        length = len(row["chosen"]) + len(row["rejected"]) + sum(len(message["content"]) for message in row["prompt"])
        if name not in seen and length <= config.max_characters:
            groups.setdefault(row["source"], {}).setdefault(prompt_group(row["prompt"]), []).append(dict(row))
        seen.add(name)
    queues = {source: sorted(of, key=lambda group: stable_hash(config.seed, group, "slice")) for source, of in sorted(groups.items())}
    wanted = {"held_out": config.num_held_out, **{pool: round(share * config.num_pairs) for pool, share in SHARES.items()}}
    taken: dict[str, list[dict[str, Any]]] = {pool: [] for pool in wanted}
    while any(queues.values()) and (open_pools := [pool for pool, count in wanted.items() if len(taken[pool]) < count]):
        pool = min(open_pools, key=lambda pool: len(taken[pool]) / wanted[pool])
        source = min((name for name, queue in queues.items() if queue), key=lambda name: sum(pair["source"] == name for pair in taken[pool]))
        room = wanted[pool] - len(taken[pool])
        taken[pool] += [_labelled(pair, pool, config) for pair in groups[source][queues[source].pop()][:room]]
    return taken


def _labelled(row: Mapping[str, Any], pool: str, config: SliceConfig) -> dict[str, Any]:
    """Return the pair as it is shipped: replies swapped where chance says so, and then `rejected` is the better one."""
    name = comparison_id(row["prompt"], row["chosen"], row["rejected"])
    flip = pool in config.flipped_pools and stable_uniform(config.seed, name, "flip_label") < config.flipped
    chosen, rejected = (row["rejected"], row["chosen"]) if flip else (row["chosen"], row["rejected"])
    pair = {"prompt": row["prompt"], "chosen": chosen, "rejected": rejected, "source": row["source"]}
    return {**pair, "pair_id": pair_id(row["prompt"], chosen, rejected), "verdict": (Verdict.REJECTED if flip else Verdict.CHOSEN).value}


def write_slice(output: Path, taken: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    """Write the files; return a line for each pool."""
    (output / "pools").mkdir(parents=True, exist_ok=True)
    columns, lines = ("prompt", "chosen", "rejected"), []
    for pool, pairs in taken.items():
        if pool == "held_out":
            pq.write_table(pa.Table.from_pylist([{name: pair[name] for name in columns} for pair in pairs]), output / "held_out.parquet")
            continue
        for source in sorted({pair["source"] for pair in pairs}):
            mine = [json.dumps({name: pair[name] for name in columns}, ensure_ascii=False) for pair in pairs if pair["source"] == source]
            name = re.sub(r"[^a-z0-9]+", "_", source.lower())
            (output / "pools" / f"{pool}-{name}.jsonl").write_text("\n".join(mine) + "\n", encoding="utf-8")
        flipped = sum(pair["verdict"] == Verdict.REJECTED.value for pair in pairs)
        lines.append(f"{pool}: {len(pairs)} pairs, {flipped} labels turned round")
    truth = [{"pair_id": pair["pair_id"], "verdict": pair["verdict"]} for pool, pairs in taken.items() if pool != "held_out" for pair in pairs]
    pq.write_table(pa.Table.from_pylist(sorted(truth, key=lambda row: row["pair_id"])), output / "truth.parquet")
    return "\n".join([*lines, f"held_out: {len(taken['held_out'])} pairs", f"wrote {output}"])


def main(argv: Sequence[str]) -> int:
    """Make the slice and print what is in it."""
    defaults = SliceConfig()
    parser = argparse.ArgumentParser(description="Make a slice of real pairs with some labels turned round.")
    parser.add_argument("--data", type=Path, required=True, help=f"folder with {' and '.join(FILES)}")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--pairs", type=int, default=defaults.num_pairs)
    parser.add_argument("--held-out", type=int, default=defaults.num_held_out)
    parser.add_argument("--flipped", type=float, default=defaults.flipped, help="share of labels turned round")
    parser.add_argument("--flipped-pools", nargs="+", default=list(defaults.flipped_pools), choices=list(SHARES))
    parser.add_argument("--max-characters", type=int, default=defaults.max_characters)
    parser.add_argument("--seed", type=int, default=defaults.seed)
    given = parser.parse_args(argv)
    there = [given.data / file for file in FILES if (given.data / file).is_file()]
    if not there:
        print(f"{given.data} holds neither {' nor '.join(FILES)}", file=sys.stderr)  # noqa: T201
        return 2
    rows = [row for file in there for row in pq.read_table(file, columns=["prompt", "chosen", "rejected", "source"]).to_pylist()]
    pools = tuple(given.flipped_pools)
    config = SliceConfig(given.pairs, given.held_out, given.flipped, pools, given.max_characters, given.seed)
    print(write_slice(given.output, take_slice(rows, config)))  # noqa: T201
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
