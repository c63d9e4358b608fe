"""What a round of Stage 1 reads of pools that may grow: pinned when the round begins, so that a rerun reads the same, and a later round the new.

Paper: Sec. 3.2, Step 4 (newly gathered pairs join the unverified pool between iterations). Our choice: `rounds/NN/inputs.json` is written before
anything of a round is computed. A round that has one reads those versions whatever has been ingested since; a round that has none takes the newest.
The seed is read by round 0 alone: pairs that join it later are not read, and the log says so.
"""

import logging
from dataclasses import dataclass

from synpref_ray.pipeline.clusters import AUTO, OFF, choose_clusters
from synpref_ray.pipeline.leak_marks import open_leaks
from synpref_ray.rules.leaks import LEAKS
from synpref_ray.tables.parts import pool_parts
from synpref_ray.tables.pools import Pool, open_pool
from synpref_ray.tables.sidecars import Sidecar, list_sidecars, open_sidecar
from synpref_ray.tables.storage import Storage

SEED, UNVERIFIED = "seed", "unverified"
INPUTS = "inputs.json"
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class RoundInputs:
    """The versions of the pools that a round reads."""

    seed: int
    unverified: int


def inputs_path(number: int) -> str:
    """Return where round `number` keeps what it reads."""
    return f"rounds/{number:02d}/{INPUTS}"


def peek_inputs(storage: Storage, number: int) -> RoundInputs:
    """Return what round `number` reads, or would read if it began now; nothing is written.

    Raises:
        InputError: a pool is not there.
    """
    newest = RoundInputs(*(open_pool(storage, name).version for name in (SEED, UNVERIFIED)))
    path = inputs_path(number)
    if storage.exists(path):
        pinned = storage.read_json(path)["pools"]
        return RoundInputs(pinned[SEED], pinned[UNVERIFIED])
    if number:
        before = peek_inputs(storage, number - 1)
        return RoundInputs(before.seed, max(before.unverified, newest.unverified))
    return newest


def pin_inputs(storage: Storage, number: int) -> RoundInputs:
    """Return what round `number` reads, from now on for good."""
    inputs = peek_inputs(storage, number)
    if not storage.exists(inputs_path(number)):
        storage.write_json(inputs_path(number), {"round": number, "pools": {SEED: inputs.seed, UNVERIFIED: inputs.unverified}})
    newest = open_pool(storage, SEED).version
    if not number and newest > inputs.seed:
        logger.warning(
            "the pool seed has grown since round 0 read version %d of it (now %d): pairs that joined are not read; pairs for later rounds belong to "
            "the pool unverified, and without the folder rounds/ Stage 1 begins anew",
            inputs.seed,
            newest,
        )
    return inputs


def open_seed(storage: Storage, inputs: RoundInputs) -> Pool:
    """Return the seed as round 0 reads it."""
    return open_pool(storage, SEED, inputs.seed)


def choose_round_clusters(storage: Storage, wanted: str, inputs: RoundInputs) -> str:
    """Return the near-duplicate clusters that all rounds go by: those that cover the pools as round 0 read them (see `choose_clusters`).

    Pairs that join later keep their prompts' own groups where the comparison did not look at them: what gold is must not change under finished
    rounds.
    """
    return choose_clusters([open_seed(storage, inputs), open_pool(storage, UNVERIFIED, inputs.unverified)], wanted)


def leaks_so_far(storage: Storage, inputs: RoundInputs, wanted: str) -> list[Sidecar]:
    """Return the decisions about leaks of every version of the unverified pool up to the one that a round reads.

    Args:
        wanted: the setting `decontamination`.
    """
    versions = [open_pool(storage, UNVERIFIED, number) for number in range(inputs.unverified + 1)]
    if wanted in (AUTO, OFF):
        return [leaks for pool in versions if (leaks := open_leaks(pool, wanted))]
    named = [sidecar for pool in versions for sidecar in list_sidecars(pool, LEAKS, wanted)]
    return named or [open_sidecar(versions[-1], LEAKS, wanted)]


def unverified_parts(storage: Storage, inputs: RoundInputs) -> list[Pool]:
    """Return the parts of the unverified pool that a round reads."""
    return pool_parts(storage, UNVERIFIED, inputs.unverified)
