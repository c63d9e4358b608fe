"""Example pairs of every decision, drawn by stable chance from a few shards, with the evidence that decided them."""

import math
from collections.abc import Mapping
from typing import Any

from synpref_ray.errors import InputError
from synpref_ray.reporting.report.content import NOTHING, Example, Examples, Section
from synpref_ray.reporting.report.curation import reason_words
from synpref_ray.reporting.report.records import Records
from synpref_ray.schema import Decision, stable_hash
from synpref_ray.tables.pools import open_pool
from synpref_ray.tables.sidecars import open_sidecar, zip_shard
from synpref_ray.tables.storage import Storage

MAX_SHARDS = 4  # ours: some ten thousand pairs to draw from, whatever the pool's size
MAX_TEXT_CHARACTERS = 2000
TITLES = {Decision.KEEP: "Kept", Decision.FLIP: "Flipped: the reply that its source preferred is now the rejected one", Decision.DROP: "Dropped"}
_EVIDENCE = ("decision", "decision_reason", "margin_best", "margin_gold", "judge_verdict")


def examples_section(storage: Storage, records: Records, *, count: int, seed: int = 0) -> Section | None:
    """Show `count` pairs of each decision, of as many reasons as there are."""
    record = records.stage2
    if record is None or not count:
        return None
    try:
        pool = open_pool(storage, record["pool"])
        decision = open_sidecar(pool, "decision", record["decision"])
    except InputError:  # the pool has grown since
        return None
    shards = sorted(pool.shards, key=lambda shard: stable_hash(seed, f"{pool.name}/{shard.number}", "report_shard"))[:MAX_SHARDS]
    found: dict[str, list[tuple[int, dict[str, Any]]]] = {name.value: [] for name in Decision}
    for shard in shards:
        table = decision.read(shard.number, ["pair_id", *_EVIDENCE])
        for place, row in enumerate(table.to_pylist()):
            found[row["decision"]].append((place, {**row, "shard": shard.number}))
    groups = []
    for name, title in TITLES.items():
        drawn = _draw(found[name.value], count, seed)
        texts: dict[tuple[int, int], dict[str, Any]] = {}
        for number in sorted({row["shard"] for _, row in drawn}):
            table = zip_shard(pool, number, ["prompt", "chosen", "rejected", "source"], [])
            places = [place for place, row in drawn if row["shard"] == number]
            texts |= {(number, place): row for place, row in zip(places, table.take(places).to_pylist(), strict=True)}
        pairs = tuple(_example(row, texts[row["shard"], place]) for place, row in drawn)
        if pairs:
            groups.append(Examples(title, pairs))
    lead = f"Drawn by chance from {len(shards)} of {len(pool.shards)} shards of {pool.name}, replies as they were ingested. Long texts are cut."
    return Section("examples", "Pairs", lead, tuple(groups)) if groups else None


def _draw(rows: list[tuple[int, dict[str, Any]]], count: int, seed: int) -> list[tuple[int, dict[str, Any]]]:
    """Return `count` rows in the order of their hash, one of each reason before a second of any."""
    ordered = sorted(rows, key=lambda entry: stable_hash(seed, entry[1]["pair_id"], "report_example"))
    nth: dict[str, int] = {}
    ranked = []
    for place, entry in enumerate(ordered):
        reason = entry[1]["decision_reason"]
        nth[reason] = nth.get(reason, 0) + 1
        ranked.append((nth[reason], place, entry))
    return [entry for *_, entry in sorted(ranked, key=lambda entry: entry[:2])[:count]]


def _example(row: Mapping[str, Any], texts: Mapping[str, Any]) -> Example:
    facts = {
        "best RM": _opinion(row["margin_best"]),
        "gold RM": _opinion(row["margin_gold"]),
        "judge": row["judge_verdict"] or "not asked, or may not decide",
    }
    return Example(
        pair_id=row["pair_id"],
        source=texts["source"],
        decision=row["decision"],
        reason=reason_words(row["decision_reason"]),
        prompt=tuple({"role": message["role"], "content": cut(message["content"])} for message in texts["prompt"]),
        chosen=cut(texts["chosen"]),
        rejected=cut(texts["rejected"]),
        facts=facts,
    )


def _opinion(margin: float | None) -> str:
    return NOTHING if margin is None else f"margin {margin:+.2f}, p {1 / (1 + math.exp(-max(-50.0, min(50.0, margin)))):.2f}"


def cut(text: str) -> str:
    """Return a text of bounded length, with characters that no page can hold as their pictures."""
    text = text.replace("\x00", "\u2400")
    left = len(text) - MAX_TEXT_CHARACTERS
    return f"{text[:MAX_TEXT_CHARACTERS]} … ({left} more characters)" if left > 0 else text
