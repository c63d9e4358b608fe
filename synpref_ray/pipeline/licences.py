"""The licences of training pairs, for model cards: what the ingest that made the workspace's pools recorded for each source (Our choice)."""

from synpref_ray.ingest.accounts import recorded_licences
from synpref_ray.ingest.source import Route
from synpref_ray.pipeline.ingest_growth import read_records
from synpref_ray.reward.model_card import CardConfig
from synpref_ray.tables.pools import open_pool, pool_exists
from synpref_ray.tables.storage import Storage


def with_source_licences(card: CardConfig, storage: Storage) -> CardConfig:
    """Return the settings with the licence of every source that ingest recorded one for; what they say themselves stands."""
    found: dict[str, str] = {}
    for route in Route:
        if pool_exists(storage, route.value):
            for record in read_records(open_pool(storage, route.value)):
                found |= recorded_licences(record)
    return card.model_copy(update={"source_licences": {**found, **card.source_licences}})
