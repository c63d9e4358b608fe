"""Reads what a table has used up so far, from the records that its workers keep beside it (`pipeline/usage.py` writes them)."""

from collections import defaultdict

from synpref_ray.errors import InputError
from synpref_ray.tables.storage import Storage

USAGE = "usage"
"""Folder of a table where its workers write down what they use, an object each."""
OF_JOURNAL = {"shard_cost": "cost", "shard_prompt_tokens": "prompt_tokens", "shard_output_tokens": "output_tokens"}
"""Counters of a worker that stand for the whole journal of a shard, earlier runs included, and their names in the record."""


def read_usage(storage: Storage, folder: str) -> dict[str, float]:
    """Return `gpu_seconds`, `cost`, `prompt_tokens` and `output_tokens` of a table over all runs and workers so far; 0 where none is known.

    One listing, and an object a worker. What is unreadable counts for nothing: it is a record for people.
    """
    of_shards: dict[str, dict[str, float]] = defaultdict(lambda: dict.fromkeys(OF_JOURNAL.values(), 0.0))
    gpu_seconds = 0.0
    for entry in storage.list_entries(f"{folder}/{USAGE}"):
        for number, values in _read_shards(storage, f"{folder}/{USAGE}/{entry.name}").items():
            gpu_seconds += values.get("gpu_seconds", 0.0)
            known = of_shards[number]
            known.update({name: max(value, values.get(name, 0.0)) for name, value in known.items()})
    totals = {name: sum(values[name] for values in of_shards.values()) for name in OF_JOURNAL.values()}
    return {"gpu_seconds": gpu_seconds, **totals}


def _read_shards(storage: Storage, path: str) -> dict[str, dict[str, float]]:
    try:
        return {str(number): {name: float(value) for name, value in values.items()} for number, values in storage.read_json(path)["shards"].items()}
    except (InputError, KeyError, AttributeError, TypeError, ValueError):
        return {}
