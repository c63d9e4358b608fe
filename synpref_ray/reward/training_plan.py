"""Which pairs meet in which optimizer step, micro-batch and rank: pure arithmetic over ids and lengths (Paper: App. E).

Our choice (the paper gives the batch size only): the order of an epoch comes from hashes of pair ids, so it does not depend on workers or
restarts; lengths are sorted only inside a global batch, so that an optimizer step stays a random sample; every rank runs equally many
micro-batches, as each one may be a collective.
"""

from collections.abc import Sequence
from typing import Literal

import numpy as np

from synpref_ray.reward.packing import Group, plan_batches
from synpref_ray.schema import stable_hash


def plan_epoch(pair_ids: Sequence[str], *, seed: int, epoch: int, global_batch_pairs: int) -> list[list[int]]:
    """Return the global batches of one epoch as indices into `pair_ids`, each index once.

    Batches hold at most `global_batch_pairs` pairs and differ by at most one in size: no step is made of a few left-over pairs.
    """
    order = sorted(range(len(pair_ids)), key=lambda i: (stable_hash(seed, pair_ids[i], f"training order, epoch {epoch}"), i))
    num_batches = -(-len(order) // global_batch_pairs)
    return [part.tolist() for part in np.array_split(np.asarray(order, dtype=np.int64), num_batches)] if order else []


def plan_ranks(groups: Sequence[Group], max_tokens: int, world_size: int) -> list[list[list[int]]]:
    """Cut one global batch into micro-batches and deal them to ranks: equally many each, tokens about even.

    Returns:
        For each rank its micro-batches as indices into `groups`; an empty micro-batch means there was nothing left to split.
    """
    batches = plan_batches(groups, max_tokens)
    while len(batches) % world_size:
        largest = max(range(len(batches)), key=lambda i: (len(batches[i]), -i))
        if len(batches[largest]) < 2:
            batches.append([])
            continue
        batch = batches[largest]
        half = len(batch) // 2
        batches[largest : largest + 1] = [batch[:half], batch[half:]]
    batches.sort(key=lambda batch: -_tokens(groups, batch))
    ranks: list[list[list[int]]] = [[] for _ in range(world_size)]
    loads = [0] * world_size
    for batch in batches:
        rank = min((r for r in range(world_size) if len(ranks[r]) < len(batches) // world_size), key=lambda r: (loads[r], r))
        ranks[rank].append(batch)
        loads[rank] += _tokens(groups, batch)
    return ranks


def learning_rate_factor(step: int, num_steps: int, *, schedule: Literal["constant", "linear"], warmup_fraction: float) -> float:
    """Return what the learning rate is multiplied by in optimizer step `step` (1 to `num_steps`).

    Paper: App. E: constant in the final runs, linear decay after a warm-up in development. The decay would reach 0 one step after the last.
    """
    warmup = warmup_fraction * num_steps
    if step <= warmup:
        return step / (warmup + 1)
    return 1.0 if schedule == "constant" else min(1.0, (num_steps + 1 - step) / (num_steps - warmup))


def evaluation_steps(steps_per_epoch: int, num_epochs: int, evaluations_per_epoch: int) -> set[int]:
    """Return after which optimizer steps gold is evaluated: evenly through each epoch, its last step included."""
    per_epoch = {max(1, round(steps_per_epoch * part / evaluations_per_epoch)) for part in range(1, evaluations_per_epoch + 1)}
    return {epoch * steps_per_epoch + step for epoch in range(num_epochs) for step in per_epoch}


def _tokens(groups: Sequence[Group], batch: Sequence[int]) -> int:
    return sum(groups[i].num_rows for i in batch) * max((groups[i].row_tokens for i in batch), default=0)
